"""The exam of the tiny world: does a trained model answer questions about images that it has never seen?

Every question of the two test sets is asked in three ways. An answer is right if it is right word for word.

    exact    after the rounds before it, with their right answers
    alone    in a first round that shows all the images at once
    blind    as exact, but every image is gray, which shows how much can be guessed

Before: tiny/world.py, which draws the test sets. Next: train.py, which writes the rows to eval.csv.
"""
import random
from dataclasses import replace
from itertools import product
from pathlib import Path

import torch
from tqdm import tqdm

from data import Round, collate, encode, to_tensors
from llama import Cache, Tokenizer
from sources import COCO, DIALOGUE, Reader, llava
from tiny.world import TESTS, TOPICS, topic_of
from visualchat import VisualChat

WAYS = ("exact", "alone", "blind")
AT_ONCE, MAX_ANSWER = 64, 12                # questions in a batch; tokens of an answer: right ones have up to 9


def exam_questions(folder: Path, n: int) -> list[list[Round]]:
    """All questions of n conversations of a test set, always the same: each as the rounds up to its own."""
    found = list(llava(Reader(folder.name, folder), [folder / DIALOGUE], folder / COCO))
    chosen = random.Random(0).sample(found, min(n, len(found)))
    asked = [one.rounds[:i] for one in chosen for i in range(1, len(one.rounds) + 1)]
    return sorted(asked, key=lambda rounds: len(rounds[-1].answer))         # Short answers end together.


def prompt(rounds: list[Round], way: str) -> list[Round]:
    """The rounds that the model reads, the last one without its answer."""
    last = replace(rounds[-1], answer=None)
    if way == "alone":
        return [replace(last, images=sum((each.images for each in rounds), ()))]
    return [*rounds[:-1], last]


@torch.no_grad()
def greedy_answers(model: VisualChat, tokenizer: Tokenizer, prompts: list[list[Round]], blind: bool) -> list[str]:
    """What the model answers if it always takes the likeliest token. If blind, it sees gray images."""
    vision, device, eos = model.vit.config, model.projection.weight.device, tokenizer.eos
    batch = collate([to_tensors(encode(rounds, tokenizer, vision.n_queries), vision.image_size)
                     for rounds in prompts])
    ids, kind, images = (batch[name].to(device) for name in ("ids", "kind", "images"))
    images = torch.zeros_like(images) if blind else images      # Pixels are normalized: zero is a medium gray.
    x = model.embed(ids, kind, model.image_tokens(images))
    cache = Cache(model.llama, len(prompts), room=max(batch["lengths"]) + MAX_ANSWER)
    tokens, ended = [], torch.zeros(len(prompts), dtype=torch.bool, device=device)
    for token in model.generate(model.prefill(x, kind, cache, batch["lengths"]), cache, MAX_ANSWER):
        tokens.append(token)
        ended |= token == eos
        if ended.all():
            break
    return [tokenizer.decode(answer[:answer.index(eos)] if eos in answer else answer)
            for answer in torch.stack(tokens, dim=1).tolist()]


def run_exam(model: VisualChat, tokenizer: Tokenizer, data: Path, n: int, quiet: bool = False) -> list[dict]:
    """Rows of eval.csv: shares of right answers by test set, images shown and topic; n conversations of each set.

    Under ZeRO-3 all ranks must call it together, because they gather the weights of a module together.
    """
    model.eval()
    table = []
    for test in TESTS:
        asked, right = exam_questions(data / test, n), {way: [] for way in WAYS}
        for way in WAYS:
            for start in tqdm(range(0, len(asked), AT_ONCE), f"exam, {way}", leave=False, disable=quiet):
                part = asked[start:start + AT_ONCE]
                prompts = [prompt(rounds, way) for rounds in part]
                answers = greedy_answers(model, tokenizer, prompts, blind=way == "blind")
                right[way] += [answer == rounds[-1].answer for answer, rounds in zip(answers, part)]
        shown = ["one" if sum(len(each.images) for each in rounds) == 1 else "several" for rounds in asked]
        topics = [topic_of(rounds[-1].question) for rounds in asked]
        for images, topic in product(("one", "several"), ("all", *TOPICS)):
            chosen = [i for i in range(len(asked)) if shown[i] == images and topic in ("all", topics[i])]
            if chosen:
                shares = {way: round(sum(right[way][i] for i in chosen) / len(chosen), 4) for way in WAYS}
                table.append(dict(test=test, images=images, topic=topic, questions=len(chosen), **shares))
    return table


def table_text(rows: list[dict]) -> str:
    """The rows of `run_exam` as a table to print."""
    lines = (rows[0], *(row.values() for row in rows))
    return ("fresh drawings, one or several images shown: share of answers right word for word,\n"
            "after the true rounds before (exact), as a first question (alone), with gray images (blind)\n"
            + "\n".join("  ".join(f"{value:<11}" for value in line) for line in lines))
