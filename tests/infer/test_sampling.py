"""Filters keep exactly what they say; noise depends on seed, position and token alone."""

import math

import pytest
import torch

from openelm.errors import UserError
from openelm.infer.sampling import Sampling, candidates, gumbel, next_tokens, penalise

# Probabilities of six tokens, not in order.
PROBABILITIES = torch.tensor([0.10, 0.40, 0.05, 0.25, 0.15, 0.05])
LOGITS = PROBABILITIES.log()[None]


def kept(sampling, logits=LOGITS):
    """{token: probability} of the distribution that is drawn from."""
    logits_BC, ids_BC = candidates(logits, sampling)
    probabilities = logits_BC.softmax(dim=-1)[0].tolist()
    return {id: p for id, p in zip(ids_BC[0].tolist(), probabilities, strict=True) if p > 0}


def draw(sampling, count, logits=LOGITS, seed=0):
    """``count`` draws of one sequence at successive positions."""
    return next_tokens(
        logits.expand(count, -1),
        sampling,
        seeds_B=torch.full((count,), seed),
        positions_B=torch.arange(count),
    )


def test_the_defaults_are_greedy():
    assert draw(Sampling(), 5).tolist() == [1] * 5


def test_a_temperature_too_small_for_fp32_is_greedy_and_not_nan():
    assert draw(Sampling(temperature=1e-300), 3).tolist() == [1] * 3


def test_without_filters_the_softmax_at_the_temperature_is_drawn_from():
    expected = PROBABILITIES**2 / (PROBABILITIES**2).sum()
    got = kept(Sampling(temperature=0.5))
    assert [got[i] for i in range(6)] == pytest.approx(expected.tolist(), rel=1e-5)


@pytest.mark.parametrize("k, ids", [(1, {1}), (2, {1, 3}), (4, {0, 1, 3, 4}), (6, set(range(6))), (99, set(range(6)))])
def test_top_k_keeps_the_k_likeliest(k, ids):
    assert set(kept(Sampling(temperature=1, top_k=k))) == ids


def test_top_k_keeps_k_where_logits_are_equal():
    assert len(kept(Sampling(temperature=1, top_k=3), torch.zeros(1, 6))) == 3


# 0.40 + 0.25 = 0.65; + 0.15 = 0.80; + 0.10 = 0.90.
@pytest.mark.parametrize("p, ids", [(1e-6, {1}), (0.39, {1}), (0.41, {1, 3}), (0.66, {1, 3, 4}), (0.85, {0, 1, 3, 4})])
def test_top_p_keeps_the_smallest_set_that_reaches_p(p, ids):
    got = kept(Sampling(temperature=1, top_p=p))
    assert set(got) == ids
    total = sum(PROBABILITIES[i].item() for i in ids)
    assert got[1] == pytest.approx(0.40 / total, rel=1e-5)


@pytest.mark.parametrize(
    "p, ids", [(0.0, set(range(6))), (0.24, {0, 1, 3, 4}), (0.37, {1, 3, 4}), (0.7, {1}), (1, {1})]
)
def test_min_p_keeps_what_is_at_least_p_times_the_likeliest(p, ids):
    assert set(kept(Sampling(temperature=1, min_p=p))) == ids


def test_top_p_counts_what_top_k_left_and_the_temperature_comes_before_both():
    # Of the two likeliest, 0.40 / 0.65 = 0.62 reaches 0.6 alone; of all six 0.40 does not.
    assert set(kept(Sampling(temperature=1, top_k=2, top_p=0.6))) == {1}
    assert set(kept(Sampling(temperature=1, top_p=0.6))) == {1, 3}
    # Squared and normalised, 0.40 becomes 0.16 / 0.26 = 0.6.
    assert set(kept(Sampling(temperature=0.5, top_p=0.6))) == {1}


@pytest.mark.parametrize("spread", [0.5, 6.0])  # the likeliest 512 do not, and do, hold what is kept
def test_top_p_of_a_large_vocabulary_is_that_of_a_sorted_one(spread):
    logits_BV = torch.randn(3, 5000, generator=torch.Generator().manual_seed(2)) * spread
    expected_BV = torch.full_like(logits_BV, -math.inf)
    order_BV = logits_BV.argsort(dim=-1, descending=True)
    for row, order in enumerate(order_BV):
        sorted_p = logits_BV[row, order].double().softmax(dim=-1)
        kept = order[(sorted_p.cumsum(dim=-1) - sorted_p) < 0.9]
        assert (len(kept) < 512) == (spread > 1)
        expected_BV[row, kept] = logits_BV[row, kept]
    found_BC, ids_BC = candidates(logits_BV, Sampling(temperature=1, top_p=0.9))
    found_BV = torch.full_like(logits_BV, -math.inf).scatter_(1, ids_BC, found_BC)
    torch.testing.assert_close(found_BV.softmax(dim=-1), expected_BV.softmax(dim=-1))


def test_repetition_penalty_moves_seen_tokens_down_whatever_their_sign():
    logits = torch.tensor([[2.0, -2.0, 1.0, -1.0]])
    seen = torch.tensor([[True, True, False, False]])
    assert penalise(logits, seen, 2.0).tolist() == [[1.0, -4.0, 1.0, -1.0]]


def test_repetition_penalty_can_change_the_greedy_choice():
    logits, place = torch.tensor([[2.0, 1.5, 0.0]]), torch.zeros(1, dtype=torch.int64)
    seen = torch.tensor([[True, False, False]])
    chosen = next_tokens(logits, Sampling(repetition_penalty=2.0), seeds_B=place, positions_B=place, seen_BV=seen)
    assert chosen.tolist() == [1]


