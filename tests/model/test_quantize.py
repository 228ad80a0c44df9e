"""4 and 8 bits: mlx's own bits, the layout of words, and how far a value may move."""

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch

from openelm.model import quantize as quantize_module
from openelm.model.quantize import Quantized, dequantize, fits, quantize

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
SCALES = (1, 1e-3, 1e-6, 1e-7, 1e-8, 1e-20, 1e-38, 1e-42, 100.0, 6e4, 1e30)


def normal(rows: int, columns: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))


def matrices(dtype: torch.dtype) -> Iterator[torch.Tensor]:
    """4,000 groups of 64 and some: of every size, of one sign, off centre, of few values, constant, zero."""
    for number, scale in enumerate(SCALES):
        values = normal(16, 256, number)
        yield values * scale
        yield values.abs() * scale
        yield -values.abs() * scale
        yield (values + 5) * scale
        yield torch.where(values > 0, values, 0.0) * scale
        yield values.sign() * scale
    whole = torch.randint(-128, 128, (128, 256), generator=torch.Generator().manual_seed(1)).float()
    yield whole / 16  # so many ties between two codes
    yield whole % 2
    yield whole.clamp(-8, 7)
    for constant in (0.0, -0.0, 3.3, -3.3, 1e-9, 65504.0):
        yield torch.full((4, 256), constant)
    largest = torch.finfo(torch.float16).max
    yield torch.tensor([-largest, largest]).repeat(2, 128)


def in_dtype(matrix: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    if dtype == torch.float16:
        matrix = matrix.clamp(-65504, 65504)
    return matrix.to(dtype)


def to_mlx(tensor: torch.Tensor) -> Any:
    import mlx.core as mx

    if tensor.dtype == torch.bfloat16:
        return mx.array(tensor.view(torch.uint16).numpy()).view(mx.bfloat16)
    return mx.array(tensor.numpy())


def from_mlx(array: Any) -> torch.Tensor:
    import mlx.core as mx

    if array.dtype == mx.bfloat16:
        return torch.from_numpy(np.array(array.view(mx.uint16))).view(torch.bfloat16)
    return torch.from_numpy(np.array(array))


def assert_same_bits(one: torch.Tensor, other: torch.Tensor) -> None:
    """Equal with the signs of zeros."""
    assert one.dtype == other.dtype
    assert one.shape == other.shape
    assert torch.equal(one.contiguous().view(torch.uint8), other.contiguous().view(torch.uint8))


@pytest.mark.parametrize("group_size", [32, 64, 128])
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_bits_are_those_of_mlx_there_and_back(dtype, bits, group_size):
    mx = pytest.importorskip("mlx.core")
    groups = 0
    for matrix in matrices(dtype):
        matrix = in_dtype(matrix, dtype)
        expected = mx.quantize(to_mlx(matrix), group_size, bits)
        found = quantize(matrix, bits, group_size)
        for mine, theirs in zip((found.weight, found.scales, found.biases), expected, strict=True):
            assert_same_bits(mine, from_mlx(theirs))
        assert_same_bits(dequantize(found), from_mlx(mx.dequantize(*expected, group_size, bits)))
        groups += found.scales.numel()
    assert groups > 2000


def test_the_first_code_stands_in_the_lowest_bits():
    # Values from 0 to 15: the farthest from zero is code 0, and steps go down from there.
    row = torch.arange(16.0).repeat(2)[None]
    found = quantize(row, 4, 32)
    assert found.biases.tolist() == [[15.0]]
    assert found.scales.tolist() == [[-1.0]]
    assert found.weight.tolist() == [[0x89ABCDEF, 0x01234567] * 2]
    assert torch.equal(dequantize(found), row)


def test_eight_bits_are_a_byte_each():
    row = torch.arange(-255.0, 1.0)[None, -32:]
    row[0, 0] = -255
    found = quantize(row, 8, 32)
    assert found.biases.tolist() == [[-255.0]]
    assert found.scales.tolist() == [[1.0]]
    codes = [0, *range(225, 256)]
    words = [sum(code << 8 * i for i, code in enumerate(codes[start : start + 4])) for start in range(0, 32, 4)]
    assert found.weight.tolist() == [words]
    assert torch.equal(dequantize(found), row)


@pytest.mark.parametrize("bits", [4, 8])
def test_no_value_moves_by_more_than_a_step_and_zero_stays(bits):
    matrix = normal(64, 512)
    matrix[:, ::7] = 0
    found = quantize(matrix, bits, 64)
    back = dequantize(found)
    steps = found.scales.abs().repeat_interleave(64, dim=1)
    # Half a step by rounding; up to another half at the end where bending the scale for zero's sake costs a code.
    assert ((back - matrix).abs() / steps).max() <= 1
    assert back[:, ::7].abs().max() < 1e-6
    assert (back - matrix).abs().mean() < 0.26 * steps.mean()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_pieces_that_are_worked_on_at_a_time_do_not_show(monkeypatch, dtype):
    matrix = normal(37, 384).to(dtype)
    whole = quantize(matrix, 4, 128)
    for chunk in (1, 384 * 5, 384 * 36 + 1):
        monkeypatch.setattr(quantize_module, "CHUNK", chunk)
        found = quantize(matrix, 4, 128)
        assert_same_bits(found.weight, whole.weight)
        assert_same_bits(found.scales, whole.scales)
        assert_same_bits(found.biases, whole.biases)
        assert_same_bits(dequantize(found), dequantize(whole))


def test_a_matrix_need_not_lie_in_one_piece():
    matrix = normal(128, 64).T[::2]
    found, expected = quantize(matrix, 4, 32), quantize(matrix.contiguous(), 4, 32)
    assert_same_bits(found.weight, expected.weight)
    # Nor need the words.
    part = Quantized(expected.weight[:, :8], expected.scales[:, :2], expected.biases[:, :2], 4, 32)
    assert_same_bits(dequantize(part), dequantize(expected)[:, :64])


def test_another_dtype_is_a_cast_of_the_values():
    found = quantize(normal(8, 128).bfloat16(), 4, 64)
    assert found.shape == (8, 128)
    assert dequantize(found).dtype == torch.bfloat16
    assert_same_bits(dequantize(found, torch.float32), dequantize(found).float())


@pytest.mark.parametrize("bits", [4, 8])
def test_quantising_again_changes_only_groups_that_lost_their_last_code(bits):
    """mlx's rule is no projection: where bending leaves the last code unused, the range is shorter the next time."""
    first = quantize(normal(256, 512), bits, 64)
    values = dequantize(first)
    again = quantize(values, bits, 64)
    steps = first.biases[..., None] - values.unflatten(-1, (-1, 64))
    last_is_used = (steps / -first.scales[..., None]).round().amax(-1) == 2**bits - 1
    same = (again.scales == first.scales) & (again.biases == first.biases)
    assert torch.equal(same, last_is_used)
    assert 0.7 < same.float().mean() < 0.95
    words = (again.weight.view(torch.int32) == first.weight.view(torch.int32)).unflatten(-1, (-1, 2 * bits)).all(-1)
    assert words[last_is_used].all()


@pytest.mark.parametrize(
    ("shape", "group_size", "expected"),
    [((8, 64), 64, True), ((8, 96), 64, False), ((8, 96), 32, True), ((64,), 32, False), ((2, 2, 64), 64, False)],
)
def test_only_matrices_of_whole_groups_fit(shape, group_size, expected):
    assert fits(shape, group_size) is expected
