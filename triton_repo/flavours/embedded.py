"""The embedded engine in the place of TensorRT-LLM's backend: the same names and tensors."""

from __future__ import annotations

from pathlib import Path

from engines.manifest import Manifest
from triton_repo.facts import FACTS, facts_text
from triton_repo.flavours import text
from triton_repo.pbtxt import Model, Tensor
from triton_repo.tensors import PREPROCESSED, SAMPLING, answers

LOG_PROBS = ("cum_log_probs", "output_log_probs")  # of TensorRT-LLM's answers, those that this engine has


def tensorrt_llm(engine: Path, tokenizer: Path, manifest: Manifest | None = None) -> Model:
    """Tokens to tokens, one response a step when streaming."""
    return Model(
        name="tensorrt_llm",
        inputs=(
            *(
                Tensor(name=n, data_type=t, dims=d, optional=n in ("end_id", "pad_id") or d == (2, -1))
                for n, t, d in PREPROCESSED.values()
            ),
            *(Tensor(name=n, data_type=t, optional=True) for n, t in SAMPLING.values()),
            Tensor(name="stop", data_type="BOOL", optional=True),
        ),
        outputs=(
            Tensor(name="output_ids", data_type="INT32", dims=(-1, -1)),
            Tensor(name="sequence_length", data_type="INT32", dims=(-1,)),
            Tensor(name="prefix_ids", data_type="INT32", dims=(-1,)),
            Tensor(name="final", data_type="BOOL"),
            *(tensor for tensor in answers() if tensor.name in LOG_PROBS),
        ),
        decoupled=True,
        parameters={
            "gpt_model_path": str(engine),
            "tokenizer_dir": str(tokenizer),
            "exclude_input_in_output": "true",
            **({FACTS: facts_text(manifest)} if manifest else {}),
        },
        code=("embedded.py", "cancellation.py"),
    )


def models(engine: Path, tokenizer: Path, manifest: Manifest) -> tuple[Model, ...]:
    """The four models of a repository for an embedded engine."""
    tokens = tensorrt_llm(engine, tokenizer, manifest)
    return text.preprocessing(tokenizer), tokens, text.postprocessing(tokenizer), text.ensemble(tokens)
