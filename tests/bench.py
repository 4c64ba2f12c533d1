"""What things cost, as ratios within one run. Not part of the test suite.

    python tests/bench.py attention   both forms of MMCA and plain causal attention, there and back: time, memory
    python tests/bench.py step        a training step against transformers' LLaMA: time, memory, share of the limit
    python tests/bench.py decode      tokens per second against transformers' generate, share of memory bandwidth
    python tests/bench.py chat        time to the first token in eight rounds with eight images
    python tests/bench.py questions   evaluate.py on 500 questions of the tiny world, many at once against one
    python tests/bench.py start       from the command to the first prompt of chat.py, beside `import torch` alone
    python tests/bench.py packing     packed conversations against padded ones, all nine datasets of the tiny world
    python tests/bench.py two_softmaxes   how much longer the second softmax makes the residual stream of --model
    python tests/bench.py images      memory: one image out of a 2 GB JSON file of base64 texts
    python tests/bench.py worst       memory and time: opening images that are as large as vit.py takes, or larger
    python tests/bench.py features    time: a training step on kept features against one that runs the ViT
    python tests/bench.py loading     memory and time: two ZeRO-3 ranks load a random LLaMA of a billion parameters
    python tests/bench.py plan        memory of a training step of that model against what --plan predicts
    python tests/bench.py gpu         all that needs a card, within ten minutes, into results/gpu.md (tests/gpu.py)

The first four take --precision, the three after the first also --size 7b, for a GPU: random weights of that size.
They print medians. `loading` and `plan` measure a CPU process, so they say nothing about a GPU's memory.
"""
import argparse
import base64
import json
import os
import random
import resource
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, replace
from functools import partial
from io import BytesIO
from pathlib import Path
from statistics import median

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import save_file

import mmca as mmca_module
from album import KeptFeatures
from chat import Chat
from data import Answered, Conversations, collate, encode, pack, to_tensors
from decode import compile_step, with_short_weights
from llama import LLAMA_2, Cache, Llama, LlamaConfig, Tokenizer, read_llama_config
from mmca import IMAGE, TEXT, compact_attention, mmca, separate
from pixels import load_pixels
from sources import COCO, DIALOGUE, Reader, encoded_images, llava, read_datasets
from tiny import world
from tiny.pretrain import VIT
from vit import VisionConfig, VisionTransformer
from visualchat import IGNORE, ModelConfig, VisualChat, build, load, towers


DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
PER_IMAGE = 256                 # tokens, as at the real sizes
ANSWER = 48                     # tokens in a round of `chat`, a sentence or two


# ---- measuring ----

def finish():
    if DEVICE.type == "cuda":
        torch.cuda.synchronize()


def times(actions: dict, repeat: int = 7) -> dict[str, float]:
    """Median seconds of each action; they take turns, so that a slow moment of the machine meets them all."""
    found = {name: [] for name in actions}
    for i in range(repeat + 1):
        for name, action in actions.items():
            finish()
            started = time.perf_counter()
            action()
            finish()
            if i:                                               # the first one warms up
                found[name].append(time.perf_counter() - started)
    return {name: median(seconds) for name, seconds in found.items()}


def resident() -> tuple[float, float]:
    """This process's resident memory now and at its peak, in MB of 1,000,000 bytes."""
    found = dict(line.split(":") for line in Path("/proc/self/status").read_text().splitlines())
    return tuple(int(found[name].split()[0]) * 1024 / 1e6 for name in ("VmRSS", "VmHWM"))


def peak_of(action) -> float:
    """MB that an action needs at its height, beyond what was there before; in its own process, see `alone`."""
    if DEVICE.type == "cuda":
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        action()
        return (torch.cuda.max_memory_allocated() - before) / 1e6
    Path("/proc/self/clear_refs").write_text("5")               # Linux: the peak starts anew
    before = resident()[0]
    action()
    return resident()[1] - before


def alone(*arguments: str) -> float:
    """What a process of its own prints, run so that freed memory is given back at once."""
    command = [sys.executable, __file__, *arguments]
    done = subprocess.run(command, check=True, env=os.environ | {"MALLOC_MMAP_THRESHOLD_": str(2 ** 16)},
                          stdout=subprocess.PIPE, text=True)
    return float(done.stdout.split()[-1])


