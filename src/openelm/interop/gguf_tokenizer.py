"""Tokenizers as GGUF keeps them, in a file's metadata: so that llama.cpp cuts a text into our ids, or refused."""

from __future__ import annotations

import json
from typing import Any

from openelm.data.sentencepiece_model import (
    BYTE,
    CONTROL,
    NORMAL,
    UNKNOWN,
    UNUSED,
    USER_DEFINED,
    Piece,
    field,
    read_pieces,
    read_settings,
)
from openelm.data.tokenizer import Tokenizer
from openelm.data.tokenizer_backends import SentencePieceBackend
from openelm.errors import UserError
from openelm.interop.gguf_file import GGUFFile

PREFIX = "tokenizer.ggml."
FILL_SCORE = -10000.0  # of rows of the embedding that no token has; llama.cpp's converter names them likewise

_BYTE_LEVEL = {"type": "ByteLevel", "add_prefix_space": False}
_LLAMA3 = "|".join(
    [
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)",
        r"[^\r\n\p{L}\p{N}]?\p{L}+",
        r"\p{N}{1,3}",
        r" ?[^\s\p{L}\p{N}]+[\r\n]*",
        r"\s*[\r\n]+",
        r"\s+(?!\S)",
        r"\s+",
    ]
)
# llama.cpp's name for a way to cut text into words -> the same as a tokenizer.json spells it, without what is default.
PRE_TOKENIZERS: dict[str, list[dict[str, Any]]] = {
    "gpt-2": [{**_BYTE_LEVEL, "use_regex": True}],
    "smollm": [{"type": "Digits", "individual_digits": True}, {**_BYTE_LEVEL, "use_regex": True}],
    "llama-bpe": [
        {"type": "Split", "pattern": {"Regex": _LLAMA3}, "behavior": "Isolated", "invert": False},
        {**_BYTE_LEVEL, "use_regex": False},
    ],
}


def tokenizer_metadata(tokenizer: Tokenizer, rows: int) -> dict[str, Any]:
    """Keys and values for a model whose embedding has ``rows`` rows.

    UserError where llama.cpp would cut some texts otherwise.
    """
    backend = tokenizer.backend
    if isinstance(backend, SentencePieceBackend):
        found = _sentencepiece_metadata(backend.raw)
    else:
        found = _byte_level_metadata(json.loads(backend.raw), backend.pieces)
    unknown, adds_bos, adds_eos = backend.conventions()
    fill = range(len(found["tokens"]), rows)
    found["tokens"] += [f"[PAD{id}]" for id in fill]
    found["token_type"] += [UNUSED for _ in fill]
    if "scores" in found:
        found["scores"] += [FILL_SCORE for _ in fill]
    found |= {"bos_token_id": tokenizer.bos_id, "eos_token_id": tokenizer.eos_id}
    found |= {"unknown_token_id": unknown} if unknown is not None else {}
    found |= {"padding_token_id": tokenizer.pad_id} if tokenizer.pad_id is not None else {}
    found |= {"add_bos_token": adds_bos, "add_eos_token": adds_eos}
    return {PREFIX + key: value for key, value in found.items()}


def _sentencepiece_metadata(raw: bytes) -> dict[str, Any]:
    settings, pieces = read_settings(raw), read_pieces(raw)
    reason = ""
    if settings.model_type != "bpe":
        reason = f"its model type is {settings.model_type}, and llama.cpp merges by score as BPE does"
    elif settings.charsmap or settings.remove_extra_spaces:
        reason = "it normalises text before cutting it, which llama.cpp does not do"
    elif settings.space_as_suffix or not settings.escape_spaces:
        reason = "it marks spaces otherwise than by a prefix"
    elif sum(piece.kind == BYTE for piece in pieces) != 256:
        reason = "it has no byte pieces, and llama.cpp stops at a character that is none of its pieces"
    elif any(piece.kind == USER_DEFINED for piece in pieces):
        reason = "it has user-defined pieces, around which llama.cpp sets spaces otherwise"
    if reason:
        raise _inexact(reason)
    return {
        "model": "llama",
        "pre": "default",
        "tokens": [piece.text for piece in pieces],
        "scores": [piece.score for piece in pieces],
        "token_type": [piece.kind for piece in pieces],
        "add_space_prefix": settings.add_dummy_prefix,
        "remove_extra_whitespaces": False,
    }


