"""A pre-training run from its config to its model folder: what stands around the loop."""

from __future__ import annotations

import json
import os
import secrets
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from openelm.config import RunConfig
from openelm.data.fingerprint import compare, fingerprint
from openelm.data.held_out import HeldOut, order_0_bits_per_byte, xz_bits_per_byte
from openelm.data.loader import Loader
from openelm.data.sources import Unit, find_units
from openelm.data.stream import TokenStream
from openelm.data.tokenizer import Tokenizer
from openelm.errors import Stopped, UserError
from openelm.files import remove_drafts, whole_folder, write_json
from openelm.interop.card import trained_card
from openelm.interop.convert import open_source
from openelm.interop.transformers_folder import complete
from openelm.model.folder import write_model
from openelm.model.geometry import ModelConfig
from openelm.model.transformer import OpenELM
from openelm.train import loop, parts, probes
from openelm.train.average import Average
from openelm.train.checkpoint import Checkpoints
from openelm.train.guard import Guard
from openelm.train.keeper import Keeper
from openelm.train.metrics import Recorder, cut_back, gemm_flops_per_s, trackers
from openelm.train.optim import Optimizer
from openelm.train.parallel import World, check_batch
from openelm.train.run_folder import DATA, check_start, create, locked
from openelm.train.schedule import Schedule
from openelm.train.stopping import Stopping

# Both set: torchrun restarts ranks and lets them share one store from start to start (PyTorch issue 167288).
UNSOUND_RESTARTS = ("TORCHELASTIC_USE_AGENT_STORE", "TORCHELASTIC_MAX_RESTARTS")


@dataclass(frozen=True)
class Begun:
    """What rank 0 has found and checked for all, before any of them makes a step."""

    resumed: bool
    notes: list[str]
    units: list[list[Unit]]  # of each source
    held_out: HeldOut
    base_card: str | None  # of the model that the run begins from: it may be gone when the run has ended
    attempt: str  # marks the files that this start writes


@dataclass(frozen=True)
class Parts:
    """All that a run is made of, on this rank."""

    config: RunConfig
    run: Path
    world: World
    geometry: ModelConfig
    tokenizer: Tokenizer
    stream: TokenStream
    held_out: HeldOut
    dtype: torch.dtype
    model: OpenELM
    optimizer: Optimizer
    guard: Guard
    checkpoints: Checkpoints
    keeper: Keeper
    base_card: str | None


def pretrain(
    config: RunConfig,
    run: Path,
    *,
    resume: bool | None,
    resume_step: int | None = None,
    overwrite: bool = False,
    live: Callable[[World, Tokenizer], loop.Probe] | None = None,
) -> dict[str, Any]:
    """Train, average, compare, and write the model folder; returns what summary.json holds (on rank 0).

    ``resume`` None goes on where there is a run and begins where there is none. ``live`` makes a further probe. Raises
    Stopped where a signal ended the run before its time.
    """
    train = config.train
    with World(train.sharding, train.timeout_s) as world, ExitStack() as stack:

        def begin() -> Begun:
            check_batch(train.global_batch, train.micro_batch, world.size)
            stack.enter_context(locked(run))
            resumes = (run / "config.yaml").is_file() if resume is None else resume
            return _begin(config, run, resume=resumes, overwrite=overwrite)

        begun = world.first(begin)
        ready = world.each(lambda: _assemble(config, run, world, begun))
        start = world.each(lambda: _load(ready, resume_step) if begun.resumed else _first(ready))
        elapsed_s = world.first(lambda: cut_back(run / "metrics.jsonl", start.step))
        tracking = trackers(run, tensorboard=train.tensorboard, wandb=train.wandb) if world.rank == 0 else ()
        with Recorder(run, steps=train.steps, elapsed_s=elapsed_s, rank=world.rank, trackers=tracking) as recorder:
            _say_what_begins(ready, recorder, begun.notes, start.step)
            with Stopping() as stopping:
                try:
                    reached = _train(ready, recorder, stopping, start, live)
                except UserError:
                    ready.keeper.leave()
                    raise
                ready.keeper.finish()  # within: a signal sent twice must not end the writing
            if reached.step < train.steps:
                raise Stopped(
                    f"{stopping.name or 'another rank'}: stopped after step {reached.step} of {train.steps}; the "
                    "checkpoint is written: go on with the same command and --resume"
                    if world.rank == 0
                    else ""
                )
            return _finish(ready, recorder, reached)


