"""The model repository's bytes, and the text models' functions."""

from __future__ import annotations

import json
import sys
import types
from pathlib import Path

import numpy as np
import pytest

from builder import tokenizer as tokenizers
from builder.errors import UserError
from engines.manifest import Manifest
from triton_repo import pbtxt, repository
from triton_repo.flavours import embedded, text

GOLDEN_POSTPROCESSING = """\
name: "postprocessing"
max_batch_size: 1
input {
  name: "TOKENS_BATCH"
  data_type: TYPE_INT32
  dims: -1
  dims: -1
}
input {
  name: "SEQUENCE_LENGTH"
  data_type: TYPE_INT32
  dims: -1
}
input {
  name: "PREFIX_IDS"
  data_type: TYPE_INT32
  dims: -1
  optional: true
}
input {
  name: "FINAL"
  data_type: TYPE_BOOL
  dims: 1
  optional: true
}
input {
  name: "TICKET"
  data_type: TYPE_INT64
  dims: 1
  optional: true
}
output {
  name: "OUTPUT"
  data_type: TYPE_STRING
  dims: -1
}
instance_group {
  count: 1
  kind: KIND_CPU
}
parameters {
  key: "skip_special_tokens"
  value {
    string_value: "true"
  }
}
parameters {
  key: "tokenizer_dir"
  value {
    string_value: "/models/parent"
  }
}
backend: "python"
model_transaction_policy {
}
"""


def parse(text: str):
    from google.protobuf import text_format
    from tritonclient.grpc import model_config_pb2

    return text_format.Parse(text, model_config_pb2.ModelConfig())


@pytest.fixture
def engine(tmp_path: Path) -> Path:
    """A manifest is all that the repository reads of an engine."""
    from builder.architecture import FFN, Architecture, Attention, Layer
    from builder.rope import Rope

    layer = Layer(attention=Attention(num_key_value_heads=1), ffn=FFN(intermediate_size=8), members=(0,))
    architecture = Architecture(
        hidden_size=8,
        num_attention_heads=2,
        head_dim=4,
        vocab_size=16,
        max_position_embeddings=32,
        norm_eps=1e-5,
        rope=Rope(),
        tie_word_embeddings=False,
        layers=(layer,),
    )
    directory = tmp_path / "engine"
    directory.mkdir()
    limits = {"max_batch_size": 2, "max_input_len": 8, "max_seq_len": 16}
    Manifest(
        backend="embedded",
        checkpoint_digest="0",
        architecture=architecture,
        dtype="float32",
        tp_size=1,
        pp_size=1,
        hardware={},
        compiler={},
        **limits,
    ).write(directory)
    return directory


def test_repository_layout(engine: Path, tiny_hf: Path, tmp_path: Path) -> None:
    repository.write_repository(engine, tiny_hf, tmp_path / "r")
    files = sorted(p.relative_to(tmp_path / "r").as_posix() for p in (tmp_path / "r").rglob("*"))
    assert [f for f in files if f.count("/") == 2] == [
        "postprocessing/1/cancellation.py",
        "postprocessing/1/model.py",
        "preprocessing/1/limits.py",
        "preprocessing/1/model.py",
        "tensorrt_llm/1/cancellation.py",
        "tensorrt_llm/1/model.py",
    ]
    assert "ensemble/1" in files
    for name in ("ensemble", "preprocessing", "tensorrt_llm", "postprocessing"):
        written = (tmp_path / "r" / name / "config.pbtxt").read_text()
        assert "${" not in written
        assert parse(written).name == name
    assert parse(
        (tmp_path / "r" / "tensorrt_llm" / "config.pbtxt").read_text()
    ).model_transaction_policy.decoupled


def test_postprocessing_config() -> None:
    assert parse(pbtxt.text(text.postprocessing(Path("/models/parent")))) == parse(GOLDEN_POSTPROCESSING)


def test_ensemble_wires_every_tensor() -> None:
    """Each tensor of a step exists in that model; each ensemble input goes somewhere."""
    models = {
        m.name: m
        for m in (
            text.preprocessing(Path("t")),
            embedded.tensorrt_llm(Path("e"), Path("t")),
            text.postprocessing(Path("t")),
        )
    }
    whole = text.ensemble(models["tensorrt_llm"])
    made = {t.name for t in whole.inputs}
    used = set()
    for step in whole.steps:
        model = models[step.model]
        assert {t.name for t in model.inputs} - set(step.inputs) <= {
            "stop",
            "ticket",
        }  # for other models, not clients
        assert set(step.outputs) == {t.name for t in model.outputs}
        assert set(step.inputs.values()) <= made
        used |= set(step.inputs.values())
        made |= set(step.outputs.values())
    assert {t.name for t in whole.inputs} <= used
    assert {"text_input", "max_tokens", "stream", "top_k", "top_p", "temperature", "seed"} <= used


