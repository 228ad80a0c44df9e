"""Test examples in training text: what is planted is found, where it stands, and nothing else is."""

import gzip
import json
import random
from pathlib import Path

import numpy as np
import pytest

from openelm.data import overlap as overlap_module
from openelm.data.overlap import Location, Match, Overlap, Read, SharedExample, documents, normalized_words, read_source
from openelm.data.sources import CorruptFile, Source
from openelm.data.stream import is_held_out
from openelm.data.test_sets import TestExample as Example  # pytest would take Test… for tests
from openelm.data.test_sets import read_examples
from openelm.errors import UserError

FOX = [f"fox{i}" for i in range(20)]
HEN = [f"hen{i}" for i in range(30)]


def here(document: int = 0, file: str = "a.txt") -> Location:
    return Location("web", file, document)


def overlap_of(texts: list[str], n: int = 13) -> Overlap:
    return Overlap([Example("quiz", str(i), text) for i, text in enumerate(texts)], n)


def shared_after(texts: list[str], training: list[str], n: int = 13) -> dict[str, SharedExample]:
    overlap = overlap_of(texts, n)
    for number, text in enumerate(training):
        overlap.look(text, here(number))
    return {example.id: example for example in overlap.found()[0].shared}


def test_thirteen_words_in_a_row_count_and_twelve_do_not():
    texts = [" ".join(FOX), " ".join(HEN)]
    training = ["before " + " ".join(FOX[3:16]) + " after", "before " + " ".join(HEN[3:15]) + " after"]
    found = shared_after(texts, training)
    assert found == {"0": SharedExample("0", 20, 13 / 20, Match(13, " ".join(FOX[3:16]), here(0)))}
    assert shared_after(texts, training, n=12).keys() == {"0", "1"}


def test_an_example_of_n_words_is_compared_and_a_shorter_one_is_counted_as_too_short():
    overlap = overlap_of([" ".join(FOX[:13]), " ".join(FOX[:12]), ""])
    overlap.look(" ".join(FOX), here())
    (found,) = overlap.found()
    assert (found.examples, found.short, [example.id for example in found.shared]) == (3, 2, ["0"])
    assert found.share == 1.0


def test_the_share_is_of_the_examples_that_were_compared_set_by_set():
    texts = {"b": [FOX, HEN, HEN[5:], FOX[:3]], "a": [FOX[:2]]}
    overlap = Overlap([Example(name, str(i), " ".join(words)) for name in texts for i, words in enumerate(texts[name])])
    overlap.look(" ".join(HEN), here())
    b, a = overlap.found()
    assert (b.set, b.examples, b.short, len(b.shared), b.share) == ("b", 4, 1, 2, 2 / 3)
    assert (a.set, a.examples, a.short, a.shared, a.share) == ("a", 1, 1, (), None)


def test_case_punctuation_and_white_space_make_no_difference():
    text = "He said: “Don’t go there, it's a well-known trap!” — and so (at last) we turned BACK…"
    for training in (
        'he   said "don\'t go\nthere its a wellknown trap" and so at last we turned back',
        "HE SAID DONT GO THERE\tITS A WELLKNOWN TRAP AND SO AT LAST\u00a0WE TURNED BACK.",
    ):
        found = shared_after([text], [training])["0"]
        assert (found.covered, found.longest.words) == (1.0, 16)
        assert found.longest.text == "he said dont go there its a wellknown trap and so at last we turned back"


def test_a_word_that_differs_is_a_near_miss():
    words = FOX[:14]
    for place in (1, 7, 12):
        assert not shared_after([" ".join(words)], [" ".join([*words[:place], "other", *words[place + 1 :]])])
        assert not shared_after([" ".join(words)], [" ".join([*words[:place], *words[place + 1 :]])])
    assert not shared_after([" ".join(words)], [" ".join(reversed(words))])


