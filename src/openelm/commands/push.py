"""openelm push: a run, or a model, on the Hugging Face Hub; of a run also its checkpoints, logs and recipe."""

from __future__ import annotations

import argparse
import json
import re
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from openelm.errors import UserError

if TYPE_CHECKING:
    from openelm.interop.source import Source
    from openelm.model.geometry import ModelConfig
    from openelm.train.checkpoint import Checkpoints

HELP = "Publish a run (model, checkpoints, recipe, logs) or a model folder on the Hugging Face Hub."
EXAMPLE = "openelm push runs/demo OWNER/demo --private --dry-run"
RECIPE = ("config.yaml", "environment.json", "data.json")
LOGS = ("metrics.jsonl", "summary.json", "report")
# Weights of an earlier push that the new model does not have would be read along with it.
ADAPTER = "adapter"  # not at the top, where transformers would take the model for one without weights
OUTDATED = ("model*.safetensors", "model.safetensors.index.json", f"{ADAPTER}/adapter_*")
TEXT = {".jsonl", ".json", ".yaml", ".html", ".md", ".txt", ".css"}


@dataclass(frozen=True)
class Revision:
    """A branch of the repository: what will stand in it (bytes by name), and how that is written into a folder."""

    name: str
    message: str
    files: dict[str, int]
    fill: Callable[[Path], None]
    replaces: tuple[str, ...]

    @property
    def bytes(self) -> int:
        """The size of all its files."""
        return sum(self.files.values())


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of ``openelm push``."""
    parser.add_argument("source", metavar="RUN|MODEL", help="run folder, or model folder")
    parser.add_argument("repo", metavar="REPO", help="OWNER/NAME on the Hub; made where it is not there")
    parser.add_argument("--private", action="store_true", help="make the repository private")
    parser.add_argument("--revision", default="main", metavar="R", help="branch for the model (default: main)")
    parser.add_argument("--message", metavar="M", help="message of the commit")
    parser.add_argument(
        "--milestones",
        default="all",
        metavar="N,..",
        help="steps of a run's checkpoints to publish, all or none (default: all that the run kept)",
    )
    parser.add_argument("--no-logs", action="store_true", help="leave out metrics.jsonl, summary.json and report/")
    parser.add_argument("--dry-run", action="store_true", help="list what would go where; ask the Hub nothing")
    parser.add_argument("--json", action="store_true", help="what was published as one JSON object")


def run(args: argparse.Namespace) -> int:
    """Plan, make the repository, then send one revision after the other."""
    from openelm.files import remove_drafts
    from openelm.interop import hub

    if "@" in args.repo:
        raise UserError(f"{args.repo}: write OWNER/NAME, and the branch with --revision")
    hub.split_reference(args.repo)
    hub.check_branch(args.revision)
    source = Path(args.source)
    plan = planned(args, source)
    url = ""
    if not args.dry_run:
        if is_run(source):
            remove_drafts(source, "push")
        url = hub.create(args.repo, private=args.private)
        for revision in plan:
            with draft_in(source) as draft:
                revision.fill(draft)
                hub.upload(draft, args.repo, revision.name, revision.message, replaces=revision.replaces)
            if not args.json:
                print(f"{revision.name}: {len(revision.files)} files, {in_words(revision.bytes)}", flush=True)
    report(args, plan, url)
    return 0


def is_run(folder: Path) -> bool:
    """Whether this is a run folder, and no model folder."""
    return not (folder / "config.json").is_file() and (folder / "config.yaml").is_file()


def planned(args: argparse.Namespace, source: Path) -> list[Revision]:
    """All that would be sent, the model first; UserError for what cannot be published."""
    from openelm.model.folder import refuse_adapter

    if is_run(source):
        model = source / "model"
        if not (model / "config.json").is_file():
            raise UserError(
                f"{source} has no model/ yet: let the run finish (--resume), or make one of its checkpoints with "
                f"`openelm average {source}`, and push that"
            )
        steps = chosen_steps(args.milestones, source)
        logs = run_files(source, with_logs=not args.no_logs)
    elif (source / "config.json").is_file():
        if (source / "manifest.json").is_file():
            raise UserError(f"{source} is a checkpoint: push its run, with --milestones and the step")
        if args.milestones not in ("all", "none"):
            raise UserError(f"--milestones {args.milestones}: {source} is a model folder, which has no checkpoints")
        model, steps, logs = source, [], {}
    else:
        refuse_adapter(source)
        raise UserError(f"{source} is neither a run folder nor a model folder: give one, and then OWNER/NAME")
    if args.revision in [f"step-{step}" for step in steps]:
        raise UserError(f"--revision {args.revision} is the branch of a checkpoint: name the model's otherwise")
    first = planned_model(args, source, model, logs, [f"step-{step}" for step in steps])
    others = ("run/", "model.safetensors", "model-")
    beside = {name: size for name, size in first.files.items() if not name.startswith(others)}
    base = base_of(source, steps)
    return [first, *(planned_milestone(args.repo, source, step, beside, base) for step in steps)]


def planned_model(
    args: argparse.Namespace, source: Path, model: Path, logs: dict[str, Path], milestones: Sequence[str]
) -> Revision:
    """The model folder, and what of the run goes with it."""
    from openelm import __version__
    from openelm.environment import DISTRIBUTION
    from openelm.interop.card import UNKNOWN, in_one_line, parse, published_card
    from openelm.interop.source import open_folder
    from openelm.model.folder import load_config

    card = open_folder(model).card or ""
    if in_one_line(parse(card)[0].get("license")) in UNKNOWN:
        print(
            f"{model / 'README.md'} states no licence, so nobody may use the model: put `license: ...` at its top, "
            "between two lines of dashes",
            file=sys.stderr,
        )
    name = args.repo.rpartition("/")[2]
    adapter = source / ADAPTER if is_run(source) and (source / ADAPTER).is_dir() else None
    contents = in_this_repository(args, logs, milestones, quantized=is_quantized(model), adapter=adapter)

    def fill(draft: Path) -> None:
        lay_out(model, draft)
        if adapter is not None:
            lay_out_adapter(adapter, load_config(model)[0], draft)
        text = published_card(card, name, contents, only="mlx" if is_quantized(model) else "")
        (draft / "README.md").write_text(without_secrets(text), encoding="utf-8")
        for place, file in logs.items():
            (draft / place).parent.mkdir(parents=True, exist_ok=True)
            copy_without_secrets(file, draft / place)

    with tempfile.TemporaryDirectory() as folder:  # all but the weights is small: what it comes to is looked at
        draft = Path(folder)
        fill(draft)
        files = sorted(file for file in draft.rglob("*") if file.is_file())
        sizes = {file.relative_to(draft).as_posix(): file.stat().st_size for file in files}
    message = args.message or f"{source.resolve().name}, by {DISTRIBUTION} {__version__}"
    return Revision(args.revision, message, sizes, fill, OUTDATED)


def planned_milestone(repo: str, run: Path, step: int, beside: dict[str, int], base: Source | None) -> Revision:
    """A checkpoint as a model, in the dtype of the run's model and with the small files ``beside`` it.

    One of an adapter goes up merged into ``base``, and by itself too, as the run's model does.
    """
    from openelm.interop.card import milestone_card
    from openelm.interop.source import Source, read_text
    from openelm.model.folder import load_config, write_model
    from openelm.train.checkpoint import open_checkpoint
    from openelm.tune.adapters import merged

    model, path = run / "model", checkpoints(run).path(step)
    config, dtype = load_config(path)[0], load_config(model)[1]
    if base is not None:
        base = replace(base, config=config)  # its tokenizer is the run's
        config = merged(base, path, untie=True).config

    def fill(draft: Path) -> None:
        opened = open_checkpoint(path)
        lay_out(model, draft, weights=False)
        if base is None:
            source = Source(origin=str(path), config=opened.config, dtype=dtype, read=opened.read_weight)
        else:
            source = merged(base, path, untie=True)
            lay_out_adapter(path, opened.config, draft)
        write_model(draft, source.config, source.weight, dtype)
        complete(draft)
        tokens = opened.states()[0].get("tokens")
        card = milestone_card(read_text(model / "README.md") or "", repo.rpartition("/")[2], step, tokens)
        (draft / "README.md").write_text(without_secrets(card), encoding="utf-8")

    sizes = {**beside, "model.safetensors": config.num_parameters() * dtype.itemsize}
    return Revision(f"step-{step}", f"Step {step}", sizes, fill, ("*",))


def base_of(run: Path, steps: Sequence[int]) -> Source | None:
    """The model that a run's checkpoints are adapters of, if they are; UserError where it is gone, or another now."""
    from openelm.interop.adapter import CONFIG, read_config
    from openelm.interop.convert import open_source
    from openelm.tune.beginning import is_base

    first = checkpoints(run).path(steps[0]) if steps else run
    if not (first / CONFIG).is_file():
        return None
    try:
        base = open_source(read_config(first)[1])
        if not is_base(run, base):
            raise UserError(f"{base.origin} is another model now than {run} began from")
    except UserError as error:
        raise UserError(
            f"{first} holds an adapter, which is published with the model that it belongs to ({error}): put that "
            "model back, or pass --milestones none"
        ) from error
    return base


