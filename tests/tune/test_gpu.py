"""Tuning on CUDA: the CPU's adapters, and how fast against TRL. `pytest -m 'gpu or slow' tests/tune/test_gpu.py -s`."""

import time
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from openelm.data.example_stream import ExampleSteps
from openelm.data.pairs import Example, Pair
from openelm.interop.adapter import PAPER_TARGETS, Adapter
from openelm.model.geometry import ModelConfig
from openelm.model.transformer import OpenELM, initial_weights
from openelm.train.optim import Optimizer
from openelm.train.parallel import World, build
from openelm.tune.adapters import attach, initial_values
from openelm.tune.preference import preference_loss

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device"),
]
CONFIG = ModelConfig(model_dim=256, num_transformer_layers=4, vocab_size=1000, max_context_length=1024)


def pairs(count: int, vocabulary: int) -> list[Pair]:
    """Prompts of about 200 tokens, answers of about 300, as uneven as people's are, within 1,024."""
    draw = np.random.default_rng(0)

    def example(prompt: Any) -> Example:
        answer = draw.integers(3, vocabulary, min(500, int(250 * draw.lognormal(0, 0.6)) + 1))
        return Example(
            np.concatenate((prompt, answer)).astype(np.int32), np.arange(len(prompt) + len(answer)) >= len(prompt)
        )

    found = []
    for _ in range(count):
        prompt = np.concatenate(([1], draw.integers(3, vocabulary, min(400, int(170 * draw.lognormal(0, 0.6))))))
        found.append(Pair(example(prompt), example(prompt)))
    return found


def step(kind: str, device: str, dtype: torch.dtype) -> tuple[float, float, dict[str, torch.Tensor]]:
    """Loss and gradient norm of one step of an adapter on four pairs, and its masters after the update."""
    world = World()
    world.device = torch.device(device)
    adapter = Adapter(kind, r=8, alpha=16, targets=PAPER_TARGETS)
    with torch.device("meta"):
        blank = OpenELM(CONFIG)
    base = dict(initial_weights(blank, seed=0))
    model = build(
        CONFIG,
        world,
        partial(initial_values, adapter=adapter, read_base=base.__getitem__, seed=0, dtype=dtype),
        dtype=dtype,
        checkpointing="full",
        adapt=partial(attach, adapter=adapter),
    )
    optimizer = Optimizer(model, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.0, dtype=dtype)
    loss_fn = preference_loss("sigmoid", 0.1, 0.0, torch.full((4, 2), -2000.0))
    stream = ExampleSteps(pairs(4, 1000), seed=0, row_length=1024, bos_id=1, global_batch=4, rows=2)
    total = 0.0
    for batch in next(iter(stream)).batches:
        loss, _ = loss_fn(model, batch)
        loss.backward()
        total += loss.item()
    norm = optimizer.squares().sqrt().item()
    optimizer.update(1e-3, divisor=torch.tensor(4.0, device=device))
    return total, norm, {name: master.detach().float().cpu() for name, master in optimizer.masters.items()}


@pytest.mark.parametrize("kind", ["lora", "dora"])
def test_a_gpu_trains_an_adapter_as_the_cpu_does(kind):
    pytest.importorskip("peft")
    loss, norm, masters = step(kind, "cpu", torch.float32)
    exact_loss, exact_norm, exact = step(kind, "cuda", torch.float32)
    # fp32 on both, sums in another order; TF32 is off unless it is asked for.
    assert exact_loss == pytest.approx(loss, rel=1e-3)
    assert exact_norm == pytest.approx(norm, rel=1e-2)
    found_loss, found_norm, found = step(kind, "cuda", torch.bfloat16)
    # bf16 keeps three digits of each product's operands.
    assert found_loss == pytest.approx(loss, rel=1e-2)
    assert found_norm == pytest.approx(norm, rel=2e-2)
    for name, master in masters.items():
        # AdamW's first step is the rate, up or down: where a gradient is about zero, either may come.
        assert (exact[name] - master).abs().max() <= 2.1e-3, name
        assert ((exact[name] - master).abs() < 1e-4).float().mean() > 0.95, name
        assert (found[name] - master).abs().max() <= 2.1e-3 + 0.01 * master.abs().max(), name


@pytest.mark.slow  # minutes: a few hundred steps of the 270M
def test_the_instruct_recipe_of_the_270m_runs_at_speed():
    """All weights, hinge, 8 pairs a micro-batch, bf16: tokens a second, and memory. Needs neither trl nor peft."""
    config, steps, world = ModelConfig.from_name("270M"), 200, World()
    preferences = pairs(512, 32000)
    for checkpointing in ("full", "none"):
        model = build(
            config,
            world,
            lambda model: initial_weights(model, 0),
            dtype=torch.bfloat16,
            checkpointing=checkpointing,
        )
        optimizer = Optimizer(model, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.0, dtype=torch.bfloat16)
        loss_fn = preference_loss("hinge", 0.01, 0.0, torch.full((512, 2), -3000.0))
        stream = ExampleSteps(preferences, seed=0, row_length=1024, bos_id=1, global_batch=16, rows=8)
        torch.cuda.reset_peak_memory_stats()
        read, start_s = 0, 0.0
        for number, made in enumerate(islice(stream, steps)):
            if number == 10:  # kernels are chosen and memory is had by then
                torch.cuda.synchronize()
                read, start_s = 0, time.perf_counter()
            for batch in made.batches:
                loss_fn(model, batch)[0].div(16).backward()
                read += batch.size()
            optimizer.squares()
            optimizer.update(2e-5)
        torch.cuda.synchronize()
        tokens_per_s = read / (time.perf_counter() - start_s)
        tflops = tokens_per_s * config.train_flops_per_token(500) / 1e12
        print(
            f"dpo, 270M, activation checkpointing {checkpointing}: {tokens_per_s:,.0f} tokens/s, {tflops:.0f} TFLOP/s, "
            f"{torch.cuda.max_memory_allocated() / 1e9:.1f} GB"
        )
        assert all(parameter.isfinite().all() for parameter in model.parameters())


@pytest.mark.slow  # minutes: a hundred steps of the 270M by each
@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
@pytest.mark.parametrize("kind", ["pairs", "padded", "packed"])
def test_a_step_against_trls(kind, lora, tokenizer_file, tmp_path):
    for package in ("trl", "datasets", "transformers", "peft"):
        pytest.importorskip(package)
    from against_trl import Trial, compare, write_folder

    folder = write_folder(Path(tmp_path) / "model", ModelConfig.from_name("270M"), tokenizer_file)
    for recompute in (True, False):
        trial = Trial(
            folder, kind, 64, 8, lora=lora, recompute=recompute, dtype=torch.bfloat16, device="cuda", scratch=tmp_path
        )
        found = compare(trial, rounds=50)
        print(f"{kind}, {'LoRA' if lora else 'all weights'}, recomputing {recompute}: {found}")
        assert found.ratio > 1
