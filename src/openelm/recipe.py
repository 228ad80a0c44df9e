"""A recipe as it is written: YAML files that build on each other, rows by size, dotted overrides -> one mapping.

Nothing here knows which keys there are; `config.py` does.
"""

from __future__ import annotations

import difflib
import re
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from openelm.errors import UserError

RECIPES = Path(__file__).parent / "recipes"
# What a named size decides.
OF_A_SIZE = {
    "model_dim",
    "num_transformer_layers",
    "head_dim",
    "num_gqa_groups",
    "qkv_multipliers",
    "ffn_multipliers",
    "ffn_dim_divisor",
}


class Layer(NamedTuple):
    """One recipe file: its own sections, and what it changes in them for each size."""

    path: Path
    sections: dict[str, Any]
    by_size: Any


def recipe_names() -> list[str]:
    """The packaged recipes."""
    return sorted(path.stem for path in RECIPES.glob("*.yaml"))


def read_layers(recipe: str) -> list[Layer]:
    """A recipe and those that it is based on, the last base first. UserError: not there, no recipe, or a circle."""
    layers: list[Layer] = []
    chain = [_find(recipe, Path(), f"recipe {recipe!r}")]
    while True:
        sections = _read(chain[-1])
        base = sections.pop("base", None)
        layers.insert(0, Layer(chain[-1], sections, sections.pop("by_size", {})))
        if base is None:
            return layers
        if not isinstance(base, str):
            raise UserError(f"{chain[-1]}: base={base!r} must be the name of a packaged recipe or the path of another")
        chain.append(_find(base, chain[-1].parent, f"{chain[-1]}: base {base!r}"))
        if chain[-1].resolve() in [path.resolve() for path in chain[:-1]]:
            circle = " -> ".join(map(str, chain))
            raise UserError(f"recipe {recipe!r}: its bases lead back to one of them, {circle}: take one base out")


def combine(layers: list[Layer], overrides: list[str]) -> tuple[dict[str, Any], str]:
    """Layers and ``a.b=value`` overrides as one mapping, each layer followed by its row for the size that is chosen.

    Also what to say of keys that turn out to be missing because there are rows by size and none for this one.
    """
    changes = [_change(text) for text in overrides]
    models = [_mapping(layer.sections.get("model")) for layer in layers]
    named = [value for _, keys, value in changes if keys == ["model", "size"]]
    named += [value["size"] for _, keys, value in changes if keys == ["model"] and "size" in _mapping(value)]
    choosing = len(layers) if named else max((i for i, model in enumerate(models) if "size" in model), default=0)
    size = str(named[-1] if named else models[choosing].get("size")).removeprefix("OpenELM-")
    data: dict[str, Any] = {}
    sizes: dict[str, None] = {}
    for number, (layer, model) in enumerate(zip(layers, models, strict=True)):
        sections = dict(layer.sections)
        if number < choosing and model:
            # A named size replaces those before it, of which nothing of the name would be left otherwise.
            sections["model"] = {key: value for key, value in model.items() if key not in OF_A_SIZE}
        data = _over(_over(data, sections), layer.by_size.get(size, {}))
        sizes |= dict.fromkeys(layer.by_size)
    for text, keys, value in changes:
        _set(data, keys, value, text)
    if not sizes or size in sizes:
        return data, ""
    there, this = ", ".join(sizes), f"model.size={size}" if size != "None" else "a model without model.size"
    return data, f"by_size has rows for {there}, none for {this}: choose one of these sizes, or give what is missing"


def _find(recipe: str, folder: Path, what: str) -> Path:
    path = RECIPES / f"{recipe}.yaml" if recipe in recipe_names() else folder / recipe
    if not path.is_file():
        near = difflib.get_close_matches(recipe, recipe_names(), n=1, cutoff=0.4)
        hint = f"did you mean {near[0]}? " if near else ""
        raise UserError(f"{what} is no file and no packaged recipe: {hint}There are {recipe_names()}")
    return path


def _read(path: Path) -> dict[str, Any]:
    try:
        data = _parse(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"{path} is not YAML: {error}") from error
    if not isinstance(data, dict):
        raise UserError(f"{path} must hold a mapping with the sections model, tokenizer, data and train")
    data.pop("geometry", None)  # a run's config.yaml is a recipe too; this part follows from the others
    return data


class _Loader(yaml.SafeLoader):
    """YAML 1.1 reads 3e-4 as text; a person who writes it means the number."""


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"[-+]?\d+(\.\d*)?[eE][-+]?\d+$"), list("-+0123456789")
)


def _parse(text: str) -> Any:
    return _Loader(text).get_single_data()


def _over(under: Any, upper: Any) -> Any:
    """``upper`` over ``under``: mappings key by key, all else as a whole."""
    if not (isinstance(under, dict) and isinstance(upper, dict)):
        return upper
    return under | {key: _over(under.get(key), value) for key, value in upper.items()}


def _mapping(value: Any) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}


def _change(override: str) -> tuple[str, list[str], Any]:
    """An override as it was written, its keys and its value."""
    key, equals, value = override.partition("=")
    if not equals or not key:
        raise UserError(f"override {override!r} must have the form section.key=value, as train.steps=500")
    keys = key.split(".")
    if keys[0] in ("base", "by_size"):
        raise UserError(f"override {override!r}: {keys[0]} stands in recipe files only: set the keys themselves")
    try:
        return override, keys, _parse(value)
    except yaml.YAMLError as error:
        raise UserError(f"override {override!r}: the value is not YAML ({error})") from error


def _set(data: Any, keys: list[str], value: Any, override: str) -> None:
    """Set a dotted key; whole numbers reach into lists (data.sources.0.share=2)."""
    for key in keys[:-1]:
        if isinstance(data, list):
            data = _item(data, key, override)
        else:
            if not isinstance(data, dict):
                raise UserError(f"override {override!r}: {key!r} is below something that holds no keys")
            if not isinstance(data.get(key), dict | list):
                data[key] = {}
            data = data[key]
    if isinstance(data, list):
        _item(data, keys[-1], override)
        data[int(keys[-1])] = value
    elif isinstance(data, dict):
        data[keys[-1]] = value
    else:
        raise UserError(f"override {override!r}: {keys[-1]!r} is below something that holds no keys")


def _item(items: list[Any], key: str, override: str) -> Any:
    if not key.isdecimal() or int(key) >= len(items):
        raise UserError(f"override {override!r}: {key!r} must be a number from 0 to {len(items) - 1}")
    return items[int(key)]
