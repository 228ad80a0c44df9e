"""What a tuning run begins from: a model, its tokenizer and all examples, looked at before anything is trained."""

from __future__ import annotations

import hashlib
import json
import math
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import yaml

from openelm.data.example_stream import ExampleSteps
from openelm.data.pairs import Encoding, Examples, TuneSource, fingerprint, read_examples
from openelm.data.tokenizer import Tokenizer
from openelm.errors import UserError
from openelm.interop.adapter import Adapter, modules, shapes
from openelm.interop.convert import open_source
from openelm.interop.source import Source, with_tokenizer
from openelm.model.geometry import FIXED
from openelm.model.transformer import OpenELM
from openelm.train import parts
from openelm.train.parallel import pick_device
from openelm.train.run_folder import DATA
from openelm.tune import adapters
from openelm.tune.reference import key_of
from openelm.tuning_config import TuneConfig


@dataclass(frozen=True)
class Opened:
    """What a tuning run begins from, as far as it is on this rank."""

    source: Source  # with the run's tokenizer
    tokenizer: Tokenizer
    adapter: Adapter | None
    examples: Examples
    facts: dict[str, Any]  # data.json


def open_all(config: TuneConfig, own_tokenizer: Path | None) -> Opened:
    """The model, its tokenizer (that of the run, where it has one already) and all examples."""
    source = open_source(config.model.path)
    tokenizer, notes = source.tokenizer, [*source.notes]
    if own_tokenizer is not None and own_tokenizer.is_dir():
        tokenizer = Tokenizer.load(own_tokenizer)
    elif config.tokenizer.path:
        tokenizer = Tokenizer.load(config.tokenizer.path)
        if source.tokenizer is not None and source.tokenizer.fingerprint != tokenizer.fingerprint:
            notes.append(
                f"text is cut by tokenizer.path={config.tokenizer.path}, and {config.model.path} has a tokenizer of "
                "its own, another one: tokenizer.path=null takes that"
            )
    if tokenizer is None:
        raise UserError(
            f"model.path={config.model.path} has no tokenizer: set tokenizer.path to the one that it was trained with"
        )
    source = with_tokenizer(replace(source, notes=tuple(notes)), tokenizer)
    row_length, context = config.data.row_length, source.config.max_context_length
    if row_length > context:
        raise UserError(
            f"data.row_length={row_length} is more than the {context} tokens of context that {config.model.path} has: "
            "shorten the rows"
        )
    section = config.adapter
    adapter = None
    if section is not None:
        adapter = Adapter(section.kind, section.r, section.alpha, section.dropout, section.targets)
        with torch.device("meta"):
            adapters.attach(OpenELM(source.config), adapter)  # what cannot be is said before anything is written
    data = config.data
    examples = read_examples(
        [TuneSource(**entry.model_dump()) for entry in data.sources],
        tokenizer,
        Encoding(data.row_length, data.prompt_length, data.long_prompts, data.loss_on, data.empty_system_turn),
        held_out=data.held_out,
        validation=data.validation_examples,
    )
    facts = {
        "model": digest(source),
        "examples": fingerprint([*examples.train, *examples.held_out]),
        "account": examples.account,
    }
    return Opened(source, tokenizer, adapter, examples, facts)


# What a model computes from its weights hangs on these too; that the context is longer changes no figure.
GEOMETRY = (
    *("model_dim", "num_transformer_layers", "head_dim", "num_gqa_groups", "num_query_heads", "num_kv_heads"),
    *("ffn_dims", "vocab_size", "rope_freq_constant", "normalize_qk_projections", "share_input_output_layers"),
    *("normalization_layer_name", *FIXED),
)


def digest(source: Source) -> str:
    """SHA-256 of a model's geometry and weights, the same in any format that keeps their bits."""
    geometry = {name: getattr(source.config, name) for name in GEOMETRY}
    geometry["rope_freq_constant"] = float(geometry["rope_freq_constant"])  # files write 10000 and 10000.0
    total = hashlib.sha256(json.dumps(geometry, sort_keys=True).encode())
    for name, shape in source.shapes.items():
        tensor = source.weight(name)
        total.update(f"{name} {tuple(shape)} {tensor.dtype}".encode())
        total.update(tensor.contiguous().flatten().view(torch.uint8).numpy().data)
    return total.hexdigest()


def check_same(run: Path, opened: Opened) -> None:
    """Refuse to go on with another model, or other examples, than the run began with."""
    try:
        began = dict(json.loads((run / DATA).read_text(encoding="utf-8")))
    except (OSError, TypeError, ValueError) as error:
        raise UserError(
            f"{run / DATA} cannot be read ({error}): put it back as it was, or start anew with --overwrite"
        ) from error
    if began.get("model") != opened.facts["model"]:
        raise UserError(
            f"{run} began with other weights than {opened.source.origin} has now, or with another geometry: put that "
            "model back, or choose another --run"
        )
    if began.get("examples") != opened.facts["examples"]:
        was, now = began.get("account"), opened.facts["account"]
        raise UserError(
            f"{run} began with other examples than data.sources give now ({was} then, {now} now): put the files back, "
            "or choose another --run"
        )


