"""Entries measured in alternation, each in a process of its own: A B C, A B C, and the machine's roof between."""

from __future__ import annotations

import random
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from openelm.bench.needs import Need
from openelm.bench.results import Row
from openelm.bench.session import LIMIT_S, RUNNERS, BrokenError, Session

WARM_UP_TOKENS = 16  # of a quick dry run
ORDERS = ("given", "reverse", "shuffle")


@dataclass(frozen=True)
class Case:
    """What is done with an entry: ``batch`` prompts of ``prompt_tokens``, ``tokens`` made of each."""

    prompt_tokens: int
    tokens: int
    batch: int = 1

    @property
    def room(self) -> int:
        """Tokens of a text at its end."""
        return self.prompt_tokens + self.tokens

    def __str__(self) -> str:
        return f"{self.prompt_tokens}+{self.tokens}" + (f" x{self.batch}" if self.batch > 1 else "")


@dataclass(frozen=True)
class Entry:
    """One engine with one model: its runner, what that is told, what is known of it before it runs."""

    name: str
    runner: str | Path  # one of runners/, or a file
    specification: dict[str, Any]
    vocab_size: int
    need: Need
    about: dict[str, Any] = field(default_factory=dict)
    python: str = sys.executable
    install: str = ""  # the command that gets its library
    environment: dict[str, str] = field(default_factory=dict)
    ask: tuple[str, dict[str, Any]] | None = None  # a method of the runner to call after the last round
    problem: str = ""  # why it cannot be measured at all

    @property
    def file(self) -> Path:
        """The runner's file."""
        return self.runner if isinstance(self.runner, Path) else RUNNERS / f"{self.runner}.py"


@dataclass(frozen=True)
class Plan:
    """How the entries take turns."""

    cases: tuple[Case, ...]
    repeats: int
    threads: int
    quick: bool = False
    order: str = "given"
    seed: int = 0
    one_at_a_time: bool = False
    profile: bool = False
    limit_s: float = LIMIT_S

    def rounds(self, count: int) -> Iterator[list[int]]:
        """The order of each round, as places in the list of entries."""
        draw = random.Random(self.seed)
        for _ in range(self.repeats):
            places = list(range(count))
            if self.order == "reverse":
                places.reverse()
            elif self.order == "shuffle":
                draw.shuffle(places)
            yield places


def measure(
    entries: Sequence[Entry], plan: Plan, roof: dict[str, Any] | None, say: Callable[[str], None]
) -> tuple[list[Row], dict[str, Any]]:
    """Rows of all entries in all cases, in the order given, and the roof (``roof``: what its runner is told).

    An entry that breaks is a row that says why, and the others go on.
    """
    subjects = [Subject(entry, plan, say) for entry in entries]
    with ExitStack() as stack:
        measured = Roof(stack, roof, plan, say)
        if not plan.one_at_a_time:
            first = next(iter(plan.rounds(len(subjects))), [])
            for place in first:
                stack.callback(subjects[place].close)
                subjects[place].open()
        for number, places in enumerate(plan.rounds(len(subjects)), start=1):
            measured.again()
            for place in places:
                subject = subjects[place]
                say(f"round {number} of {plan.repeats}: {subject.entry.name}")
                with subject.opened():
                    subject.visit()
        measured.again()
        for subject in subjects:
            with subject.opened(wanted=subject.asks):
                subject.finish()
    return [row for subject in subjects for row in subject.rows], measured.found


class Roof:
    """The child that measures the machine; without it shares are unknown, and all else goes on."""

    def __init__(self, stack: ExitStack, specification: dict[str, Any] | None, plan: Plan, say: Callable[[str], None]):
        self.found: dict[str, Any] = {}
        self._session: Session | None = None
        if specification is None:
            return
        try:
            self._session = stack.enter_context(Session(RUNNERS / "roof.py", threads=plan.threads))
            self.found = {**self._session.ask("load", **specification)["about"], "bytes_per_s": [], "flops_per_s": []}
        except BrokenError as error:
            say(f"the roof cannot be measured: {error}")
            self._session = None

    def again(self) -> None:
        """Measure both rates once more."""
        if self._session is None:
            return
        with suppress(BrokenError):
            for name, value in self._session.ask("ask", method="measure")["result"].items():
                self.found[name].append(value)


