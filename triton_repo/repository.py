"""A Triton model repository for an engine directory, in the flavour that its backend needs.

embedded and TensorRT engines: TensorRT-LLM's models, names and tensors, of which `tensorrt_llm` alone
differs. The PyTorch backend: one model, text to text, through the LLM API.
"""

from __future__ import annotations

import shutil
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from builder.errors import UserError
from builder.storage import output_directory, read_json, write_json
from engines import manifest as manifests
from engines.manifest import Manifest
from engines.trtllm import build, release, serving
from triton_repo import models, pbtxt, rules
from triton_repo.deployment import TEXT_MODELS, Deployment
from triton_repo.flavours import embedded, engine, llmapi
from triton_repo.launch import images
from triton_repo.options import DeployOptions
from triton_repo.pbtxt import Model

RECORD = "ffn-fusion.json"  # beside the models; Triton looks into directories only


@dataclass(frozen=True, kw_only=True)
class Prepared:
    """A repository with every choice made and nothing written yet; `deployment` is a GPU's."""

    output: Path
    models: tuple[Model, ...]
    deployment: Deployment | None = None
    files: dict[str, str] = field(default_factory=dict)

    def write(self) -> None:
        """Write it, whole or not at all. Raises UserError where it exists or breaks a rule."""
        texts = [(model, pbtxt.text(model)) for model in self.models]
        with output_directory(self.output) as directory:
            for model, config in texts:
                place = directory / model.name / "1"
                place.mkdir(parents=True)
                (directory / model.name / "config.pbtxt").write_text(config, encoding="utf-8")
                for number, source in enumerate(model.code):
                    name = source if number else "model.py"
                    shutil.copyfile(Path(models.__path__[0]) / source, place / name)
            for name, text in self.files.items():
                (directory / name).write_text(text, encoding="utf-8")
            if self.deployment is not None:
                write_json(directory / RECORD, _record(self.deployment))
            rules.check(directory)


def prepare(
    engine_dir: Path, tokenizer_dir: Path | None, output: Path, options: DeployOptions | None = None
) -> Prepared:
    """Choose the models and files of a repository for an engine directory.

    `tokenizer_dir` is the Hugging Face directory with tokenizer.json; the PyTorch backend has its own.
    Raises UserError where one of them is none, or they do not fit.
    """
    directory = engine_dir.resolve()
    manifest = manifests.read(directory)
    if manifest.backend == "embedded":
        return Prepared(output=output, models=_embedded(directory, manifest, tokenizer_dir, options))
    options = options or DeployOptions()
    options.check_world_size(manifest.world_size)
    if manifest.backend == build.BACKEND:
        return _engine(directory, manifest, _tokenizer(tokenizer_dir), output.absolute(), options)
    if manifest.backend != serving.BACKEND:
        raise UserError(
            f"{directory}: backend {manifest.backend!r} is not served; "
            "build with --backend embedded or tensorrt-llm"
        )
    if tokenizer_dir is not None:
        raise UserError("tokenizer: the PyTorch backend reads its model's own; leave --tokenizer out")
    return _llmapi(directory, manifest, output.absolute(), options)


def _embedded(
    directory: Path, manifest: Manifest, tokenizer_dir: Path | None, options: DeployOptions | None
) -> tuple[Model, ...]:
    options = options or DeployOptions()
    if replace(options, max_queue_size=0) != DeployOptions():
        raise UserError(f"{directory}: embedded engines take no options of GPU engines; leave them out")
    size = options.max_queue_size or embedded.MAX_QUEUE_SIZE
    return embedded.models(directory, _tokenizer(tokenizer_dir), manifest, max_queue_size=size)


def write_repository(
    engine_dir: Path, tokenizer_dir: Path | None, output: Path, options: DeployOptions | None = None
) -> Deployment | None:
    """`prepare` it and write it; the Deployment of a GPU's."""
    prepared = prepare(engine_dir, tokenizer_dir, output, options)
    prepared.write()
    return prepared.deployment


