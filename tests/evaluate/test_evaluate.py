"""openelm evaluate: what is measured is kept, not measured again, and one task that fails stops no other."""

import json
import re
from pathlib import Path

import pytest
import torch

from openelm import cli
from openelm.data.tokenizer import Tokenizer
from openelm.evaluate.results import Evaluation, TaskResult, of_run
from openelm.evaluate.subjects import find
from openelm.model.folder import save_model
from small_models import make
from small_tasks import write_tasks

pytest.importorskip("lm_eval")


@pytest.fixture
def model(tmp_path, golden_weights, tokenizer_file) -> Path:
    return save_model(make(golden_weights), tmp_path / "model", tokenizer=Tokenizer.load(tokenizer_file))


@pytest.fixture
def evaluate(tmp_path, monkeypatch, capsys):
    """Run the command in tmp_path on local data; gives exit code, the JSON that it prints, and what it says."""
    monkeypatch.chdir(tmp_path)
    data = write_tasks(tmp_path / "data")

    def run(*words: object) -> tuple[int, dict, str]:
        capsys.readouterr()
        code = cli.run(["evaluate", *map(str, words), "--data", str(data), "--json"])
        captured = capsys.readouterr()
        return code, json.loads(captured.out or "{}"), captured.err

    return run


def test_tasks_are_measured_and_kept(model, evaluate, tmp_path):
    code, found, _ = evaluate("model", "--tasks", "arc_easy,winogrande,arc_easy@2")
    assert code == 0
    (evaluation,) = found["evaluations"]
    assert [(task["task"], task["shots"]) for task in evaluation["tasks"].values()] == [
        ("arc_easy", 0),
        ("winogrande", 0),
        ("arc_easy", 2),
    ]
    assert [task["examples"] for task in evaluation["tasks"].values()] == [9, 7, 9]
    assert all(task["bos"] for task in evaluation["tasks"].values())
    for task in evaluation["tasks"].values():
        assert task["metrics"]["acc"] * task["examples"] == pytest.approx(
            round(task["metrics"]["acc"] * task["examples"])
        )
    assert evaluation["model"]["parameters"] == make_parameters()
    (file,) = (tmp_path / "evaluations").iterdir()
    assert file.name == f"model.{evaluation['model']['digest'][:8]}-stored.json"
    assert [result.shots for result in Evaluation.load(file).tasks.values()] == [0, 0, 2]


def make_parameters() -> int:
    from openelm.model.geometry import ModelConfig
    from small_models import UNEVEN

    return ModelConfig(**UNEVEN).num_parameters()


def test_what_is_measured_is_not_measured_again(model, evaluate, monkeypatch):
    assert evaluate("model", "--tasks", "arc_easy", "--limit", "4")[0] == 0
    from openelm.evaluate import harness

    measured = []
    measure = harness.measure
    monkeypatch.setattr(
        harness, "measure", lambda lm, loaded, spec, **o: measured.append(spec.task) or measure(lm, loaded, spec, **o)
    )
    assert evaluate("model", "--tasks", "arc_easy,winogrande", "--limit", "4")[0] == 0
    assert measured == ["winogrande"]
    # Of all examples, without a BOS, or of other weights it is another measurement.
    assert evaluate("model", "--tasks", "arc_easy")[0] == 0
    assert evaluate("model", "--tasks", "arc_easy", "--no-bos")[0] == 0
    assert measured == ["winogrande", "arc_easy", "arc_easy"]


def test_an_interrupted_evaluation_goes_on_with_the_answers_that_it_has(model, evaluate, tmp_path, monkeypatch):
    from openelm.evaluate import harness
    from openelm.infer import likelihood

    whole = evaluate("model", "--tasks", "arc_easy,winogrande", "--out", "whole")[1]["evaluations"][0]["tasks"]
    asked: list[int] = []
    compute = likelihood.likelihoods

    def interrupted(engine, requests, **options):
        done = options.pop("done")

        def until_ten(index: int, answer: object) -> None:
            done(index, answer)
            if len(asked) == 10 and asked[0] >= 0:
                raise KeyboardInterrupt
            asked.append(index)

        return compute(engine, requests, done=until_ten, **options)

    with monkeypatch.context() as patch:
        patch.setattr(harness, "likelihoods", interrupted)
        assert evaluate("model", "--tasks", "arc_easy,winogrande", "--out", "cut")[0] == 130
    (answers,) = (tmp_path / "cut").glob("*.answers.jsonl")
    assert len(answers.read_text().splitlines()) >= 10
    again: list[int] = []
    monkeypatch.setattr(harness, "likelihoods", lambda e, r, **o: again.extend(r) or compute(e, r, **o))
    found = evaluate("model", "--tasks", "arc_easy,winogrande", "--out", "cut")[1]["evaluations"][0]["tasks"]
    assert {key: task["metrics"] for key, task in found.items()} == {k: t["metrics"] for k, t in whole.items()}
    assert len(again) <= 27 + 14 - 10  # three choices a question, two a sentence
    assert not list((tmp_path / "cut").glob("*.answers.jsonl"))


