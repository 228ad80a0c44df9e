"""Adapters as files: PEFT's names and settings, read and written without peft; what is not built is named."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import small_adapters
from openelm.errors import UserError
from openelm.interop.adapter import (
    ATTENTION_TARGETS,
    PAPER_TARGETS,
    Adapter,
    changes_output,
    checked,
    find_adapter_folder,
    from_file_name,
    modules,
    open_adapter,
    read_config,
    read_tensor,
    shapes,
    to_file_name,
)
from openelm.model.geometry import ModelConfig
from small_adapters import KINDS
from small_models import UNEVEN

CONFIG = ModelConfig(**UNEVEN)


@pytest.fixture
def folder(tmp_path) -> Path:
    """A DoRA on all of the paper's targets."""
    small_adapters.write(tmp_path / "adapter", CONFIG, "dora")
    return tmp_path / "adapter"


def set_keys(folder: Path, **keys: Any) -> None:
    path = folder / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **keys}))


def change_tensors(folder: Path, **tensors: torch.Tensor | None) -> None:
    """Put tensors in the place of others, by the ends of their names; None takes one away."""
    path = folder / "adapter_model.safetensors"
    found = load_file(path)
    for end, tensor in tensors.items():
        name = next((name for name in found if name.endswith(end.replace("__", "."))), end.replace("__", "."))
        found.pop(name, None)
        if tensor is not None:
            found[name] = tensor
    save_file(found, path)


def test_files_have_pefts_names_and_lead_back_to_ours():
    names = list(shapes(Adapter("dora", targets=PAPER_TARGETS), CONFIG))
    written = [to_file_name(name) for name in names]
    begin = "base_model.model.transformer."
    assert written[:6] == [
        begin + "token_embeddings.lora_embedding_A",
        begin + "token_embeddings.lora_embedding_B",
        begin + "token_embeddings.lora_magnitude_vector",
        begin + "layers.0.attn.qkv_proj.lora_A.weight",
        begin + "layers.0.attn.qkv_proj.lora_B.weight",
        begin + "layers.0.attn.qkv_proj.lora_magnitude_vector",
    ]
    assert [from_file_name(name) for name in written] == names
    assert [from_file_name(name.replace("transformer.", "")) for name in written] == names, "of a bare model"


def test_what_is_written_is_read_back_to_the_bit(tmp_path):
    for kind in KINDS:
        adapter = small_adapters.write(tmp_path / kind, CONFIG, kind)
        assert read_config(tmp_path / kind) == (adapter, "someone/small")
        again, stored = open_adapter(tmp_path / kind, CONFIG)
        expected = small_adapters.values(adapter, CONFIG)
        assert again == adapter and list(expected) == list(shapes(adapter, CONFIG))
        for name, tensor in expected.items():
            assert torch.equal(read_tensor(tmp_path / kind, stored, name), tensor), name
        assert {file.name for file in (tmp_path / kind).iterdir()} == {
            "adapter_config.json",
            "adapter_model.safetensors",
            "README.md",
        }


def test_peft_reads_the_settings_that_we_write(tmp_path):
    peft = pytest.importorskip("peft")
    for kind in KINDS:
        small_adapters.write(tmp_path / kind, CONFIG, kind)
        found = peft.PeftConfig.from_pretrained(str(tmp_path / kind))
        assert isinstance(found, peft.LoraConfig) and found.task_type == "CAUSAL_LM"
        assert (found.r, found.lora_alpha, found.lora_dropout) == (4, 8, 0.1)
        assert (found.use_dora, found.use_rslora) == (kind == "dora", kind == "rslora")
        assert set(found.target_modules) == set(PAPER_TARGETS) and found.base_model_name_or_path == "someone/small"


def test_scaling_is_alpha_over_r_or_over_its_root():
    assert [Adapter(kind, r=16, alpha=8).scaling for kind in KINDS] == [0.5, 0.5, 2.0]


