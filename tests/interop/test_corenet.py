"""CoreNet's .pt: all kinds of it are read, none is run; adapters are merged; what is written comes back bit for bit."""

import io
import os
import pickle
import platform
import subprocess
import sys
import zipfile
from collections import OrderedDict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from torch import Tensor, nn

from openelm.errors import UserError
from openelm.interop.convert import convert, open_source
from openelm.interop.corenet import TARGET, open_checkpoint, write
from openelm.interop.corenet_state import training_state
from openelm.interop.source import Source, with_vocabulary
from openelm.interop.target import Format
from openelm.model.geometry import ModelConfig
from openelm.model.transformer import OpenELM
from small_models import make

FP32 = Format(torch.float32)
LAYER = "layers.1.attn.qkv_proj"


@pytest.fixture
def model(golden_weights) -> OpenELM:
    """Three layers, no two of them alike."""
    return make(golden_weights)


def as_corenet(model: OpenELM) -> nn.Module:
    """The same parameters, registered in the order of CoreNet's general_gpt.py."""
    root = nn.Module()
    root.token_embeddings = model.token_embeddings
    root.layers = nn.ModuleList()
    for block in model.layers:
        layer, layer.attn = nn.Module(), nn.Module()
        for name in ("qkv_proj", "q_norm", "k_norm", "out_proj"):
            setattr(layer.attn, name, getattr(block.attn, name))
        layer.ffn, layer.ffn_norm, layer.attn_norm = block.ffn, block.ffn_norm, block.attn_norm
        root.layers.append(layer)
    root.norm = model.norm
    if not model.config.share_input_output_layers:
        root.classifier = model.classifier
    return root


def saved(thing: Any, path: Path, **options: Any) -> Path:
    torch.save(thing, path, **options)
    return path


def same_weights(source: Source, weights: dict[str, Tensor]) -> None:
    assert source.shapes.keys() == weights.keys()
    for name, weight in weights.items():
        found = source.weight(name)
        assert found.dtype == weight.dtype and torch.equal(found, weight), name


def same_widths(one: ModelConfig, other: ModelConfig) -> None:
    for name in ("num_query_heads", "num_kv_heads", "ffn_dims", "vocab_size", "share_input_output_layers"):
        assert getattr(one, name) == getattr(other, name), name


# Reading ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("zipped", [True, False])
def test_plain_weights_of_either_file_format_are_read_bit_for_bit(model, tmp_path, dtype, zipped):
    model.to(dtype)
    path = saved(as_corenet(model).state_dict(), tmp_path / "any.name", _use_new_zipfile_serialization=zipped)
    source = open_source(str(path))
    same_weights(source, model.state_dict())
    same_widths(source.config, model.config)
    assert source.dtype == dtype and source.notes == ()


def test_a_name_of_another_format_changes_nothing(model, tmp_path):
    for name in ("weights.safetensors", "model.gguf", "größe.pt"):
        same_weights(open_source(str(saved(model.state_dict(), tmp_path / name))), model.state_dict())


def test_an_untied_model_keeps_its_output_layer_and_a_shared_one_stands_once(golden_weights, tmp_path):
    untied = make(golden_weights, share_input_output_layers=False)
    source = open_checkpoint(saved(untied.state_dict(), tmp_path / "untied.pt"))
    assert not source.config.share_input_output_layers
    same_weights(source, untied.state_dict())
    tied = make(golden_weights).state_dict()
    twice = {**tied, "classifier.weight": tied["token_embeddings.weight"]}
    same_weights(open_checkpoint(saved(twice, tmp_path / "tied.pt")), tied)


@pytest.mark.parametrize("wrapper", ["module.", "_orig_mod.", "module._orig_mod.", "_fsdp_wrapped_module."])
def test_what_wrappers_add_to_names_is_taken_out(model, tmp_path, wrapper):
    names = {
        wrapper + name.replace(".attn.", "._checkpoint_wrapped_module.attn."): t
        for name, t in model.state_dict().items()
    }
    same_weights(open_checkpoint(saved(names, tmp_path / "a.pt")), model.state_dict())


def test_a_training_state_gives_its_weights_and_says_what_was_left_behind(model, tmp_path):
    average = {name: weight + 1 for name, weight in model.state_dict().items()}
    state = {
        "iterations": 7,
        "epoch": 0,
        "model_state_dict": as_corenet(model).state_dict(),
        "optim_state_dict": torch.optim.AdamW(model.parameters()).state_dict(),
        "best_metric": np.float64(2.25),  # what NumPy's mean gives
        "is_interval_ckpt": True,
        "gradient_scaler_state_dict": {},
        "ema_state_dict": average,
    }
    source = open_checkpoint(saved(state, tmp_path / "training_checkpoint_last.pt"))
    same_weights(source, model.state_dict())
    assert len(source.notes) == 1 and "optimizer" in source.notes[0] and "checkpoint_ema" in source.notes[0]
    del state["model_state_dict"]
    same_weights(open_checkpoint(saved(state, tmp_path / "ema.pt")), average)


