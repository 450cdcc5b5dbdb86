"""Runs the stages of an experiment in a workdir, up to a chosen stage."""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax

from easy_jax.core import weightings
from easy_jax.experiments.config import ExperimentConfig
from easy_jax.experiments.language import LanguageExperiment, Until
from easy_jax.experiments.language_config import LanguageConfig
from easy_jax.experiments.vision import ImageExperiment
from easy_jax.experiments.workdir import open_workdir
from easy_jax.io import files
from easy_jax.io.checks import ConfigError
from easy_jax.io.terminal import Terminal
from easy_jax.parallel import lock, processes
from easy_jax.report import images as report
from easy_jax.report import language as language_report
from easy_jax.train import weights_file


def run(
    config: ExperimentConfig | LanguageConfig,
    workdir: str | os.PathLike[str],
    until: Until = "report",
    *,
    take_over: bool = False,
) -> dict[str, Any]:
    """Runs the stages of an experiment that are not complete yet.

    Args:
      config: the experiment's configuration, which is validated.
      workdir: folder for all outputs: `config.json`, `checkpoints/`, `loss_table/`,
        `metrics.jsonl`, `tensorboard/`, `cells.jsonl`, `results.json`, `report.html`.
      until: the last stage to run: `score`, `train`, `evaluate` or `report`; or `export`, to
        write the trained language models as folders for `transformers`.
      take_over: whether to take the workdir's lock from another run, which is known to be gone.

    Returns:
      The content of `results.json`; empty if `until` is a stage before `evaluate`.

    Raises:
      ConfigError: the configuration is invalid, or the workdir belongs to another configuration
        or cannot be written.
      LockError: another run is using the workdir.

    Example:
      >>> import easy_jax as ej
      >>> config = ej.ExperimentConfig(name="mine")
      >>> results = run(config, "runs/mine")  # doctest: +SKIP
    """
    config.validate()
    if until == "export" and isinstance(config, ExperimentConfig):
        raise ConfigError("export is for language models; an image model is in `checkpoints/`")
    files.check_folder(files.path(workdir))  # before it is created
    with lock.hold(workdir, take_over=take_over):
        return _run(config, open_workdir(config, workdir), until)


def export_weights(
    config: ExperimentConfig | LanguageConfig,
    workdir: str | os.PathLike[str],
    weighting: str = "flow",
    options: Mapping[str, Any] | None = None,
    output: str | os.PathLike[str] | None = None,
    *,
    take_over: bool = False,
) -> Path:
    """Scores the training data of a language experiment, and writes them with their weights.

    Args:
      config, workdir, take_over: as in `run`.
      weighting, options: name and options of a weighting that reads only the frozen losses.
      output: the file, `.parquet` or `.jsonl`; default: `exported/weights.parquet` in the workdir.

    Returns:
      The path of the file; `easy_jax.train.weights_file` describes its columns.

    Raises:
      ConfigError: the experiment is one with images; or as in `run` and
        `easy_jax.export_weights`.
    """
    config.validate()
    if isinstance(config, ExperimentConfig):
        raise ConfigError(
            "export-weights is for language experiments; of an image experiment, give a folder of "
            "its loss_table/ to easy_jax.LossTable.open and that to easy_jax.export_weights"
        )
    chosen = weightings.get(weighting, **(options or {}))
    fields = config.train
    names = (fields.instruction_field, fields.input_field, fields.response_field)
    files.check_folder(files.path(workdir))
    with lock.hold(workdir, take_over=take_over):
        workdir = open_workdir(config, workdir)
        target = files.path(workdir / "exported" / "weights.parquet" if output is None else output)
        weights_file.check(chosen, target, names)  # before anything is scored
        _check_output(target, fields.path)
        with Terminal(quiet=not processes.is_main_process()) as terminal:
            experiment = LanguageExperiment(config, workdir, terminal)
            table = experiment.loss_table()
            if processes.is_main_process():
                own = experiment.train.examples
                weights_file.export_weights(
                    table,
                    target,
                    chosen,
                    columns=experiment.records(),
                    weight_N=own.weight,
                    token_weight=own.token_weight,
                    seed=config.seed,
                )
                terminal.print(f"weights of {chosen}: {target}, {table.num_examples} examples")
    return target


def _check_output(target: Path, data: str) -> None:
    """Raises ConfigError if a file would replace the training data or cannot be written."""
    if data and files.is_local(target) and files.is_local(data):
        source = Path(data).resolve()
        if source in (target.resolve(), *target.resolve().parents):
            raise ConfigError(f"--output={target} would be written over the training data {data}")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"cannot write to {target.parent}: {error}; give another file") from error


def _run(config: ExperimentConfig | LanguageConfig, workdir: Path, until: Until) -> dict[str, Any]:
    view: Any = report if isinstance(config, ExperimentConfig) else language_report
    with Terminal(quiet=not processes.is_main_process()) as terminal:
        terminal.print(f"{config.name}: on {_devices()}, in {workdir}")
        experiment: ImageExperiment | LanguageExperiment
        if isinstance(config, ExperimentConfig):
            experiment = ImageExperiment(config, workdir, terminal)
        else:
            experiment = LanguageExperiment(config, workdir, terminal)
        try:
            results = experiment.run(until)
        except KeyboardInterrupt:
            raise KeyboardInterrupt(terminal.interrupted()) from None
    if until == "report" and processes.is_main_process():
        view.write(config, workdir, results)
    if results:
        terminal.print(view.table(results))
        terminal.print(
            f"output: {workdir / ('report.html' if until == 'report' else 'results.json')}"
        )
    return results


def _devices() -> str:
    """Describes the devices and processes of the run."""
    count, kind = jax.device_count(), jax.devices()[0].device_kind
    processes = jax.process_count()
    shared = f" of {processes} processes" if processes > 1 else ""
    return f"{count} {kind} device{'s' if count > 1 else ''}{shared}"
