"""Numbers and tables as people read them. Sizes are decimal (1 MB = 1e6 bytes), times are s, min or h."""

import math
import re
from collections.abc import Callable, Collection, Hashable, Iterable, Mapping, Sequence
from decimal import Decimal
from fractions import Fraction
from typing import TYPE_CHECKING, Any, NamedTuple, TypeAlias, TypeGuard

if TYPE_CHECKING:
    from rankscope.text.catalogue import Catalogue

MINUS = "\N{MINUS SIGN}"


class Unit(NamedTuple):
    """Unit of a chart's whole axis: values are divided by `factor`."""

    name: str
    factor: float


NUMBER = Unit("", 1.0)


class Table(NamedTuple):
    """Table of text cells; a line break in a cell separates a value from its interval."""

    caption: str
    headers: list[str]
    numeric: list[bool]  # by column: whether it is aligned as numbers
    rows: list[list[str]]
    chosen: int | None = None  # index of the row that the verdict chose


Columns: TypeAlias = dict[str, Callable[[Any], str]]  # a cell of each record, by header


def tabulate(
    caption: str, columns: Columns, records: Iterable[Any], words: Collection[str] = (), chosen: int | None = None
) -> Table:
    """Table with one row per record, and one column per header; those in `words` are aligned as text."""
    rows = [[cell(record) for cell in columns.values()] for record in records]
    return Table(caption, list(columns), [header not in words for header in columns], rows, chosen)


def first_of(names: Sequence[str], most: int, text: "Catalogue") -> str:
    """The first of these names, and how many more there are."""
    first, more = ", ".join(names[:most]), len(names) - most
    return text("more", names=first, n=f"{more:,}") if more > 0 else first


def known(value: float | None) -> TypeGuard[float]:
    return value is not None and math.isfinite(value)


def shown(value: Any, number: Callable[[Any], str], text: "Catalogue") -> str:
    """The value as `number` writes it, or the catalogue's sign for an unknown one."""
    unknown = value is None or (isinstance(value, float) and not math.isfinite(value))
    return text("none") if unknown else number(value)


def column(field: Hashable, number: Callable[[Any], str], text: "Catalogue") -> Callable[[Any], str]:
    """Column of a table: a field of each record as `shown` writes it."""
    return lambda record: shown(record[field], number, text)


def with_interval(field: str, number: Callable[[Any], str], text: "Catalogue") -> Callable[[Any], str]:
    """`column`, with the interval from the field's `…_low` to its `…_high` on a second line, where it is known."""
    cell = column(field, number, text)
    return lambda record: cell(record) + interval(record[f"{field}_low"], record[f"{field}_high"], number)


def interval(low: float | None, high: float | None, number: Callable[[float], str]) -> str:
    """Second line of a table's cell: `[0.1, 0.2]`; empty where an end is unknown."""
    return f"\n[{number(low)}, {number(high)}]" if known(low) and known(high) else ""


def size_unit(largest_bytes: float) -> Unit:
    return Unit("GB", 1e9) if largest_bytes >= 1e9 else Unit("MB", 1e6) if largest_bytes >= 1e6 else Unit("kB", 1e3)


def time_unit(largest_seconds: float, text: "Catalogue") -> Unit:
    """Seconds below two minutes, minutes below two hours, then hours."""
    if largest_seconds >= 7200:
        return Unit(text("unit.hours"), 3600.0)
    if largest_seconds >= 120:
        return Unit(text("unit.minutes"), 60.0)
    return Unit(text("unit.seconds"), 1.0)


def size(value_bytes: float) -> str:
    """`1.25 GB`, `38.4 MB`."""
    unit = size_unit(value_bytes)
    return f"{_three_digits(value_bytes / unit.factor)} {unit.name}"


def duration(seconds: float, text: "Catalogue") -> str:
    """`42.1 s`, `2 min 20 s`, `2 h 20 min`."""
    if seconds < 59.95:
        return text("unit.duration", value=_three_digits(seconds), unit=text("unit.seconds"))
    names, least = (("minutes", "seconds"), 1) if seconds < 3599.5 else (("hours", "minutes"), 60)
    parts = zip(divmod(round(seconds / least), 60), names, strict=True)
    return " ".join(text("unit.duration", value=f"{n:,}", unit=text(f"unit.{name}")) for n, name in parts if n)


def fixed(values: Iterable[float | None], unit: Unit = NUMBER) -> Callable[[float], str]:
    """Form of a column's numbers, all with as many decimals: the largest has at least three digits, the smallest two,
    where four decimals are enough for that."""
    found = [abs(value) / unit.factor for value in values if known(value) and value]
    wanted = [2 - math.floor(math.log10(max(found))), 1 - math.floor(math.log10(min(found)))] if found else []
    digits, name = min(4, max([0, *wanted])), unit.name and f" {unit.name}"
    return lambda value: f"{value / unit.factor:,.{digits}f}{name}".replace("-", MINUS)


def sizes(values: Iterable[float | None]) -> Callable[[float], str]:
    """Form of a column's sizes, all in one unit and with as many decimals."""
    found = [value for value in values if known(value)]
    return fixed(found, size_unit(max(found, default=0.0)))


