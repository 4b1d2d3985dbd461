"""Every visible string of the report, one YAML file per language. Imports nothing heavy."""

from collections.abc import Mapping
from functools import cache
from importlib import resources
from typing import Any

import yaml

from rankscope.errors import StudyError

LANGUAGES = ("en", "ko")


class Catalogue:
    """Strings of one language: `text("chart.value", rank=8, value="1.2")`."""

    def __init__(self, language: str, texts: dict[str, str]) -> None:
        self.language, self._texts = language, texts

    def __call__(self, key: str, **values: object) -> str:
        return self._texts[key].format(**values)

    def get(self, key: str, default: str) -> str:
        """The string, or `default` for a key that no catalogue can know, such as a field of the data."""
        return self._texts.get(key, default)

    def count(self, key: str, number: int) -> str:
        """`3 seeds` or `1 seed`."""
        return self(f"count.{key}_one") if number == 1 else self(f"count.{key}_many", n=f"{number:,}")


@cache
def load(language: str) -> Catalogue:
    """Read the catalogue of a language. Raises StudyError: the language has no catalogue."""
    if language not in LANGUAGES:
        raise StudyError(f"no report language {language!r}", f"Choose one of: {', '.join(LANGUAGES)}.")
    file = resources.files("rankscope.text") / "languages" / f"{language}.yaml"
    return Catalogue(language, flatten(yaml.safe_load(file.read_text(encoding="utf-8"))))


def flatten(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Flat mapping with dotted keys, in order: `{"training": {"steps": 200}}` -> `{"training.steps": 200}`."""
    flat: dict[str, Any] = {}
    for key, value in values.items():
        flat |= flatten(value, f"{prefix}{key}.") if isinstance(value, Mapping) else {f"{prefix}{key}": value}
    return flat
