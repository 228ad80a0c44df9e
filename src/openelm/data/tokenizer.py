"""Text <-> token ids: opening tokenizers, decoding a stream of ids, training a new one.

Two kinds of defining file: a SentencePiece `.model` and a `tokenizer.json` of the Hugging Face tokenizers
library. Each library encodes with its own; decoding is ours and the same for both, because in every byte-exact
tokenizer an id stands for a fixed string of bytes. That also lets a text be decoded while it is generated.
"""

from __future__ import annotations

import codecs
import hashlib
import io
import json
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from openelm.data.sentencepiece_model import SPACE, without_thread_count
from openelm.data.tokenizer_backends import Backend, JsonBackend, SentencePieceBackend
from openelm.errors import UserError
from openelm.files import write_bytes

SENTENCEPIECE_FILE, JSON_FILE, CONFIG_FILE = "tokenizer.model", "tokenizer.json", "tokenizer_config.json"


class Tokenizer:
    """A vocabulary and the rules that cut text into it. Make one with `Tokenizer.load`.

    Ids past the vocabulary (rows that fill up a model's embedding) and special ids decode to nothing.
    """

    vocab_size: int
    bos_id: int
    eos_id: int
    pad_id: int | None
    fingerprint: str  # sha256 of the defining file

    def __init__(self, backend: Backend) -> None:
        self._backend = backend
        self.vocab_size = len(backend.pieces)
        self.bos_id, self.eos_id, self.pad_id = backend.bos_id, backend.eos_id, backend.pad_id
        self.fingerprint = hashlib.sha256(backend.raw).hexdigest()

    @classmethod
    def load(cls, path: str | Path) -> Tokenizer:
        """Open a .model file, a tokenizer.json, or a folder that holds one (tokenizer.model preferred).

        The kind is read from the content. UserError: nothing there, not a tokenizer, no BOS or EOS.
        """
        file = _defining_file(Path(path))
        try:
            raw = file.read_bytes()
        except OSError as error:
            raise UserError(f"{file}: cannot be read ({error.strerror}): give a readable tokenizer file") from error
        if raw.lstrip()[:1] == b"{":
            return cls(JsonBackend(raw, file))
        return cls(SentencePieceBackend(raw, file))

    @property
    def backend(self) -> Backend:
        """The library's side of it, for those who write it in a format of their own."""
        return self._backend

    def encode(self, text: str) -> list[int]:
        """Ids of `text` without BOS and EOS; "</s>" in it is four characters, not the end of the text."""
        try:
            return self._backend.encode(text)
        except (RuntimeError, TypeError, UnicodeError):
            # Half a surrogate pair (bad bytes on a command line, a broken JSON escape) has no UTF-8.
            repaired = text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
            if repaired == text:
                raise
            return self._backend.encode(repaired)

    def decode(self, ids: Iterable[int]) -> str:
        """Text of `ids`; bytes that are not UTF-8 become U+FFFD."""
        stream = StreamDecoder(self)
        return "".join(map(stream.push, ids)) + stream.flush()

    def piece(self, id: int) -> str:
        """The vocabulary's own spelling of one id ("\u2581the", "<0x0A>"), for showing."""
        if not 0 <= id < self.vocab_size:
            raise IndexError(f"token id {id} is outside the vocabulary of {self.vocab_size}")
        return self._backend.pieces[id]

    def save(self, folder: str | Path) -> None:
        """Write the files with which this tokenizer opens in our package, transformers, mlx-lm and llama.cpp.

        UserError, and nothing written, when a SentencePiece model has no exact tokenizer.json.
        """
        folder = Path(folder)
        files = {JSON_FILE: self._backend.tokenizer_json(), CONFIG_FILE: self._config().encode()}
        if isinstance(self._backend, SentencePieceBackend):
            files[SENTENCEPIECE_FILE] = self._backend.raw
        folder.mkdir(parents=True, exist_ok=True)
        for name, content in files.items():
            write_bytes(folder / name, content)

    def _config(self) -> str:
        """tokenizer_config.json for AutoTokenizer; the class is transformers' own, so no code of ours is needed."""
        unknown, adds_bos, adds_eos = self._backend.conventions()
        names = {"bos_token": self.bos_id, "eos_token": self.eos_id, "pad_token": self.pad_id, "unk_token": unknown}
        config: dict[str, Any] = {"tokenizer_class": "PreTrainedTokenizerFast"}
        config |= {name: self.piece(id) for name, id in names.items() if id is not None}
        config |= {"add_bos_token": adds_bos, "add_eos_token": adds_eos, "clean_up_tokenization_spaces": False}
        return json.dumps(config, indent=2, ensure_ascii=False) + "\n"


