"""The compiled network says what the network says that was calibrated."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from dermaflow.learning.backbones import BackboneConfig, Network, build
from dermaflow.learning.inference import predict
from dermaflow.schemas.bundle import InputSpec
from dermaflow.scoring.runtime import BATCH, make_runtime

pytest.importorskip("openvino")
CPU = torch.device("cpu")


def a_network(name: str) -> Network:
    """Random weights, and BatchNorm statistics that are not those of a new layer, so that folding them counts."""
    torch.manual_seed(0)
    network = build(BackboneConfig.model_validate({"name": name})).eval()
    for layer in network.modules():
        if isinstance(layer, torch.nn.BatchNorm2d):
            layer.running_mean.normal_(0, 0.1)
            layer.running_var.uniform_(0.5, 1.5)
    return network.to(memory_format=torch.channels_last)


@pytest.mark.parametrize(("name", "views"), [("mobilenet_v2", 1), ("mobilenet_v2", 4), ("resnet18", 1)])
def test_the_compiled_network_agrees_with_pytorch(name: str, views: int) -> None:
    network = a_network(name)
    spec = InputSpec(height=48, width=64, mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225), views=views)
    pixels = np.random.default_rng(0).integers(0, 256, (BATCH + 3, 48, 64, 3), dtype=np.uint8)
    run = make_runtime(network, spec, CPU)
    logits, features = run(pixels)
    wanted_logits, wanted_features = predict(network, pixels, spec)
    assert logits.dtype == features.dtype == np.float32
    np.testing.assert_allclose(features, wanted_features, atol=1e-4 * np.abs(wanted_features).max())
    np.testing.assert_allclose(logits, wanted_logits, atol=1e-4 * np.abs(wanted_logits).max())


def test_an_image_does_not_depend_on_its_company() -> None:
    network = a_network("mobilenet_v2")
    spec = InputSpec(height=48, width=64, mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225))
    pixels = np.random.default_rng(1).integers(0, 256, (5, 48, 64, 3), dtype=np.uint8)
    run = make_runtime(network, spec, CPU)
    alone = np.concatenate([run(pixels[i : i + 1])[0] for i in range(5)])
    np.testing.assert_allclose(run(pixels)[0], alone, rtol=1e-4, atol=1e-6)
