"""A Hub on loopback, for the real huggingface_hub client: repositories in memory, and failures on demand."""

import base64
import hashlib
import json
import re
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

import pytest
import yaml

LARGE = (".safetensors", ".png")  # kept in the store for large files, as the Hub's .gitattributes has it


class Refusal(Exception):  # noqa: N818 (it is an answer)
    """An answer that is no success: the Hub says more in two headers than in the status."""

    def __init__(self, status: int, message: str, code: str = "") -> None:
        super().__init__(message)
        self.status, self.code = status, code


@dataclass
class Repository:
    """Branches -> commits -> files, and who may see them."""

    private: bool = False
    granted: set[str] | None = None  # users that its gate lets through; None: no gate
    commits: dict[str, dict[str, bytes]] = field(default_factory=dict)
    branches: dict[str, str] = field(default_factory=dict)

    def commit(self, branch: str, files: dict[str, bytes]) -> str:
        sha = hashlib.sha1(f"{len(self.commits)} {branch}".encode()).hexdigest()
        self.commits[sha], self.branches[branch] = files, sha
        return sha

    def at(self, revision: str) -> tuple[str, dict[str, bytes]]:
        sha = self.branches.get(revision, revision)
        if sha not in self.commits:
            raise Refusal(404, f"Invalid rev id: {revision}", "RevisionNotFound")
        return sha, self.commits[sha]


