"""CoreNet's .pt files, read without running anything that stands in them: tensors by name, and AdamW's state.

A .pt file is a pickle, and a pickle is a program. PyTorch's restricted reader runs only what puts tensors, numbers and
dictionaries together; what else a file asks for ends in a UserError that names it.
"""

from __future__ import annotations

import re
import struct
import warnings
import zipfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from openelm.errors import UserError
from openelm.model.folder import DTYPES

# What wrappers put into the names of the modules that they hold: DDP, torch.compile, checkpointing, FSDP.
WRAPPERS = {"module", "_orig_mod", "_checkpoint_wrapped_module", "_fsdp_wrapped_module"}
GEOMETRY_KEY = "openelm"  # where our own files say their geometry
# A pickle names tensors and does not hold them: that of a 3B with its moments has a fifth of a megabyte.
LARGEST_PICKLE = 64 * 2**20
# The order in which CoreNet registers what a layer has, and so the order of its optimizer.
LAYER_ORDER = (
    *("attn.qkv_proj", "attn.q_norm", "attn.k_norm", "attn.out_proj"),
    *("ffn.proj_1", "ffn.proj_2", "ffn_norm", "attn_norm"),
)
MOMENTS = ("exp_avg", "exp_avg_sq")
# CoreNet keeps its best metric as a NumPy number. These are the only kinds that are put together, and not by NumPy.
_NUMBERS = {"f8": "<d", "f4": "<f", "i8": "<q", "i4": "<i", "b1": "<?"}


@dataclass(frozen=True)
class Contents:
    """What stands in a .pt file. Weights are by CoreNet's names and in the file's order; they are its own pages."""

    weights: dict[str, Tensor]
    geometry: dict[str, Any] | None  # in our own files
    training: dict[str, Any] | None  # the other keys of a full training state


@dataclass(frozen=True)
class TrainingState:
    """Where a run of CoreNet was: the steps that it made, and NAME.step, NAME.exp_avg, NAME.exp_avg_sq, ema.NAME.

    Without an exponential average in the file, ema.NAME is the weight itself.
    """

    path: Path
    step: int
    tensors: dict[str, Tensor]  # the file's own pages

    def shape(self, key: str) -> tuple[int, ...]:
        """Of the whole tensor."""
        return tuple(self.tensors[key].shape)

    def read(self, key: str, first_row: int = 0, rows: int | None = None) -> Tensor:
        """Rows of a tensor, all of them by default, in fp32 on the CPU; UserError for what no optimizer holds."""
        whole = self.tensors[key]
        part = whole[first_row : None if rows is None else first_row + rows] if whole.dim() else whole
        tensor = part.to(torch.float32, copy=True)
        if not tensor.isfinite().all() or (key.endswith(".exp_avg_sq") and (tensor < 0).any()):
            raise UserError(f"{self.path}: {key} holds values that no optimizer has: take an earlier training state")
        return tensor


def contents(path: Path) -> Contents:
    """The weights of a .pt file, and what a training state holds beside them; UserError where there are none."""
    weights, training = _load(path), None
    found = entries(weights, path)
    for key in ("model_state_dict", "ema_state_dict"):
        if key in found:
            weights = found[key]
            training = {other: value for other, value in found.items() if other != key}
            break
    return Contents(named_tensors(weights, path), _geometry(weights), training)


def entries(mapping: Any, path: Path) -> dict[Any, Any]:
    """What a dictionary of the file holds; UserError where it is none."""
    if not isinstance(mapping, dict):
        raise UserError(
            f"{path} holds a {type(mapping).__name__} where weights by name were expected: it is no checkpoint of "
            "CoreNet"
        )
    # By dict itself: a file can give an OrderedDict attributes that stand before its methods.
    return dict(dict.items(mapping))


def named_tensors(mapping: Any, path: Path) -> dict[str, Tensor]:
    """A state dict under CoreNet's names, what wrappers add taken out; UserError names what is no plain tensor."""
    found: dict[str, Tensor] = {}
    for key, value in entries(mapping, path).items():
        if not isinstance(key, str) or type(value) not in (Tensor, nn.Parameter):
            raise UserError(
                f"{path} holds {str(key)[:80]}, a {type(value).__name__}, among what should be tensors: it is neither "
                "weights nor a training state of CoreNet"
            )
        name, tensor = plain_name(key), value.detach()
        if tensor.layout != torch.strided or tensor.device.type != "cpu" or tensor.dtype not in DTYPES.values():
            raise UserError(f"{path}: {name} is of {tensor.dtype} ({tensor.layout}, {tensor.device.type}): no weight")
        if tensor.numel() * tensor.element_size() > tensor.untyped_storage().nbytes():
            raise UserError(f"{path}: {name} has shape {tuple(tensor.shape)}, more than the file holds: it is damaged")
        if name in found:
            raise UserError(f"{path} holds {name} twice, under names that differ by a wrapper's part only")
        found[name] = tensor
    return found


