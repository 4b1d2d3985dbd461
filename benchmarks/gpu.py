"""Everything that can only be known on a GPU, in one run of at most 8 minutes on one H100 or H200.

    python benchmarks/gpu.py --out gpu.json                # all stages; --stages parity,share runs some
    python benchmarks/gpu.py --rehearse                    # the same code on a CPU with small numbers, in 3 minutes

Each stage runs in a fresh process with a time limit of its own, so that one that fails, hangs or takes the device down
leaves the others their turn. `--out` is written after every stage, with what a stage had measured before it failed.
The last output is a table in Markdown, for docs/results/gpu.md, which says what each stage measures and its bars. Exit
code: 0, or 1 where a stage failed, was skipped or missed a bar, or 2 where a package without which nothing runs is
missing. A rehearsal judges what is computed, not its speed. Nothing is downloaded: models are random, of a stage's
shape.

Times are of whole steps between two synchronisations, medians, after steps that warm up (handles, kernels' first loads,
the allocator's pools). float32 products are in float32: TF32 is off, also where the environment would turn it on.

Missing packages can be carried to a machine without a network as wheels. Where pip works (pydantic's metadata names the
one version of pydantic-core that it takes):

    python -m pip download --no-deps --only-binary=:all: --python-version 3.12 --implementation cp \\
        --platform manylinux_2_28_x86_64 --platform manylinux_2_27_x86_64 --platform manylinux_2_24_x86_64 \\
        --platform manylinux_2_17_x86_64 --platform manylinux2014_x86_64 -d wheels \\
        pydantic pydantic-core annotated-types typing-inspection google-re2 trl datasets multiprocess dill bitsandbytes

and there, with PYTHONPATH=site:

    python -m pip install --no-index --no-deps --target site wheels/*.whl
"""

import argparse
import gc
import math
import os
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parents[1]
PATHS = [str(ROOT / "src"), str(ROOT / "benchmarks")]
sys.path.insert(0, PATHS[0])
sys.path += [PATHS[1], str(ROOT / "tests")]

NEEDED = {
    "torch": "torch", "transformers": "transformers", "peft": "peft", "safetensors": "safetensors", "numpy": "numpy",
    "pandas": "pandas", "pyarrow": "pyarrow", "scipy": "scipy", "pydantic": "pydantic", "psutil": "psutil",
    "pynvml": "nvidia-ml-py", "yaml": "pyyaml", "re2": "google-re2", "filelock": "filelock", "jinja2": "jinja2",
}  # fmt: skip
"""Packages without which no stage runs, by module."""

OPTIONAL = {"trl": "trl", "datasets": "datasets", "bitsandbytes": "bitsandbytes"}
"""Packages that one stage needs, by module."""


def missing(modules: Mapping[str, str]) -> list[str]:
    """Packages that are not installed."""
    return [package for module, package in modules.items() if find_spec(module) is None]


if lacking := missing(NEEDED):
    print(f"Missing, without which nothing runs: {' '.join(lacking)}. The head of {__file__} says how to carry them.")
    sys.exit(2)

import torch
from peft import get_peft_model
from safetensors.torch import load_file
from torch.profiler import ProfilerActivity, profile
from transformers import AutoModelForCausalLM, PreTrainedModel

import reference
import trl_jobs
from models import tiny_model
from plain_products import product_rate
from predict_memory import compare
from rankscope.analysis.verdict import conclude
from rankscope.data.tokens import TokenizedData, Tokens, save
from rankscope.demo import model_path
from rankscope.files import read_json, write_json
from rankscope.jobs import packs
from rankscope.jobs.job import Job, Run
from rankscope.jobs.local import LocalLauncher
from rankscope.jobs.process import JobProcess
from rankscope.jobs.queue import run_jobs
from rankscope.lora.adapters import lora_config, remove_adapters
from rankscope.lora.layout import Layout, Segment, use_layout
from rankscope.measure.cores import ENVIRONMENT
from rankscope.measure.machine import describe_machine, hardware, versions
from rankscope.measure.profile import MEMORY
from rankscope.model.device import free_bytes, resolve_device, synchronize
from rankscope.model.load import load_model
from rankscope.model.quantized import base_bytes
from rankscope.plan.costs import predict
from rankscope.plan.memory import StudyMemory
from rankscope.plan.plan import make_fleet, make_plan
from rankscope.spec.candidates import Trial
from rankscope.spec.models import StudySpec
from rankscope.spec.options import assemble
from rankscope.study.study import Study
from rankscope.text.catalogue import load
from rankscope.text.formats import size
from rankscope.train import step as step_module
from rankscope.train.attention import packed_attention
from rankscope.train.loop import EngineChoice, choose_engine
from rankscope.train.prepare import prepare_data
from rankscope.train.probe import use_own_forward
from rankscope.train.step import make_train_state, train_step
from scaling import random_tokens, write_opt

