"""Progress of a run in the terminal: a live table, or a line now and then where output is no terminal."""

import time
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, Self

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.text import Text

from rankscope.errors import StudyDirectoryError, StudyError
from rankscope.study.folder import StudyFolder
from rankscope.text.catalogue import load
from rankscope.text.formats import duration, size
from rankscope.ui.console import make_table
from rankscope.ui.live import LiveStudy, State, TrialState, trial_rows

MAX_CPU_SHARE = 0.01
"""Share of one core for reading the whole study again and again, while its cost may be being measured."""

LINE_EVERY_SECONDS = 15.0  # interval of lines where output is no terminal


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

    @property
    def is_drawn(self) -> bool:
        return self._live is not None

    def draw(self, part: RenderableType) -> None:
        if self._live:
            self._live.update(part)

    def line_is_due(self) -> bool:
        due = time.monotonic() >= self._next_line
        if due:
            self._next_line = time.monotonic() + LINE_EVERY_SECONDS
        return due


class TerminalProgress(Display):
    """Progress of `rankscope run` and `rankscope curve`, read from the study in `folder` once it exists."""

    def __init__(self, console: Console, folder: Path) -> None:
        super().__init__(console)
        self._folder = folder
        self._study: LiveStudy | None = None
        self._state: State | None = None
        self._read_again = 0.0  # next time the whole study is read
        self._begun: dict[str, tuple[float, int]] = {}  # time and step at which a pack was first seen in training
        self._ended: set[str] = set()
        self._measuring = ""

    def __exit__(self, *error: object) -> None:
        with suppress(StudyDirectoryError, StudyError):
            if self._study is not None:  # the last packs may have ended since the whole study was read
                self._announce(self._study.read())
        super().__exit__(*error)

    def poll(self) -> None:
        with suppress(StudyDirectoryError, StudyError):  # the run itself reports damage; showing must not end training
            self._read()
        state = self._state
        if state is None:
            return
        if self.is_drawn:
            parts = [self._trial_table(name, trials, state) for name, trials in state.training.items()]
            self.draw(Group(*parts) if parts else Text(self._heading(state), style="bold"))
        elif state.training and self.line_is_due():
            for name, trials in state.training.items():
                which = f"{name}, " if len(state.training) > 1 else ""
                losses = "  ".join(f"{row[0]} {row[3]}" for row in trial_rows(trials, state.steps, load("en")))
                step = f"step {_step(trials)}/{state.steps}"
                self.say(f"  {which}{step}, {self._left(name, trials, state)}{_memory(state)}: {losses}")

    def _read(self) -> None:
        """Read the whole study where that is due, else what the trials in training have written."""
        due = self._state is None or time.monotonic() >= self._read_again
        if self._study is None or (due and self._study.study.has_changed()):
            if not StudyFolder.is_at(self._folder):
                return
            self._study = LiveStudy(StudyFolder.open(self._folder))
        if self._state is not None and not due:
            self._state = self._study.refresh(self._state)
            return
        start = time.thread_time()
        self._state = self._study.read()
        self._read_again = time.monotonic() + (time.thread_time() - start) / MAX_CPU_SHARE
        self._announce(self._state)

    def _announce(self, state: State) -> None:
        for pack, results in state.results.items():
            if pack not in self._ended:
                self._ended.add(pack)
                self.say(_describe_pack(pack, results))
        for name, trials in state.training.items():
            if name not in self._begun:
                self._begun[name] = (time.monotonic(), _step(trials))
                self.say(_title(name, trials, state))
        measuring = _measuring(state)
        if measuring and measuring != self._measuring and not self.is_drawn:
            self._measuring = measuring
            self.say(measuring)

    def _left(self, name: str, trials: list[TrialState], state: State) -> str:
        """Time left for one pack, from its pace since it was first seen, and for the whole study."""
        start, first = self._begun[name]
        step = _step(trials)
        if step <= first:
            return "loading"
        left = (time.monotonic() - start) / (step - first) * (state.steps - step)
        return f"about {duration(left, load('en'))} left{_whole_left(state, ', ')}"

    def _heading(self, state: State) -> str:
        """Line for work that is no training."""
        doing = _measuring(state) or ("Loading the model" if state.doing == "train" else "Working")
        if state.doing in ("answer", "curve"):
            doing = load("en")(f"live.{state.doing}")
        return f"{doing}{_whole_left(state, ' · ')}{_memory(state)}"

    def _trial_table(self, name: str, trials: list[TrialState], state: State) -> Group:
        rows: list[list[RenderableType]] = []
        for trial, (shown, _, _, *losses) in zip(trials, trial_rows(trials, state.steps, load("en")), strict=True):
            bar = ProgressBar(total=state.steps, completed=trial.step, width=20)
            rows.append([shown, f"{trial.step}/{state.steps}", *losses, bar])
        table = make_table(("trial", "step", "loss", "held-out", ""), rows, left=(0, 4))
        heading = f"{_title(name, trials, state)} · {self._left(name, trials, state)}{_memory(state)}"
        return Group(Text(heading, style="bold"), table)


def _title(name: str, trials: list[TrialState], state: State) -> str:
    if name not in state.packs:
        return f"Full fine-tuning, {name}: {state.steps} steps"
    position = state.packs.index(name) + 1
    return f"Pack {name} ({position} of {len(state.packs)}): {len(trials)} trials, {state.steps} steps"


def _describe_pack(pack: str, results: Mapping[str, Any]) -> str:
    peak = results["gpu_allocated_peak_bytes"] or results["rss_peak_bytes"]
    return (
        f"Pack {pack}: {results['step_seconds'] / results['steps']:.3g} s a step; "
        f"{results['useful_flops_per_second'] / 1e9:,.0f} useful GFLOP/s; peak {size(peak)}"
    )


def _measuring(state: State) -> str:
    """Which profile is being measured; empty where none is."""
    if state.doing != "profile" or state.profile is None:
        return ""
    return f"Measuring cost, {state.profiles_done + 1} of {state.profiles}: {state.profile}"


def _whole_left(state: State, joint: str) -> str:
    seconds = state.seconds_left
    return "" if seconds is None else f"{joint}about {duration(seconds, load('en'))} for the whole study"


def _memory(state: State) -> str:
    return f" · {size(state.rss_bytes)}" if state.rss_bytes else ""


def _step(trials: list[TrialState]) -> int:
    """Step of a pack. Trials that have ended are left out: an earlier run may have ended them."""
    running = [trial.step for trial in trials if trial.status == "running"]
    return max(running or [trial.step for trial in trials])
