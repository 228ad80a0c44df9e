"""Texts join, leave, share and fail; what each says is what it would say alone."""

import queue
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch

from openelm.infer import native
from openelm.infer.engine import Engine
from openelm.infer.sampling import Sampling
from openelm.infer.writing import Writer
from openelm.serve.choosing import Chooser, Rules
from openelm.serve.scheduler import Piece, QueueFull, Scheduler, Text

VOCABULARY = 400


def random_ids(count: int, seed: int = 0) -> list[int]:
    return [1, *torch.randint(3, VOCABULARY, (count - 1,), generator=torch.Generator().manual_seed(seed)).tolist()]


class Asked(Text):
    """A text whose pieces can be waited for."""

    def __init__(self, engine: Engine, prompt: list[int], tokens: int = 12, rules: Rules | None = None, **more: Any):
        self.got: queue.Queue[Piece] = queue.Queue()
        writer = Writer(engine.tokenizer, prompt, tokens, more.pop("stop", ()))
        super().__init__(prompt, writer, Chooser(rules or Rules(), prompt, VOCABULARY), self.got.put, **more)

    def pieces(self) -> Iterator[Piece]:
        while True:
            piece = self.got.get(timeout=20)
            yield piece
            if piece.finish_reason or piece.error:
                return

    def text(self) -> str:
        return "".join(piece.text for piece in self.pieces())


@pytest.fixture
def start(engine) -> Iterator[Callable[..., Scheduler]]:
    started = []

    def make(decoder: Any = None, **options: Any) -> Scheduler:
        started.append(Scheduler(decoder or engine.decoder, VOCABULARY, **{"slots": 4, "context": 96, **options}))
        return started[-1]

    yield make
    for scheduler in started:
        scheduler.close()


def alone(engine: Engine, prompt: list[int], tokens: int = 12, **options: Any) -> tuple[str, list[int]]:
    [completion] = engine.generate([prompt], tokens, **options)
    return completion.text, completion.ids


def test_greedy_texts_are_those_of_the_engine_whoever_shares_the_batch(engine, start):
    scheduler = start(prefill_tokens=7)
    texts = [Asked(engine, random_ids(length, length), 20) for length in (3, 40, 9, 1, 25, 60, 12, 5, 33, 2)]
    for text in texts:
        scheduler.submit([text])
        time.sleep(0.002)  # so that they join where others are in the middle
    for text in texts:
        said = text.text()
        assert (said, text.writer.ids) == alone(engine, list(text.prompt), 20)
    assert sum(len(set(text.writer.ids)) for text in texts) > 40  # texts that repeat themselves would prove little
    assert scheduler.running == scheduler.waiting == 0


def test_sampled_texts_are_those_of_their_seed_in_mixed_company(engine, start):
    kinds = [
        Sampling(temperature=1.0),
        Sampling(temperature=0.7, top_p=0.8),
        Sampling(),
        Sampling(temperature=1.3, top_k=20, min_p=0.01),
        Sampling(temperature=0.9, repetition_penalty=1.3),
    ]
    scheduler = start()
    texts = [Asked(engine, random_ids(6 + n, n), 16, Rules(replace(kinds[n % len(kinds)], seed=n))) for n in range(15)]
    scheduler.submit(texts)
    for text in texts:
        text.text()
        assert text.writer.ids == alone(engine, list(text.prompt), 16, sampling=text.chooser.rules.sampling)[1]


def test_a_conversation_that_goes_on_is_not_computed_again(engine, start):
    scheduler = start()
    first = Asked(engine, random_ids(30), 10)
    scheduler.submit([first])
    first.text()
    other = Asked(engine, random_ids(20, 5), 4)
    scheduler.submit([other])
    other.text()
    prompt = [*first.ids, *random_ids(8, 3)]
    second = Asked(engine, prompt, 10)
    scheduler.submit([second])
    assert second.text() == alone(engine, prompt, 10)[0]
    assert second.reused == len(first.ids) - 1  # its last token was never run
    assert other.reused == 0  # a BOS is no reason to take a text's place