def test_unicode_is_compared_by_its_letters():
    words = "Ärger über Größe, naïve café; Привет мир ещё раз, δοκιμή λόγος ανήρ 数据 集合 ok"
    decomposed = words.replace("é", "e\u0301").replace("Ä", "A\u0308").upper().replace("SS", "ß")
    assert decomposed != words
    found = shared_after([words], [f"«{decomposed}»"])["0"]
    assert (found.words, found.covered) == (15, 1.0)
    assert normalized_words("¿Qué? «Да» 「はい」") == ["qué", "да", "はい"]
    assert normalized_words("a\ud800 b") == ["a\ud800", "b"]  # half a pair, which JSON can spell


def test_ascii_words_are_those_of_the_papers_filter():
    from openelm.data.filters import normalized_characters

    text = "".join(map(chr, range(128))) * 3 + " A  b\r\nc_d\x0b e-f 1,000.5 $x=y~"
    assert len(" ".join(normalized_words(text))) == normalized_characters(text)


def test_text_that_many_examples_have_is_found_in_each_and_the_first_document_is_named():
    texts = [" ".join([*HEN[:15], f"question{i}"]) for i in range(50)] + [f"{i} of another kind" for i in range(50)]
    found = shared_after(texts, ["nothing", " ".join(HEN[:15]), " ".join(HEN)])
    assert len(found) == 50
    assert {example.longest for example in found.values()} == {Match(15, " ".join(HEN[:15]), here(1))}


def test_the_prompt_around_the_examples_is_not_text_that_they_share():
    prompt, close = [f"prompt{i}" for i in range(20)], [f"close{i}" for i in range(13)]
    questions = [[f"q{i}w{j}" for j in range(20 if i else 12)] for i in range(11)]
    texts = [" ".join([*prompt, *question, *close]) for question in questions]
    training = [
        " ".join([*prompt, "q3w0", "unseen"]),  # the prompt, before another question that begins in the same way
        " ".join([*prompt, *questions[5][:13], "unseen", *close]),
    ]
    overlap = overlap_of(texts)
    for number, text in enumerate(training):
        overlap.look(text, here(number))
    (found,) = overlap.found()
    assert found.shared == (SharedExample("5", 20, 13 / 20, Match(13, " ".join(questions[5][:13]), here(1))),)
    assert (found.examples, found.short, found.share) == (11, 1, 1 / 10)
    # Ten examples may well be about one passage.
    assert len(shared_after(texts[1:], training)) == 10


def test_examples_most_covered_come_first_and_the_longest_passage_of_one_document_is_shown():
    texts = [" ".join([*FOX, *HEN]), " ".join(HEN[:16])]
    overlap = overlap_of(texts)
    overlap.look(" ".join(FOX[:14]), here(0))
    overlap.look(" ".join(HEN[10:29]), here(1))
    overlap.look(" ".join([*FOX[10:], *HEN[:14]]), here(2, "b.txt"))
    (found,) = overlap.found()
    assert [example.id for example in found.shared] == ["0", "1"]
    first, second = found.shared
    # Document 2 has all from fox10 to hen13, document 1 from hen10 to hen28.
    assert first.covered == 49 / 50
    assert first.longest == Match(24, " ".join([*FOX[10:], *HEN[:14]]), here(2, "b.txt"))
    assert second.covered == 14 / 16
    assert second.longest == Match(14, " ".join(HEN[:14]), here(2, "b.txt"))


def test_words_do_not_run_from_one_example_or_document_into_the_next():
    overlap = overlap_of([" ".join(FOX[:14]), " ".join(HEN[:14])])
    overlap.look(" ".join([*FOX[8:14], *HEN[:7]]), here(0))  # in a row in the list of examples only
    overlap.look(" ".join(FOX[:7]), here(1))
    overlap.look(" ".join(FOX[7:14]), here(2))
    assert overlap.found()[0].shared == ()


