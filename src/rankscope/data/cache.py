"""Tokens made once: another study on the same rows, tokenizer and settings reads what the first one made.

The cache is `$RANKSCOPE_CACHE/tokens/KEY/` (else `rankscope/tokens/KEY/` in `$XDG_CACHE_HOME`, or in `~/.cache`), each
entry a folder as `save` writes it. KEY is a hash of all that decides the tokens, so an entry is never out of date, and
the folder may be deleted at any time.
"""

import hashlib
import json
import logging
import os
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING

from rankscope.data.records import Records, load_records
from rankscope.data.tokens import TOKENS_VERSION, TokenizedData, load, save, tokenize
from rankscope.errors import StudyDirectoryError
from rankscope.spec.models import DataSpec

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_log = logging.getLogger(__name__)

_DECIDE_ROWS = {"id", "config", "revision", "split", "format", "max_rows"}
"""Fields of DataSpec whose effect is in the records already. Any other, also one yet to come, is in the key."""


def prepare_cached(spec: DataSpec, tokenizer: "PreTrainedTokenizerBase", vocab_size: int) -> TokenizedData:
    """What `prepare` gives, from the cache where it can be. The rows are read and checked every time.

    An entry that cannot be read is made anew; a cache that cannot be written is a warning.

    Raises:
        DataError, ModelError: see `prepare`.
    """
    records = load_records(spec)
    key = cache_key(records, spec, tokenizer, vocab_size)
    folder = _folder()
    if key is None or folder is None:
        return tokenize(records, spec, tokenizer, vocab_size)
    try:
        found = load(folder / key)
    except StudyDirectoryError:
        data = tokenize(records, spec, tokenizer, vocab_size)
        try:
            save(data, folder / key)
        except OSError as error:
            _log.warning("the tokens are not cached: %s. Set RANKSCOPE_CACHE to a folder that can be written.", error)
        return data
    source = {"id": records.source.id, "revision": records.source.revision}  # equal rows may come from elsewhere
    return TokenizedData(found.train, found.eval, found.facts | source)


def cache_key(records: Records, spec: DataSpec, tokenizer: "PreTrainedTokenizerBase", vocab_size: int) -> str | None:
    """sha256, in hex, of all that decides the tokens and the facts; None where that cannot be known.

    A tokenizer written in Python is code, which no hash of its vocabulary covers; a chat template that asks for the
    time writes another prompt tomorrow.
    """
    template = json.dumps(tokenizer.chat_template)
    if not tokenizer.is_fast or "strftime_now" in template:
        return None
    content = {
        "version": TOKENS_VERSION,
        "libraries": {name: version(name) for name in ("tokenizers", "transformers", "jinja2")},
        "rows": [records.format, records.fingerprint],
        "spec": spec.model_dump(exclude=_DECIDE_ROWS),
        "tokenizer": [type(tokenizer).__name__, tokenizer.backend_tokenizer.to_str(), template],
        "special": {name: str(token) for name, token in tokenizer.special_tokens_map.items()},
        "split_special_tokens": tokenizer.split_special_tokens,
        "vocab_size": vocab_size,
    }
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _folder() -> Path | None:
    """Where entries are kept; None for a user without a home."""
    if own := os.environ.get("RANKSCOPE_CACHE"):
        return Path(own).expanduser() / "tokens"
    try:
        return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "rankscope" / "tokens"
    except RuntimeError:
        return None
