"""Tuning as a job: examples or pairs of answers, a model that is there, and all of its weights or an adapter."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from openelm.data import instructions
from openelm.data.chat import CHAT_TEMPLATE, HANDBOOK_TEMPLATE, encode_chat
from openelm.data.example_stream import once
from openelm.data.loader import Step
from openelm.data.pairs import Example, Pair
from openelm.data.tokenizer import Tokenizer
from openelm.errors import UserError
from openelm.files import disk_errors_named, remove_drafts, whole_folder
from openelm.interop import transformers_folder
from openelm.interop.adapter import write_adapter
from openelm.interop.card import tuned_card
from openelm.interop.target import Format
from openelm.model.transformer import OpenELM
from openelm.train import loop, parts
from openelm.train.form import Form
from openelm.train.optim import Optimizer
from openelm.train.parallel import World, build, pick_device
from openelm.train.run import Begun, Live, Reckoning, run
from openelm.train.run_folder import check_start, create
from openelm.tune import adapters
from openelm.tune.beginning import (
    Opened,
    account,
    check_same,
    example_steps,
    open_all,
    reference_place,
    remarks,
    steps_begun,
)
from openelm.tune.preference import preference_loss
from openelm.tune.reference import reference_log_probs
from openelm.tune.validation import evaluate_examples, evaluate_preferences
from openelm.tuning_config import TuneConfig


def tune(
    config: TuneConfig,
    folder: Path,
    *,
    resume: bool | None,
    resume_step: int | None = None,
    overwrite: bool = False,
    live: Live | None = None,
) -> dict[str, Any]:
    """A tuning run, as ``train.run.run`` says."""
    return run(Tuning(config), folder, resume=resume, resume_step=resume_step, overwrite=overwrite, live=live)


class Tuning:
    """The job of a tuning recipe."""

    def __init__(self, config: TuneConfig) -> None:
        self.config = config
        self._opened: Opened | None = None  # on rank 0, from its beginning

    def begin(self, run: Path, *, resume: bool, overwrite: bool) -> Begun:
        """Open the model, read all examples, and make the run folder, or see that they are those that it began with."""
        # Before anything that takes long; how many steps some epochs are, only the examples can tell.
        begun = steps_begun(run) if resume else 0
        known = self.config.with_steps(begun * self.config.train.global_batch) if begun else self.config
        check_start(run, known, resume=resume, overwrite=overwrite)
        opened = self._opened = open_all(self.config, run / "tokenizer" if resume else None)
        if resume:
            check_same(run, opened)
        if self.config.preference is not None:
            self._make_room(opened)
        config = self.config.with_steps(example_steps(self.config, opened).rows_in(self.config.train.epochs or 0))
        notes = check_start(run, config, resume=resume, overwrite=overwrite)
        if config.adapter and config.adapter.dropout and any("train.micro_batch" in note for note in notes):
            notes.append(
                "dropout is drawn for a micro-batch: with another train.micro_batch it is another from here on"
            )
        if not resume:
            create(run, config, opened.source.config, opened.tokenizer, opened.facts)
        return Begun(config, resume, [*notes, *remarks(config, opened), account(opened)], opened.facts)

    def _make_room(self, opened: Opened) -> None:
        """For the reference's figures: what is computed for long must find its place. What a killed run left goes."""
        cache, key = reference_place(opened, parts.compute_dtype(self.config.train.dtype, pick_device()))
        with disk_errors_named(cache):
            cache.mkdir(parents=True, exist_ok=True)
            remove_drafts(cache, key + ".safetensors", of_the_dead=True)

    def assemble(self, run: Path, world: World, begun: Begun) -> Tuned:
        """The model with its first weights, an adapter in it."""
        config = begun.config
        assert isinstance(config, TuneConfig)
        opened = self._opened or open_all(config, run / "tokenizer")
        self._opened = None
        if opened.facts != begun.found:
            raise UserError(f"rank {world.rank} reads other examples, or another model, than rank 0: give all the same")
        dtype = parts.compute_dtype(config.train.dtype, world.device)
        return Tuned(config, world, opened, dtype, _build(config, opened, world, dtype))


