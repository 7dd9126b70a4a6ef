"""Errors that say what was wrong, where, what was expected and what to do next."""

from __future__ import annotations


class DermaflowError(Exception):
    """Base of every error a user can cause and cure.

    Args:
        what: What was found, with the value.
        where: File, field or address.
        expected: What would have been right.
        todo: The next step for the user.
    """

    def __init__(
        self, what: str, *, where: object = None, expected: str | None = None, todo: str | None = None
    ) -> None:
        self.what, self.where, self.expected, self.todo = what, where, expected, todo
        text = f"{where}: {what}" if where is not None else what
        if expected:
            text += f"; expected {expected}"
        if todo:
            text += f". {todo[0].upper()}{todo[1:]}" + ("" if todo.endswith("?") else ".")
        super().__init__(text)

    def __reduce__(self) -> tuple[object, ...]:  # keyword arguments survive the way back from a Ray worker
        return _rebuild, (type(self), self.what, self.where, self.expected, self.todo)


def _rebuild(
    cls: type[DermaflowError], what: str, where: object, expected: str | None, todo: str | None
) -> DermaflowError:
    return cls(what, where=where, expected=expected, todo=todo)


class SettingError(DermaflowError):
    """An environment variable ``DERMAFLOW_*`` has an impossible value."""


class DataError(DermaflowError):
    """A data set, its metadata or one of its images is not as published."""


class ShardError(DermaflowError):
    """A shard folder is incomplete, changed or could not be written."""


class RecipeError(DermaflowError):
    """A recipe holds an unknown key or an impossible value."""


class CheckpointError(DermaflowError):
    """A checkpoint does not belong to the run that wants to resume from it."""


class BundleError(DermaflowError):
    """A model bundle is incomplete or was changed after it was written."""


class FederationError(DermaflowError):
    """A federated run cannot be started or cannot go on."""


class RegistryError(DermaflowError):
    """The model registry does not hold what was asked for."""


class KnowledgeError(DermaflowError):
    """A rule, option, text or utility of the pathway knowledge base is wrong, or a condition does not make sense."""


class StorageError(DermaflowError):
    """A path or address could not be read or written."""


class FetchError(DermaflowError):
    """A download failed or does not have the published checksum."""


class SignOffError(DermaflowError):
    """A sign-off is incomplete, or the log of sign-offs was tampered with."""
