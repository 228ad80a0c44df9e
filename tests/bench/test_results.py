"""Results say what was measured; the paper's rows are the paper's; what changed is told from noise."""

import json
import re
from pathlib import Path
from typing import Any

import pytest

from openelm import cli
from openelm.bench.compare import HIGHER, LOWER, SAME, as_plain, compare, verdict
from openelm.bench.norms import FORMS, explanation
from openelm.bench.published import ROWS, rows_of
from openelm.bench.results import Result, Row, read_result, summary
from openelm.bench.tables import markdown, ratios, share_of_bandwidth, share_of_gemm
from openelm.errors import UserError

ENVIRONMENT: dict[str, Any] = {
    "python": "3.11",
    "platform": "Linux",
    "packages": {"torch": "2.9", "numpy": "2"},
    "hardware": {"cpu": "a CPU", "cores": 2, "memory_bytes": 2**34, "instruction_sets": ["AVX2"], "accelerators": []},
}


def row(name: str, speeds: list[float], **about: Any) -> Row:
    known = {"ours": True, "model": "m", "bits": 16, "prompt_tokens": 35, "tokens": 1024, "batch": 1, **about}
    metrics = {"prompt_tokens_per_s": speeds, "generation_tokens_per_s": speeds, "total_tokens_per_s": speeds}
    return Row(name, "35+1024", known, metrics)


def result(*rows: Row, kind: str = "generate", **changes: Any) -> Result:
    roof = {"bytes_per_s": [4e9, 5e9], "flops_per_s": [2e11], "bandwidth_by": "reading", "gemm_by": "a product"}
    words = {"settings": {"threads": 2}, "roof": roof, "environment": ENVIRONMENT, **changes}
    return Result(kind, f"openelm bench {kind}", rows=list(rows), **words)


def test_median_range_and_spread_are_those_of_the_repetitions() -> None:
    found = summary([10.0, 14.0, 11.0, 13.0, 12.0])
    assert (found.median, found.least, found.most, found.count) == (12, 10, 14, 5)
    assert found.quarters == (11, 13) and found.spread == pytest.approx(4 / 12)
    assert summary([3.0]).spread == 0


def test_the_papers_totals_follow_from_its_rates_but_for_one() -> None:
    """A digit copied wrongly would show, as prompt, generation and total hang together."""
    assert [(row.table, row.model, row.parameters) for row in ROWS if not row.consistent] == [("7a", "MobiLlama", 0.50)]
    assert [len(rows_of(table)) for table in ("7a", "7b", "8")] == [10, 8, 5]


def test_the_papers_rows_are_as_they_are_printed(shared: Path) -> None:
    text = (shared / "paper" / "openelm-paper.txt").read_text(encoding="utf-8")
    for row in ROWS:
        assert re.search(rf"{row.prompt:.2f}\s+{row.generation:.2f}\s+{row.total:.2f}", text), row


def test_a_result_comes_back_from_its_file_as_it_was(tmp_path: Path) -> None:
    before = result(row("a", [10, 11, 12]), Row("b", problem="it broke"))
    (tmp_path / "result.json").write_text(json.dumps(before.as_json()))
    again = read_result(tmp_path)
    assert again == before and read_result(tmp_path / "result.json") == before
    plain = before.as_json()["rows"][0]
    assert plain["summary"]["total_tokens_per_s"]["median"] == 11 and plain["busy"] is True


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (None, "cannot be read"),
        ("{", "is not JSON"),
        ("[]", "is no result of openelm bench"),
        ('{"format": 1}', "is no result of openelm bench"),
        ('{"format": 9, "rows": []}', "is of format 9"),
        ('{"format": 1, "rows": [{"name": "a"}]}', "is no result of openelm bench"),
    ],
)
def test_what_is_no_result_is_refused(tmp_path: Path, content: str | None, said: str) -> None:
    file = tmp_path / "result.json"
    if content is not None:
        file.write_text(content)
    with pytest.raises(UserError, match=said):
        read_result(file)


