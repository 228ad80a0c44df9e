"""A result in words: the paper's table with the paper's own rows beside it, what stands around it, a bar chart."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from openelm.bench.published import HARDWARE, PROMPT_TOKENS, TOKENS, Published, rows_of
from openelm.bench.results import Result, Row, Summary, busy_note, summary
from openelm.report.markdown import aligned

NOTHING = "-"
PROMPT, GENERATION, TOTAL = "prompt_tokens_per_s", "generation_tokens_per_s", "total_tokens_per_s"
THROUGHPUT = ("generate", "peers", "norms")
Column = Callable[[Result, Row], str]
# What is drawn of each kind of result, the first that a row has.
DRAWN = (GENERATION, PROMPT, "tokens_per_s", "pipeline_bytes_per_s")


def markdown(result: Result) -> str:
    """Heading, table, notes."""
    lines = [f"# openelm bench {result.kind}", "", *header(result), ""]
    if result.kind in THROUGHPUT:
        lines += throughput_tables(result)
        lines += [line for row in result.rows if "profile" in row.about for line in profile_lines(row)]
    else:
        lines += plain_table(result)
    lines += [f"\n{note}" for note in [*notes(result), *paper_notes(result), *result.notes]]
    return "\n".join(lines) + "\n"


def profile_lines(row: Row) -> list[str]:
    """Where a row's time goes."""
    found = row.about["profile"]
    title = f"\nTime by operation, {row.name}:"
    if "why" in found:
        return [f"{title} {found['why']}."]
    return [f"{title}\n", *aligned(["Operation", "Share"], [[name, f"{share:.1%}"] for name, share in found.items()])]


def header(result: Result) -> list[str]:
    """Hardware, software, roof."""
    hardware = result.environment["hardware"]
    accelerators = ", ".join(entry.get("name") or "" for entry in hardware["accelerators"] or [])
    memory = hardware["memory_bytes"]
    here = [hardware["cpu"] or "unknown CPU", f"{hardware['cores']} cores"]
    here += [f"{memory / 2**30:.0f} GiB"] if memory else []
    here += [accelerators] if accelerators else []
    packages = result.environment["packages"]
    lines = [
        f"- {', '.join(here)}; {', '.join(hardware['instruction_sets'] or [])}",
        f"- Python {result.environment['python']}, torch {packages.get('torch')}, {result.finished}",
        f"- `{result.command}`",
    ]
    bandwidth, gemm = result.best_roof("bytes_per_s"), result.best_roof("flops_per_s")
    if bandwidth:
        rates = [f"{value / 1e9:.1f}" for value in result.roof["bytes_per_s"]]
        lines.append(
            f"- roof, measured between the rounds: {bandwidth / 1e9:.1f} GB/s read (all: {', '.join(rates)}; "
            f"{result.roof.get('bandwidth_by')})"
        )
    if gemm:
        rates = [f"{value / 1e9:,.0f}" for value in result.roof["flops_per_s"]]
        lines.append(f"- {gemm / 1e9:,.0f} GFLOP/s (all: {', '.join(rates)}; {result.roof.get('gemm_by')})")
    return lines


def notes(result: Result) -> list[str]:
    """What is to be known to read the figures."""
    found = []
    counts = {len(values) for row in result.rows for name, values in row.metrics.items() if name.endswith("_per_s")}
    if counts:
        found.append(
            f"Repetitions, in alternation: {' or '.join(map(str, sorted(counts)))}. A rate is their median, with the "
            "least and the most; the spread is (most - least) / median, of the rate where it is widest."
        )
    if busy := busy_note(result.rows):
        found.append(f"**{busy}**")
    found += [f"{f'{row.name} {row.case}'.strip()}: {row.problem}" for row in result.rows if row.problem]
    return found


def throughput_tables(result: Result) -> list[str]:
    """The paper's columns, with its own rows last; then what users choose by, and shares of the roof."""
    paper = paper_rows(result)
    speeds = _table(SPEEDS, result, result.rows, [[form(row) for form in PAPER.values()] for row in paper])
    measured = [row for row in result.rows if row.speeds()]
    return speeds + (["", *_table(COSTS, result, measured, [])] if measured else [])


