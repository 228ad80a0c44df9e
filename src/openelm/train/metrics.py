"""What a run records: metrics.jsonl always, TensorBoard and W&B on request, and a line to watch."""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any

import torch

from openelm.errors import UserError
from openelm.files import disk_errors_named, whole_file, write_json
from openelm.train.guard import Event, as_entry

PRINT_EVERY_S = 10.0


class Recorder:
    """Writes the metrics of one run, and shows the progress on standard error; other ranks than 0 say nothing.

    What differs from run to run stands under ``timing``: all else is the same for the same recipe and seed.
    """

    def __init__(
        self,
        run: Path,
        *,
        steps: int,
        elapsed_s: float = 0.0,
        rank: int = 0,
        trackers: tuple[Callable[[dict[str, Any]], None], ...] = (),
    ) -> None:
        self._run, self._rank = run, rank
        self._path = run / "metrics.jsonl" if rank == 0 else Path(os.devnull)
        self._file = self._path.open("ab", buffering=0)  # each entry is written, or refused, at once
        self._steps, self._trackers = steps, trackers
        self._start_s = time.perf_counter() - elapsed_s
        self._first: tuple[float, int] | None = None
        self._printed_s = float("-inf")
        self._tty = sys.stderr.isatty()

    @property
    def elapsed_s(self) -> float:
        """Seconds of training so far, all resumes added up."""
        return time.perf_counter() - self._start_s

    def write(self, entry: dict[str, Any]) -> None:
        """One object of any kind."""
        line = json.dumps(entry, ensure_ascii=False).encode() + b"\n"
        with disk_errors_named(self._path):
            while line:  # a disk that is almost full takes a part
                line = line[self._file.write(line) :]
        for tracker in self._trackers:
            tracker(entry)
        if entry["kind"] == "validation":
            self.say(f"step {entry['step']}  held-out {_validation(entry)}")

    def train(self, entry: dict[str, Any], timing: dict[str, Any]) -> None:
        """The metrics of one step."""
        self.write({"kind": "train", **entry, "timing": {"elapsed_s": self.elapsed_s, **timing}})
        now_s = time.perf_counter()
        if self._first is None:
            self._first = (now_s - timing["step_s"], entry["step"] - 1)
        last = entry["step"] == self._steps
        if self._rank:
            return
        if last or now_s - self._printed_s >= (0.5 if self._tty else PRINT_EVERY_S):
            self._printed_s = now_s
            self._show(self._line(entry, timing, now_s), last=last)

    def event(self, event: Event) -> None:
        """A step out of the ordinary: an entry, and its rows in replay/, so that they can be looked at again."""
        (self._run / "replay").mkdir(exist_ok=True)
        file = self._run / "replay" / f"step_{event.step:08}-rank_{self._rank:05}.json"
        batches = [batch.as_plain() for batch in event.data.batches]
        write_json(file, {"step": event.step, "problem": event.problem, "rank": self._rank, "batches": batches})
        self.write({**as_entry(event), "replay": f"replay/step_{event.step:08}-rank_*.json"})
        self.say(f"step {event.step}: {event.problem} ({event.action}): loss {event.loss:.3f}, rows in {file}")

    def say(self, text: str) -> None:
        """A line that stays."""
        if self._rank == 0:
            self._print(("\r\x1b[K" if self._tty else "") + text)

    def close(self) -> None:
        """Close the file."""
        self._file.close()

    def __enter__(self) -> Recorder:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _line(self, entry: dict[str, Any], timing: dict[str, Any], now_s: float) -> str:
        assert self._first is not None
        rate = (now_s - self._first[0]) / max(1, entry["step"] - self._first[1])
        eta_s = rate * (self._steps - entry["step"])
        return (
            f"step {entry['step']}/{self._steps}  loss {entry['loss']:.3f}  lr {entry['lr']:.2e}  "
            f"grad {entry['grad_norm']:.2f}  {timing['tokens_per_s']:,.0f} tokens/s  MFU {timing['mfu']:.0%}  "
            f"data wait {timing['data_wait_s'] / timing['step_s']:.1%}  "
            f"{timing['memory_bytes'] / 2**30:.1f} GiB  ETA {int(eta_s // 60)}:{int(eta_s % 60):02}"
        )

    def _show(self, line: str, *, last: bool) -> None:
        if self._tty:
            self._print("\r\x1b[K" + line, end="\n" if last else "")
        else:
            self._print(line)

    @staticmethod
    def _print(text: str, end: str = "\n") -> None:
        with suppress(OSError):  # who reads it may be gone; the run goes on
            print(text, end=end, file=sys.stderr, flush=True)


