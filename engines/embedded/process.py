"""How other Python processes of this package are started."""

from __future__ import annotations

import ctypes
import signal
from pathlib import Path

import engines

_PR_SET_PDEATHSIG = 1  # prctl(2)


def package_root() -> Path:
    """The directory that holds our packages; children start there, so no other module comes first."""
    file = engines.__file__
    assert file is not None, "engines is a package with an __init__.py"
    return Path(file).resolve().parent.parent


def end_with_parent() -> None:
    """In a child before its program: the kernel kills it when the thread that started it is gone."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
