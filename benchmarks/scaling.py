"""Growth of the cost of a pack's training step with adapters, tokens, rank and model size.

    python benchmarks/scaling.py --threads 2 --out docs/results

Four sweeps around one base point (a trial of rank 8 on 2,048 tokens a step, all linear layers); a point that two
sweeps share is measured once. Every measurement is a fresh process that loads the model, adds the adapters and takes
one uncounted step and then `--steps` timed ones; each repeat goes through all points before the next begins.

- data: random token ids in rows of 128, the second half of each row labels
- seconds a step: forward, backward, clipping and AdamW of the whole pack; median over steps, then over repeats
- peak memory: the process's high-water mark of resident memory (VmHWM, Linux), libraries and loading included; on a
  GPU the allocator's peak of allocated bytes. Median over repeats; 1 MB is 1e6 bytes
- model sizes: OPT-shaped models with random weights, made in a temporary folder; the largest has opt-350m's shape

A law is a + b x with a, b >= 0 (no cost is negative), fitted to the points' medians by least squares on relative
errors, the sum of ((a + b x - y) / y)^2, so that small points count as much as large ones. It is given with the largest
relative deviation of a point. A step is divided into forwards of a limited number of tokens, so the memory of the
tokens' sweep is fitted against the tokens of its largest forward.
"""

import argparse
import json
import os
import shlex
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from rankscope.data.tokens import Example, Tokens
from rankscope.measure.cores import ENVIRONMENT
from rankscope.measure.machine import hardware, versions
from rankscope.measure.sampler import peak_rss
from rankscope.model.load import load_model
from rankscope.spec.options import assemble
from rankscope.train.loop import choose_engine
from rankscope.train.step import make_train_state, train_step

ROW = 128
"""Tokens in a sequence."""
SHAPES = ((128, 2, 8192), (256, 4, 8192), (384, 8, 8192), (640, 10, 8192), (768, 16, 8192), (1024, 24, 50272))
"""Hidden size, layers and vocabulary: 1 to 331 million parameters."""


class Point(NamedTuple):
    """One process's measurement point. `model` is `embedded` or a folder; tokens are those of one trial's step."""

    model: str
    adapters: int = 1
    tokens: int = 2048
    rank: int = 8


class Cost(NamedTuple):
    """Cost measured by one process."""

    step_seconds: list[float]
    peak_bytes: int
    parameters: int  # of the base
    trainable_params: int  # of all adapters
    forward_tokens: int  # of the largest forward
    engine: str
    device: str  # cpu, or the GPU's name

    @property
    def seconds(self) -> float:
        return statistics.median(self.step_seconds)

    @property
    def megabytes(self) -> float:
        return self.peak_bytes / 1e6


class Sweep(NamedTuple):
    """One varied quantity; its laws are per `per` units of it."""

    name: str
    title: str
    axis: str
    unit: str
    per: float
    points: list[Point]


class Row(NamedTuple):
    """A point of a sweep: its place on the axis, and a cost for each repeat."""

    x: float
    point: Point
    costs: list[Cost]

    @property
    def seconds(self) -> float:
        return statistics.median(cost.seconds for cost in self.costs)

    @property
    def megabytes(self) -> float:
        return statistics.median(cost.megabytes for cost in self.costs)

    @property
    def tokens_per_second(self) -> float:
        return self.point.adapters * self.point.tokens / self.seconds

    @property
    def spread(self) -> float:
        """Spread of the time: (slowest - fastest repeat) / median."""
        return float(np.ptp([cost.seconds for cost in self.costs])) / self.seconds


class Law(NamedTuple):
    """Fitted law: intercept + slope * x, level above `limit`."""

    text: str
    intercept: float
    slope: float
    limit: float | None
    largest_deviation: float  # relative, of a point

    def __call__(self, x: float) -> float:
        return self.intercept + self.slope * min(x, self.limit or x)


class Result(NamedTuple):
    """A sweep's measurements, and the laws of `seconds` and `megabytes` by its axis."""

    sweep: Sweep
    rows: list[Row]
    laws: dict[str, Law]


