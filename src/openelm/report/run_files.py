"""The files of a run folder, read leniently: an unfinished run, or a torn last line, still makes a page."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy
import yaml

from openelm.errors import UserError

OWN_SCORES = ("last", "exponential average", "averaged")  # of the summary's bits per byte, those of the run's own model
Record = dict[str, Any]


@dataclass(frozen=True)
class RunFiles:
    """What the files of a run folder say; a file that is absent or unreadable is empty here."""

    name: str
    config: Record
    config_text: str
    environment: Record
    summary: Record
    records: list[Record]
    account: Record  # of a tuning run: what became of the records of its examples

    def of_kind(self, kind: str) -> list[Record]:
        return [record for record in self.records if record["kind"] == kind]

    @property
    def tunes(self) -> bool:
        """Whether the run tunes a model that was there, and pre-trains none."""
        return "path" in section(self.config, "model")

    @property
    def answers(self) -> bool:
        """Whether the run's model answers its prompts, instead of going on with them."""
        sources = section(self.config, "data").get("sources")
        first = sources[0] if self.tunes and isinstance(sources, list) and sources else None
        return isinstance(first, dict) and first.get("format") not in (None, "text", "prompt")

    def held_out(self) -> dict[str, Record]:
        """A tuning run's scores on held-out examples, by model; before its end those of its newest validation."""
        found = {label: entry for label in OWN_SCORES if (entry := section(section(self.summary, "held_out"), label))}
        checks = self.of_kind("validation")
        return found or ({f"step {checks[-1]['step']:,}": checks[-1]} if checks else {})

    def scores(self) -> tuple[dict[str, float], dict[str, float]]:
        """Bits per byte of the summary: the model's own, and those it is compared with."""
        found = section(self.summary, "bits_per_byte")
        known = {label: value for label, value in found.items() if number(value) is not None}
        own = {label: known.pop(label) for label in OWN_SCORES if label in known}
        return own, known


def read_run(run: Path) -> RunFiles:
    """Read the files of a run folder, finished or not."""
    metrics = run / "metrics.jsonl"
    if not metrics.is_file() and not (run / "config.yaml").is_file():
        raise UserError(
            f"{run} is not a run folder: it holds neither config.yaml nor metrics.jsonl; "
            "give a folder that pretrain, finetune or dpo wrote"
        )
    config_text = _text(run / "config.yaml")
    try:
        config = yaml.safe_load(config_text)
    except yaml.YAMLError:
        config = None  # the page still shows the text as it is
    return RunFiles(
        name=run.resolve().name,
        config=config if isinstance(config, dict) else {},
        config_text=config_text,
        environment=_json_object(_text(run / "environment.json")),
        summary=_json_object(_text(run / "summary.json")),
        records=read_metrics(_text(metrics)),
        account=section(_json_object(_text(run / "data.json")), "account"),
    )


def read_metrics(text: str) -> list[Record]:
    """Parse the records of metrics.jsonl in order of step, each step once.

    A killed run leaves a torn line, which is skipped; where a resumed run counts its steps again,
    what it wrote replaces what was there.
    """
    records: dict[tuple[int, str, str], Record] = {}
    newest = -1
    for line in text.split("\n"):
        record = _json_object(line)
        step, kind = record.get("step"), record.get("kind")
        if not isinstance(step, int) or not isinstance(kind, str):
            continue
        if step < newest and kind != "guard":  # which is found out some steps later
            records = {key: old for key, old in records.items() if key[0] <= step}
        newest = max(step, newest) if kind == "guard" else step
        records[step, kind, str(record.get("prompt"))] = record
    return list(records.values())


def _text(path: Path) -> str:
    return path.read_bytes().decode("utf-8", "replace") if path.is_file() else ""


def _json_object(text: str) -> Record:
    try:
        value = json.loads(text)
    except ValueError:
        return {}
    return value if isinstance(value, dict) else {}


def section(record: Record, key: str) -> Record:
    value = record.get(key)
    return value if isinstance(value, dict) else {}


def number(value: object) -> float | None:
    """Return the value if it is a finite number."""
    if isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value):
        return value
    return None


def column(records: Iterable[Record], key: str) -> list[float]:
    """One value of each record, NaN where there is none."""
    return [math.nan if (value := number(record.get(key))) is None else value for record in records]


def finite(values: Iterable[float]) -> list[float]:
    return [value for value in values if math.isfinite(value)]


def tokens_at(files: RunFiles, records: list[Record]) -> list[float]:
    """Tokens seen at each record's step, between the logged steps by interpolation."""
    known = {0: 0.0}
    for record in files.of_kind("train"):
        if (tokens := number(record.get("tokens"))) is not None:
            known[record["step"]] = tokens
    steps = [record["step"] for record in records]
    return [float(tokens) for tokens in numpy.interp(steps, list(known), list(known.values()))]


def per_layer(model: Record, key: str) -> list[float]:
    """Values of each layer; a single number stands for all layers; empty where they are not known."""
    value, count = model.get(key), model.get("num_transformer_layers")
    if isinstance(value, int) and isinstance(count, int):
        value = [value] * count
    if not isinstance(value, list) or any(number(entry) is None for entry in value):
        return []
    return value
