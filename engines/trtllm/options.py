"""What an engine is built for, and the command line of trtllm-build that says so."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import yaml

from builder.errors import UserError

CHOICES = {  # as trtllm-build's own parser has them (plugin.py and build.py, 0.20 to 1.2)
    "gemm_plugin": ("auto", "disable", "float16", "bfloat16", "float32", "fp8"),
    "kv_cache_type": ("paged", "continuous"),
    "log_level": ("internal_error", "error", "warning", "info", "verbose", "debug"),
}
DEFAULT_MAX_SEQ_LEN = 8192  # or the model's limit: trtllm-build's own default is that limit alone


@dataclass(frozen=True, kw_only=True)
class BuildOptions:
    """Limits in tokens and requests; None leaves a choice to `resolve` or to trtllm-build.

    The defaults are for latency on Hopper: small batches, GEMM plugin for 16-bit weights.
    """

    max_batch_size: int = 32
    max_input_len: int | None = None
    max_seq_len: int | None = None
    max_num_tokens: int = 8192
    opt_num_tokens: int | None = None
    max_beam_width: int = 1
    multiple_profiles: bool = False
    gemm_plugin: str | None = None
    gemm_swiglu_plugin: bool = False
    low_latency_gemm_plugin: bool = False
    kv_cache_type: str = "paged"
    use_paged_context_fmha: bool = True
    use_fp8_context_fmha: bool | None = None
    use_fused_mlp: bool | None = None
    weight_streaming: bool = False
    max_draft_len: int | None = None
    timing_cache: str | None = None
    workers: int | None = None
    log_level: str = "info"

    def __post_init__(self) -> None:
        for field in fields(self):
            value, kind = getattr(self, field.name), str(field.type)
            if value is None and "None" in kind:
                continue
            expected: type = next(t for t in (bool, int, str) if t.__name__ in kind)
            if type(value) is not expected or (type(value) is int and value < 1):
                what = {bool: "true or false", int: "a positive number", str: "a text"}[expected]
                raise UserError(f"{field.name}: {value!r} is not {what}")
        for name, allowed in CHOICES.items():
            if getattr(self, name) not in (*allowed, None):
                raise UserError(f"{name}: {getattr(self, name)!r} is not one of {', '.join(allowed)}")


def read(file: Path | None, given: Mapping[str, Any]) -> BuildOptions:
    """Options from a build.yaml and from the command line, which wins. Unknown keys are errors."""
    values: dict[str, Any] = {}
    if file is not None:
        try:
            loaded = yaml.safe_load(file.read_text(encoding="utf-8"))
        except FileNotFoundError:
            raise UserError(f"{file}: missing; give a YAML file with build options") from None
        except (yaml.YAMLError, UnicodeDecodeError) as error:
            line = getattr(getattr(error, "problem_mark", None), "line", None)
            where = f" at line {line + 1}" if line is not None else ""
            raise UserError(f"{file}: not valid YAML{where}") from None
        if not isinstance(loaded, dict):
            raise UserError(f"{file}: not a mapping of build options, e.g. `max_batch_size: 32`")
        known = {f.name for f in fields(BuildOptions)}
        for key in loaded:
            if key not in known:
                raise UserError(f"{file}: {key!r} is no build option; known are {', '.join(sorted(known))}")
        values = loaded
    try:
        return BuildOptions(**{**values, **{k: v for k, v in given.items() if v is not None}})
    except UserError as error:
        raise UserError(f"{file}: {error}") if file else error from None


@dataclass(frozen=True, kw_only=True)
class Build:
    """Options with every choice made, for one checkpoint."""

    options: BuildOptions
    max_input_len: int
    max_seq_len: int
    gemm_plugin: str
    use_fp8_context_fmha: bool
    use_fused_mlp: bool
    workers: int

    def arguments(self, checkpoint: Path, output: Path, *, mpi: bool = False) -> list[str]:
        """The arguments of trtllm-build; under MPI its processes are the workers."""
        o = self.options
        values: list[tuple[str, object]] = [
            ("checkpoint_dir", checkpoint),
            ("output_dir", output),
            ("max_batch_size", o.max_batch_size),
            ("max_input_len", self.max_input_len),
            ("max_seq_len", self.max_seq_len),
            ("max_num_tokens", o.max_num_tokens),
            ("max_beam_width", o.max_beam_width),
            ("kv_cache_type", o.kv_cache_type),
            ("gemm_plugin", self.gemm_plugin),
            ("use_paged_context_fmha", _switch(o.use_paged_context_fmha)),
            ("use_fp8_context_fmha", _switch(self.use_fp8_context_fmha)),
            ("use_fused_mlp", _switch(self.use_fused_mlp)),
            ("multiple_profiles", _switch(o.multiple_profiles)),
            ("remove_input_padding", "enable"),
        ]
        if o.opt_num_tokens is not None:
            values.append(("opt_num_tokens", o.opt_num_tokens))
        for name in ("gemm_swiglu_plugin", "low_latency_gemm_plugin"):
            if getattr(o, name):
                values.append((name, "fp8"))
        if o.max_draft_len is not None:  # the target of a draft model (examples/draft_target_model/README.md)
            values += [
                ("speculative_decoding_mode", "draft_tokens_external"),
                ("max_draft_len", o.max_draft_len),
            ]
        if o.timing_cache is not None:
            values += [("input_timing_cache", o.timing_cache), ("output_timing_cache", o.timing_cache)]
        if not mpi:
            values.append(("workers", self.workers))
        values.append(("log_level", o.log_level))
        words = [word for name, value in values for word in (f"--{name}", str(value))]
        return [*words, *["--weight_streaming"] * o.weight_streaming]


def _switch(on: bool) -> str:
    return "enable" if on else "disable"


def _check(
    o: BuildOptions, max_input_len: int, *, fp8: bool, fp8_kv_cache: bool, fused_mlp_fits: bool
) -> None:
    """Each option against the others and the checkpoint. Raises UserError naming the option."""
    if o.max_num_tokens < o.max_batch_size * o.max_beam_width:
        raise UserError(
            f"max_num_tokens: {o.max_num_tokens} is less than one token for each of "
            f"{o.max_batch_size} x {o.max_beam_width} sequences"
        )
    if not o.use_paged_context_fmha and o.max_num_tokens < max_input_len:
        raise UserError(
            f"max_num_tokens: {o.max_num_tokens} is less than max_input_len {max_input_len}, and prompts "
            "cannot be cut into chunks without use_paged_context_fmha"
        )
    if o.multiple_profiles and o.opt_num_tokens is not None:
        raise UserError("opt_num_tokens: trtllm-build refuses it beside multiple_profiles; choose one")
    if o.kv_cache_type != "paged" and o.use_paged_context_fmha:
        raise UserError(f"kv_cache_type: {o.kv_cache_type} needs use_paged_context_fmha off")
    for name in ("gemm_swiglu_plugin", "low_latency_gemm_plugin"):
        if getattr(o, name) and not fp8:
            raise UserError(f"{name}: takes FP8 weights only; convert with --quant fp8 or leave it out")
    if o.gemm_plugin == "fp8" and not fp8:
        raise UserError("gemm_plugin: fp8 takes FP8 weights only; convert with --quant fp8 or say auto")
    if o.use_fp8_context_fmha and not fp8_kv_cache:
        raise UserError("use_fp8_context_fmha: needs an FP8 KV cache; convert with --kv-cache fp8")
    if o.use_fp8_context_fmha and not o.use_paged_context_fmha:
        raise UserError("use_fp8_context_fmha: needs use_paged_context_fmha")
    if o.max_draft_len is not None and (o.max_beam_width > 1 or not o.use_paged_context_fmha):
        raise UserError("max_draft_len: needs max_beam_width 1 and use_paged_context_fmha")
    if o.use_fused_mlp and not fused_mlp_fits:
        raise UserError(
            "use_fused_mlp: the joined gate and up weight of a layer has 2^31 elements or more a rank; "
            "leave the option out, convert with a larger --tp, or fuse smaller groups"
        )


def resolve(
    options: BuildOptions,
    *,
    max_position_embeddings: int,
    world_size: int,
    fp8: bool,
    fp8_kv_cache: bool,
    fused_mlp_fits: bool,
) -> Build:
    """Make every choice and check each against the others. Raises UserError naming the option."""
    o = options
    limit = max_position_embeddings
    max_seq_len = o.max_seq_len or min(limit, DEFAULT_MAX_SEQ_LEN)
    if max_seq_len > limit:
        raise UserError(f"max_seq_len: {max_seq_len} is above the model's max_position_embeddings {limit}")
    # A target is asked again and again, with all that was said so far as its prompt.
    half = max(1, max_seq_len // 2) if o.max_draft_len is None else max_seq_len - 1
    max_input_len = o.max_input_len or half
    if max_input_len >= max_seq_len:
        raise UserError(f"max_input_len: {max_input_len} leaves no token of max_seq_len {max_seq_len}")
    _check(o, max_input_len, fp8=fp8, fp8_kv_cache=fp8_kv_cache, fused_mlp_fits=fused_mlp_fits)
    gemm_plugin = o.gemm_plugin or ("disable" if fp8 or o.weight_streaming else "auto")
    if o.weight_streaming and gemm_plugin != "disable":
        raise UserError(
            f"weight_streaming: needs gemm_plugin disable, not {gemm_plugin}: a plugin's weights stay put"
        )
    return Build(
        options=o,
        max_input_len=max_input_len,
        max_seq_len=max_seq_len,
        gemm_plugin=gemm_plugin,
        use_fp8_context_fmha=(
            (fp8_kv_cache and o.use_paged_context_fmha)
            if o.use_fp8_context_fmha is None
            else o.use_fp8_context_fmha
        ),
        use_fused_mlp=fused_mlp_fits if o.use_fused_mlp is None else o.use_fused_mlp,
        workers=min(o.workers or world_size, world_size),
    )
