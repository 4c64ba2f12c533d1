"""shapes.py: questions have the one right answer, held-out pairs stay out, files are what the readers expect."""
import json
import random
import re
from dataclasses import replace
from io import BytesIO
from itertools import product
from pathlib import Path

import pytest
import torch
from PIL import Image, ImageChops
from transformers import LlamaForCausalLM

import shapes
from data import SOURCES, TAGS, open_picture, read
from llama import Llama, Tokenizer
from vit import VisionTransformer, open_image

WEIGHTS = Path(__file__).parent.parent / "weights/tiny"


def numbered(text: str, shown: int) -> str:
    """The text with every image called by its number, however it was called."""
    for names in TAGS:
        for i, name in enumerate(names, 1):
            text = re.sub(rf"\b{name}\b", f"image {i}", text)
    return text.replace("the image", f"image {shown}")


def right_answer(question: str, scenes: list) -> str:
    """An answer worked out from the question's words alone."""
    numbers = [int(digit) - 1 for digit in re.findall(r"\d", question)]
    if question.startswith("Describe"):
        return "A {} {} {} at the {}.".format(*scenes[numbers[0]])
    if question.startswith("What changed"):
        a, b = (scenes[i] for i in numbers)
        return " ".join(f"the {name}" for name, x, y in zip(("size", "color", "shape", "place"), a, b) if x != y)
    if question.startswith("Do image"):
        place = ("size", "color", "shape", "place").index(question.rstrip("?").split()[-1])
        return "yes" if scenes[numbers[0]][place] == scenes[numbers[1]][place] else "no"
    if question.startswith(("Does any", "Which")):
        known = {value for values in shapes.ATTRIBUTES.values() for value in values}
        (value,) = set(question.rstrip("?").split()) & known
        having = [f"image {i}" for i, scene in enumerate(scenes, 1) if value in scene]
        return " ".join(having) if question.startswith("Which") else "yes" if having else "no"
    place = 3 if question.startswith("Where") else ("size", "color", "shape").index(question.split()[1])
    return scenes[numbers[0]][place]


def test_every_question_has_its_one_right_answer():
    rng = random.Random(0)
    for _ in range(300):
        scenes, rounds = shapes.dialogue(rng.choice([1, 2, 3]), 6, rng, shapes.anything)
        shown = []
        for new, topic, question, answer in rounds:
            shown = shown + new
            assert shapes.topic_of(question) == topic
            question, answer = (numbered(text, len(shown)) for text in (question, answer))
            assert answer == right_answer(question, shown)
            assert max([int(digit) for digit in re.findall(r"\d", question)], default=1) <= len(shown)
        assert shown == scenes


def test_images_are_called_in_every_way_and_the_image_is_the_last_one():
    rng, asked = random.Random(0), []
    for _ in range(400):
        for new, *_, question, _ in shapes.dialogue(3, 6, rng, shapes.anything)[1]:
            asked.append(question)
    for names in TAGS:
        assert all(any(re.search(rf"\b{name}\b", question) for question in asked) for name in names[:3])
    for _ in range(400):
        _, rounds = shapes.dialogue(2, 4, rng, shapes.anything)
        if len(rounds[0][0]) == 2:              # shown together, neither is "the image"
            assert not any("the image" in question for *_, question, _ in rounds)


def test_no_topic_of_question_can_be_guessed():
    rng, answers = random.Random(0), {}
    for _ in range(3000):
        for _, topic, _, answer in shapes.dialogue(rng.choice([2, 3]), 6, rng, shapes.seen)[1]:
            answers.setdefault(topic, []).append(answer)
    assert set(answers) == {"size", "color", "shape", "place", "describe", *shapes.COMPARING}
    for topic, given in answers.items():
        commonest = max(given.count(answer) for answer in set(given)) / len(given)
        assert commonest < {"any": .55, "same": .6, "which": .5, "size": .55, "changed": .35}.get(topic, .3), topic


