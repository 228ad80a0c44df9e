"""openelm ablate: twins trained on the same rows, each at the rate that it found, and judged on one text."""

import json
import re
import shutil
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import yaml

from openelm import cli
from openelm.config import load_recipe
from openelm.data.row_hashes import row_hashes
from openelm.errors import STOPPED, Stopped, UserError
from openelm.model.twins import KINDS
from openelm.recipe import recipe_names
from openelm.study.ablation import Trial, load_ablation
from openelm.study.ablation_plan import planned
from openelm.study.ablation_results import RESULTS, results, write
from openelm.study.ablation_runs import SCORE, Runs
from openelm.study.processes import Task
from openelm.train import parts
from openelm.train.run_folder import as_plain

SECTION = {
    "sizes": {
        "narrow": {"model": {"model_dim": 48}, "train": {"lr": 0.01}},
        "wide": {"kinds": ["layer-wise", "uniform"], "model": {"model_dim": 96}, "train": {"lr": 0.005}},
    },
    "kinds": ["layer-wise", "uniform", "reversed"],
    "seeds": [0, 1],
    "tokens_per_parameter": 0.01,
    "within": 0.02,
    "lr_factors": [0.5, 1, 2],
    "on_other_data": {"unfiltered": {"min_characters": 0}},
}
NARROW = {"narrow": {"model": {"model_dim": 48}, "train": {"lr": 0.01}}}


@pytest.fixture
def ablation_recipe(recipe: dict[str, Any], write_recipe: Callable[[dict[str, Any]], str]) -> Callable[..., str]:
    """Write the recipe of the tests with a section ablation, of which some keys may be others."""

    def written(**changes: Any) -> str:
        section = {key: value for key, value in {**SECTION, **changes}.items() if value is not None}
        model = {**recipe["model"], "num_transformer_layers": 3, "head_dim": 8}
        return write_recipe({**recipe, "name": "twins", "model": model, "ablation": section})

    return written


# What is trained


def test_every_kind_looks_for_its_rate_at_the_smallest_size_and_is_then_trained_from_every_seed(ablation_recipe):
    ablation = load_ablation(ablation_recipe(), [])
    search = ablation.tuning()
    assert {(trial.size, trial.data, trial.seed, trial.share) for trial in search} == {("narrow", "", 100, 0.5)}
    assert [(trial.kind, trial.factor) for trial in search] == [
        (kind, factor) for factor in (0.5, 1, 2) for kind in SECTION["kinds"]
    ]
    final = ablation.final({"layer-wise": 1.0, "uniform": 2.0, "reversed": 0.5})
    small = [("layer-wise", ""), ("uniform", ""), ("reversed", ""), ("layer-wise", "unfiltered")]
    expected = [("narrow", seed, *kind) for seed in (0, 1) for kind in small]
    expected += [("wide", seed, kind, "") for seed in (0, 1) for kind in ("layer-wise", "uniform")]
    assert [(trial.size, trial.seed, trial.kind, trial.data) for trial in final] == expected
    assert {trial.kind: trial.factor for trial in final} == {"layer-wise": 1.0, "uniform": 2.0, "reversed": 0.5}
    assert len({trial.name for trial in [*search, *final]}) == len(search) + len(final)
    assert ablation.final({"uniform": 1.0}) == [
        trial._replace(factor=1.0) for trial in final if trial.kind == "uniform"
    ]


