"""The command line: `easy-jax run --config=configs/x.py:arg --config.field=value`."""

import logging
import sys

from absl import app, flags
from absl import logging as absl_logging
from ml_collections import config_flags

from easy_jax import train
from easy_jax.errors import USER_ERRORS

COMMANDS: dict[str, train.Until] = {
    "run": "report",
    "score": "score",
    "train": "train",
    "evaluate": "evaluate",
    "report": "report",
}
_CONFIG = config_flags.DEFINE_config_file("config", None, "A file of configs/, with :argument.")
_WORKDIR = flags.DEFINE_string("workdir", None, "Output folder; default: runs/<name>.")
_USAGE = f"usage: easy-jax {{{','.join(COMMANDS)}}} --config=configs/FILE.py[:ARG] [--workdir=DIR]"


def main(argv: list[str]) -> None:
    """Runs a sub-command; absl has parsed the flags."""
    if len(argv) != 2 or argv[1] not in COMMANDS or _CONFIG.value is None:
        raise app.UsageError(_USAGE)
    absl_logging.set_verbosity(absl_logging.ERROR)  # Orbax tells every save at INFO
    logging.getLogger("jax").setLevel(logging.ERROR)
    config = _CONFIG.value
    train.run(config, _WORKDIR.value or f"runs/{config.name}", COMMANDS[argv[1]])


def cli() -> None:
    """The `easy-jax` console script: errors that a user can mend are one line, exit code 2."""
    try:
        app.run(main)
    except (*USER_ERRORS, KeyError, FileNotFoundError) as error:
        if isinstance(error, KeyError) and "not found on dataclass" not in str(error):
            raise
        message = error.args[0] if isinstance(error, KeyError) else error
        print(f"easy-jax: {message}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    cli()
