"""Language experiments: score with the pre-trained model, fine-tune by every method, evaluate.

Every stage writes an artefact to the workdir, and is skipped if its artefact is complete.
Experiments are started by `easy_jax.pipeline`.
"""

import dataclasses
import json
from pathlib import Path
from typing import Any, Literal

import jax.numpy as jnp
from flax import nnx
from tokenizers import Tokenizer

from easy_jax.core import causal_lm
from easy_jax.core.merge import AVERAGINGS
from easy_jax.data import instructions, text
from easy_jax.data.bad_examples import BadExamples
from easy_jax.data.config import InstructionsConfig
from easy_jax.data.packing import PackedSource
from easy_jax.experiments.config import MethodConfig
from easy_jax.experiments.language_config import LanguageConfig
from easy_jax.experiments.measurements import Measurements
from easy_jax.experiments.plan import ema_decay, path_of, sfa_beta, weighting_of
from easy_jax.io import files, metrics_log, sealed
from easy_jax.io import fingerprint as fingerprints
from easy_jax.io.checks import ConfigError
from easy_jax.io.terminal import Terminal
from easy_jax.models import lora
from easy_jax.models.transformer import Transformer
from easy_jax.models.transformer_config import TransformerConfig
from easy_jax.parallel import processes, sharding
from easy_jax.pretrained import hugging_face
from easy_jax.train import evaluate, scoring
from easy_jax.train.config import StageConfig
from easy_jax.train.fitting import fit
from easy_jax.train.loss_table import LossTable

Until = Literal["score", "train", "export", "evaluate", "report"]
BASE = "base"


