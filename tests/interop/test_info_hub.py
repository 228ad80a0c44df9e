"""openelm info of a model on the Hub: its config.json is all that is fetched."""

import json

import pytest
import torch

from openelm import cli
from openelm.model.folder import config_to_folder
from openelm.model.geometry import ModelConfig

CONFIG = ModelConfig.from_name("270M", vocab_size=32128)


@pytest.fixture
def repository(hub):
    config = json.dumps(config_to_folder(CONFIG, torch.bfloat16)).encode()
    return hub.add("apple/OpenELM-Tiny", {"config.json": config, "model.safetensors": b"x" * 1000})


def info(capsys, *words: str) -> tuple[int, str]:
    code = cli.run(["info", *words])
    out, error = capsys.readouterr()
    return code, out if code == 0 else error


def test_the_geometry_is_drawn_and_no_weight_is_fetched(hub, repository, capsys):
    code, out = info(capsys, "apple/OpenELM-Tiny", "--json")
    found = json.loads(out)
    assert (code, found["name"], found["parameters"]) == (0, "apple/OpenELM-Tiny", CONFIG.num_parameters())
    assert found["num_query_heads"] == list(CONFIG.num_query_heads)
    assert {request.rpartition("/")[2] for request in hub.asked("resolve")} == {"config.json"}


def test_a_revision_is_drawn(hub, repository, capsys):
    small = CONFIG.changed(vocab_size=100)
    repository.commit("small", {"config.json": json.dumps(config_to_folder(small, torch.float32)).encode()})
    code, out = info(capsys, "apple/OpenELM-Tiny@small", "--json")
    assert (code, json.loads(out)["parameters"]) == (0, small.num_parameters())


def test_out_of_reach_the_cache_is_drawn(hub, repository, capsys, monkeypatch):
    _, first = info(capsys, "apple/OpenELM-Tiny")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert info(capsys, "apple/OpenELM-Tiny") == (0, first)
    code, said = info(capsys, "apple/OpenELM-Other")
    assert code == 2 and "HF_HUB_OFFLINE" in said


def test_what_the_hub_refuses_is_one_line(hub, repository, capsys):
    hub.add("me/empty", {"README.md": b""})
    hub.add("me/gated", {"config.json": b"{}"}, granted=set())
    hub.add("me/other", {"config.json": b'{"model_type": "llama"}'})
    for name, words in {
        "me/nothing": "has no model me/nothing, or it is private: check the name; a local folder",
        "me/empty": "me/empty has no config.json, so it is no model folder",
        "me/gated": "me/gated is gated",
        "me/other": "says model_type 'llama': only 'openelm' can be read",
        "apple/OpenELM-Tiny@v9": "apple/OpenELM-Tiny has no revision v9",
    }.items():
        code, said = info(capsys, name)
        assert code == 2 and words in said and said.count("\n") == 1


def test_a_folder_of_that_name_comes_before_the_hub(hub, repository, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "apple" / "OpenELM-Tiny").mkdir(parents=True)
    code, said = info(capsys, "apple/OpenELM-Tiny")
    assert code == 2 and "neither a model folder" in said
    assert not hub.requests
