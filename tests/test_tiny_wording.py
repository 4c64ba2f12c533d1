"""tiny/wording.py: many phrases for each question, unseen ones stay unseen, names mean their images."""
import random
import re

import pytest

from tiny.pretrain import named_image
from tiny.wording import (ABOUT_ONE, BEFORE, COMPARING, NOUNS, ORDINALS, PHRASES, THINGS, TOPICS, UNSEEN_BEFORE,
                          UNSEEN_PHRASES, UNSEEN_THINGS, Ask, Wording, name_of)
from tiny.world import SEEN, VALUES, dialogue, is_clear


def asks(topic: str):
    """One question of each kind of a topic."""
    images = (0, 2) if topic in ("same", "changed", "all") else () if topic in ("any", "which") else (2,)
    about = ["size", "place"] if topic == "same" else VALUES if topic in ("is", "any", "which") else [""]
    return [Ask(topic, images, value) for value in about]


def plainly(text: str) -> str:
    return re.sub(r"[^a-z{}# ]", "", text.lower()).strip()


def test_every_topic_has_phrases_for_training_and_others_for_the_exam():
    assert set(PHRASES) == set(UNSEEN_PHRASES) == set(TOPICS) - {"absent"} | {"again"}
    known = {plainly(phrase) for phrases in PHRASES.values() for phrase in phrases}
    for topic in PHRASES:
        assert len(set(PHRASES[topic])) == len(PHRASES[topic]) and len(PHRASES[topic]) >= 7
        assert not {plainly(phrase) for phrase in UNSEEN_PHRASES[topic]} & known, topic
    begun = {f"{plainly(before)} {phrase}" for before in BEFORE for phrase in known}    # never before small talk
    assert not {plainly(phrase) for topic in (*ABOUT_ONE, *COMPARING, "again")
                for phrase in UNSEEN_PHRASES[topic]} & begun
    assert not set(UNSEEN_BEFORE) & set(BEFORE) and not set(UNSEEN_THINGS) & set(THINGS)


def test_no_question_in_unseen_wording_is_asked_in_training():
    rng, asked = random.Random(0), {}
    for unseen, n in ((False, 2000), (True, 300)):
        dialogues = [dialogue(1 + i % 3, 6, rng, SEEN, Wording(unseen=unseen))[1] for i in range(n)]
        asked[unseen] = {plainly(question) for rounds in dialogues for _, _, question, _ in rounds}
    assert len(asked[False]) > 7000 and len(asked[True]) > 1000 and not asked[False] & asked[True]


@pytest.mark.parametrize("wording", [Wording(), Wording(unseen=True), Wording(lower=True), Wording(plain=True)])
@pytest.mark.parametrize("topic", sorted(PHRASES))
def test_a_question_has_the_names_and_the_value_that_it_is_about(topic, wording):
    rng = random.Random(0)
    synonyms = {"big": "big|large", "small": "small|little|tiny", "center": "cent(er|re)|middle",
                "place": "place|position|spot|location", "shape": "shape|form", "color": "colou?r"}
    for ask in asks(topic) * 20:
        names = [f"picture {image + 1}" for image in ask.images]
        text = wording.question(ask, names, short=False, rng=rng).lower()
        assert not set(text) & set("{}") and text.strip() == text
        if topic in (*ABOUT_ONE, "same", "changed"):
            numbers = " and ".join(name.split()[-1] for name in names)              # as in "images 1 and 3"
            assert all(name in text for name in names) or numbers in text, text
        if ask.about:
            assert re.search(rf"\b({synonyms.get(ask.about, ask.about)})s?\b", text), (ask, text)


def test_people_type_in_every_way_and_lower_means_always_lower_and_without_marks():
    rng, ask = random.Random(0), Ask("color", (1,))
    texts = [Wording().question(ask, ["image 2"], False, rng) for _ in range(400)]
    for found in ("colour", "color", "please", "can you tell me"):
        assert any(found in text.lower() for text in texts), found
    assert any(text[-1] not in "?.!" for text in texts) and any(text[-1] == "?" for text in texts)
    assert 0.2 < sum(text == text.lower() for text in texts) / 400 < 0.6
    for topic in PHRASES:
        for _ in range(50):
            text = Wording(lower=True).question(asks(topic)[0], ["image A", "image B"], False, rng)
            assert text == text.lower() and text[-1] not in "?.!"


def test_it_is_used_only_where_it_is_clear():
    rng = random.Random(0)
    short, long = ([Wording().question(Ask("place", (0,)), ["image 1"], clear, rng).lower() for _ in range(300)]
                   for clear in (True, False))
    assert any("image 1" not in text for text in short) and any(text.startswith("where is it") for text in short)
    assert all("image 1" in text for text in long)


def test_questions_without_names_are_about_the_focus_about_both_or_about_all_while_there_is_no_focus():
    for topic, images, n_shown, focus, clear in (
            ("color", (1,), 2, 1, True), ("color", (0,), 2, 1, False), ("color", (1,), 2, None, False),
            ("same", (1, 0), 2, None, True), ("changed", (0, 2), 3, None, False), ("all", (0, 1), 2, None, True),
            ("all", (0, 1), 2, 1, False), ("color", (5,), 0, None, True)):
        assert is_clear(Ask(topic, images), n_shown, focus) == clear, (topic, images, n_shown, focus)


def number_of(name: str) -> int:
    """Which image a name means, counted from 0, read without tiny/pretrain.py."""
    words = re.sub(r"(\d+)", r" \1 ", name.lower().replace("#", "")).split()
    spelled = "one two three four five six seven eight nine".split()
    for word in words:
        if word.isdigit():
            return int(word) - 1
        if word in ORDINALS:
            return ORDINALS.index(word)
    return spelled.index(words[-1]) if words[-1] in spelled else ord(words[-1]) - ord("a")


def test_a_name_means_its_image_for_readers_and_for_the_auxiliary_heads():
    rng, forms = random.Random(0), set()
    for _ in range(2000):
        image = rng.randrange(9)
        name = name_of(image, False, rng)
        assert number_of(name) == image, name
        pieces = re.findall(r"[A-Za-z]+|\d|#", f"Is {name}")
        found = [named_image(pieces[:i + 1], (pieces + [""])[i + 1], latest=0) for i in range(len(pieces))]
        assert [each for each in found if each is not None] == [image], name
        forms.add(re.sub(r"\d", "9", name) if name.split()[0] in NOUNS else name.split()[0])
    assert len(forms) > 15
    for image, number in ((11, "12"), (-1, "0")):
        pieces = ["image", *number]
        assert [named_image(pieces[:i + 1], (pieces + [""])[i + 1], 0) for i in range(len(pieces))][-1] == image
        assert named_image(["image", "1"], "2", 0) is named_image(["the", "2"], "nd", 0) is None
        assert {name_of(image, False, rng) for _ in range(200)} == {f"{noun} {number}" for noun in NOUNS}
    assert any(name_of(3, True, rng).startswith("the last ") for _ in range(200))


def test_the_header_of_an_image_is_no_name():
    assert named_image(["###", "Image", "2"], ":", 0) is named_image(["an", "image", "bc"], "", 0) is None
    assert [named_image(words.split(), "?", 4) for words in ("the image", "newest pic", "this photo")] == [4, 4, 4]
    assert named_image(["it"], "?", 4) is None                       # is what was talked about last


def test_topics_are_those_of_one_image_of_several_and_of_none():
    assert len(TOPICS) == len(set(TOPICS)) == len(ABOUT_ONE) + len(COMPARING) + 5
