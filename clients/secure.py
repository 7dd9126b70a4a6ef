"""The site's legs of a secure sum: what comes in Flower's records, what goes out, and what is kept in between.

Four legs: keys, shares, the question itself (a round, sums of features...) with its answer under masks, and the shares
that take the masks off the sum. What a site keeps between them lies in the run's context, in the memory of its
SuperNode and not on its disk: a site that restarts in between counts as lost, and the sum is that of the others.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from flwr.app import Array, ArrayRecord, ConfigRecord, Context, Message, RecordDict

from clients.masking import Party, from_fixed, seed_digest, to_fixed
from clients.plan import Order
from clients.policy import Refused
from clients.site import Layouts, Update
from clients.wire import WireError

SECURE = "secure"
KEYS, SHARES, REVEAL = "query.secure_keys", "query.secure_shares", "query.secure_reveal"
SUMMED = (
    "train", "query.centre", "query.class_sums", "query.scale_losses", "query.scaling_sums", "query.calibration_counts",
)  # fmt: skip
"""What is answered in sums only; counts of images and results on test splits are each site's own."""


def is_secure(message: Message) -> bool:
    """Whether a message is a leg of a secure sum."""
    return SECURE in message.content.config_records


def offer_keys(message: Message, context: Context) -> ConfigRecord:
    """First leg: fresh public keys."""
    party, keys = Party.new(str(_asked(message)["sum"]), context.node_id)
    _keep(context, party)
    return ConfigRecord({"keys": list(keys)})


def share_secrets(message: Message, context: Context) -> ConfigRecord:
    """Second leg: a share of both secrets for every other site, sealed."""
    party, asked = _recall(message, context), _asked(message)
    sealed = party.make_shares(_pairs(asked, "nodes", "keys"), _number(asked, "threshold"))
    _keep(context, party)
    return ConfigRecord({"nodes": list(sealed), "sealed": list(sealed.values()), "seed": seed_digest(party.seed)})


def masked(message: Message, context: Context, arrays: Mapping[str, np.ndarray], limit: float) -> ArrayRecord:
    """Third leg: the answer's arrays, as integers under masks.

    Args:
        message: The question.
        context: Of the run.
        arrays: What is to be added up; ``delta`` travels in 32 bits, everything else in twice 64.
        limit: Largest absolute value in ``delta``.
    """
    party, asked = _recall(message, context), _asked(message)
    nodes, sealed = _listed(asked, "nodes"), _listed(asked, "sealed")
    party.take_shares(dict(zip(nodes, sealed, strict=True)))
    assert party.shares is not None
    whole = {name: to_fixed(array, len(party.shares), limit_of(name, limit)) for name, array in arrays.items()}
    found = party.mask(whole)
    _keep(context, party)
    return ArrayRecord({name: Array(array) for name, array in found.items()})


def reveal(message: Message, context: Context) -> ConfigRecord:
    """Last leg: shares that take the masks off the sum. Once; then everything about it is forgotten."""
    party, asked = _recall(message, context), _asked(message)
    shares = party.reveal(_listed(asked, "active"), _listed(asked, "lost"))
    del context.state.config_records[SECURE]
    return ConfigRecord({"nodes": list(shares), "shares": list(shares.values())})


def limit_of(name: str, limit: float) -> float:
    """Of an array: see `to_fixed`."""
    return limit if name == "delta" else 0.0


def update_sums(update: Update, order: Order, layouts: Layouts) -> dict[str, np.ndarray]:
    """A site's answer after training as numbers whose sums over sites say everything that is needed.

    Running variances have a range of their own, far beyond that of weights, and travel as second moments times images:
    with the means these are sums over all sites' images, and nothing is clipped.

    Args:
        update: What was trained.
        order: Gives the largest number of images of a site, to which `delta` is weighed.
        layouts: Of the update.
    """
    images = update.figures["images"]
    if images > order.most_images:
        raise Refused("this site has more images than the coordinator says any site has")
    moments = update.norm.astype(np.float64)
    for (a, b), (c, d) in _statistics(layouts):
        moments[c:d] += moments[a:b] ** 2
    sums = {"delta": update.delta.astype(np.float64) * (images / order.most_images), "norm": moments * images}
    if "loss" in update.figures:
        sums["loss"] = np.array([update.figures["loss"] * images])
    if "clipped" in update.figures:
        sums["clipped"] = np.array([update.figures["clipped"] * images])
    if update.confusion is not None:
        sums["confusion"] = update.confusion
    return sums


