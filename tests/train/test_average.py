"""The mean of checkpoints, to the last bit."""

import pytest
import torch

from openelm.errors import UserError
from openelm.model.folder import tensor_shapes
from openelm.model.geometry import ModelConfig
from openelm.model.transformer import OpenELM, init_weights
from openelm.train.average import Average, exponential_average, newest, newest_in_a_row
from openelm.train.checkpoint import Checkpoint, Checkpoints
from openelm.train.form import Form

CONFIG = ModelConfig(model_dim=32, num_transformer_layers=2, head_dim=16, num_gqa_groups=1, vocab_size=20)


def weights_of(seed: int, config: ModelConfig = CONFIG) -> dict[str, torch.Tensor]:
    model = OpenELM(config)
    init_weights(model, seed)
    return model.state_dict()


def save(checkpoints: Checkpoints, step: int, config: ModelConfig = CONFIG) -> None:
    checkpoints.save(Form(config), Checkpoint(step, weights_of(step, config), {}, {}))


def average_checkpoints(checkpoints, last):
    """(geometry, mean weights, steps) of the newest checkpoints."""
    average = Average(checkpoints, newest(checkpoints, checkpoints.steps(), last))
    return average.config, {name: average.read(name) for name in tensor_shapes(average.config)}, average.steps


@pytest.fixture
def checkpoints(tmp_path) -> Checkpoints:
    checkpoints = Checkpoints(tmp_path / "checkpoints", keep_last=9)
    for step in (10, 20, 30, 40):
        save(checkpoints, step)
    return checkpoints


@pytest.mark.parametrize("last", [1, 2, 3, 4])
def test_the_mean_is_that_of_the_newest_rounded_once(checkpoints, last):
    config, mean, steps = average_checkpoints(checkpoints, last)
    assert steps == [10, 20, 30, 40][-last:]
    assert config.num_parameters() == CONFIG.num_parameters()
    each = [weights_of(step) for step in steps]
    for name, tensor in mean.items():
        assert tensor.dtype == torch.float32
        assert torch.equal(tensor, torch.stack([w[name].double() for w in each]).mean(0).float()), name


def test_the_mean_does_not_lose_what_fp32_sums_lose(tmp_path):
    # 1 + 2**-24, three times: each addition in fp32 drops the small part.
    checkpoints = Checkpoints(tmp_path, keep_last=9)
    weights = weights_of(0)
    for step, value in ((1, 2.0**24), (2, 1.0), (3, 1.0)):
        checkpoints.save(Form(CONFIG), Checkpoint(step, {**weights, "norm.weight": torch.full((32,), value)}, {}, {}))
    _, mean, _ = average_checkpoints(checkpoints, 3)
    assert set(mean["norm.weight"].tolist()) == {torch.tensor((2**24 + 2) / 3, dtype=torch.float32).item()}


@pytest.mark.parametrize("last", [5, 0, -1])
def test_more_than_there_are_is_refused(checkpoints, last):
    with pytest.raises(UserError, match=rf"has \d checkpoints, not {last}.*--last"):
        average_checkpoints(checkpoints, last)


def test_a_damaged_one_is_named_and_an_older_damaged_one_is_not_looked_at(checkpoints):
    for step in (10, 30):
        (checkpoints.path(step) / "model.safetensors").write_bytes(b"")
    assert average_checkpoints(checkpoints, 1)[2] == [40]
    with pytest.raises(UserError, match=r"step_00000030/model\.safetensors"):
        average_checkpoints(checkpoints, 3)


def test_another_geometry_among_them_is_refused(checkpoints):
    save(checkpoints, 50, CONFIG.changed(num_transformer_layers=3))
    with pytest.raises(
        UserError, match=r"step_00000040 is of another geometry: num_transformer_layers is 2 there and 3"
    ):
        average_checkpoints(checkpoints, 2)


def test_rows_of_the_mean_are_those_of_the_whole(checkpoints):
    average = Average(checkpoints, [10, 30])
    assert average.steps == [10, 30]
    name = "token_embeddings.weight"
    each = torch.stack([weights_of(step)[name].double() for step in (10, 30)])
    assert torch.equal(average.read(name), each.mean(0).float())
    assert torch.equal(average.read(name, 7, 4), each.mean(0).float()[7:11])


@pytest.mark.parametrize(
    ("steps", "spacing", "chosen"),
    [
        ([100, 200, 300], 100, [100, 200, 300]),
        ([20, 40, 45], 5, [40, 45]),  # 20 is a milestone
        ([600, 900, 1000], 300, [600, 900, 1000]),  # a run ends where it ends
        (list(range(10, 90, 10)), 10, [40, 50, 60, 70, 80]),
        ([20, 40, 45], None, [20, 40, 45]),
        ([7], 5, [7]),
    ],
)
def test_an_old_milestone_is_not_among_those_in_a_row(steps, spacing, chosen):
    assert newest_in_a_row(steps, 5, spacing) == chosen


def test_the_exponential_average_of_a_checkpoint_is_found_or_missed_by_name(checkpoints):
    kept = {f"ema.{name}": tensor for name, tensor in weights_of(7).items()}
    checkpoints.save(Form(CONFIG), Checkpoint(50, weights_of(50), kept, {}))
    form, read = exponential_average(checkpoints, 50)
    assert form.config.num_parameters() == CONFIG.num_parameters()
    assert all(torch.equal(read(name), tensor) for name, tensor in weights_of(7).items())
    with pytest.raises(UserError, match=r"step_00000040 holds no exponential average.*train\.ema_decay"):
        exponential_average(checkpoints, 40)
    kept.pop("ema.norm.weight")
    checkpoints.save(Form(CONFIG), Checkpoint(60, weights_of(60), kept, {}))
    with pytest.raises(UserError, match=r"ema\.norm\.weight has shape None, but config\.json gives \(32,\)"):
        exponential_average(checkpoints, 60)
