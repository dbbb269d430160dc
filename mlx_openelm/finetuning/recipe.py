"""The fine-tuning recipe: every option of a run, as one frozen value."""

import dataclasses
import math
from dataclasses import dataclass
from typing import Any

import yaml

from mlx_openelm.errors import OpenELMError

METHODS = ("lora", "dora", "full")
OBJECTIVES = ("sft", "dpo")
OPTIMIZERS = ("adamw", "adam", "sgd", "lion", "adafactor", "muon")
SCHEDULES = ("cosine", "linear", "constant")
TURNS = ("all", "last")
PREFERENCES = ("sigmoid", "hinge")

_AUTO = "auto:"


@dataclass(frozen=True, slots=True)
class FinetuneRecipe:
    """Everything that decides a fine-tuning run; names are those of the flags.

    Steps are updates of the optimizer; one update takes `batch_size` samples (of
    `--pack`: rows), `grad_accumulation_steps` times. What is None is settled when data
    and model are known: the resolved recipe says it.

    Attributes:
        rank: a number, or "auto:N": mean N, each module's in proportion to its width.
        scale: the multiplier of A B, not alpha / rank.
        betas: of AdamW, Adam and Lion; SGD's momentum is the first, Muon's the second.
        mask_prompt: no loss on prompts; None: wherever there is a prompt.
        turns: of a conversation learn "all" answers, or the "last".
        template: how prompts are rendered; None: what is stored with the model, else
            what suits the data.
        final_learning_rate: None: a tenth of `learning_rate`.
        warmup_steps: None: a tenth of the run, at most 100.
        max_seq_length: None: 2048, or the model's context if that is shorter.
        max_prompt_length: of a preference pair; None: half of `max_seq_length`.
        average_last: the mean of the last N saved states, in "average".
        memory_limit: GB that the run must stay below; None: this machine's.
    """

    data: str
    model: str = "demo"
    adapter_path: str | None = None
    fine_tune_type: str = "lora"
    objective: str = "sft"
    num_layers: int = -1
    rank: int | str = 16
    scale: float = 2.0
    dropout: float = 0.0
    keys: tuple[str, ...] = ()
    prompt_key: str | None = None
    completion_key: str | None = None
    template: str | None = None
    mask_prompt: bool | None = None
    turns: str = "all"
    max_seq_length: int | None = None
    max_prompt_length: int | None = None
    pack: bool = False
    epochs: float | None = None
    iters: int | None = None
    batch_size: int = 4
    grad_accumulation_steps: int = 1
    optimizer: str = "adamw"
    learning_rate: float | None = None
    final_learning_rate: float | None = None
    schedule: str = "cosine"
    warmup_steps: int | None = None
    betas: tuple[float, float] = (0.9, 0.95)
    eps: float = 1e-8
    weight_decay: float = 0.0
    clip_norm: float = 1.0
    z_loss: float = 0.0
    dpo_loss: str = "sigmoid"
    dpo_beta: float = 0.1
    grad_checkpoint: bool = False
    seed: int = 0
    steps_per_report: int = 10
    steps_per_eval: int = 200
    val_batches: int = 25
    save_every: int = 100
    patience: int | None = None
    average_last: int = 0
    sample_prompt: tuple[str, ...] = ()
    sample_tokens: int = 64
    memory_limit: float | None = None
    test: bool = False

    def __post_init__(self) -> None:
        for name, known in (
            ("fine_tune_type", METHODS),
            ("objective", OBJECTIVES),
            ("optimizer", OPTIMIZERS),
            ("schedule", SCHEDULES),
            ("turns", TURNS),
            ("dpo_loss", PREFERENCES),
        ):
            value = getattr(self, name)
            if value not in known:
                raise OpenELMError(
                    f"{_flag(name)} is {value!r}; choose {', '.join(known)}."
                )
        for name, (least, most) in _RANGES.items():
            value = getattr(self, name)
            if value is not None and not least <= value <= most:
                raise OpenELMError(
                    f"{_flag(name)} is {value}; it must be a number from {least:g} to "
                    f"{most:g}."
                )
        if self.num_layers != -1 and self.num_layers < 1:
            raise OpenELMError(
                f"--num-layers is {self.num_layers}; say how many of the last layers "
                "to train, or -1 for all."
            )
        if self.epochs is not None and self.iters is not None:
            raise OpenELMError("Both --epochs and --iters were said; say one of them.")
        if not all(0 <= beta < 1 for beta in self.betas):
            raise OpenELMError(
                f"betas are {self.betas[0]} and {self.betas[1]}; they must be from 0 "
                "to below 1."
            )
        if not self.data:
            raise OpenELMError("--data is empty; say a file or a folder of records.")
        _ = self.mean_rank

    @property
    def mean_rank(self) -> int:
        """The rank, or its mean if ranks follow the widths.

        Raises:
            OpenELMError: it is neither a number from 1 on nor "auto:N".
        """
        text = str(self.rank).removeprefix(_AUTO)
        if not (text.isascii() and text.isdigit() and len(text) < 9 and int(text)):
            raise OpenELMError(
                f"--rank is {self.rank!r}; say a number from 1 on, or auto:16 for "
                "ranks in proportion to each layer's width."
            )
        return int(text)

    @property
    def rank_by_width(self) -> bool:
        return str(self.rank).startswith(_AUTO)

    @property
    def step_size(self) -> int:
        """Samples (or rows) that one update takes, over all machines."""
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
        """Return the recipe with what was left open settled, but for the steps.

        Args:
            default_length, default_rate: of the objective.

        Raises:
            OpenELMError: the sequences would be longer than the model's context.
        """
        longest = self.max_seq_length or min(default_length, context_length)
        if longest > context_length:
            raise OpenELMError(
                f"--max-seq-length is {longest}, but the model's context is "
                f"{context_length}; say at most that."
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
        """Return the learning rate of update number `step`, counted from 0."""
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
        """Return the recipe as YAML that `load_recipe` reads back to an equal value."""
        values: dict[str, Any] = {
            name: list(value) if isinstance(value, tuple) else value
            for name, value in dataclasses.asdict(self).items()
        }
        text: str = yaml.safe_dump(values, sort_keys=False, allow_unicode=True)
        return text


# What may differ when a run goes on: it changes what is computed by rounding alone, or
# not at all.
MAY_CHANGE = (
    *("data", "adapter_path", "model", "memory_limit", "grad_checkpoint"),
    *("batch_size", "grad_accumulation_steps"),  # their product stays
    *("steps_per_report", "save_every", "test"),
)


def differences(old: FinetuneRecipe, new: FinetuneRecipe) -> list[str]:
    """Return what forbids going on with `new` where `old` stopped, in words."""
    found = [
        f"{_flag(field.name)} was {getattr(old, field.name)!r} and is now "
        f"{getattr(new, field.name)!r}"
        for field in dataclasses.fields(FinetuneRecipe)
        if field.name not in MAY_CHANGE
        and getattr(old, field.name) != getattr(new, field.name)
    ]
    if old.dropout and old.batch_size != new.batch_size:
        found.append(
            f"--batch-size was {old.batch_size} and is now {new.batch_size}, which "
            "changes what dropout drops"
        )
    if old.step_size != new.step_size:
        found.append(
            f"--batch-size times --grad-accumulation-steps was {old.step_size} and is "
            f"now {new.step_size}"
        )
    return found


_BIG = 2**31 - 1
_RANGES: dict[str, tuple[float, float]] = {
    "scale": (1e-9, 1e9),
    "dropout": (0.0, 0.99),
    "max_seq_length": (2, _BIG),
    "max_prompt_length": (1, _BIG),
    "iters": (1, _BIG),
    "epochs": (1e-6, 1e5),
    "batch_size": (1, 2**16),
    "grad_accumulation_steps": (1, 2**16),
    "learning_rate": (0.0, 1e3),
    "final_learning_rate": (0.0, 1e3),
    "warmup_steps": (0, _BIG),
    "eps": (1e-30, 1.0),
    "weight_decay": (0.0, 1e3),
    "clip_norm": (0.0, 1e9),
    "z_loss": (0.0, 1e3),
    "dpo_beta": (1e-9, 1e3),
    "seed": (0, 2**31 - 1),
    "steps_per_report": (1, _BIG),
    "steps_per_eval": (1, _BIG),
    "val_batches": (-1, _BIG),
    "save_every": (1, _BIG),
    "patience": (1, _BIG),
    "average_last": (0, 1000),
    "sample_tokens": (1, _BIG),
    "memory_limit": (1e-3, 1e6),
}


def _flag(name: str) -> str:
    return f"--{name.replace('_', '-')}"
