"""The loop: what may not change a number does not, and what is not finite never reaches the weights."""

import json
from itertools import count
from typing import Any

import numpy as np
import pytest
import torch

from openelm.config import RunConfig, resolve
from openelm.data.loader import Step
from openelm.data.packing import IGNORE, Batch
from openelm.errors import UserError
from openelm.interop import transformers_folder
from openelm.model.folder import load_model
from openelm.model.geometry import ModelConfig
from openelm.model.transformer import OpenELM, init_weights
from openelm.train import loop
from openelm.train.guard import Event, Guard
from openelm.train.optim import Optimizer
from openelm.train.parallel import World
from openelm.train.pretrain import pretrain
from openelm.train.schedule import Schedule

CONFIG = ModelConfig(
    model_dim=32, num_transformer_layers=2, head_dim=16, num_gqa_groups=1, ffn_dim_divisor=16, vocab_size=50
)


class Notes:
    """A recorder and keeper that only remembers."""

    def __init__(self) -> None:
        self.entries: list[dict[str, Any]] = []
        self.timing: list[dict[str, Any]] = []
        self.events: list[Event] = []
        self.saved: list[tuple[int, int, int]] = []

    def train(self, entry: dict[str, Any], timing: dict[str, Any]) -> None:
        self.entries.append(entry)
        self.timing.append(timing)

    def write(self, entry: dict[str, Any]) -> None:
        self.entries.append(entry)

    def event(self, event: Event) -> None:
        self.events.append(event)

    def save(self, step: int, tokens: int, data: Step) -> None:
        self.saved.append((step, tokens, data.first_row))

    def written(self) -> bool:
        return True

    def all_written(self) -> None:
        pass


def rows(step: int, number: int = 8, length: int = 16) -> Batch:
    draw = np.random.default_rng(step)
    tokens, targets = draw.integers(3, 50, (2, number, length))
    targets[draw.random(targets.shape) < 0.2] = IGNORE
    targets[0] = IGNORE  # micro-batches of very different weight
    targets[0, 3] = 7
    return Batch(tokens, targets)


def cut(batch: Batch, size: int) -> list[Batch]:
    return [Batch(batch.tokens[i : i + size], batch.targets[i : i + size]) for i in range(0, len(batch.tokens), size)]


def make(dtype=torch.float32) -> tuple[OpenELM, Optimizer]:
    model = OpenELM(CONFIG)
    init_weights(model, seed=0)
    return model, Optimizer(model, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.1, dtype=dtype)


def train(steps, *, dtype=torch.float32, settings=None, stop=True, made=None, loss=None, **options):
    """Train on lists of batches; the model, and what was noted."""
    model, optimizer = made or make(dtype)
    notes = Notes()
    usual = sum(batch.targets.size for batch in steps[0])
    values = {"steps": len(steps), "clip_norm": 1.0, "log_every": 1, "checkpoint_every": 100, **(settings or {})}
    loop.run(
        model,
        optimizer,
        Schedule("constant", values["steps"], 1e-2, 1e-2, 0),
        [Step(batches, first_row=8 * number) for number, batches in enumerate(steps)],
        loss or loop.pretraining_loss(1e-4),
        loop.LoopSettings(**values, usual_weight=usual, flops_per_token=1, peak_flops_per_s=1.0),
        notes,
        world=World(),
        guard=Guard(torch.device("cpu"), stop=stop, skip_spikes=False, deviations=6.0),
        keep=notes,
        **options,
    )
    return model, notes


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_eight_micro_batches_of_one_row_are_one_of_eight(dtype):
    batches = [rows(step) for step in range(3)]
    one, one_notes = train([[b] for b in batches], dtype=dtype)
    eight, eight_notes = train([cut(b, 1) for b in batches], dtype=dtype)
    # Sums in another order: fp32 agrees to 1e-5 over three steps. In bf16 each gradient is rounded to 8 bits
    # (2**-9) before it is added in fp32, and AdamW's first steps, of size lr, may turn where a gradient is tiny.
    rel = 1e-5 if dtype == torch.float32 else 1e-2
    for a, b in zip(one_notes.entries, eight_notes.entries, strict=True):
        assert a["loss"] == pytest.approx(b["loss"], rel=rel)
        assert a["grad_norm"] == pytest.approx(b["grad_norm"], rel=10 * rel)
        assert (a["tokens"], a["step"], a["lr"]) == (b["tokens"], b["step"], b["lr"])
    if dtype == torch.float32:
        for name, weight in one.state_dict().items():
            torch.testing.assert_close(weight, eight.state_dict()[name], rtol=0, atol=2e-5)


