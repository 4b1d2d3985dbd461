"""`rankscope watch`: a live page that follows the files of a run, answers for one study alone, and writes nothing."""

import http.client
import io
import json
import os
import platform
import re
import shutil
import threading
from collections.abc import Iterator
from http.server import ThreadingHTTPServer
from pathlib import Path

import pytest
from rich.console import Console

from rankscope.analysis.verdict import conclude
from rankscope.errors import StudyDirectoryError
from rankscope.files import read_json, write_json
from rankscope.spec.candidates import AnyTrial
from rankscope.study.study import Study
from rankscope.text.catalogue import load
from rankscope.ui.live import LiveStudy
from rankscope.ui.progress import view
from rankscope.ui.watch import Watch, address, serve, watch_terminal
from report.browser import Browser

FIXTURE = Path(__file__).parents[1] / "fixtures" / "study-0.1"


class Running:
    """The fixture as it was while its last trial trained, after half of its steps."""

    def __init__(self, path: Path) -> None:
        shutil.copytree(FIXTURE, path)
        (path / "verdict.json").unlink(missing_ok=True)
        self.study = Study.open(path)
        self.trial: AnyTrial = self.study.spec.trials()[-1]
        self.folder = self.study.trial_folder(self.trial)
        self.record = read_json(self.folder / "trial.json")
        self.lines = (self.folder / "metrics.jsonl").read_text().splitlines(keepends=True)
        write_json(self.folder / "trial.json", self.record | {"status": "running", "results": None, "files": {}})
        self.pack_file = self.study.file("packs", self.record["pack"], "pack.json")
        self.pack = read_json(self.pack_file)
        write_json(self.pack_file, self.pack | {"results": None})
        self.reach(self.record["results"]["steps"] // 2)
        (path / ".lock-holder").write_text(f"process {os.getpid()} on {platform.node()}\n")

    def reach(self, step: int) -> None:
        kept = [line for line in self.lines if json.loads(line)["step"] <= step]
        (self.folder / "metrics.jsonl").write_text("".join(kept))

    def finish(self) -> None:
        (self.folder / "metrics.jsonl").write_text("".join(self.lines))
        write_json(self.folder / "trial.json", self.record)
        write_json(self.pack_file, self.pack)
        write_json(self.study.path / "verdict.json", conclude(self.study.evidence()))
        (self.study.path / ".lock-holder").unlink()


@pytest.fixture
def running(tmp_path: Path) -> Running:
    return Running(tmp_path / "study")


@pytest.fixture
def server(running: Running) -> Iterator[ThreadingHTTPServer]:
    server = serve(Watch(running.study.path, load("en")), 0)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield server
    server.shutdown()
    server.server_close()
    thread.join()


def get(server: ThreadingHTTPServer, path: str, host: str | None = None) -> tuple[int, str, dict[str, str]]:
    connection = http.client.HTTPConnection("127.0.0.1", server.server_port, timeout=60)
    connection.request("GET", path, headers={"Host": host or f"127.0.0.1:{server.server_port}"})
    answer = connection.getresponse()
    return answer.status, answer.read().decode(), dict(answer.getheaders())


def contents(folder: Path) -> dict[Path, bytes]:
    return {file: file.read_bytes() for file in folder.rglob("*") if file.is_file()}


def test_only_the_study_is_served_and_only_here(server: ThreadingHTTPServer, running: Running) -> None:
    before = contents(running.study.path)
    assert server.server_address[0] == "127.0.0.1"
    status, page, headers = get(server, "/")
    assert status == 200
    assert headers["Cache-Control"] == "no-store"
    assert "connect-src 'self'" in page
    assert "default-src 'none'" in page
    status, news, _ = get(server, "/news.json")
    found = json.loads(news)
    assert found["now"]["lines"][0] == "Training pack p001"
    assert found["now"]["lines"][1] == "11 of 12 trials have ended"
    assert found["now"]["so_far"] == "So far, with 11 of 12 trials ended; more of them can change it:"
    assert 0.5 < found["now"]["share"] < 1
    assert re.fullmatch(r"\d\d%  about .* left", found["now"]["left"])
    assert found["again_ms"] >= 2000
    for path in ("/study.yaml", "/../study.yaml", "/%2e%2e/study.yaml", "//etc/passwd", "/trials/", "/news.json/.."):
        assert get(server, path)[0] == 404
    assert get(server, "/", host="evil.example")[0] == 403
    assert get(server, "/news.json", host=f"evil.example:{server.server_port}")[0] == 403
    assert contents(running.study.path) == before, "watching writes nothing"


def test_a_study_that_has_not_begun_is_asked_for_again(server: ThreadingHTTPServer, running: Running) -> None:
    facts = running.study.path / "data" / "facts.json"
    facts.rename(facts.with_name("away"))
    status, _, headers = get(server, "/")
    assert status == 503
    assert headers["Refresh"] == "2"
    facts.with_name("away").rename(facts)
    assert get(server, "/")[0] == 200


def test_the_terminal_shows_the_same(running: Running, capsys: pytest.CaptureFixture[str]) -> None:
    watch_terminal(running.study.path, Console(width=160), load("en"))
    shown = capsys.readouterr().out
    assert "11 of 12 trials have ended" in shown
    assert all(trial.name in shown for trial in running.study.all_trials())
    assert "running" in shown
    _, verdict = shown.split("So far, with 11 of 12 trials ended; more of them can change it:\n")
    assert verdict.startswith("The ranks cannot be distinguished over")


def test_a_display_that_is_too_low_for_all_trials_says_where_they_are(running: Running) -> None:
    output, state = io.StringIO(), LiveStudy(running.study.path).read()
    Console(file=output, width=80).print(view(state, load("en"), most_rows=4))
    assert output.getvalue().endswith("\nand 10 more, all of them on the live page\n")
    assert "running" in output.getvalue(), "what is in training comes first"


def test_nothing_to_wait_for_is_an_error(running: Running) -> None:
    (running.study.path / ".lock-holder").unlink()
    shutil.rmtree(running.study.path / "data")
    with pytest.raises(StudyDirectoryError, match=r"facts\.json: missing"):
        watch_terminal(running.study.path, Console(), load("en"))


@pytest.mark.slow
def test_the_page_follows_a_run(
    browser: Browser, server: ThreadingHTTPServer, running: Running, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Steps come in without a reload, the reader's switch stays as it was, and at the end the page is the last."""
    monkeypatch.setattr("rankscope.ui.watch.MAX_CPU_SHARE", 1.0)  # else a busy machine has the page wait for a minute
    step = "document.querySelector('#now-rows tr').children[2].textContent"
    steps = running.record["results"]["steps"]
    browser.open(address(server))
    assert browser.ask(step) == f"{steps // 2} / {steps}"
    browser.ask("window.unchanged = true")
    running.reach(steps - 1)
    browser.until(f"{step} === '{steps - 1} / {steps}'")
    assert browser.ask("window.unchanged"), "the page was loaded anew"
    assert browser.ask("document.getElementById('now-bar').value") > 0.5
    browser.until("drawn['chart-train-loss-0'] !== undefined")
    running.finish()
    browser.until("document.querySelector('#now-lines li')?.textContent === 'The study is done'")
    assert browser.messages == []
    assert {request.removeprefix(address(server)) for request in browser.requests} <= {"", "news.json"}
