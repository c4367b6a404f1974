"""Exporting the decoder of a patched checkpoint with Qwen3-VL-8B's tensors, and of a smaller one beside torch.onnx."""

import time
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from _measure import (
    MB,
    MIB,
    Finished,
    Jobs,
    Report,
    Spread,
    disk_bytes,
    files,
    interleaved,
    parser,
    run_job,
    serve,
    working_directory,
)
from bench_patch import CHECKPOINT_BYTES, PVM, patch_job, write_job

SMALL = {
    "vocab_size": 32000,
    "hidden_size": 1024,
    "intermediate_size": 3072,
    "num_hidden_layers": 16,
    "num_attention_heads": 16,
    "num_key_value_heads": 8,
    "head_dim": 64,
}
SMALL_BYTES = 10**9


def export_job(source: str, target: str, dtype: str) -> dict[str, Any]:
    """In a child: our export of the decoder graph, timed from after the imports."""
    import transformers

    from exporters.export import export_bundle
    from surgeon.dtypes import PRECISIONS

    assert transformers.Qwen3VLForConditionalGeneration
    start, cpu = time.perf_counter(), time.process_time()
    export_bundle(source, Path(target), dtype=PRECISIONS[dtype], max_length=4096, graphs=["decoder"])
    return {"seconds": time.perf_counter() - start, "cpu_seconds": time.process_time() - cpu}


def torch_job(source: str, target: str) -> dict[str, Any]:
    """In a child: `torch.onnx.export` of the loaded model's decoder and vocabulary projection, weights beside it."""
    import torch
    import transformers
    from torch import Tensor, nn

    class Decoder(nn.Module):
        """Embeddings in, logits out; no cache, which makes its graph smaller than ours."""

        def __init__(self, model: Any) -> None:
            super().__init__()
            self.decoder, self.lm_head = model.model.language_model, model.lm_head

        def forward(self, inputs_embeds: Tensor, position_ids: Tensor) -> Tensor:
            output = self.decoder(inputs_embeds=inputs_embeds, position_ids=position_ids, use_cache=False)
            logits: Tensor = self.lm_head(output.last_hidden_state)
            return logits

    start = time.perf_counter()
    model = transformers.Qwen3VLForConditionalGeneration.from_pretrained(source, dtype=torch.float32).eval()
    length = torch.export.Dim("S", min=2, max=4096)
    example = (torch.zeros(1, 8, SMALL["hidden_size"]), torch.arange(8).expand(3, 1, 8).contiguous())
    Path(target).mkdir()
    torch.onnx.export(
        Decoder(model).eval(),
        example,
        str(Path(target) / "decoder.onnx"),
        dynamo=True,
        external_data=True,
        dynamic_shapes=({1: length}, {2: length}),
        verbose=False,
    )
    return {"seconds": time.perf_counter() - start}


def small_job(directory: str) -> dict[str, Any]:
    """In a child: write the smaller checkpoint, fp32."""
    import _synthetic
    import torch

    config = _synthetic.config_small(**SMALL)
    return {"bytes": _synthetic.write_checkpoint(Path(directory), config, torch.float32)}


JOBS: Jobs = {"export": export_job, "torch": torch_job, "small": small_job, "patch": patch_job, "write": write_job}


def measure_8b(source: Path, work: Path, repetitions: int, report: Report) -> None:
    patched = work / "patched"
    run_job(__file__, "patch", source=str(source), target=str(patched), weights="link")
    runs: list[Finished] = []
    written: list[float] = []
    for repetition in range(repetitions):
        target = work / f"8b-{repetition}"
        runs.append(run_job(__file__, "export", source=str(patched), target=str(target), dtype="bf16"))
        written.append(disk_bytes(list(files(target))) / MB)
    report.check("8B decoder: time", Spread(tuple(run.answer["seconds"] for run in runs)), "<=", 20, "s")
    cpu = Spread(tuple(run.answer["cpu_seconds"] for run in runs))
    report.figure("8B decoder: processor time in it, all threads", cpu, "s")
    report.check("8B decoder: peak memory", Spread(tuple(run.peak_rss / MIB for run in runs)), "<=", 1.2 * 1024, "MiB")
    report.check("8B decoder: written, hard links not counted", Spread(tuple(written)), "<=", 5, "MB")


def measure_small(work: Path, repetitions: int, report: Report) -> None:
    source = work / "small"
    run_job(__file__, "small", directory=str(source))
    peaks: dict[str, list[float]] = {"surgeon": [], "torch.onnx.export": []}
    written: dict[str, list[float]] = {"surgeon": [], "torch.onnx.export": []}

    def export(name: str) -> float:
        target = work / f"small-{name}-{len(peaks[name])}"
        if name == "surgeon":
            run = run_job(__file__, "export", source=str(source), target=str(target), dtype="fp32")
        else:
            run = run_job(__file__, "torch", source=str(source), target=str(target))
        peaks[name].append(run.peak_rss / MIB)
        written[name].append(disk_bytes(list(files(target))) / MB)
        seconds: float = run.answer["seconds"]
        return seconds

    spreads = interleaved({name: lambda name=name: export(name) for name in peaks}, repetitions)  # type: ignore[misc]
    for quantity, unit, values in (
        ("time", "s", {name: spread.values for name, spread in spreads.items()}),
        ("peak memory", "MiB", peaks),
        ("written", "MB", written),
    ):
        for name, measured in values.items():
            report.figure(f"small decoder: {quantity}, {name}", Spread(tuple(measured)), unit)
        pairs = zip(values["torch.onnx.export"], values["surgeon"], strict=True)
        report.figure(
            f"small decoder: {quantity}, torch.onnx.export / surgeon", Spread(tuple(a / b for a, b in pairs)), "x"
        )


def main() -> None:
    serve(JOBS)
    argument_parser = parser(__doc__, "export")
    argument_parser.add_argument("--directory", type=Path, help="where to work; emptied after")
    argument_parser.add_argument(
        "--checkpoint", type=Path, help="use this 8B checkpoint, which is kept, instead of writing one"
    )
    argument_parser.add_argument("--repetitions", type=int, default=3)
    options = argument_parser.parse_args()
    settings = {"repetitions": options.repetitions, "recipe": PVM, "small": SMALL}
    report = Report("export", settings)
    needed = (options.checkpoint is None) * CHECKPOINT_BYTES + (2 + options.repetitions) * SMALL_BYTES * 2
    with ExitStack() as stack:
        parent = options.checkpoint.parent if options.checkpoint else options.directory
        work = stack.enter_context(working_directory(parent, needed))
        source = options.checkpoint or work / "source"
        if options.checkpoint is None:
            run_job(__file__, "write", directory=str(source))
        measure_8b(source, work, options.repetitions, report)
        measure_small(work, options.repetitions, report)
    report.write(options.out)


if __name__ == "__main__":
    main()
