"""decoder.onnx against transformers: prefill and decoding, rows of different lengths, DeepStack, grafts."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from transformers import DynamicCache

from checkpoints import tiny_checkpoint, tiny_config
from exporters.export import export_bundle
from exporters.onnx.decoder import decoder_graph
from pairs import MIXIN, PLAIN, PVM, DecoderRun, Pair
from surgeon import models
from surgeon.errors import BundleError, OptionError
from surgeon.families import family
from surgeon.memory.visibility import Visibility

Export = Callable[..., Pair]


class Reference:
    """One row through transformers' decoder in fp32, prompt and then token by token."""

    def __init__(self, model: torch.nn.Module) -> None:
        self.model = model
        self.cache = DynamicCache(config=model.config.text_config)

    @torch.inference_mode()
    def step(self, embeds: torch.Tensor, position_ids: torch.Tensor, **kwargs: object) -> np.ndarray:
        """embeds [S, d], position_ids [A, S] -> logits [S, V]."""
        out = self.model.model.language_model(
            inputs_embeds=embeds[None],
            position_ids=position_ids if len(position_ids) == 1 else position_ids[:, None],
            past_key_values=self.cache,
            use_cache=True,
            **kwargs,
        )
        return self.model.lm_head(out.last_hidden_state)[0].numpy()


