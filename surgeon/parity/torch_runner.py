"""A checkpoint as transformers runs it: the reference of every level."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from transformers import GenerationConfig, LogitsProcessor

from surgeon import models
from surgeon.dtypes import PRECISIONS, precision_of
from surgeon.generation import Generation
from surgeon.inputs import Inputs, ModelInputs, Prompt, Side
from surgeon.memory.lora import LowRank
from surgeon.memory.patched import RECORD
from surgeon.memory_use import MemoryTokens, Mode, memory_tokens_of
from surgeon.parity.invocations import CalledTrace, Schedule
from surgeon.parity.runner import Trace
from surgeon.positions import Positions
from surgeon.torch_generate import TorchGenerator


class _Forced(LogitsProcessor):
    """Forces the generation of `tokens` [B, steps]."""

    def __init__(self, tokens: np.ndarray, prompt_length: int) -> None:
        self.tokens = torch.from_numpy(tokens)
        self.prompt_length = prompt_length

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        step_tokens = self.tokens[:, input_ids.shape[1] - self.prompt_length]
        return torch.full_like(scores, -torch.inf).scatter(1, step_tokens[:, None].to(scores.device), 0.0)


class _Scheduled(LogitsProcessor):
    """Has rows call for memory at the steps of a schedule, and at no other; what they say is greedy, or `tokens`
    [B, steps]."""

    def __init__(
        self, memory_tokens: MemoryTokens, schedule: Schedule, tokens: np.ndarray | None, prompt_length: int
    ) -> None:
        self.memory_tokens, self.schedule, self.tokens, self.prompt_length = (
            memory_tokens, schedule, tokens, prompt_length
        )  # fmt: skip

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        answers = input_ids[:, self.prompt_length :]
        said = (~self.memory_tokens.is_one(answers)).sum(1).tolist()
        called = self.memory_tokens.invocations(answers).tolist()
        scores = scores.clone()
        for row, wanted in enumerate(self.schedule):
            due = sorted(step for step in wanted if step <= said[row])
            invoke = list(self.memory_tokens.invoke.values())
            token = None
            if called[row] < len(due):
                token = self.memory_tokens.invoke[wanted[due[called[row]]]]
            elif self.tokens is not None:
                token = int(self.tokens[row, min(said[row], self.tokens.shape[1] - 1)])
            if token is None:
                scores[row, invoke] = -torch.inf
            else:
                scores[row] = torch.full_like(scores[row], -torch.inf)
                scores[row, token] = 0.0
        return scores


_ALIGNMENT = 64
"""Bytes. torch aligns what it allocates so; where a file's tensors lie is up to whoever wrote it."""


