"""OpenELM: language models with layer-wise scaling. The names below are imported when first used."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from openelm.data.tokenizer import Tokenizer as Tokenizer
    from openelm.errors import UserError as UserError
    from openelm.model.folder import load_model as load_model
    from openelm.model.folder import save_model as save_model
    from openelm.model.geometry import ModelConfig as ModelConfig
    from openelm.model.transformer import OpenELM as OpenELM

__version__ = "0.1.0"

_HOMES = {
    "ModelConfig": "openelm.model.geometry",
    "OpenELM": "openelm.model.transformer",
    "load_model": "openelm.model.folder",
    "save_model": "openelm.model.folder",
    "Tokenizer": "openelm.data.tokenizer",
    "UserError": "openelm.errors",
}
__all__ = [*_HOMES, "__version__"]


def __getattr__(name: str) -> Any:
    # Importing torch takes a second; `openelm --help` must not wait for it.
    if name not in _HOMES:
        raise AttributeError(f"module 'openelm' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)
