"""Train once, read every rank: the largest rank's adapters, cut to each lower one and evaluated.

`rankscope.measure.truncation` measures in a child process, `rankscope.analysis.curve` holds the estimate against
ranks that were trained, and the report shows both.
"""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from rankscope.analysis.comparison import judged_examples
from rankscope.errors import (
    DamagedError,
    StudyError,
)
from rankscope.jobs.child import load_base
from rankscope.jobs.context import Progress
from rankscope.jobs.local import run_locally
from rankscope.pipeline import finish
from rankscope.spec.candidates import PLAIN, Trial
from rankscope.study.folder import CURVE, StudyFolder
from rankscope.study.records import Cut
from rankscope.study.study import Study
from rankscope.text.catalogue import load

if TYPE_CHECKING:
    from rankscope.data.tokens import TokenizedData

MOST_RECOVERY = 100_000
"""Steps. More is no short recovery, and would not fit the study's own schedule."""


def take_curve(
    study: Study, progress: Progress, ranks: Sequence[int] | None = None, recover: int = 0, language: str = "en"
) -> None:
    """Measures what curve.json lacks of these `ranks`, and builds the report anew; `study.cuts()` has the result.

    Without `ranks`: the powers of two below the largest rank, and the study's own. With `recover` each cut is measured
    once more after so many steps of training. The uncut adapters are measured too, as the control.

    Raises:
        StudyError: no trial of the largest rank is done, or a rank is not below it.
        StudyDirectoryError: another run holds the study, or an adapter of it is damaged.
        ModelError: the model is another, or gives the uncut adapter another loss than was recorded.
        WorkerError: the child process ended without finishing.
    """
    load(language)
    if not 0 <= recover <= MOST_RECOVERY:
        raise StudyError(f"--recover {recover}: expected 0 to {MOST_RECOVERY:,} steps", "Give a few: 8.")
    trials = trained_trials(study)
    uncut = trials[0].candidate.rank
    lower = lower_ranks(uncut, study.spec.ranks) if ranks is None else checked(ranks, uncut)
    with study.lock():
        wanted = missing(study, trials, [*lower, uncut], recover, progress)
        if wanted:
            count = sum(map(len, wanted.values()))
            steps = f", with {recover} steps of recovery" if recover else ""
            progress.say(f"Rank {uncut}, {len(wanted)} of {len(trials)} seeds: {count} losses to measure{steps}")
            job = {"kind": "curve", "wanted": wanted}
            error = run_locally(study.path, job, study.file("curve"), progress.poll)
            if error is not None:
                raise error
        finish(study, language)


def trained_trials(study: Study) -> list[Trial]:
    """The trials of the largest rank that are done, at the learning rate that the verdict takes.

    Raises:
        StudyError: there are none.
    """
    rank = max(study.spec.ranks)
    examples = study.examples()
    plain = examples[examples["variant"] == PLAIN]
    judged = plain if plain.empty else judged_examples(plain)
    names = set(judged.loc[judged["rank"] == rank, "candidate"])
    trials = [trial for trial in study.spec.trials() if trial.candidate.name in names]
    done = [trial for trial in trials if study.trial_record(trial).status == "done"]
    if not done:
        raise StudyError(
            f"{study.path}: no trial of rank {rank}, the study's largest, is done",
            "Run the study to its end first: lower ranks are cut from the largest.",
        )
    return done


def lower_ranks(rank: int, own: Sequence[int]) -> list[int]:
    """Powers of two below `rank`, and those of `own` that are below it.

    Raises:
        StudyError: there are none.
    """
    powers = [1 << bits for bits in range(rank.bit_length()) if 1 << bits < rank]
    if not powers:
        raise StudyError(f"rank {rank} has no lower rank to be cut to", "Train a larger one.")
    return sorted({*powers, *(one for one in own if one < rank)})


def checked(ranks: Sequence[int], uncut: int) -> list[int]:
    """Raises StudyError where one is not from 1 to below `uncut`."""
    wrong = [rank for rank in ranks if not isinstance(rank, int) or not 1 <= rank < uncut]
    if wrong or not ranks:
        shown = ", ".join(map(str, wrong)) or "none"
        raise StudyError(f"--ranks {shown}: expected ranks from 1 to {uncut - 1}", f"Rank {uncut} is cut to them.")
    return sorted(set(ranks))


def missing(
    study: StudyFolder, trials: Sequence[Trial], ranks: Sequence[int], recover: int, progress: Progress
) -> dict[str, list[tuple[int, int]]]:
    """By trial, the pairs of rank and recovery steps that curve.json lacks. A damaged one is removed."""
    try:
        cuts = study.rank_curve()
    except DamagedError:
        study.file(*CURVE.split("/")).unlink()
        progress.say(f"{CURVE} was damaged: it is removed, and made again.")
        cuts = []
    there = {(cut.trial, cut.rank, cut.recover_steps) for cut in cuts}
    asked = [(rank, steps) for steps in sorted({0, recover}) for rank in ranks]
    wanted = {trial.name: [pair for pair in asked if (trial.name, *pair) not in there] for trial in trials}
    return {name: pairs for name, pairs in wanted.items() if pairs}


def cut_adapters(study: StudyFolder, wanted: Mapping[str, Sequence[Sequence[int]]], data: "TokenizedData") -> None:
    """Measures what is wanted of each trial, as pairs of rank and recovery steps; curve.json grows piece by piece."""
    from rankscope.measure.truncation import TruncationRequest, evaluate_truncations

    model, _ = load_base(study)
    trials = {trial.name: trial for trial in study.spec.trials()}
    for name, pairs in wanted.items():
        trial, folder = trials[name], study.adapter_file(trials[name]).parent
        results, sha256 = study.trial_record(trial).results, study.adapter_sha256(trial)
        assert results
        assert results.eval_loss is not None
        requests = [TruncationRequest(*pair) for pair in pairs]
        for cuts in evaluate_truncations(model, study.spec, trial, folder, results.eval_loss, requests, data):
            study.add_cuts([Cut(trial=name, adapter_sha256=sha256, **cut.describe()) for cut in cuts])
