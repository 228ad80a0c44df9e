"""Tuning against TRL on this machine, a step of each in turns: `pytest -m slow tests/tune/test_speed.py -s`."""

from pathlib import Path

import pytest
import torch

from against_trl import Trial, compare, write_folder
from openelm.model.geometry import ModelConfig

for package in ("trl", "datasets", "transformers", "peft"):
    pytest.importorskip(package)

# A tenth of the 270M, in its proportions: rounds of that take an hour on two cores.
SMALL = dict(model_dim=512, num_transformer_layers=8, head_dim=64, vocab_size=16000, max_context_length=1024)


@pytest.fixture(scope="module")
def folder(tmp_path_factory, tokenizer_file) -> Path:
    return write_folder(tmp_path_factory.mktemp("speed") / "model", ModelConfig(**SMALL), tokenizer_file)


@pytest.mark.slow  # minutes each: four steps of both
@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
@pytest.mark.parametrize(
    ("kind", "precompute"), [("padded", True), ("packed", True), ("pairs", True), ("pairs", False)]
)
def test_a_step_takes_less_time_than_trls_and_computes_the_same(folder, tmp_path, kind, precompute, lora):
    bf16 = torch.ops.mkldnn._is_mkldnn_bf16_supported()
    dtype = torch.bfloat16 if bf16 else torch.float32
    trial = Trial(folder, kind, 8, 2, lora=lora, precompute=precompute, dtype=dtype, scratch=tmp_path)
    found = compare(trial)
    print(f"{kind}, {'LoRA' if lora else 'all weights'}, {'reference beforehand, ' if precompute else ''}{found}")
    ours, theirs = found.losses
    # bf16 keeps three digits of each product's operands.
    assert ours[0] == pytest.approx(theirs[0], rel=5e-3 if bf16 else 1e-4)
    assert found.ratio > 1


def test_both_compute_the_same_losses(tokenizer_file, tmp_path):
    """What is compared is the same work: two steps on all weights, the second behind an update."""
    tiny = dict(model_dim=64, num_transformer_layers=2, head_dim=32, num_gqa_groups=1, ffn_dim_divisor=32)
    folder = write_folder(
        tmp_path / "model", ModelConfig(**tiny, vocab_size=400, max_context_length=1024), tokenizer_file
    )
    for kind in ("pairs", "padded"):
        ours, theirs = compare(Trial(folder, kind, 2, 1, scratch=tmp_path), rounds=1).losses
        # fp32, sums of hundreds of terms in another order.
        assert ours == pytest.approx(theirs, rel=1e-4)
