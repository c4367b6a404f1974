"""What `import surgeon` offers: quickly, whole, and documented."""

import inspect
import subprocess
import sys

import pytest

import surgeon
from command import ROOT


def test_it_lists_what_it_has() -> None:
    assert set(dir(surgeon)) == {*surgeon._PUBLIC, "__version__"} == set(surgeon.__all__)
    assert all(name in str(surgeon.__doc__) for name in ("graft", "PVM", "unfreeze_grafts", "validate", "export"))
    with pytest.raises(AttributeError, match=r"no attribute 'grafts_'; there are .*graft, graft_parameters"):
        surgeon.grafts_  # noqa: B018


@pytest.mark.parametrize("name", surgeon._PUBLIC)
def test_each_says_what_it_does_and_what_it_takes(name: str) -> None:
    each = getattr(surgeon, name)
    assert len(inspect.getdoc(each) or "") > 60
    signature = inspect.signature(each)
    assert signature.return_annotation is not inspect.Signature.empty
    assert all(p.annotation is not inspect.Parameter.empty for p in signature.parameters.values())


def test_importing_it_imports_nothing_heavy() -> None:
    code = (
        "import sys, surgeon; dir(surgeon); sys.exit(any(m in sys.modules for m in ('torch', 'transformers', 'onnx')))"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
