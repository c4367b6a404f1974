"""What a person sees on stdout: tables and reports."""

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.filesize import decimal
from rich.table import Table

from surgeon.doctor import Diagnosis
from surgeon.inspect import Inspection, PassDescription
from surgeon.recipe import value_text

if TYPE_CHECKING:
    from surgeon.parity.report import Report
    from surgeon.parity.validate import Comparison
    from surgeon.patch import PatchReport


PROSE_WIDTH = 80


def print_table(columns: Sequence[str], rows: Sequence[Sequence[Any]], prose: bool = False) -> None:
    """A table on stdout; columns whose every value is a number are aligned on the right. `prose`: the last column is
    text, which is wrapped."""
    table = Table(box=None, pad_edge=False, header_style="bold")
    for i, column in enumerate(columns):
        numbers = bool(rows) and all(isinstance(row[i], int) for row in rows)
        table.add_column(column, justify="right" if numbers else "left", overflow="fold")
    for row in rows:
        table.add_row(*(f"{value:,}" if isinstance(value, int) else str(value) for value in row))
    # In a pipe a line of values is as long as it needs to be: whoever reads it there looks for whole lines.
    width = None if sys.stdout.isatty() else PROSE_WIDTH if prose else 1000
    console = Console(file=sys.stdout, width=width, markup=False, emoji=False, highlight=False)
    with console.capture() as captured:
        console.print(table)
    print("\n".join(line.rstrip() for line in captured.get().splitlines()))


def report_inspection(inspection: Inspection) -> None:
    text, vision, sites = inspection.text, inspection.vision, inspection.graft_sites
    print(f"{inspection.path}: {inspection.family}, {_state(inspection)}, {inspection.dtype}")
    print(
        f"decoder  {text.layers} layers, hidden {text.hidden_size}, intermediate {text.intermediate_size}, "
        f"{text.attention_heads} heads ({text.key_value_heads} of keys and values) of {text.head_dim}, "
        f"vocabulary {text.vocab_size:,}{', tied to lm_head' if inspection.tied_embeddings else ''}"
    )
    print(
        f"vision   {vision.layers} layers, hidden {vision.hidden_size}, {vision.attention_heads} heads, patches of "
        f"{vision.patch_size}"
        + (f", DeepStack into {inspection.deepstack_layers} layers" if inspection.deepstack_layers else "")
    )
    print(f"grafts   layers {sites.first_layer} to {sites.last_layer}; latent: multiples of {sites.latent_multiple}")
    for graft in inspection.grafts:
        options = "".join(f", {key} {value_text(value)}" for key, value in graft.options.items())
        print(f"grafted  {graft.kind} at layers {', '.join(map(str, graft.layers))}{options}")
    for way, grown in (("spare rows", False), ("rows by which the tables grew", True)):
        tokens = [f"{token.text} {token.id}" for token in inspection.tokens if token.grown == grown]
        if tokens:
            more = f" and {len(tokens) - 16} more" if len(tokens) > 16 else ""
            print(f"tokens   in {way}: {', '.join(tokens[:16])}{more}")
    if inspection.vismem is not None:
        print(f"memory   {_memory_text(inspection.vismem)}")
    if inspection.tiles is not None:
        tiles = inspection.tiles
        order = f" in {tiles.tile_order} order" if tiles.tile_order else ""
        allocation = "" if tiles.allocation == "both" else f"; tiles go to the {tiles.allocation} alone"
        print(
            f"tiles    {tiles.side} x {tiles.side} tokens each, thumbnail {tiles.thumbnail}; "
            f"positions {tiles.positions}{order}{allocation}"
        )
    print()
    print_table(("part", "parameters", "size"), [(p.name, p.parameters, decimal(p.bytes)) for p in inspection.parts])
    print(f"total    {inspection.parameters:,} parameters, {decimal(inspection.bytes)}")
    print()
    if inspection.files:
        print_table(("file", "tensors", "size"), [(f.name, f.tensors, decimal(f.bytes)) for f in inspection.files])
    else:
        print("no weights here: a config alone")


def _state(inspection: Inspection) -> str:
    if inspection.grafts or inspection.vismem is not None:
        return "patched"
    return "plain, with tokens added" if inspection.tokens else "plain"


def _memory_text(vismem: Mapping[str, Any]) -> str:
    """What forms memory that the model calls for."""
    former = "the vision tower" if vismem["short_former"] == "vision" else "the decoder"
    layers = ", ".join(map(str, vismem["layers"]))
    return (
        f"called for by the model: short of {vismem['short']} latents by {former}, long of {vismem['long']} by the "
        f"decoder's layers {layers}; queries of {vismem['query']}, adapters of rank {vismem['rank']}"
    )