TF32 = ("NVIDIA_TF32_OVERRIDE", "TORCH_ALLOW_TF32_CUBLAS_OVERRIDE")
"""Variables that turn TF32 on whatever a program asks for; some containers set them."""

ARCHITECTURES = ("opt-post-norm", "gpt2", "llama-gqa", "qwen3", "mistral-window", "gemma2")

LEFT_FREE = 6 << 30
"""Bytes that `oom` leaves on the device: enough for a context, the base and the small trial, not for the large one."""


class Sizes(NamedTuple):
    """Numbers of a run: those of a GPU, or a rehearsal's."""

    shape: tuple[int, int, int]  # of the OPT model: hidden size, layers, vocabulary
    ranks: tuple[int, ...]
    seeds: int
    rows: tuple[int, ...]  # lengths of the rows of `share`
    adapters: tuple[int, ...]  # of `scaling`
    batch: int
    warmup: int  # steps
    steps: int  # timed, after those
    product: int  # a side of the plain products' matrices
    parity_steps: int
    resume_steps: int
    too_large: int  # rank of the trial without room in `oom`


GPU = Sizes((1024, 24, 50272), (8, 128, 256), 3, (128, 1024), (1, 3, 9, 18), 8, 4, 8, 8192, 12, 200, 1024)
REHEARSAL = Sizes((64, 2, 8192), (2, 4, 8), 2, (32,), (1, 3), 2, 1, 2, 256, 3, 12, 64)


class Here:
    """Where a stage runs, and what it has noted, which is in `folder`/NAME.json at once."""

    def __init__(self, name: str, folder: Path, rehearse: bool) -> None:
        self.name, self.folder, self.rehearse = name, folder, rehearse  # the stages of a run share the folder
        self.sizes = REHEARSAL if rehearse else GPU
        self.device = resolve_device("cpu" if rehearse else "cuda")
        self.gpu = self.device.type == "cuda"
        self.rows: list[dict[str, Any]] = []

    def note(
        self, what: str, value: float | None, text: str, bar: str | None = None, met: bool = True, speed: bool = False
    ) -> None:
        """Keep one finding. With a `bar` it counts whether it is met, but not in a rehearsal if it is a `speed`."""
        judged = bar is not None and not (speed and self.rehearse)
        number = value if value is not None and math.isfinite(value) else None
        self.rows.append({"what": what, "value": number, "found": text, "bar": bar, "met": met if judged else None})
        write_json(self.folder / f"{self.name}.json", {"schema": 1, "rows": self.rows})
        print(f"  {self.name}: {what}: {text}", flush=True)

    def spec(self, model: str, ranks: Sequence[int], seeds: int = 1, sets: Sequence[str] = (), **own: Any) -> StudySpec:
        """The study that asks for these trials of the model in a folder."""
        options = {"model": model, "dataset": "embedded", "device": self.device.type, "batch_size": self.sizes.batch}
        options |= {"ranks": list(ranks), "seeds": list(range(seeds)), "steps": self.sizes.warmup + self.sizes.steps}
        return assemble({}, options | own, sets)

    def shaped_model(self) -> str:
        """Folder of the random model of the sizes' shape, with the embedded model's tokenizer; made once."""
        folder, made = self.folder / "opt", self.folder / "opt-unfinished"
        if not folder.exists():
            shutil.rmtree(made, ignore_errors=True)
            write_opt(made, *self.sizes.shape, torch.bfloat16 if self.gpu else torch.float32)
            for file in model_path().glob("*token*"):
                shutil.copy(file, made)
            made.rename(folder)
        return str(folder)

    def free(self) -> None:
        """Give the memory of what is gone back to the device, and forget its peaks."""
        gc.collect()
        if self.gpu:
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats(self.device)

    def study(self, name: str, spec: StudySpec, data: TokenizedData) -> Study:
        study = Study.create(self.folder / name, spec)
        save(data, study.path / "data")
        return study


