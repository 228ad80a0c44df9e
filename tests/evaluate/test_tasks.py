"""lm-eval's tasks with local data and examples: prompts and scores equal lm-eval's own; bad input is named."""

import json
import logging
import random
import socket
import time
import zlib
from contextlib import contextmanager

import pytest

pytest.importorskip("lm_eval")

from openelm.data.records import read
from openelm.errors import UserError
from openelm.evaluate import task_data, tasks
from openelm.evaluate.suites import Spec, known, suite

DRAW = random.Random(5)
THINGS = ("apple", "bread", "cloud", "door", "earth", "fire", "glass", "house", "iron", "jar", "kite", "lamp", "moon")


def words(count):
    return " ".join(DRAW.choices(THINGS, k=count))


def arc(number):
    labels = "1234" if number % 7 == 0 else "ABCD"[: 3 + number % 2]
    texts = [words(2) for _ in labels]
    choices = {"text": texts, "label": list(labels)}
    return {"id": str(number), "question": words(6) + "?", "choices": choices, "answerKey": labels[number % 3]}


def piqa(number):
    return {"goal": words(5), "sol1": words(4), "sol2": words(6), "label": number % 2}


def winogrande(number):
    sentence = f"{words(3)} _ {words(4)}."
    return {"sentence": sentence, "option1": words(1), "option2": words(1), "answer": "12"[number % 2]}


def crows(number):
    kind = ("age", "gender", "race-color")[number % 3]
    return {"id": number, "sent_more": words(7), "sent_less": words(7), "bias_type": kind}


def hellaswag(number):
    one = {"activity_label": words(1), "ctx_a": words(5), "ctx_b": words(3)}
    return one | {"endings": [words(4) for _ in range(4)], "label": str(number % 4)}


MADE_UP = {  # task: folder, splits, a record
    "arc_easy": ("ai2_arc/ARC-Easy", ("train", "test"), arc),
    "piqa": ("piqa", ("train", "validation"), piqa),
    "winogrande": ("winogrande/winogrande_xl", ("train", "validation"), winogrande),
    "crows_pairs_english": ("crows_pairs/english", ("test",), crows),
    "hellaswag": ("hellaswag", ("train", "validation"), hellaswag),
}


