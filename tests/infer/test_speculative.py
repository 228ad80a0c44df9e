"""Drafts change how many tokens a pass gives, and nothing about the text."""

import json
import math
import random
from itertools import zip_longest
from types import SimpleNamespace

import pytest
import torch

from openelm import cli
from openelm.data.tokenizer import Tokenizer, train_tokenizer
from openelm.errors import UserError
from openelm.infer import native
from openelm.infer.engine import Engine
from openelm.infer.sampling import Sampling
from openelm.infer.speculative import Account, Speculation, _Copied, check_vocabulary
from openelm.infer.torch_decoder import TorchDecoder
from openelm.model.folder import save_model
from openelm.model.transformer import OpenELM
from small_models import make

VOCABULARY = 400  # of the model's 448 rows
CONTEXT = 64
PROMPT = [1, 17, 230, 45, 17, 230, 8]
SAMPLINGS = [
    Sampling(),
    Sampling(repetition_penalty=1.3),
    Sampling(temperature=1.0, seed=2**62),
    Sampling(temperature=0.8, top_k=50, top_p=0.95, min_p=0.01, repetition_penalty=1.2, seed=5),
]


@pytest.fixture(scope="module")
def model(golden_weights) -> OpenELM:
    return make(golden_weights)


@pytest.fixture(scope="module")
def draft(golden_weights) -> OpenELM:
    """The model with noise on its weights: now it agrees with it, now not."""
    near = make(golden_weights)
    noise = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in near.parameters():
            parameter *= 1 + 0.2 * torch.randn(parameter.shape, generator=noise)
    return near


def plain(decoder, prompt, count, sampling, tokenizer_file):
    """Ids that the engine writes without drafts."""
    return Engine(decoder, Tokenizer.load(tokenizer_file)).generate([prompt], count, sampling, add_bos=False)[0].ids


def run(speculation, decoder, prompt, count, sampling, *, vocab_size=VOCABULARY):
    """Ids written with drafts, in the least room that plain decoding needs; and the steps they came in."""
    slots, text = decoder.slots(1, len(prompt) + count - 1), list(prompt)
    ids, steps = [], []
    logits_1V = slots.prefill([0], [text])
    for step in speculation.steps(slots, 0, logits_1V[0], text, count, sampling, vocab_size):
        ids += step
        steps.append(step)
        assert slots.length(0) == len(text) - 1
    assert text == [*prompt, *ids]
    return ids, steps


@pytest.mark.parametrize("sampling", SAMPLINGS, ids=["greedy", "penalty", "drawn", "filtered"])
@pytest.mark.parametrize("tokens", [1, 3, 8])
@pytest.mark.parametrize("kind", ["model", "lookup"])
def test_the_text_is_that_of_plain_decoding(model, draft, tokenizer_file, kind, tokens, sampling):
    decoder = TorchDecoder(model)
    speculation = Speculation(TorchDecoder(draft) if kind == "model" else None, tokens=tokens)
    expected = plain(decoder, PROMPT, 50, sampling, tokenizer_file)
    ids, _ = run(speculation, decoder, PROMPT, 50, sampling)
    assert ids[: len(expected)] == expected
    account = speculation.account
    assert account.drafted > account.accepted
    if kind == "model":
        assert account.accepted > 0


class Table:
    """A decoder, and its slots, whose logits are those that a table has for the last token; it notes what it runs."""

    def __init__(self, logits_VV, context=10_000):
        self.logits_VV, self.capacity = logits_VV, context
        self.config, self.device = (
            SimpleNamespace(max_context_length=context, vocab_size=len(logits_VV)),
            torch.device("cpu"),
        )
        self.passes = []  # tokens of each

    def slots(self, count, capacity):
        assert count == 1 and capacity <= self.config.max_context_length
        self.capacity, self.held = capacity, []
        return self

    def length(self, slot):
        return len(self.held)

    def truncate(self, slot, length):
        assert length <= len(self.held)
        del self.held[length:]

    def verify(self, slot, ids):
        assert ids and len(self.held) + len(ids) <= self.capacity
        self.held += ids
        self.passes.append(list(ids))
        return self.logits_VV[list(ids)]

    def prefill(self, slots, prompts):
        return self.verify(0, list(prompts[0]))[-1:]

    def decode(self, slots, tokens_B):
        return self.verify(0, tokens_B.tolist())


