"""Reference log-probabilities: the plain figures, once, and never figures that were not written."""

import copy
import json
import multiprocessing
import os
import socket
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from openelm.data.example_stream import ExampleSteps
from openelm.data.pairs import Example, Pair
from openelm.errors import UserError
from openelm.interop.source import open_folder
from openelm.model.folder import save_model
from openelm.model.geometry import ModelConfig
from openelm.model.transformer import OpenELM, init_weights, initial_weights
from openelm.train.parallel import World, build
from openelm.tune import reference
from openelm.tune.beginning import digest
from openelm.tune.preference import preference_loss
from openelm.tune.reference import key_of, reference_log_probs
from openelm.tune.validation import evaluate_examples, evaluate_preferences
from small_models import UNEVEN, make

# Sums of up to 20 fp32 log-probabilities of about 6 nats, in batches of other shapes.
CLOSE = dict(rtol=1e-5, atol=1e-4)
KEY = "0123abcd"


def some_pairs(lengths: tuple[tuple[int, int, int], ...] = ((5, 7, 3), (9, 4, 11), (3, 1, 6), (70, 8, 9), (2, 20, 1))):
    """Random ids; of each pair the tokens of its prompt, its chosen and its rejected answer."""
    draw = np.random.default_rng(6)

    def example(prompt: np.ndarray, answer: int) -> Example:
        ids = np.concatenate((prompt, draw.integers(3, 400, answer))).astype(np.int32)
        return Example(ids, np.arange(len(ids)) >= len(prompt))

    found = []
    for prompt_length, chosen, rejected in lengths:
        prompt = np.concatenate(([1], draw.integers(3, 400, prompt_length - 1)))
        found.append(Pair(example(prompt, chosen), example(prompt, rejected)))
    return found


def plain(model: OpenELM, pairs: list[Pair]) -> torch.Tensor:
    """The same by the book: one answer at a time, all logits at once."""
    found = []
    for pair in pairs:
        for answer in (pair.chosen, pair.rejected):
            ids = torch.from_numpy(answer.ids).long()
            with torch.no_grad():
                log_p = model(ids[None, :-1])[0].log_softmax(-1).gather(1, ids[1:, None])[:, 0]
            found.append(log_p[torch.from_numpy(answer.counts[1:])].sum())
    return torch.stack(found).view(-1, 2)


def ask(model: OpenELM, pairs: list[Pair], cache: Path, rows: int = 3, key: str = KEY, **options) -> torch.Tensor:
    return reference_log_probs(model, pairs, World(), rows=rows, bos_id=1, cache=cache, key=key, **options)


@pytest.fixture
def model(golden_weights) -> OpenELM:
    return make(golden_weights)


def no_forward(*_, **__):
    raise AssertionError("the model is asked again")


@pytest.fixture
def silent(golden_weights, monkeypatch) -> OpenELM:
    """A model that must not be asked anything."""
    model = make(golden_weights)
    monkeypatch.setattr(model, "forward", no_forward)
    return model


@pytest.mark.parametrize("options", [dict(rows=1), dict(rows=3), dict(rows=64), dict(rows=4, length=96)])
def test_the_figures_are_the_plain_ones_whatever_the_batching(model, tmp_path, options):
    found = ask(model, some_pairs(), tmp_path, **options)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, plain(model, some_pairs()), **CLOSE)


def test_no_pairs_have_no_figures(silent, tmp_path):
    assert ask(silent, [], tmp_path).shape == (0, 2)


def test_answers_are_computed_longest_first_and_in_few_shapes(model, tmp_path):
    shapes = []
    model.token_embeddings.register_forward_hook(lambda module, given, out: shapes.append(tuple(given[0].shape)))
    ask(model, some_pairs(), tmp_path, rows=2)
    assert shapes == [(2, 128), (2, 64), (2, 64), (2, 64), (2, 64)]
    shapes.clear()
    ask(model, some_pairs(), tmp_path, rows=4, key="fixed", length=96)
    assert shapes == [(4, 96)] * 3, "of one shape, as a compiled model wants it"


