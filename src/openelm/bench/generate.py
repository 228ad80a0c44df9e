"""`openelm bench generate`: our own engine, by size, weights and backend, in the paper's protocol or another."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from openelm.bench.models import STORED, WEIGHTS, Model, Models, file_bytes, given, named, stored_bytes
from openelm.bench.needs import COMPILER_BYTES, LIBRARY_BYTES, Need, check_disk, check_memory, work_bytes
from openelm.bench.published import TOKENS
from openelm.bench.results import Row
from openelm.bench.rounds import Case, Entry, Plan, measure
from openelm.errors import UserError

QUICK_TOKENS = 128
CONTEXT_TOKENS = 64  # made behind a context whose speed is asked for
BACKENDS = ("auto", "native", "torch", "torch-compiled")
BITS = {"fp32": 32, "bf16": 16, "8bit": 8, "8row": 8, "4bit": 4}
ROOF_BYTES = LIBRARY_BYTES["ours"] + 600 * 2**20  # its buffer, and two square matrices


@dataclass(frozen=True)
class Machine:
    """Where it is measured."""

    device: str
    threads: int


def cases(
    prompt: int,
    tokens: int | None,
    contexts: Sequence[int],
    prefills: Sequence[int],
    batches: Sequence[int],
    quick: bool,
) -> tuple[Case, ...]:
    """The paper's protocol; or, where contexts or prefills are asked for, those alone. UserError below 1."""
    for name, values in (
        ("--prompt", [prompt]),
        ("--tokens", [tokens] if tokens is not None else []),
        ("--context", contexts),
        ("--prefill", prefills),
        ("--batch", batches),
    ):
        for value in values:
            if value < 1:
                raise UserError(f"{name} {value} must be at least 1")
    shapes = [(length, tokens or CONTEXT_TOKENS) for length in contexts] + [(length, 1) for length in prefills]
    shapes = shapes or [(prompt, tokens or (QUICK_TOKENS if quick else TOKENS))]
    return tuple(dict.fromkeys(Case(*shape, batch) for batch in batches for shape in shapes))


def find_models(paths: Sequence[str], sizes: Sequence[str], longest: int) -> list[Model]:
    """Folders that were given, then named sizes; 270M where neither is."""
    wanted = list(sizes) if sizes or paths else ["270M"]
    return [given(path, longest) for path in paths] + [named(size, longest) for size in wanted]


def own_entry(model: Model, weights: str, backend: str, plan: Plan, machine: Machine, group_size: int) -> Entry:
    """An entry of our engine; its folder is filled in once it is made (``with_files``)."""
    config = model.config
    if weights != STORED and model.bits is not None:
        raise UserError(f"{model.name} is quantised to {model.bits} bits already: leave --weights out")
    if machine.device != "cpu" and backend == "native":
        raise UserError(f"--backend native computes on the CPU, and --device is {machine.device}: take torch")
    size = stored_bytes(model, weights, group_size)
    bits = BITS.get(weights) or model.bits or 8 * round(size / config.num_parameters())
    # torch computes with quantised weights as the 16 bit numbers that they stand for; fp32 where a CPU has only that.
    held = size
    if backend in ("torch", "torch-compiled") or machine.device != "cpu":
        held = max(size, config.num_parameters() * (4 if weights == "fp32" or needs_fp32(machine.device) else 2))
    if weights == "8row":
        held = config.num_parameters()
    name = f"{model.name} {'' if weights == STORED else weights}".strip()
    return Entry(
        name if backend == "auto" else f"{name} {backend}",
        "ours",
        {
            "backend": backend,
            "bits": 8 if weights == "8row" else None,
            "dtype": "float32" if weights == "fp32" and backend != "native" else None,
            "device": machine.device,
            "threads": machine.threads,
        },
        config.vocab_size,
        need(model, held, "ours", plan, compiled=backend == "torch-compiled"),
        {"ours": True, "model": model.name, "weights": weights, "bits": bits, **geometry(model)},
    )


def needs_fp32(device: str) -> bool:
    """Whether this CPU would emulate bf16."""
    import torch

    from openelm.infer.engine import native_dtype

    return device == "cpu" and native_dtype(torch.bfloat16, torch.device("cpu")) == torch.float32


