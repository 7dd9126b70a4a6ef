"""Write and read a model bundle: a folder that is whole and unchanged, or an error that says what is wrong with it.

`bundle.json` names the SHA-256 of the weights, the reference features, their ids and the card; `bundle.sha256` names
that of `bundle.json`, so a single changed byte in any file is noticed. Nothing is ever unpickled.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import safetensors.numpy
import safetensors.torch
import torch
from pydantic import ValidationError
from safetensors import SafetensorError

from dermaflow import storage
from dermaflow.errors import BundleError, StorageError
from dermaflow.schemas.bundle import (
    BUNDLE_NAME,
    CARD_NAME,
    DIGEST_NAME,
    OOD_NAME,
    REFERENCE_NAME,
    WEIGHTS_NAME,
    Bundle,
    Calibration,
    Reference,
)
from dermaflow.taxonomy import CODES

MAX_BYTES = 4 << 30
"""Largest file that is read: seven times the weights of VGG16, the largest backbone here."""

_IDS = ("image_ids", "lesion_ids", "dx")
_OLDER = ("dermaflow-bundle/1",)
"""Formats whose weights can be read, and whose calibration cannot."""
_FETCH_AGAIN = "fetch the bundle again from where it came, or train it again"


@dataclass(frozen=True)
class LoadedBundle:
    """A bundle whose every file has the hash it should have.

    Attributes:
        bundle: What the model is.
        weights: The network's state by name, on the CPU.
        reference: Training images that new ones are compared with; None if there are none.
        card: The model card, Markdown.
        sha256: SHA-256 of ``bundle.json``; it contains the hashes of the other files and so identifies the model.
    """

    bundle: Bundle
    weights: dict[str, torch.Tensor]
    reference: Reference | None
    card: str
    sha256: str


def save_bundle(
    path: Path, bundle: Bundle, weights: Mapping[str, torch.Tensor], reference: Reference | None, card: str
) -> None:
    """Write a bundle; the folder appears whole or not at all, and replaces an older one.

    Args:
        path: Folder to write.
        bundle: What the model is; its hashes are filled in here.
        weights: The network's state by name.
        reference: Training images that ``bundle.calibration.ood`` refers to, None exactly if there is none.
        card: The model card, Markdown.

    Raises:
        BundleError: A reference is given without its distances, or the other way round.
        StorageError: The disk is full or cannot be written.
    """
    calibration = bundle.calibration
    if (reference is None) != (calibration is None or calibration.ood is None):
        raise BundleError(
            "the reference and the out-of-distribution distance must come together",
            where=path,
            todo="pass the reference that the calibration was fitted with",
        )
    files = {
        WEIGHTS_NAME: safetensors.torch.save(
            {name: w.detach().cpu().contiguous().clone() for name, w in weights.items()}
        ),
        CARD_NAME: card.encode(),
    }
    hashes: dict[str, object] = {"card_sha256": storage.sha256(files[CARD_NAME])}
    hashes["weights_sha256"] = storage.sha256(files[WEIGHTS_NAME])
    if reference is not None and calibration is not None and calibration.ood is not None:
        whitener = np.float16 if bundle.made_small_from else np.float32
        kinds = {"features": np.float16, "mean": np.float32, "whitener": whitener}
        tensors = {name: np.ascontiguousarray(getattr(reference, name), kind) for name, kind in kinds.items()}
        files[OOD_NAME] = safetensors.numpy.save(tensors)
        files[REFERENCE_NAME] = json.dumps({name: getattr(reference, name) for name in _IDS}).encode()
        digests = {
            "features_sha256": storage.sha256(files[OOD_NAME]),
            "reference_sha256": storage.sha256(files[REFERENCE_NAME]),
        }
        ood = calibration.ood.model_copy(update=digests)
        hashes["calibration"] = calibration.model_copy(update={"ood": ood})
    content = bundle.model_copy(update=hashes).model_dump_json(indent=2).encode()
    files |= {BUNDLE_NAME: content, DIGEST_NAME: storage.sha256(content).encode()}
    write_files(path, files)


def load_bundle(path_or_uri: str | Path) -> LoadedBundle:
    """Read a bundle and check every hash in it.

    Args:
        path_or_uri: A local folder or ``s3://bucket/prefix``.

    Raises:
        BundleError: A file is missing, changed or too large, or the format or classes are not the ones of this version.
    """
    bundle, files = read_files(path_or_uri)
    try:
        weights = safetensors.torch.load(files[WEIGHTS_NAME])
        reference = _read_reference(files) if OOD_NAME in files else None
    except (SafetensorError, KeyError) as error:
        raise BundleError(
            f"not safetensors ({error})",
            where=path_or_uri,
            expected=f"{WEIGHTS_NAME}, {OOD_NAME} and {REFERENCE_NAME}",
            todo=_FETCH_AGAIN,
        ) from error
    return LoadedBundle(bundle, weights, reference, files[CARD_NAME].decode(), files[DIGEST_NAME].decode())


def load_uncalibrated(path_or_uri: str | Path) -> LoadedBundle:
    """Read the network of a bundle, also of an older format, without what was fitted or measured after training.

    Raises:
        BundleError: As in `load_bundle`.
    """
    content, digest = read_description(path_or_uri)
    bundle = parse_bundle(content, where=storage.join(path_or_uri, BUNDLE_NAME), calibrated=False)
    data = _read_checked(path_or_uri, WEIGHTS_NAME, bundle.weights_sha256)
    try:
        weights = safetensors.torch.load(data)
    except SafetensorError as error:
        raise BundleError(
            f"not safetensors ({error})", where=path_or_uri, expected=WEIGHTS_NAME, todo=_FETCH_AGAIN
        ) from error
    return LoadedBundle(bundle, weights, None, "", digest)


def _read_reference(files: Mapping[str, bytes]) -> Reference:
    """The reference; raises KeyError or SafetensorError for files that are none."""
    tensors, ids = safetensors.numpy.load(files[OOD_NAME]), json.loads(files[REFERENCE_NAME])
    image_ids, lesion_ids, dx = (tuple(ids[name]) for name in _IDS)
    whitener = tensors["whitener"].astype(np.float32, copy=False)
    return Reference(tensors["features"], tensors["mean"], whitener, image_ids, lesion_ids, dx)


def update_bundle(
    path: Path,
    *,
    calibration: Calibration | None = None,
    reference: Reference | None = None,
    metrics: Mapping[str, float] | None = None,
    card: str | None = None,
) -> None:
    """Replace parts of a bundle; what is not given stays as it is. The folder is replaced as a whole.

    Args:
        path: The bundle's folder.
        calibration: New calibration; `reference` must come with it if it has an out-of-distribution distance.
        reference: The reference that `calibration` was fitted with.
        metrics: New headline figures on the test split.
        card: New model card, Markdown.

    Raises:
        BundleError: The bundle on disk is damaged, or calibration and reference do not belong together.
    """
    old = load_bundle(path)
    changes: dict[str, object] = {}
    if calibration is not None:
        changes["calibration"] = calibration
    if metrics is not None:
        changes["metrics"] = {name: float(value) for name, value in metrics.items()}
    save_bundle(
        path,
        old.bundle.model_copy(update=changes),
        old.weights,
        old.reference if calibration is None else reference,
        old.card if card is None else card,
    )


def read_files(uri: str | Path) -> tuple[Bundle, dict[str, bytes]]:
    """Read the files of a bundle as bytes, each checked against its hash.

    Args:
        uri: A local folder or ``s3://bucket/prefix``.

    Returns:
        What the model is, and every file by name, ``bundle.sha256`` last.

    Raises:
        BundleError: As in `load_bundle`.
    """
    content, digest = read_description(uri)
    bundle = parse_bundle(content, where=storage.join(uri, BUNDLE_NAME))
    expected = {WEIGHTS_NAME: bundle.weights_sha256, CARD_NAME: bundle.card_sha256}
    if bundle.calibration is not None and bundle.calibration.ood is not None:
        expected[OOD_NAME] = bundle.calibration.ood.features_sha256
        expected[REFERENCE_NAME] = bundle.calibration.ood.reference_sha256
    files = {BUNDLE_NAME: content} | {name: _read_checked(uri, name, sha256) for name, sha256 in expected.items()}
    return bundle, files | {DIGEST_NAME: digest.encode()}


def read_description(uri: str | Path) -> tuple[bytes, str]:
    """The bytes of ``bundle.json``, checked against ``bundle.sha256``, and that hash.

    Raises:
        BundleError: One of the two is missing, or they do not belong together.
    """
    digest = _read(uri, DIGEST_NAME).decode(errors="replace").strip()
    return _read_checked(uri, BUNDLE_NAME, digest), digest


def parse_bundle(content: bytes, where: object, calibrated: bool = True) -> Bundle:
    """Read the content of ``bundle.json``.

    Args:
        content: JSON.
        where: For the error.
        calibrated: Without it, calibration and metrics are left out, and older formats can be read.

    Raises:
        BundleError: It is no JSON, of another format, or its classes are not `CODES` in that order.
    """
    try:
        found = json.loads(content)
    except ValueError as error:
        raise BundleError(
            f"not JSON ({error})", where=where, expected="a bundle description", todo=_FETCH_AGAIN
        ) from error
    known = Bundle.model_fields["format"].default
    version = found.get("format") if isinstance(found, dict) else None
    if not calibrated and version in (known, *_OLDER):
        found |= {"format": known, "calibration": None, "metrics": None}
    elif version != known:
        raise BundleError(
            f"bundle format {version!r}",
            where=where,
            expected=repr(known),
            todo="fit its calibration again: dermaflow calibrate --model OLD --shards SHARDS --out NEW"
            if version in _OLDER
            else "use the DermaFlow version that wrote it",
        )
    try:
        bundle = Bundle.model_validate(found)
    except ValidationError as error:
        problems = "; ".join(f"{'.'.join(map(str, e['loc']))}: {e['msg']}" for e in error.errors())
        raise BundleError(
            problems, where=where, expected="the fields of this version of DermaFlow", todo=_FETCH_AGAIN
        ) from error
    if bundle.classes != CODES:
        raise BundleError(
            "classes are " + " ".join(bundle.classes),
            where=where,
            expected=" ".join(CODES) + ", in this order",
            todo="train the model again with this version of DermaFlow",
        )
    return bundle


def write_files(path: Path, files: Mapping[str, bytes]) -> None:
    """Write the files of a bundle into a local folder that appears whole or not at all."""
    with storage.folder_atomic(path) as folder:
        for name, content in files.items():
            storage.write_bytes(folder / name, content)


def _read_checked(uri: str | Path, name: str, sha256: str) -> bytes:
    content = _read(uri, name)
    found = storage.sha256(content)
    if found != sha256:
        raise BundleError(
            f"changed since it was written: SHA-256 {found}",
            where=storage.join(uri, name),
            expected=sha256 or "a SHA-256",
            todo=_FETCH_AGAIN,
        )
    return content


def _read(uri: str | Path, name: str) -> bytes:
    file = storage.join(uri, name)
    info = storage.info(file)
    if not info.is_file:
        raise BundleError(
            "no such file",
            where=file,
            expected=f"a bundle with {WEIGHTS_NAME}, {BUNDLE_NAME}, {DIGEST_NAME} and {CARD_NAME}",
            todo="check the path, or train a model with `dermaflow train`",
        )
    if info.size > MAX_BYTES:
        raise BundleError(f"{info.size} bytes", where=file, expected=f"at most {MAX_BYTES}", todo=_FETCH_AGAIN)
    try:
        return storage.read_bytes(file)
    except StorageError as error:
        raise BundleError(
            "cannot be read", where=file, todo=f"check the disk or the connection: {error.what}"
        ) from error
