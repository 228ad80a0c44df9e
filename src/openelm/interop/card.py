"""Model cards: README.md with licence, base model, data, evaluation, and what the model must not be trusted with."""

from __future__ import annotations

from openelm.interop.source import Source


def converted_card(source: Source) -> str:
    """The card of a converted model: that of its source where it has one."""
    return source.card or f"# {source.origin}\n"
