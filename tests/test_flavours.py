"""Repositories for GPU engines as files: tensors as TensorRT-LLM has them, options, rules, the command."""

from __future__ import annotations

import json
import re
import shutil
import sys
import types
from dataclasses import replace
from pathlib import Path

import pytest
import yaml
from click.testing import CliRunner, Result
from test_gpu_repositories import fake_engine
from test_repository import engine as tiny_manifest  # noqa: F401  (a fixture)
from test_repository import parse

from builder.errors import UserError
from engines import manifest as manifests
from ffn_fusion import main
from triton_repo import repository, rules
from triton_repo.options import DeployOptions, parse_gpu_ids

THEIRS = json.loads((Path(__file__).parent / "data" / "triton_tensors.json").read_text())
GOLDEN = Path(__file__).parent / "data" / "golden_repository"
MODELS = ("ensemble", "postprocessing", "preprocessing", "tensorrt_llm", "tensorrt_llm_bls")


@pytest.fixture
def target(tmp_path: Path, request: pytest.FixtureRequest) -> Path:
    """TP 2, batch 2, as build-engine leaves it."""
    manifest = request.getfixturevalue("tiny_manifest")
    two = tmp_path / "two"
    two.mkdir()
    replace(manifests.read(manifest), tp_size=2).write(two)
    return fake_engine(tmp_path / "target", two, max_draft_len=4)


@pytest.fixture
def pytorch(tmp_path: Path, target: Path, tiny_hf: Path) -> Path:
    """What build-engine writes for the PyTorch backend, TP 2."""
    directory = tmp_path / "pytorch"
    directory.mkdir()
    facts = {"tensorrt_llm": "1.2.1", "model": str(tiny_hf)}
    replace(manifests.read(target), backend="tensorrt-llm-pytorch", compiler=facts).write(directory)
    llm = {
        "model": str(tiny_hf),
        "backend": "pytorch",
        "tensor_parallel_size": 2,
        "max_batch_size": 2,
        "enable_chunked_prefill": True,
        "kv_cache_config": {"free_gpu_memory_fraction": 0.9, "enable_block_reuse": True},
        "cuda_graph_config": {"enable_padding": True, "max_batch_size": 2},
    }
    (directory / "llm.yaml").write_text(yaml.safe_dump(llm))
    return directory


def config(place: Path, name: str = "tensorrt_llm"):
    return parse((place / name / "config.pbtxt").read_text())


def parameters(place: Path, name: str = "tensorrt_llm") -> dict[str, str]:
    return {key: value.string_value for key, value in config(place, name).parameters.items()}


def write(target: Path, tiny_hf: Path, place: Path, **options: object) -> Path:
    repository.write_repository(target, tiny_hf, place, DeployOptions(**options))
    return place


def test_tensorrt_llm_has_its_backends_tensors(target: Path, tiny_hf: Path, tmp_path: Path) -> None:
    model = config(write(target, tiny_hf, tmp_path / "r"))
    found = {
        t.name: {
            "type": t.DESCRIPTOR.fields_by_name["data_type"].enum_type.values_by_number[t.data_type].name[5:],
            "dims": list(t.dims),
            "optional": t.optional,
            "ragged": t.allow_ragged_batch,
            "scalar": t.HasField("reshape"),
        }
        for t in model.input
    }
    assert found == THEIRS["tensorrt_llm"]["inputs"]
    assert all(list(t.reshape.shape) == [] for t in model.input)
    assert {t.name: list(t.dims) for t in model.output} == {
        name: dims for name, (_, dims) in THEIRS["tensorrt_llm"]["outputs"].items()
    }


def test_text_models_take_what_clients_send(target: Path, tiny_hf: Path, tmp_path: Path) -> None:
    place = write(target, tiny_hf, tmp_path / "r")
    bls = {t.name for t in config(place, "tensorrt_llm_bls").input}
    assert bls == set(THEIRS["client_inputs"])
    assert {t.name for t in config(place, "ensemble").input} == bls - {"num_draft_tokens", "use_draft_logits"}


