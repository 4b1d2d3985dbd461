"""Sizes, times and speeds as people write them: `24GB`, `1.5GiB`, `90min`, `400TFLOPS`."""

import re
from fractions import Fraction

BYTES = {"b": 1, "kb": 10**3, "mb": 10**6, "gb": 10**9, "tb": 10**12, "kib": 2**10, "mib": 2**20, "gib": 2**30}
SECONDS = {"s": 1, "min": 60, "h": 3600, "d": 86400}
FLOPS = {"flops": 1, "gflops": 10**9, "tflops": 10**12, "pflops": 10**15}


def parse_bytes(text: str | float) -> int:
    """`24GB` -> 24,000,000,000; `24GiB` counts in 1,024s; a bare number is bytes.

    Raises:
        ValueError: it is not a size of a byte or more; the message shows what is.
    """
    expected = "a size such as 24GB, 512MB or 16GiB"
    size = int(_parse(text, BYTES, "b", expected))
    if size < 1:
        raise ValueError(f"expected {expected}")
    return size


def parse_seconds(text: str | float) -> float:
    """`90s`, `45min`, `2h`, `1.5d`; a bare number is seconds.

    Raises:
        ValueError: it is not a time; the message shows what is.
    """
    return float(_parse(text, SECONDS, "s", "a time such as 90s, 45min or 2h"))


def parse_flops(text: str | float) -> float:
    """`400TFLOPS` -> 4e14 operations a second; also GFLOPS and PFLOPS; a bare number is operations a second.

    Raises:
        ValueError: it is not a rate; the message shows what is.
    """
    return float(_parse(text, FLOPS, "flops", "a rate such as 400TFLOPS or 1.2PFLOPS"))


def _parse(text: str | float, units: dict[str, int], bare: str, expected: str) -> Fraction:
    """Exactly: as a float, 2.01GB would be a byte off."""
    try:
        if isinstance(text, str):
            match = re.fullmatch(r"\s*([0-9]+(?:\.[0-9]+)?)\s*([A-Za-z]*)\s*", text)
            value = Fraction(match[1]) * units[match[2].lower() or bare] if match else Fraction(0)
        else:  # a number is taken as it is: YAML's 1e-5 for one
            value = Fraction(0 if isinstance(text, bool) else text)
        if float(value) > 0:
            return value
    except (KeyError, ValueError, OverflowError, TypeError):  # no such unit, not finite, too many digits, or a list
        pass
    raise ValueError(f"expected {expected}")
