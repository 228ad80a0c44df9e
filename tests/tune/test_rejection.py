"""Rejection sampling draws from the policy that reward and beta define, whatever is computed at a time."""

import json
import math
from collections import Counter
from itertools import permutations
from pathlib import Path
from random import Random
from types import SimpleNamespace

import pytest
import torch

from openelm.data.tokenizer import Tokenizer
from openelm.errors import UserError
from openelm.infer.engine import Engine
from openelm.infer.sampling import Sampling
from openelm.tune.rejection import (
    Account,
    Finished,
    Prompt,
    accept,
    at_once,
    candidates,
    pairs,
    preferences,
    read_prompts,
    seed_of,
)
from small_models import make

# A model of five answers, and a reward that likes best what the model says least.
PROBABILITY = (0.35, 0.30, 0.20, 0.10, 0.05)
REWARD = (0.0, 0.5, 1.0, 1.5, 2.0)
BETA = 0.5
# Of so many candidates one is the best but for a chance of 0.95^256 = 2e-6: until it is accepted itself, the first pass
# is rejection sampling to the letter, and stops at what an endless stream of candidates would have given.
CANDIDATES = 256
TRIALS = 4000


def target(beta: float) -> list[float]:
    weights = [p * math.exp(r / beta) for p, r in zip(PROBABILITY, REWARD, strict=True)]
    return [weight / sum(weights) for weight in weights]


def chi_square(counts: Counter, expected: dict) -> float:
    total = sum(counts.values())
    return sum((counts[key] - total * p) ** 2 / (total * p) for key, p in expected.items())


@pytest.fixture(scope="module")
def drawn() -> list[tuple[int, int]]:
    """The first two answers accepted in each of many trials."""
    found = []
    for trial in range(TRIALS):
        draw = Random(trial)
        outcomes = draw.choices(range(5), PROBABILITY, k=CANDIDATES)
        chosen = accept([REWARD[one] for one in outcomes], 2, BETA, draw, answers=[str(one) for one in outcomes])
        found.append(tuple(outcomes[index] for index in chosen))
    return found


def test_accepted_answers_have_the_distribution_of_the_optimal_policy(drawn):
    expected = dict(enumerate(target(BETA)))
    counts = Counter(first for first, _ in drawn)
    # Four degrees of freedom: above 18.5 in one of a thousand seeds, and this one is fixed.
    assert chi_square(counts, expected) < 18.5
    # Counts have a standard deviation of at most sqrt(p (1 - p) / 4000) = 0.008 each: half of five of them.
    assert sum(abs(counts[key] / TRIALS - p) for key, p in expected.items()) / 2 < 0.02
    # The test can tell: neither the model itself nor a beta that is 10 % off would pass.
    for other in (dict(enumerate(PROBABILITY)), dict(enumerate(target(1.1 * BETA)))):
        assert chi_square(counts, other) > 18.5


def test_the_second_answer_is_drawn_from_what_the_first_has_left(drawn):
    p = target(BETA)
    expected = {(a, b): p[a] * p[b] / (1 - p[a]) for a, b in permutations(range(5), 2)}
    # 19 degrees of freedom: above 43.8 in one of a thousand seeds.
    assert chi_square(Counter(drawn), expected) < 43.8


def test_equal_candidates_are_so_many_draws_where_no_answers_are_given():
    counts = Counter()
    for trial in range(TRIALS):
        draw = Random(trial)
        outcomes = draw.choices(range(5), PROBABILITY, k=CANDIDATES)
        counts.update(outcomes[i] for i in accept([REWARD[one] for one in outcomes], 1, BETA, draw))
    assert chi_square(counts, dict(enumerate(target(BETA)))) < 18.5


def test_a_small_beta_takes_the_best_and_a_large_one_whatever_comes():
    rewards = [0.3, -1.0, 2.0, 1.0, 1.5, -7.0]
    for beta in (1e-9, 1e-320):
        assert accept(rewards, 3, beta, Random(1)) == [2, 4, 3]
    for beta in (1e300, math.inf):
        assert accept(rewards, 3, beta, Random(1)) == [0, 1, 2]


