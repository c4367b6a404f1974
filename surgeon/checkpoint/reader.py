"""A checkpoint directory, read lazily: its config, where every tensor is, and a tensor's values when asked for."""

import hashlib
import json
import mmap
import os
import sys
from collections import Counter
from pathlib import Path, PurePosixPath
from types import TracebackType
from typing import Any, Literal, Self

import torch
from huggingface_hub import constants

from surgeon.checkpoint.headers import TORCH_DTYPES, TensorInfo, header_bytes, read_header
from surgeon.checkpoint.hub import hub_origin, is_hub_id, resolve
from surgeon.checkpoint.links import check_link
from surgeon.checkpoint.remote import RemoteWeights
from surgeon.errors import CheckpointError
from surgeon.json_file import read_object

CONFIG = "config.json"
SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
ADAPTER = "adapter_config.json"
PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
WEIGHTS = (".safetensors", *PICKLES, ".h5", ".msgpack", ".gguf", ".onnx", ".onnx_data", ".npz")

_SAMPLE = 4096
# Python has the constant from 3.13 on.
_NORESERVE: int = getattr(mmap, "MAP_NORESERVE", 0x4000 if sys.platform == "linux" else 0)


class Checkpoint:
    """A transformers checkpoint with safetensors weights. Open it with `Checkpoint.open`; usable in a `with`.

    directory: as given, or the hub's snapshot. In the Hugging Face cache its files are symlinks: the names here are the
      snapshot's, and reading follows them.
    config: config.json.
    tensors: name -> TensorInfo, file by file, each in the order of its data; tied tensors are there once.
    files: the weight files, in the index's order. Empty for a config alone.
    side_files: what else a copy needs (tokenizer, processor, templates, code, notes): the regular files of the top
      directory that are neither weights of any format, nor an index, nor config.json, nor hidden. Sorted by name.
    """

    def __init__(self, directory: Path, config: dict[str, Any], files: list[Path], tensors: dict[str, TensorInfo]):
        self.directory = directory
        self.config = config
        self.files = files
        self.tensors = tensors
        self._maps: dict[Path, mmap.mmap] = {}

    @classmethod
    def open(
        cls,
        path_or_id: str | Path,
        weights: Literal["required", "optional"] = "required",
        revision: str | None = None,
    ) -> Self:
        """Read the config and every weight file's header, and check them against each other; no weight is read.

        `weights="optional"` is for who wants no values. It also takes a directory with a config.json alone, whose
        `tensors` are then empty, and leaves a hub id's weight files on the hub: their headers are fetched alone, and
        `read` and `fingerprint` fail for what is not in the cache.
        Raises CheckpointError for what is not a checkpoint, has pickle weights only, is damaged, or would not be loaded
        from the same files by everyone: an adapter or a second set of weights is beside the weights.
        """
        remote = None
        if weights == "optional" and is_hub_id(path_or_id) and not constants.HF_HUB_OFFLINE:
            directory = resolve(path_or_id, revision, weights=False)
            remote = RemoteWeights(str(path_or_id), directory)
        else:
            directory = resolve(path_or_id, revision)
        config = _read_config(directory)
        _refuse_adapter(directory)
        files, tensors = _read_weights(directory, remote)
        if not files and weights == "required":
            raise _no_weights(directory)
        return cls(directory, config, files, tensors)

    @property
    def name(self) -> str:
        """What it is called wherever it lies: its id on the hub, or else its directory's name."""
        origin = hub_origin(self.directory)
        return self.directory.resolve().name if origin is None else origin.repo

    @property
    def side_files(self) -> list[Path]:
        """Raises CheckpointError for a link that leads out of the directory and of the Hugging Face cache, or to
        nothing; see `check_link`."""

        def is_side_file(path: Path) -> bool:
            name = path.name
            return not (name.startswith(".") or name == CONFIG or name.endswith((*WEIGHTS, ".index.json")))

        files = [path for path in sorted(filter(is_side_file, self.directory.iterdir())) if not path.is_dir()]
        for path in files:
            check_link(path, self.directory)
        return [path for path in files if path.is_file()]

    @property
    def dtype(self) -> torch.dtype:
        """The floating dtype that most of the weights have, not counting 8-bit ones where there are wider ones.

        For a config without weights, the dtype that the config names, else float32.
        """
        counts: Counter[torch.dtype] = Counter()
        for info in self.tensors.values():
            dtype = TORCH_DTYPES.get(info.dtype)
            if dtype is not None and dtype.is_floating_point:
                counts[dtype] += info.numel
        # Quantised matrices are not what new tensors or activations should be in.
        wide = Counter({dtype: count for dtype, count in counts.items() if dtype.itemsize > 1})
        if counts:
            return (wide or counts).most_common(1)[0][0]
        text = self.config.get("text_config")
        for part in (self.config, text if isinstance(text, dict) else {}):
            dtype_name = part.get("dtype") or part.get("torch_dtype")
            config_dtype = getattr(torch, dtype_name, None) if isinstance(dtype_name, str) else None
            if isinstance(config_dtype, torch.dtype):
                return config_dtype
        return torch.float32

    def read(self, name: str) -> torch.Tensor:
        """A tensor's values, of the file's dtype and shape, on the CPU, memory-mapped: pages come in as they are used.

        Writing into the tensor never reaches the file, but `release` may undo it: clone it first. The tensor
        stays valid after `close`. Raises CheckpointError for a name that the checkpoint does not have, and for a file
        that has become shorter since its header was read.
        """
        info = self._info(name)
        dtype = info.torch_dtype
        if info.nbytes == 0:
            return torch.empty(info.shape, dtype=dtype)
        mapped = self._map(info.file)
        if mapped.size() < info.offset + info.nbytes:  # a page behind the file's end would end the process
            raise CheckpointError(
                f"{info.file}: cut short while it was read: {name} ends at byte {info.offset + info.nbytes}, the file "
                f"at {mapped.size()}; is it being written?"
            )
        raw = torch.frombuffer(mapped, dtype=torch.uint8, count=info.nbytes, offset=info.offset)
        if info.offset % dtype.itemsize:  # legal in safetensors, not for a view of a wider dtype
            raw = raw.clone()
        return raw.view(dtype).view(info.shape)

    def release(self, name: str) -> None:
        """Give a tensor's pages back to the system, so that going through a large checkpoint stays small in memory.

        Tensors that `read` gave out stay valid: their pages are read from the file again when used.
        """
        info = self._info(name)
        mapped = self._maps.get(info.file)
        if mapped is None:
            return
        # The first page may be shared with the tensor before, which loses nothing by it either.
        start = info.offset - info.offset % mmap.PAGESIZE
        mapped.madvise(mmap.MADV_DONTNEED, start, info.offset + info.nbytes - start)

    def fingerprint(self) -> str:
        """SHA-256 (hex) that tells this checkpoint from another: a sample, not a digest of every byte.

        Over the config (canonical JSON), each weight file's name, size and header, and the first and last 4 KiB of each
        tensor's data. A few MB are read whatever the size. Fine-tunes of one model differ; weights altered
        only in the middle of tensors do not.
        """
        digest = hashlib.sha256()

        def add(data: bytes) -> None:  # with its length, so that no two sequences of parts run together alike
            digest.update(len(data).to_bytes(8, "little"))
            digest.update(data)

        add(json.dumps(self.config, sort_keys=True, separators=(",", ":")).encode())
        for path in self.files:
            add(path.relative_to(self.directory).as_posix().encode())
            add(str(path.stat().st_size).encode())
            add(header_bytes(path))
            with open(path, "rb", buffering=0) as file:
                for info in (info for info in self.tensors.values() if info.file == path):
                    head = min(info.nbytes, _SAMPLE)
                    tail = min(info.nbytes - head, _SAMPLE)
                    add(os.pread(file.fileno(), head, info.offset))
                    add(os.pread(file.fileno(), tail, info.offset + info.nbytes - tail))
        return digest.hexdigest()

    def close(self) -> None:
        """Let go of the mapped files. Each is unmapped once no tensor from it is left; `read` maps it anew."""
        self._maps.clear()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _info(self, name: str) -> TensorInfo:
        try:
            return self.tensors[name]
        except KeyError:
            raise CheckpointError(f"{self.directory}: no tensor {name!r} among its {len(self.tensors)}") from None

    def _map(self, path: Path) -> mmap.mmap:
        if path not in self._maps:
            _check_present(path)
            with open(path, "rb") as file:
                # Private and writable, because torch cannot mark a tensor read-only: a write into one becomes a copy
                # of the page instead of a crash. Not reserved: a private mapping would count as memory in use.
                flags, protection = mmap.MAP_PRIVATE | _NORESERVE, mmap.PROT_READ | mmap.PROT_WRITE
                self._maps[path] = mmap.mmap(file.fileno(), 0, flags=flags, prot=protection)
        return self._maps[path]