def counting(places, wrong=()):
    """A table that goes from each token to the next, and from some of them elsewhere."""
    following = [(place + 1) % places if place not in wrong else 0 for place in range(places)]
    return torch.eye(places)[following]


# The distribution


def probabilities(states, seed):
    return (2 * torch.randn(states, states, generator=torch.Generator().manual_seed(seed))).softmax(-1)


@pytest.mark.parametrize("kind", ["model", "lookup"])
def test_drawn_tokens_have_the_distribution_of_the_model(kind):
    """Chi-square of what follows each token, on a text of which a good part was drafted."""
    states, count = 5, 2000
    p_VV, q_VV = probabilities(states, 1), probabilities(states, 2)
    speculation = Speculation(Table(q_VV.log()) if kind == "model" else None)
    ids, _ = run(speculation, Table(p_VV.log()), [0], count, Sampling(temperature=1.0, seed=3), vocab_size=states)
    assert speculation.account.accepted > 0.2 * count
    seen_VV = torch.zeros(states, states)
    for before, after in zip([0, *ids], ids, strict=False):
        seen_VV[before, after] += 1
    expected_VV = seen_VV.sum(1, keepdim=True) * p_VV
    kept = expected_VV >= 5  # below that the statistic is no chi-square
    statistic = ((seen_VV - expected_VV) ** 2 / expected_VV)[kept].sum().item()
    freedom = states * (states - 1)
    # Wilson and Hilferty's normal approximation; four standard deviations.
    normal = ((statistic / freedom) ** (1 / 3) - 1 + 2 / (9 * freedom)) / math.sqrt(2 / (9 * freedom))
    assert normal < 4


def test_a_model_agrees_as_often_as_shared_noise_allows():
    states, count = 6, 2000
    p_V, q_V = probabilities(states, 3)[0], probabilities(states, 4)[0]
    speculation = Speculation(Table(q_V.log().expand(states, -1)), tokens=1)
    target = Table(p_V.log().expand(states, -1))
    run(speculation, target, [0], count, Sampling(temperature=1.0, seed=9), vocab_size=states)
    # Both choose i where the smallest of exponential variables is i's for either (Daliri, Musco and Suresh 2024).
    agrees = sum(1 / torch.maximum(p_V / p_V[i], q_V / q_V[i]).sum().item() for i in range(states))
    distance = (p_V - q_V).abs().sum().item() / 2
    assert (1 - distance) / (1 + distance) <= agrees <= 1 - distance
    account = speculation.account
    assert account.acceptance == pytest.approx(agrees, abs=5 * math.sqrt(agrees * (1 - agrees) / account.drafted))


# Passes


def test_a_perfect_draft_saves_all_passes_that_it_can():
    table = counting(100)
    target, speculation = Table(table), Speculation(Table(table), tokens=4)
    ids, steps = run(speculation, target, [0, 1, 2], 23, Sampling(), vocab_size=100)
    assert ids == list(range(3, 26))
    assert [len(step) for step in steps] == [1, 5, 5, 5, 5, 2]
    assert speculation.account == Account(drafted=17, accepted=17, passes=5)
    assert speculation.account.acceptance == 1 and speculation.account.tokens_per_pass == 22 / 5