def test_shapes_follow_the_layers_and_the_embedding_stands_the_other_way_round():
    found = shapes(Adapter("dora", r=2, targets=PAPER_TARGETS), CONFIG)
    assert [found[f"token_embeddings.lora_embedding_{part}.default"] for part in "AB"] == [(2, 448), (64, 2)]
    assert found["token_embeddings.lora_magnitude_vector.default.weight"] == (64,)
    widths = [found[f"layers.{layer}.attn.out_proj.lora_A.default.weight"] for layer in range(3)]
    assert widths == [(2, 32), (2, 64), (2, 96)], "query widths of each layer"


def test_targets_may_be_single_layers():
    adapter = Adapter(targets=("layers.1.attn.qkv_proj", "0.ffn.proj_2"))
    assert list(modules(checked(adapter, CONFIG), CONFIG)) == ["layers.0.ffn.proj_2", "layers.1.attn.qkv_proj"]


@pytest.mark.parametrize("target", ["q_proj", "attn", "attn_norm", "layers.3.attn.qkv_proj", "proj"])
def test_targets_that_match_nothing_are_refused_with_the_names_that_do(target):
    names = "token_embeddings, qkv_proj, out_proj, proj_1, proj_2"
    words = rf"{target} matches no module .*{names}, or single ones from layers.0.attn.qkv_proj to layers.2.ffn.proj_2"
    with pytest.raises(UserError, match=words):
        checked(Adapter(targets=("qkv_proj", target)), CONFIG)


def test_the_output_layer_is_no_target():
    untied = CONFIG.changed(share_input_output_layers=False)
    for target in ("classifier", "lm_head"):
        with pytest.raises(UserError, match="is the output layer, which is not adapted here"):
            checked(Adapter(targets=(target,)), untied)


def test_an_embedding_is_the_output_layer_where_they_are_shared():
    on_embedding, on_attention = Adapter(targets=PAPER_TARGETS), Adapter(targets=ATTENTION_TARGETS)
    assert changes_output(on_embedding, CONFIG) and not changes_output(on_attention, CONFIG)
    assert not changes_output(on_embedding, CONFIG.changed(share_input_output_layers=False))


def test_all_that_is_wrong_with_numbers_is_said_at_once():
    with pytest.raises(UserError) as refusal:
        Adapter("qlora", r=0, alpha=float("nan"), dropout=1.0, targets=())
    for words in ("kind='qlora' must be one of lora, dora, rslora", "r=0", "alpha=nan", "dropout=1.0", "targets=()"):
        assert words in str(refusal.value)


