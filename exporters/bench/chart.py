"""The figures of `surgeon bench` as an image."""

from collections.abc import Sequence
from pathlib import Path

from exporters.bench.measure import Measured
from surgeon.errors import OptionError


def draw(measurements: Sequence[Measured], out: Path) -> None:
    """Speed, time to the first token and memory as bars, to the file `out`. Raises OptionError for a file type that
    cannot be written."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 1.4 + 0.5 * len(measurements)), layout="constrained")
    filetypes = FigureCanvasAgg(figure).get_supported_filetypes()
    if out.suffix.removeprefix(".").lower() not in filetypes:
        raise OptionError(f"cannot write {out}: choose a name that ends in .{', .'.join(sorted(filetypes))}")
    names = [f"{Path(measurement.path).name}\n{measurement.stage}, {measurement.dtype}" for measurement in measurements]
    panels = (
        ("tokens per second", [measurement.speed for measurement in measurements], "{:.1f}"),
        ("first token, ms", [measurement.first_token * 1e3 for measurement in measurements], "{:.0f}"),
        (
            "peak memory, GiB",
            [(measurement.device_memory or measurement.peak_memory) / 2**30 for measurement in measurements],
            "{:.2f}",
        ),
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
