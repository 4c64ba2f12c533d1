"""Claims about llama.py: transformers' logits, the cache, padding, official sizes and names, strict loading."""
import io
import json
import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from sentencepiece import SentencePieceTrainer

from llama import LLAMA_2, Llama, LlamaConfig, RMSNorm, Tokenizer
from mmca import ATTENTION, IMAGE, PAD, TEXT, causal

GOLDEN = Path(__file__).parent / "golden"
TINY = LlamaConfig(48, 80, 2, 4, 2, vocab_size=50)
MIXED = [PAD, TEXT, TEXT, IMAGE, IMAGE, TEXT, PAD, TEXT, IMAGE, TEXT, TEXT, PAD]

both = pytest.mark.parametrize("attention", ATTENTION.values(), ids=ATTENTION)


def tiny(attention=causal, config=TINY):
    torch.manual_seed(0)
    return Llama(config, attention).requires_grad_(False)


def text_logits(model, ids):
    return model.lm_head(model(model.embed_tokens(ids), torch.full_like(ids, TEXT)))


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
    same(text_logits(Llama.from_pretrained(folder, causal), ids), model(ids).logits)


def test_parameter_names_are_transformers_names(theirs):
    model, folder = theirs
    names = Llama.from_pretrained(folder).state_dict()
    assert {name if name == "lm_head.weight" else f"model.{name}" for name in names} == set(model.state_dict())


@torch.no_grad()
@pytest.mark.parametrize("name", ["llama_mha_open", "llama_gqa_open"])
def test_golden_logits(name):
    expected = load_file(GOLDEN / name / "expected.safetensors")
    same(text_logits(Llama.from_pretrained(GOLDEN / name, causal), expected["input_ids"]), expected["logits"])


# ---- forward ----

@both
@pytest.mark.parametrize("chunks", [[1] * 12, [5, 7], [3, 1, 8], [11, 1]], ids=str)
def test_the_cache_equals_the_full_forward(attention, chunks):
    model, x, kind = tiny(attention), torch.randn(2, 12, 48), torch.tensor([MIXED, MIXED[::-1]])
    cache, parts = {}, []
    for part in x.split(chunks, dim=1):
        seen = sum(p.shape[1] for p in parts) + part.shape[1]
        parts.append(model(part, kind[:, :seen], cache))
    same(torch.cat(parts, dim=1), model(x, kind))


@both
@pytest.mark.parametrize("places", [slice(4, 10), slice(0, 6), [0, 1, 4, 5, 7, 9]],
                         ids=["left", "right", "middle"])
def test_padding_changes_nothing(attention, places):
    model, x, kind = tiny(attention), torch.randn(1, 6, 48), torch.tensor([[TEXT, IMAGE, IMAGE, TEXT, TEXT, TEXT]])
    padded, padded_kind = torch.randn(1, 10, 48), torch.full((1, 10), PAD)
    padded[:, places], padded_kind[:, places] = x, kind
    same(model(padded, padded_kind)[:, places], model(x, kind))


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
    model, seen = tiny(lambda q, *_, **__: q).half(), []
    model.layers[0].register_forward_pre_hook(lambda _, args: seen.extend(args))
    model(torch.randn(1, 1, 48).half(), torch.full((1, 4096), TEXT), {})
    angle = 4095 * 10000.0 ** -(torch.arange(0, 12, 2, dtype=torch.float64) / 12)
    for found, expected in zip(seen[2:4], (angle.cos(), angle.sin())):
        torch.testing.assert_close(found.double().flatten(), expected, atol=1e-3, rtol=0)


# ---- folders ----

@pytest.fixture
def folder(tmp_path):
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


def index(folder, *shards):
    weight_map = {f"tensor{i}": shard for i, shard in enumerate(shards)}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))


@pytest.mark.parametrize("tensors, shape", [
    ({"model.layers.1.mlp.up_proj.weight": None}, r"missing layers.1.mlp.up_proj.weight \(80, 48\)"),
    ({"model.layers.1.extra": torch.zeros(2, 3)}, r"unexpected layers.1.extra \(2, 3\)"),
    ({"model.norm.weight": torch.zeros(7)}, r"norm.weight is \(7,\), expected \(48,\)")],
    ids=["missing", "unexpected", "wrong shape"])
def test_loading_is_strict(folder, tensors, shape):
    path = folder(tensors)
    with pytest.raises(ValueError, match=shape) as error:
        Llama.from_pretrained(path)
    assert str(path) in str(error.value)


def test_a_saved_rope_table_is_skipped(folder):
    Llama.from_pretrained(folder({"model.layers.0.self_attn.rotary_emb.inv_freq": torch.zeros(6)}))


def test_weights_come_in_the_wanted_type(folder):
    assert {p.dtype for p in Llama.from_pretrained(folder()).parameters()} == {torch.float32}
    assert {p.dtype for p in Llama.from_pretrained(folder(), dtype=torch.float16).parameters()} == {torch.float16}


@pytest.mark.parametrize("shard", ["../x.safetensors", "/x.safetensors", "sub/x.safetensors", ".."])
def test_an_index_cannot_name_a_file_outside_its_folder(folder, shard):
    path = folder()
    save_file({"lm_head.weight": torch.zeros(1)}, path.parent / "x.safetensors")
    index(path, shard)
    with pytest.raises(ValueError, match="no file in its folder"):
        Llama.from_pretrained(path)


def test_every_missing_shard_is_named(folder):
    path = folder()
    index(path, "model.safetensors", "model-2.safetensors", "model-3.safetensors")
    with pytest.raises(FileNotFoundError, match="model-2.safetensors, model-3.safetensors"):
        Llama.from_pretrained(path)


@pytest.mark.parametrize("config, message", [
    ({"rope_scaling": {"type": "linear", "factor": 2.0}}, "rope_scaling"),
    ({"rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 10000.0}}, "rope"),
    ({"model_type": "mistral"}, "mistral"), ({"tie_word_embeddings": True}, "tie_word_embeddings")],
    ids=["rope_scaling", "rope_parameters", "model_type", "tied"])
def test_other_models_are_refused(folder, config, message):
    with pytest.raises(ValueError, match=message):
        Llama.from_pretrained(folder(config=config))


@pytest.mark.parametrize("config", [
    {"rope_theta": 500.0},
    {"rope_theta": None, "rope_parameters": {"rope_type": "default", "rope_theta": 500.0}}],
    ids=["official", "transformers 5"])
def test_the_rope_base_is_read(folder, config):
    assert Llama.from_pretrained(folder(config=config)).config.rope_theta == 500


@pytest.mark.parametrize("absent", ["config.json", "model.safetensors"])
def test_absent_files_are_named(folder, tmp_path, absent):
    (folder() / absent).unlink()
    with pytest.raises(FileNotFoundError, match=absent):
        Llama.from_pretrained(tmp_path)
    with pytest.raises(FileNotFoundError, match="nowhere"):
        Llama.from_pretrained(tmp_path / "nowhere")


class Evil:
    def __init__(self, marker):
        self.marker = str(marker)

    def __reduce__(self):
        return os.mkdir, (self.marker,)


def test_a_pickle_runs_no_code(folder):
    path = folder()
    marker = path / "ran"
    (path / "model.safetensors").unlink()
    torch.save({"lm_head.weight": Evil(marker)}, path / "pytorch_model.bin")
    with pytest.raises(ValueError):
        Llama.from_pretrained(path)
    assert not marker.exists()
    torch.load(path / "pytorch_model.bin", weights_only=False)         # the pickle is live: here it runs
    assert marker.exists()


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


def test_a_missing_tokenizer_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="tokenizer.model"):
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
