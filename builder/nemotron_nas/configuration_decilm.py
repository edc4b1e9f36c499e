"""Configuration of a decoder whose layers may differ: no attention, no FFN, FFNs of any width.

`block_configs[i]` holds `attention` {n_heads_in_group, no_op, ...} and `ffn` {ffn_mult, no_op, ...}
as objects with attributes, which is how serving frameworks read them.
"""

from types import SimpleNamespace
from typing import Any

from transformers import LlamaConfig


class Block(SimpleNamespace):
    """A JSON object read by attribute."""

    def to_dict(self) -> dict[str, Any]:
        return {k: v.to_dict() if isinstance(v, Block) else v for k, v in vars(self).items()}


def _block(value: Any) -> Any:
    if isinstance(value, dict):
        return Block(**{k: _block(v) for k, v in value.items()})
    return value


class DeciLMConfig(LlamaConfig):
    model_type = "nemotron-nas"

    def __init__(self, block_configs: list[Any] | None = None, **kwargs: Any) -> None:
        self.block_configs = [_block(b) for b in block_configs or []]
        super().__init__(**kwargs)

    def to_dict(self) -> dict[str, Any]:
        values = super().to_dict()
        values["block_configs"] = [b.to_dict() if isinstance(b, Block) else b for b in self.block_configs]
        return values

    def layer_config(self, index: int, attention_index: int) -> tuple[LlamaConfig | None, LlamaConfig | None]:
        """What Llama's own attention and MLP need to be built for this layer; None where it has neither."""
        block = self.block_configs[index]
        attention = ffn = None
        base = {
            k: v for k, v in self.to_dict().items() if k not in ("block_configs", "model_type", "auto_map")
        }
        if not (block.attention.no_op or block.attention.replace_with_linear):
            heads = self.num_attention_heads // block.attention.n_heads_in_group
            attention = LlamaConfig(**{**base, "num_key_value_heads": heads})
            attention._attn_implementation = self._attn_implementation
        if not (block.ffn.no_op or block.ffn.replace_with_linear):
            width = -(-int(2 * block.ffn.ffn_mult * self.hidden_size / 3) // 256) * 256
            ffn = LlamaConfig(**{**base, "intermediate_size": width})
        return attention, ffn
