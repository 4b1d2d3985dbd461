"""Progress and result of a search in the terminal."""

import shlex
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from rich.console import Console, Group
from rich.text import Text

from rankscope.jobs.launchers import make_launcher
from rankscope.search.folder import Search
from rankscope.search.run import at_commits, run
from rankscope.search.space import SearchSpec
from rankscope.text.catalogue import load
from rankscope.text.formats import duration, loss
from rankscope.ui.console import make_table, show
from rankscope.ui.progress import Display

MAX_SHOWN = 10  # candidates in the table of results
_COUNTED = {"trials": "candidates", "tokens": "tokens"}


def run_search(
    spec: SearchSpec, path: Path, console: Console, launcher: str, ray_address: str | None
) -> dict[str, Any]:
    """Run a search in `path`, and show its progress; return its result, see `rankscope.search.run.run`."""
    spec = at_commits(spec, path)  # the launcher reads the model's configuration too
    progress = SearchProgress(console, path)
    with progress, make_launcher(launcher, spec.study.model, ray_address, progress.say) as launching:
        return run(spec, path, launching, progress.say, progress.poll)


class SearchProgress(Display):
    """Progress of `rankscope search`, read from the result that the search in `folder` has so far."""

    def __init__(self, console: Console, folder: Path) -> None:
        super().__init__(console)
        self._folder = folder
        self.line_is_due()  # the first line comes after an interval

    def poll(self) -> None:
        result = Search.open(self._folder).result()
        if result is None:
            return
        if self.is_drawn:
            training = result["training"].items()
            rows = [(name, str(step), "–" if value is None else loss(value)) for name, (step, value) in training]
            table = make_table(("candidate", "step", "loss"), rows)
            self.draw(Group(Text(progress_line(result), style="bold"), table))
        elif self.line_is_due():
            self.say(f"  {progress_line(result)}")


def progress_line(result: Mapping[str, Any]) -> str:
    """Numbers of candidates, the best so far, and the budget left, in one line."""
    states = [candidate["state"] for candidate in result["candidates"]]
    best = _by_name(result).get(result["best"] or "")
    parts = [
        f"{len(states)} candidates begun",
        f"{states.count('stopped') + states.count('diverged')} stopped early",
        f"{states.count('done')} done",
        f"best {best['trial']} {best['eval_loss']:.4f}" if best else "none done yet",
        f"left: {budget_left(result)}",
    ]
    return ", ".join(parts)


def budget_left(result: Mapping[str, Any]) -> str:
    budget, spent = result["budget"], result["spent"]
    left = [f"{max(0, budget[n] - spent[n]):,} {word}" for n, word in _COUNTED.items() if budget[n] is not None]
    if budget["hours"] is not None:
        left.append(duration(max(0.0, 3600 * budget["hours"] - spent["seconds"]), load("en")))
    return ", ".join(left)


def show_result(path: Path, result: Mapping[str, Any], console: Console) -> None:
    """Print the best candidates, which of them are within the margin of the best, and how to confirm the result."""
    candidates = _by_name(result)
    done = sorted((c for c in candidates.values() if c["eval_loss"] is not None), key=lambda c: float(c["eval_loss"]))
    best, within = candidates.get(result["best"] or ""), set(result["within_margin"])
    if best is None:
        console.print("No candidate finished training: the budget is too small, or all diverged.", style="bold")
        return
    rows = []
    for one in done[:MAX_SHOWN]:
        over, mark = one["eval_loss"] / best["eval_loss"] - 1, "" if one["trial"] in within else " *"
        settings = (str(one["rank"]), f"{one['learning_rate']:.3g}", f"{one['lora_alpha']:g}")
        rows.append((one["trial"], *settings, loss(one["eval_loss"]), f"{over:.2%}{mark}", one["target_modules"]))
    headers = ("candidate", "rank", "learning rate", "alpha", "held-out loss", "over the best", "target modules")
    beyond = [f"* beyond the margin of {result['margin']:.3g} of the best's loss"] * (len(within) < len(done))
    show(make_table(headers, rows, left=(0, 6)), *beyond, *_sentences(path, result), console=console)


def _sentences(path: Path, result: Mapping[str, Any]) -> Iterator[str]:
    candidates, spent = _by_name(result), result["spent"]
    best, smallest = candidates[result["best"]], candidates[result["smallest_rank"]]
    yield (
        f"\nBest: rank {best['rank']} at learning rate {best['learning_rate']:.3g}, alpha {best['lora_alpha']:g}, on "
        f"{best['target_modules']}. {len(result['within_margin'])} candidates are within the margin; the lowest rank "
        f"among them is {smallest['rank']} ({smallest['trial']})."
    )
    yield (
        f"{spent['trials']} candidates, {result['share_stopped']:.0%} of them stopped early; "
        f"{spent['tokens']:,} training tokens, {duration(spent['seconds'], load('en'))}."
    )
    yield f"One seed gives no measure of uncertainty. To confirm with other seeds:\n  {_confirm(path)}"
    yield f"Adapters: {path / 'adapters'}. All candidates: optuna-dashboard {shlex.quote(str(path / 'optuna.log'))}"


def _confirm(path: Path) -> str:
    return shlex.join(["rankscope", "run", str(path / "confirm.yaml"), "--out", f"{path}-confirm"])


def describe_result(path: Path, result: Mapping[str, Any]) -> dict[str, Any]:
    shown = {name: value for name, value in result.items() if name not in ("training", "schema")}
    return {"search": str(path), **shown, "confirm": _confirm(path) if result["best"] else None}


def _by_name(result: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    return {candidate["trial"]: candidate for candidate in result["candidates"]}
