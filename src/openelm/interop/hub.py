"""The Hugging Face Hub: model folders from it and to it, and what its refusals mean in one line.

huggingface_hub reads HF_TOKEN, HF_ENDPOINT, HF_HUB_OFFLINE, HF_HOME when it is first imported, which is in the
functions here; all of them are its own and work as its documentation says.
"""

from __future__ import annotations

import re
import shutil
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from fnmatch import fnmatch
from pathlib import Path
from typing import TYPE_CHECKING, Any

from openelm.data.backends import is_passing
from openelm.errors import UserError
from openelm.files import disk_errors_named

if TYPE_CHECKING:
    from huggingface_hub import HfApi

HUB_ID = re.compile(r"(?P<repo>\w[\w.-]*/\w[\w.-]*)(@(?P<revision>[\w./-]+))?")
# What git forbids in the name of a branch: characters, pairs, beginnings and ends (of each part between slashes).
_NO_BRANCH = re.compile(r"[\x00-\x20\x7f~^:?*\[\\]|\.\.|//|@\{|^[-/]|(^|/)\.|(/|\.|\.lock)$|\.lock/")
ANSWER_S = 10.0  # for the Hub's first answer: a network that swallows packets would hold us for minutes
TOKENIZER_FILES = ("tokenizer.model", "tokenizer.json", "tokenizer_config.json")
MODEL_FILES = (
    *("config.json", "generation_config.json", "*.safetensors", "*.safetensors.index.json"),
    *(*TOKENIZER_FILES, "chat_template.jinja", "README.md", "LICENSE*"),
    # Of other models, which are measured beside ours.
    *("vocab.json", "merges.txt", "special_tokens_map.json", "added_tokens.json"),
)
_OF_ADAPTER = ("adapter_config.json", "adapter_model*.safetensors", "chat_template.jinja")
ADAPTER_FILES = (*_OF_ADAPTER, *(f"adapter/{name}" for name in _OF_ADAPTER))  # at the top, or as `openelm push` has it
PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")

# All carry LLaMA's own SentencePiece model of 32,000 ids, with which OpenELM was trained: the files are equal.
GATED_TOKENIZER = "meta-llama/Llama-2-7b-hf"
OPEN_TOKENIZERS = (
    "NousResearch/Llama-2-7b-hf",
    "huggyllama/llama-7b",
    "hf-internal-testing/llama-tokenizer",
    "TinyLlama/TinyLlama-1.1B-Chat-v1.0",
)
TOKENIZER_SHA256 = "9e556afd44213b6bd1be2b850ebbbd98f5481437a8021afaf58ee7fb1818d347"  # of their tokenizer.model


def split_reference(reference: str) -> tuple[str, str | None]:
    """(repository, revision) of "OWNER/NAME" or "OWNER/NAME@REVISION"; UserError for anything else."""
    found = HUB_ID.fullmatch(reference)
    if found is None:
        raise UserError(f"{reference!r} is no name on the Hub: write OWNER/NAME, or OWNER/NAME@REVISION")
    return found["repo"], found["revision"]


def check_branch(name: str) -> None:
    """UserError for a name that git does not allow for a branch: the Hub would refuse it after others were sent."""
    if not name or name in ("@", "HEAD") or _NO_BRANCH.search(name):
        raise UserError(
            f"{name!r} cannot be the name of a branch, by git's rules: take letters, digits, - and _, with single dots "
            "and slashes between them"
        )


def download(reference: str) -> Path:
    """The folder of a model on the Hub, with the files that we read; from the cache where nothing has changed.

    Where the Hub is out of reach, the cache serves what it has. UserError, one line: no such repository or revision,
    a gate, no login, no network, no room, or nothing there that can be read without executing it.
    """
    return _snapshot(reference, MODEL_FILES, _check_model)


def download_tokenizer(reference: str) -> Path:
    """A folder with the tokenizer of a repository on the Hub, and nothing else of it; UserError as ``download``."""
    return _snapshot(reference, TOKENIZER_FILES, _check_tokenizer)


