"""A folder as a newcomer has it after `make demo`, with texts, questions and models: the documentation runs in it.

Commands are shortened where they are long: on little text, for a few steps, with small models.
"""

import importlib.util
import json
import re
import shlex
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest
import torch
import yaml

from openelm import cli
from openelm.data.chat import CHAT_TEMPLATE
from openelm.data.tokenizer import Tokenizer
from openelm.evaluate.commonsense import SETS
from openelm.interop.corenet_state import optimizer_order
from openelm.model import geometry
from openelm.model.folder import load_model, save_model
from openelm.model.geometry import ModelConfig
from openelm.model.transformer import OpenELM

ROOT = Path(__file__).parents[1]
DRAWN_WITH = 5  # seed of random weights
CORENET_STEPS = 3  # made in training_checkpoint_last.pt
QUESTIONS = 8  # of each task
# Recipes of the newcomer's own: preferences, and an adapter.
TUNING = {
    "instruct": {
        "data": {"sources": [{"name": "pairs", "path": "preferences.jsonl", "format": "preference"}]},
        "preference": {"loss": "sigmoid", "beta": 0.01},
    },
    "peft": {
        "data": {"sources": [{"name": "arc", "path": "my-data/commonsense/ARC-Easy", "format": "commonsense"}]},
        "adapter": {"kind": "dora", "r": 4, "alpha": 4},
    },
}
# What stands for the 270M while a command trains, measures or reads one.
SMALL = dict(model_dim=32, num_transformer_layers=2, head_dim=8, ffn_dim_divisor=32)
# Tuning runs; of the examples of docs/tuning.md a few are left.
TUNED = [
    "data.row_length=64",
    "data.prompt_length=32",
    "train.steps=3",
    "train.epochs=null",
    "train.warmup_steps=0",
    "train.warmup_ratio=null",
    "train.global_batch=4",
    "train.micro_batch=2",
    "train.dtype=float32",
    "train.activation_checkpointing=none",
    "train.checkpoint_every=2",
    "train.log_every=1",
    "train.sample_tokens=4",
]
EXAMPLES = 40
# The paper's models and data become the newcomer's.
PAPERS_OWN = {
    "finetune": "data.sources=[{name: arc, path: my-data/commonsense/ARC-Easy, format: commonsense}]",
    "dpo": "data.sources=[{name: pairs, path: preferences.jsonl, format: preference}]",
}
OWN_TEXT = "data.sources=[{name: texts, path: my/texts}]"
OWN_TOKENIZER = "tokenizer.path=tokenizer.model"
# The demo's recipe on a model that trains in seconds.
DEMO = [
    "model.model_dim=64",
    "model.head_dim=32",
    "model.num_gqa_groups=1",
    "model.num_transformer_layers=2",
    "tokenizer.train_bytes=400000",
    "tokenizer.vocab_size=512",
    "data.row_length=64",
    "data.validation_tokens=2000",
    "train.steps=6",
    "train.warmup_steps=2",
    "train.checkpoint_every=1",
    "train.sample_tokens=4",
]
# The paper's recipes: sources of terabytes become the newcomer's own text, 128 GPUs one process.
PAPER = [
    OWN_TEXT,
    OWN_TOKENIZER,
    "model.vocab_size=512",
    "data.row_length=64",
    "data.min_tokens=32",
    "data.shards=4",
    "data.workers=0",
    "data.held_out=0.1",
    "data.validation_tokens=500",
    "train.steps=6",
    "train.warmup_steps=2",
    "train.global_batch=4",
    "train.micro_batch=2",
    "train.dtype=float32",
    "train.compile=false",
    "train.checkpoint_every=8",
    "train.average_last=0",
    "train.sample_prompts=[]",
    "train.log_every=1",
]


def shortened(words: list[str]) -> list[str]:
    """A command's words (without `openelm`) so that it ends in seconds; what it is about stays as it is written."""
    if words[0] == "pretrain":
        given = {word.partition("=")[0] for word in words}
        words = words + [pair for pair in (DEMO if "demo" in words else PAPER) if pair.partition("=")[0] not in given]
        words = [re.sub(r"^train\.steps=\d+", "train.steps=8", word) for word in words]
        words = [re.sub(r"^train\.evaluate_every=\d+", "train.evaluate_every=4", word) for word in words]
        return [re.sub(r"^train\.evaluate_limit=\d+", "train.evaluate_limit=2", word) for word in words]
    if words[:2] == ["bench", "train"]:
        few = "--row-length 32 --micro-batch 1 --micro-batches 1 --steps 1 --warmup 0"
        return [*words, *few.split()]
    if words[:2] == ["bench", "generate"]:
        return [*words, *["--tokens", "4", "--repeats", "1", "--threads", "1", "--quick"]]
    if words[:2] == ["bench", "data"]:
        return [*words, "--megabytes", "0.1", "--repeats", "1"]
    if words[0] == "data" and words[1] != "inspect":
        words = [*words, OWN_TEXT, OWN_TOKENIZER]
        if "--suite" in words:
            words += ["--data", "my-data"]
        if words[1] == "hash":
            words += ["data.row_length=64", "data.min_tokens=32", "--rows", "300"]
        return words
    if words[0] in PAPERS_OWN:
        own = [] if words[1].endswith(".yaml") else ["model.path=model", "tokenizer.path=null", PAPERS_OWN[words[0]]]
        return [*words, *TUNED, *own]
    if words[0] == "reject":
        few = "--samples 6 --accept 2 --max-tokens 4"
        return [*words, *few.split()]
    if words[0] == "sweep":  # it says what it would run: runs of its own take a process each
        return [word.removeprefix("/") for word in words] + ["--commands"]
    if words[0] == "ablate":  # the runs themselves: tests/study/test_ablation.py
        more = [OWN_TOKENIZER] if "--commands" in words else [] if "--dry-run" in words else ["--dry-run"]
        return [word.removeprefix("/") for word in words] + more
    if words[0] == "serve":
        return [*words, "--port", "0"]
    if words[0] == "evaluate":
        return [*words, "--limit", "2", *([] if "--data" in words else ["--data", "my-data"])]
    return words


