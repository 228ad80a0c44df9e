"""Recipe (YAML) and dotted overrides -> one frozen config of a run, with every problem reported at once.

A pre-training run is a RunConfig; the recipes of fine-tuning and preference tuning are in tuning_config.py.
"""

from __future__ import annotations

import copy
import difflib
from itertools import pairwise
from typing import Annotated, Any, Literal, TypeVar, get_args

from pydantic import BaseModel, ConfigDict, Field, Strict, ValidationError, model_validator

from openelm.errors import UserError
from openelm.model.geometry import SIZES, ModelConfig
from openelm.recipe import Layer, combine, read_layers
from openelm.recipe import recipe_names as recipe_names

# A whole number, and nothing that only passes for one (true, "3").
Int = Annotated[int, Strict()]
C = TypeVar("C", bound="Section")


class Section(BaseModel):
    """Part of a recipe: frozen, and strict about what it holds."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False, protected_namespaces=())


class ModelSection(Section):
    """A named size, any of its fields changed; or the fields of a new one."""

    size: str | None = None
    model_dim: Int | None = None
    num_transformer_layers: Int | None = None
    head_dim: Int | None = None
    num_gqa_groups: Int | None = None
    qkv_multipliers: float | tuple[float, ...] | None = None
    ffn_multipliers: float | tuple[float, ...] | None = None
    ffn_dim_divisor: Int | None = None
    vocab_size: Int | None = None
    max_context_length: Int | None = None
    rope_freq_constant: float | None = None
    normalize_qk_projections: bool | None = None
    normalization_layer_name: Literal["rms_norm", "layer_norm"] | None = None
    share_input_output_layers: bool | None = None

    def build(self, *, vocab_size: int, bos_id: int, eos_id: int) -> ModelConfig:
        """The geometry; the vocabulary is the tokenizer's unless the recipe names another."""
        given = {name: value for name, value in self.model_dump(exclude={"size"}).items() if value is not None}
        given = {"vocab_size": vocab_size, "bos_token_id": bos_id, "eos_token_id": eos_id, **given}
        if self.size:
            return ModelConfig.from_name(self.size, **given)
        return ModelConfig(**given)

    @model_validator(mode="after")
    def _has_a_size(self) -> ModelSection:
        if not self.size and not (self.model_dim and self.num_transformer_layers):
            raise ValueError("give model.size, or model.model_dim and model.num_transformer_layers")
        self.build(vocab_size=1, bos_id=1, eos_id=2)  # says what is wrong with the geometry itself
        return self


class TokenizerSection(Section):
    """A tokenizer that exists, or the size of one to be trained on the recipe's own text."""

    path: str | None = None
    vocab_size: Int = Field(default=4096, ge=260)
    train_bytes: Int = Field(default=8_000_000, ge=1000)


class SourceSection(Section):
    """One source of text; `share` is its part of the mixture, in valid tokens."""

    name: str
    path: str
    share: float = Field(default=1.0, ge=0)
    text_key: str = "text"
    on_corrupt: Literal["stop", "skip"] = "stop"
    on_invalid_utf8: Literal["repair", "skip"] = "repair"


class DataSection(Section):
    """From text to rows; the filters' defaults are the paper's."""

    sources: tuple[SourceSection, ...] = Field(min_length=1)
    row_length: Int = Field(default=2048, ge=2)
    packing: Literal["pack", "pad"] = "pack"
    cross_pieces: bool = False
    separate_pieces: bool = False
    min_characters: Int = Field(default=200, ge=0)
    min_tokens: Int = Field(default=256, ge=0)
    split_words: Int = Field(default=2048, ge=1)
    repair_text: bool = True
    shards: Int = Field(default=64, ge=1)
    workers: Int = Field(default=0, ge=0)
    held_out: float = Field(default=0.005, ge=0, lt=1)
    validation_tokens: Int = Field(default=100_000, ge=0)

    @model_validator(mode="after")
    def _sources_are_sound(self) -> DataSection:
        names = [source.name for source in self.sources]
        if len(set(names)) < len(names):
            raise ValueError(f"data.sources: names must differ, not {names}")
        if not any(source.share for source in self.sources):
            raise ValueError("data.sources: all shares are zero: at least one must be more")
        return self