@pytest.mark.parametrize(
    ("model_type", "recipe", "visibility"),
    [
        ("qwen3_vl", PVM, "causal"),
        ("qwen2_5_vl", PVM, "all"),
        ("qwen3_vl", MIXIN, "all"),
        ("qwen2_5_vl", MIXIN + PVM, "causal"),
        ("qwen3_vl", PLAIN, "causal"),
    ],
)
def test_prefill_and_decoding_give_the_logits_of_transformers(
    export: Export, model_type: str, recipe: tuple[str, ...], visibility: Visibility
) -> None:
    exported = export(model_type, recipe, visibility=visibility)
    model = models.load(exported.checkpoint)
    width, deepstack = exported.manifest.sizes.hidden_size, exported.manifest.sizes.deepstack
    generator = torch.Generator().manual_seed(0)
    lengths, steps = [11, 7], 5
    longest = max(lengths)
    rows = [torch.randn(n + steps, width, generator=generator) for n in lengths]
    # axes that differ, so that a frequency that turns with the wrong one is seen
    positions = [torch.stack([torch.arange(n + steps) * k // 2 for k in (2, 3, 5)]) for n in lengths]
    visual = [torch.zeros(n, dtype=torch.bool) for n in lengths]
    visual[0][2:6] = True
    visual[1][0:3] = True
    features = [torch.randn(deepstack, int(v.sum()), width, generator=generator) for v in visual]

    references = [Reference(model) for _ in rows]
    run = DecoderRun(exported, 2)
    feeds = {
        "inputs_embeds": np.full((2, longest, width), 7.0, np.float32),  # what lies in the padding must not matter
        "position_ids": np.zeros((3, 2, longest), np.int64),
        "write_indices": np.zeros(2, np.int64),
        "logits_indices": np.array([[n - 1, 0] for n in lengths]),
    }
    if PVM[0] in recipe:  # nothing else reads it
        feeds["visual_token_mask"] = np.zeros((2, longest), bool)
    if deepstack:
        feeds["deepstack"] = np.zeros((deepstack, 2, longest, width), np.float32)
    expected = []
    for b, (n, row, where) in enumerate(zip(lengths, rows, visual, strict=True)):
        kwargs: dict[str, object] = {}
        if deepstack:
            kwargs = {"visual_pos_masks": where[None], "deepstack_visual_embeds": list(features[b])}
            feeds["deepstack"][:, b, :n][:, where.numpy()] = features[b].numpy()
        if recipe:
            kwargs["visual_token_mask"] = where[None]
        logits = references[b].step(row[:n], positions[b][:, :n], **kwargs)
        expected.append(logits[[n - 1, 0]])
        feeds["inputs_embeds"][b, :n] = row[:n].numpy()
        feeds["position_ids"][:, b, :n] = positions[b][:, :n].numpy()
        if "visual_token_mask" in feeds:
            feeds["visual_token_mask"][b, :n] = where.numpy()
    memory = write_memory(exported, rows, visual, positions) if recipe else {}
    assert np.abs(run.step(**feeds, **memory) - np.stack(expected)).max() < 1e-4

    for step in range(steps):
        at = [n + step for n in lengths]
        got = run.step(
            inputs_embeds=np.stack([row[i : i + 1].numpy() for row, i in zip(rows, at, strict=True)]),
            position_ids=np.stack([p[:, i : i + 1].numpy() for p, i in zip(positions, at, strict=True)], 1),
            write_indices=np.array(at),
            logits_indices=np.zeros((2, 1), np.int64),
            **memory,
        )
        for b, i in enumerate(at):
            text = {"has_images": False} if recipe else {}
            want = references[b].step(rows[b][i : i + 1], positions[b][:, i : i + 1], **text)
            assert np.abs(got[b] - want).max() < 1e-4


def write_memory(
    exported: Pair, rows: list[torch.Tensor], visual: list[torch.Tensor], positions: list[torch.Tensor]
) -> dict[str, np.ndarray]:
    """memory.onnx over the rows' visual embeddings, padded to the longest, at their positions [A, S]; the mask of the
    rows' slots, and where in the sequence they stand."""
    slots = max(int(v.sum()) for v in visual)
    embeds = np.zeros((len(rows), slots, rows[0].shape[1]), np.float32)
    media = np.zeros((len(positions[0]), len(rows), slots), np.int64)
    mask, places = np.zeros((len(rows), slots), bool), np.zeros((len(rows), slots), np.int64)
    for b, (row, where) in enumerate(zip(rows, visual, strict=True)):
        count = int(where.sum())
        embeds[b, :count] = row[: len(where)][where].numpy()
        media[:, b, :count] = positions[b][:, : len(where)][:, where].numpy()
        mask[b, :count], places[b, :count] = True, where.nonzero().flatten()
    session = exported.session("memory")
    feeds = {"visual_embeds": embeds, "media_position_ids": media}
    feeds = {value.name: feeds[value.name] for value in session.get_inputs()}
    names = [output.name for output in session.get_outputs()]
    keys_and_values = dict(zip(names, session.run(names, feeds), strict=True))
    return keys_and_values | {"memory_mask": mask, "memory_places": places}


@pytest.mark.parametrize("recipe", [PVM, MIXIN], ids=["pvm", "mixin"])
def test_a_row_without_images_is_the_plain_model(export: Export, recipe: tuple[str, ...]) -> None:
    """Also beside a row with images, and in a batch where there is none at all."""
    exported = export("qwen3_vl", recipe)
    model = models.load(exported.checkpoint)
    embeds = torch.randn(2, 6, exported.manifest.sizes.hidden_size, generator=torch.Generator().manual_seed(2))
    positions = torch.arange(6).expand(3, 6)
    want = Reference(model).step(embeds[1], positions, has_images=False)
    feeds = {
        "inputs_embeds": embeds.numpy(),
        "position_ids": np.repeat(positions.numpy()[:, None], 2, 1),
        "logits_indices": np.repeat(np.arange(6)[None], 2, 0),
    }
    alone = DecoderRun(exported, 2).step(**feeds)
    assert np.abs(alone[1] - want).max() < 1e-4
    where = [torch.tensor([True, True, False, False, False, False]), torch.zeros(6, dtype=torch.bool)]
    memory = write_memory(exported, list(embeds), where, [positions, positions])
    if recipe == PVM:
        feeds["visual_token_mask"] = np.stack([w.numpy() for w in where])
    beside = DecoderRun(exported, 2).step(**feeds, **memory)
    assert np.abs(beside[1] - want).max() < 1e-4
    assert np.abs(beside[0] - alone[0]).max() > 1e-3  # the memory does something where there is one


@pytest.mark.parametrize(
    ("recipe", "functions"),
    [(PVM, ["PersistentVisualMemory"]), (MIXIN, ["Mixin"]), (MIXIN + PVM, ["Mixin", "PersistentVisualMemory"])],
    ids=["pvm", "mixin", "both"],
)
def test_the_graph_is_written_in_fused_operators(export: Export, recipe: tuple[str, ...], functions: list[str]) -> None:
    exported = export("qwen3_vl", recipe)
    memory = onnx.load(exported.bundle / "memory.onnx", load_external_data=False)
    mixins = sum(entry.kind == "mixin" for entry in exported.manifest.memory)
    assert sum(node.op_type == "RotaryEmbedding" for node in memory.graph.node) == mixins
    assert not any(node.op_type in ("Slice", "Split", "Neg") for node in memory.graph.node), "a rotary in pieces"
    model = onnx.load(exported.bundle / "decoder.onnx", load_external_data=False)
    nodes = model.graph.node
    layers = exported.manifest.sizes.num_hidden_layers
    count = {op: sum(node.op_type == op for node in nodes) for op in ("Attention", "TensorScatter", "RotaryEmbedding")}
    assert count == {"Attention": layers, "TensorScatter": 2 * layers, "RotaryEmbedding": 2 * layers}
    angles = 1 + (mixins > 0)
    assert [sum(node.op_type == op for node in nodes) for op in ("Cos", "Sin")] == [angles, angles], "shared by layers"
    assert {(n.domain, n.op_type) for n in nodes if n.domain} == {("surgeon", name) for name in functions}
    assert sorted((f.domain, f.name) for f in model.functions) == [("surgeon", name) for name in functions]
    weights = {t.name for t in model.graph.initializer if t.data_location == t.EXTERNAL}
    for node in nodes:
        assert not (node.op_type in ("Transpose", "Cast") and set(node.input) & weights), "a weight is copied"
        if node.op_type == "Attention":
            assert len(node.output) == 1
        assert not node.metadata_props
    produced = {name for node in nodes for name in node.output}
    assert {f"hidden_states.{i}" for i in range(layers)} <= produced


def test_depth_does_not_change_what_is_traced(export: Export, monkeypatch: pytest.MonkeyPatch) -> None:
    """Layers of one kind are traced once."""
    from exporters.onnx import decoder, trace

    traced = []
    original = trace.trace
    monkeypatch.setattr(trace, "trace", lambda *args: traced.append(args[0]) or original(*args))
    config = tiny_config("qwen3_vl", num_hidden_layers=12)
    graph = decoder.decoder_graph(family("qwen3_vl"), config, models.build_meta(config), torch.float32, 16)
    assert sum(isinstance(module, decoder.PreNormLayer) for module in traced) == 1
    assert sum(node.op_type == "Attention" for node in graph.graph) == 12
    assert "model.language_model.layers.11.mlp.down_proj.weight" in graph.graph.initializers


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"use_sliding_window": True, "sliding_window": 16, "max_window_layers": 0}, "sliding-window"),
        (
            {
                "rope_parameters": {
                    "rope_type": "longrope",
                    "rope_theta": 1e6,
                    "original_max_position_embeddings": 64,
                    "short_factor": [1.0] * 8,
                    "long_factor": [2.0] * 8,
                    "mrope_section": [4, 2, 2],
                }
            },
            "'longrope'",
        ),
    ],
)
def test_a_decoder_that_the_graph_cannot_say_is_refused(overrides: dict[str, object], message: str) -> None:
    config = tiny_config("qwen2_5_vl", **overrides)
    with pytest.raises(BundleError, match=message):
        decoder_graph(family("qwen2_5_vl"), config, models.build_meta(config), torch.float32, 16)


