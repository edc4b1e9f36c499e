"""The engine's commands."""

from engines.cli.build_engine import build_engine
from engines.cli.generate import generate

COMMANDS = (build_engine, generate)
