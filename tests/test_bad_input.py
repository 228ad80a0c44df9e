"""What a user can do wrong: the message gives value, rule and remedy, the exit code is 2, and nothing is written."""

import gzip
import json
import random
import re
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow
import pytest
import yaml
import zstandard
from pyarrow import parquet
from safetensors.torch import load_file, save_file

from openelm import cli
from openelm.data.tokenizer import Tokenizer
from openelm.model.folder import save_model
from small_models import make

Refuse = Callable[..., str]


def everything_under(folder: Path) -> dict[str, bytes | None]:
    return {str(p.relative_to(folder)): p.read_bytes() if p.is_file() else None for p in sorted(folder.rglob("*"))}


@pytest.fixture
def refuse(recipe, write_recipe, tmp_path, monkeypatch, capsys) -> Refuse:
    """Run `openelm pretrain` with overrides; it must fail as a user's error and leave every byte as it was."""
    monkeypatch.setenv("OPENELM_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    path = write_recipe(recipe)

    def refused(*arguments: str, recipe: str = path) -> str:
        before = everything_under(tmp_path)
        assert cli.run(["pretrain", recipe, "--run", str(tmp_path / "run"), *arguments]) == 2
        captured = capsys.readouterr()
        assert captured.out == ""
        assert captured.err.startswith("openelm pretrain: error: ")
        assert captured.err.count("\n") == 1, "one line, no traceback"
        assert everything_under(tmp_path) == before, "nothing is written"
        return captured.err

    return refused


def test_an_unknown_key_names_the_nearest_that_there_is(refuse):
    assert "train.step is not a key: did you mean train.steps?" in refuse("train.step=5")
    assert "did you mean data.sources.0.text_key?" in refuse("data.sources.0.textkey=body").replace("[0]", "0")
    assert "modl is not a key: did you mean model?" in refuse("modl=5")


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("train.steps=abc", "train.steps='abc'"),
        ("train.steps=2.5", "train.steps=2.5"),
        ("train.steps=true", "train.steps=True"),
        ("train.steps=0", "train.steps=0"),
        ("train.lr=-1", "train.lr=-1"),
        ("train.lr=.nan", "train.lr=nan"),
        ("train.lr=.inf", "train.lr=inf"),
        ("train.betas=0.9", "train.betas=0.9"),
        ("train.schedule=cosin", "train.schedule='cosin'"),
        ("data.held_out=1", "data.held_out=1"),
        ("data.packing=both", "data.packing='both'"),
        ("data.sources=[]", "data.sources=[]"),
        ("data.sources.0.share=0", "all shares are zero"),
        ("data.sources.0.share=-1", "data.sources.0.share=-1"),
        ("model=5", "model=5"),
        ("seed=one", "seed='one'"),
    ],
)
def test_a_value_that_cannot_be_is_named(refuse, override, said):
    assert said in refuse(override)


def test_several_problems_are_reported_together(refuse):
    error = refuse("train.step=5", "train.lr=fast", "data.row_length=two", "model.heads=3", "tokenizer.vocab_size=1")
    for part in ("train.step is not a key", "train.lr='fast'", "data.row_length='two'", "model.heads is not a key"):
        assert part in error
    assert "tokenizer.vocab_size=1" in error


def test_problems_between_values_are_reported_with_the_others(refuse):
    error = refuse("train.lrr=1", "train.global_batch=5", "train.warmup_steps=8", "model.head_dim=15")
    for part in ("train.lrr is not a key", "train.global_batch=5", "train.warmup_steps=8", "head_dim=15 must be even"):
        assert part in error


def test_a_key_without_default_is_said_to_be_missing(refuse, recipe, write_recipe):
    del recipe["train"]["lr"], recipe["data"]
    error = refuse(recipe=write_recipe({**recipe, "name": "less"}))
    assert "train.lr is missing" in error
    assert "data is missing" in error


@pytest.mark.parametrize("text", ["", "- a\n", "a: [", "just words\n"])
def test_a_file_that_is_no_recipe_is_refused(refuse, tmp_path, text):
    (tmp_path / "broken.yaml").write_text(text)
    assert "broken.yaml" in refuse(recipe=str(tmp_path / "broken.yaml"))


def test_a_recipe_that_is_not_there_names_those_that_are(refuse):
    assert "'dmo' is no file and no packaged recipe: did you mean demo?" in refuse(recipe="dmo")


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("train.steps", "must have the form section.key=value"),
        ("data.sources.7.path=a", "'7' must be a number from 0 to 0"),
        ("train.steps=[1", "the value is not YAML"),
        ("name.first=a", "name"),
        ("base=pretrain", "base stands in recipe files only"),
        ("by_size.270M.train.lr=1", "by_size stands in recipe files only"),
    ],
)
def test_an_override_that_cannot_be_applied_is_explained(refuse, override, said):
    assert said in refuse(override)