def test_each_way_of_measuring_is_a_measurement_of_its_own(
    model, evaluate, tmp_path, golden_weights, tokenizer_file, text_folder
):
    """Other weights, another tokenizer, dtype, data, number of examples, no BOS: nothing is taken for another."""
    from openelm.data.tokenizer import train_tokenizer

    words = ["model", "--tasks", "arc_easy"]
    assert evaluate(*words)[0] == 0
    other = tmp_path / "other.model"
    train_tokenizer([file.read_text() for file in sorted(text_folder.iterdir())[:20]], other, 380, threads=1)
    shown = [
        evaluate(*words, *more)[1]["evaluations"][0]
        for more in (["--no-bos"], ["--limit", "3"], ["--dtype", "bfloat16"], ["--tokenizer", other])
    ]
    assert [len(found["tasks"]) for found in shown] == [2, 3, 1, 1]
    changed = make(golden_weights)
    with torch.no_grad():
        changed.norm.weight.mul_(2)
    save_model(changed, model, tokenizer=Tokenizer.load(tokenizer_file), overwrite=True)
    assert len(evaluate(*words)[1]["evaluations"][0]["tasks"]) == 1
    assert len(list((tmp_path / "evaluations").glob("*.json"))) == 4
    # And back again, all is there.
    save_model(make(golden_weights), model, tokenizer=Tokenizer.load(tokenizer_file), overwrite=True)
    assert len(evaluate(*words)[1]["evaluations"][0]["tasks"]) == 3


def test_the_table_shows_what_was_asked_for(model, evaluate, tmp_path, capsys):
    data = str(tmp_path / "data")
    assert evaluate("model", "--tasks", "winogrande")[0] == 0
    few = evaluate("model", "--tasks", "winogrande", "--limit", "3", "--no-bos")[1]["evaluations"][0]["tasks"]
    assert len(few) == 2
    for words, limit in (([], None), (["--limit", "3", "--no-bos"], 3)):
        (task,) = [task for task in few.values() if task["limit"] == limit]
        for suite in (["--tasks", "winogrande"], ["--suite", "zero-shot"]):
            capsys.readouterr()
            cli.run(["evaluate", "model", *suite, "--data", data, *words])
            printed = capsys.readouterr().out
            (row,) = [line for line in printed.splitlines() if "±" in line] or [printed]
            assert f"{100 * task['metrics']['acc']:.2f} ±" in row, (suite, words)


def test_models_of_one_name_are_told_apart(model, evaluate, tmp_path, golden_weights, tokenizer_file):
    other = make(golden_weights, ffn_multipliers=(0.5, 2.0))
    save_model(other, tmp_path / "deep" / "model", tokenizer=Tokenizer.load(tokenizer_file))
    code, found, _ = evaluate("model", "./model/../deep/model", "--tasks", "arc_easy", "--out", "here")
    assert code == 0
    one, two = found["evaluations"]
    assert one["model"]["parameters"] != two["model"]["parameters"]
    assert one["model"]["label"] != two["model"]["label"]
    assert len(list((tmp_path / "here").glob("*.json"))) == 2


def test_two_processes_do_not_lose_each_others_results(tmp_path):
    path = tmp_path / "it.json"
    one, two = Evaluation({"origin": "it"}), Evaluation({"origin": "it"})
    one.with_task(TaskResult("piqa", 0, {"acc": 0.5}, 10, "1", bos=True)).save(path)
    merged = two.with_task(TaskResult("sciq", 0, {"acc": 0.25}, 10, "1", bos=True)).save(path)
    assert list(merged.tasks) == ["piqa@0", "sciq@0"]
    assert Evaluation.load(path) == merged


