"""The `ffn-fusion` command: collects the stages' commands and turns their errors into one line."""

from __future__ import annotations

import signal
import sys
from typing import Any, NoReturn

import click

import builder.cli
import engines.cli
import triton_repo.cli
from builder.errors import UserError, describe


def fail(message: str) -> NoReturn:
    """One line on stderr, exit code 1."""
    click.echo("error: " + " ".join(message.split()), err=True)
    sys.exit(1)


class OneLineErrors(click.Group):
    """A group whose commands fail in one line; --debug shows the traceback."""

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except (UserError, OSError) as error:
            if ctx.params.get("debug"):
                raise
            fail(describe(error))


def _terminate(number: int, frame: object) -> NoReturn:
    sys.exit(128 + number)


@click.group(
    cls=OneLineErrors, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100}
)
@click.version_option(package_name="ffn-fusion")
@click.option("--debug", is_flag=True, help="Show the traceback of an error.")
def main(debug: bool) -> None:
    """Make a large language model faster: drop attention, fuse FFN runs, build engines, serve, compare.

    \b
    HF directory --fuse/convert--> checkpoint --build-engine--> engine --deploy--> Triton --compare-latency
    """
    # A command that is told to end, or loses its terminal, cleans up as an interrupted one does.
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, _terminate)


for command in (*builder.cli.COMMANDS, *engines.cli.COMMANDS, *triton_repo.cli.COMMANDS):
    main.add_command(command)


def build_engine() -> None:
    """The `build-engine` console script: the same command without the group."""
    main(["build-engine", *sys.argv[1:]], prog_name="ffn-fusion")


if __name__ == "__main__":
    main(prog_name="ffn-fusion")
