"""Download HAM10000 from where its authors published it: Harvard Dataverse, doi:10.7910/DVN/DBW86T.

File ids, names and checksums are asked from the Dataverse API when the download starts, so none of them is written down
here. An interrupted download goes on where it stopped.

This was tested against a local server that speaks the same API, drops connections, ignores ranges and sends wrong
bytes; it was not run against Dataverse itself. API: https://guides.dataverse.org/en/latest/api/dataaccess.html
"""

from __future__ import annotations

import hashlib
import logging
import shutil
import stat
import time
import zipfile
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, TypeVar

import httpx

from dermaflow import __version__
from dermaflow.datasets.ham10000 import IMAGE_SUFFIXES
from dermaflow.errors import FetchError
from dermaflow.storage import folder_atomic

logger = logging.getLogger(__name__)

DATAVERSE = "https://dataverse.harvard.edu"
HAM10000_DOI = "doi:10.7910/DVN/DBW86T"
HAM10000_FILES = ("HAM10000_images_part_1", "HAM10000_images_part_2", "HAM10000_metadata")
"""Names of the published files, without their suffix."""

LICENCE = (
    "HAM10000 is licensed under CC BY-NC 4.0 (https://creativecommons.org/licenses/by-nc/4.0/): not for commercial "
    "use, and to be cited as: Tschandl, P., Rosendahl, C., Kittler, H. The HAM10000 dataset, a large collection of "
    "multi-source dermatoscopic images of common pigmented skin lesions. Sci Data 5, 180161 (2018). "
    "https://doi.org/10.1038/sdata.2018.161"
)

# Limits of an archive, far above HAM10000 (two of 5,000 JPEGs and 1.4 GB) and far below what fills a disk by surprise.
MAX_ENTRIES = 100_000
MAX_UNPACKED_BYTES = 32 << 30
MAX_RATIO = 20  # unpacked to packed bytes; images hardly shrink

LONGEST_WAIT = 60.0  # seconds between attempts

Progress = Callable[[str, int, int | None], None]
"""Called with the file name, the bytes that are there, and the bytes in all if known."""

T = TypeVar("T")


@dataclass(frozen=True)
class RemoteFile:
    """A file to download.

    Attributes:
        name: File name to store it under.
        url: Address.
        checksum: As published: algorithm and hex digest, for instance ``md5:9e107d9d372bb6826bd81d3542a419d6``.
    """

    name: str
    url: str
    checksum: str | None = None


class _TryAgain(Exception):
    """The server is busy or broken for now."""


def fetch(
    out: Path,
    *,
    sources: Sequence[RemoteFile] | None = None,
    base: str = DATAVERSE,
    progress: Progress | None = None,
    retries: int = 8,
    first_wait: float = 1.0,
) -> list[Path]:
    """Download HAM10000 into a folder that `read_ham10000` can read; files that are there already stay.

    An archive is unpacked into a folder of its name and kept, so that the next call can see that nothing is missing.

    Args:
        out: Folder, made if needed.
        sources: Files to download instead of those that `published_files` finds.
        base: Address of the Dataverse installation.
        progress: Called as bytes arrive.
        retries: Further attempts after the first, for each file.
        first_wait: Seconds before the second attempt; doubled for each further one.

    Returns:
        The files, and for an archive the folder with its images.

    Raises:
        FetchError: A file could not be had, does not have the published checksum, is an archive that is damaged or
            unsafe to unpack, or could not be written. What was received of an interrupted file is kept.
    """
    logger.info(LICENCE)
    results = []
    headers = {"User-Agent": f"dermaflow/{__version__}", "Accept-Encoding": "identity"}
    with httpx.Client(follow_redirects=True, timeout=30.0, headers=headers) as client:
        try:
            out.mkdir(parents=True, exist_ok=True)
            if sources is None:
                sources = _persist(lambda: published_files(client, base), base, retries, first_wait)
            for file in sources:
                path = out / _plain_name(file.name, file.url)
                fresh = _fetch_one(client, file, path, progress, retries, first_wait)
                if path.suffix == ".zip":
                    folder = path.with_suffix("")
                    if fresh or not folder.is_dir():
                        unpack(path, folder)
                    path = folder
                results.append(path)
        except OSError as error:
            raise FetchError(
                f"could not write: {error.strerror or error}", where=error.filename or out,
                expected="a writable disk with free space",
                todo="free space or choose another folder, then run the same command again; what was received is kept",
            ) from error  # fmt: skip
    return results


