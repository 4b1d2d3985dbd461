"""The verdict: the smallest rank that is good enough, or that the evidence does not show one.

A rank is good enough (non-inferior) when its loss is shown to be at most the best candidate's plus the margin,
whichever candidate is the best; it is worse when its loss is shown to be above. The margin is a share of the gain: the
untrained model's loss minus the best candidate's. How that is shown: `rankscope.analysis.decision`.

Where fine-tuning itself has hardly gained anything, a share of it is nothing that could be measured: such a study was
not trained long enough to tell ranks apart, and recommends none.
"""

from collections.abc import Mapping
from functools import cache
from typing import Any

import numpy as np
import pandas as pd

from rankscope.analysis import comparison
from rankscope.analysis.claims import judge_claims
from rankscope.analysis.comparison import Comparison, Judged, estimate, finite, with_ends
from rankscope.analysis.costs import over_budget
from rankscope.analysis.decision import level_at, states, upper_bound
from rankscope.analysis.outcome import States, best_guess, decide, settled
from rankscope.analysis.rates import judge_rates
from rankscope.analysis.task import loss_and_task
from rankscope.analysis.variants import judge_variants
from rankscope.data.doubts import doubts
from rankscope.errors import StudyError
from rankscope.spec.models import EMBEDDED
from rankscope.study.evidence import Evidence

USUAL_MARGINS = (0.01, 0.02, 0.05, 0.1)  # shares of the gain at which the verdict is shown beside its own
OVERFIT_STEP_SHARE = 0.8  # of the steps: a rank whose best evaluation comes before it, and is clearly better, overfits


def conclude(evidence: Evidence) -> dict[str, Any]:
    """Content of verdict.json.

    `outcome` is one of

    - `recommended`: `rank` is the smallest within the budget that is shown to be good enough; `undetermined` names
      smaller candidates that are shown to be neither good enough nor worse.
    - `not_distinguishable`: no two ranks differ visibly, and the intervals are narrow; `rank` is the cheapest.
    - `best_in_budget`: every rank within the budget is worse than the margin allows; `rank` is the best of them.
    - `nothing_in_budget`: no rank is known to fit the budget; `rank` is None.
    - `not_trained_enough`: the gain of fine-tuning is not shown to be positive, or is less than three half-widths of
      the widest interval between candidates; `rank` is None.
    - `not_enough_evidence`: `rank` is None.

    `margin` is a share of `margin_of`: `gain` or `loss`. `gain` is that of the best candidate (or of full fine-tuning,
    where it is better), with `gain_low` and `gain_high`, in nats per label token; None without the untrained model's
    losses. `margins` has the smallest rank that is good enough at other margins, by the same test. `guess` is the
    smallest rank whose mean is within the margin, whatever is shown, or else the best.

    `more_seeds` is the number of added seeds to the first planned number that would settle it with the same means
    and spreads, if the ranks in contention got them; None where all is settled, or where none would do. `next_look` is
    what `run --until-settled` would train next: the `ranks` in contention, and how many `seeds` each then has; None
    where it would train nothing.

    `comparison` has a row for each rank at its best candidate, `diverged` one for each candidate with a seed that
    diverged, which is compared with none. `left_out` names ranks without a row; `overfits` those whose best evaluation
    came early, with its step. `reference_candidate` is full fine-tuning at its best rate; `claims` `variants` `rates`
    are of the modules of these names; `caveats` are codes that the report puts in words; of those in
    `rankscope.data.doubts.DOUBTS` the numbers are in data/facts.json. In a study with a task `loss` and `task` have the
    conclusion of each, and the fields above that of the one that `by` names (`rankscope.analysis.task`).

    Raises StudyError: the margin is a share of the gain, and the study does not know the untrained model's losses.
    """
    spec, confidence, results = evidence.spec, evidence.spec.verdict.confidence, evidence.results
    diverged = _diverged(results)
    examples = comparison.without_diverged(evidence.examples, results)
    reference = comparison.judged_examples(evidence.reference, evidence.reference_results)
    best_full = None if reference.empty else str(reference["candidate"].iloc[0])
    full = None
    if best_full:  # on all examples, of which the even-numbered have chosen its rate
        full = _losses(evidence.reference[evidence.reference["candidate"] == best_full])
    judged = comparison.judge(examples, _untrained(evidence), full) if len(examples) else None
    found = comparison.compare(judged, spec.verdict.margin) if judged and judged.losses else None
    compared = found.candidates if found else []
    left_out = sorted(set(spec.ranks) - set(found.ranks if found else ()))
    verdict: dict[str, Any] = {
        "schema": 3,
        "outcome": "not_enough_evidence",
        **dict.fromkeys(("rank", "candidate", "best_candidate")),
        "margin": spec.verdict.margin,
        "margin_of": spec.verdict.margin_of,
        "confidence": confidence,
        "seeds": int(found.differences.seeds.min()) if found else 0,  # that a pair shares
        "examples": found.eval_loss.examples if found else 0,
        "scaling": {"alpha": spec.adapter.alpha, "use_rslora": spec.adapter.use_rslora},
        **dict.fromkeys(("gain", "gain_low", "gain_high")),
        "margins": [],
        **dict.fromkeys(("guess", "more_seeds", "next_look")),
        "undetermined": [],
        "left_out": left_out,
        "diverged": diverged,
        "overfits": [],
        "reference_candidate": None,
        "comparison": [],
        "claims": judge_claims(evidence, compared),
        "variants": judge_variants(evidence),
        "rates": judge_rates(results, confidence),
        "caveats": [],
    }
    over = over_budget(spec.verdict, evidence.profiles, compared)
    if judged and found:
        decision, states = decide(found, confidence, over)
        verdict |= decision
        if len(compared) == 1 and set(left_out) - {row["rank"] for row in diverged}:  # others have not finished
            compared = []
            verdict |= {"outcome": "not_enough_evidence", **dict.fromkeys(("rank", "candidate", "next_look"))}
        verdict["guess"] = best_guess(found, over)
        verdict["overfits"] = _overfits(evidence, found)
        verdict["comparison"] = _table(found, states, over, confidence)
        if best_full:
            verdict["reference_candidate"] = best_full
            _add_over_full(verdict["comparison"], judged, reference, confidence)
        if judged.untrained is not None:
            verdict |= _of_the_gain(verdict, judged, found, over)
    if isinstance(spec.adapter.alpha, tuple):
        alphas = {candidate.name: candidate.lora_alpha for candidate in spec.candidates()}
        for named in [*verdict["comparison"], *diverged]:
            named["alpha"] = alphas[named["candidate"]]
    verdict |= loss_and_task(evidence, verdict, compared, over)
    verdict["caveats"] = _caveats(evidence, verdict, found, over)
    return verdict