def _engine(
    directory: Path, manifest: Manifest, tokenizer: Path, place: Path, options: DeployOptions
) -> Prepared:
    version = str(manifest.compiler.get("tensorrt_llm"))
    if not release.builds_engines(version):
        raise UserError(f"{directory}: built by TensorRT-LLM {version}, {release.ENGINES} serve engines")
    draft_dir = options.draft.resolve() if options.draft else None
    draft = _draft(draft_dir, version) if draft_dir else None
    deployment = Deployment(
        repository=place,
        flavour="engine",
        tensorrt_llm=version,
        tp_size=manifest.tp_size,
        pp_size=manifest.pp_size,
        directories=_with_linked(directory, tokenizer, draft_dir),
        instances=options.instances,
        gpu_ids=options.gpu_ids,
        draft=draft is not None,
    )
    images.image_of(deployment)  # raises where none has the release
    parts = engine.models(directory, manifest, tokenizer, options, draft)
    return Prepared(output=place, models=parts, deployment=deployment)


def _draft(directory: Path, version: str) -> Manifest:
    """A draft engine's manifest. Raises UserError where it is none, or of another release."""
    if not (directory / manifests.BESIDE).is_file():
        raise UserError(f"draft: {directory} is no engine of TensorRT-LLM; build one of the draft model")
    draft = manifests.read(directory)
    built = draft.compiler.get("tensorrt_llm")
    if built != version:
        raise UserError(
            f"draft: {directory} was built by TensorRT-LLM {built}, the engine by {version}; "
            "build both with one"
        )
    return draft


def _llmapi(directory: Path, manifest: Manifest, place: Path, options: DeployOptions) -> Prepared:
    draft = options.draft.resolve() if options.draft else None
    text = llmapi.model_yaml(directory, manifest, options)
    deployment = Deployment(
        repository=place,
        flavour="llmapi",
        tensorrt_llm=manifest.compiler.get("tensorrt_llm"),
        tp_size=manifest.tp_size,
        pp_size=manifest.pp_size,
        directories=_with_linked(Path(manifest.compiler["model"]), draft),
        instances=options.instances,
        gpu_ids=options.gpu_ids,
        draft=draft is not None,
    )
    if draft is not None and images.image_of(deployment).by_default:
        raise UserError(
            f"draft: no tritonserver image has TensorRT-LLM {deployment.tensorrt_llm}, and its option "
            "has other names in other releases; run build-engine in an image that docs/gpu.md names"
        )
    return Prepared(
        output=place,
        models=(llmapi.tensorrt_llm(manifest, options),),
        deployment=deployment,
        files={f"tensorrt_llm/1/{llmapi.MODEL_YAML}": text},
    )


def _with_linked(*given: Path | None) -> tuple[Path, ...]:
    """The directories, and those that their files are links into, as a Hugging Face cache has them."""
    directories = [directory for directory in given if directory is not None]
    for directory in tuple(directories):
        for file in directory.iterdir():
            target = file.resolve().parent
            if file.is_symlink() and not any(target.is_relative_to(known) for known in directories):
                directories.append(target)
    return tuple(directories)


def _tokenizer(directory: Path | None) -> Path:
    if directory is None:
        raise UserError("tokenizer: missing; give --tokenizer, the Hugging Face directory of the model")
    if not (directory / "tokenizer.json").is_file():
        raise UserError(f"{directory}: has no tokenizer.json; give the Hugging Face directory that has it")
    return directory.resolve()


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
        deployment = Deployment(
            **{
                **values,
                "repository": repository.resolve(),
                "directories": tuple(map(Path, values["directories"])),
                "gpu_ids": tuple(map(tuple, values["gpu_ids"])),
            }
        )
    except (KeyError, TypeError) as error:
        raise UserError(f"{file}: {error}; write the repository again with deploy") from None
    for name in ("tp_size", "pp_size", "instances"):
        if type(getattr(deployment, name)) is not int or getattr(deployment, name) < 1:
            raise UserError(f"{file}: {name} is no positive number; write the repository again with deploy")
    if deployment.flavour not in TEXT_MODELS:
        raise UserError(f"{file}: flavour {deployment.flavour!r} is not known; write it again with deploy")
    return deployment