def _begin(config: RunConfig, run: Path, *, resume: bool, overwrite: bool) -> Begun:
    """Find the data, check that everything fits together, and make the run folder; UserError before it is made."""
    notes = check_start(run, config, resume=resume, overwrite=overwrite)
    own = run / "tokenizer"
    tokenizer = Tokenizer.load(own) if resume and own.is_dir() else parts.load_tokenizer(config)
    geometry = parts.geometry(config, tokenizer)
    base_card = open_source(config.train.init_from).card if config.train.init_from else None
    units = [find_units(source) for source in parts.sources(config)]
    by_name = {source.name: found for source, found in zip(config.data.sources, units, strict=True)}
    if resume:
        for folder in (run, run / "checkpoints", run / "report", run / "replay"):
            remove_drafts(folder)
        # What was copied since has other times: written down, so that the next resume need not read it again.
        saved = json.loads((run / DATA).read_text(encoding="utf-8"))
        if (found := compare(saved, by_name)) != saved:
            write_json(run / DATA, found)
    else:
        parts.check_sources(config, tokenizer, units)
        create(run, config, geometry, tokenizer, fingerprint(by_name))
    held_out = parts.held_out(config, tokenizer, units)
    return Begun(resume, notes, units, held_out, base_card, secrets.token_hex(8))


def _assemble(config: RunConfig, run: Path, world: World, begun: Begun) -> Parts:
    if not (run / "tokenizer").is_dir():
        raise UserError(f"rank {world.rank} does not see {run}: it must be on a file system that all ranks share")
    train = config.train
    tokenizer = Tokenizer.load(run / "tokenizer")
    geometry = parts.geometry(config, tokenizer)
    dtype = parts.compute_dtype(train.dtype, world.device)
    model = parts.build_model(config, geometry, world, dtype)
    optimizer = Optimizer(
        model,
        betas=train.betas,
        eps=train.eps,
        weight_decay=train.weight_decay,
        dtype=dtype,
        ema_decay=train.ema_decay,
    )
    guard = Guard(
        world.device,
        stop=train.on_non_finite == "stop",
        skip_spikes=train.on_spike == "skip",
        deviations=train.spike_deviations,
    )
    checkpoints = Checkpoints(
        run / "checkpoints",
        keep_last=train.keep_last,
        milestone_every=train.milestone_every,
        every=train.checkpoint_every,
    )
    keeper = Keeper(
        checkpoints,
        world,
        geometry,
        optimizer,
        guard,
        tokenizer=tokenizer.fingerprint,
        attempt=begun.attempt,
        asynchronous=train.async_checkpoints,
    )
    return Parts(
        config=config,
        run=run,
        world=world,
        geometry=geometry,
        tokenizer=tokenizer,
        stream=parts.token_stream(config, tokenizer, begun.units),
        held_out=begun.held_out,
        dtype=dtype,
        model=model,
        optimizer=optimizer,
        guard=guard,
        checkpoints=checkpoints,
        keeper=keeper,
        base_card=begun.base_card,
    )


def _load(ready: Parts, step: int | None) -> loop.Reached:
    """Put a run where its checkpoint was; at the beginning, where it was stopped before the first one."""
    if not ready.checkpoints.steps() and step is None:
        return _first(ready)
    state = ready.keeper.load(step)
    ready.stream.restore(state.stream)
    return loop.Reached(state.step, state.tokens)


def _first(ready: Parts) -> loop.Reached:
    """Where a run begins: at step 0, or with the moments and at the step of the training state that it names.

    Its rows are the first in any case: where others were in their data, no file of theirs says.
    """
    if not ready.config.train.init_optimizer:
        return loop.Reached(0, 0)
    state = parts.training_state(ready.config)
    ready.optimizer.load_state(lambda key: state.read(key, *ready.world.part(state.shape(key))))
    return loop.Reached(state.step, 0)