def test_shares_are_of_the_better_roof_beside_each_turn() -> None:
    one = row("a", [10.0], bytes_per_token=100_000_000, cache_bytes_per_token=1000, prompt_flops_per_token=1e9)
    # 10 tokens a second, each reading the weights and 35 + 512 tokens of keys and values, of 5 GB/s.
    assert share_of_bandwidth(result(one), one) == pytest.approx(10 * (1e8 + 547 * 1000) / 5e9)
    assert share_of_gemm(result(one), one) == pytest.approx(10 * 1e9 / 2e11)
    several = row("a", [80.0], bytes_per_token=100_000_000, cache_bytes_per_token=1000, batch=8)
    assert share_of_bandwidth(result(several), several) == pytest.approx(10 * (1e8 + 8 * 547 * 1000) / 5e9)
    assert share_of_bandwidth(result(one, roof={}), one) is None
    # A machine that halves its speed between the turns: each is held against its own neighbours.
    drifting = row("a", [10.0, 10.0, 5.0, 5.0], bytes_per_token=100_000_000)
    found = share_of_bandwidth(result(drifting, roof={"bytes_per_s": [2e9, 2e9, 2e9, 1e9, 1e9]}), drifting)
    assert found == pytest.approx(0.5)


def test_ratios_compare_our_fastest_of_equal_bits_round_by_round() -> None:
    slow, fast = row("ours bf16", [10, 10, 10]), row("ours other", [20, 30, 40])
    four = row("ours 4bit", [100, 100, 100], bits=4)
    other = row("peer", [10, 10, 20], ours=False)
    found = ratios(result(slow, fast, four, other), other)
    assert found is not None and (found.median, found.least, found.most) == (2, 2, 3)
    assert ratios(result(slow, other), slow) is None, "ours is not compared with itself"
    assert ratios(result(four, other), other) is None, "other bits are other work"


def test_the_table_has_the_papers_rows_beside_ours_in_its_own_protocol_only() -> None:
    text = markdown(result(row("270M bf16", [100.0, 101.0, 102.0], parameters=271_527_168)))
    assert re.search(r"\| 270M bf16 +\| +0.27 B \| +35\+1024 \| 101 \(100 to 102\) \|", text)
    assert "OpenELM bf16 (paper)" in text and "146.9 [!]" in text and "140.8" in text
    assert "4.0, 5.0; reading" in text and "`openelm bench generate`" in text and "a CPU" in text
    longer = row("270M bf16", [100.0], prompt_tokens=64)
    assert "(paper)" not in markdown(result(longer))
    mac = markdown(result(row("a", [1.0]), environment={**ENVIRONMENT, "platform": "macOS-15"}))
    assert "M2 Max" in mac and "RTX 4090" not in mac
    eight = markdown(result(row("a", [1.0], invocations=113, norm_share=0.25), kind="norms"))
    assert "RMSNorm-Apex (paper)" in eight and re.search(r"\| +113 \| +25.0% \|", eight)


def test_a_busy_machine_and_a_broken_row_are_said() -> None:
    text = markdown(result(row("quiet", [100, 101]), row("wide", [100, 120]), Row("broken", problem="it ended")))
    assert "busy machine: the repetitions of wide 35+1024 lie more than 10%" in text
    assert "broken: it ended" in text


def test_a_change_is_one_beyond_the_noise() -> None:
    def judged(before: list[float], after: list[float]) -> str:
        return verdict(summary(before), summary(after))

    assert judged([100, 102, 104], [105, 106, 107]) == HIGHER
    assert judged([100, 102, 104], [97, 98, 99]) == LOWER
    assert judged([100, 102, 104], [103, 110, 111]) == SAME
    assert "unknown" in judged([100], [200])