def write(path, records):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Twenty examples of five tasks, for each of the splits that they read."""
    folder = tmp_path_factory.mktemp("data")
    for place, splits, record in MADE_UP.values():
        for split in splits:
            write(folder / place / f"{split}.jsonl", [record(number) for number in range(20)])
    return folder


def at(task, shots=0):
    return Spec(task, "acc", shots, task)


def prompts(task_dict):
    found = []
    for task in task_dict["tasks"].values():
        task.build_all_requests()
        found += [request.args for request in task.instances]
    return found


@contextmanager
def from_lm_evals_own_hands(folder, monkeypatch):
    """datasets.load_dataset reads JSON lines of a folder by itself, as another program would."""
    import datasets

    own = datasets.load_dataset

    def load(path, name=None, **_):
        place = folder / (path.rsplit("/", 1)[-1].replace("_multilingual", "")) / (name or "")
        return own("json", data_files={file.stem: str(file) for file in place.iterdir()}, cache_dir=str(folder / "c"))

    monkeypatch.setattr(datasets, "load_dataset", load)
    yield
    monkeypatch.undo()


def simple_evaluate(task, shots, score, folder, monkeypatch, limit=None):
    """What lm-eval itself asks a model: requests in order, from its own way of loading and sampling."""
    from lm_eval.evaluator import simple_evaluate

    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    asked = []

    def likelihood(context, continuation):
        asked.append((context, continuation))
        return -float(len(continuation))

    with from_lm_evals_own_hands(folder, monkeypatch):
        found = simple_evaluate(
            score.model(likelihood),
            tasks=[task],
            num_fewshot=shots,
            task_manager=tasks._index(False),
            bootstrap_iters=0,
            limit=limit,
        )
    return asked, found["results"][task]


@pytest.mark.parametrize("shots", [0, 5])
@pytest.mark.parametrize("task", MADE_UP)
def test_prompts_and_scores_equal_those_of_simple_evaluate(task, shots, data, score, monkeypatch, tmp_path):
    asked, theirs = simple_evaluate(task, shots, score, data, monkeypatch)
    assert prompts(tasks.load(at(task, shots), data)) == asked
    ours = score(tasks.load(at(task, shots), data), lambda _, continuation: -float(len(continuation)))[task]
    metrics = {name for name, value in theirs.items() if isinstance(value, float)}
    assert metrics and {name: ours[name] for name in metrics} == {name: theirs[name] for name in metrics}
    assert len(asked) >= 40


@pytest.mark.parametrize(("task", "shots"), [("arc_easy", 0), ("arc_easy", 5), ("crows_pairs_english", 5)])
def test_prompts_of_the_real_data_equal_those_of_simple_evaluate(task, shots, shared, score, monkeypatch, tmp_path):
    # Copied, because datasets writes beside what it reads here.
    for place, splits, _ in (MADE_UP[task],):
        for split in splits:
            lines = (shared / "data" / "evaluation" / place / f"{split}.jsonl").read_text().splitlines()[:200]
            write(tmp_path / place / f"{split}.jsonl", map(json.loads, lines))
    asked, _ = simple_evaluate(task, shots, score, tmp_path, monkeypatch)
    assert prompts(tasks.load(at(task, shots), tmp_path)) == asked


@pytest.mark.parametrize("task", ["arc_challenge", "arc_easy", "piqa", "winogrande", "crows_pairs_english"])
def test_the_real_data_are_read_whole(task, shared, score):
    sizes = {"piqa": 1838, "winogrande": 1267, "crows_pairs_english": 1508, "arc_easy": 2376, "arc_challenge": 1172}
    loaded = tasks.load(at(task), shared / "data" / "evaluation")
    assert len(loaded["tasks"][task].eval_docs) == sizes[task]
    results = score(loaded, lambda context, text: -float(zlib.crc32((context + text).encode())), limit=100)[task]
    metric = "pct_stereotype" if task.startswith("crows") else "acc"
    assert 0.1 < results[f"{metric},none"] < 0.7  # chance


def test_categories_of_crows_pairs_share_one_file(data):
    sizes = [len(tasks.load(at(f"crows_pairs_english_{kind}"), data)["tasks"].popitem()[1].eval_docs) for kind in
             ("age", "gender", "race_color")]  # fmt: skip
    assert sizes == [7, 7, 6]


def test_examples_are_chosen_by_the_seed_and_again_alike(data):
    first, again = (prompts(tasks.load(at("piqa", 3), data)) for _ in range(2))
    assert first == again
    assert prompts(tasks.load(at("piqa", 3), data, seed=7)) != first


def test_without_examples_their_file_is_not_needed(data, tmp_path):
    write(tmp_path / "piqa" / "validation.jsonl", [piqa(0)])
    assert len(prompts(tasks.load(at("piqa"), tmp_path))) == 2
    with pytest.raises(UserError, match=r"piqa needs .*piqa/train\.jsonl, and there is validation\.jsonl"):
        tasks.load(at("piqa", 1), tmp_path)


def test_every_format_gives_the_same_prompts(data, tmp_path):
    import pyarrow
    import pyarrow.parquet

    records = list(read(str(data / "piqa" / "validation.jsonl")))
    wanted = prompts(tasks.load(at("piqa"), data))
    folders = {kind: tmp_path / kind / "piqa" for kind in ("json", "lines", "parquet", "parts")}
    for folder in folders.values():
        folder.mkdir(parents=True)
    (folders["json"] / "validation.json").write_text(json.dumps(records, indent=1))
    (folders["lines"] / "validation.json").write_text("\ufeff" + "\r\n\n".join(map(json.dumps, records)))
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(records), folders["parquet"] / "validation.parquet")
    for number, part in enumerate((records[:7], records[7:])):
        table = pyarrow.Table.from_pylist(part)
        pyarrow.parquet.write_table(table, folders["parts"] / f"validation-0000{number}-of-00002.parquet")
    for kind, folder in folders.items():
        assert prompts(tasks.load(at("piqa"), folder.parent)) == wanted, kind
    write(folders["json"] / "validation.jsonl", records)
    with pytest.raises(UserError, match="one split"):
        tasks.load(at("piqa"), folders["json"].parent)


def without(record, column):
    return {key: value for key, value in record.items() if key != column}


@pytest.mark.parametrize(
    ("task", "column"),
    [
        ("piqa", "goal"),  # in a template
        ("piqa", "sol2"),
        ("piqa", "label"),  # lm-eval would take "label" itself for the answer
        ("arc_easy", "choices"),
        ("arc_easy", "answerKey"),
        ("winogrande", "option1"),  # in a function
        ("winogrande", "answer"),
        ("crows_pairs_english", "sent_less"),
        ("hellaswag", "ctx_b"),  # in the function that prepares a document
        ("hellaswag", "label"),
    ],
)
def test_a_missing_column_is_named_with_its_file(task, column, tmp_path):
    place, splits, record = MADE_UP[task]
    good = [record(number) for number in range(8)]
    bad = [without(one, column) for one in good]
    last = write(tmp_path / "eval" / place / f"{splits[-1]}.jsonl", bad)
    with pytest.raises(UserError, match=f"{last} has no column '{column}', which the task {task} needs"):
        tasks.load(at(task), tmp_path / "eval")
    if len(splits) == 2:
        write(tmp_path / "shots" / place / f"{splits[-1]}.jsonl", good)
        train = write(tmp_path / "shots" / place / "train.jsonl", bad)
        with pytest.raises(UserError, match=f"{train} has no column '{column}'"):
            tasks.load(at(task, 2), tmp_path / "shots")


@pytest.mark.parametrize(("task", "column"), [("piqa", "goal"), ("piqa", "label"), ("winogrande", "option2")])
def test_an_empty_value_is_named_with_its_record(task, column, tmp_path):
    place, splits, record = MADE_UP[task]
    records = [record(number) for number in range(5)]
    file = write(tmp_path / place / f"{splits[-1]}.jsonl", [*records, without(record(5), column)])
    with pytest.raises(UserError, match=f"{file}: record 6 has no '{column}'"):
        tasks.load(at(task), tmp_path)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "has no record"),
        ('{"goal": "a"\n', "line 1 is no JSON"),
        ("[1, 2]\n", "line 1 is no JSON object"),
        ('{"goal": "a"}\n{"goal": 3}\n', "values of several kinds"),
        (b"\xff\xfe\x00", "cannot be read"),
    ],
)
def test_damaged_files_are_named(content, message, tmp_path):
    file = tmp_path / "piqa" / "validation.jsonl"
    file.parent.mkdir()
    file.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(UserError, match=f"{file}.*{message}"):
        tasks.load(at("piqa"), tmp_path)


def test_a_value_that_the_task_cannot_use_is_told(tmp_path):
    file = write(tmp_path / "ai2_arc" / "ARC-Easy" / "test.jsonl", [arc(1) | {"answerKey": "Z"}])
    with pytest.raises(UserError, match=f"{file} does not fit the task arc_easy"):
        tasks.load(at("arc_easy"), tmp_path)


@pytest.mark.parametrize("label", ["1", 2, -1, "sol1"])
def test_an_answer_that_is_no_choice_is_refused_rather_than_never_given(label, tmp_path):
    good = [piqa(number) | {"label": str(number)} if isinstance(label, str) else piqa(number) for number in range(2)]
    file = write(tmp_path / "piqa" / "validation.jsonl", [*good, piqa(2) | {"label": label}])
    wrong, record = (label, 3) if isinstance(label, int) else ("0", 1)  # text is no number, and no choice here
    with pytest.raises(UserError, match=f"{file}: record {record}: the right answer {wrong!r} is neither"):
        tasks.load(at("piqa"), tmp_path)


def test_a_folder_without_the_dataset_says_what_it_has(data, tmp_path):
    with pytest.raises(UserError, match=r"no super_glue/boolq .* it has data for arc_easy, hellaswag, .* and 9 more"):
        tasks.load(at("boolq"), data)
    with pytest.raises(UserError, match="no task of ours"):
        tasks.load(at("boolq"), tmp_path)
    with pytest.raises(UserError, match="no piqa"):
        tasks.load(at("piqa"), tmp_path / "no-such-folder")
    assert {"arc_easy", "piqa", "winogrande", "crows_pairs_english_age"} <= set(tasks.available(data))
    assert not {"arc_challenge", "boolq", "mmlu", "commonsense_piqa"} & set(tasks.available(data))


def test_fewer_examples_than_asked_for_are_refused(data):
    with pytest.raises(UserError, match="arc_easy: 21 examples cannot be had of 20"):
        tasks.load(at("arc_easy", 21), data)


def test_tasks_with_examples_of_their_own_take_no_others(tmp_path):
    targets = {"choices": ["yes", "no"], "labels": [1, 0]}
    record = {"question": "Is it?", "mc1_targets": targets, "mc2_targets": targets}
    write(tmp_path / "truthful_qa" / "multiple_choice" / "validation.jsonl", [record])
    assert len(prompts(tasks.load(at("truthfulqa_mc2"), tmp_path))) == 2
    with pytest.raises(UserError, match="truthfulqa_mc2@0"):
        tasks.load(at("truthfulqa_mc2", 5), tmp_path)


def test_mmlu_is_the_mean_of_its_subjects_as_the_leaderboard_took_it(tmp_path, score):
    letters = {}
    for number, leaf in enumerate(tasks._leaves(tasks._index(False), "mmlu")):
        subject = leaf.cfg["dataset_name"]
        count = 6 if number == 0 else 1
        questions = [{"question": f"{subject} {n}?", "choices": list("wxyz"), "answer": 0} for n in range(count)]
        letters |= {question["question"]: number == 0 for question in questions}
        write(tmp_path / "mmlu" / subject / "test.jsonl", questions)
        write(tmp_path / "mmlu" / subject / "dev.jsonl", [{**questions[0], "question": f"shot {n}"} for n in range(5)])
    task_dict = tasks.load(known("mmlu"), tmp_path)
    assert len(task_dict["tasks"]) == 57
    assert [len(task_dict["group_map"][name]) for name in task_dict["group_map"]] == [4, 19, 13, 12, 13]
    assert "shot 0\n" in prompts(task_dict)[0][0] and "shot 4\n" in prompts(task_dict)[0][0]

    def likelihood(context, letter):  # right in the one subject that has six questions, wrong in all others
        question = context.rsplit("\n\n", 1)[-1].split("\n")[0]
        return 0.0 if (letter == " A") == letters[question] else -1.0

    results = score(tasks.load(known("mmlu"), tmp_path), likelihood)
    assert results["mmlu"]["acc,none"] == pytest.approx(1 / 57)  # by questions it would be 6 / 62


def test_names_and_shots_are_read_from_the_command_line():
    assert tasks.parse("arc_easy, winogrande@5,") == (
        Spec("arc_easy", "acc_norm", 0, "ARC-e"),
        Spec("winogrande", "acc", 5, "WinoGrande"),
    )
    assert tasks.parse("mmlu@5") == (known("mmlu"),)
    assert tasks.parse("mmlu_anatomy") == (Spec("mmlu_anatomy", "acc", 0, "mmlu_anatomy"),)
    assert tasks.parse("commonsense_boolq") == (known("commonsense_boolq"),)
    assert [spec.task for spec in tasks.parse("ai2_arc@2,arc_easy@2")] == ["arc_challenge", "arc_easy"]
    for spec in suite("all"):
        assert tasks.parse(f"{spec.task}@{spec.shots}")[0].metric == spec.metric


@pytest.mark.parametrize("text", ["", " , ", "arc_easy@", "arc_easy@five", "arc_easy@-1", "arc_easy@1@2"])
def test_what_is_no_list_of_tasks_is_refused(text):
    with pytest.raises(UserError, match="arc_easy"):
        tasks.parse(text)


def test_an_unknown_task_is_refused_with_the_nearest_names(monkeypatch):
    first = tasks._index(False)
    monkeypatch.setattr(tasks, "_index", lambda everything: first)  # the whole index takes ten seconds
    for name, near in {
        "arc_esy": "arc_easy",
        "winogrand": "winogrande",
        "commonsense_obqa": "commonsense_boolq",
    }.items():
        with pytest.raises(UserError, match=f"no task '{name}'.*{near}"):
            tasks.parse(name)
        with pytest.raises(UserError, match=near):
            tasks.load(at(name))
    with pytest.raises(UserError, match="arc_challenge, arc_easy"):
        tasks.load(at("ai2_arc"))
    with pytest.raises(UserError, match="lm_eval ls tasks"):
        tasks.parse("§§§§")


def test_without_lm_eval_its_extra_is_named(monkeypatch):
    import sys

    monkeypatch.setitem(sys.modules, "lm_eval", None)
    with pytest.raises(UserError, match=r"openelm-framework\[eval\]"):
        tasks.load(at("piqa"))


@pytest.fixture
def endpoint(monkeypatch):
    """``endpoint("http://…")`` stands for the Hub."""
    from huggingface_hub import constants

    task_data._silence.cache_clear()
    yield lambda url: monkeypatch.setattr(constants, "ENDPOINT", url)
    task_data._silence.cache_clear()


def test_without_network_and_cache_the_way_around_is_told_at_once(endpoint):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        endpoint(f"http://127.0.0.1:{free.getsockname()[1]}")  # nobody listens
        start_s = time.monotonic()
        with pytest.raises(UserError, match=r"does not answer.*`openelm evaluate --tasks boolq --prefetch`.*OFFLINE=1"):
            tasks.load(at("boolq"))
        with pytest.raises(UserError, match=r"--tasks mmlu --prefetch"):
            tasks.load(at("mmlu", 5))
        assert time.monotonic() - start_s < 5


def test_without_network_the_cache_serves_at_once(endpoint, data, tmp_path, monkeypatch):
    import datasets

    # What an earlier download has left: datasets writes the same files, whatever it has read.
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path)
    datasets.load_dataset("json", data_files={"validation": str(data / "piqa" / "validation.jsonl")})
    (written,) = tmp_path.glob("json/*/*/*/dataset_info.json")
    place = tmp_path / "baber___piqa" / "default" / "0.0.0" / ("0123456789" * 4)
    place.mkdir(parents=True)
    info = json.loads(written.read_text()) | {"builder_name": "parquet", "dataset_name": "piqa"}
    (place / "dataset_info.json").write_text(json.dumps(info | {"config_name": "default"}))
    written.with_name("json-validation.arrow").rename(place / "piqa-validation.arrow")
    endpoint("http://127.0.0.1:1")
    start_s = time.monotonic()
    assert prompts(tasks.load(at("piqa"))) == prompts(tasks.load(at("piqa"), data))
    assert time.monotonic() - start_s < 5


def test_a_hub_that_takes_calls_and_says_nothing_is_not_waited_for(endpoint, monkeypatch):
    monkeypatch.setattr(task_data, "ANSWER_S", 0.3)
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        server.listen()
        endpoint(f"http://127.0.0.1:{server.getsockname()[1]}")
        start_s = time.monotonic()
        with pytest.raises(UserError, match=r"does not answer.*--prefetch"):
            tasks.load(at("piqa"))
        assert time.monotonic() - start_s < 5


def test_offline_by_wish_is_said(monkeypatch):
    import datasets
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    with pytest.raises(UserError, match=r"HF_HUB_OFFLINE is set.*--prefetch"):
        tasks.load(at("sciq"))


def test_the_hubs_settings_are_as_before_after_a_silent_hub(endpoint):
    import datasets
    from huggingface_hub import constants

    endpoint("http://127.0.0.1:1")
    with pytest.raises(UserError):
        tasks.load(at("piqa"))
    assert (constants.HF_HUB_OFFLINE, datasets.config.HF_HUB_OFFLINE) == (False, False)


def test_prefetch_takes_every_task_once_and_names_those_that_fail(data, monkeypatch):
    import datasets

    asked = []

    def load_dataset(path, name=None, **_):
        asked.append((path, name))
        if "super_glue" in path:
            raise datasets.exceptions.DatasetNotFoundError(f"Dataset '{path}' doesn't exist on the Hub")
        folder = task_data.folder_of(data, path, name)
        return {file.stem: datasets.Dataset.from_list(list(read(str(file)))) for file in folder.iterdir()}

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    monkeypatch.setattr(task_data, "_silence", lambda endpoint: "")
    seen = []
    with pytest.raises(UserError, match=r"boolq: .*aps/super_glue.*set HF_TOKEN"):
        tasks.prefetch([at("boolq"), at("piqa"), at("piqa"), at("arc_easy")], seen.append)
    assert [(one.task, one.examples) for one in seen] == [("piqa", 40), ("arc_easy", 40)]
    assert all(one.bytes > 1000 for one in seen)
    assert asked == [("aps/super_glue", "boolq"), ("baber/piqa", None), ("allenai/ai2_arc", "ARC-Easy")]
