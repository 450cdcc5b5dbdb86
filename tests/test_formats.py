"""Formats of data: a new one is a class and a line; unknown ones suggest the nearest."""

import csv
import subprocess
import sys
from pathlib import Path

import pytest

from easy_jax.config import ConfigError, ImageDataConfig, InstructionsConfig
from easy_jax.data.bad_examples import BadExamples
from easy_jax.data.formats import IMAGE_FORMATS, TEXT_FORMATS
from easy_jax.data.sources import DataError, DataWarning
from easy_jax.data.text_formats import TextFormat


class CsvFolder(TextFormat):
    """A folder of CSV files, in order of name."""

    def records(self, config):
        for file in sorted(Path(config.path).glob("*.csv")):
            with file.open(newline="", encoding="utf-8") as lines:
                yield from csv.DictReader(lines)


@pytest.fixture
def csv_format(monkeypatch):
    monkeypatch.setitem(TEXT_FORMATS._entries, "csv", CsvFolder())


def test_a_new_format_reads_records_in_order(csv_format, tmp_path):
    (tmp_path / "2.csv").write_text("q,a,note\n1 + 1,2,\n")
    (tmp_path / "1.csv").write_text("q,a,note\n2 + 2,4,x\n3 + 3,6,\n")
    config = InstructionsConfig("csv", str(tmp_path), instruction_field="q", response_field="a")
    config.validate("train")
    with pytest.warns(DataWarning, match="note"):
        columns = TEXT_FORMATS[config.format].read(config, ["q", "a"], ["w"], BadExamples())
    assert columns == {
        "q": ["2 + 2", "3 + 3", "1 + 1"],
        "a": ["4", "6", "2"],
        "w": [None, None, None],
    }


def test_a_new_format_has_the_checks_of_the_others(csv_format, tmp_path):
    with pytest.raises(ConfigError, match=r"train\.path is ''; it must be a file or folder"):
        InstructionsConfig("csv").validate("train")
    (tmp_path / "1.csv").write_text("q,b\n2 + 2,4\n")
    config = InstructionsConfig("csv", str(tmp_path), instruction_field="q", response_field="a")
    with pytest.raises(DataError, match="no field 'a' in any record"):
        TEXT_FORMATS["csv"].read(config, ["q", "a"], [], BadExamples())


def test_unknown_formats_suggest_the_nearest():
    with pytest.raises(ConfigError, match=r"train\.format is 'json'; did you mean 'jsonl'"):
        InstructionsConfig("json", "x").validate("train")
    with pytest.raises(ConfigError, match=r"data\.format is 'folders'; did you mean 'folder'"):
        ImageDataConfig(format="folders", path="x").validate()
    assert list(TEXT_FORMATS) == ["jsonl", "parquet", "tfds", "gsm_symbolic"]
    assert list(IMAGE_FORMATS) == ["tfds", "folder", "parquet"]


def test_validation_loads_no_library_that_reads_data():
    code = (
        "import sys; from easy_jax.config import InstructionsConfig, ImageDataConfig\n"
        "InstructionsConfig(path='x').validate('train'); ImageDataConfig(path='x').validate()\n"
        "print(sorted({'jax', 'pyarrow', 'PIL', 'tokenizers', 'grain'} & sys.modules.keys()))"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout == "[]\n"
