"""Recompute a study's verdict from its raw files with numpy, pandas and scipy alone, without rankscope's code.

    python benchmarks/recompute.py STUDY

Reads study.yaml, trials/*/eval.json, trials/*/untrained.json, trials/*/metrics.jsonl, reference/*/eval.json and
profiles/*.json, and compares with verdict.json: each rank's held-out loss and regret with their intervals, the gain,
which ranks are good enough and which are worse, whether training was enough to tell, the recommended rank, by the
verdict's margin and by the usual ones, what each rank keeps of the gain, and the effects of the four claims with their
intervals. The exit code is 1 if they differ by more than 1e-9 (relative; what a rank keeps, which the verdict finds by
bisection, by more than 1e-4), and 2 if a study cannot be recomputed: it needs two ranks with two seeds, two held-out
rows, and no budget; one with a task is recomputed only where its verdict follows the loss.
"""

import json
import math
import sys
from collections.abc import Iterator
from itertools import permutations
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import yaml
from scipy import stats

COSTS = {
    "cpu_memory_lowest_then_flat": "private_mean_bytes",
    "gpu_memory_rises": "gpu_allocated_mean_bytes",
}


def records(study: Path, kind: str = "trials") -> dict[Path, dict[str, Any]]:
    """Return trial.json of each trial, by folder."""
    return {file.parent: json.loads(file.read_text()) for file in sorted((study / kind).glob("*/trial.json"))}


def held_out(study: Path, kind: str = "trials") -> pd.DataFrame:
    """Return one row per held-out example of each finished trial of a candidate with no seed that diverged.

    Of several alphas each makes another `rate`; variants are not of the verdict.
    """
    found = {
        folder: (trial, trial.get("candidate") or {"rank": 0, "learning_rate": trial["learning_rate"]})
        for folder, trial in records(study, kind).items()
    }
    diverged = [candidate for trial, candidate in found.values() if trial["status"] == "diverged"]
    frames = [pd.DataFrame(columns=["example", "rank", "rate"])]
    for folder, (trial, candidate) in found.items():
        plain = candidate.get("variant", "lora") == "lora"
        if trial["status"] == "done" and candidate not in diverged and plain:
            examples = pd.DataFrame(json.loads((folder / "eval.json").read_text())["examples"])
            rate = f"{candidate['learning_rate']} at alpha {candidate.get('lora_alpha')}"
            own = {"rank": candidate["rank"], "rate": rate, "seed": trial["seed"]}
            frames.append(examples.assign(**own, folder=folder))
    return pd.concat(frames[1:] or frames)


def before_training(study: Path) -> "pd.Series[float]":
    """Return the loss of each held-out example before training, of the trial whose name comes first."""
    file = min((study / "trials").glob("*/untrained.json"), key=lambda file: file.parent.name)
    examples = json.loads(file.read_text())["examples"]
    return pd.Series(examples["loss"], index=examples["example"])


def judged(examples: pd.DataFrame) -> pd.DataFrame:
    """Keep each rank at its best rate; with several rates, chosen on the even examples and judged on the odd ones.

    Of rates that finished different seeds, those with the most are compared, on the seeds that they share.
    """
    if examples.groupby("rank")["rate"].nunique().max() == 1:
        return examples
    chosen = []
    for rank, part in examples[examples["example"] % 2 == 0].groupby("rank"):
        seeds = part.groupby("rate")["seed"].agg(frozenset)
        seeds = seeds[seeds.map(len) == seeds.map(len).max()]
        shared = frozenset.intersection(*seeds)
        part = part[part["rate"].isin(seeds.index)]
        part = part[part["seed"].isin(shared)] if shared else part
        nats = (part["loss"] * part["label_tokens"]).groupby(part["rate"]).sum()
        chosen.append((rank, (nats / part.groupby("rate")["label_tokens"].sum()).idxmin()))
    pairs = pd.MultiIndex.from_frame(examples[["rank", "rate"]])
    return examples[pairs.isin(chosen) & (examples["example"] % 2 == 1).to_numpy()]


class Moments(NamedTuple):
    """Mean of a seeds x examples table weighted by label tokens, its variance due to seeds and the rest and due to
    examples, and the third central moment that examples give it."""

    mean: float
    of_seeds: float
    of_examples: float
    third: float
    seeds: int
    examples: int
    effective: float  # examples of equal weight that tell as much


