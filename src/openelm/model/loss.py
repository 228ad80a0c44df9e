"""Cross-entropy over a large vocabulary, a few positions at a time, with its gradient made on the way.

Shapes: N positions (rows and time flattened), D model_dim, V vocabulary, C positions of one chunk.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

IGNORE = -100
# fp32 logits of one chunk. More would only cost memory; fewer, a pass over the weight's gradient each.
CHUNK_LOGITS = 2**24


@torch.compiler.disable  # a loop over chunks that a compiler would only unroll
def fused_cross_entropy(
    hidden_ND: Tensor, weight_VD: Tensor, targets_N: Tensor, z_weight: float = 0.0
) -> tuple[Tensor, Tensor]:
    """Summed loss of ``softmax(hidden @ weight.T)`` in nats, and the z-loss in it (without a gradient of its own).

    Targets of -100 count nothing. The z-loss is ``z_weight * logsumexp(logits)**2``. Both results are fp32 scalars.
    """
    if not torch.is_grad_enabled():  # needs_input_grad does not know of it, and gradients cost twice the loss
        hidden_ND, weight_VD = hidden_ND.detach(), weight_VD.detach()
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
