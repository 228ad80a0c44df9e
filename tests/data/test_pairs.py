"""Tuning sets: exact ids and marks for every format, limits, what is left out and why, and what is held out."""

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pytest
from pyarrow import parquet

from openelm.data import instructions
from openelm.data.pairs import DROPPED, Encoding, Example, Examples, Pair, TuneSource, fingerprint, read_examples
from openelm.data.tokenizer import Tokenizer
from openelm.errors import UserError

BOS, EOS = "‹", "›"
Record = dict[str, Any]


class Letters:
    """A tokenizer of characters, in which two newlines are one token; its ids can be read."""

    bos_id, eos_id = ord(BOS), ord(EOS)

    def encode(self, text: str) -> list[int]:
        return [ord(letter) for letter in text.replace("\n\n", "¶")]


def shown(example: Example) -> str:
    """Ids as text, those that count in brackets."""
    words = ""
    counts = [*example.counts.tolist(), False]
    for place, id in enumerate(example.ids.tolist()):
        words += "[" * (counts[place] and not counts[place - 1]) + chr(id)
        words += "]" * (counts[place] and not counts[place + 1])
    return words


def user(content: Any) -> Record:
    return {"role": "user", "content": content}


def assistant(content: Any) -> Record:
    return {"role": "assistant", "content": content}


@pytest.fixture
def read(tmp_path: Path) -> Callable[..., Examples]:
    """Examples of the given records in one format."""

    def made(format: Any, *records: Record, held_out: float = 0.0, validation: int = 0, **options: Any) -> Examples:
        path = tmp_path / f"{format}.jsonl"
        path.write_text("".join(json.dumps(record) + "\n" for record in records))
        keys = {key: options.pop(key) for key in list(options) if key.endswith("_key")}
        source = TuneSource("s", str(path), format, **keys)
        encoding = Encoding(**{"row_length": 200, **options})
        return read_examples([source], Letters(), encoding, held_out=held_out, validation=validation)

    return made


def account(examples: Examples) -> dict[str, int]:
    """What is not zero."""
    return {name: count for name, count in examples.account.items() if count}


# Formats


TALK = [user("Hi"), assistant("yes"), user("So?\n"), assistant(" no")]
IN_WORDS = "‹<|user|>\nHi›\n<|assistant|>\n[yes›]\n<|user|>\nSo?\n›\n<|assistant|>\n[ no›]"


@pytest.mark.parametrize(
    ("format", "record", "words"),
    [
        ("text", {"text": " all\n"}, "‹[ all\n›]"),
        ("prompt", {"prompt": "2+2= ", "answer": "4\n", "more": 1}, "‹2+2= [4\n›]"),
        ("prompt", {"prompt": "", "answer": "4"}, "‹[4›]"),
        ("prompt", {"prompt": "Q\n", "answer": "\nA"}, "‹Q[¶A›]"),  # the token across the boundary is the answer's
        ("chat", {"messages": TALK}, IN_WORDS),
        ("chat", {"messages": [*TALK, user("and left unanswered")]}, IN_WORDS),
        ("chat", {"messages": [assistant("yes") | {"weight": 1, "tool_calls": None}]}, "‹<|assistant|>\n[yes›]"),
    ],
)
def test_ids_and_what_counts_of_them(format, record, words, read):
    (example,) = read(format, record).train
    assert shown(example) == words
    assert (example.ids.dtype, example.counts.dtype) == (np.int32, np.bool_)
    (everything,) = read(format, record, loss_on="all").train
    assert shown(everything) == f"‹[{words[1:].replace('[', '').replace(']', '')}]"


def test_the_handbooks_empty_system_turn_comes_first_where_there_is_none(read):
    with_system = [{"role": "system", "content": "Be."}, *TALK]
    plain, own = read("chat", {"messages": TALK}, {"messages": with_system}, empty_system_turn=True).train
    assert shown(plain) == "‹<|system|>\n›\n" + IN_WORDS[1:]
    assert shown(own) == "‹<|system|>\nBe.›\n" + IN_WORDS[1:]
    (pair,) = read(
        "preference", {"chosen": TALK, "rejected": [*TALK[:3], assistant("x")]}, empty_system_turn=True
    ).train
    assert shown(pair.chosen).startswith("‹<|system|>\n›\n<|user|>")


