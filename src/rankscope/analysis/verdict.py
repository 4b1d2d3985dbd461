"""The verdict: the smallest rank that is good enough, or that the evidence does not show one.

A rank is good enough (non-inferior) when its loss is shown to be at most the best candidate's plus the margin,
whichever candidate is the best; it is worse when its loss is shown to be above. The margin is a share of the gain: the
untrained model's loss minus the best candidate's. Several ranks are tested at once, so their level is divided among
them (Bonferroni): the chance that any rank is wrongly called good enough stays below 1 - confidence, and so does the
chance that any is wrongly called worse (benchmarks/simulate.py).

Where fine-tuning itself has hardly gained anything, a share of it is nothing that could be measured: such a study was
not trained long enough to tell ranks apart, and recommends none.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import pandas as pd

from rankscope.analysis.claims import judge_claims
from rankscope.analysis.comparison import (
    Comparison,
    Judged,
    bounds,
    compare,
    estimate,
    judge,
    judged_examples,
    least_kept,
    losses_by_candidate,
    may_be_best,
    without_diverged,
)
from rankscope.analysis.costs import over_budget
from rankscope.analysis.variants import judge_variants
from rankscope.data.doubts import doubts
from rankscope.errors import StudyError
from rankscope.spec.models import EMBEDDED
from rankscope.study.evidence import Evidence

MAX_MORE_SEEDS = 50  # added seeds that the search for `more_seeds` tries
MAX_REGRET_MARGINS = 2.0  # margins that the cheapest of ranks without a visible difference may lose at most
GAIN_OVER_WIDTH = 3.0  # least gain for ranks to be told apart, in half-widths of the widest interval between them
USUAL_MARGINS = (0.01, 0.02, 0.05, 0.1)  # shares of the gain at which the verdict is shown beside its own
OVERFIT_STEP_SHARE = 0.8  # of the steps: a rank whose best evaluation comes before it, and is clearly better, overfits

States = Mapping[str, bool | None]  # by candidate: True for good enough, False for worse, None for undecided


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

    `more_seeds` is the least number of added seeds that would settle it with the same means and spreads; None where
    all is settled, or where up to 50 would not do. `comparison` has a row for each rank at its best candidate,
    `diverged` one for each candidate with a seed that diverged, which is compared with none: a mean over the seeds that
    survived would flatter it. `left_out` names ranks without a row; `overfits` those whose best evaluation came early,
    with its step. `reference_candidate` is full fine-tuning at its best rate; `claims` are the four of the original
    study; `variants` are those of `rankscope.analysis.variants`; `caveats` are codes that the report puts in words; of
    those in `rankscope.data.doubts.DOUBTS` the numbers are in data/facts.json.

    Raises:
        StudyError: the margin is a share of the gain, and the study does not know the untrained model's losses.
    """
    spec, confidence = evidence.spec, evidence.spec.verdict.confidence
    diverged = diverged_candidates(evidence.results)
    examples = without_diverged(evidence.examples, evidence.results)
    judged = judge(examples, _untrained(evidence), _full_losses(evidence)) if len(examples) else None
    rows = compare(judged, spec.verdict.margin) if judged else []
    compared = [row.candidate for row in rows]
    verdict: dict[str, Any] = {
        "schema": 3,
        "outcome": "not_enough_evidence",
        **dict.fromkeys(("rank", "candidate", "best_candidate")),
        "margin": spec.verdict.margin,
        "margin_of": spec.verdict.margin_of,
        "confidence": confidence,
        "seeds": min((row.eval_loss.seeds for row in rows), default=0),
        "examples": rows[0].eval_loss.examples if rows else 0,
        "scaling": {"alpha": spec.adapter.alpha, "use_rslora": spec.adapter.use_rslora},
        **dict.fromkeys(("gain", "gain_low", "gain_high")),
        "margins": [],
        **dict.fromkeys(("guess", "more_seeds")),
        "undetermined": [],
        "left_out": sorted(set(spec.ranks) - {row.rank for row in rows}),
        "diverged": diverged,
        "overfits": [],
        "reference_candidate": None,
        "comparison": [],
        "claims": judge_claims(evidence, compared),
        "variants": judge_variants(evidence),
        "caveats": [],
    }
    over = over_budget(spec.verdict, evidence.profiles, compared)
    if judged and rows:
        decision, states = decide(rows, confidence, over)
        reference, over_reference = over_full(evidence, judged)
        verdict |= decision | {"reference_candidate": reference}
        verdict["guess"] = _guess(rows, over)
        verdict["overfits"] = _overfits(evidence, rows)
        verdict["comparison"] = _table(rows, states, over, over_reference, confidence)
        if judged.untrained is not None:
            verdict |= _of_the_gain(verdict, judged, rows, over)
    if isinstance(spec.adapter.alpha, tuple):
        alphas = {candidate.name: candidate.lora_alpha for candidate in spec.candidates()}
        for named in [*verdict["comparison"], *diverged]:
            named["alpha"] = alphas[named["candidate"]]
    verdict["caveats"] = _caveats(evidence, verdict, rows, over)
    return verdict


