"""The models there are, which of them is the champion, and how it came to be.

    models/<name>-<first ten digits of the bundle's hash>/   a bundle; never changed
    history/0001-<time>-<random>.json                        one promotion or rollback each; never changed
    champion.json                                            the latest of them, for people and other programs
    promotion.lock                                           in a local folder: one promotion or rollback at a time

A version is named by its content, so two writers cannot take one number and adding a bundle twice changes nothing. The
registry lies in a local folder or under ``s3://bucket/prefix``. An upload counts once its ``bundle.sha256`` is there,
which is written last. The champion is what the history says last, so a writer that is killed between the two files
leaves no doubt. Whoever decides by comparing with a champion says which one (``instead_of``) and is refused when it is
another by then; on an object store, which has no lock, this is checked right before the entry is written.
"""

from __future__ import annotations

import logging
import re
import uuid
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, ValidationError

from dermaflow import storage
from dermaflow.bundles.bundle import parse_bundle, read_description, read_files, write_files
from dermaflow.errors import BundleError, RegistryError
from dermaflow.locks import locked
from dermaflow.schemas.bundle import BUNDLE_NAME, DIGEST_NAME, Bundle

log = logging.getLogger(__name__)

CHAMPION = "champion"
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")


@dataclass(frozen=True)
class Version:
    """A model of the registry.

    Attributes:
        id: ``<name>-<first ten digits of sha256>``.
        sha256: SHA-256 of the bundle's ``bundle.json``.
        added: When its upload was complete, UTC.
        bundle: What the model is and where it comes from: data hash, recipe, versions, metrics.
        champion: Whether it is the one in use.
    """

    id: str
    sha256: str
    added: datetime
    bundle: Bundle
    champion: bool


class Promotion(BaseModel):
    """One entry of the history: from this moment on, `to_version` is the champion."""

    model_config = ConfigDict(extra="forbid")

    action: Literal["promote", "rollback"]
    at: datetime
    by: str
    reason: str
    from_version: str | None
    to_version: str


@dataclass(frozen=True)
class MetricDifference:
    """A headline figure of two models; None where a model does not have it."""

    name: str
    a: float | None
    b: float | None

    @property
    def difference(self) -> float | None:
        """b - a."""
        return None if self.a is None or self.b is None else self.b - self.a


@dataclass(frozen=True)
class Comparison:
    """Two models side by side.

    Attributes:
        a: The first.
        b: The second.
        metrics: Every figure that one of them has, by name.
        recipe: The settings that differ: dotted key to the value in a and in b, None where it is not set.
        same_data: Whether both were trained on the same shards; if not, their figures are of different test splits.
    """

    a: Version
    b: Version
    metrics: list[MetricDifference]
    recipe: dict[str, tuple[Any, Any]]
    same_data: bool


