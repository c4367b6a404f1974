import dataclasses
from pathlib import Path

import pytest
import torch

from checkpoints import tiny_model
from exporters.kernels import autotune, launch, tuned, workload
from exporters.kernels.candidates import candidates
from exporters.kernels.kernel import TileConfig
from exporters.kernels.plan import plan
from exporters.kernels.tile_config import heuristic_tile_config
from exporters.kernels.workload import Size, attention_workload, draw, memory_workload
from patching import apply
from surgeon.errors import SurgeonError
from surgeon.memory.mixin import Mixin
from surgeon.memory.pvm import PersistentVisualMemory, persistent_visual_memory
from surgeon.memory.rotary import Rope

GPU = "NVIDIA Test 9000"


def pvm_graft() -> PersistentVisualMemory:
    return PersistentVisualMemory(96, 64, 80, head_dim=32, num_key_value_heads=1, eps=1e-6)


def mixin_graft() -> Mixin:
    return Mixin(64, 2, 96, Rope(32, 1e6), 1e-5)


GRAFTS = {"pvm": pvm_graft, "mixin": mixin_graft}


def measured(tile_config: TileConfig) -> tuned.Measured:
    return tuned.Measured(tile_config, 1e-6, 2e-6, 3)


@pytest.mark.parametrize("kind", GRAFTS)
@pytest.mark.parametrize("size", [Size(), Size(batch=8), Size(batch=2, length=200, slots=300)])
def test_candidates_are_sound(kind: str, size: Size) -> None:
    graft = GRAFTS[kind]()
    for chain, types in (attention_workload(graft, size), memory_workload(graft, size)):
        for each in plan(chain, types):
            shapes = {name: tensor.shape for name, tensor in each.inputs.items()}
            tile_configs = candidates(each.step, shapes, 4)
            assert tile_configs[0] == heuristic_tile_config(each.step.kernel, shapes, 4)
            assert len(tile_configs) > 1, each.step.name
            assert len(set(tile_configs)) == len(tile_configs)
            for tile_config in tile_configs:
                tuned._sound(dataclasses.asdict(tile_config))
                assert (
                    tile_config.tokens == 1
                    or 16 * tile_config.num_warps * 64 >= tile_config.tokens * tile_config.outputs / 2
                )


@pytest.mark.parametrize("kind", GRAFTS)
def test_only_products_of_tiles_need_shared_memory(kind: str) -> None:
    """One token reads its weights past it, so on a GPU with little of it there is as much to choose from."""
    few = {1: 0, 16: 0}
    for length in few:
        chain, types = attention_workload(GRAFTS[kind](), Size(length=length))
        for each in plan(chain, types):
            shapes = {name: tensor.shape for name, tensor in each.inputs.items()}
            whole, little = candidates(each.step, shapes, 4), candidates(each.step, shapes, 4, shared_memory=1)
            few[length] += len(whole) - len(little)
    assert few[1] == 0 < few[16]


@pytest.mark.parametrize("kind", GRAFTS)
def test_the_fastest_is_kept_and_computes_the_same(kind: str, folder: Path) -> None:
    chain, types = attention_workload(GRAFTS[kind](), Size(slots=70, dtype="float32"))
    tensors = draw(types, "cpu")
    (expected,) = launch.run(chain, tensors)
    times = iter(range(1000, 0, -1))

    def slower_first(runs: list) -> float:
        for run in runs:
            run()
        return float(next(times))

    def ends(*described):  # type: ignore[no-untyped-def]
        offered = candidates(*described)
        return [offered[0], offered[-1]]

    measurements = autotune.tune(chain, tensors, slower_first, offer=ends)
    assert [name.split()[0] for name in measurements] == [step.name for step in chain.steps]
    for each in measurements.values():
        assert each.tried > 1 and each.seconds < each.rule_seconds
    attend = next(name for name in measurements if "attend" in name)
    assert measurements[attend].tile_config.splits > 1  # the last that is tried
    tuned.keep(GPU, "3.6.0", measurements)

    chosen: list[bool] = []

    def choose(step, inputs):  # type: ignore[no-untyped-def]
        chosen.append(tuned.key(step, inputs) in tuned.read(GPU))
        return tuned.chooser(tuned.read(GPU))(step, inputs)

    (output,) = launch.run(chain, tensors, choose)
    assert chosen == [True] * len(chain.steps)
    torch.testing.assert_close(output, expected, rtol=1e-5, atol=1e-5)


