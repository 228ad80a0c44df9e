"""What the page of a tuning run says otherwise than that of pre-training: of examples, pairs, adapters."""

from __future__ import annotations

from functools import partial
from pathlib import Path

from openelm.report import plots
from openelm.report.markup import card, fates, part, plot_grid, shown, table
from openelm.report.plots import Line
from openelm.report.run_files import Record, RunFiles, column, finite, number, section, tokens_at

TOTAL, CUT = "records", ("cut_prompts", "cut_answers")  # of the account, what is no fate of a record
PRESSURE = ("beta", "label_smoothing")  # of a preference's loss
# Figures of held-out examples, in the order of the table's columns.
SCORES = {
    "loss": "loss",
    "accuracy": "accuracy",
    "reward_chosen": "reward of chosen",
    "reward_rejected": "of rejected",
    "margin": "margin",
    "tokens": "tokens",
    "pairs": "pairs",
}


def score(files: RunFiles) -> tuple[str, str, str]:
    """The best held-out figure: what it is called, the value, and whose it is."""
    scores = files.held_out()
    accuracies = {
        label: value for label, found in scores.items() if (value := number(found.get("accuracy"))) is not None
    }
    if accuracies:
        best = max(accuracies, key=accuracies.__getitem__)
        error = number(scores[best].get("accuracy_stderr"))
        around = "" if error is None else f" ± {error:.1%}"
        return "Held-out accuracy", f"{accuracies[best]:.1%}", f"{around} ({best})".strip()
    losses = {label: value for label, found in scores.items() if (value := number(found.get("loss"))) is not None}
    best = min(losses, key=losses.__getitem__, default="")
    return "Held-out loss", best and f"{losses[best]:.3f}", f"best: {best}"


def learning(files: RunFiles, folder: Path) -> str:
    """Losses; of pairs, how often the chosen answer is preferred, and by how much."""
    train, checks = files.of_kind("train"), files.of_kind("validation")
    if not train:
        return part("Learning curve", "Nothing has been logged yet.", "")

    def trained(key: str, label: str = "training") -> Line:
        return Line(label, tokens_at(files, train), column(train, key), smooth=True)

    def checked(key: str, label: str = "held out") -> Line:
        errors = column(checks, f"{key}_stderr")
        return Line(label, tokens_at(files, checks), column(checks, key), errors if finite(errors) else ())

    note = "Pale: as logged; dark: running mean."
    preference = section(files.config, "preference")
    if not preference:
        # Held-out answers are measured without the z-loss.
        key = "cross_entropy" if finite(column(train, "cross_entropy")) else "loss"
        figures = [_figure(folder, "loss", "Loss (nats per token)", [trained(key), checked("loss")])]
        return part("Learning curve", note, plot_grid(figures))
    rewards, where = (checked, "held-out pairs") if checks else (trained, "training")
    both = [rewards(f"reward_{name}", name) for name in ("chosen", "rejected")]
    figures = [
        _figure(folder, "loss", f"Loss ({preference.get('loss')}, a pair)", [trained("loss"), checked("loss")]),
        _figure(folder, "accuracy", "Chosen preferred (share)", [trained("accuracy"), checked("accuracy")], level=0.5),
        _figure(folder, "rewards", f"Rewards, {where}", both, level=0.0),
        _figure(folder, "margin", "Margin between rewards", [trained("margin"), checked("margin")], level=0.0),
    ]
    note += " A reward is beta times the logarithm of how much likelier an answer has become than the reference has it."
    note += " Bars are standard errors."
    return part("Learning curve", note, plot_grid(figures))


def _figure(folder: Path, name: str, title: str, lines: list[Line], level: float | None = None) -> str:
    """A picture of the lines that have any point; nothing where none has."""
    lines = [line for line in lines if finite(line.y)]
    if not lines:
        return ""
    ends = []
    for line in lines:
        values = finite(plots.running_mean(line.y) if line.smooth else line.y)
        ends.append(f"{line.label} from {values[0]:.3g} to {values[-1]:.3g}")
    alt = f"{title}: {', '.join(ends)}."
    return plots.embed(folder, name, partial(plots.draw_lines, title, lines, "tokens seen", level=level), alt)


