"""Configuration of language experiments: fine-tuning on instructions, evaluation on other text."""

import dataclasses
from typing import Literal

from easy_jax.data.config import ALPACA, InstructionsConfig, TextConfig
from easy_jax.experiments.config import MethodConfig, check_methods, check_name, check_positive
from easy_jax.io.checks import ConfigError, check_types, choice, finite_at_least_zero, require
from easy_jax.parallel.config import MeshConfig
from easy_jax.train.config import ScoringConfig, StageConfig

LORA_TARGETS = ("q", "k", "v", "o", "gate", "up", "down")


@dataclasses.dataclass(frozen=True, slots=True)
class LanguageModelConfig:
    """Configuration of a pre-trained model: weights, precision, rematerialisation, adapters.

    Attributes:
      path: a folder with `config.json`, safetensors and `tokenizer.json`, or `hf://OWNER/NAME` for
        a model of the Hugging Face Hub.
      dtype: dtype of the computation (softmax, norms and loss are float32).
      param_dtype: dtype of the parameters and the optimiser's state.
      remat: what the backward pass recomputes: `none`, `full`, or all but `dots` or `outputs`
        (`easy_jax.models.transformer.Transformer`).
      lora_rank, lora_alpha, lora_targets: the adapters of methods with `trainable="lora"`.
    """

    path: str = ""
    dtype: Literal["float32", "bfloat16"] = "bfloat16"
    param_dtype: Literal["float32", "bfloat16"] = "float32"
    remat: Literal["none", "full", "dots", "outputs"] = "full"
    lora_rank: int = 64
    lora_alpha: float = 64.0
    lora_targets: tuple[str, ...] = LORA_TARGETS

    def validate(self, path: str) -> None:
        require(bool(self.path), f"{path}.path", self.path, "a model's folder, or hf://OWNER/NAME")
        choice(self, path, "dtype", "param_dtype", "remat")
        require(self.lora_rank > 0, f"{path}.lora_rank", self.lora_rank, "positive")
        finite_at_least_zero(self, path, "lora_alpha")
        ok = bool(self.lora_targets) and set(self.lora_targets) <= set(LORA_TARGETS)
        require(ok, f"{path}.lora_targets", self.lora_targets, f"out of {list(LORA_TARGETS)}")


@dataclasses.dataclass(frozen=True, slots=True)
class LanguageConfig:
    """Configuration of a language experiment.

    Attributes:
      name: name of the experiment; the default workdir is `runs/<name>`.
      seed: random seed of the order of the examples and of the adapters' initialisation.
      mesh, model, text: device mesh, pre-trained model, and conversion of text to tokens.
      train: the fine-tuning data.
      heldout: data sets of the same kind that are only evaluated.
      general: text on which forgetting is measured: plain text files, or `verne` and
        `docstrings`, which come with installed packages. If empty, forgetting is not measured.
      general_characters: maximum number of characters of each text in `general`.
      scoring: the pass of the pre-trained model over `train`. With `on_bad_example="drop"`,
        records of training and held-out data that cannot be used are left out, too; they are
        counted, and listed in `dropped_train.jsonl` and `dropped_heldout.jsonl` in the workdir.
      finetune: the training stage.
      methods: the fine-tuning methods to compare.
      only: names of methods to run; empty means all.
      eval_batch_size: rows per batch of an evaluation.
      save_every_steps, log_every_steps: steps between two checkpoints and two log entries.
      keep_checkpoints, keep_best: number of each stage's latest checkpoints to keep (if the last
        is damaged, the one before it is used; each holds the model and the optimiser's state);
        and whether to keep the one with the lowest training loss, too.

    Example:
      >>> methods = (MethodConfig(), MethodConfig("flow", weighting="flow"))
      >>> [method.name for method in LanguageConfig(methods=methods).selected_methods()]
      ['standard', 'flow']
    """

    name: str = "language"
    seed: int = 42
    mesh: MeshConfig = dataclasses.field(default_factory=MeshConfig)
    model: LanguageModelConfig = dataclasses.field(default_factory=LanguageModelConfig)
    train: InstructionsConfig = dataclasses.field(default_factory=InstructionsConfig)
    heldout: tuple[InstructionsConfig, ...] = ()
    general: tuple[str, ...] = ()
    general_characters: int = 32_768
    text: TextConfig = dataclasses.field(default_factory=TextConfig)
    scoring: ScoringConfig = dataclasses.field(default_factory=ScoringConfig)
    finetune: StageConfig = dataclasses.field(default_factory=StageConfig)
    methods: tuple[MethodConfig, ...] = (MethodConfig(),)
    only: tuple[str, ...] = ()
    eval_batch_size: int = 8
    save_every_steps: int = 500
    keep_checkpoints: int = 2
    keep_best: bool = False
    log_every_steps: int = 10

    def validate(self) -> "LanguageConfig":
        """Checks every field; returns the configuration itself.

        Raises:
          ConfigError: a field is invalid; the message gives its name, value and valid values.
        """
        check_types(self, "config")
        check_name(self.name)
        require(self.seed >= 0, "config.seed", self.seed, "at least 0")
        self.mesh.validate("config.mesh")
        self.model.validate("config.model")
        self.train.validate("config.train")
        for number, heldout in enumerate(self.heldout):
            heldout.validate(f"config.heldout[{number}]")
        self.text.validate("config.text")
        if any(data.input_field for data in (self.train, *self.heldout)):
            ok = bool(self.text.input_template) or self.text.template == ALPACA
            require(ok, "config.text.input_template", "", "given, with a template of your own")
        self.scoring.validate("config.scoring")
        self.finetune.validate("config.finetune")
        check_methods(self.methods, self._only(), "language")
        self._check_reduction()
        check_positive(self, "general_characters", "eval_batch_size", "save_every_steps")
        check_positive(self, "keep_checkpoints", "log_every_steps")
        return self

    def _check_reduction(self) -> None:
        from easy_jax.core.weightings import get  # needs JAX

        ok = not self.train.token_weight_field or self.finetune.reduction == "token_mean"
        because = "'token_mean', with train.token_weight_field"
        require(ok, "config.finetune.reduction", self.finetune.reduction, because)
        for method in self.methods:
            by_token = get(method.weighting, **dict(method.weighting_options)).level == "token"
            if by_token and self.finetune.reduction != "token_mean":
                raise ConfigError(
                    f"config.finetune.reduction is {self.finetune.reduction!r}; it must be "
                    f"'token_mean' for the method {method.name}, which weights tokens"
                )

    def selected_methods(self) -> tuple[MethodConfig, ...]:
        """Returns the methods to run: those of `only`, or all."""
        return tuple(m for m in self.methods if not self.only or m.name in self._only())

    def _only(self) -> list[str]:
        # On the command line `--config.only=a,b` arrives as one string.
        return [name for entry in self.only for name in entry.split(",")]
