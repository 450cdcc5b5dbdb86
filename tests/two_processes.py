"""Two processes try what only several can, one thing after the other; each writes what came out
into `results.json`.

Started like `easy-jax`, each in a folder of its own, with its own copy of the model and the data.
At the end the run itself goes on.
"""

import contextlib
import json
import socket
import time
import warnings
from pathlib import Path

import jax
import numpy as np
import pytest
from flax import nnx
from jax._src import distributed as jax_distributed

from easy_jax import pipeline as train
from easy_jax.cli import main
from easy_jax.config import OptimizerConfig, StageConfig
from easy_jax.core.losses import squared_error
from easy_jax.data import ArraySource
from easy_jax.parallel import processes
from easy_jax.parallel.listening import parse_address
from easy_jax.train import checkpoint_reading, loss_parts, loss_table, scoring
from easy_jax.train.checkpoint import Checkpointer, CheckpointWarning
from easy_jax.train.fitting import fit

_SIZE = 64


def _source(odd=0.0):
    """`odd` is added to one of the examples."""
    x = np.linspace(0, 1, _SIZE, dtype=np.float32)[:, None]
    x[5] += odd
    return ArraySource({"x": x, "y": 2 * x})


def _loss(model, batch):
    return squared_error(model(batch["x"]), batch["y"])


def _model():
    return nnx.Linear(1, 1, rngs=nnx.Rngs(0))


def _score(directory, source):
    scoring.score(_model(), source, directory, loss_fn=_loss, batch_size=8, rows_per_part=8)


def _fit(directory, save_every_steps=8):
    stage = StageConfig(epochs=1, batch_size=8, optimizer=OptimizerConfig(learning_rate=0.1))
    return fit(
        _model(),
        _source(),
        directory,
        stage=stage,
        loss_fn=_loss,
        save_every_steps=save_every_steps,
    )


# What is tried: `(config, folder, patch) -> what is written`. All share the folder.


def parts_after_metadata(config, folder, patch):
    """Whether the metadata, which take their time, were there when each part was written."""
    write, write_part, there = loss_table.write_metadata, loss_parts.write_part, []

    def slowly(directory, metadata):
        time.sleep(1.0)
        write(directory, metadata)

    def watched(directory, *args):
        there.append((directory / "metadata.json").exists())
        write_part(directory, *args)

    patch.setattr(loss_table, "write_metadata", slowly)
    patch.setattr(loss_parts, "write_part", watched)
    _score(folder / "table", _source())
    return there


def other_data(config, folder, patch):
    _score(folder / "other", _source(odd=float(jax.process_index())))


def other_rows(config, folder, patch):
    """Process 1 sees half of the rows of a complete table."""
    if not processes.is_main_process():
        patch.setattr(loss_parts, "seen_ids", lambda *_: np.arange(_SIZE) < _SIZE // 2)
    _score(folder / "table", _source())


def other_checkpoint(config, folder, patch):
    """Process 1 does not see the checkpoint of a finished stage."""
    _fit(folder / "fit")
    if not processes.is_main_process():
        patch.setattr(Checkpointer, "latest_step", lambda self: None)
    _fit(folder / "fit")


def one_cannot_read(config, folder, patch):
    """Process 1 cannot read the latest checkpoint: both go on from the one before."""
    _fit(folder / "unread", save_every_steps=4)
    read = checkpoint_reading.state_of
    if not processes.is_main_process():
        patch.setattr(
            checkpoint_reading,
            "state_of",
            lambda step, like: (None, "unread") if step.name == "8" else read(step, like),
        )
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always", CheckpointWarning)
        done = _fit(folder / "unread", save_every_steps=4)
    told = [str(each.message) for each in told if each.category is CheckpointWarning]
    return [done.resumed_from, told, sorted(path.name for path in (folder / "unread").iterdir())]


def other_workdir(config, folder, patch):
    train.open_workdir(config, Path.cwd() / "workdir")


def compilation(config, folder, patch):
    """What the watch is told of one."""
    told = []
    patch.setattr(processes._peers, "compiles", told.append)
    jax.jit(lambda x: 3 * x + 1)(np.float32(2)).block_until_ready()
    return told


def port(config, folder, patch):
    """Whether JAX's service is where the processes met."""
    return jax_distributed.global_state.coordinator_address == main._COORDINATOR.value


def unidentified_connections(config, folder, patch):
    """Unidentified connections to the port of process 0 during a run do not end the run."""
    address = parse_address(main._COORDINATOR.value)
    if processes.is_main_process():
        silent = [socket.create_connection(address) for _ in range(20)]
        for text in (
            b'{"end": 3, "reason": "over"}\n',
            b'{"heartbeat": "step 1"}\n',
            b"[" * 60_000,
            b"GET / HTTP/1.1\r\n\r\n",
            b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + bytes(100),
            b"\x16\x03\x01\x02\x00" + bytes(500),
            bytes(range(256)) * 100,
            b"",
        ):
            with contextlib.suppress(OSError), socket.create_connection(address) as link:
                link.sendall(text)
                link.settimeout(0.2)
                link.recv(1000)
        for link in silent:
            link.close()
    return processes.gather("after the unidentified connections", jax.process_index())


CHECKS = (
    parts_after_metadata,
    other_data,
    other_rows,
    other_checkpoint,
    one_cannot_read,
    other_workdir,
    compilation,
    port,
    unidentified_connections,
)


def _then(go_on):
    def run(config, workdir, until, **options):
        results = {}
        for check in CHECKS:
            with pytest.MonkeyPatch.context() as patch:
                try:
                    results[check.__name__] = check(config, Path(workdir).parent, patch)
                except ValueError as error:
                    results[check.__name__] = f"{type(error).__name__}: {error}"
        Path("results.json").write_text(json.dumps(results))
        return go_on(config, workdir, until, **options)

    return run


if __name__ == "__main__":
    train.run = _then(train.run)
    main.cli()