def test_a_second_run_asks_the_model_nothing(model, silent, tmp_path):
    first = ask(model, some_pairs(), tmp_path / "cache")
    assert torch.equal(ask(silent, some_pairs(), tmp_path / "cache"), first)
    assert [file.name for file in (tmp_path / "cache").iterdir()] == [f"{KEY}.safetensors"]
    with pytest.raises(AssertionError, match="asked again"):
        ask(silent, some_pairs(), tmp_path / "cache", key="another")


def cut(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-3])


def flip(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[-2] ^= 1
    file.write_bytes(content)


def empty(file: Path) -> None:
    file.write_bytes(b"")


def without_digest(file: Path) -> None:
    save_file(load_file(file), file)


def with_another_tensor(file: Path) -> None:
    save_file({"weight": torch.zeros(2)}, file)


@pytest.mark.parametrize("damage", [cut, flip, empty, without_digest, with_another_tensor])
def test_a_damaged_file_is_computed_again_and_made_whole(model, silent, tmp_path, capsys, damage):
    first = ask(model, some_pairs(), tmp_path)
    damage(tmp_path / f"{KEY}.safetensors")
    assert torch.equal(ask(model, some_pairs(), tmp_path), first)
    assert f"{KEY}.safetensors is damaged" in capsys.readouterr().err
    assert torch.equal(ask(silent, some_pairs(), tmp_path), first)


def test_figures_of_other_pairs_are_not_taken_whatever_they_are_called(model, tmp_path, capsys):
    first = ask(model, some_pairs(), tmp_path)
    assert len(ask(model, some_pairs()[:2], tmp_path)) == 2, "a file of another length"
    other = ask(model, some_pairs()[::-1], tmp_path, key="other")
    torch.testing.assert_close(other, first.flip(0), **CLOSE)
    (tmp_path / "other.safetensors").replace(tmp_path / f"{KEY}.safetensors")
    capsys.readouterr()
    torch.testing.assert_close(ask(model, some_pairs(), tmp_path), first, **CLOSE)
    assert "is damaged (it is not what was written)" in capsys.readouterr().err


def test_the_key_is_another_for_another_model_other_data_another_dtype():
    facts = ("model", "data", "float32")
    keys = {key_of(*facts), key_of("MODEL", *facts[1:]), key_of("model", "DATA", "float32"), key_of(*facts[:2], "b16")}
    keys.add(key_of("modeld", "ata", "float32"))
    assert len(keys) == 5 and key_of(*facts) in keys
    assert all(len(key) == 32 and key.isalnum() for key in keys), "names of files"


def test_a_models_digest_is_of_all_that_it_computes_with_and_of_nothing_else(model, tmp_path):
    source = open_folder(save_model(model, tmp_path / "model"))

    def of(**changes: object) -> str:
        return digest(replace(source, config=source.config.changed(**changes)))

    assert of(rope_freq_constant=500_000) != digest(source)
    assert of(normalization_layer_name="layer_norm") != digest(source)
    assert of(rope_freq_constant=10_000) == of(rope_freq_constant=10_000.0) == digest(source)
    assert of(max_context_length=4096, bos_token_id=5, eos_token_id=6, initializer_range=0.5) == digest(source)
    same = {"qkv_multipliers": source.config.alphas, "ffn_multipliers": source.config.betas}
    assert of(**same) == digest(source), "as other formats write the widths"
    save_model(model, tmp_path / "bf16", dtype=torch.bfloat16)
    assert digest(open_folder(tmp_path / "bf16")) != digest(source)


def test_the_model_neither_learns_nor_drops_out_and_trains_on(model, tmp_path):
    expected = plain(model, some_pairs())
    model.norm.register_forward_hook(lambda module, _, y: torch.nn.functional.dropout(y, 0.5, module.training))
    model.train()
    found = ask(model, some_pairs(), tmp_path)
    torch.testing.assert_close(found, expected, **CLOSE)
    assert model.training and not found.requires_grad
    assert all(parameter.grad is None for parameter in model.parameters())


def test_with_an_adapter_the_base_is_the_reference(model, tmp_path):
    pytest.importorskip("peft")
    from openelm.interop.adapter import Adapter
    from openelm.tune.adapters import attach, switched_off

    expected = plain(model, some_pairs())
    tuned = copy.deepcopy(model)
    attach(tuned, Adapter("lora", 4, 8, 0.1, ("qkv_proj", "proj_1")))
    with torch.no_grad():
        for parameter in tuned.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1)
    found = ask(tuned, some_pairs(), tmp_path, base=lambda: switched_off(tuned))
    torch.testing.assert_close(found, expected, **CLOSE)
    assert (ask(tuned, some_pairs(), tmp_path, key="adapted") - expected).abs().max() > 0.1


