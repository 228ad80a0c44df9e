"""A pre-training run from its config to its model folder: what stands around the loop."""

from __future__ import annotations

import glob
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Tensor, nn

from openelm.config import RunConfig
from openelm.data.held_out import HeldOut, order_0_bits_per_byte, xz_bits_per_byte
from openelm.data.loader import Loader
from openelm.data.stream import TokenStream
from openelm.data.tokenizer import Tokenizer
from openelm.environment import environment
from openelm.errors import UserError
from openelm.files import remove_drafts, whole_folder, write_json
from openelm.model.folder import save_model
from openelm.model.geometry import ModelConfig
from openelm.model.transformer import OpenELM
from openelm.train import loop, parts, probes
from openelm.train.average import average_checkpoints
from openelm.train.checkpoint import Checkpoint, Checkpoints
from openelm.train.metrics import Recorder, cut_back, gemm_flops_per_s, trackers
from openelm.train.optim import Optimizer
from openelm.train.schedule import Schedule

# What may differ between a run and its resume: none of it changes a number that is computed.
FREE_KEYS = {"train.log_every", "train.tensorboard", "train.wandb", "train.milestone_every"}


@dataclass(frozen=True)
class Parts:
    """All that a run is made of, checked, before anything is written."""

    config: RunConfig
    geometry: ModelConfig
    tokenizer: Tokenizer
    stream: TokenStream
    held_out: HeldOut
    device: torch.device
    dtype: torch.dtype


def prepare(config: RunConfig, run: Path | None = None) -> Parts:
    """Find the data and check that everything fits together; raises UserError before anything is written."""
    own = run / "tokenizer" if run else None
    tokenizer = Tokenizer.load(own) if own and own.is_dir() else parts.load_tokenizer(config)
    geometry = parts.geometry(config, tokenizer)
    parts.token_stream(config, tokenizer).next_row()  # nothing left after filtering is said here
    device = parts.pick_device()
    return Parts(
        config,
        geometry,
        tokenizer,
        parts.token_stream(config, tokenizer),
        parts.held_out(config, tokenizer),
        device,
        parts.compute_dtype(config.train.dtype, device),
    )


def pretrain(config: RunConfig, run: Path, *, resume: bool, resume_step: int | None, overwrite: bool) -> dict[str, Any]:
    """Train, average, compare, and write the model folder; returns the summary that summary.json holds."""
    remove_drafts(run.parent, glob.escape(run.name))  # of a start that was killed
    if run.exists() and not (run.is_dir() and ((run / "config.yaml").is_file() or not any(run.iterdir()))):
        raise UserError(
            f"{run} is there and is no run folder (it has no config.yaml): choose another with --run FOLDER"
        )
    if run.exists() and not (resume or overwrite):
        raise UserError(f"{run} exists: go on with --resume, start anew with --overwrite, or choose --run FOLDER")
    if resume and not run.exists():
        raise UserError(f"{run} does not exist, so there is nothing to resume: leave out --resume")
    resolved = _as_plain(config)
    if resume:
        _check_same(run, resolved)
    ready = prepare(config, run if resume else None)
    if not resume:
        _create(run, ready, resolved)
    checkpoints = Checkpoints(
        run / "checkpoints", keep_last=config.train.keep_last, milestone_every=config.train.milestone_every
    )
    model, optimizer = _model_and_optimizer(ready)
    checkpoint = _load(checkpoints, ready, optimizer, resume_step) if resume else None
    step = checkpoint.step if checkpoint else 0
    elapsed_s = cut_back(run / "metrics.jsonl", step)
    train = config.train
    tracking = trackers(run, tensorboard=train.tensorboard, wandb=train.wandb)
    with Recorder(run, steps=train.steps, elapsed_s=elapsed_s, trackers=tracking) as recorder:
        _say_what_begins(ready, recorder, step)
        tokens = _train(ready, model, optimizer, recorder, checkpoints, checkpoint)
        return _finish(ready, run, model, optimizer, checkpoints, recorder, tokens)


