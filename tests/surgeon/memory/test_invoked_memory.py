"""What is done to a request's cache is done to what it remembers for its memories; models copied and saved."""

import copy
import os
import pickle
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from checkpoints import FAMILIES, has_tokenizer
from surgeon.memory.invoked_memory import InvokedMemory
from vismem_models import SEEING, TWO, WINDOW, WORDS, VisMemPair, decoded, extended, positions_of, span, step_kwargs

pytestmark = pytest.mark.skipif(not has_tokenizer(), reason="needs the demo checkpoint's tokenizer")
PROMPTS = (SEEING, WORDS, TWO)


@pytest.fixture(scope="module")
def pair(vismem_pair: Callable[..., VisMemPair]) -> VisMemPair:
    return vismem_pair("qwen3_vl")


def said(pair: VisMemPair) -> list[list[int]]:
    """What each row has said so far, within an invocation, behind one, and with none."""
    short, long = span(pair.tokens, "short"), span(pair.tokens, "long")
    return [[7, 8, *short, 9, 10, 11, 12], [7, 8, 9, 10, *long], [13, 14, 15, *long[:-1], 0][:10] + long[-1:]]


def following(pair: VisMemPair) -> list[list[int]]:
    short, long = span(pair.tokens, "short"), span(pair.tokens, "long")
    return [[20, *long, *short, 21], [20, 21, 22, *long, 23, 24, 25, 26], [20, *short, *long, 21]]


def batch_of(pair: VisMemPair, rows: list[int]) -> dict[str, Any]:
    """The whole conversation of these rows."""
    kwargs = pair.kwargs(*(PROMPTS[row] for row in rows))
    whole = extended(kwargs, [said(pair)[row] for row in rows])
    return extended(whole, [following(pair)[row] for row in rows])


def filled(pair: VisMemPair, rows: list[int]) -> tuple[dict[str, Any], int, Any]:
    """The whole of these rows, how many columns are in the cache, and the cache."""
    whole = batch_of(pair, rows)
    length = whole["input_ids"].shape[1] - len(following(pair)[0])
    first = {name: value for name, value in whole.items()}
    for name in ("input_ids", "attention_mask", "mm_token_type_ids"):
        first[name] = whole[name][:, :length]
    prompt = length - len(said(pair)[0])
    return whole, length, decoded(pair.model, first, prompt)[1]


@torch.no_grad()
def continued(pair: VisMemPair, whole: dict[str, Any], rows: list[int], cache: Any, length: int) -> Tensor:
    """The logits of what follows, one token a call. `rows`: of `whole`."""
    positions = positions_of(pair.model, whole)[..., rows, :]
    chosen = {name: whole[name][rows] for name in ("input_ids", "attention_mask", "mm_token_type_ids")}
    logits = []
    for column in range(length, whole["input_ids"].shape[1]):
        step = step_kwargs(chosen, positions, slice(column, column + 1))
        logits.append(pair.model(**step, past_key_values=cache, use_cache=True).logits)
    return torch.cat(logits, 1)


@pytest.fixture(scope="module")
def expected(pair: VisMemPair) -> Tensor:
    """Of all rows, as they are."""
    whole, length, cache = filled(pair, [0, 1, 2])
    return continued(pair, whole, [0, 1, 2], cache, length)


