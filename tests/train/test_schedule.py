"""The learning rate of every step, as the released runs had it."""

from itertools import pairwise

import pytest

from openelm.train.schedule import Schedule

RELEASED = {"270M": 0.0053, "450M": 0.0039, "1.1B": 0.0024, "3B": 0.0012}


def make(kind: str, **changes) -> Schedule:
    return Schedule(**{"kind": kind, "steps": 100, "lr": 1.0, "min_lr": 0.1, "warmup_steps": 10, **changes})


@pytest.mark.parametrize("size", RELEASED)
def test_the_released_runs_rates(golden, size):
    peak = RELEASED[size]
    schedule = Schedule("cosine", steps=350_000, lr=peak, min_lr=peak / 10, warmup_steps=5000, warmup_init_lr=1e-6)
    for step, rate in golden("lr_schedule")["lr"][size].items():
        assert schedule.at(int(step)) == pytest.approx(rate, rel=0, abs=1e-9), step


@pytest.mark.parametrize("kind", ["cosine", "linear", "constant", "wsd"])
def test_warm_up_rises_evenly_and_ends_at_the_peak(kind):
    schedule = make(kind, warmup_init_lr=0.2, decay_steps=20)
    assert [schedule.at(step) for step in (0, 5, 10)] == pytest.approx([0.2, 0.6, 1.0])


@pytest.mark.parametrize("kind", ["cosine", "linear", "constant", "wsd"])
def test_without_warm_up_the_first_step_has_the_peak(kind):
    assert make(kind, warmup_steps=0, decay_steps=20).at(0) == 1.0


def test_cosine_is_half_way_down_half_way_through():
    # 91 steps of decay in the formula: the released runs' count is one more than the steps there are.
    assert make("cosine", steps=101).at(10 + 46) == pytest.approx(0.55)
    assert make("cosine").at(99) == pytest.approx(0.1, abs=2e-3)


def test_linear_falls_evenly():
    rates = [make("linear").at(step) for step in range(10, 100)]
    steps = {round(a - b, 12) for a, b in pairwise(rates)}
    assert steps == {round(0.9 / 91, 12)}
    assert rates[0] == 1.0


def test_constant_stays_at_the_peak():
    assert {make("constant").at(step) for step in range(10, 100)} == {1.0}


def test_wsd_keeps_the_peak_until_the_last_steps_and_then_falls_evenly():
    schedule = make("wsd", decay_steps=20)
    assert {schedule.at(step) for step in range(10, 81)} == {1.0}
    assert [schedule.at(step) for step in (85, 90, 99)] == pytest.approx([0.775, 0.55, 0.145])
    # What a run continues from in mid-plateau is the same whatever length was planned.
    assert make("wsd", decay_steps=20, steps=1000).at(50) == schedule.at(50)


@pytest.mark.parametrize("kind", ["cosine", "linear", "wsd"])
def test_the_rate_never_rises_after_warm_up_nor_leaves_its_bounds(kind):
    rates = [make(kind, decay_steps=20).at(step) for step in range(10, 130)]
    if kind == "wsd":
        rates = rates[:90]
    assert rates == sorted(rates, reverse=True)
    assert min(rates) >= 0.1 - 1e-12
