"""Recompute a study's verdict from its raw files with pandas and scipy alone, without rankscope's code.

    python benchmarks/recompute.py STUDY

Reads study.yaml, trials/*/eval.json, trials/*/metrics.jsonl and profiles/*.json, and compares with verdict.json: each
rank's held-out loss and regret with their intervals, which ranks are good enough and which are worse, the recommended
rank, and the effects of the four claims with their intervals. The exit code is 1 if they differ by more than 1e-9
(relative), and 2 if a study cannot be recomputed: it needs two ranks with two seeds, and no budget.
"""

import json
import sys
from itertools import permutations
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import yaml
from scipy import stats

COSTS = {
    "cpu_memory_lowest_then_flat": "rss_mean_bytes",
    "gpu_memory_rises": "gpu_allocated_mean_bytes",
    "runtime_rises": "runtime_seconds",
}


def finished_trials(study: Path) -> dict[Path, dict[str, Any]]:
    """Return the trial.json of each finished trial, by folder."""
    records = {file.parent: json.loads(file.read_text()) for file in sorted((study / "trials").glob("*/trial.json"))}
    return {folder: record for folder, record in records.items() if record["status"] == "done"}


def held_out(study: Path) -> pd.DataFrame:
    """Return one row per held-out example of each finished trial."""
    frames = []
    for folder, trial in finished_trials(study).items():
        examples = pd.DataFrame(json.loads((folder / "eval.json").read_text())["examples"])
        candidate = trial["candidate"]
        frames.append(
            examples.assign(rank=candidate["rank"], rate=candidate["learning_rate"], seed=trial["seed"], folder=folder)
        )
    return pd.concat(frames)


def with_most_seeds(examples: pd.DataFrame) -> pd.DataFrame:
    """Keep the candidates that finished the most seeds, on the seeds that all of them finished."""
    seeds = examples.groupby(["rank", "rate"])["seed"].agg(lambda found: frozenset(found))
    most = seeds[seeds.map(len) == seeds.map(len).max()]
    shared = frozenset.intersection(*most)
    pairs = pd.MultiIndex.from_frame(examples[["rank", "rate"]])
    return examples[pairs.isin(most.index) & examples["seed"].isin(shared).to_numpy()]


def judged(examples: pd.DataFrame) -> pd.DataFrame:
    """Keep each rank at its best rate; with several rates, chosen on the even examples and judged on the odd ones."""
    if examples["rate"].nunique() > 1:
        chosen = []
        for rank, part in examples[examples["example"] % 2 == 0].groupby("rank"):
            part = with_most_seeds(part)
            nats = (part["loss"] * part["label_tokens"]).groupby(part["rate"]).sum()
            chosen.append((rank, (nats / part.groupby("rate")["label_tokens"].sum()).idxmin()))
        pairs = pd.MultiIndex.from_frame(examples[["rank", "rate"]])
        examples = examples[pairs.isin(chosen) & (examples["example"] % 2 == 1).to_numpy()]
    return with_most_seeds(examples)


def analysis_of_variance(
    table: pd.DataFrame, weight: pd.Series, level: float, seeds_only: bool = False
) -> tuple[float, float]:
    """Return a seeds x examples table's mean weighted by label tokens, and its interval's half-width at `level`."""
    long = table.stack().rename("value").reset_index()
    long["w"] = long["example"].map(weight / weight.mean())
    mean = np.average(long["value"], weights=long["w"])
    long["part"] = long["w"] * (long["value"] - mean)
    seeds, examples = table.shape
    by_seed, by_example = long.groupby("seed")["part"].mean(), long.groupby("example")["part"].mean()
    fitted = long["seed"].map(by_seed) * long["w"] + long["example"].map(by_example)
    left = ((long["part"] - fitted) ** 2).sum() / ((seeds - 1) * (examples - 1))
    variances = np.array([examples * by_seed.var(), max(0.0, seeds * by_example.var() - left)]) / (seeds * examples)
    if seeds_only:
        variances[1] = 0.0
    if not variances.sum():
        return float(mean), 0.0
    t = stats.t.ppf(0.5 + level / 2, [seeds - 1, examples - 1])
    return float(mean), float(t @ variances / np.sqrt(variances.sum()))


def ends(tables: dict[int, pd.DataFrame], weight: pd.Series, level: float, factor: float) -> pd.DataFrame:
    """Return the interval of each rank's loss minus `factor` times every other's, by pair of ranks."""
    found = {
        pair: analysis_of_variance(tables[pair[0]] - factor * tables[pair[1]], weight, level)
        for pair in permutations(tables, 2)
    }
    frame = pd.DataFrame(found, index=["mean", "half"]).T
    return pd.DataFrame({"low": frame["mean"] - frame["half"], "high": frame["mean"] + frame["half"]})