def test_held_out_pairs_are_in_one_world_alone():
    scenes = list(product(*shapes.ATTRIBUTES.values()))
    held_out = [scene for scene in scenes if not shapes.seen(scene)]
    assert len(scenes) == 240 and len(held_out) == 60
    assert {value for scene in held_out for value in scene} == {value for scene in scenes for value in scene}
    rng = random.Random(0)
    for _ in range(200):
        assert all(map(shapes.seen, shapes.dialogue(3, 6, rng, shapes.seen)[0]))
        assert not any(map(shapes.seen, shapes.dialogue(3, 6, rng, shapes.unseen)[0]))


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("world")
    shapes.write_world(folder, 60, seed=3)
    return folder


def test_the_world_holds_all_nine_datasets(world):
    for name in SOURCES:
        conversations = read(world, [name], tell=pytest.fail)   # nothing is left out
        assert conversations, name
        files = [[file for turn in talk.rounds for file in turn.images] for talk in conversations]
        assert {len(shown) for shown in files} <= {1, 2, 3}
        assert all(len(set(shown)) == len(shown) for shown in files)
        for file in files[0]:
            assert open_picture(file, 16).shape == (3, 16, 16)


def test_every_answer_in_every_dataset_is_right(world):
    """Pictures are known by their bytes: drawn again from the same seed, each tells its scene."""
    known = {}

    def told(scene, rng, *side, drawn=shapes.draw):
        picture = drawn(scene, rng, *side)
        known[picture.tobytes()] = scene
        return picture

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(shapes, "draw", told)
        patch.setattr(Image.Image, "save", lambda picture, file, *args, save=Image.Image.save, **settings:
                      save(picture, file, "PNG"))               # so that the bytes can be recognized
        folder = world.parent / "told"
        shapes.write_world(folder, 60, seed=3)
    for talk in read(folder, SOURCES, tell=pytest.fail):
        shown = []
        for turn in talk.rounds:
            shown += [known[open_image(BytesIO(file.read_bytes())).tobytes()] for file in turn.images]
            question, answer = (numbered(text, len(shown)) for text in (turn.question, turn.answer))
            assert answer == right_answer(question, shown), (talk.name, turn)


def test_the_same_seed_draws_the_same_files_and_another_seed_others(world, tmp_path):
    shapes.write_world(tmp_path / "again", 60, seed=3)
    shapes.write_world(tmp_path / "other", 60, seed=4)
    files = [file.relative_to(world) for file in sorted(world.rglob("*.j*")) if file.suffix != ".index"]
    assert len(files) > 200
    assert all((tmp_path / "again" / file).read_bytes() == (world / file).read_bytes() for file in files)
    assert (tmp_path / "other/llava/detail_23k.json").read_text() != (world / "llava/detail_23k.json").read_text()


def test_dialogues_about_several_images_are_one_conversation_each(world):
    several = read(world, ["llava_dial"])
    assert len(several) == 60 and {sum(len(turn.images) for turn in talk.rounds) for talk in several} == {2, 3}
    for talk in several:
        files = [file for turn in talk.rounds for file in turn.images]
        assert files == sorted(files) and len(talk.rounds) == 6
        assert all(Image.open(file).size == (224, 224) and file.suffix == ".jpg" for file in files)


def test_llava_records_are_in_the_official_format(world):
    for record in json.loads((world / "llava/detail_23k.json").read_text()):
        assert set(record) == {"id", "image", "conversations"} and isinstance(record["image"], str)
        assert record["conversations"][0]["value"].endswith("\n<image>")
        assert [turn["from"] for turn in record["conversations"]] == ["human", "gpt"] * 3


def test_pictures_of_one_scene_differ():
    rng = random.Random(0)
    a, b = (shapes.draw(("big", "red", "star", "left"), rng) for _ in range(2))
    assert ImageChops.difference(a, b).getbbox()