class TorchRunner:
    """`dtype="auto"` runs in the checkpoint's own. `positions`: as for `Inputs.prepare`."""

    stage = "checkpoint"

    def __init__(
        self, path: str | Path, dtype: str = "auto", device: str = "cpu", positions: Positions | None = None
    ) -> None:
        self.path, self.positions = str(path), positions
        self.model = models.load(path, dtype=PRECISIONS.get(dtype, "auto"), device=device)
        _align(self.model)
        self.dtype = precision_of(self.model.dtype)
        self.directory = Path(self.model.config._name_or_path or path)
        """Where it lies on this disk."""
        self.inputs = Inputs.from_directory(self.directory)
        # Without an end token every row decodes for as long as it is asked to.
        self.model.generation_config = GenerationConfig(pad_token_id=self.inputs.pad_token_id)
        self.record: Mapping[str, Any] | None = getattr(self.model.config, RECORD, None)
        self.memory_tokens = memory_tokens_of(dict(self.record or {}))

    def gates(self) -> dict[str, float]:
        """Every graft's gates, by parameter name: the value farthest from zero."""
        return {name: float(gate.abs().max()) for name, gate in self._gates().items()}

    def graft_tensors(self) -> dict[str, list[str]]:
        """Gate, by parameter name -> the names of all parameters of its graft."""
        grafts = {name: module for name, module in self.model.named_modules() if hasattr(module, "gates")}
        own = {path: [f"{path}.{name}" for name, _ in graft.named_parameters()] for path, graft in grafts.items()}
        return {f"{path}.{gate}": own[path] for path, graft in grafts.items() for gate in graft.gates}

    @contextmanager
    def with_gates(self, values: Mapping[str, float]) -> Iterator[None]:
        gates = {name: gate for name, gate in self._gates().items() if name in values}
        before = {name: gate.clone() for name, gate in gates.items()}
        try:
            for name, gate in gates.items():
                gate.fill_(values[name])
            yield
        finally:
            for name, gate in gates.items():
                gate.copy_(before[name])

    @property
    def formers_adapted(self) -> bool:
        """Whether an adapter of what forms memory adds anything."""
        adapters = [module for module in self.model.modules() if isinstance(module, LowRank)]
        return any(bool(weight.any()) for module in adapters for weight in module.expand.parameters())

    @property
    def head_rows(self) -> int:
        """How many tokens it gives logits of."""
        return int(self.model.get_output_embeddings().weight.shape[0])

    @contextmanager
    def with_head_in_two(self, rows: int) -> Iterator[None]:
        """Until the end of the `with`, the head's first `rows` rows are multiplied apart from the others: a product of
        another size may be added up in another order, and a head that has grown give its old tokens other last bits."""
        head: Any = self.model.get_output_embeddings()

        def forward(hidden_states: torch.Tensor) -> torch.Tensor:
            parts = (head.weight[:rows], head.weight[rows:])
            return torch.cat([torch.nn.functional.linear(hidden_states, part) for part in parts], -1)

        head.forward = forward
        try:
            yield
        finally:
            del head.forward

    def _gates(self) -> dict[str, torch.Tensor]:
        """The parameters themselves, without gradient."""
        return {name: self.model.get_parameter(name).detach() for name in self.graft_tensors()}

    @torch.inference_mode()
    def trace(self, prompts: Sequence[Prompt], steps: int, tokens: np.ndarray | None = None) -> Trace:
        inputs, kwargs = self._prepare(prompts)
        length = inputs.input_ids.shape[1]
        forced = [] if tokens is None else [_Forced(tokens, length)]
        quiet = {} if self.memory_tokens is None else {"memory": "off"}
        out = self.model.generate(
            **kwargs,
            **quiet,
            logits_processor=forced,
            do_sample=False,
            max_new_tokens=steps,
            output_logits=True,
            return_dict_in_generate=True,
        )
        return Trace(
            [row[-n:] for row, n in zip(inputs.input_ids, inputs.lengths, strict=True)],
            self._prompt_logits(prompts),
            torch.stack(out.logits, 1).float().numpy(force=True),
            out.sequences[:, length:].numpy(force=True),
        )

    @torch.inference_mode()
    def called_trace(
        self, prompts: Sequence[Prompt], steps: int, schedule: Schedule, tokens: np.ndarray | None = None
    ) -> CalledTrace:
        assert self.memory_tokens is not None
        inputs, kwargs = self._prepare(prompts)
        length = inputs.input_ids.shape[1]
        out = self.model.generate(
            **kwargs,
            logits_processor=[_Scheduled(self.memory_tokens, schedule, tokens, length)],
            do_sample=False,
            max_new_tokens=steps,
            max_invocations=max(map(len, schedule)),
            output_logits=True,
            return_dict_in_generate=True,
        )
        ids = out.sequences[:, length:]
        logits = torch.stack(out.logits, 1).float()
        visible = ~self.memory_tokens.is_one(ids)
        return CalledTrace(
            torch.stack([row[own][:steps] for row, own in zip(logits, visible, strict=True)]).numpy(force=True),
            torch.stack([row[own][:steps] for row, own in zip(ids, visible, strict=True)]).numpy(force=True),
        )

    def answers(self, prompts: Sequence[Prompt], steps: int, mode: Mode) -> list[Generation]:
        return TorchGenerator(self.model, self.inputs).generate(prompts, steps, positions=self.positions, memory=mode)

    @torch.inference_mode()
    def tensors(self, prompts: Sequence[Prompt]) -> dict[str, list[np.ndarray]]:
        inputs, kwargs = self._prepare(prompts, "right")
        outputs: dict[str, torch.Tensor] = {}

        def keep(name: str) -> Any:
            def hook(module: Any, args: Any, output: Any) -> None:
                outputs[name] = output.float()

            return hook

        decoder = self.model.get_submodule(models.family(self.model.config.model_type).text_model)
        hooks = [layer.register_forward_hook(keep(f"hidden_states.{i}")) for i, layer in enumerate(decoder.layers)]
        try:
            self.model(**kwargs, use_cache=False)
        finally:
            for handle in hooks:
                handle.remove()
        return {
            name: [row[:n].numpy(force=True) for row, n in zip(value, inputs.lengths, strict=True)]
            for name, value in outputs.items()
        }

    def _prompt_logits(self, prompts: Sequence[Prompt]) -> list[np.ndarray]:
        # Padded on the right: a forward without images numbers positions without regard to padding.
        inputs, kwargs = self._prepare(prompts, "right")
        logits = self.model(**kwargs, use_cache=False).logits.float().numpy(force=True)
        return [row[:n] for row, n in zip(logits, inputs.lengths, strict=True)]

    def _prepare(
        self, prompts: Sequence[Prompt], padding_side: Side = "left"
    ) -> tuple[ModelInputs, dict[str, torch.Tensor]]:
        inputs = self.inputs.prepare(prompts, padding_side, positions=self.positions)
        return inputs, inputs.model_kwargs(self.model.dtype, self.model.device)


def _align(model: nn.Module) -> None:
    """Move weights that lie where their file has them to where torch would put them: kernels add up in another order
    where an address is not aligned, and equal tensors then give other last bits."""
    for tensor in (*model.parameters(), *model.buffers()):
        if tensor.data_ptr() % _ALIGNMENT:
            tensor.data = tensor.data.clone()