def test_numpy_numbers_of_either_numpy_do_not_spoil_a_file(model, tmp_path):
    path = saved({"best_metric": np.float64(2.25), "model_state_dict": model.state_dict()}, tmp_path / "a.pt")
    old = rewritten(path, tmp_path / "old.pt", lambda pickled: pickled.replace(b"numpy._core", b"numpy.core"))
    for file in (path, old):
        same_weights(open_checkpoint(file), model.state_dict())


def rewritten(path: Path, result: Path, change: Any = lambda pickled: pickled, compression: int = 0) -> Path:
    """The file with its pickle changed."""
    with zipfile.ZipFile(path) as before, zipfile.ZipFile(result, "w", compression) as after:
        for entry in before.infolist():
            content = before.read(entry)
            after.writestr(entry.filename, change(content) if entry.filename.endswith("data.pkl") else content)
    return result


def test_a_published_vocabulary_of_32128_rows_stays_until_it_is_cut(golden_weights, tmp_path):
    wide = make(golden_weights, vocab_size=32128)
    source = open_checkpoint(saved(wide.state_dict(), tmp_path / "a.pt"))
    assert source.config.vocab_size == 32128
    cut = with_vocabulary(source, 32000).weight("token_embeddings.weight")
    assert torch.equal(cut, wide.token_embeddings.weight[:32000])


# The YAML --------------------------------------------------------------------------------------------------------

RECIPE: dict[str, Any] = {
    "model": {
        "language_modeling": {
            "name": "general_gpt",
            "general_gpt": {
                "model_name": "gpt-test",
                "vocab_size": 96,
                "max_context_length": 128,
                "padding_index": 90,
            },
        }
    }
}


def recipe_file(tmp_path: Path, **changes: Any) -> Path:
    given = {**RECIPE["model"]["language_modeling"]["general_gpt"], **changes}
    given = {key: value for key, value in given.items() if value is not None}
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump({"model": {"language_modeling": {"general_gpt": given}}}))
    return path


@pytest.fixture
def small(golden_weights, tmp_path) -> tuple[OpenELM, Path]:
    """CoreNet's "gpt-test", one layer, and its weights as a file."""
    config = dict(model_dim=128, num_transformer_layers=1, num_gqa_groups=1, qkv_multipliers=0.25, ffn_multipliers=0.25)
    model = make(golden_weights, **{**config, "head_dim": 64, "ffn_dim_divisor": 256, "vocab_size": 96})
    return model, saved(model.state_dict(), tmp_path / "small.pt")


def test_the_yaml_gives_the_geometry(small, tmp_path):
    model, path = small
    source = open_checkpoint(path, recipe_file(tmp_path))
    same_weights(source, model.state_dict())
    assert source.config.max_context_length == 128 and source.config.head_dim == 64


def test_the_names_in_corenet_s_table_are_the_paper_s_sizes(small, tmp_path):
    for name, size in {"OpenELM-270M": "270M", "OpenELM-1_1B": "1.1B", "OpenELM-3B": "3B"}.items():
        width = ModelConfig.from_name(size).model_dim
        with pytest.raises(
            UserError, match=rf"token_embeddings\.weight has shape \(96, 128\), but the YAML's .*96, {width}"
        ):
            open_checkpoint(small[1], recipe_file(tmp_path, model_name=name))


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("- 1\n- 2\n", "is no configuration"),
        ("", "is no configuration"),
        ("a: b\n", "lacks model"),
        ("model: {language_modeling: {general_gpt: {vocab_size: 96}}}", "lacks model_name"),
        (
            "model: {language_modeling: {general_gpt: {model_name: gpt-test, vocab_size: 96}}}",
            "lacks max_context_length",
        ),
        ("model: [unclosed", "cannot be read as YAML"),
        ("model: !!python/object/apply:os.system ['exit 1']", "cannot be read as YAML"),
        ("[" * 1200, "cannot be read as YAML"),
    ],
)
def test_a_file_that_is_no_such_yaml_is_refused(small, tmp_path, text, expected):
    (tmp_path / "bad.yaml").write_text(text)
    with pytest.raises(UserError, match=expected):
        open_checkpoint(small[1], tmp_path / "bad.yaml")


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"model_name": "OpenELM-999B"}, "did you mean"),
        ({"model_name": 3}, "model_name 3"),
        ({"vocab_size": 97}, r"has shape \(96, 128\), but the YAML's geometry gives \(97, 128\)"),
        ({"vocab_size": "96"}, "vocab_size='96'"),
        ({"max_context_length": 0}, "max_context_length=0"),
    ],
)
def test_a_yaml_that_disagrees_is_refused(small, tmp_path, change, expected):
    with pytest.raises(UserError, match=expected):
        open_checkpoint(small[1], recipe_file(tmp_path, **change))


