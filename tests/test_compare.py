"""The client against a small server of controlled behaviour (the real one is in test_server), the
statistics against known answers, and the report's page."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from html.parser import HTMLParser
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console

from builder.errors import UserError
from triton_repo import compare, load, measuring, report, shapes, words
from triton_repo.client import Endpoint, RequestTiming, generate, measure, stream
from triton_repo.history import RATIO, against_last, keep, read
from triton_repo.load import Load
from triton_repo.rounds import (
    Ratio,
    RecordedRound,
    Round,
    Statistics,
    Targets,
    combined,
    ratio,
    row,
    statistics,
)
from triton_repo.work import unequal


class Handler(BaseHTTPRequestHandler):
    """Streams max_tokens pieces `gap_s` apart; prompts name what goes wrong."""

    gap_s = 0.0

    def do_POST(self) -> None:
        request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        prompt = request["text_input"]
        if prompt == "refuse":
            return self.reply(400, json.dumps({"error": "max_tokens: too many"}))
        if prompt == "error behind 200":
            return self.reply(200, 'data: {"error": "engine died"}\n\n')
        if not request.get("stream"):
            return self.reply(200, json.dumps({"text_output": "whole"}))
        self.send_response(200)
        self.end_headers()
        for i in range(request["max_tokens"]):
            if prompt == "break off" and i == 2:
                self.wfile.write(b'data: {"text_ou')
                return None
            time.sleep(self.gap_s)
            self.wfile.write(f"data: {json.dumps({'text_output': f'{i} '})}\n\n".encode())
        return None

    def reply(self, status: int, body: str) -> None:
        self.send_response(status)
        self.end_headers()
        self.wfile.write(body.encode())

    def log_message(self, *arguments: object) -> None:
        pass


class SlowHandler(Handler):
    gap_s = 0.02


@pytest.fixture(params=[Handler])
def endpoint(request: pytest.FixtureRequest) -> Iterator[Endpoint]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), request.param)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield Endpoint(f"http://127.0.0.1:{server.server_port}", timeout_s=10)
    server.shutdown()
    server.server_close()


def test_client_reads_whole_and_streamed_text(endpoint: Endpoint) -> None:
    assert generate(endpoint, "x", max_tokens=3) == "whole"
    assert list(stream(endpoint, "x", max_tokens=3)) == ["0 ", "1 ", "2 "]


@pytest.mark.parametrize("endpoint", [SlowHandler], indirect=True)
def test_client_times_each_chunk(endpoint: Endpoint) -> None:
    timing = measure(endpoint, "x", max_tokens=5)
    assert timing.num_chunks == 5
    assert timing.text == "0 1 2 3 4 "
    assert np.median(timing.inter_token_s) > 0.01
    assert timing.latency_s == pytest.approx(timing.ttft_s + sum(timing.inter_token_s))


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        ("refuse", r"127.0.0.1:\d+: max_tokens: too many \(HTTP 400\)"),
        ("error behind 200", "engine died"),
        ("break off", "127.0.0.1"),
    ],
)
def test_client_names_what_went_wrong(endpoint: Endpoint, prompt: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        measure(endpoint, prompt, max_tokens=5)


def test_client_without_a_server() -> None:
    with pytest.raises(UserError, match=r"127\.0\.0\.1:9: connection refused; is the server running"):
        generate(Endpoint("http://127.0.0.1:9"), "x", max_tokens=1)
    with pytest.raises(UserError, match="'localhost:8000' is no http:// address"):
        Endpoint("localhost:8000")


def make_round(side: str, generator: np.random.Generator, scale: float, chunks: int = 16) -> Round:
    gaps = tuple(scale * generator.gamma(20, 1e-4, chunks - 1))
    timing = RequestTiming(
        ttft_s=0.01 * scale, inter_token_s=gaps, latency_s=0.01 * scale + sum(gaps), text=""
    )
    return Round(side=side, concurrency=1, wall_s=timing.latency_s, timings=(timing,) * 3)


def make_rounds(scale: float, seed: int = 0, count: int = 12) -> list[Round]:
    generator = np.random.default_rng(seed)
    return [
        make_round(s, generator, scale if s == "candidate" else 1.0)
        for _ in range(count)
        for s in compare.SIDES
    ]


def test_tokens_that_come_two_at_a_time_do_not_move_inter_token_latency() -> None:
    """Equal requests, whose gaps are long or short by turns, from either end: medians of gaps are 9 apart."""
    gaps = (0.001, 0.009) * 4
    timings = [
        RequestTiming(ttft_s=0.1, inter_token_s=x, latency_s=0.1 + sum(x), text="")
        for x in ((*gaps, 0.001), (*gaps[::-1], 0.009))
    ]
    sides = [
        Round(side=side, concurrency=1, wall_s=1, timings=(timing,) * 4)
        for side, timing in zip(compare.SIDES, timings, strict=True)
        for _ in range(4)
    ]
    assert row(sides, "token_gap_ms", 1).ratio.value == pytest.approx(9)
    assert row(sides, "inter_token_ms", 1).ratio.value == pytest.approx(49 / 41)
    assert row(sides, "inter_token_ms", 1).baseline.p50 == pytest.approx(41 / 9)


def test_statistics_are_numpys() -> None:
    values = list(np.random.default_rng(0).gamma(2, 3, 999))
    s = statistics(values)
    assert (s.p50, s.p90, s.p99) == tuple(np.percentile(values, (50, 90, 99)))
    assert s.mean == pytest.approx(np.mean(values))
    assert s.count == 999


def test_a_difference_is_found_and_its_size_is_right() -> None:
    found = row(make_rounds(0.8), "inter_token_ms", 1)
    assert found.ratio.differs
    assert found.ratio.low < 0.8 < found.ratio.high
    assert found.ratio.value == pytest.approx(0.8, abs=0.03)


def test_equal_sides_rarely_differ() -> None:
    """One comparison in a hundred; the bound is that of 60 trials at 1 in 1000."""
    found = sum(row(make_rounds(1.0, seed), "inter_token_ms", 1).ratio.differs for seed in range(60))
    assert found <= 4


def recorded(side: str, p50: float, count: int = 10) -> RecordedRound:
    """A run of which only percentiles are known."""
    summary = Statistics(p50=p50, p90=2 * p50, p99=3 * p50, mean=1.5 * p50, count=count)
    return RecordedRound(
        side=side,
        concurrency=1,
        values={"inter_token_ms": (p50,), "latency_ms": (p50,), "tokens_per_s": (1e3 / p50,)},
        lengths=(64.0,),
        summaries={"inter_token_ms": summary, "latency_ms": summary},
    )


def test_percentiles_of_runs_are_combined_and_said_to_be() -> None:
    """By hand: medians of 10, 12, 11 and of 5, 6, 7; the means weighted by their counts."""
    runs = [recorded("baseline", x) for x in (10.0, 12.0)] + [recorded("baseline", 11.0, count=30)]
    runs += [recorded("candidate", x) for x in (5.0, 6.0, 7.0)]
    logs = np.log([5 / 10, 6 / 12, 7 / 11])
    reach = 4.302653 * logs.std(ddof=1) / np.sqrt(3)  # of Student's t with 2 degrees of freedom
    found = row(runs, "inter_token_ms", 1)
    assert (found.baseline.p50, found.baseline.p90, found.baseline.p99) == (11.0, 22.0, 33.0)
    assert found.baseline.mean == pytest.approx(1.5 * (10 * 10 + 12 * 10 + 11 * 30) / 50)
    assert (found.baseline.count, found.candidate.count) == (50, 30)
    assert found.ratio.value == pytest.approx(np.exp(logs.mean()))
    assert found.ratio.low == pytest.approx(np.exp(logs.mean() - reach))
    assert found.ratio.high == pytest.approx(np.exp(logs.mean() + reach))
    rate = row(runs, "tokens_per_s", 1)
    assert rate.baseline.p50 == pytest.approx(1e3 / 11)
    assert combined([found.baseline]) == found.baseline


NOISE = {
    "alike": lambda random, count: random.normal(0, 0.04, 2 * count),
    "heavy": lambda random, count: 0.02 * random.standard_t(2.5, 2 * count),
    "drift": lambda random, count: np.cumsum(random.normal(0, 0.04, 2 * count)),
}


def ab_ba(noise: np.ndarray, effect: float) -> Ratio:
    """A comparison whose rounds meet `noise` in the order ABBA, single values around 10."""
    pairs = noise.reshape(-1, 2).copy()
    pairs[1::2] = pairs[1::2, ::-1]
    values = 10 * np.exp(pairs)
    return ratio([[x] for x in values[:, 0]], [[effect * x] for x in values[:, 1]])


@pytest.mark.parametrize("kind", NOISE)
@pytest.mark.parametrize("rounds", [5, 8])
def test_a_difference_is_called_as_seldom_and_as_surely_as_said(kind: str, rounds: int) -> None:
    """1000 comparisons: equal sides differ in 1%, the 95% interval misses in 5%; 20% is found by 8 rounds."""
    random = np.random.default_rng(0)
    same = [ab_ba(NOISE[kind](random, rounds), 1.0) for _ in range(1000)]
    assert sum(x.differs for x in same) <= 10 + 4 * 10**0.5
    assert sum(not x.low <= 1 <= x.high for x in same) <= 50 + 4 * 50**0.5
    if rounds == 8:
        assert np.mean([ab_ba(NOISE[kind](random, rounds), 1.2).differs for _ in range(300)]) > 0.9


def test_forty_comparisons_of_equal_sides() -> None:
    """At most 5% of them call a difference."""
    random = np.random.default_rng(1)
    assert sum(ab_ba(NOISE["drift"](random, 8), 1.0).differs for _ in range(40)) <= 2


def test_outliers_are_counted_and_kept() -> None:
    found = statistics([1.0, 1.1, 1.2, 1.3, 1.4, 9.0, 1.2])
    assert (found.outliers, found.count) == (1, 7)
    assert found.mean > 2


def test_goodput_counts_requests_within_all_targets() -> None:
    good = RequestTiming(ttft_s=0.1, inter_token_s=(0.01, 0.03), latency_s=0.14, text="")
    late = RequestTiming(ttft_s=0.3, inter_token_s=(0.01,), latency_s=0.31, text="")
    slow = RequestTiming(ttft_s=0.1, inter_token_s=(0.05,), latency_s=0.15, text="")
    targets = Targets(ttft=200, inter_token=30)
    assert [targets.met(x) for x in (good, late, slow)] == [True, False, False]
    one = Round(side="baseline", concurrency=1, wall_s=2.0, timings=(good, good, late, slow), targets=targets)
    assert one.samples("goodput_per_s") == [1.0]


@pytest.mark.parametrize("endpoint", [SlowHandler], indirect=True)
def test_an_open_loop_does_not_wait_and_counts_from_when_requests_are_due(endpoint: Endpoint) -> None:
    """A request takes 0.1 s; 100 come a second, so they overlap, and none of their waiting is forgotten."""
    made = Load(prompts=["x"], num_requests=20, max_tokens=5, open_loop=True, seed=3)
    wall, timings = made.run(endpoint, 100.0, 0)
    assert len(timings) == 20
    assert wall < 20 * 0.1 / 2
    due = made._due(20, 100.0, 0)
    assert due == made._due(20, 100.0, 0) != made._due(20, 100.0, 1)
    assert np.mean(np.diff(made._due(4000, 100.0, 0))) == pytest.approx(0.01, rel=0.1)
    late = measure(endpoint, "x", max_tokens=2, since=time.perf_counter() - 0.5)
    assert late.ttft_s > 0.5
    assert late.latency_s > late.ttft_s


def test_warm_up_goes_on_until_it_is_steady() -> None:
    def rounds(values: list[float]) -> object:
        told = iter(values)
        return lambda side: [RequestTiming(ttft_s=0, inter_token_s=(), latency_s=next(told), text="")]

    most = measuring.MOST_WARM_UPS
    assert measuring.until_steady(rounds([5, 5, 2, 2, 1, 1, 1, 1])) == (4, True)
    assert measuring.until_steady(rounds([1, 2, 1.05, 2.1])) == (2, True)
    assert measuring.until_steady(rounds([9, 9, 8, 8, 6, 6, 4, 4, 2, 2, 2, 2])) == (most, True)
    assert measuring.until_steady(rounds([2.0**-i for i in range(12)])) == (most, False)
    wild = measuring.Measured(rounds=[], warm_ups=[2, most], settled=[True, False], server_times={})
    assert [x[:23] for x in compare._reservations(wild, True)] == [
        "Answers end by themselv",
        "Latency had not settled",
    ]
    assert list(compare._reservations(replace(wild, settled=[True, True]), False)) == []


def run_of(scale: float, seed: int, **changes: object) -> dict:
    rounds = make_rounds(scale, seed)
    settings = {"concurrency": [1], "rounds": 12, "seed": seed, "prompts": 3}
    made = compare.assemble(rounds, method="m", how="", settings=settings)
    return {**made.to_dict(), **changes}


def test_history_tells_what_changed_on_the_same_hardware(tmp_path: Path) -> None:
    assert against_last(read(tmp_path), run_of(1.0, 0)) is None
    keep(tmp_path, run_of(1.0, 0))
    same = against_last(read(tmp_path), run_of(1.0, 1))
    assert same is not None
    assert not any(x.slower or x.faster for x in same.changes)
    worse = against_last(read(tmp_path), run_of(1.3, 2))
    assert worse is not None
    assert {(x.side, x.metric) for x in worse.changes if x.slower} >= {("candidate", "inter_token_ms")}
    assert not any(x.slower for x in worse.changes if x.side == "baseline")
    for name, (low, high) in {"candidate": (1.2, 1.4), RATIO: (1.2, 1.4), "baseline": (0.9, 1.1)}.items():
        found = next(x for x in worse.changes if (x.side, x.metric) == (name, "inter_token_ms"))
        assert low < found.ratio < high
    moved = against_last(read(tmp_path), {**run_of(1.0, 0), "versions": {"torch": "99"}})
    assert moved is not None
    assert any(x.startswith("torch ") and x.endswith(" to 99") for x in moved.packages)
    assert {x.ratio for x in moved.changes} == {1.0}
    other = {"cpu": "another", "cores": 2, "machine": "x86_64", "gpus": []}
    assert against_last(read(tmp_path), run_of(1.0, 1, hardware=other)) is None
    keep(tmp_path, run_of(1.3, 2))
    assert len(list(tmp_path.glob("*.json"))) == 2
    later = against_last(read(tmp_path), run_of(1.3, 3))
    assert later is not None
    assert sum(x.slower for x in later.changes) <= 1  # of nine, by chance
    (tmp_path / "99990101T000000Z-00.json").write_text("{}")
    with pytest.raises(UserError, match=r"99990101T000000Z-00\.json: no run of compare-latency"):
        read(tmp_path)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--slo", "ttft=0"), "ttft=0: give positive ms for ttft, inter_token, latency"),
        (("--slo", "speed=3"), "speed=3: give positive ms"),
        (("--rate", "2,2"), "no list of unlike positive numbers"),
        (("--rate", "nan"), "no list of unlike positive numbers"),
        (("--data", "x"), "--data, --baseline-model and --candidate-model go together"),
        (
            ("--rate", "2", "--load-generator", "aiperf", "--tokenizer", "x"),
            "--rate belongs to --load-generator",
        ),
        (("--rate", "2", "--concurrency", "4"), "--rate is an open loop, --concurrency a closed one"),
        (("--slo", "ttft=3", "--via", "trtllm-bench"), "--slo belongs to --via triton"),
    ],
)
def test_options_that_do_not_go(tmp_path: Path, options: tuple[str, ...], message: str) -> None:
    from click.testing import CliRunner

    from ffn_fusion import main

    line = [
        "compare-latency",
        "http://127.0.0.1:9",
        "http://127.0.0.1:9",
        "-o",
        str(tmp_path / "r"),
        *options,
    ]
    result = CliRunner().invoke(main, line)
    assert result.exit_code == 2
    assert message in result.stderr


def test_report_of_runs_without_single_values(tmp_path: Path) -> None:
    runs = [recorded(s, 8.0 if s == "candidate" else 10.0) for _ in range(6) for s in compare.SIDES]
    settings = {"concurrency": [1], "rounds": 6, "seed": 0}
    comparison = compare.assemble(runs, method="with a tool", how="6 rounds.", settings=settings)
    assert comparison.metrics == ("inter_token_ms", "latency_ms", "tokens_per_s")
    assert comparison.token_gap_ms == {}
    assert comparison.notes == ()
    (tmp_path / "left").mkdir()
    (tmp_path / "left" / "log").write_text("said")
    report.write_report(comparison, tmp_path / "report", tmp_path / "left")
    text = (tmp_path / "report" / "report.html").read_text()
    assert text.count("<svg") == 2
    assert "Latency with a tool" in text
    assert "1.25 times faster per token" in text
    assert (tmp_path / "report" / "runs" / "log").read_text() == "said"


def test_order_of_rounds_is_abba(endpoint: Endpoint) -> None:
    order: list[str] = []

    def run(side: str, level: float, number: int) -> RecordedRound:
        order.append(side)
        return recorded(side, 1.0)

    measuring.interleave(run, (1,), 4, warm_up=lambda level: order.append("warm"))
    assert order == ["warm", *(["baseline", "candidate", "candidate", "baseline"] * 2)]
    made = compare.compare(endpoint, endpoint, prompts=["x"], max_tokens=3, concurrency=(1,), rounds=4)
    assert made.settings["warm_up_rounds"][0] >= 2
    assert len(made.row("latency_ms", 1).baseline_rounds) == 4
    assert made.server_times == {}  # this server does not tell


def test_unequal_work_is_said() -> None:
    generator = np.random.default_rng(0)
    rounds = [make_round("baseline", generator, 1.0, 16), make_round("candidate", generator, 1.0, 9)]
    assert "differ in length: 16.0 tokens a request from the baseline, 9.0" in unequal(rounds)[0]
    assert unequal(make_rounds(1.0)) == ()


TIMED = (
    "ttft_ms",
    "inter_token_ms",
    "token_gap_ms",
    "latency_ms",
    "tokens_per_s",
)  # by this package's own client
FACTS = {
    "layers": 16,
    "attention_layers": 16,
    "all_reduces_per_token": 32,
    "kv_bytes_per_token": 8192,
    "parameters": 4_000_000,
    "tp_size": 2,
    "dtype": "float32",
}


@pytest.fixture(scope="module")
def comparison() -> compare.Comparison:
    rounds = make_rounds(0.5)
    return compare.Comparison(
        method="through Triton",
        how="12 rounds.",
        rows=tuple(row(rounds, metric, 1) for metric in TIMED),
        token_gap_ms={s: compare._values(rounds, s, 1, "token_gap_ms") for s in compare.SIDES},
        notes=("Outputs <differ>.",),
        settings={"prompts": 3, "max_tokens": 16, "concurrency": [1], "rounds": 12, "seed": 0},
        baseline_facts=FACTS,
        candidate_facts={**FACTS, "layers": 10, "all_reduces_per_token": 18},
        quality={"parent": {"perplexity": 10.0, "kl": None}, "fused": {"perplexity": 11.0, "kl": 0.1}},
        hardware={"cpu": "test", "cores": 2, "machine": "x86_64", "gpus": []},
    )


class Page(HTMLParser):
    """Collects tags, addresses and ids."""

    def __init__(self) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.addresses: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.addresses += [v or "" for k, v in attrs if k in ("src", "href", "xlink:href") and tag != "use"]


def test_page_is_self_contained(comparison: compare.Comparison, tmp_path: Path) -> None:
    report.write_report(comparison, tmp_path / "report")
    page = Page()
    text = (tmp_path / "report" / "report.html").read_text()
    page.feed(text)
    assert not [a for a in page.addresses if not a.startswith("#")]
    assert "script" not in page.tags
    assert page.tags.count("svg") == 5
    assert "times faster per token at one client" in text
    assert "Outputs &lt;differ&gt;." in text
    assert "all-reduces per token" in text
    values = json.loads((tmp_path / "report" / "report.json").read_text())
    assert [row["metric"] for row in values["rows"]] == list(TIMED)
    with pytest.raises(UserError, match="exists; remove it"):
        report.write_report(comparison, tmp_path / "report")


def test_table_fits_a_terminal(comparison: compare.Comparison) -> None:
    console = Console(width=80, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    report.print_table(comparison, console)
    console.file.close()
    text = console.export_text()
    assert "inter-token, ms" in text
    assert "…" not in text
    assert words.interval(comparison.rows[1].ratio) in text


def test_no_difference_is_said() -> None:
    rounds = make_rounds(1.0, seed=3)
    found = row(rounds, "inter_token_ms", 1)
    assert not found.ratio.differs


def test_every_client_is_at_work(endpoint: Endpoint, monkeypatch: pytest.MonkeyPatch) -> None:
    """Four prompts for 16 clients are sent again; as many requests are in flight as the report says."""
    lock, state = threading.Lock(), {"now": 0, "peak": 0, "all": 0}
    whole = threading.Barrier(16, timeout=20)

    def counted(*arguments: object, **options: object) -> RequestTiming:
        with lock:
            state["now"] += 1
            state["all"] += 1
            state["peak"] = max(state["peak"], state["now"])
        whole.wait()  # passes only where all 16 are at work together
        with lock:
            state["now"] -= 1
        return RequestTiming(ttft_s=0.1, inter_token_s=(0.1,), latency_s=0.2, text="x")

    monkeypatch.setattr(load, "measure", counted)
    monkeypatch.setattr(measuring, "until_steady", lambda run: (0, True))
    result = compare.compare(
        endpoint, endpoint, prompts=["a", "b", "c", "d"], max_tokens=2, concurrency=(16,), rounds=2
    )
    assert state["peak"] == 16
    assert state["all"] == 4 * 32
    assert result.settings["requests"] == [32]


@pytest.mark.parametrize("url", ["http://127.0.0.1:99999", "http://127.0.0.1:x", "https://h", "http://"])
def test_what_is_no_address(url: str) -> None:
    with pytest.raises(UserError, match="is no http:// address"):
        Endpoint(url)


def test_unlike_backends_and_other_machines_are_told() -> None:
    from triton_repo.cli.compare_sides import elsewhere

    assert compare._backends({"backend": "embedded"}, {"backend": "embedded"}) == ()
    assert compare._backends({"backend": "embedded"}, None) == ()
    assert "different backends, a and b" in compare._backends({"backend": "a"}, {"backend": "b"})[0]
    assert elsewhere("http://127.0.0.1:8000", "http://localhost:8010", "engine") == ()
    assert "other machines" in elsewhere("http://127.0.0.1:8000", "http://node7:8000")[0]


def test_prompts_have_the_lengths_asked_for(tiny_hf: Path) -> None:
    from tokenizers import Tokenizer

    made = shapes.make([(12, 5), (40, 7)], compare.DEFAULT_PROMPTS, tiny_hf)
    encoder = Tokenizer.from_file(str(tiny_hf / "tokenizer.json"))
    assert [(x.input_tokens, x.output_tokens) for x in made] == [(12, 5), (40, 7)]
    for shape in made:
        assert {len(encoder.encode(text).ids) for text in shape.prompts} == {shape.input_tokens}
        assert len(set(shape.prompts)) > 1
