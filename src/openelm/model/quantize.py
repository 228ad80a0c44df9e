"""Matrices in 4 or 8 bits, in mlx-lm's affine format: to the bit what mlx computes on a CPU, on any machine.

A row is cut into groups; a value of a group is ``code * scale + bias``, its code a whole number of 4 or 8 bits. Codes
stand in words of 32 bits, the first in the lowest bits.

Shapes: R rows, C columns, S group_size, G = C / S groups of a row, P = C * bits / 32 words of a row.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

BITS = (4, 8)
GROUP_SIZES = (32, 64, 128)
SMALLEST_SCALE = 1e-7
CHUNK = 2**18  # values that are worked on at a time: what they need fits into a core's cache


@dataclass(frozen=True)
class Quantized:
    """A matrix as it is stored; scales and biases have the dtype of the values that they stand for."""

    weight: Tensor  # (R, P) uint32
    scales: Tensor  # (R, G)
    biases: Tensor  # (R, G)
    bits: int
    group_size: int

    @property
    def shape(self) -> tuple[int, int]:
        """(R, C) of the matrix that this stands for."""
        return self.scales.shape[0], self.scales.shape[1] * self.group_size


def fits(shape: tuple[int, ...], group_size: int) -> bool:
    """Whether a tensor is a matrix whose rows are whole groups; mlx-lm leaves all others as they are."""
    return len(shape) == 2 and shape[1] % group_size == 0


def packed_columns(columns: int, bits: int) -> int:
    """P of C."""
    return columns * bits // 32


def quantize(matrix: Tensor, bits: int, group_size: int) -> Quantized:
    """Round a (R, C) matrix of finite floats to the nearest codes; C must be a multiple of ``group_size``."""
    assert bits in BITS and group_size in GROUP_SIZES and fits(tuple(matrix.shape), group_size)
    rows, columns = matrix.shape
    weight = torch.empty(rows, packed_columns(columns, bits), dtype=torch.uint32, device=matrix.device)
    scales = torch.empty(rows, columns // group_size, dtype=matrix.dtype, device=matrix.device)
    biases = torch.empty_like(scales)
    for part in _chunks(rows, columns):
        values_RGS = matrix[part].float().unflatten(-1, (-1, group_size))
        codes_RGS, scales_RG, biases_RG = _round(values_RGS, 2**bits - 1)
        weight[part] = pack(codes_RGS.flatten(1), bits)
        scales[part], biases[part] = scales_RG, biases_RG
    return Quantized(weight, scales, biases, bits, group_size)


def dequantize(quantized: Quantized, dtype: torch.dtype | None = None) -> Tensor:
    """The (R, C) matrix, computed in the dtype of the scales, then cast to ``dtype`` where one is given."""
    scales, biases = quantized.scales[..., None], quantized.biases[..., None]
    matrix = torch.empty(quantized.shape, dtype=dtype or scales.dtype, device=scales.device)
    for part in _chunks(*quantized.shape):
        codes_RC = _unpack(quantized.weight[part], quantized.bits).to(scales.dtype)
        # Two roundings, one a step, as mlx has them; a fused multiply-add would have one.
        values_RGS = codes_RC.unflatten(-1, (-1, quantized.group_size)).mul_(scales[part]).add_(biases[part])
        matrix[part] = values_RGS.flatten(1)
    return matrix


def _round(values_RGS: Tensor, largest: int) -> tuple[Tensor, Tensor, Tensor]:
    """Codes from 0 to ``largest``, scales and biases in fp32.

    Code 0 is the end of a group that is farther from zero; the scale, of the other sign, is then bent a little, so that
    zero itself has a code.
    """
    low, high = values_RGS.aminmax(dim=-1, keepdim=True)
    from_low = low.abs() > high.abs()
    scale = ((high - low) / largest).clamp_min_(SMALLEST_SCALE)
    scale = torch.where(from_low, scale, -scale)
    edge = torch.where(from_low, low, high)
    steps = (edge / scale).round_()
    near_zero = steps == 0
    scale = torch.where(near_zero, scale, edge / steps)
    bias = torch.where(near_zero, 0, edge)
    codes = ((values_RGS - bias) / scale).round_().clamp_(0, largest).to(torch.uint8)
    return codes, scale.squeeze(-1), bias.squeeze(-1)


def pack(codes_RC: Tensor, bits: int) -> Tensor:
    """Bytes of codes -> (R, P) words; a word's first byte is its lowest on every machine that torch runs on."""
    if bits == 4:
        codes_RC = codes_RC[:, 0::2] | codes_RC[:, 1::2] << 4
    return codes_RC.contiguous().view(torch.uint32)


def _unpack(words_RP: Tensor, bits: int) -> Tensor:
    """(R, P) words -> (R, C) bytes of codes."""
    codes = words_RP.contiguous().view(torch.uint8)
    return torch.stack((codes & 15, codes >> 4), dim=-1).flatten(1) if bits == 4 else codes


def _chunks(rows: int, columns: int) -> Iterator[slice]:
    """Slices of whole rows that cover them all, ``CHUNK`` values each or a little less."""
    step = max(1, CHUNK // columns)
    return (slice(first, first + step) for first in range(0, rows, step))
