"""Documents to pieces: CoreNet's own counts, ids and decisions, and the reasons of what is dropped."""

import hashlib
import json
from pathlib import Path

import numpy as np
import pytest

from openelm.data.packing import Packing
from openelm.data.pieces import TOO_FEW_CHARACTERS, TOO_FEW_TOKENS, Preparation
from openelm.data.tokenizer import Tokenizer


class Words:
    """A tokenizer of one id for each word."""

    bos_id, eos_id = 1, 2

    def encode(self, text: str) -> list[int]:
        return [3 + len(word) for word in text.split()]


@pytest.mark.parametrize("length", [2048, 128])
def test_rows_are_those_of_corenet(shared: Path, length: int) -> None:
    golden = json.loads((shared / "golden" / f"rows_{length}.json").read_text())
    lines = (shared / "golden" / "documents.jsonl").read_text(encoding="utf-8").splitlines()
    documents = {document["id"]: document["text"] for document in map(json.loads, lines)}
    tokenizer = Tokenizer.load(shared / "data" / "llama-tokenizer" / "tokenizer.model")
    preparation = Preparation(
        golden["min_characters_per_text"], golden["min_tokens_per_text"], golden["document_split_words"]
    )
    packing = Packing(golden["sequence_length"], mode="pad")
    assert len(golden["documents"]) == len(documents) == 29
    kept = 0
    for expected in golden["documents"]:
        text = documents[expected["id"]]
        inspected = list(preparation.inspect(text, tokenizer))
        pieces = list(preparation.pieces(text, tokenizer))
        assert len(inspected) == len(pieces) == len(expected["segments"]), expected["id"]
        for entry, piece, segment in zip(inspected, pieces, expected["segments"], strict=True):
            where = (expected["id"], entry["piece"])
            assert entry["normalized_characters"] == segment["normalized_characters"], where
            assert entry["kept"] == segment["kept"] == bool(piece.ids), where
            assert entry["tokens"] == segment["tokens"] or not segment["kept"], where
            if not segment["kept"]:
                continue
            [row], _ = packing.take_rows(np.empty(0, dtype=np.int32), piece.ids)
            ids = row.tolist()
            assert len(ids) == segment["row_tokens"], where
            assert ids[:12] == segment["first"] and ids[-6:] == segment["last"], where
            assert hashlib.sha256(" ".join(map(str, ids)).encode()).hexdigest() == segment["sha256"], where
            assert entry["ids"] == piece.ids, where
            kept += 1
    assert kept > 10


def test_each_filter_gives_its_reason_and_bos_and_eos_count_as_tokens() -> None:
    preparation = Preparation(min_characters=5, min_tokens=4, split_words=100)
    assert preparation.piece("a b.", Words()).reason == TOO_FEW_CHARACTERS
    assert preparation.piece("abcdef", Words()).reason == TOO_FEW_TOKENS
    kept = preparation.piece("abcd ef", Words())
    assert (kept.ids, kept.reason) == ([1, 7, 5, 2], "")


def test_a_dropped_piece_is_inspected_with_all_its_counts() -> None:
    preparation = Preparation(min_characters=5, min_tokens=4, split_words=3)
    entries = list(preparation.inspect("one two three four", Words()))
    assert [(e["piece"], e["normalized_characters"], e["tokens"], e["kept"], e["reason"]) for e in entries] == [
        (0, 13, 5, True, None),
        (1, 4, 3, False, TOO_FEW_CHARACTERS),
    ]
    [empty] = preparation.inspect("", Words())
    assert (empty["piece"], empty["kept"], empty["tokens"]) == (0, False, 2)


def test_repair_comes_after_counting_characters_and_before_tokens_and_can_be_off() -> None:
    text = "“quoted” &amp; more"
    assert Preparation(1, 1).piece(text, Words()).text == '"quoted" & more'
    assert Preparation(1, 1, repair_text=False).piece(text, Words()).text == text
    # Counted as it stands: curly quotes are no ASCII punctuation, an entity loses "&" and ";".
    assert next(Preparation(1, 1).inspect(text, Words()))["normalized_characters"] == len("“quoted” amp more")
