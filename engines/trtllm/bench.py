"""An engine measured by TensorRT-LLM's own trtllm-bench: no server, no HTTP, token ids in and out.

trtllm-bench (tensorrt_llm/commands/bench.py and tensorrt_llm/bench, 0.20 on) loads the engine in every
run. Its `latency` mode serves one request at a time; its `throughput` mode keeps several in flight and
tells the time of the first token with --streaming only. It starts the ranks itself, over MPI's spawn, so
it is run alone, outside any mpirun. Output is as long as asked: it gives no end token.
"""

from __future__ import annotations

import json
import random
from pathlib import Path

import yaml

from builder.errors import UserError
from builder.storage import read_json
from engines import hardware, logged, manifest, mpi
from engines.mpi import inner_environment
from engines.trtllm import bench_report, release
from engines.trtllm.bench_command import (
    ENGINE,
    PYTORCH,
    Load,
    Subject,
    arguments,
    llm_arguments,
    llm_options,
    takes_yaml,
)
from engines.trtllm.bench_report import Result

COMMAND = "trtllm-bench"
WEIGHTS = ("model.safetensors", "model.safetensors.index.json")


def installed() -> str:
    """The version of the TensorRT-LLM whose trtllm-bench will run. Raises UserError where it cannot."""
    version = release.installed()
    if not (release.builds_engines(version) or release.has_pytorch_backend(version)):
        raise UserError(
            f"tensorrt_llm: {version} has no {COMMAND} this package calls, 0.20 and later have; "
            f"{release.CONTAINER}"
        )
    release.script(COMMAND)
    return version


def subject(directory: Path, tokenizer: Path | None, version: str) -> Subject:
    """Read an engine directory. Raises UserError where `version` cannot run it or its model is not there."""
    contract = manifest.read(directory)
    built = contract.compiler.get("tensorrt_llm")
    if contract.backend == ENGINE:
        if not release.builds_engines(version):
            raise UserError(f"tensorrt_llm: {version} runs no engines, {release.ENGINES} does")
        if built != version:
            raise UserError(
                f"{directory}: built by TensorRT-LLM {built}, {version} is installed; "
                "build the engine again or use the release it was built by"
            )
        if tokenizer is None:
            raise UserError(f"{directory}: {COMMAND} needs the model's directory; give --tokenizer DIR")
        model = tokenizer
    elif contract.backend == PYTORCH:
        if not release.has_pytorch_backend(version):
            raise UserError(f"tensorrt_llm: {version} has no PyTorch backend to run {directory}, 1.0 has")
        model = Path(contract.compiler["model"])
    else:
        raise UserError(
            f"{directory}: backend {contract.backend}, {COMMAND} runs {ENGINE} and {PYTORCH}; "
            "use --via triton"
        )
    read_json(model / "config.json")
    if not any((model / name).is_file() for name in WEIGHTS):
        raise UserError(
            f"{model}: has neither {WEIGHTS[0]} nor {WEIGHTS[1]}, where {COMMAND} counts the parameters; "
            "give the model's own directory"
        )
    return Subject(directory=directory.resolve(), model=model.resolve(), manifest=contract)


def check(measured: Subject, load: Load, version: str) -> None:
    """Refuse what the engine, the machine or this release cannot do. Raises UserError naming the value."""
    limits, directory = measured.manifest, measured.directory
    if mpi.place()[1] > 1:
        raise UserError(f"mpirun: {COMMAND} starts its own ranks; run compare-latency without mpirun")
    if load.concurrency > limits.max_batch_size:
        raise UserError(
            f"concurrency: {load.concurrency} is above max_batch_size {limits.max_batch_size} of "
            f"{directory}; give --concurrency up to {limits.max_batch_size}"
        )
    if load.requests < load.concurrency:
        raise UserError(
            f"num_requests: {load.requests} cannot keep {load.concurrency} in flight; "
            f"give at least {load.concurrency}"
        )
    if load.input_tokens > limits.max_input_len:
        raise UserError(
            f"input_tokens: {load.input_tokens} is above max_input_len {limits.max_input_len} of {directory}"
        )
    total = load.input_tokens + load.output_tokens
    if total > limits.max_seq_len:
        raise UserError(
            f"input_tokens: {load.input_tokens} and max_tokens {load.output_tokens} are {total}, above "
            f"max_seq_len {limits.max_seq_len} of {directory}; lower one"
        )
    visible = len(hardware.gpus())
    if visible < limits.world_size:
        raise UserError(f"gpu: {limits.world_size} ranks of {directory} need as many, {visible} visible")
    untold = not measured.is_engine and not takes_yaml(version, load.mode)
    if untold and llm_arguments(measured)["cuda_graph_config"] is None:
        raise UserError(
            f"{directory}: is without CUDA graphs, which {COMMAND} {load.mode} of {version} cannot be told; "
            "use 1.1 or later, or leave concurrency 1 out"
        )


def write_dataset(file: Path, *, vocab_size: int, load: Load, seed: int) -> None:
    """Requests of random token ids, one JSON object a line (tensorrt_llm/bench/utils/data.py)."""
    generator = random.Random(seed)
    with file.open("w", encoding="utf-8") as stream:
        for number in range(load.requests):
            ids = [generator.randrange(vocab_size) for _ in range(load.input_tokens)]
            line = {"task_id": number, "input_ids": ids, "output_tokens": load.output_tokens}
            stream.write(json.dumps(line) + "\n")


def run(measured: Subject, load: Load, *, version: str, dataset: Path, name: str) -> Result:
    """One run beside the dataset: `name`.json, `name`.log and, for the PyTorch backend, `name`.yaml.

    Raises UserError with trtllm-bench's last words and the log.
    """
    report, log, config = (dataset.parent / f"{name}.{suffix}" for suffix in ("json", "log", "yaml"))
    if not measured.is_engine:
        config.write_text(yaml.safe_dump(llm_options(measured, load), sort_keys=False), encoding="utf-8")
    words = arguments(measured, load, version=version, dataset=dataset, report=report, config=config)
    code = logged.run([str(release.script(COMMAND)), *words], log, inner_environment())
    if code != 0 or not report.is_file():
        missing = "" if code else "wrote no report; "
        raise UserError(f"{COMMAND}: {missing}{logged.last_words(log, code)}; the log is {log}")
    result = bench_report.read(report)
    if result.backend != ("TRT" if measured.is_engine else "Pytorch"):
        raise UserError(
            f"{report}: backend {result.backend} ran, not that of {measured.directory}; see {log}"
        )
    if result.requests != load.requests:
        raise UserError(f"{report}: {result.requests} of {load.requests} requests ended; see {log}")
    return result
