"""What several test files share: a tiny random model in official folders, its tokenizer, images."""
import copy
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from sentencepiece import SentencePieceTrainer

from data import SYSTEM, Round, collate, encode, to_tensors
from llama import Llama, LlamaConfig, Tokenizer
from mmca import IMAGE, PAD, TEXT, all_text, compact_attention, mmca, separate, written_attention
from tiny.world import write_world
from training import ROOT, losses
from two_processes import pytest_runtestloop         # noqa: F401
from visualchat import ModelConfig, build, whole_answers
from vit import IN_CONFIG, PREFIX, VisionConfig, VisionTransformer

TINY = LlamaConfig(48, 80, 2, 4, 2, vocab_size=50)
VIT = VisionConfig(image_size=16, patch_size=8, width=16, layers=2, heads=2, mlp_width=32, output_dim=128,
                   n_queries=4, grid=2)


def tiny(attention="causal", config=TINY):
    torch.manual_seed(0)
    return Llama(config, attention).requires_grad_(False)


def flat_form(form, q, k, v, kind, past=0):
    """A form of attention for flat lists, called like mmca(): takes batches apart and puts them together."""
    rows = [tuple(number for number in row if number != PAD) for row in kind[:, :past].tolist()]
    layout = separate(kind[:, past:], past=rows)

    def extend(row, *new):
        """The past's keys and values before the new ones, as a key/value cache has them."""
        return [[torch.cat((x[row:row + 1, :, :past][:, :, kind[row, :past] == of_kind], part), dim=2)
                 for x, part in zip((k, v), pair)] for of_kind, pair in zip((TEXT, IMAGE), new)]

    flat_q, flat_k, flat_v = (x[:, :, -q.shape[2]:].transpose(1, 2).flatten(0, 1)[layout.index] for x in (q, k, v))
    flat_q = flat_q[:layout.n_text] if form is compact_attention else flat_q
    found = form(flat_q, flat_k, flat_v, layout, extend if past else None)
    out = torch.zeros_like(q.transpose(1, 2)).flatten(0, 1).index_put((layout.index,), found)
    return out.unflatten(0, (len(kind), -1)).transpose(1, 2)


def causal(q, k, v, kind, past=0):
    """Causal attention by the written formula."""
    return mmca(q, k, v, all_text(kind), past)


def compact(*arguments):
    return flat_form(compact_attention, *arguments)


def written(*arguments):
    return flat_form(written_attention, *arguments)


@pytest.fixture(autouse=True, scope="session")
def one_thread():
    """Tiny tensors: on a busy machine threads would only wait for each other."""
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def config(tmp_path_factory) -> ModelConfig:
    """Where the tiny towers lie. Their weights are large, so that every token and every image matters."""
    llama, vit = tmp_path_factory.mktemp("llama"), tmp_path_factory.mktemp("vit")
    SentencePieceTrainer.train(
        # Lines without their breaks: in LLaMA's tokenizer, too, a line break is a byte and part of no other piece.
        sentence_iterator=iter([SYSTEM, "### Image 1:", "### Question: What is it?", "### Answer: A cat."] * 20),
        model_prefix=str(llama / "tokenizer"), vocab_size=340, model_type="bpe", byte_fallback=True,
        hard_vocab_limit=False, character_coverage=1.0, unk_id=0, bos_id=1, eos_id=2, minloglevel=2,
        normalization_rule_name="identity", remove_extra_whitespaces=False)
    words = Tokenizer(llama).model.get_piece_size()
    sizes = LlamaConfig(64, 96, 2, 4, 2, vocab_size=words, max_position_embeddings=512)
    (llama / "config.json").write_text(json.dumps({"model_type": "llama"} | vars(sizes)))
    visual = {name: vars(VIT)[name] for name in IN_CONFIG}
    (vit / "config.json").write_text(json.dumps({"visual": visual}))
    torch.manual_seed(0)
    for folder, tower, prefix in ((llama, Llama(sizes), "model."), (vit, VisionTransformer(VIT), PREFIX)):
        weights = {name if name == "lm_head.weight" else prefix + name:
                   torch.randn_like(t) * 0.2 if t.ndim > 1 else t for name, t in tower.state_dict().items()}
        if "lm_head.weight" in weights:
            weights["lm_head.weight"][2] *= 4                   # so that untrained answers end now and then
        save_file(weights, folder / "model.safetensors")
    return ModelConfig(llama=str(llama), vit=str(vit))


@pytest.fixture
def llama_folder(tmp_path):
    """A function that writes a tiny official folder, with changes to its tensors and its config.json."""
    def write(tensors=None, config=None):
        weights = {name if name == "lm_head.weight" else f"model.{name}": t
                   for name, t in tiny().state_dict().items()}
        weights = {name: t for name, t in (weights | (tensors or {})).items() if t is not None}
        save_file(weights, tmp_path / "model.safetensors")
        found = {"model_type": "llama"} | vars(TINY) | (config or {})
        (tmp_path / "config.json").write_text(json.dumps({name: x for name, x in found.items() if x is not None}))
        return tmp_path
    return write


@pytest.fixture
def model(config):
    torch.manual_seed(0)
    return build(config)


@pytest.fixture(scope="session")
def tokenizer(config) -> Tokenizer:
    return Tokenizer(config.llama)


@pytest.fixture(scope="session")
def image_files(tmp_path_factory) -> list[Path]:
    """Four files that look different."""
    folder, random = tmp_path_factory.mktemp("images"), np.random.default_rng(0)
    files = [folder / f"{name}.png" for name in "abcd"]
    for file in files:
        Image.fromarray(random.integers(0, 256, (16, 16, 3), dtype=np.uint8)).save(file)
    return files


@pytest.fixture(scope="session")
def rows(tokenizer, image_files):
    """Conversations with two images in one round, one image in a later round, and none; of different lengths."""
    a, b, c, d = image_files
    conversations = [[Round((a, b), "Which is it?", "A cat.")],
                     [Round((), "What is it?", "Question 1."), Round((c,), "What is image 1?", "You look at it.")],
                     [Round((), "Is it a cat?", "A question.")],
                     [Round((d,), "What is image 1?", "Answer: images.")]]
    return [to_tensors(encode(rounds, tokenizer, VIT.n_queries), VIT.image_size) for rounds in conversations]


@pytest.fixture(scope="session")
def overfitted(config, rows):
    """Trained on the rows: the model before, when the first answers were right, and at the end; the last loss."""
    torch.manual_seed(0)
    model, batch, halfway = build(config), collate(rows), None
    before = copy.deepcopy(model)
    model.freeze()
    trainable = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trainable, 2e-2, (0.0, 0.95), weight_decay=0)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1, 0, 300)
    for _ in range(300):
        losses, right = model(**batch)
        whole = whole_answers(batch["labels"], right)
        if halfway is None and whole.any() and not whole.all():
            halfway = copy.deepcopy(model)
        if losses.mean() < 0.05 and whole.all():
            break
        optimizer.zero_grad()
        losses.mean().backward()
        optimizer.step()
        schedule.step()
    return before, halfway, model, losses.mean().item()


@pytest.fixture(scope="session")
def world(tmp_path_factory) -> Path:
    """A folder to train in: the shipped towers and a small world."""
    folder = tmp_path_factory.mktemp("world")
    (folder / "weights").symlink_to(ROOT / "weights")
    write_world(folder / "data/tiny", 110, seed=1)
    return folder


@pytest.fixture(scope="session")
def reference(world) -> list[float]:
    return losses(world, "out/reference")
