"""The report of an ablation: what its intervals support is said, nothing more, and whatever is missing is said too."""

import copy
import json
import math
import random
import re
import sys
from pathlib import Path
from typing import Any

import pytest

from openelm.errors import UserError
from openelm.report import plots
from openelm.study import ablation_figures as study
from openelm.study.ablation_figures import BETTER, ONE_SEED, SAME, T_95, WORSE, Interval, figures
from openelm.study.ablation_report import draw, table, write

TOKENS = 1_000_000
# By kind, the bits per byte of seeds 0, 1, 2: seeds differ more than kinds do.
SCORES = {
    "layer-wise": (2.180, 2.239, 2.311),
    "uniform": (2.190, 2.250, 2.320),
    "reversed": (2.210, 2.272, 2.341),
    "ffn": (2.181, 2.271, 2.311),
}


def run(seed: int, score: float | None, rows: str = "ab12") -> dict[str, Any]:
    if score is None:
        return {"seed": seed, "bits_per_byte": None, "failure": ""}
    curve = [[TOKENS * part / 4, score + gap] for part, gap in ((1, 1.0), (2, 0.4), (3, 0.1), (4, 0.0))]
    done = {"rows_sha256": f"{rows}{seed}{'0' * 40}", "rows_hashed": 1000, "tokens": TOKENS, "flops": 6e12}
    return {"seed": seed, "bits_per_byte": score, "curve": curve, "failure": "", "elapsed_s": 20.0, **done}


def kind(scores: tuple[float | None, ...], **changes: Any) -> dict[str, Any]:
    known = {
        "about": "as it is called", "data": {}, "parameters": 608_144, "parameters_off": 0.001,
        "flops_per_token": 5.1e6, "flops_off": -0.002, "cache_bytes_per_token": 1792,
        "num_query_heads": [3, 4], "num_kv_heads": [1, 1], "ffn_dims": [48, 96],
        "lr_factor": 2.0, "generation": {"tokens_per_s": 900.4, "least": 880.0, "most": 930.0},
    }  # fmt: skip
    return known | {"runs": [run(seed, score) for seed, score in enumerate(scores)]} | changes


def ablation(scores: Any = SCORES, **changes: Any) -> dict[str, Any]:
    size = {"tokens": TOKENS, "steps": 489, "global_batch": 8, "row_length": 256, "lr": 0.003}
    kinds = {name: kind(values) for name, values in scores.items()}
    known = {
        "name": "ablation", "command": "openelm ablate ablation --out runs/a", "reference": "uniform",
        "tokens_per_parameter": 4.0, "held_out": {"bytes": 180_000, "tokens": 60_000}, "sizes": {"0.6M": size},
        "tuning": None, "environment": {},
    }  # fmt: skip
    return known | {"sizes": {"0.6M": {**size, "kinds": kinds}}} | changes


def conclusion(results: dict[str, Any]) -> list[str]:
    return table(results).split("## Conclusion\n\n")[1].split("\n\n")[0].replace("- At", "At").split("\n")


def rows(text: str, heading: str) -> list[str]:
    """The cells of the first table behind a text, its head left out, joined by " | "."""
    lines = text[text.index(heading) :].split("\n")
    start = next(place for place, line in enumerate(lines) if line.startswith("|"))
    found = []
    for line in lines[start + 2 :]:
        if not line.startswith("|"):
            break
        found.append(" | ".join(cell.strip() for cell in line.strip("| ").split(" | ")))
    return found


# Figures


@pytest.mark.parametrize("freedom", [1, 2, 3, 5, 10, 30])
def test_critical_values_leave_out_five_percent_of_students_t(freedom: int) -> None:
    def density(t: float) -> float:
        factor = math.gamma((freedom + 1) / 2) / math.gamma(freedom / 2) / math.sqrt(freedom * math.pi)
        return factor * (1 + t * t / freedom) ** (-(freedom + 1) / 2)

    steps = 20_000
    width = T_95[freedom - 1] / steps
    inside = 2 * width * sum(density((step + 0.5) * width) for step in range(steps))
    assert inside == pytest.approx(0.95, abs=5e-5)
    assert len(T_95) == 30 and sorted(T_95, reverse=True) == list(T_95)


