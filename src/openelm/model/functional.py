"""The three small operations between the matrix products, each with its backward pass written out.

Left to autograd they keep every intermediate and walk over memory many times. Each keeps its inputs only, so that
the 270M trains on rows of 2,048 in 7.6 GB (docs/benchmarks.md). The plain versions stand in tests/model.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

NORM_EPS = 1e-6


def rms_norm(x: Tensor, gain: Tensor) -> Tensor:
    """``x / rms(x) * gain`` over the last dimension: statistics in fp32, the gain applied after the cast back."""
    result: Tensor = _RMSNorm.apply(x, gain)
    return result


def layer_norm(x: Tensor, gain: Tensor) -> Tensor:
    """``rms_norm`` of ``x`` without its mean, which is taken in fp32: LayerNorm with a gain and no bias."""
    return rms_norm((x - x.mean(dim=-1, keepdim=True, dtype=torch.float32)).to(x.dtype), gain)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """RoPE on the two halves of the last dimension, computed in fp32; the tables hold one half (…, K / 2)."""
    result: Tensor = _Rotate.apply(x, cos, sin)
    return result


def swiglu(gate_and_up: Tensor) -> Tensor:
    """``silu(gate) * up`` of the two halves of the last dimension."""
    result: Tensor = _SwiGLU.apply(gate_and_up)
    return result


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, gain: Tensor) -> Tensor:
        norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=torch.float32)
        scale = torch.rsqrt(norm.square() / x.shape[-1] + NORM_EPS)
        ctx.save_for_backward(x, gain, scale)
        return (x * scale).to(x.dtype).mul_(gain) if x.dtype == gain.dtype else (x * scale).to(x.dtype) * gain

    @staticmethod
    def backward(ctx: Any, *d_outputs: Tensor) -> tuple[Tensor, Tensor]:
        x, gain, scale = ctx.saved_tensors
        (d_y,) = d_outputs
        unit = x * scale
        d_gain = (d_y * unit).flatten(0, -2).sum(0)
        d_unit = d_y * gain
        along = (d_unit * unit).mean(dim=-1, keepdim=True)
        d_x = torch.addcmul(d_unit, unit, along, value=-1).mul_(scale)
        return d_x.to(x.dtype), d_gain.to(gain.dtype)


class _Rotate(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        ctx.save_for_backward(cos, sin)
        return _turn(x, cos, sin)

    @staticmethod
    def backward(ctx: Any, *d_outputs: Tensor) -> tuple[Tensor, None, None]:
        cos, sin = ctx.saved_tensors
        return _turn(d_outputs[0], cos, -sin), None, None  # the transpose of a rotation turns back


def _turn(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    left, right = x.float().chunk(2, dim=-1)
    turned = torch.cat((left * cos, right * cos), dim=-1)
    new_left, new_right = turned.chunk(2, dim=-1)
    new_left.addcmul_(right, sin, value=-1)
    new_right.addcmul_(left, sin)
    return turned.to(x.dtype)


class _SwiGLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate_and_up: Tensor) -> Tensor:
        ctx.save_for_backward(gate_and_up)
        gate, up = gate_and_up.chunk(2, dim=-1)
        return F.silu(gate).mul_(up)

    @staticmethod
    def backward(ctx: Any, *d_outputs: Tensor) -> Tensor:
        (gate_and_up,) = ctx.saved_tensors
        (d_y,) = d_outputs
        gate, up = gate_and_up.chunk(2, dim=-1)
        d_both = torch.empty_like(gate_and_up)
        d_gate, d_up = d_both.chunk(2, dim=-1)
        sigmoid = torch.sigmoid(gate)
        silu = gate * sigmoid
        d_up.copy_(d_y).mul_(silu)
        # d silu / d gate = sigmoid (1 + gate (1 - sigmoid)) = sigmoid + silu (1 - sigmoid)
        slope = sigmoid.addcmul(silu, 1 - sigmoid)
        d_gate.copy_(slope).mul_(d_y).mul_(up)
        return d_both
