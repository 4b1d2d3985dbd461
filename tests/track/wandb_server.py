"""The part of a W&B server that its client needs: runs and their history, in memory."""

import gzip
import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread
from typing import Any, NamedTuple


class Received(NamedTuple):
    """A run by its id."""

    asked: dict[str, Any]
    """Input of the request that created the run."""
    history: dict[int, dict[str, Any]]
    """History rows by line number: a line that is sent twice is kept once, as W&B does."""
    summary: dict[str, Any]


class WandbServer(ThreadingHTTPServer):
    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.runs: dict[str, Received] = {}
        self.keys: set[str] = set()
        self.artifacts: list[dict[str, Any]] = []

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"

    def answer(self, question: dict[str, Any]) -> dict[str, Any]:
        given = question.get("variables") or {}
        named = re.search(r"(?:query|mutation) (\w+)", question["query"])  # some questions have no operationName
        match named and named[1]:
            case "Viewer":
                teams: dict[str, Any] = {"edges": []}
                return {"viewer": {"id": "u", "entity": "me", "username": "me", "flags": "{}", "teams": teams}}
            case "UpsertBucket":
                inserted = given["name"] is not None and given["name"] not in self.runs
                if inserted:
                    self.runs[given["name"]] = Received(given, {}, {})
                return {"upsertBucket": {"bucket": self.bucket(given["name"] or given["id"]), "inserted": inserted}}
            case "RunResumeStatus":
                bucket = self.bucket(given["name"]) if given["name"] in self.runs else None
                return {
                    "model": {"id": "p", "name": "rankscope", "entity": {"id": "e", "name": "me"}, "bucket": bucket}
                }
            case "CreateRunFiles":
                files = [{"name": name, "uploadUrl": f"{self.url}/upload"} for name in given["files"]]
                return {"createRunFiles": {"runID": "r", "uploadHeaders": [], "files": files}}
            case "ArtifactType":  # of an artifact that is not there
                return {"project": None}
            case "CreateArtifact":  # "committed": its files need not be sent
                self.artifacts.append(given["input"])
                artifact = {"id": "a", "state": "COMMITTED", "artifactSequence": {"latestArtifact": None}}
                return {"createArtifact": {"artifact": artifact}}
        return {}

    def bucket(self, name: str) -> dict[str, Any]:
        run = self.runs[name]
        last = [json.dumps(run.history[max(run.history)])] if run.history else []
        return {
            "id": name,
            "name": name,
            "displayName": run.asked.get("displayName"),
            "config": run.asked.get("config") or "{}",
            "summaryMetrics": json.dumps(run.summary),
            "logLineCount": 0,
            "historyLineCount": len(run.history),
            "eventsLineCount": 0,
            "historyTail": json.dumps(last),
            "eventsTail": "[]",
            "tags": [],
            "wandbConfig": '{"t": 1}',
            "project": {"id": "p", "name": "rankscope", "entity": {"id": "e", "name": "me"}},
        }

    def stream(self, name: str, files: dict[str, Any]) -> None:
        history = files.get("wandb-history.jsonl", {"offset": 0, "content": []})
        for number, line in enumerate(history["content"], start=history["offset"]):
            self.runs[name].history[number] = json.loads(line)
        for line in files.get("wandb-summary.json", {"content": []})["content"]:
            self.runs[name].summary.update(json.loads(line))


class _Handler(BaseHTTPRequestHandler):
    server: WandbServer

    def do_POST(self) -> None:
        content = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        if self.headers.get("Content-Encoding") == "gzip":
            content = gzip.decompress(content)
        self.server.keys.add(self.headers.get("Authorization") or "")
        answer: dict[str, Any] = {}
        if self.path == "/graphql":
            answer = {"data": self.server.answer(json.loads(content))}
        elif self.path.endswith("/file_stream"):
            self.server.stream(self.path.split("/")[-2], json.loads(content).get("files") or {})
        body = json.dumps(answer).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    do_PUT = do_POST

    def log_message(self, *_: Any) -> None: ...


@contextmanager
def wandb_server() -> Iterator[WandbServer]:
    with WandbServer() as server:
        Thread(target=server.serve_forever, daemon=True).start()
        yield server
        server.shutdown()