def test_interval_is_students_over_seeds() -> None:
    assert Interval.of([1.0, 2.0, 3.0]) == Interval(2.0, pytest.approx(4.303 / math.sqrt(3)), 3)  # type: ignore[arg-type]
    assert Interval.of([1.5]) == Interval(1.5, None, 1)
    assert Interval.of([]) is None
    many = Interval.of([0.0, 1.0] * 50)
    assert many and many.half == pytest.approx(2.042 * math.sqrt(25 / 99) / 10)


@pytest.mark.parametrize(
    ("values", "verdict"),
    [
        ([-0.01, -0.011, -0.012], BETTER),
        ([0.01, 0.011, 0.012], WORSE),
        ([-0.01, 0.03, -0.01], SAME),
        ([-0.01, -0.011 - 0.5], SAME),  # both below 0, and two seeds say next to nothing
        ([-0.5], ONE_SEED),
        ([0.0, 0.0, 0.0], SAME),
    ],
)
def test_verdict_is_the_intervals(values: list[float], verdict: str) -> None:
    found = Interval.of(values)
    assert found and found.verdict == verdict


def test_differences_are_taken_seed_by_seed() -> None:
    known = figures(ablation())["0.6M"]
    own, other = known["layer-wise"].bits_per_byte, known["uniform"].bits_per_byte
    # The seeds are so far apart that the kinds' own intervals overlap widely.
    assert own and other and own.half and other.half and own.mean + own.half > other.mean - other.half
    difference = known["layer-wise"].difference
    assert difference and (difference.mean, difference.count) == (pytest.approx(-0.010), 3)
    assert difference.half == pytest.approx(4.303 * 0.001 / math.sqrt(3))
    assert [known[name].difference.verdict for name in ("layer-wise", "reversed", "ffn")] == [BETTER, WORSE, SAME]  # type: ignore[union-attr]
    assert known["uniform"].difference is None and known["uniform"].reach is None


def test_only_seeds_that_both_have_are_compared() -> None:
    known = figures(ablation({"layer-wise": (2.0, 2.2, None), "uniform": (None, 2.3, 2.9)}))["0.6M"]["layer-wise"]
    assert known.bits_per_byte and known.bits_per_byte.count == 2
    assert known.difference == Interval(pytest.approx(-0.1), None, 1)  # type: ignore[arg-type]


def test_a_kind_on_other_data_is_compared_with_its_like() -> None:
    results = ablation()
    results["sizes"]["0.6M"]["kinds"]["layer-wise, all"] = kind((2.28, 2.339, 2.411), data={"a": 1}, like="layer-wise")
    known = figures(results)["0.6M"]["layer-wise, all"]
    assert known.against == "layer-wise" and known.reach is None
    assert known.difference and known.difference.mean == pytest.approx(0.1)
    assert conclusion(results)[-2].startswith("At 0.6M, layer-wise, all is worse than layer-wise by 0.1000 (")


def test_tokens_to_reach_are_between_two_validations_and_seed_by_seed() -> None:
    # Curves are score + 1.0, 0.4, 0.1, 0.0 at the quarters; 0.05 better is reached half-way through the last.
    known = figures(ablation({"better": (2.05, 2.17), "worse": (2.2, 2.19), "uniform": (2.1, 2.2)}))["0.6M"]
    assert known["better"].reach == study.Reach((pytest.approx(0.875), pytest.approx(0.925)), 0)  # type: ignore[arg-type]
    assert str(known["better"].reach) == "90.0% (87.5% to 92.5%)"
    assert str(known["worse"].reach) == "97.5%, not reached: 1 of 2"
    never = figures(ablation({"worse": (2.2, 2.3), "uniform": (2.1, 2.2)}))["0.6M"]["worse"]
    assert str(never.reach) == "not reached (2)"


def test_the_first_place_counts_where_a_curve_rises_again() -> None:
    assert study._first_at([(1, 3.0), (2, 1.0), (3, 2.0), (4, 1.4)], 1.5) == 1.75
    assert study._first_at([(1, 1.0), (2, 2.0)], 1.5) == 1
    assert study._first_at([(1, 3.0), (2, 1.5)], 1.5) == 2
    assert study._first_at([], 1.5) is None


def test_tokens_to_reach_wait_for_both_ends_and_pass_over_gaps_in_a_curve() -> None:
    results = ablation({"better": (2.05,), "uniform": (2.1,)})
    own, reference = (entry["runs"][0] for entry in results["sizes"]["0.6M"]["kinds"].values())
    own["curve"][1][1] = math.nan
    assert str(figures(results)["0.6M"]["better"].reach) == "87.5%"
    reference["bits_per_byte"] = None  # its last validation is not its last
    assert figures(results)["0.6M"]["better"].reach is None


