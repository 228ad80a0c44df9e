"""`openelm bench peers`: ours beside other engines with the same model, and beside the paper's baselines."""

from __future__ import annotations

import difflib
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from openelm.bench.generate import Machine, announce, geometry, need, needs_fp32, own_entry, roof, with_files, workspace
from openelm.bench.models import GGUF_WEIGHTS, STORED, Model, Models, stored_bytes
from openelm.bench.needs import LIBRARY_BYTES, Need
from openelm.bench.results import Row
from openelm.bench.rounds import Entry, Plan, measure
from openelm.errors import UserError
from openelm.interop.transformers_folder import MODELING_FILE

OURS = "ours"
OWN_WEIGHTS = ("bf16", "8bit", "8row", "4bit")
# Engine -> its runner, and how to get it.
ENGINES = {
    "transformers": ("transformers_peer", "pip install 'openelm-framework[hf]'"),
    "transformers-compiled": ("transformers_peer", "pip install 'openelm-framework[hf]'"),
    "llama.cpp": ("llama_cpp", "pip install llama-cpp-python, here or where --environment llama.cpp=PYTHON says"),
    "openvino": ("openvino_peer", "pip install openvino nncf, here or where --environment openvino=PYTHON says"),
    "mlx-lm": ("mlx_lm", "pip install 'openelm-framework[mlx]', or --environment mlx-lm=PYTHON"),
}


@dataclass(frozen=True)
class Baseline:
    """A model of the paper's Table 7a as transformers builds it; ``parameters`` as they are counted there."""

    architecture: str
    config: dict[str, Any]
    parameters: int
    printed: float  # the paper's column, in billions
    share_ffn: bool = False  # MobiLlama's layers have one FFN between them


MOBILLAMA = {"vocab_size": 32000, "num_hidden_layers": 22, "num_attention_heads": 32, "max_position_embeddings": 2048}
BASELINES = {
    "OPT-350M": Baseline(
        "OPTConfig",
        {"hidden_size": 1024, "num_hidden_layers": 24, "num_attention_heads": 16, "ffn_dim": 4096, "vocab_size": 50272}
        | {"word_embed_proj_dim": 512, "do_layer_norm_before": False},
        331_196_416,
        0.35,
    ),
    "Pythia-1.4B": Baseline(
        "GPTNeoXConfig",
        {"hidden_size": 2048, "num_hidden_layers": 24, "num_attention_heads": 16, "intermediate_size": 8192}
        | {"vocab_size": 50304},
        1_414_647_808,
        1.40,
    ),
    "MobiLlama-0.5B": Baseline(
        "LlamaConfig", {**MOBILLAMA, "hidden_size": 2048, "intermediate_size": 5632}, 534_865_920, 0.50, share_ffn=True
    ),
    "MobiLlama-0.8B": Baseline(
        "LlamaConfig", {**MOBILLAMA, "hidden_size": 2560, "intermediate_size": 10240}, 819_315_200, 0.80, share_ffn=True
    ),
    "MobiLlama-1.26B": Baseline(
        "LlamaConfig", {**MOBILLAMA, "hidden_size": 2048, "intermediate_size": 5632}, 1_261_529_088, 1.26
    ),
    "OLMo-1.18B": Baseline(
        "OlmoConfig",
        {"hidden_size": 2048, "num_hidden_layers": 16, "num_attention_heads": 16, "intermediate_size": 8192}
        | {"vocab_size": 50304, "tie_word_embeddings": True},
        1_176_764_416,
        1.18,
    ),
    "TinyLlama-1.1B": Baseline(
        "LlamaConfig",
        {**MOBILLAMA, "hidden_size": 2048, "intermediate_size": 5632, "num_key_value_heads": 4},
        1_100_048_384,
        1.10,
    ),
}
GROUPS = ("engines", "baselines", "all")


@dataclass(frozen=True)
class Wanted:
    """An entry, and how its files are made once there is a place for them; their size where they are new ones."""

    entry: Entry
    make: Callable[[Models], Path] | None = None
    key: str = "folder"  # what the runner is told them as
    new: dict[str, int] = field(default_factory=dict)


def names_of(asked: Sequence[str]) -> list[str]:
    """Peers, ours first; groups spelt out. UserError names the nearest of an unknown one."""
    known = {name.lower(): name for name in (OURS, *ENGINES, *BASELINES)}
    engines = [OURS, *(name for name in ENGINES if name != "mlx-lm" or sys.platform == "darwin")]
    groups = {"engines": engines, "baselines": [OURS, *BASELINES], "all": [*engines, *BASELINES]}
    found: list[str] = []
    for name in asked:
        if name in groups:
            found += groups[name]
        elif name.lower() in known:
            found.append(known[name.lower()])
        else:
            near = difflib.get_close_matches(name.lower(), known, n=1, cutoff=0.0)[0]
            everyone = ", ".join([*known.values(), *GROUPS])
            raise UserError(f"peer {name!r} is not one of {everyone}: did you mean {known[near]}?")
    return list(dict.fromkeys(sorted(found, key=lambda name: name != OURS)))


