"""An ablation: twins of a model trained on the same rows, at some sizes and from some seeds, and judged on one text.

First each kind finds its learning rate at the smallest size, as a factor of the recipe's; that factor goes with it to
the other sizes, whose own rates the recipe says. Then all are trained, each kind from the same seeds.
"""

from __future__ import annotations

import difflib
import json
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

from pydantic import Field, model_validator

from openelm.config import Int, RunConfig, Section, check_rows, resolve
from openelm.data.tokenizer import Tokenizer
from openelm.errors import UserError
from openelm.model.geometry import SIZES, ModelConfig
from openelm.model.twins import KINDS, WITHIN, difference, model_section, twin
from openelm.recipe import Layer, combine, read_layers

MAIN = "layer-wise"
# Of `data`: what decides which text is held out, and how much a run reads.
SAME_FOR_ALL = {"held_out", "validation_tokens", "row_length", "shards"}


class SizeSection(Section):
    """A size of the model: what it changes in the recipe, and the kinds that are trained at it (default: all)."""

    kinds: tuple[str, ...] | None = Field(default=None, min_length=1)
    model: dict[str, Any] = Field(default_factory=dict)
    train: dict[str, Any] = Field(default_factory=dict)


class AblationSection(Section):
    """What is compared; ``on_other_data`` names changes of ``data`` under which the layer-wise model is trained too."""

    sizes: dict[str, SizeSection] = Field(min_length=1)
    kinds: tuple[str, ...] = Field(default=tuple(KINDS), min_length=1)
    reference: str = "uniform"
    seeds: tuple[Int, ...] = Field(default=(0, 1, 2), min_length=1)
    tokens_per_parameter: float = Field(default=20.0, gt=0)
    within: float = Field(default=WITHIN, gt=0)
    lr_factors: tuple[float, ...] = Field(default=(0.5, 1.0, 2.0), min_length=1)
    tuning_seed: Int = Field(default=100, ge=0)
    tuning_share: float = Field(default=0.5, gt=0, le=1)
    on_other_data: dict[str, dict[str, Any]] = Field(default_factory=dict)

    @model_validator(mode="after")
    def _names_are_known(self) -> AblationSection:
        problems = []
        named = {"kinds": (self.kinds, tuple(KINDS)), "reference": ((self.reference,), self.kinds)}
        named |= {f"sizes.{name}.kinds": (size.kinds or (), self.kinds) for name, size in self.sizes.items()}
        for key, (kinds, known) in named.items():
            for kind in (kind for kind in kinds if kind not in known):
                near = difflib.get_close_matches(kind, known, n=1, cutoff=0.0)[0]
                problems.append(f"ablation.{key}: {kind!r} is not one of {', '.join(known)}: did you mean {near}?")
        factors = [f"{factor:g}" for factor in self.lr_factors]  # as in names of folders
        checked: dict[str, Sequence[Any]] = {"kinds": self.kinds, "seeds": self.seeds, "lr_factors": factors}
        for key, values in checked.items():
            if len(set(values)) < len(values):
                problems.append(f"ablation.{key}: {list(values)} names one twice: leave it out")
        for name in (*self.sizes, *self.on_other_data):
            if not re.fullmatch(r"\w[\w.-]*", name):
                problems.append(
                    f"ablation: {name!r} is to be part of a folder's name: use letters, digits, '.', '_', '-'"
                )
        for name, changes in self.on_other_data.items():
            if fixed := sorted(changes.keys() & SAME_FOR_ALL):
                problems.append(
                    f"ablation.on_other_data.{name}: {', '.join(fixed)} must be the same for all: change what is read, "
                    "how it is filtered or packed"
                )
        if any(not 0 < factor < math.inf for factor in self.lr_factors):
            problems.append(f"ablation.lr_factors: {list(self.lr_factors)} must be more than 0")
        if self.tuning_seed in self.seeds and len(self.lr_factors) > 1:
            problems.append(
                f"ablation.tuning_seed={self.tuning_seed} is among ablation.seeds: what is chosen by a seed must not "
                "be judged by it: take another"
            )
        if self.on_other_data and MAIN not in self.kinds:
            problems.append(f"ablation.on_other_data is trained as {MAIN}: add it to ablation.kinds")
        if problems:
            raise ValueError("; ".join(problems))
        return self


class _Form(Section):
    """The part of a recipe that only an ablation has."""

    name: str = Field(pattern=r"^\w[\w.-]*$")
    ablation: AblationSection