def test_micro_batches_that_do_not_divide_suggest_one_that_does(refuse):
    error = refuse("train.global_batch=7", "train.micro_batch=3")
    assert "train.global_batch=7 rows is not a multiple of train.micro_batch=3: set train.global_batch=6" in error


def test_rows_longer_than_the_context_are_refused(refuse):
    error = refuse("data.row_length=65")
    assert "data.row_length=65 is more than model.max_context_length=64: shorten the rows" in error


def test_ids_beyond_the_vocabulary_are_refused_before_training(refuse):
    error = refuse("model.vocab_size=399")
    assert "ids up to 399, beyond model.vocab_size=399: set model.vocab_size to 400 or more" in error


def test_no_documents_after_filtering_is_refused_with_the_counts(refuse):
    error = refuse("data.min_characters=100000")
    assert "'words'" in error
    # Each shard that finds nothing in its own part looks through all of it, so some are counted twice.
    counts = {name: int(count) for name, count in re.findall(r"(\w+) (\d+)[,)]", error)}
    assert counts["documents"] == counts["too_few_characters"] + counts["held_out"] >= 40
    assert counts["kept"] == counts["too_few_tokens"] == 0
    assert "lower data.min_characters=100000" in error
    assert re.search(r"too_few_tokens [1-9]", refuse("data.min_tokens=100000"))


def test_a_source_that_is_not_there_is_named(refuse, tmp_path):
    assert f"nothing to read at '{tmp_path}/none'" in refuse(f"data.sources.0.path={tmp_path}/none")


def test_a_tokenizer_that_is_not_there_is_named(refuse, tmp_path):
    assert f"{tmp_path}/none: no such file" in refuse(f"tokenizer.path={tmp_path}/none")
    (tmp_path / "bad.model").write_bytes(b"not a model")
    assert "bad.model" in refuse(f"tokenizer.path={tmp_path}/bad.model")


def test_a_vocabulary_larger_than_the_text_allows_is_refused(refuse):
    error = refuse("tokenizer.path=null", "tokenizer.vocab_size=30000")
    assert "30000" in error
    assert "or less" in error


def test_a_model_to_begin_from_that_differs_is_refused_with_each_key(refuse, tmp_path, recipe, write_recipe, capsys):
    path = write_recipe({**recipe, "name": "first"})
    assert cli.run(["pretrain", path, "--run", str(tmp_path / "first"), "train.steps=3"]) == 0
    capsys.readouterr()
    error = refuse(f"train.init_from={tmp_path}/first/model", "model.model_dim=64", "model.num_transformer_layers=3")
    assert "model_dim (32 there, 64 here)" in error
    assert "num_transformer_layers (2 there, 3 here)" in error


def test_a_run_folder_that_exists_is_refused(refuse, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.yaml").write_text("{}")
    error = refuse()
    assert "run exists" in error
    for remedy in ("--resume", "--overwrite", "--run"):
        assert remedy in error


def test_what_is_no_run_folder_is_not_overwritten(refuse, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "thesis.tex").write_text("years of work")
    assert "is no run folder" in refuse("--overwrite")


def test_overwriting_starts_anew(recipe, write_recipe, tmp_path, capsys):
    command = ["pretrain", write_recipe(recipe), "--run", str(tmp_path / "run"), "train.steps=3"]
    assert cli.run(command) == 0
    (tmp_path / "run" / "left-over").touch()
    assert cli.run([*command, "seed=2", "--overwrite"]) == 0
    assert not (tmp_path / "run" / "left-over").exists()
    assert yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())["seed"] == 2


# Damaged data


def documents(count: int) -> list[str]:
    """Texts that compress badly, so that damage in the middle leaves whole ones before it."""
    draw = random.Random(1)
    words = ["".join(draw.choices("abcdefghijklmnopqrstuvwxyz", k=draw.randint(2, 9))) for _ in range(500)]
    return [" ".join(draw.choices(words, k=120)) for _ in range(count)]


