"""mlx-lm: the same logits from the same folder, mlx_lm.convert's bits without mlx, and the documented commands."""

import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import small_models
from openelm.data.chat import CHAT_TEMPLATE
from openelm.data.tokenizer import Tokenizer
from openelm.errors import UserError
from openelm.interop import mlx
from openelm.interop.convert import convert
from openelm.interop.source import open_folder
from openelm.interop.target import Format, MissingEngineError
from openelm.model.folder import DTYPES, load_model, save_model
from openelm.model.geometry import ModelConfig
from openelm.model.transformer import OpenELM

ROOT = Path(__file__).parents[2]
UNEVEN = {**small_models.UNEVEN, "vocab_size": 400}  # as many rows as the tokenizer has tokens
FORMATS = [("", 64), ("4bit", 32), ("4bit", 64), ("8bit", 32), ("8bit", 64)]


def make(golden_weights, **changes: object) -> OpenELM:
    return small_models.make(golden_weights, **{**UNEVEN, **changes})


@pytest.fixture
def folder(tmp_path, golden_weights, tokenizer_file) -> Path:
    """A tiny model with uneven layers in fp32, its tokenizer and a chat template."""
    folder = save_model(make(golden_weights), tmp_path / "model", tokenizer=Tokenizer.load(tokenizer_file))
    (folder / "chat_template.jinja").write_text(CHAT_TEMPLATE)
    return folder


def rows_of(config: ModelConfig, seed: int = 0) -> torch.Tensor:
    return torch.randint(0, config.vocab_size, (3, 40), generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def our_logits(folder: Path, rows: torch.Tensor, dtype: torch.dtype | None = None) -> torch.Tensor:
    return load_model(folder, dtype=dtype)(rows).float()


def written(folder: Path, to: Path, dtype: torch.dtype, quantize: str = "", group_size: int = 64) -> Path:
    convert(open_folder(folder), "mlx", to, Format(dtype, quantize, group_size))
    return to


def assert_same_bits(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> None:
    assert one.keys() == other.keys()
    for name, tensor in one.items():
        assert tensor.dtype == other[name].dtype, name
        assert torch.equal(tensor.view(torch.uint8), other[name].view(torch.uint8)), name


# --- what mlx-lm computes ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "changes", [{}, {"share_input_output_layers": False}, {"normalize_qk_projections": False}, {"vocab_size": 449}]
)
def test_our_own_folder_gives_our_logits_in_mlx_lm(tmp_path, golden_weights, changes):
    pytest.importorskip("mlx_lm")
    model = make(golden_weights, **changes)
    folder, rows = save_model(model, tmp_path / "model"), rows_of(model.config)
    found = mlx.TARGET.logits(folder, rows.tolist())
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, our_logits(folder, rows), rtol=0, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_in_sixteen_bits_mlx_lm_is_as_far_from_exact_as_we_are(tmp_path, golden_weights, dtype):
    pytest.importorskip("mlx_lm")
    model = make(golden_weights)
    folder, rows = save_model(model, tmp_path / "model", dtype=dtype), rows_of(model.config)
    exact = our_logits(folder, rows, torch.float32)
    found = mlx.TARGET.logits(folder, rows.tolist())
    off = (found - exact).square().mean().sqrt()
    # Both round after each operation, not always the same ones (RoPE, norms, SwiGLU), so their errors are of one size
    # (1.1 of ours in bf16, and in fp16) and not of one sign.
    assert off < 1.5 * (our_logits(folder, rows) - exact).square().mean().sqrt()
    assert off < {torch.bfloat16: 0.03, torch.float16: 0.004}[dtype] * exact.std()


@pytest.mark.slow  # mlx takes 17 s on a CPU for these 36 tokens
def test_the_270m_in_mlx_lm_is_corenets(shared, tmp_path, golden_weights):
    pytest.importorskip("mlx_lm")
    figures = json.loads((shared / "golden" / "openelm_270m.json").read_text())
    with torch.device("meta"):
        model = OpenELM(ModelConfig.from_name("270M", vocab_size=figures["vocab_size"]))
    model.load_state_dict(golden_weights(model, figures["seed"]), assign=True)
    folder, tokens = save_model(model, tmp_path / "model"), torch.tensor(figures["tokens"])
    with torch.no_grad():
        expected = model(tokens[None, :-1])
    del model
    found = mlx.TARGET.logits(folder, [figures["tokens"][:-1]])
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-4)
    log_probabilities = found[0].log_softmax(-1).gather(1, tokens[1:, None])[:, 0]
    torch.testing.assert_close(log_probabilities, torch.tensor(figures["next_token_logprob"]), rtol=0, atol=1e-4)
    top = found[0, -1].topk(20)
    assert top.indices.tolist() == figures["last_position_top20_ids"]
    torch.testing.assert_close(top.values, torch.tensor(figures["last_position_top20_logits"]), rtol=0, atol=1e-4)


