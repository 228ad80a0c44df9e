"""LoRA, DoRA and rsLoRA in our model by the peft library; and merged into its weights, without it.

The output layer of a model that shares its embedding is the embedding without the adapter, as peft has it on the
exported model: an adapter on the embedding changes what is read, and not what is predicted.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from openelm.data.tokenizer import Tokenizer
from openelm.errors import UserError
from openelm.interop.adapter import (
    EMBEDDING,
    Adapter,
    changes_output,
    checked,
    modules,
    open_adapter,
    parts,
    read_tensor,
    shapes,
)
from openelm.interop.source import TOKENIZER_FILES, Source, open_folder, read_text, with_tokenizer
from openelm.interop.verify import compare, reference_logits, some_rows
from openelm.model.stored import StoredTensors
from openelm.model.transformer import OpenELM

BOUND = 1e-4  # of any logit, merged against unmerged in fp32; times their spread where that is above 1


def attach(model: OpenELM, adapter: Adapter) -> None:
    """Put an adapter into a model, on any device, the meta device too; only its own parameters are trained then.

    It changes nothing yet where the weights are there (B is zero, or A for the embedding). Its parameters have the
    dtype of the matrices that they belong to. UserError without peft, and where a target matches no module.
    """
    peft = _peft()
    settings = peft.LoraConfig(
        r=adapter.r,
        lora_alpha=adapter.alpha,
        lora_dropout=adapter.dropout,
        target_modules=list(checked(adapter, model.config).targets),
        use_dora=adapter.kind == "dora",
        use_rslora=adapter.kind == "rslora",
    )
    assert not any(".base_layer." in name for name, _ in model.named_parameters()), "one adapter a model"
    base = model.token_embeddings.weight
    with torch.random.fork_rng(devices=[]), torch.device(base.device):
        peft.inject_adapter_in_model(settings, model)
    for parameter in model.parameters():
        if parameter.requires_grad and parameter.dtype != base.dtype:
            parameter.data = parameter.data.to(base.dtype)  # peft makes bf16 fp32, and computes so
    model.train(model.training)  # new modules are in training mode, whatever the model is in
    model.adapt = partial(attach, adapter=adapter)


def initial_values(
    model: OpenELM,
    adapter: Adapter,
    read_base: Callable[[str], Tensor],
    seed: int,
    dtype: torch.dtype = torch.float32,
) -> Iterator[tuple[str, Tensor]]:
    """First values of all parameters of a model with ``adapter`` attached: whole, fp32, on the CPU, in its order.

    Those of the model itself come from ``read_base``, by their names there; the adapter's are drawn as peft draws them,
    each tensor by a generator of its own, seeded by its place. ``dtype`` is what the model computes in: DoRA's
    magnitudes are the norms of the weights in it. Once rounded to it they are what they are divided by, so that the
    adapter changes nothing to the bit.
    """
    norms: dict[str, Tensor] = {}
    for index, (name, parameter) in enumerate(model.named_parameters()):
        module, found, part = name.partition(".lora_")
        if not found:
            weight = read_base(name.replace(".base_layer.", ".")).float()
            if adapter.kind == "dora" and ".base_layer." in name:
                own = name.partition(".base_layer.")[0]
                norms[own] = _norm(weight.to(dtype).float(), own)
            yield name, weight
            continue
        generator = torch.Generator().manual_seed(seed * 100_003 + index)
        value = torch.zeros(parameter.shape)
        if part.startswith("A."):
            bound = parameter.shape[1] ** -0.5
            value.uniform_(-bound, bound, generator=generator)
        elif part.startswith("embedding_B."):
            value.normal_(generator=generator)
        elif part.startswith("magnitude_vector."):
            value = norms.pop(module)
        yield name, value


def load_adapter(model: OpenELM, folder: Path) -> Adapter:
    """Attach the adapter of a folder to a model, with its values. UserError where it belongs to another model."""
    adapter, stored = open_adapter(folder, model.config)
    attach(model, adapter)
    parameters = dict(model.named_parameters())
    with torch.no_grad():
        for name in shapes(adapter, model.config):
            parameters[name].copy_(read_tensor(folder, stored, name))
    return adapter


@contextmanager
def switched_off(model: OpenELM) -> Iterator[None]:
    """The model computes as its base does, without the adapter. Inside another such context it changes nothing."""
    # Not by peft's own switch: that freezes the parameters too, and sharded ones would forget what they were.
    layers = [module for module in model.modules() if hasattr(module, "_disable_adapters")]
    before = [layer._disable_adapters for layer in layers]
    try:
        for layer in layers:
            layer._disable_adapters = True  # type: ignore[assignment]
        yield
    finally:
        for layer, was in zip(layers, before, strict=True):
            layer._disable_adapters = was


def merged(source: Source, adapter_folder: Path, *, untie: bool, name: str = "") -> Source:
    """A model with an adapter's change in its own weights, computed in fp32, a tensor at a time.

    An adapter on an embedding that is the output layer too needs ``untie``: the result has an output layer of its own,
    which is the embedding as it was. UserError without, and where the adapter belongs to another model. The adapter is
    called ``name`` in the result, by default as its folder. A tokenizer and a chat template beside it are the result's.
    """
    adapter, stored = open_adapter(adapter_folder, source.config)
    source = _with_own_tokenizer(source, adapter_folder)
    config, name = source.config, name or adapter_folder.resolve().name
    apart = changes_output(adapter, config)
    if apart and not untie:
        extra = config.vocab_size * config.model_dim
        raise UserError(
            f"{adapter_folder} adapts {EMBEDDING}, which is the output layer of {source.origin} too: merged, it would "
            f"change every logit. Give the result an output layer of its own, {extra:,} parameters more, with --untie"
        )
    changed = modules(adapter, config)

    def read(tensor: str) -> Tensor:
        if apart and tensor == "classifier.weight":
            return source.read(f"{EMBEDDING}.weight")
        module = tensor.removesuffix(".weight")
        weight = source.read(tensor)
        return _changed(weight, module, adapter, adapter_folder, stored) if module in changed else weight

    note = f"adapter {name} merged in: {adapter.kind}, r {adapter.r}, alpha {adapter.alpha:g}, on "
    note += ", ".join(adapter.targets)
    return replace(
        source,
        config=config.changed(share_input_output_layers=False) if apart else config,
        read=read,
        adapter=name,
        chat_template=read_text(adapter_folder / "chat_template.jinja") or source.chat_template,
        notes=(*source.notes, note, *(["embedding and output layer are two matrices now"] if apart else [])),
    )


def _with_own_tokenizer(source: Source, adapter_folder: Path) -> Source:
    """The model with the tokenizer that its adapter was trained with, where that was kept beside it."""
    if not any((adapter_folder / name).is_file() for name in TOKENIZER_FILES):
        return source
    try:
        return with_tokenizer(source, Tokenizer.load(adapter_folder))
    except UserError as error:
        raise UserError(
            f"{adapter_folder} holds a tokenizer that cannot be the model's ({error}): to keep the model's own, take "
            "that one's files away"
        ) from error


@dataclass(frozen=True)
class Check:
    """How far merged weights are from the model with the adapter beside them, by logits."""

    largest_difference: float  # of any logit, computed in fp32 from the merged weights
    bound: float  # that it must not exceed
    rounded_difference: float  # the same from the weights as they were written
    positions: int

    def __str__(self) -> str:
        return (
            f"merged and unmerged agree: largest logit difference {self.largest_difference:.2g} (bound {self.bound:g}) "
            f"at {self.positions} positions; with the weights as written {self.rounded_difference:.2g}"
        )


@torch.inference_mode()
def unmerged_logits(base: Source, adapter_folder: Path) -> Tensor:
    """(B, T, V) logits in fp32 of a model with an adapter beside it, as peft computes them, of rows chosen by rule."""
    with torch.device("meta"):
        model = OpenELM(base.config)
    weights = {name: base.weight(name).to(torch.float32) for name in base.shapes}
    model.load_state_dict(weights, assign=True)
    load_adapter(model.eval(), adapter_folder)
    return model(some_rows(base))


def check_merged(expected: Tensor, source: Source, written: Path, dtype: torch.dtype) -> Check:
    """What was written, against ``source``, which is ``merged``, and that against ``expected``, unmerged.

    UserError where the logits differ by more than BOUND, or any weight is not the merged one, rounded to ``dtype``.
    """
    rows, stored = some_rows(source), open_folder(written)
    difference = compare(expected, reference_logits(source, rows))
    bound = BOUND * max(1.0, expected.std().item())
    if not difference.largest_difference <= bound:
        raise UserError(
            f"the merged weights compute something else: a logit differs by {difference.largest_difference:.2g}, of "
            f"which {bound:.2g} may be rounding; nothing was kept: please report this"
        )
    for name in source.shapes:
        if not torch.equal(stored.weight(name), source.weight(name).to(dtype)):
            raise UserError(f"{written}: {name} came back otherwise than it was written: please report this")
    rounded = compare(expected, reference_logits(stored, rows)).largest_difference
    return Check(difference.largest_difference, bound, rounded, difference.positions)


def _changed(weight: Tensor, module: str, adapter: Adapter, folder: Path, stored: StoredTensors) -> Tensor:
    """The matrix of a module with the adapter in it, fp32; no second one of that size is made on the way."""
    names = parts(module)
    a, b = (read_tensor(folder, stored, name) for name in names[:2])
    change = a.T @ b.T if module == EMBEDDING else b @ a
    total = change.mul_(adapter.scaling).add_(weight)
    if adapter.kind != "dora":
        return total
    length = read_tensor(folder, stored, names[2]) / _norm(total, module)
    return total.mul_(length if module == EMBEDDING else length[:, None])


def _norm(weight: Tensor, module: str) -> Tensor:
    """Lengths that DoRA's magnitudes stand for: of rows, one an output; of columns of the embedding."""
    return torch.linalg.norm(weight.T if module == EMBEDDING else weight, dim=1)


def _peft() -> Any:
    """The package; UserError where it is not installed."""
    try:
        import peft
    except ImportError as error:
        raise UserError(f"peft cannot be used here ({error}): pip install 'openelm-framework[tune]'") from error
    return peft