def brute_force(texts: list[str], training: list[str], n: int) -> dict[str, tuple[float, set[int]]]:
    """Of each example with a shared n-gram: the covered share, and the first document of each of its n-grams."""
    first: dict[tuple[str, ...], int] = {}
    for number, text in enumerate(training):
        words = normalized_words(text)
        for i in range(len(words) - n + 1):
            first.setdefault(tuple(words[i : i + n]), number)
    found = {}
    for number, text in enumerate(texts):
        words = normalized_words(text)
        at = [i for i in range(len(words) - n + 1) if tuple(words[i : i + n]) in first]
        if at:
            covered = {j for i in at for j in range(i, i + n)}
            places = {first[tuple(words[i : i + n])] for i in at}
            found[str(number)] = (len(covered) / len(words), places)
    return found


@pytest.mark.parametrize("n", [1, 2, 3, 5, 13])
@pytest.mark.parametrize(("part", "batch"), [(1 << 20, 1 << 16), (1, 1), (17, 5), (40, 30)])
def test_random_text_gives_what_a_search_word_by_word_gives(monkeypatch, n, part, batch):
    monkeypatch.setattr(overlap_module, "PART_CHARACTERS", part)
    monkeypatch.setattr(overlap_module, "BATCH_WORDS", batch)
    monkeypatch.setattr(overlap_module, "PROMPT_EXAMPLES", 40)  # of four words each example has most
    draw = random.Random(n)
    # Few distinct words for small n, and copied passages for large ones.
    words = [f"w{i}" for i in range(4 * n)]
    texts = [" ".join(draw.choices(words, k=draw.randint(0, 3 * n + 5))) for _ in range(40)]
    training = [" ".join(draw.choices([*words, "Unseen"], k=draw.randint(0, 40))) for _ in range(30)]
    for _ in range(10):
        copied = draw.choice(texts).split()
        start = draw.randint(0, len(copied))
        training.append(" ".join([draw.choice(words), *copied[start : start + n + draw.randint(-1, 6)], "unseen"]))
    expected = brute_force(texts, training, n)
    found = shared_after(texts, training, n)
    assert expected
    covered = {id: example.covered for id, example in found.items()}
    assert covered == {id: share for id, (share, _) in expected.items()}
    for id, example in found.items():
        assert example.longest.location.document in expected[id][1]
        passage, document = example.longest.text, training[example.longest.location.document]
        assert f" {passage} " in f" {' '.join(normalized_words(document))} "
        assert f" {passage} " in f" {texts[int(id)]} "


def test_two_texts_with_one_hash_are_told_apart_by_their_words(monkeypatch):
    monkeypatch.setattr(overlap_module, "_MULTIPLIER", np.uint64(1))  # a sum, which no order of the words changes
    text = " ".join(FOX[:13])
    assert not shared_after([text], [" ".join(reversed(FOX[:13]))])
    assert shared_after([text], [" ".join(reversed(FOX[:13])) + " " + text]).keys() == {"0"}


def test_test_ngrams_with_one_hash_get_another(monkeypatch):
    """Of the first random values the second half is equal: two n-grams would be one."""
    generator = np.random.default_rng
    seeds = []

    class Weak:
        def __init__(self, seed: int) -> None:
            seeds.append(seed)
            self.draw = generator(seed)

        def integers(self, *args: object, **kwargs: object) -> np.ndarray:
            values = self.draw.integers(*args, **kwargs)
            return np.zeros_like(values) if seeds == [0] else values

    monkeypatch.setattr(overlap_module.np.random, "default_rng", Weak)
    found = shared_after([" ".join(FOX[:13]), " ".join(HEN[:13])], [" ".join(HEN)])
    assert found.keys() == {"1"} and seeds == [0, 1]


