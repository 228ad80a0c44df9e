"""A run folder as one web page: `write_report(run)` reads the run's files and writes run/report/."""

import html
import json
import math
import re
import string
from collections.abc import Iterable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from textwrap import shorten
from typing import Any

import numpy
import yaml

from openelm.errors import UserError
from openelm.report import plots
from openelm.report.plots import Curve, duration, short_number

OWN_SCORES = ("last", "averaged")  # of the summary's bits per byte, those of the run's own model
MAX_SAMPLES = 40
Record = dict[str, Any]


@dataclass(frozen=True)
class RunFiles:
    """What the files of a run folder say; a file that is absent or unreadable is empty here."""

    name: str
    config: Record
    config_text: str
    environment: Record
    summary: Record
    records: list[Record]

    def of_kind(self, kind: str) -> list[Record]:
        return [record for record in self.records if record["kind"] == kind]

    def scores(self) -> tuple[dict[str, float], dict[str, float]]:
        """Bits per byte of the summary: the model's own, and those it is compared with."""
        found = _section(self.summary, "bits_per_byte")
        known = {label: value for label, value in found.items() if _number(value) is not None}
        own = {label: known.pop(label) for label in OWN_SCORES if label in known}
        return own, known


def write_report(run: Path) -> Path:
    """Write run/report/index.html, one self-contained file, with its pictures beside it; return its path."""
    plots.require_matplotlib()
    files = read_run(run)
    folder = run / "report"
    folder.mkdir(exist_ok=True)
    template = string.Template(Path(__file__).with_name("page.html").read_text(encoding="utf-8"))
    page = template.substitute(
        name=_escape(files.name),
        light=plots.LIGHT.css(),
        dark=plots.DARK.css(),
        status=_escape(_status(files)),
        figures=_key_figures(files),
        learning=_learning(files, folder),
        comparison=_comparison(files, folder),
        geometry=_geometry(files, folder),
        samples=_samples(files),
        data=_data(files),
        training=_training(files, folder),
        folded=_folded(files),
    )
    # A sample may hold a lone surrogate, which UTF-8 cannot carry.
    return plots.write(folder / "index.html", page.encode("utf-8", "replace"))


# Reading


def read_run(run: Path) -> RunFiles:
    """Read the files of a run folder, finished or not."""
    metrics = run / "metrics.jsonl"
    if not metrics.is_file() and not (run / "config.yaml").is_file():
        raise UserError(
            f"{run} is not a run folder: it holds neither config.yaml nor metrics.jsonl; "
            "give the folder that pretrain wrote"
        )
    config_text = _text(run / "config.yaml")
    try:
        config = yaml.safe_load(config_text)
    except yaml.YAMLError:
        config = None  # the page still shows the text as it is
    return RunFiles(
        name=run.resolve().name,
        config=config if isinstance(config, dict) else {},
        config_text=config_text,
        environment=_json_object(_text(run / "environment.json")),
        summary=_json_object(_text(run / "summary.json")),
        records=read_metrics(_text(metrics)),
    )


def read_metrics(text: str) -> list[Record]:
    """Parse the records of metrics.jsonl in order of step, each step once.

    A killed run leaves a torn line, which is skipped; where a resumed run counts its steps again,
    what it wrote replaces what was there.
    """
    records: dict[tuple[int, str, str], Record] = {}
    newest = -1
    for line in text.split("\n"):
        record = _json_object(line)
        step, kind = record.get("step"), record.get("kind")
        if not isinstance(step, int) or not isinstance(kind, str):
            continue
        if step < newest:
            records = {key: old for key, old in records.items() if key[0] <= step}
        newest = step
        records[step, kind, str(record.get("prompt"))] = record
    return list(records.values())


def _text(path: Path) -> str:
    return path.read_bytes().decode("utf-8", "replace") if path.is_file() else ""


def _json_object(text: str) -> Record:
    try:
        value = json.loads(text)
    except ValueError:
        return {}
    return value if isinstance(value, dict) else {}


def _section(record: Record, key: str) -> Record:
    value = record.get(key)
    return value if isinstance(value, dict) else {}


def _number(value: object) -> float | None:
    """Return the value if it is a finite number."""
    if isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value):
        return value
    return None


