"""Caching, batching, padding and streaming change nothing about what is written."""

import math

import pytest
import torch

from openelm.data.tokenizer import StreamDecoder, Tokenizer, train_tokenizer
from openelm.errors import UserError
from openelm.infer import engine as engine_module
from openelm.infer import texts as texts_module
from openelm.infer.engine import Engine, native_dtype
from openelm.infer.sampling import Sampling
from openelm.infer.torch_decoder import TorchSlots
from openelm.infer.writing import StopFilter
from openelm.model.folder import find_model_folder, save_model
from openelm.model.geometry import ModelConfig
from openelm.model.transformer import OpenELM
from small_models import SCALED, make_varied

# fp32 with sums in another order: logits of a few units differ in the sixth digit.
CLOSE = dict(rtol=1e-4, atol=1e-5)
CONTEXT = SCALED["max_context_length"]
TEXT = "def add(first, second):\n    return first + second  # naïve — 100 % tested\n\nclass Sum:\n    total = 0\n"


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory) -> Tokenizer:
    return train_tokenizer([TEXT] * 20, tmp_path_factory.mktemp("tokenizer") / "tokenizer.model", 320, threads=1)


@pytest.fixture(scope="module")
def model() -> OpenELM:
    # The embedding is wider than the vocabulary, as in the paper's training.
    return make_varied(vocab_size=352)


@pytest.fixture(scope="module")
def engine(model, tokenizer) -> Engine:
    return Engine(model, tokenizer)


def uncached_greedy(model, prompt, count, vocabulary):
    """The plain way: all tokens again for every new one."""
    ids = list(prompt)
    with torch.no_grad():
        for _ in range(count):
            ids.append(model(torch.tensor([ids]))[0, -1, :vocabulary].argmax().item())
    return ids[len(prompt) :]


def random_ids(count, seed=0):
    return torch.randint(3, 320, (count,), generator=torch.Generator().manual_seed(seed)).tolist()


def test_greedy_generation_is_the_uncached_one(engine, model, tokenizer):
    prompt = [tokenizer.bos_id, *random_ids(9)]
    expected = uncached_greedy(model, prompt, 20, tokenizer.vocab_size)
    assert len(set(expected)) > 5  # a text that repeats itself would prove little
    stream = engine.stream(prompt[1:], 20)
    text = "".join(stream)
    cut = expected[: expected.index(tokenizer.eos_id) + 1] if tokenizer.eos_id in expected else expected
    assert stream.ids == cut
    assert text == tokenizer.decode([*prompt, *cut])[len(tokenizer.decode(prompt)) :]


@pytest.mark.parametrize(
    "sampling",
    [
        Sampling(),
        Sampling(repetition_penalty=1.3),
        Sampling(temperature=1.0, top_k=50, top_p=0.95, repetition_penalty=1.2, seed=5),
    ],
)
def test_a_batch_gives_what_each_prompt_gives_alone(engine, sampling):
    prompts = [random_ids(count, seed=count) for count in (3, 17, 1, 9)]
    together = engine.generate(prompts, 24, sampling)
    for prompt, completion in zip(prompts, together, strict=True):
        stream = engine.stream(prompt, 24, sampling)
        assert completion.text == "".join(stream)
        assert (completion.ids, completion.finish_reason) == (stream.ids, stream.finish_reason)


def test_the_penalty_sees_a_row_s_own_tokens_and_not_its_padding(engine, tokenizer, monkeypatch):
    seen = []

    def choose(logits_BV, *_, seen_BV, **__):
        seen.append([row.nonzero().flatten().tolist() for row in seen_BV])
        return torch.tensor([50, 60])

    monkeypatch.setattr(texts_module, "next_tokens", choose)
    engine.generate([[5, 9, 7, 9], [8]], 2, Sampling(repetition_penalty=1.5), add_bos=False)
    assert seen == [[[5, 7, 9], [8]], [[5, 7, 9, 50], [8, 60]]]