class Hub(ThreadingHTTPServer):
    """``add`` a repository; ``users`` maps tokens to names. ``requests`` is all that was asked, in order."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server_port}"
        self.users = {"token-of-me": "me", "token-of-you": "you"}
        self.repositories: dict[str, Repository] = {}
        self.store: dict[str, bytes] = {}  # large files by SHA-256
        self.requests: list[str] = []
        self.cut_after: int | None = None  # bytes of a file, after which the connection breaks, once
        self.failing: list[tuple[str, int]] = []  # (a pattern of requests, the status that one of them gets)

    def add(self, name: str, files: dict[str, bytes], **options: Any) -> Repository:
        self.repositories[name] = Repository(**options)
        self.repositories[name].commit("main", files)
        return self.repositories[name]

    def asked(self, pattern: str) -> list[str]:
        return [request for request in self.requests if re.search(pattern, request)]


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True  # or each answer waits 40 ms for its body
    server: Hub

    def handle_one(self) -> None:
        address = urlsplit(self.path)
        self.query = parse_qs(address.query)
        self.body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        request = f"{self.command} {unquote(address.path)}"
        self.server.requests.append(f"{request} {self.headers.get('Range') or ''}".strip())
        try:
            for failure in self.server.failing:
                if re.search(failure[0], request):
                    self.server.failing.remove(failure)
                    raise Refusal(failure[1], "the server has a bad day")
            for pattern, action in ROUTES:
                # The pieces of a path are unquoted one by one: a branch may hold a slash.
                if found := re.fullmatch(pattern, f"{self.command} {address.path}"):
                    action(self, *map(unquote, found.groups()))
                    return
            raise Refusal(404, "there is nothing at this address")
        except Refusal as refusal:
            self.answer({"error": str(refusal)}, refusal.status, {"X-Error-Code": refusal.code} if refusal.code else {})

    do_GET = do_HEAD = do_POST = do_PUT = handle_one  # noqa: N815

    def log_message(self, *_: object) -> None:
        pass

    def answer(self, data: Any, status: int = 200, headers: dict[str, str] | None = None) -> None:
        content = json.dumps(data).encode()
        message = {"X-Error-Message": str(data["error"])} if status >= 400 else {}
        self.send_response(status)
        for name, value in {"Content-Length": str(len(content)), **message, **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    @property
    def user(self) -> str:
        """Who asks, by the token; "" without one."""
        token = (self.headers.get("Authorization") or "").removeprefix("Bearer ")
        if token and token not in self.server.users:
            raise Refusal(401, "Invalid credentials in Authorization header")
        return self.server.users.get(token, "")

    def repository(self, name: str, *, files: bool = False, write: bool = False) -> Repository:
        """A repository, where the user may do that with it; the private ones of others are not there at all."""
        owner, found = name.split("/")[0], self.server.repositories.get(name)
        if found is None or (found.private and self.user != owner):
            raise Refusal(404 if self.user else 401, "Repository not found", "RepoNotFound")
        if files and found.granted is not None and self.user not in found.granted:
            why = "you are not on its list" if self.user else "you must log in and have access"
            raise Refusal(403 if self.user else 401, f"Access to model {name} is restricted: {why}", "GatedRepo")
        if write and self.user != owner:
            raise Refusal(403 if self.user else 401, f"{self.user or 'nobody'} may not write to {name}")
        return found

    def info(self, name: str, revision: str = "main") -> None:
        repository = self.repository(name)
        sha, files = repository.at(revision)
        siblings = [{"rfilename": path, "size": len(content)} for path, content in files.items()]
        config = json.loads(files.get("config.json", b"{}"))
        self.answer(
            {"id": name, "sha": sha, "private": repository.private, "siblings": siblings, "tags": []}
            | {"config": {"model_type": config["model_type"]} if "model_type" in config else {}}
        )

    def tree(self, name: str, revision: str) -> None:
        _, files = self.repository(name).at(revision)
        self.answer([entry(path, content) for path, content in files.items()])

    def resolve(self, name: str, revision: str, path: str) -> None:
        sha, files = self.repository(name, files=True).at(revision)
        if path not in files:
            raise Refusal(404, f"{path} is not there", "EntryNotFound")
        content, start = files[path], 0
        if asked := re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range") or ""):
            start = int(asked[1])
        self.send_response(206 if start else 200)
        self.send_header("Content-Length", str(len(content) - start))
        if start:
            self.send_header("Content-Range", f"bytes {start}-{len(content) - 1}/{len(content)}")
        self.send_header("ETag", f'"{oid(path, content)}"')
        self.send_header("X-Repo-Commit", sha)
        self.send_header("Accept-Ranges", "bytes")
        self.end_headers()
        if self.command == "HEAD":
            return
        cut = self.server.cut_after
        if cut is not None and cut < len(content):
            self.server.cut_after, content, self.close_connection = None, content[:cut], True
        self.wfile.write(content[start:])

    def who_am_i(self) -> None:
        if not self.user:
            raise Refusal(401, "Invalid username or password.")
        self.answer({"type": "user", "name": self.user, "orgs": []})

    def create(self) -> None:
        asked = json.loads(self.body)
        name = f"{asked.get('organization') or self.user}/{asked['name']}"
        if self.user != name.split("/")[0]:
            raise Refusal(403 if self.user else 401, f"no right to create {name}")
        if name in self.server.repositories:
            raise Refusal(409, f"{name} exists")
        private = bool(asked.get("private")) or asked.get("visibility") == "private"
        self.server.add(name, {".gitattributes": b"*.safetensors filter=lfs\n"}, private=private)
        self.answer({"url": f"{self.server.url}/{name}", "name": name})

    def branch(self, name: str, branch: str) -> None:
        repository = self.repository(name, write=True)
        if branch in repository.branches:
            raise Refusal(409, f"{branch} exists")
        repository.branches[branch] = repository.branches["main"]
        self.answer({})

    def validate_card(self) -> None:
        head = re.match(r"---\n(.*?)\n---", json.loads(self.body)["content"], re.DOTALL)
        try:
            yaml.safe_load(head[1] if head else "")
        except yaml.YAMLError as error:
            self.answer({"error": "bad YAML", "errors": [{"message": str(error)}], "warnings": []}, 400)
            return
        self.answer({"errors": [], "warnings": []})

    def preupload(self, name: str, revision: str) -> None:
        """Which way each file is to be sent, and what stands under its name already."""
        _, files = self.repository(name, write=True).at(revision)
        found = []
        for asked in json.loads(self.body)["files"]:
            path = asked["path"]
            mode = "lfs" if path.endswith(LARGE) else "regular"
            there = {"oid": oid(path, files[path])} if path in files else {}
            found.append({"path": path, "uploadMode": mode, "shouldIgnore": False, **there})
        self.answer({"files": found})

    def batch(self, name: str) -> None:
        """Git LFS: where to send each large file; nothing to do for those that are stored."""
        self.repository(name, write=True)
        objects = []
        for asked in json.loads(self.body)["objects"]:
            place = f"{self.server.url}/lfs/{asked['oid']}"
            actions = {"upload": {"href": place, "header": {}}, "verify": {"href": f"{place}/verify"}}
            objects.append(asked | ({} if asked["oid"] in self.server.store else {"actions": actions}))
        self.answer({"transfer": "basic", "objects": objects})

    def put(self, sha256: str) -> None:
        if hashlib.sha256(self.body).hexdigest() != sha256:
            raise Refusal(400, "the bytes are not those that were announced")
        self.server.store[sha256] = self.body
        self.answer({})

    def verify(self, sha256: str) -> None:
        asked = json.loads(self.body)
        if len(self.server.store.get(sha256, b"")) != asked["size"]:
            raise Refusal(400, f"{sha256} is not stored")
        self.answer({})

    def commit(self, name: str, revision: str) -> None:
        repository = self.repository(name, write=True)
        files = dict(repository.at(revision)[1])
        for line in self.body.splitlines():
            operation = json.loads(line)
            key, value = operation["key"], operation["value"]
            if key == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif key == "lfsFile":
                files[value["path"]] = self.server.store[value["oid"]]
            elif key == "deletedFile":
                del files[value["path"]]
        sha = repository.commit(revision, files)
        self.answer({"success": True, "commitOid": sha, "commitUrl": f"{self.server.url}/{name}/commit/{sha}"})


NAME = r"([\w.-]+/[\w.-]+)"
ROUTES = (
    (rf"GET /api/models/{NAME}", Handler.info),
    (rf"GET /api/models/{NAME}/revision/([^/]+)", Handler.info),
    (rf"GET /api/models/{NAME}/tree/([^/]+)", Handler.tree),
    (rf"(?:GET|HEAD) /{NAME}/resolve/([^/]+)/(.+)", Handler.resolve),
    (r"GET /api/whoami-v2", Handler.who_am_i),
    (r"POST /api/repos/create", Handler.create),
    (rf"POST /api/models/{NAME}/branch/([^/]+)", Handler.branch),
    (r"POST /api/validate-yaml", Handler.validate_card),
    (rf"POST /api/models/{NAME}/preupload/([^/]+)", Handler.preupload),
    (rf"POST /{NAME}\.git/info/lfs/objects/batch", Handler.batch),
    (r"PUT /lfs/(\w+)", Handler.put),
    (r"POST /lfs/(\w+)/verify", Handler.verify),
    (rf"POST /api/models/{NAME}/commit/([^/]+)", Handler.commit),
)


def oid(path: str, content: bytes) -> str:
    """What the Hub knows a content by: SHA-256 of a large file, git's hash of a small one."""
    if path.endswith(LARGE):
        return hashlib.sha256(content).hexdigest()
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


def entry(path: str, content: bytes) -> dict[str, Any]:
    found = {"type": "file", "path": path, "size": len(content), "oid": oid(path, content)}
    if path.endswith(LARGE):
        found |= {"oid": "0" * 40, "lfs": {"oid": oid(path, content), "size": len(content), "pointerSize": 130}}
    return found


@pytest.fixture
def hub(tmp_path, monkeypatch) -> Iterator[Hub]:
    """The server, the client pointed at it, an empty cache, and nobody logged in."""
    from huggingface_hub import constants, utils

    server = Hub()
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    # The client has read its variables already, when it was imported.
    monkeypatch.setattr(constants, "ENDPOINT", server.url)
    template = f"{server.url}/{{repo_id}}/resolve/{{revision}}/{{filename}}"
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)  # a protocol of its own, which is not spoken here
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "no-token"))
    monkeypatch.setenv("HF_HUB_DISABLE_TELEMETRY", "1")
    for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN"):
        monkeypatch.delenv(name, raising=False)
    utils.disable_progress_bars()
    yield server
    server.shutdown()
    server.server_close()
    thread.join()