def test_llmapi_has_its_tensors(pytorch: Path, tmp_path: Path) -> None:
    repository.write_repository(pytorch, None, tmp_path / "r", DeployOptions())
    model = config(tmp_path / "r")
    assert {t.name: list(t.dims) for t in model.input} == {
        name: dims for name, (_, dims) in THEIRS["llmapi"]["inputs"].items()
    }
    assert {t.name: list(t.dims) for t in model.output} == {
        name: dims for name, (_, dims) in THEIRS["llmapi"]["outputs"].items()
    }
    assert [t.name for t in model.input if not t.optional] == ["text_input"]


@pytest.mark.parametrize("name", [*MODELS, "llmapi"])
def test_golden_configs(name: str, target: Path, pytorch: Path, tiny_hf: Path, tmp_path: Path) -> None:
    if name == "llmapi":
        repository.write_repository(pytorch, None, tmp_path / "r", DeployOptions())
    else:
        write(target, tiny_hf, tmp_path / "r")
    file = tmp_path / "r" / ("tensorrt_llm" if name == "llmapi" else name) / "config.pbtxt"
    text = file.read_text().replace(str(target), "/engine").replace(str(tiny_hf), "/tokenizer")
    assert "${" not in text
    assert text == (GOLDEN / f"{name}.pbtxt").read_text()


def test_structure_of_an_engine_repository(target: Path, tiny_hf: Path, tmp_path: Path) -> None:
    place = write(target, tiny_hf, tmp_path / "r", max_queue_size=7, max_queue_delay_us=100)
    assert sorted(p.parent.name for p in place.glob("*/config.pbtxt")) == list(MODELS)
    assert {config(place, name).max_batch_size for name in MODELS} == {2}
    tokens = config(place)
    assert tokens.backend == "tensorrtllm"
    assert tokens.model_transaction_policy.decoupled
    assert not (place / "tensorrt_llm" / "1" / "model.py").exists()
    assert tokens.dynamic_batching.default_queue_policy.max_queue_size == 7
    assert tokens.dynamic_batching.max_queue_delay_microseconds == 100
    values = parameters(place)
    assert values["gpt_model_path"] == str(target)
    for key in ("tokenizer_dir", "guided_decoding_backend", "xgrammar_tokenizer_info_path"):
        assert key in values  # the backend fails where one is missing
    assert values["enable_chunked_context"] == values["enable_kv_cache_reuse"] == "true"
    deployment = repository.read_deployment(place)
    assert deployment is not None
    assert (deployment.world_size, deployment.text_model, deployment.flavour) == (2, "ensemble", "engine")
    assert set(deployment.directories) == {target, tiny_hf}


def test_options_become_parameters(target: Path, tiny_hf: Path, tmp_path: Path) -> None:
    place = write(
        target,
        tiny_hf,
        tmp_path / "r",
        max_batch_size=1,
        kv_cache_fraction=0.6,
        chunked_context=False,
        kv_cache_reuse=False,
        scheduler_policy="max_utilization",
        instances=2,
        gpu_ids=parse_gpu_ids("0,1; 2,3"),
    )
    values = parameters(place)
    assert values["kv_cache_free_gpu_mem_fraction"] == "0.6"
    assert values["enable_chunked_context"] == values["enable_kv_cache_reuse"] == "false"
    assert values["batch_scheduler_policy"] == "max_utilization"
    assert values["gpu_device_ids"] == "0,1;2,3"
    assert config(place).instance_group[0].count == 2
    assert {config(place, name).max_batch_size for name in MODELS} == {1}


def test_draft_of_an_engine(target: Path, tiny_hf: Path, tmp_path: Path) -> None:
    draft = fake_engine(tmp_path / "draft", target)
    place = write(target, tiny_hf, tmp_path / "r", draft=draft)
    assert parameters(place, "tensorrt_llm_draft")["gpt_model_path"] == str(draft)
    assert parameters(place, "tensorrt_llm_bls")["tensorrt_llm_draft_model_name"] == "tensorrt_llm_draft"
    assert parameters(place, "tensorrt_llm_bls")["num_draft_tokens"] == "4"
    assert parameters(place)["kv_cache_free_gpu_mem_fraction"] == "0.45"
    deployment = repository.read_deployment(place)
    assert deployment is not None
    assert (deployment.text_model, deployment.draft) == ("tensorrt_llm_bls", True)


