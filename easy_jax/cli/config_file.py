"""Parser of `--config=FILE.py:ARG` and `--config.field=value`, with one-line error messages."""

import ast
import dataclasses
import importlib.util
import re
import sys
import traceback
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any, Literal

from absl import flags
from ml_collections import config_flags
from ml_collections.config_flags import tuple_parser

from easy_jax.cli.usage import nearest
from easy_jax.experiments.config import ExperimentConfig
from easy_jax.experiments.language_config import LanguageConfig
from easy_jax.io.checks import ConfigError

_OVERRIDE = re.compile(r"--?(?:no)?(config[.\[][^=]*)")


class ConfigFile(flags.ArgumentParser):
    """Parser of the flag `--config`, which also checks the names of overridden fields."""

    def parse(self, location: str) -> ExperimentConfig | LanguageConfig:
        """Reads `FILE.py` or `FILE.py:ARG`; returns a mutable copy of its configuration.

        Raises:
          ConfigError: the file does not exist or fails, or `sys.argv` sets an unknown field.
        """
        config = read(location)
        for name in _overridden(sys.argv[1:]):
            check_override(config, name)
        return _assignable(config)


class Entries(tuple_parser.TupleParser):
    """Parser of a tuple field's value: `a,b`, `0.1,0.2`, or a Python tuple `("a", "b")`.

    Example:
      >>> Entries().parse("standard,wise_ft_0.5"), Entries().parse("0.1,1"), Entries().parse("")
      (('standard', 'wise_ft_0.5'), (0.1, 1), ())
    """

    def parse(self, argument: Any) -> tuple[Any, ...]:
        if not isinstance(argument, str):
            return super().parse(argument)
        if argument.startswith(("(", "[")):
            value = _literal(argument)
            return tuple(value) if isinstance(value, tuple | list) else (value,)
        words = [word.strip() for word in argument.split(",")]
        return tuple(_literal(word) for word in (words if words[-1] else words[:-1]))


def define(name: str, text: str) -> flags.FlagHolder:
    """Defines the flag for a configuration file, including overrides of its fields."""
    # `Literal` fields are parsed as text; `validate()` checks their values.
    config_flags.register_flag_parser_for_type(Literal, flags.ArgumentParser())
    config_flags.register_flag_parser_for_type(tuple, Entries())
    holder = config_flags.DEFINE_config_file(name, None, text)
    flags.FLAGS[name].parser = ConfigFile()
    return holder


def _assignable(value: Any) -> Any:
    """Returns a mutable copy of a configuration, as ml_collections needs to assign fields."""
    if isinstance(value, tuple):
        return tuple(_assignable(entry) for entry in value)
    if not dataclasses.is_dataclass(value):
        return value
    copies = {field.name: _assignable(getattr(value, field.name)) for field in _fields(value)}
    types = [
        (field.name, type(copy) if dataclasses.is_dataclass(copy) else field.type)
        for field, copy in zip(_fields(value), copies.values(), strict=True)
    ]
    copy = dataclasses.make_dataclass(type(value).__name__, types)(**copies)
    copy.frozen_original = value
    return copy


def frozen(value: Any) -> Any:
    """Returns the frozen configuration of a flag, including the fields that were overridden.

    Args:
      value: the value of a flag defined by `define`; None is returned as None.
    """
    if isinstance(value, tuple):
        return tuple(frozen(entry) for entry in value)
    original = getattr(value, "frozen_original", None)
    if original is None:
        return value
    fields = {field.name: frozen(getattr(value, field.name)) for field in _fields(original)}
    return dataclasses.replace(original, **fields)


def _fields(value: Any) -> tuple[dataclasses.Field[Any], ...]:
    return dataclasses.fields(value)