def test_seeds_of_a_batch_are_its_rows_own(engine):
    sampling, prompt = Sampling(temperature=1.0), random_ids(5)
    together = engine.generate([prompt] * 3, 16, sampling, seeds=[4, 5, 4])
    alone = engine.generate([prompt], 16, sampling, seeds=[5])
    assert together[0].ids == together[2].ids != together[1].ids
    assert together[1] == alone[0]
    assert engine.generate([prompt] * 2, 16, sampling)[0].ids == engine.generate([prompt] * 2, 16, sampling)[1].ids
    with pytest.raises(UserError, match="2 seeds for 1 prompts"):
        engine.generate([prompt], seeds=[1, 2])


def test_rows_that_only_fill_up_the_embedding_are_never_chosen(engine, model, tokenizer):
    with torch.no_grad():
        kept = model.token_embeddings.weight.clone()
        model.token_embeddings.weight[320:] *= 50
    try:
        completion = engine.generate([random_ids(4)], 20, Sampling(temperature=5.0))[0]
    finally:
        with torch.no_grad():
            model.token_embeddings.weight.copy_(kept)
    assert max(completion.ids) < tokenizer.vocab_size == 320


class Script:
    """Stands for a model's choices: makes ``next_tokens`` give these ids, row by row, one a step."""

    def __init__(self, monkeypatch, *rows):
        self.rows, self.step = rows, 0
        monkeypatch.setattr(texts_module, "next_tokens", self)

    def __call__(self, logits_BV, *_, **__):
        self.step += 1
        return torch.tensor([row[self.step - 1] for row in self.rows if self.step <= len(row)])


def test_a_stop_string_across_tokens_ends_the_text_and_is_not_given_out(engine, tokenizer, monkeypatch):
    ids = tokenizer.encode("total = 0\n\nclass Sum")
    assert len(tokenizer.encode("\n\nclass")) > 2
    script = Script(monkeypatch, ids)
    stream = engine.stream(tokenizer.encode("x"), 50, stop=["\n\nclass", "never"])
    pieces = list(stream)
    assert "".join(pieces) == tokenizer.decode([*tokenizer.encode("x"), *ids])[1:].split("\n\nclass")[0]
    assert stream.finish_reason == "stop"
    assert script.step < len(ids)  # nothing is computed after it


def test_what_only_began_like_a_stop_string_is_given_out(engine, tokenizer, monkeypatch):
    ids = tokenizer.encode("a\n\nb\n\n")
    Script(monkeypatch, ids)
    stream = engine.stream(tokenizer.encode("x"), len(ids), stop=["\n\nclass"])
    assert "".join(stream) == tokenizer.decode([*tokenizer.encode("x"), *ids])[1:]
    assert stream.finish_reason == "length"


def test_a_finished_row_of_a_batch_writes_no_more(engine, tokenizer, monkeypatch):
    short = [*tokenizer.encode("one"), tokenizer.eos_id]
    long = tokenizer.encode("first second class total return")
    Script(monkeypatch, short, long)
    first, second = engine.generate([[5], [5, 6]], len(long))
    assert (first.ids, first.finish_reason) == (short, "stop")
    assert (second.ids, second.finish_reason) == (long, "length")


def test_the_space_before_the_first_word_is_kept(engine, tokenizer, monkeypatch):
    ids = tokenizer.encode("return first")
    assert tokenizer.piece(ids[0]).startswith("▁")
    Script(monkeypatch, ids)
    assert "".join(engine.stream(tokenizer.encode("total"), len(ids))) == " return first"


def test_a_character_of_several_byte_tokens_comes_whole(engine, tokenizer, monkeypatch):
    ids = tokenizer.encode("€ 🙂")  # not in the training text: bytes
    Script(monkeypatch, ids)
    pieces = list(engine.stream(tokenizer.encode("x"), len(ids)))
    assert "".join(pieces).strip() == "€ 🙂"
    assert not any("\ufffd" in piece for piece in pieces)


def test_an_end_of_text_ends_it_and_gives_no_text(engine, tokenizer, monkeypatch):
    Script(monkeypatch, [*tokenizer.encode("first"), tokenizer.eos_id, 9, 9])
    stream = engine.stream(tokenizer.encode("x"), 50)
    assert ("".join(stream), stream.finish_reason) == (" first", "stop")
    assert stream.ids[-1] == tokenizer.eos_id