class LanguageExperiment:
    """Runs the stages of a language experiment; their artefacts are in a workdir."""

    def __init__(self, config: LanguageConfig, workdir: Path, terminal: Terminal):
        self.config = config
        self.workdir = workdir
        self.terminal = terminal
        self.mesh = sharding.make_mesh(config.mesh)
        self.tokenizer: Tokenizer = text.load_tokenizer(hugging_face.resolve(config.model.path))
        self.model = hugging_face.load(
            config.model.path,
            dtype=jnp.dtype(config.model.dtype),
            param_dtype=jnp.dtype(config.model.param_dtype),
            remat=config.model.remat,
            mesh=self.mesh,
        )
        self.train = self._instructions("train", config.train)
        self._scored: LossTable | None = None
        self._measured_on: dict[str, PackedSource] | None = None
        terminal.print(f"training data: {self.train.examples.describe()}")

    def run(self, until: Until) -> dict[str, Any]:
        """Runs the stages that are not done yet; returns the results, if `until` includes them."""
        if until == "score":
            self.loss_table()
            return {}
        log = metrics_log.MetricsLog(self.workdir, writes=processes.is_main_process())
        try:
            return self._run(until, log)
        finally:
            log.close()

    def _run(self, until: Until, log: metrics_log.MetricsLog) -> dict[str, Any]:
        methods = self.config.selected_methods()
        measured = until in ("evaluate", "report")
        steps = self._expected_steps()
        self.terminal.start({stage_name(method): steps for method in methods}, roughly=True)
        if self._weighs():
            self._table()
        stored = Measurements(self.workdir / "cells.jsonl", self._inputs)
        rows = {row["method"]: row for row in stored.read()} if measured else {}
        if measured and all(name in rows for name in (BASE, *(m.name for m in methods))):
            self.terminal.print(
                f"all is done: {len(rows)} results, in {self.workdir} (use another --workdir to "
                "start anew)"
            )
        if measured and BASE not in rows:
            self.terminal.describe("evaluate the pre-trained model")
            rows[BASE] = stored.add({"method": BASE, **self._measure(self.model)})
        for method in methods:
            if method.name in rows:
                self.terminal.skip(stage_name(method))
                continue
            model, seconds = self.fit(method, log)
            if until == "export":
                self._export(method, model)
            if not measured:
                continue
            self.terminal.describe(f"evaluate {method.name}")
            row = {"method": method.name, **self._measure(model), "seconds": seconds}
            rows[method.name] = stored.add(row)
        if not measured:
            return {}
        results = {"language": [rows[name] for name in (BASE, *(m.name for m in methods))]}
        if processes.is_main_process():
            sealed.write(self.workdir / "results.json", results)
        return results

    # Stages.

    def loss_table(self) -> LossTable:
        """Returns the loss table of the pre-trained model; scores the data if it does not exist."""
        config = self.config.scoring
        table = scoring.score(
            self.model,
            self.train,
            self.workdir / "loss_table",
            loss_fn=causal_lm.causal_lm_token_losses,
            token_losses=True,
            batch_size=config.batch_size,
            mesh=self.mesh,
            on_bad_example=config.on_bad_example,
            rows_per_part=config.rows_per_part,
            progress=self.terminal.part("score", "examples"),
        )
        self.terminal.print(
            f"loss table: {table.directory}, {table.num_examples} examples, temperature "
            f"{table.temperature:.4g} nats, of tokens {table.token_temperature:.4g}"
        )
        return table

    def fit(self, method: MethodConfig, log: metrics_log.MetricsLog) -> tuple[Transformer, float]:
        """Trains by a method, or loads its checkpoint; returns the model and the training time."""
        config = self.config
        model = nnx.merge(*nnx.split(self.model))
        trainable = trainable_filter(method, model.config)
        if method.trainable == "lora":
            add_adapters(model, config)
        weighting = weighting_of(method)
        name = stage_name(method)
        directory = self.workdir / "checkpoints" / name
        result = fit(
            model,
            self.train,
            directory,
            stage=stage_of(config.finetune, method),
            loss_fn=causal_lm.causal_lm_loss,
            weighting=weighting,
            table=self._table() if "frozen" in weighting.needs else None,
            trainable=trainable,
            sfa_beta=sfa_beta(method),
            seed=config.seed,
            mesh=self.mesh,
            name=name,
            log=log,
            log_every_steps=config.log_every_steps,
            save_every_steps=config.save_every_steps,
            keep=config.keep_checkpoints,
            keep_best=config.keep_best,
            progress=self.terminal.part(name, where=directory),
            on_speed=self.terminal.speed,
        )
        state = result.model_state
        averaging = AVERAGINGS.find(method.averaging)
        if averaging.when == "after":
            state = averaging.merge(nnx.state(self.model), state, method.alpha)
        return nnx.merge(nnx.graphdef(model), state), result.seconds

    def _export(self, method: MethodConfig, model: Transformer) -> None:
        """Writes a model's folder for `transformers`; an existing folder is of the same model."""
        folder = self.workdir / "exported" / method.name
        if not processes.broadcast(
            "looking for an export", lambda: (folder / "config.json").exists()
        ):
            with files.local_folder(folder) as local:
                hugging_face.export(
                    model,
                    local,
                    base=self.config.model.path,
                    eos_token_id=self.train.examples.eos_id,
                )
        self.terminal.print(f"{method.name}: exported to {folder}")

    def _table(self) -> LossTable:
        if self._scored is None:
            self._scored = self.loss_table()
        return self._scored

    def _expected_steps(self) -> int:
        """Estimates the steps of a stage, as if rows were full; `fit` finds the exact number."""
        source, stage = self.train, self.config.finetune
        packed = -(-int((source.examples.lengths - 1).sum()) // source.row_length)
        rows = len(source) if source.max_segments == 1 else packed
        return -(-rows * stage.epochs // stage.batch_size)

    # Data and measurements.

    def records(self) -> dict[str, list[Any]]:
        """Returns the training data's texts as `{field name: list by example id}`."""
        config = self.config.train
        names = (config.instruction_field, config.input_field, config.response_field)
        columns = instructions.read(config, BadExamples("drop"))
        for i in self.train.examples.dropped_ids:  # may have anything there
            for name in filter(None, names):
                columns[name][i] = None
        return {name: columns[name] for name in names if name}

    def _instructions(self, name: str, config: InstructionsConfig) -> PackedSource:
        """Loads instruction data; writes dropped records to `dropped_<name>.jsonl`."""
        bad = BadExamples(self.config.scoring.on_bad_example)
        source = instructions.load(config, self.config.text, self.tokenizer, bad)
        text.check_vocabulary(source.examples, self.model.config.vocab)
        if len(bad) and processes.is_main_process():
            lines = [json.dumps(row) + "\n" for row in bad.rows()]
            files.write(self.workdir / f"dropped_{name}.jsonl", "".join(lines))
        return source

    def _sources(self) -> dict[str, PackedSource]:
        """Returns held-out data and general text by their names in the results."""
        config = self.config
        if self._measured_on is None:
            sources = {}
            for number, heldout in enumerate(config.heldout):
                name = f"heldout{number or ''}"
                sources[name] = self._instructions(name, heldout)
                self.terminal.print(f"{name} data: {sources[name].examples.describe()}")
            for path in config.general:
                name = Path(path).stem
                if name in sources:
                    raise ConfigError(
                        f"config.general has {path}, but there is another text called {name}, "
                        "which its results would replace; give the file another name"
                    )
                sources[name] = instructions.general(
                    path, config.general_characters, config.text, self.tokenizer
                )
            self._measured_on = sources
        return self._measured_on

    def _inputs(self) -> dict[str, str]:
        """Returns fingerprints of what the results depend on in addition to the configuration."""
        found = {
            "base model": fingerprints.of_json(dataclasses.asdict(self.model.config)),
            "base weights": fingerprints.of_state(nnx.state(self.model)),
            "training data": self.train.fingerprint(),
        }
        if self._weighs():
            found["loss table"] = self._table().fingerprint()
        return found | {name: source.fingerprint() for name, source in self._sources().items()}

    def _weighs(self) -> bool:
        methods = self.config.selected_methods()
        return any("frozen" in weighting_of(method).needs for method in methods)

    def _measure(self, model: Transformer) -> dict[str, float]:
        """Measures cross-entropy and perplexity on held-out data and on general text."""
        values: dict[str, float] = {}
        for name, source in self._sources().items():
            measured = evaluate.language(
                model, source, batch_size=self.config.eval_batch_size, mesh=self.mesh
            )
            values |= {f"{name}_{key}": value for key, value in measured.items()}
        return values


def is_head(path: Any, variable: Any) -> bool:
    """NNX filter of the language-model head of an untied model."""
    del variable
    return path[0] == "head"


def is_embedding(path: Any, variable: Any) -> bool:
    """NNX filter of the embedding, which is the head of a tied model."""
    del variable
    return path[0] == "embedding"


def add_adapters(model: Transformer, config: LanguageConfig) -> None:
    """Adds low-rank adapters to a model, as the configuration specifies."""
    lora.add_adapters(
        model,
        rank=config.model.lora_rank,
        alpha=config.model.lora_alpha,
        targets=config.model.lora_targets,
        rngs=nnx.Rngs(params=config.seed),
    )


def trainable_filter(method: MethodConfig, config: TransformerConfig) -> Any:
    """Returns an NNX filter of the parameters that a method trains."""
    if method.trainable == "head":
        return is_embedding if config.tied else is_head
    return nnx.LoRAParam if method.trainable == "lora" else nnx.Param


def stage_of(stage: StageConfig, method: MethodConfig) -> StageConfig:
    """Returns a method's stage: the shared one with the method's anchor and moving average."""
    optimizer = dataclasses.replace(
        stage.optimizer,
        anchor=method.anchor,
        anchor_strength=method.anchor_strength,
        anchor_per_parameter=True,
        ema_decay=ema_decay(method) or stage.optimizer.ema_decay,
    )
    return dataclasses.replace(stage, optimizer=optimizer)


def stage_name(method: MethodConfig) -> str:
    """Returns a stage's directory below `checkpoints/`; methods with the same stage share it."""
    return path_of(method)