def _validation(entry: dict[str, Any]) -> str:
    if "bits_per_byte" in entry:
        return f"text: {entry['bits_per_byte']:.3f} bits per byte"
    accuracy = f", accuracy {entry['accuracy']:.3f}" if "accuracy" in entry else ""
    return f"examples: loss {entry['loss']:.3f}{accuracy}"


def cut_back(metrics: Path, step: int) -> float:
    """Drop what was recorded after ``step`` (and a torn last line); the seconds of training up to there."""
    if not metrics.is_file():
        return 0.0
    kept: list[bytes] = []
    elapsed_s = 0.0
    # As bytes: a torn line may end within a character, and a sample may hold what str takes for a line's end.
    for line in metrics.read_bytes().split(b"\n"):
        try:
            entry = json.loads(line)
        except ValueError:
            continue
        if entry["step"] <= step:
            kept.append(line + b"\n")
            elapsed_s = entry.get("timing", {}).get("elapsed_s", elapsed_s)
    with whole_file(metrics) as draft:
        draft.write_bytes(b"".join(kept))
    return elapsed_s


def trackers(run: Path, *, tensorboard: bool, wandb: str | None) -> tuple[Callable[[dict[str, Any]], None], ...]:
    """Functions that pass each entry's numbers on, as the recipe asks. UserError names a missing package."""
    found: list[Callable[[dict[str, Any]], None]] = []
    if tensorboard:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as error:
            raise UserError("train.tensorboard needs it installed: pip install 'openelm-framework[plot]'") from error
        writer = SummaryWriter(str(run / "tensorboard"))

        def to_tensorboard(entry: dict[str, Any]) -> None:
            for name, value in _numbers(entry).items():
                writer.add_scalar(name, value, entry["step"])

        found.append(to_tensorboard)
    if wandb:
        try:
            import wandb as client
        except ImportError as error:
            raise UserError("train.wandb needs it installed: pip install 'openelm-framework[track]'") from error
        session = client.init(project=wandb, name=run.name, dir=str(run), resume="allow", id=run.name)
        found.append(lambda entry: session.log(_numbers(entry), step=entry["step"]))
    return tuple(found)


def _numbers(entry: dict[str, Any]) -> dict[str, float]:
    """All numbers of an entry under names like train/loss."""
    flat = {**entry, **entry.get("timing", {})}
    return {f"{entry['kind']}/{k}": v for k, v in flat.items() if isinstance(v, int | float) and k != "step"}


def peak_memory_bytes() -> int:
    """The most memory that the process has had: the device's, where there is one, else resident."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    try:
        import resource
    except ImportError:  # Windows
        return 0
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def gemm_flops_per_s(dtype: torch.dtype, device: torch.device, *, size: int = 2048, repeats: int = 3) -> float:
    """The best rate of a square matrix product: the roof that MFU is measured against."""
    best = 0.0
    generator = torch.Generator(device).manual_seed(0)  # the run's own random numbers are not to be touched
    # Some CPUs emulate bf16 hundreds of times slower: begin small, and grow only while it is quick.
    for side in (256, size):
        a, b = (torch.randn(side, side, device=device, generator=generator).to(dtype) for _ in range(2))
        for _ in range(repeats):
            start_s = time.perf_counter()
            a @ b
            if device.type == "cuda":
                torch.cuda.synchronize()
            rate = 2 * side**3 / (time.perf_counter() - start_s)
            best = max(best, rate)
        if best < 2 * size**3 / 2.0:
            break
    return best
