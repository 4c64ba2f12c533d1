"""Official folders at their true widths, whose files are holes: on the disk they take next to nothing.

All values are zeros but for a few, which form a wire: in each matrix one value leads the signal from one channel
to another, so a matrix that is read from the wrong place, or as another one, cuts it. What goes in is the
color of an image, and what comes out is a word:

    pixels ─► conv1 ─► blocks ─► resampler ─► projection ─► k and v of one head of LLaMA ─► MLP ─► lm_head: a word

A text without an image says BLUE: <s> stands for half a blue image, which the first softmax sees.
"""
import json
import math
import mmap
import struct
from pathlib import Path

import torch

from llama import LlamaConfig
from test_vit import official
from training import ROOT
from vit import PREFIX
from visualchat import CONFIG, TEMPLATE, TRAINED

RED, BLUE = "crimson", "azure"                                  # the last two words of the vocabulary
BOS, EOS, COLON = 1, 2, 19                                      # ids of the tiny tokenizer
SIZES = {"F16": 2, "BF16": 2, "F32": 4}                         # bytes of a value, by safetensors' names
PACKING = {"F16": "<e", "F32": "<f"}
COLOR, MIXED, SHOWN, FEATURE = 1663, 5, 9, 4000                 # channels: of the ViT's, and of its output
QUERY, IMAGE, HEARD, END, OTHER = 2, 4093, 11, 4095, 17         # channels of LLaMA's


# ---- files ----

