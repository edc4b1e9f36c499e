"""Real text that every machine has: the Python standard library's sources and its documentation topics."""

from __future__ import annotations

import functools
import hashlib
import sysconfig
from pathlib import Path

from builder.errors import UserError

EXCLUDED = {
    "test",
    "tests",
    "idlelib",
    "idle_test",
    "lib2to3",
    "site-packages",
    "dist-packages",
    "__pycache__",
}
HELD_OUT_OF = 16  # one document of so many is kept for evaluation


@functools.cache
def documents() -> dict[str, str]:
    """Name -> text, in order of names. Raises UserError where the library has no sources."""
    root = Path(sysconfig.get_path("stdlib"))
    files = [p for p in sorted(root.rglob("*.py")) if not EXCLUDED & set(p.relative_to(root).parts)]
    texts = {p.relative_to(root).as_posix(): p.read_text(encoding="utf-8", errors="replace") for p in files}
    if sum(map(len, texts.values())) < 1_000_000:
        raise UserError(f"{root}: the standard library's sources are not there; use a Python that ships them")
    from pydoc_data.topics import topics

    return {**texts, **{f"topics/{name}": text for name, text in sorted(topics.items())}}


def _held_out(text: str) -> bool:
    return hashlib.sha256(text.encode()).digest()[0] % HELD_OUT_OF == 0


def training_text() -> list[str]:
    """The documents to train on."""
    return [text for text in documents().values() if text and not _held_out(text)]


def held_out_documents() -> list[str]:
    """The documents kept for evaluation: none of their text was trained on."""
    trained = set(training_text())
    return [text for text in documents().values() if text and _held_out(text) and text not in trained]


def held_out_text() -> str:
    """A piece of each held-out document, so that one file does not decide."""
    return "\n".join(text[:4000] for text in held_out_documents())


def prompts(count: int) -> list[str]:
    """Beginnings of `count` function definitions of held-out documents."""
    found = []
    for text in held_out_documents():
        start = text.find("\n    def ")
        if start > 400:
            found.append(text[start - 160 : start].partition("\n")[2] + "\n\n    def ")
    if len(found) < count:
        raise UserError(f"prompts: {len(found)} can be had, {count} were asked for")
    return found[:count]


def digest() -> str:
    """Names the corpus: SHA-256 over its documents."""
    total = hashlib.sha256()
    for name, text in documents().items():
        total.update(f"{name}\0{text}\0".encode())
    return total.hexdigest()
