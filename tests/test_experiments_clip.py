"""experiments/clip.py: transformers' values, official names and sizes, strict loading, the whole model with it."""
import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import CLIPConfig, CLIPModel, CLIPVisionConfig, CLIPVisionModel

from chat import Chat
from data import collate
from experiments import clip
from experiments.clip import PREFIX, TINY, ClipConfig, ClipVision, read_clip_config, write_clip
from pixels import normalized
from tiny import pretrain
from visualchat import ModelConfig, build, encoder_in, load, save
from vit import VisionTransformer
from weights import without_values

WEIGHTS = Path(__file__).parent.parent / "weights/tiny"
SIZES = ClipConfig(image_size=28, patch_size=14, hidden_size=32, intermediate_size=96, num_hidden_layers=2,
                   num_attention_heads=4)
LARGER = replace(SIZES, image_size=56, num_hidden_layers=3, num_attention_heads=2, layer_norm_eps=1e-3)
L_14 = ClipConfig(image_size=224, patch_size=14, hidden_size=1024, intermediate_size=4096, num_hidden_layers=24,
                  num_attention_heads=16)
L_14_336 = replace(L_14, image_size=336)


def whole_clip(config: ClipConfig, folder: Path) -> CLIPModel:
    """A CLIP of random values by transformers, with both encoders, saved in its folder."""
    torch.manual_seed(0)
    text = dict(hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, vocab_size=50,
                bos_token_id=1, eos_token_id=2)
    theirs = CLIPModel(CLIPConfig(text_config=text, vision_config=vars(config), projection_dim=8)).eval()
    for parameter in theirs.parameters():                       # the norms and biases, too
        torch.nn.init.normal_(parameter, 0.1, 0.3)
    theirs.save_pretrained(folder)
    return theirs


@pytest.fixture
def folder(tmp_path) -> Path:
    whole_clip(SIZES, tmp_path)
    return tmp_path


def rewrite(folder: Path, changes: dict[str, torch.Tensor | None]):
    """Change, add, or with None remove tensors of the encoder."""
    found = load_file(folder / "model.safetensors") | {PREFIX + name: t for name, t in changes.items()}
    save_file({name: t for name, t in found.items() if t is not None}, folder / "model.safetensors")


def describe(folder: Path, **changes):
    """Change the encoder's description in config.json."""
    found = json.loads((folder / "config.json").read_text())
    found["vision_config"] |= changes
    found["vision_config"] = {name: value for name, value in found["vision_config"].items() if value is not None}
    (folder / "config.json").write_text(json.dumps(found))


# ---- the encoder ----

@pytest.mark.parametrize("config", [SIZES, LARGER])
@torch.no_grad()
def test_features_are_the_hidden_states_that_transformers_makes_of_the_patches(config, tmp_path):
    theirs = whole_clip(config, tmp_path)
    ours, pixels = ClipVision.from_pretrained(tmp_path), torch.randn(3, 3, config.image_size, config.image_size)
    assert ours.config == config
    expected = theirs.vision_model(pixels).last_hidden_state[:, 1:]
    found = ours(pixels)
    assert found.shape == (3, config.n_queries, config.output_dim) and 0.5 < expected.std() < 100
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=0)


@pytest.mark.parametrize("config, n_queries, size", [(L_14, 256, 303_179_776), (L_14_336, 576, 303_507_456)])
def test_official_names_shapes_and_sizes(config, n_queries, size):
    with without_values():
        ours = ClipVision(config)
    with torch.device("meta"):
        theirs = CLIPVisionModel(CLIPVisionConfig(**vars(config)))
    assert {name: t.shape for name, t in ours.state_dict().items()} == {
        name.removeprefix(PREFIX): t.shape for name, t in theirs.state_dict().items()}
    assert sum(p.numel() for p in ours.parameters()) == sum(p.numel() for p in theirs.parameters()) == size
    assert (ours.config.n_queries, ours.config.output_dim) == (n_queries, 1024)


# ---- folders ----

@torch.no_grad()
def test_old_files_hold_position_ids_that_are_left_out_as_pickles_too(folder):
    pixels, expected = torch.randn(1, 3, 28, 28), ClipVision.from_pretrained(folder).state_dict()
    rewrite(folder, {"embeddings.position_ids": torch.arange(5)[None]})
    found = ClipVision.from_pretrained(folder)
    assert found(pixels).isfinite().all()
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    for name, tensor in ClipVision.from_pretrained(folder).state_dict().items():
        assert torch.equal(tensor, expected[name]) and torch.equal(found.state_dict()[name], expected[name])


@pytest.mark.parametrize("changes, said", [
    ({"post_layernorm.bias": None}, r"missing post_layernorm.bias \(32,\)"),
    ({"encoder.layers.2.mlp.fc1.bias": torch.zeros(96)}, r"unexpected encoder.layers.2.mlp.fc1.bias"),
    ({"embeddings.position_embedding.weight": torch.zeros(17, 32)},
     r"position_embedding.weight is \(17, 32\), expected \(5, 32\)"),
    ({"pre_layrnorm.weight": torch.full((32,), torch.nan)}, "pre_layrnorm.weight holds values that are no")])
def test_loading_is_strict(folder, changes, said):
    rewrite(folder, changes)
    with pytest.raises(ValueError, match=said):
        ClipVision.from_pretrained(folder)