@pytest.mark.parametrize(("quantize", "group_size"), FORMATS)
@pytest.mark.parametrize("tied", [True, False])
def test_a_quantised_folder_computes_what_its_values_do_in_ours(tmp_path, golden_weights, quantize, group_size, tied):
    pytest.importorskip("mlx_lm")
    source = save_model(make(golden_weights, share_input_output_layers=tied), tmp_path / "model")
    folder = written(source, tmp_path / "mlx", torch.float32, quantize, group_size)
    rows = rows_of(ModelConfig(**UNEVEN))
    found = mlx.TARGET.logits(folder, rows.tolist())
    torch.testing.assert_close(found, our_logits(folder, rows), rtol=0, atol=1e-4)
    assert torch.equal(our_logits(folder, rows), our_logits(source, rows)) is not bool(quantize)


def test_both_write_the_same_greedy_text(tmp_path, folder):
    generate = pytest.importorskip("mlx_lm").generate
    load = pytest.importorskip("mlx_lm").load
    from openelm.infer.engine import Engine

    quantised = written(folder, tmp_path / "mlx", torch.float32, "4bit", 32)
    engine = Engine.load(quantised, device="cpu")
    ids = [1, *engine.tokenizer.encode("After another")]
    (ours,) = engine.generate([ids], max_new_tokens=12)
    model, tokenizer = load(str(quantised))
    assert tokenizer.encode("After another") == ids
    assert tokenizer.eos_token_ids == {2}
    turns = [{"role": "user", "content": "Who?"}]
    chat = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
    assert chat == "<|user|>\nWho?</s>\n<|assistant|>\n"
    assert generate(model, tokenizer, prompt=ids, max_tokens=12).strip() == ours.text.strip()


# --- what is written --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("quantize", "group_size"), FORMATS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_the_result_is_that_of_mlx_lms_own_conversion(tmp_path, folder, dtype, quantize, group_size):
    their_convert = pytest.importorskip("mlx_lm").convert
    how: dict[str, Any] = {"q_bits": int(quantize[0]), "q_group_size": group_size} if quantize else {}
    their_convert(str(folder), str(tmp_path / "theirs"), dtype=dtype, quantize=bool(quantize), **how)
    ours = written(folder, tmp_path / "ours", DTYPES[dtype], quantize, group_size)
    assert_same_bits(load_file(ours / "model.safetensors"), load_file(tmp_path / "theirs" / "model.safetensors"))
    mine, theirs = (json.loads((tmp_path / who / "config.json").read_text()) for who in ("ours", "theirs"))
    assert mine.pop("dtype") == dtype
    assert theirs.pop("dtype") == "float32"  # theirs keeps saying what the source was
    assert mine == theirs