def test_every_word_is_one_token_and_digits_are_stable():
    tokenizer = Tokenizer(WEIGHTS / "llama")
    words = tokenizer.model.encode_as_pieces("Which shape is red?\n### Image 1: 1? 2.")
    assert words == ["▁Which", "▁shape", "▁is", "▁red", "?",
                     "\n", "###", "▁Image", "▁1", ":", "▁1", "?", "▁2", "."]
    assert (tokenizer.bos, tokenizer.eos) == (1, 2)
    for text in ("zebra — ü", "red  ?", "  "):                   # unknown words in bytes, spaces as they are
        assert tokenizer.decode(tokenizer.encode(text)) == text


def test_towers_are_written_as_they_are_read(tmp_path):
    torch.manual_seed(0)
    llama, vit = Llama(replace(shapes.LLAMA, vocab_size=50)), VisionTransformer(shapes.VIT)
    (tmp_path / "llama").mkdir()
    shapes.write_llama(llama, tmp_path / "llama")
    shapes.write_vit(vit, tmp_path / "vit")
    again = Llama.from_pretrained(tmp_path / "llama"), VisionTransformer.from_pretrained(tmp_path / "vit")
    assert (again[0].config, again[1].config) == (llama.config, vit.config)
    for tower, copy in zip((llama, vit), again):
        assert all(torch.equal(a.half(), b) for a, b in zip(tower.parameters(), copy.parameters(), strict=True))
    assert len(list((tmp_path / "llama").glob("model-*-of-00002.safetensors"))) == 2


# ---- the shipped towers ----

def test_the_shipped_towers_are_small_and_in_half_precision():
    files = [file for file in WEIGHTS.rglob("*") if file.is_file()]
    assert sum(file.stat().st_size for file in files) < 12e6
    llama, vit = Llama.from_pretrained(WEIGHTS / "llama"), VisionTransformer.from_pretrained(WEIGHTS / "vit")
    assert 1e6 < sum(p.numel() for p in llama.parameters()) < 4e6
    assert 0.5e6 < sum(p.numel() for p in vit.parameters()) < 2e6
    assert {p.dtype for tower in (llama, vit) for p in tower.parameters()} == {torch.float16}


def test_transformers_reads_the_shipped_llama():
    theirs = LlamaForCausalLM.from_pretrained(WEIGHTS / "llama", dtype=torch.float32)
    ours = Llama.from_pretrained(WEIGHTS / "llama", "causal", torch.float32)
    ids = torch.randint(0, 300, (2, 30), generator=torch.Generator().manual_seed(0))
    logits = ours.lm_head(ours(ours.embed_tokens(ids), torch.ones_like(ids))).unflatten(0, ids.shape)
    assert torch.allclose(logits, theirs(ids).logits, atol=1e-4)


def test_a_linear_probe_reads_all_attributes_from_the_shipped_vit():
    vit = VisionTransformer.from_pretrained(WEIGHTS / "vit", torch.float32)
    right = []
    with torch.no_grad():
        (seen, wanted), (fresh, told) = ((vit(images), values) for images, values
                                         in (shapes.drawn(1200, 11), shapes.drawn(400, 12)))
    for i, width in enumerate(shapes.WIDTHS):                   # a fit on 1,200 pictures, read on 400 others
        x, y = (torch.cat((features[:, i], torch.ones(len(features), 1)), dim=1) for features in (seen, fresh))
        fit = torch.linalg.lstsq(x, torch.nn.functional.one_hot(wanted[:, i], width).float()).solution
        right.append((y @ fit).argmax(1) == told[:, i])
    assert torch.stack(right).float().mean() >= 0.99


def test_the_shipped_llama_reads_written_scenes():
    llama = Llama.from_pretrained(WEIGHTS / "llama", dtype=torch.float32)
    table = shapes.reading(llama, Tokenizer(WEIGHTS / "llama"), 400)
    for group, bar in (("one", 0.98), ("several", 0.95)):
        right = [right for answers in table[group].values() for right in answers]
        assert sum(right) / len(right) >= bar
        assert all(sum(right) / len(right) >= 0.85 for right in table[group].values())
