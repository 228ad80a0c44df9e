"""openelm info: a geometry drawn layer by layer, and what it costs; or its twins, spread over the layers otherwise."""

from __future__ import annotations

import argparse
import json
import math
import shlex
import sys
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from openelm.commands import info_twins
from openelm.commands.generate import check_address, checked_kind
from openelm.errors import UserError

if TYPE_CHECKING:
    from openelm.config import RunConfig
    from openelm.model.geometry import ModelConfig

HELP = (
    "Draw the layers of a model or of its twin, and count its parameters, FLOPs and bytes; or say what an adapter is."
)
EXAMPLE = "openelm info 1.1B --vocab-size 32128"
TWIN_EXAMPLE = "openelm info --like 270M --kind uniform"

BAR_WIDTH = 24
# mlx-lm's layout: each group of 64 weights has a 16 bit scale and a 16 bit bias.
QUANTIZED_GROUP = 64
BYTES_RULE = (
    "float32 4 and bfloat16 2 bytes a parameter; 8 and 4 bit: every matrix in groups of "
    f"{QUANTIZED_GROUP} weights with a 16 bit scale and bias each (8.5 and 4.5 bits a weight), norm gains in 16 bits"
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of ``openelm info``."""
    parser.add_argument(
        "target",
        nargs="?",
        metavar="TARGET",
        help="a named size (270M), a folder of a model, a run or an adapter, a GGUF or .pt file, a recipe, or a Hub "
        "id; ./270M is a folder so named",
    )
    info_twins.add_arguments(parser)
    parser.add_argument("--vocab-size", type=int, metavar="N", help="another vocabulary")
    parser.add_argument("--max-context-length", type=int, metavar="N", help="another context length")
    parser.add_argument(
        "--qkv-multipliers", type=_multiplier, metavar="A[,B]", help="one number, or MIN,MAX (1 is the uniform model)"
    )
    parser.add_argument("--ffn-multipliers", type=_multiplier, metavar="A[,B]", help="one number, or MIN,MAX")
    parser.add_argument("--json", action="store_true", help="all figures and lists as one JSON object")


def run(args: argparse.Namespace) -> int:
    """Find the geometry, draw it, count it; or its twins. Of an adapter by itself, which has none, say what it is."""
    info_twins.check_arguments(args)
    tuning = {} if args.target is None else tuning_of(Path(args.target))
    if tuning and tuning["adapter"] and not _has_geometry(Path(args.target)):
        print(json.dumps({"name": args.target, **tuning}) if args.json else draw_adapter(args.target, tuning))
        return 0
    name, config = find_geometry(args.like if args.target is None else args.target)
    options = ("vocab_size", "max_context_length", "qkv_multipliers", "ffn_multipliers")
    changes = {option: getattr(args, option) for option in options if getattr(args, option) is not None}
    if changes:
        config = config.changed(**changes)
    if args.like is None:
        figures = {**describe(name, config), **tuning}
        text = draw(figures)
    elif args.kind is None:
        figures = info_twins.table(name, config, *info_twins.bounds(args, config))
        text = info_twins.draw_table(figures)
    else:
        twin, of_twin = info_twins.one(name, config, args.kind, *info_twins.bounds(args, config))
        figures = {**describe(f"{args.kind} twin of {name}", twin), **of_twin}
        text = f"{draw(figures)}\n\n{info_twins.draw_one(figures)}"
    print(json.dumps(figures, indent=1) if args.json else text)
    return 0


def _has_geometry(path: Path) -> bool:
    return (path / "config.json").is_file() or (path / "config.yaml").is_file()


def tuning_of(path: Path) -> dict[str, Any]:
    """Of a tuning run's folder, or an adapter's: ``base``, and ``adapter``, which is None where all weights are tuned.

    Nothing of any other. UserError where what the folder says cannot be read.
    """
    from openelm.interop import adapter as peft_files
    from openelm.model.stored import StoredTensors, safetensors_files

    if (path / peft_files.CONFIG).is_file() and not any(path.glob("model*.safetensors")):
        adapter, base = peft_files.read_config(path)
        shapes = StoredTensors(safetensors_files(path, peft_files.STEM)).shapes
    else:
        config = _run_config(path / "config.yaml")
        base = str(_section(config, "model").get("path") or "")
        if not base:
            return {}
        if not config.get("adapter"):
            return {"base": base, "adapter": None}
        section = _section(config, "adapter")
        try:
            adapter = peft_files.Adapter(**{**section, "targets": tuple(section["targets"])})
            shapes = peft_files.shapes(adapter, _of_run_config(path / "config.yaml"))
        except (KeyError, TypeError) as error:
            raise UserError(
                f"{path / 'config.yaml'} holds no adapter ({error!r}): is it the config of a run?"
            ) from error
    count = sum(math.prod(shape) for shape in shapes.values())
    return {"base": base, "adapter": {**asdict(adapter), "targets": list(adapter.targets), "parameters": count}}


def _run_config(path: Path) -> dict[str, Any]:
    """Of a run's config, what can be read."""
    import yaml

    try:
        found = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError):
        return {}
    return found if isinstance(found, dict) else {}


