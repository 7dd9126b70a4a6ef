"""Names and numbers that stay the same when the same pathway is written again."""

from __future__ import annotations

import uuid
from pathlib import PurePosixPath
from urllib.parse import quote

from dermaflow.schemas.pathway import Pathway
from dermaflow.storage import sha256

BASE = "https://dermaflow.example/fhir"
"""Start of the addresses of our own code systems; ``.example`` is reserved (RFC 2606), nobody else uses it."""

_NAMESPACE = uuid.uuid5(uuid.NAMESPACE_URL, BASE)
_MAX_NAME = 80  # characters of a file name; file systems allow 255 bytes


def stable_id(*parts: object) -> str:
    """A UUID that depends on the parts alone."""
    return str(uuid.uuid5(_NAMESPACE, "\x1f".join(map(str, parts))))


def pathway_key(pathway: Pathway) -> tuple[str, ...]:
    """What makes a pathway itself: person, lesion, model and knowledge base."""
    versions = pathway.versions
    return pathway.patient_id, pathway.lesion_id, versions.model_sha256, versions.knowledge_sha256


def file_name(patient_id: str, suffix: str) -> str:
    """A file name for a person's id, whatever characters the id has; different ids give different names."""
    name = quote(patient_id, safe=" ")
    if len(name) > _MAX_NAME or name.startswith(".") or name != patient_id:
        name = f"{name[:_MAX_NAME].lstrip('.')}-{sha256(patient_id.encode())[:12]}"
    return str(PurePosixPath(name + suffix))
