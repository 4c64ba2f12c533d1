"""The exam of the tiny world: what does a trained model answer about fresh drawings?

    python -m tiny.exam                        the newest result under out/
    python -m tiny.exam --model weights/tiny/chat

Every conversation of the test sets is held as in chat.py, with the model's own answers in its history; one set
asks in phrases that training never shows. An answer counts if it is right word for word. The first two test sets
come once more with every image gray ("blind"), to show how much can be guessed. One more set, tiny/people.json, is
about the three images of examples/. It was written without seeing any of the phrases, from README's list of what
can be asked. eval.csv in the result's folder gets every answer. Before: tiny/world.py, which draws the test sets.
"""
import csv
import math
import sys
from argparse import ArgumentParser, RawDescriptionHelpFormatter
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import mean

import torch
from torch import Tensor
from tqdm import tqdm

from data import Round
from evaluate import hold_conversations, of_equal_length
from llama import Tokenizer
from short import load_short
from sources import COCO, DIALOGUE, Reader, llava
from terminal import newest
from tiny.wording import BESIDE, REFUSALS
from tiny.world import DATA, ensure_tests
from visualchat import VisualChat, towers
from weights import printable, read_json, replacing

PEOPLE, EXAMPLES = Path(__file__).with_name("people.json"), Path(__file__).parents[1] / "examples"
BLIND = ("seen", "unseen")                  # the test sets that are asked with gray images, too
AT_ONCE, MAX_ANSWER = 80, 32                # conversations in a batch; tokens of an answer (right: up to 25)


@dataclass(frozen=True)
class Marked:
    """A question of the exam and what was answered; a line of eval.csv."""
    test: str                   # the test set
    conversation: int
    round: int                  # counted from 1
    images: int                 # how many were shown so far
    topic: str
    question: str
    expected: str
    answer: str
    blind: str                  # the answer with gray images; empty where it is not asked


# ---- the questions ----

def read_test(folder: Path) -> list[tuple[list[Round], list[str]]]:
    """The conversations of a test set, each with the topics of its questions."""
    found = llava(Reader(folder.name, folder), [folder / DIALOGUE], folder / COCO)
    topics = [record["topics"] for record in read_json(folder / DIALOGUE, list)]
    return [(one.rounds, each) for one, each in zip(found, topics, strict=True)]


def read_people() -> list[tuple[list[Round], list[str]]]:
    """The conversations of tiny/people.json, likewise; the topics are not known."""
    return [([Round(tuple(EXAMPLES / name for name in names), *texts) for names, *texts in rounds],
             ["people"] * len(rounds)) for rounds in read_json(PEOPLE, list)]


def gray(pixels: Tensor) -> Tensor:
    return torch.full_like(pixels, 128)


def run_exam(model: VisualChat, tokenizer: Tokenizer, data: Path) -> list[Marked]:
    """All questions of all test sets, which are drawn if they are not there."""
    model.eval()
    marked = []
    for name, test in [*((folder.name, read_test(folder)) for folder in ensure_tests(data)),
                       ("people", read_people())]:
        parts = list(of_equal_length([rounds for rounds, _ in test], AT_ONCE))
        for part in tqdm(parts, f"exam, {name}", leave=False):
            conversations = [test[i][0] for i in part]
            seeing = hold_conversations(model, tokenizer, conversations, MAX_ANSWER)
            blind = (hold_conversations(model, tokenizer, conversations, MAX_ANSWER, gray) if name in BLIND
                     else [[""] * len(rounds) for rounds in conversations])
            for i, answers, blind_answers in zip(part, seeing, blind):
                shown, number = 0, 0
                for round_, topic, answer, blind_answer in zip(*test[i], answers, blind_answers):
                    shown, number = shown + len(round_.images), number + 1
                    marked.append(Marked(name, i, number, shown, topic, round_.question, round_.answer, answer,
                                         blind_answer))
    return marked


# ---- what it says ----

def is_good(one: Marked) -> bool:
    """Whether a question is known to be about images that are there."""
    return one.topic not in (*BESIDE, "people")


# The lines of the table: name, which questions count.
GROUPS: dict[str, Callable[[Marked], bool]] = {
    **{f"{test} pairs, {images}": lambda one, test=test, images=images: (
        one.test == test and is_good(one) and (one.images > 1) == (images == "several"))
       for test in ("seen", "unseen") for images in ("one image", "several")},
    **{f'{test} pairs, "which"': lambda one, test=test: one.test == test and one.topic == "which"
       for test in ("seen", "unseen")},
    "wordings never seen": lambda one: one.test == "wordings" and is_good(one),
    "people's own words": lambda one: one.test == "people",
    "lower case, no marks": lambda one: one.test == "lower" and is_good(one),
    "rounds 13 to 16": lambda one: one.round > 12 and is_good(one),
    "rounds 13 to 16, up to 3 images": lambda one: one.round > 12 and one.images < 4 and is_good(one),
    **{f"{n} image{'s' * (n > 1)}": lambda one, n=n: one.test == "long" and one.images == n and is_good(one)
       for n in range(1, 9)},
    "absent image": lambda one: one.topic == "absent",
    "before the first image": lambda one: not one.images and one.test != "people",
    "outside of its world": lambda one: one.topic == "outside",
    "small talk": lambda one: one.topic in ("hello", "thanks", "bye"),
}


