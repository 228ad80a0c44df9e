"""Pieces of token ids -> rows of row_length + 1 ids, and rows -> the arrays that a model trains on.

Shapes: B rows, T row length.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    import torch

Ids = NDArray[np.int32]
IGNORE = -100


@dataclass(frozen=True)
class Batch:
    """Inputs and next-token targets, (B, T) int64; targets of -100 count nothing.

    ``segments`` numbers the pieces of each row, where attention is to stay within them.
    """

    tokens: NDArray[np.int64]
    targets: NDArray[np.int64]
    segments: NDArray[np.int64] | None = None

    def tensors(self, device: torch.device | str) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
        """The arrays as tensors on ``device``, which the host does not wait for."""
        import torch  # here, because workers that make rows start without it

        def there(array: NDArray[np.int64]) -> torch.Tensor:
            tensor = torch.from_numpy(array)
            if torch.device(device).type == "cuda":
                tensor = tensor.pin_memory()
            return tensor.to(device, non_blocking=True)

        return there(self.tokens), there(self.targets), None if self.segments is None else there(self.segments)

    def as_plain(self) -> dict[str, list[list[int]]]:
        """The arrays as lists, for a file."""
        arrays = {"tokens": self.tokens, "targets": self.targets, "segments": self.segments}
        return {name: array.tolist() for name, array in arrays.items() if array is not None}

    @classmethod
    def from_plain(cls, plain: dict[str, list[list[int]]]) -> Batch:
        """The batch that ``as_plain`` gave."""
        return cls(**{name: np.array(rows, dtype=np.int64) for name, rows in plain.items()})

    def weight(self) -> int:
        """What the loss, summed over the batch, is divided by: the targets that count."""
        return int((self.targets != IGNORE).sum())

    def size(self) -> int:
        """Tokens that were read, padding left out."""
        return self.weight()

    def counted(self) -> int | None:
        """The number of targets that count, where the model should know it since many do not; here nearly all do."""
        return None


@dataclass(frozen=True)
class Packing:
    """How pieces become rows.

    ``pad``: the first row_length + 1 ids of a piece, the rest dropped (the paper). ``pack``: pieces joined and cut
    into rows that overlap by one id, so that each id is a target once. A BOS is a target only if ``cross_pieces``.
    """

    row_length: int
    mode: str = "pack"
    cross_pieces: bool = False
    separate_pieces: bool = False

    def take_rows(self, remainder: Ids, piece: Sequence[int]) -> tuple[list[Ids], Ids]:
        """Rows that are complete once ``piece`` follows ``remainder``, and what is left over."""
        ids = np.asarray(piece, dtype=np.int32)
        T = self.row_length
        if self.mode == "pad":
            return [ids[: T + 1]], remainder
        ids = np.concatenate((remainder, ids))
        count = max(0, (len(ids) - 1) // T)
        return [ids[i * T : i * T + T + 1] for i in range(count)], ids[count * T :]

    def targets(self, piece: Sequence[int]) -> int:
        """Targets that ``piece`` brings: all its ids but the BOS, as far as they are served."""
        length = min(len(piece), self.row_length + 1) if self.mode == "pad" else len(piece)
        return length if self.cross_pieces else length - 1

    def batch(self, rows: Sequence[Ids], bos_id: int) -> Batch:
        """Rows of at most row_length + 1 ids as arrays; short ones are padded with BOS, which the loss ignores."""
        full = np.full((len(rows), self.row_length + 1), bos_id, dtype=np.int64)
        targets = np.full((len(rows), self.row_length), IGNORE, dtype=np.int64)
        for i, row in enumerate(rows):
            full[i, : len(row)] = row
            targets[i, : len(row) - 1] = row[1:]
        if not self.cross_pieces:
            targets[targets == bos_id] = IGNORE
        tokens = full[:, :-1]
        segments = np.cumsum(tokens == bos_id, axis=1) if self.separate_pieces else None
        return Batch(tokens, targets, segments)
