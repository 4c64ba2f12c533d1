"""Claims about vit.py: golden features, official names and shapes, both folder formats."""
import json
import shutil
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import nn

from vit import VisionAttention, VisionConfig, VisionTransformer, resized

GOLDEN = Path(__file__).parent / "golden" / "vit_open"


def weights():
    return load_file(GOLDEN / "model.safetensors")


# ---- the encoder ----

@torch.no_grad()
def test_golden_features():
    expected = load_file(GOLDEN / "expected.safetensors")
    features = VisionTransformer.from_pretrained(GOLDEN)(expected["pixels"])
    torch.testing.assert_close(features, expected["features"], atol=1e-4, rtol=0)


def official():
    """Names and shapes of the official checkpoint under `transformer.visual.`, without proj."""
    shapes = {"conv1.weight": (1664, 3, 14, 14), "positional_embedding": (256, 1664),
              "attn_pool.query": (256, 4096), "attn_pool.pos_embed": (256, 4096),
              "attn_pool.kv_proj.weight": (4096, 1664),
              "attn_pool.attn.in_proj_weight": (12288, 4096), "attn_pool.attn.in_proj_bias": (12288,),
              "attn_pool.attn.out_proj.weight": (4096, 4096), "attn_pool.attn.out_proj.bias": (4096,)}
    norms = {"ln_pre": 1664, "attn_pool.ln_q": 4096, "attn_pool.ln_kv": 4096, "ln_post": 4096}
    for i in range(48):
        block = f"transformer.resblocks.{i}"
        norms |= {f"{block}.ln_1": 1664, f"{block}.ln_2": 1664}
        for name, out, into in (("attn.in_proj", 4992, 1664), ("attn.out_proj", 1664, 1664),
                                ("mlp.c_fc", 8192, 1664), ("mlp.c_proj", 1664, 8192)):
            shapes |= {f"{block}.{name}.weight": (out, into), f"{block}.{name}.bias": (out,)}
    return shapes | {f"{name}.{part}": (size,) for name, size in norms.items() for part in ("weight", "bias")}


def test_official_names_shapes_and_size():
    with torch.device("meta"):
        vit = VisionTransformer(VisionConfig())
    assert {name: tuple(t.shape) for name, t in vit.state_dict().items()} == official()
    assert sum(p.numel() for p in vit.parameters()) == 1_918_833_408


def test_attention_is_torch_s_with_heads_regrouped():
    torch.manual_seed(0)
    width, heads = 24, 3
    ours, theirs = VisionAttention(width, heads), nn.MultiheadAttention(width, heads, batch_first=True)

    def regroup(t):                                             # (heads, 3, D) to torch's [q; k; v]
        return t.unflatten(0, (heads, 3, -1)).transpose(0, 1).flatten(0, 2)

    theirs.load_state_dict({"in_proj_weight": regroup(ours.in_proj.weight),
                            "in_proj_bias": regroup(ours.in_proj.bias),
                            "out_proj.weight": ours.out_proj.weight, "out_proj.bias": ours.out_proj.bias})
    x = torch.randn(2, 7, width)
    torch.testing.assert_close(ours(x), theirs(x, x, x)[0], atol=1e-5, rtol=1e-5)


def test_a_grid_of_the_right_size_is_left_alone():
    grid = torch.randn(256, 8)
    assert torch.equal(resized(grid, 256), grid)


def test_a_grid_is_stretched_bicubically():
    grid = torch.randn(256, 8)
    square = grid.view(16, 16, 8).permute(2, 0, 1)
    stretched = [F.interpolate(channel[None, None], scale_factor=2, mode="bicubic")[0, 0] for channel in square]
    torch.testing.assert_close(resized(grid, 1024).T.view(8, 32, 32), torch.stack(stretched), atol=1e-5, rtol=0)
    torch.testing.assert_close(resized(torch.full((256, 8), 3.0), 1024), torch.full((1024, 8), 3.0))


# ---- folders ----

@pytest.fixture
def pickled(tmp_path):
    """The golden weights as two pickled shards beside one of the language model that cannot be read."""
    shutil.copy(GOLDEN / "config.json", tmp_path)
    parts, weight_map = ({}, {}), {"transformer.h.1.ln_1.weight": "pytorch_model-00003-of-00003.bin"}
    for i, (name, tensor) in enumerate(weights().items()):
        parts[i % 2][name] = tensor
    parts[1]["transformer.h.0.ln_1.weight"] = torch.zeros(3)
    for i, part in enumerate(parts, start=1):
        torch.save(part, tmp_path / f"pytorch_model-0000{i}-of-00003.bin")
        weight_map |= dict.fromkeys(part, f"pytorch_model-0000{i}-of-00003.bin")
    (tmp_path / "pytorch_model-00003-of-00003.bin").write_bytes(b"no weights at all")
    (tmp_path / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return tmp_path


def test_pickled_shards_and_safetensors_load_alike_without_proj(pickled):
    expected = {name.removeprefix("transformer.visual."): t for name, t in weights().items()}
    del expected["proj"]
    for folder in (pickled, GOLDEN):
        found = VisionTransformer.from_pretrained(folder).state_dict()
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_loading_is_strict(tmp_path):
    shutil.copy(GOLDEN / "config.json", tmp_path)
    save_file(weights() | {"transformer.visual.ln_post.bias": torch.zeros(5)}, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match=r"ln_post.bias is \(5,\), expected \(128,\)"):
        VisionTransformer.from_pretrained(tmp_path)


@pytest.mark.parametrize("absent", ["config.json", "pytorch_model-00002-of-00003.bin"])
def test_absent_files_are_named(pickled, absent):
    (pickled / absent).unlink()
    with pytest.raises(FileNotFoundError, match=absent):
        VisionTransformer.from_pretrained(pickled)


@pytest.mark.parametrize("config", ["{}", '{"visual": {"width": 64}}', "no json"])
def test_a_folder_of_another_model_is_refused(pickled, config):
    (pickled / "config.json").write_text(config)
    with pytest.raises(ValueError, match="visual|QWen-VL|JSON"):
        VisionTransformer.from_pretrained(pickled)
