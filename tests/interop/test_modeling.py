"""The transformers model: the numbers of ours, whatever transformers does around it.

Nothing here needs more than torch and transformers: `make test-transformers-4` runs this file with transformers 4.57.
"""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from openelm.model.folder import load_model, save_model
from openelm.model.geometry import ModelConfig
from openelm.model.transformer import OpenELM, init_weights

transformers = pytest.importorskip("transformers")
from openelm.interop.modeling_openelm import OpenELMConfig, OpenELMForCausalLM, OpenELMModel  # noqa: E402

# fp32 with sums in another order: logits of up to 8 differ in the sixth digit.
CLOSE = dict(rtol=1e-4, atol=5e-5)
# bf16 keeps 8 bits, which costs 0.25 at worst against fp32, in any engine; eager attention rounds in other places than
# ours. With sdpa the operations are ours, one by one.
BF16 = dict(rtol=0, atol=0.25)
TRANSFORMERS_5 = int(transformers.__version__.partition(".")[0]) >= 5
KINDS = ["sdpa", "eager"]
DTYPES = {"float32": (torch.float32, CLOSE), "bfloat16": (torch.bfloat16, BF16)}
TINY = dict(
    model_dim=64, num_transformer_layers=3, head_dim=16, num_gqa_groups=2, ffn_dim_divisor=16, vocab_size=96,
    max_context_length=64,
)  # fmt: skip


def make(**changes: object) -> OpenELM:
    """Three layers, all of other widths; the first has one key/value head."""
    model = OpenELM(ModelConfig(**{**TINY, **changes}))  # type: ignore[arg-type]
    init_weights(model, seed=1)
    with torch.no_grad():
        for parameter in model.parameters():
            # Fresh weights are all but indifferent; larger ones make a wrong position or mask show.
            parameter.mul_(2) if parameter.dim() == 2 else parameter.add_(torch.linspace(-0.2, 0.2, len(parameter)))
    return model.eval()


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return save_model(make(), tmp_path_factory.mktemp("tied") / "model")


@pytest.fixture(scope="module")
def untied(tmp_path_factory) -> Path:
    return save_model(make(share_input_output_layers=False), tmp_path_factory.mktemp("untied") / "model")


@pytest.fixture(scope="module")
def ours(folder) -> OpenELM:
    return load_model(folder)


def load(folder: Path, **options: object) -> OpenELMForCausalLM:
    return OpenELMForCausalLM.from_pretrained(folder, **options).eval()


@pytest.fixture
def theirs(folder) -> OpenELMForCausalLM:
    return load(folder)


