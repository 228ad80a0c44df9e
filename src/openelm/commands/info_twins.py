"""The twins of a model, for ``openelm info --like``: one of a kind, or a table of all kinds."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from openelm.errors import UserError

if TYPE_CHECKING:
    from openelm.model.geometry import ModelConfig

# What all twins of a model have alike, and a recipe that makes one has to say too.
SHARED = ("vocab_size", "max_context_length", "rope_freq_constant", "share_input_output_layers")
COLUMNS = "{:<12}{:>15} {:>8}  {:>14} {:>8}  {:>8}  {:>16}  {:>13}  {}"
TITLES = ("kind", "parameters", "off", "GFLOP a token", "off", "heads", "FFN width", "cache a token", "about")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of twins."""
    parser.add_argument("--like", metavar="TARGET", help="the twins of this: as many parameters, spread otherwise")
    parser.add_argument("--kind", metavar="KIND", help="with --like: this twin, as uniform (default: a table of all)")
    parser.add_argument(
        "--within", type=share, metavar="SHARE", help="with --like: how far off it may be (default: 0.005, or 0.5%%)"
    )
    parser.add_argument(
        "--row-length", type=int, metavar="N", help="with --like: rows that FLOPs count in (default: the context)"
    )


def check_arguments(args: argparse.Namespace) -> None:
    """UserError for a model and twins at once, or neither, and for what is a twin's alone."""
    if args.target is not None and args.like is not None:
        raise UserError(f"{args.target} is drawn, or --like {args.like} sought: give one of them")
    if args.like is None:
        options = ("kind", "within", "row_length")
        given = [f"--{option.replace('_', '-')}" for option in options if getattr(args, option) is not None]
        if given:
            raise UserError(f"{', '.join(given)} is for twins alone: give --like {args.target or 'TARGET'} too")
        if args.target is None:
            raise UserError("name what is to be drawn: a TARGET as 270M, or --like 270M for its twins")
    if args.within is not None and not 0 <= args.within < 1:
        raise UserError(f"--within {args.within:g} must be a share of at least 0 and below 1, as 0.005 or 0.5%")


def bounds(args: argparse.Namespace, model: ModelConfig) -> tuple[int, float]:
    """The length of rows, and how far off a twin may be."""
    from openelm.model.twins import WITHIN

    context = model.max_context_length
    length = context if args.row_length is None else args.row_length
    if not 1 <= length <= context:
        raise UserError(
            f"--row-length {length} must be at least 1 and at most the context of {context}: change it, or give "
            "--max-context-length too"
        )
    return length, WITHIN if args.within is None else args.within


def one(name: str, model: ModelConfig, kind: str, row_length: int, within: float) -> tuple[ModelConfig, dict[str, Any]]:
    """The twin of that kind, and what there is to say of it beside its geometry; UserError where there is none."""
    from openelm.model.twins import difference, twin

    found = twin(model, kind, row_length=row_length, within=within)
    off = difference(found, model, row_length)
    return found, {
        "like": name,
        "kind": kind,
        "row_length": row_length,
        "parameters_off": off.parameters,
        "flops_off": off.flops,
        "recipe": recipe(found),
    }


def table(name: str, model: ModelConfig, row_length: int, within: float) -> dict[str, Any]:
    """A twin of each kind, ready for JSON; where none is within the bound, the nearest, which says so."""
    from openelm.model.twins import KINDS, difference, nearest

    twins = []
    for kind, of_kind in KINDS.items():
        found = nearest(model, kind, row_length=row_length, within=within)
        off = difference(found, model, row_length)
        twins.append(
            {
                "kind": kind,
                "about": of_kind.about,
                "is_within": off.size <= within,
                "parameters": found.num_parameters(),
                "parameters_off": off.parameters,
                "train_flops_per_token": found.train_flops_per_token(row_length),
                "flops_off": off.flops,
                "num_query_heads": list(found.num_query_heads),
                "ffn_dims": list(found.ffn_dims),
                "cache_bytes_per_token": found.cache_bytes_per_token(),
                "recipe": recipe(found),
            }
        )
    return {
        "like": name,
        "parameters": model.num_parameters(),
        "train_flops_per_token": model.train_flops_per_token(row_length),
        "row_length": row_length,
        "within": within,
        "twins": twins,
    }


def recipe(model: ModelConfig) -> dict[str, Any]:
    """The section ``model`` of a recipe that makes it."""
    from openelm.model.twins import model_section

    fields = model.as_dict()
    return {**model_section(model), **{name: fields[name] for name in SHARED}}


def draw_one(figures: dict[str, Any]) -> str:
    """How far a twin is from its model, and the recipe's section, to stand below its drawing."""
    from openelm.model.twins import KINDS, Difference

    off = Difference(figures["parameters_off"], figures["flops_off"])
    return "\n".join(
        [
            f"{figures['kind']}: {KINDS[figures['kind']].about}.",
            f"From {figures['like']}: {off}, in rows of {figures['row_length']:,}.",
            "",
            "In a recipe:",
            "",
            *draw_section(figures["recipe"]),
        ]
    )


def draw_section(section: dict[str, Any]) -> list[str]:
    """Lines of YAML, a key each; lists stay lists in brackets."""
    import yaml

    lines = ["model:"]
    for name, value in section.items():
        text = yaml.safe_dump(value, default_flow_style=True, width=100).removesuffix("...\n").strip()
        lines += f"  {name}: {text}".replace("\n", "\n  ").splitlines()
    return lines


def draw_table(figures: dict[str, Any]) -> str:
    """One line a kind."""
    within = f"{100 * figures['within']:.4g}%"
    lines = [
        f"{figures['like']}: {figures['parameters']:,} parameters, "
        f"{figures['train_flops_per_token'] / 1e9:,.4g} GFLOP a token in training, in rows of "
        f"{figures['row_length']:,}; its twins within {within} of both",
        "",
        COLUMNS.format(*TITLES),
    ]
    for twin in figures["twins"]:
        about = twin["about"] if twin["is_within"] else f"none is within {within}, this is the nearest"
        lines.append(
            COLUMNS.format(
                twin["kind"],
                f"{twin['parameters']:,}",
                f"{twin['parameters_off']:+.2%}",
                f"{twin['train_flops_per_token'] / 1e9:,.4g}",
                f"{twin['flops_off']:+.2%}",
                from_to(twin["num_query_heads"]),
                from_to(twin["ffn_dims"]),
                f"{twin['cache_bytes_per_token']:,}",
                about,
            )
        )
    return "\n".join([*lines, "", "One of them, with its recipe: give --kind too. Cache in bytes, of bfloat16."])


def from_to(values: Sequence[int]) -> str:
    """``12 to 20`` from the first layer to the last, ``16`` where all are alike, ``4 or 8`` where they take turns."""
    if len(set(values)) == 1:
        return f"{values[0]:,}"
    ordered = sorted(values)
    if list(values) in (ordered, ordered[::-1]):
        return f"{values[0]:,} to {values[-1]:,}"
    return f"{ordered[0]:,} or {ordered[-1]:,}"


def share(text: str) -> float:
    """``0.005``, or ``0.5%``; argparse reports what is neither."""
    return float(text.removesuffix("%")) / (100 if text.endswith("%") else 1)