def test_draft_needs_prompts_as_long_as_sequences(target: Path, tiny_hf: Path, tmp_path: Path) -> None:
    """What was said so far is the prompt of the next pass."""
    draft = fake_engine(tmp_path / "draft", target)
    for directory, name in ((draft, "draft"), (target, "engine")):
        short = replace(manifests.read(directory), max_input_len=8)
        short.write(directory)
        with pytest.raises(UserError, match=f"the {name}'s max_input_len is 8.*--max-input-len 15"):
            write(target, tiny_hf, tmp_path / "r", draft=draft)


def test_model_files_have_the_tables_of_the_configs(monkeypatch: pytest.MonkeyPatch) -> None:
    """They are copied where this package may not be installed, so they repeat what they need."""
    stub = types.ModuleType("triton_python_backend_utils")
    monkeypatch.setitem(sys.modules, "triton_python_backend_utils", stub)
    import triton_repo.models
    from triton_repo import tensors
    from triton_repo.flavours import llmapi

    monkeypatch.syspath_prepend(triton_repo.models.__path__[0])  # they lie beside each other in a repository
    from triton_repo.models import llmapi as llmapi_model
    from triton_repo.models import tensorrt_llm_bls as bls

    assert set(llmapi_model.SAMPLING) == set(llmapi.SAMPLING)
    assert {name: inner for name, (inner, _, _) in tensors.PREPROCESSED.items()} == bls.PREPROCESSED
    words = {name: inner for name, (inner, _, _) in tensors.WORDS.items()}
    assert words | {"text_input": "QUERY", "max_tokens": "REQUEST_OUTPUT_LEN"} == bls.PREPROCESSING
    renamed = {name: inner for name, (inner, _) in tensors.SAMPLING.items() if name != inner}
    assert renamed == bls.RENAMED
    assert set(bls.DRAFT) == set(tensors.DRAFT)


def test_options_become_llm_arguments(pytorch: Path, tiny_hf: Path, tmp_path: Path) -> None:
    options = DeployOptions(
        max_batch_size=1,
        kv_cache_fraction=0.5,
        kv_cache_reuse=False,
        chunked_context=False,
        scheduler_policy="max_utilization",
        gpu_ids=((4, 5),),
        draft=tiny_hf,
    )
    repository.write_repository(pytorch, None, tmp_path / "r", options)
    values = yaml.safe_load((tmp_path / "r" / "tensorrt_llm" / "1" / "model.yaml").read_text())
    assert values == {
        "model": str(tiny_hf),
        "backend": "pytorch",
        "tensor_parallel_size": 2,
        "max_batch_size": 1,
        "enable_chunked_prefill": False,
        "kv_cache_config": {"free_gpu_memory_fraction": 0.5, "enable_block_reuse": False},
        "cuda_graph_config": {"enable_padding": True, "max_batch_size": 1},
        "scheduler_config": {"capacity_scheduler_policy": "MAX_UTILIZATION"},
        "speculative_config": {
            "decoding_type": "Draft_Target",
            "max_draft_len": 5,
            "speculative_model": str(tiny_hf),
        },
        "disable_overlap_scheduler": True,
        "gpus_per_node": 2,
        "triton_config": {"max_batch_size": 0, "decoupled": True, "cancellation_check_period_ms": 100},
    }
    model = config(tmp_path / "r")
    assert (model.max_batch_size, model.model_transaction_policy.decoupled) == (0, True)
    assert parameters(tmp_path / "r")["gpu_device_ids"] == "4,5"
    assert json.loads(parameters(tmp_path / "r")["ffn_fusion_facts"])["tp_size"] == 2


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_batch_size": 3}, "max_batch_size: 3 is above the engine's 2"),
        ({"gpu_ids": ((0, 1, 2),)}, "gpu_ids: 3 GPUs for instance 0, the engine has 2 ranks"),
        ({"draft": "unlike"}, "draft: .* has vocab_size"),
        ({"draft": "older"}, r"built by TensorRT-LLM 1\.1\.0, the engine by 1\.2\.1"),
    ],
)
def test_what_does_not_fit_an_engine(
    options: dict, message: str, target: Path, tiny_hf: Path, tmp_path: Path
) -> None:
    if options.get("draft") == "unlike":
        wide = manifests.read(target)
        place = tmp_path / "wide"
        place.mkdir()
        replace(wide, architecture=replace(wide.architecture, vocab_size=32)).write(place)
        options = {"draft": fake_engine(tmp_path / "unlike", place)}
    elif options.get("draft") == "older":
        options = {"draft": fake_engine(tmp_path / "older", target, tensorrt_llm="1.1.0")}
    with pytest.raises(UserError, match=message):
        write(target, tiny_hf, tmp_path / "r", **options)
    assert not (tmp_path / "r").exists()