def download_adapter(reference: str) -> Path:
    """A folder with the adapter of a repository, or with its adapter/, and nothing else; UserError as ``download``."""
    return _snapshot(reference, ADAPTER_FILES, _check_adapter)


def model_path(reference: str) -> Path:
    """The path itself where there is one, else the downloaded folder of a repository on the Hub."""
    return _here_or(download, reference)


def adapter_path(reference: str) -> Path:
    """As ``model_path``, of an adapter's folder or a run's."""
    return _here_or(download_adapter, reference)


def tokenizer_path(reference: str) -> Path:
    """As ``model_path``, of a tokenizer's file or folder."""
    return _here_or(download_tokenizer, reference)


def tokenizer_help(reference: str) -> str:
    """What to do about a model that comes without its tokenizer, as Apple's OpenELM folders do."""
    return (
        f"{reference} has no tokenizer. OpenELM was trained with LLaMA's, of 32,000 ids: pass --tokenizer with the "
        f"path of its tokenizer.model, or with a Hub id: {GATED_TOKENIZER} (gated: ask for access on its page, then "
        f"set HF_TOKEN), or one of its ungated copies: {', '.join(OPEN_TOKENIZERS)}. With any other tokenizer the ids "
        "mean other words, and the text is nonsense"
    )


def _here_or(fetch: Callable[[str], Path], reference: str) -> Path:
    path = Path(reference)
    if path.exists() or not HUB_ID.fullmatch(reference):
        return path
    try:
        return fetch(reference)
    except UserError as error:  # a path that is mistyped may have the form of a name
        raise UserError(f"{reference} is no file or folder here, so the Hub was asked: {error}") from error


def _snapshot(reference: str, wanted: tuple[str, ...], check: Callable[[str, list[str]], None]) -> Path:
    repo, revision = split_reference(reference)
    with errors_named(repo, revision):
        api = _api()
        flat = not any("/" in pattern for pattern in wanted)
        patterns: dict[str, Any] = {"allow_patterns": list(wanted), "ignore_patterns": ["*/*"] if flat else None}
        try:
            info = api.model_info(repo, revision=revision, timeout=ANSWER_S, files_metadata=True)
        except Exception as error:
            if not is_passing(error):
                raise
            folder = _cached(api, repo, revision, patterns, error)
            check(reference, [file.relative_to(folder).as_posix() for file in folder.rglob("*") if file.is_file()])
            return folder
        sizes = {file.rfilename: file.size or 0 for file in info.siblings or ()}
        check(reference, list(sizes))
        chosen = {name: size for name, size in sizes.items() if _is_wanted(name, wanted)}
        _check_room(reference, repo, info.sha, chosen)
        return Path(api.snapshot_download(repo, revision=revision, **patterns))


def _cached(api: HfApi, repo: str, revision: str | None, patterns: dict[str, Any], why: Exception) -> Path:
    """What an earlier download has left, where the Hub is out of reach."""
    from huggingface_hub import constants
    from huggingface_hub.errors import LocalEntryNotFoundError

    try:
        folder = api.snapshot_download(repo, revision=revision, local_files_only=True, **patterns)
    except LocalEntryNotFoundError as error:
        if constants.HF_HUB_OFFLINE:
            raise UserError(
                f"{repo} is not whole in the cache ({constants.HF_HUB_CACHE}), and HF_HUB_OFFLINE forbids to fetch "
                "it: unset HF_HUB_OFFLINE once, or give a local folder"
            ) from error
        raise why from why.__cause__
    if not constants.HF_HUB_OFFLINE:
        print(f"{constants.ENDPOINT} is out of reach ({_words(why)}): {repo} is taken from the cache", file=sys.stderr)
    return Path(folder)


def _is_wanted(name: str, wanted: tuple[str, ...]) -> bool:
    return any(fnmatch(name, pattern) and name.count("/") == pattern.count("/") for pattern in wanted)


