"""What the rest of the tool may ask of a backbone family. Each family is one file beside this, named by model_type."""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import numpy as np
import torch
from PIL import Image
from torch import nn
from transformers import PretrainedConfig, PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_MAPPING_NAMES

from surgeon.errors import CheckpointError, FamilyError, InputError
from surgeon.memory.short_former import ShortFormer
from surgeon.memory.towers._base import Tower
from surgeon.sizes import Sizes, TextSizes, VisionSizes, check, one_line

Grid = tuple[int, int, int]
"""One image's grid: frames, rows, columns. Of patches before merging; of tiles where the family cuts tiles; where
neither says enough, of what the family documents."""


@dataclass(frozen=True)
class TileLayout:
    """How a family that cuts an image into tiles lays them out in the decoder: `side` * `side` visual tokens for each
    tile, row by row, and as many for the thumbnail, which is there unless the image is a single tile."""

    side: int
    thumbnail: Literal["first", "last"]
    """Where the thumbnail stands among its image's visual tokens."""

    def tiles(self, grid: Grid) -> int:
        """How many tiles an image of this grid has, thumbnail included."""
        _, rows, columns = grid
        return rows * columns + (rows * columns > 1)


@dataclass(frozen=True)
class VisionExport:
    """A vision tower written out for export.

    `module(**example)` returns a tuple of tensors named by `output_names`: `features [M, d]`, where the family has
    DeepStack `deepstack [K, M, d]`, and where it has indicator tokens `indicators [K, d]`. `dynamic_shapes` is what
    `torch.export.export` takes for the keywords.
    """

    module: nn.Module
    example: dict[str, torch.Tensor]
    dynamic_shapes: dict[str, dict[int, Any] | None]
    output_names: tuple[str, ...]
    constants: dict[str, torch.Tensor]
    """Values of the module's buffers that no checkpoint holds (rotary frequencies), by buffer name, on the CPU."""
    parameters: dict[str, str]
    """The module's parameter names -> the model's own (`model.visual....`), where the weights are found."""


