"""The figures of `surgeon bench` as an image."""

from collections.abc import Sequence
from pathlib import Path

from exporters.bench.measure import Measured
from surgeon.errors import OptionError


def draw(found: Sequence[Measured], out: Path) -> None:
    """Speed, time to the first token and memory as bars, to the file `out`. Raises OptionError for a file type that
    cannot be written."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 1.4 + 0.5 * len(found)), layout="constrained")
    known = FigureCanvasAgg(figure).get_supported_filetypes()
    if out.suffix.removeprefix(".").lower() not in known:
        raise OptionError(f"cannot write {out}: choose a name that ends in .{', .'.join(sorted(known))}")
    names = [f"{Path(each.path).name}\n{each.stage}, {each.dtype}" for each in found]
    panels = (
        ("tokens per second", [each.speed for each in found], "{:.1f}"),
        ("first token, ms", [each.first_token * 1e3 for each in found], "{:.0f}"),
        ("peak memory, GiB", [(each.device_memory or each.peak_memory) / 2**30 for each in found], "{:.2f}"),
    )
    for axes, (title, values, form) in zip(figure.subplots(1, len(panels), sharey=True), panels, strict=True):
        bars = axes.barh(names, values, color="tab:blue")
        axes.bar_label(bars, [form.format(value) for value in values], padding=3)
        axes.set_title(title)
        axes.set_xlim(0, max(values) * 1.2)
        axes.spines[["top", "right"]].set_visible(False)
        axes.invert_yaxis()
    try:
        figure.savefig(out, dpi=110)
    except OSError as error:
        raise OptionError(f"cannot write {out}: {error.strerror or error}") from None