def test_samples_of_one_prompt_compute_it_once(engine, start):
    scheduler = start(slots=6)
    prompt = random_ids(50)
    texts = [Asked(engine, prompt, 8, Rules(Sampling(temperature=1.0, seed=n))) for n in range(6)]
    scheduler.submit(texts)
    for n, text in enumerate(texts):
        text.text()
        assert text.writer.ids == alone(engine, prompt, 8, sampling=Sampling(temperature=1.0), seeds=[n])[1]
    assert [text.reused for text in texts] == [0, *[49] * 5]


def test_what_a_running_text_needs_is_copied_and_not_taken(engine, start):
    scheduler = start(slots=2)
    prompt = random_ids(40)
    running, sharing = Asked(engine, prompt, 40), Asked(engine, [*prompt[:30], *random_ids(9, 8)], 10)
    scheduler.submit([running])
    running.got.get(timeout=10)
    scheduler.submit([sharing])
    assert sharing.text() == alone(engine, list(sharing.prompt), 10)[0]
    running.text()
    assert running.writer.ids == alone(engine, prompt, 40)[1]
    assert sharing.reused == 30


def test_on_the_cpu_decoder_texts_are_those_of_the_engine_too(served_folder, start):
    if not native.available():
        pytest.skip("the CPU decoder is not built")
    engine = Engine.load(served_folder, device="cpu", backend="native", threads=1)
    scheduler = start(engine.decoder, prefill_tokens=16)
    # No two prompts begin alike, but for the BOS.
    texts = [Asked(engine, random_ids(3 + 5 * n, n), 20) for n in range(12)]
    for text in texts:
        scheduler.submit([text])
        time.sleep(0.001)
    for text in texts:
        text.text()
        assert text.writer.ids == alone(engine, list(text.prompt), 20)[1]


def test_a_prompt_is_cut_at_the_same_places_whoever_else_comes_in(engine, start):
    decoder = Slow(engine)
    scheduler = start(decoder, prefill_tokens=8)
    texts = [Asked(engine, random_ids(length, length), 1) for length in (5, 21, 8, 30)]
    scheduler.submit(texts)
    for text in texts:
        text.text()
    assert decoder.pieces == [5, 8, 8, 5, 8, 8, 8, 8, 6]


class Slow:
    """A decoder whose calls are written down, and wait for a signal where that is asked for."""

    def __init__(self, engine: Engine) -> None:
        self.config, self.device, self.description = engine.decoder.config, engine.decoder.device, "slow"
        self._decoder, self.calls, self.pieces = engine.decoder, [], []
        self.gate = threading.Semaphore(0)
        self.fails: Callable[[str], bool] = lambda call: False
        self.waits = False

    def slots(self, count: int, capacity: int) -> Any:
        slots, outer = self._decoder.slots(count, capacity), self

        class Watched:
            def __getattr__(self, name: str) -> Any:
                method = getattr(slots, name)
                if name not in ("prefill", "decode", "verify"):
                    return method

                def call(*arguments: Any) -> Any:
                    if outer.waits:
                        outer.gate.acquire()
                    outer.calls.append(name)
                    if name == "prefill":
                        outer.pieces.append(len(arguments[1][0]))
                    if outer.fails(name):
                        raise MemoryError("no room")
                    return method(*arguments)

                return call

        return Watched()


def test_a_long_prompt_is_run_in_pieces_between_the_others_tokens(engine, start):
    decoder = Slow(engine)
    scheduler = start(decoder, prefill_tokens=10)
    running = Asked(engine, random_ids(5), 60)
    scheduler.submit([running])
    running.got.get(timeout=10)
    decoder.calls.clear()
    entering = Asked(engine, random_ids(80, 2), 2)
    scheduler.submit([entering])
    entering.text()
    calls = " ".join(decoder.calls)
    assert calls.count("prefill") == 8 and "prefill prefill" not in calls


