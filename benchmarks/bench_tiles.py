"""What an image's tiles cost at CoMemo-2B's sizes: position ids, plain and RoPE-DHR, and attention over them.

Times are one thread's processor time, which whatever else runs on the machine disturbs least.
"""

import time
from collections.abc import Callable

import torch
import torch.nn.functional as F
from _measure import Report, interleaved, parser, ratios
from bench_memory import per_call

from surgeon.families import family
from surgeon.models import read_config
from surgeon.positions_image import TilePositions

GRIDS = ((1, 1), (1, 2), (2, 2), (2, 3), (3, 3), (3, 4))
HEADS, HEAD_DIM = 16, 128
CONFIG = {
    "model_type": "surgeon_internvl",
    "surgeon": {
        "grafts": [],
        "passes": [],
        "layout": {"side": 16, "thumbnail": "last"},
        "positions": {"scheme": "rope_dhr", "tile_order": "row"},
    },
}


def attention(queries: int, keys: int) -> Callable[[], torch.Tensor]:
    """One layer's self-attention of the last `queries` of `keys` tokens, causal."""
    q, k, v = (torch.randn(1, HEADS, length, HEAD_DIM) for length in (queries, keys, keys))
    return lambda: F.scaled_dot_product_attention(q, k, v, is_causal=queries > 1)


def main() -> None:
    argument_parser = parser(__doc__, "tiles")
    argument_parser.add_argument("--repetitions", type=int, default=3)
    argument_parser.add_argument("--seconds", type=float, default=0.3)
    options = argument_parser.parse_args()
    torch.set_num_threads(1)
    report = Report("tiles", {"threads": 1, "dtype": "float32"})
    config, model_family = read_config(CONFIG), family("internvl")
    baseline = None
    with torch.inference_mode():
        for rows, columns in GRIDS:
            tile_positions = TilePositions.of(model_family, config, rows, columns)
            count = tile_positions.plain_ids
            label = f"{rows} x {columns} tiles"
            report.figure(f"{label}: visual tokens, and plain position ids", count)
            report.figure(f"{label}: RoPE-DHR position ids", tile_positions.ids)
            once = {"prefill": attention(count, count), "decode": attention(1, count)}
            times = interleaved(
                {name: lambda f=f: per_call(f, options.seconds, time.process_time) * 1e3 for name, f in once.items()},  # type: ignore[misc]
                options.repetitions,
            )
            baseline = baseline or times
            for name, spread in times.items():
                report.figure(f"{label}: {name} attention", spread, "ms")
                report.figure(f"{label}: {name} attention / one tile's", ratios(spread, baseline[name]), "x")
    report.write(options.out)


if __name__ == "__main__":
    main()
