"""Steps of examples: the same rows for any ranks and resumes, each example once an epoch, packed as padded."""

import random
from collections import Counter
from collections.abc import Callable
from itertools import islice
from typing import Any

import numpy as np
import pytest
import torch

from openelm.data.example_stream import ExampleBatch, ExampleSteps, PairBatch, once, packed
from openelm.data.packing import IGNORE
from openelm.data.pairs import Example, Pair
from openelm.data.stream_state import merge_counts, merge_states
from small_models import make

BOS = 1
ROW_LENGTH = 200
# What an example is to a model: its inputs and its targets.
Seen = tuple[tuple[int, ...], tuple[int, ...]]


def example(length: int, draw: random.Random) -> Example:
    """So many positions; some targets do not count, the last one does."""
    ids = np.array([BOS, *(draw.randrange(3, 50) for _ in range(length))], dtype=np.int32)
    counts = np.array([False, *(draw.random() < 0.7 for _ in range(length - 1)), True])
    return Example(ids, counts)


def examples_of(lengths: list[int], seed: int = 1) -> list[Example]:
    draw = random.Random(seed)
    return [example(length, draw) for length in lengths]


def many(count: int = 53, seed: int = 2) -> list[Example]:
    draw = random.Random(seed)
    return examples_of(
        [draw.randint(1, ROW_LENGTH) if draw.random() < 0.3 else draw.randint(1, 40) for _ in range(count)]
    )


def pairs_of(count: int) -> list[Pair]:
    chosen, rejected = many(count, seed=3), many(count, seed=4)
    return [Pair(one, other) for one, other in zip(chosen, rejected, strict=True)]


def seen(one: Example) -> Seen:
    targets = [int(id) if counted else IGNORE for id, counted in zip(one.ids[1:], one.counts[1:], strict=True)]
    return tuple(one.ids[:-1].tolist()), tuple(targets)


def steps_of(examples: Any, **options: Any) -> ExampleSteps:
    given = {"seed": 5, "row_length": ROW_LENGTH, "bos_id": BOS, "global_batch": 8, "rows": 2, **options}
    return ExampleSteps(examples, **given)


def unpacked(batch: ExampleBatch) -> list[list[Seen]]:
    """The examples of each row, cut apart at the segments; padding must be there behind them, and nothing else."""
    rows = []
    for row in range(len(batch.tokens)):
        segments = batch.segments[row] if batch.segments is not None else None
        found = []
        numbers = [0] if segments is None else range(segments.max() + 1)
        for number in numbers:
            here = np.ones(batch.tokens.shape[1], bool) if segments is None else segments == number
            found.append((tuple(batch.tokens[row, here].tolist()), tuple(batch.targets[row, here].tolist())))
        if segments is not None:
            assert (np.diff(segments) >= 0).all() and segments[0] == 0
        rows.append(found)
    return rows


def without_padding(found: Seen) -> Seen:
    """A padded row's example: the last target counts, so all behind it is padding."""
    inputs, targets = found
    end = max(place for place, target in enumerate(targets) if target != IGNORE) + 1
    assert set(inputs[end:]) <= {BOS}
    return inputs[:end], targets[:end]


def rows_of(steps: list[Any]) -> list[Any]:
    """Of the steps of all ranks, [rank][step], the rows of each step, sorted, padding cut off."""
    rows: list[Any] = []
    for of_ranks in zip(*steps, strict=True):
        assert len({step.first_row for step in of_ranks}) == 1
        found = [row for step in of_ranks for batch in step.batches for row in zip(*trimmed(batch), strict=True)]
        rows += sorted(found)
    return rows


def trimmed(batch: ExampleBatch) -> list[list[Any]]:
    """Inputs and targets of each row (of pairs: both answers'), as far as it is read."""
    rows = [
        tuple(map(tuple, (tokens[: end + 1], targets[: end + 1])))
        for tokens, targets in zip(batch.tokens.tolist(), batch.targets.tolist(), strict=True)
        for end in [max(place for place, target in enumerate(targets) if target != IGNORE)]
    ]
    count = len(batch.examples)
    return [rows[:count], rows[count:]] if isinstance(batch, PairBatch) else [rows]