def _column(records: Iterable[Record], key: str) -> list[float]:
    """One value of each record, NaN where there is none."""
    return [math.nan if (value := _number(record.get(key))) is None else value for record in records]


def _finite(values: Iterable[float]) -> list[float]:
    return [value for value in values if math.isfinite(value)]


def _tokens_at(files: RunFiles, records: list[Record]) -> list[float]:
    """Tokens seen at each record's step, between the logged steps by interpolation."""
    known = {0: 0.0}
    for record in files.of_kind("train"):
        if (tokens := _number(record.get("tokens"))) is not None:
            known[record["step"]] = tokens
    steps = [record["step"] for record in records]
    return [float(tokens) for tokens in numpy.interp(steps, list(known), list(known.values()))]


def _per_layer(model: Record, key: str) -> list[float]:
    """Values of each layer; a single number stands for all layers; empty where they are not known."""
    value, count = model.get(key), model.get("num_transformer_layers")
    if isinstance(value, int) and isinstance(count, int):
        value = [value] * count
    if not isinstance(value, list) or any(_number(entry) is None for entry in value):
        return []
    return value


# Writing


def _escape(text: object) -> str:
    """Escape for HTML; control characters, which models do write, become visible."""
    return html.escape(re.sub(r"[\x00-\x08\x0b-\x1f\x7f]", "\N{REPLACEMENT CHARACTER}", str(text)))


def _part(title: str, note: str, body: str) -> str:
    lead = f"<p>{_escape(note)}</p>" if note else ""
    return f"<section>\n<h2>{_escape(title)}</h2>\n{lead}\n{body}\n</section>"


def _plots(figures: list[str], kind: str = "") -> str:
    return f'<div class="plots {kind}">{"".join(figures)}</div>'


def _table(rows: list[list[str]], head: list[str] | None = None, kind: str = "") -> str:
    """Write a table of texts; `kind` is its class in the style sheet."""
    lines = [
        "<tr>" + "".join(f"<{tag}>{_escape(text)}</{tag}>" for text in row) + "</tr>"
        for tag, some in (("th", [head] if head else []), ("td", rows))
        for row in some
    ]
    return f'<div class="scroll"><table class="{kind}">' + "\n".join(lines) + "</table></div>"


# The parts of the page, from top to bottom


def _status(files: RunFiles) -> str:
    planned = _number(_section(files.config, "train").get("steps"))
    if files.summary:
        return f"Finished after {_shown(_number(files.summary.get('steps')) or planned or 'all')} steps."
    step = max((record["step"] for record in files.records), default=0)
    return f"No summary yet: still running, or stopped, at step {step:,}" + (f" of {planned:,}." if planned else ".")


def _key_figures(files: RunFiles) -> str:
    """The strip at the top: five numbers, as far as they are known."""
    train = files.of_kind("train")
    timings = [_section(record, "timing") for record in train]
    last = {**train[-1], **timings[-1]} if train else {}
    seen = {
        f"validation at step {record['step']}": value
        for record in files.of_kind("validation")
        if (value := _number(record.get("bits_per_byte"))) is not None
    }
    scores = files.scores()[0] or seen
    best = min(scores, key=lambda label: scores[label], default="")
    speeds, uses = _finite(_column(timings, "tokens_per_s")), _finite(_column(timings, "mfu"))
    speed = float(numpy.median(speeds)) if speeds else None
    use = f"median; MFU {numpy.median(uses):.0%}" if uses else "median"
    memory = max(_finite(_column(timings, "memory_bytes")), default=0)
    parameters = _number(_section(files.config, "model").get("num_parameters"))
    tokens = _number(files.summary.get("tokens", last.get("tokens")))
    elapsed_s = _number(files.summary.get("elapsed_s", last.get("elapsed_s")))
    entries = [
        ("Parameters", parameters and short_number(parameters), f"{parameters or 0:,.0f}"),
        ("Tokens seen", tokens and short_number(tokens), f"{tokens or 0:,.0f}"),
        ("Bits per byte", best and f"{scores[best]:.3f}", f"best: {best}"),
        ("Tokens per second", speed and short_number(speed), use),
        ("Time", elapsed_s and duration(elapsed_s), f"memory {memory / 2**30:.2f} GiB" if memory else ""),
    ]
    cells = [
        f"<div><dt>{label}</dt><dd>{_escape(value)}<small>{_escape(note)}</small></dd></div>"
        for label, value, note in entries
        if value
    ]
    return f'<dl class="figures">{"".join(cells)}</dl>' if cells else ""