class Family(ABC):
    """Where things are in one family of vision-language models, and what its inputs look like.

    Module paths are those of the transformers class. Everything works on a config and on a model without weights.
    """

    model_type: ClassVar[str]
    """The `model_type` of its config.json; also the name of its file."""
    model_class: ClassVar[str]
    """Name of the transformers class for image-text-to-text."""
    config_class: ClassVar[str]
    video_processor_class: ClassVar[str | None] = None
    """Its video processor's class, where that is not named after the image processor's."""
    vision_tower: ClassVar[str] = "model.visual"
    projector: ClassVar[str] = "model.visual.merger"
    text_model: ClassVar[str] = "model.language_model"
    """The decoder: the module with `embed_tokens`, `layers`, `norm` and `rotary_emb`."""
    lm_head: ClassVar[str] = "lm_head"
    visual_token_keys: ClassVar[tuple[str, ...]] = ("image_token_id",)
    """The config keys that hold the ids of tokens whose embedding is replaced by a visual one."""
    norm_placement: ClassVar[str]
    """Where the norms of a decoder layer stand, one of `NORM_PLACEMENTS` of `surgeon/memory/decoder_layer.py`. Each
    family says so, and a model whose layers have other parts is refused."""
    tower: ClassVar[type[Tower] | None] = None
    """How its vision tower runs over vectors behind an image's patches, as VisMem's short former has it; None for a
    family that has no short former."""
    token_types: ClassVar[bool] = False
    """Whether the model takes `mm_token_type_ids` (1 at image tokens) beside the token ids."""
    config_sizes: ClassVar[type[Sizes]] = Sizes
    """What it reads of the config, apart from its two parts."""
    vision_sizes: ClassVar[type[VisionSizes]]
    image_processor_sizes: ClassVar[type[Sizes]] = Sizes
    """What has to hold of the image processor's settings for it to end."""

    @property
    def token_tables(self) -> tuple[str, str]:
        """The parameters with a row for each token: the embeddings, and the head, which may be tied to them."""
        return f"{self.text_model}.embed_tokens.weight", f"{self.lm_head}.weight"

    @property
    def base_model_class(self) -> str:
        """Name of the transformers class without a head, which `AutoModel` gives."""
        return str(MODEL_MAPPING_NAMES[self.model_type])

    # -- config ------------------------------------------------------------------------------------------------
    def text_config(self, config: PretrainedConfig) -> Any:
        return config.text_config

    def vision_config(self, config: PretrainedConfig) -> Any:
        return config.vision_config

    def check_sizes(self, config: PretrainedConfig) -> None:
        """Raises CheckpointError, with the key, for values in a config from outside that no such model can have."""
        check(self.config_sizes, config)
        check(TextSizes, self.text_config(config), "text_config")
        check(self.vision_sizes, self.vision_config(config), "vision_config")

    def check_image_processor(self, config: PretrainedConfig, image_processor: Any) -> None:
        """Raises CheckpointError for an image processor that is not set for this family, or that nothing can pass."""
        check(self.image_processor_sizes, image_processor, file="preprocessor_config.json")

    def head_dim(self, config: PretrainedConfig) -> int:
        text = self.text_config(config)
        return int(getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads)

    def image_token_id(self, config: PretrainedConfig) -> int:
        return int(config.image_token_id)

    def visual_token_ids(self, config: PretrainedConfig) -> tuple[int, ...]:
        """Every token id whose embedding is replaced by a visual one: images, and videos where it has them."""
        return tuple(int(getattr(config, key)) for key in self.visual_token_keys)

    def indicator_token_ids(self, config: PretrainedConfig) -> tuple[int, ...]:
        """Tokens around an image and between its parts whose embeddings are replaced as well, wherever a prompt has
        images; `vision_export` gives them, in this order. They are no visual tokens: no memory holds them."""
        return ()

    def tile_layout(self, config: PretrainedConfig) -> TileLayout | None:
        """How it lays out an image's tiles; None for a family that does not cut tiles, or not into equal ones."""
        return None

    def deepstack_layers(self, config: PretrainedConfig) -> int:
        """How many of the first decoder layers get a DeepStack feature added to their output; 0 where there is none."""
        return 0

    def tile_limits(self, min_tiles: int | None, max_tiles: int | None) -> Mapping[str, int]:
        """The image processor's settings that make it cut an image into no fewer and no more tiles; None: as it is.

        Raises FamilyError where it has none for a limit that is asked for.
        """
        if min_tiles is None and max_tiles is None:
            return {}
        raise FamilyError(f"the image processor of family {self.model_type} has no limits of tiles to set")

    def most_tiles(self, image_processor: Mapping[str, Any]) -> int | None:
        """Most tiles that an image processor of these settings (preprocessor_config.json) makes of one image, the
        thumbnail included; None where the family cuts no tiles or the settings do not say. Raises CheckpointError."""
        return None

    # -- decoder positions -------------------------------------------------------------------------------------
    @abstractmethod
    def rope_axes(self, config: PretrainedConfig) -> Sequence[int]:
        """For each of the head_dim / 2 rotary frequencies, which axis of `position_ids [A, B, S]` it turns with."""

    @abstractmethod
    def position_ids(
        self,
        config: PretrainedConfig,
        input_ids: np.ndarray,
        attention_mask: np.ndarray,
        grids: Sequence[Sequence[Grid]],
    ) -> tuple[np.ndarray, np.ndarray]:
        """Positions of a prompt batch: `input_ids`, `attention_mask [B, S]` int64 and each row's image grids ->
        `position_ids [A, B, S]` and `next_position [B]`, the id that the first generated token has on every axis.
        Padded positions have id 0 or 1, whatever transformers gives them."""

    # -- images and prompts ----------------------------------------------------------------------------------
    @abstractmethod
    def image_tokens(self, config: PretrainedConfig, grid: Grid) -> int:
        """How many visual tokens an image of this grid becomes in the decoder."""

    @abstractmethod
    def process_image(
        self, config: PretrainedConfig, image_processor: Any, image: Image.Image, alone: bool = True
    ) -> tuple[np.ndarray, Grid]:
        """One image as the family's transformers processor has its image processor treat it -> pixel values fp32, and
        its grid. `alone`: no other image is in its prompt.

        Raises ValueError or InputError for an image that cannot be used, CheckpointError for an image processor that
        is not the family's.
        """

    def placeholder(self, config: PretrainedConfig, tokenizer: Any) -> str:
        """What the chat template writes where an image is."""
        return token_of(tokenizer, self.image_token_id(config))

    def expand_placeholder(self, config: PretrainedConfig, grid: Grid, tokenizer: Any) -> str:
        """What replaces one image's placeholder in the chat template's text."""
        return token_of(tokenizer, self.image_token_id(config)) * self.image_tokens(config, grid)

    @abstractmethod
    def model_kwargs(
        self, pixel_values: Sequence[Sequence[np.ndarray]], grids: Sequence[Sequence[Grid]]
    ) -> Mapping[str, np.ndarray]:
        """The keywords besides ids and masks that the transformers model takes for a batch's images, of which there
        is at least one: what `process_image` gave, by row and image. Names and shapes are those of the transformers
        processor's output; a row may have no image."""

    # -- vision export -----------------------------------------------------------------------------------------
    def vision_model(self, model: PreTrainedModel, dtype: torch.dtype) -> Any:
        """The vision tower of `model`. Raises ValueError where the model is not of the dtype the graph is to have."""
        tower = model.get_submodule(self.vision_tower)
        tower_dtype = next(tower.parameters()).dtype
        if tower_dtype != dtype:
            raise ValueError(
                f"the vision tower is of {tower_dtype}, the graph is to be {dtype}: make the model in {dtype}"
            )
        return tower

    @abstractmethod
    def vision_export(self, model: PreTrainedModel, dtype: torch.dtype) -> VisionExport:
        """The vision tower and projector of `model` (on the meta device or with weights), for one image a call."""

    @abstractmethod
    def vision_inputs(self, config: PretrainedConfig, pixel_values: np.ndarray, grid: Grid) -> dict[str, np.ndarray]:
        """The graph inputs of `vision_export` for one image, computed on the host from its grid, in numpy."""

    # -- short former export -----------------------------------------------------------------------------------
    def short_former_export(
        self, model: PreTrainedModel, former: ShortFormer, num_queries: int, dtype: torch.dtype
    ) -> VisionExport:
        """The short former of `model`, a module of it, written out over the images of one request: takes `queries
        [1, K, d]` and what `short_former_inputs` gives, and returns `latents [1, N, d]`.

        Raises FamilyError for a family without `tower`, ValueError where model or former are not of `dtype`.
        """
        raise FamilyError(f"family {self.model_type} has no short former")

    def short_former_inputs(
        self, config: PretrainedConfig, images: Sequence[tuple[np.ndarray, Grid]]
    ) -> dict[str, np.ndarray]:
        """The graph inputs of `short_former_export` but the queries, for one request's images, at least one: what
        `process_image` gave of each. Raises FamilyError for a family without `tower`."""
        raise FamilyError(f"family {self.model_type} has no short former")