@dataclass
class Tuned:
    """Tuning on one rank: the Work of train/run.py."""

    config: TuneConfig
    world: World
    opened: Opened
    dtype: torch.dtype
    model: OpenELM
    position: int = 0  # rows that were trained on

    def __post_init__(self) -> None:
        self._held_out = once(
            self.opened.examples.held_out,
            rows=self.config.train.micro_batch,
            row_length=self.config.data.row_length,
            bos_id=self.tokenizer.bos_id,
            fixed=self.config.train.compile,
        )

    def prepare(self) -> None:
        """The losses, and the scores, of the model as it begins; losses of pairs need what that thinks of all pairs."""
        self._make_losses()
        # Of pairs, nothing: against itself a model prefers no answer.
        self._before = self.score() if self.config.preference is None else {}

    def _make_losses(self) -> None:
        if self.config.preference is None:
            self._loss = self._held_out_loss = example_loss(self.config.train.z_loss)
            return
        section, trained_on = self.config.preference, len(self.opened.examples.train)
        reference = _reference(self.config, self.opened, self.world, self.dtype, self.model)
        self._loss, self._held_out_loss = (
            preference_loss(section.loss, section.beta, section.label_smoothing, part)
            for part in (reference[:trained_on], reference[trained_on:])
        )

    @property
    def tokenizer(self) -> Tokenizer:
        """Of the model."""
        return self.opened.tokenizer

    @property
    def form(self) -> Form:
        """The whole model, or an adapter of it."""
        return Form(self.opened.source.config, self.opened.adapter, self.config.model.path)

    @property
    def loss(self) -> loop.LossFunction:
        """Of examples, or of pairs."""
        return self._loss

    @cached_property
    def reckoning(self) -> Reckoning:
        """A step's weight: answers' tokens, or pairs. FLOPs are those of examples of the mean length."""
        config, geometry = self.config, self.opened.source.config
        rows, row_length = config.train.global_batch, config.data.row_length
        items: list[Any] = [*self.opened.examples.train]
        examples = [example for item in items for example in _examples_of(item)]
        flops = geometry.train_flops_per_token(sum(len(example.ids) - 1 for example in examples) // len(examples))
        if self.opened.adapter is not None:
            flops -= 2 * geometry.matmul_parameters()  # frozen matrices have no gradient of their own
        if config.preference is not None:
            return Reckoning(rows, flops, f"{rows} pairs of at most {row_length} tokens an answer")
        counted = sum(int(example.counts.sum()) for example in examples)
        a_row = max(1, counted // example_steps(config, self.opened).rows_in(1))
        return Reckoning(rows * a_row, flops, f"{rows} rows of at most {row_length} tokens")

    def restore(self, stream: dict[str, Any]) -> None:
        """Go on behind the rows that a checkpoint has seen."""
        self.position = stream["position"]

    def first(self, optimizer: Optimizer) -> loop.Reached:
        """Step 0."""
        return loop.Reached(0, 0)

    def steps(self) -> AbstractContextManager[Iterable[Step]]:
        """Rows from there on."""
        return example_steps(self.config, self.opened, self.world.rank, self.world.size, self.position)

    def probes(self) -> list[loop.Probe]:
        """Held-out examples, and how many epochs were seen."""
        train = self.config.train
        counting = example_steps(self.config, self.opened)

        def validation(step: int, model: nn.Module, data: Step) -> list[dict[str, Any]]:
            if step % train.validate_every and step != train.steps:
                return []
            found = self.score()
            return [{"kind": "validation", "step": step, **found}] if found else []

        def account(step: int, model: nn.Module, data: Step) -> list[dict[str, Any]]:
            if self.world.rank or (step % train.validate_every and step != train.steps):
                return []
            counting.position = step * train.global_batch
            return [{"kind": "examples", "step": step, **counting.counts()}]

        return [validation, account]

    def score(self) -> dict[str, float]:
        """Loss of the held-out examples; of pairs, rewards and accuracy too."""
        if self.config.preference is None:
            return evaluate_examples(self.model, self._held_out, self.world)
        return evaluate_preferences(self.model, self._held_out, self.world, self._held_out_loss)

    def prompts(self) -> list[list[int]]:
        """As the examples put them: a user's turn, an instruction, or plain text."""
        return [self._prompt(text) for text in self.config.train.sample_prompts]

    def _prompt(self, text: str) -> list[int]:
        if self.opened.examples.chat:
            turn = [{"role": "user", "content": text}]
            empty = self.config.data.empty_system_turn
            return encode_chat(self.tokenizer, turn, empty_system_turn=empty, add_generation_prompt=True)[0]
        instructs = self.config.data.sources[0].format == "commonsense"
        return self.tokenizer.encode(instructions.prompt({"instruction": text}) if instructs else text)

    def card(self, steps: int, tokens: int, score: dict[str, float]) -> str:
        """The README of the tuned model, and of its adapter."""
        return tuned_card(self.config, steps=steps, tokens=tokens, score=score, base_card=self.opened.source.card)

    def write_model(self, folder: Path, read: Callable[[str], Tensor], card: str) -> None:
        """A model folder; of an adapter, its own folder too, and the model with it merged in."""
        opened, form = self.opened, self.form
        template = HANDBOOK_TEMPLATE if self.config.data.empty_system_turn else CHAT_TEMPLATE
        template = template if opened.examples.chat else (opened.source.chat_template or "")
        if form.adapter is None:
            source = replace(opened.source, read=read)
        else:
            adapter_folder = folder.with_name(folder.name.replace("model", "adapter"))
            with whole_folder(adapter_folder, overwrite=True) as draft:
                write_adapter(draft, form.adapter, form.config, read, form.base, card)
                opened.tokenizer.save(draft)
                if template:
                    (draft / "chat_template.jinja").write_text(template, encoding="utf-8")
            source = adapters.merged(opened.source, adapter_folder, untie=True)
        source = replace(source, tokenizer=opened.tokenizer, chat_template=template or None)
        with whole_folder(folder, overwrite=True) as draft:
            transformers_folder.write(draft, source, Format(torch.float32))
            (draft / "README.md").write_text(card, encoding="utf-8")

    def summary(self, scores: dict[str, dict[str, float]]) -> dict[str, Any]:
        """The scores, and what became of the records."""
        before = {"before": self._before} if self._before else {}
        return {"held_out": {**before, **scores}, "examples": self.opened.examples.account}


def _build(config: TuneConfig, opened: Opened, world: World, dtype: torch.dtype) -> OpenELM:
    source, adapter = opened.source, opened.adapter

    def weights(model: OpenELM) -> Iterable[tuple[str, Tensor]]:
        if adapter is None:
            return ((name, source.weight(name)) for name, _ in model.named_parameters())
        return adapters.initial_values(model, adapter, source.weight, config.seed, dtype)

    return build(
        source.config,
        world,
        weights,
        dtype=dtype,
        checkpointing=config.train.activation_checkpointing,
        compile=config.train.compile,
        adapt=(lambda model: None) if adapter is None else partial(adapters.attach, adapter=adapter),
    )


def _reference(config: TuneConfig, opened: Opened, world: World, dtype: torch.dtype, model: OpenELM) -> Tensor:
    """(pairs, 2): of those to train on, then of those held out; from the cache where it was asked before."""
    pairs: Any = [*opened.examples.train, *opened.examples.held_out]
    cache, key = reference_place(opened, dtype)
    return reference_log_probs(
        model,
        pairs,
        world,
        rows=2 * config.train.micro_batch,
        bos_id=opened.tokenizer.bos_id,
        cache=cache,
        key=key,
        base=partial(adapters.switched_off, model),
        length=config.data.row_length if config.train.compile else None,
    )


def _examples_of(item: Example | Pair) -> tuple[Example, ...]:
    return (item.chosen, item.rejected) if isinstance(item, Pair) else (item,)


def example_loss(z_loss: float) -> loop.LossFunction:
    """Cross-entropy of the ids that count, and z-loss, summed."""
    next_token = loop.pretraining_loss(z_loss)

    def loss_fn(model: nn.Module, batch: Any) -> tuple[Tensor, dict[str, Tensor]]:
        if model.training:
            torch.manual_seed(batch.seed)  # dropout is drawn by the rows, whoever computes them and after any resume
        return next_token(model, batch)

    return loss_fn