def test_a_draft_that_is_always_wrong_costs_short_passes_and_changes_nothing():
    target = Table(counting(50))
    speculation = Speculation(Table(torch.eye(50)), tokens=8)
    ids, steps = run(speculation, target, [0], 20, Sampling(), vocab_size=50)
    assert ids == list(range(1, 21))
    assert {len(step) for step in steps} == {1}
    # At first all eight, then two, for nothing stayed; the last two are what there is room for.
    assert [len(ids) for ids in target.passes[1:]] == [9] + [3] * 16 + [2, 1]


def test_drafts_grow_with_what_stays_and_shrink_where_it_does_not():
    wrong = (9, 10, 11, 12)
    target, drafting = Table(counting(40)), Table(counting(40, wrong))
    run(Speculation(drafting, tokens=6), target, [0], 39, Sampling(), vocab_size=40)
    lengths = [len(ids) - 1 for ids in target.passes[1:]]
    # From 8 on the second is wrong, from 10, 11 and 12 the first; at the end there is room for three.
    assert lengths == [6, 6, 3, 2, 2, 2, 4, 6, 6, 3]
    assert drafting.held == list(range(38))  # nothing of what was wrong; of the last three, two were run


def test_only_what_the_text_gained_goes_through_the_draft():
    drafting = Table(counting(40))
    run(Speculation(drafting, tokens=3), Table(counting(40)), [0, 1], 10, Sampling(), vocab_size=40)
    # The prompt and the first token, then two of the three that are drafted; the third comes with the model's own.
    assert drafting.passes == [[0, 1, 2], [3], [4], [5, 6], [7], [8]]


def test_a_conversation_that_goes_on_is_not_computed_again_by_the_draft():
    drafting = Table(counting(40))
    speculation = Speculation(drafting, tokens=3)
    ids, _ = run(speculation, Table(counting(40)), [0, 1], 4, Sampling(), vocab_size=40)
    drafting.passes.clear()
    run(speculation, Table(counting(40)), [0, 1, *ids, 30], 4, Sampling(), vocab_size=40)
    assert drafting.passes[0] == [4, 5, 30, 31]  # 4 was the last that was drafted, which is not run
    drafting.passes.clear()
    run(speculation, Table(counting(40)), [0, 7], 4, Sampling(), vocab_size=40)
    assert drafting.passes[0] == [7, 8]


def test_two_texts_at_once_do_not_disturb_each_other(model, draft, tokenizer_file):
    decoder, sampling, prompts = TorchDecoder(model), Sampling(temperature=1.0, seed=6), (PROMPT, PROMPT[:4])
    for speculation in (Speculation(TorchDecoder(draft)), Speculation()):
        slots, texts = decoder.slots(2, CONTEXT), [list(prompt) for prompt in prompts]
        running = [
            speculation.steps(slots, n, slots.prefill([n], [text])[0], text, 20, sampling, VOCABULARY)
            for n, text in enumerate(texts)
        ]
        for _ in zip_longest(*running):
            pass
        for prompt, text in zip(prompts, texts, strict=True):
            expected = plain(decoder, prompt, 20, sampling, tokenizer_file)
            assert text[len(prompt) :][: len(expected)] == expected


def test_a_text_given_up_in_the_middle_leaves_nothing_behind(model, draft, tokenizer_file):
    decoder, sampling = TorchDecoder(model), Sampling(temperature=1.0, seed=4)
    speculation = Speculation(TorchDecoder(draft), tokens=5)
    slots, text = decoder.slots(1, CONTEXT), list(PROMPT)
    steps = speculation.steps(slots, 0, slots.prefill([0], [text])[0], text, 40, sampling, VOCABULARY)
    for _ in range(4):
        next(steps)
    steps.close()
    expected = plain(decoder, PROMPT[:5], 30, sampling, tokenizer_file)
    assert run(speculation, decoder, PROMPT[:5], 30, sampling)[0][: len(expected)] == expected
    # And what the first slot was left with is the text: another may follow it.
    rest = [33, 44]
    slots.truncate(0, len(text) - 1)
    torch.testing.assert_close(
        slots.prefill([0], [[text[-1], *rest]]), decoder.slots(1, CONTEXT).prefill([0], [[*text, *rest]])
    )