def test_the_context_limit_ends_the_text(engine):
    sampling = Sampling(temperature=2.0, seed=2)
    for length in (CONTEXT - 6, CONTEXT - 2, CONTEXT - 1):
        stream = engine.stream(random_ids(length), 50, sampling)
        list(stream)
        # BOS, prompt and completion fill it exactly.
        assert (1 + length + len(stream.ids), stream.finish_reason) == (CONTEXT, "length")
    # In a batch the long prompt ends early, the short one does not.
    long, short = engine.generate([random_ids(CONTEXT - 6), random_ids(3)], 20, sampling)
    assert (len(long.ids), len(short.ids)) == (5, 20)


def test_a_prompt_longer_than_the_context_is_refused_at_once(engine):
    with pytest.raises(UserError, match=r"65 tokens .* only 64"):
        engine.stream(random_ids(CONTEXT))
    with pytest.raises(UserError, match="65 tokens"):
        engine.generate([[5], random_ids(CONTEXT)])


def test_bos_is_put_before_the_prompt_once(engine, model, tokenizer):
    prompt = random_ids(6)
    with_bos = uncached_greedy(model, [tokenizer.bos_id, *prompt], 5, 320)
    without = uncached_greedy(model, prompt, 5, 320)
    assert with_bos != without
    assert engine.generate([prompt], 5)[0].ids == with_bos
    assert engine.generate([[tokenizer.bos_id, *prompt]], 5)[0].ids == with_bos
    assert engine.generate([prompt], 5, add_bos=False)[0].ids == without
    assert len(engine.generate([[]], 5)[0].ids) == 5


@pytest.mark.parametrize(
    "arguments, message",
    [
        (dict(prompt_ids=[320]), "token id 320 .* vocabulary of 320"),
        (dict(prompt_ids=[], add_bos=False), "no token"),
        (dict(prompt_ids=[5], max_new_tokens=0), "max_new_tokens=0"),
        (dict(prompt_ids=[5], stop=[""]), "not empty"),
        (dict(prompt_ids=[5], stop="end"), "list of strings"),
    ],
)
def test_bad_arguments_are_refused_before_anything_is_computed(engine, arguments, message):
    with pytest.raises(UserError, match=message):
        engine.stream(**arguments)


def test_a_tokenizer_of_another_model_is_refused(tokenizer):
    with pytest.raises(UserError, match="320 tokens, the model's vocabulary only 100"):
        Engine(OpenELM(ModelConfig(model_dim=64, num_transformer_layers=1, head_dim=16, vocab_size=100)), tokenizer)


@pytest.mark.parametrize("size", [1, 2, 3, 5, 100])
@pytest.mark.parametrize(
    "text, stops, expected",
    [
        ("one two three", ("two",), "one "),
        ("aaab", ("aab",), "a"),  # a false start inside the beginning of the stop
        ("abcabd!", ("abd",), "abc"),
        ("abcd", ("abcd", "c"), "ab"),  # complete first, wherever pieces end
        ("xabab", ("abc",), "xabab"),
        ("stop", ("stop",), ""),
        ("plain", (), "plain"),
    ],
)
def test_stop_strings_do_not_depend_on_how_the_text_is_cut(text, stops, expected, size):
    watch = StopFilter(stops)
    out = ""
    for start in range(0, len(text), size):
        out += watch.push(text[start : start + size])
        # What was given out is never taken back.
        assert expected.startswith(out)
    assert out + watch.flush() == expected
    assert watch.stopped == any(stop in text for stop in stops)


def test_a_folder_gives_the_same_engine_and_a_run_folder_its_model(engine, model, tokenizer, tmp_path, capsys):
    run = tmp_path / "run"
    run.mkdir()
    save_model(model, run / "model", tokenizer=tokenizer)
    expected = engine.generate([random_ids(4)], 8)[0]
    for path in (run / "model", run):
        loaded = Engine.load(path, device="cpu")
        assert loaded.generate([random_ids(4)], 8)[0] == expected
    with pytest.raises(UserError, match=r"nowhere is not a folder"):
        find_model_folder(tmp_path / "nowhere")
    with pytest.raises(UserError, match=r"has no config\.json, and no model/"):
        find_model_folder(tmp_path)
    with pytest.raises(UserError, match="device 'abacus' cannot be used"):
        Engine.load(run, device="abacus")
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(
    "asked, message",
    [
        (dict(dtype=torch.float32), "float32 on cpu is for torch"),
        (dict(compile=True), "on cpu, compiled, is for torch"),
    ],
)
def test_the_native_backend_refuses_what_it_cannot_compute(model, tokenizer, tmp_path, asked, message):
    save_model(model, tmp_path / "model", tokenizer=tokenizer)
    with pytest.raises(UserError, match=message):
        Engine.load(tmp_path, backend="native", **asked)


