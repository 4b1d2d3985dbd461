"""A Hugging Face Hub on this machine: what `huggingface_hub` and `transformers` ask of one, in memory.

Large files are redirected to another host, as the hub does, which must not be sent the token. Anything that is asked
otherwise than the hub's clients do, is answered 501 and kept in `unknown`.
"""

import base64
import hashlib
import json
import re
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import PurePosixPath
from threading import Thread
from typing import Any, NamedTuple
from urllib.parse import parse_qs, unquote, urlsplit

LARGE = (".safetensors", ".parquet", ".bin")
_ID = r"(?P<id>[\w.-]+(?:/[\w.-]+)?)"
_INFO = re.compile(rf"/api/(?P<kind>models|datasets)/{_ID}(?:/revision/(?P<revision>[^/]+))?")
_TREE = re.compile(rf"/api/(?P<kind>models|datasets)/{_ID}/tree/(?P<revision>[^/]+)(?:/(?P<path>.*))?")
_FILE = re.compile(rf"/(?:(?P<kind>datasets)/)?{_ID}/resolve/(?P<revision>[^/]+)/(?P<path>.+)")
_STORED = re.compile(r"/stored/(?P<sha256>[0-9a-f]{64})")
_PREUPLOAD = re.compile(rf"/api/models/{_ID}/preupload/main")
_BATCH = re.compile(rf"/{_ID}\.git/info/lfs/objects/batch")
_COMMIT = re.compile(rf"/api/models/{_ID}/commit/main")


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
    held: float = 0.0  # seconds later
    seconds: float = 0.0  # before the answer


