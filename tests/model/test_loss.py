"""The chunked loss and log-probabilities against the plain ones: values, gradients, memory."""

import pytest
import torch
import torch.nn.functional as F

from openelm.model import loss
from openelm.model.loss import fused_cross_entropy, target_log_probs

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


def peak_bytes(positions: int, dtype: torch.dtype, total=lambda *given: fused_cross_entropy(*given, Z)[0]) -> int:
    """The most that forward and backward hold at one time, beyond what was there before."""
    hidden, weight, targets = make(positions, 16, 64, dtype)
    with torch.profiler.profile(profile_memory=True) as profile:
        total(hidden, weight, targets).div(3).backward()
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


def products(work) -> int:
    """Matrix products that ``work`` makes."""
    with torch.profiler.profile() as profile:
        work()
    return sum(event.count for event in profile.key_averages() if event.key in ("aten::mm", "aten::addmm_"))


def test_without_gradients_the_loss_costs_one_product_a_chunk(monkeypatch):
    monkeypatch.setattr(loss, "CHUNK_LOGITS", 64 * 64)

    hidden, weight, targets = make(256, 16, 64)
    with torch.no_grad():
        # One product a chunk: the two for the gradients are not made.
        assert products(lambda: fused_cross_entropy(hidden, weight, targets)) == 256 // 64


def test_a_second_backward_is_refused_rather_than_scaled_twice():
    hidden, weight, targets = make(8, 12, 40)
    total, _ = fused_cross_entropy(hidden, weight, targets)
    (total / 2).backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="inplace"):
        (total / 2).backward()


# Log-probabilities


def plain_log_probs(hidden, weight, targets):
    """The same by the book, over all logits at once."""
    log_p = F.linear(hidden, weight).log_softmax(-1).gather(1, targets.clamp(min=0)[:, None])[:, 0]
    return log_p.where(targets != -100, 0.0)


def upstream(positions: int) -> torch.Tensor:
    """What each position counts: of both signs, as for chosen and rejected answers."""
    return torch.randn(positions, generator=torch.Generator().manual_seed(9))


@pytest.mark.parametrize("rows_a_chunk", [1, 7, 16, 25, 26, 1000])  # 25 of 32 positions count
def test_log_probabilities_and_gradients_are_the_plain_ones_wherever_chunks_end(monkeypatch, rows_a_chunk):
    monkeypatch.setattr(loss, "CHUNK_LOGITS", rows_a_chunk * 40)
    hidden, weight, targets = make(32, 12, 40)
    assert (targets != -100).sum() == 25
    found, expected = target_log_probs(hidden, weight, targets), plain_log_probs(hidden, weight, targets)
    assert torch.equal(found[targets == -100], torch.zeros(7))
    torch.testing.assert_close(found, expected, **CLOSE)
    counts = upstream(32)
    for ours, theirs in zip(
        torch.autograd.grad(found, (hidden, weight), counts),
        torch.autograd.grad(expected, (hidden, weight), counts),
        strict=True,
    ):
        torch.testing.assert_close(ours, theirs, **CLOSE)


def test_log_probabilities_of_fp32_are_exact_to_fp32():
    hidden, weight, targets = make(300, 32, 500)
    exact = [t.detach().double().requires_grad_() for t in (hidden, weight)]
    found, expected = target_log_probs(hidden, weight, targets), plain_log_probs(*exact, targets)
    # A log-probability of up to 30 is right to a few units of its last of 24 bits.
    assert (found - expected).abs().max() < 1e-5
    ours = torch.autograd.grad(found, (hidden, weight), upstream(300))
    theirs = torch.autograd.grad(expected, exact, upstream(300).double())
    for gradient, reference in zip(ours, theirs, strict=True):
        assert (gradient - reference).norm() / reference.norm() < 1e-6


def test_log_probabilities_of_bf16_are_within_bf16_of_the_exact_ones(monkeypatch):
    monkeypatch.setattr(loss, "CHUNK_LOGITS", 40 * 100)
    hidden, weight, targets = make(1000, 32, 40, torch.bfloat16)
    exact = [t.detach().double().requires_grad_() for t in (hidden, weight)]
    found, expected = target_log_probs(hidden, weight, targets), plain_log_probs(*exact, targets)
    assert found.dtype == torch.float32
    # Logits come out of a bf16 product: 2**-9 of a value of up to 16, twice; as often up as down.
    assert (found - expected).abs().max() < 2 * 16 * 2**-9
    assert (found - expected).mean().abs() < 2e-3
    ours = torch.autograd.grad(found, (hidden, weight), upstream(1000))
    theirs = torch.autograd.grad(expected, exact, upstream(1000).double())
    for gradient, reference in zip(ours, theirs, strict=True):
        assert gradient.dtype == torch.bfloat16
        assert (gradient.double() - reference).norm() / reference.norm() < 1e-2