def test_runs_of_a_seed_differ_in_their_layers_and_rate_alone(ablation_recipe):
    ablation = load_ablation(ablation_recipe(), [])
    trials = ablation.final({"layer-wise": 1.0, "uniform": 2.0, "reversed": 0.5})
    configs = {trial: as_plain(ablation.config(trial, None)) for trial in trials}
    first = configs[trials[0]]
    layers = {"qkv_multipliers", "ffn_multipliers", "ffn_dim_divisor"}
    for trial, config in configs.items():
        if (trial.size, trial.seed, trial.data) == ("narrow", 0, ""):
            assert config["data"] == first["data"] and config["tokenizer"] == first["tokenizer"]
            assert config["train"] == {**first["train"], "lr": 0.01 * trial.factor, "min_lr": 1e-3 * trial.factor}
            same = {key: value for key, value in config["model"].items() if key not in layers}
            assert same == {key: value for key, value in first["model"].items() if key not in layers}
    other = next(config for trial, config in configs.items() if trial.data)
    assert other["data"] == {**first["data"], "min_characters": 0} and other["model"] == first["model"]
    large = next(config for trial, config in configs.items() if trial.size == "wide")
    assert (large["model"]["model_dim"], large["train"]["lr"]) == (96, 0.005)


def test_steps_follow_from_tokens_a_parameter_and_the_search_is_shorter(ablation_recipe):
    ablation = load_ablation(ablation_recipe(tokens_per_parameter=2.5), ["train.warmup_steps=6"])
    parameters = ablation.model("narrow").num_parameters()
    tokens_a_step = 4 * 32
    steps = -(-int(2.5 * parameters) // tokens_a_step)
    whole = ablation.config(ablation.final(ablation.untuned())[0], None)
    short = ablation.config(ablation.tuning()[0], None)
    assert whole.train.steps == ablation.steps("narrow") == steps
    assert (short.train.steps, short.train.warmup_steps, whole.train.warmup_steps) == (round(steps / 2), 3, 6)


def test_one_factor_is_no_search(ablation_recipe):
    ablation = load_ablation(ablation_recipe(lr_factors=[2]), [])
    assert ablation.tuning() == []
    assert {trial.factor for trial in ablation.final(ablation.untuned())} == {2}


@pytest.mark.parametrize("recipe", ["ablation", "ablation-cluster"])
def test_the_packaged_recipes_have_twins_of_equal_cost(recipe):
    assert recipe in recipe_names()
    plan = planned(load_ablation(recipe, []), "h200", None)
    sizes = {"ablation": ["0.6M", "1.4M"], "ablation-cluster": ["270M", "450M", "1.1B"]}[recipe]
    assert list(dict.fromkeys(row["size"] for row in plan["rows"])) == sizes
    for row in plan["rows"]:
        assert abs(row["parameters_off"]) <= 0.003 and abs(row["flops_off"]) <= 0.003
    smallest = [row["label"] for row in plan["rows"] if row["size"] == sizes[0]]
    assert smallest == [*KINDS, "layer-wise, unfiltered"]


def test_the_recipe_of_the_page_is_one(tmp_path):
    page = (Path(__file__).parents[2] / "docs" / "ablation.md").read_text(encoding="utf-8")
    (text,) = re.findall(r"```yaml\n(.*?)```", page, re.DOTALL)
    (tmp_path / "mine.yaml").write_text(text, encoding="utf-8")
    ablation = load_ablation(str(tmp_path / "mine.yaml"), [])
    packaged = load_ablation("ablation", [])
    assert ablation.model("0.6M") == packaged.model("0.6M") and ablation.kinds("0.6M") == packaged.kinds("0.6M")
    parameters = ablation.model("2M").num_parameters()
    assert round(parameters / 1e6) == 2 and ablation.steps("2M") * 8 * 256 == pytest.approx(20 * parameters, rel=1e-3)
    # The sizes that the base has are compared too: sections are laid over each other.
    assert list(ablation.bases) == ["0.6M", "1.4M", "2M"] and len(ablation.tuning()) == 4 * len(KINDS)


def test_a_plan_counts_runs_flops_and_hours(ablation_recipe):
    ablation = load_ablation(ablation_recipe(), [])
    plan = planned(ablation, "h200", 0.5)
    rows = {(row["size"], row["label"]): row for row in plan["rows"]}
    uniform = rows["narrow", "uniform"]
    flops = (2 + 3 * 0.5) * uniform["tokens"] * uniform["flops_per_token"]
    assert uniform["runs"] == 2 + 3 and uniform["flops"] == pytest.approx(flops)
    assert uniform["hours"] == pytest.approx(flops / (0.5 * 989e12) / 3600)
    assert rows["narrow", "layer-wise, unfiltered"]["runs"] == rows["wide", "uniform"]["runs"] == 2
    assert plan["runs"] == len(ablation.tuning()) + len(ablation.final(ablation.untuned()))
    assert plan["hours"] == pytest.approx(sum(row["hours"] for row in plan["rows"]))


@pytest.mark.parametrize(
    ("changes", "overrides", "words"),
    [
        ({"kinds": ["layer-wise", "unifrom"]}, [], "'unifrom' is not one of .*: did you mean uniform"),
        ({"reference": "reversed", "kinds": ["layer-wise", "uniform"]}, [], r"reference: 'reversed' is not one of"),
        ({"seeds": [0, 0]}, [], "names one twice"),
        ({"seeds": [100]}, [], "what is chosen by a seed must not be judged by it"),
        ({"lr_factors": [0, 1]}, [], "must be more than 0"),
        (
            {"kinds": ["uniform", "reversed"], "sizes": {"a": {"model": {"model_dim": 48}}}},
            [],
            "add it to ablation.kinds",
        ),
        ({"sizes": {}}, [], "at least 1"),
        ({"within": 1e-9}, [], "size wide: no .* twin of .* the nearest has .*; ablation.within allows more"),
        ({"on_other_data": {"odd": {"min_carachters": 0}}}, [], "did you mean data.min_characters"),
        ({"sizes": {"a": {"model": {"model_dim": 48, "heads": 3}}}}, [], "size a: model.heads is not a key"),
        ({}, ["train.warmup_steps=900"], "train.warmup_steps=450 must be less than train.steps"),
        ({}, ["train.init_from=model"], "somebody's weights cannot be compared"),
        ({}, ["ablation.seds=[1]"], "did you mean ablation.seeds"),
        ({}, ["train.init_from=model", "model.vocab_size=500"], "somebody's weights cannot be compared"),
        ({}, ["train.steps=9"], "train.steps follows from ablation.tokens_per_parameter"),
        ({}, ["train=3"], "train=3 must hold keys"),
        ({"on_other_data": {"all": {"held_out": 0, "row_length": 16}}}, [], "held_out, row_length must be the same"),
        ({"on_other_data": {"": {"min_characters": 0}}}, [], "'' is to be part of a folder's name"),
        ({"sizes": {"a/b": {"model": {"model_dim": 48}}}}, [], "'a/b' is to be part of a folder's name"),
        ({"lr_factors": [1, 1.0000001]}, [], "names one twice"),
        ({"sizes": {"a": {"kinds": [], "model": {"model_dim": 48}}}}, [], "at least 1 item"),
    ],
)
def test_what_cannot_be_compared_is_refused_before_anything_is_made(ablation_recipe, changes, overrides, words):
    with pytest.raises(UserError, match=words) as caught:
        load_ablation(ablation_recipe(**changes), overrides)
    assert "\n" not in str(caught.value)


def test_a_recipe_is_for_one_command(ablation_recipe, recipe, write_recipe):
    with pytest.raises(UserError, match="run `openelm ablate"):
        load_recipe(ablation_recipe(), [])
    with pytest.raises(UserError, match="has no section ablation: `openelm pretrain"):
        load_ablation(write_recipe(recipe), [])


# The runs


class Starts:
    """Runs commands in this process; remembers which, and fails or stops those that a pattern names."""

    def __init__(self, fails: str = "^$", stops: str = "^$") -> None:
        self.fails, self.stops, self.asked = fails, stops, list[str]()

    def __call__(self, tasks: Sequence[Task]) -> Iterator[tuple[Task, int]]:
        for task in tasks:
            name = Path(task.words[1]).stem
            self.asked.append(name)
            if re.search(self.stops, name):
                raise Stopped("stopped", STOPPED)
            if re.search(self.fails, name):
                task.log.write_text("one\ntwo: the disk is gone\n")
                yield task, 1
            else:
                yield task, cli.run(list(task.words))


@pytest.fixture
def made(ablation_recipe, tmp_path) -> Callable[..., Runs]:
    """Two kinds from two seeds at one size, with a search of two factors."""

    def make(*overrides: str, **changes: Any) -> Runs:
        few = {
            "kinds": ["layer-wise", "uniform"],
            "lr_factors": [0.1, 1],
            "sizes": {"narrow": SECTION["sizes"]["narrow"]},
        }
        runs = Runs(load_ablation(ablation_recipe(**{**few, **changes}), list(overrides)), tmp_path / "out")
        runs.prepare()
        return runs

    return make


def test_an_ablation_from_the_search_to_the_table(made):
    runs = made()
    starts, noted = Starts(), list[int]()
    runs.run(starts, lambda: noted.append(len(results(runs)["sizes"]["narrow"]["kinds"])))
    ablation = runs.ablation
    search = [trial.name for trial in ablation.tuning()]
    assert starts.asked[:4] == search and len(starts.asked) == 4 + 2 * 3 == len(noted)
    found = write(runs, pictures=False)
    assert json.loads((runs.out / RESULTS).read_text()) == json.loads(json.dumps(found))
    # A tenth of the rate learns next to nothing in so few steps.
    assert found["tuning"]["chosen"] == {"layer-wise": 1.0, "uniform": 1.0}
    for kind, scores in found["tuning"]["found"].items():
        assert scores["1"] < scores["0.1"], kind
    kinds = found["sizes"]["narrow"]["kinds"]
    assert list(kinds) == ["layer-wise", "uniform", "layer-wise, unfiltered"]
    for seed in (0, 1):
        alike, uniform, other = (kinds[kind]["runs"][seed] for kind in kinds)
        assert alike["seed"] == seed and alike["rows_sha256"] == uniform["rows_sha256"]
        assert alike["tokens"] == uniform["tokens"] > 0 and alike["bits_per_byte"] != uniform["bits_per_byte"]
        assert alike["counted"] == uniform["counted"] and alike["counted"]["documents"] > 0
        assert alike["curve"][-1][0] == found["sizes"]["narrow"]["tokens"] and alike["curve"][-1][1] > 0
        assert alike["tokens"] <= found["sizes"]["narrow"]["tokens"]
        assert alike["flops"] == alike["tokens"] * kinds["layer-wise"]["flops_per_token"]
        assert other["bits_per_byte"] is not None
    assert kinds["layer-wise"]["runs"][0]["rows_sha256"] != kinds["layer-wise"]["runs"][1]["rows_sha256"]
    # The rows are those that `openelm data hash` finds for the run's own recipe.
    first = ablation.final(runs.factors())[0]
    config = load_recipe(str(runs.recipe(first)), [])
    rows = row_hashes(
        parts.token_stream(config, parts.load_tokenizer(config)), kinds["layer-wise"]["runs"][0]["rows_hashed"]
    )
    assert rows["sha256"] == kinds["layer-wise"]["runs"][0]["rows_sha256"]
    table = (runs.out / "table.md").read_text()
    assert "layer-wise, unfiltered" in table and f"{kinds['uniform']['runs'][0]['bits_per_byte']:.4f}" in table

    again = Starts()
    runs.run(again, lambda: None)
    assert again.asked == []


def test_all_are_judged_on_the_text_of_the_recipe_itself(made):
    """Whatever a run trains on: the score of its model is that of the common text, not of its own held-out part."""
    runs = made("data.validation_tokens=100000", lr_factors=[1], seeds=[0])
    runs.run(Starts(), lambda: None)
    trials = {trial.label: trial for trial in runs.ablation.final(runs.factors())}
    texts = {label: runs.score(trial) for label, trial in trials.items()}
    assert len({(text["bytes"], text["tokens"]) for text in texts.values()}) == 1
    base = runs.ablation.bases["narrow"]
    own = parts.held_out(base, parts.load_tokenizer(base))
    assert texts["layer-wise"]["bytes"] == own.bytes
    summary = json.loads((runs.folder(trials["layer-wise"]) / "summary.json").read_text())
    assert texts["layer-wise"]["bits_per_byte"] == pytest.approx(
        next(iter(summary["bits_per_byte"].values())), rel=0.05
    )


def diverge(runs: Runs, trial: Trial) -> None:
    """Leave what a run leaves whose loss is not finite."""
    runs.folder(trial).mkdir()
    (runs.folder(trial) / "config.yaml").write_text(yaml.safe_dump(as_plain(runs.ablation.config(trial, None))))
    event = {"kind": "guard", "step": 3, "problem": "non-finite", "action": "stopped", "loss": "nan"}
    (runs.folder(trial) / "metrics.jsonl").write_text(json.dumps(event) + "\n")


def test_a_rate_at_which_training_diverges_is_none_and_is_not_tried_again(made):
    runs = made(lr_factors=[1, 1000], seeds=[0], on_other_data=None)
    for trial in runs.ablation.tuning():
        if trial.factor > 1:
            diverge(runs, trial)
    starts = Starts()
    runs.run(starts, lambda: None)
    assert starts.asked == [f"narrow-{kind}-{seed}" for seed in ("100-lr-x1", 0) for kind in ("layer-wise", "uniform")]
    assert runs.factors() == {"layer-wise": 1.0, "uniform": 1.0}
    assert results(runs)["tuning"]["found"]["uniform"]["1000"] is None


def test_a_search_that_failed_otherwise_leaves_its_kind_undecided(made):
    """A run that another process holds, or that memory ended, says nothing of its rate."""
    runs = made(seeds=[0], on_other_data=None)
    runs.run(Starts(fails="uniform-100-lr-x1"), lambda: None)
    assert runs.factors() == {"layer-wise": 1.0}
    again = made(seeds=[0], on_other_data=None)
    starts = Starts()
    again.run(starts, lambda: None)
    assert starts.asked == ["narrow-uniform-100-lr-x1", "narrow-uniform-0"]


def test_a_score_on_other_text_is_made_again_and_a_damaged_one_named(made):
    runs = made(lr_factors=[1], seeds=[0], on_other_data=None)
    runs.run(Starts(), lambda: None)
    trial = runs.ablation.final(runs.factors())[0]
    score, file = runs.score(trial), runs.folder(trial) / SCORE
    file.write_text(json.dumps({**score, "text_sha256": "of what was held out before", "bits_per_byte": 9.9}))
    assert runs.score(trial) == score == json.loads(file.read_text())
    file.write_text(json.dumps({**score, "bits_per_byte": 9.9}))
    assert runs.score(trial)["bits_per_byte"] == 9.9  # of the same text: not made again
    for damaged in ("{", "[]"):
        file.write_text(damaged)
        with pytest.raises(UserError, match=r"score.json .*: delete it"):
            runs.score(trial)


def test_the_folder_may_be_called_by_another_path(made, ablation_recipe, recipe, tmp_path, monkeypatch):
    recipe["tokenizer"] = {"vocab_size": 320}
    monkeypatch.chdir(tmp_path)
    ablation = load_ablation(ablation_recipe(lr_factors=[1], seeds=[0], on_other_data=None), [])
    for place in (Path("own"), tmp_path / "own"):
        runs = Runs(ablation, place)
        runs.prepare()
        for trial in runs.left():
            runs.write_recipe(trial)


def test_overwriting_spares_what_the_command_itself_needs(made, ablation_recipe, tmp_path, monkeypatch):
    runs = made(lr_factors=[1], seeds=[0])
    monkeypatch.chdir(runs.out)
    with pytest.raises(UserError, match="which --overwrite deletes"):
        runs.prepare(overwrite=True)
    monkeypatch.chdir(tmp_path)
    runs.prepare(overwrite=True)
    fresh = Runs(runs.ablation, tmp_path / "nothing" / "there")
    fresh.prepare(overwrite=True)
    assert (fresh.out / "ablation.json").is_file()
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="file"):
        Runs(runs.ablation, tmp_path / "file" / "x").prepare()