def test_rewards_of_any_size_are_compared_without_overflow():
    assert accept([-1e308, 1e308], 2, 0.5, Random(1)) == [1, 0]
    assert accept([1e308, 1e308], 2, 1e-300, Random(1)) == [0, 1]


def test_an_answer_is_accepted_once():
    assert accept([1.0] * 4, 4, 0.5, Random(1), answers=["a", "b", "a", "b"]) == [0, 1]
    assert accept([], 2, 0.5, Random(1)) == []


def test_all_candidates_are_accepted_where_as_many_are_wanted():
    reward = Random(1)
    rewards = [reward.uniform(-9, 9) for _ in range(50)]
    assert sorted(accept(rewards, 50, 0.1, Random(2))) == list(range(50))


def test_the_same_seed_accepts_the_same():
    reward = Random(1)
    rewards = [reward.random() for _ in range(64)]
    assert accept(rewards, 8, 0.2, Random("3/1")) == accept(rewards, 8, 0.2, Random("3/1"))
    assert accept(rewards, 8, 0.2, Random("3/1")) != accept(rewards, 8, 0.2, Random("3/2"))


def test_pairs_use_each_candidate_once_and_choose_the_higher_reward():
    rewards = [float(i * 7 % 8) for i in range(8)]
    found = pairs(range(8), rewards, Random(1))
    assert sorted(index for pair in found for index in pair) == list(range(8))
    assert all(rewards[chosen] > rewards[rejected] for chosen, rejected in found)


def test_pairs_of_equal_rewards_and_a_last_odd_one_are_left_out():
    assert pairs([0, 1], [2.0, 2.0], Random(1)) == []
    assert pairs([4], [0.0] * 5, Random(1)) == []
    assert len(pairs([0, 1, 2], [0.0, 1.0, 2.0], Random(1))) == 1


def test_partners_do_not_depend_on_the_order_of_acceptance():
    """Those of later passes have lower rewards: neighbours in that order would be alike."""
    partners = Counter(frozenset(pair) for seed in range(3000) for pair in pairs(range(4), [0, 1, 2, 3], Random(seed)))
    # Each of six pairs in a third of the trials: 1000, give or take sqrt(3000 / 3 * 2 / 3) = 26.
    assert len(partners) == 6 and all(abs(count - 1000) < 4 * 26 for count in partners.values())


# Candidates


@pytest.fixture(scope="module")
def engine(golden_weights, tokenizer_file) -> Engine:
    return Engine(make(golden_weights), Tokenizer.load(tokenizer_file))


def length(answers):
    return [float(len(answer)) for _, answer in answers]


def texts(engine: Engine, *contents: str | None) -> list[Prompt]:
    return read_prompts([{"prompt": content} for content in contents], engine.tokenizer, 64)


def entries(engine: Engine, prompts: list[Prompt], *, batch: int, samples: int = 4, done: int = 0) -> list[dict]:
    sampling = Sampling(1.0, seed=3)
    found = candidates(engine, prompts, length, sampling, samples=samples, max_tokens=8, batch=batch, done=done)
    return [entry for chunk in found for entry in chunk]


def test_candidates_do_not_depend_on_what_is_computed_at_a_time(engine):
    prompts = texts(engine, "After all", "Another", "", "The mountain " * 40, "Before the")
    alone = entries(engine, prompts, batch=1)
    assert [entry.get("skipped") for entry in alone] == [None, None, "empty", "long", None]
    for batch in (3, 4, 8, 100):
        assert entries(engine, prompts, batch=batch) == alone
    answers = [one["answer"] for entry in alone for one in entry.get("candidates", ())]
    assert len(set(answers)) > 10  # of 12: seeds differ by prompt and by sample
    assert all(one["reward"] == len(one["answer"]) for entry in alone for one in entry.get("candidates", ()))
    assert entries(engine, prompts, batch=8, done=2) == alone[2:]


