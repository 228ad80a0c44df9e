"""openelm info: the figures of named sizes, folders, runs and recipes."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

import small_adapters
from openelm import ModelConfig, OpenELM, cli, save_model
from openelm.commands.info import bar, readable_bytes
from openelm.commands.info_twins import from_to
from openelm.interop.adapter import Adapter, shapes

TINY = dict(model_dim=64, num_transformer_layers=3, head_dim=16, num_gqa_groups=2, ffn_dim_divisor=16, vocab_size=300)


def figures(capsys: pytest.CaptureFixture[str], *words: str) -> dict[str, Any]:
    assert cli.run(["info", *words, "--json"]) == 0
    found: dict[str, Any] = json.loads(capsys.readouterr().out)
    return found


def test_the_papers_sizes_have_their_parameter_counts(capsys: pytest.CaptureFixture[str]) -> None:
    counts = {"270M": 271_527_168, "450M": 457_179_136, "1.1B": 1_079_891_456, "3B": 3_036_647_424}
    for size, parameters in counts.items():
        found = figures(capsys, size)
        assert found["parameters"] == parameters
        vocabulary_and_last_norm = (found["vocab_size"] + 1) * found["model_dim"]
        assert sum(found["layer_parameters"]) + vocabulary_and_last_norm == parameters


def test_flops_cache_and_bytes_are_what_the_lists_give(capsys: pytest.CaptureFixture[str]) -> None:
    found = figures(capsys, "OpenELM-270M")
    heads, kv_heads = sum(found["num_query_heads"]), sum(found["num_kv_heads"])
    gains = 16 * (2 * 1280 + 2 * 64) + 1280
    matrices = 271_527_168 - gains
    assert found["matmul_parameters"] == matrices
    assert found["train_flops_per_token"] == 6 * matrices + 6 * 2048 * 64 * heads
    assert found["cache_bytes_per_token"] == 2 * 64 * kv_heads * 2
    assert found["cache_bytes_at_full_context"] == 2048 * 2 * 64 * kv_heads * 2
    assert found["weight_bytes"] == {
        "float32": 4 * 271_527_168,
        "bfloat16": 2 * 271_527_168,
        "8 bit": matrices * 8.5 / 8 + 2 * gains,
        "4 bit": matrices * 4.5 / 8 + 2 * gains,
    }
    assert found["uniform"]["query_heads"] == heads / 16


def test_options_change_the_geometry(capsys: pytest.CaptureFixture[str]) -> None:
    found = figures(capsys, "270M", "--vocab-size", "32128", "--qkv-multipliers", "1", "--ffn-multipliers", "0.5,2")
    assert found["vocab_size"] == 32128
    assert found["num_query_heads"] == [20] * 16
    assert (found["ffn_dims"][0], found["ffn_dims"][-1]) == (768, 2560)


def test_every_layer_is_drawn_with_its_heads_and_widths(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run(["info", "1.1B"]) == 0
    lines = capsys.readouterr().out.splitlines()
    layers = [line for line in lines if line[:5].strip().isdecimal()]
    assert len(layers) == 28
    assert layers[0].split()[:2] == ["0", "16/4"] and "1,024 " in layers[0]
    assert layers[27].split()[:2] == ["27", "32/8"] and "8,192 " in layers[27]
    assert "1,079,891,456" in "\n".join(lines)
    assert all("│" in line for line in layers)


def test_a_bar_is_as_long_as_its_value_and_marked_at_the_uniform_width() -> None:
    assert bar(4, 6, 8, "#", "|") == "############      |     "
    assert bar(8, 6, 8, "#", "|") == "##################|#####"
    assert bar(8, 8, 8, "#", "|") == "#######################|"


def test_a_model_folder_and_a_run_give_the_same_geometry(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = ModelConfig(**TINY)  # type: ignore[arg-type]
    save_model(OpenELM(config), tmp_path / "run" / "model", dtype=torch.float32)
    expected = config.num_parameters()
    assert figures(capsys, str(tmp_path / "run" / "model"))["parameters"] == expected
    assert figures(capsys, str(tmp_path / "run"))["parameters"] == expected
    assert figures(capsys, str(tmp_path / "run"), "--vocab-size", "400")["parameters"] == expected + 100 * 64


def test_a_run_without_a_model_is_read_from_its_config(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = ModelConfig(**TINY)  # type: ignore[arg-type]
    geometry = {**config.as_dict(), "ffn_dims": list(config.ffn_dims), "num_parameters": config.num_parameters()}
    (tmp_path / "config.yaml").write_text(yaml.safe_dump({"name": "x", "geometry": geometry}))
    found = figures(capsys, str(tmp_path))
    assert found["parameters"] == config.num_parameters()
    assert found["num_query_heads"] == list(config.num_query_heads)


def test_files_of_other_engines_are_drawn_quantised_or_not(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], tokenizer_file: Path
) -> None:
    pytest.importorskip("gguf")
    # As many rows as the tokenizer has, and rows that are whole blocks of 32 weights.
    config = ModelConfig(**{**TINY, "vocab_size": 400, "ffn_dim_divisor": 32, "qkv_multipliers": (1.0, 2.0)})  # type: ignore[arg-type]
    model = save_model(OpenELM(config), tmp_path / "model", dtype=torch.float32)
    for name, *options in (
        ("gguf", "--tokenizer", str(tokenizer_file)),
        ("gguf", "--tokenizer", str(tokenizer_file), "--quantize", "Q4_0"),
        ("ollama", "--tokenizer", str(tokenizer_file), "--quantize", "Q8_0"),
        ("corenet",),
    ):
        written = tmp_path / "-".join([name, *options[3:]])
        assert cli.run(["convert", str(model), str(written), "--to", name, *options]) == 0
        capsys.readouterr()
        found = figures(capsys, str(written))
        assert found["num_query_heads"] == list(config.num_query_heads)
        assert found["ffn_dims"] == list(config.ffn_dims)
        assert found["parameters"] == config.num_parameters()


def test_a_recipe_takes_the_vocabulary_of_the_tokenizer_that_it_trains(capsys: pytest.CaptureFixture[str]) -> None:
    from openelm.config import load_recipe

    recipe = load_recipe("demo", [])
    found = figures(capsys, "demo")
    assert found["vocab_size"] == recipe.tokenizer.vocab_size
    assert found["model_dim"] == recipe.model.model_dim


def test_what_is_nothing_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run(["info", "271M"]) == 2
    error = capsys.readouterr().err
    assert "'271M' is no named size" in error and "270M" in error and "demo" in error
    assert cli.run(["info", str(tmp_path)]) == 2
    assert "neither a model folder (config.json) nor a run folder" in capsys.readouterr().err
    (tmp_path / "config.yaml").write_text("- 1\n")
    assert cli.run(["info", str(tmp_path)]) == 2
    assert "holds no geometry" in capsys.readouterr().err
    assert cli.run(["info", "270M", "--vocab-size", "0"]) == 2
    assert "vocab_size=0 must be a whole number of at least 1" in capsys.readouterr().err


def test_sizes_are_readable() -> None:
    assert [readable_bytes(n) for n in (0, 512, 999_600, 543_054_336, 12_146_589_696, 2e12)] == [
        "0 bytes",
        "512 bytes",
        "1000 kB",
        "543 MB",
        "12.1 GB",
        "2.00 TB",
    ]


def test_of_an_adapter_it_is_said_what_it_is(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = ModelConfig(**TINY)  # type: ignore[arg-type]
    folder = tmp_path / "my adapter"
    adapter = small_adapters.write(folder, config, "dora", ("qkv_proj",))
    parameters = sum(math.prod(shape) for shape in shapes(adapter, config).values())
    expected = {"kind": "dora", "r": 4, "alpha": 8, "dropout": 0.1, "targets": ["qkv_proj"], "parameters": parameters}
    assert figures(capsys, str(folder)) == {"name": str(folder), "base": "someone/small", "adapter": expected}
    assert cli.run(["info", str(folder)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert "tuned from  someone/small" in lines and f"trained     {parameters:,} parameters" in lines
    assert "adapter     dora, r 4, alpha 8, dropout 0.1, on qkv_proj" in lines
    assert lines[-1] == f"A model of it: openelm merge someone/small '{folder}' OUT"
    (folder / "adapter_config.json").write_text('{"peft_type": "IA3"}')
    assert cli.run(["info", str(folder)]) == 2
    assert "says peft_type 'IA3'" in capsys.readouterr().err


def test_a_tuning_run_says_from_what_it_began(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = ModelConfig(**TINY)  # type: ignore[arg-type]
    section = {"kind": "lora", "r": 2, "alpha": 4.0, "dropout": 0.0, "targets": ["qkv_proj", "out_proj"]}
    of_run: dict[str, Any] = {"model": {"path": "someone/small"}, "geometry": config.as_dict(), "adapter": section}
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(of_run))
    found = figures(capsys, str(tmp_path))
    adapter = Adapter("lora", 2, 4, 0.0, ("qkv_proj", "out_proj"))
    parameters = sum(math.prod(shape) for shape in shapes(adapter, config).values())
    assert found["base"] == "someone/small" and found["parameters"] == config.num_parameters()
    assert found["adapter"] == {**section, "parameters": parameters}
    (tmp_path / "config.yaml").write_text(yaml.safe_dump({**of_run, "adapter": None}))
    assert cli.run(["info", str(tmp_path)]) == 0
    assert "tuned from  someone/small" in (printed := capsys.readouterr().out) and "adapter" not in printed
    (tmp_path / "config.yaml").write_text(yaml.safe_dump({**of_run, "adapter": {"kind": "lora"}}))
    assert cli.run(["info", str(tmp_path)]) == 2
    assert "holds no adapter" in capsys.readouterr().err


def test_a_twin_is_drawn_with_its_distance_and_a_recipe_that_makes_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.run(["info", "--like", "270M", "--kind", "uniform"]) == 0
    text = capsys.readouterr().out
    lines = text.splitlines()
    assert lines[0].startswith("uniform twin of OpenELM-270M: 16 layers, model_dim 1,280")
    layers = [line for line in lines if line[:5].strip().isdecimal()]
    assert len(layers) == 16 and all(line.split()[1] == "16/4" and " 2,880 " in line for line in layers)
    # 270,380,288 of 271,527,168 parameters.
    assert "From OpenELM-270M: parameters -0.42%, training FLOPs a token -0.20%, in rows of 2,048." in lines
    section = text[text.index("\nmodel:\n") :]
    recipe = yaml.safe_load(section)["model"]
    assert (recipe["qkv_multipliers"], recipe["ffn_multipliers"], recipe["vocab_size"]) == (0.8, 2.25, 32000)
    pasted = tmp_path / "twin.yaml"
    rest = "name: twin\ndata: {sources: [{name: a, path: a.txt}]}\n"
    train = "train: {steps: 1, global_batch: 1, micro_batch: 1, lr: 0.001, min_lr: 0}\n"
    pasted.write_text(rest + train + section)
    found = figures(capsys, str(pasted))
    assert found["parameters"] == 270_380_288
    assert found["num_query_heads"] == [16] * 16 and found["ffn_dims"] == [2880] * 16


def test_the_pasted_recipe_of_any_kind_makes_the_twin(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    # An odd one: untied, with another context and rotation, and heads of which layers take turns.
    config = ModelConfig(
        **{**TINY, "num_transformer_layers": 9, "num_gqa_groups": 1},  # type: ignore[arg-type]
        max_context_length=100,
        rope_freq_constant=500,
        share_input_output_layers=False,
    )
    config_file = tmp_path / "config.yaml"
    config_file.write_text(yaml.safe_dump({"geometry": config.as_dict()}))
    rest = "name: twin\ndata: {row_length: 50, sources: [{name: a, path: a.txt}]}\n"
    train = "train: {steps: 1, global_batch: 1, micro_batch: 1, lr: 0.001, min_lr: 0}\n"
    seen = set()
    for kind in ("uniform", "reversed", "ffn", "layer-norm", "llama"):
        assert cli.run(["info", "--like", str(tmp_path), "--kind", kind]) == 0
        text = capsys.readouterr().out
        expected = figures(capsys, "--like", str(tmp_path), "--kind", kind)
        pasted = tmp_path / "twin.yaml"
        pasted.write_text(rest + train + text[text.index("\nmodel:\n") :])
        found = figures(capsys, str(pasted))
        assert expected["kind"] == kind and expected["like"] == str(tmp_path)
        assert set(expected) - set(found) == {"like", "kind", "row_length", "parameters_off", "flops_off", "recipe"}
        differing = {name for name in found if found[name] != expected[name]}
        assert differing <= {"name", "bos_token_id", "eos_token_id"}
        seen.add(json.dumps([found["num_query_heads"], found["ffn_dims"], found["normalization_layer_name"]]))
    assert len(seen) == 5


def test_the_table_of_twins_has_a_row_a_kind(capsys: pytest.CaptureFixture[str]) -> None:
    from openelm.model.twins import KINDS

    found = figures(capsys, "--like", "270M")
    assert (found["like"], found["parameters"], found["row_length"]) == ("OpenELM-270M", 271_527_168, 2048)
    assert [twin["kind"] for twin in found["twins"]] == list(KINDS)
    for twin in found["twins"]:
        assert twin["is_within"] and max(abs(twin["parameters_off"]), abs(twin["flops_off"])) <= 0.005
        assert twin["parameters_off"] == twin["parameters"] / 271_527_168 - 1
        assert twin["flops_off"] == twin["train_flops_per_token"] / found["train_flops_per_token"] - 1
    uniform, llama = found["twins"][1], found["twins"][-1]
    assert uniform["num_query_heads"] == [16] * 16 and uniform["cache_bytes_per_token"] == 2 * 2 * 64 * 4 * 16
    assert llama["cache_bytes_per_token"] == 4 * uniform["cache_bytes_per_token"]
    assert llama["recipe"]["num_gqa_groups"] == 1 and llama["recipe"]["normalize_qk_projections"] is False
    assert cli.run(["info", "--like", "270M"]) == 0
    rows = {line.split()[0]: line for line in capsys.readouterr().out.splitlines()[3:-2]}
    assert list(rows) == list(KINDS)
    assert rows["uniform"].split()[1:8] == ["270,380,288", "-0.42%", "1.823", "-0.20%", "16", "2,880", "16,384"]
    assert "12 to 20      768 to 5,120" in rows["layer-wise"] and "20 to 12      5,120 to 768" in rows["reversed"]


def test_a_kind_without_a_twin_is_a_row_of_the_table_and_an_error_by_itself(
    capsys: pytest.CaptureFixture[str],
) -> None:
    words = ["--like", "270M", "--within", "1e-9"]
    found = {twin["kind"]: twin for twin in figures(capsys, *words)["twins"]}
    assert found["layer-wise"]["is_within"] and not found["no-qk-norm"]["is_within"]
    gains = 16 * 2 * 64
    assert found["no-qk-norm"]["parameters"] == 271_527_168 - gains
    assert cli.run(["info", *words]) == 0
    (row,) = [line for line in capsys.readouterr().out.splitlines() if line.startswith("no-qk-norm")]
    assert "271,525,120" in row and row.endswith("none is within 1e-07%, this is the nearest")
    assert cli.run(["info", *words, "--kind", "no-qk-norm"]) == 2
    error = capsys.readouterr().err
    assert "no no-qk-norm twin of 271,527,168 parameters is within 1e-07%: the nearest has 271,525,120" in error
    assert error.count("\n") == 1


def test_options_change_the_model_before_its_twin_is_looked_for(capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--like", "30M", "--kind", "uniform"]
    plain, large = figures(capsys, *words), figures(capsys, *words, "--vocab-size", "50000")
    assert large["vocab_size"] == large["recipe"]["vocab_size"] == 50_000
    assert large["parameters"] - plain["parameters"] == 18_000 * 384
    short = figures(capsys, *words, "--row-length", "64")
    assert (short["row_length"], plain["row_length"]) == (64, 2048)
    assert figures(capsys, *words, "--max-context-length", "4096", "--row-length", "4096")["row_length"] == 4096
    wide = figures(capsys, "--like", "30M", "--ffn-multipliers", "3", "--kind", "uniform")
    assert set(wide["ffn_dims"]) == {3 * 384}
    assert figures(capsys, *words, "--within", "0.5%") == figures(capsys, *words, "--within", "0.005") == plain


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ([], "name what is to be drawn: a TARGET as 270M, or --like 270M"),
        (["270M", "--like", "30M"], "270M is drawn, or --like 30M sought: give one of them"),
        (["270M", "--kind", "uniform"], "--kind is for twins alone: give --like 270M too"),
        (["--within", "0.1", "--row-length", "8"], "--within, --row-length is for twins alone: give --like TARGET"),
        (["--like", "271M"], "'271M' is no named size"),
        (["--like", "270M", "--kind", "unifrom"], "kind 'unifrom' is not one of layer-wise, uniform"),
        (["--like", "270M", "--kind", "revers"], "did you mean reversed?"),
        (["--like", "270M", "--row-length", "0"], "--row-length 0 must be at least 1 and at most the context of 2048"),
        (["--like", "270M", "--row-length", "4096"], "or give --max-context-length too"),
        (["--like", "270M", "--within", "-0.1"], "--within -0.1 must be a share of at least 0 and below 1"),
        (["--like", "270M", "--within", "nan"], "--within nan must be a share"),
        (["--like", "270M", "--within", "100%"], "--within 1 must be a share"),
        (["--like", "270M", "--vocab-size", "0"], "vocab_size=0 must be a whole number of at least 1"),
    ],
)
def test_what_cannot_be_a_twin_is_refused(words: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run(["info", *words]) == 2
    captured = capsys.readouterr()
    assert said in captured.err and captured.err.count("\n") == 1 and not captured.out


def test_a_share_that_is_no_number_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        cli.run(["info", "--like", "270M", "--within", "half"])
    assert stopped.value.code == 2
    assert "argument --within: invalid share value: 'half'" in capsys.readouterr().err


def test_heads_and_widths_are_said_from_the_first_layer_to_the_last() -> None:
    assert from_to([16, 16]) == "16"
    assert from_to([768, 1024, 5120]) == "768 to 5,120" and from_to([5120, 768]) == "5,120 to 768"
    assert from_to([4, 8, 4, 8]) == "4 or 8"