def lay_out_adapter(folder: Path, config: ModelConfig, draft: Path) -> None:
    """Write a draft's adapter/ from an adapter's folder; a base that is no name on the Hub tells others nothing."""
    from openelm.interop.adapter import open_adapter, read_config, read_tensor, write_adapter
    from openelm.interop.card import hub_id

    adapter, stored = open_adapter(folder, config)
    (draft / ADAPTER).mkdir()
    read = partial(read_tensor, folder, stored)
    write_adapter(draft / ADAPTER, adapter, config, read, hub_id(read_config(folder)[1]), "")


def checkpoints(run: Path) -> Checkpoints:
    """Those of a run, to be read."""
    from openelm.train.checkpoint import Checkpoints

    return Checkpoints(run / "checkpoints", keep_last=1)


def chosen_steps(wanted: str, run: Path) -> list[int]:
    """The steps that --milestones names; UserError for one that the run has not kept."""
    there = checkpoints(run).steps()
    if wanted in ("all", "none"):
        return there if wanted == "all" else []
    try:
        steps = sorted({int(word) for word in wanted.split(",")})
    except ValueError as error:
        raise UserError(f"--milestones {wanted}: give all, none, or steps such as 5000,10000") from error
    if missing := [step for step in steps if step not in there]:
        raise UserError(f"{run} has no checkpoint of step {missing[0]}: there are {there or 'none'}")
    return steps


