"""A model in memory as a checkpoint that is whole: its weights, and what of its source stands beside them."""

from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from surgeon.checkpoint.publish import staged
from surgeon.checkpoint.reader import Checkpoint
from surgeon.errors import OptionError
from surgeon.families import family
from surgeon.published import check_staged
from surgeon.recipe import FILE_NAME
from surgeon.side_files import copy_side_files, name_classes
from surgeon.source_card import card_files


def save(model: Any, target: str | Path, source: str | Path, *, overwrite: bool = False) -> None:
    """`model.save_pretrained(target)`, and beside the weights what else of `source` a checkpoint needs: tokenizer,
    image processor, chat template, generation config, license. No code of the source, and no model card.

    source: the checkpoint that the model was loaded from or grafted into, a directory or a hub id; nothing in it is
    changed. `target` appears whole or not at all.

    Raises OptionError for what is no model of transformers (of PEFT: merge_and_unload first) and for a source of
    another family, CheckpointError for the source, TargetError for the target.
    """
    if not isinstance(model, PreTrainedModel) or hasattr(model, "peft_config"):
        raise OptionError(
            f"cannot save a {type(model).__name__} as a checkpoint: pass a transformers model (an adapter merged, "
            "merge_and_unload)"
        )
    described = family(model.config.model_type)
    with Checkpoint.open(source, weights="optional") as opened:
        if family(opened.config["model_type"]).model_type != described.model_type:
            raise OptionError(f"the model is of family {described.model_type}, and {source} is of another")
        with staged(Path(target), overwrite, protect=[opened.directory], verify=check_staged) as directory:
            model.save_pretrained(directory)
            not_copied = {FILE_NAME, *(path.name for path in (*directory.iterdir(), *card_files(opened)))}
            copy_side_files(opened, directory, not_copied, trust_remote_code=False)
            name_classes(directory, described)
