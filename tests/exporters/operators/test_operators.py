"""The operators of torch: registered soundly, the same as the reference implementations, with their gradients, and
what the kernels do not take."""

from typing import Any

import pytest
import torch
from torch import Tensor

from exporters.kernels import cuda, support
from exporters.kernels.cuda import mixin, pvm
from surgeon.memory.graft import Graft
from surgeon.memory.mixin import Mixin
from surgeon.memory.pvm import PersistentVisualMemory
from surgeon.memory.rotary import Rope
from surgeon.memory.visibility import Visibility, causally

ROWS, LENGTH, SLOTS, WIDTH, HEAD_DIM = 2, 3, 5, 48, 32


class Case:
    """A graft with random weights and the inputs of its operators."""

    def __init__(self, kind: str, dtype: torch.dtype = torch.float32, visibility: Visibility = "all") -> None:
        torch.manual_seed(0)
        rope = Rope(HEAD_DIM, 1e4)
        self.graft: Graft = (
            PersistentVisualMemory(WIDTH, 64, 40, HEAD_DIM, 1, eps=1e-6)
            if kind == "pvm"
            else Mixin(WIDTH, 2, 40, rope, eps=1e-5)
        )
        with torch.no_grad():
            for parameter in self.graft.parameters():
                parameter.add_(0.3 * torch.randn_like(parameter))
        self.graft = self.graft.to(dtype)
        self.embeds, self.hidden_states, self.residual = (
            torch.randn(ROWS, n, WIDTH, dtype=dtype, requires_grad=True) for n in (SLOTS, LENGTH, LENGTH)
        )
        self.media, self.text = (
            rope(torch.arange(n).expand(1, ROWS, n)) if kind == "mixin" else None for n in (SLOTS, LENGTH)
        )
        self.mask = torch.arange(SLOTS) < torch.tensor([SLOTS, 2])[:, None]
        if visibility == "causal":
            places = torch.tensor([1, 1, 2, 2, 2])  # nothing that the first token sees
            self.mask = causally(self.mask, places.expand(ROWS, -1), torch.arange(LENGTH))
        self.visual = torch.tensor([[True, False, False]] * ROWS) if kind == "pvm" else None

    def leaves(self) -> list[Tensor]:
        return [self.embeds, self.hidden_states, *self.graft.parameters()]

    def compute(self) -> Tensor:
        """Through the memory, as a decoder layer does."""
        keys, values = self.graft.write_memory(self.embeds, self.media)
        residual = self.residual if self.visual is not None else None
        return self.graft.read_memory(self.hidden_states, keys, values, self.mask, self.visual, self.text, residual)


class OnCpu:
    """The form of a kind, taken on the CPU too: the operators compute the reference implementation there."""

    devices: tuple[str, ...] = ("cpu",)

    def __init__(self, form: Any) -> None:
        self.forward, self.project = form.forward, form.project