class Timed(NamedTuple):
    """Steps of some trials together."""

    losses: list[list[float]]  # (steps, trials), from the first step on
    seconds: float  # a step, the median after warm-up
    tokens: float  # a step
    flops: float  # useful ones of a step

    @property
    def speed(self) -> float:
        """Tokens a second."""
        return self.tokens / self.seconds


@contextmanager
def packed(model: PreTrainedModel, spec: StudySpec, trials: Sequence[Trial]) -> Iterator[tuple[Any, EngineChoice]]:
    """States of `trials` and the engine chosen for them; the model is as before in the end."""
    attention, steps = model.config._attn_implementation, spec.training.steps or 1
    states = [make_train_state(model, trial, spec.training, steps) for trial in trials]
    try:
        yield states, choose_engine(model, states, spec.training)
    finally:
        use_own_forward(model, attention)
        remove_adapters(model)


def train(spec: StudySpec, trials: Sequence[Trial], tokens: Tokens, warmup: int, model: Any = None) -> Timed:
    """Train `trials` together, the first `warmup` steps untimed. Raises RuntimeError: a loss is not finite, or another
    engine was chosen than asked for."""
    losses, seconds, flops, counts = [], [], [], []
    model = model or load_model(spec.model)
    with packed(model, spec, trials) as (states, choice):
        if choice.engine.name != spec.training.engine:
            raise RuntimeError(f"{type(model).__name__} is not packed: {choice.reason}")
        for step in range(spec.training.steps or 0):
            synchronize(model.device)
            start = time.perf_counter()
            metrics = train_step(choice.engine, states, tokens, spec.training, step)
            synchronize(model.device)
            seconds.append(time.perf_counter() - start)
            losses.append([one.loss for one in metrics])
            counts.append(sum(one.tokens for one in metrics))
            pairs = zip(trials, metrics, strict=True)
            flops.append(sum(choice.costs[t.name].flops(one.tokens, one.label_tokens) for t, one in pairs))
    if not all(math.isfinite(loss) for row in losses for loss in row):
        raise RuntimeError(f"losses are not finite: {losses}")
    median, mean = statistics.median(seconds[warmup:]), statistics.fmean
    return Timed(losses, median, mean(counts[warmup:]), mean(flops[warmup:]))


def largest_difference(found: Timed, expected: Timed) -> float:
    """Largest relative difference between two runs' losses."""
    rows = zip(found.losses, expected.losses, strict=True)
    return max(abs(a - b) / abs(b) for one, other in rows for a, b in zip(one, other, strict=True))


def plain_rate(here: Here) -> float:
    """FLOP/s of plain products of square matrices in bfloat16."""
    rate = product_rate({(here.sizes.product,) * 3: 1}, here.device, torch.bfloat16)
    here.note("plain bfloat16 products", rate, f"{rate / 1e12:,.4g} TFLOP/s")
    return rate