@pytest.mark.parametrize(
    ("keys", "words"),
    [
        ({"peft_type": "LOHA"}, "says peft_type 'LOHA': only LORA"),
        ({"modules_to_save": ["lm_head"]}, "sets modules_to_save to ['lm_head'], which is not built here"),
        ({"rank_pattern": {"qkv_proj": 8}}, "sets rank_pattern to"),
        ({"alpha_pattern": {"qkv_proj": 8}}, "sets alpha_pattern to"),
        ({"bias": "lora_only"}, "sets bias to 'lora_only'"),
        ({"lora_bias": True}, "sets lora_bias to True"),
        ({"layer_replication": [[0, 2]]}, "sets layer_replication to"),
        ({"of_next_year": 3}, "sets of_next_year to 3"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights 'pissa' changed the model's own weights"),
        ({"use_rslora": True}, "has use_dora and use_rslora: only one"),
        ({"r": "four"}, "adapter: r='four' must be a whole number"),
        ({"r": True}, "adapter: r=True must be a whole number"),
        ({"lora_alpha": None}, "adapter: alpha=None must be a positive number"),
        ({"target_modules": []}, "adapter: targets=() must name modules"),
    ],
)
def test_settings_that_are_not_built_are_refused_by_name(folder, keys, words):
    set_keys(folder, **keys)
    with pytest.raises(UserError, match=re.escape(words)):
        read_config(folder)


def test_settings_of_other_versions_that_say_nothing_are_passed_over(folder):
    expected = read_config(folder)
    set_keys(
        folder, of_next_year=None, another={}, peft_version="9.0", eva_config={"rho": 2.0}, init_lora_weights="eva"
    )
    assert read_config(folder) == expected


@pytest.mark.parametrize(
    "keys",
    [
        {"target_modules": r".*\.attn\.(qkv|out)_proj"},
        {"target_modules": "all-linear"},
        {"target_modules": ["qkv_proj", "out_proj"], "layers_to_transform": [0, 2]},
        {"target_modules": ["qkv_proj", "out_proj"], "exclude_modules": ".*norm"},
    ],
)
def test_where_modules_are_chosen_by_pattern_the_tensors_tell_which(tmp_path, keys):
    names = ("layers.0.attn.qkv_proj", "layers.2.attn.out_proj")
    small_adapters.write(tmp_path / "adapter", CONFIG, "dora", names)
    set_keys(tmp_path / "adapter", **keys)
    adapter, _ = open_adapter(tmp_path / "adapter", CONFIG)
    assert set(adapter.targets) == set(names)


def test_targets_with_the_path_of_the_exported_model_are_ours(tmp_path):
    small_adapters.write(tmp_path / "adapter", CONFIG, targets=("layers.0.attn.qkv_proj",))
    set_keys(tmp_path / "adapter", target_modules=["transformer.layers.0.attn.qkv_proj"])
    assert open_adapter(tmp_path / "adapter", CONFIG)[0].targets == ("layers.0.attn.qkv_proj",)


def test_a_pickle_is_refused_and_not_opened(folder):
    (folder / "adapter_model.safetensors").rename(folder / "adapter_model.bin")
    with pytest.raises(UserError, match="is a pickle, which can execute code"):
        open_adapter(folder, CONFIG)


@pytest.mark.parametrize(
    ("tensors", "words"),
    [
        ({"2__attn__qkv_proj__lora_B__weight": None}, "lacks 1 tensors of its adapter, the first base_model.model"),
        ({"2__attn__qkv_proj__lora_B__weight": torch.zeros(9, 4)}, r"qkv_proj.lora_B.weight has shape \(9, 4\), but"),
        (
            {"base_model__model__transformer__norm__weight": torch.ones(64)},
            "norm.weight, which is no part of an adapter",
        ),
        ({"base_model__model__lm_head__weight": torch.ones(448, 64)}, "save_embedding_layers=False"),
    ],
)
def test_tensors_of_another_model_are_named(folder, tensors, words):
    change_tensors(folder, **tensors)
    with pytest.raises(UserError, match=words):
        open_adapter(folder, CONFIG)


def test_an_adapter_of_another_size_is_refused(folder):
    with pytest.raises(UserError, match="the adapter was trained on another one"):
        open_adapter(folder, CONFIG.changed(vocab_size=400))


@pytest.mark.parametrize(
    ("tensor", "words"),
    [
        (torch.full((64, 4), float("nan")), "holds NaN or infinity"),
        (torch.zeros(64, 4, dtype=torch.int8), "torch.int8"),
    ],
)
def test_tensors_without_usable_numbers_are_named(folder, tensor, words):
    change_tensors(folder, token_embeddings__lora_embedding_B=tensor)
    _, stored = open_adapter(folder, CONFIG)
    with pytest.raises(UserError, match=rf"token_embeddings.lora_embedding_B .*{words}"):
        read_tensor(folder, stored, "token_embeddings.lora_embedding_B.default")


@pytest.mark.parametrize(
    ("content", "words"), [("{", "is not JSON"), ("[]", "must hold an object"), (None, "it has no adapter_config.json")]
)
def test_a_folder_without_usable_settings_is_named(folder, content, words):
    path = folder / "adapter_config.json"
    path.unlink() if content is None else path.write_text(content)
    with pytest.raises(UserError, match=words):
        read_config(folder)


def test_a_run_folder_stands_for_its_adapter(folder, tmp_path):
    assert find_adapter_folder(folder) == folder
    assert find_adapter_folder(tmp_path) == folder
    with pytest.raises(UserError, match=r"has no adapter_config.json, and no adapter/ with one"):
        find_adapter_folder(tmp_path.parent)
    with pytest.raises(UserError, match="is not a folder: give an adapter's folder"):
        find_adapter_folder(tmp_path / "nothing")
