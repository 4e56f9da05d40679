"""Errors of huggingface_hub in plain words, with what the user can do. Only the process that downloads imports it."""

from __future__ import annotations

import errno
import os

from huggingface_hub import constants, get_token
from huggingface_hub.errors import (
    DisabledRepoError,
    EntryNotFoundError,
    GatedRepoError,
    HfHubHTTPError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from daemon.models.files import ModelError
from daemon.models.hub.name import HubName

_TOO_MANY, _SERVER_ERRORS = 429, 500


def is_temporary(error: Exception) -> bool:
    """Return True if the same request may succeed later: no network, or a hub that cannot answer now."""
    error = _cause(error)
    if isinstance(error, HfHubHTTPError):
        return _status(error) >= _SERVER_ERRORS or _status(error) == _TOO_MANY
    if isinstance(error, OSError):  # not of httpx, of which no error is an OSError
        return error.errno is None and "Consistency check failed" in str(error)
    return _of_http_client(error)


def explain(error: Exception, name: HubName) -> str:
    """Return what went wrong and what to do."""
    hub, error = constants.ENDPOINT, _cause(error)
    if isinstance(error, ModelError):
        return str(error)
    if isinstance(error, HfHubHTTPError):
        return _http_error(error, hub, name)
    if isinstance(error, OSError):
        return _os_error(error, name)
    if _of_http_client(error):
        return (
            f"cannot reach {hub} to get {name}: {_first_line(error)}; check the network, or set HTTPS_PROXY for a "
            "proxy or HF_ENDPOINT for another hub. A model that was downloaded before starts without a network"
        )
    return f"cannot download {name}: {type(error).__name__}: {_first_line(error)}"


def _http_error(error: HfHubHTTPError, hub: str, name: HubName) -> str:
    match error:
        case GatedRepoError():
            return _gated(hub, name.repo)
        case RevisionNotFoundError():
            again = f"; `llumd pull {name.repo}` takes the newest one" if name.is_commit else ""
            return f"{name.repo} has no revision {name.revision!r} on {hub}{again}"
        case RepositoryNotFoundError():
            return _not_found(hub, name.repo)
        case DisabledRepoError():
            return f"{hub} has disabled access to {name.repo}"
        case EntryNotFoundError():
            return f"{hub} lists a file of {name} that it does not have: {_first_line(error)}"
    return _by_status(error, hub, name)


def _gated(hub: str, repo: str) -> str:
    if get_token():
        return (
            f"{repo} is gated, and the account of your token has no access to it: accept its terms at {hub}/{repo} "
            "with this account, and give the token the right to read gated repositories"
        )
    return (
        f"{repo} is gated: accept its terms at {hub}/{repo}, make a token at {hub}/settings/tokens, and set HF_TOKEN "
        "to it"
    )


def _not_found(hub: str, repo: str) -> str:
    token = (
        "the account of your token has no access to it" if get_token() else "it is private and HF_TOKEN is not set"
    )
    return f"{repo}: no such directory here, and no such repository on {hub}, or {token}; check the spelling"


def _by_status(error: HfHubHTTPError, hub: str, name: HubName) -> str:
    status = _status(error)
    if status == 401:
        return f"{hub} does not accept your token (HF_TOKEN, or the one of `hf auth login`); make a new one"
    if status == 403:
        return f"{hub} does not allow access to {name} ({_first_line(error)}); check the rights of your token"
    if status == _TOO_MANY:
        token = "" if get_token() else ", or set HF_TOKEN"
        return f"{hub} has had too many requests from here; wait some minutes{token}"
    if status >= _SERVER_ERRORS:
        return f"{hub} answers with status {status} now; try again later. What was downloaded stays"
    return f"{hub} answers with status {status} for {name}: {_first_line(error)}"


def _os_error(error: OSError, name: HubName) -> str:
    cache = constants.HF_HUB_CACHE
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return (
            f"the disk of {cache} became full during the download of {name}; free some space and start again: what "
            "was downloaded stays. HF_HOME chooses another directory"
        )
    if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EEXIST):
        where = f" ({error.filename})" if error.filename else ""
        why = os.strerror(error.errno)
        return f"cannot write to the cache {cache}: {why}{where}; set HF_HOME to a directory that llumd may write to"
    return f"cannot download {name}: {error.strerror or _first_line(error)}"


def _cause(error: Exception) -> Exception:
    """Return what is behind the error that a file is not in the cache and could not be asked for."""
    if isinstance(error, LocalEntryNotFoundError) and isinstance(error.__cause__, Exception):
        return error.__cause__
    return error


def _status(error: HfHubHTTPError) -> int:
    return int(error.response.status_code)


def _of_http_client(error: BaseException) -> bool:
    # huggingface_hub 1 uses httpx and 2 uses httpx2, so the class cannot be named.
    return type(error).__module__.partition(".")[0] in ("httpx", "httpx2", "httpcore", "httpcore2")


def _first_line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0].rstrip(".") if lines else type(error).__name__
