"""What tuning a 270M on rows of 1,024 tokens holds in memory, by the command, from start to the folders it leaves."""

import json
import os
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from openelm.data.tokenizer import Tokenizer
from openelm.files import whole_folder
from openelm.interop.adapter import PAPER_TARGETS
from openelm.model.folder import write_model
from openelm.model.geometry import ModelConfig
from openelm.model.transformer import OpenELM, initial_weights

pytest.importorskip("peft")
if not Path("/proc/self/status").exists():
    pytest.skip("peak memory is read from /proc, which is Linux's", allow_module_level=True)

# The largest resident size of the process, mapped files included, in bytes.
PEAK = """
import sys
from openelm import cli
code = cli.run(sys.argv[1:])
peak = next(line for line in open("/proc/self/status") if line.startswith("VmHWM"))
print(code, int(peak.split()[1]) * 1024)
"""
ROW_LENGTH, STEPS = 1024, 2


@pytest.fixture(scope="module")
def folder(tmp_path_factory, tokenizer_file) -> Path:
    """A 270M as it is published, in bf16, and records that fill rows: prompts and answers beyond 512 tokens."""
    folder = tmp_path_factory.mktemp("tuning")
    config = ModelConfig.from_name("270M")
    with torch.device("meta"):
        blank = OpenELM(config)
    weights = dict(initial_weights(blank, seed=0))
    tokenizer = Tokenizer.load(tokenizer_file)
    with whole_folder(folder / "model") as draft:
        write_model(draft, config, weights.__getitem__, torch.bfloat16)
        tokenizer.save(draft)
    draw = random.Random(0)

    def text() -> str:
        ids = [draw.randrange(50, 400) for _ in range(800)]
        words = tokenizer.decode(ids)
        assert len(tokenizer.encode(words)) > 520
        return words

    names = ("prompt", "answer", "chosen", "rejected")
    lines = [json.dumps({name: text() for name in names}) for _ in range(STEPS)]
    (folder / "records.jsonl").write_text("\n".join(lines) + "\n")
    return folder


def recipe(folder: Path, command: str, kind: str, dtype: str, checkpointing: str) -> dict[str, Any]:
    """The paper's adapter (r 32 on all matrices, dropout 0.1), a row or a pair a step."""
    pairs = command == "dpo"
    data = {
        "sources": [
            {"name": "records", "path": str(folder / "records.jsonl"), "format": "preference" if pairs else "prompt"}
        ],
        "row_length": ROW_LENGTH,
        "prompt_length": 512,
        "held_out": 0,
    }
    return {
        "name": "memory",
        "model": {"path": str(folder / "model")},
        "data": data if pairs else {**data, "loss_on": "all"},
        "adapter": {"kind": kind, "r": 32, "alpha": 32, "dropout": 0.1, "targets": list(PAPER_TARGETS)},
        **({"preference": {"loss": "hinge", "beta": 0.01}} if pairs else {}),
        "train": {
            "steps": STEPS,
            "global_batch": 1,
            "micro_batch": 1,
            "lr": 1e-4,
            "dtype": dtype,
            "activation_checkpointing": checkpointing,
            "checkpoint_every": STEPS,
        },
    }


@pytest.fixture(scope="module")
def peak_bytes(folder) -> Any:
    """``peak_bytes("dpo", "lora", "float32")``: of the whole process; each is measured once."""
    found: dict[tuple[str, ...], int] = {}

    def measure(command: str, kind: str, dtype: str, checkpointing: str = "full") -> int:
        what = (command, kind, dtype, checkpointing)
        if what not in found:
            file = folder / "recipe.yaml"
            file.write_text(yaml.safe_dump(recipe(folder, *what)))
            words = [sys.executable, "-c", PEAK, command, str(file), "--run", str(folder / "run"), "--overwrite"]
            environment = {**os.environ, "OPENELM_CACHE": str(folder / "-".join(what))}
            done = subprocess.run(words, capture_output=True, text=True, env=environment, check=True)
            code, found[what] = map(int, done.stdout.split()[-2:])
            assert code == 0, done.stderr
            print(f"{' '.join(what)}: peak {found[what] / 1e9:.2f} GB")
        return found[what]

    return measure


def dtypes() -> list[str]:
    """Those that this machine multiplies."""
    return ["float32", *(["bfloat16"] if torch.ops.mkldnn._is_mkldnn_bf16_supported() else [])]


@pytest.mark.slow  # a minute or two of the 270M
@pytest.mark.parametrize("dtype", dtypes())
@pytest.mark.parametrize("kind", ["lora", "dora"])
def test_adapters_of_the_270m_are_tuned_within_4_gb(peak_bytes, kind, dtype):
    assert peak_bytes("finetune", kind, dtype) < 4e9


@pytest.mark.slow  # two to four minutes of the 270M
@pytest.mark.parametrize("dtype", dtypes())
@pytest.mark.parametrize("kind", ["lora", "dora"])
def test_preferences_take_less_than_1_3_of_that(peak_bytes, kind, dtype):
    assert peak_bytes("dpo", kind, dtype) < 1.3 * peak_bytes("finetune", kind, dtype)
