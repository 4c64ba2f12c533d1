"""How weights/tiny was made: a tokenizer, a ViT and a LLaMA, pre-trained on the tiny world.

    tokenizer   every word of the tiny world is one token
    ViT         learns to make four tokens of an image: token i stands for the value of attribute i
    LLaMA       learns to answer questions about images; four words stand where image tokens will stand

Later train.py keeps both towers as they are and learns to connect them, as in the paper. Their folders have the
official formats. `python -m tiny.pretrain` makes all three anew, and `python -m tiny.pretrain vit` the ViT alone;
what was interrupted goes on. Before: tiny/world.py. Next: tiny/exam.py.
"""
import random
import re
import shutil
from argparse import ArgumentParser, RawDescriptionHelpFormatter
from collections.abc import Callable, Iterator
from dataclasses import asdict, replace
from itertools import accumulate
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from sentencepiece import SentencePieceTrainer
from torch import Tensor, nn
from tqdm import tqdm

from data import SYSTEM, Encoded, Round, collate, encode, to_tensors
from llama import Llama, LlamaConfig, Tokenizer
from mmca import IMAGE, TEXT, all_text, separate
from pixels import normalized, to_pixels
from tiny.wording import (AFTER, ALL, ALL_THREE, ATTRIBUTES, BEFORE, BOTH, COMPARED, ENDINGS, FILLERS, GOODBYE,
                          HELLO, IS, IT, LATEST, LETTERS, LOOKED_FOR, NAMELESS, NONE, NOTHING, NOUNS, NUMBERS,
                          ORDINALS, OTHERWISE, PHRASES, REFUSALS, SEVERAL, SHORT_IT, THINGS, TOPICS, WELCOME)
from tiny.world import ALL_SCENES, VALUES, Scene, dialogue, draw_scene, random_scene, write_json
from visualchat import IGNORE, whole_answers
from vit import IN_CONFIG, PREFIX, VisionConfig, VisionTransformer
from weights import replacing

LLAMA = LlamaConfig(hidden_size=128, intermediate_size=336, num_hidden_layers=6, num_attention_heads=4,
                    num_key_value_heads=4, vocab_size=0, rope_theta=1000.0)     # vocab_size: see pretrain_llama
VIT = VisionConfig(image_size=64, patch_size=8, width=96, layers=4, heads=4, mlp_width=384, output_dim=128,
                   n_queries=4, grid=8)
WEIGHTS, UNFINISHED, STEPS = Path("weights/tiny"), Path("out/pretrain"), {"vit": 2500, "llama": 10000}
N_IMAGES, N_FRESH = 20000, 2000         # images to learn from; images and conversations to test with
N_VALUES = [len(values) for values in ATTRIBUTES.values()]
# What was printed when weights/tiny was made. The ViT (12 minutes on one core) read of 2,000 fresh images size
# 0.9995, color 1.0000, shape 0.9970, place 0.9990, all four 0.9960. In 2,000 fresh conversations LLaMA (69 minutes
# on two cores that had other work, too) answered right with MMCA and with causal attention: with no or one image
# 2671 and 2670 of 2672, with two or three 5112 and 5110 of 5126, with four to eight 8162 and 8155 of 8202
# (weakest: "is", 0.971 and 0.971).


def train_tokenizer(folder: Path) -> Tokenizer:
    """A sentencepiece model in LLaMA's format: a piece for each word of the tiny world, bytes for all others."""
    known = [*sum(PHRASES.values(), []), *sum(NAMELESS.values(), ()), *sum(IS.values(), ()), *IT, *LATEST,
             *SHORT_IT, *NOUNS, *ORDINALS, *THINGS, *FILLERS, *BEFORE, *AFTER, *sum(LOOKED_FOR.values(), ()),
             *sum(SEVERAL.values(), ()), *sum(COMPARED.values(), ()), *sum(OTHERWISE.values(), ()), *REFUSALS,
             HELLO, WELCOME, GOODBYE, *ALL, *ALL_THREE, *BOTH, *VALUES, *ATTRIBUTES, *LETTERS, *LETTERS.upper(),
             *NUMBERS, *"0123456789", "x0123456789", "image #1", *(f"1{ending}" for ending in ENDINGS), "number",
             "what's whats where's wheres how's hows who's whos that's thats u", "images pictures photos",
             "colour last latest newest new one", "yes no A big at the", NONE, NOTHING]
    known = [re.sub(r"{\w*}", "", text) for text in known]
    lines = [SYSTEM, "### Image 1:", "### Question: ### Answer:", *known, *(text.lower() for text in known),
             *(text[:1].upper() + text[1:] for text in known if text)]
    text = "\n".join("▁" + line.replace(" ", "▁") for line in lines)        # sentencepiece writes ▁ for a space
    # Pieces that sentencepiece finds itself include "1:" and "1?". LLaMA could not tell that both mean image 1.
    pieces = {"▁", "###", *re.findall(r"▁?(?:[A-Za-z]+|\d|###|[^\w▁\s])", text)}
    folder.mkdir(parents=True, exist_ok=True)
    SentencePieceTrainer.train(
        sentence_iterator=iter([*lines, "~"]),          # It wants a character that is in none of the pieces.
        model_prefix=str(folder / "tokenizer"), user_defined_symbols=sorted(pieces), vocab_size=len(pieces) + 320,
        hard_vocab_limit=False, byte_fallback=True, minloglevel=2, character_coverage=1.0,
        normalization_rule_name="identity", remove_extra_whitespaces=False)
    (folder / "tokenizer.vocab").unlink()
    return Tokenizer(folder)


