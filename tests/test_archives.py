"""Archives give the bytes of their files where they lie, and say what of them is damaged or lost."""

import io
import tarfile
import warnings
import zipfile

import pytest
from test_datasets import PNG, noise, png, write_tar, write_zip

from minidino.images.datasets import check_images, open_images


def test_names_that_climb_out_are_only_names(tmp_path):
    images = open_images(write_tar(tmp_path / "x.tar", {"../../up.png": PNG, "/abs.png": PNG}), tmp_path / "cache")
    assert images.files == ["../../up.png", "/abs.png"] and images.image(0).size == (8, 6)
    assert not (tmp_path.parent.parent / "up.png").exists()


def test_damage_inside_archives_is_reported(tmp_path):
    whole = write_zip(tmp_path / "x.zip", {"1.png": PNG, "2.png": PNG}).read_bytes()
    at = whole.index(PNG) + 40
    (tmp_path / "x.zip").write_bytes(whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :])
    (row,) = check_images(open_images(tmp_path / "x.zip", tmp_path / "c"), progress=False)["quarantined"]
    assert row["file"] == "1.png" and "checksum" in row["reason"]
    for name, mode in (("cut.tar", "w"), ("cut.tar.gz", "w:gz")):
        members = {f"{i}.png": png(noise(60, 60, i)) for i in range(4)}
        data = write_tar(tmp_path / name, members, mode).read_bytes()
        (tmp_path / name).write_bytes(data[: len(data) // 2])
        checked = check_images(open_images(tmp_path / name, tmp_path / "c"), progress=False)
        assert checked["decoded"] >= 1 and checked["quarantined"], name
    shard = write_tar(tmp_path / "s.tar", {"a.png": PNG, "a.cls": b"7" * 900})
    shard.write_bytes(shard.read_bytes()[:2048])  # cut inside the label
    assert check_images(open_images(shard, tmp_path / "c"), progress=False)["decoded"] == 1
    (tmp_path / "bad.zip").write_bytes(whole[:50])
    with pytest.raises(ValueError, match="cannot be opened: not a readable archive"):
        open_images(tmp_path / "bad.zip", tmp_path / "c")
    (tmp_path / "one.png").write_bytes(PNG)
    with pytest.raises(ValueError, match="cannot be opened: expected a folder, a zip or tar archive, or a manifest.csv"):
        open_images(tmp_path / "one.png", tmp_path / "c")


def flipped(data: bytes, at: int) -> bytes:
    return data[:at] + bytes([data[at] ^ 4]) + data[at + 1 :]


SIX = {f"{i}.png": png(noise(60, 60, i)) for i in range(6)}


@pytest.mark.parametrize("damage", ["header flipped", "header zeroed", "cut in a header", "cut before a header"])
def test_a_damaged_header_is_not_taken_for_the_end(damage, tmp_path):
    path = write_tar(tmp_path / "x.tar", SIX)
    with tarfile.open(path) as archive:
        at = archive.getmember("2.png").offset
    data = path.read_bytes()
    damaged = {"header flipped": flipped(data, at), "header zeroed": data[:at] + bytes(512) + data[at + 512 :],
               "cut in a header": data[: at + 100], "cut before a header": data[:at]}  # fmt: skip
    path.write_bytes(damaged[damage])
    checked = check_images(open_images(path, tmp_path / "c"), progress=False)
    (row,) = checked["quarantined"]
    assert checked["decoded"] == 2 and row["file"] == "x.tar"
    assert row["reason"] == f"damaged archive: neither a file nor the end at byte {at:,}; what follows is lost"


def test_an_archive_behind_an_archive_is_not_lost_in_silence(tmp_path):
    path = write_tar(tmp_path / "x.tar", {"a.png": PNG})
    path.write_bytes(2 * path.read_bytes())
    (row,) = check_images(open_images(path, tmp_path / "c"), progress=False)["quarantined"]
    assert "what follows is lost" in row["reason"]


@pytest.mark.parametrize("damage", ["flipped", "wrong checksum", "something behind"])
def test_what_a_damaged_gzip_still_gives_is_kept_and_the_damage_is_told(damage, tmp_path):
    path = write_tar(tmp_path / "x.tar.gz", SIX, "w:gz")
    data = path.read_bytes()
    damaged = {"flipped": flipped(data, len(data) // 2), "wrong checksum": flipped(data, len(data) - 6),
               "something behind": data + b"junk"}  # fmt: skip
    path.write_bytes(damaged[damage])
    for _ in range(2):  # the second time from the unpacked twin
        checked = check_images(open_images(path, tmp_path / "c"), progress=False)
        reasons = {row["file"]: row["reason"] for row in checked["quarantined"]}
        assert reasons["x.tar.gz"] and "None" not in reasons["x.tar.gz"] and checked["decoded"] >= 2
        assert damage == "flipped" or checked["decoded"] == 6
        next((tmp_path / "c").glob("index*")).unlink()


def test_links_in_a_tar_are_files_as_in_a_folder(tmp_path):
    path = tmp_path / "x.tar"
    links = {"./early.png": (tarfile.SYMTYPE, "cat/1.png"), "dog/2.png": (tarfile.LNKTYPE, "./cat/1.png"),
             "dog/3.png": (tarfile.SYMTYPE, "../cat/1.png"), "dog/4.png": (tarfile.LNKTYPE, "elsewhere.png"),
             "dog/out.png": (tarfile.SYMTYPE, "../../up.png"), "cats": (tarfile.SYMTYPE, "cat")}  # fmt: skip
    with tarfile.open(path, "w") as archive:
        for name, (kind, target) in links.items():
            link = tarfile.TarInfo(name)
            link.type, link.linkname = kind, target
            if name == "dog/2.png":
                first = tarfile.TarInfo("./cat/1.png")
                first.size = len(PNG)
                archive.addfile(first, io.BytesIO(PNG))
            archive.addfile(link)
    images = open_images(path, tmp_path / "c")
    assert images.files == ["./cat/1.png", "./early.png", "dog/2.png", "dog/3.png", "dog/4.png"]
    (row,) = check_images(images, progress=False)["quarantined"]
    assert row == {"file": "dog/4.png", "reason": "a link to 'elsewhere.png', which is not in the archive"}


@pytest.mark.parametrize("kind", ["zip", "tar"])
def test_a_name_that_an_archive_holds_twice_is_numbered(kind, tmp_path):
    path = tmp_path / f"x.{kind}"
    for i, name in enumerate(("d.x/a.png", "d.x/a#2.png", "d.x/a.png", "b", "d.x/a.png", "b")):
        data = f"file {i}".encode()
        if kind == "tar":
            with tarfile.open(path, "a") as archive:
                info = tarfile.TarInfo(name)
                info.size = len(data)
                archive.addfile(info, io.BytesIO(data))
        else:
            with zipfile.ZipFile(path, "a") as archive, warnings.catch_warnings(action="ignore"):
                archive.writestr(name, data)
    images = open_images(path, tmp_path / "c")
    assert images.files == ["b", "b#2", "d.x/a#2.png", "d.x/a#3.png", "d.x/a#4.png", "d.x/a.png"]
    assert [images.read(i) for i in range(6)] == [f"file {i}".encode() for i in (3, 5, 1, 2, 4, 0)]


@pytest.mark.parametrize("method", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
def test_a_name_that_is_no_utf8_though_it_says_so_costs_no_other_file(method, tmp_path):
    path = write_zip(tmp_path / "x.zip", {"a/1.png": PNG, "b/\u00e9\u00e9.png": SIX["1.png"], "a/\u00fc.png": PNG}, method)
    path.write_bytes(path.read_bytes().replace("\u00e9\u00e9".encode(), b"\xff\xfe\xc3("))
    images = open_images(path, tmp_path / "c")
    odd = "b/" + b"\xff\xfe\xc3(".decode("cp437") + ".png"
    assert images.files == ["a/1.png", "a/\u00fc.png", odd] and images.read(2) == SIX["1.png"]
    assert images.classes == ["a", "b"] and check_images(images, progress=False)["decoded"] == 3


def test_names_in_utf8_that_the_zip_does_not_call_so_are_read_as_such(tmp_path):
    """As the Archive Utility of macOS writes them."""
    path = write_zip(tmp_path / "x.zip", {"caf\u00e9/1.png": PNG, "na\u00efve/2.png": SIX["1.png"]}, zipfile.ZIP_STORED)
    data = bytearray(path.read_bytes())
    for at in [i for i in range(len(data)) if data[i : i + 4] == b"PK\x01\x02"]:
        assert data[at + 9] & 0x08
        data[at + 9] &= ~0x08
    path.write_bytes(data)
    images = open_images(path, tmp_path / "c")
    assert images.classes == ["caf\u00e9", "na\u00efve"] and images.read(1) == SIX["1.png"]


@pytest.mark.parametrize("start, packer", [(b"\xfd7zXZ\0", "xz"), (b"BZh9", "bzip2")])
def test_a_packing_that_cannot_be_read_at_random_says_what_to_do(start, packer, tmp_path):
    (tmp_path / "x.tar").write_bytes(start + bytes(99))
    with pytest.raises(ValueError, match=f"packed with {packer}; pack it anew as .tar or .tar.gz"):
        open_images(tmp_path / "x.tar", tmp_path / "c")
