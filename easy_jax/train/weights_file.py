"""Export of a scored data set's weights as Parquet or JSON lines, for use in other trainers."""

import io
import json
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from easy_jax.core import weightings
from easy_jax.core.weightings.rule import Weighting, Weights
from easy_jax.data import DataError, Ragged, ragged
from easy_jax.data.checks import checked_weights
from easy_jax.io import files
from easy_jax.io.checks import ConfigError
from easy_jax.train.loss_table import LossTable
from easy_jax.train.weights import StageWeights, product

_OWN = ("example_id", "loss", "count", "weight", "token_losses", "token_weights")


def export_weights(
    table: LossTable,
    path: str | os.PathLike[str],
    weighting: Weighting | str = "flow",
    *,
    columns: Mapping[str, Sequence[Any]] | None = None,
    weight_N: np.ndarray | None = None,
    token_weight: Ragged | None = None,
    seed: int = 0,
) -> Path:
    """Writes the ids, frozen losses and weights of all examples to a file, one row per example.

    The columns are `example_id`; the given `columns`; `loss`, the mean over an example's target
    tokens in nats; `count`, their number; with example weights, `weight`; if the table has token
    losses, the list `token_losses`; and with token weights, the list `token_weights`. Lists have
    one value for each target token, in order: the tokens of the response and the EOS. For
    examples that scoring dropped, all columns but `example_id` and the given ones are null.

    Args:
      table: the loss table of the data.
      path: the file to write, `.parquet` or `.jsonl`; an existing file is replaced.
      weighting: a name or an object of `easy_jax.weightings` that reads only the frozen losses.
      columns: further columns by name, with a value for every example, such as the texts.
      weight_N, token_weight: additional weights, multiplied in, as in `easy_jax.fit`.
      seed: random seed, for control weightings that draw at random.

    Returns:
      The path of the file.

    Raises:
      ConfigError: the path has another suffix; the weighting reads the current model, so that its
        weights change in every step; or one of `columns` has the name of a column above.
      DataError: the number of values in a column is not that of the table's examples.
      LossTableError: the weighting needs token losses, which the table does not have.

    Example:
      >>> import tempfile
      >>> from flax import nnx
      >>> import easy_jax as ej
      >>> source = ej.ArraySource({"x": np.ones((3, 1), "f"), "y": np.float32([[1], [2], [3]])})
      >>> def loss_fn(model, batch):
      ...     return ej.squared_error(model(batch["x"]), batch["y"])
      >>> model, folder = nnx.Linear(1, 1, rngs=nnx.Rngs(0)), tempfile.mkdtemp()
      >>> table = ej.score(model, source, folder, loss_fn=loss_fn, batch_size=8)
      >>> written = export_weights(table, folder + "/weights.jsonl")
      >>> sorted(json.loads(written.read_text().splitlines()[0]))
      ['count', 'example_id', 'loss', 'weight']
    """
    target = files.path(path)
    weighting = weightings.get(weighting) if isinstance(weighting, str) else weighting
    columns = dict(columns or {})
    check(weighting, target, columns)
    found = weighting.of_table(table, seed) if weighting.level != "none" else Weights()
    own = _columns(table, product(StageWeights(weight_N, token_weight), found))
    given = {name: _given(name, values, table) for name, values in columns.items()}
    rows = pa.table({"example_id": own.pop("example_id"), **given, **own})
    target.parent.mkdir(parents=True, exist_ok=True)
    files.write(target, _parquet(rows) if target.suffix == ".parquet" else _json_lines(rows))
    return target


def check(weighting: Weighting, target: Path, names: Iterable[str] = ()) -> None:
    """Raises ConfigError for a weighting, file or names of columns that cannot be exported."""
    for name in names:
        if name in _OWN:
            raise ConfigError(f"the column {name!r} is one of the exported ones; rename it")
    if target.suffix not in (".parquet", ".jsonl"):
        raise ConfigError(f"{target} ends in {target.suffix!r}; it must be .parquet or .jsonl")
    if weighting.needs - {"frozen"}:
        raise ConfigError(
            f"{weighting} computes weights from the model in every step; only weightings of the "
            "frozen losses can be exported, such as 'flow', 'flow_token' or 'stm'"
        )


def _columns(table: LossTable, weights: StageWeights) -> dict[str, pa.Array]:
    size = table.num_examples
    loss_N, count_N = np.full((2, size), np.nan, np.float32)
    for ids, loss, count in table.rows():
        loss_N[ids], count_N[ids] = loss, count
    dropped_N = np.isnan(loss_N)
    columns = {
        "example_id": pa.array(np.arange(size)),
        "loss": _with_nulls(loss_N, dropped_N),
        "count": _with_nulls(count_N, dropped_N),
    }
    weight_N = np.ones(size) if weights.weight_N is None else weights.weight_N
    weight_N = checked_weights(weight_N, size)
    if weights.token_weight is None or not np.all(weight_N[~dropped_N] == 1):
        columns["weight"] = _with_nulls(weight_N, dropped_N | np.isnan(weight_N))
    if "token_median" in table.metadata:
        columns["token_losses"] = _lists(table.token_losses(), dropped_N)
    if weights.token_weight is not None:
        ragged.check(weights.token_weight, count_N, dropped_N)
        columns["token_weights"] = _lists(weights.token_weight, dropped_N)
    return columns


def _with_nulls(values_N: np.ndarray, dropped_N: np.ndarray) -> pa.Array:
    return pa.array(np.asarray(values_N, np.float32), mask=dropped_N)


def _lists(lists: Ragged, dropped_N: np.ndarray) -> pa.Array:
    """Returns an array of float32 lists; null for the examples that scoring dropped."""
    lengths = np.diff(lists.offsets)
    values = lists.values[np.repeat(~dropped_N, lengths)]
    offsets = np.cumsum([0, *np.where(dropped_N, 0, lengths)])
    return pa.ListArray.from_arrays(
        pa.array(offsets, pa.int32()), pa.array(values, pa.float32()), mask=pa.array(dropped_N)
    )


def _given(name: str, values: Sequence[Any], table: LossTable) -> pa.Array:
    if len(values) != table.num_examples:
        raise DataError(
            f"the column {name!r} has {len(values)} values, and the loss table in "
            f"{table.directory} {table.num_examples} examples"
        )
    try:
        return pa.array(values)
    except (pa.ArrowException, UnicodeError, TypeError) as error:
        reason = str(error).splitlines()[0]
        raise DataError(f"the column {name!r} cannot be written: {reason}") from error


def _parquet(rows: pa.Table) -> bytes:
    content = io.BytesIO()
    pq.write_table(rows, content)
    return content.getvalue()


def _json_lines(rows: pa.Table) -> str:
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows.to_pylist())