def is_base(run: Path, source: Source) -> bool:
    """Whether this is the model that a tuning run began from; True too where its folder does not tell."""
    try:
        began = dict(json.loads((run / DATA).read_text(encoding="utf-8"))).get("model")
    except (OSError, TypeError, ValueError):
        return True
    return began is None or began == digest(source)


def reference_place(opened: Opened, dtype: torch.dtype) -> tuple[Path, str]:
    """The folder of references' log-probabilities, and the key under which those of these pairs stand there."""
    key = key_of(opened.facts["model"], opened.facts["examples"], str(dtype))
    return parts.cache_folder() / "reference", key


def outlook(config: TuneConfig, run: Path) -> dict[str, Any]:
    """What a run would do, without a step of it; UserError for whatever the run itself would refuse to begin with."""
    opened = open_all(config, None)
    steps, device = example_steps(config, opened), pick_device()
    rows, row_length = steps.rows_in(1), config.data.row_length
    config = config.with_steps(steps.rows_in(config.train.epochs or 0))
    dtype = parts.compute_dtype(config.train.dtype, device)
    geometry = opened.source.config
    trained = geometry.num_parameters()
    if opened.adapter is not None:
        trained = sum(math.prod(shape) for shape in shapes(opened.adapter, geometry).values())
    found = {
        "run_folder": str(run),
        "model": opened.source.origin,
        "device": f"{device}, computing in {str(dtype).removeprefix('torch.')}",
        "parameters": geometry.num_parameters(),
        "parameters_trained": trained,
        "examples": opened.examples.account,
        "rows_in_an_epoch": rows,
        "row_filling": round(steps.filling(), 4),
        "steps": config.train.steps,
        "warmup_steps": config.train.warmup_steps,
        "epochs": round(config.train.steps * config.train.global_batch / rows, 3),
        "tokens_at_most": config.train.steps * config.train.global_batch * row_length * (2 if config.preference else 1),
    }
    if config.preference is not None:
        folder, key = reference_place(opened, dtype)
        answers = 2 * (len(opened.examples.train) + len(opened.examples.held_out))
        cached = (folder / f"{key}.safetensors").is_file()
        found["reference"] = f"of {answers:,} answers, " + (f"kept in {folder}" if cached else "to be computed first")
    return {**found, "notes": remarks(config, opened)}


def steps_begun(run: Path) -> int:
    """The steps that a tuning run was begun with; 0 where its config.yaml cannot be read (others say what is wrong).

    UserError: it is a run of another kind.
    """
    try:
        config = yaml.safe_load((run / "config.yaml").read_text(encoding="utf-8"))
        model, steps = dict(config["model"]), int(config["train"]["steps"])
    except (OSError, KeyError, TypeError, ValueError, yaml.YAMLError):
        return 0
    if "path" not in model:
        raise UserError(f"{run} is a run of `openelm pretrain`: choose another --run, and model.path={run} to tune it")
    return steps


def account(opened: Opened) -> str:
    """What became of the records, for the user."""
    counts = {name: count for name, count in opened.examples.account.items() if count}
    return "examples: " + ", ".join(f"{name.replace('_', ' ')} {count:,}" for name, count in counts.items())


def remarks(config: TuneConfig, opened: Opened) -> list[str]:
    """What a user is likely to have meant otherwise."""
    examples, adapter = opened.examples, opened.adapter
    notes = [*opened.source.notes]
    if config.data.held_out and not examples.held_out:
        notes.append(
            f"no example was held out (data.held_out={config.data.held_out:g}, data.validation_examples="
            f"{config.data.validation_examples}): nothing is measured on unseen ones; give more, or a larger share"
        )
    if (rows := example_steps(config, opened).rows_in(1)) < config.train.global_batch:
        notes.append(
            f"an epoch is {rows} rows, fewer than train.global_batch={config.train.global_batch}: a step sees the same "
            "example more than once; give more examples, or lower train.global_batch"
        )
    if adapter is not None:
        sides = {name: min(shape) for name, shape in modules(adapter, opened.source.config).items()}
        if small := [name for name, side in sides.items() if adapter.r > side]:
            notes.append(
                f"adapter.r={adapter.r} is more than the smaller side of {len(small)} of {len(sides)} matrices "
                f"({small[0]}: {sides[small[0]]}): more adds nothing there; lower it"
            )
    return notes


def example_steps(config: TuneConfig, opened: Opened, rank: int = 0, ranks: int = 1, position: int = 0) -> ExampleSteps:
    train, data = config.train, config.data
    return ExampleSteps(
        opened.examples.train,
        seed=config.seed,
        packing=data.packing,
        row_length=data.row_length,
        bos_id=opened.tokenizer.bos_id,
        global_batch=train.global_batch,
        rows=train.micro_batch,
        rank=rank,
        ranks=ranks,
        position=position,
        fixed=train.compile,
    )
