"""compare-latency where something is wrong: one line, nothing half written, and told before the measuring."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from dataclasses import replace
from http.server import ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner, Result
from test_compare import Handler, endpoint, make_round  # noqa: F401  (endpoint is a fixture)

from builder.errors import UserError
from ffn_fusion import main
from triton_repo import compare, report
from triton_repo.client import Endpoint, RequestTiming, model_statistics, takes
from triton_repo.load import Load, enough
from triton_repo.rounds import SIDES, Round, Targets
from triton_repo.shapes import Shape
from triton_repo.work import unequal

INPUTS = {"inputs": [{"name": "text_input"}, {"name": "max_tokens"}, {"name": "stream"}]}


class MortalHandler(Handler):
    """A Triton of one model, without min_tokens, that breaks every connection after `lives` requests."""

    lives = 40

    def do_GET(self) -> None:  # noqa: N802
        known = {"": INPUTS, "/config": {}}
        rest = self.path.removeprefix("/v2/models/ensemble")
        self.reply(*((200, json.dumps(known[rest])) if rest in known else (404, "{}")))

    def do_POST(self) -> None:  # noqa: N802
        type(self).lives -= 1
        if self.lives > 0:
            super().do_POST()


@pytest.fixture
def mortal() -> Iterator[str]:
    handler = type("Fresh", (MortalHandler,), {})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


def compared(url: str, output: Path, *options: str) -> Result:
    return CliRunner().invoke(main, ["compare-latency", url, url, "-o", str(output), *options])


def test_a_server_that_dies_while_it_is_measured(mortal: str, tmp_path: Path) -> None:
    result = compared(mortal, tmp_path / "report", "--history", str(tmp_path / "kept"))
    assert result.exit_code == 1
    assert "the server broke off" in result.stderr
    assert len(result.stderr.strip().splitlines()) == 1
    assert list(tmp_path.iterdir()) == []


def test_a_history_that_is_none_is_told_before_the_measuring(mortal: str, tmp_path: Path) -> None:
    (tmp_path / "kept").mkdir()
    (tmp_path / "kept" / "x.json").write_text('{"rows": 3}')
    result = compared(mortal, tmp_path / "report", "--history", str(tmp_path / "kept"))
    assert result.exit_code == 1
    assert "x.json: no run of compare-latency" in result.stderr
    file = tmp_path / "kept" / "x.json"
    assert "not a directory" in compared(mortal, tmp_path / "report", "--history", str(file)).stderr


def test_lengths_that_a_server_cannot_do_are_told_before_the_measuring(endpoint: Endpoint) -> None:  # noqa: F811
    seen: list[str] = []
    shapes = [Shape(input_tokens=9, output_tokens=4, prompts=("refuse",))]
    with pytest.raises(UserError, match="max_tokens: too many"):
        compare.compare(
            endpoint, endpoint, prompts=["x"], max_tokens=3, shapes=shapes, progress=seen.append, rounds=2
        )
    assert seen == []


def test_too_few_requests_for_the_clients(endpoint: Endpoint) -> None:  # noqa: F811
    with pytest.raises(UserError, match="num_requests: 2 cannot keep 4 in flight"):
        compare.compare(
            endpoint, endpoint, prompts=["x"], max_tokens=3, concurrency=(1, 4), num_requests=2, rounds=2
        )
    assert [len(enough(["a", "b", "c"], level)) for level in (1, 2, 4)] == [3, 4, 8]
    assert enough(["a", "b"], 1, 3) == ["a", "b", "a"]
    assert len(Load(prompts=["a"], max_tokens=2, open_loop=True).asked(0.5)) == 32


def test_a_server_without_min_tokens_is_not_asked_for_it(mortal: str, tmp_path: Path) -> None:
    end = Endpoint(mortal)
    assert takes(end, "max_tokens") is False  # no sampling option
    assert (takes(end, "min_tokens"), takes(end, "num_draft_tokens")) == (False, False)
    assert model_statistics(end) is None
    made = compare.compare(end, end, prompts=["x"], max_tokens=3, concurrency=(1,), rounds=2)
    assert made.settings["equal_lengths"] is False
    assert "a server takes no min_tokens" in made.notes[0]
    assert "3 tokens each, or fewer" in made.how


def test_answers_of_one_token_cannot_be_compared(endpoint: Endpoint) -> None:  # noqa: F811
    with pytest.raises(UserError, match="the baseline answers them with one token each"):
        compare.compare(endpoint, endpoint, prompts=["x"], max_tokens=1, concurrency=(1,), rounds=2)


def test_no_good_request_is_no_number(tmp_path: Path) -> None:
    """The page shows it, and the JSON stays JSON."""
    random = np.random.default_rng(0)
    targets = Targets(ttft=1)  # rounds have 10 ms
    rounds = [replace(make_round(side, random, 1.0), targets=targets) for side in SIDES * 2]
    settings = {"concurrency": [1], "rounds": 2, "seed": 0}
    made = compare.assemble(rounds, method="m", how="", settings=settings)
    found = made.row("goodput_per_s", 1)
    assert (found.baseline.mean, found.ratio.differs) == (0.0, False)
    report.write_report(made, tmp_path / "report")
    told = json.loads((tmp_path / "report" / "report.json").read_text(), parse_constant=pytest.fail)
    assert next(x for x in told["rows"] if x["metric"] == "goodput_per_s")["ratio"]["value"] is None


def test_unlike_texts_and_lengths_are_counted_request_by_request() -> None:
    def one(side: str, *texts: str) -> Round:
        timings = [
            RequestTiming(ttft_s=1, inter_token_s=(1.0,) * (len(text) - 1), latency_s=9, text=text)
            for text in texts
        ]
        return Round(side=side, concurrency=1, wall_s=1, timings=tuple(timings))

    assert unequal([one("baseline", "abc", "de"), one("candidate", "abc", "de")]) == ()
    assert (
        "50% of the requests are answered with unlike texts"
        in unequal([one("baseline", "abc", "de"), one("candidate", "abc", "df")])[0]
    )
    swapped = unequal([one("baseline", "abc", "de"), one("candidate", "de", "abc")])[0]
    assert "2.5 tokens a request from the baseline, 2.5 from the candidate; 100% of the requests" in swapped
