"""Chains planned as nodes: variants, splits, shapes, and what their kernels were compiled to."""

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

from exporters.fusion.node import KernelNode, compile_nodes, plan_nodes
from exporters.kernels import aot, pvm
from exporters.kernels.kernel import Step, TileConfig
from exporters.kernels.plan import TensorType, heuristic
from exporters.tensorrt.errors import EngineError
from exporters.tensorrt.plugins.launch import prepare
from exporters.tensorrt.plugins.variants import capabilities, largest, variant_specs_for
from exporters.tensorrt.profiles import Profile, Range

WIDTH, LATENT, HEAD_DIM = 96, 64, 32


def profiles(batch: int = 8, length: int = 4096, slots: int = 1024) -> list[Profile]:
    rows = {"B": Range.of(1, batch), "M": Range.of(1, slots)}
    return [
        Profile(name="decode", sizes=rows | {"S": Range.fixed(1), "T": Range.fixed(1)}),
        Profile(name="prefill", sizes=rows | {"S": Range.of(1, length), "T": Range.of(1, 64)}),
    ]


def of(*shape: int | str) -> TensorType:
    return TensorType(shape, "bfloat16")


MEMORY, SQUARE = of("B", 1, "M", HEAD_DIM), of(LATENT, LATENT)
INPUT_TYPES = {
    "hidden_states": of("B", "S", WIDTH), "keys": MEMORY, "values": MEMORY,
    "memory_mask": TensorType(("B", "M"), "bool"), "visual_token_mask": TensorType(("B", "S"), "bool"),
    "text_proj": of(LATENT, WIDTH), "input_norm": of(LATENT), "q_proj": SQUARE, "q_norm": of(HEAD_DIM),
    "o_proj": SQUARE, "post_attention_norm": of(LATENT), "gate_proj": of(40, LATENT), "up_proj": of(40, LATENT),
    "down_proj": of(LATENT, 40), "output_proj": of(WIDTH, LATENT), "alpha": of(1),
}  # fmt: skip


def planned(ranges: list[Profile]) -> dict[str, KernelNode]:
    nodes = plan_nodes(pvm.chain(1e-6), INPUT_TYPES, variant_specs_for(ranges), largest(ranges))
    return {node.step.name: node for node in nodes}


def test_forms_are_those_that_the_profiles_reach() -> None:
    assert [each.tokens for each in variant_specs_for(profiles())] == [4, 64, None]
    assert [each.tokens for each in variant_specs_for(profiles(batch=2, length=20))] == [4, None]
    assert [each.tokens for each in variant_specs_for(profiles(batch=1, length=4))] == [None]
    assert [dict(each.sizes)["S"] for each in variant_specs_for(profiles(length=100))] == [1, 64, 800]


def test_a_decoding_step_of_a_large_batch_is_cut_for_that() -> None:
    plugins = planned(profiles())
    variants = {name: plugin.described["variants"] for name, plugin in plugins.items()}
    of_one_token = prepare(plugins["pvm_attend"].described, [(8, 1, LATENT), *[(0,)] * 3, (8, 1, 1000, HEAD_DIM)])
    # attention's tiles are of one row's tokens, the others' of all rows'
    assert of_one_token.variant == variants["pvm_attend"][0]
    assert prepare(plugins["pvm_text"].described, [(8, 1, WIDTH)]).variant == variants["pvm_text"][1]


def test_every_form_has_the_number_of_splits_that_decoding_asks_for() -> None:
    plugins = planned(profiles(batch=1, length=64))
    attend = plugins["pvm_attend"].described
    (splits,) = {variant["constants"]["SPLITS"] for variant in attend["variants"]}
    assert splits == 16 and attend["outputs"][0]["shape"] == [("dim", 0, 0), ("dim", 0, 1), 2, splits, HEAD_DIM]
    for reader in ("pvm_retrieve", "pvm_inject"):
        assert {variant["constants"]["SPLITS"] for variant in plugins[reader].described["variants"]} == {splits}


