"""Downloading from the Hub, through the real client, from a server on loopback."""

import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from openelm.errors import UserError
from openelm.interop import hub as ours
from openelm.model.folder import load_model, save_model
from openelm.model.geometry import ModelConfig
from openelm.model.transformer import OpenELM

CONFIG = ModelConfig(
    model_dim=32, num_transformer_layers=2, head_dim=16, num_gqa_groups=1, ffn_dim_divisor=16, vocab_size=64
)


@pytest.fixture(scope="module")
def model_files(tmp_path_factory) -> dict[str, bytes]:
    """A tiny model as a repository has it, with files that nobody reads."""
    torch.manual_seed(0)
    folder = save_model(OpenELM(CONFIG), tmp_path_factory.mktemp("hub") / "model", card="# Tiny\n")
    files = {file.name: file.read_bytes() for file in folder.iterdir()}
    return files | {"pytorch_model.bin": b"pickle", "run/metrics.jsonl": b"{}", "onnx/other.safetensors": b"x"}


def content(folder: Path) -> dict[str, bytes]:
    return {file.relative_to(folder).as_posix(): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


def refused(reference: str) -> str:
    with pytest.raises(UserError) as caught:
        ours.download(reference)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_a_model_is_downloaded_with_the_files_that_we_read_and_no_others(hub, model_files):
    hub.add("apple/OpenELM-Tiny", model_files)
    folder = ours.download("apple/OpenELM-Tiny")
    expected = {"config.json", "generation_config.json", "model.safetensors", "README.md"}
    assert content(folder) == {name: model_files[name] for name in expected}
    assert not hub.asked("GET .*(bin|onnx|metrics)")
    assert load_model(folder).config == CONFIG


def test_a_second_download_asks_for_no_file_again(hub, model_files):
    hub.add("apple/OpenELM-Tiny", model_files)
    first = ours.download("apple/OpenELM-Tiny")
    del hub.requests[:]
    assert ours.download("apple/OpenELM-Tiny") == first
    assert not hub.asked("GET .*/resolve/")


def test_offline_the_cache_serves_what_it_has(hub, model_files, monkeypatch):
    from huggingface_hub import constants

    hub.add("apple/OpenELM-Tiny", model_files)
    first = content(ours.download("apple/OpenELM-Tiny"))
    del hub.requests[:]
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert content(ours.download("apple/OpenELM-Tiny")) == first
    assert hub.requests == []
    message = refused("apple/OpenELM-Other")
    assert "not whole in the cache" in message and "unset HF_HUB_OFFLINE" in message


def test_offline_a_half_download_is_not_taken_for_a_model(hub, model_files, monkeypatch):
    from huggingface_hub import constants

    hub.add("apple/OpenELM-Tiny", model_files | {"tokenizer.json": b"{}"})
    ours.download_tokenizer("apple/OpenELM-Tiny")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert "apple/OpenELM-Tiny" in refused("apple/OpenELM-Tiny")


def test_the_environment_decides_in_a_process_of_its_own(hub, model_files, tmp_path):
    hub.add("me/secret", model_files, private=True)
    code = "import sys; from openelm.interop.hub import download; print(download(sys.argv[1]))"

    def fetch(**more: str) -> subprocess.CompletedProcess[str]:
        environment = {**os.environ, "HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path / "home"), **more}
        environment |= {"HF_HUB_DISABLE_XET": "1", "HF_HUB_DISABLE_PROGRESS_BARS": "1"}
        command = [sys.executable, "-c", code, "me/secret"]
        return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60, check=False)

    assert "or it is private" in fetch().stderr
    first = fetch(HF_TOKEN="token-of-me")
    assert str(tmp_path / "home") in first.stdout, first.stderr
    assert fetch(HF_HUB_OFFLINE="1").stdout == first.stdout
    # The network may be dead, too: what is cached is taken, and said to be.
    dead = fetch(HF_ENDPOINT="http://127.0.0.1:9")
    assert dead.stdout == first.stdout and "taken from the cache" in dead.stderr


def test_a_dead_network_is_one_line_within_seconds(hub, monkeypatch):
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    start_s = time.monotonic()
    message = refused("apple/OpenELM-Tiny")
    assert time.monotonic() - start_s < 5
    assert "http://127.0.0.1:9 cannot be reached" in message and "not in the cache" in message


def test_a_network_that_swallows_packets_is_waited_for_no_longer_than_the_first_answer_may_take(hub, monkeypatch):
    import socket

    from huggingface_hub import constants

    monkeypatch.setattr(ours, "ANSWER_S", 0.3)
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{silent.getsockname()[1]}")
        assert "cannot be reached" in refused("apple/OpenELM-Tiny")


def test_no_such_repository(hub):
    message = refused("models/tiny")
    assert "no model models/tiny" in message and "a local folder is written ./models/tiny" in message


@pytest.mark.parametrize("path_of", [ours.model_path, ours.tokenizer_path])
def test_a_mistyped_path_is_said_to_be_none_whether_the_hub_answers_or_not(hub, monkeypatch, tmp_path, path_of):
    from huggingface_hub import constants

    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs" / "typed").mkdir(parents=True)
    assert path_of("runs/typed") == Path("runs/typed")
    for url, words in ((hub.url, "no model runs/typo"), ("http://127.0.0.1:9", "cannot be reached")):
        monkeypatch.setattr(constants, "ENDPOINT", url)
        with pytest.raises(UserError, match="runs/typo is no file or folder here, so the Hub was asked: ") as caught:
            path_of("runs/typo")
        assert words in str(caught.value) and "\n" not in str(caught.value)


def test_the_names_of_branches_are_those_that_git_allows():
    git = shutil.which("git")
    good = ["main", "v1.0", "step-5000", "feature/x", "a_b", "a@b", "é", "x.locked", "a/b.c"]
    bad = ["", "../y", "a b", "a..b", "/a", "a/", "a//b", ".a", "a/.b", "a.", "a.lock", "a.lock/b", "HEAD", "-a"]
    bad += ["a\n", "a\tb", "\x7f", "a~1", "a^", "a:b", "a?", "a*", "a[b", "a\\b", "a@{b"]
    for name in good + bad:
        if git:
            asked = subprocess.run([git, "check-ref-format", "--branch", name], capture_output=True, check=False)
            assert (asked.returncode == 0) == (name in good), name
        if name in good:
            ours.check_branch(name)
        else:
            with pytest.raises(UserError, match="cannot be the name of a branch") as caught:
                ours.check_branch(name)
            assert "\n" not in str(caught.value)


def test_a_revision_is_fetched_by_branch_and_by_commit(hub, model_files):
    repository = hub.add("me/model", model_files)
    first = repository.branches["main"]
    repository.commit("step-5000", model_files | {"README.md": b"# After step 5000\n"})
    repository.commit("feature/x", model_files | {"README.md": b"# X\n"})
    assert (ours.download("me/model@step-5000") / "README.md").read_bytes() == b"# After step 5000\n"
    assert (ours.download("me/model@feature/x") / "README.md").read_bytes() == b"# X\n"
    assert (ours.download(f"me/model@{first}") / "README.md").read_bytes() == b"# Tiny\n"
    assert "has no revision step-6000" in refused("me/model@step-6000")


def test_a_gate_is_named_with_its_own_words_and_its_page(hub, model_files, monkeypatch):
    hub.add("meta/gated", model_files, granted={"me"})
    message = refused("meta/gated")
    assert "you must log in and have access" in message
    assert f"ask for access on {hub.url}/meta/gated" in message and "HF_TOKEN" in message
    monkeypatch.setenv("HF_TOKEN", "token-of-you")
    message = refused("meta/gated")
    assert "you are not on its list" in message and "with the account of your token" in message
    monkeypatch.setenv("HF_TOKEN", "token-of-me")
    assert (ours.download("meta/gated") / "config.json").read_bytes() == model_files["config.json"]


def test_a_token_that_is_wrong_is_named(hub, model_files, monkeypatch):
    hub.add("me/secret", model_files, private=True)
    monkeypatch.setenv("HF_TOKEN", "expired")
    message = refused("me/secret")
    assert "Invalid credentials" in message and "`hf auth login`" in message


@pytest.mark.parametrize(
    ("gone", "words"),
    [
        (("model.safetensors",), "pickles can execute code"),
        (("model.safetensors", "pytorch_model.bin"), "has no *.safetensors"),
        (("config.json", "pytorch_model.bin"), "has no config.json"),
        (("config.json", "model.safetensors", "pytorch_model.bin", "README.md", "generation_config.json"), "it holds"),
    ],
)
def test_what_is_no_model_is_refused_before_anything_is_fetched(hub, model_files, gone, words):
    hub.add("me/other", {name: data for name, data in model_files.items() if name not in gone})
    assert words in refused("me/other")
    assert not hub.asked("resolve")


def test_a_broken_connection_is_resumed_from_the_byte_that_was_reached(hub, model_files, monkeypatch):
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "DOWNLOAD_CHUNK_SIZE", 500)  # what it writes at a time: 10 MB
    hub.add("me/model", model_files)
    hub.cut_after = 1000
    folder = ours.download("me/model")
    assert (folder / "model.safetensors").read_bytes() == model_files["model.safetensors"]
    assert hub.asked("GET .*model.safetensors bytes=1000-")


