"""Claims about experiments/cross.py (CA+CrA): who sees what, the cache, what trains, ZeRO-3, chat and evaluate."""
import csv
import sys
from dataclasses import replace
from itertools import islice

import pytest
import torch
from safetensors.torch import load_file

import mmca
from chat import Chat
from conftest import VIT
from data import Round, collate
from decode import step_of_many
from evaluate import hold_conversations
from experiments.cross import EXPERIMENTS, CrossLlama, change, places
from experiments.outside import apply, swap
from experiments.run import added
from llama import Cache, Llama, LlamaConfig
from loader import blank_batch
from mmca import IMAGE, TEXT
from train import join
from training import launch
from visualchat import TRAINED, VARIANTS, VisualChat, build, load, save
from vit import VisionTransformer


def make(words, gate):
    """A model with random weights, four layers, so two blocks, grouped queries, and this value for all gates."""
    torch.manual_seed(0)
    llama = Llama(LlamaConfig(64, 96, 4, 4, 2, vocab_size=words, max_position_embeddings=512), "cross")
    model = VisualChat(VisionTransformer(VIT), llama)
    for parameter in model.parameters():
        if parameter.ndim > 1:
            parameter.data.normal_(std=0.2)
    change(model)
    for block in llama.cross:
        block.attention_gate.data.fill_(gate)
        block.mlp_gate.data.fill_(gate)
    model.freeze()
    return model


@pytest.fixture
def crossed(tokenizer):
    return make(tokenizer.model.get_piece_size(), 0.7)


@pytest.fixture
def registered():
    """What `run.py cross` changes, and afterwards everything as it was."""
    one = EXPERIMENTS["cross"]
    apply("cross", one)
    yield
    for old, new in one.swaps:
        swap(new, old)
    del VARIANTS["cross"]
    mmca.ATTENTION.pop("cross")


def kind_of(letters):
    """Kinds (1, S) from letters such as "ttiit"."""
    return torch.tensor([[IMAGE if letter == "i" else TEXT for letter in letters]])


def text_logits(llama, x, kind, **more):
    with torch.no_grad():
        return llama.lm_head(llama(x, kind, kind == TEXT, **more))


# Three conversations: two images in two places, no image at all, and text after one image that comes first.
CONVERSATIONS = ["ttiiiitttiiiitt", "ttttt", "iiiitttt"]


@pytest.fixture
def embedded():
    """Embeddings (1, S, C) of the three conversations one after the other."""
    torch.manual_seed(1)
    return torch.randn(1, sum(map(len, CONVERSATIONS)), 64)


# ---- who sees what ----

