"""What a large vocabulary makes of hidden states, a few positions at a time: cross-entropy, and log-probabilities.

Shapes: N positions (rows and time flattened), M of them whose targets count, D model_dim, V vocabulary, C positions of
one chunk.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

IGNORE = -100
# fp32 logits of one chunk. More would only cost memory; fewer, a pass over the weight's gradient each.
CHUNK_LOGITS = 2**24


@torch.compiler.disable  # a loop over chunks that a compiler would only unroll
def fused_cross_entropy(
    hidden_ND: Tensor, weight_VD: Tensor, targets_N: Tensor, z_weight: float = 0.0, counted: int | None = None
) -> tuple[Tensor, Tensor]:
    """Summed loss of ``softmax(hidden @ weight.T)`` in nats, and the z-loss in it (without a gradient of its own).

    Targets of -100 count nothing. The z-loss is ``z_weight * logsumexp(logits)**2``. Both results are fp32 scalars.
    With ``counted``, which says how many targets do count, only their logits are made: worth it where they are few.
    """
    if not torch.is_grad_enabled():  # needs_input_grad does not know of it, and gradients cost twice the loss
        hidden_ND, weight_VD = hidden_ND.detach(), weight_VD.detach()
    if counted is not None:
        places_M = _places(targets_N, counted)
        hidden_ND, targets_N = hidden_ND.index_select(0, places_M), targets_N[places_M]
    total, z_loss = _FusedCrossEntropy.apply(hidden_ND, weight_VD, targets_N, z_weight)
    return total, z_loss


class _FusedCrossEntropy(torch.autograd.Function):
    """Loss and gradients in one pass over chunks.

    The gradient is known as soon as the logits are, so each chunk's logits are used up at once: three products
    a chunk, nothing computed twice, and memory for one chunk of logits whatever N is.
    """

    @staticmethod
    def forward(
        ctx: Any, hidden_ND: Tensor, weight_VD: Tensor, targets_N: Tensor, z_weight: float
    ) -> tuple[Tensor, Tensor]:
        need_hidden, need_weight = ctx.needs_input_grad[:2]
        d_hidden_ND = torch.empty_like(hidden_ND) if need_hidden else None
        d_weight_VD = torch.zeros_like(weight_VD, dtype=torch.float32) if need_weight else None
        sums = torch.zeros(2, dtype=torch.float32, device=hidden_ND.device)
        rows = max(1, CHUNK_LOGITS // weight_VD.shape[0])
        for start in range(0, hidden_ND.shape[0], rows):
            h_CD = hidden_ND[start : start + rows]
            logits_CV = F.linear(h_CD, weight_VD).float()
            chunk_sums, d_CV = chunk_loss(logits_CV, targets_N[start : start + rows], z_weight)
            sums += chunk_sums
            del logits_CV  # its memory serves the products below
            d_CV = d_CV.to(h_CD.dtype)
            if d_hidden_ND is not None:
                torch.mm(d_CV, weight_VD, out=d_hidden_ND[start : start + rows])
            if d_weight_VD is not None and d_CV.dtype == torch.float32:
                d_weight_VD.addmm_(d_CV.t(), h_CD)
            elif d_weight_VD is not None:
                d_weight_VD += d_CV.t() @ h_CD
            del d_CV  # before the next chunk's logits
        if d_weight_VD is not None:
            d_weight_VD = d_weight_VD.to(weight_VD.dtype)
        ctx.save_for_backward(d_hidden_ND, d_weight_VD)
        z_loss = sums[1].clone()
        ctx.mark_non_differentiable(z_loss)
        return sums.sum(), z_loss

    @staticmethod
    def backward(ctx: Any, *d_outputs: Tensor) -> tuple[Tensor | None, Tensor | None, None, None]:
        # In place, so that no second gradient of N rows exists; by an fp32 scalar, which bf16 would round.
        scale = d_outputs[0]
        d_hidden_ND, d_weight_VD = (
            None if gradient is None else gradient.mul_(scale) for gradient in ctx.saved_tensors
        )
        return d_hidden_ND, d_weight_VD, None, None


def chunk_loss(logits_CV: Tensor, targets_C: Tensor, z_weight: float) -> tuple[Tensor, Tensor]:
    """(cross-entropy, z-loss) of a chunk of fp32 logits, summed, and their gradient by the logits."""
    valid_C = targets_C != IGNORE
    targets_C1 = targets_C.where(valid_C, 0)[:, None]
    log_p_CV = logits_CV.log_softmax(dim=-1)  # one pass where logsumexp takes four
    lse_C = logits_CV[:, 0] - log_p_CV[:, 0]
    cross_entropy = -log_p_CV.gather(1, targets_C1)[:, 0].where(valid_C, 0.0).sum()
    z_loss = z_weight * lse_C.square().where(valid_C, 0.0).sum()
    # d/dlogits: softmax * (1 + 2 z lse), less one at the target; nothing where ignored.
    factor_C = (1 + 2 * z_weight * lse_C).where(valid_C, 0.0)
    d_logits_CV = log_p_CV.exp_().mul_(factor_C[:, None])
    d_logits_CV.scatter_add_(1, targets_C1, -valid_C[:, None].to(d_logits_CV.dtype))
    return torch.stack((cross_entropy, z_loss)), d_logits_CV


@torch.compiler.disable
def target_log_probs(hidden_ND: Tensor, weight_VD: Tensor, targets_N: Tensor, counted: int | None = None) -> Tensor:
    """(N,) fp32: the log-probability of each target under ``softmax(hidden @ weight.T)``; 0 where it is -100.

    ``counted`` says how many are not, so that the host need not ask the device.
    """
    if not torch.is_grad_enabled():
        hidden_ND, weight_VD = hidden_ND.detach(), weight_VD.detach()
    result: Tensor = _TargetLogProbs.apply(hidden_ND, weight_VD, targets_N, counted)
    return result


class _TargetLogProbs(torch.autograd.Function):
    """The backward pass makes each chunk's logits again: only then is it known what each position counts.

    One product a chunk forward and up to three backward, memory for one chunk of logits whatever N is, and nothing at
    all for positions that do not count: of a prompt's, nothing is asked.
    """

    @staticmethod
    def forward(ctx: Any, hidden_ND: Tensor, weight_VD: Tensor, targets_N: Tensor, counted: int | None) -> Tensor:
        places_M = _places(targets_N, counted)
        targets_M1 = targets_N[places_M, None]
        log_p_M = hidden_ND.new_empty(len(places_M), dtype=torch.float32)
        lse_M = torch.empty_like(log_p_M)
        for chunk in _chunks(len(places_M), weight_VD):
            logits_CV = F.linear(hidden_ND[places_M[chunk]], weight_VD).float()
            target_C1 = logits_CV.gather(1, targets_M1[chunk])
            log_p_C1 = logits_CV.log_softmax(dim=-1).gather(1, targets_M1[chunk])  # one pass, as above
            log_p_M[chunk], lse_M[chunk] = log_p_C1[:, 0], (target_C1 - log_p_C1)[:, 0]
            del logits_CV  # before the next chunk's
        ctx.save_for_backward(hidden_ND, weight_VD, places_M, targets_M1, lse_M)
        return log_p_M.new_zeros(len(hidden_ND)).index_copy_(0, places_M, log_p_M)

    @staticmethod
    def backward(ctx: Any, *d_outputs: Tensor) -> tuple[Tensor | None, Tensor | None, None, None]:
        hidden_ND, weight_VD, places_M, targets_M1, lse_M = ctx.saved_tensors
        need_hidden, need_weight = ctx.needs_input_grad[:2]
        d_hidden_ND = torch.zeros_like(hidden_ND) if need_hidden else None
        d_weight_VD = torch.zeros_like(weight_VD, dtype=torch.float32) if need_weight else None
        d_log_p_M1 = d_outputs[0][places_M, None]
        for chunk in _chunks(len(places_M), weight_VD):
            h_CD, d_log_p_C1 = hidden_ND[places_M[chunk]], d_log_p_M1[chunk]
            # d/dlogits: one at the target, less softmax; times what the position counts.
            d_CV = F.linear(h_CD, weight_VD).float().sub_(lse_M[chunk, None]).exp_().mul_(-d_log_p_C1)
            d_CV = d_CV.scatter_add_(1, targets_M1[chunk], d_log_p_C1).to(h_CD.dtype)
            if d_hidden_ND is not None:
                d_hidden_ND[places_M[chunk]] = d_CV @ weight_VD
            if d_weight_VD is not None and d_CV.dtype == torch.float32:
                d_weight_VD.addmm_(d_CV.t(), h_CD)
            elif d_weight_VD is not None:
                d_weight_VD += d_CV.t() @ h_CD
            del d_CV  # before the next chunk's logits
        return d_hidden_ND, None if d_weight_VD is None else d_weight_VD.to(weight_VD.dtype), None, None


def _places(targets_N: Tensor, counted: int | None) -> Tensor:
    """(M,): where the targets that count are. Their number, if it is given, spares the host a wait for the device."""
    valid_N = targets_N != IGNORE
    if counted is None:
        return valid_N.nonzero()[:, 0]
    return torch.nonzero_static(valid_N, size=counted)[:, 0]


def _chunks(positions: int, weight_VD: Tensor) -> Iterator[slice]:
    """Positions whose logits may exist at once, from first to last."""
    rows = max(1, CHUNK_LOGITS // weight_VD.shape[0])
    return (slice(start, start + rows) for start in range(0, positions, rows))
