"""The guard: what it calls a spike, what it lets through, and that it forgets nothing over a checkpoint."""

import json

import numpy as np
import pytest
import torch

from openelm.train.guard import BEFORE_JUDGING, Guard, as_entry

CPU = torch.device("cpu")


def guard(**settings) -> Guard:
    return Guard(CPU, **{"stop": False, "skip_spikes": False, "deviations": 6.0, **settings})


def judge(guard: Guard, losses, norms=None, first=1) -> list[float]:
    norms = np.ones(len(losses)) if norms is None else norms
    tensors = [
        (torch.tensor(a, dtype=torch.float64), torch.tensor(b, dtype=torch.float64))
        for a, b in zip(losses, norms, strict=True)
    ]
    return [guard.judge(first + i, loss, norm, None).item() for i, (loss, norm) in enumerate(tensors)]


def falling(steps: int, seed: int = 0) -> np.ndarray:
    """A loss that falls from 10 to 3 and wanders by a twentieth."""
    noise = np.random.default_rng(seed).normal(0, 0.05, steps)
    return 3 + 7 * np.exp(-np.arange(steps) / 60) + noise


def test_a_training_that_goes_well_is_never_called_a_spike():
    for seed in range(6):
        norms = np.exp(np.random.default_rng(seed + 100).normal(0, 0.2, 1000))
        one = guard(skip_spikes=True)
        assert sum(judge(one, falling(1000, seed), norms)) == 0
        assert one.examine() == []


@pytest.mark.parametrize("which", ["loss", "norm"])
@pytest.mark.parametrize("skip", [True, False])
def test_a_jump_of_loss_or_norm_is_a_spike(which, skip):
    losses, norms = falling(300), np.exp(np.random.default_rng(9).normal(0, 0.2, 300))
    if which == "loss":
        losses[200] += 1.5
    else:
        norms[200] *= 30
    one = guard(skip_spikes=skip)
    verdicts = judge(one, losses, norms)
    assert [i for i, verdict in enumerate(verdicts) if verdict] == ([200] if skip else [])
    [event] = one.examine()
    assert (event.step, event.problem, event.action) == (201, "spike", "skipped" if skip else "kept")
    assert (event.loss, event.grad_norm) == pytest.approx((losses[200], norms[200]))


def test_before_it_knows_the_run_nothing_is_a_spike():
    losses = np.full(BEFORE_JUDGING, 5.0)
    losses[BEFORE_JUDGING - 5] = 50.0
    assert sum(judge(guard(skip_spikes=True), losses)) == 0


def test_a_level_that_stays_is_got_used_to():
    losses = np.concatenate([falling(300), falling(300)[200:] + 2])
    verdicts = judge(guard(skip_spikes=True), losses)
    assert verdicts[300] == 1 and sum(verdicts[-20:]) == 0


def test_what_is_not_finite_leaves_the_running_figures_alone():
    losses = falling(200)
    spoilt = np.insert(losses, 100, [np.nan, np.inf])
    one, other = guard(), guard()
    judge(one, losses)
    verdicts = judge(other, spoilt)
    assert [i for i, verdict in enumerate(verdicts) if verdict] == [100, 101]
    assert all(torch.equal(a, other.state()[name]) for name, a in one.state().items())


def test_where_it_stops_every_later_step_is_left_out_until_the_host_knows():
    one = guard(stop=True)
    assert judge(one, [3.0, float("nan"), 3.0, 3.0]) == [0, 1, 1, 1]
    assert [(e.step, e.action) for e in one.examine()] == [(2, "stopped")]


def test_it_goes_on_from_a_checkpoint_with_the_same_bits():
    losses = falling(300)
    losses[250] += 1
    whole, first, second = guard(skip_spikes=True), guard(skip_spikes=True), guard(skip_spikes=True)
    expected = judge(whole, losses)
    head = judge(first, losses[:120])
    second.load({name: tensor.clone() for name, tensor in first.state().items()})
    assert head + judge(second, losses[120:]) == expected and sum(expected) == 1


def test_an_event_is_plain_json_even_where_its_figures_are_no_numbers():
    one = guard()
    one.judge(7, torch.tensor(float("nan")), torch.tensor(float("inf")), Data)
    [event] = one.examine()
    entry = json.loads(json.dumps(as_entry(event), allow_nan=False))
    assert (entry["loss"], entry["grad_norm"], entry["step"], entry["first_row"]) == ("nan", "inf", 7, 48)


class Data:
    first_row = 48