def test_the_best_engine_that_is_there_computes(model, tokenizer, tmp_path, monkeypatch):
    save_model(model, tmp_path / "model", tokenizer=tokenizer)
    prompt = random_ids(9)
    monkeypatch.setattr(engine_module.native, "available", lambda: False)
    assert Engine.load(tmp_path, device="cpu", backend="auto").decoder.description == "torch on cpu, float32"
    monkeypatch.undo()
    if not engine_module.native.available():
        pytest.skip("the CPU decoder is not built here")
    engine = Engine.load(tmp_path, device="cpu", backend="auto", threads=1)
    assert engine.decoder.description.startswith("native") and "threads: 1, bfloat16" in engine.decoder.description
    rounded = Engine.load(tmp_path, device="cpu", dtype=torch.float32)
    with torch.no_grad():
        for parameter in rounded.model.parameters():
            parameter.copy_(parameter.to(torch.bfloat16))
    assert engine.generate([prompt], 8)[0] == rounded.generate([prompt], 8)[0]


@pytest.mark.parametrize("supported", [True, False])
def test_sixteen_bits_are_computed_in_fp32_where_the_cpu_would_emulate_them(supported, monkeypatch, capsys):
    engine_module._say_once.cache_clear()
    monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: supported)
    for _ in range(2):
        got = native_dtype(torch.bfloat16, torch.device("cpu"))
        assert got == (torch.bfloat16 if supported else torch.float32)
    assert native_dtype(torch.bfloat16, torch.device("cuda")) == torch.bfloat16
    assert native_dtype(torch.float32, torch.device("cpu")) == torch.float32
    assert capsys.readouterr().err.count("bfloat16") == (0 if supported else 1)


def test_closing_a_stream_ends_it(engine):
    stream = engine.stream(random_ids(4), 50, Sampling(temperature=1.0))
    next(stream)
    written = list(stream.ids)
    stream.close()
    assert list(stream) == []
    assert stream.ids == written


def test_speeds_are_measured(engine):
    stream = engine.stream(random_ids(4), 10, Sampling(temperature=2.0))
    assert stream.decode_tokens_per_s is None
    list(stream)
    assert stream.prefill_s > 0
    assert math.isclose(stream.decode_tokens_per_s * stream.decode_s, len(stream.ids) - 1)


def test_stream_decoder_is_the_one_that_decode_uses(tokenizer):
    decoder, ids = StreamDecoder(tokenizer), tokenizer.encode(TEXT)
    assert "".join(map(decoder.push, ids)) + decoder.flush() == TEXT


def test_samples_of_one_prompt_share_its_keys_and_values(engine, tokenizer, monkeypatch):
    one, other = ([tokenizer.bos_id, *tokenizer.encode(text)] for text in ("def add(first", "class"))
    prompts, seeds = [one, other, one, one, other], [1, 2, 3, 4, 5]
    sampling = Sampling(temperature=1.0, repetition_penalty=1.2)
    alone = [
        engine.generate([prompt], 12, sampling, seeds=[seed])[0] for prompt, seed in zip(prompts, seeds, strict=True)
    ]
    computed = count_prefill(monkeypatch)
    assert engine.generate(prompts, 12, sampling, seeds=seeds) == alone
    assert computed == [len(one), len(other)]


def count_prefill(monkeypatch) -> list[int]:
    """Fills with the lengths of all that is prefilled from here on."""
    computed, prefill = [], TorchSlots.prefill

    def counted(self, slots, prompts):
        computed.extend(map(len, prompts))
        return prefill(self, slots, prompts)

    monkeypatch.setattr(TorchSlots, "prefill", counted)
    return computed


