"""What a picture's tiles cost at CoMemo-2B's sizes: position ids, plain and RoPE-DHR, and attention over them."""

import time

import torch
import torch.nn.functional as F
from _measure import Report, interleaved, parser, ratios
from bench_memory import per_call

from surgeon.families import family
from surgeon.models import read_config
from surgeon.positions_picture import TilePositions

GRIDS = ((1, 1), (1, 2), (2, 2), (2, 3), (3, 3), (3, 4))
HEADS, KV_HEADS, HEAD_DIM = 16, 8, 128
CONFIG = {
    "model_type": "surgeon_internvl",
    "surgeon": {
        "grafts": [],
        "passes": [],
        "layout": {"side": 16, "thumbnail": "last"},
        "positions": {"scheme": "rope_dhr", "tile_order": "row"},
    },
}


def attention(queries: int, keys: int) -> torch.Tensor:
    """One layer's self-attention of the last `queries` of `keys` tokens, causal."""
    q = torch.randn(1, HEADS, queries, HEAD_DIM)
    k, v = (torch.randn(1, KV_HEADS, keys, HEAD_DIM) for _ in range(2))
    return F.scaled_dot_product_attention(q, k, v, is_causal=queries > 1, enable_gqa=True)


def main() -> None:
    made = parser(__doc__, "tiles")
    made.add_argument("--threads", type=int, default=2)
    made.add_argument("--repetitions", type=int, default=3)
    made.add_argument("--seconds", type=float, default=0.3)
    options = made.parse_args()
    torch.set_num_threads(options.threads)
    report = Report("tiles", {"threads": options.threads, "dtype": "float32"})
    config, described = read_config(CONFIG), family("internvl")
    baseline = None
    with torch.inference_mode():
        for rows, columns in GRIDS:
            found = TilePositions.of(described, config, rows, columns)
            count = found.plain_ids
            label = f"{rows} x {columns} tiles"
            report.figure(f"{label}: visual tokens, and plain position ids", count)
            report.figure(f"{label}: RoPE-DHR position ids", found.ids)
            times = interleaved(
                {
                    "prefill": lambda n=count: per_call(lambda: attention(n, n), options.seconds, time.perf_counter),  # type: ignore[misc]
                    "decode": lambda n=count: per_call(lambda: attention(1, n), options.seconds, time.perf_counter),  # type: ignore[misc]
                },
                options.repetitions,
            )
            baseline = baseline or times
            for name, spread in times.items():
                report.figure(f"{label}: {name} attention / one tile's", ratios(spread, baseline[name]), "x")
    report.write(options.out)


if __name__ == "__main__":
    main()
