"""A run's checkpoints while it runs: what of each rank goes in, when it is durable, and how it comes back."""

from __future__ import annotations

from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from openelm.data.loader import Step
from openelm.data.stream_state import merge_states
from openelm.errors import Stopped, UserError
from openelm.train.checkpoint import Checkpoints, Part, Slice, check_geometry, random_state
from openelm.train.form import Form
from openelm.train.guard import Guard
from openelm.train.optim import Optimizer
from openelm.train.parallel import World
from openelm.train.saving import Saver


@dataclass(frozen=True)
class Restored:
    """Where a checkpoint puts the run; weights, moments and guard are in their places already."""

    step: int
    tokens: int
    stream: dict[str, Any]


class Keeper:
    """Writes the checkpoints of one run: each rank its own rows, and rank 0 the name, once all are on disk.

    Ranks learn of each other's writing where the loop agrees on everything else, so that nobody waits. With
    ``asynchronous`` the loop goes on while a thread writes; one checkpoint at a time is under way.
    """

    def __init__(
        self,
        checkpoints: Checkpoints,
        world: World,
        form: Form,
        optimizer: Optimizer,
        guard: Guard,
        *,
        tokenizer: str,
        attempt: str,
        asynchronous: bool,
    ) -> None:
        self._checkpoints, self._world, self._form = checkpoints, world, form
        self._optimizer, self._guard = optimizer, guard
        self._tokenizer, self._attempt = tokenizer, attempt
        self._asynchronous = asynchronous
        self._saver = Saver(asynchronous=asynchronous)
        self._unnamed: int | None = None  # the step whose parts are being written

    def save(self, step: int, tokens: int, data: Step) -> None:
        """Write the state behind ``step``, or begin to."""
        self.finish()
        world = self._world
        state: dict[str, Any] = {"stream": data.state()}
        if world.rank == 0:
            state |= {"step": step, "tokens": tokens, "tokenizer": self._tokenizer}
        part = Part(step, self._weights(), self._moments(), state)
        self._unnamed = step
        self._saver.save(
            part, lambda part: self._checkpoints.write_part(self._form, part, world.rank, world.size, self._attempt)
        )
        if not self._asynchronous:
            self.finish()

    def written(self) -> bool:
        """Whether the writing of this rank's part of the last checkpoint is over, well or not."""
        return self._unnamed is None or self._saver.done()

    def all_written(self) -> None:
        """To be called on all ranks when all say so: the checkpoint gets its name.

        UserError: a part could not be written. All ranks then end together, and what was written is deleted: not
        before, since others write to the same folder.
        """
        if self._unnamed is None:
            return
        step, self._unnamed = self._unnamed, None

        def publish() -> None:
            self._checkpoints.publish(step, self._world.size, self._attempt)

        try:
            self._world.each(self._saver.wait)
        except (UserError, Stopped):
            if self._world.rank == 0:
                self._checkpoints.discard(step, self._attempt)
            raise
        self._world.first(publish, patience=self._world.patience)

    def finish(self) -> None:
        """Wait until the checkpoint under way has its name."""
        self.all_written()

    def leave(self) -> None:
        """To be called when an error ends the run: what is being written is still a good checkpoint of an earlier step.

        Of several ranks nobody knows who else is leaving, so none waits: the next start deletes what is left.
        """
        if self._world.size == 1:
            with suppress(UserError):  # the first error is the one to tell
                self.finish()

    def load(self, step: int | None) -> Restored:
        """Put weights, moments and guard where the newest checkpoint (or that of ``step``) has them, and verify it.

        UserError: it is damaged, or of another geometry or tokenizer. Checkpoints after it are deleted.
        """
        world, optimizer = self._world, self._optimizer
        opened = self._checkpoints.open(step, share=(world.rank, world.size))
        check_geometry(self._form.config, opened.path)
        states = opened.states()
        if (there := states[0].get("tokenizer")) != self._tokenizer:
            raise UserError(
                f"{opened.path} was trained with another tokenizer (SHA-256 {str(there)[:12]}…, the run's is "
                f"{self._tokenizer[:12]}…): put the tokenizer of that run back"
            )
        optimizer.load_weights(lambda name: opened.read_weight(name, *world.part(optimizer.shapes[name])))
        optimizer.load_state(lambda name: opened.read_optimizer(name, *world.part(self._shape(name))))
        self._guard.load({name: opened.read_optimizer(name, 0, len(t)) for name, t in self._guard.state().items()})
        opened.restore_random_state()
        if world.rank == 0:
            self._checkpoints.drop_after(opened.step)
            self._checkpoints.drop_old()
        return Restored(opened.step, states[0]["tokens"], merge_states([state["stream"] for state in states]))

    def _weights(self) -> dict[str, Slice]:
        return {name: self._slice(name, self._optimizer.masters[name]) for name in self._own()}

    def _moments(self) -> dict[str, Slice]:
        own = self._own()
        found = {
            key: self._slice(key, tensor)
            for key, tensor in self._optimizer.state().items()
            if _parameter_of(key) in own and (tensor.dim() or self._world.shard == 0)
        }
        if self._world.rank == 0:
            found |= random_state()
            found |= {name: Slice.whole(tensor) for name, tensor in self._guard.state().items()}
        return found

    def _own(self) -> set[str]:
        """Parameters that this rank writes its rows of: replicas, which hold the same, share them out."""
        names = list(self._optimizer.shapes)
        return set(names[self._world.replica :: self._world.replicas])

    def _shape(self, key: str) -> tuple[int, ...]:
        return () if key.endswith(".step") else self._optimizer.shapes[_parameter_of(key)]

    @torch.no_grad()
    def _slice(self, key: str, tensor: Tensor) -> Slice:
        shape = self._optimizer.shapes[_parameter_of(key)] if tensor.dim() else ()
        return Slice(tensor.detach(), self._world.part(shape)[0] if shape else 0, shape)


def _parameter_of(key: str) -> str:
    """The parameter that an optimizer's tensor belongs to: layers.0.ffn.proj_1.weight.exp_avg, ema.norm.weight."""
    for ending in (".step", ".exp_avg", ".exp_avg_sq"):
        key = key.removesuffix(ending)
    return key.removeprefix("ema.")
