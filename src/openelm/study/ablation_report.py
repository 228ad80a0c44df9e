"""The report of an ablation: its figures in words and tables, and its pictures, in a folder."""

from __future__ import annotations

import re
import statistics
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from openelm.files import write_bytes
from openelm.model.twins import WITHIN
from openelm.report.ablation import Band, Dot, Layers, colours, draw_curves, draw_differences, draw_layers
from openelm.report.markdown import aligned
from openelm.report.plots import LIGHT, require_matplotlib
from openelm.report.run_files import number
from openelm.study.ablation_figures import ONE_SEED, SAME, Figures, Interval, Record, by_size, curve_of, done, figures

NOTHING = "-"
SHOWN_HASH = 12  # characters
OFF = ("parameters_off", "flops_off")


def table(results: Record) -> str:
    """All that is known, as Markdown; what is missing or does not agree is said."""
    found = figures(results)
    held_out = results.get("held_out") or {}
    about = [f"`{results['command']}`"] if results.get("command") else []
    about += [f"On {machine}."] if (machine := _machine(results.get("environment") or {})) else []
    if held_out:
        about.append(f"Held-out text: {held_out['bytes']:,} bytes, {held_out['tokens']:,} tokens.")
    checks = "\n".join(f"- {line}" for line in [*_checks(results), *_missing(results)])
    conclusion = "\n".join(f"- {line}" for line in _conclusion(found))
    blocks = [f"# {results['name']}", *about, "## Conclusion", conclusion, "## Checks", checks]
    for size, kinds in found.items():
        blocks += _size_blocks(size, results["sizes"][size], kinds, results)
    blocks += _tuning_blocks(results["tuning"]) if results.get("tuning") else []
    notes = "\n".join(f"- {line}" for line in _notes(results))
    return "\n\n".join([*blocks, "## How to read this", notes]) + "\n"


def _machine(environment: Record) -> str:
    """Hardware and torch, as far as they are known."""
    hardware, packages = environment.get("hardware") or {}, environment.get("packages") or {}
    accelerators = [entry.get("name") for entry in hardware.get("accelerators") or []]
    cores = f"{hardware['cores']} cores" if hardware.get("cores") else ""
    torch = f"torch {packages['torch']}" if packages.get("torch") else ""
    return ", ".join(part for part in (*accelerators, hardware.get("cpu"), cores, torch) if part)


def _conclusion(found: Mapping[str, Mapping[str, Figures]]) -> Iterator[str]:
    """A sentence a comparison, and what their number means."""
    compared = 0
    for size, kinds in found.items():
        for kind, known in kinds.items():
            if kind != known.against:
                yield f"At {size}, {kind} {_sentence(known)}"
                compared += known.difference is not None and known.difference.half is not None
    if compared > 1:
        yield (
            f"These are {compared} comparisons at 95 % each, not adjusted for their number: of twenty kinds that do "
            "not differ, one is expected to be called better or worse."
        )
    elif not compared:
        yield "No comparison has an interval yet: that takes two seeds of both kinds."


def _sentence(known: Figures) -> str:
    """What a kind is against the other; no more than the interval says."""
    found, other = known.difference, known.against
    if found is None:
        return f"cannot be compared with {other} yet: no seed of both is done."
    if found.verdict == ONE_SEED:
        return (
            f"differs from {other} by {found.mean:+.4f} bits per byte with the one seed that both have, which says "
            "nothing of chance."
        )
    if found.verdict == SAME:
        return (
            f"is not told apart from {other}: the interval of the difference in bits per byte, {found.ends('+')}, "
            f"contains 0 ({found.count} seeds)."
        )
    size = Interval(abs(found.mean), found.half, found.count)
    return f"is {found.verdict} than {other} by {size.mean:.4f} ({size.ends()}) bits per byte ({found.count} seeds)."


# What should agree, and what is not there


def _checks(results: Record) -> Iterator[str]:
    """Whether the kinds of a size differ in what they should, and in nothing else; in bold what is not so."""
    within = results.get("within", WITHIN)
    for size, kinds in by_size(results).items():
        same_data = {kind: about for kind, about in kinds.items() if not about.get("data")}
        yield from _rows_agree(size, same_data)
        off = {
            kind: max(map(abs, shares))
            for kind, about in kinds.items()
            if len(shares := [share for key in OFF if (share := number(about.get(key))) is not None]) == len(OFF)
        }
        if far := [f"{kind} by {share:.2%}" for kind, share in off.items() if share > within]:
            yield f"**{size}: parameters or FLOPs are further than {within:.2%} off: {', '.join(far)}.**"
        elif off:
            yield f"{size}: parameters and FLOPs are at most {max(off.values()):.2%} off the size's model."


