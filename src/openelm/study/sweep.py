"""A grid of runs: each point trained and evaluated by commands of its own, and gone on with wherever it stopped."""

from __future__ import annotations

import hashlib
import itertools
import json
import re
import shlex
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from openelm.errors import UserError
from openelm.files import remove_folder, write_bytes, write_json
from openelm.recipe import Layer, combine, read_layers
from openelm.study.processes import last_lines, say, start_process
from openelm.study.ranking import Aim, Outcome, Point, Ranking, read

# Appendix B of the paper.
PAPER_GRID = {"train.lr": (2e-5, 3e-5, 5e-5, 8e-5, 1e-4), "train.epochs": (3, 5, 8, 10)}
LONGEST_NAME = 80  # of a point: others put more behind it in names of files

Grid = Mapping[str, tuple[Any, ...]]
Start = Callable[[Sequence[str], Path], int]  # what follows `openelm`, and the log -> exit code


@dataclass(frozen=True)
class Sweep:
    """What is tried, and by what it is judged. The folder ``out`` remembers it."""

    trainer: str  # the command that trains
    recipe: str
    overrides: tuple[str, ...]
    grid: Grid
    out: Path
    aim: Aim
    measuring: tuple[str, ...]  # the options of `openelm evaluate` that ask for the aim

    def points(self) -> list[Point]:
        """All places in the grid; the last key changes fastest."""
        return [self._point(values) for values in combinations(self.grid)]

    def training(self, point: Point) -> list[str]:
        """What follows `openelm` to train a point, or to go on with it."""
        return [*point.training, "--run", str(point.run), "--auto-resume"]

    def evaluation(self, point: Point) -> list[str]:
        """What follows `openelm` to measure a point, or to go on with that."""
        return ["evaluate", str(point.run / "model"), *self.measuring, "--out", str(point.evaluations)]

    def commands(self, point: Point) -> str:
        """Both in one line of a shell: a job of a cluster."""
        return " && ".join(shlex.join(["openelm", *words]) for words in (self.training(point), self.evaluation(point)))

    def _point(self, values: dict[str, Any]) -> Point:
        name = ",".join(settings(values))
        safe = re.sub(r"[^\w.=,+-]", "-", name)[:LONGEST_NAME]
        if safe != name:
            safe += f"-{hashlib.sha256(name.encode()).hexdigest()[:8]}"  # others may look the same
        return Point(safe, self.out / safe, values, (self.trainer, self.recipe, *self.overrides, *settings(values)))


# The grid


def parse_grid(words: Sequence[str]) -> Grid:
    """``["train.lr=2e-5,3e-5", "train.epochs=3,5"]`` as keys and values, which are read as a recipe's are.

    What stands there twice counts once. UserError: no KEY=VALUES, no values, a key twice.
    """
    grid: dict[str, tuple[Any, ...]] = {}
    for word in words:
        key, _, values = word.partition("=")
        if not re.fullmatch(r"\w+(\.\w+)*", key) or not values.strip(" ,"):
            raise UserError(f"--grid {word!r} must name a key and its values, as in train.lr=2e-5,3e-5")
        if key in grid:
            raise UserError(f"--grid {key} stands there twice: put all of its values into one")
        try:
            found = _parse(f"[{values}]")
        except UserError as error:
            raise UserError(f"--grid {word!r}: the values cannot be read: write them as in {key}=1,2") from error
        grid[key] = tuple({text(value): value for value in found}.values())
    return grid


def combinations(grid: Grid) -> list[dict[str, Any]]:
    """Each choice of one value a key."""
    return [dict(zip(grid, values, strict=True)) for values in itertools.product(*grid.values())]


def settings(values: Mapping[str, Any]) -> list[str]:
    """Values as the overrides of a recipe."""
    return [f"{key}={text(value)}" for key, value in values.items()]


