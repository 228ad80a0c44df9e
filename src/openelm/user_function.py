"""A function that a user names, FILE.py:NAME or MODULE:NAME: it is their own code, and runs as such."""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

from openelm.errors import UserError


def user_function(asked: str, place: str, name: str) -> tuple[ModuleType, Callable[..., Any]]:
    """Function ``name`` of the file or module ``place``, and the module; ``asked`` is what errors begin with.

    UserError where there is no such file or function, and where the file does not run.
    """
    try:
        module = _from_file(asked, Path(place)) if place.endswith(".py") else importlib.import_module(place)
    except UserError:
        raise
    except Exception as error:
        raise UserError(
            f"{asked}: {place} cannot be imported ({type(error).__name__}: {error}): correct it; "
            "--traceback shows where"
        ) from error
    function = getattr(module, name, None)
    if not callable(function):
        there = [key for key, value in vars(module).items() if inspect.isfunction(value)]
        raise UserError(f"{asked}: {place} has no function {name}; it has {', '.join(there) or 'none'}")
    return module, function


def _from_file(asked: str, path: Path) -> ModuleType:
    if not path.is_file():
        raise UserError(f"{asked}: {path} is not there: give the path of a Python file")
    name = f"openelm_user_{path.stem}"
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module