def test_what_fails_by_our_mistake_is_named_and_the_others_finish(model, evaluate, monkeypatch):
    from openelm.evaluate import harness

    measure = harness.measure

    def breaks(lm, loaded, spec, **options):
        if spec.task == "arc_easy":
            raise ZeroDivisionError("by nobody")
        return measure(lm, loaded, spec, **options)

    monkeypatch.setattr(harness, "measure", breaks)
    code, found, said = evaluate("model", "--tasks", "arc_easy,winogrande")
    assert code == 1
    assert [task["task"] for task in found["evaluations"][0]["tasks"].values()] == ["winogrande"]
    assert "not measured: model: arc_easy: ZeroDivisionError: by nobody (" in said


def test_a_checkpoint_that_is_gone_is_named_and_the_others_are_measured(recipe, write_recipe, tmp_path, evaluate):
    assert cli.run(["pretrain", write_recipe(recipe), "--run", str(tmp_path / "run")]) == 0
    (tmp_path / "run" / "checkpoints" / "step_00000006" / "model.safetensors").unlink()
    code, found, said = evaluate("run", "--tasks", "arc_easy", "--limit", "2")
    assert code == 2
    assert [evaluation["model"]["label"] for evaluation in found["evaluations"]] == [
        "run, step 4",
        "run, step 8",
        "run",
    ]
    assert "step_00000006 lacks model.safetensors" in said


def test_a_task_that_fails_is_named_and_the_others_finish(model, evaluate):
    code, found, said = evaluate("model", "--tasks", "arc_easy,piqa,winogrande")
    assert code == 2
    assert [task["task"] for task in found["evaluations"][0]["tasks"].values()] == ["arc_easy", "winogrande"]
    (failure,) = found["failures"]
    assert "piqa" in failure
    assert "not measured: model: piqa" in said


def test_both_engines_measure_the_same(model, evaluate):
    pytest.importorskip("transformers")
    words = ["model", "--tasks", "arc_easy@1,winogrande"]
    _, ours, _ = evaluate(*words)
    _, theirs, _ = evaluate(*words, "--engine", "transformers", "--out", "theirs")
    for key, task in ours["evaluations"][0]["tasks"].items():
        assert theirs["evaluations"][0]["tasks"][key]["metrics"] == task["metrics"]


def test_a_baseline_is_measured_by_transformers_and_stands_in_the_same_table(model, evaluate, tmp_path, tokenizer_file):
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        vocab_size=400, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2
    )
    torch.manual_seed(0)
    transformers.LlamaForCausalLM(config).save_pretrained(tmp_path / "llama")
    Tokenizer.load(tokenizer_file).save(tmp_path / "llama")
    code, found, _ = evaluate("model", "llama", "--tasks", "arc_easy")
    assert code == 0
    ours, theirs = found["evaluations"]
    assert theirs["model"]["label"] == "llama"
    assert theirs["model"]["parameters"] == 2 * 400 * 32 + 2 * (4 * 32 * 32 + 3 * 32 * 48 + 2 * 32) + 32
    assert [next(iter(each["tasks"].values()))["examples"] for each in (ours, theirs)] == [9, 9]
    assert next(iter(theirs["tasks"].values()))["bos"]


def test_a_run_is_measured_checkpoint_by_checkpoint(recipe, write_recipe, tmp_path, evaluate):
    assert cli.run(["pretrain", write_recipe(recipe), "--run", str(tmp_path / "run")]) == 0
    code, found, _ = evaluate("run", "--tasks", "arc_easy", "--limit", "3")
    assert code == 0
    about = [evaluation["model"] for evaluation in found["evaluations"]]
    assert [model.get("step") for model in about] == [4, 6, 8, 8]
    assert [model.get("averaged", False) for model in about] == [False, False, False, True]
    assert [model["label"] for model in about] == ["run, step 4", "run, step 6", "run, step 8", "run"]
    assert about[0]["tokens"] < about[1]["tokens"] < about[2]["tokens"]
    assert len(of_run(tmp_path / "run")) == 4


