"""LvlmGraph, the representation that passes rewrite: everything about a model except its weights' bytes."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from transformers import PretrainedConfig, PreTrainedModel

from surgeon.checkpoint.reader import Checkpoint
from surgeon.errors import OptionError
from surgeon.families import Family, family
from surgeon.grafts import asks_for_patched_class, is_patched
from surgeon.memory.graft import Graft
from surgeon.memory.inserted import Inserted
from surgeon.memory.patched import RECORD, patched_config_class
from surgeon.models import build_meta, config_values, read_config, read_model
from surgeon.new_rows import NewRow, RowRule
from surgeon.vocabulary import Vocabulary
from surgeon.weights import Extended, Initialised, Stored, WeightPlan


@dataclass
class LvlmGraph:
    """A model between passes.

    `model` is on the meta device. `weights` says for each of its parameters where the values come from. `record` is
    what the patched config will hold under its `surgeon` key.
    """

    family: Family
    config: PretrainedConfig
    model: PreTrainedModel
    weights: WeightPlan
    dtype: torch.dtype
    seed: int = 0
    record: dict[str, Any] = field(default_factory=lambda: {"grafts": [], "passes": []})
    image_processor: dict[str, Any] = field(default_factory=dict)
    """What the passes change in the image processor's options."""
    source_vocabulary: Vocabulary | None = None
    """Of the checkpoint; None for a model in memory."""
    new_tokens: dict[str, int] = field(default_factory=dict)
    """What the passes add to the tokenizer, and the ids that it gives them."""

    @classmethod
    def read(cls, source: Checkpoint, seed: int = 0) -> "LvlmGraph":
        """The graph of a checkpoint, plain or already patched. A checkpoint without weights gives a graph that can be
        rewritten and counted, but not published.

        Raises CheckpointError where the config and the tensors disagree, FamilyError for an unsupported family.
        """
        config, model, weights = read_model(source)
        record = getattr(config, RECORD, None) or {"grafts": [], "passes": []}
        graph = cls(family(config.model_type), config, model, weights, source.dtype, seed, record)
        graph.source_vocabulary = Vocabulary(source)
        return graph

    @classmethod
    def of_model(cls, model: PreTrainedModel, seed: int = 0) -> "LvlmGraph":
        """The graph of a model without grafts in memory, whose config and dtype it has; nothing of the model is kept.

        Raises FamilyError for an unsupported family, CheckpointError for a config that no checkpoint may have.
        """
        config = read_config(config_values(model))
        meta = build_meta(config, model.dtype)
        weights: WeightPlan = {
            name: Stored(name, tuple(tensor.shape), tensor.dtype) for name, tensor in meta.state_dict().items()
        }
        record = getattr(config, RECORD, None) or {"grafts": [], "passes": []}
        return cls(family(config.model_type), config, meta, weights, model.dtype, seed, record)

    @property
    def vocabulary(self) -> Vocabulary:
        """The tokenizer of the checkpoint. Raises OptionError for a model in memory."""
        if self.source_vocabulary is None:
            raise OptionError(
                "the passes change the tokenizer, which is no part of a model in memory: patch the checkpoint "
                "(surgeon patch)"
            )
        return self.source_vocabulary

    @property
    def decoder(self) -> Any:
        return self.model.get_submodule(self.family.text_model)

    @property
    def num_hidden_layers(self) -> int:
        return len(self.decoder.layers)

    def grafts(self) -> dict[str, Graft]:
        """Module path -> graft."""
        return {name: module for name, module in self.model.named_modules() if isinstance(module, Graft)}

    def inserted(self) -> dict[str, Inserted]:
        """Module path -> everything that passes inserted: grafts, and what forms memory that the model calls for."""
        return {name: module for name, module in self.model.named_modules() if isinstance(module, Inserted)}

    def new_parameters(self) -> dict[str, Initialised]:
        """The parameters that are not the source's."""
        return {name: plan for name, plan in self.weights.items() if isinstance(plan, Initialised)}

    def extended_tables(self) -> dict[str, Extended]:
        """The source's parameters that get new rows."""
        return {name: plan for name, plan in self.weights.items() if isinstance(plan, Extended)}

    def graft(self, kind: str, layers: list[int], options: dict[str, Any]) -> list[str]:
        """Graft `kind` into these layers: config, modules and weight plan. Returns the new modules' paths."""
        entry = {"kind": kind, "layers": layers, **options}
        return self._insert({**self.record, "grafts": [*self.record["grafts"], entry]})

    def add_vismem(self, entry: dict[str, Any]) -> list[str]:
        """Give the model what forms memory that it calls for: config, modules and weight plan. Returns the new module's
        path. `entry`: what the record is to hold of it."""
        return self._insert({**self.record, "vismem": entry})

    def _insert(self, record: dict[str, Any]) -> list[str]:
        before = set(self.inserted())
        self.record = record
        self._rebuild()
        std = float(self.family.text_config(self.config).initializer_range)
        added = {path: module for path, module in self.inserted().items() if path not in before}
        for path, module in added.items():
            for name, initialiser in module.initialisers(std).items():
                shape = tuple(module.get_parameter(name).shape)
                self.weights[f"{path}.{name}"] = Initialised(initialiser, self.seed, shape, self.dtype)
        return list(added)

    def lay_out_tiles(self, **values: Any) -> None:
        """Put what depends on an image's tiles into the record (`positions`, `allocation`), and with it how the family
        lays them out."""
        layout = self.family.tile_layout(self.config)
        assert layout is not None
        self.record = {**self.record, "layout": asdict(layout), **values}
        self._rebuild()

    def add_tokens(self, tokens: Mapping[str, int], rule: RowRule, seed: int) -> list[str]:
        """Give these tokens, of ids that the tokenizer gives next, rows in the embeddings and in a head of its own. A
        table grows to hold them, and never shrinks. Returns the tables' names."""
        text = self.family.text_config(self.config)
        needed = max(tokens.values()) + 1
        first = self.record.get("source_vocab_size", text.vocab_size)
        known = self.record.get("tokens", {})
        self.record = {**self.record, "tokens": {**known, **tokens}, "source_vocab_size": first}
        self.new_tokens = {**self.new_tokens, **tokens}
        text.vocab_size = max(text.vocab_size, needed)
        whole: Any = self.config
        if "vocab_size" in whole.to_dict():  # of the head, where a family's config says it once more
            whole.vocab_size = max(whole.vocab_size, needed)
        self._rebuild()
        shapes = {name: tuple(tensor.shape) for name, tensor in self.model.state_dict().items()}
        rows = tuple(NewRow(token, token_id, rule, seed) for token, token_id in tokens.items())
        tied = self.model.all_tied_weights_keys
        tables = [name for name in self.family.token_tables if isinstance(self.weights[name], Stored | Extended)]
        for name in tables:
            before: Any = self.weights[name]
            earlier = before.rows if isinstance(before, Extended) else ()
            source_shape = before.source_shape if isinstance(before, Extended) else before.shape
            self.weights[name] = Extended(
                before.key, source_shape, shapes[name], before.dtype, (*earlier, *rows), tied.get(name, name)
            )
        return tables

    def sync_record(self) -> None:
        """Carry the record into the config."""
        if getattr(self.config, RECORD, None) is not None:
            setattr(self.config, RECORD, self.record)

    def _rebuild(self) -> None:
        """Make config and module tree anew from the record."""
        plain: Any = type(self.config)
        already = is_patched(self.config) or not asks_for_patched_class(self.record)
        config_class = plain if already else patched_config_class(plain)
        values = {k: v for k, v in self.config.to_dict().items() if k != "model_type"}
        self.config = config_class.from_dict({**values, RECORD: self.record})
        self.model = build_meta(self.config, self.dtype)
