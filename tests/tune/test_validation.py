"""Held-out examples and pairs: means over all of them, from a model at rest. Many ranks are in test_reference.py."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from openelm.data.example_stream import ExampleBatch, PairBatch
from openelm.data.packing import IGNORE
from openelm.train.parallel import World
from openelm.tune.preference import preference_loss
from openelm.tune.validation import evaluate_examples, evaluate_preferences
from small_models import make


def rows(counts: list[int], seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Random rows of 16 tokens, of which the last so many count."""
    draw = np.random.default_rng(seed)
    tokens, targets = draw.integers(3, 400, (2, len(counts), 16))
    for row, count in enumerate(counts):
        targets[row, : 16 - count] = IGNORE
    return tokens, targets


@pytest.fixture
def model(golden_weights):
    """In training, with dropout before the output layer."""
    model = make(golden_weights)
    model.norm.register_forward_hook(lambda module, _, y: F.dropout(y, 0.5, module.training))
    return model.train()


def test_the_loss_of_examples_is_a_mean_over_tokens_not_batches(model):
    batches = [
        ExampleBatch(*rows(counts, seed), examples=np.arange(len(counts)), seed=0, read=0)
        for seed, counts in enumerate(([3, 9, 1], [16], [2, 2]))
    ]
    found = evaluate_examples(model, batches, World())
    assert model.training, "it goes on training"
    model.eval()
    with torch.no_grad():
        nats = [
            F.cross_entropy(model(tokens).flatten(0, 1), targets.flatten(), ignore_index=IGNORE, reduction="sum")
            for tokens, targets, _ in (batch.tensors("cpu") for batch in batches)
        ]
    assert found == {"loss": pytest.approx(sum(nats).item() / 33, rel=1e-5), "tokens": 33}


def test_figures_of_pairs_are_means_over_pairs_with_the_error_of_the_accuracy(model):
    model.eval()
    loss = preference_loss("sigmoid", 0.2, 0.1, torch.linspace(-60, -20, 14).view(7, 2).flip(1).contiguous())
    batches = [
        PairBatch(*rows([5, 3, 8, 2] * pairs, seed=pairs), examples=np.array(indices), seed=0, read=0)
        for pairs, indices in ((1, [4, 1]), (2, [0, 2, 5, 6]))
    ]
    with torch.no_grad():
        alone = [loss(model, batch) for batch in batches]
    found = evaluate_preferences(model.train(), batches, World(), loss)
    assert model.training
    assert found["pairs"] == 6
    assert found["loss"] == pytest.approx(sum(total.item() for total, _ in alone) / 6, rel=1e-5)
    for name in ("accuracy", "margin", "reward_chosen", "reward_rejected", "logp_chosen", "logp_rejected"):
        assert found[name] == pytest.approx(sum(metrics[name].item() for _, metrics in alone) / 6, rel=1e-5)
    right = round(6 * found["accuracy"])
    assert 0 < right < 6, "the test sees both kinds"
    assert found["accuracy_stderr"] == pytest.approx(math.sqrt(right * (6 - right) / 6**3))


def test_where_nothing_is_held_out_nothing_is_said(model):
    assert evaluate_examples(model, [], World()) == {}
    assert evaluate_preferences(model, [], World(), preference_loss("hinge", 1.0, 0.0, torch.zeros(0, 2))) == {}