def about(seconds: float, text: "Catalogue") -> str:
    """A forecast's duration, no finer than it is known, and never nothing: to 5 s, from two minutes on to 30 s."""
    step = next(step for limit, step in ((120, 5), (600, 30), (7200, 60), (math.inf, 600)) if seconds < limit)
    near = max(5, round(seconds / step) * step)
    return duration(near, text) if near >= 60 else text("unit.duration", value=near, unit=text("unit.seconds"))


def durations(values: Iterable[float | None], text: "Catalogue") -> Callable[[float], str]:
    """Form of a column's durations: those that are all below a minute have as many decimals."""
    found = [value for value in values if known(value)]
    number = fixed(found)
    if max(found, default=0.0) >= 59.95:
        return lambda seconds: duration(seconds, text)
    return lambda seconds: text("unit.duration", value=number(seconds), unit=text("unit.seconds"))


def share(value: float) -> str:
    """A share in a column, all of which have one decimal: `0.625` -> `62.5%`."""
    return f"{value:.1%}".replace("-", MINUS)


def percent(share: float) -> str:
    """`0.01` -> `1%`, `0.0025` -> `0.25%`."""
    return f"{MINUS if share < 0 else ''}{Decimal(f'{100 * abs(share):.3g}'):,f}%"


def at_least(share: float) -> str:
    """A lower bound in percent, rounded down: `0.99375` -> `99.3%`."""
    return f"{math.floor(share * 1000) / 10:.1f}%".replace("-", MINUS)


def two_digits(value: float) -> str:
    """The value to two significant digits, without an exponent: `140`, `3.0`, `0.42`."""
    return f"{Decimal(f'{value:.1e}'):,f}".replace("-", MINUS)


def signed_percent(share: float) -> str:
    """A change, to two significant digits: `0.0213` -> `+2.1%`."""
    return f"{'+' if share >= 0 else ''}{two_digits(100 * share)}%"


def change(new: float, old: float) -> str:
    """Relative change as `signed_percent`; `±0%` below a twentieth of a percent."""
    share = new / old - 1
    return "±0%" if abs(share) < 0.0005 else signed_percent(share)


def signed(value: float, digits: int = 4) -> str:
    """`+0.0031`, with a true minus sign for negatives."""
    return f"{value:+.{digits}f}".replace("-", MINUS)


def loss(value: float) -> str:
    return f"{value:.4f}".replace("-", MINUS)


def rate(value: float) -> str:
    """Learning rate as people write it: `2e-4`, `0.01`."""
    return f"{value:g}" if value >= 0.01 else f"{Decimal(str(value)).normalize():E}".lower()


def _three_digits(value: float) -> str:
    digits = 0 if value >= 99.95 else 1 if value >= 9.995 else 2
    return f"{value:,.{digits}f}"


BYTES = {"b": 1, "kb": 10**3, "mb": 10**6, "gb": 10**9, "tb": 10**12, "kib": 2**10, "mib": 2**20, "gib": 2**30}
SECONDS = {"s": 1, "min": 60, "h": 3600, "d": 86400}
FLOPS = {"flops": 1, "gflops": 10**9, "tflops": 10**12, "pflops": 10**15}


def parse_bytes(text: str | float) -> int:
    """Bytes of a size, at least one: `24GB` -> 24,000,000,000; `24GiB` counts in 1,024s; a bare number is bytes."""
    expected = "a size such as 24GB, 512MB or 16GiB"
    size = int(_parse(text, BYTES, "b", expected))
    if size < 1:
        raise ValueError(f"expected {expected}")
    return size


def parse_seconds(text: str | float) -> float:
    """Seconds of a time such as `90s`, `45min`, `2h`, `1.5d`; a bare number is seconds."""
    return float(_parse(text, SECONDS, "s", "a time such as 90s, 45min or 2h"))


def parse_share(text: str | float) -> float:
    """Share such as `2%` -> 0.02, or a bare number."""
    return float(_parse(text, {"%": Fraction(1, 100), "": 1}, "", "a share such as 2% or 0.02"))


def parse_flops(text: str | float) -> float:
    """Operations per second of a rate: `400TFLOPS` -> 4e14; also GFLOPS and PFLOPS, or a bare number."""
    return float(_parse(text, FLOPS, "flops", "a rate such as 400TFLOPS or 1.2PFLOPS"))


def _parse(text: str | float, units: Mapping[str, int | Fraction], bare: str, expected: str) -> Fraction:
    """Exact value of a number with a unit: as a float, 2.01GB would be a byte off. Raises ValueError with the form that
    was expected."""
    try:
        if isinstance(text, str):
            match = re.fullmatch(r"\s*([0-9]+(?:\.[0-9]+)?)\s*([A-Za-z]*|%)\s*", text)
            value = Fraction(match[1]) * units[match[2].lower() or bare] if match else Fraction(0)
        else:  # a number is taken as it is: YAML's 1e-5 for one
            value = Fraction(0 if isinstance(text, bool) else text)
        if float(value) > 0:
            return value
    except (KeyError, ValueError, OverflowError, TypeError):  # unknown unit, not finite, too many digits, or a list
        pass
    raise ValueError(f"expected {expected}")


_CONTROL_CHARACTERS = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]")


def strip_control_characters(text: str) -> str:
    """Text with U+FFFD for control characters, which a terminal obeys, and for those that reverse the text around them.
    Tabs and line breaks stay."""
    return _CONTROL_CHARACTERS.sub("\ufffd", text)