def machine(here: Here) -> None:
    """Device, versions, and the attention of a pack in bfloat16 against itself in float32."""
    found = hardware()
    gpus = [f"{gpu['name']}, {size(gpu['memory_bytes'])}" for gpu in found["gpus"]]
    here.note("device", None, f"{'; '.join(gpus) or found['cpu']}; {found['cores']} cores")
    here.note("versions", None, ", ".join(f"{name} {number}" for name, number in versions().items() if number))
    precision = torch.get_float32_matmul_precision()
    here.note("torch", None, f"CUDA {torch.version.cuda}, float32 products: {precision}")
    plain_rate(here)
    lengths, tokens = (5, 17, 1, 130), 153
    torch.manual_seed(0)
    whole = [torch.randn(1, heads, tokens, 64, device=here.device) for heads in (4, 2, 2)]
    results = []
    for dtype in (torch.float32, torch.bfloat16):
        parts = [part.detach().to(dtype).requires_grad_() for part in whole]
        with use_layout(Layout((Segment("one", 0, tokens, lengths, ()),), tokens)):
            out, _ = packed_attention(torch.nn.Module(), *parts, None)
        out.float().square().sum().backward()
        results.append([out.detach(), *(part.grad for part in parts)])
    off = [float((half - one).norm() / one.norm()) for one, half in zip(*results, strict=True)]
    text = "output {:.1e}, gradients {:.1e} {:.1e} {:.1e}".format(*off)
    here.note("attention of a pack, bfloat16 off float32", max(off), text, "2e-2", max(off) <= 2e-2)


def parity(here: Here, names: Sequence[str] = ARCHITECTURES) -> None:
    """Losses of packed training and of PEFT's forward against PEFT's in float64 on the CPU. One architecture that fails
    is a missed bar, and the others go on."""
    tokens = reference.random_tokens(30)
    for name in names:
        try:
            off = differences(here, name, tokens)
        except Exception as error:
            here.note(name, None, f"{type(error).__name__}: {str(error).splitlines()[0]}", "runs", False)
            continue
        for dtype, limit in (("float32", 1e-4), ("bfloat16", 2 * off["bfloat16", "peft"] + 2e-3)):
            ours, theirs = off[dtype, "packed"], off[dtype, "peft"]
            here.note(f"{name}, {dtype}", ours, f"{ours:.1e} (PEFT {theirs:.1e})", f"{limit:.1e}", ours <= limit)


def differences(here: Here, name: str, tokens: Tokens) -> dict[tuple[str, str], float]:
    """Largest relative difference of the losses from those of float64, by dtype and engine."""
    folder, off = here.folder / f"tiny-{name}", {}
    tiny_model(name).save_pretrained(folder)
    options: dict[str, Any] = {"steps": here.sizes.parity_steps, "learning_rates": [3e-3]}
    spec = here.spec(str(folder), (8, 3), engine="peft", **options)
    rowwise = spec.training.model_copy(update={"batch_size": 1, "gradient_accumulation_steps": here.sizes.batch})
    unpadded = spec.model_copy(update={"training": rowwise})  # in float64 some attention gives NaN for padding
    expected = train(unpadded, spec.trials(), tokens, 0, tiny_model(name, torch.float64))
    for dtype in ("float32", "bfloat16"):
        for engine in ("packed", "peft"):
            spec = here.spec(str(folder), (8, 3), engine=engine, dtype=dtype, **options)
            off[dtype, engine] = largest_difference(train(spec, spec.trials(), tokens, 0), expected)
    return off


def trl(here: Here) -> None:
    """One pack, and TRL's SFTTrainer with one trial after the other on the same batches."""
    sizes, limit = here.sizes, 2e-2 if here.gpu else 1e-4
    spec = here.spec(here.shaped_model(), sizes.ranks, sizes.seeds, learning_rates=[2e-4])
    data, trials = prepare_data(spec), spec.trials()
    ours = train(spec, trials, data.train, sizes.warmup)
    here.note("rankscope, one pack", ours.speed, f"{ours.seconds:.3g} s a step of {ours.tokens:,.0f} tokens")
    here.free()
    dtype = torch.bfloat16 if here.gpu else torch.float32
    base: Any = AutoModelForCausalLM.from_pretrained(spec.model.id, dtype=dtype).to(here.device)
    seconds, apart = 0.0, 0.0
    for number, trial in enumerate(trials):
        torch.manual_seed(trial.seed)
        model = get_peft_model(base, lora_config(trial.candidate, base))
        rows = trl_jobs.trl_rows(spec.training, data.train, False, trial.seed)
        times, theirs = trl_jobs.train_rank(spec, trial.candidate, model, rows, here.folder, autocast=here.gpu)
        base = model.unload()
        seconds += statistics.median(times[sizes.warmup :])
        pairs = zip((row[number] for row in ours.losses), theirs, strict=True)
        apart = max(apart, *(abs(a - b) / b for a, b in pairs))
    here.note("TRL, one after the other", ours.tokens / seconds, f"{seconds:.3g} s a step of as many tokens")
    here.note("largest difference of the losses", apart, f"{apart:.1e}", f"{limit:g}", apart <= limit)
    ratio = seconds / ours.seconds
    here.note("speed over TRL's", ratio, f"{ratio:.3g} times", "10 times", ratio >= 10, speed=True)


