"""Where the released code departs from the paper, one departure at a time. README's table has more: errors and
costs that cannot be switched on one by one. Before: lessons.py.
"""
from dataclasses import replace

import torch
from PIL import Image, ImageOps
from torch import Tensor, nn

import data
import mmca
import pixels
from album import Album, KeptFeatures
from experiments.outside import Experiment
from mmca import IMAGE, TEXT, masked_softmax, matrix, scaled_scores
from visualchat import Variant, VisualChat

plain_to_tensors, plain_to_pixels = data.to_tensors, pixels.to_pixels


def reversed_images(encoded: data.Encoded, image_size: int, features=None) -> dict[str, Tensor]:
    """`data.to_tensors` with image 1 where the last image belongs (issue 800 of DeepSpeedExamples).

    In training these are a conversation's images, in exam and evaluate.py those of a round: earlier ones are read.
    """
    return plain_to_tensors(replace(encoded, images=encoded.images[::-1]), image_size, features)


def reversed_round(*arguments) -> data.Encoded:
    """`data.encode_round` with the images of the round in reverse order, for chat.py, which opens them itself."""
    encoded = data.encode_round(*arguments)
    return replace(encoded, images=encoded.images[::-1])


class NoAlbum(Album):
    def add(self, digests: list[str], image_kv: Tensor):
        """Keep nothing: chat.py gives keys and values in reverse order, so they are not those of these digests."""


def leaking(q: Tensor, k: Tensor, v: Tensor, kind: Tensor, past: int = 0) -> Tensor:
    """`mmca.mmca`, but the second softmax of text without an image before it is the mean of its past and of all
    later image tokens. Each of two masks adds -1e9 to a score, one where a key is text, the other where it comes
    later; so past text and later images have -1e9 once, and where no key is better they get equal weights."""
    m = matrix(kind, past)[:, None, None]
    scores, v = scaled_scores(q, k), v[:, :, None].float()
    one_mask = ((m == 1) | (kind == IMAGE)[:, None, None, None]).float()    # (B, 1, 1, T, S)
    is_empty = (kind[:, past:] == TEXT)[:, None, None, :, None] & ~(m == 2).any(-1, keepdim=True)
    second = torch.where(is_empty, one_mask / one_mask.sum(-1, keepdim=True), masked_softmax(scores, m == 2))
    return ((masked_softmax(scores, m == 1) + second) @ v).flatten(1, 2).to(k.dtype)


def images_read(kind: Tensor, past: int = 0) -> Tensor:
    """`mmca.matrix`, but image tokens read all text before them by one softmax, and themselves by the other."""
    m, of_image = matrix(kind, past), kind[:, past:, None] == IMAGE
    index = torch.arange(kind.shape[1], device=kind.device)
    return (of_image & (kind[:, None] == TEXT) & (index[past:, None] > index)).to(m.dtype) + m * (1 + of_image)


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
                                 swaps=((plain_to_tensors, reversed_images),),
                                 values={"chat.encode_round": reversed_round, "chat.Album": NoAlbum}),
    "released_leak": Experiment("text before the first image reads later images", "release",
                                swaps=((mmca.mmca, leaking),), options=("--attention", "written")),
    "released_rows": Experiment("image tokens read earlier text", "release",
                                swaps=((matrix, images_read),), options=("--attention", "written")),
    "released_norm": Experiment("a LayerNorm behind the projection", "release", Variant(add_norm)),
    "released_betas": Experiment("AdamW with beta1 = 0.9", "release", values={"zero.BETAS": (0.9, 0.95)}),
    "released_crop": Experiment("the center of the image alone (all of a drawn one)", "release",
                                # Features are kept in a folder of their own, as others are of whole images.
                                swaps=((plain_to_pixels, cropped), (KeptFeatures, lambda folder, vit: KeptFeatures(
                                    folder / "cropped", vit)))),
}
