"""Choosing the next token from logits, on the device and without waiting for it.

Shapes: B sequences, V vocabulary, C candidates that the filters are applied to (V where none of them cuts).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from openelm.errors import UserError

# splitmix64 (Steele, Lea and Flood 2014): its increment and the two multipliers of its mixer, as signed 64-bit numbers.
_STEP, _MIX_1, _MIX_2 = (c - 2**64 for c in (0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB))
# Below this even nearly equal logits are driven apart, and fp32 would overflow for nothing: greedy.
GREEDY_BELOW = 1e-5
FEW = 512  # tokens that usually hold the top_p of a text


@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen. The defaults are greedy; raises UserError with every problem found.

    Applied in this order, each to what the one before left (the order of Hugging Face's ``generate``):
    ``repetition_penalty`` (logits of tokens already in prompt or completion are divided by it where positive, else
    multiplied), ``temperature`` (0: the largest logit is taken and the rest is skipped), ``top_k`` largest (0: all),
    ``top_p`` (the fewest tokens that together reach this probability), ``min_p`` (tokens at least this
    fraction as probable as the likeliest).
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        rules = (
            ("temperature", _is_number(self.temperature) and self.temperature >= 0, "at least 0; 0 is greedy"),
            ("top_k", _is_whole(self.top_k) and self.top_k >= 0, "a whole number of at least 0; 0 keeps all tokens"),
            ("top_p", _is_number(self.top_p) and 0 < self.top_p <= 1, "above 0 and at most 1; 1 keeps all tokens"),
            ("min_p", _is_number(self.min_p) and 0 <= self.min_p <= 1, "between 0 and 1; 0 keeps all tokens"),
            (
                "repetition_penalty",
                _is_number(self.repetition_penalty) and self.repetition_penalty > 0,
                "above 0; 1 changes nothing",
            ),
            ("seed", _is_whole(self.seed) and 0 <= self.seed < 2**63, "a whole number from 0 to 2**63 - 1"),
        )
        problems = [f"{name}={getattr(self, name)!r} must be {rule}" for name, holds, rule in rules if not holds]
        if problems:
            raise UserError("sampling: " + "; ".join(problems))


def next_tokens(
    logits_BV: Tensor,
    sampling: Sampling,
    *,
    seeds_B: Tensor,
    positions_B: Tensor,
    seen_BV: Tensor | None = None,
) -> Tensor:
    """The (B,) ids that follow. Nothing here waits for the device, and no shape depends on a value.

    ``seeds_B`` (instead of ``sampling.seed``, so that the rows of a batch can differ) and ``positions_B``, the places
    that the new tokens take in their sequences, are int64 and alone decide a row's noise. ``seen_BV`` (bool; True
    where a token has occurred) is needed for a repetition penalty only.
    """
    logits_BV = logits_BV.float()
    if sampling.repetition_penalty != 1 and seen_BV is not None:
        logits_BV = penalise(logits_BV, seen_BV, sampling.repetition_penalty)
    if sampling.temperature < GREEDY_BELOW:
        return logits_BV.argmax(dim=-1)
    logits_BC, ids_BC = candidates(logits_BV, sampling)
    # The Gumbel-max trick: the largest of logit + noise is a draw from the softmax.
    chosen_B1 = (logits_BC + gumbel(seeds_B, positions_B, ids_BC)).argmax(dim=-1, keepdim=True)
    return ids_BC.gather(1, chosen_B1)[:, 0]


def penalise(logits_BV: Tensor, seen_BV: Tensor, penalty: float) -> Tensor:
    """Logits with those of seen tokens moved down (for a penalty above 1), whatever their sign (Keskar et al. 2019)."""
    moved_BV = torch.where(logits_BV > 0, logits_BV / penalty, logits_BV * penalty)
    return torch.where(seen_BV, moved_BV, logits_BV)


def candidates(logits_BV: Tensor, sampling: Sampling) -> tuple[Tensor, Tensor]:
    """Logits at the sampling's temperature, -inf where a filter cut, and their (B, C) token ids.

    The softmax of the logits is the distribution that is drawn from.
    """
    # From the largest down: exact near the top, and min_p needs no softmax.
    logits_BV = (logits_BV - logits_BV.amax(dim=-1, keepdim=True)) / sampling.temperature
    vocabulary = logits_BV.shape[-1]
    total_B1 = logits_BV.logsumexp(dim=-1, keepdim=True) if sampling.top_p < 1 else None
    if 0 < sampling.top_k < vocabulary:
        logits_BC, ids_BC = logits_BV.topk(sampling.top_k)  # in descending order
        total_B1 = logits_BC.logsumexp(dim=-1, keepdim=True)
    elif total_B1 is not None:
        logits_BC, ids_BC = _descending(logits_BV, total_B1, sampling.top_p)
    else:
        logits_BC = logits_BV
        ids_BC = torch.arange(vocabulary, device=logits_BV.device).expand_as(logits_BV)
    if total_B1 is not None and sampling.top_p < 1:
        probabilities_BC = (logits_BC - total_B1).exp()
        before_BC = probabilities_BC.cumsum(dim=-1) - probabilities_BC
        before_BC[:, 0] = 0.0  # rounding must not cut the likeliest
        logits_BC = logits_BC.masked_fill(before_BC >= sampling.top_p, -math.inf)
    if sampling.min_p > 0:
        logits_BC = logits_BC.masked_fill(logits_BC < math.log(sampling.min_p), -math.inf)
    return logits_BC, ids_BC


def _descending(logits_BV: Tensor, total_B1: Tensor, top_p: float) -> tuple[Tensor, Tensor]:
    """The largest logits in order and their ids: enough of them to reach ``top_p``, or all.

    On a CPU, where a look at a value costs nothing: a tenth of the time of sorting a vocabulary of 32,000.
    """
    if logits_BV.is_cpu and logits_BV.shape[-1] > FEW:
        logits_BC, ids_BC = logits_BV.topk(FEW)
        if (logits_BC - total_B1).exp().sum(dim=-1).min() > top_p:
            return logits_BC, ids_BC
    return logits_BV.sort(descending=True, stable=True)


def gumbel(seeds_B: Tensor, positions_B: Tensor, ids_BC: Tensor) -> Tensor:
    """Standard Gumbel noise, a pure function of (seed, position, token id).

    A hash instead of a generator: a row's noise then depends on no other row, on no device and on nothing drawn
    before, and a captured graph can replay it.
    """
    row_B1 = _mix(_mix(seeds_B * _STEP) + positions_B * _STEP)[:, None]
    bits_BC = (_mix(row_B1 + ids_BC * _STEP) >> 33) & 0x7FFFFFFF
    # An exponential variable is the noise's other face, and its small values, which win, keep all bits.
    uniform_BC = ((bits_BC.float() + 0.5) * 2.0**-31).clamp(max=1 - 2.0**-24)
    return -(-(-uniform_BC).log1p()).log()


def _mix(x: Tensor) -> Tensor:
    """splitmix64's finaliser on int64, whose products wrap; shifted-in sign bits are masked off."""
    x = (x ^ ((x >> 30) & ((1 << 34) - 1))) * _MIX_1
    x = (x ^ ((x >> 27) & ((1 << 37) - 1))) * _MIX_2
    return x ^ ((x >> 31) & ((1 << 33) - 1))


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _is_whole(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)