class Repository:
    """Commits by hash, each with all of its files; `refs` are branches and tags."""

    def __init__(self, gated: bool = False, private: bool = False) -> None:
        self.commits: dict[str, dict[str, bytes]] = {}
        self.refs: dict[str, str] = {}
        self.gated, self.private = gated, private

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
        self.renamed: dict[str, str] = {}  # ids, by those that they had
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

    def repository(self, id: str, kind: str = "models", gated: bool = False, private: bool = False) -> Repository:
        return self.repositories.setdefault((kind, id), Repository(gated, private))

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
        """Uploads, as the client does them without Xet: repository, modes, large files, commit."""
        path, body = unquote(urlsplit(self.path).path), self._body()
        self.server.requests.append(Request(self.command, path, None, self.headers["Authorization"]))
        self._fault = self.server.fault(path)
        if found := _STORED.fullmatch(path):
            return self._store(found["sha256"], body)
        if self.command != "POST":
            return self._unknown()
        if path == "/api/validate-yaml":
            return self._json({"warnings": [], "errors": []})
        if not self.headers["Authorization"]:
            return self._refuse(401, "", "Invalid username or password.")
        if path == "/api/repos/create":
            return self._create(json.loads(body))
        for pattern, answer in ((_PREUPLOAD, self._modes), (_BATCH, self._places), (_COMMIT, self._commit)):
            if found := pattern.fullmatch(path):
                return answer(found["id"], body)
        return self._unknown()

    do_PUT = do_DELETE = do_PATCH = do_OPTIONS = do_POST

    def _body(self) -> bytes:
        if self.headers["Transfer-Encoding"] != "chunked":
            return self.rfile.read(int(self.headers["Content-Length"] or 0))
        parts = list[bytes]()
        while size := int(self.rfile.readline(), 16):
            parts.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(parts)

    def _create(self, asked: dict[str, Any]) -> None:
        id = "/".join(filter(None, (asked["organization"], asked["name"])))
        known = ("models", id) in self.server.repositories
        if not known:
            private = asked.get("visibility") == "private" or asked.get("private") is True
            self.server.repositories["models", id] = Repository(private=private)
        self._json({"url": f"{self.server.url}/{id}"}, 409 if known else 200)

    def _modes(self, id: str, body: bytes) -> None:
        paths = [file["path"] for file in json.loads(body)["files"]]
        modes = ["lfs" if path.endswith(LARGE) else "regular" for path in paths]
        pairs = zip(paths, modes, strict=True)
        self._json({"files": [{"path": path, "uploadMode": mode, "shouldIgnore": False} for path, mode in pairs]})

    def _places(self, id: str, body: bytes) -> None:
        found = []
        for one in json.loads(body)["objects"]:
            place = {"href": f"{self.server.store}/stored/{one['oid']}"}
            found.append({"oid": one["oid"], "size": one["size"], "actions": {"upload": place}})
        self._json({"transfer": "basic", "objects": found})

    def _store(self, sha256: str, content: bytes) -> None:
        if self.command != "PUT" or hashlib.sha256(content).hexdigest() != sha256:
            return self._unknown()
        self.server.stored[sha256] = content
        self._send(200, b"", {})

    def _commit(self, id: str, body: bytes) -> None:
        repository, lines = self.server.repositories["models", id], [json.loads(line) for line in body.splitlines()]
        files = dict(repository.commits.get(repository.refs.get("main", ""), {}))
        for key, value in ((line["key"], line["value"]) for line in lines):
            if key == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif key == "lfsFile":
                files[value["path"]] = self.server.stored[value["oid"]]
        commit = repository.push(files)
        self._json({"commitUrl": f"{self.server.url}/{id}/commit/{commit}", "commitOid": commit, "success": True})

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
        for old, new in self.server.renamed.items():
            if re.match(rf"(/api)?(/models|/datasets)?/{re.escape(old)}/", f"{path}/"):
                return self._send(307, b"", {"Location": self.path.replace(old, new, 1)})
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
            self.wfile.write(body[:cut] if self.command != "HEAD" else b"")
            if self._fault and self.command != "HEAD":
                time.sleep(self._fault.held)
        self.close_connection = self.close_connection or cut is not None

    def _json(self, value: Any, status: int = 200) -> None:
        self._send(status, json.dumps(value).encode(), {"Content-Type": "application/json"})

    def _refuse(self, status: int, code: str, message: str, **headers: str) -> None:
        self._send(status, b"", {"X-Error-Code": code, "X-Error-Message": message} | headers)

    def _found(self, kind: str | None, id: str, revision: str | None) -> tuple[Repository, str] | None:
        """A repository and the commit of a revision; None once it is refused."""
        repository = self.server.repositories.get((kind or "models", id))
        if repository is None or (repository.private and not self.headers["Authorization"]):
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
            about = {
                "id": id,
                "sha": commit,
                "private": repository.private,
                "gated": "auto" if repository.gated else False,
            }
            self._json(about | {"siblings": files, "tags": [], "downloads": 0, "likes": 0})

    def _tree(self, kind: str, id: str, revision: str, path: str | None) -> None:
        """Files and folders below `path`: all with `recursive`, else those that lie in it."""
        asked = parse_qs(urlsplit(self.path).query)
        if not asked.keys() <= {"recursive", "expand"} or asked.get("expand", ["false"])[0].lower() == "true":
            return self._unknown()
        if found := self._found(kind, id, revision):
            repository, commit = found
            files, prefix = repository.commits[commit], f"{path}/" if path else ""
            below = [name for name in files if name.startswith(prefix)]
            if path and not below:
                return self._refuse(404, "EntryNotFound", f"{path} does not exist on {revision}")
            folders = {str(folder) for name in below for folder in PurePosixPath(name).parents[:-1]}
            entries = [{"type": "directory", "path": name, "size": 0, "oid": _oid(b"")} for name in sorted(folders)]
            entries += [self._entry(name, files[name]) for name in below]
            inside = [one for one in entries if one["path"].startswith(prefix)]
            if asked.get("recursive", ["false"])[0].lower() != "true":
                inside = [one for one in inside if "/" not in one["path"].removeprefix(prefix)]
            self._json(inside)

    def _entry(self, name: str, content: bytes) -> dict[str, Any]:
        entry: dict[str, Any] = {"type": "file", "path": name, "size": len(content), "oid": _oid(content)}
        if name.endswith(LARGE):
            sha256 = hashlib.sha256(content).hexdigest()
            entry["lfs"] = {"oid": sha256, "size": len(content), "pointerSize": 134}
        return entry

    def _file(self, kind: str | None, id: str, revision: str, path: str) -> None:
        if urlsplit(self.path).query:
            return self._unknown()
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
