"""The question a study asks, as frozen pydantic models.

    spec -> data -> lora -> train, measure -> study -> analysis -> report

A `StudySpec` is complete: study.yaml in the study's directory has every default written out, so that the file alone
says what was done. A field's docstring is its description in the JSON schema and in the documentation. Names follow
PEFT and transformers where they have one.
"""

import re
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from itertools import chain, product
from typing import Annotated, Any, Literal, Self, TypeAlias, TypeVar, get_args

from pydantic import (
    AfterValidator,
    BeforeValidator,
    Field,
    PositiveFloat,
    ValidationInfo,
    field_validator,
    model_validator,
)

from rankscope.spec.candidates import (
    CONTROL,
    FULL,
    PLAIN,
    AllLinear,
    Candidate,
    Column,
    Count,
    Frozen,
    FullTrial,
    Rank,
    Seed,
    Trial,
    Variant,
    all_linear_or_names,
    alpha_of,
    alpha_or_alphas,
    column_of_a_format,
    columns_or_text,
    divided,
    listed,
    name_or_names,
    ranks_of,
    seeds_of,
    unique,
)
from rankscope.spec.peft_options import checked_options
from rankscope.spec.task import checked_task
from rankscope.text.formats import BYTES, SECONDS, parse_bytes, parse_seconds, parse_share

EMBEDDED = "embedded"
"""Value of model.id and data.id for the small pretrained model and the Python functions that come with rankscope."""

DEFAULT_TEMPLATE = "### Question: {instruction}\n{input}\n ### Answer:"
CHATML = "chatml"  # value of data.chat_template for the ChatML template that comes with rankscope


def is_jinja(text: str) -> bool:
    """Whether text holds a Jinja expression or statement, as every chat template does."""
    return "{{" in text or "{%" in text


T = TypeVar("T")
OneOrSeveral: TypeAlias = T | Annotated[list[T], Field(min_length=1)]
"""A list, or one value in its place; editors learn it from the JSON schema, as they do the types below."""


def _number_with(units: Iterable[str]) -> str:
    """Pattern of a number with one of `units`, in letters of either case, or with none."""
    either_case = ("".join(f"[{letter}{letter.upper()}]" for letter in unit) for unit in units)
    return rf"^\s*[0-9]+(\.[0-9]+)?\s*({'|'.join(either_case)})?\s*$"


ListText = Annotated[str, Field(pattern=r"^[0-9.,\sefulrE+-]*[0-9][0-9.,\sefulrE+-]*$")]  # `8,64`, `4..64`, `1r,2r`
Numbers = OneOrSeveral[PositiveFloat | ListText]
RankOrFull = Rank | ListText | Annotated[list[Rank | ListText | Literal["full"]], Field(min_length=1)]
Name = Annotated[str, Field(min_length=1)]
ModuleNames = AllLinear | OneOrSeveral[Name]
BytesOrText = PositiveFloat | Annotated[str, Field(pattern=_number_with(BYTES))]
Fraction = Annotated[float, Field(gt=0.0, lt=1.0)]
Percentage = Annotated[str, Field(pattern=r"^\s*[0-9]+(\.[0-9]+)?\s*%\s*$")]
AboveHalf = Annotated[float, Field(gt=0.5, lt=1.0)]
SecondsOrText = PositiveFloat | Annotated[str, Field(pattern=_number_with(SECONDS))]


def _read(by: Callable[[Any], Any], form: Any) -> BeforeValidator:
    """Read a value of the `form` that editors learn."""
    return BeforeValidator(by, json_schema_input_type=form)


