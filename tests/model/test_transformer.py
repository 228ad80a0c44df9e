"""The model's numbers: CoreNet's to rounding, the same however they are computed, and blind to the future."""

import json

import pytest
import torch
import torch.nn.functional as F

from openelm.model.cache import Cache
from openelm.model.geometry import ModelConfig
from openelm.model.transformer import LayerNorm, OpenELM, RMSNorm, attend, init_weights

# fp32 with sums in another order: logits of a few units differ in the sixth digit.
CLOSE = dict(rtol=1e-4, atol=1e-5)
SMALL = dict(model_dim=48, num_transformer_layers=3, head_dim=16, num_gqa_groups=2, ffn_dim_divisor=8, vocab_size=80)


@pytest.fixture
def model() -> OpenELM:
    model = OpenELM(ModelConfig(**SMALL, max_context_length=32))
    init_weights(model, seed=7)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 2:
                parameter *= 2  # attention of fresh weights is so even that a wrong position would hardly show
    return model


@pytest.fixture
def golden_model(golden, golden_weights) -> OpenELM:
    figures = golden("tiny")
    model = OpenELM(ModelConfig(**figures["config"]))
    model.load_state_dict(golden_weights(model, figures["seed"]))
    return model


def random_tokens(rows: int, length: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(3, 80, (rows, length), generator=torch.Generator().manual_seed(seed))


def gradients(model: OpenELM) -> dict[str, torch.Tensor]:
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def test_logits_are_corenets(golden_model, golden_tiny):
    with torch.no_grad():
        logits = golden_model(golden_tiny["tokens"][None, :-1])[0]
    # The golden README's bound: fp32 rounding through four layers.
    torch.testing.assert_close(logits, golden_tiny["logits"], rtol=0, atol=2e-5)


def test_losses_and_gradients_are_corenets(golden, golden_model, golden_tiny):
    figures = golden("tiny")
    targets = golden_tiny["targets"].clone()
    targets[targets == figures["ignore_index"]] = -100
    valid = (targets != -100).sum()
    assert 0 < valid < len(targets)
    total, z_loss = golden_model(
        golden_tiny["tokens"][None, :-1], targets[None], z_loss_weight=figures["z_loss_weight"]
    )
    (total / valid).backward()
    assert ((total - z_loss) / valid).item() == pytest.approx(figures["cross_entropy"], rel=1e-5)
    assert (z_loss / valid).item() == pytest.approx(figures["z_loss_over_valid_tokens"], rel=1e-5)
    norms = {name: gradient.norm().item() for name, gradient in gradients(golden_model).items()}
    assert norms == pytest.approx(figures["grad_norm_of_total_loss"], rel=1e-4)


def test_the_270m_model_is_corenets(shared, golden_weights):
    figures = json.loads((shared / "golden" / "openelm_270m.json").read_text())
    with torch.device("meta"):
        model = OpenELM(ModelConfig.from_name("270M", vocab_size=figures["vocab_size"]))
    model.load_state_dict(golden_weights(model, figures["seed"]), assign=True)
    tokens = torch.tensor(figures["tokens"])
    with torch.no_grad():
        logits = model(tokens[None, :-1])[0]
    log_probabilities = logits.log_softmax(-1).gather(1, tokens[1:, None])[:, 0]
    expected = torch.tensor(figures["next_token_logprob"])
    torch.testing.assert_close(log_probabilities, expected, rtol=0, atol=1e-4)
    top = logits[-1].topk(20)
    assert top.indices.tolist() == figures["last_position_top20_ids"]
    torch.testing.assert_close(top.values, torch.tensor(figures["last_position_top20_logits"]), rtol=0, atol=1e-4)


def test_a_cache_changes_no_logit_however_the_row_is_cut(model):
    tokens = random_tokens(2, 20)
    with torch.no_grad():
        whole = model(tokens)
        for cuts in ([20], [1] * 20, [7, 1, 1, 6, 5]):
            cache, parts = Cache(model.config, 2, 20), []
            for part in tokens.split(cuts, dim=1):
                hidden = model.hidden(part, cache=cache)
                cache.length += part.shape[1]
                parts.append(hidden @ model.output_weight.T)
            torch.testing.assert_close(torch.cat(parts, dim=1), whole, **CLOSE)


def test_layer_norm_stands_wherever_a_norm_does(model):
    other = OpenELM(ModelConfig(**SMALL, max_context_length=32, normalization_layer_name="layer_norm"))
    norms = [module for module in model.modules() if isinstance(module, RMSNorm)]
    assert len(norms) == 4 * 3 + 1  # two in each layer, of queries, of keys; and the last
    with torch.no_grad():
        for norm in norms:
            norm.weight.copy_(torch.linspace(0.5, 1.5, len(norm.weight)))
    other.load_state_dict(model.state_dict())
    for norm in norms:
        norm.forward = lambda x, gain=norm.weight: F.layer_norm(x, gain.shape, gain, eps=1e-6)
    tokens = random_tokens(2, 17)
    found, expected = (m(tokens[:, :-1], tokens[:, 1:]) for m in (other, model))
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=0)
    torch.testing.assert_close(other(tokens), model(tokens), **CLOSE)
    found.backward()
    expected.backward()
    theirs = gradients(model)
    for name, gradient in gradients(other).items():
        torch.testing.assert_close(gradient, theirs[name], rtol=1e-3, atol=1e-4)
    assert all(isinstance(module, LayerNorm) for module in other.modules() if isinstance(module, RMSNorm))


