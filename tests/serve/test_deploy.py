"""launch/Containerfile and launch/openelm.service: what they start is understood, and what they copy is there."""

import argparse
import configparser
import json
import re
import shlex
import shutil
import subprocess
from pathlib import Path

import pytest

from openelm.commands import serve

ROOT = Path(__file__).parents[2]
CONTAINER = (ROOT / "launch" / "Containerfile").read_text(encoding="utf-8")
UNIT = ROOT / "launch" / "openelm.service"


def understood(words: list[str]) -> argparse.Namespace:
    assert words[0] == "serve"
    parser = argparse.ArgumentParser()
    serve.add_arguments(parser)
    return parser.parse_args(words[1:])


def test_the_container_copies_what_there_is_and_serves_to_others() -> None:
    copied = [
        line.split()[1:-1] for line in CONTAINER.splitlines() if line.startswith("COPY ") and "--from" not in line
    ]
    names = {name for line in copied for name in line}
    assert {"pyproject.toml", "CMakeLists.txt", "native", "src"} <= names
    assert [name for name in names if not (ROOT / name).exists()] == []
    [command] = re.findall(r"^CMD (.*)$", CONTAINER, re.MULTILINE)
    given = understood(json.loads(command))
    assert (given.host, str(given.port)) == ("0.0.0.0", re.findall(r"EXPOSE (\d+)", CONTAINER)[0])
    assert f"127.0.0.1:{given.port}/health" in CONTAINER and serve.KEY_VARIABLE in CONTAINER


def test_the_unit_starts_the_server_and_waits_for_its_grace() -> None:
    unit = configparser.ConfigParser(interpolation=None)
    unit.optionxform = str  # type: ignore[assignment, method-assign]
    unit.read(UNIT)
    service = unit["Service"]
    program, *words = shlex.split(service["ExecStart"])
    given = understood(words)
    assert Path(program).name == "openelm" and given.host == "127.0.0.1"
    assert given.grace < int(service["TimeoutStopSec"]) and service["RestartPreventExitStatus"] == "2"
    name, _ = service["LoadCredential"].split(":")
    assert given.api_key_file == f"%d/{name}"


@pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="needs systemd")
def test_systemd_understands_the_unit(tmp_path: Path) -> None:
    there = re.sub(r"(?m)^ExecStart=\S+", "ExecStart=/bin/true", UNIT.read_text(encoding="utf-8"))
    (tmp_path / "openelm.service").write_text(there, encoding="utf-8")
    done = subprocess.run(["systemd-analyze", "verify", tmp_path / "openelm.service"], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
