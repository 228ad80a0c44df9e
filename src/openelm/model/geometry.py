"""Layer-wise scaling: how wide each layer is, and what that costs (paper, section 2.1, Eq. 1)."""

from __future__ import annotations

import difflib
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields, replace
from typing import Any

from openelm.errors import UserError

Multiplier = float | tuple[float, ...]

# The paper's four sizes (Table 9) and two smaller ones of the same family.
SIZES: dict[str, dict[str, int]] = {
    "30M": dict(model_dim=384, num_transformer_layers=14, head_dim=64, ffn_dim_divisor=64),
    "100M": dict(model_dim=768, num_transformer_layers=14, head_dim=64, ffn_dim_divisor=64),
    "270M": dict(model_dim=1280, num_transformer_layers=16, head_dim=64),
    "450M": dict(model_dim=1536, num_transformer_layers=20, head_dim=64),
    "1.1B": dict(model_dim=2048, num_transformer_layers=28, head_dim=64),
    "3B": dict(model_dim=3072, num_transformer_layers=36, head_dim=128),
}

# Choices that the published folders spell out, and that are not open here.
FIXED = {"ffn_with_glu": True, "activation_fn_name": "swish"}
NORMS = ("rms_norm", "layer_norm")  # the paper's, and one to compare it with

MOST_LAYERS = 1000  # a damaged or hostile file may ask for any number


