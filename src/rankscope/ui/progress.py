"""Progress in the terminal: a display below the lines that stay, or a line now and then where output is no terminal.

`rankscope run` and `rankscope watch --terminal` have the same display.
"""

import shlex
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, Self

import typer
from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from rankscope.errors import StudyDirectoryError, StudyError
from rankscope.study.folder import NOT_ENDED
from rankscope.text.catalogue import Catalogue
from rankscope.text.formats import about, size
from rankscope.ui.console import make_table
from rankscope.ui.live import LiveStudy, State, TrialState, trial_rows

MAX_CPU_SHARE = 0.01
"""Share of one core for reading the whole study again and again, while its cost may be being measured."""

LINE_EVERY_SECONDS = 15.0  # least interval of lines where output is no terminal

MOST_LINES = 50  # of a study, about

BESIDE_ROWS = 9  # rows of a terminal that are not for trials


class Display:
    """Lines that stay and, in a terminal, a part below them that is redrawn. Use as a context manager."""

    def __init__(self, console: Console) -> None:
        self.console = console
        self._live = Live(console=console, refresh_per_second=4, transient=True) if console.is_terminal else None
        self._next_line = time.monotonic()

    def __enter__(self) -> Self:
        if self._live:
            self._live.start()
        return self

    def __exit__(self, *error: object) -> None:
        if self._live:
            self._live.update(Text(""))
            self._live.stop()

    def say(self, message: str) -> None:
        self.console.print(message, highlight=False, soft_wrap=True)

    def ask(self, question: str) -> bool:
        """Ask for yes or no, where a terminal can answer; elsewhere the answer is yes."""
        if self._live is None or not sys.stdin.isatty():
            return True
        self._live.stop()
        answer = typer.confirm(question, default=True)
        self._live.start()
        return answer

    @property
    def is_drawn(self) -> bool:
        return self._live is not None

    def draw(self, part: RenderableType) -> None:
        if self._live:
            self._live.update(part)

    def line_is_due(self, seconds: float = LINE_EVERY_SECONDS) -> bool:
        due = time.monotonic() >= self._next_line
        if due:
            self._next_line = time.monotonic() + seconds
        return due


class TerminalProgress(Display):
    """Progress of a study, read from its files in `folder` once it exists."""

    def __init__(self, console: Console, folder: Path, text: Catalogue, told: bool = False) -> None:
        """`told`: whether the user knows how to follow the study elsewhere."""
        super().__init__(console)
        self._folder, self.text, self._told = folder, text, told
        self._study = LiveStudy(folder)
        self._state: State | None = None
        self._read_again = 0.0  # next time the whole study is read
        self._announced = set[tuple[str, str]]()  # what was said to have begun, and to have ended
        self._said: object = None  # what the last line was about

    def __enter__(self) -> Self:
        self.draw(Text(self.text("live.begin"), style="bold"))
        return super().__enter__()

    def __exit__(self, *error: object) -> None:
        if self._state is not None:  # the last packs may have ended since the whole study was read
            with suppress(StudyDirectoryError, StudyError):
                self._announce(self._study.read())
        super().__exit__(*error)

    def say(self, message: str) -> None:
        super().say(message)
        self._read_again = 0.0  # something has happened

    def poll(self) -> None:
        with suppress(StudyDirectoryError, StudyError):  # the run itself reports damage; showing must not end training
            self.read()
        if self._state is not None:
            self.show(self._state)

    def show(self, state: State, note: str = "") -> None:
        """Draw the state, and a note; or print a line where the state has changed, and one is due."""
        if self.is_drawn:
            self.draw(view(state, self.text, self.console.height - BESIDE_ROWS, note))
            return
        steps = {name: _step(trials) for name, trials in state.training.items()}
        now = state.activity, state.profiles_done, steps
        whole = (state.seconds_left or 0.0) / max(0.02, 1 - state.share)
        if now != self._said and self.line_is_due(max(LINE_EVERY_SECONDS, whole / MOST_LINES)):
            self._said = now
            super().say(f"  {_line(state, self.text)}")

    def read(self) -> State:
        """State of the study: all of it where that is due, else what the trials in training have written. Raises
        StudyDirectoryError, StudyError: it has not begun, or is corrupt."""
        if self._state is not None and time.monotonic() < self._read_again:
            self._state = self._study.refresh(self._state)
            return self._state
        start = time.thread_time()
        self._state = self._study.read()
        self._read_again = time.monotonic() + (time.thread_time() - start) / MAX_CPU_SHARE
        self._announce(self._state)
        return self._state

    def _announce(self, state: State) -> None:
        """Say what has begun or ended since."""
        found: dict[tuple[str, str], str] = {}
        if not self._told:
            command = shlex.join(["rankscope", "watch", str(self._folder)])
            found["follow", ""] = self.text("live.follow", command=command)
        found |= {("ended", pack): _pack_ended(pack, one, self.text) for pack, one in state.results.items()}
        found |= {("begun", name): _title(name, one, state, self.text) for name, one in state.training.items()}
        for what, sentence in found.items():
            if what not in self._announced:
                self._announced.add(what)
                super().say(sentence)


