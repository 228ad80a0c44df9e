"""One run from its config to what it leaves behind: what stands around the loop, whatever is trained.

A job says what is trained on what: pre-training (pretrain.py), or tuning (tune/tuning.py). Here is all that they share:
ranks, the run folder, resuming, checkpoints, records, signals, averaging.
"""

from __future__ import annotations

import os
import secrets
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from openelm.config import RunConfig, TrainSection
from openelm.data.loader import Step
from openelm.data.tokenizer import Tokenizer
from openelm.errors import Stopped, UserError
from openelm.files import remove_drafts, write_json
from openelm.model.transformer import OpenELM
from openelm.train import loop, probes
from openelm.train.average import Average
from openelm.train.checkpoint import Checkpoints
from openelm.train.form import Form
from openelm.train.guard import Guard
from openelm.train.keeper import Keeper
from openelm.train.metrics import Recorder, cut_back, gemm_flops_per_s, trackers
from openelm.train.optim import Optimizer
from openelm.train.parallel import World, check_batch
from openelm.train.run_folder import locked
from openelm.train.schedule import Schedule
from openelm.train.stopping import Stopping
from openelm.tuning_config import TuneConfig

# Both set: torchrun restarts ranks and lets them share one store from start to start (PyTorch issue 167288).
UNSOUND_RESTARTS = ("TORCHELASTIC_USE_AGENT_STORE", "TORCHELASTIC_MAX_RESTARTS")
Live = Callable[[World, Tokenizer], loop.Probe]


@dataclass(frozen=True)
class Begun:
    """What rank 0 has found and checked for all, before any of them makes a step."""

    config: RunConfig | TuneConfig  # with what only the data could tell
    resumed: bool
    notes: list[str] = field(default_factory=list)  # for the user
    found: Any = None  # the job's own
    attempt: str = field(default_factory=lambda: secrets.token_hex(8))  # marks the files that this start writes


@dataclass(frozen=True)
class Reckoning:
    """What the loop needs to know of the work: see LoopSettings."""

    usual_weight: int
    flops_per_token: int
    seen: str  # of a step, as "4 rows of 256 tokens"


class Work(Protocol):
    """What a job comes to on one rank: the model, what it is trained on, and what is made of it."""

    model: OpenELM
    dtype: torch.dtype

    @property
    def tokenizer(self) -> Tokenizer:
        """The model's."""
        ...

    @property
    def form(self) -> Form:
        """Of the weights that are trained."""
        ...

    @property
    def reckoning(self) -> Reckoning:
        """What the loop needs to know."""
        ...

    @property
    def loss(self) -> loop.LossFunction:
        """What is made smaller."""
        ...

    def prepare(self) -> None:
        """What is to be asked of the model as it begins, now that it computes in its dtype; on all ranks together."""
        ...

    def restore(self, stream: dict[str, Any]) -> None:
        """Put the data where a checkpoint was."""
        ...

    def first(self, optimizer: Optimizer) -> loop.Reached:
        """Where a run begins."""
        ...

    def steps(self) -> AbstractContextManager[Iterable[Step]]:
        """The data from there on."""
        ...

    def probes(self) -> list[loop.Probe]:
        """What is looked at on the way."""
        ...

    def score(self) -> dict[str, float]:
        """What the model is worth on held-out data, less is better first; nothing where there are none."""
        ...

    def prompts(self) -> list[list[int]]:
        """Of train.sample_prompts: the ids that the model continues."""
        ...

    def card(self, steps: int, tokens: int, score: dict[str, float]) -> str:
        """The README of a model folder."""
        ...

    def write_model(self, folder: Path, read: Callable[[str], Tensor], card: str) -> None:
        """Write a model folder from trained weights."""
        ...

    def summary(self, scores: dict[str, dict[str, float]]) -> dict[str, Any]:
        """What summary.json says of the scores of last, averaged, …"""
        ...


class Job(Protocol):
    """What is trained on what."""

    @property
    def config(self) -> RunConfig | TuneConfig:
        """The recipe."""
        ...

    def begin(self, run: Path, *, resume: bool, overwrite: bool) -> Begun:
        """On rank 0: find the data, check that everything fits together, make the run folder; UserError before."""
        ...

    def assemble(self, run: Path, world: World, begun: Begun) -> Work:
        """On every rank: the model with its first weights, and its data at their beginning."""
        ...