def test_engine_without_paged_context(target: Path, tiny_hf: Path, tmp_path: Path) -> None:
    plain = fake_engine(tmp_path / "plain", target, paged_context_fmha=False)
    values = parameters(write(plain, tiny_hf, tmp_path / "r"))
    assert values["enable_chunked_context"] == values["enable_kv_cache_reuse"] == "false"
    with pytest.raises(UserError, match="kv_cache_reuse: the engine was built without"):
        write(plain, tiny_hf, tmp_path / "again", kv_cache_reuse=True)
    with pytest.raises(UserError, match="draft: the engine was built without --max-draft-len"):
        write(plain, tiny_hf, tmp_path / "again", draft=target)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"kv_cache_fraction": 1.5}, "kv_cache_fraction: 1.5 is not between 0 and 1"),
        ({"gpu_ids": ((0, 0),)}, "gpu_ids: GPU 0 is named twice"),
        ({"gpu_ids": ((0,), (1,))}, "gpu_ids: 2 lists for 1 instances"),
        ({"instances": 2}, "instances: 2 need --gpu-ids"),
        ({"scheduler_policy": "fifo"}, "scheduler_policy: 'fifo' is not one of"),
    ],
)
def test_options_out_of_range(options: dict, message: str) -> None:
    with pytest.raises(UserError, match=message):
        DeployOptions(**options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_queue_size": 3}, "max_queue_size: the LLM API has its own queue"),
        ({"max_batch_size": 3}, "max_batch_size: 3 is above the 2 that was checked"),
        ({"draft": Path("/nowhere")}, r"draft: /nowhere has no config\.json"),
        ({"bls_instances": 2}, "bls_instances: the LLM API's repository has no tensorrt_llm_bls"),
    ],
)
def test_what_does_not_fit_the_llm_api(options: dict, message: str, pytorch: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=message):
        repository.write_repository(pytorch, None, tmp_path / "r", DeployOptions(**options))
    assert not (tmp_path / "r").exists()


@pytest.mark.parametrize(
    ("model", "old", "new", "message"),
    [
        ("tensorrt_llm", "max_batch_size: 2", "max_batch_size: ${size}", r"line \d+ holds the placeholder"),
        ("tensorrt_llm", "max_batch_size: 2", "max_batch_size: x", "Couldn't parse integer"),
        ("preprocessing", "max_batch_size: 2", "max_batch_size: 4", "max_batch_size: 4, in tensorrt_llm 2"),
        ("tensorrt_llm", "decoupled: true", "decoupled: false", "streaming needs"),
        (
            "tensorrt_llm_bls",
            "decoupled: true",
            "decoupled: false",
            "decoupled is not what tensorrt_llm says",
        ),
        (
            "tensorrt_llm",
            'string_value: "0.9"',
            'string_value: "nine"',
            "fraction is 'nine'",
        ),
        (
            "tensorrt_llm",
            'string_value: "1"',
            'string_value: "7"',
            "max_beam_width is '7'",
        ),
        ("tensorrt_llm", "inflight_fused_batching", "fused", "gpt_model_type is 'fused'"),
        (
            "tensorrt_llm",
            'key: "guided_decoding_backend"',
            'key: "guided"',
            "guided_decoding_backend is missing",
        ),
        ("ensemble", 'key: "QUERY"', 'key: "QUESTION"', "maps 'QUESTION', which is no input"),
        ("ensemble", 'value: "text_input"', 'value: "text"', "reads 'text', which no earlier step makes"),
        ("ensemble", 'name: "ensemble"', 'name: "group"', "name is 'group', the directory's is 'ensemble'"),
        ("postprocessing", "/hf", "/other", "tokenizer_dir is .*tokens would mean different texts"),
        ("tensorrt_llm_bls", 'string_value: "tensorrt_llm"', 'string_value: "llm"', "is no model of this"),
    ],
)
def test_rules_of_a_changed_repository(
    model: str, old: str, new: str, message: str, target: Path, tiny_hf: Path, tmp_path: Path
) -> None:
    place = write(target, tiny_hf, tmp_path / "r")
    rules.check(place)
    file = place / model / "config.pbtxt"
    old = str(tiny_hf) if old == "/hf" else old
    assert old in file.read_text()
    file.write_text(file.read_text().replace(old, new, 1))
    with pytest.raises(UserError, match=message) as caught:
        rules.check(place)
    assert str(file) in str(caught.value)


