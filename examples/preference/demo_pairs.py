"""Preference pairs without a download: text of the Python standard library, and the same words shuffled.

python examples/preference/demo_pairs.py -o DIR
"""

from __future__ import annotations

import json
import random
import re
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import click

from builder.errors import UserError
from builder.storage import output_directory
from builder.training import corpus

PROMPT, COMPLETION = 80, 80  # characters
BETWEEN_WORDS = re.compile(r"(?<=[a-z])(?= [a-z])")  # where a byte-level BPE cuts as well


@click.command()
@click.option("--train", type=click.IntRange(1), default=384, show_default=True, help="Pairs to train on.")
@click.option("--held-out", type=click.IntRange(1), default=96, show_default=True, help="Pairs to judge by.")
@click.option("--seed", type=click.IntRange(0), default=0, show_default=True)
@click.option("-o", "--output", type=click.Path(path_type=Path), required=True, help="A new directory.")
def main(train: int, held_out: int, seed: int, output: Path) -> None:
    """Write train.jsonl, held-out.jsonl and held-out.txt; no held-out document was trained on."""
    sets = {
        "train.jsonl": pairs(corpus.training_text(), train, seed),
        "held-out.jsonl": pairs(corpus.held_out_documents(), held_out, seed),
    }
    with output_directory(output) as partial:
        for name, found in sets.items():
            (partial / name).write_text("".join(json.dumps(x) + "\n" for x in found), encoding="utf-8")
        (partial / "held-out.txt").write_text(corpus.held_out_text(), encoding="utf-8")
    click.echo(f"{output}: {train} pairs to train on, {held_out} held out")


def pairs(documents: Sequence[str], count: int, seed: int) -> list[dict[str, str]]:
    """`count` pairs: how a document goes on is chosen, the same words in another order are rejected.

    Raises UserError where the documents have fewer.
    """
    chance = random.Random(seed)
    found = [pair for document in documents for pair in _pairs_of(document, chance)]
    if len(found) < count:
        raise UserError(f"pairs: {len(found)} can be had, {count} were asked for; ask for fewer")
    return chance.sample(found, count)


def _pairs_of(document: str, chance: random.Random) -> Iterator[dict[str, str]]:
    end = 0
    for place in (x.start() for x in BETWEEN_WORDS.finditer(document)):
        if place - PROMPT < end or place + COMPLETION > len(document):
            continue
        prompt = document[place - PROMPT : place]
        chosen = document[place : place + COMPLETION].rpartition(" ")[0]  # whole words
        rejected = shuffled(chosen, chance)
        if rejected != chosen:
            yield {"prompt": prompt, "chosen": chosen, "rejected": rejected}
        end = place + COMPLETION


def shuffled(text: str, chance: random.Random) -> str:
    """The words of `text` in another order, the white space where it was."""
    pieces = re.split(r"(\s+)", text)
    places = [i for i, piece in enumerate(pieces) if piece and not piece.isspace()]
    words = [pieces[i] for i in places]
    chance.shuffle(words)
    for place, word in zip(places, words, strict=True):
        pieces[place] = word
    return "".join(pieces)


if __name__ == "__main__":
    try:
        main()
    except UserError as error:
        click.echo("error: " + " ".join(str(error).split()), err=True)
        sys.exit(1)
