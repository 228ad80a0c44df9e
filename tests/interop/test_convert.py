"""openelm convert: sources known by content, destinations whole or untouched, and what is refused by name."""

import json
import os
import re
import signal
import struct
import subprocess
import sys
import weakref
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from openelm import cli
from openelm.data.tokenizer import Tokenizer
from openelm.errors import UserError
from openelm.interop.convert import check_destination, convert, open_source, target
from openelm.interop.source import Source, geometry_of, open_folder, with_vocabulary
from openelm.interop.target import Format
from openelm.interop.verify import compare, verify
from openelm.model.folder import load_model, save_model, tensor_shapes
from openelm.model.geometry import SIZES, ModelConfig
from small_models import UNEVEN, make


@pytest.fixture
def folder(tmp_path, golden_weights, tokenizer_file) -> Path:
    """A tiny model with uneven layers, and a tokenizer that knows fewer ids than it has rows."""
    return save_model(make(golden_weights), tmp_path / "model", tokenizer=Tokenizer.load(tokenizer_file))


def same_bits(one: Path, other: Path) -> None:
    first, second = load_model(one), load_model(other)
    assert first.config == second.config
    weights = second.state_dict()
    assert first.state_dict().keys() == weights.keys()
    for name, tensor in first.state_dict().items():
        assert tensor.dtype == weights[name].dtype and torch.equal(tensor, weights[name]), name


def run(*words: object) -> int:
    return cli.run(["convert", *map(str, words)])


# --- sources and geometry ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", SIZES)
def test_a_named_size_is_recognised_by_its_shapes(size):
    config = ModelConfig.from_name(size, vocab_size=32128)
    assert geometry_of(tensor_shapes(config), "it") == config


@pytest.mark.parametrize("changes", [{}, {"share_input_output_layers": False}, {"normalize_qk_projections": False}])
def test_other_geometries_follow_from_the_shapes(changes):
    config = ModelConfig(**{**UNEVEN, **changes})
    found = geometry_of(tensor_shapes(config), "it", head_dim=16, max_context_length=64)
    assert tensor_shapes(found) == tensor_shapes(config)
    assert found.num_query_heads == config.num_query_heads
    assert found.num_kv_heads == config.num_kv_heads
    assert found.ffn_dims == config.ffn_dims
    assert found.max_context_length == 64


@pytest.fixture
def with_layer_norm(tmp_path, golden_weights, tokenizer_file) -> Path:
    model = make(golden_weights, normalization_layer_name="layer_norm")
    return save_model(model, tmp_path / "other", tokenizer=Tokenizer.load(tokenizer_file))


@pytest.mark.parametrize("name", ["mlx", "gguf", "ollama", "corenet"])
def test_layer_norm_is_refused_where_rms_norm_would_be_computed_in_its_place(with_layer_norm, tmp_path, capsys, name):
    before = sorted(tmp_path.iterdir())
    assert run(with_layer_norm, tmp_path / "out", "--to", name) == 2
    said = rf"other has normalization_layer_name='layer_norm', and engines that read {name} compute .* --to hf"
    assert re.search(said, capsys.readouterr().err)
    assert sorted(tmp_path.iterdir()) == before


@pytest.mark.parametrize("method", ["round", "gptq"])
def test_it_is_not_quantised_either(with_layer_norm, tmp_path, text_folder, capsys, method):
    words = ["--bits", "4", "--group-size", "32", "--method", method, "--evaluate", str(text_folder), "--tokens", "256"]
    words += ["--calibration", str(text_folder)] * (method == "gptq")
    assert cli.run(["quantize", str(with_layer_norm), str(tmp_path / "out"), *words]) == 2
    assert "other has normalization_layer_name='layer_norm'" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_for_transformers_it_comes_through_to_the_bit(with_layer_norm, tmp_path):
    pytest.importorskip("transformers")
    assert run(with_layer_norm, tmp_path / "out", "--to", "hf", "--verify") == 0
    same_bits(with_layer_norm, tmp_path / "out")


