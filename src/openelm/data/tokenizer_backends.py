"""The two libraries that encode, behind one face: sentencepiece and Hugging Face tokenizers."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, Protocol

from openelm.data.sentencepiece_model import SPACE, read_settings, to_tokenizer_json
from openelm.errors import UserError

# Where no tokenizer_config.json names them: what published tokenizers call the begin and end of a text.
BOS_NAMES = ("<s>", "<|begin_of_text|>", "<bos>", "<|startoftext|>", "[BOS]", "<|endoftext|>")
EOS_NAMES = ("</s>", "<|end_of_text|>", "<eos>", "<|endoftext|>", "[EOS]")
PAD_NAMES = ("<pad>", "<|padding|>", "[PAD]")
UNKNOWN_NAMES = ("<unk>", "[UNK]")

# How a decoded text begins: as its bytes say, or without the one space that stands for no space in the text
# (SentencePiece's dummy prefix), or without any leading space (SentencePiece's remove_extra_whitespaces).
Lead = Literal["keep", "strip one", "strip all"]


class Backend(Protocol):
    """What `Tokenizer` needs of a library."""

    raw: bytes  # the defining file
    pieces: list[str]
    bos_id: int
    eos_id: int
    pad_id: int | None
    lead: Lead

    def encode(self, text: str) -> list[int]:
        """Ids of a text, special tokens neither added nor recognised."""
        ...

    def decode(self, ids: Sequence[int]) -> str:
        """The library's own decoding, without special tokens."""
        ...

    def piece_bytes(self) -> list[bytes] | None:
        """What each id adds to a text; None where an id's text depends on its neighbours."""
        ...

    def tokenizer_json(self) -> bytes:
        """The tokenizer as a tokenizer.json; UserError when it cannot be one."""
        ...

    def conventions(self) -> tuple[int | None, bool, bool]:
        """Id of the unknown token; whether transformers is to add BOS, and EOS, to a text."""
        ...


class SentencePieceBackend:
    """A .model file."""

    def __init__(self, raw: bytes, file: Path) -> None:
        import sentencepiece

        self.raw, self._file = raw, file
        self._processor = sentencepiece.SentencePieceProcessor()
        try:
            self._processor.LoadFromSerializedProto(raw)
        except RuntimeError as error:
            raise UserError(
                f"{file}: not a tokenizer: it is neither a SentencePiece model nor a tokenizer.json: "
                "give one of these (a tiktoken file must be converted to tokenizer.json first)"
            ) from error
        size = self._processor.GetPieceSize()
        self.pieces: list[str] = self._processor.IdToPiece(list(range(size)))
        bos, eos, pad = self._processor.bos_id(), self._processor.eos_id(), self._processor.pad_id()
        if bos < 0 or eos < 0:
            control = [self.pieces[id] for id in range(size) if self._processor.IsControl(id)]
            raise _no_ends(file, bos, eos, control)
        self.bos_id, self.eos_id, self.pad_id = bos, eos, pad if pad >= 0 else None
        settings = read_settings(raw)
        self.lead: Lead = "strip one" if settings.add_dummy_prefix else "keep"
        if settings.remove_extra_spaces:
            self.lead = "strip all"
        self._table: list[bytes] | None = None

    def encode(self, text: str) -> list[int]:
        ids: list[int] = self._processor.EncodeAsIds(text)
        return ids

    def decode(self, ids: Sequence[int]) -> str:
        text: str = self._processor.Decode(list(ids))
        return text

    def piece_bytes(self) -> list[bytes]:
        if self._table is None:
            is_special = [
                self._processor.IsControl(id) or self._processor.IsUnknown(id) for id in range(len(self.pieces))
            ]
            self._table = [
                b"" if special else _byte_fallback_bytes(piece)
                for piece, special in zip(self.pieces, is_special, strict=True)
            ]
        return self._table

    def tokenizer_json(self) -> bytes:
        return to_tokenizer_json(self.raw, self.pieces[self.bos_id], str(self._file)).encode()

    def conventions(self) -> tuple[int | None, bool, bool]:
        return self._processor.unk_id(), True, False  # as LLaMA: BOS before a text, nothing after it


