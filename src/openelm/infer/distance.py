"""How far one model's predictions are from another's: both read the same text, each a layer at a time.

Shapes: B rows, T tokens of a row, N positions that count, D model_dim, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from openelm.errors import UserError
from openelm.infer.by_layer import Read, final_states, in_batches, output_name
from openelm.infer.score import Score, windows
from openelm.model.geometry import ModelConfig

CHUNK_LOGITS = 2**23  # fp32 logits of one model that exist at a time


@dataclass(frozen=True)
class Distance:
    """Of a model from a reference, over the same tokens."""

    reference: Score
    model: Score
    kl: float  # KL(reference || model) in nats, mean over the tokens
    agreement: float  # share of the tokens before which both find the same next one likeliest

    @property
    def perplexity_ratio(self) -> float:
        """The model's perplexity over the reference's."""
        return math.exp((self.model.nats - self.reference.nats) / self.model.tokens)


@torch.no_grad()
def distance(
    config: ModelConfig,
    reference: Read,
    model: Read,
    documents: Sequence[Sequence[int]],
    num_bytes: int,
    done: Callable[[], object] = lambda: None,
) -> Distance:
    """Compare two models of one geometry on ``documents``, ids of which the first is context alone.

    A document longer than the context is read in overlapping windows, as by infer/score.py; ``num_bytes`` are those of
    all texts. ``done`` is called after each layer of each. UserError where a model gives no finite numbers.
    """
    length = config.max_context_length
    spans = [
        (ids, span)
        for ids in documents
        for span in windows(len(ids) - 1, length, max(1, length // 2))
    ]  # fmt: skip
    spans.sort(key=lambda pair: pair[1][2] - pair[1][0])  # alike in length, so that little is filled up
    batches = in_batches([ids[start:end] for ids, (start, _, end) in spans])
    places = [(first - start, [*ids[first + 1 : end + 1]]) for ids, (start, first, end) in spans]
    states = [final_states(config, read, batches, done) for read in (reference, model)]
    weights = [read(output_name(config)).float() for read in (reference, model)]
    sums, row = torch.zeros(4, dtype=torch.float64), 0
    for number, tokens_BT in enumerate(batches):
        counted = places[row : row + len(tokens_BT)]
        row += len(tokens_BT)
        both = [_counted(of_one[number], counted) for of_one in states]
        targets_N = torch.tensor([target for _, targets in counted for target in targets])
        sums += _compared(both, weights, targets_N)
    tokens = sum(len(targets) for _, targets in places)
    if not sums.isfinite().all():
        raise UserError("the loss is not finite: damaged weights, or scales beyond float16; try --dtype bfloat16")
    nats, model_nats, kl, same = sums.tolist()
    return Distance(
        Score(nats, tokens, num_bytes), Score(model_nats, tokens, num_bytes), max(0.0, kl / tokens), same / tokens
    )


def _counted(states_BTD: Tensor, places: Sequence[tuple[int, Sequence[int]]]) -> Tensor:
    """(N, D): of each row the states before its targets."""
    parts = [row_TD[first : first + len(targets)] for row_TD, (first, targets) in zip(states_BTD, places, strict=True)]
    return torch.cat(parts)


def _compared(both: Sequence[Tensor], weights: Sequence[Tensor], targets_N: Tensor) -> Tensor:
    """Sums over N: nats of the one, nats of the other, KL, equal argmax."""
    sums = torch.zeros(4, dtype=torch.float64)
    step = max(1, CHUNK_LOGITS // weights[0].shape[0])
    for start in range(0, len(targets_N), step):
        part = slice(start, start + step)
        one_NV, other_NV = (
            F.linear(states_ND[part], weight_VD).log_softmax(-1)
            for states_ND, weight_VD in zip(both, weights, strict=True)
        )
        same = (one_NV.argmax(-1) == other_NV.argmax(-1)).sum()
        target = targets_N[part, None]
        nats = [-log_p.gather(1, target).double().sum() for log_p in (one_NV, other_NV)]
        kl = one_NV.exp().mul_(one_NV.sub_(other_NV)).double().sum()
        sums += torch.stack([*nats, kl, same.double()])
    return sums