def test_no_tokenizer(engine: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"has no tokenizer\.json"):
        repository.write_repository(engine, tmp_path, tmp_path / "r")
    assert not (tmp_path / "r").exists()


def test_other_backends_are_refused(engine: Path, tiny_hf: Path, tmp_path: Path) -> None:
    config = json.loads((engine / "config.json").read_text())
    (engine / "config.json").write_text(json.dumps({**config, "backend": "tensorrt-lm"}))
    with pytest.raises(UserError, match="backend 'tensorrt-lm' is not served"):
        repository.write_repository(engine, tiny_hf, tmp_path / "r")


@pytest.fixture
def text_models(monkeypatch: pytest.MonkeyPatch):
    """The model files import a module that only Triton's stub has; their pure functions do without."""
    monkeypatch.setitem(
        sys.modules, "triton_python_backend_utils", types.ModuleType("triton_python_backend_utils")
    )
    import triton_repo.models

    monkeypatch.syspath_prepend(triton_repo.models.__path__[0])  # they lie beside each other in a repository
    from triton_repo.models import postprocessing, preprocessing

    return preprocessing, postprocessing


@pytest.mark.parametrize("step", [1, 2, 3])
@pytest.mark.parametrize("broken", ["", "ÿâ", "ðâÿ"])
def test_pieces_join_to_the_whole_text(text_models, tiny_hf: Path, step: int, broken: str) -> None:
    """`broken` are tokens of single bytes that never become a character."""
    _, post = text_models
    tokenizer = tokenizers.load(tiny_hf)
    ids = tokenizer.encode("naïve café 日本語 🙂 fox  jumps\n").ids
    ids[7:7] = [tokenizer.token_to_id(byte) for byte in broken]
    whole = tokenizer.decode(ids)
    pieces = []
    for start in range(0, len(ids), step):
        final = start + step >= len(ids)
        pieces.append(
            post.new_text(tokenizer.decode, ids[max(0, start - 16) : start], ids[start : start + step], final)
        )
    assert "".join(pieces) == whole
    stream = tokenizers.TextStream(tokenizer=tokenizer)
    again = [stream.push(ids[i : i + step], i + step >= len(ids)) for i in range(0, len(ids), step)]
    assert "".join(again) == whole


def test_stop_words_have_tensorrt_llms_layout(text_models) -> None:
    pre, _ = text_models
    expected = np.array([[[5, 6, 7, 9], [3, 4, -1, -1]]], np.int32)
    assert np.array_equal(pre.word_list([[5, 6, 7], [9]]), expected)
    assert np.array_equal(pre.word_list([]), np.array([[[0], [-1]]], np.int32))


def test_end_ids(text_models, tmp_path: Path) -> None:
    pre, _ = text_models
    assert pre.end_ids(tmp_path) == []
    (tmp_path / "config.json").write_text('{"eos_token_id": 7}')
    assert pre.end_ids(tmp_path) == tokenizers.end_ids(tmp_path) == [7]
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": [3, 4]}')
    assert pre.end_ids(tmp_path) == tokenizers.end_ids(tmp_path) == [3, 4]


def test_memory_of_streams(text_models, tiny_hf: Path) -> None:
    """Pieces of interleaved streams join to their texts; what has ended leaves nothing to the next one."""
    _, post = text_models
    tokenizer = tokenizers.load(tiny_hf)
    memory = post.Memory(tokenizer.decode)
    texts = {"stream-a": "naïve café 日本語 🙂 fox", "stream-b": "🙂🙂 def main(argv)"}
    ids = {name: tokenizer.encode(text).ids for name, text in texts.items()}
    joined = dict.fromkeys(texts, "")
    for step in range(max(map(len, ids.values()))):
        for name in texts:
            if step < len(ids[name]):
                joined[name] += memory.piece(name, ids[name][step : step + 1])
    assert joined == texts
    assert memory.piece("stream-a", []) == ""  # the end, without a token
    assert set(memory.streams) == {"stream-b"}
    broken = [tokenizer.token_to_id("ð")]  # the first byte of a character
    assert memory.piece("stream-c", broken) == ""
    assert memory.piece("stream-c", []) == tokenizer.decode(broken)
    memory.STREAMS = 3
    for number in range(5):
        memory.piece(f"stream-{number}", ids["stream-a"][:1])
    assert len(memory.streams) == 3


def test_files_that_are_links_are_mounted_too(engine: Path, tiny_hf: Path, tmp_path: Path) -> None:
    """A Hugging Face cache: a snapshot's files are links to blobs beside it."""
    blobs, snapshot = tmp_path / "cache" / "blobs", tmp_path / "cache" / "snapshots" / "1"
    blobs.mkdir(parents=True)
    snapshot.mkdir(parents=True)
    (blobs / "abc").write_bytes((tiny_hf / "tokenizer.json").read_bytes())
    (snapshot / "tokenizer.json").symlink_to("../../blobs/abc")
    assert repository._with_linked(engine, snapshot) == (engine, snapshot, blobs)