_Unique = AfterValidator(unique)
Ranks = Annotated[tuple[Rank, ...], _read(ranks_of, RankOrFull), Field(min_length=1), _Unique]
Rates = Annotated[tuple[PositiveFloat, ...], _read(listed, Numbers), Field(min_length=1), _Unique]
Seeds = Annotated[tuple[Seed, ...], _read(seeds_of, OneOrSeveral[Seed | ListText]), Field(min_length=1), _Unique]
Variants = Annotated[tuple[Variant, ...], _read(listed, OneOrSeveral[Variant]), _Unique]
Alphas = Annotated[float | str | tuple[float | str, ...], _read(alpha_or_alphas, Numbers)]
Modules = Annotated[AllLinear | tuple[str, ...], _read(all_linear_or_names, ModuleNames)]
Names = Annotated[str | tuple[str, ...], _read(name_or_names, OneOrSeveral[Name])]
ColumnName = Annotated[str, _read(column_of_a_format, Column)]
ColumnsOrText = dict[ColumnName, Name] | Annotated[str, Field(pattern="=")]
Columns = Annotated[dict[ColumnName, Name], _read(columns_or_text, ColumnsOrText)]
Share = Annotated[Fraction, _read(parse_share, Fraction | Percentage)]
Confidence = Annotated[AboveHalf, _read(parse_share, AboveHalf | Percentage)]
Bytes = Annotated[Count, _read(parse_bytes, BytesOrText)]
Seconds = Annotated[PositiveFloat, _read(parse_seconds, SecondsOrText)]


class ModelSpec(Frozen):
    """The frozen base model: a hub id, a folder with safetensors weights, or a GGUF file."""

    id: str = Field(min_length=1)
    """Hub id, folder, .gguf file, or `embedded` for the small pretrained model that comes with rankscope."""
    revision: str | None = None
    """Hub revision (branch, tag, commit). Not for folders."""
    commit: str | None = None
    """Commit of that revision when the study began; rankscope writes it, and all later runs load it."""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Type of products and of the base weights in them. `auto`: bfloat16 on GPUs that have it, and for models 512
    or more wide on CPUs with AVX512_BF16 or AMX; else float32. Adapters, norms and sums are float32."""
    device: str = "auto"
    """`auto`, `cpu`, `cuda`, `cuda:1`, or `mps` for Apple's GPUs, which has not been measured. `auto`: a CUDA GPU, else
    the CPU."""
    quantization: Literal["nf4", "int8"] | None = None
    """Quantize the base's linear layers to 4 bits (`nf4`) or 8 (`int8`); needs `rankscope[quantization]`."""
    dequantize: bool = False
    """Load a checkpoint in FP8 or MXFP4 as weights of `dtype`."""

    @model_validator(mode="after")
    def _one_way(self) -> Self:
        if self.dequantize and self.quantization:
            raise ValueError(f"give dequantize or quantization: {self.quantization}, not both")
        return self