class TrainSection(Section):
    """Optimisation, schedule, and when what is written; the optimizer's defaults are the paper's."""

    steps: Int = Field(ge=1)
    global_batch: Int = Field(ge=1)
    micro_batch: Int = Field(ge=1)
    lr: float = Field(gt=0)
    min_lr: float = Field(ge=0)
    warmup_steps: Int = Field(default=0, ge=0)
    warmup_init_lr: float = Field(default=1e-6, ge=0)
    schedule: Literal["cosine", "linear", "constant", "wsd"] = "cosine"
    decay_steps: Int = Field(default=0, ge=0)
    betas: tuple[float, float] = (0.9, 0.95)
    eps: float = Field(default=1e-8, gt=0)
    weight_decay: float = Field(default=0.1, ge=0)
    clip_norm: float = Field(default=1.0, gt=0)
    z_loss: float = Field(default=1e-4, ge=0)
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    compile: bool = False
    activation_checkpointing: Literal["none", "selective", "full"] = "none"
    sharding: Literal["none", "node", "full"] = "none"
    on_non_finite: Literal["stop", "skip"] = "stop"
    on_spike: Literal["report", "skip"] = "report"
    spike_deviations: float = Field(default=6.0, gt=0)
    ema_decay: float = Field(default=0.0, ge=0, lt=1)
    timeout_s: float = Field(default=600.0, gt=0)
    init_from: str | None = None
    init_optimizer: bool = False
    checkpoint_every: Int = Field(default=1000, ge=1)
    async_checkpoints: bool = False
    keep_last: Int = Field(default=5, ge=1)
    milestone_every: Int = Field(default=0, ge=0)
    average_last: Int = Field(default=5, ge=0)
    validate_every: Int = Field(default=500, ge=1)
    sample_every: Int = Field(default=500, ge=1)
    sample_prompts: tuple[str, ...] = ()
    sample_tokens: Int = Field(default=64, ge=1)
    evaluate_every: Int = Field(default=0, ge=0)
    evaluate_tasks: str = ""
    evaluate_limit: Int = Field(default=100, ge=1)
    evaluate_data: str | None = None
    log_every: Int = Field(default=1, ge=1)
    tensorboard: bool = False
    wandb: str | None = None

    @model_validator(mode="after")
    def _batches_divide(self) -> TrainSection:
        problems = []
        if self.global_batch % self.micro_batch:
            near = max(1, round(self.global_batch / self.micro_batch)) * self.micro_batch
            problems.append(
                f"train.global_batch={self.global_batch} rows is not a multiple of "
                f"train.micro_batch={self.micro_batch}: set train.global_batch={near}, or change train.micro_batch"
            )
        if self.steps and self.warmup_steps >= self.steps:
            problems.append(
                f"train.warmup_steps={self.warmup_steps} must be less than train.steps={self.steps}: lower it"
            )
        elif self.steps and self.decay_steps > self.steps - self.warmup_steps:
            problems.append(
                f"train.decay_steps={self.decay_steps} must be at most the {self.steps - self.warmup_steps} steps "
                "after the warm-up: lower it"
            )
        if self.min_lr > self.lr:
            problems.append(f"train.min_lr={self.min_lr} must not be above train.lr={self.lr}: lower it")
        if self.evaluate_every and not self.evaluate_tasks.strip(" ,"):
            problems.append(
                f"train.evaluate_every={self.evaluate_every} needs train.evaluate_tasks: name some, as in arc_easy,piqa"
            )
        if self.init_optimizer and not self.init_from:
            problems.append("train.init_optimizer=true needs train.init_from, a training state of CoreNet: name one")
        if problems:
            raise ValueError("; ".join(problems))
        return self


class RunConfig(Section):
    """Everything that decides what a run computes."""

    name: str = Field(pattern=r"^\w[\w.-]*$")  # a folder is called so
    seed: Int = Field(default=0, ge=0, lt=2**40)
    model: ModelSection
    tokenizer: TokenizerSection = TokenizerSection()
    data: DataSection
    train: TrainSection

    @model_validator(mode="after")
    def _rows_fit(self) -> RunConfig:
        context = self.model.build(vocab_size=1, bos_id=1, eos_id=2).max_context_length
        if self.data.row_length > context:
            raise ValueError(
                f"data.row_length={self.data.row_length} is more than model.max_context_length={context}: shorten the "
                "rows, or raise the context length"
            )
        return self


def load_recipe(recipe: str, overrides: list[str]) -> RunConfig:
    """A packaged pre-training recipe by name, or a YAML file by path, with ``a.b=value`` overrides."""
    return load(RunConfig, recipe, overrides)


def load(form: type[C], recipe: str, overrides: list[str]) -> C:
    """A recipe as a config of this form.

    It stands over its ``base``, its row of ``by_size`` for the chosen size over both, overrides over all. Raises
    UserError with all problems and, for unknown keys, the nearest valid one.
    """
    layers = read_layers(recipe)
    if any("ablation" in layer.sections for layer in layers):
        raise UserError(f"{recipe} compares models: run `openelm ablate {recipe}`")
    if _tunes(layers, overrides) == (form is RunConfig):
        if form is RunConfig:
            raise UserError(f"{recipe} tunes a model that is there: run `openelm finetune {recipe}`, or `openelm dpo`")
        raise UserError(f"{recipe} names no model to tune: set model.path, or train one with `openelm pretrain`")
    check_rows(form, layers)
    data, if_missing = combine(layers, overrides)
    return resolve(form, data, recipe, if_missing)


