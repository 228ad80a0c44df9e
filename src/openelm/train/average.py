"""The mean of several checkpoints' weights: a better model than the last one alone (paper, Fig. 1)."""

from __future__ import annotations

from pathlib import Path

from torch import Tensor

from openelm.errors import UserError
from openelm.model.folder import load_config
from openelm.model.geometry import ModelConfig
from openelm.train.checkpoint import Checkpoints, read_weights, verify


def average_checkpoints(checkpoints: Checkpoints, last: int) -> tuple[ModelConfig, dict[str, Tensor], list[int]]:
    """(geometry, fp32 mean weights, steps averaged) of the newest ``last`` checkpoints, each verified first.

    Sums are kept in fp64, so that the mean is the correctly rounded one whatever the order. Raises UserError where
    there are fewer, or where one is damaged or of another geometry.
    """
    steps = checkpoints.steps()[-last:]
    if last < 1 or len(steps) < last:
        raise UserError(
            f"{checkpoints.folder} has {len(steps)} checkpoints, not {last}: average {len(steps)} with --last "
            f"{len(steps)}, or keep more with train.keep_last"
        )
    paths: list[Path] = [checkpoints.path(step) for step in steps]
    config, _ = load_config(paths[-1])
    totals: dict[str, Tensor] = {}
    for path in paths:
        verify(path)
        geometry, weights = read_weights(path)
        if geometry != config:
            raise UserError(f"{path} has another geometry than {paths[-1]}: they cannot be averaged")
        for name, tensor in weights.items():
            totals[name] = totals[name].add_(tensor) if name in totals else tensor.double()
    return config, {name: (total / last).float() for name, total in totals.items()}, steps
