"""Tasks ready to be measured: lm-eval decides prompts and metrics, here their data and examples are put in.

lm-eval and datasets are imported inside the functions: reading names and refusing mistakes needs neither.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator
from copy import deepcopy
from dataclasses import dataclass
from difflib import get_close_matches
from functools import cache, lru_cache
from pathlib import Path
from typing import Any

from openelm.errors import UserError
from openelm.evaluate import commonsense, task_data
from openelm.evaluate.suites import ALL, EQUAL_WEIGHT, Spec, known, suite

SEED = 1234  # of the choice of examples: lm-eval's own default

# Where lm-eval keeps the suites' tasks. Reading all of its 14,000 definitions takes ten seconds or more, these a tenth.
FOLDERS = (
    *("arc", "bbq", "crows_pairs", "hellaswag", "mmlu/default", "piqa", "race", "sciq", "super_glue/boolq", "toxigen"),
    *("truthfulqa", "winogrande"),
)

_GROUP_KEYS = {"group", "group_alias", "task", "aggregate_metric_list", "metadata"}


@dataclass(frozen=True)
class Fetched:
    """What a prefetch has put in the cache for one task."""

    task: str
    bytes: int
    examples: int


def parse(text: str) -> tuple[Spec, ...]:
    """``"arc_easy,winogrande@5"`` as specs; without @N lm-eval's own number of examples, which mostly is 0.

    lm-eval's tags ("ai2_arc") are the tasks that bear them. Metric and title are those of the suites where they show
    the task, else its first metric and its name. UserError: an unknown task (with the nearest names), a bad count.
    """
    found: dict[tuple[str, int], Spec] = {}
    for word in filter(None, (part.strip() for part in text.split(","))):
        name, at, count = word.partition("@")
        if at and not re.fullmatch(r"[0-9]{1,4}", count):
            raise UserError(f"{word!r}: behind @ stands the number of examples before each question, as in {name}@5")
        for spec in _specs(name, int(count) if at else None):
            found[spec.task, spec.shots] = spec
    if not found:
        raise UserError("--tasks names no task: write names with commas between them, as in arc_easy,winogrande@5")
    return tuple(found.values())


def load(spec: Spec, data: Path | None = None, *, seed: int = SEED) -> dict[str, Any]:
    """What ``lm_eval.evaluator.evaluate`` takes: ``{"tasks", "groups", "group_map"}``, examples chosen as lm-eval does.

    With ``data`` all comes from that folder (see task_data.py), without it from the Hub or its cache.
    UserError: unknown task, no data, a column that is missing, fewer examples than asked for, lm-eval not installed.
    """
    with quiet():
        _keep_templates()
        if spec.task in commonsense.SETS:
            tasks = {spec.task: commonsense.load(spec, data)}
            loaded: dict[str, Any] = {"tasks": tasks, "groups": {}, "group_map": {}}
        else:
            loaded = _load(spec, data)
        for task in loaded["tasks"].values():
            _set_shots(task, spec, seed)
    if spec.task in EQUAL_WEIGHT and spec.task in loaded["groups"]:
        for metric in loaded["groups"][spec.task].aggregate_metric_list or ():
            metric.weight_by_size = False
    return loaded


def prefetch(specs: Iterable[Spec], done: Callable[[Fetched], None] = lambda _: None) -> list[Fetched]:
    """Download what these tasks read into the cache; a UserError at the end names all that could not be had."""
    fetched: dict[str, Fetched] = {}
    problems = []
    for spec in specs:
        if spec.task in fetched:
            continue
        try:
            if spec.task in commonsense.SETS:
                fetched[spec.task] = Fetched(spec.task, *commonsense.prefetch(spec.task))
            else:
                parts = [part for task in load(spec)["tasks"].values() for part in task.dataset.values()]
                fetched[spec.task] = Fetched(spec.task, sum(p.data.nbytes for p in parts), sum(map(len, parts)))
            done(fetched[spec.task])
        except UserError as error:
            problems.append(str(error))
    if problems:
        raise UserError("; ".join(problems))
    return list(fetched.values())


def available(data: Path) -> list[str]:
    """Tasks of our suites for which a folder has files."""
    found = []
    for task in dict.fromkeys(spec.task for spec in suite(ALL)):
        if task in commonsense.SETS:
            name = commonsense.SETS[task]
            there = any((data / place / name / "test.json").is_file() for place in ("commonsense", "."))
        else:
            there = all(_folder(data, entry.cfg) for entry in _leaves(_manager(task), task))
        if there:
            found.append(task)
    return found


def quiet() -> Any:
    """See ``task_data.quiet``; a UserError where lm-eval is not installed."""
    try:
        import lm_eval  # noqa: F401
    except ImportError as error:
        raise UserError("evaluation needs lm-eval: pip install 'openelm-framework[eval]'") from error
    return task_data.quiet()


def _specs(name: str, shots: int | None) -> Iterator[Spec]:
    if name in commonsense.SETS:
        column = known(name)
        assert column, "every set is in the suite"
        yield Spec(name, column.metric, shots or 0, column.title)
        return
    with quiet():
        manager = _manager(name)
    if name in manager.all_tags:
        for member in sorted(manager.task_index[name].tags):
            yield from _specs(member, shots)
        return
    config = manager.task_index[name].cfg
    metrics = config.get("metric_list") or config.get("aggregate_metric_list") or [{"metric": "acc"}]
    column = known(name)
    numbers = {leaf.cfg.get("num_fewshot") or 0 for leaf in _leaves(manager, name)} or {0}
    if shots is None and len(numbers) > 1:
        wanted = ", ".join(map(str, sorted(numbers)))
        raise UserError(
            f"the tasks of {name} have different numbers of examples ({wanted}): say one for all, as in {name}@5"
        )
    own = min(numbers)
    yield Spec(
        name,
        column.metric if column else str(metrics[0]["metric"]),
        own if shots is None else shots,
        column.title if column else name,
    )


@cache
def _index(everything: bool) -> Any:
    """lm-eval's index of tasks: of the folders that our suites need, or of all."""
    import lm_eval.tasks

    if everything:
        return lm_eval.tasks.TaskManager()
    root = Path(lm_eval.tasks.__file__).parent
    return lm_eval.tasks.TaskManager(include_defaults=False, include_path=[root / name for name in FOLDERS])