def test_a_cancelled_text_is_gone_before_its_next_token(engine, start):
    decoder = Slow(engine)
    scheduler = start(decoder, slots=1)
    text, waiting = Asked(engine, random_ids(5), 90), Asked(engine, random_ids(5, 1), 3)
    decoder.waits = True
    scheduler.submit([text])
    scheduler.submit([waiting])
    for _ in range(4):
        decoder.gate.release()
    for _ in range(3):  # three tokens have come, and the thread may be at the next
        text.got.get(timeout=10)
    scheduler.cancel([text])
    decoder.waits = False
    decoder.gate.release()
    assert waiting.text() == alone(engine, list(waiting.prompt), 3)[0]
    assert len(text.ids) <= 5 + 5 and text.slot == -1
    assert scheduler.totals.cancelled == 1


def test_a_text_can_be_cancelled_while_it_waits_and_while_its_prompt_runs(engine, start):
    decoder = Slow(engine)
    decoder.waits = True
    scheduler = start(decoder, slots=1, prefill_tokens=5)
    entering, waiting, last = (Asked(engine, random_ids(30, n), 3) for n in range(3))
    for text in (entering, waiting, last):
        scheduler.submit([text])
    decoder.gate.release()
    scheduler.cancel([entering, waiting])
    decoder.waits = False
    decoder.gate.release()
    assert last.text() == alone(engine, list(last.prompt), 3)[0]
    assert entering.got.empty() and waiting.got.empty()
    assert scheduler.totals.cancelled == 2
    assert scheduler.running == scheduler.waiting == 0


def test_a_prompt_without_memory_fails_alone(engine, start):
    decoder = Slow(engine)
    scheduler = start(decoder)
    running = Asked(engine, random_ids(5), 40)
    scheduler.submit([running])
    running.got.get(timeout=10)
    decoder.fails = lambda call: call == "prefill"
    failed = Asked(engine, random_ids(9, 1))
    scheduler.submit([failed])
    [piece] = failed.pieces()
    assert isinstance(piece.error, MemoryError)
    decoder.fails = lambda call: False
    after = Asked(engine, random_ids(9, 1))
    scheduler.submit([after])
    assert after.text() == alone(engine, list(after.prompt))[0]
    running.text()
    assert running.writer.ids == alone(engine, list(running.prompt), 40)[1]


def test_a_step_without_memory_fails_those_in_it_and_the_next_go_on(engine, start):
    decoder = Slow(engine)
    scheduler = start(decoder)
    decoder.fails = lambda call: call == "decode"
    failed = [Asked(engine, random_ids(9, n)) for n in range(2)]
    scheduler.submit(failed)
    for text in failed:
        assert isinstance(list(text.pieces())[-1].error, MemoryError)
    decoder.fails = lambda call: False
    after = Asked(engine, random_ids(9, 1))
    scheduler.submit([after])
    assert after.text() == alone(engine, list(after.prompt))[0]


def test_the_queue_has_a_bound_and_one_client_half_of_it(engine, start):
    decoder = Slow(engine)
    decoder.waits = True
    scheduler = start(decoder, slots=1, queue=8)
    first = Asked(engine, random_ids(3), 1, client="a")
    scheduler.submit([first])
    while scheduler.waiting:
        time.sleep(0.001)
    many = [Asked(engine, random_ids(3), 1, client="a") for _ in range(5)]
    with pytest.raises(QueueFull):
        scheduler.submit(many)
    scheduler.submit(many[:4])
    with pytest.raises(QueueFull):
        scheduler.submit(many[4:])
    others = [Asked(engine, random_ids(3), 1, client=name) for name in "bbcc"]
    for text in others:
        scheduler.submit([text])
    with pytest.raises(QueueFull):
        scheduler.submit([Asked(engine, random_ids(3), 1, client="d")])
    decoder.waits = False
    decoder.gate.release()
    for text in (first, *many[:4], *others):
        text.text()


def test_clients_take_turns(engine, start):
    decoder = Slow(engine)
    decoder.waits = True
    scheduler = start(decoder, slots=1)
    order: list[str] = []
    texts = [Asked(engine, random_ids(3), 1, client=name) for name in "aaaabbc"]
    for text in texts:
        text.deliver = lambda piece, text=text: (order.append(text.client), text.got.put(piece))
        scheduler.submit([text])
    decoder.waits = False
    decoder.gate.release()
    for text in texts:
        text.text()
    # The first was taken before the others came.
    assert "".join(order) in ("abcabaa", "aabcaba")


