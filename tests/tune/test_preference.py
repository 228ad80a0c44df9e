"""Preference losses: TRL's figures and gradients, and what is recorded beside them."""

import copy
import math
from typing import Any

import numpy as np
import pytest
import torch

from openelm.data.example_stream import ExampleSteps, PairBatch
from openelm.data.packing import IGNORE
from openelm.data.pairs import Example, Pair
from openelm.errors import UserError
from openelm.model.folder import save_model
from openelm.tune.preference import preference_loss
from small_models import make

BETA = 0.3
# (prompt, chosen, rejected) tokens of each pair: answers longer than the other in both directions, one of one token.
LENGTHS = ((5, 7, 3), (9, 4, 11), (3, 1, 6), (12, 8, 8))


def records() -> list[dict[str, list[int]]]:
    """Random ids as TRL's collator takes them."""
    draw = np.random.default_rng(3)
    names = ("prompt_ids", "chosen_ids", "rejected_ids")
    return [
        dict(zip(names, (draw.integers(3, 400, length).tolist() for length in pair), strict=True)) for pair in LENGTHS
    ]


def batch(indices: list[int], seed: int = 7) -> PairBatch:
    """The pairs of these indices: chosen rows, then rejected ones, padded with 1."""
    chosen = [(records()[i]["prompt_ids"], records()[i]["chosen_ids"]) for i in indices]
    rejected = [(records()[i]["prompt_ids"], records()[i]["rejected_ids"]) for i in indices]
    tokens, targets = np.full((2 * len(indices), 24), 1), np.full((2 * len(indices), 24), IGNORE)
    for row, (prompt, answer) in enumerate([*chosen, *rejected]):
        ids = [*prompt, *answer]
        tokens[row, : len(ids) - 1] = ids[:-1]
        targets[row, len(prompt) - 1 : len(ids) - 1] = answer
    return PairBatch(tokens, targets, examples=np.array(indices), seed=seed, read=0)


@pytest.fixture(scope="module")
def models(golden_weights) -> tuple[Any, Any]:
    """A model, and the same when it was a little different: the reference."""
    model = make(golden_weights)
    reference = copy.deepcopy(model)
    draw = torch.Generator().manual_seed(4)
    with torch.no_grad():
        for parameter in reference.parameters():
            parameter += 0.05 * parameter.abs().mean() * torch.randn(parameter.shape, generator=draw)
    return model, reference


def sums(model: Any, indices: list[int]) -> torch.Tensor:
    """(pairs, 2) log-probabilities by the book."""
    tokens, targets, _ = batch(indices).tensors("cpu")
    with torch.no_grad():
        log_p = model(tokens).log_softmax(-1).gather(2, targets.clamp(min=0)[..., None])[..., 0]
    return (log_p * (targets != IGNORE)).sum(1).view(2, -1).T


@pytest.fixture(scope="module")
def trainer(models, tokenizer_file, tmp_path_factory) -> Any:
    """TRL's trainer around the exported models; its own data is not used."""
    trl, datasets = pytest.importorskip("trl", minversion="1.16"), pytest.importorskip("datasets")
    transformers = pytest.importorskip("transformers")
    from openelm.data.tokenizer import Tokenizer
    from openelm.interop.modeling_openelm import OpenELMForCausalLM

    folders = [tmp_path_factory.mktemp("dpo") / name for name in ("model", "reference", "out")]
    exported = [
        OpenELMForCausalLM.from_pretrained(save_model(model, folder))
        for model, folder in zip(models, folders, strict=False)
    ]
    Tokenizer.load(tokenizer_file).save(folders[0])
    text = {"prompt": ["After "], "chosen": ["the river"], "rejected": ["a letter"]}
    return trl.DPOTrainer(
        exported[0],
        exported[1],
        trl.DPOConfig(
            output_dir=str(folders[2]), beta=BETA, bf16=False, use_cpu=True, gradient_checkpointing=False, report_to=[]
        ),
        train_dataset=datasets.Dataset.from_dict(text),
        processing_class=transformers.AutoTokenizer.from_pretrained(folders[0]),
    )


