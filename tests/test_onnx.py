"""ONNX graphs: equal to the reference decoder in ONNX Runtime, whole, in steps, padded and over ranks."""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from click.testing import CliRunner, Result
from conftest import random_checkpoint
from onnx.reference import ReferenceEvaluator
from safetensors.numpy import load_file

from builder import decoder, trtllm
from builder.architecture import FFN, Architecture, Attention, Layer, Linear
from builder.errors import UserError
from builder.rope import Rope
from builder.tensors import NUMPY_DTYPES
from engines import manifest
from engines.onnx_export import blocks, compilation, graph
from engines.onnx_export.compilation import build
from ffn_fusion import main

ROOT = Path(__file__).resolve().parent.parent
DOCS = ROOT / "docs" / "onnx.md"
PROMPT, STEPS = 23, 5
IDS = np.random.default_rng(3).integers(0, 320, (2, PROMPT + STEPS))
# Largest difference allowed for logits up to about 6; float32 was seen at 2e-5 and less.
CLOSE = {"rtol": 1e-5, "atol": 5e-5}

# Those used, each Y in onnx-tensorrt's docs/operators.md of 10.1 for the types it has here.
OPERATORS = {
    "Add", "And", "Cast", "Concat", "Cos", "Div", "Gather", "GatherND", "Gemm", "LessOrEqual", "MatMul",
    "Mul", "Range", "ReduceMean", "Reshape", "Shape", "Sigmoid", "Sin", "Softmax", "Split", "Sqrt", "Sub",
    "Transpose", "Unsqueeze", "Where",
}  # fmt: skip

WHOLE = Layer(attention=Attention(num_key_value_heads=2), ffn=FFN(intermediate_size=96), members=(0,))
PLAIN = Architecture(
    hidden_size=64,
    num_attention_heads=4,
    head_dim=16,
    vocab_size=320,
    max_position_embeddings=256,
    norm_eps=1e-5,
    rope=Rope(),
    tie_word_embeddings=False,
    layers=(WHOLE, WHOLE, WHOLE),
)
MIXED = replace(
    PLAIN,
    head_dim=24,
    layers=tuple(
        Layer(attention=attention, ffn=ffn, members=(index,))
        for index, (attention, ffn) in enumerate(
            [
                (Attention(num_key_value_heads=4), FFN(intermediate_size=96)),
                (None, FFN(intermediate_size=288)),
                (Linear(), FFN(intermediate_size=32)),
                (Attention(num_key_value_heads=1), Linear()),
                (None, None),
                (Attention(num_key_value_heads=2), None),
            ]
        )
    ),
)
BIASES = replace(PLAIN, layers=(replace(WHOLE, attention=Attention(num_key_value_heads=2, bias=True)),) * 3)
FFN_ONLY = replace(PLAIN, layers=(WHOLE, replace(WHOLE, attention=None)))
LLAMA3 = {
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32.0,
}
ROPES = {
    "linear": Rope(kind="linear", scaling=(("factor", 4.0),)),
    "llama3": Rope(kind="llama3", scaling=tuple(LLAMA3.items())),
    "yarn": Rope(kind="yarn", scaling=(("factor", 4.0), ("original_max_position_embeddings", 64.0))),
}
ARCHITECTURES = {
    "plain": PLAIN,
    "mixed": MIXED,
    "biases": BIASES,
    "one without attention": FFN_ONLY,
    "tied": replace(PLAIN, tie_word_embeddings=True),
    **{name: replace(PLAIN, rope=rope) for name, rope in ROPES.items()},
}


def written(architecture: Architecture, directory: Path, **options: Any) -> Path:
    """A TensorRT-LLM checkpoint of random numbers."""
    trtllm.convert(random_checkpoint(architecture), directory, **options)
    return directory


def reference(checkpoint: Path, ids: np.ndarray, dtype: str = "float32") -> np.ndarray:
    """Logits of all tokens, [B, T, vocab_size], of the torch decoder without a cache."""
    model = decoder.load(trtllm.read(checkpoint).rank(0).cast(dtype))
    positions = torch.arange(ids.shape[1]).expand(ids.shape)
    return model(torch.from_numpy(ids), positions).float().numpy()


def session(file: Path) -> Any:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    return onnxruntime.InferenceSession(str(file), options, providers=["CPUExecutionProvider"])


