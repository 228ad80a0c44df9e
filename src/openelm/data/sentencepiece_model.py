"""SentencePiece .model files: their settings, and the same tokenizer as a tokenizer.json.

The file is one protocol-buffer message. We need a dozen of its fields, so a reader of the wire format stands
here instead of a dependency on protobuf and generated classes. Field numbers are those of
sentencepiece_model.proto.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

from openelm.errors import UserError

if TYPE_CHECKING:
    from tokenizers import normalizers

SPACE = "\u2581"  # what SentencePiece writes for a space inside a piece
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6
MODEL_TYPES = {1: "unigram", 2: "bpe", 3: "word", 4: "char"}

# field numbers: ModelProto, TrainerSpec, NormalizerSpec
_PIECES, _TRAINER, _NORMALIZER = 1, 2, 3
_MODEL_TYPE, _NUM_THREADS, _SPACE_AS_SUFFIX, _BYTE_FALLBACK = 3, 16, 24, 35
_CHARSMAP, _DUMMY_PREFIX, _REMOVE_SPACES, _ESCAPE_SPACES = 2, 3, 4, 5

Value = int | bytes


@dataclass(frozen=True)
class Settings:
    """How a model cuts text, as far as another library must know to do the same."""

    model_type: str
    byte_fallback: bool
    space_as_suffix: bool
    charsmap: bytes  # compiled normalisation rules; empty for identity
    add_dummy_prefix: bool
    remove_extra_spaces: bool
    escape_spaces: bool


@dataclass(frozen=True)
class Piece:
    """One vocabulary entry; its id is its position."""

    text: str
    score: float
    kind: int


def read_settings(raw: bytes) -> Settings:
    """Settings of a serialised model; what the file leaves out has the format's own default."""
    top = {number: value for number, value, _ in _fields(raw) if number in (_TRAINER, _NORMALIZER)}
    trainer = _submessage(top.get(_TRAINER, b""))
    normalizer = _submessage(top.get(_NORMALIZER, b""))
    model_type = trainer.get(_MODEL_TYPE, 1)
    charsmap = normalizer.get(_CHARSMAP, b"")
    assert isinstance(model_type, int) and isinstance(charsmap, bytes)
    return Settings(
        model_type=MODEL_TYPES.get(model_type, f"type {model_type}"),
        byte_fallback=bool(trainer.get(_BYTE_FALLBACK, 0)),
        space_as_suffix=bool(trainer.get(_SPACE_AS_SUFFIX, 0)),
        charsmap=charsmap,
        add_dummy_prefix=bool(normalizer.get(_DUMMY_PREFIX, 1)),
        remove_extra_spaces=bool(normalizer.get(_REMOVE_SPACES, 1)),
        escape_spaces=bool(normalizer.get(_ESCAPE_SPACES, 1)),
    )


def read_pieces(raw: bytes) -> list[Piece]:
    """The vocabulary of a serialised model in the order of its ids."""
    pieces = []
    for number, value, _ in _fields(raw):
        if number != _PIECES:
            continue
        entry = _submessage(value)
        text, score, kind = entry.get(1, b""), entry.get(2, b"\0\0\0\0"), entry.get(3, NORMAL)
        assert isinstance(text, bytes) and isinstance(score, bytes) and isinstance(kind, int)
        pieces.append(Piece(text.decode("utf-8"), struct.unpack("<f", score)[0], kind))
    return pieces


def without_thread_count(raw: bytes) -> bytes:
    """The same model without the number of threads that trained it, so that equal models have equal bytes."""
    kept = []
    for number, value, span in _fields(raw):
        if number == _TRAINER:
            assert isinstance(value, bytes)
            spec = b"".join(value[a:b] for n, _, (a, b) in _fields(value) if n != _NUM_THREADS)
            kept.append(field(_TRAINER, spec))
        else:
            kept.append(raw[span[0] : span[1]])
    return b"".join(kept)