class Subject:
    """An entry while it is measured: its process, its rows, what went wrong with it."""

    def __init__(self, entry: Entry, plan: Plan, say: Callable[[str], None]) -> None:
        self.entry, self._plan, self._say = entry, plan, say
        about = {**entry.about, "announced_bytes": entry.need.total}
        self.rows = [
            Row(entry.name, str(case), {**about, "prompt_tokens": case.prompt_tokens, "tokens": case.tokens}
                | {"batch": case.batch}, problem=entry.problem)
            for case in plan.cases
        ]  # fmt: skip
        draw = random.Random(0)
        self._prompts = [
            [[draw.randrange(3, entry.vocab_size) for _ in range(case.prompt_tokens)] for _ in range(case.batch)]
            for case in plan.cases
        ]
        self._session: Session | None = None
        self.broken = bool(entry.problem)

    @property
    def asks(self) -> bool:
        """Whether something is to be asked after the last round."""
        return self._plan.profile or self.entry.ask is not None

    @contextmanager
    def opened(self, wanted: bool = True) -> Iterator[None]:
        """With its process, which is started and ended here where one stands in memory at a time."""
        if not self._plan.one_at_a_time or not wanted:
            yield
            return
        self.open()
        try:
            yield
        finally:
            self.close()

    def open(self) -> None:
        """Start the process, load, make a first token; then the dry run, of which nothing is kept."""
        if self.broken:
            return
        entry = self.entry
        with self._named():
            self._say(f"loading {entry.name}")
            self._session = Session(
                entry.file,
                python=entry.python,
                threads=self._plan.threads,
                environment=entry.environment,
                limit_s=self._plan.limit_s,
            )
            loaded = self._session.ask("load", **entry.specification)
            start = self._session.ask("run", prompts=[self._prompts[0][0]], tokens=1, room=self._plan.cases[0].room)
            for row in self.rows:
                row.about |= loaded["about"]
                row.metrics.setdefault("import_s", []).append(loaded["import_s"])
                row.metrics.setdefault("load_s", []).append(loaded["load_s"])
                row.metrics.setdefault("first_token_s", []).append(loaded["load_s"] + start["prompt_s"])
            for case, prompts in zip(self._plan.cases, self._prompts, strict=True):
                tokens = min(case.tokens, WARM_UP_TOKENS) if self._plan.quick else case.tokens
                self._session.ask("run", prompts=prompts, tokens=tokens, room=case.room)

    def visit(self) -> None:
        """One repetition of every case."""
        for case, prompts, row in zip(self._plan.cases, self._prompts, self.rows, strict=True):
            if self.broken:
                return
            with self._named():
                assert self._session is not None
                found = self._session.ask("run", prompts=prompts, tokens=case.tokens, room=case.room)
                record(row, case, found)

    def finish(self) -> None:
        """What is asked once: the entry's own question, and the profile."""
        if self.broken or not self.asks:
            return
        with self._named():
            assert self._session is not None
            prompt = self._prompts[0][0]
            if self.entry.ask is not None:
                method, arguments = self.entry.ask
                found = self._session.ask("ask", method=method, prompt=prompt, **arguments)["result"]
                for row in self.rows:
                    row.about[method] = found
            if self._plan.profile:
                profile = self._session.ask("ask", method="profile", prompt=prompt)["result"]
                for row in self.rows:
                    row.about["profile"] = profile

    def close(self) -> None:
        """End the process."""
        if self._session is not None:
            self._session.close()
            self._session = None

    @contextmanager
    def _named(self) -> Iterator[None]:
        """What breaks is said in this entry's rows; rounds that it did finish stay."""
        try:
            yield
        except BrokenError as error:
            reason = str(error)
            if error.missing is not None and self.entry.install:
                reason = f"not installed ({error.missing}): {self.entry.install}"
            self._say(f"{self.entry.name}: {reason}")
            self.broken = True
            for row in self.rows:
                row.problem = reason
            self.close()


def record(row: Row, case: Case, found: dict[str, Any]) -> None:
    """One repetition: seconds as they were, and the rates that follow. The first token belongs to the prompt."""
    prompt_s, generation_s = found["prompt_s"], found["generation_s"]
    made = sum(map(len, found["made"]))
    values = {"prompt_s": prompt_s, "generation_s": generation_s}
    values["prompt_tokens_per_s"] = case.batch * case.prompt_tokens / prompt_s
    if case.tokens > 1:
        values["generation_tokens_per_s"] = (made - case.batch) / generation_s
    values["total_tokens_per_s"] = (case.batch * case.prompt_tokens + made) / (prompt_s + generation_s)
    for name, value in values.items():
        row.metrics.setdefault(name, []).append(value)
    row.about["peak_memory_bytes"] = found["peak_memory_bytes"]
    row.about["tokens_made"] = made
