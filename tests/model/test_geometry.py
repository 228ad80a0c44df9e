"""Widths, counts and their errors: the released geometries to the unit, and what any other must obey."""

import json
import re

import pytest
import torch

from openelm.errors import UserError
from openelm.model.folder import load_config, write_config
from openelm.model.geometry import SIZES, ModelConfig, make_divisible
from openelm.model.transformer import OpenELM

NAMES = {"OpenELM-270M": "270M", "OpenELM-450M": "450M", "OpenELM-1_1B": "1.1B", "OpenELM-3B": "3B"}


@pytest.mark.parametrize("released", NAMES)
def test_released_sizes_have_the_released_heads_widths_and_counts(golden, released):
    expected = golden("geometry")[released]
    config = ModelConfig.from_name(NAMES[released])
    assert list(config.num_query_heads) == expected["num_query_heads"]
    assert list(config.num_kv_heads) == expected["num_kv_heads"]
    assert list(config.ffn_dims) == expected["ffn_dims"]
    assert list(config.betas) == expected["ffn_multipliers"]
    assert (config.model_dim, config.head_dim) == (expected["model_dim"], expected["head_dim"])
    assert config.num_parameters() == expected["parameters_vocab_32000"]
    assert config.changed(vocab_size=32128).num_parameters() == expected["parameters_vocab_32128"]


def test_constant_multipliers_give_the_uniform_model(golden):
    expected = golden("geometry")["uniform-example"]
    config = ModelConfig(
        model_dim=256, num_transformer_layers=4, num_gqa_groups=1, qkv_multipliers=1.0, ffn_multipliers=3.0
    )
    assert list(config.num_query_heads) == list(config.num_kv_heads) == expected["num_query_heads"]
    assert list(config.ffn_dims) == expected["ffn_dims"]
    assert config.uniform_widths() == (4, 768)


def test_uniform_widths_cost_as_much_as_the_scaled_layers():
    config = ModelConfig.from_name("270M")
    heads, width = config.uniform_widths()
    layers = config.num_transformer_layers
    # Per head: query and output columns, and for every group of queries a key and a value.
    attention = config.model_dim * config.head_dim * heads * (2 + 2 / config.num_gqa_groups)
    assert layers * (attention + 3 * config.model_dim * width) == pytest.approx(
        sum(config.layer_matmul_parameters()), rel=1e-12
    )


@pytest.mark.parametrize(
    ("value", "divisor", "expected"),
    [(640, 256, 768), (1, 256, 256), (383, 256, 256 + 256), (256 / 0.9 - 0.1, 256, 256), (256 / 0.9 + 0.1, 256, 512)],
)
def test_rounding_never_loses_more_than_a_tenth(value, divisor, expected):
    assert make_divisible(value, divisor) == expected


def test_a_pair_is_rounded_to_two_places_and_a_scalar_is_not():
    config = ModelConfig(model_dim=1000, num_transformer_layers=3, ffn_dim_divisor=1, ffn_multipliers=(0.5, 2 / 3))
    assert config.betas == (0.5, 0.58, 0.67)
    assert config.ffn_dims == (500, 580, 670)
    assert config.changed(ffn_multipliers=2 / 3).ffn_dims == (667, 667, 667)


def test_a_list_sets_each_layer_by_itself():
    config = ModelConfig(
        model_dim=256, num_transformer_layers=3, num_gqa_groups=1, ffn_multipliers=[4, 1.255, 2], ffn_dim_divisor=1
    )
    assert config.ffn_dims == (1024, 321, 512)
    assert config.changed(qkv_multipliers=[1.0, 0.25, 0.5]).num_query_heads == (4, 1, 2)


@pytest.mark.parametrize(
    "multipliers",
    [2 / 3, (0.5, 4.0), (0.5, 2 / 3), (2 / 3, 2 / 3)],
    ids=["scalar", "pair", "pair that is rounded", "pair of equals"],
)
@pytest.mark.parametrize("layers", [1, 2, 3, 7])
def test_a_geometry_reopens_from_its_folder_as_it_was(tmp_path, multipliers, layers):
    # The folder holds multipliers expanded to one a layer; for two layers those look like a pair.
    config = ModelConfig(
        model_dim=1024, num_transformer_layers=layers, ffn_multipliers=multipliers, ffn_dim_divisor=1, vocab_size=8
    )
    write_config(tmp_path, config, torch.float32)
    reopened, _ = load_config(tmp_path)
    assert reopened.ffn_dims == config.ffn_dims
    assert reopened.num_query_heads == config.num_query_heads
    assert reopened.num_parameters() == config.num_parameters()
    stored = json.loads((tmp_path / "config.json").read_text())
    assert len(stored["ffn_multipliers"]) == len(stored["num_query_heads"]) == layers


