"""Every likelihood is that of the request by itself, whatever it is computed together with; and nothing twice."""

import random
from collections.abc import Sequence

import pytest
import torch

import small_models
from openelm.errors import UserError
from openelm.infer import likelihood
from openelm.infer.likelihood import Forest, Likelihood, Request, Trunk, likelihoods
from openelm.model.geometry import ModelConfig
from openelm.model.transformer import OpenELM

CONTEXT = 64
GEOMETRIES = {
    "uneven": {},
    "one head a group": dict(num_gqa_groups=1),
    "untied": dict(share_input_output_layers=False),
    "no query and key norms": dict(normalize_qk_projections=False),
}


def make(dtype: torch.dtype = torch.float32, **changes: object) -> OpenELM:
    """The uneven model with weights that make some tokens likely and attention sharp."""
    model = OpenELM(ModelConfig(**{**small_models.UNEVEN, **changes}))
    generator = torch.Generator().manual_seed(3)
    for tensor in model.parameters():
        tensor.data.normal_(1.0 if tensor.dim() == 1 else 0.0, 2 * tensor.shape[-1] ** -0.5, generator=generator)
    return model.to(dtype).eval()


@pytest.fixture(scope="module")
def model() -> OpenELM:
    return make()


@torch.no_grad()
def by_itself(model: OpenELM, request: Request) -> Likelihood:
    """The plain way: all logits of one request, without anything shared."""
    ids, count = request.context + request.continuation, len(request.continuation)
    read = ids[-(model.config.max_context_length + 1) :][:-1]
    log_probabilities = model(torch.tensor([read]))[0].float().log_softmax(-1)[-count:]
    targets = torch.tensor(request.continuation)
    logprob = log_probabilities.gather(1, targets[:, None]).double().sum().item()
    return Likelihood(logprob, bool((log_probabilities.argmax(-1) == targets).all()))


def check(model: OpenELM, requests: Sequence[Request], found: Sequence[Likelihood]) -> None:
    expected = [by_itself(model, request) for request in requests]
    assert [one.greedy for one in found] == [one.greedy for one in expected]
    # fp32 with sums in another order; the largest are a few hundred.
    assert [one.logprob for one in found] == pytest.approx([one.logprob for one in expected], abs=1e-5, rel=1e-6)


def requests_of_all_kinds(model: OpenELM, seed: int) -> list[Request]:
    """Questions with and without common examples, answers of one token and many, prefixes of each other, too long."""
    draw = random.Random(seed)

    def words(count: int) -> tuple[int, ...]:
        return tuple(draw.randrange(3, 448) for _ in range(count))

    examples, made = [words(30), words(20)], []
    for number in range(24):
        start = (1,) if number % 3 == 0 else (1, *examples[number % 2])
        context = start + words(draw.randrange(1, 25))
        answers = [words(draw.choice([1, 1, 1, 2, 6])) for _ in range(4)]
        if number % 4 == 0:  # another context for the same answer
            made += [Request(context + answer, answers[0]) for answer in answers]
        made += [Request(context, answer) for answer in answers]
    made += made[:6]
    whole = examples[0]
    made += [Request(whole[:cut], whole[cut:]) for cut in range(1, 30, 4)]
    made += [Request(whole[:cut], words(2)) for cut in range(1, 30, 5)]
    made += [Request(words(90), words(3)), Request(words(5), words(CONTEXT)), Request((1,), words(CONTEXT))]
    for request in made[:12]:  # what the model itself would write, so that some are greedy
        with torch.no_grad():
            best = model(torch.tensor([request.context]))[0, -1].argmax().item()
        made.append(Request(request.context, (int(best),)))
    draw.shuffle(made)
    return made


