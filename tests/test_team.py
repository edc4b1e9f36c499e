"""Conversions over threads and MPI processes: always the same bytes, and failures that all share."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from builder import huggingface, trtllm
from builder.plan import Plan

TOOL = [str(Path(sys.executable).with_name("ffn-fusion"))]
MPIRUN = [str(Path(sys.executable).with_name("mpirun")), "--oversubscribe", "--allow-run-as-root"]


def mpirun(processes: int, *arguments: object) -> subprocess.CompletedProcess[str]:
    command = [*MPIRUN, "-n", str(processes), *TOOL, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)


def contents(directory: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in directory.iterdir()}


@pytest.fixture(scope="module")
def reference(tiny_hf: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    output = tmp_path_factory.mktemp("reference") / "c"
    command = [*TOOL, "convert", str(tiny_hf), "--drop-attention", "2-5", "--tp", "4", "-o", str(output)]
    subprocess.run(command, check=True, capture_output=True)
    return contents(output)


@pytest.mark.parametrize("threads", [1, 2, 7])
def test_threads_write_the_same_bytes(tiny_hf: Path, tmp_path: Path, reference: dict, threads: int) -> None:
    command = [*TOOL, "convert", str(tiny_hf), "--drop-attention", "2-5", "--tp", "4"]
    subprocess.run([*command, "--threads", str(threads), "-o", str(tmp_path / "c")], check=True)
    assert contents(tmp_path / "c") == reference


@pytest.mark.parametrize("processes", [2, 3, 6])
def test_processes_write_the_same_bytes(
    tiny_hf: Path, tmp_path: Path, reference: dict, processes: int
) -> None:
    """With 6 processes and 4 files two have nothing to write."""
    output = tmp_path / "c"
    result = mpirun(processes, "convert", tiny_hf, "--drop-attention", "2-5", "--tp", 4, "-o", output)
    assert result.returncode == 0, result.stderr
    assert result.stdout == f"{output}: 4 layers for TP 4, PP 1\n"
    assert contents(output) == reference
    assert [p.name for p in tmp_path.iterdir()] == ["c"]


def test_fuse_over_processes(tiny_hf: Path, tmp_path: Path) -> None:
    assert mpirun(2, "fuse", tiny_hf, "--drop-attention", "2-5", "-o", tmp_path / "two").returncode == 0
    subprocess.run(
        [*TOOL, "fuse", str(tiny_hf), "--drop-attention", "2-5", "-o", str(tmp_path / "one")], check=True
    )
    assert contents(tmp_path / "two") == contents(tmp_path / "one")


def test_failure_is_told_once(tiny_hf: Path, tmp_path: Path) -> None:
    (tmp_path / "c").mkdir()
    result = mpirun(3, "convert", tiny_hf, "--tp", 2, "-o", tmp_path / "c")
    assert result.returncode == 1
    assert result.stderr.count("error: ") == 1
    assert "c: exists; remove it" in result.stderr
    assert list((tmp_path / "c").iterdir()) == []


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--tp", "3"], "tp_size: 3 does not divide"),
        (["--drop-attention", "9"], "drop_attention: layer 9 does not exist"),
        (["--kv-heads", "9"], "'9' is not LAYERS=HEADS"),
        (["--tp", "3", "--dry-run"], "tp_size: 3 does not divide"),
    ],
)
def test_wrong_input_is_told_once(tiny_hf: Path, tmp_path: Path, options: list, message: str) -> None:
    result = mpirun(3, "convert", tiny_hf, *options, "-o", tmp_path / "c")
    assert result.returncode == 1
    assert result.stderr.count("error: ") == 1
    assert message in result.stderr
    assert list(tmp_path.iterdir()) == []


def test_dry_run_prints_once(tiny_hf: Path) -> None:
    assert mpirun(3, "convert", tiny_hf, "--dry-run").stdout.count("KV bytes per token") == 1


def test_failure_of_one_process_fails_all(tmp_path: Path) -> None:
    """Rank 1 cannot read its source; nothing is left, and rank 0 tells its reason."""
    code = (
        "import sys; from pathlib import Path\n"
        "from builder.errors import UserError\n"
        "from builder.team import Team\n"
        "team = Team.join()\n"
        "def work():\n"
        "    if team.rank == 1: raise UserError('disk of rank 1 is full')\n"
        "try: team.together(work)\n"
        "except UserError as error: print(team.rank, error); sys.exit(1)\n"
    )
    result = subprocess.run(
        [*MPIRUN, "-n", "2", sys.executable, "-c", code],
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parent.parent)},
    )
    assert result.returncode == 1
    assert result.stdout == "0 disk of rank 1 is full\n"


def test_same_input_same_bytes(tiny_hf: Path, tmp_path: Path) -> None:
    child = Plan(drop_attention=(2, 3, 4)).apply(huggingface.read(tiny_hf))
    for name in ("a", "b"):
        trtllm.convert(child, tmp_path / name, tp_size=2, dtype="bfloat16")
    assert contents(tmp_path / "a") == contents(tmp_path / "b")
