"""Records of tuning sets -> token ids, with a mark on each that the loss counts; and what became of every record.

Formats of a record:
  chat         {messages}: a conversation; all turns of the assistant are answers
  prompt       {prompt, answer}: texts, joined as they are
  text         {text}: all of it is the answer
  commonsense  {instruction, input, output}: LLM-Adapters' text (instructions.py)
  preference   {prompt, chosen, rejected}: two answers to one prompt, which may be left out. Texts are joined as they
               are. Where any of them is a list of messages all go through the chat template: a whole conversation,
               which ends with the answer, or the answer alone behind the prompt (which, if text, is the user's turn).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from hashlib import sha256
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from openelm.data import instructions
from openelm.data.chat import common_length, encode_chat
from openelm.data.packing import Ids
from openelm.data.pieces import Tokenizer
from openelm.data.records import Record, find, read
from openelm.data.stream import is_held_out
from openelm.data.walk import shuffled
from openelm.errors import UserError

# Why a record is left out; a text that is null is no_text, one of white space an empty answer.
DROPPED = ("no_text", "no_answer", "empty_answer", "same_answers", "other_prompts", "long_prompt", "no_room")
# What was done to records that are kept.
CUT = ("cut_prompts", "cut_answers")

Messages = list[Mapping[str, Any]]


@dataclass(frozen=True)
class TuneSource:
    """Records to tune on, and the columns that hold what the format needs."""

    name: str
    path: str  # file, folder, glob or URL
    format: Literal["chat", "prompt", "text", "commonsense", "preference"]
    prompt_key: str = "prompt"
    answer_key: str = "answer"
    text_key: str = "text"
    messages_key: str = "messages"
    chosen_key: str = "chosen"
    rejected_key: str = "rejected"


@dataclass(frozen=True)
class Encoding:
    """How a record becomes ids. Lengths are in tokens, the BOS counted.

    An example has at most ``row_length`` + 1 ids: an answer is cut there. A prompt of more than ``prompt_length`` keeps
    its end, behind the BOS, or the example is dropped.
    """

    row_length: int
    prompt_length: int | None = None
    long_prompts: Literal["keep_end", "drop"] = "keep_end"
    loss_on: Literal["answers", "all"] = "answers"
    empty_system_turn: bool = False


@dataclass(frozen=True, eq=False)
class Example:
    """Ids, BOS first; ``counts[i]``: ids[i] is a target of the loss."""

    ids: Ids
    counts: NDArray[np.bool_]


@dataclass(frozen=True, eq=False)
class Pair:
    """Two answers to the same ids of a prompt; the answers count, with the EOS that ends each."""

    chosen: Example
    rejected: Example


@dataclass(frozen=True)
class Examples:
    """All examples, or all pairs, of some sources; ``account`` says what became of their records.

    ``chat``: some went through the chat template.
    """

    train: list[Example] | list[Pair]
    held_out: list[Example] | list[Pair]
    account: dict[str, int]
    chat: bool


def read_examples(
    sources: Sequence[TuneSource],
    tokenizer: Tokenizer,
    encoding: Encoding,
    *,
    held_out: float = 0.0,
    validation: int = 0,
) -> Examples:
    """Every record of the sources, in their order, as examples.

    A fraction ``held_out``, chosen by a hash of the prompt as far as it is kept, is not trained on: no prompt of one
    format is on both sides. At most ``validation`` of those are given. UserError: sources of pairs and of examples, a
    record that is not of its source's format, nothing left to train on.
    """
    if len({source.format == "preference" for source in sources}) > 1:
        formats = ", ".join(f"{source.name}: {source.format}" for source in sources)
        raise UserError(f"sources of pairs and of single examples ({formats}): a run has one kind: leave out the other")
    account = Counter(dict.fromkeys(("records", "trained_on", "held_out", "held_out_unused", *DROPPED, *CUT), 0))
    train: list[Any] = []
    held: list[Any] = []
    chat = False
    for source in sources:
        for where, record in _located(source):
            account["records"] += 1
            reader = _Reader(source, tokenizer, encoding, where)
            try:
                prompt, example = reader.example(record)
            except _Dropped as dropped:
                account[str(dropped)] += 1
                continue
            account.update(reader.cut)
            chat |= reader.chats
            (held if held_out and is_held_out(prompt, held_out) else train).append(example)
    given = sorted(shuffled(len(held), "held_out")[:validation])
    account.update(trained_on=len(train), held_out=len(given), held_out_unused=len(held) - len(given))
    if not train:
        counts = ", ".join(f"{name} {count:,}" for name, count in account.items() if count and name != "records")
        raise UserError(
            f"nothing is left to train on of {account['records']:,} records ({counts or 'the files are empty'}): look "
            "at the records and at data.prompt_length, data.row_length and data.held_out"
        )
    return Examples(train, [held[index] for index in given], dict(account), chat)


def fingerprint(examples: Sequence[Example] | Sequence[Pair]) -> str:
    """SHA-256 over all ids and what counts of them, in their order: equal for equal examples only."""
    digest = sha256()
    for item in examples:
        for example in (item.chosen, item.rejected) if isinstance(item, Pair) else (item,):
            digest.update(b"%d " % len(example.ids))
            digest.update(example.ids.astype("<i4").tobytes())
            digest.update(example.counts.tobytes())
    return digest.hexdigest()


def _located(source: TuneSource) -> Iterator[tuple[str, Record]]:
    """The records of a source, each with where it stands."""
    for file in find(source.path):
        for number, record in enumerate(read(file), start=1):
            yield f"source {source.name}: {file}: record {number}", record


class _Dropped(Exception):  # noqa: N818 (what became of a record, not an error)
    """Its text is one of DROPPED."""


class _Reader:
    """What a record of one source becomes; ``where`` is the record's place, for errors."""

    def __init__(self, source: TuneSource, tokenizer: Tokenizer, encoding: Encoding, where: str) -> None:
        self.source, self.tokenizer, self.encoding, self.where = source, tokenizer, encoding, where
        self.cut: set[str] = set()  # which of CUT was done to the record
        self.chats = False  # whether it went through the chat template
        self._prompt_ids: list[int] = []  # that are left of the prompt

    def example(self, record: Record) -> tuple[str, Example | Pair]:
        """What decides whether it is held out, and the example; _Dropped."""
        prompt: str
        example: Example | Pair
        if self.source.format == "preference":
            prompt, example = self._preference(record)
        else:
            prompt, example = self._chat(record) if self.source.format == "chat" else self._text(record)
        # Prompts that differ only in what is cut off are one.
        return str(self._prompt_ids) if "cut_prompts" in self.cut else prompt.strip(), example

    def _text(self, record: Record) -> tuple[str, Example]:
        source = self.source
        if source.format == "commonsense":
            example = {key: self._string(record, key) for key in ("instruction", "output")}
            if record.get("input") is not None:
                example["input"] = self._string(record, "input")
            prompt, answer = instructions.prompt(example), example["output"]
        elif source.format == "prompt":
            prompt, answer = self._string(record, source.prompt_key), self._string(record, source.answer_key)
        else:
            prompt, answer = "", self._string(record, source.text_key)
        ids, start = self._joined(prompt, answer, self.encoding.loss_on)
        counts = [place >= start for place in range(len(ids))]
        return prompt if prompt.strip() else answer, self._fitted(ids, counts, start, self.encoding.loss_on)

    def _chat(self, record: Record) -> tuple[str, Example]:
        messages = self._messages(self._value(record, self.source.messages_key), self.source.messages_key)
        answers = [place for place, turn in enumerate(messages) if turn.get("role") == "assistant"]
        if not answers:
            raise _Dropped("no_answer")
        if any(_is_blank(messages[place].get("content")) for place in answers):
            raise _Dropped("empty_answer")
        ids, counts = self._encoded(messages)
        example = self._fitted(ids, counts, counts.index(True), self.encoding.loss_on)
        return _words(messages[: answers[0]] or messages), example

    def _preference(self, record: Record) -> tuple[str, Pair]:
        source = self.source
        is_named = source.prompt_key != TuneSource.prompt_key
        prompt = self._value(record, source.prompt_key) if is_named else record.get(source.prompt_key)
        prompt = "" if prompt is None else prompt
        answers = [self._value(record, key) for key in (source.chosen_key, source.rejected_key)]
        if None in answers:
            raise _Dropped("no_text")
        if isinstance(prompt, str) and all(isinstance(answer, str) for answer in answers):
            words = prompt if prompt.strip() else answers[0]
            encoded = [self._joined(prompt, answer, "answers") for answer in answers]
        else:
            keys = (source.chosen_key, source.rejected_key)
            talks = [self._talk(prompt, answer, key) for answer, key in zip(answers, keys, strict=True)]
            words, other = (_words(talk[:-1]) for talk in talks)
            if words != other:
                raise _Dropped("other_prompts")
            words = words or _words(talks[0])
            encoded = [_last_answer(*self._encoded(talk)) for talk in talks]
        # One answer may have merged with the end of the prompt: the prompt then ends where both agree on it.
        start = min(start for _, start in encoded)
        chosen, rejected = (
            self._fitted(ids, [place >= start for place in range(len(ids))], start, "answers") for ids, _ in encoded
        )
        if np.array_equal(chosen.ids, rejected.ids):
            raise _Dropped("same_answers")
        return words, Pair(chosen, rejected)

    def _talk(self, prompt: Any, answer: Any, key: str) -> Messages:
        """The conversation that ends with an answer."""
        if isinstance(prompt, str):
            before: Messages = [{"role": "user", "content": prompt}] if prompt else []
        else:
            before = self._messages(prompt, self.source.prompt_key)
        if isinstance(answer, str):
            talk = [*before, {"role": "assistant", "content": answer}]
        else:
            talk = self._messages(answer, key)
            if isinstance(prompt, str):
                is_whole = bool(talk) and talk[0].get("role") != "assistant"
            else:
                is_whole = len(talk) > 1 and _words(talk).startswith(_words(before))
            talk = talk if is_whole else [*before, *talk]
        if not talk or talk[-1].get("role") != "assistant":
            raise _Dropped("no_answer")
        if _is_blank(talk[-1].get("content")):
            raise _Dropped("empty_answer")
        return talk

    # Ids

    def _joined(self, prompt: str, answer: str, loss_on: str) -> tuple[list[int], int]:
        """Ids of two texts, joined, between BOS and EOS; and where the answer begins (1 where it does not matter)."""
        if _is_blank(answer):
            raise _Dropped("empty_answer")
        whole = self.tokenizer.encode(prompt + answer)
        ids = [self.tokenizer.bos_id, *whole, self.tokenizer.eos_id]
        fits = len(ids) <= min(self.encoding.row_length, self.encoding.prompt_length or len(ids))
        if not prompt or (fits and loss_on == "all"):
            return ids, 1  # without encoding the prompt again, which is half of the work
        # A token may hold the end of the prompt and the beginning of the answer: then it is the answer's.
        return ids, 1 + common_length(self.tokenizer.encode(prompt), whole)

    def _encoded(self, messages: Messages) -> tuple[list[int], list[bool]]:
        self.chats = True
        try:
            return encode_chat(self.tokenizer, messages, empty_system_turn=self.encoding.empty_system_turn)
        except UserError as error:
            raise UserError(f"{self.where}: {error}") from error

    def _fitted(self, ids: list[int], counts: list[bool], start: int, loss_on: str) -> Example:
        """An example within the limits, up to the end of its last answer; the ids before ``start`` are the prompt."""
        encoding = self.encoding
        end = len(counts) - counts[::-1].index(True)
        first = 1  # that is kept behind the BOS
        if encoding.prompt_length is not None and start > encoding.prompt_length:
            if encoding.long_prompts == "drop":
                raise _Dropped("long_prompt")
            first = start - encoding.prompt_length + 1
            self.cut.add("cut_prompts")
        if start - first + 1 > encoding.row_length:
            raise _Dropped("no_room")
        if end - first > encoding.row_length:
            end = first + encoding.row_length
            self.cut.add("cut_answers")
        self._prompt_ids = ids[first:start]
        kept = np.array([ids[0], *ids[first:end]], dtype=np.int32)
        targets = np.array([False, *counts[first:end]])
        if loss_on == "all":
            targets[1:] = True
        return Example(kept, targets)

    # Columns

    def _value(self, record: Record, key: str) -> Any:
        if key not in record:
            there = ", ".join(map(repr, record)) or "none"
            raise UserError(
                f"{self.where} has no column {key!r}, which the format {self.source.format} needs; its columns are "
                f"{there}: name yours in the source, or choose another format"
            )
        return record[key]

    def _string(self, record: Record, key: str) -> str:
        value = self._value(record, key)
        if value is None:
            raise _Dropped("no_text")
        if not isinstance(value, str):
            raise UserError(
                f"{self.where}: {key!r} is a {type(value).__name__}; the format {self.source.format} needs text there: "
                "name another column, or choose another format"
            )
        return value

    def _messages(self, value: Any, key: str) -> Messages:
        if value is None:
            raise _Dropped("no_text")
        if not isinstance(value, list) or not all(isinstance(turn, Mapping) for turn in value):
            raise UserError(
                f"{self.where}: {key!r} is a {type(value).__name__}, and no list of messages {{role, content}}, which "
                f"the format {self.source.format} needs there: name another column, or choose another format"
            )
        if any("content" in turn and turn["content"] is None for turn in value):
            raise _Dropped("no_text")
        return value


def _last_answer(ids: list[int], counts: list[bool]) -> tuple[list[int], int]:
    """A conversation up to the end of its last answer, and where that begins."""
    end = len(counts) - counts[::-1].index(True)
    answer = counts[:end][::-1]
    return ids[:end], end - (answer.index(False) if False in answer else end)


def _is_blank(text: Any) -> bool:
    return isinstance(text, str) and not text.strip()


def _words(messages: Messages) -> str:
    """Who says what, as one text."""
    return "".join(f"{turn.get('role')}\n{turn.get('content')}\n" for turn in messages)