def report_bundle(path: str | Path, manifest: Mapping[str, Any]) -> None:
    """`manifest`: the content of a bundle.json."""
    source, sizes, memory = manifest["source"], manifest["sizes"], manifest["memory"]
    print(f"{path}: bundle of {source['name']} ({source['model_type']}), {manifest['dtype']}")
    print(
        f"decoder  {sizes['num_hidden_layers']} layers, hidden {sizes['hidden_size']}, "
        f"vocabulary {sizes['vocab_size']:,}, {manifest['max_length']:,} tokens at most"
    )
    for kind in dict.fromkeys(entry["kind"] for entry in memory):
        layers = ", ".join(str(entry["layer"]) for entry in memory if entry["kind"] == kind)
        print(f"grafted  {kind} at layers {layers}")
    if not memory:
        print("grafted  nothing")
    if manifest.get("vismem"):
        print(f"memory   {_memory_text(manifest['vismem'])}")
    if scheme := manifest.get("positions"):
        print(f"tiles    positions {scheme['scheme']} in {scheme['tile_order']} order; plain ones by request")
    print()
    graphs = manifest["graphs"].items()
    print_table(("graph", "inputs", "outputs"), [(n, len(g["inputs"]), len(g["outputs"])) for n, g in graphs])
    print()
    weights = manifest["weights"].items()
    print_table(("weights", "size", "how"), [(n, decimal(w["bytes"]), w["how"]) for n, w in weights])
    if manifest.get("precision"):
        print()
        _report_precision(manifest["precision"])


def _report_precision(precision: Mapping[str, Any]) -> None:
    """What was seen of fp16's range: the layers with the largest values, and what is fp32 for it."""
    if precision["skipped"]:
        print(f"overflow not measured: {precision['skipped']}")
        return
    limit, margin = f"{precision['limit']:,.0f}", f"{precision['margin']:g}"
    print(f"overflow largest values over {precision['prompts']} prompts; fp16 ends at {limit}, margin {margin}")

    def row(entry: Mapping[str, Any]) -> tuple[str, ...]:
        return entry["graph"], entry["layer"], entry["operator"], f"{entry['max_abs']:,.4g}"

    largest = sorted(precision["largest"], key=lambda entry: -float(entry["max_abs"]))[:5]
    print_table(("graph", "layer", "operator", "largest"), [row(entry) for entry in largest])
    if not precision["widened"]:
        print("all of it fits: no layer needs fp32 for its range")
        return
    print()
    print(f"fp32, because {margin} times the value is beyond fp16:")
    print_table(("graph", "layer", "operator", "largest"), [row(entry) for entry in precision["widened"]])


def report_passes(passes: Sequence[PassDescription]) -> None:
    for i, described in enumerate(passes):
        print(("\n" if i else "") + f"{described.name}: {described.summary}")
        rows = []
        for o in described.options:
            default = "(required)" if o.required else "" if o.default is None else o.default
            rows.append((f"  {o.name}", o.type, default, o.description))
        print_table(("  option", "type", "default", "description"), rows, prose=True)


def report_patch(report: "PatchReport", target: Path | None) -> None:
    """`target`: None for a plan."""
    if report.grafts:
        print_table(("graft", "parameters"), list(report.grafts.items()))
    if report.tokens:
        tokens = [f"{token} {token_id}" for token, token_id in report.tokens.items()]
        print(f"tokens: {', '.join(tokens[:16])}{f' and {len(tokens) - 16} more' if len(tokens) > 16 else ''}")
        for table, (before, after) in report.tables.items():
            print(f"{table}: " + (f"{before:,} rows, now {after:,}" if after > before else "rows that no token had"))
    if report.new_parameters:
        share = report.new_parameters / report.source_parameters
        of_source = f"{share:.2%} of the source's {report.source_parameters:,}"
        print(f"total {report.new_parameters:,} new parameters, {of_source}")
    elif not report.tokens:
        print(f"no new parameters beside the source's {report.source_parameters:,}: positions change, weights do not")
    if target is None:
        print("a plan only: nothing was written")
        return
    print(f"wrote {target}: {decimal(report.bytes_written)}")
    for method in dict.fromkeys(report.shared.values()):
        files = [file for file, way in report.shared.items() if way == method]
        more = f" and {len(files) - 4} more" if len(files) > 4 else ""
        print(f"weights of the source by {method}: {', '.join(files[:4])}{more}")


