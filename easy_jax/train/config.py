"""Configuration of a training stage and of scoring."""

import dataclasses
from typing import Literal

from easy_jax.core.config import OptimizerConfig, Reduction
from easy_jax.io.checks import choice, require


@dataclasses.dataclass(frozen=True, slots=True)
class StageConfig:
    """Configuration of one training stage: its length, batches and optimiser.

    Attributes:
      epochs: passes over the data.
      batch_size: examples per step over all devices and processes; for packed text, rows.
      micro_batches: number of parts in which a batch is computed in sequence, to save memory.
      reduction: how per-example losses become one number (`easy_jax.core.step`).
      optimizer: the optimiser and its schedule.

    Example:
      >>> StageConfig(epochs=2, batch_size=128, reduction="token_mean").micro_batches
      1
    """

    epochs: int = 1
    batch_size: int = 64
    micro_batches: int = 1
    reduction: Reduction = "example_mean"
    optimizer: OptimizerConfig = dataclasses.field(default_factory=OptimizerConfig)

    def validate(self, path: str) -> None:
        for name in ("epochs", "batch_size", "micro_batches"):
            require(getattr(self, name) > 0, f"{path}.{name}", getattr(self, name), "positive")
        require(
            self.batch_size % self.micro_batches == 0,
            f"{path}.micro_batches",
            self.micro_batches,
            f"a divisor of batch_size = {self.batch_size}",
        )
        choice(self, path, "reduction")
        self.optimizer.validate(f"{path}.optimizer")


@dataclasses.dataclass(frozen=True, slots=True)
class ScoringConfig:
    """Configuration of scoring, the pass of the frozen model over the fine-tuning set."""

    batch_size: int = 256
    rows_per_part: int = 100_000
    on_bad_example: Literal["error", "drop"] = "error"

    def validate(self, path: str = "scoring") -> None:
        require(self.batch_size > 0, f"{path}.batch_size", self.batch_size, "positive")
        require(self.rows_per_part > 0, f"{path}.rows_per_part", self.rows_per_part, "positive")
        choice(self, path, "on_bad_example")