class Driver:
    """All ranks of a directory, one after the other, as decoder.json says; each keeps its cache."""

    def __init__(self, directory: Path, load: Any = session) -> None:
        self.contract = json.loads((directory / "decoder.json").read_text())
        self.dtype = NUMPY_DTYPES[manifest.read(directory).dtype]
        self.segments = [
            [load(directory / place / x["file"]) for x in self.contract["segments"]]
            for place in self.contract["ranks"]
        ]
        self.caches: list[dict[str, np.ndarray]] = []

    def reset(self, batch: int) -> None:
        shapes = {x["past"]: (batch, *x["shape"][1:]) for x in self.contract["cache"]}
        empty = {
            name: np.zeros([0 if d == "past" else d for d in shape], self.dtype)
            for name, shape in shapes.items()
        }
        self.caches = [dict(empty) for _ in self.segments]

    def __call__(
        self, ids: np.ndarray, positions: np.ndarray, mask: np.ndarray, index: np.ndarray
    ) -> np.ndarray:
        given = {"input_ids": ids, "position_ids": positions, "attention_mask": mask, "logits_index": index}
        tensors = [{**given, **cache} for cache in self.caches]
        for number, told in enumerate(self.contract["segments"]):
            for rank, own in enumerate(tensors):
                feeds = {name: own[name] for name in told["inputs"]}
                results = self.segments[rank][number].run(None, feeds)
                own.update(zip(told["outputs"], results, strict=True))
            if told["collective"]:
                self._combine(tensors, **told["collective"])
        self.caches = [{x["past"]: own[x["present"]] for x in self.contract["cache"]} for own in tensors]
        logits = np.concatenate([own["logits"] for own in tensors], -1)
        assert logits.dtype == np.float32
        return logits[..., : self.contract["logits"]["vocab_size"]]

    def _combine(self, tensors: list[dict[str, np.ndarray]], operation: str, partial: str, combined: str):
        parts = [own[partial] for own in tensors]
        whole = np.concatenate(parts, -1)
        if operation == "sum":
            whole = np.sum([x.astype(np.float32) for x in parts], 0).astype(self.dtype)
        for own in tensors:
            own[combined] = whole

    def feed(self, ids: np.ndarray, sizes: list[int]) -> np.ndarray:
        """Logits of all of `ids`, given in pieces of the given sizes."""
        self.reset(len(ids))
        pieces, start = [], 0
        for size in sizes:
            stop = start + size
            columns = np.arange(start, stop)[None].repeat(len(ids), 0)
            mask = np.ones((len(ids), stop), np.int64)
            pieces.append(self(ids[:, start:stop], columns, mask, columns - start))
            start = stop
        assert start == ids.shape[1]
        return np.concatenate(pieces, 1)


WAYS = {"steps": [PROMPT] + [1] * STEPS, "chunks": [9, 1, 13, 5], "at once": [PROMPT + STEPS]}


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """PLAIN as a checkpoint and as ONNX."""
    base = tmp_path_factory.mktemp("plain")
    checkpoint = written(PLAIN, base / "c")
    build(checkpoint, base / "o", max_batch_size=3, max_input_len=24, max_seq_len=40)
    return checkpoint, base / "o"


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_logits_are_the_reference_decoders(name: str, tmp_path: Path) -> None:
    checkpoint = written(ARCHITECTURES[name], tmp_path / "c")
    build(checkpoint, tmp_path / "o")
    expected = reference(checkpoint, IDS)
    assert np.abs(expected).max() > 2
    run = Driver(tmp_path / "o")
    for sizes in WAYS.values():
        np.testing.assert_allclose(run.feed(IDS, sizes), expected, **CLOSE)


def test_the_tests_ropes_are_unlike(tmp_path: Path) -> None:
    """What the test above would not see is a rope taken for another."""
    names = ["plain", *ROPES]
    logits = [reference(written(ARCHITECTURES[n], tmp_path / n), IDS) for n in names]
    for i, one in enumerate(logits):
        for other in logits[:i]:
            assert np.abs(one - other).max() > 0.1
    assert ROPES["yarn"].magnitude > 1.1


