"""Pre-training as a job: text, a model with its first weights, next-token loss, bits per byte of held-out text."""

from __future__ import annotations

import json
from collections.abc import Callable
from contextlib import AbstractContextManager
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
from openelm.files import whole_folder, write_json
from openelm.interop.card import trained_card
from openelm.interop.convert import open_source
from openelm.interop.transformers_folder import complete
from openelm.model.transformer import OpenELM
from openelm.train import loop, parts, probes
from openelm.train.form import Form
from openelm.train.optim import Optimizer
from openelm.train.parallel import World
from openelm.train.run import Begun, Live, Reckoning, run
from openelm.train.run_folder import DATA, check_start, create


def pretrain(
    config: RunConfig,
    folder: Path,
    *,
    resume: bool | None,
    resume_step: int | None = None,
    overwrite: bool = False,
    live: Live | None = None,
) -> dict[str, Any]:
    """A pre-training run, as ``train.run.run`` says."""
    job = Pretraining(config)
    return run(job, folder, resume=resume, resume_step=resume_step, overwrite=overwrite, live=live)


@dataclass(frozen=True)
class Found:
    """What rank 0 has found out for all."""

    units: list[list[Unit]]  # of each source
    held_out: HeldOut
    base_card: str | None  # of the model that the run begins from: it may be gone when the run has ended


class Pretraining:
    """The job of a pre-training recipe."""

    def __init__(self, config: RunConfig) -> None:
        self.config = config

    def begin(self, run: Path, *, resume: bool, overwrite: bool) -> Begun:
        """Find the data, check that everything fits together, and make the run folder."""
        config = self.config
        notes = check_start(run, config, resume=resume, overwrite=overwrite)
        own = run / "tokenizer"
        tokenizer = Tokenizer.load(own) if resume and own.is_dir() else parts.load_tokenizer(config)
        geometry = parts.geometry(config, tokenizer)
        base_card = open_source(config.train.init_from).card if config.train.init_from else None
        units = [find_units(source) for source in parts.sources(config)]
        by_name = {source.name: found for source, found in zip(config.data.sources, units, strict=True)}
        if resume:
            # What was copied since has other times: written down, so that the next resume need not read it again.
            saved = json.loads((run / DATA).read_text(encoding="utf-8"))
            if (found := compare(saved, by_name)) != saved:
                write_json(run / DATA, found)
        else:
            parts.check_sources(config, tokenizer, units)
            create(run, config, geometry, tokenizer, fingerprint(by_name))
        held_out = parts.held_out(config, tokenizer, units)
        if config.data.held_out and not held_out.rows:
            notes.append(
                f"no document was held out (data.held_out={config.data.held_out:g}, decided document by document): "
                "nothing is measured on unseen text; give more documents, or a larger share"
            )
        return Begun(config, resume, notes, Found(units, held_out, base_card))

    def assemble(self, run: Path, world: World, begun: Begun) -> Pretrained:
        """The model with its first weights, and the stream at its first row."""
        config, found = self.config, begun.found
        tokenizer = Tokenizer.load(run / "tokenizer")
        geometry = parts.geometry(config, tokenizer)
        dtype = parts.compute_dtype(config.train.dtype, world.device)
        data = config.data
        return Pretrained(
            config=config,
            world=world,
            tokenizer=tokenizer,
            form=Form(geometry),
            dtype=dtype,
            model=parts.build_model(config, geometry, world, dtype),
            stream=parts.token_stream(config, tokenizer, found.units),
            held_out=found.held_out,
            base_card=found.base_card,
            reckoning=Reckoning(
                config.train.global_batch * data.row_length,
                geometry.train_flops_per_token(data.row_length),
                f"{config.train.global_batch} rows of {data.row_length} tokens",
            ),
        )


@dataclass
class Pretrained:
    """Pre-training on one rank: the Work of train/run.py."""

    config: RunConfig
    world: World
    tokenizer: Tokenizer
    form: Form
    dtype: torch.dtype
    model: OpenELM
    stream: TokenStream
    held_out: HeldOut
    base_card: str | None
    reckoning: Reckoning

    @property
    def loss(self) -> loop.LossFunction:
        """Next-token cross-entropy and z-loss."""
        return loop.pretraining_loss(self.config.train.z_loss)

    def prepare(self) -> None:
        """Nothing: its weights are drawn, or another's."""

    def restore(self, stream: dict[str, Any]) -> None:
        """Put the stream where a checkpoint was."""
        self.stream.restore(stream)

    def first(self, optimizer: Optimizer) -> loop.Reached:
        """Step 0, or the moments and the step of the training state that the run names.

        Its rows are the first in any case: where others were in their data, no file of theirs says.
        """
        if not self.config.train.init_optimizer:
            return loop.Reached(0, 0)
        state = parts.training_state(self.config)
        optimizer.load_state(lambda key: state.read(key, *self.world.part(state.shape(key))))
        return loop.Reached(state.step, 0)

    def steps(self) -> AbstractContextManager[Loader]:
        """Rows from where the stream stands."""
        train, world = self.config.train, self.world
        return Loader(
            self.stream,
            global_batch=train.global_batch,
            rows=train.micro_batch,
            rank=world.rank,
            ranks=world.size,
            workers=self.config.data.workers,
        )

    def probes(self) -> list[loop.Probe]:
        """Held-out text, and the account of the documents."""
        train, world = self.config.train, self.world
        every, steps = train.validate_every, train.steps
        return [
            probes.validation(self.held_out, world, every=every, steps=steps, rows=train.micro_batch),
            probes.data_account(world, every=every, steps=steps),
        ]

    def score(self) -> dict[str, float]:
        """Bits per byte of the held-out text."""
        if not self.held_out.rows:
            return {}
        found = probes.evaluate(self.model, self.held_out, self.world, self.config.train.micro_batch)
        return {"bits_per_byte": found["bits_per_byte"]}

    def prompts(self) -> list[list[int]]:
        """Plain text, to be continued."""
        return [self.tokenizer.encode(prompt) for prompt in self.config.train.sample_prompts]

    def card(self, steps: int, tokens: int, score: dict[str, float]) -> str:
        """The README of a model that this run trained."""
        return trained_card(
            self.config,
            parameters=self.form.config.num_parameters(),
            steps=steps,
            tokens=tokens,
            bits_per_byte=score.get("bits_per_byte"),
            base_card=self.base_card,
        )

    def write_model(self, folder: Path, read: Callable[[str], Tensor], card: str) -> None:
        """A model folder."""
        with whole_folder(folder, overwrite=True) as draft:
            self.form.write(draft, read)
            self.tokenizer.save(draft)
            (draft / "README.md").write_text(card, encoding="utf-8")
            complete(draft)

    def summary(self, scores: dict[str, dict[str, float]]) -> dict[str, Any]:
        """Bits per byte, beside what needs no model."""
        found = {name: score["bits_per_byte"] for name, score in scores.items()}
        if self.held_out.rows:
            found["order-0 bytes"] = order_0_bits_per_byte(self.held_out.texts)
            found["xz -9"] = xz_bits_per_byte(self.held_out.texts)
        return {"bits_per_byte": found}
