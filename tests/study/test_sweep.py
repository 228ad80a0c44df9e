"""openelm sweep: every point trained and measured once, whatever happens between, and the best chosen honestly."""

import json
import math
import re
import shlex
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

import small_tuning
from openelm import cli
from openelm.errors import Stopped, UserError
from openelm.evaluate.results import Evaluation, How, TaskResult
from openelm.evaluate.suites import Spec
from openelm.recipe import Layer, combine
from openelm.study import sweep as study
from openelm.study.ranking import Aim, Ranking, read
from openelm.study.sweep import PAPER_GRID, Sweep, begin, gather, parse_grid, settings
from small_tasks import write_tasks

AIM = Aim({"ARC-e": Spec("arc_easy", "acc_norm", 0, "ARC-e"), "PIQA": Spec("piqa", "acc", 0, "PIQA")}, How())
# By learning rate: the metrics of both tasks, each with its standard error.
METRICS = {0.01: ((0.5, 0.03), (0.7, 0.04)), 0.003: ((0.6, 0.03), (0.8, 0.04)), 0.001: ((0.56, 0.03), (0.8, 0.04))}


class Commands:
    """In place of processes: writes what training and evaluation would, and remembers what it was asked for."""

    def __init__(self, metrics: Mapping[float, Any] = METRICS, fails: Sequence[str] = ()) -> None:
        self.metrics, self.fails = metrics, fails
        self.asked: list[list[str]] = []

    def __call__(self, words: Sequence[str], log: Path) -> int:
        self.asked.append(list(words))
        told = " ".join(words)
        with log.open("a") as file:
            file.write(f"$ {told}\n")
            for sign in self.fails:
                if sign in told:
                    file.write("one\ntwo\n\nopenelm: error: the disk is gone\n")
                    return 2
        lr = float(re.findall(r"train\.lr=([\d.e-]+)", told)[-1])
        write_evaluation(words, self.metrics[lr]) if words[0] == "evaluate" else write_run(words, lr)
        return 0

    @property
    def short(self) -> list[tuple[str, str]]:
        """What was asked for: the command, and the point."""
        return [(words[0], re.findall(r"train\.lr=[\d.e-]+", " ".join(words))[-1]) for words in self.asked]


def write_run(words: Sequence[str], lr: float) -> None:
    run = Path(words[list(words).index("--run") + 1])
    assert words[-1] == "--auto-resume"
    (run / "model").mkdir(parents=True)
    losses = [{"kind": "train", "step": step, "loss": 4 - step - 10 * lr} for step in (1, 2)]
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in losses))
    scores = {"last": 2.5 - lr, "xz -9": 3.0}
    (run / "summary.json").write_text(json.dumps({"steps": 2, "bits_per_byte": scores, "sample": {"text": "so"}}))


def write_evaluation(words: Sequence[str], metrics: Any, **about: Any) -> None:
    out = Path(words[list(words).index("--out") + 1])
    evaluation = Evaluation({"dtype": "stored", "engine": "openelm", "digest": "1", **about})
    for spec, (value, error) in zip(AIM.columns.values(), metrics, strict=True):
        figures = {spec.metric: value} | ({} if error is None else {f"{spec.metric}_stderr": error})
        evaluation = evaluation.with_task(TaskResult(spec.task, 0, figures, 100, "1", bos=True))
    evaluation.save(out / f"model.{about.get('digest', 1)}.json")


@pytest.fixture
def make(recipe, write_recipe, tmp_path) -> Callable[..., Sweep]:
    """A sweep over three learning rates, in tmp_path/out."""

    def sweep(grid: str = "train.lr=0.01,0.003,0.001", *overrides: str, aim: Aim = AIM, **sections: Any) -> Sweep:
        changed = {**recipe, **{key: {**recipe[key], **value} for key, value in sections.items()}}
        words = parse_grid(grid.split())
        return Sweep(
            "pretrain", write_recipe(changed), overrides, words, tmp_path / "out", aim, ("--suite", "zero-shot")
        )

    return sweep


def value_of(override: str) -> Any:
    return combine([Layer(Path(), {}, {})], [override])[0]


# The grid