def moments(table: pd.DataFrame, weight: "pd.Series[float]") -> Moments:
    values, w = table.to_numpy(), (weight / weight.mean())[table.columns].to_numpy()
    seeds, examples = values.shape
    effective = float(w.sum() ** 2 / (w**2).sum())
    mean = float(np.average(values.mean(axis=0), weights=w))
    if seeds < 2:
        return Moments(mean, math.inf, 0.0, 0.0, seeds, examples, effective)
    part = w * (values - mean)
    of_seed, of_example = part.mean(axis=1), part.mean(axis=0)
    left = part - np.outer(of_seed, w) - of_example
    square = (left**2).sum() / ((seeds - 1) * (examples - 1))
    third = float(stats.kstat(of_example, 3)) / examples**2
    variance = max(0.0, of_example.var(ddof=1) / examples - square / (seeds * examples))
    return Moments(mean, float(of_seed.var(ddof=1)) / seeds, float(variance), third, seeds, examples, effective)


def quantile(of_seeds: float, of_examples: float, degrees: float, examples: float, level: float) -> float:
    """Return Student's t at `level`, its two degrees of freedom weighted by their shares of the variance."""
    if not of_seeds + of_examples:
        return 0.0
    share = of_seeds / (of_seeds + of_examples)
    return float(share * stats.t.ppf(level, degrees) + (1 - share) * stats.t.ppf(level, examples - 1))


def analysis_of_variance(
    table: pd.DataFrame, weight: "pd.Series[float]", level: float, seeds_only: bool = False
) -> tuple[float, float]:
    """Return a table's mean and its plain interval's half-width at `level`, which is infinite with one seed."""
    found = moments(table, weight)
    if found.seeds < 2:
        return found.mean, math.inf
    of_examples = 0.0 if seeds_only else found.of_examples
    t = quantile(found.of_seeds, of_examples, found.seeds - 1, found.examples, 0.5 + level / 2)
    return found.mean, t * math.sqrt(found.of_seeds + of_examples)


def level_of(seeds: int, confidence: float) -> float:
    """Return the level of all claims at this number of seeds: that of the last planned number."""
    shares = {2: 0.02, 3: 0.6, 5: 0.15, 8: 0.1, 12: 0.1}
    return (1 - confidence) * shares[max((look for look in shares if look <= seeds), default=2)]


def high(found: Moments, of_seeds: float, degrees: float, level: float) -> float:
    """Return the one-sided upper bound of a mean with this variance over seeds: Student's, or Hall's if higher."""
    error = math.sqrt(of_seeds + found.of_examples)
    if not error or math.isinf(error):
        return found.mean if not error else math.inf
    a = max(0.0, found.third) / error**3
    t = quantile(of_seeds, found.of_examples, degrees, found.effective, 1 - level)
    of_hall = t + a / 6 + a * t * t / 3 if a < 1e-6 else 3 * (1 - np.cbrt(1 - a * (t + a / 6))) / a
    return found.mean + error * max(t, of_hall)


