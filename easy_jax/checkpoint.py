"""Checkpoints of a training stage: state, position in the data, and what it belongs to."""

import contextlib
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp
from orbax.checkpoint import checkpoint_managers

from easy_jax import distributed, files, lock
from easy_jax.config import differences
from easy_jax.step import TrainState

FORMAT_VERSION = 3


_ANEW = "use another directory or, to start anew, delete this one (in Python: overwrite=True)"


class CheckpointError(ValueError):
    """A checkpoint belongs to another run, or cannot be written; the message says which."""


class _Manager(ocp.CheckpointManager):
    """Orbax's manager, which does not ask whether the run is to be stopped.

    It would ask with its own numbers of steps, and JAX's service remembers the latest number
    it was asked with: `distributed.should_stop` alone counts.
    """

    def reached_preemption(self, step: int) -> bool:
        del step
        return False


class Checkpointer:
    """Saves and restores one stage with Orbax, while training goes on.

    An interrupted save is never taken for a checkpoint (Orbax renames a finished one into
    place). Holds the train state (model, optimiser, step), the position of the Grain iterator,
    which is the same number in every process, and `identity`: fingerprints of everything the
    stage's result depends on. Restores on any mesh and any number of processes.

    Args:
      directory: of this stage alone; shared by all processes.
      identity: JSON-serialisable; a checkpoint with another identity is refused.
      keep: how many checkpoints to keep, the latest.
      keep_best: keep the one with the lowest loss as well.

    Example:
      >>> import tempfile
      >>> with Checkpointer(tempfile.mkdtemp(), {"weights": "none"}) as checkpointer:
      ...   checkpointer.latest_step() is None
      True
    """

    def __init__(
        self,
        directory: str | os.PathLike[str],
        identity: dict[str, Any],
        keep: int = 1,
        keep_best: bool = False,
    ):
        directory = files.path(directory)
        files.check_folder(directory)
        self.directory = directory.absolute() if files.is_local(directory) else directory
        identity = {"format": FORMAT_VERSION, **identity}
        self._identity = json.loads(json.dumps(identity))
        policies: list[Any] = [checkpoint_managers.LatestN(keep)]
        if keep_best:
            policies.append(checkpoint_managers.BestN(get_metric_fn=_loss, reverse=True, n=1))
        self._manager = _Manager(
            self.directory,
            options=ocp.CheckpointManagerOptions(
                preservation_policy=checkpoint_managers.AnyPreservationPolicy(policies),
                best_fn=_loss if keep_best else None,
                best_mode="min",
            ),
        )

    def latest_step(self) -> int | None:
        """The step of the latest complete checkpoint, None if there is none."""
        return self._manager.latest_step()

    def best_step(self) -> int | None:
        """The step of the checkpoint with the lowest loss; with `keep_best`."""
        return self._manager.best_step()

    def save(
        self,
        state: TrainState,
        batches: Iterator[Any],
        step: int,
        progress: dict[str, Any],
        loss: float,
    ) -> None:
        """Begins to save state and position after `step` steps; both may change on return.

        Args:
          state: after `step` steps.
          batches: a Grain iterator.
          step: taken so far.
          progress: JSON-serialisable; comes back from `restore`: time spent so far.
          loss: by which `keep_best` chooses.

        Raises:
          CheckpointError: this, or the save before, cannot be written.
          LockError: another run has taken the directory over.
        """
        lock.check(self.directory)
        if jax.default_backend() == "cpu":
            # There, a buffer on the device is what Orbax reads, and the next step donates it.
            state = _copied(state)
        position: dict[str, Any] = batches.get_state()  # type: ignore[attr-defined]
        with self._writing():
            self._manager.save(
                step,
                args=ocp.args.Composite(
                    state=ocp.args.StandardSave(state),
                    batches=ocp.args.JsonSave(position),
                    identity=ocp.args.JsonSave(self._identity),
                    progress=ocp.args.JsonSave(progress),
                ),
                metrics={"loss": loss},
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
                batches=ocp.args.JsonRestore(),
                progress=ocp.args.JsonRestore(),
            ),
        )
        batches.set_state(restored.batches)  # type: ignore[attr-defined]
        return restored.state, restored.progress

    def check_identity(self) -> None:
        """Raises CheckpointError unless the latest checkpoint has our identity."""
        restored = self._manager.restore(
            self.latest_step(),
            args=ocp.args.Composite(identity=ocp.args.JsonRestore()),
        )
        found = restored.identity
        if found.get("format") != FORMAT_VERSION:
            raise CheckpointError(
                f"the checkpoint in {self.directory} was written by another version of easy_jax "
                f"(format {found.get('format')}; this one reads {FORMAT_VERSION}): {_ANEW}"
            )
        keys = [*self._identity, *(key for key in found if key not in self._identity)]
        wrong = [
            line
            for key in keys
            for line in differences(self._identity.get(key), found.get(key), key)
        ]
        if wrong:
            raise CheckpointError(
                f"the checkpoint in {self.directory} is of another run: {'; '.join(wrong)}. "
                f"{_ANEW[0].upper()}{_ANEW[1:]}"
            )

    def close(self) -> None:
        """Waits for a running save.

        Raises:
          CheckpointError: it cannot be written.
        """
        distributed.at("the end of a save")
        try:
            with self._writing():
                self._manager.wait_until_finished()
        finally:
            self._manager.close()

    def __enter__(self) -> "Checkpointer":
        return self

    def __exit__(self, kind: object, error: object, traceback: object) -> None:
        # What went wrong first is what is told.
        with contextlib.suppress(CheckpointError) if error else contextlib.nullcontext():
            self.close()

    @contextlib.contextmanager
    def _writing(self) -> Iterator[None]:
        """Whatever goes wrong inside is the directory's fault, and told as such."""
        try:
            yield
        except jax.errors.JaxRuntimeError:
            raise  # a device or another process, not the disk
        except Exception as error:
            reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
            raise CheckpointError(
                f"a checkpoint cannot be written to {self.directory}: {reason}. Those before it "
                "are kept; make room (or mend what is named) and run the same command again"
            ) from error


def clear(directory: str | os.PathLike[str]) -> None:
    """Deletes the checkpoints in a directory, finished or not, and nothing else."""
    directory = files.path(directory)
    if directory.exists():
        for each in directory.iterdir():
            if each.name.isdigit() or ".orbax-checkpoint-tmp" in each.name:
                shutil.rmtree(each) if files.is_local(each) else each.rmtree()  # type: ignore[attr-defined]


def _loss(metrics: Mapping[str, float]) -> float:
    return metrics["loss"]


@jax.jit
def _copied(tree: Any) -> Any:
    return jax.tree.map(jnp.copy, tree)


def _abstract(state: Any) -> Any:
    return jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=getattr(x, "sharding", None)),
        state,
    )