def run_files(run: Path, *, with_logs: bool) -> dict[str, Path]:
    """What a run tells about itself: place in the repository -> file."""
    files = [run / name for name in (RECIPE + LOGS if with_logs else RECIPE)]
    files += sorted((run / "report").rglob("*")) if with_logs else []
    return {f"run/{file.relative_to(run).as_posix()}": file for file in files if file.is_file()}


def model_files(model: Path) -> list[Path]:
    """The files of a model folder that belong to it: what else stands there is not published, least of all code."""
    from fnmatch import fnmatch

    from openelm.interop.hub import MODEL_FILES
    from openelm.model.stored import safetensors_files

    weights = set(safetensors_files(model, "model"))
    named = [
        file
        for file in sorted(model.iterdir())
        if file.is_file() and any(fnmatch(file.name, pattern) for pattern in MODEL_FILES)
    ]
    return [file for file in named if file.suffix != ".safetensors" or file in weights]


def lay_out(model: Path, draft: Path, *, weights: bool = True) -> None:
    """Fill a draft with the model's files, the large ones by links, and complete it for transformers."""
    for file in model_files(model):
        if file.suffix != ".safetensors":
            if weights or not file.name.endswith(".index.json"):
                shutil.copyfile(file, draft / file.name)
        elif weights:
            try:
                (draft / file.name).symlink_to(file.resolve())
            except OSError:  # Windows asks for a right that few have
                shutil.copyfile(file, draft / file.name)
    if weights:
        complete(draft)


def complete(draft: Path) -> None:
    """Add what transformers needs to open the model without our package; a quantised one it cannot open."""
    from openelm.interop.transformers_folder import complete as complete_folder

    if not is_quantized(draft):
        complete_folder(draft)


def is_quantized(model: Path) -> bool:
    """Whether a model folder is quantised as mlx-lm does it, which transformers cannot open."""
    return "quantization" in json.loads((model / "config.json").read_text(encoding="utf-8"))