def random_ids(rows: int, length: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(3, TINY["vocab_size"], (rows, length), generator=torch.Generator().manual_seed(seed))


def padded(rows: list[torch.Tensor], side: str) -> tuple[torch.Tensor, torch.Tensor]:
    """One batch of rows of different lengths, filled up with zeros on one side, and its boolean mask."""
    width = max(map(len, rows))
    ids, mask = torch.zeros(len(rows), width, dtype=torch.int64), torch.zeros(len(rows), width, dtype=torch.bool)
    for row, tokens in enumerate(rows):
        place = slice(width - len(tokens), None) if side == "left" else slice(len(tokens))
        ids[row, place], mask[row, place] = tokens, True
    return ids, mask


# The configuration


def published(name: str, golden) -> dict:
    """config.json as it stands in the published folder of that size."""
    sizes = {
        "OpenELM-270M": (1280, 16, 64, 256),
        "OpenELM-450M": (1536, 20, 64, 256),
        "OpenELM-1_1B": (2048, 28, 64, 256),
        "OpenELM-3B": (3072, 36, 128, 256),
    }
    figures = golden("geometry")[name]
    model_dim, layers, head_dim, divisor = sizes[name]
    return {
        "activation_fn_name": "swish",
        "architectures": ["OpenELMForCausalLM"],
        "auto_map": {
            "AutoConfig": "configuration_openelm.OpenELMConfig",
            "AutoModelForCausalLM": "modeling_openelm.OpenELMForCausalLM",
        },
        "bos_token_id": 1,
        "eos_token_id": 2,
        "ffn_dim_divisor": divisor,
        "ffn_multipliers": figures["ffn_multipliers"],
        "ffn_with_glu": True,
        "head_dim": head_dim,
        "initializer_range": 0.02,
        "max_context_length": 2048,
        "model_dim": model_dim,
        "model_type": "openelm",
        "normalization_layer_name": "rms_norm",
        "normalize_qk_projections": True,
        "num_gqa_groups": 4,
        "num_kv_heads": figures["num_kv_heads"],
        "num_query_heads": figures["num_query_heads"],
        "num_transformer_layers": layers,
        "qkv_multipliers": [0.5, 1.0],
        "rope_freq_constant": 10000,
        "rope_max_length": 4096,
        "share_input_output_layers": True,
        "torch_dtype": "float32",
        "transformers_version": "4.39.3",
        "use_cache": True,
        "vocab_size": 32000,
    }


@pytest.mark.parametrize("name", ["OpenELM-270M", "OpenELM-450M", "OpenELM-1_1B", "OpenELM-3B"])
def test_the_published_form_of_config_json_opens_unchanged(tmp_path, golden, name):
    (tmp_path / "config.json").write_text(json.dumps(published(name, golden)))
    figures = golden("geometry")[name]
    config = OpenELMConfig.from_pretrained(tmp_path)
    assert config.ffn_dims == figures["ffn_dims"]
    assert (config.hidden_size, config.num_hidden_layers) == (figures["model_dim"], figures["num_layers"])
    assert config.dtype in (torch.float32, "float32")
    with torch.device("meta"):
        model = OpenELMForCausalLM(config)
    assert sum(p.numel() for p in model.transformer.parameters()) == figures["parameters_vocab_32000"]
    # Apple's pair of multipliers gives the same heads as the lists that stand beside it.
    bare = {k: v for k, v in published(name, golden).items() if k not in ("num_query_heads", "num_kv_heads")}
    assert OpenELMConfig(**bare).num_kv_heads == config.num_kv_heads == figures["num_kv_heads"]
    assert OpenELMConfig(**bare).num_query_heads == config.num_query_heads == figures["num_query_heads"]


def test_the_default_configuration_is_the_270m(golden):
    figures = golden("geometry")["OpenELM-270M"]
    config = OpenELMConfig()
    assert (config.num_query_heads, config.ffn_dims) == (figures["num_query_heads"], figures["ffn_dims"])


@pytest.mark.parametrize(
    "multiplier", [1.5, [1.5], [0.5, 4.0], (0.25, 3.9), [0.5, 4.0, 1.25, 2.0, 3.3], [1.37, 1.37, 1.37, 1.37, 1.37]]
)
@pytest.mark.parametrize("layers", [1, 5])
def test_the_geometry_is_that_of_our_model(layers, multiplier):
    if isinstance(multiplier, list) and len(multiplier) == 5 != layers:
        pytest.skip("five multipliers are for five layers")
    given = {**TINY, "num_transformer_layers": layers, "qkv_multipliers": multiplier, "ffn_multipliers": multiplier}
    theirs = OpenELMConfig(**given)
    ours = ModelConfig(**{**given, "qkv_multipliers": _tuple(multiplier), "ffn_multipliers": _tuple(multiplier)})
    assert theirs.num_query_heads == list(ours.num_query_heads)
    assert theirs.num_kv_heads == list(ours.num_kv_heads)
    assert theirs.ffn_dims == list(ours.ffn_dims)


def _tuple(multiplier: object) -> object:
    return tuple(multiplier) if isinstance(multiplier, list) else multiplier


def test_standard_names_lead_to_ours(folder):
    config = OpenELMConfig.from_pretrained(folder)
    assert (config.hidden_size, config.num_hidden_layers, config.max_position_embeddings) == (64, 3, 64)
    assert (config.rope_theta, config.hidden_act, config.tie_word_embeddings) == (10000, "swish", True)
    # One number each, for tools that plan with one: the widest layer's.
    assert config.num_query_heads == [2, 4, 4]
    assert (config.num_attention_heads, config.num_key_value_heads) == (4, 2)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (dict(activation_fn_name="gelu"), "activation_fn_name='gelu' is not built"),
        (dict(ffn_with_glu=False), "ffn_with_glu=False is not built"),
        (dict(normalization_layer_name="batch_norm"), "'batch_norm' is not built: .* 'rms_norm' or 'layer_norm'"),
        (dict(num_query_heads=[2, 4]), "num_query_heads has 2 values for 3 layers"),
        (dict(num_query_heads=[2, 4, 4], num_kv_heads=[1, 3, 2]), "layer 1: 4 query heads cannot share 3"),
        (dict(ffn_multipliers=[1.0, 2.0, 3.0, 4.0]), "4 multipliers for 3 layers"),
    ],
)
def test_a_configuration_that_is_none_is_refused(changes, words):
    with pytest.raises(ValueError, match=words):
        OpenELMConfig(**{**TINY, **changes})