def test_columns_may_be_called_otherwise(read):
    (one,) = read("prompt", {"q": "a", "r": "b"}, prompt_key="q", answer_key="r").train
    (two,) = read("chat", {"talk": [user("a"), assistant("b")]}, messages_key="talk").train
    (three,) = read(
        "preference", {"q": "a", "yes": "b", "no": "c"}, prompt_key="q", chosen_key="yes", rejected_key="no"
    ).train
    (four,) = read("text", {"body": "a"}, text_key="body").train
    assert [shown(example) for example in (one, three.rejected, four)] == ["‹a[b›]", "‹a[c›]", "‹[a›]"]
    assert shown(two) == "‹<|user|>\na›\n<|assistant|>\n[b›]"


def test_commonsense_text_is_as_published_adapters_saw_it(golden, read):
    cases = golden("commonsense_text")["cases"]
    for case in cases:
        assert instructions.training_text(case["example"]) == case["text"]
    found = read("commonsense", *(case["example"] for case in cases), row_length=5000).train
    for example, case in zip(found, cases, strict=True):
        words = case["text"].replace("\n\n", "¶")
        answer = case["example"]["output"]
        assert shown(example) == f"‹{words.removesuffix(answer)}[{answer}›]"
    (without,) = read("commonsense", {"instruction": "x", "output": "y", "input": None}, row_length=5000).train
    assert instructions.prompt({"instruction": "x"}).replace("\n\n", "¶") in shown(without)


# Pairs


HEAD = "‹<|user|>\nHi›\n<|assistant|>\n"
ASKED = [user("Hi")]


@pytest.mark.parametrize(
    ("record", "head"),
    [
        ({"prompt": "Hi", "chosen": [*ASKED, assistant("yes")], "rejected": [*ASKED, assistant("no")]}, HEAD),
        ({"chosen": [*ASKED, assistant("yes")], "rejected": [*ASKED, assistant("no")]}, HEAD),
        ({"prompt": None, "chosen": [*ASKED, assistant("yes")], "rejected": [*ASKED, assistant("no")]}, HEAD),
        ({"prompt": "Hi", "chosen": [assistant("yes")], "rejected": [assistant("no")]}, HEAD),
        ({"prompt": ASKED, "chosen": [assistant("yes")], "rejected": [assistant("no")]}, HEAD),
        ({"prompt": ASKED, "chosen": "yes", "rejected": "no"}, HEAD),
        ({"prompt": ASKED, "chosen": [*ASKED, assistant("yes")], "rejected": [assistant("no")]}, HEAD),
        ({"prompt": "Hi", "chosen": [assistant("yes")], "rejected": "no"}, HEAD),
        ({"chosen": [assistant("yes")], "rejected": [assistant("no")]}, "‹<|assistant|>\n"),
        ({"prompt": "Hi ", "chosen": "yes", "rejected": "no"}, "‹Hi "),
        ({"chosen": "yes", "rejected": "no"}, "‹"),
    ],
)
def test_pairs_as_messages_and_as_texts(record, head, read):
    (pair,) = read("preference", record).train
    assert (shown(pair.chosen), shown(pair.rejected)) == (f"{head}[yes›]", f"{head}[no›]")


def test_of_a_long_conversation_the_last_answer_is_compared(read):
    chosen, rejected = [*TALK[:3], assistant("yes")], [*TALK[:3], assistant("no")]
    for prompt in (TALK[:3], "Hi", None):
        (pair,) = read("preference", {"prompt": prompt, "chosen": chosen, "rejected": rejected}).train
        head = IN_WORDS.replace("[", "").replace("]", "").removesuffix(" no›")
        assert (shown(pair.chosen), shown(pair.rejected)) == (f"{head}[yes›]", f"{head}[no›]")
    (pair,) = read("preference", {"prompt": TALK[:3], "chosen": "yes", "rejected": "no"}, loss_on="all").train
    assert (shown(pair.chosen), shown(pair.rejected)) == (f"{head}[yes›]", f"{head}[no›]")


