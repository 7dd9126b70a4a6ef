"""Where the network looked, and which training lesions look alike to it.

The map is Grad-CAM (Selvaraju et al., ICCV 2017, arXiv 1610.02391) from the kept library ``grad-cam``. It shows which
part of the picture moved one logit. It is no segmentation and no evidence about the lesion; its pictures say so.
Neighbours are given by id, diagnosis and distance; their pictures stay where the shards are.
"""

from __future__ import annotations

import io
from collections.abc import Mapping
from dataclasses import dataclass

import matplotlib
import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import nn

from dermaflow.datasets.framing import lies_across, shown_part
from dermaflow.datasets.images import decode, decode_field
from dermaflow.errors import BundleError, DataError
from dermaflow.learning.backbones import JOIN, Bodies, Network
from dermaflow.learning.inference import predict
from dermaflow.preparation.transforms import normalise, pixels
from dermaflow.schemas.bundle import InputSpec
from dermaflow.schemas.finding import Finding
from dermaflow.scoring.predictor import Predictor
from dermaflow.taxonomy import INDEX, parse_diagnosis
from dermaflow.trust.ood import Neighbour, nearest_lesions

LABEL = "where the model looked, no evidence about the lesion"
OVERLAY_SIDE = 432  # pixels of the shorter side of the picture under the label
_STRIP = 28  # pixels of the label
_PICTURE = 160  # pixels, height of a neighbour's picture

LAYERS: Mapping[str, str] = {
    "seed_cnn": "layers.9",
    "vgg16": "features.29",
    "resnet18": "layer4",
    "resnet50": "layer4",
    "mobilenet_v2": "features.18",
    "efficientnet_lite0": "conv_head",
    "efficientnet_lite2": "conv_head",
    "efficientnet_b0": "features.8",
    "convnext_tiny": "features.7",
}
"""The last layer of each backbone whose output still has a place in the picture."""


@dataclass(frozen=True)
class Explanation:
    """What can be said of one answer.

    Attributes:
        finding: The answer.
        diagnosis: Code of the class that the map is about; None, like the rest, unless the finding is ``ok``.
        heat: float32 [H, W] in 0..1, over the part of the image that the network sees, as the image stands.
        overlay: PNG of image and map, with `LABEL` under it.
        neighbours: Nearest training lesions, the nearest first; empty where the model keeps no reference.
    """

    finding: Finding
    diagnosis: str | None = None
    heat: np.ndarray | None = None
    overlay: bytes | None = None
    neighbours: tuple[Neighbour, ...] = ()


def explain(
    predictor: Predictor, image: bytes, image_id: str, *, diagnosis: str | None = None, neighbours: int = 5
) -> Explanation:
    """Explain the answer to one image.

    Args:
        predictor: The model.
        image: Encoded image.
        image_id: Its id.
        diagnosis: Code of the class to look at; by default the predicted one.
        neighbours: How many training lesions to name.

    Returns:
        The finding and, if it is ``ok``, the map and the neighbours: of an image that cannot be assessed no class is
        said, and these would say one.

    Raises:
        DataError: An unknown diagnosis.
    """
    asked = None if diagnosis is None else parse_diagnosis(diagnosis)
    finding = predictor.predict([image], [image_id])[0]
    if finding.status != "ok":
        return Explanation(finding)
    bundle, reference = predictor.loaded.bundle, predictor.loaded.reference
    code = asked or str(finding.prediction)
    seen = pixels(image, bundle.input.height, bundle.input.width, bundle.input.copies)
    heat = grad_cam(predictor.network, bundle.backbone, seen, bundle.input, INDEX[code])
    _, features = predict(predictor.network, seen[None], bundle.input)
    picture, across = _picture(image, bundle.input)
    if across:  # shown as it stands
        heat, picture = heat.T, picture.transpose(1, 0, 2)
    return Explanation(
        finding,
        code,
        heat,
        overlay(picture, heat),
        tuple(nearest_lesions(features[0], reference, neighbours)) if reference is not None else (),
    )


def _picture(image: bytes, spec: InputSpec) -> tuple[np.ndarray, bool]:
    """What the network sees of an image, laid as its input and not stretched, and whether the image lies across that.

    uint8 [H, W, 3]; the shorter side has `OVERLAY_SIDE` pixels.
    """
    field = decode_field(image, OVERLAY_SIDE, OVERLAY_SIDE)
    height, width = field.shape[:2]
    across = lies_across(height, width, spec.height, spec.width)
    if across:
        field, height, width = np.ascontiguousarray(field.transpose(1, 0, 2)), width, height
    rows, columns = shown_part(height, width, spec.height, spec.width)
    box = ((width - columns) / 2, (height - rows) / 2, (width + columns) / 2, (height + rows) / 2)
    scale = OVERLAY_SIDE / min(rows, columns)
    return np.asarray(Image.fromarray(field).resize((round(columns * scale), round(rows * scale)), box=box)), across