def plain_name(name: str) -> str:
    """A parameter's name without what wrappers put into it."""
    return ".".join(part for part in name.split(".") if part not in WRAPPERS)


def training_state(path: Path) -> TrainingState:
    """Step and AdamW moments of a full training state; UserError where anything about them is in doubt."""
    found = contents(path)
    if found.training is None or "optim_state_dict" not in found.training:
        raise UserError(
            f"{path} holds weights only, and no optimizer to go on with: give CoreNet's training_checkpoint_*.pt"
        )
    if strange := [name for name in found.weights if "lora_" in name]:
        raise UserError(f"{path} was training adapters ({strange[0]}), whose moments are not those of the whole model")
    moments = _by_name(entries(found.training["optim_state_dict"], path), found.weights, path)
    updates = {_checked(name, moments[name], weight, path) for name, weight in found.weights.items()}
    step = found.training.get("iterations")
    if not isinstance(step, int) or len(updates) != 1 or not 1 <= min(updates) <= step:
        raise UserError(
            f"{path} says that {step!r} iterations were made, and its optimizer {sorted(updates)[:3]} updates: these "
            "cannot belong together"
        )
    tensors = {f"{name}.{key}": tensor for name, of_one in moments.items() for key, tensor in of_one.items()}
    average = found.weights
    if "ema_state_dict" in found.training:
        average = named_tensors(found.training["ema_state_dict"], path)
    for name, weight in found.weights.items():
        if name not in average or average[name].shape != weight.shape:
            raise UserError(f"{path}: its exponential average lacks {name}, or has it in another shape")
        tensors[f"ema.{name}"] = average[name]
    return TrainingState(path, step, tensors)


def optimizer_order(weights: Mapping[str, Tensor]) -> list[str]:
    """Parameter names in the order in which CoreNet's model lists them."""
    layers = sorted({int(name.split(".")[1]) for name in weights if re.match(r"layers\.\d{1,4}\.", name)})
    inner = [f"layers.{layer}.{part}" for layer in layers for part in LAYER_ORDER]
    order = [f"{part}.weight" for part in ("token_embeddings", *inner, "norm", "classifier")]
    return [name for name in order if name in weights]


def _by_name(optimizer: dict[str, Any], weights: dict[str, Tensor], path: Path) -> dict[str, dict[str, Any]]:
    """AdamW's tensors of each parameter. FSDP stores them by name, all else by number: by group, then in order."""
    state, groups = entries(optimizer.get("state"), path), optimizer.get("param_groups")
    named = all(isinstance(key, str) for key in state)
    order = [plain_name(key) for key in state] if named else optimizer_order(weights)
    if sorted(order) != sorted(weights) or not (named or list(weights) == order):
        raise UserError(
            f"{path}: its optimizer and its weights do not list the same parameters in CoreNet's order, so moments "
            "cannot be told apart"
        )
    if named:
        return {plain_name(key): entries(value, path) for key, value in state.items()}
    matrices = [name for name in order if weights[name].dim() > 1]
    vectors = [name for name in order if weights[name].dim() == 1]
    if not isinstance(groups, list) or len(groups) not in (1, 2):
        raise UserError(f"{path}: its optimizer has no groups of parameters, or more than the two of CoreNet")
    listed = [order] if len(groups) == 1 else [matrices, vectors]
    numbers = [entries(group, path).get("params") for group in groups]
    decayed = len(groups) == 2 and groups[1].get("weight_decay")
    count = iter(range(len(order)))
    if decayed or numbers != [[next(count) for _ in names] for names in listed] or set(state) != set(range(len(order))):
        raise UserError(
            f"{path}: its optimizer does not group parameters as CoreNet does (matrices with weight decay, then the "
            "rest without, or all together): moments cannot be told apart"
        )
    return {name: entries(state[index], path) for index, name in enumerate(name for names in listed for name in names)}