def test_the_fused_model(tiny_checkpoint: Path, tiny_checkpoint_tp2: Path, tmp_path: Path) -> None:
    expected = reference(tiny_checkpoint, IDS)
    for checkpoint in (tiny_checkpoint, tiny_checkpoint_tp2):
        output = tmp_path / checkpoint.name
        build(checkpoint, output)
        np.testing.assert_allclose(Driver(output).feed(IDS, WAYS["steps"]), expected, **CLOSE)


@pytest.mark.parametrize("name", ["plain", "mixed", "biases", "yarn"])
def test_float16(name: str, tmp_path: Path) -> None:
    """Against torch in float16: both round, at other places."""
    checkpoint = written(ARCHITECTURES[name], tmp_path / "c")
    build(checkpoint, tmp_path / "o", dtype="float16")
    expected = reference(checkpoint, IDS, "float16")
    run = Driver(tmp_path / "o")
    assert run.dtype == np.float16
    for sizes in WAYS.values():
        np.testing.assert_allclose(run.feed(IDS, sizes), expected, rtol=0, atol=0.04)


@pytest.mark.parametrize("name", ["plain", "mixed", "yarn"])
def test_bfloat16(name: str, tmp_path: Path) -> None:
    """ONNX Runtime has no bfloat16 on CPUs, so ONNX's own evaluator runs it."""
    checkpoint = written(ARCHITECTURES[name], tmp_path / "c", dtype="bfloat16")
    build(checkpoint, tmp_path / "o")
    expected = reference(checkpoint, IDS, "bfloat16")
    run = Driver(tmp_path / "o", lambda file: ReferenceEvaluator(str(file)))
    assert run.dtype == ml_dtypes.bfloat16
    np.testing.assert_allclose(run.feed(IDS, WAYS["chunks"]), expected, rtol=0, atol=0.3)


LENGTHS = (3, 11, 7)


@pytest.mark.parametrize("side", ["left", "right"])
def test_a_batch_of_unlike_lengths(side: str, plain: tuple[Path, Path]) -> None:
    """Each row gets what it gets alone, whatever stands in its padding; then all go on together."""
    checkpoint, directory = plain
    longest, more = max(LENGTHS), 4
    rows = [IDS[0, i : i + n + more] for i, n in enumerate(LENGTHS)]
    expected = [reference(checkpoint, row[None])[0] for row in rows]
    ids = np.full((3, longest), 319)
    positions, mask = np.zeros((3, longest), np.int64), np.zeros((3, longest), np.int64)
    for row, length in enumerate(LENGTHS):
        place = slice(longest - length, longest) if side == "left" else slice(0, length)
        ids[row, place], mask[row, place] = rows[row][:length], 1
        positions[row, place] = np.arange(length)
    last = np.full((3, 1), longest - 1) if side == "left" else np.array(LENGTHS)[:, None] - 1
    run = Driver(directory)
    run.reset(3)
    logits = [run(ids, positions, mask, last)]
    for step in range(more):
        mask = np.concatenate([mask, np.ones((3, 1), np.int64)], 1)
        now = np.array([[length + step] for length in LENGTHS])
        tokens = np.array([[row[length + step]] for row, length in zip(rows, LENGTHS, strict=True)])
        logits.append(run(tokens, now, mask, np.zeros((3, 1), np.int64)))
    for row, length in enumerate(LENGTHS):
        got = np.concatenate([x[row] for x in logits])
        np.testing.assert_allclose(got, expected[row][length - 1 :], **CLOSE)
    assert all(np.isfinite(x).all() for x in run.caches[0].values())


@pytest.mark.parametrize("tp_size", [2, 4])
@pytest.mark.parametrize("name", ["mixed", "biases"])
def test_ranks_give_the_logits_of_one(name: str, tp_size: int, tmp_path: Path) -> None:
    """TP 4 repeats KV heads; 321 tokens pad lm_head; Linears are put side by side."""
    architecture = replace(ARCHITECTURES[name], vocab_size=321)
    expected = reference(written(architecture, tmp_path / "one"), IDS)
    checkpoint = written(architecture, tmp_path / "c", tp_size=tp_size)
    build(checkpoint, tmp_path / "o")
    run = Driver(tmp_path / "o")
    assert len(run.segments) == tp_size
    assert len(run.segments[0]) == architecture.all_reduces_per_token(tp_size) + 1
    operations = [x["collective"]["operation"] for x in run.contract["segments"][:-1]]
    linears = sum(isinstance(p, Linear) for x in architecture.layers for p in (x.attention, x.ffn))
    assert operations.count("concatenate") == linears
    for sizes in WAYS.values():
        np.testing.assert_allclose(run.feed(IDS, sizes), expected, **CLOSE)
    for told in run.contract["segments"]:
        graphs = {(tmp_path / "o" / place / told["file"]).read_bytes() for place in run.contract["ranks"]}
        assert len(graphs) == 1


