"""The CPU decoder in C++ (native/): its weights from a model folder, slots, logits.

It is built at installation where there is a compiler. Where there was none, ``available()`` is False, and torch serves.

Shapes: B slots, T tokens, V vocabulary.
"""

from __future__ import annotations

import importlib.util
import os
import sys
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import torch
from torch import Tensor

from openelm.errors import UserError
from openelm.model.folder import find_model_folder, load_config, open_tensors, tensor_shapes
from openelm.model.geometry import ModelConfig
from openelm.model.quantize import GROUP_SIZES, Quantized

KERNELS = ("avx512", "avxvnni", "avx2", "portable")  # fastest first
BITS = (8, 4)  # to which weights are rounded at load


@cache
def _extension() -> ModuleType | str:
    """The compiled module, or why there is none. OPENELM_NATIVE names a folder that it is built in."""
    try:
        if folder := os.environ.get("OPENELM_NATIVE"):
            file = next(Path(folder).glob("_native*.so"), None)
            if file is None:
                return f"OPENELM_NATIVE={folder} holds no _native*.so: build it there (docs/native.md)"
            spec = importlib.util.spec_from_file_location("openelm.infer._native", file)
            assert spec is not None and spec.loader is not None
            module = importlib.util.module_from_spec(spec)
            spec.loader.exec_module(module)
            return module
        return importlib.import_module("openelm.infer._native")
    except ImportError as error:
        return f"the CPU decoder is not built ({error}): install again with a C++ compiler, or go on with torch"


def available() -> bool:
    """Whether the decoder is there; where it is not, the reason is printed, once."""
    extension = _extension()
    if isinstance(extension, str):
        _say_once(extension)
        return False
    return True


def computes(config: ModelConfig) -> bool:
    """Whether the decoder, where it is built, computes such a model; where it does not, the reason is printed, once."""
    if reason := _not_computed(config):
        _say_once(reason)
    return not reason


def _not_computed(config: ModelConfig) -> str:
    norm = config.normalization_layer_name
    if norm == "rms_norm":
        return ""
    return f"normalization_layer_name={norm!r}: the CPU decoder computes 'rms_norm' only; go on with torch"


@cache
def _say_once(message: str) -> None:
    print(message, file=sys.stderr)


def _required() -> Any:
    extension = _extension()
    if isinstance(extension, str):
        raise UserError(extension)
    return extension


def kernels() -> list[str]:
    """Those that this CPU can run, fastest first."""
    extension = _required()
    return [name for name in KERNELS if extension.has_kernels(name)]


def physical_cores() -> int:
    """Cores that this process may use; two threads of one core count once."""
    cpus = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else range(os.cpu_count() or 1)
    cores = set()
    for cpu in cpus:
        siblings = Path(f"/sys/devices/system/cpu/cpu{cpu}/topology/thread_siblings_list")
        cores.add(siblings.read_text() if siblings.is_file() else str(cpu))
    return max(1, len(cores))


def read_bandwidth(threads: int | None = None, *, megabytes: int = 512, rounds: int = 5) -> float:
    """Bytes a second that ``threads`` read from a buffer larger than the caches: the best of some rounds."""
    bandwidth: float = _required().read_bandwidth(threads or physical_cores(), megabytes * 10**6, rounds)
    return bandwidth


