"""Checkpoints whose config and weights are not of one model: neither a command nor `surgeon.load` takes them."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file

import command
import surgeon
from checkpoints import has_tokenizer
from command import assert_refused, entries
from patching import apply
from surgeon import models
from surgeon.errors import CheckpointError

pytestmark = pytest.mark.skipif(not has_tokenizer(), reason="the demo checkpoint is not there")

INDEX = "model.safetensors.index.json"
UP_PROJ = "model.language_model.layers.2.mlp.up_proj.weight"
GRAFT = "model.language_model.layers.1.pvm.alpha"


@pytest.fixture(scope="session")
def patched(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The sharded checkpoint with PVM, its grafts in a file of their own."""
    target = tmp_path_factory.mktemp("cli") / "patched"
    apply(source, target, "pvm:layers=1,3,latent=32")
    return target


@pytest.fixture
def damaged(patched: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(patched, tmp_path / "damaged"))


def edit(path: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


def rewrite(directory: Path, name: str, change: Callable[[dict[str, torch.Tensor]], Any]) -> None:
    """Change the tensors of the file that holds tensor `name`."""
    file = directory / json.loads((directory / INDEX).read_text())["weight_map"][name]
    tensors = load_file(file)
    change(tensors)
    file.unlink()
    save_file(tensors, file, {"format": "pt"})


def without_a_tensor(path: Path) -> None:
    rewrite(path, UP_PROJ, lambda tensors: tensors.pop(UP_PROJ))
    edit(path / INDEX, lambda index: index["weight_map"].pop(UP_PROJ))


def without_grafts_in_the_index(path: Path) -> None:
    def change(index: dict[str, Any]) -> None:
        index["weight_map"] = {name: file for name, file in index["weight_map"].items() if ".pvm." not in name}

    edit(path / INDEX, change)


def stale_single_file(path: Path) -> None:
    weight_map = json.loads((path / INDEX).read_text())["weight_map"]
    tensors: dict[str, torch.Tensor] = {}
    for file in set(weight_map.values()):
        tensors |= {name: torch.zeros_like(tensor) for name, tensor in load_file(path / file).items()}
    save_file(tensors, path / "model.safetensors", {"format": "pt"})


def three_layers(path: Path) -> None:
    def change(config: dict[str, Any]) -> None:
        config["text_config"]["num_hidden_layers"] = 3
        config["text_config"].pop("layer_types", None)
        config["surgeon"]["grafts"][0]["layers"] = [1]

    edit(path / "config.json", change)


def other_shape(path: Path) -> None:
    rewrite(path, UP_PROJ, lambda tensors: tensors.update({UP_PROJ: tensors[UP_PROJ].T.contiguous()}))


def integers(path: Path) -> None:
    rewrite(path, UP_PROJ, lambda tensors: tensors.update({UP_PROJ: tensors[UP_PROJ].to(torch.int8)}))


def eight_bits_without_scales(path: Path) -> None:
    rewrite(path, UP_PROJ, lambda tensors: tensors.update({UP_PROJ: tensors[UP_PROJ].to(torch.float8_e4m3fn)}))


def a_tensor_of_no_place(path: Path) -> None:
    extra = "model.language_model.layers.1.pvm.beta"
    rewrite(path, GRAFT, lambda tensors: tensors.update({extra: torch.ones(1)}))
    edit(path / INDEX, lambda index: index["weight_map"].update({extra: index["weight_map"][GRAFT]}))


def record(content: Any) -> Callable[[Path], None]:
    def change(path: Path) -> None:
        edit(path / "config.json", lambda config: config.update(surgeon=content))

    return change


def no_record(path: Path) -> None:
    edit(path / "config.json", lambda config: config.pop("surgeon"))


def other_weights_named(path: Path) -> None:
    stale_single_file(path)
    (path / "model.safetensors").rename(path / "other.safetensors")
    edit(path / "config.json", lambda config: config.update(transformers_weights="other.safetensors"))


def adapter(path: Path) -> None:
    model = models.load(path)
    adapted = get_peft_model(model, LoraConfig(target_modules=["up_proj"], init_lora_weights=False))
    adapted.save_pretrained(path)
    assert (path / "adapter_model.safetensors").is_file()


FAULTS: dict[str, tuple[Callable[[Path], None], list[str]]] = {
    "tensor taken out": (without_a_tensor, ["does not hold", UP_PROJ]),
    "grafts not in the index": (without_grafts_in_the_index, ["does not hold", "layers.1.pvm.", "more"]),
    "stale single file": (stale_single_file, ["two sets of weights", "model.safetensors", INDEX, "remove"]),
    "three layers of four": (three_layers, ["no place for tensor", "layers.3."]),
    "other shape": (other_shape, [UP_PROJ, "[64, 128]", "[128, 64]"]),
    "integers": (integers, [UP_PROJ, "int8", "float32"]),
    "fp8 without scales": (eight_bits_without_scales, [UP_PROJ, "float8_e4m3fn", "float32"]),
    "tensor left over": (a_tensor_of_no_place, ["no place for tensor", "pvm.beta"]),
    "no record": (no_record, ["surgeon_qwen3_vl", "missing"]),
    "empty record": (record({}), ["surgeon_qwen3_vl", "empty"]),
    "record is a word": (record("pvm"), ["surgeon: ", "'pvm'"]),
    "grafts are an object": (record({"grafts": {"kind": "pvm"}, "passes": []}), ["surgeon.grafts: ", "list"]),
    "layers are a word": (record({"grafts": [{"kind": "pvm", "layers": "1"}]}), ["surgeon.grafts.0.layers: ", "'1'"]),
    "graft of no kind": (record({"grafts": [{"layers": [1], "latent": 32}]}), ["surgeon.grafts.0.kind: "]),
    "record of nothing": (record({"grafts": [], "passes": []}), ["neither grafts nor tile positions"]),
    "graft past the end": (record({"grafts": [{"kind": "pvm", "layers": [1, 4]}]}), ["layer 4", "4 layers"]),
    "graft twice": (record({"grafts": [{"kind": "pvm", "layers": [1, 1]}]}), ["two grafts pvm at layer 1"]),
    "unknown visibility": (
        record({"grafts": [{"kind": "pvm", "layers": [1, 3], "latent": 32, "visibility": "Causal"}]}),
        ["surgeon.grafts.0.visibility: ", "'Causal'"],
    ),
    "two visibilities": (
        record({"grafts": [{"kind": "pvm", "layers": [n], "visibility": v} for n, v in ((1, "all"), (3, "causal"))]}),
        ["different visibilities"],
    ),
    "weights named in the config": (other_weights_named, ["transformers_weights", "other.safetensors"]),
    "adapter": (adapter, ["adapter_config.json", "merge", "remove"]),
}
COMMANDS: dict[str, Callable[[Path, Path], tuple[object, ...]]] = {
    "inspect": lambda path, out: ("inspect", path),
    "patch": lambda path, out: ("patch", path, out, "--pass", "mixin:layers=2"),
    "dry run": lambda path, out: ("patch", path, "--dry-run", "--pass", "mixin:layers=2"),
    "export": lambda path, out: ("export", path, out, "--dtype", "fp32"),
    "generate": lambda path, out: ("generate", path, "--prompt", "What is this?", "--max-new-tokens", 2),
    "validate": lambda path, out: ("validate", path, path, "--prompt", "What is this?", "--steps", 1),
}


@pytest.mark.parametrize("name", COMMANDS)
@pytest.mark.parametrize("fault", FAULTS)
def test_every_command_refuses(damaged: Path, tmp_path: Path, fault: str, name: str) -> None:
    damage, expected = FAULTS[fault]
    damage(damaged)
    before = entries(damaged)
    assert_refused(command.run(*COMMANDS[name](damaged, tmp_path / "out")), *expected)
    assert [path.name for path in tmp_path.iterdir()] == ["damaged"] and entries(damaged) == before


@pytest.mark.parametrize("fault", FAULTS)
def test_loading_refuses(damaged: Path, fault: str) -> None:
    damage, expected = FAULTS[fault]
    damage(damaged)
    with pytest.raises(CheckpointError) as caught:
        surgeon.load(damaged)
    assert all(part in str(caught.value) for part in expected), caught.value
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["generate", pytest.param("bench", marks=pytest.mark.long)])
def test_a_process_of_its_own_says_one_line(damaged: Path, name: str) -> None:
    without_a_tensor(damaged)
    arguments = ("bench", damaged, "--tokens", 2) if name == "bench" else COMMANDS[name](damaged, damaged)
    done = command.process(*arguments)
    assert (done.returncode, done.stdout) == (2, "")
    (line,) = done.stderr.splitlines()
    assert line.startswith("error: ") and UP_PROJ in line


def test_the_checkpoint_itself_is_not_refused(patched: Path) -> None:
    """What the faults above are made of."""
    assert command.run(*COMMANDS["inspect"](patched, patched)).exit_code == 0
    surgeon.load(patched)
