"""Grafting into a transformers model in memory, in place."""

import copy
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from surgeon.checkpoint.reader import Checkpoint
from surgeon.errors import OptionError
from surgeon.families import family
from surgeon.grafts import is_patched
from surgeon.graph import LvlmGraph
from surgeon.memory.graft import Graft
from surgeon.memory.patched import RECORD, graft_model, patched_base_model_class
from surgeon.models import load, model_class
from surgeon.patch import plan
from surgeon.pipeline import Pass, run_passes
from surgeon.remote_code import with_remote_code
from surgeon.sizes import short
from surgeon.version import __version__

_KEPT, _SAVED = ".original_module", "modules_to_save"
"""What PEFT calls a module that it trains whole: as it was, and the copies that are used instead."""


def graft(model: PreTrainedModel | str | Path, *passes: Pass, seed: int = 0, **kwargs: Any) -> Any:
    """Run passes on a model of transformers in memory, in place, or on a checkpoint that is loaded for it; -> the
    model, which is patched then as if its checkpoint had been.

    Its weights stay the tensors that they are; new ones come on the device of the layer that they are in and in the
    model's dtype, with the values that `surgeon patch` gives them (a function of `seed` and of their names). It is
    trained and pickled as any patched model, and saved by `surgeon.save`, or by `save_pretrained`, which writes no
    tokenizer and no image processor. `kwargs`: those of `surgeon.load`, for a checkpoint.

    Raises OptionError for a model that cannot be grafted into in memory and for passes that change the tokenizer or the
    image processor, PreconditionError and the other errors of the
    passes, FamilyError for a family that is not supported.
    """
    _check_passes(passes)
    if isinstance(model, str | Path):
        with Checkpoint.open(model, weights="optional") as checkpoint:
            planned, _ = plan(checkpoint, passes, seed)  # what it would refuse is refused before weights are loaded
        _check_in_memory(planned)
        model = load(model, **kwargs)
    elif kwargs:
        raise OptionError(f"{sorted(kwargs)[0]} is for a checkpoint that is to be loaded; this model is in memory")
    _check_graftable(model)
    graph = LvlmGraph.of_model(model, seed)
    _check_plain(model, graph.model)
    run_passes(graph, passes)
    _check_in_memory(graph)
    _take_over(model, graph)
    return model


def _check_passes(passes: Sequence[Any]) -> None:
    if not passes:
        raise OptionError("nothing says what to graft: name a pass, such as PVM(layers=[8, 16, 24])")
    for each in passes:
        if not isinstance(each, Pass):
            what = getattr(each, "__name__", None) or short(each)
            raise OptionError(f"{what} is no pass: give each as an argument, such as PVM(layers=[8, 16, 24])")


def _check_in_memory(graph: LvlmGraph) -> None:
    if graph.image_processor or graph.new_tokens:
        part = "tokenizer" if graph.new_tokens else f"image processor's {', '.join(sorted(graph.image_processor))}"
        raise OptionError(
            f"the passes change the {part}, which is no part of a model in memory: patch the checkpoint (surgeon patch)"
        )


