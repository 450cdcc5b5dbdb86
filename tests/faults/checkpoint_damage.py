"""Kinds of damage to the checkpoints of a stage; each function returns what it did."""

import json
import os
import shutil
import socket

_DEEP = b"[" * 100_000


def _steps(stage):
    return sorted(
        (path for path in stage.iterdir() if path.name.isdigit()), key=lambda p: int(p.name)
    )


def _file(stage, draw, step=-1):
    """Any file of a checkpoint, the latest by default."""
    return draw.choice(sorted(p for p in _steps(stage)[step].rglob("*") if p.is_file()))


def _items(stage, draw, has_json=False):
    """The name of a folder of the latest checkpoint; of one with JSON, if that is asked for."""
    folders = (path for path in _steps(stage)[-1].iterdir() if path.is_dir())
    names = (path.name for path in folders if not has_json or (path / "metadata").is_file())
    return draw.choice(sorted(names))


def _large(stage, draw):
    """One of the files with the most of the arrays."""
    files = (p for p in _steps(stage)[-1].rglob("d/*") if p.is_file())
    return draw.choice(sorted(files, key=lambda p: (-p.stat().st_size, p))[:3])


def truncate(stage, draw):
    path = _file(stage, draw)
    size = draw.randrange(max(path.stat().st_size, 1))
    os.truncate(path, size)
    return f"{path.relative_to(stage)} to {size} bytes"


def truncate_arrays(stage, draw):
    path = _large(stage, draw)
    os.truncate(path, draw.randrange(path.stat().st_size))
    return path.relative_to(stage)


def empty(stage, draw):
    path = _file(stage, draw)
    path.write_bytes(b"")
    return path.relative_to(stage)


def delete(stage, draw):
    path = _file(stage, draw)
    path.unlink()
    return path.relative_to(stage)


def garble(stage, draw):
    path = _file(stage, draw)
    return f"{path.relative_to(stage)}, bytes {_garble(path, draw, 8)}"


def garble_arrays(stage, draw):
    path = _large(stage, draw)
    return f"{path.relative_to(stage)}, bytes {_garble(path, draw, 1)}"


def _garble(path, draw, count):
    content = bytearray(path.read_bytes() or b"\0")
    places = sorted(draw.sample(range(len(content)), min(count, len(content))))
    for place in places:
        content[place] ^= 1 << draw.randrange(8)
    path.write_bytes(content)
    return places


def swap_files(stage, draw):
    path = _file(stage, draw)
    other = _steps(stage)[0] / path.relative_to(_steps(stage)[-1])
    if not other.is_file():
        other = _file(stage, draw, 0)
    ours, theirs = path.read_bytes(), other.read_bytes()
    path.write_bytes(theirs)
    other.write_bytes(ours)
    return f"{path.relative_to(stage)} and {other.relative_to(stage)}"


def swap_items(stage, draw):
    first, *_, last = _steps(stage)
    name = _items(stage, draw)
    return f"{name} of {_swap(first / name, last / name)}"


def swap_steps(stage, draw):
    first, *_, last = _steps(stage)
    return _swap(first, last)


def _swap(one, other):
    aside = one.with_name("aside")
    one.rename(aside)
    other.rename(one)
    aside.rename(other)
    return f"{one.parent.name}/{one.name} and {other.parent.name}/{other.name}"


def rename_latest(stage, draw):
    last = _steps(stage)[-1]
    name = draw.choice(["12", "99", "10"])
    if not (stage / name).exists():
        last.rename(stage / name)
    return f"{last.name} to {name}"


def copy_first(stage, draw):
    first = _steps(stage)[0]
    shutil.copytree(first, stage / "11")
    return f"{first.name} as 11"


def file_to_folder(stage, draw):
    path = _file(stage, draw)
    path.unlink()
    path.mkdir()
    return path.relative_to(stage)


def file_to_link(stage, draw):
    path = _file(stage, draw)
    other = _steps(stage)[0] / path.relative_to(_steps(stage)[-1])
    path.unlink()
    path.symlink_to(other if draw.random() < 0.5 else "nowhere")
    return f"{path.relative_to(stage)} to {path.readlink().name}"