def grad_cam(network: Network, backbone: str, image: np.ndarray, spec: InputSpec, target: int) -> np.ndarray:
    """The Grad-CAM map of one image.

    Args:
        network: On its device; its mode and gradients come back as they were.
        backbone: Name of the backbone.
        image: uint8 [H, W, 3] of the size of `spec`.
        spec: Normalisation.
        target: Index of the class into `taxonomy.CODES`.

    Returns:
        float32 [H, W]; 0 where nothing spoke for the class, 1 where most did. All 0 if nothing did anywhere.

    Raises:
        BundleError: No layer is known for the backbone.
    """
    from pytorch_grad_cam import GradCAM  # imports OpenCV: a second that other commands need not wait for
    from pytorch_grad_cam.utils.model_targets import ClassifierOutputTarget

    layers = target_layers(network, backbone)
    device = next(network.parameters()).device
    was_training = network.training
    network.eval()
    with GradCAM(model=network, target_layers=layers) as cam:
        heat = cam(normalise(torch.from_numpy(image[None]).to(device), spec), [ClassifierOutputTarget(target)])[0]
    network.zero_grad(set_to_none=True)
    network.train(was_training)
    found: np.ndarray = np.clip(heat, 0, 1).astype(np.float32)
    return found


def target_layers(network: Network, backbone: str) -> list[nn.Module]:
    """The layers that the map is taken from, one of each member of an ensemble: it is the mean of theirs.

    Raises:
        BundleError: A backbone has none.
    """
    names = backbone.split(JOIN)
    for name in names:
        if name not in LAYERS:
            raise BundleError(f"no layer to explain {name} by", where="backbone", expected=" or ".join(LAYERS))
    bodies = network.body.bodies if isinstance(network.body, Bodies) else [network.body]
    return [body.get_submodule(LAYERS[name]) for body, name in zip(bodies, names, strict=True)]


def overlay(picture: np.ndarray, heat: np.ndarray) -> bytes:
    """Lay a map over a picture, with `LABEL` under it.

    Args:
        picture: uint8 [H, W, 3], RGB, of the same part of the image as the map.
        heat: float32 [h, w] in 0..1.

    Returns:
        PNG.
    """
    height, width = picture.shape[:2]
    fine = np.asarray(Image.fromarray(heat).resize((width, height), Image.Resampling.BILINEAR)).clip(0, 1)
    colour = matplotlib.colormaps["inferno"](fine)[..., :3] * 255
    share = 0.65 * fine[..., None]  # where the model did not look, the picture stays as it is
    mixed = Image.fromarray((picture * (1 - share) + colour * share).astype(np.uint8))
    page = Image.new("RGB", (width, height + _STRIP), "white")
    page.paste(mixed)
    ImageDraw.Draw(page).text((8, height + 5), LABEL, fill=(20, 20, 20), font=ImageFont.load_default(14))
    return _png(page)


def neighbour_sheet(neighbours: tuple[Neighbour, ...], pictures: Mapping[str, bytes]) -> bytes:
    """The neighbours side by side, each with diagnosis and distance under it.

    Args:
        neighbours: The nearest first.
        pictures: Encoded images by image id.

    Returns:
        PNG.

    Raises:
        DataError: No picture of any of them.
    """
    shown = [neighbour for neighbour in neighbours if neighbour.image_id in pictures]
    if not shown:
        raise DataError("none of the nearest lesions is in these shards", expected="the shards the model was made with")
    images = [decode(pictures[neighbour.image_id], _PICTURE, _PICTURE) for neighbour in shown]
    tiles = [Image.fromarray(image) for image in images]
    tiles = [tile.resize((round(tile.width * _PICTURE / tile.height), _PICTURE)) for tile in tiles]
    page = Image.new("RGB", (sum(tile.width + 4 for tile in tiles), _PICTURE + _STRIP), "white")
    pen, x = ImageDraw.Draw(page), 0
    for neighbour, tile in zip(shown, tiles, strict=True):
        page.paste(tile, (x, 0))
        text = f"{neighbour.dx}, distance {neighbour.distance:.2f}"
        pen.text((x + 4, _PICTURE + 5), text, fill=(20, 20, 20), font=ImageFont.load_default(13))
        x += tile.width + 4
    return _png(page)


def _png(page: Image.Image) -> bytes:
    stream = io.BytesIO()
    page.save(stream, "PNG")
    return stream.getvalue()