def environments(pairs: Sequence[str]) -> dict[str, str]:
    """PEER=PYTHON by peer. UserError for what is no such pair, no peer, or no file."""
    found = {}
    for pair in pairs:
        name, equals, python = pair.partition("=")
        if not equals or not python:
            raise UserError(f"--environment {pair}: write PEER=PYTHON, such as llama.cpp=llama/bin/python")
        (name,) = names_of([name]) if name not in GROUPS else ("",)
        if name not in (*ENGINES, *BASELINES):
            raise UserError(f"--environment {pair}: ours runs here; name one of {', '.join(ENGINES)}")
        if not os.access(python, os.X_OK) or Path(python).is_dir():
            raise UserError(f"--environment {pair}: {python} is no program; name the environment's Python")
        found[name] = python
    return found


def bench_peers(
    model: Model,
    asked: Sequence[str],
    pythons: Mapping[str, str],
    plan: Plan,
    machine: Machine,
    *,
    group_size: int,
    keep: Path | None,
    say: Callable[[str], None],
) -> tuple[list[Row], dict[str, Any]]:
    """Rows and roof. UserError, before anything is started, for an unknown peer and for what will not fit."""
    peers = [wanted for name in names_of(asked) for wanted in wanted_of(name, model, plan, machine, group_size)]
    peers = [
        replace(peer, entry=replace(peer.entry, python=pythons.get(peer.entry.about["peer"], sys.executable)))
        for peer in peers
    ]
    announce([peer.entry for peer in peers], plan, machine, say)
    sizes = {name: size for peer in peers for name, size in peer.new.items()}
    with workspace(keep, sizes) as folder:
        made = Models(folder, group_size, say)
        entries = [filled(peer, model, made, say) for peer in peers]
        entries = [replace(entry, environment={**entry.environment, "HF_HUB_OFFLINE": "1"}) for entry in entries]
        return measure(entries, plan, roof(machine), say)


def wanted_of(name: str, model: Model, plan: Plan, machine: Machine, group_size: int) -> list[Wanted]:
    """The entries of a peer."""
    if name in BASELINES:
        return [Wanted(baseline_entry(name, plan, machine))]
    kinds = (STORED,) if model.bits else OWN_WEIGHTS
    if name == OURS:
        return [
            ours(model, kind, plan, machine, group_size) for kind in kinds if kind != "8row" or machine.device == "cpu"
        ]
    if name == "llama.cpp":
        return [gguf(model, kind, plan, machine) for kind in GGUF_WEIGHTS]
    if name == "mlx-lm":
        return [
            mlx(model, kind, plan, machine, group_size) for kind in (kinds if model.bits else ("bf16", "8bit", "4bit"))
        ]
    if name == "openvino":
        return [openvino(model, kind, plan, machine, group_size) for kind in ("bf16", "8bit", "4bit")]
    return [transformers(model, name, plan, machine)]


def _about(name: str, model: Model, weights: str, bits: int) -> dict[str, Any]:
    return {"ours": False, "peer": name, "model": model.name, "weights": weights, "bits": bits, **geometry(model)}


def ours(model: Model, weights: str, plan: Plan, machine: Machine, group_size: int) -> Wanted:
    """Our engine, as `bench generate` has it."""
    entry = own_entry(model, weights, "auto", plan, machine, group_size)
    entry = replace(
        entry, name=f"ours {'' if weights == STORED else weights}".strip(), about={**entry.about, "peer": OURS}
    )
    new = {} if model.folder and weights in (STORED, "8row") else {weights: stored_bytes(model, weights, group_size)}
    return Wanted(entry, lambda made: made.stored(model, weights), new=new)


def transformers(model: Model, name: str, plan: Plan, machine: Machine) -> Wanted:
    """Our export, opened with the package's own model code: no code in a folder is run."""
    dtype = "float32" if needs_fp32(machine.device) else "bfloat16"
    compiled = name == "transformers-compiled"
    size = stored_bytes(model, "bf16", 64)
    held = size * 5 // 4 + (size if dtype == "float32" else 0)  # while it loads, some of the file's pages count too
    entry = Entry(
        f"{name} {'bf16' if dtype == 'bfloat16' else 'fp32'}",
        ENGINES[name][0],
        {"code": str(MODELING_FILE), "device": machine.device, "threads": machine.threads}
        | {"dtype": dtype, "compile": compiled},
        model.config.vocab_size,
        need(model, held, "transformers_peer", plan, compiled=compiled),
        _about(name, model, "bf16", 16),
        install=ENGINES[name][1],
    )
    return Wanted(entry, lambda made: made.for_transformers(model), new={"hf": size, "bf16": size})


