"""Benchmarks measure what they say: the right work, the right ratio."""

import json
from pathlib import Path
from statistics import median

import pytest

from openelm import cli
from openelm.bench.data import bench_data
from openelm.bench.training import TrainingBench, bench_training
from openelm.data.packing import Packing
from openelm.data.pieces import Preparation
from openelm.data.sources import Source
from openelm.model.geometry import ModelConfig


class Letters:
    """One token a letter; counts what it is asked to encode."""

    bos_id, eos_id, vocab_size = 1, 2, 256

    def __init__(self) -> None:
        self.encoded = 0

    def encode(self, text: str) -> list[int]:
        self.encoded += len(text)
        return [3 + ord(letter) % 200 for letter in text]


def test_training_bench_counts_every_token_of_every_micro_batch() -> None:
    config = ModelConfig(model_dim=64, num_transformer_layers=2, head_dim=32, num_gqa_groups=1, vocab_size=64)
    bench = TrainingBench(
        row_length=16,
        micro_batch=2,
        micro_batches=3,
        steps=2,
        warmup=1,
        dtype="float32",
        compile=False,
        activation_checkpointing="none",
    )
    result = bench_training(config, bench)
    assert result["tokens_per_step"] == 16 * 2 * 3
    assert len(result["tokens_per_s_all"]) == 2  # the warm-up is left out
    assert result["tokens_per_s"] == median(result["tokens_per_s_all"])
    assert result["flops_per_token"] == config.train_flops_per_token(16)
    assert result["model_flops_per_s"] == result["tokens_per_s"] * result["flops_per_token"]
    assert result["gemm_flops_per_s"] == max(result["gemm_flops_per_s_all"])
    assert result["share_of_gemm"] == pytest.approx(result["model_flops_per_s"] / result["gemm_flops_per_s"])


def test_data_bench_gives_both_sides_the_same_documents(tmp_path: Path) -> None:
    file = tmp_path / "texts.jsonl"
    texts = [f"{i} " + "letters and more " * (20 + i) for i in range(30)]
    file.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    tokenizer = Letters()
    result = bench_data(
        Source("bench", str(file)),
        tokenizer,  # type: ignore[arg-type]
        Preparation(min_characters=1, min_tokens=1),
        Packing(64),
        max_bytes=10**9,
        repeats=2,
    )
    assert result["documents"] == 30
    assert result["bytes"] == sum(map(len, texts))
    # Both sides encode every letter once, in each of the two turns; the stream may be one document ahead.
    assert 4 * result["bytes"] <= tokenizer.encoded <= 4 * result["bytes"] + 2 * max(map(len, texts))
    assert result["ratio"] == median(result["ratios"])
    assert result["useful_share_of_row"] > 0.95  # packed rows are full but for each piece's BOS


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["train", "--size", "271M"], "did you mean 270M?"),
        (["train", "--micro-batch", "0"], "--micro-batch 0 must be at least 1"),
        (["data", "nowhere.txt", "--tokenizer", "nowhere.model"], "nowhere.model"),
    ],
)
def test_bad_input_is_named(words: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run(["bench", *words]) == 2
    assert said in capsys.readouterr().err