class Judge:
    """Tables of each rank's losses (seeds x examples), and of those before training and of full fine-tuning."""

    def __init__(self, study: Path) -> None:
        self.spec = yaml.safe_load((study / "study.yaml").read_text())
        self.examples = judged(held_out(study))
        self.weight = self.examples.groupby("example")["label_tokens"].first()
        self.tables = {
            int(rank): part.pivot(index="seed", columns="example", values="loss")
            for rank, part in self.examples.groupby("rank")
        }
        while lone := [rank for rank in self.tables if not all(self.shared(rank, other) for other in self.tables)]:
            del self.tables[min(lone, key=lambda rank: len(self.tables[rank]))]
        self.examples = self.examples[self.examples["rank"].isin(self.tables)]
        self.of_gain = self.spec["verdict"].get("margin_of", "loss") == "gain"
        self.untrained = before_training(study)[self.weight.index] if self.of_gain else None
        self.full = self._full(held_out(study, "reference"))
        self.confidence: float = self.spec["verdict"]["confidence"]

    def shared(self, rank: int, other: int) -> list[int]:
        """Return the seeds that both ranks finished."""
        return [seed for seed in self.tables[rank].index if seed in self.tables[other].index]

    def _full(self, reference: pd.DataFrame) -> "pd.Series[float] | None":
        """Return full fine-tuning's mean loss of each example, where it is below every rank's."""
        if reference.empty or not self.of_gain:
            return None
        best = reference["rate"].isin(judged(reference)["rate"])
        full = reference[best].groupby("example")["loss"].mean()[self.weight.index]
        means = [np.average(table.mean(), weights=self.weight) for table in self.tables.values()]
        return full if np.average(full, weights=self.weight) < min(means) else None

    def interval(self, table: pd.DataFrame, level: float) -> tuple[float, float, float]:
        """Return mean, low and high."""
        mean, half = analysis_of_variance(table, self.weight, level)
        return mean, mean - half, mean + half

    def contrast(self, rank: int, other: int, margin: float) -> pd.DataFrame:
        """Return a rank's losses minus the largest that the margin allows beside another's, on seeds of both."""
        seeds = self.shared(rank, other)
        own, theirs = self.tables[rank].loc[seeds], self.tables[other].loc[seeds]
        if self.untrained is None:
            return own - (1 + margin) * theirs
        if self.full is None:
            return own - (1 - margin) * theirs - margin * self.untrained
        return own - theirs - margin * (self.untrained - self.full)

    def ends(self, level: float, margin: float = 0.0) -> pd.DataFrame:
        """Return the interval of each contrast, by pair of ranks."""
        found = {pair: self.interval(self.contrast(*pair, margin), level) for pair in permutations(self.tables, 2)}
        return pd.DataFrame(found, index=["mean", "low", "high"]).T

    def unbeaten(self, ends: pd.DataFrame) -> list[int]:
        return [rank for rank in self.tables if (ends.loc[rank, "low"] <= 0).all()]

    def states(self, margin: float) -> dict[int, bool | None]:
        """Return which ranks are good enough (True) and which are worse (False), step by step."""
        pairs = list(permutations(self.tables, 2))
        found = {pair: moments(self.contrast(*pair, margin), self.weight) for pair in pairs}
        apart = {pair: abs(math.log2(pair[0] / pair[1])) + 0.5 for pair in pairs}
        known = [pair for pair in pairs if found[pair].seeds > 1]
        free = [found[pair].seeds - 1 for pair in known]
        rate = np.average([found[pair].of_seeds * found[pair].seeds / apart[pair] for pair in known], weights=free)
        more = math.sqrt(len(self.tables) - 2) * np.mean(free)

        def bound(pair: tuple[int, int], share: float, sign: int) -> float:
            own = found[pair]
            if own.seeds < 2:
                return math.inf
            degrees = own.seeds - 1 + more
            variance = (more * rate * apart[pair] / own.seeds + (own.seeds - 1) * own.of_seeds) / degrees
            turned = own._replace(mean=sign * own.mean, third=sign * own.third)
            return sign * high(turned, variance, degrees, level_of(own.seeds, self.confidence) / share)

        states: dict[int, bool | None] = dict.fromkeys(self.tables)
        others = len(self.tables) - 1
        for _ in self.tables:
            open_ = [rank for rank, state in states.items() if state is None]
            among = min(max(1, len(open_)), others)
            worse = [rank for rank, state in states.items() if state is False]
            for rank in open_:
                beside = [pair for pair in pairs if pair[0] == rank]
                if all(bound(pair, among, 1) <= 0 for pair in beside if pair[1] not in worse):
                    states[rank] = True
                elif any(bound(pair, among * others, -1) > 0 for pair in beside if found[pair].seeds > 1):
                    states[rank] = False
        return states

    def best(self) -> int:
        """Return the rank whose largest mean difference to another is the least."""
        return int(self.ends(self.confidence)["mean"].groupby(level=0).max().idxmin())

    def trained_enough(self) -> bool:
        if self.untrained is None:
            return True
        gain, low, _ = self.interval(self.untrained - self.tables[self.best()], self.confidence)
        ends = self.ends(self.confidence)
        widths = (ends["high"] - ends["low"]) / 2
        return bool(low > 0 and gain >= 3 * widths[widths < math.inf].to_numpy().max(initial=0.0))

    def recommended(self, margin: float) -> int | None:
        good = [rank for rank, state in self.states(margin).items() if state]
        return min(good) if good and self.trained_enough() else None

    def kept(self, rank: int) -> float | None:
        """Return the share of the gain that a rank is shown to keep: one minus the smallest margin that it is within.

        It is full fine-tuning's gain where that is larger, whatever the other ranks do.
        """

        def within(margin: float) -> bool:
            if self.full is None:
                return self.states(margin)[rank] is True
            above = moments(self.tables[rank] - self.full - margin * (self.untrained - self.full), self.weight)
            level = level_of(above.seeds, self.confidence) / (len(self.tables) - 1)
            return high(above, above.of_seeds, above.seeds - 1, level) <= 0

        low, most = 0.0, self.spec["verdict"]["margin"]
        if not within(most):
            most = 1.0
        if not within(most):
            return None
        while most - low > 1e-5:
            middle = (low + most) / 2
            low, most = (low, middle) if within(middle) else (middle, most)
        return 1 - most


