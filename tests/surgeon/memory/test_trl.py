"""TRL's trainers replace the head's forward and call the base model: the grafts train there as they do without."""

import copy
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from PIL import Image
from transformers import AutoProcessor, PreTrainedModel
from trl import DPOConfig, DPOTrainer, GRPOConfig, GRPOTrainer, SFTConfig, SFTTrainer

import torchvision_beside_cpu_torch
from checkpoints import demo_tokenizer, tiny_checkpoint, tiny_model
from patching import apply, batch, image, randomise_grafts
from surgeon import models
from surgeon.memory.graft import Graft

GRID = (1, 4, 6)
ROW = [5, 6, *image(GRID), 7, 8, 9, 10]


def grafts_alone(source: Path, target: Path) -> PreTrainedModel:
    """Grafted with PVM at three layers, which alone train."""
    apply(source, target, "pvm:layers=1,2,3,latent=32")
    model = models.load(target)
    randomise_grafts(model)
    model.requires_grad_(False)
    for module in model.modules():
        if isinstance(module, Graft):
            module.requires_grad_(True)
    return model


def collated(model: PreTrainedModel) -> Callable[[list[Any]], dict[str, torch.Tensor]]:
    """One row with an image, whose last tokens are learned."""

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
        learning_rate=1e-2,
        logging_steps=1,
        report_to=[],
        use_cpu=True,
        bf16=False,
        gradient_checkpointing=False,
        save_strategy="no",
        disable_tqdm=True,
        lr_scheduler_type="constant",
        **options,
    )


def changed(model: PreTrainedModel, before: dict[str, torch.Tensor]) -> set[str]:
    return {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}


def test_sft_trains_every_tensor_of_the_grafts_and_no_other(tmp_path: Path) -> None:
    tiny_model("qwen3_vl").save_pretrained(tmp_path / "a")
    model = grafts_alone(tmp_path / "a", tmp_path / "b")
    before = copy.deepcopy(model.state_dict())
    collate = collated(model)
    model.train()
    expected = float(model(**collate([{"seed": 0}]), use_cache=False).loss.detach())
    trainer = SFTTrainer(
        model=model,
        args=settings(
            SFTConfig,
            tmp_path,
            per_device_train_batch_size=1,
            dataset_kwargs={"skip_prepare_dataset": True},
            max_length=None,
            remove_unused_columns=False,
        ),
        train_dataset=Dataset.from_dict({"seed": [0] * 3}),
        data_collator=collate,
        processing_class=demo_tokenizer("qwen3_vl"),
    )
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses[0] == expected and losses[-1] < losses[0]
    grafted = {name for name in before if ".pvm." in name}
    assert len(grafted) == 45 and changed(model, before) == grafted


IMAGE = Image.new("RGB", (64, 96), (200, 30, 40))
QUESTION = {"role": "user", "content": "What is this?"}


def answer(text: str) -> list[dict[str, str]]:
    return [{"role": "assistant", "content": text}]


@pytest.fixture
def asked(tmp_path: Path) -> tuple[PreTrainedModel, Any]:
    """A model and transformers' own processor of it."""
    if not torchvision_beside_cpu_torch.make_importable():
        pytest.skip("transformers makes a processor of Qwen3-VL with torchvision only")
    tiny_checkpoint(tmp_path / "a", "qwen3_vl")
    model = grafts_alone(tmp_path / "a", tmp_path / "b")
    return model, AutoProcessor.from_pretrained(tmp_path / "b", trust_remote_code=False)


def test_dpo_trains_them_with_images(asked: tuple[PreTrainedModel, Any], tmp_path: Path) -> None:
    model, processor = asked
    before = copy.deepcopy(model.state_dict())
    preferences = {"images": [IMAGE], "prompt": [QUESTION], "chosen": answer("Red."), "rejected": answer("Blue!")}
    trainer = DPOTrainer(
        model=model,
        ref_model=copy.deepcopy(model),
        args=settings(DPOConfig, tmp_path, per_device_train_batch_size=1, max_length=None),
        train_dataset=Dataset.from_list([preferences] * 3),
        processing_class=processor,
    )
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses[0] == pytest.approx(math.log(2)) and losses[-1] < losses[0]
    assert changed(model, before) == {name for name in before if ".pvm." in name}


def test_grpo_trains_them_with_images(asked: tuple[PreTrainedModel, Any], tmp_path: Path) -> None:
    model, processor = asked
    before = copy.deepcopy(model.state_dict())
    trainer = GRPOTrainer(
        model=model,
        args=settings(GRPOConfig, tmp_path, per_device_train_batch_size=2, num_generations=2, max_completion_length=6),
        reward_funcs=lambda completions, **_: [float(number) for number in range(len(completions))],
        train_dataset=Dataset.from_list([{"images": [IMAGE], "prompt": [QUESTION]}] * 4),
        processing_class=processor,
    )
    trainer.train()
    assert changed(model, before) == {name for name in before if ".pvm." in name}
