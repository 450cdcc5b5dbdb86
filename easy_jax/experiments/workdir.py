"""The folder of an experiment's outputs, which belongs to one configuration."""

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
    """Makes a workdir for a configuration, or checks that an existing one belongs to it.

    Raises:
      ConfigError: its path cannot be used, it cannot be written, is not shared by all processes,
        or belongs to another configuration (the fields that differ are named).
    """
    workdir = files.path(workdir)
    files.check_folder(workdir)
    path = workdir / "config.json"
    ours = json.loads(checks.to_json(config))

    def stored() -> Any:
        if not path.exists():
            sealed.write(path, ours)
        found = files.read_json(path, ConfigError, _FIX)
        # Without a checksum it is of an older version, and compared all the same.
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
    """A stored configuration in the fields of today: those it does not have at their defaults.

    Args:
      config: the dataclass, or the tuple of them, that it is compared with.
      found: as it was read.
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
    """Raises ConfigError, in all processes, if one does not see what process 0 writes.

    It is written under a new name: a network file system may remember for a minute of a name
    that was looked for before that it is not there.
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
