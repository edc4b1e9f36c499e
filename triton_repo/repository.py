"""A Triton model repository for an engine directory, in the flavour that its backend needs.

embedded and TensorRT engines: TensorRT-LLM's models, names and tensors, of which `tensorrt_llm` alone
differs. The PyTorch backend: one model, text to text, through the LLM API.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from builder.errors import UserError
from builder.storage import output_directory, read_json, write_json
from engines import manifest as manifests
from engines.manifest import Manifest
from engines.trtllm import build, release, serving
from triton_repo import models, pbtxt, rules
from triton_repo.deployment import Deployment
from triton_repo.flavours import embedded, engine, llmapi
from triton_repo.launch import images
from triton_repo.options import DeployOptions
from triton_repo.pbtxt import Model

RECORD = "ffn-fusion.json"  # beside the models; Triton looks into directories only


def write_repository(
    engine_dir: Path, tokenizer_dir: Path | None, output: Path, options: DeployOptions | None = None
) -> Deployment | None:
    """Write the model repository `output` for an engine directory; the Deployment of a GPU's.

    `tokenizer_dir` is the Hugging Face directory with tokenizer.json; the PyTorch backend has its own.
    Raises UserError where one of them is none, they do not fit, or `output` exists.
    """
    directory = engine_dir.resolve()
    manifest = manifests.read(directory)
    if manifest.backend == "embedded":
        if options is not None:
            raise UserError(f"{directory}: embedded engines take no options of GPU engines; leave them out")
        _write(output, embedded.models(directory, _tokenizer(tokenizer_dir)))
        return None
    options = options or DeployOptions()
    options.check_world_size(manifest.world_size)
    place = output.absolute()
    if manifest.backend == build.BACKEND:
        deployment = _engine(directory, manifest, tokenizer_dir, place, options)
    elif manifest.backend == serving.BACKEND:
        deployment = _llmapi(directory, manifest, place, options)
    else:
        raise UserError(f"{directory}: backend {manifest.backend!r} is not known; build the engine again")
    return deployment


def _engine(
    directory: Path, manifest: Manifest, tokenizer_dir: Path | None, place: Path, options: DeployOptions
) -> Deployment:
    version = str(manifest.compiler.get("tensorrt_llm"))
    if not release.builds_engines(version):
        raise UserError(f"{directory}: built by TensorRT-LLM {version}, {release.ENGINES} serve engines")
    tokenizer = _tokenizer(tokenizer_dir)
    draft_dir = options.draft.resolve() if options.draft else None
    draft = manifests.read(draft_dir) if draft_dir else None
    if draft is not None and draft.compiler.get("tensorrt_llm") != version:
        raise UserError(
            f"draft: {draft_dir} was built by TensorRT-LLM {draft.compiler.get('tensorrt_llm')}, the engine "
            f"by {version}; build both with one"
        )
    deployment = Deployment(
        repository=place,
        flavour="engine",
        tensorrt_llm=version,
        tp_size=manifest.tp_size,
        pp_size=manifest.pp_size,
        directories=tuple(filter(None, (directory, tokenizer, draft_dir))),
        instances=options.instances,
        gpu_ids=options.gpu_ids,
        draft=draft is not None,
    )
    images.image_of(deployment)  # raises where none has the release
    parts = engine.models(directory, manifest, tokenizer, options, draft)
    _write(place, parts, deployment)
    return deployment


def _llmapi(directory: Path, manifest: Manifest, place: Path, options: DeployOptions) -> Deployment:
    draft = options.draft.resolve() if options.draft else None
    text = llmapi.model_yaml(directory, manifest, options)
    deployment = Deployment(
        repository=place,
        flavour="llmapi",
        tensorrt_llm=manifest.compiler.get("tensorrt_llm"),
        tp_size=manifest.tp_size,
        pp_size=manifest.pp_size,
        directories=tuple(filter(None, (Path(manifest.compiler["model"]), draft))),
        instances=options.instances,
        gpu_ids=options.gpu_ids,
        draft=draft is not None,
    )
    _write(place, [llmapi.tensorrt_llm(options)], deployment, {f"tensorrt_llm/1/{llmapi.MODEL_YAML}": text})
    return deployment


def _tokenizer(directory: Path | None) -> Path:
    if directory is None:
        raise UserError("tokenizer: missing; give --tokenizer, the Hugging Face directory of the model")
    if not (directory / "tokenizer.json").is_file():
        raise UserError(f"{directory}: has no tokenizer.json; give the Hugging Face directory that has it")
    return directory.resolve()


def _write(
    output: Path,
    parts: Iterable[Model],
    deployment: Deployment | None = None,
    files: dict[str, str] | None = None,
) -> None:
    texts = [(model, pbtxt.text(model)) for model in parts]
    with output_directory(output) as directory:
        for model, config in texts:
            place = directory / model.name / "1"
            place.mkdir(parents=True)
            (directory / model.name / "config.pbtxt").write_text(config, encoding="utf-8")
            for number, source in enumerate(model.code):
                shutil.copyfile(Path(models.__path__[0]) / source, place / (source if number else "model.py"))
        for name, text in (files or {}).items():
            (directory / name).write_text(text, encoding="utf-8")
        if deployment is not None:
            write_json(directory / RECORD, _record(deployment))
        rules.check(directory)


def _record(deployment: Deployment) -> dict[str, Any]:
    paths = {"repository": None, "directories": [str(path) for path in deployment.directories]}
    return {"version": 1, **asdict(deployment), **paths}


def read_deployment(repository: Path) -> Deployment | None:
    """The Deployment of a repository written before; None for an embedded engine's.

    Raises UserError where a file breaks a rule of `triton_repo.rules`.
    """
    rules.check(repository)
    file = repository / RECORD
    if not file.is_file():
        return None
    values = read_json(file)
    if values.pop("version", None) != 1:
        raise UserError(f"{file}: of another version; write the repository again with deploy")
    try:
        return Deployment(
            **{
                **values,
                "repository": repository.resolve(),
                "directories": tuple(map(Path, values["directories"])),
                "gpu_ids": tuple(map(tuple, values["gpu_ids"])),
            }
        )
    except (KeyError, TypeError) as error:
        raise UserError(f"{file}: {error}; write the repository again with deploy") from None