def test_a_candidate_that_does_not_fit_is_left_out() -> None:
    from triton.runtime.errors import OutOfResources

    chain, types = attention_workload(pvm_graft(), Size(slots=20, dtype="float32"))
    calls: list[int] = []

    def first_alone(runs: list) -> float:
        calls.append(len(runs))
        step = runs[0].args[0][0].name
        if (step, calls.count(1)) == ("pvm_text", 1) or step != "pvm_text":
            return 1.0
        raise OutOfResources(300000, 100000, "shared memory")

    measurements = autotune.tune(chain, draw(types, "cpu"), first_alone)
    text = measurements[next(name for name in measurements if name.startswith("pvm_text"))]
    assert text.tried == 1 and text.tile_config == plan(chain, types)[0].tile_config


def test_runs_rotate_among_copies_that_no_cache_holds() -> None:
    chain, types = attention_workload(pvm_graft(), Size(slots=20, dtype="float32"))
    counts: list[int] = []

    def count(runs: list) -> float:
        counts.append(len({id(run.args[1]) for run in runs}))
        return 1.0

    autotune.tune(chain, draw(types, "cpu"), count, cache_bytes=100_000)
    assert counts[0] == -(-300_000 // (4 * (96 + 64 * 96)))


def test_a_drawn_workload_is_what_the_plain_definition_takes() -> None:
    graft = pvm_graft()
    chain, types = attention_workload(graft, Size(batch=2, length=3, slots=20, dtype="float32", visual_tokens=True))
    inputs = draw(types, "cpu")
    inputs["visual_token_mask"][0, 1] = True
    residual = inputs.pop("residual")
    expected = persistent_visual_memory(*(inputs[name] for name in chain.inputs if name != "residual"), eps=graft.eps)
    (output,) = launch.run(chain, {**inputs, "residual": residual})
    torch.testing.assert_close(output, residual + expected, rtol=1e-4, atol=1e-5)


def test_launches_are_measured_under_the_names_that_a_graft_asks_for() -> None:
    """The angles of a graft in half precision are fp32."""
    graft, size = mixin_graft().to(torch.bfloat16), Size(length=3, slots=20)
    for (chain, types), count in (
        (attention_workload(graft, size), size.length),
        (memory_workload(graft, size), size.slots),
    ):
        tensors = draw(types, "cpu")
        tensors["cos"], tensors["sin"] = graft.rope(torch.arange(count).expand(1, 1, count))
        asked = plan(chain, {name: launch.type_of(tensor) for name, tensor in tensors.items()})
        names = [tuned.key(each.step, each.inputs) for each in plan(chain, types)]
        assert names == [tuned.key(each.step, each.inputs) for each in asked]


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, ...]]:
    """Up to the GPU: the shapes of the keys that it is asked to measure with."""
    asked: list[tuple[int, ...]] = []

    def tune_on_gpu(chain, inputs):  # type: ignore[no-untyped-def]
        asked.append(tuple(inputs["keys"].shape))
        return {f"{chain.name}_text {inputs['keys'].shape[2]}": measured(TileConfig(outputs=32))}

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: GPU)
    monkeypatch.setattr(workload, "draw", lambda types, device: draw(types, "cpu"))
    monkeypatch.setattr(autotune, "tune_on_gpu", tune_on_gpu)
    return asked


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("autotune") / "source"
    tiny_model("qwen3_vl", torch.float32).save_pretrained(path)
    return path


def test_the_grafts_of_a_checkpoint_are_measured_and_kept(
    source: Path, folder: Path, tmp_path: Path, gpu: list[tuple[int, ...]]
) -> None:
    apply(source, tmp_path / "patched", "pvm:layers=1,3,latent=32")
    messages: list[str] = []
    report = autotune.tune_checkpoint(
        tmp_path / "patched", batches=[2], slots=[64, 96], progress=lambda what, done, total: messages.append(what)
    )
    assert [(shape[0], shape[2]) for shape in gpu] == [(2, 64), (2, 96)]  # once for both layers
    assert set(tuned.read(GPU)) == {"pvm_text 64", "pvm_text 96"}
    assert (report.gpu, report.file) == (GPU, folder / "nvidia-test-9000.json")
    assert messages == [f"pvm: {each.size}" for each in report.grafts]
    assert messages[0] == "pvm: float32, batch 2 x 1, 64 slots"


@pytest.mark.usefixtures("gpu")
def test_a_checkpoint_without_grafts_is_told(source: Path) -> None:
    with pytest.raises(SurgeonError, match="has no memory layers: patch it first"):
        autotune.tune_checkpoint(source)