def make(folder: Path) -> Path:
    """Fill a folder; what others publish on the Hub is not in it."""
    for page in [ROOT / "README.md", *(ROOT / "docs").glob("*.md")]:
        (folder / page.relative_to(ROOT)).parent.mkdir(exist_ok=True, parents=True)
        (folder / page.relative_to(ROOT)).write_text(page.read_text(encoding="utf-8"), encoding="utf-8")
    texts = folder / "my" / "texts"
    texts.mkdir(parents=True)
    for source in [ROOT / "README.md", *(ROOT / "docs").glob("*.md"), *(ROOT / "src").rglob("*.py")]:
        (texts / f"{source.stem}.txt").write_text(source.read_text(encoding="utf-8"), encoding="utf-8")
    write_lines(folder / "my.jsonl", [{"text": "some words and more, " * 60}])
    write_lines(folder / "questions.jsonl", [{"id": 1, "question": texts.joinpath("README.txt").read_text()[:400]}])
    for place in ("my-data", "my/tasks", "my/tests"):
        write_questions(folder / place)
    write_tuning(folder)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setenv("OPENELM_CACHE", str(folder / "cache"))
        assert cli.run(shortened(["pretrain", "demo"])) == 0
        write_tuned(folder)
        patch.setitem(geometry.SIZES, "270M", SMALL)
        write_models(folder)
    return folder