def test_a_long_document_is_searched_across_its_parts(monkeypatch):
    monkeypatch.setattr(overlap_module, "PART_CHARACTERS", 1000)
    monkeypatch.setattr(overlap_module, "BATCH_WORDS", 100)
    filler = ["filler"] * 3
    training = " ".join(word for i in range(200) for word in ([*filler, *FOX] if i == 150 else filler))
    for shift in range(0, 1000, 37):
        found = shared_after([" ".join(FOX)], ["x" * shift + " " + training])
        assert found["0"].longest == Match(20, " ".join(FOX), here(0))


def test_what_was_found_can_be_asked_for_before_the_end_and_looking_goes_on():
    overlap = overlap_of([" ".join(FOX), " ".join(HEN)])
    overlap.look(" ".join(FOX), here(0))
    assert [example.id for example in overlap.found()[0].shared] == ["0"]
    overlap.look(" ".join(HEN), here(1))
    assert [(e.id, e.longest.location.document) for e in overlap.found()[0].shared] == [("1", 1), ("0", 0)]
    assert overlap.found() == overlap.found()


def test_no_words_to_compare_is_refused():
    with pytest.raises(UserError, match=r"n-grams of 0 words: there must be at least 1"):
        overlap_of(["a b"], 0)
    with pytest.raises(UserError, match=r"none of 2 test examples has 13 words.*the longest has 3"):
        overlap_of(["a b", "a b c"])
    with pytest.raises(UserError, match="none of 0 test examples"):
        overlap_of([])
    with pytest.raises(UserError, match=r"none of 1 test examples has 1 words.*give texts"):
        overlap_of(["?!"], 1)


# Training text


def write_lines(path: Path, texts: list[str | None]) -> Path:
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return path


def test_documents_are_numbered_within_their_file_whatever_the_order_of_files(tmp_path: Path):
    for name in "abcde":
        write_lines(tmp_path / f"{name}.jsonl", [f"{name}{i}" for i in range(4)])
    found = list(documents(Source("web", str(tmp_path)), (0, 0), lambda path: None))
    assert {(Path(place.file).stem + str(place.document), place.source) for _, place in found} == {
        (text, "web") for text, _ in found
    }
    assert len(found) == 20
    order = [Path(place.file).stem for _, place in found[::4]]
    assert sorted(order) == list("abcde") != order
    again = list(documents(Source("web", str(tmp_path)), (0, 0), lambda path: None))
    assert again == found


def test_numbers_go_on_through_the_parts_of_a_large_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("openelm.data.sources.SPLIT_BYTES", 100)
    path = write_lines(tmp_path / "a.jsonl", [f"text number {i}" for i in range(50)])
    found = list(documents(Source("web", str(path)), (0, 0), lambda path: None))
    assert [(text, place.document) for text, place in found] == [(f"text number {i}", i) for i in range(50)]


def test_reading_counts_and_leaves_out_what_training_does_not_see(tmp_path: Path):
    passages = [" ".join(f"w{i}x{j}" for j in range(15)) for i in range(40)]
    path = write_lines(tmp_path / "a.jsonl", [*passages, None])
    overlap, read = overlap_of(passages), Read()
    assert len(list(read_source(Source("web", str(path)), overlap, read, held_out=0.3))) == 41
    kept = [i for i, text in enumerate(passages) if not is_held_out(text, 0.3)]
    assert 20 < len(kept) < 40
    assert read == Read(41, 40 - len(kept), 1, sum(map(len, passages)), complete=True)
    shared = {int(example.id): example.longest for example in overlap.found()[0].shared}
    assert shared == {i: Match(15, passages[i], Location("web", str(path), i)) for i in kept}


def test_a_sample_ends_behind_its_last_document(tmp_path: Path):
    path = write_lines(tmp_path / "a.jsonl", [" ".join(FOX), "x", " ".join(HEN)])
    for limit, expected, complete in (
        (1, ["0"], False),
        (2, ["0"], False),
        (3, ["0", "1"], True),
        (9, ["0", "1"], True),
    ):
        overlap, read = overlap_of([" ".join(FOX), " ".join(HEN)]), Read()
        list(read_source(Source("web", str(path)), overlap, read, limit=limit))
        assert sorted(example.id for example in overlap.found()[0].shared) == expected
        assert (read.documents, read.complete) == (min(3, limit), complete)


