"""Training runs that other tools have written, as a table.

A folder with trainer_state.json and adapter_config.json (transformers' Trainer writes them, and with it TRL, Axolotl,
LLaMA-Factory and Unsloth; of several checkpoints the last counts), a CSV of W&B's run table, a result file of PEFT's
method_comparison, and the results.csv of a study's report. Only JSON, CSV and text is read, of regular files below the
given path. training_args.bin is a pickle and is never opened.
"""

import io
import json
import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from datetime import datetime
from pathlib import Path
from typing import Any, NamedTuple

import pandas as pd

from rankscope.errors import DataError, shortened
from rankscope.text.formats import size

STATE, CONFIG = "trainer_state.json", "adapter_config.json"
MAX_BYTES, MAX_RANK = 32_000_000, 1 << 20
RSLORA = "rsLoRA"
_FLAGS = ("diverged", "unfinished", "seed_in_name", "rate_logged")  # the last: the rate is the highest logged
_ROUNDED_TO = 4  # decimals of a loss as tools print it, which two runs may share by chance
Row = dict[str, Any]


class Skipped(NamedTuple):
    path: str
    reason: str


def read_runs(paths: Sequence[Path]) -> tuple[pd.DataFrame, list[Skipped]]:
    """Runs below `paths`, a row each: `run tool variant`, `_FLAGS` and `FIELDS`, None or NaN where nothing is recorded;
    and what was passed over. Raises DataError: there is no run."""
    rows, skipped, seen = list[Row](), list[Skipped](), set[Path]()
    for root in paths:
        for path, reader in _places(root):
            if path.resolve() in seen:
                continue
            seen.add(path.resolve())
            name = path.resolve().name if path == root else path.relative_to(root.parent if len(paths) > 1 else root)
            try:
                rows += [_with_seed({"run": str(name)} | row) for row in reader(path, root)]
            except (OSError, ValueError, RecursionError) as error:
                skipped.append(Skipped(str(path), shortened(" ".join(str(error).split()), 200)))
    if not rows:
        reasons = "".join(f"\n  {shortened(one.path, 200)}: {one.reason}" for one in skipped[:5])
        todo = f"Give folders with {STATE} and {CONFIG}, a CSV of W&B's run table, or PEFT's result files."
        raise DataError(f"no run of a LoRA adapter in {', '.join(map(str, paths[:3]))}{reasons}", todo)
    frame = pd.DataFrame(rows, columns=["run", "tool", "variant", *_FLAGS, *FIELDS], dtype=object)
    kinds = dict.fromkeys((name for name, (read, _) in FIELDS.items() if read is not _words), "float64")
    frame = frame.astype(kinds | {"rank": "int64"} | dict.fromkeys(_FLAGS, "bool"))
    again = frame.groupby("run").cumcount()
    frame["run"] = frame["run"].where(again == 0, frame["run"] + " #" + (again + 1).astype(str))
    frame["learning_rate"] = frame["learning_rate"].map(lambda rate: float(f"{rate:.6g}"))
    copied = _copies(frame)
    return frame[~copied], [*skipped, *(Skipped(run, "a copy of another run") for run in frame["run"][copied])]


def _copies(runs: pd.DataFrame) -> pd.Series:
    """Whether another run of the rank before has the same losses, and the same seed and rate too where the losses are
    rounded so far that chance makes some equal, or one is missing."""
    losses = runs[["train_loss", "eval_loss"]]
    exact = losses.notna().all(axis=1) & (losses != losses.round(_ROUNDED_TO)).any(axis=1)
    own = runs[["seed", "learning_rate"]].mask(exact)
    alike = runs[["rank"]].join([losses, own]).duplicated()
    return alike & runs["eval_loss"].notna() & ~runs["diverged"]


def _places(root: Path) -> Iterator[tuple[Path, Callable[[Path, Path], list[Row]]]]:
    """Files and folders that hold runs, with their readers. Links to folders are not followed."""
    readers = {".csv": _csv, ".tsv": _csv}
    if not root.is_dir():
        yield root, readers.get(root.suffix.lower(), _peft_result)
        return
    for file in sorted(one for one in root.rglob("*") if one.suffix in _BEGINNINGS):
        if file.name not in (STATE, CONFIG):
            try:
                with file.open("rb") if file.is_file() else io.BytesIO() as opened:
                    head = opened.read(4096)
            except OSError:
                head = None  # the reader says why
            if head is None or _BEGINNINGS[file.suffix].search(head):
                yield file, readers.get(file.suffix, _peft_result)
        elif not (file.parent.parent / "trial.json").exists():  # of a study, whose report has a table
            yield file.parent.parent if _step_of(file.parent) and file.parent != root else file.parent, _trainer


