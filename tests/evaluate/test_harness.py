"""Our engine under lm-eval gives what lm-eval's own model for transformers gives, and goes on where it was."""

import logging
import random
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import small_models
from openelm.data.chat import CHAT_TEMPLATE, render_chat
from openelm.data.tokenizer import Tokenizer
from openelm.errors import UserError
from openelm.evaluate import harness
from openelm.evaluate.harness import EngineLM, measure
from openelm.evaluate.suites import Spec
from openelm.infer.engine import Engine
from openelm.interop import transformers_folder
from openelm.model.folder import save_model
from openelm.model.geometry import ModelConfig
from openelm.model.transformer import OpenELM
from small_tasks import instances, words_task, write_words

pytest.importorskip("lm_eval")
pytest.importorskip("transformers")

REAL = [
    ("arc_easy", 0),
    ("arc_easy", 5),
    ("arc_challenge", 0),
    ("arc_challenge", 5),
    ("piqa", 0),
    ("winogrande", 0),
    ("crows_pairs_english", 0),
]


def transformers_lm(folder: Path, **options: Any) -> Any:
    """lm-eval's own model on the same folder."""
    import openelm.interop.huggingface  # noqa: F401 (makes the Auto classes know OpenELM)

    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    from lm_eval.models.huggingface import HFLM

    return HFLM(str(folder), device="cpu", **{"dtype": "float32", "batch_size": 4, "add_bos_token": True, **options})


def write(folder: Path, model: OpenELM, tokenizer: Tokenizer, dtype: torch.dtype = torch.float32) -> Path:
    transformers_folder.complete(save_model(model, folder, tokenizer=tokenizer, dtype=dtype))
    return folder


def sharpened(golden_weights: Any, config: ModelConfig) -> OpenELM:
    """Golden weights, matrices doubled: a text of one token over and over would hide a wrong position."""
    with torch.device("meta"):
        model = OpenELM(config)
    weights = golden_weights(model, 5)
    model.load_state_dict({name: w * (1 + (w.dim() > 1)) for name, w in weights.items()}, assign=True)
    return model


@pytest.fixture(scope="module")
def folder(tmp_path_factory, golden_weights, tokenizer_file) -> Path:
    """The uneven model with a context of 64 and a tokenizer of 400 pieces."""
    model = sharpened(golden_weights, ModelConfig(**{**small_models.UNEVEN, "vocab_size": 400}))
    # It never writes single bytes: the libraries show half a character differently.
    model.token_embeddings.weight.data[3:259] = 0
    return write(tmp_path_factory.mktemp("model") / "model", model, Tokenizer.load(tokenizer_file))


@pytest.fixture(scope="module")
def engine(folder) -> Engine:
    return Engine.load(folder, device="cpu")


@pytest.fixture(scope="module")
def theirs(folder) -> Any:
    return transformers_lm(folder, max_length=64)


@pytest.fixture
def task(tmp_path) -> Callable[..., dict[str, Any]]:
    """``task(doc_to_text=…)``: twelve questions with four answers each, as lm-eval's evaluate takes them."""
    file = write_words(tmp_path)
    return lambda **changes: words_task(file, **changes)


SPEC = Spec("words", "acc", 0, "Words")


def check(found: list[tuple[float, bool]], expected: list[tuple[float, bool]]) -> None:
    assert [one[0] for one in found] == pytest.approx([one[0] for one in expected], abs=1e-4, rel=1e-5)
    assert [one[1] for one in found] == [one[1] for one in expected]


# The same numbers as lm-eval's model for transformers