# Markdown


def test_table_says_what_is_known_of_each_kind() -> None:
    text = table(ablation())
    model = "608,144 (+0.10%) | 5,100,000 (-0.20%) | 1,792 | 0.006"
    speed = "900 (880 to 930)"
    assert rows(text, "## 0.6M") == [
        f"layer-wise | {model} | 2.2433 ± 0.1630 (3) | -0.0100 (-0.0125 to -0.0075), better | "
        f"97.5% (97.2% to 97.8%) | {speed}",
        f"uniform | {model} | 2.2533 ± 0.1616 (3) | reference | reference | {speed}",
        f"reversed | {model} | 2.2743 ± 0.1628 (3) | +0.0210 (+0.0185 to +0.0235), worse | not reached (3) | {speed}",
        f"ffn | {model} | 2.2543 ± 0.1654 (3) | +0.0010 (-0.0420 to +0.0440), not told apart | "
        f"97.8% (97.8% to 97.8%), not reached: 1 of 3 | {speed}",
    ]
    assert rows(text, "Bits per byte of each run")[0] == "layer-wise | 2.18000 | 2.23900 | 2.31100"
    assert "1,000,000 tokens a run, 4 a parameter, 489 steps, 8 rows a step, 256 tokens a row." in text
    assert "Held-out text: 180,000 bytes, 60,000 tokens." in text
    assert "rather too large" in text  # of shares in mid-run


def test_columns_stand_under_each_other() -> None:
    tables = re.findall(r"(?:^\|.*\n)+", table(ablation(tuning=TUNING)), re.MULTILINE)
    assert len(tables) == 3
    for lines in tables:
        assert len({len(line) for line in lines.splitlines()}) == 1


def test_conclusion_says_no_more_than_the_intervals() -> None:
    assert conclusion(ablation()) == [
        "At 0.6M, layer-wise is better than uniform by 0.0100 (0.0075 to 0.0125) bits per byte (3 seeds).",
        "At 0.6M, reversed is worse than uniform by 0.0210 (0.0185 to 0.0235) bits per byte (3 seeds).",
        "At 0.6M, ffn is not told apart from uniform: the interval of the difference in bits per byte, -0.0420 to "
        "+0.0440, contains 0 (3 seeds).",
        "- These are 3 comparisons at 95 % each, not adjusted for their number: of twenty kinds that do not differ, "
        "one is expected to be called better or worse.",
    ]


def test_one_seed_has_no_interval_and_no_verdict() -> None:
    found = conclusion(ablation({"layer-wise": (2.18,), "uniform": (2.19,)}))
    assert found == [
        "At 0.6M, layer-wise differs from uniform by -0.0100 bits per byte with the one seed that both have, which "
        "says nothing of chance.",
        "- No comparison has an interval yet: that takes two seeds of both kinds.",
    ]
    assert (
        "2.1800 (1) | -0.0100, one seed"
        in rows(table(ablation({"layer-wise": (2.18,), "uniform": (2.19,)})), "## 0")[0]
    )


def test_rows_that_differ_are_an_error_in_bold_that_names_them() -> None:
    results = ablation()
    assert "by SHA-256 the first 1,000 rows of their recipes are the same, in the same order: seed 0 " in table(results)
    assert "seed 1 ab1210000000 (4 of 4 kinds; 1,000,000 targets)" in table(results)
    results["sizes"]["0.6M"]["kinds"]["ffn"]["runs"][1]["rows_sha256"] = "cd34" * 16
    text = table(results)
    assert (
        "**0.6M, seed 1: the kinds were not trained on the same rows: ab1210000000 (1,000,000 targets): layer-wise, "
        "uniform, reversed; cd34cd34cd34 (1,000,000 targets): ffn.**"
    ) in text
    assert "seed 1 ab12" not in text.replace("seed 1: ", "") and "seed 0 ab1200000000 (4 of 4 kinds; 1,000" in text