def test_what_an_ended_download_has_got_is_not_fetched_again(hub, model_files):
    hub.add("me/model", model_files)
    hub.failing = [("GET .*model.safetensors", 500)] * 9
    assert "cannot be reached, or broke off" in refused("me/model")
    hub.failing = []
    del hub.requests[:]
    folder = ours.download("me/model")
    assert (folder / "model.safetensors").read_bytes() == model_files["model.safetensors"]
    assert not hub.asked("GET .*resolve.*config.json")


def test_a_disk_that_is_too_small_is_named_before_it_is_full(hub, model_files, monkeypatch):
    hub.add("me/model", model_files)
    monkeypatch.setattr(ours.shutil, "disk_usage", lambda _: type("Usage", (), {"free": 1000}))
    message = refused("me/model")
    assert "has room for 0.0 GB" in message and "HF_HOME" in message
    assert not hub.asked("resolve")


def test_a_file_that_does_not_fit_is_named(hub, model_files, largest_file):
    hub.add("me/model", model_files)
    with largest_file(4096):
        assert "no space left" in refused("me/model")


@pytest.mark.parametrize("reference", ["a/b/c", "../model", "./model", "a", "a/b@", "a/b@ c", "", "/a/b", "-/x"])
def test_what_is_no_name_is_said_to_be_none(hub, reference):
    assert "is no name on the Hub" in refused(reference)
    assert hub.requests == []


