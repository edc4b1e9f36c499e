"""Direct preference optimization (arXiv 2305.18290) of a model that `fuse` or `distill` wrote: see README.md.

python examples/preference/dpo.py MODEL --pairs train.jsonl --held-out held-out.jsonl -o aligned
"""

from __future__ import annotations

import importlib.util
import json
import math
import os
import sys
import warnings
from importlib.metadata import version
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

import click
from pairs import read_pairs
from saving import write

from builder.errors import UserError

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

# TRL 1.16 still says gradient_checkpointing where transformers 5.24 says activation_checkpointing.
warnings.filterwarnings("ignore", ".*gradient_checkpointing.* is deprecated", FutureWarning)

if TYPE_CHECKING:
    from trl import DPOConfig, DPOTrainer

# What the report shows of TRL's metrics on the held-out pairs.
SHOWN = ("rewards/margins", "rewards/accuracies", "logps/chosen", "logps/rejected", "loss")
LENGTH = 1024  # or the model's own limit, where that is lower
FILE = click.Path(path_type=Path)
POSITIVE = click.FloatRange(min=0, min_open=True)


@click.command()
@click.argument("model", type=FILE)
@click.option("--pairs", "pairs_file", type=FILE, required=True, help=".jsonl of prompt, chosen, rejected.")
@click.option("--held-out", "held_out_file", type=FILE, help="The same, to judge by, not to train on.")
@click.option("-o", "--output", type=FILE, required=True, help="The aligned Hugging Face directory.")
@click.option("--beta", type=POSITIVE, default=0.1, show_default=True, help="Larger stays nearer to MODEL.")
@click.option("--learning-rate", type=POSITIVE, default=1e-6, show_default=True, help="Its peak.")
@click.option("--epochs", type=POSITIVE, default=1.0, show_default=True)
@click.option("--batch", type=click.IntRange(1), default=8, show_default=True, help="Pairs at once.")
@click.option("--accumulate", type=click.IntRange(1), default=1, show_default=True, help="Batches of a step.")
@click.option(
    "--max-length", type=click.IntRange(2), help=f"Tokens of a pair's longer half. Default: {LENGTH}."
)
@click.option("--bf16", is_flag=True, help="Compute in bfloat16 (autocast); weights stay float32.")
@click.option("--seed", type=click.IntRange(0), default=0, show_default=True, help="Of the order of pairs.")
@click.option("--json", "as_json", is_flag=True, help="Print the result as JSON.")
def main(
    model: Path, pairs_file: Path, held_out_file: Path | None, output: Path, as_json: bool, **options: Any
) -> None:
    """Train MODEL to prefer the chosen answers of pairs to the rejected ones."""
    from builder import huggingface

    check(model, output)
    limit = huggingface.read(model).architecture.max_position_embeddings
    options["max_length"] = options["max_length"] or min(LENGTH, limit)
    if options["max_length"] > limit:
        raise UserError(f"--max-length {options['max_length']}: the model has {limit} positions; lower it")
    pairs = read_pairs(pairs_file)
    held_out = read_pairs(held_out_file) if held_out_file else None
    with TemporaryDirectory(dir=output.absolute().parent, prefix=f".{output.name}.training-") as scratch:
        trainer = prepare(model, pairs, held_out, Path(scratch), options)
        before = judge(trainer) if held_out else None
        train(trainer)
        after = judge(trainer) if held_out else None
        trainer.save_model(scratch)
        if not trainer.is_world_process_zero():
            return
        facts = {"method": "dpo", "trl": version("trl"), "pairs": len(trainer.train_dataset), **options}
        write(model, Path(scratch), output, facts)
    result = {"output": str(output), **facts, "given": len(pairs), "before": before, "after": after}
    click.echo(json.dumps(result, indent=2) if as_json else text(result))


def check(model: Path, output: Path) -> None:
    """Raise UserError where a package or the tokenizer is missing, or the output cannot be made."""
    from builder import tokenizer

    if importlib.util.find_spec("trl") is None:
        raise UserError("trl is missing; pip install 'trl>=1.16'")
    tokenizer.load(model)
    if os.path.lexists(output):
        raise UserError(f"{output}: exists; remove it or choose another output directory")
    if not output.absolute().parent.is_dir():
        raise UserError(f"{output.absolute().parent}: no such directory; create it first")