def test_what_is_stopped_is_gone_on_with(made):
    runs = made()
    starts = Starts(stops=r"uniform-0$")
    with pytest.raises(Stopped):
        runs.run(starts, lambda: None)
    assert starts.asked[-1] == "narrow-uniform-0"
    done = {
        trial.name
        for trial in [*runs.ablation.tuning(), *runs.ablation.final(runs.factors())]
        if runs.is_trained(trial)
    }
    assert len(done) == 5
    again, later = made(), Starts()
    again.run(later, lambda: None)
    assert set(later.asked) & done == set() and len(later.asked) == 10 - 5


def test_a_run_that_fails_is_named_and_the_others_go_on(made):
    runs = made()
    runs.run(Starts(fails=r"uniform-0$"), lambda: None)
    assert [trial.name for trial in runs.failures] == ["narrow-uniform-0"]
    found = results(runs)
    failed, other = found["sizes"]["narrow"]["kinds"]["uniform"]["runs"]
    assert failed["bits_per_byte"] is None and failed["failure"].endswith("two: the disk is gone")
    assert other["bits_per_byte"] is not None
    write(runs, pictures=False)
    assert "the disk is gone" in (runs.out / "table.md").read_text()


def test_the_command_of_a_run_is_that_run_again(made, tmp_path):
    runs = made(lr_factors=[1], seeds=[0])
    runs.run(Starts(), lambda: None)
    trial = runs.ablation.final(runs.factors())[1]
    assert cli.run(["pretrain", str(runs.recipe(trial)), "--run", str(tmp_path / "again")]) == 0
    weights = "model/model.safetensors"
    assert (tmp_path / "again" / weights).read_bytes() == (runs.folder(trial) / weights).read_bytes()


