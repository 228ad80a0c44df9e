"""openelm bench generate, peers and norms: what is asked for, and the result that comes of it."""

from __future__ import annotations

import argparse
import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from openelm.errors import UserError

if TYPE_CHECKING:
    from openelm.bench.results import Result
    from openelm.bench.rounds import Plan

KINDS = ("generate", "peers", "norms")
GENERATE_EXAMPLE = "openelm bench generate runs/demo --context 64 1024 --prefill 512"
PEERS_EXAMPLE = "openelm bench peers --peers ours transformers llama.cpp --environment llama.cpp=llama/bin/python"
NORMS_EXAMPLE = "openelm bench norms --size 1.1B --quick"
BACKENDS = ("auto", "native", "torch", "torch-compiled")
WEIGHTS = ("fp32", "bf16", "8bit", "4bit", "8row")


def add_arguments(kinds: Any) -> None:
    """The three parsers."""
    generate = kinds.add_parser("generate", help="tokens per second of our engine (Table 7)", epilog=GENERATE_EXAMPLE)
    generate.add_argument("models", nargs="*", metavar="MODEL", help="model or run folders")
    _add_list(generate, "--sizes", metavar="SIZE", help="random weights (default: 270M)")
    _add_list(
        generate,
        "--weights",
        choices=WEIGHTS,
        metavar="NAME",
        help=f"of {', '.join(WEIGHTS)}; 8row: 8 bits with a scale a row (default: bf16, or as a folder has them)",
    )
    _add_list(generate, "--backend", choices=BACKENDS, help="of ours (default: auto)")
    generate.add_argument("--profile", action="store_true", help="also time per operation")
    peers = kinds.add_parser("peers", help="ours beside other engines and the paper's baselines", epilog=PEERS_EXAMPLE)
    peers.add_argument("--size", default="270M", help="of the OpenELM that all engines run (default: 270M)")
    peers.add_argument("--model", metavar="MODEL", help="a model folder in its place")
    _add_list(peers, "--peers", metavar="NAME", help="names; engines (the default), baselines, all")
    _add_list(
        peers,
        "--environment",
        metavar="PEER=PYTHON",
        help="the Python of a peer that lives in an environment of its own",
    )
    norms = kinds.add_parser("norms", help="what normalisation costs (Table 8)", epilog=NORMS_EXAMPLE)
    norms.add_argument("--size", default="1.1B", help="named size (default: 1.1B)")
    norms.add_argument("--no-olmo", action="store_true", help="leave OLMo's geometry out")
    for kind in (generate, peers, norms):
        _add_common(kind)
    for kind in (generate, peers):
        _add_list(kind, "--context", type=int, metavar="N", help="decode behind N tokens")
        _add_list(kind, "--prefill", type=int, metavar="N", help="read prompts of N tokens")
        kind.add_argument("--group-size", type=int, choices=(32, 64, 128), default=64, help="of 4bit and 8bit")
    _add_list(generate, "--batch", type=int, metavar="B", help="texts at once (default: 1)")


def _add_list(parser: argparse.ArgumentParser, option: str, **more: Any) -> None:
    """An option of several values, in one place or each behind the option again."""
    parser.add_argument(option, nargs="+", action="extend", default=[], **more)


def _add_common(kind: argparse.ArgumentParser) -> None:
    kind.add_argument("--prompt", type=int, default=35, metavar="N", help="tokens of the prompt (default: 35)")
    kind.add_argument("--tokens", type=int, metavar="N", help="tokens made (default: 1024; behind --context 64)")
    kind.add_argument("--quick", action="store_true", help="128 tokens, and a short dry run")
    kind.add_argument("--repeats", type=int, default=3, metavar="N", help="repetitions (default: 3)")
    kind.add_argument("--threads", type=int, metavar="N", help="of a CPU (default: its physical cores)")
    kind.add_argument("--device", metavar="NAME", help="cpu, cuda, mps (default: the fastest here)")
    order = kind.add_mutually_exclusive_group()
    order.add_argument("--reverse", action="store_true", help="entries in the reverse order")
    order.add_argument("--shuffle", type=int, metavar="SEED", help="entries in an order drawn anew each round")
    kind.add_argument("--one-at-a-time", action="store_true", help="one entry in memory at a time, loaded each round")
    kind.add_argument("--models-folder", metavar="FOLDER", help="keep the models that are made, for the next time")
    kind.add_argument("--limit", type=float, default=3600.0, metavar="S", help="seconds to wait for an answer")


