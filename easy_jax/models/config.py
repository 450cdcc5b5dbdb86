"""Configuration of residual networks."""

import dataclasses
from typing import Literal

from easy_jax.io.checks import choice, require

# timm's name of a network -> the kind of block and the number of blocks per stage.
RESNETS: dict[str, tuple[Literal["basic", "bottleneck"], tuple[int, ...]]] = {
    "resnet18": ("basic", (2, 2, 2, 2)),
    "resnet34": ("basic", (3, 4, 6, 3)),
    "resnet50": ("bottleneck", (3, 4, 6, 3)),
    "resnet101": ("bottleneck", (3, 4, 23, 3)),
}


@dataclasses.dataclass(frozen=True, slots=True)
class ResNetConfig:
    """Configuration of a residual network; the default is a small network for small images.

    Attributes:
      in_channels: channels of the images.
      width: channels of the stem and inside the blocks of the first stage. Each later stage
        doubles the channels and halves height and width. The output of a bottleneck block has
        four times as many channels as its inside.
      depths: number of blocks per stage.
      block: `basic` (two 3x3 convolutions) or `bottleneck` (1x1, 3x3 with the stride, 1x1).
      stem: `small` (a 3x3 convolution) or `imagenet` (a 7x7 convolution and a 3x3 max pooling,
        both with stride 2).
      path: pre-trained weights of timm or torchvision: a folder, or `hf://OWNER/NAME` for a model
        on the Hugging Face Hub, such as `hf://timm/resnet50.a1_in1k`. Empty: random weights.
      dtype: dtype of the computation; parameters, BatchNorm and the head are always float32.

    Example:
      >>> ResNetConfig.named("resnet50").depths
      (3, 4, 6, 3)
    """

    in_channels: int = 1
    width: int = 16
    depths: tuple[int, ...] = (1, 1, 1)
    block: Literal["basic", "bottleneck"] = "basic"
    stem: Literal["small", "imagenet"] = "small"
    path: str = ""
    dtype: Literal["float32", "bfloat16"] = "float32"

    @classmethod
    def named(
        cls,
        name: str,
        *,
        in_channels: int = 3,
        path: str = "",
        dtype: Literal["float32", "bfloat16"] = "float32",
    ) -> "ResNetConfig":
        """Returns the configuration of a network in `RESNETS`.

        Raises:
          ConfigError: the name is unknown.

        Example:
          >>> ResNetConfig.named("resnet50").depths
          (3, 4, 6, 3)
        """
        require(name in RESNETS, "the name of the network", name, f"one of {list(RESNETS)}")
        block, depths = RESNETS[name]
        return cls(in_channels, 64, depths, block, "imagenet", path, dtype)

    def name(self) -> str | None:
        """Returns the network's name in `RESNETS`, or None; input channels are not compared."""
        for name in RESNETS:
            named = self.named(name, in_channels=self.in_channels, path=self.path, dtype=self.dtype)
            if named == self:
                return name
        return None

    def validate(self, path: str = "model") -> None:
        require(self.in_channels > 0, f"{path}.in_channels", self.in_channels, "positive")
        require(self.width > 0, f"{path}.width", self.width, "positive")
        ok = len(self.depths) > 0 and all(depth > 0 for depth in self.depths)
        require(ok, f"{path}.depths", self.depths, "one positive number of blocks per stage")
        choice(self, path, "block", "stem", "dtype")