def recompute(study: Path) -> dict[str, Any]:
    """Return the expected content of verdict.json, under the same names."""
    judge = Judge(study)
    verdict, ranks = judge.spec["verdict"], list(judge.tables)
    fewest = min((len(table) for table in judge.tables.values()), default=0)
    by_task = verdict.get("by") != "loss" and judge.spec["measure"].get("task")
    rows_or_budget = len(judge.weight) < 2 or verdict["max_gpu_memory"] or verdict["max_runtime"]
    if len(ranks) < 2 or fewest < 2 or rows_or_budget or by_task:
        raise SystemExit(2)
    shown, states, best = judge.ends(judge.confidence), judge.states(verdict["margin"]), judge.best()
    found: dict[str, Any] = {
        "rank": judge.recommended(verdict["margin"]),
        "best": best,
        "trained_enough": judge.trained_enough(),
    }
    for rank in ranks:
        mean, half = analysis_of_variance(judge.tables[rank], judge.weight, judge.confidence, seeds_only=True)
        lows = [shown.loc[(rank, other), "low"] for other in judge.unbeaten(shown) if other != rank]
        found |= {
            f"{rank}.eval_loss": mean,
            f"{rank}.eval_loss_low": mean - half,
            f"{rank}.eval_loss_high": mean + half,
            f"{rank}.regret": max(0.0, shown.loc[rank, "mean"].max()),
            f"{rank}.regret_low": 0.0 if rank in judge.unbeaten(shown) else max(0.0, min(lows)),
            f"{rank}.regret_high": max(0.0, shown.loc[rank, "high"].max()),
            f"{rank}.within_margin": states[rank] if found["trained_enough"] else None,
        }
        if shown.loc[rank, "high"].max() == math.inf:
            found |= {f"{rank}.regret_low": None, f"{rank}.regret_high": None}
    if judge.untrained is not None:
        found |= gains(judge, best, {rank: found[f"{rank}.regret"] for rank in ranks})
    return found | claims(study, judge.examples, judge.confidence)


def gains(judge: Judge, best: int, regrets: dict[int, float]) -> dict[str, Any]:
    """Return the gain, what each rank keeps of it, and the rank that is enough at the usual margins."""
    assert judge.untrained is not None
    each = {rank: judge.interval(judge.untrained - table, judge.confidence) for rank, table in judge.tables.items()}
    found: dict[str, Any] = {f"{rank}.gain": gain for rank, (gain, _, _) in each.items()}
    found |= dict(zip(("gain", "gain_low", "gain_high"), each[best], strict=True))
    if judge.full is not None:
        found |= {"gain": np.average(judge.untrained - judge.full, weights=judge.weight)}
        found |= {"gain_low": None, "gain_high": None}
    if judge.trained_enough():
        for rank in judge.tables:
            gained = each[rank][0] if judge.full is not None else found["gain"] - regrets[rank]
            found |= {f"{rank}.kept": gained / found["gain"], f"{rank}.kept_low": judge.kept(rank)}
        found |= {f"at {margin}": judge.recommended(margin) for margin in (0.01, 0.02, 0.05, 0.1)}
    return found