def read(location: str) -> ExperimentConfig | LanguageConfig:
    """Returns the configuration from the function `get_config` of a file.

    Args:
      location: `FILE.py`; or `FILE.py:ARG`, to call `get_config` with `ARG`.

    Raises:
      ConfigError: the file does not exist, or it fails; the message names file and line.

    Example:
      >>> read("nope.py")
      Traceback (most recent call last):
      easy_jax.io.checks.ConfigError: there is no file nope.py
    """
    name, colon, argument = location.partition(":")
    path = Path(name)
    if not name or path.is_dir():
        raise ConfigError(
            f"--config={location} is not a file; write --config=FILE.py or FILE.py:ARG"
        )
    if not path.exists():
        others = [str(other) for other in sorted(path.parent.glob("*.py"))]
        raise ConfigError(f"there is no file {name}{nearest(name, others) if others else ''}")
    try:
        make = getattr(_module(path), "get_config", None)
        if make is None:
            raise ConfigError(f"{name} has no function get_config that returns the configuration")
        config = make(argument) if colon else make()
    except ConfigError:
        raise
    except SyntaxError as error:
        where = f"{error.filename or name}, line {error.lineno}"
        raise ConfigError(f"{where}: invalid Python: {error.msg}") from error
    except dataclasses.FrozenInstanceError as error:
        raise ConfigError(
            f"{_place(error, path)}: {error}: a configuration is not changed but copied: "
            'config = replace(config, {"finetune.epochs": 3}), with easy_jax.config.replace'
        ) from error
    except Exception as error:
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        raise ConfigError(f"{_place(error, path)}: {reason}") from error
    if not isinstance(config, ExperimentConfig | LanguageConfig):
        raise ConfigError(
            f"get_config of {name} returns {type(config).__name__}; it must be an ExperimentConfig "
            "or a LanguageConfig"
        )
    return config


def check_override(config: Any, name: str) -> None:
    """Checks that a field exists and can be set from the command line.

    Args:
      config: the configuration.
      name: the field, such as `config.heldout[0].path`.

    Raises:
      ConfigError: there is no such field (the message suggests the nearest one), or it is not a
        single value but has fields or entries.
    """
    steps = re.findall(r"\.(\w+)|\[(\d+)\]", name)
    if "config" + "".join(f".{field}" if field else f"[{i}]" for field, i in steps) != name:
        raise ConfigError(
            f"--{name} is not a field; an example of one is --config.heldout[0].path=FILE"
        )
    value, where = config, "config"
    for field, index in steps:
        if field:
            value, where = _field(value, where, field), f"{where}.{field}"
        else:
            value, where = _entry(value, where, int(index)), f"{where}[{index}]"
    if dataclasses.is_dataclass(value):
        first = dataclasses.fields(value)[0].name
        raise ConfigError(f"--{where} has fields; set one of them, such as --{where}.{first}")
    if isinstance(value, tuple) and value and dataclasses.is_dataclass(value[0]):
        raise ConfigError(
            f"--{where} can only be made in the file; set fields of an entry: --{where}[0]"
        )
    if steps and steps[-1][1]:
        whole = where.rpartition("[")[0]
        raise ConfigError(f"--{where} cannot be set alone; give all of them: --{whole}=A,B")


def _field(value: Any, where: str, field: str) -> Any:
    if not dataclasses.is_dataclass(value):
        raise ConfigError(f"{where} is {value!r}; it has no field {field}")
    names = [each.name for each in dataclasses.fields(value)]
    if field not in names:
        kind = type(value).__name__
        raise ConfigError(f"{where} ({kind}) has no field {field}{nearest(field, names)}")
    return getattr(value, field)


def _entry(value: Any, where: str, index: int) -> Any:
    if not isinstance(value, tuple):
        raise ConfigError(f"{where} is {value!r}, not a list: {where}[{index}] does not exist")
    if index >= len(value):
        there = f"ends with [{len(value) - 1}]" if value else "is empty in the file"
        raise ConfigError(f"{where}[{index}] does not exist: {where} {there}")
    return value[index]


def _overridden(arguments: list[str]) -> Iterator[str]:
    """Yields the fields that a command line overrides, as `config.field`."""
    for argument in arguments:
        if argument == "--":
            return
        found = _OVERRIDE.match(argument)
        if found:
            yield found[1]


def _literal(text: str) -> Any:
    """Returns the value of a Python literal, or the text itself if it is not a literal."""
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return text


def _module(path: Path) -> ModuleType:
    name = "easy_jax_configuration"
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None:
        raise ConfigError(f"{path} is not a Python file: its name must end in .py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses look up their module there
    spec.loader.exec_module(module)
    return module


def _place(error: Exception, path: Path) -> str:
    """Returns the file and the number of its last line in an error's traceback."""
    frames = traceback.extract_tb(error.__traceback__)
    lines = [frame.lineno for frame in frames if frame.filename == str(path)]
    return f"{path}, line {lines[-1]}" if lines else str(path)