class DataSpec(Frozen):
    """Instruction data: files, folders or hub ids."""

    id: Names
    """Hub id, file, folder, or `embedded` for the Python functions that come with rankscope; or several of them."""
    config: str | None = None
    """Configuration of a hub dataset that has several."""
    revision: str | None = None
    """Hub revision (branch, tag, commit). Not for files."""
    commits: dict[str, str] = {}  # noqa: RUF012  pydantic copies it
    """Commit of each hub id when the study began; rankscope writes them, and all later runs read them."""
    split: Name | None = None
    """Split to train on. Default: `train`, or the only one there is."""
    format: Literal["auto", "alpaca", "prompt_completion", "messages", "text"] = "auto"
    """`auto` picks the format that matches the columns; alpaca has `instruction`, `input` and `output`."""
    columns: Columns = {}  # noqa: RUF012  pydantic copies it
    """The data's own names of columns, by the names that formats read: `prompt: question`, `completion: answer`."""
    template: str = DEFAULT_TEMPLATE
    """Prompt of alpaca rows. Rows without an input leave out the line with `{input}`."""
    template_without_input: str | None = None
    """Prompt of alpaca rows without an input, instead of `template` without that line."""
    chat_template: str | None = None
    """`chatml`, or a Jinja template or a file with one, for conversations. Default: the tokenizer's own."""
    loss_on: Literal["assistant", "last", "completion", "all"] | None = None
    """Tokens to learn: all answers (`assistant`), the last (`last`), what follows the prompt (`completion`), or `all`.
    Default: `assistant` for conversations, `completion` for prompt and answer, `all` for plain text."""
    max_length: Count = 1024
    """Longest sequence, in tokens. Longer rows are truncated at the end, and counted."""
    max_rows: Count | None = None
    """Use only the first so many rows, for a quick look."""
    eval_rows: Count | None = None
    """Held-out rows. Default: 5% of the rows, at least 200, at most 1,000, at most a quarter (but 32 of 64 or more)."""
    split_seed: Seed = 0
    """Seed of the split into training and held-out rows."""
    eval_dataset: Names | None = None
    """Evaluation set of its own, instead of held-out rows: hub id, file or folder, or several of them."""
    eval_split: Name | None = None
    """Split of `id` to evaluate on, instead of held-out rows."""
    skip_bad_rows: bool = False
    """Leave out rows with missing or wrong fields, and count them. Without it they are an error."""
    force: bool = False
    """Train even on fewer than 8 rows."""

    @property
    def ids(self) -> tuple[str, ...]:
        return (self.id,) if isinstance(self.id, str) else self.id

    @property
    def eval_ids(self) -> tuple[str, ...]:
        return (self.eval_dataset,) if isinstance(self.eval_dataset, str) else self.eval_dataset or ()

    @property
    def name(self) -> str:
        """Sources as text, such as `a.jsonl + b.jsonl`."""
        return " + ".join(self.ids)

    @field_validator("template", "template_without_input")
    @classmethod
    def _is_template(cls, template: str | None, info: ValidationInfo) -> str | None:
        if template is None:
            return None
        found, both = set(re.findall(r"\{(\w+)\}", template)), {"instruction", "input"}
        written = re.findall(r"\{\{(?:instruction|input)\}\}|\{\s*\w[\w.:!-]*\s*\}", template)
        if unknown := [text for text in written if text[1:-1] not in both]:
            what = f"unknown placeholder {unknown[0]}"
            raise ValueError(f"{what}: a template has {{instruction}} and {{input}}, and the answer follows by itself")
        if "\\n" in template:
            how = r"""--set 'data.template="{instruction}\n{input}"'"""
            raise ValueError(f"holds a backslash and an n; a line break is \\n in double quotes, as in {how}")
        if info.field_name == "template" and found != both:
            raise ValueError("must contain {instruction} and {input}: a row's input is never dropped")
        if info.field_name == "template_without_input" and found != {"instruction"}:
            raise ValueError("must contain {instruction}, and no {input}")
        return template

    @field_validator("chat_template")
    @classmethod
    def _is_chat_template(cls, template: str | None) -> str | None:
        if template is None or template == CHATML or is_jinja(template):
            return template
        raise ValueError(f"no such file, and no Jinja template; expected {CHATML}, a file with a template, or its text")

    @model_validator(mode="after")
    def _one_evaluation_set(self) -> Self:
        if self.eval_dataset is not None and self.eval_split is not None:
            raise ValueError("give eval_dataset or eval_split, not both")
        if self.eval_split == (self.split or "train"):
            raise ValueError(f"eval_split: {self.eval_split} is the split to train on; name another one")
        if shared := set(self.ids).intersection(self.eval_ids):
            raise ValueError(f"eval_dataset: {min(shared)} is what is trained on; name another one")
        return self


