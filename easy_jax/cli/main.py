"""The command line: `easy-jax run --config=configs/x.py:arg --config.field=value`.

Slow modules are imported inside the commands, so that help and error messages appear at once.
"""

import importlib.metadata
import logging
import sys
import traceback
import warnings
from typing import TYPE_CHECKING, Any

from absl import flags

from easy_jax.cli import config_file, usage
from easy_jax.cli.usage import OPTIONS, UsageError
from easy_jax.experiments.config import ExperimentConfig
from easy_jax.experiments.language_config import LanguageConfig
from easy_jax.io.checks import ConfigError
from easy_jax.io.terminal import print_whatever_the_encoding

if TYPE_CHECKING:
    from easy_jax.experiments.language import Until

UNTIL: "dict[str, Until]" = {
    "run": "report",
    "compare": "report",
    "score": "score",
    "train": "train",
    "export": "export",
    "evaluate": "evaluate",
    "report": "report",
}


def _text(name: str) -> str:
    return OPTIONS[name].text


_CONFIG = config_file.define("config", _text("config"))
_WORKDIR = flags.DEFINE_string("workdir", None, _text("workdir"))
_COORDINATOR = flags.DEFINE_string("coordinator_address", None, _text("coordinator_address"))
_PROCESSES = flags.DEFINE_integer("num_processes", None, _text("num_processes"))
_PROCESS = flags.DEFINE_integer("process_id", None, _text("process_id"))
_TIMEOUT = flags.DEFINE_float("peer_timeout", 300.0, _text("peer_timeout"))
_TAKE_OVER = flags.DEFINE_bool("take-over", False, _text("take-over"))
flags.DEFINE_alias("take_over", "take-over")  # with an underscore, like other flags
_WEIGHTING = flags.DEFINE_string("weighting", "flow", _text("weighting"))
_OUTPUT = flags.DEFINE_string("output", None, _text("output"))
_TOPOLOGY = flags.DEFINE_string("topology", None, _text("topology"))
_PROGRAM = flags.DEFINE_enum("program", "all", ["all", "train", "score"], _text("program"))
_LARGEST = flags.DEFINE_bool("largest_batch", False, _text("largest_batch"))
_JSON = flags.DEFINE_bool("json", False, _text("json"))


