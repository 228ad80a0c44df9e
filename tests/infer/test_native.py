"""The C++ decoder against torch, on every set of instructions that this CPU has; skipped where it is not built."""

import sys
import threading
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import small_models
from openelm.errors import UserError
from openelm.infer import native
from openelm.infer.native import NativeModel, NativeSlots
from openelm.interop.convert import convert
from openelm.interop.source import open_folder
from openelm.interop.target import Format
from openelm.model.cache import Cache
from openelm.model.folder import load_model, open_tensors, save_model
from openelm.model.geometry import ModelConfig
from openelm.model.quantize import Quantized, dequantize, fits, quantize
from openelm.model.transformer import OpenELM

built = pytest.mark.skipif(not native.available(), reason="the CPU decoder is not built")
# Nothing is a multiple of 16 here, and three queries share a key.
ODD: dict[str, Any] = dict(
    model_dim=50,
    num_transformer_layers=2,
    head_dim=10,
    num_gqa_groups=3,
    qkv_multipliers=(0.6, 1.2),
    ffn_multipliers=(0.5, 1.5),
    ffn_dim_divisor=7,
    vocab_size=77,
    share_input_output_layers=False,
    normalize_qk_projections=False,
    max_context_length=600,
)
LENGTH = 40


class RoundedCache(Cache):
    """A cache that holds what the decoder's holds: keys and values rounded to bf16."""

    def append(self, layer: int, k_BGTK: Tensor, v_BGTK: Tensor) -> tuple[Tensor, Tensor]:
        return super().append(layer, k_BGTK.bfloat16().float(), v_BGTK.bfloat16().float())


def rounded(x: Tensor, group: int) -> Tensor:
    """Activations as they come back from 8 bits, a scale for each group; the last may be short."""
    whole = torch.nn.functional.pad(x, (0, -x.shape[-1] % group)).unflatten(-1, (-1, group))
    scale = whole.abs().amax(-1, keepdim=True).clamp(min=1e-30) / 127
    return ((whole / scale).round() * scale).flatten(-2)[..., : x.shape[-1]]


@torch.no_grad()
def reference(model: OpenELM, ids: Tensor, group: int | None = None) -> Tensor:
    """Logits (T, V) of torch in fp32 with a cache in bf16, activations rounded to 8 bits in groups where given."""

    def round_input(_: torch.nn.Module, inputs: tuple[Tensor]) -> tuple[Tensor]:
        return (rounded(inputs[0], group),) if group else inputs

    linear = [module for module in model.modules() if isinstance(module, torch.nn.Linear)]
    hooks = [module.register_forward_pre_hook(round_input) for module in linear]
    cache = RoundedCache(model.config, 1, len(ids))
    (hidden,) = round_input(model, (model.hidden(ids[None], cache=cache)[0],))
    for hook in hooks:
        hook.remove()
    return hidden @ model.output_weight.T


def random_ids(config: ModelConfig, count: int = LENGTH, seed: int = 0) -> Tensor:
    return torch.randint(0, config.vocab_size, (count,), generator=torch.Generator().manual_seed(seed))


def token_by_token(model: NativeModel, ids: Tensor) -> Tensor:
    slots = model.slots(1, len(ids))
    return torch.cat([slots.decode([0], ids[t : t + 1]).clone() for t in range(len(ids))])


def after(slots: NativeSlots, slot: int, ids: Tensor | list[int]) -> Tensor:
    """Logits (V,) after tokens behind those that a slot holds."""
    return slots.prefill([slot], [ids])[0]


def distance(logits: Tensor, expected: Tensor) -> float:
    """The largest difference, in standard deviations of the logits."""
    return float((logits - expected).abs().max() / expected.std())


@pytest.fixture(params=["uneven", "odd"])
def folder(request, tmp_path, golden_weights) -> Path:
    """A model in bf16: uneven layers, or widths that fill no tile."""
    model = small_models.make(golden_weights, **(ODD if request.param == "odd" else {}))
    return save_model(model, tmp_path / "model", dtype=torch.bfloat16)


@pytest.fixture
def uneven(tmp_path, golden_weights) -> Path:
    return save_model(small_models.make(golden_weights), tmp_path / "model", dtype=torch.bfloat16)


def isas() -> list[str]:
    return native.kernels() if native.available() else ["none"]