def test_later_tokens_change_nothing_earlier(model):
    tokens = random_tokens(1, 16)
    changed = tokens.clone()
    changed[0, 9:] = random_tokens(1, 7, seed=5)
    with torch.no_grad():
        before, after = model(tokens), model(changed)
    assert torch.equal(before[:, :9], after[:, :9])
    assert (before[:, 9:] - after[:, 9:]).abs().amax(dim=-1).min() > 1e-3


def test_earlier_tokens_and_their_order_reach_the_last_position(model):
    tokens = random_tokens(1, 16)
    with torch.no_grad():
        before = model(tokens)[:, -1]
        swapped = model(tokens[:, [1, 0, *range(2, 16)]])[:, -1]
    assert (before - swapped).abs().max() > 1e-4


def test_segments_are_separate_rows_placed_at_their_own_distance(model):
    # RoPE knows distances only, so a piece inside a row gives the logits of the piece alone.
    first, second, third = random_tokens(2, 5, seed=1), random_tokens(2, 8, seed=2), random_tokens(2, 3, seed=3)
    row = torch.cat((first, second, third), dim=1)
    segments = torch.tensor([1] * 5 + [2] * 8 + [3] * 3).expand(2, -1)
    with torch.no_grad():
        together = model(row, segments=segments).split([5, 8, 3], dim=1)
        unseparated = model(row).split([5, 8, 3], dim=1)
    for part, alone, mixed in zip(together, (first, second, third), unseparated, strict=True):
        with torch.no_grad():
            torch.testing.assert_close(part, model(alone), **CLOSE)
        assert alone is first or (part - mixed).abs().max() > 1e-2


def test_the_loss_is_that_of_the_logits(model):
    tokens, targets = random_tokens(2, 12), random_tokens(2, 12, seed=4)
    targets[0, 3:7] = -100
    with torch.no_grad():
        expected = torch.nn.functional.cross_entropy(model(tokens).flatten(0, 1), targets.flatten(), reduction="sum")
        assert model(tokens, targets).item() == pytest.approx(expected.item(), rel=1e-5)


def test_log_probabilities_are_those_of_the_logits_and_sum_to_the_loss(model):
    row, segments = random_tokens(2, 17), torch.tensor([1] * 6 + [2] * 10).expand(2, -1)
    tokens, targets = row[:, :-1], row[:, 1:].clone()
    targets[0, :9] = -100
    found = model(tokens, targets, segments, log_probs=True)
    expected = model(tokens, segments=segments).log_softmax(-1).gather(2, targets.clamp(min=0)[..., None])[..., 0]
    torch.testing.assert_close(found, expected.where(targets != -100, 0.0), **CLOSE)
    torch.testing.assert_close(-found.sum(), model(tokens, targets, segments), **CLOSE)


def test_repeated_key_heads_attend_as_groups_do():
    """CUDA takes the one where the CPU takes the other: values and gradients are the same."""
    draw = torch.Generator().manual_seed(2)
    heads = [torch.randn(2, count, 9, 16, generator=draw, requires_grad=True) for count in (6, 2, 2)]
    mask = torch.ones(9, 9, dtype=torch.bool).tril()[None, None] & (torch.rand(2, 1, 9, 9, generator=draw) < 0.7)
    mask |= torch.eye(9, dtype=torch.bool)
    grouped, repeated = (attend(*heads, mask, causal=False, repeat=repeat) for repeat in (False, True))
    torch.testing.assert_close(repeated, grouped, **CLOSE)
    counts = torch.randn(grouped.shape, generator=draw)
    for one, other in zip(
        torch.autograd.grad(grouped, heads, counts), torch.autograd.grad(repeated, heads, counts), strict=True
    ):
        torch.testing.assert_close(other, one, **CLOSE)


