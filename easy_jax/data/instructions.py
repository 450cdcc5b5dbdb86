"""The text of a language experiment: instructions and responses, and general English text."""

import importlib
import inspect
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from easy_jax.data import text
from easy_jax.data.bad_examples import BadExamples
from easy_jax.data.config import InstructionsConfig, TextConfig
from easy_jax.data.formats import TEXT_FORMATS
from easy_jax.data.packing import PackedSource
from easy_jax.data.sources import DataError

_MODULES = (
    "argparse",
    "collections",
    "contextlib",
    "dataclasses",
    "datetime",
    "decimal",
    "difflib",
    "fractions",
    "functools",
    "heapq",
    "random",
    "statistics",
    "string",
    "textwrap",
    "typing",
)
_INSTALL = 'pip install ".[smollm2]"'


def load(
    config: InstructionsConfig,
    text_config: TextConfig,
    tokenizer: Tokenizer,
    bad: BadExamples | None = None,
) -> PackedSource:
    """Reads instructions and responses, tokenised and packed.

    Args:
      config: where they come from.
      text_config, tokenizer: of the model.
      bad: collects unusable examples by id (from 0 at `config.start`); see `text.tokenize`.

    Raises:
      DataError: as the readers and `tokenize` in `easy_jax.data.text`; or too few records.
    """
    bad = BadExamples() if bad is None else bad
    columns = read(config, bad)
    examples = text.tokenize(
        columns[config.instruction_field],
        columns[config.response_field],
        tokenizer,
        eos_token=text_config.eos_token,
        template=text_config.template,
        inputs=columns.get(config.input_field),
        input_template=text_config.input_template,
        weights=columns.get(config.weight_field),
        token_weights=columns.get(config.token_weight_field),
        max_length=text_config.max_length,
        bos_token=text_config.bos_token or None,
        border=text_config.border,
        bad=bad,
    )
    return PackedSource(examples, text_config.row_length, text_config.max_segments)


def read(config: InstructionsConfig, bad: BadExamples) -> dict[str, list[Any]]:
    """Reads the columns of the configured records, by the names of their fields.

    Raises:
      DataError: as the readers of `easy_jax.data.records`; too few records.
    """
    fields = [config.instruction_field, config.response_field]
    columns = TEXT_FORMATS[config.format].read(config, fields, config.optional_fields(), bad)
    size = len(columns[fields[0]])
    stop = config.start + config.size if config.size else size
    if stop > size or config.start >= size:
        where = config.path or config.format
        raise DataError(
            f"{where} has {size} records; start={config.start} and size={config.size} ask for more"
        )
    bad.only(config.start, stop)
    return {name: values[config.start : stop] for name, values in columns.items()}


def general(
    name: str, characters: int, text_config: TextConfig, tokenizer: Tokenizer
) -> PackedSource:
    """Returns plain English text in rows, to measure what a model forgets.

    Args:
      name: `verne` (a story by Jules Verne, which reasoning-gym ships), `docstrings` (of
        Python's standard library), or a text file.
      characters: the number of characters to use, from the beginning.
      text_config, tokenizer: of the model.

    Raises:
      DataError: a file that cannot be read.
    """
    source = text.plain_text(
        [_general_text(name)[:characters]],
        tokenizer,
        length=text_config.row_length + 1,
        bos_token=text_config.bos_token or None,
    )
    return PackedSource(source, text_config.row_length, 1)


def _general_text(name: str) -> str:
    if name == "verne":
        try:
            from reasoning_gym.data import read_data_file
        except ImportError as error:
            raise DataError(f"the text 'verne' needs reasoning-gym: {_INSTALL}") from error
        return read_data_file("in_the_year_2889.txt")
    if name == "docstrings":
        return "\n\n".join(_docstrings())
    try:
        return Path(name).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"cannot read the text {name}: {error}") from error


def _docstrings() -> Iterator[str]:
    """Yields docstrings of modules and of what they define, each once, in order of name."""
    for name in _MODULES:
        module = importlib.import_module(name)
        members = [getattr(module, member) for member in sorted(vars(module))]
        own = [m for m in members if getattr(m, "__module__", None) == name]
        for thing in [module, *own]:
            doc = inspect.getdoc(thing)
            if doc:
                yield doc
