"""fsspec's file systems, and what their errors mean: nothing there, no access, another version, a fault that may pass.

Each backend has exceptions of its own, and some hide the cause behind "not found"; so the chain of causes is looked at.
"""

from __future__ import annotations

import errno
import http.client
import os
import re
from collections.abc import Iterator
from functools import cache
from typing import Any

from openelm.errors import UserError

# A client's own mistakes that waiting mends: it was too slow, too early, or too often there.
_STATUS_PASSING = {408, 425, 429}
_STATUS_DENIED = {401, 403, 407}
_STATUS_ABSENT = {404, 410}
_ERRNO_LASTING = {errno.EINVAL, errno.EPERM, errno.EACCES, errno.ENOENT, errno.EISDIR, errno.ENOTDIR, errno.ENOSYS}
_ABSENT = (FileNotFoundError, IsADirectoryError, NotADirectoryError)
# Packages whose exceptions need not be an OSError.
_NETWORK = re.compile(r"(aiohttp|aiobotocore|botocore|gcsfs|google|requests|urllib3|huggingface_hub|http\w*)(\.|$)")
# The Hub says "not found" of a private repository.
_DENIED_NAME = re.compile(r"Credential|Profile|Gated|RefreshError|Token|RepositoryNotFound")
_LASTING_NAME = re.compile(r"Validation|Invalid|Certificate")
_LOGIN = {
    "s3": "set AWS_PROFILE, or AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY (a public bucket: FSSPEC_S3_ANON=true)",
    "gs": "set GOOGLE_APPLICATION_CREDENTIALS, or run `gcloud auth application-default login` "
    "(a public bucket: FSSPEC_GS_TOKEN=anon)",
    "hf": "check the name; for a private or gated dataset set HF_TOKEN, or run `hf auth login`, "
    "and accept the terms on its page",
    "https": "put login and password for its host in ~/.netrc, or take an address that carries its own token",
}
_LOGIN |= {"s3a": _LOGIN["s3"], "gcs": _LOGIN["gs"], "http": _LOGIN["https"]}


def file_system_of(url: str) -> tuple[Any, str]:
    """fsspec's file system for a URL, and the path inside it."""
    import fsspec

    try:
        if "::" in url:
            file_system, inner = fsspec.core.url_to_fs(url)
            return file_system, inner
        protocol = url.partition("://")[0]
        options = fsspec.get_filesystem_class(protocol)._get_kwargs_from_urls(url) or {}
        file_system = _shared_file_system(os.getpid(), protocol, tuple(sorted(options.items())))
        return file_system, file_system._strip_protocol(url)
    except ImportError as error:
        raise UserError(
            f"{url}: its backend is not installed ({error}): pip install 'openelm-framework[remote]'"
        ) from error
    except ValueError as error:
        raise UserError(
            f"{url}: {error}: use a local path or s3://, gs://, hf:// or https:// "
            "(pip install 'openelm-framework[remote]')"
        ) from error


@cache
def _shared_file_system(process: int, protocol: str, options: tuple[tuple[str, Any], ...]) -> Any:
    """One for all threads of a process: fsspec would make one for each, and each would list and connect anew."""
    import fsspec

    more: dict[str, Any] = {}
    if protocol in ("http", "https"):
        import aiohttp

        # aiohttp's own limit is for a whole answer, which takes long where a server sends whole files. Packed files
        # are to arrive packed.
        client = {
            "timeout": aiohttp.ClientTimeout(total=None, sock_connect=30, sock_read=60),
            "headers": {"Accept-Encoding": "identity"},
            "trust_env": True,
        }
        more = {"client_kwargs": client | fsspec.config.conf.get(protocol, {}).get("client_kwargs", {})}
    elif protocol in ("s3", "s3a"):
        # s3fs tries again by itself, and so do we: three times over would be for minutes.
        once = {"retries": {"total_max_attempts": 1}}
        more = {"config_kwargs": once | fsspec.config.conf.get(protocol, {}).get("config_kwargs", {})}
    return fsspec.filesystem(protocol, **dict(options), **more)


