"""Hugging Face transformers: a folder that it opens, or a model of random weights by its configuration alone."""

from __future__ import annotations

import importlib.util
import os
import sys
from collections.abc import Callable
from typing import Any


def imports() -> None:
    """What loading needs; nothing is asked of the Hub."""
    os.environ["HF_HUB_OFFLINE"] = "1"
    import torch  # noqa: F401
    import transformers  # noqa: F401


def load(specification: dict[str, Any]) -> Transformers:
    """``folder`` and ``code``, or else ``architecture`` and ``config`` of a baseline.

    ``code`` is the file of our transformers model; ``compile`` is for a static, compiled cache.
    """
    import torch
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    torch.set_num_threads(specification["threads"])
    dtype, device = getattr(torch, specification["dtype"]), specification["device"]
    # The keyword has changed its name; both are understood for long.
    key = "dtype" if int(transformers.__version__.split(".")[0]) >= 5 else "torch_dtype"
    if folder := specification.get("folder"):
        register(specification["code"])
        model = transformers.AutoModelForCausalLM.from_pretrained(folder, **{key: dtype}).to(device)
    else:
        config = getattr(transformers, specification["architecture"])(**specification["config"])
        with torch.device(device):
            before = torch.get_default_dtype()
            torch.set_default_dtype(dtype)
            try:
                model = (with_one_ffn if specification.get("share_ffn") else from_config)(config)
            finally:
                torch.set_default_dtype(before)
    if specification.get("norm"):
        replace_norms(model, specification["norm"])
    return Transformers(model.eval(), specification)


def from_config(config: Any) -> Any:
    """Random weights."""
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_config(config)


def with_one_ffn(config: Any) -> Any:
    """The same with one FFN for all layers, and no other ever in memory: they are made with tiny ones of their own."""
    width = config.intermediate_size
    config.intermediate_size = 1
    model = from_config(config)
    config.intermediate_size = width
    ffn = type(model.model.layers[0].mlp)(config)
    for layer in model.model.layers:
        layer.mlp = ffn
    return model


