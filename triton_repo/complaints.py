"""What Triton says is wrong: in an answer, and at the end of its log."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

_NOISE = ("CUDA", "Cuda")  # errors that every start without a GPU logs


def reason(body: bytes) -> str:
    """Of an answer with an error: its last line; of a Python traceback, what was raised."""
    text = body.decode("utf-8", "replace")
    try:
        value: Any = json.loads(text)
        text = str(value.get("error", text)) if isinstance(value, dict) else text
    except ValueError:
        pass
    lines = [line.strip() for line in text.splitlines() if line.strip()] or ["no answer"]
    raised = [line for line in lines if "Error: " in line]
    return raised[-1] if raised else lines[-1] if len(lines) == 1 else " ".join(lines)[:300]


def last_words(log: Path) -> str:
    """The last error in tritonserver's log, without time and place; else its last line."""
    lines = log.read_text(encoding="utf-8", errors="replace").splitlines()
    errors = [line for line in lines if line.startswith("E") and not any(word in line for word in _NOISE)]
    last = (errors or lines or ["no output"])[-1]
    return last.split("] ", 1)[-1]
