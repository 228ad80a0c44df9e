"""openelm plan: what a run would take on hardware that one need not have."""

from __future__ import annotations

import argparse
import json
from typing import TYPE_CHECKING, Any

from openelm.commands.info import readable_bytes
from openelm.errors import UserError

if TYPE_CHECKING:
    import torch

    from openelm.config import RunConfig
    from openelm.model.geometry import ModelConfig
    from openelm.train.hardware import Workload

HELP = "Work out the memory, time, checkpoints and cost of a run, beside the paper's own."
EXAMPLE = "openelm plan --size 3B --gpus 128 --gpu h100-80 --sharding full --price-per-gpu-hour 2.5"

# What a run by size is, unless flags say otherwise: the paper's (Table 9).
PAPER_STEPS, PAPER_BATCH_TOKENS, PAPER_ROW_LENGTH = 350_000, 4_194_304, 2048


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of ``openelm plan``."""
    parser.add_argument("recipe", nargs="?", metavar="RECIPE", help="packaged recipe or YAML file (or give --size)")
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="as train.steps=500 or model.size=270M")
    parser.add_argument("--size", metavar="NAME", help="a named size (270M), trained as in the paper")
    parser.add_argument("--vocab-size", type=int, metavar="N", help="with --size (default: 32000)")
    parser.add_argument("--gpu", default="cpu", metavar="NAME", help="kind of device (default: cpu, this machine)")
    parser.add_argument("--gpus", type=int, default=1, metavar="N", help="how many (default: 1)")
    parser.add_argument("--row-length", type=int, metavar="T", help="tokens of a row (default: the recipe's, or 2048)")
    parser.add_argument("--micro-batch", type=int, metavar="B", help="rows (default: the recipe's, or what fits)")
    parser.add_argument("--global-batch-tokens", type=int, metavar="N", help="of a step (default: 4194304)")
    amount = parser.add_mutually_exclusive_group()
    amount.add_argument("--steps", type=int, metavar="N", help="default: the recipe's, or 350000")
    amount.add_argument("--tokens", type=int, metavar="N", help="as many steps as see so many tokens")
    parser.add_argument("--activation-checkpointing", choices=("none", "selective", "full"), help="default: none")
    parser.add_argument(
        "--sharding", choices=("none", "node", "full"), help="within a node of 8, or over all (default: none)"
    )
    parser.add_argument("--mfu", type=float, metavar="X", help="share of the peak, 0 to 1 (default: an assumption)")
    parser.add_argument("--price-per-gpu-hour", type=float, metavar="X", help="in any currency")
    parser.add_argument("--gpu-hours-per-failure", type=float, default=50_000.0, metavar="H", help="default: 50000")
    parser.add_argument(
        "--write-bytes-per-s",
        type=float,
        default=2e9,
        metavar="R",
        help="all ranks' checkpoint together (default: 2e9)",
    )
    parser.add_argument("--bytes-per-token", type=float, default=4.0, metavar="X", help="of text (default: 4)")
    parser.add_argument("--json", action="store_true", help="all figures as one JSON object")


def run(args: argparse.Namespace) -> int:
    """Work it out, and print it."""
    from dataclasses import replace

    from openelm.train.hardware import HARDWARE, find_hardware
    from openelm.train.plan import Assumptions, largest_micro_batch, plan_training

    given = Assumptions(
        args.mfu, args.price_per_gpu_hour, args.gpu_hours_per_failure, args.write_bytes_per_s, args.bytes_per_token
    )
    if args.gpu == "cpu" and args.gpus > 1:
        raise UserError(f"--gpus {args.gpus} of which kind? Give it with --gpu: {', '.join(HARDWARE)}")
    if args.size and any(override.startswith("model.size=") for override in args.overrides):
        raise UserError(f"--size {args.size} and an override of model.size: give one of them")
    name, work, dtype = _workload(args)
    hardware = find_hardware(args.gpu, dtype)
    if args.micro_batch is None and args.recipe is None:
        work = replace(work, micro_batch=largest_micro_batch(work, hardware))
    plan = {"name": name, **plan_training(work, hardware, given)}
    print(json.dumps(plan) if args.json else draw(plan))
    return 0


def _workload(args: argparse.Namespace) -> tuple[str, Workload, torch.dtype]:
    """What is to be planned, in the dtype that it computes in: a recipe or a size, with what the flags change."""
    from dataclasses import replace

    from openelm.config import load_recipe
    from openelm.model.geometry import ModelConfig
    from openelm.train.hardware import Workload
    from openelm.train.plan import workload

    if args.recipe is None:
        if args.size is None:
            raise UserError("name what is to be planned: a RECIPE, or --size 270M (450M, 1.1B, 3B)")
        dtype = _dtype("auto", args.gpu)
        length = PAPER_ROW_LENGTH if args.row_length is None else args.row_length
        changes = {"vocab_size": 32000 if args.vocab_size is None else args.vocab_size}
        model = ModelConfig.from_name(args.size, max_context_length=max(2048, length), **changes)
        rows = PAPER_BATCH_TOKENS // PAPER_ROW_LENGTH
        name = f"OpenELM-{args.size.removeprefix('OpenELM-')}"
        work = Workload(model, args.gpus, length, 1, rows, PAPER_STEPS, dtype.itemsize)
    else:
        flags = {"model.size": args.size, "model.vocab_size": args.vocab_size}
        overrides = [f"{key}={value}" for key, value in flags.items() if value is not None]
        config = load_recipe(args.recipe, [*args.overrides, *overrides])
        dtype = _dtype(config.train.dtype, args.gpu)
        name = f"recipe {args.recipe}"
        work = workload(config, _geometry(config), ranks=args.gpus, compute_bytes=dtype.itemsize)
    keys = ("row_length", "micro_batch", "steps", "activation_checkpointing", "sharding")
    work = replace(work, **{key: getattr(args, key) for key in keys if getattr(args, key) is not None})
    batch_tokens = args.global_batch_tokens
    if batch_tokens is None and args.recipe is None:
        batch_tokens = PAPER_BATCH_TOKENS
    if batch_tokens is not None:
        work = replace(work, global_batch=_rows(batch_tokens, work.row_length))
    if args.tokens is not None:
        work = replace(work, steps=-(-args.tokens // max(1, work.tokens_per_step)))
    return name, work, dtype


def _dtype(wanted: str, gpu: str) -> torch.dtype:
    """What is computed in: bf16 on GPUs, whose rates are known in it."""
    import torch

    from openelm.train.hardware import CPU
    from openelm.train.parts import compute_dtype

    if gpu == CPU:
        return compute_dtype(wanted, torch.device(CPU))
    if wanted == "float32":
        raise UserError("train.dtype=float32 cannot be planned on GPUs, whose rates are known in bf16: set it to auto")
    return torch.bfloat16


def _geometry(config: RunConfig) -> ModelConfig:
    """Of a recipe, without training its tokenizer: that will have the vocabulary that it asks for."""
    from openelm.commands.info import vocabulary

    return config.model.build(vocab_size=vocabulary(config), bos_id=1, eos_id=2)


def _rows(tokens: int, row_length: int) -> int:
    if row_length < 1:
        raise UserError(f"--row-length {row_length} must be at least 1")
    if tokens < 1 or tokens % row_length:
        whole = max(1, tokens // row_length)
        near = f"{whole * row_length:,} or {(whole + 1) * row_length:,}"
        raise UserError(f"--global-batch-tokens {tokens:,} is not whole rows of {row_length:,} tokens: use {near}")
    return tokens // row_length


def draw(plan: dict[str, Any]) -> str:
    """The plan for a person to read, and the paper's runs below it."""
    setting, hardware = plan["setting"], plan["hardware"]
    tokens = setting["global_batch"] * setting["row_length"]
    lines = [
        f"{plan['name']} on {setting['ranks']:,} x {hardware['name']}: {setting['steps']:,} steps of "
        f"{setting['global_batch']:,} rows of {setting['row_length']:,} tokens ({tokens:,} tokens a step)",
        "",
        *(f"{name:<12}{text}" for name, text in _figures(plan).items()),
        "",
        *_memory(plan),
        "",
        *_paper(plan["paper"]),
    ]
    return "\n".join(lines)


