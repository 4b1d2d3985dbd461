"""What is asked: a study as frozen pydantic models, YAML in and out.

    spec -> data -> lora -> train, measure -> study -> analysis -> report

A `StudySpec` is complete: every default is written out in the study's directory, so that the file alone says
what was done. Names follow PEFT and transformers where they have one.
"""

from collections.abc import Mapping
from itertools import product
from typing import Annotated, Any, Literal, Self

from pydantic import BeforeValidator, Field, PositiveFloat, model_validator

from rankscope.spec.candidates import (
    CONTROL,
    FULL,
    Candidate,
    Count,
    Frozen,
    FullTrial,
    Rank,
    Seed,
    Trial,
    Variant,
    all_linear_or_names,
    alpha_of,
    alpha_or_multiple,
    as_list,
    divided,
    unique,
)
from rankscope.text.formats import parse_bytes, parse_seconds

EMBEDDED = "embedded"
"""As model.id or data.id: the small pretrained model, or the real code, that come with rankscope."""

DEFAULT_TEMPLATE = "### Question: {instruction}\n{input}\n ### Answer:"


class ModelSpec(Frozen):
    """The frozen base model: a hub id or a folder with safetensors weights."""

    id: str = Field(min_length=1)
    """A hub id, a folder, or `embedded`: the small pretrained model that comes with rankscope."""
    revision: str | None = None
    """A branch, tag or commit on the hub. A folder has none."""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """`auto`: bfloat16 on a GPU that has it, float32 elsewhere. Adapters are always float32."""
    device: str = "auto"
    """`auto`, `cpu`, `cuda` or `cuda:1`."""
    quantization: Literal["nf4", "int8"] | None = None
    """Hold the base's linear layers in 4 bits (`nf4`) or 8 (`int8`), by bitsandbytes: `rankscope[quantization]`."""


class DataSpec(Frozen):
    """Instruction data: a hub id, or a JSON, JSONL, CSV or Parquet file."""

    id: str = Field(min_length=1)
    """A hub id, a file, a folder, or `embedded`: the real code that comes with rankscope."""
    config: str | None = None
    """The configuration's name, for hub data that has several."""
    revision: str | None = None
    """A branch, tag or commit on the hub. Files have none."""
    split: str = "train"
    """The part to read of hub data, or of a folder. A single file has none."""
    format: Literal["auto", "alpaca", "prompt_completion", "messages"] = "auto"
    """`auto`: the one that the columns fit. alpaca has `instruction`, `input` and `output`."""
    template: str = DEFAULT_TEMPLATE
    """The prompt of alpaca rows. The line with `{input}` is left out where a row has none."""
    loss_on: Literal["completion", "all"] = "completion"
    """`completion`: the loss is taken on the answer alone; `all`: on the prompt too."""
    max_length: Count = 1024
    """In tokens. Longer rows are cut at the end, and counted."""
    max_rows: Count | None = None
    """Use only the first rows, for a quick look."""
    eval_rows: Count | None = None
    """Rows held out. Default: 5% of the rows, at least 32 and at most 1,000."""
    split_seed: Seed = 0
    """Decides which rows are held out."""

    @model_validator(mode="after")
    def _template_has_instruction(self) -> Self:
        if "{instruction}" not in self.template or "{input}" not in self.template:
            raise ValueError("template must contain {instruction} and {input}: a row's input is never dropped")
        return self


class AdapterSpec(Frozen):
    """What every candidate shares of its LoRA adapter."""

    alpha: Annotated[float | str, BeforeValidator(alpha_or_multiple)] = 32.0
    """A number, or a multiple of the rank such as `2r`."""
    target_modules: Annotated[Literal["all-linear"] | tuple[str, ...], BeforeValidator(all_linear_or_names)] = (
        "all-linear"
    )
    """`all-linear`, or names of the layers that get an adapter, such as `q_proj`."""
    lora_dropout: float = Field(default=0.0, ge=0.0, lt=1.0)
    """Share of an adapter's inputs that are dropped while it trains."""
    use_rslora: bool = False
    """Scale by alpha/sqrt(rank) instead of alpha/rank (Kalajdzievski 2023, arXiv:2312.03732)."""
    init_lora_weights: Literal["kaiming", "gaussian"] = "kaiming"
    """PEFT's default (`kaiming`) or `gaussian`; B starts at zero in both."""
    loraplus_lr_ratio: float = Field(default=16.0, ge=1.0)
    """Of the variant `loraplus`: B's learning rate over A's (Hayou et al. 2024, arXiv:2402.12354)."""
    rank_pattern: dict[str, Rank] = {}  # noqa: RUF012  pydantic copies it
    """Of the variant `pattern`: the ranks of layers, by name, that differ from the candidate's. `rankscope pattern`
    proposes one."""


