"""The mean of several checkpoints' weights: a better model than the last one alone (paper, Fig. 1)."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from torch import Tensor

from openelm.errors import UserError
from openelm.model.geometry import ModelConfig
from openelm.train.checkpoint import Checkpoints, check_geometry, open_checkpoint
from openelm.train.form import Form

EMA = "ema."  # what the optimizer tensors of an exponential average begin with


class Average:
    """The mean of the checkpoints of ``steps``, read a tensor at a time, whoever wrote its rows.

    Each is verified first (of several ranks, each looks at its ``share`` = (rank, ranks) of the files). Raises
    UserError where one is damaged, of another geometry than the last, or of another adapter.
    """

    def __init__(self, checkpoints: Checkpoints, steps: Sequence[int], *, share: tuple[int, int] = (0, 1)) -> None:
        self.steps = list(steps)
        self._opened = [open_checkpoint(checkpoints.path(step), share=share) for step in self.steps]
        self.form: Form = self._opened[-1].form
        self.config: ModelConfig = self.form.config
        for opened in self._opened:
            check_geometry(self.config, opened.path)
            if opened.form.adapter != self.form.adapter:
                raise UserError(
                    f"{opened.path} holds {opened.form.adapter or 'a whole model'}, and {self._opened[-1].path} "
                    f"{self.form.adapter or 'a whole model'}: they have no mean; average checkpoints of one run"
                )

    def read(self, name: str, first_row: int = 0, rows: int | None = None) -> Tensor:
        """Rows of a mean weight in fp32; summed in fp64."""
        total: Tensor | None = None
        for opened in self._opened:
            tensor = opened.read_weight(name, first_row, rows)
            total = tensor.double() if total is None else total.add_(tensor)
        assert total is not None
        return total.div_(len(self._opened)).float()


def exponential_average(checkpoints: Checkpoints, step: int) -> tuple[Form, Callable[[str], Tensor]]:
    """(form, what reads an fp32 weight) of the exponential average that the run kept up to ``step``.

    Raises UserError where the checkpoint is damaged or holds none.
    """
    opened = open_checkpoint(checkpoints.path(step))
    shapes = opened.form.shapes
    kept = {name: shape for name in shapes if (shape := opened.optimizer_shapes.get(EMA + name)) is not None}
    if not kept:
        raise UserError(
            f"{opened.path} holds no exponential average: it is kept where train.ema_decay is set; leave out --ema to "
            "average checkpoints"
        )
    for name, shape in shapes.items():
        if kept.get(name) != shape:
            raise UserError(f"{opened.path}: {EMA}{name} has shape {kept.get(name)}, but config.json gives {shape}")
    return opened.form, lambda name: opened.read_optimizer(EMA + name).float()


def newest(checkpoints: Checkpoints, steps: Sequence[int], last: int) -> list[int]:
    """The newest ``last`` of ``steps``; UserError where there are fewer."""
    if last < 1 or len(steps) < last:
        raise UserError(
            f"{checkpoints.folder} has {len(steps)} checkpoints, not {last}: average {len(steps)} with --last "
            f"{len(steps)}, or keep more with train.keep_last"
        )
    return list(steps[-last:])


def newest_in_a_row(steps: Sequence[int], most: int, spacing: int | None) -> list[int]:
    """The newest of ``steps``, at most ``most``, back to a gap of more than ``spacing``.

    A milestone from long before the last ones is left out so; a last checkpoint that follows closely is not.
    """
    chosen = list(steps[-1:])
    for step in reversed(steps[:-1]):
        if len(chosen) == most or (spacing and chosen[0] - step > spacing):
            break
        chosen.insert(0, step)
    return chosen