def assert_equal(tensor: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(tensor, expected, atol=1e-9, rtol=0)


@pytest.mark.parametrize(
    ("change", "rows"),
    [
        (lambda cache: cache.batch_select_indices(torch.tensor([2, 0])), [2, 0]),
        (lambda cache: cache.batch_select_indices(torch.tensor([True, False, True])), [0, 2]),
        (lambda cache: cache.reorder_cache(torch.tensor([1, 1, 0])), [1, 1, 0]),
        (lambda cache: cache.batch_repeat_interleave(2), [0, 0, 1, 1, 2, 2]),
    ],
    ids=["selected", "selected by a mask", "reordered", "repeated"],
)
def test_rows_go_on_with_their_own(pair: VisMemPair, expected: Tensor, change: Any, rows: list[int]) -> None:
    whole, length, cache = filled(pair, [0, 1, 2])
    change(cache)
    assert_equal(continued(pair, whole, rows, cache, length), expected[rows])


def test_a_copy_goes_on_by_itself(pair: VisMemPair, expected: Tensor) -> None:
    whole, length, cache = filled(pair, [0, 1, 2])
    copied = copy.deepcopy(cache)
    assert_equal(continued(pair, whole, [0, 1, 2], cache, length), expected)
    memory = InvokedMemory.of(copied)
    assert memory is not None and memory.length == length
    assert_equal(continued(pair, whole, [0, 1, 2], copied, length), expected)


def test_after_a_reset_it_is_a_new_request(pair: VisMemPair) -> None:
    whole, _, cache = filled(pair, [0, 1, 2])
    cache.reset()
    alone = {name: value[1:2, -14:] for name, value in whole.items() if name in ("input_ids", "attention_mask")}
    with torch.no_grad():
        again = pair.model(**alone, past_key_values=cache, use_cache=True)
        new = pair.model(**alone, use_cache=True)
    assert_equal(again.logits, new.logits)
    memory = InvokedMemory.of(cache)
    assert memory is not None and memory.length == 14 and len(memory.invocations) == 1


@pytest.mark.parametrize("removed", [1, 3, 8, 11, 12])
def test_what_is_cropped_is_fed_again(pair: VisMemPair, expected: Tensor, removed: int) -> None:
    """To behind an invocation, into one, and to before it."""
    whole, length, cache = filled(pair, [0, 1, 2])
    memory = InvokedMemory.of(cache)
    assert memory is not None
    before = [len(own) for own in memory.invocations]
    cache.crop(-removed)
    assert memory.length == length - removed
    left = [
        sum(token in pair.tokens.invoke.values() for token in row[: max(0, len(row) - removed)]) for row in said(pair)
    ]
    assert [len(own) for own in memory.invocations] == left and (removed < 8 or left != before)
    if removed < 8:
        again = continued(pair, whole, [0, 1, 2], cache, length - removed)
        assert_equal(again[:, removed:], expected)


def test_cropped_all_the_way(pair: VisMemPair, expected: Tensor) -> None:
    whole, length, cache = filled(pair, [0, 1, 2])
    prompt = length - len(said(pair)[0])
    cache.crop(prompt - length)
    assert_equal(continued(pair, whole, [0, 1, 2], cache, prompt)[:, length - prompt :], expected)


def test_cropped_to_within_the_window_after_many_steps(pair: VisMemPair) -> None:
    """Tokens are kept in pieces that are joined from time to time; what was left of the window stays exact."""
    answer = [*(11 + n % 60 for n in range(2 * WINDOW + 5)), *span(pair.tokens, "long")]
    whole = extended(pair.kwargs(WORDS), [answer])
    prompt = whole["input_ids"].shape[1] - len(answer)
    expected, cache = decoded(pair.model, whole, prompt)
    memory = InvokedMemory.of(cache)
    assert memory is not None
    (latents,) = (each.latents for each in memory.invocations[0])
    cache.crop(-7)
    assert not memory.invocations[0]
    start = whole["input_ids"].shape[1] - 7
    again = continued(pair, whole, [0], cache, start)
    assert_equal(again, expected[:, start:])
    assert_equal(memory.invocations[0][0].latents, latents)
    assert sum(piece.shape[1] for piece in memory.recent) <= WINDOW + 64


def test_models_are_pickled_and_copied(pair: VisMemPair) -> None:
    kwargs = extended(pair.kwargs(SEEING), [said(pair)[0]])
    with torch.no_grad():
        logits = pair.model(**kwargs).logits
        for copied in (pickle.loads(pickle.dumps(pair.model)), copy.deepcopy(pair.model)):
            assert type(copied.model) is type(pair.model.model)
            assert torch.equal(copied(**kwargs).logits, logits)


LOAD = """
import sys, torch


class Hidden:
    # This tool is not installed here, whatever is in site-packages.

    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("surgeon", "passes", "exporters", "commands", "cli"):
            raise ImportError(f"{name} is hidden")


sys.meta_path.insert(0, Hidden())
from transformers import AutoModel, AutoModelForImageTextToText


def equal(logits, expected):
    return torch.allclose(logits, expected, atol=1e-9, rtol=0)


for path in sys.argv[1:]:
    kwargs = torch.load(f"{path}.pt")
    expected, ids = kwargs.pop("expected"), kwargs.pop("generated")
    model = AutoModelForImageTextToText.from_pretrained(path, trust_remote_code=True, dtype=torch.float64).eval()
    with torch.no_grad():
        assert equal(model(**kwargs).logits, expected), path
        again = model.generate(**kwargs, max_new_tokens=4, do_sample=False, memory="always", pad_token_id=0)
        assert again.tolist() == ids.tolist(), path
        base = AutoModel.from_pretrained(path, trust_remote_code=True, dtype=torch.float64).eval()
        assert equal(model.lm_head(base(**kwargs).last_hidden_state), expected), path
        model.save_pretrained(f"{path}-again")
        other = AutoModelForImageTextToText.from_pretrained(
            f"{path}-again", trust_remote_code=True, dtype=torch.float64
        ).eval()
        assert equal(other(**kwargs).logits, expected), path
    print("loaded", path.split("/")[-1])
"""


def test_where_surgeon_is_not_installed(vismem_pair: Callable[..., VisMemPair], tmp_path: Any) -> None:
    """Every family, by the code that travels with its checkpoint: logits over invocations, and answers."""
    names = []
    for number, model_type in enumerate(FAMILIES):
        own = vismem_pair(model_type, ("vision", "language")[number % 2])
        kwargs = extended(own.kwargs(SEEING), [said(own)[0]])
        with torch.no_grad():
            logits = own.model(**kwargs).logits
        ids = own.model.generate(**kwargs, max_new_tokens=4, do_sample=False, memory="always", pad_token_id=0)
        (tmp_path / model_type).symlink_to(own.directory / "trained")
        torch.save({**kwargs, "expected": logits, "generated": ids}, tmp_path / f"{model_type}.pt")
        names.append(model_type)
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"} | {"HF_HOME": str(tmp_path / "hf")}
    command = [sys.executable, "-P", "-c", LOAD, *(str(tmp_path / name) for name in names)]
    done = subprocess.run(
        command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False, timeout=300
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert [line.split()[1] for line in done.stdout.splitlines() if line.startswith("loaded")] == names
