"""The chunked loss against the plain one: values, gradients, memory."""

import pytest
import torch
import torch.nn.functional as F

from openelm.model import loss
from openelm.model.loss import fused_cross_entropy

# fp32: sums of a few hundred terms in another order.
CLOSE = dict(rtol=1e-5, atol=1e-6)
Z = 1e-2


def make(positions: int, width: int, vocabulary: int, dtype: torch.dtype = torch.float32):
    draw = torch.Generator().manual_seed(positions)
    hidden = torch.randn(positions, width, generator=draw).to(dtype).requires_grad_()
    weight = (torch.randn(vocabulary, width, generator=draw) / 2).to(dtype).requires_grad_()
    targets = torch.randint(0, vocabulary, (positions,), generator=draw)
    targets[::5] = -100
    return hidden, weight, targets


def plain(hidden, weight, targets, z_weight=0.0):
    """(cross-entropy + z-loss, z-loss) by the book, over all logits at once."""
    logits = F.linear(hidden, weight).float()
    z_loss = z_weight * logits.logsumexp(-1).square()[targets != -100].sum()
    return F.cross_entropy(logits, targets, ignore_index=-100, reduction="sum") + z_loss, z_loss


@pytest.mark.parametrize("z_weight", [0.0, Z])
@pytest.mark.parametrize("rows_a_chunk", [1, 7, 16, 32, 33, 1000])
def test_loss_and_gradients_are_the_plain_ones_wherever_chunks_end(monkeypatch, rows_a_chunk, z_weight):
    monkeypatch.setattr(loss, "CHUNK_LOGITS", rows_a_chunk * 40)
    hidden, weight, targets = make(32, 12, 40)
    total, z_loss = fused_cross_entropy(hidden, weight, targets, z_weight)
    found = torch.autograd.grad(total / 7, (hidden, weight))
    expected_total, expected_z = plain(hidden, weight, targets, z_weight)
    expected = torch.autograd.grad(expected_total / 7, (hidden, weight))
    torch.testing.assert_close(total, expected_total, **CLOSE)
    torch.testing.assert_close(z_loss, expected_z, **CLOSE)
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs, **CLOSE)


def test_a_vocabulary_wider_than_a_chunk_is_taken_a_row_at_a_time(monkeypatch):
    monkeypatch.setattr(loss, "CHUNK_LOGITS", 10)
    hidden, weight, targets = make(6, 12, 40)
    torch.testing.assert_close(fused_cross_entropy(hidden, weight, targets)[0], plain(hidden, weight, targets)[0])


def test_ignored_targets_bring_neither_loss_nor_gradient():
    hidden, weight, targets = make(20, 12, 40)
    total, z_loss = fused_cross_entropy(hidden, weight, targets, Z)
    d_hidden, d_weight = torch.autograd.grad(total, (hidden, weight))
    kept = targets != -100
    alone, alone_z = fused_cross_entropy(hidden[kept], weight, targets[kept], Z)
    torch.testing.assert_close(total, alone, **CLOSE)
    torch.testing.assert_close(z_loss, alone_z, **CLOSE)
    assert torch.equal(d_hidden[~kept], torch.zeros_like(d_hidden[~kept]))
    torch.testing.assert_close(d_weight, torch.autograd.grad(alone, weight)[0], **CLOSE)


def test_nothing_but_ignored_targets_is_a_loss_of_zero():
    hidden, weight, targets = make(8, 12, 40)
    total, z_loss = fused_cross_entropy(hidden, weight, torch.full_like(targets, -100), Z)
    d_hidden, d_weight = torch.autograd.grad(total, (hidden, weight))
    assert total.item() == z_loss.item() == d_hidden.abs().max().item() == d_weight.abs().max().item() == 0


def test_huge_logits_stay_finite():
    hidden, weight, targets = make(16, 12, 40)
    scaled = (hidden.detach() * 1e3).requires_grad_()
    total, _ = fused_cross_entropy(scaled, weight, targets)
    torch.testing.assert_close(total, plain(scaled, weight, targets)[0], **CLOSE)
    assert all(torch.isfinite(g).all() for g in torch.autograd.grad(total, (scaled, weight)))