@pytest.mark.parametrize("merging", ["chosen", "rejected"])
def test_the_ids_of_a_pairs_prompt_are_the_same_where_one_answer_merges_with_its_end(merging, read):
    other = "rejected" if merging == "chosen" else "chosen"
    texts = {"prompt": "Q\n", merging: "\nA", other: "B"}
    for record in (texts, texts | {merging: [assistant("\nA")], other: [assistant("B")]}):
        (pair,) = read("preference", record).train
        one, two = shown(getattr(pair, merging)), shown(getattr(pair, other))
        assert one.endswith("[¶A›]") and two.endswith("[\nB›]")
        assert one.partition("[")[0] == two.partition("[")[0]


def test_ultrafeedback_works_as_it_is(tmp_path, tokenizer_file):
    """The columns and types of csarron/argilla-ultrafeedback-binarized-preferences-cleaned."""
    talks = [[user(f"Question {n}"), assistant(f"good {n}")] for n in range(20)]
    bad = [[user(f"Question {n}"), assistant("bad")] for n in range(20)]
    table = {
        "source": ["evol_instruct"] * 20,
        "prompt": [f"Question {n}" for n in range(20)],
        "chosen": talks,
        "chosen-rating": [5.0] * 20,
        "chosen-model": ["a"] * 20,
        "rejected": bad,
        "rejected-rating": [3.75] * 20,
        "rejected-model": ["b"] * 20,
    }
    (tmp_path / "data").mkdir()
    parquet.write_table(pyarrow.table(table), tmp_path / "data" / "train-00000-of-00001.parquet")
    tokenizer = Tokenizer.load(tokenizer_file)
    found = read_examples([TuneSource("u", str(tmp_path), "preference")], tokenizer, Encoding(1024, 512))
    assert account(found) == {"records": 20, "trained_on": 20}
    for n, pair in enumerate(found.train):
        assert isinstance(pair, Pair)
        for example, answer in ((pair.chosen, f"good {n}"), (pair.rejected, "bad")):
            assert tokenizer.decode(example.ids[example.counts].tolist()) == answer
            assert example.ids[0] == tokenizer.bos_id and example.ids[-1] == tokenizer.eos_id


# Limits


@pytest.mark.parametrize(
    ("options", "words", "counts"),
    [
        ({"row_length": 9}, "‹abcdef[uvw]", {"cut_answers": 1}),
        ({"row_length": 12}, "‹abcdef[uvwxyz]", {"cut_answers": 1}),
        ({"row_length": 13}, "‹abcdef[uvwxyz›]", {}),
        ({"row_length": 13, "prompt_length": 7}, "‹abcdef[uvwxyz›]", {}),
        ({"row_length": 13, "prompt_length": 6}, "‹bcdef[uvwxyz›]", {"cut_prompts": 1}),
        ({"row_length": 13, "prompt_length": 2}, "‹f[uvwxyz›]", {"cut_prompts": 1}),
        ({"row_length": 13, "prompt_length": 1}, "‹[uvwxyz›]", {"cut_prompts": 1}),
        ({"row_length": 7, "prompt_length": 4}, "‹def[uvwx]", {"cut_prompts": 1, "cut_answers": 1}),
        ({"row_length": 7}, "‹abcdef[u]", {"cut_answers": 1}),
        ({"row_length": 6}, "", {"no_room": 1}),
        ({"row_length": 13, "prompt_length": 6, "long_prompts": "drop"}, "", {"long_prompt": 1}),
        ({"row_length": 13, "prompt_length": 7, "long_prompts": "drop"}, "‹abcdef[uvwxyz›]", {}),
    ],
)
def test_long_prompts_and_answers_are_cut_or_dropped_and_counted(options, words, counts, read):
    record = {"prompt": "abcdef", "answer": "uvwxyz"}
    other = {"prompt": "", "answer": "."}  # or nothing would be left
    found = read("prompt", record, other, **options)
    assert [shown(example) for example in found.train] == [*([words] if words else []), "‹[.›]"]
    assert account(found) == {"records": 2, "trained_on": 2 if words else 1, **counts}
    everything = read("prompt", record, other, loss_on="all", **options)
    assert [example.ids.tolist() for example in everything.train] == [example.ids.tolist() for example in found.train]
    assert all(example.counts[1:].all() and not example.counts[0] for example in everything.train)
    assert account(everything) == account(found)
    pair = {"prompt": "abcdef", "chosen": "uvwxyz", "rejected": "r"}
    both = read("preference", pair, {"chosen": "1", "rejected": "2"}, **options)
    assert account(both) == account(found)
    if words:
        assert shown(both.train[0].chosen) == words
        prompt = words.partition("[")[0]
        answer = "r›"[: options["row_length"] + 1 - len(prompt)]
        assert shown(both.train[0].rejected) == f"{prompt}[{answer}]"


