"""Statistical rejection sampling (Liu et al., arXiv 2309.06657): candidates of a model -> preferences near its optimum.

The model writes candidates, a reward judges them, and a candidate of reward r is accepted with probability
exp((r - r_max) / beta). What is accepted is then distributed as the policy that the same reward and beta would lead
to, model(answer) exp(r / beta) / Z. Pairs of accepted answers, the one of higher reward chosen, are the preferences.

Candidates depend on (seed, prompt, sample), acceptance and pairing on (seed, prompt) and the rewards: so nothing
depends on what is computed at a time, and an interrupted start goes on from the file of what is finished.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from random import Random
from statistics import fmean, pstdev
from typing import TYPE_CHECKING, Any, Protocol

from openelm.errors import UserError
from openelm.files import disk_errors_named, write_bytes

if TYPE_CHECKING:
    from openelm.data.tokenizer import Tokenizer
    from openelm.infer.engine import Engine
    from openelm.infer.sampling import Sampling

Messages = list[dict[str, str]]


# The method: functions of rewards and a generator


def accept(
    rewards: Sequence[float], wanted: int, beta: float, draw: Random, *, answers: Sequence[str] | None = None
) -> list[int]:
    """Indices of the accepted candidates, in the order of their acceptance; ``wanted`` of them at most.

    Algorithm 1 of the paper: passes over the candidates that are left, r_max being the largest of their rewards. With
    ``answers`` an answer is accepted once: equal ones are so many draws of it, of which the first to succeed counts.
    Fewer than ``wanted`` are accepted only where there are no more (distinct) candidates.
    """
    names: Sequence[object] = range(len(rewards)) if answers is None else answers
    accepted: list[int] = []
    taken: set[object] = set()
    left = list(range(len(rewards)))
    while left and len(accepted) < wanted:
        largest = max(rewards[index] for index in left)
        for index in left:
            if names[index] in taken:
                continue
            # The largest is always accepted, so every pass gets further.
            if draw.random() < math.exp((rewards[index] - largest) / beta):
                accepted.append(index)
                taken.add(names[index])
                if len(accepted) == wanted:
                    break
        left = [index for index in left if names[index] not in taken]
    return accepted


def pairs(accepted: Sequence[int], rewards: Sequence[float], draw: Random) -> list[tuple[int, int]]:
    """(chosen, rejected) of neighbours in a random order, each candidate in one pair: the paper's first-round ranking.

    A pair of equal rewards says nothing and is left out. The order is random because that of acceptance is not: the
    candidates of later passes have lower rewards.
    """
    order = sorted(accepted, key=lambda _: draw.random())
    neighbours = zip(order[::2], order[1::2], strict=False)
    return [
        (one, other) if rewards[one] > rewards[other] else (other, one)
        for one, other in neighbours
        if rewards[one] != rewards[other]
    ]


# Prompts


@dataclass(frozen=True)
class Prompt:
    """What to answer. ``ids`` begin with BOS; they are empty where the prompt is left out, for the reason given."""

    content: str | Messages
    ids: Sequence[int]
    record: Mapping[str, Any]  # as it was read, for rewards that look at other columns
    skipped: str = ""  # "empty" or "long"

    def answered(self, answer: str) -> str | Messages:
        """What stands in a preference: the answer, or the conversation that it ends."""
        if isinstance(self.content, str):
            return answer
        return [*self.content, {"role": "assistant", "content": answer}]


def read_prompts(
    records: Iterable[Mapping[str, Any]],
    tokenizer: Tokenizer,
    context: int,
    *,
    key: str = "prompt",
    chat: bool = False,
    empty_system_turn: bool = False,
) -> list[Prompt]:
    """All prompts. Messages, and texts with ``chat``, are encoded as conversations whose next turn is the assistant's.

    Prompts that are empty, or fill a ``context`` of so many tokens, stay in the list, marked. UserError, with the
    record's number: no such column, something else than text or messages in it, an assistant's turn at the end.
    """
    found = []
    for number, record in enumerate(records, 1):
        if key not in record:
            there = ", ".join(map(str, record)) or "none"
            raise UserError(f"record {number} has no column {key!r} (it has {there}): name it with --prompt-key")
        try:
            found.append(_prompt(record[key], record, tokenizer, context, chat, empty_system_turn))
        except UserError as error:
            raise UserError(f"record {number}, column {key!r}: {error}") from error
    return found


def _prompt(
    value: Any, record: Mapping[str, Any], tokenizer: Tokenizer, context: int, chat: bool, empty_system_turn: bool
) -> Prompt:
    from openelm.data.chat import encode_chat

    if value is None or value == [] or (isinstance(value, str) and not value.strip()):
        return Prompt("", (), record, "empty")
    if isinstance(value, str) and not chat:
        ids = [tokenizer.bos_id, *tokenizer.encode(value)]
        return Prompt(value, ids, record) if len(ids) < context else Prompt(value, (), record, "long")
    turns = [{"role": "user", "content": value}] if isinstance(value, str) else value
    if not isinstance(turns, list) or not all(
        isinstance(turn, Mapping) and {"role", "content"} <= turn.keys() for turn in turns
    ):
        raise UserError(f"{str(value)[:60]!r} is neither text nor messages: give a string, or a list of role, content")
    messages = [{"role": turn["role"], "content": turn["content"]} for turn in turns]
    if not str(messages[-1]["content"]).strip():
        return Prompt(messages, (), record, "empty")
    if messages[-1]["role"] == "assistant":
        raise UserError("the conversation ends with an assistant's turn, which is an answer: end it with the user's")
    ids, _ = encode_chat(tokenizer, messages, empty_system_turn=empty_system_turn, add_generation_prompt=True)
    return Prompt(messages, list(ids), record) if len(ids) < context else Prompt(messages, (), record, "long")


def digest_of_prompts(prompts: Iterable[Prompt]) -> str:
    """What tells these prompts, and what a reward may read beside them, from others."""
    total = hashlib.sha256()
    for prompt in prompts:
        total.update(json.dumps([prompt.content, prompt.record], default=str, sort_keys=True).encode() + b"\n")
    return total.hexdigest()


# Candidates


class Reward(Protocol):
    """Judges answers; the larger the better, always finite."""

    def __call__(self, answers: Sequence[tuple[Prompt, str]]) -> list[float]: ...


def candidates(
    engine: Engine,
    prompts: Sequence[Prompt],
    reward: Reward,
    sampling: Sampling,
    *,
    samples: int,
    max_tokens: int,
    batch: int,
    done: int = 0,
) -> Iterator[list[dict[str, Any]]]:
    """What there is to say about each prompt from the first not ``done`` on, as many at a time as ``batch`` gives.

    A prompt's entry: "prompt", and "skipped", or "candidates", each with "answer", "finish_reason" and "reward". An
    empty answer is no candidate. ``batch``: sequences generated at once. ``done`` must be a multiple of what
    ``at_once`` says.
    """
    size = at_once(samples, batch)
    for start in range(done, len(prompts), size):
        chunk = prompts[start : start + size]
        rows = [
            (index, prompt, seed_of(sampling.seed, start + index, sample))
            for index, prompt in enumerate(chunk)
            if not prompt.skipped
            for sample in range(samples)
        ]
        written = []
        for first in range(0, len(rows), batch):
            _, asked, seeds = zip(*rows[first : first + batch], strict=True)
            written += engine.generate([prompt.ids for prompt in asked], max_tokens, sampling, seeds=seeds)
        kept = [(row, completion) for row, completion in zip(rows, written, strict=True) if completion.text.strip()]
        rewards = reward([(prompt, completion.text) for (_, prompt, _), completion in kept])
        entries: list[dict[str, Any]] = [
            {"prompt": prompt.content, **({"skipped": prompt.skipped} if prompt.skipped else {"candidates": []})}
            for prompt in chunk
        ]
        for ((index, _, _), completion), value in zip(kept, rewards, strict=True):
            entries[index]["candidates"].append(
                {"answer": completion.text, "finish_reason": completion.finish_reason, "reward": value}
            )
        yield entries


def at_once(samples: int, batch: int) -> int:
    """Prompts whose candidates are computed together."""
    return max(1, batch // samples)


def seed_of(seed: int, prompt: int, sample: int) -> int:
    """The seed of one candidate, from 0 to 2**63 - 1."""
    return int.from_bytes(hashlib.sha256(f"{seed}/{prompt}/{sample}".encode()).digest()[:8], "big") >> 1


# What is finished, on disk


class Finished:
    """The file of finished prompts: a line with the settings, then an entry a line, in the order of the prompts.

    What a killed process has left unfinished is cut off. UserError: the file was begun with other settings, or is
    something else, and ``overwrite`` is off.
    """

    def __init__(self, path: Path, settings: Mapping[str, Any], *, together: int, overwrite: bool) -> None:
        self.path, self.count = path, 0
        with disk_errors_named(path):
            if path.exists() and self._belongs(settings, overwrite):
                self._cut(together)
            else:
                write_bytes(path, _line({"settings": settings}))

    def add(self, entries: Sequence[Mapping[str, Any]]) -> None:
        """Put entries behind the others."""
        with disk_errors_named(self.path), self.path.open("ab") as file:
            file.write(b"".join(map(_line, entries)))
        self.count += len(entries)

    def __iter__(self) -> Iterator[dict[str, Any]]:
        with self.path.open("rb") as file:
            next(file)
            yield from map(json.loads, file)

    def _belongs(self, settings: Mapping[str, Any], overwrite: bool) -> bool:
        with self.path.open("rb") as file:
            old = _parsed(file.readline()).get("settings")
        if not isinstance(old, dict):
            if not overwrite:
                raise UserError(f"{self.path} is nothing that openelm reject has begun: move it away")
            return False
        names = [name for name in {**old, **settings} if old.get(name) != settings.get(name)]
        if names and not overwrite:
            raise UserError(
                f"{self.path} was begun with another {', '.join(names)}: repeat the command as it was then, delete "
                "that file, or pass --overwrite to begin anew"
            )
        return not names

    def _cut(self, together: int) -> None:
        """Keep the whole entries, and of them so many that the next are computed in the same company as before."""
        with self.path.open("r+b") as file:
            ends = [len(file.readline())]
            for line in file:
                if not line.endswith(b"\n") or not _parsed(line):
                    break
                ends.append(ends[-1] + len(line))
            self.count = (len(ends) - 1) // together * together
            file.truncate(ends[self.count])


def _line(entry: Mapping[str, Any]) -> bytes:
    return json.dumps(entry).encode() + b"\n"


def _parsed(line: bytes) -> dict[str, Any]:
    """The object on a line; an empty one where it is damaged."""
    try:
        entry = json.loads(line)
    except ValueError:
        return {}
    return entry if isinstance(entry, dict) else {}


# Preferences


@dataclass
class Account:
    """What became of the prompts, the candidates and the accepted."""

    prompts: int = 0
    empty_prompts: int = 0
    long_prompts: int = 0  # no room for an answer in the model's context
    candidates: int = 0
    empty_answers: int = 0
    cut_answers: int = 0  # of the candidates: ended by the number of tokens, not by the model
    accepted: int = 0
    too_few_answers: int = 0  # prompts with fewer different answers than were to be accepted
    pairs: int = 0
    equal_rewards: int = 0  # pairs left out for it
    mean_reward: float | None = None  # of the candidates
    mean_accepted_reward: float | None = None
    reward_spread: float | None = None  # standard deviation within a prompt, the mean over prompts: beta is to be near

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)


def preferences(
    entries: Iterable[dict[str, Any]],
    prompts: Sequence[Prompt],
    account: Account,
    *,
    samples: int,
    wanted: int,
    beta: float,
    seed: int,
) -> Iterator[tuple[dict[str, Any], list[dict[str, Any]]]]:
    """Of each prompt its entry, in which candidates now have "accepted", and the records of its pairs.

    ``account`` is filled meanwhile, its means at the end.
    """
    total = total_accepted = 0.0
    spreads = []
    for index, (entry, prompt) in enumerate(zip(entries, prompts, strict=True)):
        account.prompts += 1
        if reason := entry.get("skipped"):
            account.empty_prompts += reason == "empty"
            account.long_prompts += reason == "long"
            yield entry, []
            continue
        found = entry["candidates"]
        answers, rewards = [one["answer"] for one in found], [one["reward"] for one in found]
        draw = Random(f"{seed}/{index}")
        accepted = accept(rewards, wanted, beta, draw, answers=answers)
        chosen = pairs(accepted, rewards, draw)
        for number, one in enumerate(found):
            one["accepted"] = number in accepted
        total += math.fsum(rewards)
        total_accepted += math.fsum(rewards[number] for number in accepted)
        spreads += [pstdev(rewards)] if rewards else []
        account.candidates += len(found)
        account.empty_answers += samples - len(found)
        account.cut_answers += sum(one["finish_reason"] == "length" for one in found)
        account.accepted += len(accepted)
        account.too_few_answers += len(accepted) < wanted
        account.pairs += len(chosen)
        account.equal_rewards += len(accepted) // 2 - len(chosen)
        yield entry, [_record(prompt, found[better], found[worse]) for better, worse in chosen]
    account.mean_reward = total / account.candidates if account.candidates else None
    account.mean_accepted_reward = total_accepted / account.accepted if account.accepted else None
    account.reward_spread = fmean(spreads) if spreads else None


def _record(prompt: Prompt, better: Mapping[str, Any], worse: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "prompt": prompt.content,
        "chosen": prompt.answered(better["answer"]),
        "rejected": prompt.answered(worse["answer"]),
        "chosen_reward": better["reward"],
        "rejected_reward": worse["reward"],
    }
