"""Repositories for GPU engines on the real tritonserver, the embedded engine in the place of the GPU's.

Everything around tensorrt_llm is what a GPU would be served with: configs, text models, ensemble, BLS,
drafts, streams and cancels. `standin_backend` takes the place of the C++ backend, and a `tensorrt_llm`
package over the embedded engine that of the LLM API.
"""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import signal
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from conftest import fused, write_llama
from standin import StandIn
from test_server import PROMPT, engine_text

from builder import export
from builder.errors import UserError
from engines import manifest as manifests
from engines.trtllm import serving
from triton_repo import container, pbtxt, ports, processes, tritonserver
from triton_repo.client import Endpoint, discover, generate, stream
from triton_repo.dialect import LLMAPI
from triton_repo.grpc_stream import GrpcStream
from triton_repo.launch import commands
from triton_repo.options import DeployOptions
from triton_repo.repository import read_deployment, write_repository
from triton_repo.server import Server

BLS = "tensorrt_llm_bls"
HERE = Path(__file__).parent
REPLACEMENT = "\N{REPLACEMENT CHARACTER}"


def fake_engine(directory: Path, like: Path, **compiler: object) -> Path:
    """An engine directory as build-engine leaves it, without an engine."""
    directory.mkdir(parents=True)
    built = manifests.read(like)
    facts = {"tensorrt_llm": "1.2.1", "paged_context_fmha": True, "max_beam_width": 1, **compiler}
    limits = {"max_input_len": built.max_seq_len - 1}  # which drafts need
    replace(built, backend="tensorrt-llm", compiler=facts, dtype="bfloat16", **limits).write(directory)
    mapping = {"world_size": built.world_size, "tp_size": built.tp_size, "pp_size": built.pp_size}
    config = {
        "version": "1.2.1",
        "pretrained_config": {"mapping": mapping},
        "build_config": {"max_batch_size": built.max_batch_size},
    }
    (directory / "config.json").write_text(json.dumps(config))
    for rank in range(built.world_size):
        (directory / f"rank{rank}.engine").write_text("no engine")
    return directory


def stand_in(repository: Path, name: str, engine: Path, **parameters: str) -> Path:
    """Put the stand-in in the place of the C++ backend; returns its log of passes."""
    file = repository / name / "config.pbtxt"
    log = repository.parent / f"{name}.log"
    config = pbtxt.read(file)
    assert config.backend == "tensorrtllm"
    config.backend = "python"
    more = {"standin_engine": str(engine), "standin_log": str(log), "standin_name": name, **parameters}
    for key, value in more.items():
        config.parameters[key].string_value = value
    file.write_text(str(config))
    shutil.copyfile(HERE / "standin_backend.py", repository / name / "1" / "model.py")
    models = Path(manifests.__file__).parent.parent / "triton_repo" / "models"
    shutil.copyfile(models / "cancellation.py", repository / name / "1" / "cancellation.py")
    return log


