"""SIGKILL at any moment of a conversion: no output directory, or a whole one."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import write_llama

from builder import verification

KILLS = 60
# One driver, so that the kills fall on the conversion and not on Python's start. Each conversion is a
# forked child; the moment of its death is drawn over a little more than the time a conversion takes.
DRIVER = """
import json, os, random, shutil, signal, sys, time
from pathlib import Path
from builder import huggingface, trtllm
from builder.plan import Plan

model, scratch, kills = Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3])

def convert(output):
    child = Plan(drop_attention=(1, 2, 3)).apply(huggingface.read(model))
    trtllm.convert(child, output, tp_size=2)

def contents(directory):
    return {file.name: file.read_bytes() for file in directory.iterdir()}

def start(output):
    shutil.rmtree(output, ignore_errors=True)
    pid = os.fork()
    if pid == 0:
        convert(output)
        os._exit(0)
    return pid

convert(scratch / "whole")
expected = contents(scratch / "whole")
durations = []
for _ in range(5):
    begin = time.monotonic()
    os.waitpid(start(scratch / "timed"), 0)
    durations.append(time.monotonic() - begin)
duration = sorted(durations)[2]
random.seed(0)
outcomes = []
for index in range(kills):
    output = scratch / f"out{index % 3}"
    pid = start(output)
    time.sleep(random.uniform(0, 1.3 * duration))
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    whole = output.exists()
    assert not whole or contents(output) == expected
    outcomes.append((whole, any(p.name.startswith(f".{output.name}.partial") for p in scratch.iterdir())))
print(json.dumps(outcomes))
"""


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """20 MB: enough that a kill falls among the writes."""
    return write_llama(
        tmp_path_factory.mktemp("kill") / "m",
        hidden_size=256,
        intermediate_size=1024,
        vocab_size=320,
        num_hidden_layers=5,
    )


def test_killed_at_any_moment(model: Path, tmp_path: Path) -> None:
    result = subprocess.run(
        [sys.executable, "-c", DRIVER, model, tmp_path, str(KILLS)],
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
        cwd=Path(__file__).parent.parent,
    )
    assert result.returncode == 0, result.stderr
    outcomes = [tuple(x) for x in json.loads(result.stdout)]
    assert len(outcomes) == KILLS
    # The test means something only if deaths fell before, among and after the writes.
    assert outcomes.count((True, False)) >= 3
    assert outcomes.count((False, True)) >= 10


def test_next_run_removes_what_a_killed_one_left(model: Path, tmp_path: Path) -> None:
    partial = tmp_path / ".c.partial-12345"
    partial.mkdir()
    (partial / "rank0.safetensors").write_bytes(b"half")
    other = tmp_path / ".other.partial-1"
    other.mkdir()
    command = [str(Path(sys.executable).with_name("ffn-fusion")), "convert", str(model)]
    subprocess.run([*command, "-o", str(tmp_path / "c")], check=True, capture_output=True)
    assert sorted(p.name for p in tmp_path.iterdir()) == [".other.partial-1", "c"]
    assert verification.verify(tmp_path / "c").problems == []


def test_running_conversion_is_left_alone(tmp_path: Path) -> None:
    from builder.storage import output_directory

    code = (
        "import sys; from pathlib import Path; from builder.storage import output_directory\n"
        "with output_directory(Path(sys.argv[1])) as d: (d / 'second').write_text('x')"
    )
    with output_directory(tmp_path / "out") as directory:
        (directory / "first").write_text("x")
        subprocess.run([sys.executable, "-c", code, tmp_path / "out"], check=True)
        assert (directory / "first").exists()
        (tmp_path / "out" / "second").unlink()
        (tmp_path / "out").rmdir()
    assert [p.name for p in (tmp_path / "out").iterdir()] == ["first"]
