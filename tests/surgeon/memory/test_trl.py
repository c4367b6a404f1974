"""TRL's trainers replace the head's forward and call the base model: the grafts train there as they do without."""

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from transformers import PreTrainedModel
from trl import SFTConfig, SFTTrainer

from checkpoints import demo_tokenizer, tiny_model
from patching import apply, batch, picture, randomise_grafts
from surgeon import models
from surgeon.memory.graft import Graft

GRID = (1, 4, 6)
ROW = [5, 6, *picture(GRID), 7, 8, 9, 10]


@pytest.fixture
def model(tmp_path: Path) -> PreTrainedModel:
    """Grafted with PVM at three layers, which alone train."""
    tiny_model("qwen3_vl").save_pretrained(tmp_path / "a")
    apply(tmp_path / "a", tmp_path / "b", "pvm:layers=1,2,3,latent=32")
    model = models.load(tmp_path / "b")
    randomise_grafts(model)
    model.requires_grad_(False)
    for module in model.modules():
        if isinstance(module, Graft):
            module.requires_grad_(True)
    return model


def collated(model: PreTrainedModel) -> Callable[[list[Any]], dict[str, torch.Tensor]]:
    """One row with a picture, whose last tokens are learned."""

    def collate(features: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        count = len(features[:1])
        kwargs = batch(model, [ROW] * count, [GRID] * count, seed=features[0]["seed"])
        labels = kwargs["input_ids"].clone()
        labels[:, :-4] = -100
        return {**kwargs, "labels": labels}

    return collate


def settings(config: Callable[..., Any], directory: Path, **options: Any) -> Any:
    return config(
        output_dir=str(directory),
        max_steps=3,
        per_device_train_batch_size=1,
        learning_rate=1e-2,
        logging_steps=1,
        report_to=[],
        use_cpu=True,
        bf16=False,
        gradient_checkpointing=False,
        save_strategy="no",
        remove_unused_columns=False,
        disable_tqdm=True,
        lr_scheduler_type="constant",
        **options,
    )


def changed(model: PreTrainedModel, before: dict[str, torch.Tensor]) -> set[str]:
    return {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}


def test_sft_trains_every_tensor_of_the_grafts_and_no_other(model: PreTrainedModel, tmp_path: Path) -> None:
    before = copy.deepcopy(model.state_dict())
    collate = collated(model)
    model.train()
    expected = float(model(**collate([{"seed": 0}]), use_cache=False).loss.detach())
    trainer = SFTTrainer(
        model=model,
        args=settings(SFTConfig, tmp_path, dataset_kwargs={"skip_prepare_dataset": True}, max_length=None),
        train_dataset=Dataset.from_dict({"seed": [0] * 3}),
        data_collator=collate,
        processing_class=demo_tokenizer("qwen3_vl"),
    )
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses[0] == expected and losses[-1] < losses[0]
    grafted = {name for name in before if ".pvm." in name}
    assert len(grafted) == 45 and changed(model, before) == grafted