def _diverged(results: pd.DataFrame) -> list[dict[str, Any]]:
    """Candidates of which a seed diverged: `candidate rank learning_rate seeds`, lowest rank first."""
    lost = results[results["status"] == "diverged"].sort_values(["rank", "learning_rate", "candidate", "seed"])
    seeds = lost.groupby(["candidate", "rank", "learning_rate"], sort=False)["seed"].agg(list)
    rows: list[Any] = seeds.reset_index(name="seeds").to_dict("records")
    return rows


def _untrained(evidence: Evidence) -> pd.DataFrame | None:
    if evidence.spec.verdict.margin_of == "loss":
        return None
    if evidence.untrained.empty:
        raise StudyError(
            "verdict.margin_of: gain needs the untrained model's loss on each held-out row, which this study lacks: it "
            "was trained by an earlier version",
            "Judge it by --margin-of loss.",
        )
    return evidence.untrained


def _losses(examples: pd.DataFrame) -> pd.DataFrame:
    """Losses of the one candidate in `examples`."""
    (losses,) = comparison.losses_by_candidate(examples).values()
    return losses


def _add_over_full(rows: list[dict[str, Any]], judged: Judged, reference: pd.DataFrame, confidence: float) -> None:
    """Add each compared candidate's loss above that of full fine-tuning at its best rate: `over_full`, `over_full_low`,
    `over_full_high`, on the seeds and examples that both have."""
    full, tokens = _losses(reference), comparison.label_tokens(reference)
    for row in rows:
        if pair := comparison.paired(judged.losses[row["candidate"]], full, tokens):
            row |= with_ends("over_full", pair.difference.mean, pair.difference.ends(confidence))


def _overfits(evidence: Evidence, found: Comparison) -> list[dict[str, Any]]:
    """Candidates whose mean held-out loss was clearly lower before the last fifth of the steps than at the end:
    `candidate rank step rise`; clearly is by more than the margin allows."""
    rows, curves = [], evidence.curves.dropna(subset=["eval_loss"])
    curves = curves[curves["trial"].isin(evidence.results.loc[evidence.results["status"] == "done", "trial"])]
    scales = found.eval_loss.mean if found.gain is None else found.gain.mean
    for name, rank, scale in zip(found.candidates, found.ranks, scales, strict=True):
        means = curves[curves["candidate"] == name].groupby("step")["eval_loss"].mean()
        means = means[means.index > 0]
        if len(means) < 2:
            continue
        step, rise = int(means.index[int(means.argmin())]), float(means.iloc[-1] - means.min())
        allowed = evidence.spec.verdict.margin * (scale if found.gain is None else scale + rise)
        if step <= OVERFIT_STEP_SHARE * means.index[-1] and rise > allowed > 0:
            rows.append({"candidate": name, "rank": rank, "step": step, "rise": rise})
    return rows


