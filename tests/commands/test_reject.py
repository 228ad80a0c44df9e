"""openelm reject: the same pairs however they are computed, interrupted or not; nothing lost, nothing overwritten."""

import json
import shutil
from pathlib import Path

import pytest

from openelm import cli
from openelm.data.pairs import Encoding, TuneSource, read_examples
from openelm.data.records import records
from openelm.data.tokenizer import Tokenizer
from openelm.infer.engine import Engine
from openelm.model.folder import save_model
from small_models import make

PROMPTS = ["After all", "Another", "Before the", "The mountain " * 40, " ", "Winter", "A question", "Quiet"]


@pytest.fixture(scope="module")
def model(tmp_path_factory, golden_weights, tokenizer_file) -> Path:
    folder = tmp_path_factory.mktemp("model") / "model"
    save_model(make(golden_weights), folder)
    Tokenizer.load(tokenizer_file).save(folder)
    return folder


@pytest.fixture
def prompts(tmp_path) -> Path:
    return write(tmp_path / "prompts.jsonl", [{"prompt": prompt} for prompt in PROMPTS])


@pytest.fixture
def reward(tmp_path) -> str:
    (tmp_path / "reward.py").write_text("def vowels(prompt, answer):\n    return sum(map(answer.count, 'aeiou'))\n")
    return f"python:{tmp_path / 'reward.py'}:vowels"