def _train(
    ready: Parts,
    recorder: Recorder,
    stopping: Stopping,
    start: loop.Reached,
    live: Callable[[World, Tokenizer], loop.Probe] | None,
) -> loop.Reached:
    config, world = ready.config, ready.world
    train, data = config.train, config.data
    peak = world.first(lambda: gemm_flops_per_s(ready.dtype, world.device))
    settings = loop.LoopSettings(
        steps=train.steps,
        usual_weight=train.global_batch * data.row_length,
        clip_norm=train.clip_norm,
        log_every=train.log_every,
        checkpoint_every=train.checkpoint_every,
        flops_per_token=ready.geometry.train_flops_per_token(data.row_length),
        peak_flops_per_s=peak * world.size,
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
    with Loader(
        ready.stream,
        global_batch=train.global_batch,
        rows=train.micro_batch,
        rank=world.rank,
        ranks=world.size,
        workers=data.workers,
    ) as steps:
        return loop.run(
            ready.model,
            ready.optimizer,
            schedule,
            steps,
            loop.pretraining_loss(train.z_loss),
            settings,
            recorder,
            world=world,
            guard=ready.guard,
            keep=ready.keeper,
            probes=[*_probes(ready), *([live(world, ready.tokenizer)] if live else [])],
            asked_to_stop=stopping,
            start=start,
        )


def _probes(ready: Parts) -> list[loop.Probe]:
    train, world = ready.config.train, ready.world
    return [
        probes.validation(ready.held_out, world, every=train.validate_every, steps=train.steps, rows=train.micro_batch),
        probes.samples(
            ready.tokenizer,
            train.sample_prompts,
            world,
            every=train.sample_every,
            steps=train.steps,
            max_tokens=train.sample_tokens,
            seed=ready.config.seed,
        ),
        probes.data_account(world, every=train.validate_every, steps=train.steps),
    ]


def _finish(ready: Parts, recorder: Recorder, reached: loop.Reached) -> dict[str, Any]:
    """Average the last checkpoints, compare, and write the model folders and summary.json."""
    config, world, run = ready.config, ready.world, ready.run
    train, optimizer = config.train, ready.optimizer
    scores: dict[str, float] = {}

    def score(name: str) -> None:
        if ready.held_out.rows:
            scores[name] = probes.evaluate(ready.model, ready.held_out, world, train.micro_batch)["bits_per_byte"]

    def write(folder: str, read: Callable[[str], Tensor], name: str) -> None:
        """On rank 0, which needs no other for it: checkpoints are files."""
        card = trained_card(
            config,
            parameters=ready.geometry.num_parameters(),
            steps=reached.step,
            tokens=reached.tokens,
            bits_per_byte=scores.get(name),
            base_card=ready.base_card,
        )
        world.first(lambda: _write_model(ready, run / folder, read, card))

    def average(steps: list[int]) -> Average:
        return world.each(lambda: Average(ready.checkpoints, steps, share=(world.rank, world.size)))

    name, best = "last", average([reached.step])
    score(name)
    if train.ema_decay:
        optimizer.load_weights(optimizer.ema.__getitem__)
        score("exponential average")
        kept = world.each(lambda: ready.checkpoints.open(reached.step, share=(world.rank, world.size)))
        write("model-ema", lambda key: kept.read_optimizer(f"ema.{key}"), "exponential average")
    steps = ready.checkpoints.due()[-min(train.average_last, train.keep_last) :] if train.average_last else []
    if len(steps) > 1:
        write("model-last", best.read, name)
        name, best = "averaged", average(steps)
        recorder.say(f"averaged the checkpoints of steps {', '.join(map(str, best.steps))}")
    if len(steps) > 1 or train.ema_decay:
        optimizer.load_weights(lambda key: best.read(key, *world.part(optimizer.shapes[key])))
        score(name)
    write("model", best.read, name)
    prompts = train.sample_prompts[:1]
    texts = probes.write(ready.model, ready.tokenizer, prompts, world, train.sample_tokens, config.seed)
    world.barrier()
    if world.rank:
        return {}
    if ready.held_out.rows:
        scores["order-0 bytes"] = order_0_bits_per_byte(ready.held_out.texts)
        scores["xz -9"] = xz_bits_per_byte(ready.held_out.texts)
    summary: dict[str, Any] = {
        "steps": train.steps,
        "tokens": reached.tokens,
        "elapsed_s": recorder.elapsed_s,
        "bits_per_byte": scores,
    }
    if prompts:
        summary["sample"] = {"prompt": prompts[0], "text": texts[0]}
    write_json(run / "summary.json", summary)
    return summary


def _write_model(ready: Parts, folder: Path, read: Callable[[str], Tensor], card: str) -> None:
    with whole_folder(folder, overwrite=True) as draft:
        write_model(draft, ready.geometry, read, torch.float32)
        ready.tokenizer.save(draft)
        (draft / "README.md").write_text(card, encoding="utf-8")
        complete(draft)


def _say_what_begins(ready: Parts, recorder: Recorder, notes: list[str], step: int) -> None:
    config, world = ready.config, ready.world
    train, data = config.train, config.data
    if data.held_out and not ready.held_out.rows:
        recorder.say(
            f"no document was held out (data.held_out={data.held_out:g}, decided document by document): nothing is "
            "measured on unseen text; give more documents, or a larger share"
        )
    if world.size > 1 and all(os.environ.get(name, "0") not in ("0", "False") for name in UNSOUND_RESTARTS):
        recorder.say(
            "torchrun's restarts may find the addresses of the ranks before them, and hang: set "
            "TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 where it runs (docs/launch.md)"
        )
    if notes:
        recorder.say(f"other than when the run began, with no effect beyond rounding: {', '.join(notes)}")
    recorder.say(
        f"{config.name}: {ready.geometry.num_parameters():,} parameters in "
        f"{ready.geometry.num_transformer_layers} layers, {train.steps:,} steps of {train.global_batch} rows of "
        f"{data.row_length} tokens, {str(ready.dtype).removeprefix('torch.')} on "
        + (f"{world.size} ranks of {world.device.type}" if world.size > 1 else str(world.device))
        + (f", from step {step}" if step else "")
    )
