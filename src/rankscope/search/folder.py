"""A search's directory.

    NAME/
      search.yaml      the question, resolved and complete
      machine.json     hardware, versions, model
      data/            tokens.safetensors, facts.json (what every candidate reads)
      optuna.log       Optuna's journal: `optuna-dashboard NAME/optuna.log` shows it while the search runs, and after
      result.json      candidates, the best, those within the margin of it, what was spent
      adapters/        adapters of the candidates within the margin of the best, in PEFT's format
      confirm.yaml     a study that trains the best again, with several seeds
      job/             job.json, log.txt of the child process

Each file has one writer; the journal and what follows it are the child's.
"""

from pathlib import Path
from typing import Any, NamedTuple, Self

from pydantic import ValidationError

from rankscope.errors import StudyDirectoryError, StudyError
from rankscope.files import find_json, inside, is_free, refuse_links_out, write_json
from rankscope.search.space import SearchSpec
from rankscope.spec.resolve import write_yaml
from rankscope.study.question import differences_of, read_question, write_question


class Spent(NamedTuple):
    """Tokens and seconds that a search has used so far, over all its runs."""

    tokens: int = 0
    seconds: float = 0.0


class Search:
    """A search's directory. Opening reads search.yaml alone."""

    def __init__(self, path: Path, spec: SearchSpec) -> None:
        self.path, self.spec = path, spec

    @classmethod
    def create(cls, path: Path, spec: SearchSpec) -> Self:
        """Create the directory, or open it where it holds the same search; only the budget may differ. Raises
        StudyError: it holds another search, or something else; the message shows the difference."""
        if (path / "search.yaml").exists():
            old, new = (one.model_dump(mode="json", exclude={"budget"}) for one in (cls.open(path).spec, spec))
            if lines := "".join(f"\n  - {line}" for line in differences_of(old, new)):
                what = f"{path} holds another search:{lines}"
                raise StudyError(what, "Choose another --out, or run it with the values it has.")
        elif not is_free(path):
            raise StudyError(f"{path} exists and is not a search", "Choose another --out.")
        write_question(path / "search.yaml", write_yaml(spec))
        return cls(path, spec)

    @classmethod
    def open(cls, path: Path) -> Self:
        """Open an existing search. Raises StudyDirectoryError: there is none at `path`, or a symbolic link leads out of
        it; StudyError: its search.yaml is damaged."""
        file = path / "search.yaml"
        if not file.is_file():
            raise StudyDirectoryError(f"{path}: not a search (no search.yaml)", "Give the directory of a search.")
        refuse_links_out(path)
        try:
            return cls(path, SearchSpec.model_validate(read_question(file)))
        except ValidationError as error:
            raise StudyError(f"{file}: {error.errors()[0]['msg']}", "Begin anew with another --out.") from None

    def file(self, *parts: str) -> Path:
        return inside(self.path, *parts)

    def spent(self) -> Spent:
        spent = (self.result() or {}).get("spent", {})
        return Spent(*(spent[name] for name in Spent._fields if spent))

    def result(self) -> dict[str, Any] | None:
        """Return result.json (see `rankscope.search.sampling.summary`); None before the first candidate trains."""
        return find_json(self.file("result.json"))

    def write_result(self, result: dict[str, Any]) -> None:
        write_json(self.file("result.json"), {"schema": 1} | result)
