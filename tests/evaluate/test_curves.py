"""Fig. 1 of a run: points where they were measured, the averaged checkpoint at the end, and the report's section."""

import struct
from pathlib import Path
from typing import Any

import pytest

from openelm.evaluate import curves, suites
from openelm.evaluate.results import Evaluation, TaskResult
from openelm.report.plots import DARK, LIGHT

pytest.importorskip("matplotlib")

SERIES = {"ARC-e": [(100, 25.0), (200, 31.0), (300, 33.0)], "PIQA": [(100, 50.0), (300, 57.0)]}
AVERAGED = {"ARC-e": 34.0, "PIQA": 58.0}
CHANCE = {"ARC-e": 25.0, "PIQA": 50.0}


def panels(figure: Any) -> dict[str, Any]:
    return {axes.get_title(loc="left"): axes for axes in figure.axes}


def lines(axes: Any) -> list[list[tuple[float, float]]]:
    return [[(float(x), float(y)) for x, y in zip(*line.get_data(), strict=True)] for line in axes.lines]


def legend(figure: Any) -> list[str]:
    return [text.get_text() for text in figure.legends[0].get_texts()]


def test_each_task_has_its_points_and_the_averaged_checkpoint_at_the_end():
    figure = curves.accuracy_figure(SERIES, AVERAGED, LIGHT, chance=CHANCE)
    drawn = panels(figure)
    assert list(drawn) == ["ARC-e", "PIQA", "Average"]
    assert lines(drawn["ARC-e"])[:2] == [[(100, 25.0), (200, 31.0), (300, 33.0)], [(300, 34.0)]]
    assert lines(drawn["PIQA"])[:2] == [[(100, 50.0), (300, 57.0)], [(300, 58.0)]]
    # Step 200 has one task only, of which there is no average.
    assert lines(drawn["Average"])[:2] == [[(100, 37.5), (300, 45.0)], [(300, 46.0)]]
    assert [axes.get_title(loc="right") for axes in drawn.values()] == ["34.0", "58.0", "46.0"]
    assert {axes.get_xlim() for axes in drawn.values()} == {(0.0, 312.0)}
    assert legend(figure) == ["checkpoints, accuracy in %", "averaged checkpoint", "chance"]


def test_all_that_is_drawn_lies_inside_its_panel():
    for axes in curves.accuracy_figure(SERIES, AVERAGED, LIGHT, chance=CHANCE).axes:
        low, high = axes.get_ylim()
        assert all(low < y < high for line in lines(axes) for _, y in line)


def test_chance_is_a_line_where_it_does_not_flatten_the_curve():
    far = {"near": [(1, 30.0), (2, 40.0)], "far": [(1, 80.0), (2, 90.0)]}
    drawn = panels(curves.accuracy_figure(far, {}, LIGHT, chance={"near": 25.0, "far": 25.0}))
    assert lines(drawn["near"])[1] == [(0, 25.0), (1, 25.0)]
    assert len(lines(drawn["far"])) == 1
    assert drawn["far"].get_ylim()[0] > 75
    alone = curves.accuracy_figure({"far": far["far"]}, {}, LIGHT, chance={"far": 25.0})
    assert legend(alone) == ["checkpoints, accuracy in %"]


def test_noise_of_a_fraction_of_a_point_does_not_look_like_a_climb():
    axes = curves.accuracy_figure({"flat": [(1, 50.0), (2, 50.2)]}, {}, LIGHT, chance={}).axes[0]
    low, high = axes.get_ylim()
    assert high - low > curves.FLAT


def test_one_task_has_one_panel_and_tasks_never_measured_together_no_average():
    assert list(panels(curves.accuracy_figure({"ARC-e": [(5, 30.0)]}, {}, LIGHT, chance={}))) == ["ARC-e"]
    apart = {"a": [(1, 10.0)], "b": [(2, 20.0)], "empty": []}
    assert list(panels(curves.accuracy_figure(apart, {"a": 11.0}, LIGHT, chance={}))) == ["a", "b"]
    assert list(panels(curves.accuracy_figure(SERIES, {}, LIGHT, chance={}, with_average=False))) == ["ARC-e", "PIQA"]


@pytest.mark.parametrize(
    ("tasks", "grid"), [(1, (1, 1)), (2, (1, 3)), (3, (1, 4)), (4, (2, 3)), (7, (2, 4)), (8, (3, 3))]
)
def test_panels_stand_in_rows_of_four_at_most(tasks: int, grid: tuple[int, int]):
    figure = curves.accuracy_figure({f"task {n}": [(1, 30.0)] for n in range(tasks)}, {}, LIGHT, chance={})
    assert figure.axes[0].get_subplotspec().get_gridspec().get_geometry() == grid