def test_what_a_directory_holds(plain: tuple[Path, Path]) -> None:
    checkpoint, directory = plain
    names = {"config.json", "decoder.json", "decoder.onnx", "trtexec.sh", "weights.safetensors"}
    assert {file.name for file in directory.iterdir()} == names
    read = manifest.read(directory)
    assert (read.backend, read.dtype, read.tp_size) == ("onnx", "float32", 1)
    assert (read.max_batch_size, read.max_input_len, read.max_seq_len) == (3, 24, 40)
    assert read.architecture == trtllm.read(checkpoint).architecture
    assert read.checkpoint_digest == trtllm.read(checkpoint).digest


def test_weights_are_the_checkpoints_and_outside_the_graph(plain: tuple[Path, Path]) -> None:
    checkpoint, directory = plain
    expected = trtllm.read(checkpoint).rank(0).decoder_tensors()
    stored = load_file(directory / "weights.safetensors")
    assert stored.keys() == expected.keys()
    assert (directory / "decoder.onnx").stat().st_size < 60_000 < stored["embedding.weight"].nbytes
    model = onnx.load(directory / "decoder.onnx", load_external_data=False)
    outside = {x.name for x in model.graph.initializer if x.data_location == onnx.TensorProto.EXTERNAL}
    assert outside == expected.keys()
    whole = onnx.load(directory / "decoder.onnx")
    for x in whole.graph.initializer:
        if x.name in expected:
            assert np.array_equal(onnx.numpy_helper.to_array(x), expected[x.name].read_all())
            assert np.array_equal(stored[x.name], expected[x.name].read_all())


def test_the_graph_is_standard_and_readable(tmp_path: Path) -> None:
    build(written(MIXED, tmp_path / "c"), tmp_path / "o", dtype="float16")
    file = tmp_path / "o" / "decoder.onnx"
    onnx.checker.check_model(str(file), full_check=True)
    model = onnx.load(file, load_external_data=False)
    assert [(x.domain, x.version) for x in model.opset_import] == [("", 18)]
    assert model.ir_version == 8
    assert {(x.domain, x.op_type) for x in model.graph.node} == {("", name) for name in OPERATORS}
    names = [x.name for x in model.graph.node]
    assert len(names) == len(set(names))
    assert {"layers.0.attention.qkv", "layers.3.ffn.linear", "layers.1.ffn.down", "lm_head"} <= set(names)
    ports = {
        x.name: [d.dim_param or d.dim_value for d in x.type.tensor_type.shape.dim]
        for x in (*model.graph.input, *model.graph.output)
    }
    assert ports["past.3.key"] == ["batch", 1, "past", 24]
    assert ports["present.5.value"] == ["batch", 2, "total", 24]
    assert ports["attention_mask"] == ["batch", "total"]
    assert ports["logits"] == ["batch", "wanted", 320]
    assert not any("past.1." in name or "past.2." in name for name in ports)
    used = {name for x in model.graph.node for name in x.input}
    given = {x.name for x in (*model.graph.input, *model.graph.initializer)}
    assert given <= used


def test_statistics_and_softmax_are_in_float32(tmp_path: Path) -> None:
    build(written(PLAIN, tmp_path / "c"), tmp_path / "o", dtype="float16")
    model = onnx.load(tmp_path / "o" / "decoder.onnx", load_external_data=False)
    inferred = onnx.shape_inference.infer_shapes(model, strict_mode=True)
    types = {x.name: x.type.tensor_type.elem_type for x in inferred.graph.value_info}
    wide = [x.output[0] for x in model.graph.node if x.op_type in ("ReduceMean", "Sqrt", "Softmax", "Cos")]
    assert len(wide) == 7 + 7 + 3 + 1
    assert {types[name] for name in wide} == {onnx.TensorProto.FLOAT}


TRTEXEC = """#!{python}
import json, sys
with open({log!r}, "a") as log:
    print(json.dumps(sys.argv[1:]), file=log)
"""