def test_what_prompts_have_in_common_is_computed_once(engine, tokenizer, monkeypatch):
    common = [tokenizer.bos_id, *random_ids(24)]
    prompts = [common + random_ids(count, seed=count) for count in (5, 1, 9)]
    sampling = Sampling(temperature=1.0, repetition_penalty=1.2)
    alone = [engine.generate([prompt], 12, sampling)[0] for prompt in prompts]
    computed = count_prefill(monkeypatch)
    assert engine.generate(prompts, 12, sampling) == alone
    assert computed == [25, 5, 1, 9]
    # One prompt is the beginning of the others: it keeps a token to run.
    computed.clear()
    assert engine.generate([common, *prompts], 12, sampling)[1:] == alone
    assert computed == [24, 1, 6, 2, 10]


def test_a_conversation_computes_only_what_is_new(model, tokenizer, monkeypatch):
    engine, fresh = Engine(model, tokenizer), Engine(model, tokenizer)
    sampling = Sampling(temperature=1.0, seed=3)
    computed = count_prefill(monkeypatch)
    text = [tokenizer.bos_id, *random_ids(10)]
    for turn, new in enumerate(([], [7, 8, 9], [300])):
        text = text + new
        stream = engine.stream(text, 6, sampling)
        pieces = list(stream)
        # The last token of an answer was chosen and never run.
        assert computed == [[11], [4], [2]][turn]
        computed.clear()
        assert pieces == list(fresh.stream(text, 6, sampling))
        fresh._kept = None
        computed.clear()
        text = text + [id for id in stream.ids if id != tokenizer.eos_id]
    # The same again, another beginning, and a stream that was closed half way.
    again = engine.stream(text, 6, sampling)
    next(again)
    again.close()
    for prompt in (text, [tokenizer.bos_id, *random_ids(5, seed=9)], text[:4]):
        assert list(engine.stream(prompt, 6, sampling)) == list(fresh.stream(prompt, 6, sampling))
        fresh._kept = None


def test_two_streams_at_once_do_not_meet(engine):
    sampling = Sampling(temperature=1.0)
    prompts = [random_ids(5), random_ids(7, seed=1)]
    alone = ["".join(engine.stream(prompt, 12, sampling)) for prompt in prompts]
    streams = [engine.stream(prompt, 12, sampling) for prompt in prompts]
    texts = ["", ""]
    for _ in range(12):
        for place, stream in enumerate(streams):
            texts[place] += next(stream, "")
    assert texts == alone


def uncached_sliding(model, prompt, count, vocabulary):
    """The plain way: a full window starts again with its first token and its last half."""
    ids, window = list(prompt), list(prompt)
    if len(window) > CONTEXT:
        window = [ids[0], *ids[-(CONTEXT // 2) :]]
    with torch.no_grad():
        for _ in range(count):
            ids.append(model(torch.tensor([window]))[0, -1, :vocabulary].argmax().item())
            window.append(ids[-1])
            if len(window) > CONTEXT:
                window = [ids[0], *ids[-(CONTEXT // 2) :]]
    return ids[len(prompt) :]


@pytest.mark.parametrize("length", [5, CONTEXT - 2, CONTEXT - 1, CONTEXT, 3 * CONTEXT])
def test_a_sliding_window_goes_on_beyond_the_context(model, tokenizer, length, monkeypatch):
    monkeypatch.setattr(tokenizer, "eos_id", None)
    engine = Engine(model, tokenizer)
    prompt = [tokenizer.bos_id, *random_ids(length)]
    expected = uncached_sliding(model, prompt, 120, tokenizer.vocab_size)
    for _ in range(2):  # the second finds the first one's slot
        stream = engine.stream(prompt, 120, slide=True)
        list(stream)
        assert (stream.ids, stream.finish_reason) == (expected, "length")
    short = [tokenizer.bos_id, *random_ids(3, seed=1)]
    both = engine.generate([prompt, short, prompt], 120, slide=True)
    assert [one.ids for one in both] == [
        expected,
        uncached_sliding(model, short, 120, tokenizer.vocab_size),
        expected,
    ]