@pytest.mark.parametrize("changes", GEOMETRIES.values(), ids=GEOMETRIES)
@pytest.mark.parametrize(("row", "batch_tokens"), [(256, None), (256, 1), (16, 64), (8, 1), (8, 500)])
def test_each_likelihood_is_that_of_the_request_by_itself(changes, row, batch_tokens, monkeypatch):
    monkeypatch.setattr(likelihood, "ROW", row)
    model = make(**changes)
    requests = requests_of_all_kinds(model, seed=row)
    found = likelihoods(model, requests, batch_tokens=batch_tokens)
    assert 5 < sum(one.greedy for one in found) < len(requests) / 2
    check(model, requests, found)


def test_a_request_alone_and_in_company_differ_by_rounding_only(model):
    requests = requests_of_all_kinds(model, seed=9)
    together = likelihoods(model, requests, batch_tokens=2000)
    for request, one in zip(requests[:40], together, strict=False):
        (alone,) = likelihoods(model, [request])
        assert alone.logprob == pytest.approx(one.logprob, abs=1e-5, rel=1e-6)


def test_in_bf16_company_matters_less_than_bf16_itself():
    half, exact = make(torch.bfloat16), make()
    exact.load_state_dict(half.state_dict())
    requests = requests_of_all_kinds(exact, seed=4)
    together, few = likelihoods(half, requests, batch_tokens=4000), likelihoods(half, requests, batch_tokens=1)
    plain, fp32 = [by_itself(half, request) for request in requests], likelihoods(exact, requests)

    def per_token(ones: Sequence[Likelihood], others: Sequence[Likelihood]) -> float:
        apart = [
            abs(one.logprob - other.logprob) / len(request.continuation)
            for one, other, request in zip(ones, others, requests, strict=True)
        ]
        return sum(apart) / len(apart)

    rounding = per_token(plain, fp32)
    assert rounding > 1e-3
    assert per_token(together, few) < rounding
    assert per_token(together, fp32) < 1.5 * rounding


class Counted:
    """The shapes that a model was run on."""

    def __init__(self, model: OpenELM, monkeypatch: pytest.MonkeyPatch) -> None:
        self.shapes: list[tuple[int, int]] = []
        hidden = model.hidden

        def counting(ids: torch.Tensor, **rest: object) -> torch.Tensor:
            self.shapes.append(tuple(ids.shape))
            return hidden(ids, **rest)

        monkeypatch.setattr(model, "hidden", counting)

    @property
    def tokens(self) -> int:
        return sum(rows * columns for rows, columns in self.shapes)


def test_answers_of_one_token_cost_no_more_than_their_question(model, monkeypatch):
    counted = Counted(model, monkeypatch)
    question = tuple(range(10, 40))
    found = likelihoods(model, [Request(question, (letter,)) for letter in (5, 6, 7, 8)])
    assert counted.shapes == [(1, 30)]
    check(model, [Request(question, (letter,)) for letter in (5, 6, 7, 8)], found)


def test_a_question_is_read_once_for_all_its_answers(model, monkeypatch):
    counted = Counted(model, monkeypatch)
    requests = [Request(tuple(range(10, 40)), (5, first, 7)) for first in (50, 51, 52)]
    likelihoods(model, requests)
    assert counted.shapes == [(1, 30 + 1 + 3)]  # all answers begin alike; the last token is not read


def test_examples_common_to_all_questions_are_read_once(model, monkeypatch):
    draw = random.Random(1)
    examples = (1, *(draw.randrange(3, 448) for _ in range(39)))
    questions = [examples + tuple(draw.randrange(3, 448) for _ in range(12)) for _ in range(200)]
    requests = [Request(question, (letter,)) for question in questions for letter in (5, 6, 7, 8)]
    counted = Counted(model, monkeypatch)
    found = likelihoods(model, requests)
    assert counted.shapes[0] == (1, 40)
    assert counted.tokens <= 40 + 1.1 * 200 * 12
    check(model, requests[::40], found[::40])


