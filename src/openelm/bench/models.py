"""The models that are measured: folders of random weights made once, and each format of them that a peer opens."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from openelm.data.tokenizer import Tokenizer, train_tokenizer
from openelm.errors import UserError
from openelm.files import whole_folder
from openelm.interop import gguf_file, mlx
from openelm.interop.convert import convert, open_source
from openelm.interop.source import TOKENIZER_FILES
from openelm.interop.target import Format
from openelm.model.folder import find_model_folder, load_config, open_tensors, tensor_shapes, write_model
from openelm.model.geometry import ModelConfig
from openelm.model.quantize import Quantized
from openelm.model.transformer import OpenELM, initial_weights

# What a model's weights can be: names of ours, and llama.cpp's. "8row" is rounded by the native decoder as it loads.
WEIGHTS = ("fp32", "bf16", "8bit", "4bit", "8row")
GGUF_WEIGHTS = {"BF16": "bf16", "Q8_0": "8bit", "Q4_0": "4bit"}
STORED = "stored"  # of a model that was given: as they are in its folder
TOKENIZER_VOCABULARY = 400


@dataclass(frozen=True)
class Model:
    """What is to be measured: a named size of random weights, or a folder. ``bits`` are those of a quantised one."""

    name: str
    config: ModelConfig
    folder: Path | None = None
    bits: int | None = None


def named(size: str, context: int) -> Model:
    """A named size, whose context is what is measured where that is longer. UserError names the nearest."""
    config = ModelConfig.from_name(size)
    return Model(size.removeprefix("OpenELM-"), config.changed(max_context_length=max(context, 2048)))


def given(path: str, context: int) -> Model:
    """A model folder or a run folder. UserError: none there, or its context is shorter than what is measured."""
    folder = find_model_folder(Path(path))
    config = load_config(folder)[0]
    if context > config.max_context_length:
        raise UserError(
            f"{path} has a context of {config.max_context_length} tokens, and {context} are to be measured: shorten "
            "--prompt, --tokens, --context or --prefill"
        )
    source = open_source(str(folder))
    bits = mlx_bits(folder) if source.quantized else None
    return Model(Path(path).resolve().name, config, folder, bits)


def mlx_bits(folder: Path) -> int:
    """Of a quantised folder's first quantised matrix."""
    stored = open_tensors(folder)
    first = (stored.raw(name) for name in tensor_shapes(load_config(folder)[0]))
    return next(tensor.bits for tensor in first if isinstance(tensor, Quantized))


def stored_bytes(model: Model, weights: str, group_size: int) -> int:
    """Bytes of the file that the weights take, reckoned before it is made."""
    if weights == STORED:
        assert model.folder is not None
        return file_bytes(model.folder)
    parameters = model.config.num_parameters()
    if weights in GGUF_WEIGHTS:
        _, values, size = next(row for row in gguf_file.TYPES.values() if row[0] == weights)
        table = model.config.vocab_size * model.config.model_dim
        # The writer gives the embedding, which is the output layer too, 8 bits where all else has 4.
        return parameters * size // values + (table * (34 - 18) // 32 if weights == "Q4_0" else 0)
    if weights in ("8bit", "4bit"):
        form = Format(torch.bfloat16, weights, group_size)
        shapes = tensor_shapes(model.config)
        return sum(entry.num_bytes for name, shape in shapes.items() for entry in mlx.entries_of(name, shape, form))
    return parameters * (4 if weights == "fp32" else 2)


def file_bytes(path: Path) -> int:
    """Bytes of a folder's weights, or of a file."""
    files = path.glob("model*.safetensors") if path.is_dir() else [path]
    return sum(file.stat().st_size for file in files)


class Models:
    """Makes what is asked for under ``folder``, each once; what is there already is taken."""

    def __init__(self, folder: Path, group_size: int, say: Callable[[str], None]) -> None:
        self._folder, self._group_size, self._say = folder, group_size, say

    def stored(self, model: Model, weights: str) -> Path:
        """A model folder with these weights."""
        if model.folder is not None and weights in (STORED, "8row"):
            return model.folder
        if model.folder is None and weights in ("bf16", "fp32"):
            return self._random(model, weights)
        base = self.stored(model, "bf16") if model.folder is None else model.folder
        if weights == "8row":
            return base
        if weights in ("8bit", "4bit"):
            form = Format(torch.bfloat16, weights, self._group_size)
            return self._converted(model, f"{weights}-{self._group_size}", base, "mlx", form)
        return self._converted(
            model, weights, base, "hf", Format(torch.float32 if weights == "fp32" else torch.bfloat16)
        )

    def for_transformers(self, model: Model) -> Path:
        """As it is exported for transformers, in bf16."""
        return self._converted(model, "hf", self._base(model), "hf", Format(torch.bfloat16))

    def gguf(self, model: Model, kind: str) -> Path:
        """A file for llama.cpp; one of GGUF_WEIGHTS."""
        form = Format(torch.bfloat16) if kind == "BF16" else Format(torch.bfloat16, kind)
        return self._converted(model, f"{kind}.gguf", self._base(model), "gguf", form)

    def _base(self, model: Model) -> Path:
        return model.folder if model.folder is not None else self.stored(model, "bf16")

    def _converted(self, model: Model, suffix: str, base: Path, target: str, form: Format) -> Path:
        path = self._folder / f"{model.name}-{suffix}"
        if not path.exists():
            self._say(f"making {path.name}")
            source = open_source(str(base))
            if target == "gguf" and source.tokenizer is None:  # which speed does not depend on
                source = replace(source, tokenizer=self._tokenizer())
            convert(source, target, path, form)
        return path

    def _random(self, model: Model, weights: str) -> Path:
        """First weights of training: values of the usual size, as denormal numbers would be slow."""
        path = self._folder / f"{model.name}-{weights}-{model.config.max_context_length}"
        if not path.exists():
            self._say(f"making {path.name}: {model.config.num_parameters():,} random weights")
            with torch.device("meta"):
                blank = OpenELM(model.config)
            drawn = initial_weights(blank, 0)

            def read(name: str) -> torch.Tensor:
                found, values = next(drawn)
                assert found == name, f"{name} is asked for, and {found} comes next"
                return values

            with whole_folder(path) as draft:
                dtype = torch.float32 if weights == "fp32" else torch.bfloat16
                write_model(draft, model.config, lambda name: read(name).to(dtype), dtype)
                self._tokenizer().save(draft)
        return path

    def tokenizer_for(self, path: Path) -> str | None:
        """The file of a small tokenizer, for a folder that has none: ours opens no model without."""
        if path.is_file() or any((path / name).is_file() for name in TOKENIZER_FILES):
            return None
        self._tokenizer()
        return str(self._folder / TOKENIZER_FILES[0])

    def _tokenizer(self) -> Tokenizer:
        """A small one of our own text, where a format wants one: what it says is never read."""
        file = self._folder / TOKENIZER_FILES[0]
        if file.is_file():
            return Tokenizer.load(file)
        texts = [path.read_text(encoding="utf-8") for path in sorted(Path(__file__).parent.glob("*.py"))]
        return train_tokenizer(texts, file, TOKENIZER_VOCABULARY, threads=1)
