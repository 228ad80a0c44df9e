"""Remote sources: the same documents as from local files, through cut connections, from servers of several kinds."""

import ast
import gc
import gzip
import http.client
import io
import json
import multiprocessing
import os
import pickle
import random
import re
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qsl, unquote

import pyarrow
import pytest
import zstandard
from pyarrow import parquet

from openelm.data import backends, files, remote, sources
from openelm.data.files import find_files, open_binary, open_for_parts
from openelm.data.remote import RemoteFile
from openelm.data.sources import Source, Unit, decode_record, find_units, read_records
from openelm.errors import UserError

DRAW = random.Random(3)
TEXTS = ["one", "two\nlines", "Ünïcödé 你好", *(f"{i} {DRAW.randbytes(100).hex()}" for i in range(2997))]
JSON_LINES = b"".join(json.dumps({"text": text}).encode() + b"\n" for text in TEXTS)
NOISE = DRAW.randbytes(2_000_000)


def parquet_file(texts: list[str], rows: int) -> bytes:
    """With a second column, three times as large, which no reader of the text should fetch."""
    table = pyarrow.table({"text": texts, "other": [text * 3 for text in reversed(texts)]})
    sink = io.BytesIO()
    parquet.write_table(table, sink, row_group_size=rows, compression="none", use_dictionary=False)
    return sink.getvalue()


CORPUS = {
    "a.jsonl": JSON_LINES,
    "b.json.gz": gzip.compress(JSON_LINES, 1),
    "deep/c.jsonl.zst": zstandard.compress(JSON_LINES, 1),
    "d.parquet": parquet_file(TEXTS, 1000),
    "e.txt": TEXTS[5].encode(),
    "f.png": b"no text",
}


# A server that fails as told


