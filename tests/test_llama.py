"""Claims about llama.py: transformers' logits, the cache, padding, official sizes and names, configurations."""
import io
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from sentencepiece import SentencePieceTrainer

from conftest import tiny
from llama import LLAMA_2, Cache, Head, Llama, RMSNorm, Tokenizer
from mmca import ATTENTION, IMAGE, PAD, TEXT

GOLDEN = Path(__file__).parent / "golden"
MIXED = [PAD, TEXT, TEXT, IMAGE, IMAGE, TEXT, PAD, TEXT, IMAGE, TEXT, TEXT, PAD]

every = pytest.mark.parametrize("attention", ATTENTION)


def text_logits(model, ids):
    return model.lm_head(model(model.embed_tokens(ids), torch.full_like(ids, TEXT))).unflatten(0, ids.shape)


def run(model, x, kind, *cache):
    """Hidden states (B, T, C), zero at padding."""
    out = torch.zeros_like(x)
    out[kind != PAD] = model(x, kind, cache=cache[0] if cache else None)
    return out


def same(found, expected):
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=0)


# ---- against transformers ----

@pytest.fixture(scope="module", params=[4, 2], ids=["multi-head", "grouped-query"])
def theirs(request, tmp_path_factory):
    """transformers' own model, and the folder that it was saved to."""
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(
        vocab_size=97, hidden_size=64, intermediate_size=176, num_hidden_layers=3, num_attention_heads=4,
        num_key_value_heads=request.param, rms_norm_eps=1e-5, initializer_range=0.1)).eval()
    for name, parameter in model.named_parameters():
        if "norm" in name:
            torch.nn.init.uniform_(parameter, 0.5, 1.5)
    folder = tmp_path_factory.mktemp("theirs")
    model.save_pretrained(folder, max_shard_size="200KB")
    assert len(list(folder.glob("*.safetensors"))) >= 2
    return model, folder


@torch.no_grad()
def test_logits_match_transformers(theirs):
    model, folder = theirs
    ids = torch.randint(97, (2, 33))
    same(text_logits(Llama.from_pretrained(folder, "causal"), ids), model(ids).logits)


def test_parameter_names_are_transformers_names(theirs):
    model, folder = theirs
    names = Llama.from_pretrained(folder).state_dict()
    assert {name if name == "lm_head.weight" else f"model.{name}" for name in names} == set(model.state_dict())


@torch.no_grad()
@pytest.mark.parametrize("name", ["llama_mha_open", "llama_gqa_open"])
def test_golden_logits(name):
    expected = load_file(GOLDEN / name / "expected.safetensors")
    same(text_logits(Llama.from_pretrained(GOLDEN / name, "causal"), expected["input_ids"]), expected["logits"])


# ---- forward ----

@every
@pytest.mark.parametrize("chunks", [[1] * 12, [5, 7], [3, 1, 8], [11, 1]], ids=str)
def test_the_cache_equals_the_full_forward(attention, chunks):
    model, x, kind = tiny(attention), torch.randn(2, 12, 48), torch.tensor([MIXED, MIXED[::-1]])
    cache = Cache(model, 2, room=12)
    parts = [run(model, *part, cache) for part in zip(x.split(chunks, dim=1), kind.split(chunks, dim=1))]
    same(torch.cat(parts, dim=1), run(model, x, kind))


def test_a_pass_that_was_interrupted_counts_for_nothing_in_the_cache():
    model, x, kind = tiny("mmca"), torch.randn(1, 12, 48), torch.tensor([MIXED])
    cache, before = Cache(model, 1, room=12), run(model, x, kind)
    run(model, x[:, :5], kind[:, :5], cache)
    hook = model.layers[1].register_forward_pre_hook(lambda *_: 1 / 0)          # the first layer is in the cache
    with pytest.raises(ZeroDivisionError):
        run(model, torch.randn(1, 7, 48), kind[:, 5:], cache)
    hook.remove()
    same(run(model, x[:, 5:], kind[:, 5:], cache), before[:, 5:])