def test_candidates_are_drawn_from_the_model(engine):
    """The first token of 64 x 32 candidates of one prompt, against the model's own distribution."""
    prompts = texts(engine, *["After all"] * 64)
    with torch.no_grad():
        logits = engine.model(torch.tensor([prompts[0].ids]))[0, -1, : engine.tokenizer.vocab_size]
    p = logits.softmax(-1)
    counts = torch.zeros(len(p))
    for index in range(64):
        seeds = [seed_of(3, index, sample) for sample in range(32)]
        for completion in engine.generate([prompts[index].ids] * 32, 1, Sampling(1.0, seed=3), seeds=seeds):
            counts[completion.ids[0]] += 1
    # Tokens that are rarer than 5 draws are one class, as the test of Pearson wants it.
    often = p * 2048 >= 5
    observed = torch.cat((counts[often], counts[~often].sum()[None]))
    expected = torch.cat((p[often], p[~often].sum()[None])) * 2048
    degrees = len(observed) - 1
    found = float(((observed - expected) ** 2 / expected).sum())
    # Chi-square has the mean of its degrees and a variance of twice them.
    assert found < degrees + 4 * (2 * degrees) ** 0.5
    assert degrees > 20


def test_an_empty_answer_is_no_candidate():
    class Silent:
        def generate(self, prompts, *_, seeds):
            answers = [("" if seed % 2 else "\n " if seed % 3 == 0 else "word") for seed in seeds]
            return [SimpleNamespace(text=text, finish_reason="stop") for text in answers]

    prompts = [Prompt("Say", [1, 2], {})] * 5
    found = [
        entry
        for chunk in candidates(Silent(), prompts, length, Sampling(1.0), samples=8, max_tokens=4, batch=16)
        for entry in chunk
    ]
    assert {one["answer"] for entry in found for one in entry["candidates"]} == {"word"}
    account = Account()
    list(preferences(found, prompts, account, samples=8, wanted=2, beta=1.0, seed=0))
    assert account.candidates + account.empty_answers == 40 and account.empty_answers > 10
    assert account.pairs == 0 and account.too_few_answers == 5


# Prompts


def test_a_text_is_continued_and_a_conversation_answered(engine):
    tokenizer = engine.tokenizer
    (text,) = texts(engine, "After all")
    assert list(text.ids) == [tokenizer.bos_id, *tokenizer.encode("After all")]
    assert text.answered(" this") == " this"
    (chat,) = read_prompts([{"q": "Hi"}], tokenizer, 64, key="q", chat=True)
    assert chat.content == [{"role": "user", "content": "Hi"}]
    head = [tokenizer.bos_id, *tokenizer.encode("<|user|>\nHi"), tokenizer.eos_id]
    assert list(chat.ids) == head + tokenizer.encode("\n<|assistant|>\n")
    assert chat.answered("Yes") == [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Yes"}]
    turns = [{"role": "user", "content": "Hi", "id": 3}]
    (messages,) = read_prompts([{"prompt": turns}], tokenizer, 64)
    assert (messages.content, messages.ids) == (chat.content, chat.ids)
    (handbook,) = read_prompts([{"prompt": turns}], tokenizer, 64, empty_system_turn=True)
    assert len(handbook.ids) > len(chat.ids)


@pytest.mark.parametrize("content", [None, "", " \n", [], [{"role": "user", "content": " "}]])
def test_a_prompt_that_asks_nothing_is_left_out(engine, content):
    assert read_prompts([{"prompt": content}], engine.tokenizer, 64)[0].skipped == "empty"


def test_a_prompt_must_leave_room_for_an_answer(engine):
    count = len(texts(engine, "After all")[0].ids)
    read = lambda context: read_prompts([{"prompt": "After all"}], engine.tokenizer, context)[0].skipped  # noqa: E731
    assert (read(count), read(count + 1)) == ("long", "")


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (5, "'5' is neither text nor messages"),
        (["a"], "is neither text nor messages"),
        ([{"from": "human", "value": "a"}], "is neither text nor messages"),
        ([{"role": "human", "content": "a"}], "a role is one of system, user, assistant"),
        ([{"role": "user", "content": ["a"]}], "content must be text"),
        ([{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}], "ends with an assistant's turn"),
    ],
)
def test_what_is_no_prompt_is_named_with_its_record(engine, content, said):
    with pytest.raises(UserError, match="record 2, column 'prompt'") as refused:
        read_prompts([{"prompt": "a"}, {"prompt": content}], engine.tokenizer, 64)
    assert said in str(refused.value)


