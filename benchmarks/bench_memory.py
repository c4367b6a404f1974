"""A memory layer's cost per generated token: keys and values kept, against visual tokens projected at every step."""

import time
from collections.abc import Callable

import torch
from _measure import Report, interleaved, parser, ratios
from torch import Tensor

from surgeon.memory.graft import Graft
from surgeon.memory.mixin import Mixin
from surgeon.memory.pvm import PersistentVisualMemory
from surgeon.memory.rotary import Rope, Rotary


def pvm() -> Graft:
    """At Qwen3-VL-8B's widths."""
    return PersistentVisualMemory(4096, 512, 1536, head_dim=128, num_key_value_heads=1, eps=1e-6)


def mixin() -> Graft:
    """At CoMemo-2B's widths."""
    return Mixin(2048, num_heads=16, intermediate_size=8192, rope=Rope(128, 1e6), eps=1e-5)


CASES = ((pvm, 4096, 1024, 12.0), (pvm, 4096, 4096, 35.0), (mixin, 2048, 1792, 15.0))
"""Graft, hidden size, visual tokens, and the least that keeping is to be cheaper."""
LATER = 16384


def per_call(function: Callable[[], Tensor], seconds: float, clock: Callable[[], float]) -> float:
    """Seconds (by `clock`) of the fastest call of as many as fit in `seconds` (at least 3), as timeit advises: whatever
    else runs on the machine only ever adds to a call."""
    times: list[float] = []
    begin = time.perf_counter()
    while len(times) < 3 or time.perf_counter() - begin < seconds:
        start = clock()
        function()
        times.append(clock() - start)
    return min(times)


class Kept:
    """A graft over an image's visual tokens, whose positions are 0, 1, ..., and one token that reads them."""

    def __init__(self, graft: Graft, visual_embeds: Tensor, token: Tensor) -> None:
        self.graft, self.visual_embeds, self.token = graft, visual_embeds, token
        self.mask = torch.ones(visual_embeds.shape[:2], dtype=torch.bool)
        self.keys, self.values = (tensor.contiguous() for tensor in self._project())  # as the visual memory keeps them
        projections = ("k_proj", "v_proj", "visual_proj")
        used = [p for n, p in graft.named_parameters() if p.ndim == 2 and n.split(".")[0] not in projections]
        used += [tensor.flatten(0, 2) for tensor in (self.keys, self.values)]
        self.matrices = [(matrix, torch.randn(matrix.shape[1])) for matrix in used]

    def _rotary(self, positions: Tensor) -> Rotary | None:
        return None if self.graft.rope is None else self.graft.rope(positions[None, None])

    def _project(self) -> tuple[Tensor, Tensor]:
        return self.graft.project(self.visual_embeds, self._rotary(torch.arange(self.visual_embeds.shape[1])))

    def _read(self, keys: Tensor, values: Tensor, position: int) -> Tensor:
        output: Tensor = self.graft.attend(
            self.token, keys, values, self.mask, None, self._rotary(torch.tensor([position]))
        )
        return output

    def step(self, position: int) -> Tensor:
        """The token's step, with keys and values kept."""
        return self._read(self.keys, self.values, position)

    def read_all(self) -> Tensor:
        """A matrix-vector product with each of the matrices that a step with kept keys and values uses, and with the
        keys and values themselves."""
        for matrix, vector in self.matrices:
            torch.mv(matrix, vector)
        return vector

    def projected(self, position: int) -> Tensor:
        """The same with the image projected again, as the published implementations do."""
        return self._read(*self._project(), position)


def main() -> None:
    argument_parser = parser(__doc__, "memory")
    argument_parser.add_argument("--threads", type=int, default=2)
    argument_parser.add_argument("--repetitions", type=int, default=15)
    argument_parser.add_argument(
        "--seconds", type=float, default=0.3, help="time spent on one repetition of one variant"
    )
    argument_parser.add_argument(
        "--processor-time", action="store_true", help="instead of wall time: for a busy machine, 1 thread"
    )
    options = argument_parser.parse_args()
    clock = time.process_time if options.processor_time else time.perf_counter
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    settings = {name: getattr(options, name) for name in ("threads", "repetitions", "processor_time")}
    report = Report("memory", settings | {"dtype": "float32"})
    with torch.inference_mode():
        for make, hidden_size, count, target in CASES:
            graft = make().eval()
            for gate in graft.gates:
                torch.nn.init.ones_(graft.get_parameter(gate))
            memory = Kept(graft, torch.randn(1, count, hidden_size), torch.randn(1, 1, hidden_size))
            torch.testing.assert_close(memory.step(count), memory.projected(count))
            variants: dict[str, Callable[[], Tensor]] = {
                "kept": lambda memory=memory, at=count: memory.step(at),  # type: ignore[misc]
                f"kept, {LATER:,} tokens later": lambda memory=memory, at=count + LATER: memory.step(at),  # type: ignore[misc]
                "reading what a kept step reads": lambda memory=memory: memory.read_all(),  # type: ignore[misc]
                "projected at every step": lambda memory=memory, at=count: memory.projected(at),  # type: ignore[misc]
            }
            spreads = interleaved(
                {n: lambda f=f: per_call(f, options.seconds, clock) * 1e3 for n, f in variants.items()},  # type: ignore[misc]
                options.repetitions,
            )
            label = f"{graft.kind}, {count:,} visual tokens"
            for name, spread in spreads.items():
                report.figure(f"{label}: {name}", spread, "ms a token and layer")
            near, later, reading, projected = spreads.values()
            report.check(f"{label}: projected / kept", ratios(projected, near), ">=", target, "x")
            report.figure(
                f"{label}: projected / reading what a kept step reads, which none can beat",
                ratios(projected, reading),
                "x",
            )
            report.figure(f"{label}: {LATER:,} tokens later / at once", ratios(later, near), "x")
    report.write(options.out)


if __name__ == "__main__":
    main()
