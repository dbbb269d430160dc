"""Recipe of a pre-training run: the sections of the files in recipes/pretrain."""

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import ClassVar

from mlx_openelm.config import OpenELMConfig, pad_vocabulary
from mlx_openelm.errors import OpenELMError
from mlx_openelm.layerwise_scaling import (
    FFN_DIM_DIVISOR,
    FFN_MULTIPLIERS,
    QKV_MULTIPLIERS,
    SHAPES,
)
from mlx_openelm.paths import PathText

Multipliers = float | tuple[float, ...]


@dataclass(frozen=True, slots=True)
class ModelRecipe:
    """A released size by `name`, or the parameters of layer-wise scaling.

    Attributes:
        shape: layerwise, reverse, crown or frame: how a pair of multipliers becomes one
            for each layer; see `interpolate_multipliers`.
        spare_rows: pad the embedding like CoreNet (32128 rows for Llama's 32000
            pieces); `convert` removes the padding.
    """

    name: str | None = None
    num_layers: int | None = None
    model_dim: int | None = None
    head_dim: int | None = None
    num_gqa_groups: int = 4
    qkv_multipliers: Multipliers = QKV_MULTIPLIERS
    ffn_multipliers: Multipliers = FFN_MULTIPLIERS
    ffn_dim_divisor: int = FFN_DIM_DIVISOR
    shape: str = "layerwise"
    max_context_length: int = 2048
    spare_rows: bool = False

    def __post_init__(self) -> None:
        for name in ("head_dim", "num_gqa_groups", "ffn_dim_divisor"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise OpenELMError(f"model.{name} is {value}; it must be at least 1.")
        if self.shape not in SHAPES:
            raise OpenELMError(
                f"model.shape is {self.shape!r}; expected one of {', '.join(SHAPES)}."
            )
        if self.name is not None and self.shape != "layerwise":
            raise OpenELMError(
                f"model.shape is {self.shape}, but the sizes of model.name {self.name} "
                "are fixed; leave out one of them."
            )
        for name in ("qkv_multipliers", "ffn_multipliers"):
            value = getattr(self, name)
            factors = value if isinstance(value, tuple) else (value,)
            if not all(0 < factor < math.inf for factor in factors):
                raise OpenELMError(
                    f"model.{name} is {value}; it must be above 0 and at most 1e9."
                )

    def build(self, vocab_size: int) -> OpenELMConfig:
        """Return the config for a vocabulary of `vocab_size` pieces."""
        if self.spare_rows:
            vocab_size = pad_vocabulary(vocab_size)
        if self.name is not None:
            config = OpenELMConfig.preset(self.name, vocab_size=vocab_size)
            return dataclasses.replace(
                config, max_context_length=self.max_context_length
            )
        if self.num_layers is None or self.model_dim is None or self.head_dim is None:
            raise OpenELMError(
                "The recipe's model needs a name (270M, 450M, 1.1B, 3B), or "
                "num_layers, model_dim and head_dim."
            )
        return OpenELMConfig.scaled(
            num_layers=self.num_layers,
            model_dim=self.model_dim,
            head_dim=self.head_dim,
            num_gqa_groups=self.num_gqa_groups,
            qkv_multipliers=self.qkv_multipliers,
            ffn_multipliers=self.ffn_multipliers,
            ffn_dim_divisor=self.ffn_dim_divisor,
            shape=self.shape,
            vocab_size=vocab_size,
            max_context_length=self.max_context_length,
        )


@dataclass(frozen=True, slots=True)
class TokenizerRecipe:
    """A tokenizer.model at `path`; default: train one with `vocab_size` pieces."""

    path: PathText | None = None
    vocab_size: int = 4096


@dataclass(frozen=True, slots=True)
class CorpusRecipe:
    """One corpus of a mixture.

    Attributes:
        files: patterns, relative to the working directory; {000..099} is a range of
            numbered files, all of which must exist.
        name, source: what it is called and where to get it, for `--check-data`.
        text_key: key of the text in JSON records, or its parquet column.
        token_share: share of the tokens; default: its own in the data. Shares of all
            corpora are relative to their sum; those of some are fractions of all
            tokens, and the others get the rest.
    """

    REMOVED_KEYS: ClassVar[Mapping[str, str]] = {
        "weight": "it counted documents, so corpora of long documents got more tokens "
        "than their weight; leave it out to read every document once an epoch "
        "(data.mixture: natural), or set token_share, which counts tokens"
    }

    files: tuple[PathText, ...]
    name: str = ""
    source: str = ""
    text_key: str = "text"
    token_share: float | None = None

    def __post_init__(self) -> None:
        if self.token_share is not None and not 0 < self.token_share <= 1e9:
            raise OpenELMError(
                f"The token_share of a corpus is {self.token_share}; it must be above "
                "0 and at most 1e9."
            )


@dataclass(frozen=True, slots=True)
class DataRecipe:
    """Training text, and how documents become sequences.

    Without `packing`, text is streamed and follows OpenELM's rules: pieces of
    `words_per_piece` words, dropped below `min_characters` or `min_tokens`, one per
    padded sequence. With it, the text is in memory, and documents are concatenated into
    full sequences.

    Attributes:
        train: files as in `CorpusRecipe`, for a single corpus.
        corpora: more than one corpus, instead of `train`.
        mixture: "natural": the parts of all files in random order, each once an epoch;
            "corenet": whole files, dealt to the readers as CoreNet deals them to its
            workers, and documents in the order of the file.
        readers: number of files that are read at the same time, over all processes;
            row i of a batch comes from reader i modulo `readers`. Default: the largest
            divisor of `batch_size` up to 64, or fewer if the files cannot be cut into
            so many parts.
        exclude, heldout: file patterns that are not trained on; `heldout` is evaluated.
        document_start: regular expression; in plain text, a line that fully matches it
            starts a document. Default: one document per file.
        shuffle_block: documents of a reader that are shuffled together, up to 4 million
            characters; 1 keeps their order.
        on_damage: "stop", or "skip" a damaged record.
        cache: folder for the tokens of files.
        workers: processes that read and tokenize; 0: the training process.
    """

    train: tuple[PathText, ...] = ()
    corpora: tuple[CorpusRecipe, ...] = ()
    text_key: str = "text"
    exclude: tuple[PathText, ...] = ()
    heldout: tuple[PathText, ...] = ()
    mixture: str = "natural"
    readers: int | None = None
    document_start: str | None = None
    packing: bool = False
    words_per_piece: int = 2048
    min_characters: int = 200
    min_tokens: int = 256
    shuffle_block: int = 1000
    on_damage: str = "stop"
    cache: PathText | None = None
    workers: int = 0

    def __post_init__(self) -> None:
        if self.on_damage not in ("stop", "skip"):
            raise OpenELMError(
                f"data.on_damage is {self.on_damage!r}; expected stop or skip."
            )
        if self.mixture not in ("natural", "corenet"):
            raise OpenELMError(
                f"data.mixture is {self.mixture!r}; expected natural or corenet."
            )
        for name, least in (
            *(("words_per_piece", 1), ("min_characters", 0), ("min_tokens", 0)),
            *(("shuffle_block", 1), ("workers", 0), ("readers", 1)),
        ):
            value = getattr(self, name)
            if value is not None and value < least:
                raise OpenELMError(
                    f"data.{name} is {value}; it must be at least {least}."
                )
        self._check_shares()
        if self.train and self.corpora:
            raise OpenELMError(
                "The recipe's data has both train and corpora; use one of them."
            )

    def _check_shares(self) -> None:
        shares = [c.token_share for c in self.corpora if c.token_share is not None]
        if shares and self.packing:
            raise OpenELMError(
                "data.packing uses every corpus once; leave out token_share, or "
                "data.packing."
            )
        if shares and self.mixture == "corenet":
            raise OpenELMError(
                "data.mixture: corenet deals whole files without shares; leave out "
                "token_share, or data.mixture."
            )
        if len(shares) < len(self.corpora) and sum(shares) >= 1:
            raise OpenELMError(
                f"The token_share of {len(shares)} of {len(self.corpora)} corpora add "
                f"up to {sum(shares):g}; they must leave a part below 1 for the others."
            )


def largest_divisor(number: int, limit: int) -> int:
    """Return the largest divisor of a number that is not above a limit."""
    return max(n for n in range(1, min(number, limit) + 1) if number % n == 0)


def list_corpora(data: DataRecipe) -> tuple[CorpusRecipe, ...]:
    """Return a recipe's corpora; `train` is a single one."""
    return data.corpora or (CorpusRecipe(data.train, text_key=data.text_key),)


@dataclass(frozen=True, slots=True)
class OptimizerRecipe:
    """Optimizer, with a linear warm-up and a cosine to `final_learning_rate`.

    "muon" uses Muon for the matrices of the layers and AdamW for the rest.
    """

    name: str = "adamw"
    learning_rate: float = 5.3e-3
    final_learning_rate: float = 5.3e-4
    warmup_steps: int = 5000
    warmup_learning_rate: float = 1e-6
    betas: tuple[float, float] = (0.9, 0.95)
    eps: float = 1e-8
    weight_decay: float = 0.1
    clip_norm: float = 1.0
    z_loss: float = 1e-4

    def __post_init__(self) -> None:
        if self.name not in ("adamw", "muon"):
            raise OpenELMError(
                f"optimizer.name is {self.name!r}; expected adamw or muon."
            )
        for name in (
            *("learning_rate", "final_learning_rate", "warmup_steps"),
            *("warmup_learning_rate", "eps", "weight_decay", "z_loss"),
        ):
            value = getattr(self, name)
            if not 0 <= value < math.inf:
                raise OpenELMError(
                    f"optimizer.{name} is {value}; it must be finite, 0 or more."
                )
        if not all(0 <= beta < 1 for beta in self.betas):
            raise OpenELMError(
                f"optimizer.betas is {self.betas}; each must be from 0 to below 1."
            )
        if not self.clip_norm > 0:
            raise OpenELMError(
                f"optimizer.clip_norm is {self.clip_norm}; it must be above 0, or .inf "
                "for no clipping."
            )


@dataclass(frozen=True, slots=True)
class GenerationRecipe:
    """Sampling defaults for the trained model's generation_config.json."""

    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None


@dataclass(frozen=True, slots=True)
class PretrainRecipe:
    """All settings of a pre-training run.

    Attributes:
        init: initial weights: a .pt file, a model folder or a Hub id. They have the
            sizes; a `model` of the recipe must agree with them.
        steps: optimizer updates.
        batch_size: sequences per step, over all processes.
        micro_batch_size: sequences per forward pass and process; gradients are
            accumulated over the passes of a step.
        parallel: "ddp", or "fsdp" to shard weights, gradients and optimizer state.
        activation_checkpointing: recompute the activations of a block in the backward
            pass.
        keep_last: number of newest checkpoints of weights to keep; one every
            `keep_every` steps is kept as well.
        keep_states: number of newest full training states to keep; None: all.
        average_last: number of checkpoints whose mean is the result.
        sample_prompts: prompts to continue every `sample_every` steps.
        compare_log: a training_logs.txt of CoreNet or a metrics.jsonl, whose loss is
            drawn beside that of the run in its report.
        join_timeout: seconds in which all processes must have started.
        report_to: trackers that receive the metrics: tensorboard, wandb, trackio.
    """

    model: ModelRecipe = field(default_factory=ModelRecipe)
    data: DataRecipe = field(default_factory=DataRecipe)
    tokenizer: TokenizerRecipe = field(default_factory=TokenizerRecipe)
    optimizer: OptimizerRecipe = field(default_factory=OptimizerRecipe)
    generation: GenerationRecipe = field(default_factory=GenerationRecipe)
    init: PathText | None = None
    output: PathText = "pretrained"
    steps: int = 350_000
    batch_size: int = 16
    micro_batch_size: int | None = None
    seed: int = 0
    parallel: str = "ddp"
    bf16: bool = False
    activation_checkpointing: bool = False
    compile: bool = False
    report_every: int = 10
    eval_every: int = 500
    eval_window: int = 256
    eval_sequences: int = 256
    save_every: int = 500
    keep_last: int = 5
    keep_every: int | None = None
    keep_states: int | None = 2
    average_last: int = 1
    sample_every: int | None = None
    sample_prompts: tuple[str, ...] = ()
    compare_log: PathText | None = None
    join_timeout: int = 600
    tensorboard: bool = False  # the same as "tensorboard" in `report_to`
    report_to: tuple[str, ...] = ()

    @property
    def readers(self) -> int:
        """The number of readers over all processes, at most."""
        return self.data.readers or largest_divisor(self.batch_size, 64)

    @property
    def trackers(self) -> tuple[str, ...]:
        """The trackers that get the metrics."""
        return (*self.report_to, *(("tensorboard",) if self.tensorboard else ()))

    def __post_init__(self) -> None:
        for name in (
            *("steps", "batch_size", "micro_batch_size", "report_every", "eval_every"),
            *("eval_window", "eval_sequences", "save_every", "keep_every"),
            *("keep_states", "sample_every", "join_timeout"),
        ):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise OpenELMError(f"{name} is {value}; it must be at least 1.")
        if not 0 <= self.seed < 2**63:
            raise OpenELMError(f"seed is {self.seed}; it must be 0 to 2**63 - 1.")
        if self.parallel not in ("ddp", "fsdp"):
            raise OpenELMError(f"parallel is {self.parallel!r}; expected ddp or fsdp.")
        if self.batch_size % self.readers:
            raise OpenELMError(
                f"data.readers is {self.readers}; it must divide batch_size "
                f"({self.batch_size})."
            )
        if not 1 <= self.average_last <= self.keep_last:
            raise OpenELMError(
                f"average_last is {self.average_last}; it must be from 1 to keep_last "
                f"({self.keep_last})."
            )