def diverged_candidates(results: pd.DataFrame) -> list[dict[str, Any]]:
    """Candidates of which a seed diverged: `candidate rank learning_rate seeds`, lowest rank first."""
    lost = results[results["status"] == "diverged"]
    return [
        {
            "candidate": str(name),
            "rank": int(part["rank"].iloc[0]),
            "learning_rate": float(part["learning_rate"].iloc[0]),
            "seeds": sorted(map(int, part["seed"])),
        }
        for (_, _, name), part in lost.groupby(["rank", "learning_rate", "candidate"])
    ]


def _untrained(evidence: Evidence) -> pd.DataFrame | None:
    if evidence.spec.verdict.margin_of == "loss":
        return None
    if evidence.untrained is None or evidence.untrained.empty:
        raise StudyError(
            "verdict.margin_of: gain needs the untrained model's loss on each held-out row, which this study lacks: it "
            "was trained by an earlier version",
            "Judge it by --margin-of loss.",
        )
    return evidence.untrained


def _full_losses(evidence: Evidence) -> pd.DataFrame | None:
    """Losses of full fine-tuning at its best rate; of several, it is chosen on the even-numbered examples."""
    reference = _reference(evidence)
    if reference.empty:
        return None
    judged = judged_examples(reference)
    return losses_by_candidate(reference)[str(judged["candidate"].iloc[0])]


def _reference(evidence: Evidence) -> pd.DataFrame:
    return without_diverged(evidence.reference, evidence.reference_results)


def _guess(rows: Sequence[Comparison], over: Mapping[str, list[str]]) -> str | None:
    """Candidate of the smallest rank whose mean is within the margin, whatever is shown; else the best."""
    inside = [row for row in rows if not over.get(row.candidate)]
    good = [row for row in inside if all(excess.mean <= 0 for excess in row.excesses.values())]
    return (good[0] if good else best_of(inside)).candidate if inside else None


def _overfits(evidence: Evidence, rows: Sequence[Comparison]) -> list[dict[str, Any]]:
    """Candidates whose mean held-out loss was clearly lower before the last fifth of the steps than at the end:
    `candidate rank step rise`; clearly is by more than the margin allows."""
    found, curves = [], evidence.curves.dropna(subset=["eval_loss"])
    curves = curves[curves["trial"].isin(evidence.results.loc[evidence.results["status"] == "done", "trial"])]
    for row in rows:
        curve = curves[curves["candidate"] == row.candidate]
        means = curve.groupby("step")["eval_loss"].mean()
        means = means[means.index > 0]
        if len(means) < 2:
            continue
        step, rise = int(means.index[int(means.argmin())]), float(means.iloc[-1] - means.min())
        share, of_gain = evidence.spec.verdict.margin, row.gain is not None
        allowed = share * (row.gain.mean + rise if row.gain is not None else row.eval_loss.mean)
        if step <= OVERFIT_STEP_SHARE * means.index[-1] and rise > allowed and (not of_gain or allowed > 0):
            found.append({"candidate": row.candidate, "rank": row.rank, "step": step, "rise": rise})
    return found


def _of_the_gain(
    verdict: Mapping[str, Any], judged: Judged, rows: Sequence[Comparison], over: Mapping[str, list[str]]
) -> dict[str, Any]:
    """Fields of verdict.json that are shares of the gain, whose reference is full fine-tuning where it gains most."""
    confidence, best = verdict["confidence"], best_of(rows)
    assert judged.untrained is not None
    assert best.gain is not None
    gain, reference = best.gain, best.candidate
    if judged.full is not None:
        gain, reference = estimate((judged.untrained - judged.full)[None], judged.label_tokens), "full"
    low, high = _finite(gain.interval(confidence))
    fields: dict[str, Any] = {"gain": gain.mean, "gain_low": low, "gain_high": high, "gain_of": reference}
    if verdict["outcome"] == "not_trained_enough" or gain.mean <= 0:
        return fields
    good, _ = _levels(len(rows), confidence)
    for row in verdict["comparison"]:
        row["kept"] = row["gain"] / gain.mean if reference == "full" else 1 - row["regret"] / gain.mean
        row["kept_low"] = None if verdict["seeds"] < 2 else least_kept(judged, row["candidate"], good)
    for share in USUAL_MARGINS:
        decision, _ = decide(compare(judged, share), confidence, over, look_ahead=False)
        chosen = decision if decision["outcome"] == "recommended" else {}
        fields.setdefault("margins", []).append(
            {"margin": share, "rank": chosen.get("rank"), "undetermined": chosen.get("undetermined", [])}
        )
    return fields


