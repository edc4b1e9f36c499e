"""Whole blocks in parallel: decoder against transformers' layers, ranks, engine, plans and formats."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from click.testing import CliRunner, Result
from conftest import random_checkpoint, run_ranks, write_llama
from test_cuda import GPU, STEP, eager, pool, prefill
from test_decoder import tokens_and_positions
from test_engine import PROMPT, generate, greedy

from builder import decoder, huggingface, trtllm
from builder import plan as plans
from builder.architecture import FFN, Architecture, Attention, Layer, Linear
from builder.checkpoint import Checkpoint
from builder.decoder import Decoder, load
from builder.errors import UserError
from builder.plan import Plan
from builder.rope import Rope
from builder.surgery.fusion import fuse, remove_empty
from builder.surgery.parallel import parallelize
from builder.surgery.sharding import shard
from engines import manifest
from engines.embedded import program, quality
from engines.embedded.collectives import Alone
from engines.embedded.compilation import build
from engines.embedded.runtime import Runtime
from engines.embedded.session import Request, Session
from engines.embedded.weights import mapped
from engines.onnx_export import segments
from ffn_fusion import main
from triton_repo import facts

ROOT = Path(__file__).resolve().parent.parent
WINDOWS = ((1, 3), (4, 5))
# A layer of every kind but the plain one, between plain ones.
MIXED = (
    Layer(attention=Attention(num_key_value_heads=4), ffn=FFN(intermediate_size=48), members=(0,)),
    Layer(attention=Attention(num_key_value_heads=2), ffn=FFN(intermediate_size=32), members=(1,)),
    Layer(attention=Linear(), ffn=FFN(intermediate_size=16), members=(2,)),
    Layer(attention=None, ffn=FFN(intermediate_size=64), members=(3,)),
    Layer(attention=Attention(num_key_value_heads=1, bias=True), ffn=Linear(), members=(4,)),
    Layer(attention=Attention(num_key_value_heads=4), ffn=None, members=(5,)),
    Layer(attention=None, ffn=None, members=(6,)),
    Layer(attention=Attention(num_key_value_heads=2), ffn=FFN(intermediate_size=48), members=(7,)),
)

LOGITS_SCRIPT = """
import sys
from pathlib import Path
import torch
from engines.embedded.collectives import MPIRanks
from engines.embedded.runtime import Runtime
ranks = MPIRanks()
runtime = Runtime(Path(sys.argv[1]), ranks)
prompt = tuple(range(5, 75))
results = [runtime.prefill(2, (6, 7), prompt), runtime.prefill(0, (1,), prompt[:1])]
results += [runtime.decode((2,), (7,), (70,)), runtime.decode((0,), (9,), (1,))]
results += [runtime.decode((2, 0), (7, 9), (70, 1))]
if ranks.rank == 0:
    torch.save(results, sys.argv[2])
"""


def run(*arguments: object) -> Result:
    return CliRunner().invoke(main, [str(a) for a in arguments])


def mixed(layers: tuple[Layer, ...] = MIXED, **values: object) -> Architecture:
    return Architecture(
        hidden_size=64,
        num_attention_heads=4,
        head_dim=16,
        vocab_size=320,
        max_position_embeddings=256,
        norm_eps=1e-5,
        rope=Rope(theta=10000.0),
        tie_word_embeddings=False,
        layers=layers,
        **values,
    )


def in_parallel(checkpoint: Checkpoint, *windows: tuple[int, int]) -> Checkpoint:
    return replace(checkpoint, architecture=parallelize(checkpoint.architecture, windows))


@torch.no_grad()
def by_hand(directory: Path, windows: tuple[tuple[int, int], ...], tokens: torch.Tensor) -> torch.Tensor:
    """Logits from transformers' layers, called one by one: those of a window with one input."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(directory)
    layers, x = model.model.layers, model.model.embed_tokens(tokens)
    angles = model.model.rotary_emb(x, torch.arange(tokens.shape[1])[None])
    start_of = {i: first for first, last in windows for i in range(first, last + 1)}
    inputs: dict[int, torch.Tensor] = {}
    for index, layer in enumerate(layers):
        read = inputs.setdefault(start_of.get(index, index), x)
        attended, _ = layer.self_attn(
            hidden_states=layer.input_layernorm(read), position_embeddings=angles, attention_mask=None
        )
        x = x + attended + layer.mlp(layer.post_attention_layernorm(read + attended))
    return model.lm_head(model.model.norm(x))


