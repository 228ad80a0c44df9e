"""Model cards: README.md with licence, base model, data, evaluation, and what the model must not be trusted with.

A card is YAML between two lines of dashes, which the Hub reads (huggingface_hub's ModelCardData has its keys), and
Markdown below.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from openelm import __version__
from openelm.environment import DISTRIBUTION
from openelm.interop.hub import HUB_ID

if TYPE_CHECKING:
    from openelm.config import RunConfig
    from openelm.interop.source import Source
    from openelm.tuning_config import TuneConfig

Metadata = dict[str, Any]

HUB = "https://huggingface.co"
# What of a source's metadata holds for its conversion too.
KEPT = ("language", "datasets", "metrics", "tags", "pipeline_tag", "model-index")
INHERITED = ("license", "license_name", "license_link", "base_model")  # by a model that is trained further, too
OURS = ("openelm", "layer-wise-scaling")  # tags
CONVERTED, CONTENTS = "Converted with OpenELM", "In this repository"  # our sections in any card
MEASURED = "Accuracy"
CARRIED = ("Licence", "Data", "Bias, risks and limitations")
APPLE = re.compile(r"apple/OpenELM-[\w.-]+")
APPLE_LICENCE = "apple-amlr"
UNKNOWN = ("", "unknown")  # licences that are none
MOST_HEAD = 2**16  # characters of YAML, which are read in about two seconds at worst
IN_WORDS = {
    APPLE_LICENCE: "Apple's model licence for research: for research only, for no product and nothing commercial; "
    "whoever passes the weights on passes the licence on",
}
TUNED_RISKS = """\
What its examples did not teach it has from its base model, mistakes and prejudices included; nothing was done to make
it safe. Test it for your use before anyone relies on it."""
RISKS = """\
A base model: it continues text and was not tuned to follow instructions or to be safe. It repeats what its data holds,
mistakes and prejudices included. Test it for your use before anyone relies on it."""


@dataclass(frozen=True)
class Figure:
    """One number of an evaluation, a share between 0 and 1."""

    task: str
    shots: int
    metric: str
    value: float

    @property
    def dataset(self) -> str:
        """What the Hub calls it by."""
        return f"{self.task}, {self.shots} shots"

    def entry(self) -> Metadata:
        """As the Hub reads it."""
        return {
            "task": {"type": "text-generation"},
            "dataset": {"type": self.task, "name": self.dataset},
            "metrics": [{"type": self.metric, "value": round(self.value, 4)}],
        }


def converted_card(source: Source, *, library: str = "transformers", quantize: str = "") -> str:
    """The card of a converted model: that of its source, and a section on the conversion.

    ``library`` is the one that the Hub is to show a snippet for; ``quantize`` what the weights were rounded to. Where
    the source has no card, the new one says that nothing is known. Converting again renews the section and keeps its
    notes.
    """
    old, body = parse(source.card or "")
    origin = hub_id(source.origin)
    metadata = {"license": "unknown", **_inherited(old, origin)}
    metadata |= {key: old[key] for key in KEPT if old.get(key)}
    if quantize or source.quantized or source.adapter:
        metadata.pop("model-index", None)  # what was measured was another model
    if source.adapter:
        body = _section(MEASURED).sub("", body)
    base = in_one_line(metadata.get("base_model"))
    metadata |= {"library_name": library, "pipeline_tag": "text-generation", "tags": _tags(old.get("tags"))}
    name = (origin or source.origin).rstrip("/").rpartition("/")[2]
    if not body.strip():
        body = (
            f"# {name}\n\nThe model that this was converted from has no card: its data, its evaluation, its bias, "
            "risks and limitations are not known here."
        )
    whose = f"[{base}]({HUB}/{base})" if HUB_ID.fullmatch(base) else f"`{name}`"
    merged = f"with the adapter `{source.adapter}` merged in, " if source.adapter else ""
    notes = [*_bullets(section(body, CONVERTED)), *(f"- {' '.join(note.split())}" for note in source.notes)]
    text = (
        f"The weights are those of {whose}{', quantised,' if source.quantized else ''} {merged}"
        f"{f'quantised to {quantize}' if quantize else 'written in another layout'} by {DISTRIBUTION} {__version__}. "
        f"{_licence(metadata)}"
    )
    return render(metadata, with_section(body, CONVERTED, "\n\n".join([text, "\n".join(dict.fromkeys(notes))])))


def trained_card(
    config: RunConfig,
    *,
    parameters: int,
    steps: int,
    tokens: int,
    bits_per_byte: float | None = None,
    base_card: str | None = None,
) -> str:
    """The card of a pre-training run's model; ``bits_per_byte`` on held-out text, where it was measured.

    ``base_card`` is that of the model which the run began from: its licence and base model are carried over.
    """
    start = config.train.init_from
    metadata = _inherited(parse(base_card or "")[0], hub_id(start)) if start else {}
    base = in_one_line(metadata.get("base_model"))
    if datasets := sorted({found[1] for s in config.data.sources if (found := _DATASET.match(s.path))}):
        metadata["datasets"] = datasets
    metadata |= {"library_name": "transformers", "pipeline_tag": "text-generation", "tags": list(OURS)}
    if bits_per_byte is not None:
        metadata["model-index"] = [{"name": config.name, "results": [_result(bits_per_byte)]}]
    licence = "To be set by whoever publishes it; it must respect those of the data."
    if start:
        licence = f"The run began from {base or f'`{_name(start)}`'}. {_licence(metadata)}"
    data = "\n".join(f"- {source.name}: `{source.path}`, share {source.share:g}" for source in config.data.sources)
    score = "Not measured." if bits_per_byte is None else f"{bits_per_byte:.3f} bits per byte on held-out text."
    what = (
        f"An OpenELM language model with layer-wise scaling, {parameters:,} parameters, trained for {steps:,} steps "
        f"on\n{tokens:,} tokens with {DISTRIBUTION} {__version__}."
    )
    return render(metadata, _body(config.name, what, licence, data, score, RISKS))


def tuned_card(
    config: TuneConfig, *, steps: int, tokens: int, score: dict[str, float], base_card: str | None = None
) -> str:
    """The card of a tuning run's model, or adapter; ``score`` on held-out examples, where there were any.

    ``base_card`` is that of the model which the run began from: its licence and base model are carried over.
    """
    origin = config.model.path
    metadata = _inherited(parse(base_card or "")[0], hub_id(origin))
    base = in_one_line(metadata.get("base_model"))
    if datasets := sorted({found[1] for s in config.data.sources if (found := _DATASET.match(s.path))}):
        metadata["datasets"] = datasets
    metadata |= {"library_name": "transformers", "pipeline_tag": "text-generation", "tags": list(OURS)}
    how = "fine-tuned" if config.preference is None else f"tuned on preferences ({config.preference.loss} loss)"
    if config.adapter is not None:
        how += f" with {config.adapter.kind}, r {config.adapter.r}, on {', '.join(config.adapter.targets)},"
    began = f"{base}" if hub_id(origin) else f"`{_name(origin)}`"
    what = f"{began}, {how} for {steps:,} steps on {tokens:,} tokens with {DISTRIBUTION}\n{__version__}."
    made_from = f", itself made from {base}" if base and base != began else ""
    licence = f"The run began from {began}{made_from}. {_licence(metadata)}"
    data = "\n".join(f"- {source.name}: `{source.path}`, as {source.format}" for source in config.data.sources)
    if before := section(parse(base_card or "")[1], "Data"):
        data += f"\n\nBefore that, by the card of what it began from:\n\n{before}"
    measured = [f"{name.replace('_', ' ')} {score[name]:.3f}" for name in ("loss", "accuracy") if name in score]
    text = f"On held-out examples: {', '.join(measured)}." if measured else "Not measured."
    return render(metadata, _body(config.name, what, licence, data, text, TUNED_RISKS))


def _name(origin: str) -> str:
    """What a model is called by: of a run's model/, the run."""
    path = Path(origin)
    return path.parent.name if path.name == "model" and path.parent.name else path.name