def shapes_of(argument: str) -> dict[str, list[int]]:
    """name:1x2,... as trtexec reads it."""
    pairs = (x.split(":") for x in argument.partition("=")[2].split(","))
    return {name: [int(d) for d in dims.split("x")] for name, dims in pairs}


def trtexec_calls(directory: Path, tmp_path: Path, *arguments: str) -> list[list[str]]:
    """Run trtexec.sh, from elsewhere, with a stand-in that writes down how it was called."""
    standin, log = tmp_path / "trtexec", tmp_path / "calls"
    standin.write_text(TRTEXEC.format(python=sys.executable, log=str(log)))
    standin.chmod(0o755)
    environment = {**os.environ, "TRTEXEC": str(standin)}
    subprocess.run([directory / "trtexec.sh", *arguments], check=True, cwd="/", env=environment, timeout=60)
    return [json.loads(line) for line in log.read_text().splitlines()]


def test_trtexec_gets_shapes_that_fit(plain: tuple[Path, Path], tmp_path: Path) -> None:
    """Every corner of both profiles is run, by ONNX Runtime."""
    [call] = trtexec_calls(plain[1], tmp_path, "--builderOptimizationLevel=5")
    assert call[:5] == [
        "--onnx=./decoder.onnx",
        "--saveEngine=./decoder.plan",
        "--stronglyTyped",
        "--skipInference",
        "--noTF32",
    ]
    assert call[-1] == "--builderOptimizationLevel=5"
    assert [call[5], call[9]] == ["--profile=0", "--profile=1"]
    loaded = session(plain[1] / "decoder.onnx")
    types = {"tensor(int64)": np.int64, "tensor(float)": np.float32}
    corners = []
    for argument in (*call[6:9], *call[10:13]):
        shapes = shapes_of(argument)
        assert list(shapes) == [x.name for x in loaded.get_inputs()]
        feeds = {x.name: np.zeros(shapes[x.name], types[x.type]) for x in loaded.get_inputs()}
        assert loaded.run(["logits"], feeds)[0].shape == (shapes["input_ids"][0], 1, 320)
        corners.append((argument[:5], shapes["input_ids"], shapes["past.0.key"][2]))
    assert corners == [
        ("--min", [1, 1], 1), ("--opt", [3, 1], 24), ("--max", [3, 1], 39),
        ("--min", [1, 1], 0), ("--opt", [1, 24], 0), ("--max", [3, 24], 23),
    ]  # fmt: skip


def test_trtexec_compiles_every_segment_of_every_rank(tiny_checkpoint_tp2: Path, tmp_path: Path) -> None:
    build(tiny_checkpoint_tp2, tmp_path / "o", dtype="bfloat16")
    calls = trtexec_calls(tmp_path / "o", tmp_path)
    contract = json.loads((tmp_path / "o" / "decoder.json").read_text())
    files = [f"{r}/{x['file']}" for r in contract["ranks"] for x in contract["segments"]]
    assert [c[0] for c in calls] == [f"--onnx={file}" for file in files]
    assert all((tmp_path / "o" / file).is_file() for file in files)
    for call, told in zip(calls, contract["segments"] * 2, strict=True):
        assert "--noTF32" not in call
        shapes = [shapes_of(x) for x in call if "Shapes=" in x]
        assert len(shapes) == 6
        assert all(list(x) == told["inputs"] for x in shapes)


def refused(checkpoint: Path, tmp_path: Path, words: str, **options: Any) -> None:
    before = sorted(tmp_path.iterdir())
    with pytest.raises(UserError, match=words) as caught:
        build(checkpoint, tmp_path / "o", **options)
    assert "\n" not in str(caught.value)
    assert sorted(tmp_path.iterdir()) == before


@pytest.mark.parametrize(
    ("limits", "field"),
    [
        ({"max_batch_size": 0}, "max_batch_size"),
        ({"max_input_len": 0}, "max_input_len"),
        ({"max_input_len": 256}, "max_input_len"),
        ({"max_seq_len": 257}, "max_seq_len"),
        ({"max_seq_len": 3}, "max_seq_len"),
        ({"dtype": "float64"}, "dtype"),
    ],
)
def test_limits_that_cannot_be_are_refused(
    plain: tuple[Path, Path], tmp_path: Path, limits: dict, field: str
) -> None:
    refused(plain[0], tmp_path, f"^{field}: ", **limits)