def _rows_agree(size: str, kinds: Mapping[str, Record]) -> Iterator[str]:
    """Of each seed, what the kinds have read: as they counted it, and the SHA-256 of the rows of their recipes."""
    agreed: list[str] = []
    hashed: list[int] = []
    for seed in _seeds(kinds):
        by_what: dict[tuple[str, str], list[str]] = {}
        for kind, about in kinds.items():
            run = done(about).get(seed)
            if run and run.get("rows_sha256"):
                counted = {"targets": run.get("tokens") or 0, **(run.get("counted") or {})}
                told = ", ".join(f"{value:,} {key}" for key, value in counted.items() if value is not None)
                by_what.setdefault((run["rows_sha256"][:SHOWN_HASH], told), []).append(kind)
                hashed += [run["rows_hashed"]] if run.get("rows_hashed") else []
        those = [f"{digest} ({told}): {', '.join(names)}" for (digest, told), names in by_what.items()]
        if len(those) > 1:
            yield f"**{size}, seed {seed}: the kinds were not trained on the same rows: {'; '.join(those)}.**"
        for (digest, told), names in list(by_what.items()) if len(those) == 1 else []:
            agreed.append(f"seed {seed} {digest} ({len(names)} of {len(kinds)} kinds; {told})")
    if agreed:
        rows = f"the first {min(hashed):,} rows" if hashed else "the rows"
        yield (
            f"{size}: all kinds of a seed have counted the same targets and documents as they trained, and by SHA-256 "
            f"{rows} of their recipes are the same, in the same order: {'; '.join(agreed)}."
        )


def _missing(results: Record) -> Iterator[str]:
    """Runs that failed, with the last line of why, and those that are not done."""
    left = []
    for size, kinds in by_size(results).items():
        if results["reference"] not in kinds:
            yield f"{size} has no {results['reference']}: nothing at this size can be compared with it."
        seeds = _seeds(kinds)
        for kind, about in kinds.items():
            runs = {run["seed"]: run for run in about.get("runs") or []}
            for seed in [seed for seed in seeds if seed not in done(about)]:
                if failure := _failure(runs.get(seed, {})):
                    yield f"Failed: {size}, {kind}, seed {seed}: {failure.strip().splitlines()[-1]}"
                else:
                    left.append(f"{size} {kind} {seed}")
            if not seeds:
                left.append(f"{size} {kind}")
    if left:
        yield f"Not done (size, kind, seed): {', '.join(left)}."


def _failure(run: Record) -> str:
    """Why a run has no figure; "" where it is not done."""
    value = run.get("bits_per_byte")
    return run.get("failure") or ("" if value is None or number(value) is not None else f"bits per byte are {value}")


def _seeds(kinds: Mapping[str, Record]) -> list[int]:
    return sorted({run["seed"] for about in kinds.values() for run in about.get("runs") or []})


# Tables


def _size_blocks(size: str, entry: Record, known: Mapping[str, Figures], results: Record) -> list[str]:
    """The kinds of a size, and each run's figure."""
    kinds = entry.get("kinds") or {}
    known_facts = {
        "{:,} tokens a run": entry.get("tokens"),
        "{:g} a parameter": results.get("tokens_per_parameter"),
        "{:,} steps": entry.get("steps"),
        "{:,} rows a step": entry.get("global_batch"),
        "{:,} tokens a row": entry.get("row_length"),
    }
    facts = ", ".join(text.format(value) for text, value in known_facts.items() if value)
    head = ["Kind", "Parameters (off)", "FLOPs a token (off)", "Cache bytes a token", "lr", "Bits per byte (seeds)"]
    head += [f"Against {results['reference']}", "Tokens to reach it", "Generation, tokens/s"]
    rows = [[kind, *_cells(kind, about, entry, known[kind], results)] for kind, about in kinds.items()]
    seeds = _seeds(kinds)
    raw = [[kind, *(_raw(about, seed) for seed in seeds)] for kind, about in kinds.items()]
    return [
        f"## {size}",
        *([f"{facts}."] if facts else []),
        "\n".join(aligned(head, rows)),
        *([f"{about}."] if (about := "; ".join(_abouts(kinds))) else []),
        "Bits per byte of each run:",
        "\n".join(aligned(["Kind", *(f"seed {seed}" for seed in seeds)], raw)),
    ]


