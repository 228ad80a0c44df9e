"""A run folder as one web page: `write_report(run)` reads the run's files and writes run/report/."""

import html
import re
import string
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from textwrap import shorten

import numpy

from openelm.files import write_bytes
from openelm.report import plots
from openelm.report.plots import Curve, duration, short_number
from openelm.report.run_files import (
    OWN_SCORES,
    Record,
    RunFiles,
    column,
    finite,
    number,
    per_layer,
    read_run,
    section,
    tokens_at,
)

MAX_SAMPLES = 40
MAX_EVENTS = 40
# What becomes of a document, one of these; the account holds other counts too.
FATES = ("kept", "too_few_characters", "too_few_tokens", "undecodable", "held_out")


def write_report(run: Path, evaluation: Callable[[Path], str] = lambda _: "") -> Path:
    """Write run/report/index.html, one self-contained file, with its pictures beside it; return its path.

    ``evaluation`` draws the section on what was measured, and keeps its pictures in the folder that it is given.
    """
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
        evaluation=evaluation(folder),
        geometry=_geometry(files, folder),
        samples=_samples(files),
        data=_data(files),
        training=_training(files, folder),
        folded=_folded(files),
    )
    # A sample may hold a lone surrogate, which UTF-8 cannot carry.
    write_bytes(folder / "index.html", page.encode("utf-8", "replace"))
    return folder / "index.html"


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
    planned = number(section(files.config, "train").get("steps"))
    if files.summary:
        return f"Finished after {_shown(number(files.summary.get('steps')) or planned or 'all')} steps."
    step = max((record["step"] for record in files.records), default=0)
    return f"No summary yet: still running, or stopped, at step {step:,}" + (f" of {planned:,}." if planned else ".")


def _key_figures(files: RunFiles) -> str:
    """The strip at the top: five numbers, as far as they are known."""
    train = files.of_kind("train")
    timings = [section(record, "timing") for record in train]
    last = {**train[-1], **timings[-1]} if train else {}
    seen = {
        f"validation at step {record['step']}": value
        for record in files.of_kind("validation")
        if (value := number(record.get("bits_per_byte"))) is not None
    }
    scores = files.scores()[0] or seen
    best = min(scores, key=lambda label: scores[label], default="")
    speeds, uses = finite(column(timings, "tokens_per_s")), finite(column(timings, "mfu"))
    speed = float(numpy.median(speeds)) if speeds else None
    use = f"median; MFU {numpy.median(uses):.0%}" if uses else "median"
    memory = max(finite(column(timings, "memory_bytes")), default=0)
    parameters = number(section(files.config, "geometry").get("num_parameters"))
    tokens = number(files.summary.get("tokens", last.get("tokens")))
    elapsed_s = number(files.summary.get("elapsed_s", last.get("elapsed_s")))
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
    checks = [record for record in files.of_kind("validation") if number(record.get("bits_per_byte"))]
    figures = []
    if train:
        losses = column(train, "loss")
        curve = Curve("Training loss (nats per token)", tokens_at(files, train), losses, smooth=True)
        alt = f"Training loss, from {losses[0]:.2f} to {plots.running_mean(losses)[-1]:.2f}."
        caption = alt + " Pale: as logged; dark: running mean."
        figures.append(plots.embed(folder, "loss", partial(plots.draw_curve, curve), alt, caption))
    if checks:
        scores, references = column(checks, "bits_per_byte"), files.scores()[1]
        title = "Held-out text (bits per byte)"
        curve = Curve(title, tokens_at(files, checks), scores, references=references, markers=True)
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
    model = section(files.config, "geometry")
    heads, kv_heads = per_layer(model, "num_query_heads"), per_layer(model, "num_kv_heads")
    widths = per_layer(model, "ffn_dims")
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
    sizes = [f"{model[key]:,} {name}" for key, name in names.items() if number(model.get(key)) is not None]
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
    if final := section(files.summary, "sample"):
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
    counts = {key: value for key in FATES if isinstance(value := account.get(key), int)}
    documents = account.get("documents", 0)
    total = max(documents, sum(counts.values()), 1)
    shares = [value / total for value in counts.values()]
    # Bar and table are coloured alike, by position, in the style sheet.
    spans = [f'<span style="flex-grow: {share:.6f}"></span>' if share else "<span hidden></span>" for share in shares]
    names = [key.replace("_", " ") for key in counts]
    rows = [
        [name, f"{value:,}", f"{share:.2%}"] for name, value, share in zip(names, counts.values(), shares, strict=True)
    ]
    bar = f'<div class="stack" aria-hidden="true">{"".join(spans)}</div>'
    body = f'<div class="card">{bar}{_table(rows, ["documents", "count", "share"], "counts parts")}</div>'
    sources = {name: source for name, source in section(account, "sources").items() if isinstance(source, dict)}
    if sources:
        columns = list(dict.fromkeys(key for source in sources.values() for key in source))
        lines = [[name, *(_shown(source.get(key, "")) for key in columns)] for name, source in sources.items()]
        body += f'<div class="card">{_table(lines, ["source", *columns], "counts")}</div>'
    return _part("Data", f"{documents:,} documents read by step {account['step']}.", body)


def _shown(value: object) -> str:
    if isinstance(value, list):
        return ", ".join(map(str, value))
    if isinstance(value, float):
        return f"{value:.4g}"
    return f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value)


def _training(files: RunFiles, folder: Path) -> str:
    """Learning rate, gradient norm and throughput."""
    train = files.of_kind("train")
    timed = [{**record, **section(record, "timing")} for record in train]
    figures = []
    for key, title in (
        ("lr", "Learning rate"),
        ("grad_norm", "Gradient norm"),
        ("tokens_per_s", "Tokens per second"),
    ):
        values = column(timed, key)
        if found := finite(values):
            smooth = key != "lr"
            curve = Curve(title, tokens_at(files, train), values, smooth=smooth, from_zero=True, size=plots.SMALL)
            alt = f"{title}: median {short_number(float(numpy.median(found)))}, highest {short_number(max(found))}."
            figures.append(plots.embed(folder, key, partial(plots.draw_curve, curve), alt))
    waited_s, spent_s = (sum(finite(column(timed, key))) for key in ("data_wait_s", "step_s"))
    note = f"Waiting for data took {waited_s / spent_s:.2%} of the step time." if spent_s else ""
    body = _plots(figures, "small")
    if events := files.of_kind("guard"):
        rows = [
            [f"{event['step']:,}", *(_shown(event.get(key, "")) for key in ("problem", "action", "loss", "grad_norm"))]
            for event in events[-MAX_EVENTS:]
        ]
        table = _table(rows, ["step", "out of the ordinary", "the update was", "loss", "gradient norm"], "counts")
        body += f'<div class="card">{table}</div>'
    return _part("Optimisation", note, body) if figures else ""


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