def test_values_of_a_grid_are_read_as_a_recipes_are_and_count_once():
    grid = parse_grid(["train.lr=2e-5,0.00002,3e-4", "model.size=270M,450M", "train.betas=[0.9,0.95],[0.9,0.999]"])
    assert grid == {
        "train.lr": (2e-5, 3e-4),
        "model.size": ("270M", "450M"),
        "train.betas": ([0.9, 0.95], [0.9, 0.999]),
    }
    assert parse_grid(["train.compile=true,false", "seed='1',1"]) == {"train.compile": (True, False), "seed": ("1", 1)}


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["train.lr"], "must name a key and its values"),
        (["train.lr="], "must name a key and its values"),
        (["train.lr= , "], "must name a key and its values"),
        (["=1,2"], "must name a key and its values"),
        (["train..lr=1"], "must name a key and its values"),
        (["train.lr=1,,2"], "the values cannot be read"),
        (["train.lr=1],[2"], "the values cannot be read"),
        (["train.lr=1", "train.lr=2"], "put all of its values into one"),
    ],
)
def test_a_grid_that_cannot_be_meant_is_refused(words, said):
    with pytest.raises(UserError, match=said):
        parse_grid(words)


def test_the_papers_grid_has_twenty_points_named_by_their_values(tmp_path):
    points = Sweep("dpo", "instruct", (), PAPER_GRID, tmp_path, AIM, ()).points()
    assert len({point.name for point in points}) == 20
    assert [points[0].name, points[1].name] == ["train.lr=2e-05,train.epochs=3", "train.lr=2e-05,train.epochs=5"]
    assert points[-1].training == ("dpo", "instruct", "train.lr=0.0001", "train.epochs=10")


def test_every_value_arrives_in_the_recipe_as_it_was_meant():
    values = [2e-5, 3, True, None, "270M", "3e-4", "7", "a b", "yes", "a: b", "[", "{x", "", "ü", [1, "2"], {"r": 8}]
    for value in values:
        (override,) = settings({"value": value})
        assert value_of(override) == {"value": value}
        assert type(value_of(override)["value"]) is type(value)


def test_names_of_points_are_names_of_folders_and_tell_them_apart(tmp_path):
    values = ("/data/a", "/data/b", "-data-a", "..", "x" * 300, "x" * 301, "3", 3)
    names = [p.name for p in Sweep("finetune", "r", (), {"model.path": values}, tmp_path, AIM, ()).points()]
    assert len(set(names)) == len(values)
    for name in names:
        assert re.fullmatch(r"[\w.=,+-]{1,100}", name) and name.startswith("model.path=")
        (tmp_path / name).mkdir()


@pytest.mark.parametrize(
    ("sections", "overrides", "trainer"),
    [
        ({"model": {"size": "270M"}}, [], "pretrain"),
        ({"model": {"path": "m"}}, [], "finetune"),
        ({"model": {"path": "m"}, "preference": {"beta": 0.1}}, [], "dpo"),
        ({"model": {"size": "270M"}}, ["model.path=m"], "finetune"),
        ({"model": {"path": "m"}}, ["preference.loss=hinge"], "dpo"),
    ],
)
def test_a_recipe_tells_which_command_trains(sections, overrides, trainer, write_recipe):
    assert study.trainer_of(write_recipe({"name": "r", **sections}), overrides) == trainer


def test_each_point_is_checked_before_any_is_run(make):
    sweep = make("train.lr=1e-2,1e-4 train.steps=8")
    with pytest.raises(UserError, match=r"with train.lr=0.0001 train.steps=8: .*train.min_lr=0.001 must not be above"):
        study.check("pretrain", sweep.recipe, [], sweep.grid)
    with pytest.raises(UserError, match=r"train.lrr is not a key: did you mean train.lr\?"):
        study.check("pretrain", sweep.recipe, [], parse_grid(["train.lrr=1"]))
    with pytest.raises(UserError, match=r"train.lr is in the grid .* and among the overrides"):
        study.check("pretrain", sweep.recipe, ["train.lr=1"], sweep.grid)
    assert study.check("pretrain", sweep.recipe, ["seed=7"], make("train.lr=3e-3,2e-3").grid).train.lr == 3e-3


# The folder