def test_penalties_and_biases_are_openais():
    rules = Rules(presence_penalty=0.5, frequency_penalty=0.25, logit_bias=((7, 3.0), (9, -100.0)))
    chooser = Chooser(rules, [5, 6, 7], VOCABULARY)  # the prompt does not count
    for id in (7, 7, 8):
        chooser.note(id)
    logits_V = torch.zeros(VOCABULARY)
    chooser.move(logits_V)
    expected = {7: 3.0 - 0.5 - 2 * 0.25, 8: -0.5 - 0.25, 9: -100.0}
    assert {place: logits_V[place].item() for place in logits_V.nonzero()[:, 0].tolist()} == expected


def test_rules_hold_for_their_own_text_only(engine, start):
    prompt = random_ids(7)
    scheduler = start()
    kinds = [Rules(), Rules(logit_bias=((77, 1000.0),)), Rules(logit_bias=((77, 1000.0),), frequency_penalty=300.0)]
    plain, always, often = texts = [Asked(engine, prompt, 12, rules) for rules in kinds]
    scheduler.submit(texts)
    for text in texts:
        text.text()
    assert plain.writer.ids == alone(engine, prompt, 12)[1]
    assert always.writer.ids == [77] * 12
    assert often.writer.ids[:4] == [77] * 4 and often.writer.ids[4:].count(77) == 0


def test_a_prompt_is_scored_in_pieces_as_it_is_whole(engine, start):
    prompt = random_ids(40)
    logits_TV = engine.decoder.slots(1, 64).verify(0, prompt).float()
    logprobs_TV = logits_TV.log_softmax(-1)
    scheduler = start(prefill_tokens=9)
    warm = Asked(engine, prompt, 3)
    scheduler.submit([warm])
    warm.text()
    text = Asked(engine, prompt, 2, Rules(logprobs=2), score_prompt=True)
    scheduler.submit([text])
    scored = [one for piece in text.pieces() for one in piece.scored]
    assert [one.id for one in scored] == [*prompt, *warm.writer.ids[:2]]
    assert scored[0].logprob is None and scored[0].top == ()
    for place, one in enumerate(scored[1 : len(prompt)]):
        assert one.logprob == pytest.approx(logprobs_TV[place, prompt[place + 1]].item(), abs=1e-4)
        top = logprobs_TV[place, :VOCABULARY].topk(2)
        assert [id for id, _ in one.top] == top.indices.tolist()
        assert [value for _, value in one.top] == pytest.approx(top.values.tolist(), abs=1e-4)


def test_a_prompt_alone_can_be_scored(engine, start):
    text = Asked(engine, random_ids(12), 0, Rules(logprobs=0), score_prompt=True)
    scheduler = start()
    scheduler.submit([text])
    [piece] = text.pieces()
    assert len(piece.scored) == 12 and piece.finish_reason == "length"
    assert text.writer.ids == []


def test_a_prompt_may_fill_the_context_but_for_the_token_that_is_chosen(engine, start):
    scheduler = start(context=32)
    prompt = random_ids(32)
    text = Asked(engine, prompt, 1)
    scheduler.submit([text])
    text.text()
    assert text.writer.ids == alone(engine, prompt, 1)[1]


def test_at_the_end_those_who_wait_are_told(engine, start):
    decoder = Slow(engine)
    decoder.waits = True
    scheduler = start(decoder, slots=1)
    texts = [Asked(engine, random_ids(4, n), 50) for n in range(3)]
    scheduler.submit(texts)
    closing = threading.Thread(target=scheduler.close)
    closing.start()
    decoder.waits = False
    decoder.gate.release()
    for text in texts:
        assert "ended" in str(list(text.pieces())[-1].error)
    closing.join(10)
    assert not scheduler.alive
    with pytest.raises(RuntimeError, match="ended"):
        scheduler.submit(texts)
