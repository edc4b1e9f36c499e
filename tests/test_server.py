"""The real tritonserver with the embedded engine behind it."""

from __future__ import annotations

import http.client
import json
import os
import shlex
import signal
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest
from click.testing import CliRunner

from builder import tokenizer as tokenizers
from builder.errors import UserError
from engines.embedded.session import Request, Session
from ffn_fusion import main
from triton_repo.client import Endpoint, generate, stream
from triton_repo.compare import compare
from triton_repo.report import write_report
from triton_repo.repository import write_repository
from triton_repo.server import Server

PROMPT = "The quick brown 日本語 fox 🙂"


@pytest.fixture(scope="module")
def repository(tiny_engine: Path, tiny_hf: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("repositories") / "tp1"
    write_repository(tiny_engine, tiny_hf, output)
    return output


@pytest.fixture(scope="module")
def server(repository: Path) -> Iterator[Server]:
    with Server(repository) as running:
        yield running


def engine_text(engine: Path, tokenizer_dir: Path, prompt: str, max_tokens: int, **sampling: object) -> str:
    """What the engine gives without Triton."""
    tokenizer = tokenizers.load(tokenizer_dir)
    ids = tuple(tokenizer.encode(prompt).ids)
    request = Request(
        input_ids=ids, max_tokens=max_tokens, end_id=tokenizers.end_ids(tokenizer_dir)[0], **sampling
    )
    with Session(engine) as session:
        return tokenizer.decode([t for output in session.generate(request) for t in output.token_ids])


def test_text_is_the_engines_byte_for_byte(server: Server, tiny_engine: Path, tiny_hf: Path) -> None:
    """Random weights make invalid and split UTF-8; the pieces of a stream join to the whole all the same."""
    expected = engine_text(tiny_engine, tiny_hf, PROMPT, 60)
    assert len(expected) > 20
    end = Endpoint(server.url)
    assert generate(end, PROMPT, max_tokens=60) == expected
    pieces = list(stream(end, PROMPT, max_tokens=60))
    assert len(pieces) > 40
    assert "".join(pieces) == expected


def test_sampling_is_repeatable_and_seeded(server: Server, tiny_engine: Path, tiny_hf: Path) -> None:
    end = Endpoint(server.url)
    sampling = {"temperature": 0.9, "top_k": 50, "top_p": 0.95}
    texts = [generate(end, PROMPT, max_tokens=30, seed=seed, **sampling) for seed in (1, 1, 2)]
    assert texts[0] == texts[1] != texts[2]
    assert texts[0] == engine_text(tiny_engine, tiny_hf, PROMPT, 30, seed=1, **sampling)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"max_tokens": 0}, "max_tokens: 0 is not positive"),
        ({"max_tokens": 2**31 - 1}, "max_seq_len is 160; ask for at most"),
        ({"text_input": ""}, "text_input: empty"),
        ({"text_input": "x" * 500}, "max_input_len is 96"),
        ({"beam_width": 2}, "beam_width: 2 is not supported"),
        ({"temperature": -1.0}, "temperature: -1.0"),
    ],
)
def test_requests_the_engine_cannot_do_are_refused(server: Server, fields: dict, message: str) -> None:
    request = {"text_input": PROMPT, "max_tokens": 4, **fields}
    with pytest.raises(UserError, match=message):
        generate(Endpoint(server.url), request.pop("text_input"), **request)
    assert (
        generate(Endpoint(server.url), "a", max_tokens=1, bad_words="", stop_words="", beam_width=1)
        is not None
    )


def test_concurrent_streams_do_not_mix(server: Server) -> None:
    from concurrent.futures import ThreadPoolExecutor

    end = Endpoint(server.url)
    prompts = [PROMPT, "def main(", "a", "lazy dog " * 5, "café"]
    alone = [generate(end, p, max_tokens=25) for p in prompts]
    with ThreadPoolExecutor(10) as pool:
        together = list(pool.map(lambda p: "".join(stream(end, p, max_tokens=25)), prompts * 2))
    assert together == alone * 2


def test_comparison_of_an_engine_with_itself(server: Server, tmp_path: Path) -> None:
    end = Endpoint(server.url)
    comparison = compare(end, end, prompts=[PROMPT, "a"], max_tokens=8, concurrency=(1, 2), rounds=4)
    row = comparison.row("inter_token_ms", 1)
    assert row.baseline.count == row.candidate.count > 0
    assert row.ratio.low <= row.ratio.value <= row.ratio.high
    write_report(comparison, tmp_path / "report")
    assert json.loads((tmp_path / "report" / "report.json").read_text())["version"] == 2


def processes_using(engine: Path) -> list[str]:
    """Command lines of processes that name the engine."""
    found = []
    for entry in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            line = entry.read_bytes().replace(b"\0", b" ").decode(errors="replace")
        except OSError:
            continue
        if str(engine) in line and entry.parent.name != str(os.getpid()):
            found.append(line)
    return found


def test_two_ranks_serve_and_leave_nothing(
    tiny_engine_tp2: Path, tiny_hf: Path, tmp_path: Path, server: Server
) -> None:
    before = {p.name for p in Path("/dev/shm").iterdir()}
    write_repository(tiny_engine_tp2, tiny_hf, tmp_path / "repository")
    with Server(tmp_path / "repository") as two:
        assert len(processes_using(tiny_engine_tp2)) >= 2
        texts = [generate(Endpoint(s.url), PROMPT, max_tokens=40) for s in (server, two)]
        assert texts[0] == texts[1]
        # a connection kept open must not keep the server from ending
        held = http.client.HTTPConnection("127.0.0.1", two.port)
        held.request("GET", "/v2/health/live")
        held.getresponse().read()
    held.close()
    assert processes_using(tiny_engine_tp2) == []
    assert {p.name for p in Path("/dev/shm").iterdir()} - before == set()
    with pytest.raises(UserError, match="connection refused"):
        generate(Endpoint(two.url), "a", max_tokens=1)


