"""New rows of a table: what they are a function of."""

import torch

from surgeon.new_rows import NOISE, CopyOfRow, MeanOfRows, NewRow, RowRule, new_row_values

TABLE = torch.randn(50, 32, generator=torch.Generator().manual_seed(0)).to(torch.bfloat16)


def rows(*tokens: str, rule: RowRule = CopyOfRow(3), seed: int = 0) -> list[NewRow]:  # noqa: B008
    return [NewRow(token, 50 + number, rule, seed) for number, token in enumerate(tokens)]


def test_values_depend_on_name_seed_and_token_and_on_nothing_else() -> None:
    both = new_row_values("embed", rows("<a>", "<b>"), TABLE)
    assert both.dtype == TABLE.dtype and both.shape == (2, 32)
    assert torch.equal(both[1:], new_row_values("embed", rows("<b>"), TABLE))
    assert torch.equal(both.flip(0), new_row_values("embed", rows("<b>", "<a>"), TABLE))
    assert not torch.equal(both[0], both[1])
    assert not torch.equal(both, new_row_values("head", rows("<a>", "<b>"), TABLE))
    assert not torch.equal(both, new_row_values("embed", rows("<a>", "<b>", seed=1), TABLE))


def test_a_mean_is_that_of_its_spans_in_chunks_of_any_size() -> None:
    rule = MeanOfRows(((0, 7), (20, 45)))
    wide = torch.randn(50, 4096, generator=torch.Generator().manual_seed(1))
    released: list[None] = []
    values = new_row_values("embed", rows("<a>", rule=rule), wide, lambda: released.append(None))
    mean = torch.cat([wide[:7], wide[20:45]]).double().mean(0)
    noise = values[0].double() - mean
    assert len(released) == 2
    assert 0.9 * NOISE < float(noise.square().mean().sqrt() / mean.square().mean().sqrt()) < 1.1 * NOISE


def test_the_noise_is_a_thousandth_of_the_row() -> None:
    wide = torch.randn(4, 8192, generator=torch.Generator().manual_seed(1)) * 5
    noise = new_row_values("embed", rows("<a>"), wide)[0] - wide[3]
    assert 0.95 * NOISE < float(noise.square().mean().sqrt() / wide[3].square().mean().sqrt()) < 1.05 * NOISE


def test_a_row_of_zeros_stays_one() -> None:
    assert not new_row_values("embed", rows("<a>"), torch.zeros(4, 8)).any()