def test_a_long_conversation_keeps_its_last_words_before_the_first_answer(read):
    talk = [user("a" * 50), assistant("yes"), user("b"), assistant("no")]
    (example,) = read("chat", {"messages": talk}, prompt_length=20).train
    assert shown(example) == "‹aaa›\n<|assistant|>\n[yes›]\n<|user|>\nb›\n<|assistant|>\n[no›]"
    (example,) = read("chat", {"messages": talk}, prompt_length=20, row_length=30).train
    assert shown(example) == "‹aaa›\n<|assistant|>\n[yes›]\n<|user"


# What is left out


NO = [user("x"), assistant("no")]


@pytest.mark.parametrize(
    ("format", "record", "reason"),
    [
        ("text", {"text": " \n\t"}, "empty_answer"),
        ("text", {"text": None}, "no_text"),
        ("prompt", {"prompt": "x", "answer": "\n"}, "empty_answer"),
        ("prompt", {"prompt": None, "answer": "x"}, "no_text"),
        ("commonsense", {"instruction": "x", "output": ""}, "empty_answer"),
        ("chat", {"messages": [user("x")]}, "no_answer"),
        ("chat", {"messages": []}, "no_answer"),
        ("chat", {"messages": None}, "no_text"),
        ("chat", {"messages": [user("x"), assistant("y"), user("x"), assistant(" ")]}, "empty_answer"),
        ("chat", {"messages": [user("x"), assistant(None)]}, "no_text"),
        ("chat", {"messages": [user(None), assistant("y")]}, "no_text"),
        ("preference", {"chosen": NO, "rejected": NO}, "same_answers"),
        ("preference", {"prompt": "x", "chosen": "y", "rejected": "y"}, "same_answers"),
        ("preference", {"chosen": "y" * 400 + "a", "rejected": "y" * 400 + "b"}, "same_answers"),  # as far as they fit
        ("preference", {"chosen": "y", "rejected": None}, "no_text"),
        ("preference", {"chosen": "y", "rejected": " "}, "empty_answer"),
        ("preference", {"chosen": NO, "rejected": [user("x"), assistant("\n")]}, "empty_answer"),
        ("preference", {"chosen": NO, "rejected": [user("x"), assistant(None)]}, "no_text"),
        ("preference", {"chosen": NO, "rejected": [user("y"), assistant("yes")]}, "other_prompts"),
        ("preference", {"chosen": NO, "rejected": [*NO, user("why?")]}, "no_answer"),
        ("preference", {"chosen": NO, "rejected": []}, "no_answer"),
    ],
)
def test_records_that_teach_nothing_are_dropped_and_counted(format, record, reason, read):
    good = {
        "text": {"text": "x"},
        "prompt": {"prompt": "a", "answer": "b"},
        "commonsense": {"instruction": "a", "output": "b"},
        "chat": {"messages": NO},
        "preference": {"chosen": "a", "rejected": "b"},
    }[format]
    found = read(format, record, good, record, row_length=400)
    assert account(found) == {"records": 3, "trained_on": 1, reason: 2}
    assert reason in DROPPED
    with pytest.raises(UserError, match=rf"nothing is left to train on of 2 records \({reason} 2\): look at"):
        read(format, record, record, row_length=400)


