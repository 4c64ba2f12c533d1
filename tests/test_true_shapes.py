"""Claims about official folders at their true widths: they load, answer and train, in the types of their files.

The files are holes with a wire of single values (sparse.py), so answers are known, and a matrix that is read from
another place or as another one cuts the wire. What it does not show: anything about the values beside the wire,
such as sums over many channels, which the golden files of the other tests do. Few layers: a model of all of them
does not fit into a test's memory; of all of them, names and shapes are checked.
"""
import csv
import json
import shutil
import subprocess
import sys
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from PIL import Image
from safetensors import safe_open

from chat import Chat
from llama import LLAMA_2, Llama, Tokenizer
from sparse import BLUE, RED, write_llama, write_result, write_vit
from training import ROOT, losses
from visualchat import ModelConfig, build, load
from vit import VisionTransformer

ONE = {size: replace(sizes, num_hidden_layers=1) for size, sizes in LLAMA_2.items()}
FREQUENCIES = {"model.layers.0.self_attn.rotary_emb.inv_freq": (64,)}       # as some official shards have them


@pytest.fixture(scope="module")
def there(tmp_path_factory):
    """The folders of both towers and of results at 7b's and at 70b's widths, and two images."""
    at = tmp_path_factory.mktemp("true")
    vit = write_vit(at / "vit")
    llama = {"7b": write_llama(at / "7b", ONE["7b"], 2, FREQUENCIES),
             "70b": write_llama(at / "70b", ONE["70b"], 3)}
    result = {size: write_result(at / f"of-{size}", size, folder, vit, ONE[size])
              for size, folder in llama.items()}
    for name, color in (("red", (255, 0, 0)), ("blue", (0, 0, 255))):
        Image.new("RGB", (448, 448), color).save(at / f"{name}.png")
    yield SimpleNamespace(at=at, vit=vit, llama=llama, result=result, red=at / "red.png", blue=at / "blue.png")
    shutil.rmtree(at)                                   # whoever copies the holes would make gigabytes of them


def test_the_files_take_no_room(there):
    files = [file.stat() for file in there.at.rglob("*") if file.is_file()]
    assert sum(file.st_size for file in files) > 4e9 and sum(file.st_blocks * 512 for file in files) < 2e7


def test_whole_folders_of_70b_fit_the_model_by_every_name_and_shape(tmp_path):
    """All layers, 48 blocks, as many shards as the official ones. No value is read."""
    try:
        folders = write_llama(tmp_path / "llama", LLAMA_2["70b"], 15), write_vit(tmp_path / "vit", 48)
        model = build(ModelConfig("70b", llama=str(folders[0]), vit=str(folders[1])), torch.float16, "meta")
        assert sum(p.numel() for p in model.llama.parameters()) == 68_976_648_192
        assert sum(p.numel() for p in model.vit.parameters()) == 1_918_833_408
        assert model.projection.weight.shape == (8192, 4096)
        assert {p.dtype for p in model.parameters()} == {torch.float16}
    finally:
        shutil.rmtree(tmp_path)


def test_towers_come_in_the_types_of_their_files(there):
    llama, vit = Llama.from_pretrained(there.llama["7b"]), VisionTransformer.from_pretrained(there.vit)
    assert {p.dtype for p in llama.parameters()} == {torch.float16}
    assert {p.dtype for p in vit.parameters()} == {torch.bfloat16}
    assert llama.embed_tokens.weight[31999, 4095] == 30 and vit.conv1.weight[1663, 2, 13, 13] == -1


