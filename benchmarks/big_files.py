"""Memory and time of preparing a large file: rows -> tokens, JSONL and Parquet.

    python benchmarks/big_files.py FOLDER                    2 GB of each kind, made in FOLDER, which is left there
    python benchmarks/big_files.py FOLDER --bytes 2e8 --row-bytes 200 --kinds jsonl

The rows are a prompt and a completion of random words, as many of each, of 30,000 words in all: too many for Snappy to
find again, so that the Parquet file is about as large as its text. It is written by pyarrow with its defaults: about a
million rows a row group. The tokenizer is a fast one whose tokens are words.

Every measurement is a process of its own that calls `prepare_cached`: for the first time, again (the tokens are in the
cache, the rows are read and checked), and with `max_rows=10` and an empty cache. Memory is the peak above what the
process has after importing and making the tokenizer: resident (VmHWM, with pages of mapped files, which the kernel can
drop), and anonymous (RssAnon, sampled). Tokens have 5 bytes: an id of 4 and whether it is a label.

The exit code is 1 if any resident peak is more than 500 MB above the tokens.
"""

import argparse
import json
import os
import random
import string
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

WORDS = 30_000
TARGET_BYTES = 500_000_000  # above the tokens
SAMPLE_SECONDS = 0.02


def words() -> list[str]:
    """Vocabulary: random words of 4 to 10 letters."""
    draw = random.Random(0)
    return list({"".join(draw.choices(string.ascii_lowercase, k=draw.randint(4, 10))): None for _ in range(WORDS)})


def rows(size: int, row_bytes: int) -> Iterator[dict[str, str]]:
    """Random rows of about `row_bytes` bytes of text, half to one and a half times that, `size` bytes in all."""
    draw, vocabulary, total = random.Random(1), words(), 0
    while total < size:
        count = max(2, int(row_bytes / 8 * draw.uniform(0.5, 1.5)))
        text = draw.choices(vocabulary, k=count)
        row = {"prompt": " ".join(text[: count // 2]) + "\n", "completion": " ".join(text[count // 2 :])}
        total += sum(map(len, row.values()))
        yield row


def make(path: Path, size: int, row_bytes: int) -> None:
    """Write the file, unless it is there."""
    if path.exists():
        return
    partial = path.with_suffix(".partial")
    if path.suffix == ".jsonl":
        with partial.open("w") as file:
            file.writelines(json.dumps(row) + "\n" for row in rows(size, row_bytes))
    else:
        import pyarrow as pa  # type: ignore[import-untyped]
        import pyarrow.parquet as pq  # type: ignore[import-untyped]

        made = rows(size, row_bytes)
        batches = iter(lambda: list(islice(made, 10_000)), [])
        pq.write_table(pa.Table.from_batches([pa.RecordBatch.from_pylist(batch) for batch in batches]), partial)
    partial.rename(path)


def prepare(path: Path, max_rows: int | None) -> None:
    """Prepare the file in this process; print when it begins, and what came of it."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    from rankscope.data.cache import prepare_cached
    from rankscope.spec.models import DataSpec

    ids = {word: number for number, word in enumerate(["</s>", "<unk>", *words()])}
    whole = Tokenizer(models.WordLevel(ids, unk_token="<unk>"))
    whole.pre_tokenizer = pre_tokenizers.WhitespaceSplit()  # type: ignore[assignment]
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=whole, eos_token="</s>", unk_token="<unk>")  # type: ignore[no-untyped-call]
    spec = DataSpec(id=str(path), max_rows=max_rows)
    print("ready", flush=True)
    sys.stdin.readline()
    start = time.perf_counter()
    data = prepare_cached(spec, tokenizer, len(ids))
    seconds = time.perf_counter() - start
    count = data.facts["rows_train"] + data.facts["rows_eval"]
    print(json.dumps({"seconds": seconds, "rows": count, "tokens": len(data.train.ids) + len(data.eval.ids)}))


def memory(process: int) -> dict[str, int]:
    """Bytes of `RssAnon`, `VmRSS` and `VmHWM` of a process; empty where it has ended."""
    lines = Path(f"/proc/{process}/status").read_text().splitlines()
    found = dict(line.split(":") for line in lines if line.startswith(("VmHWM", "VmRSS", "RssAnon")))
    return {name: int(value.split()[0]) * 1024 for name, value in found.items()}


def measure(path: Path, cache: Path, max_rows: int | None) -> dict[str, Any]:
    """Prepare the file in a process of its own."""
    command = [sys.executable, __file__, "--prepare", str(path), *(["--max-rows", str(max_rows)] if max_rows else [])]
    environment = os.environ | {"RANKSCOPE_CACHE": str(cache)}
    with subprocess.Popen(
        command, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdin
        assert process.stdout
        assert process.stdout.readline() == "ready\n"
        before = memory(process.pid)
        most = dict(before)
        process.stdin.write("go\n")
        process.stdin.flush()
        while process.poll() is None:
            for name, value in memory(process.pid).items():
                most[name] = max(most[name], value)
            time.sleep(SAMPLE_SECONDS)
        found: dict[str, Any] = json.loads(process.stdout.read())
    found["resident"] = most["VmHWM"] - before["VmRSS"]
    found["anonymous"] = most["RssAnon"] - before["RssAnon"]
    return found


def show(folder: Path, kinds: list[str], size: int, row_bytes: int) -> Iterator[str]:
    """Yield the table's lines, and the missed target."""
    yield "| file | size | measured | rows | s | tokens | peak, anonymous | peak, resident | above the tokens |"
    yield "|---|---:|---|---:|---:|---:|---:|---:|---:|"
    worst = 0
    for kind in kinds:
        path = folder / f"big-{size:.0f}-{row_bytes}.{kind}"
        make(path, size, row_bytes)
        with tempfile.TemporaryDirectory(dir=folder) as cache:
            for what, max_rows in (("max_rows=10", 10), ("first time", None), ("again", None)):
                found = measure(path, Path(cache), max_rows)
                tokens = 5 * found["tokens"]
                over = found["resident"] - tokens
                worst = max(worst, over)
                yield (
                    f"| {kind} | {path.stat().st_size / 1e9:.3g} GB | {what} | {found['rows']:,} | "
                    f"{found['seconds']:,.2f} | {tokens / 1e6:,.0f} MB | {found['anonymous'] / 1e6:,.0f} MB | "
                    f"{found['resident'] / 1e6:,.0f} MB | {over / 1e6:,.0f} MB |"
                )
    yield f"\nAt most {worst / 1e6:,.0f} MB above the tokens (target {TARGET_BYTES / 1e6:,.0f} MB)."
    if worst > TARGET_BYTES:
        yield "MISSED"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, nargs="?", help="where the files are made, or found from before")
    parser.add_argument("--bytes", type=float, default=2e9, help="text of each file")
    parser.add_argument("--row-bytes", type=int, default=1500, help="mean text of a row")
    parser.add_argument("--kinds", nargs="+", choices=["jsonl", "parquet"], default=["jsonl", "parquet"])
    parser.add_argument("--prepare", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--max-rows", type=int, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.prepare:
        prepare(arguments.prepare, arguments.max_rows)
        return
    arguments.folder.mkdir(parents=True, exist_ok=True)
    missed = False
    for line in show(arguments.folder, arguments.kinds, int(arguments.bytes), arguments.row_bytes):
        print(line, flush=True)
        missed |= line == "MISSED"
    sys.exit(missed)


if __name__ == "__main__":
    main()