class AdapterSpec(Frozen):
    """LoRA settings that all candidates share."""

    alpha: Alphas = 32.0
    """`lora_alpha`: a number, or a multiple of the rank such as `2r`; or a list. Of several, each rank is judged at its
    best."""
    target_modules: Modules = "all-linear"
    """Layers that get an adapter: `all-linear`, `all-linear+experts`, or names such as `q_proj`. `all-linear` has no
    routed experts; neither has routers."""
    lora_dropout: float = Field(default=0.0, ge=0.0, lt=1.0)
    """Dropout probability of an adapter's inputs during training."""
    use_rslora: bool = False
    """Scale updates by alpha/sqrt(rank) instead of alpha/rank (Kalajdzievski 2023, arXiv:2312.03732)."""
    init_lora_weights: Literal["kaiming", "gaussian"] = "kaiming"
    """Initialization of A: PEFT's default (`kaiming`) or `gaussian`. B starts at zero."""
    loraplus_lr_ratio: float = Field(default=16.0, ge=1.0)
    """Ratio of B's learning rate to A's in the variant `loraplus` (Hayou et al. 2024, arXiv:2402.12354)."""
    peft: Annotated[dict[str, Any], BeforeValidator(checked_options, json_schema_input_type=dict[str, Any])] = {}  # noqa: RUF012
    """Further fields of PEFT's LoraConfig, such as `layers_to_transform` or `modules_to_save`. Those that the packed
    forward lacks are trained by PEFT's own."""
    rank_pattern: dict[str, Rank] = {}  # noqa: RUF012  pydantic copies it
    """Ranks of single layers, by name, in the variant `pattern`. `rankscope pattern` proposes them."""

    @property
    def alphas(self) -> tuple[float | str, ...]:
        return self.alpha if isinstance(self.alpha, tuple) else (self.alpha,)


class TrainingSpec(Frozen):
    """The training recipe of every trial. Give `steps` or `epochs`."""

    steps: Count | None = None
    """Optimizer steps per trial."""
    epochs: PositiveFloat | None = None
    """Passes over the training rows, instead of `steps`. Default without either: 1."""
    batch_size: Count = 8
    """Examples per trial and micro-step; an optimizer step has `gradient_accumulation_steps` micro-steps."""
    gradient_accumulation_steps: Count = 1
    """Micro-steps per optimizer step."""
    lr_scheduler_type: Literal["cosine", "linear", "constant"] = "cosine"
    """Learning rate schedule after the warm-up: decay to 0 at the end, or constant."""
    warmup_ratio: float = Field(default=0.03, ge=0.0, le=1.0)
    """Share of the steps in which the learning rate rises from 0 to its peak."""
    weight_decay: float = Field(default=0.0, ge=0.0)
    """Weight decay of AdamW, for matrices."""
    max_grad_norm: float = Field(default=1.0, ge=0.0)
    """Gradient norm to which each trial is clipped by itself; 0 for no clipping."""
    adam_beta1: float = Field(default=0.9, ge=0.0, lt=1.0)
    """Decay of AdamW's running mean of the gradient."""
    adam_beta2: float = Field(default=0.999, ge=0.0, lt=1.0)
    """Decay of AdamW's running mean of the squared gradient."""
    adam_epsilon: PositiveFloat = 1e-8
    """Term in AdamW's denominator, against division by zero."""
    optim: Literal["adamw_torch_fused", "adamw_8bit", "paged_adamw_32bit", "paged_adamw_8bit"] = "adamw_torch_fused"
    """AdamW with float32 states, or bitsandbytes' with 8-bit ones; `paged` states leave a GPU that is full."""
    base_dropout: Literal["off", "keep"] = "off"
    """The base model's own dropout, off since it adds noise to comparisons. `keep` trains every trial alone."""
    evals: Count = 4
    """Held-out evaluations per trial, evenly spaced; the last one is at the end."""
    engine: Literal["packed", "peft"] = "packed"
    """`packed` trains several trials together; `peft` trains one at a time with PEFT's own forward."""
    isolated: bool = False
    """Train every trial alone, in its own process."""
    trials_per_pack: Count | None = None
    """Largest number of trials that train together. Default: as many as fit in memory and fill the device."""
    checkpoint_minutes: PositiveFloat = 5.0
    """Interval of checkpoints, from which a stopped pack resumes; one more is written at the end."""
    checkpoint_steps: Count | None = None
    """Steps between checkpoints, instead of minutes."""

    @property
    def effective_batch_size(self) -> int:
        """Examples per trial and optimizer step."""
        return self.batch_size * self.gradient_accumulation_steps

    @model_validator(mode="after")
    def _one_length(self) -> Self:
        if self.steps is not None and self.epochs is not None:
            raise ValueError("give steps or epochs, not both")
        return self


