"""config.pbtxt from typed data and read back, through Triton's own protobuf."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from builder.errors import UserError


@dataclass(frozen=True, kw_only=True)
class Tensor:
    """A model's input or output; `dims` leave the batch dimension out, -1 is any size.

    `ragged`: requests of unlike sizes may share a batch; `scalar`: the model sees the batch dimension alone.
    """

    name: str
    data_type: str
    dims: tuple[int, ...] = (1,)
    optional: bool = False
    ragged: bool = False
    scalar: bool = False


@dataclass(frozen=True, kw_only=True)
class Step:
    """A model of an ensemble; the maps go from its tensor names to the ensemble's."""

    model: str
    inputs: dict[str, str]
    outputs: dict[str, str]


@dataclass(frozen=True, kw_only=True)
class Batching:
    """Triton's dynamic batcher; 0 is no delay and no limit of the queue."""

    max_queue_delay_us: int = 0
    max_queue_size: int = 0


@dataclass(frozen=True, kw_only=True)
class Model:
    """One model of a repository, an ensemble where it has steps.

    `code` names files of `triton_repo.models`; the first is the model, the others are imported by it.
    `ttft_buckets_ms` are upper edges of its histogram of first responses, for Triton from 24.11 on.
    """

    name: str
    inputs: tuple[Tensor, ...]
    outputs: tuple[Tensor, ...]
    backend: str = "python"
    instances: int = 1
    max_batch_size: int = 1
    batching: Batching | None = None
    decoupled: bool = False
    parameters: dict[str, str] = field(default_factory=dict)
    steps: tuple[Step, ...] = ()
    code: tuple[str, ...] = ()
    ttft_buckets_ms: tuple[float, ...] = ()


_PLACEHOLDER = re.compile(r"\$\{\w*\}")


def read(file: Path) -> Any:
    """The ModelConfig message of a config.pbtxt. Raises UserError naming the place that cannot be read."""
    from google.protobuf import text_format

    written = file.read_text(encoding="utf-8", errors="replace")
    for number, line in enumerate(written.splitlines(), 1):
        found = _PLACEHOLDER.search(line)
        if found:
            raise UserError(f"{file}: line {number} holds the placeholder {found[0]}; fill it in")
    try:
        return text_format.Parse(written, _messages().ModelConfig())
    except text_format.ParseError as error:
        raise UserError(f"{file}: {error}; write the repository again with deploy") from None


def _messages() -> Any:
    try:
        from tritonclient.grpc import model_config_pb2
    except ModuleNotFoundError:
        raise UserError("tritonclient is missing; pip install 'ffn-fusion[triton]'") from None
    return model_config_pb2


def text(model: Model) -> str:
    """The config.pbtxt of `model`, read back and compared before it is returned."""
    message = _message(model)
    from google.protobuf import text_format

    written = text_format.MessageToString(message)
    again = text_format.Parse(written, type(message)())
    assert again == message, model.name
    return written


def _message(model: Model) -> Any:
    messages = _messages()
    config = messages.ModelConfig(name=model.name, max_batch_size=model.max_batch_size)
    for tensor in model.inputs:
        entry = config.input.add(name=tensor.name, dims=tensor.dims, optional=tensor.optional)
        entry.data_type = messages.DataType.Value(f"TYPE_{tensor.data_type}")
        entry.allow_ragged_batch = tensor.ragged
        if tensor.scalar:
            entry.reshape.SetInParent()
    for tensor in model.outputs:
        output = config.output.add(name=tensor.name, dims=tensor.dims)
        output.data_type = messages.DataType.Value(f"TYPE_{tensor.data_type}")
    for key, value in model.parameters.items():
        config.parameters[key].string_value = value
    if model.ttft_buckets_ms:
        control = config.model_metrics.metric_control.add()
        control.metric_identifier.family = "nv_inference_first_response_histogram_ms"
        control.histogram_options.buckets.extend(model.ttft_buckets_ms)
    if model.steps:
        config.platform = "ensemble"
        for step in model.steps:
            entry = config.ensemble_scheduling.step.add(model_name=step.model, model_version=-1)
            entry.input_map.update(step.inputs)
            entry.output_map.update(step.outputs)
        return config
    config.backend = model.backend
    if model.batching is not None:
        batching = config.dynamic_batching
        batching.preferred_batch_size.append(model.max_batch_size)
        batching.max_queue_delay_microseconds = model.batching.max_queue_delay_us
        batching.default_queue_policy.max_queue_size = model.batching.max_queue_size
    config.instance_group.add(count=model.instances, kind=messages.ModelInstanceGroup.KIND_CPU)
    config.model_transaction_policy.decoupled = model.decoupled
    return config
