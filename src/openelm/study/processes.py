"""Commands of ours as processes: one after the other or some at a time, their words in logs, signals passed on."""

from __future__ import annotations

import os
import shlex
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

from openelm.errors import STOPPED, Stopped
from openelm.files import disk_errors_named

PROGRAM = (sys.executable, "-m", "openelm")
INTERRUPTED = 130
SIGNALS = ("SIGTERM", "SIGINT", "SIGHUP", "SIGUSR1")
SHOWN_LINES = 5  # of the log of what failed
LOOK_EVERY_S = 0.05


class Task(NamedTuple):
    """What follows `openelm`, and the log that its words go behind."""

    words: Sequence[str]
    log: Path


def say(line: str) -> None:
    """One line on standard error."""
    print(line, file=sys.stderr, flush=True)


def start_process(words: Sequence[str], log: Path, program: Sequence[str] = PROGRAM) -> int:
    """Run one command to its end, as start_processes does; its exit code."""
    return next(code for _, code in start_processes([Task(words, log)], program=program))


def start_processes(
    tasks: Iterable[Task],
    at_once: int = 1,
    *,
    environment: Mapping[str, str] | None = None,
    program: Sequence[str] = PROGRAM,
) -> Iterator[tuple[Task, int]]:
    """Run commands, at most so many at once; each with its exit code as it ends, over 128 where a signal killed it.

    ``environment`` is set beside what is set. A signal to this process is passed on to all, so that runs write their
    checkpoints. Raises Stopped, with the code of the first, where one came, or where a command itself was stopped;
    those that have begun have ended then.
    """
    came: list[int] = []
    running: list[tuple[Task, subprocess.Popen[bytes]]] = []
    left = iter(tasks)

    def pass_on(number: int, _: object) -> None:
        came.append(number)
        if os.name != "nt":  # on Windows, the console tells all
            for _, child in running:
                child.send_signal(number)

    stopped: tuple[Task, int] | None = None
    try:
        with _listening(pass_on):
            while True:
                while len(running) < at_once and not came and stopped is None:
                    if (task := next(left, None)) is None:
                        break
                    running.append((task, _begin(task, environment or {}, program)))
                    if came:  # before it was among them
                        running[-1][1].send_signal(came[0])
                if not running:
                    break
                for task, code in _ended(running):
                    if came or code in (STOPPED, INTERRUPTED):
                        stopped = stopped or (task, code)
                    else:
                        yield task, code
    finally:  # where nobody asks for the rest
        for _, child in running:
            child.terminate()
        for _, child in running:
            child.wait()
    if stopped is not None or came:  # a signal may come when none runs
        see, code = (f", see {stopped[0].log}", stopped[1]) if stopped else ("", STOPPED)
        why = f"{signal.Signals(came[0]).name}: " if came else ""
        raise Stopped(f"{why}stopped{see}: give the same command again to go on there", code or STOPPED)


def last_lines(log: Path, begin: int) -> str:
    """The end of what a command has said, from its beginning at a byte of the log; each line behind a line feed."""
    said = log.read_bytes()[begin:].decode("utf-8", "replace") if log.is_file() else ""
    lines = [line.rstrip() for line in said.splitlines() if line.strip()]
    return "".join(f"\n{line}" for line in lines[-SHOWN_LINES:])


def _begin(task: Task, environment: Mapping[str, str], program: Sequence[str]) -> subprocess.Popen[bytes]:
    with disk_errors_named(task.log), task.log.open("ab") as output:
        output.write(f"$ {shlex.join(['openelm', *task.words])}\n".encode())
        output.flush()
        # In a session of its own: Ctrl-C in a terminal would reach the child twice, once from here.
        return subprocess.Popen(
            [*program, *task.words],
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            start_new_session=True,
            env={**os.environ, **environment},
        )


def _ended(running: list[tuple[Task, subprocess.Popen[bytes]]]) -> list[tuple[Task, int]]:
    """Wait until some have ended; they are taken out."""
    while True:
        ended = [(task, child) for task, child in running if child.poll() is not None]
        if ended:
            running[:] = [pair for pair in running if pair not in ended]
            return [
                (task, 128 - child.returncode if child.returncode < 0 else child.returncode) for task, child in ended
            ]
        time.sleep(LOOK_EVERY_S)


def _exit_code(code: int) -> int:
    return 128 - code if code < 0 else code


@contextmanager
def _listening(handler: Callable[[int, object], None]) -> Iterator[None]:
    """Have signals handled, but those that this process was told to ignore (by nohup, say)."""
    if threading.current_thread() is not threading.main_thread():
        yield  # no other may listen
        return
    numbers = [getattr(signal, name) for name in SIGNALS if hasattr(signal, name)]
    before = {number: signal.getsignal(number) for number in numbers}
    heard = {number: old for number, old in before.items() if old is not signal.SIG_IGN}
    for number in heard:
        signal.signal(number, handler)
    try:
        yield
    finally:
        for number, old in heard.items():
            signal.signal(number, signal.SIG_DFL if old is None else old)