def test_an_output_layer_that_the_yaml_s_model_does_not_have_is_named(small, tmp_path):
    weights = {**small[0].state_dict(), "classifier.weight": torch.ones(96, 128)}
    with pytest.raises(UserError, match=r"holds classifier\.weight, which the YAML's geometry does not have"):
        open_checkpoint(saved(weights, tmp_path / "a.pt"), recipe_file(tmp_path))
    adapted = adapt(small[0].state_dict(), "token_embeddings", rank=4)
    source = open_checkpoint(saved(adapted, tmp_path / "b.pt"), recipe_file(tmp_path))
    assert torch.equal(source.weight("classifier.weight"), small[0].token_embeddings.weight)


def test_a_yaml_that_is_not_there_is_named(small, tmp_path):
    with pytest.raises(UserError, match=r"none\.yaml cannot be read"):
        open_checkpoint(small[1], tmp_path / "none.yaml")


# LoRA and DoRA ---------------------------------------------------------------------------------------------------


def adapt(weights: dict[str, Tensor], layer: str, rank: int, *, dora: bool = False) -> dict[str, Tensor]:
    """A state dict as CoreNet has it once ``layer`` carries an adapter called "lora" that was trained."""
    draw = torch.Generator().manual_seed(3)
    base = weights[f"{layer}.weight"]
    rows, columns = base.shape
    found = {name: tensor for name, tensor in weights.items() if name != f"{layer}.weight"}
    found[f"{layer}.base_layer.weight"] = base
    if layer == "token_embeddings":
        found[f"{layer}.lora_embedding_A.lora"] = torch.randn(rank, rows, generator=draw)
        found[f"{layer}.lora_embedding_B.lora"] = torch.randn(columns, rank, generator=draw)
    else:
        found[f"{layer}.lora_A.lora.weight"] = torch.randn(rank, columns, generator=draw)
        found[f"{layer}.lora_B.lora.weight"] = torch.randn(rows, rank, generator=draw)
    if dora:
        found[f"{layer}.lora_magnitude_vector.lora"] = torch.rand(rows, generator=draw) + 0.5
    return found


def lora_recipe(tmp_path: Path, regex: str, **params: Any) -> Path:
    recipe = yaml.safe_load(recipe_file(tmp_path).read_text())
    params = {"adapter_name": "lora", "lora_dropout": 0.1, "use_dora": False, **params}
    recipe["model"]["lora"] = {
        "use_lora": True,
        "config": [{"regex": regex, "module_type": "linear", "params": params}],
    }
    (tmp_path / "lora.yaml").write_text(yaml.safe_dump(recipe))
    return tmp_path / "lora.yaml"


