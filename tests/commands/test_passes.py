"""`surgeon passes` lists passes and their options."""

import json

from command import run


def test_passes() -> None:
    described = {each["name"]: each["options"] for each in json.loads(run("passes", "--json").stdout)}
    assert {"mixin", "pvm", "rope-dhr"} <= described.keys()
    assert {"layers", "latent"} <= {option["name"] for option in described["pvm"]}
    assert "every:N" in run("passes").stdout
