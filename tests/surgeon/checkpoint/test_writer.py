import os
import tempfile
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

from surgeon.checkpoint.headers import TORCH_DTYPES, read_header, read_metadata
from surgeon.checkpoint.reader import Checkpoint
from surgeon.checkpoint.writer import PlannedTensor, write_safetensors
from surgeon.errors import CheckpointError


def random_tensor(dtype: torch.dtype, shape: tuple[int, ...], seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    if dtype == torch.bool:
        return torch.rand(shape, generator=generator) < 0.5
    # Random bits, so NaNs and infinities are among them.
    count = torch.Size(shape).numel() * dtype.itemsize
    return torch.randint(0, 256, (count,), generator=generator, dtype=torch.uint8).view(dtype).reshape(shape)


def planned(tensors: dict[str, torch.Tensor]) -> list[PlannedTensor]:
    def maker(tensor: torch.Tensor) -> Callable[[], torch.Tensor]:
        return lambda: tensor

    return [PlannedTensor(name, t.dtype, tuple(t.shape), maker(t)) for name, t in tensors.items()]


def same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    flat_a, flat_b = (t.contiguous().reshape(-1).view(torch.uint8) for t in (a, b))
    return a.dtype == b.dtype and a.shape == b.shape and torch.equal(flat_a, flat_b)


plans = st.dictionaries(
    st.text(min_size=1, max_size=8).filter(lambda name: name != "__metadata__" and name.isprintable()),
    st.tuples(
        # The reference reader has no F8_E8M0.
        st.sampled_from([d for d in TORCH_DTYPES.values() if d != torch.float8_e8m0fnu]),
        st.lists(st.integers(0, 5), max_size=3).map(tuple),
    ),
    max_size=6,
)


@settings(max_examples=60, deadline=None)
@given(plans, st.integers(0, 2**31))
def test_round_trip_against_the_safetensors_library(
    plan: dict[str, tuple[torch.dtype, tuple[int, ...]]], seed: int
) -> None:
    tensors = {name: random_tensor(*kind, seed + i) for i, (name, kind) in enumerate(plan.items())}
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.safetensors"
        (Path(folder) / "config.json").write_text('{"model_type": "any"}')
        assert write_safetensors(path, planned(tensors)) == path.stat().st_size

        reference = load_file(path)
        assert set(reference) == set(tensors)
        assert all(same_bits(reference[name], tensors[name]) for name in tensors)

        header = read_header(path)
        assert {name: (info.torch_dtype, info.shape) for name, info in header.items()} == plan
        with Checkpoint.open(folder) as checkpoint:
            assert all(same_bits(checkpoint.read(name), tensors[name]) for name in tensors)


def test_order_alignment_and_metadata(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    write_safetensors(path, planned({"z": torch.ones(3), "a": torch.ones(2, dtype=torch.float8_e8m0fnu)}))
    header = read_header(path)
    assert list(header) == ["z", "a"]
    assert header["z"].offset % 64 == 0
    assert read_metadata(path) == {"format": "pt"}


def test_strided_and_grad_tensors_are_written_as_they_look(tmp_path: Path) -> None:
    tensor = torch.nn.Parameter(torch.arange(12.0).reshape(3, 4).T)
    write_safetensors(tmp_path / "a.safetensors", planned({"w": tensor}))
    assert torch.equal(load_file(tmp_path / "a.safetensors")["w"], tensor)


def test_one_tensor_at_a_time_and_progress_in_bytes(tmp_path: Path) -> None:
    import weakref

    references: list[weakref.ref[torch.Tensor]] = []

    def make() -> torch.Tensor:
        assert not any(ref() is not None for ref in references), "an earlier tensor is still in memory"
        tensor = torch.ones(1000)
        references.append(weakref.ref(tensor))
        return tensor

    counts: list[int] = []
    write_safetensors(
        tmp_path / "a", (PlannedTensor(f"w{i}", torch.float32, (1000,), make) for i in range(4)), progress=counts.append
    )
    assert len(references) == 4
    assert sum(counts) == 16000


def test_what_is_not_as_planned_is_refused(tmp_path: Path) -> None:
    def plan(name: str, dtype: torch.dtype = torch.float32, shape: tuple[int, ...] = (2,)) -> PlannedTensor:
        return PlannedTensor(name, dtype, shape, lambda: torch.ones(2))

    with pytest.raises(ValueError, match="two tensors named a"):
        write_safetensors(tmp_path / "a", [plan("a"), plan("a")])
    with pytest.raises(ValueError, match="complex128"):
        write_safetensors(tmp_path / "b", [plan("a", torch.complex128)])
    with pytest.raises(ValueError, match=r"a: planned as torch.float32 \(3,\), made as torch.float32 \(2,\)"):
        write_safetensors(tmp_path / "c", [plan("a", shape=(3,))])
    with pytest.raises(ValueError, match=r"a: planned as torch.float32 \(2, 1\), made as torch.float32 \(2,\)"):
        write_safetensors(tmp_path / "f", [plan("a", shape=(2, 1))])  # as many values are not the same shape
    with pytest.raises(ValueError, match="planned as torch.float16"):
        write_safetensors(tmp_path / "d", [plan("a", torch.float16)])
    (tmp_path / "e").touch()
    with pytest.raises(FileExistsError):
        write_safetensors(tmp_path / "e", [plan("a")])


def test_a_tensor_of_a_file_that_is_cut_short_is_an_error(tmp_path: Path) -> None:
    """The file is mapped: what is missing of it is no memory that could be written."""
    write_safetensors(tmp_path / "model.safetensors", planned({"a": torch.ones(1 << 20)}))
    (tmp_path / "config.json").write_text('{"model_type": "any"}')
    with Checkpoint.open(tmp_path) as checkpoint:
        tensor = checkpoint.read("a")
        os.truncate(tmp_path / "model.safetensors", 8192)
        with pytest.raises(CheckpointError, match="a: the file it comes from was cut short"):
            write_safetensors(tmp_path / "b", planned({"a": tensor}))
        with pytest.raises(CheckpointError, match="cut short while it was read: a ends at byte"):
            checkpoint.read("a")