class Registry:
    """Models on a local folder or an object store.

    Args:
        uri: A local folder, made when the first model is added, or ``s3://bucket/prefix``.
    """

    def __init__(self, uri: str | Path) -> None:
        self.uri = str(uri)

    def add(self, bundle_path: str | Path, *, name: str | None = None) -> Version:
        """Copy a bundle into the registry; a bundle that is there already stays as it is.

        Args:
            bundle_path: The bundle, local or ``s3://``.
            name: Name of the model; the bundle's own if not given.

        Raises:
            BundleError: The bundle is damaged.
            RegistryError: The name cannot be part of a path.
        """
        bundle, files = read_files(bundle_path)
        name = bundle.name if name is None else name
        if not _NAME.fullmatch(name):
            raise RegistryError(
                f"model name {name!r}",
                expected="letters, digits, dots, dashes and underscores",
                todo="give another name",
            )
        version = f"{name}-{files[DIGEST_NAME].decode()[:10]}"
        if version in self._ids():
            log.info("%s is in %s already", version, self.uri)
        else:
            for file, content in files.items():  # the digest comes last
                storage.write_bytes(self._place(version, file), content)
            log.info("added %s to %s", version, self.uri)
        return self._read(version, self._champion_id())

    def list(self) -> Sequence[Version]:
        """All models, the oldest first. A damaged one is left out with a warning, so that the others stay in reach."""
        champion, versions = self._champion_id(), []
        for version in self._ids():
            try:
                versions.append(self._read(version, champion))
            except BundleError as error:
                log.warning("left out of the list: %s", error)
        return sorted(versions, key=lambda v: (v.added, v.id))

    def show(self, version: str) -> Version:
        """One model.

        Args:
            version: Its id, the unique beginning of its id, or ``champion``.

        Raises:
            RegistryError: There is none, or several.
            BundleError: Its description is damaged.
        """
        champion = self._champion_id()
        return self._read(self._resolve(version, champion), champion)

    def champion(self) -> Version | None:
        """The model in use; None before the first promotion."""
        champion = self._champion_id()
        return None if champion is None else self._read(champion, champion)

    def promote(self, version: str, *, reason: str, by: str, instead_of: str | None = None) -> Version:
        """Make a model the champion, after checking every byte of it. Promoting the champion changes nothing.

        Args:
            version: As in `show`.
            reason: Why, for the history.
            by: Who decides.
            instead_of: Id of the champion that the model was compared with.

        Raises:
            RegistryError: No such model, reason or name are blank, or the champion is another than `instead_of`.
            BundleError: The model is damaged.
        """
        with self._alone():
            champion = self._champion_id()
            chosen = self._resolve(version, champion)
            if chosen == champion:
                return self._read(champion, champion)
            return self._appoint("promote", chosen, reason, by, instead_of)

    def rollback(self, *, reason: str, by: str, instead_of: str | None = None) -> Version:
        """Make the champion before the present one the champion again.

        Args:
            reason: Why, for the history.
            by: Who decides.
            instead_of: Id of the champion that is to go, so that two who roll back at once go back one step only.

        Raises:
            RegistryError: There was none before, reason or name are blank, or the champion is another than
                `instead_of`.
            BundleError: The earlier model is damaged.
        """
        with self._alone():
            self._expect(instead_of)
            return self._appoint("rollback", self._before(), reason, by, instead_of)

    def _before(self) -> str:
        """The champion before the present one."""
        line = []  # champions one can go back to, the present one last
        for entry in self.history():
            if entry.action == "promote":
                line.append(entry.to_version)
            else:
                while line and line[-1] != entry.to_version:
                    line.pop()
        if len(line) < 2:
            raise RegistryError(
                "no earlier champion to go back to", where=self.uri, todo="promote another model instead"
            )
        return line[-2]

    def history(self) -> Sequence[Promotion]:
        """Every promotion and rollback, the first one first."""
        return [self._entry(place) for place in self._history_places()]

    def compare(self, a: str, b: str) -> Comparison:
        """Two models side by side; each named as in `show`."""
        first, second = self.show(a), self.show(b)
        figures = [version.bundle.metrics or {} for version in (first, second)]
        recipes = [_flat(version.bundle.training.recipe) for version in (first, second)]
        return Comparison(
            a=first,
            b=second,
            metrics=[
                MetricDifference(k, figures[0].get(k), figures[1].get(k)) for k in sorted({*figures[0], *figures[1]})
            ],
            recipe={
                k: (recipes[0].get(k), recipes[1].get(k))
                for k in sorted({*recipes[0], *recipes[1]})
                if recipes[0].get(k) != recipes[1].get(k)
            },
            same_data=first.bundle.training.data_hash == second.bundle.training.data_hash,
        )

    def fetch(self, version: str, to: Path) -> Version:
        """Copy a model to a local folder, checked byte by byte; the folder appears whole or not at all.

        Args:
            version: As in `show`.
            to: The new folder; replaced if it exists.

        Raises:
            RegistryError: No such model.
            BundleError: The model is damaged.
        """
        found = self.show(version)
        _, files = read_files(self._place(found.id))
        write_files(to, files)
        return found

    def verify(self) -> int:
        """Read every byte of every model and the whole history, after a restore for instance.

        Returns:
            Number of models.

        Raises:
            BundleError: A model is damaged or incomplete.
            RegistryError: An entry of the history is damaged, or names a model that is not there.
        """
        ids = self._ids()
        for version in ids:
            read_files(self._place(version))
        for entry in self.history():
            if entry.to_version not in ids:
                raise RegistryError(
                    f"the history names {entry.to_version}", where=self.uri, expected="every model that was a champion",
                    todo="restore its folder under models/ from a backup",
                )  # fmt: skip
        return len(ids)

    def _place(self, version: str, *file: str) -> str:
        return storage.join(self.uri, "models", version, *file)

    def _history_places(self) -> Sequence[str]:
        folder = storage.join(self.uri, "history")
        return [storage.join(folder, name) for name in storage.list_folder(folder) if name.endswith(".json")]

    def _ids(self) -> Sequence[str]:
        versions = storage.list_folder(storage.join(self.uri, "models"))
        return [version for version in versions if storage.exists(self._place(version, DIGEST_NAME))]

    def _resolve(self, version: str, champion: str | None) -> str:
        if version == CHAMPION:
            if champion is None:
                raise RegistryError(
                    "no champion yet", where=self.uri, todo="promote a model with `dermaflow models promote`"
                )
            return champion
        ids = self._ids()
        if not ids:
            raise RegistryError("holds no model", where=self.uri, todo="train a model and add it, or check the address")
        found = [version] if version in ids else [i for i in ids if version and i.startswith(version)]
        if len(found) != 1:
            raise RegistryError(
                f"{'several models begin' if found else 'no model begins'} with {version!r}",
                where=self.uri,
                expected="one of " + " ".join(found or ids),
                todo="name it with more digits" if found else "see `dermaflow models list`",
            )
        return found[0]

    def _read(self, version: str, champion: str | None) -> Version:
        place = self._place(version)
        content, sha256 = read_description(place)
        bundle = parse_bundle(content, where=storage.join(place, BUNDLE_NAME))
        added = storage.info(self._place(version, DIGEST_NAME)).mtime
        return Version(version, sha256, added.astimezone(UTC), bundle, version == champion)

    def _alone(self) -> AbstractContextManager[None]:
        """Keep every other promotion of a local registry waiting until the block ends."""
        if storage.is_remote(self.uri) or not Path(self.uri).is_dir():
            return nullcontext()
        return locked(Path(self.uri, "promotion.lock"))

    def _expect(self, instead_of: str | None) -> str | None:
        """The champion's id; raises RegistryError where another was expected."""
        champion = self._champion_id()
        if instead_of not in (None, champion):
            raise RegistryError(
                f"the champion is {champion} by now", where=self.uri, expected=instead_of,
                todo="compare with the new champion: dermaflow models history, dermaflow models compare",
            )  # fmt: skip
        return champion

    def _appoint(
        self, action: Literal["promote", "rollback"], version: str, reason: str, by: str, instead_of: str | None
    ) -> Version:
        if not reason.strip() or not by.strip():
            raise RegistryError("reason or name is blank", todo="say why, and who decides: it goes into the history")
        read_files(self._place(version))  # a damaged model never becomes the champion
        champion = self._expect(instead_of)  # as late as can be: reading a large model takes a while
        now = datetime.now(UTC)
        entry = Promotion(action=action, at=now, by=by, reason=reason, from_version=champion, to_version=version)
        number = len(self._history_places()) + 1
        name = f"{number:04d}-{now:%Y%m%dT%H%M%S.%fZ}-{uuid.uuid4().hex[:8]}.json"  # no two writers share a name
        storage.write_bytes(storage.join(self.uri, "history", name), entry.model_dump_json(indent=2).encode())
        self._point_to_latest()
        log.info("%s: champion is now %s (%s)", self.uri, version, reason)
        return self._read(version, self._champion_id())

    def _point_to_latest(self) -> None:
        # Checked again after each write: of two writers at once, the last to write sees both entries and settles it.
        while (latest := self._latest()) != self._pointer():
            assert latest is not None  # an entry was just written
            storage.write_bytes(self._pointer_place, latest.model_dump_json(indent=2).encode())

    @property
    def _pointer_place(self) -> str:
        return storage.join(self.uri, "champion.json")

    def _pointer(self) -> Promotion | None:
        return self._entry(self._pointer_place) if storage.exists(self._pointer_place) else None

    def _latest(self) -> Promotion | None:
        places = self._history_places()
        return self._entry(places[-1]) if places else None

    def _champion_id(self) -> str | None:
        appointed = self._latest() or self._pointer()  # the pointer of a writer that was killed may be of yesterday
        return None if appointed is None else appointed.to_version

    def _entry(self, place: str) -> Promotion:
        try:
            return Promotion.model_validate_json(storage.read_bytes(place))
        except ValidationError as error:
            raise RegistryError(
                f"not an entry of the history ({error.errors()[0]['msg']})", where=place,
                todo="restore the file; `champion.json` may be deleted, it is rebuilt from the history",
            ) from error  # fmt: skip


def _flat(settings: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in settings.items():
        flat |= _flat(value, f"{prefix}{key}.") if isinstance(value, Mapping) else {f"{prefix}{key}": value}
    return flat