def test_checkpoints_that_are_not_for_it(plain: tuple[Path, Path], tiny_hf: Path, tmp_path: Path) -> None:
    staged = written(PLAIN, tmp_path / "pp", pp_size=2)
    refused(staged, tmp_path, r"^pp_size: 2 in .*; convert with --pp 1$")
    quantized = tmp_path / "fp8"
    quantized.mkdir()
    for file in plain[0].iterdir():
        (quantized / file.name).write_bytes(file.read_bytes())
    config = json.loads((quantized / "config.json").read_text())
    config["quantization"]["quant_algo"] = "FP8"
    (quantized / "config.json").write_text(json.dumps(config))
    refused(quantized, tmp_path, r"^quant_algo: FP8 in .*; convert without --quant")
    refused(tmp_path, tmp_path, r"config\.json: missing")
    refused(tiny_hf, tmp_path, r"architecture None is not one of .*; write it with `ffn-fusion convert`$")


def test_numbers_beyond_float16_are_refused(tmp_path: Path) -> None:
    whole = random_checkpoint(PLAIN)
    whole.tensors["layers.1.ffn.up.weight"].values[5, 7] = 1e6
    trtllm.convert(whole, tmp_path / "c")
    refused(tmp_path / "c", tmp_path, r"layers\.1\.ffn\.up\.weight.*does not fit float16", dtype="float16")


def test_truncated_weights_leave_nothing(plain: tuple[Path, Path], tmp_path: Path) -> None:
    broken = tmp_path / "c"
    broken.mkdir()
    for file in plain[0].iterdir():
        (broken / file.name).write_bytes(file.read_bytes())
    os.truncate(broken / "rank0.safetensors", 100_000)
    refused(broken, tmp_path, r"rank0\.safetensors")


def one_column_less(graph: Any, name: str, x: str, width: int) -> str:
    return graph.node(name, "Reshape", x, graph.integers(-1, width - 1))