def to_tokenizer_json(raw: bytes, bos: str, origin: str) -> str:
    """Text of a tokenizer.json that gives the ids of the SentencePiece BPE model `raw`.

    `bos` is the piece put before a text when special tokens are asked for; `origin` names the model in errors.
    UserError for what the other format cannot express exactly.
    """
    from tokenizers import AddedToken, Tokenizer, decoders, models, processors

    settings, pieces = read_settings(raw), read_pieces(raw)
    _refuse_inexact(settings, pieces, origin)
    ids = {piece.text: index for index, piece in enumerate(pieces)}
    unknown = next(piece.text for piece in pieces if piece.kind == UNKNOWN)
    model = models.BPE(ids, bpe_merges(pieces), unk_token=unknown, fuse_unk=True, byte_fallback=settings.byte_fallback)
    tokenizer = Tokenizer(model)
    tokenizer.normalizer = _normalizer(settings)
    strip = [decoders.Strip(" ", 1, 0)] if settings.add_dummy_prefix else []
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse(), *strip]
    )
    tokenizer.add_special_tokens(
        [AddedToken(p.text, normalized=False, special=True) for p in pieces if p.kind in (UNKNOWN, CONTROL)]
    )
    tokenizer.post_processor = processors.TemplateProcessing(
        single=[bos, "$A"], pair=[bos, "$A", bos, "$B"], special_tokens=[(bos, ids[bos])]
    )
    return tokenizer.to_str(pretty=True)


def bpe_merges(pieces: list[Piece]) -> list[tuple[str, str]]:
    """Pairs to merge, best first.

    SentencePiece keeps no merge list: it joins any two neighbours whose join is a piece, the best score first.
    So each way to cut a piece in two pieces is a merge with the score of the whole.
    """
    normal = {piece.text for piece in pieces if piece.kind == NORMAL}
    best_first = sorted((p for p in pieces if p.kind == NORMAL), key=lambda piece: -piece.score)
    return [
        (piece.text[:cut], piece.text[cut:])
        for piece in best_first
        for cut in range(1, len(piece.text))
        if piece.text[:cut] in normal and piece.text[cut:] in normal
    ]


def _normalizer(settings: Settings) -> normalizers.Normalizer:
    """What SentencePiece does to a text before it looks for pieces."""
    from tokenizers import Regex, normalizers

    steps: list[normalizers.Normalizer] = []
    if settings.charsmap:
        steps.append(normalizers.Precompiled(settings.charsmap))
    if settings.remove_extra_spaces:
        steps += [normalizers.Replace(Regex("^ +| +$"), ""), normalizers.Replace(Regex(" {2,}"), " ")]
    if settings.add_dummy_prefix:
        steps.append(normalizers.Prepend(SPACE))
    return normalizers.Sequence([*steps, normalizers.Replace(" ", SPACE)])


def _refuse_inexact(settings: Settings, pieces: list[Piece], origin: str) -> None:
    """UserError where a tokenizer.json would cut some texts otherwise than the model does."""
    foreign = [piece.text for piece in pieces if piece.kind in (USER_DEFINED, UNUSED)]
    reason = ""
    if settings.model_type != "bpe":
        reason = f"its model type is {settings.model_type}"
    elif settings.space_as_suffix or not settings.escape_spaces:
        reason = "it marks spaces otherwise than by a prefix"
    elif foreign:
        reason = f"it has user-defined or unused pieces ({', '.join(map(repr, foreign[:3]))})"
    if reason:
        raise UserError(
            f"{origin}: {reason}; only BPE models of normal, control and byte pieces have an exact tokenizer.json: "
            "use such a model (`openelm tokenizer train` makes one) or a tokenizer.json"
        )


def _submessage(raw: Value) -> dict[int, Value]:
    """Field number -> value; the last one counts, as the format rules."""
    assert isinstance(raw, bytes)
    return {number: value for number, value, _ in _fields(raw)}


def _fields(raw: bytes) -> Iterator[tuple[int, Value, tuple[int, int]]]:
    """(number, value, span of the whole field) of each field; fixed-width values stay bytes."""
    position = 0
    while position < len(raw):
        start = position
        key, position = _read_varint(raw, position)
        wire_type = key & 7
        if wire_type == 0:
            number, position = _read_varint(raw, position)
            yield key >> 3, number, (start, position)
            continue
        if wire_type == 2:
            size, position = _read_varint(raw, position)
        elif wire_type in (1, 5):
            size = 8 if wire_type == 1 else 4
        else:
            raise ValueError(f"wire type {wire_type} at byte {start}")
        yield key >> 3, raw[position : position + size], (start, position + size)
        position += size


def _read_varint(raw: bytes, position: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        byte = raw[position]
        position += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, position
        shift += 7


def field(number: int, value: int | float | bytes) -> bytes:
    """One field of a serialised message; a float takes four bytes."""
    if isinstance(value, bytes):
        return _varint(number << 3 | 2) + _varint(len(value)) + value
    if isinstance(value, float):
        return _varint(number << 3 | 5) + struct.pack("<f", value)
    return _varint(number << 3) + _varint(value)


def _varint(value: int) -> bytes:
    out = bytearray()
    while value >= 0x80:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    return bytes([*out, value])
