"""The memory branch's cost per generated token: keys and values kept, against visual tokens projected at every step."""

import time
from collections.abc import Callable

import torch
from _measure import Report, interleaved, parser, ratios
from torch import Tensor

from surgeon.memory.pvm import PersistentVisualMemory

HIDDEN, LATENT, INTERMEDIATE, HEAD_DIM, KV_HEADS = 4096, 512, 1536, 128, 1
TARGETS = {1024: 12.0, 4096: 35.0}


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


def main() -> None:
    made = parser(__doc__, "memory")
    made.add_argument("--threads", type=int, default=2)
    made.add_argument("--repetitions", type=int, default=15)
    made.add_argument("--seconds", type=float, default=0.3, help="time spent on one repetition of one variant")
    made.add_argument(
        "--processor-time", action="store_true", help="instead of wall time: for a busy machine, 1 thread"
    )
    options = made.parse_args()
    clock = time.process_time if options.processor_time else time.perf_counter
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    graft = PersistentVisualMemory(HIDDEN, LATENT, INTERMEDIATE, HEAD_DIM, KV_HEADS, 1e-6).eval()
    torch.nn.init.ones_(graft.alpha)
    token = torch.randn(1, 1, HIDDEN)
    settings = {name: getattr(options, name) for name in ("threads", "repetitions", "processor_time")}
    report = Report("memory", settings | {"dtype": "float32"})
    with torch.inference_mode():
        for count, target in TARGETS.items():
            visual = torch.randn(1, count, HIDDEN)
            mask = torch.ones(1, count, dtype=torch.bool)
            keys, values = graft.project(visual)

            def kept(keys: Tensor = keys, values: Tensor = values, mask: Tensor = mask) -> Tensor:
                return graft(token, keys, values, mask, None)

            def projected(visual: Tensor = visual, mask: Tensor = mask) -> Tensor:
                return graft(token, *graft.project(visual), mask, None)

            torch.testing.assert_close(kept(), projected())
            found = interleaved(
                {
                    "kept": lambda kept=kept: per_call(kept, options.seconds, clock) * 1e3,  # type: ignore[misc]
                    "projected": lambda projected=projected: per_call(projected, options.seconds, clock) * 1e3,  # type: ignore[misc]
                },
                options.repetitions,
            )
            report.figure(f"{count} visual tokens, keys and values kept", found["kept"], "ms a token and layer")
            report.figure(f"{count} visual tokens, projected each step", found["projected"], "ms a token and layer")
            report.check(
                f"{count} visual tokens, projected / kept", ratios(found["projected"], found["kept"]), ">=", target, "x"
            )
    report.write(options.out)


if __name__ == "__main__":
    main()
