"""`surgeon doctor` prints what was found."""

import dataclasses
import json
from pathlib import Path

import pytest

from command import run
from surgeon.doctor import Backend, Diagnosis, Leftover, Package, Storage


def test_doctor_prints_what_was_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    diagnosis = Diagnosis(
        [Package("torch", "2.99", "no libtorch"), Package("triton", None)],
        [Backend("Triton", False, "triton is not installed", "pip install triton")],
        Storage(str(tmp_path), 5_000_000_000, reflink=False, hardlink=True),
        [Leftover("/models/.out.staging-0123abcd", "/models/out", "left", only_copy=False)],
    )
    monkeypatch.setattr("surgeon.doctor.diagnose", lambda directory: diagnosis)  # its own tests run it
    assert json.loads(run("doctor", "--dir", tmp_path, "--json").stdout) == dataclasses.asdict(diagnosis)
    printed = run("doctor", "--dir", tmp_path).stdout
    for expected in (
        "2.99",
        "no libtorch",
        "not installed",
        "Triton: pip install triton",
        "5.0 GB free",
        "hard links: yes",
        "/models/.out.staging-0123abcd: a killed run left it",
    ):
        assert expected in printed