@pytest.mark.parametrize("bos", [True, False])
def test_texts_have_the_likelihoods_that_transformers_gives_them(folder, engine, bos):
    draw = random.Random(4)
    words = ["after", "all", "another", "letter", "before", "the", "mountain", "a", "river;", "naïve", "日本", "12.5\n"]
    texts = [
        (
            " ".join(draw.choices(words, k=draw.randint(1, 24))),
            " " + " ".join(draw.choices(words, k=draw.randint(1, 3))),
        )
        for _ in range(60)
    ]
    texts += [(context, answer) for context, _ in texts[:8] for answer in (" a", " river", " another letter")]
    texts += [
        ("ends with a space ", "river"),
        ("two  ", "a"),
        ("tab\t", " x"),
        ("line\n", "next"),
        ("", "Quiet, all"),
    ]
    texts += [("", "a")] if bos else []
    requests = instances("loglikelihood", texts)
    lm = EngineLM(engine, add_bos=bos)
    expected = transformers_lm(folder, max_length=64, add_bos_token=bos).loglikelihood(requests, disable_tqdm=True)
    check(lm.loglikelihood(requests), expected)
    cut = sum(len(lm.tok_encode(one + other)) > 65 for one, other in texts)
    assert lm.truncated == cut > 5


def test_whole_texts_too_in_windows(engine, theirs, text_folder):
    texts = [
        (file.read_text()[:size],) for file, size in zip(sorted(text_folder.iterdir()), (900, 400, 30, 1), strict=False)
    ]
    requests = instances("loglikelihood_rolling", texts)
    found = EngineLM(engine).loglikelihood_rolling(requests)
    assert found == pytest.approx(theirs.loglikelihood_rolling(requests, disable_tqdm=True), abs=1e-3, rel=1e-5)


def test_generated_texts_too(engine, theirs):
    prompts = ["After all", "The river", "Question: who came before the mountain", "a", "letter " * 40]
    for settings in (
        {"until": ["\n", "er"], "max_gen_toks": 12},
        {"until": "a", "max_gen_toks": 20},
        {"max_gen_toks": 8},
    ):
        requests = instances("generate_until", [(prompt, {"do_sample": False, **settings}) for prompt in prompts])
        lm = EngineLM(engine)
        found = lm.generate_until(requests)
        assert found == [theirs.generate_until([one], disable_tqdm=True)[0] for one in requests]
        assert len(set(found)) > 1
        assert lm.truncated == 1


def real_model(folder: Path, golden_weights: Any, shared: Path, config: ModelConfig) -> Path:
    tokenizer = Tokenizer.load(shared / "data" / "llama-tokenizer" / "tokenizer.model")
    return write(folder / "model", sharpened(golden_weights, config), tokenizer)


def samples(lm: Any, task_dict: dict[str, Any], limit: int) -> tuple[list[Any], dict[str, Any]]:
    """Every example's answers, and the scores."""
    from lm_eval import evaluator

    with harness._quiet(True):
        found = evaluator.evaluate(lm, task_dict, limit=limit, bootstrap_iters=0)
    (examples,) = found["samples"].values()
    answers = [answer for example in examples for answer in example["filtered_resps"]]
    (scores,) = found["results"].values()
    return answers, {name: score for name, score in scores.items() if not isinstance(score, str)}


def check_real(folder: Path, name: str, shots: int, shared: Path, limit: int) -> None:
    from openelm.evaluate import tasks

    spec, data = Spec(name, "acc", shots, name), shared / "data" / "evaluation"
    found, scores = samples(EngineLM(Engine.load(folder, device="cpu")), tasks.load(spec, data), limit)
    expected, their_scores = samples(transformers_lm(folder), tasks.load(spec, data), limit)
    assert len(found) >= 2 * limit
    check(found, expected)
    for metric in ("acc", "acc_norm", "pct_stereotype"):
        assert scores.get(f"{metric},none") == their_scores.get(f"{metric},none")


@pytest.fixture(scope="module")
def tiny(shared, tmp_path_factory, golden_weights) -> Path:
    config = ModelConfig(**{**small_models.UNEVEN, "vocab_size": 32000, "max_context_length": 2048})
    return real_model(tmp_path_factory.mktemp("tiny"), golden_weights, shared, config)


@pytest.mark.parametrize(("name", "shots"), REAL)
def test_real_examples_have_the_likelihoods_that_transformers_gives_them(tiny, shared, name, shots):
    check_real(tiny, name, shots, shared, limit=8)


@pytest.mark.slow  # 200 examples of each task take minutes
@pytest.mark.parametrize(("name", "shots"), REAL)
def test_two_hundred_real_examples_too(tiny, shared, name, shots):
    check_real(tiny, name, shots, shared, limit=200)


