"""A Hugging Face Hub on this machine: what `huggingface_hub` and `transformers` ask of one, in memory.

Large files are redirected to another host, as the hub does, which must not be sent the token. Anything that is asked
otherwise than the hub's clients do, is answered 501 and kept in `unknown`.
"""

import hashlib
import json
import re
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread
from typing import Any, NamedTuple
from urllib.parse import unquote, urlsplit

LARGE = (".safetensors", ".parquet", ".bin")
_ID = r"(?P<id>[\w.-]+(?:/[\w.-]+)?)"
_INFO = re.compile(rf"/api/(?P<kind>models|datasets)/{_ID}(?:/revision/(?P<revision>[^/]+))?")
_TREE = re.compile(rf"/api/(?P<kind>models|datasets)/{_ID}/tree/(?P<revision>[^/]+)(?:/(?P<path>.*))?")
_FILE = re.compile(rf"/(?:(?P<kind>datasets)/)?{_ID}/resolve/(?P<revision>[^/]+)/(?P<path>.+)")
_STORED = re.compile(r"/stored/(?P<sha256>[0-9a-f]{64})")


class Request(NamedTuple):
    method: str
    path: str
    range: str | None
    token: str | None


class Fault(NamedTuple):
    """What is wrong with the next `times` answers to paths that `pattern` is found in."""

    pattern: str
    times: int
    status: int = 0  # instead of the answer
    headers: tuple[tuple[str, str], ...] = ()
    cut: int | None = None  # the connection is closed after so many bytes
    seconds: float = 0.0  # before the answer


class Repository:
    """Commits by hash, each with all of its files; `refs` are branches and tags."""

    def __init__(self, gated: bool = False) -> None:
        self.commits: dict[str, dict[str, bytes]] = {}
        self.refs: dict[str, str] = {}
        self.gated = gated

    def push(self, files: dict[str, bytes], branch: str = "main") -> str:
        """Commit these files and no others; return the hash."""
        content = [(name, hashlib.sha256(data).hexdigest()) for name, data in sorted(files.items())]
        commit = hashlib.sha1(repr((content, len(self.commits))).encode(), usedforsecurity=False).hexdigest()
        self.commits[commit], self.refs[branch] = dict(files), commit
        return commit


class HubServer(ThreadingHTTPServer):
    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.repositories: dict[tuple[str, str], Repository] = {}
        self.requests: list[Request] = []
        self.unknown: list[str] = []
        self.faults: list[Fault] = []
        self.stored: dict[str, bytes] = {}

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"

    @property
    def store(self) -> str:
        """Large files: the same machine, which has another name there."""
        return f"http://localhost:{self.server_port}"

    def repository(self, id: str, kind: str = "models", gated: bool = False) -> Repository:
        return self.repositories.setdefault((kind, id), Repository(gated))

    def fail(self, pattern: str, times: int = 1, headers: dict[str, str] | None = None, **what: Any) -> None:
        self.faults.append(Fault(pattern, times, headers=tuple((headers or {}).items()), **what))

    def asked(self, pattern: str, method: str = "") -> list[Request]:
        return [one for one in self.requests if re.search(pattern, one.path) and one.method.startswith(method)]

    def fault(self, path: str) -> Fault | None:
        """The fault of this answer; one time fewer is left of it."""
        for index, fault in enumerate(self.faults):
            if fault.times and re.search(fault.pattern, path):
                self.faults[index] = fault._replace(times=fault.times - 1)
                return fault
        return None


