"""Our own engine, as `openelm generate` has it: a folder opened by Engine.load, its slots filled and continued."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

PROFILED_STEPS = 16


def imports() -> None:
    """What loading needs."""
    import openelm.infer.engine  # noqa: F401


def load(specification: dict[str, Any]) -> Ours:
    """Open ``folder``; ``bits`` rounds a bf16 folder's weights at load, which the native decoder alone can."""
    import torch

    from openelm.infer.engine import Engine
    from openelm.infer.native import NativeModel
    from openelm.infer.slots import Decoder

    threads = specification["threads"]
    torch.set_num_threads(threads)
    decoder: Decoder
    if bits := specification.get("bits"):
        decoder = NativeModel.load(specification["folder"], bits=bits, threads=threads)
    else:
        backend = specification["backend"]
        decoder = Engine.load(
            specification["folder"],
            specification["dtype"] and getattr(torch, specification["dtype"]),
            specification["device"],
            tokenizer=specification.get("tokenizer"),
            backend="torch" if backend == "torch-compiled" else backend,
            threads=threads,
            compile=backend == "torch-compiled",
        ).decoder
    return Ours(decoder, threads)


class Ours:
    """A decoder, and the slots that were made for each shape of work: they are kept, as a server keeps them."""

    def __init__(self, decoder: Any, threads: int) -> None:
        import torch

        from openelm.infer.native import NativeModel

        self.decoder = decoder
        self._slots: dict[tuple[int, int], Any] = {}
        if isinstance(decoder, NativeModel):
            about = {"engine": "native", "kernels": decoder.isa, "bytes_per_token": decoder.bytes_per_token}
        else:
            about = {"engine": "torch-compiled" if decoder.compile else "torch"}
            about |= {"bytes_per_token": bytes_read(decoder.model)}
            about |= {"computes_in": str(decoder.model.output_weight.dtype).removeprefix("torch.")}
        self.about = {
            **about,
            "device": str(decoder.device),
            "threads": threads,
            "software": f"torch {torch.__version__}",
        }

    def prepare(self, batch: int, room: int) -> None:
        """Empty slots."""
        if (batch, room) not in self._slots:
            self._slots[batch, room] = self.decoder.slots(batch, room)
        self._now = self._slots[batch, room]
        for slot in range(batch):
            self._now.truncate(slot, 0)

    def run(self, prompts: list[list[int]], tokens: int, first: Callable[[], None]) -> list[list[int]]:
        """As child.py asks for it; the device is waited for at the first token and at the last, not between."""
        import torch

        rows = list(range(len(prompts)))
        last_B = self._now.prefill(rows, prompts).argmax(-1)
        last_B.tolist()
        first()
        made = [last_B]
        for _ in range(tokens - 1):
            last_B = self._now.decode(rows, last_B).argmax(-1)
            made.append(last_B)
        ids: list[list[int]] = torch.stack(made, dim=1).tolist()
        return ids

    def peak_memory_bytes(self) -> int:
        """The device's, where there is one, else the process's."""
        import torch

        if self.decoder.device.type == "cuda":
            return torch.cuda.max_memory_allocated()
        return process_peak()

    def profile(self, prompt: list[int]) -> dict[str, Any]:
        """Share of some decoding steps' time by operation, the largest first; "why" alone where nobody can tell."""
        import torch
        from torch.profiler import ProfilerActivity, profile

        if self.about["engine"] == "native":
            return {"why": "the native decoder makes a token in one call, which torch's profiler cannot look into"}
        self.prepare(1, len(prompt) + PROFILED_STEPS + 1)
        last_B = self._now.prefill([0], [prompt]).argmax(-1)
        last_B = self._now.decode([0], last_B).argmax(-1)  # compiled, recorded
        on_cuda = self.decoder.device.type == "cuda"
        kinds = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_cuda else [])]
        with profile(activities=kinds) as seen, torch.inference_mode():
            for _ in range(PROFILED_STEPS - 1):
                last_B = self._now.decode([0], last_B).argmax(-1)
            last_B.tolist()
        which = "self_device_time_total" if on_cuda else "self_cpu_time_total"
        times = {event.key: getattr(event, which) for event in seen.key_averages()}
        total = sum(times.values()) or 1
        return {name: time / total for name, time in sorted(times.items(), key=lambda pair: -pair[1])[:12]}


def process_peak() -> int:
    """As the child itself reckons it."""
    import sys

    peak: int = sys.modules["__main__"].peak_memory_bytes()
    return peak


def bytes_read(model: Any) -> int:
    """Bytes of the weights that one token reads: all but an embedding that is a look-up only."""
    table = model.token_embeddings.weight
    skipped = 0 if model.config.share_input_output_layers else table.nbytes
    return sum(parameter.nbytes for parameter in model.parameters()) - skipped
