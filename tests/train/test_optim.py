"""AdamW against the formula, on fp32 masters of fp32 and bf16 models."""

import pytest
import torch
from torch import nn

from openelm.train.optim import Optimizer

BETAS, EPS, DECAY = (0.9, 0.95), 1e-8, 0.1


class Model(nn.Module):
    """A matrix used twice, as a shared embedding is, and a gain."""

    def __init__(self, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        draw = torch.Generator().manual_seed(0)
        self.matrix = nn.Parameter(torch.randn(6, 6, generator=draw))
        self.gain = nn.Parameter(torch.rand(6, generator=draw) + 0.5)
        self.to(dtype)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return ((x @ self.matrix * self.gain) @ self.matrix).float().square().sum()


def make(dtype: torch.dtype = torch.float32) -> tuple[Model, Optimizer]:
    model = Model()
    return model, Optimizer(model, betas=BETAS, eps=EPS, weight_decay=DECAY, dtype=dtype)


def inputs(seed: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(3, 6, generator=torch.Generator().manual_seed(seed)).to(dtype)


def by_hand(weight, gradient, moments, step, lr, decay):
    """One step of decoupled AdamW (Loshchilov and Hutter, algorithm 2), in fp64."""
    first, second = moments
    first = BETAS[0] * first + (1 - BETAS[0]) * gradient
    second = BETAS[1] * second + (1 - BETAS[1]) * gradient**2
    unbiased = first / (1 - BETAS[0] ** step), second / (1 - BETAS[1] ** step)
    weight = weight * (1 - lr * decay) - lr * unbiased[0] / (unbiased[1].sqrt() + EPS)
    return weight, (first, second)


def test_three_steps_are_those_of_the_formula_and_gains_are_not_decayed():
    model, optimizer = make()
    state = {name: (p.detach().double(), (0.0, 0.0)) for name, p in model.named_parameters()}
    for step, lr in enumerate([1e-2, 3e-2, 2e-2], start=1):
        model(inputs(step)).backward()
        for name, parameter in model.named_parameters():
            decay = DECAY if name == "matrix" else 0.0
            weight, moments = state[name]
            state[name] = by_hand(weight, parameter.grad.double(), moments, step, lr, decay)
        optimizer.update(lr)
        for name, parameter in model.named_parameters():
            # fp32 against fp64.
            torch.testing.assert_close(parameter.double(), state[name][0], rtol=1e-5, atol=1e-6)
            assert parameter.grad is None, "no gradient reaches the next step"


def test_without_gradient_only_matrices_shrink():
    model, optimizer = make()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    (0 * model(inputs(1))).backward()
    optimizer.update(0.5)
    torch.testing.assert_close(model.matrix.detach(), before["matrix"] * (1 - 0.5 * DECAY))
    assert torch.equal(model.gain, before["gain"])


def test_the_norm_is_that_of_all_gradients_and_an_update_divides_them():
    model, optimizer = make()
    other_model, other = make()
    for one in (model, other_model):
        one(inputs(1)).backward()
    whole = torch.cat([p.grad.flatten() for p in model.parameters()])
    assert optimizer.squares().item() == pytest.approx(whole.double().square().sum().item(), rel=1e-6)
    for parameter in other_model.parameters():
        parameter.grad /= 8
    optimizer.update(1e-2, divisor=torch.tensor(8.0))
    other.update(1e-2)
    assert all(torch.equal(a, b) for a, b in zip(optimizer.state().values(), other.state().values(), strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_skipped_update_leaves_weights_moments_and_step_count(dtype):
    model, optimizer = make(dtype)
    model(inputs(1, dtype)).backward()
    optimizer.update(1e-2, torch.tensor(1.0), torch.tensor(0.0))
    before = [t.clone() for t in [*optimizer.masters.values(), *optimizer.state().values(), *model.parameters()]]
    model(inputs(2, dtype) * torch.nan).backward()
    optimizer.update(1e-2, torch.tensor(1.0), torch.tensor(1.0))
    after = [*optimizer.masters.values(), *optimizer.state().values(), *model.parameters()]
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
    assert all(m.grad is None for m in optimizer.masters.values())


def test_the_exponential_average_follows_the_weights():
    model = Model()
    optimizer = Optimizer(model, betas=BETAS, eps=EPS, weight_decay=DECAY, ema_decay=0.75)
    expected = model.gain.detach().clone()
    for step in range(1, 4):
        model(inputs(step)).backward()
        optimizer.update(1e-2)
        expected = 0.75 * expected + 0.25 * model.gain.detach()
    torch.testing.assert_close(optimizer.state()["ema.gain"], expected)


def test_bf16_gradients_are_summed_over_micro_batches_in_fp32():
    # Each bf16 gradient is kept as it is made; the sum of 40 would lose most of its digits in bf16.
    model, optimizer = make(torch.bfloat16)
    plain = Model(torch.bfloat16)
    sums = {name: torch.zeros(p.shape) for name, p in plain.named_parameters()}
    for seed in range(40):
        x = inputs(seed, torch.bfloat16)
        model(x).backward()
        assert all(p.grad is None for p in model.parameters()), "the bf16 gradient is not kept"
        plain.zero_grad()
        plain(x).backward()
        for name, parameter in plain.named_parameters():
            sums[name] += parameter.grad.float()
    for name, master in optimizer.masters.items():
        assert master.dtype == master.grad.dtype == torch.float32
        assert torch.equal(master.grad, sums[name]), name


def test_updates_too_small_for_bf16_add_up_in_the_masters():
    model, optimizer = make(torch.bfloat16)
    start = {name: master.clone() for name, master in optimizer.masters.items()}
    before = model.gain.detach().clone()
    for step in range(64):
        (model.gain.sum() + 0 * model(inputs(1, torch.bfloat16))).backward()
        optimizer.update(1e-4)
        if step == 0:
            assert torch.equal(model.gain, before), "one such step is lost in bf16"
    torch.testing.assert_close(optimizer.masters["gain"], start["gain"] - 64e-4, rtol=0, atol=1e-5)
    assert not torch.equal(model.gain, before)
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, optimizer.masters[name].bfloat16()), "the model is its masters, rounded"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_state_put_into_a_fresh_optimizer_continues_to_the_same_bits(dtype):
    def steps(model, optimizer, seeds):
        for seed in seeds:
            model(inputs(seed, dtype)).backward()
            optimizer.update(1e-2)

    model, optimizer = make(dtype)
    steps(model, optimizer, [1, 2])
    weights = {name: master.detach().clone() for name, master in optimizer.masters.items()}
    state = {name: tensor.clone() for name, tensor in optimizer.state().items()}
    assert set(state) == {f"{n}.{k}" for n in ("matrix", "gain") for k in ("step", "exp_avg", "exp_avg_sq")}
    steps(model, optimizer, [3, 4])

    other_model, other = make(dtype)
    other.load_weights(weights.__getitem__)
    other.load_state(state.__getitem__)
    steps(other_model, other, [3, 4])
    for name in ("matrix", "gain"):
        assert torch.equal(other.masters[name], optimizer.masters[name])
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), other_model.parameters(), strict=True))


def test_masters_keep_what_the_rounding_of_the_model_dropped():
    exact = {name: p.detach().clone() for name, p in Model().named_parameters()}
    model, optimizer = make(torch.bfloat16)
    assert torch.equal(optimizer.masters["matrix"], exact["matrix"])
    assert torch.equal(model.matrix, exact["matrix"].bfloat16())


def test_frozen_parameters_are_left_alone():
    model = Model()
    model.gain.requires_grad_(False)
    optimizer = Optimizer(model, betas=BETAS, eps=EPS, weight_decay=DECAY)
    before = model.gain.clone()
    model(inputs(1)).backward()
    optimizer.update(1.0)
    assert set(optimizer.masters) == {"matrix"}
    assert torch.equal(model.gain, before)
