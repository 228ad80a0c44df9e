"""A run folder as one web page: `write_report(run)` reads the run's files and writes run/report/."""

import string
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from textwrap import shorten

import numpy

from openelm.files import write_bytes
from openelm.report import plots, tuning
from openelm.report.markup import card, escape, fates, part, plot_grid, shown, table
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


def write_report(run: Path, evaluation: Callable[[Path], str] = lambda _: "", trained: int = 0) -> Path:
    """Write run/report/index.html, one self-contained file, with its pictures beside it; return its path.

    ``evaluation`` draws the section on what was measured, and keeps its pictures in the folder that it is given.
    ``trained`` are the parameters of the adapter, where one is trained.
    """
    plots.require_matplotlib()
    files = read_run(run)
    folder = run / "report"
    folder.mkdir(exist_ok=True)
    template = string.Template(Path(__file__).with_name("page.html").read_text(encoding="utf-8"))
    page = template.substitute(
        name=escape(files.name),
        light=plots.LIGHT.css(),
        dark=plots.DARK.css(),
        status=escape(_status(files)),
        figures=_key_figures(files, trained),
        learning=(tuning.learning if files.tunes else _learning)(files, folder),
        comparison=tuning.held_out(files) if files.tunes else _comparison(files, folder),
        evaluation=evaluation(folder),
        geometry=(tuning.trained(files, trained) if files.tunes else "") + _geometry(files, folder),
        samples=_samples(files),
        data=tuning.examples(files) if files.tunes else _data(files),
        training=_training(files, folder),
        folded=_folded(files),
    )
    # A sample may hold a lone surrogate, which UTF-8 cannot carry.
    write_bytes(folder / "index.html", page.encode("utf-8", "replace"))
    return folder / "index.html"


# The parts of the page, from top to bottom


def _status(files: RunFiles) -> str:
    planned = number(section(files.config, "train").get("steps"))
    if files.summary:
        return f"Finished after {shown(number(files.summary.get('steps')) or planned or 'all')} steps."
    step = max((record["step"] for record in files.records), default=0)
    return f"No summary yet: still running, or stopped, at step {step:,}" + (f" of {planned:,}." if planned else ".")


def _key_figures(files: RunFiles, trained: int) -> str:
    """The strip at the top: five numbers, as far as they are known."""
    train = files.of_kind("train")
    timings = [section(record, "timing") for record in train]
    last = {**train[-1], **timings[-1]} if train else {}
    speeds, uses = finite(column(timings, "tokens_per_s")), finite(column(timings, "mfu"))
    speed = float(numpy.median(speeds)) if speeds else None
    use = f"median; MFU {numpy.median(uses):.0%}" if uses else "median"
    memory = max(finite(column(timings, "memory_bytes")), default=0)
    parameters = number(section(files.config, "geometry").get("num_parameters"))
    tokens = number(files.summary.get("tokens", last.get("tokens")))
    elapsed_s = number(files.summary.get("elapsed_s", last.get("elapsed_s")))
    entries = [
        (
            ("Parameters trained", short_number(trained), f"beside the model's {parameters or 0:,.0f}")
            if trained
            else ("Parameters", parameters and short_number(parameters), f"{parameters or 0:,.0f}")
        ),
        ("Tokens seen", tokens and short_number(tokens), f"{tokens or 0:,.0f}"),
        tuning.score(files) if files.tunes else _score(files),
        ("Tokens per second", speed and short_number(speed), use),
        ("Time", elapsed_s and duration(elapsed_s), f"memory {memory / 2**30:.2f} GiB" if memory else ""),
    ]
    cells = [
        f"<div><dt>{label}</dt><dd>{escape(value)}<small>{escape(note)}</small></dd></div>"
        for label, value, note in entries
        if value
    ]
    return f'<dl class="figures">{"".join(cells)}</dl>' if cells else ""


