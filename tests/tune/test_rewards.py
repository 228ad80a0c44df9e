"""Rewards that are Python functions: asked one answer at a time, and named where they fail."""

from collections.abc import Sequence

import pytest
import torch

from openelm.errors import UserError
from openelm.tune.rejection import Prompt
from openelm.tune.rewards import open_reward

CPU = torch.device("cpu")
TEXT = Prompt("how long is it", [1], {"answer": "long"})
CHAT = Prompt([{"role": "user", "content": "how long is it"}], [1], {})


@pytest.fixture
def write(tmp_path):
    """Write a file of rewards; gives the beginning of their names."""

    def written(source: str) -> str:
        (tmp_path / "reward.py").write_text(source, encoding="utf-8")
        return f"python:{tmp_path / 'reward.py'}"

    return written


def ask(reference: str, prompt: Prompt = TEXT, answers: Sequence[str] = ("very long", "short")) -> list[float]:
    reward, _ = open_reward(reference, None, CPU)
    return reward([(prompt, answer) for answer in answers])


def test_a_function_of_a_file_is_asked_with_prompt_and_answer(write):
    file = write("def score(prompt, answer):\n    return len(prompt) + len(answer) / 10\n")
    assert ask(f"{file}:score", answers=["abc", ""]) == [14.3, 14.0]


def test_a_function_of_three_is_given_the_whole_record(write):
    file = write("def right(prompt, answer, record, weight=2):\n    return weight * (record['answer'] in answer)\n")
    assert ask(f"{file}:right", answers=["very long", "short"]) == [2.0, 0.0]


def test_a_function_of_a_module_is_found(tmp_path, monkeypatch):
    (tmp_path / "rewards_of_mine.py").write_text("shortest = lambda prompt, answer: -len(answer)")
    monkeypatch.syspath_prepend(tmp_path)
    assert ask("python:rewards_of_mine:shortest", answers=["abc"]) == [-3.0]
    assert ask("python:operator:ne", answers=["how long is it", "no"]) == [0.0, 1.0]  # says nothing of its arguments


def test_a_conversation_is_given_as_messages(write):
    file = write("def f(prompt, answer): return len(prompt[0]['content'])")
    assert ask(f"{file}:f", CHAT, ["a"]) == [14.0]


def test_a_file_may_hold_dataclasses_and_has_a_digest(write):
    source = "from dataclasses import dataclass\n@dataclass\nclass A:\n    x: 'int' = 1\ndef f(p, a): return A().x\n"
    first = open_reward(f"{write(source)}:f", None, CPU)[1]
    assert first == open_reward(f"{write(source)}:f", None, CPU)[1]
    assert first != open_reward(f"{write(source + '#')}:f", None, CPU)[1]


@pytest.mark.parametrize("value", ["math.nan", "math.inf", "-math.inf", "None", "'0.5'", "[1, 2]", "1j"])
def test_what_is_no_finite_number_is_refused_with_the_function_and_the_answer(write, value):
    file = write(f"import math\ndef f(prompt, answer): return {value} if answer == 'short' else 1\n")
    with pytest.raises(UserError, match=r"reward\.py:f gave .* for the answer 'short' to the prompt 'how long is it'"):
        ask(f"{file}:f")


def test_numbers_of_numpy_and_torch_are_numbers(write):
    file = write("import numpy, torch\ndef f(p, a): return numpy.float32(0.5) if a == 'a' else torch.tensor(2)\n")
    assert ask(f"{file}:f", answers=["a", "b"]) == [0.5, 2.0]


def test_an_exception_is_told_with_its_answer(write):
    file = write("def f(prompt, answer): return 1 / (len(answer) - 5)\n")
    with pytest.raises(
        UserError, match=r"reward\.py:f failed for the answer 'short' .* \(ZeroDivisionError: .*finished"
    ):
        ask(f"{file}:f")


@pytest.mark.parametrize(
    ("reference", "said"),
    [
        ("python:f", "names no function: write python:FILE.py:FUNCTION"),
        ("python:nowhere.py:f", "nowhere.py is not there"),
        ("python:no_such_module:f", "no_such_module cannot be imported (ModuleNotFoundError"),
        ("{file}:g", "has no function g; it has f"),
        ("{file}:", "names no function"),
        ("{broken}:f", "cannot be imported (SyntaxError"),
        ("my.module:f", "no model's folder, and no name of one on the Hub: write python:FILE.py:FUNCTION"),
        ("nothing", "no model's folder"),
    ],
)
def test_what_is_no_reward_is_refused(tmp_path, write, reference, said):
    (tmp_path / "broken.py").write_text("def f(:\n")
    file = write("def f(prompt, answer): return 1\n")
    with pytest.raises(UserError) as refused:
        open_reward(reference.format(file=file, broken=f"python:{tmp_path / 'broken.py'}"), None, CPU)
    assert said in str(refused.value)


def test_a_label_goes_with_a_classifier(write):
    with pytest.raises(UserError, match="--reward-label good goes with a classifier"):
        open_reward(f"{write('def f(p, a): return 1')}:f", "good", CPU)
