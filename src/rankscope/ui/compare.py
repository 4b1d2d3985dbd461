"""Several studies side by side."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rankscope.analysis.across import FEWEST_STUDIES, KEPT, Sufficient, common_rank, paired_differences, sufficient_rank
from rankscope.errors import StudyError
from rankscope.study.study import Study
from rankscope.text.formats import loss, percent, signed
from rankscope.ui.console import make_table, out_console


def compare_studies(paths: Sequence[Path]) -> dict[str, Any]:
    """Facts of the studies as plain data, for `--json`: `studies`, `pairs` (`paired_differences`), and `common`, the
    smallest rank that keeps 95% of the gain over all studies (null with fewer than ten). Raises StudyError: fewer than
    two studies, or one twice; StudyDirectoryError: a path holds no study, or one that cannot be read."""
    names = [str(path) for path in paths]
    if len({path.resolve() for path in paths}) < max(2, len(paths)):
        raise StudyError("compare needs at least two different studies", "Give the directories of finished studies.")
    studies = dict(zip(names, map(Study.open, paths), strict=True))
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
        **{name: verdict.get(name) for name in ("seeds", "gain", "outcome", "rank")},
        "sufficient_rank": _power(found.log2_rank if found else None),
        "sufficient_at_lowest": found.at_lowest if found else None,
        "shrunken_rank": _power(shrunken),
    }


def _power(log2_rank: float | None) -> float | None:
    return None if log2_rank is None else 2**log2_rank


def show_comparison(found: dict[str, Any]) -> None:
    """Print `compare_studies` as tables, and in sentences what the studies have in common."""
    shrunken = found["common"] is not None
    headers = ["study", "model", "data", "ranks", "seeds", "gain", "verdict", f"rank for {percent(found['kept'])}"]
    rows = [
        [
            study["study"],
            study["model"],
            study["data"],
            ", ".join(map(str, study["ranks"])),
            str(study["seeds"] or "–"),
            "–" if study["gain"] is None else loss(study["gain"]),
            f"rank {study['rank']}" if study["rank"] else str(study["outcome"] or "none yet").replace("_", " "),
            _rank(study["sufficient_rank"], study["sufficient_at_lowest"]),
            *([_rank(study["shrunken_rank"])] if shrunken else []),
        ]
        for study in found["studies"]
    ]
    out_console.print(make_table([*headers, *(["with the others"] if shrunken else [])], rows, left=(0, 1, 2, 6)))
    if found["pairs"]:
        out_console.print()
        pairs = [
            [
                str(pair["rank"]),
                pair["study"],
                loss(pair["loss"]),
                pair["other"],
                loss(pair["other_loss"]),
                signed(pair["difference"]),
                "–" if pair["low"] is None else f"{signed(pair['low'])} to {signed(pair['high'])}",
                str(pair["seeds"]),
            ]
            for pair in found["pairs"]
        ]
        titles = ["rank", "study", "held-out loss", "other study", "its loss", "difference", "95% interval", "seeds"]
        title = "Studies with the same tokens, paired by held-out row and seed:"
        out_console.print(make_table(titles, pairs, left=(1, 3), title=title))
    out_console.print()
    common, kept = found["common"], percent(found["kept"])
    if common is None:
        sentence = f"A rank that keeps {kept} of the gain in common is estimated from {FEWEST_STUDIES} studies on."
    else:
        sentence = (
            f"Over these studies the smallest rank that keeps {kept} of the gain is {_rank(common['rank'])} "
            f"(95% interval: {_rank(common['low'])} to {_rank(common['high'])}); in one more study it would lie "
            f"between {_rank(common['next_low'])} and {_rank(common['next_high'])}."
        )
    out_console.print(sentence, soft_wrap=True)


def _rank(rank: float | None, at_lowest: bool | None = False) -> str:
    return "–" if rank is None else f"{'at most ' if at_lowest else ''}{rank:.3g}"
