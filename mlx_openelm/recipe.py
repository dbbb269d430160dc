"""Recipes: YAML and flags become one frozen value, and every mistake is named."""

import dataclasses
import difflib
import types
import typing
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from mlx_openelm.config import (
    FFN_DIM_DIVISOR,
    FFN_MULTIPLIERS,
    QKV_MULTIPLIERS,
    OpenELMConfig,
    read_mapping,
)
from mlx_openelm.errors import OpenELMError

Multipliers = float | tuple[float, ...]
Recipe = TypeVar("Recipe")


@dataclass(frozen=True, slots=True)
class ModelRecipe:
    """A released size by `name`, or the sizes that layer-wise scaling needs."""

    name: str | None = None
    num_layers: int | None = None
    model_dim: int | None = None
    head_dim: int | None = None
    num_gqa_groups: int = 4
    qkv_multipliers: Multipliers = QKV_MULTIPLIERS
    ffn_multipliers: Multipliers = FFN_MULTIPLIERS
    ffn_dim_divisor: int = FFN_DIM_DIVISOR
    max_context_length: int = 2048

    def build(self, vocab_size: int) -> OpenELMConfig:
        """Return the config for a vocabulary of `vocab_size` pieces."""
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
            vocab_size=vocab_size,
            max_context_length=self.max_context_length,
        )


@dataclass(frozen=True, slots=True)
class TokenizerRecipe:
    """A tokenizer.model at `path`; without one, `vocab_size` pieces are trained."""

    path: str | None = None
    vocab_size: int = 4096


@dataclass(frozen=True, slots=True)
class DataRecipe:
    """Which text is read, and how a document becomes sequences.

    `train`, `exclude` and `heldout` are file patterns, relative to the working folder;
    what `exclude` or `heldout` matches is not trained on. Without `packing`, the rules
    are OpenELM's: pieces of `words_per_piece` words, dropped below `min_characters` or
    `min_tokens`, one to a padded sequence. With it, documents follow one another and
    every sequence is full.
    """

    train: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ()
    heldout: tuple[str, ...] = ()
    document_start: str | None = None
    packing: bool = False
    words_per_piece: int = 2048
    min_characters: int = 200
    min_tokens: int = 256