def write_lines(path: Path, records: list[dict[str, Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")


def write_questions(folder: Path) -> None:
    """A few examples of each task of the suite `zero-shot` in its columns, and LLM-Adapters' sets."""
    asked = (
        "Which of these is wet when it has rained for a whole day in the town?"  # 13 words and more: see data overlap
    )
    arc = {"question": asked, "choices": {"text": ["streets", "fire"], "label": ["A", "B"]}, "answerKey": "A"}
    hellaswag = {"activity_label": "Rain", "ctx_a": asked, "ctx_b": "the street", "endings": ["is wet", "burns"]}
    wrong = {f"distractor{number}": f"word {number}" for number in (1, 2, 3)}
    for place, splits, record in (
        ("ai2_arc/ARC-Easy", ("train", "test"), arc),
        ("ai2_arc/ARC-Challenge", ("train", "test"), arc),
        ("super_glue/boolq", ("train", "validation"), {"passage": "Rain is wet.", "question": asked, "label": 0}),
        ("hellaswag", ("train", "validation"), {**hellaswag, "label": "0"}),
        ("piqa", ("train", "validation"), {"goal": asked, "sol1": "streets", "sol2": "fire", "label": 0}),
        ("sciq", ("train", "test"), {"support": "", "question": asked, "correct_answer": "streets", **wrong}),
        (
            "winogrande/winogrande_xl",
            ("train", "validation"),
            {"sentence": f"{asked} The _ was.", "option1": "street", "option2": "fire", "answer": "1"},
        ),
    ):
        for split in splits:
            write_lines(
                folder / place / f"{split}.jsonl", [{"id": str(number), **record} for number in range(QUESTIONS)]
            )
    for name in SETS.values():
        one = {"instruction": "Is rain wet?\n\nAnswer format: answer1/answer2", "input": "", "answer": "answer1"}
        one["output"] = f"the correct answer is {one['answer']}"
        (folder / "commonsense" / name).mkdir(parents=True)
        (folder / "commonsense" / name / "test.json").write_text(json.dumps([one] * QUESTIONS))


def write_tuning(folder: Path) -> None:
    """Recipes of tuning, preferences, prompts, and a reward: the longer answer."""
    for name, sections in TUNING.items():
        train = {"epochs": 1, "global_batch": 4, "micro_batch": 2, "lr": 1e-3, "dtype": "float32"}
        recipe = {"name": name, "model": {"path": "model"}, **sections, "train": train}
        recipe["data"] = {**sections["data"], "row_length": 64}
        (folder / f"{name}.yaml").write_text(yaml.safe_dump(recipe))
    prompts = [{"prompt": f"Which of {number} words is wet?"} for number in range(QUESTIONS)]
    write_lines(folder / "prompts.jsonl", prompts)
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(prompts), folder / "prompts.parquet")
    write_lines(folder / "preferences.jsonl", [{**one, "chosen": "Water is.", "rejected": "Fire."} for one in prompts])
    (folder / "reward.py").write_text("def score(prompt, answer):\n    return len(answer)\n")
    (folder / "rules.py").write_text("def forbidden(prompt, answer):\n    return 'bomb' in prompt + answer\n")


def write_tuned(folder: Path) -> None:
    """The recipes and examples of docs/tuning.md, and the runs that come of them; those of adapters with peft only."""
    page = (ROOT / "docs" / "tuning.md").read_text(encoding="utf-8")
    for name, recipe in re.findall(r"```yaml\n# (\S+\.yaml)\n(.*?)```", page, re.DOTALL):
        (folder / name).write_text(recipe, encoding="utf-8")
    exec(re.findall(r"```python\n(.*?)```", page, re.DOTALL)[0], {})
    for name in ("examples.jsonl", "pairs.jsonl"):
        lines = (folder / name).read_text(encoding="utf-8").splitlines(keepends=True)
        (folder / name).write_text("".join(lines[:EXAMPLES]), encoding="utf-8")
    with pytest.MonkeyPatch.context() as patch:  # drawing takes longer than such a run
        patch.setattr("openelm.report.page.write_report", lambda run, *_: run / "report" / "index.html")
        assert cli.run(shortened(["finetune", "docstrings.yaml"])) == 0
        if importlib.util.find_spec("peft"):
            assert cli.run(shortened(["dpo", "preferences.yaml"])) == 0


def write_models(folder: Path) -> None:
    """What the pages take for granted: the tokenizer's file, models of several origins."""
    demo = folder / "runs" / "demo" / "model"
    tokenizer, model = Tokenizer.load(demo), load_model(demo)
    (folder / "tokenizer.model").write_bytes((demo / "tokenizer.model").read_bytes())
    for name in ("model", "models/270M", "demo-hf", "my-model", "demo-mlx", "demo-tuned"):
        save_model(model, folder / name, tokenizer=tokenizer)
    save_model(model, folder / "demo-chat", tokenizer=tokenizer)
    (folder / "demo-chat" / "chat_template.jinja").write_text(CHAT_TEMPLATE)
    # Neither transformers nor mlx-lm saves it.
    for name in ("my-model", "demo-tuned"):
        (folder / name / "tokenizer.model").unlink()
    write_corenet(folder)


def write_corenet(folder: Path) -> None:
    """CoreNet's files of the small 270M, with its 32,128 rows: averaged weights, an adapter, a training state."""
    torch.manual_seed(DRAWN_WITH)
    model = OpenELM(ModelConfig.from_name("270M", vocab_size=32128))
    weights = model.state_dict()
    torch.save(weights, folder / "checkpoint_average.pt")
    write_training_state(model, folder / "training_checkpoint_last.pt")

    small = OpenELM(ModelConfig.from_name("270M", vocab_size=512)).state_dict()
    layer = "layers.1.attn.qkv_proj"
    base = small.pop(f"{layer}.weight")
    small |= {f"{layer}.base_layer.weight": base}
    small |= {f"{layer}.lora_A.lora.weight": torch.randn(4, base.shape[1])}
    small |= {f"{layer}.lora_B.lora.weight": torch.randn(base.shape[0], 4)}
    torch.save(small, folder / "openelm_lora_270M.pt")
    lora = {"regex": ".*qkv_proj", "module_type": "linear", "params": {"r": 4, "lora_alpha": 8}}
    general = {"model_name": "OpenELM-270M", "vocab_size": 512, "max_context_length": 2048}
    about = {"language_modeling": {"general_gpt": general}, "lora": {"use_lora": True, "config": [lora]}}
    (folder / "openelm_lora_270M.yaml").write_text(yaml.safe_dump({"model": about}))


def write_training_state(model: OpenELM, path: Path) -> None:
    """A few steps of AdamW in CoreNet's order and groups."""
    own = dict(model.named_parameters())
    named = {name: own[name] for name in optimizer_order(own)}
    groups = [
        {"params": [p for p in named.values() if p.dim() > 1], "weight_decay": 0.1},
        {"params": [p for p in named.values() if p.dim() == 1], "weight_decay": 0.0},
    ]
    adamw = torch.optim.AdamW(groups, lr=1e-3)
    for _ in range(CORENET_STEPS):
        model(torch.randint(0, 512, (2, 16)), torch.randint(0, 512, (2, 16))).backward()
        adamw.step()
        adamw.zero_grad()
    weights = {name: parameter.detach() for name, parameter in named.items()}
    state = {
        "iterations": CORENET_STEPS,
        "epoch": 0,
        "model_state_dict": weights,
        "optim_state_dict": adamw.state_dict(),
    }
    torch.save(state, path)


def split(command: str) -> list[str]:
    """The words of a documented line, `openelm` first, without its remark and the file that its words go to."""
    words = shlex.split(command, comments=True)
    return words[: words.index(">")] if ">" in words else words
