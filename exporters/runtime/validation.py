"""`surgeon validate`: two paths in, a verdict out."""

from collections.abc import Sequence
from pathlib import Path

from exporters.runtime.session import Provider
from exporters.runtime.subject import open_pair
from surgeon.parity.cases import default_cases, own_case
from surgeon.parity.ladder import TUNED
from surgeon.parity.torch_subject import TorchSubject
from surgeon.parity.validate import Progress, Report, validate
from surgeon.parity.weights import changed_tensors
from surgeon.positions import Positions


def validate_pair(
    a: str | Path,
    b: str | Path,
    images: Sequence[Path] = (),
    prompt: str | None = None,
    steps: int = 32,
    progress: Progress | None = None,
    positions: Positions | None = None,
    provider: Provider = "auto",
) -> Report:
    """Load two forms of a model, compare them over the default cases or the given pictures and prompt.

    `positions`: dhr or plain, of both, where they offer RoPE-DHR; by default dhr. `provider`: what runs
    bundles. Raises SurgeonError where one cannot be loaded, or the two are not forms of one model.
    """
    cases = own_case(images, prompt) if images or prompt is not None else default_cases()
    if progress is not None:
        progress("loading", 0, len(cases))
    reference, subject, rung = open_pair(a, b, positions, provider)
    report = validate(reference, subject, cases, rung, steps, progress)
    if rung is TUNED:
        report.notes += _what_changed(reference, subject)
    return report


def _what_changed(reference: object, subject: object) -> list[str]:
    """For a model whose grafts were trained: its gates, and what else differs from the source."""
    notes = []
    if hasattr(subject, "gates"):
        gates = ", ".join(f"{name.removesuffix('.alpha')} {value:.3g}" for name, value in subject.gates().items())
        notes.append(f"gates, largest value: {gates or 'none'}")
    if isinstance(reference, TorchSubject) and isinstance(subject, TorchSubject):
        changed, missing = changed_tensors(reference.path, subject.path)
        notes.append(f"{len(changed)} tensors of the source have other values, {len(missing)} are not there")
    return notes
