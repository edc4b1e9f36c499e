"""Shell scripts of argument lists, YAML files of plain values."""

from __future__ import annotations

import shlex
from collections.abc import Iterable, Mapping, Sequence
from types import MappingProxyType
from typing import Any

import yaml

_NONE: Mapping[str, str] = MappingProxyType({})


def continued(command: Sequence[str], indent: str = "    ", variables: Mapping[str, str] = _NONE) -> str:
    """One command over lines of up to 100 characters; an option stays with its value, mpirun's `:` leads.

    A word that `variables` has is written as the shell variable that it names.
    """
    lines, pieces = [""], _pieces([variables.get(word, shlex.quote(word)) for word in command])
    for piece in pieces:
        if lines[-1] and (len(indent + lines[-1] + piece) > 100 or piece.startswith(": ")):
            lines.append(piece)
        else:
            lines[-1] = f"{lines[-1]} {piece}".lstrip()
    return f" \\\n{indent}".join(lines)


def _pieces(command: Sequence[str]) -> list[str]:
    """Quoted words, joined where no line may end between them."""
    pieces: list[str] = []
    alone = False  # whether the last word is an option without value, or a colon
    for word in command:
        option = word.startswith("-")
        if alone and (not option or pieces[-1] == ":"):
            pieces[-1] += f" {word}"
        else:
            pieces.append(word)
        alone = word == ":" or (option and "=" not in word)
    return pieces


def one_line(command: Sequence[str], environment: Mapping[str, str]) -> str:
    """A command to paste, with its environment before it."""
    return " ".join([*(f"{k}={shlex.quote(v)}" for k, v in environment.items()), shlex.join(command)])


def shell_script(
    comment: str,
    command: Sequence[str],
    environment: Mapping[str, str],
    defaults: Mapping[str, str] = _NONE,
) -> str:
    """A script that becomes the command; `comment` says what it is.

    `defaults` names words of the command that the caller's environment may replace.
    """
    exports = [f"export {name}={shlex.quote(value)}\n" for name, value in environment.items()]
    named = [f"{name}=${{{name}:-{shlex.quote(word)}}}\n" for name, word in defaults.items()]
    line = continued(command, variables={word: f'"${name}"' for name, word in defaults.items()})
    return "".join(
        ["#!/usr/bin/env bash\n", _comment(comment), "set -eu\n", *exports, *named, f"exec {line}\n"]
    )


class _Dumper(yaml.SafeDumper):
    """Texts of several lines as literal blocks, no anchors."""

    def ignore_aliases(self, data: Any) -> bool:
        return True


def _text(dumper: yaml.SafeDumper, value: str) -> yaml.ScalarNode:
    return dumper.represent_scalar("tag:yaml.org,2002:str", value, style="|" if "\n" in value else None)


_Dumper.add_representer(str, _text)


def yaml_file(comment: str, *documents: Mapping[str, Any]) -> str:
    """A YAML file of one or more documents; `comment` says what it is."""
    text = yaml.dump_all(documents, Dumper=_Dumper, sort_keys=False, width=1000, allow_unicode=True)
    return _comment(comment) + text


def _comment(text: str) -> str:
    lines: Iterable[str] = text.splitlines()
    return "".join(f"# {line}\n" for line in lines)