class TrainingSpec(Frozen):
    """The recipe, the same for every trial. One of `steps` and `epochs` is used."""

    steps: Count | None = None
    """Optimizer steps of each trial."""
    epochs: PositiveFloat | None = None
    """Default: 1 epoch, where `steps` is not given either."""
    batch_size: Count = 8
    """Examples of one trial in one micro-step; an optimizer step sees `gradient_accumulation_steps` of them."""
    gradient_accumulation_steps: Count = 1
    """Micro-steps of an optimizer step."""
    lr_scheduler_type: Literal["cosine", "linear", "constant"] = "cosine"
    """How the learning rate goes on after the warm-up: down to 0 at the end, or constant."""
    warmup_ratio: float = Field(default=0.03, ge=0.0, le=1.0)
    """Share of the steps over which the learning rate rises from 0."""
    weight_decay: float = Field(default=0.0, ge=0.0)
    """AdamW's, of matrices."""
    max_grad_norm: float = Field(default=1.0, ge=0.0)
    """Each trial's gradient is clipped to this norm by itself; 0 means no clipping."""
    adam_beta1: float = Field(default=0.9, ge=0.0, lt=1.0)
    """AdamW's decay of the gradient's running mean."""
    adam_beta2: float = Field(default=0.999, ge=0.0, lt=1.0)
    """AdamW's decay of the running mean of its square."""
    adam_epsilon: PositiveFloat = 1e-8
    """Added to AdamW's denominator."""
    optim: Literal["adamw_torch_fused", "adamw_8bit", "paged_adamw_32bit", "paged_adamw_8bit"] = "adamw_torch_fused"
    """AdamW's states: in float32, or by bitsandbytes in 8 bits; `paged` ones leave a GPU that is full."""
    base_dropout: Literal["off", "keep"] = "off"
    """The base model's own dropout: noise in a comparison, so off. With `keep` every trial trains alone."""
    evals: Count = 4
    """How often the held-out loss is taken, evenly over the schedule; the last one is at its end."""
    engine: Literal["packed", "peft"] = "packed"
    """`packed`: trials train together; `peft`: one at a time by PEFT's own forward."""
    isolated: bool = False
    """Train every trial alone, in a process of its own."""
    trials_per_pack: Count | None = None
    """At most so many trials train together. Default: as many as memory allows."""
    checkpoint_minutes: PositiveFloat = 5.0
    """A pack that is stopped goes on from its last checkpoint; one is written this often, and at the schedule's end."""
    checkpoint_steps: Count | None = None
    """Write a checkpoint every so many steps instead."""

    @property
    def effective_batch_size(self) -> int:
        """Examples of one trial that one optimizer step sees."""
        return self.batch_size * self.gradient_accumulation_steps

    @model_validator(mode="after")
    def _one_length(self) -> Self:
        if self.steps is not None and self.epochs is not None:
            raise ValueError("give steps or epochs, not both")
        return self


class MeasureSpec(Frozen):
    """How each candidate's cost is measured, alone, in fresh processes."""

    profiles: bool = True
    """Whether memory and time are measured at all."""
    repeats: Count = 2
    """Fresh processes for each candidate, interleaved with those of the others."""
    warmup_steps: int = Field(default=2, ge=0)
    """Steps of a profile before the measured ones."""
    steps: Count = 8
    """Measured steps of a profile, on batches spread evenly over the schedule."""
    forgetting: str | None = Field(default=None, min_length=1)
    """General text, whose loss is taken before and after training: a .txt file, or data with a `text` column."""
    forgetting_rows: Count = 64
    """At most so many sequences of it, each of at most `data.max_length` tokens."""
    answers: int = Field(default=3, ge=0)
    """Held-out prompts that the base model and each candidate answer at the end, to be read side by side."""
    answer_tokens: Count = 96
    """At most so many tokens an answer."""