def test_rows_that_are_not_whole_groups_stay_as_they_are(tmp_path, folder):
    found = load_file(written(folder, tmp_path / "mlx", torch.bfloat16, "4bit", 64) / "model.safetensors")
    widths = {layer: found[f"transformer.layers.{layer}.attn.out_proj.weight"] for layer in range(3)}
    assert [(t.dtype, t.shape[1]) for t in widths.values()] == [
        (torch.bfloat16, 32),
        (torch.uint32, 64 * 4 // 32),
        (torch.bfloat16, 96),
    ]
    assert found["transformer.token_embeddings.weight"].dtype == torch.uint32
    assert found["transformer.token_embeddings.scales"].dtype == torch.bfloat16
    assert not [name for name in found if "norm" in name and not name.endswith("norm.weight")]


@pytest.mark.parametrize("dtype", DTYPES)
def test_floats_come_back_to_the_bit(tmp_path, golden_weights, dtype):
    model = make(golden_weights, share_input_output_layers=False).to(DTYPES[dtype])
    source = save_model(model, tmp_path / "model")
    folder = written(source, tmp_path / "mlx", DTYPES[dtype])
    assert_same_bits(load_model(folder).state_dict(), model.state_dict())
    assert (folder / "model.safetensors").stat().st_size == (source / "model.safetensors").stat().st_size


@pytest.mark.parametrize(("quantize", "group_size"), FORMATS[1:])
@pytest.mark.parametrize("dtype", DTYPES)
def test_what_is_read_back_is_what_mlx_lm_dequantises(tmp_path, folder, dtype, quantize, group_size):
    their_convert = pytest.importorskip("mlx_lm").convert
    packed = written(folder, tmp_path / "mlx", DTYPES[dtype], quantize, group_size)
    their_convert(str(packed), str(tmp_path / "theirs"), dequantize=True)
    source = open_folder(packed)
    assert source.dtype == DTYPES[dtype]
    assert_same_bits(
        {name: source.weight(name) for name in source.shapes}, load_model(tmp_path / "theirs").state_dict()
    )


@pytest.mark.parametrize("model_dim", [96, 65])
@pytest.mark.parametrize("shard_bytes", [5 * 10**9, 20_000])
def test_sizes_that_are_odd_and_shards_do_no_harm(tmp_path, golden_weights, monkeypatch, model_dim, shard_bytes):
    """449 rows of 3 groups are an odd number of 16-bit scales; with 65 few matrices fit, and norms are odd."""
    pytest.importorskip("mlx_lm")
    monkeypatch.setattr(mlx, "SHARD_BYTES", shard_bytes)
    model = make(golden_weights, model_dim=model_dim, vocab_size=449, head_dim=32, share_input_output_layers=False)
    source = save_model(model, tmp_path / "model")
    folder = written(source, tmp_path / "mlx", torch.bfloat16, "4bit", 32)
    assert (len(list(folder.glob("*.safetensors"))) > 3) is (shard_bytes < 10**9)
    rows = rows_of(model.config)
    exact = our_logits(folder, rows, torch.float32)
    off = (mlx.TARGET.logits(folder, rows.tolist()) - exact).square().mean().sqrt()
    assert off < 0.05 * exact.std()


def test_writing_needs_no_mlx_and_running_says_so(tmp_path, folder, monkeypatch):
    for name in ("mlx", "mlx.core", "mlx_lm", "mlx_lm.utils"):
        monkeypatch.setitem(sys.modules, name, None)
    packed = written(folder, tmp_path / "mlx", torch.float16, "8bit", 32)
    assert load_model(packed).norm.weight.dtype == torch.float16
    with pytest.raises(
        MissingEngineError, match=r"mlx-lm cannot be loaded here .*pip install 'openelm-framework\[mlx\]'"
    ):
        mlx.TARGET.logits(packed, [[1, 2, 3]])


@pytest.mark.parametrize(
    ("quantize", "group_size", "said"),
    [
        ("Q4_0", 64, "mlx-lm cannot quantize to 'Q4_0': choose 4bit or 8bit"),
        ("3bit", 64, "'3bit'"),
        ("4bit", 48, "group size 48: mlx quantises in groups of one of 32, 64, 128"),
        ("4bit", 0, "group size 0"),
        ("8bit", 128, r"no matrix of .*model has rows of whole groups \(the longest row has 96 values\)"),
    ],
)
def test_what_mlx_lm_cannot_have_is_refused(tmp_path, golden_weights, quantize, group_size, said):
    folder = save_model(make(golden_weights, ffn_multipliers=0.5), tmp_path / "model")
    with pytest.raises(UserError, match=said):
        written(folder, tmp_path / "mlx", torch.float32, quantize, group_size)
    assert not (tmp_path / "mlx").exists()


# --- docs/mlx.md ------------------------------------------------------------------------------------------------------

# One process for all commands of a page: each would import transformers anew.
COMMANDS = """
import importlib, json, sys
for words in json.loads(sys.argv[1]):
    print("$", *words, flush=True)
    if words[0] == "openelm":
        from openelm import cli
        assert cli.run(words[1:]) == 0
    else:
        sys.argv = words
        importlib.import_module(words[0]).main()
"""


def documented() -> tuple[list[list[str]], dict[str, list[str]]]:
    """The page's commands, and its other blocks by language."""
    blocks: dict[str, list[str]] = {}
    for language, block in re.findall(r"```(\w+)\n(.*?)```", (ROOT / "docs" / "mlx.md").read_text(), re.DOTALL):
        blocks.setdefault(language, []).append(block)
    return [shlex.split(line) for block in blocks.pop("bash") for line in block.splitlines()], blocks


def shortened(words: list[str]) -> list[str]:
    short = {"--iters": "3", "--max-tokens": "4"}
    words = [short.get(before, word) for before, word in zip(["", *words], words, strict=False)]
    if words[0] == "openelm" and "--quantize" in words and "mlx" in words:
        words += ["--group-size", "32"]
    return words


@pytest.fixture
def workplace(tmp_path, golden_weights, tokenizer_file) -> Path:
    """A run with a model, and data as the page describes it."""
    save_model(make(golden_weights), tmp_path / "runs/demo/model", tokenizer=Tokenizer.load(tokenizer_file))
    _, blocks = documented()
    (tmp_path / "lora.yaml").write_text(blocks["yaml"][0])
    (tmp_path / "my-data").mkdir()
    for name in ("train", "valid", "test"):
        (tmp_path / "my-data" / f"{name}.jsonl").write_text(blocks["json"][0] * 8)
    return tmp_path


def run_commands(commands: list[list[str]], folder: Path) -> str:
    # mlx compiles for a CPU with the system's C++ compiler, half a minute here.
    env = {**os.environ, "MLX_DISABLE_COMPILE": "1", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [sys.executable, "-c", COMMANDS, json.dumps(commands)],
        cwd=folder, env=env, capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_the_documented_commands_run(workplace):
    pytest.importorskip("mlx_lm")
    pytest.importorskip("gguf")
    commands, _ = documented()
    programs = [words[0] for words in commands]
    assert programs == [
        *("openelm", "mlx_lm.generate", "mlx_lm.lora", "mlx_lm.lora", "mlx_lm.generate", "mlx_lm.fuse", "openelm")
    ]
    out = run_commands([shortened(words) for words in commands], workplace)
    assert "Test loss" in out
    adapters = load_file(workplace / "adapters" / "adapters.safetensors")
    kinds = {re.sub(r"transformer\.layers\.\d\.", "", name) for name in adapters}
    assert kinds == {f"attn.{matrix}.lora_{side}" for matrix in ("qkv_proj", "out_proj") for side in "ab"}
    assert len(adapters) == 3 * 4
    # What was learned is in the fused model, and nowhere else.
    base, tuned = load_model(workplace / "demo-mlx").state_dict(), load_model(workplace / "demo-tuned").state_dict()
    changed = {re.sub(r"layers\.\d\.", "", name) for name in base if not torch.equal(base[name], tuned[name])}
    assert changed == {"attn.qkv_proj.weight", "attn.out_proj.weight"}
    matrix = "layers.2.attn.out_proj"
    product = adapters[f"transformer.{matrix}.lora_a"] @ adapters[f"transformer.{matrix}.lora_b"]
    learned = tuned[f"{matrix}.weight"] - base[f"{matrix}.weight"]
    torch.testing.assert_close(learned, product.T, rtol=0, atol=1e-6)


@pytest.mark.slow  # a second process that imports transformers, for a second kind of data
def test_conversations_are_learned_from_too(workplace):
    pytest.importorskip("mlx_lm")
    commands, blocks = documented()
    (workplace / "runs/demo/model/chat_template.jinja").write_text(CHAT_TEMPLATE)
    for file in (workplace / "my-data").iterdir():
        file.write_text(blocks["json"][1] * 8)
    train = [*commands[2], "--mask-prompt", "--fine-tune-type", "dora"]
    out = run_commands([shortened(words) for words in (commands[0], train, commands[3])], workplace)
    assert "Test loss" in out
