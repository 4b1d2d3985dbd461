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

from rankscope.data.prompts import Tokenizer
from rankscope.data.records import Records, load_records
from rankscope.data.tokens import TOKENS_VERSION, TokenizedData, load, save, tokenize
from rankscope.errors import StudyDirectoryError
from rankscope.spec.models import DataSpec

_log = logging.getLogger(__name__)

_ROW_FIELDS = {"id", "config", "revision", "split", "format", "max_rows"}
"""Fields of DataSpec that only determine the rows, which have a fingerprint. All other fields are part of the key."""


def prepare_cached(spec: DataSpec, tokenizer: Tokenizer, vocab_size: int) -> TokenizedData:
    """Tokens of a study, from the cache if possible. The rows are read and checked every time.

    `vocab_size` is the number of rows of the model's embedding. An entry that cannot be read is replaced; a cache that
    cannot be written is a warning.

    Raises:
        DataError, ModelError: see `load_records` and `tokenize`.
    """
    records = load_records(spec)
    key = cache_key(records, spec, tokenizer, vocab_size)
    folder = _folder()
    if key is None or folder is None:
        return tokenize(records, spec, tokenizer, vocab_size)
    try:
        cached = load(folder / key)
    except StudyDirectoryError:
        data = tokenize(records, spec, tokenizer, vocab_size)
        try:
            save(data, folder / key)
        except OSError as error:
            _log.warning("the tokens are not cached: %s. Set RANKSCOPE_CACHE to a folder that can be written.", error)
        return data
    # Equal rows may have another source.
    return TokenizedData(cached.train, cached.eval, cached.facts | {"id": records.id, "revision": records.revision})


def cache_key(records: Records, spec: DataSpec, tokenizer: Tokenizer, vocab_size: int) -> str | None:
    """sha256, in hex, of everything that determines tokens and facts; None where that cannot be known.

    A hash of the vocabulary does not cover the code of a tokenizer written in Python, and a chat template that uses the
    current time writes another prompt tomorrow.
    """
    template = json.dumps(tokenizer.chat_template)
    if not tokenizer.is_fast or "strftime_now" in template:
        return None
    content = {
        "version": TOKENS_VERSION,
        "libraries": {name: version(name) for name in ("tokenizers", "transformers", "jinja2")},
        "rows": [records.format, records.fingerprint],
        "spec": spec.model_dump(exclude=_ROW_FIELDS),
        "tokenizer": [type(tokenizer).__name__, tokenizer.backend_tokenizer.to_str(), template],
        "special": {name: str(token) for name, token in tokenizer.special_tokens_map.items()},
        "split_special_tokens": tokenizer.split_special_tokens,
        "vocab_size": vocab_size,
    }
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _folder() -> Path | None:
    """Folder of the entries; None for a user without a home directory."""
    if own := os.environ.get("RANKSCOPE_CACHE"):
        return Path(own).expanduser() / "tokens"
    try:
        return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "rankscope" / "tokens"
    except RuntimeError:
        return None