def _check_model(reference: str, names: list[str]) -> None:
    """UserError where these files hold no model, or only one that runs code when it is opened."""
    if any(_is_wanted(name, ("*.safetensors",)) for name in names) and "config.json" in names:
        return
    if "adapter_config.json" in names:
        raise UserError(
            f"{reference} is an adapter, and no model by itself: make one with `openelm merge MODEL {reference} OUT`, "
            "where MODEL is the one that it was trained on"
        )
    if pickles := [name for name in names if name.endswith(PICKLES)]:
        raise UserError(
            f"{reference} has its weights in {pickles[0]} only, and PyTorch's pickles can execute code when they are "
            "opened: take a repository with safetensors, or download a CoreNet .pt and give its path"
        )
    missing = "*.safetensors" if "config.json" in names else "config.json"
    there = ", ".join(sorted(names)[:6]) or "nothing"
    raise UserError(f"{reference} has no {missing}, so it is no model folder; it holds {there}: check the name")


def _check_tokenizer(reference: str, names: list[str]) -> None:
    if not {"tokenizer.model", "tokenizer.json"} & set(names):
        raise UserError(
            f"{reference} has neither tokenizer.model nor tokenizer.json: take {OPEN_TOKENIZERS[0]}, or give a path"
        )


def _check_adapter(reference: str, names: list[str]) -> None:
    for place in ("", "adapter/"):
        if f"{place}adapter_config.json" in names:
            if any(_is_wanted(name, (f"{place}adapter_model*.safetensors",)) for name in names):
                return
            raise UserError(
                f"{reference} has an adapter_config.json, but no adapter_model.safetensors: have its maker save it so "
                "(peft: save_pretrained with safe_serialization=True)"
            )
    raise UserError(
        f"{reference} has no adapter_config.json, at its top or in adapter/, so it is no adapter: check the name"
    )


def _check_room(reference: str, repo: str, commit: str | None, sizes: dict[str, int]) -> None:
    """UserError where the files that are not in the cache yet do not fit: huggingface_hub only warns, and begins."""
    from huggingface_hub import constants, try_to_load_from_cache

    missing = sum(
        size for name, size in sizes.items() if not isinstance(try_to_load_from_cache(repo, name, revision=commit), str)
    )
    cache = Path(constants.HF_HUB_CACHE)
    place = next((folder for folder in (cache, *cache.parents) if folder.exists()), None)
    free = shutil.disk_usage(place).free if place else 0
    if place and missing > free:
        raise UserError(
            f"{reference} takes {missing / 1e9:.1f} GB more, and {constants.HF_HUB_CACHE} has room for "
            f"{free / 1e9:.1f} GB: free some disk, or set HF_HOME to a larger one"
        )


def create(repo: str, *, private: bool) -> str:
    """Make a repository where there is none; the address of its page.

    UserError: no login or no right, it holds something else than an OpenELM, or it is public and ``private`` is asked.
    """
    from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError

    with errors_named(repo, writing=True):
        api = _api()
        try:
            info = api.model_info(repo, timeout=ANSWER_S)
        except GatedRepoError:
            raise
        except RepositoryNotFoundError:
            api.create_repo(repo, private=private, exist_ok=True)
            return f"{api.endpoint}/{repo}"
        if private and not info.private:
            raise UserError(
                f"{repo} is there and public, so --private would not be kept: make it private in its settings "
                f"({api.endpoint}/{repo}/settings), or choose another name"
            )
        kind = (info.config or {}).get("model_type", "openelm")
        if kind != "openelm":
            raise UserError(f"{repo} holds a model of type {kind}, which would be lost: choose another name")
        return f"{api.endpoint}/{repo}"


def upload(folder: Path, repo: str, revision: str, message: str, *, replaces: Iterable[str]) -> str:
    """Put a folder into a branch of a repository, in one commit; its hash.

    The branch is made where there is none. What is there of ``replaces`` (patterns) and not in the folder is deleted.
    A second attempt sends only what is not there yet. UserError as ``create``.
    """
    with errors_named(repo, revision, writing=True):
        api = _api()
        if revision != "main":
            api.create_branch(repo, branch=revision, exist_ok=True)
        done = api.upload_folder(
            repo_id=repo,
            folder_path=folder,
            revision=revision,
            commit_message=message,
            delete_patterns=list(replaces),
        )
        return str(done.oid)