def test_the_same_sweep_goes_on_and_its_grid_may_grow(make, tmp_path):
    begin(make("train.lr=0.01,0.003 seed=1,2"))
    assert begin(make("train.lr=0.01,0.003 seed=1,2")).points()[0].name == "train.lr=0.01,seed=1"
    # In front, at the end, and with the keys in another order: the runs keep their names.
    grown = begin(make("seed=3,1,2 train.lr=0.02,0.003,0.01"))
    assert [point.name for point in grown.points()][:2] == ["train.lr=0.02,seed=3", "train.lr=0.02,seed=1"]
    assert len(grown.points()) == 9
    begin(make("seed=3,1,2 train.lr=0.02,0.003,0.01", "train.log_every=5"))  # which changes no number
    assert json.loads((tmp_path / "out" / "sweep.json").read_text())["grid"] == {
        "train.lr": [0.02, 0.003, 0.01],
        "seed": [3, 1, 2],
    }


def test_what_is_another_sweep_is_refused_by_name(make):
    begin(make())
    grid, one_task = "train.lr=0.01,0.003,0.001", Aim({"PIQA": AIM.columns["PIQA"]}, How())
    for words, options, said in (
        ([grid], {"train": {"steps": 9}}, "train.steps was 8, is 9"),  # the file has changed
        ([grid, "seed=5"], {}, "seed was 1, is 5"),
        ([grid], {"aim": Aim(AIM.columns, How(limit=10))}, "limit was None, is 10"),
        ([grid], {"aim": one_task}, r"tasks was .*arc_easy@0 acc_norm.*, is \['piqa@0 acc'\]"),
        (["train.lr=0.01,0.003"], {}, "its grid may grow, and this one lacks 0.001"),
        ([f"{grid} seed=1"], {}, "has a grid over train.lr, not train.lr, seed"),
    ):
        with pytest.raises(UserError, match=said):
            begin(make(*words, **options))
    begin(make())


def test_a_grid_over_sizes_is_the_same_sweep_though_sizes_have_settings_of_their_own(make, recipe, write_recipe):
    recipe["by_size"] = {"270M": {"train": {"z_loss": 0.1}}, "450M": {"train": {"z_loss": 0.2}}}
    recipe["model"] = {"size": "270M"}
    begin(make("model.size=270M"))
    begin(make("model.size=450M,270M"))