@pytest.fixture(scope="module")
def repository(tiny_engine: Path, tiny_hf: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An engine repository with a draft model that errs at every third token."""
    place = tmp_path_factory.mktemp("gpu")
    target = fake_engine(place / "target", tiny_engine, max_draft_len=4)
    draft = fake_engine(place / "draft", tiny_engine)
    write_repository(target, tiny_hf, place / "repository", DeployOptions(draft=draft))
    stand_in(place / "repository", "tensorrt_llm", tiny_engine)
    stand_in(place / "repository", "tensorrt_llm_draft", tiny_engine, standin_spoil="3")
    for_this_triton(place / "repository")
    return place / "repository"


@pytest.fixture(scope="module")
def server(repository: Path) -> Iterator[Server]:
    with Server(repository) as running:
        yield running


@pytest.fixture(scope="module")
def expected(tiny_engine: Path, tiny_hf: Path) -> str:
    """What the engine itself gives."""
    return engine_text(tiny_engine, tiny_hf, PROMPT, 60)


def for_this_triton(repository: Path) -> None:
    """Take out what Triton 24.10 does not know: its histogram came with 24.11."""
    for file in repository.glob("*/config.pbtxt"):
        config = pbtxt.read(file)
        config.ClearField("model_metrics")
        file.write_text(str(config))


def passes(repository: Path, model: str) -> int:
    log = repository.parent / f"{model}.log"
    return log.read_text().split().count(model) if log.is_file() else 0


def test_ensemble_gives_the_engines_text_and_exact_pieces(server: Server, expected: str) -> None:
    """Random weights make split and invalid UTF-8; the request's id tells pieces of one stream.

    That no byte will follow the last is not known there: an unfinished character at the very end is lost.
    """
    end = Endpoint(server.url)
    assert generate(end, PROMPT, max_tokens=60) == expected
    pieces = list(stream(end, PROMPT, max_tokens=60))
    assert len(pieces) > 40
    assert "".join(pieces) == expected.removesuffix(REPLACEMENT) != expected


def test_bls_without_a_draft(server: Server, expected: str) -> None:
    end = Endpoint(server.url, BLS)
    assert generate(end, PROMPT, max_tokens=60, num_draft_tokens=0) == expected
    with pytest.raises(UserError, match="stream: without a draft model only through the ensemble"):
        list(stream(end, PROMPT, max_tokens=4, num_draft_tokens=0))


@pytest.mark.parametrize("streaming", [False, True])
def test_drafts_change_no_token_and_save_passes(
    server: Server, repository: Path, expected: str, streaming: bool
) -> None:
    end = Endpoint(server.url, BLS)
    before = passes(repository, "tensorrt_llm"), passes(repository, "tensorrt_llm_draft")
    if streaming:
        pieces = list(stream(end, PROMPT, max_tokens=60))
        assert 15 < len(pieces) < 40
        text = "".join(pieces)
    else:
        text = generate(end, PROMPT, max_tokens=60)
    assert text == expected
    target = passes(repository, "tensorrt_llm") - before[0]
    draft = passes(repository, "tensorrt_llm_draft") - before[1]
    # Of four drafted tokens two are right: three tokens a pass.
    assert target == draft == 20


def test_bls_refuses_what_drafts_cannot(server: Server) -> None:
    for fields, message in (
        ({"num_draft_tokens": 9}, "num_draft_tokens: 9 is not between 0 and 4"),
        ({"return_context_logits": True}, "return_context_logits"),
        ({"beam_width": 2}, "beam_width: a draft model needs 1"),
    ):
        with pytest.raises(UserError, match=message):
            generate(Endpoint(server.url, BLS), PROMPT, max_tokens=4, **fields)
    with pytest.raises(UserError, match="text_input: empty"):
        generate(Endpoint(server.url, BLS), "", max_tokens=4)
    for drafts in ({"num_draft_tokens": 0}, {}):
        with pytest.raises(UserError, match="max_tokens: 0 is not positive"):
            generate(Endpoint(server.url, BLS), PROMPT, max_tokens=0, **drafts)
    with pytest.raises(UserError, match="num_return_sequences: a stream has one"):
        list(stream(Endpoint(server.url), PROMPT, max_tokens=4, num_return_sequences=2))


def test_bls_requests_run_together(server: Server) -> None:
    from concurrent.futures import ThreadPoolExecutor

    end = Endpoint(server.url, BLS)
    prompts = [PROMPT, "def main(", "a", "lazy dog " * 5, "café"]
    alone = [generate(end, p, max_tokens=25) for p in prompts]
    with ThreadPoolExecutor(10) as pool:
        together = list(pool.map(lambda p: "".join(stream(end, p, max_tokens=25)), prompts * 2))
    assert together == alone * 2


def stopped(log: Path) -> int:
    return log.read_text().split().count("stopped") if log.is_file() else 0


def wait_for(log: Path, count: int) -> None:
    """Until the log tells of so many requests that were stopped before their end."""
    deadline = time.monotonic() + 20
    while stopped(log) < count and time.monotonic() < deadline:
        time.sleep(0.05)
    assert stopped(log) == count


def test_cancel_over_grpc_stops_the_engine(server: Server, repository: Path) -> None:
    """The seed slows 150 tokens to 3 s; none of four gets there."""
    log = repository.parent / "tensorrt_llm.log"
    before = stopped(log)
    streams = [GrpcStream(server.grpc_address, "a", max_tokens=150, seed=99) for _ in range(4)]
    for one in streams:
        assert next(one) is not None
        one.cancel()
    wait_for(log, before + 4)
    assert generate(Endpoint(server.url), PROMPT, max_tokens=1) is not None
    for one in streams:
        assert list(one) == []


def test_a_client_that_goes_from_an_http_stream_stops_the_engine(server: Server, repository: Path) -> None:
    """By the request's id, which is all that TensorRT-LLM's backend knows of it."""
    log = repository.parent / "tensorrt_llm.log"
    before = stopped(log)
    for _ in range(4):
        one = stream(Endpoint(server.url), "a", max_tokens=150, seed=99)
        assert next(one) is not None
        one.close()
    wait_for(log, before + 4)


def test_cancel_over_grpc_ends_the_drafts(server: Server, repository: Path) -> None:
    """150 tokens would take 50 passes, 5 s."""
    before = passes(repository, "tensorrt_llm")
    one = GrpcStream(server.grpc_address, "a", max_tokens=150, model=BLS, seed=99)
    next(one)
    one.cancel()
    last = -1
    while last != passes(repository, "tensorrt_llm"):  # until nothing more is asked
        last = passes(repository, "tensorrt_llm")
        time.sleep(1)
    assert 0 < last - before < 50


@pytest.fixture(scope="module")
def llmapi(tiny_engine: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """The LLM API's repository, of a directory that build-engine checked."""
    place = tmp_path_factory.mktemp("llmapi")
    parent = write_llama(place / "parent", dtype="bfloat16")
    export.write(fused(parent), parent, place / "model")
    serving.write(serving.prepare(place / "model", serving.ServingOptions()), place / "engine")
    write_repository(place / "engine", None, place / "repository", DeployOptions(kv_cache_fraction=0.5))
    for_this_triton(place / "repository")
    code = place / "repository" / "tensorrt_llm" / "1"  # where the model file looks for modules first
    shutil.copytree(HERE / "standin_llm" / "tensorrt_llm", code / "tensorrt_llm")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("STANDIN_ENGINE", str(tiny_engine))
        patch.setenv("STANDIN_LOG", str(place / "llm.log"))
        with Server(place / "repository") as running:
            yield running


def test_llm_api_gives_the_engines_text(llmapi: Server, expected: str) -> None:
    """Streamed text is cumulative there; the client makes pieces of it."""
    end = discover(llmapi.url)
    assert (end.model, end.dialect) == ("tensorrt_llm", LLMAPI)
    assert generate(end, PROMPT, max_tokens=60) == expected
    pieces = list(stream(end, PROMPT, max_tokens=60))
    assert len(pieces) > 40
    assert "".join(pieces) == expected


@pytest.mark.parametrize("model", ["ensemble", BLS, LLMAPI.model])
def test_unknown_fields_are_refused(server: Server, llmapi: Server, model: str) -> None:
    known = {"sampling_param_max_tokens": 3} if model == LLMAPI.model else {"max_tokens": 3}
    body = {"text_input": PROMPT, **known, "streem": True}
    url = f"{(llmapi if model == LLMAPI.model else server).url}/v2/models/{model}/generate"
    with pytest.raises(urllib.error.HTTPError) as told:
        urllib.request.urlopen(url, json.dumps(body).encode())
    assert told.value.code == 400
    assert re.search("streem: no such field; did you mean stream(ing)?", told.value.read().decode())


def test_llm_api_samples_stops_and_refuses(llmapi: Server, tiny_engine: Path, tiny_hf: Path) -> None:
    end = discover(llmapi.url)
    sampling = {"temperature": 0.9, "top_k": 50, "top_p": 0.95, "seed": 3}
    assert generate(end, PROMPT, max_tokens=30, **sampling) == engine_text(
        tiny_engine, tiny_hf, PROMPT, 30, **sampling
    )
    whole = generate(end, PROMPT, max_tokens=60)
    stopped = generate(end, PROMPT, max_tokens=60, stop_words=["M"])
    assert whole.startswith(stopped)
    assert len(stopped) < len(whole)
    for fields, message in (
        ({"max_tokens": 0}, "max_tokens: 0 is not positive"),
        ({"max_tokens": 4, "best_of": 2}, "best_of=2"),
        ({"max_tokens": 4, "beam_width": 2}, "the llmapi flavour has no such input"),
    ):
        with pytest.raises(UserError, match=message):
            generate(end, PROMPT, **fields)
    with pytest.raises(UserError, match="text_input: 1 prompts or an empty one"):
        generate(end, "", max_tokens=4)


def test_llm_api_answers_what_is_asked_for(llmapi: Server) -> None:
    body = {"text_input": "a", "sampling_param_max_tokens": 3, "return_finish_reason": True}
    body |= {"return_cumulative_logprob": True}
    request = urllib.request.Request(
        f"{llmapi.url}/v2/models/tensorrt_llm/generate", json.dumps(body).encode()
    )
    with urllib.request.urlopen(request) as response:
        answer = json.loads(response.read())
    assert (answer["finish_reason"], answer["cumulative_logprob"]) == ("length", -1.5)
    assert "stop_reason" not in answer


def test_llm_api_cancels_over_grpc(llmapi: Server) -> None:
    log = llmapi.repository.parent / "llm.log"
    before = stopped(log)
    streams = [
        GrpcStream(llmapi.grpc_address, "a", max_tokens=150, dialect=LLMAPI, seed=99) for _ in range(4)
    ]
    for one in streams:
        assert next(one) is not None
        one.cancel()
    wait_for(log, before + 4)
    assert generate(discover(llmapi.url), PROMPT, max_tokens=1) is not None


def test_grpc_streams_join_to_the_text(server: Server, llmapi: Server, expected: str) -> None:
    for address, more in (
        (server.grpc_address, {}),
        (server.grpc_address, {"model": BLS}),
        (llmapi.grpc_address, {"dialect": LLMAPI}),
    ):
        with GrpcStream(address, PROMPT, max_tokens=60, **more) as pieces:
            text = "".join(pieces)
        assert text.removesuffix(REPLACEMENT) == expected.removesuffix(REPLACEMENT)
    with pytest.raises(UserError, match="max_seq_len is 160"):
        list(GrpcStream(server.grpc_address, PROMPT, max_tokens=10_000))
    with pytest.raises(UserError, match=r"127\.0\.0\.1:1"):
        list(GrpcStream("127.0.0.1:1", PROMPT, max_tokens=1))


def test_bls_of_a_repository_without_a_draft(
    tiny_engine: Path, tiny_hf: Path, tmp_path: Path, expected: str
) -> None:
    target = fake_engine(tmp_path / "target", tiny_engine)
    write_repository(target, tiny_hf, tmp_path / "repository", DeployOptions(bls_instances=1))
    stand_in(tmp_path / "repository", "tensorrt_llm", tiny_engine)
    for_this_triton(tmp_path / "repository")
    with Server(tmp_path / "repository") as running:
        end = Endpoint(running.url, BLS)
        assert generate(end, PROMPT, max_tokens=60) == expected
        with pytest.raises(UserError, match="this repository has no draft model"):
            generate(end, PROMPT, max_tokens=4, num_draft_tokens=2)


def test_served_from_inside_the_container(
    llmapi: Server, tiny_engine: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The start command itself, with the wheel's tritonserver behind the container's name for it."""
    machine = StandIn(tmp_path / "machine", gpus=1)
    monkeypatch.setenv("PATH", machine.environment["PATH"])
    monkeypatch.setenv("STANDIN_ENGINE", str(tiny_engine))
    monkeypatch.syspath_prepend(machine.environment["PYTHONPATH"])
    binary = tritonserver.find_tritonserver()
    environment = tritonserver.environment()
    options = [f"--backend-directory={tritonserver.backend_directory(binary, tmp_path / 'scratch')}"]
    options += [f"--{name}-address=127.0.0.1" for name in ("http", "grpc", "metrics")]
    wrapper = tmp_path / "tritonserver"
    names = [f"{name}={environment[name]}" for name in ("PATH", "LD_LIBRARY_PATH") if name in environment]
    wrapper.write_text(f'#!/bin/sh\nexec {shlex.join(["env", *names, str(binary), *options])} "$@"\n')
    wrapper.chmod(0o755)
    deployment = read_deployment(llmapi.repository)
    assert deployment is not None
    with pytest.raises(UserError, match="/opt/tritonserver/bin/tritonserver: missing; run this inside"):
        container.check(deployment, ports.choose(0, "127.0.0.1")[0])
    monkeypatch.setattr(commands, "TRITONSERVER", str(wrapper))
    port, said = ports.choose(0, "127.0.0.1")[0], []

    def end_it(line: str) -> None:
        said.append(line)
        said.append(generate(discover(f"http://127.0.0.1:{port}"), PROMPT, max_tokens=4))
        (process,) = [p for p in processes.descendants(os.getpid()) if is_server(p, port)]
        os.kill(process, signal.SIGKILL)

    with pytest.raises(UserError, match="tritonserver: ended with status -9; its output is above"):
        container.serve(deployment, port, end_it)
    assert said[0] == f"serving {llmapi.repository} on http://127.0.0.1:{port}"
    assert said[1]
    other = replace(deployment, tp_size=2)
    with pytest.raises(UserError, match="gpu: 2 needed, 1 visible"):
        container.check(other, port)
    with pytest.raises(UserError, match=f"port {llmapi.port} is taken"):
        container.check(deployment, llmapi.port)


def is_server(pid: int, port: int) -> bool:
    return f"--http-port={port}".encode() in Path(f"/proc/{pid}/cmdline").read_bytes()
