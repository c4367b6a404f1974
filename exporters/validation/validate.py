"""`surgeon validate`: two paths in, a verdict out."""

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import cast

from exporters.artifact import artifact_kind
from exporters.onnx.manifest import PROCESSOR
from exporters.onnxruntime.session import Provider
from exporters.validation.integrity import check_bytes, count
from exporters.validation.pair import open_pair
from passes import registry
from surgeon.checkpoint import Checkpoint
from surgeon.errors import InputError, OptionError, SurgeonError
from surgeon.families import family
from surgeon.live import graft_parameters
from surgeon.parity.added_tokens import AddedTokens
from surgeon.parity.cases import Case, default_cases, own_case
from surgeon.parity.invocations import InvokingRunner, compare_invocations
from surgeon.parity.levels import MAX_EFFECT_ERROR, MOVED, TUNED, Level, effect_failures, level_between
from surgeon.parity.metrics import compare_effect
from surgeon.parity.processor import ProcessorUnavailable, check_inputs
from surgeon.parity.replay import compare_record
from surgeon.parity.report import Check, Report
from surgeon.parity.runner import Runner
from surgeon.parity.settings import compare_settings
from surgeon.parity.torch_runner import TorchRunner
from surgeon.parity.validate import AS_THEY_ARE, Comparison, validate
from surgeon.parity.weights import compare_weights, take_weights
from surgeon.positions import Positions
from surgeon.progress import Progress

OPENED = 2.0
"""What closed gates are opened to: a mixin's, which is a tanh, then lets 0.96 through."""
_ROUNDING = 2**-7
"""Of bf16, with room."""
_SMALLEST = 1e-7
"""What fp16 rounds to zero."""
SHOWS = 0.1
"""A gate below this is as good as closed: whatever is behind it hardly reaches the logits."""


def validate_pair(
    a: str | Path,
    b: str | Path,
    images: Sequence[Path] = (),
    prompt: str | None = None,
    steps: int = 32,
    progress: Progress | None = None,
    positions: Positions | None = None,
    provider: Provider = "auto",
    backbone_tuned: bool = False,
    grafts_tuned: bool = False,
    bytes_too: bool = False,
) -> Report:
    """Load two forms of a model, compare them over the default cases, or over the images and prompt of the call.

    `positions`: dhr or plain, of both, where they offer RoPE-DHR; by default dhr. `provider`: what runs bundles.
    `backbone_tuned`, `grafts_tuned`: of two checkpoints, the later may hold other values of the earlier one's backbone,
    of the grafts that both have. `bytes_too`: first as `validate_bytes`; files that are not those that were recorded
    are not loaded. Raises SurgeonError where one cannot be loaded, or the two are not forms of one model.
    """
    started = time.monotonic()
    for each in (a, b):
        if not isinstance(each, str | Path):
            raise OptionError(
                f"cannot validate a {type(each).__name__} in memory: write it with surgeon.save, and validate that"
            )
    if isinstance(images, str | Path):
        images = (Path(images),)
    report = validate_bytes(a, b, progress) if bytes_too else None
    if report is not None and not report.passed:
        return report
    cases = own_case(images, prompt) if images or prompt is not None else default_cases()
    if progress is not None:
        progress("loading", 0, 2)
    reference, candidate = open_pair(a, b, positions, provider)
    if progress is not None:
        progress("loading", 2, 2)
    pair = _Pair(reference, candidate, cases, steps, progress, backbone_tuned, grafts_tuned)
    report = Report(
        checks=[] if report is None else report.checks,
        candidate=candidate.path,
        reference=reference.path,
        stages=(reference.stage, candidate.stage),
        dtypes=(reference.dtype, candidate.dtype),
    )
    try:
        pair.check(report)
        pair.compare(report)
    except InputError as error:
        if report.verdict != "failed":
            raise
        # settings that differ are the reason, not the prompt
        report.notes.append(f"nothing more was compared: {error}")
    report.seconds = time.monotonic() - started
    return report


def validate_bytes(a: str | Path, b: str | Path | None = None, progress: Progress | None = None) -> Report:
    """Compare the files of one path, or of two, with the digests that were recorded when they were made. No model is
    loaded. Raises SurgeonError where nothing is recorded, or a path is of no known form."""
    started = time.monotonic()
    paths = [str(path) for path in (a, b) if path is not None]
    stages = tuple("engine" if artifact_kind(path) == "engines" else artifact_kind(path) for path in paths)
    report = Report(candidate=paths[-1], reference=None, stages=stages, dtypes=(), checks=check_bytes(a, b, progress))
    report.seconds = time.monotonic() - started
    return report