@pytest.fixture(scope="module")
def large(shared, tmp_path_factory, golden_weights) -> Path:
    config = ModelConfig.from_name("270M", vocab_size=32000)
    return real_model(tmp_path_factory.mktemp("large"), golden_weights, shared, config)


@pytest.mark.slow  # a 270M model in fp32 on a CPU: minutes for each task
@pytest.mark.parametrize(("name", "shots"), REAL)
def test_the_270m_too(large, shared, name, shots):
    check_real(large, name, shots, shared, limit=24 if shots else 200)


# Speed


@pytest.mark.slow  # minutes of a 270M model; -s shows the figures
@pytest.mark.parametrize("batch_size", [8, 1])  # of lm-eval's model: which is better for it depends on the shots
@pytest.mark.parametrize(("shots", "least"), [(0, 2), (5, 3)])
def test_it_is_faster_than_lm_evals_model_for_transformers(shared, tmp_path, golden_weights, shots, least, batch_size):
    from openelm.evaluate import tasks

    tokenizer = Tokenizer.load(shared / "data" / "llama-tokenizer" / "tokenizer.model")
    model = sharpened(golden_weights, ModelConfig.from_name("270M", vocab_size=32000))
    folder = write(tmp_path / "model", model, tokenizer, torch.bfloat16)
    spec = Spec("arc_easy", "acc", shots, "ARC-e")
    loaded = tasks.load(spec, shared / "data" / "evaluation")
    limit = 24 if not shots else 8
    theirs, ours = transformers_lm(folder, dtype="bfloat16", batch_size=batch_size), Engine.load(folder, device="cpu")
    measure(EngineLM(ours), loaded, spec, limit=2), measure(theirs, loaded, spec, limit=2)
    ratios = []
    for _ in range(3):
        start_s = time.process_time()
        measure(EngineLM(ours), loaded, spec, limit=limit)
        between_s = time.process_time()
        measure(theirs, loaded, spec, limit=limit)
        end_s = time.process_time()
        ratios.append((end_s - between_s) / (between_s - start_s))
        print(f"{shots} shots: {between_s - start_s:.2f} s ours, {end_s - between_s:.2f} s theirs, {ratios[-1]:.2f}x")
    print(f"{shots} shots, {limit} questions, batch size {batch_size}: median {statistics.median(ratios):.2f}x")
    assert statistics.median(ratios) > least


# What is measured


def test_a_measurement_says_what_it_is(engine, theirs, task, capsys):
    lm = EngineLM(engine)
    lm.loglikelihood(instances("loglikelihood", [("letter " * 80, " a")]))  # what came before does not count
    loaded = task()
    capsys.readouterr()
    found, expected = measure(lm, loaded, SPEC), measure(theirs, loaded, SPEC)
    assert capsys.readouterr() == ("", "")
    assert found.metrics.keys() == {"acc", "acc_stderr", "acc_norm", "acc_norm_stderr"}
    assert found.metrics == expected.metrics
    assert (found.task, found.shots, found.examples, found.version, found.bos) == ("words", 0, 12, "2.0", True)
    assert (found.truncated, found.limit, found.seed) == (0, None, 1234)
    assert found.elapsed_s > 0
    few = measure(EngineLM(engine, add_bos=False), task(), SPEC, limit=5)
    assert (few.examples, few.limit, few.bos) == (5, 5, False)


def test_an_error_that_is_resampled_is_silent_too(engine, task, capsys):
    loaded = task(metric_list=[{"metric": "mcc", "aggregation": "matthews_corrcoef", "higher_is_better": True}])
    capsys.readouterr()
    found = measure(EngineLM(engine), loaded, SPEC).metrics
    assert capsys.readouterr() == ("", "")
    assert -1 <= found["mcc"] <= 1
    assert 0 < found["mcc_stderr"] < 1


