"""GGUF, the file of llama.cpp and of what stands on it: written a tensor at a time, and read back where lossless.

llama.cpp knows this architecture by the name ``openelm``. It takes the output layer from the embedding, and splits
``proj_1`` into gate and up.
"""

from __future__ import annotations

import contextlib
import io
import math
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from openelm.data.chat import CHAT_TEMPLATE, HANDBOOK_TEMPLATE
from openelm.errors import UserError
from openelm.interop.card import in_one_line, parse, render
from openelm.interop.gguf_file import DTYPES, TYPES, GGUFFile, need_gguf
from openelm.interop.gguf_tokenizer import read_tokenizer, tokenizer_metadata
from openelm.interop.source import Source, geometry_of
from openelm.interop.target import Format, MissingEngineError, Target
from openelm.model.geometry import ModelConfig

if TYPE_CHECKING:
    from gguf import GGUFWriter
    from llama_cpp import Llama

ARCHITECTURE = "openelm"
EPSILON = 1e-6  # of every norm
# A layer's tensors here and there; proj_1 is gate and up, one above the other.
LAYER_NAMES = {
    "attn.qkv_proj": ("attn_qkv",),
    "attn.q_norm": ("attn_q_norm",),
    "attn.k_norm": ("attn_k_norm",),
    "attn.out_proj": ("attn_output",),
    "ffn.proj_1": ("ffn_gate", "ffn_up"),
    "ffn.proj_2": ("ffn_down",),
    "attn_norm": ("attn_norm",),
    "ffn_norm": ("ffn_norm",),
}
EMBEDDING = "token_embeddings.weight"
OTHER_NAMES = {EMBEDDING: "token_embd.weight", "norm.weight": "output_norm.weight"}

PLAIN = {dtype: kind for kind, dtype in DTYPES.items()}
QUANTIZED = ("Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1")
BLOCK = 32  # values that share a scale, along a row
# What llama.cpp calls the type of a file, by the type of most of its tensors.
FILE_TYPES = {"F32": 0, "F16": 1, "Q4_0": 2, "Q4_1": 3, "Q8_0": 7, "Q5_0": 8, "Q5_1": 9, "BF16": 32}
QUANTIZATION_VERSION = 2
CHUNK_VALUES = 2**22  # quantised at once
LARGEST_FLOAT16 = torch.finfo(torch.float16).max
LICENSE_KEYS = {"license": "general.license", "license_name": "general.license.name"}
LICENSE_KEYS["license_link"] = "general.license.link"

# Go templates that give what the Jinja templates of data/chat.py give.
TURNS = "{{ range .Messages }}<|{{ .Role }}|>\n{{ .Content }}EOS\n{{ end }}<|assistant|>\n"
EMPTY_SYSTEM = '{{ if or (not .Messages) (ne (index .Messages 0).Role "system") }}<|system|>\nEOS\n{{ end }}'
GO_TEMPLATES = {CHAT_TEMPLATE: TURNS, HANDBOOK_TEMPLATE: EMPTY_SYSTEM + TURNS}


def check(source: Source, form: Format) -> None:
    """UserError for what the format or llama.cpp cannot express, before anything is written."""
    need_gguf()
    if form.quantize and form.quantize.upper() not in QUANTIZED:
        raise UserError(f"quantize={form.quantize!r}: for llama.cpp it is one of {', '.join(QUANTIZED)}")
    if not source.config.share_input_output_layers:
        raise UserError(
            f"{source.origin} has an output layer of its own, and llama.cpp takes OpenELM's from the embedding: only "
            "models with share_input_output_layers can be converted; use --to hf or mlx"
        )
    if not source.config.normalize_qk_projections:
        raise UserError(
            f"{source.origin} does not normalise queries and keys, and llama.cpp's OpenELM always does: use --to hf"
        )
    if source.tokenizer is None:
        raise UserError(f"{source.origin} has no tokenizer, and llama.cpp reads it from the file: give --tokenizer")
    if source.tokenizer.vocab_size > source.config.vocab_size:
        raise UserError(
            f"the tokenizer has {source.tokenizer.vocab_size} tokens, the model of {source.origin} only "
            f"{source.config.vocab_size} rows: they do not belong together"
        )
    tokenizer_metadata(source.tokenizer, source.config.vocab_size)


def check_ollama(source: Source, form: Format) -> None:
    """As ``check``; and the chat template must be one that has a Go template, the end of a turn one that fits in it."""
    check(source, form)
    if source.chat_template is None:
        return
    if source.chat_template.rstrip("\n") not in GO_TEMPLATES:
        raise UserError(
            f"the chat template of {source.origin} is not one that can be written for Ollama: choose one with --chat, "
            "or use --to gguf and write the Modelfile by hand"
        )
    assert source.tokenizer is not None
    end = source.tokenizer.piece(source.tokenizer.eos_id)
    if not end.isprintable() or '"' in end or "{{" in end:
        raise UserError(
            f"turns of {source.origin} end with {end!r}, and a Modelfile cannot hold quotes, line breaks or {{{{ "
            "there: use --to gguf and write the Modelfile by hand"
        )