def lines(state: State, text: Catalogue) -> list[str]:
    """Current work, what has ended and memory in use, in a line each."""
    number, packs = state.profiles_done + 1, ", ".join(state.training)
    now = text(f"live.{state.activity}", pack=packs, name=state.profile, done=number, total=state.profiles)
    memory = [text("live.memory", size=size(state.rss_bytes))] if state.rss_bytes else []
    return [now, text("live.trials", done=state.ended, total=len(state.trials)), *memory]


def whole_left(state: State, text: Catalogue) -> str:
    """Share of the study that is done, and the time left where it is known."""
    known = state.seconds_left is not None and state.doing not in ("done", "stopped")
    left = text("live.left", time=about(state.seconds_left or 0.0, text)) if known else ""
    return f"{state.share:.0%}  {left}".strip()


def in_order(state: State) -> list[TrialState]:
    """All trials: those of packs in training, with their latest step, those that wait, and those that have ended."""
    latest = {trial.name: trial for trials in state.training.values() for trial in trials}
    trials, last = [latest.get(trial.name, trial) for trial in state.trials], len(NOT_ENDED)
    places = {status: place for place, status in enumerate(reversed(NOT_ENDED))}
    return sorted(trials, key=lambda trial: (trial.name not in latest, places.get(trial.status, last)))


def view(state: State, text: Catalogue, most_rows: int | None = None, note: str = "") -> Group:
    """The whole display: what is done now, bars for the study and each pack, `most_rows` trials at most, and a note."""
    bars = Table.grid(padding=(0, 2, 0, 0), expand=True)
    for ratio in (None, 1, None):
        bars.add_column(ratio=ratio, no_wrap=True)
    bars.add_row(text("live.whole"), ProgressBar(1.0, state.share), whole_left(state, text))
    for name, trials in state.training.items():
        bars.add_row(name, ProgressBar(state.steps, _step(trials)), _pack_left(name, trials, state, text))
    if state.doing == "profile":
        count = f"{state.profiles_done} / {state.profiles}"
        bars.add_row(text("live.costs"), ProgressBar(state.profiles, state.profiles_done), count)
    shown = in_order(state)[: None if most_rows is None else max(1, most_rows - len(bars.rows))]
    headers = [text(f"table.{name}") for name in ("trial", "status", "steps", "train_loss", "eval_loss_all")]
    rows = make_table(headers, trial_rows(shown, state.steps, text), left=(0, 1))
    parts: list[RenderableType] = [Text(" · ".join(lines(state, text)), style="bold"), bars, Text(""), rows]
    if hidden := len(state.trials) - len(shown):
        parts.append(Text(text("live.hidden", n=hidden)))
    return Group(*parts, *([Text(f"\n{note}")] if note else []))


def _line(state: State, text: Catalogue) -> str:
    """Progress in a line, where output is no terminal."""
    now, _, *memory = lines(state, text)
    packs = []
    for name, trials in state.training.items():
        rows = zip(trials, trial_rows(trials, state.steps, text), strict=True)
        losses = [f"{row[0]} {row[1] if trial.status == 'diverged' else row[3]}" for trial, row in rows]
        packs += [f"{name} {_pack_left(name, trials, state, text)}", ", ".join(losses)]
    return " · ".join([whole_left(state, text), now, *packs, *memory])


def _pack_left(name: str, trials: Sequence[TrialState], state: State, text: Catalogue) -> str:
    steps, seconds = f"{_step(trials)} / {state.steps}", state.pack_seconds.get(name)
    return steps if seconds is None else f"{steps}  {text('live.left', time=about(seconds, text))}"


def _title(name: str, trials: Sequence[TrialState], state: State, text: Catalogue) -> str:
    if name not in state.packs:
        return text("live.full_began", name=name, steps=state.steps)
    number, total = state.packs.index(name) + 1, len(state.packs)
    count = text.count("trials", len(trials))
    return text("live.pack_began", pack=name, number=number, total=total, trials=count, steps=state.steps)


def _pack_ended(pack: str, results: Mapping[str, Any], text: Catalogue) -> str:
    peak = results["gpu_allocated_peak_bytes"] or results["rss_peak_bytes"]
    seconds, rate = results["step_seconds"] / results["steps"], results["useful_flops_per_second"] / 1e9
    return text("live.pack_ended", pack=pack, seconds=f"{seconds:.3g}", rate=f"{rate:,.0f}", peak=size(peak))


def _step(trials: Sequence[TrialState]) -> int:
    """Step of a pack. Trials that have ended are left out: an earlier run may have ended them."""
    running = [trial.step for trial in trials if trial.status == "running"]
    return max(running or [trial.step for trial in trials])
