"""Checkpoints of a training stage: train state, position in the data and the run's identity."""

import contextlib
import json
import os
import shutil
import warnings
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp
from orbax.checkpoint import checkpoint_managers

from easy_jax.core.step import TrainState
from easy_jax.io import files, sealed
from easy_jax.io import fingerprint as fingerprints
from easy_jax.io.checks import differences
from easy_jax.parallel import lock, processes
from easy_jax.train import checkpoint_reading

FORMAT_VERSION = 3


_ANEW = "use another directory or, to start anew, delete this one (in Python: overwrite=True)"


class CheckpointError(ValueError):
    """Error raised if a checkpoint belongs to another run, or cannot be read or written."""


class CheckpointWarning(UserWarning):
    """Warning that a checkpoint is damaged and the previous one is used instead."""


class _Manager(ocp.CheckpointManager):
    """Orbax's checkpoint manager, with its check for preemption disabled.

    That check would query JAX's preemption service with Orbax's step numbers, and the service
    remembers the latest number. Only `processes.should_stop` may query it.
    """

    def reached_preemption(self, step: int) -> bool:
        del step
        return False


class Checkpointer:
    """Writer and reader of one stage's checkpoints, which Orbax saves in the background.

    An interrupted save is never mistaken for a checkpoint, because Orbax renames a finished one
    into place. A checkpoint holds the train state (model, optimiser, step), the position of the
    Grain iterator, which is the same number in every process, and `identity`: fingerprints of
    everything that the stage's result depends on. All of these have checksums. Checkpoints can
    be restored on any mesh and any number of processes.

    Args:
      directory: where this stage's checkpoints are written; shared by all processes.
      identity: JSON-serialisable description of the run; other runs' checkpoints are refused.
      keep: number of latest checkpoints to keep; with 1, a damaged one has no replacement.
      keep_best: whether to keep the checkpoint with the lowest loss as well.

    Raises:
      CheckpointError: the directory has checkpoints, but none of them can be read.

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
        keep: int = 2,
        keep_best: bool = False,
    ):
        directory = files.path(directory)
        files.check_folder(directory)
        self.directory = directory.absolute() if files.is_local(directory) else directory
        identity = {"format": FORMAT_VERSION, **identity}
        self._identity = json.loads(json.dumps(identity))
        self._set_aside_unlisted(keep_best)
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
        """Returns the step of the latest complete checkpoint, or None if there is none."""
        return self._manager.latest_step()

    def best_step(self) -> int | None:
        """Returns the step of the checkpoint with the lowest loss; requires `keep_best`."""
        return self._manager.best_step()

    def save(
        self,
        state: TrainState,
        batches: Iterator[Any],
        step: int,
        progress: dict[str, Any],
        loss: float,
    ) -> None:
        """Starts to save the state and the position; the caller may change both after the return.

        Args:
          state: the train state after `step` steps.
          batches: the Grain iterator that the training batches come from.
          step: number of steps taken so far.
          progress: JSON-serialisable values that `restore` returns, such as the seconds so far.
          loss: the loss by which `keep_best` selects.

        Raises:
          CheckpointError: this checkpoint, or the previous one, cannot be written.
          LockError: another run has taken over the directory.
        """
        lock.check(self.directory)
        if jax.default_backend() == "cpu":
            # On CPUs, Orbax reads the device's buffer itself, which the next step overwrites.
            state = _copied(state)
        record = {
            "identity": self._identity,
            "batches": batches.get_state(),  # type: ignore[attr-defined]
            "progress": progress,
            "step": step,
            "state": fingerprints.of_tree(state),
        }
        record = json.loads(json.dumps(record))  # with the types that reading returns
        with self._writing():
            self._manager.save(
                step,
                args=ocp.args.Composite(
                    state=ocp.args.StandardSave(state),
                    record=ocp.args.JsonSave(sealed.seal(record)),
                ),
                metrics=sealed.seal({"loss": loss}),
            )

    def restore(
        self, state: TrainState, batches: Iterator[Any]
    ) -> tuple[TrainState, dict[str, Any]]:
        """Returns the latest readable state, in the shardings of `state`, and its `progress`, and
        sets `batches` to the saved position.

        Later checkpoints that some process cannot read, or whose checksums differ, are renamed to
        `damaged-STEP`, so that a new checkpoint of that step can be saved.

        Raises:
          CheckpointError: the identity differs, or no checkpoint can be read.

        Warns:
          CheckpointWarning: a checkpoint was damaged and has been renamed.
        """
        damaged: dict[int, str] = {}
        for step in sorted(self._manager.all_steps(), reverse=True):
            folder = self.directory / str(step)
            record, reason = checkpoint_reading.record_of(folder)
            if record is None and (folder / "identity").exists():
                raise CheckpointError(
                    f"the checkpoint {folder} was written by an older version of easy_jax: {_ANEW}"
                )
            if record is not None:
                self._check_identity(record["identity"])
                found, reason = checkpoint_reading.state_of(folder, state)
            reasons = processes.gather(f"reading checkpoint {step}", reason)
            reason = next(filter(None, reasons), "")
            if record is not None and not reason:
                if fingerprints.of_tree(found) == record["state"]:
                    if damaged:
                        self._set_aside(damaged, f"training continues from step {step}")
                        self._manager.reload()
                    batches.set_state(record["batches"])  # type: ignore[attr-defined]
                    return found, record["progress"]
                reason = "its arrays have other values than those that were saved"
            damaged[step] = reason
        raise self._none_left(damaged)

    def _set_aside(self, damaged: Mapping[Any, str], then: str) -> None:
        """Renames damaged checkpoints, with warnings that end in `then`; a collective call."""

        def rename() -> str:
            for number, reason in damaged.items():
                folder = self.directory / str(number)
                names = (
                    f"damaged-{number}{again}" for again in ("", *map("-{}".format, range(2, 1000)))
                )
                target = next(t for t in map(folder.with_name, names) if not t.exists())
                try:
                    folder.rename(target)
                except OSError as error:
                    return f"{folder} is damaged ({reason}) and cannot be renamed: {error}"
                text = f"checkpoint {folder} is damaged ({reason}); it is now called {target.name}"
                warnings.warn(f"{text}, and {then}", CheckpointWarning, stacklevel=2)
            return ""

        failed = processes.broadcast("setting damaged checkpoints aside", rename)
        if failed:
            raise CheckpointError(f"{failed}. Delete it, and run the same command again")

    def _set_aside_unlisted(self, keep_best: bool) -> None:
        """Renames checkpoints that Orbax fails to list, unless no others are left."""

        def find() -> list[Any]:
            steps = checkpoint_reading.steps(self.directory)
            found = {
                step: checkpoint_reading.why_unlisted(self.directory / step, keep_best)
                for step in steps
            }
            return [len(steps), {step: reason for step, reason in found.items() if reason}]

        number, damaged = processes.broadcast("listing the checkpoints", find)
        if damaged and len(damaged) == number:
            raise self._none_left(damaged)
        if damaged:
            self._set_aside(damaged, "those that are left are tried")

    def _none_left(self, damaged: Mapping[Any, str]) -> CheckpointError:
        told = "; ".join(f"{step}: {reason}" for step, reason in damaged.items())
        return CheckpointError(
            f"no checkpoint in {self.directory} can be read ({told}). Put a copy of one there, "
            "or delete that directory (in Python: overwrite=True) to start this stage anew"
        )

    def _check_identity(self, found: dict[str, Any]) -> None:
        """Raises CheckpointError if a checkpoint's identity differs from this run's."""
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
        """Waits for a running save, and releases Orbax's manager.

        Raises:
          CheckpointError: the checkpoint cannot be written.
        """
        processes.at("the end of a save")
        try:
            with self._writing():
                self._manager.wait_until_finished()
        finally:
            self._manager.close()

    def __enter__(self) -> "Checkpointer":
        return self

    def __exit__(self, kind: object, error: object, traceback: object) -> None:
        # The first error is the one to report: do not replace it.
        with contextlib.suppress(CheckpointError) if error else contextlib.nullcontext():
            self.close()

    @contextlib.contextmanager
    def _writing(self) -> Iterator[None]:
        """Reports errors inside the block as CheckpointError of the directory."""
        try:
            yield
        except jax.errors.JaxRuntimeError:
            raise  # a device or another process, not the disk
        except Exception as error:
            reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
            raise CheckpointError(
                f"a checkpoint cannot be written to {self.directory}: {reason}. Those before it "
                "are kept; make room (or fix what is named) and run the same command again"
            ) from error


def clear(directory: str | os.PathLike[str]) -> None:
    """Deletes the checkpoints in a directory, complete or incomplete, and no other files."""
    directory = files.path(directory)
    if directory.exists():
        for each in directory.iterdir():
            if checkpoint_reading.is_step(each.name) or ".orbax-checkpoint-tmp" in each.name:
                shutil.rmtree(each) if files.is_local(each) else each.rmtree()  # type: ignore[attr-defined]


def _loss(metrics: Mapping[str, Any]) -> float:
    return metrics["loss"]


@jax.jit
def _copied(tree: Any) -> Any:
    return jax.tree.map(jnp.copy, tree)
