"""Workdirs: folders for all outputs of one experiment configuration."""

import dataclasses
import json
import os
import secrets
from pathlib import Path
from typing import Any

import jax

from easy_jax.core.config import FORMER_ANCHORS
from easy_jax.experiments.config import ExperimentConfig
from easy_jax.experiments.language_config import LanguageConfig
from easy_jax.io import checks, files, sealed
from easy_jax.io.checks import ConfigError
from easy_jax.parallel import processes
from easy_jax.parallel.rendezvous import name_processes

_FIX = "delete the workdir or choose another with --workdir"


def open_workdir(
    config: ExperimentConfig | LanguageConfig, workdir: str | os.PathLike[str]
) -> Path:
    """Creates a workdir for a configuration, or checks that an existing one belongs to it.

    Raises:
      ConfigError: the path cannot be used or written, the folder is not shared by all processes,
        or it belongs to another configuration (the message names the fields that differ).
    """
    workdir = files.path(workdir)
    files.check_folder(workdir)
    path = workdir / "config.json"
    ours = json.loads(checks.to_json(config))

    def stored() -> Any:
        if not path.exists():
            sealed.write(path, ours)
        found = files.read_json(path, ConfigError, _FIX)
        # Older versions wrote no checksum; their configurations are compared, too.
        return sealed.unseal(found, path, ConfigError, _FIX) if sealed.KEY in found else found

    try:
        workdir.mkdir(parents=True, exist_ok=True)
        found = processes.broadcast("opening the workdir", stored)
        _check_shared(workdir)
        (workdir / "checkpoints").mkdir(exist_ok=True)
        if files.is_local(workdir) and not os.access(workdir, os.W_OK):
            raise PermissionError(f"no permission to write in {workdir}")
    except OSError as error:
        raise ConfigError(
            f"cannot write to the workdir {workdir}: {error}; choose another with --workdir"
        ) from error
    differences = checks.differences(ours, _today(config, found))
    if differences:
        raise ConfigError(
            f"the workdir {workdir} belongs to another configuration: {'; '.join(differences)}. "
            "Choose another with --workdir, or delete it"
        )
    return workdir


def _today(config: Any, found: Any) -> Any:
    """Converts a stored configuration to the current fields; missing ones get their defaults.

    Args:
      config: the current configuration, a dataclass or a tuple of dataclasses.
      found: the stored configuration, as it was read.
    """
    if isinstance(config, tuple) and isinstance(found, list) and len(config) == len(found):
        return [_today(*pair) for pair in zip(config, found, strict=True)]
    if not dataclasses.is_dataclass(config) or not isinstance(found, dict):
        return found
    result = {}
    for field in dataclasses.fields(config):
        if field.name in found:
            result[field.name] = _today(getattr(config, field.name), found[field.name])
        elif field.default is not dataclasses.MISSING:
            result[field.name] = json.loads(json.dumps(field.default, default=dataclasses.asdict))
    if isinstance(result.get("anchor"), str):
        result["anchor"] = FORMER_ANCHORS.get(result["anchor"], result["anchor"])
    return {**found, **result}


def _check_shared(workdir: Path) -> None:
    """Raises ConfigError, in all processes, if one does not see a file that process 0 writes.

    The file's name is new each time: for a name that was looked up before, a network file system
    may cache for a minute that it does not exist.
    """
    if jax.process_count() == 1:
        return

    def write() -> str:
        mark = workdir / f".mark-{secrets.token_hex(8)}"
        mark.write_bytes(b"")
        return mark.name

    mark = workdir / processes.broadcast("marking the workdir", write)
    seen = processes.gather("looking for the mark in the workdir", mark.exists())
    if processes.is_main_process():
        mark.unlink()
    blind = [index for index, found in enumerate(seen) if not found]
    if blind:
        raise ConfigError(
            f"{name_processes(blind)} cannot see what process 0 writes into the workdir "
            f"{workdir}; it must be a folder that all share: choose another with --workdir"
        )
