"""Many ranks: the same training as one, the same weights for all, and nobody waits for the dead."""

import json
import os
import signal
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from openelm import cli
from openelm.errors import UserError
from openelm.model.folder import load_model, save_model
from openelm.model.geometry import ModelConfig
from openelm.model.transformer import OpenELM, init_weights, initial_weights
from openelm.train.average import Average
from openelm.train.checkpoint import Checkpoint, Checkpoints
from openelm.train.form import Form
from openelm.train.optim import Optimizer
from openelm.train.parallel import World, build, check_batch, compile_model


@pytest.fixture
def fifty_steps(recipe) -> dict[str, Any]:
    """Fifty steps of eight rows, which 1, 2 and 4 ranks can share."""
    recipe["train"] |= {
        "steps": 50,
        "global_batch": 8,
        "warmup_steps": 5,
        "checkpoint_every": 25,
        "validate_every": 25,
        "sample_every": 20,
        "timeout_s": 60,
    }
    return recipe


def entries(run: Path, kind: str) -> list[dict[str, Any]]:
    found = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in entry.items() if k != "timing"} for entry in found if entry["kind"] == kind]


def logs(tmp_path: Path) -> str:
    return "\n".join(f"{log.name}: {log.read_text()}" for log in sorted(tmp_path.glob("rank_*.log")))


CASES = [(2, "none", None), (2, "full", None), (4, "full", None), (4, "none", None), (4, "node", 2)]


@pytest.mark.parametrize(
    "cases", [CASES[::4], pytest.param(CASES[1:-1], marks=pytest.mark.slow(reason="more of the same, half a minute"))]
)
def test_ranks_train_as_one_does_whatever_the_sharding(fifty_steps, write_recipe, run_ranks, tmp_path, cases):
    file = write_recipe(fifty_steps)
    assert cli.run(["pretrain", file, "--run", str(tmp_path / "one")]) == 0
    expected = entries(tmp_path / "one", "train")
    for ranks, sharding, node in cases:
        run = tmp_path / f"{ranks}-{sharding}"
        arguments = ["pretrain", file, f"train.sharding={sharding}", "train.micro_batch=1", "--run", str(run)]
        assert run_ranks(ranks, arguments, node) == [0] * ranks, logs(tmp_path)
        found = entries(run, "train")
        assert [e["tokens"] for e in found] == [e["tokens"] for e in expected]
        for step, bound in ((1, 1e-6), (10, 1e-5), (50, 1e-3)):
            for one, many in zip(expected[:step], found[:step], strict=True):
                assert many["loss"] == pytest.approx(one["loss"], rel=bound), (ranks, sharding, one["step"])
        assert entries(run, "data") == entries(tmp_path / "one", "data")
        for one, many in zip(entries(tmp_path / "one", "validation"), entries(run, "validation"), strict=True):
            assert (many["step"], many["tokens"]) == (one["step"], one["tokens"])
            assert many["loss"] == pytest.approx(one["loss"], rel=1e-3)
        # After samples, and a pass over held-out text, the training goes on with the right weights, and what is
        # measured at the end are the averaged ones.
        assert [e["step"] for e in entries(run, "sample")] == [20, 40, 50]
        scores = [json.loads((r / "summary.json").read_text())["bits_per_byte"] for r in (tmp_path / "one", run)]
        assert scores[1] == pytest.approx(scores[0], rel=1e-3)
        assert abs(scores[0]["averaged"] - scores[0]["last"]) > 1e-2 * scores[0]["last"]


def test_weights_saved_by_four_ranks_are_the_same_for_any_number(fifty_steps, write_recipe, run_ranks, tmp_path):
    """Saved sharded by four, loaded by 1, 2 and 3, which have no step left to make: they measure and write."""
    fifty_steps["train"] |= {"steps": 6, "global_batch": 12, "micro_batch": 1, "checkpoint_every": 3, "average_last": 0}
    fifty_steps["train"]["sharding"] = "full"
    file, run = write_recipe(fifty_steps), tmp_path / "run"
    assert run_ranks(4, ["pretrain", file, "--run", str(run)]) == [0] * 4, logs(tmp_path)
    assert len(list((run / "checkpoints" / "step_00000006").glob("model-*-of-00004.safetensors"))) == 4
    weights = load_model(run / "model").state_dict()
    stored = [load_file(file) for file in sorted((run / "checkpoints" / "step_00000006").glob("model-*.safetensors"))]
    table = torch.cat([part["transformer.token_embeddings.weight"] for part in stored])
    assert torch.equal(table, weights["token_embeddings.weight"]), "the shared table is one tensor, cut into rows"
    assert not any("lm_head" in name or "classifier" in name for part in stored for name in part)
    for ranks in (1, 2, 3):
        scores = json.loads((run / "summary.json").read_text())["bits_per_byte"]
        assert run_ranks(ranks, ["pretrain", file, "--run", str(run), "--resume"]) == [0] * ranks, logs(tmp_path)
        again = load_model(run / "model").state_dict()
        assert all(torch.equal(tensor, weights[name]) for name, tensor in again.items())
        # The score is that of the weights in the ranks, as they were loaded.
        assert json.loads((run / "summary.json").read_text())["bits_per_byte"] == pytest.approx(scores, rel=1e-6)


