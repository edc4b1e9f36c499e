"""The generate command: every option reaches the engine."""

from __future__ import annotations

import json
import math
import os
import signal
import time
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from builder import tokenizer
from engines.embedded.session import Generation, Request, Session
from ffn_fusion import main


def run(engine: Path, model: Path, *options: str) -> dict[str, Any]:
    command = [
        "generate",
        str(engine),
        "--tokenizer",
        str(model),
        "--prompt",
        "The quick",
        "--json",
        *options,
    ]
    result = CliRunner().invoke(main, command)
    assert result.exit_code == 0, result.output
    answer: dict[str, Any] = json.loads(result.stdout)
    return answer


@pytest.fixture(scope="module")
def greedy(tiny_engine: Path, tiny_hf: Path) -> dict[str, Any]:
    return run(tiny_engine, tiny_hf, "--max-tokens", "12", "--log-probs")


def test_log_probs_of_each_token(greedy: dict[str, Any]) -> None:
    assert len(greedy["token_ids"]) == len(greedy["log_probs"]) == 12
    assert all(-math.log(320) < x <= 0 for x in greedy["log_probs"])
    assert greedy["cum_log_prob"] == pytest.approx(sum(greedy["log_probs"]), rel=1e-5)


def test_words(greedy: dict[str, Any], tiny_engine: Path, tiny_hf: Path) -> None:
    words = tokenizer.load(tiny_hf)
    third = words.decode(greedy["token_ids"][2:3])
    alone = words.encode(third, add_special_tokens=False).ids
    assert len(alone) == 1, "the test needs a token that is a word"
    stopped = run(tiny_engine, tiny_hf, "--max-tokens", "12", "--stop-words", third)
    assert stopped["finish_reason"] == "stop_words"
    assert stopped["token_ids"] == greedy["token_ids"][: greedy["token_ids"].index(alone[0]) + 1]
    without = run(tiny_engine, tiny_hf, "--max-tokens", "12", "--bad-words", third)
    assert alone[0] not in without["token_ids"]


@pytest.mark.parametrize(
    "options",
    [
        ["--repetition-penalty", "4"],
        ["--presence-penalty", "9"],
        ["--frequency-penalty", "9"],
        ["--temperature", "3", "--seed", "5"],
        ["--temperature", "3", "--top-k", "300"],
        ["--temperature", "3", "--top-p", "0.99"],
    ],
)
def test_sampling_changes_the_text(
    greedy: dict[str, Any], tiny_engine: Path, tiny_hf: Path, options: list[str]
) -> None:
    first, again = (run(tiny_engine, tiny_hf, "--max-tokens", "12", *options) for _ in range(2))
    assert first == again
    assert first["token_ids"] != greedy["token_ids"]


def test_min_tokens_outlasts_a_stop_word(greedy: dict[str, Any], tiny_engine: Path, tiny_hf: Path) -> None:
    first = tokenizer.load(tiny_hf).decode(greedy["token_ids"][:1])
    stop = ["--max-tokens", "12", "--stop-words", first]
    assert len(run(tiny_engine, tiny_hf, *stop)["token_ids"]) == 1
    assert len(run(tiny_engine, tiny_hf, *stop, "--min-tokens", "6")["token_ids"]) >= 6


def test_a_value_out_of_range_is_one_line(tiny_engine: Path, tiny_hf: Path) -> None:
    command = ["generate", str(tiny_engine), "--tokenizer", str(tiny_hf), "--prompt", "x"]
    result = CliRunner().invoke(main, [*command, "--repetition-penalty", "0"])
    assert result.exit_code == 1
    assert (
        result.stderr.strip() == "error: repetition_penalty: 0.0 is not between 0.0001 and 10000; 1 is none"
    )


def test_a_hanging_engine_is_killed_after_the_step_timeout(
    tiny_engine: Path, tiny_hf: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = Session.generate

    def stopped(session: Session, request: Request) -> Generation:
        os.kill(session.pids[0], signal.SIGSTOP)
        return real(session, request)

    monkeypatch.setattr(Session, "generate", stopped)
    start = time.monotonic()
    command = ["generate", str(tiny_engine), "--tokenizer", str(tiny_hf), "--prompt", "x"]
    result = CliRunner().invoke(main, [*command, "--step-timeout", "1"])
    assert result.exit_code == 1
    assert "no step has ended for 1 s, so the engine was killed; rank 0 is stopped" in result.stderr
    assert time.monotonic() - start < 60


@pytest.mark.parametrize("option", ["--prompt", "--stop-words", "--bad-words"])
def test_text_that_is_not_utf8_is_wrong_use(tiny_engine: Path, tiny_hf: Path, option: str) -> None:
    command = ["generate", str(tiny_engine), "--tokenizer", str(tiny_hf), "--prompt", "x"]
    result = CliRunner().invoke(main, [*command, option, "a\udcff"])
    assert result.exit_code == 2
    assert f"{option}: 'a\\udcff' is not UTF-8 text" in result.stderr
    result = CliRunner().invoke(main, [*command, option, ""])
    assert result.exit_code == 2
    assert f"{option}: empty; give some text" in result.stderr


def test_a_time_that_is_no_number_is_wrong_use(tiny_engine: Path, tiny_hf: Path) -> None:
    command = ["generate", str(tiny_engine), "--tokenizer", str(tiny_hf), "--prompt", "x"]
    result = CliRunner().invoke(main, [*command, "--step-timeout", "nan"])
    assert result.exit_code == 2
    assert "nan is not a finite number" in result.stderr


def test_a_broken_tokenizer_is_named(tiny_engine: Path, tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_text("{")
    command = ["generate", str(tiny_engine), "--tokenizer", str(tmp_path), "--prompt", "x"]
    result = CliRunner().invoke(main, command)
    assert result.exit_code == 1
    assert result.stderr.startswith(f"error: {tmp_path / 'tokenizer.json'}: no tokenizer can be read")