def test_huge_logits_give_finite_log_probabilities_and_gradients():
    hidden, weight, targets = make(16, 12, 40)
    scaled = (hidden.detach() * 1e3).requires_grad_()
    found = target_log_probs(scaled, weight, targets)
    torch.testing.assert_close(found, plain_log_probs(scaled, weight, targets), **CLOSE)
    assert all(torch.isfinite(g).all() for g in torch.autograd.grad(found.sum(), (scaled, weight)))


def test_log_probabilities_of_nothing_are_zero_and_teach_nothing():
    hidden, weight, targets = make(8, 12, 40)
    found = target_log_probs(hidden, weight, torch.full_like(targets, -100))
    assert torch.equal(found, torch.zeros(8))
    assert all(torch.equal(g, torch.zeros_like(g)) for g in torch.autograd.grad(found.sum(), (hidden, weight)))


def test_a_frozen_side_of_log_probabilities_gets_no_gradient_and_costs_no_product(monkeypatch):
    monkeypatch.setattr(loss, "CHUNK_LOGITS", 64 * 64)
    hidden, weight, targets = make(256, 16, 64)
    chunks = -(-int((targets != -100).sum()) // 64)
    expected = torch.autograd.grad(target_log_probs(hidden, weight, targets), (hidden, weight), upstream(256))
    only_weight = target_log_probs(hidden.detach(), weight, targets)
    assert torch.equal(torch.autograd.grad(only_weight, weight, upstream(256))[0], expected[1])
    only_hidden = target_log_probs(hidden, weight.detach(), targets)
    found = []
    work = products(lambda: found.extend(torch.autograd.grad(only_hidden, hidden, upstream(256))))
    assert torch.equal(found[0], expected[0])
    assert work == 2 * chunks, "the logits again, and the gradient of the hidden states"


def test_log_probabilities_cost_one_product_a_chunk_and_none_for_what_does_not_count(monkeypatch):
    monkeypatch.setattr(loss, "CHUNK_LOGITS", 64 * 64)
    hidden, weight, targets = make(256, 16, 64)
    targets[:192] = -100  # a prompt
    assert products(lambda: target_log_probs(hidden, weight, targets)) == 1
    with torch.no_grad():
        assert not target_log_probs(hidden, weight, targets).requires_grad


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_peak_memory_of_log_probabilities_is_a_chunk_whatever_the_rows(monkeypatch, dtype):
    monkeypatch.setattr(loss, "CHUNK_LOGITS", 64 * 64)

    def total(hidden, weight, targets):
        return target_log_probs(hidden, weight, targets).sum()

    few, many = peak_bytes(512, dtype, total), peak_bytes(8192, dtype, total)
    # A row costs its gradient, and a dozen numbers of 4 or 8 bytes; its 64 logits alone would be 256 bytes.
    assert many - few <= (8192 - 512) * (16 * dtype.itemsize + 96)


def test_the_gradient_of_log_probabilities_can_be_asked_for_twice():
    hidden, weight, targets = make(20, 12, 40)
    found = target_log_probs(hidden, weight, targets)
    once = torch.autograd.grad(found, (hidden, weight), upstream(20), retain_graph=True)
    again = torch.autograd.grad(found, (hidden, weight), upstream(20))
    assert all(torch.equal(one, other) for one, other in zip(once, again, strict=True))


@pytest.mark.parametrize("rows_a_chunk", [1, 7, 25, 1000])  # 25 of 32 positions count
def test_a_known_number_of_targets_that_count_changes_nothing_but_the_work(monkeypatch, rows_a_chunk):
    monkeypatch.setattr(loss, "CHUNK_LOGITS", rows_a_chunk * 40)
    hidden, weight, targets = make(32, 12, 40)
    found, expected = (fused_cross_entropy(hidden, weight, targets, Z, counted) for counted in (25, None))
    gradients = [torch.autograd.grad(total / 7, (hidden, weight)) for total, _ in (found, expected)]
    for ours, theirs in zip((*found, *gradients[0]), (*expected, *gradients[1]), strict=True):
        torch.testing.assert_close(ours, theirs, **CLOSE)
    log_p = target_log_probs(hidden, weight, targets, 25)
    assert torch.equal(log_p, target_log_probs(hidden, weight, targets))


def test_a_prompt_costs_no_product_where_the_number_of_targets_is_known(monkeypatch):
    monkeypatch.setattr(loss, "CHUNK_LOGITS", 64 * 64)
    hidden, weight, targets = make(256, 16, 64)
    targets[:192] = -100
    counted = int((targets != -100).sum())
    assert products(lambda: fused_cross_entropy(hidden, weight, targets, Z, counted)) == 3
    assert products(lambda: fused_cross_entropy(hidden, weight, targets, Z)) == 3 * 4
    nothing, z_loss = fused_cross_entropy(hidden, weight, torch.full_like(targets, -100), Z, 0)
    assert nothing.item() == z_loss.item() == 0
    assert not any(gradient.any() for gradient in torch.autograd.grad(nothing, (hidden, weight)))