@pytest.mark.parametrize("lacking", ["token_embeddings.weight", "layers.1.attn.out_proj.weight"])
def test_shapes_that_are_no_openelm_are_refused_by_name(lacking):
    shapes = dict(tensor_shapes(ModelConfig(**UNEVEN)))
    del shapes[lacking]
    with pytest.raises(UserError, match=rf"it is not an OpenELM: it lacks {lacking}"):
        geometry_of(shapes, "it")


def test_groups_that_differ_between_layers_are_refused():
    shapes = {**tensor_shapes(ModelConfig(**UNEVEN))}
    rows, columns = shapes["layers.1.attn.qkv_proj.weight"]
    shapes["layers.1.attn.qkv_proj.weight"] = (rows + 64, columns)
    with pytest.raises(UserError, match="not those of an OpenELM"):
        geometry_of(shapes, "it")


def test_rows_beyond_the_vocabulary_are_dropped_and_said_so(folder):
    source = open_folder(folder)
    smaller = with_vocabulary(source, 400)
    for name in ("token_embeddings.weight", "norm.weight"):
        assert torch.equal(smaller.weight(name), source.weight(name)[: 400 if "embed" in name else None])
    assert smaller.config.vocab_size == 400
    assert smaller.notes == ("vocabulary 448 -> 400: rows 400 to 447 of the embedding were dropped",)
    assert with_vocabulary(source, 448) is source
    with pytest.raises(UserError, match="a vocabulary of 300 would cut off ids of the tokenizer, which has 400"):
        with_vocabulary(source, 300)
    with pytest.raises(UserError, match=r"a vocabulary of 500: .* has 448 rows"):
        with_vocabulary(source, 500)


def test_a_source_is_known_by_its_content_and_not_by_its_name(folder, tmp_path):
    renamed = folder.rename(tmp_path / "weights.gguf")
    assert open_source(str(renamed)).config == load_model(renamed).config
    gguf = tmp_path / "model.pt"
    assert run(renamed, gguf, "--to", "gguf") == 0
    corenet = tmp_path / "model.safetensors"
    assert run(gguf, corenet, "--to", "corenet") == 0
    assert run(corenet, tmp_path / "back", "--to", "hf") == 0
    weights = load_model(tmp_path / "back").state_dict()
    assert all(torch.equal(tensor, weights[name]) for name, tensor in load_model(renamed).state_dict().items())


@pytest.mark.parametrize("content", [b"", b"{}", b"hello, this is no model"])
def test_a_file_that_is_no_model_is_refused(tmp_path, capsys, content):
    (tmp_path / "model.pt").write_bytes(content)
    assert run(tmp_path / "model.pt", tmp_path / "out", "--to", "hf") == 2
    assert "is no model that can be read" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_run_folder_gives_its_model(folder, tmp_path):
    (tmp_path / "run").mkdir()
    folder.rename(tmp_path / "run" / "model")
    assert run(tmp_path / "run", tmp_path / "out", "--to", "hf") == 0
    same_bits(tmp_path / "out", tmp_path / "run" / "model")


# --- round trips ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ["hf", "corenet", "mlx", "gguf"])
def test_there_and_back_is_equal_to_the_bit(tmp_path, golden_weights, tokenizer_file, name, dtype, tied):
    model = make(golden_weights, share_input_output_layers=tied).to(dtype)
    folder = save_model(model, tmp_path / "model", tokenizer=Tokenizer.load(tokenizer_file))
    if name == "gguf" and not tied:
        assert run(folder, tmp_path / "there", "--to", name) == 2
        assert list(tmp_path.iterdir()) == [folder]
        return
    assert run(folder, tmp_path / "there", "--to", name) == 0
    assert run(tmp_path / "there", tmp_path / "back", "--to", "hf", "--tokenizer", tokenizer_file) == 0
    back = load_model(tmp_path / "back")
    assert back.config.share_input_output_layers == tied
    assert {name: back.state_dict()[name].dtype for name in back.state_dict()} == dict.fromkeys(
        model.state_dict(), dtype
    )
    assert all(torch.equal(tensor, back.state_dict()[name]) for name, tensor in model.state_dict().items())
    stored = load_file(tmp_path / "back" / "model.safetensors")
    assert ("lm_head.weight" in stored) is not tied