class Trial(NamedTuple):
    """One training run: a kind (with a name of ``on_other_data``, or none) of a size, from a seed."""

    size: str
    kind: str
    data: str
    seed: int
    factor: float  # of the size's learning rate
    share: float = 1.0  # of the size's steps

    @property
    def label(self) -> str:
        """The kind, and what it is trained on where that is other data."""
        return f"{self.kind}, {self.data}" if self.data else self.kind

    @property
    def name(self) -> str:
        """Of the run's folder."""
        tuned = "" if self.share == 1 and self.factor == 1 else f"-lr-x{self.factor:g}"
        kind = f"{self.kind}-{self.data}" if self.data else self.kind
        return f"{self.size}-{kind}-{self.seed}{tuned}"


@dataclass(frozen=True)
class Ablation:
    """What an ablation recipe asks for: its own section, and the recipe of each size."""

    recipe: str
    overrides: tuple[str, ...]
    name: str
    section: AblationSection
    bases: dict[str, RunConfig]
    vocab_size: int

    def model(self, size: str) -> ModelConfig:
        """The size's own model, to which twins are made."""
        return self.bases[size].model.build(vocab_size=self.vocab_size, bos_id=1, eos_id=2)

    @cached_property
    def smallest(self) -> str:
        """The size at which learning rates are found."""
        return min(self.bases, key=lambda size: self.model(size).num_parameters())

    @cached_property
    def twins(self) -> dict[tuple[str, str], ModelConfig]:
        """Of each size and kind that is trained; UserError where there is none within the bound."""
        wanted = [(size, kind) for size in self.bases for kind in self.kinds(size)]
        wanted += [(trial.size, trial.kind) for trial in self.tuning()]
        found = {}
        for size, kind in dict.fromkeys(wanted):
            model, length = self.model(size), self.row_length(size)
            try:
                found[size, kind] = twin(model, kind, row_length=length, within=self.section.within)
            except UserError as error:
                raise UserError(f"size {size}: {error}; ablation.within allows more") from error
        return found

    def kinds(self, size: str) -> tuple[str, ...]:
        """Those that are compared at a size."""
        own = self.section.sizes[size].kinds
        return self.section.kinds if own is None else own

    def row_length(self, size: str) -> int:
        """Tokens of a row."""
        return self.bases[size].data.row_length

    def steps(self, size: str) -> int:
        """As many as tokens_per_parameter asks for."""
        base = self.bases[size]
        tokens = self.section.tokens_per_parameter * self.model(size).num_parameters()
        return math.ceil(tokens / (base.train.global_batch * base.data.row_length))

    def tuning(self) -> list[Trial]:
        """The runs by which each kind finds its factor; none where one factor is all that is tried."""
        section, size = self.section, self.smallest
        if len(section.lr_factors) == 1:
            return []
        used = {kind for each in self.bases for kind in self.kinds(each)}
        return [
            Trial(size, kind, "", section.tuning_seed, factor, section.tuning_share)
            for factor in section.lr_factors
            for kind in section.kinds
            if kind in used
        ]

    def untuned(self) -> dict[str, float]:
        """The first factor for each kind: the one, where no other is tried."""
        return dict.fromkeys(self.section.kinds, self.section.lr_factors[0])

    def final(self, factors: dict[str, float]) -> list[Trial]:
        """The runs that are compared, of kinds whose factor is known.

        All kinds of a seed come before the next seed, so that what is cut off is still balanced.
        """
        return [
            Trial(size, kind, data, seed, factors[kind])
            for size in self.bases
            for seed in self.section.seeds
            for kind, data in self._labels(size)
            if kind in factors
        ]

    def _labels(self, size: str) -> list[tuple[str, str]]:
        others = self.section.on_other_data if self.section.sizes[size].kinds is None else {}
        return [*((kind, "") for kind in self.kinds(size)), *((MAIN, data) for data in others)]

    def config(self, trial: Trial, tokenizer: str | None) -> RunConfig:
        """The recipe of a run, whole; ``tokenizer`` is the path of the one that all share."""
        base, section = self.bases[trial.size], self.section
        data = json.loads(base.model_dump_json())
        model = self.twins[trial.size, trial.kind]
        own = {"vocab_size": self.vocab_size, "max_context_length": model.max_context_length}
        kept = ("rope_freq_constant", "share_input_output_layers")
        data["model"] = {**model_section(model), **own, **{name: getattr(model, name) for name in kept}}
        steps = max(1, round(self.steps(trial.size) * trial.share))
        train = data["train"]
        scaled = {key: train[key] * trial.factor for key in ("lr", "min_lr")}
        shortened = {key: round(train[key] * trial.share) for key in ("warmup_steps", "decay_steps")}
        data["train"] = {**train, **scaled, **shortened, "steps": steps}
        if trial.data:
            data["data"] = {**data["data"], **section.on_other_data[trial.data]}
        data |= {"name": trial.name, "seed": trial.seed}
        if tokenizer:
            data["tokenizer"] = {**data["tokenizer"], "path": tokenizer}
        return resolve(RunConfig, data, f"{self.recipe}, run {trial.name}")

    def check(self) -> None:
        """Make all twins and all configs, so that no run is the first to refuse one."""
        for trial in [*self.tuning(), *self.final(self.untuned())]:
            self.config(trial, None)

    def about(self, size: str, kind: str) -> dict[str, Any]:
        """What distinguishes a kind at a size, in figures."""
        model, length = self.twins[size, kind], self.row_length(size)
        off = difference(model, self.model(size), length)
        return {
            "about": KINDS[kind].about,
            "parameters": model.num_parameters(),
            "parameters_off": off.parameters,
            "flops_per_token": model.train_flops_per_token(length),
            "flops_off": off.flops,
            "cache_bytes_per_token": model.cache_bytes_per_token(),
            "num_query_heads": list(model.num_query_heads),
            "num_kv_heads": list(model.num_kv_heads),
            "ffn_dims": list(model.ffn_dims),
        }