def numbers_of(scene: Scene) -> list[int]:
    """The four attributes of a scene as numbers."""
    return [values.index(value) for values, value in zip(ATTRIBUTES.values(), scene)]


def optimize(tower: nn.Module, heads: nn.Module, loss_of: Callable[[int], Tensor], steps: int, name: str):
    """Reduce loss_of(step). The rates rise for 50 steps; over the last 60 percent they fall to zero.

    Muon moves the weights of the tower's linear layers, AdamW embeddings, heads and all else. Every 500 steps the
    state is kept in UNFINISHED, and the same call goes on from there. So loss_of must depend on the step and on
    PyTorch's random numbers alone, which begin anew at each step.
    """
    outer = ("embed", "lm_head")
    matrices = [p for parameter, p in tower.named_parameters()
                if p.ndim == 2 and "weight" in parameter and not parameter.startswith(outer)]
    others = [p for p in (*tower.parameters(), *heads.parameters()) if all(p is not matrix for matrix in matrices)]
    optimizers = [torch.optim.Muon(matrices, 8e-3, weight_decay=0.01, adjust_lr_fn="match_rms_adamw"),
                  torch.optim.AdamW(others, 4e-3, (0.9, 0.98), weight_decay=0.01)]
    schedules = [torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min((step + 1) / 50, (steps - step) / (0.6 * steps), 1))
        for optimizer in optimizers]
    unfinished, parts, begin = UNFINISHED / f"{name}.pt", [tower, heads, *optimizers, *schedules], 0
    if unfinished.exists():
        begin, *states = torch.load(unfinished, weights_only=True)
        for part, state in zip(parts, states):
            part.load_state_dict(state)
    for step in (bar := tqdm(range(begin, steps), name, initial=begin, total=steps)):
        if step % 500 == 0 and step > begin:
            unfinished.parent.mkdir(parents=True, exist_ok=True)
            with replacing(unfinished) as new:
                torch.save([step, *(part.state_dict() for part in parts)], new)
        torch.manual_seed(step)
        loss = loss_of(step)
        for optimizer in optimizers:
            optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_([*matrices, *others], 1.0)
        for part in (*optimizers, *schedules):
            part.step()
        bar.set_postfix(loss=f"{loss.item():.4f}", refresh=False)
    unfinished.unlink(missing_ok=True)


# ---- ViT: token i tells attribute i ----

def drawn(n: int, seed: int, image_size: int = VIT.image_size) -> tuple[Tensor, Tensor]:
    """Pixels (n, 3, image_size, image_size) uint8 of random scenes, and their attributes as numbers (n, 4)."""
    rng = random.Random(seed)
    scenes = [random_scene(rng, [], ALL_SCENES) for _ in range(n)]
    images = [to_pixels(draw_scene(scene, rng), image_size) for scene in tqdm(scenes, "drawing", leave=False)]
    return torch.stack(images), torch.tensor([numbers_of(scene) for scene in scenes])


