"""`openelm bench norms`: Table 8, which is what normalisation costs: one model, its norms computed in several ways."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from openelm.bench.generate import Machine, announce, own_entry, roof, with_files, workspace
from openelm.bench.models import Model, Models, stored_bytes
from openelm.bench.peers import baseline_entry
from openelm.bench.results import Result, Row, summary
from openelm.bench.rounds import Entry, Plan, measure
from openelm.bench.tables import GENERATION, percent, share_of_bandwidth

# Runner's word -> ours. All are torch, but the last.
FORMS = {
    "naive": "RMSNorm, naive",
    "fused": "RMSNorm, F.rms_norm",
    "layernorm": "LayerNorm",
    "ours": "RMSNorm, ours",
    "compiled": "RMSNorm, compiled",
}
NATIVE = "RMSNorm, native"
OLMO = "OLMo-1.18B"


def bench_norms(
    model: Model, plan: Plan, machine: Machine, *, olmo: bool, keep: Path | None, say: Callable[[str], None]
) -> tuple[list[Row], dict[str, Any], list[str]]:
    """Rows, roof, and the explanation. UserError, before anything is started, for what will not fit."""
    entries = [form_entry(model, form, plan, machine) for form in FORMS]
    if machine.device == "cpu":
        entries.append(native_entry(model, plan, machine))
    if olmo:
        entries += olmo_entries(plan, machine)
    announce(entries, plan, machine, say)
    with workspace(keep, {model.name: stored_bytes(model, "bf16", 64)}) as folder:
        made = Models(folder, 64, say)
        path = made.stored(model, "bf16")
        entries = [entry if not entry.about["ours"] else with_files(entry, model, path, made) for entry in entries]
        rows, found = measure(entries, plan, roof(machine), say)
    for row in rows:
        set_shares(row, model, found)
    return rows, found, explanation(rows)


def form_entry(model: Model, form: str, plan: Plan, machine: Machine) -> Entry:
    """Our engine on torch, with its norms in one form."""
    backend = "torch-compiled" if form == "compiled" else "torch"
    entry = own_entry(model, "bf16", backend, plan, machine, 64)
    specification = {**entry.specification, "norm": form}
    name = f"{model.name} {FORMS[form]}"
    return replace(entry, name=name, runner="norms", specification=specification, ask=("norms", {}))


def native_entry(model: Model, plan: Plan, machine: Machine) -> Entry:
    """The decoder in C++; a row that says so where it is not built."""
    from openelm.infer import native

    entry = own_entry(model, "bf16", "native", plan, machine, 64)
    why = "" if native.available() else "the CPU decoder is not built: install again with a C++ compiler"
    return replace(entry, name=f"{model.name} {NATIVE}", problem=why)


def olmo_entries(plan: Plan, machine: Machine) -> list[Entry]:
    """OLMo's geometry, whose norms have no parameters: as it is, and with naive RMSNorm."""
    entry = baseline_entry(OLMO, plan, machine)
    ask = ("norms", {"tokens": 8})
    naive = {**entry.specification, "norm": "naive"}
    return [
        replace(entry, name=f"{OLMO} LayerNorm", ask=ask),
        replace(entry, name=f"{OLMO} {FORMS['naive']}", specification=naive, ask=ask),
    ]


def set_shares(row: Row, model: Model, found: dict[str, Any]) -> None:
    """What tables show, out of what the runner said; of the native decoder, what follows from its speed."""
    said = row.about.pop("norms", None)
    if said is not None:
        row.about |= {"invocations": round(said["invocations"]), "norm_share": said["share"]}
        if "device_share" in said:
            row.about["norm_share_of_device"] = said["device_share"]
    elif row.about.get("engine") == "native":
        layers = model.config.num_transformer_layers
        row.about["invocations"] = (4 if model.config.normalize_qk_projections else 2) * layers + 1
        of_roof = share_of_bandwidth(Result("norms", "", {}, [row], found, environment={}), row)
        if of_roof is not None and of_roof <= 1:  # above it, the roof that was measured is none, and bounds nothing
            row.about["norm_share_at_most"] = 1 - of_roof


def explanation(rows: list[Row]) -> list[str]:
    """Two sentences made of the figures; nothing where they do not allow them."""
    own = {form_of(row): row for row in rows if row.about.get("ours") and row.metrics.get(GENERATION)}
    naive = own.pop(FORMS["naive"], None)
    if naive is None or "norm_share" not in naive.about or not own:
        return []
    best = max(own.values(), key=_tokens_per_s)
    naive_ms, best_ms = (1000 / _tokens_per_s(row) for row in (naive, best))
    calls, share = naive.about["invocations"], naive.about["norm_share"]
    others = [f"{name} {percent(row.about['norm_share'])}" for name, row in own.items() if "norm_share" in row.about]
    first = (
        f"A token passes {calls} norms, which computed naively take {share * naive_ms:.2f} of its {naive_ms:.2f} ms "
        f"({percent(share)}, {1000 * share * naive_ms / calls:.0f} microseconds each)"
    ) + (f"; otherwise: {', '.join(others)}." if others else ".")
    if best_ms >= naive_ms:
        return [first, f"No other form is faster: {form_of(best)}, the best of them, takes {best_ms:.2f} ms a token."]
    explained = min(1.0, share * naive_ms / (naive_ms - best_ms))
    second = (
        f"{form_of(best)} is the fastest with {best_ms:.2f} ms a token, {naive_ms / best_ms:.2f} times naive's speed; "
        f"norms that cost nothing would explain {percent(explained)} of the difference."
    )
    return [first, second]


def form_of(row: Row) -> str:
    """The name of a row without its model's."""
    return row.name.removeprefix(row.about["model"]).strip()


def _tokens_per_s(row: Row) -> float:
    return summary(row.metrics[GENERATION]).median