def best_of(rows: Sequence[Comparison]) -> Comparison:
    """Candidate with the lowest held-out loss in the sample, on the seeds that it shares with each other one."""
    return min(rows, key=_regret)


def _regret(row: Comparison) -> float:
    """Largest mean difference to any other candidate; negative for the best."""
    return max((difference.mean for difference in row.differences.values()), default=0.0)


def decide(
    rows: Sequence[Comparison],
    confidence: float,
    over: Mapping[str, list[str]] | None = None,
    *,
    look_ahead: bool = True,
) -> tuple[dict[str, Any], States]:
    """Fields of verdict.json that hold the conclusion, and the state of each candidate. `over` names the limits that
    each candidate exceeds; `look_ahead` is whether to find `more_seeds`."""
    over, seeds = over or {}, min(row.eval_loss.seeds for row in rows)
    states = _states(rows, confidence)
    found = {"best_candidate": best_of(rows).candidate} | _outcome(rows, states, confidence, over)
    for added in range(1, MAX_MORE_SEEDS + 1) if look_ahead and seeds > 1 and not _settled(found) else ():
        more = [row.with_seeds(added) for row in rows]
        if _settled(_outcome(more, _states(more, confidence), confidence, over)):
            found["more_seeds"] = added
            break
    return found, states


def _settled(found: Mapping[str, Any]) -> bool:
    """Whether the outcome is final and no lower rank is undecided."""
    open_ = ("not_enough_evidence", "not_distinguishable", "not_trained_enough")
    return found["outcome"] not in open_ and not found.get("undetermined")


def _levels(candidates: int, confidence: float) -> tuple[float, float]:
    """Two-sided confidence of one difference, for claims of good enough and of worse. One candidate is the best, so a
    claim can be wrong about `candidates - 1` others. Good enough is wrong on one side only, which doubles the level;
    the confidence is never below the one shown."""
    share = (1 - confidence) / max(1, candidates - 1)
    return max(confidence, 1 - 2 * share), 1 - share


def _states(rows: Sequence[Comparison], confidence: float) -> States:
    good, worse = _levels(len(rows), confidence)
    best = may_be_best(rows, worse)
    states: dict[str, bool | None] = {}
    for row in rows:
        highs = [excess.interval(good)[1] for excess in row.excesses.values()]
        lows = [row.excesses[name].interval(worse)[0] for name in best if name != row.candidate]
        states[row.candidate] = None
        if highs and max(highs) <= 0:
            states[row.candidate] = True
        elif row.candidate not in best and min(lows) > 0:
            states[row.candidate] = False
    return states


def _outcome(
    rows: Sequence[Comparison], states: States, confidence: float, over: Mapping[str, list[str]]
) -> dict[str, Any]:
    inside = [row for row in rows if not over.get(row.candidate)]
    if not inside:
        return {"outcome": "nothing_in_budget"}
    if not _gained_enough(rows, confidence):
        return {"outcome": "not_trained_enough"}
    if len(rows) == 1 and not _gain_unknown(rows[0]):
        return _chosen("recommended", rows[0])
    for row in inside:
        if states[row.candidate]:
            below = [other.candidate for other in inside if other.rank < row.rank and states[other.candidate] is None]
            return _chosen("recommended", row) | {"undetermined": below}
    if len(inside) < len(rows) and all(states[row.candidate] is False for row in inside):
        return _chosen("best_in_budget", best_of(inside))
    if len(inside) == len(rows) and _alike(rows, confidence):
        return _chosen("not_distinguishable", inside[0])
    return {"outcome": "not_enough_evidence"}


def _gained_enough(rows: Sequence[Comparison], confidence: float) -> bool:
    """Whether fine-tuning gained so much that differences between ranks could matter; with one seed nobody knows."""
    best = best_of(rows)
    if best.gain is None or _gain_unknown(best):
        return True
    gain = best.gain
    widths = [found.half_width(confidence) for row in rows for found in row.differences.values()]
    widest = max((width for width in widths if math.isfinite(width)), default=0.0)
    return gain.interval(confidence)[0] > 0 and gain.mean >= GAIN_OVER_WIDTH * widest


def _gain_unknown(row: Comparison) -> bool:
    """Whether the margin is a share of the gain, of which one seed gives no interval."""
    return row.gain is not None and row.gain.seed_error is None


