"""Several studies side by side."""

from collections.abc import Sequence
from operator import itemgetter
from typing import Any

from rankscope.analysis.across import FEWEST_STUDIES, KEPT, Sufficient, common_rank, paired_differences, sufficient_rank
from rankscope.errors import StudyError
from rankscope.report.tables import base_names
from rankscope.study.study import Study
from rankscope.text.catalogue import Catalogue
from rankscope.text.formats import Columns, column, loss, percent, shown, signed, tabulate
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
    verdict = study.find_verdict()
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


def show_comparison(found: dict[str, Any], text: Catalogue) -> None:
    """Print `compare_studies` as tables, and in sentences what the studies have in common."""
    common, kept = found["common"], percent(found["kept"])

    def title(name: str) -> str:
        return text(f"compare.{name}")

    def rank(value: float | None, at_lowest: bool | None = False) -> str:
        number = shown(value, "{:.3g}".format, text)
        return text("compare.at_most", rank=number) if at_lowest else number

    words: Columns = {
        title("study"): itemgetter("study"),
        title("model"): lambda row: base_names(row["model"]),
        title("data"): lambda row: base_names(row["data"]),
    }
    columns = words | {
        title("ranks"): lambda row: ", ".join(map(str, row["ranks"])),
        title("seeds"): column("seeds", str, text),
        title("gain"): column("gain", loss, text),
        title("verdict"): lambda row: (
            text("name.rank", rank=row["rank"]) if row["rank"] else text(f"outcome.{row['outcome'] or 'none'}")
        ),
        text("compare.rank_for", kept=kept): lambda row: rank(row["sufficient_rank"], row["sufficient_at_lowest"]),
    }
    columns |= {title("with_others"): lambda row: rank(row["shrunken_rank"])} if common else {}
    show(tabulate("", columns, found["studies"], [*words, title("verdict")]))
    pairs: Columns = {
        title("rank"): lambda pair: str(pair["rank"]),
        title("study"): lambda pair: pair["study"],
        title("loss"): lambda pair: loss(pair["loss"]),
        title("other"): lambda pair: pair["other"],
        title("other_loss"): lambda pair: loss(pair["other_loss"]),
        title("difference"): lambda pair: signed(pair["difference"]),
        title("interval"): lambda pair: (
            text("none") if pair["low"] is None else text("range", low=signed(pair["low"]), high=signed(pair["high"]))
        ),
        title("seeds"): lambda pair: str(pair["seeds"]),
    }
    if found["pairs"]:
        show("", tabulate(title("paired"), pairs, found["pairs"], [title("study"), title("other")]))
    ends = {name: rank(value) for name, value in common.items() if name != "between_octaves"} if common else {}
    show("", text("compare.common" if common else "compare.few", kept=kept, n=FEWEST_STUDIES, **ends))