def test_the_picture_is_a_png_of_its_size_in_the_colours_of_each_page():
    light, dark = (curves.draw_accuracies(SERIES, AVERAGED, theme, chance=CHANCE) for theme in (LIGHT, DARK))
    for png in (light, dark):
        assert png[:8] == b"\x89PNG\r\n\x1a\n"
        # Three panels of 2.75 inches beside each other at 160 dots an inch; one row, and room for the legend.
        assert struct.unpack(">II", png[16:24]) == (1320, 392)
    assert light != dark
    assert light == curves.draw_accuracies(SERIES, AVERAGED, LIGHT, chance=CHANCE)


# The section of the report


def evaluation(values: dict[tuple[str, int], float], **model: object) -> Evaluation:
    """An evaluation of made-up accuracies by task and shots."""
    results = [
        TaskResult(task, shots, {"acc": value, "acc_norm": value, "acc_norm_stderr": 0.01}, 1000, "1", True)
        for (task, shots), value in values.items()
    ]
    return Evaluation(dict(model), {}, {result.key: result for result in results})


def zero_shot(value: float) -> dict[tuple[str, int], float]:
    return {(spec.task, spec.shots): value for spec in suites.suite("zero-shot")}


def test_a_runs_evaluations_become_percentages_by_step():
    found = [
        evaluation({("piqa", 0): 0.61, ("arc_easy", 0): 0.31}, step=200),
        evaluation({("piqa", 0): 0.5, ("piqa", 5): 0.9}, step=100),
        evaluation({("piqa", 0): 0.625}, step=200, averaged=True),
        evaluation({("piqa", 0): 0.75}, origin="apple/OpenELM-270M"),  # of no run
    ]
    series, averaged = curves.along(found, suites.suite("zero-shot"))
    assert series == {"ARC-e": [(200, 31.0)], "PIQA": [(100, 50.0), (200, 61.0)]}
    assert averaged == {"PIQA": 62.5}


def test_the_section_has_a_picture_of_each_whole_suite_and_the_last_figures(tmp_path: Path):
    extra = {("truthfulqa_mc1", 0): 0.2, ("arc_challenge", 5): 0.3, ("<mine>", 0): 0.4}
    found = [
        evaluation(zero_shot(0.3), step=1000),
        evaluation(zero_shot(0.4) | extra, step=2000),
        evaluation(zero_shot(0.425), step=2000, averaged=True),
    ]
    page = curves.section(found, tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["accuracy-zero-shot.png"]
    assert page.startswith("<section>\n<h2>Evaluation</h2>\n<p>The table is of the averaged checkpoint, step 2,000.")
    assert 'alt="Zero-shot tasks: ARC-c 42.50, ARC-e 42.50, BoolQ 42.50,' in page
    assert "<td>Zero-shot tasks</td><td>ARC-c</td><td>0</td><td>acc_norm</td><td>42.50</td><td>1.00</td>" in page
    assert "<td>BoolQ</td><td>0</td><td>acc</td><td>42.50</td><td>-</td><td>1,000</td>" in page
    assert page.count("<tr>") == 8  # the averaged checkpoint has the seven tasks only

    page = curves.section(found[1:2], tmp_path)
    assert "the last model measured, step 2,000" in page
    assert "<td>Other tasks</td><td>ARC-c, 5 shots</td><td>5</td><td>acc_norm</td><td>30.00</td>" in page
    assert "<td>&lt;mine&gt;</td>" in page
    assert "<td>TruthfulQA-mc1</td><td>0</td><td>acc</td><td>20.00</td>" in page


def test_tasks_of_no_whole_suite_share_a_picture_without_an_average(tmp_path: Path):
    found = [evaluation({("piqa", 0): 0.5 + n / 10, ("boolq", 0): 0.5}, step=n) for n in (1, 2, 3)]
    page = curves.section(found, tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["accuracy-others.png"]
    assert 'alt="Other tasks: PIQA 80.00, BoolQ 50.00."' in page


def test_a_model_measured_once_has_a_table_and_nothing_measured_no_section(tmp_path: Path):
    page = curves.section([evaluation({("piqa", 0): 0.7}, origin="model")], tmp_path)
    assert "<td>PIQA</td><td>0</td><td>acc_norm</td><td>70.00</td>" in page
    assert "<figure>" not in page
    perplexity = TaskResult("wikitext", 0, {"word_perplexity": 20.0}, 10, "1", True)
    assert curves.section([Evaluation({}, {}, {perplexity.key: perplexity})], tmp_path) == ""
    assert curves.section([], tmp_path) == ""
    assert list(tmp_path.iterdir()) == []


def test_every_task_whose_chance_is_known_stands_in_a_suite():
    tasks = {spec.task for spec in suites.suite("all")}
    assert curves.CHANCE.keys() <= tasks
    assert curves.PICTURES.keys() <= set(suites.names())