def run(
    job: Job,
    folder: Path,
    *,
    resume: bool | None,
    resume_step: int | None = None,
    overwrite: bool = False,
    live: Live | None = None,
) -> dict[str, Any]:
    """Train, average, compare, and write the model folder; returns what summary.json holds (on rank 0).

    ``resume`` None goes on where there is a run and begins where there is none. ``live`` makes a further probe. Raises
    Stopped where a signal ended the run before its time.
    """
    train = job.config.train
    with World(train.sharding, train.timeout_s) as world, ExitStack() as stack:

        def begin() -> Begun:
            check_batch(train.global_batch, train.micro_batch, world.size)
            stack.enter_context(locked(folder))
            resumes = (folder / "config.yaml").is_file() if resume is None else resume
            begun = job.begin(folder, resume=resumes, overwrite=overwrite)
            if resumes:
                for part in (folder, folder / "checkpoints", folder / "report", folder / "replay"):
                    remove_drafts(part)
            return begun

        begun = world.first(begin)
        _check_seen(folder, world)
        train = begun.config.train
        work = world.each(lambda: job.assemble(folder, world, begun))
        this = _assembled(folder, world, begun, work)
        work.prepare()
        start = world.each(lambda: _load(this, resume_step) if begun.resumed else work.first(this.optimizer))
        elapsed_s = world.first(lambda: cut_back(folder / "metrics.jsonl", start.step))
        tracking = trackers(folder, tensorboard=train.tensorboard, wandb=train.wandb) if world.rank == 0 else ()
        with Recorder(folder, steps=train.steps, elapsed_s=elapsed_s, rank=world.rank, trackers=tracking) as recorder:
            _say_what_begins(this, recorder, begun.notes, start.step)
            with Stopping() as stopping:
                try:
                    reached = _train(this, recorder, stopping, start, live)
                except UserError:
                    this.keeper.leave()
                    raise
                this.keeper.finish()  # within: a signal sent twice must not end the writing
            if reached.step < train.steps:
                raise Stopped(
                    f"{stopping.name or 'another rank'}: stopped after step {reached.step} of {train.steps}; the "
                    "checkpoint is written: go on with the same command and --resume"
                    if world.rank == 0
                    else ""
                )
            return _finish(this, recorder, reached)


@dataclass(frozen=True)
class _This:
    """All that a run is made of, on this rank."""

    config: RunConfig | TuneConfig
    folder: Path
    world: World
    work: Work
    optimizer: Optimizer
    guard: Guard
    checkpoints: Checkpoints
    keeper: Keeper

    @property
    def train(self) -> TrainSection:
        return self.config.train


def _check_seen(folder: Path, world: World) -> None:
    def look() -> None:
        if not (folder / "tokenizer").is_dir():
            raise UserError(
                f"rank {world.rank} does not see {folder / 'tokenizer'}: a run folder must be whole, and on a file "
                "system that all ranks share"
            )

    world.each(look)


def _assembled(folder: Path, world: World, begun: Begun, work: Work) -> _This:
    train = begun.config.train
    optimizer = Optimizer(
        work.model,
        betas=train.betas,
        eps=train.eps,
        weight_decay=train.weight_decay,
        dtype=work.dtype,
        ema_decay=train.ema_decay,
    )
    guard = Guard(
        world.device,
        stop=train.on_non_finite == "stop",
        skip_spikes=train.on_spike == "skip",
        deviations=train.spike_deviations,
    )
    checkpoints = Checkpoints(
        folder / "checkpoints",
        keep_last=train.keep_last,
        milestone_every=train.milestone_every,
        every=train.checkpoint_every,
    )
    keeper = Keeper(
        checkpoints,
        world,
        work.form,
        optimizer,
        guard,
        tokenizer=work.tokenizer.fingerprint,
        attempt=begun.attempt,
        asynchronous=train.async_checkpoints,
    )
    return _This(begun.config, folder, world, work, optimizer, guard, checkpoints, keeper)


def _load(this: _This, step: int | None) -> loop.Reached:
    """Put a run where its checkpoint was; at the beginning, where it was stopped before the first one."""
    if not this.checkpoints.steps() and step is None:
        return this.work.first(this.optimizer)
    state = this.keeper.load(step)
    this.work.restore(state.stream)
    return loop.Reached(state.step, state.tokens)