def rate(dtype: torch.dtype) -> float:
    """Operations per second of a large matrix product, the most that this machine was seen to do."""
    side = 8192 if DEVICE.type == "cuda" else 2048
    a = torch.randn(side, side, dtype=dtype, device=DEVICE)
    return 2 * side ** 3 / times({"mm": lambda: a @ a})["mm"]


# ---- (a) attention ----

def kinds(length: int, n_images: int) -> torch.Tensor:
    """kind (1, length): images evenly among the text, some text first and last."""
    text = length - n_images * PER_IMAGE
    found = ([TEXT] * (text // (n_images + 1)) + [IMAGE] * PER_IMAGE) * n_images
    return torch.tensor([found + [TEXT] * (length - len(found))])


def forms(length: int, n_images: int, dtype: torch.dtype, heads: int = 8, width: int = 64) -> dict:
    """Forward and backward pass of each form of attention over one conversation, inputs as llama.py has them."""
    kind = kinds(length, n_images)
    where = separate(kind)
    q, k, v, out = (torch.randn(1, heads, length, width, dtype=dtype, device=DEVICE) for _ in range(4))
    whole = [x.clone().requires_grad_() for x in (q, k, v)]
    flat_q, flat_k, flat_v, flat_out = (x[0].transpose(0, 1)[where.index].contiguous() for x in (q, k, v, out))
    parts = [x.clone().requires_grad_() for x in (flat_q[:where.n_text], flat_k, flat_v)]

    def compact():
        compact_attention(*parts, separate(kind.to(DEVICE))).backward(flat_out)

    return {"explicit": lambda: mmca(*whole, kind.to(DEVICE)).backward(out), "compact": compact,
            "causal": lambda: F.scaled_dot_product_attention(*whole, is_causal=True).backward(out)}


def attention(options):
    """Milliseconds of the three forms; then MB at the height, which should double with the length."""
    shape = (32, 128) if options.size else (8, 64)  # heads and their width, at 7b or in the small model

    def height(name: str, length: int) -> float:
        if DEVICE.type == "cuda":
            return peak_of(forms(length, length // 2 // PER_IMAGE, DTYPES[options.precision], *shape)[name])
        return alone("memory", "--step", f"{name} {length}", "--precision", options.precision)

    for length in (1024, 2048, 4096):
        for n_images in (1, 2, 4, 7, 8):
            if n_images * PER_IMAGE < length:
                found = times(forms(length, n_images, DTYPES[options.precision], *shape), 5)
                ratios = {name: found["compact"] / found[name] for name in ("causal", "explicit")}
                print(f"T = {length}, {n_images} images:",
                      *(f"{name} {1e3 * seconds:.1f} ms," for name, seconds in found.items()),
                      *(f"compact / {name} {ratio:.2f}" for name, ratio in ratios.items()), flush=True)
    for length in (1024, 2048, 4096):
        print(f"T = {length}, half of it images, MB:", *(
            f"{name} {height(name, length):.0f}" for name in ("explicit", "compact", "causal")), flush=True)


# ---- (b) a training step, (c) decoding ----

def sizes(options) -> LlamaConfig:
    if options.size:
        return LLAMA_2[options.size]
    dim = options.dim or 512
    heads = max(8, dim // 128)
    return LlamaConfig(dim, dim * 43 // 16, 8, heads, heads)


def random_llama(config: LlamaConfig, dtype: torch.dtype, wide: bool = False) -> Llama:
    """Random weights, with values that 16 bits hold, as those in the official files, or wide ones that need 32."""
    with torch.device("meta"):
        llama = Llama(config).to(dtype)
    llama = llama.to_empty(device=DEVICE).requires_grad_(False)
    for name, parameter in llama.named_parameters():
        parameter.fill_(1) if "norm" in name else parameter.normal_(std=parameter.shape[1] ** -0.5)
        parameter.copy_(parameter if wide else parameter.half())
    return llama


def their_llama(llama: Llama):
    """transformers' model with the same weights, in the same memory."""
    import transformers
    config = transformers.LlamaConfig(**asdict(llama.config), attn_implementation="sdpa")
    with torch.device("meta"):
        theirs = transformers.LlamaForCausalLM(config)
    weights = {name if name.startswith("lm_head") else f"model.{name}": p
               for name, p in llama.state_dict().items()}
    theirs.load_state_dict(weights, assign=True)
    theirs.model.rotary_emb = type(theirs.model.rotary_emb)(config).to(DEVICE)      # made on meta, too
    return theirs.requires_grad_(False).eval()


def steps(options) -> tuple[dict, float]:
    """Training steps on the same embeddings, ours and theirs, and the operations that one needs."""
    torch.manual_seed(0)
    dtype, length, n_images = DTYPES[options.precision], options.length, 4 if options.length <= 2048 else 8
    llama = random_llama(sizes(options), dtype)
    config, theirs, kind = llama.config, their_llama(llama), kinds(length, n_images).to(DEVICE)
    text = (kind[0] == TEXT).nonzero()[:, 0]
    labels = torch.full((1, length), IGNORE, device=DEVICE)
    answers = text[-(length // 3):]
    labels[0, answers] = torch.randint(config.vocab_size, (len(answers),), device=DEVICE)
    x = torch.randn(1, length, config.hidden_size, dtype=dtype, device=DEVICE).requires_grad_()

    def ours():
        read = F.pad(labels[:, 1:] != IGNORE, (0, 1))
        llama.recompute = options.recompute
        loss, _ = llama.lm_head(llama(x, kind, read), labels[:, 1:][read[:, :-1]])
        loss.mean().backward()

    # What the step cannot do without: two operations per value and token forward, two for the token's gradient,
    # none for that of frozen weights. An image row needs no query, and in the last layer keys and values alone.
    n_text, n_image, layers = len(text), n_images * PER_IMAGE, config.num_hidden_layers
    layer = sum(p.numel() for p in llama.layers[0].parameters())
    kv = 2 * llama.layers[0].self_attn.k_proj.weight.numel()
    values = (layers * n_text * layer + n_image * ((layers - 1) * (layer - config.hidden_size ** 2) + kv)
              + len(answers) * llama.lm_head.weight.numel())
    pairs = n_text ** 2 / 2 + sum(count * seen for count, seen in separate(kind).segments[0].runs)
    scores = layers * config.hidden_size * pairs                # 2 products forward, 5 backward
    return ({"ours": ours, "transformers": lambda: theirs(inputs_embeds=x, labels=labels).loss.backward()},
            4 * values + 14 * scores)


def step(options):
    actions, needed = steps(options)
    found, limit = times(actions, 5), rate(DTYPES[options.precision])
    print(f"{options.precision}: ours {options.length / found['ours']:.0f} positions/s, transformers "
          f"{options.length / found['transformers']:.0f}, ratio {found['transformers'] / found['ours']:.2f}; "
          f"{needed / found['ours'] / 1e9:.0f} of {limit / 1e9:.0f} GFLOP/s that a matrix product reaches, "
          f"share {needed / found['ours'] / limit:.2f}", flush=True)
    del actions
    arguments = ["--precision", options.precision, "--length", str(options.length)]
    arguments += ["--size", options.size] * bool(options.size) + ["--recompute"] * options.recompute
    arguments += ["--dim", str(options.dim)] * bool(options.dim)
    ours, theirs = (alone("memory", "--step", name, *arguments)
                    for name in ("ours", "transformers"))
    print(f"memory beyond the weights: ours {ours:.0f} MB, transformers {theirs:.0f} MB, "
          f"ratio {ours / theirs:.2f}")


def memory(options):
    """Print the MB that one step or one form of attention needs."""
    name, *length = options.step.split()
    if length:
        length = int(length[0])
        actions = forms(length, length // 2 // PER_IMAGE, DTYPES[options.precision])
    else:
        actions = steps(options)[0]
    actions[name]()
    print(peak_of(actions[name]))


def weight_bytes(llama: Llama) -> int:
    """Bytes of weights that are read for one token: all matrices but the embedding."""
    return sum(p.nbytes for name, p in llama.named_parameters() if p.ndim == 2 and "embed" not in name)


@torch.no_grad()
def decode(options, prompt: int = 64, new: int = 64):
    """Greedy decoding of so many tokens behind a text prompt, with and without reading it; ours also compiled."""
    dtype = DTYPES[options.precision]
    for dim in [options.dim] if options.dim or options.size else [512, 2048]:
        options.dim = dim
        llama = random_llama(sizes(options), dtype, options.wide)
        compiled = compile_step(llama)
        theirs = their_llama(llama)
        theirs.generation_config.eos_token_id, theirs.generation_config.pad_token_id = None, 0
        model = VisualChat(VisionTransformer(VIT).to(DEVICE, dtype), llama)
        ids = torch.randint(3, llama.config.vocab_size, (1, prompt), device=DEVICE)
        kind = torch.full_like(ids, TEXT)

        def ours(step, count: int) -> list[int]:
            cache = Cache(llama, 1, prompt + count)
            logits = model.prefill(llama.embed_tokens(ids), kind, cache)
            return [token.item() for token in model.generate(logits, cache, count, step=step)]

        def transformers(count: int) -> list[int]:
            found = theirs.generate(ids, attention_mask=kind, max_new_tokens=count, do_sample=False)
            return found[0, prompt:].tolist()

        ways = {"ours": partial(ours, None), "ours, compiled": partial(ours, compiled),
                "transformers": transformers}
        started, answers = time.perf_counter(), {name: way(new) for name, way in ways.items()}
        print(f"{options.precision}, width {llama.config.hidden_size}: compiled and warm after "
              f"{time.perf_counter() - started:.0f} s")
        n_bytes = dict.fromkeys(ways, weight_bytes(llama))
        n_bytes["ours, compiled"] = weight_bytes(with_short_weights(llama))
        data = torch.ones(n_bytes["ours"] // 4, device=DEVICE)
        found = times({(name, count): partial(way, count) for name, way in ways.items() for count in (1, new)}
                      | {"read": data.sum}, 7)
        limit = data.nbytes / found["read"]
        whole = {name: new / found[name, new] for name in ways}
        decoding = {name: (new - 1) / (found[name, new] - found[name, 1]) for name in ways}
        for name in ways:
            same = sum(a == b for a, b in zip(answers[name], answers["transformers"]))
            print(f"{name}: {decoding[name]:.1f} tokens/s, {decoding[name] / decoding['transformers']:.2f} of "
                  f"transformers'; with the prompt {whole[name]:.1f}, {whole[name] / whole['transformers']:.2f} "
                  f"({same} of {new} tokens the same); {n_bytes[name] * decoding[name] / 1e9:.1f} of "
                  f"{limit / 1e9:.1f} GB/s, share {n_bytes[name] * decoding[name] / limit:.2f}", flush=True)


# ---- (d) a chat of eight rounds, (e) packing ----

def chat_model(options) -> tuple[VisualChat, Tokenizer]:
    """Random towers for `chat`."""
    dtype, tokenizer = DTYPES[options.precision], Tokenizer(towers(ModelConfig())[0])
    llama = random_llama(replace(sizes(options), vocab_size=tokenizer.model.vocab_size()), dtype)
    vision = VisionConfig() if options.size else VisionConfig(224, 14, 256, 6, 4, 1024, 512, PER_IMAGE, 16)
    return VisualChat(VisionTransformer(vision).to(DEVICE, dtype), llama), tokenizer


def first_token(action) -> float:
    """Seconds until the first item of an iterator; the rest of it is made, too."""
    started = time.perf_counter()
    items = action()
    next(items)
    finish()
    seconds = time.perf_counter() - started
    list(items)
    return seconds


@torch.no_grad()
def chat(options):
    """Seconds to the first token of each round, with the cache and from scratch."""
    torch.manual_seed(0)
    model, tokenizer = chat_model(options)
    question = "What color is the shape in the image? Does any image show a big shape? Describe the image."

    def answer(conversation: Chat, file: Path):
        conversation.max_new_tokens = ANSWER
        yield from conversation.stream(question, file)

    def again(ids: torch.Tensor, kind: torch.Tensor, shown: list[Path]):
        images = torch.stack([load_pixels(file, model.vit.config.image_size) for file in shown]).to(DEVICE)
        cache, x = Cache(model.llama, 1, ids.shape[1] + ANSWER), model.embed(ids, kind, model.image_tokens(images))
        yield from model.generate(model.prefill(x, kind, cache), cache, 1)

    found = []                                                  # per round: kept, again; at last: seen, new
    with tempfile.TemporaryDirectory() as folder:
        files = [Path(folder) / f"{i}.png" for i in range(10)]
        for i, file in enumerate(files):
            world.draw_scene(("big", "red", "star", "left"), random.Random(i)).save(file)
        for _ in range(5):
            conversation, seconds = Chat(model, tokenizer), []
            for i, file in enumerate(files[:8]):
                whole = conversation.encoded(Answered((file,), ("",), question))
                ids, kind = (torch.tensor([values], device=DEVICE) for values in (whole.ids, whole.kind))
                seconds.append((first_token(partial(answer, conversation, file)),
                                first_token(partial(again, ids, kind, files[:i + 1]))))
            seconds.append(tuple(first_token(partial(answer, conversation, file))
                                 for file in (files[0], files[8])))
            found.append(seconds)
    medians = [[median(values) for values in zip(*pair)] for pair in zip(*found)]
    for i, (kept, anew) in enumerate(medians[:8], 1):
        print(f"round {i}: first token after {1e3 * kept:.0f} ms, from scratch {1e3 * anew:.0f} ms, "
              f"ratio {kept / anew:.3f}")
    print(f"then an image seen before: {1e3 * medians[8][0]:.0f} ms, a new one: {1e3 * medians[8][1]:.0f} ms")


def padded(rows: list[dict]) -> dict:
    """The batch that pack would not make: a conversation per row, each as long as the longest."""
    longest = max(len(row["ids"]) for row in rows)
    fill = {"ids": 0, "kind": TEXT, "labels": IGNORE}           # text behind the end changes nothing before it
    features = torch.cat([row["features"] for row in rows])
    return {"features": features, "lengths": [longest] * len(rows)} | {
        name: torch.stack([F.pad(row[name], (0, longest - len(row[name])), value=value) for row in rows])
        for name, value in fill.items()}


def images_of(conversations: list) -> list:
    """All image files of these conversations, each once."""
    return list(dict.fromkeys(file for conversation in conversations for round_ in conversation.rounds
                              for file in round_.images))


def packing(options):
    """Forward and backward of the tiny model over steps of 16 conversations of all nine datasets."""
    world.ensure(Path("data/tiny"))
    model, tokenizer = build(ModelConfig()), Tokenizer(towers(ModelConfig())[0])
    model.freeze()
    conversations = random.Random(0).sample(read_datasets(Path("data/tiny"), ["set2"]), 320)
    with tempfile.TemporaryDirectory() as folder:
        kept = KeptFeatures(Path(folder), model.vit)
        kept.fill(images_of(conversations), model.vit)
        rows = list(Conversations(conversations, tokenizer, model.vit.config, features=kept))
    groups = [rows[i:i + 16] for i in range(0, len(rows), 16)]
    batches = {"packed": [batch for group in groups for batch in pack(group, 4096)],
               "padded": [padded(group) for group in groups]}
    real = sum(len(row["ids"]) for row in rows)
    found = times({name: lambda given=given: [model(**batch)[0].mean().backward() for batch in given]
                   for name, given in batches.items()}, 5)
    for name, given in batches.items():
        positions = sum(batch["ids"].numel() for batch in given)
        print(f"{name}: {1 - real / positions:.1%} of the positions are padding, "
              f"{real / found[name]:.0f} real positions/s")
    print(f"packed is {found['padded'] / found['packed']:.2f} times as fast")


# ---- evaluate.py, and the start of chat.py ----

def ask_all(folder: Path, at_once: int) -> tuple[float, bytes]:
    """Seconds that evaluate.py prints for the questions in a folder, and its table."""
    out = folder / f"{at_once}.csv"
    command = [sys.executable, ROOT / "evaluate.py", folder / "questions.json", "--images", folder, "--out", out,
               "--model", ROOT / "weights/tiny/chat", "--at-once", str(at_once)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return float(done.stdout.split()[-4]), out.read_bytes()


def questions():
    """evaluate.py with one, 32, 64 and 84 conversations at the same time."""
    asked = {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for test in world.ensure_tests(folder):
            for i, conversation in enumerate(llava(Reader(test.name, test), [test / DIALOGUE], test / COCO)):
                if sum(map(len, asked.values())) < 500:
                    asked[f"{test.name} {i}"] = [
                        [one.question, " ".join(str(image.relative_to(folder)) for image in one.images)]
                        for one in conversation.rounds]
        (folder / "questions.json").write_text(json.dumps(asked))
        print(f"{sum(map(len, asked.values()))} questions in {len(asked)} conversations", flush=True)
        alone, table = ask_all(folder, 1)
        for at_once in (32, 64, 84):
            seconds, found = ask_all(folder, at_once)
            print(f"{at_once} at once: {seconds:.1f} s, one at a time {alone:.1f} s, {alone / seconds:.1f} times "
                  f"as fast; the same table: {found == table}", flush=True)


def start():
    """Seconds of a process that imports torch, and of chat.py up to an empty line and its end."""
    ways = {"import torch": ["-c", "import torch"],
            "chat.py": [ROOT / "chat.py", ROOT / "examples/a.png", "--model", ROOT / "weights/tiny/chat"]}
    found = times({name: partial(subprocess.run, [sys.executable, *way], input=b"\n", capture_output=True,
                                 check=True) for name, way in ways.items()}, 5)
    for name, seconds in found.items():
        print(f"{name}: {seconds:.2f} s, {seconds / found['import torch']:.2f} of `import torch`")


# ---- what the second softmax does to the residual stream ----

@torch.no_grad()
def two_softmaxes(options):
    """For text that sees an image, the mean length of the stream after each layer's attention with both softmaxes,
    over that with the first one alone. The last layer computes answers only and is left out."""
    model, config = load(options.model)
    tokenizer, test, vision = Tokenizer(towers(config)[0]), world.ensure_tests(world.DATA)[0], model.vit.config
    conversations = list(llava(Reader(test.name, test), [test / DIALOGUE], test / COCO))[:120]
    batch = collate([to_tensors(encode(conversation.rounds, tokenizer, vision.n_queries), vision.image_size)
                     for conversation in conversations])
    layout, streams, of_images = separate(batch["kind"], batch["lengths"]), [], []
    sees = torch.cat([torch.full((n,), n_seen > 0) for part in layout.segments for n, n_seen in part.runs])
    attend_twice = mmca_module.attend_twice

    def watched(q, text, image, runs):
        out, none = attend_twice(q, text, image, runs), tuple(x[:, :, :0] for x in image)
        of_images.append((out - attend_twice(q, text, none, runs))[0].transpose(0, 1).flatten(1))
        return out

    for layer in model.llama.layers:
        layer.post_attention_layernorm.register_forward_pre_hook(lambda _, inputs: streams.append(inputs[0]))
    mmca_module.attend_twice = watched
    model(**batch)
    mmca_module.attend_twice = attend_twice
    for i, layer in enumerate(model.llama.layers[:-1]):
        both = streams[i][:layout.n_text][sees]
        part = torch.cat(of_images[i * len(conversations):(i + 1) * len(conversations)])[sees]
        alone = both - layer.self_attn.o_proj(part)
        print(f"layer {i + 1}: {(both.norm(dim=-1) / alone.norm(dim=-1)).mean():.2f}")


# ---- data, loading, the plan ----

def images(gigabytes: float = 2):
    """Peak resident memory of building the index and, in a fresh process, of reading one image with it."""
    buffer = BytesIO()
    Image.effect_noise((640, 480), 100).convert("RGB").save(buffer, "JPEG", quality=95)
    text = base64.b64encode(buffer.getvalue()).decode()
    count = round(gigabytes * 1e9 / len(text))
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "SN.json"
        with open(file, "w") as stream:
            stream.write("{")
            for i in range(count):
                stream.write(f'{"," * (i > 0)} "SN_IMG_{i:08d}": "{text}"')
            stream.write("}")
        print(f"{count} images, {file.stat().st_size / 1e9:.2f} GB")
        for what in ("import", "index", "read"):
            command = [sys.executable, __file__, "peak", "--step", what, "--file", str(file)]
            subprocess.run(command, check=True)


def peak(step: str, file: Path):
    """Do one step and print how much its peak of resident memory is beyond the bare process, in MB of 1,000,000
    bytes, and the time taken. The peak of a child process that decodes an image is added."""
    before, started, said = resident()[0], time.perf_counter(), ""
    if step == "open":
        try:
            load_pixels(file, 448)
        except ValueError as error:
            said = f": {error}".replace(str(file), file.name)
    elif step != "import":
        found = encoded_images(file)
    if step == "read":
        load_pixels(list(found.values())[-1], 448)
    child = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024 / 1e6      # with what it began with
    more = resident()[1] - before + max(child - before, 0)
    print(f"{file.name if step == 'open' else step:22}  {more:4.0f} MB, "
          f"{time.perf_counter() - started:.2f} s{said}", flush=True)


def worst():
    """Peak memory, beyond the bare process, and time to open large images of many formats, each in a process."""
    width = 8944                                                # squared a little less than 80,000,000
    with tempfile.TemporaryDirectory() as folder:
        for name, mode, side, more in (
                ("rgb.png", "RGB", width, {}), ("rgba.png", "RGBA", width, {}), ("palette.png", "P", width, {}),
                ("16_bits.png", "I;16", width, {}), ("32_bits.tiff", "I", width, {"compression": "tiff_lzw"}),
                ("float.tiff", "F", width, {"compression": "tiff_lzw"}), ("too_large.tiff", "I", 13300, {
                    "compression": "tiff_lzw"}), ("progressive.jpg", "RGB", width, {"progressive": True}),
                ("cmyk.jpg", "CMYK", width, {}), ("lossless.webp", "RGB", 4890, {"lossless": True, "method": 0}),
                ("rgba.webp", "RGBA", 4890, {"lossless": True, "method": 0}), ("frames.gif", "P", width, {}),
                ("raw.ppm", "RGB", 5700, {}), ("raw.bmp", "RGB", 5700, {})):
            file = Path(folder) / name
            Image.new(mode, (side, side)).save(file, **more)
            subprocess.run([sys.executable, __file__, "peak", "--step", "open", "--file", str(file)], check=True)
            file.unlink()


def features():
    """Forward and backward of the tiny model over the same batches, with the ViT and with what it once made."""
    world.ensure(Path("data/tiny"))
    config = ModelConfig()
    model, tokenizer = build(config), Tokenizer(towers(config)[0])
    model.freeze()
    conversations = read_datasets(Path("data/tiny"), ["set2"])[::8]
    with tempfile.TemporaryDirectory() as folder:
        kept = KeptFeatures(Path(folder), model.vit)
        kept.fill(images_of(conversations), model.vit)
        seconds = {}
        for name, given in (("vit", None), ("kept", kept)):
            rows = Conversations(conversations, tokenizer, model.vit.config, features=given)
            seconds[name] = []
            for i in range(0, min(len(rows), 320), 16):
                started = time.perf_counter()
                batch = collate([rows[k] for k in range(i, i + 16)])
                loaded = time.perf_counter()
                model(**batch)[0].mean().backward()
                seconds[name].append((loaded - started, time.perf_counter() - loaded))
    for i, part in enumerate(("opening the images", "forward and backward")):
        before, after = (median(batch[i] for batch in seconds[name]) for name in ("vit", "kept"))
        print(f"{part}: {1000 * before:.0f} ms with the ViT, {1000 * after:.0f} ms with kept features, "
              f"ratio {after / before:.2f}")


def official_llama(folder: Path, config: LlamaConfig, dtype: torch.dtype):
    """Write an official folder with random weights, in eight shards."""
    with torch.device("meta"):
        shapes_of = {name: t.shape for name, t in Llama(config).state_dict().items()}
    names = list(shapes_of)
    weight_map = {name if name.startswith("lm_head") else f"model.{name}":
                  f"model-{8 * i // len(names)}.safetensors" for i, name in enumerate(names)}
    for file in sorted(set(weight_map.values())):
        tensors = {}
        for name in (name for name, where in weight_map.items() if where == file):
            shape = shapes_of[name.removeprefix("model.")]
            value = torch.ones(shape) if "norm" in name else torch.randn(shape, device=DEVICE) * shape[-1] ** -0.5
            tensors[name] = value.to("cpu", dtype)
        save_file(tensors, folder / file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    (folder / "config.json").write_text(json.dumps({"model_type": "llama", **asdict(config)}))


def loading(step: str = ""):
    """Two ranks load; beside it `dd` reads the same files. With a step, each also trains once."""
    with tempfile.TemporaryDirectory() as folder:
        official_llama(Path(folder), LlamaConfig(2048, 5632, 18, 16, 16), torch.bfloat16)    # a billion
        files = sorted(Path(folder).glob("*.safetensors"))
        size = sum(file.stat().st_size for file in files)
        started = time.perf_counter()
        for file in files:
            subprocess.run(["dd", f"if={file}", "of=/dev/null", "bs=16M"], check=True, stderr=subprocess.DEVNULL)
        print(f"weights {size / 1e6:.0f} MB, dd {time.perf_counter() - started:.2f} s")
        ranks(folder, step)


def ranks(folder: Path | str, step: str):
    """Two processes that run `rank`."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", __file__,
               "rank"]
    # Left to itself, glibc keeps blocks of up to 32 MB when they are freed, and here those would be gigabytes.
    subprocess.run([*command, "--file", str(folder), "--step", step], check=True,
                   env={"OMP_NUM_THREADS": "1", **os.environ, "MALLOC_MMAP_THRESHOLD_": str(2 ** 18)})


def plan():
    """The steps of a billion parameters, with and without recomputing, and of the tiny size in float32."""
    for step in ("whole", "recompute"):
        loading(step)
    ranks(towers(ModelConfig())[0], "tiny")


def rank(folder: Path, step: str):
    """One rank of `loading` or `plan`."""
    import recipe
    import train
    import zero
    zero.start()
    tiny, length, n_images = step == "tiny", 1024, 8
    config, llama = ModelConfig(llama=str(folder)), read_llama_config(folder / "config.json")
    zero.published_sizes = lambda size: (llama, VIT)
    rows = 16 if tiny else 1
    options = recipe.for_size(recipe.Options(precision="fp32" if tiny else "bf16", batch=2 * rows,
                                             positions=rows * length, recompute=step == "recompute"))
    before = resident()[0]
    zero.dist.barrier()
    started = time.perf_counter()
    model = zero.build_shared_out(config, zero.settings_for(options, 2))
    seconds = time.perf_counter() - started
    print(f"rank {zero.dist.get_rank()}: bare process {before:.0f} MB, peak while loading "
          f"{resident()[1]:.0f} MB, {seconds:.2f} s", flush=True)
    zero.dist.barrier()
    if not step:
        return
    model.freeze()
    model.llama.recompute = options.recompute
    engine = zero.engine_for(model, options, 10, universal=False)
    kind = torch.full((rows, length), TEXT)
    kind[:, 8:8 + n_images * VIT.n_queries] = IMAGE
    labels = torch.randint(0, llama.vocab_size, (rows, length))
    labels[:, :length * 2 // 3] = IGNORE
    batch = dict(ids=torch.randint(0, llama.vocab_size, (rows, length)), kind=kind, labels=labels,
                 lengths=[length] * rows, images=torch.zeros(rows * n_images, 3, *[VIT.image_size] * 2).byte())
    for _ in range(2):
        train.train_step(engine, [batch], blank={})             # both ranks have one batch, with images
    predicted = zero.memory(options, llama, VIT, 2)
    # --plan is about GPUs, whose norms keep their inputs as they are; on a CPU they keep them in float32.
    layers, more = 1 if options.recompute else llama.num_hidden_layers, 2 if options.precision == "bf16" else 0
    predicted["norms"] = 2 * layers * options.positions * llama.hidden_size * more
    if zero.dist.get_rank() == 0:
        print({name: round(value / 1e6) for name, value in predicted.items()})
        total, found = sum(predicted.values()) / 1e6, resident()[1] - before
        print(f"{step}: predicted {total:.0f} MB, measured {found:.0f} MB over the bare process, "
              f"ratio {total / found:.2f}", flush=True)
    zero.dist.barrier()


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    with_options = {"attention": attention, "step": step, "decode": decode, "chat": chat, "packing": packing,
                    "two_softmaxes": two_softmaxes, "memory": memory}
    without = {"questions": questions, "start": start,
               "images": images, "worst": worst, "features": features, "loading": loading, "plan": plan}
    parser.add_argument("what", choices=[*with_options, *without, "gpu", "peak", "rank"])
    parser.add_argument("--precision", choices=list(DTYPES), default="fp32")
    parser.add_argument("--size", choices=list(LLAMA_2), help="random weights of this size, not of a small model")
    parser.add_argument("--dim", type=int, help="width of the small model of eight layers; default 512, in "
                                                "`decode` 512 and then 2048")
    parser.add_argument("--length", type=int, default=2048, help="positions of a training step")
    parser.add_argument("--wide", action="store_true", help="in `decode`: weights that 16 bits cannot hold")
    parser.add_argument("--recompute", action="store_true", help="in a training step, as train.py does")
    parser.add_argument("--model", type=Path, default=Path("weights/tiny/chat"),
                        help="training result for `two_softmaxes`")
    parser.add_argument("--dry", action="store_true", help="in `gpu`: small shapes, also without a card")
    parser.add_argument("--only", nargs="+", help="in `gpu`: checks whose titles have one of these words")
    parser.add_argument("--step", help=argparse.SUPPRESS)
    parser.add_argument("--file", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    torch.manual_seed(0)
    if options.what in with_options:
        with_options[options.what](options)
    elif options.what in without:
        without[options.what]()
    elif options.what == "gpu":
        import gpu                                              # which imports from here
        gpu.all_checks(options)
    elif options.what == "peak":
        peak(options.step, options.file)
    else:
        rank(options.file, options.step)


if __name__ == "__main__":
    main()