def test_bf16_gradients_are_within_bf16_of_the_exact_ones(monkeypatch):
    # Inputs are bf16 numbers, so the exact gradients of the same numbers can be had in fp64.
    monkeypatch.setattr(loss, "CHUNK_LOGITS", 40 * 100)
    hidden, weight, targets = make(1000, 32, 40, torch.bfloat16)
    count = 777  # no power of two: dividing by it must not be rounded to bf16 first
    total, _ = fused_cross_entropy(hidden, weight, targets, Z)
    found = torch.autograd.grad(total / count, (hidden, weight))
    exact = [t.detach().double().requires_grad_() for t in (hidden, weight)]
    logits = F.linear(*exact)
    z_loss = Z * logits.logsumexp(-1).square()[targets != -100].sum()
    expected_total = F.cross_entropy(logits, targets, ignore_index=-100, reduction="sum") + z_loss
    expected = torch.autograd.grad(expected_total / count, exact)
    # Logits come out of a bf16 product (8 bits: 2**-9 of a value, here up to 8), the loss is their mean error.
    assert total.item() == pytest.approx(expected_total.item(), rel=2e-3)
    for ours, theirs in zip(found, expected, strict=True):
        assert ours.dtype == torch.bfloat16
        error = (ours.double() - theirs).norm() / theirs.norm()
        assert error < 1e-2
        # Rounding is as often up as down: as a whole the gradient must be neither longer nor shorter.
        assert ((ours.double() * theirs).sum() / theirs.square().sum()).item() == pytest.approx(1, abs=1e-3)


def test_weight_gradients_are_summed_over_chunks_in_fp32(monkeypatch):
    # 2,000 equal terms: a sum kept in bf16 stops growing at 256 of them.
    monkeypatch.setattr(loss, "CHUNK_LOGITS", 1)
    hidden = torch.ones(2000, 1, dtype=torch.bfloat16)
    weight = torch.zeros(2, 1, dtype=torch.bfloat16, requires_grad=True)
    total, _ = fused_cross_entropy(hidden, weight, torch.zeros(2000, dtype=torch.long))
    assert torch.autograd.grad(total, weight)[0].flatten().tolist() == [-1000, 1000]


def test_a_frozen_side_gets_no_gradient_and_changes_none():
    hidden, weight, targets = make(20, 12, 40)
    expected = torch.autograd.grad(fused_cross_entropy(hidden, weight, targets, Z)[0], (hidden, weight))
    only_hidden = fused_cross_entropy(hidden, weight.detach(), targets, Z)[0]
    only_weight = fused_cross_entropy(hidden.detach(), weight, targets, Z)[0]
    assert torch.equal(torch.autograd.grad(only_hidden, hidden)[0], expected[0])
    assert torch.equal(torch.autograd.grad(only_weight, weight)[0], expected[1])


def peak_bytes(positions: int, dtype: torch.dtype) -> int:
    """The most that forward and backward hold at one time, beyond what was there before."""
    hidden, weight, targets = make(positions, 16, 64, dtype)
    with torch.profiler.profile(profile_memory=True) as profile:
        fused_cross_entropy(hidden, weight, targets, Z)[0].div(3).backward()
    assert profile.profiler is not None
    events = profile.profiler.kineto_results.events()
    changes = [(e.start_ns(), e.nbytes()) for e in events if e.name() == "[memory]"]
    alive = peak = 0
    for _, change in sorted(changes, key=lambda entry: entry[0]):
        alive += change
        peak = max(peak, alive)
    return peak


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_peak_memory_beyond_the_gradient_of_the_hidden_states_does_not_grow_with_rows(monkeypatch, dtype):
    monkeypatch.setattr(loss, "CHUNK_LOGITS", 64 * 64)
    few, many = peak_bytes(512, dtype), peak_bytes(8192, dtype)
    gradient_grows = (8192 - 512) * 16 * dtype.itemsize
    # The plain loss would grow by 64 logits a row; a copy of the gradient by as much again.
    assert few > 512 * 16 * dtype.itemsize, "the measurement sees the gradient"
    assert many - few <= gradient_grows + 1024  # a few scalars of the chunks' bookkeeping


def test_without_gradients_the_loss_costs_one_product_a_chunk(monkeypatch):
    monkeypatch.setattr(loss, "CHUNK_LOGITS", 64 * 64)

    def calls_of_mm(positions: int) -> int:
        hidden, weight, targets = make(positions, 16, 64)
        with torch.no_grad(), torch.profiler.profile() as profile:
            fused_cross_entropy(hidden, weight, targets)
        return sum(event.count for event in profile.key_averages() if event.key in ("aten::mm", "aten::addmm_"))

    # One product a chunk: the two for the gradients are not made.
    assert calls_of_mm(256) == 256 // 64


def test_a_second_backward_is_refused_rather_than_scaled_twice():
    hidden, weight, targets = make(8, 12, 40)
    total, _ = fused_cross_entropy(hidden, weight, targets)
    (total / 2).backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="inplace"):
        (total / 2).backward()