def test_only_a_sweep_is_ever_deleted(make, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    (out / "thesis.tex").write_text("mine")
    for overwrite in (False, True):
        with pytest.raises(UserError, match=r"is no sweep \(it has no sweep.json\)"):
            begin(make(), overwrite=overwrite)
    (out / "thesis.tex").unlink()
    study.run(begin(make()), Commands(), say=lambda _: None)
    begin(make(train={"steps": 9}), overwrite=True)
    assert [file.name for file in out.iterdir()] == ["sweep.json"]
    (out / "sweep.json").write_text("{}")
    with pytest.raises(UserError, match=r"sweep.json is damaged .*: put it back, or start anew with --overwrite"):
        begin(make())


# The runs


def test_each_point_is_trained_and_measured_once(make, tmp_path):
    commands, said = Commands(), []
    sweep = begin(make("train.lr=0.01,0.003", "seed=3"))
    study.run(sweep, commands, said.append)
    run = tmp_path / "out" / "train.lr=0.01"
    trained = ["pretrain", sweep.recipe, "seed=3", "train.lr=0.01", "--run", str(run), "--auto-resume"]
    evaluated = ["evaluate", str(run / "model"), "--suite", "zero-shot", "--out", str(run / "evaluation")]
    assert commands.asked[:2] == [trained, evaluated]
    pairs = [(name, f"train.lr={lr}") for lr in (0.01, 0.003) for name in ("pretrain", "evaluate")]
    assert commands.short == pairs
    assert said[0].endswith("out: 2 points, 0 of them done") and "1/2 train.lr=0.01: average 60.00 ± 2.50 (" in said[2]
    # A larger grid runs what is new, and nothing where nothing is.
    more = Commands()
    study.run(begin(make("train.lr=0.001,0.01,0.003", "seed=3")), more, said.append)
    study.run(begin(make("train.lr=0.001,0.01,0.003", "seed=3")), more, said.append)
    assert more.short == [("pretrain", "train.lr=0.001"), ("evaluate", "train.lr=0.001")]


def test_an_interrupted_sweep_shows_what_is_done_and_goes_on_there(make, tmp_path):
    class Interrupted(Commands):
        def __call__(self, words: Sequence[str], log: Path) -> int:
            if len(self.asked) == 3:
                raise Stopped("asked to", 75)
            return super().__call__(words, log)

    with pytest.raises(Stopped):
        study.run(begin(make()), Interrupted(), say=lambda _: None)
    table = (tmp_path / "out" / "table.md").read_text()
    assert "Best: train.lr=0.01, average 60.00" in table and "2 of 3 points are not done." in table
    rest = Commands()
    study.run(begin(make()), rest, say=lambda _: None)
    assert rest.short == [
        ("evaluate", "train.lr=0.003"),
        ("pretrain", "train.lr=0.001"),
        ("evaluate", "train.lr=0.001"),
    ]


def test_a_point_that_fails_is_named_with_its_last_words_and_the_others_go_on(make, tmp_path):
    said: list[str] = []
    outcomes = study.run(begin(make()), Commands(fails=["train.lr=0.003 --run"]), said.append)
    assert [bool(one.failure) for one in outcomes] == [False, True, False]
    assert "2/3 train.lr=0.003: training left with 2\n  " in said[4]
    assert "\n  one\n  two\n  openelm: error: the disk is gone (" in said[4]
    assert "Failed: train.lr=0.003: openelm: error: the disk is gone" in (tmp_path / "out" / "table.md").read_text()
    points = json.loads((tmp_path / "out" / "results.json").read_text())["points"]
    assert [point["name"][9:] for point in points] == ["0.001", "0.01", "0.003"]
    assert points[2]["average"] is None and points[2]["failure"].endswith("the disk is gone")
    # What it said before is not shown again, and it has its turn again.
    again = study.run(begin(make()), Commands(), said.append)
    assert not any(one.failure for one in again) and again[1].average


def test_a_point_without_all_figures_has_no_average(make):
    lost = {lr: (both[0], (math.nan, 0.1)) for lr, both in METRICS.items()}
    outcomes = study.run(begin(make()), Commands(lost), say=lambda _: None)
    assert [one.average for one in outcomes] == [None] * 3
    assert outcomes[0].failure.startswith("evaluation gave no figure for PIQA; see ")
    assert outcomes[0].scores["ARC-e"] == (0.5, 0.03)


# The table


def ranking(make, metrics: Mapping[float, Any]) -> Ranking:
    return Ranking(study.run(begin(make(), overwrite=True), Commands(metrics), say=lambda _: None), AIM)


def test_the_best_has_the_highest_average_and_equal_ones_keep_the_grids_order(make):
    found = ranking(make, METRICS)
    assert [row.point.name[9:] for row in found.rows] == ["0.003", "0.001", "0.01"]
    assert found.best and found.best.average
    assert found.best.average.value == pytest.approx((0.6 + 0.8) / 2)
    assert found.best.average.error == pytest.approx(math.sqrt(0.03**2 + 0.04**2) / 2)
    assert [row.point.name[9:] for row in found.as_good()] == ["0.001"]  # 68 of 70 ± 2.5
    tied = dict.fromkeys(METRICS, ((0.5, None), (0.5, None)))
    found = ranking(make, tied)
    assert [row.point.name[9:] for row in found.rows] == ["0.01", "0.003", "0.001"]
    assert found.best and found.best.average == (0.5, None) and len(found.as_good()) == 2
    assert "2 others are equal to it, so that the choice among them may be chance" in found.table()
    clear = {0.01: ((0.9, 0.01), (0.9, 0.01)), 0.003: ((0.5, 0.2), (0.5, 0.2)), 0.001: ((0.5, 0.2), (0.5, 0.2))}
    found = ranking(make, clear)
    assert not found.as_good() and "chance" not in found.table()


def test_the_table_shows_values_losses_tasks_and_what_to_make_of_it(make, tmp_path):
    found = ranking(make, METRICS)
    lines = found.table().split("\n\n")
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[0].splitlines()]
    # What xz makes of the held-out text is the same everywhere and tells nothing.
    assert cells[0] == ["", "train.lr", "loss", "bits_per_byte (last)", "ARC-e", "PIQA", "average"]
    assert cells[2][:4] == ["1", "**0.003**", "**1.9700**", "**2.4970**"]
    assert cells[2][4:] == ["**60.00 ± 3.00**", "**80.00 ± 4.00**", "**70.00 ± 2.50**"]
    assert cells[4] == ["3", "0.01", "1.9000", "2.4900", "50.00 ± 3.00", "70.00 ± 4.00", "60.00 ± 2.50"]
    assert len({len(line) for line in lines[0].splitlines()}) == 1
    assert lines[1] == f"Best: train.lr=0.003, average 70.00 ± 2.50; model: {tmp_path}/out/train.lr=0.003/model"
    close = "Another is within one standard error of it (2.50), so that the choice among them may be chance"
    assert lines[2] == f"{close}: train.lr=0.001."
    assert lines[3].strip() == f"The best again: `openelm pretrain {tmp_path}/tiny.yaml train.lr=0.003`"
    assert (tmp_path / "out" / "table.md").read_text() == found.table()
    assert json.loads((tmp_path / "out" / "results.json").read_text()) == json.loads(json.dumps(found.as_plain()))