def conversation(model, kinds, ids, answer):
    """The cache after ids of these kinds, and the logits behind each of the answer's ids from a full pass."""
    x, kind = model.embed_tokens(torch.cat((ids, answer)))[None], torch.tensor([kinds + [TEXT] * len(answer)])
    cache = Cache(model, 1, room=kind.numel() if model.attention == "causal" else int((kind == TEXT).sum()))
    model(x[:, :len(ids)], kind[:, :len(ids)], cache=cache)
    return cache, model.lm_head(run(model, x, kind)[0, len(ids):])


@every
@pytest.mark.parametrize("kinds", [[TEXT] * 4, [TEXT, IMAGE, IMAGE, TEXT, TEXT, IMAGE, TEXT]],
                         ids=["text", "images"])
def test_a_single_step_is_a_forward_pass(attention, kinds):
    model, ids, answer = tiny(attention), torch.arange(len(kinds)), torch.tensor([7, 40, 2])
    cache, expected = conversation(model, kinds, ids, answer)
    same(torch.cat([model.next_logits(token, cache) for token in answer.split(1)]), expected)
    with pytest.raises(ValueError, match="room for"):
        model.next_logits(answer[:1], cache)


def test_a_full_cache_is_refused():
    model = tiny()
    cache = Cache(model, 1, room=4)
    run(model, torch.randn(1, 3, 48), torch.full((1, 3), TEXT), cache)
    with pytest.raises(ValueError, match="5 text tokens, but the cache has room for 4"):
        run(model, torch.randn(1, 2, 48), torch.full((1, 2), TEXT), cache)


def test_keys_and_values_of_an_image_serve_in_every_conversation_and_at_every_position():
    model, image = tiny("mmca"), torch.randn(3, 48)
    first, kind = Cache(model, 1, room=2), torch.tensor([[TEXT, IMAGE, TEXT] + [IMAGE] * 3])
    model(torch.cat((torch.randn(3, 48), image))[None], kind, cache=first)  # first shown after another image
    image_kv = first.newest_images(3)
    for before, after in [(0, 4), (2, 2), (4, 0)]:
        kind = torch.tensor([[TEXT] * before + [IMAGE] * 3 + [TEXT] * after + [IMAGE] * 3 + [TEXT]])
        x = torch.randn(1, len(kind[0]), 48)
        x[0, before:before + 3] = x[0, -4:-1] = image
        x_text, cache = x.masked_fill(kind[..., None] == IMAGE, float("nan")), Cache(model, 1, room=5)
        found = model(x_text, kind, kind == TEXT, cache=cache, image_kv=torch.cat((image_kv, image_kv), dim=3))
        same(found, run(model, x, kind)[kind == TEXT])
        assert [len(past) for past in cache.past] == [len(kind[0])]             # the images are in the cache, too


@every
def test_conversations_packed_in_one_row_change_nothing(attention):
    model, kinds = tiny(attention), [[TEXT, IMAGE, TEXT], [TEXT] * 4, MIXED, [TEXT]]
    kind, x = torch.tensor([sum(kinds, [])]), torch.randn(1, 20, 48)
    packed = torch.zeros_like(x)
    packed[kind != PAD] = model(x, kind, lengths=[len(row) for row in kinds])
    for row, part, found in zip(kinds, *(t.split([len(row) for row in kinds], dim=1) for t in (x, packed))):
        same(found, run(model, part, torch.tensor([row])))


@every
def test_positions_that_are_read_come_in_order_and_unchanged(attention):
    model, x, kind = tiny(attention), torch.randn(2, 12, 48), torch.tensor([MIXED, MIXED[::-1]])
    read = (torch.rand(2, 12) < 0.5) & (kind != PAD)
    same(model(x, kind, read), run(model, x, kind)[read])


@pytest.mark.parametrize("wanted", [0, 1, 600])
def test_chunked_losses_and_their_gradients_are_cross_entropy_s(wanted):
    torch.manual_seed(0)
    head, found = Head(48, 70, bias=False).requires_grad_(False), []
    hidden, target, weight = torch.randn(wanted, 48), torch.randint(70, (wanted,)), torch.rand(wanted)
    for chunked in (True, False):
        x = hidden.clone().requires_grad_()
        logits = head(x)
        loss, right = head(x, target) if chunked else (F.cross_entropy(logits, target, reduction="none"),
                                                       logits.argmax(-1) == target)
        (loss * weight).sum().backward()
        found.append((loss, x.grad, right))
    same(found[0][:2], found[1][:2])
    assert torch.equal(found[0][2], found[1][2]) and loss.dtype == torch.float32