def load_ablation(recipe: str, overrides: Sequence[str]) -> Ablation:
    """An ablation recipe, with overrides as of any recipe, as ``ablation.seeds=[0]``; UserError with what is wrong."""
    layers = read_layers(recipe)
    check_rows(RunConfig, layers)
    whole, _ = combine(layers, list(overrides))
    if not isinstance(whole.get("ablation"), dict):
        raise UserError(f"{recipe} has no section ablation: `openelm pretrain {recipe}` trains it")
    form = resolve(_Form, {"name": whole.get("name"), "ablation": whole["ablation"]}, recipe)
    own = [change for change in overrides if not change.startswith("ablation.")]
    bases = {}
    for name, size in form.ablation.sizes.items():
        row = Layer(Path(recipe), {"model": dict(size.model), "train": dict(size.train)}, {})
        named = [f"model.size={name}"] if name.removeprefix("OpenELM-") in SIZES and "size" not in size.model else []
        data, if_missing = combine([*layers, row], [*named, *own])
        data.pop("ablation", None)
        bases[name] = resolve(
            RunConfig, _with_steps(data, f"{recipe}, size {name}"), f"{recipe}, size {name}", if_missing
        )
    _check_train(recipe, bases, overrides)
    ablation = Ablation(recipe, tuple(overrides), form.name, form.ablation, bases, _vocab_size(recipe, bases))
    ablation.check()
    return ablation


def _with_steps(data: dict[str, Any], origin: str) -> dict[str, Any]:
    """A recipe with any number of steps, which follows from the tokens that are asked for."""
    train = data.get("train", {})
    if not isinstance(train, dict):
        raise UserError(f"{origin}: train={train!r} must hold keys, as train.lr")
    return {**data, "train": {**train, "steps": 10**9}}


def _check_train(recipe: str, bases: dict[str, RunConfig], overrides: Sequence[str]) -> None:
    if any(change.startswith("train.steps=") for change in overrides):
        raise UserError("train.steps follows from ablation.tokens_per_parameter, the same for all kinds: set that")
    if begun := {base.train.init_from for base in bases.values() if base.train.init_from}:
        raise UserError(
            f"{recipe}: train.init_from={begun.pop()}: kinds that begin from somebody's weights cannot be compared: "
            "leave it out"
        )


def _vocab_size(recipe: str, bases: dict[str, RunConfig]) -> int:
    """Of all sizes: the recipe's, its tokenizer's, or that of the tokenizer that will be trained."""
    found = {base.model.vocab_size or _tokens_of(base) for base in bases.values()}
    if len(found) > 1:
        raise UserError(f"{recipe}: the sizes have vocabularies of {sorted(found)}: let all have one tokenizer")
    return found.pop()


def _tokens_of(base: RunConfig) -> int:
    return Tokenizer.load(base.tokenizer.path).vocab_size if base.tokenizer.path else base.tokenizer.vocab_size
