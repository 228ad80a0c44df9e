"""A plan says what a run would take: memory as measured, and for a recipe all that a dry run promises."""

import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from openelm import cli
from openelm.config import load_recipe
from openelm.model.geometry import ModelConfig
from openelm.model.transformer import Checkpointing, OpenELM
from openelm.train.hardware import HARDWARE, Workload, estimate_memory, fits
from openelm.train.plan import memory_bytes, nearest_that_fits, ranks_that_fit, recomputed_flops_per_token

# The process's own peak: what getrusage says includes that of whoever started it.
MEASURE = """
import re, sys
from pathlib import Path
import torch
torch.set_num_threads(1)
from openelm import cli
code = cli.run(["bench", "train", *sys.argv[1:], "--dtype", "float32", "--steps", "1", "--warmup", "1"])
print(int(re.search(r"VmHWM:\\s*(\\d+)", Path("/proc/self/status").read_text())[1]) * 1024)
sys.exit(code)
"""


def measured_and_estimated(
    size: str, row_length: int, micro_batch: int, micro_batches: int, degree: str, vocabulary: int
) -> tuple[int, int]:
    """Peak memory of two steps in a process of their own, and what is reckoned for them."""
    if not Path("/proc/self/status").is_file():
        pytest.skip("only Linux says what a process's own peak was")
    words = ["--size", size, "--vocab-size", vocabulary, "--row-length", row_length, "--micro-batch", micro_batch]
    words += ["--micro-batches", micro_batches, "--activation-checkpointing", degree]
    command = [sys.executable, "-c", MEASURE, *map(str, words)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    model = ModelConfig.from_name(size, vocab_size=vocabulary)
    work = Workload(model, 1, row_length, micro_batch, micro_batch * micro_batches, 2, 4, degree)
    return int(done.stdout.split()[-1]), estimate_memory(work, on_cpu=True).total


def test_memory_of_a_small_run_is_what_is_measured() -> None:
    measured, estimated = measured_and_estimated("30M", 256, 2, 1, "none", 4096)
    assert estimated == pytest.approx(measured, rel=0.15)


@pytest.mark.slow  # twenty minutes: eleven models are trained for two steps each
@pytest.mark.parametrize(
    "run",
    [
        ("30M", 128, 1, 1, "none", 32000),
        ("30M", 512, 1, 2, "none", 32000),
        ("30M", 512, 4, 1, "none", 32000),
        ("30M", 1024, 2, 1, "full", 32000),
        ("30M", 1024, 2, 1, "selective", 32000),
        ("30M", 2048, 2, 1, "none", 32000),
        ("100M", 512, 1, 2, "none", 32000),
        ("100M", 512, 4, 2, "selective", 32000),
        ("100M", 512, 4, 2, "full", 32000),
        ("100M", 2048, 1, 1, "none", 32000),
        ("270M", 2048, 1, 1, "full", 32000),
    ],
    ids=str,
)
def test_memory_of_larger_runs_is_what_is_measured(run: tuple[str, int, int, int, str, int]) -> None:
    measured, estimated = measured_and_estimated(*run)
    assert estimated == pytest.approx(measured, rel=0.15)


def test_memory_of_the_270m_is_what_was_measured() -> None:
    recipe = ["data.row_length=2048", "model.max_context_length=2048", "train.global_batch=1", "train.micro_batch=1"]
    config = load_recipe("demo", recipe)
    # docs/benchmarks.md: 7.64 GB, fp32, rows of 2,048.
    assert memory_bytes(config, ModelConfig.from_name("270M"), compute_bytes=4) == pytest.approx(7.64e9, rel=0.15)


@pytest.mark.parametrize("separate", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("degree", ["none", "selective", "full"])
def test_activations_are_what_autograd_keeps(degree: Checkpointing, dtype: torch.dtype, separate: bool) -> None:
    config = ModelConfig(
        model_dim=256, num_transformer_layers=4, head_dim=32, vocab_size=300, max_context_length=128, ffn_dim_divisor=32
    )
    model = OpenELM(config).train().to(dtype)
    model.checkpoint_activations(degree)
    weights = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    kept: dict[int, int] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    tokens = torch.randint(0, 300, (4, 128))
    segments = (torch.arange(128) // 50).expand(4, 128) if separate else None
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        _loss = model(tokens, tokens, segments, z_loss_weight=1e-4)
    work = Workload(config, 1, 128, 4, 4, 1, dtype.itemsize, degree, separate_pieces=separate)
    # Beyond the estimate: the loss's gradients by the hidden states and by the weight, kept for the backward pass.
    loss_bytes = dtype.itemsize * (4 * 128 + 300) * 256
    assert estimate_memory(work, on_cpu=False).activations == pytest.approx(sum(kept.values()) - loss_bytes, rel=0.03)


def test_weights_gradients_and_moments_are_shared_out() -> None:
    model = ModelConfig.from_name("1.1B")
    P = model.num_parameters()
    one = Workload(model, 1, 2048, 1, 2048, 10, compute_bytes=2)
    alone = estimate_memory(one, on_cpu=False)
    assert (alone.weights, alone.gradients, alone.moments, alone.gathered) == (6 * P, 4 * P, 8 * P, 0)
    many = replace(one, ranks=64)
    for sharding, shards in (("none", 1), ("node", 8), ("full", 64)):
        memory = estimate_memory(replace(many, sharding=sharding, ema=True), on_cpu=False)
        held = -(-P // shards)
        assert (memory.weights, memory.moments, memory.average) == (4 * held, 8 * held, 4 * held)
    # A whole copy in bf16 stays where nothing is sharded; else two layers and the embedding do.
    assert estimate_memory(many, on_cpu=False).gathered > 2 * P
    assert estimate_memory(replace(many, sharding="full"), on_cpu=False).gathered < P
    # On a CPU an asynchronous checkpoint's copy lies in the same memory.
    copy = estimate_memory(replace(one, async_checkpoints=True), on_cpu=True).checkpoint_copy
    assert copy == 12 * P and not estimate_memory(replace(one, async_checkpoints=True), on_cpu=False).checkpoint_copy


def test_the_nearest_setting_changes_checkpointing_before_sharding_before_the_micro_batch() -> None:
    gpu = HARDWARE["a100-40"]
    work = Workload(ModelConfig.from_name("1.1B"), 8, 2048, 8, 2048, 10, compute_bytes=2)
    assert not fits(work, gpu)
    found = nearest_that_fits(work, gpu)
    assert found is not None and fits(found, gpu)
    assert (found.activation_checkpointing, found.sharding, found.micro_batch) == ("selective", "none", 8)
    wide = replace(work, micro_batch=256)
    found = nearest_that_fits(wide, gpu)
    assert found is not None and fits(found, gpu)
    # Nothing smaller was passed over: a larger micro-batch fits in no setting.
    larger = next(m for m in range(found.micro_batch + 1, 257) if 256 % m == 0)
    last = replace(wide, micro_batch=larger, activation_checkpointing="full", sharding="full")
    assert not fits(last, gpu)


def test_the_fewest_gpus_that_fit_are_the_fewest() -> None:
    gpu = HARDWARE["rtx4090"]
    work = Workload(ModelConfig.from_name("3B"), 1, 2048, 1, 2048, 10, compute_bytes=2)
    assert nearest_that_fits(work, gpu) is None
    ranks = ranks_that_fit(work, gpu)
    assert ranks == 4
    least = replace(work, activation_checkpointing="full", sharding="full")
    assert fits(replace(least, ranks=4), gpu) and not fits(replace(least, ranks=2), gpu)


def test_flops_of_computing_again_are_those_of_the_layers_but_for_proj_2() -> None:
    model = ModelConfig(model_dim=64, num_transformer_layers=1, head_dim=16, qkv_multipliers=1.0, ffn_multipliers=4.0)
    none = Workload(model, 1, 128, 1, 1, 1, 4)
    (ffn,), (query,), (kv,) = model.ffn_dims, model.num_query_heads, model.num_kv_heads
    qkv_and_out = 2 * 64 * 16 * (2 * query + 2 * kv)
    attention = 2 * 128 * 16 * query  # two products over half of the keys
    gate_and_up = 2 * 64 * 2 * ffn
    assert recomputed_flops_per_token(none) == 0
    assert recomputed_flops_per_token(replace(none, activation_checkpointing="selective")) == gate_and_up
    full = recomputed_flops_per_token(replace(none, activation_checkpointing="full"))
    assert full == qkv_and_out + attention + gate_and_up


def test_dry_run_counts_rows_tokens_and_flops(
    recipe: dict[str, Any], write_recipe: Callable[..., str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    assert cli.run(["pretrain", write_recipe(recipe), "--run", str(run), "--dry-run", "--json"]) == 0
    plan = json.loads(capsys.readouterr().out)
    model = ModelConfig(**recipe["model"], vocab_size=400)
    assert plan["parameters"] == model.num_parameters()
    assert plan["rows"] == 8 * 4
    assert plan["tokens_at_most"] == 8 * 4 * 32
    assert plan["flops"] == 8 * 4 * 32 * model.train_flops_per_token(32)
    assert plan["disk_bytes"] == 3 * 12 * model.num_parameters()
    assert plan["source_words"].startswith("40 files")
    assert plan["run_folder_state"] == "new"
    assert not run.exists()


@pytest.mark.parametrize(
    ("files", "said"),
    [
        (["config.yaml"], "is there: go on with --resume"),
        ([], "is there, and empty"),
        (["mine.txt"], "is no run folder (it has no config.yaml)"),
    ],
)
def test_dry_run_says_that_the_run_folder_exists(
    files: list[str],
    said: str,
    recipe: dict[str, Any],
    write_recipe: Callable[..., str],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    run = tmp_path / "run"
    run.mkdir()
    for name in files:
        (run / name).write_text("")
    assert cli.run(["pretrain", write_recipe(recipe), "--run", str(run), "--dry-run"]) == 0
    assert said in capsys.readouterr().out
    assert [path.name for path in run.iterdir()] == files
