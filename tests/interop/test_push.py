"""openelm push, through the real client, to a server on loopback: the release of a run as one command."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

import small_tuning
from openelm import cli
from openelm.commands import push
from openelm.data.tokenizer import Tokenizer
from openelm.interop.card import parse
from openelm.interop.hub import download
from openelm.interop.transformers_folder import MODELING_FILE
from openelm.model.folder import load_model, save_model
from openelm.model.geometry import ModelConfig
from openelm.model.transformer import OpenELM
from openelm.train.checkpoint import Checkpoint, Checkpoints
from openelm.train.form import Form

CONFIG = ModelConfig(
    model_dim=32, num_transformer_layers=2, head_dim=16, num_gqa_groups=1, ffn_dim_divisor=16, vocab_size=400
)
CARD = """---
license: apple-amlr
library_name: transformers
model-index: [{name: tiny, results: []}]
---
# tiny

## Data
- words: `{home}/text`, share 1

## Evaluation
2.000 bits per byte
"""


def model(seed: int) -> OpenELM:
    torch.manual_seed(seed)
    return OpenELM(CONFIG)


@pytest.fixture
def run(tmp_path, tokenizer_file) -> Path:
    """A finished run with checkpoints of steps 2 and 4, and with what must not be published in its texts."""
    run, home = tmp_path / "runs" / "tiny", Path.home()
    card = CARD.replace("{home}", str(home))
    save_model(model(9), run / "model", tokenizer=Tokenizer.load(tokenizer_file), card=card)
    kept = Checkpoints(run / "checkpoints", keep_last=9)
    for step in (2, 4):
        state = {"tokens": 100 * step, "stream": {}}
        kept.save(Form(CONFIG), Checkpoint(step, model(step).state_dict(), {"step": torch.tensor([1.0])}, state))
    texts = {
        "config.yaml": f"path: {home}/text\nurl: https://bob:pass@host/x?X-Amz-Signature=abc123&y=1\n",
        "environment.json": json.dumps({"compiler": {"path": f"{home}/bin/g++"}}),
        "data.json": "{}",
        "metrics.jsonl": '{"step": 1, "loss": 3.5}\n{"prompt": "hf_abcdefghijklmnopqrstuvwxyz"}\n',
        "summary.json": "{}",
        "report/index.html": "<html>",
    }
    (run / "report").mkdir()
    for name, text in texts.items():
        (run / name).write_text(text, encoding="utf-8")
    (run / "report" / "loss.png").write_bytes(b"\x89PNG\xff")
    (run / "replay").mkdir()
    (run / "replay" / "rows.json").write_text("[]")
    return run


@pytest.fixture
def me(hub, monkeypatch) -> Any:
    """The server, and a token that may write there."""
    monkeypatch.setenv("HF_TOKEN", "token-of-me")
    return hub


def pushed(*words: object) -> int:
    return cli.run(["push", *map(str, words)])


def refused(capfd, *words: object) -> str:
    assert pushed(*words) == 2
    lines = [line for line in capfd.readouterr().err.splitlines() if line.startswith("openelm push: error:")]
    assert len(lines) == 1
    return lines[0]


def at(hub, repo: str, branch: str) -> dict[str, bytes]:
    return hub.repositories[repo].at(branch)[1]


def test_a_run_goes_up_with_its_milestones_recipe_and_logs(me, run):
    assert pushed(run, "me/tiny") == 0
    repository = me.repositories["me/tiny"]
    assert set(repository.branches) == {"main", "step-2", "step-4"} and not repository.private
    main, step = at(me, "me/tiny", "main"), at(me, "me/tiny", "step-4")
    weights = {"config.json", "generation_config.json", "model.safetensors", "README.md", "modeling_openelm.py"}
    tokenizer = {"tokenizer.json", "tokenizer.model", "tokenizer_config.json"}
    logs = {"config.yaml", "environment.json", "data.json", "metrics.jsonl", "summary.json"}
    logs = {f"run/{name}" for name in logs | {"report/index.html", "report/loss.png"}}
    assert set(main) == weights | tokenizer | logs | {".gitattributes"}
    assert set(step) == weights | tokenizer | {".gitattributes"}
    assert main["model.safetensors"] == (run / "model" / "model.safetensors").read_bytes()
    assert main["run/report/loss.png"] == b"\x89PNG\xff"
    assert "auto_map" in json.loads(main["config.json"]) and "auto_map" in json.loads(step["config.json"])
    assert not list(run.glob(".push*")) and "auto_map" not in (run / "model" / "config.json").read_text()


def test_what_was_pushed_downloads_as_the_same_model(me, run):
    assert pushed(run, "me/tiny") == 0
    folder = download("me/tiny")
    assert (folder / "model.safetensors").read_bytes() == (run / "model" / "model.safetensors").read_bytes()
    assert Tokenizer.load(folder).encode("water and winter") == Tokenizer.load(run / "model").encode("water and winter")
    for step in (2, 4):
        found = load_model(download(f"me/tiny@step-{step}")).state_dict()
        assert all(torch.equal(found[name], tensor) for name, tensor in model(step).state_dict().items())


def test_milestones_have_the_dtype_of_the_runs_model(me, run):
    save_model(model(9), run / "model", dtype=torch.bfloat16, overwrite=True)
    assert pushed(run, "me/tiny", "--milestones", "2") == 0
    found = load_model(download("me/tiny@step-2")).state_dict()
    assert all(torch.equal(found[name], tensor.bfloat16()) for name, tensor in model(2).state_dict().items())


def test_nothing_secret_goes_up(me, run):
    assert pushed(run, "me/tiny") == 0
    main = at(me, "me/tiny", "main")
    everything = b"\n".join(data for branch in ("main", "step-2") for data in at(me, "me/tiny", branch).values())
    for secret in (b"bob", b"pass@", b"abc123", b"hf_abc", str(Path.home()).encode() + b"/", b"token-of-me"):
        assert secret not in everything
    config = yaml.safe_load(main["run/config.yaml"])
    assert config == {"path": "~/text", "url": "https://***@host/x?X-Amz-Signature=***&y=1"}
    assert json.loads(main["run/environment.json"]) == {"compiler": {"path": "~/bin/g++"}}
    assert main["run/metrics.jsonl"] == b'{"step": 1, "loss": 3.5}\n{"prompt": "***"}\n'


@pytest.mark.parametrize(
    ("text", "clean"),
    [
        ("s3://bucket/key", "s3://bucket/key"),
        ("mail me@host.org", "mail me@host.org"),
        ("https://h/a?token=x&amp;b=1", "https://h/a?token=***&amp;b=1"),
        ("AKIAABCDEFGHIJKLMNOP", "***"),
        ("/data/home/alice/x and /home/alice2/x and /home/alice", "/data/home/alice/x and /home/alice2/x and ~"),
        ('"/home/alice/x"', '"~/x"'),
    ],
)
def test_only_what_is_secret_is_taken_out(text, clean, monkeypatch):
    monkeypatch.setattr(push.Path, "home", lambda: Path("/home/alice"))
    assert push.without_secrets(text) == clean


def test_the_card_says_what_is_where_and_a_milestone_claims_no_figures(me, run):
    assert pushed(run, "me/tiny") == 0
    metadata, body = parse(at(me, "me/tiny", "main")["README.md"].decode())
    assert metadata["license"] == "apple-amlr" and "model-index" in metadata
    assert 'from_pretrained("me/tiny", trust_remote_code=True)' in body and "`step-2`, `step-4`" in body
    metadata, body = parse(at(me, "me/tiny", "step-2")["README.md"].decode())
    assert metadata["license"] == "apple-amlr" and "model-index" not in metadata
    assert "after step 2 (200 tokens)" in body and "## Data" in body and "bits per byte" not in body


def test_a_second_push_sends_nothing_twice_and_takes_away_outdated_weights(me, run):
    assert pushed(run, "me/tiny") == 0
    before = dict(me.repositories["me/tiny"].branches)
    del me.requests[:]
    assert pushed(run, "me/tiny") == 0
    assert not me.asked("PUT|/commit/") and me.repositories["me/tiny"].branches == before
    files = at(me, "me/tiny", "main") | {"model-00001-of-00002.safetensors": b"old", "own-notes.txt": b"kept"}
    me.repositories["me/tiny"].commit("main", files)
    assert pushed(run, "me/tiny") == 0
    assert set(files) - set(at(me, "me/tiny", "main")) == {"model-00001-of-00002.safetensors"}


def test_a_push_that_broke_off_is_completed_by_the_same_command(me, run, capfd, monkeypatch):
    monkeypatch.setattr("time.sleep", lambda _: None)
    me.failing = [("PUT /lfs/", 503)] * 99
    message = refused(capfd, run, "me/tiny")
    assert "run the same command again" in message
    assert not list(run.glob(".push*"))
    me.failing = []
    assert pushed(run, "me/tiny") == 0
    assert set(me.repositories["me/tiny"].branches) == {"main", "step-2", "step-4"}


def test_a_dry_run_lists_everything_and_asks_nobody(me, run, capfd):
    assert pushed(run, "me/tiny", "--dry-run", "--json") == 0
    found = json.loads(capfd.readouterr().out)
    assert [revision["revision"] for revision in found["revisions"]] == ["main", "step-2", "step-4"]
    main, step = (revision["files"] for revision in found["revisions"][:2])
    assert main["model.safetensors"] == (run / "model" / "model.safetensors").stat().st_size
    assert step["model.safetensors"] == 4 * CONFIG.num_parameters() and "optimizer.safetensors" not in step
    assert found["bytes"] == sum(size for revision in found["revisions"] for size in revision["files"].values())
    assert me.requests == []
    assert pushed(run, "me/tiny") == 0
    assert set(main) == set(at(me, "me/tiny", "main")) - {".gitattributes"}
    assert set(step) == set(at(me, "me/tiny", "step-2")) - {".gitattributes"}
    assert all(main[name] == len(data) for name, data in at(me, "me/tiny", "main").items() if name in main)
    capfd.readouterr()
    assert pushed(run, "me/tiny", "--dry-run", "--no-logs", "--milestones", "none") == 0
    shown = capfd.readouterr().out
    assert "run/config.yaml" in shown and "metrics" not in shown and "step-2" not in shown


def test_a_model_without_a_licence_is_pushed_with_a_word_on_it(me, run, capfd):
    (run / "model" / "README.md").unlink()
    assert pushed(run / "model", "me/bare") == 0
    assert "states no licence" in capfd.readouterr().err
    assert at(me, "me/bare", "main")["README.md"].startswith(b"---\nlibrary_name: transformers")


def test_a_licence_that_is_unknown_is_none(me, run, capfd):
    card = "---\nlicense: unknown\n---\n# It\n"
    (run / "model" / "README.md").write_text(card, encoding="utf-8")
    assert pushed(run / "model", "me/bare", "--dry-run") == 0
    assert "states no licence" in capfd.readouterr().err


def test_no_code_goes_up_but_the_modeling_file_and_that_is_ours(me, run):
    for name in ("modeling_openelm.py", "configuration_openelm.py", "helper.py"):
        (run / "model" / name).write_text("import os\n")
    assert pushed(run, "me/tiny") == 0
    for branch in ("main", "step-2"):
        code = {name: data for name, data in at(me, "me/tiny", branch).items() if name.endswith(".py")}
        assert code == {"modeling_openelm.py": MODELING_FILE.read_bytes()}


def test_a_quantised_folder_is_said_to_open_in_mlx_lm_and_carries_no_code(me, run, tmp_path):
    folder = tmp_path / "mlx"
    assert cli.run(["convert", str(run), str(folder), "--to", "mlx", "--quantize", "4bit", "--group-size", "32"]) == 0
    (folder / "modeling_openelm.py").write_text("import os\n")
    assert pushed(folder, "me/small", "--revision", "v1") == 0
    files = at(me, "me/small", "v1")
    assert not any(name.endswith(".py") for name in files)
    metadata, body = parse(files["README.md"].decode())
    assert metadata["library_name"] == "mlx"
    assert 'Opens in mlx-lm: `mlx_lm.load("me/small", revision="v1")`.' in body and "Opens in transformers" not in body


@pytest.mark.parametrize("branch", ["../y", "a b", "", "x.lock"])
def test_a_branch_that_git_does_not_allow_is_refused_before_anything_is_asked(me, run, capfd, branch):
    assert "cannot be the name of a branch" in refused(capfd, run, "me/tiny", "--revision", branch)
    assert me.requests == []


def test_a_model_folder_goes_up_alone_to_the_branch_that_is_asked_for(me, run, capfd):
    folder = run / "model"
    (folder / "optimizer.safetensors").write_bytes(b"not a part of the model")
    (folder / "LICENSE").write_text("words\n")
    assert pushed(folder, "me/one", "--private", "--revision", "v1.0", "--message", "Words") == 0
    assert me.repositories["me/one"].private
    assert set(at(me, "me/one", "main")) == {".gitattributes"}
    assert "states no licence" not in capfd.readouterr().err
    found = at(me, "me/one", "v1.0")
    assert "LICENSE" in found and "model.safetensors" in found and "optimizer.safetensors" not in found
    assert not any(name.startswith("run/") for name in found)


def test_who_one_is_must_be_known(hub, run, capfd):
    message = refused(capfd, run, "me/tiny")
    assert "HF_TOKEN" in message and "`hf auth login`" in message and "/settings/tokens" in message


def test_a_name_of_somebody_else_is_refused_with_what_the_hub_says(me, run, capfd):
    assert "no right to create you/tiny" in refused(capfd, run, "you/tiny")
    me.add("you/there", {})
    message = refused(capfd, run, "you/there")
    assert "may not write to you/there" in message and "under an account of yours" in message


def test_what_would_be_lost_or_seen_by_all_is_refused(me, run, capfd):
    me.add("me/bert", {"config.json": b'{"model_type": "bert"}'})
    assert "holds a model of type bert" in refused(capfd, run, "me/bert")
    me.add("me/public", {})
    assert "--private would not be kept" in refused(capfd, run, "me/public", "--private")
    assert not me.asked("PUT|/commit/")


def test_what_cannot_be_published_is_refused_before_the_hub_is_asked(me, run, capfd, tmp_path):
    step = run / "checkpoints" / "step_00000002"
    assert "is a checkpoint" in refused(capfd, step, "me/tiny")
    assert "neither a run folder nor a model folder" in refused(capfd, tmp_path, "me/tiny")
    assert "is no name on the Hub" in refused(capfd, "me/tiny", run)
    assert "is no name on the Hub" in refused(capfd, run, "tiny")
    assert "--revision" in refused(capfd, run, "me/tiny@v1")
    assert "no checkpoint of step 3" in refused(capfd, run, "me/tiny", "--milestones", "2,3")
    assert "--milestones x" in refused(capfd, run, "me/tiny", "--milestones", "x")
    assert "has no checkpoints" in refused(capfd, run / "model", "me/tiny", "--milestones", "2")
    assert "the branch of a checkpoint" in refused(capfd, run, "me/tiny", "--revision", "step-2")
    (run / "model" / "model.safetensors").write_bytes(b"cut")
    assert "damaged or cut short" in refused(capfd, run, "me/tiny")
    (run / "model" / "config.json").unlink()
    assert "has no model/ yet" in refused(capfd, run, "me/tiny")
    assert me.requests == []


def test_a_damaged_checkpoint_is_named_and_not_published(me, run, capfd):
    weights = run / "checkpoints" / "step_00000004" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-4] + b"\0\0\0\1")
    assert "damaged checkpoint" in refused(capfd, run, "me/tiny")
    assert set(me.repositories["me/tiny"].branches) == {"main", "step-2"}


def test_a_dead_network_is_one_line(me, run, capfd, monkeypatch):
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    assert "cannot be reached" in refused(capfd, run, "me/tiny")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert "unset HF_HUB_OFFLINE" in refused(capfd, run, "me/tiny")


@pytest.fixture
def tuned(tmp_path, golden_weights, tokenizer_file, monkeypatch) -> Path:
    """A finished run of an adapter on the embedding and on the attention, with checkpoints of steps 2 and 4."""
    pytest.importorskip("peft")
    return small_tuning.train(tmp_path, golden_weights, tokenizer_file, monkeypatch)


def test_a_tuned_model_goes_up_merged_with_its_adapter_in_a_folder(me, tuned, tmp_path):
    assert pushed(tuned, "me/tuned") == 0
    repository = me.repositories["me/tuned"]
    assert set(repository.branches) == {"main", "step-2", "step-4"}
    main, step = at(me, "me/tuned", "main"), at(me, "me/tuned", "step-4")
    assert not {"adapter_config.json", "adapter_model.safetensors"} & set(main)  # transformers would stumble over them
    assert {"model.safetensors", "adapter/adapter_config.json", "adapter/adapter_model.safetensors"} <= set(main)
    assert set(step) == {name for name in main if not name.startswith("run/")}
    for branch in ("main", "step-4"):
        found = load_model(download(f"me/tuned@{branch}")).state_dict()
        expected = load_model(tuned / "model").state_dict()
        assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())
        files = at(me, "me/tuned", branch)
        assert files["adapter/adapter_model.safetensors"] == main["adapter/adapter_model.safetensors"]
        # A path of this machine names nothing to others.
        assert json.loads(files["adapter/adapter_config.json"])["base_model_name_or_path"] is None
    earlier = load_model(download("me/tuned@step-2")).state_dict()
    assert not torch.equal(earlier["layers.0.attn.qkv_proj.weight"], expected["layers.0.attn.qkv_proj.weight"])
    body = main["README.md"].decode()
    assert 'PeftModel.from_pretrained(base, "me/tuned", subfolder="adapter")' in body
    metadata, _ = parse(body)
    assert metadata["license"] == "mit"


def test_an_adapter_that_was_pushed_is_merged_by_its_name(me, tuned, tmp_path, capfd):
    assert pushed(tuned, "me/tuned", "--milestones", "2") == 0
    out = tmp_path / "merged"
    assert cli.run(["merge", str(tmp_path / "base"), "me/tuned", str(out), "--untie", "--verify"]) == 0
    found, expected = load_model(out).state_dict(), load_model(tuned / "model").state_dict()
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())
    assert "adapter me/tuned merged in" in capfd.readouterr().err
    assert cli.run(["merge", str(tmp_path / "base"), "me/tuned@step-2", str(tmp_path / "two"), "--untie"]) == 0
    found, expected = load_model(tmp_path / "two").state_dict(), load_model(download("me/tuned@step-2")).state_dict()
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())


def test_a_second_push_takes_away_an_adapter_that_the_model_no_longer_has(me, run, tuned):
    assert pushed(tuned, "me/one") == 0
    assert pushed(run / "model", "me/one") == 0
    assert not any(name.startswith("adapter/") for name in at(me, "me/one", "main"))


def test_without_its_base_a_tuned_model_goes_up_and_its_checkpoints_do_not(me, tuned, tmp_path, capfd):
    (tmp_path / "base").rename(tmp_path / "moved")
    message = refused(capfd, tuned, "me/tuned")
    assert "step_00000002 holds an adapter" in message and "or pass --milestones none" in message
    assert me.requests == []
    assert pushed(tuned, "me/tuned", "--milestones", "none") == 0
    assert "adapter/adapter_model.safetensors" in at(me, "me/tuned", "main")
    assert "`openelm merge" in refused(capfd, tuned / "adapter", "me/other")


def test_checkpoints_of_an_adapter_are_not_merged_into_another_model_than_its_own(me, tuned, tmp_path, capfd):
    file = tmp_path / "base" / "model.safetensors"
    weights = load_file(file)
    weights["transformer.norm.weight"][3] *= 1.5
    save_file(weights, file)
    message = refused(capfd, tuned, "me/tuned")
    assert f"base is another model now than {tuned} began from" in message and "--milestones none" in message
    assert me.requests == []
    assert pushed(tuned, "me/tuned", "--milestones", "none") == 0
