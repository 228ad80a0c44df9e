"""One training by TRL's trainers and by ours: the same records, batch, dtype and weights, a step of each in turns.

What is compared is a step: batches in, gradients, clipping, AdamW. Every step sees the same records, so that rounds
may be compared. Process time on a CPU, which other processes disturb less; the device's time on a GPU.
"""

import json
import random
import statistics
import time
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch

from openelm.bench.training import NoCheckpoints
from openelm.data.example_stream import ExampleSteps
from openelm.data.pairs import Encoding, Example, TuneSource, read_examples
from openelm.data.tokenizer import Tokenizer
from openelm.interop.adapter import PAPER_TARGETS, Adapter
from openelm.interop.source import open_folder
from openelm.interop.transformers_folder import complete
from openelm.model.folder import save_model
from openelm.model.geometry import ModelConfig
from openelm.model.transformer import OpenELM, init_weights
from openelm.train import loop
from openelm.train.guard import Guard
from openelm.train.metrics import gemm_flops_per_s
from openelm.train.optim import Optimizer
from openelm.train.parallel import World, build
from openelm.train.schedule import Schedule
from openelm.tune.adapters import attach, initial_values, switched_off
from openelm.tune.preference import preference_loss
from openelm.tune.reference import reference_log_probs
from openelm.tune.tuning import example_loss

ROW_LENGTH = 1024
LR = 1e-5


@dataclass(frozen=True)
class Trial:
    """What both train: pairs, padded or packed examples; with ``lora`` an adapter, else all weights."""

    model: Path  # a folder that transformers opens too
    kind: str
    records: int  # of a step
    micro_batch: int
    lora: bool = False
    precompute: bool = True  # TRL asks its reference beforehand, as we do
    recompute: bool = True  # activations
    dtype: torch.dtype = torch.float32
    device: str = "cpu"
    scratch: Path = field(default_factory=Path)


def write_folder(folder: Path, config: ModelConfig, tokenizer: Path) -> Path:
    """A model of that geometry with first weights, for both."""
    model = OpenELM(config)
    init_weights(model, seed=0)
    save_model(model, folder)
    Tokenizer.load(tokenizer).save(folder)
    complete(folder)
    return folder


def records(trial: Trial) -> list[dict[str, str]]:
    """Prompts of about 200 tokens, answers of about 300, as uneven as people's are (log-normal), within 1,024."""
    draw, tokenizer = random.Random(1), Tokenizer.load(trial.model)
    words = [tokenizer.decode([id]).strip() for id in range(50, tokenizer.vocab_size)]
    words = [word for word in words if word.isalpha() and word.isascii()]
    a_word = len(tokenizer.encode(" ".join(words))) / len(words)

    def text(median: int, most: int) -> str:
        tokens = min(most, draw.lognormvariate(0, 0.6) * median)
        return " ".join(draw.choices(words, k=int(tokens / a_word)))

    names = ("chosen", "rejected") if trial.kind == "pairs" else ("completion",)
    return [{"prompt": text(170, 400) + "\n", **{name: text(250, 500) for name in names}} for _ in range(trial.records)]


