"""Tiny models that many tests share: three layers, no two of them alike, with weights that never change."""

from typing import Any

import torch

from openelm.model.geometry import ModelConfig
from openelm.model.transformer import OpenELM, init_weights

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
# The same, scaled as the released sizes are.
SCALED: dict[str, Any] = {
    **UNEVEN,
    "qkv_multipliers": (0.5, 1.0),
    "ffn_multipliers": (0.5, 4.0),
    "ffn_dim_divisor": 16,
}


def make(golden_weights: Any, **changes: Any) -> OpenELM:
    """The uneven model, or one with some fields changed; ``golden_weights`` is the fixture."""
    model = OpenELM(ModelConfig(**{**UNEVEN, **changes}))
    model.load_state_dict(golden_weights(model, 5))
    return model.eval()


def make_varied(**changes: Any) -> OpenELM:
    """The scaled model with first weights of training, matrices doubled; or one with some fields changed.

    Random weights are all but indifferent; larger ones write varied texts and make wrong positions show.
    """
    model = OpenELM(ModelConfig(**{**SCALED, **changes}))
    init_weights(model, seed=1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 2:
                parameter *= 2
    return model.eval()
