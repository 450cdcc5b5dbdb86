"""Checkpoints of a training stage: state, position in the data, and what it belongs to."""

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grain
import jax
import orbax.checkpoint as ocp

from easy_jax.config import differences
from easy_jax.step import TrainState


class CheckpointError(ValueError):
    """A checkpoint belongs to another run; the message names what differs."""


class Checkpointer:
    """Saves and restores one stage with Orbax.

    An interrupted save is never taken for a checkpoint (Orbax renames a finished one into
    place). Holds the train state (model, optimiser, step), the position of the Grain
    iterator, and `identity`: fingerprints of everything the stage's result depends on.

    Args:
      directory: of this stage alone.
      identity: JSON-serialisable; a checkpoint with another identity is refused.
      keep: how many checkpoints to keep, the latest.

    Example:
      >>> import tempfile
      >>> checkpointer = Checkpointer(tempfile.mkdtemp(), {"weights": "none"})
      >>> checkpointer.latest_step() is None
      True
      >>> checkpointer.close()
    """

    def __init__(self, directory: str | os.PathLike[str], identity: dict[str, Any], keep: int = 1):
        self.directory = Path(directory).absolute()
        self._identity = json.loads(json.dumps(identity))
        # Sync on CPU: device buffers are host memory there, and the next step donates them.
        asynchronous = jax.default_backend() != "cpu"
        self._manager = ocp.CheckpointManager(
            self.directory,
            options=ocp.CheckpointManagerOptions(
                max_to_keep=keep, enable_async_checkpointing=asynchronous
            ),
        )

    def latest_step(self) -> int | None:
        """The step of the latest complete checkpoint, None if there is none."""
        return self._manager.latest_step()

    def save(
        self, state: TrainState, batches: Iterator[Any], step: int, progress: dict[str, Any]
    ) -> None:
        """Saves state and position after `step` steps; returns when both may change again.

        `progress` is JSON-serialisable and comes back from `restore`: time spent so far.
        """
        self._manager.save(
            step,
            args=ocp.args.Composite(
                state=ocp.args.StandardSave(state),
                batches=grain.checkpoint.CheckpointSave(batches),
                identity=ocp.args.JsonSave(self._identity),
                progress=ocp.args.JsonSave(progress),
            ),
        )

    def restore(
        self, state: TrainState, batches: Iterator[Any]
    ) -> tuple[TrainState, dict[str, Any]]:
        """The latest state, in the shardings of `state`, and its progress; moves `batches`
        to its position.

        Raises:
          CheckpointError: the identity differs.
        """
        self.check_identity()
        restored = self._manager.restore(
            self.latest_step(),
            args=ocp.args.Composite(
                state=ocp.args.StandardRestore(_abstract(state)),
                batches=grain.checkpoint.CheckpointRestore(batches),
                progress=ocp.args.JsonRestore(),
            ),
        )
        return restored.state, restored.progress

    def check_identity(self) -> None:
        """Raises CheckpointError unless the latest checkpoint has our identity."""
        restored = self._manager.restore(
            self.latest_step(),
            args=ocp.args.Composite(identity=ocp.args.JsonRestore()),
        )
        found = restored.identity
        wrong = differences(self._identity, found, "identity")
        if wrong:
            raise CheckpointError(
                f"the checkpoint in {self.directory} is of another run: {'; '.join(wrong)}. "
                "Use another workdir, or delete that directory"
            )

    def close(self) -> None:
        """Waits for a running save."""
        self._manager.wait_until_finished()
        self._manager.close()


def _abstract(state: Any) -> Any:
    return jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=getattr(x, "sharding", None)),
        state,
    )