def held_out(files: RunFiles) -> str:
    """The models of the run on examples that none of them was trained on."""
    scores = files.held_out()
    keys = [key for key in SCORES if any(number(found.get(key)) is not None for found in scores.values())]
    if not keys:
        return ""
    rows = [[label, *(_cell(found, key) for key in keys)] for label, found in scores.items()]
    note = "Examples that were not trained on; no prompt of theirs was."
    if "averaged" in scores:
        note += " The averaged weights are in model/, the last ones in model-last/."
    return part("Held-out examples", note, card(table(rows, ["model", *(SCORES[key] for key in keys)], "counts")))


def _cell(found: Record, key: str) -> str:
    value, error = number(found.get(key)), number(found.get(f"{key}_stderr"))
    if value is None:
        return "-"
    if isinstance(value, int):
        return shown(value)
    return f"{value:.4f}" + ("" if error is None else f" ± {error:.4f}")


def trained(files: RunFiles, parameters: int) -> str:
    """From which model, what of it, and by what loss; ``parameters`` are those of the adapter, where one is trained."""
    config = files.config
    adapter, preference, data = (section(config, key) for key in ("adapter", "preference", "data"))
    rows = [["base model", shown(section(config, "model").get("path", ""))]]
    if adapter:
        settings = ", ".join(f"{key} {_plain(adapter[key])}" for key in ("r", "alpha", "dropout") if adapter.get(key))
        rows.append(["trained", f"{adapter.get('kind')}: {settings}, on {shown(adapter.get('targets', ''))}"])
        if parameters:
            whole = number(section(config, "geometry").get("num_parameters"))
            share = f", {parameters / whole:.2%} of the model's {whole:,}" if whole else ""
            rows.append(["parameters", f"{parameters:,}{share}"])
    else:
        rows.append(["trained", "all weights"])
    if preference:
        settings = "".join(
            f", {key.replace('_', ' ')} {_plain(preference[key])}" for key in PRESSURE if preference.get(key)
        )
        rows.append(["loss", f"{preference.get('loss')}{settings}"])
    elif data:
        rows.append(["loss", f"next token, of {'answers' if data.get('loss_on') == 'answers' else 'all text'}"])
    for source in data.get("sources") or []:
        if isinstance(source, dict):
            rows.append(
                [f"examples: {source.get('name', '')}", f"{source.get('path', '')} ({source.get('format', '')})"]
            )
    return part("What was trained", "", card(table(rows, kind="environment")))


def _plain(value: object) -> str:
    return f"{value:g}" if isinstance(value, float) else shown(value)


def examples(files: RunFiles) -> str:
    """What became of the records, and how often they were seen."""
    account = {key: value for key, value in files.account.items() if isinstance(value, int)}
    counts = {key: value for key, value in account.items() if value and key not in (TOTAL, *CUT)}
    seen = files.of_kind("examples")
    unit = "pairs" if section(files.config, "preference") else "examples"
    notes = []
    if seen:
        newest = seen[-1]
        epoch, count = number(newest.get("epoch")), number(newest.get("examples"))
        if epoch is not None and count is not None:
            notes.append(f"{_plain(round(epoch, 4))} epochs of {count:,} {unit} by step {newest['step']:,}.")
    if cuts := [f"{account[key]:,} {key.removeprefix('cut_')}" for key in CUT if account.get(key)]:
        notes.append(f"Too long, and cut: {' and '.join(cuts)}.")
    if not notes and not counts:
        return ""
    return part("Examples", " ".join(notes), fates("records", counts, account.get(TOTAL, 0)) if counts else "")