@pytest.mark.parametrize(("which", "attentions", "ffns"), [("none", 1, 1), ("selective", 1, 2), ("full", 2, 2)])
def test_activation_checkpointing_gives_the_same_gradients(model, which, attentions, ffns):
    tokens, targets = random_tokens(2, 12), random_tokens(2, 12, seed=4)
    model.train()
    model(tokens, targets).backward()
    plain = gradients(model)
    model.zero_grad()
    model.checkpoint_activations(which)
    calls = []
    for part in ("attn", "ffn"):
        getattr(model.layers[1], part).register_forward_pre_hook(lambda *_, part=part: calls.append(part))
    model(tokens, targets).backward()
    assert (calls.count("attn"), calls.count("ffn")) == (attentions, ffns), "computed again in the backward pass"
    for name, gradient in gradients(model).items():
        assert torch.equal(gradient, plain[name]), name


def test_without_a_shared_table_the_output_layer_is_its_own(model):
    config = ModelConfig(**SMALL, max_context_length=32, share_input_output_layers=False)
    untied = OpenELM(config)
    untied.load_state_dict({**model.state_dict(), "classifier.weight": 3 * model.token_embeddings.weight})
    with torch.no_grad():
        torch.testing.assert_close(untied(random_tokens(1, 8)), 3 * model(random_tokens(1, 8)), **CLOSE)


def test_gains_apply_after_the_cast_to_bf16(model):
    norm = model.norm.to(torch.bfloat16)
    x = torch.randn(4, 48, generator=torch.Generator().manual_seed(1)).bfloat16() * 30
    wide = x.float()
    normalised = (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + 1e-6)).bfloat16()
    with torch.no_grad():
        norm.weight.normal_(1, 0.3, generator=torch.Generator().manual_seed(2))
        assert torch.equal(norm(x), normalised * norm.weight)


@pytest.mark.parametrize("shared_table", [True, False])
def test_each_kind_of_tensor_starts_with_its_own_spread(shared_table):
    config = ModelConfig(
        model_dim=256,
        num_transformer_layers=2,
        num_gqa_groups=1,
        vocab_size=400,
        share_input_output_layers=shared_table,
    )
    model = OpenELM(config)
    init_weights(model, seed=0)
    into_residual = 256**-0.5 * 4**-0.5
    seen = set()
    for name, parameter in model.named_parameters():
        kind = name.removesuffix(".weight").rsplit(".", 1)[-1]
        seen.add(kind)
        if parameter.dim() == 1:
            assert torch.equal(parameter, torch.ones_like(parameter)), name
            continue
        expected = into_residual if kind in ("out_proj", "proj_2") else parameter.shape[1] ** -0.5
        # 30,000 draws or more: the spread is known within 0.5 %, the mean within as much of it.
        assert parameter.std().item() == pytest.approx(expected, rel=0.02), name
        assert abs(parameter.mean().item()) < 0.02 * expected, name
    kinds = {"token_embeddings", "attn_norm", "ffn_norm", "q_norm", "k_norm", "norm", "proj_1", "proj_2"}
    assert seen == kinds | {"qkv_proj", "out_proj"} | (set() if shared_table else {"classifier"})


def test_first_weights_depend_on_the_seed_alone():
    def fresh(seed: int, noise: int = 0) -> dict[str, torch.Tensor]:
        torch.randn(noise)  # the global generator is nobody's business
        model = OpenELM(ModelConfig(**SMALL))
        init_weights(model, seed)
        return model.state_dict()

    first, again, other = fresh(1), fresh(1, noise=9), fresh(2)
    matrices = [name for name, tensor in first.items() if tensor.dim() == 2]
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not any(torch.equal(first[name], other[name]) for name in matrices)
    # Two tensors of one shape do not share their numbers either.
    assert not torch.equal(first["layers.0.attn.qkv_proj.weight"], first["layers.1.attn.qkv_proj.weight"])
