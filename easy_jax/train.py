"""The orchestrator: pre-train, probe, score, fine-tune by every method, evaluate, report.

Every stage leaves an artefact in the workdir and is skipped where that is complete, so the
same call starts, continues, or finds that all is done. Stages that methods share are run once.
"""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import jax
import numpy as np
from flax import nnx

from easy_jax import (
    distributed,
    evaluate,
    files,
    language_report,
    merge,
    metrics,
    report,
    scoring,
    sharding,
    weighting,
)
from easy_jax import fingerprint as fingerprints
from easy_jax.config import ConfigError, ExperimentConfig, LanguageConfig
from easy_jax.data import glyphs
from easy_jax.fitting import Fit, fit
from easy_jax.language import LanguageExperiment, Until
from easy_jax.loss_table import LossTable
from easy_jax.losses import classification_loss
from easy_jax.models import resnet, train_view
from easy_jax.plan import (
    Cell,
    Stage,
    cell_stages,
    cells,
    loss_table_path,
    plan,
    pretrain_name,
    probe_name,
    row_key,
)
from easy_jax.terminal import Terminal
from easy_jax.workdir import open_workdir

TRAINABLE = {"all": nnx.Param, "head": resnet.head_params, "bn_head": resnet.task_params}


def run(
    config: ExperimentConfig | LanguageConfig,
    workdir: str | os.PathLike[str],
    until: Until = "report",
) -> dict[str, Any]:
    """Runs an experiment, or what is left of it.

    Args:
      config: validated here.
      workdir: for all outputs: `config.json`, `checkpoints/`, `loss_table/`,
        `metrics.jsonl`, `tensorboard/`, `cells.jsonl`, `results.json`, `report.html`.
      until: stop after scoring, training, evaluation or the report; `export` writes the
        trained language models as folders for `transformers`.

    Returns:
      The content of `results.json`; empty before `evaluate`.

    Raises:
      ConfigError: a bad configuration, a workdir of another one or one that cannot be
        written.
    """
    config.validate()
    if until == "export" and isinstance(config, ExperimentConfig):
        raise ConfigError("export is for language models; an image model is in `checkpoints/`")
    workdir = open_workdir(config, workdir)
    view: Any = report if isinstance(config, ExperimentConfig) else language_report
    with Terminal(quiet=not distributed.leads()) as terminal:
        experiment: Experiment | LanguageExperiment
        if isinstance(config, ExperimentConfig):
            experiment = Experiment(config, workdir, terminal)
        else:
            experiment = LanguageExperiment(config, workdir, terminal)
        results = experiment.run(until)
    if until == "report" and distributed.leads():
        view.write(config, workdir, results)
    if results:
        terminal.print(view.table(results))
        terminal.print(
            f"output: {workdir / ('report.html' if until == 'report' else 'results.json')}"
        )
    return results


