"""A Triton model repository for an engine: TensorRT-LLM's four models, names and tensors.

ensemble: text in, text out; preprocessing: text to tokens; tensorrt_llm: tokens to tokens, as they
come; postprocessing: tokens to text. Only `tensorrt_llm` differs from the repository of a GPU engine.
"""

from __future__ import annotations

import shutil
from pathlib import Path

from builder.errors import UserError
from builder.storage import output_directory
from engines import manifest
from triton_repo import models, pbtxt
from triton_repo.pbtxt import Model, Step, Tensor
from triton_repo.tensors import SAMPLING, WORDS, client_inputs


def preprocessing(tokenizer: Path) -> Model:
    """Text to tokens."""
    return Model(
        name="preprocessing",
        inputs=(
            Tensor(name="QUERY", data_type="STRING"),
            Tensor(name="REQUEST_OUTPUT_LEN", data_type="INT32"),
            *(Tensor(name=n, data_type=t, dims=dims, optional=True) for n, t, dims in WORDS.values()),
        ),
        outputs=(
            Tensor(name="INPUT_ID", data_type="INT32", dims=(-1,)),
            Tensor(name="REQUEST_INPUT_LEN", data_type="INT32"),
            Tensor(name="REQUEST_OUTPUT_LEN", data_type="INT32"),
            Tensor(name="STOP_WORDS_IDS", data_type="INT32", dims=(2, -1)),
            Tensor(name="OUT_END_ID", data_type="INT32"),
        ),
        parameters={"tokenizer_dir": str(tokenizer), "add_special_tokens": "true"},
    )


def tensorrt_llm(engine: Path, tokenizer: Path) -> Model:
    """Tokens to tokens, one response a step when streaming."""
    return Model(
        name="tensorrt_llm",
        inputs=(
            Tensor(name="input_ids", data_type="INT32", dims=(-1,)),
            Tensor(name="input_lengths", data_type="INT32"),
            Tensor(name="request_output_len", data_type="INT32"),
            Tensor(name="end_id", data_type="INT32", optional=True),
            Tensor(name="stop_words_list", data_type="INT32", dims=(2, -1), optional=True),
            *(Tensor(name=n, data_type=t, optional=True) for n, t in SAMPLING.values()),
        ),
        outputs=(
            Tensor(name="output_ids", data_type="INT32", dims=(-1, -1)),
            Tensor(name="sequence_length", data_type="INT32", dims=(-1,)),
            Tensor(name="prefix_ids", data_type="INT32", dims=(-1,)),
            Tensor(name="final", data_type="BOOL"),
        ),
        decoupled=True,
        parameters={
            "gpt_model_path": str(engine),
            "tokenizer_dir": str(tokenizer),
            "exclude_input_in_output": "true",
        },
    )


def postprocessing(tokenizer: Path) -> Model:
    """Tokens to text."""
    return Model(
        name="postprocessing",
        inputs=(
            Tensor(name="TOKENS_BATCH", data_type="INT32", dims=(-1, -1)),
            Tensor(name="SEQUENCE_LENGTH", data_type="INT32", dims=(-1,)),
            Tensor(name="PREFIX_IDS", data_type="INT32", dims=(-1,), optional=True),
            Tensor(name="FINAL", data_type="BOOL", optional=True),
        ),
        outputs=(Tensor(name="OUTPUT", data_type="STRING", dims=(-1,)),),
        parameters={"tokenizer_dir": str(tokenizer), "skip_special_tokens": "true"},
    )


def ensemble() -> Model:
    """Text to text."""
    return Model(
        name="ensemble",
        inputs=client_inputs(),
        outputs=(Tensor(name="text_output", data_type="STRING", dims=(-1,)),),
        steps=(
            Step(
                model="preprocessing",
                inputs={
                    "QUERY": "text_input",
                    "REQUEST_OUTPUT_LEN": "max_tokens",
                    **{inner: outer for outer, (inner, _, _) in WORDS.items()},
                },
                outputs={
                    "INPUT_ID": "_INPUT_ID",
                    "REQUEST_INPUT_LEN": "_REQUEST_INPUT_LEN",
                    "REQUEST_OUTPUT_LEN": "_REQUEST_OUTPUT_LEN",
                    "STOP_WORDS_IDS": "_STOP_WORDS_IDS",
                    "OUT_END_ID": "_OUT_END_ID",
                },
            ),
            Step(
                model="tensorrt_llm",
                inputs={
                    "input_ids": "_INPUT_ID",
                    "input_lengths": "_REQUEST_INPUT_LEN",
                    "request_output_len": "_REQUEST_OUTPUT_LEN",
                    "stop_words_list": "_STOP_WORDS_IDS",
                    "end_id": "_OUT_END_ID",
                    **{inner: outer for outer, (inner, _) in SAMPLING.items()},
                },
                outputs={
                    "output_ids": "_TOKENS_BATCH",
                    "sequence_length": "_SEQUENCE_LENGTH",
                    "prefix_ids": "_PREFIX_IDS",
                    "final": "_FINAL",
                },
            ),
            Step(
                model="postprocessing",
                inputs={
                    "TOKENS_BATCH": "_TOKENS_BATCH",
                    "SEQUENCE_LENGTH": "_SEQUENCE_LENGTH",
                    "PREFIX_IDS": "_PREFIX_IDS",
                    "FINAL": "_FINAL",
                },
                outputs={"OUTPUT": "text_output"},
            ),
        ),
    )


def write_repository(engine_dir: Path, tokenizer_dir: Path, output: Path) -> None:
    """Write the model repository `output` for an engine and its tokenizer.

    Raises UserError where one of them is none, or `output` exists.
    """
    engine, tokenizer = engine_dir.resolve(), tokenizer_dir.resolve()
    if manifest.read(engine).backend != "embedded":
        raise UserError(f"{engine}: backend is not embedded; this release deploys embedded engines")
    if not (tokenizer / "tokenizer.json").is_file():
        raise UserError(f"{tokenizer}: has no tokenizer.json; give the Hugging Face directory that has it")
    parts = (preprocessing(tokenizer), tensorrt_llm(engine, tokenizer), postprocessing(tokenizer), ensemble())
    texts = {model.name: pbtxt.text(model) for model in parts}
    with output_directory(output) as directory:
        for name, config in texts.items():
            (directory / name / "1").mkdir(parents=True)
            (directory / name / "config.pbtxt").write_text(config, encoding="utf-8")
            code = Path(models.__path__[0]) / f"{name}.py"
            if code.is_file():
                shutil.copyfile(code, directory / name / "1" / "model.py")
