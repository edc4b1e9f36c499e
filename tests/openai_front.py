"""A front end with OpenAI's API, as a process of its own, and how the tests ask it."""

from __future__ import annotations

import http.client
import json
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import openai
from test_server import PROMPT

from triton_repo.openai import launch
from triton_repo.server import Server

NAME = "tiny"
SLOW = 99  # the stand-in's seed that takes 20 ms a token
TEMPLATE = (
    "{%- for message in messages %}<{{ message.role }}>{{ message.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
ROOT = Path(launch.__file__).parents[2]


def write_tokenizer_dir(tiny_hf: Path, directory: Path) -> Path:
    """The tiny model's tokenizer with a chat template."""
    shutil.copytree(tiny_hf, directory, ignore=shutil.ignore_patterns("*.safetensors"))
    (directory / "chat_template.jinja").write_text(TEMPLATE)
    return directory


@dataclass(frozen=True, kw_only=True)
class Front:
    """A front end's process, its address, and the server behind it."""

    process: subprocess.Popen[str]
    url: str
    server: Server

    def client(self) -> openai.OpenAI:
        return openai.OpenAI(base_url=self.url, api_key="none", max_retries=0, timeout=60)

    def request(self, method: str, path: str, body: bytes = b"", **headers: str) -> tuple[int, Any, Any]:
        """Status, headers and JSON of one request."""
        parts = urlsplit(self.url)
        connection = http.client.HTTPConnection(parts.hostname or "", parts.port, timeout=30)
        try:
            connection.request(method, path, body, headers)
            response = connection.getresponse()
            return response.status, response.headers, json.loads(response.read())
        finally:
            connection.close()


@contextmanager
def front_end(server: Server, tokenizer: Path, *more: str) -> Iterator[Front]:
    command = [*launch.command(server.grpc_address, tokenizer, port=0, model_name=NAME), *more]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=ROOT) as process:
        try:
            assert process.stdout is not None
            url = process.stdout.readline().split()[-1]
            yield Front(process=process, url=url, server=server)
        finally:
            process.kill()


def complete(client: openai.OpenAI, **fields: Any) -> Any:
    return client.completions.create(**{"model": NAME, "prompt": PROMPT, "temperature": 0, **fields})


def joined(chunks: Any) -> str:
    return "".join(chunk.choices[0].text for chunk in chunks if chunk.choices)