class Experiment:
    """The plan of an experiment and the artefacts of a workdir."""

    def __init__(self, config: ExperimentConfig, workdir: Path, terminal: Terminal):
        self.config = config
        self.workdir = workdir
        self.terminal = terminal
        self.mesh = sharding.make_mesh(config.mesh)
        self.stages = plan(config)
        self._finished: dict[str, Fit] = {}
        self._data: tuple[tuple[int, float], glyphs.GlyphData] | None = None
        self._did_work = False
        self._counted: set[str] = set()
        self._tables: dict[tuple[int, float], LossTable] = {}
        self._trained: set[str] = set()
        self._graphdefs: dict[int, nnx.GraphDef[Any]] = {}
        self._inits: dict[tuple[int, Any], Callable[[jax.Array], nnx.State]] = {}

    def run(self, until: Until) -> dict[str, Any]:
        """Does what is left, in the order of the plan."""
        self._log = metrics.MetricsLog(self.workdir)
        try:
            return self._run(until)
        finally:
            self._log.close()

    def _run(self, until: Until) -> dict[str, Any]:
        config = self.config
        total = sum(self._steps(stage) for stage in self.stages.values())
        self.terminal.start(total)
        if until == "score":
            for seed in config.seeds:
                for noise in config.data.label_noise:
                    table = self.loss_table(seed, noise)
                    self.terminal.print(
                        f"loss table: {table.directory}, {table.num_examples} examples, "
                        f"temperature {table.temperature:.4g} nats"
                    )
            return {}
        found = distributed.broadcast(
            "reading the results", lambda: metrics.read_lines(self._cells_path)
        )
        rows = {row_key(row): row for row in found}
        for cell in cells(config):
            last = cell_stages(config, cell)[-1].name
            if until == "train" or cell.key not in rows:
                self.fit(last)
            if until != "train" and cell.key not in rows:
                rows[cell.key] = self.evaluate(cell)
                self._did_work = True
                metrics.append_line(self._cells_path, rows[cell.key])
            else:
                self._count_as_done(last)
        if until == "train":
            self.terminal.print(
                f"trained: {len(self.stages)} stages, in {self.workdir / 'checkpoints'}"
            )
            return {}
        if not self._did_work:
            self.terminal.print(
                f"all is done: {len(rows)} results, from the checkpoints in "
                f"{self.workdir / 'checkpoints'} (use another --workdir to start anew)"
            )
        results = report.select(config, [rows[cell.key] for cell in cells(config)])
        if distributed.leads():
            files.write_json(self.workdir / "results.json", results)
        return results

    # Stages.

    def fit(self, name: str) -> Fit:
        """The result of a stage: from memory, from its checkpoint, or by training."""
        if name in self._finished:
            return self._finished[name]
        stage = self.stages[name]
        config = self.config
        start = self.fit(stage.start).model_state if stage.start is not None else None
        tasks = self.data(stage)
        task = tasks.pretrain if stage.label_noise is None else tasks.target
        model = self._model(stage, start, task.num_classes)
        source = task.train
        weight_N = self._weights(stage)

        def on_epoch(epoch: int, model_state: nnx.State) -> None:
            if epoch % config.eval_every_epochs == 0 or epoch == stage.stage.epochs:
                step = round(epoch * self._steps(stage) / stage.stage.epochs)
                values = self._accuracies(model_state, stage, "validation")
                self._log.write(name, "validation", step, values)

        self.terminal.describe(name)
        directory = self.workdir / "checkpoints" / name
        result = fit(
            model, source, directory, stage=stage.stage, loss_fn=classification_loss,
            weight_N=weight_N, trainable=TRAINABLE[stage.trainable],
            anchored=resnet.is_backbone, sfa_beta=stage.sfa_beta, seed=stage.seed,
            mesh=self.mesh, name=name,
            identity={
                "start": fingerprints.of_state(nnx.state(model)),
                "data": source.fingerprint(),
                "trainable": stage.trainable,
            },
            log=self._log, log_every_steps=config.log_every_steps,
            save_every_steps=config.save_every_steps, keep=config.keep_checkpoints,
            keep_best=config.keep_best, on_epoch=on_epoch,
            progress=self.terminal.advance, on_speed=self.terminal.speed,
        )  # fmt: skip
        if name in self._trained:
            pass  # trained a moment ago and since dropped from memory
        elif result.resumed_from == result.steps:
            self.terminal.print(f"{name}: done, from checkpoint {directory / str(result.steps)}")
        elif result.resumed_from > 0:
            self.terminal.print(
                f"{name}: continued from checkpoint {directory / str(result.resumed_from)}"
            )
        if name not in self._counted:
            self._counted.add(name)
            self.terminal.advance(result.resumed_from)
        self._trained.add(name)
        self._did_work |= result.resumed_from < result.steps
        # Later stages start from pre-training and probe; the others are used at once.
        keep = {s.start for s in self.stages.values()}
        self._finished = {key: v for key, v in self._finished.items() if key in keep}
        self._finished[name] = result
        return result

    def loss_table(self, seed: int, label_noise: float) -> LossTable:
        """The loss table of the probed model, scored if it is not there."""
        if (seed, label_noise) in self._tables:
            return self._tables[seed, label_noise]
        probe = self.stages[probe_name(seed, label_noise)]
        model_state = self.fit(probe.name).model_state
        tasks = self.data(probe)
        scoring_config = self.config.scoring
        table = self._tables[seed, label_noise] = scoring.score(
            self._merge(model_state, tasks.target.num_classes),
            tasks.target.train,
            loss_table_path(self.workdir, seed, label_noise),
            loss_fn=classification_loss,
            batch_size=scoring_config.batch_size,
            mesh=self.mesh,
            on_bad_example=scoring_config.on_bad_example,
            rows_per_part=scoring_config.rows_per_part,
        )
        return table

    def evaluate(self, cell: Cell) -> dict[str, Any]:
        """Both accuracies of a cell, on validation and test data."""
        stages = cell_stages(self.config, cell)
        fits = [self.fit(stage.name) for stage in stages]
        model_state = fits[-1].model_state
        if cell.method.averaging == "wise_ft":
            model_state = merge.wise_ft(
                self._starting_point(stages[0]), model_state, cell.method.alpha
            )
        self.terminal.describe(f"evaluate {cell.method.name}")
        before = self._before(cell.seed)
        after = self._accuracies(model_state, stages[-1], "test")
        validation = self._accuracies(model_state, stages[-1], "validation")
        return {
            "method": cell.method.name,
            "seed": cell.seed,
            "label_noise": cell.label_noise,
            "learning_rate": cell.learning_rate,
            "pretrain_before": before,
            "pretrain_after": after["pretrain"],
            "target": after["target"],
            "mean": (after["pretrain"] + after["target"]) / 2,
            "seconds": sum(each.seconds for each in fits),
            "pretrain_validation": validation["pretrain"],
            "target_validation": validation["target"],
        }

    # Data and models.

    def data(self, stage: Stage) -> glyphs.GlyphData:
        """Both tasks in a stage's setting; pre-training does not see the digits."""
        key = (stage.seed, stage.label_noise or 0.0)
        if self._data is None or self._data[0] != key:
            self._data = (key, glyphs.load(self.config.data, *key))
        return self._data[1]

    def _merge(self, model_state: nnx.State, num_classes: int) -> resnet.ResNet:
        return nnx.merge(self._graphdef(num_classes), model_state)

    def _graphdef(self, num_classes: int) -> nnx.GraphDef[Any]:
        if num_classes not in self._graphdefs:
            model = nnx.eval_shape(lambda: self._build(num_classes, jax.random.key(0)))
            self._graphdefs[num_classes] = nnx.graphdef(train_view(model))
        return self._graphdefs[num_classes]

    def _build(self, num_classes: int, key: jax.Array) -> resnet.ResNet:
        return resnet.ResNet(self.config.model, num_classes, rngs=nnx.Rngs(params=key))

    def _fresh(self, num_classes: int, seed: int, part: Any) -> nnx.State:
        """A part of a random initialisation, made on the mesh, straight into its shards."""
        if (num_classes, part) not in self._inits:
            self._inits[num_classes, part] = sharding.jit_init(
                lambda key: nnx.state(self._build(num_classes, key), part), self.mesh
            )
        return self._inits[num_classes, part](jax.random.key(seed))

    def _model(self, stage: Stage, start: nnx.State | None, num_classes: int) -> resnet.ResNet:
        """The model a stage begins with, in train mode."""
        if start is None:
            start = self._fresh(num_classes, stage.seed, ...)
        elif stage.new_head:
            head = self._fresh(num_classes, stage.seed, resnet.is_head)
            start = nnx.merge_state(nnx.filter_state(start, resnet.is_backbone), head)
        return self._merge(start, num_classes)

    def _starting_point(self, stage: Stage) -> nnx.State:
        """The variables a fine-tuning stage began with, for WiSE-FT."""
        assert stage.start is not None
        num_classes = self.data(stage).target.num_classes
        return nnx.state(self._model(stage, self.fit(stage.start).model_state, num_classes))

    def _weights(self, stage: Stage) -> np.ndarray | None:
        if stage.weighting == "none":
            return None
        assert stage.label_noise is not None
        weight_N = self.loss_table(stage.seed, stage.label_noise).flow_weights()
        if stage.weighting == "flow":
            return weight_N
        return weighting.control_weights(weight_N, stage.weighting, stage.seed)

    # Measurements.

    def _accuracies(
        self, model_state: nnx.State, stage: Stage, split: Literal["validation", "test"]
    ) -> dict[str, float]:
        """Accuracy on both tasks; for the pre-training task its own parts are put back."""
        tasks = self.data(stage)

        def accuracy(state: nnx.State, task: glyphs.Splits) -> float:
            return evaluate.classification(
                self._merge(state, task.num_classes),
                getattr(task, split),
                batch_size=self.config.eval_batch_size,
                mesh=self.mesh,
            )["accuracy"]

        if stage.label_noise is None:
            return {"pretrain": accuracy(model_state, tasks.pretrain)}
        pretrained = self.fit(pretrain_name(stage.seed)).model_state
        old = evaluate.with_task_parts(model_state, pretrained, resnet.is_task_specific)
        return {
            "pretrain": accuracy(old, tasks.pretrain),
            "target": accuracy(model_state, tasks.target),
        }

    def _before(self, seed: int) -> float:
        stage = self.stages[pretrain_name(seed)]
        return self._accuracies(self.fit(stage.name).model_state, stage, "test")["pretrain"]

    # Bookkeeping.

    @property
    def _cells_path(self) -> Path:
        return self.workdir / "cells.jsonl"

    def _steps(self, stage: Stage) -> int:
        data_config = self.config.data
        size = data_config.pretrain_train if stage.label_noise is None else data_config.target_train
        return -(-size * stage.stage.epochs // stage.stage.batch_size)

    def _count_as_done(self, name: str | None) -> None:
        """Progress for a chain of stages that need not run, because their results are there."""
        while name is not None and name not in self._counted:
            self._counted.add(name)
            self.terminal.advance(self._steps(self.stages[name]))
            name = self.stages[name].start