def _api() -> HfApi:
    from huggingface_hub import HfApi

    from openelm import __version__

    return HfApi(library_name="openelm", library_version=__version__)


@contextmanager
def errors_named(repo: str, revision: str | None = None, *, writing: bool = False) -> Iterator[None]:
    """Turn what the Hub, the network or the disk refuses into a UserError of one line; our own mistakes stay."""
    from huggingface_hub import constants

    try:
        with disk_errors_named(Path(constants.HF_HUB_CACHE)):
            yield
    except UserError:
        raise
    except Exception as error:
        text = _explained(error, repo, revision, writing=writing)
        if text is None:
            raise
        raise UserError(text) from error


def _explained(error: Exception, repo: str, revision: str | None, *, writing: bool) -> str | None:
    """The first error of the chain that says something to a user: the client wraps some in words of its own."""
    from huggingface_hub import constants, errors

    page = f"{constants.ENDPOINT}/{repo}"
    login = "set HF_TOKEN, or run `hf auth login`"
    for found in _chain(error):
        status = getattr(getattr(found, "response", None), "status_code", None)
        said = _one_line(getattr(found, "server_message", None) or "the Hub gives no reason")
        if isinstance(found, errors.GatedRepoError):
            who = "with the account of your token" if status == 403 else f"then {login}"
            return f"{repo} is gated ({said}): ask for access on {page}, {who}"
        if isinstance(found, errors.RepositoryNotFoundError):
            remedy = "check the name" if writing else f"check the name; a local folder is written ./{repo}"
            return f"{constants.ENDPOINT} has no model {repo}, or it is private: {remedy}; for a private one {login}"
        if isinstance(found, errors.RevisionNotFoundError):
            return f"{repo} has no revision {revision}: its branches and tags are listed on {page}/tree/main"
        if isinstance(found, errors.EntryNotFoundError) and not is_passing(error):
            return f"{repo} lacks a file ({_one_line(str(found))}): it may be changing just now; try again"
        if isinstance(found, errors.HFValidationError):
            return f"{repo} cannot be a name on the Hub ({_one_line(str(found))}): choose OWNER/NAME by that rule"
        if status == 401:
            kind = "a token that may write" if writing else "a token"
            return f"the Hub does not know who you are ({said}): {login}, with {kind} from {_settings(constants)}"
        if status == 403:
            if writing:
                return (
                    f"your token may not write to {repo} ({said}): make one that may at {_settings(constants)}, or "
                    "choose a name under an account of yours"
                )
            return f"your token may not read {repo} ({said}): ask its owner, or take another token"
        if isinstance(found, errors.OfflineModeIsEnabled):
            return f"HF_HUB_OFFLINE is set, and {repo} is on the Hub: unset HF_HUB_OFFLINE"
        if status is not None and not is_passing(found):
            return f"{repo}: the Hub refuses (status {status}: {said})"
    if is_passing(error):
        again = "run the same command again, nothing is sent twice" if writing else f"{repo} is not in the cache"
        return (
            f"{constants.ENDPOINT} cannot be reached, or broke off ({_words(error)}): {again}; check the network, and "
            "HF_ENDPOINT and the proxy where they are set"
        )
    if isinstance(error, ValueError) and "README.md" in str(error):
        return f"the Hub refuses the model card ({_one_line(str(error))}): mend the first lines of README.md"
    if isinstance(error, OSError | RuntimeError):  # hf_xet, which moves large files, has few errors of its own
        return f"{repo}: the transfer failed ({_words(error)}): run the same command again"
    return None


def _settings(constants: Any) -> str:
    return f"{constants.ENDPOINT}/settings/tokens"


def _chain(error: BaseException) -> Iterator[BaseException]:
    at: BaseException | None = error
    while at is not None:
        yield at
        at = at.__cause__


def _words(error: BaseException) -> str:
    """The innermost cause in one line; requests has the system's own words deep in its message."""
    root = list(_chain(error))[-1]
    system = re.search(r"\[Errno -?\d+\] [\w ]+", str(root))
    return system[0] if system else f"{type(root).__name__}: {_one_line(str(root))}"


def _one_line(text: str) -> str:
    return " ".join(text.split())[:300]