def test_rotary_embeddings_that_scale_attention(tmp_path: Path) -> None:
    """YaRN's angles come with a factor on cosine and sine."""
    rope = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 8.0, "original_max_position_embeddings": 32}
    sizes = {"num_hidden_layers": 2, "max_position_embeddings": 256, "text_type": "llama", "rope_parameters": rope}
    checkpoint = tiny_checkpoint(tmp_path / "source", "internvl", **sizes)
    model = models.load(checkpoint)
    assert model.model.language_model.rotary_emb.attention_scaling > 1.1
    export_bundle(checkpoint, tmp_path / "bundle", dtype=torch.float32, max_length=40, graphs=["decoder"])
    assert worst_logit(Pair(checkpoint, tmp_path / "bundle"), model) < 1e-4


def worst_logit(pair: Pair, model: torch.nn.Module) -> float:
    """How far the graph is from transformers, at most, over a prompt of as many tokens as the caches hold."""
    length = pair.manifest.max_length
    embeds = torch.randn(1, length, pair.manifest.sizes.hidden_size, generator=torch.Generator().manual_seed(0))
    positions = torch.arange(length)[None, None]
    want = Reference(model).step(embeds[0], positions[0])
    feeds = {"inputs_embeds": embeds, "position_ids": positions, "logits_indices": torch.arange(length)[None]}
    got = DecoderRun(pair, 1).step(**{name: value.numpy() for name, value in feeds.items()})
    return float(np.abs(got[0] - want).max())


def test_dynamic_rotary_embeddings_are_plain_up_to_the_pretraining_length(tmp_path: Path) -> None:
    rope = {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}
    sizes = {"num_hidden_layers": 2, "max_position_embeddings": 40, "text_type": "llama", "rope_parameters": rope}
    checkpoint = tiny_checkpoint(tmp_path / "source", "internvl", **sizes)
    with pytest.raises(OptionError, match="41 is out of range; this model takes 2 to 40 tokens, beyond which"):
        export_bundle(checkpoint, tmp_path / "bundle", dtype=torch.float32, max_length=41)
    config = tiny_config("internvl", **sizes)
    with pytest.raises(BundleError, match=r"max_length 41: beyond 40 tokens"):
        decoder_graph(family("internvl"), config, models.build_meta(config), torch.float32, 41)

    export_bundle(checkpoint, tmp_path / "bundle", dtype=torch.float32, max_length=40, graphs=["decoder"])
    assert worst_logit(Pair(checkpoint, tmp_path / "bundle"), models.load(checkpoint)) < 1e-4
