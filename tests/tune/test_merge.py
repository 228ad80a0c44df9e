"""openelm merge: the same logits without an adapter, and an embedding that is the output layer is never changed."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import small_adapters
from openelm import cli
from openelm.data.tokenizer import Tokenizer
from openelm.errors import UserError
from openelm.interop import huggingface  # noqa: F401 (makes transformers know OpenELM)
from openelm.interop.adapter import ATTENTION_TARGETS, PAPER_TARGETS, Adapter, write_adapter
from openelm.interop.convert import convert
from openelm.interop.source import Source, open_folder
from openelm.interop.target import Format
from openelm.model.folder import load_config, load_model, save_model
from openelm.model.transformer import OpenELM
from openelm.tune.adapters import attach, initial_values, load_adapter, merged
from openelm.tune.beginning import digest
from small_adapters import KINDS
from small_models import make

TOKENS = torch.randint(0, 448, (2, 40), generator=torch.Generator().manual_seed(1))
CARD = """---
license: mit
base_model: someone/large
model-index:
- name: large
  results: []
---
# Small

## Data
Books.

## Accuracy
100 %
"""
LINEAR = tuple(target for target in PAPER_TARGETS if target != "token_embeddings")


@pytest.fixture
def folder(tmp_path, golden_weights, tokenizer_file) -> Path:
    """A tiny model with uneven layers, whose output layer is its embedding."""
    model, tokenizer = make(golden_weights), Tokenizer.load(tokenizer_file)
    return save_model(model, tmp_path / "small", tokenizer=tokenizer, card=CARD)


def adapter(folder: Path, kind: str = "lora", targets: tuple[str, ...] = PAPER_TARGETS) -> Path:
    small_adapters.write(folder.parent / "adapter", load_config(folder)[0], kind, targets)
    return folder.parent / "adapter"


def unmerged(folder: Path, adapter: Path) -> OpenELM:
    pytest.importorskip("peft")
    model = load_model(folder)
    load_adapter(model, adapter)
    return model


def model_of(source: Source) -> OpenELM:
    model = OpenELM(source.config)
    model.load_state_dict({name: source.weight(name) for name in source.shapes})
    return model.eval()


def run(*words: object) -> int:
    return cli.run(["merge", *map(str, words)])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("targets", [ATTENTION_TARGETS, LINEAR, PAPER_TARGETS])
def test_merged_equals_unmerged(folder, kind, targets):
    tuned = adapter(folder, kind, targets)
    source = merged(open_folder(folder), tuned, untie=True)
    found, expected = model_of(source)(TOKENS), unmerged(folder, tuned)(TOKENS)
    assert (found - expected).abs().max() < 1e-4 < (expected - load_model(folder)(TOKENS)).abs().max()
    assert source.config.share_input_output_layers == (targets != PAPER_TARGETS), "untied only where it must be"


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("tied", [True, False])
def test_merged_weights_are_those_of_peft(folder, kind, tied, golden_weights, tmp_path):
    peft, transformers = pytest.importorskip("peft"), pytest.importorskip("transformers")
    targets = LINEAR if tied else PAPER_TARGETS
    if not tied:
        folder = save_model(make(golden_weights, share_input_output_layers=False), tmp_path / "untied")
    tuned = adapter(folder, kind, targets)
    convert(open_folder(folder), "hf", tmp_path / "hf", Format(torch.float32))
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "hf")
    theirs = peft.PeftModel.from_pretrained(theirs, tuned).merge_and_unload().state_dict()
    source = merged(open_folder(folder), tuned, untie=False)
    for name in source.shapes:
        key = "lm_head.weight" if name == "classifier.weight" else f"transformer.{name}"
        torch.testing.assert_close(source.weight(name), theirs[key], rtol=1e-5, atol=1e-6, msg=name)


def test_an_adapter_on_an_embedding_that_is_the_output_layer_is_refused(folder, capsys):
    tuned, out = adapter(folder), folder.parent / "out"
    assert run(folder, tuned, out) == 2
    error = capsys.readouterr().err
    assert "adapts token_embeddings, which is the output layer" in error and "--untie" in error
    assert "28,672 parameters more" in error and not out.exists()


def test_merged_naively_it_would_change_the_output_and_untied_it_does_not(folder):
    tuned = adapter(folder)
    expected, source = unmerged(folder, tuned)(TOKENS), merged(open_folder(folder), tuned, untie=True)
    right = model_of(source)
    torch.testing.assert_close(right.classifier.weight, load_model(folder).token_embeddings.weight)
    naive = OpenELM(load_config(folder)[0])
    naive.load_state_dict({name: t for name, t in right.state_dict().items() if name != "classifier.weight"})
    assert (right(TOKENS) - expected).abs().max() < 1e-4
    assert (naive.eval()(TOKENS) - expected).abs().max() > 1


def test_an_untrained_dora_of_a_bf16_model_merges_to_that_model(folder, tmp_path):
    """Norms that were rounded to bf16 themselves would make all weights of an output longer, or shorter."""
    pytest.importorskip("peft")
    base = load_model(folder).to(torch.bfloat16)
    dora = Adapter("dora", r=4, targets=PAPER_TARGETS)
    with torch.device("meta"):
        model = OpenELM(base.config)
        attach(model, dora)
    values = dict(initial_values(model, dora, base.state_dict().__getitem__, 1, torch.bfloat16))
    (tmp_path / "dora").mkdir()
    write_adapter(tmp_path / "dora", dora, base.config, values.__getitem__, "", "")
    stored = open_folder(save_model(base, tmp_path / "bf16", dtype=torch.bfloat16))
    source = merged(stored, tmp_path / "dora", untie=True)
    for name in stored.shapes:
        torch.testing.assert_close(source.weight(name).float(), stored.weight(name).float(), rtol=1e-5, atol=0)
    found, expected = model_of(source)(TOKENS), base.float()(TOKENS)
    assert (found - expected).abs().max() < 1e-4


def test_the_command_writes_a_model_folder_and_verifies_it(folder, capsys):
    pytest.importorskip("peft")
    tuned, out = adapter(folder, "dora"), folder.parent / "out"
    (tuned / "chat_template.jinja").write_text("{{ messages }}")
    assert run(folder, tuned, out, "--untie", "--verify") == 0
    told = capsys.readouterr()
    assert "merged and unmerged agree: largest logit difference" in told.out and "(bound 0.0001) at 96" in told.out
    assert "adapter adapter merged in: dora, r 4, alpha 8, on token_embeddings, qkv_proj" in told.err
    assert "two matrices now" in told.err and "trained on someone/small" not in told.err
    found = load_model(out)
    assert not found.config.share_input_output_layers
    assert (found(TOKENS) - unmerged(folder, tuned)(TOKENS)).abs().max() < 1e-4
    assert Tokenizer.load(out).fingerprint == Tokenizer.load(folder).fingerprint
    assert (out / "chat_template.jinja").read_text() == "{{ messages }}"
    card = (out / "README.md").read_text()
    assert "license: mit" in card and "base_model: someone/large" in card and "## Data\nBooks." in card
    assert "with the adapter `adapter` merged in" in card
    assert "model-index" not in card and "100 %" not in card, "those figures are of another model"


def test_what_is_merged_opens_in_transformers_with_the_logits_of_peft(folder, tmp_path):
    peft, transformers = pytest.importorskip("peft"), pytest.importorskip("transformers")
    tuned = adapter(folder)
    convert(open_folder(folder), "hf", tmp_path / "hf", Format(torch.float32))
    base = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "hf")
    expected = peft.PeftModel.from_pretrained(base, tuned).eval()(TOKENS).logits
    assert run(folder, tuned, tmp_path / "out", "--untie") == 0
    found = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()(TOKENS).logits
    assert (found - expected).abs().max() < 1e-4


def test_gguf_of_the_untied_result_is_refused_by_name(folder, capsys):
    out = folder.parent / "out"
    assert run(folder, adapter(folder), out, "--untie") == 0
    assert cli.run(["convert", str(out), str(folder.parent / "out.gguf"), "--to", "gguf"]) == 2
    assert "output layer" in capsys.readouterr().err
    assert not (folder.parent / "out.gguf").exists()


def test_the_dtype_is_chosen_and_rounding_is_told_apart_from_merging(folder, capsys):
    pytest.importorskip("peft")
    tuned, out = adapter(folder, targets=LINEAR), folder.parent / "out"
    assert run(folder, tuned, out, "--dtype", "bf16", "--verify", "--json") == 0
    told = json.loads(capsys.readouterr().out)
    assert told["weights"] == "bfloat16" and told["tied"] and told["parameters"] == load_config(out)[0].num_parameters()
    assert told["verified"]["largest_difference"] < 1e-4 < told["verified"]["rounded_difference"]
    assert load_config(out)[1] == torch.bfloat16


def test_a_run_folder_stands_for_its_adapter_and_its_model(folder, tmp_path):
    home = tmp_path / "run"
    home.mkdir()
    adapter(folder, targets=LINEAR).rename(home / "adapter")
    assert run(folder, home, tmp_path / "out") == 0
    expected = model_of(merged(open_folder(folder), home / "adapter", untie=False)).state_dict()
    assert all(
        torch.equal(tensor, expected[name]) for name, tensor in load_model(tmp_path / "out").state_dict().items()
    )


def test_a_tokenizer_beside_the_adapter_is_the_results(folder, golden_weights, tokenizer_file, tmp_path, capsys):
    tuned, own = adapter(folder, targets=LINEAR), Tokenizer.load(tokenizer_file)
    for name in ("tokenizer.model", "tokenizer.json", "tokenizer_config.json"):
        (folder / name).unlink(missing_ok=True)
    own.save(tuned)
    assert run(folder, tuned, tmp_path / "out") == 0
    assert Tokenizer.load(tmp_path / "out").fingerprint == own.fingerprint
    assert load_config(tmp_path / "out")[0].eos_token_id == own.eos_id
    small = save_model(make(golden_weights, vocab_size=100), tmp_path / "hundred")
    capsys.readouterr()
    assert run(small, tuned, tmp_path / "none") == 2
    error = capsys.readouterr().err
    assert "holds a tokenizer that cannot be the model's" in error and "take that one's files away" in error


def test_a_base_that_is_not_what_the_run_began_from_is_remarked_on(folder, golden_weights, tmp_path, capsys):
    home = tmp_path / "run"
    home.mkdir()
    adapter(folder, targets=LINEAR).rename(home / "adapter")
    (home / "config.yaml").write_text("name: x\n")
    said = f"{home} began from another model than {folder} is now"
    for data, remarked in ((None, False), ("[]", False), ('{"model": "0"}', True)):
        if data is not None:
            (home / "data.json").write_text(data)
        assert run(folder, home, tmp_path / "out", "--overwrite") == 0
        assert (said in capsys.readouterr().err) == remarked
    (home / "data.json").write_text(json.dumps({"model": digest(open_folder(folder))}))
    assert run(folder, home / "adapter", tmp_path / "out", "--overwrite") == 0
    assert said not in capsys.readouterr().err


def test_what_does_not_verify_is_not_kept(folder, capsys, monkeypatch):
    pytest.importorskip("peft")
    monkeypatch.setattr("openelm.tune.adapters.BOUND", 0.0)
    assert run(folder, adapter(folder, targets=LINEAR), folder.parent / "out", "--verify") == 2
    assert "a logit differs by" in capsys.readouterr().err
    assert not list(folder.parent.glob("*out*")) and not list(folder.parent.glob(".out*"))


def test_nothing_is_replaced_unasked_and_never_the_model_itself(folder, capsys):
    tuned, out = adapter(folder, targets=LINEAR), folder.parent / "out"
    assert run(folder, tuned, folder, "--overwrite") == 2
    assert "is the model itself" in capsys.readouterr().err
    assert run(folder, tuned, tuned, "--overwrite") == 2
    assert "holds no model, so it is not replaced" in capsys.readouterr().err
    assert run(folder, tuned, out) == 0
    assert run(folder, tuned, out) == 2
    assert "pass --overwrite" in capsys.readouterr().err
    assert run(folder, tuned, out, "--overwrite") == 0


def test_a_model_called_otherwise_than_the_adapters_is_remarked_on(folder, tmp_path, capsys):
    other = folder.rename(tmp_path / "other")
    assert run(other, adapter(other, targets=LINEAR), tmp_path / "out") == 0
    assert "the adapter says that it was trained on someone/small" in capsys.readouterr().err


def test_a_broken_adapter_is_blamed_and_not_the_model(folder, capsys):
    tuned = adapter(folder, targets=LINEAR)
    file = tuned / "adapter_model.safetensors"
    tensors: dict[str, Any] = load_file(file)
    name = "base_model.model.transformer.layers.1.ffn.proj_1.lora_A.weight"
    tensors[name][0, 0] = torch.inf
    save_file(tensors, file)
    assert run(folder, tuned, folder.parent / "out") == 2
    assert f"{name} holds NaN or infinity: the adapter is broken" in capsys.readouterr().err
    assert not (folder.parent / "out").exists()


def test_an_adapter_of_another_model_is_refused_by_its_first_tensor(folder, golden_weights, tmp_path):
    other = save_model(make(golden_weights, vocab_size=512), tmp_path / "other")
    with pytest.raises(UserError, match=r"embedding_A has shape \(4, 512\), but on this model it must be \(4, 448\)"):
        merged(open_folder(folder), adapter(other), untie=True)


@pytest.mark.parametrize("missing", ["model", "adapter"])
def test_what_is_not_there_is_named(folder, missing, capsys):
    tuned = adapter(folder, targets=LINEAR)
    words = [folder, tuned, folder.parent / "out"]
    words[missing == "adapter"] = folder.parent / "nothing"
    assert run(*words) == 2
    assert "nothing" in capsys.readouterr().err