@pytest.mark.parametrize("layer", ["layers.0.attn.qkv_proj", "layers.2.attn.out_proj", "layers.1.ffn.proj_1"])
@pytest.mark.parametrize("dora", [False, True])
def test_merged_adapters_compute_what_corenet_s_forward_does(model, tmp_path, layer, dora):
    weights = adapt(model.state_dict(), layer, rank=4, dora=dora)
    source = open_checkpoint(saved(weights, tmp_path / "a.pt"))
    base, up, down = (
        weights[f"{layer}.{part}.weight"].double() for part in ("base_layer", "lora_B.lora", "lora_A.lora")
    )
    x = torch.randn(5, base.shape[1], dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    expected = x @ base.T
    if dora:
        scale = weights[f"{layer}.lora_magnitude_vector.lora"].double() / (base + up @ down).norm(dim=1)
        expected = expected + (scale - 1) * (x @ base.T) + scale * (x @ down.T @ up.T)
    else:
        expected = expected + x @ down.T @ up.T
    # fp32 products of a matrix with at most 128 columns.
    torch.testing.assert_close(x @ source.weight(f"{layer}.weight").double().T, expected, rtol=1e-5, atol=1e-4)
    others = {name: weight for name, weight in model.state_dict().items() if name != f"{layer}.weight"}
    assert all(torch.equal(source.weight(name), weight) for name, weight in others.items())
    assert "1 matrices" in source.notes[-1] and "taken to be 1" in source.notes[-1]


def test_an_adapted_embedding_leaves_the_output_layer_as_it_was(model, tmp_path):
    weights = adapt(model.state_dict(), "token_embeddings", rank=4)
    source = open_checkpoint(saved(weights, tmp_path / "a.pt"))
    change = (weights["token_embeddings.lora_embedding_B.lora"] @ weights["token_embeddings.lora_embedding_A.lora"]).T
    base = model.token_embeddings.weight.detach()
    torch.testing.assert_close(source.weight("token_embeddings.weight"), base + change, rtol=1e-5, atol=1e-5)
    assert torch.equal(source.weight("classifier.weight"), base)
    assert not source.config.share_input_output_layers and "input only" in source.notes[0]


def test_an_embedding_s_adapter_that_was_never_trained_keeps_the_model_tied(model, tmp_path):
    weights = adapt(model.state_dict(), "token_embeddings", rank=4)
    weights["token_embeddings.lora_embedding_A.lora"].zero_()  # as it is made
    source = open_checkpoint(saved(weights, tmp_path / "a.pt"))
    same_weights(source, model.state_dict())


@pytest.mark.parametrize(("use_rslora", "scale"), [(False, 4.0), (True, 8.0)])
def test_the_yaml_s_alpha_and_rank_scale_the_adapter(small, tmp_path, use_rslora, scale):
    weights = adapt(small[0].state_dict(), "layers.0.ffn.proj_2", rank=4)
    recipe = lora_recipe(tmp_path, r".*proj_\d.*", r=4, lora_alpha=16, use_rslora=use_rslora)
    found = open_checkpoint(saved(weights, tmp_path / "a.pt"), recipe).weight("layers.0.ffn.proj_2.weight")
    product = weights["layers.0.ffn.proj_2.lora_B.lora.weight"] @ weights["layers.0.ffn.proj_2.lora_A.lora.weight"]
    expected = small[0].state_dict()["layers.0.ffn.proj_2.weight"] + scale * product
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("regex", "params", "expected"),
    [
        (".*qkv.*", {"r": 4, "lora_alpha": 4}, "no regex"),
        (".*", {"r": 8, "lora_alpha": 8}, "has rank 4, but the YAML says r: 8"),
        (".*", {"r": 0, "lora_alpha": 8}, "is no configuration"),
        (".*", {"r": 4}, "lacks lora_alpha"),
        ("(", {"r": 4, "lora_alpha": 4}, "cannot be read"),
    ],
)
def test_a_yaml_whose_adapters_do_not_fit_is_refused(small, tmp_path, regex, params, expected):
    weights = adapt(small[0].state_dict(), "layers.0.ffn.proj_2", rank=4)
    with pytest.raises(UserError, match=expected):
        open_checkpoint(saved(weights, tmp_path / "a.pt"), lora_recipe(tmp_path, regex, **params))


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (lambda w: w.pop(f"{LAYER}.lora_B.lora.weight"), r"adapter of .*qkv_proj has A: it is not whole"),
        (lambda w: w.pop(f"{LAYER}.base_layer.weight"), r"without layers\.1\.attn\.qkv_proj itself"),
        (lambda w: w.update({f"{LAYER}.lora_A.lora.weight": torch.ones(3, 64)}), r"A \(3, 64\).* does not fit"),
        (lambda w: w.update({f"{LAYER}.lora_A.lora.weight": torch.ones(4)}), r"does not fit"),
        (lambda w: w.update({f"{LAYER}.lora_magnitude_vector.lora": torch.ones(3)}), r"does not fit"),
        (lambda w: w.update({f"{LAYER}.lora_A.second.weight": torch.ones(4, 64)}), "several adapters"),
        (lambda w: w.update({f"{LAYER}.weight": torch.ones(4, 64)}), r"qkv_proj\.weight twice"),
        (lambda w: w.update({f"{LAYER}.lora_C.lora": torch.ones(4, 64)}), r"holds layers\.1\.attn\.qkv_proj\.lora_C"),
    ],
)
def test_an_adapter_that_is_not_whole_is_named(model, tmp_path, change, expected):
    weights = adapt(model.state_dict(), LAYER, rank=4)
    change(weights)
    with pytest.raises(UserError, match=expected):
        open_checkpoint(saved(weights, tmp_path / "a.pt"))


# What is refused -------------------------------------------------------------------------------------------------


class Calls:
    """Pickles as a call."""

    def __init__(self, function: Any, *arguments: Any) -> None:
        self.call = function, arguments

    def __reduce__(self) -> Any:
        return self.call


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("function", [os.system, eval, subprocess.check_output, Path.touch, pickle.loads, getattr])
def test_a_file_that_would_run_something_is_refused_and_runs_nothing(model, tmp_path, function, zipped):
    mark = tmp_path / "mark"
    arguments = {eval: f"open({str(mark)!r}, 'w')", subprocess.check_output: ["touch", str(mark)], Path.touch: mark}
    evil = Calls(function, arguments.get(function, f"touch {mark}"))
    for number, thing in enumerate(
        ({**model.state_dict(), "evil": evil}, {"model_state_dict": model.state_dict(), "x": evil})
    ):
        path = saved(thing, tmp_path / f"{number}.pt", _use_new_zipfile_serialization=zipped)
        with pytest.raises(UserError, match=r"asks for \S+ to be called .* nothing of it was run"):
            open_source(str(path))
    assert not mark.exists()


