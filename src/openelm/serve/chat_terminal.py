"""A conversation in the terminal, or through a pipe: lines in, answers out as they are written."""

from __future__ import annotations

import json
import re
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, fields, replace
from difflib import get_close_matches
from pathlib import Path
from types import FrameType
from typing import Any

from openelm.errors import UserError
from openelm.files import whole_file
from openelm.infer.engine import Engine, Stream
from openelm.infer.sampling import Sampling
from openelm.serve.conversation import Conversation
from openelm.serve.template import ChatTemplate

FENCE = '"""'
# What a terminal would obey: models do write such characters.
CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")


@dataclass
class Stop:
    """Whether Ctrl-C was pressed."""

    asked: bool = False


class TerminalChat:
    """Reads messages and commands until the input ends; answers go to standard output, all else to standard error."""

    def __init__(
        self, engine: Engine, template: ChatTemplate, sampling: Sampling, max_tokens: int, system: str = ""
    ) -> None:
        self._engine = engine
        self.conversation = Conversation(template.encode, engine.limit, system)
        self.sampling, self.max_tokens = sampling, max_tokens
        self._is_terminal = sys.stdin.isatty() and sys.stdout.isatty()
        self._saved: set[Path] = set()
        self._commands: dict[str, tuple[str, Callable[[str], None]]] = {
            "/help": ("this list", self._help),
            "/reset": ("forget the conversation; the system turn stays", self._reset),
            "/system": ("TEXT: how the model shall behave; without TEXT there is no system turn", self._system),
            "/set": ("NAME VALUE: a setting, as in `/set temperature 0.7`; alone it shows all", self._set),
            "/save": ("FILE: the conversation as a line of JSON, which `openelm finetune` reads (.jsonl)", self._save),
        }

    def run(self) -> None:
        """Until Ctrl-D, or the end of the pipe."""
        if self._is_terminal:
            _offer_history()
            say("/help lists the commands; Ctrl-C stops an answer, Ctrl-D ends the conversation")
        while True:
            try:
                message, is_command = read_message(self._read)
            except EOFError:
                if self._is_terminal:
                    print()
                return
            except KeyboardInterrupt:
                if not self._is_terminal:
                    raise
                print()  # that line is not wanted
                continue
            try:
                if is_command:
                    self._obey(message)
                elif message.strip():
                    self._reply(message)
            except UserError as error:
                say(f"error: {error}")

    def _read(self, prompt: str) -> str:
        try:
            line = input(prompt if self._is_terminal else "")
        except UnicodeDecodeError as error:
            raise UserError(f"standard input is not UTF-8 (byte {error.start}): convert it first") from error
        return line.encode("utf-8", "replace").decode("utf-8")

    def _reply(self, message: str) -> None:
        forgotten = self.conversation.forgotten
        ids = self.conversation.ask(message, self.max_tokens)
        if dropped := self.conversation.forgotten - forgotten:
            say(f"the context of {self._engine.limit} tokens is full: the oldest {dropped} turns are left out")
        stream = self._engine.stream(ids, self.max_tokens, self.sampling)
        answer = ""
        try:
            with interruptible() as stop:
                for piece in stream:
                    answer += piece
                    print(CONTROL.sub("\ufffd", piece) if self._is_terminal else piece, end="", flush=True)
                    if stop.asked:
                        break
        finally:
            stream.close()
            self.conversation.answer(answer)
        print()
        say(self._account(stream) + ("" if answer else "; nothing was said, and the question is taken back"))

    def _account(self, stream: Stream) -> str:
        tokens = len(stream.ids)
        parts = [f"{tokens} token{'s' if tokens != 1 else ''}"]
        if stream.decode_tokens_per_s is not None:
            parts.append(f"{stream.decode_tokens_per_s:.1f} tokens/s")
        parts.append(f"the first after {stream.prefill_s:.2f} s")
        text = ", ".join(parts)
        if stream.finish_reason != "length":
            return text if stream.finish_reason else f"{text}; stopped"
        limit = f"max_tokens={self.max_tokens}" if tokens == self.max_tokens else "the end of the context"
        return f"{text}; cut off at {limit}"

    # Commands

    def _obey(self, line: str) -> None:
        name, _, rest = line.partition(" ")
        if name not in self._commands:
            near = get_close_matches(name, self._commands, n=1, cutoff=0.0)[0]
            raise UserError(
                f"there is no {name}: did you mean {near}? /help lists the commands; a message that begins with a "
                f"slash goes between {FENCE} and {FENCE}"
            )
        self._commands[name][1](rest.strip())

    def _help(self, _: str) -> None:
        for name, (what, _run) in self._commands.items():
            say(f"{name:<8} {what}")
        say(f"A line that ends in a backslash goes on in the next; so does what stands between {FENCE} and {FENCE}.")

    def _reset(self, _: str) -> None:
        self.conversation.clear()
        say("a new conversation")

    def _system(self, text: str) -> None:
        self.conversation.system = text
        say("the system turn is set" if text else "there is no system turn")

    def _set(self, words: str) -> None:
        values: dict[str, int | float] = {"max_tokens": self.max_tokens}
        values |= {one.name: getattr(self.sampling, one.name) for one in fields(Sampling)}
        name, _, text = words.replace("=", " ", 1).partition(" ")
        if name and name not in values:
            raise UserError(f"there is no setting {name}: use one of {', '.join(values)}")
        if text.strip():
            self._change(name, text.strip(), whole=isinstance(values[name], int))
            values[name] = self.max_tokens if name == "max_tokens" else getattr(self.sampling, name)
        for one in [name] if name else values:
            say(f"{one} = {values[one]}")

    def _change(self, name: str, text: str, *, whole: bool) -> None:
        value: Any
        try:
            value = int(text) if whole else float(text)
        except ValueError as error:
            raise UserError(f"{name}={text} must be a {'whole ' if whole else ''}number: give one") from error
        if name != "max_tokens":
            self.sampling = replace(self.sampling, **{name: value})
        elif value < 1:
            raise UserError(f"max_tokens={text} must be at least 1: give a larger one")
        else:
            self.max_tokens = value

    def _save(self, name: str) -> None:
        path = Path(name).expanduser()
        if path.suffix not in (".json", ".jsonl"):
            raise UserError(f"{name!r} must end in .jsonl (or .json), by which `openelm finetune` knows it: add that")
        if not self.conversation.turns:
            raise UserError("there is nothing to save yet: ask something first")
        record = json.dumps({"messages": self.conversation.messages}, ensure_ascii=False)
        with whole_file(path, overwrite=path in self._saved) as draft:
            draft.write_text(f"{record}\n", encoding="utf-8")
        self._saved.add(path)
        say(f"saved {len(self.conversation.turns)} turns in {path}")


