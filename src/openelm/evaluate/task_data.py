"""Where the examples of a task come from: files in a folder, or the Hub through its cache.

A folder is laid out as FOLDER/DATASET/CONFIG/SPLIT.jsonl (or .json, .parquet; CONFIG only where the dataset has
one), with the last part of the dataset's name on the Hub: ai2_arc/ARC-Easy/test.jsonl. Splits in several files,
SPLIT-00000-of-00002.parquet, are read in the order of their names, so a dataset's own repository will do.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

from openelm.data import records
from openelm.data.backends import is_passing
from openelm.errors import UserError

ANSWER_S = 10.0  # for the Hub's first answer; datasets itself tries again and again for minutes
SHORT_NAMES = {"crows_pairs_multilingual": "crows_pairs"}
ENDINGS = (".jsonl", ".json", ".parquet")  # a CSV knows neither lists nor whether 1 is a number


def folder_of(data: Path, dataset: str, config: str | None) -> Path | None:
    """The folder of a dataset below ``data``; None where there is none."""
    name = dataset.rsplit("/", 1)[-1]
    for known in (name, SHORT_NAMES.get(name, name)):
        folder = data / known / (config or "")
        if folder.is_dir() and any(file.suffix in ENDINGS for file in folder.iterdir()):
            return folder
    return None


class Splits(Mapping[str, Any]):
    """The splits of a dataset in a folder, each read when it is asked for: as datasets' DatasetDict, but lazy.

    ``latest`` is the file that was read last: what goes wrong after that is about it. UserError: no such split.
    """

    def __init__(self, folder: Path, task: str) -> None:
        self.folder, self.task, self.latest = folder, task, folder
        self._read: dict[str, Any] = {}

    def files(self, split: str) -> list[Path]:
        """The files of a split, in order; more than one kind of file is refused."""
        named = [file for file in sorted(self.folder.iterdir()) if file.suffix in ENDINGS]
        found = [file for file in named if file.stem == split or file.name.startswith(f"{split}-")]
        if len({file.suffix for file in found}) > 1:
            raise UserError(f"{self.task}: {', '.join(map(str, found))} are one split: keep files of one kind")
        return found

    def __getitem__(self, split: str) -> Any:
        files = self.files(split)
        if not files:
            there = ", ".join(sorted(file.name for file in self.folder.iterdir())) or "nothing"
            raise UserError(
                f"{self.task} needs {self.folder / split}.jsonl, and there is {there}: put that split there (.json "
                "or .parquet will do), or leave out --data to take it from the Hub"
            )
        self.latest = files[0]
        if split not in self._read:
            self._read[split] = dataset([record for file in files for record in records.read(str(file))], files[0])
        return self._read[split]

    def __iter__(self) -> Iterator[str]:
        return iter({file.stem.split("-")[0] for file in self.folder.iterdir() if file.suffix in ENDINGS})

    def __len__(self) -> int:
        return len(list(iter(self)))


def dataset(rows: list[dict[str, Any]], path: Path | None = None) -> Any:
    """Records as a ``datasets.Dataset`` in memory; nothing is written to its cache."""
    from datasets import Dataset

    if not rows:
        raise UserError(f"{path} has no record: fetch it again")
    try:
        return Dataset.from_list(rows)
    except (TypeError, ValueError) as error:  # of pyarrow
        raise UserError(f"{path}: a column holds values of several kinds ({error}): write them alike") from error


def examples_file(task: Any) -> Path | None:
    """The local file that examples come from, by lm-eval's rule; None where data are not local."""
    if not isinstance(task.dataset, Splits):
        return None
    config = task.config
    split = task.fewshot_cfg.split or config.training_split or config.validation_split or config.test_split
    return next(iter(task.dataset.files(split)), None)


def check_columns(task: Any, docs: Any, file: Path) -> None:
    """UserError where a column that the task reads is not in its file, or empty in a record.

    lm-eval would take the missing one's name for the answer, and print the empty one as "None".
    """
    there = docs[0].keys()
    read = _template_columns(task) & there

    class Noted(dict[str, Any]):
        def __getitem__(self, column: str) -> Any:
            read.add(column)
            return super().__getitem__(column)

    for part in _prompt_parts(task):
        if callable(part):
            part(Noted(docs[0]))
        elif isinstance(part, str) and part.isidentifier():
            read.add(part)
    for column in sorted(read):
        if column not in there:
            raise KeyError(column)
        values = [doc[column] for doc in docs] if isinstance(docs, list) else docs[column]
        empty = next((number for number, value in enumerate(values, start=1) if value is None), None)
        if empty:
            raise UserError(f"{file}: record {empty} has no {column!r}, which the task {task.config.task} needs")