def _table(
    columns: dict[str, Column], result: Result, rows: Sequence[Row], paper: Sequence[Sequence[str]]
) -> list[str]:
    """Without the columns that nothing stands in; ``paper``'s cells belong to the first ones of PAPER."""
    own = {name: [cell(result, row) for row in rows] for name, cell in columns.items()}
    theirs = dict(zip(PAPER, zip(*paper, strict=True), strict=True)) if paper else {}
    blank = [NOTHING] * len(paper)
    kept = {
        name: [cell or NOTHING for cell in cells] + list(theirs.get(name, blank))
        for name, cells in own.items()
        if name in PAPER_LAYOUT or any(cells)
    }
    return aligned(list(kept), list(zip(*kept.values(), strict=True)))


def paper_rows(result: Result) -> list[Published]:
    """Table 8 beside norms, 7b on macOS, else 7a; none where something else than its protocol was measured."""
    if any(row.about.get("prompt_tokens") != PROMPT_TOKENS or row.about.get("batch") != 1 for row in result.rows):
        return []
    if result.kind == "norms":
        return rows_of("8")
    return rows_of("7b" if result.environment["platform"].startswith("macOS") else "7a")


def rate(found: Summary | None) -> str:
    """Median and range."""
    if found is None:
        return ""
    if found.count == 1:
        return number(found.median)
    return f"{number(found.median)} ({number(found.least)} to {number(found.most)})"


def number(value: float) -> str:
    """Four figures at most."""
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"


def share_of_bandwidth(result: Result, row: Row) -> float | None:
    """Bytes that decoding reads in a second, keys and values at the middle of the text too, over the bandwidth."""
    per_token = row.about.get("bytes_per_token")
    if not per_token:
        return None
    batch = row.about["batch"]
    held = row.about["prompt_tokens"] + row.about["tokens"] / 2
    per_step = per_token + batch * held * row.about.get("cache_bytes_per_token", 0)
    return _share(row.metrics.get(GENERATION), per_step / batch, result.roof.get("bytes_per_s"))


def share_of_gemm(result: Result, row: Row) -> float | None:
    """The prompt's products of matrices in a second, over the best product's rate."""
    per_token = row.about.get("prompt_flops_per_token")
    return _share(row.metrics.get(PROMPT), per_token, result.roof.get("flops_per_s")) if per_token else None


def _share(rates: list[float] | None, per_token: float, roof: list[float] | None) -> float | None:
    """Median over the repetitions, each beside the better of the roofs before and after: a machine's speed drifts."""
    if not rates or not roof:
        return None
    return summary([rate * per_token / max(roof[turn : turn + 2] or roof) for turn, rate in enumerate(rates)]).median


def percent(value: float | None) -> str:
    return "" if value is None else f"{value:.0%}"


def _about(key: str, form: Callable[[Any], str]) -> Column:
    def cell(result: Result, row: Row) -> str:
        value = row.about.get(key)
        return "" if value is None else form(value)

    return cell


def _megabytes(value: float) -> str:
    return f"{value / 1e6:,.0f} MB"


def _bits(row: Row) -> str:
    """Of the file; where weights are rounded as they are loaded, of what is read."""
    about = row.about
    if (about.get("weights") == "8row" or about.get("peer") == "openvino") and "bytes_per_token" in about:
        return f"{8 * about['bytes_per_token'] / about['parameters']:.2f}"
    return f"{about['bits_per_weight']:.2f}" if "bits_per_weight" in about else ""


def _spread(result: Result, row: Row) -> str:
    speeds = row.speeds()
    return percent(max(found.spread for found in speeds.values())) + (" !" if row.busy else "") if speeds else ""


def _norms(row: Row) -> str:
    """Share of decoding's time; of the native decoder, all that is not reading at the best bandwidth."""
    about = row.about
    if "norm_share_at_most" in about:
        return f"at most {about['norm_share_at_most']:.1%}"
    device = f" ({about['norm_share_of_device']:.1%} of the device's)" if "norm_share_of_device" in about else ""
    return f"{about['norm_share']:.1%}{device}" if "norm_share" in about else ""


def _ratio(result: Result, row: Row) -> str:
    """Ours over this, round by round, with the same bits; the fastest of ours where there are several."""
    found = ratios(result, row)
    if found is None:
        return ""
    return f"{found.median:.2f} ({found.least:.2f} to {found.most:.2f})"