def test_a_column_that_is_not_there_is_named(engine):
    with pytest.raises(UserError, match=r"record 1 has no column 'prompt' \(it has question, id\): .*--prompt-key"):
        read_prompts([{"question": "a", "id": 1}], engine.tokenizer, 64)


# What is finished


def begin(path: Path, together: int = 2, overwrite: bool = False, **settings: object) -> Finished:
    return Finished(path, {"seed": 0, **settings}, together=together, overwrite=overwrite)


def test_what_a_killed_process_has_half_written_is_done_again(tmp_path):
    path = tmp_path / "pairs.unfinished.jsonl"
    begin(path).add([{"prompt": str(i)} for i in range(5)])
    whole = path.read_bytes()
    lines = whole.splitlines(keepends=True)
    for cut in range(len(lines[0]), len(whole) + 1):
        path.write_bytes(whole[:cut])
        again = begin(path)
        complete = whole[:cut].count(b"\n") - 1
        assert again.count == complete // 2 * 2  # whole batches: the next are computed in the same company
        assert list(again) == [{"prompt": str(i)} for i in range(again.count)]
    path.write_bytes(whole.replace(b'"2"', b'"\xff"'))
    assert begin(path, together=1).count == 2


def test_other_settings_are_refused_by_name_or_begun_anew(tmp_path):
    path = tmp_path / "pairs.unfinished.jsonl"
    begin(path, samples=8).add([{"prompt": "a"}] * 2)
    with pytest.raises(UserError, match=r"begun with another seed, samples: .*or pass --overwrite"):
        Finished(path, {"seed": 1, "samples": 4}, together=1, overwrite=False)
    assert begin(path, samples=8, overwrite=True).count == 2  # the same settings: it goes on
    assert begin(path, samples=4, overwrite=True).count == 0
    assert json.loads(path.read_text()) == {"settings": {"seed": 0, "samples": 4}}
    for other in ('{"prompt": "mine"}\n', "mine", "", "[]\n"):
        path.write_text(other)
        with pytest.raises(UserError, match="is nothing that openelm reject has begun: move it away"):
            begin(path)
        assert path.read_text() == other


# Preferences


def entry(*answers: tuple[str, float]) -> dict:
    return {"candidates": [{"answer": a, "reward": r, "finish_reason": "length"} for a, r in answers]}


def test_the_account_adds_up():
    prompts = [Prompt("q", [1], {}), Prompt("", (), {}, "empty"), Prompt("q", (), {}, "long")] + [
        Prompt([{"role": "user", "content": "q"}], [1], {})
    ] * 3
    found = [
        entry(("a", 1.0), ("b", 3.0)),
        {"skipped": "empty"},
        {"skipped": "long"},
        entry(("a", 1.0), ("b", 1.0)),
        entry(("a", 1.0), ("a", 1.0)),
        entry(("b", -1.0), ("a", 5.0)),
    ]
    account = Account()
    records = [
        record
        for _, some in preferences(found, prompts, account, samples=3, wanted=2, beta=9.0, seed=0)
        for record in some
    ]
    turn = {"role": "user", "content": "q"}
    assert records == [
        {"prompt": "q", "chosen": "b", "rejected": "a", "chosen_reward": 3.0, "rejected_reward": 1.0},
        {
            "prompt": [turn],
            "chosen": [turn, {"role": "assistant", "content": "a"}],
            "rejected": [turn, {"role": "assistant", "content": "b"}],
            "chosen_reward": 5.0,
            "rejected_reward": -1.0,
        },
    ]
    assert account == Account(
        prompts=6,
        empty_prompts=1,
        long_prompts=1,
        candidates=8,
        empty_answers=4,
        cut_answers=8,
        accepted=7,
        too_few_answers=1,
        pairs=2,
        equal_rewards=1,
        mean_reward=12 / 8,
        mean_accepted_reward=11 / 7,
        reward_spread=(1 + 0 + 0 + 3) / 4,
    )
    assert [[one["accepted"] for one in found[i]["candidates"]] for i in (0, 4)] == [[True, True], [True, False]]


def test_prompts_per_batch():
    assert [at_once(8, batch) for batch in (1, 8, 15, 16, 64)] == [1, 1, 1, 2, 8]