def _train(
    ready: Parts,
    model: OpenELM,
    optimizer: Optimizer,
    recorder: Recorder,
    checkpoints: Checkpoints,
    checkpoint: Checkpoint | None,
) -> int:
    config, train = ready.config, ready.config.train

    def save(step: int, tokens: int, snapshot: Any) -> None:
        state = {"tokens": tokens, "stream": ready.stream.as_json(snapshot)}
        weights = {name: master.detach() for name, master in optimizer.masters.items()}
        checkpoints.save(ready.geometry, Checkpoint(step, weights, optimizer.state(), state))

    settings = loop.LoopSettings(
        steps=train.steps,
        clip_norm=train.clip_norm,
        log_every=train.log_every,
        checkpoint_every=train.checkpoint_every,
        flops_per_token=ready.geometry.train_flops_per_token(config.data.row_length),
        peak_flops_per_s=gemm_flops_per_s(ready.dtype, ready.device),
    )
    schedule = Schedule(
        train.schedule,
        train.steps,
        train.lr,
        train.min_lr,
        train.warmup_steps,
        train.warmup_init_lr,
        train.decay_steps,
    )
    compiled: nn.Module = torch.compile(model) if train.compile else model  # type: ignore[assignment]
    loader = Loader(ready.stream, rows=train.micro_batch, micro_batches=train.global_batch // train.micro_batch)
    with loader as data:
        return loop.run(
            compiled,
            optimizer,
            schedule,
            data,
            loop.pretraining_loss(train.z_loss),
            settings,
            recorder,
            save=save,
            probes=_probes(ready),
            first_step=checkpoint.step if checkpoint else 0,
            tokens=checkpoint.state["tokens"] if checkpoint else 0,
        )


def _finish(
    ready: Parts,
    run: Path,
    model: OpenELM,
    optimizer: Optimizer,
    checkpoints: Checkpoints,
    recorder: Recorder,
    tokens: int,
) -> dict[str, Any]:
    """Average the last checkpoints, compare, and write the model folders and summary.json."""
    train, rows = ready.config.train, ready.config.train.micro_batch
    scores: dict[str, float] = {}
    weights = dict(optimizer.masters)
    if ready.held_out.rows:
        scores["last"] = probes.evaluate(model, ready.held_out, rows)["bits_per_byte"]
    # Not how many there happen to be: a run killed before it deleted the oldest would average one more.
    count = min(train.average_last, train.keep_last, len(checkpoints.steps()))
    if count > 1:
        _write_model(ready, run / "model-last", weights, scores.get("last"), train.steps, tokens)
        _, weights, steps = average_checkpoints(checkpoints, count)
        recorder.say(f"averaged the checkpoints of steps {', '.join(map(str, steps))}")
        model.load_state_dict(weights)
        if ready.held_out.rows:
            scores["averaged"] = probes.evaluate(model, ready.held_out, rows)["bits_per_byte"]
    best = scores.get("averaged", scores.get("last"))
    _write_model(ready, run / "model", weights, best, train.steps, tokens)
    if ready.held_out.rows:
        scores["order-0 bytes"] = order_0_bits_per_byte(ready.held_out.texts)
        scores["xz -9"] = xz_bits_per_byte(ready.held_out.texts)
    summary: dict[str, Any] = {
        "steps": train.steps,
        "tokens": tokens,
        "elapsed_s": recorder.elapsed_s,
        "bits_per_byte": scores,
    }
    if train.sample_prompts:
        prompt = train.sample_prompts[0]
        text = probes.write(model, ready.tokenizer, (prompt,), train.sample_tokens, ready.config.seed)[0]
        summary["sample"] = {"prompt": prompt, "text": text}
    write_json(run / "summary.json", summary)
    return summary


def _write_model(
    ready: Parts, folder: Path, weights: dict[str, Tensor], bits_per_byte: float | None, steps: int, tokens: int
) -> None:
    model = OpenELM(ready.geometry)
    model.load_state_dict({name: tensor.detach() for name, tensor in weights.items()})
    card = model_card(ready.config, ready.geometry, bits_per_byte, steps, tokens)
    save_model(model, folder, tokenizer=ready.tokenizer, card=card, overwrite=True)


def model_card(config: RunConfig, geometry: ModelConfig, bits_per_byte: float | None, steps: int, tokens: int) -> str:
    """README.md of a model folder."""
    data = "\n".join(f"- {source.name}: `{source.path}`, share {source.share:g}" for source in config.data.sources)
    score = "not measured" if bits_per_byte is None else f"{bits_per_byte:.3f} bits per byte on held-out text"
    base = f"\nbase_model: {config.train.init_from}" if config.train.init_from else ""
    return f"""---
library_name: openelm
tags: [openelm, layer-wise-scaling]{base}
---
# {config.name}

An OpenELM language model with layer-wise scaling, {geometry.num_parameters():,} parameters, trained for {steps:,} steps
on {tokens:,} tokens. Licence: to be set by whoever publishes it; it must respect those of the data.

## Data
{data}

## Evaluation
{score}.

## Bias, risks and limitations
A base model: it continues text and was not tuned to follow instructions or to be safe. It repeats what its data holds,
mistakes and prejudices included. Test it for your use before anyone relies on it.
"""


def _probes(ready: Parts) -> list[loop.Probe]:
    train = ready.config.train
    return [
        probes.validation(ready.held_out, every=train.validate_every, steps=train.steps, rows=train.micro_batch),
        probes.samples(
            ready.tokenizer,
            train.sample_prompts,
            every=train.sample_every,
            steps=train.steps,
            max_tokens=train.sample_tokens,
            seed=ready.config.seed,
        ),
        probes.data_account(every=train.validate_every, steps=train.steps),
    ]


def _model_and_optimizer(ready: Parts) -> tuple[OpenELM, Optimizer]:
    train = ready.config.train
    model = parts.build_model(ready.config, ready.geometry, ready.device)
    masters = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    optimizer = Optimizer(model.to(ready.dtype), betas=train.betas, eps=train.eps, weight_decay=train.weight_decay)
    optimizer.load(masters, {})  # in bf16 the masters keep what the rounding of the model drops
    return model, optimizer


def _load(checkpoints: Checkpoints, ready: Parts, optimizer: Optimizer, step: int | None) -> Checkpoint | None:
    """Put a run where its checkpoint was; None where it was stopped before the first one."""
    for folder in (checkpoints.folder.parent, checkpoints.folder, checkpoints.folder.parent / "report"):
        remove_drafts(folder)
    if not checkpoints.steps() and step is None:
        return None
    checkpoint = checkpoints.load(step)
    optimizer.load(checkpoint.weights, checkpoint.optimizer)
    ready.stream.restore(checkpoint.state["stream"])
    checkpoints.drop_after(checkpoint.step)
    return checkpoint


def _create(run: Path, ready: Parts, resolved: dict[str, Any]) -> None:
    """Make the run folder, with what it will compute and on what."""
    geometry = {
        **ready.geometry.as_dict(),
        "ffn_dims": list(ready.geometry.ffn_dims),
        "num_parameters": ready.geometry.num_parameters(),
    }
    with whole_folder(run, overwrite=True) as draft:
        (draft / "checkpoints").mkdir()
        (draft / "tokenizer").mkdir()
        ready.tokenizer.save(draft / "tokenizer")
        write_json(draft / "environment.json", environment())
        text = yaml.safe_dump({**resolved, "geometry": geometry}, sort_keys=False)
        (draft / "config.yaml").write_text(text, encoding="utf-8")


def _check_same(run: Path, resolved: dict[str, Any]) -> None:
    """Refuse to go on with a recipe that computes something else, naming each key."""
    path = run / "config.yaml"
    if not path.is_file():
        raise UserError(f"{run} is not a run folder: it has no config.yaml; start anew with --overwrite")
    before = yaml.safe_load(path.read_text(encoding="utf-8"))
    before.pop("geometry", None)
    old, new = _flat(before), _flat(resolved)
    differing = [
        key for key in sorted(old.keys() | new.keys()) if key not in FREE_KEYS and old.get(key) != new.get(key)
    ]
    if differing:
        raise UserError(
            f"{run} was begun with another recipe: "
            + ", ".join(f"{key} was {old.get(key)!r}, is {new.get(key)!r}" for key in differing)
            + ": resume with the same values, or choose another --run"
        )


def _say_what_begins(ready: Parts, recorder: Recorder, step: int) -> None:
    train, data = ready.config.train, ready.config.data
    if data.held_out and not ready.held_out.rows:
        recorder.say(
            f"no document was held out (data.held_out={data.held_out:g}, decided document by document): nothing is "
            "measured on unseen text; give more documents, or a larger share"
        )
    recorder.say(
        f"{ready.config.name}: {ready.geometry.num_parameters():,} parameters in "
        f"{ready.geometry.num_transformer_layers} layers, {train.steps:,} steps of {train.global_batch} rows of "
        f"{data.row_length} tokens, "
        f"{str(ready.dtype).removeprefix('torch.')} on {ready.device}" + (f", from step {step}" if step else "")
    )


def _as_plain(config: RunConfig) -> dict[str, Any]:
    plain: dict[str, Any] = json.loads(config.model_dump_json())
    return plain


def _flat(data: Any, prefix: str = "") -> dict[str, Any]:
    if not isinstance(data, dict):
        return {prefix.removesuffix("."): data}
    flat: dict[str, Any] = {}
    for key, value in data.items():
        flat |= _flat(value, f"{prefix}{key}.")
    return flat