def test_other_data_may_have_other_rows() -> None:
    results = ablation()
    other = kind((2.2, 2.3, 2.4), data={"min_characters": 0})
    for one in other["runs"]:
        one["rows_sha256"] = "ef56" * 16
    results["sizes"]["0.6M"]["kinds"]["layer-wise, unfiltered"] = other
    text = table(results)
    assert "**" not in text
    assert "with data min_characters=0" in text and "curves are of other held-out text" in text


@pytest.mark.parametrize(
    ("name", "value", "told"),
    [
        ("parameters_off", -0.02, "**0.6M: parameters or FLOPs are further than 0.50% off: ffn by 2.00%.**"),
        ("flops_off", 0.0061, "**0.6M: parameters or FLOPs are further than 0.50% off: ffn by 0.61%.**"),
    ],
)
def test_twins_out_of_the_bound_are_told(name: str, value: float, told: str) -> None:
    results = ablation()
    results["sizes"]["0.6M"]["kinds"]["ffn"][name] = value
    assert told in table(results)
    assert "**" not in table({**results, "within": 0.03})


def test_runs_of_a_seed_that_read_something_else_are_told_and_seeds_may_differ() -> None:
    """Targets are counted: a few tokens at the seams of pieces are none, and their number depends on the seed."""
    results = ablation()
    kinds = results["sizes"]["0.6M"]["kinds"]
    for about in kinds.values():
        for run in about["runs"]:
            run["tokens"] = 1_000_000 + run["seed"]
            run["counted"] = {"documents": 70 + run["seed"]}
    assert "**" not in table(
        results
    ) and "seed 1 ab1210000000 (4 of 4 kinds; 1,000,001 targets, 71 documents)" in table(results)
    kinds["ffn"]["runs"][0]["tokens"] = 900_000
    kinds["ffn"]["runs"][1]["counted"] = {"documents": 70}
    text = table(results)
    assert "**0.6M, seed 0: the kinds were not trained on the same rows: " in text and "900,000 targets, 70 doc" in text
    assert "**0.6M, seed 1: the kinds were not trained on the same rows: " in text


def test_what_failed_and_what_is_not_done_is_said() -> None:
    results = ablation({"layer-wise": (2.1, None), "uniform": (2.2, 2.3), "ffn": (math.nan, None)})
    results["sizes"]["0.6M"]["kinds"]["layer-wise"]["runs"][1]["failure"] = "left with 1\nout of memory"
    text = table(results)
    assert "Failed: 0.6M, layer-wise, seed 1: out of memory" in text
    assert "Failed: 0.6M, ffn, seed 0: bits per byte are nan" in text
    assert "Not done (size, kind, seed): 0.6M ffn 1." in text
    assert rows(text, "Bits per byte of each run") == [
        "layer-wise | 2.10000 | failed", "uniform | 2.20000 | 2.30000", "ffn | failed | -",
    ]  # fmt: skip
    assert "At 0.6M, ffn cannot be compared with uniform yet: no seed of both is done." in text


def test_a_size_without_the_reference_says_so() -> None:
    text = table(ablation({"layer-wise": (2.1, 2.2)}))
    assert "0.6M has no uniform: nothing at this size can be compared with it." in text
    assert rows(text, "## 0.6M")[0].endswith("2.1500 ± 0.6353 (2) | - | - | 900 (880 to 930)")


TUNING = {
    "size": "0.6M", "seed": 100, "share": 0.5, "chosen": {"uniform": 1.0, "layer-wise": 2.0},
    "found": {"uniform": {"1": 2.2, "0.5": 2.3, "2": 2.25}, "layer-wise": {"0.5": 2.3, "1": None, "2": 2.1}, "ffn": {}},
}  # fmt: skip


def test_learning_rates_are_shown_and_a_choice_at_the_edge_is_told() -> None:
    text = table(ablation(tuning=TUNING))
    assert rows(text, "## Learning rates") == [
        "uniform | 2.3000 | **2.2000** | 2.2500", "layer-wise | 2.3000 | - | **2.1000**", "ffn | - | - | -",
    ]  # fmt: skip
    assert "at 0.6M with seed 100, on 50% of the tokens of a run" in text
    assert "a better one may lie beyond: layer-wise (2)." in text


def test_hardware_is_named_where_it_is_known() -> None:
    hardware = {"cpu": "a CPU", "cores": 2, "accelerators": [{"name": "a GPU"}]}
    text = table(ablation(environment={"hardware": hardware, "packages": {"torch": "2.13"}}))
    assert "\nOn a GPU, a CPU, 2 cores, torch 2.13.\n" in text
    assert "\nOn " not in table(ablation())


