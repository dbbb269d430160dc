"""`OpenELMConfig`: the sizes of an OpenELM, as explicit per-layer lists.

`layerwise_scaling` computes the lists from multipliers; `config_formats` reads the
configs of other tools.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Self

from mlx_openelm.config_formats import read_config, read_shapes
from mlx_openelm.errors import OpenELMError
from mlx_openelm.layerwise_scaling import (
    FFN_DIM_DIVISOR,
    FFN_MULTIPLIERS,
    PRESETS,
    QKV_MULTIPLIERS,
    interpolate_multipliers,
    is_size,
    make_divisible,
    preset_fields,
    scaled_fields,
)
from mlx_openelm.mapping_files import read_mapping
from mlx_openelm.message_parts import list_names

BOS_ID, EOS_ID = 1, 2
LLAMA_PIECES, CORENET_ROWS = 32000, 32128  # without and with padding rows


def pad_vocabulary(rows: int) -> int:
    """Return CoreNet's embedding rows: with a padding id, rounded up to 128s."""
    return rows if rows == CORENET_ROWS else math.ceil((rows + 1) / 128) * 128


@dataclass(frozen=True, slots=True)
class OpenELMConfig:
    """The sizes of an OpenELM. Lists have one entry per layer, the first layer first.

    All OpenELMs have fused query/key/value projections, SwiGLU FFNs, queries and keys
    normalised per head, and no biases.
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
            f"{name} is {value!r:.80}, not a positive integer below 2**31"
            for name in ("model_dim", "head_dim", "vocab_size", "max_context_length")
            if not is_size(value := getattr(self, name))
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
            f"{name} is {values}, but each must be a positive integer below 2**31"
            for name, values in lists.items()
            if not all(map(is_size, values))
        ]
        if not problems:
            problems = [
                f"layer {i} has {q} query heads, not a multiple of its {k} key-value "
                "heads"
                for i, (q, k) in enumerate(
                    zip(self.num_query_heads, self.num_kv_heads, strict=True)
                )
                if q % k
            ]
        if isinstance(self.head_dim, int) and self.head_dim % 2:
            problems.append(f"head_dim {self.head_dim} is odd, but RoPE needs pairs")
        if problems:
            raise OpenELMError(
                "The config is not an OpenELM's: "
                f"{list_names(problems, most=10, quoted=False, separator='; ')}."
            )

    # Layer-wise scaling ----------------------------------------------------------

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
        shape: str = "layerwise",
        vocab_size: int = 32000,
        max_context_length: int = 2048,
    ) -> Self:
        """Apply layer-wise scaling.

        Args:
            num_gqa_groups: query heads per key-value head (CoreNet's name).
            qkv_multipliers: attention width / model_dim; see `interpolate_multipliers`.
            ffn_multipliers: FFN width / model_dim.
            shape: how the widths change over the layers; see `interpolate_multipliers`.
        """
        fields = scaled_fields(
            num_layers=num_layers,
            model_dim=model_dim,
            head_dim=head_dim,
            num_gqa_groups=num_gqa_groups,
            qkv_multipliers=qkv_multipliers,
            ffn_multipliers=ffn_multipliers,
            ffn_dim_divisor=ffn_dim_divisor,
            shape=shape,
        )
        return cls(
            **fields, vocab_size=vocab_size, max_context_length=max_context_length
        )

    @classmethod
    def preset(cls, name: str, *, vocab_size: int = 32000) -> Self:
        """Return a released size by any of its names: "270M", "OpenELM-1_1B", "1.1B".

        "gpt-test" is CoreNet's one-layer model for tests.
        """
        return cls(**preset_fields(name), vocab_size=vocab_size)

    # Counting --------------------------------------------------------------------

    @property
    def num_transformer_layers(self) -> int:
        return len(self.ffn_dims)

    def tensor_shapes(self) -> dict[str, tuple[int, ...]]:
        """Return the shape (out, in) of every tensor by CoreNet name, in its order.

        An untied output head is `lm_head.weight`, as in the MLX model.
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

    def kv_bytes_per_token(self, number_bytes: int) -> int:
        """Return the size of one token's keys and values in all layers, in bytes."""
        return 2 * sum(self.num_kv_heads) * self.head_dim * number_bytes

    @property
    def size_name(self) -> str:
        """The name of the preset with these sizes ("OpenELM-1_1B"), or "OpenELM"."""
        for key in PRESETS:
            if type(self).preset(key, vocab_size=self.vocab_size) == self:
                return key if key == "gpt-test" else f"OpenELM-{key.replace('.', '_')}"
        return "OpenELM"

    # Reading ---------------------------------------------------------------------

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        """Read a Hugging Face, mlx-lm, CoreNet or Apple-MLX config."""
        try:
            steps = read_config(values)
            config = cls(**next(steps))
            for fields in steps:
                config = replace(config, **fields)
            return config
        except (TypeError, ValueError, AttributeError, ArithmeticError) as error:
            raise OpenELMError(f"The config cannot be read: {error}.") from error

    @classmethod
    def from_file(cls, path: Path) -> Self:
        """Read a config from a .json or .yaml file."""
        return cls.from_dict(read_mapping(path))

    @classmethod
    def from_shapes(cls, shapes: Mapping[str, tuple[int, ...]]) -> Self:
        """Infer the sizes from tensor shapes (CoreNet names).

        The context length, the RoPE base and the norms' epsilon do not follow from
        shapes; they get OpenELM's values (2048, 10000, 1e-6).

        Raises:
            OpenELMError: the tensors are not an OpenELM's; missing ones are named.
        """
        return cls(**read_shapes(shapes))

    # Writing ---------------------------------------------------------------------

    def to_dict(self) -> dict[str, Any]:
        """Return the config with the keys of Hugging Face and mlx-lm."""
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
