"""experiments/lora.py: it starts as the unchanged model, trains what it adds, and is merged for chat and exam."""
import json
import sys
from dataclasses import replace
from functools import partial

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from chat import Chat
from data import collate
from experiments.lora import EXPERIMENTS, FACTORIES, LoraLinear, Pair, merge
from experiments.outside import apply
from experiments.run import find
from llama import Llama
from training import at_once, launch
from visualchat import CONFIG, TRAINED, VARIANTS, build, load, save, towers
from vit import VisionTransformer

USUAL = {"projection.weight", "projection.bias", "llama.embed_tokens.weight"}
LAYERS = {"lora": [f"llama.layers.{i}.self_attn.{name}" for i in range(2) for name in ("q_proj", "v_proj")],
          "lora_vit": [f"vit.transformer.resblocks.{i}.{name}" for i in range(2)
                       for name in ("attn.in_proj", "mlp.c_fc")]}
BOTH = pytest.mark.parametrize("name", LAYERS)


@pytest.fixture(autouse=True)
def registered():
    """Both experiments are known in a test, and forgotten after it."""
    before = dict(VARIANTS)
    for name, experiment in EXPERIMENTS.items():
        apply(name, experiment)
    yield
    VARIANTS.clear()
    VARIANTS.update(before)


def built(config, variant="", **settings):
    torch.manual_seed(0)
    return build(replace(config, variant=variant), **settings)


def pairs(name):
    """The names of what LoRA adds."""
    return {f"{layer}.lora.{matrix}" for layer in LAYERS[name] for matrix in "ab"}


def as_trained(config, name):
    """A model as it could be after training."""
    model = built(config, name)
    for pair in model.fresh[1:]:
        nn.init.normal_(pair.b, std=0.02)
    model.freeze()
    return model


def outputs(model, rows):
    """Image tokens (I, n_queries, C), losses (A) and whether tokens are right (A)."""
    batch = collate(rows)
    with torch.no_grad():
        return model.image_tokens(batch["images"]), *model(**batch)


# ---- training ----

@BOTH
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_it_starts_as_the_unchanged_model_bit_by_bit(config, rows, name, dtype):
    model = built(config, name, dtype=dtype)
    assert all(map(torch.equal, outputs(model, rows), outputs(built(config, dtype=dtype), rows)))
    changed = {layer: module for layer, module in model.named_modules() if isinstance(module, LoraLinear)}
    assert list(changed) == LAYERS[name]
    for module in changed.values():
        assert module.lora.a.std() > 0 and module.lora.a.dtype == module.lora.b.dtype == dtype
        assert module.lora.a.shape == (8, module.in_features) and module.lora.b.shape == (module.out_features, 8)


@BOTH
def test_exactly_the_pairs_the_projection_and_the_words_get_gradients(config, rows, name):
    model, unchanged = built(config, name), built(config)

    def gradients(of):
        of.freeze()
        of.zero_grad()
        of(**collate(rows))[0].mean().backward()
        return {name: p.grad for name, p in of.named_parameters() if p.grad is not None}

    first, expected = gradients(model), gradients(unchanged)
    assert first.keys() == USUAL | pairs(name) and expected.keys() == USUAL
    for usual, gradient in expected.items():                    # They flow through as they did before.
        torch.testing.assert_close(first[usual], gradient, atol=1e-6, rtol=1e-4)
    assert {n for n, gradient in first.items() if not gradient.any()} == {n for n in pairs(name) if n[-1] == "a"}
    for pair in model.fresh[1:]:
        nn.init.normal_(pair.b, std=0.02)
    later = gradients(model)
    assert all(gradient.any() for gradient in later.values())   # Once b is not zero, a learns, too.
    merge(model)
    for usual, gradient in gradients(model).items():
        torch.testing.assert_close(later[usual], gradient, atol=1e-6, rtol=1e-3)


