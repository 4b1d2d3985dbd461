"""Shows a run in the terminal: a live table, or a line now and then where there is no terminal.

It reads what the child processes write, so that a run needs no channel of its own.
"""

import time
from collections.abc import Sequence
from contextlib import suppress

from rich.console import Console, Group
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from rankscope.display import Display
from rankscope.errors import StudyDirectoryError
from rankscope.live import Follower, LiveStudy, State
from rankscope.report.catalogue import load
from rankscope.report.formats import duration, size
from rankscope.spec import AnyTrial, FullTrial, Trial
from rankscope.study import Study

WHOLE_EVERY_SECONDS = 10.0
"""Between two looks at the whole study, whose files are many; at the pack that trains twice a second."""


class TerminalProgress(Display):
    """The progress of `rankscope run`."""

    def __init__(self, console: Console) -> None:
        super().__init__(console)
        self._trials: list[tuple[str, Follower]] = []
        self._title, self._steps, self._start = "", 0, time.monotonic()
        self._before = 0
        self._measuring = ""
        self._whole: LiveStudy | None = None
        self._state: State | None = None
        self._looked = 0.0

    def training(self, study: Study, pack: str, trials: Sequence[Trial], steps: int) -> None:
        packs = list(study.division().packs)
        which = f"{pack} ({packs.index(pack) + 1} of {len(packs)})"
        self._begin(f"Pack {which}: {len(trials)} trials, {steps} steps", study, trials, steps)

    def reference(self, study: Study, trial: FullTrial, steps: int) -> None:
        self._begin(f"Full fine-tuning, {trial.name}: {steps} steps", study, [trial], steps)

    def _begin(self, title: str, study: Study, trials: Sequence[AnyTrial], steps: int) -> None:
        self._title = title
        if self._whole is None:
            self._whole = LiveStudy(study, steps)
        self._trials = [(trial.name, self._whole.followers[trial.name]) for trial in trials]
        self._steps, self._start, self._measuring = steps, time.monotonic(), ""
        with suppress(StudyDirectoryError):
            for _, follower in self._trials:
                follower.read()
        self._before = self._step()
        self.say(self._title)

    def measuring(self, done: int, total: int, name: str) -> None:
        self._trials, self._measuring = [], f"Measuring cost, {done + 1} of {total}: {name}"
        if not self.is_drawn:
            self.say(self._measuring)

    def poll(self) -> None:
        with suppress(StudyDirectoryError):  # damage is told when the run needs the file; showing it ends no training
            self._look()
        if self.is_drawn:
            title = f"{self._measuring} · {self._left()}{self._memory()}"
            self.draw(self._table() if self._trials else Text(title, style="bold"))
        elif self._trials and self.line_is_due():
            losses = "  ".join(f"{name} {_loss(f.train_loss)}" for name, f in self._trials)
            self.say(f"  step {self._step()}/{self._steps}, {self._left()}{self._memory()}: {losses}")

    def _look(self) -> None:
        for _, follower in self._trials:
            follower.read()
        if self._whole and time.monotonic() - self._looked >= WHOLE_EVERY_SECONDS:
            self._looked = time.monotonic()
            self._state = self._whole.read()

    def _step(self) -> int:
        return max(follower.step for _, follower in self._trials)

    def _left(self) -> str:
        """Time left: for the pack from the time its steps and evaluations took so far, and for the whole study."""
        whole = self._state.seconds_left if self._state else None
        text = "" if whole is None else f"about {duration(whole, load('en'))} for the whole study"
        if not self._trials:
            return text or "the whole study's time is not known"
        step = self._step()
        if step <= self._before:
            return "loading"
        pack = (time.monotonic() - self._start) / (step - self._before) * (self._steps - step)
        return f"about {duration(pack, load('en'))} left" + (f", {text}" if text else "")

    def _memory(self) -> str:
        """What the working process takes."""
        return f" · {size(self._state.rss_bytes)}" if self._state and self._state.rss_bytes else ""

    def _table(self) -> Group:
        table = Table(box=None, pad_edge=False, header_style="bold")
        for column, justify in (
            ("trial", "left"),
            ("step", "right"),
            ("loss", "right"),
            ("held-out", "right"),
            ("", "left"),
        ):
            table.add_column(column, justify=justify)  # type: ignore[arg-type]
        for name, f in self._trials:
            bar = ProgressBar(total=self._steps, completed=f.step, width=20)
            table.add_row(name, f"{f.step}/{self._steps}", _loss(f.train_loss), _loss(f.eval_loss), bar)
        return Group(Text(f"{self._title} · {self._left()}{self._memory()}", style="bold"), table)


def _loss(value: float | None) -> str:
    return "–" if value is None else f"{value:.4f}"
