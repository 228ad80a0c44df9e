"""openelm data: what becomes of a text, of a recipe's sources, and whoever serves the rows."""

import hashlib
import json
import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from openelm import Tokenizer, cli
from openelm.data.tokenizer import train_tokenizer
from openelm.evaluate.suites import Spec

WORDS = ["def", "return", "import", "class", "self", "value", "number", "string", "list", "table"]


def text_of(seed: int, words: int) -> str:
    return " ".join(WORDS[(seed * j + j // 3 + seed) % len(WORDS)] for j in range(words))


@pytest.fixture(scope="session")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.model"
    train_tokenizer([text_of(seed, 200) for seed in range(1, 40)], path, 300)
    return path


@pytest.fixture
def recipe(tmp_path: Path, tokenizer: Path) -> Path:
    """Two sources: 80 short documents of which some are too short, and 40 longer ones, one undecodable."""
    short = [{"text": text_of(seed, 4 + seed)} for seed in range(80)]
    long = [{"text": text_of(seed, 120)} for seed in range(100, 139)] + [{"text": None}]
    sources = []
    for name, documents, share in (("short", short, 1), ("long", long, 3)):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(d) + "\n" for d in documents))
        sources.append({"name": name, "path": str(tmp_path / f"{name}.jsonl"), "share": share})
    data = {"sources": sources, "row_length": 32, "min_characters": 50, "min_tokens": 40, "shards": 6, "held_out": 0.2}
    train = {"steps": 2, "global_batch": 1, "micro_batch": 1, "lr": 0.1, "min_lr": 0.0}
    model = {"model_dim": 32, "num_transformer_layers": 2, "head_dim": 16}
    path = tmp_path / "recipe.yaml"
    parts = {"name": "two", "model": model, "tokenizer": {"path": str(tokenizer)}, "data": data, "train": train}
    path.write_text(yaml.safe_dump(parts))
    return path


def json_of(capsys: pytest.CaptureFixture[str], *words: str) -> dict[str, Any]:
    assert cli.run([*words, "--json"]) == 0
    found: dict[str, Any] = json.loads(capsys.readouterr().out)
    return found


def lines_of(capsys: pytest.CaptureFixture[str], *words: str) -> list[dict[str, Any]]:
    assert cli.run(["data", "inspect", *words, "--json"]) == 0
    return [json.loads(line) for line in capsys.readouterr().out.splitlines()]


@pytest.mark.parametrize("row_length", [2048, 128])
def test_inspect_equals_the_papers_pipeline(shared: Path, row_length: int, capsys: pytest.CaptureFixture[str]) -> None:
    golden = json.loads((shared / "golden" / f"rows_{row_length}.json").read_text())
    words = [str(shared / "golden" / "documents.jsonl"), "--ids", "--row-length", str(row_length)]
    words += ["--tokenizer", str(shared / "data" / "llama-tokenizer" / "tokenizer.model")]
    words += ["--min-characters", str(golden["min_characters_per_text"])]
    words += ["--min-tokens", str(golden["min_tokens_per_text"])]
    found = lines_of(capsys, *words)
    expected = [
        (document, piece, entry)
        for document, golden_document in enumerate(golden["documents"])
        for piece, entry in enumerate(golden_document["segments"])
    ]
    assert [(line["document"], line["piece"]) for line in found] == [key[:2] for key in expected]
    for line, (document, piece, entry) in zip(found, expected, strict=True):
        where = (document, piece)
        for name in ("normalized_characters", "tokens", "kept"):
            if name in entry:
                assert line[name] == entry[name], (where, name)
        assert (line["reason"] is None) == line["kept"]
        if entry["kept"]:
            ids = line["ids"]
            assert (ids[:12], ids[-6:]) == (entry["first"], entry["last"]), where
            assert len(ids) == entry["row_tokens"]
            assert hashlib.sha256(" ".join(map(str, ids)).encode()).hexdigest() == entry["sha256"], where


def test_inspect_numbers_documents_over_all_files_and_says_why_a_piece_is_dropped(
    tmp_path: Path, tokenizer: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "a.jsonl").write_text(
        "\n".join([json.dumps({"text": text_of(3, 60)}), "{broken", json.dumps({"text": ""})]) + "\n"
    )
    (tmp_path / "b.txt").write_text("a b c d e")
    words = [str(tmp_path / "a.jsonl"), str(tmp_path / "b.txt"), "--tokenizer", str(tokenizer)]
    words += ["--row-length", "16", "--min-characters", "5", "--min-tokens", "40", "--split-words", "50"]
    found = lines_of(capsys, *words)
    assert [(line["document"], line["piece"], line["reason"]) for line in found] == [
        (0, 0, None),
        (0, 1, "too_few_tokens"),
        (1, 0, "undecodable"),
        (2, 0, "too_few_characters"),
        (3, 0, "too_few_tokens"),
    ]
    assert list(found[0]) == ["document", "piece", "normalized_characters", "tokens", "kept", "reason"]
    encoded = Tokenizer.load(tokenizer).encode(" ".join(text_of(3, 60).split()[:50]))
    assert found[0]["tokens"] == len(encoded) + 2
    assert [line["ids"] for line in lines_of(capsys, *words, "--ids")][:1] == [[1, *encoded][:17]]

    assert cli.run(["data", "inspect", *words]) == 0
    shown = capsys.readouterr().out
    assert "4 documents, 5 pieces (2 too few tokens, 1 kept, 1 undecodable, 1 too few characters)" in shown
    assert "17 of them in rows of 16" in shown


def test_inspect_refuses_before_it_prints(tmp_path: Path, tokenizer: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "a.txt").write_text("some text")
    files = [str(tmp_path / "a.txt"), str(tmp_path / "none.txt")]
    assert cli.run(["data", "inspect", *files, "--tokenizer", str(tokenizer)]) == 2
    out, err = capsys.readouterr()
    assert out == "" and "none.txt" in err
    assert cli.run(["data", "inspect", files[0], "--tokenizer", str(tokenizer), "--split-words", "0"]) == 2
    assert "--split-words 0 must be at least 1" in capsys.readouterr().err


def test_count_accounts_for_every_document_of_every_source(recipe: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = json_of(capsys, "data", "count", str(recipe))
    short, long, total = found["sources"]["short"], found["sources"]["long"], found["total"]
    fates = ("kept", "too_few_characters", "too_few_tokens", "undecodable", "held_out")
    for entry, documents in ((short, 80), (long, 40), (total, 120)):
        assert entry["documents"] == documents == sum(entry[fate] for fate in fates)
        assert entry["complete"] is True
    assert long["undecodable"] == 1 and short["undecodable"] == 0
    assert short["too_few_characters"] > 0 and short["too_few_tokens"] > 0
    assert short["held_out"] > 0 and long["held_out_bytes"] > 0
    assert long["bytes"] + long["held_out_bytes"] == long["read_bytes"]  # none of the long ones is filtered out
    assert short["read_bytes"] == sum(len(text_of(seed, 4 + seed)) for seed in range(80))
    assert total["tokens"] == short["tokens"] + long["tokens"]
    assert short["share_of_tokens"] + long["share_of_tokens"] == pytest.approx(1)
    assert (short["share_of_mixture"], long["share_of_mixture"]) == (0.25, 0.75)


def test_count_equals_what_one_epoch_of_the_stream_accounts_for(
    recipe: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from openelm.config import load_recipe
    from openelm.train import parts

    one_source = ["data.sources.1.share=0", "data.shards=1"]
    counted = json_of(capsys, "data", "count", str(recipe), *one_source)["sources"]["short"]
    config = load_recipe(str(recipe), one_source)
    stream = parts.token_stream(config, parts.load_tokenizer(config))
    while stream.counts()["sources"]["short"]["documents"] < 80:
        stream.next_row()
    streamed = stream.counts()["sources"]["short"]
    # The last row of the epoch is complete only with text of the next: the stream may have gone on a little.
    assert streamed["documents"] == 80 or streamed["epoch"] == 1
    for name in ("too_few_tokens", "held_out", "undecodable"):
        assert 0 <= streamed[name] - counted[name] <= streamed["documents"] - 80


def test_count_of_a_sample_says_that_it_is_one(recipe: Path, capsys: pytest.CaptureFixture[str]) -> None:
    total = json_of(capsys, "data", "count", str(recipe), "--max-documents", "7")["total"]
    assert (total["documents"], total["complete"]) == (14, False)
    assert cli.run(["data", "count", str(recipe), "--max-documents", "7"]) == 0
    rows = {line[:18].strip(): line[18:].split() for line in capsys.readouterr().out.splitlines()}
    assert rows["documents"] == ["7", "7", "14"]
    assert rows["share of mixture"] == ["25.00%", "75.00%"]


def test_hash_is_that_of_the_streams_rows(recipe: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from openelm.config import load_recipe
    from openelm.train import parts

    found = json_of(capsys, "data", "hash", str(recipe), "--rows", "1500")
    config = load_recipe(str(recipe), [])
    stream = parts.token_stream(config, parts.load_tokenizer(config))
    rows = [stream.next_row() for _ in range(1500)]
    data = [len(row).to_bytes(4, "little") + b"".join(int(id).to_bytes(4, "little") for id in row) for row in rows]
    assert found == {
        "rows": 1500,
        "sha256": hashlib.sha256(b"".join(data)).hexdigest(),
        "per_thousand": [hashlib.sha256(b"".join(part)).hexdigest() for part in (data[:1000], data[1000:])],
    }


@pytest.mark.parametrize(("ranks", "workers"), [(1, 0), (2, 1), (3, 2), (4, 0), (5, 3), (8, 2), (8, 5)])
def test_hash_does_not_depend_on_ranks_and_workers(
    recipe: Path, ranks: int, workers: int, capsys: pytest.CaptureFixture[str]
) -> None:
    alone = json_of(capsys, "data", "hash", str(recipe), "--rows", "150")
    words = ["--rows", "150", "--ranks", str(ranks), "--workers", str(workers)]
    assert json_of(capsys, "data", "hash", str(recipe), *words) == alone


def test_hash_reads_each_row_by_the_worker_that_a_run_would_have_for_it(
    recipe: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Six shards on four ranks of two workers: ranks 0 and 2 share the even shards, 1 and 3 the odd ones."""
    from openelm.config import load_recipe
    from openelm.data.row_hashes import row_hashes
    from openelm.data.stream import TokenStream
    from openelm.train import parts

    config = load_recipe(str(recipe), [])
    stream = parts.token_stream(config, parts.load_tokenizer(config))
    read: dict[int, list[int]] = {}
    next_of = TokenStream.next_of
    monkeypatch.setattr(
        TokenStream, "next_of", lambda self, shard: read.setdefault(id(self), []).append(shard) or next_of(self, shard)
    )
    row_hashes(stream, 12, 4, 2)
    assert sorted(read.values()) == sorted(
        [[0, 4, 0, 4], [2, 2], [0, 4, 0, 4], [2, 2], [1, 5, 1, 5], [3, 3], [1, 5, 1, 5], [3, 3]]
    )


def test_hash_depends_on_the_seed(recipe: Path, capsys: pytest.CaptureFixture[str]) -> None:
    one = json_of(capsys, "data", "hash", str(recipe), "--rows", "20")
    assert json_of(capsys, "data", "hash", str(recipe), "seed=1", "--rows", "20")["sha256"] != one["sha256"]


def test_hash_and_count_refuse_what_cannot_be(recipe: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run(["data", "hash", str(recipe), "--rows", "0"]) == 2
    assert "--rows 0 must be at least 1" in capsys.readouterr().err
    for option, least in (("--ranks", 1), ("--workers", 0)):
        assert cli.run(["data", "hash", str(recipe), option, "-1"]) == 2
        assert f"{option} -1 must be at least {least}" in capsys.readouterr().err
    assert cli.run(["data", "hash", str(recipe), "data.min_tokens=10000"]) == 2
    assert "is left after filtering" in capsys.readouterr().err
    assert cli.run(["data", "count", "dmeo"]) == 2
    assert "did you mean demo?" in capsys.readouterr().err


def test_overrides_may_stand_behind_the_options_of_an_action(text_folder, tokenizer_file, capsys):
    words = [f"tokenizer.path={tokenizer_file}", f"data.sources.0.path={text_folder}", "data.row_length=32"]
    prints = []
    for command in (["demo", *words, "--rows", "5"], ["demo", "--rows", "5", *words]):
        assert cli.run(["data", "hash", *command]) == 0
        prints.append(capsys.readouterr().out)
    assert prints[0] == prints[1]
    with pytest.raises(SystemExit):
        cli.run(["data", "hash", "demo", "--rows", "5", "stray"])
    assert "unrecognized arguments: stray" in capsys.readouterr().err


# overlap


@pytest.fixture
def planted(tmp_path: Path) -> dict[str, Path]:
    """Two sources and one of no share; three questions, of which one stands in `web`, and one in what is not read."""
    question = [" ".join(f"{name}{i}" for i in range(16)) for name in ("apple", "berry", "cherry")]
    texts = {
        "web": ["Some other text.", f"Said he: {question[0].title()}!", None],
        "books": ["nothing of the kind"],
        "unused": [question[1]],
    }
    sources = []
    for name, documents in texts.items():
        path = tmp_path / f"{name}.jsonl"
        path.write_text("".join(json.dumps({"text": text}) + "\n" for text in documents))
        sources.append({"name": name, "path": str(path), "share": 0 if name == "unused" else 1})
    train = {"steps": 2, "global_batch": 1, "micro_batch": 1, "lr": 0.1, "min_lr": 0.0}
    model = {"model_dim": 32, "num_transformer_layers": 2, "head_dim": 16}
    recipe, quiz = tmp_path / "planted.yaml", tmp_path / "quiz.jsonl"
    recipe.write_text(yaml.safe_dump({"name": "planted", "model": model, "data": {"sources": sources}, "train": train}))
    rows = [{"id": f"q{i}", "question": text, "answer": "Yes."} for i, text in enumerate(question)]
    quiz.write_text("".join(json.dumps(row) + "\n" for row in [*rows, {"id": "short", "question": "Why?"}]))
    return {"recipe": recipe, "quiz": quiz, "web": tmp_path / "web.jsonl"}


def test_overlap_names_the_examples_that_stand_in_the_training_text(
    planted: dict[str, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["data", "overlap", str(planted["recipe"]), "data.held_out=0", "--tests", str(planted["quiz"])]
    found = json_of(capsys, *words)
    text = " ".join(f"apple{i}" for i in range(16))
    place = {"source": "web", "file": str(planted["web"]), "document": 1}
    example = {"id": "q0", "words": 17, "covered": 16 / 17, "longest": {"words": 16, "text": text, **place}}
    bytes_read = {"web": 16 + len(f"Said he: {text}!"), "books": 19}
    assert found == {
        "recipe": "planted",
        "n": 13,
        "complete": True,
        "sources": {
            name: {"documents": d, "held_out": 0, "undecodable": u, "bytes": bytes_read[name], "complete": True}
            for name, d, u in (("web", 3, 1), ("books", 1, 0))
        },
        "sets": [
            {
                "set": str(planted["quiz"]),
                "examples": 4,
                "short": 1,
                "shared": 1,
                "share": 1 / 3,
                "found": [example],
            }
        ],
    }
    assert json_of(capsys, *words, "--field", "question")["sets"][0]["found"] == [
        {**example, "words": 16, "covered": 1}
    ]
    assert json_of(capsys, *words, "--n", "17")["sets"][0]["found"] == []
    assert cli.run(words) == 0
    shown = capsys.readouterr().out
    assert f"example q0: 94% of 17 words, 16 in a row in web: {planted['web']}, document 1\n    apple0 apple1" in shown
    assert cli.run([*words, "--show", "0"]) == 0
    assert "q0" not in capsys.readouterr().out


def test_overlap_does_not_look_at_what_is_held_out(
    planted: dict[str, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["data", "overlap", str(planted["recipe"]), "--tests", str(planted["quiz"])]
    found = json_of(capsys, *words, "data.held_out=0.999")  # behind the files, as anyone would write it
    assert found["sets"][0]["shared"] == 0
    assert found["sources"]["web"]["held_out"] == 2


def test_overlap_of_a_sample_says_that_it_is_one(planted: dict[str, Path], capsys: pytest.CaptureFixture[str]) -> None:
    words = ["data", "overlap", str(planted["recipe"]), "data.held_out=0", "--tests", str(planted["quiz"])]
    found = json_of(capsys, *words, "--max-documents", "1")
    assert (found["complete"], found["sources"]["web"]["documents"], found["sets"][0]["shared"]) == (False, 1, 0)
    assert cli.run([*words, "--max-documents", "1"]) == 0
    assert re.search(r"^web .* in part$", capsys.readouterr().out, re.MULTILINE)


def test_overlap_that_is_interrupted_shows_what_was_found_so_far(
    planted: dict[str, Path], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from openelm.data import overlap

    def interrupted(text: str, fraction: float) -> bool:
        if text.startswith("nothing"):
            raise KeyboardInterrupt
        return False

    monkeypatch.setattr(overlap, "is_held_out", interrupted)
    assert cli.run(["data", "overlap", str(planted["recipe"]), "--tests", str(planted["quiz"]), "--json"]) == 130
    out, err = capsys.readouterr()
    found = json.loads(out)
    assert "interrupted" in err and found["complete"] is False
    assert found["sources"]["web"]["complete"] is True and found["sources"]["books"]["documents"] == 0
    assert [example["id"] for example in found["sets"][0]["found"]] == ["q0"]


class Task:
    """As much of an lm-eval task as is asked for its examples."""

    def __init__(self, kind: str, docs: list[dict[str, Any]]) -> None:
        self.OUTPUT_TYPE, self.eval_docs = kind, docs

    def doc_to_text(self, doc: dict[str, Any]) -> Any:
        return doc["text"]

    def doc_to_target(self, doc: dict[str, Any]) -> Any:
        return doc["target"]

    def doc_to_choice(self, doc: dict[str, Any]) -> list[str]:
        return doc["choices"]


def test_overlap_takes_prompt_and_right_answer_of_each_task_of_a_suite(
    planted: dict[str, Path], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pieces = [" ".join(f"apple{i}" for i in part) for part in (range(9), range(9, 16), range(7))]
    loaded = {
        "chosen": Task("multiple_choice", [{"text": pieces[0], "target": 1, "choices": ["b", pieces[1]]}]),
        # As WinoGrande: the choices are the beginnings, and the prompt says which is right.
        "begun": Task("multiple_choice", [{"text": 0, "target": pieces[1], "choices": [pieces[0], "b"]}]),
        "written": Task("generate_until", [{"text": pieces[0], "target": [pieces[1], 3]}]),
        "wrong": Task("multiple_choice", [{"text": pieces[0], "target": 0, "choices": ["b", pieces[1]]}]),
    }
    asked = []

    def load(spec: Spec, data: Path | None) -> dict[str, Any]:
        asked.append((spec.task, spec.shots, data))
        return {
            "tasks": {"wrong": loaded["wrong"], **loaded} if spec.task == "group" else {spec.task: loaded[spec.task]}
        }

    specs = tuple(Spec(task, "acc", shots, task) for task, shots in (("chosen", 5), ("group", 0), ("chosen", 0)))
    monkeypatch.setattr("openelm.evaluate.suites.suite", {"mine": specs}.__getitem__)
    monkeypatch.setattr("openelm.evaluate.tasks.load", load)
    words = ["data", "overlap", str(planted["recipe"]), "data.held_out=0"]
    found = json_of(capsys, *words, "--suite", "mine", "--data", "texts")["sets"]
    assert asked == [("chosen", 0, Path("texts")), ("group", 0, Path("texts"))]
    assert [(one["set"], one["examples"], one["short"], one["shared"]) for one in found] == [
        ("chosen", 1, 0, 1),
        ("wrong", 1, 1, 0),
        ("begun", 1, 0, 1),
        ("written", 1, 0, 1),
    ]
    assert [one["found"][0]["words"] for one in found if one["found"]] == [16, 16, 17]


def test_overlap_takes_the_tasks_of_the_harness_as_it_prompts_them(
    planted: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("lm_eval")
    rows = {
        "winogrande/winogrande_xl": {
            "sentence": "The cup would not fit on the shelf because _ was far too tall for it.",
            "option1": "the shelf",
            "option2": "the cup",
            "answer": "2",
        },
        "piqa": {
            "goal": "How do you keep an open book dry?",
            "sol1": "Read it outside.",
            "sol2": "Cover it.",
            "label": 1,
        },
    }
    for name, row in rows.items():
        (tmp_path / "tests" / name).mkdir(parents=True)
        (tmp_path / "tests" / name / "validation.jsonl").write_text(json.dumps(row) + "\n")
    texts = {
        "winogrande": "the cup would not fit on the shelf because the cup was far too tall for it",
        "piqa": "question how do you keep an open book dry answer cover it",
    }
    planted["web"].write_text("".join(json.dumps({"text": text}) + "\n" for text in texts.values()))
    words = ["data", "overlap", str(planted["recipe"]), "data.held_out=0", "--tasks", ",".join(texts), "--n", "8"]
    found = json_of(capsys, *words, "--data", str(tmp_path / "tests"))["sets"]
    assert [(one["set"], one["share"]) for one in found] == [("winogrande", 1), ("piqa", 1)]
    for number, one in enumerate(found):
        (example,) = one["found"]
        assert (example["id"], example["covered"], example["longest"]["document"]) == ("0", 1, number)
        assert example["longest"]["text"] == texts[one["set"]]


def test_overlap_refuses_what_cannot_be(
    planted: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe, quiz = str(planted["recipe"]), str(planted["quiz"])

    def refusal(*words: str) -> str:
        assert cli.run(["data", "overlap", recipe, *words]) == 2
        out, err = capsys.readouterr()
        assert not out and err.count("\n") == 1
        return err

    assert "--n 0 must be at least 1" in refusal("--tests", quiz, "--n", "0")
    assert "--max-documents 0 must be at least 1" in refusal("--tests", quiz, "--max-documents", "0")
    assert "none of 4 test examples has 50 words" in refusal("--tests", quiz, "--n", "50")
    assert "the longest has 17" in refusal("--tests", quiz, "--n", "50")
    assert "none.jsonl" in refusal("--tests", quiz, str(tmp_path / "none.jsonl"))
    assert "no text in a field 'body'" in refusal("--tests", quiz, "--field", "body")
    assert "there is no suite" in refusal("--suite", "zero-shoot")
    assert "--data x goes with --suite" in refusal("--tests", quiz, "--data", "x")
    assert "--field x goes with --tests" in refusal("--suite", "zero-shot", "--field", "x")
    with pytest.raises(SystemExit):
        cli.run(["data", "overlap", recipe])
    assert "--suite" in capsys.readouterr().err
