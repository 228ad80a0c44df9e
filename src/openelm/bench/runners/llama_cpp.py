"""llama.cpp, through llama-cpp-python: a GGUF file."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any


def imports() -> None:
    """What loading needs."""
    import llama_cpp  # noqa: F401


def load(specification: dict[str, Any]) -> LlamaCpp:
    """Open ``file`` with room for ``room`` tokens."""
    return LlamaCpp(specification)


class LlamaCpp:
    """Tokens are evaluated one after the other; the likeliest is looked up in the logits where they lie."""

    def __init__(self, specification: dict[str, Any]) -> None:
        import llama_cpp

        threads = specification["threads"]
        self._model = llama_cpp.Llama(
            specification["file"],
            n_ctx=specification["room"],
            n_batch=max(512, specification["longest_prompt"]),
            n_threads=threads,
            n_threads_batch=threads,
            n_gpu_layers=0 if specification["device"] == "cpu" else -1,
            verbose=False,
        )
        self.about = {
            "engine": "llama.cpp",
            "bytes_per_token": Path(specification["file"]).stat().st_size,  # the embedding is the output layer too
            "device": specification["device"],
            "threads": threads,
            "software": f"llama-cpp-python {llama_cpp.__version__}",
        }

    def prepare(self, batch: int, room: int) -> None:
        """An empty context."""
        if batch != 1:
            raise ValueError("one prompt at a time is measured with this peer")
        self._model.reset()

    def run(self, prompts: list[list[int]], tokens: int, first: Callable[[], None]) -> list[list[int]]:
        """As child.py asks for it."""
        import llama_cpp
        import numpy as np

        model, vocabulary = self._model, self._model.n_vocab()

        def likeliest() -> int:
            return int(np.ctypeslib.as_array(llama_cpp.llama_get_logits_ith(model.ctx, -1), (vocabulary,)).argmax())

        model.eval(prompts[0])
        made = [likeliest()]
        first()
        while len(made) < tokens:
            model.eval(made[-1:])
            made.append(likeliest())
        return [made]
