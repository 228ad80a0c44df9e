"""openelm serve as a process: what it says, what it refuses, and how it ends."""

import os
import re
import signal
import time
from pathlib import Path
from typing import Any

import httpx
import pytest

from openelm import cli
from openelm.commands.serve import read_keys, served_name
from openelm.errors import UserError

for package in ("fastapi", "uvicorn", "prometheus_client"):
    pytest.importorskip(package)


def address(log: Path, process: Any) -> str:
    end_s = time.monotonic() + 60
    while time.monotonic() < end_s and process.is_alive():
        if log.exists() and (found := re.search(r"at (http://\S+) \(", log.read_text())):
            return found[1]
        time.sleep(0.05)
    raise AssertionError(log.read_text() if log.exists() else "it said nothing")


def test_a_process_serves_and_ends_by_a_signal_when_all_is_said(quick, served_folder, tmp_path):
    log = tmp_path / "log"
    process = quick(["serve", str(served_folder), "--port", "0", "--backend", "torch", "--grace", "20"])
    url = address(log, process)
    assert re.search(
        r"^tiny at \S+ \(chat and completions; torch on cpu, float32; 8 texts of 128 tokens at once\)$",
        log.read_text(), re.MULTILINE,
    )  # fmt: skip
    asked = {"prompt": "unmistakable", "max_tokens": 110, "stream": True, "logit_bias": {"2": -100}}
    with httpx.stream("POST", f"{url}/v1/completions", json=asked, timeout=30) as answer:
        lines = answer.iter_lines()
        next(lines)
        os.kill(process.pid, signal.SIGTERM)
        rest = list(lines)
    assert rest[-2:] == ["data: [DONE]", ""] and '"finish_reason":"length"' in rest[-4]
    process.join(20)
    assert process.exitcode == 0
    assert "unmistakable" not in log.read_text()


def test_an_open_address_and_a_port_that_is_taken_end_it_before_the_model_is_loaded(served, served_folder, capsys):
    port = served.address[1]
    assert cli.run(["serve", str(served_folder), "--port", str(port)]) == 2
    assert f"port {port} of 127.0.0.1 cannot be had" in capsys.readouterr().err
    assert cli.run(["serve", str(served_folder), "--host", "0.0.0.0"]) == 2
    assert "there is no API key: set OPENELM_API_KEY" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--context", "4096"], "--context 4096: a capacity of 4096 tokens: the model's context allows 1 to 128"),
        (["--slots", "0"], "slots=0 of the server must be above 0"),
        (["--guard", "nothing"], "--guard nothing names no guard: write FILE.py:FUNCTION"),
        (["--api-key-file", "/nowhere"], "--api-key-file /nowhere cannot be read"),
    ],
)
def test_settings_that_cannot_be_are_refused(served_folder, capsys, options, words):
    assert cli.run(["serve", str(served_folder), "--port", "0", "--backend", "torch", *options]) == 2
    out, error = capsys.readouterr()
    assert words in error and error.count("\n") == 1 and not out


def test_keys_come_from_the_environment_and_a_file(tmp_path, monkeypatch):
    file = tmp_path / "keys"
    file.write_text("one\n\n two \n")
    file.chmod(0o600)
    monkeypatch.delenv("OPENELM_API_KEY", raising=False)
    assert read_keys(None) == () and read_keys(str(file)) == ("one", "two")
    monkeypatch.setenv("OPENELM_API_KEY", "three")
    assert read_keys(str(file)) == ("three", "one", "two")
    file.write_text("\n")
    with pytest.raises(UserError, match="holds no key: write one a line"):
        read_keys(str(file))


def test_a_model_is_called_by_its_folder_or_its_name_on_the_hub(tmp_path):
    (tmp_path / "run" / "model").mkdir(parents=True)
    assert served_name(str(tmp_path / "run")) == served_name(str(tmp_path / "run" / "model")) == "run"
    assert served_name("apple/OpenELM-270M") == "apple/OpenELM-270M"