def test_damage_stops_or_is_said_as_the_source_wants_it(tmp_path: Path):
    path = tmp_path / "a.jsonl.gz"
    noise = random.Random(0)
    texts = [" ".join(FOX), *(str(noise.random()) for _ in range(30_000))]
    whole = gzip.compress("".join(json.dumps({"text": text}) + "\n" for text in texts).encode())
    path.write_bytes(whole[: len(whole) // 2])
    overlap, read = overlap_of([" ".join(FOX)]), Read()
    with pytest.raises(CorruptFile):
        list(read_source(Source("web", str(path)), overlap, read))
    overlap, read = overlap_of([" ".join(FOX)]), Read()
    list(read_source(Source("web", str(path), on_corrupt="skip"), overlap, read))
    assert len(overlap.found()[0].shared) == 1 and read.documents > 1 and not read.complete


# Test sets


def test_all_text_of_a_row_is_compared_or_one_field(tmp_path: Path):
    rows = [
        {"id": "q-7", "question": "Why?", "choices": {"text": ["So.", "Or so."], "label": ["A", "B"]}, "n": 3},
        {"question": "How?", "choices": {"text": [], "label": []}, "n": None},
    ]
    path = tmp_path / "quiz.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)) + "\n\n")
    assert list(read_examples(str(path))) == [
        Example(str(path), "q-7", "Why?\nSo.\nOr so.\nA\nB"),
        Example(str(path), "1", "How?"),
    ]
    assert [example.text for example in read_examples(str(path), "question")] == ["Why?", "How?"]
    packed = tmp_path / "quiz.jsonl.gz"
    packed.write_bytes(gzip.compress(path.read_bytes()))
    assert [example[1:] for example in read_examples(str(packed))] == [e[1:] for e in read_examples(str(path))]


def test_a_parquet_file_is_a_test_set_too(tmp_path: Path):
    import pyarrow
    from pyarrow import parquet

    path = tmp_path / "quiz.parquet"
    choices = [{"text": ["no", "yes"]}, {"text": ["left"]}]
    parquet.write_table(pyarrow.table({"id": [5, 6], "question": ["Is it?", "Where?"], "choices": choices}), path)
    assert [example[1:] for example in read_examples(str(path))] == [("5", "Is it?\nno\nyes"), ("6", "Where?\nleft")]
    path.write_bytes(b"PAR1 not quite")
    with pytest.raises(UserError, match=r"quiz\.parquet"):
        list(read_examples(str(path)))


def test_what_is_no_test_set_is_refused_and_named(tmp_path: Path):
    def refusal(content: str, name: str = "quiz.jsonl", field: str | None = None) -> str:
        path = tmp_path / name
        path.write_text(content)
        with pytest.raises(UserError) as caught:
            list(read_examples(str(path), field))
        assert name in str(caught.value)
        return str(caught.value)

    assert "no text in it" in refusal('{"a": 1}\n{"a": ""}\n')
    assert "no text in it" in refusal("")
    assert "row 1 is not JSON" in refusal('{"a": "b"}\nquestion\n')
    assert "row 1 is a str" in refusal('{"a": "b"}\n"question"\n')
    assert "row 0 has no text in a field 'q': its fields with text are a, b" in refusal(
        '{"a": "b", "b": "c", "q": 1}\n', field="q"
    )
    assert "a test set is a file of JSON lines" in refusal("words", "quiz.txt")
    with pytest.raises(UserError, match=r"none\.jsonl"):
        list(read_examples(str(tmp_path / "none.jsonl")))
    with pytest.raises(UserError, match=r"none\.parquet"):
        list(read_examples(str(tmp_path / "none.parquet")))