def scaling(here: Here) -> None:
    """Tokens a second with more and more adapters."""
    sizes, one = here.sizes, 0.0
    ranks = sizes.ranks[1:] + sizes.ranks[:1]
    spec = here.spec(here.shaped_model(), ranks, math.ceil(max(sizes.adapters) / len(ranks)))
    model, tokens = load_model(spec.model), random_tokens(64, sizes.shape[2], sizes.rows[0])
    for count in sizes.adapters:
        here.free()
        found = train(spec, spec.trials()[:count], tokens, sizes.warmup, model)
        one = one or found.speed
        text = f"{found.seconds:.3g} s a step, {found.speed:,.0f} tokens/s, {found.speed / one:.2f} times those of one"
        text += f", peak {size(torch.cuda.max_memory_allocated(here.device))}" if here.gpu else ""
        here.note(f"adapters: {count}", found.speed, text)


def share(here: Here) -> None:
    """Useful FLOP/s of a pack's steps over the rate of plain products, and what a step's time goes to."""
    sizes, rate = here.sizes, plain_rate(here)
    spec = here.spec(here.shaped_model(), sizes.ranks, sizes.seeds)
    model = load_model(spec.model)
    for length in sizes.rows:
        here.free()
        tokens = random_tokens(64, sizes.shape[2], length)
        found = train(spec, spec.trials(), tokens, sizes.warmup, model)
        reached = found.flops / found.seconds / rate
        text = f"{reached:.1%}: {found.flops / 1e12:,.3g} useful TFLOP in {found.seconds:.3g} s a step"
        here.note(f"share of the peak, rows of {length}", reached, text, "40%", reached >= 0.4, speed=True)
        profile_step(here, model, spec, tokens)


def profile_step(here: Here, model: PreTrainedModel, spec: StudySpec, tokens: Tokens) -> None:
    """What one step's time goes to, by kernel (by operator on a CPU)."""
    activity, spent = (ProfilerActivity.CUDA, "device") if here.gpu else (ProfilerActivity.CPU, "cpu")
    with packed(model, spec, spec.trials()) as (states, choice):
        for step in range(2):
            train_step(choice.engine, states, tokens, spec.training, step)
        synchronize(here.device)
        with profile(activities=[activity]) as profiled:
            train_step(choice.engine, states, tokens, spec.training, 2)
            synchronize(here.device)
    events = [(getattr(one, f"self_{spent}_time_total") / 1e6, one) for one in profiled.key_averages()]
    busy, launches = sum(seconds for seconds, _ in events), sum(event.count for _, event in events)
    here.note("busy in a profiled step", busy, f"{busy:.3g} s, {launches:,} kernels (operators on a CPU)")
    for seconds, event in sorted(events, key=lambda pair: -pair[0])[:6]:
        here.note(f"profile: {event.key[:60]}", seconds, f"{seconds / max(busy, 1e-9):.1%}, {event.count:,} times")