def gguf(model: Model, kind: str, plan: Plan, machine: Machine) -> Wanted:
    """A GGUF file of ours in llama.cpp."""
    size, weights = stored_bytes(model, kind, 32), GGUF_WEIGHTS[kind]
    work = {"room": max(case.room for case in plan.cases)}
    work["longest_prompt"] = max(case.prompt_tokens for case in plan.cases)
    entry = Entry(
        f"llama.cpp {kind}",
        ENGINES["llama.cpp"][0],
        {"device": machine.device, "threads": machine.threads, **work},
        model.config.vocab_size,
        # Its logits are kept for a whole batch of prompt tokens.
        need(model, size + 512 * 4 * model.config.vocab_size, "llama_cpp", plan),
        _about("llama.cpp", model, weights, {"bf16": 16, "8bit": 8, "4bit": 4}[weights]),
        install=ENGINES["llama.cpp"][1],
    )
    return Wanted(entry, lambda made: made.gguf(model, kind), "file", new={kind: size})


def openvino(model: Model, weights: str, plan: Plan, machine: Machine, group_size: int) -> Wanted:
    """A bf16 folder, made a graph of OpenVINO's when it is loaded; it runs on the CPU."""
    dtype = "float32" if needs_fp32("cpu") else "bfloat16"
    name = "fp32" if weights == "bf16" and dtype == "float32" else weights
    entry = Entry(
        f"openvino {name}",
        ENGINES["openvino"][0],
        {"threads": machine.threads, "weights": weights, "group_size": group_size, "dtype": dtype},
        model.config.vocab_size,
        # torch's weights, the graph's, and those that are compiled.
        need(model, 10 * model.config.num_parameters(), "openvino_peer", plan),
        _about("openvino", model, weights, {"bf16": 16, "8bit": 8, "4bit": 4}[weights]),
        install=ENGINES["openvino"][1],
        problem="" if model.bits is None else f"{model.name} is quantised already: give the model that it was made of",
    )
    return Wanted(entry, lambda made: made.stored(model, "bf16"), new={"bf16": stored_bytes(model, "bf16", group_size)})


def mlx(model: Model, weights: str, plan: Plan, machine: Machine, group_size: int) -> Wanted:
    """A model folder in mlx-lm, on mlx's default device."""
    size = stored_bytes(model, weights, group_size)
    bits = model.bits or {"bf16": 16, "8bit": 8, "4bit": 4}[weights]
    entry = Entry(
        f"mlx-lm {'' if weights == STORED else weights}".strip(),
        ENGINES["mlx-lm"][0],
        {},
        model.config.vocab_size,
        need(model, 2 * size, "mlx_lm", plan),
        _about("mlx-lm", model, weights, bits),
        install=ENGINES["mlx-lm"][1],
    )
    return Wanted(entry, lambda made: made.stored(model, weights), new={weights: size})


def baseline_entry(name: str, plan: Plan, machine: Machine) -> Entry:
    """A baseline of random weights, which transformers draws as it is loaded."""
    baseline = BASELINES[name]
    config = baseline.config
    dtype = "float32" if needs_fp32(machine.device) else "bfloat16"
    heads = config.get("num_key_value_heads", config["num_attention_heads"])
    per_token = 2 * 2 * config["num_hidden_layers"] * heads * config["hidden_size"] // config["num_attention_heads"]
    longest = max(case.room for case in plan.cases)
    # Before MobiLlama's layers share their FFN, each has one.
    spare = 3 * config["hidden_size"] * config.get("intermediate_size", 0) * (config["num_hidden_layers"] - 1)
    weights = (4 if dtype == "float32" else 2) * (baseline.parameters + spare * baseline.share_ffn)
    return Entry(
        f"{name} {'bf16' if dtype == 'bfloat16' else 'fp32'}",
        "transformers_peer",
        {"device": machine.device, "threads": machine.threads, "dtype": dtype, "architecture": baseline.architecture}
        | {"config": config, "share_ffn": baseline.share_ffn},
        config["vocab_size"],
        Need(weights, per_token * longest, 3 * 4 * config["vocab_size"] * 35, LIBRARY_BYTES["transformers_peer"]),
        {"ours": False, "peer": name, "model": name, "weights": "bf16", "bits": 16, "parameters": baseline.parameters}
        | {"bits_per_weight": 32.0 if dtype == "float32" else 16.0, "cache_bytes_per_token": per_token},
        install=ENGINES["transformers"][1],
    )


def filled(peer: Wanted, model: Model, made: Models, say: Callable[[str], None]) -> Entry:
    """The entry with its files; one that says why there are none, where they cannot be made."""
    if peer.make is None or peer.entry.problem:
        return peer.entry
    try:
        path = peer.make(made)
    except UserError as error:
        say(f"{peer.entry.name}: {error}")
        return replace(peer.entry, problem=str(error))
    return with_files(peer.entry, model, path, made, peer.key)
