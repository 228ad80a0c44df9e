"""The written-out backward passes equal autograd's on the plain formulas."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from openelm.model.functional import NORM_EPS, layer_norm, rms_norm, rotate, swiglu


def plain_norm(x: Tensor, gain: Tensor) -> Tensor:
    unit = x.float() * torch.rsqrt(x.float().square().mean(-1, keepdim=True) + NORM_EPS)
    return unit.to(x.dtype) * gain


def plain_layer_norm(x: Tensor, gain: Tensor) -> Tensor:
    return F.layer_norm(x, gain.shape, gain, eps=NORM_EPS)


def plain_rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    cos, sin = torch.cat((cos, cos), -1), torch.cat((sin, sin), -1)
    left, right = x.float().chunk(2, -1)
    return (x.float() * cos + torch.cat((-right, left), -1) * sin).to(x.dtype)


def plain_swiglu(both: Tensor) -> Tensor:
    gate, up = both.chunk(2, -1)
    return F.silu(gate) * up


def draw(*shape: int, dtype: torch.dtype, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator).to(dtype).requires_grad_()


# fp32: sums of 64 terms of about one, in another order. bf16: two or three roundings of 2**-8, of values up to four.
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 6e-2}


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("operation", ["norm", "layer norm", "rotate", "swiglu"])
def test_forward_and_gradients_equal_the_plain_formula(operation: str, dtype: torch.dtype) -> None:
    x = draw(3, 4, 5, 64, dtype=dtype, seed=1)
    angles = torch.arange(5.0)[:, None] * torch.linspace(0.1, 2.0, 32)
    if "norm" in operation:
        inputs: tuple[Tensor, ...] = (x, draw(64, dtype=dtype, seed=2))
        both = (layer_norm, plain_layer_norm) if operation == "layer norm" else (rms_norm, plain_norm)
        ours, plain = (f(*inputs) for f in both)
    elif operation == "rotate":
        inputs = (x,)
        ours, plain = (f(x, angles.cos(), angles.sin()) for f in (rotate, plain_rotate))
    else:
        inputs = (x,)
        ours, plain = swiglu(x), plain_swiglu(x)
    upstream = draw(*ours.shape, dtype=dtype, seed=3).detach()
    torch.testing.assert_close(ours, plain, atol=TOLERANCE[dtype], rtol=TOLERANCE[dtype])
    for mine, theirs in zip(
        torch.autograd.grad(ours, inputs, upstream), torch.autograd.grad(plain, inputs, upstream), strict=True
    ):
        assert mine.dtype == dtype
        # A gain's gradient sums 60 rounded terms.
        torch.testing.assert_close(mine, theirs, atol=4 * TOLERANCE[dtype], rtol=TOLERANCE[dtype])


def test_a_large_mean_costs_layer_norm_no_digits_in_bf16() -> None:
    x, gain = 100 + draw(20, 64, dtype=torch.float32, seed=1), draw(64, dtype=torch.bfloat16, seed=2)
    x = x.bfloat16()  # whose values are 0.5 apart there: a mean in bf16 would be off by as much
    expected = F.layer_norm(x.double(), gain.shape, gain.double(), eps=NORM_EPS)
    # Without the mean, over the deviation, times the gain: three roundings of 2**-8.
    torch.testing.assert_close(layer_norm(x, gain).double(), expected, rtol=3.1 * 2**-8, atol=0)


def test_what_all_values_share_is_nothing_to_layer_norm_and_its_gradient() -> None:
    x, gain = draw(5, 64, dtype=torch.float32, seed=1), draw(64, dtype=torch.float32, seed=2)
    torch.testing.assert_close(layer_norm(x + 7, gain), layer_norm(x, gain), rtol=1e-4, atol=1e-5)
    (d_x,) = torch.autograd.grad(layer_norm(x, gain), x, draw(5, 64, dtype=torch.float32, seed=3))
    torch.testing.assert_close(d_x.sum(-1), torch.zeros(5), rtol=0, atol=1e-5)
    assert not layer_norm(torch.full((2, 64), 3.0), gain).any()  # a row without differences is finite, and zero


def test_only_inputs_are_kept_for_the_backward_pass() -> None:
    kept: list[Tensor] = []
    both = draw(2, 3, 64, dtype=torch.float32, seed=1)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        swiglu(both)
    assert [t.data_ptr() for t in kept] == [both.data_ptr()]


def test_a_compiler_sees_one_graph_up_to_the_loss() -> None:
    from openelm.model.geometry import ModelConfig
    from openelm.model.transformer import OpenELM

    model = OpenELM(
        ModelConfig(
            model_dim=64, num_transformer_layers=3, head_dim=32, num_gqa_groups=1, ffn_dim_divisor=32, vocab_size=64
        )
    )
    tokens = torch.arange(17)[None] % 64
    seen = torch._dynamo.explain(lambda a, b: model(a, b, z_loss_weight=1e-4))(tokens[:, :-1], tokens[:, 1:])
    # A backward pass that writes with out= once broke every layer into graphs of its own.
    assert seen.graph_count == 1
    assert [("compiler.disable" in reason.reason) for reason in seen.break_reasons] == [True]
