"""The models around tensorrt_llm: text to tokens, tokens to text, and the two that join the three."""

from __future__ import annotations

from pathlib import Path

from triton_repo.pbtxt import Batching, Model, Step, Tensor
from triton_repo.tensors import (
    ADAPTERS,
    ANSWERS,
    DRAFT,
    PREPROCESSED,
    SAMPLING,
    WORDS,
    client_inputs,
    fields,
    optional_tensors,
)


def preprocessing(
    tokenizer: Path,
    *,
    max_input_len: int = 0,
    max_batch_size: int = 1,
    instances: int = 1,
    batching: Batching | None = None,
) -> Model:
    """Text to tokens. `max_input_len` of the engine bounds the bytes that are looked at; 0 is no bound.

    Fields that are not among `fields` are refused, for Triton itself drops them; empty `fields` let any pass.
    """
    return Model(
        name="preprocessing",
        max_batch_size=max_batch_size,
        instances=instances,
        batching=batching,
        inputs=(
            Tensor(name="QUERY", data_type="STRING"),
            Tensor(name="REQUEST_OUTPUT_LEN", data_type="INT32"),
            *(Tensor(name=n, data_type=t, dims=dims, optional=True) for n, t, dims in WORDS.values()),
        ),
        outputs=tuple(Tensor(name=n, data_type=t, dims=d) for n, (_, t, d) in PREPROCESSED.items()),
        parameters={
            "tokenizer_dir": str(tokenizer),
            "add_special_tokens": "true",
            "max_input_len": str(max_input_len),
            **fields(client_inputs()),
        },
        code=("preprocessing.py", "limits.py"),
    )


def postprocessing(tokenizer: Path, *, max_batch_size: int = 1, instances: int = 1) -> Model:
    """Tokens to text. PREFIX_IDS are tokens before the new ones, FINAL says that none follow.

    By its TICKET tensorrt_llm is told to stop a request whose client has gone.
    """
    return Model(
        name="postprocessing",
        max_batch_size=max_batch_size,
        instances=instances,
        inputs=(
            Tensor(name="TOKENS_BATCH", data_type="INT32", dims=(-1, -1)),
            Tensor(name="SEQUENCE_LENGTH", data_type="INT32", dims=(-1,)),
            Tensor(name="PREFIX_IDS", data_type="INT32", dims=(-1,), optional=True),
            Tensor(name="FINAL", data_type="BOOL", optional=True),
            Tensor(name="TICKET", data_type="INT64", optional=True),
        ),
        outputs=(Tensor(name="OUTPUT", data_type="STRING", dims=(-1,)),),
        parameters={"tokenizer_dir": str(tokenizer), "skip_special_tokens": "true"},
        code=("postprocessing.py", "cancellation.py"),
    )


def _adapters(tensorrt_llm: Model) -> tuple[Tensor, ...]:
    """Those of `ADAPTERS` that the model takes."""
    taken = {tensor.name for tensor in tensorrt_llm.inputs}
    return optional_tensors({name: kind for name, kind in ADAPTERS.items() if name in taken})


def _answers(tensorrt_llm: Model) -> tuple[Tensor, ...]:
    """Those of `ANSWERS` that the model gives."""
    return tuple(tensor for tensor in tensorrt_llm.outputs if tensor.name in ANSWERS)


TEXT_OUTPUT = Tensor(name="text_output", data_type="STRING", dims=(-1,))


def ensemble(tensorrt_llm: Model) -> Model:
    """Text to text as a graph of the three models."""
    adapters, answers = _adapters(tensorrt_llm), _answers(tensorrt_llm)
    own = {"prefix_ids": "PREFIX_IDS", "final": "FINAL", "ticket": "TICKET"}  # of the embedded engine alone
    extra = {t.name: own[t.name] for t in tensorrt_llm.outputs if t.name in own}
    return Model(
        name="ensemble",
        max_batch_size=tensorrt_llm.max_batch_size,
        inputs=(*client_inputs(), *adapters),
        outputs=(TEXT_OUTPUT, *answers),
        steps=(
            Step(
                model="preprocessing",
                inputs={
                    "QUERY": "text_input",
                    "REQUEST_OUTPUT_LEN": "max_tokens",
                    **{inner: outer for outer, (inner, _, _) in WORDS.items()},
                },
                outputs={name: f"_{name}" for name in PREPROCESSED},
            ),
            Step(
                model="tensorrt_llm",
                inputs={
                    **{inner: f"_{name}" for name, (inner, _, _) in PREPROCESSED.items()},
                    **{inner: outer for outer, (inner, _) in SAMPLING.items()},
                    **{tensor.name: tensor.name for tensor in adapters},
                },
                outputs={
                    "output_ids": "_TOKENS_BATCH",
                    "sequence_length": "_SEQUENCE_LENGTH",
                    **{name: f"_{becomes}" for name, becomes in extra.items()},
                    **{tensor.name: tensor.name for tensor in answers},
                },
            ),
            Step(
                model="postprocessing",
                inputs={
                    "TOKENS_BATCH": "_TOKENS_BATCH",
                    "SEQUENCE_LENGTH": "_SEQUENCE_LENGTH",
                    **{becomes: f"_{becomes}" for becomes in extra.values()},
                },
                outputs={"OUTPUT": "text_output"},
            ),
        ),
    )


def tensorrt_llm_bls(tensorrt_llm: Model, *, instances: int, num_draft_tokens: int = 0) -> Model:
    """Text to text in a model's code; `num_draft_tokens` of tensorrt_llm_draft are tried first.

    Each of `instances` is a process and does one request at a time.
    """
    inputs = (*client_inputs(), *_adapters(tensorrt_llm), *optional_tensors(DRAFT))
    return Model(
        name="tensorrt_llm_bls",
        max_batch_size=tensorrt_llm.max_batch_size,
        decoupled=tensorrt_llm.decoupled,
        instances=instances,
        inputs=inputs,
        outputs=(TEXT_OUTPUT, *_answers(tensorrt_llm)),
        parameters={
            "tensorrt_llm_model_name": tensorrt_llm.name,
            "tensorrt_llm_draft_model_name": "tensorrt_llm_draft" if num_draft_tokens else "",
            "num_draft_tokens": str(num_draft_tokens),
            **fields(inputs),
        },
        code=("tensorrt_llm_bls.py", "limits.py"),
    )
