"""What must hold between the files of a model repository, written by us or changed by hand since."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from builder.errors import UserError
from engines import manifest as manifests
from triton_repo import pbtxt
from triton_repo.flavours.llmapi import MODEL_YAML

GUIDED = ("tokenizer_dir", "guided_decoding_backend", "xgrammar_tokenizer_info_path")
TEXT = ("preprocessing", "postprocessing", "ensemble")
BATCHING = ("inflight_fused_batching", "inflight_batching", "V1", "v1")


def llmapi(repository: Path) -> bool:
    """Whether its tensorrt_llm is the LLM API's, which takes text itself."""
    return (repository / "tensorrt_llm" / "1" / MODEL_YAML).is_file()


def check(repository: Path) -> dict[str, Any]:
    """The parsed config of every model. Raises UserError naming the file and what does not fit."""
    configs = {}
    for file in sorted(repository.glob("*/config.pbtxt")):
        configs[file.parent.name] = pbtxt.read(file)
    models = ("tensorrt_llm",) if llmapi(repository) else ("tensorrt_llm", *TEXT)
    for name in models:
        if name not in configs:
            raise UserError(f"{repository}: has no {name}/config.pbtxt; write the repository with deploy")
    for name, config in configs.items():
        file = repository / name / "config.pbtxt"
        for problem in _problems(name, config, configs, repository):
            raise UserError(f"{file}: {problem}")
    return configs


def _problems(name: str, config: Any, configs: dict[str, Any], repository: Path) -> Iterator[str]:
    """What is wrong with one model, the first of it is told."""
    if config.name != name:
        yield f"name is {config.name!r}, the directory's is {name!r}; they must be the same"
    if not (repository / name / "1").is_dir():
        yield "the version directory 1 is missing; Triton loads no model without one"
    if config.backend == "python" and not (repository / name / "1" / "model.py").is_file():
        yield "1/model.py is missing; write the repository again with deploy"
    yield from _alike(config, configs["tensorrt_llm"])
    yield from _paths(config)
    yield from _instances(config)
    if config.backend == "tensorrtllm":
        yield from _backend(config)
    if config.platform == "ensemble":
        yield from _steps(config, configs)
    if name == "tensorrt_llm_bls":
        yield from _names(config, configs)
    if name == "tensorrt_llm" and llmapi(repository):
        yield from _llmapi(config, repository / name / "1" / MODEL_YAML)


def _parameter(config: Any, name: str) -> str:
    return str(config.parameters[name].string_value) if name in config.parameters else ""


def _alike(config: Any, tokens: Any) -> Iterator[str]:
    """Batch size, kinds of logits, streaming and tokenizer are one for all models."""
    if config.max_batch_size != tokens.max_batch_size:
        yield f"max_batch_size: {config.max_batch_size}, in tensorrt_llm {tokens.max_batch_size}; make it one"
    kinds = {t.name: t.data_type for t in tokens.output if t.name.endswith("_logits")}
    for tensor in config.output:
        if tensor.name in kinds and tensor.data_type != kinds[tensor.name]:
            yield f"{tensor.name} has another data_type than in tensorrt_llm; make them one"
    streams = tokens.model_transaction_policy.decoupled
    if config.name == "tensorrt_llm_bls" and config.model_transaction_policy.decoupled != streams:
        yield "decoupled is not what tensorrt_llm says; make them one"
    if config.name in ("preprocessing", "postprocessing"):
        ours, theirs = _parameter(config, "tokenizer_dir"), _parameter(tokens, "tokenizer_dir")
        if ours != theirs:
            yield f"tokenizer_dir is {ours}, tensorrt_llm's {theirs}; tokens would mean different texts"


def _paths(config: Any) -> Iterator[str]:
    tokenizer = _parameter(config, "tokenizer_dir")
    if "tokenizer_dir" in config.parameters and not (Path(tokenizer) / "tokenizer.json").is_file():
        yield f"tokenizer_dir {tokenizer} has no tokenizer.json; name the Hugging Face directory"
    engine = _parameter(config, "gpt_model_path")
    if "gpt_model_path" in config.parameters and not (Path(engine) / "config.json").is_file():
        yield f"gpt_model_path {engine} has no config.json; name an engine directory"