def _chosen(outcome: str, row: Comparison) -> dict[str, Any]:
    return {"outcome": outcome, "rank": row.rank, "candidate": row.candidate}


def _alike(rows: Sequence[Comparison], confidence: float) -> bool:
    """Whether no two differ visibly, and the first one's regret is at most `MAX_REGRET_MARGINS`."""
    alike = len(may_be_best(rows, confidence)) == len(rows)
    margins = [rows[0].differences[name].mean - rows[0].excesses[name].mean for name in rows[0].excesses]
    high = bounds(rows, confidence)[0].high
    return alike and high is not None and high <= MAX_REGRET_MARGINS * min(margins)


def _table(
    rows: Sequence[Comparison],
    states: States,
    over: Mapping[str, list[str]],
    over_reference: Mapping[str, Mapping[str, float | None]],
    confidence: float,
) -> list[dict[str, Any]]:
    best, table = best_of(rows), []
    for row, bound in zip(rows, bounds(rows, confidence), strict=True):
        on_these = row.eval_loss._replace(example_error=0.0)  # between candidates what examples share does not count
        low, high = _finite(on_these.interval(confidence))
        regret = max(0.0, _regret(row))
        table.append(
            {
                "candidate": row.candidate,
                "rank": row.rank,
                "learning_rate": row.learning_rate,
                "eval_loss": row.eval_loss.mean,
                "eval_loss_low": low,
                "eval_loss_high": high,
                "regret": regret,
                "regret_low": bound.low,
                "regret_high": bound.high,
                "regret_share": regret / best.eval_loss.mean,
                "within_margin": states[row.candidate],
                "gain": row.gain.mean if row.gain else None,
                "over_budget": over.get(row.candidate, []),
                **over_reference.get(row.candidate, {}),
            }
        )
    return table


def _finite(interval: tuple[float, float]) -> list[float | None]:
    return [end if math.isfinite(end) else None for end in interval]


def over_full(evidence: Evidence, judged: Judged) -> tuple[str | None, dict[str, dict[str, float | None]]]:
    """Name of full fine-tuning at its best rate, and each compared candidate's loss above its own: `over_full`,
    `over_full_low`, `over_full_high`, on the seeds that both finished. None and empty without a finished reference."""
    full = _full_losses(evidence)
    if full is None:
        return None, {}
    found: dict[str, dict[str, float | None]] = {}
    reference = judged_examples(_reference(evidence))
    for name, losses in judged.losses.items():
        seeds = losses.index.intersection(full.index)
        rows = losses.columns.isin(reference["example"])  # half of them, where it had several rates
        if len(seeds):
            above = losses.loc[seeds, losses.columns[rows]] - full.loc[seeds, losses.columns[rows]]
            difference = estimate(above.to_numpy(), judged.label_tokens[rows])
            low, high = _finite(difference.interval(evidence.spec.verdict.confidence))
            found[name] = {"over_full": difference.mean, "over_full_low": low, "over_full_high": high}
    return str(reference["candidate"].iloc[0]), found


def _caveats(
    evidence: Evidence, verdict: Mapping[str, Any], rows: Sequence[Comparison], over: Mapping[str, list[str]]
) -> list[str]:
    spec = evidence.spec
    ended = evidence.results["status"].isin(["done", "diverged"])
    rates = sorted(evidence.results.loc[ended, "learning_rate"].unique()) if rows else sorted(spec.learning_rates)
    asked = bool(rows) and verdict["seeds"] > 1 and verdict["outcome"] != "not_trained_enough"
    open_ = asked and not _settled(verdict) and verdict["more_seeds"] is None
    found = {
        "one_learning_rate": len(rates) == 1,
        "rate_at_edge": len(rates) > 1 and any(row.learning_rate in (rates[0], rates[-1]) for row in rows),
        "one_seed": verdict["seeds"] == 1,
        "seeds_would_not_do": open_,
        "ranks_left_out": bool(rows) and bool(set(verdict["left_out"]) - {row["rank"] for row in verdict["diverged"]}),
        "diverged": bool(verdict["diverged"]),
        "worse_than_untrained": any(row.gain is not None and row.gain.mean < 0 for row in rows),
        "overfits": bool(verdict["overfits"]),
        "some_trials_unfinished": bool((~evidence.results["status"].isin(["done", "diverged"])).any()),
        "budget_unmeasured": any("unmeasured" in reasons for reasons in over.values()),
        "embedded_data": EMBEDDED in (*spec.data.ids, spec.model.id),
    }
    return [*(code for code, true in found.items() if true), *doubts(evidence.data_facts)]