def _section(config: dict[str, Any], name: str) -> dict[str, Any]:
    found = config.get(name)
    return found if isinstance(found, dict) else {}


def find_geometry(target: str) -> tuple[str, ModelConfig]:
    """What ``target`` is called, and its geometry. Names come before paths."""
    from openelm.config import recipe_names
    from openelm.interop.hub import HUB_ID
    from openelm.model.geometry import SIZES, ModelConfig

    if target.removeprefix("OpenELM-") in SIZES:
        return f"OpenELM-{target.removeprefix('OpenELM-')}", ModelConfig.from_name(target)
    if target in recipe_names():
        return _of_recipe(target)
    check_address(target)
    path = Path(target)
    kind = checked_kind(path)
    if kind in ("gguf", "ollama"):
        from openelm.interop.gguf import open_gguf

        return target, open_gguf(path / "model.gguf" if kind == "ollama" else path, dequantize=True).config
    if kind == "checkpoint":
        from openelm.interop.convert import open_source

        return target, open_source(target).config
    if path.is_dir():
        return target, _of_folder(path)
    if path.is_file():
        return _of_recipe(target)
    if HUB_ID.fullmatch(target):
        return target, _of_hub(target)
    raise UserError(
        f"{target!r} is no named size ({', '.join(SIZES)}), no packaged recipe ({', '.join(recipe_names())}), and "
        "there is no such file or folder: give one of these, or a model of the Hugging Face Hub as OWNER/NAME"
    )


def _of_recipe(recipe: str) -> tuple[str, ModelConfig]:
    from openelm.config import load_recipe

    config = load_recipe(recipe, [])
    return f"recipe {recipe}", _of_model_section(config.model.model_dump(), vocabulary(config))


def _of_hub(reference: str) -> ModelConfig:
    """Of a model on the Hub, of which config.json alone is fetched; UserError, one line, for what the Hub refuses."""
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError

    from openelm.interop.hub import errors_named, split_reference
    from openelm.model.folder import load_config

    repo, revision = split_reference(reference)
    with errors_named(repo, revision):
        try:
            file = hf_hub_download(repo, "config.json", revision=revision)
        except LocalEntryNotFoundError:  # also an EntryNotFoundError, but it says that the Hub is out of reach
            raise
        except EntryNotFoundError as error:
            raise UserError(f"{reference} has no config.json, so it is no model folder: check the name") from error
    return load_config(Path(file).parent)[0]


def _of_folder(folder: Path) -> ModelConfig:
    """Of a model folder, or of a run: its model, its newest checkpoint, or its config where there is neither yet."""
    from openelm.model.folder import load_config

    for candidate in (folder, folder / "model", *sorted(folder.glob("checkpoints/step_*"), reverse=True)):
        if (candidate / "config.json").is_file():
            return load_config(candidate)[0]
    if not (folder / "config.yaml").is_file():
        raise UserError(f"{folder} is neither a model folder (config.json) nor a run folder (config.yaml)")
    return _of_run_config(folder / "config.yaml")


