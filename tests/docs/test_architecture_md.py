"""The example of a pass in docs/architecture.md is one that the pipeline takes."""

import re
from pathlib import Path
from typing import Any

from checkpoints import tiny_checkpoint
from surgeon.checkpoint import Checkpoint
from surgeon.graft_pass import LAYERS, GraftOptions, GraftPass
from surgeon.graph import LvlmGraph
from surgeon.layer_choice import LayerChoice
from surgeon.pipeline import make_pass

TEXT = (Path(__file__).parents[2] / "docs" / "architecture.md").read_text()


def test_the_pass_records_options_that_it_takes_again(tmp_path: Path) -> None:
    from pydantic import Field

    (block,) = re.findall(r"```python\n(.*?)```", TEXT, re.DOTALL)
    names: dict[str, Any] = {each.__name__: each for each in (GraftOptions, GraftPass)} | {
        "Field": Field,
        "LAYERS": LAYERS,
        "LayerChoice": LayerChoice,
    }
    exec(compile(block, "docs/architecture.md", "exec"), names)
    written = names["PASS"]
    with Checkpoint.open(tiny_checkpoint(tmp_path / "source", "qwen3_vl")) as checkpoint:
        graph = LvlmGraph.read(checkpoint)
        resolved = make_pass({"gate": written}, "gate", {"layers": "every:2"}).resolved(graph)
        assert make_pass({"gate": written}, "gate", resolved).resolved(graph) == resolved