@built
@pytest.mark.parametrize("isa", isas())
@pytest.mark.parametrize("threads", [1, 3])
def test_decoding_gives_torch_logits(folder, isa, threads):
    expected = load_model(folder, dtype=torch.float32)
    ids = random_ids(expected.config)
    logits = token_by_token(NativeModel.load(folder, isa=isa, threads=threads), ids)
    # Weights and cache are the same numbers, the order of sums is not; a key between two numbers may round either way.
    assert distance(logits, reference(expected, ids)) < 2e-3


@built
def test_golden_logits_of_corenet(tmp_path, golden, golden_tiny, golden_weights):
    model = OpenELM(ModelConfig(**golden("tiny")["config"]))
    model.load_state_dict(golden_weights(model, golden("tiny")["seed"]))
    folder = save_model(model, tmp_path / "model")  # in fp32: the decoder takes it as bf16
    tokens, expected = golden_tiny["tokens"][:-1], golden_tiny["logits"]
    logits = token_by_token(NativeModel.load(folder), tokens)
    assert distance(logits, expected) < 0.1  # the weights' rounding
    for parameter in model.parameters():
        if parameter.dim() == 2:
            parameter.data = parameter.bfloat16().float()
    assert distance(logits, reference(model, tokens)) < 2e-3
    assert (logits.argmax(-1) == expected.argmax(-1)).float().mean() > 0.95


