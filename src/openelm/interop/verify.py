"""Does what was written compute the same? The source in our engine against the result in the engine it was made for."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor

from openelm.errors import UserError
from openelm.interop.source import Source
from openelm.interop.target import Format, Target
from openelm.model.transformer import OpenELM

ROWS, ROW_LENGTH = 2, 48
# What rounding explains, a few times over (docs/parity.md has the figures). Of a tensor: the root mean square of the
# differences over that of its values. Of the engine's logits, against ours on the weights as written: the same, over
# their spread; llama.cpp keeps keys and values in 16 bits, and rounds activations to 8 where weights are quantised.
WEIGHTS = {"": 1e-2, "8": 2e-2, "5": 0.15, "4": 0.3}
ENGINE = {"float32": 1e-3, "16 bit": 5e-2, "quantised": 1e-1}


@dataclass(frozen=True)
class Difference:
    """Between logits of the same rows."""

    largest_difference: float  # of any logit
    argmax_agreement: float  # share of positions where the likeliest token is the same
    relative_error: float  # root mean square of the differences, over the spread of the expected ones
    positions: int


@dataclass(frozen=True)
class Agreement(Difference):
    """How near an engine is, with what was written, to the source in ours; and how near to the same weights in ours."""

    engine: str
    weight_error: float  # of the tensor that was rounded most: root mean square, over that of its values
    engine_error: float  # relative error on the weights as they were written

    def __str__(self) -> str:
        return (
            f"{self.engine} agrees: largest logit difference {self.largest_difference:.2g} "
            f"({self.relative_error:.2%} of their spread), the same argmax at {self.argmax_agreement:.1%} of "
            f"{self.positions} positions; on the weights as written it is {self.engine_error:.2%} off"
        )


def verify(source: Source, target: Target, form: Format, written: Path) -> Agreement:
    """Compare on random ids. UserError where anything differs by more than rounding explains, or without the engine."""
    rows = some_rows(source)
    # Asked first: where the engine is missing, there is no need to compute anything.
    found = target.logits(written, rows.tolist())[..., : source.config.vocab_size]
    stored = target.stored(written)
    if _computed_by(stored) != _computed_by(source):
        raise UserError(f"{written} has another geometry than {source.origin}: please report this")
    worst, rounding = max(
        ((name, weight_error(source.weight(name), stored.weight(name))) for name in source.shapes),
        key=lambda pair: pair[1],
    )
    allowed = WEIGHTS[next((bits for bits in ("8", "5", "4") if bits in form.quantize), "")]
    _refuse_above(allowed, rounding, f"{worst} came back otherwise than it was written")
    engine_error = compare(reference_logits(stored, rows), found).relative_error
    _refuse_above(engine_bound(form, target.engine), engine_error, f"{target.engine} computes something else from it")
    difference = compare(reference_logits(source, rows), found)
    return Agreement(**asdict(difference), engine=target.engine, weight_error=rounding, engine_error=engine_error)


def _computed_by(source: Source) -> tuple[object, ...]:
    """What of a geometry the tensors' shapes do not say, and logits depend on."""
    return source.shapes, source.config.rope_freq_constant, source.config.num_query_heads, source.config.num_kv_heads


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


def compare(expected: Tensor, found: Tensor) -> Difference:
    """Of two (B, T, V) tensors of logits."""
    assert expected.shape == found.shape, f"{tuple(expected.shape)} and {tuple(found.shape)}"
    return Difference(
        largest_difference=(found - expected).abs().max().item(),
        argmax_agreement=(found.argmax(-1) == expected.argmax(-1)).float().mean().item(),
        relative_error=_share(_rms(found - expected), expected.std().item()),
        positions=expected.shape[0] * expected.shape[1],
    )


def weight_error(expected: Tensor, found: Tensor) -> float:
    """Root mean square of the differences, over that of the expected values."""
    return _share(_rms(found.float() - expected.float()), _rms(expected.float()))


def _rms(values: Tensor) -> float:
    return values.square().mean().sqrt().item()


def _share(part: float, whole: float) -> float:
    """A model of zeros has no spread; then any difference counts as it is."""
    return part / (whole or 1.0)


def engine_bound(form: Format, engine: str) -> float:
    """How far an engine's logits may be from ours on the same weights."""
    if form.quantize and engine == "llama.cpp":
        return ENGINE["quantised"]
    exact = form.dtype == torch.float32 and engine != "llama.cpp"
    return ENGINE["float32" if exact else "16 bit"]


def _refuse_above(bound: float, error: float, what: str) -> None:
    if not error <= bound:
        raise UserError(
            f"{what}: off by {error:.2%}, of which {bound:.1%} may be rounding; it was not kept: please report this"
        )