def theirs(trainer: Any, kind: str, smoothing: float, indices: list[int]) -> tuple[float, dict[str, torch.Tensor]]:
    """TRL's mean loss of some pairs, and its gradients by our names."""
    trainer.loss_types, trainer.label_smoothing = [kind], smoothing
    trainer.model.zero_grad()
    inputs = trainer.data_collator([records()[i] for i in indices])
    loss = trainer.compute_loss(trainer.model, inputs)
    loss.backward()
    found = {name.removeprefix("transformer."): p.grad.clone() for name, p in trainer.model.named_parameters()}
    return loss.item(), found


def ours(models: Any, kind: str, smoothing: float, indices: list[int]) -> tuple[float, dict[str, torch.Tensor]]:
    """The same of ours: the sums divided by the number of pairs, as the loop does."""
    model, reference = models
    model.zero_grad()
    loss_fn = preference_loss(kind, BETA, smoothing, sums(reference, [0, 1, 2, 3]))
    total, _ = loss_fn(model, batch(indices))
    (total / len(indices)).backward()
    return total.item() / len(indices), {name: p.grad.clone() for name, p in model.named_parameters()}


def close(
    found: tuple[float, dict[str, torch.Tensor]], expected: tuple[float, dict[str, torch.Tensor]], smoothing: float = 0
) -> None:
    # fp32 on both sides. A smoothed gradient is what two larger ones leave of each other, up to 1 - 2 e of them.
    bound = 1e-5 / (1 - 2 * smoothing)
    assert found[0] == pytest.approx(expected[0], rel=1e-5)
    assert found[1].keys() == expected[1].keys()
    for name, gradient in expected[1].items():
        assert (found[1][name] - gradient).abs().max() < bound * gradient.abs().max(), name
        assert (found[1][name] - gradient).norm() < bound * gradient.norm(), name


@pytest.mark.parametrize("kind", ["sigmoid", "hinge", "ipo"])
def test_losses_and_gradients_are_trls(models, trainer, kind):
    close(ours(models, kind, 0.0, [0, 1, 2, 3]), theirs(trainer, kind, 0.0, [0, 1, 2, 3]))
    close(ours(models, kind, 0.0, [2, 0]), theirs(trainer, kind, 0.0, [2, 0]))


def test_label_smoothing_is_that_of_trl(models, trainer):
    """TRL's sigmoid has lost its smoothing; aot has it, and is the same loss where there is one pair to be sorted."""
    for smoothing in (0.1, 0.4):
        for pair in range(4):
            close(ours(models, "sigmoid", smoothing, [pair]), theirs(trainer, "aot", smoothing, [pair]), smoothing)
    whole, parts = ours(models, "sigmoid", 0.1, [0, 1, 2, 3]), [theirs(trainer, "aot", 0.1, [i]) for i in range(4)]
    means = {name: torch.stack([part[1][name] for part in parts]).mean(0) for name in whole[1]}
    close(whole, (sum(part[0] for part in parts) / 4, means), 0.1)


def test_log_probabilities_and_rewards_are_those_of_transformers(models, trainer):
    reference = sums(models[1], [0, 1, 2, 3])
    _, metrics = preference_loss("sigmoid", BETA, 0.0, reference)(models[0], batch([0, 1, 2, 3]))
    found = []
    for answer in ("chosen_ids", "rejected_ids"):
        for record in records():
            ids = torch.tensor([record["prompt_ids"] + record[answer]])
            log_p = trainer.model(ids).logits.log_softmax(-1)[0, :-1].gather(1, ids[0, 1:, None])
            found.append(log_p[len(record["prompt_ids"]) - 1 :].sum())
    expected = torch.stack(found).detach().view(2, -1).T
    rewards = BETA * (expected - reference)
    # Sums of four answers of up to 100 nats each, in fp32.
    assert metrics["logp_chosen"].item() == pytest.approx(expected[:, 0].sum().item(), rel=1e-5)
    assert metrics["logp_rejected"].item() == pytest.approx(expected[:, 1].sum().item(), rel=1e-5)
    assert metrics["reward_chosen"].item() == pytest.approx(rewards[:, 0].sum().item(), abs=1e-4)
    assert metrics["reward_rejected"].item() == pytest.approx(rewards[:, 1].sum().item(), abs=1e-4)
    assert metrics["margin"].item() == pytest.approx((rewards[:, 0] - rewards[:, 1]).sum().item(), abs=1e-4)
    assert metrics["accuracy"].item() == (rewards[:, 0] > rewards[:, 1]).sum()
    assert 0 < metrics["accuracy"] < 4, "the test sees both kinds"