def test_compare_says_what_changed_what_is_missing_and_what_else_differs() -> None:
    before = result(row("a", [100, 101]), row("gone", [1, 2]), row("broke", [5, 5]))
    other = {**ENVIRONMENT, "packages": {"torch": "2.10", "numpy": "2"}}
    broken = Row("broke", "35+1024", problem="it ended")
    after = result(row("a", [200, 202]), row("new", [1, 2]), broken, environment=other, settings={"threads": 1})
    text = "\n".join(compare(before, after))
    assert re.search(
        r"a 35\+1024 +\| +generation tokens per s \| +100.5 \(100 to 101\) \| +201.* 2.000 \| +faster", text
    )
    assert "Only before: gone 35+1024" in text and "Only after: new 35+1024" in text
    assert "failed after: it ended" in text
    assert "torch differs: 2.9, then 2.10." in text and "threads differs: 2, then 1." in text
    assert "Roof: 5.0 GB/s read, then 5.0 (1.000)." in text
    assert [(entry["name"], entry["ratio"], entry["change"]) for entry in as_plain(before, after)] == [
        ("a", 2.0, "faster")
    ] * 3
    slower = result(row("a", [50, 51]), roof={"bytes_per_s": [2e9]})
    assert "then 2.0 (0.400). The machine itself has changed" in "\n".join(compare(before, slower))
    with pytest.raises(UserError, match="no row is in both"):
        compare(before, result(row("other", [1, 2])))
    with pytest.raises(UserError, match="bench generate, the other of bench peers"):
        compare(before, result(row("a", [1, 2]), kind="peers"))


def test_compare_reads_two_folders(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name, speeds in (("A", [100.0, 101.0]), ("B", [150.0, 151.0])):
        (tmp_path / name).mkdir()
        (tmp_path / name / "result.json").write_text(json.dumps(result(row("a", speeds)).as_json()))
    assert cli.run(["bench", "compare", str(tmp_path / "A"), str(tmp_path / "B"), "--json"]) == 0
    assert {entry["change"] for entry in json.loads(capsys.readouterr().out)} == {"faster"}
    assert cli.run(["bench", "compare", str(tmp_path / "A"), str(tmp_path / "none")]) == 2
    assert "none cannot be read" in capsys.readouterr().err


def test_the_explanation_of_norms_is_made_of_the_figures() -> None:
    rows = [
        row(f"m {FORMS['naive']}", [100.0], invocations=113, norm_share=0.4),
        row(f"m {FORMS['fused']}", [125.0], invocations=113, norm_share=0.2),
        row(f"m {FORMS['compiled']}", [200.0], invocations=113, norm_share=0.03),
    ]
    first, second = explanation(rows)
    # 4 of 10 ms in 113 norms: 35 microseconds each; 5 ms are saved, of which norms at no cost would be 4.
    assert "113 norms" in first and "4.00 of its 10.00 ms (40%, 35 microseconds each)" in first
    assert "F.rms_norm 20%" in first and "compiled 3%" in first
    assert "compiled is the fastest with 5.00 ms a token, 2.00 times" in second and "explain 80% of" in second
    slower = [rows[0], row(f"m {FORMS['fused']}", [50.0], norm_share=0.2)]
    assert "No other form is faster" in explanation(slower)[1]
    assert explanation(rows[1:]) == [] and explanation([]) == []


def test_a_profile_is_shown_by_operation_or_why_there_is_none() -> None:
    torch_row = row("on torch", [10.0], profile={"aten::mm": 0.75, "aten::add": 0.1})
    text = markdown(result(torch_row, row("native", [20.0], profile={"why": "it is one call"})))
    assert re.search(r"Time by operation, on torch:\n\n\| Operation .*\n.*\n\| aten::mm +\| +75.0% \|", text)
    assert "Time by operation, native: it is one call." in text


def test_what_is_rounded_at_load_has_the_bits_that_are_read() -> None:
    weights = {"weights": "8row", "bits_per_weight": 16.0, "parameters": 1000, "bytes_per_token": 1010}
    assert re.search(r"\| +8.08 \|", markdown(result(row("8row", [1.0], **weights))))
