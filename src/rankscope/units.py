"""Sizes and times as people write them: `24GB`, `1.5GiB`, `90min`."""

import re

_BYTES = {"b": 1, "kb": 10**3, "mb": 10**6, "gb": 10**9, "tb": 10**12, "kib": 2**10, "mib": 2**20, "gib": 2**30}
_SECONDS = {"s": 1, "min": 60, "h": 3600, "d": 86400}


def parse_bytes(text: str | float) -> int:
    """`24GB` -> 24,000,000,000; `24GiB` counts in 1,024s; a bare number is bytes.

    Raises:
        ValueError: it is not a size; the message shows what is.
    """
    return int(_parse(text, _BYTES, "b", "a size such as 24GB, 512MB or 16GiB"))


def parse_seconds(text: str | float) -> float:
    """`90s`, `45min`, `2h`, `1.5d`; a bare number is seconds.

    Raises:
        ValueError: it is not a time; the message shows what is.
    """
    return _parse(text, _SECONDS, "s", "a time such as 90s, 45min or 2h")


def _parse(text: str | float, units: dict[str, int], bare: str, expected: str) -> float:
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z]*)\s*", str(text))
    unit = match and units.get(match[2].lower() or bare)
    if not match or not unit or float(match[1]) <= 0:
        raise ValueError(f"expected {expected}")
    return float(match[1]) * unit