def test_a_head_that_trains_is_no_head_for_chunked_losses():
    loss, _ = Head(48, 70, bias=False)(torch.randn(3, 48), torch.tensor([1, 2, 3]))
    with pytest.raises(RuntimeError, match="lm_head is expected to be frozen"):
        loss.sum().backward()


@every
@pytest.mark.parametrize("places", [slice(4, 10), slice(0, 6), [0, 1, 4, 5, 7, 9]],
                         ids=["left", "right", "middle"])
def test_padding_changes_nothing(attention, places):
    model, x, kind = tiny(attention), torch.randn(1, 6, 48), torch.tensor([[TEXT, IMAGE, IMAGE, TEXT, TEXT, TEXT]])
    padded, padded_kind = torch.randn(1, 10, 48), torch.full((1, 10), PAD)
    padded[:, places], padded_kind[:, places] = x, kind
    same(run(model, padded, padded_kind)[:, places], run(model, x, kind))


@pytest.mark.parametrize("size, count", [("7b", 6_738_415_616), ("13b", 13_015_864_320), ("70b", 68_976_648_192)])
def test_official_parameter_counts(size, count):
    with torch.device("meta"):
        assert sum(p.numel() for p in Llama(LLAMA_2[size]).parameters()) == count


def test_the_names_of_70b_are_those_of_the_official_index():
    of_layer = [*(f"self_attn.{x}_proj" for x in "qkvo"), *(f"mlp.{x}_proj" for x in ("gate", "up", "down")),
                "input_layernorm", "post_attention_layernorm"]
    official = {f"model.layers.{i}.{name}.weight" for i in range(80) for name in of_layer}
    official |= {"model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"}
    with torch.device("meta"):
        names = {name if name.startswith("lm_head") else f"model.{name}"
                 for name in Llama(LLAMA_2["70b"]).state_dict()}
    assert names == official and len(names) == 723


def test_rms_norm_does_not_overflow_in_float16():
    x = torch.full((1, 64), 1000.0, dtype=torch.float16)
    assert torch.equal(RMSNorm(64, 1e-5).half()(x), torch.ones_like(x))


def test_rope_is_precise_at_the_last_position_of_a_float16_model():
    model, seen = tiny().half(), []
    model.layers[0].register_forward_pre_hook(lambda _, args: seen.extend(args[1].rope[:, -1]))
    model(torch.randn(1, 4096, 48).half(), torch.full((1, 4096), TEXT), torch.zeros(1, 4096, dtype=torch.bool))
    angle = 4095 * 10000.0 ** -(torch.arange(0, 12, 2, dtype=torch.float64) / 12)
    for found, expected in zip(seen, (angle.cos(), angle.sin())):
        torch.testing.assert_close(found[0, 6:].double(), expected, atol=1e-3, rtol=0)


# ---- folders ----

