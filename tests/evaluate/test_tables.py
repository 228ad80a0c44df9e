"""Tables: the paper's numbers as data, and the user's rows among them, as Markdown and LaTeX."""

from pathlib import Path

import pytest
import yaml

from openelm.errors import UserError
from openelm.evaluate import suites, tables
from openelm.evaluate.results import Evaluation, TaskResult
from openelm.evaluate.tables import OwnRow

# Printed averages that do not follow from their rows, by more than 0.01: (table, model, billions, title).
FLAGGED: list[tuple[str, str, float, str]] = []

SMALL = """\
notes: {B: B is a share; higher is not better.}
tables:
  "9":
    title: Two tasks
    suite: two
    columns: [A, B]
    averages: [Mean, Mean w/o B]
    rows:
      - {model: Small, size_b: 0.27, tokens_b: 5.1, printed: [25.50, 20.00], values: [20.00, 30.00]}
      - {model: Large, size_b: 1.08, tokens_b: 1500, printed: [~, 40.00], values: [40.00, ~]}
"""
TWO = {"Mean": ("A", "B"), "Mean w/o B": ("A",)}


@pytest.fixture
def small(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A table of two rows, the average of the first wrong by half a point."""
    (tmp_path / "published.yaml").write_text(SMALL, encoding="utf-8")
    monkeypatch.setattr(tables, "PUBLISHED", tmp_path / "published.yaml")
    monkeypatch.setattr(suites, "averages", lambda name: TWO)


def test_every_published_average_follows_from_its_row_or_is_flagged():
    flagged, rows, averages = [], 0, 0
    for name in tables.names():
        for row in tables.rows(name):
            rows += 1
            for title, printed in row.printed.items():
                if printed is None:
                    assert row.averages[title] is None
                    continue
                averages += 1
                recomputed = row.averages[title]
                if title in row.flags:
                    flagged.append((name, row.name, row.size, title))
                else:
                    assert recomputed == pytest.approx(printed, abs=0.0101)
    assert flagged == FLAGGED
    assert (rows, averages) == (10 + 12 + 8 + 4 * 8, 18 + 12 + 8 + 4 * 8)


def test_the_columns_are_the_suites_own():
    for name in tables.names():
        table = tables.table(name)
        assert table.columns == tuple(spec.title for spec in suites.suite(table.suite)), name
        assert table.averages.items() <= suites.averages(table.suite).items(), name
        assert all(len(row.values) == len(table.columns) for row in table.rows if row.averages["Average"]), name


@pytest.mark.parametrize("letter", "abc")
def test_rows_that_are_not_tuned_are_the_same_in_tables_4_and_5(letter: str):
    untuned = [row for row in tables.rows(f"5{letter}") if row.variant == "no"]
    twins = {row.size: row for row in tables.rows(f"4{letter}") if row.name == "OpenELM"}
    assert [row.size for row in untuned] == list(twins)
    for row in untuned:
        assert row.values == twins[row.size].values
        assert row.printed["Average"] == twins[row.size].printed["Average"]


@pytest.mark.parametrize(
    ("first", "second", "columns"),
    [
        ("4a", "4c", ["PIQA"]),
        ("5a", "5c", ["PIQA"]),
        ("4b", "4c", ["ARC-c", "HellaSwag", "MMLU", "TruthfulQA-mc2", "WinoGrande"]),
        ("5b", "5c", ["ARC-c", "HellaSwag", "MMLU", "TruthfulQA-mc2", "WinoGrande"]),
    ],
)
def test_columns_that_two_tables_share_have_the_same_numbers(first: str, second: str, columns: list[str]):
    others = {(row.name, row.size, row.variant): row.values for row in tables.rows(second)}
    pairs = [(row.values, others.get((row.name, row.size, row.variant))) for row in tables.rows(first)]
    shared = [(own, other) for own, other in pairs if other]
    assert len(shared) == 8
    for own, other in shared:
        assert [own[title] for title in columns] == [other[title.removesuffix("-mc2")] for title in columns]


def test_what_the_text_of_the_paper_says_of_its_tables():
    rows = {(name, row.name, row.size): row for name in ("4a", "4b", "4c") for row in tables.rows(name)}
    ahead = [rows[name, "OpenELM", 1.08e9].averages["Average"] - rows[name, "OLMo", 1.18e9].averages["Average"]
             for name in ("4a", "4b", "4c")]  # fmt: skip
    assert ahead == pytest.approx([1.28, 2.36, 1.72], abs=0.01)
    lora = next(row for row in tables.rows("6") if (row.variant, row.size) == ("LoRA", 0.27e9))
    assert list(lora.values.values()) == [24.57, 26.60, 62.14, 24.84, 50.05, 42.02, 49.88, 28.00]
    tuned = next(row for row in tables.rows("5c") if (row.variant, row.size) == ("yes", 0.27e9))
    assert (tuned.values["RACE"], tuned.printed["Average"]) == (33.78, 46.66)


def test_a_printed_average_that_does_not_follow_is_flagged_with_both_numbers(small: None):
    first, second = tables.rows("9")
    assert first.flags == {"Mean": (25.5, 25.0)}
    assert second.flags == {}
    assert second.averages == {"Mean": None, "Mean w/o B": 40.0}


MARKDOWN = r"""Two tasks (Table 9 of the paper)

| Model                        | Model size | Pre-training tokens |     A |     B |              Mean | Mean w/o B |
| ---------------------------- | ---------: | ------------------: | ----: | ----: | ----------------: | ---------: |
| Small                        |     0.27 B |               5.1 B | 20.00 | 30.00 | 25.50<sup>1</sup> |      20.00 |
| **my\_model\|a**<sup>2</sup> |     0.27 B |               2.4 B | 12.35 | 50.00 |             31.17 |      12.35 |
| Large                        |     1.08 B |               1.5 T | 40.00 |     - |                 - |      40.00 |
| **größer**                   |          - |                   - |     - |     - |                 - |          - |

<sup>1</sup> Small, 0.27 B: Mean: 25.50 is printed, 25.00 is the mean of the values.

<sup>2</sup> my\_model\|a: A on its first 200 examples.

Rows in bold are one's own; the others are the paper's.

B is a share; higher is not better.
"""
LATEX = r"""% Two tasks (Table 9 of the paper); needs \usepackage{booktabs}
\begin{tabular}{lrrrrrr}
\toprule
Model           & Model size & Pre-training tokens &                A &     B &                     Mean & Mean w/o B \\
\midrule
\textbf{5\%\_a} &     4.93 M &              65.5 M & 12.35 $\pm$ 1.23 & 50.00 &                    31.17 &      12.35 \\
Small           &     0.27 B &               5.1 B &            20.00 & 30.00 & 25.50\textsuperscript{1} &      20.00 \\
Large           &     1.08 B &               1.5 T &            40.00 &     - &                        - &      40.00 \\
\bottomrule
\end{tabular}
\par{\footnotesize \textsuperscript{1} Small, 0.27 B: Mean: 25.50 is printed, 25.00 is the mean of the values.\par}
\par{\footnotesize Rows in bold are one's own; the others are the paper's.\par}
\par{\footnotesize B is a share; higher is not better.\par}
"""


def test_markdown_has_own_rows_in_bold_by_size_and_says_what_must_be_known(small: None):
    mine = OwnRow("my_model|a", 271_527_168, 2.4e9, {"A": 12.345, "B": 50.0}, note="A on its first 200 examples")
    assert tables.render("9", [OwnRow("größer", None, None, {}), mine]) == MARKDOWN


def test_latex_has_the_same_rows_escaped_and_standard_errors_where_asked_for(small: None):
    mine = OwnRow("5%_a", 4_931_200, 65_536_000, {"A": 12.345, "B": 50.0}, errors={"A": 1.234})
    assert tables.render("9", [mine], "latex", errors=True) == LATEX
    assert r"$\pm$" not in tables.render("9", [mine], "latex")


@pytest.mark.parametrize(
    ("name", "markdown", "latex"),
    [
        ("{a}\\b^2~x", r"{a}\\b^2\~x", r"\{a\}\textbackslash{}b\textasciicircum{}2\textasciitilde{}x"),
        ("R&D <$1 #2>", r"R\&D \<$1 #2\>", r"R\&D \textless{}\$1 \#2\textgreater{}"),
        ("two\nlines `*`", r"two lines \`\*\`", "two lines `*`"),
    ],
)
def test_names_are_written_so_that_they_read_as_they_are(small: None, name: str, markdown: str, latex: str):
    mine = OwnRow(name, 1e6, None, {})
    assert f"| **{markdown}** " in tables.render("9", [mine])
    assert rf"\textbf{{{latex}}} &" in tables.render("9", [mine], "latex")


def test_own_averages_are_with_and_without_sciq_and_a_dash_where_a_task_is_missing():
    values = dict(zip(tables.table("4a").columns, (30.0, 40.0, 50.0, 60.0, 70.0, 80.0, 50.5), strict=True))
    without = {title: value for title, value in values.items() if title != "SciQ"}
    text = tables.render("4a", [OwnRow("whole", 5e6, None, values), OwnRow("part", 4e6, None, without)])
    cells = {line.split("|")[1].strip(): [cell.strip() for cell in line.split("|")[2:-1]] for line in text.split("\n")
             if line.startswith("|")}  # fmt: skip
    assert cells["**whole**"][-2:] == ["54.36", "50.08"]
    assert cells["**part**"][-5:] == ["70.00", "-", "50.50", "-", "50.08"]
    assert list(cells)[2:5] == ["**part**", "**whole**", "OpenELM"]  # the smallest first


def test_rows_of_one_size_stay_in_the_order_given():
    ours = [OwnRow(name, 1_079_891_456, None, {}) for name in ("b", "a", "c")]
    lines = tables.render("4b", ours).split("\n")
    names = [line.split("|")[1].strip() for line in lines if line.startswith("|")]
    assert names[-5:] == ["OpenELM", "**b**", "**a**", "**c**", "OpenELM"]


@pytest.mark.parametrize(("name", "head"), [("5a", "Instruction tuned?"), ("6", "PEFT")])
def test_tables_of_tuned_models_show_what_was_done_to_each(name: str, head: str):
    text = tables.render(name, [OwnRow("mine", 3.04e9, 1e9, {}, variant="DoRA, r 8")])
    assert [cell.strip() for cell in text.split("\n")[2].split("|")][3] == head
    last = [line for line in text.split("\n") if line.startswith("|")][-1]
    assert [cell.strip() for cell in last.split("|")][1:4] == ["**mine**", "3.04 B", "DoRA, r 8"]


def result(task: str, shots: int = 0, *, limit: int | None = None, **metrics: float) -> TaskResult:
    return TaskResult(task, shots, metrics, limit or 1000, "1", True, limit=limit)


def evaluation(*results: TaskResult, **model: object) -> Evaluation:
    return Evaluation(dict(model), {}, {entry.key: entry for entry in results})


def test_an_own_row_has_the_metric_and_shots_of_the_suite():
    found = evaluation(
        result("arc_challenge", acc=0.1, acc_norm=0.25, acc_norm_stderr=0.0125),
        result("arc_challenge", 25, acc=0.2, acc_norm=0.35, acc_norm_stderr=float("nan")),
        result("boolq", acc=0.5, acc_stderr=0.01),
        result("sciq", acc=float("nan")),
        origin="runs/demo/model/",
        parameters=4_931_200,
        tokens=2_457_600,
    )
    row = tables.own_row(found, "4a")
    assert (row.name, row.size, row.tokens, row.note) == ("model", 4_931_200, 2_457_600, "")
    assert row.values == {"ARC-c": 25.0, "BoolQ": 50.0}
    assert row.errors == {"ARC-c": 1.25, "BoolQ": 1.0}
    row = tables.own_row(found, "4c", label="Mine", tokens=5.0)
    assert (row.name, row.tokens, row.values, row.errors) == ("Mine", 5.0, {"ARC-c": 35.0}, {})


def test_a_task_measured_on_some_examples_is_shown_only_where_it_was_not_measured_whole():
    whole, some, more = (result("piqa", limit=limit, acc_norm=value) for limit, value in
                         ((None, 0.7), (100, 0.1), (200, 0.2)))  # fmt: skip
    row = tables.own_row(evaluation(some, whole), "4a")
    assert (row.values, row.note) == ({"PIQA": 70.0}, "")
    row = tables.own_row(evaluation(more, some), "4a")
    assert (row.values, row.note) == ({"PIQA": 20.0}, "PIQA on its first 200 examples")


def test_unknown_tables_and_forms_are_refused_by_name():
    with pytest.raises(UserError, match="table '7' is not one of accuracies in the paper: use one of 4a, 4b"):
        tables.rows("7")
    with pytest.raises(UserError, match="form 'html' is not one that tables are written in: use one of markdown"):
        tables.render("4a", [], "html")


def test_the_published_file_has_two_decimals_and_nothing_beside_the_rows():
    data = yaml.safe_load(tables.PUBLISHED.read_text(encoding="utf-8"))
    numbers = [n for table in data["tables"].values() for row in table["rows"] for n in row["values"] + row["printed"]]
    assert all(n is None or (0 < n < 100 and round(n, 2) == n) for n in numbers)
    titles = {title for table in data["tables"].values() for title in table["columns"]}
    assert data["notes"].keys() <= titles