def test_of_a_tuning_run_the_table_has_the_final_models_held_out_loss_and_accuracy(make):
    sweep = begin(make("train.lr=0.01,0.003"))
    study.run(sweep, Commands(), say=lambda _: None)
    for point, loss in zip(sweep.points(), (0.5, 0.25), strict=True):
        scores = {"loss": loss, "accuracy": 1 - loss, "accuracy_stderr": 0.05, "margin": loss, "pairs": 80}
        held_out = {"last": {**scores, "loss": 9.0}, "averaged": scores}
        account = {"records": int(100 * loss), "trained_on": 3}
        summary = {"steps": 2, "held_out": held_out, "examples": account}
        (point.run / "summary.json").write_text(json.dumps(summary))
    found = Ranking(gather(sweep), AIM)
    head, _, first, second = (line.split("|") for line in found.table().splitlines()[:4])
    assert [cell.strip() for cell in head[3:6]] == ["loss", "held-out loss (averaged)", "held-out accuracy (averaged)"]
    assert [cell.strip(" *") for cell in first[4:6]] == ["0.2500", "0.7500"]
    assert [cell.strip() for cell in second[4:6]] == ["0.5000", "0.5000"]
    assert "margin" not in found.table() and "records" not in found.table()


def test_a_figure_measured_in_another_way_is_not_taken(make):
    sweep = begin(make("train.lr=0.01"))
    study.run(sweep, Commands(), say=lambda _: None)
    (point,) = sweep.points()
    assert read(point, Aim(AIM.columns, How(limit=5))).average is None
    other = ["evaluate", "--out", str(point.evaluations)]
    for about in ({"dtype": "bfloat16", "digest": "2"}, {"engine": "transformers", "digest": "3"}):
        write_evaluation(other, ((0.9, 0.1), (0.9, 0.1)), **about)
    assert read(point, AIM).average == pytest.approx((0.6, 0.025))
    write_evaluation(other, ((0.9, 0.1), (0.9, 0.1)), digest="4")  # of new weights
    assert read(point, AIM).scores["PIQA"] == (0.9, 0.1)


def test_what_has_no_average_or_a_bad_one_is_refused(monkeypatch):
    with pytest.raises(UserError, match=r"--suite safety has no average .* zero-shot, openllm, llm360, commonsense"):
        Aim.of("safety", None, How())
    with pytest.raises(UserError, match="one of the two"):
        Aim.of("zero-shot", "piqa", How())
    monkeypatch.setattr("openelm.evaluate.tasks.parse", lambda text: (Spec(text, "word_perplexity", 0, text),))
    with pytest.raises(UserError, match="wikitext is measured by word_perplexity, of which less is better"):
        Aim.of(None, "wikitext", How())
    assert list(Aim.of("zero-shot", None, How()).columns)[:2] == ["ARC-c", "ARC-e"]


# The command


@pytest.fixture
def sweep_command(recipe, write_recipe, tmp_path, monkeypatch, capsys):
    """Run ``openelm sweep`` in tmp_path; gives exit code, what it printed and what it said."""
    monkeypatch.chdir(tmp_path)
    file = Path(write_recipe(recipe)).name

    def run(*words: str) -> tuple[int, str, str]:
        capsys.readouterr()
        code = cli.run(["sweep", file, *words])
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return run


