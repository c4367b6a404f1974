"""Give the tiles of an image the positions of the thumbnail patches that they cover."""

from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field, model_validator

from surgeon.errors import FamilyError
from surgeon.pipeline import Pass, PassOptions, PassResult, PostconditionError, PreconditionError, make_pass

if TYPE_CHECKING:
    from surgeon.graph import LvlmGraph


class RopeDhrOptions(PassOptions):
    tile_order: Literal["row", "column"] = Field(
        default="row",
        description="row: each tile has the ids of what it shows; column: as CoMemo was trained",
    )
    min_tiles: int | None = Field(default=None, gt=0, description="least tiles of an image; by default as it is")
    max_tiles: int | None = Field(default=None, gt=0, description="most tiles of an image; by default as it is")

    @model_validator(mode="after")
    def _ordered(self) -> "RopeDhrOptions":
        if self.min_tiles and self.max_tiles and self.min_tiles > self.max_tiles:
            raise ValueError(f"min_tiles={self.min_tiles} is more than max_tiles={self.max_tiles}")
        return self


class RopeDhrPass(Pass):
    """Source: "CoMemo: LVLMs Need Image Context with Image Memory", section 3.3.

    It changes positions, not parameters: prompts without images, and with images of one tile, give bit for bit the
    source's logits.
    """

    name = "rope-dhr"
    summary = "tiles take the position ids of the thumbnail patches they cover"
    Options = RopeDhrOptions
    identity = False
    options: RopeDhrOptions

    def requires(self, graph: "LvlmGraph") -> None:
        family = graph.family
        if graph.record.get("positions"):
            raise PreconditionError("pass rope-dhr is already applied; patch the unpatched checkpoint")
        if any(family.rope_axes(graph.config)):
            raise PreconditionError(
                f"pass rope-dhr: the positions of family {family.model_type} already have two dimensions for images; "
                "leave the pass out"
            )
        if family.tile_layout(graph.config) is None:
            raise PreconditionError(
                f"pass rope-dhr: family {family.model_type} does not cut images into tiles beside a thumbnail, so "
                "there are no ids to share; leave the pass out"
            )
        try:
            family.tile_limits(self.options.min_tiles, self.options.max_tiles)
        except FamilyError as error:
            raise PreconditionError(f"pass rope-dhr: {error}") from error

    def resolved(self, graph: "LvlmGraph") -> dict[str, Any]:
        return self.options.model_dump(mode="json", exclude_none=True)

    def rewrite(self, graph: "LvlmGraph") -> PassResult:
        graph.lay_out_tiles(positions={"scheme": "rope_dhr", "tile_order": self.options.tile_order})
        graph.image_processor |= graph.family.tile_limits(self.options.min_tiles, self.options.max_tiles)
        return PassResult(modified=True, touched=[])

    def ensures(self, graph: "LvlmGraph", result: PassResult) -> None:
        from surgeon.memory.rope_dhr import tile_position_ids

        side = graph.record["layout"]["side"]
        ids = tile_position_ids(2, 2, side, self.options.tile_order)
        if ids.min() < 0 or ids.max() >= side * side:
            raise PostconditionError("pass rope-dhr gives tiles ids that no patch of the thumbnail has")


PASS = RopeDhrPass


def RopeDHR(
    tile_order: Literal["row", "column"] = "row", *, min_tiles: int | None = None, max_tiles: int | None = None
) -> RopeDhrPass:
    """The pass `rope-dhr`, for `surgeon.graft`; options as `surgeon passes` lists them. Raises OptionError."""
    options = {"tile_order": tile_order, "min_tiles": min_tiles, "max_tiles": max_tiles}
    return make_pass({RopeDhrPass.name: RopeDhrPass}, RopeDhrPass.name, options)  # type: ignore[return-value]
