"""Importing this module makes transformers' Auto classes know OpenELM, where transformers is installed."""

from __future__ import annotations

import contextlib


def register() -> None:
    """Make AutoConfig, AutoModel and AutoModelForCausalLM know OpenELM. ImportError without transformers."""
    from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

    from openelm.interop.modeling_openelm import OpenELMConfig, OpenELMForCausalLM, OpenELMModel

    AutoConfig.register("openelm", OpenELMConfig, exist_ok=True)
    AutoModel.register(OpenELMConfig, OpenELMModel, exist_ok=True)
    AutoModelForCausalLM.register(OpenELMConfig, OpenELMForCausalLM, exist_ok=True)


# Whoever has no transformers, or one that is too old, can write folders all the same.
with contextlib.suppress(ImportError):
    register()
