"""Tables in Markdown that a terminal shows well too."""

from openelm.report.markdown import aligned


def test_figures_stand_at_the_right_and_names_at_the_left() -> None:
    assert aligned(["Kind", "Bits"], [["layer-wise", "2.1"], ["ffn", "12.25"]]) == [
        "| Kind       |  Bits |",
        "| ---------- | ----: |",
        "| layer-wise |   2.1 |",
        "| ffn        | 12.25 |",
    ]


def test_narrow_columns_and_empty_heads_still_make_a_table() -> None:
    assert aligned(["", "a"], [["1", "b"]], left=0) == ["|    |  a |", "| -: | -: |", "|  1 |  b |"]
    assert aligned(["a"], []) == ["| a  |", "| -- |"]