def check_answers(task: Any, docs: Any, file: Path) -> None:
    """UserError where the right answer of a question is none of its choices: lm-eval would count it as never given."""
    if task.OUTPUT_TYPE != "multiple_choice" or task.multiple_input or task.config.process_results is not None:
        return
    for number, doc in enumerate(docs, start=1):
        choices, right = task.doc_to_choice(doc), task.doc_to_target(doc)
        for one in right if isinstance(right, list) else [right]:
            if one not in (range(len(choices)) if isinstance(one, int) else choices):
                raise UserError(
                    f"{file}: record {number}: the right answer {one!r} is neither a number from 0 to "
                    f"{len(choices) - 1} nor one of the choices {choices}: mend the record"
                )


def _prompt_parts(task: Any) -> tuple[Any, ...]:
    return task.config.doc_to_text, task.config.doc_to_target, task.config.doc_to_choice


def _template_columns(task: Any) -> set[str]:
    """What the templates of a task mention; some of it only to ask whether it is there."""
    from jinja2 import Environment, meta

    templates = [part for part in _prompt_parts(task) if isinstance(part, str)]
    return {name for template in templates for name in meta.find_undeclared_variables(Environment().parse(template))}


def complaint(task: Any, error: Exception, place: Any, columns: Iterable[str]) -> UserError:
    """About a column that a prompt needs and that a file, which has ``columns``, lacks; or about a bad value."""
    from jinja2 import UndefinedError

    name = task.config.task
    is_lookup = isinstance(error, KeyError | UndefinedError)
    found = re.search(r"'(\w+)'( is undefined)?$", str(error)) if is_lookup else None
    # In a list, a template's unknown names become nonsense instead of an error.
    missing = found[1] if found else next(iter(sorted(_template_columns(task) - set(columns))), None)
    if missing:
        return UserError(f"{place} has no column {missing!r}, which the task {name} needs: rename yours, or add it")
    words = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
    return UserError(f"{place} does not fit the task {name} ({words}): write it as {task.config.dataset_path} has it")


@contextmanager
def hub(repo: str, task: str) -> Iterator[None]:
    """Within it datasets reads ``repo`` from the Hub, or at once from the cache where the Hub does not answer.

    UserError, one line, for all that is refused: no network and not in the cache, no such dataset, a gate.
    """
    import datasets
    from huggingface_hub import constants

    silent = "HF_HUB_OFFLINE is set" if constants.HF_HUB_OFFLINE else _silence(constants.ENDPOINT)
    before = constants.HF_HUB_OFFLINE, datasets.config.HF_HUB_OFFLINE
    if silent:
        # Both have read HF_HUB_OFFLINE long ago: at import.
        constants.HF_HUB_OFFLINE = datasets.config.HF_HUB_OFFLINE = True
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        raise UserError(_refusal(error, repo, task, silent)) from error
    finally:
        constants.HF_HUB_OFFLINE, datasets.config.HF_HUB_OFFLINE = before


@cache
def _silence(endpoint: str) -> str:
    """Why the Hub does not answer, "" where it does: asked once for all tasks of a process."""
    from huggingface_hub import get_session

    try:
        get_session().head(endpoint, timeout=ANSWER_S)
    except Exception as error:
        return f"{endpoint} does not answer ({' '.join(str(error).split())[:120] or type(error).__name__})"
    return ""


def _refusal(error: Exception, repo: str, task: str, silent: str) -> str:
    from datasets.exceptions import DatasetNotFoundError
    from huggingface_hub import constants

    words = " ".join(str(error).split())[:200]
    if silent:
        return f"{task}: {repo} is not in the cache ({constants.HF_HOME}), and {silent}: {prefetch_help(task)}"
    if isinstance(error, DatasetNotFoundError):
        page = f"{constants.ENDPOINT}/datasets/{repo}"
        return f"{task}: {words}: where it is gated, ask for access on {page} and set HF_TOKEN; or give --data FOLDER"
    if is_passing(error):
        return f"{task}: {repo} broke off ({words}): run the same command again, what is there is kept"
    return f"{task}: {repo} cannot be loaded ({type(error).__name__}: {words}): give its files with --data FOLDER"


def prefetch_help(task: str) -> str:
    """What to do on a machine without a network."""
    return (
        f"on one with a network run `openelm evaluate --tasks {task} --prefetch`, copy its HF_HOME and OPENELM_CACHE "
        "here and set HF_HUB_OFFLINE=1; or give --data FOLDER"
    )


@contextmanager
def quiet() -> Iterator[None]:
    """Without lm-eval's remarks on its own task files, and the progress bars of work on local examples."""
    import datasets

    log = logging.getLogger("lm_eval")
    level, bars = log.level, datasets.are_progress_bars_disabled()
    log.setLevel(logging.ERROR)
    datasets.disable_progress_bars()
    try:
        yield
    finally:
        log.setLevel(level)
        if not bars:
            datasets.enable_progress_bars()