def is_absent(error: BaseException) -> bool:
    """Whether there is no such file, folder, bucket or repository."""
    if is_denied(error):
        return False
    if (status := _status(error)) is not None:
        return status in _STATUS_ABSENT
    return isinstance(_root(error), _ABSENT)


def is_denied(error: BaseException) -> bool:
    """Whether the login is missing, or does not suffice."""
    if (status := _status(error)) is not None:
        return status in _STATUS_DENIED or any(_DENIED_NAME.search(type(e).__name__) for e in _chain(error))
    return any(
        isinstance(e, PermissionError)
        or _DENIED_NAME.search(type(e).__name__)
        or (isinstance(e, OSError) and str(e).startswith("Forbidden:"))  # Google's 403
        for e in _chain(error)
    )


def is_changed(error: BaseException) -> bool:
    """Whether the server has another version than the one that was opened."""
    return _status(error) == 412 or type(error).__name__ == "FileExpired"


def is_passing(error: BaseException) -> bool:
    """Whether trying again may help."""
    if isinstance(error, TimeoutError):
        return True
    if (status := _status(error)) is not None:
        return status in _STATUS_PASSING or status >= 500
    root = _root(error)
    if is_denied(error) or is_changed(error) or isinstance(root, (*_ABSENT, ValueError)):
        return False
    if _LASTING_NAME.search(type(root).__name__) or getattr(root, "errno", None) in _ERRNO_LASTING:
        return False
    is_network = _NETWORK.match(type(root).__module__) is not None
    return is_network or isinstance(root, OSError | EOFError | TimeoutError | http.client.HTTPException)


def named(error: Exception, failure: str, url: str, tries: int) -> Exception:
    """The error for the user, ``failure`` first ("URL: cannot be read at byte 5"); our own mistakes as they are."""
    cause = _words(error)
    protocol = url.partition("://")[0]
    if is_denied(error):
        login = _LOGIN.get(protocol, "check your login for it")
        return UserError(f"{failure} (no access: {cause}): {login}")
    if is_absent(error):
        return UserError(f"{failure} (not there: {cause}): put it back if it was removed since, or check the address")
    if is_passing(error):
        return UserError(
            f"{failure} ({cause}; tried {tries} times): its server, or the network to it, fails: "
            "start again when it answers; a run goes on from its last checkpoint"
        )
    root = _root(error)
    # A backend finds fault with an address by a ValueError.
    if isinstance(root, OSError | ValueError | NotImplementedError) or _NETWORK.match(type(root).__module__):
        return UserError(f"{failure} ({cause}): check the address and your access to it")
    return error


def _chain(error: BaseException) -> Iterator[BaseException]:
    seen: set[int] = set()
    at: BaseException | None = error
    while at is not None and id(at) not in seen:
        seen.add(id(at))
        yield at
        at = at.__cause__


def _root(error: BaseException) -> BaseException:
    return list(_chain(error))[-1]


def _status(error: BaseException) -> int | None:
    """The HTTP status behind an error: aiohttp's, gcsfs', botocore's, or that of httpx and requests."""
    for e in _chain(error):
        response = getattr(e, "response", None)
        if isinstance(response, dict):
            response = response.get("ResponseMetadata", {}).get("HTTPStatusCode")
        # Others have a code too, which need not be a server's: aiohttp's for an answer that breaks off is 400.
        code = getattr(e, "code", None) if type(e).__module__.startswith("gcsfs") else getattr(e, "status", None)
        for status in (code, getattr(response, "status_code", response)):
            if isinstance(status, int) and 300 <= status < 600:
                return status
    return None


def _words(error: BaseException) -> str:
    """The innermost cause in one line."""
    root = _root(error)
    text = " ".join(str(root).split()) or str(root.args[0] if root.args else "")
    name = type(root).__name__
    return f"{name}: {text[:300]}" if text else name