@pytest.mark.parametrize("config, message", [
    ({"rope_scaling": {"type": "linear", "factor": 2.0}}, "rope_scaling"),
    ({"rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 10000.0}}, "rope"),
    ({"model_type": "mistral"}, "mistral"), ({"tie_word_embeddings": True}, "tie_word_embeddings")],
    ids=["rope_scaling", "rope_parameters", "model_type", "tied"])
def test_other_models_are_refused(llama_folder, config, message):
    with pytest.raises(ValueError, match=message):
        Llama.from_pretrained(llama_folder(config=config))


@pytest.mark.parametrize("config", [
    {"rope_theta": 500.0},
    {"rope_theta": None, "rope_parameters": {"rope_type": "default", "rope_theta": 500.0}}],
    ids=["official", "transformers 5"])
def test_the_rope_base_is_read(llama_folder, config):
    assert Llama.from_pretrained(llama_folder(config=config)).config.rope_theta == 500


@pytest.mark.parametrize("config, message", [
    ({"hidden_size": "48"}, "hidden_size '48'"), ({"num_attention_heads": 0}, "num_attention_heads 0"),
    ({"hidden_size": 48.0}, "hidden_size 48.0"), ({"num_hidden_layers": True}, "num_hidden_layers True"),
    ({"num_hidden_layers": 10 ** 6}, "num_hidden_layers 1000000"), ({"vocab_size": [50]}, r"vocab_size \[50\]"),
    ({"rms_norm_eps": float("nan")}, "rms_norm_eps nan"), ({"rope_theta": float("inf")}, "rope_theta inf"),
    ({"rope_parameters": [1]}, None)])
def test_a_config_holds_positive_numbers(llama_folder, config, message):
    path = llama_folder(config=config)
    if message is None:
        Llama.from_pretrained(path)                             # what is no table has no rope_theta to give
    else:
        with pytest.raises(ValueError, match=f"config.json has {message}, expected positive"):
            Llama.from_pretrained(path)


@pytest.mark.parametrize("config", [{"num_attention_heads": 5}, {"num_key_value_heads": 3},
                                    {"num_attention_heads": 16, "num_key_value_heads": 16}])
def test_heads_divide_the_width(llama_folder, config):
    with pytest.raises(ValueError, match="do not divide hidden_size 48 into parts of equal, even width"):
        Llama.from_pretrained(llama_folder(config=config))


# ---- text ----

@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    folder, model = tmp_path_factory.mktemp("tokenizer"), io.BytesIO()
    SentencePieceTrainer.train(
        sentence_iterator=iter(["Please describe the image.", "What is the difference?"] * 20), model_writer=model,
        vocab_size=320, model_type="bpe", byte_fallback=True, hard_vocab_limit=False, character_coverage=1.0,
        unk_id=0, bos_id=1, eos_id=2, normalization_rule_name="identity", remove_extra_whitespaces=False,
        minloglevel=2)
    (folder / "tokenizer.model").write_bytes(model.getvalue())
    return Tokenizer(folder)


@pytest.mark.parametrize("text", ["Please describe the image.", "two  spaces\n", " über 猫 🐈\t", "",
                                  "<s> </s> <unk>"])
def test_text_makes_a_round_trip(tokenizer, text):
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_no_text_turns_into_bos_or_eos(tokenizer):
    assert (tokenizer.bos, tokenizer.eos) == (1, 2)
    assert not {1, 2} & set(tokenizer.encode("<s>Please describe</s> <s> the image.</s>"))


def test_a_stray_byte_becomes_a_question_mark(tokenizer):
    assert tokenizer.decode(tokenizer.encode("a\udcffb")) == "a?b"


def test_a_missing_or_damaged_tokenizer_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="tokenizer.model"):
        Tokenizer(tmp_path)
    (tmp_path / "tokenizer.model").write_text("x")
    with pytest.raises(ValueError, match="tokenizer.model is no sentencepiece model"):
        Tokenizer(tmp_path)


def test_a_tokenizer_that_loses_line_breaks_is_refused_and_ids_beyond_its_pieces_are_no_text(tokenizer, tmp_path):
    assert tokenizer.decode([*tokenizer.encode("a cat"), 10 ** 6]) == "a cat"
    model = io.BytesIO()
    SentencePieceTrainer.train(sentence_iterator=iter(["Please describe the image."] * 20), model_writer=model,
                               vocab_size=300, model_type="bpe", byte_fallback=True, hard_vocab_limit=False,
                               minloglevel=2)                   # sentencepiece's own rules make a space of "\n"
    (tmp_path / "tokenizer.model").write_bytes(model.getvalue())
    with pytest.raises(ValueError, match="tokenizer.model has .* pieces, .* and line breaks: is it of another"):
        Tokenizer(tmp_path)


def test_recomputing_changes_neither_values_nor_gradients():
    model, kind, found = tiny(), torch.tensor([[1, 2, 2, 1, 1, 0], [1, 1, 2, 2, 1, 1]]), []
    for model.recompute in (False, True):
        torch.manual_seed(0)
        x = torch.randn(2, 6, model.config.hidden_size, requires_grad=True)
        out = model(x, kind)
        out.square().sum().backward()
        found.append((out, x.grad))
    assert all(torch.equal(a, b) for a, b in zip(*found))
