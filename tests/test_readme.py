"""Every command and every line of Python in the README runs, shortened where it is long."""

import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import newcomer as newcomer_folder
from openelm import cli

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
COMMANDS = re.findall(r"`(openelm [^`]+)`", README)


def shortened(command: str) -> list[str]:
    return newcomer_folder.shortened(newcomer_folder.split(command)[1:])


@pytest.fixture(scope="module")
def folder(newcomer: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A newcomer's folder, in which the README's commands follow each other; no tuning was done there."""
    folder = shutil.copytree(newcomer, tmp_path_factory.mktemp("readme") / "newcomer")
    shutil.rmtree(folder / "runs" / "docstrings")
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
