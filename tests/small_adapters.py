"""An adapter of random values, none of them zero, on the tiny model that tests share; and six steps of training one."""

from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from openelm.interop.adapter import PAPER_TARGETS, Adapter, shapes, write_adapter
from openelm.model.geometry import ModelConfig
from openelm.model.transformer import Checkpointing, OpenELM, initial_weights
from openelm.train.optim import Optimizer
from openelm.train.parallel import World, build
from openelm.tune.adapters import attach, initial_values, switched_off

KINDS = ("lora", "dora", "rslora")


def values(adapter: Adapter, config: ModelConfig) -> dict[str, Tensor]:
    """Tensors by their names inside the package; magnitudes are about 1."""
    draw = torch.Generator().manual_seed(4)
    return {
        name: 0.2 * torch.randn(shape, generator=draw) + ("magnitude" in name)
        for name, shape in shapes(adapter, config).items()
    }


def write(folder: Path, config: ModelConfig, kind: str = "lora", targets: tuple[str, ...] = PAPER_TARGETS) -> Adapter:
    """Write one into a new folder."""
    adapter = Adapter(kind, r=4, alpha=8, dropout=0.1, targets=targets)
    folder.mkdir()
    write_adapter(folder, adapter, config, values(adapter, config).__getitem__, "someone/small", "# An adapter\n")
    return adapter


def train(sharding: str, checkpointing: Checkpointing) -> dict[str, list[float]]:
    """Losses of six steps of a LoRA and of a DoRA, each behind that of the base, on this rank and any others."""
    config = ModelConfig(
        model_dim=32, num_transformer_layers=2, head_dim=16, num_gqa_groups=1, ffn_dim_divisor=16, vocab_size=50
    )
    base = dict(initial_weights(OpenELM(config), 1))
    tokens = torch.randint(0, 50, (4, 17), generator=torch.Generator().manual_seed(1))
    losses: dict[str, list[float]] = {}
    with World(sharding) as world:
        rows = tokens.chunk(world.size)[world.rank]
        for kind in ("lora", "dora"):
            adapter = Adapter(kind, r=3, targets=PAPER_TARGETS)
            values = partial(initial_values, adapter=adapter, read_base=base.__getitem__, seed=1)
            adapt = partial(attach, adapter=adapter)
            model = build(config, world, values, dtype=torch.float32, checkpointing=checkpointing, adapt=adapt)
            optimizer = Optimizer(model, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.0)
            found = losses[kind] = []
            for _ in range(6):
                with torch.no_grad(), switched_off(model):
                    found.append(world.sum_(model(rows[:, :-1], rows[:, 1:])).item() / 64)
                loss = model(rows[:, :-1], rows[:, 1:])
                loss.backward()
                found.append(world.sum_(loss.detach().clone()).item() / 64)
                optimizer.squares()
                optimizer.update(1e-2, divisor=torch.tensor(64.0))
    return losses