def test_at_gate_0_the_model_is_the_language_model_on_the_text_alone(tokenizer, embedded):
    model = make(tokenizer.model.get_piece_size(), 0.0)
    plain = Llama(model.llama.config, "mmca")
    plain.load_state_dict({name: t for name, t in model.llama.state_dict().items() if "cross" not in name})
    for letters in CONVERSATIONS:
        x, kind = embedded[:, :len(letters)], kind_of(letters)
        alone = x[kind == TEXT][None]
        expected = text_logits(plain, alone, kind_of("t" * alone.shape[1]))
        torch.testing.assert_close(text_logits(model.llama, x, kind), expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("n_changed, n_before", [(0, 2), (1, 5)])
def test_an_image_changes_all_later_text_and_no_earlier_text(crossed, embedded, n_changed, n_before):
    letters = CONVERSATIONS[0]
    x, kind = embedded[:, :len(letters)], kind_of(letters)
    other, start = x.clone(), (2, 9)[n_changed]
    other[:, start:start + 4] = torch.randn(4, 64)
    moved = (text_logits(crossed.llama, x, kind) - text_logits(crossed.llama, other, kind)).abs().amax(-1)
    assert (moved[:n_before] == 0).all() and (moved[n_before:] > 1e-2).all(), moved


def test_image_tokens_go_through_no_layer_and_text_positions_count_text_alone(crossed, embedded):
    seen = []
    crossed.llama.watch = lambda number, q, k, layout: seen.append(
        (number, len(q), len(k), layout.position.tolist()))
    text_logits(crossed.llama, embedded, kind_of("".join(CONVERSATIONS)), lengths=[*map(len, CONVERSATIONS)])
    positions = [*range(7), *range(5), *range(4)]
    assert seen == [(number, 16, 16, positions) for number in range(4)]


def test_packed_equals_alone(crossed, embedded):
    lengths = [len(letters) for letters in CONVERSATIONS]
    packed = text_logits(crossed.llama, embedded, kind_of("".join(CONVERSATIONS)), lengths=lengths)
    alone = [text_logits(crossed.llama, x, kind_of(letters))
             for x, letters in zip(embedded.split(lengths, dim=1), CONVERSATIONS)]
    torch.testing.assert_close(packed, torch.cat(alone), atol=1e-5, rtol=1e-5)


def test_by_default_hidden_states_are_those_of_all_text(crossed, embedded):
    kind = kind_of(CONVERSATIONS[0])
    x = embedded[:, :kind.shape[1]]
    with torch.no_grad():
        assert torch.equal(crossed.llama(x, kind), crossed.llama(x, kind, kind == TEXT))
        assert crossed.llama(x, kind).shape == (7, 64)


def test_another_attention_is_refused(crossed, embedded):
    crossed.llama.attention = "mmca"
    with pytest.raises(ValueError, match="needs --attention cross, not mmca"):
        crossed.llama(embedded, kind_of("".join(CONVERSATIONS)))


# ---- the cache ----

def test_a_cache_gives_what_the_full_pass_gives_with_images_that_join_later(crossed, embedded):
    """All conversations go on in pieces; then the first one is taken back into the middle of an image."""
    llama, cache, found = crossed.llama, Cache(crossed.llama, 3, room=20), [{}, {}, {}]
    whole = embedded.split([len(letters) for letters in CONVERSATIONS], dim=1)
    for ends in ((1, 2, 6), (7, 3, 6), (7, 4, 7), (11, 5, 8), (15, 5, 8), "back", (14, 5, 8), (15, 5, 8)):
        if ends == "back":
            cache.past, found[0] = [cache.past[0][:4], *cache.past[1:]], {}
            continue
        starts = [len(past) for past in cache.past]
        pieces = [range(start, end) for start, end in zip(starts, ends)]
        kind = kind_of("".join(letters[i] for letters, piece in zip(CONVERSATIONS, pieces) for i in piece))
        logits = text_logits(llama, torch.cat([x[:, list(piece)] for x, piece in zip(whole, pieces)], dim=1), kind,
                             lengths=[len(piece) for piece in pieces], cache=cache)
        at = [(n, i) for n, piece in enumerate(pieces) for i in piece if CONVERSATIONS[n][i] == "t"]
        for (n, i), row in zip(at, logits, strict=True):
            found[n][i] = row
    for x, letters, its in zip(whole, CONVERSATIONS, found):
        full = text_logits(llama, x, kind_of(letters))[-len(its):]
        torch.testing.assert_close(torch.stack(list(its.values())), full, atol=1e-4, rtol=1e-4)
    assert [len(its) for its in found] == [5, 5, 4]
    assert cache.past == [tuple(kind_of(letters)[0].tolist()) for letters in CONVERSATIONS]
    held = [image.shape[3] for image in cache.image]
    assert held[0] == held[2] == 0 and held[1] and held[3]          # only a block keeps keys of images


def test_steps_equal_the_full_pass_and_those_that_ended_get_zeros_and_keep_their_cache(crossed, embedded):
    llama, lengths = crossed.llama, [len(letters) for letters in CONVERSATIONS]
    kind, ids = kind_of("".join(CONVERSATIONS)), torch.tensor([[5, 6, 7], [8, 9, 10], [11, 12, 13]])
    caches = [Cache(llama, 3, room=20) for _ in range(2)]
    for cache in caches:
        text_logits(llama, embedded, kind, lengths=lengths, cache=cache)
    ended = torch.zeros(3, dtype=torch.bool)
    step = step_of_many(llama, ended)
    for n, token in enumerate(ids, 1):
        ended[1] = n == 2                                       # the second one pauses at the second token
        alike, expected = step(token, caches[0]), []
        for i, (x, letters) in enumerate(zip(embedded.split(lengths, dim=1), CONVERSATIONS)):
            said = [ids[m, i] for m in range(n) if (m, i) != (1, 1)]
            x = torch.cat((x, llama.embed_tokens(torch.tensor(said))[None]), dim=1)
            expected.append(text_logits(llama, x, kind_of(letters + "t" * len(said)))[-1])
        if n == 1:
            plain = llama.next_logits(token, caches[1])
            torch.testing.assert_close(plain, torch.stack(expected), atol=1e-4, rtol=1e-4)
        if n == 2:
            expected[1] = torch.zeros_like(expected[1])
        torch.testing.assert_close(alike, torch.stack(expected), atol=1e-4, rtol=1e-4)
    assert [len(past) for past in caches[0].past] == [18, 7, 11]


# ---- what trains ----

def gradients(model, batch):
    model.zero_grad()
    losses, _ = model(**batch)
    losses.sum().backward()
    return {name: p.grad for name, p in model.named_parameters() if p.requires_grad}


def test_projection_embedding_and_blocks_train_and_recomputing_changes_no_gradient(crossed, rows):
    found = gradients(crossed, collate(rows))
    blocks = {f"llama.cross.{i}.{name}" for i in range(2) for name, _ in crossed.llama.cross[0].named_parameters()}
    assert set(found) == blocks | {"projection.weight", "projection.bias", "llama.embed_tokens.weight"}
    assert all(gradient.abs().sum() > 0 for gradient in found.values())
    crossed.llama.recompute = True
    for name, gradient in gradients(crossed, collate(rows)).items():
        torch.testing.assert_close(gradient, found[name])


@pytest.mark.parametrize("with_text", [False, True])
def test_every_trained_parameter_has_a_gradient_where_no_text_sees_an_image(crossed, rows, with_text):
    """Else ranks under ZeRO-3 would wait for each other: a blank image alone, or beside text without images."""
    class Blank:
        vision, features = VIT, None

    batch = blank_batch(Blank)
    for gradient in gradients(crossed, join(collate(rows[2:3]), batch) if with_text else batch).values():
        assert gradient is not None and gradient.isfinite().all()


def test_a_result_is_saved_and_loaded(config, registered, rows, tmp_path):
    config = replace(config, attention="cross", variant="cross")
    model = build(config)
    assert [float(gate.data) for name, gate in model.named_parameters() if name.endswith("gate")] == [0, 0]
    model.freeze()
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data += 0.1 * torch.randn_like(parameter)
    save(tmp_path, {name: p for name, p in model.named_parameters() if p.requires_grad}, config)
    again, its = load(tmp_path)
    assert its.variant == its.attention == "cross" and type(again.llama) is CrossLlama
    assert {name for name in load_file(tmp_path / TRAINED) if "cross" not in name} == {
        "projection.weight", "projection.bias", "llama.embed_tokens.weight"}
    batch = collate(rows)
    assert torch.equal(again(**batch)[0], model(**batch)[0])
    assert Chat.open(tmp_path).ask("What is it?") is not None
    for options, refused in ((dict(compiled=True), "--compile knows LLaMA's own layers alone"),
                             (dict(keep=tmp_path), "--keep needs MMCA"),
                             (dict(attention="mmca"), "trained with cross attention")):
        with pytest.raises(ValueError, match=refused):
            Chat.open(tmp_path, **options)


# ---- chat and evaluate ----

def test_a_chat_undoes_and_goes_on_as_if_nothing_had_been(crossed, tokenizer, image_files):
    def ask(chat, *files):
        list(islice(chat.stream("What is it?", *files), 12))
        return chat.rounds[-1].ids

    a, b, c, d = image_files
    one, other = Chat(crossed, tokenizer), Chat(crossed, tokenizer)
    one.max_new_tokens = other.max_new_tokens = 12
    first = ask(one, a, b)
    kept = one.cache.past
    ask(one, c)
    ask(one)
    one.undo()
    one.undo()
    assert len(one.cache.past[0]) <= len(kept[0]) + 2
    after = [ask(one, d), ask(one)]
    assert [ask(other, a, b), ask(other, d), ask(other)] == [first, *after]
    one.undo()
    one.clear()
    assert ask(one, a, b) == first
    blank = Chat(crossed, tokenizer)
    blank.max_new_tokens = 12
    assert ask(blank, c, d) != first                            # answers depend on the images


def test_many_conversations_at_once_answer_as_each_alone(crossed, tokenizer, image_files):
    a, b, c, _ = image_files
    conversations = [[Round((a, b), "Which is it?"), Round((), "What?")],
                     [Round((), "What is it?"), Round((c,), "It?")],
                     [Round((c,), "Is it a cat?"), Round((b,), "Is it?")]]
    together = hold_conversations(crossed, tokenizer, conversations, 10)
    for rounds, found in zip(conversations, together):
        assert hold_conversations(crossed, tokenizer, [rounds], 10) == [found]
        chat = Chat(crossed, tokenizer)
        chat.max_new_tokens = 10
        assert [chat.ask(one.question, *one.images) for one in rounds] == found
    assert len({answer for found in together for answer in found}) > 3


# ---- sizes, and ZeRO-3 ----

def test_the_blocks_add_a_layer_each_at_the_published_sizes():
    """At 7b 1.6 billion parameters; Otter, says the paper, trains more than 1.5 billion."""
    layer = 4 * 4096 ** 2 + 3 * 4096 * 11008 + 3 * 4096 + 2
    counts = [added(EXPERIMENTS["cross"], size) for size in ("7b", "13b", "70b")]
    assert counts[0] == 8 * layer and [round(count / 1e9, 2) for count in counts] == [1.62, 3.17, 17.11]
    assert [list(places(n)) for n in (2, 6)] == [[1], [1, 3, 5]] and list(places(32)) == [*range(3, 32, 4)]


# As `python -m experiments.run cross train …` does, but with gates that are open from the start, so that what the
# blocks compute shows in the losses.
OPENED = """
from experiments import cross, run
reset = cross.CrossBlock.reset_parameters
def opened(block):
    reset(block)
    block.attention_gate.data.fill_(0.5)
    block.mlp_gate.data.fill_(0.5)
cross.CrossBlock.reset_parameters = opened
run.main()
"""


def losses_of(world, tmp_path, out, *options, ranks=1):
    script = tmp_path / "opened.py"
    script.write_text(OPENED)
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"] * (ranks > 1)
    launch(world, sys.executable, *launcher, str(script), "cross", "train", "--epochs", "1", "--workers", "0",
           "--lr", "1e-4", "--out", out, *options)
    with open(world / out / "log.csv") as file:
        return [float(row["loss"]) for row in csv.DictReader(file)]


def test_two_ranks_that_share_out_every_parameter_equal_one(world, tmp_path):
    """There is room for two or three conversations at a time: one rank may have more batches than the other."""
    (tmp_path / "all.json").write_text('{"zero_optimization": {"stage3_param_persistence_threshold": 0}}')
    one = losses_of(world, tmp_path, "out/cross-one")
    two = losses_of(world, tmp_path, "out/cross-two", "--deepspeed-config", str(tmp_path / "all.json"),
                    "--positions", "400", ranks=2)
    assert len(one) == 9 and two == pytest.approx(one, abs=1e-3)
    trained, again = (load_file(world / out / TRAINED) for out in ("out/cross-one", "out/cross-two"))
    assert set(trained) == set(again) and sum("cross" in name for name in trained) == 3 * 12
    assert all(float(again[name]) != 0.5 for name in again if name.endswith("gate"))