def test_a_continuation_may_begin_within_what_is_shared(model, monkeypatch):
    monkeypatch.setattr(likelihood, "ROW", 8)
    start = tuple(range(3, 43))
    requests = [Request(start[:cut], (*start[cut:], 50 + last, 9)) for cut in (5, 38) for last in range(20)]
    forest = Forest(sorted({(r.context + r.continuation)[:-1] for r in requests}), _by_input(requests), requests)
    assert {len(trunk.ids) for trunk in _trunks(forest.root)} == {0, 4}
    check(model, requests, likelihoods(model, requests))


def _by_input(requests: list[Request]) -> dict[tuple[int, ...], list[int]]:
    found: dict[tuple[int, ...], list[int]] = {}
    for index, request in enumerate(requests):
        found.setdefault((request.context + request.continuation)[:-1], []).append(index)
    return found


def _trunks(trunk: Trunk) -> list[Trunk]:
    return [trunk, *(found for inner in trunk.inner for found in _trunks(inner))]


def test_every_input_stands_in_one_tree_however_they_branch():
    """A comb that branches at each of 1,500 tokens, beside chains and strangers: no recursion as deep as that."""
    spine = tuple(range(1500))
    inputs = sorted(
        {spine[:cut] + (9999,) * 40 for cut in range(1, 1500)} | {spine[:cut] for cut in range(2, 1500, 7)} | {(7, 7)}
    )
    requests = [Request(ids, (1,)) for ids in inputs]
    forest = Forest(inputs, {ids: [index] for index, ids in enumerate(inputs)}, requests)
    spans = sorted(tree for trunk in _trunks(forest.root) for tree in trunk.trees)
    assert [start for start, _ in spans] == [0, *(stop for _, stop in spans[:-1])]
    assert spans[-1][1] == len(inputs)
    for trunk in _trunks(forest.root):
        for start, stop in trunk.trees:
            assert all(inputs[index][: len(trunk.ids)] == trunk.ids for index in range(start, stop))
        packed = [tree for rows in forest.batches(trunk, 4000) for row in rows for tree in row]
        assert sorted(packed) == sorted(trunk.trees)


def test_done_is_told_every_result_once(model):
    requests = [*requests_of_all_kinds(model, seed=2), Request((1,), ())]
    told: dict[int, Likelihood] = {}

    def done(index: int, found: Likelihood) -> None:
        assert index not in told
        told[index] = found

    found = likelihoods(model, requests, done=done, batch_tokens=100)
    assert [told[index] for index in range(len(requests))] == found
    assert found[-1] == Likelihood(0.0, True)


def test_nothing_asked_nothing_answered(model):
    assert likelihoods(model, []) == []
    assert likelihoods(model, [Request((1,), ())]) == [Likelihood(0.0, True)]


def test_gradients_and_random_numbers_are_left_alone(model):
    state = torch.get_rng_state()
    likelihoods(model, [Request((1, 2), (3,))])
    assert torch.equal(torch.get_rng_state(), state)
    loss = model(torch.tensor([[1, 2]])).sum()
    loss.backward()
    model.zero_grad()


@pytest.mark.parametrize(
    ("request_", "message"),
    [
        (Request((), (3,)), "a continuation without context: its first token needs one before it, for instance a BOS"),
        (Request((1,), (3,) * 65), "a continuation of 65 tokens exceeds the model's context of 64: shorten it"),
        (Request((1, 448), (3,)), "token id 448 is outside the model's vocabulary of 448"),
        (Request((1,), (-1,)), "token id -1 is outside the model's vocabulary of 448"),
    ],
)
def test_what_has_no_likelihood_is_refused(model, request_, message):
    with pytest.raises(UserError, match=f"^{message}$"):
        likelihoods(model, [Request((1,), (2,)), request_])


def test_a_batch_of_nothing_is_refused(model):
    with pytest.raises(UserError, match="batch_tokens=0 must be at least 1"):
        likelihoods(model, [Request((1,), (2,))], batch_tokens=0)


def test_damaged_weights_are_named():
    model = make()
    model.norm.weight.data[0] = float("nan")
    with pytest.raises(UserError, match="a likelihood is not finite: damaged weights"):
        likelihoods(model, [Request((1,), (2,))])