@pytest.mark.parametrize("protocol", [2, 4, 5])
def test_a_bare_pickle_is_refused_and_runs_nothing(tmp_path, protocol):
    mark = tmp_path / "mark"
    (tmp_path / "a.pt").write_bytes(pickle.dumps(Calls(os.system, f"touch {mark}"), protocol=protocol))
    with pytest.raises(UserError, match=r"a\.pt"):
        open_source(str(tmp_path / "a.pt"))
    assert not mark.exists()


def test_torch_s_own_switch_to_run_anything_does_not_open_the_door(model, tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")
    path = saved({"evil": Calls(os.system, f"touch {tmp_path}/mark")}, tmp_path / "a.pt")
    with pytest.raises(UserError, match="nothing of it was run"):
        open_checkpoint(path)
    assert not (tmp_path / "mark").exists()


def test_what_others_allowed_torch_is_refused_here_and_left_as_it_was(tmp_path):
    path = saved({"asks": Calls(platform.node)}, tmp_path / "a.pt")
    with torch.serialization.safe_globals([platform.node]):
        before = set(torch.serialization.get_safe_globals())
        assert torch.load(path, weights_only=True)["asks"] == platform.node()
        with pytest.raises(UserError, match=r"asks for platform\.node to be called"):
            open_checkpoint(path)
        assert set(torch.serialization.get_safe_globals()) == before


@pytest.mark.parametrize("kind", ["O", "M8[ns]", "S1", "V8"])
def test_numpy_is_given_nothing_but_numbers_to_make(model, tmp_path, kind):
    dtype = Calls(np.dtype, kind)
    scalar = (
        Calls(type(np.float64(1).__reduce__()[0]))
        if kind == ""
        else Calls(np.float64(1).__reduce__()[0], dtype, b"12345678")
    )
    with pytest.raises(UserError, match="cannot be read as a PyTorch checkpoint"):
        open_checkpoint(saved({"best_metric": scalar, "model_state_dict": model.state_dict()}, tmp_path / "a.pt"))


@pytest.mark.parametrize("zipped", [True, False])
def test_a_file_cut_short_is_refused_wherever_it_ends(model, tmp_path, zipped):
    whole = saved(model.state_dict(), tmp_path / "a.pt", _use_new_zipfile_serialization=zipped).read_bytes()
    for length in (4, 30, 500, len(whole) // 2, len(whole) - 1000, len(whole) - 1):
        (tmp_path / "cut.pt").write_bytes(whole[:length])
        with pytest.raises(UserError, match=r"cut\.pt cannot be read"):
            open_source(str(tmp_path / "cut.pt"))


def test_files_of_noise_behind_the_right_first_bytes_are_refused(tmp_path):
    draw = np.random.default_rng(0)
    for start in (b"PK\x03\x04", b"\x80\x02", b"\x80\x04", b"\x80"):
        for _ in range(10):
            (tmp_path / "a.pt").write_bytes(start + draw.bytes(300))
            with pytest.raises(UserError):
                open_source(str(tmp_path / "a.pt"))


def test_bytes_changed_anywhere_in_the_pickle_never_end_in_a_traceback(small, tmp_path):
    draw = np.random.default_rng(1)

    def spoil(pickled: bytes) -> bytes:
        changed = bytearray(pickled)
        for _ in range(3):
            changed[draw.integers(len(changed))] = draw.integers(256)
        return bytes(changed)

    refused = 0
    for _ in range(150):
        path = rewritten(small[1], tmp_path / "a.pt", spoil)
        try:
            source = open_checkpoint(path)
            for name in source.shapes:
                source.weight(name)
        except UserError:
            refused += 1
    assert refused > 75


def test_a_small_file_that_unfolds_to_a_large_one_is_refused_unopened(small, tmp_path):
    bomb = rewritten(small[1], tmp_path / "a.pt", lambda pickled: pickled + bytes(10**8), zipfile.ZIP_DEFLATED)
    assert bomb.stat().st_size < 10**6
    with pytest.raises(UserError, match="is compressed"):
        open_checkpoint(bomb)


def test_a_compressed_file_is_seen_through_what_hides_its_directory(small, tmp_path):
    bomb = rewritten(small[1], tmp_path / "a.pt", lambda pickled: pickled + bytes(10**7), zipfile.ZIP_DEFLATED)
    bomb.write_bytes(bomb.read_bytes() + bytes(70_000))  # further from the end than anyone looks
    with pytest.raises(UserError, match="damaged or cut short"):
        open_checkpoint(bomb)


@pytest.mark.parametrize("shape", [(10**6, 10**6), (448, 64, 10**9)])
def test_a_tensor_that_claims_more_than_the_file_holds_is_refused(model, tmp_path, shape):
    weights = {**model.state_dict(), "token_embeddings.weight": torch.ones(1).expand(shape)}
    with pytest.raises(UserError, match=r"token_embeddings\.weight has shape .* more than the file holds"):
        open_checkpoint(saved(weights, tmp_path / "a.pt"))


def test_tensors_without_data_and_of_other_kinds_are_named(model, tmp_path):
    for other in (
        torch.empty(448, 64, device="meta"),
        torch.ones(448, 64, dtype=torch.int64),
        torch.eye(3).to_sparse(),
    ):
        weights = {**model.state_dict(), "token_embeddings.weight": other}
        with pytest.raises(UserError, match=r"token_embeddings\.weight"):
            open_checkpoint(saved(weights, tmp_path / "a.pt"))


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (lambda w: w.pop(f"{LAYER}.weight"), r"lacks layers\.1\.attn\.qkv_proj\.weight"),
        (lambda w: w.pop("layers.2.ffn_norm.weight"), r"lacks 1 tensors .* layers\.2\.ffn_norm\.weight"),
        (lambda w: w.update({"extra.weight": torch.ones(2)}), r"holds extra\.weight"),
        (lambda w: w.update({"layers.0.ffn.proj_1.weight": torch.ones(5, 64)}), r"layers\.0\.ffn\.proj_1\.weight has"),
        (lambda w: w.update({"norm.weight": torch.ones(65)}), r"norm\.weight has shape \(65,\)"),
        (lambda w: w.update({"module.norm.weight": torch.ones(64)}), r"norm\.weight twice"),
        (lambda w: w.update({"norm.weight": [1.0]}), r"norm\.weight, a list"),
        (lambda w: w.update({3: torch.ones(64)}), "holds 3, a Tensor"),
        (lambda w: w.clear(), "is not an OpenELM"),
    ],
)
def test_missing_unknown_and_misshapen_tensors_are_named(model, tmp_path, change, expected):
    weights = dict(model.state_dict())
    change(weights)
    with pytest.raises(UserError, match=expected):
        open_checkpoint(saved(weights, tmp_path / "a.pt"))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_broken_value_is_named_when_it_is_read_and_no_file_is_written(model, tmp_path, value):
    weights = {name: weight.clone() for name, weight in model.state_dict().items()}
    weights[f"{LAYER}.weight"][3, 5] = value
    source = open_checkpoint(saved(weights, tmp_path / "a.pt"))
    with pytest.raises(UserError, match=r"layers\.1\.attn\.qkv_proj\.weight holds 1 values that are NaN"):
        convert(source, "corenet", tmp_path / "b.pt", FP32)
    assert not (tmp_path / "b.pt").exists()


