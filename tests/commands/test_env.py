"""openelm env, and the collection behind it, which must not fail on any machine."""

import json
import os
import platform
import subprocess

import pytest
import torch

from openelm import cli, environment


def test_json_says_what_this_machine_is(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run(["env", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["python"] == platform.python_version()
    assert found["packages"]["torch"] == torch.__version__
    assert found["hardware"]["cores"] == os.cpu_count()
    assert found["hardware"]["torch_threads"] == torch.get_num_threads()
    assert len(found["hardware"]["accelerators"]) >= torch.cuda.device_count()


def test_the_table_names_versions_and_hardware(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run(["env"]) == 0
    rows = dict(line.split(None, 1) for line in capsys.readouterr().out.splitlines() if len(line.split(None, 1)) == 2)
    assert rows["torch"] == torch.__version__
    assert rows["cores"].startswith(str(os.cpu_count()))


def test_the_table_is_drawn_where_nothing_could_be_found_out(monkeypatch: pytest.MonkeyPatch) -> None:
    from openelm.commands.env import table

    def refuse(*args: object, **kwargs: object) -> None:
        raise PermissionError("sandbox")

    monkeypatch.setattr(subprocess, "run", refuse)
    monkeypatch.setattr(environment.importlib.metadata, "version", refuse)
    monkeypatch.setattr(environment.importlib.metadata, "requires", refuse)
    monkeypatch.setattr(os, "sysconf", refuse)
    monkeypatch.setattr(environment.Path, "read_text", refuse)
    found = environment.environment()
    assert found["hardware"]["memory_bytes"] is None
    assert found["hardware"]["cpu"] is None
    assert found["extras"] is None
    assert found["git"] is None
    assert "not installed" in table(found)
    assert json.loads(json.dumps(found)) == found


def test_an_extra_that_lacks_a_package_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    lines = ["torch>=2.9", "numpy>=1; extra == 'plot'", 'no-such-thing>=1 ; extra == "odd"']
    lines += ["openelm-framework[plot]; extra == 'odd'"]
    monkeypatch.setattr(environment.importlib.metadata, "requires", lambda name: lines)
    assert environment._extras() == {
        "plot": {"installed": True},
        "odd": {
            "installed": False,
            "missing": ["no-such-thing"],
            "install": "pip install 'openelm-framework[odd]'",
        },
    }


def test_the_containers_memory_limit_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sysconf", {"SC_PAGE_SIZE": 4096, "SC_PHYS_PAGES": 2**20}.__getitem__)
    monkeypatch.setattr(environment.Path, "read_text", lambda path: "1073741824\n")
    assert environment._memory_bytes() == 2**30
    monkeypatch.setattr(environment.Path, "read_text", lambda path: "max\n")
    assert environment._memory_bytes() == 2**32
