"""Tasks measured on the weights as they train: a probe, which changes nothing of the training."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from torch import nn

from openelm.config import RunConfig
from openelm.data.loader import Step
from openelm.data.tokenizer import Tokenizer
from openelm.errors import UserError
from openelm.evaluate import harness, tasks
from openelm.infer.engine import Engine
from openelm.model.transformer import OpenELM
from openelm.train.loop import Probe
from openelm.train.parallel import World, gathered
from openelm.train.probes import evaluating
from openelm.tuning_config import TuneConfig


def live(config: RunConfig | TuneConfig) -> Callable[[World, Tokenizer], Probe] | None:
    """A probe of ``train.evaluate_tasks`` every ``train.evaluate_every`` steps and after the last; None without any.

    The tasks are loaded here, so that what cannot be had is said before the first step.
    """
    train = config.train
    if not train.evaluate_every:
        return None
    data = Path(train.evaluate_data) if train.evaluate_data else None
    loaded = [(spec, tasks.load(spec, data)) for spec in tasks.parse(train.evaluate_tasks)]

    def begun(world: World, tokenizer: Tokenizer) -> Probe:
        def probe(step: int, model: nn.Module, data: Step) -> list[dict[str, Any]]:
            if step % train.evaluate_every and step != train.steps:
                return []
            with gathered(cast(OpenELM, model), world) as whole, evaluating(whole), _unseen():
                if world.rank:
                    return []
                lm = harness.EngineLM(Engine(whole, tokenizer))
                try:
                    found = [harness.measure(lm, tasks_, spec, limit=train.evaluate_limit) for spec, tasks_ in loaded]
                except UserError as error:  # a loss that is not finite, say: the guard's matter, and not the end
                    return [{"kind": "evaluation", "step": step, "problem": str(error)}]
            return [
                {
                    "kind": "evaluation",
                    "step": step,
                    "task": result.task,
                    "shots": result.shots,
                    "examples": result.examples,
                    **result.metrics,
                }
                for result in found
            ]

        return probe

    return begun


@contextmanager
def _unseen() -> Iterator[None]:
    """Random numbers go on afterwards as if nobody had drawn any."""
    states = random.getstate(), np.random.get_state(), torch.get_rng_state()
    try:
        yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])
        torch.set_rng_state(states[2])