@pytest.mark.parametrize("windows", [WINDOWS, ((0, 5),), ((0, 1),)], ids=str)
def test_logits_are_those_of_transformers_layers(tiny_hf: Path, windows: tuple) -> None:
    tokens, positions = tokens_and_positions()
    sequential = load(huggingface.read(tiny_hf))(tokens, positions)
    torch.testing.assert_close(by_hand(tiny_hf, (), tokens), sequential, rtol=1e-5, atol=1e-5)
    expected = by_hand(tiny_hf, windows, tokens)
    actual = load(in_parallel(huggingface.read(tiny_hf), *windows))(tokens, positions)
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)
    assert not torch.allclose(actual, sequential, rtol=1e-2, atol=1e-2)


def test_a_window_adds_what_its_blocks_add(tiny_hf: Path) -> None:
    """Of every kind: y = x + sum (f_i(x) - x), f_i a block run alone."""
    model = load(in_parallel(random_checkpoint(mixed()), (1, 6)))
    x = torch.randn(2, 9, 64, generator=torch.Generator().manual_seed(3))
    positions = torch.arange(9).expand(2, 9)
    context = decoder.Context(positions, model.rope_frequencies, x.dtype)
    blocks = list(model.layers[1:7])
    expected = x + sum(block(x, context) - x for block in blocks)
    actual = decoder.in_parallel(blocks, x, context, decoder.alone)
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("tp_size", [2, 4])
@pytest.mark.parametrize("windows", [((1, 6),), ((0, 2), (3, 7)), ((2, 3), (5, 6))], ids=str)
def test_ranks_give_the_logits_of_one(tp_size: int, windows: tuple) -> None:
    whole = in_parallel(random_checkpoint(mixed()), *windows)
    tokens, positions = tokens_and_positions()
    expected = load(whole)(tokens, positions)
    ranks = run_ranks([shard(whole, tp_size, r) for r in range(tp_size)], tokens, positions)
    torch.testing.assert_close(torch.cat(ranks, -1), expected, rtol=1e-5, atol=2e-5)


def counted(architecture: Architecture) -> list[tuple[int, ...]]:
    """Shapes of all that a rank of two says to the other in one pass."""
    said: list[tuple[int, ...]] = []

    def speak(x: torch.Tensor) -> torch.Tensor:
        said.append(tuple(x.shape))
        return x

    def widen(x: torch.Tensor) -> torch.Tensor:
        return torch.cat((speak(x), x), -1)

    model = Decoder(architecture.shard(2), all_reduce=speak, all_gather=widen).eval()
    tokens, positions = tokens_and_positions(2, 5)
    with torch.no_grad():
        model(tokens, positions)
    return said


@pytest.mark.parametrize("windows", [(), ((1, 6),), ((0, 2), (3, 7)), ((2, 3), (5, 6))], ids=str)
def test_collectives_are_counted(windows: tuple) -> None:
    architecture = mixed(parallel=windows)
    assert len(counted(architecture)) == architecture.all_reduces_per_token(2)
    assert architecture.all_reduces_per_token(1) == 0