def _figures(plan: dict[str, Any]) -> dict[str, str]:
    checkpoint, reading = plan["checkpoint"], plan["reading"]
    hardware, per_token = plan["hardware"], plan["flops_per_token"]
    figures = {
        "parameters": f"{plan['parameters']:,}",
        "tokens": f"{plan['tokens']:,}",
        "FLOPs": f"{plan['flops']:.3g}: {per_token / 1e9:,.3f} GFLOP a token, {plan['flops_rule']}",
        "peak": f"{hardware['flops_per_s'] / 1e12:,.3g} TFLOP/s a device ({hardware['source']})",
        "speed": f"{plan['tokens_per_s']:,.0f} tokens/s at an MFU of {plan['mfu']:.0%} ({plan['mfu_rule']})",
        "time": f"{_duration(86_400 * plan['days'])}, {plan['gpu_hours']:,.0f} device hours, "
        f"{_duration(plan['step_s'])} a step",
        "checkpoint": f"{readable_bytes(checkpoint['bytes'])}, saved in {_duration(checkpoint['save_s'])} at "
        f"{readable_bytes(checkpoint['write_bytes_per_s'])}/s (assumed)",
        "interval": f"best every {checkpoint['interval_steps']:,} steps ({_duration(checkpoint['interval_s'])}); "
        f"saving and repeating then take {checkpoint['lost_share']:.1%} of the time",
        "failures": f"one each {_duration(checkpoint['failure_every_s'])} (assumed: "
        f"{checkpoint['gpu_hours_per_failure']:,.0f} device hours)",
        "reading": f"{readable_bytes(reading['bytes_per_s'])}/s of text, "
        f"{readable_bytes(reading['bytes_per_s_per_gpu'])}/s a device, at {reading['bytes_per_token']:g} bytes a "
        "token (assumed)",
    }
    if plan["cost"] is not None:
        figures["cost"] = f"{plan['cost']:,.0f} at {plan['price_per_gpu_hour']:g} a device hour"
    return figures