def write_corrupt(folder: Path, kind: str) -> Path:
    """A file that is damaged in its last tenth."""
    folder.mkdir(exist_ok=True)
    path = folder / {"gz": "a.json.gz", "zst": "a.jsonl.zst", "parquet": "a.parquet"}[kind]
    texts = documents(100 if kind == "parquet" else 400)
    lines = "".join(json.dumps({"text": text}) + "\n" for text in texts).encode()
    if kind == "gz":
        path.write_bytes(gzip.compress(lines))
    elif kind == "zst":
        path.write_bytes(zstandard.ZstdCompressor().compress(lines))
    else:
        table = pyarrow.table({"text": texts})
        parquet.write_table(table, path, row_group_size=25, write_page_checksum=True, use_dictionary=False)
    content = bytearray(path.read_bytes())
    if kind == "parquet":
        at = len(content) * 8 // 10
        content[at : at + 200] = bytes(200)
    else:
        content = content[: len(content) * 9 // 10]
    path.write_bytes(content)
    return path


def use(recipe: dict[str, Any], path: Path, **options: str) -> dict[str, Any]:
    recipe["data"] |= {"sources": [{"name": "words", "path": str(path), **options}], "held_out": 0, "shards": 1}
    recipe["data"] |= {"validation_tokens": 0}
    recipe["train"] |= {"steps": 20, "global_batch": 16, "micro_batch": 16, "average_last": 0, "sample_prompts": []}
    recipe["train"] |= {"validate_every": 20, "checkpoint_every": 20}
    recipe["model"] |= {"model_dim": 16, "num_transformer_layers": 1}
    return recipe


def last_account(run: Path) -> dict[str, Any]:
    entries = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [entry for entry in entries if entry["kind"] == "data"][-1]


@pytest.mark.parametrize("kind", ["gz", "zst", "parquet"])
def test_a_corrupt_file_stops_the_run_and_is_named(recipe, write_recipe, tmp_path, capsys, kind):
    path = write_corrupt(tmp_path / "data", kind)
    run = tmp_path / "run"
    assert cli.run(["pretrain", write_recipe(use(recipe, path)), "--run", str(run)]) == 2
    error = capsys.readouterr().err
    assert f"{path}: damaged" in error
    assert "on_corrupt: skip" in error
    assert not (run / "model").exists()


@pytest.mark.parametrize("kind", ["gz", "zst", "parquet"])
def test_a_corrupt_file_is_skipped_and_counted_where_that_is_set(recipe, write_recipe, tmp_path, kind):
    path = write_corrupt(tmp_path / "data", kind)
    run = tmp_path / "run"
    recipe = use(recipe, path, on_corrupt="skip")
    if kind == "parquet":
        recipe["train"]["steps"] = 100  # more tokens than its row groups hold, which are read one after another
    assert cli.run(["pretrain", write_recipe(recipe), "--run", str(run)]) == 0
    account = last_account(run)
    assert account["corrupt_files"] == 1
    assert account["kept"] > 0


@pytest.mark.parametrize("way", ["repair", "skip"])
def test_invalid_utf8_is_counted_and_repaired_or_skipped(recipe, write_recipe, tmp_path, text_folder, way):
    folder = tmp_path / "data"
    folder.mkdir()
    for number, file in enumerate(sorted(text_folder.iterdir())[:8]):
        content = file.read_bytes()
        (folder / file.name).write_bytes(b"\xff\xfe\x80" + content if number < 3 else content)
    recipe = use(recipe, folder, on_invalid_utf8=way)
    recipe["train"]["steps"] = 20
    assert cli.run(["pretrain", write_recipe(recipe), "--run", str(tmp_path / "run")]) == 0
    account = last_account(tmp_path / "run")
    assert account["sources"]["words"]["epoch"] >= 1, "every document was met"
    assert account["invalid_utf8"] >= 3
    assert account["undecodable"] == (account["invalid_utf8"] if way == "skip" else 0)


def test_a_text_key_that_is_not_there_names_those_that_are(refuse, tmp_path):
    lines = tmp_path / "a.jsonl"
    lines.write_text("".join(json.dumps({"id": i, "body": text}) + "\n" for i, text in enumerate(documents(5))))
    error = refuse(f"data.sources.0.path={lines}", "tokenizer.path=null")
    for part in ("a.jsonl: no key 'text'", "'id', 'body'", "set text_key of source words"):
        assert part in error
    parquet.write_table(pyarrow.table({"id": [1], "body": ["x"]}), tmp_path / "a.parquet")
    error = refuse(f"data.sources.0.path={tmp_path}/a.parquet")
    assert "a.parquet" in error
    assert "'body'" in error


# Tuning


PAIR = {"prompt": "What is it?", "chosen": " It is water.", "rejected": " It is stone."}


@pytest.fixture(scope="session")
def tuned_model(tmp_path_factory, golden_weights, tokenizer_file) -> Path:
    """A model to tune, with its tokenizer."""
    folder = tmp_path_factory.mktemp("tuned") / "model"
    return save_model(make(golden_weights), folder, tokenizer=Tokenizer.load(tokenizer_file))


@pytest.fixture
def refuse_tuning(tuned_model, tmp_path, monkeypatch, capsys) -> Refuse:
    """``refuse_tuning(records, *overrides, **sections)``: `openelm finetune`, or `dpo` where there is a preference.

    It must fail as a user's error, in one line, before anything is written.
    """
    monkeypatch.setenv("OPENELM_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)

    def refused(records: list[dict[str, Any]], *overrides: str, command: str = "", **sections: Any) -> str:
        form = "preference" if "preference" in sections else "prompt"
        lines = tmp_path / "records.jsonl"
        lines.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
        recipe = {
            "name": "tuned",
            "model": {"path": str(tuned_model)},
            "data": {"sources": [{"name": "own", "path": str(lines), "format": form}], "row_length": 32},
            "train": {"steps": 2, "global_batch": 4, "micro_batch": 2, "lr": 1e-3},
            **sections,
        }
        (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe), encoding="utf-8")
        before = everything_under(tmp_path)
        command = command or ("dpo" if "preference" in sections else "finetune")
        assert cli.run([command, "recipe.yaml", "--run", str(tmp_path / "run"), *overrides]) == 2
        captured = capsys.readouterr()
        assert captured.out == ""
        assert captured.err.startswith(f"openelm {command}: error: ")
        assert captured.err.count("\n") == 1, "one line, no traceback"
        assert everything_under(tmp_path) == before, "nothing is written"
        return captured.err

    return refused


ANSWERED = [{"prompt": f"Number {number}?", "answer": f" {number}"} for number in range(8)]


@pytest.mark.parametrize(
    ("records", "overrides", "said"),
    [
        ([], [], "nothing is left to train on of 0 records (the files are empty)"),
        ([{"prompt": "What?", "answer": " \n"}] * 3, [], "of 3 records (empty_answer 3)"),
        (ANSWERED, ["data.held_out=0.999999"], "of 8 records (held_out 8)"),
        (ANSWERED, ["data.prompt_length=2", "data.long_prompts=drop"], "(long_prompt 8): look at the records and at"),
        (ANSWERED, ["data.prompt_length=32"], "prompt_length=32 must be less than data.row_length=32, to leave room"),
        (ANSWERED, ["data.row_length=65"], "data.row_length=65 is more than the 64 tokens of context"),
        (ANSWERED, ["train.micro_batch=8"], "train.global_batch=4 rows is not a multiple of train.micro_batch=8"),
        (ANSWERED, ["train.epochs=2"], "is train.steps or train.epochs, not train.steps=2 and train.epochs=2"),
        (ANSWERED, ["train.steps=0"], "the length of a run is train.steps or train.epochs, not neither"),
        (ANSWERED, ["train.warmup_steps=1", "train.warmup_ratio=0.1"], "train.warmup_ratio, not both"),
        (
            ANSWERED,
            ["train.steps=0", "train.epochs=2", "train.warmup_steps=9"],
            "train.epochs=2 are 4 steps: train.warmup_steps=9 must be less than train.steps=4: lower it",
        ),
        (ANSWERED, ["train.init_from=model"], "a tuned model begins from model.path: leave train.init_* out"),
        (ANSWERED, ["data.sources.0.answer_key=reply"], "'reply', which the format prompt needs; its columns are"),
        (ANSWERED, ["data.sources.0.format=chat"], "no column 'messages'"),
        (ANSWERED, ["data.sources.0.format=poem"], "data.sources.0.format='poem'"),
        (ANSWERED, ["data.sources.0.path=none.jsonl"], "nothing to read at 'none.jsonl'"),
        (ANSWERED, ["data.sources.0.format=preference"], "reads sources of format: preference and no others"),
        (ANSWERED, ["adapter.targets=[q_proj]"], "q_proj matches no module of this model: take from token_embeddings"),
        (ANSWERED, ["adapter.targets=[lm_head]"], "lm_head is the output layer, which is not adapted here"),
        (ANSWERED, ["adapter.rank=4"], "adapter.rank is not a key: did you mean adapter.r?"),
        (ANSWERED, ["adapter.kind=qlora"], "adapter.kind='qlora'"),
        (ANSWERED, ["adapter.dropout=1"], "adapter.dropout=1"),
        (ANSWERED, ["model.path=nothing/here"], "nothing/here"),
        (ANSWERED, ["model.path=recipe.yaml"], "recipe.yaml is no model that can be read"),
        (ANSWERED, ["tokenizer.path=none.model"], "none.model: no such file"),
        (ANSWERED, ["--resume"], "run does not exist, so there is nothing to resume"),
        (ANSWERED, ["--dry-run", "data.row_length=65"], "data.row_length=65 is more than the 64 tokens of context"),
    ],
)
def test_what_cannot_be_tuned_on_is_refused_before_the_run(refuse_tuning, records, overrides, said):
    pytest.importorskip("peft")
    assert said in refuse_tuning(records, *overrides)


@pytest.mark.parametrize(
    ("records", "overrides", "said"),
    [
        ([PAIR | {"rejected": PAIR["chosen"]}] * 3, [], "of 3 records (same_answers 3)"),
        ([PAIR | {"chosen": " "}] * 3, [], "of 3 records (empty_answer 3)"),
        ([PAIR], ["data.packing=pack"], "pairs are padded, and their answers count: leave out data.packing"),
        ([PAIR], ["data.sources.0.format=prompt"], "reads sources of format: preference and no others"),
        ([PAIR], ["preference.loss=orpo"], "preference.loss='orpo'"),
        ([PAIR], ["preference.beta=0"], "preference.beta=0"),
        ([PAIR], ["preference.label_smoothing=0.1", "preference.loss=ipo"], "belongs to preference.loss=sigmoid"),
    ],
)
def test_what_are_no_pairs_is_refused_before_the_run(refuse_tuning, records, overrides, said):
    assert said in refuse_tuning(records, *overrides, preference={"beta": 0.1})


def test_a_recipe_of_the_other_command_names_that(refuse_tuning, refuse):
    assert "has no section preference, so it tunes on examples: run `openelm finetune`" in refuse_tuning(
        ANSWERED, command="dpo"
    )
    assert "has a section preference, so it tunes on pairs: run `openelm dpo`" in refuse_tuning(
        [PAIR], command="finetune", preference={"beta": 0.1}
    )
    assert "tunes a model that is there: run `openelm finetune" in refuse(recipe="recipe.yaml")
    assert "names no model to tune: set model.path" in refuse_tuning(ANSWERED, model={"model_dim": 32})


def test_a_conversation_without_an_answer_is_counted(refuse_tuning):
    records = [{"messages": [{"role": "user", "content": "Hello"}]}] * 3
    assert "of 3 records (no_answer 3)" in refuse_tuning(records, "data.sources.0.format=chat")
    records = [{"messages": [{"role": "human", "content": "Hello"}, {"role": "assistant", "content": "Yes"}]}]
    error = refuse_tuning(records, "data.sources.0.format=chat")
    assert "record 1: messages[0].role is 'human': a role is one of system, user, assistant" in error


def test_an_adapter_without_peft_is_refused_before_the_run(refuse_tuning, monkeypatch):
    monkeypatch.setitem(sys.modules, "peft", None)
    error = refuse_tuning(ANSWERED, adapter={"r": 2})
    assert "peft cannot be used here" in error and "pip install 'openelm-framework[tune]'" in error


def test_a_model_that_cannot_be_tuned_is_refused_before_the_run(refuse_tuning, tuned_model, tmp_path, golden_weights):
    def changed(name: str) -> Path:
        return shutil.copytree(tuned_model, tmp_path / name)

    broken = changed("broken")
    weights = load_file(broken / "model.safetensors")
    weights["transformer.layers.1.ffn.proj_1.weight"][2, 3] = float("nan")
    save_file(weights, broken / "model.safetensors")
    error = refuse_tuning(ANSWERED, "model.path=broken")
    assert "broken: layers.1.ffn.proj_1.weight holds 1 values that are NaN" in error
    for file in changed("mute").glob("tokenizer*"):
        file.unlink()
    error = refuse_tuning(ANSWERED, "model.path=mute")
    assert "model.path=mute has no tokenizer: set tokenizer.path to the one that it was trained with" in error
    small = make(golden_weights, vocab_size=96)
    save_model(small, tmp_path / "small")
    error = refuse_tuning(ANSWERED, "model.path=small", f"tokenizer.path={tuned_model}")
    assert "the tokenizer has 400 tokens, the model of small only 96 rows" in error


def test_a_place_for_the_reference_that_cannot_be_is_refused_before_the_run(refuse_tuning, tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    monkeypatch.setenv("OPENELM_CACHE", str(tmp_path / "file"))
    assert f"{tmp_path / 'file'}" in refuse_tuning([PAIR], preference={"beta": 0.1})


def test_an_unknown_command_names_the_nearest(capsys):
    assert cli.run(["pretrian"]) == 2
    assert "did you mean `openelm pretrain`?" in capsys.readouterr().err
