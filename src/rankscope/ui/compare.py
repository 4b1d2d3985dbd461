"""Several studies side by side."""

from collections.abc import Sequence
from typing import Any

from rankscope.analysis.across import FEWEST_STUDIES, KEPT, Sufficient, common_rank, paired_differences, sufficient_rank
from rankscope.errors import StudyError
from rankscope.study.study import Study
from rankscope.text.formats import Columns, loss, percent, signed, tabulate
from rankscope.ui.console import show


def compare_studies(named: Sequence[tuple[str, Study]]) -> dict[str, Any]:
    """Facts of the studies as plain data, for `--json`: `studies`, `pairs` (`paired_differences`), and `common`, the
    smallest rank that keeps 95% of the gain over all studies (null with fewer than ten). Raises StudyError: fewer than
    two studies, or one twice; StudyDirectoryError: one cannot be read."""
    if len({study.path.resolve() for _, study in named}) < max(2, len(named)):
        raise StudyError("compare needs at least two different studies", "Give the directories of finished studies.")
    studies = dict(named)
    evidence = {name: study.evidence() for name, study in studies.items()}
    found = {name: sufficient_rank(one) for name, one in evidence.items()}
    known = {name: rank for name, rank in found.items() if rank is not None}
    common = common_rank(list(known.values()))
    shrunken = dict(zip(known, common.shrunken, strict=True)) if common else {}
    rows = [_describe(name, study, found[name], shrunken.get(name)) for name, study in studies.items()]
    shared: dict[str, Any] | None = None
    if common is not None:
        ends = {name: _power(getattr(common, name)) for name in ("low", "high", "next_low", "next_high")}
        shared = {"rank": _power(common.log2_rank), **ends, "between_octaves": common.between}
    return {"kept": KEPT, "studies": rows, "pairs": paired_differences(evidence), "common": shared}


def _describe(name: str, study: Study, found: Sufficient | None, shrunken: float | None) -> dict[str, Any]:
    verdict = study.find_verdict() or {}
    return {
        "study": name,
        "model": study.spec.model.id,
        "data": study.spec.data.name,
        "ranks": sorted(study.spec.ranks),
        **{field: verdict.get(field) for field in ("seeds", "gain", "outcome", "rank")},
        "sufficient_rank": _power(found.log2_rank if found else None),
        "sufficient_at_lowest": found.at_lowest if found else None,
        "shrunken_rank": _power(shrunken),
    }


def _power(log2_rank: float | None) -> float | None:
    return None if log2_rank is None else 2**log2_rank


def show_comparison(found: dict[str, Any]) -> None:
    """Print `compare_studies` as tables, and in sentences what the studies have in common."""
    common, kept = found["common"], percent(found["kept"])
    columns: Columns = {
        "study": lambda row: row["study"],
        "model": lambda row: row["model"],
        "data": lambda row: row["data"],
        "ranks": lambda row: ", ".join(map(str, row["ranks"])),
        "seeds": lambda row: str(row["seeds"] or "–"),
        "gain": lambda row: "–" if row["gain"] is None else loss(row["gain"]),
        "verdict": lambda row: (
            f"rank {row['rank']}" if row["rank"] else (row["outcome"] or "none yet").replace("_", " ")
        ),
        f"rank for {kept}": lambda row: _rank(row["sufficient_rank"], row["sufficient_at_lowest"]),
    }
    columns |= {"with the others": lambda row: _rank(row["shrunken_rank"])} if common else {}
    show(tabulate("", columns, found["studies"], ["study", "model", "data", "verdict"]))
    pairs: Columns = {
        "rank": lambda pair: str(pair["rank"]),
        "study": lambda pair: pair["study"],
        "held-out loss": lambda pair: loss(pair["loss"]),
        "other study": lambda pair: pair["other"],
        "its loss": lambda pair: loss(pair["other_loss"]),
        "difference": lambda pair: signed(pair["difference"]),
        "95% interval": lambda pair: "–" if pair["low"] is None else f"{signed(pair['low'])} to {signed(pair['high'])}",
        "seeds": lambda pair: str(pair["seeds"]),
    }
    title = "Studies with the same tokens, paired by held-out row and seed:"
    if found["pairs"]:
        show("", tabulate(title, pairs, found["pairs"], ["study", "other study"]))
    sentence = f"A rank that keeps {kept} of the gain in common is estimated from {FEWEST_STUDIES} studies on."
    if common is not None:
        sentence = (
            f"Over these studies the smallest rank that keeps {kept} of the gain is {_rank(common['rank'])} "
            f"(95% interval: {_rank(common['low'])} to {_rank(common['high'])}); in one more study it would lie "
            f"between {_rank(common['next_low'])} and {_rank(common['next_high'])}."
        )
    show("", sentence)


def _rank(rank: float | None, at_lowest: bool | None = False) -> str:
    return "–" if rank is None else f"{'at most ' if at_lowest else ''}{rank:.3g}"