# --- verify -----------------------------------------------------------------------------------------------------------


def test_verify_reports_what_the_engine_computes(folder, tmp_path, capsys):
    pytest.importorskip("transformers")
    assert run(folder, tmp_path / "out", "--to", "hf", "--verify", "--json") == 0
    figures = json.loads(capsys.readouterr().out)
    assert figures["parameters"] == ModelConfig(**UNEVEN).num_parameters()
    assert figures["bytes"] == sum(file.stat().st_size for file in (tmp_path / "out").rglob("*"))
    verified = figures["verified"]
    assert verified["engine"] == "transformers"
    assert verified["positions"] == 2 * 48
    assert verified["argmax_agreement"] == 1
    assert verified["largest_difference"] < 1e-4


def test_a_result_that_computes_something_else_is_not_kept(folder, tmp_path, monkeypatch, capsys):
    pytest.importorskip("transformers")
    chosen = target("hf")

    def swaps_two(path: Path, source: Source, form: Format) -> None:
        read = {"layers.0.attn_norm.weight": "layers.0.ffn_norm.weight"}
        chosen.write(path, replace(source, read=lambda name: source.read(read.get(name, name))), form)

    wrong = replace(chosen, write=swaps_two)
    monkeypatch.setattr("openelm.interop.convert.target", lambda name: wrong)
    assert run(folder, tmp_path / "out", "--to", "hf", "--verify") == 2
    assert "layers.0.attn_norm.weight came back otherwise than it was written" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_the_difference_is_measured_over_all_positions():
    expected = torch.tensor([[[0.0, 1.0, 2.0, -1.0], [3.0, 1.0, 0.0, 0.0]]])
    found = expected.clone()
    found[0, 1, 1] = 3.5
    result = compare(expected, found)
    assert result.largest_difference == 2.5
    assert result.argmax_agreement == 0.5
    assert result.positions == 2
    assert result.relative_error == pytest.approx((2.5**2 / 8) ** 0.5 / expected.std().item())
    nothing = torch.zeros(1, 2, 4)
    assert compare(nothing, nothing).relative_error == 0


def swapped_halves(tensor: torch.Tensor) -> torch.Tensor:
    gate, up = tensor.chunk(2)
    return torch.cat([up, gate])


@pytest.mark.parametrize("name", ["gate and up swapped", "a layer's FFN left out", "another base of RoPE"])
def test_four_bits_are_no_excuse_for_another_model(folder, tmp_path, name):
    """Rounding to 4 bits moves the logits of random weights by half their spread: that must not hide a mistake."""
    pytest.importorskip("mlx_lm")
    source, form = open_folder(folder), Format(torch.float32, "4bit", 32)

    def read(tensor: str) -> torch.Tensor:
        found = source.read(tensor)
        if name.startswith("gate") and "proj_1" in tensor:
            return swapped_halves(found)
        return found * 0 if name.startswith("a layer") and tensor == "layers.1.ffn.proj_2.weight" else found

    convert(source, "mlx", tmp_path / "right", form)
    right = verify(source, target("mlx"), form, tmp_path / "right")
    assert right.engine_error < 1e-3
    assert 0.02 < right.weight_error < 0.3
    convert(replace(source, read=read), "mlx", tmp_path / "wrong", form)
    if name.startswith("another"):
        path = tmp_path / "wrong" / "config.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), "rope_freq_constant": 500000}))
    with pytest.raises(UserError, match=r"came back otherwise|another geometry|computes something else"):
        verify(source, target("mlx"), form, tmp_path / "wrong")