class VerdictSpec(Frozen):
    """How the conclusion is drawn."""

    margin: float = Field(default=0.01, gt=0.0, lt=1.0)
    """A rank is good enough when its regret is below this share of the best candidate's loss."""
    confidence: float = Field(default=0.95, gt=0.5, lt=1.0)
    """Of the intervals and of the verdict."""
    max_gpu_memory: Annotated[Count, BeforeValidator(parse_bytes)] | None = None
    """In bytes, or as `24GB`: a rank that needs more is not recommended."""
    max_runtime: Annotated[PositiveFloat, BeforeValidator(parse_seconds)] | None = None
    """Of one trial, trained alone; in seconds, or as `2h`: a rank that needs more is not recommended."""


LORA_RATE_OVER_FULL = 10
"""How much higher LoRA's best learning rate is than full fine-tuning's: about tenfold at every rank, model and data
set in Schulman et al. 2025, "LoRA Without Regret" (https://thinkingmachines.ai/blog/lora/)."""


class ReferenceSpec(Frozen):
    """Full fine-tuning, every weight of the model, on the same batches: what the candidates' regret is held against."""

    full: bool = False
    """Whether it is trained. `full` among the ranks says the same."""
    learning_rates: Annotated[tuple[PositiveFloat, ...], BeforeValidator(as_list), Field(min_length=1)] | None = None
    """Default: a tenth of each candidate learning rate, since full fine-tuning needs lower ones."""

    @model_validator(mode="after")
    def _rates_need_full(self) -> Self:
        if self.learning_rates is not None and not self.full:
            raise ValueError("learning_rates are given, but full is false: nothing would be trained at them")
        unique(self.learning_rates or ())
        return self


