"""The command `easy-jax compile`, which compiles a configuration's programs for a TPU topology.

libtpu conflicts with other backends in one process, and reads its settings when it is loaded.
The command therefore restarts itself in a new process, configured before JAX is imported.
"""

import importlib.util
import json
import os
import sys
from typing import Any

from jax.experimental import topologies
from jax.sharding import Mesh

from easy_jax.ahead_of_time import image_programs, language_programs
from easy_jax.ahead_of_time.chips import Topology, parse_topology
from easy_jax.ahead_of_time.measure import Measured, largest_batch, measure, table
from easy_jax.ahead_of_time.programs import Lowering
from easy_jax.experiments.config import ExperimentConfig
from easy_jax.experiments.language_config import LanguageConfig
from easy_jax.io import files
from easy_jax.io.checks import ConfigError
from easy_jax.parallel import sharding

_CHILD = "EASY_JAX_COMPILES_FOR"
WHAT = ("all", "train", "score")


def environment(topology: Topology) -> dict[str, str]:
    """Returns the environment variables with which libtpu compiles without a TPU, without logs."""
    return {
        _CHILD: topology.name,
        "JAX_PLATFORMS": "cpu",
        "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
        "TPU_ACCELERATOR_TYPE": topology.accelerator_type,
        "TPU_MIN_LOG_LEVEL": "2",
        "TPU_SKIP_MDS_QUERY": "1",
        "TPU_STDERR_LOG_LEVEL": "2",
        "TPU_WORKER_HOSTNAMES": "localhost",
        "TPU_WORKER_ID": "0",
    }


def restart(topology_name: str) -> None:
    """Replaces this process by one that is configured for libtpu, unless it is one already.

    Raises:
      ConfigError: the topology is unknown, or libtpu is not installed.
    """
    topology = parse_topology(topology_name)
    if importlib.util.find_spec("libtpu") is None:
        raise ConfigError("compile needs libtpu, the TPU compiler: pip install 'easy-jax[tpu]'")
    if os.environ.get(_CHILD) != topology.name:
        arguments = [sys.executable, "-m", "easy_jax.main", *sys.argv[1:]]
        os.execve(sys.executable, arguments, {**os.environ, **environment(topology)})


def devices(topology: Topology) -> list[Any]:
    """Returns descriptions of the chips of a topology, as JAX devices.

    Raises:
      ConfigError: libtpu does not know the topology.
    """
    # By default libtpu assumes 2x2 chips per host; smaller slices have fewer.
    host = [*(min(2, size) for size in topology.sizes[:2]), 1]
    try:
        found = topologies.get_topology_desc(
            platform="tpu", topology_name=topology.name, chips_per_host_bounds=host
        )
    except Exception as error:
        reason = str(error).splitlines()[0]
        raise ConfigError(f"topology is {topology.name!r}; libtpu says: {reason}") from error
    return list(found.devices)


def run(
    config: ExperimentConfig | LanguageConfig,
    topology_name: str,
    *,
    what: str = "all",
    with_largest_batch: bool = False,
    as_json: bool = False,
    directory: str | None = None,
) -> bool:
    """Compiles the steps, prints a table of their cost, and returns whether all of them fit.

    Args:
      config: an experiment's configuration. Neither data nor weights are read; for a language model
        only `config.json` in its folder, and nothing for the models that are known by name.
      topology_name: name of the topology, such as `v5e:4x4`.
      what: steps to compile: `train`, `score` or `all`.
      with_largest_batch: whether to search for the largest batch per chip; each try compiles.
      as_json: whether to print JSON instead of a table.
      directory: where `compile.json` is written; default: nowhere.

    Raises:
      ConfigError: the configuration, batch or topology is invalid.
    """
    config = config.validate()
    topology = parse_topology(topology_name)
    mesh = sharding.make_mesh(config.mesh, devices(topology))
    if isinstance(config, ExperimentConfig):
        suite = image_programs.suite(config, mesh, what)
    else:
        suite = language_programs.suite(config, mesh, what)
    results: list[Measured] = []
    largest: dict[str, int] = {}
    for step in suite.lowerings:
        result = measure(step.lower(step.rows), topology)
        results.append(result)
        if with_largest_batch:
            largest[result.name] = _largest_batch(step, result, topology, mesh)
    content = {
        "model": suite.model,
        "topology": topology.name,
        "mesh": dict(mesh.shape),
        "largest_batch_per_chip": largest,
        "programs": [result.to_json() for result in results],
    }
    if directory is not None:
        folder = files.path(directory)
        with files.writing(folder):
            folder.mkdir(parents=True, exist_ok=True)
        files.write_json(folder / "compile.json", content)
    if as_json:
        print(json.dumps(content, indent=2))
    else:
        sizes = ", ".join(f"{axis} {size}" for axis, size in mesh.shape.items())
        print(
            f"{suite.model} on {topology.name} ({sizes}), {suite.row}\n\n{table(results, largest)}"
        )
    return all(result.fits for result in results)


def _largest_batch(step: Lowering, result: Measured, topology: Topology, mesh: Mesh) -> int:
    """Returns the largest number of rows per chip that fits, starting from the configured batch."""
    unit = sharding.num_shares(mesh) * step.micro_batches

    def fits(number: int) -> bool:
        rows = number * unit
        return (result if rows == step.rows else measure(step.lower(rows), topology)).fits

    return step.micro_batches * largest_batch(fits, start=max(1, step.rows // unit))
