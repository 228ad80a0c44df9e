"""Every command and every line of Python in the README runs, shortened where it is long."""

import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from openelm import cli

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
COMMANDS = re.findall(r"`(openelm [^`]+)`", README)
# The same recipe on a model that trains in seconds.
SHORT = [
    "model.model_dim=64",
    "model.head_dim=32",
    "model.num_gqa_groups=1",
    "model.num_transformer_layers=2",
    "tokenizer.train_bytes=400000",
    "tokenizer.vocab_size=512",
    "data.row_length=64",
    "data.validation_tokens=2000",
    "train.steps=6",
    "train.warmup_steps=2",
    "train.checkpoint_every=1",
    "train.sample_tokens=4",
]


def shortened(command: str) -> list[str]:
    words = shlex.split(command)[1:]
    if words[0] == "pretrain":
        given = {word.partition("=")[0] for word in words}
        words += [pair for pair in SHORT if pair.partition("=")[0] not in given]
        words = [re.sub(r"^train\.steps=\d+", "train.steps=8", word) for word in words]
    if words[0] == "bench":
        words += ["--row-length", "32", "--micro-batch", "1", "--micro-batches", "1", "--steps", "1", "--warmup", "0"]
    return words


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder as a newcomer has it after `make demo`, with some text of their own."""
    folder = tmp_path_factory.mktemp("newcomer")
    (folder / "README.md").write_text(README, encoding="utf-8")
    (folder / "my" / "texts").mkdir(parents=True)
    for source in [ROOT / "README.md", *(ROOT / "docs").glob("*.md"), *(ROOT / "src").rglob("*.py")]:
        (folder / "my" / "texts" / f"{source.stem}.txt").write_text(
            source.read_text(encoding="utf-8"), encoding="utf-8"
        )
    question = {
        "question": "What is wet?",
        "choices": {"text": ["water", "fire"], "label": ["A", "B"]},
        "answerKey": "A",
    }
    (folder / "my" / "tasks" / "ai2_arc" / "ARC-Easy").mkdir(parents=True)
    for split in ("test", "train"):
        rows = "".join(json.dumps({"id": str(number), **question}) + "\n" for number in range(8))
        (folder / "my" / "tasks" / "ai2_arc" / "ARC-Easy" / f"{split}.jsonl").write_text(rows)
    (folder / "my.jsonl").write_text('{"text": "' + "some words and more, " * 60 + '"}\n')
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setenv("OPENELM_CACHE", str(folder / "cache"))
        assert cli.run(shortened("openelm pretrain demo")) == 0
    return folder


def test_the_readme_has_commands() -> None:
    assert len(COMMANDS) >= 8


@pytest.mark.parametrize("command", COMMANDS)
def test_command_runs(
    command: str, folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(folder)
    monkeypatch.setenv("OPENELM_CACHE", str(folder / "cache"))
    assert cli.run(shortened(command)) == 0
    captured = capsys.readouterr()
    assert (captured.out + captured.err).strip()


@pytest.mark.parametrize("command", re.findall(r"`(torchrun [^`]+)`", README))
def test_a_command_for_several_ranks_runs(command: str, folder: Path) -> None:
    words = shlex.split(command)
    at = words.index("openelm")
    program = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        *words[1:at],
        "openelm",
        *shortened(shlex.join(words[at:])),
    ]
    # Ports of the machine's own choosing.
    program.insert(3, "--standalone")
    environment = {**os.environ, "OPENELM_CACHE": str(folder / "cache"), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(program, cwd=folder, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert " on 2 ranks of cpu" in done.stderr


def test_python_lines_run(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder)
    (code,) = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    names: dict[str, torch.Tensor] = {}
    exec(code.replace('from_name("270M")', 'from_name("30M", vocab_size=64)'), names)
    assert names["logits"].shape == (1, 3, 512)


def test_every_linked_file_is_there() -> None:
    links = [link for link in re.findall(r"\]\(([^)#]+)\)", README) if "://" not in link]
    missing = [link for link in links if not (ROOT / link).is_file()]
    assert not missing
