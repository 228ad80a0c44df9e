"""What a model makes of examples that it does not train on: of answers, and of pairs of them."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch

from openelm.model.transformer import OpenELM
from openelm.train.loop import LossFunction
from openelm.train.parallel import World, reshard
from openelm.train.probes import evaluating

if TYPE_CHECKING:
    from openelm.data.example_stream import ExampleBatch


def evaluate_examples(model: OpenELM, batches: Sequence[ExampleBatch], world: World) -> dict[str, Any]:
    """Cross-entropy (nats a token that counts) of held-out examples; nothing where there are none."""
    device = next(model.parameters()).device

    def measure(batch: ExampleBatch) -> list[float]:
        return [float(model(*batch.tensors(device), counted=batch.counted())), batch.weight()]

    sums = over_ranks(model, batches, world, measure)
    if not sums:
        return {}
    nats, tokens = sums
    return {"loss": nats / tokens, "tokens": int(tokens)}


def evaluate_preferences(
    model: OpenELM, batches: Sequence[ExampleBatch], world: World, loss: LossFunction
) -> dict[str, Any]:
    """Means over held-out pairs of the loss and of what it reports, with the standard error of the accuracy.

    ``loss`` is a ``preference_loss`` whose reference is that of these pairs. Nothing where there are none.
    """
    names: list[str] = []

    def measure(batch: ExampleBatch) -> list[float]:
        total, metrics = loss(model, batch)
        names[:] = metrics
        return [batch.weight(), float(total), *map(float, metrics.values())]

    sums = over_ranks(model, batches, world, measure)
    if not sums:
        return {}
    pairs = int(sums[0])
    means = dict(zip(("loss", *names), (value / pairs for value in sums[1:]), strict=True))
    accuracy = means["accuracy"]
    return {**means, "accuracy_stderr": math.sqrt(accuracy * (1 - accuracy) / pairs), "pairs": pairs}


def over_ranks(
    model: OpenELM, batches: Sequence[Any], world: World, measure: Callable[[Any], list[float]]
) -> list[float]:
    """The sums of what ``measure`` finds in each batch, which the ranks share; the model neither learns nor drops out.

    An empty list where there are no batches.
    """
    found: list[list[float]] = []
    with evaluating(model):
        for turn in range(0, len(batches), world.size):
            mine = turn + world.rank
            # All ranks go through a sharded model together: who has nothing left measures what does not count.
            figures = measure(batches[mine if mine < len(batches) else turn])
            found.append(figures if mine < len(batches) else [0.0] * len(figures))
    reshard(model)
    return world.sum_words(torch.tensor(found, dtype=torch.float64).sum(dim=0)) if found else []
