"""Updates as one array: what travels comes back, and what does not fit is refused."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from clients.wire import WireError, layout_of, norm_parameters, pack, unpack
from dermaflow.learning.backbones import BackboneConfig, build


@pytest.fixture(scope="module")
def network() -> torch.nn.Module:
    torch.manual_seed(0)
    return build(BackboneConfig(name="mobilenet_v2"))


@pytest.mark.parametrize("scope", ["head", "last_block", "all"])
def test_what_travels_comes_back(network, scope) -> None:
    layout = layout_of(network, scope)
    tensors = dict(network.named_parameters())
    back = unpack(pack(tensors, layout), layout, layout.digest)
    assert list(back) == list(layout.names)
    assert all(torch.equal(back[name], tensors[name]) for name in back)
    assert layout.size == sum(tensors[name].numel() for name in layout.names)


def test_scopes_grow_and_buffers_stay_home(network) -> None:
    sizes = [layout_of(network, scope).size for scope in ("head", "last_block", "all")]
    assert sizes[0] == 7 * 1280 + 7 and sizes == sorted(sizes)
    assert sizes[2] == sum(p.numel() for p in network.parameters())
    buffers = {name for name, _ in network.named_buffers()}
    assert not buffers & set(layout_of(network, "all").names)
    without = layout_of(network, "all", local_norm=True)
    assert set(layout_of(network, "all").names) - set(without.names) == norm_parameters(network) != set()


def test_bfloat16_halves_the_bytes_and_rounds(network) -> None:
    layout = layout_of(network, "all")
    tensors = dict(network.named_parameters())
    packed = pack(tensors, layout, "bfloat16")
    assert packed.nbytes * 2 == pack(tensors, layout).nbytes
    for name, tensor in unpack(packed, layout, layout.digest).items():
        torch.testing.assert_close(tensor, tensors[name].detach(), rtol=2**-8, atol=1e-30)


def test_what_does_not_fit_is_refused(network) -> None:
    layout = layout_of(network, "head")
    good = pack(dict(network.named_parameters()), layout)
    other = layout_of(network, "last_block")
    bad = good.copy()
    bad[3] = np.nan
    for array, digest, says in (
        (good, other.digest, "layout"), (good[:-1], layout.digest, "shape"), (bad, layout.digest, "NaN"),
        (good.astype(np.float64), layout.digest, "type"), (good[None], layout.digest, "shape"),
    ):  # fmt: skip
        with pytest.raises(WireError, match=says):
            unpack(array, layout, digest)
