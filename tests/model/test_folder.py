"""Model folders: what is saved comes back to the bit, and what is wrong with one is named."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import openelm
from openelm.errors import UserError
from openelm.model import folder as folder_module
from openelm.model.folder import load_config, load_model, open_tensors, save_model
from openelm.model.geometry import ModelConfig
from openelm.model.quantize import dequantize, fits, quantize
from openelm.model.stored import PLACES, Slice, save_slices, to_folder_name
from openelm.model.transformer import OpenELM, init_weights

SMALL = dict(model_dim=32, num_transformer_layers=2, head_dim=16, num_gqa_groups=1, ffn_dim_divisor=8, vocab_size=40)


def make(**changes: object) -> OpenELM:
    model = OpenELM(ModelConfig(**{**SMALL, **changes}))  # type: ignore[arg-type]
    init_weights(model, seed=3)
    with torch.no_grad():
        model.norm.weight.normal_(1, 0.1, generator=torch.Generator().manual_seed(1))
    return model


@pytest.fixture
def saved(tmp_path) -> Path:
    return save_model(make(), tmp_path / "model")


def same_bits(one: OpenELM, other: OpenELM) -> bool:
    pairs = zip(one.state_dict().items(), other.state_dict().items(), strict=True)
    return all(a == b and s.dtype == t.dtype and torch.equal(s, t) for (a, s), (b, t) in pairs)


def edit(folder: Path, change) -> None:
    """Rewrite model.safetensors with `change` applied to its tensors."""
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors")


def set_config(folder: Path, **changes: object) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


@pytest.mark.parametrize("shared_table", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_model_comes_back_to_the_bit_in_its_own_dtype(tmp_path, dtype, shared_table):
    model = make(share_input_output_layers=shared_table).to(dtype)
    save_model(model, tmp_path / "model")
    reopened = load_model(tmp_path / "model")
    assert reopened.config == ModelConfig(**{**model.config.as_dict(), "ffn_multipliers": list(model.config.betas)})
    assert same_bits(reopened, model)
    tokens = torch.arange(12)[None]
    with torch.no_grad():
        assert torch.equal(reopened(tokens), model(tokens))


def test_another_dtype_is_cast_once_on_either_side(tmp_path):
    model = make()
    rounded = make().to(torch.bfloat16)
    save_model(model, tmp_path / "half", dtype=torch.bfloat16)
    assert same_bits(load_model(tmp_path / "half"), rounded)
    save_model(model, tmp_path / "whole")
    assert same_bits(load_model(tmp_path / "whole", dtype=torch.bfloat16), rounded)
    assert json.loads((tmp_path / "half" / "config.json").read_text())["dtype"] == "bfloat16"


def test_the_older_name_of_the_dtype_is_read_too(saved):
    data = json.loads((saved / "config.json").read_text())
    data["torch_dtype"] = data.pop("dtype")
    (saved / "config.json").write_text(json.dumps({**data, "torch_dtype": "bfloat16"}))
    assert load_model(saved).norm.weight.dtype == torch.bfloat16


def test_names_are_the_published_ones_and_a_shared_table_is_stored_once(tmp_path):
    tied = load_file(save_model(make(), tmp_path / "tied") / "model.safetensors")
    untied = load_file(save_model(make(share_input_output_layers=False), tmp_path / "untied") / "model.safetensors")
    layer = ["attn_norm", "ffn_norm", "attn.qkv_proj", "attn.out_proj", "attn.q_norm", "attn.k_norm"]
    names = {f"transformer.layers.{i}.{kind}.weight" for i in (0, 1) for kind in [*layer, "ffn.proj_1", "ffn.proj_2"]}
    names |= {"transformer.token_embeddings.weight", "transformer.norm.weight"}
    assert tied.keys() == names
    assert untied.keys() == names | {"lm_head.weight"}


def test_config_json_has_the_published_keys(saved):
    data = json.loads((saved / "config.json").read_text())
    expected = {
        "model_type": "openelm",
        "architectures": ["OpenELMForCausalLM"],
        "num_transformer_layers": 2,
        "model_dim": 32,
        "head_dim": 16,
        "num_gqa_groups": 1,
        "num_query_heads": [1, 2],
        "num_kv_heads": [1, 2],
        "qkv_multipliers": [0.5, 1.0],
        "ffn_multipliers": [0.5, 4.0],
        "ffn_dim_divisor": 8,
        "ffn_with_glu": True,
        "activation_fn_name": "swish",
        "normalization_layer_name": "rms_norm",
        "normalize_qk_projections": True,
        "share_input_output_layers": True,
        "tie_word_embeddings": True,
        "rope_freq_constant": 10000,
        "rope_max_length": 4096,
        "max_context_length": 2048,
        "vocab_size": 40,
        "initializer_range": 0.02,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "dtype": "float32",
    }
    assert {key: data[key] for key in expected} == expected
    assert json.loads((saved / "generation_config.json").read_text()) == {"bos_token_id": 1, "eos_token_id": 2}


def test_a_large_model_is_cut_into_shards_with_an_index(tmp_path, monkeypatch):
    model = make()
    monkeypatch.setattr(folder_module, "SHARD_BYTES", 10_000)
    folder = save_model(model, tmp_path / "model")
    shards = sorted(folder.glob("*.safetensors"))
    count = len(shards)
    assert count > 2
    assert [s.name for s in shards] == [f"model-{i:05}-of-{count:05}.safetensors" for i in range(1, count + 1)]
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    held = {name: shard.name for shard in shards for name in load_file(shard)}
    assert index["weight_map"] == held
    assert index["metadata"]["total_size"] == 4 * model.config.num_parameters()
    for shard in shards:
        tensors = load_file(shard)
        assert len(tensors) == 1 or sum(t.nbytes for t in tensors.values()) <= 10_000
    assert same_bits(load_model(folder), model)
    shards[1].unlink()
    with pytest.raises(UserError, match=shards[1].name):
        load_model(folder)


def test_an_embedding_written_twice_is_tolerated(saved):
    # Some tools write the shared table as lm_head too.
    edit(saved, lambda t: t.update({"lm_head.weight": t["transformer.token_embeddings.weight"].clone()}))
    assert same_bits(load_model(saved), make())


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (lambda t: t.pop("transformer.layers.1.ffn.proj_2.weight"), "transformer.layers.1.ffn.proj_2.weight"),
        (lambda t: t.update(extra=torch.zeros(1)), "extra"),
        (
            lambda t: t.update({"transformer.norm.weight": torch.ones(33)}),
            r"transformer.norm.weight has shape \(33,\).*\(32,\)",
        ),
        # One that torch would have broadcast without a word.
        (lambda t: t.update({"transformer.norm.weight": torch.ones(1)}), r"transformer.norm.weight has shape \(1,\)"),
    ],
    ids=["missing", "unknown", "misshapen", "broadcastable"],
)
def test_wrong_tensors_are_named(saved, change, named):
    edit(saved, change)
    with pytest.raises(UserError, match=named):
        load_model(saved)


@pytest.mark.parametrize("keep", [0, 5, 200, -1])
def test_a_file_cut_short_is_named(saved, keep):
    path = saved / "model.safetensors"
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(UserError, match=r"model\.safetensors cannot be read.*cut short"):
        load_model(saved)


@pytest.mark.parametrize("name", ["../other/model.safetensors", "/etc/passwd", "sub/model.safetensors", ".."])
def test_an_index_that_points_outside_is_refused(tmp_path, saved, name):
    shutil.copytree(saved, tmp_path / "other")
    (saved / "sub").mkdir()
    shutil.copy(saved / "model.safetensors", saved / "sub")
    names = load_file(saved / "model.safetensors")
    index = {"metadata": {}, "weight_map": dict.fromkeys(names, name)}
    (saved / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(UserError, match="points outside the folder" if name != ".." else "lacks"):
        load_model(saved)


@pytest.mark.parametrize("index", ["", "[]", "{}", '{"weight_map": ["model.safetensors"]}', '{"weight_map": {"a": 1}}'])
def test_a_damaged_index_is_named(saved, index):
    (saved / "model.safetensors.index.json").write_text(index)
    with pytest.raises(UserError, match=r"model\.safetensors\.index\.json"):
        load_model(saved)


def test_what_is_no_model_folder_is_said(tmp_path, saved):
    with pytest.raises(UserError, match=r"no config\.json"):
        load_model(tmp_path)
    (saved / "model.safetensors").unlink()
    with pytest.raises(UserError, match=r"lacks model\.safetensors"):
        load_model(saved)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("{", "not JSON"),
        ("[]", "must hold an object"),
        ('{"model_type": "llama"}', "'llama'.*only 'openelm'"),
        ('{"model_type": "openelm", "dtype": "int8"}', "'int8'.*must be one of"),
        ('{"model_type": "openelm", "model_dim": 32}', "num_transformer_layers"),
    ],
)
def test_a_config_that_cannot_be_read_is_explained(saved, text, said):
    (saved / "config.json").write_text(text)
    with pytest.raises(UserError, match=r"config\.json.*" + said):
        load_model(saved)


@pytest.mark.parametrize(
    "changes",
    [{"activation_fn_name": "gelu"}, {"ffn_with_glu": False}, {"normalization_layer_name": "batch_norm"}],
    ids=str,
)
def test_an_architecture_that_is_not_ours_is_refused_rather_than_computed_wrongly(saved, changes):
    set_config(saved, **changes)
    with pytest.raises(UserError, match=r"config\.json.*" + next(iter(changes))):
        load_model(saved)


def test_layer_norm_has_tensors_of_the_same_names_and_config_json_tells_it(tmp_path, saved):
    model = make(normalization_layer_name="layer_norm")
    folder = save_model(model, tmp_path / "other")
    assert load_file(folder / "model.safetensors").keys() == load_file(saved / "model.safetensors").keys()
    assert json.loads((folder / "config.json").read_text())["normalization_layer_name"] == "layer_norm"
    back, ids = load_model(folder), torch.arange(12)[None]
    assert back.config == model.config and same_bits(back, model)
    assert back.config.num_parameters() == make().config.num_parameters() == sum(p.numel() for p in back.parameters())
    with torch.no_grad():
        assert torch.equal(back(ids), model(ids))
        assert (back(ids) - load_model(saved)(ids)).abs().max() > 1e-3


def test_a_folder_is_overwritten_only_when_told_to(tmp_path, saved):
    other = make(vocab_size=41)
    before = (saved / "model.safetensors").read_bytes()
    with pytest.raises(UserError, match=r"exists.*--overwrite"):
        save_model(other, saved)
    assert (saved / "model.safetensors").read_bytes() == before
    (saved / "left-over").touch()
    save_model(other, saved, overwrite=True)
    assert same_bits(load_model(saved), other)
    assert not (saved / "left-over").exists()
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_a_writer_that_fails_leaves_nothing(tmp_path):
    class Tokenizer:
        def save(self, folder: Path) -> None:
            raise RuntimeError("no tokenizer today")

    with pytest.raises(RuntimeError, match="no tokenizer today"):
        save_model(make(), tmp_path / "model", tokenizer=Tokenizer())
    assert list(tmp_path.iterdir()) == []


def test_the_package_offers_both_under_its_own_name(tmp_path):
    model = make()
    openelm.save_model(model, tmp_path / "model", card="# A card\n")
    assert same_bits(openelm.load_model(tmp_path / "model"), model)
    assert (tmp_path / "model" / "README.md").read_text() == "# A card\n"


def test_loaded_models_are_ready_to_use(saved):
    model = load_model(saved)
    assert not model.training
    assert not any(p.requires_grad for p in model.parameters())


def cut(folder: Path, model: OpenELM, row: int) -> list[Path]:
    """The model in two files, cut at a row of each tensor."""
    save_model(model, folder)
    (folder / "model.safetensors").unlink()
    files = [folder / f"model-0000{number}-of-00002.safetensors" for number in (1, 2)]
    for file, rows in zip(files, (slice(0, row), slice(row, None)), strict=True):
        tensors = {to_folder_name(name): tensor for name, tensor in model.state_dict().items()}
        first = rows.start
        save_slices(file, {name: Slice(t[rows], min(first, len(t)), tuple(t.shape)) for name, t in tensors.items()})
    return files


@pytest.mark.parametrize("row", [0, 1, 17, 40, 1000])
def test_tensors_cut_by_rows_come_back_whole(tmp_path, row):
    cut(tmp_path / "model", make(), row)
    assert same_bits(load_model(tmp_path / "model"), make())
    rounded = make().to(torch.bfloat16)
    assert same_bits(load_model(tmp_path / "model", dtype=torch.bfloat16), rounded)


@pytest.mark.parametrize(
    "places",
    ["", "[]", "1", '{"transformer.norm.weight": 5}', '{"transformer.norm.weight": [0]}']
    + ['{"transformer.norm.weight": [0, 32]}', '{"transformer.norm.weight": [0, [32, 1]]}']
    + ['{"transformer.norm.weight": ["a", [32]]}', '{"transformer.norm.weight": [0, [48]]}'],
)
def test_places_that_make_no_sense_are_named(tmp_path, places):
    files = cut(tmp_path / "model", make(), 16)
    save_file(load_file(files[0]), files[0], metadata={PLACES: places})
    with pytest.raises(UserError, match=r"model-0000[12]-of-00002\.safetensors"):
        load_model(tmp_path / "model")


def test_parts_of_another_number_of_parts_are_refused(tmp_path):
    files = cut(tmp_path / "model", make(), 16)
    shutil.copy(files[0], tmp_path / "model" / "model-00001-of-00003.safetensors")
    with pytest.raises(UserError, match=r"is not one of|lacks model-0000\d-of-0000\d"):
        load_model(tmp_path / "model")
    (tmp_path / "model" / "model-00001-of-00003.safetensors").unlink()
    shutil.copy(files[0], tmp_path / "model" / "model-0000x-of-0000x.safetensors")
    with pytest.raises(UserError, match=r"is not one of"):
        load_model(tmp_path / "model")


# --- quantised folders, as mlx-lm writes them -------------------------------------------------------------------------

QKV = "transformer.layers.1.attn.qkv_proj"
OUT = "transformer.layers.1.attn.out_proj"


def quantized(folder: Path, dtype: torch.dtype, **entries: object) -> OpenELM:
    """Quantise a folder in place, 4 bits in groups of 32 unless ``entries`` say otherwise; the model it stands for."""
    model = make(share_input_output_layers=False).to(dtype)
    save_model(model, folder)
    meant, tensors = model.state_dict(), {}
    for name, tensor in model.state_dict().items():
        stored = to_folder_name(name)
        base = stored.removesuffix(".weight")
        entry = entries.get(base, True)
        how = entry if isinstance(entry, dict) else {"bits": 4, "group_size": 32}
        if not entry or not fits(tuple(tensor.shape), how["group_size"]):
            tensors[stored] = tensor
            continue
        packed = quantize(tensor, how["bits"], how["group_size"])
        tensors |= {stored: packed.weight, f"{base}.scales": packed.scales, f"{base}.biases": packed.biases}
        meant[name] = dequantize(packed)
    save_file(tensors, folder / "model.safetensors")
    set_config(folder, quantization={"bits": 4, "group_size": 32, "mode": "affine", **entries})
    model.load_state_dict(meant)
    return model


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_a_quantised_folder_is_read_as_the_values_that_it_stands_for(tmp_path, dtype):
    expected = quantized(tmp_path / "model", dtype)
    assert not same_bits(expected, make(share_input_output_layers=False).to(dtype))
    assert same_bits(load_model(tmp_path / "model"), expected)
    assert same_bits(load_model(tmp_path / "model", dtype=torch.float32), expected.float())


def test_rows_of_a_quantised_matrix_are_read_alone(tmp_path):
    expected = quantized(tmp_path / "model", torch.float32)
    stored = open_tensors(tmp_path / "model")
    table = expected.token_embeddings.weight
    assert stored.shapes == {name: tuple(tensor.shape) for name, tensor in expected.state_dict().items()}
    assert torch.equal(stored.read("token_embeddings.weight", 3, 5), table[3:8])
    assert stored.read("token_embeddings.weight", 3, 0).shape == (0, 32)


def test_layers_may_be_quantised_in_ways_of_their_own(tmp_path):
    ways = {QKV: {"bits": 8, "group_size": 32}, OUT: False, "lm_head": {"bits": 8, "group_size": 32, "mode": "affine"}}
    expected = quantized(tmp_path / "model", torch.float32, **ways)
    assert same_bits(load_model(tmp_path / "model"), expected)
    made = make(share_input_output_layers=False).state_dict()
    assert torch.equal(expected.state_dict()["layers.1.attn.out_proj.weight"], made["layers.1.attn.out_proj.weight"])


def test_an_entry_that_says_true_means_what_holds_for_all(tmp_path):
    expected = quantized(tmp_path / "model", torch.float32, **{QKV: True})
    assert same_bits(load_model(tmp_path / "model"), expected)


def test_the_parts_of_a_matrix_may_stand_in_several_files(tmp_path):
    expected = quantized(tmp_path / "model", torch.float32)
    tensors = load_file(tmp_path / "model" / "model.safetensors")
    (tmp_path / "model" / "model.safetensors").unlink()
    names = sorted(tensors, key=lambda name: name.rpartition(".")[2])
    for number, some in enumerate((names[:20], names[20:]), start=1):
        file = tmp_path / "model" / f"model-0000{number}-of-00002.safetensors"
        save_file({name: tensors[name] for name in some}, file)
    assert same_bits(load_model(tmp_path / "model"), expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_without_a_dtype_in_config_json_it_is_that_of_the_scales(tmp_path, dtype):
    folder = tmp_path / "model"
    expected = quantized(folder, dtype)
    data = json.loads((folder / "config.json").read_text())
    del data["dtype"]
    (folder / "config.json").write_text(json.dumps(data))
    assert load_config(folder) == (expected.config.changed(ffn_multipliers=expected.config.betas), dtype)
    assert same_bits(load_model(folder), expected)


def cast(*names: str, dtype: torch.dtype):
    return lambda t: t.update({name: t[name].to(dtype) for name in names})


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (
            lambda t: t.pop(f"{QKV}.scales"),
            r"qkv_proj\.(biases, of a quantised matrix|weight is of U32)",
        ),
        (lambda t: t.pop(f"{QKV}.biases"), r"qkv_proj\.scales stands without its biases"),
        (lambda t: t.pop(f"{QKV}.weight"), r"qkv_proj\.scales stands without its weight"),
        (
            lambda t: t.update({f"{QKV}.scales": t[f"{QKV}.scales"][:, :0].clone()}),
            r"qkv_proj\.scales: weight, scales and biases have shapes \(96, 4\), \(96, 0\), \(96, 1\), but 4 bits in "
            r"groups of 32, as config\.json says, give \(96, 0\), \(96, 0\), \(96, 0\)",
        ),
        (lambda t: t.update({f"{QKV}.weight": t[f"{QKV}.weight"][:-1].clone()}), r"have shapes \(95, 4\), \(96, 1\)"),
        (lambda t: t.update({f"{QKV}.scales": t[f"{QKV}.scales"][0].clone()}), r"have shapes \(96, 4\), \(1,\)"),
        (cast(f"{QKV}.weight", dtype=torch.int32), r"qkv_proj\.scales: weight, scales and biases are of I32, F32, F32"),
        (cast(f"{QKV}.biases", dtype=torch.bfloat16), r"are of U32, F32, BF16: they must be U32 and twice the same"),
        (cast(f"{QKV}.scales", f"{QKV}.biases", dtype=torch.int8), r"are of U32, I8, I8"),
    ],
)
def test_parts_of_a_quantised_matrix_that_do_not_fit_are_named(tmp_path, change, said):
    quantized(tmp_path / "model", torch.float32)
    edit(tmp_path / "model", change)
    with pytest.raises(UserError, match=r"model\.safetensors.*" + said):
        load_model(tmp_path / "model")


@pytest.mark.parametrize(
    ("entries", "said"),
    [
        ({"bits": 3, "group_size": 64}, "quantization: bits 3, group_size 64"),
        ({"bits": 4, "group_size": 48}, "group_size 48"),
        ({"bits": 4.0, "group_size": 32}, r"bits 4\.0"),
        ({"bits": [4], "group_size": 32}, r"bits \[4\]"),
        ({"group_size": 64}, "bits None"),
        ({"bits": 4, "group_size": 32, "mode": "mxfp4"}, "mode 'mxfp4'.*mode 'affine' can be read"),
        ({"bits": 4, "group_size": 32, QKV: {"bits": 6, "group_size": 32}}, f"quantization of {QKV}: bits 6"),
        ("4bit", "quantization '4bit': it must be an object"),
        # Says another packing than the one that is there.
        ({"bits": 8, "group_size": 32}, r"have shapes .* but 8 bits in groups of 32"),
        ({"bits": 4, "group_size": 64}, r"have shapes .* but 4 bits in groups of 64"),
        (
            {"bits": 4, "group_size": 32, QKV: False},
            r"qkv_proj\.(weight is of U32|(scales|biases), of a quantised matrix)",
        ),
        (None, r"is of U32: weights must be of|(scales|biases), of a quantised matrix, but"),
    ],
    ids=str,
)
def test_a_quantisation_that_cannot_be_read_is_explained(tmp_path, entries, said):
    quantized(tmp_path / "model", torch.float32)
    set_config(tmp_path / "model", quantization=entries)
    with pytest.raises(UserError, match=said):
        load_model(tmp_path / "model")


def test_other_methods_of_quantisation_are_refused(saved):
    set_config(saved, quantization_config={"quant_method": "awq", "bits": 4})
    with pytest.raises(UserError, match=r"config\.json: weights quantised as .*awq.* cannot be read"):
        load_model(saved)


def test_weights_of_whole_numbers_are_not_taken_for_floats(saved):
    edit(saved, lambda t: t.update({"transformer.norm.weight": torch.ones(32, dtype=torch.int8)}))
    with pytest.raises(UserError, match=r"transformer\.norm\.weight is of I8: weights must be of F64, F32, F16, BF16"):
        load_model(saved)
