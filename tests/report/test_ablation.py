"""The pictures of an ablation, drawn from plain numbers: what they show, and that odd numbers draw too."""

from collections.abc import Iterator
from typing import Any

import pytest

from openelm.report import ablation, plots
from openelm.report.ablation import Band, Dot, Layers, colours, draw_curves, draw_differences, draw_layers
from openelm.report.plots import LIGHT

pytest.importorskip("matplotlib")
PNG = b"\x89PNG\r\n"


@pytest.fixture(autouse=True)
def figures(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Any]]:
    """The figures that were drawn, in few dots."""
    drawn: list[Any] = []
    monkeypatch.setattr(plots, "DOTS_PER_INCH", 30)

    def as_png(figure: Any, theme: plots.Theme) -> bytes:
        drawn.append(figure)
        return plots.as_png(figure, theme)

    monkeypatch.setattr(ablation, "as_png", as_png)
    yield drawn


def band(label: str, *means: float, tokens: tuple[float, ...] = (1e6, 2e6, 3e6, 4e6)) -> Band:
    return Band(label, LIGHT.accent, tokens, means, [value - 0.1 for value in means], [value + 0.1 for value in means])


def test_curves_are_shown_from_a_third_of_the_run_on_and_named_at_their_ends(figures: list[Any]) -> None:
    bands = [band("layer-wise", 9.0, 3.0, 2.5, 2.0), band("uniform", 9.0, 3.2, 2.6, 2.1)]
    assert draw_curves("Held-out", bands, [], "uniform", 6e6, LIGHT).startswith(PNG)
    (axes,) = figures[0].axes
    assert axes.get_xlim() == pytest.approx((4e6 / 3, 4.02e6))
    low, high = axes.get_ylim()
    assert low == pytest.approx(1.9 - 0.06 * 1.4)
    assert high == pytest.approx(3.3 + 0.06 * 1.4)  # the 9 of the beginning leaves the picture
    assert [text.get_text() for text in axes.texts] == ["layer-wise", "uniform"]
    (top,) = axes.child_axes
    assert top.get_xlim() == pytest.approx((8e12, 24.12e12))  # 6 MFLOPs a token


def test_differences_along_the_run_stand_below_the_curves_with_their_zero(figures: list[Any]) -> None:
    gaps = [band("layer-wise", -0.5, -0.4, -0.4, -0.3)]
    draw_curves("Held-out", [band("layer-wise", 3, 2.5, 2.1, 2)], gaps, "uniform", None, LIGHT)
    upper, lower = figures[0].axes
    assert not upper.child_axes
    assert lower.get_title("left") == "Difference to uniform, bits per byte; below 0 is better"
    assert lower.get_ylim()[1] > 0
    assert lower.get_xlim() == upper.get_xlim()


@pytest.mark.parametrize("tokens", [(0.0,), (5e6,)])
def test_a_lone_point_is_drawn_as_a_dot(figures: list[Any], tokens: tuple[float, ...]) -> None:
    draw_curves("Held-out", [band("uniform", 2.0, tokens=tokens)], [], "uniform", 6e6, LIGHT)
    assert figures[0].axes[0].lines[0].get_marker() == "o"


def test_names_are_pushed_apart_as_little_as_needed_and_never_below_the_picture() -> None:
    assert ablation._apart([0.2, 0.5, 0.9], 0.1) == [0.2, 0.5, 0.9]
    assert ablation._apart([0.50, 0.52], 0.1) == pytest.approx([0.46, 0.56])
    assert ablation._apart([0.0, 0.01, 0.15], 0.1) == pytest.approx([0.0, 0.1, 0.2])
    # The third is pushed into the fourth by the first two, and all four make room.
    assert ablation._apart([0.5, 0.5, 0.6, 0.65], 0.1) == pytest.approx([0.4125, 0.5125, 0.6125, 0.7125])
    assert ablation._apart([], 0.1) == []