def memory(here: Here) -> None:
    """Peaks of candidates, each in a process of its own, and of a pack in this one."""
    sizes = here.sizes
    ranks = sizes.ranks[:1] if here.rehearse else (sizes.ranks[0], sizes.ranks[-1])
    sets = ["measure.repeats=1", "measure.rounds=1"]  # memory alone, no time
    sets += [f"measure.warmup_steps={sizes.warmup}", f"measure.steps={sizes.steps}"]
    for row in compare(here.spec(here.shaped_model(), ranks, sets=sets), here.folder / "memory"):
        (repeat,) = Study.open(here.folder / "memory").profile_repeats(f"r{row['rank']:03d}")
        kinds = {kind: repeat["summary"][f"{kind}_peak_bytes"] for kind in MEMORY}
        text = ", ".join(f"{kind.removeprefix('gpu_')} {size(peak)}" for kind, peak in kinds.items() if peak)
        text += f"; predicted {size(row['peak_bytes'])}, {row['difference']:+.1%}"
        here.note(f"rank {row['rank']} alone", row["difference"], text)
    if not here.gpu:
        return here.note("a pack", None, "not measured on a CPU: this process holds more than the pack")
    spec = here.spec(here.shaped_model(), sizes.ranks, sizes.seeds)
    tokens, costs = random_tokens(64, sizes.shape[2], sizes.rows[0]), predict(spec)
    here.free()
    predicted = StudyMemory(spec, costs, tokens, free_bytes(here.device))
    told = predicted.peak(spec.trials())
    train(spec, spec.trials(), tokens, sizes.warmup)
    measured, reserved = torch.cuda.max_memory_allocated(here.device), torch.cuda.max_memory_reserved(here.device)
    if told is None:
        raise RuntimeError(f"not predicted: {predicted.reason}; allocated {size(measured)}")
    off = told.parts.total / measured - 1
    text = f"allocated {size(measured)}, reserved {size(reserved)}; predicted {size(told.parts.total)}, {off:+.1%}"
    here.note(f"pack of {len(spec.trials())}", off, text)


def nf4(here: Here) -> None:
    """The base in 4 bits: its bytes, the time, and the packed forward's losses against PEFT's."""
    sizes, runs = here.sizes, {}
    tokens, folder = random_tokens(64, sizes.shape[2], sizes.rows[0]), here.shaped_model()
    plain = base_bytes(load_model(here.spec(folder, sizes.ranks).model))
    for engine in ("packed", "peft"):
        here.free()
        spec = here.spec(folder, sizes.ranks, quantization="nf4", engine=engine)
        model = load_model(spec.model)
        runs[engine] = run = train(spec, spec.trials(), tokens, sizes.warmup, model)
        here.note(f"{len(sizes.ranks)} trials, {engine}", run.seconds, f"{run.seconds:.3g} s a step")
    here.note("the base", base_bytes(model) / plain, f"{size(base_bytes(model))}, unquantized {size(plain)}")
    off = largest_difference(runs["packed"], runs["peft"])
    here.note("packed against PEFT, losses", off, f"{off:.1e}", "2e-2", off <= 2e-2)