KINDS: dict[str, Callable[[], dict[str, Any]]] = {
    "pad": lambda: {"examples": many()},
    "pack": lambda: {"examples": many(), "packing": "pack"},
    "pairs": lambda: {"examples": pairs_of(53)},
}


@pytest.fixture(params=KINDS)
def kind(request) -> dict[str, Any]:
    return KINDS[request.param]()


def test_any_number_of_ranks_sees_the_same_rows(kind):
    wanted = rows_of([list(islice(steps_of(**kind), 20))])
    assert len(wanted) == 160
    for ranks in (2, 4):
        found = [list(islice(steps_of(**kind, rank=rank, ranks=ranks), 20)) for rank in range(ranks)]
        assert rows_of(found) == wanted
        states = [merge_states([steps[n].state() for steps in found]) for n in range(20)]
        assert [state["position"] for state in states] == list(range(8, 168, 8))
        assert merge_counts([steps[0].counts() for steps in found])["documents"] == 0


def test_a_run_resumed_anywhere_goes_on_with_the_same_batches(kind):
    def plain(step: Any) -> Any:
        return [(batch.as_plain(), batch.examples.tolist(), batch.seed) for batch in step.batches]

    with steps_of(**kind) as whole:
        wanted = [(step.first_row, plain(step)) for step in islice(whole, 32)]
    for number in range(30):
        resumed = steps_of(**kind, position=number * 8)
        assert [(step.first_row, plain(step)) for step in islice(resumed, 2)] == wanted[number : number + 2]


def test_every_epoch_has_each_example_once_in_an_order_of_its_own(kind):
    steps, count = steps_of(**kind), len(kind["examples"])
    orders = []
    for epoch in range(4):
        rows = [steps.row(number) for number in range(steps.rows_in(epoch), steps.rows_in(epoch + 1))]
        order = [index for row in rows for index in row]
        assert sorted(order) == list(range(count))
        orders.append(order)
    other = steps_of(**kind | {"seed": 6})
    orders.append([index for number in range(other.rows_in(1)) for index in other.row(number)])
    assert len(set(map(tuple, orders))) == 5