def test_with_kept_features_lora_on_the_vit_would_not_learn_so_none_are_kept(config, rows):
    model, batch = as_trained(config, "lora_vit"), collate(rows)
    features = torch.randn(len(batch["images"]), 4, 128)
    model(**{name: x for name, x in batch.items() if name != "images"}, features=features)[0].mean().backward()
    assert all(pair.a.grad is None for pair in model.fresh[1:])
    assert EXPERIMENTS["lora_vit"].options == FACTORIES["lora_vit"]("4").options == ("--cache-features", "")
    assert EXPERIMENTS["lora"].options == ()


@BOTH
def test_on_the_meta_device_nothing_is_lost_and_first_values_can_come_later(config, name):
    usual, model = built(config, name), built(config, name, device="meta")
    shapes, expected = ({n: p.shape for n, p in one.named_parameters()} for one in (model, usual))
    assert shapes == expected and all(p.is_meta for p in model.parameters())
    fresh = [p for module in model.fresh for p in module.parameters()]
    assert len({id(p) for p in fresh}) == len(fresh) == 2 + len(pairs(name))
    model.to_empty(device="cpu")                                # as zero.py fills a model that is shared out
    left = dict(model.named_parameters())
    for tower, prefix, folder in zip((Llama, VisionTransformer), ("llama", "vit"), towers(config)):
        for weight, tensor in tower.tensors(folder):
            left.pop(f"{prefix}.{weight}").data.copy_(tensor)
    assert left.keys() == USUAL - {"llama.embed_tokens.weight"} | pairs(name)
    for module in model.fresh:
        model.reset(module)
    assert all(map(torch.equal, model.parameters(), usual.parameters()))        # by the same random numbers


# ---- afterwards ----

@BOTH
def test_merged_it_computes_the_same_with_the_modules_of_the_unchanged_model(config, rows, name):
    model, unchanged = as_trained(config, name), built(config)
    before = outputs(model, rows)
    assert not torch.allclose(before[1], outputs(unchanged, rows)[1], atol=1e-2)        # LoRA matters
    weights = [module.weight.data for module in model.modules() if isinstance(module, LoraLinear)]
    copies = [weight.clone() for weight in weights]
    merge(model)
    for found, expected in zip(outputs(model, rows), before):
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
    assert all(map(torch.equal, weights, copies))               # They may be a file, or another model's.
    assert [(n, type(m)) for n, m in model.named_modules()] == [(n, type(m)) for n, m in unchanged.named_modules()]
    assert [n for n, _ in model.named_parameters()] == [n for n, _ in unchanged.named_parameters()]
    assert model.fresh == [model.projection]
    assert not model.vit(torch.zeros(1, 3, 16, 16)).requires_grad


@BOTH
def test_a_result_holds_the_pairs_and_is_talked_to_merged(config, tokenizer, image_files, tmp_path, name):
    model = as_trained(config, name)
    save(tmp_path, {n: p for n, p in model.named_parameters() if p.requires_grad}, replace(config, variant=name))
    assert load_file(tmp_path / TRAINED).keys() == USUAL | pairs(name)
    answers = []
    for chat in (Chat.open(tmp_path), Chat(model, tokenizer), Chat(built(config), tokenizer)):
        chat.max_new_tokens = 12
        answers.append([chat.ask("What is it?", *image_files[:2]), chat.ask("And image 1?")])
    assert answers[0] == answers[1] != answers[2]
    again, found = load(tmp_path)
    assert found.variant == name and not any(isinstance(module, Pair) for module in again.modules())
    assert {n for n, p in again.named_parameters() if p.requires_grad} == USUAL


def test_a_result_of_another_rank_or_other_layers_is_refused(config, tmp_path):
    apply("lora:4:q_proj", FACTORIES["lora"]("4:q_proj"))
    model = built(config, "lora:4:q_proj")
    model.freeze()
    save(tmp_path, {n: p for n, p in model.named_parameters() if p.requires_grad},
         replace(config, variant="lora:4:q_proj"))
    load(tmp_path)
    del VARIANTS["lora:4:q_proj"]                               # as in a program that was started with lora
    with pytest.raises(ValueError, match="this is variant 'lora:4:q_proj' of the model"):
        load(tmp_path)
    settings = json.loads((tmp_path / CONFIG).read_text())
    (tmp_path / CONFIG).write_text(json.dumps(settings | {"variant": "lora"}))
    with pytest.raises(ValueError, match=r"missing llama.layers.0.self_attn.v_proj.lora.a \(8, 64\).*"
                                         r"q_proj.lora.a is \(4, 64\), expected \(8, 64\)"):
        load(tmp_path)