def recompute(study: Path) -> dict[str, Any]:
    """Return the expected content of verdict.json, under the same names."""
    spec = yaml.safe_load((study / "study.yaml").read_text())
    confidence, factor = spec["verdict"]["confidence"], 1 + spec["verdict"]["margin"]
    examples = judged(held_out(study))
    weight = examples.groupby("example")["label_tokens"].first()
    tables = {
        int(rank): part.pivot(index="seed", columns="example", values="loss") for rank, part in examples.groupby("rank")
    }
    if len(tables) < 2 or examples["seed"].nunique() < 2 or spec["verdict"]["max_gpu_memory"]:
        raise SystemExit(2)
    loss = {rank: analysis_of_variance(table, weight, confidence, seeds_only=True) for rank, table in tables.items()}
    best, others = min(loss, key=lambda rank: loss[rank][0]), len(tables) - 1
    level_good, level_worse = max(confidence, 1 - 2 * (1 - confidence) / others), 1 - (1 - confidence) / others

    def first(frame: pd.DataFrame) -> list[int]:
        return [rank for rank in tables if (frame.loc[rank, "low"] <= 0).all()]

    shown, strict = ends(tables, weight, confidence, 1.0), ends(tables, weight, level_worse, 1.0)
    good, worse = ends(tables, weight, level_good, factor), ends(tables, weight, level_worse, factor)
    found: dict[str, Any] = {"rank": None}
    for rank in tables:
        mean, half = loss[rank]
        found |= {
            f"{rank}.eval_loss": mean,
            f"{rank}.eval_loss_low": mean - half,
            f"{rank}.eval_loss_high": mean + half,
        }
        found[f"{rank}.regret"] = float(np.average((tables[rank] - tables[best]).mean(), weights=weight))
        candidates = first(shown)
        lows = [shown.loc[(rank, other), "low"] for other in candidates if other != rank]
        found[f"{rank}.regret_low"] = 0.0 if rank in candidates else max(0.0, min(lows))
        found[f"{rank}.regret_high"] = max(0.0, shown.loc[rank, "high"].max())
        candidates = first(strict)
        lows = [worse.loc[(rank, other), "low"] for other in candidates if other != rank]
        state = False if rank not in candidates and min(lows) > 0 else None
        state = True if (good.loc[rank, "high"] <= 0).all() else state
        found[f"{rank}.within_margin"] = state
        if state and found["rank"] is None:
            found["rank"] = rank
    return found | claims(study, examples, confidence)


def claims(study: Path, examples: pd.DataFrame, confidence: float) -> dict[str, Any]:
    """Return the effect of each measured claim, with its interval."""
    rows = []
    for rank, seed, folder in examples[["rank", "seed", "folder"]].drop_duplicates().itertuples(index=False):
        curve = pd.read_json(folder / "metrics.jsonl", lines=True)["train_loss"].dropna()
        rows.append({"pair": seed, "rank": rank, "loss_falls": curve.tail(max(1, len(curve) // 10)).mean()})
    profiled = [json.loads(file.read_text()) for file in sorted((study / "profiles").glob("r*.json"))]
    costs = [
        {"pair": pair, "rank": profile["candidate"]["rank"], **repeat["summary"]}
        for profile in profiled
        for pair, repeat in enumerate(profile["repeats"])
    ]
    found: dict[str, Any] = {}
    frames = {"loss_falls": (pd.DataFrame(rows), "loss_falls")}
    if costs:
        frames |= {claim: (pd.DataFrame(costs), column) for claim, column in COSTS.items()}
    for claim, (frame, column) in frames.items():
        by_rank = frame.assign(value=pd.to_numeric(frame[column])).pivot(index="pair", columns="rank", values="value")
        by_rank = by_rank.dropna()
        if by_rank.empty:
            continue
        last = by_rank.iloc[:, 1] if "lowest" in claim else by_rank.iloc[:, -1]
        change = (last - by_rank.iloc[:, 0]) / by_rank.iloc[:, 0].mean()
        found[f"{claim}.effect"] = float(change.mean())
        if len(change) > 1:
            interval = stats.t.interval(confidence, len(change) - 1, change.mean(), stats.sem(change))
            found |= {f"{claim}.low": float(interval[0]), f"{claim}.high": float(interval[1])}
    return found


def stored(study: Path) -> dict[str, Any]:
    """Return verdict.json under the names of `recompute`."""
    verdict = json.loads((study / "verdict.json").read_text())
    found: dict[str, Any] = {"rank": verdict["rank"] if verdict["outcome"] == "recommended" else None}
    names = ("eval_loss", "eval_loss_low", "eval_loss_high", "regret", "regret_low", "regret_high", "within_margin")
    for row in verdict["comparison"]:
        found |= {f"{row['rank']}.{name}": row[name] for name in names}
    for claim in verdict["claims"]:
        bounds = {name: claim.get(name) for name in ("effect", "low", "high")}
        found |= {f"{claim['claim']}.{name}": value for name, value in bounds.items() if value is not None}
    return found


def main() -> int:
    study = Path(sys.argv[1])
    theirs, ours, differing = stored(study), recompute(study), 0
    for name in theirs | ours:
        one, other = ours.get(name, "nothing"), theirs.get(name, "nothing")
        numbers = all(isinstance(value, int | float) and not isinstance(value, bool) for value in (one, other))
        same = bool(np.isclose(one, other, rtol=1e-9, atol=1e-12)) if numbers else one == other
        differing += not same
        print(f"{'' if same else 'DIFFERS '}{name}: {one} here, {other} in verdict.json")
    print(f"{len(theirs | ours)} numbers, {differing} differ")
    return int(differing > 0)


if __name__ == "__main__":
    sys.exit(main())
