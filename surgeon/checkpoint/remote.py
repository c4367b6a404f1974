"""Weight files that stay on the Hugging Face Hub: of each the header is read, and no weight."""

from functools import cached_property
from pathlib import Path

from huggingface_hub import HfApi, errors

from surgeon.checkpoint.headers import TensorInfo, tensor_infos
from surgeon.checkpoint.hub import explain
from surgeon.errors import CheckpointError


class RemoteWeights:
    """The weight files of one snapshot of a model.

    Files have the paths that they would have in the snapshot's directory, which is named by the commit.
    """

    def __init__(self, repo: str, snapshot: Path) -> None:
        self.repo = repo
        self.snapshot = snapshot

    @cached_property
    def sizes(self) -> dict[Path, int]:
        """Every safetensors file of the top directory, and its bytes. Raises CheckpointError where the hub does not
        answer."""
        with explain(self.repo):
            model = HfApi().model_info(self.repo, revision=self.snapshot.name, files_metadata=True)
        files = {file.rfilename: file.size for file in model.siblings or []}
        return {
            self.snapshot / name: size
            for name, size in files.items()
            if size is not None and name.endswith(".safetensors") and "/" not in name
        }

    def read_header(self, path: Path) -> dict[str, TensorInfo]:
        """As `headers.read_header`, of a file that `sizes` has. Offsets are those in the file."""
        name, size = path.relative_to(self.snapshot).as_posix(), self.sizes[path]
        try:
            with explain(self.repo):
                tensors = HfApi().parse_safetensors_file_metadata(self.repo, name, revision=self.snapshot.name).tensors
        except (errors.SafetensorsParsingError, errors.NotASafetensorsRepoError) as error:
            raise CheckpointError(f"{self.repo}: {name} on the hub is not safetensors, or is corrupt") from error
        entries = {
            key: {"dtype": info.dtype, "shape": list(info.shape), "data_offsets": list(info.data_offsets)}
            for key, info in tensors.items()
        }
        # The data is what follows the header, whose length the hub's client keeps to itself.
        data = max((info.data_offsets[1] for info in tensors.values()), default=0)
        return tensor_infos(path, entries, size - data, size)