def test_the_loss_is_the_mean_over_all_valid_tokens_of_the_step():
    model = OpenELM(CONFIG)
    init_weights(model, seed=0)
    batch = rows(0)
    with torch.no_grad():
        logits = model(torch.from_numpy(batch.tokens)).flatten(0, 1)
    expected = torch.nn.functional.cross_entropy(logits, torch.from_numpy(batch.targets).flatten())
    # Means of unequal micro-batches, averaged, would give something else.
    means = [
        torch.nn.functional.cross_entropy(part, torch.from_numpy(targets))
        for part, targets in zip(logits.split(16), batch.targets, strict=True)
    ]
    assert abs(torch.stack(means).mean() - expected) > 1e-3
    _, notes = train([cut(batch, 1)])
    assert notes.entries[0]["cross_entropy"] == pytest.approx(expected.item(), rel=1e-5)
    assert notes.entries[0]["loss"] == pytest.approx(expected.item() + notes.entries[0]["z_loss"], rel=1e-6)
    assert notes.entries[0]["tokens"] == batch.weight()


def test_padding_changes_nothing():
    batches = [rows(step) for step in range(2)]
    padded = []
    for batch in batches:
        tokens = np.pad(batch.tokens, ((0, 2), (0, 5)), constant_values=1)
        targets = np.pad(batch.targets, ((0, 2), (0, 5)), constant_values=IGNORE)
        padded.append(Batch(tokens, targets))
    plain, plain_notes = train([[b] for b in batches])
    other, other_notes = train([[b] for b in padded])
    for a, b in zip(plain_notes.entries, other_notes.entries, strict=True):
        assert a == pytest.approx(b, rel=1e-5)  # products of other shapes are summed in another order
    for name, weight in plain.state_dict().items():
        torch.testing.assert_close(weight, other.state_dict()[name], rtol=0, atol=2e-5)


def poisoned(bad: float, at: int) -> loop.LossFunction:
    """The loss, spoilt in one step."""
    steps = count(1)

    def loss(model, batch):
        total, metrics = loop.pretraining_loss(0.0)(model, batch)
        return total * (bad if next(steps) == at else 1.0), metrics

    return loss


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("log_every", [1, 4])
def test_a_loss_that_is_not_finite_stops_the_run_before_the_update(bad, log_every):
    batches = [[rows(step)] for step in range(8)]
    model, optimizer = make()
    with pytest.raises(UserError, match=r"step 3: .*not finite.*train\.lr"):
        # The host looks only every fourth step: no step after the bad one may have reached the weights by then.
        train(batches, made=(model, optimizer), loss=poisoned(bad, 3), settings={"log_every": log_every})
    clean, _ = train(batches[:2], loss=poisoned(1.0, 3), settings={"steps": 2})
    assert all(torch.equal(p, clean.state_dict()[name]) for name, p in model.state_dict().items())
    assert not torch.equal(clean.norm.weight, OpenELM(CONFIG).norm.weight)


def test_a_gradient_that_is_not_finite_stops_the_run_too():
    model, optimizer = make()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    model.layers[0].ffn.proj_1.weight.register_hook(lambda gradient: gradient / 0)
    with pytest.raises(UserError, match=r"gradient norm (nan|inf)"):
        train([[rows(0)]], made=(model, optimizer))
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())


def test_where_the_guard_skips_a_bad_step_is_left_out_and_its_rows_are_kept():
    batches = [[rows(step)] for step in range(4)]
    skipped, notes = train(batches, stop=False, loss=poisoned(float("nan"), 3), settings={"log_every": 2})
    assert [(e.step, e.problem, e.action) for e in notes.events] == [(3, "not finite", "skipped")]
    assert np.array_equal(notes.events[0].data.batches[0].tokens, batches[2][0].tokens)
    without, _ = train([batches[i] for i in (0, 1, 3)], loss=poisoned(1.0, 0))
    for name, weight in skipped.state_dict().items():
        assert torch.equal(weight, without.state_dict()[name]), name


