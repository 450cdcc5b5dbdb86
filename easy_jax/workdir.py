"""The folder of an experiment's outputs, which belongs to one configuration."""

import json
import os
from pathlib import Path

from easy_jax import config as config_lib
from easy_jax import distributed, files
from easy_jax.config import ConfigError, ExperimentConfig, LanguageConfig


def open_workdir(
    config: ExperimentConfig | LanguageConfig, workdir: str | os.PathLike[str]
) -> Path:
    """Makes a workdir for a configuration, or checks that an existing one belongs to it.

    Raises:
      ConfigError: it cannot be written, or belongs to another configuration (the fields
        that differ are named).
    """
    workdir = files.path(workdir)
    path = workdir / "config.json"
    text = config_lib.to_json(config)
    try:
        workdir.mkdir(parents=True, exist_ok=True)
        if distributed.leads() and not path.exists():
            files.write(path, text + "\n")
        distributed.barrier("opening the workdir")
        found = json.loads(path.read_text())
        (workdir / "checkpoints").mkdir(exist_ok=True)
        if files.is_local(workdir) and not os.access(workdir, os.W_OK):
            raise PermissionError(f"no permission to write in {workdir}")
    except OSError as error:
        raise ConfigError(
            f"cannot write to the workdir {workdir}: {error}; choose another with --workdir"
        ) from error
    except json.JSONDecodeError as error:
        raise ConfigError(
            f"{path} is not JSON: {error}; delete the workdir or choose another with --workdir"
        ) from error
    differences = config_lib.differences(json.loads(text), found)
    if differences:
        raise ConfigError(
            f"the workdir {workdir} belongs to another configuration: {'; '.join(differences)}. "
            "Choose another with --workdir, or delete it"
        )
    return workdir