@dataclass
class _Pair:
    """Two loaded forms of a model, what is asked of them, and what sets them apart."""

    reference: Runner
    candidate: Runner
    cases: Sequence[Case]
    steps: int
    progress: Progress | None
    backbone_tuned: bool
    grafts_tuned: bool
    tuned: set[str] = field(default_factory=set)
    """Gates of grafts that both have, with other values."""

    def __post_init__(self) -> None:
        if (self.backbone_tuned or self.grafts_tuned) and not self._checkpoints:
            option = "--backbone-tuned" if self.backbone_tuned else "--grafts-tuned"
            raise OptionError(f"{option} is for two checkpoints; a bundle holds its checkpoint's own weights")
        if self._grafts(self.reference) != self._grafts(self.candidate):
            for runner in (self.reference, self.candidate):
                if runner.gates() is None:
                    raise SurgeonError(
                        f"{runner.path} has grafts that the other has not, and engines do not show their gates: "
                        "compare it with the patched checkpoint or its bundle"
                    )

    @property
    def _checkpoints(self) -> bool:
        return isinstance(self.reference, TorchRunner) and isinstance(self.candidate, TorchRunner)

    # -- what is judged of itself ------------------------------------------------------------------------------
    def check(self, report: Report) -> None:
        """What they are set to, the prompts and, of two checkpoints, their tensors."""
        summary = "configs, tokenizers, chat templates and image processors are the same"
        failures = compare_settings(self.reference.inputs, self.candidate.inputs)
        report.checks.append(Check("settings", summary, failures))
        if self._checkpoints:
            self._check_record(report)
        loaded = isinstance(self.reference, TorchRunner)
        folder = self.reference.directory if loaded else Path(self.reference.path) / PROCESSOR  # type: ignore[attr-defined]
        try:
            summary, failures = check_inputs(self.reference.inputs, folder, self.cases)
            report.checks.append(Check("inputs", summary, failures))
        except ProcessorUnavailable as reason:
            report.notes.append(f"the inputs were not compared with transformers' own processor: {reason}")
        if self._checkpoints:
            self._check_weights(report)
        else:
            self._check_gates(report)

    def _check_record(self, report: Report) -> None:
        assert isinstance(self.reference, TorchRunner) and isinstance(self.candidate, TorchRunner)
        # where they lie: a hub id has been resolved already
        with Checkpoint.open(self.reference.directory) as source, Checkpoint.open(self.candidate.directory) as patched:
            failures = compare_record(source, patched, registry(), self.backbone_tuned or self.grafts_tuned)
        if failures is not None:
            parts = "grafts, positions and tokens" if self._added else "grafts and positions"
            report.checks.append(Check("record", f"{parts} are what the recorded passes make", failures))
        elif self._grafts(self.reference) != self._grafts(self.candidate):
            report.notes.append(
                "the options of the grafts were not judged: the passes that added them to the reference are not "
                "recorded, as of an import, or were altered"
            )

    def _check_gates(self, report: Report) -> None:
        """Forms of one patched model have its gates, as far as their dtypes can tell: a prompt may not show them."""
        a, b = self.reference.gates() or {}, self.candidate.gates() or {}
        common = sorted(a.keys() & b.keys())
        if not common:
            return
        failures = [
            f"{name} is {a[name]:.4g} in the reference and {b[name]:.4g} in the candidate"
            for name in common
            if not abs(a[name] - b[name]) <= _ROUNDING * abs(a[name]) + _SMALLEST
        ]
        report.checks.append(Check("gates", f"{len(common)} gates are the same in both", failures))

    def _check_weights(self, report: Report) -> None:
        assert isinstance(self.reference, TorchRunner) and isinstance(self.candidate, TorchRunner)
        described = family(self.reference.model.config.model_type)
        added = self._added.ids if self._added is not None else ()
        difference = compare_weights(self.reference.model, self.candidate.model, described.token_tables, added)
        changed = set(difference.changed)
        grafts = self.reference.graft_tensors()
        self.tuned = {gate for gate, own in grafts.items() if changed & set(own)}
        in_grafts = {name for name, _ in graft_parameters(self.reference.model)}
        rows = ", but for the rows of added tokens" if added else ""
        which = "the other tensors" if changed or difference.missing else f"all {count(difference.compared, 'tensor')}"
        alike = "value for value"
        if difference.rounded:
            alike = (
                f"{_first(difference.rounded)} of them as {self.candidate.dtype} rounds it, the rest value for value"
            )
        check = Check("weights", f"{which} of the reference are in the candidate, {alike}{rows}")
        if difference.missing:
            check.failures.append(f"{_first(difference.missing)} of the reference not in the candidate")
        for part, allowed, names in (
            ("backbone", self.backbone_tuned, [name for name in difference.changed if name not in in_grafts]),
            ("grafts", self.grafts_tuned, [name for name in difference.changed if name in in_grafts]),
        ):
            if not names:
                continue
            finding = f"{_first(names)} of the {part} with other values in the candidate"
            if allowed:
                check.said += f"; {finding}, as --{part}-tuned allows"
            else:
                check.failures.append(f"{finding}; where they were tuned, say so with --{part}-tuned")
        report.checks.append(check)

    # -- what is judged by its logits --------------------------------------------------------------------------
    def compare(self, report: Report) -> None:
        both_gates = (self.reference.gates(), self.candidate.gates())
        a, b = (gates or {} for gates in both_gates)
        added = set() if None in both_gates else a.keys() ^ b.keys()  # engines have the other's grafts
        apart = added | self.tuned
        closing = dict.fromkeys(apart, 0.0) if any(a.get(n) or b.get(n) for n in apart) else {}
        moved = self.candidate.positions != "plain" and self._scheme(self.reference) != self._scheme(self.candidate)
        level = level_between(
            (self.reference.stage, self.candidate.stage), (self.reference.dtype, self.candidate.dtype)
        )
        changes = ["gates closed"] * bool(closing) + ["plain positions"] * moved
        state = f"{' and '.join(changes)} in memory" if changes else AS_THEY_ARE
        if changes or self.backbone_tuned:
            # first as they are: the backbone that was tuned is then put into the reference
            report.comparisons.append(self._run(MOVED if moved and not closing else TUNED))
        if apart and not closing and self._checkpoints:
            report.notes.append(f"all {len(apart)} gates are 0, as they start: the grafts change nothing until trained")
        if closing:
            report.notes.append(
                f"gates, largest value: {_gates_text({n: max(a.get(n, 0.0), b.get(n, 0.0)) for n in sorted(apart)})}"
            )
        if self.backbone_tuned:
            if not (added or moved):
                report.remedy = (
                    "with --backbone-tuned two checkpoints with the same grafts need not agree on anything; leave it "
                    "out to have their tensors and logits compared"
                )
                return
            assert isinstance(self.reference, TorchRunner) and isinstance(self.candidate, TorchRunner)
            take_weights(self.reference.model, self.candidate.model)
            state = f"{state}, the reference with the candidate's backbone"
        if self._grown:
            report.notes.append(
                "the head's rows of added tokens were multiplied apart from the others, in memory: a product of "
                "another size may be added up in another order"
            )
        judged = self._run(level, state, closing, moved)
        report.comparisons.insert(0, judged)
        self._call_for_memory(report, level)
        self._open(report, judged, closing, moved)

    def _call_for_memory(self, report: Report, level: Level) -> None:
        """Of forms that call for memory: what they form."""
        with_memory = [bool((runner.record or {}).get("vismem")) for runner in (self.reference, self.candidate)]
        if all(with_memory):
            reference, candidate = cast(InvokingRunner, self.reference), cast(InvokingRunner, self.candidate)
            report.checks += compare_invocations(reference, candidate, self.cases, level, self.progress)
            if isinstance(self.reference, TorchRunner) and not self.reference.formers_adapted:
                report.notes.append(
                    "the formers' adapters are as they were inserted and add nothing: what is computed with them was "
                    "not judged"
                )
        elif any(with_memory):
            report.notes.append(
                "memory that the model calls for was not judged, one of the two has none: it was kept from calling"
            )

    def _open(self, report: Report, judged: Comparison, closing: Mapping[str, float], moved: bool) -> None:
        """Compare again with the gates opened that are closed in both: a closed gate hides whatever is behind it."""
        if self._checkpoints or not (self._grafts(self.reference) or self._grafts(self.candidate)):
            return
        if not (self._grafts(self.reference) and self._grafts(self.candidate)):
            report.notes.append("the grafts were not judged, one of the two has none: compare patched forms")
            return
        if not any(prompt.images for case in self.cases for prompt in case.prompts):
            report.notes.append("the grafts were not judged: no prompt has an image")
            return
        if not any(len(logits) for logits, _ in judged.after_images):
            report.nothing_proved = True
            report.remedy = (
                "no prompt with an image was compared, so nothing is known of the grafts: give a smaller image, or "
                "a bundle of a larger --max-length"
            )
            return
        a, b = self.reference.gates(), self.candidate.gates()
        shown_gates = a or b
        if shown_gates is None:
            report.notes.append("engines do not show their gates: where they are closed, the grafts were not judged")
            return
        dim = [name for name in shown_gates if min((gates or shown_gates).get(name, SHOWS) for gates in (a, b)) < SHOWS]
        if not dim:
            return
        values = _gates_text({name: shown_gates[name] for name in dim})
        closed = f"{len(dim)} of {len(shown_gates)} gates are closed or nearly closed ({values})"
        if a is None or b is None:
            report.notes.append(
                f"the grafts were not judged: {closed}, and engines cannot be given others; compare a bundle, or "
                "engines of a trained one"
            )
            return
        report.notes.append(f"{closed}: both were also compared with these opened to {OPENED:g} in memory")
        opened = self._run(judged.level, "gates opened in memory", {**closing, **dict.fromkeys(dim, OPENED)}, moved)
        if opened.level.name in MAX_EFFECT_ERROR:
            self._judge_effect(judged, opened)
        report.comparisons.insert(1, opened)

    def _judge_effect(self, closed: Comparison, opened: Comparison) -> None:
        if len(closed.after_images) != len(opened.after_images):  # other prompts: that has failed
            return
        if closed.verdict == "failed":  # how far rounding sets the two apart is not known then
            opened.notes.append("what the opened grafts change was not judged: the two differ without them")
            return
        effect = compare_effect(closed.after_images, opened.after_images)
        failures, hidden = effect_failures(opened.level, effect)
        opened.failures += failures
        opened.notes.append(
            hidden
            or f"opened, the grafts change the logits by {effect.size:.2g} of their size; the candidate's change "
            f"is off by {effect.error:.2g} of that"
        )

    def _run(
        self, level: Level, state: str = AS_THEY_ARE, gates: Mapping[str, float] | None = None, plain: bool = False
    ) -> Comparison:
        with ExitStack() as stack:
            for runner in (self.reference, self.candidate):
                stack.enter_context(runner.with_gates(gates or {}))
                if plain:
                    stack.enter_context(_plain_positions(runner))
            if self._grown:
                assert isinstance(self.reference, TorchRunner) and isinstance(self.candidate, TorchRunner)
                stack.enter_context(self.candidate.with_head_in_two(self.reference.head_rows))
            return validate(
                self.reference, self.candidate, self.cases, level, self.steps, self.progress, state, self._added
            )

    @property
    def _grown(self) -> bool:
        """Whether, of two checkpoints, the candidate's head has rows that the reference's has not."""
        if not (isinstance(self.reference, TorchRunner) and isinstance(self.candidate, TorchRunner)):
            return False
        return self._added is not None and self.candidate.head_rows > self.reference.head_rows

    @property
    def _added(self) -> AddedTokens | None:
        """The tokens that the candidate alone has."""
        tuned = self.backbone_tuned or self.grafts_tuned
        return AddedTokens.between(self.reference.record, self.candidate.record, tuned)

    @staticmethod
    def _grafts(candidate: Runner) -> list[object]:
        return list((candidate.record or {}).get("grafts", []))

    @staticmethod
    def _scheme(candidate: Runner) -> object:
        """Its position ids, where they are not the family's."""
        return (candidate.record or {}).get("positions")


@contextmanager
def _plain_positions(candidate: Runner) -> Iterator[None]:
    before, candidate.positions = candidate.positions, "plain"
    try:
        yield
    finally:
        candidate.positions = before


def _first(names: Sequence[str]) -> str:
    return f"{count(len(names), 'tensor')} ({names[0]}{' the first' if len(names) > 1 else ''})"


def _gates_text(gates: Mapping[str, float]) -> str:
    """Some gates and their values, in words."""
    some = [f"{name.removesuffix('.alpha')} {value:.3g}" for name, value in list(gates.items())[:4]]
    return ", ".join(some) + (f" and {len(gates) - 4} more" if len(gates) > 4 else "")