def update_of(content: RecordDict, order: Order, layouts: Layouts, images: float) -> Update:
    """The update of all sites together, out of their sums; in place of `read_update`.

    Raises:
        WireError: The sums are of another layout.
    """
    arrays = {name: array.numpy() for name, array in content.array_records["arrays"].items()}
    if arrays["delta"].shape != (layouts.weights.size,) or arrays["norm"].shape != (layouts.norm.size,):
        raise WireError("the sums are of another layout", expected=f"({layouts.weights.size},)")
    norm = arrays["norm"] / images
    for (a, b), (c, d) in _statistics(layouts):
        norm[c:d] = np.maximum(norm[c:d] - norm[a:b] ** 2, 0.0)
    confusion = np.rint(arrays["confusion"]).astype(np.int64) if "confusion" in arrays else None
    means = {name: float(arrays[name][0]) / images for name in ("loss", "clipped") if name in arrays}
    figures = {"images": images} | means
    delta = arrays["delta"] * (order.most_images / images)
    return Update(delta.astype(np.float32), norm.astype(np.float32), None, figures, confusion)


def _statistics(layouts: Layouts) -> list[tuple[tuple[int, int], tuple[int, int]]]:
    return list(zip(layouts.norm.parts("running_mean"), layouts.norm.parts("running_var"), strict=True))


def totals_of(arrays: Mapping[str, np.ndarray], sites: int, limit: float) -> dict[str, np.ndarray]:
    """Sums as float64, of integers without masks."""
    return {name: from_fixed(array, sites, limit_of(name, limit)) for name, array in arrays.items()}


def _asked(message: Message) -> ConfigRecord:
    return message.content.config_records[SECURE]


def _listed(record: ConfigRecord, name: str) -> list[Any]:
    found = record.get(name)
    if not isinstance(found, list):
        raise Refused(f"the leg of a secure sum lacks {name}")
    return found


def _number(record: ConfigRecord, name: str) -> int:
    found = record.get(name)
    if not isinstance(found, int):
        raise Refused(f"the leg of a secure sum lacks {name}")
    return found


def _pairs(record: ConfigRecord, names: str, values: str) -> dict[int, tuple[bytes, bytes]]:
    flat = _listed(record, values)
    return dict(zip(_listed(record, names), zip(flat[::2], flat[1::2], strict=True), strict=True))


def _keep(context: Context, party: Party) -> None:
    context.state.config_records[SECURE] = ConfigRecord(
        {
            "sum": party.sum, "node": party.node, "mask-key": party.mask_key, "share-key": party.share_key,
            "seed": party.seed, "threshold": party.threshold, "masked": party.masked,
            "nodes": list(party.keys or {}), "keys": [key for pair in (party.keys or {}).values() for key in pair],
            "holders": list(party.shares or {}),
            "shares": [share for pair in (party.shares or {}).values() for share in pair],
        }
    )  # fmt: skip


def _recall(message: Message, context: Context) -> Party:
    kept, name = context.state.config_records.get(SECURE), str(_asked(message)["sum"])
    if kept is None or kept["sum"] != name:
        raise Refused(f"this site does not know the secure sum {name}: it restarted, or has ended it")
    keys, shares = _pairs(kept, "nodes", "keys"), _pairs(kept, "holders", "shares")
    mask_key, share_key, seed = (kept[place] for place in ("mask-key", "share-key", "seed"))
    assert isinstance(mask_key, bytes) and isinstance(share_key, bytes) and isinstance(seed, bytes)
    node, threshold = _number(kept, "node"), _number(kept, "threshold")
    return Party(name, node, mask_key, share_key, seed, threshold, keys or None, shares or None, bool(kept["masked"]))
