"""The options of a fine-tuning run."""

import dataclasses
import math
from dataclasses import dataclass
from typing import Any

from mlx_openelm.errors import OpenELMError
from mlx_openelm.finetuning.refinements.options import (
    RefinementOptions,
    adapter_scale,
    check_refinements,
)
from mlx_openelm.options import MODEL_PANEL, OUTPUT_PANEL, check_options, option
from mlx_openelm.paths import PathText
from mlx_openelm.reporting.trackers import TRACKERS

OBJECTIVES = ("sft", "dpo", "orpo", "distill")

_AUTO = "auto:"
_BIG = 2**31 - 1


_DATA = "Data"  # headings in --help
_OPTIMIZATION = "Optimization"
_BATCHES = "Batches and memory"
_SCHEDULE = "Schedule and checkpoints"


def _read_rank(text: str) -> int | str:
    return int(text) if text.isdecimal() and len(text) < 9 else text


@dataclass(frozen=True, slots=True)
class FinetuneRecipe(RefinementOptions):
    """The options of a fine-tuning run, in a recipe file and on the command line.

    A step is one update of the optimizer. It uses `grad_accumulation_steps` batches of
    `batch_size` samples (with `pack`: rows). `resolve` replaces None by values that
    depend on data and model.
    """

    data: PathText = option(
        help="Examples: a .jsonl, .json or .parquet file, or a folder with "
        "train.jsonl.",
        panel=_DATA,
    )
    model: PathText = option("demo", "Model to train: demo, a folder, or a Hub id.")
    adapter_path: PathText | None = option(
        None,
        "Folder to write: the adapter, checkpoints and a report.",
        shown_default="adapters/<data name>",
    )
    fine_tune_type: str = option(
        "lora",
        "Train a low-rank adapter (lora, dora) or all weights (full).",
        panel=MODEL_PANEL,
        choices=("lora", "dora", "full"),
    )
    objective: str = option(
        "sft",
        "Training objective: sft on answers; dpo or orpo on pairs of a preferred and a "
        "rejected answer; distill on answers and a {teacher}.",
        panel=_OPTIMIZATION,
        choices=OBJECTIVES,
    )
    num_layers: int = option(
        -1,
        "Last transformer layers to train; -1 trains all.",
        panel=MODEL_PANEL,
    )
    rank: int | str = option(
        16,
        "Rank of the adapter; auto:16 gives each module a rank in proportion to its "
        "width, 16 on average.",
        panel=MODEL_PANEL,
        read=_read_rank,
    )
    scale: float = option(
        2.0,
        "Factor of the low-rank product (the factor itself, not alpha / rank).",
        panel=MODEL_PANEL,
        least=1e-9,
        most=1e9,
    )
    dropout: float = option(
        0.0,
        "Dropout rate on the input of the adapter.",
        panel=MODEL_PANEL,
        least=0.0,
        most=0.99,
    )
    keys: tuple[str, ...] = option(
        (),
        "Linear layer to adapt, attn.qkv_proj for example; repeatable.",
        panel=MODEL_PANEL,
        shown_default="all linear layers",
    )
    adapt_embedding: bool = option(
        False,
        "Also adapt the token embedding, for inputs only, as CoreNet and PEFT do: the "
        "tied output head does not change. Stock mlx-lm refuses such an adapter.",
        panel=MODEL_PANEL,
    )
    prompt_key: str | None = option(
        None, "Key of the prompt in each record of {data}.", panel=_DATA
    )
    completion_key: str | None = option(
        None, "Key of the answer in each record of {data}.", panel=_DATA
    )
    template: str | None = option(
        None,
        "Prompt template: raw, instruct, alpaca or openelm-peft.",
        panel=_DATA,
        shown_default="the model's, or one that fits the data",
    )
    mask_prompt: bool | None = option(
        None,
        "Leave the tokens of prompts out of the loss.",
        panel=_DATA,
        flags=("--mask-prompt/--no-mask-prompt",),
        shown_default="on if records have prompts",
    )
    repair_text: bool = option(
        False,
        "Repair texts with ftfy before they are tokenized, as CoreNet does: wrongly "
        "decoded characters, curly quotes, ligatures.",
        panel=_DATA,
    )
    turns: str = option(
        "all",
        "Answers of a conversation to train on.",
        panel=_DATA,
        choices=("all", "last"),
    )
    max_seq_length: int | None = option(
        None,
        "Maximum length of a sample in tokens; longer ones are truncated.",
        panel=_BATCHES,
        shown_default="2048, or the model's context if shorter",
        least=2,
        most=_BIG,
    )
    max_prompt_length: int | None = option(
        None,
        "Maximum length of the prompt of a pair in tokens.",
        panel=_BATCHES,
        shown_default="half of {max_seq_length}",
        least=1,
        most=_BIG,
    )
    pack: bool = option(
        False,
        "Pack several samples into each row of {max_seq_length} tokens.",
        panel=_BATCHES,
    )
    epochs: float | None = option(
        None,
        "Passes over the data.",
        panel=_SCHEDULE,
        shown_default="3, without {iters}",
        least=1e-6,
        most=1e5,
    )
    iters: int | None = option(
        None,
        "Training steps, instead of {epochs}.",
        panel=_SCHEDULE,
        least=1,
        most=_BIG,
    )
    batch_size: int = option(
        4,
        "Samples (with {pack}: rows) in a batch.",
        panel=_BATCHES,
        least=1,
        most=2**16,
    )
    grad_accumulation_steps: int = option(
        1,
        "Batches in one training step.",
        panel=_BATCHES,
        least=1,
        most=2**16,
    )
    optimizer: str = option(
        "adamw",
        "Optimizer.",
        panel=_OPTIMIZATION,
        choices=("adamw", "adam", "sgd", "lion", "adafactor", "muon"),
    )
    learning_rate: float | None = option(
        None,
        "Peak learning rate.",
        panel=_OPTIMIZATION,
        shown_default="3e-4; for pairs 5e-5",
        least=0.0,
        most=1e3,
    )
    final_learning_rate: float | None = option(None, least=0.0, most=1e3)
    schedule: str = option(
        "cosine",
        "Learning-rate schedule after the warm-up.",
        panel=_OPTIMIZATION,
        choices=("cosine", "linear", "constant"),
    )
    warmup_steps: int | None = option(
        None,
        "Steps over which the learning rate rises.",
        panel=_OPTIMIZATION,
        shown_default="a tenth of the run, at most 100",
        least=0,
        most=_BIG,
    )
    betas: tuple[float, float] = (0.9, 0.95)
    eps: float = option(1e-8, least=1e-30, most=1.0)
    weight_decay: float = option(
        0.0, "Weight decay of the optimizer.", panel=_OPTIMIZATION, least=0.0, most=1e3
    )
    clip_norm: float = option(
        1.0,
        "Maximum gradient norm; 0 does not clip.",
        panel=_OPTIMIZATION,
        least=0.0,
        most=1e9,
    )
    z_loss: float = option(
        0.0,
        "Weight of the z-loss (the squared log-partition function).",
        panel=_OPTIMIZATION,
        least=0.0,
        most=1e3,
    )
    dpo_loss: str = option(
        "sigmoid",
        "Loss function of dpo.",
        panel=_OPTIMIZATION,
        choices=("sigmoid", "hinge"),
    )
    dpo_beta: float = option(
        0.1,
        "Beta of dpo: a larger one stays nearer to the base model.",
        panel=_OPTIMIZATION,
        least=1e-9,
        most=1e3,
    )
    grad_checkpoint: bool = option(
        False,
        "Gradient checkpointing: recompute activations; less memory, a third more "
        "computation.",
        panel=_BATCHES,
    )
    seed: int = option(
        0, "Seed of the random numbers.", panel=_OPTIMIZATION, least=0, most=_BIG
    )
    steps_per_report: int = option(
        10, "Steps between two reports.", panel=_SCHEDULE, least=1, most=_BIG
    )
    steps_per_eval: int = option(
        200, "Steps between two validations.", panel=_SCHEDULE, least=1, most=_BIG
    )
    val_batches: int = option(
        25,
        "Batches in a validation; -1 takes all.",
        panel=_SCHEDULE,
        least=-1,
        most=_BIG,
    )
    save_every: int = option(
        100, "Steps between two checkpoints.", panel=_SCHEDULE, least=1, most=_BIG
    )
    patience: int | None = option(
        None,
        "Stop early, after N validations without an improvement.",
        panel=_SCHEDULE,
        least=1,
        most=_BIG,
    )
    average_last: int = option(
        0,
        "Also write the mean of the last N checkpoints, to the subfolder average; 0 is "
        "off.",
        panel=OUTPUT_PANEL,
        least=0,
        most=1000,
    )
    sample_prompt: tuple[str, ...] = option(
        (),
        "Prompt that the model continues at every validation; repeatable.",
        panel=OUTPUT_PANEL,
    )
    sample_tokens: int = option(64, least=1, most=_BIG)
    report_to: tuple[str, ...] = option(
        (),
        "Also send the metrics to a tracker; repeatable.",
        panel="Output",
        choices=TRACKERS,
    )
    memory_limit: float | None = option(
        None,
        "Memory that training may use, in GB.",
        panel=_BATCHES,
        shown_default="the memory of this machine",
        least=1e-3,
        most=1e6,
    )
    test: bool = option(False, "Score the test file after training.", panel=_DATA)

    def __post_init__(self) -> None:
        check_options(self)
        if self.num_layers != -1 and self.num_layers < 1:
            raise OpenELMError(
                f"`num_layers` is {self.num_layers}; pass the number of last layers to "
                "train, or -1 for all."
            )
        if self.epochs is not None and self.iters is not None:
            raise OpenELMError("Pass either `epochs` or `iters`, not both.")
        if not all(0 <= beta < 1 for beta in self.betas):
            raise OpenELMError(
                f"`betas` are {self.betas[0]} and {self.betas[1]}; they must be from 0 "
                "to below 1."
            )
        if not self.data:
            raise OpenELMError("`data` is empty; pass a file or a folder of records.")
        _ = self.mean_rank
        if self.fine_tune_type == "full" and (self.keys or self.adapt_embedding):
            name = "keys" if self.keys else "adapt_embedding"
            raise OpenELMError(
                f"`{name}` chooses the modules of an adapter, and `fine_tune_type` "
                "full trains all weights; leave one of them out."
            )
        check_refinements(
            self,
            objective=self.objective,
            fine_tune_type=self.fine_tune_type,
            dropout=self.dropout,
            rank_by_width=self.rank_by_width,
            z_loss=self.z_loss,
        )

    @property
    def adapter_scale(self) -> float:
        """The factor of the low-rank product, as stored with the adapter."""
        return adapter_scale(self, self.scale, self.mean_rank)

    @property
    def masks_by_batch(self) -> bool:
        """Whether dropout masks or noise depend on `batch_size`."""
        return self.dropout > 0 or self.neftune_noise > 0

    @property
    def mean_rank(self) -> int:
        """The rank, or the mean rank with "auto:N".

        Raises:
            OpenELMError: `rank` is neither a positive number nor "auto:N".
        """
        text = str(self.rank).removeprefix(_AUTO)
        if not (text.isascii() and text.isdigit() and len(text) < 9 and int(text)):
            raise OpenELMError(
                f"`rank` is {self.rank!r}; pass a positive number, or auto:16 for "
                "ranks in proportion to each layer's width."
            )
        return int(text)

    @property
    def rank_by_width(self) -> bool:
        return str(self.rank).startswith(_AUTO)

    @property
    def step_size(self) -> int:
        """Samples (or rows) of one update, over all processes."""
        return self.batch_size * self.grad_accumulation_steps

    def resolve(
        self,
        *,
        context_length: int,
        template: str,
        model: str,
        data: str,
        default_length: int,
        default_rate: float,
    ) -> "FinetuneRecipe":
        """Return the recipe with values for options that are None.

        Args:
            default_length, default_rate: defaults of the objective.

        Raises:
            OpenELMError: `max_seq_length` is larger than the model's context.
        """
        longest = self.max_seq_length or min(default_length, context_length)
        if longest > context_length:
            raise OpenELMError(
                f"`max_seq_length` is {longest}, more than the model's context of "
                f"{context_length} tokens; set it to {context_length} or less."
            )
        rate = default_rate if self.learning_rate is None else self.learning_rate
        return dataclasses.replace(
            self,
            model=model,
            data=data,
            template=template,
            max_seq_length=longest,
            max_prompt_length=self.max_prompt_length or longest // 2,
            learning_rate=rate,
            final_learning_rate=(
                rate / 10
                if self.final_learning_rate is None
                else self.final_learning_rate
            ),
            epochs=3.0 if self.epochs is None and self.iters is None else self.epochs,
        )

    def rate_at(self, step: int, steps: int) -> float:
        """Return the learning rate of step number `step`, counted from 0."""
        peak, final = self.learning_rate or 0.0, self.final_learning_rate or 0.0
        warmup = self.warmup_steps
        if warmup is None:
            warmup = min(100, steps // 10)
        if step < warmup:
            return peak * (step + 1) / (warmup + 1)
        done = min(1.0, (step - warmup) / max(1, steps - warmup))
        if self.schedule == "constant":
            return peak
        falling = 1 - done
        if self.schedule == "cosine":
            falling = (1 + math.cos(math.pi * done)) / 2
        return final + (peak - final) * falling

    def to_yaml(self) -> str:
        """Return the recipe as YAML, which `load_recipe` reads back."""
        values: dict[str, Any] = {
            name: list(value) if isinstance(value, tuple) else value
            for name, value in dataclasses.asdict(self).items()
        }
        import yaml

        text: str = yaml.safe_dump(values, sort_keys=False, allow_unicode=True)
        return text
