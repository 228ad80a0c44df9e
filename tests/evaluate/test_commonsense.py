"""The commonsense sets: contexts and continuations to the character, and scores through lm-eval."""

import json

import pytest

from openelm.errors import UserError
from openelm.evaluate import commonsense, tasks
from openelm.evaluate.suites import Spec, known, suite

PIQA = {
    "instruction": "Please choose the correct solution to the question: Open a jar?\n\nSolution1: twist\n\n"
    "Solution2: sing\n\nAnswer format: solution1/solution2",
    "input": "",
    "output": "the correct answer is solution1",
    "answer": "solution1",
}


def write(folder, name, records):
    path = folder / "commonsense" / name / "test.json"
    path.parent.mkdir(parents=True)
    path.write_text(json.dumps(records), encoding="utf-8")
    return path


def spec_of(name):
    return known(next(task for task, own in commonsense.SETS.items() if own == name))


def test_requests_are_as_corenet_makes_them_through_lm_eval(golden, tmp_path):
    pytest.importorskip("lm_eval")
    for case in golden("commonsense_requests")["cases"]:
        write(tmp_path, case["set"], [{"instruction": case["instruction"], "answer": case["answer"]}])
        spec = spec_of(case["set"])
        task = tasks.load(spec, tmp_path)["tasks"][spec.task]
        task.build_all_requests()
        assert [request.args for request in task.instances] == [
            (case["context"], continuation) for continuation in case["continuations"]
        ]
        (doc,) = task.eval_docs
        assert case["continuations"][task.doc_to_target(doc)] == f"the correct answer is {case['answer']}"


def test_every_set_of_table_6_has_its_task():
    assert {spec.task for spec in suite("commonsense")} == commonsense.SETS.keys()


@pytest.mark.parametrize(
    ("words", "answers"),
    [
        ("…\n\nAnswer format: ending1/ending2/ending3/ending4", ["ending1", "ending2", "ending3", "ending4"]),
        ("Option1: a Option2: b Answer format: option1/option2", ["option1", "option2"]),
        ("…\n\nAnswer format: true/false", ["true", "false"]),
        ("Answer format: a/b, it said. What now?", []),
        ("no format", []),
    ],
)
def test_answers_to_choose_from_stand_at_the_end_of_the_instruction(words, answers):
    assert commonsense.continuations(words) == [f"the correct answer is {answer}" for answer in answers]


def test_acc_takes_the_largest_sum_and_acc_norm_the_largest_per_character(tmp_path, score):
    pytest.importorskip("lm_eval")
    boolq = {"instruction": "Is it?\n\nAnswer format: true/false", "input": "", "answer": "false"}
    write(tmp_path, "boolq", [boolq])
    # -10 / 26 characters of "… true" against -10.2 / 27 of "… false": the sum says true, the mean says false.
    scores = {"the correct answer is true": -10.0, "the correct answer is false": -10.2}
    results = score(tasks.load(spec_of("boolq"), tmp_path), lambda context, text: scores[text])
    assert results["commonsense_boolq"]["acc,none"] == 0.0
    assert results["commonsense_boolq"]["acc_norm,none"] == 1.0


def test_a_set_beside_lm_evals_data_of_the_same_name_is_told_apart(tmp_path):
    pytest.importorskip("lm_eval")
    (tmp_path / "piqa").mkdir()
    (tmp_path / "piqa" / "test.json").write_text(json.dumps([{"goal": "x"}]))
    with pytest.raises(UserError, match=r"piqa/test.json: record 1 has no text in the column 'instruction'"):
        tasks.load(spec_of("piqa"), tmp_path)
    write(tmp_path, "piqa", [PIQA])
    assert len(tasks.load(spec_of("piqa"), tmp_path)["tasks"]["commonsense_piqa"].eval_docs) == 1


def test_what_is_not_of_this_form_is_refused_by_record(tmp_path):
    path = write(tmp_path, "piqa", [PIQA, {**PIQA, "answer": "solution3"}])
    with pytest.raises(UserError, match=r"record 2: the answer 'solution3'"):
        commonsense.read(path)
    path.write_text("[]")
    assert commonsense.read(path) == []
    with pytest.raises(UserError, match="no record"):
        tasks.load(spec_of("piqa"), tmp_path)
    with pytest.raises(UserError, match="without examples"):
        tasks.load(Spec("commonsense_piqa", "acc", 5, "PIQA"), tmp_path)
    with pytest.raises(UserError, match=r"commonsense/boolq/test\.json"):
        tasks.load(spec_of("boolq"), tmp_path)


def test_a_prefetched_set_is_found_without_a_folder(tmp_path, monkeypatch):
    pytest.importorskip("lm_eval")
    monkeypatch.setenv("OPENELM_CACHE", str(tmp_path / "cache"))
    with pytest.raises(UserError, match=r"--tasks commonsense_piqa --prefetch"):
        tasks.load(spec_of("piqa"))
    for server, content in {"busy": "<html>busy</html>", "well": json.dumps([PIQA, PIQA])}.items():
        source = tmp_path / server / "dataset" / "piqa" / "test.json"
        source.parent.mkdir(parents=True)
        source.write_text(content)
    monkeypatch.setattr(commonsense, "SOURCE", f"file://{tmp_path / 'busy'}")
    with pytest.raises(UserError):
        tasks.prefetch([spec_of("piqa")])
    assert not commonsense.cache_file("piqa").exists()  # what is no set is not kept
    monkeypatch.setattr(commonsense, "SOURCE", f"file://{tmp_path / 'well'}")
    (fetched,) = tasks.prefetch([spec_of("piqa")])
    assert (fetched.bytes, fetched.examples) == (source.stat().st_size, 2)
    assert len(tasks.load(spec_of("piqa"))["tasks"]["commonsense_piqa"].eval_docs) == 2


@pytest.mark.parametrize("name", commonsense.SETS.values())
def test_every_record_of_the_real_sets_can_be_asked(shared, name):
    path = shared / "data" / "commonsense" / name / "test.json"
    if not path.is_file():
        pytest.skip("this set is not in the folder `shared`")
    records = json.loads(path.read_text(encoding="utf-8"))
    read = commonsense.read(path)
    assert [one["continuations"][one["gold"]] for one in read] == [record["output"] for record in records]