def _manager(task: str) -> Any:
    """An index that has the task; UserError with the nearest names where lm-eval has none of that name."""
    if task in _index(False).task_index:
        return _index(False)
    manager = _index(True)
    if task not in manager.task_index:
        names = [*manager.all_tasks, *commonsense.SETS]
        near = " or ".join(get_close_matches(task, names, n=3, cutoff=0.5)) or "a name that `lm_eval ls tasks` lists"
        raise UserError(f"there is no task {task!r}: did you mean {near}?")
    return manager


def _members(manager: Any, name: str) -> list[str]:
    """The tasks and groups of a group, a tag's tasks in its place; "" for what is defined inside the group."""
    found = []
    for member in manager.task_index[name].cfg.get("task") or []:
        is_tag = isinstance(member, str) and member in manager.all_tags
        found += sorted(manager.task_index[member].tags) if is_tag else [member if isinstance(member, str) else ""]
    return found


def _leaves(manager: Any, name: str) -> list[Any]:
    """lm-eval's definitions of a task, or of all tasks of a group."""
    if name in manager.all_groups:
        return [leaf for member in _members(manager, name) for leaf in _leaves(manager, member)]
    return [manager.task_index[name]] if name in manager.task_index else []


def _folder(data: Path, config: dict[str, Any]) -> Path | None:
    dataset = config.get("dataset_path")
    return task_data.folder_of(data, dataset, config.get("dataset_name")) if dataset else None


def _load(spec: Spec, data: Path | None) -> dict[str, Any]:
    """The task, or all of a group and the group around them."""
    manager = _manager(spec.task)
    if spec.task in manager.all_tags:
        members = ", ".join(sorted(manager.task_index[spec.task].tags))
        raise UserError(f"{spec.task} is no task but a name for several: {members}")
    if not _is_plain(manager, spec.task):
        if data is not None:
            raise UserError(f"{spec.task} gets its data by code of its own: leave out --data")
        with task_data.hub(spec.task, spec.task):
            return dict(manager.load(spec.task))
    # In a group of our own, because there lm-eval lets a task be given another class.
    leaves = [{"task": leaf.name, "class": _task_class(spec, data)} for leaf in _leaves(manager, spec.task)]
    tasks = manager.load({"group": "openelm", "task": leaves})["tasks"]
    groups: dict[str, Any] = {}
    if spec.task in manager.all_groups:
        _add_group(manager, spec.task, tasks, groups)
    return {"tasks": tasks, "groups": groups, "group_map": {name: group.child_names for name, group in groups.items()}}