def _checked(name: str, moments: dict[str, Any], weight: Tensor, path: Path) -> int:
    """The number of updates that a parameter has seen; its moments are looked at, but not read."""
    if moments.keys() != {"step", *MOMENTS}:
        raise UserError(f"{path}: the optimizer holds {sorted(map(str, moments))} of {name}, which AdamW does not")
    if isinstance(moments["step"], int | float):  # as older PyTorch kept it
        moments["step"] = torch.tensor(float(moments["step"]))
    named_tensors({f"{name}.{key}": tensor for key, tensor in moments.items()}, path)
    for key in MOMENTS:
        if moments[key].shape != weight.shape:
            raise UserError(f"{path}: {key} of {name} is not of the weight's shape {tuple(weight.shape)}")
    step = moments["step"]
    if step.numel() != 1 or not float(step).is_integer():
        raise UserError(f"{path}: the optimizer says {str(step)[:80]} of {name}, which is no number of updates")
    moments["step"] = step.reshape(())
    return int(step)


def _geometry(weights: Any) -> dict[str, Any] | None:
    """The geometry that our writer left where PyTorch keeps a state dict's versions."""
    metadata = getattr(weights, "_metadata", None)
    whole = dict.get(metadata, "") if isinstance(metadata, dict) else None
    geometry = dict.get(whole, GEOMETRY_KEY) if isinstance(whole, dict) else None
    return geometry if isinstance(geometry, dict) else None


class _NumberType:
    """Stands in for numpy.dtype."""

    def __init__(self, code: Any, *_: Any) -> None:
        self.code = code

    def __setstate__(self, state: Any) -> None:
        self.big = state[1] == ">"


def _number(kind: _NumberType, data: bytes) -> Any:
    """Stands in for NumPy's maker of numbers; data comes as text where Python 2's pickle form has no bytes."""
    return struct.unpack(_NUMBERS[kind.code].replace("<", ">" if kind.big else "<"), data)[0]


_STAND_INS = [
    (_NumberType, "numpy.dtype"),
    (_number, "numpy.core.multiarray.scalar"),  # NumPy 1
    (_number, "numpy._core.multiarray.scalar"),  # NumPy 2
]


@contextmanager
def _allowed(names: list[Any]) -> Iterator[None]:
    """Let PyTorch's restricted reader take these beside its own, and not what other libraries have allowed it."""
    before = torch.serialization.get_safe_globals()
    torch.serialization.clear_safe_globals()
    torch.serialization.add_safe_globals(names)
    try:
        yield
    finally:
        torch.serialization.clear_safe_globals()
        torch.serialization.add_safe_globals(before)


def _load(path: Path) -> Any:
    try:
        with path.open("rb") as file:
            zipped = file.read(4) == b"PK\x03\x04"  # as PyTorch itself decides it
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror}): give a readable .pt file") from error
    if zipped:
        _check_records(path)
    # torch.load goes by the name where it is given that of a safetensors file; mapping a file needs its name.
    mapped = zipped and path.suffix != ".safetensors"
    with path.open("rb") as file, _allowed(_STAND_INS), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            return torch.load(path if mapped else file, map_location="cpu", weights_only=True, mmap=mapped)
        except Exception as error:  # any bytes may stand there, and there is no end to what they can make fail
            raise _refusal(path, error) from error


def _check_records(path: Path) -> None:
    """PyTorch stores what it writes as it is: compressed, a small file could unfold to any size."""
    try:
        with zipfile.ZipFile(path) as archive:
            records = archive.infolist()
    except (zipfile.BadZipFile, OSError, ValueError, NotImplementedError) as error:
        raise UserError(f"{path} cannot be read as a PyTorch file ({error}): it is damaged or cut short") from error
    if any(record.filename.endswith("/constants.pkl") for record in records):
        raise UserError(f"{path} is a TorchScript program, no checkpoint: give a file that holds tensors only")
    for record in records:
        if record.compress_type != zipfile.ZIP_STORED or record.file_size != record.compress_size:
            raise UserError(f"{path}: {record.filename[:80]} is compressed, which PyTorch never does: refused")
        if record.filename.endswith(".pkl") and record.file_size > LARGEST_PICKLE:
            raise UserError(
                f"{path}: {record.filename[:80]} has {record.file_size:,} bytes, more than a checkpoint needs: refused"
            )


def _refusal(path: Path, error: Exception) -> UserError:
    text = str(error)
    if called := re.search(r"GLOBAL (\S+) (?:was not an allowed|whose module)", text):
        return UserError(
            f"{path} asks for {called[1]} to be called when it is opened, which no checkpoint needs: refused, and "
            "nothing of it was run; take a file that holds tensors only"
        )
    reason = text.rpartition("WeightsUnpickler error: ")[2].strip().partition("\n")[0][:200] or type(error).__name__
    return UserError(
        f"{path} cannot be read as a PyTorch checkpoint ({reason}): it is damaged, cut short or no such file"
    )
