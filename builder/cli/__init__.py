"""The builder's commands."""

from builder.cli.analyze import analyze
from builder.cli.convert import convert
from builder.cli.distill import distill
from builder.cli.estimate import estimate
from builder.cli.evaluate import evaluate
from builder.cli.fuse import fuse
from builder.cli.inspect import inspect
from builder.cli.plan import plan
from builder.cli.verify import verify

COMMANDS = (inspect, analyze, plan, estimate, fuse, evaluate, distill, convert, verify)