def write(path: Path, source: Source, form: Format) -> None:
    """Write one GGUF file; each tensor is read, cast and written before the next."""
    from gguf import GGMLQuantizationType, GGUFWriter

    numbers = {name: (number, *sizes) for number, (name, *sizes) in TYPES.items()}
    writer = GGUFWriter(path, ARCHITECTURE)
    try:
        for key, value in metadata(source, form).items():
            _add(writer, key, value)
        for name, shape in source.shapes.items():
            for theirs, part in zip(their_names(name), _part_shapes(name, shape), strict=True):
                number, block, block_bytes = numbers[_kind(name, shape, form)]
                size = math.prod(part) // block * block_bytes
                writer.add_tensor_info(theirs, part, np.dtype(np.float32), size, GGMLQuantizationType(number))
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        # Not by write_tensor_data: it asks NumPy to write, which does not say that a disk is full.
        (file,) = writer.fout or []
        writer.write_padding(file, file.tell())
        for name, shape in source.shapes.items():
            tensor = source.weight(name)
            for part in tensor.split(_part_shapes(name, shape)[0][0]):
                packed = _packed(part, _kind(name, shape, form), name)
                file.write(packed.data)
                writer.write_padding(file, packed.nbytes)
            del tensor, part, packed
    finally:
        writer.close()


def write_ollama(folder: Path, source: Source, form: Format) -> None:
    """Write model.gguf and the Modelfile that `ollama create` reads."""
    write(folder / "model.gguf", source, form)
    (folder / "Modelfile").write_text(modelfile(source), encoding="utf-8")


def modelfile(source: Source) -> str:
    """What Ollama is told about a model: how a conversation becomes text, where to stop, its licence."""
    assert source.tokenizer is not None
    lines = ["FROM ./model.gguf", f"PARAMETER num_ctx {source.config.max_context_length}"]
    if source.chat_template is not None:
        end = source.tokenizer.piece(source.tokenizer.eos_id)
        template = GO_TEMPLATES[source.chat_template.rstrip("\n")].replace("EOS", end)
        lines += [f'TEMPLATE """{template}"""', f'PARAMETER stop "{end}"', 'PARAMETER stop "<|user|>"']
    else:
        lines += ['TEMPLATE """{{ .Prompt }}"""']
    if terms := " ".join(_license(source.card).values()):
        terms = terms.replace('"', "'")  # three quotes would end it, and what follows would be read as instructions
        lines += [f'LICENSE """{terms}"""']
    return "\n".join(lines) + "\n"


def metadata(source: Source, form: Format) -> dict[str, Any]:
    """Every key of the file but its architecture: the names are llama.cpp's."""
    assert source.tokenizer is not None
    config, kind = source.config, form.quantize.upper() or PLAIN[form.dtype]
    found: dict[str, Any] = {"general.type": "model", "general.name": Path(source.origin).name or "OpenELM"}
    found |= {LICENSE_KEYS[key]: value for key, value in _license(source.card).items()}
    found["general.file_type"] = FILE_TYPES[kind]
    if form.quantize:
        found["general.quantization_version"] = QUANTIZATION_VERSION
    found |= {f"{ARCHITECTURE}.context_length": config.max_context_length, **_geometry(config)}
    found[f"{ARCHITECTURE}.rope.freq_base"] = float(config.rope_freq_constant)
    found[f"{ARCHITECTURE}.attention.layer_norm_rms_epsilon"] = EPSILON
    found |= tokenizer_metadata(source.tokenizer, config.vocab_size)
    if source.chat_template is not None:
        found["tokenizer.chat_template"] = source.chat_template
    return found


def _geometry(config: ModelConfig) -> dict[str, Any]:
    """The keys that follow from the shapes of the tensors."""
    found = {
        "block_count": config.num_transformer_layers,
        "embedding_length": config.model_dim,
        "feed_forward_length": list(config.ffn_dims),
        "attention.head_count": list(config.num_query_heads),
        "attention.head_count_kv": list(config.num_kv_heads),
        "attention.key_length": config.head_dim,
        "attention.value_length": config.head_dim,
        "rope.dimension_count": config.head_dim,
    }
    return {f"{ARCHITECTURE}.{key}": value for key, value in found.items()}


def _add(writer: GGUFWriter, key: str, value: Any) -> None:
    """A key in the type that llama.cpp reads it in."""
    kinds = {bool: "add_bool", int: "add_uint32", float: "add_float32", str: "add_string", list: "add_array"}
    getattr(writer, kinds[type(value)])(key, value)


