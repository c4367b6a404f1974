"""`surgeon bench`: forms measured in processes of their own."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from checkpoints import has_tokenizer, tiny_checkpoint
from command import run
from exporters.bench import Workload, draw, measure
from exporters.bench.timed import open_timed
from exporters.export import export_bundle
from surgeon.errors import OptionError, SurgeonError
from surgeon.inputs import Prompt

pytestmark = pytest.mark.skipif(not has_tokenizer(), reason="the demo checkpoint is not there")


@pytest.fixture(scope="module")
def forms(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    directory = tmp_path_factory.mktemp("forms")
    source = tiny_checkpoint(directory / "checkpoint", "qwen3_vl")
    export_bundle(source, directory / "bundle", dtype=torch.float32, max_length=256)
    return [source, directory / "bundle"]


def test_side_by_side(forms: list[Path], tmp_path: Path) -> None:
    arguments = ["--prompt", "Hello.", "--tokens", 5, "--rounds", 2, "--threads", 1, "--batch", 2]
    done = run("bench", *forms, *arguments, "--out", tmp_path / "out.png", "--json")
    assert done.exit_code == 0, done.output
    results = json.loads(done.stdout)
    assert [each["stage"] for each in results] == ["checkpoint", "bundle"]
    assert results[0]["prompt_tokens"] == results[1]["prompt_tokens"] > 5
    for each in results:
        assert len(each["tokens_per_second"]) == 2
        assert 0 < each["step"] <= each["step_p95"] and each["first_token"] > 0
        assert each["peak_memory"] > 1e8 and each["device_memory"] == 0
    drawn = np.asarray(Image.open(tmp_path / "out.png").convert("L"))
    assert drawn.shape[1] > 1000 and drawn.std() > 5


@pytest.mark.parametrize("index", [0, 1])
def test_a_run_ends_when_it_should(forms: list[Path], index: int) -> None:
    timed = open_timed(forms[index], [Prompt("Hello.")] * 2, threads=1)
    ends = timed.run(7)
    assert len(ends) == 7 and ends == sorted(ends)


def test_what_cannot_be_run_is_said_in_a_line(forms: list[Path], tmp_path: Path) -> None:
    with pytest.raises(SurgeonError, match="no such directory"):
        measure([forms[0], tmp_path / "nowhere"], Workload("Hello.", steps=2, rounds=1))
    with pytest.raises(OptionError, match="choose a name that ends in"):
        draw([], tmp_path / "out.xyz")