def prepare(
    model: Path,
    pairs: list[dict[str, str]],
    held_out: list[dict[str, str]] | None,
    scratch: Path,
    options: dict[str, Any],
) -> DPOTrainer:
    """TRL's trainer of MODEL; it loads MODEL a second time, as the reference.

    Raises UserError where the prompts leave no room for an answer within `max_length`.
    """
    from datasets import Dataset
    from transformers.trainer_callback import PrinterCallback
    from trl import DPOTrainer

    quiet = not sys.stderr.isatty()
    _hide_progress(quiet)
    trainer = DPOTrainer(
        load(model),
        args=config(scratch, options, quiet),
        train_dataset=Dataset.from_list(pairs),
        eval_dataset=Dataset.from_list(held_out) if held_out else None,
        processing_class=load_tokenizer(model),
    )
    trainer.remove_callback(PrinterCallback)
    for name, found in (("--pairs", trainer.train_dataset), ("--held-out", trainer.eval_dataset)):
        if found is not None and not len(found):
            raise UserError(
                f"{name}: all prompts have {options['max_length']} tokens or more; raise --max-length"
            )
    return trainer


def config(scratch: Path, options: dict[str, Any], quiet: bool) -> DPOConfig:
    """TRL's settings; activations are computed a second time in the backward pass, as TRL does by default."""
    import torch
    from trl import DPOConfig

    return DPOConfig(
        output_dir=str(scratch),
        beta=options["beta"],
        learning_rate=options["learning_rate"],
        num_train_epochs=options["epochs"],
        per_device_train_batch_size=options["batch"],
        per_device_eval_batch_size=options["batch"],
        gradient_accumulation_steps=options["accumulate"],
        max_length=options["max_length"],
        bf16=options["bf16"],
        seed=options["seed"],
        lr_scheduler_type="cosine",
        warmup_steps=0.1,  # of all steps
        use_cpu=not torch.cuda.is_available(),
        dataloader_pin_memory=torch.cuda.is_available(),
        logging_nan_inf_filter=False,
        save_strategy="no",
        report_to="none",
        disable_tqdm=quiet,
    )


def _hide_progress(quiet: bool) -> None:
    import datasets
    import transformers

    if quiet:
        os.environ["TQDM_DISABLE"] = "1"
        datasets.disable_progress_bars()
        transformers.utils.logging.disable_progress_bar()


def load(model: Path) -> Any:
    """MODEL in float32, a nemotron-nas one by this toolkit's classes: no code of its directory is run."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    from builder.nemotron_nas.configuration_decilm import DeciLMConfig
    from builder.nemotron_nas.modeling_decilm import DeciLMForCausalLM

    AutoConfig.register(DeciLMConfig.model_type, DeciLMConfig, exist_ok=True)
    AutoModelForCausalLM.register(DeciLMConfig, DeciLMForCausalLM, exist_ok=True)
    return AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32, trust_remote_code=False)


def load_tokenizer(model: Path) -> Any:
    """The tokenizer of MODEL. Raises UserError where it does not say which token ends a text."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model, trust_remote_code=False)
    if tokenizer.eos_token is None:
        raise UserError(
            f"{model / 'tokenizer_config.json'}: has no eos_token, which ends each answer; add it"
        )
    return tokenizer


def train(trainer: DPOTrainer) -> None:
    """Raise UserError where the loss is not finite: nothing is written then."""
    loss = trainer.train().training_loss
    if not math.isfinite(loss):
        raise UserError(f"the loss became {loss}; lower --learning-rate")


def judge(trainer: DPOTrainer) -> dict[str, float]:
    """TRL's metrics on the held-out pairs. A reward is beta * log(policy / reference), summed over tokens."""
    metrics = trainer.evaluate()
    return {name: metrics[f"eval_{name}"] for name in SHOWN}


def text(result: dict[str, Any]) -> str:
    """A line for each metric of the held-out pairs."""
    shorter = result["given"] - result["pairs"]
    left_out = f"; {shorter} left out, their prompts reach --max-length" if shorter else ""
    lines = [f"{result['output']}: trained on {result['pairs']} pairs{left_out}"]
    if result["before"]:
        lines.append(f"{'held-out pairs':20}{'before':>10}{'after':>10}")
        lines += [f"{x:20}{result['before'][x]:10.3f}{result['after'][x]:10.3f}" for x in SHOWN]
    return "\n".join(lines)


if __name__ == "__main__":
    try:
        main()
    except UserError as error:
        click.echo("error: " + " ".join(str(error).split()), err=True)
        sys.exit(1)
