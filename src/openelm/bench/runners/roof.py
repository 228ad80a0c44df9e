"""The machine's own roof, measured between the entries: bytes that are read, and products of matrices, in a second."""

from __future__ import annotations

from typing import Any

BUFFER_BYTES = 512 * 10**6  # larger than the caches
ROUNDS = 3


def load(specification: dict[str, Any]) -> Roof:
    """With ``threads``, on ``device``, products in ``dtype``."""
    return Roof(**specification)


class Roof:
    """Both rates."""

    def __init__(self, threads: int, device: str, dtype: str) -> None:
        import torch

        from openelm.infer import native

        torch.set_num_threads(threads)
        self._threads, self._device, self._dtype = threads, torch.device(device), getattr(torch, dtype)
        self._native = self._device.type == "cpu" and native.available()
        ways = {
            "cuda": "a copy, bytes read and written",
            "cpu": "a sum in torch",
            "mps": "a copy, bytes read and written",
        }
        how = "the native decoder's reader" if self._native else ways[self._device.type]
        self.about = {"bandwidth_by": how, "gemm_by": f"the best square product of 2,048 in {dtype}"}

    def measure(self) -> dict[str, float]:
        """Bytes and FLOPs a second, the best of some rounds."""
        from openelm.train.metrics import gemm_flops_per_s

        return {"bytes_per_s": self._bandwidth(), "flops_per_s": gemm_flops_per_s(self._dtype, self._device)}

    def _bandwidth(self) -> float:
        import time

        import torch

        from openelm.infer import native

        if self._native:
            return native.read_bandwidth(self._threads, rounds=ROUNDS)
        buffer = torch.ones(BUFFER_BYTES // 4, dtype=torch.float32, device=self._device)
        out = torch.empty_like(buffer) if self._device.type != "cpu" else None
        best = 0.0
        for _ in range(ROUNDS):
            start_s = time.perf_counter()
            if out is None:
                buffer.sum()
                best = max(best, BUFFER_BYTES / (time.perf_counter() - start_s))
            else:
                out.copy_(buffer)
                out[-1].item()  # waits for the device
                best = max(best, 2 * BUFFER_BYTES / (time.perf_counter() - start_s))
        return best