def _cells(kind: str, about: Record, entry: Record, known: Figures, results: Record) -> list[str]:
    lr, factor = number(entry.get("lr")), number(about.get("lr_factor"))
    speed = about.get("generation") or {}
    if kind == results["reference"]:
        difference = reach = "reference"
    else:
        difference, reach = _difference(known, results["reference"]), str(known.reach or NOTHING)
    own = known.bits_per_byte
    engine = f", {speed['engine']}" if speed.get("engine") else ""
    around = f" ± {own.half:.4f}" if own and own.half is not None else ""
    return [
        _off(about.get("parameters"), about.get("parameters_off")),
        _off(about.get("flops_per_token"), about.get("flops_off")),
        _whole(about.get("cache_bytes_per_token")),
        NOTHING if lr is None or factor is None else f"{lr * factor:.4g}",
        f"{own.mean:.4f}{around} ({own.count})" if own else NOTHING,
        difference,
        reach,
        f"{speed['tokens_per_s']:,.0f} ({speed['least']:,.0f} to {speed['most']:,.0f}{engine})" if speed else NOTHING,
    ]


def _difference(known: Figures, reference: str) -> str:
    found = known.difference
    if found is None:
        return NOTHING
    around = f" ({found.ends('+')})" if found.half is not None else ""
    other = f" ({known.against})" if known.against != reference else ""
    return f"{found.mean:+.4f}{around}, {found.verdict}{other}"


def _off(value: Any, share: Any) -> str:
    known = number(share)
    return _whole(value) + (f" ({known:+.2%})" if known is not None else "")


def _whole(value: Any) -> str:
    known = number(value)
    return NOTHING if known is None else f"{known:,.0f}"


def _raw(about: Record, seed: int) -> str:
    run: Record = next((run for run in about.get("runs") or [] if run["seed"] == seed), {})
    value = number(run.get("bits_per_byte"))
    return f"{value:.5f}" if value is not None else "failed" if _failure(run) else NOTHING


def _abouts(kinds: Mapping[str, Record]) -> Iterator[str]:
    """What the kinds are."""
    for kind, about in kinds.items():
        changes = ", ".join(f"{key}={value}" for key, value in (about.get("data") or {}).items())
        if told := ", ".join(word for word in (about.get("about"), f"with data {changes}" if changes else "") if word):
            yield f"*{kind}*: {told}"


def _tuning_blocks(tuning: Record) -> list[str]:
    """Bits per byte of each kind by factor of the learning rate."""
    factors = sorted({factor for found in tuning["found"].values() for factor in found}, key=float)
    rows, edges = [], []
    for kind, found in tuning["found"].items():
        chosen = number((tuning.get("chosen") or {}).get(kind))
        cells = []
        for factor in factors:
            value = number(found.get(factor))
            cell = NOTHING if value is None else f"{value:.4f}"
            cells.append(f"**{cell}**" if chosen is not None and float(factor) == chosen else cell)
        rows.append([kind, *cells])
        if len(factors) > 1 and chosen in (float(factors[0]), float(factors[-1])):
            edges.append(f"{kind} ({chosen:g})")
    told = (
        f"Each kind's factor of the learning rate was found at {tuning['size']} with seed {tuning['seed']}, on "
        f"{tuning['share']:.0%} of the tokens of a run, and is that of all sizes. Bits per byte, in bold the chosen:"
    )
    blocks = ["## Learning rates", told, "\n".join(aligned(["Kind", *(f"x {factor}" for factor in factors)], rows))]
    if edges:
        blocks.append(f"At the edge of what was tried, so that a better one may lie beyond: {', '.join(edges)}.")
    return blocks


def _notes(results: Record) -> Iterator[str]:
    reference = results["reference"]
    yield "Intervals are of 95 %, by Student's t over seeds. An interval of few seeds is wide, as it should be."
    yield (
        "Differences are taken seed by seed, since runs of one seed share their rows: their interval is not that of "
        "two means. Less than 0 is better. Not told apart does not mean equal."
    )
    yield (
        f"Tokens to reach it: where held-out bits per byte are first as low as {reference} of the same seed ends, as a "
        "share of its tokens (mean, and range over seeds). Where the learning rate decays, a model in mid-run is worse "
        "than a run of that length would be, so that shares below 100 % are rather too large."
    )
    if any(about.get("data") for kinds in by_size(results).values() for about in kinds.values()):
        yield "Kinds on other data have other rows; their curves are of other held-out text, and are left out."


