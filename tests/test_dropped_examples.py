"""Records that cannot be used, left out of an experiment: the others are as without them."""

import json
import shutil

import numpy as np
import pytest
import tiny_language

from easy_jax import pipeline as train
from easy_jax.config import replace
from easy_jax.data import DataError, DataWarning, TokenSource
from easy_jax.train.loss_table import LossTable

BAD = [  # a line, and what is wrong with it
    ("{", "not JSON: "),
    (json.dumps({"q": "one", "a": ""}), "blank response"),
    (
        json.dumps({"q": "one " * 20, "a": " two"}),
        "no target token within max_length 17: 21 prompt ",
    ),
    (json.dumps({"q": None, "a": "two"}), "field 'q' is null, not a string"),
]
PLACES = {"train": [0, 4, 5, 27], "heldout": [1, 3]}


@pytest.fixture(scope="module")
def clean(tmp_path_factory):
    return tiny_language.write_folder(tmp_path_factory.mktemp("clean"))


@pytest.fixture(scope="module")
def dirty(clean, tmp_path_factory):
    """The same with bad lines at these places."""
    folder = tmp_path_factory.mktemp("dirty") / "model"
    shutil.copytree(clean, folder)
    for name, places in PLACES.items():
        lines = (folder / f"{name}.jsonl").read_text().splitlines()
        for place, (line, _) in zip(places, BAD, strict=False):
            lines.insert(place, line)
        (folder / f"{name}.jsonl").write_text("\n".join(lines))
    return folder


def test_all_of_a_file_are_refused_in_one_message(dirty, tmp_path):
    with pytest.raises(DataError) as caught:
        train.run(tiny_language.get_config(str(dirty)), tmp_path)
    message = str(caught.value)
    assert message.startswith(
        f"cannot use 4 of 28 examples of {dirty}/train.jsonl: not JSON (1): li"
    )
    for place in PLACES["train"]:
        assert f": line {place + 1}" in message
    assert "scoring.on_bad_example='drop'" in message


@pytest.mark.slow
def test_the_others_are_as_without_them(clean, dirty, tmp_path):
    expected = train.run(tiny_language.get_config(str(clean)), tmp_path / "clean", "evaluate")
    assert not list((tmp_path / "clean").glob("dropped*"))
    config = tiny_language.get_config(str(dirty))
    config = replace(config, {"scoring.on_bad_example": "drop"})
    with pytest.warns(DataWarning) as caught:
        found = train.run(config, tmp_path / "dirty", "evaluate")
    messages = [str(warning.message) for warning in caught]
    assert [message.split(": ")[0] for message in messages] == [
        f"left out 4 of 28 examples of {dirty}/train.jsonl",
        f"left out 2 of 10 examples of {dirty}/heldout.jsonl",
    ]
    for name, places in PLACES.items():
        lines = (tmp_path / "dirty" / f"dropped_{name}.jsonl").read_text().splitlines()
        rows = [json.loads(line) for line in lines]
        assert [row["id"] for row in rows] == places
        assert [row["where"] for row in rows] == [f"line {place + 1}" for place in places]
        assert {row["source"] for row in rows} == {f"{dirty}/{name}.jsonl"}
        for row, (_, reason) in zip(rows, BAD, strict=False):
            assert row["reason"].startswith(reason)

    # Ids are lines: those of the table, of its weights, and of what is dropped.
    tables = [LossTable.open(tmp_path / name / "loss_table") for name in ("clean", "dirty")]
    kept = np.delete(np.arange(28), PLACES["train"])
    assert tables[1].metadata["dropped_ids"] == PLACES["train"]
    assert np.isnan(tables[1].loss_N()[PLACES["train"]]).all()
    np.testing.assert_array_equal(tables[1].loss_N()[kept], tables[0].loss_N())
    np.testing.assert_array_equal(tables[1].flow_weights()[kept], tables[0].flow_weights())
    assert tables[1].temperature == tables[0].temperature
    # The same examples in the same order: the same model.
    for before, after in zip(expected["language"], found["language"], strict=True):
        same = {"seconds": 0, "inputs": "of these data"}
        assert after | same == before | same


def test_arrays_with_examples_left_out():
    source = TokenSource([1, 2, 3, 4], [0, 2, 2, 4], [1, 0, 1], dropped_ids=[1])
    assert source.num_targets.tolist() == [1, 0, 1] and source[1]["tokens"].size == 0
    assert source.describe().startswith("2 examples, 4 tokens, 2 targets; ")
    with pytest.raises(DataError, match=r"ids \[1\]: no token before the target"):
        TokenSource([1, 2, 3, 4], [0, 2, 2, 4], [1, 0, 1])
    with pytest.raises(DataError, match=r"ids \[0\]: they are in dropped_ids, but have tokens"):
        TokenSource([1, 2, 3, 4], [0, 2, 2, 4], [1, 0, 1], dropped_ids=[0, 1])
    with pytest.raises(DataError, match=r"dropped_ids \[3\] are not below 3"):
        TokenSource([1, 2, 3, 4], [0, 2, 2, 4], [1, 0, 1], dropped_ids=[1, 3])
    with pytest.raises(DataError, match="the data set is empty"):
        TokenSource([], [0, 0], [0], dropped_ids=[0])
    with pytest.raises(DataError, match=r"weight has shape \(2,\); it must have one value an ex"):
        TokenSource([1, 2], [0, 2], [1], weight=[1, 2])
    with pytest.raises(DataError, match=r"ids \[0\]: the weight is negative or not finite"):
        TokenSource([1, 2], [0, 2], [1], weight=[-1])