def _of_run_config(path: Path) -> ModelConfig:
    """Of the geometry that pretrain writes beside the resolved recipe."""
    import yaml

    try:
        section = yaml.safe_load(path.read_text(encoding="utf-8"))["geometry"]
    except (yaml.YAMLError, UnicodeDecodeError, TypeError, KeyError) as error:
        raise UserError(f"{path} holds no geometry ({error!r}): is it the config of a run?") from error
    return _of_model_section(section, None)


def _of_model_section(section: dict[str, Any], vocabulary: int | None) -> ModelConfig:
    """From a recipe's model section, or a run's geometry, which holds figures that follow from it too."""
    from dataclasses import fields

    from openelm.model.geometry import ModelConfig

    known = {field.name for field in fields(ModelConfig)}
    given = {name: value for name, value in section.items() if name in known and value is not None}
    if vocabulary is not None:
        given = {"vocab_size": vocabulary, **given}
    if section.get("size"):
        return ModelConfig.from_name(section["size"], **given)
    return ModelConfig(**given)


def vocabulary(config: RunConfig) -> int:
    """Rows that a recipe's model will have for its tokens, without training its tokenizer."""
    if config.model.vocab_size is not None:
        return config.model.vocab_size
    if config.tokenizer.path:
        from openelm.data.tokenizer import Tokenizer

        return Tokenizer.load(config.tokenizer.path).vocab_size
    if config.train.init_from:
        from openelm.interop.convert import open_source

        return open_source(config.train.init_from).config.vocab_size
    return config.tokenizer.vocab_size


def describe(name: str, config: ModelConfig) -> dict[str, Any]:
    """All the figures, ready for JSON."""
    norms = 2 * config.model_dim + (2 * config.head_dim if config.normalize_qk_projections else 0)
    query_heads, ffn_dim = config.uniform_widths()
    parameters, cache_bytes = config.num_parameters(), config.cache_bytes_per_token()
    # Norm gains are all that is no matrix: those of the layers, and the last one.
    gains = norms * config.num_transformer_layers + config.model_dim
    return {
        "name": name,
        **config.as_dict(),
        "ffn_dims": list(config.ffn_dims),
        "layer_parameters": [matrices + norms for matrices in config.layer_matmul_parameters()],
        "uniform": {"query_heads": query_heads, "ffn_dim": ffn_dim},
        "parameters": parameters,
        "matmul_parameters": config.matmul_parameters(),
        "train_flops_per_token": config.train_flops_per_token(config.max_context_length),
        "weight_bytes": {
            "float32": 4 * parameters,
            "bfloat16": 2 * parameters,
            "8 bit": _quantized_bytes(parameters - gains, gains, bits=8),
            "4 bit": _quantized_bytes(parameters - gains, gains, bits=4),
        },
        "weight_bytes_rule": BYTES_RULE,
        "cache_bytes_per_token": cache_bytes,
        "cache_bytes_at_full_context": cache_bytes * config.max_context_length,
        "cache_dtype": "bfloat16",
    }


