"""Shows a run in the terminal: a live table, or a line now and then where there is no terminal.

It reads what the child processes write, so that a run needs no channel of its own.
"""

import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from types import TracebackType
from typing import Self

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from rankscope.errors import StudyDirectoryError
from rankscope.spec.candidates import AnyTrial, FullTrial, Trial
from rankscope.study.folder import StudyFolder
from rankscope.text.catalogue import load
from rankscope.text.formats import duration, size
from rankscope.ui.live import Follower, LiveStudy, State

WHOLE_EVERY_SECONDS = 10.0
"""Between two looks at the whole study, whose files are many; at the pack that trains twice a second."""

LINE_EVERY_SECONDS = 15.0
"""Between two lines where there is no terminal."""


class Display:
    """Lines that stay and, in a terminal, a part below them that is drawn anew. Use as a context manager."""

    def __init__(self, console: Console) -> None:
        self.console = console
        self._live = Live(console=console, refresh_per_second=4, transient=True) if console.is_terminal else None
        self._last_line = time.monotonic() - LINE_EVERY_SECONDS

    def __enter__(self) -> Self:
        if self._live:
            self._live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._live:
            self._live.update(Text(""))
            self._live.stop()

    def say(self, message: str) -> None:
        """Prints a line that stays."""
        self.console.print(message, highlight=False, markup=False, soft_wrap=True)

    @property
    def is_drawn(self) -> bool:
        """Whether there is a terminal to draw in."""
        return self._live is not None

    def draw(self, part: RenderableType) -> None:
        """Draws the part anew."""
        if self._live:
            self._live.update(part)

    def line_is_due(self) -> bool:
        """Whether it is time for a line, where nothing is drawn."""
        due = time.monotonic() - self._last_line >= LINE_EVERY_SECONDS
        if due:
            self._last_line = time.monotonic()
        return due


class TerminalProgress(Display):
    """The progress of `rankscope run`."""

    def __init__(self, console: Console) -> None:
        super().__init__(console)
        self._training: dict[str, _Training] = {}
        """By the name of the pack, or of the trial of full fine-tuning; several where there are several devices."""
        self._measuring = ""
        self._whole: LiveStudy | None = None
        self._state: State | None = None
        self._looked = 0.0

    def training(self, study: StudyFolder, pack: str, trials: Sequence[Trial], steps: int) -> None:
        packs = list(study.division().packs)
        which = f"{pack} ({packs.index(pack) + 1} of {len(packs)})"
        self._begin(pack, f"Pack {which}: {len(trials)} trials, {steps} steps", study, trials, steps)

    def reference(self, study: StudyFolder, trial: FullTrial, steps: int) -> None:
        self._begin(trial.name, f"Full fine-tuning, {trial.name}: {steps} steps", study, [trial], steps)

    def _begin(self, name: str, title: str, study: StudyFolder, trials: Sequence[AnyTrial], steps: int) -> None:
        if self._whole is None:
            self._whole = LiveStudy(study, steps)
        self._measuring = ""
        self._training[name] = _Training(title, {t.name: self._whole.followers[t.name] for t in trials}, steps)
        self.say(title)

    def ended(self, name: str) -> None:
        self._training.pop(name, None)

    def measuring(self, done: int, total: int, name: str) -> None:
        self._measuring = f"Measuring cost, {done + 1} of {total}: {name}"
        if not self.is_drawn:
            self.say(self._measuring)

    def poll(self) -> None:
        with suppress(StudyDirectoryError):  # damage is told when the run needs the file; showing it ends no training
            self._look()
        if self.is_drawn:
            self.draw(Group(*map(self._drawn, self._training.values())) if self._training else self._drawn_measuring())
        elif self._training and self.line_is_due():
            for name, one in self._training.items():
                losses = "  ".join(f"{trial} {_loss(f.train_loss)}" for trial, f in one.trials.items())
                which = f"{name}, " if len(self._training) > 1 else ""
                self.say(f"  {which}step {one.step}/{one.steps}, {self._left(one)}{self._memory()}: {losses}")

    def _look(self) -> None:
        for one in self._training.values():
            one.read()
        if self._whole and time.monotonic() - self._looked >= WHOLE_EVERY_SECONDS:
            self._looked = time.monotonic()
            self._state = self._whole.read()

    def _left(self, training: "_Training | None") -> str:
        """Time left: for the pack from the time its steps and evaluations took so far, and for the whole study."""
        whole = self._state.seconds_left if self._state else None
        text = "" if whole is None else f"about {duration(whole, load('en'))} for the whole study"
        if training is None:
            return text or "the whole study's time is not known"
        left = training.seconds_left()
        if left is None:
            return "loading"
        return f"about {duration(left, load('en'))} left" + (f", {text}" if text else "")

    def _memory(self) -> str:
        """What the working process takes."""
        return f" · {size(self._state.rss_bytes)}" if self._state and self._state.rss_bytes else ""

    def _drawn_measuring(self) -> Text:
        return Text(f"{self._measuring} · {self._left(None)}{self._memory()}", style="bold")

    def _drawn(self, training: "_Training") -> Group:
        table = Table(box=None, pad_edge=False, header_style="bold")
        for column, justify in (
            ("trial", "left"),
            ("step", "right"),
            ("loss", "right"),
            ("held-out", "right"),
            ("", "left"),
        ):
            table.add_column(column, justify=justify)  # type: ignore[arg-type]
        for name, f in training.trials.items():
            bar = ProgressBar(total=training.steps, completed=f.step, width=20)
            table.add_row(name, f"{f.step}/{training.steps}", _loss(f.train_loss), _loss(f.eval_loss), bar)
        return Group(Text(f"{training.title} · {self._left(training)}{self._memory()}", style="bold"), table)


class _Training:
    """A pack, or a trial of full fine-tuning, in training."""

    def __init__(self, title: str, trials: Mapping[str, Follower], steps: int) -> None:
        self.title, self.trials, self.steps = title, trials, steps
        self._start = time.monotonic()
        with suppress(StudyDirectoryError):
            self.read()
        self._before = self.step

    def read(self) -> None:
        for follower in self.trials.values():
            follower.read()

    @property
    def step(self) -> int:
        return max(follower.step for follower in self.trials.values())

    def seconds_left(self) -> float | None:
        """By the time that its steps and evaluations took so far; None before there are any."""
        if self.step <= self._before:
            return None
        return (time.monotonic() - self._start) / (self.step - self._before) * (self.steps - self.step)


def _loss(value: float | None) -> str:
    return "–" if value is None else f"{value:.4f}"