def percent(right: list[bool]) -> float | None:
    """How many are right; None where nothing was asked."""
    return 100 * sum(right) / len(right) if right else None


def share_line(right: list[bool]) -> dict:
    """A line of the table: how many questions, percent right and its standard error."""
    share = percent(right)
    return dict(questions=len(right), right=share, weakest=None, topic="", blind=None,
                error=math.sqrt(share * (100 - share) / len(right)) if right else None)


def table(marked: list[Marked]) -> dict[str, dict]:
    """For each group of questions: how many, percent right, its standard error, the weakest topic of at least 20
    questions, percent right with gray images. And how many good questions are refused, in percent.

    None stands where nothing was asked.
    """
    lines = {}
    for name, counts in GROUPS.items():
        chosen, topics = [one for one in marked if counts(one)], {}
        for one in chosen:
            topics.setdefault(one.topic, []).append(one.answer == one.expected)
        lines[name] = share_line([one.answer == one.expected for one in chosen])
        if often := [(percent(right), topic) for topic, right in topics.items() if len(right) >= 20]:
            lines[name]["weakest"], lines[name]["topic"] = min(often)
        lines[name]["blind"] = percent([one.blind == one.expected for one in chosen if one.test in BLIND])
    lines["good questions refused"] = share_line([one.answer in REFUSALS for one in marked if is_good(one)])
    return lines


def share_text(share: float | None) -> str:
    return "-" if share is None else f"{share:.1f}"


def table_text(lines: dict[str, dict]) -> str:
    """The lines of `table` to print."""
    text = f"{'percent right, word for word':<33}questions   right   +-    weakest topic      gray images\n"
    return text + "\n".join(
        f"{name:<33}{line['questions']:>9} {share_text(line['right']):>7} {share_text(line['error']):>5}   "
        f"{share_text(line['weakest']):>5} {line['topic']:<9} {share_text(line['blind']):>12}"
        for name, line in lines.items())


COLUMNS = {"right": "", "weakest": ", weakest topic", "blind": ", gray images"}     # of `table`, to be compared


def comparison_text(exams: dict[str, list[dict[str, dict]]]) -> str:
    """Tables of runs under the names of what was run, as one in Markdown: mean (least to greatest), in percent."""
    heads = [f"{name}{title}" for name in exams for title in COLUMNS.values()]
    lines = ["| | questions | " + " | ".join(heads) + " |", "|---" * (2 + len(heads)) + "|"]
    for group, line in next(iter(exams.values()))[0].items():
        values = [[found[group][column] for found in runs] for runs in exams.values() for column in COLUMNS]
        cells = ["-" if None in v else f"{mean(v):.1f} ({min(v):.1f} to {max(v):.1f})" for v in values]
        lines.append(f"| {group} | {line['questions']} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def write_row(path: Path, run: dict, lines: dict[str, dict]):
    """Write a run's names and percentages into a table of runs, in place of its older row, and print them."""
    row = {name: str(value) for name, value in run.items()} | {
        group: "" if line["right"] is None else f"{line['right']:.1f}" for group, line in lines.items()}
    old = path.read_text().splitlines() if path.exists() else []
    rows = {tuple(cells[:len(run)]): cells for cells in (*csv.reader(old), [*row], [*row.values()])}
    with replacing(path) as unfinished, open(unfinished, "w", newline="") as file:
        csv.writer(file).writerows(rows.values())
    print("\n".join(f"{name}: {value}" for name, value in row.items()))


def write_marked(marked: list[Marked], path: Path):
    with replacing(path) as unfinished, open(unfinished, "w", newline="") as file:
        writer = csv.DictWriter(file, asdict(marked[0]))
        writer.writeheader()
        writer.writerows(asdict(one) for one in marked)


def read_marked(path: Path) -> list[Marked]:
    """The lines of an eval.csv."""
    with open(path, newline="") as file:
        return [Marked(**{name: int(value) if name in ("conversation", "round", "images") else value
                          for name, value in row.items()}) for row in csv.DictReader(file)]


def main():
    """Examine a result; what cannot be read ends the program with one line."""
    parser = ArgumentParser(description=__doc__, formatter_class=RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, help="folder of a training result; default the newest under out/")
    parser.add_argument("--data", type=Path, default=DATA,
                        help="the test sets lie in its folder tests, and are drawn there if absent")
    parser.add_argument("--int8", action="store_true", help="weights in 8 bits, as in chat.py")
    options = parser.parse_args()
    try:
        folder = options.model or newest(Path("out"))
        model, config = load_short(folder, [torch.device("cpu")], options.int8)
        answers = folder / f"eval{'-int8' * options.int8}.csv"
        marked = run_exam(model, Tokenizer(towers(config)[0], model.llama.config.vocab_size), options.data)
        print(f"{folder}, {config.attention} attention, {len(marked)} questions of "
              f"{len({one.test for one in marked})} test sets; {answers} has every answer")
        print(table_text(table(marked)))
        write_marked(marked, answers)
    except (OSError, ValueError) as error:
        sys.exit(f"tiny/exam.py: {printable(str(error))}")


if __name__ == "__main__":
    main()