class NativeSlots:
    """Texts in the making: keys and values of their tokens. A slot takes memory once it is used.

    A slot's logits are the same, to the bit, whichever others advance with it. What does not fit (a token id outside
    the vocabulary, more tokens than there is room for) is a ValueError, and changes no slot.
    """

    def __init__(self, native: Any, config: ModelConfig, count: int, capacity: int) -> None:
        self._native, self._vocab_size, self._padded_vocab = native, config.vocab_size, native.padded_vocab
        self._capacity = capacity
        self._sequences: list[Any] = [None] * count
        self._logits_BV = torch.empty(1, self._padded_vocab)

    @property
    def capacity(self) -> int:
        """Tokens that each has room for."""
        return self._capacity

    def length(self, slot: int) -> int:
        """Tokens that a slot holds."""
        length: int = self._sequence(slot).length
        return length

    def prefill(self, slots: Sequence[int], prompts: Sequence[Sequence[int] | Tensor]) -> Tensor:
        """Run each slot's tokens behind those that it holds; logits (B, V) after the last of each."""
        arrays = [_checked(ids) for ids in prompts]
        logits_BV = torch.empty(len(slots), self._padded_vocab)
        ids = np.concatenate(arrays) if arrays else np.empty(0, np.int64)
        self._native.forward(self._each(slots), ids, [len(array) for array in arrays], logits_BV.numpy(), False)
        return logits_BV[:, : self._vocab_size]

    def decode(self, slots: Sequence[int], tokens_B: Sequence[int] | Tensor) -> Tensor:
        """Run one more token of each slot; logits (B, V) after it, which the next call writes over."""
        if len(slots) > len(self._logits_BV):
            self._logits_BV = torch.empty(len(slots), self._padded_vocab)
        logits_BV = self._logits_BV[: len(slots)]
        self._native.decode(self._each(slots), _checked(tokens_B), logits_BV.numpy())
        return logits_BV[:, : self._vocab_size]

    def verify(self, slot: int, ids: Sequence[int] | Tensor) -> Tensor:
        """Run tokens behind those that a slot holds; logits (T, V) after each."""
        array = _checked(ids)
        logits_TV = torch.empty(len(array), self._padded_vocab)
        self._native.forward(self._each([slot]), array, [len(array)], logits_TV.numpy(), True)
        return logits_TV[:, : self._vocab_size]

    def truncate(self, slot: int, length: int) -> None:
        """Forget all but a slot's first ``length`` tokens. ValueError where there are fewer."""
        self._sequence(slot).truncate(length)

    def copy(self, source: int, target: int) -> None:
        """Let ``target`` hold what ``source`` holds."""
        self._sequence(target).copy(self._sequence(source))

    def _each(self, slots: Sequence[int]) -> list[Any]:
        return [self._sequence(slot) for slot in slots]

    def _sequence(self, slot: int) -> Any:
        if not 0 <= slot < len(self._sequences):
            raise ValueError(f"slot {slot} is not one of {len(self._sequences)}, which are counted from 0")
        sequence = self._sequences[slot]
        if sequence is None:
            sequence = self._sequences[slot] = self._native.new_sequence(self._capacity)
        return sequence


