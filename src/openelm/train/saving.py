"""Saving beside training: a step waits for the copying of its tensors, a thread does the rest."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from openelm.model.stored import Slice
from openelm.train.checkpoint import Part


class Saver:
    """Writes parts of checkpoints, one at a time: at once, or in a thread from a copy.

    The copy's buffers stay: they take as much host memory as the part, and only the first save pays for getting it.
    """

    def __init__(self, *, asynchronous: bool) -> None:
        self.asynchronous = asynchronous
        self._buffers: dict[str, Tensor] = {}
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None

    def save(self, part: Part, write: Callable[[Part], None]) -> None:
        """Call ``write`` with the part as it is now, whatever happens to its tensors and state afterwards.

        Waits for the save before, and raises what that one did. ``write`` runs before this returns where saving is not
        asynchronous; what it raises comes out of ``wait`` in either case.
        """
        self.wait()
        if not self.asynchronous:
            self._run(lambda: write(part))
            return
        copied, ready = self._copied(part)

        def work() -> None:
            ready()
            write(copied)

        # Not a daemon: a run that ends lets its last save end first.
        self._thread = threading.Thread(target=self._run, args=(work,), name="checkpoint")
        self._thread.start()

    def done(self) -> bool:
        """Whether nothing is being written."""
        return self._thread is None or not self._thread.is_alive()

    def result(self) -> None:
        """Raise what the last save raised, once; nothing while it is being written."""
        if self.done() and self._error is not None:
            error, self._error = self._error, None
            raise error

    def wait(self) -> None:
        """Return once nothing is being written, or raise what the last save raised."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        self.result()

    def _run(self, work: Callable[[], None]) -> None:
        try:
            work()
        except BaseException as error:
            self._error = error

    def _copied(self, part: Part) -> tuple[Part, Callable[[], None]]:
        """The part in host memory of our own, and what to call before it is read."""
        before, self._buffers = self._buffers, {}
        weights = {name: self._copy(f"weights {name}", piece, before) for name, piece in part.weights.items()}
        optimizer = {name: self._copy(f"optimizer {name}", piece, before) for name, piece in part.optimizer.items()}
        # Through JSON, as it will be written: what cannot be is said here, in the step that made it.
        state = json.loads(json.dumps(part.state))
        devices = {p.tensor.device for p in (*part.weights.values(), *part.optimizer.values()) if p.tensor.is_cuda}
        # The copies are behind these events on each device, and the next update behind the copies.
        events = [torch.cuda.current_stream(device).record_event() for device in devices]

        def ready() -> None:
            for event in events:
                event.synchronize()

        return replace(part, weights=weights, optimizer=optimizer, state=state), ready

    def _copy(self, key: str, piece: Slice, before: dict[str, Tensor]) -> Slice:
        tensor, buffer = piece.tensor.detach(), before.get(key)
        if buffer is None or buffer.shape != tensor.shape or buffer.dtype != tensor.dtype:
            # Only pinned memory is copied to without the host waiting.
            buffer = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=tensor.is_cuda)
        self._buffers[key] = buffer.copy_(tensor, non_blocking=tensor.is_cuda)
        return replace(piece, tensor=buffer)
