"""Shows a run in the terminal: a live table, or a line now and then where there is no terminal.

It reads what the child processes write (metrics.jsonl), so that a run needs no channel of its own.
"""

import json
import time
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from rich.console import Console, Group
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from rankscope.report.catalogue import load
from rankscope.report.formats import duration
from rankscope.spec import AnyTrial, FullTrial, Trial
from rankscope.study import Study

LINE_EVERY_SECONDS = 15.0
"""Between two lines where there is no terminal."""


class Follower:
    """Follows one trial's metrics.jsonl: reads only what is new."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.step, self.step_seconds = 0, 0.0
        self.train_loss: float | None = None
        self.eval_loss: float | None = None
        self._offset = 0

    def read(self) -> None:
        try:
            with self.path.open("rb") as file:
                file.seek(max(0, self._offset - 1))
                if self._offset and file.read(1) != b"\n":  # cut back to a checkpoint since, or begun anew
                    self._offset = 0
                    file.seek(0)
                content = file.read()
        except FileNotFoundError:
            return
        whole = content.rfind(b"\n") + 1
        self._offset += whole
        for line in content[:whole].splitlines():
            row: dict[str, Any] = json.loads(line)
            self.step = max(self.step, row["step"])
            self.eval_loss = row.get("eval_loss", self.eval_loss)
            if "train_loss" in row:
                old = self.train_loss
                self.train_loss = row["train_loss"] if old is None else 0.8 * old + 0.2 * row["train_loss"]
                self.step_seconds = row["step_seconds"]


class TerminalProgress:
    """The progress of `rankscope run`. Use as a context manager."""

    def __init__(self, console: Console) -> None:
        self.console = console
        self._live = Live(console=console, refresh_per_second=4, transient=True) if console.is_terminal else None
        self._trials: list[tuple[str, Follower]] = []
        self._title, self._steps, self._start, self._last_line = "", 0, time.monotonic(), 0.0
        self._before = 0
        self._measuring = ""

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
        self.console.print(message, highlight=False, markup=False, soft_wrap=True)

    def training(self, study: Study, pack: str, trials: Sequence[Trial], steps: int) -> None:
        self._begin(f"Pack {pack}: {len(trials)} trials, {steps} steps", study, trials, steps)

    def reference(self, study: Study, trial: FullTrial, steps: int) -> None:
        self._begin(f"Full fine-tuning, {trial.name}: {steps} steps", study, [trial], steps)

    def _begin(self, title: str, study: Study, trials: Sequence[AnyTrial], steps: int) -> None:
        self._title = title
        self._trials = [(trial.name, Follower(study.trial_folder(trial) / "metrics.jsonl")) for trial in trials]
        self._steps, self._start, self._measuring = steps, time.monotonic(), ""
        for _, follower in self._trials:
            follower.read()
        self._before = self._step()
        self.say(self._title)

    def measuring(self, done: int, total: int, name: str) -> None:
        self._trials, self._measuring = [], f"Measuring cost, {done + 1} of {total}: {name}"
        if not self._live:
            self.say(self._measuring)

    def poll(self) -> None:
        for _, follower in self._trials:
            follower.read()
        if self._live:
            self._live.update(self._table() if self._trials else Text(self._measuring))
        elif self._trials and time.monotonic() - self._last_line >= LINE_EVERY_SECONDS:
            self._last_line = time.monotonic()
            losses = "  ".join(f"{name} {_loss(f.train_loss)}" for name, f in self._trials)
            self.say(f"  step {self._step()}/{self._steps}, {self._left()}: {losses}")

    def _step(self) -> int:
        return max(follower.step for _, follower in self._trials)

    def _left(self) -> str:
        """Time left for the pack, from the time its steps and evaluations took so far."""
        step = self._step()
        if step <= self._before:
            return "loading"
        elapsed = time.monotonic() - self._start
        return f"about {duration(elapsed / (step - self._before) * (self._steps - step), load('en'))} left"

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
        return Group(Text(f"{self._title} · {self._left()}", style="bold"), table)


def _loss(value: float | None) -> str:
    return "–" if value is None else f"{value:.4f}"
