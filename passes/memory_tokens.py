"""Add special tokens to the tokenizer, with rows of their own in the embeddings and the head."""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Annotated, Any

from pydantic import BeforeValidator, Field

from surgeon.errors import CheckpointError
from surgeon.pipeline import Pass, PassOptions, PassResult, PostconditionError, PreconditionError, make_pass

if TYPE_CHECKING:
    from surgeon.graph import LvlmGraph
    from surgeon.new_rows import RowRule

PUBLISHED = ("<ms_I>", "<ms_E>", "<ml_I>", "<ml_E>", "<mem>")
MOST = 1 << 16
_LONGEST = 256
_COPY = "copy:"


def _parse_tokens(value: Any) -> list[str]:
    tokens = value.split(",") if isinstance(value, str) else value
    if not isinstance(tokens, list | tuple) or not all(isinstance(token, str) for token in tokens):
        raise ValueError(f"expected tokens with commas between them (<a>,<b>) or a list of texts, found {value!r:.60}")
    if not any(tokens):
        raise ValueError("names no token: write them with commas between them (<a>,<b>)")
    if len(tokens) > MOST:
        raise ValueError(f"names {len(tokens):,} tokens, and {MOST:,} are the most that can be added at once")
    for token in tokens:
        _check_token(token)
    twice = [token for token, count in Counter(tokens).items() if count > 1]
    if twice:
        raise ValueError(f"names {twice[0]!r} twice")
    return list(tokens)


def _check_token(token: str) -> None:
    def refuse(why: str) -> ValueError:
        return ValueError(f"{token[:60]!r} cannot be a token: {why}")

    if not token.strip():
        raise refuse("it is empty; write what is to stand in the text")
    if token != token.strip():
        raise refuse(f"there is space around it; write {token.strip()!r}")
    if "," in token:
        raise refuse("a comma stands between tokens; name it without")
    if not token.isprintable():
        raise refuse("it has characters that cannot be printed; name it without")
    if len(token) > _LONGEST:
        raise refuse(f"it has {len(token):,} characters, and {_LONGEST} are the most")


def _parse_init(value: Any) -> str:
    if value in ("mean", "separator") or (isinstance(value, str) and value.removeprefix(_COPY) not in ("", value)):
        return str(value)
    raise ValueError(f"expected mean, separator or copy:<a token of the tokenizer>, found {value!r:.60}")


class MemoryTokensOptions(PassOptions):
    tokens: Annotated[list[str], BeforeValidator(_parse_tokens)] = Field(
        default=list(PUBLISHED),
        description="what is added, commas between them; by default VisMem's: invocation and end of its short and long "
        "memory, and the placeholder of latents",
    )
    init: Annotated[str, BeforeValidator(_parse_init)] = Field(
        default="mean",
        description="what new rows start as, but for a little noise: mean (of the rows that tokens have, so that a new "
        "token is never the likeliest), separator (the line break's row, as VisMem was published) or copy:<token>",
    )
    seed: int | None = Field(default=None, ge=0, description="of the noise; by default the recipe's")


