"""The engine's commands."""

from engines.cli.build_engine import build_engine
from engines.cli.generate import generate
from engines.cli.profile import profile

COMMANDS = (build_engine, generate, profile)