def test_printed_commands_do_by_hand_what_the_sweep_does(sweep_command, tmp_path, monkeypatch):
    zero_shot = {spec.title: spec for spec in Aim.of("zero-shot", None, How()).columns.values()}
    monkeypatch.setattr(sys.modules[__name__], "AIM", Aim(zero_shot, How()))
    metrics = {lr: [METRICS[lr][0]] * 7 for lr in METRICS}
    words = ["--grid", "train.lr=0.01,0.003", "train.sample_prompts=[it's]", "--commands"]
    code, printed, said = sweep_command(*words)
    assert code == 0 and "2 of 2 points are left" in said
    lines = printed.splitlines()
    assert len(lines) == 2 and lines[0].startswith("openelm pretrain tiny.yaml 'train.sample_prompts=[it'")
    training, evaluation = (shlex.split(command) for command in lines[1].split(" && "))
    assert training[3:] == [
        *("train.sample_prompts=[it's]", "train.lr=0.003"),
        *("--run", "sweeps/tiny/train.lr=0.003", "--auto-resume"),
    ]
    by_hand = Commands(metrics)
    for command in (training, evaluation):
        assert command[0] == "openelm" and by_hand(command[1:], tmp_path / "log") == 0
    code, printed, said = sweep_command(*words)
    assert printed.splitlines() == lines[:1] and "1 of 2 points are left" in said
    assert "Best: train.lr=0.003, average 60.00" in (tmp_path / "sweeps" / "tiny" / "table.md").read_text()
    pytest.importorskip("lm_eval")
    rest = Commands(metrics)
    monkeypatch.setattr(study, "start_process", rest)
    code, printed, said = sweep_command(*words[:-1])
    assert code == 0 and rest.short == [("pretrain", "train.lr=0.01"), ("evaluate", "train.lr=0.01")]
    assert printed == (tmp_path / "sweeps" / "tiny" / "table.md").read_text()
    code, printed, said = sweep_command(*words[:-1], "--json")
    assert json.loads(printed)["best"] == "train.lr=0.003"


def test_without_a_grid_preferences_are_tuned_over_the_papers(tmp_path, monkeypatch, write_recipe, capsys):
    monkeypatch.chdir(tmp_path)
    recipe = {
        "name": "pairs",
        "model": {"path": "model"},
        "data": {"sources": [{"name": "pairs", "path": "pairs.jsonl", "format": "preference"}]},
        "preference": {"loss": "hinge"},
        "train": {"global_batch": 8, "micro_batch": 1, "lr": 1e-5},
    }
    assert cli.run(["sweep", write_recipe(recipe), "--commands", "--out", "out"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 20
    last = ["train.lr=0.0001", "train.epochs=10", "--run", "out/train.lr=0.0001,train.epochs=10", "--auto-resume"]
    assert shlex.split(lines[-1].split(" && ")[0])[3:] == last
    del recipe["preference"]
    recipe["data"]["sources"][0]["format"] = "prompt"
    assert cli.run(["sweep", write_recipe(recipe), "--with", "dpo"]) == 2
    assert "finetune has none: use --with finetune" in capsys.readouterr().err


def test_a_sweep_with_a_failed_point_leaves_with_1(sweep_command, monkeypatch):
    pytest.importorskip("lm_eval")
    monkeypatch.setattr(study, "start_process", Commands(fails=["train.lr=0.003"]))
    code, printed, said = sweep_command("--grid", "train.lr=0.003")
    assert code == 1
    assert "failed: train.lr=0.003, see sweeps/tiny/train.lr=0.003.log" in said and "Failed: train.lr" in printed


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ([], "name one, as --grid train.lr=1e-3,2e-3"),
        (["--grid", "train.lr=1e-2", "--limit", "0"], "--limit 0 must be at least 1"),
        (["--grid", "train.lr=1e-2", "--suite", "zeroshot"], "did you mean zero-shot"),
        (["--grid", "train.epochs=3"], "train.epochs is not a key"),
        (["--grid", "train.lr=1e-2", "--with", "dpo"], "names no model to tune"),
        (["--grid", "train.lr=1e-2", "--commands", "--json"], "give one of them"),
        (["--grid", "train.lr=1e-2", "--data", "nowhere"], "has no data for arc_challenge"),
        (["--grid", "train.lr=1e-2", "--out", "tiny.yaml"], "is no sweep"),
    ],
)
def test_what_makes_no_sense_is_refused_before_anything_is_made(words, said, sweep_command, tmp_path):
    if "--data" in words or "--out" in words:
        pytest.importorskip("lm_eval")
    code, printed, error = sweep_command(*words)
    assert (code, printed) == (2, "") and said in error
    assert [file.name for file in tmp_path.iterdir()] == ["tiny.yaml"]