def _instances(config: Any) -> Iterator[str]:
    ids = _parameter(config, "gpu_device_ids")
    lists = [part.split(",") for part in ids.split(";")] if ids else []
    count = sum(group.count for group in config.instance_group)
    if lists and len(lists) != count:
        yield f"gpu_device_ids {ids!r} has {len(lists)} lists for {count} instances; give one each"
    if config.name == "tensorrt_llm" and count > 1 and not lists:
        yield f"{count} instances need gpu_device_ids, one list each, e.g. 0,1;2,3"
    gpus = [gpu.strip() for part in lists for gpu in part]
    if len(set(gpus)) != len(gpus):
        yield f"gpu_device_ids {ids!r} names a GPU twice; instances would share it"


def _backend(config: Any) -> Iterator[str]:
    """What the C++ backend asks for."""
    for key in GUIDED:
        if key not in config.parameters:
            yield f"parameter {key} is missing and the backend fails without it, even if empty"
    kind = _parameter(config, "gpt_model_type")
    if kind not in BATCHING:
        yield f"gpt_model_type is {kind!r}; the backend takes {', '.join(BATCHING)}"
    if any(tensor.name == "streaming" for tensor in config.input) and not (
        config.model_transaction_policy.decoupled
    ):
        yield "streaming needs model_transaction_policy { decoupled: true }"
    yield from _engine(config, Path(_parameter(config, "gpt_model_path")))


def _engine(config: Any, directory: Path) -> Iterator[str]:
    """The engine's own contract, and the files that it promises."""
    engine = manifests.read(directory)
    if config.max_batch_size > engine.max_batch_size:
        yield f"max_batch_size is {config.max_batch_size}, the engine's {engine.max_batch_size}; lower it"
    beams, most = _parameter(config, "max_beam_width"), engine.compiler.get("max_beam_width", 1)
    if not beams.isdecimal() or not 1 <= int(beams) <= most:
        yield f"max_beam_width is {beams!r}, the engine was built for {most}"
    fraction = _parameter(config, "kv_cache_free_gpu_mem_fraction")
    if not re.fullmatch(r"0?\.\d+", fraction) or float(fraction) == 0:
        yield f"kv_cache_free_gpu_mem_fraction is {fraction!r}; give a number between 0 and 1"
    missing = [r for r in range(engine.world_size) if not (directory / f"rank{r}.engine").is_file()]
    if missing:
        yield f"{directory}/rank{missing[0]}.engine is missing; build or copy the engine again"
    ids = _parameter(config, "gpu_device_ids")
    for part in ids.split(";") if ids else []:
        if len(part.split(",")) != engine.world_size:
            yield f"gpu_device_ids {ids!r}: an instance of this engine needs {engine.world_size} GPUs"


def _steps(config: Any, configs: dict[str, Any]) -> Iterator[str]:
    made = {tensor.name for tensor in config.input}
    for step in config.ensemble_scheduling.step:
        if step.model_name not in configs:
            yield f"step {step.model_name} is no model of this repository"
            return
        model = configs[step.model_name]
        for kind, theirs, ours in (
            ("input", model.input, step.input_map),
            ("output", model.output, step.output_map),
        ):
            unknown = set(ours) - {tensor.name for tensor in theirs}
            if unknown:
                yield f"step {step.model_name} maps {sorted(unknown)[0]!r}, which is no {kind} of that model"
        loose = set(step.input_map.values()) - made
        if loose:
            yield f"step {step.model_name} reads {sorted(loose)[0]!r}, which no earlier step makes"
        made |= set(step.output_map.values())


def _names(config: Any, configs: dict[str, Any]) -> Iterator[str]:
    for key in ("tensorrt_llm_model_name", "tensorrt_llm_draft_model_name"):
        model = _parameter(config, key)
        if model and model not in configs:
            yield f"{key} {model!r} is no model of this repository"


def _llmapi(config: Any, file: Path) -> Iterator[str]:
    import yaml

    try:
        values = yaml.safe_load(file.read_text(encoding="utf-8"))
        triton, model = values["triton_config"], Path(values["model"])
        said = triton["decoupled"], triton["max_batch_size"]
    except (yaml.YAMLError, UnicodeDecodeError, KeyError, TypeError):
        yield f"{file} has no model, or no triton_config with decoupled and max_batch_size; deploy again"
        return
    if said != (config.model_transaction_policy.decoupled, config.max_batch_size):
        yield f"{file} says other values of decoupled and max_batch_size; make them one"
    if config.max_batch_size != 0:
        yield "max_batch_size is not 0; the LLM API batches by itself and takes one prompt a request"
    if not (model / "config.json").is_file():
        yield f"{file}: model {model} has no config.json; name the Hugging Face directory"
