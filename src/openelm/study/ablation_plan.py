"""What an ablation would take: its runs by size and kind, their FLOPs and hours."""

from __future__ import annotations

from collections import Counter
from typing import Any

import torch

from openelm.study.ablation import Ablation
from openelm.train.hardware import CPU, find_hardware
from openelm.train.parts import compute_dtype
from openelm.train.plan import Assumptions, plan_training, workload


def planned(ablation: Ablation, gpu: str, mfu: float | None) -> dict[str, Any]:
    """Figures for JSON: a row a size and kind, and their sums. ``gpu`` is a name of train/hardware.py, or cpu.

    UserError for other hardware, and for a micro-batch that it cannot begin.
    """
    wanted = ablation.bases[ablation.smallest].train.dtype
    dtype = compute_dtype(wanted, torch.device(CPU)) if gpu == CPU else torch.bfloat16
    hardware, given = find_hardware(gpu, dtype), Assumptions(mfu)
    search, final = ablation.tuning(), ablation.final(ablation.untuned())
    compared = Counter((trial.size, trial.kind, trial.label) for trial in final)
    searching = Counter((trial.size, trial.kind, trial.label) for trial in search)
    rows, rule = [], ""
    for size, kind, label in sorted({**compared, **searching}, key=lambda key: list(ablation.bases).index(key[0])):
        runs, shorter = compared[size, kind, label], searching[size, kind, label]
        base, length = ablation.bases[size], ablation.row_length(size)
        work = workload(base, ablation.twins[size, kind], ranks=1, compute_bytes=dtype.itemsize)
        steps = ablation.steps(size)
        hours = plan_training(work, hardware, given)
        rule = hours["mfu_rule"]
        whole = runs + shorter * ablation.section.tuning_share
        tokens = steps * base.train.global_batch * length
        rows.append(
            {
                "size": size,
                "label": label,
                **ablation.about(size, kind),
                "tokens": tokens,
                "runs": runs + shorter,
                "flops": whole * tokens * hours["flops_per_token"],
                "hours": whole * tokens / hours["tokens_per_s"] / 3600,
                "micro_batch_fits": hours["fits"],
            }
        )
    return {
        "name": ablation.name,
        "hardware": gpu,
        "seeds": list(ablation.section.seeds),
        "search": {"runs": len(search), "size": ablation.smallest, "share": ablation.section.tuning_share},
        "rows": rows,
        "runs": sum(row["runs"] for row in rows),
        "flops": sum(row["flops"] for row in rows),
        "hours": sum(row["hours"] for row in rows),
        "rule": rule,
    }