def _body(name: str, what: str, licence: str, data: str, score: str, risks: str) -> str:
    return f"""\
# {name}

{what}

## Licence
{licence}

## Data
{data}

## Evaluation
{score}

## Bias, risks and limitations
{risks}
"""


def published_card(card: str, name: str, contents: str, *, only: str = "") -> str:
    """The card of a repository's main branch: that of the model, and a section on what is where.

    ``only`` is the library that opens the model where others do not, whatever its card says.
    """
    metadata, body = parse(card)
    if only:
        metadata["library_name"] = only
    for key, value in (("library_name", "transformers"), ("pipeline_tag", "text-generation"), ("tags", list(OURS))):
        metadata.setdefault(key, value)
    return render(metadata, with_section(body if body.strip() else f"# {name}", CONTENTS, contents))


def milestone_card(card: str, name: str, step: int, tokens: int | None) -> str:
    """The card of a checkpoint: licence and data as the final model's ``card``, but none of its figures."""
    metadata, body = parse(card)
    metadata.pop("model-index", None)
    seen = f" ({tokens:,} tokens)" if tokens is not None else ""
    parts = [
        f"# {name} after step {step:,}",
        f"The weights after step {step:,}{seen} of the run whose final model, card and logs are on the branch `main`. "
        "They are of one checkpoint, averaged with no other, and were not evaluated by themselves.",
        *(f"## {heading}\n\n{text}" for heading in CARRIED if (text := section(body, heading))),
    ]
    return render(metadata, "\n\n".join(parts))


def evaluated_card(card: str, name: str, figures: Sequence[Figure]) -> str:
    """The card with what was measured: a table, and the entries that the Hub shows beside a model.

    Entries of other tasks stay; those of the same task and number of shots are renewed.
    """
    metadata, body = parse(card)
    tasks = {figure.dataset for figure in figures}
    old = next(iter(metadata.get("model-index") or []), None) or {}
    kept = [r for r in old.get("results") or [] if (r.get("dataset") or {}).get("name") not in tasks]
    metadata["model-index"] = [{"name": old.get("name") or name, "results": [*kept, *(f.entry() for f in figures)]}]
    lines = ["| task | shots | metric | % |", "|---|--:|---|--:|"]
    lines += [f"| {f.task} | {f.shots} | {f.metric} | {100 * f.value:.2f} |" for f in figures]
    note = f"By lm-evaluation-harness, computed by {DISTRIBUTION} {__version__}."
    text = body if body.strip() else f"# {name}"
    return render(metadata, with_section(text, MEASURED, "\n".join([note, "", *lines])))


