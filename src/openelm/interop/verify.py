"""Does what was written compute the same? The source in our engine against the result in the engine it was made for."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from openelm.errors import UserError
from openelm.interop.source import Source
from openelm.interop.target import Format, Target
from openelm.model.transformer import OpenELM

ROWS, ROW_LENGTH = 2, 48
# How far the logits may be off, as a share of their own spread: a few times what the rounding of weights explains
# (docs/parity.md has the figures). llama.cpp keeps keys and values in 16 bits whatever the weights are.
BOUNDS = {"float32": 1e-3, "16 bit": 5e-2, "8 bit": 1e-1, "4 or 5 bit": 1.0}


@dataclass(frozen=True)
class Agreement:
    """Logits of the same rows from two engines."""

    engine: str
    largest_difference: float  # of any logit
    argmax_agreement: float  # share of positions where the likeliest token is the same
    relative_error: float  # root mean square of the differences, over the spread of the logits
    bound: float  # on the relative error
    positions: int

    def __str__(self) -> str:
        return (
            f"{self.engine} agrees: largest logit difference {self.largest_difference:.2g} "
            f"({self.relative_error:.2%} of their spread), the same argmax at {self.argmax_agreement:.1%} of "
            f"{self.positions} positions"
        )


def verify(source: Source, target: Target, form: Format, written: Path) -> Agreement:
    """Compare both on random ids. UserError where they differ by more than rounding explains, or without the engine."""
    rows = some_rows(source)
    # Asked first: where the engine is missing, there is no need to compute anything.
    found = target.logits(written, rows.tolist())
    expected = reference_logits(source, rows)
    result = compare(target.engine, expected, found[..., : expected.shape[-1]], bound_for(form, target.engine))
    if not result.relative_error <= result.bound:
        raise UserError(
            f"{target.engine} computes something else from the result: its logits are off by "
            f"{result.relative_error:.0%} of their spread, of which {result.bound:.1%} may be rounding; the result was "
            "not kept: please report this"
        )
    return result


def some_rows(source: Source) -> Tensor:
    """(ROWS, ROW_LENGTH) ids, always the same for a vocabulary."""
    vocabulary = source.tokenizer.vocab_size if source.tokenizer is not None else source.config.vocab_size
    length = min(ROW_LENGTH, source.config.max_context_length)
    return torch.randint(0, vocabulary, (ROWS, length), generator=torch.Generator().manual_seed(0))


@torch.inference_mode()
def reference_logits(source: Source, rows: Tensor) -> Tensor:
    """(B, T, V) logits of our own model in fp32."""
    with torch.device("meta"):
        model = OpenELM(source.config)
    weights = {name: source.weight(name).to(torch.float32) for name in source.shapes}
    model.load_state_dict(weights, assign=True)
    return model.eval()(rows)


def compare(engine: str, expected: Tensor, found: Tensor, bound: float) -> Agreement:
    """Of two (B, T, V) tensors of logits."""
    assert expected.shape == found.shape, f"{tuple(expected.shape)} and {tuple(found.shape)}"
    difference = (found - expected).float()
    return Agreement(
        engine=engine,
        largest_difference=difference.abs().max().item(),
        argmax_agreement=(found.argmax(-1) == expected.argmax(-1)).float().mean().item(),
        relative_error=(difference.square().mean().sqrt() / expected.float().std()).item(),
        bound=bound,
        positions=expected.shape[0] * expected.shape[1],
    )


def bound_for(form: Format, engine: str) -> float:
    """The bound on the relative error for what was asked to be written."""
    if form.quantize:
        return BOUNDS["8 bit" if "8" in form.quantize else "4 or 5 bit"]
    exact = form.dtype == torch.float32 and engine != "llama.cpp"
    return BOUNDS["float32" if exact else "16 bit"]
