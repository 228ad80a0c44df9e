"""mlx-lm: a model folder, quantised or not."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any


def imports() -> None:
    """What loading needs."""
    import mlx.core  # noqa: F401
    from mlx_lm.utils import load_model  # noqa: F401


def load(specification: dict[str, Any]) -> MlxLm:
    """Open ``folder``, on mlx's own default device."""
    return MlxLm(specification["folder"])


class MlxLm:
    """``generate_step``, which has the next token computed while this one is read."""

    def __init__(self, folder: str) -> None:
        from importlib.metadata import version

        import mlx.core as mx
        from mlx.utils import tree_flatten
        from mlx_lm.utils import load_model

        self._model, _ = load_model(Path(folder))
        flat: Any = tree_flatten(self._model.parameters())
        self.about = {
            "engine": "mlx-lm",
            "bytes_per_token": sum(array.nbytes for _, array in flat),
            "device": str(mx.default_device()),
            "threads": None,  # mlx's own choice
            "software": f"mlx-lm {version('mlx-lm')}, mlx {version('mlx')}",
        }

    def prepare(self, batch: int, room: int) -> None:
        """generate_step makes its cache itself."""
        if batch != 1:
            raise ValueError("one prompt at a time is measured with this peer")

    def run(self, prompts: list[list[int]], tokens: int, first: Callable[[], None]) -> list[list[int]]:
        """As child.py asks for it."""
        import mlx.core as mx
        from mlx_lm.generate import generate_step

        made = []
        for token, _ in generate_step(mx.array(prompts[0]), self._model, max_tokens=tokens):
            made.append(int(token))
            if len(made) == 1:
                first()
        return [made]