@pytest.mark.parametrize("words", [(True, True), (True, False), (False, True), (False, False)])
def test_the_embedding_is_shared_where_both_words_say_so(words):
    shared, tied = words
    config = OpenELMConfig(**TINY, share_input_output_layers=shared, tie_word_embeddings=tied)
    assert config.tie_word_embeddings == config.share_input_output_layers == (shared and tied)
    assert OpenELMConfig(**TINY, share_input_output_layers=shared).tie_word_embeddings == shared


# The numbers


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("which", ["folder", "untied"])
def test_logits_are_ours(request, which, dtype, kind):
    path, (dtype, bound) = request.getfixturevalue(which), DTYPES[dtype]
    ids = random_ids(3, 40)
    with torch.no_grad():
        expected = load_model(path, dtype=dtype)(ids)
        logits = load(path, dtype=dtype, attn_implementation=kind)(ids).logits
    assert logits.dtype == dtype
    torch.testing.assert_close(logits, expected, **bound)
    if dtype == torch.bfloat16:
        assert (logits - expected).abs().mean() < (0.04 if kind == "eager" else 0.004)


def test_logits_are_corenets(tmp_path, golden, golden_weights, golden_tiny):
    figures = golden("tiny")
    model = OpenELM(ModelConfig(**figures["config"]))
    model.load_state_dict(golden_weights(model, figures["seed"]))
    with torch.no_grad():
        logits = load(save_model(model, tmp_path / "model"))(golden_tiny["tokens"][None, :-1]).logits[0]
    torch.testing.assert_close(logits, golden_tiny["logits"], rtol=0, atol=2e-5)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "changes",
    [dict(normalize_qk_projections=False), dict(normalization_layer_name="layer_norm")],
    ids=["no query and key norms", "LayerNorm"],
)
def test_other_norms_are_computed_as_ours_are(tmp_path, changes, dtype):
    dtype, bound = DTYPES[dtype]
    model = make(**changes).to(dtype)
    ids = random_ids(2, 20)
    with torch.no_grad():
        theirs = load(save_model(model, tmp_path / "model"), dtype=dtype)
        torch.testing.assert_close(theirs(ids).logits, model(ids), **bound)
        short = {"max_new_tokens": 12, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
        cached, uncached = (theirs.generate(ids, use_cache=used, **short) for used in (True, False))
        assert dtype == torch.bfloat16 or torch.equal(cached, uncached)


@pytest.mark.parametrize("kind", KINDS)
def test_loss_and_gradients_are_ours(folder, kind):
    theirs, ours = load(folder, attn_implementation=kind).train(), load_model(folder).requires_grad_()
    ids = random_ids(2, 30)
    labels = ids.clone()
    labels[0, :7] = -100
    loss = theirs(ids, labels=labels).loss
    expected = ours(ids[:, :-1], labels[:, 1:]) / (labels[:, 1:] != -100).sum()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    loss.backward()
    expected.backward()
    gradients = {name.removeprefix("transformer."): p.grad for name, p in theirs.named_parameters()}
    assert gradients.keys() == dict(ours.named_parameters()).keys()  # the shared embedding counts once
    for name, parameter in ours.named_parameters():
        torch.testing.assert_close(gradients[name], parameter.grad, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("reentrant", [True, False])
def test_gradient_checkpointing_changes_no_gradient(folder, reentrant):
    found = []
    for checkpointing in (False, True):
        model = load(folder).train()
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": reentrant})
            model.enable_input_require_grads()
        output = model(random_ids(2, 12), labels=random_ids(2, 12))
        assert (output.past_key_values is None) == checkpointing  # layers computed twice would fill it twice
        output.loss.backward()
        found.append({name: p.grad for name, p in model.named_parameters()})
    assert all(torch.equal(found[0][name], found[1][name]) for name in found[0])


def test_autocast_trains(theirs):
    with torch.autocast("cpu", torch.bfloat16):
        loss = theirs.train()(random_ids(2, 12), labels=random_ids(2, 12)).loss
    loss.backward()
    assert all(p.grad.isfinite().all() for p in theirs.parameters())


# Padding


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("side", ["left", "right"])
def test_a_padded_batch_is_its_rows_one_by_one(folder, side, dtype, kind):
    dtype, bound = DTYPES[dtype]
    model = load(folder, dtype=dtype, attn_implementation=kind)
    rows = [random_ids(1, length, seed=length)[0] for length in (17, 1, 9)]
    rows.append(rows[0][:0])  # nothing but padding
    ids, mask = padded(rows, side)
    with torch.no_grad():
        logits = model(ids, attention_mask=mask).logits
        assert logits.isfinite().all()
        assert torch.equal(logits, model(ids, attention_mask=mask.long()).logits)
        for row, tokens in enumerate(rows[:-1]):
            torch.testing.assert_close(logits[row, mask[row]], model(tokens[None]).logits[0], **bound)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_padding_leaves_gradients_finite_and_as_they_are_without(folder, dtype, kind):
    dtype, _ = DTYPES[dtype]
    rows = [random_ids(1, 9)[0], random_ids(1, 4, seed=1)[0], random_ids(1, 4)[0][:0]]
    found = {}
    for side in ("left", "right"):
        model = load(folder, dtype=dtype, attn_implementation=kind).train()
        ids, mask = padded(rows, side)
        log_probabilities = model(ids, attention_mask=mask).logits.float().log_softmax(-1)[mask]
        log_probabilities[:, 5].sum().backward()
        found[side] = {name: p.grad.float() for name, p in model.named_parameters()}
        assert all(gradient.isfinite().all() for gradient in found[side].values())
    for name, gradient in found["left"].items():
        difference = (gradient - found["right"][name]).norm() / gradient.norm()
        assert difference < (1e-5 if dtype == torch.float32 else 0.05), name


@pytest.mark.parametrize("kind", KINDS)
def test_a_ready_made_mask_is_taken_as_it_is(folder, kind):
    model = load(folder, attn_implementation=kind)
    ids, mask = padded([random_ids(1, 12)[0], random_ids(1, 5)[0]], "left")
    square = torch.ones(12, 12, dtype=torch.bool).tril()
    ready = mask[:, None, None, :] & square
    with torch.no_grad():
        expected = model(ids, attention_mask=mask).logits[mask]
        # Positions differ here, which RoPE does not see.
        torch.testing.assert_close(model(ids, attention_mask=ready).logits[mask], expected, **CLOSE)


def test_positions_that_begin_anew_keep_packed_texts_apart(ours, theirs):
    ids = random_ids(1, 12)
    positions = torch.tensor([[0, 1, 2, 3, 4, 0, 1, 0, 1, 2, 3, 4]])
    with torch.no_grad():
        logits = theirs(ids, position_ids=positions, use_cache=False).logits
        expected = ours(ids, segments=torch.tensor([[0] * 5 + [1] * 2 + [2] * 5]))
    torch.testing.assert_close(logits, expected, **CLOSE)


@pytest.mark.slow  # the compiler of flex_attention takes a minute on a CPU
def test_flex_attention_gives_the_same(folder, theirs):
    ids, mask = padded([random_ids(1, 17)[0], random_ids(1, 9, seed=1)[0]], "left")
    with torch.no_grad():
        logits = load(folder, attn_implementation="flex_attention")(ids, attention_mask=mask).logits
        torch.testing.assert_close(logits[mask], theirs(ids, attention_mask=mask).logits[mask], **CLOSE)


# What transformers offers


def test_attention_weights_and_states_of_each_layer(folder, theirs):
    eager, ids = load(folder, attn_implementation="eager"), random_ids(2, 10)
    with torch.no_grad():
        output = eager(ids, output_attentions=True, output_hidden_states=True)
        model = load(folder, attn_implementation="eager").transformer
        block = model.layers[0]
        first = model.token_embeddings(ids)
    assert [tuple(weights.shape) for weights in output.attentions] == [(2, heads, 10, 10) for heads in (2, 4, 4)]
    for weights in output.attentions:
        torch.testing.assert_close(weights.sum(-1), torch.ones(weights.shape[:3]), **CLOSE)
        assert weights.triu(1).abs().max() == 0
    assert len(output.hidden_states) == 4
    assert torch.equal(output.hidden_states[0], first)
    with torch.no_grad():
        attended = output.attentions[0] @ _values(block, first).repeat_interleave(2, dim=1)
        second = first + block.attn.out_proj(attended.transpose(1, 2).flatten(2))
        second = second + block.ffn(block.ffn_norm(second))
        torch.testing.assert_close(output.hidden_states[1], second, **CLOSE)
        assert torch.equal(eager.lm_head(output.hidden_states[-1]), output.logits)
    with pytest.raises(ValueError, match="attn_implementation='eager'"):
        theirs(ids, output_attentions=True)
    theirs.set_attn_implementation("eager")
    with torch.no_grad():
        assert torch.equal(theirs(ids, output_attentions=True).attentions[1], output.attentions[1])


def _values(block, x_BTD: torch.Tensor) -> torch.Tensor:
    projected = block.attn.qkv_proj(block.attn_norm(x_BTD)).unflatten(-1, (-1, 16))
    return projected[:, :, -block.attn.kv_heads :].transpose(1, 2)


def test_logits_to_keep_embeddings_and_positions(theirs):
    ids = random_ids(2, 10)
    with torch.no_grad():
        logits = theirs(ids).logits
        torch.testing.assert_close(theirs(ids, logits_to_keep=3).logits, logits[:, -3:], **CLOSE)
        chosen = torch.tensor([2, 7])
        torch.testing.assert_close(theirs(ids, logits_to_keep=chosen).logits, logits[:, chosen], **CLOSE)
        embedded = theirs.get_input_embeddings()(ids)
        assert torch.equal(theirs(inputs_embeds=embedded).logits, logits)
        positions = torch.arange(10)[None]
        assert torch.equal(theirs(ids, position_ids=positions, use_cache=False).logits, logits)
        # Attention sees distances: moved as a whole, positions change nothing; stretched, they do.
        torch.testing.assert_close(theirs(ids, position_ids=positions + 9).logits, logits, **CLOSE)
        assert (theirs(ids, position_ids=positions * 2).logits - logits).abs().max() > 0.01
        as_tuple = theirs(ids, return_dict=False, use_cache=False)
    assert len(as_tuple) == 1 and torch.equal(as_tuple[0], logits)
    for given in ({}, {"input_ids": ids, "inputs_embeds": embedded}):
        with pytest.raises(ValueError, match="either input_ids or inputs_embeds"):
            theirs(**given)


def test_without_the_output_layer(folder, theirs):
    ids = random_ids(2, 10)
    with torch.no_grad():
        hidden = OpenELMModel.from_pretrained(folder).eval()(ids).last_hidden_state
        torch.testing.assert_close(theirs.lm_head(hidden), theirs(ids).logits, **CLOSE)


def test_the_forward_pass_is_one_graph(theirs):
    ids = random_ids(2, 10)
    compiled = torch.compile(theirs, fullgraph=True, backend="eager")  # raises where the graph breaks
    with torch.no_grad():
        logits = compiled(ids, use_cache=False).logits
        torch.testing.assert_close(logits, theirs(ids).logits, **CLOSE)


def caches(config: OpenELMConfig) -> list:
    """Both kinds, fresh."""
    from transformers.cache_utils import DynamicCache, StaticCache

    return [DynamicCache(config=config), StaticCache(config=config, max_cache_len=48)]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("which", [0, 1], ids=["dynamic", "static"])
def test_cached_logits_are_the_uncached_ones(folder, kind, which):
    model = load(folder, attn_implementation=kind)
    cache = caches(model.config)[which]
    ids, mask = padded([random_ids(1, 24)[0], random_ids(1, 20, seed=1)[0]], "left")
    with torch.no_grad():
        whole = model(ids, attention_mask=mask, use_cache=False).logits
        done = 0
        for step in (8, 5, 1, 1, 9):
            span = slice(done, done := done + step)
            positions = {"cache_position": torch.arange(24)[span]} if not TRANSFORMERS_5 else {}
            logits = model(ids[:, span], attention_mask=mask[:, :done], past_key_values=cache, **positions).logits
            torch.testing.assert_close(logits[mask[:, span]], whole[:, span][mask[:, span]], **CLOSE)
    assert [layer.keys.shape[1] for layer in cache.layers] == model.config.num_kv_heads == [1, 2, 2]


@pytest.mark.parametrize("kind", KINDS)
def test_generate_writes_the_same_with_any_cache(folder, kind):
    model = load(folder, attn_implementation=kind)
    ids, mask = padded([random_ids(1, 9)[0], random_ids(1, 4, seed=1)[0]], "left")
    common = dict(attention_mask=mask, max_new_tokens=12, do_sample=False, pad_token_id=0, eos_token_id=None)
    plain = model.generate(ids, use_cache=False, **common)
    assert len(set(plain[0, 9:].tolist())) > 3, "a text of one token would be no test"
    assert torch.equal(model.generate(ids, **common), plain)
    assert torch.equal(model.generate(ids, cache_implementation="static", **common), plain)
    # Before it had this, transformers read padded prompts in pieces wrongly, whatever the model: LLaMA too.
    if hasattr(transformers.GenerationMixin, "_get_static_cache_init_shape"):
        chunked = model.generate(ids, cache_implementation="static", prefill_chunk_size=4, **common)
        assert torch.equal(chunked, plain)
    alone = model.generate(ids[1:, 5:], **{**common, "attention_mask": mask[1:, 5:]})
    assert torch.equal(alone[0, 4:], plain[1, 9:])
    beams = model.generate(ids, num_beams=3, **common)
    assert torch.equal(beams, model.generate(ids, num_beams=3, use_cache=False, **common))
    assert not torch.equal(beams, plain)


def test_generate_goes_on_from_a_cache_and_from_embeddings(theirs):
    ids = random_ids(1, 8)
    common = dict(max_new_tokens=6, do_sample=False, pad_token_id=0, eos_token_id=None)
    first = theirs.generate(ids, return_dict_in_generate=True, **common)
    longer = torch.cat([first.sequences, random_ids(1, 3, seed=5)], dim=1)
    assert torch.equal(
        theirs.generate(longer, past_key_values=first.past_key_values, **common), theirs.generate(longer, **common)
    )
    embedded = theirs.get_input_embeddings()(ids)
    assert torch.equal(theirs.generate(inputs_embeds=embedded, **common), first.sequences[:, 8:])


# What is kept and what is written


def test_nothing_is_computed_when_the_model_is_made(folder):
    with torch.device("meta"):
        model = OpenELMForCausalLM(OpenELMConfig.from_pretrained(folder))
    assert not list(model.buffers())
    assert {tensor.device.type for tensor in model.state_dict().values()} == {"meta"}


def test_the_dtype_is_that_of_the_folder(tmp_path):
    save_model(make(), tmp_path / "model", dtype=torch.bfloat16)
    assert load(tmp_path / "model", dtype="auto").dtype == torch.bfloat16


@pytest.mark.parametrize("which", ["folder", "untied"])
def test_what_transformers_saves_opens_in_ours(request, tmp_path, which):
    path = request.getfixturevalue(which)
    load(path).save_pretrained(tmp_path / "saved")
    stored, expected = load_file(tmp_path / "saved" / "model.safetensors"), load_file(path / "model.safetensors")
    assert stored.keys() == expected.keys()  # with a shared embedding, one tensor
    assert all(torch.equal(stored[name], expected[name]) for name in expected)
    assert load_model(tmp_path / "saved").config == load_model(path).config
    assert ("lm_head.weight" in stored) == (which == "untied")
    # It carries its code, so that it opens wherever it is taken.
    config = json.loads((tmp_path / "saved" / "config.json").read_text())
    assert config["auto_map"]["AutoModelForCausalLM"] == "modeling_openelm.OpenELMForCausalLM"
    assert config["auto_map"]["AutoConfig"] == "modeling_openelm.OpenELMConfig"
    assert (tmp_path / "saved" / "modeling_openelm.py").is_file()


def test_a_shared_embedding_is_one_tensor_in_memory(folder, untied):
    tied, apart = load(folder), load(untied)
    assert tied.lm_head.weight is tied.transformer.token_embeddings.weight
    assert apart.lm_head.weight is not apart.transformer.token_embeddings.weight


def test_a_model_that_is_untied_says_so_in_both_words(tmp_path, folder, theirs):
    model = load(folder, tie_word_embeddings=False)
    assert model.lm_head.weight is not model.transformer.token_embeddings.weight
    with torch.no_grad():
        model.lm_head.weight.copy_(model.transformer.token_embeddings.weight * 2)
    model.save_pretrained(tmp_path / "saved")
    reopened = load_model(tmp_path / "saved")
    assert not reopened.config.share_input_output_layers
    ids = random_ids(1, 8)
    with torch.no_grad():
        torch.testing.assert_close(reopened(ids), 2 * theirs(ids).logits, **CLOSE)


@pytest.mark.parametrize("which", ["folder", "untied"])
def test_a_larger_vocabulary_keeps_what_was_there(request, tmp_path, which):
    path = request.getfixturevalue(which)
    model, ids = load(path), random_ids(1, 8)
    with torch.no_grad():
        before = model(ids).logits
        model.resize_token_embeddings(128, mean_resizing=False)
        after = model(ids).logits
    assert after.shape[-1] == model.config.vocab_size == 128
    torch.testing.assert_close(after[..., : TINY["vocab_size"]], before, **CLOSE)
    assert (model.lm_head.weight is model.get_input_embeddings().weight) == (which == "folder")
    model.save_pretrained(tmp_path / "saved")
    with torch.no_grad():
        torch.testing.assert_close(load_model(tmp_path / "saved")(ids), after, **CLOSE)


def test_layers_may_stand_on_different_devices(tmp_path, folder, theirs):
    pytest.importorskip("accelerate")
    places = {f"transformer.layers.{layer}": "disk" if layer == 1 else "cpu" for layer in range(3)}
    places |= {"transformer.token_embeddings": "cpu", "transformer.norm": "cpu", "lm_head": "cpu"}
    model = load(folder, device_map=places, offload_folder=tmp_path)
    assert model.transformer.layers[1].ffn.proj_1.weight.device.type == "meta"
    ids = random_ids(2, 8)
    with torch.no_grad():
        assert torch.equal(model(ids).logits, theirs(ids).logits)
