"""Every kind of model that can be read: its logits in our decoder against transformers, from every format."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from conftest import random_checkpoint, run_ranks, write_llama, write_tokenizer
from safetensors.torch import load_file, save_file

from builder import export, huggingface, trtllm
from builder.architecture import FFN, Architecture, Attention, Layer, Linear
from builder.decoder import load
from builder.errors import UserError
from builder.plan import Plan
from builder.rope import Rope

TOKENS = torch.randint(0, 320, (2, 24), generator=torch.Generator().manual_seed(3))
POSITIONS = torch.arange(24).expand(2, 24)


def write_qwen2(directory: Path, **overrides: object) -> Path:
    """A Qwen2ForCausalLM directory, biases and norms random."""
    from transformers import Qwen2Config, Qwen2ForCausalLM

    values = {
        "vocab_size": 320,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 256,
        "initializer_range": 0.15,
        **overrides,
    }
    torch.manual_seed(0)
    model = Qwen2ForCausalLM(Qwen2Config(**values))
    for name, parameter in model.named_parameters():
        if "norm" in name or "bias" in name:
            torch.nn.init.uniform_(parameter, -0.9, 1.3)
    model.save_pretrained(directory)
    write_tokenizer(directory)
    return directory


def transformers_logits(directory: Path) -> torch.Tensor:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(directory, trust_remote_code=True, dtype=torch.float32)
    with torch.no_grad():
        return model(TOKENS).logits


def our_logits(directory: Path) -> torch.Tensor:
    return load(huggingface.read(directory), torch.float32)(TOKENS, POSITIONS)


@pytest.mark.parametrize("tied", [False, True])
def test_qwen2(tmp_path: Path, tied: bool) -> None:
    model = write_qwen2(tmp_path / "m", tie_word_embeddings=tied)
    assert huggingface.read_architecture(model).attention_bias
    torch.testing.assert_close(our_logits(model), transformers_logits(model))


def test_qwen2_stays_qwen2_in_both_formats(tmp_path: Path) -> None:
    """All layers narrowed alike: still one that Qwen2 can say. The biases are pooled with their heads."""
    model = write_qwen2(tmp_path / "m")
    plan = Plan(kv_heads=tuple((i, 1) for i in range(4)), fuse=())
    child = plan.apply(huggingface.read(model))
    export.write(child, model, tmp_path / "hf")
    config = json.loads((tmp_path / "hf" / "config.json").read_text())
    assert (config["model_type"], config["architectures"]) == ("qwen2", ["Qwen2ForCausalLM"])
    torch.testing.assert_close(load(child)(TOKENS, POSITIONS), transformers_logits(tmp_path / "hf"))
    bias = load_file(model / "model.safetensors")["model.layers.2.self_attn.k_proj.bias"]
    pooled = load_file(tmp_path / "hf" / "model.safetensors")["model.layers.2.self_attn.k_proj.bias"]
    torch.testing.assert_close(pooled, bias.view(2, 16).mean(0), rtol=0, atol=0)

    trtllm.convert(child, tmp_path / "c", tp_size=2)
    config = json.loads((tmp_path / "c" / "config.json").read_text())
    assert [config[k] for k in ("architecture", "qwen_type", "attn_bias")] == [
        "Qwen2ForCausalLM",
        "qwen2",
        True,
    ]
    reread = trtllm.read(tmp_path / "c")
    ranks = run_ranks([reread.rank(r) for r in range(2)], TOKENS, POSITIONS)
    torch.testing.assert_close(torch.cat(ranks, -1), load(child)(TOKENS, POSITIONS), rtol=1e-5, atol=1e-5)


NO_BIASES = r"attention_bias: .* DeciLMForCausalLM \(nemotron-nas\), which has no q/k/v biases"


def test_qwen2_biases_have_no_place_in_unlike_layers(tmp_path: Path) -> None:
    model = write_qwen2(tmp_path / "m")
    child = Plan(drop_attention=(1, 2)).apply(huggingface.read(model))
    with pytest.raises(UserError, match=NO_BIASES):
        export.write(child, model, tmp_path / "hf")
    with pytest.raises(UserError, match=NO_BIASES):
        trtllm.convert(child, tmp_path / "c")
    assert [p.name for p in tmp_path.iterdir()] == ["m"]


def test_qwen2_window_that_is_switched_off(tmp_path: Path) -> None:
    model = write_qwen2(tmp_path / "m")
    edit(model, sliding_window=128, use_sliding_window=False)
    huggingface.read(model)
    edit(model, use_sliding_window=True)
    with pytest.raises(UserError, match="sliding_window 128 is not supported"):
        huggingface.read(model)


def test_mistral(tmp_path: Path) -> None:
    from transformers import MistralConfig, MistralForCausalLM

    config = MistralConfig(
        vocab_size=320,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=24,
        sliding_window=None,
    )
    MistralForCausalLM(config).save_pretrained(tmp_path / "m")
    torch.testing.assert_close(our_logits(tmp_path / "m"), transformers_logits(tmp_path / "m"))


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_and_shards(tmp_path: Path, dtype: str) -> None:
    """A sharded index in 16 bits: every tensor is the stored one."""
    model = write_llama(tmp_path / "m", dtype=dtype)
    single = load_file(model / "model.safetensors")
    shard(model, 3)
    checkpoint = huggingface.read(model)
    assert checkpoint.dtype == dtype
    whole = load(checkpoint).state_dict()
    assert torch.equal(whole["layers.3.ffn.up.weight"], single["model.layers.3.mlp.up_proj.weight"])
    assert torch.equal(whole["lm_head.weight"], single["lm_head.weight"])


def shard(model: Path, count: int) -> None:
    """Cut model.safetensors into files with an index, as large models have them."""
    tensors = load_file(model / "model.safetensors")
    weight_map = {}
    for number in range(count):
        name = f"model-{number + 1:05}-of-{count:05}.safetensors"
        part = dict(list(tensors.items())[number::count])
        save_file(part, model / name)
        weight_map.update(dict.fromkeys(part, name))
    (model / "model.safetensors").unlink()
    (model / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))


def edit(model: Path, **changes: object) -> None:
    file = model / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


ROPES = [
    {"rope_type": "linear", "factor": 4.0},
    {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 32,
    },
    {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64},
    {"rope_type": "yarn", "factor": 4.0, "attention_factor": 1.3, "original_max_position_embeddings": 64},
    None,
]


@pytest.mark.parametrize("scaling", ROPES, ids=["linear", "llama3", "yarn", "yarn with a factor", "none"])
def test_rope_spellings_mean_the_same(tiny_hf: Path, tmp_path: Path, scaling: dict | None) -> None:
    """Old and new spelling, `type` for `rope_type`, and the TensorRT-LLM checkpoint's."""
    old, older, new = (Path(shutil.copytree(tiny_hf, tmp_path / n)) for n in ("old", "older", "new"))
    edit(old, rope_parameters=None, rope_theta=20000.0, rope_scaling=scaling)
    renamed = {("type" if k == "rope_type" else k): v for k, v in (scaling or {}).items()} or None
    edit(older, rope_parameters=None, rope_theta=20000.0, rope_scaling=renamed)
    edit(new, rope_parameters={"rope_theta": 20000.0, **(scaling or {"rope_type": "default"})})
    expected = transformers_logits(new)
    for model in (old, older, new):
        torch.testing.assert_close(our_logits(model), expected)
    trtllm.convert(huggingface.read(old), tmp_path / "c")
    torch.testing.assert_close(load(trtllm.read(tmp_path / "c").rank(0))(TOKENS, POSITIONS), expected)


