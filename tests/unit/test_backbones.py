"""Every backbone gives features and logits, starts from the weights it is given, and names a file that does not fit."""

from __future__ import annotations

from pathlib import Path
from typing import get_args

import pytest
import torch
import torchvision
from safetensors.torch import save_file
from torch import nn

from dermaflow.errors import RecipeError
from dermaflow.learning.backbones import BackboneConfig, BackboneName, Network, build

FEATURES = {
    "seed_cnn": 128,
    "vgg16": 4096,
    "resnet18": 512,
    "resnet50": 2048,
    "mobilenet_v2": 1280,
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
        if name != "seed_cnn":  # torchvision's files fit, but for the last layer of the classifier
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