@pytest.mark.parametrize(
    ("format", "record", "message"),
    [
        ("text", {"body": 1, "id": 2}, r"record 2 has no column 'text', which the format text needs; .* 'body', 'id'"),
        ("prompt", {"prompt": "x"}, r"no column 'answer'.*its columns are 'prompt'"),
        ("prompt", {"prompt": 3, "answer": "x"}, "'prompt' is a int; the format prompt needs text"),
        ("commonsense", {"instruction": "x"}, "no column 'output'"),
        ("commonsense", {"instruction": "x", "output": "y", "input": 3}, "'input' is a int"),
        ("chat", {"messages": "x"}, "'messages' is a str, and no list of messages"),
        ("chat", {"messages": ["x"]}, "'messages' is a list, and no list of messages"),
        ("chat", {"messages": [{"role": "gpt", "content": "x"}, assistant("y")]}, r"messages\[0\].role is 'gpt'"),
        ("chat", {"messages": [{"from": "user"}, assistant("y")]}, r"messages\[0\].role is None"),
        ("chat", {"messages": [{"role": "assistant"}]}, r"messages\[0\].content is None"),
        ("chat", {"messages": [{"role": "assistant", "content": [{"type": "text"}]}]}, r"messages\[0\].content is \["),
        ("preference", {"chosen": "x"}, "no column 'rejected'"),
        ("preference", {"chosen": "x", "rejected": 3}, "'rejected' is a int, and no list of messages"),
        ("preference", {"prompt": {"a": 1}, "chosen": "x", "rejected": "y"}, "'prompt' is a dict, and no list"),
    ],
)
def test_records_of_another_form_are_named(format, record, message, read):
    good = {"text": "x", "prompt": "x", "answer": "y", "instruction": "x", "output": "y", "messages": NO}
    good |= {"chosen": "x", "rejected": "y"}
    with pytest.raises(UserError, match=message) as caught:
        read(format, good, record)
    assert f"{format}.jsonl: record 2" in str(caught.value)


def test_a_prompt_that_is_asked_for_by_name_must_be_there(read):
    with pytest.raises(UserError, match="no column 'promt'"):
        read("preference", {"prompt": "x", "chosen": "a", "rejected": "b"}, prompt_key="promt")


def test_pairs_and_single_examples_are_not_mixed_and_no_file_is_not_passed_over(tmp_path, read):
    (tmp_path / "empty.jsonl").write_text("\n")
    sources = [TuneSource("a", str(tmp_path), "preference"), TuneSource("b", str(tmp_path), "chat")]
    with pytest.raises(UserError, match="a: preference, b: chat"):
        read_examples(sources, Letters(), Encoding(8))
    with pytest.raises(UserError, match=r"of 0 records \(the files are empty\)"):
        read_examples(sources[:1], Letters(), Encoding(8))
    with pytest.raises(UserError, match="nothing to read"):
        read_examples([TuneSource("a", str(tmp_path / "none"), "chat")], Letters(), Encoding(8))


# What is held out