def test_where_model_and_reference_agree_the_loss_is_that_of_no_margin(models):
    reference = sums(models[0], [0, 1, 2, 3])
    for kind, smoothing, expected in (
        ("sigmoid", 0.0, math.log(2)),
        ("sigmoid", 0.2, math.log(2)),
        ("hinge", 0.0, 1.0),
        ("ipo", 0.0, (1 / (2 * BETA)) ** 2),
    ):
        total, _ = preference_loss(kind, BETA, smoothing, reference)(models[0], batch([0, 1, 2, 3]))
        assert total.item() / 4 == pytest.approx(expected, rel=1e-4)


def test_each_pair_is_held_against_its_own_reference_whatever_the_batch(models):
    loss_fn = preference_loss("sigmoid", BETA, 0.0, sums(models[1], [0, 1, 2, 3]))
    alone = [loss_fn(models[0], batch([i]))[0].item() for i in range(4)]
    assert len({round(value, 4) for value in alone}) == 4
    together = [loss_fn(models[0], batch(indices))[0].item() for indices in ([3, 1], [2, 0])]
    assert together == pytest.approx([alone[3] + alone[1], alone[2] + alone[0]], rel=1e-5)


def test_the_streams_batches_give_the_same(models):
    def example(prompt: list[int], answer: list[int]) -> Example:
        counts = np.arange(len(prompt) + len(answer)) >= len(prompt)
        return Example(np.array([*prompt, *answer], dtype=np.int32), counts)

    pairs = [Pair(*(example(r["prompt_ids"], r[key]) for key in ("chosen_ids", "rejected_ids"))) for r in records()]
    loss_fn = preference_loss("ipo", BETA, 0.0, sums(models[1], [0, 1, 2, 3]))
    for step, _ in zip(
        ExampleSteps(pairs, seed=5, row_length=32, bos_id=1, global_batch=2, rows=2), range(2), strict=False
    ):
        for made in step.batches:
            ours_, theirs_ = (loss_fn(models[0], one)[0].item() for one in (batch([*made.examples]), made))
            assert theirs_ == pytest.approx(ours_, rel=1e-5)


def test_dropout_is_drawn_by_the_batch_and_only_in_training(models):
    model = copy.deepcopy(models[0])
    model.norm.register_forward_hook(lambda module, _, y: torch.nn.functional.dropout(y, 0.3, module.training))
    loss_fn = preference_loss("sigmoid", BETA, 0.0, sums(models[1], [0, 1, 2, 3]))
    plain = loss_fn(model.eval(), batch([0, 1]))[0].item()
    model.train()
    first = loss_fn(model, batch([0, 1]))[0].item()
    torch.rand(5)  # what else is drawn meanwhile changes nothing
    assert loss_fn(model, batch([0, 1]))[0].item() == first != plain
    assert loss_fn(model, batch([0, 1], seed=8))[0].item() != first


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        (("dpo", 0.1, 0.0), "preference.loss=dpo is none of sigmoid, hinge, ipo"),
        (("sigmoid", 0.0, 0.0), "preference.beta=0 must be above 0"),
        (("ipo", -0.5, 0.0), "preference.beta=-0.5 must be above 0"),
        (("hinge", math.nan, 0.0), "preference.beta=nan must be above 0"),
        (("hinge", 0.1, 0.1), "preference.label_smoothing=0.1 has no meaning for preference.loss=hinge"),
        (("sigmoid", 0.1, 0.5), "preference.label_smoothing=0.5 must be at least 0 and below 0.5"),
        (("sigmoid", 0.1, -0.1), "preference.label_smoothing=-0.1 must be at least 0 and below 0.5"),
    ],
)
def test_settings_that_are_no_loss_are_refused(settings, words):
    with pytest.raises(UserError, match=words):
        preference_loss(*settings, torch.zeros(1, 2))
