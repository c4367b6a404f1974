import dataclasses
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from checkpoints import tiny_model
from exporters.kernels import autotune, launch, tuned, workload
from exporters.kernels.blocks import default_blocks
from exporters.kernels.candidates import candidates
from exporters.kernels.kernel import Blocks
from exporters.kernels.plan import plan
from exporters.kernels.workload import Size, draw, filling, reading
from patching import apply
from surgeon.memory.mixin import Mixin
from surgeon.memory.pvm import PersistentVisualMemory, persistent_visual_memory
from surgeon.memory.rotary import Rope

GPU = "NVIDIA Test 9000"


def pvm_graft() -> PersistentVisualMemory:
    return PersistentVisualMemory(96, 64, 80, head_dim=32, num_key_value_heads=1, eps=1e-6)


def mixin_graft() -> Mixin:
    return Mixin(64, 2, 96, Rope(32, 1e6), 1e-5)


GRAFTS = {"pvm": pvm_graft, "mixin": mixin_graft}


def measured(blocks: Blocks) -> tuned.Measured:
    return tuned.Measured(blocks, 1e-6, 2e-6, 3)


@pytest.mark.parametrize("kind", GRAFTS)
@pytest.mark.parametrize("size", [Size(), Size(batch=8), Size(batch=2, length=200, slots=300)])
def test_candidates_are_sound(kind: str, size: Size) -> None:
    graft = GRAFTS[kind]()
    for chain, types in (reading(graft, size), filling(graft, size)):
        for each in plan(chain, types):
            shapes = {name: tensor.shape for name, tensor in each.inputs.items()}
            found = candidates(each.step, shapes, 4)
            assert found[0] == default_blocks(each.step.kernel, shapes, 4)
            assert len(found) > 1, each.step.name
            assert len(set(found)) == len(found)
            for blocks in found:
                tuned._sound(dataclasses.asdict(blocks))
                assert blocks.tokens == 1 or 16 * blocks.num_warps * 64 >= blocks.tokens * blocks.outputs / 2


@pytest.mark.parametrize("kind", GRAFTS)
def test_the_fastest_is_kept_and_computes_the_same(kind: str, folder: Path) -> None:
    chain, types = reading(GRAFTS[kind](), Size(slots=70, dtype="float32"))
    given = draw(types, "cpu")
    (expected,) = launch.run(chain, given)
    times = iter(range(1000, 0, -1))

    def slower_first(runs: list) -> float:
        for run in runs:
            run()
        return float(next(times))

    def ends(*described):  # type: ignore[no-untyped-def]
        offered = candidates(*described)
        return [offered[0], offered[-1]]

    found = autotune.tune(chain, given, slower_first, offer=ends)
    assert [name.split()[0] for name in found] == [step.name for step in chain.steps]
    for each in found.values():
        assert each.tried > 1 and each.seconds < each.rule_seconds
    assert found[next(name for name in found if "attend" in name)].blocks.splits > 1  # the last that is tried
    tuned.keep(GPU, "3.6.0", found)

    chosen: list[bool] = []

    def choose(step, inputs):  # type: ignore[no-untyped-def]
        chosen.append(tuned.key(step, inputs) in tuned.read(GPU))
        return tuned.chooser(tuned.read(GPU))(step, inputs)

    (output,) = launch.run(chain, given, choose)
    assert chosen == [True] * len(chain.steps)
    torch.testing.assert_close(output, expected, rtol=1e-5, atol=1e-5)


def test_a_candidate_that_does_not_fit_is_left_out() -> None:
    from triton.runtime.errors import OutOfResources

    chain, types = reading(pvm_graft(), Size(slots=20, dtype="float32"))
    calls: list[int] = []

    def first_alone(runs: list) -> float:
        calls.append(len(runs))
        step = runs[0].args[0][0].name
        if (step, calls.count(1)) == ("pvm_text", 1) or step != "pvm_text":
            return 1.0
        raise OutOfResources(300000, 100000, "shared memory")

    found = autotune.tune(chain, draw(types, "cpu"), first_alone)
    text = found[next(name for name in found if name.startswith("pvm_text"))]
    assert text.tried == 1 and text.blocks == plan(chain, types)[0].blocks


def test_runs_rotate_among_copies_that_no_cache_holds() -> None:
    chain, types = reading(pvm_graft(), Size(slots=20, dtype="float32"))
    counts: list[int] = []

    def count(runs: list) -> float:
        counts.append(len({id(run.args[1]) for run in runs}))
        return 1.0

    autotune.tune(chain, draw(types, "cpu"), count, cache_bytes=100_000)
    assert counts[0] == -(-300_000 // (4 * (96 + 64 * 96)))


def test_a_drawn_workload_is_what_the_plain_definition_takes() -> None:
    graft = pvm_graft()
    chain, types = reading(graft, Size(batch=2, length=3, slots=20, dtype="float32", visual_tokens=True))
    given = draw(types, "cpu")
    given["visual_token_mask"][0, 1] = True
    onto = given.pop("onto")
    expected = persistent_visual_memory(*(given[name] for name in chain.inputs if name != "onto"), eps=graft.eps)
    (output,) = launch.run(chain, {**given, "onto": onto})
    torch.testing.assert_close(output, onto + expected, rtol=1e-4, atol=1e-5)


def test_the_command_says_that_it_needs_a_gpu(tmp_path: Path) -> None:
    if torch.cuda.is_available():
        pytest.skip("there is one")
    command = [sys.executable, "-m", "exporters.kernels.autotune", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 2 and "finds no CUDA device" in done.stderr


def test_the_command_measures_for_the_grafts_of_a_checkpoint(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    """Up to the GPU: what it is asked for, and what is kept."""
    tiny_model("qwen3_vl", torch.float32).save_pretrained(tmp_path / "source")
    apply(tmp_path / "source", tmp_path / "patched", "pvm:layers=1,3,latent=32")
    asked: list[int] = []

    def tune_on_gpu(chain, given):  # type: ignore[no-untyped-def]
        asked.append(given["keys"].shape[2])
        return {f"{chain.name}_text {given['keys'].shape[2]}": measured(Blocks(outputs=32))}

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: GPU)
    monkeypatch.setattr(workload, "draw", lambda types, device: draw(types, "cpu"))
    monkeypatch.setattr(autotune, "tune_on_gpu", tune_on_gpu)
    monkeypatch.setattr(sys, "argv", ["autotune", str(tmp_path / "patched"), "--slots", "64", "96"])
    autotune.main()
    assert asked == [64, 96]  # once for both layers
    assert set(tuned.read(GPU)) == {"pvm_text 64", "pvm_text 96"}
    assert "pvm_text: 2.00 us by rule, 1.00 us with Blocks(" in capsys.readouterr().out