def test_verifying_without_the_engine_is_refused_and_nothing_is_kept(folder, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(__import__("sys").modules, "llama_cpp", None)
    assert run(folder, tmp_path / "out.gguf", "--to", "gguf", "--verify") == 2
    assert "llama-cpp-python" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == [folder]


# --- bad input: exit code 2, named, the target untouched --------------------------------------------------------------


def broken(folder: Path, change) -> None:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors")


def with_nan(folder: Path) -> None:
    broken(folder, lambda t: t["transformer.layers.1.ffn.proj_2.weight"][3].fill_(float("nan")))


def with_infinity(folder: Path) -> None:
    broken(folder, lambda t: t["transformer.norm.weight"][:2].copy_(torch.tensor([float("inf"), float("-inf")])))


def without_a_tensor(folder: Path) -> None:
    broken(folder, lambda t: t.pop("transformer.layers.2.attn.q_norm.weight"))


def with_a_wrong_shape(folder: Path) -> None:
    name = "transformer.layers.0.attn.out_proj.weight"
    broken(folder, lambda t: t.update({name: t[name][:-1].clone()}))


def with_a_stranger(folder: Path) -> None:
    broken(folder, lambda t: t.update({"transformer.layers.0.attn.rotary.inv_freq": torch.ones(8)}))


def cut_short(folder: Path) -> None:
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])


def overlapping(folder: Path) -> None:
    file = folder / "model.safetensors"
    raw = file.read_bytes()
    (length,) = struct.unpack("<Q", raw[:8])
    header = json.loads(raw[8 : 8 + length])
    names = [name for name in header if name != "__metadata__"]
    start = header[names[1]]["data_offsets"][0] - 4
    header[names[1]]["data_offsets"][0] = start
    text = json.dumps(header).encode().ljust(length)
    file.write_bytes(struct.pack("<Q", len(text)) + text + raw[8 + length :])