def pretrain_vit(vit: nn.Module, steps: int, name: str = "ViT") -> nn.Module:
    """Train a ViT until its token i comes near to a random vector that stands for value i of the scene; prints how
    often the nearest vector is the right one.

    vit: any visual encoder of ENCODERS in visualchat.py that makes four tokens; name: for its progress.

    The vectors are fixed, and nearly alike in length and distance. So one linear layer can turn each into any word
    embedding, which is what the projection of VisualChat has to learn, and gradients move all values equally fast.
    """
    vectors, size = torch.randn(len(VALUES), vit.config.output_dim), vit.config.image_size
    first = torch.tensor([0, *accumulate(N_VALUES)][:-1])                   # of each attribute's vectors
    images, targets = drawn(N_IMAGES, 1, size)

    def loss_of(step: int) -> Tensor:
        chosen = torch.randint(len(images), (64,))
        return F.mse_loss(vit(normalized(images[chosen])), vectors[targets[chosen] + first])

    optimize(vit, nn.Module(), loss_of, steps, name)                        # no heads
    fresh, wanted = drawn(N_FRESH, 2, size)
    with torch.no_grad():
        tokens = torch.cat([vit(normalized(part)) for part in fresh.split(100)])        # (N_FRESH, 4, output_dim)
    read = [torch.cdist(tokens[:, i], part).argmin(1) for i, part in enumerate(vectors.split(N_VALUES))]
    right = torch.stack(read, dim=1) == wanted
    print(f"{name}, attributes read from {N_FRESH} fresh images:",
          *(f"{name} {share:.4f}" for name, share in zip(ATTRIBUTES, right.float().mean(0).tolist())),
          f"all four {right.all(1).float().mean():.4f}", sep="  ")
    return vit


# ---- LLaMA: words stand where image tokens will stand ----

# Answers alone teach LLaMA too slowly: for hundreds of steps it only guesses about several images. So auxiliary
# heads ask for what it needs on its way to an answer. Each is a linear layer. From the hidden state of a certain
# token, after one of the layers, it has to tell some numbers. After pre-training the heads are dropped.
#   image   from the first token after an image: which image it is, and its attributes
#   name    from the token in a question that completes the name of an image: whether there is such an image, and
#           its attributes
#   pair    likewise, where it is the question's second image: for each attribute, whether both images share it
#   value   from a word such as "red", in question or answer: for each image, whether it is red
#   topic   from the token before an answer: what is asked
#   is      from the token before an answer to `is`: whether it is yes
#   which   from all tokens that an answer to `which` is read from: for each image, whether it belongs in the list
# name of the head: (number of the layer, counted from 0, how many values each of the numbers has)
MOST_IMAGES, COUNTS = 8, [1, 2, 3, 3, 4, 5, 6, 7, 8, 8]     # COUNTS: how many images a conversation may have
HEADS = {"image": (1, [MOST_IMAGES, *N_VALUES]), "name": (2, [2, *N_VALUES]), "pair": (3, [2] * 4),
         "value": (3, [2] * MOST_IMAGES), "topic": (2, [len(TOPICS)]), "is": (4, [2]),
         "which": (4, [2] * MOST_IMAGES)}
MEANS = {word: value for value in VALUES for word in (value, *OTHERWISE.get(value, ()))}


def named_image(words: list[str], following: str, latest: int) -> int | None:
    """Which image, counted from 0, the last of these words names, perhaps with those before it; or None.

    following: the next word, which shows whether a number or an ordinal is complete.
    """
    before, noun, word = ([""] * 3 + [word.lower() for word in words])[-3:]
    if word.isdigit():                          # A number names an image; only in "### Image 2:" it shows one.
        done = before != "###" and not following.isdigit() and following not in ENDINGS
        return int((noun if noun.isdigit() else "") + word) - 1 if done else None
    if word in ORDINALS:
        return ORDINALS.index(word)
    if noun.isdigit() and word in ENDINGS:
        return int(noun) - 1
    if (noun in NOUNS and before != "###") or noun in ("number", "#"):
        for names in ([*LETTERS], NUMBERS):     # a list: in a text, "bc" would be found, too
            if word in names:
                return names.index(word)
    return latest if noun in ("the", "this", "last", "latest", "newest") and word in NOUNS else None


