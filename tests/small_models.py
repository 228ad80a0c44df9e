"""A tiny model that many tests share: three layers, no two of them alike, with weights that never change."""

from typing import Any

from openelm.model.geometry import ModelConfig
from openelm.model.transformer import OpenELM

# Query widths of 32, 64 and 96, so that not all rows are groups of 64.
UNEVEN: dict[str, Any] = dict(
    model_dim=64,
    num_transformer_layers=3,
    head_dim=16,
    num_gqa_groups=2,
    qkv_multipliers=(0.5, 1.5),
    ffn_multipliers=(0.5, 3.0),
    ffn_dim_divisor=32,
    vocab_size=448,
    max_context_length=64,
)


def make(golden_weights: Any, **changes: Any) -> OpenELM:
    """The uneven model, or one with some fields changed; ``golden_weights`` is the fixture."""
    model = OpenELM(ModelConfig(**{**UNEVEN, **changes}))
    model.load_state_dict(golden_weights(model, 5))
    return model.eval()
