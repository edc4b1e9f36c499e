"""The TensorRT-LLM checkpoint: names, shapes and config as golden data, values against slices by hand."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from conftest import fused, write_llama
from safetensors.torch import load_file

from builder import huggingface, trtllm
from builder.decoder import load
from builder.errors import UserError
from builder.plan import Plan
from builder.surgery.attention import drop_attention
from builder.surgery.fusion import fuse
from builder.trtllm import conversion

H, D = 64, 16  # hidden_size, head_dim of the tiny model
GOLDEN_RANK = {
    "transformer.vocab_embedding.weight": [320, H],
    "transformer.layers.0.input_layernorm.weight": [H],
    "transformer.layers.0.attention.qkv.weight": [(2 + 2 * 1) * D, H],
    "transformer.layers.0.attention.dense.weight": [H, 2 * D],
    "transformer.layers.0.post_layernorm.weight": [H],
    "transformer.layers.0.ffn.fc.weight": [48, H],
    "transformer.layers.0.ffn.gate.weight": [48, H],
    "transformer.layers.0.ffn.proj.weight": [H, 48],
    "transformer.layers.2.post_layernorm.weight": [H],
    "transformer.layers.2.ffn.fc.weight": [144, H],
    "transformer.layers.2.ffn.gate.weight": [144, H],
    "transformer.layers.2.ffn.proj.weight": [H, 144],
    "transformer.layers.3.post_layernorm.weight": [H],
    "transformer.layers.3.ffn.fc.weight": [48, H],
    "transformer.layers.3.ffn.gate.weight": [48, H],
    "transformer.layers.3.ffn.proj.weight": [H, 48],
    "transformer.ln_f.weight": [H],
    "lm_head.weight": [160, H],
}
GOLDEN_RANK |= {
    name.replace("layers.0", "layers.1"): shape for name, shape in GOLDEN_RANK.items() if "layers.0" in name
}


def test_names_and_shapes_of_a_rank(tiny_checkpoint_tp2: Path) -> None:
    files = sorted(p.name for p in tiny_checkpoint_tp2.iterdir())
    assert files == ["config.json", "ffn-fusion.json", "rank0.safetensors", "rank1.safetensors"]
    for rank in range(2):
        tensors = load_file(tiny_checkpoint_tp2 / f"rank{rank}.safetensors")
        assert {name: list(x.shape) for name, x in tensors.items()} == GOLDEN_RANK
        assert {x.dtype for x in tensors.values()} == {torch.float32}


def test_config(tiny_checkpoint_tp2: Path) -> None:
    attention = {"impl": "attention", "num_key_value_heads": 2}
    no_op = {"impl": "no_op", "num_key_value_heads": None}
    assert json.loads((tiny_checkpoint_tp2 / "config.json").read_text()) == {
        "architecture": "DeciLMForCausalLM",
        "dtype": "float32",
        "logits_dtype": "float32",
        "hidden_size": 64,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_size": 16,
        "intermediate_size": 288,
        "hidden_act": "silu",
        "vocab_size": 320,
        "max_position_embeddings": 256,
        "norm_epsilon": 1e-5,
        "position_embedding_type": "rope_gpt_neox",
        "rotary_base": 10000.0,
        "rotary_scaling": None,
        "use_parallel_embedding": False,
        "embedding_sharding_dim": 0,
        "mapping": {"world_size": 2, "tp_size": 2, "pp_size": 1},
        "quantization": {"quant_algo": None, "kv_cache_quant_algo": None},
        "layer_configs": [
            {"attention": attention, "ffn": {"impl": "mlp", "intermediate_size": 96}},
            {"attention": attention, "ffn": {"impl": "mlp", "intermediate_size": 96}},
            {"attention": no_op, "ffn": {"impl": "mlp", "intermediate_size": 288}},
            {"attention": no_op, "ffn": {"impl": "mlp", "intermediate_size": 96}},
        ],
    }


def test_values_are_slices_of_the_model(tiny_hf: Path, tiny_checkpoint_tp2: Path) -> None:
    hf = load_file(tiny_hf / "model.safetensors")
    for rank in range(2):
        ours = load_file(tiny_checkpoint_tp2 / f"rank{rank}.safetensors")
        q, k, v = (hf[f"model.layers.1.self_attn.{n}_proj.weight"] for n in "qkv")
        qkv = torch.cat([q[32 * rank : 32 * rank + 32], k[16 * rank :][:16], v[16 * rank :][:16]])
        layer = "transformer.layers.1"
        assert torch.equal(ours[f"{layer}.attention.qkv.weight"], qkv)
        o = hf["model.layers.1.self_attn.o_proj.weight"][:, 32 * rank : 32 * rank + 32]
        assert torch.equal(ours[f"{layer}.attention.dense.weight"], o)
        rows = slice(48 * rank, 48 * rank + 48)
        mlp = "model.layers.1.mlp"
        assert torch.equal(ours[f"{layer}.ffn.fc.weight"], hf[f"{mlp}.gate_proj.weight"][rows])
        assert torch.equal(ours[f"{layer}.ffn.gate.weight"], hf[f"{mlp}.up_proj.weight"][rows])
        assert torch.equal(ours[f"{layer}.ffn.proj.weight"], hf[f"{mlp}.down_proj.weight"][:, rows])
        assert torch.equal(ours["lm_head.weight"], hf["lm_head.weight"][160 * rank :][:160])
        assert torch.equal(ours["transformer.vocab_embedding.weight"], hf["model.embed_tokens.weight"])
        # the fused layer: members 2-4 side by side, cut after joining
        down = torch.cat([hf[f"model.layers.{i}.mlp.down_proj.weight"] for i in (2, 3, 4)], 1)
        fused_down = ours["transformer.layers.2.ffn.proj.weight"]
        assert torch.equal(fused_down, down[:, 144 * rank : 144 * rank + 144])


def test_plain_llama_keeps_its_name(tiny_hf: Path, tmp_path: Path) -> None:
    trtllm.convert(huggingface.read(tiny_hf), tmp_path / "c")
    config = json.loads((tmp_path / "c" / "config.json").read_text())
    assert config["architecture"] == "LlamaForCausalLM"
    assert "layer_configs" not in config
    assert "transformer.layers.5.mlp.fc.weight" in load_file(tmp_path / "c" / "rank0.safetensors")


def test_kv_heads_repeat_when_ranks_outnumber_them(tiny_hf: Path, tmp_path: Path) -> None:
    trtllm.convert(huggingface.read(tiny_hf), tmp_path / "c", tp_size=4)
    k = load_file(tiny_hf / "model.safetensors")["model.layers.0.self_attn.k_proj.weight"]
    for rank in range(4):
        qkv = load_file(tmp_path / "c" / f"rank{rank}.safetensors")[
            "transformer.layers.0.attention.qkv.weight"
        ]
        assert torch.equal(qkv[16:32], k[16 * (rank // 2) :][:16])


def test_vocabulary_and_widths_are_padded_with_zeros(tmp_path: Path) -> None:
    directory = write_llama(tmp_path / "m", vocab_size=321, intermediate_size=97)
    trtllm.convert(huggingface.read(directory), tmp_path / "c", tp_size=2)
    last = load_file(tmp_path / "c" / "rank1.safetensors")
    assert last["lm_head.weight"].shape == (161, 64)
    assert not last["lm_head.weight"][160].any()
    assert last["transformer.layers.0.mlp.fc.weight"].shape == (49, 64)
    assert not last["transformer.layers.0.mlp.fc.weight"][48].any()
    assert not last["transformer.layers.0.mlp.proj.weight"][:, 48].any()
    assert last["transformer.layers.0.mlp.proj.weight"][:, 47].any()


def test_pipeline_stages_number_their_own_layers(tiny_hf: Path, tmp_path: Path) -> None:
    trtllm.convert(huggingface.read(tiny_hf), tmp_path / "c", tp_size=2, pp_size=4)
    names = [set(load_file(tmp_path / "c" / f"rank{r}.safetensors")) for r in range(8)]
    counts = [len({n.split(".")[2] for n in x if ".layers." in n}) for x in names]
    assert counts == [2, 2, 2, 2, 1, 1, 1, 1]
    assert ["transformer.vocab_embedding.weight" in x for x in names] == [True, True] + [False] * 6
    assert ["lm_head.weight" in x for x in names] == [False] * 6 + [True, True]
    hf = load_file(tiny_hf / "model.safetensors")
    stage1 = load_file(tmp_path / "c" / "rank3.safetensors")  # stage 1, tp rank 1: model layers 2 and 3
    gate = hf["model.layers.2.mlp.gate_proj.weight"][48:]
    assert torch.equal(stage1["transformer.layers.0.mlp.fc.weight"], gate)


@pytest.mark.parametrize(
    ("tp_size", "pp_size", "message"),
    [
        (3, 1, r"tp_size: 3 does not divide num_attention_heads 4; choose one of \[1, 2, 4\]"),
        (1, 4, "leaves stage 2 .* without attention"),
        (1, 99, "pp_size: 99 does not fit 4 layers"),
    ],
)
def test_impossible_mappings_leave_nothing(
    tiny_hf: Path, tmp_path: Path, tp_size: int, pp_size: int, message: str
) -> None:
    with pytest.raises(UserError, match=message):
        trtllm.convert(fused(tiny_hf), tmp_path / "c", tp_size=tp_size, pp_size=pp_size)
    assert list(tmp_path.iterdir()) == []


def test_weights_too_large_for_tensorrt_are_refused(
    tiny_hf: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The fused layer of three FFNs, 288 wide: gate and up together have 36,864 elements."""
    child = fused(tiny_hf)
    monkeypatch.setattr(conversion, "MAX_ELEMENTS", 2 * 288 * 64 - 1)
    trtllm.convert(child, tmp_path / "two", tp_size=2)
    with pytest.raises(UserError, match="layer 2: the joined gate and up weight has 36,864") as caught:
        trtllm.convert(child, tmp_path / "one")
    assert str(caught.value).endswith(
        "TensorRT takes 36,863; fuse groups of 2 such FFNs at most (width 287), raise --tp to 2, "
        "or give --no-fused-mlp and build with use_fused_mlp disabled"
    )
    assert not (tmp_path / "one").exists()
    trtllm.convert(child, tmp_path / "unjoined", fused_mlp=False)
    monkeypatch.setattr(conversion, "MAX_ELEMENTS", 288 * 64 - 1)
    with pytest.raises(UserError, match=r"gate weight has .*; fuse groups of 2 .*, raise --tp to 2$"):
        trtllm.convert(child, tmp_path / "one", fused_mlp=False)