def test_as_dict_is_json_and_comes_back_equal():
    config = ModelConfig.from_name("450M", vocab_size=123, share_input_output_layers=False)
    assert ModelConfig(**json.loads(json.dumps(config.as_dict()))) == config


@pytest.mark.parametrize("name", SIZES)
def test_every_size_can_be_cut_into_whole_groups(name):
    config = ModelConfig.from_name(name)
    for query, kv in zip(config.num_query_heads, config.num_kv_heads, strict=True):
        assert query == kv * config.num_gqa_groups
    # 30M and 100M are what their names say, within the fifth by which released names are off.
    assert config.num_parameters() == pytest.approx(float(name[:-1]) * {"M": 1e6, "B": 1e9}[name[-1]], rel=0.2)


@pytest.mark.parametrize("shared_table", [True, False])
@pytest.mark.parametrize("qk_norm", [True, False])
def test_counts_are_those_of_a_real_model(shared_table, qk_norm):
    config = ModelConfig(
        model_dim=96,
        num_transformer_layers=3,
        head_dim=16,
        num_gqa_groups=2,
        ffn_dim_divisor=8,
        vocab_size=50,
        normalize_qk_projections=qk_norm,
        share_input_output_layers=shared_table,
    )
    parameters = dict(OpenELM(config).named_parameters())
    assert config.num_parameters() == sum(p.numel() for p in parameters.values())
    matrices = sum(p.numel() for name, p in parameters.items() if p.dim() == 2 and "embeddings" not in name)
    # A shared table is multiplied with once, as the output layer; looking up costs nothing.
    assert config.matmul_parameters() == matrices + (50 * 96 if shared_table else 0)


def test_training_flops_are_those_of_the_products_worked_out_by_hand():
    config = ModelConfig(model_dim=64, num_transformer_layers=1, head_dim=16, num_gqa_groups=2, vocab_size=10)
    heads, kv, width = config.num_query_heads[0], config.num_kv_heads[0], config.ffn_dims[0]
    forward = 2 * 64 * (heads + 2 * kv) * 16 + 2 * heads * 16 * 64 + 2 * 64 * 2 * width + 2 * width * 64 + 2 * 64 * 10
    # Scores and mixing each take 2 * 16 a head and pair; a causal row of 8 has half of 8 pairs a token.
    attention = heads * 4 * (2 * 16 + 2 * 16)
    assert config.train_flops_per_token(row_length=8) == 3 * (forward + attention)


def test_cache_bytes_count_keys_and_values_of_every_layer():
    config = ModelConfig.from_name("270M")
    assert config.cache_bytes_per_token() == 2 * 2 * 64 * (3 * 5 + 4 * 7 + 5 * 4)


def test_an_unknown_size_names_the_nearest():
    with pytest.raises(UserError, match=r"'271M'.*did you mean 270M"):
        ModelConfig.from_name("271M")
    assert ModelConfig.from_name("OpenELM-270M") == ModelConfig.from_name("270M")


def test_heads_that_disagree_with_the_multipliers_are_refused():
    with pytest.raises(UserError, match=re.escape("num_query_heads=[4, 4] disagrees")):
        ModelConfig(model_dim=256, num_transformer_layers=2, num_gqa_groups=1, num_query_heads=(4, 4))
    with pytest.raises(UserError, match=re.escape("num_kv_heads=[4, 4] must be")):
        ModelConfig(model_dim=256, num_transformer_layers=2, num_gqa_groups=2, qkv_multipliers=1.0, num_kv_heads=(4, 4))


def test_all_problems_are_reported_at_once_with_their_values():
    with pytest.raises(UserError) as caught:
        ModelConfig(
            model_dim=0,
            num_transformer_layers=2.5,  # type: ignore[arg-type]
            head_dim=15,
            qkv_multipliers=(0.5, -1.0),
            ffn_multipliers=(1.0, 2.0, 3.0),
            vocab_size=True,
        )
    for part in (
        "model_dim=0",
        "num_transformer_layers=2.5",
        "head_dim=15 must be even",
        "qkv_multipliers=(0.5, -1.0)",
        "ffn_multipliers has 3 values",
        "vocab_size=True",
    ):
        assert part in str(caught.value)
