"""Updates as one array: what travels comes back, and what does not fit is refused."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from clients.wire import (
    WireError,
    decode,
    encode,
    layout_of,
    merge_norm,
    norm_layout,
    norm_parameters,
    pack,
    rest_layout,
    unpack,
)
from dermaflow.learning.backbones import BackboneConfig, build


@pytest.fixture(scope="module")
def network() -> torch.nn.Module:
    torch.manual_seed(0)
    return build(BackboneConfig(name="mobilenet_v2"))


@pytest.mark.parametrize("scope", ["head", "last_block", "all"])
def test_what_travels_comes_back(network, scope) -> None:
    layout = layout_of(network, scope)
    tensors = dict(network.named_parameters())
    flat = decode(encode(pack(tensors, layout), "float32"), layout, layout.digest)
    back = unpack(flat, layout)
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
    packed = encode(pack(tensors, layout), "bfloat16")
    assert packed.nbytes * 2 == pack(tensors, layout).nbytes
    for name, tensor in unpack(decode(packed, layout, layout.digest), layout).items():
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
            decode(array, layout, digest)


@pytest.mark.parametrize("scope", ["head", "last_block", "all"])
def test_weights_statistics_and_the_rest_are_everything_once(network, scope) -> None:
    layouts = [layout_of(network, scope), norm_layout(network, scope)]
    layouts.append(rest_layout(network, *layouts))
    names = [name for layout in layouts for name in layout.names]
    wanted = [name for name in network.state_dict() if not name.endswith("num_batches_tracked")]
    assert sorted(names) == sorted(wanted)


def test_what_comes_out_of_an_array_is_not_tied_to_it(network) -> None:
    layout = layout_of(network, "head")
    flat = pack(dict(network.named_parameters()), layout)
    before = flat.copy()
    unpack(flat, layout)["head.bias"].add_(1)
    assert np.array_equal(flat, before)


def test_statistics_merge_to_those_of_all_images(network) -> None:
    """Means and variances of three sites, of different sizes and with different means, give those of all together."""
    rng = np.random.default_rng(0)
    layout = norm_layout(network, "all")
    parts = [rng.normal(i, 1 + i, (50 * (i + 1), layout.size)) for i in range(3)]
    arrays = []
    for part in parts:
        array = np.zeros(layout.size, np.float32)
        for (a, b), (c, d) in zip(layout.parts("running_mean"), layout.parts("running_var"), strict=True):
            array[a:b], array[c:d] = part[:, a:b].mean(0), part[:, a:b].var(0)
        arrays.append(array)
    merged = merge_norm(arrays, [len(part) for part in parts], layout)
    everything = np.concatenate(parts)
    for (a, b), (c, d) in zip(layout.parts("running_mean"), layout.parts("running_var"), strict=True):
        np.testing.assert_allclose(merged[a:b], everything[:, a:b].mean(0), rtol=1e-4, atol=1e-4)
        np.testing.assert_allclose(merged[c:d], everything[:, a:b].var(0), rtol=1e-3)