def test_measured_again_it_is_the_same(engine, task):
    loaded, lm = task(num_fewshot=2), EngineLM(engine)
    first, again = (measure(lm, loaded, SPEC, seed=7) for _ in range(2))
    assert first.metrics == again.metrics
    assert first.truncated == again.truncated > 0
    asked = [[one.args for one in loaded["tasks"]["words"].instances]]
    measure(lm, loaded, SPEC, seed=7)
    asked.append([one.args for one in loaded["tasks"]["words"].instances])
    measure(lm, loaded, SPEC, seed=8)
    asked.append([one.args for one in loaded["tasks"]["words"].instances])
    assert asked[0] == asked[1] != asked[2]


def test_a_group_is_measured_as_one(engine, task):
    from lm_eval.api.group import Group

    parts = {name: task(task=name)["tasks"]["words"] for name in ("one", "two")}
    metrics = [{"metric": "acc", "aggregation": "mean", "weight_by_size": False}]
    group = Group.from_config({"group": "both", "task": ["one", "two"], "aggregate_metric_list": metrics})
    for part in parts.values():
        group.add(part)
    loaded = {"tasks": parts, "groups": {"both": group}, "group_map": {"both": ["one", "two"]}}
    found = measure(EngineLM(engine), loaded, Spec("both", "acc", 0, "Both"), limit=4)
    single = measure(EngineLM(engine), task(), SPEC, limit=4)
    assert found.examples == 8
    assert found.metrics["acc"] == single.metrics["acc"]


# Interrupted, and gone on with


