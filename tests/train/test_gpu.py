"""What only a CUDA device can show: the same losses, and a host that does not wait. Skipped without one."""

import pytest
import torch

from openelm.bench.training import NoCheckpoints
from openelm.data.loader import Step
from openelm.data.packing import Batch
from openelm.model.geometry import ModelConfig
from openelm.model.transformer import initial_weights
from openelm.train import loop
from openelm.train.guard import Event, Guard
from openelm.train.optim import Optimizer
from openelm.train.parallel import World, build
from openelm.train.schedule import Schedule

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device"),
]
CONFIG = ModelConfig(model_dim=256, num_transformer_layers=4, vocab_size=1000, max_context_length=256)


class Losses:
    """A recorder that keeps the losses."""

    def __init__(self) -> None:
        self.losses: list[float] = []

    def train(self, entry: dict, timing: dict) -> None:
        self.losses.append(entry["loss"])

    def write(self, entry: dict) -> None:
        pass

    def event(self, event: Event) -> None:
        raise AssertionError(event)


def steps(count: int):
    """The same rows for every device."""
    draw = torch.Generator().manual_seed(0)
    for number in range(count):
        rows = torch.randint(0, 1000, (4, 129), generator=draw).numpy()
        yield Step([Batch(rows[i : i + 2, :-1].copy(), rows[i : i + 2, 1:].copy()) for i in (0, 2)], 4 * number)


def train(device: str, dtype: torch.dtype, *, log_every: int = 1, count: int = 8, probes=(), **how) -> list[float]:
    world = World()
    world.device = torch.device(device)
    model = build(CONFIG, world, lambda model: initial_weights(model, 0), dtype=dtype, **how)
    recorder = Losses()
    loop.run(
        model,
        Optimizer(model, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.1, dtype=dtype),
        Schedule("constant", count, 1e-3, 1e-3, 0),
        steps(count),
        loop.pretraining_loss(1e-4),
        loop.LoopSettings(count, 4 * 128, 1.0, log_every, 1000, 1, 1.0),
        recorder,
        world=world,
        guard=Guard(world.device, stop=True, skip_spikes=False, deviations=6.0),
        keep=NoCheckpoints(),
        probes=probes,
    )
    return recorder.losses


@pytest.mark.parametrize("checkpointing", ["none", "selective", "full"])
@pytest.mark.parametrize("compiled", [False, True])
def test_a_gpu_gives_the_losses_of_the_cpu(checkpointing, compiled):
    expected = train("cpu", torch.float32)
    found = train("cuda", torch.bfloat16, checkpointing=checkpointing, compile=compiled)
    # bf16 keeps three digits of each product's operands.
    assert found == pytest.approx(expected, rel=5e-3)
    assert expected[-1] < expected[0]


def test_the_host_does_not_wait_for_the_device_between_the_logged_steps():
    train("cuda", torch.bfloat16, count=2)  # what waits once, allocating and choosing kernels, is behind us
    seen = []

    def watch(step, model, data):
        # From the second step to the last but one: the last is logged.
        torch.cuda.set_sync_debug_mode("error" if step < 7 else "default")
        seen.append(step)
        return []

    try:
        train("cuda", torch.bfloat16, log_every=8, probes=[watch])
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert seen == list(range(1, 9))