class Ours:
    """Our step, again and again."""

    def __init__(self, trial: Trial) -> None:
        self.world = World()
        self.world.device = torch.device(trial.device)
        source = open_folder(trial.model)
        file = trial.scratch / "records.jsonl"
        file.write_text("".join(json.dumps(record) + "\n" for record in records(trial)))
        pairs = trial.kind == "pairs"
        entry = TuneSource("records", str(file), "preference" if pairs else "prompt", answer_key="completion")
        assert source.tokenizer is not None
        tokenizer = source.tokenizer
        examples: Any = read_examples([entry], tokenizer, Encoding(ROW_LENGTH)).train
        answers = [one for item in examples for one in ((item.chosen, item.rejected) if pairs else (item,))]
        self.tokens = sum(len(one.ids) - 1 for one in answers if isinstance(one, Example))
        self.flops_per_token = source.config.train_flops_per_token(self.tokens // len(answers))
        adapter = Adapter("lora", r=32, alpha=32, targets=PAPER_TARGETS)
        self.model = build(
            source.config,
            self.world,
            partial(initial_values, adapter=adapter, read_base=source.weight, seed=0, dtype=trial.dtype)
            if trial.lora
            else lambda model: ((name, source.weight(name)) for name, _ in model.named_parameters()),
            dtype=trial.dtype,
            checkpointing="full" if trial.recompute else "none",
            adapt=partial(attach, adapter=adapter) if trial.lora else lambda model: None,
        )
        self.optimizer = Optimizer(self.model, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.0, dtype=trial.dtype)
        self.reference_s, start_s = 0.0, clock(trial.device)
        self.loss = example_loss(0.0)
        if pairs:
            reference = reference_log_probs(
                self.model,
                examples,
                self.world,
                rows=2 * trial.micro_batch,
                bos_id=tokenizer.bos_id,
                cache=trial.scratch,
                key="reference",
                base=partial(switched_off, self.model),
            )
            self.loss = preference_loss("sigmoid", 0.1, 0.0, reference)
            self.reference_s = clock(trial.device) - start_s
        # Packed rows are as many as fill up; each step is still every record once.
        steps = partial(
            ExampleSteps,
            examples,
            seed=0,
            packing="pack" if trial.kind == "packed" else "pad",
            row_length=ROW_LENGTH,
            bos_id=tokenizer.bos_id,
        )
        rows = steps(global_batch=1, rows=1).rows_in(1)
        micro_batch = max(size for size in range(1, trial.micro_batch + 1) if rows % size == 0)
        self.data = steps(global_batch=rows, rows=micro_batch)
        self.weight = rows if pairs else sum(int(one.counts.sum()) for one in answers)
        self.trial, self.reached, self.losses = trial, loop.Reached(0, 0), []

    def train(self, entry: dict[str, Any], timing: dict[str, Any]) -> None:
        """The recorder of the loop."""
        self.losses.append(entry["loss"])

    def step(self) -> float:
        """Seconds of the next step, as if it were every record once: epochs of packed rows differ by a row."""
        start_s, done, before = clock(self.trial.device), self.reached.step + 1, self.reached.tokens
        self.reached = loop.run(
            self.model,
            self.optimizer,
            Schedule("constant", 1000, LR, LR, 0),
            self.data,
            self.loss,
            loop.LoopSettings(done, self.weight, 1.0, 1, 10**6, 1, 1.0),
            self,  # type: ignore[arg-type]
            world=self.world,
            guard=Guard(self.world.device, stop=True, skip_spikes=False, deviations=6.0),
            keep=NoCheckpoints(),
            start=self.reached,
        )
        return (clock(self.trial.device) - start_s) * self.tokens / (self.reached.tokens - before)


def trainer(trial: Trial, steps: int) -> Any:
    """TRL's, which makes so many steps."""
    import datasets
    import peft
    import transformers
    import trl

    from openelm.interop.modeling_openelm import OpenELMForCausalLM

    pairs = trial.kind == "pairs"
    given: dict[str, Any] = dict(
        output_dir=str(trial.scratch / "trl"),
        max_steps=steps,
        per_device_train_batch_size=trial.micro_batch,
        gradient_accumulation_steps=trial.records // trial.micro_batch,
        learning_rate=LR,
        lr_scheduler_type="constant",
        max_length=ROW_LENGTH,
        bf16=trial.dtype == torch.bfloat16,  # weights stay fp32, as our masters do
        use_cpu=trial.device == "cpu",
        gradient_checkpointing=trial.recompute,
        save_strategy="no",
        logging_steps=1,
        report_to=[],
        disable_tqdm=True,
        dataloader_pin_memory=trial.device != "cpu",
    )
    if pairs:
        settings = trl.DPOConfig(**given, beta=0.1, precompute_ref_log_probs=trial.precompute)
    else:
        packed = trial.kind == "packed"
        if packed:
            given |= dict(per_device_train_batch_size=1, gradient_accumulation_steps=1)
        settings = trl.SFTConfig(**given, packing=packed)
    lora = peft.LoraConfig(r=32, lora_alpha=32, target_modules=list(PAPER_TARGETS))
    made = (trl.DPOTrainer if pairs else trl.SFTTrainer)(
        OpenELMForCausalLM.from_pretrained(trial.model, dtype=torch.float32),
        args=settings,
        train_dataset=datasets.Dataset.from_list(records(trial)),
        processing_class=transformers.AutoTokenizer.from_pretrained(trial.model),
        **({"peft_config": lora} if trial.lora else {}),
    )
    if trial.kind == "packed":
        made.args.gradient_accumulation_steps = len(made.train_dataset)  # every step sees every record
    return made


@dataclass(frozen=True)
class Found:
    """Seconds of a step, round by round."""

    ours_s: list[float]
    theirs_s: list[float]
    ours_reference_s: float  # once a run
    losses: tuple[list[float], list[float]]
    tokens: int
    of_roof: float

    @property
    def ratios(self) -> list[float]:
        return [theirs / ours for ours, theirs in zip(self.ours_s, self.theirs_s, strict=True)]

    @property
    def ratio(self) -> float:
        return statistics.median(self.ratios)

    def __str__(self) -> str:
        ours, theirs = (self.tokens / statistics.median(times) for times in (self.ours_s, self.theirs_s))
        return (
            f"{self.ratio:.2f}x TRL ({min(self.ratios):.2f} to {max(self.ratios):.2f}, {len(self.ratios)} rounds): "
            f"{ours:,.0f} against {theirs:,.0f} tokens/s, {self.of_roof:.2f} of the roof; the reference once "
            f"{self.ours_reference_s:.1f} s; first losses {self.losses[0][0]:.4f} and {self.losses[1][0]:.4f}"
        )


def compare(trial: Trial, rounds: int = 3) -> Found:
    """A step of TRL, a step of ours, and so on; the first of each, in which both make their optimizers, counts not."""
    import transformers

    ours = Ours(trial)
    ours_s: list[float] = []
    theirs_s: list[float] = []

    class Turns(transformers.TrainerCallback):
        def on_step_begin(self, *_: Any, **__: Any) -> None:
            self.start_s = clock(trial.device)

        def on_step_end(self, *_: Any, **__: Any) -> None:
            theirs_s.append(clock(trial.device) - self.start_s)
            ours_s.append(ours.step())

    theirs = trainer(trial, rounds + 1)
    theirs.add_callback(Turns())
    theirs.train()
    losses = [entry["loss"] for entry in theirs.state.log_history if "loss" in entry]
    roof = gemm_flops_per_s(trial.dtype, ours.world.device)
    flops = ours.tokens * ours.flops_per_token * (2 / 3 if trial.lora else 1)
    of_roof = flops / statistics.median(ours_s[1:]) / roof
    return Found(ours_s[1:], theirs_s[1:], ours.reference_s, (ours.losses, losses), ours.tokens, of_roof)


def clock(device: str) -> float:
    """Seconds, once all that the device was asked is done."""
    if device == "cpu":
        return time.process_time()
    torch.cuda.synchronize()
    return time.perf_counter()
