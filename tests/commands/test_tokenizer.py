"""openelm tokenizer: training one and looking at one."""

import json
from pathlib import Path

import pytest

from openelm import Tokenizer, cli

WORDS = "def return import class self value number string list table"


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    """Sixty documents of a hundred words."""
    words = WORDS.split()
    lines = [" ".join(words[(i * j + j // 3) % len(words)] for j in range(100)) for i in range(1, 61)]
    file = tmp_path / "corpus.jsonl"
    file.write_text("".join(json.dumps({"text": line, "body": "x" + line}) + "\n" for line in lines))
    return file


def test_train_writes_a_tokenizer_and_says_on_what(
    corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "small.model"
    assert cli.run(["tokenizer", "train", str(corpus), "--vocab-size", "310", "--out", str(out)]) == 0
    read_bytes = sum(len(json.loads(line)["text"]) for line in corpus.read_text().splitlines())
    assert f"310 pieces, trained on 60 documents of {read_bytes:,} bytes" in capsys.readouterr().out
    tokenizer = Tokenizer.load(out)
    assert tokenizer.vocab_size == 310
    assert tokenizer.decode(tokenizer.encode("def return λ")) == "def return λ"


def test_max_bytes_takes_a_sample_of_every_file_by_size(
    corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    half = tmp_path / "half.jsonl"
    half.write_text("".join(corpus.read_text().splitlines(keepends=True)[:30]))
    words = ["--vocab-size", "300", "--out", str(tmp_path / "a.model"), "--max-bytes", "9000"]
    assert cli.run(["tokenizer", "train", str(corpus), str(half), *words]) == 0
    documents = int(capsys.readouterr().out.split("trained on ")[1].split()[0])
    # About 560 bytes a document; each file may go beyond its part by less than one.
    assert 9000 / 700 <= documents <= 9000 / 450 + 2


def test_train_refuses_and_writes_nothing(corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "small.model"
    train = ["tokenizer", "train", str(corpus), "--out"]
    assert cli.run([*train, str(out), "--vocab-size", "90000"]) == 2
    assert "vocabulary of 90000 pieces" in capsys.readouterr().err
    assert cli.run([*train, str(tmp_path)]) == 2
    assert "is a folder" in capsys.readouterr().err
    assert cli.run([*train, str(out), "--text-key", "content"]) == 2
    assert "'text', 'body'" in capsys.readouterr().err
    assert cli.run([*train, str(out), "--max-bytes", "0"]) == 2
    assert "--max-bytes 0 must be at least 1" in capsys.readouterr().err
    assert not out.exists()
    out.write_text("precious")
    assert cli.run([*train, str(out), "--vocab-size", "300"]) == 2
    assert "small.model exists" in capsys.readouterr().err
    assert out.read_text() == "precious"
    assert cli.run([*train, str(out), "--vocab-size", "300", "--overwrite"]) == 0
    assert Tokenizer.load(out).vocab_size == 300


def test_show_gives_pieces_ids_and_bytes_per_token(
    corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "small.model"
    cli.run(["tokenizer", "train", str(corpus), "--vocab-size", "320", "--out", str(out)])
    capsys.readouterr()
    assert cli.run(["tokenizer", "show", str(out), "--text", "def λ", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    tokenizer = Tokenizer.load(out)
    ids = tokenizer.encode("def λ")
    assert (found["vocab_size"], found["bytes"], found["tokens"]) == (320, 6, len(ids))
    assert found["ids"] == ids
    assert found["pieces"][-2:] == ["<0xCE>", "<0xBB>"]
    assert found["bytes_per_token"] == 6 / len(ids)
    assert found["bos"] == {"id": 1, "piece": "<s>"} and found["pad"] is None
    assert cli.run(["tokenizer", "show", str(out), "--text", ""]) == 0
    shown = capsys.readouterr().out
    assert "1 <s>" in shown and tokenizer.fingerprint in shown


def test_show_refuses_what_is_no_tokenizer(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run(["tokenizer", "show", str(tmp_path / "none.model")]) == 2
    assert "no such file or folder" in capsys.readouterr().err