def need(model: Model, held: int, runner: str, plan: Plan, *, compiled: bool = False) -> Need:
    """Bytes that an entry takes at most, all cases together: slots are kept from case to case."""
    cache = logits = 0
    for case in plan.cases:
        one_cache, one_logits = work_bytes(model.config, case.batch, case.room, case.prompt_tokens)
        cache, logits = cache + one_cache, max(logits, one_logits)
    return Need(held, cache, logits, LIBRARY_BYTES[runner] + (COMPILER_BYTES if compiled else 0))


def geometry(model: Model) -> dict[str, Any]:
    """What tables need to know of a model."""
    config = model.config
    return {
        "parameters": config.num_parameters(),
        "cache_bytes_per_token": config.cache_bytes_per_token(),
        # The output layer works for the prompt's last token alone.
        "prompt_flops_per_token": 2 * sum(config.layer_matmul_parameters()),
    }


def with_files(entry: Entry, model: Model, path: Path, made: Models, key: str = "folder") -> Entry:
    """The entry, told where its weights are; and a tokenizer, where ours needs one."""
    size = file_bytes(path)
    about = {**entry.about, "file_bytes": size, "bits_per_weight": 8 * size / model.config.num_parameters()}
    told = {**entry.specification, key: str(path)}
    if entry.about["ours"] and (tokenizer := made.tokenizer_for(path)):
        told["tokenizer"] = tokenizer
    return replace(entry, specification=told, about=about)


def bench_generate(
    models: Sequence[Model],
    weights: Sequence[str],
    backends: Sequence[str],
    plan: Plan,
    machine: Machine,
    *,
    group_size: int,
    keep: Path | None,
    say: Callable[[str], None],
) -> tuple[list[Row], dict[str, Any]]:
    """Rows and roof. UserError, before anything is made or started, for what will not fit."""
    wanted = []
    for model in models:
        for kind in weights or ([STORED] if model.folder else ["bf16"]):
            if kind not in (*WEIGHTS, STORED):
                raise UserError(f"--weights {kind} is not one of {', '.join(WEIGHTS)}")
            for backend in backends:
                if kind == "8row" and backend.startswith("torch"):
                    continue  # rounded by the native decoder alone
                wanted.append((own_entry(model, kind, backend, plan, machine, group_size), model, kind))
    announce([entry for entry, _, _ in wanted], plan, machine, say)
    with workspace(keep, {(m.name, k): stored_bytes(m, k, group_size) for _, m, k in wanted if not m.folder}) as folder:
        made = Models(folder, group_size, say)
        entries = [with_files(entry, model, made.stored(model, kind), made) for entry, model, kind in wanted]
        return measure(entries, plan, roof(machine), say)


def announce(entries: Sequence[Entry], plan: Plan, machine: Machine, say: Callable[[str], None]) -> None:
    """Say what memory it takes, or refuse. Entries of one name are an error of whoever asked for them."""
    totals = {entry.name: entry.need.total for entry in entries if not entry.problem}
    if len({entry.name for entry in entries}) < len(entries):
        twice = next(entry.name for entry in entries if [other.name for other in entries].count(entry.name) > 1)
        raise UserError(f"{twice} is asked for twice: name each once, and give folders different names")
    if totals:
        together = {"the roof": ROOF_BYTES, **totals}
        say(check_memory(together, together=not plan.one_at_a_time, device=machine.device))


def roof(machine: Machine) -> dict[str, Any]:
    """What the roof's runner is told."""
    dtype = "float32" if needs_fp32(machine.device) else "bfloat16"
    return {"threads": machine.threads, "device": machine.device, "dtype": dtype}


@contextmanager
def workspace(keep: Path | None, needed: dict[Any, int]) -> Iterator[Path]:
    """Where models are made: ``keep``, which stays for the next time, or a temporary folder."""
    if keep is not None:
        keep.mkdir(parents=True, exist_ok=True)
        yield keep
        return
    with tempfile.TemporaryDirectory(prefix="openelm-bench-") as temporary:
        check_disk(Path(temporary), sum(needed.values()))
        yield Path(temporary)
