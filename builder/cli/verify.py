"""verify: read what was written once more."""

from __future__ import annotations

from pathlib import Path

import click

from builder.errors import UserError
from builder.options import (
    DIRECTORY,
    JSON,
    THREADS,
    emit,
    progress_bar,
)


@click.command()
@click.argument("directory", type=DIRECTORY)
@THREADS
@JSON
def verify(directory: Path, threads: int | None, as_json: bool) -> None:
    """Re-read every file of DIRECTORY, written by fuse or convert, or any supported model directory.

    Checks that headers, shapes and dtypes are those of config.json, that all numbers are finite, and,
    where ffn-fusion.json holds digests, that nothing has changed since it was written.

    \b
    Example:
        ffn-fusion verify checkpoint
    """
    from dataclasses import asdict

    from builder import verification

    with progress_bar("verifying", verification.weight_bytes(directory)) as progress:
        report = verification.verify(directory, threads=threads, progress=progress)
    against = "digests match" if report.digests else "no digests to compare with (ffn-fusion.json is missing)"
    text = f"{directory}: {report.files} files, {report.tensors} tensors, {report.bytes:,} bytes; "
    emit(asdict(report), as_json, "\n".join(report.problems) or text + against)
    if report.problems:
        count = len(report.problems)
        raise UserError(f"{directory}: {count} problem{'s' * (count > 1)}; write or copy it again")