def register(file: str) -> None:
    """Make the Auto classes know OpenELM by our own file, given by its path: this Python need not have our package.

    So the copy that lies in an exported folder, and that anyone may have changed, is not run.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    spec = importlib.util.spec_from_file_location("modeling_openelm", file)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # where transformers looks for the file of a class
    spec.loader.exec_module(module)
    AutoConfig.register("openelm", module.OpenELMConfig, exist_ok=True)
    AutoModelForCausalLM.register(module.OpenELMConfig, module.OpenELMForCausalLM, exist_ok=True)


class Transformers:
    """``generate``, greedily, for as long as is asked."""

    def __init__(self, model: Any, specification: dict[str, Any]) -> None:
        import torch
        import transformers

        self._model, self._compiled = model, bool(specification.get("compile"))
        self._on_cuda = model.device.type == "cuda"
        self._caches: dict[tuple[int, int], Any] = {}
        self._cache: Any = None
        settings = model.generation_config
        settings.do_sample, settings.eos_token_id, settings.pad_token_id = False, None, 0
        settings.use_cache = True
        if self._compiled:
            # On a CPU transformers does not compile by itself; with a cache whose size stays, it can be compiled.
            mode = "reduce-overhead" if self._on_cuda else "default"
            model.forward = torch.compile(model.forward, mode=mode, fullgraph=True)
        parameters = sum(parameter.numel() for parameter in model.parameters())
        table = model.get_input_embeddings().weight
        tied = model.get_output_embeddings().weight is table
        read = parameters - (0 if tied else table.numel())
        if specification.get("share_ffn"):  # more than a cache holds, so every layer reads it again
            ffn = model.model.layers[0].mlp
            read += (len(model.model.layers) - 1) * sum(parameter.numel() for parameter in ffn.parameters())
        size = next(model.parameters()).element_size()
        self.about = {
            "engine": "transformers, compiled" if self._compiled else "transformers",
            "parameters": parameters,
            "bytes_per_token": size * read,
            "device": str(model.device),
            "threads": torch.get_num_threads(),
            "software": f"transformers {transformers.__version__}, torch {torch.__version__}",
        }

    def prepare(self, batch: int, room: int) -> None:
        """An empty cache of fixed size, where the model is compiled for it; else generate makes its own."""
        if not self._compiled:
            return
        import torch
        from transformers import StaticCache

        if (batch, room) not in self._caches:
            self._caches[batch, room] = StaticCache(config=self._model.config, max_cache_len=room)
        self._cache = self._caches[batch, room]
        with torch.inference_mode():  # in which it is filled
            self._cache.reset()

    def run(self, prompts: list[list[int]], tokens: int, first: Callable[[], None]) -> list[list[int]]:
        """As child.py asks for it; a streamer is how generate tells of the first token, and it takes one prompt."""
        import torch

        streamer = FirstToken(first)
        ids_BT = torch.tensor(prompts, device=self._model.device)
        settings = {"max_new_tokens": tokens, "attention_mask": torch.ones_like(ids_BT)}
        settings |= {"past_key_values": self._cache} if self._cache is not None else {}
        with torch.inference_mode():
            out = self._model.generate(ids_BT, streamer=streamer, **settings)
        made: list[list[int]] = out[:, ids_BT.shape[1] :].tolist()
        return made

    def peak_memory_bytes(self) -> int:
        """The device's, where there is one, else the process's."""
        import torch

        if self._on_cuda:
            return torch.cuda.max_memory_allocated()
        peak: int = sys.modules["__main__"].peak_memory_bytes()
        return peak

    def norms(self, prompt: list[int], tokens: int) -> dict[str, Any]:
        """Norm invocations a token, and the share of generation's time that is spent in them."""
        import time

        import torch

        counts, times = [0], [0.0]
        starts: list[float] = []

        def before(*_: Any) -> None:
            starts.append(time.perf_counter())

        def after(*_: Any) -> None:
            counts[0] += 1
            times[0] += time.perf_counter() - starts.pop()

        hooks = [hook for norm in norms_of(self._model) for hook in (
            norm.register_forward_pre_hook(before), norm.register_forward_hook(after))]  # fmt: skip
        marks: list[float] = []

        def first() -> None:
            counts[0], times[0] = 0, 0.0
            marks.append(time.perf_counter())

        self.prepare(1, len(prompt) + tokens)
        self.run([prompt], tokens, first)
        if self._on_cuda:
            torch.cuda.synchronize()
        elapsed_s = time.perf_counter() - marks[0]
        for hook in hooks:
            hook.remove()
        return {"invocations": counts[0] / (tokens - 1), "share": times[0] / elapsed_s}


class FirstToken:
    """A streamer that keeps nothing: it is handed the prompt, then token after token."""

    def __init__(self, first: Callable[[], None]) -> None:
        self._first, self._seen = first, 0

    def put(self, value: Any) -> None:
        self._seen += 1
        if self._seen == 2:
            self._first()

    def end(self) -> None:
        pass


def norms_of(model: Any) -> list[Any]:
    """The modules that are norms, by the name of their class."""
    return [module for module in model.modules() if type(module).__name__.endswith("Norm")]


def replace_norms(model: Any, kind: str) -> None:
    """Let every norm compute as the paper's naive RMSNorm does, one small operation after the other."""
    import torch

    assert kind == "naive"
    for norm in norms_of(model):
        width = model.config.hidden_size
        parameter = next(model.parameters())
        gain = torch.ones(width, dtype=parameter.dtype, device=parameter.device)

        def forward(x: Any, gain: Any = gain) -> Any:
            y = x.float()
            y = y * torch.rsqrt(y.pow(2).mean(-1, keepdim=True) + 1e-6)
            return y.type_as(x) * gain

        norm.forward = forward