@dataclass(frozen=True)
class ModelConfig:
    """The architecture, in the field names of the model folder's config.json.

    ``qkv_multipliers`` (alpha) and ``ffn_multipliers`` (beta) are each a number (the same in all layers), a pair
    (min, max) that Eq. 1 spreads over the layers, or one number a layer. Head lists follow from alpha; where they
    are given they must agree with it. Raises UserError with every problem found.
    """

    model_dim: int
    num_transformer_layers: int
    head_dim: int = 64
    num_gqa_groups: int = 4
    qkv_multipliers: Multiplier = (0.5, 1.0)
    ffn_multipliers: Multiplier = (0.5, 4.0)
    ffn_dim_divisor: int = 256
    vocab_size: int = 32000
    max_context_length: int = 2048
    rope_max_length: int = 4096
    rope_freq_constant: float = 10000
    normalize_qk_projections: bool = True
    share_input_output_layers: bool = True
    num_query_heads: tuple[int, ...] = ()
    num_kv_heads: tuple[int, ...] = ()
    bos_token_id: int = 1
    eos_token_id: int = 2
    initializer_range: float = 0.02
    ffn_with_glu: bool = True
    activation_fn_name: str = "swish"
    normalization_layer_name: str = "rms_norm"

    def __post_init__(self) -> None:
        given = {f.name: getattr(self, f.name) for f in fields(self)}
        for name, value in given.items():
            if isinstance(value, list):
                object.__setattr__(self, name, tuple(value))
        problems = self._problems_of_numbers()
        if not problems:
            object.__setattr__(self, "num_query_heads", self._checked_heads(problems))
            kv_heads = tuple(heads // self.num_gqa_groups for heads in self.num_query_heads)
            if given["num_kv_heads"] and tuple(given["num_kv_heads"]) != kv_heads:
                problems.append(
                    f"num_kv_heads={list(given['num_kv_heads'])} must be num_query_heads / num_gqa_groups = "
                    f"{list(kv_heads)}: leave it out, or change num_gqa_groups"
                )
            object.__setattr__(self, "num_kv_heads", kv_heads)
        if problems:
            raise UserError("model: " + "; ".join(problems))

    def _problems_of_numbers(self) -> list[str]:
        problems = []
        for name in (
            "model_dim",
            "num_transformer_layers",
            "head_dim",
            "num_gqa_groups",
            "ffn_dim_divisor",
            "vocab_size",
            "max_context_length",
        ):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                problems.append(f"{name}={value!r} must be a whole number of at least 1")
        if isinstance(self.num_transformer_layers, int) and self.num_transformer_layers > MOST_LAYERS:
            problems.append(f"num_transformer_layers={self.num_transformer_layers} is above the limit of {MOST_LAYERS}")
        for name in ("rope_freq_constant", "rope_max_length", "initializer_range"):
            value = getattr(self, name)
            if not _is_number(value) or not 0 < value < math.inf:
                problems.append(f"{name}={value!r} must be a positive number")
        for name in ("bos_token_id", "eos_token_id"):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < 0:
                problems.append(f"{name}={value!r} must be the id of a token")
        for name in ("normalize_qk_projections", "share_input_output_layers"):
            if not isinstance(getattr(self, name), bool):
                problems.append(f"{name}={getattr(self, name)!r} must be true or false")
        for name in ("num_query_heads", "num_kv_heads"):
            value = getattr(self, name)
            if not isinstance(value, tuple):
                problems.append(f"{name}={value!r} must be a list, one number a layer")
        if isinstance(self.head_dim, int) and self.head_dim % 2:
            problems.append(f"head_dim={self.head_dim} must be even, because RoPE rotates its two halves")
        for name, only in FIXED.items():
            if getattr(self, name) != only:
                problems.append(f"{name}={getattr(self, name)!r} is not built: it must be {only!r}")
        if self.normalization_layer_name not in NORMS:
            problems.append(
                f"normalization_layer_name={self.normalization_layer_name!r} is not built: it must be one of "
                f"{', '.join(NORMS)}"
            )
        for name in ("qkv_multipliers", "ffn_multipliers"):
            value = getattr(self, name)
            numbers = value if isinstance(value, tuple) else (value,)
            allowed = {1, 2, self.num_transformer_layers} if isinstance(value, tuple) else {1}
            if not all(isinstance(v, int | float) and v > 0 and math.isfinite(v) for v in numbers):
                problems.append(f"{name}={value!r} must hold positive numbers")
            elif len(numbers) not in allowed:
                problems.append(
                    f"{name} has {len(numbers)} values: give one number, a pair (min, max), or "
                    f"{self.num_transformer_layers}, one a layer"
                )
        return problems

    def _checked_heads(self, problems: list[str]) -> tuple[int, ...]:
        """Query heads of each layer: the width alpha * model_dim, in whole groups of heads (Eq. 1)."""
        step = self.head_dim * self.num_gqa_groups
        heads = tuple(make_divisible(self.model_dim * alpha, step) // self.head_dim for alpha in self.alphas)
        if self.num_query_heads and self.num_query_heads != heads:
            problems.append(
                f"num_query_heads={list(self.num_query_heads)} disagrees with qkv_multipliers, which give "
                f"{list(heads)}: leave one of the two out"
            )
        return heads

    @classmethod
    def from_name(cls, name: str, **changes: Any) -> ModelConfig:
        """One of SIZES, with any field changed: ``ModelConfig.from_name("270M", vocab_size=32000)``."""
        size = name.removeprefix("OpenELM-")
        if size not in SIZES:
            near = difflib.get_close_matches(size, SIZES, n=1, cutoff=0.0)[0]
            raise UserError(f"size {name!r} is not one of {', '.join(SIZES)}: did you mean {near}?")
        return cls(**{**SIZES[size], **changes})

    def changed(self, **changes: Any) -> ModelConfig:
        """The same model with some fields changed; the head lists are worked out anew."""
        return replace(self, **{"num_query_heads": (), "num_kv_heads": (), **changes})

    @property
    def alphas(self) -> tuple[float, ...]:
        """Width of the queries of each layer, as a multiple of model_dim."""
        return spread(self.qkv_multipliers, self.num_transformer_layers)

    @property
    def betas(self) -> tuple[float, ...]:
        """Width of the feed-forward of each layer, as a multiple of model_dim."""
        return spread(self.ffn_multipliers, self.num_transformer_layers)

    @property
    def ffn_dims(self) -> tuple[int, ...]:
        """Hidden width of each layer's feed-forward, input side first."""
        return tuple(make_divisible(self.model_dim * beta, self.ffn_dim_divisor) for beta in self.betas)

    def layer_matmul_parameters(self) -> tuple[int, ...]:
        """Parameters of the matrices of each layer."""
        attention = [
            self.model_dim * self.head_dim * (2 * query + 2 * kv)
            for query, kv in zip(self.num_query_heads, self.num_kv_heads, strict=True)
        ]
        return tuple(a + 3 * self.model_dim * ffn for a, ffn in zip(attention, self.ffn_dims, strict=True))

    def num_parameters(self) -> int:
        """All parameters; a shared embedding counts once."""
        norms = (2 * self.num_transformer_layers + 1) * self.model_dim
        if self.normalize_qk_projections:
            norms += 2 * self.num_transformer_layers * self.head_dim
        tables = 1 if self.share_input_output_layers else 2
        return sum(self.layer_matmul_parameters()) + norms + tables * self.vocab_size * self.model_dim

    def matmul_parameters(self) -> int:
        """Parameters that every token is multiplied with: all matrices, the output layer too, no look-up."""
        return sum(self.layer_matmul_parameters()) + self.vocab_size * self.model_dim

    def train_flops_per_token(self, row_length: int) -> int:
        """FLOPs of forward and backward: 6 a matmul parameter, and causal attention (half of the square)."""
        width = self.head_dim * sum(self.num_query_heads)
        return 6 * self.matmul_parameters() + 6 * row_length * width

    def cache_bytes_per_token(self, bytes_per_value: int = 2) -> int:
        """Bytes of keys and values that decoding keeps for each token."""
        return 2 * sum(self.num_kv_heads) * self.head_dim * bytes_per_value

    def uniform_widths(self) -> tuple[float, float]:
        """(query heads, FFN width) of the uniform model of equal size: costs are linear in both, so the means."""
        layers = self.num_transformer_layers
        return sum(self.num_query_heads) / layers, sum(self.ffn_dims) / layers

    def as_dict(self) -> dict[str, Any]:
        """Fields as plain lists and numbers."""
        return {k: list(v) if isinstance(v, tuple) else v for k, v in asdict(self).items()}


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def make_divisible(value: float, divisor: int) -> int:
    """``value`` rounded to a multiple of ``divisor``, at least one and never under 0.9 of it."""
    rounded = max(divisor, int(value + divisor / 2) // divisor * divisor)
    return rounded + divisor if rounded < 0.9 * value else rounded


def spread(multiplier: Multiplier | Sequence[float], layers: int) -> tuple[float, ...]:
    """One multiplier a layer; a pair is spread evenly and rounded to two places, as the released models are."""
    if not isinstance(multiplier, tuple):
        return (float(multiplier),) * layers  # type: ignore[arg-type]
    if len(multiplier) == 1:
        return (float(multiplier[0]),) * layers
    if len(multiplier) == layers:
        return tuple(float(m) for m in multiplier)
    low, high = multiplier
    if layers == 1:
        return (round(low, 2),)
    # numpy.linspace to the bit: one step, multiplied; the end set exactly.
    step = (high - low) / (layers - 1)
    return tuple(round(low + i * step, 2) for i in range(layers - 1)) + (round(high, 2),)
