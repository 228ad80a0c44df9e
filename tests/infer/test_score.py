"""Every token is scored exactly once, and bits per byte are what one works out by hand."""

import math

import pytest
import torch

from openelm.data.tokenizer import train_tokenizer
from openelm.errors import UserError
from openelm.infer.score import Score, perplexity, score_text, windows
from openelm.model.geometry import ModelConfig
from openelm.model.transformer import OpenELM, init_weights

CONTEXT = 16
# fp32 sums of some hundred terms, each right to 1e-6.
CLOSE = dict(rel=1e-5)


@pytest.fixture(scope="module")
def model() -> OpenELM:
    model = OpenELM(
        ModelConfig(
            model_dim=64,
            num_transformer_layers=2,
            head_dim=16,
            num_gqa_groups=2,
            ffn_dim_divisor=16,
            vocab_size=320,
            max_context_length=CONTEXT,
        )
    )
    init_weights(model, seed=3)
    return model.eval()


def random_ids(count):
    return torch.randint(0, 320, (count,), generator=torch.Generator().manual_seed(1)).tolist()


def nats_by_hand(model, context, target):
    with torch.no_grad():
        return -model(torch.tensor([context]))[0, -1].double().log_softmax(dim=-1)[target].item()


def test_a_short_text_scores_what_its_tokens_cost_one_by_one(model):
    ids = random_ids(12)
    score = perplexity(model, ids, num_bytes=30)
    nats = sum(nats_by_hand(model, ids[:t], ids[t]) for t in range(1, 12))
    assert score.nats == pytest.approx(nats, **CLOSE)
    assert (score.tokens, score.bytes) == (11, 30)
    assert score.bits_per_byte == pytest.approx(nats / math.log(2) / 30, **CLOSE)
    assert score.perplexity == pytest.approx(math.exp(nats / 11), **CLOSE)


@pytest.mark.parametrize("stride", [1, 5, 8, 16])
def test_a_long_text_gives_each_token_the_context_of_its_window(model, stride):
    ids = random_ids(59)
    nats = 0.0
    for t in range(1, 59):
        # The first window, at a multiple of the stride, that reaches the token.
        start = max(0, math.ceil((t - CONTEXT) / stride)) * stride
        nats += nats_by_hand(model, ids[start:t], ids[t])
    score = perplexity(model, ids, 100, stride=stride)
    assert score.nats == pytest.approx(nats, **CLOSE)
    assert score.tokens == 58


def test_the_default_stride_is_half_the_context(model):
    ids = random_ids(59)
    assert perplexity(model, ids, 1) == perplexity(model, ids, 1, stride=CONTEXT // 2)
    assert perplexity(model, ids, 1) != perplexity(model, ids, 1, stride=CONTEXT)


@pytest.mark.parametrize("batch_size", [2, 3, 100])
def test_windows_computed_together_score_the_same(model, batch_size):
    ids = random_ids(59)  # the last window is shorter than the others
    assert perplexity(model, ids, 1, batch_size=batch_size).nats == pytest.approx(
        perplexity(model, ids, 1).nats, **CLOSE
    )


@pytest.mark.parametrize("length, stride", [(16, 8), (16, 1), (16, 16), (7, 3), (1, 1)])
def test_windows_tile_the_text_for_every_length(length, stride):
    for targets in range(1, 80):
        spans = list(windows(targets, length, stride))
        scored = [t for _, first, end in spans for t in range(first, end)]
        assert scored == list(range(targets))
        for start, first, end in spans:
            assert start <= first < end <= start + length
            assert first - start >= min(first, length - stride)  # context of the first token scored


def test_text_is_scored_with_bos_as_context_and_its_utf8_bytes(model, tmp_path):
    text = "naïve — text\n" * 2
    tokenizer = train_tokenizer(["some text, naïve\n" * 3] * 20, tmp_path / "tokenizer.model", 290, threads=1)
    ids = [tokenizer.bos_id, *tokenizer.encode(text)]
    score = score_text(model, tokenizer, text)
    assert score == perplexity(model, ids, len(text.encode()))
    assert (score.tokens, score.bytes) == (len(ids) - 1, 32)


def test_a_model_that_knows_nothing_pays_the_logarithm_of_its_vocabulary(model):
    blank = OpenELM(model.config)
    for parameter in blank.parameters():
        torch.nn.init.zeros_(parameter)
    score = perplexity(blank, random_ids(40), 39)
    assert score.perplexity == pytest.approx(320, **CLOSE)
    assert score.bits_per_byte == pytest.approx(math.log2(320), **CLOSE)


def test_scores_add_up():
    total = Score(10.0, 4, 20) + Score(20.0, 6, 40)
    assert total == Score(30.0, 10, 60)
    assert total.perplexity == pytest.approx(math.exp(3))
    assert total.bits_per_byte == pytest.approx(0.5 / math.log(2))


@pytest.mark.parametrize(
    "arguments, message",
    [
        (dict(ids=[1], num_bytes=1), "no text"),
        (dict(ids=[1, 2], num_bytes=1, stride=0), "stride=0"),
        (dict(ids=[1, 2], num_bytes=1, stride=17), "context of 16"),
        (dict(ids=[1, 320], num_bytes=1), "token id 320"),
        (dict(ids=[1, 2], num_bytes=1, batch_size=0), "batch_size=0"),
    ],
)
def test_bad_arguments_are_refused(model, arguments, message):
    with pytest.raises(UserError, match=message):
        perplexity(model, **arguments)


def test_a_loss_that_is_not_finite_is_said(model):
    broken = OpenELM(model.config)
    broken.load_state_dict(model.state_dict())
    with torch.no_grad():
        broken.norm.weight[0] = math.inf
    with pytest.raises(UserError, match="not finite"):
        perplexity(broken, random_ids(5), 4)