def test_only_intervals_without_zero_are_coloured_and_lone_seeds_are_hollow(figures: list[Any]) -> None:
    dots = {
        "layer-wise": Dot(-0.02, 0.01, differs=True),
        "reversed": Dot(0.03, 0.01, differs=True),
        "ffn": Dot(-0.01, 0.02),
        "llama": Dot(0.01, None),
    }
    draw_differences({"0.6M": dots, "2.5M": {"layer-wise": Dot(-0.01, 0.02)}}, "uniform", LIGHT)
    first, second = figures[0].axes
    marks = [line for line in first.lines if line.get_marker() == "o"]
    assert [mark.get_color() for mark in marks] == [LIGHT.accent, LIGHT.second, LIGHT.muted, LIGHT.muted]
    assert [mark.get_markerfacecolor() == LIGHT.card for mark in marks] == [False, False, False, True]
    assert [list(mark.get_ydata()) for mark in marks] == [[0], [1], [2], [3]]
    assert [label.get_text() for label in first.get_yticklabels()] == list(dots)
    assert second.get_title("left") == "2.5M, against uniform"
    assert second.get_ylim() == first.get_ylim()


def test_one_interval_of_two_seeds_does_not_press_the_others_onto_the_line(figures: list[Any]) -> None:
    dots = {f"kind {number}": Dot(0.01, 0.02) for number in range(4)} | {"two seeds": Dot(0.01, 4.0)}
    draw_differences({"0.6M": dots}, "uniform", LIGHT)
    assert figures[0].axes[0].get_xlim() == pytest.approx((-1.12 * 0.07, 1.12 * 0.07))


def test_dots_that_are_all_zero_still_have_a_scale(figures: list[Any]) -> None:
    draw_differences({"0.6M": {"llama": Dot(0.0, None)}}, "uniform", LIGHT)
    assert figures[0].axes[0].get_xlim() == (-0.01, 0.01)


def test_layers_have_one_scale_and_the_references_outline(figures: list[Any]) -> None:
    uniform = Layers("uniform", (4, 4, 4), (1, 1, 1), (200, 200, 200))
    wide = Layers("layer-wise, no-qk-norm", (3, 4, 6), (1, 1, 2), (50, 200, 350))
    draw_layers("Layers", [wide, uniform], uniform, LIGHT)
    heads, widths, heads_below, widths_below = figures[0].axes
    assert [bar.get_height() for bar in heads.patches[:6]] == [3, 4, 6, 1, 1, 2]
    assert [bar.get_height() for bar in widths.patches[:3]] == [50, 200, 350]
    assert list(heads.patches[-1].get_data().values) == [4, 4, 4]
    assert heads.get_ylim() == heads_below.get_ylim() and widths.get_ylim() == widths_below.get_ylim()
    assert heads.get_title("left") == "layer-wise, no-qk-norm"


def test_layers_without_a_reference_have_no_outline(figures: list[Any]) -> None:
    draw_layers("Layers", [Layers("llama", (2, 2))], None, LIGHT)
    assert len(figures[0].axes[0].patches) == 2
    assert [text.get_text() for text in figures[0].legends[0].get_texts()] == [
        "query heads",
        "key/value heads; FFN width",
    ]


def test_the_reference_is_grey_and_the_others_differ() -> None:
    kinds = ["layer-wise", "uniform", "reversed"]
    found = colours(kinds, "uniform", LIGHT)
    assert found["uniform"] == LIGHT.muted
    assert len(set(found.values())) == 3
    assert colours(["a", "b"], "absent", LIGHT)["a"] != LIGHT.muted


def test_the_same_numbers_give_the_same_bytes() -> None:
    bands = [band("layer-wise", 3, 2.5, 2.1, 2)]
    assert draw_curves("t", bands, [], "uniform", 1e6, LIGHT) == draw_curves("t", bands, [], "uniform", 1e6, LIGHT)
