"""Recipes of fine-tuning and preference tuning: the same strictness, the same training section, other data."""

from __future__ import annotations

import math
from typing import Literal

from pydantic import Field, model_validator

from openelm.config import Int, Section, TrainSection, load, resolve


class BaseSection(Section):
    """The model that is tuned: a model folder, run, checkpoint, Hub id or CoreNet file. ``size`` only picks a row."""

    path: str
    size: str | None = None


class TokenizerPathSection(Section):
    """The tokenizer that the model was trained with, where it has none beside it."""

    path: str | None = None


class ExamplesSection(Section):
    """One source of examples, and the columns (or keys) that hold them."""

    name: str
    path: str
    format: Literal["chat", "prompt", "text", "commonsense", "preference"]
    prompt_key: str = "prompt"
    answer_key: str = "answer"
    text_key: str = "text"
    messages_key: str = "messages"
    chosen_key: str = "chosen"
    rejected_key: str = "rejected"


class TuneDataSection(Section):
    """From records to rows. Lengths are in tokens."""

    sources: tuple[ExamplesSection, ...] = Field(min_length=1)
    row_length: Int = Field(default=2048, ge=2)
    prompt_length: Int | None = Field(default=None, ge=1)
    long_prompts: Literal["keep_end", "drop"] = "keep_end"
    packing: Literal["pad", "pack"] = "pad"
    loss_on: Literal["answers", "all"] = "answers"
    empty_system_turn: bool = False
    held_out: float = Field(default=0.01, ge=0, lt=1)
    validation_examples: Int = Field(default=500, ge=0)


class AdapterSection(Section):
    """A few added matrices that are trained instead of the model's own weights."""

    kind: Literal["lora", "dora", "rslora"] = "lora"
    r: Int = Field(default=32, ge=1)
    alpha: float = Field(default=32, gt=0)
    dropout: float = Field(default=0.0, ge=0, lt=1)
    targets: tuple[str, ...] = ("qkv_proj", "out_proj")


class PreferenceSection(Section):
    """The loss of a pair of answers."""

    loss: Literal["sigmoid", "hinge", "ipo"] = "sigmoid"
    beta: float = Field(default=0.1, gt=0)
    label_smoothing: float = Field(default=0.0, ge=0, lt=0.5)

    @model_validator(mode="after")
    def _smooths_what_can_be(self) -> PreferenceSection:
        if self.label_smoothing and self.loss != "sigmoid":
            raise ValueError(
                f"preference.label_smoothing={self.label_smoothing:g} belongs to preference.loss=sigmoid, not to "
                f"{self.loss}: leave it out"
            )
        return self


class TuneTrainSection(TrainSection):
    """As in pre-training, but a length in epochs may be given, and what tuning does not need is off."""

    steps: Int = Field(default=0, ge=0)
    epochs: float | None = Field(default=None, gt=0)
    min_lr: float = Field(default=0.0, ge=0)
    warmup_ratio: float | None = Field(default=None, ge=0, lt=1)
    warmup_init_lr: float = Field(default=0.0, ge=0)
    betas: tuple[float, float] = (0.9, 0.999)
    weight_decay: float = Field(default=0.0, ge=0)
    z_loss: float = Field(default=0.0, ge=0)
    average_last: Int = Field(default=0, ge=0)
    keep_last: Int = Field(default=2, ge=1)

    @model_validator(mode="after")
    def _has_one_length(self) -> TuneTrainSection:
        problems = []
        if bool(self.steps) == (self.epochs is not None):
            given = f"train.steps={self.steps} and train.epochs={self.epochs:g}" if self.steps else "neither"
            problems.append(f"the length of a run is train.steps or train.epochs, not {given}: give one of them")
        if self.warmup_steps and self.warmup_ratio is not None:
            problems.append("give train.warmup_steps or train.warmup_ratio, not both")
        if self.init_from or self.init_optimizer:
            problems.append("train.init_from: a tuned model begins from model.path: leave train.init_* out")
        if problems:
            raise ValueError("; ".join(problems))
        return self


class TuneConfig(Section):
    """Everything that decides what a tuning run computes; with ``preference`` its examples are pairs."""

    name: str = Field(pattern=r"^\w[\w.-]*$")  # a folder is called so
    seed: Int = Field(default=0, ge=0, lt=2**40)
    model: BaseSection
    tokenizer: TokenizerPathSection = TokenizerPathSection()
    data: TuneDataSection
    adapter: AdapterSection | None = None
    preference: PreferenceSection | None = None
    train: TuneTrainSection

    @model_validator(mode="after")
    def _sources_are_of_one_kind(self) -> TuneConfig:
        problems = []
        names = [source.name for source in self.data.sources]
        if len(set(names)) < len(names):
            problems.append(f"data.sources: names must differ, not {names}")
        pairs = {source.format == "preference" for source in self.data.sources}
        if pairs != {self.preference is not None}:
            problems.append(
                "data.sources: preference tuning (a section preference, `openelm dpo`) reads sources of format: "
                "preference and no others, fine-tuning none of them: change the formats, or the section"
            )
        if self.preference and (self.data.packing != "pad" or self.data.loss_on != "answers"):
            problems.append("pairs are padded, and their answers count: leave out data.packing and data.loss_on")
        if self.preference and self.train.z_loss:
            problems.append(f"train.z_loss={self.train.z_loss:g} has no place in a loss of pairs: leave it out")
        if self.data.prompt_length and self.data.prompt_length >= self.data.row_length:
            problems.append(
                f"data.prompt_length={self.data.prompt_length} must be less than data.row_length="
                f"{self.data.row_length}, to leave room for answers: lower it"
            )
        if problems:
            raise ValueError("; ".join(problems))
        return self

    def with_steps(self, rows_in: float) -> TuneConfig:
        """The config with its length in steps, where it is in epochs that hold ``rows_in`` rows.

        UserError: the rest of the recipe does not suit that length.
        """
        train = self.train
        steps = train.steps or max(1, math.ceil(rows_in / train.global_batch))
        warmup = train.warmup_steps
        if train.warmup_ratio is not None:
            # Seven hundredths of 100 steps are 7, and in floating point a little more; the shortest run has none.
            warmup = min(math.ceil(round(train.warmup_ratio * steps, 6)), steps - 1)
        changed = {"steps": steps, "warmup_steps": warmup, "epochs": None, "warmup_ratio": None}
        data = self.model_dump()
        origin = self.name if train.epochs is None else f"{self.name}: train.epochs={train.epochs:g} are {steps} steps"
        return resolve(TuneConfig, {**data, "train": {**data["train"], **changed}}, origin)


def load_tuning(recipe: str, overrides: list[str]) -> TuneConfig:
    """A packaged tuning recipe by name, or a YAML file by path, with ``a.b=value`` overrides."""
    return load(TuneConfig, recipe, overrides)
