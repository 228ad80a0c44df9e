"""What a conversion holds in memory: a tensor at a time, whatever the target."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from openelm.data.tokenizer import Tokenizer
from openelm.files import whole_folder
from openelm.model.folder import tensor_shapes, write_model
from openelm.model.geometry import ModelConfig

if not Path("/proc/self/status").exists():
    pytest.skip("peak memory is read from /proc, which is Linux's", allow_module_level=True)

# The largest resident size of the process, mapped files included, in bytes.
PEAK = """
import sys
from openelm import cli
code = cli.run(["convert", *sys.argv[1:]])
peak = next(line for line in open("/proc/self/status") if line.startswith("VmHWM"))
print(code, int(peak.split()[1]) * 1024)
"""


@pytest.fixture(scope="module")
def three_billion(tmp_path_factory, tokenizer_file) -> tuple[Path, int]:
    """A 3B in bf16, and its bytes. Small numbers without meaning."""
    folder = tmp_path_factory.mktemp("3B") / "model"
    config = ModelConfig.from_name("3B")
    shapes = tensor_shapes(config)
    values = torch.randn(1_000_003, generator=torch.Generator().manual_seed(0)).mul_(0.02).to(torch.bfloat16)

    def read(name: str) -> torch.Tensor:
        size = torch.Size(shapes[name]).numel()
        return values.repeat(-(-size // values.numel()))[:size].view(shapes[name])

    with whole_folder(folder) as draft:
        write_model(draft, config, read, torch.bfloat16)
        Tokenizer.load(tokenizer_file).save(draft)
    return folder, 2 * config.num_parameters()


@pytest.mark.slow  # 6 GB are written once, and up to 12 GB a target
@pytest.mark.parametrize(
    "words",
    [
        ["hf"],
        ["hf", "--dtype", "float32"],
        ["corenet", "--dtype", "float32"],
        ["mlx"],
        ["mlx", "--quantize", "4bit"],
        ["gguf"],
        ["gguf", "--quantize", "Q4_0"],
        ["ollama", "--quantize", "Q8_0"],
    ],
    ids=" ".join,
)
def test_3b_converts_within_1_3_of_its_bytes(three_billion, tmp_path, words):
    folder, size = three_billion
    command = [sys.executable, "-c", PEAK, str(folder), str(tmp_path / "out"), "--to", *words]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    code, peak = map(int, done.stdout.split()[-2:])
    print(f"{' '.join(words)}: peak {peak / 1e9:.2f} GB, {peak / size:.2f} of the model's bytes")
    assert code == 0
    assert peak < 1.3 * size
    shutil.rmtree(tmp_path)  # pytest would keep several of these
