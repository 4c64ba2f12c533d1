"""Where the released code departs from the paper, one departure at a time. README's table has more of them, which a
correct program cannot show alone. Before: lessons.py.
"""
from dataclasses import replace

import torch
from PIL import Image, ImageOps
from torch import Tensor, nn

import data
import mmca
import pixels
from experiments.outside import Experiment
from mmca import IMAGE, TEXT, masked_softmax, matrix, scaled_scores
from visualchat import Variant, VisualChat

plain_to_tensors, plain_to_pixels = data.to_tensors, pixels.to_pixels


def reversed_images(encoded: data.Encoded, image_size: int, features=None) -> dict[str, Tensor]:
    """`data.to_tensors` with image 1 where the last image belongs (issue 800 of DeepSpeedExamples)."""
    return plain_to_tensors(replace(encoded, images=encoded.images[::-1]), image_size, features)


def leaking(q: Tensor, k: Tensor, v: Tensor, kind: Tensor, past: int = 0) -> Tensor:
    """`mmca.mmca`, but text that has no image before it gets the mean of all image tokens, later ones, too.

    A softmax over a row of which everything is masked gives every key the same weight.
    """
    m = matrix(kind, past)[:, None, None]
    scores, v = scaled_scores(q, k), v[:, :, None].float()
    image = (kind == IMAGE)[:, None, None, None].float()                    # (B, 1, 1, 1, S)
    mean = image / image.sum(-1, keepdim=True).clamp(min=1)
    is_empty = (kind[:, past:] == TEXT)[:, None, None, :, None] & ~(m == 2).any(-1, keepdim=True)
    second = torch.where(is_empty, mean, masked_softmax(scores, m == 2))
    return ((masked_softmax(scores, m == 1) + second) @ v).flatten(1, 2).to(k.dtype)


def images_read(kind: Tensor, past: int = 0) -> Tensor:
    """`mmca.matrix`, but an image token attends to itself and to all text before it."""
    index = torch.arange(kind.shape[1], device=kind.device)
    reads = (kind[:, past:, None] == IMAGE) & (kind[:, None, :] == TEXT) & (index[past:, None] > index)
    return torch.where(reads, 1, matrix(kind, past))


def add_norm(model: VisualChat):
    """A LayerNorm behind the projection."""
    model.projection_norm = nn.LayerNorm(model.llama.config.hidden_size).to(model.projection.weight)
    model.fresh.append(model.projection_norm)
    model.projection.register_forward_hook(lambda _, inputs, output: model.projection_norm(output))


def cropped(image: Image.Image, size: int = 448) -> Tensor:
    """`pixels.to_pixels` of the largest square in the middle of the image."""
    return plain_to_pixels(ImageOps.fit(image, (min(image.size),) * 2), size)


EXPERIMENTS = {
    "released_order": Experiment("images in reverse order", "release",
                                 swaps=((plain_to_tensors, reversed_images),)),
    "released_leak": Experiment("text before the first image reads all images", "release",
                                swaps=((mmca.mmca, leaking),), options=("--attention", "written")),
    "released_rows": Experiment("image tokens read earlier text", "release",
                                swaps=((matrix, images_read),), options=("--attention", "written")),
    "released_norm": Experiment("a LayerNorm behind the projection", "release", Variant(add_norm)),
    "released_betas": Experiment("AdamW with beta1 = 0.9", "release", values={"zero.BETAS": (0.9, 0.95)}),
    "released_crop": Experiment("the center of the image alone", "release",
                                swaps=((plain_to_pixels, cropped),),
                                options=("--cache-features", "out/features-crop")),
}
