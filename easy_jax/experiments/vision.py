"""Experiments with images: probe, score, fine-tune by every method, evaluate.

Every stage leaves an artefact in the workdir and is skipped where that is complete, so the
same call starts, continues, or finds that all is done. Stages that methods share are run once.
"""

from pathlib import Path
from typing import Any, Literal

import numpy as np
from flax import nnx

from easy_jax.core.losses import classification_loss
from easy_jax.core.merge import AVERAGINGS
from easy_jax.core.online_weights import OnlineWeights
from easy_jax.core.weightings import WEIGHTINGS
from easy_jax.data import Splits, Tasks, fingerprint
from easy_jax.data.config import GlyphDataConfig, TransferDataConfig
from easy_jax.experiments.config import ExperimentConfig
from easy_jax.experiments.image_networks import ImageNetworks
from easy_jax.experiments.language import Until
from easy_jax.experiments.measurements import Measurements
from easy_jax.experiments.plan import (
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
from easy_jax.experiments.results import select
from easy_jax.experiments.tasks import load_tasks
from easy_jax.io import files, metrics_log, sealed
from easy_jax.io import fingerprint as fingerprints
from easy_jax.io.terminal import Terminal
from easy_jax.models import resnet
from easy_jax.parallel import processes, sharding
from easy_jax.train import evaluate, scoring
from easy_jax.train.config import StageConfig
from easy_jax.train.fitting import Fit, fit
from easy_jax.train.loss_table import LossTable

TRAINABLE = {"all": nnx.Param, "head": resnet.head_params, "bn_head": resnet.task_params}


class ImageExperiment:
    """The plan of an experiment and the artefacts of a workdir."""

    def __init__(self, config: ExperimentConfig, workdir: Path, terminal: Terminal):
        self.config = config
        self.workdir = workdir
        self.terminal = terminal
        self.mesh = sharding.make_mesh(config.mesh)
        self.networks = ImageNetworks(config.model, self.mesh)
        self.stages = plan(config)
        self._finished: dict[str, Fit] = {}
        self._data: tuple[tuple[int, float], Tasks] | None = None
        self._did_work = False
        self._tables: dict[tuple[int, float, str], LossTable] = {}
        self._measured_before: dict[str, float] = {}
        self._trained: set[str] = set()

    def run(self, until: Until) -> dict[str, Any]:
        """Does what is left, in the order of the plan."""
        self._log = metrics_log.MetricsLog(self.workdir, writes=processes.is_main_process())
        try:
            return self._run(until)
        finally:
            self._log.close()

    def _run(self, until: Until) -> dict[str, Any]:
        config = self.config
        self.terminal.start(
            {stage.name: self._steps(stage) for stage in self.stages.values() if stage.stage}
        )
        if until == "score":
            for seed in config.seeds:
                for noise in config.data.label_noise:
                    table = self.loss_table(seed, noise)
                    self.terminal.print(
                        f"loss table: {table.directory}, {table.num_examples} examples, "
                        f"temperature {table.temperature:.4g} nats"
                    )
            return {}
        measured = Measurements(self.workdir / "cells.jsonl", self._inputs)
        rows = {row_key(row): row for row in measured.read()}
        for cell in cells(config):
            last = cell_stages(config, cell)[-1].name
            if until == "train" or cell.key not in rows:
                self.fit(last)
            if until != "train" and cell.key not in rows:
                rows[cell.key] = measured.add(self.evaluate(cell))
                self._did_work = True
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
        results = select(config, [rows[cell.key] for cell in cells(config)])
        if processes.is_main_process():
            sealed.write(self.workdir / "results.json", results)
        return results

    def _inputs(self) -> dict[str, str]:
        """Fingerprints of what comes from files: given weights, and the images of each split."""
        config = self.config
        found = {}
        if config.model.path:
            name = pretrain_name(config, config.seeds[0])
            found["base weights"] = fingerprints.of_state(self.fit(name).model_state)
        if isinstance(config.data, TransferDataConfig):
            tasks = self._tasks(0, 0.0)
            for task, splits in (("pretrain", tasks.pretrain), ("target", tasks.target)):
                for split in ("train", "validation", "test"):
                    source = getattr(splits, split)
                    if source is not None:
                        found[f"{task}/{split}"] = fingerprint(source)
        return found

    # Stages.

    def fit(self, name: str) -> Fit:
        """The result of a stage: from memory, from its checkpoint, or by training."""
        if name in self._finished:
            return self._finished[name]
        stage = self.stages[name]
        self._forget(stage)
        result = (
            self._read_weights(stage) if stage.stage is None else self._train(stage, stage.stage)
        )
        if stage.stage is None and name not in self._trained:
            self.terminal.print(f"{name}: from {self.config.model.path}")
        self._trained.add(name)
        self._did_work |= result.resumed_from < result.steps
        self._finished[name] = result
        return result

    def _forget(self, stage: Stage) -> None:
        """Drops the models that neither this stage nor a later one starts from."""
        keep = {each.start for each in self.stages.values() if each.name not in self._trained}
        # What all of a setting's cells are compared with, averaged with and measured by.
        keep |= {pretrain_name(self.config, stage.seed), stage.start}
        if stage.label_noise is not None:
            keep.add(probe_name(stage.seed, stage.label_noise))
        self._finished = {name: fit for name, fit in self._finished.items() if name in keep}

    def _read_weights(self, stage: Stage) -> Fit:
        """The pre-trained network that the configuration gives."""
        assert isinstance(self.config.data, TransferDataConfig)
        state = self.networks.given(self.data(stage).pretrain, self.config.data.names[0])
        return Fit(state, steps=0, seconds=0.0, resumed_from=0)

    def _train(self, stage: Stage, stage_config: StageConfig) -> Fit:
        config, name = self.config, stage.name
        start = self.fit(stage.start).model_state if stage.start is not None else None
        tasks = self.data(stage)
        task = tasks.pretrain if stage.label_noise is None else tasks.target
        assert task.train is not None
        model = self._model(stage, start, task.num_classes)

        def on_epoch(epoch: int, model_state: nnx.State) -> None:
            if epoch % config.eval_every_epochs == 0 or epoch == stage_config.epochs:
                step = round(epoch * self._steps(stage) / stage_config.epochs)
                values = self._accuracies(model_state, stage, "validation")
                self._log.write(name, "validation", step, values)

        directory = self.workdir / "checkpoints" / name
        return fit(
            model,
            task.train,
            directory,
            stage=stage_config,
            loss_fn=classification_loss,
            **self._weights(stage),
            trainable=TRAINABLE[stage.trainable],
            anchored=resnet.is_backbone,
            sfa_beta=stage.sfa_beta,
            seed=stage.seed,
            mesh=self.mesh,
            name=name,
            log=self._log,
            log_every_steps=config.log_every_steps,
            save_every_steps=config.save_every_steps,
            keep=config.keep_checkpoints,
            keep_best=config.keep_best,
            on_epoch=on_epoch,
            progress=self.terminal.part(name, where=directory),
            on_speed=self.terminal.speed,
        )

    def loss_table(
        self, seed: int, label_noise: float, split: Literal["train", "test"] = "train"
    ) -> LossTable:
        """The loss table of the probed model, scored if it is not there.

        That of the test data is for groups of examples in the report; no weight comes from it.
        """
        if (seed, label_noise, split) in self._tables:
            return self._tables[seed, label_noise, split]
        probe = self.stages[probe_name(seed, label_noise)]
        model_state = self.fit(probe.name).model_state
        target = self.data(probe).target
        source = target.test if split == "test" else target.train
        assert source is not None
        scoring_config = self.config.scoring
        table = self._tables[seed, label_noise, split] = scoring.score(
            self.networks.merge(model_state, target.num_classes),
            source,
            loss_table_path(self.workdir, seed, label_noise, split),
            loss_fn=classification_loss,
            batch_size=scoring_config.batch_size,
            mesh=self.mesh,
            on_bad_example="error" if split == "test" else scoring_config.on_bad_example,
            rows_per_part=scoring_config.rows_per_part,
            progress=self.terminal.part(f"score {probe.name}", "examples"),
        )
        return table

    def evaluate(self, cell: Cell) -> dict[str, Any]:
        """Both accuracies of a cell, on validation and test data."""
        stages = cell_stages(self.config, cell)
        fits = [self.fit(stage.name) for stage in stages]
        model_state = fits[-1].model_state
        averaging = AVERAGINGS.find(cell.method.averaging)
        if averaging.when == "after":
            start = self._starting_point(stages[0])
            model_state = averaging.merge(start, model_state, cell.method.alpha)
        group_N = self._deciles(cell)
        self.terminal.describe(f"evaluate {cell.method.name}")
        before = self._before(cell.seed)
        after = self._accuracies(model_state, stages[-1], "test", group_N)
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
            "pretrain_validation": validation.get("pretrain"),
            "target_validation": validation["target"],
            "target_by_decile": after["target_by_decile"],
        }

    # Data and models.

    def data(self, stage: Stage) -> Tasks:
        """Both tasks in a stage's setting; pre-training does not see the target."""
        return self._tasks(stage.seed, stage.label_noise or 0.0)

    def _tasks(self, seed: int, label_noise: float) -> Tasks:
        key = (seed, label_noise)
        if isinstance(self.config.data, TransferDataConfig):
            key = (0, 0.0)  # what files hold is the same in every setting: it is opened once
        if self._data is None or self._data[0] != key:
            self._data = None  # before the next: both in memory may be too much
            self._data = (key, load_tasks(self.config, *key))
            self._list_left_out(self._data[1])
        return self._data[1]

    def _list_left_out(self, tasks: Tasks) -> None:
        """Writes which images `on_bad_example='drop'` has left out of which split, and why."""
        found = {
            f"{task}/{split}": reasons
            for task in ("pretrain", "target")
            for split in ("train", "validation", "test")
            if (reasons := getattr(getattr(getattr(tasks, task), split), "left_out", {}))
        }
        if found and processes.is_main_process():
            files.write_json(self.workdir / "left_out_images.json", found)

    def _model(self, stage: Stage, start: nnx.State | None, num_classes: int) -> resnet.ResNet:
        """The model a stage begins with, in the mode it is trained in."""
        if start is None:
            start = self.networks.fresh(num_classes, stage.seed)
        elif stage.new_head:
            start = self.networks.with_new_head(start, num_classes, stage.seed)
        return self.networks.merge(start, num_classes, stage.frozen_norm)

    def _starting_point(self, stage: Stage) -> nnx.State:
        """The variables a fine-tuning stage began with, for WiSE-FT."""
        assert stage.start is not None
        num_classes = self.data(stage).target.num_classes
        return nnx.state(self._model(stage, self.fit(stage.start).model_state, num_classes))

    def _weights(self, stage: Stage) -> dict[str, Any]:
        """What weighs the examples of a stage: arguments of `fit`."""
        weighting = WEIGHTINGS.find(stage.weighting)
        if not weighting.needs:
            return {}
        assert stage.label_noise is not None
        table = self.loss_table(stage.seed, stage.label_noise)
        weights = weighting(table, stage.seed)
        if "batch" not in weighting.needs:
            return weights._asdict()
        probe = self.stages[probe_name(stage.seed, stage.label_noise)]
        num_classes = self.data(probe).target.num_classes
        online = OnlineWeights(
            self.networks.merge(self.fit(probe.name).model_state, num_classes),
            loss_fn=classification_loss,
            tau=table.temperature,
            mesh=self.mesh,
        )
        return {**weights._asdict(), "online": online}

    # Measurements.

    def _deciles(self, cell: Cell) -> np.ndarray:
        """The target's test examples in ten groups by the probed model's loss (Table 5)."""
        loss_N = self.loss_table(cell.seed, cell.label_noise, "test").loss_N()
        return evaluate.loss_groups(loss_N, min(10, len(loss_N)))

    def _accuracies(
        self,
        model_state: nnx.State,
        stage: Stage,
        split: Literal["validation", "test"],
        group_N: np.ndarray | None = None,
    ) -> dict[str, Any]:
        """Accuracy on each task that has the split; for the pre-training task its own parts are
        put back. With groups of the target's examples, also `target_by_decile`."""
        tasks = self.data(stage)

        def measure(
            state: nnx.State, task: Splits, group_N: np.ndarray | None = None
        ) -> dict[str, Any]:
            return evaluate.classification(
                self.networks.merge(state, task.num_classes),
                getattr(task, split),
                batch_size=self.config.eval_batch_size,
                mesh=self.mesh,
                group_N=group_N,
            )

        result = {}
        if getattr(tasks.pretrain, split) is not None:
            old = model_state
            if stage.label_noise is not None:
                pretrained = self.fit(pretrain_name(self.config, stage.seed)).model_state
                old = evaluate.with_task_parts(model_state, pretrained, resnet.is_task_specific)
            result["pretrain"] = measure(old, tasks.pretrain)["accuracy"]
        if stage.label_noise is not None:
            target = measure(model_state, tasks.target, group_N)
            result["target"] = target["accuracy"]
            if group_N is not None:
                result["target_by_decile"] = target["group_accuracy"]
        return result

    def _before(self, seed: int) -> float:
        """Accuracy on the pre-training task before fine-tuning."""
        stage = self.stages[pretrain_name(self.config, seed)]
        if stage.name not in self._measured_before:
            measured = self._accuracies(self.fit(stage.name).model_state, stage, "test")
            self._measured_before[stage.name] = measured["pretrain"]
        return self._measured_before[stage.name]

    # Bookkeeping.

    def _steps(self, stage: Stage) -> int:
        if stage.stage is None:
            return 0
        data, pretraining = self.config.data, stage.label_noise is None
        if isinstance(data, GlyphDataConfig):  # known before they are drawn
            size = data.pretrain_train if pretraining else data.target_train
        else:
            tasks = self.data(stage)
            source = (tasks.pretrain if pretraining else tasks.target).train
            assert source is not None
            size = len(source)
        return -(-size * stage.stage.epochs // stage.stage.batch_size)

    def _count_as_done(self, name: str | None) -> None:
        """Progress for a chain of stages that need not run, because their results are there."""
        while name is not None:
            self.terminal.skip(name)
            name = self.stages[name].start