def _of_the_gain(
    verdict: Mapping[str, Any], judged: Judged, found: Comparison, over: Mapping[str, list[str]]
) -> dict[str, Any]:
    """Fields of verdict.json that are shares of the gain, whose reference is full fine-tuning where it gains most."""
    confidence, best = verdict["confidence"], found.best
    assert judged.untrained is not None
    assert found.gain is not None
    gain, reference = float(found.gain.mean[best]), found.candidates[best]
    ends = finite(*(end[best] for end in found.gain.interval(confidence)))
    if judged.full is not None:  # of one mean over seeds
        gain, reference = float(estimate((judged.untrained - judged.full)[None], judged.label_tokens).mean), "full"
        ends = None, None
    fields: dict[str, Any] = with_ends("gain", gain, ends) | {"gain_of": reference}
    if verdict["outcome"] == "not_trained_enough" or gain <= 0:
        return fields
    kept = least_kept(judged, confidence, verdict["margin"])
    for row in verdict["comparison"]:
        row["kept"] = row["gain"] / gain if reference == "full" else 1 - row["regret"] / gain
        row["kept_low"] = None if row["seeds"] < 2 else kept[row["candidate"]]
    for share in USUAL_MARGINS:
        decision, _ = decide(comparison.compare(judged, share), confidence, over, look_ahead=False)
        chosen = decision if decision["outcome"] == "recommended" else {}
        fields.setdefault("margins", []).append(
            {"margin": share, "rank": chosen.get("rank"), "undetermined": chosen.get("undetermined", [])}
        )
    return fields


def least_kept(judged: Judged, confidence: float, margin: float) -> dict[str, float | None]:
    """Share of the gain that each candidate is shown to keep: one minus the smallest margin at which it is good enough.
    None if it is so neither at `margin` nor at all of the gain, whose noise counts more at larger margins; and 1
    without another candidate. Of full fine-tuning's gain, where that is larger, whatever the other candidates do."""
    names = list(judged.losses)
    if len(names) == 1 and judged.full is None:
        return {names[0]: 1.0}
    octaves = np.log2([judged.identity[name][0] for name in names])

    @cache
    def good(share: float) -> list[bool]:
        if judged.full is None:
            return list(states(comparison.excesses(judged, share), octaves, confidence)[0])
        allowed = judged.allowed(judged.full[None], share)
        each = [estimate(table.to_numpy() - allowed, judged.label_tokens) for table in judged.losses.values()]
        over = comparison.stacked(each, len(names))
        level = level_at(over.seeds, confidence) / max(1, len(names) - 1)
        return list(upper_bound(over, over.seeds - 1, level) <= 0)

    found: dict[str, float | None] = {}
    for number, name in enumerate(names):
        low, high = 0.0, margin if good(margin)[number] else 1.0
        for _ in range(_BISECTIONS):
            middle = (low + high) / 2
            low, high = (low, middle) if good(middle)[number] else (middle, high)
        found[name] = 1.0 - high if good(high)[number] else None
    return found


_BISECTIONS = 14  # to a share of 0.0001


def _table(found: Comparison, states: States, over: Mapping[str, list[str]], confidence: float) -> list[dict[str, Any]]:
    losses, regrets = found.eval_loss, np.maximum(found.regrets, 0.0)
    on_these = losses._replace(example_error=0.0)  # between candidates what examples share does not count
    lows, highs = on_these.interval(confidence)
    table = []
    for number, (name, ends) in enumerate(zip(found.candidates, comparison.bounds(found, confidence), strict=True)):
        table.append(
            {
                "candidate": name,
                "rank": found.ranks[number],
                "learning_rate": found.learning_rates[number],
                "seeds": int(losses.seeds[number]),
                **with_ends("eval_loss", losses.mean[number], finite(lows[number], highs[number])),
                **with_ends("regret", regrets[number], ends),
                "regret_share": float(regrets[number] / losses.mean[found.best]),
                "within_margin": states[name],
                "gain": float(found.gain.mean[number]) if found.gain else None,
                "over_budget": over.get(name, []),
            }
        )
    return table


def _caveats(
    evidence: Evidence, verdict: Mapping[str, Any], found: Comparison | None, over: Mapping[str, list[str]]
) -> list[str]:
    spec = evidence.spec
    ended = evidence.results["status"].isin(["done", "diverged"])
    rates = sorted(evidence.results.loc[ended, "learning_rate"].unique()) if found else sorted(spec.learning_rates)
    asked = found is not None and verdict["seeds"] > 1 and verdict["outcome"] != "not_trained_enough"
    open_ = asked and not settled(verdict) and verdict["more_seeds"] is None
    codes = {
        "one_learning_rate": len(rates) == 1,
        "rate_at_edge": len(rates) > 1
        and any(row["learning_rate"] in (rates[0], rates[-1]) for row in verdict["comparison"]),
        "one_seed": verdict["seeds"] == 1,
        "seeds_would_not_do": open_ and verdict.get("by") != "task",
        "ranks_left_out": bool(found and set(verdict["left_out"]) - {row["rank"] for row in verdict["diverged"]}),
        "diverged": bool(verdict["diverged"]),
        "worse_than_untrained": bool(found and found.gain and (found.gain.mean < 0).any()),
        "overfits": bool(verdict["overfits"]),
        "some_trials_unfinished": bool((~evidence.results["status"].isin(["done", "diverged"])).any()),
        "budget_unmeasured": any("unmeasured" in reasons for reasons in over.values()),
        "embedded_data": EMBEDDED in (*spec.data.ids, spec.model.id),
    }
    return [*(code for code, true in codes.items() if true), *doubts(evidence.data_facts)]