class StudySpec(Frozen):
    """One question: a model, data, candidates, seeds and a recipe."""

    name: str = Field(default="rankscope-study", pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,99}$")
    """The study's directory, where no other is given. A file without one is named after its model and data."""
    model: ModelSpec
    """The base model, which stays frozen."""
    data: DataSpec
    """What is trained on, and held out."""
    ranks: Annotated[tuple[Rank, ...], BeforeValidator(as_list), Field(min_length=1)] = (8, 128, 256)
    """LoRA ranks to compare. `full` among them adds full fine-tuning, as a reference."""
    learning_rates: Annotated[tuple[PositiveFloat, ...], BeforeValidator(as_list), Field(min_length=1)] = (2e-4,)
    """Peak learning rates. With several, each rank is judged at its best one."""
    seeds: Annotated[tuple[Seed, ...], BeforeValidator(as_list), Field(min_length=1)] = (
        0,
        1,
        2,
    )
    """Each candidate is trained with each of them. One says nothing about how sure a difference is."""
    variants: Annotated[tuple[Variant, ...], BeforeValidator(as_list)] = ()
    """Kinds of LoRA to train beside the plain one, at each rank and learning rate: rslora, pissa, olora, loraplus,
    dora, pattern."""
    adapter: AdapterSpec = AdapterSpec()
    """What every candidate shares of its LoRA adapter."""
    training: TrainingSpec = TrainingSpec()
    """The recipe, the same for every trial."""
    reference: ReferenceSpec = ReferenceSpec()
    """Full fine-tuning, as a reference."""
    measure: MeasureSpec = MeasureSpec()
    """How each candidate's cost is measured."""
    verdict: VerdictSpec = VerdictSpec()
    """How the conclusion is drawn."""

    @model_validator(mode="before")
    @classmethod
    def _full_is_the_reference(cls, values: Any) -> Any:
        """`full` among the ranks asks for the reference: a candidate's rank is always a number."""
        ranks = as_list(values.get("ranks")) if isinstance(values, Mapping) else None
        if not isinstance(ranks, list | tuple) or FULL not in ranks:
            return values
        numbers = [rank for rank in ranks if rank != FULL]
        reference = values.get("reference") or {}
        if isinstance(reference, ReferenceSpec):
            reference = reference.model_dump(exclude_defaults=True)
        if len(ranks) - len(numbers) > 1:
            raise ValueError(f"ranks: listed twice: {FULL}")
        if not numbers:
            raise ValueError(f"ranks: {FULL} is what ranks are held against: give at least one number beside it")
        if isinstance(reference, Mapping) and reference.get("full") is False:
            raise ValueError(f"ranks: {FULL} is among them, but reference.full is false")
        wanted = {**reference, "full": True} if isinstance(reference, Mapping) else reference
        return {**values, "ranks": numbers, "reference": wanted}

    @model_validator(mode="after")
    def _nothing_twice(self) -> Self:
        for field in ("ranks", "learning_rates", "seeds", "variants"):
            try:
                unique(getattr(self, field))
            except ValueError as error:
                raise ValueError(f"{field}: {error}") from None
        names = [candidate.name for candidate in self.candidates()]
        unique(tuple(names))
        return self

    @model_validator(mode="after")
    def _variants_make_sense(self) -> Self:
        if "rslora" in self.variants and self.adapter.use_rslora:
            raise ValueError("variants: rslora is what adapter.use_rslora makes of all candidates")
        if ("pattern" in self.variants) != bool(self.adapter.rank_pattern):
            raise ValueError("variants: pattern and adapter.rank_pattern need each other: see `rankscope pattern`")
        if "pattern" in self.variants and len(self.ranks) > 1:
            raise ValueError("variants: pattern is held against one rank: give one")
        return self

    @model_validator(mode="after")
    def _a_quantized_base_is_not_trained(self) -> Self:
        kind = self.model.quantization
        if kind and self.reference.full:
            raise ValueError(
                f"reference.full: the weights of a model in {kind} cannot be trained: leave one of them out"
            )
        if kind and (from_weights := sorted({"pissa", "olora"}.intersection(self.variants))):
            raise ValueError(
                f"variants: {from_weights[0]} begins from the base's weights, of which {kind} keeps few digits: leave "
                "one of them out"
            )
        return self

    def candidates(self) -> list[Candidate]:
        """The grid of ranks and learning rates, lowest rank first; then the same of each variant."""
        shared = self.adapter.model_dump(exclude={"alpha", "loraplus_lr_ratio", "rank_pattern"})
        plain = [
            Candidate(rank=rank, learning_rate=rate, lora_alpha=alpha_of(self.adapter.alpha, rank), **shared)
            for rank, rate in product(sorted(self.ranks), sorted(self.learning_rates))
        ]
        own: dict[str, dict[str, Any]] = {
            "rslora": {"use_rslora": True},
            "loraplus": {"loraplus_lr_ratio": self.adapter.loraplus_lr_ratio},
            "pattern": {"rank_pattern": tuple(self.adapter.rank_pattern.items())},
        }
        others = [
            candidate.model_copy(update={"variant": variant, **own.get(variant, {})})
            for variant, candidate in product(self.variants, plain)
        ]
        return plain + others

    def trials(self) -> list[Trial]:
        """Every candidate with every seed, in a fixed order."""
        return [Trial(candidate=candidate, seed=seed) for seed in self.seeds for candidate in self.candidates()]

    def profiled(self) -> dict[str, Candidate]:
        """What is profiled, by name: each rank and variant once, since its cost does not depend on the learning rate,
        and the lowest rank once more as the control.
        """
        first: dict[str, Candidate] = {}
        for candidate in self.candidates():
            first.setdefault(candidate.profile_name, candidate)
        return first | {CONTROL: next(iter(first.values()))}

    def reference_trials(self) -> list[FullTrial]:
        """Full fine-tuning at each of its learning rates with every seed; none where it was not asked for."""
        if not self.reference.full:
            return []
        rates = self.reference.learning_rates or [divided(r, LORA_RATE_OVER_FULL) for r in self.learning_rates]
        return [FullTrial(learning_rate=rate, seed=seed) for seed in self.seeds for rate in sorted(rates)]
