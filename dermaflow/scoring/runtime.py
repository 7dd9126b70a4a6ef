"""The network as it runs over many images: compiled by OpenVINO on a CPU where that is installed, PyTorch elsewhere.

Measured on one busy core of an AMD EPYC without bfloat16, CPU time an image in batches of 16, median of 5, as eager
PyTorch in channels_last, OpenVINO 2026.4 and ONNX Runtime 1.32: MobileNetV2 at 224x224 42.5, 16.2 and 13.3 ms;
ResNet-18 97.1, 59.3 and 52.4 ms; MobileNetV2 at 144x192 26.7, 9.5 and 8.1 ms. ONNX Runtime is a seventh faster still,
but needs an export of 10 s and more at every start, or a second copy of the weights in a second format; OpenVINO
compiles the network that the bundle holds, in a second or two.
"""

from __future__ import annotations

import importlib.util
import logging
import threading
from collections.abc import Callable

import numpy as np
import torch
from torch import nn

from dermaflow.learning.backbones import Network
from dermaflow.learning.inference import predict
from dermaflow.schemas.bundle import InputSpec
from dermaflow.settings import settings

log = logging.getLogger(__name__)

Runtime = Callable[[np.ndarray], tuple[np.ndarray, np.ndarray]]
"""From pixels, uint8 [N, H, W, 3], to logits float32 [N, 7] and features float32 [N, D]; means over the views."""

BATCH = 16
"""Images at a time: more do not run faster on a CPU, and their activations leave the cache."""


def is_compiled(device: torch.device) -> bool:
    """Whether a network on this device runs by OpenVINO, so that threads may call it at the same time."""
    return device.type == "cpu" and importlib.util.find_spec("openvino") is not None


def make_runtime(network: Network, spec: InputSpec, device: torch.device, at_once: int = 1) -> Runtime:
    """The fastest way to run a network on a device that gives what `predict` gives, to float32 rounding.

    Args:
        network: On the device, ready to predict.
        spec: Size, normalisation and views.
        device: Of the network.
        at_once: Threads that call it at the same time, where it is compiled; they share the cores.
    """
    if is_compiled(device):
        return _openvino(network, spec, at_once)
    log.info("runtime: PyTorch on %s", device)
    return lambda pixels: predict(network, pixels, spec)


class _OneView(nn.Module):
    """Normalisation, features and head in one graph, from pixels as they are decoded."""

    mean: torch.Tensor
    std: torch.Tensor

    def __init__(self, network: Network, spec: InputSpec) -> None:
        super().__init__()
        self.network = network
        self.register_buffer("mean", torch.tensor(spec.mean) * 255)
        self.register_buffer("std", torch.tensor(spec.std) * 255)

    def forward(self, pixels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        features = self.network.features(((pixels.float() - self.mean) / self.std).permute(0, 3, 1, 2))
        return self.network.head(features), features


def _openvino(network: Network, spec: InputSpec, at_once: int) -> Runtime:
    import openvino
    from openvino.frontend import FrontEndManager
    from openvino.frontend.pytorch.ts_decoder import TorchScriptPythonDecoder

    # Not by `openvino.convert_model`, which reports every conversion to its makers: nothing leaves a hospital unasked.
    example = torch.zeros((1, spec.height, spec.width, 3), dtype=torch.uint8)
    frontend = FrontEndManager().load_by_framework("pytorch")
    with torch.inference_mode(False):
        decoder = TorchScriptPythonDecoder(_OneView(network, spec).eval(), example_input=(example,))
        graph = frontend.convert(frontend.load(decoder))
    graph.reshape([-1, spec.height, spec.width, 3])
    options = {
        "INFERENCE_NUM_THREADS": max(at_once, settings().threads),
        "NUM_STREAMS": at_once,
        "INFERENCE_PRECISION_HINT": "f32",  # as calibrated: bfloat16 would move probabilities
        "ENABLE_CPU_PINNING": False,  # several workers on one machine would all choose the first core
    }
    compiled = openvino.Core().compile_model(graph, "CPU", options)
    local = threading.local()  # a request serves one thread
    log.info("runtime: OpenVINO %s, %d threads", openvino.__version__.split("-")[0], settings().threads)

    def run(pixels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        if not hasattr(local, "request"):
            local.request = compiled.create_infer_request()
        logits, features = [], []
        for start in range(0, len(pixels), BATCH):
            batch = pixels[start : start + BATCH]
            views = [batch] if spec.views == 1 else [batch, batch[:, ::-1], batch[:, :, ::-1], batch[:, ::-1, ::-1]]
            answers = [local.request.infer([np.ascontiguousarray(view)]) for view in views]
            # The head is linear, so the mean logits of the views are the logits of the mean features.
            logits.append(np.mean([answer[0] for answer in answers], axis=0, dtype=np.float32))
            features.append(np.mean([answer[1] for answer in answers], axis=0, dtype=np.float32))
        return np.concatenate(logits), np.concatenate(features)

    return run