def sweeps(model: str, sizes: Sequence[str]) -> list[Sweep]:
    """Return the four sweeps; `sizes` are the folders of the random models."""
    adapters = [Point(model, adapters=2**i) for i in range(6)]
    tokens = [Point(model, tokens=2**i) for i in range(7, 14)]
    ranks = [Point(model, rank=rank) for rank in (1, 4, 16, 64, 128, 256)]
    models = [Point(size) for size in sizes]
    return [
        Sweep("adapters", "Adapters in a pack", "adapters", "adapters", 1, adapters),
        Sweep("tokens", "Tokens a step", "tokens a step", "thousand tokens", 1e3, tokens),
        Sweep("rank", "Rank", "rank", "rank", 1, ranks),
        Sweep("model", "Model size", "parameters of the base", "million parameters", 1e6, models),
    ]


def measure(point: Point, device: str, steps: int, threads: int) -> Cost:
    """Measure one point; to be called in a fresh process."""
    torch.set_num_threads(threads)
    batch = point.tokens // ROW
    spec = assemble(
        {"model": {"id": point.model}, "data": {"id": "random"}, "seeds": list(range(point.adapters))},
        {"device": device, "ranks": point.rank, "steps": steps + 1, "batch_size": batch},
    )
    model = load_model(spec.model)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    gpu = model.device if model.device.type == "cuda" else None
    members = [make_train_state(model, trial, spec.training, steps + 1) for trial in spec.trials()]
    engine = choose_engine(model, members, spec.training).engine
    tokens = random_tokens((steps + 1) * batch, model.config.get_text_config().vocab_size)
    seconds = []
    for step in range(steps + 1):
        start = time.perf_counter()
        metrics = train_step(engine, members, tokens, spec.training, step)
        if gpu:
            torch.cuda.synchronize(gpu)
        seconds.append(time.perf_counter() - start)
        assert all(result.finite and result.tokens == point.tokens for result in metrics)
    together = point.tokens * (point.adapters if engine.name == "packed" else 1)
    limit = getattr(engine, "tokens_per_forward", together)
    return Cost(
        step_seconds=seconds[1:],
        peak_bytes=torch.cuda.max_memory_allocated(gpu) if gpu else peak_rss(),
        parameters=parameters,
        trainable_params=sum(parameter.numel() for member in members for parameter in member.parameters),
        forward_tokens=min(together, max(ROW, limit // ROW * ROW)),
        engine=engine.name,
        device=torch.cuda.get_device_name(gpu) if gpu else "cpu",
    )


def random_tokens(rows: int, vocabulary: int, length: int = ROW) -> Tokens:
    """Return `rows` sequences of random ids, with the second half of each as labels."""
    rng, is_label = np.random.default_rng(0), np.arange(length) >= length // 2
    ids = rng.integers(vocabulary, size=(rows, length), dtype=np.int32)
    return Tokens.from_examples([Example(row, is_label) for row in ids])


def measure_in_child(point: Point, args: argparse.Namespace) -> Cost:
    command = [sys.executable, __file__, "--point", json.dumps(point), "--device", args.device]
    command += ["--steps", str(args.steps), "--threads", str(args.threads)]
    environment = ENVIRONMENT | os.environ | {"OMP_NUM_THREADS": str(args.threads)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{point} failed ({done.returncode}):\n{done.stderr[-2000:]}")
    return Cost(**json.loads(done.stdout.splitlines()[-1]))


def make_models(folder: Path) -> list[str]:
    """Write the random models, and return their folders."""
    return [write_opt(folder / f"opt-{hidden}x{layers}", hidden, layers, words) for hidden, layers, words in SHAPES]


def write_opt(folder: Path, hidden: int, layers: int, vocabulary: int, dtype: torch.dtype = torch.float32) -> str:
    """Write a random model, post-norm and with narrow embeddings like opt-350m, and return its folder."""
    from transformers import OPTConfig, OPTForCausalLM
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    torch.manual_seed(0)
    config = OPTConfig(
        vocab_size=vocabulary,
        hidden_size=hidden,
        num_hidden_layers=layers,
        num_attention_heads=hidden // 64,
        ffn_dim=4 * hidden,
        word_embed_proj_dim=hidden // 2,
        do_layer_norm_before=False,
        dropout=0.0,  # off in rankscope anyway, but not in TRL
    )
    OPTForCausalLM(config).to(dtype).save_pretrained(folder)
    return str(folder)


def summarise(sweep: Sweep, costs: dict[Point, list[Cost]]) -> Result:
    """Return the rows and laws of one sweep."""
    rows, limit, unit = [], None, sweep.unit
    for point in sweep.points:
        x = costs[point][0].parameters if sweep.name == "model" else getattr(point, sweep.name)
        rows.append(Row(x, point._replace(model=Path(point.model).name), costs[point]))
    if sweep.name == "tokens":
        limit = max(row.costs[0].forward_tokens for row in rows)
        unit = f"{unit} of the largest forward (at most {limit / sweep.per:g})"
    x = [row.x for row in rows]
    seconds = fit("seconds a step", sweep.unit, sweep.per, x, [row.seconds for row in rows])
    megabytes = fit("peak MB", unit, sweep.per, x, [row.megabytes for row in rows], limit)
    return Result(sweep, rows, {"seconds": seconds, "megabytes": megabytes})


def fit(what: str, unit: str, per: float, xs: Sequence[float], ys: Sequence[float], limit: float | None = None) -> Law:
    """Fit `ys` against min(x, limit): least squares on relative errors, without negative coefficients."""
    from scipy.optimize import nnls

    x, y = np.minimum(np.array(xs, dtype=float), limit or np.inf), np.array(ys)
    (a, scaled), _ = nnls(np.column_stack([1 / y, x / x.max() / y]), np.ones(len(y)))
    b = scaled / x.max()
    deviation = float(np.abs((a + b * x) / y - 1).max())
    text = f"{what} = {a:.3g} + {b * per:.3g} × {unit} (largest deviation {deviation:.1%})"
    return Law(text, float(a), float(b), limit, deviation)


def draw(results: Sequence[Result], quantity: str, y_title: str) -> str:
    """Draw `seconds` or `megabytes` as SVG: one panel per sweep, one point per repeat, the law as a line."""
    # Imported here, as scipy is: a child's memory is what training takes, without the charts' libraries.
    import altair as alt
    import vl_convert

    from rankscope.report.charts import theme
    from rankscope.report.html import VEGA_LITE

    panels = []
    for result in results:
        dots = [{"x": row.x, "y": getattr(cost, quantity)} for row in result.rows for cost in row.costs]
        xs = np.geomspace(result.rows[0].x, result.rows[-1].x, 200).tolist()
        line = [{"x": x, "y": result.laws[quantity](x)} for x in xs]
        wide = max(dot["y"] for dot in dots) > 4 * min(dot["y"] for dot in dots)  # a short log axis has too few ticks
        log = alt.Scale(type="log", nice=False, padding=8)
        x_format = ".2s" if result.sweep.name == "model" else ",d"
        x_axis = alt.Axis(format=x_format, values=[row.x for row in result.rows])
        y_axis = alt.Axis(format=",~r", tickCount=5)
        base = alt.Chart().encode(
            alt.X("x:Q", title=result.sweep.axis, scale=log, axis=x_axis),
            alt.Y("y:Q", title=y_title, scale=log if wide else alt.Scale(zero=True), axis=y_axis),
        )
        law = base.properties(data=alt.InlineData(values=line)).mark_line(color="#0072B2", strokeWidth=1.5)
        points = base.properties(data=alt.InlineData(values=dots)).mark_point(color="#D55E00", size=36)
        panels.append(alt.layer(law, points, title=result.sweep.title, width=300, height=200))
    spec = alt.concat(*panels, columns=2).to_dict() | {"config": theme(), "background": "white", "padding": 16}
    return vl_convert.vegalite_to_svg(spec, vl_version=VEGA_LITE)


def section(result: Result) -> str:
    """Return one sweep in Markdown: table, laws, and its last point against its first."""
    axis, first, last = result.sweep.axis, result.rows[0], result.rows[-1]
    columns = [axis.capitalize(), "Trainable parameters", "Seconds a step (spread)", "Tokens a second", "Peak memory"]
    rows = [
        f"| {row.x:,} | {row.costs[0].trainable_params:,} | {row.seconds:.3g} ({row.spread:.0%}) "
        f"| {row.tokens_per_second:,.0f} | {row.megabytes:,.0f} MB |\n"
        for row in result.rows
    ]
    speeds = last.tokens_per_second / first.tokens_per_second
    return f"""
## {result.sweep.title}

| {" | ".join(columns)} |
{"|---:" * len(columns)}|
{"".join(rows)}
- {result.laws["seconds"].text}
- {result.laws["megabytes"].text}

The last row against the first: {axis} × {last.x / first.x:.3g}, seconds a step × {last.seconds / first.seconds:.3g},
tokens a second × {speeds:.3g}, peak memory × {last.megabytes / first.megabytes:.3g}.
"""


def write(results: Sequence[Result], args: argparse.Namespace) -> None:
    """Write scaling.md, scaling.json and the two figures to `--out`, without the machine's names or paths."""
    base, machine, libraries = Path(args.model).name, hardware(), versions()
    del machine["system"], machine["torch_threads"]
    options = ["--model", base, "--device", args.device, "--threads", args.threads, "--steps", args.steps]
    options += ["--repeats", args.repeats, "--sweeps", *(result.sweep.name for result in results)]
    command = shlex.join(["python", "benchmarks/scaling.py", *map(str, options)])
    measured = [cost for result in results for row in result.rows for cost in row.costs]
    device = measured[0].device
    where = machine["cpu"] if device == "cpu" else f"{device}, {machine['cpu']}"
    memory = "resident memory" if device == "cpu" else "GPU memory allocated"
    used = ", ".join(f"{name} {libraries[name]}" for name in ("python", "torch", "transformers", "peft"))
    engines = ", ".join(sorted({cost.engine for cost in measured}))
    axes = ", ".join(result.sweep.axis for result in results)
    text = f"""# How the cost of a training step grows

```
{command}
```

{where}; threads: {args.threads}; {used}; engine: {engines}; base (of all sweeps but the model size): {base}.
Repeats: {args.repeats}, each of {args.steps} timed steps; numbers are medians, the spread is the slowest minus the
fastest repeat over the median. Peak memory is {memory}, 1 MB = 1e6 bytes. What is measured and how the laws are
fitted: [the head of scaling.py](../../benchmarks/scaling.py).

![Seconds a step by {axes}](scaling-time.svg)
![Peak memory by {axes}](scaling-memory.svg)
{"".join(section(result) for result in results)}"""
    record: dict[str, Any] = {"schema": 1, "command": command, "machine": machine, "versions": libraries, "sweeps": {}}
    for sweep, rows, laws in results:
        points = [{"x": r.x, **r.point._asdict(), "repeats": [c._asdict() for c in r.costs]} for r in rows]
        fitted = {name: law._asdict() for name, law in laws.items()}
        record["sweeps"][sweep.name] = {"axis": sweep.axis, "points": points, "laws": fitted}
    files = {
        "scaling.md": text,
        "scaling.json": json.dumps(record, indent=1) + "\n",
        "scaling-time.svg": draw(results, "seconds", "seconds a step"),
        "scaling-memory.svg": draw(results, "megabytes", f"peak {memory} (MB)"),
    }
    args.out.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        (args.out / name).write_text(content, encoding="utf-8")
    print(text)


def main() -> None:
    names = [sweep.name for sweep in sweeps("", [])]
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--model", default="embedded", help="the base of all sweeps but `model`: embedded or a folder")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--steps", type=int, default=4, help="timed steps of each process")
    parser.add_argument("--repeats", type=int, default=3, help="processes of each point")
    parser.add_argument("--sweeps", nargs="+", choices=names, default=names)
    parser.add_argument("--out", type=Path, default=Path("docs/results"))
    parser.add_argument("--point", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.point:
        print(json.dumps(measure(Point(*json.loads(args.point)), args.device, args.steps, args.threads)._asdict()))
        return
    with tempfile.TemporaryDirectory(prefix="rankscope-scaling-") as folder:
        sizes = make_models(Path(folder)) if "model" in args.sweeps else []
        chosen = [sweep for sweep in sweeps(args.model, sizes) if sweep.name in args.sweeps]
        costs: dict[Point, list[Cost]] = {point: [] for sweep in chosen for point in sweep.points}
        for repeat in range(args.repeats):
            for point, found in costs.items():
                cost = measure_in_child(point, args)
                found.append(cost)
                shown = point._replace(model=Path(point.model).name)
                print(f"{repeat + 1}/{args.repeats} {shown}: {cost.seconds:.3f} s, {cost.megabytes:.0f} MB", flush=True)
    write([summarise(sweep, costs) for sweep in chosen], args)


if __name__ == "__main__":
    main()