def test_yarn_that_tensorrt_llm_cannot_say(tiny_hf: Path, tmp_path: Path) -> None:
    model = Path(shutil.copytree(tiny_hf, tmp_path / "m"))
    yarn = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64, "truncate": False}
    edit(model, rope_parameters={"rope_theta": 1e4, **yarn})
    with pytest.raises(UserError, match=r"rope_scaling\.truncate: false is not known to TensorRT-LLM"):
        trtllm.convert(huggingface.read(model), tmp_path / "c")


NAS = Architecture(
    hidden_size=64,
    num_attention_heads=4,
    head_dim=16,
    vocab_size=320,
    max_position_embeddings=128,
    norm_eps=1e-5,
    rope=Rope(),
    tie_word_embeddings=False,
    layers=tuple(
        Layer(attention=attention, ffn=ffn, members=(index,))
        for index, (attention, ffn) in enumerate(
            [
                (Attention(num_key_value_heads=4), FFN(intermediate_size=256)),
                (Linear(), FFN(intermediate_size=512)),
                (Attention(num_key_value_heads=1), Linear()),
                (None, FFN(intermediate_size=256)),
                (None, None),
                (Attention(num_key_value_heads=2), None),
                (None, Linear()),
                (Linear(), None),
                (Attention(num_key_value_heads=2), FFN(intermediate_size=768)),
            ]
        )
    ),
)


@pytest.fixture
def nas(tiny_hf: Path, tmp_path: Path) -> Path:
    """A nemotron-nas directory with every kind of layer there is."""
    export.write(random_checkpoint(NAS), tiny_hf, tmp_path / "nas")
    return tmp_path / "nas"


