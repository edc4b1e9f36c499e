"""The stages of a run: which public command makes what from what."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from stages import Stage, environment

from builder import huggingface
from builder.errors import UserError
from engines.trtllm.estimate import ELEMENT_BYTES, HOST_COPIES, RUNTIME_BYTES
from engines.trtllm.options import BuildOptions
from triton_repo.cli.compare_latency import parse_concurrency

KINDS = ("baseline", "fused")
HERE = Path(__file__).parent
TEXT = HERE / "calibration.txt"
PORTS_APART = 10  # a server takes three
KV_FRACTION = 0.9  # of the GPU memory that weights leave, where a server has the GPU to itself
ROUNDS = "5"  # trtllm-bench loads the engine in each


@dataclass(frozen=True, kw_only=True)
class Choice:
    """What is measured: a model directory, or a config.json with random weights of `seed`."""

    model: Path
    seed: int | None
    drop_attention: str | None
    groups: tuple[str, ...]
    tp_size: int
    quant: str | None
    calib: tuple[Path, ...]
    max_batch_size: int
    max_seq_len: int
    workers: int | None
    concurrency: str
    http_port: int
    work: Path

    @property
    def given(self) -> tuple[str, ...]:
        """MODEL as the builder's commands take it."""
        random = () if self.seed is None else ("--random-weights", "--seed", str(self.seed))
        return (str(self.model), *random)

    def plan(self, kind: str) -> tuple[str, ...]:
        """The options that drop and fuse, none for the baseline."""
        if kind == "baseline":
            return ()
        drop = ("--drop-attention", self.drop_attention) if self.drop_attention else ()
        return (*drop, *(word for group in self.groups for word in ("--group", group)))

    @property
    def target(self) -> tuple[str, ...]:
        fp8 = ("--quant", "fp8", "--kv-cache", "fp8") if self.quant else ()
        return ("--tp", str(self.tp_size), *fp8)

    @property
    def calibration(self) -> tuple[str, ...]:
        """Samples as the built-in text has them; a text of one's own gets the command's defaults."""
        if not self.quant:
            return ()
        if self.calib:
            return tuple(word for file in self.calib for word in ("--calib", str(file)))
        return ("--calib", str(TEXT), "--calib-samples", "4", "--calib-length", "128")

    @property
    def limits(self) -> tuple[str, ...]:
        return ("--max-batch-size", str(self.max_batch_size), "--max-seq-len", str(self.max_seq_len))

    @property
    def levels(self) -> tuple[int, ...]:
        return parse_concurrency(self.concurrency)

    def port(self, kind: str) -> int:
        """HTTP of its server; gRPC and metrics have the next two."""
        return self.http_port + PORTS_APART * KINDS.index(kind)

    @property
    def prompts(self) -> Path:
        """What both servers are asked, a line a request."""
        return self.work / "prompts.txt"

    @property
    def directory(self) -> Path:
        """A Hugging Face directory with tokenizer and weights, whose parameters trtllm-bench counts."""
        return self.model if self.seed is None else self.work / "models" / "fused"


def prompts(choice: Choice) -> str:
    """Unlike prompts, two for every client: compare-latency has no more in flight than it has prompts.

    About 128 tokens each, as trtllm-bench is asked: a character is a token of the byte-level tokenizer of
    random weights, and about a quarter of one of a real one's.
    """
    words = TEXT.read_text(encoding="utf-8").split()
    length = 512 if choice.seed is None else 128
    lines = []
    for number in range(2 * max(choice.levels)):
        first = 7 * number % len(words)
        text = " ".join([f"{number}.", *words[first:], *words[:first]])
        lines.append(text[:length].rstrip() + "\n")
    return "".join(lines)


@dataclass(frozen=True, kw_only=True)
class Cost:
    """Bytes of one model at the chosen TP, as `convert --dry-run` counts them."""

    directory: int
    checkpoint: int
    rank_weights: int
    rank_kv: int
    rank_activations: int

    @property
    def fixed(self) -> int:
        """Of each GPU: all but the KV cache."""
        return self.rank_weights + self.rank_activations + RUNTIME_BYTES

    @property
    def gpu(self) -> int:
        """Of each GPU, with the KV cache at the full batch and length."""
        return self.fixed + self.rank_kv


