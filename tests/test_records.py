"""Records of text from files: fields in order, and every mistake named."""

import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import tfds_data

from easy_jax.data import DataError, DataWarning
from easy_jax.data.bad_examples import BadExamples
from easy_jax.data.text import read_jsonl, read_parquet, read_tfds

ROWS = [{"q": "2 + 2\u2028=", "a": "4"}, {"a": "日本 🙂\x00", "q": ""}]
COLUMNS = {"a": ["4", "日本 🙂\x00"], "q": ["2 + 2\u2028=", ""]}


def test_jsonl(tmp_path):
    path = tmp_path / "data.jsonl"
    for end in ("", "\n", "\r\n", "\n\n \n"):
        text = "\n".join(json.dumps(row, ensure_ascii=False) for row in ROWS)
        for start in ("", "\ufeff"):  # a byte order mark, as editors on Windows write
            path.write_bytes((start + text + end).encode())
            assert read_jsonl(path, ["a", "q"]) == COLUMNS
    with pytest.warns(DataWarning, match=r"data\.jsonl: not read: 'q' \(in 1 of 2 records\)$"):
        assert read_jsonl(str(path), ["a"]) == {"a": COLUMNS["a"]}


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        (b'{"a": "x"}\n{"a": \n', r"1 of 2 .*data\.jsonl: not JSON \(1\): line 2 \[Exp"),
        (b'{"a": "x"}\n' + b"[" * 100_000, r"data\.jsonl: not JSON \(1\): line 2 "),
        (b'{"a": "x"}\n["a"]', r"not a JSON object \(1\): line 2 \[\['a'\]\]"),
        (b'{"a": "x"}\n{"b": "x", "c": 1}', r"no field 'a' \(1\): line 2 \[it has \['b', 'c'\]"),
        (b'{"b": "x"}\n{"c": 1}', r"jsonl has no field 'a' in any record; it has \['b', 'c'\]"),
        (
            b'{"messages": [{}]}',
            r"no field 'a' in any .* it has \['messages'\]; conversations are not",
        ),
        (b'{"a": "x"}\n\n{"a": 3}', r"2 of 3 .*blank line \(1\): line 2; .*is int.*: line 3"),
        (b'\n{"a": "x"}', r"blank line \(1\): line 1"),
        (b'{"a": 3}', r"data\.jsonl: field 'a' is int, not a string \(1\): line 1"),
        (b'{"a": ["x"]}', r"data\.jsonl: field 'a' is list, not a string \(1\): line 1"),
        (b'{"a": null}', r"data\.jsonl: field 'a' is null, not a string \(1\): line 1"),
        (b'{"a": "\\ud800"}', r"data\.jsonl: field 'a' is not Unicode \(1\): line 1"),
        (b'{"a": "x"}\n{"a": "\xff"}', r"data\.jsonl: not UTF-8 \(1\): line 2"),
        (
            b'{"a": "x"}\n{"a": [{"role": "user", "content": "x"}], "b": 1}',
            r"line 2: field 'a' is a list of messages: conversations are not read yet, only .*"
            r"instruction_field.* has the fields \['a', 'b'\], a message \['content', 'role'\]",
        ),
        (b"", r"data\.jsonl is empty"),
        (b"\n\n", r"data\.jsonl is empty"),
    ],
)
def test_bad_jsonl(tmp_path, lines, message):
    path = tmp_path / "data.jsonl"
    path.write_bytes(lines)
    with pytest.raises(DataError, match=message):
        read_jsonl(path, ["a"])


def test_jsonl_file_that_is_not_there(tmp_path):
    with pytest.raises(DataError, match=r"cannot read .*none\.jsonl: No such file"):
        read_jsonl(tmp_path / "none.jsonl", ["a"])
    with pytest.raises(DataError, match=r"cannot read .*: Is a directory"):
        read_jsonl(tmp_path, ["a"])


def test_parquet(tmp_path):
    table = pa.table(COLUMNS)
    pq.write_table(table, tmp_path / "b.parquet")
    assert read_parquet(tmp_path / "b.parquet", ["a", "q"]) == COLUMNS
    kinds = [pa.large_string(), pa.dictionary(pa.int32(), pa.string())]
    more = {name: pa.array(COLUMNS[name], kind) for name, kind in zip("aq", kinds, strict=True)}
    pq.write_table(pa.table(more), tmp_path / "a=1.parquet")
    pq.write_table(table.slice(0, 0), tmp_path / "c.parquet")
    (tmp_path / "README.md").write_text("not data")
    both = {name: values * 2 for name, values in COLUMNS.items()}
    assert read_parquet(str(tmp_path), ["a", "q"]) == both