# Room


def test_the_context_is_filled_to_the_last_token(model, draft, tokenizer_file):
    decoder, prompt = TorchDecoder(model), [1, *range(3, 50)]
    for count in (1, 2, CONTEXT - len(prompt), CONTEXT - len(prompt) + 1):
        expected = plain(decoder, prompt, count, Sampling(), tokenizer_file)
        ids, _ = run(Speculation(TorchDecoder(draft), tokens=8), decoder, prompt, count, Sampling())
        assert len(ids) == count and ids[: len(expected)] == expected
    assert list(Speculation().steps(decoder.slots(1, 5), 0, torch.zeros(448), [1], 0, Sampling(), 448)) == []


@pytest.mark.parametrize("context", [4, 8, 30])
def test_a_text_that_outgrows_the_draft_goes_on_without_it(context):
    target, drafting = Table(counting(60)), Table(counting(60), context)
    ids, steps = run(Speculation(drafting), target, list(range(6)), 50, Sampling(), vocab_size=60)
    assert ids == list(range(6, 56))
    assert len(drafting.held) <= context
    assert len(steps[-1]) == 1 and (context == 4 or len(steps[1]) > 1)


def test_the_penalty_sees_what_was_drafted_just_before():
    # Each token would be followed by itself, were it not seen; so the next comes.
    table = torch.eye(30) + 0.9 * torch.eye(30).roll(1, dims=1)
    speculation = Speculation(Table(table), tokens=4)
    ids, _ = run(speculation, Table(table), [0], 29, Sampling(repetition_penalty=2.0), vocab_size=30)
    assert ids == list(range(1, 30))
    assert speculation.account.acceptance == 1


# Streams


def test_an_end_of_text_inside_a_draft_ends_the_text(tokenizer_file):
    tokenizer = Tokenizer.load(tokenizer_file)
    following = [*range(1, VOCABULARY), 0]
    following[12], following[tokenizer.eos_id] = tokenizer.eos_id, 50
    table = torch.eye(VOCABULARY)[following]
    stream = Engine(Table(table), tokenizer).stream([9], 30, speculation=Speculation(Table(table), tokens=8))
    expected = Engine(Table(table), tokenizer).stream([9], 30)
    assert ("".join(stream), stream.finish_reason) == ("".join(expected), "stop")
    assert stream.ids == expected.ids == [10, 11, 12, tokenizer.eos_id]


def test_stop_strings_end_the_text_where_they_do_without_drafts(model, draft, tokenizer_file):
    plainly = Engine(model, Tokenizer.load(tokenizer_file))
    whole = "".join(plainly.stream(PROMPT, 40))
    assert len(whole) > 40
    for start in range(0, 40, 7):
        stop = [whole[start : start + 4]]
        expected = plainly.stream(PROMPT, 40, stop=stop)
        stream = plainly.stream(PROMPT, 40, stop=stop, speculation=Speculation(TorchDecoder(draft), tokens=5))
        assert ("".join(stream), stream.ids, stream.finish_reason) == ("".join(expected), expected.ids, "stop")


def test_streams_with_and_without_drafts_leave_the_next_one_what_they_have_in_common(model, draft, tokenizer_file):
    engine, sampling = Engine(model, Tokenizer.load(tokenizer_file)), Sampling(temperature=1.0, seed=8)
    speculation = Speculation(TorchDecoder(draft))
    text = list(PROMPT)
    for turn, drafts in enumerate((speculation, speculation, None, speculation)):
        stream = engine.stream(text, 9, sampling, speculation=drafts)
        if turn == 2:
            next(stream)
            stream.close()  # given up
        else:
            list(stream)
        expected = Engine(model, engine.tokenizer).stream(text, 9, sampling)
        list(expected)
        assert stream.ids == expected.ids[: len(stream.ids)] and stream.ids
        text += [*stream.ids, 77]


