"""Checkpoints on disk: read lazily, shared without copying, written whole or not at all."""

from surgeon.checkpoint.headers import SAFETENSORS_DTYPES, TORCH_DTYPES, TensorInfo, read_header, read_metadata
from surgeon.checkpoint.links import check_link
from surgeon.checkpoint.publish import check_target, staged, staged_file
from surgeon.checkpoint.reader import Checkpoint
from surgeon.checkpoint.share import Shared, share_file
from surgeon.checkpoint.unchanged import SourceFiles
from surgeon.checkpoint.writer import PlannedTensor, write_safetensors

__all__ = [
    "SAFETENSORS_DTYPES",
    "TORCH_DTYPES",
    "Checkpoint",
    "PlannedTensor",
    "Shared",
    "SourceFiles",
    "TensorInfo",
    "check_link",
    "check_target",
    "read_header",
    "read_metadata",
    "share_file",
    "staged",
    "staged_file",
    "write_safetensors",
]