class MeasureSpec(Frozen):
    """Measurement of each candidate's cost: memory alone, in fresh processes; time in one, in which they take turns."""

    profiles: bool = True
    """Whether to measure memory and time."""
    repeats: Count = 2
    """Fresh processes per candidate that measure its memory, interleaved with those of the others."""
    warmup_steps: int = Field(default=2, ge=0)
    """Steps before the measured ones."""
    steps: Count = 8
    """Steps of each of these processes, on batches spread evenly over the schedule."""
    rounds: Count = 24
    """Least number of steps of each candidate that are timed, side by side with the others'; see docs/method.md."""
    forgetting: str | None = Field(default=None, min_length=1)
    """General text for the loss before and after training: a .txt file, or data with a `text` column."""
    forgetting_rows: Count = 64
    """Largest number of general text sequences, each of at most `data.max_length` tokens."""
    answers: int = Field(default=3, ge=0)
    """Held-out prompts that the base model and each candidate answer at the end."""
    answer_tokens: Count = 96
    """Longest answer, in tokens."""
    task: Annotated[str, AfterValidator(checked_task)] | None = None
    """Task on which the base model and every finished adapter are scored: `exact_match`, `choice`, `choice_norm`,
    `regex:PATTERN`, `FILE.py:FUNCTION` or `lm_eval:TASK[,TASK]`; see docs/guides/task.md."""
    task_items: Count = 1000
    """Largest number of held-out rows, or of documents of each of the harness's tasks, that are scored."""
    task_tokens: Count = 256
    """Longest answer that is scored, in tokens. The harness's tasks have their own."""


LOSS_MARGIN = 0.01  # default margin as a share of the loss


class VerdictSpec(Frozen):
    """Criteria of the conclusion."""

    margin_of: Literal["gain", "loss"] = "gain"
    """What the margin is a share of: what fine-tuning gains (the untrained model's held-out loss minus that of the best
    candidate, or of full fine-tuning where it is better), or the best candidate's loss."""
    margin: Share = 0.05
    """Largest loss above the best of a rank that is good enough, as a share or as `2%`. Default: 5% of the gain, or 1%
    of the loss."""
    by: Literal["loss", "task"] | None = None
    """What the verdict follows: held-out loss, or the score of `measure.task`. Default: the task where there is one."""
    task_margin: Share = 0.1
    """Largest score below the best of a rank that is good enough, as a share of what fine-tuning gains on the task."""
    confidence: Confidence = 0.95
    """Confidence level of the intervals and the verdict, above a half: 0.9, or `90%`."""
    max_gpu_memory: Bytes | None = None
    """Largest GPU memory of a recommended rank, in bytes or as `24GB`."""
    max_runtime: Seconds | None = None
    """Longest training of one trial, alone, for a recommended rank; in seconds or as `2h`."""

    @model_validator(mode="before")
    @classmethod
    def _default_margin(cls, values: Any) -> Any:
        if isinstance(values, Mapping) and values.get("margin") is None and values.get("margin_of") == "loss":
            return {**values, "margin": LOSS_MARGIN}
        return values

    @property
    def loss_margin(self) -> float:
        """Margin as a share of the loss, where the untrained model's is unknown: of truncations and searches."""
        return self.margin if self.margin_of == "loss" else LOSS_MARGIN