def head_targets(encoded: Encoded, scenes: list[Scene], topics: list[str],
                 tokenizer: Tokenizer) -> Iterator[tuple[str, int, list]]:
    """(head, position, numbers that it has to tell there) for all that is asked in a conversation."""
    words = [tokenizer.model.id_to_piece(id).removeprefix("▁") for id in encoded.ids] + [""]
    attributes, n_shown, named, topics = [numbers_of(scene) for scene in scenes], 0, [], iter(topics)
    topic, has = "", []             # of the last question; for each image whether it has the value named last
    for i, (word, kind, label) in enumerate(zip(words, encoded.kind, encoded.labels)):
        if kind == TEXT and i and encoded.kind[i - 1] == IMAGE:
            yield "image", i, [n_shown, *attributes[n_shown]]
            n_shown += 1
        if word == "<s>":
            named = []                                                      # A new round begins.
        image = (named_image(words[:i + 1][-3:], words[i + 1], latest=n_shown - 1)
                 if kind == TEXT and label == IGNORE else None)
        if image is not None:
            there = 0 <= image < n_shown
            named.append(attributes[image] if there else [IGNORE] * 4)
            yield "name", i, [int(there), *named[-1]]
            if len(named) == 2 and IGNORE not in named[0] + named[1]:
                yield "pair", i, [int(a == b) for a, b in zip(*named)]
        elif kind == TEXT and word.lower() in MEANS:
            value = MEANS[word.lower()]
            has = [int(value in scene) for scene in scenes[:n_shown]] + [0] * (MOST_IMAGES - n_shown)
            yield "value", i, has
        if encoded.labels[i + 1:i + 2] not in ([], [IGNORE]):           # Here the next token of an answer is read.
            if label == IGNORE:
                topic = next(topics)
                yield "topic", i, [TOPICS.index(topic)]
                if topic == "is":
                    yield "is", i, [int(words[i + 1] == "yes")]
            if topic == "which":
                yield "which", i, has


def text_batch(rng: random.Random, tokenizer: Tokenizer, counts: list[int], n: int, n_rounds: int):
    """A batch of n conversations in which words stand at the image positions; what the heads are asked, as (head,
    index in the batch, numbers); and for each question (topic, how many images were shown).

    counts: how many images a conversation may have.
    """
    examples, asked, topics, start = [], [], [], 0
    for _ in range(n):
        scenes, rounds = dialogue(rng.choice(counts), n_rounds, rng, ALL_SCENES)
        # Each scene takes the place of an image file; no file is opened.
        encoded = encode([Round(tuple(new), *texts) for new, _, *texts in rounds], tokenizer, len(ATTRIBUTES))
        asked += [(head, start + i, numbers) for head, i, numbers
                  in head_targets(encoded, scenes, [topic for _, topic, *_ in rounds], tokenizer)]
        start += len(encoded.ids)
        words = iter([tokenizer.encode(value)[0] for scene in scenes for value in scene])
        ids = [next(words) if kind == IMAGE else id for id, kind in zip(encoded.ids, encoded.kind)]
        examples.append(to_tensors(replace(encoded, ids=ids, images=[]), VIT.image_size))
        topics += zip([topic for _, topic, *_ in rounds], accumulate(len(new) for new, *_ in rounds))
    return collate(examples), asked, topics


def predict(llama: Llama, batch: dict, noise: float = 0.0) -> tuple[Tensor, Tensor]:
    """Logits (A, vocabulary) and targets (A) of the answer tokens.

    Each word at an image position gets Gaussian noise, whose spread is a random share, up to `noise`, of that of
    word embeddings, because no projection will meet words exactly.
    """
    targets, x = batch["labels"][:, 1:], llama.embed_tokens(batch["ids"])
    strength = noise * torch.rand_like(x[..., :1]) * llama.embed_tokens.weight.detach().std()
    spread = (batch["kind"] == IMAGE)[..., None] * strength
    read = F.pad(targets != IGNORE, (0, 1))                                 # position t predicts t + 1
    hidden = llama(x + spread * torch.randn_like(x), batch["kind"], read, batch["lengths"])
    return llama.lm_head(hidden), targets[targets != IGNORE]


def head_loss(heads: nn.ModuleDict, states: dict[int, Tensor], kind: Tensor, asked: list) -> Tensor:
    """The loss of all auxiliary heads, from the hidden states (L, C) after each layer. asked: see `text_batch`."""
    total, row = 0, separate(kind).index.argsort()      # the row in `states` of each index in the batch
    for name, (layer, sizes) in HEADS.items():
        if found := [(index, numbers) for head, index, numbers in asked if head == name]:
            indices, numbers = map(list, zip(*found))
            logits = heads[name](states[layer][row[indices]]).split(sizes, dim=1)
            total += sum(map(F.cross_entropy, logits, torch.tensor(numbers).T)) / len(sizes)
    return total


