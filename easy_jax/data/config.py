"""Configuration of data: image data sets, instructions, and the conversion of text to tokens."""

import dataclasses
import math
from pathlib import Path
from typing import Literal

from easy_jax.io.checks import choice, require

ImageDataName = Literal[
    "cifar10",
    "cifar100",
    "oxford_flowers102",
    "caltech101",
    "cars196",
    "stanford_dogs",
    "imagenet2012",
    "other",
]


@dataclasses.dataclass(frozen=True, slots=True)
class GlyphDataConfig:
    """Letters rendered from fonts (pre-training) and handwritten digits (fine-tuning)."""

    image_size: int = 16
    pretrain_train: int = 12_000
    pretrain_validation: int = 1_000
    pretrain_test: int = 2_000
    target_train: int = 800
    target_validation: int = 400
    label_noise: tuple[float, ...] = (0.3,)

    def validate(self, path: str = "data") -> None:
        require(self.image_size >= 8, f"{path}.image_size", self.image_size, "at least 8")
        for name in (
            "pretrain_train",
            "pretrain_validation",
            "pretrain_test",
            "target_train",
            "target_validation",
        ):
            require(getattr(self, name) > 0, f"{path}.{name}", getattr(self, name), "positive")
        used = self.target_train + self.target_validation
        require(
            used < 1797,
            f"{path}.target_train + {path}.target_validation",
            used,
            "below 1,797, the number of digits, to leave a test set",
        )
        require(len(self.label_noise) > 0, f"{path}.label_noise", self.label_noise, "not empty")
        for share in self.label_noise:
            require(0.0 <= share < 1.0, f"{path}.label_noise", share, "at least 0 and below 1")

    @property
    def names(self) -> tuple[str, str]:
        """The names of the two tasks in reports."""
        return "letters", "digits"