def run(args: argparse.Namespace) -> Result:
    """Measure."""
    from openelm.bench.generate import Machine, cases
    from openelm.bench.results import Result
    from openelm.bench.rounds import Plan

    if args.repeats < 1:
        raise UserError(f"--repeats {args.repeats} must be at least 1")
    if not args.limit > 0:
        raise UserError(f"--limit {args.limit:g} must be more than 0")
    machine = Machine(*_machine(args))
    contexts, prefills = getattr(args, "context", []), getattr(args, "prefill", [])
    plan = Plan(
        cases(args.prompt, args.tokens, contexts, prefills, getattr(args, "batch", []) or [1], args.quick),
        args.repeats,
        machine.threads,
        quick=args.quick,
        order="reverse" if args.reverse else "given" if args.shuffle is None else "shuffle",
        seed=args.shuffle or 0,
        one_at_a_time=args.one_at_a_time,
        profile=getattr(args, "profile", False),
        limit_s=args.limit,
    )
    rows, roof, notes = {"generate": _generate, "peers": _peers, "norms": _norms}[args.kind](args, plan, machine)
    settings = {name: value for name, value in vars(args).items() if name not in ("out", "json", "overwrite")}
    settings |= {"device": machine.device, "threads": machine.threads}
    return Result(args.kind, shlex.join(["openelm", *sys.argv[1:]]), settings, rows, roof, notes)


def _machine(args: argparse.Namespace) -> tuple[str, int]:
    """Device and threads; UserError for what is not here."""
    from openelm.infer.engine import checked_device
    from openelm.infer.native import physical_cores

    if args.threads is not None and args.threads < 1:
        raise UserError(f"--threads {args.threads} must be at least 1")
    return str(checked_device(args.device)), args.threads or physical_cores()


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def _keep(args: argparse.Namespace) -> Path | None:
    if args.models_folder is None:
        return None
    if Path(args.models_folder).is_file():
        raise UserError(f"--models-folder {args.models_folder} is a file: name a folder")
    return Path(args.models_folder)


def _generate(args: argparse.Namespace, plan: Plan, machine: Any) -> Any:
    from openelm.bench.generate import bench_generate, find_models

    models = find_models(args.models, args.sizes, max(case.room for case in plan.cases))
    rows, roof = bench_generate(
        models,
        args.weights,
        args.backend or ["auto"],
        plan,
        machine,
        group_size=args.group_size,
        keep=_keep(args),
        say=_say,
    )
    return rows, roof, []


def _peers(args: argparse.Namespace, plan: Plan, machine: Any) -> Any:
    from openelm.bench.generate import find_models
    from openelm.bench.peers import bench_peers, environments

    longest = max(case.room for case in plan.cases)
    (model,) = find_models([args.model] if args.model else [], [] if args.model else [args.size], longest)
    rows, roof = bench_peers(
        model,
        args.peers or ["engines"],
        environments(args.environment),
        plan,
        machine,
        group_size=args.group_size,
        keep=_keep(args),
        say=_say,
    )
    return rows, roof, []


def _norms(args: argparse.Namespace, plan: Plan, machine: Any) -> Any:
    from openelm.bench.generate import find_models
    from openelm.bench.norms import bench_norms

    (model,) = find_models([], [args.size], max(case.room for case in plan.cases))
    return bench_norms(model, plan, machine, olmo=not args.no_olmo, keep=_keep(args), say=_say)
