"""How other Python processes of this package are started."""

from __future__ import annotations

from pathlib import Path

import engines


def package_root() -> Path:
    """The directory that holds our packages; children start there, so no other module comes first."""
    file = engines.__file__
    assert file is not None, "engines is a package with an __init__.py"
    return Path(file).resolve().parent.parent