@pytest.mark.parametrize("changes, said", [
    ({"hidden_act": "gelu"}, "'hidden_act': 'gelu'.*expected .*quick_gelu"),
    ({"num_channels": 1}, "'num_channels': 1.*expected"),
    ({"patch_size": 13}, "whole patches and equal heads, found.*patch_size=13"),
    ({"num_attention_heads": 5}, "whole patches and equal heads"),
    ({"image_size": 14 * 300}, "does not fit the model"), ({"hidden_size": None}, "lacks hidden_size"),
    ({"layer_norm_eps": 0}, "layer_norm_eps 0, expected"), ({"image_size": [28, 28]}, "expected positive")])
def test_a_configuration_that_does_not_fit_is_refused(folder, changes, said):
    describe(folder, **changes)
    with pytest.raises(ValueError, match=said):
        ClipVision.from_pretrained(folder)


def test_what_the_official_configuration_leaves_out_has_openai_s_values(folder):
    describe(folder, layer_norm_eps=None, hidden_act=None, num_channels=None)       # as in that for 336
    assert read_clip_config(folder / "config.json") == SIZES


def test_two_kinds_of_folders_are_told_apart(config, folder):
    assert encoder_in(folder) is ClipVision and encoder_in(Path(config.vit)) is VisionTransformer
    with pytest.raises(ValueError, match="no `vision_config` section: is this a CLIP folder"):
        ClipVision.from_pretrained(config.vit)
    shutil.rmtree(folder)
    with pytest.raises(FileNotFoundError, match="config.json"):
        ClipVision.from_pretrained(folder)


# ---- the whole model ----

def test_a_model_with_it_learns_is_saved_and_chats(config, rows, image_files, tmp_path):
    torch.manual_seed(0)
    sizes = replace(SIZES, image_size=16, patch_size=8)         # those of the images in `rows`
    write_clip(ClipVision(sizes), tmp_path / "clip")
    config = replace(config, vit=str(tmp_path / "clip"))
    model, batch = build(config), collate(rows)
    assert type(model.vit) is ClipVision and model.projection.in_features == 32
    model.freeze()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], 1e-2)
    losses = []
    for _ in range(20):
        losses.append(model(**batch)[0].mean())
        optimizer.zero_grad()
        losses[-1].backward()
        optimizer.step()
    assert losses[-1] < 0.5 * losses[0]
    save(tmp_path / "run", {name: p for name, p in model.named_parameters() if p.requires_grad}, config)
    again, _ = load(tmp_path / "run")
    assert type(again.vit) is ClipVision
    with torch.no_grad():
        torch.testing.assert_close(again(**batch)[0], model(**batch)[0])
    answers = []
    for image in image_files[:2]:
        chat = Chat.open(tmp_path / "run")
        chat.max_new_tokens = 8
        answers.append((chat.ask("What is image 1?", image), chat.ask("What is it?"),
                        chat.album.find(chat.digests[0])))
    assert answers[0][0] and not torch.equal(answers[0][2], answers[1][2])      # the image reaches LLaMA


# ---- the tiny one ----

def test_pre_training_learns_and_is_written_as_it_is_read(tmp_path, monkeypatch, capsys):
    for name, value in (("WEIGHTS", tmp_path), ("UNFINISHED", tmp_path / "unfinished"), ("N_IMAGES", 256),
                        ("N_FRESH", 100)):
        monkeypatch.setattr(pretrain, name, value)
    monkeypatch.setattr(clip, "STEPS", 60)
    monkeypatch.setattr("sys.argv", ["clip.py"])
    clip.main()
    said = capsys.readouterr().out
    assert said.startswith("CLIP, attributes read from 100 fresh images:")
    # By chance "left" would be read from one image in five.
    assert float(said.split("place ")[1].split()[0]) > 0.5
    found = ClipVision.from_pretrained(tmp_path / "clip")
    assert found.config == TINY and {p.dtype for p in found.parameters()} == {torch.float16}


@torch.no_grad()
def test_the_shipped_one_is_small_fits_the_tiny_llama_and_reads_images():
    folder = WEIGHTS / "clip"
    assert sum(file.stat().st_size for file in folder.iterdir()) < 1e6
    assert encoder_in(folder) is ClipVision
    vit, theirs = ClipVision.from_pretrained(folder, torch.float32), CLIPVisionModel.from_pretrained(folder)
    assert vit.config == TINY and vit.config.n_queries == pretrain.VIT.n_queries
    (known, wanted), (fresh, answers) = ((normalized(images), values) for images, values in (
        pretrain.drawn(400, 11, TINY.image_size), pretrain.drawn(400, 12, TINY.image_size)))
    x, y = vit(known), vit(fresh)
    torch.testing.assert_close(y, theirs.float()(fresh).last_hidden_state[:, 1:], atol=1e-4, rtol=0)
    assert 0.8 < y.std() < 1.1                                  # as VisualChat's first projection expects
    for i, n in enumerate(pretrain.N_VALUES):                   # token i tells attribute i
        means = torch.stack([x[wanted[:, i] == value, i].mean(0) for value in range(n)])
        assert (torch.cdist(y[:, i], means).argmin(1) == answers[:, i]).float().mean() > 0.9


def test_it_is_an_experiment_of_the_paper_s_that_a_user_may_give_another_folder():
    experiment = clip.EXPERIMENTS["clip"]
    assert experiment.section == "4.3" and experiment.options[0] == "--vit"
    assert ModelConfig(vit=experiment.options[1]).vit == str(WEIGHTS.resolve() / "clip")