@pytest.mark.parametrize("thing", [torch.ones(3), [torch.ones(3)], 3.5, None, {"model_state_dict": 3}])
def test_a_file_of_something_else_is_refused(tmp_path, thing):
    with pytest.raises(UserError, match="no checkpoint of CoreNet"):
        open_checkpoint(saved(thing, tmp_path / "a.pt"))


def test_a_torchscript_program_is_refused(tmp_path):
    torch.jit.save(torch.jit.script(nn.Linear(2, 2)), str(tmp_path / "a.pt"))
    with pytest.raises(UserError, match="TorchScript"):
        open_checkpoint(tmp_path / "a.pt")


# Writing ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("tied", [True, False])
def test_ours_to_corenet_and_back_is_equal_bit_for_bit(golden_weights, tmp_path, dtype, tied):
    model = make(golden_weights, share_input_output_layers=tied).to(dtype)
    source = open_checkpoint(saved(model.state_dict(), tmp_path / "a.pt"))
    source = Source(**{**vars(source), "config": model.config})
    convert(source, "corenet", tmp_path / "b.pt", Format(dtype))
    back = open_checkpoint(tmp_path / "b.pt")
    same_weights(back, model.state_dict())
    assert back.config == model.config and back.dtype == dtype


@pytest.mark.parametrize(
    "options", [{}, {"mmap": True}, {"weights_only": False}, {"weights_only": False, "mmap": True}]
)
def test_what_is_written_loads_as_what_torch_saves(model, tmp_path, options):
    source = open_checkpoint(saved(model.state_dict(), tmp_path / "a.pt"))
    write(tmp_path / "b.pt", source, FP32)
    found = torch.load(tmp_path / "b.pt", **{"weights_only": True, **options})
    assert type(found) is OrderedDict and list(found) == list(model.state_dict())
    for name, weight in model.state_dict().items():
        assert torch.equal(found[name], weight) and found[name].stride() == weight.stride()
        assert found[name].data_ptr() % 64 == 0, name
        assert found[name].untyped_storage().nbytes() == weight.numel() * 4
    other = OpenELM(model.config)
    other.load_state_dict(found)