class Counted:
    """How many requests the engine was asked for."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.asked: list[Any] = []
        compute = harness.likelihoods

        def counting(model: OpenELM, requests: list[Any], **options: Any) -> Any:
            self.asked += requests
            return compute(model, requests, **options)

        monkeypatch.setattr(harness, "likelihoods", counting)


def test_an_interrupted_evaluation_goes_on_where_it_was(engine, task, tmp_path, monkeypatch):
    class Killed(BaseException):
        pass

    def kill(done: int, total: int) -> None:
        if done == 20:
            raise Killed

    whole = measure(EngineLM(engine), task(), SPEC)
    file, counted = tmp_path / "answers" / "model.jsonl", Counted(monkeypatch)
    with pytest.raises(Killed):
        measure(EngineLM(engine, cache=file, batch_tokens=60, progress=kill), task(), SPEC)
    asked, kept = len(counted.asked), len(file.read_text().splitlines())
    twice = 48 - asked  # among the 48
    assert kept == 20 - twice > 5
    with file.open("a") as torn:
        torn.write('{"key": "4a')
    seen: list[int] = []
    found = measure(EngineLM(engine, cache=file, progress=lambda done, total: seen.append(done)), task(), SPEC)
    assert found.metrics == whole.metrics
    assert len(counted.asked) == asked + asked - kept
    assert seen == list(range(twice + kept, 49))
    measure(EngineLM(engine, cache=file), task(), SPEC)
    assert len(counted.asked) == asked + asked - kept


def test_a_killed_process_leaves_what_it_knew_a_second_before(tmp_path, monkeypatch):
    now_s = 0.0
    monkeypatch.setattr(harness.time, "monotonic", lambda: now_s)
    file, answers = tmp_path / "answers.jsonl", harness.AnswerFile(tmp_path / "answers.jsonl")
    with answers:
        for number in range(30):
            now_s += 0.3
            answers.add(str(number), [float(number), True])
        left = file.read_bytes()  # what a kill would leave now
    assert left.count(b"\n") >= 26
    file.write_bytes(left + b'{"key": "x", "answ')
    again = harness.AnswerFile(file)
    assert "25" in again and again["25"] == [25.0, True] and "x" not in again
    with again:
        again.add("x", "text")
    assert harness.AnswerFile(file)["x"] == "text"


def test_generated_texts_are_kept_unless_drawn_by_chance(engine, tmp_path, monkeypatch):
    greedy, drawn = {"max_gen_toks": 5}, {"max_gen_toks": 5, "do_sample": True, "temperature": 2.0}
    requests = instances("generate_until", [("After", greedy), ("After", drawn), ("After", drawn)])
    first = EngineLM(engine, cache=tmp_path / "answers").generate_until(requests)
    assert first[1] != first[2]
    calls: list[int] = []
    generate = engine.generate
    monkeypatch.setattr(
        engine, "generate", lambda rows, *rest, **more: (calls.append(len(rows)), generate(rows, *rest, **more))[1]
    )
    assert EngineLM(engine, cache=tmp_path / "answers").generate_until(requests) == first
    assert calls == [2]


def test_a_full_disk_is_named(engine, tmp_path, largest_file):
    requests = instances("loglikelihood", [("a", " b")])
    with largest_file(10), pytest.raises(UserError, match=r"no space left for .*answers"):
        EngineLM(engine, cache=tmp_path / "answers").loglikelihood(requests, disable_tqdm=True)


# Conversations


def test_conversations_are_prompts_as_transformers_makes_them(folder, engine, tmp_path):
    import shutil

    instruct = tmp_path / "instruct"
    shutil.copytree(folder, instruct)
    (instruct / "chat_template.jinja").write_text(CHAT_TEMPLATE)
    lm, theirs = EngineLM(engine, chat_template=CHAT_TEMPLATE), transformers_lm(instruct, max_length=64)
    turns = [{"role": "user", "content": "Who came? "}, {"role": "assistant", "content": "Father."}]
    for count, prompt in ((1, True), (2, True), (2, False)):
        text = lm.apply_chat_template(turns[:count], add_generation_prompt=prompt)
        assert text == theirs.apply_chat_template(turns[:count], add_generation_prompt=prompt)
        assert lm.tok_encode(text) == theirs.tok_encode(text)
        assert lm.tok_encode("<s>" + text) == theirs.tok_encode("<s>" + text)
    assert lm.apply_chat_template(turns) == render_chat(turns, add_generation_prompt=True)
    begun = [turns[0], {"role": "assistant", "content": " "}]
    assert lm.apply_chat_template(begun, add_generation_prompt=False) == render_chat(begun)
    assert engine.tokenizer.eos_id in lm.tok_encode(render_chat(turns))
    assert engine.tokenizer.eos_id not in EngineLM(engine).tok_encode("</s>")
    assert (lm.chat_template(True), lm.chat_template(False)) == (CHAT_TEMPLATE, None)
    assert lm.tokenizer_name == engine.tokenizer.fingerprint


def test_conversations_are_measured(engine, task):
    lm = EngineLM(engine, chat_template="{% for turn in messages %}{{ turn['content'] }}!{% endfor %}")
    loaded = task()
    assert measure(lm, loaded, SPEC, chat=True).examples == 12
    assert all(one.args[0].endswith("Answer:!") for one in loaded["tasks"]["words"].instances)


@pytest.mark.parametrize(
    ("template", "message"),
    [(None, "the model has no chat template"), ("{% for %}", "the chat template cannot be applied")],
)
def test_a_model_that_cannot_converse_says_so(engine, template, message):
    with pytest.raises(UserError, match=message):
        EngineLM(engine, chat_template=template).apply_chat_template([{"role": "user", "content": "Who?"}])


# Refusals


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"max_gen_toks": 64}, "max_gen_toks=64 must be at least 1 and below the model's context of 64"),
        ({"num_beams": 4, "max_gen_toks": 5}, "generation settings num_beams are not known here: use temperature"),
        ({"temperature": -1.0, "max_gen_toks": 5}, "temperature=-1.0 must be at least 0"),
    ],
)
def test_settings_that_the_engine_does_not_have_are_refused(engine, settings, message):
    with pytest.raises(UserError, match=message):
        EngineLM(engine).generate_until(instances("generate_until", [("After", settings)]))


def test_without_lm_eval_it_says_what_to_install(engine, monkeypatch):
    import sys

    harness._engine_lm.cache_clear()
    monkeypatch.setitem(sys.modules, "lm_eval.api.model", None)
    with pytest.raises(UserError, match=r"lm-eval cannot be used here .*: pip install 'openelm-framework\[eval\]'"):
        EngineLM(engine)
    harness._engine_lm.cache_clear()


def test_random_numbers_are_left_alone(engine, task):
    state, plain = torch.get_rng_state(), random.getstate()
    measure(EngineLM(engine), task(), SPEC)
    assert torch.equal(torch.get_rng_state(), state)
    assert random.getstate() == plain
