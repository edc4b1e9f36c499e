"""Estimated latency: bytes and FLOPs against a GPU's peaks, all-reduces, and what kernels cost besides.

The formulas, and where each constant comes from, are in docs/latency-model.md. Nothing here was measured by
this project.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, fields
from math import log2

from builder.architecture import FFN, Architecture, Attention, Linear
from builder.search.latency import OUTSIDE_BYTES, shared_all_reduces
from builder.search.setting import Setting

ACTIVATION_BYTES = 2  # bfloat16, between the parts and in all-reduces


@dataclass(frozen=True, kw_only=True)
class Constants:
    """The model's parameters: fractions of a peak, and seconds."""

    memory_efficiency: float = 0.9  # of the memory's bandwidth, reached by a large matrix
    matmul_efficiency: float = 0.7  # of the dense peak, reached by a matmul on many tokens
    link_efficiency: float = 0.8  # of the bandwidth of NVLink and network, reached by large messages
    peer_s: float = 1e-6  # of an all-reduce, for each rank that NVLink joins
    hop_s: float = 10e-6  # of each message between nodes
    step_s: float = 1e-3  # of the host between two steps: scheduling, sampling, sending tokens
    issue_s: float = 51.5e-6  # fitted: issuing the kernels of one part, while the GPU works
    kernels_s: float = 5.8e-6  # fitted: a part's norm, quantisation, activation and gaps on the GPU


CONSTANTS = Constants()


@dataclass(frozen=True, kw_only=True)
class Work:
    """Seconds of a part, or of a whole step, by what they go to."""

    attention_weights: float = 0.0
    kv_cache: float = 0.0
    ffn_weights: float = 0.0
    all_reduce: float = 0.0
    overhead: float = 0.0
    lm_head: float = 0.0
    pipeline: float = 0.0

    @property
    def total(self) -> float:
        return sum(asdict(self).values())

    def __add__(self, other: Work) -> Work:
        return Work(**{f.name: getattr(self, f.name) + getattr(other, f.name) for f in fields(Work)})