def test_a_broken_reference_is_refused_and_not_kept(model, tmp_path):
    with torch.no_grad():
        model.token_embeddings.weight[int(some_pairs()[1].rejected.ids[-2])] = torch.nan
    with pytest.raises(UserError, match=r"the reference model gives the answers of pair \d+ .*not finite"):
        ask(model, some_pairs(), tmp_path)
    assert not list(tmp_path.iterdir())


def test_a_full_disk_is_named_and_leaves_nothing(model, tmp_path, largest_file):
    with largest_file(16), pytest.raises(UserError, match="no space left"):
        ask(model, some_pairs(), tmp_path)
    assert not list(tmp_path.iterdir())


def test_long_work_says_how_far_it_is_and_short_work_nothing(model, tmp_path, capsys, monkeypatch):
    ask(model, some_pairs(), tmp_path)
    assert capsys.readouterr().err == ""
    monkeypatch.setattr(reference, "SAY_EVERY_S", 0.0)
    ask(model, some_pairs(), tmp_path, rows=5, key="again")
    lines = capsys.readouterr().err.splitlines()
    assert lines[0].startswith("log-probabilities of the reference model: ") and "to go" in lines[0]
    assert "100%" in lines[-2] and "done in" in lines[-1]


# Many ranks


def validation(model: OpenELM, world: World) -> list[dict[str, float]]:
    """Five batches of one pair, and as many of the chosen answers alone: no number that two ranks can share."""
    pairs = some_pairs()
    sets = (pairs, [pair.chosen for pair in pairs])
    batches = []
    for examples in sets:
        steps = ExampleSteps(examples, seed=1, row_length=128, bos_id=1, global_batch=1, rows=1)
        batches.append([step.batches[0] for step, _ in zip(steps, pairs, strict=False)])
    loss = preference_loss("sigmoid", 0.1, 0.0, torch.linspace(-90, -40, 10).view(5, 2))
    return [evaluate_preferences(model, batches[0], world, loss), evaluate_examples(model, batches[1], world)]


def _rank(rank: int, ranks: int, port: int, folder: Path) -> None:
    """One of the ranks: what it finds goes to ``folder``/RANK.json."""
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(ranks), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    torch.set_num_threads(1)
    with World("full") as world:
        model = build(ModelConfig(**UNEVEN), world, lambda made: initial_weights(made, seed=3), dtype=torch.float32)
        asked = []
        model.register_forward_pre_hook(lambda *_: asked.append(1))
        found = [
            reference_log_probs(model, some_pairs(), world, rows=2, bos_id=1, cache=folder / "cache", key=KEY)
            for _ in range(2)
        ]
        assert torch.equal(found[0], found[1])
        figures = {"found": found[0].tolist(), "asked": len(asked), "validation": validation(model, world)}
        (folder / f"{rank}.json").write_text(json.dumps(figures))


def test_two_ranks_share_the_work_and_find_the_same(tmp_path):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    context = multiprocessing.get_context("spawn")
    processes = [context.Process(target=_rank, args=(rank, 2, port, tmp_path)) for rank in range(2)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(120)
    assert [process.exitcode for process in processes] == [0, 0]
    model = OpenELM(ModelConfig(**UNEVEN))
    init_weights(model, seed=3)
    results = [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(2)]
    for result in results:
        torch.testing.assert_close(torch.tensor(result["found"]), plain(model, some_pairs()), **CLOSE)
        # Five batches: both go through the sharded model three times, and not at all when the file is there.
        assert result["asked"] == 3
        for one, many in zip(validation(model, World()), result["validation"], strict=True):
            assert many == pytest.approx(one, rel=1e-5)
    assert [file.name for file in (tmp_path / "cache").iterdir()] == [f"{KEY}.safetensors"]