def pointing_outside(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder.parent / "outside.safetensors")
    index = {"weight_map": {"transformer.norm.weight": "../outside.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


BAD = [
    (with_nan, r"layers\.1\.ffn\.proj_2\.weight holds 128 values that are NaN"),
    (with_infinity, r"norm\.weight holds 2 values that are NaN or infinite"),
    (without_a_tensor, r"lacks 1 tensors, the first of them transformer\.layers\.2\.attn\.q_norm\.weight"),
    (with_a_wrong_shape, r"layers\.0\.attn\.out_proj\.weight has shape \(63, 32\), but config\.json gives \(64, 32\)"),
    (with_a_stranger, r"holds transformer\.layers\.0\.attn\.rotary\.inv_freq, which a model of this config"),
    (cut_short, r"model\.safetensors cannot be read as safetensors"),
    (overlapping, r"model\.safetensors cannot be read as safetensors"),
    (pointing_outside, r"points outside the folder \('\.\./outside\.safetensors'\)"),
]


@pytest.mark.parametrize("name", ["hf", "corenet", "mlx", "gguf", "ollama"])
@pytest.mark.parametrize(("spoil", "message"), BAD, ids=[spoil.__name__ for spoil, _ in BAD])
def test_a_broken_source_is_named_and_the_target_stays_as_it_was(folder, tmp_path, capsys, name, spoil, message):
    there = tmp_path / "there"
    assert run(folder, there, "--to", name) == 0
    before = {file: file.read_bytes() for file in [there, *there.rglob("*")] if file.is_file()}
    spoil(folder)
    capsys.readouterr()
    assert run(folder, there, "--to", name, "--overwrite") == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert re.search(message, error), error
    assert {file: file.read_bytes() for file in [there, *there.rglob("*")] if file.is_file()} == before
    assert not list(tmp_path.glob(".*"))


@pytest.mark.parametrize("name", ["hf", "corenet", "mlx", "gguf", "ollama"])
def test_a_target_that_exists_is_replaced_only_when_asked(folder, tmp_path, capsys, name):
    there = tmp_path / "there"
    assert run(folder, there, "--to", name) == 0
    assert run(folder, there, "--to", name) == 2
    assert f"{there} exists, and nothing is overwritten unasked" in capsys.readouterr().err
    assert run(folder, there, "--to", name, "--overwrite", "--dtype", "bfloat16") == 0


def test_what_is_no_model_is_never_replaced(folder, tmp_path):
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter.txt").write_text("years of work")
    with pytest.raises(UserError, match="holds no model, so it is not replaced"):
        check_destination(tmp_path / "thesis", is_file=False, overwrite=True)
    with pytest.raises(UserError, match="is a folder, and a file is to be written"):
        check_destination(folder, is_file=True, overwrite=True)
    with pytest.raises(UserError, match="holds no model, so it is not replaced"):
        check_destination(tmp_path / "thesis" / "chapter.txt", is_file=True, overwrite=True)
    with pytest.raises(UserError, match="is no ordinary file, so it is not replaced"):
        check_destination(Path("/dev/null"), is_file=True, overwrite=True)
    (folder / "notes.txt").write_text("on this model")
    with pytest.raises(UserError, match=r"holds more than a model \(notes.txt\), so it is not replaced"):
        check_destination(folder, is_file=False, overwrite=True)
    (folder / "notes.txt").unlink()
    (folder / "checkpoint-500").mkdir()
    with pytest.raises(UserError, match=r"holds more than a model \(checkpoint-500\), so it is not replaced"):
        check_destination(folder, is_file=False, overwrite=True)
    web = tmp_path / "web"
    web.mkdir()
    (web / "config.json").write_text('{"name": "web"}')
    with pytest.raises(UserError, match="is a folder that holds no model"):
        check_destination(web, is_file=False, overwrite=True)
    with pytest.raises(UserError, match="is a file, and a folder is to be written"):
        check_destination(tmp_path / "thesis" / "chapter.txt", is_file=False, overwrite=True)


def test_a_model_may_replace_itself(folder, golden_weights):
    assert run(folder, folder, "--to", "hf", "--overwrite") == 0
    assert (folder / "modeling_openelm.py").is_file()
    for words in (["hf", "--dtype", "bfloat16"], ["mlx", "--quantize", "4bit"]):
        assert run(folder, folder, "--overwrite", "--to", *words) == 2  # what is lost would be lost for good
    expected = make(golden_weights).state_dict()
    assert all(torch.equal(t, expected[n]) for n, t in load_model(folder).state_dict().items())


def test_a_checkpoint_is_not_replaced(recipe, write_recipe, tmp_path):
    assert cli.run(["pretrain", write_recipe(recipe), "--run", str(tmp_path / "run")]) == 0
    checkpoint = tmp_path / "run" / "checkpoints" / "step_00000008"
    with pytest.raises(UserError, match="so it is not replaced"):
        check_destination(checkpoint, is_file=False, overwrite=True)
    # As a source it has its run's tokenizer.
    source = open_folder(checkpoint)
    assert source.tokenizer is not None
    assert source.tokenizer.fingerprint == Tokenizer.load(recipe["tokenizer"]["path"]).fingerprint


@pytest.mark.parametrize("name", ["hf", "gguf"])
def test_what_takes_the_name_meanwhile_is_not_replaced(folder, tmp_path, name):
    there = tmp_path / "there"

    def taken(_: Path) -> None:
        if name == "hf":
            there.mkdir()
        else:
            there.write_text("precious")

    with pytest.raises(UserError, match="exists, and nothing is overwritten unasked"):
        convert(open_folder(folder), name, there, Format(torch.float32), check=taken)
    assert there.is_dir() or there.read_text() == "precious"
    assert not list(tmp_path.glob(".*"))


def test_a_link_stays_and_what_it_points_to_is_replaced(folder, tmp_path):
    (tmp_path / "link").symlink_to(tmp_path / "there")
    assert run(folder, tmp_path / "there", "--to", "hf") == 0
    for dtype in ("bfloat16", "float16"):
        assert run(folder, tmp_path / "link", "--to", "hf", "--overwrite", "--dtype", dtype) == 0
    assert (tmp_path / "link").is_symlink()
    assert load_model(tmp_path / "there").norm.weight.dtype == torch.float16
    assert not list(tmp_path.glob(".*"))


def test_drafts_of_killed_conversions_are_swept_away_and_living_ones_are_not(folder, tmp_path):
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    (tmp_path / f".out.tmp-{dead.pid}").mkdir()
    (tmp_path / f".out.tmp-{os.getppid()}").mkdir()
    assert run(folder, tmp_path / "out", "--to", "hf") == 0
    assert [entry.name for entry in tmp_path.glob(".*")] == [f".out.tmp-{os.getppid()}"]


@pytest.mark.parametrize("name", ["hf", "gguf", "corenet"])
def test_the_folder_of_the_target_is_made(folder, tmp_path, name):
    assert run(folder, tmp_path / "not" / "there" / "yet", "--to", name) == 0
    assert (tmp_path / "not" / "there" / "yet").exists()


def test_terminated_it_ends_as_interrupted_with_nothing_left(folder, tmp_path, monkeypatch):
    chosen = target("hf")

    def killed(path: Path, source: Source, form: Format) -> None:
        chosen.write(path, source, form)
        signal.raise_signal(signal.SIGTERM)

    monkeypatch.setattr("openelm.interop.convert.target", lambda name: replace(chosen, write=killed))
    before = signal.getsignal(signal.SIGTERM)
    assert run(folder, tmp_path / "out", "--to", "hf") == 130
    assert signal.getsignal(signal.SIGTERM) is before
    assert list(tmp_path.iterdir()) == [folder]


# --- what a folder says twice -----------------------------------------------------------------------------------------


def test_a_head_unlike_the_embedding_is_never_passed_over(folder, tmp_path, capsys):
    broken(folder, lambda t: t.update({"lm_head.weight": t["transformer.token_embeddings.weight"] * 2}))
    assert run(folder, tmp_path / "out", "--to", "hf") == 2
    assert "has an lm_head.weight unlike its embedding" in capsys.readouterr().err
    with pytest.raises(UserError, match=r"lm_head\.weight unlike its embedding"):
        load_model(folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "tie_word_embeddings": False}))
    model = load_model(folder)
    assert not model.config.share_input_output_layers
    assert torch.equal(model.output_weight, 2 * model.token_embeddings.weight)


