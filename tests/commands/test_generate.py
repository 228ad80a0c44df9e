"""openelm generate: what is no model folder is named for what it is, with what to do about it."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from openelm import cli
from openelm.errors import UserError

COMMANDS = {"generate": ("--prompt", "a"), "perplexity": (__file__,)}


def refused(command: str, model: str | Path, capsys: pytest.CaptureFixture[str]) -> str:
    assert cli.run([command, str(model), *COMMANDS.get(command, ())]) == 2
    out, error = capsys.readouterr()
    assert out == "" and error.count("\n") == 1
    return error


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize(
    ("start", "what", "options"),
    [
        (b"GGUF\x03\0\0\0", "a GGUF file", ""),
        (b"PK\x03\x04", "a PyTorch checkpoint", " --tokenizer PATH"),
        (b"\x80\x02\x8a\n", "a PyTorch checkpoint", " --tokenizer PATH"),
    ],
    ids=["gguf", "pt", "old pt"],
)
def test_a_file_of_another_engine_is_known_by_its_content(tmp_path, capsys, command, start, what, options):
    file = tmp_path / "model.safetensors"  # what it is called says nothing
    file.write_bytes(start + b"{" + b"\0" * 100)
    expected = f"{file} is {what}: `openelm convert {file} FOLDER --to hf{options}`, then generate from FOLDER"
    assert expected in refused(command, file, capsys)


def test_a_path_with_a_space_is_quoted_in_the_command(tmp_path, capsys):
    file = tmp_path / "my model"
    file.write_bytes(b"GGUF\x03\0\0\0")
    assert f"`openelm convert '{file}' FOLDER --to hf`" in refused("generate", file, capsys)


def test_a_folder_for_ollama_leads_to_its_gguf(tmp_path, capsys):
    for name in ("Modelfile", "model.gguf"):
        (tmp_path / name).write_bytes(b"GGUF")
    said = refused("generate", tmp_path, capsys)
    assert f"is a folder for Ollama: `openelm convert {tmp_path / 'model.gguf'} FOLDER --to hf`" in said


@pytest.mark.parametrize("command", [*COMMANDS, "info"])
@pytest.mark.parametrize("names", [8, 100], ids=["short", "long"])
def test_weights_given_directly_lead_to_their_folder(tmp_path, capsys, command, names):
    file = tmp_path / "out.gguf"
    save_file({f"tensor {i}": torch.zeros(1) for i in range(names)}, file)
    assert f"out.gguf is a safetensors file: give its folder, {tmp_path}" in refused(command, file, capsys)


@pytest.mark.parametrize("command", [*COMMANDS, "info"])
def test_weights_whose_length_begins_like_a_pickle_are_not_taken_for_one(tmp_path, capsys, command):
    header = json.dumps({"a": {"dtype": "U8", "shape": [0], "data_offsets": [0, 0]}}).encode().ljust(0x80)
    (tmp_path / "model").write_bytes(len(header).to_bytes(8, "little") + header)
    assert "is a safetensors file" in refused(command, tmp_path / "model", capsys)


@pytest.mark.parametrize("command", COMMANDS)
def test_a_peft_adapter_is_to_be_merged(tmp_path, capsys, command):
    (tmp_path / "adapter_config.json").write_text('{"base_model_name_or_path": "someone/small"}')
    merge = f"`openelm merge someone/small {tmp_path} OUT`"
    assert f"{tmp_path} is an adapter, and no model by itself: make one with {merge}" in refused(
        command, tmp_path, capsys
    )
    for text in ("{}", "[", '{"base_model_name_or_path": 3}'):
        (tmp_path / "adapter_config.json").write_text(text)
        assert f"`openelm merge MODEL {tmp_path} OUT`" in refused(command, tmp_path, capsys)
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "model.safetensors").touch()  # a whole model may have an adapter beside it
    assert "adapter" not in refused(command, tmp_path, capsys).replace(str(tmp_path), "")


@pytest.mark.parametrize("command", [*COMMANDS, "info"])
def test_an_empty_file_is_said_to_be_empty(tmp_path, capsys, command):
    (tmp_path / "model.gguf").touch()
    assert "model.gguf is an empty file: copy or download it again" in refused(command, tmp_path / "model.gguf", capsys)


@pytest.mark.parametrize("command", [*COMMANDS, "info"])
@pytest.mark.parametrize(
    ("address", "name"),
    [
        ("https://huggingface.co/apple/OpenELM-270M", "apple/OpenELM-270M"),
        ("https://hub.example/apple/OpenELM-270M/tree/main?library=mlx", "apple/OpenELM-270M"),
        ("huggingface.co/apple/OpenELM-1.1B/", "apple/OpenELM-1.1B"),
        ("hf.co/me/demo/blob/v1.2/model.safetensors", "me/demo@v1.2"),
        ("https://huggingface.co/me/demo/tree/refs%2Fpr%2F3", "me/demo@refs/pr/3"),
        ("https://huggingface.co/datasets/me/text", "OWNER/NAME"),
        ("s3://bucket/model", "OWNER/NAME"),
    ],
)
def test_an_address_leads_to_the_name(capsys, command, address, name):
    said = refused(command, address, capsys)
    assert f"{address} is an address" in said and said.endswith(f" by its name: {name}\n")


def test_a_folder_named_like_an_address_is_a_folder(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("hf.co/me/demo").mkdir(parents=True)
    assert "hf.co/me/demo has no config.json" in refused("generate", "hf.co/me/demo", capsys)


def test_text_and_what_is_not_there_are_refused_as_before(tmp_path, capsys):
    (tmp_path / "text").write_text("8 bytes {: not safetensors")
    for name in ("text", "nothing"):
        assert f"{name} is not a folder: give a model folder" in refused("generate", tmp_path / name, capsys)


def test_a_file_that_may_not_be_read_is_named(tmp_path, monkeypatch):
    from openelm.commands.generate import checked_kind

    def forbidden(*_: object) -> None:
        raise PermissionError(13, "Permission denied")

    (tmp_path / "model").write_text("x")
    monkeypatch.setattr(Path, "open", forbidden)
    with pytest.raises(UserError, match=r"model cannot be read \(Permission denied\)"):
        checked_kind(tmp_path / "model")
