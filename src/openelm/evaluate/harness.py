"""lm-evaluation-harness on our engine: it decides tasks, prompts and metrics, we compute."""

from __future__ import annotations

import hashlib
import io
import json
import logging
import os
import re
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stdout, suppress
from functools import cache, lru_cache
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from openelm.data.chat import compile_template
from openelm.errors import UserError
from openelm.evaluate.results import TaskResult
from openelm.files import disk_errors_named
from openelm.infer.engine import Engine
from openelm.infer.likelihood import Likelihood, Request, likelihoods
from openelm.infer.sampling import Sampling

if TYPE_CHECKING:
    from openelm.evaluate.suites import Spec

# Prompts that are continued at once.
GENERATED_AT_ONCE = 16
# Of generation settings: those that choose tokens, and the names that lm-eval has for the number of tokens.
_SAMPLING = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty")
_MAX_TOKENS = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")


def EngineLM(engine: Engine, **options: Any) -> Any:  # noqa: N802 (a class, which needs lm-eval to be made)
    """``engine`` as an ``lm_eval.api.model.LM``; options are those of ``Answers``. UserError without lm-eval."""
    return _engine_lm()(engine, **options)


@cache
def _engine_lm() -> Any:
    try:
        from lm_eval.api.model import TemplateLM
    except ImportError as error:
        raise UserError(f"lm-eval cannot be used here ({error}): pip install 'openelm-framework[eval]'") from error
    return type("EngineLM", (Answers, TemplateLM), {})


