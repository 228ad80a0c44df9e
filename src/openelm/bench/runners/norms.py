"""Our engine on torch with another norm in its place; how often it is called, and what share of decoding it takes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from openelm.bench.runners import ours

STEPS = 8  # that are profiled
EPSILON = 1e-6
# What a compiler calls a kernel in which it has put a norm's statistics, whatever else it has put there.
FUSED_NAMES = ("rsqrt", "linalg_vector_norm", "_mean_")


def imports() -> None:
    """What loading needs."""
    ours.imports()


def load(specification: dict[str, Any]) -> Norms:
    """As ours.load, with ``norm``: one of FORMS, or "compiled" for our own in a compiled step."""
    import torch

    # Without this a compiled kernel on a CPU leaves no trace in a profile.
    if specification["norm"] == "compiled":
        import torch._inductor.config as inductor

        inductor.cpp.enable_kernel_profile = True
    runner = ours.load(specification)
    return Norms(runner.decoder, torch.get_num_threads(), specification["norm"])


def naive(x: Any, gain: Any) -> Any:
    """As CoreNet has it: each operation by itself."""
    import torch

    y = x.float()
    y = y * torch.rsqrt(y.pow(2).mean(-1, keepdim=True) + EPSILON)
    return y.type_as(x) * gain


def fused(x: Any, gain: Any) -> Any:
    """torch's own."""
    import torch.nn.functional as F

    return F.rms_norm(x, gain.shape, gain, EPSILON)


def layer_norm(x: Any, gain: Any) -> Any:
    """Another norm, which other models have: for its speed, not for what it computes."""
    import torch.nn.functional as F

    return F.layer_norm(x, gain.shape, gain, None, EPSILON)


FORMS: dict[str, Callable[[Any, Any], Any]] = {"naive": naive, "fused": fused, "layernorm": layer_norm}


class Norms(ours.Ours):
    """A torch decoder whose norms are replaced."""

    def __init__(self, decoder: Any, threads: int, norm: str) -> None:
        super().__init__(decoder, threads)
        from openelm.model.transformer import RMSNorm

        self._norm = norm
        self._modules = [module for module in decoder.model.modules() if isinstance(module, RMSNorm)]
        self._forms = [self._form(module, norm) for module in self._modules]
        self._replace(self._forms)

    def prepare(self, batch: int, room: int) -> None:
        """Empty slots; as the paper measured them, replaced norms are launched one by one, and in no CUDA graph."""
        super().prepare(batch, room)
        if self._norm in FORMS:
            self._now._step = None

    def norms(self, prompt: list[int]) -> dict[str, Any]:
        """Invocations a token, and the share of decoding that they take: of the host's time, and of a GPU's."""
        import torch

        from openelm.infer.torch_decoder import TorchDecoder

        compiled, model = self._norm == "compiled", self.decoder.model
        calls: list[int] = []
        hooks = [module.register_forward_hook(lambda *_: calls.append(1)) for module in self._modules]
        slots = TorchDecoder(model).slots(1, len(prompt) + STEPS + 2)
        slots._step = None
        last_B = slots.prefill([0], [prompt]).argmax(-1)
        calls.clear()
        last_B = slots.decode([0], last_B).argmax(-1)
        for hook in hooks:
            hook.remove()
        if compiled:
            return {"invocations": len(calls), **self._compiled_share(prompt)}

        def marked(form: Callable[[Any], Any]) -> Callable[[Any], Any]:
            def run(x: Any) -> Any:
                with torch.profiler.record_function("one norm"):
                    return form(x)

            return run

        self._replace([marked(form) for form in self._forms])
        events = self._profiled(slots, last_B)
        self._replace(self._forms)
        return {"invocations": len(calls), **shares(events, lambda name: name == "one norm")}

    def _compiled_share(self, prompt: list[int]) -> dict[str, Any]:
        if not self._slots:
            self.prepare(1, len(prompt) + STEPS + 2)
        slots = self._now  # other ones would be compiled anew
        slots.truncate(0, 0)
        last_B = slots.prefill([0], [prompt[: slots.capacity - STEPS - 2]]).argmax(-1)
        last_B = slots.decode([0], last_B).argmax(-1)
        events = self._profiled(slots, last_B)
        return shares(events, lambda name: any(part in name for part in FUSED_NAMES))

    def _profiled(self, slots: Any, last_B: Any) -> list[Any]:
        """Events of some decoding steps, within one called "steps"."""
        import torch
        from torch.profiler import ProfilerActivity, profile, record_function

        kinds = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if self.decoder.device.type == "cuda" else [])]
        with profile(activities=kinds) as seen, torch.inference_mode(), record_function("steps"):
            for _ in range(STEPS):
                last_B = slots.decode([0], last_B).argmax(-1)
            last_B.tolist()
        return list(seen.key_averages())

    def _form(self, module: Any, norm: str) -> Callable[[Any], Any]:
        form = FORMS.get(norm)
        return (lambda x: form(x, module.weight)) if form else module.forward

    def _replace(self, forms: list[Callable[[Any], Any]]) -> None:
        for module, form in zip(self._modules, forms, strict=True):
            vars(module)["forward"] = form  # found before the class's own


def shares(events: list[Any], is_norm: Callable[[str], bool]) -> dict[str, Any]:
    """Of the time of "steps" on the host; on a GPU also of the time that its kernels take."""
    steps = next(event for event in events if event.key == "steps")
    norms = [event for event in events if is_norm(event.key)]
    found = {"share": sum(event.cpu_time_total for event in norms) / steps.cpu_time_total}
    device = sum(event.self_device_time_total for event in events if event.key != "one norm")
    if device:
        found["device_share"] = sum(event.device_time_total for event in norms) / device
    return found