def test_the_records_have_their_checksums_and_the_file_is_always_the_same(model, tmp_path):
    source = open_checkpoint(saved(model.state_dict(), tmp_path / "a.pt"))
    for name in ("b.pt", "c.pt"):
        write(tmp_path / name, source, FP32)
    with zipfile.ZipFile(tmp_path / "b.pt") as archive:
        assert archive.testzip() is None
    assert (tmp_path / "b.pt").read_bytes() == (tmp_path / "c.pt").read_bytes()
    buffer = io.BytesIO()
    torch.save(model.state_dict(), buffer)
    assert (tmp_path / "b.pt").stat().st_size == pytest.approx(len(buffer.getvalue()), rel=0.05)


def test_a_geometry_that_no_shape_tells_comes_back_too(golden_weights, tmp_path):
    model = make(golden_weights, normalize_qk_projections=False, rope_freq_constant=500.0, eos_token_id=7)
    weights = model.state_dict()
    source = Source("ours", model.config, torch.float32, weights.__getitem__)
    write(tmp_path / "a.pt", source, FP32)
    back = open_checkpoint(tmp_path / "a.pt")
    assert back.config == model.config
    same_weights(back, weights)


def test_a_geometry_that_was_spoilt_is_refused(model, tmp_path):
    for geometry in (
        {"model_dim": -1, "num_transformer_layers": 3},
        {"model_dim": 64},
        {**model.config.as_dict(), "head_dim": 32},
    ):
        weights = OrderedDict(model.state_dict())
        weights._metadata = {"": {"openelm": geometry}}
        with pytest.raises(UserError, match=r"states a geometry that is none|but the geometry gives|model: "):
            open_checkpoint(saved(weights, tmp_path / "a.pt"))


def test_quantisation_is_refused_before_anything_is_written(model, tmp_path):
    source = open_checkpoint(saved(model.state_dict(), tmp_path / "a.pt"))
    with pytest.raises(UserError, match="--quantize Q8_0"):
        convert(source, "corenet", tmp_path / "b.pt", Format(torch.float32, "Q8_0"))
    assert not (tmp_path / "b.pt").exists()


def test_the_target_gives_the_logits_of_the_file(model, tmp_path):
    source = open_checkpoint(saved(model.state_dict(), tmp_path / "a.pt"))
    write(tmp_path / "b.pt", source, FP32)
    rows = [[1, 5, 9, 200], [3, 3, 3, 3]]
    assert torch.equal(TARGET.logits(tmp_path / "b.pt", rows), model(torch.tensor(rows)))


# Training states -------------------------------------------------------------------------------------------------


def trained_state(model: OpenELM, *, by_name: bool = False, decay_all: bool = False) -> dict[str, Any]:
    """Three steps of AdamW over CoreNet's parameter groups, and what CoreNet saves then."""
    named = list(as_corenet(model).named_parameters())
    matrices = [p for _, p in named if p.dim() > 1]
    vectors = [p for _, p in named if p.dim() == 1]
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}]
    groups = [{"params": [p for _, p in named], "weight_decay": 0.1}] if decay_all else groups
    adamw = torch.optim.AdamW(groups, lr=1e-2, betas=(0.9, 0.95))
    for step in range(3):
        rows = torch.randint(0, 448, (2, 17), generator=torch.Generator().manual_seed(step))
        (model(rows[:, :-1], rows[:, 1:]) / 32).backward()
        adamw.step()
        adamw.zero_grad()
    optimizer = adamw.state_dict()
    if by_name:  # as FSDP stores it
        names = {id(p): name for name, p in named}
        order = [names[id(p)] for group in groups for p in group["params"]]
        optimizer["state"] = {order[index]: value for index, value in optimizer["state"].items()}
        for group in optimizer["param_groups"]:
            group["params"] = [order[index] for index in group["params"]]
    return {
        "iterations": 3,
        "epoch": 0,
        "model_state_dict": as_corenet(model).state_dict(),
        "optim_state_dict": optimizer,
        "best_metric": np.float64(2.5),
        "is_interval_ckpt": True,
        "expected": {name: adamw.state[p]["exp_avg"].clone() for name, p in named},
    }


@pytest.mark.parametrize("options", [{}, {"by_name": True}, {"decay_all": True}])
@pytest.mark.parametrize("tied", [True, False])
def test_moments_are_those_of_their_parameters(golden_weights, tmp_path, options, tied):
    model = make(golden_weights, share_input_output_layers=tied).train()
    state = trained_state(model, **options)
    expected = state.pop("expected")
    found = training_state(saved(state, tmp_path / "a.pt"))
    assert found.step == 3 and expected.keys() == model.state_dict().keys()
    for name, first in expected.items():
        assert torch.equal(found.read(f"{name}.exp_avg"), first), name
        assert found.read(f"{name}.step") == 3
        assert torch.equal(found.read(f"{name}.exp_avg_sq", 1, 2), found.read(f"{name}.exp_avg_sq")[1:3])
        assert torch.equal(found.read(f"ema.{name}"), model.state_dict()[name])