def test_another_recipe_is_refused_where_runs_of_one_are(made):
    runs = made(lr_factors=[1])
    runs.run(Starts(), lambda: None)
    with pytest.raises(UserError, match=r"train.clip_norm was 1.0, is 0.5: choose another --out"):
        made("train.clip_norm=0.5", lr_factors=[1], seeds=[0, 1, 2])
    grown = made(lr_factors=[1], seeds=[0, 1, 2])
    starts = Starts()
    grown.run(starts, lambda: None)
    assert starts.asked == [f"narrow-{kind}-2" for kind in ("layer-wise", "uniform", "layer-wise-unfiltered")]


def test_a_folder_of_something_else_is_left_alone(made, ablation_recipe, tmp_path):
    place = tmp_path / "mine"
    place.mkdir()
    (place / "thesis.txt").write_text("mine")
    runs = Runs(load_ablation(ablation_recipe(), []), place)
    for overwrite in (False, True):
        with pytest.raises(UserError, match="is no ablation"):
            runs.prepare(overwrite=overwrite)
    assert (place / "thesis.txt").read_text() == "mine"


def test_a_recipe_without_a_tokenizer_trains_one_for_all(made, ablation_recipe, recipe, text_folder, tmp_path):
    recipe["tokenizer"] = {"vocab_size": 320}
    ablation = load_ablation(ablation_recipe(lr_factors=[1], seeds=[0], on_other_data=None), [])
    runs = Runs(ablation, tmp_path / "own")
    runs.prepare()
    assert ablation.vocab_size == 320 and (runs.out / "tokenizer" / "tokenizer.model").is_file()
    trials = ablation.final(ablation.untuned())
    assert {ablation.config(trial, runs.tokenizer_path).tokenizer.path for trial in trials} == {
        str(runs.out / "tokenizer")
    }