def _train(this: _This, recorder: Recorder, stopping: Stopping, start: loop.Reached, live: Live | None) -> loop.Reached:
    train, world, work = this.train, this.world, this.work
    peak = world.first(lambda: gemm_flops_per_s(work.dtype, world.device))
    settings = loop.LoopSettings(
        steps=train.steps,
        usual_weight=work.reckoning.usual_weight,
        clip_norm=train.clip_norm,
        log_every=train.log_every,
        checkpoint_every=train.checkpoint_every,
        flops_per_token=work.reckoning.flops_per_token,
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
    samples = probes.samples(
        work.tokenizer,
        dict(zip(train.sample_prompts, work.prompts(), strict=True)),
        world,
        every=train.sample_every,
        steps=train.steps,
        max_tokens=train.sample_tokens,
        seed=this.config.seed,
    )
    with work.steps() as steps:
        return loop.run(
            work.model,
            this.optimizer,
            schedule,
            steps,
            work.loss,
            settings,
            recorder,
            world=world,
            guard=this.guard,
            keep=this.keeper,
            probes=[*work.probes(), samples, *([live(world, work.tokenizer)] if live else [])],
            asked_to_stop=stopping,
            start=start,
        )


def _finish(this: _This, recorder: Recorder, reached: loop.Reached) -> dict[str, Any]:
    """Average the last checkpoints, compare, and write the model folders and summary.json."""
    train, world, work, optimizer = this.train, this.world, this.work, this.optimizer
    scores: dict[str, dict[str, float]] = {}

    def score(name: str) -> None:
        scores[name] = work.score()

    def write(folder: str, read: Callable[[str], Tensor], name: str) -> None:
        """On rank 0, which needs no other for it: checkpoints are files."""
        card = work.card(reached.step, reached.tokens, scores.get(name, {}))
        world.first(lambda: work.write_model(this.folder / folder, read, card))

    def average(steps: list[int]) -> Average:
        return world.each(lambda: Average(this.checkpoints, steps, share=(world.rank, world.size)))

    name, best = "last", average([reached.step])
    score(name)
    if train.ema_decay:
        optimizer.load_weights(optimizer.ema.__getitem__)
        score("exponential average")
        kept = world.each(lambda: this.checkpoints.open(reached.step, share=(world.rank, world.size)))
        write("model-ema", lambda key: kept.read_optimizer(f"ema.{key}"), "exponential average")
    steps = this.checkpoints.due()[-min(train.average_last, train.keep_last) :] if train.average_last else []
    if len(steps) > 1:
        write("model-last", best.read, name)
        name, best = "averaged", average(steps)
        recorder.say(f"averaged the checkpoints of steps {', '.join(map(str, best.steps))}")
    if len(steps) > 1 or train.ema_decay:
        optimizer.load_weights(lambda key: best.read(key, *world.part(optimizer.shapes[key])))
        score(name)
    write("model", best.read, name)
    prompts = work.prompts()[:1]
    texts = probes.write(work.model, work.tokenizer, prompts, world, train.sample_tokens, this.config.seed)
    world.barrier()
    if world.rank:
        return {}
    summary: dict[str, Any] = {
        "steps": train.steps,
        "tokens": reached.tokens,
        "elapsed_s": recorder.elapsed_s,
        **work.summary({name: found for name, found in scores.items() if found}),
    }
    if prompts:
        summary["sample"] = {"prompt": train.sample_prompts[0], "text": texts[0]}
    write_json(this.folder / "summary.json", summary)
    return summary


def _say_what_begins(this: _This, recorder: Recorder, notes: list[str], step: int) -> None:
    world, work, form = this.world, this.work, this.work.form
    if world.size > 1 and all(os.environ.get(name, "0") not in ("0", "False") for name in UNSOUND_RESTARTS):
        recorder.say(
            "torchrun's restarts may find the addresses of the ranks before them, and hang: set "
            "TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 where it runs (docs/launch.md)"
        )
    for note in notes:
        recorder.say(note)
    parameters = f"{form.config.num_parameters():,} parameters in {form.config.num_transformer_layers} layers"
    if form.adapter is not None:
        trained = sum(torch.Size(shape).numel() for shape in form.shapes.values())
        parameters = f"{trained:,} parameters beside {parameters}"
    recorder.say(
        f"{this.config.name}: {parameters}, {this.train.steps:,} steps of {work.reckoning.seen}, "
        f"{str(work.dtype).removeprefix('torch.')} on "
        + (f"{world.size} ranks of {world.device.type}" if world.size > 1 else str(world.device))
        + (f", from step {step}" if step else "")
    )
