"""The shape of an OpenELM: layer-wise scaling, the released sizes, foreign configs.

Source of the formula: Mehta et al., "OpenELM" (arXiv 2404.14619), section 2.1, as the
released checkpoints apply it. `OpenELMConfig` holds the outcome, one number a layer;
multipliers are a way of writing a config, not part of it.
"""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Self

from mlx_openelm.errors import OpenELMError

QKV_MULTIPLIERS = (0.5, 1.0)  # first and last layer, all released sizes
FFN_MULTIPLIERS = (0.5, 4.0)
FFN_DIM_DIVISOR = 256
MAX_LAYERS = 10_000  # more are a mistake, and their lists would fill the memory
BOS_ID, EOS_ID = 1, 2
LLAMA_PIECES, CORENET_ROWS = 32000, 32128  # the second has rows for padding


def make_divisible(value: float, divisor: int) -> int:
    """Return the multiple of `divisor` nearest to `value`, never below 90 % of it."""
    rounded = max(divisor, int(value + divisor / 2) // divisor * divisor)
    return rounded + divisor if rounded < 0.9 * value else rounded


def pad_vocabulary(rows: int) -> int:
    """Return CoreNet's rows for a vocabulary: one more to pad with, then whole 128s."""
    return rows if rows == CORENET_ROWS else math.ceil((rows + 1) / 128) * 128


def interpolate_multipliers(
    multipliers: float | Sequence[float], num_layers: int
) -> list[float]:
    """Return one multiplier a layer, from a scalar, a (first, last) pair or a list.

    A pair is spread linearly over the layers and rounded to two decimals.
    """
    if isinstance(multipliers, int | float):
        return [float(multipliers)] * num_layers
    if len(multipliers) == num_layers:
        return [float(m) for m in multipliers]
    if len(multipliers) != 2:
        raise OpenELMError(
            f"Expected one multiplier, a (first, last) pair or {num_layers} of them, "
            f"found {len(multipliers)}: {list(multipliers)}."
        )
    first, last = multipliers
    step = (last - first) / max(num_layers - 1, 1)
    return [round(first + i * step, 2) for i in range(num_layers)]


@dataclass(frozen=True, slots=True)
class OpenELMConfig:
    """An OpenELM's sizes. Lists have one entry a layer, the first layer first.

    Every query/key/value projection is fused, every FFN is a SwiGLU, queries and keys
    are normalised per head and nothing has a bias: OpenELM has no other form.
    """

    model_dim: int
    head_dim: int
    num_query_heads: tuple[int, ...]
    num_kv_heads: tuple[int, ...]
    ffn_dims: tuple[int, ...]
    vocab_size: int = 32000
    max_context_length: int = 2048
    rope_freq_constant: float = 10000.0
    rms_norm_eps: float = 1e-6
    share_input_output_layers: bool = True

    def __post_init__(self) -> None:
        problems = [
            f"{name} is {value!r}, not a positive whole number below 2**31"
            for name in ("model_dim", "head_dim", "vocab_size", "max_context_length")
            if not _is_size(value := getattr(self, name))
        ]
        problems += [
            f"{name} is {value!r}, not a positive number"
            for name in ("rope_freq_constant", "rms_norm_eps")
            if not 0 < (value := getattr(self, name)) < math.inf
        ]
        if not isinstance(tied := self.share_input_output_layers, bool):
            problems.append(f"share_input_output_layers is {tied!r}, not true or false")
        lists = {
            name: getattr(self, name)
            for name in ("num_query_heads", "num_kv_heads", "ffn_dims")
        }
        lengths = {name: len(values) for name, values in lists.items()}
        if len(set(lengths.values())) != 1 or not self.ffn_dims:
            problems.append(f"the per-layer lists differ in length: {lengths}")
        problems += [
            f"{name} holds {values}, where each must be a positive whole number "
            "below 2**31"
            for name, values in lists.items()
            if not all(map(_is_size, values))
        ]
        if not problems:
            problems = [
                f"layer {i} has {q} query heads, which {k} key-value heads do not share"
                for i, (q, k) in enumerate(
                    zip(self.num_query_heads, self.num_kv_heads, strict=True)
                )
                if q % k
            ]
        if isinstance(self.head_dim, int) and self.head_dim % 2:
            problems.append(f"head_dim {self.head_dim} is odd, RoPE needs pairs")
        if problems:
            raise OpenELMError(
                f"The config is not an OpenELM's: {'; '.join(problems)}."
            )

    # The formula -----------------------------------------------------------------

    @classmethod
    def scaled(
        cls,
        *,
        num_layers: int,
        model_dim: int,
        head_dim: int,
        num_gqa_groups: int = 4,
        qkv_multipliers: float | Sequence[float] = QKV_MULTIPLIERS,
        ffn_multipliers: float | Sequence[float] = FFN_MULTIPLIERS,
        ffn_dim_divisor: int = FFN_DIM_DIVISOR,
        vocab_size: int = 32000,
        max_context_length: int = 2048,
    ) -> Self:
        """Apply layer-wise scaling.

        Args:
            num_gqa_groups: query heads that share one key-value head (CoreNet's name).
            qkv_multipliers: attention width over model_dim; see
                `interpolate_multipliers`.
            ffn_multipliers: FFN width over model_dim.
        """
        if not 1 <= num_layers <= MAX_LAYERS:
            raise OpenELMError(
                f"The config has {num_layers} layers; an OpenELM has 1 to {MAX_LAYERS}."
            )
        query_heads = tuple(
            make_divisible(model_dim * m, head_dim * num_gqa_groups) // head_dim
            for m in interpolate_multipliers(qkv_multipliers, num_layers)
        )
        return cls(
            model_dim=model_dim,
            head_dim=head_dim,
            num_query_heads=query_heads,
            num_kv_heads=tuple(q // num_gqa_groups for q in query_heads),
            ffn_dims=tuple(
                make_divisible(m * model_dim, ffn_dim_divisor)
                for m in interpolate_multipliers(ffn_multipliers, num_layers)
            ),
            vocab_size=vocab_size,
            max_context_length=max_context_length,
        )

    @classmethod
    def preset(cls, name: str, *, vocab_size: int = 32000) -> Self:
        """Return a released size by any of its names: "270M", "OpenELM-1_1B", "1.1B".

        "gpt-test" is CoreNet's own one-layer model for tests.
        """
        key = name.rsplit("/", 1)[-1].removeprefix("OpenELM-")
        key = key.removesuffix("-Instruct").replace("_", ".")
        if key not in PRESETS:
            raise OpenELMError(
                f"No OpenELM is called {name!r}; there are {', '.join(PRESETS)}."
            )
        return cls.scaled(**PRESETS[key], vocab_size=vocab_size)

    # Counting --------------------------------------------------------------------

    @property
    def num_transformer_layers(self) -> int:
        return len(self.ffn_dims)

    def tensor_shapes(self) -> dict[str, tuple[int, ...]]:
        """Return every tensor's shape (out, in) by CoreNet name, in CoreNet's order.

        An untied output head is called `lm_head.weight`, as in the MLX model.
        """
        D, H = self.model_dim, self.head_dim
        shapes: dict[str, tuple[int, ...]] = {
            "token_embeddings.weight": (self.vocab_size, D)
        }
        layers = zip(
            self.num_query_heads, self.num_kv_heads, self.ffn_dims, strict=True
        )
        for i, (q, k, F) in enumerate(layers):
            shapes |= {
                f"layers.{i}.attn.qkv_proj.weight": ((q + 2 * k) * H, D),
                f"layers.{i}.attn.q_norm.weight": (H,),
                f"layers.{i}.attn.k_norm.weight": (H,),
                f"layers.{i}.attn.out_proj.weight": (D, q * H),
                f"layers.{i}.ffn.proj_1.weight": (2 * F, D),
                f"layers.{i}.ffn.proj_2.weight": (D, F),
                f"layers.{i}.ffn_norm.weight": (D,),
                f"layers.{i}.attn_norm.weight": (D,),
            }
        shapes["norm.weight"] = (D,)
        if not self.share_input_output_layers:
            shapes["lm_head.weight"] = (self.vocab_size, D)
        return shapes

    @property
    def num_parameters(self) -> int:
        return sum(math.prod(shape) for shape in self.tensor_shapes().values())

    @property
    def size_name(self) -> str:
        """The preset with these sizes ("OpenELM-1_1B", say), or "OpenELM"."""
        for key in PRESETS:
            if type(self).preset(key, vocab_size=self.vocab_size) == self:
                return key if key == "gpt-test" else f"OpenELM-{key.replace('.', '_')}"
        return "OpenELM"

    # Foreign configs -------------------------------------------------------------

    @classmethod
    def from_dict(cls, found: Mapping[str, Any]) -> Self:
        """Read a Hugging Face, mlx-lm, CoreNet or Apple-MLX config."""
        try:
            if "model_dim" in found:
                return cls._from_hugging_face(found)
            if "model_name" in found:
                return cls._from_apple_mlx(found)
            if "model" in found or any(k.startswith("model.") for k in found):
                return cls._from_corenet(found)
        except (TypeError, ValueError, AttributeError, ArithmeticError) as error:
            raise OpenELMError(f"The config cannot be read: {error}.") from error
        raise OpenELMError(
            "The config is not an OpenELM's: found none of model_dim (Hugging Face), "
            "model_name (Apple's MLX), model.language_modeling (CoreNet) among the "
            f"keys {sorted(found)[:12]}."
        )

    @classmethod
    def from_file(cls, path: Path) -> Self:
        """Read a config from a .json or .yaml file."""
        return cls.from_dict(read_mapping(path))

    @classmethod
    def _from_hugging_face(cls, found: Mapping[str, Any]) -> Self:
        model_type = found.get("model_type", "openelm")
        if model_type != "openelm":
            raise OpenELMError(
                f'The config says model_type "{model_type}"; only "openelm" runs here.'
            )
        for key, only in _ONLY_FORM.items():
            if found.get(key, only) != only:
                raise OpenELMError(
                    f"The config says {key} = {found[key]!r}; OpenELM has {only!r}."
                )
        wrong = [
            f"{key} = {found.get(key)!r}"
            for key in ("model_dim", "head_dim", "vocab_size")
            if not _is_size(found.get(key))
        ]
        if wrong:
            raise OpenELMError(
                f"The config says {', '.join(wrong)}; expected positive whole numbers "
                "below 2**31."
            )
        num_layers = found.get("num_transformer_layers")
        if not isinstance(num_layers, int):
            lists = (found.get("ffn_dims"), found.get("num_query_heads"))
            num_layers = next((len(x) for x in lists if isinstance(x, list)), None)
        if num_layers is None:
            raise OpenELMError("The config lacks num_transformer_layers.")
        groups = found.get("num_gqa_groups") or 4
        config = cls.scaled(
            num_layers=num_layers,
            model_dim=found["model_dim"],
            head_dim=found["head_dim"],
            num_gqa_groups=groups,
            qkv_multipliers=found.get("qkv_multipliers", QKV_MULTIPLIERS),
            ffn_multipliers=found.get("ffn_multipliers", FFN_MULTIPLIERS),
            ffn_dim_divisor=found.get("ffn_dim_divisor", FFN_DIM_DIVISOR),
            vocab_size=found["vocab_size"],
            max_context_length=found.get("max_context_length", 2048),
        )
        config = replace(
            config,
            rope_freq_constant=float(found.get("rope_freq_constant", 10000)),
            rms_norm_eps=float(found.get("rms_norm_eps", 1e-6)),
            share_input_output_layers=found.get("share_input_output_layers", True),
        )
        explicit: dict[str, Any] = {
            name: _per_layer(name, found[name], num_layers)
            for name in ("num_query_heads", "num_kv_heads", "ffn_dims")
            if found.get(name) is not None
        }
        if "num_query_heads" in explicit and "num_kv_heads" not in explicit:
            explicit["num_kv_heads"] = tuple(
                q // groups for q in explicit["num_query_heads"]
            )
        return replace(config, **explicit)

    @classmethod
    def _from_apple_mlx(cls, found: Mapping[str, Any]) -> Self:
        config = cls.preset(
            found["model_name"], vocab_size=found.get("vocab_size", 32128)
        )
        return replace(
            config,
            max_context_length=found.get(
                "max_context_length", config.max_context_length
            ),
        )

    @classmethod
    def _from_corenet(cls, found: Mapping[str, Any]) -> Self:
        """Read a CoreNet YAML: nested, or flat with dotted keys."""
        flat = _flatten(found)
        prefix = "model.language_modeling."
        model_name = flat.get(f"{prefix}general_gpt.model_name")
        if model_name is None:
            raise OpenELMError(
                "The CoreNet config does not say "
                "model.language_modeling.general_gpt.model_name."
            )
        vocab_size = flat.get(f"{prefix}general_gpt.vocab_size", 32000)
        pad = flat.get(f"{prefix}general_gpt.padding_index")
        if pad is not None:  # one row for it, then a multiple of 128 rows
            vocab_size = max(vocab_size, math.ceil((pad + 1) / 128) * 128)
        context = flat.get(f"{prefix}general_gpt.max_context_length", 2048)
        config = cls.preset(model_name, vocab_size=vocab_size)
        return replace(config, max_context_length=context)

    @classmethod
    def from_shapes(cls, shapes: Mapping[str, tuple[int, ...]]) -> Self:
        """Infer the sizes from tensor shapes (CoreNet names).

        Shapes do not tell the context length, the RoPE base or the norms' epsilon:
        these are OpenELM's own (2048, 10000, 1e-6).

        Raises:
            OpenELMError: the tensors are not an OpenELM's (which are missing, say).
        """

        def shape(name: str, num_dims: int) -> tuple[int, ...]:
            if name not in shapes:
                raise OpenELMError(
                    f"This is not an OpenELM: there is no tensor {name}. "
                    f"Found {_listed(sorted(shapes))}."
                )
            if len(shapes[name]) != num_dims:
                raise OpenELMError(
                    f"This is not an OpenELM: {name} has shape {shapes[name]}, "
                    f"expected {num_dims} dimension(s)."
                )
            return shapes[name]

        V, D = shape("token_embeddings.weight", 2)
        parts = (name.split(".", 2) for name in shapes)
        numbers = {part[1] for part in parts if len(part) == 3 and part[0] == "layers"}
        num_layers = 0
        while str(num_layers) in numbers:
            num_layers += 1
        missing = [
            name
            for i in range(num_layers)
            for name in (f"layers.{i}.{part}.weight" for part in _LAYER_PARTS)
            if name not in shapes
        ]
        if missing:
            raise OpenELMError(
                "This is not an OpenELM, or not all of one: there is no "
                f"{_listed(missing, 50)}; found {_listed(sorted(shapes))}."
            )
        (H,) = shape("layers.0.attn.q_norm.weight", 1)
        query_heads, kv_heads, ffn_dims = [], [], []
        for i in range(num_layers):
            _, attended = shape(f"layers.{i}.attn.out_proj.weight", 2)
            projected, _ = shape(f"layers.{i}.attn.qkv_proj.weight", 2)
            if H < 1 or attended % H or (projected - attended) % (2 * H):
                raise OpenELMError(
                    f"Layer {i} is not an OpenELM's: qkv_proj has {projected} rows and "
                    f"out_proj {attended} columns, which no heads of width {H} give."
                )
            query_heads.append(attended // H)
            kv_heads.append((projected - attended) // (2 * H))
            ffn_dims.append(shape(f"layers.{i}.ffn.proj_2.weight", 2)[1])
        return cls(
            model_dim=D,
            head_dim=H,
            num_query_heads=tuple(query_heads),
            num_kv_heads=tuple(kv_heads),
            ffn_dims=tuple(ffn_dims),
            vocab_size=V,
            share_input_output_layers="lm_head.weight" not in shapes,
        )

    # Writing ---------------------------------------------------------------------

    def to_dict(self) -> dict[str, Any]:
        """Return the config as Hugging Face and mlx-lm spell it, lists explicit."""
        L = self.num_transformer_layers
        divisor = math.gcd(FFN_DIM_DIVISOR, *self.ffn_dims)
        published = interpolate_multipliers(FFN_MULTIPLIERS, L)
        if self.ffn_dims == tuple(
            make_divisible(m * self.model_dim, divisor) for m in published
        ):
            ffn_multipliers = published
        else:
            ffn_multipliers = [F / self.model_dim for F in self.ffn_dims]
        groups = {
            q // k for q, k in zip(self.num_query_heads, self.num_kv_heads, strict=True)
        }
        return {
            "model_type": "openelm",
            "architectures": ["OpenELMForCausalLM"],
            "activation_fn_name": "swish",
            "bos_token_id": BOS_ID,
            "eos_token_id": EOS_ID,
            "ffn_dim_divisor": divisor,
            "ffn_dims": list(self.ffn_dims),
            "ffn_multipliers": ffn_multipliers,
            "ffn_with_glu": True,
            "head_dim": self.head_dim,
            "initializer_range": 0.02,
            "max_context_length": self.max_context_length,
            "model_dim": self.model_dim,
            "normalization_layer_name": "rms_norm",
            "normalize_qk_projections": True,
            "num_gqa_groups": groups.pop() if len(groups) == 1 else None,
            "num_kv_heads": list(self.num_kv_heads),
            "num_query_heads": list(self.num_query_heads),
            "num_transformer_layers": L,
            "qkv_multipliers": list(QKV_MULTIPLIERS),
            "rms_norm_eps": self.rms_norm_eps,
            "rope_freq_constant": self.rope_freq_constant,
            "rope_max_length": 2 * self.max_context_length,
            "share_input_output_layers": self.share_input_output_layers,
            "use_cache": True,
            "vocab_size": self.vocab_size,
        }


_ONLY_FORM = {  # switches of Hugging Face's config that every OpenELM has set alike
    "ffn_with_glu": True,
    "normalize_qk_projections": True,
    "activation_fn_name": "swish",
    "normalization_layer_name": "rms_norm",
}

_LAYER_PARTS = (
    *("attn.qkv_proj", "attn.q_norm", "attn.k_norm", "attn.out_proj", "attn_norm"),
    *("ffn.proj_1", "ffn.proj_2", "ffn_norm"),
)

PRESETS: dict[str, dict[str, Any]] = {
    "gpt-test": {
        "num_layers": 1,
        "model_dim": 128,
        "head_dim": 64,
        "num_gqa_groups": 1,
        "qkv_multipliers": (0.25, 0.5),
        "ffn_multipliers": (0.25, 0.75),
    },
    "270M": {"num_layers": 16, "model_dim": 1280, "head_dim": 64},
    "450M": {"num_layers": 20, "model_dim": 1536, "head_dim": 64},
    "1.1B": {"num_layers": 28, "model_dim": 2048, "head_dim": 64},
    "3B": {"num_layers": 36, "model_dim": 3072, "head_dim": 128},
}


def read_mapping(path: Path) -> dict[str, Any]:
    """Read a JSON or YAML file that holds one mapping.

    Raises:
        OpenELMError: the file is missing, is no JSON or YAML, or holds something else.
    """
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise OpenELMError(f"Cannot read {path}: {error}.") from error
    try:
        if path.suffix == ".json":
            found = json.loads(text)
        else:
            import yaml

            found = yaml.safe_load(text)
    except Exception as error:  # the parsers' errors have no common base
        reason = " ".join(str(error).split())  # YAML's takes several lines
        raise OpenELMError(f"{path} cannot be parsed: {reason}.") from error
    if not isinstance(found, dict):
        raise OpenELMError(f"{path} holds a {type(found).__name__}, not a mapping.")
    return found


def _is_size(value: object) -> bool:
    return type(value) is int and 0 < value < 2**31  # a bool is none


def _per_layer(name: str, value: object, num_layers: int) -> tuple[int, ...]:
    values = [value] * num_layers if isinstance(value, int) else value
    if not isinstance(values, list | tuple) or len(values) != num_layers:
        raise OpenELMError(
            f"The config's {name} is {value!r}; expected {num_layers} numbers, "
            "one a layer."
        )
    return tuple(values)


def _flatten(
    found: Mapping[str, Any], prefix: str = "", depth: int = 0
) -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in found.items():
        if depth > 50 or len(flat) > 10_000:  # YAML may repeat parts, without end even
            raise ValueError("it is nested too deeply, or far too long")
        if isinstance(value, Mapping):
            flat |= _flatten(value, f"{prefix}{key}.", depth + 1)
        else:
            flat[f"{prefix}{key}"] = value
    return flat


def _listed(names: Sequence[str], most: int = 6) -> str:
    shown = ", ".join(names[:most]) or "nothing"
    return f"{shown} and {len(names) - most} more" if len(names) > most else shown