def _read_config(directory: Path) -> dict[str, Any]:
    path = directory / CONFIG
    if not path.is_file():
        if os.path.lexists(directory / ADAPTER):
            raise CheckpointError(
                f"{directory} is a PEFT adapter, not a checkpoint; merge it into its base model and save that first"
            )
        raise CheckpointError(f"{directory} is not a checkpoint: it has no {CONFIG}")
    config = read_object(path, CheckpointError)
    if not isinstance(config.get("model_type"), str):
        raise CheckpointError(f"{path}: no model_type, so this is not a transformers checkpoint")
    weights_name = config.get("transformers_weights")
    if weights_name not in (None, SINGLE, INDEX):
        raise CheckpointError(
            f"{path}: transformers_weights names other weights than {SINGLE} or {INDEX}, {weights_name!r}, which "
            "transformers alone would load: rename the file, and remove the key"
        )
    return config


def _refuse_adapter(directory: Path) -> None:
    """transformers puts an adapter beside the weights into the model it loads; whoever reads the weights does not."""
    path = directory / ADAPTER
    if os.path.lexists(path):
        raise CheckpointError(
            f"{path}: a PEFT adapter is beside the checkpoint, and its weights are not the adapted model's: merge it "
            "(merge_and_unload) and save that, or remove the adapter's files"
        )