def _quantized_bytes(matrix_parameters: int, gains: int, *, bits: int) -> int:
    return (matrix_parameters * bits + matrix_parameters * 32 // QUANTIZED_GROUP) // 8 + 2 * gains


def draw(figures: dict[str, Any]) -> str:
    """The layers, one a line, and the counts below them."""
    full, mark = ("█", "│") if _can_print("█│") else ("#", "|")
    uniform = figures["uniform"]
    heads, ffn_dims = figures["num_query_heads"], figures["ffn_dims"]
    lines = [
        f"{figures['name']}: {len(heads)} layers, model_dim {figures['model_dim']:,}, head_dim {figures['head_dim']}, "
        f"vocabulary {figures['vocab_size']:,}, context {figures['max_context_length']:,}",
        "",
        f"layer  query/kv heads{'':<{BAR_WIDTH - 4}}  FFN width{'':<{BAR_WIDTH - 2}}  parameters",
    ]
    rows = zip(heads, figures["num_kv_heads"], ffn_dims, figures["layer_parameters"], strict=True)
    for layer, (query, kv, ffn, parameters) in enumerate(rows):
        head_bar = bar(query, uniform["query_heads"], max(heads), full, mark)
        ffn_bar = bar(ffn, uniform["ffn_dim"], max(ffn_dims), full, mark)
        lines.append(f"{layer:>5}  {f'{query}/{kv}':>7} {head_bar}   {ffn:>6,} {ffn_bar}  {parameters:>10,}")
    lines += [
        "",
        f"{mark} marks the uniform model of equal size: {uniform['query_heads']:.4g} query heads and an FFN of "
        f"{uniform['ffn_dim']:,.0f} in every layer",
        "",
        *_counts(figures),
    ]
    return "\n".join(lines)


def bar(value: float, uniform: float, largest: float, full: str, mark: str) -> str:
    """A bar of at most BAR_WIDTH characters, with the uniform model's width marked in it or beyond it."""
    filled = round(BAR_WIDTH * value / largest)
    marked = min(BAR_WIDTH - 1, int(BAR_WIDTH * uniform / largest))
    return "".join(mark if i == marked else full if i < filled else " " for i in range(BAR_WIDTH))


def _counts(figures: dict[str, Any]) -> list[str]:
    weights = ", ".join(f"{name} {readable_bytes(size)}" for name, size in figures["weight_bytes"].items())
    per_token, whole = figures["cache_bytes_per_token"], figures["cache_bytes_at_full_context"]
    rows = {
        "parameters": f"{figures['parameters']:,}, of which {figures['matmul_parameters']:,} in matrix products",
        "training": f"{figures['train_flops_per_token'] / 1e9:,.3f} GFLOP a token in rows of "
        f"{figures['max_context_length']:,} (6 a matmul parameter, and causal attention)",
        "weights": weights,
        "cache": f"{readable_bytes(per_token)} a token, {readable_bytes(whole)} at full context "
        f"({figures['cache_dtype']})",
    }
    if "base" in figures:
        rows |= _tuned(figures)
    lines = [f"{name:<12}{text}" for name, text in rows.items()]
    return [*lines, "", f"Weights: {figures['weight_bytes_rule']}."]


def _tuned(figures: dict[str, Any]) -> dict[str, str]:
    """What was tuned, and of which model."""
    adapter, rows = figures["adapter"], {"tuned from": figures["base"] or "not said"}
    if adapter:
        dropout = f", dropout {adapter['dropout']:g}" if adapter["dropout"] else ""
        rows["adapter"] = f"{adapter['kind']}, r {adapter['r']}, alpha {adapter['alpha']:g}{dropout}, on " + ", ".join(
            adapter["targets"]
        )
        rows["trained"] = f"{adapter['parameters']:,} parameters"
    return rows


def draw_adapter(name: str, figures: dict[str, Any]) -> str:
    """What an adapter is, and what makes a model of it."""
    lines = [f"{key:<12}{text}" for key, text in _tuned(figures).items()]
    merge = shlex.join(["openelm", "merge", figures["base"] or "MODEL", name, "OUT"])
    return "\n".join([f"{name}: an adapter", "", *lines, "", f"A model of it: {merge}"])


def readable_bytes(size: float) -> str:
    """Three figures and a decimal unit."""
    for unit in ("bytes", "kB", "MB", "GB"):
        if size < 1000:
            return f"{size:.3g} {unit}" if size < 999.5 else f"{size:.0f} {unit}"
        size /= 1000
    return f"{size:,.2f} TB"


def _multiplier(text: str) -> float | tuple[float, ...]:
    """``1.0`` is a number, ``0.5,4`` a pair; argparse reports what is neither."""
    numbers = tuple(float(part) for part in text.split(","))
    return numbers[0] if len(numbers) == 1 else numbers


def _can_print(text: str) -> bool:
    try:
        text.encode(getattr(sys.stdout, "encoding", None) or "utf-8")
    except UnicodeEncodeError:
        return False
    return True