def write_safetensors(path: Path, shapes: dict[str, tuple], values: dict[str, dict], dtype: str = "F16"):
    """A safetensors file of zeros, except for values: {name: {index: value}}. RoPE's frequencies are F32."""
    header, end = {}, 0
    for name, shape in shapes.items():
        of = "F32" if name.endswith("inv_freq") else dtype
        begin, end = end, end + math.prod(shape) * SIZES[of]
        header[name] = {"dtype": of, "shape": shape, "data_offsets": [begin, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with open(path, "wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        file.truncate(8 + len(text) + end)
        for name, at in ((name, at) for name in shapes for at in values.get(name, {})):
            flat = 0
            for i, size in zip(at, shapes[name], strict=True):
                assert 0 <= i < size
                flat = flat * size + i
            file.seek(8 + len(text) + header[name]["data_offsets"][0] + flat * SIZES[dtype])
            file.write(struct.pack(PACKING[dtype], values[name][at]))


def write_pickle(path: Path, shapes: dict[str, tuple], values: dict[str, dict]):
    """The same as a pickle of BF16 tensors, as `torch.save` writes it."""
    with torch.serialization.skip_data():                       # leaves holes where the values would be
        torch.save({name: torch.empty(shape, dtype=torch.bfloat16) for name, shape in shapes.items()}, path)
    with torch.serialization.set_default_mmap_options(mmap.MAP_SHARED):     # so that it writes into the file
        tensors = torch.load(path, mmap=True, weights_only=True)
        for name, at in ((name, at) for name in shapes for at in values.get(name, {})):
            tensors[name][at] = values[name][at]


def write_shards(folder: Path, single: str, shapes: dict[str, tuple], values: dict[str, dict], n: int):
    """Files such as model-00001-of-00002.safetensors, and their index."""
    stem, suffix = single.split(".")
    name_of = [f"{stem}-{i:05}-of-{n:05}.{suffix}" for i in range(1, n + 1)]
    where = {name: name_of[i * n // len(shapes)] for i, name in enumerate(shapes)}
    for file in name_of:
        part = {name: shape for name, shape in shapes.items() if where[name] == file}
        (write_pickle if suffix == "bin" else write_safetensors)(folder / file, part, values)
    index = {"metadata": {"total_size": 2 * sum(map(math.prod, shapes.values()))}, "weight_map": where}
    (folder / f"{single}.index.json").write_text(json.dumps(index))


# ---- LLaMA ----

def llama_shapes(sizes: LlamaConfig) -> dict[str, tuple]:
    """Names and shapes of the official checkpoint."""
    width, mlp = sizes.hidden_size, sizes.intermediate_size
    kv_width = width * sizes.num_key_value_heads // sizes.num_attention_heads
    of_layer = {"self_attn.q_proj": (width, width), "self_attn.k_proj": (kv_width, width),
                "self_attn.v_proj": (kv_width, width), "self_attn.o_proj": (width, width),
                "mlp.gate_proj": (mlp, width), "mlp.up_proj": (mlp, width), "mlp.down_proj": (width, mlp),
                "input_layernorm": (width,), "post_attention_layernorm": (width,)}
    return {"model.embed_tokens.weight": (sizes.vocab_size, width),
            **{f"model.layers.{i}.{name}.weight": shape for i in range(sizes.num_hidden_layers)
               for name, shape in of_layer.items()},
            "model.norm.weight": (width,), "lm_head.weight": (sizes.vocab_size, width)}


def words(vocabulary: int) -> dict[tuple, float]:
    """The token embedding: <s> looks half like a blue image, a colon asks, and a word of color ends the answer."""
    return {(BOS, IMAGE): -1, (BOS, OTHER): 1.75, (COLON, QUERY): 1, (vocabulary - 1, END): 30,
            (vocabulary - 2, END): 30}


def llama_wire(sizes: LlamaConfig) -> dict[str, dict]:
    """Values for one layer. A channel that stands alone becomes √C in RMSNorm, which `unit` makes 1 again.

    The keys of <s> and of red images are large where the last query looks, so that red wins over blue; where all
    keys weigh the same, blue would. RoPE turns that channel of the head slowest. The first neuron of the
    MLP gives x·silu(x) and the last one -x·silu(-x), which up_proj and gate_proj could not in each other's place.
    """
    unit, mlp = sizes.hidden_size ** -0.5, sizes.intermediate_size - 1
    group = sizes.num_attention_heads // sizes.num_key_value_heads
    kv_head = sizes.num_key_value_heads - 3                     # 5 of 70b's 0 to 7
    head = kv_head * group + group // 2                         # one of the middle of those that share it
    slowest = 63                                                # pairs with 127
    layer = {"input_layernorm": {(QUERY,): 1, (IMAGE,): 1, (OTHER,): 1}, "post_attention_layernorm": {(HEARD,): 1},
             "self_attn.q_proj": {(head * 128 + slowest, QUERY): 16 * unit},
             "self_attn.k_proj": {(kv_head * 128 + slowest, IMAGE): 8 * unit,
                                  (kv_head * 128 + slowest, OTHER): 16 * unit},
             "self_attn.v_proj": {(kv_head * 128 + 3, IMAGE): unit},
             "self_attn.o_proj": {(HEARD, head * 128 + 3): 1},
             "mlp.gate_proj": {(0, HEARD): 8 * unit, (mlp, HEARD): -8 * unit},
             "mlp.up_proj": {(0, HEARD): -8 * unit, (mlp, HEARD): 8 * unit},
             "mlp.down_proj": {(QUERY + 1, 0): -1, (QUERY + 4, mlp): -1}}
    return {"model.embed_tokens.weight": words(sizes.vocab_size),
            **{f"model.layers.0.{name}.weight": values for name, values in layer.items()},
            "model.norm.weight": {(QUERY + 1,): 1, (QUERY + 4,): 1, (END,): 1},
            "lm_head.weight": {(sizes.vocab_size - 1, QUERY + 1): 8 * unit, (EOS, END): 8 * unit,
                               (sizes.vocab_size - 2, QUERY + 4): 8 * unit}}


def tokenizer(vocabulary: int) -> bytes:
    """The tiny tokenizer with as many pieces as the vocabulary has; the last two are the words for colors."""
    def entry(piece: str, kind: int) -> bytes:                  # of sentencepiece's file: text, score, kind
        inner = b"\x0a" + bytes([len(piece.encode())]) + piece.encode() + b"\x15" + struct.pack("<f", -1e6)
        inner += bytes([0x18, kind])
        return b"\x0a" + bytes([len(inner)]) + inner

    normal, whole = 1, 4                                        # made of other pieces, or taken as it stands
    more = [entry(f"▁no{i}", normal) for i in range(1021, vocabulary - 2)]
    return b"".join([(ROOT / "weights/tiny/llama/tokenizer.model").read_bytes(), *more,
                     entry(f"▁{BLUE}", whole), entry(f"▁{RED}", whole)])


def write_llama(folder: Path, sizes: LlamaConfig, n_shards: int = 2,
                extra: dict[str, tuple] | None = None) -> Path:
    """An official folder; extra: more tensors, or others of the same names."""
    folder.mkdir(parents=True)
    values = {name: found for name, found in llama_wire(sizes).items() if name not in (extra or {})}
    write_shards(folder, "model.safetensors", llama_shapes(sizes) | (extra or {}), values, n_shards)
    (folder / "tokenizer.model").write_bytes(tokenizer(sizes.vocab_size))
    (folder / "config.json").write_text(json.dumps({
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_act": "silu", "bos_token_id": 1,
        "eos_token_id": 2, "pretraining_tp": 1, "rope_scaling": None, "tie_word_embeddings": False,
        "torch_dtype": "float16", "use_cache": True, **vars(sizes)}))
    return folder


# ---- ViT ----

def vit_shapes(layers: int) -> dict[str, tuple]:
    """Names and shapes of Qwen-VL's encoder, with so many of its 48 blocks, and with `proj`."""
    kept = {name: shape for name, shape in official().items()
            if "resblocks" not in name or int(name.split(".")[2]) < layers}
    return {PREFIX + name: shape for name, shape in (kept | {"proj": (4096, 4096)}).items()}


def vit_wire() -> dict[str, dict]:
    """Values for two blocks (with one, the wire is cut), each of which passes the signal on to another channel.

    A channel that stands alone becomes √C in LayerNorm: 41 in the ViT and 64 in the resampler.
    """
    values = {"conv1.weight": {(COLOR, 0, 13, 13): 1, (COLOR, 2, 13, 13): -1}, "ln_pre.weight": {(COLOR,): 1}}
    for i, (head, old, middle, new, loud) in enumerate([(5, COLOR, 700, MIXED, 41), (9, MIXED, 800, SHOWN, 1)]):
        of_block = {
            "ln_1": {(old,): 1}, "ln_2": {(middle,): 1},
            # q, k and v of a head lie one after the other, each 104 wide
            "attn.in_proj": {(head * 312 + 208 + 7, old): 1 / loud},
            "attn.out_proj": {(middle, head * 104 + 7): 1},
            "mlp.c_fc": {(8191, middle): 4, (8190, middle): -4},
            "mlp.c_proj": {(new, 8191): .25, (new, 8190): -.25}}    # gelu(4x) - gelu(-4x) = 4x
        values |= {f"transformer.resblocks.{i}.{name}.weight": found for name, found in of_block.items()}
    values |= {"attn_pool.kv_proj.weight": {(77, SHOWN): 1}, "attn_pool.ln_kv.weight": {(77,): 1},
               "attn_pool.attn.in_proj_weight": {(8192 + 31 * 128 + 5, 77): 1 / 64},      # [q; k; v]
               "attn_pool.attn.out_proj.weight": {(FEATURE, 31 * 128 + 5): 1}, "ln_post.weight": {(FEATURE,): 1}}
    return {PREFIX + name: found for name, found in values.items()}


def write_vit(folder: Path, layers: int = 2, image_size: int = 448,
              extra: dict[str, tuple] | None = None) -> Path:
    """An official Qwen-VL folder; image_size shows in no tensor's shape.

    Of its language model there are a tensor beside the encoder's, a file that holds no weights, and one that is
    absent, because nobody should open them.
    """
    folder.mkdir(parents=True)
    beside = {"transformer.h.31.ln_2.weight": (4096,)}
    write_shards(folder, "pytorch_model.bin", beside | vit_shapes(layers) | (extra or {}), vit_wire(), 3)
    (folder / "pytorch_model-00000-of-00003.bin").write_bytes(b"no weights at all")
    index = folder / "pytorch_model.bin.index.json"
    found = json.loads(index.read_text())
    found["weight_map"] |= {"transformer.wte.weight": "pytorch_model-00000-of-00003.bin",
                            "lm_head.weight": "pytorch_model-00004-of-00003.bin"}
    index.write_text(json.dumps(found))
    (folder / "config.json").write_text(json.dumps({"model_type": "qwen", "visual": {
        "heads": 16, "image_size": image_size, "image_start_id": 151857, "layers": layers, "mlp_ratio": 4.9231,
        "output_dim": 4096, "patch_size": 14, "width": 1664}}))
    return folder


# ---- a training result ----

def write_result(folder: Path, size: str, llama: Path, vit: Path, sizes: LlamaConfig) -> Path:
    """A result that adds the projection to the wire."""
    folder.mkdir(parents=True)
    width, vocabulary = sizes.hidden_size, sizes.vocab_size
    shapes = {"projection.weight": (width, 4096), "projection.bias": (width,),
              "llama.embed_tokens.weight": (vocabulary, width)}
    values = {"projection.weight": {(IMAGE, FEATURE): 1}, "llama.embed_tokens.weight": words(vocabulary)}
    write_safetensors(folder / TRAINED, shapes, values)
    (folder / CONFIG).write_text(json.dumps({"size": size, "llama": str(llama), "vit": str(vit),
                                             "template": TEMPLATE}))
    return folder
