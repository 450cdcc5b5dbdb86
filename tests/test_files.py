"""Files of a workdir appear whole, and are on disk when they do."""

import errno
import os
from pathlib import Path

import pytest

from easy_jax import files


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