def test_metrics_checkpoints_and_probes_come_at_their_steps():
    probed = []
    _, notes = train(
        [[rows(step)] for step in range(7)],
        settings={"log_every": 3, "checkpoint_every": 2},
        probes=[lambda step, model, data: probed.append((step, data.first_row)) or []],
    )
    assert [entry["step"] for entry in notes.entries] == [3, 6, 7]
    weights = np.cumsum([rows(step).weight() for step in range(7)])
    assert notes.saved == [(step, weights[step - 1], 8 * step - 8) for step in (2, 4, 6, 7)]
    assert probed == [(step, 8 * step - 8) for step in range(1, 8)]


def test_asked_to_stop_the_loop_ends_behind_the_step_with_a_checkpoint():
    asked = iter([False, False, True])
    _, notes = train([[rows(step)] for step in range(7)], asked_to_stop=lambda: next(asked))
    assert [step for step, *_ in notes.saved] == [3]


def test_rows_without_a_target_are_refused():
    empty = rows(0)
    empty.targets[:] = IGNORE
    with pytest.raises(UserError, match="step 1: its rows hold no target"):
        train([[empty]])


def metrics_of(run) -> list[dict[str, Any]]:
    entries = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in entry.items() if key != "timing"} for entry in entries]


def run_recipe(recipe, folder, **changes):
    """Train a recipe; gives its metrics without the times, and the bits of its model."""
    data = {**recipe, "seed": changes.pop("seed", recipe["seed"])}
    for section, values in changes.items():
        data[section] = {**data[section], **values}
    pretrain(resolve(RunConfig, data, "test"), folder, resume=False, resume_step=None, overwrite=False)
    return metrics_of(folder), (folder / "model" / "model.safetensors").read_bytes()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_looking_at_the_model_does_not_change_the_training(recipe, tmp_path, dtype):
    looked, bits = run_recipe(recipe, tmp_path / "a", train={"dtype": dtype, "validate_every": 1, "sample_every": 1})
    alone, other_bits = run_recipe(
        recipe,
        tmp_path / "b",
        train={"dtype": dtype, "validate_every": 1000, "sample_every": 1000, "sample_prompts": []},
        data={"validation_tokens": 0},
    )
    assert {entry["kind"] for entry in looked} == {"train", "validation", "sample", "data"}
    assert "validation" not in {entry["kind"] for entry in alone}
    assert [e for e in looked if e["kind"] == "train"] == [e for e in alone if e["kind"] == "train"]
    assert bits == other_bits


def test_a_seed_decides_every_bit(recipe, tmp_path):
    first, again, other = (
        run_recipe(recipe, tmp_path / name, seed=seed) for name, seed in (("a", 1), ("b", 1), ("c", 2))
    )
    assert first == again
    assert first[1] != other[1]
    assert first[0][0]["loss"] != other[0][0]["loss"]


def test_training_learns(recipe, tmp_path):
    metrics, _ = run_recipe(recipe, tmp_path / "run", train={"steps": 40})
    losses = [entry["loss"] for entry in metrics if entry["kind"] == "train"]
    # Uniform over 400 pieces is ln 400 = 6; a hundred words in free order are far less.
    assert losses[0] == pytest.approx(np.log(400), rel=0.1)
    assert losses[-1] < 4.5
    scores = [entry["bits_per_byte"] for entry in metrics if entry["kind"] == "validation"]
    assert scores[-1] < 0.8 * scores[0]


def test_so_it_does_with_layer_norm_and_transformers_opens_what_it_made(recipe, tmp_path):
    run = tmp_path / "run"
    metrics, _ = run_recipe(recipe, run, model={"normalization_layer_name": "layer_norm"}, train={"steps": 40})
    assert [entry["loss"] for entry in metrics if entry["kind"] == "train"][-1] < 4.5
    ours, ids = load_model(run / "model"), torch.arange(30)[None]
    assert ours.config.normalization_layer_name == "layer_norm"
    pytest.importorskip("transformers")
    with torch.no_grad():
        theirs = transformers_folder.logits(run / "model", ids.tolist())
        torch.testing.assert_close(theirs, ours(ids), rtol=1e-4, atol=1e-4)