def cost(choice: Choice, kind: str, *, engine: bool) -> Cost:
    """What a model costs. Raises UserError with convert's own words where it cannot be converted."""
    command = ["ffn-fusion", "convert", str(choice.model), *choice.plan(kind), *choice.target]
    # TensorRT's limit on a joined gate and up weight is none of the PyTorch backend's.
    command += ["--dry-run", "--json", *([] if engine else ["--no-fused-mlp"])]
    result = subprocess.run(command, capture_output=True, text=True, env=environment(), check=False)
    if result.returncode != 0:
        raise UserError(f"{kind}: {result.stderr.strip().splitlines()[-1].removeprefix('error: ')}")
    told: dict[str, Any] = json.loads(result.stdout)
    heads = [layer["num_key_value_heads"] for layer in told["layers"]]
    local = sum(max(1, n // choice.tp_size) for n in heads if n)
    per_token = told["cost"]["kv_bytes_per_token"] * local // max(1, sum(heads))
    return Cost(
        directory=told["cost"]["parameters"] * ELEMENT_BYTES[told["dtype"]],
        checkpoint=sum(told["rank_bytes"]),
        rank_weights=max(told["rank_bytes"]),
        rank_kv=per_token * choice.max_batch_size * choice.max_seq_len,
        rank_activations=_activations(choice, max(layer["width"] or 0 for layer in told["layers"])),
    )


def _activations(choice: Choice, width: int) -> int:
    """As build-engine estimates them: the widest FFN and the hidden states of a full step, float32 logits."""
    model = huggingface.read_architecture(choice.model)
    inner = 3 * model.hidden_size + 3 * width // choice.tp_size
    tokens = BuildOptions().max_num_tokens
    return 2 * tokens * inner + 4 * choice.max_batch_size * model.vocab_size


def write_stages(choice: Choice, costs: dict[str, Cost], kinds: tuple[str, ...]) -> list[Stage]:
    """Hugging Face directories."""
    return [
        Stage(
            name=f"write-{kind}",
            command=(
                *("ffn-fusion", "fuse", *choice.given, *(choice.plan(kind) or ("--no-fuse",))),
                *("-o", str(choice.work / "models" / kind)),
            ),
            inputs=(choice.model,),
            outputs=(choice.work / "models" / kind,),
            needs={"disk": costs[kind].directory},
        )
        for kind in kinds
    ]


def engine_stages(choice: Choice, costs: dict[str, Cost]) -> list[Stage]:
    """TensorRT engines: checkpoints, then trtllm-build."""
    checkpoints = {kind: choice.work / "checkpoints" / kind for kind in KINDS}
    engines = {kind: choice.work / "engines" / kind for kind in KINDS}
    convert = [
        Stage(
            name=f"convert-{kind}",
            command=(
                *("ffn-fusion", "convert", *choice.given, *choice.plan(kind), *choice.target),
                *(*choice.calibration, "-o", str(checkpoints[kind])),
            ),
            inputs=(choice.model, *(choice.calib or (TEXT,) if choice.quant else ())),
            outputs=(checkpoints[kind],),
            needs={"disk": costs[kind].checkpoint},
        )
        for kind in KINDS
    ]
    workers = choice.workers or choice.tp_size
    build = [
        Stage(
            name=f"build-{kind}",
            command=(
                *("build-engine", str(checkpoints[kind]), "--backend", "tensorrt-llm", *choice.limits),
                *(("--workers", str(choice.workers)) if choice.workers else ()),
                *("-o", str(engines[kind])),
            ),
            inputs=(checkpoints[kind],),
            outputs=(engines[kind],),
            needs={
                "disk": costs[kind].checkpoint,
                "gpu": costs[kind].gpu,
                "host": HOST_COPIES * costs[kind].rank_weights * workers,
            },
            on_gpu=True,
        )
        for kind in KINDS
    ]
    write = write_stages(choice, costs, ("fused",)) if choice.seed is not None else []
    return [*write, *convert, *build, _bench(choice, "engine", engines, costs)]


def pytorch_stages(choice: Choice, costs: dict[str, Cost]) -> list[Stage]:
    """TensorRT-LLM's PyTorch backend: Hugging Face directories, served as they are."""
    models = {kind: choice.work / "models" / kind for kind in KINDS}
    if choice.seed is None:
        models["baseline"] = choice.model
    serving = {kind: choice.work / "serving" / kind for kind in KINDS}
    check = [
        Stage(
            name=f"check-{kind}",
            command=(
                *("build-engine", str(models[kind]), "--backend", "tensorrt-llm"),
                *("--tp", str(choice.tp_size), *choice.limits, "-o", str(serving[kind])),
            ),
            inputs=(models[kind],),
            outputs=(serving[kind],),
            needs={"gpu": costs[kind].gpu},
            on_gpu=True,
        )
        for kind in KINDS
    ]
    write = write_stages(choice, costs, KINDS if choice.seed is not None else ("fused",))
    return [*write, *check, _bench(choice, "pytorch", serving, costs)]


def _bench(choice: Choice, path: str, engines: dict[str, Path], costs: dict[str, Cost]) -> Stage:
    """Both engines in trtllm-bench, without a server."""
    report = choice.work / "reports" / f"bench-{path}"
    return Stage(
        name=f"bench-{path}",
        command=(
            *("ffn-fusion", "compare-latency", *(str(engines[kind]) for kind in KINDS)),
            *("--via", "trtllm-bench", "--tokenizer", str(choice.directory)),
            *("--concurrency", choice.concurrency, "--rounds", ROUNDS, "-o", str(report)),
        ),
        inputs=tuple(engines.values()),
        outputs=(report,),
        needs={"gpu": max(costs[kind].gpu for kind in KINDS)},
        on_gpu=True,
    )


def kv_fractions(costs: dict[str, Cost], memory: int, apart: bool) -> dict[str, float]:
    """What --kv-cache-fraction says to each server.

    Servers on the same GPUs get 0.45 each of what all but the caches leaves; the second is told its share of
    what it finds.
    """
    first, second = (costs[kind].fixed for kind in KINDS)
    left = memory - first - second
    if apart or left <= 0:
        return dict.fromkeys(KINDS, KV_FRACTION)
    return {KINDS[0]: max(0.01, 0.45 * left / (memory - first)), KINDS[1]: 0.45 / 0.55}


def triton_stages(
    choice: Choice, path: str, costs: dict[str, Cost], gpus: tuple[int, ...], memory: int
) -> list[Stage]:
    """A repository for each engine, both served at once and compared.

    Where `gpus`, of `memory` bytes each, are twice TP or more each server has its own, else they share them.
    """
    apart = len(gpus) >= 2 * choice.tp_size
    fractions = kv_fractions(costs, memory, apart)
    folder = "engines" if path == "engine" else "serving"
    stages, servers = [], []
    for number, kind in enumerate(KINDS):
        engine, place = choice.work / folder / kind, choice.work / "triton" / path / kind
        port = str(choice.port(kind))
        stages.append(
            Stage(
                name=f"deploy-{path}-{kind}",
                command=(
                    *("ffn-fusion", "deploy", str(engine)),
                    *(("--tokenizer", str(choice.directory)) if path == "engine" else ()),
                    *("-o", str(place / "repository"), "--write-only"),
                    *("--manifests", str(place / "manifests"), "--http-port", port),
                    # Rounds repeat their prompts: reused KV blocks would answer for the prefill.
                    *("--no-kv-cache-reuse", "--kv-cache-fraction", f"{fractions[kind]:.2f}"),
                ),
                inputs=(engine,),
                outputs=(place / "repository", place / "manifests"),
                on_gpu=True,
            )
        )
        own = gpus[number * choice.tp_size :][: choice.tp_size] if apart else ()
        start = place / "manifests" / "start.sh"
        servers += ["--server", f"{path}-{kind}", str(start), port, ",".join(map(str, own)) or "all"]
    report = choice.work / "reports" / f"triton-{path}"
    urls = tuple(f"http://127.0.0.1:{choice.port(kind)}" for kind in KINDS)
    needed = [costs[kind].gpu for kind in KINDS]
    serve = Stage(
        name=f"serve-{path}",
        command=(
            *(sys.executable, str(HERE / "serving.py"), *servers, "--logs", str(choice.work / "logs"), "--"),
            *("ffn-fusion", "compare-latency", *urls, "--prompts", str(choice.prompts)),
            *("--concurrency", choice.concurrency, "--rounds", ROUNDS, "-o", str(report)),
        ),
        inputs=(choice.prompts, *(path for stage in stages for path in (*stage.inputs, *stage.outputs))),
        outputs=(report,),
        needs={"gpu": max(needed) if apart else sum(needed)},
        on_gpu=True,
    )
    return [*stages, serve]