def test_the_papers_table_is_shown(model, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    data = write_tasks(tmp_path / "data")
    assert cli.run(["evaluate", "model", "--suite", "zero-shot", "--data", str(data)]) == 2  # most have no data here
    captured = capsys.readouterr()
    lines = captured.out.splitlines()
    (row,) = [line for line in lines if line.startswith("| **model**")]
    cells, head = ([cell.strip() for cell in line.strip("|").split("|")] for line in (row, lines[2]))
    assert cells[head.index("PIQA")] == "-"
    assert re.fullmatch(r"\d+\.\d\d ± \d+\.\d\d", cells[head.index("ARC-e")])
    assert "OpenELM" in captured.out
    assert "54.37" in captured.out
    assert captured.err.count("not measured:") == 5


def test_the_card_says_what_was_measured_of_all_examples(model, evaluate, tmp_path):
    from openelm.interop.card import parse, section

    (model / "README.md").write_text("---\nlicense: mit\n---\n# Mine\n\nText.\n")
    assert evaluate("model", "--tasks", "arc_easy", "--card")[0] == 0
    found = evaluate("model", "--tasks", "arc_easy,winogrande", "--card")[1]["evaluations"][0]["tasks"]
    assert evaluate("model", "--tasks", "arc_easy@1", "--limit", "2", "--card")[0] == 0  # says nothing of the whole
    metadata, body = parse((model / "README.md").read_text())
    assert metadata["license"] == "mit"
    results = metadata["model-index"][0]["results"]
    found = {task["task"]: task for task in found.values()}
    assert {r["dataset"]["name"]: r["metrics"][0]["value"] for r in results} == {
        "arc_easy, 0 shots": pytest.approx(found["arc_easy"]["metrics"]["acc_norm"], abs=1e-4),
        "winogrande, 0 shots": pytest.approx(found["winogrande"]["metrics"]["acc"], abs=1e-4),
    }
    assert body.startswith("# Mine\n\nText.")
    assert section(body, "Accuracy").count("| arc_easy | 0 | acc_norm |") == 1


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "choose what to measure: --suite"),
        (["--suite", "zero-shot", "--tasks", "piqa"], "one of the two"),
        (["--suite", "zeroshot"], "did you mean zero-shot"),
        (["--tasks", "arc_easi"], "did you mean arc_easy"),
        (["--tasks", "arc_easy@x"], "behind @ stands the number"),
        (["--tasks", "leaderboard"], "the tasks of leaderboard have different numbers of examples"),
        (["--tasks", "arc_easy", "--limit", "0"], "--limit 0 must be at least 1"),
    ],
)
def test_what_cannot_be_is_refused(model, evaluate, capsys, words, message):
    code, _, said = evaluate("model", *words)
    assert code == 2
    assert message in said


def test_a_model_is_asked_for(evaluate):
    assert "name a model to evaluate" in evaluate("--tasks", "arc_easy")[2]
    assert "nowhere" in evaluate("nowhere", "--tasks", "arc_easy")[2]


def test_live_evaluation_leaves_the_training_as_it_was(recipe, write_recipe, tmp_path):
    pytest.importorskip("lm_eval")
    data = write_tasks(tmp_path / "data")
    command = ["pretrain", write_recipe(recipe), "--run"]
    assert cli.run([*command, str(tmp_path / "without")]) == 0
    watched = ["train.evaluate_every=3", "train.evaluate_tasks=arc_easy@1,winogrande", f"train.evaluate_data={data}"]
    assert cli.run([*command, str(tmp_path / "with"), *watched]) == 0
    losses = [
        [
            entry["loss"]
            for entry in map(json.loads, (tmp_path / name / "metrics.jsonl").open())
            if entry["kind"] == "train"
        ]
        for name in ("without", "with")
    ]
    assert losses[0] == losses[1]
    found = [
        entry
        for entry in map(json.loads, (tmp_path / "with" / "metrics.jsonl").open())
        if entry["kind"] == "evaluation"
    ]
    assert [(entry["step"], entry["task"], entry["shots"]) for entry in found] == [
        (step, *task) for step in (3, 6, 8) for task in (("arc_easy", 1), ("winogrande", 0))
    ]
    model = (tmp_path / "with" / "model" / "model.safetensors").read_bytes()
    assert model == (tmp_path / "without" / "model" / "model.safetensors").read_bytes()


def test_results_come_back_as_they_were(tmp_path):
    result = TaskResult("piqa", 0, {"acc": 0.5}, 10, "1.0", bos=False, limit=10)
    evaluation = Evaluation({"origin": "it"}).with_task(result)
    evaluation.save(tmp_path / "a" / "it.json")
    assert Evaluation.load(tmp_path / "a" / "it.json") == evaluation
    assert result.key == "piqa@0:10 no-bos"


def test_a_checkpoint_by_itself_has_its_runs_tokenizer(recipe, write_recipe, tmp_path, evaluate):
    assert cli.run(["pretrain", write_recipe(recipe), "--run", str(tmp_path / "run")]) == 0
    code, found, _ = evaluate("run/checkpoints/step_00000006", "--tasks", "arc_easy", "--limit", "2")
    assert code == 0
    assert found["evaluations"][0]["model"]["step"] == 6


def test_names_of_files_come_from_references(model, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (subject,) = find("./model", None)
    assert subject.results == Path("evaluations/model.json")