def published_files(
    client: httpx.Client, base: str = DATAVERSE, doi: str = HAM10000_DOI, names: Sequence[str] = HAM10000_FILES
) -> list[RemoteFile]:
    """Ask Dataverse where the files of a data set are and what their checksums are.

    Dataverse turns uploaded tables into its own .tab format but publishes the checksum of the upload, hence
    ``format=original``.

    Args:
        client: Where to ask from.
        base: Address of the Dataverse installation.
        doi: Persistent identifier of the data set.
        names: File names without suffix.

    Raises:
        FetchError: The answer is no file list, or a file is not on it.
    """
    where = f"{base}/api/datasets/:persistentId/?persistentId={doi}"
    response = client.get(where)
    _require_success(response)
    try:
        listed = [_read_entry(entry["dataFile"], base) for entry in response.json()["data"]["latestVersion"]["files"]]
    except (ValueError, LookupError, TypeError) as error:
        raise FetchError(
            f"the answer is no file list ({type(error).__name__}: {error})", where=where, expected="Dataverse's JSON",
            todo="open the address in a browser; if it has moved, download the files by hand",
        ) from error  # fmt: skip
    by_stem = {Path(file.name).stem: file for file in listed}
    if missing := [name for name in names if name not in by_stem]:
        raise FetchError(
            f"not in the published file list: {', '.join(missing)}; listed {', '.join(file.name for file in listed)}",
            where=where, expected=", ".join(names), todo="download the files by hand and unpack them into one folder",
        )  # fmt: skip
    return [by_stem[name] for name in names]


def unpack(archive: Path, folder: Path) -> None:
    """Unpack the images of a zip archive into a folder that appears only when it is whole.

    Args:
        archive: Zip file. Entries that are no images are passed over.
        folder: Replaced if it is there.

    Raises:
        FetchError: The archive is damaged, holds a path that leads out of the folder or a link, or is far larger
            unpacked than images are.
    """
    try:
        with zipfile.ZipFile(archive) as content:
            entries = _safe_entries(content, archive)
            with folder_atomic(folder) as target:
                for entry in entries:
                    path = target / entry.filename
                    path.parent.mkdir(parents=True, exist_ok=True)
                    with content.open(entry) as source, path.open("wb") as sink:
                        shutil.copyfileobj(source, sink, 1 << 20)
    except (zipfile.BadZipFile, zlib.error, EOFError, NotImplementedError, RuntimeError) as error:
        raise FetchError(
            f"damaged or unreadable archive: {error}", where=archive, expected="a zip file",
            todo="delete it and run the same command again",
        ) from error  # fmt: skip
    logger.info("unpacked %d images into %s", len(entries), folder)


def _safe_entries(content: zipfile.ZipFile, archive: Path) -> list[zipfile.ZipInfo]:
    """The images of an archive, once nothing in it is found unsafe."""
    entries = content.infolist()
    unpacked = sum(entry.file_size for entry in entries)
    packed = archive.stat().st_size  # of the file itself: entries may overlap to look smaller than they unpack to
    for entry in entries:
        path = PurePosixPath(entry.filename)
        if path.is_absolute() or ".." in path.parts or "\\" in entry.filename or ":" in entry.filename:
            raise _unsafe(archive, f"the path {entry.filename!r} leads out of the folder")
        if stat.S_ISLNK(entry.external_attr >> 16):
            raise _unsafe(archive, f"{entry.filename!r} is a link")
    if len(entries) > MAX_ENTRIES:
        raise _unsafe(archive, f"{len(entries)} entries, the limit is {MAX_ENTRIES}")
    if unpacked > MAX_UNPACKED_BYTES or unpacked > MAX_RATIO * packed:
        limit = f"the limit is {MAX_RATIO} times and {MAX_UNPACKED_BYTES} bytes"
        raise _unsafe(archive, f"{packed} bytes unpack to {unpacked}, {limit}")
    images = [
        entry for entry in entries
        if not entry.is_dir() and PurePosixPath(entry.filename).suffix.lower() in IMAGE_SUFFIXES
    ]  # fmt: skip
    if passed_over := sum(not entry.is_dir() for entry in entries) - len(images):
        logger.info("%s: %d entries are no images and were passed over", archive.name, passed_over)
    return images


def _unsafe(archive: Path, what: str) -> FetchError:
    return FetchError(
        what, where=archive, expected="an archive of images as published",
        todo="do not unpack it; delete it and download it from the publisher",
    )  # fmt: skip