def test_the_program_answers_at_7b_s_width(there):
    """FP32. The red image's color goes through both blocks, whose heads hold q, k and v interleaved, resampler,
    projection, the layer and its MLP."""
    done = subprocess.run([sys.executable, str(ROOT / "chat.py"), "--model", str(there.result["7b"]), "--quiet",
                           "--question", "Is it?", "--question", f"{there.red} And this?"], cwd=there.at,
                          capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == [BLUE, RED]                   # without an image <s> stands for a blue one


def test_70b_s_width_answers_in_the_types_of_its_files(there):
    """LLaMA in FP16, with 8 heads of keys and values for 64. The keys of the red image win over those of the blue
    one, by a channel that RoPE hardly turns. Without instructions for 16 bits a processor takes half a minute for
    the ViT of an image, so it computes in FP32."""
    model, config = load(there.result["70b"], torch.float16)
    model.vit.float()
    model.vit.register_forward_pre_hook(lambda vit, images: images[0].float())
    model.vit.register_forward_hook(lambda vit, images, features: features.half())
    chat = Chat(model, Tokenizer(config.llama, 32000))
    assert model.llama.layers[0].self_attn.k_proj.weight.shape == (8 * 128, 8192)
    assert chat.ask("Is one red?", there.blue, there.red) == RED


def test_two_ranks_train_a_step_at_70b_s_width_and_chat_opens_the_result(tmp_path, monkeypatch):
    """BF16, 8,192 wide, 64 heads with 8 of keys and values; true widths of the ViT, of which one block.

    Reduced, because ranks on a CPU pass each other gigabytes: MLP 2,048 instead of 28,672, 2,048 words instead of
    32,000, images of 224 x 224 instead of 448 x 448. The projection is fresh, so nothing here depends on what an
    image shows. That both ranks loaded all of LLaMA shows in the loss: with logits of 8 for the right word and for
    what ends the answer, and of 0 for nearly all others, it is log(e^8 + 2047) - 8; zeros would give log(2048).
    """
    sizes = replace(ONE["70b"], intermediate_size=2048, vocab_size=2048)
    llama, vit = write_llama(tmp_path / "llama", sizes), write_vit(tmp_path / "vit", 1, image_size=224)
    (tmp_path / "data/llava").mkdir(parents=True)
    (tmp_path / "data/coco/train2017").mkdir(parents=True)
    Image.new("RGB", (224, 224), "blue").save(tmp_path / "data/coco/train2017/blue.jpg")
    records = [{"id": str(i), "conversations": [{"from": "human", "value": "Is it red?"},
                                                {"from": "gpt", "value": BLUE}]} for i in range(24)]
    for record in records[::8]:
        record["image"] = "blue.jpg"
        record["conversations"][0]["value"] += "\n<image>"
    (tmp_path / "data/llava/conversation_58k.json").write_text(json.dumps(records))
    monkeypatch.setenv("THP_MEM_ALLOC_ENABLE", "1")     # PyTorch takes memory in larger pages: less time
    loss, = losses(tmp_path, "out", "--size", "70b", "--llama", str(llama), "--vit", str(vit), "--data", "data",
                   "--datasets", "llava_dial", "--batch", "12", "--precision", "bf16", ranks=2)
    assert loss == pytest.approx(torch.tensor(8).exp().add(2047).log().item() - 8, abs=0.03)
    with open(tmp_path / "out/log.csv") as file:
        row, = csv.DictReader(file)
    assert float(row["val_loss"]) == pytest.approx(loss, abs=0.03) and float(row["exact_match"]) == 1
    with safe_open(tmp_path / "out/trained.safetensors", "pt") as file:
        embedding = file.get_tensor("llama.embed_tokens.weight")
        projection = file.get_tensor("projection.weight")
    assert embedding.shape == (2048, 8192) and projection.shape == (8192, 4096) and projection.any()
    changed = embedding.any(dim=1).nonzero()[:, 0].tolist()     # words of the data, and those of the wire
    assert 5 < len(changed) < 60 and {1, 19, 2046, 2047} < set(changed)
    assert Chat.open(tmp_path / "out").ask("Is it red?") == BLUE


@pytest.mark.parametrize("tower, name, shape, expected", [
    ("llama", "layers.0.self_attn.k_proj.weight", (8192, 8192), (1024, 8192)),      # as without grouped queries
    ("llama", "layers.0.mlp.down_proj.weight", (28672, 8192), (8192, 28672)),
    ("vit", "transformer.resblocks.1.attn.in_proj.bias", (1664,), (4992,)),
    ("vit", "attn_pool.pos_embed", (1024, 4096), (256, 4096))])
def test_a_tensor_of_another_shape_is_refused_by_name(there, tmp_path, tower, name, shape, expected):
    folders = {"llama": there.llama["70b"], "vit": there.vit}
    prefix = "model." if tower == "llama" else "transformer.visual."
    extra = {prefix + name: shape}
    folders[tower] = (write_llama(tmp_path / tower, ONE["70b"], extra=extra) if tower == "llama"
                      else write_vit(tmp_path / tower, extra=extra))
    with pytest.raises(ValueError, match="does not fit the model") as raised:
        build(ModelConfig("70b", **{kind: str(folder) for kind, folder in folders.items()}), device="meta")
    assert f"{folders[tower]} does not fit the model: {name} is {shape}, expected {expected}" in str(raised.value)
    shutil.rmtree(tmp_path)
