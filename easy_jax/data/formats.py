"""The formats of data, by the `format` of a configuration.

A new format is a class in a file of its own, and a line here. Importing this module does not
import any library that reads data; a format imports what it needs when data are read.
"""

from easy_jax.data import image_formats, text_formats
from easy_jax.io.registry import Registry

TEXT_FORMATS: Registry[text_formats.TextFormat] = Registry("text format")
TEXT_FORMATS.register("jsonl")(text_formats.JsonLines())
TEXT_FORMATS.register("parquet")(text_formats.Parquet())
TEXT_FORMATS.register("tfds")(text_formats.Tfds())
TEXT_FORMATS.register("gsm_symbolic")(text_formats.GsmSymbolic())

IMAGE_FORMATS: Registry[image_formats.ImageFormat] = Registry("image format")
IMAGE_FORMATS.register("tfds")(image_formats.Tfds())
IMAGE_FORMATS.register("folder")(image_formats.Folders())
IMAGE_FORMATS.register("parquet")(image_formats.Parquet())