def _learning(files: RunFiles, folder: Path) -> str:
    train = files.of_kind("train")
    checks = [record for record in files.of_kind("validation") if _number(record.get("bits_per_byte"))]
    figures = []
    if train:
        losses = _column(train, "loss")
        curve = Curve("Training loss (nats per token)", _tokens_at(files, train), losses, smooth=True)
        alt = f"Training loss, from {losses[0]:.2f} to {losses[-1]:.2f}."
        caption = alt + " Pale: as logged; dark: running mean."
        figures.append(plots.embed(folder, "loss", partial(plots.draw_curve, curve), alt, caption))
    if checks:
        scores, references = _column(checks, "bits_per_byte"), files.scores()[1]
        title = "Held-out text (bits per byte)"
        curve = Curve(title, _tokens_at(files, checks), scores, references=references, markers=True)
        alt = f"Validation bits per byte, from {scores[0]:.2f} to {scores[-1]:.2f}"
        alt += "".join(f"; {label} {value:.2f}" for label, value in references.items()) + "."
        figures.append(plots.embed(folder, "validation", partial(plots.draw_curve, curve), alt))
    note = "" if figures else "Nothing has been logged yet."
    return _part("Learning curve", note, _plots(figures))


def _comparison(files: RunFiles, folder: Path) -> str:
    own, references = files.scores()
    if not own:
        return ""
    best, values = min(own.values()), own | references
    against = [
        f"{abs(1 - best / value):.1%} {'below' if best < value else 'above'} {label}"
        for label, value in references.items()
        if value > 0
    ]
    note = f"The model's best is {best:.3f} bits per byte" + (f": {', '.join(against)}." if against else ".")
    alt = "Bits per byte: " + ", ".join(f"{label} {value:.3f}" for label, value in values.items()) + "."
    title = "Held-out text, bits per byte (lower is better)"
    draw = partial(plots.draw_bars, title, values, OWN_SCORES)
    return _part("Beside plain compressors", note, _plots([plots.embed(folder, "comparison", draw, alt)]))


def _geometry(files: RunFiles, folder: Path) -> str:
    model = _section(files.config, "model")
    heads, kv_heads = _per_layer(model, "num_query_heads"), _per_layer(model, "num_kv_heads")
    widths = _per_layer(model, "ffn_dims")
    figures = []
    if heads:
        inner = kv_heads if len(kv_heads) == len(heads) else []
        labels = ("query heads", "key/value heads")
        draw = partial(plots.draw_layers, "Attention heads per layer", heads, inner, labels)
        alt = f"Query heads from {heads[0]} to {heads[-1]}; uniform {short_number(plots.mean(heads))}."
        figures.append(plots.embed(folder, "heads", draw, alt))
    if widths:
        draw = partial(plots.draw_layers, "Feed-forward width per layer", widths, [], ("FFN width", ""))
        alt = f"FFN width from {widths[0]:,} to {widths[-1]:,}; uniform {plots.mean(widths):,.0f}."
        figures.append(plots.embed(folder, "ffn", draw, alt))
    if not figures:
        return ""
    names = {"num_transformer_layers": "layers", "model_dim": "wide", "vocab_size": "tokens in the vocabulary"}
    sizes = [f"{model[key]:,} {name}" for key, name in names.items() if _number(model.get(key)) is not None]
    note = ", ".join(sizes) + ". " if sizes else ""
    note += "Dashed: the uniform model of the same parameter count, with every layer at the mean."
    return _part("Geometry", note, _plots(figures))


