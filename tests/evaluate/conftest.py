"""A model that needs no weights, run through lm-eval."""

import logging
from collections.abc import Callable
from typing import Any

import pytest


@pytest.fixture
def score() -> Callable[..., dict[str, Any]]:
    """``score(task_dict, f)``: lm-eval's results where ``f(context, continuation)`` is the log-likelihood."""
    pytest.importorskip("lm_eval")
    from lm_eval import evaluator
    from lm_eval.api.model import LM

    class Answers(LM):
        def __init__(self, likelihood: Callable[[str, str], float]) -> None:
            super().__init__()
            self.likelihood = likelihood

        def loglikelihood(self, requests: list[Any], **_: Any) -> list[tuple[float, bool]]:
            return [(self.likelihood(*request.args), False) for request in requests]

        def loglikelihood_rolling(self, requests: list[Any], **_: Any) -> list[float]:
            raise NotImplementedError

        def generate_until(self, requests: list[Any], **_: Any) -> list[str]:
            raise NotImplementedError

    def run(task_dict: dict[str, Any], likelihood: Callable[[str, str], float], **options: Any) -> dict[str, Any]:
        logging.getLogger("lm_eval").setLevel(logging.ERROR)
        found = evaluator.evaluate(Answers(likelihood), task_dict, bootstrap_iters=0, **options)
        return found["results"] | found.get("groups", {})

    run.model = Answers  # type: ignore[attr-defined]
    return run