@dataclasses.dataclass(frozen=True, slots=True)
class ImageDataConfig:
    """A data set of images, as `easy_jax.data.load_images` reads it.

    Attributes:
      name: by TFDS's name, which fixes classes, splits, normalisation and transforms; or `other`, a
        folder or Parquet of your own, with ImageNet's normalisation and the transforms for photos.
      format: `tfds`, prepared by TFDS as ArrayRecord (`path` is its `data_dir`); `folder`, folders
        `path/<split>/<class>/<image>`; `parquet`, files `path/<split>*.parquet`; or another of
        `easy_jax.data.formats.IMAGE_FORMATS`.
      path: where it is.
      image_field, label_field: columns of Parquet, features of TFDS.
      num_classes: of `other` in Parquet; elsewhere 0, for the data set's own.
      image_size: side of the model's input, in pixels.
      resize_size: what the shorter side is resized to before the crop; 0: 8/7 of `image_size`
        for photos (256 for 224), `image_size` for CIFAR (arXiv:2502.02797).
      interpolation: of the resize.
      mean, std: by channel, of pixels in [0, 1], for the normalisation of images; empty: the data
        set's (ImageNet's, or CIFAR's own). A checkpoint that needs other values has them in its
        `config.json`.
      rotate: turn images upright by their EXIF orientation; by default it is ignored, as in TFDS
        and torchvision.
      max_pixels: images with more are refused; the default is the size from which Pillow suspects
        a decompression bomb.
      check_images: a split with at most this many images is decoded once when it is opened, and
        all unusable ones are reported at once. In a larger split, only empty files and HEIC are
        found then, and the others one at a time, when they are read.
      on_bad_example: unusable images are an error; or they are left out, counted and listed
        (every image is then decoded once, however many there are).
      missing_classes: classes of the training data without a folder or without images in
        `validation` or `test` are an error; or allowed.
      test_share: for `other` without test data, the share of the training data that is used for
        testing, the same in every run; 0: there must be test data.
      augment: random training transforms; if False, training uses the scoring transforms.
      threads: reader threads, of this process or of each worker; 0: one per core, at most 8,
        because more threads would wait for Python's lock.
      workers: processes that decode instead of this one.

    Example:
      >>> config = ImageDataConfig(name="caltech101", format="folder", path="data/caltech101")
      >>> config.image_size
      224
    """

    name: ImageDataName = "cifar10"
    format: str = "tfds"
    path: str = ""
    image_field: str = "image"
    label_field: str = "label"
    num_classes: int = 0
    image_size: int = 224
    resize_size: int = 0
    interpolation: Literal["bilinear", "bicubic"] = "bilinear"
    mean: tuple[float, ...] = ()
    std: tuple[float, ...] = ()
    rotate: bool = False
    max_pixels: int = 89_478_485
    check_images: int = 20_000
    on_bad_example: Literal["error", "drop"] = "error"
    missing_classes: Literal["error", "allow"] = "error"
    test_share: float = 0.0
    augment: bool = True
    threads: int = 0
    workers: int = 0

    def validate(self, path: str = "data") -> None:
        from easy_jax.data.formats import IMAGE_FORMATS

        form = IMAGE_FORMATS.find(self.format, f"{path}.format")
        choice(self, path, "name", "interpolation", "on_bad_example", "missing_classes")
        require(bool(self.path), f"{path}.path", self.path, "a folder")
        if self.name == "other":
            own = " or ".join(repr(name) for name, each in IMAGE_FORMATS.items() if each.own_data)
            require(form.own_data, f"{path}.format", self.format, f"{own}, for name='other'")
        for name in ("image_field", "label_field"):
            require(bool(getattr(self, name)), f"{path}.{name}", "", "a field's name")
        counted = self.name == "other" and not form.finds_classes
        require(
            self.num_classes > 0 if counted else self.num_classes == 0,
            f"{path}.num_classes",
            self.num_classes,
            "positive for name='other' in Parquet, and 0 elsewhere",
        )
        require(self.image_size > 0, f"{path}.image_size", self.image_size, "positive")
        require(
            self.resize_size == 0 or self.resize_size >= self.image_size,
            f"{path}.resize_size",
            self.resize_size,
            f"0 or at least image_size = {self.image_size}",
        )
        for name in ("mean", "std"):
            value = getattr(self, name)
            ok = all(math.isfinite(each) and (each > 0 or name == "mean") for each in value)
            require(
                ok and len(value) in (0, 3),
                f"{path}.{name}",
                value,
                f"three {'positive ' if name == 'std' else ''}numbers, or empty",
            )
        require(self.max_pixels > 0, f"{path}.max_pixels", self.max_pixels, "positive")
        require(
            self.test_share == 0 or (self.name == "other" and 0 < self.test_share < 1),
            f"{path}.test_share",
            self.test_share,
            "between 0 and 1 for name='other', and 0 elsewhere",
        )
        for name in ("threads", "workers", "check_images"):
            require(getattr(self, name) >= 0, f"{path}.{name}", getattr(self, name), "at least 0")


@dataclasses.dataclass(frozen=True, slots=True)
class TransferDataConfig:
    """Two data sets of images.

    Attributes:
      pretrain: what the network was pre-trained on; its test split measures what is retained. Its
        other splits are only needed if the network is pre-trained here, without `model.path`.
      target: what it is fine-tuned on.
    """

    pretrain: ImageDataConfig = dataclasses.field(
        default_factory=lambda: ImageDataConfig("imagenet2012")
    )
    target: ImageDataConfig = dataclasses.field(default_factory=ImageDataConfig)

    def validate(self, path: str = "data") -> None:
        self.pretrain.validate(f"{path}.pretrain")
        self.target.validate(f"{path}.target")

    @property
    def names(self) -> tuple[str, str]:
        """The names of the two tasks in reports; for `other`, the name of its folder."""
        pretrain, target = (
            Path(data.path).name if data.name == "other" else data.name
            for data in (self.pretrain, self.target)
        )
        return pretrain, target

    @property
    def label_noise(self) -> tuple[float, ...]:
        """Labels are as they are."""
        return (0.0,)


# Alpaca's template for instructions without input. The response follows without a space.
ALPACA = (
    "Below is an instruction that describes a task. "
    "Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Response:"
)


# Its template for instructions with an input.
ALPACA_INPUT = (
    "Below is an instruction that describes a task, paired with an input that provides further "
    "context. Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Input:\n{input}\n\n### Response:"
)