def test_attention_too_large_for_tensorrt(
    tiny_hf: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No FFN is left whose groups could be made smaller: q, k and v together are 128 x 64."""
    child = Plan(drop_ffn=tuple(range(6))).apply(huggingface.read(tiny_hf))
    monkeypatch.setattr(conversion, "MAX_ELEMENTS", 128 * 64 - 1)
    with pytest.raises(
        UserError, match=r"layer 0: the largest weight of the attention has 8,192 .*; raise --tp$"
    ):
        trtllm.convert(child, tmp_path / "c")


def test_embedding_too_large_for_tensorrt(
    tiny_hf: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(conversion, "MAX_ELEMENTS", 320 * 64 - 1)
    with pytest.raises(UserError, match="vocab_size: the embedding has 20,480 elements"):
        trtllm.convert(huggingface.read(tiny_hf), tmp_path / "c")


def test_fusing_on_the_way_equals_fusing_first(tiny_hf: Path, tmp_path: Path) -> None:
    from builder import export

    export.write(fused(tiny_hf), tiny_hf, tmp_path / "hf")
    trtllm.convert(huggingface.read(tmp_path / "hf"), tmp_path / "two_steps")
    reread = trtllm.read(tmp_path / "two_steps")
    tokens, positions = torch.arange(12)[None], torch.arange(12)[None]
    torch.testing.assert_close(
        load(reread.rank(0))(tokens, positions), load(fused(tiny_hf))(tokens, positions)
    )


def test_reading_back_gives_the_same_logits(tiny_hf: Path, tmp_path: Path) -> None:
    dropped = drop_attention(huggingface.read(tiny_hf), {2, 3})
    checkpoint = fuse(dropped, [(2, 3)])
    trtllm.convert(checkpoint, tmp_path / "c", dtype="bfloat16")
    reread = trtllm.read(tmp_path / "c")
    assert (reread.dtype, reread.tp_size, reread.kind) == ("bfloat16", 1, "DeciLMForCausalLM")
    tokens, positions = torch.arange(12)[None], torch.arange(12)[None]
    expected = load(checkpoint.cast("bfloat16"))(tokens, positions)
    assert torch.equal(load(reread.rank(0))(tokens, positions), expected)
