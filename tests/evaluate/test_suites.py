"""Table 3 of the paper as data: what it says, what lm-eval knows of it, and the averages that the paper prints."""

import pytest

from openelm.errors import UserError
from openelm.evaluate.suites import EQUAL_WEIGHT, Spec, averages, known, names, suite

ZERO_SHOT = {  # Table 3a
    "arc_challenge": "acc_norm",
    "arc_easy": "acc_norm",
    "boolq": "acc",
    "hellaswag": "acc_norm",
    "piqa": "acc_norm",
    "sciq": "acc",
    "winogrande": "acc",
}
OPENLLM = {  # Table 3b
    ("arc_challenge", 25, "acc_norm"),
    ("hellaswag", 10, "acc_norm"),
    ("mmlu", 5, "acc"),
    ("truthfulqa_mc2", 0, "acc"),
    ("winogrande", 5, "acc"),
}
LLM360 = OPENLLM | {  # Table 3c
    ("crows_pairs_english", 25, "pct_stereotype"),
    ("piqa", 0, "acc_norm"),
    ("race", 0, "acc"),
}
# Rows of the 270M model in the order of the paper's columns, and the averages behind them (Tables 4a, 4b, 4c, 6).
PRINTED = {
    "zero-shot": ([26.45, 45.08, 53.98, 46.71, 69.75, 84.70, 53.91], {"Average": 54.37, "Average w/o SciQ": 49.31}),
    "openllm": ([27.65, 47.15, 25.72, 39.24, 53.83], {"Average": 38.72}),
    "llm360": ([27.65, 66.79, 47.15, 25.72, 69.75, 30.91, 39.24, 53.83], {"Average": 45.13}),
    "commonsense": ([24.57, 26.60, 62.14, 24.84, 50.05, 42.02, 49.88, 28.00], {"Average": 38.51}),
}


def test_the_suites_are_those_of_table_3():
    assert {spec.task: spec.metric for spec in suite("zero-shot")} == ZERO_SHOT
    assert all(spec.shots == 0 for spec in suite("zero-shot"))
    assert {(spec.task, spec.shots, spec.metric) for spec in suite("openllm")} == OPENLLM
    assert {(spec.task, spec.shots, spec.metric) for spec in suite("llm360")} == LLM360


@pytest.mark.parametrize("name", PRINTED)
def test_averages_are_over_the_columns_that_the_paper_averages(name):
    row, printed = PRINTED[name]
    scores = dict(zip([spec.title for spec in suite(name)], row, strict=True))
    means = {title: sum(scores[c] for c in columns) / len(columns) for title, columns in averages(name).items()}
    assert means.keys() == printed.keys()
    assert means == pytest.approx(printed, abs=0.0051)


def test_all_has_each_task_at_each_number_of_shots_once():
    columns = [(spec.task, spec.shots) for spec in suite("all")]
    assert len(columns) == len(set(columns))
    assert set(columns) == {(spec.task, spec.shots) for name in names() if name != "all" for spec in suite(name)}
    assert averages("all") == {}


def test_titles_within_a_suite_differ():
    for name in names():
        if name != "all":
            titles = [spec.title for spec in suite(name)]
            assert len(titles) == len(set(titles)), name


def test_a_task_is_known_by_its_first_column():
    assert known("arc_challenge") == Spec("arc_challenge", "acc_norm", 0, "ARC-c")
    assert known("gsm8k") is None


@pytest.mark.parametrize("name", ["zeroshot", "zero_shot", "openlm", "", "ALL"])
def test_an_unknown_suite_is_refused_with_the_nearest_names(name):
    near = {"zeroshot": "zero-shot", "zero_shot": "zero-shot", "openlm": "openllm"}.get(name, "all")
    with pytest.raises(UserError, match=near):
        suite(name)
    with pytest.raises(UserError):
        averages(name)


def test_lm_eval_has_every_task_and_every_metric():
    pytest.importorskip("lm_eval")
    from openelm.evaluate import commonsense, tasks

    index = tasks._index(False).task_index
    for spec in suite("all"):
        if spec.task in commonsense.SETS:
            continue
        config = index[spec.task].cfg
        listed = config.get("metric_list") or config["aggregate_metric_list"]
        assert spec.metric in [metric["metric"] for metric in listed], spec


def test_groups_of_equal_weight_are_groups_that_lm_eval_weights_by_size():
    pytest.importorskip("lm_eval")
    from openelm.evaluate import tasks

    manager = tasks._index(False)
    for name in EQUAL_WEIGHT:
        assert [m["weight_by_size"] for m in manager.task_index[name].cfg["aggregate_metric_list"]] == [True]
        assert len(tasks._leaves(manager, name)) == 57


@pytest.mark.slow(reason="reads all 14,000 task definitions of lm-eval, ten seconds and more")
def test_the_folders_read_first_hold_what_the_whole_of_lm_eval_has_under_these_names():
    pytest.importorskip("lm_eval")
    from openelm.evaluate import tasks

    everything, first = tasks._index(True).task_index, tasks._index(False).task_index
    for name, entry in first.items():
        assert everything[name].yaml_path == entry.yaml_path and entry.tags <= everything[name].tags, name
