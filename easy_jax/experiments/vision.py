"""Experiments with images: probe, score, fine-tune by every method, evaluate.

Every stage leaves an artefact in the workdir and is skipped if its artefact is complete. The same
call therefore starts an experiment, continues it, or reports that it is finished. Stages that
methods share are run once.
"""

from pathlib import Path
from typing import Any, Literal

import numpy as np
from flax import nnx

from easy_jax.core.losses import classification_loss
from easy_jax.core.merge import AVERAGINGS
from easy_jax.core.online_weights import OnlineWeights
from easy_jax.core.weightings import FlowOnline
from easy_jax.data import Splits, Tasks, fingerprint
from easy_jax.data.config import GlyphDataConfig, TransferDataConfig
from easy_jax.experiments.config import ExperimentConfig
from easy_jax.experiments.image_networks import ImageNetworks
from easy_jax.experiments.language import Until
from easy_jax.experiments.measurements import Measurements
from easy_jax.experiments.plan import (
    Run,
    Stage,
    StageKey,
    loss_table_path,
    plan,
    pretrain_key,
    probe_key,
    row_key,
    run_stages,
    runs,
    weighting_of,
)
from easy_jax.experiments.results import row_of, select
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
    """Runs the stages of an experiment with images; their artefacts are in a workdir."""

    def __init__(self, config: ExperimentConfig, workdir: Path, terminal: Terminal):
        self.config = config
        self.workdir = workdir
        self.terminal = terminal
        self.mesh = sharding.make_mesh(config.mesh)
        self.networks = ImageNetworks(config.model, self.mesh)
        self.stages = plan(config)
        self._finished: dict[StageKey, Fit] = {}
        self._data: tuple[tuple[int, float], Tasks] | None = None
        self._did_work = False
        self._tables: dict[tuple[int, float, str], LossTable] = {}
        self._measured_before: dict[StageKey, dict[str, Any]] = {}
        self._trained: set[StageKey] = set()

    def run(self, until: Until) -> dict[str, Any]:
        """Runs the stages that are not done yet, in the order of the plan; returns the results."""
        self._log = metrics_log.MetricsLog(self.workdir, writes=processes.is_main_process())
        try:
            return self._run(until)
        finally:
            self._log.close()

    def _run(self, until: Until) -> dict[str, Any]:
        config = self.config
        self.terminal.start(
            {key.path: self._steps(stage) for key, stage in self.stages.items() if stage.config}
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
        for run in runs(config):
            last = run_stages(config, run)[-1].key
            if until == "train" or run.key not in rows:
                self.fit(last)
            if until != "train" and run.key not in rows:
                rows[run.key] = measured.add(self.evaluate(run))
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
        results = select(config, [rows[run.key] for run in runs(config)])
        if processes.is_main_process():
            sealed.write(self.workdir / "results.json", results)
        return results

    def _inputs(self) -> dict[str, str]:
        """Returns fingerprints of the weights and images that are read from files."""
        config = self.config
        found = {}
        if config.model.path:
            base = self.fit(pretrain_key(config, config.seeds[0]))
            found["base weights"] = fingerprints.of_state(base.model_state)
        if isinstance(config.data, TransferDataConfig):
            tasks = self._tasks(0, 0.0)
            for task, splits in (("pretrain", tasks.pretrain), ("target", tasks.target)):
                for split in ("train", "validation", "test"):
                    source = getattr(splits, split)
                    if source is not None:
                        found[f"{task}/{split}"] = fingerprint(source)
        return found

    # Stages.

    def fit(self, key: StageKey) -> Fit:
        """Returns the result of a stage: from memory, from its checkpoint, or by training."""
        if key in self._finished:
            return self._finished[key]
        stage = self.stages[key]
        self._forget(stage)
        result = (
            self._read_weights(stage) if stage.config is None else self._train(stage, stage.config)
        )
        if stage.config is None and key not in self._trained:
            self.terminal.print(f"{key.path}: from {self.config.model.path}")
        self._trained.add(key)
        self._did_work |= result.resumed_from < result.steps
        self._finished[key] = result
        return result

    def _forget(self, stage: Stage) -> None:
        """Frees the models that neither this stage nor a later one starts from."""
        needed = {each.start for each in self.stages.values() if each.key not in self._trained}
        # These are used by all runs with this seed and label noise.
        needed |= {pretrain_key(self.config, stage.seed), stage.start}
        if stage.label_noise is not None:
            needed.add(probe_key(stage.seed, stage.label_noise))
        self._finished = {key: fit for key, fit in self._finished.items() if key in needed}

    def _read_weights(self, stage: Stage) -> Fit:
        """Reads the pre-trained network that the configuration names."""
        assert isinstance(self.config.data, TransferDataConfig)
        state = self.networks.given(self.data(stage).pretrain, self.config.data.names[0])
        return Fit(state, steps=0, seconds=0.0, resumed_from=0)

    def _train(self, stage: Stage, stage_config: StageConfig) -> Fit:
        config, name = self.config, stage.key.path
        start = self.fit(stage.start).model_state if stage.start is not None else None
        tasks = self.data(stage)
        task = tasks.pretrain if stage.label_noise is None else tasks.target
        assert task.train is not None
        model = self._model(stage, start, task.num_classes)

        def on_epoch(epoch: int, model_state: nnx.State) -> None:
            if epoch % config.eval_every_epochs == 0 or epoch == stage_config.epochs:
                step = round(epoch * self._steps(stage) / stage_config.epochs)
                measured = self._measure(model_state, stage, "validation")
                accuracies = {task: values["accuracy"] for task, values in measured.items()}
                self._log.write(name, "validation", step, accuracies)

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
        """Returns the loss table of the probed model; scores the data if it does not exist.

        The table of the test data only groups examples for the report; no weight depends on it.
        """
        if (seed, label_noise, split) in self._tables:
            return self._tables[seed, label_noise, split]
        probe = self.stages[probe_key(seed, label_noise)]
        model_state = self.fit(probe.key).model_state
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
            progress=self.terminal.part(f"score {probe.key.path}", "examples"),
        )
        return table

    def evaluate(self, run: Run) -> dict[str, Any]:
        """Measures a run on the validation and test data of both tasks."""
        stages = run_stages(self.config, run)
        fits = [self.fit(stage.key) for stage in stages]
        model_state = fits[-1].model_state
        averaging = AVERAGINGS.find(run.method.averaging)
        if averaging.when == "after":
            start = self._starting_point(stages[0])
            model_state = averaging.merge(start, model_state, run.method.alpha)
        group_N = self._deciles(run)
        self.terminal.describe(f"evaluate {run.method.name}")
        before = self._before(run.seed)
        after = self._measure(model_state, stages[-1], "test", group_N)
        validation = self._measure(model_state, stages[-1], "validation")
        seconds = sum(each.seconds for each in fits)
        return row_of(run, before, after, validation, seconds, self.config.metrics)

    # Data and models.

    def data(self, stage: Stage) -> Tasks:
        """Returns both tasks with a stage's seed and label noise."""
        return self._tasks(stage.seed, stage.label_noise or 0.0)

    def _tasks(self, seed: int, label_noise: float) -> Tasks:
        key = (seed, label_noise)
        if isinstance(self.config.data, TransferDataConfig):
            key = (0, 0.0)  # files do not depend on seed and label noise: they are opened once
        if self._data is None or self._data[0] != key:
            self._data = None  # frees the memory before the next data are loaded
            self._data = (key, load_tasks(self.config, *key))
            self._list_left_out(self._data[1])
        return self._data[1]

    def _list_left_out(self, tasks: Tasks) -> None:
        """Writes which images were left out by `on_bad_example='drop'`, by split, with reasons."""
        found = {
            f"{task}/{split}": reasons
            for task in ("pretrain", "target")
            for split in ("train", "validation", "test")
            if (reasons := getattr(getattr(getattr(tasks, task), split), "left_out", {}))
        }
        if found and processes.is_main_process():
            files.write_json(self.workdir / "left_out_images.json", found)

    def _model(self, stage: Stage, start: nnx.State | None, num_classes: int) -> resnet.ResNet:
        """Returns the model that a stage starts with, in the mode in which it is trained."""
        if start is None:
            start = self.networks.fresh(num_classes, stage.seed)
        elif stage.new_head:
            start = self.networks.with_new_head(start, num_classes, stage.seed)
        return self.networks.merge(start, num_classes, stage.frozen_norm)

    def _starting_point(self, stage: Stage) -> nnx.State:
        """Returns the variables that a fine-tuning stage started with, for WiSE-FT."""
        assert stage.start is not None
        num_classes = self.data(stage).target.num_classes
        return nnx.state(self._model(stage, self.fit(stage.start).model_state, num_classes))

    def _weights(self, stage: Stage) -> dict[str, Any]:
        """Returns the arguments of `fit` that weight the examples of a stage."""
        weighting = weighting_of(stage)
        if "frozen" not in weighting.needs:
            return {"weighting": weighting}
        assert stage.label_noise is not None
        table = self.loss_table(stage.seed, stage.label_noise)
        if not isinstance(weighting, FlowOnline):
            return {"weighting": weighting, "table": table}
        probe = self.stages[probe_key(stage.seed, stage.label_noise)]
        num_classes = self.data(probe).target.num_classes
        tau = weighting.fit(table).temperature
        assert tau is not None
        online = OnlineWeights(
            self.networks.merge(self.fit(probe.key).model_state, num_classes),
            loss_fn=classification_loss,
            tau=tau,
            mesh=self.mesh,
        )
        return {"weighting": weighting, "table": table, "online": online}

    # Measurements.

    def _deciles(self, run: Run) -> np.ndarray:
        """Groups the target's test examples by the probed model's loss: deciles, if possible."""
        loss_N = self.loss_table(run.seed, run.label_noise, "test").loss_N()
        return evaluate.loss_groups(loss_N, min(10, len(loss_N)))

    def _measure(
        self,
        model_state: nnx.State,
        stage: Stage,
        split: Literal["validation", "test"],
        group_N: np.ndarray | None = None,
    ) -> dict[str, dict[str, Any]]:
        """Returns the metrics of `pretrain`, `target` or both: of each task that has the split.

        On the pre-training task, the model has the task-specific parts of the pre-trained one.
        `group_N` are groups of the target's examples.
        """
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
                metrics=self.config.metrics,
            )

        result = {}
        if getattr(tasks.pretrain, split) is not None:
            old = model_state
            if stage.label_noise is not None:
                pretrained = self.fit(pretrain_key(self.config, stage.seed)).model_state
                old = evaluate.with_task_parts(model_state, pretrained, resnet.is_task_specific)
            result["pretrain"] = measure(old, tasks.pretrain)
        if stage.label_noise is not None:
            result["target"] = measure(model_state, tasks.target, group_N)
        return result

    def _before(self, seed: int) -> dict[str, Any]:
        """Returns the metrics of the pre-training task before fine-tuning."""
        stage = self.stages[pretrain_key(self.config, seed)]
        if stage.key not in self._measured_before:
            measured = self._measure(self.fit(stage.key).model_state, stage, "test")
            self._measured_before[stage.key] = measured["pretrain"]
        return self._measured_before[stage.key]

    # Bookkeeping.

    def _steps(self, stage: Stage) -> int:
        if stage.config is None:
            return 0
        data, pretraining = self.config.data, stage.label_noise is None
        if isinstance(data, GlyphDataConfig):  # the size is known without loading the data
            size = data.pretrain_train if pretraining else data.target_train
        else:
            tasks = self.data(stage)
            source = (tasks.pretrain if pretraining else tasks.target).train
            assert source is not None
            size = len(source)
        return -(-size * stage.config.epochs // stage.config.batch_size)

    def _count_as_done(self, key: StageKey | None) -> None:
        """Advances the progress bar over a chain of stages whose results exist."""
        while key is not None:
            self.terminal.skip(key.path)
            key = self.stages[key].start
