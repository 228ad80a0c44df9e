"""The runs of an ablation: begun, gone on with, judged on one held-out text; and what is known of all of them."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import yaml

from openelm.config import RunConfig
from openelm.data.held_out import HeldOut
from openelm.data.row_hashes import row_hashes
from openelm.data.tokenizer import Tokenizer
from openelm.errors import UserError
from openelm.files import disk_errors_named, remove_folder, write_bytes, write_json
from openelm.model.folder import load_model
from openelm.report.run_files import read_run
from openelm.study.ablation import Ablation, Trial
from openelm.study.processes import Task, last_lines, say
from openelm.train import parts, probes
from openelm.train.parallel import World
from openelm.train.run_folder import NO_NUMBER, ROUNDING, as_plain, flat

SCORE = "score.json"
ROWS_HASHED = 1000
MARK = "ablation.json"  # a folder that has it may be deleted by --overwrite

Start = Callable[[Sequence[Task]], Iterator[tuple[Task, int]]]


@dataclass
class Runs:
    """The folder ``out`` of an ablation: a recipe, a log and a run folder for each trial, one tokenizer for all."""

    ablation: Ablation
    out: Path
    command: str = ""
    failures: dict[Trial, str] = field(default_factory=dict)

    def recipe(self, trial: Trial) -> Path:
        """The whole recipe of a run: `openelm pretrain` of it is that run again."""
        return self.out / "recipes" / f"{trial.name}.yaml"

    def folder(self, trial: Trial) -> Path:
        """Its run folder."""
        return self.out / trial.name

    def task(self, trial: Trial) -> Task:
        """What trains it, or goes on with that."""
        words = ("pretrain", str(self.recipe(trial)), "--run", str(self.folder(trial)), "--auto-resume", "--no-report")
        return Task(words, self.out / f"{trial.name}.log")

    def is_trained(self, trial: Trial) -> bool:
        """Whether it has come to its end."""
        return (self.folder(trial) / "summary.json").is_file()

    def has_diverged(self, trial: Trial) -> bool:
        """Whether it was ended by a loss that is not finite: the same command would come there again."""
        if self.is_trained(trial) or not (self.folder(trial) / "config.yaml").is_file():
            return False
        return any(event.get("action") == "stopped" for event in read_run(self.folder(trial)).of_kind("guard"))

    def failure(self, trial: Trial) -> str:
        """Why it has not come to its end, where that is known."""
        return self.failures.get(trial) or ("its loss was not finite" if self.has_diverged(trial) else "")

    # Before the runs

    def prepare(self, *, overwrite: bool = False) -> None:
        """Make the folder and its tokenizer, or go on with those that are there; UserError for another's folder."""
        with disk_errors_named(self.out):
            there = self.out.exists() and (self.out.is_file() or any(self.out.iterdir()))
        if there and not (self.out / MARK).is_file():
            raise UserError(f"{self.out} is there and is no ablation (it has no {MARK}): choose another --out FOLDER")
        if overwrite and there:
            for mine in (Path.cwd(), Path(self.ablation.recipe)):
                if mine.resolve().is_relative_to(self.out.resolve()):
                    raise UserError(f"{mine} is in {self.out}, which --overwrite deletes: choose another --out FOLDER")
            remove_folder(self.out)
        with disk_errors_named(self.out):
            (self.out / "recipes").mkdir(parents=True, exist_ok=True)
        write_json(self.out / MARK, {"name": self.ablation.name, "command": self.command})
        self._make_tokenizer()
        for trial in [*self.ablation.tuning(), *self.ablation.final(self.factors())]:
            if self.recipe(trial).is_file():
                self.write_recipe(trial)

    def _make_tokenizer(self) -> None:
        """Train the one that all share, once, or see that the recipe's is there and suits the vocabulary."""
        if self._base.tokenizer.path:
            found = Tokenizer.load(self._base.tokenizer.path)
        elif self._own_tokenizer.is_dir():
            return
        else:
            found = parts.load_tokenizer(self._base)
        if found.vocab_size > self.ablation.vocab_size or not (
            self._base.model.vocab_size or found.vocab_size == self.ablation.vocab_size
        ):
            raise UserError(
                f"the tokenizer has {found.vocab_size:,} tokens, and the models have {self.ablation.vocab_size:,}: set "
                "tokenizer.vocab_size, or model.vocab_size to more than it has"
            )
        if not self._base.tokenizer.path:
            found.save(self._own_tokenizer)

    @property
    def _own_tokenizer(self) -> Path:
        return self.out / "tokenizer"

    @cached_property
    def tokenizer_path(self) -> str:
        """Of the tokenizer that all runs share."""
        return self._base.tokenizer.path or str(self._own_tokenizer)

    def write_recipe(self, trial: Trial) -> None:
        """Write it down, or see that it is what it was; UserError where it says something else."""
        file, new = self.recipe(trial), as_plain(self.ablation.config(trial, self.tokenizer_path))
        if file.is_file():
            old, now = flat(read_mapping(file, yaml.safe_load)), flat(new)
            # Our own tokenizer may be called by another path; releases add keys.
            free = NO_NUMBER | ROUNDING | (set() if self._base.tokenizer.path else {"tokenizer.path"})
            differing = [
                f"{key} was {old[key]!r}, is {value!r}"
                for key, value in now.items()
                if key not in free and key in old and old[key] != value
            ]
            if differing:
                raise UserError(
                    f"{self.out} was begun with another recipe: in {trial.name}, {', '.join(differing)}: choose "
                    "another --out, or start anew with --overwrite, which deletes its runs"
                )
        write_bytes(file, yaml.safe_dump(new, sort_keys=False).encode("utf-8"))

    # The runs

    def left(self) -> list[Trial]:
        """What can be trained now: what is left of the search for rates, and of kinds that have found theirs."""
        trials = [*self.ablation.tuning(), *self.ablation.final(self.factors())]
        return [trial for trial in trials if not self.is_trained(trial) and not self.failure(trial)]

    def run(self, start: Start, noted: Callable[[], object], say: Callable[[str], None] = say) -> None:
        """Train all that is left and judge it; ``noted`` is called after each run.

        ``start`` runs commands; Stopped passes through. A run that fails does not keep the others from their turn.
        """
        while todo := self.left():
            tasks = {self.task(trial): trial for trial in todo}
            for trial in todo:
                self.write_recipe(trial)
            before = {task: task.log.stat().st_size if task.log.is_file() else 0 for task in tasks}
            say(f"{self.out}: {len(todo):,} runs are left{self.of_the_search(todo)}")
            begun_s = time.monotonic()
            for done, (task, code) in enumerate(start(list(tasks)), 1):
                trial = tasks[task]
                if code:
                    self.failures[trial] = f"training left with {code}{last_lines(task.log, before[task])}"
                told = self.failures.get(trial) or f"{self.score(trial)['bits_per_byte']:.4f} bits per byte"
                say(f"{done}/{len(tasks)} {trial.name}: {told} ({time.monotonic() - begun_s:,.0f} s)")
                noted()

    def of_the_search(self, trials: Sequence[Trial]) -> str:
        """What to say of runs after which others follow."""
        count = len(set(trials) & set(self.ablation.tuning()))
        return f", {count:,} of them of the search for learning rates, from which others follow" if count else ""

    def score(self, trial: Trial) -> dict[str, Any]:
        """Of a trained run: bits per byte of the text that all are judged on, and the hash of its own first rows."""
        file = self.folder(trial) / SCORE
        score: dict[str, Any] = read_mapping(file, json.loads) if file.is_file() else {}
        if score.get("text_sha256") != self._text_sha256:
            config = self.ablation.config(trial, self.tokenizer_path)
            model = load_model(self.folder(trial) / "model", dtype=None)
            with World() as world:
                found = probes.evaluate(model.to(world.device), self._held_out, world, config.train.micro_batch)
            rows = min(ROWS_HASHED, config.train.steps * config.train.global_batch)
            hashed = row_hashes(parts.token_stream(config, self._tokenizer), rows)["sha256"]
            score = {**found, "text_sha256": self._text_sha256, "rows_hashed": rows, "rows_sha256": hashed}
            write_json(file, score)
        return score

    @cached_property
    def _text_sha256(self) -> str:
        digest = hashlib.sha256()
        for row in self._held_out.rows:
            digest.update(row.astype("<i4").tobytes())
        return digest.hexdigest()

    @cached_property
    def _tokenizer(self) -> Tokenizer:
        return Tokenizer.load(self.tokenizer_path)

    @cached_property
    def _held_out(self) -> HeldOut:
        held_out = parts.held_out(self._base, self._tokenizer)
        if not held_out.rows:
            raise UserError(f"data.held_out={self._base.data.held_out:g} holds no document out: take a larger share")
        return held_out

    @property
    def _base(self) -> RunConfig:
        return self.ablation.bases[self.ablation.smallest]

    # Learning rates

    def found(self) -> dict[str, dict[float, float | None]]:
        """Bits per byte of each kind by the factor that was tried; None where it is not trained."""
        found: dict[str, dict[float, float | None]] = {}
        for trial in self.ablation.tuning():
            score = self.score(trial)["bits_per_byte"] if self.is_trained(trial) else None
            found.setdefault(trial.kind, {})[trial.factor] = score
        return found

    def factors(self) -> dict[str, float]:
        """The factor of each kind whose search has ended: that of the least bits per byte.

        A rate at which training diverges is none; a run that failed for another reason leaves its kind without one.
        """
        search = self.ablation.tuning()
        if not search:
            return self.ablation.untuned()
        undecided = {trial.kind for trial in search if not self.is_trained(trial) and not self.has_diverged(trial)}
        chosen = {}
        for kind, scores in self.found().items():
            known = {factor: score for factor, score in scores.items() if score is not None}
            if known and kind not in undecided:
                chosen[kind] = min(known, key=known.__getitem__)
        return chosen


def read_mapping(file: Path, parse: Callable[[str], Any]) -> dict[str, Any]:
    """A file of ours that holds a mapping; UserError where it does not."""
    try:
        found = parse(file.read_text(encoding="utf-8"))
    except (ValueError, yaml.YAMLError, OSError) as error:
        raise UserError(f"{file} cannot be read ({type(error).__name__}): delete it; it is made again") from error
    if not isinstance(found, dict):
        raise UserError(f"{file} holds no mapping: delete it; it is made again")
    return found
