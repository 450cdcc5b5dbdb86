"""Loss tables that are damaged, incomplete or of something else: the error names what is wrong."""

import re

import jax.numpy as jnp
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from flax import nnx
from points import classify, linear, points, regress

from easy_jax.core import weightings
from easy_jax.data import ArraySource, DataWarning
from easy_jax.train import loss_parts
from easy_jax.train.loss_table import LossTable, LossTableError
from easy_jax.train.scoring import ScoringError, score

# Loss tables.


@pytest.fixture
def table(tmp_path):
    """A complete table of 20 examples in parts of 8, 8 and 4 rows."""
    return score(
        linear(), points(), tmp_path / "t", loss_fn=classify, batch_size=8, rows_per_part=8
    )


def other_loss(model, batch):
    return classify(model, batch)


@pytest.mark.parametrize(
    ("model", "source", "loss_fn", "named"),
    [
        (linear(1), points(), classify, "model"),
        (linear(), points(bad_label=0, value=1), classify, "data"),
        (linear(), points(), other_loss, "loss"),
    ],
    ids=["model", "data", "loss"],
)
def test_loss_table_of_something_else(table, model, source, loss_fn, named):
    before = {path: path.read_bytes() for path in table.directory.iterdir()}
    with pytest.raises(LossTableError, match="was computed with different inputs") as error:
        score(model, source, table.directory, loss_fn=loss_fn, batch_size=8)
    assert re.findall(r"(\w+) is '", str(error.value)) == [named]
    assert {path: path.read_bytes() for path in table.directory.iterdir()} == before


def test_loss_table_of_a_data_set_of_another_size(table):
    with pytest.raises(LossTableError, match="num_examples is 20 there and 24 here"):
        score(linear(), points(24), table.directory, loss_fn=classify, batch_size=8)


def test_check_names_what_differs(table):
    table.check(model=table.metadata["model"])
    with pytest.raises(LossTableError, match=r"model is '\w+' there and 'another' here"):
        table.check(model="another", data=table.metadata["data"])


def test_missing_rows(table):
    parts = sorted(table.directory.glob("part-*.parquet"))
    assert len(parts) == 3
    parts[1].unlink()
    with pytest.raises(LossTableError, match=r"no row for 8 of 20 examples, ids \[8, 9, 10"):
        LossTable.open(table.directory)


def test_parts_that_overlap(table):
    loss_parts.write_part(
        table.directory, 7, (np.array([4, 17]), np.float32([1, 1]), np.float32([1, 1]))
    )
    with pytest.raises(
        LossTableError, match=r"duplicate example ids with different losses: \[4, 17\]"
    ):
        LossTable.open(table.directory)


def test_part_with_ids_of_no_example(table):
    loss_parts.write_part(table.directory, 7, (np.array([20]), np.float32([1]), np.float32([1])))
    with pytest.raises(LossTableError, match=r"ids \[20\], outside of \[0, 20\)"):
        LossTable.open(table.directory)


def truncate(content):
    return content[: len(content) // 2]


def garble_footer(content):
    return content[:-20] + b"\x00" * 20


def garble_rows(content):
    """Destroys the rows; the footer, which has the schema, stays whole."""
    return content[:4] + b"\xff" * 100 + content[104:]


@pytest.mark.parametrize("damage", [lambda content: b"", truncate, garble_footer, garble_rows])
def test_damaged_part(table, damage):
    path = table.directory / "part-00000-00001.parquet"
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(LossTableError, match=r"part-00000-00001\.parquet is damaged"):
        LossTable.open(table.directory)


def test_one_flipped_bit_in_a_part(table):
    path = table.directory / "part-00000-00001.parquet"
    with pq.ParquetFile(path) as file:
        column = file.metadata.row_group(0).column(1)
    assert column.path_in_schema == "loss"
    start = min(column.dictionary_page_offset or column.data_page_offset, column.data_page_offset)
    content = bytearray(path.read_bytes())
    content[start + column.total_compressed_size - 1] ^= 1
    path.write_bytes(content)
    with pytest.raises(LossTableError, match=r"part-00000-00001\.parquet is damaged"):
        LossTable.open(table.directory)


def test_part_with_other_columns(table):
    path = table.directory / "part-00000-00001.parquet"
    pq.write_table(pa.table({"example_id": np.arange(8), "loss": np.zeros(8)}), path)
    with pytest.raises(LossTableError, match=r"part-00000-00001\.parquet has columns"):
        LossTable.open(table.directory)


def test_damaged_metadata(table):
    (table.directory / "metadata.json").write_text("{")
    with pytest.raises(LossTableError, match=r"metadata\.json is not JSON"):
        LossTable.open(table.directory)


def test_no_loss_table(tmp_path):
    with pytest.raises(LossTableError, match=r"no loss table in .*no metadata\.json"):
        LossTable.open(tmp_path / "nowhere")


def test_all_losses_zero():
    with pytest.raises(ValueError, match=r"median loss is 0\.0; the temperature must be positive"):
        weightings.temperature(np.zeros(5, np.float32))
    with pytest.raises(ValueError, match=r"the temperature must be positive"):
        weightings.flow_weights(np.array([0.0, 0.0, 0.0, 2.0, 3.0]))


@pytest.mark.slow
def test_all_losses_zero_in_a_table(tmp_path):
    model = nnx.Linear(2, 1, use_bias=False, rngs=nnx.Rngs(0))
    x = np.eye(2, dtype=np.float32)[np.arange(20) % 2]
    y = np.asarray(model.kernel[...])[np.arange(20) % 2]
    source = ArraySource({"x": x, "y": y})
    table = score(model, source, tmp_path, loss_fn=regress, batch_size=8)
    assert table.temperature == 0.0
    with pytest.raises(LossTableError, match=r"temperature .* is 0\.0; it must be positive"):
        table.flow_weights()
    with pytest.warns(DataWarning, match="all weights are 1, because all losses are equal"):
        np.testing.assert_array_equal(table.flow_weights(tau=1.0), np.ones(20))


def test_negative_loss(tmp_path):
    def negative(model, batch):
        loss, count = regress(model, batch)
        return jnp.where(batch["x"][:, 0] == 1, -1.0, loss), count

    x = np.stack([np.arange(20), np.zeros(20)], axis=1).astype(np.float32)
    source = ArraySource({"x": x, "y": np.zeros((20, 3), np.float32)})
    with pytest.raises(ScoringError, match=r"1 of 20 .*id 1 has loss -1"):
        score(linear(), source, tmp_path, loss_fn=negative, batch_size=8)