class Answers:
    """What lm-eval asks of a model. Text becomes tokens as in its own models for transformers.

    ``add_bos``: every text begins with a BOS. ``cache``: a file of this one model's answers, which is read, and added
    to while new ones come, so that an interrupted evaluation goes on where it was. ``chat_template``: Jinja text, for
    instruct models; "<s>" and "</s>" in prompts are then the tokens. ``progress`` is told how many of a call's requests
    are answered, and how many there are.
    """

    cache_hook: Any  # where lm-eval's own cache wants to be told

    def __init__(
        self,
        engine: Engine,
        *,
        add_bos: bool = True,
        cache: Path | None = None,
        chat_template: str | None = None,
        batch_tokens: int | None = None,
        progress: Callable[[int, int], None] = lambda done, total: None,
    ) -> None:
        super().__init__()
        self.engine, self.add_bos_token, self.batch_tokens = engine, add_bos, batch_tokens
        self.truncated = 0  # requests longer than the model's context, since the start
        self._template, self._progress = chat_template, progress
        self._known = AnswerFile(cache)
        # The answers of a question come one by one, each with the same context.
        self._encode = lru_cache(maxsize=64)(self._encode_text)

    @property
    def eot_token_id(self) -> int:
        return self.engine.tokenizer.eos_id

    @property
    def prefix_token_id(self) -> int:
        """What a text without context begins with."""
        return self.engine.tokenizer.bos_id

    @property
    def max_length(self) -> int:
        return self.engine.model.config.max_context_length

    @property
    def tokenizer_name(self) -> str:
        return self.engine.tokenizer.fingerprint

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
        """Ids of a text, with a BOS where ``add_bos`` asks for it."""
        bos = self.add_bos_token if add_special_tokens is None else add_special_tokens
        ids, first = list(self._encode(string)), [self.prefix_token_id]
        written = self._template is not None and ids[:1] == first  # chat templates may begin with one themselves
        return first + ids if bos and not written else ids

    def _encode_text(self, text: str) -> tuple[int, ...]:
        tokenizer = self.engine.tokenizer
        if self._template is None:
            return tuple(tokenizer.encode(text))
        special = {tokenizer.piece(id): id for id in (tokenizer.bos_id, tokenizer.eos_id)}
        parts = re.split("(" + "|".join(map(re.escape, special)) + ")", text)
        return tuple(id for part in parts for id in ([special[part]] if part in special else tokenizer.encode(part)))

    def _loglikelihood_tokens(
        self, requests: Sequence[tuple[tuple[str, str] | None, list[int], list[int]]], **options: Any
    ) -> list[tuple[float, bool]]:
        asked = [
            Request(tuple(context or [self.prefix_token_id]), tuple(continuation))
            for _, context, continuation in requests
        ]
        self.truncated += sum(len(one.context) + len(one.continuation) > self.max_length + 1 for one in asked)
        keys = [_key(one.context, one.continuation) for one in asked]
        new = {key: index for index, key in enumerate(keys) if key not in self._known}
        todo, finished = list(new.values()), len(asked) - len(new)
        self._progress(finished, len(asked))

        def done(number: int, found: Likelihood) -> None:
            nonlocal finished
            finished += 1
            self._known.add(keys[todo[number]], [found.logprob, found.greedy])
            self._progress(finished, len(asked))

        with self._known:
            likelihoods(self.engine.model, [asked[index] for index in todo], batch_tokens=self.batch_tokens, done=done)
        answers = [(float(logprob), bool(greedy)) for logprob, greedy in map(self._known.__getitem__, keys)]
        for (texts, _, _), answer in zip(requests, answers, strict=True):
            if texts is not None:
                self.cache_hook.add_partial("loglikelihood", texts, answer)
        return answers

    def loglikelihood_rolling(self, requests: Sequence[Any], disable_tqdm: bool = True) -> list[float]:
        """Log-likelihood of whole texts, each token predicted once, in windows of the model's context."""
        from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

        windows: list[tuple[None, list[int], list[int]]] = []
        counts = []
        for (text,) in (request.args for request in requests):
            ids = self.tok_encode(text)
            found = get_rolling_token_windows(ids, self.prefix_token_id, self.max_length, context_len=1)
            new = [(None, *make_disjoint_window(window)) for window in found]
            windows += new
            counts.append(len(new))
        answers = iter(self._loglikelihood_tokens(windows))
        totals = [sum(next(answers)[0] for _ in range(count)) for count in counts]
        for request, total in zip(requests, totals, strict=True):
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, total)
        return totals

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = True) -> list[str]:
        """Texts that continue prompts, without the stop string that ended them."""
        texts: dict[int, str] = {}
        same: dict[str, list[int]] = {}  # settings -> requests
        for index, request in enumerate(requests):
            same.setdefault(json.dumps(request.args[1], sort_keys=True), []).append(index)
        with self._known:
            for asked in same.values():
                settings = requests[asked[0]].args[1]
                for index, text in self._generated([requests[i].args[0] for i in asked], settings):
                    texts[asked[index]] = text
                    self.cache_hook.add_partial("generate_until", requests[asked[index]].args, text)
                    self._progress(len(texts), len(requests))
        return [texts[index] for index in range(len(requests))]

    def _generated(self, prompts: Sequence[str], settings: Mapping[str, Any]) -> Iterator[tuple[int, str]]:
        """Completions of some prompts under one setting, longest prompt first."""
        stops, max_tokens, sampling = self._settings(settings)
        room = self.max_length - max_tokens
        rows = [self.tok_encode(prompt) or [self.prefix_token_id] for prompt in prompts]
        self.truncated += sum(len(row) > room for row in rows)
        rows = [row[-room:] for row in rows]
        keys = [_key(row, stops, max_tokens) for row in rows]
        greedy = sampling == Sampling()  # anything else is drawn again every time it is asked for
        known = [index for index, key in enumerate(keys) if greedy and key in self._known]
        yield from ((index, self._known[keys[index]]) for index in known)
        todo = sorted(set(range(len(rows))) - set(known), key=lambda index: -len(rows[index]))
        for start in range(0, len(todo), GENERATED_AT_ONCE):
            batch = todo[start : start + GENERATED_AT_ONCE]
            completions = self.engine.generate(
                [rows[index] for index in batch], max_tokens, sampling, stops, seeds=batch, add_bos=False
            )
            for index, completion in zip(batch, completions, strict=True):
                # Decoded by itself, as lm-eval does: the space before its first word is not part of it.
                text = self.engine.tokenizer.decode(completion.ids)
                text = text[: min((place for stop in stops if (place := text.find(stop)) >= 0), default=len(text))]
                if greedy:
                    self._known.add(keys[index], text)
                yield index, text

    def _settings(self, settings: Mapping[str, Any]) -> tuple[list[str], int, Sampling]:
        """Stop strings, number of tokens, sampling; UserError for what the engine does not do."""
        left = dict(settings)
        until = left.pop("until", None) or []
        stops = [stop for stop in ([until] if isinstance(until, str) else until) if stop]
        stops.append(self.engine.tokenizer.piece(self.eot_token_id))
        numbers = [left.pop(name) for name in _MAX_TOKENS if left.get(name) is not None]
        max_tokens = int(numbers[0]) if numbers else 256
        if not 0 < max_tokens < self.max_length:
            raise UserError(
                f"max_gen_toks={max_tokens} must be at least 1 and below the model's context of {self.max_length}"
            )
        sample = left.pop("do_sample", None)
        chosen = {name: left.pop(name) for name in _SAMPLING if left.get(name) is not None}
        unknown = [name for name in left if name not in (*_SAMPLING, *_MAX_TOKENS)]
        if unknown:
            raise UserError(f"generation settings {', '.join(unknown)} are not known here: use {', '.join(_SAMPLING)}")
        return stops, max_tokens, Sampling() if sample is False else Sampling(**chosen)

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """A conversation as the model's prompt; without ``add_generation_prompt`` the last turn can be gone on with."""
        from jinja2 import TemplateError

        if self._template is None:
            raise UserError("the model has no chat template: evaluate it without one, or give chat_template")
        tokenizer = self.engine.tokenizer
        names = {"bos_token": tokenizer.piece(tokenizer.bos_id), "eos_token": tokenizer.piece(tokenizer.eos_id)}
        try:
            text = compile_template(self._template).render(
                messages=chat_history, add_generation_prompt=add_generation_prompt, **names
            )
        except TemplateError as error:
            raise UserError(f"the chat template cannot be applied ({error}): correct chat_template.jinja") from error
        last = chat_history[-1]["content"].strip()
        if add_generation_prompt or not last:
            return text
        before, last, _ = text.rpartition(last)
        return before + last or text

    def chat_template(self, chat_template: bool | str = False) -> str | None:
        """The template in use, where one is asked for; lm-eval records it."""
        return self._template if chat_template else None