def ratios(result: Result, row: Row) -> Summary | None:
    """Generation speed of our fastest row of these bits and this case over this row's, round by round."""
    theirs = row.metrics.get(GENERATION) or row.metrics.get(PROMPT)
    metric = GENERATION if row.metrics.get(GENERATION) else PROMPT
    if row.about.get("ours") or not theirs:
        return None
    own = [
        other
        for other in result.rows
        if other.about.get("ours") and other.case == row.case and other.metrics.get(metric)
        and same_work(other.about, row.about)
    ]  # fmt: skip
    if not own:
        return None
    best = max(own, key=lambda other: summary(other.metrics[metric]).median)
    return summary([a / b for a, b in zip(best.metrics[metric], theirs, strict=False)])


def same_work(ours: dict[str, Any], theirs: dict[str, Any]) -> bool:
    """The same model, in about the same bits."""
    return ours.get("model") == theirs.get("model") and ours.get("bits") == theirs.get("bits")


SPEEDS: dict[str, Column] = {
    "Model": lambda _, row: row.name,
    "Model size": _about("parameters", lambda value: f"{value / 1e9:.2f} B"),
    "Tokens": lambda _, row: row.case,
    "Prompt": lambda _, row: rate(row.summary(PROMPT)),
    "Generation": lambda _, row: rate(row.summary(GENERATION)),
    "Total": lambda _, row: rate(row.summary(TOTAL)),
    "Norms a token": _about("invocations", str),
    "Time in norms": lambda _, row: _norms(row),
    "Spread": _spread,
    "Ours over it": _ratio,
}
PAPER_LAYOUT = ("Model", "Model size", "Tokens", "Prompt", "Generation", "Total")
COSTS: dict[str, Column] = {
    "Model": lambda _, row: row.name,
    "Tokens": lambda _, row: row.case,
    "Engine": _about("engine", str),
    "Threads": _about("threads", str),
    "Bits a weight": lambda _, row: _bits(row),
    "File": _about("file_bytes", _megabytes),
    "Peak memory": _about("peak_memory_bytes", _megabytes),
    "First token": lambda _, row: f"{found.median:.2f} s" if (found := row.summary("first_token_s")) else "",
    "Read a token": _about("bytes_per_token", _megabytes),
    "Of read bandwidth": lambda result, row: percent(share_of_bandwidth(result, row)),
    "Prompt, of GEMM rate": lambda result, row: percent(share_of_gemm(result, row)),
}
PAPER: dict[str, Callable[[Published], str]] = {
    "Model": lambda row: f"{row.model} {row.norm or row.weights} (paper)",
    "Model size": lambda row: f"{row.parameters:.2f} B",
    "Tokens": lambda _: f"{PROMPT_TOKENS}+{TOKENS}",
    "Prompt": lambda row: number(row.prompt),
    "Generation": lambda row: number(row.generation),
    "Total": lambda row: number(row.total) + ("" if row.consistent else " [!]"),
    "Norms a token": lambda row: str(row.invocations) if row.invocations else NOTHING,
}


def paper_notes(result: Result) -> list[str]:
    """Where the paper's rows were measured, and which of them do not add up."""
    rows = paper_rows(result)
    if not rows:
        return []
    table = rows[0].table
    found = [
        f"The paper's rows are those of its Table {table}: {HARDWARE[table]}, {PROMPT_TOKENS} tokens and {TOKENS:,}."
    ]
    found += [
        f"[!] {row.model}, {row.parameters} B: prompt and generation as printed give a total of "
        f"{number(row.expected_total)}, and {number(row.total)} is printed."
        for row in rows
        if not row.consistent
    ]
    return found


def plain_table(result: Result) -> list[str]:
    """Each rate of each row, for training and data."""
    table = [
        [row.name, name.replace("_", " "), rate(found), percent(found.spread)]
        for row in result.rows
        for name, found in row.speeds().items()
    ]
    return aligned(["What", "Rate", "Median (range)", "Spread"], table)


def chart(result: Result) -> bytes:
    """A bar for each row that has a rate, as a PNG. UserError without matplotlib."""
    from openelm.report.plots import LIGHT, draw_bars, require_matplotlib

    require_matplotlib()
    values, own, titles = {}, [], set()
    several = len({row.case for row in result.rows}) > 1
    for row in result.rows:
        metric = next((name for name in DRAWN if row.metrics.get(name)), None)
        if metric is None:
            continue
        label = f"{row.name}, {row.case}" if several else row.name
        values[label] = summary(row.metrics[metric]).median
        titles.add(metric.replace("_", " ").removesuffix(" per s"))
        if row.about.get("ours", True):
            own.append(label)
    return draw_bars(f"{' and '.join(sorted(titles)).capitalize()} per second", values, own, LIGHT)
