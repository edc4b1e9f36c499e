"""Surgery as rewrites: what each does to the tensors, all of them in one plan, and the mapping old -> new."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from builder import export, huggingface, manifest, plan, trtllm
from builder.architecture import FFN
from builder.decoder import load
from builder.errors import UserError
from builder.plan import Plan
from builder.surgery.attention import drop_attention, pool_kv_heads
from builder.surgery.ffn import drop_ffn, narrow_ffn
from builder.surgery.fusion import default_groups

TOKENS = torch.randint(0, 320, (2, 20), generator=torch.Generator().manual_seed(5))
POSITIONS = torch.arange(20).expand(2, 20)


def hf(model: Path) -> dict[str, torch.Tensor]:
    return load_file(model / "model.safetensors")


def test_dropped_ffn_adds_nothing(tiny_hf: Path) -> None:
    """Against transformers with that layer's down projection set to zero."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(tiny_hf)
    with torch.no_grad():
        for index in (1, 4):
            model.model.layers[index].mlp.down_proj.weight.zero_()
        expected = model(TOKENS).logits
    dropped = drop_ffn(huggingface.read(tiny_hf), [1, 4])
    assert dropped.architecture.layers[4].ffn is None
    torch.testing.assert_close(load(dropped)(TOKENS, POSITIONS), expected)


def test_narrowed_ffn_keeps_its_channels(tiny_hf: Path) -> None:
    """Against transformers with the other channels' columns set to zero."""
    from transformers import AutoModelForCausalLM

    kept = [0, 1, 2, 7, 50, 51, 95]
    model = AutoModelForCausalLM.from_pretrained(tiny_hf)
    with torch.no_grad():
        gone = [i for i in range(96) if i not in kept]
        model.model.layers[2].mlp.down_proj.weight[:, gone] = 0
        expected = model(TOKENS).logits
    narrow = narrow_ffn(huggingface.read(tiny_hf), {2: kept})
    assert narrow.architecture.layers[2].ffn == FFN(intermediate_size=7)
    part = narrow.layer(2)
    stored = hf(tiny_hf)
    assert np.array_equal(part["ffn.up.weight"].read_all(), stored["model.layers.2.mlp.up_proj.weight"][kept])
    down = stored["model.layers.2.mlp.down_proj.weight"][:, kept]
    assert np.array_equal(part["ffn.down.weight"].read_all(), down)
    assert np.array_equal(part["ffn.down.weight"].read(3, 9), down[3:9])
    assert np.array_equal(part["ffn.gate.weight"].read(2, 6), part["ffn.gate.weight"].read_all()[2:6])
    torch.testing.assert_close(load(narrow)(TOKENS, POSITIONS), expected)


def test_pooled_heads_are_means(tiny_hf: Path) -> None:
    pooled = pool_kv_heads(huggingface.read(tiny_hf), {3: 1})
    assert [x.num_key_value_heads for x in pooled.architecture.layers] == [2, 2, 2, 1, 2, 2]
    for name in "kv":
        stored = hf(tiny_hf)[f"model.layers.3.self_attn.{name}_proj.weight"]
        x = pooled.tensors[f"layers.3.attention.{name}.weight"]
        assert np.array_equal(x.read_all(), stored.view(2, 16, 64).mean(0).numpy())
        assert np.array_equal(x.read(5, 11), x.read_all()[5:11])