@pytest.mark.parametrize("visibility", ["all", "causal"])
@pytest.mark.parametrize("kind", ["pvm", "mixin"])
def test_operators_and_gradients_equal_the_definition(kind: str, visibility: Visibility) -> None:
    case = Case(kind, visibility=visibility)
    want = case.compute()
    direction = torch.randn_like(want)
    want_grads = torch.autograd.grad(want, case.leaves(), direction)
    case.graft.fused = OnCpu(cuda.fused_form_of(kind))
    got = case.compute()
    assert "CustomOp" in type(got.grad_fn).__name__ or "surgeon" in str(got.grad_fn).lower()
    torch.testing.assert_close(got, want, atol=1e-6, rtol=1e-5)
    for gradient, expected in zip(torch.autograd.grad(got, case.leaves(), direction), want_grads, strict=True):
        assert float(expected.abs().sum()) > 0
        torch.testing.assert_close(gradient, expected, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("kind", ["pvm", "mixin"])
def test_the_operators_are_registered_soundly(kind: str) -> None:
    """Schema, fake implementation, gradient, and both under torch.compile's tracing."""
    case = Case(kind)
    module: Any = pvm if kind == "pvm" else mixin
    angles = () if case.text is None else case.text
    media = () if case.media is None else case.media
    keys, values = (t.detach() for t in case.graft.write_memory(case.embeds, case.media))
    masks = (case.mask, case.visual) if kind == "pvm" else (case.mask,)
    weights = case.graft.weights()  # type: ignore[operator]
    operator = module.persistent_visual_memory if kind == "pvm" else module.mixin
    tail = (case.graft.eps, case.residual) if kind == "pvm" else (case.graft.eps,)
    torch.library.opcheck(operator, (case.hidden_states, keys, values, *masks, *angles, *weights, *tail))
    memory = module.pvm_memory if kind == "pvm" else module.mixin_memory
    arguments = (case.embeds, *media, *case.graft.memory_weights(), case.graft.eps)  # type: ignore[operator]
    torch.library.opcheck(memory, arguments)


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
@pytest.mark.parametrize("kind", ["pvm", "mixin"])
def test_compiles_without_a_graph_break(kind: str, backend: str) -> None:
    case = Case(kind)
    want = case.compute()
    case.graft.fused = OnCpu(cuda.fused_form_of(kind))
    compiled = torch.compile(case.compute, backend=backend, fullgraph=True)
    torch.testing.assert_close(compiled(), want, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("visibility", ["all", "causal"])
@pytest.mark.parametrize("kind", ["pvm", "mixin"])
def test_what_runs_on_a_gpu_equals_the_definition(kind: str, visibility: Visibility) -> None:
    """The CUDA implementations themselves, kernels interpreted."""
    case = Case(kind, visibility=visibility)
    module: Any = pvm if kind == "pvm" else mixin
    keys, values = case.graft.write_memory(case.embeds, case.media)
    arguments = (case.embeds, *(case.media or ()), *case.graft.memory_weights(), case.graft.eps)  # type: ignore[operator]
    with torch.no_grad():
        got_keys, got_values = module.fused_memory(*arguments)
        torch.testing.assert_close(got_keys, keys, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(got_values, values, atol=1e-5, rtol=1e-5)
        masks = (case.mask, case.visual) if kind == "pvm" else (case.mask,)
        tail = (case.graft.eps, case.residual) if kind == "pvm" else (case.graft.eps,)
        weights = case.graft.weights()  # type: ignore[operator]
        got = module.fused(case.hidden_states, keys, values, *masks, *(case.text or ()), *weights, *tail)
        torch.testing.assert_close(got, case.compute(), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ("head_dim", "dtypes", "part"),
    [
        (48, {torch.float32}, "no power of two"),
        (16, {torch.float32}, "no power of two from 32"),
        (512, {torch.float32}, "to 256"),
        (64, {torch.float64}, "float64"),
        (64, {torch.float32, torch.bfloat16}, "bfloat16, float32"),
    ],
)
def test_what_kernels_do_not_take(head_dim: int, dtypes: set[torch.dtype], part: str) -> None:
    reason = support.reason_against("pvm", head_dim, dtypes)
    assert reason is not None and part in reason


def test_the_plain_definition_is_used_and_said_once() -> None:
    torch.manual_seed(0)
    graft = PersistentVisualMemory(48, 48, 40, head_dim=24, num_key_value_heads=1, eps=1e-6).requires_grad_(False)
    graft.alpha.fill_(0.5)
    keys, values = graft.project(torch.randn(1, 4, 48))
    arguments = (torch.randn(1, 2, 48), keys, values, torch.ones(1, 4, dtype=torch.bool), None)
    want = graft.attend(*arguments)
    support.warn_once.cache_clear()
    with pytest.warns(UserWarning, match="head_dim 24.*reference implementation"):
        got = pvm.fused(*arguments, *graft.weights(), graft.eps, None)
    torch.testing.assert_close(got, want)
    with pytest.warns(UserWarning) as record:
        pvm.fused(*arguments, *graft.weights(), graft.eps, None)
        import warnings

        warnings.warn("another", stacklevel=1)
    assert [str(each.message) for each in record] == ["another"]


def test_a_gpu_too_old_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: (7, 5))
    support.reason_against_device.cache_clear()
    reason = support.reason_against_device(0)
    support.reason_against_device.cache_clear()
    assert reason is not None and "7.5" in reason and "8.0" in reason


def test_grafts_stay_plain_where_that_is_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SURGEON_KERNELS", "standard")
    support.reason_against_device.cache_clear()
    assert support.reason_against_device(0) == "no fused kernels: SURGEON_KERNELS=standard"
    support.reason_against_device.cache_clear()


def test_use_fused_finds_every_graft() -> None:
    model = torch.nn.ModuleList([Case("pvm").graft, torch.nn.Linear(2, 2), Case("mixin").graft])
    assert cuda.use_fused(model, True) == 2
    assert model[0].fused is cuda.fused_form_of("pvm") and model[2].fused is cuda.fused_form_of("mixin")
    assert cuda.fused_form_of("nothing") is None
    cuda.use_fused(model, False)
    assert model[0].fused is None


@pytest.mark.parametrize("kind", ["pvm", "mixin"])
def test_a_traced_result_lies_in_memory_as_the_computed_one(kind: str) -> None:
    """In order, whatever the order of the hidden states."""
    case = Case(kind)
    case.graft.requires_grad_(False).fused = OnCpu(cuda.fused_form_of(kind))
    case.hidden_states = case.hidden_states.detach().mT.contiguous().mT
    compiled = torch.compile(lambda: case.compute().view(-1), backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(), case.compute().view(-1))