def read_message(read: Callable[[str], str]) -> tuple[str, bool]:
    """A message of one or more lines from ``read(prompt)``, and whether it is a command. EOFError where none comes."""
    line = read("> ")
    if line.lstrip().startswith(FENCE):
        return _block(line.lstrip().removeprefix(FENCE), read), False
    is_command = line.startswith("/")
    lines = [line]
    while lines[-1].endswith("\\"):
        lines[-1] = lines[-1][:-1]
        try:
            lines.append(read("… "))
        except EOFError:
            break
    return "\n".join(lines), is_command


def _block(first: str, read: Callable[[str], str]) -> str:
    lines = [first]
    while not lines[-1].rstrip().endswith(FENCE):
        try:
            lines.append(read("… "))
        except EOFError:
            return "\n".join(lines)
    lines[-1] = lines[-1].rstrip().removesuffix(FENCE)
    return "\n".join(lines).strip("\n")


@contextmanager
def interruptible() -> Iterator[Stop]:
    """Ctrl-C is only noted, so that the engine is not left in the middle of a token; the second one interrupts."""
    stop = Stop()

    def note(number: int, frame: FrameType | None) -> None:
        if stop.asked:
            raise KeyboardInterrupt
        stop.asked = True

    before = signal.signal(signal.SIGINT, note)
    try:
        yield stop
    finally:
        signal.signal(signal.SIGINT, before)


def say(text: str) -> None:
    """A remark, which is no part of an answer."""
    print(f"[{text}]", file=sys.stderr, flush=True)


def _offer_history() -> None:
    """The arrow keys bring back earlier lines, where this Python has readline."""
    with suppress(ImportError):
        import readline  # noqa: F401
