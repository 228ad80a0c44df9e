"""Our own engine measured: the tokens are the engine's own, bytes and memory are counted, what cannot be is refused."""

import argparse
import importlib
import json
import re
import shlex
from pathlib import Path
from typing import Any

import pytest
import torch

from openelm import cli
from openelm.bench import generate, needs
from openelm.bench.generate import Machine, cases, own_entry
from openelm.bench.models import Models, file_bytes, given, named, stored_bytes
from openelm.bench.needs import available_memory, check_memory
from openelm.bench.norms import set_shares
from openelm.bench.results import Row
from openelm.bench.rounds import Case, Plan
from openelm.bench.runners import norms, ours
from openelm.commands import bench_speed
from openelm.data.tokenizer import Tokenizer
from openelm.errors import UserError
from openelm.infer.torch_decoder import TorchDecoder
from openelm.model import geometry
from openelm.model.folder import load_model, save_model
from openelm.model.geometry import ModelConfig
from openelm.model.transformer import OpenELM, RMSNorm
from small_models import make

TINY = dict(model_dim=64, num_transformer_layers=2, head_dim=16, ffn_dim_divisor=32)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, golden_weights: Any, tokenizer_file: Path) -> Path:
    """The uneven model, with a tokenizer."""
    path: Path = tmp_path_factory.mktemp("model") / "uneven"
    return save_model(make(golden_weights), path, tokenizer=Tokenizer.load(tokenizer_file))


def specification(folder: Path, **changes: Any) -> dict[str, Any]:
    return {"folder": str(folder), "backend": "torch", "dtype": None, "device": "cpu", "threads": 1, **changes}


def likeliest(model: OpenELM, prompt: list[int], tokens: int) -> list[int]:
    """Greedy continuation, everything computed anew for each token."""
    ids = list(prompt)
    with torch.no_grad():
        for _ in range(tokens):
            ids.append(int(model(torch.tensor([ids]))[0, -1].argmax()))
    return ids[len(prompt) :]


def test_the_tokens_that_are_timed_are_the_engines_own(folder: Path) -> None:
    model, prompts = load_model(folder), [[5, 6, 7, 8], [9, 8, 7, 6]]
    runner = ours.load(specification(folder))
    marks: list[int] = []
    for _ in range(2):  # slots that are kept are emptied
        runner.prepare(2, 12)
        made = runner.run(prompts, 6, lambda: marks.append(1))
        assert made == [likeliest(model, prompt, 6) for prompt in prompts]
    assert marks == [1, 1]
    assert runner.about["engine"] == "torch" and runner.about["threads"] == 1


def test_bytes_of_a_token_are_all_weights_but_a_table_that_is_looked_up(golden_weights: Any) -> None:
    tied, untied = make(golden_weights), make(golden_weights, share_input_output_layers=False)
    assert ours.bytes_read(tied) == 4 * tied.config.num_parameters()
    assert ours.bytes_read(untied) == 4 * (untied.config.num_parameters() - untied.token_embeddings.weight.numel())


def test_a_profile_names_operations_and_their_shares(folder: Path) -> None:
    found = ours.load(specification(folder)).profile([5, 6, 7])
    assert any("mm" in name for name in found) and 0 < sum(found.values()) <= 1


@pytest.mark.parametrize("form", ["naive", "fused", "layernorm", "ours"])
def test_a_norm_of_another_form_is_counted_and_computes_what_it_is_called(folder: Path, form: str) -> None:
    runner = norms.load(specification(folder, norm=form))
    said = runner.norms([5, 6, 7])
    assert said["invocations"] == 4 * 3 + 1  # two a layer for its input, two for queries and keys, one at the end
    assert 0 < said["share"] < 1
    runner.prepare(1, 8)
    same = runner.run([[5, 6, 7]], 5, lambda: None) == [likeliest(load_model(folder), [5, 6, 7], 5)]
    assert same or form == "layernorm"
    x, module = torch.randn(3, 64), runner._modules[0]
    if form == "layernorm":
        centred = x - x.mean(-1, keepdim=True)
        expected = centred / (centred.pow(2).mean(-1, keepdim=True) + 1e-6).sqrt() * module.weight
    else:
        expected = x / (x.pow(2).mean(-1, keepdim=True) + 1e-6).sqrt() * module.weight
    assert torch.allclose(module(x), expected, atol=1e-5)


