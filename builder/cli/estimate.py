"""estimate: predicted time per token and to the first token."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from builder.options import DIRECTORY, JSON, PARALLEL_BLOCKS, asked_plan, emit, plan_options

if TYPE_CHECKING:
    from builder.architecture import Architecture
    from builder.plan import Plan
    from builder.search.setting import Setting

_DEFAULTS = {"tp_size": 8, "batch": 1, "context": 2048}
_PARTS = {
    "attention_weights": "attention weights",
    "kv_cache": "KV cache",
    "ffn_weights": "FFN weights",
    "all_reduce": "all-reduces",
    "overhead": "kernels, launches, host",
    "lm_head": "lm_head",
    "pipeline": "between stages",
}


MOST = 1_000_000_000  # tokens or sequences


@click.command()
@click.argument("model", type=DIRECTORY)
@plan_options
@PARALLEL_BLOCKS
@click.option("--gpu", type=click.Choice(["h100", "h200"]), default="h100", show_default=True)
@click.option("--tp", "tp_size", type=click.IntRange(1), help="Tensor-parallel ranks. Default: 8.")
@click.option(
    "--pp", "pp_size", type=click.IntRange(1), default=1, show_default=True, help="Pipeline stages."
)
@click.option("--nodes", type=click.IntRange(1), help="Machines. Default: as few as have 8 GPUs each.")
@click.option("--batch", type=click.IntRange(1, MOST), help="Sequences at once. Default: 1.")
@click.option(
    "--context", type=click.IntRange(1, MOST), help="Tokens of each in the KV cache. Default: 2048."
)
@click.option(
    "--prompt", type=click.IntRange(1, MOST), help="Tokens before the first one. Default: --context."
)
@click.option(
    "--dtype",
    type=click.Choice(["fp8", "bfloat16"]),
    default="fp8",
    show_default=True,
    help="Of the layers' matrices.",
)
@click.option("--kv-dtype", type=click.Choice(["fp8", "bfloat16"]), help="Of the KV cache. Default: --dtype.")
@click.option("--profile", "table", type=DIRECTORY, help="A table measured with `profile`, for its machine.")
@JSON
def estimate(model: Path, table: Path | None, prompt: int | None, as_json: bool, **options: Any) -> None:
    """Predict MODEL's time per token and to the first token; nothing is run.

    MODEL is a model directory or a bare config.json; with a plan or its options, what becomes of it is
    predicted as well. Figures are computed from the GPU's data sheet and two published ones, and may be
    wrong; with --profile they are sums of what was measured on one machine, part by part.

    \b
    Examples:
        ffn-fusion estimate config.json --gpu h100 --tp 8 --batch 1 --context 2048 --dtype fp8
        ffn-fusion estimate config.json --tp 8 --drop-attention 42-51,53-70
        ffn-fusion estimate config.json --gpu h200 --tp 16 --json
        ffn-fusion estimate model --profile table.json
    """
    parent, child = _architectures(model, asked_plan(options))
    if table is not None:
        _refuse_with_table(prompt)
        result = {"model": str(model), **_measured(parent, child, table, options)}
    else:
        result = {"model": str(model), **_estimated(parent, child, prompt, options)}
    emit(result, as_json, _describe(result))


def _refuse_with_table(prompt: int | None) -> None:
    context, default = click.get_current_context(), click.core.ParameterSource.DEFAULT
    for name in ("gpu", "pp_size", "nodes", "dtype", "kv_dtype"):
        if context.get_parameter_source(name) != default:
            flag = name.removesuffix("_size").replace("_", "-")
            raise click.UsageError(f"--{flag} is for estimates; --profile's machine is what it is")
    if prompt is not None:
        raise click.UsageError("--prompt is for estimates; --profile has no times to the first token")


def _architectures(model: Path, plan: Plan | None) -> tuple[Architecture, Architecture | None]:
    """MODEL's, and that of what a plan makes of it; None without one."""
    from builder import huggingface, random_weights

    if plan is None:
        return huggingface.read_architecture(model), None
    whole = model.is_dir() and random_weights.has_weights(model)
    parent = huggingface.read(model) if whole else huggingface.declared(model, "bfloat16")
    return parent.architecture, plan.apply(parent).architecture