@dataclasses.dataclass(frozen=True, slots=True)
class InstructionsConfig:
    """Where instructions and responses come from.

    Attributes:
      format: `jsonl`, a JSON-lines file; `parquet`, a file or a folder of them; `tfds`, a prepared
        TFDS data set; `gsm_symbolic`, problems that `reasoning-gym` generates from `seed`; or
        another of `easy_jax.data.formats.TEXT_FORMATS`.
      path: of the file or folder; of TFDS, its `data_dir`.
      name, split: of the TFDS data set.
      instruction_field, response_field: names in the records. `input_field`: the input that an
        instruction refers to, optional in each record; `weight_field`: numbers, multiplied into
        the training weights; `token_weight_field`: lists with a number for each target token (of
        the response and the EOS), multiplied into the weights of tokens. Empty: not read.
      seed: of generated problems.
      start, size: take the records [start, start + size); a size of 0 takes all that follow.
    """

    format: str = "jsonl"
    path: str = ""
    name: str = ""
    split: str = "train"
    instruction_field: str = "query"
    response_field: str = "response"
    input_field: str = ""
    weight_field: str = ""
    token_weight_field: str = ""
    seed: int = 0
    start: int = 0
    size: int = 0

    def optional_fields(self) -> list[str]:
        """Returns the names of the fields that are read besides instruction and response."""
        names = (self.input_field, self.weight_field, self.token_weight_field)
        return [name for name in names if name]

    def validate(self, path: str) -> None:
        from easy_jax.data.formats import TEXT_FORMATS

        form = TEXT_FORMATS.find(self.format, f"{path}.format")
        for name in ("instruction_field", "response_field"):
            require(bool(getattr(self, name)), f"{path}.{name}", "", "a field's name")
        for name in ("seed", "start", "size"):
            value = getattr(self, name)
            require(value >= 0, f"{path}.{name}", value, "at least 0")
        named = [self.instruction_field, self.response_field, *self.optional_fields()]
        require(len(set(named)) == len(named), f"{path}'s fields", named, "distinct")
        form.check(self, path)


@dataclasses.dataclass(frozen=True, slots=True)
class TextConfig:
    """Conversion of text to rows of tokens.

    Attributes:
      template: the prompt, with `{instruction}` in it; the response follows.
      input_template: the prompt of records with an input (`input_field`), with `{instruction}`
        and `{input}` in it; empty: Alpaca's, if `template` is Alpaca's.
      eos_token: appended to the response, and a target. `bos_token`: before the prompt.
      border: of prompt and response: `joined` makes every token with a character of the response
        a target; `authors` starts the targets after as many tokens as the prompt has by itself,
        as in the FLOW authors' code; `apart` tokenises both separately (`ej.text.tokenize`).
      max_length: longer examples are cut (and counted).
      row_length: tokens of a packed row; `max_segments`: examples in it, 0 for no limit and
        1 for no packing.
    """

    template: str = ALPACA
    input_template: str = ""
    eos_token: str = "</s>"
    bos_token: str = ""
    border: Literal["joined", "apart", "authors"] = "joined"
    max_length: int = 1024
    row_length: int = 1024
    max_segments: int = 0

    def validate(self, path: str) -> None:
        ok = self.template.count("{instruction}") == 1
        require(ok, f"{path}.template", self.template, "a text with {instruction} in it once")
        template = self.input_template
        ok = not template or template.count("{instruction}") == template.count("{input}") == 1
        require(ok, f"{path}.input_template", template, "a text with {instruction} and {input}")
        for name in ("template", "input_template"):
            # A shell does not interpret "\n"; the model would see a backslash and an n.
            value = getattr(self, name)
            ok = "\\n" not in value or "\n" in value
            require(
                ok, f"{path}.{name}", value, r"a text with line breaks: in a shell, $'...\n...'"
            )
        choice(self, path, "border")
        require(bool(self.eos_token), f"{path}.eos_token", self.eos_token, "a token's text")
        require(self.max_length > 1, f"{path}.max_length", self.max_length, "above 1")
        require(
            self.row_length >= self.max_length - 1,
            f"{path}.row_length",
            self.row_length,
            f"at least max_length - 1 = {self.max_length - 1}",
        )
        require(self.max_segments >= 0, f"{path}.max_segments", self.max_segments, "at least 0")