def test_pooling_like_heads_changes_nothing(tiny_hf: Path, tmp_path: Path) -> None:
    """Heads that are alike pool to themselves, so the model must stay the same."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(tiny_hf)
    with torch.no_grad():
        for name in ("k_proj", "v_proj"):
            weight = getattr(model.model.layers[0].self_attn, name).weight
            weight[16:] = weight[:16]
        expected = model(TOKENS).logits
    model.save_pretrained(tmp_path / "m")
    pooled = pool_kv_heads(huggingface.read(tmp_path / "m"), {0: 1})
    torch.testing.assert_close(load(pooled)(TOKENS, POSITIONS), expected)


EVERYTHING = """
drop_attention: [2, 3, 4, 5]
drop_ffn: [3, 1]
ffn_channels: {0: "0-63", 2: [5, 6, 7]}
kv_heads: {1: 1}
fuse: [[2, 5]]
"""


def test_everything_in_one_plan(tiny_hf: Path, tmp_path: Path) -> None:
    """Layer 3 ends up empty and is skipped inside the group; indices are those of the input."""
    file = tmp_path / "plan.yaml"
    file.write_text(EVERYTHING)
    child = plan.read(file).apply(huggingface.read(tiny_hf))
    shapes = [(x.num_key_value_heads, x.intermediate_size, x.members) for x in child.architecture.layers]
    assert shapes == [(2, 64, (0,)), (1, 0, (1,)), (0, 3 + 96 + 96, (2, 4, 5))]
    expected = load(child)(TOKENS, POSITIONS)
    export.write(child, tiny_hf, tmp_path / "hf")
    torch.testing.assert_close(load(huggingface.read(tmp_path / "hf"))(TOKENS, POSITIONS), expected)
    trtllm.convert(child, tmp_path / "c")
    torch.testing.assert_close(load(trtllm.read(tmp_path / "c").rank(0))(TOKENS, POSITIONS), expected)


def test_mapping_from_old_to_new(tiny_hf: Path) -> None:
    child = Plan(drop_attention=(2, 3, 4), drop_ffn=(3, 4), fuse=()).apply(huggingface.read(tiny_hf))
    assert manifest.layer_mapping(child.architecture, 6) == [0, 1, 2, None, None, 3]


def test_empty_layers_do_not_end_a_run(tiny_hf: Path) -> None:
    cut = drop_ffn(drop_attention(huggingface.read(tiny_hf), [1, 2, 3, 4]), [3])
    assert list(cut.architecture.attention_free_runs()) == [(1, 4)]
    assert default_groups(cut.architecture) == [(1, 2)]
    assert default_groups(cut.architecture, include_last=True) == [(1, 4)]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("drop_ffn: [9]", "drop_ffn: layer 9 does not exist; the model has 0-5"),
        ("ffn_channels: {0: 90-96}", "ffn_channels: layer 0 has channels 0-95; 96 was asked for"),
        ("ffn_channels: {0: []}", "ffn_channels: layer 0 has channels 0-95; none was asked for"),
        ("ffn_channels: [1]", r"ffn_channels: \[1\] is not a mapping from layers"),
        ("ffn_channels: {0: 0-99999999999}", "is beyond any layer or channel"),
        ("{drop_ffn: [1], ffn_channels: {1: 0-9}}", "ffn_channels: layer 1 has no FFN to narrow"),
        ("kv_heads: {0: 3}", "kv_heads: layer 0 has 2 KV heads, which cannot become 3"),
        ("kv_heads: {0: 2}", "kv_heads: layer 0 has 2 KV heads, which cannot become 2"),
        ("kv_heads: {0: 0}", "kv_heads: layer 0 has 2 KV heads, which cannot become 0"),
        ("{drop_attention: [0], kv_heads: {0: 1}}", "kv_heads: layer 0 has no KV heads"),
        ("{drop_attention: [0,1,2,3,4,5], drop_ffn: 0-5}", "plan: no layer would be left"),
        ("{drop_attention: [1,2], drop_ffn: [2], fuse: [[1, 2]]}", "fuse: group 1-2 has fewer than two FFNs"),
    ],
)
def test_plans_that_do_not_fit(tiny_hf: Path, tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "plan.yaml").write_text(text)
    with pytest.raises(UserError, match=message):
        plan.read(tmp_path / "plan.yaml").apply(huggingface.read(tiny_hf))


def test_plan_survives_its_file(tmp_path: Path) -> None:
    wanted = Plan(
        drop_attention=(2, 3),
        drop_ffn=(5,),
        ffn_channels=((1, (0, 1, 2, 9, 11, 12)),),
        kv_heads=((0, 1),),
        fuse=((2, 3),),
    )
    plan.write(wanted, tmp_path / "plan.yaml")
    assert "0-2,9,11-12" in (tmp_path / "plan.yaml").read_text()
    assert plan.read(tmp_path / "plan.yaml") == wanted
    assert json.loads(json.dumps(wanted.to_dict()))["kv_heads"] == {"0": 1}