LORA_RATE_OVER_FULL = 10
"""Ratio of LoRA's best learning rate to full fine-tuning's: about 10 at every rank, model and dataset in Schulman et
al. 2025, "LoRA Without Regret" (https://thinkingmachines.ai/blog/lora/)."""


class ReferenceSpec(Frozen):
    """Full fine-tuning of every weight on the same batches, as the baseline of the candidates' regret."""

    full: bool = False
    """Whether to train it. `full` among the ranks has the same effect."""
    learning_rates: Rates | None = None
    """Learning rates. Default: a tenth of each candidate learning rate, as full fine-tuning needs lower ones."""

    @model_validator(mode="after")
    def _rates_need_full(self) -> Self:
        if self.learning_rates is not None and not self.full:
            raise ValueError("learning_rates are given, but full is false: nothing would be trained at them")
        return self


class StudySpec(Frozen):
    """One question: a model, data, candidates, seeds and a recipe."""

    name: str = Field(default="rankscope-study", pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,99}$")
    """Name of the study, and of its directory unless another is given. Default: after the model and data."""
    model: ModelSpec
    """The base model, which stays frozen."""
    data: DataSpec
    """The instruction data to train on and to hold out."""
    ranks: Ranks = (8, 128, 256)
    """LoRA ranks to compare. `full` among them adds full fine-tuning as a baseline."""
    learning_rates: Rates = (2e-4,)
    """Peak learning rates. Of several, each rank is judged at its best."""
    seeds: Seeds = (0, 1, 2)
    """Seeds to train each candidate with. A single seed gives no measure of uncertainty."""
    seeds_by_rank: dict[Rank, Seeds] = {}  # noqa: RUF012  pydantic copies it
    """Seeds to train the plain LoRA candidates of single ranks with besides. `run --until-settled` adds them."""
    variants: Variants = ()
    """Variants to train beside plain LoRA at each rank, learning rate and alpha."""
    adapter: AdapterSpec = AdapterSpec()
    """LoRA settings shared by all candidates."""
    training: TrainingSpec = TrainingSpec()
    """The training recipe, the same for every trial."""
    reference: ReferenceSpec = ReferenceSpec()
    """Full fine-tuning, as a baseline."""
    measure: MeasureSpec = MeasureSpec()
    """How to measure each candidate's cost."""
    verdict: VerdictSpec = VerdictSpec()
    """When a rank is recommended."""

    @model_validator(mode="before")
    @classmethod
    def _full_is_the_reference(cls, values: Any) -> Any:
        """Replace `full` among the ranks by `reference.full`: a candidate's rank is always a number."""
        ranks = values.get("ranks") if isinstance(values, Mapping) else None
        with suppress(ValueError):  # which the field itself says
            ranks = ranks_of(ranks)
        if not isinstance(ranks, list | tuple) or FULL not in ranks:
            return values
        numbers = [rank for rank in ranks if rank != FULL]
        reference = values.get("reference") or {}
        if isinstance(reference, ReferenceSpec):
            reference = reference.model_dump(exclude_defaults=True)
        if len(ranks) - len(numbers) > 1:
            raise ValueError(f"ranks: listed twice: {FULL}")
        if not numbers:
            raise ValueError(f"ranks: {FULL} is the baseline of the ranks: give at least one number beside it")
        if isinstance(reference, Mapping) and reference.get("full") is False:
            raise ValueError(f"ranks: {FULL} is among them, but reference.full is false")
        wanted = {**reference, "full": True} if isinstance(reference, Mapping) else reference
        return {**values, "ranks": numbers, "reference": wanted}

    @model_validator(mode="after")
    def _makes_sense(self) -> Self:
        for rank in self.seeds_by_rank:
            if rank not in self.ranks:
                raise ValueError(f"seeds_by_rank: {rank} is none of the ranks: {', '.join(map(str, self.ranks))}")
        if self.verdict.by == "task" and self.measure.task is None:
            raise ValueError("verdict.by: task, but the study has none: give measure.task")
        if "rslora" in self.variants and self.adapter.use_rslora:
            raise ValueError("variants: rslora is what adapter.use_rslora makes of all candidates")
        if ("pattern" in self.variants) != bool(self.adapter.rank_pattern):
            raise ValueError("variants: pattern and adapter.rank_pattern need each other: see `rankscope pattern`")
        if "pattern" in self.variants and len(self.ranks) > 1:
            raise ValueError("variants: pattern is held against one rank: give one")
        unique(tuple(candidate.name for candidate in self.candidates()))  # which have six digits of alpha
        if self.model.quantization and (wrong := self.trains_the_base(self.model.quantization)):
            raise ValueError(f"{wrong}: leave out one")
        return self

    def trains_the_base(self, kind: str) -> str | None:
        """What the study asks of a base's weights that they lack in `kind`; None where it asks for nothing."""
        if self.reference.full:
            return f"reference.full: the weights of a model in {kind} cannot be trained"
        for variant in sorted({"pissa", "olora"}.intersection(self.variants)):
            return f"variants: {variant} begins from the base's weights, of which {kind} keeps few digits"
        return None

    def candidates(self) -> list[Candidate]:
        """Grid of ranks, learning rates and alphas, lowest rank first, for plain LoRA and then for each variant,
        whatever the order in which ranks, rates and variants were added."""
        shared = self.adapter.model_dump(exclude={"alpha", "loraplus_lr_ratio", "rank_pattern"})
        plain = [
            Candidate(rank=rank, learning_rate=rate, lora_alpha=alpha, alpha_in_name=number > 0, **shared)
            for rank, rate in product(sorted(self.ranks), sorted(self.learning_rates))
            for number, alpha in enumerate(dict.fromkeys(alpha_of(alpha, rank) for alpha in self.adapter.alphas))
        ]
        own: dict[str, dict[str, Any]] = {
            "rslora": {"use_rslora": True},
            "loraplus": {"loraplus_lr_ratio": self.adapter.loraplus_lr_ratio},
            "pattern": {"rank_pattern": tuple(self.adapter.rank_pattern.items())},
        }
        others = [
            candidate.model_copy(update={"variant": variant, **own.get(variant, {})})
            for variant, candidate in product(sorted(self.variants, key=get_args(Variant).index), plain)
        ]
        return plain + others

    def seeds_of(self, candidate: Candidate) -> list[int]:
        """Seeds of a candidate: those of the study, and of plain LoRA also those of its rank."""
        of_rank = self.seeds_by_rank.get(candidate.rank, ()) if candidate.variant == PLAIN else ()
        return sorted({*self.seeds, *of_rank})

    def trials(self) -> list[Trial]:
        """Every candidate with each of its seeds, in a fixed order."""
        seeds, candidates = sorted({*self.seeds, *chain(*self.seeds_by_rank.values())}), self.candidates()
        known = [(candidate, self.seeds_of(candidate)) for candidate in candidates]
        return [Trial(candidate=candidate, seed=seed) for seed in seeds for candidate, own in known if seed in own]

    def profiled(self) -> dict[str, Candidate]:
        """Candidates to profile, by profile name: each rank and variant once, as cost depends neither on the learning
        rate nor on alpha, and the lowest rank once more as the control."""
        first: dict[str, Candidate] = {}
        for candidate in self.candidates():
            first.setdefault(candidate.profile_name, candidate)
        return first | {CONTROL: next(iter(first.values()))}

    def reference_trials(self) -> list[FullTrial]:
        """Full fine-tuning at each of its learning rates with every seed; empty unless `reference.full`."""
        if not self.reference.full:
            return []
        rates = self.reference.learning_rates or [divided(r, LORA_RATE_OVER_FULL) for r in self.learning_rates]
        return [FullTrial(learning_rate=rate, seed=seed) for seed in sorted(self.seeds) for rate in sorted(rates)]