def item_to_file(stage, draw):
    path = _steps(stage)[-1] / _items(stage, draw)
    shutil.rmtree(path)
    path.write_bytes(b"no folder")
    return path.relative_to(stage)


def item_away(stage, draw):
    path = _steps(stage)[-1] / _items(stage, draw)
    shutil.rmtree(path)
    return path.relative_to(stage)


def empty_step(stage, draw):
    path = stage / draw.choice(["10", "11", "12", "99", "1000000"])
    path.mkdir(exist_ok=True)
    for inside in path.iterdir():
        shutil.rmtree(inside) if inside.is_dir() else inside.unlink()
    return path.name


def half_a_step(stage, draw):
    last = _steps(stage)[-1]
    kept = draw.sample(sorted(path.name for path in last.iterdir()), 3)
    for name in kept:
        copy = shutil.copytree if (last / name).is_dir() else shutil.copy
        (stage / "50").mkdir(exist_ok=True)
        copy(last / name, stage / "50" / name)
    return f"50 with {', '.join(kept)}"


def step_is_file(stage, draw):
    path = stage / draw.choice(["13", "99"])
    path.write_bytes(b"")
    return path.name


def wrong_json(stage, draw):
    item = _items(stage, draw, has_json=True)
    path = _steps(stage)[-1] / item / "metadata"
    content = draw.choice(
        [b"[]", b"null", b"{}", b"1e999", b'"x"', b"\xff\xfe{}", _DEEP, b'{"a": NaN}', b""]
    )
    path.write_bytes(content)
    return f"{path.relative_to(stage)}: {content[:10]!r}"


def wrong_values(stage, draw):
    item = _items(stage, draw, has_json=True)
    path = _steps(stage)[-1] / item / "metadata"
    content = json.loads(path.read_text())
    wrong = draw.choice([None, -1, 10**9, "x", [], {}, 0.5])
    name = _change_leaf(content, draw, wrong)
    path.write_text(json.dumps(content))
    return f"{path.relative_to(stage)}: {name} is {wrong!r}"


def _change_leaf(content, draw, wrong):
    while True:
        keys = sorted(content) if isinstance(content, dict) else range(len(content))
        key = draw.choice(list(keys))
        if not isinstance(content[key], dict | list) or not content[key]:
            content[key] = wrong
            return key
        content = content[key]


def no_permission(stage, draw):
    path = _file(stage, draw)
    if os.geteuid():
        path.chmod(0)
        return path.relative_to(stage)
    path.unlink()
    with socket.socket(socket.AF_UNIX) as opened:  # by a short name, the only ones there are
        handle = os.open(path.parent, os.O_RDONLY)
        opened.bind(f"/proc/self/fd/{handle}/{path.name}")
        os.close(handle)
    return f"{path.relative_to(stage)} is a socket"


def leftovers(stage, draw):
    last = _steps(stage)[-1]
    name = draw.choice(["99.orbax-checkpoint-tmp-17", "99.orbax-checkpoint-tmp", "99.tmp", "abc"])
    shutil.copytree(last, stage / name)
    shutil.rmtree(stage / name / _items(stage, draw))
    return name


def unfinished_item(stage, draw):
    last = _steps(stage)[-1]
    item = _items(stage, draw)
    (last / item).rename(last / f"{item}.orbax-checkpoint-tmp-3")
    return f"{last.name}/{item}"


def all_damaged(stage, draw):
    for number, _ in enumerate(_steps(stage)):
        _file(stage, draw, number).write_bytes(b"damaged")
    return "a file in every one"


KINDS = (
    truncate,
    truncate_arrays,
    empty,
    delete,
    garble,
    garble_arrays,
    swap_files,
    swap_items,
    swap_steps,
    rename_latest,
    copy_first,
    file_to_folder,
    file_to_link,
    item_to_file,
    item_away,
    empty_step,
    half_a_step,
    step_is_file,
    wrong_json,
    wrong_values,
    no_permission,
    leftovers,
    unfinished_item,
    all_damaged,
    garble_arrays,
    wrong_values,
    wrong_json,
)