def test_a_run_goes_on_with_other_numbers_of_ranks_and_workers(fifty_steps, write_recipe, run_ranks, tmp_path):
    fifty_steps["train"] |= {"steps": 12, "micro_batch": 1, "checkpoint_every": 4, "keep_last": 3}
    file = write_recipe(fifty_steps)
    assert cli.run(["pretrain", file, "--run", str(tmp_path / "one")]) == 0
    run = tmp_path / "run"
    for ranks, workers, step in ((4, 1, None), (2, 2, 4), (1, 0, 8)):
        arguments = ["pretrain", file, "--run", str(run), f"data.workers={workers}", "train.sharding=full"]
        arguments += ["--resume-step", str(step)] if step else []
        assert run_ranks(ranks, arguments) == [0] * ranks, logs(tmp_path)
    for one, many in zip(entries(tmp_path / "one", "train"), entries(run, "train"), strict=True):
        assert many["step"] == one["step"] and many["loss"] == pytest.approx(one["loss"], rel=1e-4)
    assert entries(run, "data") == entries(tmp_path / "one", "data")


def test_a_rank_that_dies_ends_the_others_with_a_message_and_they_go_on_together(
    fifty_steps, write_recipe, start_ranks, run_ranks, tmp_path
):
    fifty_steps["train"] |= {"steps": 2000, "checkpoint_every": 5, "sample_prompts": [], "validate_every": 10_000}
    file, run = write_recipe(fifty_steps), tmp_path / "run"
    processes = start_ranks(2, ["pretrain", file, "--run", str(run)])
    wait_for(lambda: list(run.glob("checkpoints/step_*")), processes, tmp_path)
    os.kill(processes[1].pid, signal.SIGKILL)
    start_s = time.monotonic()
    processes[0].join(30)
    assert processes[0].exitcode == 1 and time.monotonic() - start_s < 20
    assert "lost touch with rank 1 (last seen in step" in (tmp_path / "rank_0.log").read_text()
    assert "--resume" in (tmp_path / "rank_0.log").read_text()


def test_a_rank_that_hangs_is_named_within_the_timeout(fifty_steps, write_recipe, start_ranks, tmp_path):
    fifty_steps["train"] |= {"steps": 2000, "checkpoint_every": 5, "sample_prompts": [], "timeout_s": 4}
    fifty_steps["train"]["validate_every"] = 10_000
    file, run = write_recipe(fifty_steps), tmp_path / "run"
    processes = start_ranks(2, ["pretrain", file, "--run", str(run)])
    wait_for(lambda: list(run.glob("checkpoints/step_*")), processes, tmp_path)
    os.kill(processes[1].pid, signal.SIGSTOP)
    start_s = time.monotonic()
    processes[0].join(30)
    assert processes[0].exitcode == 1 and time.monotonic() - start_s < 12
    message = (tmp_path / "rank_0.log").read_text()
    assert "rank 0 lost touch with rank 1 (last seen in step" in message, message


def test_a_signal_to_one_rank_stops_all_behind_the_same_step(fifty_steps, write_recipe, start_ranks, tmp_path):
    fifty_steps["train"] |= {"steps": 2000, "checkpoint_every": 1000, "sample_prompts": [], "validate_every": 10_000}
    file, run = write_recipe(fifty_steps), tmp_path / "run"
    processes = start_ranks(2, ["pretrain", file, "--run", str(run)])
    wait_for(lambda: (run / "metrics.jsonl").is_file() and entries(run, "train"), processes, tmp_path)
    os.kill(processes[1].pid, signal.SIGUSR1)
    for process in processes:
        process.join(30)
    assert [process.exitcode for process in processes] == [75, 75], logs(tmp_path)
    [checkpoint] = (run / "checkpoints").iterdir()
    assert int(checkpoint.name[5:]) == entries(run, "train")[-1]["step"]
    assert "go on with the same command and --resume" in (tmp_path / "rank_0.log").read_text()


def wait_for(there, processes, tmp_path) -> None:
    deadline = time.monotonic() + 60
    while not there():
        assert time.monotonic() < deadline and all(p.is_alive() for p in processes), logs(tmp_path)
        time.sleep(0.05)


