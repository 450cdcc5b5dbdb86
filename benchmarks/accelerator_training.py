"""Training on the accelerator, for accelerator.py: the quickstart, and runs that are killed.

python benchmarks/accelerator_training.py FOLDER RESULT [--kill=images]   one training of the latter
"""

import argparse
import concurrent.futures
import functools
import importlib.util
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
CHECK = Callable[[], dict[str, Any]]
# Of XLA: what may make two runs of one program differ, left as it is and taken out.
SETTINGS = {
    "XLA's defaults": "",
    "no autotuning": "--xla_gpu_autotune_level=0",
    "deterministic": "--xla_gpu_deterministic_ops=true",
}
KILL_AFTER = 25  # steps, saved every 10


def count_compilations() -> list[float]:
    """A list that every compilation from now on adds its seconds to."""
    import jax

    seconds: list[float] = []

    def listen(event: str, duration: float, **_: Any) -> None:
        if event == "/jax/core/compile/backend_compile_duration":
            seconds.append(duration)

    jax.monitoring.register_event_duration_secs_listener(listen)
    return seconds


def readme_table() -> dict[str, tuple[float, float]]:
    """Returns what each method retained and learnt in the README's first table."""
    found = {}
    for line in (ROOT / "README.md").read_text(encoding="utf-8").splitlines():
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        if len(cells) == 6 and cells[1] == "0.03":
            found[cells[0]] = (float(cells[2]), float(cells[4]))
    return found


def quickstart(small: bool, shared: Path) -> Iterator[tuple[str, CHECK]]:
    """The README's experiment, its table beside the README's."""

    def run() -> dict[str, Any]:
        import easy_jax as ej

        path = ROOT / "configs" / "quickstart.py"
        spec = importlib.util.spec_from_file_location("quickstart", path)
        assert spec is not None and spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        sys.modules["quickstart"] = module
        spec.loader.exec_module(module)
        compilations = count_compilations()
        start = time.perf_counter()
        results = ej.run(module.get_config("tiny" if small else ""), shared / "quickstart")
        seconds = time.perf_counter() - start
        table = {
            row["method"]: {
                "kept": round(row["pretrain_after"], 1),
                "target": round(row["target"], 1),
                "readme": readme_table().get(row["method"]),
            }
            for row in results["results"]
        }
        compiled = {"compilations": len(compilations), "compiling": round(sum(compilations), 1)}
        return {"seconds": round(seconds, 1), **compiled, "table": table}

    yield "quickstart", run


def resume(small: bool, shared: Path) -> Iterator[tuple[str, CHECK]]:
    """The same training twice, and once killed and continued, in processes of their own."""
    settings = dict(list(SETTINGS.items())[:1]) if small else SETTINGS
    with concurrent.futures.ThreadPoolExecutor() as pool:
        started = {
            name: [
                pool.submit(_training, shared / f"resume {number} {kind}", flags, kills)
                for kind, kills in (("whole", ()), ("again", ()), ("killed", ("images", "tokens")))
            ]
            for number, (name, flags) in enumerate(settings.items())
        }
        for name, futures in started.items():
            yield name, functools.partial(_compared, futures)


def _training(folder: Path, flags: str, kills: tuple[str, ...]) -> dict[str, Any]:
    """One training, continued after every kill; what the last process left."""
    environment = {**os.environ, "XLA_FLAGS": f"{os.environ.get('XLA_FLAGS', '')} {flags}".strip()}
    result = folder.with_suffix(".npz")
    for kill in (*kills, ""):
        command = [sys.executable, __file__, str(folder), str(result), f"--kill={kill}"]
        done = subprocess.run(command, env=environment, capture_output=True, text=True)
        if done.returncode != (-signal.SIGKILL if kill else 0):
            raise RuntimeError(f"exit code {done.returncode}: {done.stderr[-400:]}")
    return dict(np.load(result))


def _compared(futures: list["concurrent.futures.Future[dict[str, Any]]"]) -> dict[str, Any]:
    whole, again, killed = (future.result() for future in futures)
    figures: dict[str, Any] = {"compilations": [int(x["compilations"]) for x in (whole, killed)]}
    for kind in ("images", "tokens"):
        for name, other in (("again", again), ("killed and continued", killed)):
            a, b = whole[kind].astype(np.float64), other[kind].astype(np.float64)
            error = float(np.linalg.norm(a - b) / np.linalg.norm(a))
            figures[f"{kind}, {name}"] = "the same bits" if not error else f"{error:.1e} apart"
    return figures


# One process of a training.


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument("result", type=Path)
    parser.add_argument("--kill", default="")
    options = parser.parse_args()
    import jax

    compilations = count_compilations()
    found = {}
    for kind, train in (("images", _images), ("tokens", _tokens)):
        steps = 0

        def progress(done: int, kind: str = kind) -> None:
            nonlocal steps
            steps += done
            if options.kill == kind and steps >= KILL_AFTER:
                os.kill(os.getpid(), signal.SIGKILL)

        state = train(options.folder / kind, progress)
        leaves = [np.asarray(x).ravel().astype(np.float32) for x in jax.tree.leaves(state)]
        found[kind] = np.concatenate(leaves)
    np.savez(options.result, compilations=len(compilations), **found)


def _images(folder: Path, progress: Any) -> Any:
    from flax import nnx

    import easy_jax as ej
    from easy_jax.config import GlyphDataConfig
    from easy_jax.data import glyphs

    source = glyphs.load(GlyphDataConfig(pretrain_train=26), 0, 0.3).target.train
    model = nnx.jit(lambda: ej.ResNet(ej.ResNetConfig(), 10, rngs=nnx.Rngs(0)))()
    stage = ej.StageConfig(epochs=4, optimizer=ej.OptimizerConfig(learning_rate=0.03))
    options = {"save_every_steps": 10, "progress": progress, "stage": stage}
    model = ej.train_view(model)
    return ej.fit(model, source, folder, loss_fn=ej.classification_loss, **options).model_state


def _tokens(folder: Path, progress: Any) -> Any:
    import jax.numpy as jnp
    from accelerator_numbers import language_model

    import easy_jax as ej

    rng = np.random.default_rng(0)
    sizes = rng.integers(30, 120, 500)
    offsets = np.concatenate([[0], np.cumsum(sizes)])
    tokens = rng.integers(0, 4001, offsets[-1]).astype(np.int32)
    source = ej.PackedSource(ej.TokenSource(tokens, offsets, sizes // 8 + 1), 256)
    optimizer = ej.OptimizerConfig("adamw", learning_rate=1e-3)
    stage = ej.StageConfig(2, 8, reduction="token_mean", optimizer=optimizer)
    options = {"save_every_steps": 10, "progress": progress, "stage": stage}
    weight = rng.uniform(0.1, 1.0, 500).astype(np.float32)
    model = language_model(jnp.bfloat16)
    return ej.fit(
        model, source, folder, loss_fn=ej.causal_lm_loss, weight_N=weight, **options
    ).model_state


PARTS = {"quickstart": quickstart, "resume": resume}

if __name__ == "__main__":
    main()
