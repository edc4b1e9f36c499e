"""The embedded engine in the place of TensorRT-LLM's backend: the same names and tensors."""

from __future__ import annotations

from pathlib import Path

from engines.manifest import Manifest
from triton_repo.facts import FACTS, facts_text
from triton_repo.flavours import text
from triton_repo.pbtxt import Model, Tensor
from triton_repo.tensors import PREPROCESSED, SAMPLING, answers

MAX_QUEUE_SIZE = 256  # requests, each a thread of the model
LOG_PROBS = ("cum_log_probs", "output_log_probs")  # of TensorRT-LLM's answers, those that this engine has


def tensorrt_llm(
    engine: Path,
    tokenizer: Path,
    manifest: Manifest | None = None,
    *,
    max_queue_size: int = MAX_QUEUE_SIZE,
) -> Model:
    """Tokens to tokens, one response a step when streaming.

    Beside the engine's max_batch_size requests `max_queue_size` may wait; more are refused at once.
    """
    return Model(
        name="tensorrt_llm",
        inputs=(
            *(
                Tensor(name=n, data_type=t, dims=d, optional=n in ("end_id", "pad_id") or d == (2, -1))
                for n, t, d in PREPROCESSED.values()
            ),
            *(Tensor(name=n, data_type=t, optional=True) for n, t in SAMPLING.values()),
            Tensor(name="stop", data_type="BOOL", optional=True),
            Tensor(name="ticket", data_type="INT64", optional=True),
        ),
        outputs=(
            Tensor(name="output_ids", data_type="INT32", dims=(-1, -1)),
            Tensor(name="sequence_length", data_type="INT32", dims=(-1,)),
            Tensor(name="prefix_ids", data_type="INT32", dims=(-1,)),
            Tensor(name="final", data_type="BOOL"),
            Tensor(name="ticket", data_type="INT64"),
            *(tensor for tensor in answers() if tensor.name in LOG_PROBS),
        ),
        decoupled=True,
        parameters={
            "gpt_model_path": str(engine),
            "tokenizer_dir": str(tokenizer),
            "exclude_input_in_output": "true",
            "max_queue_size": str(max_queue_size),
            **({FACTS: facts_text(manifest)} if manifest else {}),
        },
        code=("embedded.py", "cancellation.py"),
    )


def models(
    engine: Path, tokenizer: Path, manifest: Manifest, *, max_queue_size: int = MAX_QUEUE_SIZE
) -> tuple[Model, ...]:
    """The four models of a repository for an embedded engine."""
    tokens = tensorrt_llm(engine, tokenizer, manifest, max_queue_size=max_queue_size)
    before = text.preprocessing(tokenizer, max_input_len=manifest.max_input_len)
    return before, tokens, text.postprocessing(tokenizer), text.ensemble(tokens)
