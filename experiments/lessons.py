"""What the paper tried and found not to help (sections 4.3 and 5.2.4). Before: outside.py. Next: released.py."""
import random
import re
from collections.abc import Iterator
from dataclasses import replace

import torch.nn.functional as F
from torch import nn

import data
import sources
from data import Conversation, Encoded, Round
from experiments.outside import Experiment
from llama import Tokenizer
from visualchat import Variant, VisualChat
from vit import Block, VisionConfig


class FreshBlock(Block):
    """A layer of the ViT with first values of its own."""

    def reset_parameters(self):
        for module in (self.ln_1, *self.attn.children(), self.ln_2, *self.mlp.children()):
            module.reset_parameters()


def add_projection_block(model: VisualChat):
    """Put a layer as wide as the encoder's output before the projection; all tokens of an image attend to all."""
    width = model.vit.config.output_dim
    block = FreshBlock(VisionConfig(width=width, heads=max(1, width // 128), mlp_width=4 * width))
    model.projection_block = block.to(model.projection.weight)
    model.fresh.append(model.projection_block)
    model.projection.register_forward_pre_hook(lambda _, inputs: (model.projection_block(inputs[0]),))


def encode_chat_round(round_: Round, n_before: int, is_first: bool, tokenizer: Tokenizer,
                      n_tokens: int) -> Encoded:
    """`data.encode_round` in LLaMA-2-chat's template (--llama can name such weights), images first in each text:

        <s>[INST] <<SYS>>↵{system}↵<</SYS>>↵↵Image 1: · · ·↵{question} [/INST] {answer}</s><s>[INST] {question} …
    """
    out, text = Encoded([], [], [], []), "[INST] " + f"<<SYS>>\n{data.SYSTEM}\n<</SYS>>\n\n" * is_first
    out.add_text([tokenizer.bos])
    for i, image in enumerate(round_.images):
        text += f"Image {n_before + i + 1}:"
        out.add_text(data.line_ids(text, tokenizer) if i else tokenizer.encode(text))
        out.add_image(image, n_tokens)
        text = ""
    text += f"{round_.question} [/INST]"
    out.add_text(data.line_ids(text, tokenizer) if round_.images else tokenizer.encode(text))
    if round_.answer is not None:
        out.add_text([*tokenizer.encode(round_.answer), tokenizer.eos], is_answer=True)
    return out


MARKS = ("### Image", "### Question:", "### Answer:")
plain_line_ids = data.line_ids


def special_line_ids(text: str, tokenizer: Tokenizer) -> list[int]:
    """`data.line_ids`, with the id of a new token for each mark: those behind the tokenizer's own."""
    ids, line_break, n_old = [], plain_line_ids("", tokenizer), tokenizer.model.vocab_size()
    for line in text.split("\n"):
        mark = next(filter(line.startswith, MARKS), "")
        rest = line.removeprefix(mark).strip()
        ids += ([*line_break, n_old + MARKS.index(mark), *(tokenizer.encode(rest) if rest else [])] if mark else
                plain_line_ids(line, tokenizer))
    return ids


class NewRows(nn.Module):
    """First values for the embedding's new rows: the mean of all others. It has no parameters itself."""

    def __init__(self, embedding: nn.Embedding, n_old: int):
        super().__init__()
        self.embedding, self.n_old = [embedding], n_old         # in a list, so that it is no part of this module

    def reset_parameters(self):
        weight = self.embedding[0].weight.data
        weight[self.n_old:] = weight[:self.n_old].float().mean(0).to(weight.dtype)


def add_special_tokens(model: VisualChat):
    """Rows for MARKS in the embedding, where they train, and in the head, where they stay zero.

    So their logit is 0, and where all others are less the model says one; `Tokenizer.decode` leaves it out of the
    answer. Their ids follow the tokenizer's, so the embedding has a row for each piece and no more, as LLaMA-2's.
    """
    llama, n = model.llama, model.llama.config.vocab_size
    for module in (llama.embed_tokens, llama.lm_head):
        module.weight = nn.Parameter(F.pad(module.weight.detach(), (0, 0, 0, len(MARKS))))      # rows of zeros
    llama.embed_tokens.num_embeddings = llama.lm_head.out_features = n + len(MARKS)
    llama.config = replace(llama.config, vocab_size=n + len(MARKS))
    model.new_rows = NewRows(llama.embed_tokens, n)
    model.fresh.append(model.new_rows)
    model.new_rows.reset_parameters()


plain_blend, BLEND = sources.blend, "llava_otter_blend"
NAMES = re.compile(r"\b[Ii]mage \d+( and \d+(?=[.?!]))?|\b[Ii]mages \d+((,|,? and|,? or) \d+)*")
# Texts with other names of images, or about all of them, would become wrong.
OTHERS = re.compile(r"\b(photo|pic|picture|img|any|all|both|images? [a-h]|first|second|third|\d(st|nd|rd|th))\b",
                    re.IGNORECASE)


def moved(text: str, first: int) -> str:
    """The text with the numbers of images from `first` on, counted from 1, one higher."""
    return NAMES.sub(lambda names: re.sub(
        r"\d+", lambda number: str(int(number[0]) + (int(number[0]) >= first)), names[0]), text)


def shuffled_blend(reader, instructions, images, *files) -> Iterator[Conversation]:
    """`sources.blend` with one image more in each conversation, at a place that the seed draws.

    It is shown with the image behind it. What texts say of that one and of later ones moves on by one.
    Conversations whose texts would become wrong stay as they are.
    """
    rng, others = random.Random(f"{reader.seed} shuffled"), sorted(images.glob("*.jpg"))
    numbers = {image: number for number, image in enumerate(others)}
    for conversation in plain_blend(reader, instructions, images, *files):
        shown = [image for round_ in conversation.rounds for image in round_.images]
        taken = sorted(numbers[image] for image in numbers.keys() & shown)
        if len(taken) == len(others) or any(OTHERS.search(f"{round_.question} {round_.answer}")
                                            for round_ in conversation.rounds):
            yield conversation
            continue
        place, number = rng.randint(1, len(shown)), rng.randrange(len(others) - len(taken))
        for one in taken:                                       # the number-th of those that are not shown
            number += one <= number
        another = others[number]
        rounds, n_seen = [], 0
        for round_ in conversation.rounds:
            inside = place - 1 - n_seen
            n_seen += len(round_.images)
            if 0 <= inside < len(round_.images):
                round_ = replace(round_, images=(*round_.images[:inside], another, *round_.images[inside:]))
            question, answer = (moved(text, place) for text in (round_.question, round_.answer))
            rounds.append(replace(round_, question=question, answer=answer))
        yield replace(conversation, rounds=rounds)


# The tiny size gives the embedding a quarter of --lr already, so there embedding_rate tests 1e-4 against 5e-4.
EXPERIMENTS = {
    "projection_block": Experiment("a layer of the ViT before the projection", "4.3",
                                   Variant(add_projection_block)),
    "embedding_rate": Experiment("a lower rate for the token embedding, 1e-4", "4.3",
                                 options=("--embedding-lr", "1e-4")),
    "chat_template": Experiment("the template of LLaMA-2's chat models", "4.3",
                                swaps=((data.encode_round, encode_chat_round),)),
    "special_tokens": Experiment("the template's words as tokens of their own", "4.3", Variant(add_special_tokens),
                                 ((plain_line_ids, special_line_ids),)),
    "shuffled_images": Experiment("another image in each conversation of the blend", "5.2.4",
                                  swaps=((sources.SOURCES, sources.SOURCES | {BLEND: replace(
                                      sources.SOURCES[BLEND], convert=shuffled_blend)}),),
                                  options=("--datasets", "set1")),
}