def _read_entry(file: dict[str, Any], base: str) -> RemoteFile:
    """A file as Dataverse's API describes it."""
    checksum = file.get("checksum") or {"type": "MD5", "value": file["md5"]}
    return RemoteFile(
        name=file.get("originalFileName") or file["filename"],
        url=f"{base}/api/access/datafile/{file['id']}?format=original",
        checksum=f"{checksum['type'].replace('-', '').lower()}:{checksum['value']}",
    )


def _plain_name(name: str, url: str) -> str:
    if name != Path(name).name or name.startswith(".") or "\\" in name:
        raise FetchError(
            f"unsafe file name {name!r}", where=url, expected="a name without folders", todo="do not use it"
        )
    return name


def _fetch_one(
    client: httpx.Client, file: RemoteFile, path: Path, progress: Progress | None, retries: int, first_wait: float
) -> bool:
    """Make sure that a file is there; returns whether it was downloaded now."""
    if path.exists():
        if _wrong_checksum(file, path) is None:
            logger.info("%s is there already", path)
            return False
        logger.warning("%s does not have the published checksum and is downloaded again", path)
    partial = path.with_name(path.name + ".partial")
    _persist(lambda: _receive(client, file, partial, progress), file.url, retries, first_wait)
    if wrong := _wrong_checksum(file, partial):
        partial.unlink()
        raise FetchError(
            f"{file.name} has the wrong checksum {wrong}", where=file.url, expected=file.checksum,
            todo="run the same command again; if that fails, the published file has changed or is altered on its way",
        )  # fmt: skip
    partial.replace(path)
    return True


def _receive(client: httpx.Client, file: RemoteFile, partial: Path, progress: Progress | None) -> None:
    """Receive what is missing of a file; whatever arrives is kept in `partial`."""
    have = partial.stat().st_size if partial.exists() else 0
    with client.stream("GET", file.url, headers={"Range": f"bytes={have}-"} if have else {}) as response:
        if response.status_code == httpx.codes.REQUESTED_RANGE_NOT_SATISFIABLE:  # nothing is missing
            return
        _require_success(response)
        resumed = response.headers.get("Content-Range", "").startswith(f"bytes {have}-")
        if have and not resumed:
            logger.warning("%s: the server cannot resume; starting again from zero", file.name)
            have = 0
        length = response.headers.get("Content-Length", "")
        total = have + int(length) if length.isdigit() else None
        with partial.open("ab" if have else "wb") as stream:
            for piece in response.iter_raw():
                stream.write(piece)
                have += len(piece)
                if progress:
                    progress(file.name, have, total)


def _require_success(response: httpx.Response) -> None:
    """Raise for an error status, in a way that says whether another attempt makes sense."""
    status = f"the server answered {response.status_code} {response.reason_phrase}"
    if response.status_code in (408, 429) or response.status_code >= 500:
        raise _TryAgain(status)
    if not response.is_success:
        raise FetchError(
            status,
            where=response.url,
            expected="the file",
            todo="open the address in a browser to see whether it has moved",
        )


def _persist(action: Callable[[], T], where: str, retries: int, first_wait: float) -> T:
    """Repeat an action while the connection or the server fails, waiting twice as long each time."""
    for attempt in range(retries + 1):
        try:
            return action()
        except (httpx.RequestError, _TryAgain) as error:
            if attempt == retries:
                raise FetchError(
                    f"gave up after {attempt + 1} attempts: {error or type(error).__name__}", where=where,
                    expected="a connection to the server", todo="run the same command again; what was received is kept",
                ) from error  # fmt: skip
            wait = min(first_wait * 2**attempt, LONGEST_WAIT)
            logger.warning("%s: %s; attempt %d of %d in %.0f s", where, error, attempt + 2, retries + 1, wait)
            time.sleep(wait)
    raise AssertionError("unreachable")


def _wrong_checksum(file: RemoteFile, path: Path) -> str | None:
    """The checksum found, if it is not the published one; None if all is well or nothing was published."""
    if not file.checksum:
        logger.warning("%s: no checksum is published, so its content is not verified", file.name)
        return None
    algorithm = file.checksum.partition(":")[0]
    with path.open("rb") as stream:
        found = f"{algorithm}:{hashlib.file_digest(stream, algorithm).hexdigest()}"
    return None if found == file.checksum.lower() else found
