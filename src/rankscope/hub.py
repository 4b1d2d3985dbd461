"""The Hugging Face Hub, or a mirror at HF_ENDPOINT: commits, files, and failures in words. Its client is imported where
it is needed."""

import errno
import hashlib
import logging
import re
import shlex
from contextlib import suppress
from pathlib import Path
from typing import Any, Literal, NamedTuple

from filelock import FileLock

from rankscope.errors import RankscopeError, StudyError, reason_of
from rankscope.files import find_json, write_json

HUB_ID = re.compile(r"(?!.*(--|\.\.|\.git$))(\b[\w.-]+\b/)?\b[\w.-]{1,96}\b", re.ASCII)
"""Of a model or a data set, by the rules of the hub's client, which raises an error at others."""
_log = logging.getLogger(__name__)
_OFFLINE = "What was fetched once is used offline; HF_ENDPOINT names a mirror, HTTPS_PROXY a proxy."


class Repository(NamedTuple):
    """A repository as one commit of it is."""

    commit: str
    files: list[str]
    whole: bool  # whether `files` are all there are, not only those fetched earlier


def repository(id: str, kind: Literal["model", "dataset"], revision: str | None, file: str) -> Repository:
    """The commit that `revision` (default: main) is now, and its files. Without an answer of the hub it is the commit
    that was fetched last. `file` is one that is needed anyway: with it the cache learns which commit `revision` was.
    Raises the errors of the hub's client; `explained` has them in words."""
    import huggingface_hub as hub
    from huggingface_hub import errors

    _quiet()
    where: dict[str, Any] = {"repo_id": id, "repo_type": kind, "revision": revision}
    if revision and (files := _listed(kind, id, revision)):  # a commit stays as it is
        return Repository(revision, files, True)
    try:
        info: Any = hub.HfApi().repo_info(**where, timeout=hub.constants.HF_HUB_ETAG_TIMEOUT)
        with suppress(errors.EntryNotFoundError):
            hub.hf_hub_download(filename=file, **where)
    except (errors.RepositoryNotFoundError, errors.RevisionNotFoundError):
        raise
    except Exception as error:  # no answer: what an earlier study fetched, if anything
        folder = None
        with suppress(Exception):
            folder = Path(hub.snapshot_download(**where, local_files_only=True, allow_patterns=[file]))
        if folder is None:
            raise
        if not isinstance(error, errors.OfflineModeIsEnabled):
            reason, _ = explained(id, error) or (reason_of(error), "")
            _log.warning("%s: %s; commit %s is used, which was fetched before", id, reason, folder.name[:7])
        files = _listed(kind, id, folder.name)  # some of them may not have been fetched
        here = [path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()]
        return Repository(folder.name, files or here, files is not None)
    files = [one.rfilename for one in info.siblings or ()]
    with suppress(OSError):  # a cache that cannot be written
        write_json(_listing(kind, id, info.sha), {"files": files})
    return Repository(info.sha, files, True)


def _listing(kind: str, id: str, commit: str) -> Path:
    """File with the names of all files of a commit, for runs offline."""
    import huggingface_hub as hub

    return Path(hub.cached_assets_path("rankscope", kind, id.replace("/", "--"))) / f"{commit.replace('/', '--')}.json"


def _listed(kind: str, id: str, commit: str) -> list[str] | None:
    with suppress(RankscopeError, OSError):  # damaged, or in a cache that cannot be read
        if found := find_json(_listing(kind, id, commit)):
            return [*found["files"]]
    return None


def fetch(id: str, kind: Literal["model", "dataset"], commit: str, file: str) -> Path:
    """A file of a commit, in the cache. Raises the errors of the hub's client."""
    import huggingface_hub as hub

    _quiet()
    where: dict[str, Any] = {"repo_id": id, "filename": file, "repo_type": kind, "revision": commit}
    if not isinstance(hub.try_to_load_from_cache(**where), str):
        _download(id, kind, commit, file)
    return Path(hub.hf_hub_download(**where))


def _download(id: str, kind: str, commit: str, file: str) -> None:
    """Put the content of a large file where the client looks for it. What a killed process left of it is completed;
    the client itself begins anew in each process."""
    import huggingface_hub as hub
    from huggingface_hub.file_download import http_get, repo_folder_name
    from huggingface_hub.utils import build_hf_headers  # type: ignore[attr-defined]

    url, about = hub.hf_hub_url(id, file, repo_type=kind, revision=commit), hub.constants
    try:
        found = hub.get_hf_file_metadata(url)
    except Exception:  # which the client tries again, and raises
        return
    named = re.fullmatch("[0-9a-f]{40}|[0-9a-f]{64}", found.etag or "")  # a hash, which cannot lead out of the cache
    if not named or not about.DOWNLOAD_CHUNK_SIZE < (found.size or 0) <= about.MAX_HTTP_DOWNLOAD_SIZE:
        return
    blob = Path(about.HF_HUB_CACHE, repo_folder_name(repo_id=id, repo_type=kind), "blobs", named[0])
    part = blob.with_name(f"{blob.name}.part")
    part.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{part}.lock"):
        if blob.exists():
            return
        with part.open("ab+") as content:
            begun = content.tell()
            http_get(url, content, resume_size=begun, headers=build_hf_headers(), expected_size=found.size)
            content.seek(0)
            if begun and len(blob.name) == 64 and hashlib.file_digest(content, "sha256").hexdigest() != blob.name:
                content.truncate(0)
                raise OSError("Consistency check failed: what an earlier process downloaded is damaged")
        part.replace(blob)