class StreamDecoder:
    """Decodes ids one at a time: what `push` and `flush` return, joined, is `tokenizer.decode` of all of them.

    To continue a prompt, push the prompt's ids first and leave out what they give: the space before the first
    new word then stays.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._backend = tokenizer._backend
        self._table = self._backend.piece_bytes()
        self._reset()

    def _reset(self) -> None:
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")
        self._at_start = True
        self._ids: list[int] = []
        self._given = ""

    def push(self, id: int) -> str:
        """Text that `id` completes; "" while a character still lacks bytes."""
        if self._table is None:
            return self._push_unknown_decoder(id)
        piece = self._table[id] if 0 <= id < len(self._table) else b""
        if self._at_start and piece:
            piece, self._at_start = self._first(piece, id)
        return self._utf8.decode(piece)

    def flush(self) -> str:
        """What was held back, after the last id; the decoder is then ready for another text."""
        if self._table is None:
            rest = self._backend.decode(self._ids)[len(self._given) :]
        else:
            rest = self._utf8.decode(b"", final=True)
        self._reset()
        return rest

    def _first(self, piece: bytes, id: int) -> tuple[bytes, bool]:
        """The first bytes of a text, and whether the text has still not begun after them."""
        if self._backend.lead == "strip all":
            piece = piece.lstrip(b" ")
            return piece, not piece
        # Only a marked space is a dummy: the byte piece <0x20> is a real one, as SentencePiece has it.
        if self._backend.lead == "strip one" and self._backend.pieces[id].startswith(SPACE):
            return piece[1:], False
        return piece, False

    def _push_unknown_decoder(self, id: int) -> str:
        """A decoder that we cannot take apart (WordPiece): decode all again, give what is new and settled."""
        self._ids.append(id)
        text = self._backend.decode(self._ids)
        if not text.startswith(self._given) or text.endswith("\ufffd"):
            return ""
        new, self._given = text[len(self._given) :], text
        return new


def train_tokenizer(texts: Iterable[str], path: str | Path, vocab_size: int, *, threads: int = 2) -> Tokenizer:
    """Train a SentencePiece BPE on `texts` and write it to `path`, whole or not at all.

    The settings are those of the LLaMA tokenizer: byte fallback, identity normalisation, single digits, runs of
    spaces kept, <unk> 0, <s> 1, </s> 2, no pad. Any text survives encode and decode. The same texts give the same file
    with any number of threads. All texts are used, none sampled, and held in memory (10 MB of Python sources
    take about 2 s on two cores): give a sample of a large corpus.
    UserError: too little text for `vocab_size`, or a `vocab_size` below the single characters and bytes.
    """
    import sentencepiece

    model = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=_sentences(texts),
            model_writer=model,
            model_type="bpe",
            vocab_size=vocab_size,
            num_threads=threads,
            byte_fallback=True,
            normalization_rule_name="identity",
            remove_extra_whitespaces=False,
            allow_whitespace_only_pieces=True,
            split_digits=True,
            character_coverage=0.99995,
            max_sentence_length=4 * _LONGEST_SENTENCE,
            shuffle_input_sentence=False,
            unk_id=0,
            bos_id=1,
            eos_id=2,
            pad_id=-1,
            minloglevel=2,
        )
    except RuntimeError as error:
        raise UserError(_training_problem(str(error), vocab_size)) from error
    raw = without_thread_count(model.getvalue())
    tokenizer = Tokenizer(SentencePieceBackend(raw, Path(path)))
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    write_bytes(Path(path), raw)
    return tokenizer


_LONGEST_SENTENCE = 4096  # characters; the trainer drops longer sentences silently, so we cut them before
# The trainer throws away a sentence with one of these: its own marks for the end, for unknown and for a space.
_TRAINERS_OWN = re.compile("[\n\0\u2581\u2585]")


def _sentences(texts: Iterable[str]) -> Iterator[str]:
    """Lines of all texts. A newline is thus in no piece and is encoded as the byte <0x0A>, as LLaMA does."""
    for text in texts:
        for line in _TRAINERS_OWN.split(text):
            for start in range(0, len(line), _LONGEST_SENTENCE):
                yield line[start : start + _LONGEST_SENTENCE]


def _training_problem(message: str, vocab_size: int) -> str:
    """The trainer's complaint as value, rule and remedy."""
    if largest := re.search(r"set it to a value <= (\d+)", message):
        return (
            f"vocabulary of {vocab_size} pieces: the text has words for {largest[1]} at most: "
            f"use vocab_size={largest[1]} or less, or give more text"
        )
    if smallest := re.search(r"required_chars\. \d+ vs (\d+)", message):
        return (
            f"vocabulary of {vocab_size} pieces: the 256 bytes, 3 special tokens and the text's characters take "
            f"{smallest[1]}: use vocab_size={int(smallest[1]) + 1} or more"
        )
    if "sentences_.empty()" in message:
        return "no text to train a tokenizer on: every text is empty: give at least a few hundred kilobytes"
    return f"the tokenizer could not be trained: {message}"


def _defining_file(path: Path) -> Path:
    """The file to read for `path`; UserError when there is none."""
    if path.is_file():
        return path
    if not path.exists():
        raise UserError(
            f"{path}: no such file or folder: give a SentencePiece .model, a tokenizer.json or their folder"
        )
    for name in (SENTENCEPIECE_FILE, JSON_FILE):
        if (path / name).is_file():
            return path / name
    models = sorted(path.glob("*.model"))
    if len(models) == 1:
        return models[0]
    there = ", ".join(sorted(entry.name for entry in path.iterdir())[:8]) or "nothing"
    raise UserError(
        f"{path}: a tokenizer folder holds {SENTENCEPIECE_FILE} or {JSON_FILE}, this one holds {there}: "
        "name the tokenizer's file"
    )