def cli() -> None:
    """Runs the `easy-jax` console script; prints user errors as one line, with exit code 2."""
    print_whatever_the_encoding()
    warnings.showwarning = _Warnings()
    try:
        text = information(sys.argv[1:])
        if text is None:
            _run(parse(sys.argv))
        else:
            print(text)
    except (UsageError, ConfigError) as error:
        print(f"easy-jax: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:  # before the run has started
        print("easy-jax: interrupted", file=sys.stderr)
        sys.exit(130)


def information(arguments: list[str]) -> str | None:
    """Returns the output of `--help`, `--version` or `help`; None if none of them is given.

    Raises:
      UsageError: help is requested for a command that does not exist.
    """
    before = arguments[: arguments.index("--")] if "--" in arguments else arguments
    words = [argument for argument in before if not argument.startswith("-")]
    asked = {argument.lstrip("-") for argument in before if argument.startswith("-")}
    if "version" in asked:
        return f"easy-jax {importlib.metadata.version('easy-jax')}"
    if words[:1] == ["help"]:
        return usage.help_text(words[1] if len(words) > 1 else None)
    if asked & {"help", "h", "helpfull", "helpshort"}:
        return usage.help_text(next((word for word in words if word in usage.COMMANDS), None))
    return None


def parse(argv: list[str]) -> str:
    """Parses absl's flags, before and after the sub-command; returns the sub-command.

    Raises:
      UsageError: a command or flag is unknown, or a required one is missing.
      ConfigError: the configuration is invalid.
    """
    if len(argv) > 1 and not argv[1].startswith("-"):
        usage.find_command(argv[1])  # report an unknown command before any wrong flag
    words = _parse_flags(argv)[1:]
    if not words:
        raise UsageError(
            f"no command given; choose from {', '.join(usage.COMMANDS)} (easy-jax --help)"
        )
    command = usage.find_command(words[0])
    if len(words) > 1:
        file = f"; give a file as --config={words[1]}" if ".py" in words[1] else ""
        raise UsageError(f"unexpected argument {words[1]!r}{file}")
    if flags.FLAGS["config"].present > 1:
        raise UsageError("--config is given twice")
    if command.needs_config and _CONFIG.value is None:
        example = command.examples[0]
        raise UsageError(f"{words[0]} needs --config=FILE.py, such as: easy-jax {example}")
    options = {*usage.options_of(words[0])}
    for name in OPTIONS:
        if name in flags.FLAGS and flags.FLAGS[name].present and name not in options:
            raise UsageError(f"{words[0]} has no --{name} (easy-jax {words[0]} --help)")
    if words[0] == "compile" and not _TOPOLOGY.value:
        raise UsageError(f"compile needs --topology, such as: easy-jax {command.examples[0]}")
    if words[0] == "export-weights":
        usage.parse_weighting(_WEIGHTING.value)
    if command.needs_config:
        config_file.frozen(_CONFIG.value).validate()
    return words[0]


def _parse_flags(argv: list[str]) -> list[str]:
    """Parses the flags with absl; shortens errors of absl and of the configuration to one line."""
    try:
        return flags.FLAGS(argv)
    except flags.UnrecognizedFlagError as error:
        if error.flagname.startswith("config."):
            raise UsageError(f"--{error.flagname} needs --config=FILE.py before it") from error
        raise UsageError(usage.unknown_flag(error.flagname)) from error
    except (flags.Error, ConfigError) as error:
        if isinstance(error.__context__, ConfigError):  # absl has wrapped it
            raise error.__context__ from error
        raise UsageError(" ".join(str(error).split())) from error


def main(command: str) -> int:
    """Runs a sub-command with the parsed flags and returns the exit code."""
    config: ExperimentConfig | LanguageConfig | Any = config_file.frozen(_CONFIG.value)
    if command == "theory":
        from easy_jax.report import theory as theory_report

        return 0 if theory_report.run(_WORKDIR.value or "runs/theory")["all_hold"] else 1
    if command == "compile":
        from easy_jax.ahead_of_time import command as ahead_of_time

        topology = _TOPOLOGY.value or ""  # `parse` has checked that it is not empty
        ahead_of_time.restart(topology)
        fits = ahead_of_time.run(
            config,
            topology,
            what=_PROGRAM.value or "all",
            with_largest_batch=_LARGEST.value,
            as_json=_JSON.value,
            directory=_WORKDIR.value,
        )
        return 0 if fits else 1
    from easy_jax import pipeline as train
    from easy_jax.parallel import processes

    processes.initialize(
        _COORDINATOR.value, _PROCESSES.value, _PROCESS.value, timeout=_TIMEOUT.value
    )
    processes.stop_on_sigterm()
    code = 0
    workdir, take_over = _WORKDIR.value or f"runs/{config.name}", bool(_TAKE_OVER.value)
    try:
        if command == "export-weights":
            name, options = usage.parse_weighting(_WEIGHTING.value)
            train.export_weights(config, workdir, name, options, _OUTPUT.value, take_over=take_over)
        else:
            train.run(config, workdir, UNTIL[command], take_over=take_over)
    except processes.Stopped as stop:
        print(f"easy-jax: {stop}; run the same command again to continue", file=sys.stderr)
        code = processes.EXIT_STOPPED
    processes.shutdown()
    return code


def _run(command: str) -> None:
    """Runs a sub-command and exits with its code; an error also ends the other processes."""
    from absl import logging as absl_logging

    from easy_jax.cli.errors import USER_ERRORS
    from easy_jax.parallel import processes
    from easy_jax.parallel.rendezvous import EXIT_PEERS, PeersError

    absl_logging.use_absl_handler()
    absl_logging.get_absl_handler().addFilter(_is_no_interruption)
    absl_logging.set_verbosity(absl_logging.ERROR)  # Orbax logs every save at INFO
    logging.getLogger("jax").setLevel(logging.ERROR)
    try:
        sys.exit(main(command))
    except PeersError as error:
        print(f"easy-jax: {error}", file=sys.stderr)
        sys.exit(EXIT_PEERS)
    except USER_ERRORS as error:
        print(f"easy-jax: {error}", file=sys.stderr)
        processes.abort(2, str(error))
    except KeyboardInterrupt as stop:
        place = str(stop) or "interrupted"
        print(f"easy-jax: {place}; the same command continues", file=sys.stderr)
        processes.abort(130, "interrupted from the keyboard", at_once=True)
    except Exception as error:
        traceback.print_exc()
        processes.abort(1, f"{type(error).__name__}: {error}")


def _is_no_interruption(record: logging.LogRecord) -> bool:
    """Hides the traceback that Orbax logs if Ctrl-C interrupts a save; `_run` prints one line."""
    return not record.exc_info or record.exc_info[0] is not KeyboardInterrupt


class _Warnings:
    """Replacement for `warnings.showwarning` that prints each warning once, in one line."""

    def __init__(self) -> None:
        self._told: set[str] = set()

    def __call__(self, message: Warning | str, *_: Any, **__: Any) -> None:
        text = " ".join(str(message).split())
        if text not in self._told:
            self._told.add(text)
            print(f"easy-jax: warning: {text}", file=sys.stderr)


if __name__ == "__main__":
    cli()