class NativeModel:
    """A model on the CPU (a ``Decoder`` of slots.py); one computes at a time, whoever calls."""

    device = torch.device("cpu")

    def __init__(self, native: Any, config: ModelConfig, bits: int) -> None:
        self._native, self.config, self.bits = native, config, bits

    @classmethod
    def load(
        cls,
        folder: str | Path,
        *,
        bits: int | None = None,
        group_size: int = 32,
        threads: int | None = None,
        isa: str | None = None,
    ) -> NativeModel:
        """Open a model folder, or the ``model/`` of a run folder.

        Weights are taken as they are stored, those of fp32 and fp16 as bf16. ``bits`` rounds them, where they are not
        quantised, to 8 (a scale a row) or 4 (mlx's format, in groups of ``group_size``). ``threads``: default, the
        physical cores. ``isa``: one of ``kernels()``; default OPENELM_ISA, or else the fastest. Raises UserError.
        """
        extension = _required()
        folder = find_model_folder(Path(folder))
        config = load_config(folder)[0]
        if reason := _not_computed(config):
            raise UserError(f"{folder}: {reason}")
        isa = isa or os.environ.get("OPENELM_ISA") or kernels()[0]
        if isa not in kernels():
            raise UserError(f"isa {isa!r} is not one of those of this CPU: {', '.join(kernels())}")
        if bits not in (None, *BITS) or group_size not in GROUP_SIZES:
            raise UserError(f"bits {bits!r} in groups of {group_size!r}: give 8 or 4 bits, and groups of 32, 64 or 128")
        threads = physical_cores() if threads is None else threads
        if threads < 1:
            raise UserError(f"threads={threads} must be at least 1")
        half = torch.arange(0, config.head_dim, 2, dtype=torch.float32)
        native = extension.Model(
            model_dim=config.model_dim,
            head_dim=config.head_dim,
            vocab_size=config.vocab_size,
            query_heads=list(config.num_query_heads),
            kv_heads=list(config.num_kv_heads),
            ffn_dims=list(config.ffn_dims),
            qk_norm=config.normalize_qk_projections,
            shared_embedding=config.share_input_output_layers,
            rope=(config.rope_freq_constant ** (-half / config.head_dim)).tolist(),
            threads=threads,
            kernels=isa,
        )
        return cls(native, config, _fill(native, folder, config, bits, group_size))

    @property
    def bytes_per_token(self) -> int:
        """Bytes of weights that one token reads; its keys and values come on top."""
        size: int = self._native.bytes
        return size

    @property
    def threads(self) -> int:
        """Threads that compute."""
        threads: int = self._native.threads
        return threads

    @property
    def isa(self) -> str:
        """The kernels in use."""
        name: str = self._native.kernels
        return name

    @property
    def description(self) -> str:
        """As Decoder has it."""
        weights = "bfloat16" if self.bits == 16 else f"{self.bits} bits"
        return f"native, {self.isa}, threads: {self.threads}, {weights}"

    def slots(self, count: int, capacity: int) -> NativeSlots:
        """Empty slots with room for ``capacity`` tokens each; ValueError beyond the model's context."""
        limit = self.config.max_context_length
        if count < 1:
            raise ValueError(f"{count} slots: give at least 1")
        if not 1 <= capacity <= limit:
            raise ValueError(f"a capacity of {capacity} tokens: the model's context allows 1 to {limit}")
        return NativeSlots(self._native, self.config, count, capacity)


def _checked(ids: Sequence[int] | Tensor) -> np.ndarray:
    """Token ids as the decoder takes them; it checks their range, this that they are whole numbers in one row."""
    array = ids.numpy() if isinstance(ids, Tensor) else np.asarray(ids)
    if array.ndim != 1 or (array.size and array.dtype.kind not in "iu"):
        raise ValueError(f"token ids must be whole numbers in one row, not {array.dtype} of shape {array.shape}")
    return np.ascontiguousarray(array, dtype=np.int64)


def _fill(native: Any, folder: Path, config: ModelConfig, bits: int | None, group_size: int) -> int:
    """Hand over all tensors; the bits of the weights."""
    stored, shapes = open_tensors(folder), tensor_shapes(config)
    stored.check(shapes)
    held = bits or 16
    for name, shape in shapes.items():
        tensor = stored.raw(name)
        if isinstance(tensor, Quantized):
            if bits not in (None, tensor.bits):
                raise UserError(f"{folder} is quantised to {tensor.bits} bits already: leave bits={bits} out")
            words, scales, biases = tensor.weight.numpy(), _scales(tensor.scales), _scales(tensor.biases)
            native.set_affine(name, words, scales, biases, tensor.bits, tensor.group_size)
            held = tensor.bits
        elif len(shape) == 1:
            native.set_gain(name, tensor.float().numpy())
        else:
            values = tensor.to(torch.bfloat16).contiguous().view(torch.uint16).numpy()
            native.set_bf16(name, values, bits or 16, group_size)
    return held


def _scales(values: Tensor) -> np.ndarray:
    """bf16 as its bits; all else as fp32, which holds it."""
    array: np.ndarray = (values.view(torch.uint16) if values.dtype == torch.bfloat16 else values.float()).numpy()
    return array