def test_a_prompt_is_on_one_side_only_and_every_record_is_accounted_for(read):
    draw = random.Random(4)
    records = [{"prompt": f"{draw.randrange(150)}=", "answer": f"{n}"} for n in range(600)]
    found = read("prompt", *records, held_out=0.2, validation=60)
    prompts = {side: [shown(one).partition("[")[0] for one in getattr(found, side)] for side in ("train", "held_out")}
    assert not set(prompts["train"]) & set(prompts["held_out"])
    assert len(found.held_out) == found.account["held_out"] == 60
    assert found.account["trained_on"] == len(found.train) == 540 - found.account["held_out_unused"]
    assert 0 < found.account["held_out_unused"] < 130
    # A matter of the content alone: more records, or the same prompts to be chosen between, change nothing.
    more = read("prompt", {"prompt": "new=", "answer": "."}, *reversed(records), held_out=0.2, validation=600)
    assert {shown(one) for one in more.held_out} >= {shown(one) for one in found.held_out}
    assert {shown(one) for one in more.train} == {shown(one) for one in found.train}
    pairs = [{"prompt": r["prompt"], "chosen": r["answer"], "rejected": "x"} for r in records]
    held = {shown(pair.chosen) for pair in read("preference", *pairs, held_out=0.2, validation=600).held_out}
    assert held == {shown(one) for one in more.held_out} - {"‹new=[.›]"}


def test_what_has_no_prompt_is_held_out_by_its_text(read):
    for format, record in (
        ("text", lambda n: {"text": f"t{n}"}),
        ("prompt", lambda n: {"prompt": "", "answer": f"t{n}"}),
        ("chat", lambda n: {"messages": [assistant(f"t{n}")]}),
        ("preference", lambda n: {"chosen": f"t{n}", "rejected": "x"}),
        ("preference", lambda n: {"chosen": [assistant(f"t{n}")], "rejected": "x"}),
    ):
        found = read(format, *map(record, range(300)), held_out=0.3, validation=1000)
        assert 50 < len(found.held_out) < 130
    with pytest.raises(UserError, match=r"of 2 records \(held_out 1, held_out_unused 1\).*data.held_out"):
        read("text", {"text": "x"}, {"text": "y"}, held_out=1.0, validation=1)


# Fingerprint


def test_the_fingerprint_tells_any_change_of_ids_of_marks_and_of_order(read):
    def of(*records: Record, **options: Any) -> str:
        format = "preference" if "chosen" in records[0] else "prompt"
        return fingerprint(read(format, *records, **options).train)

    a, b = {"prompt": "a", "answer": "bc"}, {"prompt": "ab", "answer": "c"}
    p, q = {"chosen": "a", "rejected": "b"}, {"chosen": "b", "rejected": "a"}
    assert of(a, b) == of(a, b)
    several = [of(a), of(b), of(a, b), of(b, a), of(a, loss_on="all"), of(p), of(q), of(p, q), fingerprint([])]
    assert len(set(several)) == len(several)
    assert all(len(one) == 64 for one in several)


def test_half_a_surrogate_pair_is_encoded_as_unknown(read, tokenizer_file, tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text('{"prompt": "\\ud800", "answer": "x"}\n{"prompt": "b", "answer": "\\udfff"}\n')
    found = read_examples(
        [TuneSource("a", str(path), "prompt")], Tokenizer.load(tokenizer_file), Encoding(64), held_out=1e-9
    )
    assert len(found.train) == 2


@pytest.mark.parametrize("name", ["ARC-Easy", "openbookqa", "boolq"])
def test_the_answers_of_the_real_sets_are_what_counts(shared, name, tmp_path):
    whole = (shared / "data" / "commonsense" / name / "train.json").read_text(encoding="utf-8")
    records = json.loads(whole)[:200]
    path = tmp_path / "train.json"
    path.write_text(json.dumps(records))
    tokenizer = Tokenizer.load(shared / "data" / "llama-tokenizer")
    found = read_examples([TuneSource(name, str(path), "commonsense")], tokenizer, Encoding(2048))
    assert account(found) == {"records": len(records), "trained_on": len(records)}
    for example, record in zip(found.train, records, strict=True):
        assert isinstance(example, Example)
        assert tokenizer.decode(example.ids[example.counts].tolist()).strip() == record["output"]
        assert tokenizer.decode(example.ids.tolist()) == instructions.training_text(record)