def test_a_name_that_the_hub_forbids_is_refused_with_its_rule(hub):
    assert "cannot be a name on the Hub" in refused("me/two--dashes")


def test_a_tokenizer_comes_alone(hub, model_files, tokenizer_file):
    from openelm.data.tokenizer import Tokenizer

    hub.add("llama/copy", model_files | {"tokenizer.model": tokenizer_file.read_bytes()})
    folder = ours.tokenizer_path("llama/copy")
    assert content(folder) == {"tokenizer.model": tokenizer_file.read_bytes()}
    assert Tokenizer.load(folder).fingerprint == Tokenizer.load(tokenizer_file).fingerprint
    assert ours.tokenizer_path(str(tokenizer_file)) == tokenizer_file
    hub.add("llama/none", model_files)
    with pytest.raises(UserError, match="neither tokenizer"):
        ours.tokenizer_path("llama/none")


def test_the_help_for_a_missing_tokenizer_names_the_gated_one_the_option_and_the_copies():
    text = ours.tokenizer_help("apple/OpenELM-270M")
    for words in (ours.GATED_TOKENIZER, "--tokenizer", *ours.OPEN_TOKENIZERS, "32,000 ids", "HF_TOKEN"):
        assert words in text
    assert "\n" not in text


def test_the_checksum_that_we_state_is_that_of_llamas_tokenizer(shared):
    import hashlib

    raw = (shared / "data" / "llama-tokenizer" / "tokenizer.model").read_bytes()
    assert hashlib.sha256(raw).hexdigest() == ours.TOKENIZER_SHA256


def test_an_adapter_is_downloaded_from_the_top_or_from_its_folder_and_nothing_else(hub, model_files):
    adapter = {"adapter_config.json": b"{}", "adapter_model.safetensors": b"x"}
    others = {"training_args.bin": b"x", "checkpoint-5/adapter_model.safetensors": b"x", "README.md": b"# It"}
    hub.add("me/adapter", adapter | others | {"chat_template.jinja": b"{}"})
    assert content(ours.download_adapter("me/adapter")) == adapter | {"chat_template.jinja": b"{}"}
    inside = {f"adapter/{name}": data for name, data in adapter.items()}
    hub.add("me/tuned", inside | model_files)
    assert content(ours.download_adapter("me/tuned")) == inside
    assert not hub.asked("GET .*(training_args|checkpoint-5|pytorch_model|/model.safetensors)")


def test_offline_an_adapter_comes_from_the_cache(hub, monkeypatch):
    from huggingface_hub import constants

    files = {"adapter/adapter_config.json": b"{}", "adapter/adapter_model.safetensors": b"x"}
    hub.add("me/tuned", files)
    ours.download_adapter("me/tuned")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert content(ours.download_adapter("me/tuned")) == files


def test_what_is_no_adapter_and_what_is_no_model_is_told_apart(hub, model_files):
    hub.add("me/model", model_files)
    hub.add("me/adapter", {"adapter_config.json": b"{}", "adapter_model.safetensors": b"x"})
    hub.add("me/pickle", {"adapter_config.json": b"{}", "adapter_model.bin": b"x"})
    assert "no model by itself: make one with `openelm merge MODEL me/adapter OUT`" in refused("me/adapter")
    with pytest.raises(UserError, match=r"me/model has no adapter_config\.json, at its top or in adapter/"):
        ours.download_adapter("me/model")
    with pytest.raises(UserError, match=r"no adapter_model\.safetensors: have its maker save it so"):
        ours.adapter_path("me/pickle")