def write(path: Path, rows: list[dict]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def reject(model: Path, prompts: Path, out: Path, reward: str, *options: object, code: int = 0) -> None:
    words = ["reject", model, prompts, out, "--reward", reward, "--max-tokens", 12, "--samples", 6, *options]
    assert cli.run([str(word) for word in words]) == code


def read_back(out: Path, tokenizer_file: Path) -> dict[str, int]:
    """The account of the pairs as `openelm dpo` reads them."""
    source = TuneSource("pairs", str(out), "preference")
    return read_examples([source], Tokenizer.load(tokenizer_file), Encoding(row_length=63)).account


def test_pairs_and_their_account(model, prompts, reward, tokenizer_file, tmp_path, capsys):
    out = tmp_path / "pairs.jsonl"
    reject(model, prompts, out, reward, "--accept", 4, "--keep-candidates", "--json")
    account = json.loads(capsys.readouterr().out)
    assert (account["prompts"], account["empty_prompts"], account["long_prompts"]) == (8, 1, 1)
    assert account["candidates"] + account["empty_answers"] == 6 * 6
    pairs, kept = list(records(str(out))), list(records(str(tmp_path / "pairs.candidates.jsonl")))
    assert [entry["prompt"] for entry in kept if "skipped" not in entry] == [PROMPTS[i] for i in (0, 1, 2, 5, 6, 7)]
    found = {(entry["prompt"], one["answer"]): one for entry in kept for one in entry.get("candidates", ())}
    assert len(pairs) == account["pairs"] > 6
    for pair in pairs:
        chosen, rejected = (found[pair["prompt"], pair[side]] for side in ("chosen", "rejected"))
        assert chosen["accepted"] and rejected["accepted"]
        assert (chosen["reward"], rejected["reward"]) == (pair["chosen_reward"], pair["rejected_reward"])
        assert chosen["reward"] > rejected["reward"]
    rewards = [one["reward"] for entry in kept for one in entry.get("candidates", ())]
    assert all(one["reward"] == sum(map(one["answer"].count, "aeiou")) for one in found.values())
    assert account["mean_reward"] == pytest.approx(sum(rewards) / len(rewards))
    assert account["mean_accepted_reward"] > account["mean_reward"]
    assert {path.name for path in tmp_path.iterdir()} - {"__pycache__"} == {
        *("prompts.jsonl", "reward.py", "pairs.jsonl", "pairs.candidates.jsonl")
    }
    assert read_back(out, tokenizer_file)["trained_on"] == account["pairs"]


def test_nothing_depends_on_what_is_computed_at_once(model, prompts, reward, tmp_path, capsys):
    for batch in (1, 7, 12, 100):
        reject(model, prompts, tmp_path / f"{batch}.jsonl", reward, "--batch", batch)
    first = (tmp_path / "1.jsonl").read_bytes()
    assert first.count(b"\n") > 2
    assert all((tmp_path / f"{batch}.jsonl").read_bytes() == first for batch in (7, 12, 100))
    capsys.readouterr()
    reject(model, prompts, tmp_path / "other.jsonl", reward, "--seed", 1)
    said = capsys.readouterr().out
    assert "prompts     8, of which left out: 2 (1 empty, 1 without room for an answer)" in said
    assert f", in {tmp_path / 'other.jsonl'}; " in said
    assert (tmp_path / "other.jsonl").read_bytes() != first


def test_an_interrupted_start_goes_on_to_the_same_pairs(model, prompts, reward, tmp_path, capsys, monkeypatch):
    reject(model, prompts, tmp_path / "whole.jsonl", reward, "--batch", 12)
    out, generate = tmp_path / "pairs.jsonl", Engine.generate
    calls = []

    def interrupted(self, rows, *arguments, **options):
        calls.append(len(rows))
        if len(calls) == 3:
            raise KeyboardInterrupt
        return generate(self, rows, *arguments, **options)

    monkeypatch.setattr(Engine, "generate", interrupted)
    reject(model, prompts, out, reward, "--batch", 12, code=130)
    work = tmp_path / "pairs.unfinished.jsonl"
    assert not out.exists() and len(work.read_bytes().splitlines()) == 1 + 4
    with work.open("ab") as file:
        file.write(b'{"prompt": "half')
    capsys.readouterr()
    # Other ways of sampling are refused; how many are accepted of the candidates may still be chosen.
    reject(model, prompts, out, reward, "--batch", 12, "--temperature", 0.5, code=2)
    assert "was begun with another temperature" in capsys.readouterr().err
    reject(model, prompts, out, reward, "--batch", 12)
    assert "4 of 8 prompts are finished already" in capsys.readouterr().err
    assert out.read_bytes() == (tmp_path / "whole.jsonl").read_bytes()
    assert not work.exists() and calls[3:] == [6, 12]


def test_another_model_or_reward_or_prompt_is_noticed(model, prompts, reward, tmp_path, capsys, monkeypatch):
    out = tmp_path / "pairs.jsonl"
    monkeypatch.setattr(Engine, "generate", lambda *_, **__: (_ for _ in ()).throw(KeyboardInterrupt))
    reject(model, prompts, out, reward, code=130)
    (tmp_path / "reward.py").write_text("def vowels(prompt, answer):\n    return 1\n")
    write(prompts, [{"prompt": "other"}])
    capsys.readouterr()
    reject(model, prompts, out, reward, code=2)
    assert "pairs.unfinished.jsonl was begun with another prompts, reward: " in capsys.readouterr().err
    reject(model, prompts, out, reward, "--overwrite", code=130)


def test_the_same_weights_under_another_config_are_another_model(model, prompts, reward, tmp_path, capsys, monkeypatch):
    out, own = tmp_path / "pairs.jsonl", tmp_path / "model"
    shutil.copytree(model, own)
    monkeypatch.setattr(Engine, "generate", lambda *_, **__: (_ for _ in ()).throw(KeyboardInterrupt))
    reject(own, prompts, out, reward, code=130)
    config = json.loads((own / "config.json").read_text())
    (own / "config.json").write_text(json.dumps(config | {"rope_freq_constant": 500_000}))
    capsys.readouterr()
    reject(own, prompts, out, reward, code=2)
    assert "pairs.unfinished.jsonl was begun with another model: " in capsys.readouterr().err


def test_conversations_are_what_dpo_reads(model, reward, tokenizer_file, tmp_path):
    system = {"role": "system", "content": "Be kind"}
    rows = [{"id": 1, "talk": [system, {"role": "user", "content": "Another"}]}, {"id": 2, "talk": "Winter"}]
    prompts, out = write(tmp_path / "talks.json", rows), tmp_path / "pairs.jsonl"
    reject(model, prompts, out, reward, "--prompt-key", "talk", "--chat", "--accept", 4)
    heads = [rows[0]["talk"], [{"role": "user", "content": "Winter"}]]
    pairs = list(records(str(out)))
    assert pairs and all(pair["prompt"] in heads for pair in pairs)
    for pair in pairs:
        for side in ("chosen", "rejected"):
            *head, answer = pair[side]
            assert head == pair["prompt"] and answer["role"] == "assistant"
            assert pair[f"{side}_reward"] == sum(map(answer["content"].count, "aeiou"))
    assert read_back(out, tokenizer_file)["trained_on"] == len(pairs)


def test_rewards_that_are_all_equal_leave_no_pair_but_the_candidates(model, prompts, tmp_path, capsys):
    (tmp_path / "same.py").write_text("def same(prompt, answer): return 1\n")
    out = tmp_path / "pairs.jsonl"
    reject(model, prompts, out, f"python:{tmp_path / 'same.py'}:same", code=2)
    said = capsys.readouterr().err
    assert "no pair is left of" in said and "6 pairs had equal rewards" in said
    assert not out.exists() and (tmp_path / "pairs.unfinished.jsonl").exists()


def test_a_reward_that_fails_keeps_what_is_finished(model, prompts, tmp_path, capsys):
    (tmp_path / "bad.py").write_text("def bad(prompt, answer):\n    return 1 / (prompt != 'Winter')\n")
    reject(model, prompts, tmp_path / "pairs.jsonl", f"python:{tmp_path / 'bad.py'}:bad", "--batch", 6, code=2)
    assert "bad.py:bad failed for the answer" in (said := capsys.readouterr().err) and "to the prompt 'Winter'" in said
    assert len((tmp_path / "pairs.unfinished.jsonl").read_bytes().splitlines()) == 1 + 5


def test_nothing_is_overwritten_unasked(model, prompts, reward, tmp_path, capsys):
    out = tmp_path / "pairs.jsonl"
    for path in (out, tmp_path / "pairs.candidates.jsonl"):
        path.write_text("mine")
        reject(model, prompts, out, reward, "--keep-candidates", code=2)
        assert f"{path} exists: choose another name, or pass --overwrite" in capsys.readouterr().err
        assert path.read_text() == "mine"
        out.unlink(missing_ok=True)
    reject(model, prompts, out, reward, "--keep-candidates", "--overwrite")
    assert "mine" not in out.read_text() and "mine" not in (tmp_path / "pairs.candidates.jsonl").read_text()
    for name in ("prompts", "prompts.candidates", "prompts.unfinished"):
        own = prompts.rename(tmp_path / f"{name}.jsonl")
        before = own.read_bytes()
        reject(model, own, tmp_path / "prompts.jsonl", reward, "--overwrite", code=2)
        assert f"{own} is PROMPTS: choose another name" in capsys.readouterr().err and own.read_bytes() == before
        own.rename(prompts)


def test_all_numbers_that_cannot_be_are_named_together(model, prompts, reward, tmp_path, capsys):
    options = ["--samples", 1, "--accept", 3, "--beta", 0, "--temperature", 0, "--batch", 0, "--max-tokens", 0]
    reject(model, prompts, tmp_path / "pairs.jsonl", reward, *options, code=2)
    said = capsys.readouterr().err
    for name in ("--samples 1", "--accept 3", "--beta 0.0", "--temperature 0.0", "--batch 0", "--max-tokens 0"):
        assert f"{name} must be" in said
    for options, expected in (
        (["--accept", 8], "--accept 8 must be at most --samples, which is 6"),
        (["--beta", "nan"], "--beta nan must be above 0"),
        (["--beta", "-1"], "--beta -1.0 must be above 0"),
        (["--top-p", 0], "top_p=0.0 must be above 0"),
        (["--seed", -1], "seed=-1 must be"),
    ):
        reject(model, prompts, tmp_path / "pairs.jsonl", reward, *options, code=2)
        assert expected in capsys.readouterr().err


@pytest.mark.parametrize(
    ("rows", "said"),
    [
        ([], "has no records"),
        ([{"prompt": ""}, {"prompt": "The mountain " * 40}], "none of the 2 prompts"),
        ([{"text": "a"}], "record 1 has no column 'prompt' (it has text)"),
    ],
)
def test_prompts_without_a_question_are_refused(model, reward, tmp_path, capsys, rows, said):
    reject(model, write(tmp_path / "prompts.jsonl", rows), tmp_path / "pairs.jsonl", reward, code=2)
    assert said in capsys.readouterr().err
    assert not list(tmp_path.glob("pairs*"))


def test_out_must_be_jsonl(model, prompts, reward, tmp_path, capsys):
    reject(model, prompts, tmp_path / "pairs.parquet", reward, code=2)
    assert "pairs.parquet must end in .jsonl" in capsys.readouterr().err
