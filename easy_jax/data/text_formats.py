"""Formats of instructions and responses, which check a configuration and read records."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

from easy_jax.io.checks import require

if TYPE_CHECKING:
    from easy_jax.data.bad_examples import BadExamples
    from easy_jax.data.records import Columns

_INSTALL = 'pip install ".[smollm2]"'


class TextFormat:
    """A format of text records. A new format defines `records`; see `formats.py`.

    In all methods, `config` is an `InstructionsConfig`.

    Attributes:
      needs: maps fields of the configuration that may not be empty to what they must be.
    """

    needs: ClassVar[Mapping[str, str]] = {"path": "a file or folder"}

    def check(self, config: Any, path: str) -> None:
        """Raises ConfigError if fields do not fit the format; `path` is the config's place."""
        for name, expected in self.needs.items():
            value = getattr(config, name)
            require(bool(value), f"{path}.{name}", value, expected)

    def records(self, config: Any) -> Iterable[Mapping[str, Any]]:
        """Returns the records in order, each with all its fields; raises DataError."""
        raise NotImplementedError

    def read(
        self, config: Any, fields: Sequence[str], optional: Sequence[str], bad: BadExamples
    ) -> Columns:
        """Returns the values of fields; a format that can read single columns overrides it.

        Args:
          config: where the records are.
          fields: names that every record has, with strings.
          optional: names that records may have; None for records without them.
          bad: collects the records that cannot be used.
        """
        from easy_jax.data.records import read_records

        return read_records(self.records(config), config.path, fields, optional=optional, bad=bad)


class JsonLines(TextFormat):
    """A file with one JSON object per line."""

    def read(
        self, config: Any, fields: Sequence[str], optional: Sequence[str], bad: BadExamples
    ) -> Columns:
        from easy_jax.data.records import read_jsonl

        return read_jsonl(config.path, fields, optional=optional, bad=bad)


class Parquet(TextFormat):
    """A Parquet file, or a folder of them."""

    def read(
        self, config: Any, fields: Sequence[str], optional: Sequence[str], bad: BadExamples
    ) -> Columns:
        from easy_jax.data.records import read_parquet

        return read_parquet(config.path, fields, optional=optional, bad=bad)


class Tfds(TextFormat):
    """A split of a prepared TensorFlow Datasets data set."""

    needs: ClassVar[Mapping[str, str]] = {**TextFormat.needs, "name": "a data set's name"}

    def read(
        self, config: Any, fields: Sequence[str], optional: Sequence[str], bad: BadExamples
    ) -> Columns:
        from easy_jax.data.records import read_tfds

        return read_tfds(config.name, config.split, config.path, fields, optional=optional, bad=bad)


class GsmSymbolic(TextFormat):
    """Grade-school problems with worked answers, which `reasoning-gym` generates from `seed`."""

    needs: ClassVar[Mapping[str, str]] = {"size": "the number of problems to generate"}

    def check(self, config: Any, path: str) -> None:
        named = [config.instruction_field, config.response_field, *config.optional_fields()]
        require(len(named) == 2, f"{path}'s fields", named, "an instruction and a response")
        super().check(config, path)

    def read(
        self, config: Any, fields: Sequence[str], optional: Sequence[str], bad: BadExamples
    ) -> Columns:
        from easy_jax.data.sources import DataError

        try:
            import reasoning_gym
        except ImportError as error:
            raise DataError(f"gsm_symbolic needs reasoning-gym: {_INSTALL}") from error
        size = config.start + config.size
        problems = reasoning_gym.create_dataset("gsm_symbolic", size=size, seed=config.seed)
        instruction, response = fields
        return {
            instruction: [problems[i]["question"] for i in range(size)],
            response: [problems[i]["metadata"]["answer_cot"] for i in range(size)],
        }