def resume(here: Here) -> None:
    """A pack that was killed and resumed against two that nothing stopped."""
    steps = here.sizes.resume_steps
    sets = ["training.checkpoint_steps=5", "training.evals=1", "data.eval_rows=8"]
    spec = here.spec("embedded", (4, 16), sets=sets, steps=steps, learning_rates=[1e-3])
    data, names = prepare_data(spec), [trial.name for trial in spec.trials()]
    whole, again, killed = (here.study(name, spec, data).path for name in ("whole", "again", "killed"))
    job = Job(packs.__name__, {"packs": {"p000": names}}, "packs/p000")
    for path in (whole, again):
        packs.work(path, job.content)
    process, lines = JobProcess(killed, job), killed / "trials" / names[0] / "metrics.jsonl"
    while process.is_running(0.002) and not (lines.exists() and lines.read_bytes().count(b"\n") > steps // 2):
        pass
    process.kill()
    done = sum('"train_loss"' in line for line in lines.read_text().splitlines())
    here.note("killed", done, f"after step {done} of {steps}", "unfinished", done < steps)
    packs.work(killed, job.content)

    def apart(other: Path) -> float:
        files = [f"trials/{name}/adapter/adapter_model.safetensors" for name in names]
        pairs = [(load_file(whole / file), load_file(other / file)) for file in files]
        return max(float((one[key] - two[key]).abs().max()) for one, two in pairs for key in one)

    rounding, found = apart(again), apart(killed)
    here.note("two runs that nothing stopped", rounding, f"{rounding:.1e} apart" if rounding else "bitwise equal")
    text, limit = f"{found:.1e} apart" if found else "bitwise equal", f"{4 * rounding:.1e}" if rounding else "bitwise"
    here.note("resumed, and never stopped", found, text, limit, found <= 4 * rounding)


def oom(here: Here) -> None:
    """A plan with one pack of a small and a large trial, and too little memory for the large one when it runs."""
    ranks = (here.sizes.ranks[0], here.sizes.too_large)
    sets = ["training.evals=1", "data.eval_rows=8", "measure.profiles=false", "measure.answers=0"]
    spec = here.spec(here.shaped_model(), ranks, sets=sets, steps=2)
    data, said, held = prepare_data(spec), list[str](), None
    study = here.study("oom", spec, data)
    launcher = (LocalLauncher if here.gpu else Rehearsed)(spec.model)
    plan = make_plan(spec, data, launcher.site(), make_fleet(None, None), study)
    write_json(study.path / "machine.json", describe_machine(spec, plan.prediction.base_params, plan.site))
    here.note(
        "packs of the plan", len(plan.packs), "; ".join(str([t.name for t in pack]) for pack in plan.packs.values())
    )
    if here.gpu:  # by plain allocation, as another program on the device would
        free, _ = torch.cuda.mem_get_info(here.device)
        held = torch.empty(free - LEFT_FREE, dtype=torch.uint8, device=here.device)
        here.note("taken after the plan", held.numel(), f"{size(held.numel())} of {size(free)} free")
    else:
        here.note("taken after the plan", None, "nothing: on a CPU the job raises torch.OutOfMemoryError itself")
    run = Run(study, plan, said.append, load("en"))
    run_jobs(launcher, study.path, packs.jobs(run), lambda: None, partial(packs.ended, run))
    del held
    for sentence in said:
        here.note("said", None, sentence)
    statuses = [study.trial_record(trial).status for trial in spec.trials()]
    here.note("trials", None, ", ".join(statuses), "done, oom", statuses == ["done", "oom"])
    here.note("verdict", None, str(conclude(study.evidence())["outcome"]))


class Rehearsed(LocalLauncher):
    """Jobs do this file's `work`."""

    def start(self, study: Path, job: Job) -> JobProcess:
        return super().start(study, job._replace(module=Path(__file__).stem))


def work(study: Path, content: Mapping[str, Any]) -> None:
    """The job of `oom` in a rehearsal: making the larger trial's optimizer fails as a GPU's allocator does."""
    own = step_module.make_optimizer

    def without_room(rates: Mapping[float, Sequence[torch.Tensor]], *rest: Any) -> Any:
        if any(min(weight.shape) >= REHEARSAL.too_large for weights in rates.values() for weight in weights):
            raise torch.OutOfMemoryError("CUDA out of memory. Raised by a rehearsal.")
        return own(rates, *rest)  # type: ignore[arg-type]

    step_module.make_optimizer = without_room
    packs.work(study, content)


STAGES: dict[str, tuple[Callable[[Here], None], int]] = {
    "machine": (machine, 100), "parity": (parity, 90), "trl": (trl, 120), "scaling": (scaling, 60),
    "share": (share, 60), "memory": (memory, 75), "nf4": (nf4, 45), "resume": (resume, 60), "oom": (oom, 75),
}  # fmt: skip
"""Stages, and the seconds that each may take on a GPU."""

NEEDS = {"trl": ("trl", "datasets"), "nf4": ("bitsandbytes",)}


def start_stage(name: str, folder: Path, rehearse: bool, seconds: float) -> dict[str, Any]:
    """Run one stage in a process of its own, and return its status, seconds, error and rows."""
    command = [sys.executable, __file__, "--stage", name, "--folder", str(folder)] + ["--rehearse"] * rehearse
    paths = os.pathsep.join([*PATHS, *filter(None, [os.environ.get("PYTHONPATH")])])
    own = {"PYTHONPATH": paths, "HF_HUB_OFFLINE": "1", "RANKSCOPE_CACHE": str(folder / "cache")}
    environment = ENVIRONMENT | {key: value for key, value in os.environ.items() if key not in TF32} | own
    log, start, status = folder / f"{name}.log", time.perf_counter(), "cut off"
    with log.open("wb") as out:
        process = subprocess.Popen(command, stdout=out, stderr=out, env=environment, start_new_session=True)
        try:
            with suppress(subprocess.TimeoutExpired):
                status = "failed" if process.wait(seconds) else "ok"
        finally:  # with what it has started, and also where this process is ended
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    file = folder / f"{name}.json"
    rows = read_json(file)["rows"] if file.exists() else []
    last = [line for line in log.read_text(errors="replace").splitlines() if line.strip()][-1:]
    error = {"ok": None, "cut off": f"after {seconds:.0f} s"}.get(status, " ".join(last) or "no output")
    if status == "ok" and any(row["met"] is False for row in rows):
        status = "missed"
    return {"status": status, "seconds": time.perf_counter() - start, "error": error, "rows": rows}


def table(stages: Mapping[str, Mapping[str, Any]]) -> str:
    """All that was noted, in Markdown."""
    lines = ["| stage | what | found | bar | met |", "|---|---|---|---|---|"]
    for name, stage in stages.items():
        failed = [{"what": stage["status"], "found": stage["error"], "bar": None, "met": False}] * bool(stage["error"])
        for row in [*stage["rows"], *failed]:
            met = {True: "yes", False: "**no**", None: ""}[row["met"]]
            cells = (name, row["what"], row["found"], row["bar"] or "", met)
            lines.append(f"| {' | '.join(' '.join(cell.replace('|', '/').split()) for cell in cells)} |")
    return "\n".join(lines)


def run_all(args: argparse.Namespace, folder: Path) -> dict[str, dict[str, Any]]:
    """Run the stages one after the other; `--out` is written after each."""
    found: dict[str, dict[str, Any]] = {}
    end = time.perf_counter() + args.seconds
    for name in args.stages:
        left = min(600 if args.rehearse else STAGES[name][1], end - time.perf_counter())
        lacking = missing({module: OPTIONAL[module] for module in NEEDS.get(name, ())})
        skipped = f"needs {' and '.join(lacking)}: pip install {' '.join(lacking)}" if lacking else None
        skipped = skipped or ("no time is left" if left < 1 else None)
        empty = {"status": "skipped", "seconds": 0.0, "error": skipped, "rows": []}
        found[name] = stage = empty if skipped else start_stage(name, folder, args.rehearse, left)
        bars = [f"{row['what']}: {row['found']}" for row in stage["rows"] if row["bar"]]
        said = stage["error"] or "; ".join(bars or [f"{len(stage['rows'])} rows"])
        print(f"{name:8} {stage['status']:8} {stage['seconds']:6.1f} s  {said}", flush=True)
        if args.out:
            write_json(args.out, {"schema": 1, "rehearsal": args.rehearse, "stages": found})
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="a JSON file, written after every stage")
    parser.add_argument("--stages", type=lambda text: text.split(","), default=list(STAGES), help=",".join(STAGES))
    parser.add_argument("--seconds", type=float, default=480, help="most that all stages take together")
    parser.add_argument("--rehearse", action="store_true", help="on a CPU with small numbers")
    parser.add_argument("--stage", choices=STAGES, help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if unknown := [name for name in args.stages if name not in STAGES]:
        parser.error(f"--stages: unknown: {', '.join(unknown)}; there are {', '.join(STAGES)}")
    if args.stage:
        torch.set_float32_matmul_precision("highest")
        STAGES[args.stage][0](Here(args.stage, args.folder, args.rehearse))
        return 0
    if lacking := missing(OPTIONAL):
        print(f"Missing, without which a stage is skipped: {' '.join(lacking)}.")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that a stage is ended, too
    with tempfile.TemporaryDirectory(prefix="rankscope-gpu-", ignore_cleanup_errors=True) as folder:
        found = run_all(args, Path(folder))
    print(f"\n{table(found)}")
    return int(any(stage["status"] != "ok" for stage in found.values()))


if __name__ == "__main__":
    sys.exit(main())
