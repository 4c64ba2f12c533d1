"""Claims that no step makes the CPU wait for the card, as asking it for values does. There is no card here:
PyTorch's meta device stands for it, where `.item()`, `.tolist()`, `.cpu()` and `nonzero` are errors."""
import pytest
import torch

from data import collate
from decode import step_of_many
from llama import Cache
from mmca import IMAGE, TEXT
from visualchat import VisualChat, build

META = torch.device("meta")


def on_meta(batch: dict) -> dict:
    """As alike_on_all_ranks in train.py puts a batch on a card."""
    return {name: x if name in ("kind", "labels", "lengths") else x.to(META) for name, x in batch.items()}


@pytest.fixture
def far(config) -> VisualChat:
    return build(config, device="meta")


def test_a_meta_tensor_tells_no_values():
    x = torch.ones(3, device=META)
    for ask in (lambda: x[0].item(), x.tolist, x.cpu, x.nonzero, lambda: x[x > 0]):
        with pytest.raises((RuntimeError, NotImplementedError)):
            ask()


def test_forward_and_backward_pass_of_a_training_step_wait_for_nothing(far, rows):
    far.freeze()
    batch = on_meta(collate(rows))
    assert (batch["kind"] == IMAGE).any() and batch["ids"].is_meta
    losses, right = far(**batch)
    assert losses.is_meta and len(losses) == len(right) == (batch["labels"][:, 1:] != -100).sum()
    losses.sum().backward()
    assert far.projection.weight.grad.shape == far.projection.weight.shape


def test_reading_a_prompt_and_making_tokens_wait_for_nothing(far):
    n = far.vit.config.n_queries
    kind = torch.tensor([[TEXT] * 3 + [IMAGE] * n + [TEXT] * 2])
    cache, ids = Cache(far.llama, 1, 16), torch.zeros_like(kind, device=META)
    images = torch.zeros(1, 3, *[far.vit.config.image_size] * 2, dtype=torch.uint8, device=META)
    logits = far.prefill(far.embed(ids, kind, far.image_tokens(images)), kind, cache)
    tokens = list(far.generate(logits, cache, 4))
    assert len(tokens) == 4 and all(token.is_meta for token in tokens)
    assert cache.past == [tuple(kind[0].tolist()) + (TEXT,) * 3]
    image_kv = cache.newest_images(n)                           # known images are read without one
    other = Cache(far.llama, 1, 16)
    assert far.prefill(far.llama.embed_tokens(ids), kind, other, image_kv=image_kv).is_meta


def test_a_token_for_each_of_many_conversations_waits_for_nothing(far):
    ended = torch.tensor([False, True, False])
    cache, kind = Cache(far.llama, 3, 8), torch.tensor([[TEXT] * 2 + [TEXT, IMAGE, IMAGE, TEXT] + [TEXT]])
    x = far.llama.embed_tokens(torch.zeros_like(kind, device=META))
    with torch.no_grad():
        far.llama(x, kind, lengths=[2, 4, 1], cache=cache)
    logits = step_of_many(far.llama, ended)(torch.zeros(3, dtype=torch.long, device=META), cache)
    assert logits.is_meta and list(map(len, cache.past)) == [3, 4, 2]
