"""The command that would settle an open verdict."""

import shlex
from typing import NamedTuple

from rankscope.study.evidence import Evidence
from rankscope.text.catalogue import Catalogue
from rankscope.text.formats import percent, rate
from rankscope.text.verdict import Verdict, cause_of, kind_of_gain


class NextStep(NamedTuple):
    title: str
    command: str


def next_step(verdict: Verdict, evidence: Evidence, directory: str, text: Catalogue) -> NextStep | None:
    """The command that would settle an open verdict on the study in `directory`; None where all is settled."""
    if not verdict:
        return None
    spec, outcome = evidence.spec, verdict["outcome"]
    run = f"rankscope run {shlex.quote(directory)}"

    def step(title: str, command: str) -> NextStep:
        return NextStep(text(f"settle.{title}"), command)

    seeds_would_do = outcome == "not_trained_enough" and kind_of_gain(verdict) == "little_gain_more"
    if outcome == "not_trained_enough" and not seeds_would_do:
        steps, epochs = 2 * (spec.training.steps or 0), 2 * (spec.training.epochs or 1)
        option, length = ("steps", f"{steps}") if steps else ("epochs", f"{epochs:g}")
        return step("longer", f"{run} --{option} {length} --out {shlex.quote(f'{directory}-{length}-{option}')}")
    open_below = outcome == "recommended" and verdict["undetermined"] and verdict.get("more_seeds")
    if outcome not in ("not_enough_evidence", "not_distinguishable") and not open_below and not seeds_would_do:
        return None
    cause = cause_of(verdict)
    if cause == "diverged":
        rates = [float(f"{min(spec.learning_rates) / 4:.3g}"), *sorted(spec.learning_rates)]
        return step("lower_rate", f"{run} --learning-rates {','.join(map(rate, rates))}")
    if cause in ("one_seed", "few_seeds") and "some_trials_unfinished" not in verdict["caveats"]:
        return step("title", f"{run} --until-settled")
    if cause == "few_items":  # how many there are is the task's
        return None
    if cause != "close":
        return step("unfinished", run)
    wider = [row["margin"] for row in verdict.get("margins", []) if row["margin"] > verdict["margin"] and row["rank"]]
    if wider:
        return step("margin", f"rankscope report {shlex.quote(directory)} --margin {percent(wider[0])}")
    facts = evidence.data_facts
    rows, others = facts.get("rows_eval", 0), facts.get("rows_train", 0)
    command = f"{run} --set data.eval_rows={2 * rows}"
    if "eval_id" in facts:  # a set of its own, of which the study takes more
        return step("rows", command) if facts.get("eval_rows_unused") else None
    return step("rows", f"{command} --out {shlex.quote(f'{directory}-{2 * rows}-rows')}") if others > 2 * rows else None