class JsonBackend:
    """A tokenizer.json; the tokenizer_config.json beside it, if any, names BOS and EOS."""

    def __init__(self, raw: bytes, file: Path) -> None:
        import tokenizers

        self.raw = raw
        try:
            self._spec: dict[str, Any] = json.loads(raw)
            self._tokenizer = tokenizers.Tokenizer.from_str(raw.decode("utf-8"))
        except Exception as error:  # the library raises bare Exception
            raise UserError(
                f"{file}: not a tokenizer: a tokenizer.json must be readable by the tokenizers library "
                f"({error}): give the file that its publisher calls tokenizer.json"
            ) from error
        # Otherwise "</s>" in a document would end it.
        self._tokenizer.encode_special_tokens = True
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        vocabulary = self._tokenizer.get_vocab(with_added_tokens=True)
        self.pieces = [""] * (max(vocabulary.values(), default=-1) + 1)
        for piece, id in vocabulary.items():
            self.pieces[id] = piece
        added = [token for token in self._spec.get("added_tokens") or [] if token.get("special")]
        self._special = {token["id"] for token in added}
        named = _named_specials(file.parent)
        bos = _special_id(vocabulary, named.get("bos_token"), BOS_NAMES)
        eos = _special_id(vocabulary, named.get("eos_token"), EOS_NAMES)
        if bos is None or eos is None:
            control = [token["content"] for token in added]
            raise _no_ends(file, -1 if bos is None else bos, -1 if eos is None else eos, control)
        self.bos_id, self.eos_id = bos, eos
        self.pad_id = _special_id(vocabulary, named.get("pad_token"), PAD_NAMES)
        self._unknown = _special_id(vocabulary, named.get("unk_token"), UNKNOWN_NAMES)
        self._kind, self.lead = _decoder_kind(self._spec.get("decoder"))
        self._table: list[bytes] | None = None

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._tokenizer.encode_special_tokens = True  # which the library forgets on its way to a worker process

    def encode(self, text: str) -> list[int]:
        ids: list[int] = self._tokenizer.encode(text, add_special_tokens=False).ids
        return ids

    def decode(self, ids: Sequence[int]) -> str:
        text: str = self._tokenizer.decode(ids, skip_special_tokens=True)
        return text

    def piece_bytes(self) -> list[bytes] | None:
        if self._table is None and self._kind != "unknown":
            convert = _byte_fallback_bytes if self._kind == "byte fallback" else _ByteLevel()
            skipped = self._special | {self.bos_id, self.eos_id, self.pad_id, self._unknown}
            self._table = [b"" if id in skipped else convert(piece) for id, piece in enumerate(self.pieces)]
        return self._table

    def tokenizer_json(self) -> bytes:
        return self.raw

    def conventions(self) -> tuple[int | None, bool, bool]:
        ids = self._tokenizer.encode("a").ids
        return self._unknown, ids[:1] == [self.bos_id], ids[-1:] == [self.eos_id]


class _ByteLevel:
    """Pieces of GPT-2's kind: each of the 256 bytes is written as one printable character."""

    def __init__(self) -> None:
        # Printable Latin-1 stands for itself, the other bytes follow from U+0100 on in order.
        itself = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
        others = [byte for byte in range(256) if byte not in set(itself)]
        self._byte_of = {chr(byte): byte for byte in itself}
        self._byte_of |= {chr(0x100 + index): byte for index, byte in enumerate(others)}

    def __call__(self, piece: str) -> bytes:
        try:
            return bytes(self._byte_of[character] for character in piece)
        except KeyError:  # an added token, written as it is
            return piece.encode("utf-8")


def _byte_fallback_bytes(piece: str) -> bytes:
    """A piece of SentencePiece's kind: "<0x0A>" is a byte, all else is text with marked spaces."""
    if len(piece) == 6 and piece.startswith("<0x") and piece.endswith(">"):
        try:
            return bytes([int(piece[3:5], 16)])
        except ValueError:
            pass
    return piece.replace(SPACE, " ").encode("utf-8")


def _decoder_kind(decoder: dict[str, Any] | None) -> tuple[Literal["byte level", "byte fallback", "unknown"], Lead]:
    """Whether ids stand for fixed bytes under this decoder of a tokenizer.json, and how a text begins."""
    steps = (decoder or {}).get("decoders", [decoder] if decoder else [])
    types = [step["type"] for step in steps]
    if types == ["ByteLevel"]:
        return "byte level", "keep"
    if types == ["Metaspace"] and steps[0].get("replacement") == SPACE:
        return "byte fallback", "keep" if steps[0].get("prepend_scheme") == "never" else "strip one"
    known = all(
        step["type"] in ("ByteFallback", "Fuse")
        or (step["type"] == "Replace" and step["pattern"] == {"String": SPACE} and step["content"] == " ")
        or (step["type"] == "Strip" and (step["content"], step["start"], step["stop"]) == (" ", 1, 0))
        for step in steps
    )
    if known and "ByteFallback" in types:
        return "byte fallback", "strip one" if "Strip" in types else "keep"
    return "unknown", "keep"


def _named_specials(folder: Path) -> dict[str, str]:
    """bos_token, eos_token, ... of the tokenizer_config.json in `folder`; {} when there is none."""
    try:
        config = json.loads((folder / "tokenizer_config.json").read_bytes())
    except (OSError, ValueError):
        return {}
    tokens = {name: value for name, value in config.items() if name.endswith("_token")}
    return {
        name: value["content"] if isinstance(value, dict) else value
        for name, value in tokens.items()
        if isinstance(value, str) or (isinstance(value, dict) and "content" in value)
    }


def _special_id(vocabulary: dict[str, int], named: str | None, usual: tuple[str, ...]) -> int | None:
    """Id of the token that the config names, else of the first usual name that the vocabulary has."""
    for name in (named, *usual):
        if name is not None and name in vocabulary:
            return vocabulary[name]
    return None


def _no_ends(file: Path, bos: int, eos: int, control: list[str]) -> UserError:
    missing = " and ".join(name for name, id in (("BOS", bos), ("EOS", eos)) if id < 0)
    there = ", ".join(control[:12]) or "none"
    return UserError(
        f"{file}: no {missing} token; a text is stored between BOS and EOS; special tokens there are: {there}: "
        "name bos_token and eos_token in a tokenizer_config.json beside a tokenizer.json, or take another tokenizer"
    )
