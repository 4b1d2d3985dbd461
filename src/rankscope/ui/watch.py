"""`rankscope watch`: a running study on a live page that looks like the report, or in the terminal.

The page is the report of the results so far, with the state of the run on top. It polls a local server, which reads the
study's files at each request and never writes. The server listens on the loopback address only and serves two paths.
"""

import json
import os
import sys
import threading
import time
import webbrowser
from contextlib import suppress
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

from rich.console import Console

from rankscope.analysis.verdict import conclude
from rankscope.errors import StudyDirectoryError, StudyError
from rankscope.report import html
from rankscope.report.content import Content, compose
from rankscope.study.evidence import Evidence
from rankscope.study.study import Study
from rankscope.text.catalogue import Catalogue
from rankscope.text.verdict import verdict_sentence
from rankscope.ui.live import LiveStudy, State, trial_rows
from rankscope.ui.progress import TerminalProgress, in_order, lines, view, whole_left

LOOPBACK = "127.0.0.1"
MIN_POLL_SECONDS = 2.0  # shortest interval between two requests of the page
MAX_CPU_SHARE = 0.05  # largest share of one core for a page that is watched: the run is being measured
TERMINAL_SECONDS = 2.0  # interval between two reads of the study for the terminal


class Watch:
    """Content of the page, read from the study in `path` at each request."""

    def __init__(self, path: Path, text: Catalogue) -> None:
        self.path, self.text, self.live = path, text, LiveStudy(path)
        self._ended: list[str] = []  # statuses of the trials, and what they show
        self._verdict: dict[str, Any] = {}
        self._lock = threading.Lock()  # a browser sends requests in parallel

    def page(self) -> str:
        with self._lock:
            state = self.live.read()
            return html.render(self._content(state), self.text, now=self._now(state))

    def news(self) -> dict[str, Any]:
        """Update for an open page: the state, the charts, and the milliseconds until the next request."""
        with self._lock:
            start = time.thread_time()
            state = self.live.read()
            found = {"now": self._now(state), "charts": html.specifications(self._content(state))}
            taken = time.thread_time() - start
            return found | {"again_ms": round(1000 * max(MIN_POLL_SECONDS, taken / MAX_CPU_SHARE))}

    def _content(self, state: State) -> Content:
        """The report of the results so far. It concludes anew when a trial has ended: the run is being measured."""
        study = Study.of(self.live.study)  # as the reader has just seen it: opening walks the whole study
        evidence, ended = study.evidence(), [trial.status for trial in state.trials]
        if self._ended != ended or state.doing == "done":
            self._ended, self._verdict = ended, _verdict(study, evidence, state)
        return compose(evidence, self._verdict, self.text, str(self.path))

    def _now(self, state: State) -> dict[str, Any]:
        """State as the page shows it; the page reloads its tables when `part` changes."""
        statuses = ",".join(trial.status for trial in state.trials)
        return {
            "lines": lines(state, self.text),
            "rows": trial_rows(in_order(state), state.steps, self.text),
            "share": state.share,
            "left": whole_left(state, self.text),
            "so_far": _caveat(state, self.text),
            "part": f"{state.doing} {list(state.training)} {state.profiles_done} {statuses}",
        }


def _verdict(study: Study, evidence: Evidence, state: State) -> dict[str, Any]:
    """The study's verdict, or, until it is done, the conclusion from what has ended by now."""
    if state.doing != "done":
        with suppress(StudyError):  # the evidence of an old study allows none
            return conclude(evidence)
    return study.find_verdict()


def _caveat(state: State, text: Catalogue) -> str:
    """What a verdict rests on while the study is not done; empty once it is."""
    return "" if state.doing == "done" else text("live.so_far", done=state.ended, total=len(state.trials))


def serve(watch: Watch, port: int) -> ThreadingHTTPServer:
    """Return a server bound to a port, not yet running; port 0 takes a free one."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            # DNS rebinding: a foreign page that resolves to this address has another Host.
            port = self.connection.getsockname()[1]
            if self.headers.get("Host") not in {f"{name}:{port}" for name in (LOOPBACK, "localhost")}:
                self._answer(HTTPStatus.FORBIDDEN, "text/plain", "unknown host")
                return
            try:
                if self.path == "/":
                    self._answer(HTTPStatus.OK, "text/html", watch.page())
                elif self.path == "/news.json":
                    self._answer(HTTPStatus.OK, "application/json", json.dumps(watch.news(), allow_nan=False))
                else:
                    self._answer(HTTPStatus.NOT_FOUND, "text/plain", "nothing here")
            except StudyDirectoryError as error:  # not begun, or being written
                self._answer(HTTPStatus.SERVICE_UNAVAILABLE, "text/plain", error.what, Refresh="2")

        def _answer(self, status: HTTPStatus, kind: str, body: str, **more: str) -> None:
            content = body.encode()
            self.send_response(status)
            headers = {"Content-Type": f"{kind}; charset=utf-8", "Content-Length": str(len(content))}
            headers |= {"Cache-Control": "no-store", "X-Content-Type-Options": "nosniff", "X-Frame-Options": "DENY"}
            for name, value in (headers | more).items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(content)

        def log_message(self, format: str, *args: Any) -> None:
            """Log nothing: the terminal is the user's."""

    return ThreadingHTTPServer((LOOPBACK, port), Handler)


def address(server: ThreadingHTTPServer) -> str:
    return f"http://{LOOPBACK}:{server.server_port}/"


def watch_page(path: Path, port: int, console: Console, text: Catalogue, browser: bool) -> None:
    """Serve the page until Ctrl-C, and open it where there is a desktop. Raises StudyError: the port cannot be used."""
    try:
        server = serve(Watch(path, text), port)
    except OSError as error:
        raise StudyError(f"--port {port}: {error.strerror}", "Choose another, or leave it out.") from None
    console.print(text("live.watching", path=path, address=address(server)))
    if browser and (sys.platform != "linux" or {"DISPLAY", "WAYLAND_DISPLAY"} & os.environ.keys()):
        webbrowser.open(address(server))
    server.serve_forever()


def watch_terminal(path: Path, console: Console, text: Catalogue) -> None:
    """Show the study and the verdict so far, until it is done or stopped; once where output is no terminal."""
    study, progress = Study.open(path), TerminalProgress(console, path, text, told=True)
    ended, note = list[str](), ""
    with progress:
        while True:
            try:
                state = progress.read()
                if ended != (ended := [trial.status for trial in state.trials]):
                    study = Study.open(path)  # it may have grown
                    sentence = verdict_sentence(_verdict(study, study.evidence(), state), text.language)
                    note = "\n".join(filter(None, [_caveat(state, text), sentence]))
            except StudyDirectoryError:
                if study.holder() is None:
                    raise
            else:
                if state.doing in ("done", "stopped") or not console.is_terminal:
                    break
                progress.show(state, note)
            time.sleep(TERMINAL_SECONDS)
    console.print(view(state, text, note=note))