# The command


@pytest.fixture
def ablate(ablation_recipe, tmp_path, monkeypatch, capsys) -> Callable[..., tuple[int, str, str]]:
    """Run ``openelm ablate`` in tmp_path; gives exit code, what it printed and what it said."""
    monkeypatch.chdir(tmp_path)
    file = Path(ablation_recipe(kinds=["layer-wise", "uniform"], lr_factors=[1], seeds=[0], on_other_data=None)).name

    def run(*words: str) -> tuple[int, str, str]:
        capsys.readouterr()
        code = cli.run(["ablate", file, *words])
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return run


def test_printed_commands_do_by_hand_what_the_ablation_does(ablate, tmp_path):
    code, printed, said = ablate("--commands")
    assert code == 0 and "4 runs are left" in said and "search" not in said
    for line in printed.splitlines():
        program, *words = line.split()
        assert program == "openelm" and cli.run(words) == 0
    code, printed, said = ablate("--commands")
    assert (code, printed) == (0, "") and "0 runs are left" in said
    score = json.loads((tmp_path / "ablations" / "twins" / "narrow-uniform-0" / SCORE).read_text())["bits_per_byte"]
    assert f"{score:.4f}" in (tmp_path / "ablations" / "twins" / "table.md").read_text()


def test_the_command_runs_some_at_once_and_shows_the_table(ablate, tmp_path):
    pytest.importorskip("matplotlib")
    sizes = 'ablation.sizes={"narrow": {"model": {"model_dim": 48}}}'
    code, printed, said = ablate(sizes, "--at-once", "2", "--out", "two")
    assert code == 0, said
    assert "2/2 narrow-" in said and "uniform" in printed
    found = json.loads((tmp_path / "two" / RESULTS).read_text())
    assert found["command"].startswith("openelm ablate twins.yaml")
    for kind in found["sizes"]["narrow"]["kinds"].values():
        assert kind["generation"]["tokens_per_s"] > 0 and len(kind["runs"]) == 1
    assert {path.name for path in (tmp_path / "two").glob("*.png")} >= {"curves-narrow.png", "layers-narrow.png"}


