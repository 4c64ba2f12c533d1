"""What do models answer to a file of questions? Answers as a table, one column for each model.

    python evaluate.py questions.json --model out/7b out/7b/best --out answers.csv --html answers.html

questions.json is as in the project that the paper's authors released: under each name a conversation, whose rounds
are a question and, where images are shown, their names with spaces between them:

    {"cats": [["Describe the image.", "a.jpg"], ["And these?", "b.jpg c.jpg"], ["Which is the oldest?"]]}

Several conversations are held at the same time, each with the model's own answers in its history. Until all
questions are answered, the answers so far are kept beside answers.csv, so the same command goes on after an
interruption. Side room of chat.py.
"""
import csv
import hashlib
import html
import json
import sys
from argparse import ArgumentParser, RawDescriptionHelpFormatter
from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import groupby
from pathlib import Path

import torch
from tqdm import tqdm

from album import digest_of, fingerprint
from cards import n_ranks
from chat import Chat, ContextFull, check_logits
from data import Encoded, Round, collate, encode, encode_round, to_tensors
from decode import step_of_many
from llama import Cache, Tokenizer
from page import image_url
from visualchat import VisualChat
from weights import printable, read_json, replacing


# ---- conversations with a model ----

def of_equal_length(conversations: list[list[Round]], at_once: int) -> Iterator[list[int]]:
    """The numbers of conversations with equally many rounds, at most `at_once` at a time."""
    def length(number: int) -> int:
        return len(conversations[number])

    for _, alike in groupby(sorted(range(len(conversations)), key=length), key=length):
        alike = list(alike)
        yield from (alike[start:start + at_once] for start in range(0, len(alike), at_once))


@torch.no_grad()
def hold_conversations(model: VisualChat, tokenizer: Tokenizer, conversations: list[list[Round]],
                       max_new_tokens: int, change_pixels: Callable = lambda pixels: pixels) -> list[list[str]]:
    """Ask the questions of conversations with equally many rounds, and let the model take the likeliest tokens.

    Returns for each conversation its answers. Raises as `load_pixels` and `check_logits` do.
    """
    vision, device, eos, n = model.vit.config, model.projection.weight.device, tokenizer.eos, len(conversations)
    asked = [[replace(round_, answer=None) for round_ in rounds] for rounds in conversations]
    # Under causal attention an image takes its room among the text.
    per_image = vision.n_queries if model.llama.attention == "causal" else 0
    text = max(len(encode(rounds, tokenizer, per_image, sys.maxsize).ids) for rounds in asked)
    cache = Cache(model.llama, n, room=text + (max_new_tokens + 1) * len(asked[0]))
    shown, said, answers, ended = [0] * n, [[] for _ in range(n)], [], torch.zeros(n, dtype=torch.bool)
    for rounds in zip(*asked, strict=True):
        examples = []
        for i, round_ in enumerate(rounds):
            new = Encoded([], [], [], [])
            new.add_text(said[i])                               # the cache lacks the last answer
            question = encode_round(round_, shown[i], not answers, tokenizer, vision.n_queries)
            examples.append(to_tensors(new + question, vision.image_size))
            shown[i] += len(round_.images)
        batch = collate(examples)
        ids, images, kind = batch["ids"].to(device), batch["images"].to(device), batch["kind"]
        logits = model.prefill(model.embed(ids, kind, model.image_tokens(change_pixels(images))), kind, cache,
                               batch["lengths"])
        check_logits(logits)
        tokens, before = [], cache.past
        ended.zero_()
        for token in model.generate(logits, cache, max_new_tokens, step=step_of_many(model.llama, ended)):
            tokens.append(token.cpu())
            ended |= tokens[-1] == eos
            if ended.all():
                break
        # Answers end at different times. So they are taken back, and the next round brings them, each up to </s>.
        cache.past = before
        found = [answer[:answer.index(eos)] if eos in answer else answer
                 for answer in torch.stack(tokens, dim=1).tolist()]
        said = [[*answer, eos] for answer in found]
        answers.append([tokenizer.decode(answer) for answer in found])
    return [list(each) for each in zip(*answers)]