def test_parquet_files_are_read_in_order(tmp_path):
    for name in ("2", "0", "1"):
        pq.write_table(pa.table({"a": [name]}), tmp_path / f"{name}.parquet")
    assert read_parquet(tmp_path, ["a"]) == {"a": ["0", "1", "2"]}


@pytest.mark.parametrize(
    ("column", "message"),
    [
        (["x", None], r"1 of 2 .*'a' is null, not a string \(1\): x\.parquet row 1"),
        ([1, 2], r"'a' is int, not a string \(2\): x\.parquet row 0, x\.parquet row 1"),
        ([b"x"], r"'a' is bytes, not a string \(1\): x\.parquet row 0"),
        (pa.array([], pa.string()), r"x\.parquet is empty"),
    ],
)
def test_bad_parquet_column(tmp_path, column, message):
    pq.write_table(pa.table({"a": column}), tmp_path / "x.parquet")
    with pytest.raises(DataError, match=message):
        read_parquet(tmp_path / "x.parquet", ["a"])


def test_bad_parquet_files(tmp_path):
    with pytest.raises(DataError, match=r"has no \*\.parquet files"):
        read_parquet(tmp_path, ["a"])
    with pytest.raises(DataError, match=r"cannot read .*none\.parquet"):
        read_parquet(tmp_path / "none.parquet", ["a"])
    pq.write_table(pa.table({"b": ["x"], "c": ["y"]}), tmp_path / "x.parquet")
    with pytest.raises(DataError, match=r"x\.parquet has no columns \['a'\]; it has \['b', 'c'\]"):
        read_parquet(tmp_path / "x.parquet", ["a", "b"])
    (tmp_path / "y.parquet").write_bytes(b"this is no Parquet file")
    with pytest.raises(DataError, match=r"cannot read .*y\.parquet"):
        read_parquet(tmp_path, ["b"])
    latin = pa.array([b"\xe4"], pa.binary()).view(pa.string())
    pq.write_table(pa.table({"b": latin}), tmp_path / "y.parquet")
    with pytest.raises(DataError, match=r"cannot read .*y\.parquet: .*utf-8"):
        read_parquet(tmp_path, ["b"])


@pytest.fixture(scope="module")
def tfds_folder(tmp_path_factory):
    """A prepared data set of text, with an example that is not UTF-8 in its split `bad`."""
    import tensorflow_datasets as tfds

    features = {
        "question": tfds.features.Text(),
        "answer": tfds.features.Text(),
        "level": tfds.features.Scalar(dtype=np.int32),
    }
    train = [
        {"question": f"{i} + {i} = ½?", "answer": "" if i == 1 else str(2 * i), "level": i}
        for i in range(5)
    ]
    bad = [train[0], {"question": b"\xff", "answer": "", "level": 0}]
    folder, splits = tmp_path_factory.mktemp("tfds"), {"train": train, "bad": bad}
    return tfds_data.write(folder, "sums", "1.0.0", features, splits, per_shard=3)


def test_tfds(tfds_folder, monkeypatch):
    expected = {
        "answer": ["0", "", "4", "6", "8"],
        "question": [f"{i} + {i} = ½?" for i in range(5)],
    }
    unread = r"'sums' in .*, split 'train.*': not read: 'level'$"
    for size in (4096, 2):
        monkeypatch.setattr("easy_jax.data.records._SLICE", size)
        with pytest.warns(DataWarning, match=unread):
            assert read_tfds("sums", "train", tfds_folder, ["question", "answer"]) == expected
    columns = read_tfds(
        "sums", "train[1:3]", tfds_folder, ["answer"], optional=["question", "level"]
    )
    assert columns == {"answer": ["", "4"], "question": expected["question"][1:3], "level": [1, 2]}


def test_bad_tfds(tfds_folder):
    message = (
        r"5 of 5 .* of 'sums' in .*, split 'train': field 'level' is int, .*\(5\): example 0, "
    )
    with pytest.raises(DataError, match=message):
        read_tfds("sums", "train", tfds_folder, ["level"])
    with pytest.raises(DataError, match=r"field 'question' is not UTF-8 \(1\): example 1"):
        read_tfds("sums", "bad", tfds_folder, ["question"])
    with pytest.raises(DataError, match=r"no fields \['text'\]; it has \['answer', 'level'"):
        read_tfds("sums", "train", tfds_folder, ["text"])
    with pytest.raises(DataError, match=r"Prepare it first"):
        read_tfds("nothere", "train", tfds_folder, ["text"])


