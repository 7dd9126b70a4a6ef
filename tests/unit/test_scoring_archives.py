"""Members of zip and tar: all of them, none twice, the bad ones with a reason, and never more than was declared."""

from __future__ import annotations

import gzip
import io
import tarfile
import tracemalloc
import zipfile
from itertools import islice
from pathlib import Path

import pytest
from small_archives import hostile_tar, hostile_zip, jpeg

from dermaflow.errors import DataError
from dermaflow.scoring.archives import list_tar, list_zip, read_tar_member, read_zip_member, unpack
from dermaflow.scoring.files import RandomFile
from dermaflow.scoring.references import LIMITS, BadMember, Limits, Reference


def listed(path: Path, limits: Limits = LIMITS) -> list[Reference]:
    with RandomFile(str(path)) as file:
        return list((list_zip if path.suffix == ".zip" else list_tar)(file, limits))


def reasons(references: list[Reference]) -> dict[str, str | None]:
    return {str(r.member): None if r.problem is None else r.problem.partition(":")[0] for r in references}


def contents(path: Path) -> dict[str, bytes | str]:
    """What each readable member holds, or the code of why it cannot be read."""
    found: dict[str, bytes | str] = {}
    with RandomFile(str(path)) as file:
        for reference in (list_zip if path.suffix == ".zip" else list_tar)(file, LIMITS):
            if reference.problem is None:
                try:
                    read = read_zip_member if path.suffix == ".zip" else read_tar_member
                    found[str(reference.member)] = read(file, reference)
                except BadMember as error:
                    found[str(reference.member)] = error.reason
    return found


AT_LISTING = ("empty", "compression_ratio", "nested_archive", "unsafe_path", "link", "encrypted", "not_a_file")


def test_every_member_of_a_hostile_zip_is_listed_once_with_its_reason(tmp_path: Path) -> None:
    said = hostile_zip(tmp_path / "a.zip")
    found = listed(tmp_path / "a.zip")
    assert [r.member for r in found] == list(said)
    assert reasons(found) == {name: reason if reason in AT_LISTING else None for name, reason in said.items()}
    read = contents(tmp_path / "a.zip")
    assert read["good/a.jpg"] == jpeg(1)
    assert (read["liar.jpg"], read["crc.jpg"]) == ("damaged", "damaged")


def test_every_member_of_a_hostile_tar_is_listed_once_with_its_reason(tmp_path: Path) -> None:
    said = hostile_tar(tmp_path / "a.tar")
    found = listed(tmp_path / "a.tar")
    assert reasons(found) == {name: reason if reason in AT_LISTING else None for name, reason in said.items()}
    assert contents(tmp_path / "a.tar") == {"good/a.jpg": jpeg(1), "text.jpg": b"no image", "good/b.jpg": jpeg(3)}


@pytest.mark.parametrize("method", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA])
@pytest.mark.parametrize("before", [b"", b"\xff\xd8\xff\xe0 a picture before the archive" * 9])
def test_members_read_as_the_standard_library_reads_them(tmp_path: Path, method: int, before: bytes) -> None:
    path = tmp_path / "a.zip"
    with zipfile.ZipFile(path, "w", method) as archive:
        archive.mkdir("folder")
        for i in range(20):
            archive.writestr(f"folder/ä{i}.jpg", jpeg(i) * (i + 1))
    path.write_bytes(before + path.read_bytes() if before else path.read_bytes())
    with zipfile.ZipFile(path) as archive:
        assert contents(path) == {n: archive.read(n) for n in archive.namelist() if not n.endswith("/")}