def _memory(plan: dict[str, Any]) -> list[str]:
    """Parts of what a rank holds, all choices side by side, and what to do where it does not fit."""
    setting, hardware = plan["setting"], plan["hardware"]
    usable = hardware["usable_bytes"]
    lines = [
        f"memory of a rank: micro-batch {setting['micro_batch']}, activation checkpointing "
        f"{setting['activation_checkpointing']}, sharding {setting['sharding']}"
    ]
    parts = {key: size for key, size in plan["memory"].items() if size and key != "total"}
    lines += [f"  {key.replace('_', ' '):<17}{size / 1e9:>8.2f} GB" for key, size in parts.items()]
    lines += [
        f"  {'in all':<17}{plan['memory']['total'] / 1e9:>8.2f} GB of {usable / 1e9:.1f} usable "
        f"({usable / hardware['memory_bytes']:.0%} of {hardware['memory_bytes'] / 1e9:.0f})",
        f"  {_verdict(plan)}",
    ]
    if plan["host_copy_bytes"]:
        lines.append(f"  and {plan['host_copy_bytes'] / 1e9:.2f} GB of host memory for asynchronous checkpoints")
    lines += ["", f"  {'checkpointing':<15}{'activations':>11}   in all, sharding none      node      full   (GB)"]
    for degree, choice in plan["by_checkpointing"].items():
        totals = choice["total_by_sharding"]
        cells = [f"{totals[s] / 1e9:.2f}" + ("!" if totals[s] > usable else " ") for s in ("none", "node", "full")]
        lines.append(f"  {degree:<15}{choice['activations'] / 1e9:>11.2f}{cells[0]:>25}{cells[1]:>10}{cells[2]:>10}")
    if any(t > usable for choice in plan["by_checkpointing"].values() for t in choice["total_by_sharding"].values()):
        lines.append("  ! does not fit")
    return lines


def _verdict(plan: dict[str, Any]) -> str:
    nearest, setting = plan["nearest_that_fits"], plan["setting"]
    if plan["fits"]:
        return "it fits"
    if nearest:
        changes = [f"{key.replace('_', '-')} {value}" for key, value in nearest.items() if setting[key] != value]
        return "it does not fit; the nearest that does: " + ", ".join(changes)
    if plan["gpus_that_fit"]:
        return f"it does not fit, whatever the setting; {plan['gpus_that_fit']:,} such devices would do, with full " + (
            "sharding, full checkpointing and micro-batches of one row"
        )
    return "it does not fit, on however many such devices: take larger ones, or shorter rows"


def _paper(table: list[dict[str, Any]]) -> list[str]:
    lines = [
        "the paper's runs (Table 9), what its days imply, and what is reckoned here:",
        f"  {'size':<6}{'parameters':>13}{'GFLOP/token':>13}  {'GPUs':<14}{'days':>4}{'tokens/s':>11}{'MFU':>5}"
        f"  | {'checkpointing':<15}{'sharding':<8}{'rows':>6}{'GB':>7}{'days':>6}{'MFU':>6}",
    ]
    for row in table:
        lines.append(
            f"  {row['size']:<6}{row['parameters']:>13,}{row['flops_per_token'] / 1e9:>13.3f}  "
            f"{row['gpus']:>3} x {row['gpu']:<8}{row['days']:>4}{row['tokens_per_s']:>11,.0f}{row['implied_mfu']:>5.0%}"
            f"  | {row['activation_checkpointing']:<15}{row['sharding']:<8}{row['micro_batch']:>6}"
            f"{row['memory_bytes'] / 1e9:>7.1f}{row['expected_days']:>6.1f}{row['expected_mfu']:>6.0%}"
        )
    return lines


def _duration(seconds: float) -> str:
    """Three figures in the largest unit that leaves at least one."""
    for unit, length in (("days", 86_400), ("hours", 3600), ("min", 60)):
        if seconds >= length:
            return f"{seconds / length:,.3g} {unit}" if seconds < 1000 * length else f"{seconds / length:,.0f} {unit}"
    return f"{seconds:.3g} s"
