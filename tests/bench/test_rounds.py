"""Entries take turns in processes of their own; what is reported is what was done, and one that breaks breaks alone."""

import json
from pathlib import Path
from statistics import median
from typing import Any

import pytest

from bench.fakes import plan, sleeper
from openelm.bench.results import Row
from openelm.bench.rounds import Case, measure


def logged(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "log").read_text().splitlines()]


def silent(_: str) -> None:
    pass


def test_what_is_reported_is_what_a_stopwatch_beside_the_work_shows(tmp_path: Path) -> None:
    case = Case(prompt_tokens=30, tokens=21)
    (row,), _ = measure([sleeper(tmp_path, "a", prompt_s=0.1, token_s=0.01)], plan(case), None, silent)
    counted = logged(tmp_path)[2:]  # the first token and the dry run come before, and are slower
    assert row.metrics["prompt_s"] == pytest.approx([one["prompt_s"] for one in counted], rel=0.05)
    assert row.metrics["generation_s"] == pytest.approx([one["rest_s"] for one in counted], rel=0.05)
    prompt_s, rest_s = row.metrics["prompt_s"], row.metrics["generation_s"]
    assert row.metrics["prompt_tokens_per_s"] == [30 / s for s in prompt_s]
    assert row.metrics["generation_tokens_per_s"] == [20 / s for s in rest_s]
    assert row.metrics["total_tokens_per_s"] == [51 / (p + r) for p, r in zip(prompt_s, rest_s, strict=True)]
    assert row.about["tokens_made"] == 21
    assert median(row.metrics["prompt_s"]) < 0.25  # and not the half second that the dry run took


def test_a_dry_run_is_the_whole_work_unless_it_is_to_be_quick(tmp_path: Path) -> None:
    for quick, expected in ((False, 40), (True, 16)):
        folder = tmp_path / str(quick)
        folder.mkdir()
        measure([sleeper(folder, "a")], plan(Case(5, 40), repeats=1, quick=quick), None, silent)
        assert [one["tokens"] for one in logged(folder)] == [1, expected, 40]


def test_a_batch_counts_all_its_texts(tmp_path: Path) -> None:
    (row,), _ = measure([sleeper(tmp_path, "a")], plan(Case(6, 5, batch=3), repeats=1), None, silent)
    assert logged(tmp_path)[-1]["prompts"] == [6, 6, 6]
    assert row.about["tokens_made"] == 15
    assert row.metrics["prompt_tokens_per_s"][0] == pytest.approx(18 / row.metrics["prompt_s"][0])
    assert row.metrics["generation_tokens_per_s"][0] == pytest.approx(12 / row.metrics["generation_s"][0])


def test_a_prompt_alone_has_no_speed_of_generation(tmp_path: Path) -> None:
    (row,), _ = measure([sleeper(tmp_path, "a")], plan(Case(6, 1), repeats=1), None, silent)
    assert "generation_tokens_per_s" not in row.metrics and len(row.metrics["prompt_tokens_per_s"]) == 1


def test_entries_alternate_in_the_order_that_is_asked_for(tmp_path: Path) -> None:
    found = {}
    for order in ("given", "reverse", "shuffle"):
        folder = tmp_path / order
        folder.mkdir()
        entries = [sleeper(folder, name) for name in "abc"]
        rows, _ = measure(entries, plan(repeats=4, order=order, seed=1), None, silent)
        assert [row.name for row in rows] == ["a", "b", "c"], "rows stand as they were asked for, whatever their turns"
        found[order] = "".join(one["name"] for one in logged(folder)[6:])  # two runs each go before
    assert found["given"] == "abc" * 4 and found["reverse"] == "cba" * 4
    rounds = [found["shuffle"][at : at + 3] for at in range(0, 12, 3)]
    assert all(sorted(one) == ["a", "b", "c"] for one in rounds) and len(set(rounds)) > 1


def test_each_entry_keeps_one_process_or_has_one_a_round(tmp_path: Path) -> None:
    for alone, processes in ((False, 1), (True, 3)):
        folder = tmp_path / str(alone)
        folder.mkdir()
        rows, _ = measure([sleeper(folder, "a"), sleeper(folder, "b")], plan(one_at_a_time=alone), None, silent)
        assert len({one["pid"] for one in logged(folder) if one["name"] == "a"}) == processes
        assert all(len(row.metrics["prompt_s"]) == 3 and len(row.metrics["load_s"]) == processes for row in rows)


@pytest.mark.parametrize(
    ("trouble", "when", "said", "rounds"),
    [
        ("raise", "load", "ValueError: it will not", 0),
        ("missing", "load", "not installed (a_library_that_nobody_has): pip install the-library", 0),
        ("exit", "load", "the process ended with code 3: its last words", 0),
        ("raise", "third round", "ValueError: it will not", 1),
        ("killed", "third round", "the process was ended by SIGKILL (the system may have run out of memory)", 1),
        ("", "short", "1 tokens of 1 prompts were asked for, and [0] made", 0),
    ],
)
def test_an_entry_that_breaks_is_named_and_the_others_go_on(
    tmp_path: Path, trouble: str, when: str, said: str, rounds: int
) -> None:
    lines: list[str] = []
    entries = [
        sleeper(tmp_path, "good"),
        sleeper(tmp_path, "bad", trouble=trouble, when=when),
        sleeper(tmp_path, "last"),
    ]
    good, bad, last = measure(entries, plan(), None, lines.append)[0]
    assert said in bad.problem
    assert any(line.startswith("bad: ") and said in line for line in lines)
    assert len(bad.metrics.get("prompt_s", [])) == rounds
    assert all(not row.problem and len(row.metrics["prompt_s"]) == 3 for row in (good, last))


def test_an_entry_that_hangs_is_stopped(tmp_path: Path) -> None:
    entries = [sleeper(tmp_path, "bad", trouble="hang", when="load"), sleeper(tmp_path, "good")]
    bad, good = measure(entries, plan(limit_s=5.0), None, silent)[0]
    assert bad.problem == "no answer in 5 s: it was stopped" and not good.problem


def test_a_python_that_is_none_is_named(tmp_path: Path) -> None:
    entry = sleeper(tmp_path, "a")
    (row,), _ = measure([type(entry)(**{**vars(entry), "python": str(tmp_path / "none")})], plan(), None, silent)
    assert str(tmp_path / "none") in row.problem and "cannot be started" in row.problem


def test_a_spread_row_is_busy_and_a_quiet_one_is_not() -> None:
    assert Row("a", metrics={"tokens_per_s": [100, 103, 106]}).busy is False
    assert Row("a", metrics={"tokens_per_s": [100, 103, 112]}).busy is True
    assert Row("a", metrics={"load_s": [1, 2, 3]}).busy is False, "what is no rate is not quoted"