@pytest.mark.parametrize(
    "sampling", [Sampling(temperature=1), Sampling(temperature=0.7, top_k=4, top_p=0.9, min_p=0.1)]
)
def test_draws_have_the_distribution_that_the_filters_leave(sampling):
    count = 40_000
    frequency = torch.bincount(draw(sampling, count), minlength=6) / count
    expected = kept(sampling)
    for id in range(6):
        p = expected.get(id, 0.0)
        # Five standard deviations of a binomial; and what is cut never comes.
        assert abs(frequency[id].item() - p) <= 5 * math.sqrt(p * (1 - p) / count)


def test_noise_is_standard_gumbel_and_uncorrelated_between_seeds_positions_and_tokens():
    rows = 64
    ids = torch.arange(4096)[None]
    noise = gumbel(torch.arange(rows), torch.zeros(rows, dtype=torch.int64), ids.expand(rows, -1))
    count = noise.numel()
    # Mean and variance of the Gumbel distribution; tolerances of five standard errors (excess kurtosis 2.4).
    assert noise.mean().item() == pytest.approx(0.577216, abs=5 * 1.2825 / math.sqrt(count))
    assert noise.var().item() == pytest.approx(math.pi**2 / 6, abs=5 * math.pi**2 / 6 * math.sqrt(4.4 / count))
    by_position = gumbel(torch.zeros(rows, dtype=torch.int64), torch.arange(rows), ids.expand(rows, -1))
    for table in (noise, by_position, noise.T):
        correlation = torch.corrcoef(table[:64])
        correlation.fill_diagonal_(0)
        # 2,016 pairs: six standard errors.
        assert correlation.abs().max().item() < 6 / math.sqrt(table.shape[1])


def test_the_same_seed_draws_the_same_and_another_seed_otherwise():
    sampling = Sampling(temperature=1)
    first, again, other = draw(sampling, 200, seed=3), draw(sampling, 200, seed=3), draw(sampling, 200, seed=4)
    assert first.tolist() == again.tolist()
    assert first.tolist() != other.tolist()


@pytest.mark.parametrize("filters", [{}, {"top_k": 20}, {"top_p": 0.9}])
def test_a_draw_depends_on_its_seed_and_position_and_not_on_its_place_in_the_batch(filters):
    sampling = Sampling(temperature=1, **filters)
    logits = torch.randn(5, 100, generator=torch.Generator().manual_seed(0))
    seeds, positions = torch.tensor([9, 8, 9, 7, 6]), torch.tensor([4, 4, 5, 0, 2**40])
    together = next_tokens(logits, sampling, seeds_B=seeds, positions_B=positions).tolist()
    alone = [
        next_tokens(logits[i : i + 1], sampling, seeds_B=seeds[i : i + 1], positions_B=positions[i : i + 1]).item()
        for i in range(5)
    ]
    order = torch.tensor([3, 0, 4, 2, 1])
    shuffled = next_tokens(logits[order], sampling, seeds_B=seeds[order], positions_B=positions[order])
    assert together == alone
    assert shuffled.tolist() == [together[i] for i in order.tolist()]


def splitmix64(x):
    """The published mixer on Python's integers, whose products do not wrap by themselves."""
    word = 2**64 - 1
    x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9 & word
    x = (x ^ (x >> 27)) * 0x94D049BB133111EB & word
    return x ^ (x >> 31)


def test_noise_is_made_of_splitmix64_of_seed_position_and_token():
    word, step = 2**64 - 1, 0x9E3779B97F4A7C15
    seed, position, tokens = 2**63 - 1, 1234, range(200)
    row = splitmix64(splitmix64(seed * step & word) + position * step & word)
    bits = [(splitmix64(row + token * step & word) >> 33) for token in tokens]
    expected = [-math.log(-math.log1p(-(b + 0.5) / 2**31)) for b in bits]
    noise = gumbel(torch.tensor([seed]), torch.tensor([position]), torch.tensor([list(tokens)]))
    assert noise[0].tolist() == pytest.approx(expected, rel=1e-5, abs=1e-5)  # two logarithms in fp32


def test_known_draws_stay_the_same_between_versions():
    # Texts that people have published with a seed must come again; change this only with a word in the CHANGELOG.
    logits = torch.zeros(1, 1000)
    assert draw(Sampling(temperature=1), 4, logits, seed=42).tolist() == [388, 990, 942, 715]


def test_all_problems_are_reported_at_once():
    with pytest.raises(UserError) as caught:
        Sampling(temperature=-1, top_k=-2, top_p=0, min_p=2, repetition_penalty=math.nan, seed=-1)
    for name in ("temperature=-1", "top_k=-2", "top_p=0", "min_p=2", "repetition_penalty=nan", "seed=-1"):
        assert name in str(caught.value)


def test_next_tokens_runs_in_a_captured_graph():
    # No value is read back and no shape depends on one: what a CUDA graph needs, checked by tracing without a break.
    sampling = Sampling(temperature=0.8, top_k=3, top_p=0.9, min_p=0.05, repetition_penalty=1.1)

    def step(logits, seeds, positions, seen):
        return next_tokens(logits, sampling, seeds_B=seeds, positions_B=positions, seen_BV=seen)

    inputs = (torch.randn(2, 50), torch.tensor([1, 2]), torch.tensor([5, 6]), torch.zeros(2, 50, dtype=torch.bool))
    compiled = torch.compile(step, backend="eager", fullgraph=True)
    assert compiled(*inputs).tolist() == step(*inputs).tolist()
