"""The command line: `easy-jax run --config=configs/x.py:arg --config.field=value`."""

import logging
import sys
import traceback
from typing import Literal

from absl import app, flags
from absl import logging as absl_logging
from ml_collections import config_flags

from easy_jax import distributed, theory_report, train
from easy_jax.ahead_of_time import command as ahead_of_time
from easy_jax.config import ConfigError, ExperimentConfig, LanguageConfig
from easy_jax.errors import USER_ERRORS
from easy_jax.peers import EXIT_PEERS, PeersError
from easy_jax.terminal import print_whatever_the_encoding

COMMANDS: dict[str, train.Until] = {
    "run": "report",
    "compare": "report",
    "score": "score",
    "train": "train",
    "export": "export",
    "evaluate": "evaluate",
    "report": "report",
}
# Fields with a choice of words are given as text; `validate()` names the options.
config_flags.register_flag_parser_for_type(Literal, flags.ArgumentParser())
_CONFIG = config_flags.DEFINE_config_file("config", None, "A file of configs/, with :argument.")
_WORKDIR = flags.DEFINE_string("workdir", None, "Output folder; default: runs/<name>.")
_COORDINATOR = flags.DEFINE_string(
    "coordinator_address", None, "HOST:PORT of process 0, where no cluster tells."
)
_PROCESSES = flags.DEFINE_integer("num_processes", None, "How many processes there are.")
_PROCESS = flags.DEFINE_integer("process_id", None, "Which of them this one is, from 0.")
_TIMEOUT = flags.DEFINE_float("peer_timeout", 300.0, "Seconds to wait for the other processes.")
_TOPOLOGY = flags.DEFINE_string("topology", None, "compile: chips such as v5e:4x4.")
_PROGRAM = flags.DEFINE_enum("program", "all", ahead_of_time.WHAT, "compile: which steps.")
_LARGEST = flags.DEFINE_bool("largest_batch", False, "compile: also the largest that fits.")
_JSON = flags.DEFINE_bool("json", False, "compile: print JSON, not a table.")
_USAGE = (
    f"usage: easy-jax {{{','.join(COMMANDS)}}} --config=configs/FILE.py[:ARG] [--workdir=DIR]\n"
    "       easy-jax compile --config=configs/FILE.py[:ARG] --topology=v5e:4x4 [--program=train]\n"
    "           [--largest_batch] [--json] [--workdir=DIR]\n"
    "       easy-jax theory [--workdir=DIR]"
)


def main(argv: list[str]) -> None:
    """Runs a sub-command; absl has parsed the flags."""
    absl_logging.set_verbosity(absl_logging.ERROR)  # Orbax tells every save at INFO
    logging.getLogger("jax").setLevel(logging.ERROR)
    if argv[1:] == ["theory"] and _CONFIG.value is None:
        if not theory_report.run(_WORKDIR.value or "runs/theory")["all_hold"]:
            sys.exit(1)
        return
    topology = _TOPOLOGY.value or ""
    compiles = argv[1:] == ["compile"] and bool(topology)
    if len(argv) != 2 or _CONFIG.value is None or not (compiles or argv[1] in COMMANDS):
        raise app.UsageError(_USAGE)
    config = _CONFIG.value
    if not isinstance(
        config, ExperimentConfig | LanguageConfig
    ):  # also what absl gives for a missing file
        name = config_flags.get_config_filename(flags.FLAGS["config"])
        raise ConfigError(f"there is no experiment's configuration in the file {name}")
    if compiles:
        ahead_of_time.restart(topology)
        if not ahead_of_time.run(
            config, topology, what=_PROGRAM.value or "all", with_largest_batch=_LARGEST.value,
            as_json=_JSON.value, directory=_WORKDIR.value,
        ):  # fmt: skip
            sys.exit(1)
        return
    distributed.initialize(
        _COORDINATOR.value, _PROCESSES.value, _PROCESS.value, timeout=_TIMEOUT.value
    )
    distributed.stop_on_sigterm()
    code = 0
    try:
        train.run(config, _WORKDIR.value or f"runs/{config.name}", COMMANDS[argv[1]])
    except distributed.Stopped as stop:
        print(f"easy-jax: {stop}; the same command again continues", file=sys.stderr)
        code = distributed.EXIT_STOPPED
    distributed.shutdown()
    sys.exit(code)


def _parse(argv: list[str]) -> list[str]:
    """absl's flags; whatever is wrong with them, or in a config file, is the user's to mend."""
    try:
        return flags.FLAGS(argv)
    except (flags.Error, ConfigError, KeyError, OSError) as error:
        text = str(error.args[0] if error.args else error).strip()
        raise ConfigError(text.splitlines()[-1]) from error


def cli() -> None:
    """The `easy-jax` console script: errors that a user can mend are one line, exit code 2."""
    print_whatever_the_encoding()
    try:
        app.run(main, flags_parser=_parse)
    except PeersError as error:
        print(f"easy-jax: {error}", file=sys.stderr)
        sys.exit(EXIT_PEERS)
    except USER_ERRORS as error:
        print(f"easy-jax: {error}", file=sys.stderr)
        distributed.abort(2, str(error))
    except KeyboardInterrupt:
        distributed.abort(130, "interrupted from the keyboard")
    except Exception as error:
        traceback.print_exc()
        distributed.abort(1, f"{type(error).__name__}: {error}")


if __name__ == "__main__":
    cli()