def _samples(files: RunFiles) -> str:
    """Texts along the run, the newest first and open."""
    shown = [(f"Step {record['step']}", record) for record in reversed(files.of_kind("sample"))]
    note = "What the model wrote along the run, the newest first; the prompt is in colour."
    if len(shown) > MAX_SAMPLES:
        note += f" {MAX_SAMPLES} of {len(shown)}, evenly spaced."
        kept = numpy.linspace(0, len(shown) - 1, MAX_SAMPLES).round().astype(int)
        shown = [shown[index] for index in kept]
    if final := _section(files.summary, "sample"):
        shown.insert(0, ("The finished model", final))
    items = []
    for index, (title, record) in enumerate(shown):
        prompt, text = str(record.get("prompt") or ""), str(record.get("text") or "")
        rest = text.removeprefix(prompt)  # a text may stand with its prompt or without
        items.append(
            f"<li><details{'' if index else ' open'}><summary>{_escape(title)} "
            f'<span class="note">{_escape(shorten(rest, 64, placeholder=" …"))}</span></summary>'
            f"<pre><b>{_escape(prompt)}</b>{_escape(rest)}</pre></details></li>"
        )
    return _part("Samples", note, f'<ol class="samples">{"".join(items)}</ol>') if items else ""


def _data(files: RunFiles) -> str:
    """What became of the documents read, and of each source."""
    if not (accounts := files.of_kind("data")):
        return ""
    account = accounts[-1]
    counts = {key: value for key, value in account.items() if key != "step" and isinstance(value, int)}
    documents = counts.pop("documents", 0)
    total = max(documents, sum(counts.values()), 1)
    shares = [value / total for value in counts.values()]
    # Bar and table are coloured alike, by position, in the style sheet.
    spans = [f'<span style="flex-grow: {share:.6f}"></span>' if share else "<span hidden></span>" for share in shares]
    names = [key.replace("_", " ").replace("utf8", "UTF-8") for key in counts]
    rows = [
        [name, f"{value:,}", f"{share:.2%}"] for name, value, share in zip(names, counts.values(), shares, strict=True)
    ]
    bar = f'<div class="stack" aria-hidden="true">{"".join(spans)}</div>'
    body = f'<div class="card">{bar}{_table(rows, ["documents", "count", "share"], "counts parts")}</div>'
    sources = {name: source for name, source in _section(account, "sources").items() if isinstance(source, dict)}
    if sources:
        columns = list(dict.fromkeys(key for source in sources.values() for key in source))
        lines = [[name, *(_shown(source.get(key, "")) for key in columns)] for name, source in sources.items()]
        body += f'<div class="card">{_table(lines, ["source", *columns], "counts")}</div>'
    return _part("Data", f"{documents:,} documents read by step {account['step']}.", body)


def _shown(value: object) -> str:
    if isinstance(value, list):
        return ", ".join(map(str, value))
    return f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value)


def _training(files: RunFiles, folder: Path) -> str:
    """Learning rate, gradient norm and throughput."""
    train = files.of_kind("train")
    timed = [{**record, **_section(record, "timing")} for record in train]
    figures = []
    for key, title in (
        ("lr", "Learning rate"),
        ("grad_norm", "Gradient norm"),
        ("tokens_per_s", "Tokens per second"),
    ):
        values = _column(timed, key)
        if found := _finite(values):
            smooth = key != "lr"
            curve = Curve(title, _tokens_at(files, train), values, smooth=smooth, from_zero=True, size=plots.SMALL)
            alt = f"{title}: median {short_number(float(numpy.median(found)))}, highest {short_number(max(found))}."
            figures.append(plots.embed(folder, key, partial(plots.draw_curve, curve), alt))
    waited_s, spent_s = (sum(_finite(_column(timed, key))) for key in ("data_wait_s", "step_s"))
    note = f"Waiting for data took {waited_s / spent_s:.2%} of the step time." if spent_s else ""
    return _part("Optimisation", note, _plots(figures, "small")) if figures else ""


def _folded(files: RunFiles) -> str:
    """Config and environment, for who asks."""
    parts = []
    if files.config_text:
        parts.append(("Config", f"<pre>{_escape(files.config_text)}</pre>"))
    if files.environment:
        table = _table(list(_flat(files.environment)), kind="environment")
        parts.append(("Environment", f'<div class="card">{table}</div>'))
    body = "".join(f'<details class="folded"><summary>{title}</summary>{inner}</details>' for title, inner in parts)
    return _part("How it was made", "", body) if parts else ""


def _flat(record: Record, prefix: str = "") -> Iterable[list[str]]:
    """Nested entries as rows of dotted name and value."""
    for key, value in record.items():
        if isinstance(value, dict):
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield [f"{prefix}{key}", _shown(value)]