@pytest.mark.parametrize(
    ("module", "name", "value"),
    [(graph, "IR_VERSION", 999), (graph, "OPSET", 12), (blocks, "rows", one_column_less)],
    ids=["newer than onnx", "other operators", "shapes"],
)
def test_a_graph_that_onnx_refuses(
    plain: tuple[Path, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    module: Any,
    name: str,
    value: Any,
) -> None:
    monkeypatch.setattr(module, name, value)
    refused(plain[0], tmp_path, r"^decoder\.onnx: onnx .* refuses it: .*; pip install --upgrade onnx$")


def test_onnx_is_named_where_it_is_missing(
    plain: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def missing(name: str) -> str:
        raise compilation.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(compilation.metadata, "version", missing)
    refused(plain[0], tmp_path, "^onnx: not installed; pip install onnx$")


MEMORY = """
import os, re, sys
from pathlib import Path
os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:1])  # few threads, each with its blocks
import engines.onnx_export.segments, torch
from builder import decoder
from engines.onnx_export.compilation import build
peak = lambda: int(re.search(r"VmHWM:\\s*(\\d+) kB", Path("/proc/self/status").read_text())[1]) // 1024
before = peak()
build(Path(sys.argv[1]), Path(sys.argv[2]))
print(peak() - before)
"""


def test_memory_is_bounded(tmp_path: Path) -> None:
    """370 MB of zeros, which take no disk in the checkpoint; three tensors have 120 MB each."""
    from builder.storage import write_json
    from builder.tensorfile import Layout
    from builder.tensors import Declared
    from builder.trtllm import layout

    wide = replace(WHOLE, ffn=FFN(intermediate_size=60_000))
    architecture = replace(PLAIN, hidden_size=512, num_attention_heads=8, head_dim=64, layers=(wide, WHOLE))
    checkpoint = tmp_path / "c"
    checkpoint.mkdir()
    write_json(checkpoint / "config.json", layout.config(architecture, "float32"))
    (checkpoint / "rank0.safetensors").touch()
    shapes = trtllm.read(checkpoint).stored_shapes(0)
    declared = Layout.of({name: Declared(name, shape, dtype) for name, (dtype, shape) in shapes.items()})
    (checkpoint / "rank0.safetensors").write_bytes(declared.header)
    os.truncate(checkpoint / "rank0.safetensors", declared.num_bytes)
    assert declared.num_bytes > 370e6
    command = [sys.executable, "-c", MEMORY, checkpoint, tmp_path / "o"]
    result = subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT, timeout=120)
    assert result.returncode == 0, result.stderr
    assert (tmp_path / "o" / "weights.safetensors").stat().st_size > 370e6
    assert int(result.stdout) < 100  # MiB


def command(*arguments: object) -> Result:
    return CliRunner().invoke(main, ["build-engine", *(str(a) for a in arguments), "--backend", "onnx"])


def test_the_command(plain: tuple[Path, Path], tmp_path: Path) -> None:
    limits = ("--max-batch-size", 2, "--max-input-len", 8, "--max-seq-len", 16)
    result = command(plain[0], "-o", tmp_path / "o", *limits, "--dtype", "float16", "--json")
    assert result.exit_code == 0, result.output
    told = json.loads(result.stdout)
    assert told.pop("seconds") >= 0
    assert told == {
        "engine": str(tmp_path / "o"),
        "backend": "onnx",
        "tp_size": 1,
        "max_batch_size": 2,
        "max_input_len": 8,
        "max_seq_len": 16,
        "dtype": "float16",
        "trtexec": str(tmp_path / "o" / "trtexec.sh"),
    }
    assert manifest.read(tmp_path / "o").max_seq_len == 16
    assert os.access(told["trtexec"], os.X_OK)
    result = command(plain[0], "-o", tmp_path / "a b")
    assert shlex.quote(str(tmp_path / "a b" / "trtexec.sh")) in result.stdout
    assert manifest.read(tmp_path / "a b").max_batch_size == 4


@pytest.mark.parametrize(
    ("options", "code", "words"),
    [
        (("--gemm-plugin", "auto"), 2, "--gemm-plugin is not for --backend onnx"),
        (("--dry-run",), 2, "--dry-run is not for --backend onnx"),
        (("--tp", "2"), 2, "--tp is not for --backend onnx"),
        (("--max-seq-len", "300"), 1, "max_seq_len: 300"),
    ],
)
def test_wrong_use_is_one_line(
    plain: tuple[Path, Path], tmp_path: Path, options: tuple[str, ...], code: int, words: str
) -> None:
    result = command(plain[0], "-o", tmp_path / "o", *options)
    assert result.exit_code == code, result.output
    assert words in result.stderr.strip().splitlines()[-1]
    assert list(tmp_path.iterdir()) == []


def test_an_output_that_exists_is_left_alone(plain: tuple[Path, Path]) -> None:
    before = {file: file.read_bytes() for file in plain[1].iterdir()}
    result = command(plain[0], "-o", plain[1])
    assert result.exit_code == 1
    [line] = result.stderr.strip().splitlines()
    assert line.startswith("error: ")
    assert "exists; remove it" in line
    assert {file: file.read_bytes() for file in plain[1].iterdir()} == before


def test_other_backends_refuse_the_directory(plain: tuple[Path, Path]) -> None:
    from engines.embedded.session import Session

    with pytest.raises(UserError, match="backend 'onnx', needed is 'embedded'"):
        Session(plain[1])


def test_float16_stays_out_of_the_embedded_engine(plain: tuple[Path, Path], tmp_path: Path) -> None:
    arguments = ["build-engine", str(plain[0]), "-o", str(tmp_path / "e"), "--dtype", "float16"]
    result = CliRunner().invoke(main, arguments)
    assert result.exit_code == 1
    assert "dtype: 'float16' asked for" in result.stderr
    assert list(tmp_path.iterdir()) == []


def test_the_loop_in_the_docs(plain: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """Greedy tokens of the documented code, run as it stands there."""
    [code] = [x.partition("```")[0] for x in DOCS.read_text().split("```python\n")[1:]]
    monkeypatch.chdir(plain[1].parent)
    plain[1].with_name("onnx").symlink_to(plain[1])
    names: dict[str, Any] = {"prompt": IDS[0, :9].tolist(), "steps": 6}
    exec(compile(code, str(DOCS), "exec"), names)
    ids = list(names["prompt"])
    for _ in range(6):
        ids.append(int(reference(plain[0], np.array([ids]))[0, -1].argmax()))
    assert names["tokens"] == ids[9:]