@torch.no_grad()
def reading(llama: Llama, tokenizer: Tokenizer, n: int) -> dict[str, dict[str, list[bool]]]:
    """Which questions of n fresh conversations are answered right, word for word, by images shown and topic."""
    rng, table = random.Random(5), {"no or one": {}, "two or three": {}, "four to eight": {}}
    for i in range(n // 50):
        batch, _, topics = text_batch(rng, tokenizer, COUNTS, 50, n_rounds=8)
        logits, targets = predict(llama, batch)
        whole = whole_answers(batch["labels"], logits.argmax(-1) == targets).tolist()
        for (topic, n_shown), right in zip(topics, whole):
            shown = "no or one" if n_shown < 2 else "two or three" if n_shown < 4 else "four to eight"
            table[shown].setdefault(topic, []).append(right)
    return table


def pretrain_llama(tokenizer: Tokenizer, steps: int) -> Llama:
    """A LLaMA, trained with MMCA or causal attention, by chance at each step; prints how often it is right."""
    llama, states = Llama(replace(LLAMA, vocab_size=tokenizer.model.vocab_size())), {}
    for parameter in llama.parameters():
        if parameter.ndim == 2:
            nn.init.normal_(parameter, std=0.5 * parameter.shape[1] ** -0.5)
    heads = nn.ModuleDict({name: nn.Linear(LLAMA.hidden_size, sum(sizes)) for name, (_, sizes) in HEADS.items()})
    hooks = [layer.register_forward_hook(lambda module, inputs, output, i=i: states.update({i: output}))
             for i, layer in enumerate(llama.layers)]

    def loss_of(step: int) -> Tensor:
        rng = random.Random(f"3 {step}")
        llama.attention = rng.choice(["mmca", "causal"])
        counts = [1] if step < 100 else [1, 2, 3] if step < 1000 else COUNTS
        n_rounds = rng.choice([4, 6, 8, 12, 16, 24])
        batch, asked, _ = text_batch(rng, tokenizer, counts, n=144 // n_rounds, n_rounds=n_rounds)
        kind = batch["kind"] if llama.attention == "mmca" else all_text(batch["kind"])
        return F.cross_entropy(*predict(llama, batch, noise=0.8)) + head_loss(heads, states, kind, asked)

    optimize(llama, heads, loss_of, steps, name="LLaMA")
    for hook in hooks:
        hook.remove()
    for name in ("mmca", "causal"):
        llama.attention = name
        for shown, topics in reading(llama, tokenizer, N_FRESH).items():
            whole = sum(topics.values(), [])
            print(f"LLaMA, {name}, written scenes, {shown} shown: {sum(whole)} of {len(whole)} right, "
                  f"{sum(whole) / len(whole):.4f};",
                  *(f"{topic} {sum(right) / len(right):.3f}" for topic, right in sorted(topics.items())), sep="  ")
    return llama


# ---- folders in the official formats ----

def write_llama(llama: Llama, folder: Path):
    """config.json, and FP16 weights in two shards with their index, as LLaMA-2 is published."""
    weights = {name if name.startswith("lm_head") else f"model.{name}": tensor.half()
               for name, tensor in llama.state_dict().items()}
    shard = {name: f"model-0000{1 + 2 * i // len(weights)}-of-00002.safetensors"
             for i, name in enumerate(weights)}
    size = {"total_size": sum(2 * tensor.numel() for tensor in weights.values())}
    write_json(folder / "model.safetensors.index.json", {"metadata": size, "weight_map": shard})
    for file in set(shard.values()):
        save_file({name: weights[name] for name in shard if shard[name] == file}, folder / file, {"format": "pt"})
    fixed = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_act": "silu", "bos_token_id": 1,
             "eos_token_id": 2, "tie_word_embeddings": False, "torch_dtype": "float16"}
    write_json(folder / "config.json", fixed | asdict(llama.config))


def write_vit(vit: VisionTransformer, folder: Path):
    """config.json with its `visual` section, and FP16 weights under QWen-VL's names."""
    sizes = {name: getattr(VIT, name) for name in IN_CONFIG}
    write_json(folder / "config.json", {"visual": {**sizes, "mlp_ratio": VIT.mlp_width / VIT.width}})
    weights = {PREFIX + name: tensor.half() for name, tensor in vit.state_dict().items()}
    save_file(weights, folder / "model.safetensors", {"format": "pt"})


def main():
    """Make a tower anew, or both. The tokenizer is made with LLaMA."""
    parser = ArgumentParser(description=__doc__, formatter_class=RawDescriptionHelpFormatter)
    parser.add_argument("tower", nargs="?", choices=list(STEPS), help="by default both")
    tower = parser.parse_args().tower
    for name in [tower] if tower else STEPS:
        torch.manual_seed(0)                                    # for the first weights
        if name == "vit":
            write_vit(pretrain_vit(VisionTransformer(VIT), STEPS[name]), WEIGHTS / name)
        else:
            tokenizer = train_tokenizer(UNFINISHED)
            write_llama(pretrain_llama(tokenizer, STEPS[name]), WEIGHTS / name)
            shutil.copy(UNFINISHED / "tokenizer.model", WEIGHTS / name)     # last: until then the old ones fit


if __name__ == "__main__":
    main()