def test_killed_server_is_noticed_and_cleaned_up(repository: Path, tiny_engine: Path) -> None:
    others = len(processes_using(tiny_engine))
    with pytest.raises(UserError, match="tritonserver died"), Server(repository) as killed:  # noqa: PT012
        assert killed._process is not None
        os.kill(killed._process.pid, signal.SIGKILL)
        killed.wait()
    assert not list(Path("/dev/shm").glob(f"{killed._name}*"))
    assert len(processes_using(tiny_engine)) == others


def test_taken_port(repository: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        result = CliRunner().invoke(main, ["deploy", str(repository), "--serve", "--http-port", str(port)])
    assert result.exit_code == 1
    assert f"port {port} is taken; choose another --http-port" in result.stderr


def test_broken_engine_says_why(tiny_engine: Path, tiny_hf: Path, tmp_path: Path) -> None:
    import shutil

    engine = Path(shutil.copytree(tiny_engine, tmp_path / "engine"))
    (engine / "rank0.safetensors").unlink()
    result = CliRunner().invoke(
        main, ["deploy", str(engine), "--tokenizer", str(tiny_hf), "-o", str(tmp_path / "repository")]
    )
    assert result.exit_code == 1
    assert "rank0.safetensors: missing; build the engine again" in result.stderr


def test_deploy_writes_and_tries(tiny_engine: Path, tiny_hf: Path, tmp_path: Path) -> None:
    arguments = ["deploy", str(tiny_engine), "--tokenizer", str(tiny_hf), "-o", str(tmp_path / "r"), "--json"]
    result = CliRunner().invoke(main, arguments)
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout)["tried"] is True
    again = CliRunner().invoke(main, arguments)
    assert again.exit_code == 1
    assert "exists; remove it" in again.stderr


def test_compare_latency_command(server: Server, tmp_path: Path) -> None:
    (tmp_path / "prompts.txt").write_text("The quick\ndef main\n")
    arguments = ["compare-latency", server.url, server.url, "-o", str(tmp_path / "report"), "--rounds", "2"]
    arguments += [
        "--prompts",
        str(tmp_path / "prompts.txt"),
        "--max-tokens",
        "6",
        "--concurrency",
        "1",
        "--json",
    ]
    result = CliRunner().invoke(main, arguments)
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout)["settings"]["prompts"] == 2
    assert (tmp_path / "report" / "report.html").is_file()


def test_compare_latency_with_everything(server: Server, tiny_hf: Path, tmp_path: Path) -> None:
    """Open loop, goodput, lengths, quality and history; Triton's own times are there too."""
    text = tmp_path / "text.txt"
    text.write_text("The quick brown fox jumps over the lazy dog. " * 40)
    line = ["compare-latency", server.url, server.url, "--tokenizer", str(tiny_hf), "--rounds", "3", "--json"]
    line += ["--max-tokens", "6", "--rate", "60", "--num-requests", "6", "--lengths", "12:5,40:9"]
    line += ["--slo", "ttft=5000,latency=9000"]
    line += ["--data", str(text), "--baseline-model", str(tiny_hf), "--candidate-model", str(tiny_hf)]
    line += ["--history", str(tmp_path / "kept")]
    first, second = (
        CliRunner().invoke(main, [*line, "-o", str(tmp_path / name)]) for name in ("first", "second")
    )
    assert first.exit_code == second.exit_code == 0, first.output + second.output
    told, again = json.loads(first.stdout), json.loads(second.stdout)
    rows = {row["metric"]: row for row in told["rows"]}
    assert told["settings"]["load"] == "open"
    assert rows["goodput_per_s"]["baseline"]["p50"] > 0
    assert rows["latency_ms"]["baseline_rounds"]
    assert [(x["input_tokens"], x["output_tokens"]) for x in told["by_shape"]] == [(12, 5), (40, 9)]
    assert told["quality"]["candidate"]["kl"]["value"] == pytest.approx(0, abs=1e-9)
    asked = ["ffn-fusion", *line[:3], "--output", str(tmp_path / "first"), *line[3:]]
    assert sorted(shlex.split(told["settings"]["command"])) == sorted(asked)
    sent = 3 * told["settings"]["requests"][0]
    for side in ("baseline", "candidate"):  # one server is both sides, in turns
        served = told["server_times"][side]
        calls = {"ensemble": sent, "preprocessing": sent, "tensorrt_llm": sent, "postprocessing": 6 * sent}
        assert {name: x["calls"] for name, x in served.items()} == calls
        assert 0 < served["ensemble"]["total_ms"] < rows["latency_ms"][side]["mean"]
    assert told["against"] is None
    assert again["against"]["file"] in {x.name for x in (tmp_path / "kept").iterdir()}
    page = (tmp_path / "second" / "report.html").read_text()
    assert "Triton's own times" in page
    assert "By length" in page
    assert "requests/s" in page


def test_server_tells_what_it_serves(server: Server, tiny_engine: Path) -> None:
    """By the repository, so that a report through a URL knows ranks and counts."""
    from triton_repo.client import server_facts
    from triton_repo.facts import of_engine

    told = server_facts(server.url + "/")
    assert told.pop("engine") == server.url
    known = of_engine(tiny_engine)
    assert known.pop("engine") == str(tiny_engine)
    assert told == json.loads(json.dumps(known))
    assert told["tp_size"] == 1
