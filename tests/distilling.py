"""What tests of distill have in common: a text, a student, and the command with small sizes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import torch
from click.testing import CliRunner, Result
from conftest import TEXT

from builder import huggingface
from builder.cli.distill import distill
from builder.errors import UserError
from builder.training import log
from builder.training.processes import Processes
from ffn_fusion import main

CONTEXT, SEQUENCES, STEPS = 16, 4, 6
SHIM = "from builder.cli.distill import distill; distill()"
ALONE = Processes(rank=0, size=1, device=torch.device("cpu"))


def write_text(directory: Path) -> Path:
    file = directory / "text.jsonl"
    file.write_text("".join(json.dumps({"text": x}) + "\n" for x in TEXT * 4), encoding="utf-8")
    return file


def fuse(parent: Path, output: Path, *options: str) -> Path:
    arguments = ["fuse", parent, *(options or ("--drop-attention", "2-5")), "-o", output]
    result = CliRunner().invoke(main, [str(x) for x in arguments])
    assert result.exit_code == 0, result.output
    return output


def arguments(parent: Path, student: Path, text: Path, output: Path, *more: object) -> list[str]:
    sizes = ("--tokens", STEPS * SEQUENCES * CONTEXT, "--context", CONTEXT)
    batch = ("--batch-tokens", SEQUENCES * CONTEXT, "--micro-batch", 3, "--learning-rate", 1e-3, "--seed", 7)
    models = ("--parent", parent, "--student", student, "--data", text, "-o", output)
    return [str(x) for x in (*models, *sizes, *batch, "--warmup", 0.3, *more)]


def invoke(*given: object) -> Result:
    return CliRunner().invoke(distill, [str(x) for x in given])


def trained(*given: object) -> dict:
    result = invoke(*given, "--json")
    assert result.exit_code == 0, result.exception
    return json.loads(result.stdout)


def message(result: Result) -> str:
    """Of an error that is the user's."""
    assert isinstance(result.exception, UserError), (result.output, result.exception)
    assert "\n" not in str(result.exception)
    return str(result.exception)


def curve(file: Path) -> list[float]:
    return [x.loss for x in log.read(file)]


def weights(directory: Path) -> dict[str, np.ndarray]:
    return {n: x.read_all() for n, x in huggingface.read(directory).tensors.items()}


def torchrun(
    tmp_path: Path, ranks: int, given: list[str], *, before: str = ""
) -> subprocess.CompletedProcess[str]:
    """The command on so many ranks; `before` is Python that each runs first."""
    (tmp_path / "shim.py").write_text(before + SHIM)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
    return subprocess.run(
        [*command, str(tmp_path / "shim.py"), *given, "--json"],
        capture_output=True,
        text=True,
        timeout=200,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parents[1])},
        check=False,
    )
