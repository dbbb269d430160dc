"""The config of an OpenELM in transformers; copied unchanged into exported folders."""

from collections.abc import Sequence
from typing import Any

from transformers import PretrainedConfig
from transformers.utils.versions import require_version

require_version("transformers>=5.4", "This code of OpenELM does not run on it.")


class OpenELMConfig(PretrainedConfig):
    """The sizes of an OpenELM; the lists have one entry per layer.

    The defaults are those of a small model, as transformers creates configs without
    arguments.
    """

    model_type = "openelm"
    keys_to_ignore_at_inference = ["cache", "past_key_values"]
    attribute_map = {
        "hidden_size": "model_dim",
        "max_position_embeddings": "max_context_length",
        "num_hidden_layers": "num_transformer_layers",
        "tie_word_embeddings": "share_input_output_layers",
    }

    def __init__(
        self,
        *,
        model_dim: int = 64,
        head_dim: int = 16,
        num_query_heads: Sequence[int] = (4,),
        num_kv_heads: Sequence[int] = (1,),
        ffn_dims: Sequence[int] = (256,),
        vocab_size: int = 32000,
        max_context_length: int = 2048,
        rope_freq_constant: float = 10000.0,
        rms_norm_eps: float = 1e-6,
        share_input_output_layers: bool = True,
        initializer_range: float = 0.02,
        use_cache: bool = True,
        bos_token_id: int | None = 1,
        eos_token_id: int | list[int] | None = 2,
        pad_token_id: int | None = None,
        **kwargs: Any,
    ) -> None:
        self.model_dim = model_dim
        self.head_dim = head_dim
        self.num_query_heads = list(num_query_heads)
        self.num_kv_heads = list(num_kv_heads)
        self.ffn_dims = list(ffn_dims)
        self.vocab_size = vocab_size
        self.max_context_length = max_context_length
        self.rope_freq_constant = rope_freq_constant
        self.rms_norm_eps = rms_norm_eps
        self.share_input_output_layers = share_input_output_layers
        self.initializer_range = initializer_range
        self.use_cache = use_cache
        self.bos_token_id = bos_token_id
        self.eos_token_id = eos_token_id
        self.pad_token_id = pad_token_id
        super().__init__(**kwargs)
        self.num_transformer_layers = len(self.ffn_dims)