def assert_same_rounding(model: NativeModel, expected: OpenELM, group: int | None) -> None:
    """Activations must be rounded as in ``reference``, to the same codes.

    One that stands on the edge between two codes may go either way, moves a logit by a hundredth, and with it all that
    follows. So most single tokens must agree, and of a text no more than what rounding costs is asked.
    """
    ids = random_ids(expected.config)
    alone = [
        distance(model.slots(1, 1).decode([0], id[None])[0], reference(expected, id[None], group)[0]) for id in ids
    ]
    assert sorted(alone)[len(alone) // 2] < 1e-3
    logits, wanted = token_by_token(model, ids), reference(expected, ids, group)
    assert (logits - wanted).std() / wanted.std() < 0.05
    assert distance(logits, wanted) < 0.3


@built
@pytest.mark.parametrize("isa", isas())
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("scales", [torch.bfloat16, torch.float16])
def test_quantised_folder_is_read_as_it_is(tmp_path, uneven, isa, bits, scales):
    convert(open_folder(uneven), "mlx", tmp_path / "mlx", Format(scales, f"{bits}bit", 32))
    expected, stored = load_model(tmp_path / "mlx", dtype=torch.float32), open_tensors(tmp_path / "mlx")
    for name, parameter in expected.named_parameters():
        if isinstance(packed := stored.raw(name), Quantized):  # not rounded to the dtype of its scales, as torch has it
            exact = replace(packed, scales=packed.scales.float(), biases=packed.biases.float())
            parameter.data = dequantize(exact)
    assert_same_rounding(NativeModel.load(tmp_path / "mlx", isa=isa), expected, 32)
    with pytest.raises(UserError, match=f"quantised to {bits} bits already"):
        NativeModel.load(tmp_path / "mlx", bits=12 - bits)


@built
@pytest.mark.parametrize("isa", isas())
@pytest.mark.parametrize("bits", [4, 8])
def test_rounding_at_load(folder, isa, bits):
    expected = load_model(folder, dtype=torch.float32)
    for parameter in expected.parameters():
        if parameter.dim() == 2 and bits == 8:
            scale = parameter.abs().amax(1, keepdim=True) / 127
            parameter.data = (parameter * (1 / scale)).round() * scale
        elif fits(tuple(parameter.shape), 32) and bits == 4:
            packed = quantize(parameter.bfloat16(), 4, 32)
            parameter.data = dequantize(replace(packed, scales=packed.scales.float(), biases=packed.biases.float()))
    plain = bits == 4 and expected.config.model_dim == ODD["model_dim"]  # no row is groups of 32: it stays in bf16
    group = None if plain else 32 if bits == 4 else 64
    assert_same_rounding(NativeModel.load(folder, isa=isa, bits=bits), expected, group)


@built
@pytest.mark.parametrize("isa", isas())
@pytest.mark.parametrize("bits", [None, 8, 4])
def test_a_prompt_at_once_is_the_same_as_token_by_token(folder, isa, bits):
    model = NativeModel.load(folder, bits=bits, isa=isa, threads=2)
    # Beyond a block of every size, and in the larger model beyond the 264 tokens that go through the layers together.
    ids = random_ids(model.config, min(model.config.max_context_length, 311))
    one_by_one = token_by_token(model, ids)
    # AVX-512 multiplies bf16 with bf16: a prompt's activations lose 2^-9 of their size. Else nothing may change.
    in_bf16 = isa == "avx512" and (bits is None or model.config.model_dim == ODD["model_dim"])
    tolerance = 0.1 if in_bf16 else 1e-4
    slots = model.slots(1, len(ids))
    for length in [*range(1, 30), 63, len(ids)]:
        slots.truncate(0, 0)
        assert distance(after(slots, 0, ids[:length]), one_by_one[length - 1]) < tolerance, length
        assert slots.length(0) == length
    slots.truncate(0, 0)
    all_at_once = slots.verify(0, ids)
    assert distance(all_at_once, one_by_one) < tolerance
    assert (all_at_once - one_by_one).std() / one_by_one.std() < tolerance / 10
    few = model.slots(1, 4).verify(0, ids[:4])
    assert distance(few, one_by_one[:4]) < 1e-4


@built
@pytest.mark.parametrize("isa", isas())
@pytest.mark.parametrize("bits", [None, 8, 4])
def test_the_pieces_that_a_prompt_comes_in_change_no_bit(folder, isa, bits):
    model = NativeModel.load(folder, bits=bits, isa=isa, threads=2)
    # In the larger model beyond the 264 tokens that go through the layers together.
    ids = random_ids(model.config, min(model.config.max_context_length, 311))
    prompt, last = ids[:-1], ids[-1:]
    for cut in ([1, 2, 3, 5, 7], [4, 16, 1], [1] * (len(prompt) - 1)):
        slots = model.slots(2, len(ids))
        whole = after(slots, 0, prompt)
        for piece in prompt.split([*cut, len(prompt) - sum(cut)]):
            in_pieces = after(slots, 1, piece)
        assert torch.equal(in_pieces, whole), cut
        # A token behind it reads all keys and values that were kept.
        behind = slots.decode([0, 1], torch.cat((last, last)))
        assert torch.equal(behind[0], behind[1]), cut


@built
@pytest.mark.parametrize("isa", isas())
@pytest.mark.parametrize("bits", [None, 8, 4])
def test_tokens_that_are_verified_have_the_bits_of_decoding(folder, isa, bits):
    model = NativeModel.load(folder, bits=bits, isa=isa, threads=2)
    ids = random_ids(model.config)
    # Of more than four, AVX-512 makes the activations bf16 where weights are; no row of the odd model has 4 bits.
    in_bf16 = bits is None or (bits == 4 and model.config.model_dim == ODD["model_dim"])
    most = 4 if isa == "avx512" and in_bf16 else 16
    for begun in (0, 1, 16, 21):
        one_by_one = model.slots(1, 64)
        if begun:
            one_by_one.prefill([0], [ids[:begun]])
        wanted = torch.cat([one_by_one.decode([0], ids[t : t + 1]).clone() for t in range(begun, begun + most + 1)])
        for count in range(1, most + 1):
            slots = model.slots(1, 64)
            if begun:
                slots.prefill([0], [ids[:begun]])
            verified = slots.verify(0, ids[begun : begun + count])
            assert torch.equal(verified, wanted[:count]), (begun, count)
            behind = slots.decode([0], ids[begun + count : begun + count + 1])
            assert torch.equal(behind[0], wanted[count]), (begun, count)


@built
@pytest.mark.parametrize("isa", isas())
@pytest.mark.parametrize("bits", [8, 4])
def test_with_rounded_weights_a_text_that_was_written_has_the_bits_of_one_that_is_read(uneven, isa, bits):
    model = NativeModel.load(uneven, bits=bits, isa=isa, threads=2)
    ids = random_ids(model.config)
    read, written = model.slots(1, 64), model.slots(1, 64)
    logits = after(read, 0, ids)
    for t in range(len(ids)):
        last = written.decode([0], ids[t : t + 1])[0].clone()
    assert torch.equal(last, logits)
    assert torch.equal(written.decode([0], [5]), read.decode([0], [5]))


@built
@pytest.mark.parametrize("isa", isas())
@pytest.mark.parametrize("bits", [None, 8, 4])
def test_slots_that_advance_together_are_each_as_if_alone(folder, isa, bits):
    model = NativeModel.load(folder, bits=bits, isa=isa, threads=2)
    most = 30
    texts = [random_ids(model.config, 1 + 7 * n % 23, seed=n) for n in range(most)]
    alone, together = model.slots(most, 32), model.slots(most, 32)
    for slots in (alone, together):
        slots.prefill(range(most), texts)
    next_B = random_ids(model.config, most, seed=99)
    for count in (1, 2, 3, 5, 8, 13, 30):
        chosen = [(11 * n + count) % most for n in range(count)]  # in no order
        wanted = torch.cat([alone.decode([slot], next_B[slot : slot + 1]).clone() for slot in chosen])
        assert torch.equal(together.decode(chosen, next_B[chosen]), wanted), count
    assert [together.length(n) for n in range(most)] == [alone.length(n) for n in range(most)]


@built
@pytest.mark.parametrize("bits", [None, 4])
def test_a_truncated_slot_goes_on_like_a_new_one(uneven, bits):
    model = NativeModel.load(uneven, bits=bits, threads=2)
    ids, other = random_ids(model.config), random_ids(model.config, seed=1)
    slots = model.slots(2, 64)
    for kept in (25, 24, 16, 3, 0):
        for slot in (0, 1):
            slots.truncate(slot, 0)
            for id in other[:kept].tolist():
                slots.decode([slot], [id])
        after(slots, 0, other[kept:])
        slots.truncate(0, kept)
        slots.truncate(1, kept)
        for id in ids[:5].tolist():
            assert torch.equal(slots.decode([0], [id]).clone(), slots.decode([1], [id]))


@built
@pytest.mark.parametrize("isa", isas())
def test_a_copied_slot_goes_on_like_the_one_it_was_copied_from(folder, isa):
    model = NativeModel.load(folder, isa=isa)
    slots, ids = model.slots(4, 48), random_ids(model.config)
    after(slots, 1, ids)  # which is longer than what comes in its place
    for length in (1, 16, 17, 31, 0):
        slots.truncate(0, 0)
        if length:
            after(slots, 0, ids[-length:])
        slots.copy(0, 1)
        slots.copy(0, 2)
        slots.copy(0, 0)
        assert [slots.length(slot) for slot in range(4)] == [length, length, length, 0]
        after(slots, 2, ids[:4])  # and is nobody else's
        for id in ids[:5].tolist():
            wanted = slots.decode([0], [id]).clone()
            assert torch.equal(slots.decode([1], [id]), wanted)


@built
def test_number_of_threads_changes_no_bit(uneven):
    ids = random_ids(NativeModel.load(uneven).config)
    for bits in (None, 8, 4):
        few, many = (NativeModel.load(uneven, bits=bits, threads=threads) for threads in (1, 5))
        assert torch.equal(token_by_token(few, ids), token_by_token(many, ids))
        assert torch.equal(few.slots(1, 64).verify(0, ids), many.slots(1, 64).verify(0, ids))
        texts = [ids[: 9 * n + 1] for n in range(4)]
        ones, others = few.slots(4, 64), many.slots(4, 64)
        assert torch.equal(ones.prefill(range(4), texts), others.prefill(range(4), texts))
        assert torch.equal(ones.decode(range(4), ids[:4]), others.decode(range(4), ids[:4]))


@built
def test_threads_with_slots_of_one_model_do_not_disturb_each_other(uneven):
    model = NativeModel.load(uneven, threads=2)
    texts = [random_ids(model.config, 30, seed) for seed in range(4)]
    alone = [token_by_token(model, ids) for ids in texts]
    found: dict[int, Tensor] = {}

    def call(number: int) -> None:
        found[number] = token_by_token(model, texts[number])

    callers = [threading.Thread(target=call, args=(number,)) for number in range(4)]
    for caller in callers:
        caller.start()
    for caller in callers:
        caller.join()
    assert all(torch.equal(found[n], alone[n]) for n in range(4))


@built
def test_only_logits_of_decode_are_written_over(uneven):
    model = NativeModel.load(uneven)
    slots = model.slots(2, 8)
    prompts = [slots.prefill([slot], [[1, 2]]) for slot in (0, 1)]
    first = slots.decode([0, 1], [3, 3])
    kept = first.clone()
    second = slots.decode([1], [4])
    assert torch.equal(*prompts) and prompts[0].data_ptr() != prompts[1].data_ptr()
    assert torch.equal(kept[0], kept[1]) and torch.equal(first[0], second[0]) and not torch.equal(kept[0], second[0])
    assert second.shape == (1, model.config.vocab_size)


@built
@pytest.mark.parametrize("ids", [[448], [-1], [1, 2, 2**31], [2**64], [-(2**40)], [], [1.5], [[1, 2]], ["a"], [None]])
def test_bad_token_ids_are_refused_and_nothing_is_lost(uneven, ids):
    slots = NativeModel.load(uneven).slots(3, 8)
    slots.prefill([0], [[1, 2]])
    for call in (
        lambda: slots.prefill([0], [ids]),
        lambda: slots.prefill([1, 0], [[5, 6], ids]),
        lambda: slots.verify(0, ids),
        lambda: slots.decode([1, 0], [3, *ids]),
    ):
        with pytest.raises(ValueError):
            call()
    assert [slots.length(slot) for slot in range(3)] == [2, 0, 0]
    slots.prefill([2], [[1, 2]])
    assert torch.equal(slots.decode([0], [3]).clone(), slots.decode([2], [3]))


@built
def test_more_tokens_than_there_is_room_for(uneven):
    model = NativeModel.load(uneven)
    slots = model.slots(2, 5)
    with pytest.raises(ValueError, match="6 tokens behind 0 are more than the capacity of 5"):
        slots.prefill([1, 0], [[1], [1] * 6])
    slots.prefill([0], [[1] * 5])
    with pytest.raises(ValueError, match="1 tokens behind 5"):
        slots.decode([1, 0], [1, 1])
    assert slots.length(1) == 0
    for length in (6, -1):
        with pytest.raises(ValueError, match="cannot cut"):
            slots.truncate(0, length)
    for capacity in (0, -1, 65, 2**40):
        with pytest.raises(ValueError, match="capacity"):
            model.slots(1, capacity)
    with pytest.raises(ValueError, match="0 slots"):
        model.slots(0, 5)


@built
def test_slots_that_are_not_there_or_named_twice(uneven):
    slots = NativeModel.load(uneven).slots(2, 8)
    for wrong in (2, -1):
        for call in (
            lambda wrong=wrong: slots.length(wrong),
            lambda wrong=wrong: slots.truncate(wrong, 0),
            lambda wrong=wrong: slots.copy(0, wrong),
            lambda wrong=wrong: slots.decode([0, wrong], [1, 1]),
            lambda wrong=wrong: slots.prefill([wrong], [[1]]),
            lambda wrong=wrong: slots.verify(wrong, [1]),
        ):
            with pytest.raises(ValueError, match=f"slot {wrong} is not one of 2"):
                call()
    for call in (lambda: slots.decode([1, 1], [1, 1]), lambda: slots.prefill([1, 1], [[1], [2]])):
        with pytest.raises(ValueError, match="twice"):
            call()
    for call in (lambda: slots.decode([0, 1], [1]), lambda: slots.prefill([0, 1], [[1]])):
        with pytest.raises(ValueError, match="do not fit"):
            call()
    assert slots.length(0) == slots.length(1) == 0


@built
def test_a_sequence_of_another_model_is_refused(uneven):
    one, other = NativeModel.load(uneven).slots(1, 4), NativeModel.load(uneven).slots(1, 4)
    one._sequences = other._each([0])
    with pytest.raises(ValueError, match="another model"):
        one.decode([0], [1])


@built
def test_slots_outlive_their_model(uneven):
    model = NativeModel.load(uneven)
    slots = model.slots(1, 4)
    slots.decode([0], [1])
    del model
    slots.decode([0], [2])
    assert slots.length(0) == 2


@built
def test_wrong_choices_are_named(uneven, monkeypatch):
    for wrong in ({"bits": 3}, {"group_size": 20}, {"threads": 0}, {"isa": "avx1024"}):
        with pytest.raises(UserError, match=str(*wrong.values())):
            NativeModel.load(uneven, **wrong)
    monkeypatch.setenv("OPENELM_ISA", "portable")
    assert NativeModel.load(uneven).isa == "portable"
    assert NativeModel.load(uneven, threads=3).threads == 3


@built
def test_what_does_not_belong_to_the_model_never_gets_into_it(uneven):
    extension = native._required()
    geometry: dict[str, Any] = dict(
        model_dim=64, head_dim=16, vocab_size=40, query_heads=[4], kv_heads=[2], ffn_dims=[32], qk_norm=False,
        shared_embedding=True, rope=[1.0] * 8, threads=1, kernels="",
    )  # fmt: skip
    for wrong in (
        dict(kv_heads=[3]), dict(kv_heads=[0]), dict(head_dim=15), dict(rope=[1.0]), dict(ffn_dims=[]), dict(threads=0),
        dict(ffn_dims=[-1]), dict(model_dim=0), dict(vocab_size=2**30), dict(query_heads=[2**30]), dict(kernels="?"),
    ):  # fmt: skip
        with pytest.raises(ValueError):
            extension.Model(**{**geometry, **wrong})
    model = extension.Model(**geometry)
    name, words = "layers.0.attn.out_proj.weight", np.zeros((64, 64), np.uint16)
    for call in (
        lambda: model.set_bf16("layers.1.attn.out_proj.weight", words, 16, 32),
        lambda: model.set_bf16(name, words[:, :32].copy(), 16, 32),
        lambda: model.set_bf16(name, words, 5, 32),
        lambda: model.set_bf16(name, words, 4, 7),
        lambda: model.set_gain("norm.weight", np.zeros(63, np.float32)),
        lambda: model.set_affine(name, words[:, :8].astype(np.uint32), words[:, :2].copy(), words[:, :1].copy(), 4, 32),
        lambda: model.set_affine(name, words[:, :7].astype(np.uint32), words[:, :2].copy(), words[:, :2].copy(), 4, 32),
        lambda: model.set_affine(name, words[:, :8].astype(np.uint32), *[words[:, :2].astype(np.int64)] * 2, 4, 32),
        lambda: model.decode([model.new_sequence(4)], np.zeros(1, np.int64), np.zeros((1, 48), np.float32)),
    ):
        with pytest.raises(ValueError):
            call()
    model.set_bf16(name, words, 16, 32)
    with pytest.raises(ValueError, match="there already"):
        model.set_bf16(name, words, 16, 32)
    with pytest.raises(TypeError):
        model.set_bf16(name, words.astype(np.float32), 16, 32)
    one, id, logits = model.new_sequence(4), np.zeros(1, np.int64), np.zeros((1, 48), np.float32)
    for wrong_logits in (np.zeros((1, 40), np.float32), np.zeros((2, 48), np.float32)):
        with pytest.raises(ValueError, match="padded vocabulary"):
            model.forward([one], id, [1], wrong_logits, False)
        with pytest.raises(ValueError, match="padded vocabulary"):
            model.decode([one], id, wrong_logits)
    for counts in ([2], [0], [-1], [1, 1], [], [2**62]):
        with pytest.raises(ValueError):
            model.forward([one], id, counts, logits, False)
    with pytest.raises(ValueError, match="do not fit"):
        model.forward([one, model.new_sequence(4)], id, [-1, 2], np.zeros((2, 48), np.float32), False)
    with pytest.raises(ValueError, match="one kind"):
        one.copy(model.new_sequence(40))


@built
def test_bytes_per_token_are_the_weights(uneven):
    config = NativeModel.load(uneven).config
    columns = config.matmul_parameters()
    assert NativeModel.load(uneven).bytes_per_token == 2 * columns
    assert NativeModel.load(uneven, bits=4).bytes_per_token == columns * (4 + 32 / 32) / 8
    eight = NativeModel.load(uneven, bits=8).bytes_per_token
    assert columns < eight < 1.35 * columns  # rows are filled up to whole groups of 64


@built
def test_read_bandwidth_is_measured():
    assert 1e8 < native.read_bandwidth(2, megabytes=8, rounds=2) < 1e13


@built
def test_weights_that_are_not_finite_do_not_crash(uneven):
    model = load_model(uneven)
    model.layers[1].ffn.proj_1.weight.data[3, 5] = float("nan")
    model.layers[0].attn.qkv_proj.weight.data[1] = float("inf")
    save_model(model, uneven, overwrite=True)
    for bits in (None, 8, 4):
        broken = NativeModel.load(uneven, bits=bits)
        assert broken.slots(1, 8).verify(0, [1, 2, 3]).shape == (3, model.config.vocab_size)


def test_without_the_extension_the_reason_is_said_once(tmp_path, monkeypatch, capsys):
    look = native._extension.__wrapped__  # whose answer is otherwise kept
    monkeypatch.setenv("OPENELM_NATIVE", str(tmp_path))
    monkeypatch.setattr(native, "_extension", look)
    assert not native.available() and not native.available()
    assert capsys.readouterr().err.count(f"OPENELM_NATIVE={tmp_path} holds no _native") == 1
    with pytest.raises(UserError, match="OPENELM_NATIVE="):
        NativeModel.load("anything")
    monkeypatch.delenv("OPENELM_NATIVE")
    monkeypatch.setitem(sys.modules, "openelm.infer._native", None)
    assert "install again with a C++ compiler, or go on with torch" in look()
