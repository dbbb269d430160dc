"""OpenELM for transformers 5; copied unchanged into exported folders.

The network is in `reference.py` beside this file. The class below adds what
transformers needs: masks, caches, the loss, generation and saving.
"""

from typing import Any

import torch
from torch import Tensor, nn
from transformers import Cache, DynamicCache, GenerationMixin, PreTrainedModel
from transformers.masking_utils import create_causal_mask
from transformers.modeling_outputs import CausalLMOutputWithPast
from transformers.utils.generic import can_return_tuple

from .configuration_openelm import OpenELMConfig
from .reference import Decoder

# Releases of transformers 5 call the cache "cache" or "past_key_values". `forward`
# ignores unknown keyword arguments, so both names are parameters of it.
_OUTPUTS = CausalLMOutputWithPast.__dataclass_fields__
_CACHE = "cache" if "cache" in _OUTPUTS else "past_key_values"


class OpenELMForCausalLM(PreTrainedModel, GenerationMixin):
    """OpenELM with a language modelling head, which may be tied to the embedding."""

    config_class = OpenELMConfig
    base_model_prefix = "transformer"
    supports_gradient_checkpointing = True
    _no_split_modules = ["Block"]
    _supports_sdpa = True
    _tied_weights_keys = {"lm_head.weight": "transformer.token_embeddings.weight"}

    def __init__(self, config: OpenELMConfig) -> None:
        super().__init__(config)
        self.transformer = Decoder(config)
        self.transformer.has_dropout = True  # once PEFT adds an adapter
        self.lm_head = nn.Linear(config.model_dim, config.vocab_size, bias=False)
        self.gradient_checkpointing = False
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        return self.transformer.token_embeddings

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.transformer.add_module("token_embeddings", value)

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        cache: Cache | None = None,
        logits_to_keep: int | Tensor = 0,
        output_hidden_states: bool | None = None,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast:
        """Return logits (B, T, V), the cache, and with labels the loss.

        Args:
            past_key_values: the same as `cache`.
            logits_to_keep: compute the logits of this many last positions, or of the
                positions in a tensor; 0: of all.
            kwargs: passed to the loss.
        """
        if inputs_embeds is None:
            inputs_embeds = self.get_input_embeddings()(input_ids)
        cache = past_key_values if cache is None else cache
        if use_cache is None:
            use_cache = self.config.use_cache and not self.training
        if cache is None and use_cache:
            cache = DynamicCache()
        if position_ids is None:
            start = 0 if cache is None else cache.get_seq_length()
            device = inputs_embeds.device
            position_ids = torch.arange(inputs_embeds.shape[1], device=device)[None]
            position_ids = position_ids + start
        mask = create_causal_mask(
            config=self.config,
            inputs_embeds=inputs_embeds,
            attention_mask=attention_mask,
            position_ids=position_ids,
            **{_CACHE: cache},
        )
        states: list[Tensor] | None = None
        if output_hidden_states or self.config.output_hidden_states:
            states = []
        self.transformer.checkpointing = self.gradient_checkpointing and self.training
        hidden = self.transformer.decode(
            inputs_embeds, cache, position_ids, mask, states
        )
        if isinstance(logits_to_keep, int):
            kept = hidden[:, -logits_to_keep:]  # -0 is 0: all
        else:
            kept = hidden[:, logits_to_keep]
        logits = self.lm_head(kept)
        loss = None
        if labels is not None:
            loss = self.loss_function(
                logits=logits,
                labels=labels,
                vocab_size=self.config.vocab_size,
                **kwargs,
            )
        outputs: dict[str, Any] = {"loss": loss, "logits": logits, _CACHE: cache}
        if states is not None:
            outputs["hidden_states"] = (*states, hidden)
        return CausalLMOutputWithPast(**outputs)