class Server(ThreadingHTTPServer):
    """Answers with ``answer(method, path, headers, body)`` -> (status, headers, body), faults first.

    ``faults``: one for each GET of an object: None (none), a number of bytes after which the connection is cut, or a
    status. ``seen`` has method, path and Range header of what came, and the bytes that were sent.
    """

    daemon_threads = True

    def __init__(self, answer: Callable[..., tuple[int, dict[str, str], bytes]]) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.answer = answer
        self.faults: list[int | None] = []
        self.seen: list[tuple[str, str, str | None, int]] = []
        self.url = f"http://127.0.0.1:{self.server_address[1]}"
        threading.Thread(target=self.serve_forever, args=(0.02,), daemon=True).start()

    def handle_error(self, *_: object) -> None:
        """Clients that hang up are part of the game."""

    def of(self, method: str) -> list[tuple[str, str, str | None, int]]:
        return [entry for entry in self.seen if entry[0] == method and "list-type" not in entry[1]]


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Server

    def do_GET(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        given = {name.title(): value for name, value in self.headers.items()}
        status, headers, content = self.server.answer(self.command, self.path, given, body)
        fault = None
        if self.command == "GET" and "list-type" not in self.path and self.server.faults:
            fault = self.server.faults.pop(0)
        if fault is not None and 400 <= fault < 600:
            status, headers, content, fault = fault, {"Content-Type": "text/plain"}, b"busy", None
        sent = content if self.command == "GET" else b""
        self.send_response(status)
        for name, value in headers.items():
            if name.lower() not in ("content-length", "transfer-encoding", "connection", "date", "server"):
                self.send_header(name, value)
        length = headers.get("Content-Length") if self.command == "HEAD" else None
        self.send_header("Content-Length", length or str(len(content)))
        self.end_headers()
        if fault is not None:
            sent = sent[:fault]
        self.server.seen.append((self.command, self.path, self.headers.get("Range"), len(sent)))
        self.wfile.write(sent)
        if fault is not None:
            self.wfile.flush()
            self.connection.shutdown(socket.SHUT_RDWR)
            self.close_connection = True

    do_HEAD = do_GET  # noqa: N815

    def log_message(self, *_: object) -> None:
        pass


def over_http(content_of: dict[str, bytes], *, ranges: bool) -> Callable[..., Any]:
    """A web server's answers: an index page for "/", and the files, in parts or whole only."""

    def answer(method: str, path: str, headers: dict[str, str], body: bytes) -> tuple[int, dict[str, str], bytes]:
        name = path.partition("?")[0].lstrip("/")
        if not name or any(n.startswith(f"{name.rstrip('/')}/") for n in content_of):
            folder = f"{name.rstrip('/')}/" if name else ""
            names = {n[len(folder) :].partition("/") for n in content_of if n.startswith(folder)}
            page = "".join(f'<a href="{first}{slash}">x</a>' for first, slash, _ in sorted(names))
            return 200, {"Content-Type": "text/html"}, f"<html>{page}</html>".encode()
        if name not in content_of:
            return 404, {"Content-Type": "text/html"}, b"nothing"
        content = content_of[name]
        about = {"Content-Type": "application/octet-stream", "ETag": f'"{hash(content)}"'}
        found = re.fullmatch(r"bytes=(\d+)-(\d+)", headers.get("Range", "")) if ranges else None
        if found and headers.get("If-Range", about["ETag"]) == about["ETag"]:
            start, end = int(found[1]), min(int(found[2]) + 1, len(content))
            about["Content-Range"] = f"bytes {start}-{end - 1}/{len(content)}"
            return 206, about, content[start:end]
        return 200, about, content

    return answer


@pytest.fixture
def web() -> Iterator[Callable[..., Server]]:
    servers = []

    def start(files: dict[str, bytes], **how: bool) -> Server:
        servers.append(Server(over_http(files, **{"ranges": True, **how})))
        return servers[-1]

    yield start
    for server in servers:
        server.shutdown()
        server.server_close()


@pytest.fixture(scope="module")
def moto() -> Iterator[str]:
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer("127.0.0.1", 0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    yield f"{host}:{port}"
    server.stop()


@pytest.fixture(scope="module")
def bucket(moto: str) -> Callable[[str, str, bytes | None], None]:
    """``bucket(method, path, content)`` speaks to the S3 server directly; the corpus lies there."""

    signed = {"Authorization": "AWS4-HMAC-SHA256 Credential=key/20260101/us-east-1/s3/aws4_request"}  # not checked

    def send(method: str, path: str, content: bytes | None = None) -> None:
        connection = http.client.HTTPConnection(moto)
        connection.request(method, path, content, signed)
        assert connection.getresponse().status < 300
        connection.close()

    send("PUT", "/corpus")
    for name, content in CORPUS.items():
        send("PUT", f"/corpus/text/{name}", content)
    return send


@pytest.fixture
def s3(moto: str, bucket: object, monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    """A server between the client and S3, which can fail; the environment leads there."""

    def forward(method: str, path: str, headers: dict[str, str], body: bytes) -> tuple[int, dict[str, str], bytes]:
        connection = http.client.HTTPConnection(moto)
        connection.request(method, path, body or None, headers)
        response = connection.getresponse()
        content = response.read()
        connection.close()
        return response.status, dict(response.getheaders()), content

    server = Server(forward)
    monkeypatch.setenv("AWS_ENDPOINT_URL", server.url)
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "key")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "secret")
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    yield server
    server.shutdown()
    server.server_close()


@pytest.fixture(autouse=True)
def fresh(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """No waiting between tries, no proxy, and no client, file or listing of another test."""
    monkeypatch.setattr(remote, "WAIT_S", 0.001)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1,localhost")
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    for name in ("AWS_PROFILE", "AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", "/nowhere")
    monkeypatch.setenv("AWS_CONFIG_FILE", "/nowhere")
    forget()
    yield
    forget()


def forget() -> None:
    import gcsfs
    import s3fs

    s3fs.S3FileSystem.clear_instance_cache()
    gcsfs.GCSFileSystem.clear_instance_cache()
    backends._shared_file_system.cache_clear()
    remote.versions.clear()


@pytest.fixture
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remote, "BLOCK_BYTES", 120_000)
    monkeypatch.setattr(remote, "FIRST_BLOCK_BYTES", 50_000)
    monkeypatch.setattr(remote, "LEAST_BLOCK_BYTES", 20_000)


def documents(path: str, **options: str) -> list[str | None]:
    source = Source("s", path, **options)  # type: ignore[arg-type]
    return [decode_record(raw, unit, source).text for unit in find_units(source) for raw in read_records(unit, source)]


def read_all(url: str) -> bytes:
    with open_binary(url) as file:
        return file.read()


# S3


def test_s3_gives_the_documents_of_local_files(s3: Server, tmp_path: Path) -> None:
    for name, content in CORPUS.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(content)
    here = [documents(str(tmp_path / name)) for name in CORPUS if name != "f.png"]
    assert here == [TEXTS] * 4 + [[TEXTS[5]]]
    assert [documents(f"s3://corpus/text/{name}") for name in CORPUS if name != "f.png"] == here
    assert documents("s3://corpus/text") == documents(str(tmp_path)) == documents("s3://corpus/text/")
    assert documents("s3://corpus/text/*.json*") == TEXTS * 2


def test_listing_is_sorted_and_sees_what_came_since(s3: Server, bucket: Callable[..., None]) -> None:
    def names() -> list[str]:
        return [path for path, _ in find_files("s3://corpus/grows", lambda name: True)]

    bucket("PUT", "/corpus/grows/b.txt", b"b")
    assert names() == ["s3://corpus/grows/b.txt"]
    bucket("PUT", "/corpus/grows/a.txt", b"a")
    assert names() == ["s3://corpus/grows/a.txt", "s3://corpus/grows/b.txt"]


def test_cut_connections_are_taken_up_again_from_the_byte_reached(s3: Server, small_blocks: None) -> None:
    source = Source("s", "s3://corpus/text/a.jsonl")
    units = find_units(source)
    s3.seen.clear()
    s3.faults = [0, 40_000, None, 10, 503, None, 90_000, 0, 0, None, None, 503, 9_999]
    records = list(read_records(units[0], source))
    assert b"".join(record + b"\n" for record in records) == JSON_LINES
    assert not s3.faults
    assert sum(entry[3] for entry in s3.of("GET")) < 1.5 * len(JSON_LINES)


def test_the_last_try_names_url_byte_and_cause(s3: Server, small_blocks: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remote, "TRIES", 3)
    with open_binary("s3://corpus/text/a.jsonl") as file:
        file.read(50_000)
        s3.faults = [503] * 99
        with pytest.raises(UserError, match=r"^s3://corpus/text/a\.jsonl: cannot be read at byte [\d,]+ \(.*; tried 3"):
            file.read()


def test_a_vanished_object_is_named_and_not_asked_for_again(s3: Server, bucket: Callable[..., None]) -> None:
    bucket("PUT", "/corpus/gone/a.jsonl", JSON_LINES)
    source = Source("s", "s3://corpus/gone")
    unit = find_units(source)[0]
    bucket("DELETE", "/corpus/gone/a.jsonl")
    s3.seen.clear()
    with pytest.raises(UserError, match=r"s3://corpus/gone/a\.jsonl: .*not there.*put it back"):
        list(read_records(unit, source))
    assert len(s3.seen) <= 2


def test_an_object_that_changes_while_it_is_read_is_named(
    s3: Server, bucket: Callable[..., None], small_blocks: None
) -> None:
    bucket("PUT", "/corpus/change/a.jsonl", JSON_LINES)
    with open_binary("s3://corpus/change/a.jsonl") as file:
        file.read(1000)
        bucket("PUT", "/corpus/change/a.jsonl", JSON_LINES.replace(b"a", b"b"))
        with pytest.raises(UserError, match=r"s3://corpus/change/a\.jsonl: changed since"):
            file.read()


def test_missing_and_wrong_credentials_are_named(s3: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    assert find_units(Source("s", "s3://corpus/text"))
    s3.answer = lambda *_: (403, {"Content-Type": "application/xml"}, b"<Error><Code>AccessDenied</Code></Error>")
    for path in ("s3://corpus/text", "s3://corpus/text/*.jsonl", "s3://corpus/text/a.jsonl"):
        s3.seen.clear()
        with pytest.raises(UserError, match=rf"{re.escape(path)}: .*no access.*AWS_PROFILE.*AWS_ACCESS_KEY_ID"):
            find_units(Source("s", path))
        assert len(s3.seen) <= 3
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    forget()
    with pytest.raises(UserError, match=r"s3://corpus/text: .*NoCredentialsError.*AWS_ACCESS_KEY_ID"):
        find_units(Source("s", "s3://corpus/text"))


def test_a_missing_bucket_or_folder_is_nothing_to_read(s3: Server) -> None:
    for path in ("s3://nosuchbucket/text", "s3://corpus/nothing", "s3://corpus/nothing/*.jsonl"):
        with pytest.raises(UserError, match=f"nothing to read at '{re.escape(path)}'"):
            find_units(Source("s", path))


@pytest.mark.parametrize("path", ["s3://", "s3:///x", "hf://alone", "https://", "nosuch://x"])
def test_an_odd_address_is_named(path: str) -> None:
    with pytest.raises(UserError, match=re.escape(path)):
        find_units(Source("s", path))


def test_a_row_group_costs_its_text_column_and_the_footer(s3: Server) -> None:
    content = CORPUS["d.parquet"]
    source = Source("s", "s3://corpus/text/d.parquet")
    units = find_units(source)
    assert [unit.part for unit in units] == [0, 1, 2]
    s3.seen.clear()
    assert [raw.decode() for raw in read_records(units[1], source)] == TEXTS[1000:2000]
    column = parquet.ParquetFile(io.BytesIO(content)).metadata.row_group(1).column(0)
    footer_bytes = 64 << 10  # pyarrow looks for it in as many at the end
    assert sum(entry[3] for entry in s3.of("GET")) == column.total_compressed_size + footer_bytes
    assert len(s3.of("GET")) == 2
    assert len(s3.seen) <= 3


def test_a_row_group_is_read_through_cut_connections(s3: Server, small_blocks: None) -> None:
    source = Source("s", "s3://corpus/text/d.parquet")
    units = find_units(source)
    s3.faults = [100, None, 1000, 503, 70_000, None, 0]
    assert [raw.decode() for raw in read_records(units[2], source)] == TEXTS[2000:3000]
    assert not s3.faults
    s3.faults = [None] + [403] * 9
    with pytest.raises(UserError, match=r"d\.parquet: .*no access") as caught:  # and not CorruptFile
        list(read_records(units[2], source))
    assert type(caught.value) is UserError


def test_ranges_of_a_remote_file_give_each_document_once(
    s3: Server, small_blocks: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sources, "SPLIT_BYTES", 200_000)
    source = Source("s", "s3://corpus/text/a.jsonl")
    units = find_units(source)
    assert len(units) == -(-len(JSON_LINES) // 200_000)
    s3.seen.clear()
    assert [decode_record(raw, unit, source).text for unit in units for raw in read_records(unit, source)] == TEXTS
    # Each range ends in a line of the next, for which one more buffer is read.
    assert sum(entry[3] for entry in s3.of("GET")) < len(JSON_LINES) + len(units) * files._REMOTE_BUFFER_BYTES


def _read_in_child(unit: Unit, source: Source, results: Any) -> None:
    results.put([decode_record(raw, unit, source).text for raw in read_records(unit, source)])


def test_a_unit_is_read_in_a_worker_process(s3: Server) -> None:
    source = Source("s", "s3://corpus/text/e.txt")
    unit = find_units(source)[0]
    assert pickle.loads(pickle.dumps(unit)) == unit
    context = multiprocessing.get_context("spawn")
    results = context.Queue()
    worker = context.Process(target=_read_in_child, args=(unit, source, results))
    worker.start()
    assert results.get(timeout=60) == [TEXTS[5]]
    worker.join()


# HTTP


def test_a_web_server_gives_the_documents_of_local_files(web: Callable[..., Server]) -> None:
    for ranges in (True, False):
        server = web(CORPUS, ranges=ranges)
        for name in ("a.jsonl", "b.json.gz", "deep/c.jsonl.zst", "e.txt"):
            assert documents(f"{server.url}/{name}") == (TEXTS if name != "e.txt" else [TEXTS[5]]), (name, ranges)
    server = web(CORPUS)
    assert documents(f"{server.url}/d.parquet") == TEXTS
    assert documents(f"{server.url}/a.jsonl?download=true") == TEXTS
    assert documents(f"{server.url}/") == TEXTS * 4 + [TEXTS[5]]
    for path, size in find_files(f"{server.url}/", lambda name: name.endswith(".jsonl")):
        assert (path, size) == (f"{server.url}/a.jsonl", len(JSON_LINES))


def test_a_large_file_is_not_fetched_to_be_listed(web: Callable[..., Server]) -> None:
    server = web({"big.jsonl": JSON_LINES})
    assert len(find_units(Source("s", f"{server.url}/big.jsonl"))) == 1
    assert sum(entry[3] for entry in server.seen) == 0


@pytest.mark.parametrize("ranges", [True, False])
def test_a_web_server_that_breaks_off_is_read_to_the_end(
    ranges: bool, web: Callable[..., Server], small_blocks: None
) -> None:
    server = web({"noise.txt": NOISE}, ranges=ranges)
    server.faults = [None, 40_000, 503, 0, 429, *([None, 70_000] if ranges else [])]
    assert read_all(f"{server.url}/noise.txt") == NOISE
    assert not server.faults


def test_a_server_without_ranges_is_read_in_one_piece(
    web: Callable[..., Server], small_blocks: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sources, "SPLIT_BYTES", 200_000)
    server = web(CORPUS, ranges=False)
    assert len(find_units(Source("s", f"{server.url}/a.jsonl"))) == 1
    assert documents(f"{server.url}/a.jsonl") == TEXTS
    with pytest.raises(UserError, match=r"d\.parquet: its server sends whole files only.*range requests"):
        find_units(Source("s", f"{server.url}/d.parquet"))
    assert len(find_units(Source("s", f"{web(CORPUS).url}/a.jsonl"))) > 1


@pytest.mark.parametrize("ranges", [True, False])
def test_a_web_file_that_changes_is_named(ranges: bool, web: Callable[..., Server], small_blocks: None) -> None:
    content = {"noise.txt": NOISE}
    server = web(content, ranges=ranges)
    with open_binary(f"{server.url}/noise.txt") as file:
        assert file.read(1000) == NOISE[:1000]
        content["noise.txt"] = NOISE[::-1]
        with pytest.raises(UserError, match=r"noise\.txt: changed since it was first seen"):
            file.read()


def test_a_parquet_file_that_changes_is_named(web: Callable[..., Server]) -> None:
    content = {"d.parquet": CORPUS["d.parquet"]}
    source = Source("s", f"{web(content).url}/d.parquet")
    unit = find_units(source)[1]
    records = read_records(unit, source)
    with open_for_parts(unit.path) as file:
        content["d.parquet"] = CORPUS["d.parquet"][:-100]
        file.seek(1000)
        with pytest.raises(UserError, match=r"d\.parquet: changed since it was first seen \(ETag was|size was"):
            file.read(10)
    with pytest.raises(UserError, match=r"d\.parquet: changed since") as caught:
        list(records)
    assert type(caught.value) is UserError


@pytest.mark.parametrize(("status", "words"), [(401, "no access.*netrc"), (403, "no access"), (400, "cannot be")])
def test_a_web_server_that_refuses_is_named_at_once(status: int, words: str, web: Callable[..., Server]) -> None:
    server = web(CORPUS)
    server.answer = lambda *_: (status, {}, b"")
    with pytest.raises(UserError, match=rf"a\.jsonl: .*{words}"):
        find_units(Source("s", f"{server.url}/a.jsonl"))
    assert len(server.seen) <= 2
    server.answer = lambda *_: (404, {}, b"")
    with pytest.raises(UserError, match="nothing to read"):
        find_units(Source("s", f"{server.url}/a.jsonl"))


def test_a_server_that_is_not_there_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{taken.getsockname()[1]}/a.jsonl"
        with pytest.raises(UserError, match=rf"{url}: cannot be listed \(.*; tried {remote.TRIES} times\)"):
            find_units(Source("s", url))


# Google's storage


def google(method: str, path: str, headers: dict[str, str], body: bytes) -> tuple[int, dict[str, str], bytes]:
    """What Google's storage answers about a bucket with the corpus, and about one that is not for everybody."""
    is_json = {"Content-Type": "application/json"}
    address, _, query = path.partition("?")
    if "/private/" in address:
        return 403, is_json, json.dumps({"error": {"code": 403, "message": "Anonymous caller"}}).encode()
    prefix = dict(parse_qsl(query)).get("prefix", "")
    about = {n: {"name": n, "bucket": "corpus", "size": str(len(c)), "crc32c": "c"} for n, c in CORPUS.items()}
    if address.endswith("/o"):
        return 200, is_json, json.dumps({"items": [about[n] for n in CORPUS if n.startswith(prefix)]}).encode()
    name = unquote(address.rpartition("/o/")[2])
    if name not in CORPUS:
        return 404, is_json, b"{}"
    if "media" in query:
        return over_http({"it": CORPUS[name]}, ranges=True)(method, "/it", headers, body)
    return 200, is_json, json.dumps(about[name]).encode()


def test_google_gives_the_documents_of_local_files(monkeypatch: pytest.MonkeyPatch) -> None:
    server = Server(google)
    monkeypatch.setenv("STORAGE_EMULATOR_HOST", server.url)
    try:
        assert documents("gs://corpus") == TEXTS * 4 + [TEXTS[5]]
        assert documents("gs://corpus/deep") == TEXTS
        assert remote.version("gs://corpus/a.jsonl") == {"size": len(JSON_LINES), "crc32c": "c"}
        with pytest.raises(UserError, match=r"^gs://private/a: .*no access.*GOOGLE_APPLICATION_CREDENTIALS.*gcloud"):
            find_units(Source("s", "gs://private/a"))
        with pytest.raises(UserError, match="nothing to read"):
            find_units(Source("s", "gs://corpus/none.jsonl"))
    finally:
        server.shutdown()
        server.server_close()


# The Hub


def hub(method: str, path: str, headers: dict[str, str], body: bytes) -> tuple[int, dict[str, str], bytes]:
    """What the Hub answers about a dataset o/d that holds the corpus, for those with the right token."""
    path = path.partition("?")[0]
    is_json = {"Content-Type": "application/json"}
    if headers.get("Authorization") != "Bearer hf_right" or "private" in path:
        return 401, is_json | {"X-Error-Code": "RepoNotFound"}, b"{}"
    if path == "/api/datasets/o/d":
        return 200, is_json, json.dumps({"id": "o/d", "sha": "0" * 40, "siblings": []}).encode()
    if path == "/api/datasets/o/d/tree/main":
        tree = [{"type": "file", "path": n, "size": len(c), "oid": f"{len(c):040}"} for n, c in CORPUS.items()]
        return 200, is_json, json.dumps(tree).encode()
    lies = {f"datasets/o/d/resolve/main/{name}": content for name, content in CORPUS.items()}
    return over_http(lies, ranges=True)(method, path, headers, body)


READ_HUB = """
import sys
from openelm.data.remote import version
from openelm.data.sources import Source, decode_record, find_units, read_records
from openelm.errors import UserError
source = Source("s", "hf://datasets/o/d")
units = find_units(source)
texts = [decode_record(raw, unit, source).text for unit in units for raw in read_records(unit, source)]
try:
    find_units(Source("s", "hf://datasets/o/private"))
except UserError as error:
    print(ascii((sorted({unit.path for unit in units}), version(units[0].path), texts, str(error))))
"""


def test_the_hub_gives_the_documents_of_local_files_to_those_with_a_token() -> None:
    server = Server(hub)
    # The library takes the address of the Hub when it is imported.
    environment = {**os.environ, "HF_ENDPOINT": server.url, "HF_TOKEN": "hf_right", "HF_HUB_DISABLE_TELEMETRY": "1"}
    server.faults = [None, None, 60_000, 0]
    command = [sys.executable, "-c", READ_HUB]
    try:
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120, check=True)
    finally:
        server.shutdown()
        server.server_close()
    paths, version, texts, refusal = ast.literal_eval(done.stdout)
    assert texts == TEXTS * 4 + [TEXTS[5]]
    assert paths == [f"hf://datasets/o/d/{name}" for name in sorted(CORPUS) if name != "f.png"]
    assert version == {"size": len(JSON_LINES), "blob_id": f"{len(JSON_LINES):040}"}
    assert re.search(r"^hf://datasets/o/private: .*no access.*HF_TOKEN.*hf auth login", refusal)


# Reading ahead


def test_the_next_block_comes_while_the_current_one_is_used(web: Callable[..., Server], small_blocks: None) -> None:
    server = web({"noise.txt": NOISE})
    with open_binary(f"{server.url}/noise.txt") as file:
        assert file.read(10) == NOISE[:10]
        deadline = time.monotonic() + 10
        while len(server.of("GET")) < 2 and time.monotonic() < deadline:
            time.sleep(0.01)
        time.sleep(0.05)
        # One block in use and one ahead, however long the reader waits.
        assert [entry[2] for entry in server.of("GET")] == ["bytes=0-49999", "bytes=50000-149999"]
        file.seek(1_000_000)
        assert file.read(400_000) == NOISE[1_000_000:1_400_000]
        file.seek(-5, io.SEEK_END)
        assert file.read() == NOISE[-5:]


def test_readers_left_open_share_threads_and_memory(
    web: Callable[..., Server], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(remote, "MEMORY_BYTES", 1 << 20)
    monkeypatch.setattr(remote, "LEAST_BLOCK_BYTES", 1 << 12)
    monkeypatch.setattr(remote, "FIRST_BLOCK_BYTES", 1 << 12)
    server = web({"noise.txt": NOISE})
    readers = [RemoteFile(f"{server.url}/noise.txt") for _ in range(12)]
    held = []
    for position in range(0, 40_000, 4_000):
        for file in readers:
            assert file.read(4_000) == NOISE[position : position + 4_000]
        held.append(sum(len(file._block) for file in readers))
    assert max(held) <= remote.MEMORY_BYTES
    assert sum(thread.name == "openelm-read" for thread in threading.enumerate()) <= 16
    before = len(remote._open_files)
    readers[0].close()
    del file, readers
    gc.collect()
    assert len(remote._open_files) == before - 12


def test_a_reader_may_stop_early_and_read_nothing_more(web: Callable[..., Server], small_blocks: None) -> None:
    server = web(CORPUS)
    source = Source("s", f"{server.url}/a.jsonl")
    records = read_records(find_units(source)[0], source)
    assert json.loads(next(records))["text"] == TEXTS[0]
    records.close()  # type: ignore[attr-defined]
    time.sleep(0.05)
    assert len(server.of("GET")) <= 2


def test_parts_are_fetched_as_asked(web: Callable[..., Server]) -> None:
    server = web({"noise.txt": NOISE, "empty.txt": b""})
    with open_for_parts(f"{server.url}/noise.txt") as file:
        file.seek(1000)
        assert file.read(7) == NOISE[1000:1007]
        file.seek(-3, io.SEEK_END)
        assert file.read(9) == NOISE[-3:] and file.read(1) == b""
        assert [entry[2] for entry in server.of("GET")] == ["bytes=1000-1006", "bytes=1999997-1999999"]
    assert read_all(f"{server.url}/empty.txt") == b""
    assert documents(f"{server.url}/empty.txt") == [""]


def test_file_and_memory_urls(tmp_path: Path) -> None:
    import fsspec

    (tmp_path / "a.jsonl").write_bytes(JSON_LINES)
    (tmp_path / "d.parquet").write_bytes(CORPUS["d.parquet"])
    assert documents(f"file://{tmp_path}") == TEXTS * 2
    memory = fsspec.filesystem("memory")
    memory.pipe("/twice/a.jsonl", JSON_LINES)
    try:
        # Two readers of one file, of which fsspec's memory has one object.
        with open_binary("memory://twice/a.jsonl") as one, open_binary("memory://twice/a.jsonl") as other:
            assert one.read(100) == other.read(100) == JSON_LINES[:100]
            assert one.read() == other.read() == JSON_LINES[100:]
    finally:
        memory.rm("/twice", recursive=True)