def report_validation(report: "Report") -> None:
    """The validator's verdict, a table for each comparison and one line a case."""
    if report.reference:
        print(f"reference  {report.reference} ({report.stages[0]}, {report.dtypes[0]})")
        print(f"candidate  {report.candidate} ({report.stages[1]}, {report.dtypes[1]})")
    for check in report.checks:
        print(f"{check.name:10} {'FAILED' if check.failures else check.said}")
        for failure in check.failures:
            print(f"{'':10} {failure}")
    for note in report.all_notes():
        print(f"note       {note}")
    for comparison in report.comparisons:
        print()
        _report_comparison(comparison)
    print()
    verdict = {"passed": "passed", "failed": "FAILED", "not judged": "NOT JUDGED"}[report.verdict]
    print(f"{verdict} in {report.seconds:.1f} s" + (f": {report.remedy}" if report.verdict == "not judged" else ""))


def _report_comparison(comparison: "Comparison") -> None:
    print(f"level      {comparison.level.name}, {comparison.state}: {comparison.level.why}")
    rows = []
    for case in comparison.cases:
        worst = max(case.prefill.max_abs, case.decode.max_abs)
        bad = case.prefill.non_finite + case.decode.non_finite
        rows.append(
            (
                case.name,
                f"{case.prompt_tokens} + {case.rows} x {case.steps}",
                f"{bad} NaN/inf" if bad else "bit-equal" if worst == 0 else f"{worst:.2e}",
                f"{min(case.prefill.cosine, case.decode.cosine):.5f}",
                f"{max(case.prefill.kl_mean, case.decode.kl_mean):.1e}",
                f"{min(case.prefill.top1, case.decode.top1):.4f}",
                f"{case.tokens_equal}/{case.rows * case.steps}",
                "FAILED" if case.failures else "passed" if comparison.level.judged else "reported",
            )
        )
    columns = ("case", "tokens", "max abs", "cosine", "KL", "top-1", "greedy", "verdict")
    print_table(columns, rows)
    for failure in comparison.failures:
        print(f"FAILED: {failure}")
    for case in comparison.cases:
        for failure in case.failures:
            print(f"{case.name}: {failure}")
        if case.first_wrong:
            print(f"{case.name}: first wrong tensor {case.first_wrong}")


def report_bench(measurements: Sequence[Mapping[str, Any]]) -> None:
    """Forms side by side, each what `surgeon bench --json` gives; speeds are compared to the first's."""
    first = measurements[0]["speed"]
    columns: list[tuple[str, ...]] = []
    for measurement in measurements:
        low, high = min(measurement["tokens_per_second"]), max(measurement["tokens_per_second"])
        on_device = f" + {decimal(measurement['device_memory'])}" if measurement["device_memory"] else ""
        columns.append(
            (
                f"{measurement['stage']}, {measurement['dtype']}, {measurement['device']}",
                f"{measurement['first_token'] * 1e3:,.1f} ms",
                f"{measurement['step'] * 1e3:,.2f} ms",
                f"{measurement['step_p95'] * 1e3:,.2f} ms",
                f"{measurement['speed']:,.1f}" + (f" ({low:,.1f} to {high:,.1f})" if low != high else ""),
                f"{measurement['speed'] / first:.2f} x",
                f"{decimal(measurement['peak_memory'])}{on_device}",
            )
        )
    figures = ("", "first token", "step", "step, p95", "tokens/s", "relative to first", "peak memory")
    print_table(("", *(measurement["path"] for measurement in measurements)), list(zip(figures, *columns, strict=True)))


def report_diagnosis(diagnosis: Diagnosis) -> None:
    print_table(
        ("package", "version", ""),
        [(p.name, p.version or "not installed", p.problem or "") for p in diagnosis.packages],
        prose=True,
    )
    print()
    print_table(
        ("backend", "works", ""),
        [(b.name, "yes" if b.works else "no", b.detail) for b in diagnosis.backends],
        prose=True,
    )
    for backend in diagnosis.backends:
        if backend.remedy:
            print(f"{backend.name}: {backend.remedy}")
    print()
    storage = diagnosis.storage
    if storage.free_bytes is not None:
        print(f"{storage.directory}: {decimal(storage.free_bytes)} free")
    links = (f"{name}: {'yes' if yes else 'no'}" for name, yes in storage.links.items())
    print(storage.problem or ", ".join(links))
    for leftover in diagnosis.leftovers:
        print(f"{leftover.path}: {leftover.remedy}")
