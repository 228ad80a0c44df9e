"""Data speed: source to packed row, against bare SentencePiece on the same documents, in turns on one core."""

from __future__ import annotations

import json
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

from openelm.data.packing import IGNORE, Packing
from openelm.data.pieces import Preparation
from openelm.data.sources import Source, decode_record, find_units, read_records
from openelm.data.stream import TokenStream
from openelm.data.tokenizer import Tokenizer
from openelm.errors import UserError


def bench_data(
    source: Source, tokenizer: Tokenizer, preparation: Preparation, packing: Packing, *, max_bytes: int, repeats: int
) -> dict[str, Any]:
    """Bytes/s of both, on the one core that works, ``repeats`` times in alternation, and the median of their ratios.

    About ``max_bytes`` of the source's documents are encoded one by one from memory (bare), and go from a JSON-lines
    file through filters, repair, encoding and packing (pipeline). What the filters drop counts for both.
    """
    documents = _documents(source, max_bytes)
    if not documents:
        raise UserError(f"{source.path} holds no document to measure with")
    total = sum(len(text.encode("utf-8", "replace")) for text in documents)
    bare, pipeline, tokens, useful = [], [], [], []
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "documents.jsonl"
        file.write_text("".join(json.dumps({"text": text}) + "\n" for text in documents), encoding="utf-8")
        copy = Source("bench", str(file))
        for _ in range(repeats):
            start_s = time.perf_counter()
            for text in documents:
                tokenizer.encode(text)
            bare.append(total / (time.perf_counter() - start_s))
            start_s = time.perf_counter()
            targets, places = _one_epoch(copy, tokenizer, preparation, packing, len(documents))
            elapsed_s = time.perf_counter() - start_s
            pipeline.append(total / elapsed_s)
            tokens.append(targets / elapsed_s)
            useful.append(targets / max(1, places))
    ratios = [p / b for p, b in zip(pipeline, bare, strict=True)]
    return {
        "documents": len(documents),
        "bytes": total,
        "row_length": packing.row_length,
        "packing": packing.mode,
        "sentencepiece_bytes_per_s": statistics.median(bare),
        "sentencepiece_bytes_per_s_all": bare,
        "pipeline_bytes_per_s": statistics.median(pipeline),
        "pipeline_bytes_per_s_all": pipeline,
        "pipeline_tokens_per_s": statistics.median(tokens),
        "pipeline_tokens_per_s_all": tokens,
        "ratio": statistics.median(ratios),
        "ratios": ratios,
        "useful_share_of_row": useful[-1],
    }


def _one_epoch(
    source: Source, tokenizer: Tokenizer, preparation: Preparation, packing: Packing, documents: int
) -> tuple[int, int]:
    """Serve every document once, as batches; places of the rows that count in the loss, and all."""
    stream = TokenStream([source], tokenizer, preparation, packing, seed=0, shards=1)
    targets = places = 0
    while stream.counts()["documents"] < documents:
        batch = stream.next_batch(4)
        targets += int((batch.targets != IGNORE).sum())
        places += batch.targets.size
    return targets, places


def _documents(source: Source, max_bytes: int) -> list[str]:
    documents: list[str] = []
    left = max_bytes
    for unit in find_units(source):
        for record in read_records(unit, source):
            text = decode_record(record, unit, source).text
            if text:
                documents.append(text)
                left -= len(text)
            if left <= 0:
                return documents
    return documents