def _byte_level_metadata(spec: dict[str, Any], pieces: list[str]) -> dict[str, Any]:
    model, added = spec.get("model") or {}, spec.get("added_tokens") or []
    steps = spec.get("pre_tokenizer") or {}
    steps = [_plain(step) for step in steps.get("pretokenizers", [steps])]
    name = next((name for name, known in PRE_TOKENIZERS.items() if known == steps), "")
    reason = ""
    if model.get("type") != "BPE" or not any(step.get("type") == "ByteLevel" for step in steps):
        reason = "it is a tokenizer.json of another kind than byte-level BPE; its tokenizer.model may do"
    elif not name:
        reason = "it cuts text into words by rules that llama.cpp has no name for"
    elif spec.get("normalizer"):
        reason = "it normalises text before cutting it, which llama.cpp does not do"
    elif any(model.get(key) for key in ("dropout", "continuing_subword_prefix", "end_of_word_suffix")):
        reason = "its pieces are marked, or merged by chance"
    elif bool(model.get("ignore_merges")) != (name == "llama-bpe"):
        reason = "it looks for whole words otherwise than llama.cpp does under the same rules"
    elif any(not token.get("special") for token in added):
        reason = "it has added tokens that are not special, which llama.cpp looks for in another order"
    if reason:
        raise _inexact(reason)
    special = {token["id"] for token in added}
    return {
        "model": "gpt2",
        "pre": name,
        "tokens": [piece or f"[PAD{id}]" for id, piece in enumerate(pieces)],
        "token_type": [CONTROL if id in special else NORMAL if piece else UNUSED for id, piece in enumerate(pieces)],
        "merges": [merge if isinstance(merge, str) else " ".join(merge) for merge in model["merges"]],
    }


def _plain(step: dict[str, Any]) -> dict[str, Any]:
    """A step of a pre-tokenizer without ``trim_offsets``, which moves no cut."""
    return {key: value for key, value in step.items() if key != "trim_offsets"}


def _inexact(reason: str) -> UserError:
    return UserError(
        f"the tokenizer cannot go into a GGUF file ({reason}): llama.cpp would cut some texts otherwise; give an equal "
        "SentencePiece BPE model or byte-level BPE with --tokenizer"
    )


def read_tokenizer(file: GGUFFile) -> tuple[Tokenizer | None, str]:
    """The tokenizer of a GGUF file; or None, and why. A SentencePiece model is built anew: its ids are those it had."""
    model, tokens = file.get(PREFIX + "model", str, ""), file.strings(PREFIX + "tokens")
    if not tokens:
        return None, "the file has no tokenizer: give one with --tokenizer"
    if model != "llama":
        return None, f"the file's tokenizer is of kind {model!r}, and only 'llama' is read: give one with --tokenizer"
    scores, kinds = file.numbers(PREFIX + "scores"), file.numbers(PREFIX + "token_type")
    if not len(tokens) == len(scores) == len(kinds):
        raise UserError(
            f"{file.path}: {len(tokens)} tokens, {len(scores)} scores, {len(kinds)} types of tokens: it is damaged"
        )
    pieces = [Piece(*entry) for entry in zip(tokens, scores, kinds, strict=True)]
    while pieces and pieces[-1].kind == UNUSED and pieces[-1].text == f"[PAD{len(pieces) - 1}]":
        pieces.pop()
    strange = [piece.text for piece in pieces if piece.kind not in (NORMAL, UNKNOWN, CONTROL, BYTE)]
    if strange:
        return None, f"the file's tokenizer has tokens of its own ({strange[0]!r}): give one with --tokenizer"
    try:
        return Tokenizer(SentencePieceBackend(_sentencepiece_model(file, pieces), file.path)), ""
    except UserError as error:
        return None, f"the file's tokenizer cannot be used ({error}): give one with --tokenizer"


def _sentencepiece_model(file: GGUFFile, pieces: list[Piece]) -> bytes:
    """A serialised model; the field numbers are those of sentencepiece_model.proto."""
    out = [
        field(1, field(1, piece.text.encode()) + field(2, float(piece.score)) + field(3, int(piece.kind)))
        for piece in pieces
    ]
    trainer = field(3, 2) + field(4, len(pieces)) + field(35, 1)  # BPE, its size, byte fallback
    for number, key in ((45, "unknown"), (46, "bos"), (47, "eos"), (48, "padding")):
        id = file.get(f"{PREFIX}{key}_token_id", int, -1)
        if 0 <= id < len(pieces):
            trainer += field(number, pieces[id].text.encode())
    prefix = file.get(PREFIX + "add_space_prefix", bool, True)
    normalizer = field(1, b"identity") + field(3, int(prefix)) + field(4, 0) + field(5, 1)
    return b"".join(out) + field(2, trainer) + field(3, normalizer)
