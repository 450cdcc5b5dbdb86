"""Data sets on disk as TensorFlow Datasets prepares them, written without TensorFlow."""

from pathlib import Path


def write(data_dir: Path, name: str, version: str, features, splits, per_shard: int = 7) -> Path:
    """A data set in shards of ArrayRecord; returns `data_dir`.

    Args:
      data_dir: the folder of all data sets.
      name: of this one.
      version: as "1.2.3".
      features: name of a field -> feature of TFDS.
      splits: name of a split -> its records, each field -> value.
      per_shard: how many records a shard has at most.
    """
    import tensorflow_datasets as tfds

    folder = data_dir / name / version
    folder.mkdir(parents=True)
    identity = tfds.core.DatasetIdentity(
        name=name, version=tfds.core.Version(version), data_dir=str(folder), module_name=name
    )
    writer = tfds.core.SequentialWriter(
        tfds.core.DatasetInfo(builder=identity, features=tfds.features.FeaturesDict(features)),
        max_examples_per_shard=per_shard,
        file_format=tfds.core.FileFormat.ARRAY_RECORD,
    )
    writer.initialize_splits(list(splits))
    for split, records in splits.items():
        writer.add_examples({split: records})
    writer.close_all()
    return data_dir
