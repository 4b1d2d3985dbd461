"""Cache of tokens, shared by studies with the same rows, tokenizer and settings.

The cache is `$RANKSCOPE_CACHE/tokens/KEY/` (else `rankscope/tokens/KEY/` in `$XDG_CACHE_HOME`, or in `~/.cache`), each
entry a folder as `save` writes it. KEY is a hash of everything that determines the tokens, so an entry is never stale,
and the folder may be deleted at any time.
"""

import hashlib
import json
import logging
import os
from importlib.metadata import version
from pathlib import Path

from rankscope.data.conversations import Tokenizer, with_chat_template
from rankscope.data.readers import listed
from rankscope.data.records import Records, load_records
from rankscope.data.sources import resolve_sources
from rankscope.data.tokenize import tokenize, with_source_facts
from rankscope.data.tokens import TOKENS_VERSION, TokenizedData, load, save
from rankscope.errors import DataError, StudyDirectoryError
from rankscope.spec.models import DataSpec

_log = logging.getLogger(__name__)

# Fields of DataSpec that only determine the rows, which have a fingerprint. All other fields are part of the key.
_ROW_FIELDS = {
    "id", "config", "revision", "commits", "split", "format", "columns", "max_rows", "eval_dataset", "eval_split",
}  # fmt: skip


def prepare_cached(spec: DataSpec, tokenizer: Tokenizer, vocab_size: int) -> TokenizedData:
    """Tokens of a study, from the cache if possible. The rows are read and checked every time. `vocab_size` is the
    number of rows of the model's embedding. An entry that cannot be read is replaced; a cache that cannot be written is
    a warning. Raises DataError, ModelError: see `load_records` and `tokenize`."""
    with_chat_template(tokenizer, spec.chat_template)
    sources, of_eval = resolve_sources(spec)
    records = load_records(spec, sources)
    evaluated = load_records(spec.model_copy(update={"max_rows": None}), of_eval) if of_eval else None
    _check_columns(spec, records, evaluated)
    key = cache_key(records, spec, tokenizer, vocab_size, evaluated)
    folder = cache_folder("tokens")
    if key is None or folder is None:
        data = tokenize(records, spec, tokenizer, vocab_size, evaluated)
        return with_source_facts(data, records, evaluated)
    try:
        data = load(folder / key)
    except StudyDirectoryError:
        data = tokenize(records, spec, tokenizer, vocab_size, evaluated)
        try:
            save(data, folder / key)
        except OSError as error:
            _log.warning("the tokens are not cached: %s. Set RANKSCOPE_CACHE to a folder that can be written.", error)
    return with_source_facts(data, records, evaluated)


def _check_columns(spec: DataSpec, *read: Records | None) -> None:
    """Raise DataError where no source has the columns that the study names; of several, one may have others."""
    layouts = [layout for records in read if records for _, layout in records.parts]
    if spec.columns and not any({*layout.columns.values()} & {*spec.columns.values()} for layout in layouts):
        what = f"{spec.name}: no source has a column {listed(spec.columns.values())}, which data.columns names"
        raise DataError(what, "Correct data.columns (--columns OURS=THEIRS).")


def cache_key(
    records: Records, spec: DataSpec, tokenizer: Tokenizer, vocab_size: int, evaluated: Records | None = None
) -> str | None:
    """sha256, in hex, of everything that determines tokens and facts; None where that cannot be known. A hash of the
    vocabulary does not cover the code of a tokenizer written in Python, and a chat template that uses the current time
    writes another prompt tomorrow."""
    template = json.dumps(tokenizer.chat_template)
    if not tokenizer.is_fast or "strftime_now" in template:
        return None
    content = {
        "version": TOKENS_VERSION,
        "libraries": {name: version(name) for name in ("tokenizers", "transformers", "jinja2")},
        "rows": [[rows.format, rows.fingerprint] for rows in (records, evaluated) if rows],
        "spec": spec.model_dump(exclude=_ROW_FIELDS),
        "evaluated_on_request": bool(spec.eval_dataset or spec.eval_split),
        "tokenizer": [type(tokenizer).__name__, tokenizer.backend_tokenizer.to_str(), template],
        "special": {name: str(token) for name, token in tokenizer.special_tokens_map.items()},
        "split_special_tokens": tokenizer.split_special_tokens,
        "vocab_size": vocab_size,
    }
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def cache_folder(name: str) -> Path | None:
    """Folder of one kind of entries; None for a user without a home directory."""
    if own := os.environ.get("RANKSCOPE_CACHE"):
        return Path(own).expanduser() / name
    try:
        return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "rankscope" / name
    except RuntimeError:
        return None