def _score(files: RunFiles) -> tuple[str, str, str]:
    """The best bits per byte: what it is called, the value, and whose it is."""
    seen = {
        f"validation at step {record['step']}": value
        for record in files.of_kind("validation")
        if (value := number(record.get("bits_per_byte"))) is not None
    }
    scores = files.scores()[0] or seen
    best = min(scores, key=lambda label: scores[label], default="")
    return "Bits per byte", best and f"{scores[best]:.3f}", f"best: {best}"


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
    return part("Learning curve", note, plot_grid(figures))


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
    return part("Beside plain compressors", note, plot_grid([plots.embed(folder, "comparison", draw, alt)]))


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
    return part("Geometry", note, plot_grid(figures))


def _samples(files: RunFiles) -> str:
    """Texts along the run, the newest first and open."""
    texts = [(f"Step {record['step']}", record) for record in reversed(files.of_kind("sample"))]
    note = "What the model wrote along the run, the newest first; the prompt is in colour."
    if len(texts) > MAX_SAMPLES:
        note += f" {MAX_SAMPLES} of {len(texts)}, evenly spaced."
        kept = numpy.linspace(0, len(texts) - 1, MAX_SAMPLES).round().astype(int)
        texts = [texts[index] for index in kept]
    if final := section(files.summary, "sample"):
        texts.insert(0, ("The finished model", final))
    items = []
    gap = "\n\n" if files.answers else ""
    for index, (title, record) in enumerate(texts):
        prompt, text = str(record.get("prompt") or ""), str(record.get("text") or "")
        rest = text.removeprefix(prompt)  # a text may stand with its prompt or without
        items.append(
            f"<li><details{'' if index else ' open'}><summary>{escape(title)} "
            f'<span class="note">{escape(shorten(rest, 64, placeholder=" …"))}</span></summary>'
            f"<pre><b>{escape(prompt)}</b>{gap}{escape(rest)}</pre></details></li>"
        )
    return part("Samples", note, f'<ol class="samples">{"".join(items)}</ol>') if items else ""


def _data(files: RunFiles) -> str:
    """What became of the documents read, and of each source."""
    if not (accounts := files.of_kind("data")):
        return ""
    account = accounts[-1]
    counts = {key: value for key in FATES if isinstance(value := account.get(key), int)}
    documents = account.get("documents", 0)
    body = fates("documents", counts, documents)
    sources = {name: source for name, source in section(account, "sources").items() if isinstance(source, dict)}
    if sources:
        columns = list(dict.fromkeys(key for source in sources.values() for key in source))
        lines = [[name, *(shown(source.get(key, "")) for key in columns)] for name, source in sources.items()]
        body += card(table(lines, ["source", *columns], "counts"))
    return part("Data", f"{documents:,} documents read by step {account['step']}.", body)


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
    body = plot_grid(figures, "small")
    if events := files.of_kind("guard"):
        rows = [
            [f"{event['step']:,}", *(shown(event.get(key, "")) for key in ("problem", "action", "loss", "grad_norm"))]
            for event in events[-MAX_EVENTS:]
        ]
        head = ["step", "out of the ordinary", "the update was", "loss", "gradient norm"]
        body += card(table(rows, head, "counts"))
    return part("Optimisation", note, body) if figures else ""


def _folded(files: RunFiles) -> str:
    """Config and environment, for who asks."""
    parts = []
    if files.config_text:
        parts.append(("Config", f"<pre>{escape(files.config_text)}</pre>"))
    if files.environment:
        parts.append(("Environment", card(table(list(_flat(files.environment)), kind="environment"))))
    body = "".join(f'<details class="folded"><summary>{title}</summary>{inner}</details>' for title, inner in parts)
    return part("How it was made", "", body) if parts else ""


def _flat(record: Record, prefix: str = "") -> Iterable[list[str]]:
    """Nested entries as rows of dotted name and value."""
    for key, value in record.items():
        if isinstance(value, dict):
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield [f"{prefix}{key}", shown(value)]