def all_answers(model: VisualChat, tokenizer: Tokenizer, conversations: list[list[Round]], at_once: int,
                max_new_tokens: int) -> Iterator[tuple[int, list[str]]]:
    """(number of a conversation, its answers) for all of them, those of equal length together.

    One that could fill the context is held alone, by Chat, which leaves out its oldest rounds. A question that
    does not fit even then has no answer, and that is said.
    """
    limit, n_tokens = model.llama.config.max_position_embeddings, model.vit.config.n_queries

    def most(rounds: list[Round]) -> int:
        return len(encode(rounds, tokenizer, n_tokens, limit=10 ** 9).ids) + (max_new_tokens + 1) * len(rounds)

    short = [number for number, rounds in enumerate(conversations) if most(rounds) <= limit]
    for part in of_equal_length([conversations[number] for number in short], at_once):
        numbers = [short[i] for i in part]
        yield from zip(numbers, hold_conversations(model, tokenizer, [conversations[i] for i in numbers],
                                                   max_new_tokens))
    for number in sorted(set(range(len(conversations))) - set(short)):
        chat = Chat(model, tokenizer)
        chat.max_new_tokens, chat.forgets, answers = max_new_tokens, True, []
        for round_ in conversations[number]:
            try:
                answers.append(chat.ask(round_.question, *round_.images))
            except ContextFull as error:
                print(printable(f"no answer to {round_.question[:60]!r}: {error}"), file=sys.stderr)
                answers.append("")
        yield number, answers


# ---- questions and answers as files ----

def read_questions(path: Path, folder: Path) -> dict[str, list[Round]]:
    """The conversations of a file by their names; images are files in `folder`.

    Raises ValueError or FileNotFoundError, with the name of the conversation, for what is not as expected.
    """
    found = {}
    for name, rounds in read_json(path).items():                # of two with the same name JSON keeps the last
        if not (isinstance(rounds, list) and rounds and all(
                isinstance(one, list) and len(one) in (1, 2) and all(isinstance(text, str) for text in one)
                and one[0].strip() for one in rounds)):
            raise ValueError(f"{path}, {name:.60}: expected a list of [question] and [question, names of images]")
        found[name] = []
        for question, names in ((one[0], one[1].split() if one[1:] else []) for one in rounds):
            for image in names:
                if Path(image).is_absolute() or ".." in Path(image).parts:
                    raise ValueError(f"{path}, {name:.60}: the image {image:.200} lies outside of {folder}")
                if not (folder / image).is_file():
                    raise FileNotFoundError(f"{path}, {name:.60}: no image {folder / image!s:.300}; --images "
                                            "names the folder")
            found[name].append(Round(tuple(folder / image for image in names), " ".join(question.split())))
    if not found:
        raise ValueError(f"{path} holds no conversation")
    return found


def key_of(weights: str, max_new_tokens: int, rounds: list[Round]) -> str:
    """What a conversation's answers are kept under: all that they depend on."""
    asked = [(round_.question, [digest_of(image) for image in round_.images]) for round_ in rounds]
    return hashlib.sha256(repr((weights, max_new_tokens, asked)).encode(errors="backslashreplace")).hexdigest()


def read_partial(path: Path) -> dict[str, list[str]]:
    """Answers that an interrupted run kept, by the digest of what was asked of which weights."""
    found = {}
    for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else ():
        try:
            one = json.loads(line)
            found[one["asked"]] = [str(answer) for answer in one["answers"]]
        except (ValueError, TypeError, LookupError):            # a kill interrupted its writing
            continue
    return found


def write_answers(path: Path, questions: dict[str, list[Round]], folder: Path,
                  answers: dict[str, list[list[str]]]):
    """The table: a line per round; the column of answers has the model's name where there are several."""
    columns = ["answer"] if len(answers) == 1 else [f"answer {model}" for model in answers]
    with replacing(path) as unfinished, open(unfinished, "w", newline="", encoding="utf-8",
                                              errors="backslashreplace") as file:
        writer = csv.writer(file)
        writer.writerow(["test_name", "image_path", "question", *columns])
        for number, (name, rounds) in enumerate(questions.items()):
            for i, round_ in enumerate(rounds):
                images = " ".join(str(image.relative_to(folder)) for image in round_.images)
                writer.writerow([name, images, round_.question, *(each[number][i] for each in answers.values())])


SIDE_BY_SIDE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; img-src data:; style-src 'unsafe-inline'">
<title>Answers side by side</title>
<style>
:root { color-scheme: light dark; font: 16px/1.5 system-ui, sans-serif; }
body { margin: 0 auto; max-width: 80rem; padding: 0 1rem 4rem; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; width: 100%; }
th, td { border: 1px solid #8886; padding: .4rem .6rem; vertical-align: top; text-align: left; min-width: 12rem;
  white-space: pre-wrap; }