_BEGINNINGS = {
    ".csv": re.compile(rb'\A(?:[^\n]*[,."])?(?:r|rank|lora_r|lora_rank)[,"\r\n]', re.IGNORECASE),
    ".json": re.compile(rb'"run_info"'),
}
"""How a table, or a result of PEFT, begins: a folder may hold much else."""


def _step_of(folder: Path) -> int:
    """Step of `checkpoint-500`; 0 for any other folder."""
    return int(match[1]) if (match := re.fullmatch(r"checkpoint-(\d{1,12})", folder.name)) else 0


def _text(path: Path, root: Path) -> str:
    """Text of a regular file below `root`. Raises ValueError: it is none, too large, or not UTF-8."""
    try:
        if path != root and not path.resolve().is_relative_to(root.resolve()):
            raise ValueError(f"{path.name}: a symbolic link that leads out of {root}")
        if not path.is_file() or path.stat().st_size > MAX_BYTES:
            raise ValueError(f"{path.name}: not a regular file of at most {size(MAX_BYTES)}")
        return path.read_text(encoding="utf-8-sig")
    except (OSError, RuntimeError, UnicodeDecodeError) as error:  # RuntimeError: links in a circle
        raise ValueError(f"{path.name}: cannot be read: {getattr(error, 'strerror', None) or error}") from None


def _json(path: Path, root: Path) -> Row:
    text = _text(path, root)
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path.name}: not JSON: {error}") from None
    if not isinstance(value, dict):
        raise ValueError(f"{path.name}: expected an object, found {type(value).__name__}")
    return value


def _part(value: Row, key: str) -> Row:
    return found if isinstance(found := value.get(key), dict) else {}


def _number(value: Any) -> float | None:
    """A number or its text, which may be NaN or infinite."""
    try:
        return None if isinstance(value, bool) or not isinstance(value, int | float | str) else float(value)
    except (ValueError, OverflowError):
        return None


def _finite(value: Any) -> float | None:
    """A number of at least 0."""
    return number if (number := _number(value)) is not None and 0 <= number < math.inf else None


def _whole(value: Any) -> float | None:
    return number if (number := _finite(value)) is not None and number < 2**53 and number % 1 == 0 else None


def _words(value: Any) -> str | None:
    """A name, or the names of a list in alphabetical order: `q_proj, v_proj`."""
    if isinstance(value, str) and value.strip().startswith("["):  # a list in a cell
        value = re.findall(r"[^\[\]\s,'\"]+", value)
    if isinstance(value, list):
        value = ", ".join(sorted({one for one in value if isinstance(one, str)}))
    return shortened(value.strip(), 300) or None if isinstance(value, str) else None


def _date(value: Any) -> float | None:
    """Seconds since 1970 of an ISO date."""
    try:
        return datetime.fromisoformat(value).timestamp() if isinstance(value, str) else _finite(value)
    except (ValueError, OverflowError):
        return None


_PATH = "model_name_or_path"
FIELDS: dict[str, tuple[Callable[[Any], Any], str]] = {
    "rank": (_whole, "r, lora_r, lora_rank, rank"),
    "alpha": (_finite, "lora_alpha, alpha"),
    "base_model": (_words, f"model_id, base_model, base_{_PATH}, {_PATH}, model_name, _name_or_path"),
    "target_modules": (_words, "target_modules, lora_target_modules, lora_target"),
    "dropout": (_finite, "lora_dropout"),
    "learning_rate": (_finite, "learning_rate, lr"),
    "steps": (_whole, "train/global_step, global_step, step, steps"),
    "planned_steps": (_whole, "max_steps"),
    "epochs": (_finite, "train/epoch, epoch, num_train_epochs, num_epochs, epochs"),
    **{name: (_whole, name) for name in ("steps_an_epoch", "eval_rows", "seed", "eval_step")},
    "batch_size": (_whole, "total_train_batch_size, per_device_train_batch_size, micro_batch_size, batch_size"),
    "max_length": (_whole, "max_length, max_seq_length, sequence_len, cutoff_len"),
    "data": (_words, "datasets, dataset, dataset_name, dataset_id, data, train_file"),
    "eval_set": (_words, "eval_dataset, eval_dataset_name, eval_file"),
    "train_loss": (_number, "train/loss, loss, train_loss, train loss"),  # of a Trainer the mean of the last tenth
    "eval_loss": (_number, "eval/loss, eval_loss, val/loss, val_loss, validation/loss, validation_loss"),  # the last
    "best_loss": (_finite, "best_loss, eval/loss.min, eval_loss.min, best_eval_loss"),
    "untrained_loss": (_finite, "untrained_loss"),  # evaluated before the first step
    "score": (_finite, "test accuracy"),  # share of right answers
    "memory_gib": (_finite, "memory_gib, train/memory/max_allocated (gib), memory/max_allocated (gib)"),
    "seconds": (_finite, "train/train_runtime, train_runtime, train_time, runtime"),
    "time": (_date, "time, created, created_at"),
}
"""How each column is read, and the names that tools have for it, the first that has a value."""


