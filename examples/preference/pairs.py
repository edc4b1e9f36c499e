"""Preference pairs of a .jsonl file: a prompt, the answer that is preferred, and one that is not."""

from __future__ import annotations

import json
from pathlib import Path

from builder.errors import UserError

FIELDS = ("prompt", "chosen", "rejected")


def read_pairs(file: Path) -> list[dict[str, str]]:
    """The lines of a .jsonl file. Raises UserError where it cannot be read, naming the line."""
    try:
        lines = file.read_text(encoding="utf-8").split("\n")
    except OSError as error:
        raise UserError(f"{file}: cannot be read: {error.strerror}; give a .jsonl file") from None
    except UnicodeDecodeError as error:
        raise UserError(f"{file}: not UTF-8 text: {error.reason} at byte {error.start}") from None
    found = [_pair(f"{file}: line {n}", line) for n, line in enumerate(lines, start=1) if line.strip()]
    if not found:
        raise UserError(f"{file}: has no pairs; write a line of {', '.join(FIELDS)} for each")
    return found


def _pair(where: str, line: str) -> dict[str, str]:
    try:
        value = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{where} is not JSON: {error}") from None
    for name in FIELDS:
        if not isinstance(value, dict) or not isinstance(value.get(name), str) or not value[name]:
            raise UserError(f'{where} has no "{name}" of type string; a pair has {", ".join(FIELDS)}')
    if value["chosen"] == value["rejected"]:
        raise UserError(f'{where}: "chosen" and "rejected" are the same; remove the line')
    return {name: value[name] for name in FIELDS}
