"""`easy-jax compile`: the programs of a configuration, compiled for a topology of TPUs.

libtpu does not live well beside another backend, and reads its settings when it is loaded: the
command starts itself again in a process of its own, set up before anything of JAX is imported.
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
    """What libtpu needs to compile for chips that are not there, quietly."""
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
    """Replaces this process by one that is set up for libtpu, unless it is one.

    Raises:
      ConfigError: a topology that is not known, or no libtpu.
    """
    topology = parse_topology(topology_name)
    if importlib.util.find_spec("libtpu") is None:
        raise ConfigError("compile needs TPU's compiler: pip install 'easy-jax[tpu]'")
    if os.environ.get(_CHILD) != topology.name:
        arguments = [sys.executable, "-m", "easy_jax.main", *sys.argv[1:]]
        os.execve(sys.executable, arguments, {**os.environ, **environment(topology)})


def devices(topology: Topology) -> list[Any]:
    """The chips of a topology, described, not there.

    Raises:
      ConfigError: libtpu knows no such topology.
    """
    # By default libtpu takes a host to have 2x2 chips, of which smaller slices have fewer.
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
    """Compiles, prints the table, and says whether everything fits.

    Args:
      config: of an experiment. Neither data nor weights are read: of a language model only
        `config.json` of its folder, and nothing for the models that are known by name.
      topology_name: such as `v5e:4x4`.
      what: `train`, `score` or `all`.
      with_largest_batch: also look for the largest batch per chip that fits; each try compiles.
      as_json: print JSON, not a table. `directory`: also write it there, to `compile.json`.

    Raises:
      ConfigError: a bad configuration, batch or topology.
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
    """Rows a chip, given what came out for the configuration's own batch."""
    unit = sharding.num_shares(mesh) * step.micro_batches

    def fits(number: int) -> bool:
        rows = number * unit
        return (result if rows == step.rows else measure(step.lower(rows), topology)).fits

    return step.micro_batches * largest_batch(fits, start=max(1, step.rows // unit))