def test_rules_of_a_lost_engine(target: Path, tiny_hf: Path, tmp_path: Path) -> None:
    place = write(target, tiny_hf, tmp_path / "r")
    (target / "rank1.engine").unlink()
    with pytest.raises(UserError, match=r"rank1\.engine is missing"):
        rules.check(place)
    (target / "config.json").unlink()
    with pytest.raises(UserError, match=r"gpt_model_path .* has no config\.json"):
        rules.check(place)


def test_rules_of_a_changed_model_yaml(pytorch: Path, tmp_path: Path) -> None:
    repository.write_repository(pytorch, None, tmp_path / "r", DeployOptions())
    file = tmp_path / "r" / "tensorrt_llm" / "1" / "model.yaml"
    file.write_text(file.read_text().replace("decoupled: true", "decoupled: false"))
    with pytest.raises(UserError, match="says other values of decoupled and max_batch_size"):
        rules.check(tmp_path / "r")


def deploy(*arguments: object) -> Result:
    return CliRunner().invoke(main, ["deploy", *map(str, arguments)])


def test_deploy_says_how_to_start(target: Path, pytorch: Path, tiny_hf: Path, tmp_path: Path) -> None:
    start = ["--manifests", tmp_path / "start"]
    result = deploy(target, "--tokenizer", tiny_hf, "-o", tmp_path / "r", *start, "--json")
    assert result.exit_code == 0, result.output
    answer = json.loads(result.stdout)
    assert (answer["flavour"], answer["tried"], answer["model"]) == ("engine", False, "ensemble")
    assert answer["image"] == "nvcr.io/nvidia/tritonserver:26.07-trtllm-python-py3"
    assert answer["start"]["server"].startswith(
        "mpirun --allow-run-as-root --bind-to none -n 1 /opt/tritonserver"
    )
    assert answer["start"]["server"].count("tritonserver/bin/tritonserver") == 2
    assert answer["start"]["docker"].startswith("docker run")
    names = {Path(file).name for file in answer["files"]}
    assert {"start.sh", "docker-run.sh", "compose.yaml", "kubernetes.yaml", "prometheus.yaml"} <= names
    again = deploy(tmp_path / "r", "--http-port", "9000")
    assert again.exit_code == 0, again.output
    assert "--http-port=9000" in again.stdout
    llm = deploy(pytorch, "-o", tmp_path / "llm")
    assert llm.exit_code == 0, llm.output
    assert "llmapi flavour, written, not tried" in llm.stdout
    assert "mpirun" not in llm.stdout


def test_deploy_over_nodes(target: Path, tiny_hf: Path, tmp_path: Path) -> None:
    result = deploy(
        target,
        "--tokenizer",
        tiny_hf,
        "-o",
        tmp_path / "r",
        "--gpus-per-node",
        1,
        "--manifests",
        tmp_path / "s",
    )
    assert result.exit_code == 0, result.output
    assert "srun --nodes=2" in result.stdout
    assert (tmp_path / "s" / "leaderworkerset.yaml").is_file()