def test_the_ends_of_a_text_are_the_tokenizers(folder, tmp_path, capsys):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "eos_token_id": 7}))
    assert run(folder, tmp_path / "out", "--to", "hf") == 0
    assert "begin and end of text are the tokenizer's, 1 and 2; the model said 1 and 7" in capsys.readouterr().err
    for file in ("config.json", "generation_config.json"):
        assert json.loads((tmp_path / "out" / file).read_text())["eos_token_id"] == 2


def test_settings_of_generation_go_along(folder, tmp_path):
    given = {"repetition_penalty": 1.2, "eos_token_id": [2, 9], "bos_token_id": 1}
    (folder / "generation_config.json").write_text(json.dumps(given))
    assert run(folder, tmp_path / "out", "--to", "hf") == 0
    assert json.loads((tmp_path / "out" / "generation_config.json").read_text()) == given


def test_as_they_are_is_the_widest_dtype_of_the_matrices(folder, tmp_path):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "dtype": "bfloat16"}))
    assert open_folder(folder).dtype == torch.float32
    assert run(folder, tmp_path / "out.pt", "--to", "corenet") == 0
    weights = torch.load(tmp_path / "out.pt", weights_only=True)
    assert {weight.dtype for weight in weights.values()} == {torch.float32}
    torch.save({**weights, "token_embeddings.weight": weights["token_embeddings.weight"].bfloat16()}, tmp_path / "a.pt")
    assert open_source(str(tmp_path / "a.pt")).dtype == torch.float32