@dataclass(frozen=True, slots=True)
class OptimizerRecipe:
    """AdamW with a linear warm-up and a cosine to `final_learning_rate`.

    "muon" gives the layers' matrices to Muon and leaves the rest to AdamW.
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


@dataclass(frozen=True, slots=True)
class GenerationRecipe:
    """How the trained model reads best: its generation_config.json."""

    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None


@dataclass(frozen=True, slots=True)
class PretrainRecipe:
    """Everything that decides a pre-training run.

    `batch_size` counts sequences of one step over all processes; each process takes
    its share in parts of `micro_batch_size`. Steps are counted in optimizer updates.
    """

    model: ModelRecipe
    data: DataRecipe
    tokenizer: TokenizerRecipe = field(default_factory=TokenizerRecipe)
    optimizer: OptimizerRecipe = field(default_factory=OptimizerRecipe)
    generation: GenerationRecipe = field(default_factory=GenerationRecipe)
    output: str = "pretrained"
    steps: int = 350_000
    batch_size: int = 16
    micro_batch_size: int | None = None
    seed: int = 0
    bf16: bool = False
    compile: bool = False
    report_every: int = 10
    eval_every: int = 500
    eval_window: int = 256
    eval_sequences: int = 256
    save_every: int = 500
    keep_last: int = 5
    average_last: int = 1

    def __post_init__(self) -> None:
        for name in (
            *("steps", "batch_size", "micro_batch_size", "report_every", "eval_every"),
            *("eval_window", "eval_sequences", "save_every"),
        ):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise OpenELMError(f"{name} is {value}; it must be at least 1.")
        if not 0 <= self.seed < 2**63:
            raise OpenELMError(f"seed is {self.seed}; it must be 0 to 2**63 - 1.")
        if not 1 <= self.average_last <= self.keep_last:
            raise OpenELMError(
                f"average_last is {self.average_last}, but keep_last keeps "
                f"{self.keep_last} checkpoints; it must be between 1 and that."
            )


def load_recipe(kind: type[Recipe], name: str, overrides: Mapping[str, Any]) -> Recipe:
    """Read a recipe by file path or bundled name; flags win over the file.

    Args:
        kind: the recipe's dataclass.
        overrides: values by dotted key ("data.train"); None means "not given".

    Raises:
        OpenELMError: no such recipe, an unknown key (with the nearest known one), or a
            value of another type.
    """
    path = find_recipe(name)
    found = read_mapping(path)
    for key, value in overrides.items():
        if value is None:
            continue
        group, _, leaf = key.rpartition(".")
        target = found
        if group:  # one that is there without a key is None
            target = found[group] = found.get(group) or {}
        if isinstance(target, dict):  # what is none is named below
            target[leaf] = value
    built: Recipe = _build(kind, found, str(path), "")
    return built


def make_recipe(kind: type[Recipe], values: Mapping[str, Any], where: str) -> Recipe:
    """Make a recipe of flags alone; None means "not given". Errors as `load_recipe`.

    Args:
        where: how errors call what was said.
    """
    found = {key: value for key, value in values.items() if value is not None}
    built: Recipe = _build(kind, found, where, "")
    return built


def find_recipe(name: str) -> Path:
    """Return the path of a recipe file, or of the bundled recipe of that name."""
    path = Path(name)
    if path.is_file():
        return path
    known = bundled_recipes()
    if name in known:
        return known[name]
    raise OpenELMError(
        f"No recipe file {name!r}, and no bundled recipe of that name"
        f"{_did_you_mean(name, known)}; `mlx-openelm recipes` lists them."
    )


def read_recipe(name: str) -> str:
    """Return the text of a recipe, by file path or bundled name.

    Raises:
        OpenELMError: no such recipe, or it is no text.
    """
    path = find_recipe(name)
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise OpenELMError(f"Cannot read the recipe {path}: {error}.") from error


def bundled_recipes() -> dict[str, Path]:
    """Return the recipes that are installed: "pretrain/stories" -> path."""
    package = Path(__file__).parent
    for root in (package / "recipes", package.parent / "recipes"):
        if root.is_dir():
            return {
                str(path.relative_to(root).with_suffix("")): path
                for path in sorted(root.rglob("*.yaml"))
            }
    return {}


def _build(kind: Any, found: Mapping[str, Any], where: str, prefix: str) -> Any:
    hints = typing.get_type_hints(kind)
    unknown = [key for key in found if key not in hints]
    if unknown:
        raise OpenELMError(
            f"{where}: unknown key {prefix}{unknown[0]}"
            f"{_did_you_mean(str(unknown[0]), hints)}; known are {', '.join(hints)}."
        )
    values = {
        key: _convert(hints[key], value, where, f"{prefix}{key}")
        for key, value in found.items()
    }
    missing = [
        f.name
        for f in dataclasses.fields(kind)
        if f.name not in values
        and f.default is dataclasses.MISSING
        and f.default_factory is dataclasses.MISSING
    ]
    if missing:
        raise OpenELMError(f"{where}: {prefix}{missing[0]} is missing.")
    return kind(**values)


def _convert(hint: Any, value: Any, where: str, key: str) -> Any:
    if dataclasses.is_dataclass(hint):
        if not isinstance(value, Mapping):
            raise OpenELMError(
                f"{where}: {key} is {value!r}, expected a group of keys."
            )
        return _build(hint, value, where, f"{key}.")
    origin = typing.get_origin(hint)
    if origin in (types.UnionType, typing.Union):
        options = typing.get_args(hint)
        for option in options:
            try:
                return _convert(option, value, where, key)
            except OpenELMError:
                continue
    elif origin is tuple:
        items = [value] if isinstance(value, str) else value
        kinds = typing.get_args(hint)
        if isinstance(items, list | tuple) and (
            kinds[-1] is ... or len(kinds) == len(items)
        ):
            return tuple(_convert(kinds[0], item, where, key) for item in items)
    elif hint is types.NoneType and value is None:
        return None
    elif hint is float and isinstance(value, int | float | str):
        try:  # YAML reads "5e-3" as a string
            return float(value) if not isinstance(value, bool) else _refuse(key)
        except ValueError:
            pass
    elif isinstance(value, hint) and (hint is bool or not isinstance(value, bool)):
        return value
    raise OpenELMError(f"{where}: {key} is {value!r}, expected {_spell(hint)}.")


def _refuse(key: str) -> float:
    raise ValueError(key)


def _spell(hint: Any) -> str:
    return hint.__name__ if isinstance(hint, type) else str(hint)


def _did_you_mean(word: str, known: typing.Iterable[str]) -> str:
    close = difflib.get_close_matches(word, list(known), n=1)
    return f" (did you mean {close[0]}?)" if close else ""
