"""Twins of a model: as many parameters and training FLOPs, spread over the layers in another way.

The paper scales the layers (section 2.1) and compares with other people's models; what it changes against a model of
its own with alike layers, it does not say. Twins differ in nothing else, so that the question can be asked.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import pairwise, product
from typing import Any, Literal, NamedTuple

from openelm.errors import UserError
from openelm.model.geometry import ModelConfig, Multiplier

Shape = Literal["scaled", "reversed", "alike"]

ALPHA, BETA = (0.5, 1.0), (0.5, 4.0)  # from the first layer to the last, in all released sizes
WITHIN = 0.005
NEAR = 0.002  # steps in which FFN widths that are not alike are scaled


@dataclass(frozen=True)
class Kind:
    """How the layers of a twin are scaled, and what else is another than in its model."""

    about: str
    attention: Shape
    ffn: Shape
    changes: dict[str, Any] = field(default_factory=dict)


KINDS = {
    "layer-wise": Kind("heads and FFN widths grow with depth, as the paper has them", "scaled", "scaled"),
    "uniform": Kind("all layers alike, as far as whole groups of heads allow", "alike", "alike"),
    "reversed": Kind("heads and FFN widths shrink with depth", "reversed", "reversed"),
    "attention": Kind("heads grow with depth, FFNs are alike", "scaled", "alike"),
    "ffn": Kind("FFN widths grow with depth, heads are alike as far as whole groups allow", "alike", "scaled"),
    "layer-norm": Kind(
        "layer-wise, LayerNorm without bias", "scaled", "scaled", {"normalization_layer_name": "layer_norm"}
    ),
    "no-qk-norm": Kind(
        "layer-wise, queries and keys not normalised", "scaled", "scaled", {"normalize_qk_projections": False}
    ),
    "llama": Kind(
        "uniform, a key/value head for every query head, queries and keys not normalised",
        "alike",
        "alike",
        {"normalize_qk_projections": False, "num_gqa_groups": 1},
    ),
}


class Difference(NamedTuple):
    """Of a twin to its model, as shares of the model's: 0.001 is a thousandth more."""

    parameters: float
    flops: float

    @property
    def size(self) -> float:
        """The larger of the two, whichever its sign."""
        return max(abs(self.parameters), abs(self.flops))

    def __str__(self) -> str:
        return f"parameters {self.parameters:+.2%}, training FLOPs a token {self.flops:+.2%}"


def difference(twin: ModelConfig, model: ModelConfig, row_length: int | None = None) -> Difference:
    """How far a twin is from its model; FLOPs in rows of ``row_length`` (by default of the model's context)."""
    length = row_length or model.max_context_length
    flops = twin.train_flops_per_token(length) / model.train_flops_per_token(length)
    return Difference(twin.num_parameters() / model.num_parameters() - 1, flops - 1)


def twin(model: ModelConfig, kind: str, *, row_length: int | None = None, within: float = WITHIN) -> ModelConfig:
    """The twin of that kind whose parameters and training FLOPs are the model's ``within`` a share.

    UserError, with the nearest that there is, where nothing comes so near; and for an unknown kind.
    """
    found = nearest(model, kind, row_length=row_length, within=within)
    off = difference(found, model, row_length)
    if off.size <= within:
        return found
    raise UserError(
        f"no {kind} twin of {model.num_parameters():,} parameters is within {100 * within:.4g}%: the nearest has "
        f"{found.num_parameters():,} ({off}), with {min(found.num_query_heads)} to {max(found.num_query_heads)} heads "
        f"and FFNs of {min(found.ffn_dims):,} to {max(found.ffn_dims):,}: allow more, or take another head_dim, more "
        "layers or a wider model"
    )