def _tunes(layers: list[Layer], overrides: list[str]) -> bool:
    """Whether a recipe, or a row of it, names a model that is there already, an adapter or preferences."""
    rows = (row for layer in layers if isinstance(layer.by_size, dict) for row in layer.by_size.values())
    parts = [part for part in (*(layer.sections for layer in layers), *rows) if isinstance(part, dict)]
    return any(
        part.get("adapter")
        or part.get("preference")
        or (isinstance(part.get("model"), dict) and "path" in part["model"])
        for part in parts
    ) or any(override.startswith(("model.path=", "adapter.", "preference.")) for override in overrides)


def resolve(form: type[C], data: dict[str, Any], origin: str, if_missing: str = "") -> C:
    """A recipe's mapping as a checked, frozen config; ``if_missing`` is said too where a key without default is."""
    try:
        return form.model_validate(data)
    except ValidationError as error:
        problems = [_problem(form, entry) for entry in error.errors()]
        problems += [found for found in _problems_between(form, data, error) if found not in problems]
        if if_missing and any(entry["type"] == "missing" for entry in error.errors()):
            problems.append(if_missing)
        raise UserError(f"{origin}: " + "; ".join(problems)) from None


def check_rows(form: type[Section], layers: list[Layer]) -> None:
    """UserError where the rows by size of a recipe hold what they cannot."""
    for layer in layers:
        if problems := _problems_of_rows(form, layer.by_size):
            raise UserError(f"{layer.path}: " + "; ".join(problems))


def _problems_of_rows(form: type[Section], rows: Any) -> list[str]:
    """What is wrong with the rows of by_size, each by itself, whichever will be used."""
    if not isinstance(rows, dict):
        return [f"by_size={rows!r} must map sizes to sections, as by_size.270M.train.lr"]
    problems = []
    for size, row in rows.items():
        if size not in SIZES:
            near = difflib.get_close_matches(str(size), SIZES, n=1, cutoff=0.0)[0]
            problems.append(f"by_size.{size} is no size ({', '.join(SIZES)}): did you mean {near}?")
        if not isinstance(row, dict):
            problems.append(f"by_size.{size}={row!r} must hold sections, as train")
            continue
        if isinstance(row.get("model"), dict) and "size" in row["model"]:
            problems.append(f"by_size.{size}.model.size: a size's row cannot choose the size: take it out")
        try:
            form.model_validate(row)
        except ValidationError as error:
            # A row is only a part: what it lacks, and how its values suit the rest, is seen once it is merged.
            wrong = [entry for entry in error.errors() if entry["type"] not in ("missing", "value_error")]
            problems += [f"by_size.{size}.{_problem(form, entry)}" for entry in wrong]
    return problems


def _problems_between(form: type[Section], data: dict[str, Any], error: ValidationError) -> list[str]:
    """What does not fit together among the values that are sound: pydantic looks at it only where all are."""
    sound = copy.deepcopy(data)
    for entry in error.errors():
        inner: Any = sound
        for key, following in pairwise([*entry["loc"], None]):
            if not (isinstance(inner, dict) and key in inner):
                break
            if isinstance(inner[key], dict) and following is not None:
                inner = inner[key]
            else:
                del inner[key]
                break
    try:
        form.model_validate(sound)
    except ValidationError as left:
        return [_problem(form, entry) for entry in left.errors() if entry["type"] == "value_error"]
    return []


def _problem(form: type[Section], entry: Any) -> str:
    key = ".".join(str(part) for part in entry["loc"] if not str(part).startswith(("float", "tuple", "int")))
    if entry["type"] == "extra_forbidden":
        near = difflib.get_close_matches(key, _valid_keys(form), n=1, cutoff=0.0)[0]
        return f"{key} is not a key: did you mean {near}?"
    if entry["type"] == "missing":
        return f"{key} is missing: it has no default"
    if entry["type"] == "value_error":
        return entry["msg"].removeprefix("Value error, ")
    return f"{key}={entry['input']!r}: {entry['msg'][0].lower()}{entry['msg'][1:]}"


def _valid_keys(section: type[BaseModel], prefix: str = "") -> list[str]:
    keys = []
    for name, entry in section.model_fields.items():
        keys.append(prefix + name)
        for inner in (entry.annotation, *get_args(entry.annotation)):
            if isinstance(inner, type) and issubclass(inner, BaseModel):
                keys += _valid_keys(inner, f"{prefix}{name}." + ("0." if name == "sources" else ""))
    return keys