@dataclass(frozen=True, kw_only=True)
class Roofline:
    """Estimated costs of the parts that a model with `architecture`'s sizes may have, under `setting`.

    `architecture` is the whole model; its layers do not matter, so one Roofline prices all its descendants.
    """

    architecture: Architecture
    setting: Setting
    constants: Constants = CONSTANTS

    @property
    def measured(self) -> bool:
        return False

    @property
    def source(self) -> str:
        return f"estimated for {self.setting.describe()}"

    def attention(self, attention: Attention | Linear | None) -> float:
        return self._decode_attention(attention).total

    def ffn(self, ffn: FFN | Linear | None) -> float:
        return self._ffn(ffn, self.setting.batch).total

    def outside(self) -> float:
        return self._outside(self.setting.batch).total

    def all_reduce(self) -> float:
        return self._all_reduce(self.setting.batch)

    def step(self, architecture: Architecture) -> Work:
        """One decode step, taken apart; its total is `latency.step_seconds`."""
        work = self._outside(self.setting.batch) + self._shared(architecture, self.setting.batch)
        for layer in architecture.layers:
            work += self._decode_attention(layer.attention) + self._ffn(layer.ffn, self.setting.batch)
        return work

    def first_token(self, architecture: Architecture, prompt: int) -> Work:
        """From prompts of so many tokens, one a sequence, all at once, to their first tokens."""
        tokens = self.setting.batch * prompt
        work = self._outside(tokens) + self._shared(architecture, tokens)
        for layer in architecture.layers:
            work += self._prefill_attention(layer.attention, prompt) + self._ffn(layer.ffn, tokens)
        return work

    def _decode_attention(self, attention: Attention | Linear | None) -> Work:
        s = self.setting
        if attention is None:
            return Work()
        if isinstance(attention, Linear):
            return self._part(Work(attention_weights=self._matrix(self._linear_elements(), s.batch)), s.batch)
        cached = s.batch * s.context * 2 * self._kv_heads(attention) * self.architecture.head_dim * s.kv_bytes
        weights = self._matrix(self._attention_elements(attention), s.batch)
        return self._part(Work(attention_weights=weights, kv_cache=self._read(cached)), s.batch)

    def _prefill_attention(self, attention: Attention | Linear | None, prompt: int) -> Work:
        tokens = self.setting.batch * prompt
        if attention is None:
            return Work()
        if isinstance(attention, Linear):
            return self._part(Work(attention_weights=self._matrix(self._linear_elements(), tokens)), tokens)
        # Scores and their product with V, both causal: half of prompt^2, multiply-adds x 2.
        flops = 2 * self._q_size * prompt * tokens
        peak = self.setting.gpu.flops("bfloat16") * self.constants.matmul_efficiency
        weights = self._matrix(self._attention_elements(attention), tokens)
        return self._part(Work(attention_weights=weights, kv_cache=flops / peak), tokens)

    def _ffn(self, ffn: FFN | Linear | None, tokens: int) -> Work:
        if ffn is None:
            return Work()
        if isinstance(ffn, Linear):
            return self._part(Work(ffn_weights=self._matrix(self._linear_elements(), tokens)), tokens)
        elements = 3 * self.architecture.hidden_size * -(-ffn.intermediate_size // self.setting.tp_size)
        return self._part(Work(ffn_weights=self._matrix(elements, tokens)), tokens)

    def _part(self, work: Work, tokens: int) -> Work:
        """`work` on the GPU, what the kernels cost besides, and the all-reduce after it."""
        c, busy = self.constants, work.total
        overhead = max(c.issue_s, busy + c.kernels_s) - busy
        return work + Work(overhead=overhead, all_reduce=self._all_reduce(tokens))

    def _shared(self, architecture: Architecture, tokens: int) -> Work:
        """What blocks in parallel save."""
        return Work(all_reduce=-shared_all_reduces(architecture) * self._all_reduce(tokens))

    def _all_reduce(self, tokens: int) -> float:
        return self._exchange(self._activations(tokens), passes=2)

    def _activations(self, tokens: int) -> int:
        """Bytes of so many tokens' hidden states."""
        return tokens * self.architecture.hidden_size * ACTIVATION_BYTES

    def _outside(self, tokens: int) -> Work:
        """The host, lm_head on one token a sequence, and the way of `tokens` from stage to stage."""
        s, a = self.setting, self.architecture
        rows = -(-a.vocab_size // s.tp_size)
        elements, logits = rows * a.hidden_size, s.batch * a.vocab_size * ACTIVATION_BYTES
        flops = 2 * elements * s.batch / (s.gpu.bfloat16_flops * self.constants.matmul_efficiency)
        return Work(
            overhead=self.constants.step_s,
            lm_head=max(self._read(elements * OUTSIDE_BYTES), flops) + self._exchange(logits, passes=1),
            pipeline=self._pipeline(self._activations(tokens)),
        )

    def _read(self, num_bytes: float) -> float:
        return num_bytes / (self.setting.gpu.memory_bandwidth * self.constants.memory_efficiency)

    def _matrix(self, elements: int, tokens: int) -> float:
        """Matrices of a layer, read once and multiplied with `tokens` vectors: the longer of the two."""
        s = self.setting
        flops = 2 * elements * tokens / (s.gpu.flops(s.dtype) * self.constants.matmul_efficiency)
        return max(self._read(elements * s.weight_bytes), flops)

    def _exchange(self, num_bytes: float, passes: int) -> float:
        """An all-reduce (2 passes) or all-gather (1) of so many bytes over the tensor-parallel ranks.

        Each node's ranks divide the message among them, and each then exchanges its share with its peers
        elsewhere.
        """
        s, c = self.setting, self.constants
        local, nodes = s.tp_ranks_per_node, s.tp_nodes
        seconds = 0.0
        if local > 1:
            seconds += c.peer_s * local
            seconds += passes * (local - 1) / local * num_bytes / (s.gpu.nvlink_bandwidth * c.link_efficiency)
        if nodes > 1:
            seconds += c.hop_s * passes * log2(nodes)
            share = num_bytes / local
            seconds += passes * (nodes - 1) / nodes * share / (s.gpu.network_bandwidth * c.link_efficiency)
        return seconds

    def _pipeline(self, num_bytes: float) -> float:
        """Between stages: each rank sends its share of the activations to the next stage."""
        s, c = self.setting, self.constants
        abroad = (s.num_nodes - 1) if s.tp_nodes == 1 else s.pp_size - 1
        share = num_bytes / s.tp_size / c.link_efficiency
        at_home = s.pp_size - 1 - abroad
        near = c.peer_s * 2 + share / s.gpu.nvlink_bandwidth
        return at_home * near + abroad * (c.hop_s + share / s.gpu.network_bandwidth)

    @property
    def _q_size(self) -> int:
        """Rows of a rank's query projection."""
        return self.architecture.q_size // self.setting.tp_size

    def _kv_heads(self, attention: Attention) -> int:
        """A rank's; repeated where there are fewer than ranks."""
        return max(1, attention.num_key_value_heads // self.setting.tp_size)

    def _attention_elements(self, attention: Attention) -> int:
        kv_size = self._kv_heads(attention) * self.architecture.head_dim
        return self.architecture.hidden_size * 2 * (self._q_size + kv_size)

    def _linear_elements(self) -> int:
        return self.architecture.hidden_size * -(-self.architecture.hidden_size // self.setting.tp_size)


def estimated(architecture: Architecture, setting: Setting) -> Roofline:
    """Estimated costs for `architecture` and what surgery makes of it.

    Raises UserError where tp_size does not fit, see `Architecture.shard`.
    """
    architecture.shard(setting.tp_size)
    return Roofline(architecture=architecture, setting=setting)
