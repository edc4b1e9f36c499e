"""The whole way on a small real model; every step prints the command that does the same."""

from __future__ import annotations

import shutil
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from rich.console import Console
from rich.table import Table

from builder import export, huggingface, trtllm
from builder.checkpoint import Checkpoint
from builder.errors import UserError
from builder.plan import Plan

MARKER = ".ffn-fusion-demo"
DROPPED = tuple(range(6, 14))  # a contiguous run of 8; its last FFN stays alone
TP_SIZE = 2
MAX_INPUT_LEN, MAX_SEQ_LEN, MAX_BATCH_SIZE = 128, 256, 4
MAX_TOKENS, CONCURRENCY, ROUNDS = 48, (1, 2, 4), 7
WINDOWS, WINDOW_LENGTH = 96, 128


class Steps:
    """Prints what runs, as the command a user would type, and how long it took."""

    def __init__(self, console: Console) -> None:
        self.console = console

    @contextmanager
    def step(self, title: str, command: str = "") -> Iterator[None]:
        self.console.print(f"\n[bold]{title}[/bold]")
        if command:
            self.console.print(f"$ {command}", style="dim", highlight=False, soft_wrap=True)
        start = time.monotonic()
        yield
        self.console.print(f"{time.monotonic() - start:.1f} s", style="dim")


def run(output: Path) -> None:
    """Train or reuse the parent, fuse it, build both engines at TP 2, serve both, compare.

    Raises UserError where `output` exists and is no earlier demo's.
    """
    console = Console()
    steps = Steps(console)
    _clear(output)
    with steps.step("Train the parent (once; kept in the cache)"):
        from builder.training.parent import train_parent

        model = train_parent()
        console.print(str(model), highlight=False, soft_wrap=True)
    layers = f"{DROPPED[0]}-{DROPPED[-1]}"
    parent = huggingface.read(model)
    dropped = Plan(drop_attention=DROPPED, fuse=()).apply(parent)
    fused = Plan(drop_attention=DROPPED).apply(parent)
    with steps.step(
        "Drop attention and fuse", f"ffn-fusion fuse MODEL --drop-attention {layers} -o {output}/fused"
    ):
        export.write(fused, model, output / "fused")
    with steps.step("Perplexity on held-out text"):
        quality = _quality(console, model, {"parent": parent, "dropped": dropped, "fused": fused})
    engines = {}
    for name, source in (("baseline", model), ("candidate", output / "fused")):
        engines[name] = _engine(steps, output, name, source)
    with steps.step(
        "Serve both on Triton and compare",
        f"ffn-fusion compare-latency {engines['baseline']} {engines['candidate']} "
        f"--tokenizer MODEL -o {output}/report",
    ):
        _compare(console, engines, model, output, quality)
    console.print(f"\nReport: {output / 'report' / 'report.html'}", highlight=False)


def _clear(output: Path) -> None:
    """Make `output` an empty demo directory; an earlier demo's is replaced, nothing else is touched."""
    if output.exists():
        if not (output / MARKER).is_file():
            raise UserError(f"{output}: exists and is no demo's; remove it or choose another --output")
        shutil.rmtree(output)
    output.mkdir(parents=True)
    (output / MARKER).touch()


def _quality(
    console: Console, model: Path, stages: dict[str, Checkpoint]
) -> dict[str, dict[str, float | None]]:
    from tokenizers import Tokenizer

    from builder.evaluation import logits_of, quality, token_windows
    from builder.training.corpus import held_out_text

    ids = Tokenizer.from_file(str(model / "tokenizer.json")).encode(held_out_text()).ids
    windows = token_windows(ids, WINDOW_LENGTH, WINDOWS)
    table = Table("model", "layers", "perplexity", "KL to parent")
    parent, results = None, {}
    for name, checkpoint in stages.items():
        log_probs = logits_of(checkpoint, windows)
        q = quality(log_probs, windows, parent)
        parent = log_probs if parent is None else parent
        kl = "" if q.kl is None else f"{q.kl:.4f}"
        table.add_row(name, str(len(checkpoint.architecture.layers)), f"{q.perplexity:.2f}", kl)
        results[name] = {"perplexity": q.perplexity, "kl": q.kl}
    console.print(table)
    return results


def _engine(steps: Steps, output: Path, name: str, source: Path) -> Path:
    from engines.embedded.compilation import build

    checkpoint, engine = output / f"{name}-checkpoint", output / f"{name}-engine"
    shown = "MODEL" if name == "baseline" else source
    with steps.step(f"Convert the {name}", f"ffn-fusion convert {shown} --tp {TP_SIZE} -o {checkpoint}"):
        trtllm.convert(huggingface.read(source), checkpoint, tp_size=TP_SIZE)
    limits = f"--max-batch-size {MAX_BATCH_SIZE} --max-input-len {MAX_INPUT_LEN} --max-seq-len {MAX_SEQ_LEN}"
    with steps.step(f"Build the {name} engine", f"build-engine {checkpoint} {limits} -o {engine}"):
        build(
            checkpoint,
            engine,
            max_batch_size=MAX_BATCH_SIZE,
            max_input_len=MAX_INPUT_LEN,
            max_seq_len=MAX_SEQ_LEN,
        )
    return engine


def _compare(
    console: Console,
    engines: dict[str, Path],
    model: Path,
    output: Path,
    quality: dict[str, dict[str, float | None]],
) -> None:
    from builder.training.corpus import prompts
    from triton_repo import report
    from triton_repo.client import Endpoint, generate
    from triton_repo.compare import compare
    from triton_repo.facts import of_engine
    from triton_repo.repository import write_repository
    from triton_repo.server import Server

    with ExitStack() as stack:
        ends = {}
        for name, engine in engines.items():
            write_repository(engine, model, output / f"{name}-repository")
            ends[name] = Endpoint(stack.enter_context(Server(output / f"{name}-repository")).url)
        texts = prompts(8)
        for name, end in ends.items():
            text = generate(end, texts[0], max_tokens=24)
            console.print(f"{name}: {texts[0]!r} -> {text!r}", highlight=False, markup=False, soft_wrap=True)
        status = stack.enter_context(Console(stderr=True).status("warming up"))
        comparison = compare(
            ends["baseline"],
            ends["candidate"],
            prompts=texts,
            max_tokens=MAX_TOKENS,
            concurrency=CONCURRENCY,
            rounds=ROUNDS,
            baseline_facts=of_engine(engines["baseline"]),
            candidate_facts=of_engine(engines["candidate"]),
            quality=quality,
            progress=status.update,
        )
    report.write_report(comparison, output / "report")
    report.print_table(comparison, console)