def claims(study: Path, examples: pd.DataFrame, confidence: float) -> dict[str, Any]:
    """Return the effect of each measured claim, with its interval."""
    rows = []
    for rank, seed, folder in examples[["rank", "seed", "folder"]].drop_duplicates().itertuples(index=False):
        curve = pd.read_json(folder / "metrics.jsonl", lines=True)["train_loss"].dropna()
        rows.append({"pair": seed, "rank": rank, "loss_falls": curve.tail(max(1, len(curve) // 10)).mean()})
    by_rank = pd.DataFrame(rows).pivot(index="pair", columns="rank", values="loss_falls").dropna()
    found: dict[str, Any] = {}
    if not by_rank.empty:
        change = (by_rank.iloc[:, -1] - by_rank.iloc[:, 0]) / by_rank.iloc[:, 0].mean()
        found["loss_falls.effect"] = float(change.mean())
        if len(change) > 1:
            interval = stats.t.interval(confidence, len(change) - 1, change.mean(), stats.sem(change))
            found |= {"loss_falls.low": float(interval[0]), "loss_falls.high": float(interval[1])}
    return found | claims_on_memory(study, confidence) | claim_on_runtime(study, confidence)


def changed(claim: str, ratio: float, error: float, free: int, confidence: float) -> dict[str, float]:
    """Return a relative change and the ends of its interval, from a ratio and the standard error of its logarithm."""
    found = {f"{claim}.effect": ratio - 1}
    if free > 0:
        reach = np.exp(stats.t.ppf((1 + confidence) / 2, free) * error)
        found |= {f"{claim}.low": ratio / reach - 1, f"{claim}.high": ratio * reach - 1}
    return found


def claims_on_memory(study: Path, confidence: float) -> dict[str, Any]:
    """Return the effects of the claims on memory: the spread of repeats is that of all ranks and of the control."""
    profiles = [json.loads(file.read_text()) for file in sorted((study / "profiles").glob("*.json"))]
    repeats = [
        {"rank": one["candidate"]["rank"], "control": one["profile"] == "control", **repeat["summary"]}
        for one in profiles
        if one["candidate"]
        for repeat in one["repeats"]
    ]
    found: dict[str, Any] = {}
    for claim, column in COSTS.items() if repeats else ():
        table = pd.DataFrame(repeats).assign(value=lambda table, column=column: pd.to_numeric(table[column]))
        table = table.dropna(subset=["value"])
        if table.empty:
            continue
        by_rank = np.log(table["value"]).groupby(table["rank"])
        squares, free = (by_rank.var(ddof=0) * by_rank.count()).sum(), len(table) - by_rank.ngroups
        error = np.sqrt(squares / free * 2 / by_rank.count().min()) if free else np.nan
        means = table[~table["control"]].groupby("rank")["value"].mean()
        ratio = means.iloc[1 if "lowest" in claim else -1] / means.iloc[0]
        found |= changed(claim, float(ratio), float(error), free, confidence)
    return found


def claim_on_runtime(study: Path, confidence: float) -> dict[str, Any]:
    """Return the effect of the claim on runtime, from the ratios to the control."""
    file = study / "profiles" / "time.json"
    if not file.exists():
        return {}
    timed = {
        name: summary
        for session in json.loads(file.read_text())["repeats"]
        for name, summary in session["summaries"].items()
        if name != "control"
    }
    low, high = (pick(timed, key=lambda name: int(name[1:].partition("-")[0])) for pick in (min, max))
    errors = [summary["runtime_ratio_se"] for summary in timed.values() if summary["runtime_ratio_se"]]
    error, rounds = np.sqrt(np.mean(np.square(errors))), min(summary["rounds"] for summary in timed.values())
    ratio = timed[high]["runtime_ratio"] / timed[low]["runtime_ratio"]
    return changed("runtime_rises", ratio, float(error), rounds - 1, confidence)


def stored(study: Path) -> dict[str, Any]:
    """Return verdict.json under the names of `recompute`."""
    verdict = json.loads((study / "verdict.json").read_text())
    found: dict[str, Any] = {
        "rank": verdict["rank"] if verdict["outcome"] == "recommended" else None,
        "best": next(row["rank"] for row in verdict["comparison"] if row["candidate"] == verdict["best_candidate"]),
        "trained_enough": verdict["outcome"] != "not_trained_enough",
    }
    names = ["eval_loss", "eval_loss_low", "eval_loss_high", "regret", "regret_low", "regret_high", "within_margin"]
    if verdict["margin_of"] == "gain":
        names += ["gain"]
        found |= {name: verdict[name] for name in ("gain", "gain_low", "gain_high")}
        found |= {f"at {row['margin']}": row["rank"] for row in verdict["margins"]}
    for row in verdict["comparison"]:
        found |= {f"{row['rank']}.{name}": row[name] for name in names}
        found |= {f"{row['rank']}.{name}": row[name] for name in ("kept", "kept_low") if name in row}
    for claim in verdict["claims"]:
        bounds = {name: claim.get(name) for name in ("effect", "low", "high")}
        found |= {f"{claim['claim']}.{name}": value for name, value in bounds.items() if value is not None}
    return found


def differences(study: Path) -> Iterator[tuple[str, bool]]:
    """Yield a line for each number of verdict.json and of `recompute`, and whether they agree."""
    theirs, ours = stored(study), recompute(study)
    for name in theirs | ours:
        one, other = ours.get(name, "nothing"), theirs.get(name, "nothing")
        numbers = all(isinstance(value, int | float) and not isinstance(value, bool) for value in (one, other))
        tolerance = 1e-4 if name.endswith(".kept_low") else 1e-12
        same = bool(np.isclose(one, other, rtol=1e-9, atol=tolerance)) if numbers else one == other
        yield f"{'' if same else 'DIFFERS '}{name}: {one} here, {other} in verdict.json", same


def main() -> int:
    found = list(differences(Path(sys.argv[1])))
    differing = sum(not same for _, same in found)
    for line, _ in found:
        print(line)
    print(f"{len(found)} numbers, {differing} differ")
    return int(differing > 0)


if __name__ == "__main__":
    sys.exit(main())