class MemoryTokensPass(Pass):
    """Source: "VisMem: Latent Vision Memory Unlocks Potential of Vision-Language Models", whose special tokens it adds.

    The source's rows stay bit for bit what they are, and with them the logits of its tokens. An untied head gets rows
    by the same rule from its own table: a row of the embeddings there would be another direction altogether.
    """

    name = "memory-tokens"
    summary = "special tokens in the tokenizer, with new rows in the embeddings and the head"
    Options = MemoryTokensOptions
    identity = True
    options: MemoryTokensOptions

    def requires(self, graph: "LvlmGraph") -> None:
        vocabulary = graph.vocabulary
        try:
            for token in self.options.tokens:
                known = graph.new_tokens.get(token, vocabulary.token_id(token))
                if known is not None:
                    raise PreconditionError(
                        f"pass {self.name}: the tokenizer has {token!r} already, with the id {known}; leave it out, or "
                        "name another"
                    )
            self._rule(graph)
            self._check_rows(graph)
            self._check_free(graph, self._ids(graph))
        except CheckpointError as error:
            raise PreconditionError(f"pass {self.name}: {error}") from error

    def resolved(self, graph: "LvlmGraph") -> dict[str, Any]:
        seed = graph.seed if self.options.seed is None else self.options.seed
        return {"tokens": list(self.options.tokens), "init": self.options.init, "seed": seed}

    def rewrite(self, graph: "LvlmGraph") -> PassResult:
        tables = graph.add_tokens(self._ids(graph), self._rule(graph), self.resolved(graph)["seed"])
        return PassResult(modified=True, touched=tables)

    def ensures(self, graph: "LvlmGraph", result: PassResult) -> None:
        expected = set(self.options.tokens)
        for name, table in graph.extended_tables().items():
            rows = [each.row for each in table.rows]
            if not expected <= {each.token for each in table.rows} or len(set(rows)) < len(rows):
                raise PostconditionError(f"pass {self.name} was to give each token a row of {name}")
            if table.shape[0] != max(table.source_shape[0], max(rows) + 1):
                raise PostconditionError(f"pass {self.name} left {name} with {table.shape[0]} rows")

    def _ids(self, graph: "LvlmGraph") -> dict[str, int]:
        """Of the tokens of this pass."""
        ids = graph.vocabulary.extended([*graph.new_tokens, *self.options.tokens])
        return {token: ids[token] for token in self.options.tokens}

    def _rule(self, graph: "LvlmGraph") -> "RowRule":
        """Raises PreconditionError where `init` names a text that is not one token."""
        from surgeon.new_rows import CopyOfRow, MeanOfRows

        vocabulary, init = graph.vocabulary, self.options.init
        if init == "mean":
            return MeanOfRows(vocabulary.spans())
        texts = ("\n", ".") if init == "separator" else (init.removeprefix(_COPY),)
        row = next((row for row in map(vocabulary.token_id, texts) if row is not None), None)
        if row is None:
            raise PreconditionError(
                f"pass {self.name}: init={init}, and for this tokenizer {' and '.join(map(repr, texts))} is not one "
                "token: write init=copy:<one of its tokens>, or init=mean"
            )
        return CopyOfRow(row)

    def _check_rows(self, graph: "LvlmGraph") -> None:
        """Raises PreconditionError for a tokenizer of more ids than the model has rows."""
        last = max(graph.vocabulary.ids.values())
        for name in graph.family.token_tables:
            rows = graph.model.state_dict()[name].shape[0]
            if last >= rows:
                raise PreconditionError(
                    f"pass {self.name}: the tokenizer has ids up to {last}, and {name} has {rows} rows: they are of "
                    "different models; copy the tokenizer's files from the model's source"
                )

    def _check_free(self, graph: "LvlmGraph", ids: Mapping[str, int]) -> None:
        """Raises PreconditionError where an id that a token would get has a meaning already."""
        from surgeon.memory.patched import RECORD

        values = {key: value for key, value in graph.config.to_dict().items() if key != RECORD}
        named = _named_ids(values, "config.json")
        named += _named_ids(graph.vocabulary.generation_config, "generation_config.json")
        named += [(token_id, f"the token {token!r} that config.json records") for token, token_id in self._known(graph)]
        meanings = dict(named)
        for token, token_id in ids.items():
            if token_id in meanings:
                raise PreconditionError(
                    f"pass {self.name}: {token!r} would get the id {token_id}, which is {meanings[token_id]}, a token "
                    "that the tokenizer lacks: copy the tokenizer's files from the model's source"
                )

    @staticmethod
    def _known(graph: "LvlmGraph") -> Iterable[tuple[str, int]]:
        tokens: dict[str, int] = graph.record.get("tokens", {})
        return [(token, token_id) for token, token_id in tokens.items() if token not in graph.new_tokens]


def _named_ids(values: Mapping[str, Any], where: str) -> list[tuple[int, str]]:
    """Every token id that a config names, and what it is called there; parts of it included."""
    named: list[tuple[int, str]] = []
    for key, value in values.items():
        if isinstance(value, Mapping):
            named += _named_ids(value, f"{where}'s {key}" if where.endswith(".json") else f"{where}.{key}")
        elif "token" in str(key) and any(part in str(key) for part in ("_id", "_index")):
            ids = value if isinstance(value, list | tuple) else [value]
            named += [(each, f"{key} of {where}") for each in ids if isinstance(each, int)]
    return named


PASS = MemoryTokensPass


def MemoryTokens(tokens: Sequence[str] = PUBLISHED, *, init: str = "mean", seed: int | None = None) -> MemoryTokensPass:
    """The pass `memory-tokens`, for `surgeon.patch.patch`; options as `surgeon passes` lists them. It changes the
    tokenizer, so that `surgeon.graft` refuses it for a model in memory. Raises OptionError."""
    options = {"tokens": tokens if isinstance(tokens, str) else list(tokens), "init": init, "seed": seed}
    return make_pass({MemoryTokensPass.name: MemoryTokensPass}, MemoryTokensPass.name, options)  # type: ignore[return-value]