def _read_weights(directory: Path, remote: RemoteWeights | None) -> tuple[list[Path], dict[str, TensorInfo]]:
    """The weight files and their tensors. Raises CheckpointError for a single file and an index of other files, of
    which transformers would take the single file without a word."""
    single = directory / SINGLE
    weight_map = _read_index(directory / INDEX) if os.path.lexists(directory / INDEX) else {}
    files = [directory / name for name in dict.fromkeys(weight_map.values())]
    # What is all in the cache is read there, whether or not the hub can be reached.
    complete = bool(files) and all(map(os.path.lexists, files))
    others = [path for path in files if path != single]
    if os.path.lexists(single) or (remote is not None and not complete and single in remote.sizes):
        if others:
            more = f" and {len(others) - 1} more" if len(others) > 1 else ""
            raise CheckpointError(
                f"{directory} has two sets of weights, {SINGLE} and those of {INDEX} ({others[0].name}{more}): remove "
                f"{SINGLE} where the index is the model's, else the index and its files"
            )
        if not files:
            return [single], _header(single, remote)
    tensors: dict[str, TensorInfo] = {}
    for path in files:
        for name, info in _header(path, remote, f", which {INDEX} names").items():
            listed = weight_map.get(name)
            if listed is None or directory / listed != path:
                where = f"as in {listed}" if listed else "not at all"
                raise CheckpointError(
                    f"{path} holds {name}, which {INDEX} lists {where}; the index is of other weights"
                )
            tensors[name] = info
    missing = [name for name in weight_map if name not in tensors]
    if missing:
        more = f" (and {len(missing) - 1} more)" if len(missing) > 1 else ""
        raise CheckpointError(
            f"{directory / INDEX} lists {missing[0]}{more}, which {weight_map[missing[0]]} does not hold; "
            "the index is of other weights"
        )
    return files, tensors


def _read_index(path: Path) -> dict[str, str]:
    weight_map = read_object(path, CheckpointError).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{path}: no weight_map (tensor name -> file)")
    for name, file in weight_map.items():
        if not isinstance(file, str) or not file.endswith(".safetensors"):
            raise CheckpointError(f"{path}: {name} is in {file!r}, which is not a .safetensors file")
        if "\\" in file or ".." in (parts := PurePosixPath(file)).parts or parts.is_absolute():
            raise CheckpointError(
                f"{path}: {name} is in {file!r}, a path outside the directory; such an index is refused"
            )
    return {name: str(PurePosixPath(file)) for name, file in weight_map.items()}


def _header(path: Path, remote: RemoteWeights | None, named_by: str = "") -> dict[str, TensorInfo]:
    if remote is not None and not os.path.lexists(path) and path in remote.sizes:
        return remote.read_header(path)
    _check_present(path, named_by)
    return read_header(path)


def _check_present(path: Path, named_by: str = "") -> None:
    if not path.is_file():
        state = "is a link to a file that is gone" if path.is_symlink() else "is missing"
        raise CheckpointError(f"{path}{named_by}, {state}; download or copy it again")


def _no_weights(directory: Path) -> CheckpointError:
    names = sorted(path.name for path in directory.iterdir())
    pickles = [name for name in names if name.endswith(PICKLES)]
    others = [name for name in names if name.endswith(WEIGHTS)]
    if pickles:
        return CheckpointError(
            f"{directory} has pickle weights only ({pickles[0]}), which are refused because loading a pickle can "
            "run any code in it; convert them once, where you trust them, with "
            "save_pretrained(..., safe_serialization=True)"
        )
    other_files = f"; found {', '.join(others[:3])}" if others else ""
    return CheckpointError(f"{directory} has no weights: neither {SINGLE} nor {INDEX}{other_files}")
