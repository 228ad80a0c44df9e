"""lm-eval over HTTP gives the numbers of lm-eval on our engine."""

import logging
import random
from collections.abc import Callable
from typing import Any

import pytest

from openelm.evaluate.harness import EngineLM, measure
from openelm.evaluate.suites import Spec
from small_tasks import WORDS, instances, words_task, write_words

pytest.importorskip("lm_eval")
pytest.importorskip("transformers")
pytest.importorskip("tenacity", reason="lm-eval's client needs lm-eval[api]")


@pytest.fixture(scope="module")
def over_http(served, served_folder) -> Callable[..., Any]:
    """lm-eval's own client for completions, as its command line makes it."""
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    from lm_eval.models.openai_completions import LocalCompletionsAPI

    def make(**options: Any) -> Any:
        return LocalCompletionsAPI(
            base_url=f"{served.url}/v1/completions",
            model="tiny",
            tokenizer=str(served_folder),
            tokenizer_backend="huggingface",
            max_length=128,
            add_bos_token=True,
            **options,
        )

    return make


@pytest.fixture(scope="module")
def ours(engine) -> Any:
    return EngineLM(engine)


@pytest.mark.parametrize("options", [{}, {"batch_size": 4}, {"num_concurrent": 3}], ids=str)
def test_likelihoods_are_the_same_one_by_one(over_http, ours, options):
    draw = random.Random(3)
    asked = [
        (f"What {' '.join(draw.choices(WORDS, k=draw.randint(1, 14)))}?", f" The {draw.choice(WORDS)} of {word}.")
        for word in WORDS
    ]
    requests = instances("loglikelihood", asked)
    found, expected = over_http(**options).loglikelihood(requests), ours.loglikelihood(requests)
    assert [one[0] for one in found] == pytest.approx([one[0] for one in expected], abs=1e-4)
    assert [one[1] for one in found] == [one[1] for one in expected]


def test_what_the_model_itself_would_say_is_known_as_such(over_http, ours, engine):
    prompt = "After the river "
    said = engine.generate([engine.tokenizer.encode(prompt)], 1)[0].text
    requests = instances("loglikelihood", [(prompt, word) for word in (said, "night")])
    assert [greedy for _, greedy in over_http().loglikelihood(requests)] == [
        greedy for _, greedy in ours.loglikelihood(requests)
    ]


def test_a_text_of_the_whole_context_is_scored_to_its_last_token(over_http, ours):
    context = "The night and the water. " * 40  # lm-eval cuts it to what fits
    requests = instances("loglikelihood", [(context[: len(context) // 2], " river of paper")])
    lm = over_http()
    ids = lm.tok_encode(context)
    asked = [(("", ""), ids[-120:], lm.tok_encode(" river")[-7:])]
    [(found, _)] = lm._loglikelihood_tokens(asked)
    [(expected, _)] = ours._loglikelihood_tokens(asked)
    assert found == pytest.approx(expected, abs=1e-4)
    assert len(requests) == 1


def test_rolling_likelihoods_are_the_same(over_http, ours):
    requests = instances("loglikelihood_rolling", [("The night and the water of the river. " * n,) for n in (1, 9)])
    # Their windows are a token shorter: one is left for the token that a completion must have.
    short = instances("loglikelihood_rolling", [("The night and the water of the river.",)])
    assert over_http().loglikelihood_rolling(short) == pytest.approx(ours.loglikelihood_rolling(short), abs=1e-4)
    assert all(value < 0 for value in over_http().loglikelihood_rolling(requests))


def test_generated_texts_are_the_same(over_http, ours):
    settings = {"until": ["river", "\n\n"], "max_gen_toks": 24, "temperature": 0.0, "do_sample": False}
    requests = instances("generate_until", [(f"The {word} and the", settings) for word in WORDS])
    found, expected = over_http().generate_until(requests), ours.generate_until(requests)
    # Theirs keep the space between prompt and completion.
    assert [text.strip() for text in found] == [text.strip() for text in expected]


def test_a_task_has_the_same_result(over_http, ours, tmp_path):
    tasks = words_task(write_words(tmp_path))
    found, expected = (
        measure(lm, tasks, Spec("words", "acc", 2, "")).metrics for lm in (over_http(batch_size=8), ours)
    )
    assert found == pytest.approx(expected, abs=1e-4) and found
