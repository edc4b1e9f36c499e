"""Triton's Python backend: text to tokens."""

import json
from pathlib import Path

import numpy as np
import triton_python_backend_utils as pb_utils
from limits import PromptLimit, check_fields, check_words, known_fields, refusal
from tokenizers import Tokenizer

FIELDS = {"QUERY": "text_input", "STOP_WORDS_DICT": "stop_words", "BAD_WORDS_DICT": "bad_words"}


def end_ids(directory: Path) -> list[int]:
    """The end-of-text tokens of a model directory, the most specific file first."""
    for name in ("generation_config.json", "config.json"):
        file = directory / name
        value = json.loads(file.read_text())["eos_token_id"] if _has_end(file) else None
        if value is not None:
            return list(value) if isinstance(value, list) else [value]
    return []


def _has_end(file: Path) -> bool:
    return file.is_file() and "eos_token_id" in json.loads(file.read_text())


def word_list(words: list[list[int]]) -> np.ndarray:
    """TensorRT-LLM's [1, 2, N], N > 0: tokens one after another, then 0; where each word ends, then -1."""
    tokens = [token for word in words for token in word]
    out = np.zeros((1, 2, max(1, len(tokens))), np.int32)
    out[0, 0, : len(tokens)] = tokens
    out[0, 1] = -1
    out[0, 1, : len(words)] = np.cumsum([len(word) for word in words])
    return out


def number(request, name: str, default: int) -> np.ndarray:
    """An optional input's one number as [1, 1]."""
    tensor = pb_utils.get_input_tensor_by_name(request, name)
    return np.array([[default if tensor is None else tensor.as_numpy().flat[0]]], np.int32)


class TritonPythonModel:
    def initialize(self, args: dict) -> None:
        config = json.loads(args["model_config"])
        parameters = config["parameters"]
        directory = Path(parameters["tokenizer_dir"]["string_value"])
        self.special = parameters["add_special_tokens"]["string_value"] == "true"
        self.tokenizer = Tokenizer.from_file(str(directory / "tokenizer.json"))
        self.end_ids = end_ids(directory)
        self.limit = PromptLimit(self.tokenizer, int(parameters["max_input_len"]["string_value"]))
        self.fields = known_fields(config)

    def execute(self, requests: list) -> list:
        return [self.respond(request) for request in requests]

    def respond(self, request):
        try:
            return pb_utils.InferenceResponse(output_tensors=self.encode(request))
        except ValueError as error:
            return refusal(str(error))

    def encode(self, request) -> list:
        check_fields(request, self.fields)
        prompts = self.texts(request, "QUERY")
        if len(prompts) != 1:
            raise ValueError(f"text_input: {len(prompts)} prompts in one request; send one a request")
        ids = self.tokenizer.encode(prompts[0], add_special_tokens=self.special).ids
        if not ids:
            raise ValueError("text_input: empty; give a prompt")
        given = pb_utils.get_input_tensor_by_name(request, "END_ID") is not None
        ends = [-1] if given else self.end_ids or [-1]
        end = number(request, "END_ID", ends[0])
        stops = [[token] for token in ends[1:]] + self.words(request, "STOP_WORDS_DICT")
        values = {
            "INPUT_ID": np.array([ids], np.int32),
            "REQUEST_INPUT_LEN": np.array([[len(ids)]], np.int32),
            "REQUEST_OUTPUT_LEN": number(request, "REQUEST_OUTPUT_LEN", 0),
            "BAD_WORDS_IDS": word_list(self.words(request, "BAD_WORDS_DICT")),
            "STOP_WORDS_IDS": word_list(stops),
            "OUT_END_ID": end,
            "OUT_PAD_ID": number(request, "PAD_ID", int(end[0, 0])),
        }
        return [pb_utils.Tensor(name, value) for name, value in values.items()]

    def words(self, request, name: str) -> list[list[int]]:
        """The tokens of each word that is not empty."""
        texts = [text for text in self.texts(request, name) if text]
        check_words(FIELDS[name], texts)
        return [self.tokenizer.encode(text, add_special_tokens=False).ids for text in texts]

    def texts(self, request, name: str) -> list[str]:
        tensor = pb_utils.get_input_tensor_by_name(request, name)
        values = [] if tensor is None else [bytes(value) for value in tensor.as_numpy().flat]
        for value in values:
            self.limit.check(value, FIELDS[name])
        try:
            return [value.decode("utf-8") for value in values]
        except UnicodeDecodeError:
            raise ValueError(f"{FIELDS[name]}: not valid UTF-8; encode the text as UTF-8") from None
