"""A model computed a layer at a time in fp32: of its weights, one layer is held, whatever the size.

Shapes: B rows, T tokens of a row, D model_dim, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from openelm.model.geometry import ModelConfig
from openelm.model.transformer import NORMS, Block, RMSNorm, rope_table

BATCH_TOKENS = 2**12  # that are computed at a time

# Gives a tensor by its name inside the package.
Read = Callable[[str], Tensor]


def embed(read: Read, batches: Sequence[Tensor]) -> list[Tensor]:
    """Batches (B, T) of ids -> (B, T, D): what the first layer reads."""
    table_VD = read("token_embeddings.weight").float()
    return [F.embedding(tokens_BT, table_VD) for tokens_BT in batches]


def open_block(config: ModelConfig, layer: int, read: Read) -> Block:
    """One layer with its weights."""
    with torch.device("meta"):
        block = Block(config, layer)
    weights = {name: read(f"layers.{layer}.{name}").float() for name in block.state_dict()}
    block.load_state_dict(weights, assign=True)
    return block.eval().requires_grad_(False)


def open_norm(config: ModelConfig, read: Read) -> RMSNorm:
    """The norm behind the last layer."""
    with torch.device("meta"):
        norm = NORMS[config.normalization_layer_name](config.model_dim)
    norm.load_state_dict({"weight": read("norm.weight").float()}, assign=True)
    return norm.eval().requires_grad_(False)


def run_block(config: ModelConfig, block: Block, x_BTD: Tensor) -> Tensor:
    """What a layer makes of rows that begin at position 0."""
    positions_T = torch.arange(x_BTD.shape[1], device=x_BTD.device)
    result: Tensor = block(x_BTD, rope_table(positions_T, config.head_dim, config.rope_freq_constant), None, None)
    return result


@torch.no_grad()
def final_states(
    config: ModelConfig, read: Read, batches: Sequence[Tensor], done: Callable[[], object] = lambda: None
) -> list[Tensor]:
    """Batches (B, T) of ids -> (B, T, D): what the output layer reads. ``done`` is called after each layer."""
    states = embed(read, batches)
    for layer in range(config.num_transformer_layers):
        block = open_block(config, layer, read)
        for number, x_BTD in enumerate(states):
            states[number] = run_block(config, block, x_BTD)
        done()
    norm = open_norm(config, read)
    return [norm(x_BTD) for x_BTD in states]


def output_name(config: ModelConfig) -> str:
    """The (V, D) matrix of the output layer: the embedding itself where it is shared."""
    return "token_embeddings.weight" if config.share_input_output_layers else "classifier.weight"


def in_batches(rows: Sequence[Sequence[int]], filling: int = 0) -> list[Tensor]:
    """Rows of ids -> (B, T) tensors of about ``BATCH_TOKENS``, in the order given; short rows are filled up behind."""
    batches: list[Tensor] = []
    start = 0
    while start < len(rows):
        end, width = start, 0
        while end < len(rows) and (end == start or max(width, len(rows[end])) * (end + 1 - start) <= BATCH_TOKENS):
            width, end = max(width, len(rows[end])), end + 1
        filled = [[*row, *[filling] * (width - len(row))] for row in rows[start:end]]
        batches.append(torch.tensor(filled, dtype=torch.int64))
        start = end
    return batches
