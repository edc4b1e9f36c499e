"""The builder's commands."""

from builder.cli.convert import convert
from builder.cli.fuse import fuse
from builder.cli.inspect import inspect
from builder.cli.verify import verify

COMMANDS = (inspect, fuse, convert, verify)
