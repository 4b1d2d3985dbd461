"""What adapters reach of a model, in sentences."""

from collections.abc import Iterable, Mapping
from typing import Any

from rankscope.text.catalogue import Catalogue
from rankscope.text.formats import percent


def coverage_sentences(coverage: Mapping[str, Any] | None, ranks: Iterable[int], text: Catalogue) -> list[str]:
    """Sentences about `coverage` (`rankscope.lora.coverage.Coverage` as prediction.json has it); none without it."""
    if not coverage:
        return []
    modules, full_rank = coverage["modules"], coverage["full_rank"]
    shares = {name: percent(coverage[name]) for name in ("parameters", "flops")}
    found = [text("coverage.adapted", modules=f"{sum(modules.values()):,}", names=", ".join(modules), **shares)]
    parts = [
        text("coverage.part", names=", ".join(names), reason=text(f"coverage.reason.{reason}"))
        for reason, names in coverage["left_out"].items()
    ]
    if parts:
        found.append(text("coverage.left_out", parts="; ".join(parts)))
    if coverage["whole"]:
        found.append(text("coverage.whole", names=", ".join(coverage["whole"])))
    highest = max(ranks)
    for rank in sorted({value for value in full_rank.values() if value <= highest}):
        names = ", ".join(name for name, value in full_rank.items() if value == rank)
        found.append(text("coverage.full_rank", rank=f"{rank:,}", names=names))
    return [*found, text("coverage.tied")] if coverage["tied"] else found