def test_deploy_serves_in_the_container_only(target: Path, tiny_hf: Path, tmp_path: Path) -> None:
    result = deploy(target, "--tokenizer", tiny_hf, "-o", tmp_path / "r", "--serve")
    assert result.exit_code == 1
    assert "/opt/tritonserver/bin/tritonserver: missing; run this inside nvcr.io" in result.stderr


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (("{target}", "-o", "{out}"), 1, "tokenizer: missing; give --tokenizer"),
        (("{target}", "--tokenizer", "{hf}"), 2, "an engine needs -o REPOSITORY"),
        (("{target}", "--tokenizer", "{hf}", "-o", "{out}", "--http-port", "0"), 2, "--http-port 0 is for"),
        (("{target}", "--tokenizer", "{hf}", "-o", "{out}", "--claim", "x"), 2, "--claim needs --manifests"),
        (("{target}", "--tokenizer", "{hf}", "-o", "{out}", "--gpu-ids", "a"), 1, "gpu_ids: 'a' is no list"),
        (("{pytorch}", "-o", "{out}", "--max-queue-size", "4"), 1, "max_queue_size: the LLM API"),
        (
            ("{embedded}", "--tokenizer", "{hf}", "-o", "{out}", "--max-batch-size", "2"),
            1,
            "embedded engines take",
        ),
        (("{hf}", "-o", "{out}"), 1, "a Hugging Face directory; make an engine of it"),
        (("{tmp}", "-o", "{out}"), 1, "neither an engine nor a model repository"),
    ],
)
def test_deploy_refuses(
    arguments: tuple[str, ...],
    code: int,
    message: str,
    target: Path,
    pytorch: Path,
    tiny_manifest: Path,  # noqa: F811
    tiny_hf: Path,
    tmp_path: Path,
) -> None:
    places = {
        "target": target,
        "pytorch": pytorch,
        "embedded": tiny_manifest,
        "hf": tiny_hf,
        "out": tmp_path / "r",
        "tmp": tmp_path,
    }
    result = deploy(*(argument.format(**places) for argument in arguments))
    assert result.exit_code == code, result.output
    assert message in result.stderr
    assert "Traceback" not in result.stderr


def test_release_without_an_image(target: Path, tiny_hf: Path, tmp_path: Path) -> None:
    candidate = fake_engine(tmp_path / "rc", target, tensorrt_llm="1.3.0rc20")
    result = deploy(candidate, "--tokenizer", tiny_hf, "-o", tmp_path / "r")
    assert result.exit_code == 1
    assert "no tritonserver image has 1.3.0rc20" in result.stderr
    assert not (tmp_path / "r").exists()


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (("--manifests", "{taken}"), 1, "exists; remove it or choose another --manifests directory"),
        (("--manifests", "{new}", "--claim", "Bad Claim; x"), 1, "claim: 'Bad Claim; x' is no name"),
        (("--http-port", "65535"), 1, "http_port: 65535 is not between"),
        (("--gpus-per-node", "1", "--instances", "2", "--gpu-ids", "0,1;2,3"), 1, "instances: 2 of 2 nodes"),
        (("--serve",), 1, "missing; run this inside"),
        (("--draft", "{hf}"), 1, "draft: .* is no engine of TensorRT-LLM"),
    ],
)
def test_deploy_that_fails_writes_nothing(
    arguments: tuple[str, ...], code: int, message: str, target: Path, tiny_hf: Path, tmp_path: Path
) -> None:
    places = {"taken": tmp_path, "new": tmp_path / "start", "hf": tiny_hf}
    given = [argument.format(**places) for argument in arguments]
    result = deploy(target, "--tokenizer", tiny_hf, "-o", tmp_path / "r", *given)
    assert result.exit_code == code, result.output
    assert re.search(message, result.stderr)
    assert not (tmp_path / "r").exists()
    assert not (tmp_path / "start").exists()


def test_deploy_of_a_checkpoint(tmp_path: Path, tiny_checkpoint: Path) -> None:
    result = deploy(tiny_checkpoint, "-o", tmp_path / "r")
    assert result.exit_code == 1
    assert "a TensorRT-LLM checkpoint; make an engine of it with build-engine" in result.stderr


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("tp_size", "2", "tp_size is no positive number"),
        ("instances", 0, "instances is no positive number"),
        ("flavour", "foo", "flavour 'foo' is not known"),
        ("more", 1, "more"),
    ],
)
def test_record_changed_by_hand(
    key: str, value: object, message: str, target: Path, tiny_hf: Path, tmp_path: Path
) -> None:
    place = write(target, tiny_hf, tmp_path / "r")
    record = json.loads((place / "ffn-fusion.json").read_text())
    (place / "ffn-fusion.json").write_text(json.dumps({**record, key: value}))
    result = deploy(place)
    assert result.exit_code == 1
    assert message in result.stderr
    assert "Traceback" not in result.stderr


def test_repository_without_its_text_models(target: Path, tiny_hf: Path, tmp_path: Path) -> None:
    place = write(target, tiny_hf, tmp_path / "r")
    shutil.rmtree(place / "postprocessing")
    with pytest.raises(UserError, match=r"has no postprocessing/config\.pbtxt"):
        rules.check(place)