def test_drafts_and_a_sliding_window_do_not_go_together(model, tokenizer_file):
    with pytest.raises(UserError, match="leave the sliding window out, or the drafts"):
        Engine(model, Tokenizer.load(tokenizer_file)).stream(PROMPT, slide=True, speculation=Speculation())


# The command


@pytest.fixture(scope="module")
def folders(model, draft, tokenizer_file, tmp_path_factory):
    """Model folders of the two."""
    folder = tmp_path_factory.mktemp("models")
    for name, each in (("model", model), ("draft", draft)):
        save_model(each, folder / name, tokenizer=Tokenizer.load(tokenizer_file))
    return folder


@pytest.mark.parametrize("options", [("--draft", "DRAFT", "--draft-tokens", "2"), ("--lookup",), ("--lookup", "2")])
def test_the_command_writes_the_same_text_and_says_what_was_drafted(folders, capsys, options):
    common = ["generate", str(folders / "model"), "--prompt", "the water under", "--max-tokens", "30", "--json"]
    common += ["--backend", "torch"]
    written = []
    for more in ((), [str(folders / "draft") if option == "DRAFT" else option for option in options]):
        assert cli.run([*common, *more]) == 0
        out, said = capsys.readouterr()
        written.append(json.loads(out))
    without, drafted = written
    assert drafted["completion"] == without["completion"]
    assert without["speculation"] is None
    account = Account(*(drafted["speculation"][name] for name in ("drafted", "accepted", "passes")))
    assert account.passes + account.accepted >= drafted["completion_tokens"] - 1  # more where the text ended in a draft
    assert drafted["speculation"]["acceptance"] == account.acceptance
    assert drafted["speculation"]["tokens_per_pass"] == account.tokens_per_pass
    assert f"{account.accepted} of {account.drafted} drafted tokens accepted" in said


@pytest.mark.parametrize(
    "options, message",
    [
        ("--draft DRAFT --lookup", "--draft and --lookup both draft: give one of them"),
        ("--draft-tokens 3", "--draft-tokens 3 needs something that drafts: add --draft MODEL or --lookup"),
        ("--lookup --draft-tokens 0", "--draft-tokens 0 must be at least 1"),
        ("--lookup 0", "--lookup 0 must be at least 1"),
        ("--draft nowhere", "nowhere is not a folder"),
        ("--lookup --sliding-window", "leave the sliding window out, or the drafts"),
    ],
)
def test_what_cannot_draft_is_refused_in_one_line(folders, capsys, options, message):
    words = [str(folders / "draft") if word == "DRAFT" else word for word in options.split()]
    assert cli.run(["generate", str(folders / "model"), "--prompt", "a", "--backend", "torch", *words]) == 2
    out, said = capsys.readouterr()
    assert out == "" and message in said and said.count("\n") == 1


def test_a_draft_larger_than_the_model_is_allowed_with_a_word(
    folders, tokenizer_file, golden_weights, tmp_path, capsys
):
    save_model(make(golden_weights, vocab_size=512), tmp_path / "larger", tokenizer=Tokenizer.load(tokenizer_file))
    words = ["--prompt", "a", "--max-tokens", "3", "--backend", "torch"]
    assert cli.run(["generate", str(folders / "model"), *words, "--draft", str(tmp_path / "larger")]) == 0
    assert "a draft pays if smaller" in capsys.readouterr().err


# Drafts from the text


def test_what_followed_the_longest_run_is_the_draft():
    text = [7, 1, 2, 3, 50, 51, 9, 2, 3, 60, 61, 8, 3, 70, 71, 1, 2, 3]
    assert copied(text, 3)[:3] == [50, 51, 9]
    assert copied(text, 2)[:3] == [60, 61, 8]
    assert copied(text, 1)[:3] == [70, 71, 1]
    assert copied([1, 2, 3, 4], 3) == []
    assert copied([5], 3) == []