def test_step_counts_of_older_pytorch_are_plain_numbers(model, tmp_path):
    state = trained_state(model.train())
    del state["expected"]
    for moments in state["optim_state_dict"]["state"].values():
        moments["step"] = int(moments["step"])
    found = training_state(saved(state, tmp_path / "a.pt"))
    assert found.step == 3 and found.read("norm.weight.step") == 3


def swap(mapping: dict[Any, Any], one: Any, other: Any) -> None:
    mapping[one], mapping[other] = mapping[other], mapping[one]


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (lambda s: s.update(iterations=2), "2 iterations were made, and its optimizer"),
        (lambda s: s.pop("iterations"), "None iterations"),
        (lambda s: s["optim_state_dict"]["state"][4].update(step=torch.tensor(2.0)), "cannot belong together"),
        (lambda s: s["optim_state_dict"]["state"][4].update(step=torch.tensor(2.5)), "no number of updates"),
        (lambda s: s["optim_state_dict"]["state"][4].update(step=torch.ones(2)), "no number of updates"),
        (lambda s: s["optim_state_dict"]["state"][4].update(step="3"), r"\.step, a str"),
        (lambda s: s["optim_state_dict"]["state"][4].update(max_exp_avg_sq=torch.ones(2)), "max_exp_avg_sq"),
        (lambda s: s["optim_state_dict"]["state"][4].pop("exp_avg"), "which AdamW does not"),
        (lambda s: s["optim_state_dict"]["state"].pop(4), "do not group|moments cannot be told apart"),
        (lambda s: swap(s["optim_state_dict"]["state"], 0, 1), r"exp_avg of token_embeddings\.weight is not"),
        (lambda s: s["optim_state_dict"]["param_groups"].reverse(), "does not group parameters as CoreNet does"),
        (lambda s: s["optim_state_dict"]["param_groups"][1].update(weight_decay=0.1), "does not group"),
        (lambda s: s["optim_state_dict"].update(param_groups=3), "no groups"),
        (lambda s: s["optim_state_dict"].update(state=[]), "holds a list"),
        (lambda s: s["model_state_dict"].move_to_end("layers.0.attn_norm.weight"), "in CoreNet's order"),
        (lambda s: s.update(ema_state_dict={}), r"average lacks token_embeddings\.weight"),
        (lambda s: s.pop("optim_state_dict"), "weights only"),
        (lambda s: s["model_state_dict"].update({"norm.lora_A.lora": torch.ones(2)}), "training adapters"),
    ],
)
def test_a_training_state_in_doubt_is_refused(model, tmp_path, change, expected):
    state = trained_state(model.train())
    del state["expected"]
    change(state)
    with pytest.raises(UserError, match=expected):
        training_state(saved(state, tmp_path / "a.pt"))


@pytest.mark.parametrize(
    ("key", "value"), [("exp_avg", float("nan")), ("exp_avg_sq", -1.0), ("exp_avg_sq", float("inf"))]
)
def test_moments_that_cannot_be_are_named_when_they_are_read(model, tmp_path, key, value):
    state = trained_state(model.train())
    del state["expected"]
    state["optim_state_dict"]["state"][0][key][0, 0] = value
    found = training_state(saved(state, tmp_path / "a.pt"))
    with pytest.raises(UserError, match=rf"token_embeddings\.weight\.{key} holds values"):
        found.read(f"token_embeddings.weight.{key}")


# Size ------------------------------------------------------------------------------------------------------------

CONVERSION = """
import resource, sys
from pathlib import Path
from openelm.interop.convert import convert, open_source
from openelm.interop.target import Format
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
source = open_source(sys.argv[1])
convert(source, "corenet", Path(sys.argv[2]), Format(source.dtype))
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""


@pytest.mark.slow
def test_the_270m_goes_there_and_back_and_memory_holds_it_once(golden_weights, tmp_path):
    """A gigabyte is made, written twice and compared."""
    with torch.device("meta"):
        model = OpenELM(ModelConfig.from_name("270M", vocab_size=32128))
    weights = golden_weights(model, 5)
    path = saved(weights, tmp_path / "a.pt")
    argv = [sys.executable, "-c", CONVERSION, str(path), str(tmp_path / "b.pt")]
    grown = 1024 * int(subprocess.run(argv, check=True, capture_output=True, text=True).stdout)
    size = path.stat().st_size
    # The mapped source counts as memory while it is read; beside it stand a tensor (the embedding: 14 %) and the sum.
    assert grown < 1.3 * size, f"{grown / size:.2f} times the model"
    same_weights(open_checkpoint(tmp_path / "b.pt"), weights)
