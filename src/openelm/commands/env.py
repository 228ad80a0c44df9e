"""openelm env: what the program runs on, for a bug report or before a long run."""

from __future__ import annotations

import argparse
import json
from typing import Any

HELP = "Show versions, hardware, compiler and optional extras."
EXAMPLE = "openelm env --json"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of ``openelm env``."""
    parser.add_argument("--json", action="store_true", help="one JSON object, as a run's environment.json")


def run(args: argparse.Namespace) -> int:
    """Collect and print."""
    from openelm.environment import environment

    found = environment()
    print(json.dumps(found, indent=1) if args.json else table(found))
    return 0


def table(found: dict[str, Any]) -> str:
    """The environment in lines of name and value."""
    git = found["git"]
    revision = f" ({git['revision'][:12]}{', changed' if git['changed'] else ''})" if git else ""
    rows = [
        ("openelm", f"{found['openelm']}{revision}"),
        ("python", f"{found['python']} on {found['platform']}"),
        *((name, version or "not installed") for name, version in found["packages"].items()),
        ("", ""),
        *_hardware(found["hardware"]),
        ("compiler", _compiler(found["compiler"])),
        ("", ""),
        *((f"[{name}]", _extra(extra)) for name, extra in (found["extras"] or {}).items()),
    ]
    width = max(len(name) for name, _ in rows)
    return "\n".join(f"{name:<{width}}  {value}".rstrip() for name, value in rows)


def _hardware(hardware: dict[str, Any]) -> list[tuple[str, str]]:
    native = {True: "native", False: "emulated, many times slower: train in float32", None: "unknown"}
    cores, usable, memory = hardware["cores"], hardware["usable_cores"], hardware["memory_bytes"]
    here = f", {usable} of them usable here" if usable and usable != cores else ""
    accelerators = [
        f"{entry['device']} {entry['name']}"
        + (f", {entry['memory_bytes'] / 2**30:.1f} GiB" if "memory_bytes" in entry else "")
        for entry in hardware["accelerators"] or []
    ]
    return [
        ("CPU", hardware["cpu"] or "unknown"),
        ("cores", f"{cores}{here}; torch threads: {hardware['torch_threads'] or 'unknown'}"),
        ("memory", f"{memory / 2**30:.1f} GiB" if memory else "unknown"),
        ("instructions", ", ".join(hardware["instruction_sets"] or []) or "unknown"),
        ("bf16 on CPU", native[hardware["native_bfloat16"]]),
        ("accelerators", "; ".join(accelerators) or "none"),
    ]


def _compiler(compiler: dict[str, Any] | None) -> str:
    if compiler is None:
        return "none found: torch.compile on the CPU needs one (g++ or clang++)"
    return f"{compiler['version'] or 'unknown version'} ({compiler['path']})"


def _extra(extra: dict[str, Any]) -> str:
    if extra["installed"]:
        return "installed"
    return f"lacks {', '.join(extra['missing'])}: {extra['install']}"