@pytest.mark.parametrize("kind", ["pad", "pairs"], indirect=True)
def test_padded_rows_are_the_examples(kind):
    steps = steps_of(**kind)
    for step in islice(steps, 12):
        numbers = range(step.first_row, step.first_row + 8)
        indices = [index for batch in step.batches for index in batch.examples.tolist()]
        assert sorted(indices) == sorted(steps.row(number)[0] for number in numbers)
        for batch in step.batches:
            assert batch.segments is None
            parts = own = [kind["examples"][index] for index in batch.examples]
            if isinstance(batch, PairBatch):
                parts = [pair.chosen for pair in own] + [pair.rejected for pair in own]
                assert batch.weight() == 2
            else:
                assert batch.weight() == sum(int(one.counts.sum()) for one in own)
            assert [without_padding(row[0]) for row in unpacked(batch)] == [seen(one) for one in parts]
            assert batch.size() == sum(len(one.ids) - 1 for one in parts)
            longest = max(len(one.ids) - 1 for one in parts)
            assert batch.tokens.shape[1] == min(ROW_LENGTH, -(-longest // 64) * 64)


def test_packed_rows_are_the_same_examples_side_by_side():
    examples = many()
    steps = steps_of(examples, packing="pack", rows=4)
    found: Counter[Seen] = Counter()
    last = steps.rows_in(2)
    for step in islice(steps, -(-last // 8)):
        left = [(steps.row(number), number) for number in range(step.first_row, step.first_row + 8)]
        for batch in step.batches:
            rows, indices = unpacked(batch), batch.examples.tolist()
            width = batch.tokens.shape[1]
            for row in rows:
                own, number = max((row, number) for row, number in left if indices[: len(row)] == row)
                left.remove((own, number))
                lengths = sum(len(examples[index].ids) - 1 for index in own)
                assert row[: len(own)] == [seen(examples[index]) for index in own]
                padding = [((BOS,) * (width - lengths), (IGNORE,) * (width - lengths))]
                assert row[len(own) :] == (padding if lengths < width else [])
                assert indices[: len(own)] == own
                indices = indices[len(own) :]
                if number < last:
                    found.update(row[: len(own)])
            assert not indices
            assert batch.weight() == sum(target != IGNORE for row in rows for one in row for target in one[1])
    assert found == Counter(2 * [seen(one) for one in examples])
    assert steps.filling() > 0.8


def test_rows_of_about_the_same_length_share_a_batch(kind):
    steps, lengths = steps_of(**kind, rows=2), {}
    for index, item in enumerate(kind["examples"]):
        both = (item.chosen, item.rejected) if isinstance(item, Pair) else (item,)
        lengths[index] = max(len(one.ids) - 1 for one in both)
    for step in islice(steps, 20):
        rows = [steps.row(number) for number in range(step.first_row, step.first_row + 8)]
        in_order = sorted((-sum(lengths[index] for index in row), place) for place, row in enumerate(rows))
        found = [index for batch in step.batches for index in batch.examples.tolist()]
        assert found == [index for _, place in in_order for index in rows[place]]


def test_packing_fills_rows_and_none_beyond_its_length():
    draw = random.Random(1)
    lengths = [min(2048, int(draw.lognormvariate(5, 1)) + 1) for _ in range(20_000)]
    order = draw.sample(range(20_000), 20_000)
    rows = packed(order, lengths, 2048)
    used = [sum(lengths[index] for index in row) for row in rows]
    assert sorted(index for row in rows for index in row) == list(range(20_000))
    assert max(used) <= 2048
    assert sum(used) / (2048 * len(rows)) > 0.98
    # By their first examples: rows come about in the order that was drawn.
    places = {index: place for place, index in enumerate(order)}
    firsts = [places[row[0]] for row in rows]
    assert firsts == sorted(firsts)


def test_the_model_computes_the_same_on_packed_and_on_padded_rows(golden_weights):
    model = make(golden_weights)
    examples = examples_of([5, 17, 64, 1, 30, 12, 64, 3])
    totals = []
    for packing in ("pad", "pack"):
        model.zero_grad()
        steps = steps_of(examples, packing=packing, row_length=64, global_batch=8, rows=8)
        first = steps.rows_in(1)
        (batch,) = next(
            iter(steps_of(examples, packing=packing, row_length=64, global_batch=first, rows=first))
        ).batches
        tokens, targets, segments = batch.tensors("cpu")
        loss = model(tokens, targets, segments)
        loss.backward()
        gradients = torch.cat([parameter.grad.flatten() for parameter in model.parameters()])
        totals.append((first, batch.weight(), loss.item(), gradients))
    (padded_rows, weight, loss, gradients), (packed_rows, *packed_figures) = totals
    assert packed_rows == 4 < padded_rows == 8
    assert packed_figures[0] == weight
    assert packed_figures[1] == pytest.approx(loss, rel=1e-6)
    torch.testing.assert_close(packed_figures[2], gradients, rtol=1e-4, atol=1e-5)


def test_widths_follow_the_longest_row_or_are_fixed():
    short, long = examples_of([3, 10]), examples_of([65, 2, ROW_LENGTH, ROW_LENGTH - 1])
    for examples, fixed, width in ((short, False, 64), (short, True, ROW_LENGTH), (long, False, ROW_LENGTH)):
        (batch,) = next(iter(steps_of(examples, fixed=fixed, global_batch=4, rows=4))).batches
        assert batch.tokens.shape == batch.targets.shape == (4, width)
    (batch,) = next(iter(steps_of(examples_of([65, 2]), global_batch=2, rows=2))).batches
    assert batch.tokens.shape == (2, 128)
    assert next(iter(steps_of(pairs_of(4), rows=4, fixed=True))).batches[0].tokens.shape == (8, ROW_LENGTH)


def test_seeds_depend_on_the_rows_and_the_runs_seed_alone(kind):
    def seeds(**options: Any) -> list[int]:
        return [batch.seed for step in islice(steps_of(**kind, **options), 10) for batch in step.batches]

    one = seeds(rows=1)
    assert len(set(one)) == 80 and all(0 <= seed < 2**63 for seed in one)
    by_rank = [seeds(rows=1, rank=rank, ranks=4) for rank in range(4)]
    for step in range(10):
        found = [seed for rank in range(4) for seed in by_rank[rank][2 * step : 2 * step + 2]]
        assert sorted(found) == sorted(one[8 * step : 8 * step + 8])
    assert seeds(rows=1, position=16)[: 80 - 16] == one[16:]
    assert not set(seeds(rows=1, seed=6)) & set(one)
    assert not set(seeds(rows=2)) & set(one)


@pytest.mark.parametrize("packing", ["pad", "pack"])
def test_one_example_and_examples_as_long_as_the_row(packing):
    (only,) = examples_of([7])
    steps = steps_of([only], packing=packing)
    for step in islice(steps, 3):
        for batch in step.batches:
            assert [without_padding(row[0]) for row in unpacked(batch)] == [seen(only)] * 2
    assert steps.counts() == {"epoch": 24.0, "examples": 1}
    assert steps.filling() == pytest.approx(7 / ROW_LENGTH)
    full = examples_of([ROW_LENGTH] * 5)
    steps = steps_of(full, packing=packing)
    assert (steps.rows_in(1), steps.filling()) == (5, 1.0)
    for step in islice(steps, 3):
        for batch in step.batches:
            assert batch.tokens.shape == (2, ROW_LENGTH)
            assert all(row == [seen(full[index])] for row, index in zip(unpacked(batch), batch.examples, strict=True))


def test_epochs_in_rows_and_how_far_a_run_has_come():
    padded = steps_of(many(50))
    assert [padded.rows_in(epochs) for epochs in (0, 0.01, 0.5, 1, 1.02, 3)] == [0, 1, 25, 50, 51, 150]
    assert padded.counts() == {"epoch": 0.0, "examples": 50}
    list(islice(padded, 10))
    assert padded.counts() == {"epoch": 1.6, "examples": 50}
    filled = steps_of(many(50), packing="pack")
    ends = [filled.rows_in(epochs) for epochs in range(5)]
    assert ends[0] == 0 < ends[1] < ends[2] < ends[4] < 200
    assert filled.rows_in(2.5) == ends[2] + -(-(ends[3] - ends[2]) // 2)
    assert steps_of(many(50), packing="pack", position=ends[3]).counts()["epoch"] == 3.0
    assert steps_of(many(50), packing="pack", position=ends[3] - 1).counts()["epoch"] < 3.0


@pytest.mark.parametrize("kind", ["pad", "pairs"], indirect=True)
def test_for_measuring_each_example_is_there_once_the_longest_first(kind):
    examples = kind["examples"]
    batches = once(examples, rows=4, row_length=ROW_LENGTH, bos_id=BOS)
    order = [index for batch in batches for index in batch.examples.tolist()]
    assert sorted(order) == list(range(53))
    assert [len(batch.examples) for batch in batches] == [4] * 13 + [1]
    found = [without_padding(row[0]) for batch in batches for row in unpacked(batch)[: len(batch.examples)]]
    assert found == [seen(getattr(examples[index], "chosen", examples[index])) for index in order]
    assert [batch.tokens.shape[1] for batch in batches] == sorted((b.tokens.shape[1] for b in batches), reverse=True)
    assert {batch.tokens.shape[1] for batch in once(examples, rows=4, row_length=300, bos_id=BOS, fixed=True)} == {300}
    assert once([], rows=4, row_length=8, bos_id=BOS) == []


def test_our_own_mistakes_are_met_at_once():
    for options in ({"rows": 3}, {"rank": 1}, {"row_length": 199}, {"examples": []}, {"position": -1}):
        with pytest.raises(AssertionError):
            steps_of(**{"examples": examples_of([ROW_LENGTH]), **options})
    with pytest.raises(AssertionError, match="pairs are not packed"):
        steps_of(pairs_of(2), packing="pack")