def text(value: Any) -> str:
    """A value as an override has it; the same for the same value, however it was written."""
    if isinstance(value, str):
        with suppress(UserError):
            if _parse(value) == value:
                return value
    return json.dumps(value, ensure_ascii=False, default=str)


def _parse(written: str) -> Any:
    """A value as recipes and overrides are read, where 3e-4 is a number."""
    return combine([Layer(Path(), {}, {})], [f"value={written}"])[0]["value"]


# The recipe


def trainer_of(recipe: str, overrides: Sequence[str]) -> str:
    """The command that a recipe is for: preferences, a model to begin with, or neither."""
    sections, _ = combine(read_layers(recipe), list(overrides))
    model = sections.get("model")
    if sections.get("preference") is not None:
        return "dpo"
    return "finetune" if isinstance(model, dict) and "path" in model else "pretrain"


def load(trainer: str, recipe: str, overrides: Sequence[str]) -> Any:
    """The config that the command would make of these; its UserError."""
    if trainer == "pretrain":
        from openelm.config import load_recipe

        return load_recipe(recipe, list(overrides))
    from openelm.tuning_config import load_tuning

    config = load_tuning(recipe, list(overrides))
    if (config.preference is not None) != (trainer == "dpo"):
        other = "dpo" if config.preference else "finetune"
        raise UserError(f"{recipe}: a section preference is dpo's, and finetune has none: use --with {other}")
    return config


def check(trainer: str, recipe: str, overrides: Sequence[str], grid: Grid) -> Any:
    """Make the config of each point, so that no run is the first to refuse one; that of the first point is returned."""
    for key in grid:
        if any(override.startswith(f"{key}=") for override in overrides):
            raise UserError(f"{key} is in the grid (--grid, or the paper's) and among the overrides: leave one out")
    configs = []
    for values in combinations(grid):
        try:
            configs.append(load(trainer, recipe, [*overrides, *settings(values)]))
        except UserError as error:
            raise UserError(f"with {' '.join(settings(values))}: {error}") from error
    return configs[0]


# The folder


def begin(sweep: Sweep, *, overwrite: bool = False) -> Sweep:
    """Make the folder of a sweep, or go on with it where all but a larger grid is as it was; UserError otherwise.

    The keys of the sweep that is returned are in the folder's order, as in the names of its runs.
    """
    file = sweep.out / "sweep.json"
    if sweep.out.exists() and not (sweep.out.is_dir() and (file.is_file() or not any(sweep.out.iterdir()))):
        raise UserError(f"{sweep.out} is there and is no sweep (it has no sweep.json): choose another --out FOLDER")
    if file.is_file() and overwrite:
        remove_folder(sweep.out)
    first, known = combinations(sweep.grid)[0], {"trainer": sweep.trainer, **sweep.aim.as_plain()}
    config_before = None
    if file.is_file():
        try:
            before = json.loads(file.read_text(encoding="utf-8"))
            _refuse_another(sweep.out, {name: before[name] for name in known}, known)
            sweep = replace(sweep, grid=_grown(before["grid"], sweep))
            first, config_before = {key: before["first"][key] for key in sweep.grid}, dict(before["config"])
        except (OSError, KeyError, TypeError, AttributeError, json.JSONDecodeError, UnicodeDecodeError) as error:
            raise UserError(f"{file} is damaged ({error!r}): put it back, or start anew with --overwrite") from error
    # Of the same point each time: what a recipe says may depend on a value of the grid, as on model.size.
    config = _as_plain(load(sweep.trainer, sweep.recipe, [*sweep.overrides, *settings(first)]))
    if config_before is not None:
        _refuse_another(sweep.out, config_before, config)
    said = {"recipe": sweep.recipe, "overrides": sweep.overrides, "grid": sweep.grid}
    write_json(file, {**said, **known, "first": first, "config": config})
    return sweep


