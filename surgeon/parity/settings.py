"""Whether two forms of a model are set alike: what few prompts of few tokens do not show."""

import json
from collections.abc import Mapping
from typing import Any

from surgeon.inputs import Inputs
from surgeon.memory.patched import RECORD
from surgeon.parity.added_tokens import tokens_added
from surgeon.positions import record_of

_NOT_COMPUTED = {
    RECORD,
    "model_type",
    "architectures",
    "auto_map",
    "dtype",
    "torch_dtype",
    "transformers_version",
    "quantization_config",
    "use_cache",
    "bos_token_id",
    "eos_token_id",
    "pad_token_id",
}
"""Keys of a config that say nothing of what its model computes. Which tokens end an answer is compared on its own."""
_NOT_OF_GENERATION = {"_from_model_config", "transformers_version", "bos_token_id", "eos_token_id", "pad_token_id"}
_NAMES = {"processor_class", "auto_map", "image_processor_type"}


def compare_settings(reference: Inputs, candidate: Inputs) -> list[str]:
    """What sets the forms apart, in words: values of their configs (a sliding window or a base of the rotary embedding
    that no short prompt reaches), tokenizers, chat templates, image processors, generation settings. Tokens that the
    candidate's record says were added, and the rows for them, do not."""
    added = tokens_added(*(record_of(inputs.config) for inputs in (reference, candidate)))
    uncounted = {"vocab_size"} if added else set()
    failures = [
        f"config.json: {name} is {_short(a)} in the reference and {_short(b)} in the candidate"
        for name, a, b in differences(_without(_config(reference), uncounted), _without(_config(candidate), uncounted))
    ]
    failures += [
        f"image processor: {name} is {_short(a)} in the reference and {_short(b)} in the candidate"
        for name, a, b in differences(_images(reference), _images(candidate))
    ]
    failures += [
        f"generation_config.json: {name} is {_short(a)} in the reference and {_short(b)} in the candidate"
        for name, a, b in differences(
            *(_without(i.generation_config, _NOT_OF_GENERATION) for i in (reference, candidate))
        )
    ]
    if _tokenizer(reference) != _tokenizer(candidate, added):
        failures.append("the tokenizers are not the same: other tokens, merges or added tokens")
    if reference.template().rstrip() != candidate.template().rstrip():
        failures.append("the chat templates are not the same")
    a, b = sorted(reference.eos_token_ids), sorted(candidate.eos_token_ids)
    if a != b:
        failures.append(f"answers end with the tokens {a} in the reference and {b} in the candidate")
    return failures


def differences(a: Any, b: Any, name: str = "") -> list[tuple[str, Any, Any]]:
    """Where two trees of dicts differ: the keys' path, and the value in each; None stands for a key that is missing."""
    if isinstance(a, dict) and isinstance(b, dict):
        keys = [*a, *(key for key in b if key not in a)]
        inner = ((f"{name}.{key}" if name else str(key), a.get(key), b.get(key)) for key in keys)
        return [difference for path, x, y in inner for difference in differences(x, y, path)]
    return [] if a == b else [(name, a, b)]


def _without(values: Any, names: set[str]) -> Any:
    if isinstance(values, dict):
        return {key: _without(value, names) for key, value in values.items() if key not in names}
    return values


def _config(inputs: Inputs) -> Any:
    # the model_type of each part says which model it is, the whole one's whether it is patched
    parts = _without(inputs.config.to_dict(), _NOT_COMPUTED - {"model_type"})
    return {**parts, "model_type": None}


def _images(inputs: Inputs) -> Any:
    return json.loads(json.dumps(_without(inputs.image_processor.to_dict(), _NAMES), default=str))


def _tokenizer(inputs: Inputs, added: Mapping[str, int] | None = None) -> Any:
    """What a text becomes by. `added`: tokens to leave out, which have to be special ones of these ids."""
    tokenizer, left_out = inputs.tokenizer, dict(added or {})
    special = tokenizer.special_tokens_map
    if not tokenizer.is_fast:
        vocabulary = tokenizer.get_vocab()
        return {token: number for token, number in vocabulary.items() if left_out.get(token) != number}, special
    backend = json.loads(tokenizer.backend_tokenizer.to_str())
    backend["added_tokens"] = [
        entry
        for entry in backend["added_tokens"]
        if not (entry["special"] and left_out.get(entry["content"]) == entry["id"])
    ]
    # padding and truncation: what the last call set, and no part of what a text becomes
    return {key: value for key, value in backend.items() if key not in ("padding", "truncation")}, special


def _short(value: Any) -> str:
    return f"{value!r:.60}"