def test_a_dry_run_makes_nothing(ablate, tmp_path):
    before = sorted(tmp_path.iterdir())
    code, printed, _ = ablate("--dry-run", "--gpu", "h200")
    assert code == 0 and "4 runs, those of a kind from the seeds 0" in printed and "hours of one h200" in printed
    assert json.loads(ablate("--dry-run", "--gpu", "h200", "--json")[1])["runs"] == 4
    assert sorted(tmp_path.iterdir()) == before


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--at-once", "0"], "--at-once 0 must be at least 1"),
        (["--commands", "--json"], "give one of them"),
        (["--dry-run", "--gpu", "h20"], "did you mean h200"),
        (["ablation.kinds=[llama]"], "did you mean"),
        (["--gpu", "h200"], "--gpu and --mfu are of --dry-run"),
    ],
)
def test_bad_input_is_one_line_and_makes_nothing(ablate, tmp_path, words, said):
    code, _, err = ablate(*words)
    assert code == 2 and said in err and err.count("\n") == 1
    assert not (tmp_path / "ablations").exists()


def test_a_score_is_kept_with_its_run(made):
    """A run that is deleted takes its score along, and is trained anew."""
    runs = made(lr_factors=[1], seeds=[0])
    runs.run(Starts(), lambda: None)
    trial = Trial("narrow", "uniform", "", 0, 1.0)
    assert (runs.folder(trial) / SCORE).is_file()
    shutil.rmtree(runs.folder(trial))
    starts = Starts()
    runs.run(starts, lambda: None)
    assert starts.asked == ["narrow-uniform-0"]