class AnswerFile:
    """Answers by key, in memory and in a JSON-lines file, which is written to while a ``with`` block holds it open.

    A line that a killed process has left unfinished is passed over. Without a path nothing is kept but in memory.
    """

    def __init__(self, path: Path | None) -> None:
        self._path, self._flushed_s = path, 0.0
        self._file: IO[str] | None = None
        self._answers: dict[str, Any] = {}
        for line in path.read_bytes().splitlines() if path and path.is_file() else ():
            with suppress(ValueError, KeyError, TypeError):
                entry = json.loads(line)
                self._answers[entry["key"]] = entry["answer"]

    def __contains__(self, key: str) -> bool:
        return key in self._answers

    def __getitem__(self, key: str) -> Any:
        return self._answers[key]

    def add(self, key: str, answer: Any) -> None:
        """Keep an answer; it is on disk a second later at most."""
        self._answers[key] = answer
        if self._path is None or self._file is None:
            return
        with disk_errors_named(self._path):
            self._file.write(json.dumps({"key": key, "answer": answer}) + "\n")
            if time.monotonic() - self._flushed_s > 1:
                self._file.flush()
                self._flushed_s = time.monotonic()

    def __enter__(self) -> None:
        if self._path is None:
            return
        with disk_errors_named(self._path):
            self._path.parent.mkdir(parents=True, exist_ok=True)
            whole = not self._path.exists() or self._path.read_bytes()[-1:] in (b"", b"\n")
            self._file = self._path.open("a", encoding="utf-8")
            self._file.write("" if whole else "\n")

    def __exit__(self, *_: object) -> None:
        if self._path is not None and self._file is not None:
            file, self._file = self._file, None
            with disk_errors_named(self._path):
                file.close()


def _key(*parts: Any) -> str:
    """What distinguishes one question to a model from another."""
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:32]


def measure(
    lm: Any,
    task_dict: Mapping[str, Any],
    spec: Spec,
    *,
    limit: int | None = None,
    seed: int = 1234,
    chat: bool = False,
    verbose: bool = False,
) -> TaskResult:
    """Measure one task, or a group of them, with any of lm-eval's models.

    ``task_dict`` is what ``tasks.load`` gives. ``limit``: only so many examples of every task in it. ``seed`` chooses
    the few-shot examples. ``chat``: prompts as conversations by the model's template. ``verbose`` lets lm-eval talk.
    """
    from lm_eval import evaluator

    start_s, truncated = time.perf_counter(), getattr(lm, "truncated", None)
    for task in task_dict.get("tasks", task_dict).values():
        if hasattr(task, "set_fewshot_seed"):
            task.set_fewshot_seed(seed=seed)
    # Resampled errors: computed here, not in forks of a process with a model (and a GPU) in it.
    os.environ.setdefault("DISABLE_MULTIPROC", "1")
    with _quiet(not verbose):
        found = evaluator.evaluate(
            lm=lm,
            task_dict=task_dict,
            limit=limit,
            bootstrap_iters=1000,
            log_samples=False,
            apply_chat_template=chat,
        )
    name = spec.task if spec.task in found["results"] else next(iter(found["results"]))
    return TaskResult(
        task=spec.task,
        shots=spec.shots,
        metrics=_metrics(found["results"][name]),
        examples=sum(count["effective"] for count in found["n-samples"].values()),
        version=str(found["versions"].get(name, "")),
        bos=bool(getattr(lm, "add_bos_token", False)),
        truncated=None if truncated is None else lm.truncated - truncated,
        limit=limit,
        seed=seed,
        elapsed_s=time.perf_counter() - start_s,
    )


def _metrics(found: Mapping[str, Any]) -> dict[str, float]:
    """lm-eval's ``{"acc,none": 0.5, "acc_stderr,none": "N/A", "alias": …}`` -> ``{"acc": 0.5}``."""
    numbers = {key: value for key, value in found.items() if "," in key and not isinstance(value, str)}
    return {key.removesuffix(",none"): float(value) for key, value in numbers.items()}


@contextmanager
def _quiet(quiet: bool) -> Iterator[None]:
    """Neither lm-eval's log nor its prints nor progress bars, where that is asked for."""
    if not quiet:
        yield
        return
    from tqdm import tqdm

    log, show = logging.getLogger("lm_eval"), tqdm.__init__
    level = log.level
    log.setLevel(logging.ERROR)
    tqdm.__init__ = lambda bar, *args, **options: show(bar, *args, **{**options, "disable": True})
    try:
        with redirect_stdout(io.StringIO()):
            yield
    finally:
        tqdm.__init__ = show
        log.setLevel(level)