def test_zip64_and_written_as_a_stream(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Pipe(io.RawIOBase):
        """Not seekable, so sizes stand behind the data."""

        def __init__(self, path: Path) -> None:
            self._file = path.open("wb")

        def writable(self) -> bool:
            return True

        def write(self, data: bytes) -> int:  # type: ignore[override]
            return self._file.write(data)

        def close(self) -> None:
            self._file.close()

    path, pipe = tmp_path / "a.zip", Pipe(tmp_path / "a.zip")
    with zipfile.ZipFile(pipe, "w", zipfile.ZIP_DEFLATED) as archive, archive.open("a.jpg", "w", force_zip64=True) as f:
        f.write(jpeg(1))
    pipe.close()
    assert contents(path) == {"a.jpg": jpeg(1)}
    many = tmp_path / "many.zip"
    with zipfile.ZipFile(many, "w") as archive:
        monkeypatch.setattr(zipfile, "ZIP_FILECOUNT_LIMIT", 100)  # as if they were more than fit into 16 bits
        for i in range(6000):
            archive.writestr(zipfile.ZipInfo(f"{i}.jpg"), b"x")
    with RandomFile(str(many)) as file:
        references = list_zip(file, LIMITS)
        first = next(references)
        tracemalloc.start()
        assert sum(1 for _ in islice(references, 5900)) == 5900
        assert tracemalloc.get_traced_memory()[1] < 3 << 19, "the directory is a stream"
        tracemalloc.stop()
        *_, last = references
    assert (first.member, last.member) == ("0.jpg", "5999.jpg")


def test_an_archive_that_is_none_or_cut_short_is_an_error(tmp_path: Path) -> None:
    hostile_zip(tmp_path / "a.zip")
    for name, content in {
        "empty.zip": b"", "text.zip": b"text" * 100, "half.zip": (tmp_path / "a.zip").read_bytes()[:3000],
        "empty.tar": b"", "text.tar": b"text" * 1000,
    }.items():  # fmt: skip
        (tmp_path / name).write_bytes(content)
        with pytest.raises(DataError, match=name):
            listed(tmp_path / name)


def test_damage_in_the_middle_is_one_row_for_the_rest(tmp_path: Path) -> None:
    hostile_tar(tmp_path / "whole.tar")
    whole = (tmp_path / "whole.tar").read_bytes()
    first = 512 + (len(jpeg(1)) + 511) // 512 * 512
    broken = bytearray(whole)
    broken[first : first + 512] = b"\x55" * 512
    for name, content, expected in (
        ("header.tar", bytes(broken), {"good/a.jpg": None, "(everything after entry 1)": "damaged"}),
        ("data.tar", whole[:700], {"good/a.jpg": "truncated"}),
        (
            "end.tar",
            whole[: first + 512],
            {"good/a.jpg": None, "zero.jpg": "empty", "(everything after entry 2)": "damaged"},
        ),
    ):
        (tmp_path / name).write_bytes(content)
        assert reasons(listed(tmp_path / name)) == expected, name
    hostile_zip(tmp_path / "a.zip")
    data = bytearray((tmp_path / "a.zip").read_bytes())
    at = data.rfind(b"text.jpg") - 46
    data[at : at + 4] = b"XXXX"
    (tmp_path / "a.zip").write_bytes(data)
    found = listed(tmp_path / "a.zip")
    assert len(found) == 4 and str(found[-1].problem).startswith("damaged: the directory ends after 3 of 16")


def test_limits(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive, tarfile.open(tmp_path / "a.tar", "w") as tar:
        for i in range(5):
            archive.writestr(f"{i}.jpg", jpeg(i))
            info = tarfile.TarInfo(f"{i}.jpg")
            info.size = len(jpeg(i))
            tar.addfile(info, io.BytesIO(jpeg(i)))
    for name in ("a.zip", "a.tar"):
        many = reasons(listed(tmp_path / name, Limits(members=3)))
        assert list(many.values()) == [None, None, None, "too_many_members"]
        total = reasons(listed(tmp_path / name, Limits(total_bytes=len(jpeg(0)) + len(jpeg(1)) + 10)))
        assert list(total.values()) == [None, None, "total_bytes", "total_bytes", "total_bytes"]
        large = reasons(listed(tmp_path / name, Limits(image_bytes=100)))
        assert set(large.values()) == {"too_many_bytes"}


def test_a_header_of_a_tar_that_would_fill_the_memory(tmp_path: Path) -> None:
    info = tarfile.TarInfo("pax")
    info.type, info.size = tarfile.XHDTYPE, 2 << 20
    (tmp_path / "a.tar").write_bytes(
        _plain("a.jpg", jpeg(1)) + info.tobuf(tarfile.GNU_FORMAT) + bytes(2 << 20) + bytes(1024)
    )
    assert list(reasons(listed(tmp_path / "a.tar")).values()) == [None, "damaged"]


def _plain(name: str, data: bytes) -> bytes:
    info = tarfile.TarInfo(name)
    info.size = len(data)
    return info.tobuf(tarfile.GNU_FORMAT) + data + bytes(-len(data) % 512)


def test_packed_tars_are_unpacked_to_the_same_and_bombs_are_cut(tmp_path: Path) -> None:
    said = hostile_tar(tmp_path / "a.tar")
    plain = (tmp_path / "a.tar").read_bytes()
    (tmp_path / "a.tar.gz").write_bytes(gzip.compress(plain[:9000]) + gzip.compress(plain[9000:]))
    unpack(str(tmp_path / "a.tar.gz"), str(tmp_path / "gz.tar"), LIMITS)
    assert (tmp_path / "gz.tar").read_bytes() == plain
    (tmp_path / "cut.tar.gz").write_bytes(gzip.compress(plain)[:-2000])
    unpack(str(tmp_path / "cut.tar.gz"), str(tmp_path / "cut.tar"), LIMITS)
    cut = reasons(listed(tmp_path / "cut.tar"))
    assert 0 < len(cut) < len(said) + 1 and list(cut.values())[-1] in ("damaged", "truncated")
    bomb = _plain("good.jpg", jpeg(1)) + _plain("zeros.jpg", bytes(40 << 20))
    (tmp_path / "bomb.tar.gz").write_bytes(gzip.compress(bomb))
    unpack(str(tmp_path / "bomb.tar.gz"), str(tmp_path / "bomb.tar"), LIMITS)
    assert (tmp_path / "bomb.tar").stat().st_size < 200 * (tmp_path / "bomb.tar.gz").stat().st_size + 1
    assert reasons(listed(tmp_path / "bomb.tar")) == {"good.jpg": None, "zeros.jpg": "truncated"}
    (tmp_path / "no.tar.gz").write_bytes(b"not packed")
    with pytest.raises(DataError, match="not packed with gzip"):
        unpack(str(tmp_path / "no.tar.gz"), str(tmp_path / "no.tar"), LIMITS)
    assert not (tmp_path / "no.tar").exists()


def test_zstd(tmp_path: Path) -> None:
    import pyarrow as pa

    hostile_tar(tmp_path / "a.tar")
    plain = (tmp_path / "a.tar").read_bytes()
    with pa.output_stream(tmp_path / "a.tar.zst", compression="zstd") as stream:
        stream.write(plain)
    unpack(str(tmp_path / "a.tar.zst"), str(tmp_path / "zst.tar"), LIMITS)
    assert (tmp_path / "zst.tar").read_bytes() == plain