def token_of(tokenizer: Any, token_id: int) -> str:
    """The text of a token. Raises CheckpointError where the tokenizer has none of this id."""
    token = tokenizer.convert_ids_to_tokens(token_id)
    if token is None:
        raise CheckpointError(
            f"the tokenizer has no token of id {token_id}, which config.json names: they are of different models; copy "
            "both from one"
        )
    return str(token)


def call_image_processor(image_processor: Any, images: Sequence[Any], **settings: Any) -> Any:
    """What transformers' image processor gives for `images`. Raises ValueError for an image that it does not take, and
    CheckpointError where its own settings keep it from working."""
    try:
        return image_processor(images=images, return_tensors="pt", **settings)
    except ValueError:
        raise
    except Exception as error:  # all of it is transformers' own: what is left is how it is set
        raise CheckpointError(
            f"the image processor does not work as preprocessor_config.json sets it: {type(error).__name__}: "
            f"{one_line(error)}; copy that file from where the checkpoint was made"
        ) from error


def check_rows(attention_mask: np.ndarray, grids: Sequence[Sequence[Grid]]) -> None:
    """Raises InputError unless every row of `attention_mask [B, S]` has tokens, and grids of its own."""
    if len(grids) != len(attention_mask):
        raise InputError(f"image grids for {len(grids)} row(s) were given, the batch has {len(attention_mask)}")
    for row, mask in enumerate(attention_mask):
        if not mask.any():
            raise InputError(f"prompt row {row} has no tokens")