def test_a_window_of_whole_blocks_has_two_all_reduces() -> None:
    architecture = mixed(tuple(replace(MIXED[0], members=(i,)) for i in range(6)), parallel=((1, 4),))
    assert counted(architecture) == [(2, 5, 64)] * 2 + [(4, 2, 5, 64), (2, 5, 64)] + [(2, 5, 64)] * 2
    assert architecture.all_reduces_per_token(8) == 2 * 6 - 2 * 3
    assert replace(architecture, parallel=()).all_reduces_per_token(8) == 12


def test_wrong_windows_are_refused() -> None:
    for windows, words in (
        (((6, 8),), "6-8 is no window of two or more of the layers 0-7"),
        (((2, 2),), "2-2 is no window"),
        (((4, 3),), "4-3 is no window"),
        (((1, 4), (4, 6)), "window 4-6 begins in or before another"),
    ):
        with pytest.raises(UserError, match=f"parallel: .*{words}"):
            mixed(parallel=windows)
    assert parallelize(mixed(), [(3, 4), (0, 2)]).parallel == ((0, 2), (3, 4))


def test_architectures_are_read_back() -> None:
    architecture = mixed(parallel=WINDOWS)
    assert Architecture.from_dict(json.loads(json.dumps(architecture.to_dict()))) == architecture
    assert architecture.shard(2).parallel == WINDOWS
    assert [list(step) for step in architecture.steps] == [[0], [1, 2, 3], [4, 5], [6], [7]]


def test_windows_are_in_no_run_to_fuse() -> None:
    lone = tuple(replace(MIXED[3], members=(i,)) for i in range(8))
    assert list(mixed(lone).attention_free_runs()) == [(0, 7)]
    assert list(mixed(lone, parallel=((2, 4),)).attention_free_runs()) == [(0, 1), (5, 7)]


# Plans


def test_a_plan_names_layers_of_the_input_model(tiny_hf: Path, tmp_path: Path) -> None:
    """Layers 0 and 1 lose their attention and are fused, layer 3 goes: 2-5 is the new 1-3."""
    checkpoint = huggingface.read(tiny_hf)
    plan = Plan(
        drop_attention=(0, 1, 3), drop_ffn=(3,), fuse=((0, 1),), parallel=((2, 5),), model=checkpoint.digest
    )
    plans.write(plan, tmp_path / "plan.yaml")
    assert plans.read(tmp_path / "plan.yaml") == plan
    child = plan.apply(checkpoint)
    assert child.architecture.parallel == ((1, 3),)
    assert [layer.members for layer in child.architecture.layers] == [(0, 1), (2,), (4,), (5,)]
    apart = replace(plan, parallel=()).apply(checkpoint)
    tokens, positions = tokens_and_positions()
    expected = load(in_parallel(apart, (1, 3)))(tokens, positions)
    assert torch.equal(load(child)(tokens, positions), expected)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("parallel: [[2, 6]]", "parallel: 2-6 is no window of two or more of the layers 0-5"),
        ("parallel: [[2]]", "parallel: [2] is not [first, last]"),
        ("parallel: [[1, 3], [3, 4]]", "parallel: window 3-4 begins in or before another"),
        (
            "{drop_attention: [2, 3], fuse: [[2, 3]], parallel: [[3, 5]]}",
            "fuse: group 2-3 shares layers with the parallel window 3-5",
        ),
        (
            "{drop_attention: [2, 3], drop_ffn: [2, 3], parallel: [[2, 4]]}",
            "parallel: window 2-4 has fewer than two layers left",
        ),
    ],
)
def test_wrong_plans(tiny_hf: Path, tmp_path: Path, text: str, words: str) -> None:
    plan = tmp_path / "plan.yaml"
    plan.write_text(text)
    result = run("fuse", tiny_hf, "--plan", plan, "-o", tmp_path / "fused")
    assert result.exit_code == 1, result.output
    assert words in result.stderr
    assert len(result.stderr.splitlines()) == 1


