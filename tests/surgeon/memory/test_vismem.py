"""How a call for memory becomes latents: what a query is built of, and the formers, each against a plain one."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from checkpoints import FAMILIES, has_tokenizer
from surgeon import models
from surgeon.memory.lora import SUFFIX, LowRank
from surgeon.memory.memory_tokens import KINDS, Kind
from surgeon.memory.query_builder import POSITIONS
from surgeon.memory.vismem import Lent, evenly_spaced
from surgeon.models import family
from vismem_models import SEEING, WINDOW, VisMemPair

needs_tokenizer = pytest.mark.skipif(not has_tokenizer(), reason="needs the demo checkpoint's tokenizer")
Pairs = Callable[..., VisMemPair]


@given(st.integers(2, 3000).flatmap(lambda number: st.tuples(st.integers(number, 20000), st.just(number))))
def test_places_are_evenly_spaced(sizes: tuple[int, int]) -> None:
    count, number = sizes
    places = evenly_spaced(count, number)
    expected = np.arange(number, dtype=np.float64) * (count - 1) / (number - 1)
    assert len(places) == number and places[0] == 0 and places[-1] == count - 1
    steps = places.diff()
    assert bool((steps >= 1).all()) and int(steps.max() - steps.min()) <= 1
    assert np.abs(places.numpy() - expected).max() < 1


@needs_tokenizer
@pytest.mark.parametrize(("visual", "text"), [(0, 5), (30, 0), (1980, WINDOW), (1981, WINDOW + 9), (7000, 3)])
def test_a_query_is_built_of_the_latest_text_and_evenly_of_images(vismem_pair: Pairs, visual: int, text: int) -> None:
    vismem = vismem_pair("qwen3_vl").model.model.vismem
    most = POSITIONS - 4 - WINDOW
    seen, said = torch.randn(visual, 64), torch.randn(text, 64)
    hidden_states = vismem.seen_and_said(seen, said)
    rows = [int(place * (visual - 1) // (most - 1)) for place in range(most)] if visual > most else list(range(visual))
    expected = [*(seen[row] for row in rows), *list(said)[max(0, text - WINDOW) :]]
    assert len(hidden_states) == min(visual, most) + min(text, WINDOW) <= vismem.query_builder.max_hidden_states
    assert torch.equal(hidden_states, torch.stack(expected))


@torch.no_grad()
def decoder_of_chosen_layers(pair: VisMemPair, adapters: Any, layers: tuple[int, ...]) -> Any:
    """transformers' own decoder of these layers alone, whose weights the adapters are merged into."""
    source = models.load(pair.directory / "source").double()
    decoder = source.get_submodule(family(source.config.model_type).text_model)
    decoder.layers = torch.nn.ModuleList(decoder.layers[index] for index in layers)
    decoder.config.num_hidden_layers = len(layers)
    count = 0
    for path, low_rank in adapters.named_modules():
        if isinstance(low_rank, LowRank):
            index, _, within = path.removesuffix(SUFFIX).partition(".")
            layer: Any = decoder.layers[layers.index(int(index))]
            scale = 32.0 / 4  # alpha's default, and the rank
            layer.get_submodule(within).weight += scale * low_rank.expand.weight @ low_rank.reduce.weight
            count += 1
    assert count == 4 * len(layers)
    return decoder


@needs_tokenizer
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("model_type", FAMILIES)
@torch.no_grad()
def test_the_decoder_forms_memory_by_its_last_layers(vismem_pair: Pairs, model_type: str, kind: Kind) -> None:
    """[H, Q, M_init] through transformers' own decoder of these layers, adapters merged, and its last norm."""
    pair = vismem_pair(model_type, "language")
    base_model = pair.model.model
    decoder = base_model.get_submodule(family(pair.source.config.model_type).text_model.split(".", 1)[1])
    vismem = base_model.vismem
    former = vismem.short if kind == "short" else vismem.long
    seen, said = (torch.randn(count, 64, dtype=torch.float64) for count in (9, 12))
    latents = vismem(Lent(base_model), Lent(decoder), kind, seen, said, [])
    hidden_states = torch.cat((seen, said))
    queries = vismem.query_builder(hidden_states[None])[0]
    x = torch.cat((hidden_states, queries, former.memory_init))[None]
    plain = decoder_of_chosen_layers(pair, former.adapters, (1, 2))
    expected: Tensor = plain(inputs_embeds=x, use_cache=False).last_hidden_state[0, -len(former.memory_init) :]
    torch.testing.assert_close(latents, expected, atol=1e-9, rtol=0)
    assert len(latents) == (3 if kind == "short" else 5)
    wider = vismem(Lent(base_model), Lent(decoder), kind, seen, said[1:], [])
    assert (wider - latents).abs().max() > 0.01


@needs_tokenizer
@pytest.mark.parametrize("model_type", FAMILIES)
@torch.no_grad()
def test_the_vision_tower_forms_memory_of_images_and_queries(vismem_pair: Pairs, model_type: str) -> None:
    """By the former that `tests/conformance` holds against the tower itself: which queries and images it is given."""
    pair = vismem_pair(model_type)
    base_model = pair.model.model
    described = family(pair.source.config.model_type)
    decoder = base_model.get_submodule(described.text_model.split(".", 1)[1])
    kwargs = pair.kwargs(SEEING)
    tower: Any = described.tower
    visual = torch.isin(kwargs["input_ids"], torch.tensor(described.visual_token_ids(pair.source.config)))
    (images,) = tower.images_by_row(base_model, kwargs, visual)
    seen, said = (torch.randn(count, 64, dtype=torch.float64) for count in (9, 12))
    latents = base_model.vismem(Lent(base_model), Lent(decoder), "short", seen, said, images)
    queries = base_model.vismem.query_builder(torch.cat((seen, said))[None])[0]
    torch.testing.assert_close(latents, base_model.vismem.short(base_model, images, queries), atol=1e-9, rtol=0)
    assert latents.shape == (3, 64)
    with pytest.raises(ValueError, match="this row has none; call for long memory"):
        base_model.vismem(Lent(base_model), Lent(decoder), "short", seen, said, [])


@needs_tokenizer
def test_values_at_insertion(vismem_pair: Pairs) -> None:
    """Every parameter has one; only the second matrix of an adapter is zero."""
    vismem = vismem_pair("qwen3_vl").fresh.model.vismem
    initialisers = vismem.initialisers(0.02)
    parameters = dict(vismem.named_parameters())
    assert initialisers.keys() == parameters.keys()
    for name, parameter in parameters.items():
        zero = name.endswith(("expand.weight", "bias"))
        assert bool((parameter == 0).all()) == zero, name
        if name.endswith("reduce.weight"):
            assert float(parameter.detach().std()) == pytest.approx((3 * parameter.shape[1]) ** -0.5, rel=0.25), name
