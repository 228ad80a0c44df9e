"""LoRA, DoRA and rsLoRA in our model: nothing changes at first, then what peft computes on the exported model."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import small_adapters
from openelm.errors import UserError
from openelm.interop import huggingface  # noqa: F401 (makes transformers know OpenELM)
from openelm.interop.adapter import ATTENTION_TARGETS, PAPER_TARGETS, Adapter, shapes
from openelm.interop.convert import convert
from openelm.interop.source import open_folder
from openelm.interop.target import Format
from openelm.model.folder import save_model
from openelm.model.transformer import OpenELM
from openelm.tune.adapters import attach, initial_values, load_adapter, switched_off
from small_adapters import KINDS
from small_models import make

peft = pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")

TOKENS = torch.randint(0, 448, (2, 40), generator=torch.Generator().manual_seed(1))


@pytest.fixture
def base(golden_weights) -> OpenELM:
    return make(golden_weights)


def begun(base: OpenELM, adapter: Adapter, dtype: torch.dtype = torch.float32, seed: int = 1) -> OpenELM:
    """The base with an adapter as a run begins with it: made on the meta device, then filled."""
    with torch.device("meta"):
        model = OpenELM(base.config)
        attach(model, adapter)
    model.to_empty(device="cpu")
    values = dict(initial_values(model, adapter, base.state_dict().__getitem__, seed, dtype))
    assert list(values) == [name for name, _ in model.named_parameters()]
    model.load_state_dict(values)
    return model.to(dtype)


def trained(base: OpenELM, folder: Path, kind: str, targets: tuple[str, ...] = PAPER_TARGETS) -> OpenELM:
    """The base with an adapter of random values, which stands in ``folder`` then."""
    small_adapters.write(folder, base.config, kind, targets)
    model = OpenELM(base.config)
    model.load_state_dict(base.state_dict())
    load_adapter(model.eval(), folder)
    return model


def exported(base: OpenELM, folder: Path) -> Any:
    """The base as transformers has it, by way of an exported folder."""
    if not folder.exists():
        save_model(base, folder.with_name("plain"))
        convert(open_folder(folder.with_name("plain")), "hf", folder, Format(torch.float32))
    return transformers.AutoModelForCausalLM.from_pretrained(folder).eval()


@pytest.mark.parametrize("kind", KINDS)
def test_at_step_0_the_logits_are_the_base_models(base, kind):
    adapter = Adapter(kind, r=4, dropout=0.1, targets=PAPER_TARGETS)
    expected = base(TOKENS)
    model = begun(base, adapter)
    assert torch.equal(model.eval()(TOKENS), expected)
    torch.testing.assert_close(model.train()(TOKENS), expected)  # dropout: DoRA computes the product again, of zeros
    model = begun(base, adapter, torch.bfloat16)
    assert torch.equal(model.eval()(TOKENS), base.to(torch.bfloat16)(TOKENS)), "norms in bf16 are not those in fp32"


@pytest.mark.parametrize("kind", KINDS)
def test_first_values_are_distributed_as_pefts(base, kind):
    adapter = Adapter(kind, r=32, targets=PAPER_TARGETS)
    ours = begun(base, adapter).state_dict()
    model = OpenELM(base.config)
    model.load_state_dict(base.state_dict())
    attach(model, adapter)
    for name, theirs in model.state_dict().items():
        if "lora_A" in name:
            assert ours[name].abs().max() <= theirs.shape[1] ** -0.5
            assert abs(ours[name].mean()) < 0.1 * theirs.shape[1] ** -0.5
            assert ours[name].std() == pytest.approx(theirs.std().item(), rel=0.1)
        elif "embedding_B" in name:
            assert ours[name].std() == pytest.approx(1, rel=0.1) == theirs.std().item()
        else:
            assert torch.equal(ours[name], theirs), name  # the base's, zeros, and DoRA's magnitudes


def test_first_values_depend_on_the_seed_alone(base):
    adapter = Adapter("lora", r=2, targets=PAPER_TARGETS)
    before = torch.get_rng_state()
    one, same, other = (begun(base, adapter, seed=seed).state_dict() for seed in (1, 1, 2))
    attach(base, adapter)
    assert torch.equal(torch.get_rng_state(), before), "nothing is drawn from the generator of all"
    for name in shapes(adapter, base.config):
        assert torch.equal(one[name], same[name])
        drawn = "lora_A" in name or "embedding_B" in name
        assert torch.equal(one[name], other[name]) != drawn, name
    first, second = (one[f"layers.1.ffn.{name}.lora_A.default.weight"] for name in ("proj_1", "proj_2"))
    assert first.shape != second.shape or not torch.equal(first, second)


@pytest.mark.parametrize("kind", KINDS)
def test_only_the_adapter_is_trained_and_its_parameters_are_those_of_its_files(base, kind):
    adapter = Adapter(kind, r=2, targets=PAPER_TARGETS)
    with torch.device("meta"):
        model = OpenELM(base.config)
        attach(model, adapter)
    found = {name: tuple(p.shape) for name, p in model.named_parameters() if p.requires_grad}
    assert list(found.items()) == list(shapes(adapter, base.config).items())
    frozen = [name for name, p in model.named_parameters() if not p.requires_grad]
    assert [name.replace(".base_layer.", ".") for name in frozen] == list(base.state_dict())
    assert "layers.0.attn.qkv_proj.base_layer.weight" in frozen and "norm.weight" in frozen
    assert all(p.is_meta for p in model.parameters())


@pytest.mark.parametrize("kind", KINDS)
def test_forward_and_gradients_equal_pefts_on_the_exported_model(base, kind, tmp_path):
    """Adapters cross to PeftModel, embedding and tied output included."""
    ours = trained(base, tmp_path / "adapter", kind)
    theirs = peft.PeftModel.from_pretrained(exported(base, tmp_path / "hf"), tmp_path / "adapter", is_trainable=True)
    theirs.eval()
    found, expected = ours(TOKENS), theirs(TOKENS).logits
    assert (found - expected).abs().max() < 1e-4 < (found - base(TOKENS)).abs().max()
    for logits in (found, expected):
        logits.square().mean().backward()
    parameters = dict(theirs.named_parameters())
    for name, parameter in ours.named_parameters():
        if parameter.requires_grad:
            gradient = parameters[f"base_model.model.transformer.{name}"].grad
            assert (parameter.grad - gradient).norm() <= 1e-4 * gradient.norm(), name
        else:
            assert parameter.grad is None


@pytest.mark.parametrize("bare", [False, True])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.filterwarnings("ignore:Unable to fetch", "ignore:Could not find a config")
def test_what_peft_trained_and_saved_is_loaded_with_equal_logits(base, kind, bare, tmp_path):
    model = exported(base, tmp_path / "hf")
    model = model.transformer if bare else model
    flags = {"use_dora": kind == "dora", "use_rslora": kind == "rslora", "target_modules": list(PAPER_TARGETS)}
    theirs = peft.get_peft_model(model, peft.LoraConfig(r=3, lora_alpha=5, **flags)).eval()
    draw = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in theirs.parameters():
            if parameter.requires_grad:
                parameter += 0.2 * torch.randn(parameter.shape, generator=draw)
    theirs.save_pretrained(tmp_path / "adapter")
    adapter = load_adapter(base, tmp_path / "adapter")
    assert (adapter.kind, adapter.r, adapter.alpha) == (kind, 3, 5)
    found, expected = base.hidden(TOKENS), theirs(TOKENS, output_hidden_states=True)
    expected = expected.last_hidden_state if bare else expected.hidden_states[-1]
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_switched_off_the_model_computes_as_its_base(base, kind, tmp_path):
    model = trained(base, tmp_path / "adapter", kind)
    expected, adapted = base(TOKENS), model(TOKENS)
    trainable = [p.requires_grad for p in model.parameters()]
    with switched_off(model):
        assert torch.equal(model(TOKENS), expected)
        with switched_off(model):
            pass
        assert torch.equal(model(TOKENS), expected), "the outer one still holds"
        assert [p.requires_grad for p in model.parameters()] == trainable
    assert torch.equal(model(TOKENS), adapted)
    with pytest.raises(ValueError, match="stop"), switched_off(model):
        raise ValueError("stop")
    assert torch.equal(model(TOKENS), adapted)


def test_dropout_is_there_in_training_only(base, tmp_path):
    model = trained(base, tmp_path / "adapter", "lora")
    assert not any(module.training for module in model.modules()), "as the model was"
    assert torch.equal(model(TOKENS), model(TOKENS))
    model.train()
    torch.manual_seed(1)
    first, second = model(TOKENS), model(TOKENS)
    torch.manual_seed(1)
    assert not torch.equal(first, second) and torch.equal(first, model(TOKENS))


def test_another_blank_model_can_be_made_alike(base, tmp_path):
    model = trained(base, tmp_path / "adapter", "dora", ATTENTION_TARGETS)
    with torch.device("meta"):
        other = OpenELM(base.config)
        model.adapt(other)
    other.load_state_dict(model.state_dict(), assign=True)
    assert torch.equal(other.eval()(TOKENS), model(TOKENS))


@pytest.mark.parametrize("kind", KINDS)
def test_in_bf16_all_is_bf16_and_the_error_is_that_of_bf16(base, kind, tmp_path):
    expected = trained(base, tmp_path / "adapter", kind)(TOKENS)
    model = OpenELM(base.config)
    model.load_state_dict(base.state_dict())
    load_adapter(model.eval().to(torch.bfloat16), tmp_path / "adapter")
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    found = model(TOKENS)
    assert found.dtype == torch.bfloat16
    # The base alone is 1.5 % off in bf16; DoRA's norms and magnitudes are rounded too.
    assert (found - expected).square().mean().sqrt() < 0.06 * expected.std()


def gradients(model: OpenELM) -> list[Tensor]:
    model.zero_grad()
    model(TOKENS[:, :-1], TOKENS[:, 1:]).backward()
    return [p.grad.clone() for p in model.parameters() if p.requires_grad]


@pytest.mark.parametrize("kind", ["lora", "dora"])
def test_recomputed_activations_give_the_same_gradients_dropout_included(base, kind, tmp_path):
    model = trained(base, tmp_path / "adapter", kind).train()
    results = []
    for which in ("none", "selective", "full"):
        model.checkpoint_activations(which)
        torch.manual_seed(3)
        results.append(gradients(model))
    for plain, *others in zip(*results, strict=True):
        assert plain.abs().max() > 0
        for other in others:
            torch.testing.assert_close(other, plain, rtol=1e-5, atol=1e-6)


def test_two_ranks_train_adapters_to_the_losses_of_one():
    """Sharded in rows, with all activations recomputed; the base beside it never moves."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]

    def start(rank: int) -> subprocess.Popen[str]:
        env = {**os.environ, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "PYTHONPATH": str(here.parent)}
        env |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
        code = "import json, small_adapters; print(json.dumps(small_adapters.train('full', 'full')))"
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        return subprocess.Popen([sys.executable, "-c", code], env=env, **pipes)

    here = Path(small_adapters.__file__)
    processes = [start(0), start(1)]
    try:
        one = small_adapters.train("none", "none")
        outputs = [process.communicate(timeout=120) for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert [process.returncode for process in processes] == [0, 0], outputs
    two = json.loads(outputs[0][0].splitlines()[-1])
    for kind in ("lora", "dora"):
        assert two[kind] == pytest.approx(one[kind], rel=1e-5)
        assert one[kind][::2] == pytest.approx([one[kind][0]] * 6, rel=1e-6)
        assert one[kind][-1] < 0.8 * one[kind][1]


def test_without_peft_it_is_said_what_to_install(base, monkeypatch):
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(UserError, match=r"pip install 'openelm-framework\[tune\]'"):
        attach(base, Adapter())


def test_targets_that_match_nothing_leave_the_model_as_it_was(base):
    names = list(base.state_dict())
    with pytest.raises(UserError, match="q_proj matches no module of this model"):
        attach(base, Adapter(targets=("q_proj",)))
    assert list(base.state_dict()) == names


def test_an_adapter_of_another_model_is_refused_before_anything_is_attached(base, golden_weights, tmp_path):
    small_adapters.write(tmp_path / "adapter", base.config)
    other = make(golden_weights, model_dim=96)
    names = list(other.state_dict())
    with pytest.raises(UserError, match="the adapter was trained on another one"):
        load_adapter(other, tmp_path / "adapter")
    assert list(other.state_dict()) == names
