"""Files of a workdir appear whole, and are on disk when they do."""

import errno
import os
from pathlib import Path

import pytest

from easy_jax.io import files


@pytest.fixture
def done(monkeypatch):
    """What reaches the disk and what is renamed, in order."""
    done = []
    sync, replace = os.fsync, os.replace

    def synced(handle):
        done.append(("sync", Path(f"/proc/self/fd/{handle}").readlink().name))
        sync(handle)

    def renamed(source, target):
        done.append(("rename", Path(target).name))
        replace(source, target)

    monkeypatch.setattr(os, "fsync", synced)
    monkeypatch.setattr(os, "replace", renamed)
    return done


def test_a_file_is_on_disk_before_it_is_seen_and_its_name_after(done, tmp_path):
    files.write(tmp_path / "a.json", "{}")
    folder = tmp_path.name
    assert done == [("sync", "a.json.tmp"), ("rename", "a.json"), ("sync", folder)]
    assert [(path.name, path.read_text()) for path in tmp_path.iterdir()] == [("a.json", "{}")]


def test_a_folder_is_on_disk_with_all_that_it_holds(done, tmp_path):
    (tmp_path / "tmp" / "inner").mkdir(parents=True)
    (tmp_path / "tmp" / "inner" / "a").write_text("a")
    (tmp_path / "tmp" / "b").write_text("b")
    files.publish(tmp_path / "tmp", tmp_path / "model")
    before = {("sync", name) for name in ("inner", "a", "b", "tmp")}
    assert set(done[:4]) == before
    assert done[4:] == [("rename", "model"), ("sync", tmp_path.name)]


def test_folders_need_not_be_synced_where_they_cannot(monkeypatch, tmp_path):
    def refuse(handle):
        if Path(f"/proc/self/fd/{handle}").readlink().is_dir():
            raise OSError(errno.EINVAL, "Invalid argument")

    monkeypatch.setattr(os, "fsync", refuse)
    files.write(tmp_path / "a", "a")
    assert (tmp_path / "a").read_text() == "a"


def test_a_file_that_does_not_reach_the_disk_is_not_seen(monkeypatch, tmp_path):
    def refuse(_):
        raise OSError(errno.EIO, "Input/output error")

    files.write(tmp_path / "a", "old")
    monkeypatch.setattr(os, "fsync", refuse)
    with pytest.raises(OSError, match="Input/output error"):
        files.write(tmp_path / "a", "new")
    assert (tmp_path / "a").read_text() == "old"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is not JSON: Expecting value: line 1 column 1 (char 0)"),
        (b"{", "is not JSON"),
        (b'{"a": \xff}', "is not UTF-8"),
        (b"[" * 100_000, "is JSON nested too deeply"),
        (b'{"a": ' + b"9" * 5_000 + b"}", "is not JSON: Exceeds the limit"),
        (b"[1]", "is not a JSON object but list"),
    ],
)
def test_malformed_json_is_one_line_with_the_path_and_the_cure(content, message, tmp_path):
    path = tmp_path / "metadata.json"
    path.write_bytes(content)
    with pytest.raises(KeyError) as caught:
        files.read_json(path, KeyError, "score again")
    (text,) = caught.value.args
    assert message in text and text.startswith(str(path)) and text.endswith("; score again")
    assert "\n" not in text


def test_files_are_utf8_whatever_the_locale(tmp_path):
    path = tmp_path / "a.json"
    files.write_json(path, {"Δ": "é"})
    assert path.read_bytes().decode("utf-8").startswith("{")
    assert files.read_json(path, ValueError) == {"Δ": "é"}
