"""Slots on torch: however tokens are dealt out to them, logits are those of the whole text at once."""

import pytest
import torch

from openelm.infer import torch_decoder
from openelm.infer.torch_decoder import TorchDecoder, _Step
from openelm.model.transformer import OpenELM
from small_models import make_varied

# fp32 with sums in another order: logits of a few units differ in the sixth digit.
CLOSE = dict(rtol=1e-4, atol=1e-5)


@pytest.fixture(scope="module")
def model() -> OpenELM:
    return make_varied(vocab_size=352)


def random_ids(count, seed=0):
    return torch.randint(3, 352, (count,), generator=torch.Generator().manual_seed(seed)).tolist()


def after(model, ids):
    """The plain way: logits (T, V) of the whole text at once."""
    with torch.no_grad():
        return model(torch.tensor([ids]))[0]


def stepped(model, count, capacity):
    """Slots that decode in the form that a GPU's graph has."""
    slots = TorchDecoder(model).slots(count, capacity)
    slots._step = _Step(model, slots._rows, compile=False)
    return slots


@pytest.fixture(params=["eager", "step"])
def make_slots(request, model):
    return stepped if request.param == "step" else lambda model, *sizes: TorchDecoder(model).slots(*sizes)


def test_prompts_of_different_lengths_then_any_of_the_slots_in_any_order(model, make_slots):
    slots = make_slots(model, 4, 32)
    texts = [random_ids(n, seed=n) for n in (12, 5, 1, 9)]
    logits_BV = slots.prefill([0, 1, 2, 3], texts)
    for row, text in enumerate(texts):
        torch.testing.assert_close(logits_BV[row], after(model, text)[-1], **CLOSE)
    for step, rows in enumerate([[0, 1, 2, 3], [0, 1, 2, 3], [2, 0], [3], [1, 2, 3], [0, 1, 2, 3]]):
        new = random_ids(len(rows), seed=50 + step)
        logits_BV = slots.decode(rows, torch.tensor(new))
        for place, (row, id) in enumerate(zip(rows, new, strict=True)):
            texts[row].append(id)
            torch.testing.assert_close(logits_BV[place], after(model, texts[row])[-1], **CLOSE)
    assert [slots.length(row) for row in range(4)] == [len(text) for text in texts]


def test_slots_of_one_length_go_on_together(model, make_slots):
    slots = make_slots(model, 3, 24)
    texts = [random_ids(10, seed=n) for n in range(3)]
    slots.prefill([0, 1, 2], texts)
    for step in range(4):
        new = random_ids(3, seed=70 + step)
        logits_BV = slots.decode([0, 1, 2], torch.tensor(new))
        for row in range(3):
            texts[row].append(new[row])
            torch.testing.assert_close(logits_BV[row], after(model, texts[row])[-1], **CLOSE)
    # More of each behind what they hold, of different lengths.
    more = [random_ids(n, seed=n) for n in (10, 3, 1)]
    logits_BV = slots.prefill([0, 1, 2], more)
    for row in range(3):
        torch.testing.assert_close(logits_BV[row], after(model, texts[row] + more[row])[-1], **CLOSE)


def test_verify_gives_the_logits_after_each_token_and_truncate_takes_them_back(model, make_slots):
    slots, text = make_slots(model, 2, 24), random_ids(9)
    slots.prefill([1], [text])
    drafted = random_ids(5, seed=3)
    expected = after(model, text + drafted)[9:]
    torch.testing.assert_close(slots.verify(1, drafted), expected, **CLOSE)
    slots.truncate(1, 11)
    torch.testing.assert_close(slots.decode([1], torch.tensor(drafted[2:3]))[0], expected[2], **CLOSE)
    with pytest.raises(ValueError, match="holds 12 tokens: it cannot be cut to 13"):
        slots.truncate(1, 13)


def test_a_copy_goes_on_by_itself(model, make_slots):
    slots, text = make_slots(model, 3, 24), random_ids(9)
    slots.prefill([0], [text])
    slots.copy(0, 2)
    logits_BV = slots.decode([0, 2], torch.tensor([7, 8]))
    for row, id in enumerate((7, 8)):
        torch.testing.assert_close(logits_BV[row], after(model, [*text, id])[-1], **CLOSE)


def test_a_full_slot_is_left_as_it_is_by_the_others(model):
    slots = stepped(model, 2, 12)
    full, other = random_ids(12), random_ids(4, seed=1)
    slots.prefill([0, 1], [full, other])
    for id in random_ids(5, seed=2):
        slots.decode([1], torch.tensor([id]))
        other.append(id)
    slots.truncate(0, 11)
    logits_BV = slots.decode([0, 1], torch.tensor([full[11], 9]))
    torch.testing.assert_close(logits_BV[0], after(model, full)[-1], **CLOSE)
    torch.testing.assert_close(logits_BV[1], after(model, [*other, 9])[-1], **CLOSE)


def test_what_stood_in_a_slot_before_does_not_matter(model, make_slots):
    logits = []
    for seed in (3, 300):
        slots = make_slots(model, 2, 20)
        slots.prefill([0, 1], [random_ids(15, seed=seed), random_ids(15, seed=seed + 1)])
        slots.truncate(0, 0)
        slots.truncate(1, 0)
        slots.prefill([0, 1], [random_ids(6), random_ids(2)])
        logits.append(slots.decode([0, 1], torch.tensor([5, 6])).clone())
    assert torch.equal(*logits)


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda slots: slots.prefill([0], [list(range(9))]), "9 tokens behind 0 are more than the capacity of 8"),
        (lambda slots: slots.prefill([0], [[]]), "no token"),
        (lambda slots: slots.prefill([0], [[5, 352]]), "outside the vocabulary of 352"),
        (lambda slots: slots.verify(0, [-1]), "outside the vocabulary of 352"),
        (lambda slots: slots.decode([1], torch.tensor([4])), "behind 8 are more than the capacity of 8"),
    ],
)
def test_what_does_not_fit_is_refused_and_changes_nothing(model, call, message):
    slots = TorchDecoder(model).slots(2, 8)
    slots.prefill([1], [random_ids(8)])
    with pytest.raises(ValueError, match=message):
        call(slots)
    assert [slots.length(0), slots.length(1)] == [0, 8]


def test_a_capacity_beyond_the_context_is_refused(model):
    with pytest.raises(ValueError, match="the model's context allows 1 to 64"):
        TorchDecoder(model).slots(1, 65)


def test_without_a_compiler_that_is_said_once_and_decoding_goes_on(model, monkeypatch, capsys):
    torch_decoder.has_compiler.cache_clear()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch_decoder.shutil, "which", lambda name: None)
    assert not TorchDecoder(model, compile=True).compile
    assert not TorchDecoder(model, compile=True).compile
    assert capsys.readouterr().err.count("a C++ compiler") == 1
    torch_decoder.has_compiler.cache_clear()


@pytest.mark.slow  # the compiler takes half a minute
@pytest.mark.skipif(not torch_decoder.has_compiler(), reason="there is no compiler")
def test_the_compiled_step_gives_the_same(model):
    slots = TorchDecoder(model, compile=True).slots(2, 20)
    texts = [random_ids(6), random_ids(3, seed=1)]
    slots.prefill([0, 1], texts)
    for rows, new in (([0, 1], [5, 6]), ([1], [9]), ([0, 1], [7, 8])):
        logits_BV = slots.decode(rows, torch.tensor(new))
        for place, (row, id) in enumerate(zip(rows, new, strict=True)):
            texts[row].append(id)
            torch.testing.assert_close(logits_BV[place], after(model, texts[row])[-1], **CLOSE)