def push(id: str, folder: Path, message: str) -> str:
    """Commit the files of `folder` to the model repository `id`, made private where it does not exist, and return the
    commit's address. Raises StudyError: the hub refuses."""
    import huggingface_hub as hub

    _quiet()
    try:
        hub.create_repo(id, private=True, exist_ok=True)
        return str(hub.upload_folder(repo_id=id, folder_path=folder, commit_message=message).commit_url)
    except Exception as error:  # the hub's client raises its own errors, httpx's and the file system's
        reason, todo = explained(id, error) or (reason_of(error), "")
        todo = f"{todo} It is written; to push it: {shlex.join(['hf', 'upload', id, str(folder)])}".strip()
        raise StudyError(f"--push {id}: {reason}", todo) from None


def explained(id: str, error: BaseException) -> tuple[str, str] | None:
    """Why the hub did not give what was asked of it, and the way out; None where `error` is of something else. `id` is
    the address of its page: datasets/OWNER/NAME for data."""
    from huggingface_hub import constants, errors

    at = constants.ENDPOINT
    cause: BaseException | None = error
    while cause is not None:
        status = getattr(getattr(cause, "response", None), "status_code", None)
        if isinstance(cause, errors.GatedRepoError):
            todo = f"Accept its terms at {at}/{id}, then `hf auth login`, or set HF_TOKEN."
            return "it is gated, and this account has no access to it", todo
        if isinstance(cause, errors.RevisionNotFoundError):
            return "it has no such revision", f"Give a branch, a tag or a commit, not shortened: {at}/{id} lists them."
        if isinstance(cause, errors.RepositoryNotFoundError):
            todo = "Check the id. For a private one: `hf auth login`, or set HF_TOKEN."
            return f"{at} has none of that name, or it is private", todo
        if isinstance(cause, errors.RemoteEntryNotFoundError):
            return f"it has no file {str(cause.response.url).rpartition('/')[2]}", ""
        local = isinstance(cause, errors.LocalEntryNotFoundError) and cause.__cause__ is None
        if local or isinstance(cause, errors.OfflineModeIsEnabled):
            todo = "Check the id, or run once with HF_HUB_OFFLINE=0."
            return "not wholly in the cache, and HF_HUB_OFFLINE is set", todo
        if isinstance(cause, errors.DisabledRepoError):
            return f"{at} has disabled it", "Give a copy of it: another id, or a folder or file of your own."
        if status == 429:
            headers = cause.response.headers  # type: ignore[attr-defined]
            wait = re.search(r"^\d+$|\bt=(\d+)", headers.get("Retry-After") or headers.get("RateLimit") or "")
            after = f" in {wait[1] or wait[0]} seconds" if wait else " later"
            return "too many requests (429)", f"Run again{after}; `hf auth login` raises the limit."
        if status in (401, 403):
            return f"{at} refuses access ({status})", "Check the token: `hf auth whoami`, `hf auth login`, HF_TOKEN."
        if status is not None:
            return f"{at} answers {status}", f"Run again later. {_OFFLINE}"
        if isinstance(cause, OSError) and "Consistency check failed" in str(cause):
            return "the download broke off", "Run again: files that are whole are not fetched again."
        in_cache = str(getattr(cause, "filename", "")).startswith((constants.HF_HOME, constants.HF_HUB_CACHE))
        if isinstance(cause, OSError) and (in_cache or cause.errno == errno.ENOSPC):
            todo = f"It needs room and write access in {constants.HF_HUB_CACHE}; HF_HOME names another folder."
            return f"the hub's cache: {cause.strerror}" + (f": {cause.filename}" if in_cache else ""), todo
        if type(cause).__module__.startswith("httpx"):
            slow = "Timeout" in type(cause).__name__
            reason = "no answer in time" if slow else f"no connection: {' '.join(str(cause).split()) or 'closed'}"
            return f"{at}: {reason}", f"Check the network. {_OFFLINE}"
        cause = cause.__cause__ or cause.__context__
    return None


def _quiet() -> None:
    """Keep the client's retries and hints to itself; that it waits for a rate limit is told."""
    import huggingface_hub  # noqa: F401  its logger's handler is made by the import

    for handler in logging.getLogger("huggingface_hub").handlers:
        handler.addFilter(_is_told)


def _is_told(record: logging.LogRecord) -> bool:
    said = record.getMessage()
    return "Rate limited" in said or (record.levelno >= logging.ERROR and "cache non-existence" not in said)