def _run(tool: str, values: Mapping[str, Any]) -> Row:
    """A row of the table. Raises ValueError: the run is none of LoRA with a rank."""
    prefix = re.compile(r"^(config|summary)\.|^peft_config[./][^./]+[./]")  # W&B's
    plain = {prefix.sub("", str(key).strip().lower()): one for key, one in values.items() if one not in ("", None)}
    row = {
        field: next((found for name in names.split(", ") if (found := read(plain.get(name))) is not None), None)
        for field, (read, names) in FIELDS.items()
    }
    if (kind := plain.get("peft_type", "LORA")) != "LORA":
        raise ValueError(f"peft_type is {shortened(repr(kind))}, not LORA")
    if not row["rank"] or row["rank"] > MAX_RANK:
        raise ValueError(f"no rank from 1 to {MAX_RANK:,}")
    start, words = plain.get("init_lora_weights"), {"use_rslora": RSLORA, "use_dora": "DoRA"}
    parts = [word for key, word in words.items() if str(plain.get(key)).lower() == "true"]
    parts += [start] if isinstance(start, str) and start.lower() != "true" else []
    patterns = {key: plain.get(key) for key in ("rank_pattern", "alpha_pattern")}
    parts += [f"{key} {one}" for key, one in patterns.items() if one not in (None, {}, "{}")]
    if row["batch_size"] and "total_train_batch_size" not in plain:
        row["batch_size"] *= _whole(plain.get("gradient_accumulation_steps")) or 1
    losses = [loss for loss in (row["train_loss"], row["eval_loss"]) if loss is not None]
    variant = shortened(" + ".join(parts), 300) or "LoRA"
    steps, planned = row["steps"], row["planned_steps"]
    flags = {"unfinished": steps is not None and steps < (planned or 0), "rate_logged": False}
    return row | {"tool": tool, "variant": variant, "diverged": not all(map(math.isfinite, losses)), **flags}


def _trainer(folder: Path, root: Path) -> list[Row]:
    """The run of a Trainer's folder, by its last state: a checkpoint has it where the end was not saved."""
    places = sorted((one for one in folder.iterdir() if _step_of(one) and not one.is_symlink()), key=_step_of)
    places = [folder, *reversed(places)]
    states = [(one, _json(one / STATE, root)) for one in [one for one in places if (one / STATE).exists()][:2]]
    if not states:
        raise ValueError(f"no {STATE}: how it was trained is not recorded")
    at, state = max(states, key=lambda pair: _whole(pair[1].get("global_step")) or 0)
    configs = [one / CONFIG for one in (at, *places) if (one / CONFIG).exists()]
    if not configs:
        raise ValueError(f"no {CONFIG}: full fine-tuning, or its adapter was not saved")
    history, steps, epoch = state.get("log_history"), _whole(state.get("global_step")), _finite(state.get("epoch"))
    logs = [row for row in history if isinstance(row, dict)] if isinstance(history, list) else []
    values: Row = {key: state.get(key) for key in ("global_step", "max_steps", "epoch")}
    for key in ("learning_rate", "train_runtime", "memory/max_allocated (GiB)"):  # the last is Axolotl's
        values[key] = max(filter(None, (_finite(row.get(key)) for row in logs)), default=None)
    losses = [(_whole(row.get("step")) or 0, loss) for row in logs if (loss := _number(row.get("loss"))) is not None]
    late = [loss for step, loss in losses if step > 0.9 * (steps or 0)] or [loss for _, loss in losses[-1:]]
    starts = [re.search(r"tfevents\.(\d{10})\.", one.name) for one in folder.glob("runs/*/events.out.tfevents.*")]
    values |= _evaluations(logs) | {
        "batch_size": state.get("train_batch_size"),
        "loss": sum(late) / len(late) if late else None,
        "steps_an_epoch": round(steps / epoch) if steps and epoch else None,
        "time": max((float(one[1]) for one in starts if one), default=(at / STATE).stat().st_mtime),
    }
    cards = (_text(one / "README.md", root) for one in (folder, at) if (one / "README.md").exists())
    card = _card(next(cards, ""))
    row = _run("Trainer", _json(configs[0], root) | values | card)
    return [row | {"rate_logged": "learning_rate" not in card and row["learning_rate"] is not None}]