def test_of_equal_runs_the_last_is_taken():
    assert copied([1, 2, 30, 1, 2, 40, 1, 2], 2)[:1] == [40]


def test_a_repetition_goes_on_past_the_end_of_the_text():
    assert copied([9, 4, 5, 6, 4, 5, 6, 4], 3, 8) == [5, 6, 4, 5, 6, 4, 5, 6]
    assert copied([3, 3], 3, 4) == [3, 3, 3, 3]


def copied(text, longest, count=4):
    return _Copied(longest).propose(text, count)


def test_the_index_finds_what_a_search_of_the_whole_text_finds():
    draw = random.Random(1)
    drafts, text = _Copied(3), [draw.randrange(6)]
    for _ in range(400):
        # As many at a time as a pass may give.
        text += [draw.randrange(6) for _ in range(draw.randint(1, 5))]
        assert drafts.propose(text, 1) == searched(text, 3)


def searched(text, longest):
    for length in range(min(longest, len(text) - 1), 0, -1):
        for start in range(len(text) - length - 1, -1, -1):
            if text[start : start + length] == text[-length:]:
                return [text[start + length]]
    return []


# Native, and errors


@pytest.mark.skipif(not native.available(), reason="the CPU decoder is not built")
@pytest.mark.parametrize("sampling", SAMPLINGS, ids=["greedy", "penalty", "drawn", "filtered"])
def test_up_to_three_drafted_tokens_change_no_bit_of_the_cpu_decoder(model, draft, tmp_path, tokenizer_file, sampling):
    decoders = []
    for name, each in (("model", model), ("draft", draft)):
        save_model(each, tmp_path / name, dtype=torch.bfloat16)
        decoders.append(native.NativeModel.load(tmp_path / name, threads=1))
    expected = plain(decoders[0], PROMPT, 50, sampling, tokenizer_file)
    speculation = Speculation(decoders[1], tokens=3)
    assert run(speculation, decoders[0], PROMPT, 50, sampling)[0][: len(expected)] == expected
    assert speculation.account.accepted > 0


def test_a_draft_with_other_words_is_refused(tmp_path, tokenizer_file, text_folder):
    ours = Tokenizer.load(tokenizer_file)
    check_vocabulary(ours, Tokenizer.load(tokenizer_file))
    smaller = train_tokenizer(["some other text, of few words"] * 20, tmp_path / "smaller", 280, threads=1)
    with pytest.raises(UserError, match=r"tokenizer has 280 tokens, the model's 400: draft with a model"):
        check_vocabulary(ours, smaller)
    backwards = [file.read_text()[::-1] for file in text_folder.iterdir()]
    other = train_tokenizer(backwards, tmp_path / "other", 400, threads=1)
    with pytest.raises(UserError, match=r"token \d+ is '.*' for the draft, '.*' for the model: draft with a model"):
        check_vocabulary(ours, other)


def test_the_same_words_in_another_file_are_the_same(tmp_path, tokenizer_file):
    ours = Tokenizer.load(tokenizer_file)
    (tmp_path / "tokenizer.json").write_bytes(ours.backend.tokenizer_json())
    (tmp_path / "tokenizer_config.json").write_text('{"bos_token": "<s>", "eos_token": "</s>"}')
    theirs = Tokenizer.load(tmp_path / "tokenizer.json")
    assert theirs.fingerprint != ours.fingerprint
    check_vocabulary(ours, theirs)


@pytest.mark.parametrize("arguments, message", [(dict(tokens=0), "0 draft tokens"), (dict(lookup=0), "lookup of 0")])
def test_what_drafts_nothing_is_refused(arguments, message):
    with pytest.raises(UserError, match=message):
        Speculation(**arguments)