def test_what_rank_0_refuses_is_said_once_and_ends_all(fifty_steps, write_recipe, run_ranks, tmp_path):
    file = write_recipe(fifty_steps)
    assert run_ranks(3, ["pretrain", file, "--run", str(tmp_path / "run")]) == [2, 2, 2]
    words = "8 rows is not a multiple of 3 ranks x train.micro_batch=2 = 6: set train.global_batch=6 or 12"
    assert words in logs(tmp_path)
    assert logs(tmp_path).count("error:") == 1
    assert not (tmp_path / "run").exists()


def test_the_shared_table_is_one_tensor_from_the_meta_device_to_the_exported_folder(tmp_path):
    config = ModelConfig(
        model_dim=32, num_transformer_layers=2, head_dim=16, num_gqa_groups=1, ffn_dim_divisor=16, vocab_size=50
    )
    model = build(config, World(), lambda model: initial_weights(model, 3), dtype=torch.float32)
    assert model.output_weight is model.token_embeddings.weight and not model.output_weight.is_meta
    # Only the look-up sees token 7 and only the output layer scores token 9: both reach the one gradient.
    tokens, targets = torch.tensor([[7, 7]]), torch.tensor([[9, 9]])
    model(tokens, targets).backward()
    moved = model.token_embeddings.weight.grad.abs().sum(1)
    assert moved[7] > 0 and moved[9] > 0
    optimizer = Optimizer(model, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.1)
    optimizer.update(1e-2)
    assert list(optimizer.masters) == [name for name, _ in OpenELM(config).named_parameters()]
    assert model.output_weight is model.token_embeddings.weight

    checkpoints = Checkpoints(tmp_path, keep_last=2)
    for step in (1, 2):
        weights = {name: step * master.detach() for name, master in optimizer.masters.items()}
        checkpoints.save(Form(config), Checkpoint(step, weights, {}, {}))
    optimizer.load_weights(Average(checkpoints, [1, 2]).read)
    assert model.output_weight is model.token_embeddings.weight
    save_model(model, tmp_path / "model")
    again = load_model(tmp_path / "model")
    assert again.output_weight is again.token_embeddings.weight
    torch.testing.assert_close(again.output_weight, 1.5 * weights["token_embeddings.weight"] / 2)
    assert "lm_head.weight" not in load_file(tmp_path / "model" / "model.safetensors")


@pytest.mark.parametrize(
    ("batch", "micro", "ranks", "words"),
    [
        (100, 16, 4, "global_batch=64 or 128"),
        (2048, 16, 96, "global_batch=1536 or 3072"),
        (64, 16, 8, "global_batch=128, or train.micro_batch=8"),
    ],
)
def test_a_batch_that_the_ranks_cannot_share_is_refused_with_the_nearest(batch, micro, ranks, words):
    with pytest.raises(UserError, match=words):
        check_batch(batch, micro, ranks)


def test_a_batch_that_fits_passes():
    check_batch(2048, 16, 128)


@pytest.mark.parametrize(("rows", "shards", "expected"), [(10, 4, [3, 3, 3, 1]), (3, 4, [1, 1, 1, 0]), (8, 2, [4, 4])])
def test_rows_are_dealt_to_ranks_as_torch_cuts_them(monkeypatch, rows, shards, expected):
    world = World()
    world.size, world.shards = shards, shards
    found = []
    for world.shard in range(shards):
        found.append(world.part((rows, 5)))
    assert [count for _, count in found] == expected
    assert [first for first, _ in found] == [sum(expected[:i]) for i in range(shards)]
    cut = torch.arange(rows).chunk(shards)
    assert [len(c) for c in cut] == [c for c in expected if c]


SLOW_TO_COMPILE = pytest.mark.slow(reason="compiles ten layers, ten seconds")


@pytest.mark.parametrize(
    "checkpointing", ["full", *(pytest.param(c, marks=SLOW_TO_COMPILE) for c in ("none", "selective"))]
)
def test_a_model_compiled_block_by_block_has_one_graph_for_each_layer(checkpointing):
    # Ten layers, no two alike: by default torch gives up in silence behind the eighth.
    config = ModelConfig(
        model_dim=128, num_transformer_layers=10, head_dim=4, num_gqa_groups=4, ffn_dim_divisor=8, vocab_size=50
    )
    tokens = torch.randint(0, 50, (2, 17), generator=torch.Generator().manual_seed(1))
    results = []
    for compiled in (False, True):
        model = OpenELM(config)
        init_weights(model, seed=0)
        model.train().checkpoint_activations(checkpointing)
        torch._dynamo.reset()
        torch._dynamo.utils.counters.clear()
        if compiled:
            compile_model(model, whole=False, backend="aot_eager")
        total, _ = model(tokens[:, :-1], tokens[:, 1:], z_loss_weight=1e-4)
        total.backward()
        results.append([total.detach(), *(p.grad for p in model.parameters())])
        assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == (10 if compiled else 0)
    for plain, other in zip(*results, strict=True):
        # Sums in another order: single elements near zero may differ by more.
        assert (plain - other).norm() <= 1e-5 * plain.norm()