# Optional fields, fields that are not read, and bad records with good ones.


def test_optional_fields_and_fields_that_are_not_read(tmp_path):
    path = tmp_path / "x.jsonl"
    rows = [
        {"a": "1", "input": "x", "weight": 2.5, "id": "one", "tags": []},
        {"a": "2", "input": None, "note": "y"},
        {"a": "3", "input": "", "weight": "much", "id": ""},
    ]
    path.write_text("\n".join(map(json.dumps, rows)))
    unread = (
        r"x\.jsonl: not read: 'id' \(in 1 of 3 records\), 'input' \(in 1 of 3 records; input_field "
        r"would .*\), 'note' \(in 1 of 3 records\), 'weight' \(in 2 of 3 records; weight_f.*$"
    )
    with pytest.warns(DataWarning, match=unread):
        assert read_jsonl(path, ["a"]) == {"a": ["1", "2", "3"]}
    with pytest.warns(DataWarning, match=r"not read: 'id' .*, 'note' .in 1 of 3 records.$"):
        columns = read_jsonl(path, ["a"], optional=["input", "weight"])
    expected = {"a": ["1", "2", "3"], "input": ["x", None, ""], "weight": [2.5, None, "much"]}
    assert columns == expected
    pq.write_table(pa.table({"a": ["1"], "weight": [0.5], "b": [1]}), tmp_path / "x.parquet")
    with pytest.warns(DataWarning, match=r"x\.parquet: not read: 'b'$"):
        columns = read_parquet(tmp_path / "x.parquet", ["a"], optional=["input", "weight"])
    assert columns == {"a": ["1"], "input": [None], "weight": [0.5]}


def test_bad_records_are_collected_and_keep_their_places(tmp_path):
    path = tmp_path / "x.jsonl"
    lines = ['{"a": "0"}', "", '{"a": 2}', "[3]", '{"a": "4"}', '{"b": 5}', "{"]
    path.write_text("\n".join(lines))
    bad = BadExamples("drop")
    with pytest.warns(DataWarning, match="not read: 'b'"):
        columns = read_jsonl(path, ["a"], bad=bad)
    assert columns == {"a": ["0", "", "", "", "4", "", ""]}
    assert bad.ids() == [1, 2, 3, 5, 6]
    assert [row["where"] for row in bad.rows()] == [f"line {n}" for n in (2, 3, 4, 6, 7)]
    assert {row["source"] for row in bad.rows()} == {str(path)}
    assert bad.rows()[0]["reason"] == "blank line"
    assert bad.rows()[1]["reason"] == "field 'a' is int, not a string"
    assert bad.rows()[3]["reason"] == "no field 'a': it has ['b']"
    bad.only(2, 6)
    assert bad.ids() == [0, 1, 3]
    assert [row["where"] for row in bad.rows()] == ["line 3", "line 4", "line 6"]


def test_the_first_twenty_are_shown_and_all_are_counted(tmp_path):
    path = tmp_path / "x.jsonl"
    path.write_text("\n".join(['{"a": 1}'] * 15 + ["{"] * 9 + ["[]"] * 2 + ['{"a": "x"}']))
    with pytest.raises(DataError) as caught:
        read_jsonl(path, ["a"])
    message = str(caught.value)
    assert message.startswith(f"cannot use 26 of 27 examples of {path}: field 'a' is int, not a ")
    assert "string (15): line 1, " in message and "; not JSON (9): line 16 [" in message
    assert "line 20 [" in message and "line 21 [" not in message
    assert "; not a JSON object (2): .... Fix the data" in message and "\n" not in message


def test_parquet_folders_name_the_file_of_a_bad_row(tmp_path):
    for name, values in (("a", ["x"] * 3), ("b", []), ("c", ["x", None])):
        column = pa.array(values, pa.string())
        pq.write_table(pa.table({"a": column}), tmp_path / f"{name}.parquet")
    bad = BadExamples("drop")
    assert read_parquet(tmp_path, ["a"], bad=bad) == {"a": ["x"] * 4 + [""]}
    assert bad.rows() == [
        {
            "id": 4,
            "source": str(tmp_path),
            "where": "c.parquet row 1",
            "reason": "field 'a' is null, not a string",
        }
    ]


def test_on_bad_example_is_one_of_two():
    with pytest.raises(DataError, match="on_bad_example is 'ignore'; it must be 'error' or 'drop'"):
        BadExamples("ignore")
