"""Downloading from a real HTTP server on loopback that behaves as badly as the internet does."""

from __future__ import annotations

import hashlib
import io
import json
import random
import stat
import threading
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from PIL import Image

from dermaflow.datasets.fetch import HAM10000_DOI, HAM10000_FILES, LICENCE, RemoteFile, fetch, unpack
from dermaflow.datasets.ham10000 import read_ham10000
from dermaflow.errors import FetchError

CONTENT = random.Random(0).randbytes(1_000_000)
MD5 = "md5:" + hashlib.md5(CONTENT).hexdigest()


@dataclass
class Site:
    """What the server serves, how it misbehaves, and what it was asked."""

    files: dict[str, bytes] = field(default_factory=dict)
    redirects: dict[str, str] = field(default_factory=dict)
    ranges: bool = True
    drops: int = 0  # the next so many downloads end after half of what is asked
    refusals: list[int] = field(default_factory=list)  # statuses of the next answers
    asked: list[tuple[str, str | None]] = field(default_factory=list)  # path and Range
    address: str = ""

    def file(self, name: str = "data.bin", checksum: str | None = MD5) -> RemoteFile:
        return RemoteFile(name, f"{self.address}/{name}", checksum)


class Handler(BaseHTTPRequestHandler):
    site: Site

    def do_GET(self) -> None:
        wanted = self.headers.get("Range")
        self.site.asked.append((self.path, wanted))
        if self.site.refusals:
            self.send_error(self.site.refusals.pop(0))
        elif self.path in self.site.redirects:
            self.send_response(303)
            self.send_header("Location", self.site.redirects[self.path])
            self.end_headers()
        elif self.path in self.site.files:
            self.send_file(self.site.files[self.path], wanted)
        else:
            self.send_error(404)

    def send_file(self, body: bytes, wanted: str | None) -> None:
        start = int(wanted.removeprefix("bytes=").rstrip("-")) if wanted and self.site.ranges else 0
        if start and start >= len(body):
            self.send_error(416)
            return
        self.send_response(206 if start else 200)
        if start:
            self.send_header("Content-Range", f"bytes {start}-{len(body) - 1}/{len(body)}")
        rest = body[start:]
        self.send_header("Content-Length", str(len(rest)))
        self.end_headers()
        if self.site.drops:
            self.site.drops -= 1
            rest = rest[: len(rest) // 2]  # the connection closes when this method returns
        self.wfile.write(rest)

    def log_message(self, *_: object) -> None:
        """Requests are in `Site.asked`."""


@pytest.fixture
def site() -> Iterator[Site]:
    site = Site()
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("SiteHandler", (Handler,), {"site": site}))
    site.address = f"http://127.0.0.1:{server.server_port}"
    site.files["/data.bin"] = CONTENT
    threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
    yield site
    server.shutdown()
    server.server_close()


def zipped(**entries: bytes) -> bytes:
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w") as archive:
        for name, body in entries.items():
            archive.writestr(name, body)
    return stream.getvalue()


def jpeg(shade: int) -> bytes:
    stream = io.BytesIO()
    Image.new("RGB", (16, 12), (shade, 100, 80)).save(stream, "JPEG")
    return stream.getvalue()


@pytest.fixture
def dataverse(site: Site) -> Site:
    """The Dataverse API of a HAM10000 of two images; like Dataverse, it redirects to where the bytes lie."""
    table = "lesion_id,image_id,dx,dx_type,age,sex,localization,dataset\n"
    table += "HAM_1,one,nv,histo,50,male,back,rosendahl\nHAM_2,two,mel,histo,60,female,face,rosendahl\n"
    uploads = {
        "HAM10000_images_part_1.zip": zipped(**{"one.jpg": jpeg(10), "README.txt": b"hello"}),
        "HAM10000_images_part_2.zip": zipped(**{"two.jpg": jpeg(20)}),
        "HAM10000_metadata.csv": table.encode(),
    }
    entries = []
    for number, (name, body) in enumerate(uploads.items(), start=77):
        entry = {"id": number, "filename": name, "filesize": len(body), "md5": hashlib.md5(body).hexdigest()}
        if name.endswith(".csv"):  # ingested as a table: another name and size, the checksum of the upload
            entry |= {"filename": "HAM10000_metadata.tab", "filesize": 1, "originalFileName": name}
        entry["checksum"] = {"type": "MD5", "value": entry["md5"]}
        entries.append({"label": entry["filename"], "dataFile": entry})
        site.redirects[f"/api/access/datafile/{number}?format=original"] = f"/store/{number}"
        site.files[f"/store/{number}"] = body
    site.files[f"/api/datasets/:persistentId/?persistentId={HAM10000_DOI}"] = json.dumps(
        {"status": "OK", "data": {"latestVersion": {"files": entries}}}
    ).encode()
    return site


