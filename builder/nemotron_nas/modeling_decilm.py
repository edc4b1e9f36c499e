"""A decoder of unlike layers, from the parts of transformers' Llama."""

from inspect import signature
from typing import Any

import torch
from torch import nn
from transformers import Cache, DynamicCache, GenerationMixin, PreTrainedModel
from transformers.masking_utils import create_causal_mask
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.models.llama.modeling_llama import (
    LlamaAttention,
    LlamaMLP,
    LlamaRMSNorm,
    LlamaRotaryEmbedding,
)

from .configuration_decilm import DeciLMConfig

# transformers 5.24 renamed it, for arguments and outputs.
CACHE = "cache" if "cache" in signature(create_causal_mask).parameters else "past_key_values"


class DeciLMLinearAttention(nn.Module):
    """A matrix in the place of an attention; it keeps no K and V."""

    def __init__(self, hidden_size: int) -> None:
        super().__init__()
        self.linear_attn = nn.Linear(hidden_size, hidden_size, bias=False)

    def forward(self, hidden_states: torch.Tensor, **kwargs: Any) -> tuple[torch.Tensor]:
        return (self.linear_attn(hidden_states),)


class DeciLMLinearMLP(nn.Module):
    """A matrix in the place of an FFN."""

    def __init__(self, hidden_size: int) -> None:
        super().__init__()
        self.linear_mlp = nn.Linear(hidden_size, hidden_size, bias=False)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return self.linear_mlp(hidden_states)


class DeciLMLayer(GradientCheckpointingLayer):
    """Either half may be absent. `attention_index` counts attention layers: it is the cache's index."""

    def __init__(self, config: DeciLMConfig, index: int, attention_index: int) -> None:
        super().__init__()
        attention, ffn = config.layer_config(index, attention_index)
        self.self_attn = self.mlp = None
        block, hidden = config.block_configs[index], config.hidden_size
        if not block.attention.no_op:
            self.input_layernorm = LlamaRMSNorm(hidden, eps=config.rms_norm_eps)
            self.self_attn = (
                DeciLMLinearAttention(hidden)
                if attention is None
                else LlamaAttention(attention, attention_index)
            )
        if not block.ffn.no_op:
            self.post_attention_layernorm = LlamaRMSNorm(hidden, eps=config.rms_norm_eps)
            self.mlp = DeciLMLinearMLP(hidden) if ffn is None else LlamaMLP(ffn)

    def forward(self, hidden_states: torch.Tensor, **kwargs: Any) -> torch.Tensor:
        if self.self_attn is not None:
            hidden_states = hidden_states + self.self_attn(self.input_layernorm(hidden_states), **kwargs)[0]
        if self.mlp is not None:
            hidden_states = hidden_states + self.mlp(self.post_attention_layernorm(hidden_states))
        return hidden_states


class DeciLMPreTrainedModel(PreTrainedModel):
    config_class = DeciLMConfig
    base_model_prefix = "model"
    _no_split_modules = ["DeciLMLayer"]  # noqa: RUF012
    supports_gradient_checkpointing = True
    _supports_sdpa = True
    _supports_flash_attn = True


class DeciLMModel(DeciLMPreTrainedModel):
    def __init__(self, config: DeciLMConfig) -> None:
        super().__init__(config)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        attention_index, layers = 0, []
        for index, block in enumerate(config.block_configs):
            layers.append(DeciLMLayer(config, index, attention_index))
            attention_index += not (block.attention.no_op or block.attention.replace_with_linear)
        self.layers = nn.ModuleList(layers)
        self.norm = LlamaRMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.rotary_emb = LlamaRotaryEmbedding(config)
        self.post_init()

    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        cache: Cache | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        use_cache: bool | None = None,
        **kwargs: Any,
    ) -> BaseModelOutputWithPast:
        hidden_states = self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
        use_cache = self.config.use_cache if use_cache is None else use_cache
        cache = past_key_values if cache is None else cache
        if use_cache and cache is None:
            cache = DynamicCache()
        seen = cache.get_seq_length() if cache is not None else 0
        cache_position = torch.arange(seen, seen + hidden_states.shape[1], device=hidden_states.device)
        if position_ids is None:
            position_ids = cache_position[None]
        causal_mask = create_causal_mask(
            self.config,
            hidden_states,
            attention_mask,
            position_ids=position_ids,
            **{CACHE: cache},
        )
        position_embeddings = self.rotary_emb(hidden_states, position_ids)
        for layer in self.layers:
            hidden_states = layer(
                hidden_states,
                position_embeddings=position_embeddings,
                attention_mask=causal_mask,
                cache_position=cache_position,
                **{CACHE: cache},
            )
        return BaseModelOutputWithPast(last_hidden_state=self.norm(hidden_states), **{CACHE: cache})


class DeciLMForCausalLM(DeciLMPreTrainedModel, GenerationMixin):
    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}  # noqa: RUF012

    def __init__(self, config: DeciLMConfig) -> None:
        super().__init__(config)
        self.model = DeciLMModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        logits_to_keep: int = 0,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast:
        outputs = self.model(input_ids=input_ids, **kwargs)
        logits = self.lm_head(outputs.last_hidden_state[:, -logits_to_keep:])
        loss = None
        if labels is not None:
            vocab_size = self.config.vocab_size
            # With `num_items_in_batch`, the divisor where a step accumulates several batches.
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=vocab_size, **kwargs)
        return CausalLMOutputWithPast(loss=loss, logits=logits, **{CACHE: getattr(outputs, CACHE)})