def graft_parameters(model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """Name and parameter of everything that grafts brought into a model, whatever wraps it; of what PEFT keeps twice
    (`modules_to_save`), the copy that is trained."""
    modules = dict(model.named_modules())
    # of a checkpoint's own code, too, whose classes are others
    grafts = tuple(
        f"{name}."
        for name, module in modules.items()
        if hasattr(type(module), "gates")
        and not (name.endswith(_KEPT) and hasattr(modules[name.removesuffix(_KEPT)], _SAVED))
    )
    for name, parameter in model.named_parameters():
        if name.startswith(grafts):
            yield name, parameter


def unfreeze_grafts(model: nn.Module) -> int:
    """Let the grafts train, and nothing else, an adapter neither; -> how many parameters that are. Raises OptionError
    for a model without grafts."""
    parameters = dict(graft_parameters(model))
    if not parameters:
        raise OptionError("the model has no grafts to train: graft it first")
    model.requires_grad_(False)
    for parameter in parameters.values():
        parameter.requires_grad_(True)
    return sum(parameter.numel() for parameter in parameters.values())


def _check_graftable(model: Any) -> None:
    def refuse(why: str) -> OptionError:
        return OptionError(f"cannot graft into this {type(model).__name__}: {why}")

    if not isinstance(model, PreTrainedModel):
        raise refuse("it is no model of transformers; graft first, and wrap the result (PEFT, DDP, compile)")
    if is_patched(model.config):
        raise refuse("it has grafts already; name all passes in one call, or patch its checkpoint")
    expected = family(model.config.model_type).model_class
    if not any(base.__name__ == expected for base in type(model).__mro__):
        raise refuse(f"grafts are for the whole {expected}")
    if getattr(model, "hf_device_map", None) is not None and len(set(model.hf_device_map.values())) > 1:
        raise refuse("it is spread over devices; patch the checkpoint, and load that with a device_map")
    if getattr(model, "hf_quantizer", None) is not None:
        raise refuse("its weights are quantised; graft into the plain checkpoint, and quantise the result")


def _check_plain(model: PreTrainedModel, expected: PreTrainedModel) -> None:
    """Raises OptionError unless every module is of the class that the model's config makes: what a subclass, an adapter
    or a removed layer changes would be lost, or would not fit."""
    own, plain = (dict(each.named_modules()) for each in (model, expected))
    for path in [*plain, *own.keys() - plain.keys()]:
        names = [type(modules[path]).__name__ if path in modules else "none" for modules in (own, plain)]
        if type(own.get(path)) is not type(plain.get(path)):
            raise OptionError(
                f"cannot graft into this {type(model).__name__}: its module {path or 'of the whole model'!r} is "
                f"{names[0]}, and its config makes {names[1]}; graft into the plain model first, and change the result"
            )


def _take_over(model: PreTrainedModel, graph: LvlmGraph) -> None:
    """Make `model` what the graph describes: classes, record, new modules. Nothing of it can fail half way."""
    described, config, base_model = graph.family, graph.config, model.base_model
    _own_config(model)
    patched: Any = model_class(described, config)
    _, *arguments = patched.made_by[1]
    grafts: list[type[Graft]] = [each for each in arguments if isinstance(each, type)]
    kinds = {each.kind: each for each in grafts}
    within = described.text_model.removeprefix(f"{model.base_model_prefix}.")
    model.config.__class__ = type(config)
    setattr(model.config, RECORD, {**graph.record, "version": __version__})
    plain_base: Any = type(base_model)
    reference = next(base_model.get_submodule(within).layers[0].parameters())
    # the random values drawn while the modules are built are discarded; the global RNG state stays untouched
    with torch.random.fork_rng(devices=[]), torch.device(reference.device):
        graft_model(base_model, within, described.norm_placement, kinds)
    base_model.__class__ = patched_base_model_class(
        plain_base, within, described.norm_placement, described.visual_token_keys, *kinds.values()
    )
    model.__class__ = with_remote_code(*patched.made_by)
    for name, new in graph.new_parameters().items():
        path, _, leaf = name.rpartition(".")
        module = model.get_submodule(path)
        like = next(model.get_submodule(_layer_of(path)).parameters())
        setattr(module, leaf, nn.Parameter(new.values(name).to(like.device)))
    for module in model.modules():
        if isinstance(module, Graft):
            module.train(model.training)


def _own_config(model: PreTrainedModel) -> None:
    """Give it a config of its own: another model may have been made of the same one."""
    shared, own = model.config, copy.copy(model.config)
    for module in model.modules():
        if getattr(module, "config", None) is shared:
            module.config = own


def _layer_of(path: str) -> str:
    """`model.language_model.layers.3` of a module within it."""
    before, _, behind = path.partition(".layers.")
    return f"{before}.layers.{behind.split('.')[0]}"