def in_this_repository(
    args: argparse.Namespace,
    logs: dict[str, Path],
    milestones: Sequence[str],
    *,
    quantized: bool,
    adapter: Path | None = None,
) -> str:
    """What is where, for the card."""
    branch = "" if args.revision == "main" else f', revision="{args.revision}"'
    lines = [f"- `{args.revision}`: the model."]
    if adapter is not None:
        call = f'PeftModel.from_pretrained(base, "{args.repo}", subfolder="{ADAPTER}"{branch})'
        lines[0] = f"- `{args.revision}`: the model, the adapter merged in."
        lines.append(
            f"- `{ADAPTER}/`: the adapter by itself, for peft: `{call}`, where `base` is the model it was trained on."
        )
    if milestones:
        names = ", ".join(f"`{name}`" for name in milestones)
        lines.append(f'- Checkpoints of the run, each a model: `revision="{milestones[-1]}"` of {names}.')
    if logs:
        lines.append(f"- `run/`: {', '.join(f'`{Path(place).name}`' for place in logs if place.count('/') == 1)}.")
    if "run/report/index.html" in logs:
        lines.append("- `run/report/`: the run as one page, with its curves.")
    call = f'AutoModelForCausalLM.from_pretrained("{args.repo}"{branch}, trust_remote_code=True)'
    opens = f'mlx-lm: `mlx_lm.load("{args.repo}"{branch})`' if quantized else f"transformers: `{call}`"
    return f"Opens in {opens}.\n\n" + "\n".join(lines)


@contextmanager
def draft_in(source: Path) -> Iterator[Path]:
    """A temporary folder: of a run beside its checkpoints, where there is room for a model."""
    from openelm.files import disk_errors_named

    with disk_errors_named(source):
        draft = Path(tempfile.mkdtemp(prefix=".push.tmp-", dir=source if is_run(source) else None))
        try:
            yield draft
        finally:
            shutil.rmtree(draft, ignore_errors=True)


_SECRETS = (
    (re.compile(r"(\w://)[^\s/@\"'<>]+@"), r"\1***@"),  # login and password in an address
    (re.compile(r"((?:[?&]|&amp;)[\w-]*(?:token|key|sig|secret|passw)[\w-]*=)[^&\s\"'<>]+", re.IGNORECASE), r"\1***"),
    (re.compile(r"\bhf_[A-Za-z0-9]{20,}"), "***"),  # a token of the Hub
    (re.compile(r"\bAKIA[A-Z0-9]{16}\b"), "***"),  # an access key of S3
)


def without_secrets(text: str) -> str:
    """A text fit to be published: no credentials, and ~ for the home folder."""
    for pattern, instead in _SECRETS:
        text = pattern.sub(instead, text)
    home = str(Path.home())
    if len(home) > 1:
        for spelling in {home, json.dumps(home)[1:-1]}:
            text = re.sub(rf"(?<![\w.~/\\-]){re.escape(spelling)}(?![\w.-])", "~", text)
    return text


def copy_without_secrets(file: Path, place: Path) -> None:
    """Copy a file, a text line by line."""
    if file.suffix not in TEXT:
        shutil.copyfile(file, place)
        return
    with file.open(encoding="utf-8", errors="replace") as lines, place.open("w", encoding="utf-8") as copy:
        copy.writelines(map(without_secrets, lines))


def in_words(size: int) -> str:
    """A size in the unit that suits it."""
    return f"{size / 1e9:.2f} GB" if size >= 1e9 else f"{size / 1e6:.2f} MB" if size >= 1e6 else f"{size / 1e3:.1f} kB"


def report(args: argparse.Namespace, plan: list[Revision], url: str) -> None:
    """Where it is now, or, in a dry run, all that would go where."""
    total = sum(revision.bytes for revision in plan)
    if args.json:
        found: dict[str, Any] = {"repository": args.repo, "url": url, "private": args.private, "dry_run": args.dry_run}
        revisions = [{"revision": r.name, "bytes": r.bytes, "files": r.files} for r in plan]
        print(json.dumps(found | {"bytes": total, "revisions": revisions}))
        return
    if args.dry_run:
        for revision in plan:
            print(f"{revision.name}: {len(revision.files)} files, {in_words(revision.bytes)}")
            for name, size in revision.files.items():
                print(f"  {in_words(size):>12}  {name}")
        print(f"{args.repo}: {len(plan)} revisions, {in_words(total)} would be sent; nothing was", file=sys.stderr)
        return
    print(f"{url}: {len(plan)} revisions, {in_words(total)}")