def test_whatever_is_missing_the_rest_is_told() -> None:
    kept = {"name", "reference", "sizes", "seed"}
    whole_or_not = {"generation", "held_out", "tuning"}
    whole = ablation(tuning=TUNING)
    whole["sizes"]["2.5M"] = copy.deepcopy(whole["sizes"]["0.6M"])
    chance = random.Random(0)

    def thinned(value: Any, share: float) -> Any:
        if isinstance(value, dict):
            return {
                key: inner if key in whole_or_not else thinned(inner, share)
                for key, inner in value.items()
                if key in kept or chance.random() > share
            }
        if isinstance(value, list) and value and isinstance(value[0], dict):
            return [thinned(inner, share) for inner in value if chance.random() > share]
        return None if not isinstance(value, str) and chance.random() < share else value

    for share in (0.02, 0.1, 0.3, 0.8, 1.0):
        for _ in range(30):
            results = thinned({**whole, "sizes": None}, 0.0) | {"sizes": thinned(whole["sizes"], share)}
            for key in {*whole} - kept:
                if chance.random() < share:
                    del results[key]
            text = table(_with_seeds(results))
            assert text.startswith("# ablation\n") and "## Conclusion" in text


def _with_seeds(results: dict[str, Any]) -> dict[str, Any]:
    """A run without its seed is none of an ablation's."""
    for entry in results["sizes"].values():
        for about in entry.get("kinds", {}).values():
            for place, one in enumerate(about.get("runs") or []):
                one["seed"] = place
    return results


def test_nothing_done_yet_is_a_table_too(tmp_path: Path) -> None:
    results = ablation(dict.fromkeys(SCORES, (None, None)))
    text = table(results)
    assert "Not done (size, kind, seed): 0.6M layer-wise 0, 0.6M layer-wise 1" in text
    pytest.importorskip("matplotlib")
    assert [file.name for file in draw(results, tmp_path)] == ["layers-0.6M.png"]
    assert draw(ablation(sizes={}), tmp_path) == []


# Files


def test_pictures_are_drawn_of_what_they_can_show(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("matplotlib")
    monkeypatch.setattr(plots, "DOTS_PER_INCH", 30)
    results = json.loads(json.dumps(ablation()))
    results["sizes"]["0.6M"]["kinds"]["layer-wise, all"] = kind((2.2, 2.3, 2.4), data={"min_characters": 0})
    curves: list[Any] = []
    monkeypatch.setattr(
        "openelm.study.ablation_report.draw_curves", lambda *arguments: curves.append(arguments) or b"drawn"
    )
    write(results, tmp_path, pictures=True)
    assert sorted(file.name for file in tmp_path.iterdir()) == [
        "curves-0.6M.png", "differences.png", "layers-0.6M.png", "table.md",
    ]  # fmt: skip
    assert (tmp_path / "table.md").read_text(encoding="utf-8") == table(results)
    _, bands, gaps, reference, flops, _ = curves[0]
    assert [band.label for band in bands] == list(SCORES)  # and not what was measured on other text
    assert [band.label for band in gaps] == ["layer-wise", "reversed", "ffn"]
    assert (reference, flops) == ("uniform", 5.1e6)
    assert bands[0].means[-1] == pytest.approx(sum(SCORES["layer-wise"]) / 3)
    assert (bands[0].least[-1], bands[0].most[-1]) == (2.18, 2.311)
    assert gaps[0].means == pytest.approx([-0.01] * 4)


def test_a_lone_seed_is_named_so_in_the_pictures(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("matplotlib")
    curves: list[Any] = []
    monkeypatch.setattr("openelm.study.ablation_report.draw_curves", lambda *given: curves.append(given) or b"drawn")
    draw(ablation({"layer-wise": (2.1,), "uniform": (2.2, 2.3)}), tmp_path)
    assert [band.label for band in curves[0][1]] == ["layer-wise (one seed)", "uniform"]


def test_the_table_needs_no_matplotlib_and_the_pictures_name_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    write(ablation(), tmp_path, pictures=False)
    with pytest.raises(UserError, match="matplotlib, which is not installed"):
        write(ablation(), tmp_path, pictures=True)
    assert [file.name for file in tmp_path.iterdir()] == ["table.md"]
