"""Triton's container images and the TensorRT-LLM that each holds."""

from __future__ import annotations

from dataclasses import dataclass

from builder.errors import UserError
from triton_repo.deployment import Deployment

# The newest image with each release: docs/introduction/compatibility.md of triton-inference-server/server.
TAGS = {
    "1.2.1": "26.07",
    "1.2.0": "26.03",
    "1.1.0": "26.02",
    "1.0.3.2510": "25.11",
    "1.0.0": "25.10",
    "0.21.0": "25.08",
    "0.20.0": "25.07",
}
NEWEST = next(iter(TAGS))


@dataclass(frozen=True, kw_only=True)
class Image:
    """`by_default` where no release was asked for and the newest was taken."""

    name: str
    tensorrt_llm: str
    by_default: bool = False


def image(version: str | None) -> Image:
    """The newest image with a TensorRT-LLM release, None for the newest of all.

    Raises UserError where no image has it: an engine loads in the release that built it alone.
    """
    release = NEWEST if version is None else version.split("+")[0]
    if release not in TAGS:
        raise UserError(
            f"tensorrt_llm: no tritonserver image has {version}, they have {', '.join(TAGS)}; "
            f"build in one of them, e.g. {_name(TAGS[NEWEST])}"
        )
    return Image(name=_name(TAGS[release]), tensorrt_llm=release, by_default=version is None)


def image_of(deployment: Deployment) -> Image:
    """The image to serve a deployment in.

    A Hugging Face directory is no release's own: where none has the one it was checked for, the newest does.
    """
    if deployment.flavour == "llmapi" and (deployment.tensorrt_llm or "").split("+")[0] not in TAGS:
        return image(None)
    return image(deployment.tensorrt_llm)


def _name(tag: str) -> str:
    return f"nvcr.io/nvidia/tritonserver:{tag}-trtllm-python-py3"