@pytest.mark.parametrize(("size", "calls"), [("270M", 65), ("450M", 81), ("1.1B", 113), ("3B", 145)])
def test_the_papers_sizes_call_as_many_norms_as_it_counts(size: str, calls: int) -> None:
    with torch.device("meta"):
        model = OpenELM(ModelConfig.from_name(size))
    assert sum(isinstance(module, RMSNorm) for module in model.modules()) == calls


def test_models_are_made_once_in_the_form_and_size_that_is_reckoned(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(geometry.SIZES, "30M", TINY)
    model, said = named("30M", 64), []
    models = Models(tmp_path, 32, said.append)
    for weights in ("bf16", "fp32", "8bit", "4bit"):
        path = models.stored(model, weights)
        header = 4096  # of a safetensors file
        assert 0 <= file_bytes(path) - stored_bytes(model, weights, 32) < header, weights
        assert load_model(path).config.model_dim == 64
    count = len(said)
    assert models.stored(model, "4bit").is_dir() and len(said) == count, "what is there is taken"
    for kind in ("BF16", "Q8_0", "Q4_0"):
        pytest.importorskip("gguf")
        assert models.gguf(model, kind).read_bytes()[:4] == b"GGUF"
    assert (models.for_transformers(model) / "modeling_openelm.py").is_file()


def test_cases_are_the_papers_unless_others_are_asked_for() -> None:
    assert cases(35, None, [], [], [1], quick=False) == (Case(35, 1024),)
    assert cases(35, None, [], [], [1, 8], quick=True) == (Case(35, 128), Case(35, 128, 8))
    assert cases(35, None, [64, 1024], [512], [1], quick=False) == (Case(64, 64), Case(1024, 64), Case(512, 1))
    assert [str(case) for case in cases(5, 7, [], [], [1, 8], quick=False)] == ["5+7", "5+7 x8"]


def test_memory_is_announced_and_refused_where_it_is_not_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(needs, "available_memory", lambda: 10 * 10**9)
    three = {"a": 4 * 10**9, "b": 3 * 10**9, "c": 5 * 10**9}
    with pytest.raises(
        UserError, match=r"12.00 GB .* 10.00 GB are free on cpu: pass --one-at-a-time, which takes 5.00 GB"
    ):
        check_memory(three, together=True, device="cpu")
    assert "5.00 GB at most, for c, of 10.00 GB free" in check_memory(three, together=False, device="cpu")
    assert "7.00 GB for 2 entries in memory together" in check_memory(
        {"a": 4 * 10**9, "b": 3 * 10**9}, together=True, device="cpu"
    )
    with pytest.raises(UserError, match="measure fewer, or smaller ones"):
        check_memory({"a": 11 * 10**9}, together=True, device="cpu")
    monkeypatch.setattr(needs, "available_memory", lambda: None)
    assert "could not be found out" in check_memory(three, together=True, device="cpu")


def test_free_memory_is_less_than_the_machine_has() -> None:
    found = available_memory()
    assert found is None or 10**8 < found < 10**14


def test_an_entry_needs_its_weights_its_cache_and_its_library(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(generate, "needs_fp32", lambda device: False)
    model, plan = named("1.1B", 2048), Plan((Case(35, 1024),), 1, 1)
    found = {kind: own_entry(model, kind, "native", plan, Machine("cpu", 1), 64).need for kind in ("bf16", "4bit")}
    assert found["bf16"].weights == 2 * model.config.num_parameters()
    assert found["bf16"].cache == (35 + 1024) * model.config.cache_bytes_per_token()
    assert found["4bit"].weights == pytest.approx(0.28 * found["bf16"].weights, rel=0.02)  # 4.5 of 16 bits
    on_torch = own_entry(model, "4bit", "torch", plan, Machine("cpu", 1), 64).need
    assert on_torch.weights == found["bf16"].weights, "torch computes with what the codes stand for"


def test_bench_generate_measures_a_folder_and_writes_what_it_found(
    folder: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("matplotlib")
    out = tmp_path / "out"
    words = ["bench", "generate", str(folder), "--backend", "torch", "--threads", "1", "--device", "cpu"]
    words += ["--prompt", "5", "--tokens", "6", "--repeats", "2", "--quick", "--out", str(out)]
    assert cli.run([*words, "--json"]) == 0
    printed, said = capfd.readouterr()
    assert re.search(r"^memory: [\d.]+ GB for 2 entries in memory together, of [\d.]+ GB free$", said, re.MULTILINE)
    data = json.loads(printed)
    assert data == json.loads((out / "result.json").read_text())
    (row,) = data["rows"]
    config = load_model(folder).config
    assert not row["problem"], row["problem"]
    assert row["about"]["parameters"] == config.num_parameters() and row["about"]["tokens_made"] == 6
    assert row["about"]["bytes_per_token"] == 4 * config.num_parameters()
    assert 0 < row["about"]["peak_memory_bytes"] < row["about"]["announced_bytes"]
    assert row["about"]["file_bytes"] == file_bytes(folder)
    assert all(len(row["metrics"][name]) == 2 for name in ("prompt_s", "generation_s", "total_tokens_per_s"))
    assert row["metrics"]["first_token_s"][0] > row["metrics"]["load_s"][0] > 0
    assert len(data["roof"]["bytes_per_s"]) == len(data["roof"]["flops_per_s"]) == 3
    assert "| uneven torch |" in (out / "table.md").read_text()
    assert (out / "chart.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    assert cli.run(words) == 2
    assert "result.json exists: choose another --out, or pass --overwrite" in capfd.readouterr().err


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (
            ["generate", "--sizes", "270m"],
            "30M, 100M, 270M, 450M, 1.1B, 3B: did you mean 270M?",
        ),
        (["generate", "nowhere"], "nowhere is not a folder"),
        (["generate", "MODEL", "--context", "100"], "has a context of 64 tokens, and 164 are to be measured"),
        (["generate", "--tokens", "0"], "--tokens 0 must be at least 1"),
        (["generate", "--batch", "0"], "--batch 0 must be at least 1"),
        (["generate", "--repeats", "0"], "--repeats 0 must be at least 1"),
        (["generate", "--threads", "0"], "--threads 0 must be at least 1"),
        (["generate", "--device", "tpu"], "device 'tpu' cannot be used"),
        (["generate", "--limit", "0"], "--limit 0 must be more than 0"),
        (["generate", "--sizes", "30M", "30M"], "30M bf16 is asked for twice"),
        (["generate", "--out", "FILE"], "is a file: name a folder"),
        (["generate", "--models-folder", "FILE"], "is a file: name a folder"),
        (["peers", "--peers", "lama.cpp"], "did you mean llama.cpp?"),
        (["peers", "--peers", "pythia"], "did you mean Pythia-1.4B?"),
        (["peers", "--environment", "llama.cpp"], "write PEER=PYTHON"),
        (["peers", "--environment", "llama.cpp=nowhere/python"], "nowhere/python is no program"),
        (["peers", "--environment", "ours=python"], "ours runs here"),
        (["norms", "--size", "2B"], "size '2B' is not one of"),
        (["train", "--steps", "0"], "--steps 0 must be at least 1"),
        (["train", "--warmup", "-1"], "--warmup -1 must be at least 0"),
        (["data", "--tokenizer", "MODEL", "--repeats", "0"], "--repeats 0 must be more than 0"),
    ],
)
def test_what_cannot_be_measured_is_refused_before_anything_starts(
    folder: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    words: list[str],
    said: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "FILE").write_text("")
    monkeypatch.setattr("openelm.bench.session.Session.__init__", lambda *_, **__: pytest.fail("a process was started"))
    assert cli.run(["bench", *[str(folder) if word == "MODEL" else word for word in words]]) == 2
    err = capsys.readouterr().err
    assert said in err and err.count("\n") == 1
    assert [path.name for path in tmp_path.iterdir()] == ["FILE"]


def test_too_little_memory_is_refused_before_a_model_is_made(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(needs, "available_memory", lambda: 5 * 10**9)
    place = tmp_path / "models"
    words = ["bench", "generate", "--sizes", "3B", "--device", "cpu", "--models-folder", str(place)]
    assert cli.run(words) == 2
    assert "5.00 GB are free on cpu: measure fewer, or smaller ones" in capsys.readouterr().err
    assert not place.exists()


def test_a_quantised_folder_is_measured_as_it_is(folder: Path, tmp_path: Path) -> None:
    from openelm.interop.convert import convert, open_source
    from openelm.interop.target import Format

    convert(open_source(str(folder)), "mlx", tmp_path / "four", Format(torch.bfloat16, "4bit", 32))
    model, plan = given(str(tmp_path / "four"), 10), Plan((Case(5, 5),), 1, 1)
    entry = own_entry(model, "stored", "auto", plan, Machine("cpu", 1), 64)
    assert model.bits == entry.about["bits"] == 4
    with pytest.raises(UserError, match="is quantised to 4 bits already: leave --weights out"):
        own_entry(model, "8bit", "auto", plan, Machine("cpu", 1), 64)


def test_engines_without_a_compiler_or_device_are_refused_by_backend(folder: Path) -> None:
    plan = Plan((Case(5, 5),), 1, 1)
    with pytest.raises(UserError, match="--backend native computes on the CPU, and --device is cuda"):
        own_entry(given(str(folder), 10), "stored", "native", plan, Machine("cuda", 1), 64)


def test_compiled_ours_is_the_same_decoder(folder: Path) -> None:
    decoder = TorchDecoder(load_model(folder))
    assert ours.Ours(decoder, 1).about["engine"] == "torch"


def test_the_longer_commands_of_the_page_can_be_asked_for() -> None:
    """tests/test_docs.py runs the short ones."""
    page = (Path(__file__).parents[2] / "docs" / "bench.md").read_text(encoding="utf-8")
    commands = re.findall(r"^    openelm (bench .*)$", page, re.MULTILINE)
    assert len(commands) >= 5
    parser = argparse.ArgumentParser(exit_on_error=False)
    importlib.import_module("openelm.commands.bench").add_arguments(parser)
    for command in [*commands, bench_speed.GENERATE_EXAMPLE, bench_speed.PEERS_EXAMPLE, bench_speed.NORMS_EXAMPLE]:
        parser.parse_args(shlex.split(command.removeprefix("openelm "))[1:])


def test_an_option_of_several_values_may_be_given_again() -> None:
    parser = argparse.ArgumentParser(exit_on_error=False)
    importlib.import_module("openelm.commands.bench").add_arguments(parser)
    words = "peers --environment a=1 b=2 --environment c=3 --peers ours --peers llama.cpp --context 64"
    given = parser.parse_args(words.split())
    assert (given.environment, given.peers, given.context) == (["a=1", "b=2", "c=3"], ["ours", "llama.cpp"], [64])
    again = parser.parse_args(["peers"])
    assert (again.environment, again.peers, again.context) == ([], [], [])


@pytest.mark.parametrize(("of_roof", "bound"), [(0.75, 0.25), (1.0, 0.0), (1.23, None), (None, None)])
def test_norms_of_the_native_decoder_are_bounded_where_the_roof_is_one(
    monkeypatch: pytest.MonkeyPatch, of_roof: float | None, bound: float | None
) -> None:
    """Reading faster than the memory was measured says that the measure was wrong, and not that norms cost nothing."""
    monkeypatch.setattr("openelm.bench.norms.share_of_bandwidth", lambda *_: of_roof)
    row = Row("270M", "35+128", about={"engine": "native"})
    set_shares(row, named("270M", 200), {})
    assert row.about.get("norm_share_at_most") == bound and row.about["invocations"] == 65