def _is_plain(manager: Any, name: str) -> bool:
    """Whether a task is made from YAML alone, and a group from names alone: what we can put together ourselves."""
    entry = manager.task_index.get(name)
    if entry is None or "class" in (entry.cfg or {}):
        return False
    if name not in manager.all_groups:
        return True
    return entry.cfg.keys() <= _GROUP_KEYS and all(_is_plain(manager, member) for member in _members(manager, name))


def _add_group(manager: Any, name: str, tasks: dict[str, Any], groups: dict[str, Any]) -> Any:
    from lm_eval.api.group import Group

    group = Group.from_config(deepcopy(manager.task_index[name].cfg))
    groups[name] = group
    for member in _members(manager, name):
        group.add(_add_group(manager, member, tasks, groups) if member in manager.all_groups else tasks[member])
    return group


def _keep_templates() -> None:
    """lm-eval compiles its templates again for each document, which takes longer than small models need to answer."""
    from lm_eval import utils

    if not hasattr(utils.env.from_string, "cache_info"):
        utils.env.from_string = lru_cache(maxsize=1024)(utils.env.from_string)


@cache
def _task_class(spec: Spec, data: Path | None) -> Any:
    """lm-eval's task from a YAML file, with our errors: about the Hub, and about files in ``data``."""
    from jinja2 import UndefinedError
    from lm_eval.api.task import ConfigurableTask

    class SpecTask(ConfigurableTask):
        def __init__(self, config: dict[str, Any]) -> None:
            try:
                super().__init__(config={key: value for key, value in config.items() if key != "class"})
                if data is not None:
                    task_data.check_columns(self, self.eval_docs, self.dataset.latest)
                    task_data.check_answers(self, self.eval_docs, self.dataset.latest)
            except UserError:
                raise
            except Exception as error:
                if data is None and not isinstance(error, KeyError | UndefinedError):
                    raise
                place = getattr(self.dataset, "latest", self.config.dataset_path)
                raise task_data.complaint(self, error, place, getattr(self, "features", ())) from error

        def download(self, dataset_kwargs: dict[str, Any] | None = None, **kwargs: Any) -> None:
            name, repo = self.config.task, self.config.dataset_path
            if data is None:
                with task_data.hub(repo or name, spec.task):
                    super().download(dataset_kwargs, **kwargs)
                return
            folder = _folder(data, {"dataset_path": repo, "dataset_name": self.config.dataset_name})
            if folder is None:
                wanted = Path(str(repo or name).rsplit("/", 1)[-1], self.config.dataset_name or "")
                tasks = available(data)
                has = ", ".join(tasks[:6]) + (f" and {len(tasks) - 6} more" if tasks[6:] else "") or "no task of ours"
                raise UserError(f"{name}: {data} has no {wanted} with its files; it has data for {has}")
            self.dataset = task_data.Splits(folder, name)

        def fewshot_docs(self) -> Any:
            # Without examples their split is not read: it may be large, or not be there.
            return super().fewshot_docs() if spec.shots else None

    return SpecTask


def _set_shots(task: Any, spec: Spec, seed: int) -> None:
    """What simple_evaluate does before it evaluates; and the first prompt is made, so that bad examples show here."""
    name = task.config.task
    if task.get_config("num_fewshot") == 0 and spec.shots:
        raise UserError(f"{name} brings its own examples, or takes none: write {spec.task}@0")
    task.set_config(key="num_fewshot", value=spec.shots)
    task.set_fewshot_seed(seed=seed)
    if not spec.shots:
        return
    there = len(task.sampler.df)
    file = task_data.examples_file(task)
    try:
        if file:
            task_data.check_columns(task, task.sampler.df, file)
        task.fewshot_context(task.eval_docs[0], num_fewshot=spec.shots)
    except UserError:
        raise
    except Exception as error:
        if there <= spec.shots:  # the question itself may be one of them
            raise UserError(f"{name}: {spec.shots} examples cannot be had of {there}: ask for fewer") from error
        if file is None:
            raise
        raise task_data.complaint(task, error, file, task.sampler.df[0]) from error
    task.set_fewshot_seed(seed=seed)
