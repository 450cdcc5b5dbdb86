"""Kills, stops and starves a run, gives the same command again, and compares with a calm run.

  python tests/faults/faults.py --kills 20 --stops 5

prints what was done and counts what came out. `tests/test_faults.py` is its short form.
"""

import argparse
import os
import random
import signal
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
from safetensors.numpy import load_file

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import processes  # noqa: E402
import tiny_language  # noqa: E402

from easy_jax.parallel.processes import EXIT_STOPPED  # noqa: E402
from easy_jax.parallel.rendezvous import EXIT_PEERS  # noqa: E402
from easy_jax.train.loss_table import LossTable  # noqa: E402

BATCHES = 30  # of 8 examples to score; as many steps to train, saved every 3
# In blocks of 1,024 bytes. By a shell: Python would have to fork, which JAX does not bear.
SMALL_FILES = ("bash", "-c", 'ulimit -f 12; exec "$0" "$@"')
PHASES = ("scoring", "training", "saving")


class Faults:
    """A model and its data in a folder, and the result of a calm run.

    Args:
      folder: for everything; empty.
      seed: of the moments.
      devices: in all.
    """

    def __init__(self, folder, seed=0, devices=1):
        self.folder = Path(folder)
        self.devices = devices
        self.random = random.Random(seed)
        self.model = self.folder / "model"
        self.model.mkdir()
        tiny_language.write_folder(self.model, train=8 * BATCHES)
        os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(self.folder / "compilations"))
        os.environ["JAX_PLATFORMS"] = "cpu"
        self._number = 0
        self.unfinished = 0  # saves that were hit
        self.calm = self.workdir()
        self.again(self.calm)

    def workdir(self):
        """A new one."""
        self._number += 1
        return self.folder / f"run{self._number}"

    def start(self, workdir, count=1, extra=(), **options):
        """Scores, trains, and exports the trained model; `extra` are more arguments."""
        options = {"devices": self.devices, **options}
        config = f"--config=tests/tiny_language.py:{self.model}"
        arguments = ["export", config, f"--workdir={workdir}", *extra]
        return processes.Processes(ROOT, arguments, count, **options)

    def again(self, workdir, count=1, **options):
        """To the end; returns what process 0 printed."""
        with self.start(workdir, count, **options) as run:
            codes, printed, complaints = run.wait()
        assert codes == [0] * count, (codes, complaints)
        return printed[0]

    def interrupt(self, workdir, phase, number, which=0, late=1.0, **options):
        """Sends a signal at a random moment of a phase; returns exit codes and complaints."""
        moment = late * self.random.random()
        before = max(self.saved(workdir), default=0)
        with self.start(workdir, **options) as run:
            while not self._is_there(workdir, phase, moment, before):
                assert run.all[which].poll() is None, f"it ended before {phase}: {run.wait()}"
                time.sleep(0.0005)
            time.sleep(self.random.random() * 0.02)
            run.signal(which, number)
            self._hit = time.monotonic()
            codes, _, complaints = run.wait()
        return codes, complaints

    def _is_there(self, workdir, phase, moment, before):
        if phase == "scoring":
            return self.parts(workdir) >= max(1, 0.8 * moment * BATCHES)
        last = max(self.saved(workdir), default=0)
        if last <= before or last < before + moment * (BATCHES - 6 - before):
            return False
        return phase == "training" or self.is_saving(workdir)

    def is_saving(self, workdir):
        """Whether there is a save that is not finished."""
        return any("tmp" in path.name for path in workdir.glob("checkpoints/*/*"))

    def parts(self, workdir):
        """How many parts of the loss table there are."""
        return len(self.stamps(workdir))

    def stamps(self, workdir):
        """The parts of the loss table, each with what would change if it were written again."""
        paths = sorted(workdir.glob("loss_table/part-*.parquet"))
        return [(path.name, path.stat().st_ino, path.stat().st_mtime_ns) for path in paths]

    def saved(self, workdir):
        """Steps of the complete checkpoints, in order."""
        names = (path.name for path in workdir.glob("checkpoints/*/*"))
        return sorted(int(name) for name in names if name.isdigit())

    def check_same(self, workdir):
        """Bit for bit the calm run's loss table and parameters."""
        ours, calm = (LossTable.open(path / "loss_table") for path in (workdir, self.calm))
        assert ours.num_examples == calm.num_examples == 8 * BATCHES
        assert ours.temperature == calm.temperature
        np.testing.assert_array_equal(ours.loss_N(), calm.loss_N())
        assert self.exported(workdir).read_bytes() == self.exported(self.calm).read_bytes()

    def check_close(self, workdir):
        """The same up to the rounding of another mesh, which Adam's quotient makes larger.

        Losses 1e-6, parameters 1e-4 (they move by 0.1 and more)."""
        ours, calm = (LossTable.open(path / "loss_table") for path in (workdir, self.calm))
        np.testing.assert_allclose(ours.loss_N(), calm.loss_N(), rtol=1e-6)
        parameters = load_file(self.exported(workdir))
        for name, value in load_file(self.exported(self.calm)).items():
            np.testing.assert_allclose(parameters[name], value, atol=1e-4, err_msg=name)

    def check_origin(self, printed, saved):
        """It was said from where the run continued."""
        if saved and saved[-1] < BATCHES:
            assert f"continues after {saved[-1]:,} of" in printed, printed
        elif saved:
            assert "done, from checkpoint" in printed, printed

    def exported(self, workdir):
        """The file with the trained model."""
        return workdir / "exported" / "flow" / "model.safetensors"

    # What can happen.

    def kill(self, phase):
        """kill -9 in a phase, and again."""
        workdir = self.workdir()
        codes, _ = self.interrupt(workdir, phase, signal.SIGKILL)
        assert codes == [-signal.SIGKILL]
        return self._continue(workdir)

    def stop(self, phase):
        """SIGTERM in a phase, and again."""
        workdir = self.workdir()
        codes, complaints = self.interrupt(workdir, phase, signal.SIGTERM)
        assert codes == [EXIT_STOPPED], (codes, complaints)
        assert "run the same command again to continue" in complaints[0]
        return self._continue(workdir)

    def fill_the_disk(self):
        """No file may grow to the size of a checkpoint's arrays; then it may again."""
        workdir = self.workdir()
        self.interrupt(workdir, "training", signal.SIGTERM)
        saved = self.saved(workdir)
        with self.start(workdir, prefix=SMALL_FILES) as run:
            codes, _, complaints = run.wait()
        assert codes == [2], (codes, complaints)
        assert "a checkpoint cannot be written to" in complaints[0], complaints
        assert "run the same command again" in complaints[0], complaints
        assert self.saved(workdir) == saved
        return self._continue(workdir)

    def lose_one(self, lost, timeout=60):
        """Of four processes one is killed; the others end. Two go on, with four devices, are
        stopped, and one ends it, with one."""
        workdir = self.workdir()
        # Saved at every step: a tiny step alone is over before the processes can agree to stop.
        options = {"extra": ["--config.save_every_steps=1"], "late": 0.3}
        codes, complaints = self.interrupt(
            workdir,
            "saving",
            signal.SIGKILL,
            which=lost,
            count=4,
            devices=8,
            timeout=timeout,
            **options,
        )
        assert time.monotonic() - self._hit < timeout
        for index, code in enumerate(codes):
            if index == lost:
                assert code == -signal.SIGKILL
            elif lost != 0 or code != -signal.SIGABRT:
                # JAX may be the first to see that process 0, its coordinator, is gone.
                assert code == EXIT_PEERS, (codes, complaints)
                assert f"process {lost} (" in complaints[index], complaints
                assert "is gone; run the same command again to continue" in complaints[index], (
                    complaints
                )
        saved = self.saved(workdir)
        stopped, complaints = self.interrupt(
            workdir, "training", signal.SIGTERM, which=1, count=2, devices=4, **options
        )
        assert stopped == [EXIT_STOPPED] * 2, (stopped, complaints)
        more = self.saved(workdir)
        assert more[-1] >= saved[-1]
        self.check_origin(self.again(workdir, extra=options["extra"]), more)
        self.check_close(workdir)
        return f"exit codes {codes}; four processes saved {saved}, two {more}"

    def _continue(self, workdir):
        """The same command again; it says from where, and the result is the calm run's."""
        parts, saved = self.stamps(workdir), self.saved(workdir)
        unfinished = self.is_saving(workdir)
        printed = self.again(workdir)
        self.check_origin(printed, saved)
        self.check_same(workdir)
        assert set(parts) <= set(self.stamps(workdir)), "a part was written again"
        self.unfinished += unfinished
        more = " and an unfinished save" if unfinished else ""
        return f"left {len(parts)} parts of the table and steps {saved}{more}"


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--stops", type=int, default=5)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        faults = Faults(folder, args.seed)
        for name, act, times in (
            ("kill -9", faults.kill, args.kills),
            ("SIGTERM", faults.stop, args.stops),
        ):
            for number in range(times):
                phase = PHASES[number % len(PHASES)]
                print(f"{name} {number + 1} while {phase}: {act(phase)}", flush=True)
            print(f"{name}: {times} of {times} continued, bit-identical", flush=True)
            print(f"{name}: {faults.unfinished} had left an unfinished save", flush=True)
            faults.unfinished = 0
        for lost in range(4):
            print(f"process {lost} of 4 killed: {faults.lose_one(lost)}", flush=True)
        print(f"disk full: {faults.fill_the_disk()}; bit-identical")


if __name__ == "__main__":
    main()
