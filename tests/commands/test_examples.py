"""All commands: their examples parse, their help is there, and looking at them imports nothing heavy."""

import argparse
import importlib
import pkgutil
import shlex
import subprocess
import sys

import pytest

from openelm import cli, commands

NAMES = sorted(module.name for module in pkgutil.iter_modules(commands.__path__) if module.name in cli.COMMANDS)


def parser_of(name: str) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog=f"openelm {name}")
    importlib.import_module(f"openelm.commands.{name}").add_arguments(parser)
    return parser


def examples() -> list[str]:
    """Every constant of a command module that is named EXAMPLE, or ends so."""
    modules = [importlib.import_module(f"openelm.commands.{name}") for name in NAMES]
    return [
        value for module in modules for key, value in vars(module).items() if key == "EXAMPLE" or key[-8:] == "_EXAMPLE"
    ]


def test_each_command_has_one_line_of_help_and_an_example_of_its_own() -> None:
    for name in NAMES:
        module = importlib.import_module(f"openelm.commands.{name}")
        assert module.HELP.strip() and "\n" not in module.HELP
        assert shlex.split(module.EXAMPLE)[:2] == ["openelm", name]


@pytest.mark.parametrize("example", examples())
def test_every_example_parses(example: str) -> None:
    program, name, *words = shlex.split(example)
    assert program == "openelm"
    parser_of(name).parse_args(words)  # leaves with SystemExit where it does not parse


def test_help_of_a_command_shows_its_example(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as left:
        cli.run(["average", "--help"])
    assert left.value.code == 0
    assert "openelm average runs/demo --last 5" in capsys.readouterr().out


def test_no_command_imports_anything_heavy_before_it_runs() -> None:
    code = (
        "import argparse, importlib, sys\n"
        f"for name in {NAMES!r}:\n"
        "    importlib.import_module(f'openelm.commands.{name}').add_arguments(argparse.ArgumentParser())\n"
        "import openelm.environment\n"
        "print(sorted({'torch', 'numpy', 'pydantic', 'yaml', 'rich', 'matplotlib'} & sys.modules.keys()))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
