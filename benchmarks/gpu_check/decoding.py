"""Parts 2 and 3: what a memory costs a generated token, at the sizes of published models.

One step of the decoder with everything in place, so that it can become a CUDA graph: the token, its position and its
place in the KV cache stay the same from step to step, and the work with them.
"""

from typing import Any

import torch
from torch import Tensor

from benchmarks._measure import Spread, interleaved
from benchmarks._synthetic import QWEN3_VL_8B
from benchmarks.gpu_check import grafts
from benchmarks.gpu_check.counting import chains_of, counted_chains
from benchmarks.gpu_check.part import PartReport, Setting, difference
from benchmarks.gpu_check.timing import Timer
from exporters.kernels.cuda import use_fused
from surgeon.memory.decoder_layer import entry_name
from surgeon.memory.reading import Reading
from surgeon.memory.text_model import rotary

WAYS = ("without", "fused", "plain", "published")
"""No memory; fused kernels; plain torch, the memory computed once; plain torch, the visual tokens projected again at
every step."""


class FullCache:
    """Keys and values of `context` tokens and, in the last place, of the one that is computed."""

    def __init__(self, text: Any, batch: int, context: int, dtype: torch.dtype, device: str) -> None:
        shape = (batch, text.num_key_value_heads, context + 1, text.head_dim)
        self.keys = [torch.randn(shape, dtype=dtype, device=device) for _ in range(text.num_hidden_layers)]
        self.values = [torch.randn(shape, dtype=dtype, device=device) for _ in range(text.num_hidden_layers)]

    def update(self, keys: Tensor, values: Tensor, layer: int, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        self.keys[layer][:, :, -1:].copy_(keys)
        self.values[layer][:, :, -1:].copy_(values)
        return self.keys[layer], self.values[layer]


class Step:
    """One decoding step of a batch, in each of the ways."""

    def __init__(self, decoder: Any, head: Any, batch: int, context: int, slots: int) -> None:
        weight = head.weight
        device, dtype, text = str(weight.device), weight.dtype, decoder.config
        self.decoder, self.head = decoder, head
        self.cache = FullCache(text, batch, context, dtype, device)
        axes = 3 if "mrope_section" in (text.rope_parameters or {}) else 1
        positions = torch.full((axes, batch, 1), context, device=device)
        self.tokens = torch.full((batch, 1), 5, device=device)
        self.positions = positions if axes > 1 else positions[0]
        self.visual = torch.randn(batch, slots, text.hidden_size, dtype=dtype, device=device)
        # computed once: a graft's rope takes a table from the host, which no CUDA graph can record
        self.visual_angles = rotary(decoder, torch.arange(slots, device=device).expand(1, batch, -1))
        self.angles = rotary(decoder, positions[:1])
        self.mask = torch.ones((batch, slots), dtype=torch.bool, device=device)
        self.entries = {name: tuple(part.contiguous() for part in pair) for name, pair in self.project().items()}
        self.way = "without"

    def project(self) -> dict[str, tuple[Tensor, Tensor]]:
        return {
            entry_name(layer, kind): getattr(layer, kind).project(self.visual, self.visual_angles.get(kind))
            for layer in self.decoder.layers
            for kind in layer.graft_sites
        }

    def take(self, way: str) -> None:
        self.way = way
        use_fused(self.decoder, way == "fused")

    def __call__(self) -> Tensor:
        """-> logits [B, vocabulary]."""
        reading = None
        if self.way != "without":
            entries: Any = self.project() if self.way == "published" else self.entries
            reading = Reading(entries, self.mask, None, self.angles)
        hidden = self.decoder.embed_tokens(self.tokens)
        position_embeddings = self.decoder.rotary_emb(hidden, self.positions)
        for layer in self.decoder.layers:
            hidden = layer(
                hidden,
                reading=reading,
                attention_mask=None,
                past_key_values=self.cache,
                use_cache=True,
                position_embeddings=position_embeddings,
            )
        logits: Tensor = self.head(self.decoder.norm(hidden))[:, -1]
        self.next_tokens = logits.argmax(-1)
        return logits


def compare_logits(step: Step, report: PartReport, label: str) -> list[str]:
    """Whether all ways compute what they should: the memory changes something, the same in each of its forms, and by
    fused kernels where it says so -> what is wrong."""
    logits, failures = {}, []
    for way in WAYS:
        step.take(way)
        with counted_chains() as chains:
            logits[way] = step().float()
        if chains != (expected := chains_of(step.decoder, reads=way == "fused")):
            failures.append(f"{label}, {way}: fused kernels ran {dict(chains)}, not {dict(expected)}")

    def apart(one: str, other: str) -> float:
        return float((logits[one] - logits[other]).norm() / logits[other].norm())

    memory, fused, again = apart("without", "plain"), apart("fused", "plain"), apart("published", "plain")
    report.figure(f"{label}: logits with and without memory, relative", memory)
    report.figure(f"{label}: logits fused and plain, relative", fused)
    report.figure(f"{label}: logits projected again and once, relative", again)
    failures += [f"{label}: logits {way} are not finite" for way in WAYS if not bool(logits[way].isfinite().all())]
    if not max(fused, again) < min(memory / 4, 0.1):
        failures.append(
            f"{label}: the memory changes logits by {memory:.3g}, its fused form by {fused:.3g}, projected again by "
            f"{again:.3g}: these should be roundings"
        )
    return failures


def measure(step: Step, label: str, setting: Setting, clock: Timer, report: PartReport) -> dict[str, Spread]:
    """ms of a step, in turns, as CUDA graphs and launched one by one -> those of CUDA graphs."""
    replays, eager = {}, {}
    for way in WAYS:
        step.take(way)
        replays[way] = clock.captured(step)

        def one_by_one(way: str = way) -> float:
            step.take(way)
            return 1e3 * clock.per_call(step, 5)

        eager[way] = one_by_one
    count = setting.pick(20, 1)
    in_graphs = interleaved(
        {way: lambda replay=replay: 1e3 * clock.per_call(replay, count) for way, replay in replays.items()},  # type: ignore[misc]
        setting.pick(15, 1),
    )
    alone = interleaved(eager, setting.pick(5, 1))
    for how, times in (("CUDA graph", in_graphs), ("eager", alone)):
        for way in WAYS:
            report.figure(f"{label}, {how}: {way}", times[way], "ms/token")
        for way in WAYS[1:]:
            added, lost = cost(times, way)
            report.figure(f"{label}, {how}: {way} adds", added, "ms/token")
            report.figure(f"{label}, {how}: {way} takes of the throughput", lost, "%")
    return in_graphs


def cost(times: dict[str, Spread], way: str) -> tuple[Spread, Spread]:
    """What a way adds to a token in ms, and takes of the throughput in percent."""
    base = times["without"]
    lost = Spread(tuple(100 * (1 - b / t) for b, t in zip(base.values, times[way].values, strict=True)))
    return difference(times[way], base), lost


def refuse(failures: list[str]) -> None:
    """At the end: what was measured is worth having all the same."""
    if failures:
        raise AssertionError("\n".join(failures))


def parts_of(model: Any) -> tuple[Any, Any]:
    return model.base_model.language_model, model.get_output_embeddings()


@torch.inference_mode()
def pvm_8b(setting: Setting, clock: Timer, report: PartReport) -> None:
    """Qwen3-VL-8B with PVM over 1,024 visual tokens. Published: +1.18 ms and -4.6 %."""
    text, record = setting.pick((QWEN3_VL_8B, grafts.PVM_8B), (grafts.SMALL_TEXT, grafts.SMALL_PVM))
    decoder, head = parts_of(grafts.make_model(grafts.qwen3_vl(text, record), torch.bfloat16, setting.device))
    slots = setting.pick(1024, 24)
    failures: list[str] = []
    for batch in setting.pick((1, 8), (1, 2)):
        label = f"8B, PVM, batch {batch}"
        step = Step(decoder, head, batch, slots + setting.pick(256, 8), slots)
        failures += compare_logits(step, report, label)
        added, lost = cost(measure(step, label, setting, clock, report), "fused")
        if batch == 1:
            report.check(f"{label}: fused adds", added, "<=", 0.06, "ms/token")
            report.check(f"{label}: fused takes of the throughput", lost, "<=", 1.5, "%")
    refuse(failures)


@torch.inference_mode()
def mixin_2b(setting: Setting, clock: Timer, report: PartReport) -> None:
    """CoMemo-2B's decoder with 6 mixin layers over 1,792 visual tokens."""
    text, record = setting.pick((grafts.COMEMO_2B, grafts.MIXIN_2B), (grafts.SMALL_TEXT, grafts.SMALL_MIXIN))
    decoder, head = parts_of(grafts.make_model(grafts.comemo(text, record), torch.bfloat16, setting.device))
    slots = setting.pick(1792, 24)
    failures: list[str] = []
    for batch in setting.pick((1, 8, 32), (1, 2)):
        label = f"2B, mixin, batch {batch}"
        step = Step(decoder, head, batch, slots + setting.pick(256, 8), slots)
        failures += compare_logits(step, report, label)
        measure(step, label, setting, clock, report)
    refuse(failures)