def test_a_sweep_of_two_points_from_a_recipe_to_the_table(sweep_command, recipe, tmp_path, quick, monkeypatch):
    pytest.importorskip("lm_eval")
    questions = [
        {"id": str(n), "question": f"Which word is {n}?", "choices": {"text": ["one", "water"], "label": ["A", "B"]},
         "answerKey": "AB"[n % 2]}
        for n in range(8)
    ]  # fmt: skip
    folder = tmp_path / "data" / "ai2_arc" / "ARC-Easy"
    folder.mkdir(parents=True)
    (folder / "test.jsonl").write_text("".join(json.dumps(row) + "\n" for row in questions))

    def start(words: Sequence[str], log: Path) -> int:
        process = quick(list(words), log=log)  # the real command, in a process of its own
        process.join(120)
        return process.exitcode

    monkeypatch.setattr(study, "start_process", start)
    words = ["--grid", "train.lr=1e-2,2e-3", "--tasks", "arc_easy", "--data", "data", "--limit", "6", "--json"]
    code, printed, said = sweep_command(*words)
    assert code == 0, said
    found = json.loads(printed)
    assert sorted(point["values"]["train.lr"] for point in found["points"]) == [0.002, 0.01]
    for point in found["points"]:
        run = tmp_path / point["run"]
        (file,) = (run / "evaluation").glob("*.json")
        (result,) = Evaluation.load(file).tasks.values()
        assert point["average"] == point["tasks"]["arc_easy"]
        assert point["average"]["value"] == result.metrics["acc_norm"] and result.examples == 6
        assert point["summary"]["bits_per_byte"]["averaged"] > 0
        steps = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
        assert point["loss"] == [step["loss"] for step in steps if step["kind"] == "train"][-1]
    assert found["points"][0]["loss"] != found["points"][1]["loss"]

    def none(words: Sequence[str], log: Path) -> int:
        raise AssertionError(words)

    monkeypatch.setattr(study, "start_process", none)
    assert json.loads(sweep_command(*words)[1]) == found


@pytest.mark.slow  # eight processes, four of which import lm-eval: half a minute
@pytest.mark.parametrize("pairs", [False, True], ids=["finetune", "dpo"])
def test_a_sweep_of_two_points_that_tune(pairs, tmp_path, quick, monkeypatch, capsys, golden_weights, tokenizer_file):
    pytest.importorskip("lm_eval")
    pytest.importorskip("peft")
    monkeypatch.chdir(tmp_path)
    recipe = small_tuning.write_recipe(tmp_path, golden_weights, tokenizer_file, pairs=pairs)
    write_tasks(tmp_path / "data")

    def start(words: Sequence[str], log: Path) -> int:
        process = quick(list(words), {"OPENELM_CACHE": str(tmp_path / "cache")}, log=log)
        process.join(120)
        return process.exitcode

    monkeypatch.setattr(study, "start_process", start)
    words = ["--grid", "train.lr=1e-2,1e-3", "--tasks", "arc_easy", "--data", "data", "--limit", "4", "--out", "out"]
    assert cli.run(["sweep", str(recipe), *words, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["again"].startswith("openelm dpo" if pairs else "openelm finetune")
    losses = {point["values"]["train.lr"]: point["summary"]["held_out"]["last"]["loss"] for point in found["points"]}
    assert losses[0.01] < losses[0.001]
    table = (tmp_path / "out" / "table.md").read_text()
    assert all(f"{loss:.4f}" in table for loss in losses.values()) and "held-out loss (last)" in table


def test_the_results_of_a_sweep_that_has_only_begun_are_written(make, tmp_path):
    gather(begin(make()))
    assert "3 of 3 points are not done." in (tmp_path / "out" / "table.md").read_text()
    assert json.loads((tmp_path / "out" / "results.json").read_text())["best"] is None