def parse(card: str) -> tuple[Metadata, str]:
    """(metadata, Markdown) of a card. A head that is not plain YAML of keys and values is left in the Markdown.

    So is one of more than ``MOST_HEAD``, or with aliases: of few lines they make more text than a memory holds.
    """
    found = re.match(r"\ufeff?---[ \t]*\r?\n(.*?)^---[ \t]*(?:\r?\n|\Z)", card, re.DOTALL | re.MULTILINE)
    if found is None or len(found[1]) > MOST_HEAD:
        return {}, card
    try:
        metadata = yaml.load(found[1], _PlainLoader)
        yaml.safe_dump(metadata)  # numbers of thousands of digits can be read, and not be written
    except (yaml.YAMLError, ValueError, RecursionError):
        return {}, card
    return (metadata, card[found.end() :].lstrip("\r\n")) if isinstance(metadata, dict) else ({}, card)


class _PlainLoader(yaml.SafeLoader):
    """YAML without aliases."""

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        if self.check_event(yaml.AliasEvent):
            raise yaml.YAMLError("an alias")
        return super().compose_node(parent, index)


def render(metadata: Metadata, body: str) -> str:
    """A card of metadata and Markdown."""
    head = yaml.safe_dump(metadata, sort_keys=False, allow_unicode=True, width=1000)
    return f"---\n{head}---\n{body.strip()}\n"


def section(body: str, heading: str) -> str:
    """The text below "## ``heading``", up to the next heading as high; "" where there is none."""
    found = _section(heading).search(body)
    return found[1].strip() if found else ""


def with_section(body: str, heading: str, text: str) -> str:
    """The Markdown with that section at its end, in place of one that it had."""
    return f"{_section(heading).sub('', body).strip()}\n\n## {heading}\n\n{text.strip()}\n"


def hub_id(origin: str) -> str:
    """The repository that ``origin`` names on the Hub, without its revision; "" where it is a path."""
    found = HUB_ID.fullmatch(origin)
    return found["repo"] if found and not Path(origin).exists() else ""


_DATASET = re.compile(r"hf://datasets/([\w.-]+/[\w.-]+)")


def _inherited(old: Metadata, origin: str) -> Metadata:
    """Licence and base model of what was made from a model; ``origin`` is its name on the Hub, where it has one.

    Apple's weights are under Apple's licence where their card states none; where nothing is known nothing is said.
    """
    metadata = {key: old[key] for key in INHERITED if old.get(key)}
    if origin:
        metadata["base_model"] = origin
    if in_one_line(metadata.get("license")) in UNKNOWN:
        metadata.pop("license", None)
        if APPLE.fullmatch(in_one_line(metadata.get("base_model"))):
            metadata["license"] = APPLE_LICENCE
    link = metadata.get("license_link")
    if origin and isinstance(link, str) and "://" not in link:
        metadata["license_link"] = f"{HUB}/{origin}/blob/main/{link}"  # the file itself stays there
    return metadata


def _section(heading: str) -> re.Pattern[str]:
    return re.compile(rf"^## {re.escape(heading)}[ \t]*\r?$(.*?)(?=^\#{{1,2}} |\Z)", re.DOTALL | re.MULTILINE)


def _bullets(text: str) -> list[str]:
    return [line for line in text.splitlines() if line.startswith("- ")]


def _licence(metadata: Metadata) -> str:
    """The licence in words; none is made up."""
    licence = in_one_line(metadata.get("license"))
    name = in_one_line(metadata.get("license_name")) or licence
    if licence in UNKNOWN:
        return "Their licence is not known: the source states none. Ask whoever made them before you pass them on."
    link = in_one_line(metadata.get("license_link"))
    known = f" ({IN_WORDS[licence]})" if licence in IN_WORDS else ""
    return f"Their licence holds here too: {f'[{name}]({link})' if '://' in link else name}{known}."


def _tags(found: object) -> list[str]:
    tags = found if isinstance(found, list) else [found] if isinstance(found, str) else []
    return list(dict.fromkeys([*map(str, tags), *OURS]))


def in_one_line(value: object) -> str:
    """A key's value in one line; the first of several, as base_model may have."""
    value = value[0] if isinstance(value, list) and value else value
    return " ".join(str(value).split()) if isinstance(value, str) else ""


def _result(bits_per_byte: float) -> Metadata:
    return {
        "task": {"type": "text-generation"},
        "dataset": {"type": "held-out", "name": "held-out text of the run"},
        "metrics": [{"type": "bits_per_byte", "value": round(bits_per_byte, 4)}],
    }
