"""openelm quantize: a folder that every engine reads, what was lost by it, and what is refused."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

import small_models
from openelm import ModelConfig, OpenELM, cli, load_model
from openelm.data.excerpts import excerpts
from openelm.data.tokenizer import Tokenizer
from openelm.interop import mlx
from openelm.interop.convert import convert
from openelm.interop.source import open_folder
from openelm.interop.target import Format
from openelm.model.folder import open_tensors, save_model
from openelm.model.quantize import Quantized, dequantize


@pytest.fixture(scope="session")
def trained(tmp_path_factory, text_folder, tokenizer_file) -> Path:
    """A tiny model that has learnt something of the small text, so that its inputs have structure."""
    tokenizer = Tokenizer.load(tokenizer_file)
    torch.manual_seed(0)
    model = OpenELM(ModelConfig(**{**small_models.UNEVEN, "vocab_size": tokenizer.vocab_size}))
    rows = torch.tensor(excerpts([str(text_folder)], tokenizer, 20_000).rows(33))
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for step in range(60):
        batch = rows[torch.randint(0, len(rows), (16,), generator=torch.Generator().manual_seed(step))]
        loss = model(batch[:, :-1], batch[:, 1:]) / batch[:, 1:].numel()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return save_model(model.eval(), tmp_path_factory.mktemp("trained") / "model", tokenizer=tokenizer)


@pytest.fixture
def quantize(trained, text_folder, tmp_path, capsys):
    """``quantize("--bits", "4", …)``: what the command did with the tiny model, as JSON; text is the small one."""

    def call(*words: str, calibration: bool = True) -> dict[str, Any]:
        files = sorted(text_folder.iterdir())
        own = ["--evaluate", *map(str, files[:10])]
        own += ["--calibration", str(text_folder)] if calibration else []
        code = cli.run(["quantize", str(trained), str(tmp_path / "out"), *own, "--tokens", "2048", *words, "--json"])
        printed = capsys.readouterr()
        assert code == 0, printed.err
        return json.loads(printed.out)

    return call


def test_gptq_loses_less_than_rounding_and_says_how_much(quantize, tmp_path, trained):
    found = quantize("--bits", "4", "--group-size", "32")
    assert (found["method"], found["dtype"], found["not_quantized"]) == ("gptq", "bfloat16", [])
    calibration, evaluation = found["calibration"], found["evaluation"]
    assert calibration["tokens"] == 2048 and calibration["seconds"] > 0 and not calibration["notes"]
    assert evaluation["tokens"] >= 2048 and evaluation["documents"] <= 10
    rounded = quantize("--bits", "4", "--group-size", "32", "--method", "round", "--overwrite", calibration=False)
    assert rounded["calibration"] is None and rounded["bits_per_weight"] == found["bits_per_weight"]
    before = evaluation["bits_per_byte_before"]
    assert rounded["evaluation"]["bits_per_byte_before"] == before
    assert 0 < evaluation["kl"] < 0.6 * rounded["evaluation"]["kl"]
    assert evaluation["top_1_agreement"] > rounded["evaluation"]["top_1_agreement"]
    ratio = 2 ** ((evaluation["bits_per_byte"] - before) * evaluation["bytes"] / evaluation["tokens"])
    assert evaluation["perplexity_ratio"] == pytest.approx(ratio)


def test_sizes_are_those_of_the_files(quantize, tmp_path, trained):
    found = quantize("--bits", "8", "--group-size", "64", calibration=False)
    after = (tmp_path / "out" / "model.safetensors").stat().st_size
    assert found["bytes"] == after and found["bytes_before"] == (trained / "model.safetensors").stat().st_size
    parameters = load_model(trained).config.num_parameters()
    assert found["bits_per_weight"] == pytest.approx(8 * after / parameters, rel=0.2)  # the file has a header too
    # Rows of 32 and 96 are no whole groups of 64.
    assert found["not_quantized"] and all("out_proj" in name or "proj_2" in name for name in found["not_quantized"])
    assert found["evaluation"]["kl"] < 0.002


def test_rounding_is_what_convert_writes(quantize, tmp_path, trained):
    quantize("--bits", "4", "--method", "round", "--dtype", "fp16", calibration=False)
    convert(open_folder(trained), "mlx", tmp_path / "converted", Format(torch.float16, "4bit", 64))
    one, other = ((tmp_path / name / "model.safetensors").read_bytes() for name in ("out", "converted"))
    assert one == other


def test_the_folder_holds_the_codes_that_were_found(quantize, tmp_path, monkeypatch):
    from openelm.infer import calibrate as module

    seen: dict[str, Quantized] = {}
    real = module.calibrate

    def watched(*words: Any) -> Any:
        found = real(*words)
        seen.update(found.codes)
        return found

    monkeypatch.setattr(module, "calibrate", watched)
    quantize("--bits", "4", "--group-size", "32")
    stored = open_tensors(tmp_path / "out")
    assert seen
    for name, quantized in seen.items():
        raw = stored.raw(name)
        assert isinstance(raw, Quantized) and torch.equal(raw.weight, quantized.weight)
        assert torch.equal(raw.scales, quantized.scales) and torch.equal(raw.biases, quantized.biases)
        assert torch.equal(stored.read(name), dequantize(quantized))


@pytest.mark.parametrize("method", ["round", "gptq"])
def test_mlx_lm_computes_the_same_from_it(quantize, tmp_path, method):
    pytest.importorskip("mlx_lm")
    quantize("--bits", "4", "--group-size", "32", "--dtype", "fp32", "--method", method, calibration=method == "gptq")
    model = load_model(tmp_path / "out")
    rows = torch.randint(0, model.config.vocab_size, (2, 40), generator=torch.Generator().manual_seed(0))
    found = mlx.TARGET.logits(tmp_path / "out", rows.tolist())
    with torch.no_grad():
        torch.testing.assert_close(found, model(rows), rtol=0, atol=1e-4)


def test_the_card_says_how_and_at_what_price(quantize, tmp_path):
    figures = quantize("--bits", "4")["evaluation"]
    card = (tmp_path / "out" / "README.md").read_text()
    assert "quantised to 4bit" in card
    assert "- 4 bits in groups of 64 by GPTQ, on 2,048 tokens of text of text" in card
    assert f"KL {figures['kl']:.5f} nats a token" in card
    assert str(tmp_path) not in card


def test_without_json_it_is_told_in_words(trained, tmp_path, capsys, monkeypatch):
    assert cli.run(["quantize", str(trained), str(tmp_path / "out"), "--bits", "4", "--tokens", "600"]) == 0
    out = capsys.readouterr().out
    assert "4 bits in groups of 64 (gptq)" in out and "matrices whose rows are not whole groups stay in bfloat16" in out
    assert "calibrated on 640 tokens of text of the Python installation in" in out
    assert "that calibration did not see" in out and "top" not in out


def test_calibration_leaves_out_what_is_evaluated_on(text_folder, tokenizer_file):
    tokenizer = Tokenizer.load(tokenizer_file)
    some = excerpts([str(text_folder)], tokenizer, 2000)
    others = excerpts([str(text_folder)], tokenizer, 10**6, but=some.digests)
    assert 0 < len(some.digests) < 40 and len(some.digests) + len(others.digests) == 40
    assert not some.digests & others.digests


def refused(capsys: pytest.CaptureFixture[str], *words: object) -> str:
    assert cli.run(["quantize", *map(str, words)]) == 2
    return capsys.readouterr().err


def test_what_cannot_be_is_refused_before_anything_is_computed(trained, text_folder, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("openelm.infer.calibrate.calibrate", None)
    out, four = tmp_path / "out", ("--bits", "4")
    assert "is the model itself" in refused(capsys, trained, trained, *four, "--overwrite")
    convert(open_folder(trained), "mlx", out, Format(torch.bfloat16, "4bit", 32))
    assert "exists" in refused(capsys, trained, out, *four)
    assert "is quantised already" in refused(capsys, out, tmp_path / "again", *four)
    shutil.rmtree(out)
    narrow = ModelConfig(model_dim=32, num_transformer_layers=2, head_dim=16, num_gqa_groups=1, ffn_dim_divisor=16)
    save_model(OpenELM(narrow.changed(vocab_size=320, ffn_multipliers=2.0)), tmp_path / "narrow")
    assert "128: no matrix of" in refused(capsys, tmp_path / "narrow", out, *four, "--group-size", "128")
    assert "at least 1" in refused(capsys, trained, out, *four, "--tokens", "0")
    text = ("--calibration", text_folder)
    assert "of no use to rounding" in refused(capsys, trained, out, "--bits", "8", *text)
    assert "nothing to read" in refused(capsys, trained, out, *four, "--calibration", tmp_path / "nowhere")
    empty = tmp_path / "empty.txt"
    empty.write_text("")
    assert "there is no text in it" in refused(capsys, trained, out, *four, "--evaluate", empty)
    assert "and a row takes 64: give more text, or a smaller --tokens" in refused(
        capsys, trained, out, *four, *text, "--evaluate", text_folder / "000.txt", "--tokens", "1000000"
    )
    assert not out.exists()


def test_a_model_without_a_tokenizer(trained, text_folder, tokenizer_file, tmp_path, capsys):
    bare = tmp_path / "bare"
    save_model(load_model(trained), bare)
    assert "has none: pass --tokenizer" in refused(capsys, bare, tmp_path / "out", "--bits", "4")
    assert cli.run(["quantize", str(bare), str(tmp_path / "out"), "--bits", "8"]) == 0
    printed = capsys.readouterr()
    assert "what is lost is not measured" in printed.err and "KL" not in printed.out
    words = ["--bits", "8", "--tokenizer", str(tokenizer_file), "--evaluate", str(text_folder / "000.txt")]
    assert cli.run(["quantize", str(bare), str(tmp_path / "out"), *words, "--overwrite"]) == 0
    assert "KL 0.00" in capsys.readouterr().out
    assert Tokenizer.load(tmp_path / "out").vocab_size == Tokenizer.load(tokenizer_file).vocab_size


def test_damaged_weights_leave_nothing_behind(trained, text_folder, tmp_path, capsys):
    model, tokenizer = load_model(trained), Tokenizer.load(trained)
    model.layers[1].attn_norm.weight[3] = torch.nan
    broken = save_model(model, tmp_path / "broken", tokenizer=tokenizer)
    text = ("--calibration", text_folder, "--tokens", "500", "--evaluate", text_folder / "000.txt")
    assert "NaN or infinite" in refused(capsys, broken, tmp_path / "out", "--bits", "4", *text)
    model.layers[1].attn_norm.weight[3] = 3e38
    overflowing = save_model(model, tmp_path / "overflowing", tokenizer=tokenizer)
    assert "not finite" in refused(capsys, overflowing, tmp_path / "out", "--bits", "4", *text)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["broken", "overflowing"]