def _kind(name: str, shape: tuple[int, ...], form: Format) -> str:
    """The type that a tensor is stored in."""
    if len(shape) == 1:
        return "F32"  # gains are few, and llama.cpp multiplies by them in fp32
    if not form.quantize:
        return PLAIN[form.dtype]
    if shape[-1] % BLOCK:
        return "F16"
    # The embedding is the output layer as well: the likeliest token hangs on small differences of its rows.
    return "Q8_0" if name == EMBEDDING else form.quantize.upper()


def _packed(tensor: Tensor, kind: str, name: str) -> np.ndarray:
    """The bytes of a matrix or a gain in one of llama.cpp's types."""
    if kind not in ("F32", "BF16") and tensor.numel() and tensor.abs().max() > LARGEST_FLOAT16:
        raise UserError(
            f"{name} holds {tensor.abs().max():.3g}, and {kind} keeps 16-bit floats up to {LARGEST_FLOAT16:.0f}: use "
            "--dtype bfloat16 without --quantize"
        )
    if kind in DTYPES:
        return tensor.to(DTYPES[kind]).contiguous().view(-1).view(torch.uint8).numpy()
    from gguf import GGMLQuantizationType, quants

    rows = max(CHUNK_VALUES // tensor.shape[-1], 1)
    chunks = [quants.quantize(part.float().numpy(), GGMLQuantizationType[kind]) for part in tensor.split(rows)]
    return np.concatenate(chunks)


def their_names(name: str) -> list[str]:
    """llama.cpp's names for a tensor of ours, in the order of its rows."""
    if name in OTHER_NAMES:
        return [OTHER_NAMES[name]]
    _, layer, rest = name.removesuffix(".weight").split(".", 2)
    return [f"blk.{layer}.{theirs}.weight" for theirs in LAYER_NAMES[rest]]


def _part_shapes(name: str, shape: tuple[int, ...]) -> list[tuple[int, ...]]:
    """Shapes of the parts that a tensor of ours is stored in, which are equal."""
    parts = len(their_names(name))
    return [(shape[0] // parts, *shape[1:])] * parts


def _license(card: str | None) -> dict[str, str]:
    """Licence, its name and its link, each in one line, where the front matter of a model card has them."""
    front = parse(card or "")[0]
    return {key: text for key in LICENSE_KEYS if (text := in_one_line(front.get(key)))}


def open_gguf(path: Path, *, dequantize: bool = False) -> Source:
    """A GGUF file of an OpenELM in F32, F16 or BF16, ours or that of llama.cpp's converter; UserError otherwise.

    With ``dequantize`` also one in ``QUANTIZED`` types, read as the fp32 values that its blocks stand for.
    """
    file = GGUFFile(path)
    _check_readable(file, (*DTYPES, *QUANTIZED) if dequantize else tuple(DTYPES))
    ours = dict(_our_names(file))
    known = {theirs for names in ours.values() for theirs in names}
    if strange := file.tensors.keys() - known:
        raise UserError(f"{path} holds {min(strange)}, which an OpenELM of its block_count does not have")
    shapes = {name: _joined_shape(file, names) for name, names in ours.items()}
    base = file.get(f"{ARCHITECTURE}.rope.freq_base", float, 10000.0)
    if not 0 < base < math.inf:
        raise UserError(f"{path}: {ARCHITECTURE}.rope.freq_base is {base}, and must be a positive number")
    config = geometry_of(
        shapes,
        str(path),
        max_context_length=file.get(f"{ARCHITECTURE}.context_length", int),
        rope_freq_constant=int(base) if base.is_integer() else base,
        bos_token_id=file.get("tokenizer.ggml.bos_token_id", int, 1),
        eos_token_id=file.get("tokenizer.ggml.eos_token_id", int, 2),
    )
    _check_geometry(file, config)
    kinds = {file.tensors[names[0]].kind for name, names in ours.items() if len(shapes[name]) > 1}
    tokenizer, note = read_tokenizer(file)
    if tokenizer is not None and tokenizer.vocab_size > config.vocab_size:
        raise UserError(f"{path}: {tokenizer.vocab_size} tokens for an embedding of {config.vocab_size} rows")

    def read(name: str) -> Tensor:
        parts = [file.read(theirs) for theirs in ours[name]]
        return torch.cat(parts) if len(parts) > 1 else parts[0]

    return Source(
        origin=str(path),
        config=config,
        dtype=DTYPES.get(kinds.pop(), torch.float32) if len(kinds) == 1 else torch.float32,
        read=read,
        tokenizer=tokenizer,
        chat_template=file.get("tokenizer.chat_template", str, "") or None,
        card=_card(file),
        notes=(f"{path}: {note}",) if note else (),
    )


def _check_readable(file: GGUFFile, kinds: tuple[str, ...]) -> None:
    architecture = file.get("general.architecture", str)
    if architecture != ARCHITECTURE:
        raise UserError(f"{file.path} is of architecture {architecture!r}: only {ARCHITECTURE!r} can be read")
    if file.get("split.count", int, 1) > 1:
        raise UserError(f"{file.path} is one of several parts: join them first, with llama.cpp's llama-gguf-split")
    for name, stored in file.tensors.items():
        if stored.kind not in kinds:
            raise UserError(
                f"{file.path} is quantised ({name} is {stored.kind}), and what quantising took away is not in it: "
                "convert the model that it was made from"
            )
    if any(stored.kind not in DTYPES for stored in file.tensors.values()):
        need_gguf()


def _our_names(file: GGUFFile) -> Iterator[tuple[str, list[str]]]:
    """Our name of each tensor, with llama.cpp's; UserError for the first that is missing."""
    layers = file.get(f"{ARCHITECTURE}.block_count", int)
    yield EMBEDDING, _found(file, EMBEDDING)
    for layer in range(layers):
        for rest in LAYER_NAMES:
            name = f"layers.{layer}.{rest}.weight"
            yield name, _found(file, name)
    yield "norm.weight", _found(file, "norm.weight")


def _found(file: GGUFFile, name: str) -> list[str]:
    names = their_names(name)
    for theirs in names:
        if theirs not in file.tensors:
            raise UserError(f"{file.path} lacks {theirs}, which its metadata asks for: it is no whole OpenELM")
    return names


def _joined_shape(file: GGUFFile, names: list[str]) -> tuple[int, ...]:
    shapes = [file.tensors[name].shape for name in names]
    if len(set(shapes)) > 1:
        raise UserError(f"{file.path}: {names[0]} and {names[1]} have shapes {shapes[0]} and {shapes[1]}, not the same")
    return (sum(shape[0] for shape in shapes), *shapes[0][1:])


def _check_geometry(file: GGUFFile, config: ModelConfig) -> None:
    """UserError where the metadata says something else than the shapes of the tensors."""
    for key, expected in _geometry(config).items():
        found = file.metadata.get(key, expected)  # the last three may be left out
        found = found.tolist() if isinstance(found, np.ndarray) else found
        if isinstance(expected, list) and not isinstance(found, list):
            found = [found] * len(expected)
        if found != expected:
            raise UserError(f"{file.path}: {key} is {found}, but the shapes of its tensors give {expected}")
    epsilon = file.get(f"{ARCHITECTURE}.attention.layer_norm_rms_epsilon", float)
    if not math.isclose(epsilon, EPSILON, rel_tol=1e-3):
        raise UserError(f"{file.path}: its norms add {epsilon:.3g}, and an OpenELM's add {EPSILON}")


def _card(file: GGUFFile) -> str | None:
    """A card with the licence, all that the file can say of one."""
    terms = {key: value for key, theirs in LICENSE_KEYS.items() if (value := file.get(theirs, str, ""))}
    name = in_one_line(file.get("general.name", str, "")) or "OpenELM"
    return render(terms, f"# {name}") if terms else None


def logits(path: Path, rows: list[list[int]]) -> Tensor:
    """(B, T, V) logits of llama.cpp, with keys and values kept in fp32: what is compared is the file."""
    try:
        from llama_cpp import Llama
    except ImportError as error:
        raise MissingEngineError(
            "llama.cpp is asked through the package llama-cpp-python: pip install llama-cpp-python"
        ) from error
    fp32, length = 0, len(rows[0])
    form: dict[str, Any] = dict(n_ctx=length, n_batch=length, logits_all=True, type_k=fp32, type_v=fp32)
    # It talks on standard error, and says there only why it does not load a file.
    with contextlib.redirect_stderr(io.StringIO()) as said:
        try:
            model = Llama(str(path), **form, verbose=True)
        except ValueError as error:
            reason = [line for line in said.getvalue().splitlines() if "error" in line]
            raise UserError(f"llama.cpp cannot load {path} ({' '.join(reason[:1]) or error})") from error
        with contextlib.closing(model):
            return torch.stack([_row_logits(model, row) for row in rows])


def _row_logits(model: Llama, row: list[int]) -> Tensor:
    model.reset()
    model.eval(row)
    return torch.from_numpy(np.array(model.scores[: len(row)], dtype=np.float32))


TARGET = Target(
    "llama.cpp",
    is_file=True,
    check=check,
    write=write,
    stored=lambda path: open_gguf(path, dequantize=True),
    logits=logits,
)
# Ollama computes with llama.cpp.
OLLAMA = Target(
    "llama.cpp",
    is_file=False,
    check=check_ollama,
    write=write_ollama,
    stored=lambda folder: open_gguf(folder / "model.gguf", dequantize=True),
    logits=lambda folder, rows: logits(folder / "model.gguf", rows),
)