img { display: block; max-width: 12rem; margin-top: .4rem; }
</style></head><body><h1>Answers side by side</h1>
"""


def write_html(path: Path, questions: dict[str, list[Round]], answers: dict[str, list[list[str]]]):
    """Images, questions and answers as one page that needs nothing else."""
    parts = [SIDE_BY_SIDE]
    for number, (name, rounds) in enumerate(questions.items()):
        parts.append(f"<h2>{html.escape(name)}</h2>\n<div class=\"wide\"><table><tr><th>question</th>"
                     + "".join(f"<th>{html.escape(model)}</th>" for model in answers) + "</tr>")
        for i, round_ in enumerate(rounds):
            images = "".join(f'<img src="{image_url(image, 320)}" alt="{html.escape(image.name)}">'
                             for image in round_.images)
            said = "".join(f"<td>{html.escape(each[number][i])}</td>" for each in answers.values())
            parts.append(f"<tr><td>{html.escape(round_.question)}{images}</td>{said}</tr>")
        parts.append("</table></div>")
    with replacing(path) as unfinished:
        unfinished.write_text("\n".join(parts) + "\n</body></html>\n", "utf-8", "backslashreplace")


# ---- the program ----

def answers_of(folder: Path, questions: dict[str, list[Round]], options,
               partial: Path) -> tuple[list[list[str]], float]:
    """A model's answers to all conversations, and how many seconds the model took for them; those that `partial`
    holds are not asked again."""
    chat = Chat.open(folder, int8=options.int8, devices=options.devices)
    model, tokenizer = chat.model, chat.tokenizer
    weights = fingerprint(folder, chat.config) + " in 8 bits" * options.int8
    del chat                                                    # whose cache takes gigabytes at the real sizes
    asked = [key_of(weights, options.max_new_tokens, rounds) for rounds in questions.values()]
    known = read_partial(partial)
    left = [number for number, one in enumerate(asked) if one not in known]
    conversations = list(questions.values())
    n_known = sum(map(len, conversations)) - sum(len(conversations[number]) for number in left)
    with (open(partial, "a", encoding="utf-8") as file,
          tqdm(total=sum(map(len, conversations)), initial=n_known, desc=f"{folder}", unit=" answers") as bar):
        for i, found in all_answers(model, tokenizer, [conversations[number] for number in left], options.at_once,
                                    options.max_new_tokens):
            # The line break comes first: a kill may have left half a line.
            file.write("\n" + json.dumps({"asked": asked[left[i]], "answers": found}))
            file.flush()
            known[asked[left[i]]] = found
            bar.update(len(found))
        seconds = bar.format_dict["elapsed"]
    return [known[one] for one in asked], seconds


def main():
    """Ask all models all questions; what cannot be read or written ends the program with one line."""
    parser = ArgumentParser(description=__doc__, formatter_class=RawDescriptionHelpFormatter)
    parser.add_argument("questions", type=Path, help="the file of questions")
    parser.add_argument("--model", type=Path, nargs="+", required=True, help="folders of training results")
    parser.add_argument("--out", type=Path, default=Path("answers.csv"), help="the table to write")
    parser.add_argument("--html", type=Path, help="a page to write, with the images")
    parser.add_argument("--images", type=Path, default=Path("."), help="the folder in which the images are named")
    parser.add_argument("--at-once", type=int, default=64, help="so many conversations are held at the same time")
    parser.add_argument("--max-new-tokens", type=int, default=256, help="where an answer is cut")
    parser.add_argument("--int8", action="store_true", help="weights in 8 bits, as in chat.py")
    parser.add_argument("--devices", type=int, help="so many cards share LLaMA's layers, as in chat.py")
    options = parser.parse_args()
    if n_ranks() > 1:
        parser.error("started as several ranks: start one process, and take --devices for several cards")
    if options.at_once < 1 or options.max_new_tokens < 1:
        parser.error("--at-once and --max-new-tokens: expected 1 or more")
    partial = options.out.with_name(f"{options.out.name}.partial")
    try:
        if options.out.exists():
            raise ValueError(f"{options.out} exists: delete it, or take another --out")
        for file in filter(None, (options.out, options.html)):
            if not file.absolute().parent.is_dir():
                raise FileNotFoundError(f"no folder {file.parent}, into which {file} should be written")
        questions = read_questions(options.questions, options.images)
        answers, seconds = {}, 0.0
        for folder in options.model:
            answers[str(folder)], its_seconds = answers_of(folder, questions, options, partial)
            seconds += its_seconds
        if options.html:
            write_html(options.html, questions, answers)
        write_answers(options.out, questions, options.images, answers)      # last, since it is the sign of the end
        partial.unlink()
    except (OSError, ValueError, torch.OutOfMemoryError) as error:
        sys.exit(f"evaluate.py: {printable(str(error))}")
    except KeyboardInterrupt:
        sys.exit(130)
    print(f"{options.out}: {sum(map(len, questions.values()))} questions in {len(questions)} conversations, "
          f"{len(answers)} model{'s' * (len(answers) > 1)}, {seconds:.1f} s without loading")


if __name__ == "__main__":
    main()
