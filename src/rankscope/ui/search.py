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
from rankscope.text.catalogue import Catalogue, load
from rankscope.text.formats import duration, loss, percent
from rankscope.ui.console import make_table, show
from rankscope.ui.progress import Display

MAX_SHOWN = 10  # candidates in the table of results
_COUNTED = {"trials": "candidates", "tokens": "tokens"}  # words of the catalogue by part of the budget
_HEADERS = ("candidate", "rank", "learning_rate", "alpha", "eval_loss", "over", "target_modules")


def run_search(
    spec: SearchSpec, path: Path, console: Console, launcher: str, ray_address: str | None, language: str
) -> dict[str, Any]:
    """Run a search in `path`, and show its progress; return its result, see `rankscope.search.run.run`."""
    spec = at_commits(spec, path)  # the launcher reads the model's configuration too
    progress = SearchProgress(console, path, load(language))
    with progress, make_launcher(launcher, spec.study.model, ray_address, progress.say, language) as launching:
        return run(spec, path, launching, progress.say, progress.poll, language)


class SearchProgress(Display):
    """Progress of `rankscope search`, read from the result that the search in `folder` has so far."""

    def __init__(self, console: Console, folder: Path, text: Catalogue) -> None:
        super().__init__(console)
        self._folder, self._text = folder, text
        self.line_is_due()  # the first line comes after an interval

    def poll(self) -> None:
        result = Search.open(self._folder).result()
        if result is None:
            return
        if self.is_drawn:
            training = result["training"].items()
            rows = [(name, str(step), "–" if value is None else loss(value)) for name, (step, value) in training]
            table = make_table([self._text(f"search.{name}") for name in ("candidate", "step", "loss")], rows)
            self.draw(Group(Text(progress_line(result, self._text), style="bold"), table))
        elif self.line_is_due():
            self.say(f"  {progress_line(result, self._text)}")


def progress_line(result: Mapping[str, Any], text: Catalogue) -> str:
    """Numbers of candidates, the best so far, and the budget left, in one line."""
    states = [candidate["state"] for candidate in result["candidates"]]
    best = _by_name(result).get(result["best"] or "")
    counts = {"stopped": states.count("stopped") + states.count("diverged"), "done": states.count("done")}
    begun, left = text.count("candidates", len(states)), budget_left(result, text)
    now = text("search.best", name=best["trial"], loss=loss(best["eval_loss"])) if best else text("search.none_yet")
    return text("search.progress", begun=begun, **counts, best=now, left=left)


def budget_left(result: Mapping[str, Any], text: Catalogue) -> str:
    budget, spent = result["budget"], result["spent"]
    left = [text.count(word, max(0, budget[n] - spent[n])) for n, word in _COUNTED.items() if budget[n] is not None]
    if budget["hours"] is not None:
        left.append(duration(max(0.0, 3600 * budget["hours"] - spent["seconds"]), text))
    return ", ".join(left)


def show_result(path: Path, result: Mapping[str, Any], console: Console, text: Catalogue) -> None:
    """Print the best candidates, which of them are within the margin of the best, and how to confirm the result."""
    candidates = _by_name(result)
    done = sorted((c for c in candidates.values() if c["eval_loss"] is not None), key=lambda c: float(c["eval_loss"]))
    best, within = candidates.get(result["best"] or ""), set(result["within_margin"])
    if best is None:
        console.print(text("search.none"), style="bold")
        return
    rows = []
    for one in done[:MAX_SHOWN]:
        over, mark = one["eval_loss"] / best["eval_loss"] - 1, "" if one["trial"] in within else " *"
        settings = (str(one["rank"]), f"{one['learning_rate']:.3g}", f"{one['lora_alpha']:g}")
        rows.append((one["trial"], *settings, loss(one["eval_loss"]), f"{over:.2%}{mark}", one["target_modules"]))
    headers = [text(f"search.{name}") for name in _HEADERS]
    beyond = [text("search.beyond", margin=percent(result["margin"]))] * (len(within) < len(done))
    show(make_table(headers, rows, left=(0, 6)), *beyond, *_sentences(path, result, text), console=console)


def _sentences(path: Path, result: Mapping[str, Any], text: Catalogue) -> Iterator[str]:
    candidates, spent = _by_name(result), result["spent"]
    best, smallest = candidates[result["best"]], candidates[result["smallest_rank"]]
    settings = {"rate": f"{best['learning_rate']:.3g}", "alpha": f"{best['lora_alpha']:g}"}
    yield "\n" + text("search.found", rank=best["rank"], modules=best["target_modules"], **settings)
    within = text.count("candidates", len(result["within_margin"]))
    yield text("search.within", candidates=within, rank=smallest["rank"], name=smallest["trial"])
    taken = {"tokens": f"{spent['tokens']:,}", "time": duration(spent["seconds"], text)}
    stopped = f"{result['share_stopped']:.0%}"
    yield text("search.spent", candidates=text.count("candidates", spent["trials"]), stopped=stopped, **taken)
    yield text("search.confirm", command=_confirm(path))
    log = shlex.quote(str(path / "optuna.log"))
    yield text("search.adapters", folder=path / "adapters", command=f"optuna-dashboard {log}")


def _confirm(path: Path) -> str:
    return shlex.join(["rankscope", "run", str(path / "confirm.yaml"), "--out", f"{path}-confirm"])


def describe_result(path: Path, result: Mapping[str, Any]) -> dict[str, Any]:
    shown = {name: value for name, value in result.items() if name not in ("training", "schema")}
    return {"search": str(path), **shown, "confirm": _confirm(path) if result["best"] else None}


def _by_name(result: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    return {candidate["trial"]: candidate for candidate in result["candidates"]}
