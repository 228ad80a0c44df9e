"""The runs of an ablation: begun, gone on with, judged on one held-out text; and what is known of all of them."""

from __future__ import annotations

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
from openelm.files import remove_folder, write_bytes, write_json
from openelm.model.folder import load_model
from openelm.study.ablation import Ablation, Trial
from openelm.study.processes import Task, last_lines, say
from openelm.train import parts, probes
from openelm.train.parallel import World
from openelm.train.run_folder import NO_NUMBER, as_plain, flat

SCORE = "score.json"
ROWS_HASHED = 1000

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

    # Before the runs

    def prepare(self, *, overwrite: bool = False) -> None:
        """Make the folder and its tokenizer, or go on with those that are there; UserError for another's folder."""
        if (
            self.out.exists()
            and not (self.out / "recipes").is_dir()
            and (self.out.is_file() or any(self.out.iterdir()))
        ):
            raise UserError(f"{self.out} is there and is no ablation (it has no recipes): choose another --out FOLDER")
        if overwrite:
            remove_folder(self.out)
        (self.out / "recipes").mkdir(parents=True, exist_ok=True)
        base = self.ablation.bases[self.ablation.smallest]
        if not base.tokenizer.path and not self._own_tokenizer.is_dir():
            found = parts.load_tokenizer(base)
            if found.vocab_size != self.ablation.vocab_size:
                raise UserError(
                    f"the text gives a vocabulary of {found.vocab_size:,}, not tokenizer.vocab_size="
                    f"{self.ablation.vocab_size:,}: ask for as many"
                )
            found.save(self._own_tokenizer)
        for trial in [*self.ablation.tuning(), *self.ablation.final(self.factors())]:
            if self.recipe(trial).is_file():
                self.write_recipe(trial)

    @property
    def _own_tokenizer(self) -> Path:
        return self.out / "tokenizer"

    @cached_property
    def tokenizer_path(self) -> str:
        """Of the tokenizer that all runs share."""
        return self.ablation.bases[self.ablation.smallest].tokenizer.path or str(self._own_tokenizer)

    def write_recipe(self, trial: Trial) -> None:
        """Write it down, or see that it is what it was; UserError where it says something else."""
        file, new = self.recipe(trial), as_plain(self.ablation.config(trial, self.tokenizer_path))
        if file.is_file():
            old = flat(yaml.safe_load(file.read_text(encoding="utf-8")))
            differing = [
                f"{key} was {old.get(key)!r}, is {value!r}"
                for key, value in flat(new).items()
                if key not in NO_NUMBER and old.get(key) != value
            ]
            if differing:
                raise UserError(
                    f"{self.out} was begun with another recipe: in {trial.name}, {', '.join(differing)}: choose "
                    "another --out, or start anew with --overwrite, which deletes its runs"
                )
        write_bytes(file, yaml.safe_dump(new, sort_keys=False).encode("utf-8"))

    # The runs

    def left(self) -> list[Trial]:
        """What can be trained now and is not: the search for learning rates, then what is compared."""
        for trials in (self.ablation.tuning(), self.ablation.final(self.factors())):
            if left := [trial for trial in trials if not self.is_trained(trial) and trial not in self.failures]:
                return left
        return []

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
        searches = trials and trials[0] in self.ablation.tuning()
        return " of the search for learning rates, from which the others follow" if searches else ""

    def score(self, trial: Trial) -> dict[str, Any]:
        """Of a trained run: bits per byte of the text that all are judged on, and the hash of its own first rows."""
        file = self.folder(trial) / SCORE
        if not file.is_file():
            config = self.ablation.config(trial, self.tokenizer_path)
            model = load_model(self.folder(trial) / "model", dtype=None)
            with World() as world:
                found = probes.evaluate(model.to(world.device), self._held_out, world, config.train.micro_batch)
            rows = min(ROWS_HASHED, config.train.steps * config.train.global_batch)
            hashed = row_hashes(parts.token_stream(config, self._tokenizer), rows)["sha256"]
            write_json(file, {**found, "rows_hashed": rows, "rows_sha256": hashed})
        score: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
        return score

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
        """The factor of each kind whose search has ended: that of the least bits per byte."""
        search = self.ablation.tuning()
        if not search:
            return self.ablation.untuned()
        open_ = {trial.kind for trial in search if not self.is_trained(trial) and trial not in self.failures}
        chosen = {}
        for kind, scores in self.found().items():
            known = {factor: score for factor, score in scores.items() if score is not None}
            if known and kind not in open_:
                chosen[kind] = min(known, key=known.__getitem__)
        return chosen
