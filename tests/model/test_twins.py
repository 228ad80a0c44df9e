"""Twins: as large and as dear to train as their model, counted here anew from their heads and widths."""

import random
from collections.abc import Sequence
from functools import cache
from itertools import pairwise, product
from typing import Any

import numpy as np
import pytest

import small_models
from openelm.config import ModelSection
from openelm.errors import UserError
from openelm.model.geometry import SIZES, ModelConfig
from openelm.model.twins import KINDS, WITHIN, difference, model_section, nearest, twin

SMALL: dict[str, Any] = dict(
    model_dim=96, num_transformer_layers=8, head_dim=16, num_gqa_groups=1, ffn_dim_divisor=16, vocab_size=2048
)
MODELS = {
    **{size: ModelConfig.from_name(size) for size in SIZES},
    "small": ModelConfig(**SMALL, max_context_length=256),
    "tiny": ModelConfig(**{**small_models.SCALED, "num_gqa_groups": 1, "num_transformer_layers": 12}),
}
BOTH = list(product(MODELS, KINDS))


def counted(
    model: ModelConfig, row_length: int, heads: Sequence[int] = (), widths: Sequence[int] = ()
) -> tuple[int, int]:
    """(parameters, training FLOPs a token) of lists of heads and FFN widths, by default the model's, term by term."""
    width, head, groups = model.model_dim, model.head_dim, model.num_gqa_groups
    matrices, gains, flops = 0, width, 0
    for query, ffn in zip(heads or model.num_query_heads, widths or model.ffn_dims, strict=True):
        projections = width * head * (query + 2 * query // groups) + query * head * width
        matrices += projections + 3 * width * ffn
        gains += 2 * width + (2 * head if model.normalize_qk_projections else 0)
        flops += 6 * row_length * query * head  # scores and their sums over half of the square, three times 2 FLOPs
    table = model.vocab_size * width
    tables = table if model.share_input_output_layers else 2 * table
    return matrices + gains + tables, flops + 6 * (matrices + table)


def off(found: ModelConfig, model: ModelConfig, row_length: int) -> float:
    """The larger of the two differences, as a share."""
    pairs = zip(counted(found, row_length), counted(model, row_length), strict=True)
    return max(abs(ours / theirs - 1) for ours, theirs in pairs)


def least_off_alike(found: ModelConfig, model: ModelConfig, heads: int) -> float:
    """How near a model like ``found`` comes with these heads and one width, any that can be chosen, in all layers."""
    layers, length = found.num_transformer_layers, model.max_context_length
    bare, wider = (counted(found, length, [heads] * layers, [width] * layers) for width in (0, 1))
    step = model.ffn_dim_divisor
    while step % 2 == 0:
        step //= 2
    width = np.arange(step, 8 * model.model_dim, step)
    offs = [
        abs((none + width * (one - none)) / wanted - 1)
        for none, one, wanted in zip(bare, wider, counted(model, length), strict=True)
    ]
    return float(np.maximum(*offs).min())


@cache
def twin_of(name: str, kind: str, row_length: int | None = None) -> ModelConfig:
    """Found once for all tests."""
    return twin(MODELS[name], kind, row_length=row_length)


@pytest.mark.parametrize(("name", "kind"), BOTH)
def test_a_twin_has_as_many_parameters_and_flops(name: str, kind: str) -> None:
    model = MODELS[name]
    for found, row_length in (
        (twin_of(name, kind), model.max_context_length),
        (twin_of(name, kind, model.max_context_length // 8), model.max_context_length // 8),
    ):
        assert off(found, model, row_length) <= WITHIN == 0.005
        assert found.num_parameters() == counted(found, row_length)[0]
        assert difference(found, model, row_length).size == pytest.approx(off(found, model, row_length), abs=1e-12)


@pytest.mark.parametrize(("name", "kind"), BOTH)
def test_a_twin_differs_in_nothing_but_its_layers_and_its_kind(name: str, kind: str) -> None:
    model, found = MODELS[name], twin_of(name, kind)
    scaling = {"qkv_multipliers", "ffn_multipliers", "ffn_dim_divisor", "num_query_heads", "num_kv_heads"}
    theirs, ours = model.as_dict(), found.as_dict()
    differing = {field for field in ours if ours[field] != theirs[field]}
    assert differing - scaling == {key for key, value in KINDS[kind].changes.items() if theirs[key] != value}
    assert all(ours[key] == value for key, value in KINDS[kind].changes.items())
    assert model.ffn_dim_divisor % found.ffn_dim_divisor == 0
    assert all(width % found.ffn_dim_divisor == 0 for width in found.ffn_dims)


@pytest.mark.parametrize("size", SIZES)
def test_the_layer_wise_twin_of_a_size_is_the_size_itself(size: str) -> None:
    assert twin(MODELS[size], "layer-wise") == MODELS[size]


def test_twins_of_the_released_sizes_have_the_released_heads_and_widths(golden: Any) -> None:
    for name, size in (("270M", "270M"), ("450M", "450M"), ("1_1B", "1.1B"), ("3B", "3B")):
        released = golden("geometry")[f"OpenELM-{name}"]
        for kind in ("layer-wise", "layer-norm", "no-qk-norm"):
            found = twin(MODELS[size], kind)
            assert list(found.num_query_heads) == released["num_query_heads"]
            assert list(found.ffn_dims) == released["ffn_dims"]
        assert list(twin(MODELS[size], "attention").num_query_heads) == released["num_query_heads"]


def test_the_reversed_twin_of_270m_is_its_mirror() -> None:
    model, found = MODELS["270M"], twin(MODELS["270M"], "reversed")
    assert found.num_query_heads == model.num_query_heads[::-1]
    assert found.ffn_dims == model.ffn_dims[::-1]
    assert found.num_parameters() == 271_527_168


def test_a_uniform_model_is_its_own_uniform_twin(golden: Any) -> None:
    expected = golden("geometry")["uniform-example"]
    model = ModelConfig(
        model_dim=256, num_transformer_layers=4, num_gqa_groups=1, qkv_multipliers=1.0, ffn_multipliers=3.0
    )
    found = twin(model, "uniform")
    assert list(found.num_query_heads) == expected["num_query_heads"]
    assert list(found.ffn_dims) == expected["ffn_dims"]


@pytest.mark.parametrize(
    ("size", "heads", "width"), [("270M", 16, 2880), ("1.1B", 24, 4608), ("3B", 20, 6720)], ids=["270M", "1.1B", "3B"]
)
def test_the_uniform_twin_of_a_size_has_these_heads_and_this_width(size: str, heads: int, width: int) -> None:
    found = twin(MODELS[size], "uniform")
    assert set(found.num_query_heads) == {heads} and set(found.ffn_dims) == {width}


@pytest.mark.parametrize(("name", "kind"), [(name, kind) for name, kind in BOTH if KINDS[kind].attention == "alike"])
def test_heads_are_alike_unless_no_alike_heads_come_near(name: str, kind: str) -> None:
    found = twin_of(name, kind)
    counts = sorted(set(found.num_query_heads))
    if len(counts) == 1:
        return
    assert len(counts) == 2 and counts[1] - counts[0] == found.num_gqa_groups
    # Evenly spread: any so many layers in a row have as many of the wider, give or take one.
    wider = [heads == counts[1] for heads in found.num_query_heads]
    for length in range(1, len(wider)):
        of_each = [sum(wider[i : i + length]) for i in range(len(wider) - length + 1)]
        assert max(of_each) - min(of_each) <= 1
    if kind != "ffn":
        assert min(least_off_alike(found, MODELS[name], heads) for heads in counts) > WITHIN


@pytest.mark.parametrize("name", MODELS)
def test_layers_grow_shrink_or_stay_as_the_kind_says(name: str) -> None:
    def grows(values: tuple[int, ...]) -> bool:
        return all(low <= high for low, high in pairwise(values)) and values[0] < values[-1]

    found = {kind: twin_of(name, kind) for kind in KINDS}
    for kind in ("layer-wise", "attention", "layer-norm", "no-qk-norm"):
        assert grows(found[kind].num_query_heads)
    for kind in ("layer-wise", "ffn", "layer-norm", "no-qk-norm"):
        assert grows(found[kind].ffn_dims)
    assert grows(found["reversed"].num_query_heads[::-1]) and grows(found["reversed"].ffn_dims[::-1])
    for kind in ("uniform", "attention", "llama"):
        assert len(set(found[kind].ffn_dims)) == 1
    assert found["llama"].num_kv_heads == found["llama"].num_query_heads
    assert found["layer-norm"].normalization_layer_name == "layer_norm"
    assert not found["no-qk-norm"].normalize_qk_projections and not found["llama"].normalize_qk_projections


@pytest.mark.parametrize(("name", "kind"), BOTH)
def test_a_recipes_section_makes_the_same_twin(name: str, kind: str) -> None:
    model, found = MODELS[name], twin_of(name, kind)
    section = ModelSection(**model_section(found), max_context_length=model.max_context_length)
    built = section.build(vocab_size=model.vocab_size, bos_id=model.bos_token_id, eos_id=model.eos_token_id)
    assert (built.num_query_heads, built.num_kv_heads) == (found.num_query_heads, found.num_kv_heads)
    assert built.ffn_dims == found.ffn_dims
    assert built.num_parameters() == found.num_parameters()
    assert built == found


def test_where_no_twin_is_near_the_nearest_is_named_with_its_figures() -> None:
    model = ModelConfig(**{**SMALL, "num_transformer_layers": 1, "num_gqa_groups": 6}, qkv_multipliers=1.0)
    assert model.num_query_heads == (6,)
    with pytest.raises(UserError) as caught:
        twin(MODELS["270M"], "llama", within=1e-9)
    found = nearest(MODELS["270M"], "llama", within=1e-9)
    said = str(caught.value)
    assert "no llama twin of 271,527,168 parameters is within 1e-07%" in said
    assert f"the nearest has {found.num_parameters():,} (" in said and str(difference(found, MODELS["270M"])) in said
    assert f"FFNs of {found.ffn_dims[0]:,} to" in said and "allow more" in said
    # One layer of one group has no width of heads but its own; its FFN is scaled to what is left.
    wide = model.changed(ffn_multipliers=8.0)
    assert twin(wide, "layer-wise").ffn_dims == (768,)
    assert twin(wide, "uniform").ffn_dims == wide.ffn_dims == (768,)


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("kind", ["uniform", "llama"])
def test_the_nearest_is_as_near_as_any_with_alike_layers(name: str, kind: str) -> None:
    model, found = MODELS[name], nearest(MODELS[name], kind, within=0.0)
    group = found.num_gqa_groups
    mean = sum(model.num_query_heads) / model.num_transformer_layers
    for heads in (int(mean // group) * group or group, (int(mean // group) + 1) * group):
        assert off(found, model, model.max_context_length) <= least_off_alike(found, model, heads) + 1e-12


def test_an_unknown_kind_names_the_nearest() -> None:
    with pytest.raises(UserError, match=r"kind 'unifrom' is not one of layer-wise, .*: did you mean uniform\?"):
        twin(MODELS["270M"], "unifrom")
    with pytest.raises(UserError, match="kind '' is not one of"):
        twin(MODELS["270M"], "")


def test_any_geometry_has_a_twin_within_the_bound_or_an_error() -> None:
    chance = random.Random(0)
    found_some, missed_some = 0, 0
    for _ in range(100):
        head_dim = chance.choice((2, 8, 16, 64))
        model = ModelConfig(
            model_dim=head_dim * chance.randint(1, 24),
            num_transformer_layers=chance.randint(1, 8),
            head_dim=head_dim,
            num_gqa_groups=chance.randint(1, 6),
            qkv_multipliers=chance.choice((1.0, 3.0, (0.5, 1.0), (1.0, 0.25), (0.1, 4.0))),
            ffn_multipliers=chance.choice((0.01, 2.0, 9.0, (0.5, 4.0), (4.0, 0.5))),
            ffn_dim_divisor=chance.choice((1, 7, 8, 48, 64)),
            vocab_size=chance.choice((1, 300, 5000)),
            max_context_length=chance.choice((1, 128, 4096)),
            normalize_qk_projections=chance.random() < 0.5,
            share_input_output_layers=chance.random() < 0.5,
        )
        kind, within = chance.choice(list(KINDS)), chance.choice((0.005, 0.05))
        try:
            found = twin(model, kind, within=within)
        except UserError as error:
            missed_some += 1
            assert f"no {kind} twin" in str(error) and "the nearest has" in str(error)
        else:
            found_some += 1
            assert off(found, model, model.max_context_length) <= within + 1e-12
    assert found_some > 20 and missed_some > 20


@pytest.mark.parametrize("ffn", [0.3, 1.0, 3.9, 8.0])
def test_ffns_that_scale_are_found_however_wide_the_model_is(ffn: float) -> None:
    """A scale far from the paper's: what there is to spread is the model's own."""
    model = ModelConfig(
        model_dim=256, num_transformer_layers=7, head_dim=16, num_gqa_groups=1, vocab_size=2048,
        qkv_multipliers=0.75, ffn_multipliers=ffn, ffn_dim_divisor=16,
    )  # fmt: skip
    found = twin(model, "ffn", within=0.002)
    assert list(found.ffn_dims) == sorted(set(found.ffn_dims)) and len(set(found.num_query_heads)) == 1
    assert abs(found.num_parameters() / model.num_parameters() - 1) <= 0.002