def test_every_kind_of_block(nas: Path) -> None:
    read = huggingface.read_architecture(nas)
    assert read.layers == NAS.layers
    expected = load(random_checkpoint(NAS))(TOKENS, POSITIONS)
    torch.testing.assert_close(our_logits(nas), expected)
    torch.testing.assert_close(transformers_logits(nas), expected)


def test_every_kind_of_block_generates_with_its_cache(nas: Path) -> None:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(nas, trust_remote_code=True)
    options = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    prompt = TOKENS[:1, :6]
    with_cache = model.generate(prompt, **options)
    assert torch.equal(with_cache, model.generate(prompt, use_cache=False, **options))


def test_newer_spelling_of_blocks(nas: Path) -> None:
    """num_key_value_heads and intermediate_size inside a block; flags and other parts left out."""
    blocks = []
    for layer in NAS.layers:
        attention: dict = {"no_op": layer.attention is None}
        ffn: dict = {"no_op": layer.ffn is None, "moe": None, "hidden_act": "silu"}
        if isinstance(layer.attention, Linear):
            attention["replace_with_linear"] = True
        elif layer.attention:
            attention["num_key_value_heads"] = layer.num_key_value_heads
        if isinstance(layer.ffn, Linear):
            ffn["replace_with_linear"] = True
        elif layer.ffn:
            ffn["intermediate_size"] = layer.intermediate_size
        blocks.append({"attention": attention, "ffn": ffn})
    before = huggingface.read_architecture(nas)
    edit(nas, block_configs=blocks)
    assert huggingface.read_architecture(nas) == before
    edit(nas, model_type="llama")  # pruned models may keep their type
    assert huggingface.read_architecture(nas) == before
    blocks[3]["parallel_blocks"] = [{}]
    edit(nas, block_configs=blocks)
    with pytest.raises(UserError, match=r"block_configs\[3\]\.parallel_blocks"):
        huggingface.read_architecture(nas)


@pytest.mark.parametrize("tp_size", [1, 2, 4])
def test_every_kind_of_block_in_tensorrt_llm(nas: Path, tmp_path: Path, tp_size: int) -> None:
    checkpoint = huggingface.read(nas)
    trtllm.convert(checkpoint, tmp_path / "c", tp_size=tp_size)
    config = json.loads((tmp_path / "c" / "config.json").read_text())
    kinds = [(x["attention"]["impl"], x["ffn"]["impl"]) for x in config["layer_configs"]]
    assert kinds[1:8] == [
        ("linear", "mlp"),
        ("attention", "linear"),
        ("no_op", "mlp"),
        ("no_op", "no_op"),
        ("attention", "no_op"),
        ("no_op", "linear"),
        ("linear", "no_op"),
    ]
    hf = load_file(nas / "model.safetensors")
    last = load_file(tmp_path / "c" / f"rank{tp_size - 1}.safetensors")
    rows = slice(64 - 64 // tp_size, 64)
    linear = hf["model.layers.1.self_attn.linear_attn.weight"][rows]
    assert torch.equal(last["transformer.layers.1.attention.weight"], linear)
    linear = hf["model.layers.6.mlp.linear_mlp.weight"][rows]
    assert torch.equal(last["transformer.layers.6.ffn.weight"], linear)
    reread = trtllm.read(tmp_path / "c")
    ranks = run_ranks([reread.rank(r) for r in range(tp_size)], TOKENS, POSITIONS)
    torch.testing.assert_close(torch.cat(ranks, -1), our_logits(nas), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("part", "change", "message"),
    [
        ("attention", {"n_heads_in_group": 3}, r"block_configs\[0\].attention.n_heads_in_group 3 does not"),
        (
            "attention",
            {"n_heads_in_group": 0},
            r"block_configs\[0\].attention.n_heads_in_group 0 is not a pos",
        ),
        ("attention", {"window_length": 512}, r"block_configs\[0\].attention.window_length 512 is not supp"),
        ("attention", {"mamba": {"state": 8}}, r"block_configs\[0\].attention.mamba .* is not supported"),
        ("ffn", {"ffn_mult": -1.0}, r"block_configs\[0\].ffn.ffn_mult -1.0 is not a positive number"),
        ("ffn", {"moe": {"experts": 8}}, r"block_configs\[0\].ffn.moe .* is not supported"),
        ("ffn", {"no_op": True, "replace_with_linear": True}, "contradicts replace_with_linear"),
        ("ffn", {"no_op": "yes"}, r"block_configs\[0\].ffn.no_op 'yes' is not true or false"),
    ],
)
def test_blocks_that_cannot_be(nas: Path, part: str, change: dict, message: str) -> None:
    config = json.loads((nas / "config.json").read_text())
    config["block_configs"][0][part] |= change
    edit(nas, block_configs=config["block_configs"])
    with pytest.raises(UserError, match=message):
        huggingface.read(nas)