def _as_plain(config: Any) -> dict[str, Any]:
    """A config by dotted keys. Defaults are left out, since releases add some, and so is what changes no number."""
    from openelm.train.run_folder import NO_NUMBER

    def flat(data: Any, key: str) -> Iterator[tuple[str, Any]]:
        if isinstance(data, dict):
            for name, inner in data.items():
                yield from flat(inner, f"{key}.{name}" if key else name)
        elif key not in NO_NUMBER:
            yield key, data

    return dict(flat(json.loads(config.model_dump_json(exclude_defaults=True)), ""))


def _grown(before: Mapping[str, Sequence[Any]], sweep: Sweep) -> Grid:
    """The sweep's grid in the order of the one before, which it must contain."""
    if before.keys() != sweep.grid.keys():
        raise UserError(
            f"{sweep.out} has a grid over {', '.join(before)}, not {', '.join(sweep.grid)}: choose another --out, or "
            "start anew with --overwrite, which deletes its runs"
        )
    for key, values in before.items():
        if lost := {text(value) for value in values} - {text(value) for value in sweep.grid[key]}:
            raise UserError(
                f"{sweep.out} has {key}={','.join(map(text, values))}: its grid may grow, and this one lacks "
                f"{', '.join(sorted(lost))}: name all, or choose another --out"
            )
    return {key: sweep.grid[key] for key in before}


def _refuse_another(out: Path, old: Mapping[str, Any], new: Mapping[str, Any]) -> None:
    differing = [
        f"{key} was {old.get(key)!r}, is {new.get(key)!r}"
        for key in sorted(old.keys() | new.keys())
        if old.get(key) != new.get(key)
    ]
    if differing:
        raise UserError(
            f"{out} was begun as another sweep: {', '.join(differing)}: give the same again, choose another --out, or "
            "start anew with --overwrite, which deletes its runs"
        )


# The runs


def gather(sweep: Sweep) -> list[Outcome]:
    """What is done by now, written down as results.json and table.md."""
    outcomes = [read(point, sweep.aim) for point in sweep.points()]
    _write(sweep, outcomes)
    return outcomes


def run(sweep: Sweep, start: Start | None = None, say: Callable[[str], None] = say) -> list[Outcome]:
    """Train and measure the points that are not done; what came of all. The results are written after each of them.

    ``start`` runs a command; Stopped passes through. A point that fails does not keep the others from their turn.
    """
    outcomes = gather(sweep)
    done = sum(one.average is not None for one in outcomes)
    say(f"{sweep.out}: {len(outcomes):,} points, {done:,} of them done")
    for number, one in enumerate(outcomes):
        if one.average is not None:
            continue
        place = f"{number + 1}/{len(outcomes)} {one.point.name}"
        say(f"{place}: begins, log in {one.point.log}")
        begun_s = time.monotonic()
        outcomes[number] = now = _bring_about(sweep, one, start or start_process)
        told = now.failure.replace("\n", "\n  ") or f"average {now.average}"
        say(f"{place}: {told} ({time.monotonic() - begun_s:.0f} s)")
        _write(sweep, outcomes)
    return outcomes


def _bring_about(sweep: Sweep, outcome: Outcome, start: Start) -> Outcome:
    point = outcome.point
    steps = [] if outcome.summary else [("training", sweep.training(point))]
    for what, words in [*steps, ("evaluation", sweep.evaluation(point))]:
        before = point.log.stat().st_size if point.log.is_file() else 0
        if code := start(words, point.log):
            return replace(read(point, sweep.aim), failure=f"{what} left with {code}{last_lines(point.log, before)}")
    done = read(point, sweep.aim)
    if done.average is None:
        missing = ", ".join(title for title in sweep.aim.columns if title not in done.scores)
        return replace(done, failure=f"evaluation gave no figure for {missing}; see {point.log}")
    return done


def _write(sweep: Sweep, outcomes: Sequence[Outcome]) -> None:
    ranking = Ranking(outcomes, sweep.aim)
    write_json(sweep.out / "results.json", ranking.as_plain())
    write_bytes(sweep.out / "table.md", ranking.table().encode("utf-8"))