def test_a_template_in_the_older_place_and_tokens_left_behind_are_seen(folder, tmp_path):
    for name, changes in (
        ("tokenizer_config.json", {"chat_template": "{{ messages }}"}),
        ("tokenizer.json", {"added_tokens": [{"id": 400, "content": "<|pad|>"}]}),
    ):
        (folder / name).write_text(json.dumps({**json.loads((folder / name).read_text()), **changes}))
    source = open_folder(folder)
    assert source.chat_template == "{{ messages }}"
    (note,) = source.notes
    assert "1 tokens more than tokenizer.model (<|pad|>, …): left behind" in note


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rope_scaling": {"rope_type": "yarn", "factor": 2}}, "rope_scaling"),
        ({"rope_freq_constant": "abc"}, "rope_freq_constant='abc' must be a positive number"),
        ({"rope_freq_constant": 0}, "rope_freq_constant=0 must be a positive number"),
        ({"rope_max_length": None}, "rope_max_length=None must be a positive number"),
        ({"eos_token_id": "x"}, "eos_token_id='x' must be the id of a token"),
        ({"num_kv_heads": 5}, "num_kv_heads=5 must be a list"),
        ({"num_transformer_layers": 200_000}, "num_transformer_layers=200000 is above the limit"),
        ({"share_input_output_layers": "false"}, "share_input_output_layers='false' must be true or false"),
        ({"dtype": ["float32"]}, "dtype ['float32']"),
    ],
)
def test_a_config_that_cannot_be_is_named(folder, tmp_path, capsys, changes, message):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **changes}))
    assert run(folder, tmp_path / "out", "--to", "hf") == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("file", ["config.json", "tokenizer_config.json", "model.safetensors.index.json"])
def test_deep_nesting_is_no_crash(folder, tmp_path, capsys, file):
    (folder / file).write_text("[" * 100_000)
    assert run(folder, tmp_path / "out", "--to", "hf") == 2
    assert file in capsys.readouterr().err


@pytest.mark.parametrize(
    ("value", "dtype", "message"),
    [
        (1e5, "float16", "holds 1e+05, beyond float16's 6.55e+04: use a wider --dtype"),
        (3.4e38, "bf16", "beyond bfloat16's"),
    ],
)
def test_what_a_dtype_cannot_hold_is_named(tmp_path, golden_weights, capsys, value, dtype, message):
    model = make(golden_weights)
    with torch.no_grad():
        model.layers[1].ffn.proj_1.weight[2, 3] = value
    folder = save_model(model, tmp_path / "model")
    assert run(folder, tmp_path / "out", "--to", "hf", "--dtype", dtype) == 2
    error = capsys.readouterr().err
    assert "layers.1.ffn.proj_1.weight" in error
    assert message in error
    with torch.no_grad():
        model.layers[1].ffn.proj_1.weight.fill_(1e-12)
    save_model(model, folder, overwrite=True)
    assert run(folder, tmp_path / "out", "--to", "hf", "--dtype", "float16") == 2
    assert "all below float16's" in capsys.readouterr().err


def test_a_model_without_a_tokenizer_says_where_one_is(tmp_path, golden_weights, tokenizer_file, capsys):
    folder = save_model(make(golden_weights), tmp_path / "model")
    assert run(folder, tmp_path / "out", "--to", "hf") == 0
    error = capsys.readouterr().err
    assert "without a tokenizer" in error
    assert "pass --tokenizer with the file or folder of the one that the model was trained with" in error
    assert run(folder, tmp_path / "with", "--to", "hf", "--tokenizer", tokenizer_file) == 0
    assert "without a tokenizer" not in capsys.readouterr().err
    assert Tokenizer.load(tmp_path / "with").fingerprint == Tokenizer.load(tokenizer_file).fingerprint


def test_a_tokenizer_larger_than_the_model_is_refused(tmp_path, golden_weights, tokenizer_file, capsys):
    folder = save_model(make(golden_weights, vocab_size=300), tmp_path / "model")
    assert run(folder, tmp_path / "out", "--to", "hf", "--tokenizer", tokenizer_file) == 2
    assert "the tokenizer has 400 tokens" in capsys.readouterr().err


def test_the_card_of_rounded_weights_says_so_and_claims_no_measured_figures(folder, tmp_path):
    head = "---\nlicense: mit\nmodel-index: [{name: it, results: []}]\n---\n# It\n"
    (folder / "README.md").write_text(head)
    for there, words in (("whole", ["hf"]), ("small", ["mlx", "--quantize", "4bit", "--group-size", "32"])):
        assert run(folder, tmp_path / there, "--to", *words) == 0
    assert run(tmp_path / "small", tmp_path / "again", "--to", "hf") == 0
    cards = {name: (tmp_path / name / "README.md").read_text() for name in ("whole", "small", "again")}
    assert ["model-index" in card for card in cards.values()] == [True, False, False]
    assert "written in another layout by" in cards["whole"]
    assert "quantised to 4bit by" in cards["small"]
    assert ", quantised, written in another layout by" in cards["again"]