# ---- what can be typed ----

@pytest.mark.parametrize("name, text, rank, layers", [
    ("lora", "16:q_proj,k_proj", 16, {"q_proj", "k_proj"}), ("lora", "2", 2, {"q_proj", "v_proj"}),
    ("lora", "3:down_proj", 3, {"down_proj"}), ("lora_vit", "1", 1, {"in_proj", "c_fc"}),
    ("lora_vit", "4:out_proj,kv_proj", 4, {"out_proj", "kv_proj"})])
def test_rank_and_layers_can_be_typed(config, name, text, rank, layers):
    typed = FACTORIES[name](text)
    apply(f"{name}:{text}", typed)
    changed = {layer: module for layer, module in built(config, f"{name}:{text}").named_modules()
               if isinstance(module, LoraLinear)}
    assert {layer.rpartition(".")[2] for layer in changed} == layers
    assert all(layer.startswith("vit." if name == "lora_vit" else "llama.") for layer in changed)
    assert {len(module.lora.a) for module in changed.values()} == {rank}
    assert f"rank {rank} " in typed.says and all(layer in typed.says for layer in layers)


@pytest.mark.parametrize("text", ["0", "q_proj", "", "-1:q_proj", "2.5", "16:q_proj,q_proj"])
def test_what_is_no_rank_or_names_a_layer_twice_is_refused(text):
    with pytest.raises(ValueError, match=f"LoRA from {text!r}: expected a rank of 1 or more"):
        FACTORIES["lora"](text)


@pytest.mark.parametrize("name, targets, absent", [
    ("lora", "q_proj,c_fc", "'c_fc'"), ("lora", "lm_head", "'lm_head'"), ("lora", "", "''"),
    ("lora", "a,b", "'a', 'b'"), ("lora_vit", "q_proj", "'q_proj'"), ("lora_vit", "conv1", "'conv1'")])
def test_a_layer_that_is_not_there_is_answered_with_those_that_are(config, name, targets, absent):
    tower, there = {"lora": ("llama", "down_proj, gate_proj, k_proj, o_proj, q_proj, up_proj, v_proj"),
                    "lora_vit": ("vit", "c_fc, c_proj, in_proj, kv_proj, out_proj")}[name]
    said = f"no linear layer of {tower} is called {absent}; there are {there}$"
    apply("wrong", FACTORIES[name](f"8:{targets}"))
    with pytest.raises(ValueError, match=said):
        built(config, "wrong")
    with pytest.raises(ValueError, match=said):                 # before anything is started
        find(f"{name}:8:{targets}")


# ---- the whole ----

def test_they_train_and_their_results_chat(world, image_files):
    """In the ViT all depends on the gradient of the pixels: without it DeepSpeed's ZeRO-3 fails."""
    def run(name):
        program, out = [sys.executable, "-m", "experiments.run", name], f"out/{name.replace(':', '-')}"
        launch(world, *program, "train", "--epochs", "1", "--workers", "0", "--out", out)
        tensors = load_file(world / out / TRAINED)
        learned = {n: t.abs().max().item() for n, t in tensors.items() if n.endswith(".lora.b")}
        assert learned and min(learned.values()) > 0
        assert json.loads((world / out / CONFIG).read_text())["variant"] == name
        question = str(image_files[0]), "--quiet", "--question", "What color is it?"
        assert launch(world, *program, "chat", "--model", out, *question).strip()

    at_once(partial(run, "lora:4:q_proj,down_proj"), partial(run, "lora_vit"))
