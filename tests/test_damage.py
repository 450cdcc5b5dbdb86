"""Files of a workdir that were changed or damaged: never another result, always one line."""

import numpy as np
import pytest
from flax import nnx

from easy_jax.core.losses import squared_error
from easy_jax.data import ArraySource
from easy_jax.io import sealed
from easy_jax.train import loss_parts, loss_table
from easy_jax.train.loss_table import LossTable, LossTableError
from easy_jax.train.scoring import score


def _regress(model, batch):
    return squared_error(model(batch["x"]), batch["y"])


def _scored(directory, **options):
    y = np.arange(10, dtype=np.float32)[:, None] / 8
    y[3] = 3e38  # its square is infinite
    source = ArraySource({"x": np.ones((10, 1), np.float32), "y": y})
    model = nnx.Linear(1, 1, rngs=nnx.Rngs(0))
    return score(model, source, directory, loss_fn=_regress, batch_size=8, **options)


@pytest.fixture(scope="module")
def table(tmp_path_factory):
    return _scored(tmp_path_factory.mktemp("table"), on_bad_example="drop", rows_per_part=5)


def _same(found, table):
    return found.metadata == table.metadata and np.array_equal(
        found.loss_N(), table.loss_N(), equal_nan=True
    )


def _damaged(path):
    """Its content with every byte changed, one at a time: a bit of it and, in text, all of it."""
    content = path.read_bytes()
    others = () if path.suffix == ".parquet" else (ord("7"), ord(" "))
    for place, byte in enumerate(content):
        for other in (byte ^ 1 << place % 8, *others):
            if other != byte:
                yield place, content[:place] + bytes([other]) + content[place + 1 :]


def check_every_byte(path, read, same, error):
    """Reading gives the same or one line that names the file; how often it was the same."""
    content, survived = path.read_bytes(), 0
    try:
        for place, damaged in _damaged(path):
            path.write_bytes(damaged)
            try:
                found = read()
            except error as told:
                assert path.name in str(told) and "\n" not in str(told), (place, str(told))
            else:
                survived += 1
                assert same(found), (place, damaged)
    finally:
        path.write_bytes(content)
    return survived


@pytest.mark.slow
def test_every_byte_of_the_metadata(table):
    path = table.directory / "metadata.json"
    survived = check_every_byte(
        path,
        lambda: LossTable.open(table.directory),
        lambda found: _same(found, table),
        LossTableError,
    )
    assert 0 < survived < path.stat().st_size  # some spaces and line breaks mean nothing


@pytest.mark.slow
def test_every_byte_of_a_part(table):
    path = table.directory / "part-00000-00001.parquet"
    check_every_byte(
        path,
        lambda: LossTable.open(table.directory),
        lambda found: _same(found, table),
        LossTableError,
    )


def test_every_byte_of_the_dropped_ids(table):
    path = table.directory / "dropped-00000.json"
    check_every_byte(
        path,
        lambda: loss_table.read_dropped(table.directory),
        lambda found: found == {3},
        LossTableError,
    )


def test_a_changed_median_is_refused_with_the_cure(table):
    path = table.directory / "metadata.json"
    text = path.read_text()
    try:
        path.write_text(text.replace('"median": ', '"median": 1'))
        with pytest.raises(LossTableError) as told:
            LossTable.open(table.directory)
    finally:
        path.write_text(text)
    assert str(told.value) == (
        f"{path} was changed after it was written: its checksum is of other values; "
        f"delete {table.directory} and score again"
    )


def test_a_part_of_another_table_is_refused(tmp_path):
    other = _scored(tmp_path, on_bad_example="drop", rows_per_part=5)
    ids, loss, count = next(other.rows())
    (tmp_path / "part-00000-00000.parquet").unlink()
    loss_parts.write_part(tmp_path, 0, (ids, loss + 1, count))
    with pytest.raises(LossTableError, match="were changed after they were scored"):
        LossTable.open(tmp_path)


def test_white_space_and_the_order_of_keys_mean_nothing(tmp_path):
    value = sealed.seal({"a": 1, "b": [0.1, None]})
    path = tmp_path / "a.json"
    path.write_text(f'{{ "checksum" :"{value["checksum"]}",\n"b":[0.10,null ],"a":1}}')
    assert sealed.read(path, ValueError, "") == {"a": 1, "b": [0.1, None]}
