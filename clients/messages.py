"""Orders and updates as Flower's records, and back; what comes in is checked before anything is done with it."""

from __future__ import annotations

import json
import zlib
from collections.abc import Iterable
from dataclasses import replace
from typing import Any

import numpy as np
from flwr.app import Array, ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict

from clients.plan import Order
from clients.site import Layouts, Model, Update
from clients.wire import WireError, decode, encode
from dermaflow import __version__

ARRAYS, CONFIG, METRICS = "arrays", "config", "metrics"


def order_record(order: Order, model: Model | None, layouts: Layouts | None, **more: np.ndarray) -> RecordDict:
    """What a site is asked; without a model where a question needs none, with more arrays where it needs them."""
    config: dict[str, Any] = {"order": order.model_dump_json()}
    content = RecordDict()
    if model is not None and layouts is not None:
        arrays = {"weights": Array(encode(model.weights, order.precision)), "norm": Array(model.norm)}
        config |= {"weights": layouts.weights.digest, "norm": layouts.norm.digest, "rest": layouts.rest.digest}
        if model.rest is not None:
            arrays["rest"] = Array(model.rest)
        if model.control is not None:
            arrays["control"] = Array(encode(model.control, order.precision))
        content[ARRAYS] = ArrayRecord(arrays | {name: Array(array) for name, array in more.items()})
    elif more:
        content[ARRAYS] = ArrayRecord({name: Array(array) for name, array in more.items()})
    content[CONFIG] = ConfigRecord(config)
    return content


class Known:
    """Which sites have the part of a model that is not trained, so that it is sent once."""

    def __init__(self) -> None:
        self._digests: dict[str, str] = {}

    def unsent(self, site: str, model: Model, layouts: Layouts) -> Model:
        """The model as this site has to get it: with `rest`, or without."""
        return replace(model, rest=None) if self._digests.get(site) == _digest(model, layouts) else model

    def note(self, sites: Iterable[str], model: Model, layouts: Layouts) -> None:
        """These sites answered to a message with the model."""
        self._digests |= dict.fromkeys(sites, _digest(model, layouts))

    def forget(self, sites: Iterable[str]) -> None:
        """These did not; who lost what it had gets it again."""
        for site in sites:
            self._digests.pop(site, None)


def _digest(model: Model, layouts: Layouts) -> str:
    assert model.rest is not None
    return f"{layouts.rest.digest} {zlib.crc32(model.rest.tobytes())}"


def read_order(content: RecordDict) -> Order:
    """The order in a message.

    Raises:
        WireError: There is none, or it is of another version.
    """
    try:
        fields = json.loads(str(content.config_records[CONFIG]["order"]))
        if fields.get("version") != __version__:
            raise WireError(
                f"the coordinator has DermaFlow {fields.get('version')}", expected=f"{__version__}, as here",
                todo="install the same version on both sides",
            )  # fmt: skip
        return Order.model_validate(fields)
    except (KeyError, ValueError) as error:  # pydantic's ValidationError is a ValueError
        raise WireError(f"the message holds no order: {error}") from error


def read_model(content: RecordDict, order: Order) -> Model:
    """The model in a message for a site.

    Raises:
        WireError: It does not fit the network that the order names.
    """
    layouts = Layouts.of(order)
    config, arrays = content.config_records[CONFIG], content.array_records[ARRAYS]

    def read(name: str, layout: str) -> np.ndarray | None:
        if name not in arrays:
            return None
        return decode(arrays[name].numpy(), getattr(layouts, layout), str(config.get(layout)))

    weights, norm = read("weights", "weights"), read("norm", "norm")
    if weights is None or norm is None:
        raise WireError("the message holds no model", expected="weights and norm")
    return Model(weights, norm, read("rest", "rest"), read("control", "weights"))


def update_record(update: Update, order: Order, layouts: Layouts, site: str) -> RecordDict:
    """What a site answers after training."""
    arrays = {"delta": Array(encode(update.delta, order.precision)), "norm": Array(update.norm)}
    if update.control is not None:
        arrays["control"] = Array(encode(update.control, order.precision))
    if update.confusion is not None:
        arrays["confusion"] = Array(update.confusion)
    config = {"site": site, "weights": layouts.weights.digest, "norm": layouts.norm.digest}
    return RecordDict(
        {ARRAYS: ArrayRecord(arrays), METRICS: MetricRecord(dict(update.figures)), CONFIG: ConfigRecord(config)}
    )


def read_figures(record: MetricRecord) -> dict[str, float]:
    """Numbers in an answer, which is not trusted.

    Raises:
        WireError: They are not finite, or there cannot be so many images or steps.
    """
    figures = {name: float(value) for name, value in record.items()}  # type: ignore[arg-type]
    finite = np.isfinite(list(figures.values())).all()
    if not (finite and figures.get("images", 1.0) > 0 and figures.get("steps", 1.0) >= 1):
        raise WireError("its figures are impossible", expected="finite numbers, images above 0, at least one step")
    return figures


def read_update(content: RecordDict, layouts: Layouts) -> Update:
    """A site's answer, which is not trusted.

    Raises:
        WireError: It has another layout, shape or type, or holds NaN, or figures are missing or impossible.
    """
    try:
        arrays, figures = content.array_records[ARRAYS], content.metric_records[METRICS]
        config = content.config_records[CONFIG]
        digest = str(config["weights"])
        delta = decode(arrays["delta"].numpy(), layouts.weights, digest)
        norm = decode(arrays["norm"].numpy(), layouts.norm, str(config["norm"]))
        control = decode(arrays["control"].numpy(), layouts.weights, digest) if "control" in arrays else None
        confusion = arrays["confusion"].numpy() if "confusion" in arrays else None
        numbers = read_figures(figures)
        if "images" not in numbers:
            raise KeyError("images")
    except (KeyError, TypeError, ValueError) as error:
        raise WireError(f"the answer is incomplete: {error}", expected="delta, norm, images") from error
    variances = [norm[start:end] for start, end in layouts.norm.parts("running_var")]
    if any((part < 0).any() for part in variances):
        raise WireError("a variance is negative", expected="running statistics of normalisation layers")
    if confusion is not None and (confusion.shape != (7, 7) or confusion.min() < 0):
        raise WireError("its table of predictions is impossible", expected="counts, 7 by 7")
    return Update(delta, norm, control, numbers, confusion)


def content_bytes(content: RecordDict) -> int:
    """Bytes of the arrays of a message."""
    return sum(len(array.data) for record in content.array_records.values() for array in record.values())


def array_of(message: Message, name: str) -> np.ndarray:
    """One array of an answer; raises WireError if it is not there or not finite."""
    try:
        found: np.ndarray = message.content.array_records[ARRAYS][name].numpy()
    except (KeyError, ValueError) as error:
        raise WireError(f"the answer holds no {name}") from error
    if not np.isfinite(found).all():
        raise WireError(f"{name} holds NaN or infinity")
    return found