@pytest.mark.parametrize("name", ["hf", "mlx"])
def test_the_licence_goes_along(folder, tmp_path, name):
    (folder / "LICENSE.txt").write_text("For research only.\n")
    assert run(folder, tmp_path / "out", "--to", name) == 0
    assert (tmp_path / "out" / "LICENSE").read_text() == "For research only.\n"


@pytest.mark.parametrize("name", ["gguf", "corenet"])
def test_info_draws_the_geometry_of_a_file(folder, tmp_path, capsys, name):
    assert run(folder, tmp_path / "weights", "--to", name) == 0
    capsys.readouterr()
    assert cli.run(["info", str(tmp_path / "weights"), "--json"]) == 0
    figures = json.loads(capsys.readouterr().out)
    config = ModelConfig(**UNEVEN)
    assert figures["parameters"] == config.num_parameters()
    assert figures["ffn_dims"] == list(config.ffn_dims)
    assert figures["num_query_heads"] == list(config.num_query_heads)


@pytest.mark.parametrize("chat", ["plain", "handbook"])
def test_the_chat_template_goes_along(folder, tmp_path, chat):
    from openelm.data import chat as templates

    expected = templates.CHAT_TEMPLATE if chat == "plain" else templates.HANDBOOK_TEMPLATE
    assert run(folder, tmp_path / "a", "--to", "hf", "--chat", chat) == 0
    assert run(tmp_path / "a", tmp_path / "b.gguf", "--to", "gguf") == 0
    assert run(tmp_path / "b.gguf", tmp_path / "c", "--to", "mlx") == 0
    assert (tmp_path / "c" / "chat_template.jinja").read_text() == expected


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--to", "hf", "--quantize", "4bit"], "quantize"),
        (["--to", "corenet", "--quantize", "Q8_0"], "quantize"),
        (["--to", "mlx", "--quantize", "Q4_0"], "4bit"),
        (["--to", "mlx", "--quantize", "4bit", "--group-size", "48"], "48"),
        (["--to", "hf", "--group-size", "32"], "--group-size 32 is for --to mlx with --quantize"),
        (["--to", "gguf", "--quantize", "Q8_0", "--dtype", "fp16"], "exclude each other"),
        (["--to", "hf", "--geometry", "some.yaml"], "--geometry is for a .pt file"),
        (["--to", "gguf", "--quantize", "Q3_K"], "Q8_0"),
        (["--to", "hf", "--vocab-size", "9999"], "9999"),
        (["--to", "hf", "--tokenizer", "nowhere"], "nowhere"),
    ],
)
def test_what_a_target_does_not_have_is_refused(folder, tmp_path, capsys, words, message):
    assert run(folder, tmp_path / "out", *words) == 2
    error = capsys.readouterr().err
    assert message in error
    assert "Traceback" not in error
    assert list(tmp_path.iterdir()) == [folder]


def test_conversion_reads_each_tensor_once_and_holds_none(folder, tmp_path):
    source = open_folder(folder)
    for name in ("hf", "corenet", "mlx", "gguf"):
        read: list[str] = []
        alive: list[object] = []

        def watch(tensor: str, read=read, alive=alive) -> torch.Tensor:
            assert sum(reference() is not None for reference in alive) <= 1, f"several tensors are held at {tensor}"
            read.append(tensor)
            value = source.read(tensor)
            alive.append(weakref.ref(value))
            return value

        convert(replace(source, read=watch), name, tmp_path / name, Format(torch.float32))
        assert sorted(read) == sorted(source.shapes), name


def test_verify_uses_the_written_folder(folder, tmp_path):
    pytest.importorskip("transformers")
    source, chosen, form = open_folder(folder), target("hf"), Format(torch.float32)
    convert(source, "hf", tmp_path / "out", form)
    assert verify(source, chosen, form, tmp_path / "out").relative_error < 1e-5