def test_surgery_moves_windows() -> None:
    lone = tuple(replace(MIXED[3], members=(i,)) for i in range(3))
    checkpoint = in_parallel(random_checkpoint(mixed((*lone, *MIXED))), (3, 4), (8, 10))
    assert fuse(checkpoint, [(0, 2)]).architecture.parallel == ((1, 2), (6, 8))
    assert remove_empty(checkpoint).architecture.parallel == ((3, 4), (8, 9))


# The engine


BUILT = ((1, 3),)  # of four layers, which compile sooner


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_llama(tmp_path_factory.mktemp("models") / "small", num_hidden_layers=4)


@pytest.fixture(scope="module")
def checkpoint(small: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("checkpoints") / "tp1"
    trtllm.convert(huggingface.read(small), output)
    return output


@pytest.fixture(scope="module")
def engine(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built by the command."""
    output = tmp_path_factory.mktemp("engines") / "tp1"
    limits = ("--max-batch-size", 4, "--max-input-len", 96, "--max-seq-len", 160)
    result = run("build-engine", checkpoint, "--parallel-blocks", "1-3", *limits, "-o", output, "--json")
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout)["parallel_blocks"] == "1-3"
    return output


@pytest.fixture(scope="module")
def engine_tp2(small: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    source = tmp_path_factory.mktemp("checkpoints") / "tp2"
    trtllm.convert(huggingface.read(small), source, tp_size=2)
    output = tmp_path_factory.mktemp("engines") / "tp2"
    build(source, output, max_batch_size=4, max_input_len=96, max_seq_len=160, parallel=BUILT)
    return output


@pytest.fixture(scope="module", params=[1, 2], ids=["tp1", "tp2"])
def session(request: pytest.FixtureRequest) -> Iterator[Session]:
    with Session(request.getfixturevalue("engine" if request.param == 1 else "engine_tp2")) as opened:
        yield opened


@pytest.fixture(scope="module")
def reference(small: Path) -> Decoder:
    return load(in_parallel(huggingface.read(small), *BUILT))


def logits_of_one(engine: Path) -> list[torch.Tensor]:
    """What LOGITS_SCRIPT has of two ranks."""
    runtime = Runtime(engine, Alone())
    results = [runtime.prefill(2, (6, 7), PROMPT), runtime.prefill(0, (1,), PROMPT[:1])]
    results += [runtime.decode((2,), (7,), (70,)), runtime.decode((0,), (9,), (1,))]
    results += [runtime.decode((2, 0), (7, 9), (70, 1))]
    return [x for x in results if x is not None]


def logits_of_two(engine: Path, scratch: Path) -> list[torch.Tensor]:
    (scratch / "logits.py").write_text(LOGITS_SCRIPT)
    root = ["--allow-run-as-root"] if os.geteuid() == 0 else []
    mpirun = [Path(sys.executable).with_name("mpirun"), "-n", "2", "--oversubscribe", "--bind-to", "none"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    script = [sys.executable, scratch / "logits.py", engine, scratch / "logits.pt"]
    subprocess.run([*mpirun, *root, *script], check=True, timeout=120, env=environment)
    return torch.load(scratch / "logits.pt")


@pytest.mark.parametrize("tp_size", [1, 2])
def test_engine_logits_are_the_reference_decoders(
    tp_size: int, request: pytest.FixtureRequest, reference: Decoder, tmp_path: Path
) -> None:
    """A row has the same bits alone and in a batch."""
    built = request.getfixturevalue("engine" if tp_size == 1 else "engine_tp2")
    got = logits_of_one(built) if tp_size == 1 else logits_of_two(built, tmp_path)
    long, short = (
        reference(torch.tensor([ids]), torch.arange(len(ids))[None])[0]
        for ids in ((*PROMPT, 7), (PROMPT[0], 9))
    )
    expected = [long[69:70], short[:1], long[70:], short[1:], torch.stack((long[70], short[1]))]
    for actual, wanted in zip(got, expected, strict=True):
        torch.testing.assert_close(actual, wanted, rtol=1e-5, atol=2e-5)
    assert torch.equal(got[4], torch.cat(got[2:4]))


def test_greedy_tokens_are_the_reference_decoders(session: Session, reference: Decoder) -> None:
    for prompt in (PROMPT, PROMPT[10:43]):
        assert generate(session, Request(input_ids=prompt, max_tokens=24)) == greedy(reference, prompt, 24)


def test_a_crowd_gets_what_each_gets_alone(session: Session) -> None:
    requests = [
        Request(input_ids=PROMPT[: 1 + 9 * i], max_tokens=20 + i, temperature=1.0 if i % 2 else None, seed=i)
        for i in range(6)
    ]
    alone = [generate(session, r) for r in requests]
    together = [session.generate(r) for r in requests]
    assert [[t for output in g for t in output.token_ids] for g in together] == alone


@pytest.mark.parametrize("kind", ["decode", "prefill"])
def test_programs_have_the_all_reduces_that_are_counted(engine_tp2: Path, kind: str) -> None:
    made = manifest.read(engine_tp2)
    assert made.architecture.parallel == BUILT
    with torch.no_grad():
        graph = program.exported(made, kind).graph
    calls = [node for node in graph.nodes if "ffn_fusion.all_reduce" in str(node.target)]
    assert len(calls) == made.architecture.all_reduces_per_token(2) == 4
    assert [x.meta["val"].dim() for x in calls] == [2, 2, 3, 2]


def test_a_gpus_programs_give_the_reference_decoders_logits(engine: Path, reference: Decoder) -> None:
    """Their operators, not compiled, on the CPU."""
    made = manifest.read(engine)
    on_cuda = replace(made, device="cuda", hardware={**made.hardware, **GPU})
    weights, cache = mapped(engine / "rank0.safetensors", made), pool(on_cuda)
    first = prefill(eager(on_cuda, "prefill", weights), cache, (6, 7), PROMPT)
    prefill(eager(on_cuda, "prefill", weights), cache, (1,), PROMPT[:1])
    second = eager(on_cuda, "decode", weights)(*STEP, cache)
    long, short = (
        reference(torch.tensor([ids]), torch.arange(len(ids))[None])[0]
        for ids in ((*PROMPT, 7), (PROMPT[0], 9))
    )
    torch.testing.assert_close(first, long[69:70], rtol=1e-5, atol=2e-5)
    torch.testing.assert_close(second, torch.stack((long[70], short[1])), rtol=1e-5, atol=2e-5)


def test_reports_tell_what_runs_in_parallel(engine: Path, engine_tp2: Path) -> None:
    told = facts.of_engine(engine_tp2)
    names = ("layers", "attention_layers", "all_reduces_per_token", "parallel_blocks")
    assert [told[name] for name in names] == [4, 4, 4, "1-3"]
    assert facts.of_engine(engine)["all_reduces_per_token"] == 0
    made = manifest.read(engine_tp2)
    told = facts.facts(replace(made, architecture=replace(made.architecture, parallel=())))
    assert (told["all_reduces_per_token"], "parallel_blocks" in told) == (8, False)


def test_an_engine_of_before_is_refused(engine: Path, tmp_path: Path) -> None:
    values = json.loads((engine / "config.json").read_text())
    del values["architecture"]["parallel"]
    (tmp_path / "config.json").write_text(json.dumps({**values, "version": 2}))
    with pytest.raises(UserError, match="version 2 is not 3; build the engine again"):
        manifest.read(tmp_path)


def test_the_cost_of_quantising_is_that_of_the_engines_order(tiny_hf: Path) -> None:
    """quality.compare runs windows as the engine does."""
    whole = in_parallel(huggingface.read(tiny_hf), *WINDOWS)
    ranks = [shard(whole, 2, r) for r in range(2)]
    tokens, positions = tokens_and_positions()
    layered = quality._Layered(ranks[0].architecture, [r.decoder_tensors() for r in ranks], tokens)
    for index in range(6):
        layered.advance(index)
    expected = F.log_softmax(load(whole)(tokens, positions), -1)
    torch.testing.assert_close(layered.log_probs(320), expected, rtol=1e-5, atol=1e-5)


# Formats that cannot say it


@pytest.mark.parametrize(
    ("command", "form"),
    [
        (("fuse", "-o", "OUT"), "a Hugging Face directory (nemotron-nas)"),
        (("convert", "--tp", 2, "-o", "OUT"), "a TensorRT-LLM checkpoint"),
        (("convert", "--tp", 2, "--dry-run"), "a TensorRT-LLM checkpoint"),
    ],
    ids=str,
)
def test_written_formats_refuse_it(tiny_hf: Path, tmp_path: Path, command: tuple, form: str) -> None:
    plan = tmp_path / "plan.yaml"
    plan.write_text("drop_attention: [0, 1]\nfuse: [[0, 1]]\nparallel: [[3, 5]]\n")
    name, *options = (tmp_path / "out" if x == "OUT" else x for x in command)
    result = run(name, tiny_hf, "--plan", plan, *options)
    assert result.exit_code == 1, result.output
    assert f"{form} cannot say that the blocks 2-4 run in parallel" in result.stderr
    assert "build-engine --backend embedded --parallel-blocks 2-4" in result.stderr
    assert not (tmp_path / "out").exists()


def test_alike_layers_are_refused_as_well(tiny_hf: Path, tmp_path: Path) -> None:
    plan = tmp_path / "plan.yaml"
    plan.write_text("fuse: []\nparallel: [[3, 5]]\n")
    result = run("fuse", tiny_hf, "--plan", plan, "-o", tmp_path / "out")
    assert (result.exit_code, "(llama) cannot say" in result.stderr) == (1, True), result.output


@pytest.mark.parametrize(
    ("options", "code", "words"),
    [
        (("--backend", "onnx", "--parallel-blocks", "1-3"), 2, "onnx runs blocks one after the other"),
        (
            ("--backend", "tensorrt-llm", "--parallel-blocks", "1-3"),
            2,
            "tensorrt-llm runs blocks one after the other; leave it out, or give --backend embedded",
        ),
        (("--parallel-blocks", "2-4"), 1, "parallel: 2-4 is no window of two or more of the layers 0-3"),
        (("--parallel-blocks", "4"), 1, "parallel: '4' is not FIRST-LAST; write e.g. 38-41,71-74"),
        (("--parallel-blocks", ""), 1, "parallel: '' is not FIRST-LAST"),
        (("--parallel-blocks", "0-2,2-3"), 1, "parallel: window 2-3 begins in or before another"),
    ],
)
def test_wrong_use_of_build_engine(
    checkpoint: Path, tmp_path: Path, options: tuple, code: int, words: str
) -> None:
    result = run("build-engine", checkpoint, *options, "-o", tmp_path / "engine")
    assert result.exit_code == code, result.output
    assert words in result.stderr
    assert list(tmp_path.iterdir()) == []


def test_onnx_graphs_refuse_it(tiny_hf: Path) -> None:
    whole = in_parallel(huggingface.read(tiny_hf), (1, 2))
    with pytest.raises(UserError, match="ONNX cannot say that the blocks 1-2 run in parallel"):
        segments.cut(whole.architecture, whole.decoder_tensors(), "float32", 1)


def test_qwen_is_refused_by_its_name(tmp_path: Path) -> None:
    from builder import export

    whole = random_checkpoint(
        mixed(tuple(replace(MIXED[0], attention=Attention(num_key_value_heads=4, bias=True)) for _ in "ab"))
    )
    with pytest.raises(UserError, match=r"\(qwen2\) cannot say that the blocks 0-1"):
        export.write(in_parallel(whole, (0, 1)), write_llama(tmp_path / "m"), tmp_path / "out")
