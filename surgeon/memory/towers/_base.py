"""What VisMem's short former asks of a family's vision tower."""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from torch import Tensor, nn

ImageInputs = Mapping[str, Tensor]
"""What of a call belongs to one image, under the model's own keywords: views of the call's tensors, not copies."""


class Tower(ABC):
    """One family's vision tower over a sequence: the patches of one request's images, and vectors behind them that are
    no patches and see all of them.

    It has no state and no parameters; `base_model` is the transformers model without its head (Qwen3VLModel, ...),
    whose modules it runs. An image is seen as a whole: of a family that cuts tiles, its thumbnail, or the single tile.
    Several images are one sequence, one behind the other.
    """

    kind: ClassVar[str] = "tower"
    blocks: ClassVar[str]
    """The path of the list of its blocks, from the base model."""
    targets: ClassVar[tuple[str, ...]]
    """The linear layers of a block's attention, which are adapted unless others are asked for."""

    @staticmethod
    @abstractmethod
    def width(config: Any) -> int:
        """d_v, of the vectors behind the patches. `config`: the model's."""

    @staticmethod
    @abstractmethod
    def depth(config: Any) -> int:
        """How many of its blocks, from the first on, the visual embeddings come from."""

    @staticmethod
    @abstractmethod
    def slots_per_vector(config: Any) -> int:
        """How many vectors in a row become one visual embedding: as many as patches do."""

    @classmethod
    @abstractmethod
    def images_by_row(
        cls, base_model: Any, kwargs: Mapping[str, Any], visual_token_mask: Tensor
    ) -> list[list[ImageInputs]]:
        """For each row of a batch its images, in their order; none for a row without. `kwargs`: of a call of the model,
        with pixel values; visual_token_mask bool [B, S]."""

    @classmethod
    @abstractmethod
    def encode(
        cls, base_model: Any, blocks: Sequence[nn.Module], images: Sequence[ImageInputs], behind: Tensor
    ) -> Tensor:
        """images: of one request, at least one; behind [n, d_v], which gets no position -> [n, d_v], as they come out
        of the last of `blocks`. These are the first `depth` of the tower's own, or views of them with adapters."""

    @classmethod
    @abstractmethod
    def project(cls, base_model: Any, slots: Tensor) -> Tensor:
        """slots [N * slots_per_vector, d_v], out of the blocks -> visual embeddings [N, d], by the tower's last norm,
        its merger and the projector."""
