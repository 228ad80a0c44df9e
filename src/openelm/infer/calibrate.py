"""Matrices in 4 or 8 bits that spoil a layer's outputs least, on real text: GPTQ, with a search for each group's range.

Rounding leaves the least error in the weights. What counts is the error in ``x @ W.T`` over the inputs x that a layer
really gets, ``trace(E H E.T)`` with H the mean of ``x x.T``: GPTQ (Frantar et al., 2022) rounds column by column and
moves the columns that are still to come so that they make up for the error so far.

Shapes: R rows, C columns, S group_size, B batch, T tokens, D model_dim.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from openelm.errors import UserError
from openelm.infer.by_layer import Read, embed, final_states, in_batches, open_block, open_norm, output_name, run_block
from openelm.model.geometry import ModelConfig
from openelm.model.quantize import SMALLEST_SCALE, Quantized, dequantize, fits, pack, quantize
from openelm.model.transformer import Block

DAMPING = 0.01  # of the mean of H's diagonal, added to it
MOST_DAMPING = 1.0
# Parts of a group's range, at each end, that are tried beside the whole: what lies outside is cut to the end.
SHRINKS = (1.0, 0.95, 0.9, 0.85, 0.8)
MATRICES = ("attn.qkv_proj", "attn.out_proj", "ffn.proj_1", "ffn.proj_2")  # of a layer


class NotPositiveDefinite(Exception):  # noqa: N818 (a fact, not an error, to those who catch it)
    """H has no factor, damped as it is: more damping is needed."""


@dataclass
class Calibrated:
    """Quantised matrices by name, those that are whole groups; and what was out of the ordinary."""

    codes: dict[str, Quantized] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)


@torch.no_grad()
def calibrate(
    config: ModelConfig,
    read: Read,
    rows: Sequence[Sequence[int]],
    bits: int,
    group_size: int,
    done: Callable[[], object] = lambda: None,
) -> Calibrated:
    """Quantise a model on ``rows`` of token ids, each matrix on what it reads once all before it are quantised.

    ``read`` gives tensors of the dtype that scales are to have. One layer is held at a time, and the states of all
    rows. A shared embedding is quantised for the output layer, on the states of the model as it was: that is where most
    of its error is felt. ``done`` is called after each layer of each pass (``passes``). UserError: not finite.
    """
    found, batches = Calibrated(), in_batches(rows)
    table, output = "token_embeddings.weight", output_name(config)

    def add(name: str, hessian: Tensor | None) -> None:
        matrix = read(name)
        if fits(tuple(matrix.shape), group_size):
            hessian = torch.eye(matrix.shape[1]) if hessian is None else hessian
            found.codes[name], damping = _damped(name, matrix, hessian, bits, group_size)
            if damping > DAMPING:
                found.notes.append(f"{name}: damping raised to {damping:.0%}, without which H could not be inverted")

    def current(name: str) -> Tensor:
        return dequantize(found.codes[name]) if name in found.codes else read(name)

    add(table, _second_moment(final_states(config, read, batches, done)) if output == table else None)
    states = embed(current, batches)
    for layer in range(config.num_transformer_layers):
        block = open_block(config, layer, read)
        for name, hessian in _hessians(config, block, states).items():
            add(f"layers.{layer}.{name}.weight", hessian)
        block = open_block(config, layer, current)
        for number, x_BTD in enumerate(states):
            states[number] = run_block(config, block, x_BTD)
        done()
    if output != table:
        norm = open_norm(config, read)
        add(output, _second_moment([norm(x_BTD) for x_BTD in states]))
    return found


def passes(config: ModelConfig) -> int:
    """How often ``calibrate`` goes through the layers."""
    return 2 if config.share_input_output_layers else 1


def _second_moment(batches: Sequence[Tensor]) -> Tensor:
    """The mean of ``x x.T`` over all positions, (C, C)."""
    total_CC = sum((_squares(x_BTC) for x_BTC in batches), start=torch.zeros(()))
    return total_CC / _positions(batches)


def _squares(x_BTC: Tensor) -> Tensor:
    x_NC = x_BTC.flatten(0, 1)
    return x_NC.T @ x_NC


def _positions(batches: Sequence[Tensor]) -> int:
    return sum(x_BTC.shape[0] * x_BTC.shape[1] for x_BTC in batches)


def _hessians(config: ModelConfig, block: Block, states: Sequence[Tensor]) -> dict[str, Tensor]:
    """H of each matrix of a layer, whose own matrices are not yet quantised.

    To quantise one after the other, with a pass over the layer for each, takes twice the time and changes nothing
    (docs/quantisation.md).
    """
    sums: dict[str, Tensor] = {}

    def record(name: str) -> Callable[[torch.nn.Module, tuple[Tensor]], None]:
        def add(_: torch.nn.Module, inputs: tuple[Tensor]) -> None:
            squares_CC = _squares(*inputs)
            sums[name] = sums[name].add_(squares_CC) if name in sums else squares_CC

        return add

    hooks = [block.get_submodule(name).register_forward_pre_hook(record(name)) for name in MATRICES]
    for x_BTD in states:
        run_block(config, block, x_BTD)
    for hook in hooks:
        hook.remove()
    return {name: sum_CC.div_(_positions(states)) for name, sum_CC in sums.items()}


def _damped(name: str, matrix: Tensor, hessian: Tensor, bits: int, group_size: int) -> tuple[Quantized, float]:
    """GPTQ with as little damping as H needs, and how much that was."""
    if not hessian.isfinite().all():
        raise UserError(
            f"{name}: what it reads of the calibration text is not finite: the weights are damaged, or too large for "
            "their dtype; look at the model with `openelm perplexity`, or try --method round"
        )
    damping = DAMPING
    while True:
        try:
            return gptq(matrix, hessian, bits, group_size, damping=damping), damping
        except NotPositiveDefinite:
            damping *= 10
            if damping > MOST_DAMPING:
                raise UserError(
                    f"{name}: H of the calibration text cannot be inverted, with damping of {MOST_DAMPING:.0%} either: "
                    "take other text, or --method round"
                ) from None


def gptq(
    matrix: Tensor,
    hessian: Tensor,
    bits: int,
    group_size: int,
    *,
    damping: float = DAMPING,
    shrinks: Sequence[float] = SHRINKS,
) -> Quantized:
    """Codes of a (R, C) matrix that change its outputs least; ``hessian`` (C, C) is the mean of its inputs' squares.

    Scales and biases have the matrix's dtype; those of a group are found when it is reached, from its columns as they
    are by then. With ``shrinks`` of 1 alone they span the group, as in rounding; with an H that is diagonal then, the
    codes are those of rounding too. Raises NotPositiveDefinite.
    """
    upper_CC = _inverse_factor(hessian, damping)
    left_RC = matrix.float().clone()
    rows, columns = left_RC.shape
    codes_RC = torch.empty(rows, columns, dtype=torch.uint8)
    scales = torch.empty(rows, columns // group_size, dtype=matrix.dtype)
    biases = torch.empty_like(scales)
    for group, start in enumerate(range(0, columns, group_size)):
        end = start + group_size
        upper_SS = upper_CC[start:end, start:end].contiguous()
        part_SR = left_RC[:, start:end].T.contiguous()  # a column's values side by side
        scale_R, bias_R = _find_range(part_SR, matrix.dtype, bits, hessian.diagonal()[start:end], shrinks)
        error_SR = torch.empty_like(part_SR)
        for i in range(group_size):
            code_R = _code(part_SR[i], scale_R, bias_R, bits)
            codes_RC[:, start + i] = code_R.to(torch.uint8)
            error_SR[i] = (part_SR[i] - _value(code_R, scale_R, bias_R)) / upper_SS[i, i]
            part_SR[i + 1 :].addr_(upper_SS[i, i + 1 :], error_SR[i], alpha=-1)
        left_RC[:, end:].addmm_(error_SR.T, upper_CC[start:end, end:], alpha=-1)
        scales[:, group], biases[:, group] = scale_R, bias_R
    return Quantized(pack(codes_RC, bits), scales, biases, bits, group_size)


def _inverse_factor(hessian_CC: Tensor, damping: float) -> Tensor:
    """U, upper triangular, with U.T U the inverse of the damped H; in fp64, as its condition may be a million."""
    damped_CC = hessian_CC.to(torch.float64, copy=True)
    diagonal_C = damped_CC.diagonal()
    mean = diagonal_C.mean()
    # An input that is always zero says nothing of its column: that is rounded by itself.
    diagonal_C += torch.where(diagonal_C == 0, mean.clamp_min(SMALLEST_SCALE), 0) + damping * mean
    inverse_CC = torch.cholesky_inverse(_cholesky(damped_CC))
    return _cholesky(inverse_CC).T.contiguous().float()


def _cholesky(matrix_CC: Tensor) -> Tensor:
    factor_CC, failed = torch.linalg.cholesky_ex(matrix_CC)
    if failed:
        raise NotPositiveDefinite
    return factor_CC


def _find_range(
    part_SR: Tensor, dtype: torch.dtype, bits: int, cost_S: Tensor, shrinks: Sequence[float]
) -> tuple[Tensor, Tensor]:
    """Scale and bias of each row of a group, in ``dtype``: rounding's, or the best of the ranges that are tried."""
    rounded = quantize(part_SR.T.to(dtype), bits, len(part_SR))
    scale_R, bias_R = rounded.scales[:, 0].clone(), rounded.biases[:, 0].clone()

    def error(scale_R: Tensor, bias_R: Tensor) -> Tensor:
        values_SR = _value(_code(part_SR, scale_R, bias_R, bits), scale_R, bias_R)
        return cost_S @ values_SR.sub_(part_SR).square_()

    least_R = error(scale_R, bias_R)
    low_R, high_R = part_SR.aminmax(dim=0)
    for low, high in ((low, high) for low in shrinks for high in shrinks if (low, high) != (1.0, 1.0)):
        tried_R = ((high * high_R - low * low_R) / (2**bits - 1)).clamp_min(SMALLEST_SCALE).to(dtype)
        edge_R = (low * low_R).to(dtype)
        error_R = error(tried_R, edge_R)
        better_R = error_R < least_R
        least_R = torch.where(better_R, error_R, least_R)
        scale_R, bias_R = torch.where(better_R, tried_R, scale_R), torch.where(better_R, edge_R, bias_R)
    return scale_R, bias_R


def _code(values: Tensor, scale_R: Tensor, bias_R: Tensor, bits: int) -> Tensor:
    """The nearest codes to fp32 values, as floats."""
    return ((values - bias_R.float()) / scale_R.float()).round_().clamp_(0, 2**bits - 1)


def _value(code: Tensor, scale_R: Tensor, bias_R: Tensor) -> Tensor:
    """What codes stand for, as model/quantize.py computes it, in fp32."""
    return code.to(scale_R.dtype).mul_(scale_R).add_(bias_R).float()
