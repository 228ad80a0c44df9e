"""Preference losses: what a pair of answers to one prompt teaches, beside what a reference model thinks of them.

Shapes: P pairs of a batch, whose 2P rows are the chosen answers and then the rejected ones; T row length.

All of them look at how much likelier than the reference the model holds each answer. Times beta, that is the answer's
reward, and the margin is by how much the chosen one's is larger.

- ``sigmoid``: ``-log sigmoid(margin)`` (DPO, arXiv:2305.18290, Eq. 7). Label smoothing e takes the labels to be wrong
  that often: ``-(1 - e) log sigmoid(margin) - e log sigmoid(-margin)`` (conservative DPO).
- ``hinge``: ``max(0, 1 - margin)`` (SLiC, arXiv:2305.10425; with a reference as in RSO, arXiv:2309.06657).
- ``ipo``: ``(mean margin - 1 / (2 beta))**2`` (arXiv:2310.12036, Eq. 17), where the margin has no beta and is of
  log-probabilities averaged over each answer's tokens, so that long answers are not to differ more.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from openelm.data.packing import IGNORE, Batch
from openelm.errors import UserError
from openelm.train.loop import LossFunction

LOSSES = ("sigmoid", "hinge", "ipo")


def preference_loss(loss: str, beta: float, label_smoothing: float, reference: Tensor) -> LossFunction:
    """One of ``LOSSES``, summed over the pairs of a ``PairBatch``; its metrics are ``_metrics``.

    ``reference`` holds the reference's log-probability of the chosen and of the rejected answer of every pair, (n, 2).
    """
    check(loss, beta, label_smoothing)

    def loss_fn(model: nn.Module, batch: Any) -> tuple[Tensor, dict[str, Tensor]]:
        if model.training:
            torch.manual_seed(batch.seed)  # dropout is drawn by the rows, whoever computes them and after any resume
        device = next(model.parameters()).device
        halves = batch.answers()
        # One after the other: where activations are computed again, only those of one half are there at a time.
        log_p = torch.stack([_log_probs(model, half, device) for half in halves], dim=1)
        lengths = torch.from_numpy(np.stack([(half.targets != IGNORE).sum(axis=1) for half in halves], axis=1))
        ratios = log_p - reference[torch.from_numpy(batch.examples)].to(log_p)
        losses_P = _losses(loss, beta, label_smoothing, ratios, lengths.to(device))
        return losses_P.sum(), _metrics(beta * ratios.detach(), log_p.detach())

    return loss_fn


def _log_probs(model: nn.Module, answers: Batch, device: torch.device) -> Tensor:
    """(P,) fp32: of each answer, summed over its tokens."""
    log_p_PT: Tensor = model(*answers.tensors(device), log_probs=True, counted=answers.weight())
    return log_p_PT.sum(dim=1)


def check(loss: str, beta: float, label_smoothing: float) -> None:
    """Refuse settings that are no loss."""
    if loss not in LOSSES:
        raise UserError(f"preference.loss={loss} is none of {', '.join(LOSSES)}")
    if not 0 < beta < float("inf"):
        raise UserError(f"preference.beta={beta:g} must be above 0: it is what a reward weighs (0.01 to 0.5 is usual)")
    if label_smoothing and loss != "sigmoid":
        raise UserError(
            f"preference.label_smoothing={label_smoothing:g} has no meaning for preference.loss={loss}: set it to 0, "
            "or take preference.loss=sigmoid"
        )
    if not 0 <= label_smoothing < 0.5:
        raise UserError(
            f"preference.label_smoothing={label_smoothing:g} must be at least 0 and below 0.5: it is the share of "
            "pairs that are taken to be the wrong way round"
        )


def _losses(loss: str, beta: float, label_smoothing: float, ratios_P2: Tensor, lengths_P2: Tensor) -> Tensor:
    """The loss of each pair, by the log-ratios of its answers to the reference, and their lengths in tokens."""
    if loss == "ipo":
        mean_P2 = ratios_P2 / lengths_P2.clamp(min=1)
        return (mean_P2[:, 0] - mean_P2[:, 1] - 1 / (2 * beta)).square()
    margin_P = beta * (ratios_P2[:, 0] - ratios_P2[:, 1])
    if loss == "hinge":
        return F.relu(1 - margin_P)
    right_P, wrong_P = -F.logsigmoid(margin_P), -F.logsigmoid(-margin_P)
    return (1 - label_smoothing) * right_P + label_smoothing * wrong_P if label_smoothing else right_P


def _metrics(rewards_P2: Tensor, log_p_P2: Tensor) -> dict[str, Tensor]:
    """What is recorded, summed over pairs. A tie counts as wrong: before anything is learned, all are ties."""
    chosen_P, rejected_P = rewards_P2.unbind(dim=1)
    return {
        "reward_chosen": chosen_P.sum(),
        "reward_rejected": rejected_P.sum(),
        "margin": (chosen_P - rejected_P).sum(),
        "accuracy": (chosen_P > rejected_P).float().sum(),
        "logp_chosen": log_p_P2[:, 0].sum(),
        "logp_rejected": log_p_P2[:, 1].sum(),
    }