def _evaluations(logs: Sequence[Row]) -> Row:
    """Losses of a Trainer's evaluations. Of several at one step the first: later ones are of a model loaded again."""
    keys = {str(key) for row in logs for key in row if re.fullmatch(r"eval(_.*)?_loss", str(key))}
    key = "eval_loss" if "eval_loss" in keys else min(keys, default="eval_loss")
    rows = {_whole(row.get("step")) or 0: row for row in reversed(logs) if _number(row.get(key)) is not None}
    losses = {step: _number(row[key]) for step, row in rows.items()}
    if not any(losses):
        return {}
    last, name = max(losses), key.removesuffix("_loss")
    finite = [loss for step, one in losses.items() if step and (loss := _finite(one)) is not None]
    speed, seconds = (_finite(rows[last].get(f"{name}_{what}")) for what in ("samples_per_second", "runtime"))
    return {
        "eval_loss": losses[last], "eval_step": last, "eval_dataset": name.removeprefix("eval").removeprefix("_"),
        "eval_rows": round(speed * seconds) if speed and seconds else None,
        "best_loss": min(finite, default=None), "untrained_loss": losses.get(0),
    }  # fmt: skip


def _card(text: str) -> Row:
    """What a model card that Trainer wrote says of the run; empty for any other."""
    front = text.split("---\n", 2)[1] if text.startswith("---\n") and text.count("---\n") > 1 else ""
    listed = re.search(r"^datasets:(?: *(\S+)\n|\n((?:- .+\n)+))", front, re.MULTILINE)
    listing = text.partition("hyperparameters were used during training:\n")[2]
    found = dict(re.findall(r"^- (learning_rate|seed|\w*train_batch_size): (.{1,99})$", listing, re.MULTILINE))
    found |= {"total_train_batch_size": found.get("total_train_batch_size", found.get("train_batch_size", ""))}
    return found | ({"datasets": re.findall(r"[^\s'\"-][^\s'\"]*", listed[1] or listed[2])} if listed else {})


def _with_seed(row: Row) -> Row:
    """A run with the seed that its name has, `r8-seed1`, `seed_2/r8` or `r8-s0`, where none is recorded."""
    found = re.findall(r"(?:^|[-_/. ])(?:seed|s)[-_=]?(\d{1,9})(?=$|[-_/. ])", row["run"].lower())
    named = row["seed"] is None and bool(found)
    return row | {"seed": int(found[-1]) if named else row["seed"], "seed_in_name": named}


def _csv(path: Path, root: Path) -> list[Row]:
    """Runs of W&B's run table. A row without a rank is of something else, and is left out."""
    text, separator = _text(path, root), "\t" if path.suffix.lower() == ".tsv" else ","
    try:
        table: Any = pd.read_csv(io.StringIO(text), sep=separator, dtype=str, keep_default_na=False, index_col=False)
    except (ValueError, OverflowError) as error:
        raise ValueError(f"{path.name}: not CSV: {error}") from None
    rows = []
    for cells in table.to_dict("records"):
        with suppress(ValueError):
            row = _run("rankscope" if "trial" in cells else "W&B", cells)
            row["unfinished"] |= cells.get("State", "finished") != "finished"
            row["diverged"] |= cells.get("status") == "diverged"  # in results.csv, which has no loss then
            rows.append(row | {"run": shortened(cells.get("Name") or cells.get("trial") or path.stem)})
    if not rows:
        what = f"no row with a rank in a column {FIELDS['rank'][1].replace(', ', ' or ')}"
        raise ValueError(f"{path.name}: {what}: show it in the run table and export again")
    return rows


def _peft_result(path: Path, root: Path) -> list[Row]:
    """The run of a result file of PEFT's method_comparison, as `log_results` in its MetaMathQA/utils.py writes it."""
    value = _json(path, root)
    about, train = _part(value, "run_info"), _part(value, "train_info")
    asked, config, metrics = _part(about, "train_config"), _part(about, "peft_config"), train.get("metrics")
    data = _part(_part(value, "meta_info"), "dataset_info")
    if not asked or not config or train.get("status") != "success":
        needs = "run_info.train_config, run_info.peft_config and train_info.status: success"
        raise ValueError(f"{path.name}: no result of LoRA of PEFT's method_comparison: it needs {needs}")
    rows = [row for row in metrics if isinstance(row, dict)] if isinstance(metrics, list) else []
    memory = _number(train.get("accelerator_memory_max", train.get("cuda_memory_max")))
    values = config | asked | (rows[-1] if rows else {}) | {
        "learning_rate": _part(asked, "optimizer_kwargs").get("lr"), "memory_gib": memory and memory / 2**30,
        "dataset": [f"{name}@{str(_part(data, name).get('sha'))[:8]}" for name in data],
        "train_time": train.get("train_time"), "created": about.get("created_at"),
    }  # fmt: skip
    return [_run("PEFT", values) | {"run": shortened(str(about.get("experiment_name") or path.stem))}]