def quick(out: Path, *files: RemoteFile, retries: int = 8) -> list[Path]:
    return fetch(out, sources=files, retries=retries, first_wait=0.001)


# --- the whole data set --------------------------------------------------------------------------------------------


def test_fetched_data_set_can_be_read(dataverse: Site, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    dataverse.drops = 2
    with caplog.at_level("INFO"):
        paths = fetch(tmp_path / "ham", base=dataverse.address, first_wait=0.001)
    assert [path.name for path in paths] == [
        "HAM10000_images_part_1",
        "HAM10000_images_part_2",
        "HAM10000_metadata.csv",
    ]
    images = read_ham10000(tmp_path / "ham").images
    assert images[["image_id", "dx"]].to_numpy().tolist() == [["one", "nv"], ["two", "mel"]]
    assert (tmp_path / "ham" / "HAM10000_images_part_1" / "one.jpg").read_bytes() == jpeg(10)
    assert not list((tmp_path / "ham").rglob("README.txt"))
    assert LICENCE in caplog.text
    assert "CC BY-NC 4.0" in LICENCE
    assert len(HAM10000_FILES) == len(paths)


def test_second_fetch_downloads_nothing(dataverse: Site, tmp_path: Path) -> None:
    first = fetch(tmp_path, base=dataverse.address)
    dataverse.asked.clear()
    assert fetch(tmp_path, base=dataverse.address) == first
    assert [path for path, _ in dataverse.asked] == [f"/api/datasets/:persistentId/?persistentId={HAM10000_DOI}"]


def test_missing_image_folder_is_unpacked_again(dataverse: Site, tmp_path: Path) -> None:
    folder = fetch(tmp_path, base=dataverse.address)[0]
    (folder / "one.jpg").unlink()
    folder.rmdir()
    fetch(tmp_path, base=dataverse.address)
    assert (folder / "one.jpg").exists()


def test_file_list_without_a_needed_file(dataverse: Site, tmp_path: Path) -> None:
    address = f"/api/datasets/:persistentId/?persistentId={HAM10000_DOI}"
    dataverse.files[address] = dataverse.files[address].replace(b"images_part_2", b"pictures")
    with pytest.raises(
        FetchError, match=r"not in the published file list: HAM10000_images_part_2; listed HAM10000_images"
    ):
        fetch(tmp_path, base=dataverse.address)


@pytest.mark.parametrize("answer", [b"<html>maintenance</html>", b'{"status": "OK"}', b"[]"])
def test_answer_that_is_no_file_list(dataverse: Site, tmp_path: Path, answer: bytes) -> None:
    dataverse.files[f"/api/datasets/:persistentId/?persistentId={HAM10000_DOI}"] = answer
    with pytest.raises(FetchError, match="the answer is no file list"):
        fetch(tmp_path, base=dataverse.address)


# --- a bad connection ----------------------------------------------------------------------------------------------


def test_dropped_connections_are_resumed(site: Site, tmp_path: Path) -> None:
    site.drops = 3
    reports: list[tuple[str, int, int | None]] = []
    fetch(tmp_path, sources=[site.file()], first_wait=0.001, progress=lambda *report: reports.append(report))
    assert (tmp_path / "data.bin").read_bytes() == CONTENT
    assert [wanted for _, wanted in site.asked] == [None, "bytes=500000-", "bytes=750000-", "bytes=875000-"]
    assert reports[-1] == ("data.bin", 1_000_000, 1_000_000)
    assert all(total == 1_000_000 for _, _, total in reports)
    done = [have for _, have, _ in reports]
    assert done == sorted(done)
    assert [path.name for path in tmp_path.iterdir()] == ["data.bin"]


def test_server_without_ranges_starts_from_zero(site: Site, tmp_path: Path) -> None:
    site.ranges = False
    site.drops = 2
    quick(tmp_path, site.file())
    assert (tmp_path / "data.bin").read_bytes() == CONTENT
    assert [wanted for _, wanted in site.asked] == [None, "bytes=500000-", "bytes=500000-"]


@pytest.mark.parametrize("have", [1, 999_999, 1_000_000])
def test_partial_file_of_an_earlier_run(site: Site, tmp_path: Path, have: int) -> None:
    (tmp_path / "data.bin.partial").write_bytes(CONTENT[:have])
    quick(tmp_path, site.file())
    assert (tmp_path / "data.bin").read_bytes() == CONTENT
    assert site.asked == [("/data.bin", f"bytes={have}-")]


def test_giving_up_keeps_what_was_received(site: Site, tmp_path: Path) -> None:
    site.drops = 3
    with pytest.raises(FetchError, match=r"gave up after 3 attempts.*what was received is kept"):
        quick(tmp_path, site.file(), retries=2)
    assert (tmp_path / "data.bin.partial").read_bytes() == CONTENT[:875_000]
    assert not (tmp_path / "data.bin").exists()


def test_busy_server_is_asked_again(site: Site, tmp_path: Path) -> None:
    site.refusals = [503, 429, 500]
    quick(tmp_path, site.file())
    assert (tmp_path / "data.bin").read_bytes() == CONTENT
    assert len(site.asked) == 4


def test_missing_file_is_asked_for_once(site: Site, tmp_path: Path) -> None:
    with pytest.raises(FetchError, match=r"gone\.bin: the server answered 404 Not Found; expected the file"):
        quick(tmp_path, site.file("gone.bin"))
    assert len(site.asked) == 1


def test_nobody_listens(site: Site, tmp_path: Path) -> None:
    with pytest.raises(FetchError, match="gave up after 2 attempts"):
        quick(tmp_path, RemoteFile("data.bin", "http://127.0.0.1:1/data.bin"), retries=1)


# --- wrong content -------------------------------------------------------------------------------------------------


def test_wrong_bytes(site: Site, tmp_path: Path) -> None:
    site.files["/data.bin"] = CONTENT[:-1] + bytes([CONTENT[-1] ^ 1])
    with pytest.raises(FetchError, match=rf"data\.bin has the wrong checksum md5:[0-9a-f]+; expected {MD5}"):
        quick(tmp_path, site.file())
    assert list(tmp_path.iterdir()) == []


def test_sha256(site: Site, tmp_path: Path) -> None:
    quick(tmp_path, site.file(checksum="sha256:" + hashlib.sha256(CONTENT).hexdigest()))
    with pytest.raises(FetchError, match="wrong checksum sha256:"):
        quick(tmp_path / "other", site.file(checksum="sha256:" + "0" * 64))


def test_changed_file_is_downloaded_again(site: Site, tmp_path: Path) -> None:
    (tmp_path / "data.bin").write_bytes(b"something else")
    quick(tmp_path, site.file())
    assert (tmp_path / "data.bin").read_bytes() == CONTENT


def test_no_published_checksum_is_said(site: Site, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    quick(tmp_path, site.file(checksum=None))
    assert "not verified" in caplog.text


@pytest.mark.parametrize("name", ["../evil", "/tmp/evil", ".hidden", "..\\evil"])
def test_unsafe_file_name(site: Site, tmp_path: Path, name: str) -> None:
    with pytest.raises(FetchError, match="unsafe file name"):
        quick(tmp_path / "out", RemoteFile(name, f"{site.address}/data.bin"))
    assert site.asked == []


def test_folder_that_cannot_be_made(site: Site, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(FetchError, match=r"could not write: .*expected a writable disk"):
        quick(tmp_path / "file", site.file())


# --- malicious archives --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["../evil.jpg", "/evil.jpg", "a/../../evil.jpg", "C:evil.jpg", "..\\evil.jpg"])
def test_archive_that_leads_out(site: Site, tmp_path: Path, name: str) -> None:
    body = zipped(**{"good.jpg": jpeg(1), name: jpeg(2)})
    site.files["/parts.zip"] = body
    file = site.file("parts.zip", "md5:" + hashlib.md5(body).hexdigest())
    with pytest.raises(FetchError, match="leads out of the folder"):
        quick(tmp_path / "in" / "out", file)
    assert [path.name for path in tmp_path.rglob("*") if path.is_file()] == ["parts.zip"]


def test_archive_with_a_link(tmp_path: Path) -> None:
    link = zipfile.ZipInfo("link.jpg")
    link.create_system = 3
    link.external_attr = (stat.S_IFLNK | 0o777) << 16
    with zipfile.ZipFile(tmp_path / "links.zip", "w") as archive:
        archive.writestr(link, "/etc/passwd")
    with pytest.raises(FetchError, match=r"'link\.jpg' is a link"):
        unpack(tmp_path / "links.zip", tmp_path / "links")
    assert not (tmp_path / "links").exists()


def test_archive_that_swells(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "bomb.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("zeros.jpg", bytes(5_000_000))
    with pytest.raises(FetchError, match=r"bytes unpack to 5000000, the limit is 20 times"):
        unpack(tmp_path / "bomb.zip", tmp_path / "bomb")


@pytest.mark.parametrize("damage", ["not_a_zip", "flipped_byte"])
def test_damaged_archive(tmp_path: Path, damage: str) -> None:
    body = bytearray(zipped(**{"one.jpg": jpeg(1)}))
    body[100] ^= 255
    (tmp_path / "a.zip").write_bytes(bytes(body) if damage == "flipped_byte" else b"<html>")
    with pytest.raises(FetchError, match=r"a\.zip: damaged or unreadable archive: .*Delete it"):
        unpack(tmp_path / "a.zip", tmp_path / "a")
    assert [path.name for path in tmp_path.iterdir()] == ["a.zip"]