def nearest(model: ModelConfig, kind: str, *, row_length: int | None = None, within: float = WITHIN) -> ModelConfig:
    """As ``twin``; where nothing comes so near, the nearest that there is.

    Of the steps in which FFN widths can be chosen, the widest that comes so near is taken, and in these the nearest.
    Where heads that are alike in all layers come nowhere near, some layers have one group more, evenly spread.
    """
    if kind not in KINDS:
        near = difflib.get_close_matches(kind, KINDS, n=1, cutoff=0.0)[0]
        raise UserError(f"kind {kind!r} is not one of {', '.join(KINDS)}: did you mean {near}?")

    def distance(candidate: ModelConfig) -> float:
        return difference(candidate, model, row_length).size

    tried = []
    for alphas, divisor in product(_alphas(model, KINDS[kind]), _divisors(model)):
        found = min(_candidates(model, KINDS[kind], alphas, divisor, row_length), key=distance)
        if distance(found) <= within:
            return found
        tried.append(found)
    return min(tried, key=distance)


def model_section(model: ModelConfig) -> dict[str, Any]:
    """The fields that tell twins apart, as a recipe's ``model`` has them; those of all models are left out."""
    names = ["model_dim", "num_transformer_layers", "head_dim", "num_gqa_groups", "qkv_multipliers"]
    names += ["ffn_multipliers", "ffn_dim_divisor", "normalize_qk_projections", "normalization_layer_name"]
    fields = model.as_dict()
    return {name: fields[name] for name in names}


def _divisors(model: ModelConfig) -> Iterator[int]:
    """Steps of an FFN's width: the model's own, and its halves."""
    divisor = model.ffn_dim_divisor
    yield divisor
    while divisor % 2 == 0:
        divisor //= 2
        yield divisor


def _alphas(model: ModelConfig, kind: Kind) -> Iterator[Multiplier]:
    """Widths of attention of that kind: where it is alike, the next to the model's mean, then a mixture of both."""
    if kind.attention != "alike":
        yield ALPHA if kind.attention == "scaled" else ALPHA[::-1]
        return
    group = kind.changes.get("num_gqa_groups", model.num_gqa_groups)
    groups, layers = round(sum(model.num_query_heads) / group), model.num_transformer_layers
    one = group * model.head_dim / model.model_dim
    fewer, more = divmod(groups, layers)
    for count in sorted((max(1, fewer), fewer + 1), key=lambda count: abs(count * layers - groups)):
        yield one * count
    if fewer and more:
        # Rounded to the nearest and not down, so that neither end of the model has more of the odd ones.
        upto = [(2 * layer * more + layers) // (2 * layers) for layer in range(layers + 1)]
        yield tuple(one * (fewer + after - before) for before, after in pairwise(upto))


def _candidates(
    model: ModelConfig, kind: Kind, alphas: Multiplier, divisor: int, row_length: int | None
) -> Iterator[ModelConfig]:
    """Models of that kind about as large, with FFNs in steps of ``divisor``."""
    changes = {**kind.changes, "qkv_multipliers": alphas, "ffn_dim_divisor": divisor}

    def made(multipliers: Multiplier) -> ModelConfig:
        return model.changed(**changes, ffn_multipliers=multipliers)

    def lacks(multipliers: Multiplier) -> float:
        """Both differences grow with the widths; nearest is where they cancel, one as much above as the other below."""
        return -sum(difference(made(multipliers), model, row_length))

    if kind.ffn == "alike":
        one, two = (divisor * n / model.model_dim for n in (1, 2))
        steps = 1 + max(0, int(lacks(one) / (lacks(one) - lacks(two))))
        for width in (steps * divisor, (steps + 1) * divisor):
            yield made(width / model.model_dim)
        return

    low, high = BETA if kind.ffn == "scaled" else BETA[::-1]

    def scaled(scale: float) -> tuple[float, float]:
        return round(low * scale, 4), round(high * scale, 4)

    least, most = 0.0, 2.0
    while lacks(scaled(most)) > 0:
        most *= 2
    while most - least > NEAR / 10:
        middle = (least + most) / 2
        least, most = (middle, most) if lacks(scaled(max(middle, NEAR))) > 0 else (least, middle)
    # As the paper has it, where that is as near as any; widths grow in steps, so some scales around are tried too.
    for scale in (1.0, *(most + NEAR * step for step in range(-20, 21))):
        if scale >= NEAR:
            yield made(scaled(scale))