# Pictures


def write(results: Record, out: Path, *, pictures: bool = True) -> None:
    """table.md, and with it the pictures, in a folder. UserError where these are wanted without matplotlib."""
    write_bytes(out / "table.md", table(results).encode("utf-8"))
    if pictures:
        draw(results, out)


def draw(results: Record, folder: Path) -> list[Path]:
    """The pictures that anything is known for; the files, by name as they were written."""
    require_matplotlib()
    found, reference, drawn = figures(results), results["reference"], {}
    shades = colours(list(dict.fromkeys(kind for kinds in found.values() for kind in kinds)), reference, LIGHT)
    for size, kinds in by_size(results).items():
        name = re.sub(r"[^\w.-]", "-", size)
        if bands := _bands(kinds, shades):
            gaps = _bands(kinds, shades, reference)
            flops = number((kinds.get(reference) or next(iter(kinds.values()))).get("flops_per_token"))
            title = f"Held-out bits per byte, {size}"
            drawn[f"curves-{name}.png"] = draw_curves(title, bands, gaps, reference, flops, LIGHT)
        if models := _layers(kinds):
            outline = Layers(reference, *_shape(kinds[reference])) if reference in kinds else None
            drawn[f"layers-{name}.png"] = draw_layers(f"Layers, {size}", models, outline, LIGHT)
    panels = {size: dots for size, known in found.items() if (dots := _dots(known, reference))}
    if panels:
        drawn["differences.png"] = draw_differences(panels, reference, LIGHT)
    for name, png in drawn.items():
        write_bytes(folder / name, png)
    return [folder / name for name in drawn]


def _bands(kinds: Mapping[str, Record], shades: Mapping[str, str], less: str = "") -> list[Band]:
    """Curves of the kinds on the same data, or their differences to one of them, seed by seed."""
    bands = []
    other = _curves(kinds.get(less, {}))
    for kind, about in kinds.items():
        if about.get("data") or kind == less:
            continue
        curves = list(_curves(about).values())
        if less:
            curves = [_less(curve, other[seed]) for seed, curve in _curves(about).items() if seed in other]
        if not curves or not (tokens := sorted(set.intersection(*map(set, curves)))):
            continue
        values = [[curve[place] for curve in curves] for place in tokens]
        means = [statistics.fmean(those) for those in values]
        label = kind if len(curves) > 1 else f"{kind} (one seed)"
        bands.append(Band(label, shades[kind], tokens, means, [*map(min, values)], [*map(max, values)]))
    return bands


def _curves(about: Record) -> dict[int, dict[float, float]]:
    """By seed and tokens, of the runs that are done; of all, where none is."""
    runs = list(done(about).values()) or about.get("runs") or []
    return {run["seed"]: dict(curve) for run in runs if (curve := curve_of(run))}


def _less(curve: Mapping[float, float], other: Mapping[float, float]) -> dict[float, float]:
    return {tokens: value - other[tokens] for tokens, value in curve.items() if tokens in other}


def _dots(known: Mapping[str, Figures], reference: str) -> dict[str, Dot]:
    dots = {}
    for kind, its in known.items():
        if its.difference:
            label = kind if its.against == reference else f"{kind}\n(against {its.against})"
            differs = its.difference.verdict not in (SAME, ONE_SEED)
            dots[label] = Dot(its.difference.mean, its.difference.half, differs)
    return dots


def _shape(about: Record) -> tuple[tuple[int, ...], ...]:
    return tuple(tuple(about.get(key) or ()) for key in ("num_query_heads", "num_kv_heads", "ffn_dims"))


def _layers(kinds: Mapping[str, Record]) -> list[Layers]:
    """Kinds with the same layers share a row."""
    by_shape: dict[tuple[tuple[int, ...], ...], list[str]] = {}
    for kind, about in kinds.items():
        if not about.get("data"):
            by_shape.setdefault(_shape(about), []).append(kind)
    return [Layers(", ".join(those), *shape) for shape, those in by_shape.items() if any(shape)]
