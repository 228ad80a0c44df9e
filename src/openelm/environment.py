"""What a program runs on: versions, hardware and compiler; written beside every run, so it must never fail."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

DISTRIBUTION = "openelm-framework"
PACKAGES = (
    "torch",
    "numpy",
    "safetensors",
    "tokenizers",
    "sentencepiece",
    "huggingface_hub",
    "pyarrow",
    "fsspec",
    "zstandard",
    "ftfy",
    "pydantic",
    "pyyaml",
)
# Linux's names, in /proc/cpuinfo, of what the kernels choose by.
INSTRUCTION_SETS = {
    "AVX2": "avx2",
    "AVX-512": "avx512f",
    "AVX-512 VNNI": "avx512_vnni",
    "AVX-512 BF16": "avx512_bf16",
    "AMX BF16": "amx_bf16",
    "AMX INT8": "amx_int8",
    "NEON": "asimd",
    "SVE": "sve",
    "BF16": "bf16",
}


def environment() -> dict[str, Any]:
    """Versions, hardware, compiler, extras and git revision; what cannot be found out is None."""
    return {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "openelm": _or_none(_own_version),
        "packages": {name: _version(name) for name in PACKAGES},
        "hardware": {
            "cpu": _or_none(_cpu_name),
            "cores": os.cpu_count(),
            "usable_cores": _or_none(_usable_cores),
            "memory_bytes": _or_none(_memory_bytes),
            "instruction_sets": _or_none(_instruction_sets),
            "native_bfloat16": _or_none(_native_bfloat16),
            "torch_threads": _or_none(_torch_threads),
            "accelerators": _or_none(_accelerators),
        },
        "compiler": _or_none(_compiler),
        "extras": _or_none(_extras),
        "git": _or_none(_git),
    }


def _or_none(find: Callable[[], Any]) -> Any:
    """A machine may refuse any of these questions; the run it is asked for goes on."""
    try:
        return find()
    except Exception:
        return None


def _version(package: str) -> str | None:
    version: str | None = _or_none(lambda: importlib.metadata.version(package))
    return version


def _own_version() -> str:
    from openelm import __version__

    return __version__


def _cpu_name() -> str | None:
    if sys.platform == "darwin":
        return _output("sysctl", "-n", "machdep.cpu.brand_string")
    return _cpuinfo("model name") or platform.processor() or platform.machine() or None


def _cpuinfo(key: str) -> str | None:
    """The first entry of Linux's /proc/cpuinfo under ``key``."""
    path = Path("/proc/cpuinfo")
    if not path.is_file():
        return None
    found = re.search(rf"^{key}\s*:\s*(.*)$", path.read_text(encoding="utf-8", errors="replace"), re.MULTILINE)
    return found[1].strip() if found else None


def _usable_cores() -> int | None:
    """Cores that this process may use, where the system says."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else None


def _memory_bytes() -> int:
    """Physical memory, or the container's share of it."""
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    limit = _or_none(lambda: int(Path("/sys/fs/cgroup/memory.max").read_text()))
    return min(memory, limit) if limit else memory


def _instruction_sets() -> list[str] | None:
    flags = _cpuinfo("flags") or _cpuinfo("Features")
    if flags is not None:
        return [name for name, flag in INSTRUCTION_SETS.items() if flag in flags.split()]
    import torch

    return [torch.backends.cpu.get_cpu_capability()]


def _native_bfloat16() -> bool:
    import torch

    return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())


def _torch_threads() -> int:
    import torch

    return torch.get_num_threads()


def _accelerators() -> list[dict[str, Any]]:
    import torch

    found: list[dict[str, Any]] = []
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        capability = f"{properties.major}.{properties.minor}"
        found.append(
            {"device": f"cuda:{index}", "name": properties.name, "memory_bytes": properties.total_memory}
            | {"compute_capability": capability}
        )
    if torch.backends.mps.is_available():
        found.append({"device": "mps", "name": _cpu_name()})
    return found


def _compiler() -> dict[str, str | None] | None:
    """The C++ compiler that torch.compile and native code would take."""
    for name in (os.environ.get("CXX"), "c++", "g++", "clang++"):
        path = shutil.which(name) if name else None
        if path:
            return {"path": path, "version": _output(path, "--version")}
    return None


def _extras() -> dict[str, dict[str, Any]]:
    """Optional extras, as the installed package declares them: what of each is missing, and how to get it."""
    extras: dict[str, list[str]] = {}
    for requirement in importlib.metadata.requires(DISTRIBUTION) or []:
        extra = re.search(r"extra == ['\"]([^'\"]+)['\"]", requirement)
        package = re.match(r"[\w.-]+", requirement)
        if extra and package and package[0] != DISTRIBUTION:
            extras.setdefault(extra[1], []).append(package[0])
    return {extra: _extra(extra, packages) for extra, packages in extras.items()}


def _extra(extra: str, packages: list[str]) -> dict[str, Any]:
    missing = [name for name in packages if _version(name) is None]
    if not missing:
        return {"installed": True}
    return {"installed": False, "missing": missing, "install": f"pip install '{DISTRIBUTION}[{extra}]'"}


def _git() -> dict[str, Any] | None:
    """Revision of the project's own checkout; None where the package is installed elsewhere."""
    root = Path(__file__).resolve().parents[2]
    if not (root / ".git").exists() or not (root / "pyproject.toml").is_file():
        return None
    revision = _output("git", "-C", str(root), "rev-parse", "HEAD")
    if revision is None:
        return None
    return {"revision": revision, "changed": _output("git", "-C", str(root), "status", "--porcelain") is not None}


def _output(*command: str) -> str | None:
    """First line that a command prints; None where there is none, or it fails."""
    done = subprocess.run(command, capture_output=True, text=True, timeout=10, check=False)
    lines = done.stdout.strip().splitlines()
    return lines[0] if done.returncode == 0 and lines else None