def test_what_puts_splits_together_is_cut_for_as_many() -> None:
    seen: dict[int, set[int]] = {}

    def choose(step: Step, inputs: Mapping[str, TensorType]) -> TileConfig:
        if step.name == "pvm_retrieve":
            seen.setdefault(inputs["acc"].shape[1], set()).add(inputs["acc"].shape[3])
        return heuristic(step, inputs)

    ranges = profiles(batch=1, length=64)
    plan_nodes(pvm.chain(1e-6), INPUT_TYPES, variant_specs_for(ranges), largest(ranges), choose)
    # by a decoding step's tokens and a prompt's; with one split only while the splits themselves are being chosen
    assert {length: max(splits) for length, splits in seen.items()} == {1: 16, 64: 16}


def test_splits_are_fewer_where_prefill_would_need_too_much_memory() -> None:
    splits = {
        length: planned(profiles(8, length))["pvm_attend"].variants[0].launch.tile_config.splits
        for length in (64, 65536, 2**20)
    }
    assert splits == {64: 16, 65536: 2, 2**20: 1}


def test_a_mask_of_each_token_is_another_plugin_of_attention_alone() -> None:
    ranges = profiles()
    input_types = INPUT_TYPES | {"memory_mask": TensorType(("B", "S", "M"), "bool")}
    each = {
        n.step.name: n for n in plan_nodes(pvm.chain(1e-6), input_types, variant_specs_for(ranges), largest(ranges))
    }
    rows = planned(ranges)
    assert [name for name in rows if rows[name].key != each[name].key] == ["pvm_attend"]
    for nodes, expected in ((rows, False), (each, True)):
        variants = nodes["pvm_attend"].described["variants"]
        assert len(variants) == 3 and {variant["constants"]["MASK_PER_TOKEN"] for variant in variants} == {expected}


def test_layers_of_other_sizes_are_other_plugins() -> None:
    a, b, c = planned(profiles()), planned(profiles()), planned(profiles(length=2))
    assert all(a[name].key == b[name].key for name in a)
    assert a["pvm_attend"].key != c["pvm_attend"].key


def test_every_target_has_a_kernel_that_runs_there() -> None:
    plugins = {"pvm_text": planned(profiles(length=8))["pvm_text"]}
    compiled = compile_nodes(plugins, capabilities(["sm120", "sm87", "sm121"]))["pvm_text"]
    assert [[kernel["capability"] for kernel in variant["kernels"]] for variant in compiled["variants"]] == [
        [86, 89, 120]
    ] * 2
    assert all(".entry" in kernel["ptx"] for variant in compiled["variants"] for kernel in variant["kernels"])
    with pytest.raises(EngineError, match="need compute capability 8.0, and sm75 is older"):
        capabilities(["sm75", "sm80"])


def test_what_is_too_large_for_a_smaller_gpu_takes_fewer_stages_there(monkeypatch: pytest.MonkeyPatch) -> None:
    """As tile configs that were measured on a larger one may be."""

    def compile_large_stages(jobs: Sequence[aot.Job], cache: Path | None) -> list[dict[str, Any]]:
        kernel = {"entry": "k", "ptx": ".entry k()\n{ ret; }", "num_warps": 4, "scratch": 0}
        return [kernel | {"shared": job.launch.tile_config.num_stages * (60 << 10)} for job in jobs]

    def choose(step: Step, inputs: Mapping[str, TensorType]) -> TileConfig:
        return dataclasses.replace(heuristic(step, inputs), num_stages=3)

    monkeypatch.setattr(aot, "_compile", compile_large_stages)
    ranges = profiles(length=8)
    text = plan_nodes(pvm.chain(1e-6), INPUT_TYPES, variant_specs_for(ranges), largest(ranges), choose)[0]
    for variant in compile_nodes({"pvm_text": text}, [80, 89, 90])["pvm_text"]["variants"]:
        assert [kernel["shared"] >> 10 for kernel in variant["kernels"]] == [120, 60, 180]
