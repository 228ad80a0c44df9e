"""A checksum of rows, as the ranks and workers of a run would read them."""

from __future__ import annotations

import hashlib
from copy import copy
from typing import Any

from openelm.data.stream import TokenStream, owned_shards


def row_hashes(stream: TokenStream, rows: int, ranks: int = 1, workers: int = 1) -> dict[str, Any]:
    """SHA-256 of the first ``rows`` rows, each read by the worker of the rank that it would go to.

    Row k goes to rank k mod R. A row is hashed as its length and its ids, int32, the lowest byte first.
    """
    readers: dict[int, list[tuple[int, TokenStream]]] = {shard: [] for shard in range(stream.shards)}
    for rank in range(ranks):
        for worker in range(workers):
            reader = copy(stream)
            for shard in owned_shards(stream.shards, rank=rank, ranks=ranks, worker=worker, workers=workers):
                readers[shard].append((rank, reader))
    whole, thousand, per_thousand = hashlib.sha256(), hashlib.sha256(), []
    for k in range(rows):
        # Where R does not divide V, rows of one shard go to several ranks: each reads them all and keeps its own.
        read = {rank: reader.next_of(k % stream.shards) for rank, reader in readers[k % stream.shards]}
        row = read[k % ranks]
        data = len(row).to_bytes(4, "little") + row.astype("<i4").tobytes()
        whole.update(data)
        thousand.update(data)
        if (k + 1) % 1000 == 0 or k + 1 == rows:
            per_thousand.append(thousand.hexdigest())
            thousand = hashlib.sha256()
    return {"rows": rows, "sha256": whole.hexdigest(), "per_thousand": per_thousand}