class _Handler(BaseHTTPRequestHandler):
    server: HubServer
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        self._answer()

    def do_HEAD(self) -> None:
        self._answer()

    def do_POST(self) -> None:
        self._unknown()

    do_PUT = do_DELETE = do_PATCH = do_POST

    def log_message(self, *_: object) -> None: ...

    def _answer(self) -> None:
        path, headers = unquote(urlsplit(self.path).path), self.headers
        self.server.requests.append(Request(self.command, path, headers["Range"], headers["Authorization"]))
        self._fault = self.server.fault(path)
        if self._fault and self._fault.seconds:
            time.sleep(self._fault.seconds)
        if self._fault and self._fault.status:
            return self._send(self._fault.status, b"", dict(self._fault.headers))
        if path == "/api/agent-harnesses":  # names that a user agent may have
            return self._json({"standardEnvVars": [], "harnesses": {}})
        for pattern, answer in ((_STORED, self._stored), (_TREE, self._tree), (_INFO, self._info), (_FILE, self._file)):
            if found := pattern.fullmatch(urlsplit(self.path).path):
                return answer(*(value and unquote(value) for value in found.groups()))
        return self._unknown()

    def _unknown(self) -> None:
        self.server.unknown.append(f"{self.command} {self.path}")
        self._send(501, b"", {})

    def _send(self, status: int, body: bytes, headers: dict[str, str]) -> None:
        self.send_response(status)
        for name, value in ({"Content-Length": str(len(body))} | headers).items():
            self.send_header(name, value)
        cut = self._fault.cut if self._fault else None
        with suppress(ConnectionError):  # of a client that has given up
            self.end_headers()
            self.wfile.write(body[:cut] if self.command == "GET" else b"")
        self.close_connection = self.close_connection or cut is not None

    def _json(self, value: Any) -> None:
        self._send(200, json.dumps(value).encode(), {"Content-Type": "application/json"})

    def _refuse(self, status: int, code: str, message: str, **headers: str) -> None:
        self._send(status, b"", {"X-Error-Code": code, "X-Error-Message": message} | headers)

    def _found(self, kind: str | None, id: str, revision: str | None) -> tuple[Repository, str] | None:
        """A repository and the commit of a revision; None once it is refused."""
        repository = self.server.repositories.get((kind or "models", id))
        if repository is None:  # as a private one is answered
            self._refuse(401, "RepoNotFound", "Repository not found")
            return None
        commit = repository.refs.get(revision or "main", revision or "")
        if commit not in repository.commits:
            self._refuse(404, "RevisionNotFound", f"Invalid rev id: {revision}")
            return None
        return repository, commit

    def _info(self, kind: str, id: str, revision: str | None) -> None:
        if urlsplit(self.path).query:
            return self._unknown()
        if found := self._found(kind, id, revision):
            repository, commit = found
            files = [{"rfilename": name} for name in repository.commits[commit]]
            about = {"id": id, "sha": commit, "private": False, "gated": "auto" if repository.gated else False}
            self._json(about | {"siblings": files, "tags": [], "downloads": 0, "likes": 0})

    def _tree(self, kind: str, id: str, revision: str, path: str | None) -> None:
        if found := self._found(kind, id, revision):
            repository, commit = found
            below = [name for name in repository.commits[commit] if name.startswith(f"{path}/" if path else "")]
            if path and not below:
                return self._refuse(404, "EntryNotFound", f"{path} does not exist on {revision}")
            self._json([self._entry(name, repository.commits[commit][name]) for name in below])

    def _entry(self, name: str, content: bytes) -> dict[str, Any]:
        entry: dict[str, Any] = {"type": "file", "path": name, "size": len(content), "oid": _oid(content)}
        if name.endswith(LARGE):
            sha256 = hashlib.sha256(content).hexdigest()
            entry["lfs"] = {"oid": sha256, "size": len(content), "pointerSize": 134}
        return entry

    def _file(self, kind: str | None, id: str, revision: str, path: str) -> None:
        found = self._found(kind, id, revision)
        if found is None:
            return
        repository, commit = found
        if repository.gated and self.headers["Authorization"] != "Bearer hf_accepted":
            status = 403 if self.headers["Authorization"] else 401
            return self._refuse(status, "GatedRepo", f"Access to {id} is restricted")
        content = repository.commits[commit].get(path)
        if content is None:
            return self._refuse(404, "EntryNotFound", "Entry not found", **{"X-Repo-Commit": commit})
        if path.endswith(LARGE):
            sha256 = hashlib.sha256(content).hexdigest()
            self.server.stored[sha256] = content
            linked = {"X-Linked-Size": str(len(content)), "X-Linked-ETag": f'"{sha256}"'}
            where = {"Location": f"{self.server.store}/stored/{sha256}", "X-Repo-Commit": commit}
            return self._send(302, b"", where | linked)
        self._content(content, {"ETag": f'"{_oid(content)}"', "X-Repo-Commit": commit})

    def _stored(self, sha256: str) -> None:
        if self.headers["Authorization"] or sha256 not in self.server.stored:
            return self._unknown()
        self._content(self.server.stored[sha256], {"ETag": f'"{sha256}"'})

    def _content(self, content: bytes, headers: dict[str, str]) -> None:
        if asked := re.fullmatch(r"bytes=(\d+)-", self.headers["Range"] or ""):
            first = int(asked[1])
            about = {"Content-Range": f"bytes {first}-{len(content) - 1}/{len(content)}"}
            return self._send(206, content[first:], headers | about)
        if self.headers["Range"]:
            return self._unknown()
        if self.command == "HEAD":
            return self._send(200, b"", headers | {"Content-Length": str(len(content))})
        self._send(200, content, headers)


def _oid(content: bytes) -> str:
    """git's hash of a file."""
    return hashlib.sha1(b"blob %d\0" % len(content) + content, usedforsecurity=False).hexdigest()


@contextmanager
def serving() -> Iterator[HubServer]:
    """A hub without repositories, until the body ends. Fails where it was asked what it does not know."""
    server = HubServer()
    thread = Thread(target=server.serve_forever, args=(0.05,), daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
    assert server.unknown == []