def _estimated(
    parent: Architecture, child: Architecture | None, prompt: int | None, options: dict[str, Any]
) -> dict[str, Any]:
    from builder.search import gpu
    from builder.search.latency import RUNTIME_BYTES, fits, memory
    from builder.search.roofline import estimated
    from builder.search.setting import Setting
    from builder.surgery.sharding import check_stages

    given: dict[str, Any] = {name: options[name] or default for name, default in _DEFAULTS.items()}
    given |= {name: options[name] for name in ("pp_size", "nodes", "dtype", "kv_dtype")}
    setting = Setting(gpu=gpu.named(options["gpu"]), **given)
    model = child or parent
    costs = estimated(model, setting)
    if setting.pp_size > 1:
        check_stages(model, setting.pp_size)
    step, prompt = costs.step(model), prompt or setting.context
    bytes_of = memory(model, setting)
    return {
        "basis": "estimated",
        "source": costs.source,
        **_conditions(setting, prompt),
        **_speed(step.total, setting.batch),
        "ttft_ms": costs.first_token(model, prompt).total * 1e3,
        "breakdown_ms": {name: getattr(step, name) * 1e3 for name in _PARTS},
        "gpu_bytes": bytes_of.total,
        "gpu_weight_bytes": bytes_of.weights,
        "gpu_kv_bytes": bytes_of.kv_cache,
        "gpu_runtime_bytes": RUNTIME_BYTES,
        "gpu_memory_bytes": int(setting.gpu.memory_bytes),
        "fits": fits(model, setting),
        "unchanged": _unchanged(costs.step(parent).total, step.total, setting.batch) if child else None,
    }


def _measured(
    parent: Architecture, child: Architecture | None, table: Path, options: dict[str, Any]
) -> dict[str, Any]:
    from builder.search import measured
    from builder.search.latency import step_seconds

    costs = measured.read(table)
    conditions = {name: options[name] for name in _DEFAULTS if options[name]}
    costs.check(parent, **conditions)
    seconds, facts = step_seconds(child or parent, costs), costs.table
    return {
        "basis": "measured",
        "source": costs.source,
        **{name: getattr(facts, name) for name in (*_DEFAULTS, "dtype", "quant", "device", "hardware")},
        **_speed(seconds, facts.batch),
        "breakdown_ms": _parts(child or parent, costs),
        "unchanged": _unchanged(step_seconds(parent, costs), seconds, facts.batch) if child else None,
    }


def _parts(architecture: Architecture, costs: Any) -> dict[str, float]:
    return {
        "attention": 1e3 * sum(costs.attention(x.attention) for x in architecture.layers),
        "ffn": 1e3 * sum(costs.ffn(x.ffn) for x in architecture.layers),
        "outside": 1e3 * costs.outside(),
    }


def _conditions(setting: Setting, prompt: int) -> dict[str, Any]:
    return {
        "gpu": setting.gpu.name,
        "tp_size": setting.tp_size,
        "pp_size": setting.pp_size,
        "nodes": setting.num_nodes,
        "batch": setting.batch,
        "context": setting.context,
        "prompt": prompt,
        "dtype": setting.dtype,
        "kv_dtype": setting.kv_dtype or setting.dtype,
    }


def _speed(seconds: float, batch: int) -> dict[str, float]:
    return {
        "ms_per_token": seconds * 1e3,
        "tokens_per_s": 1 / seconds,
        "tokens_per_s_batch": batch / seconds,
    }


def _unchanged(before: float, after: float, batch: int) -> dict[str, float]:
    """MODEL without the plan, and how many times faster the plan makes it."""
    return {**_speed(before, batch), "speedup": before / after}


def _describe(result: dict[str, Any]) -> str:
    how = result["basis"]
    lines = [
        f"{result['model']}: {result['source']}",
        "",
        f"{'time per token':26} {result['ms_per_token']:10.3f} ms        {how}",
        f"{'tokens/s, each user':26} {result['tokens_per_s']:10.2f}           {how}",
        f"{'tokens/s, batch':26} {result['tokens_per_s_batch']:10.2f}           {how}",
    ]
    if "ttft_ms" in result:
        label = f"first token, {result['prompt']} tokens"
        lines.append(f"{label:26} {result['ttft_ms']:10.2f} ms        {how}")
    lines += ["", f"of a token's time{'':21}{how}"]
    for name, value in result["breakdown_ms"].items():
        share = value / result["ms_per_token"]
        lines.append(f"  {_PARTS.get(name, name):24} {value:10.3f} ms {share:6.1%}")
    if "gpu_bytes" in result:
        lines += ["", *_memory(result)]
    if result["unchanged"]:
        before = result["unchanged"]
        lines += [
            "",
            f"without the plan: {before['ms_per_token']:.3f} ms, {before['tokens_per_s']:.2f} tokens/s; "
            f"the plan makes it {before['speedup']:.3f} times faster, {how}",
        ]
    return "\n".join(lines)


def _memory(result: dict[str, Any]) -> list[str]:
    rows = (
        ("memory of a GPU", result["gpu_bytes"] + result["gpu_runtime_bytes"], "sum of the three below"),
        ("  weights", result["gpu_weight_bytes"], "counted, the fullest rank"),
        ("  KV cache", result["gpu_kv_bytes"], "counted, all sequences at full context"),
        ("  runtime", result["gpu_runtime_bytes"], "assumed"),
    )
    lines = [f"{name:26} {size / 1e9:10.2f} GB        {how}" for name, size, how in rows]
    if not result["fits"]:
        lines.append(
            f"does not fit: {rows[0][1]:,} bytes, an {result['gpu']} has {result['gpu_memory_bytes']:,}; "
            "take more --tp or --pp, or a smaller --batch or --context"
        )
    return lines
