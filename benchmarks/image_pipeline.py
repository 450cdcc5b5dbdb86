"""Images per second decoded and augmented, against torchvision in PyTorch. See README.md.

python benchmarks/image_pipeline.py
"""

import os
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np
import torch
import torchvision
from PIL import Image
from sklearn.datasets import load_sample_images
from timing import exit_unless, median_ratio
from torchvision.transforms import v2

import easy_jax as ej
from easy_jax import Reading
from easy_jax.data.image_folders import FolderImages
from easy_jax.data.images import Transforms

NUM_IMAGES = 1024
BATCH_SIZE = 64
WORKERS = len(os.sched_getaffinity(0))
ROUNDS = 6
BOUND = 1.0


def write_photos(folder: Path) -> None:
    """Cuts of two photos, 500 x 375 as ImageNet's most common size, as JPEGs of about 70 kB."""
    photos = [Image.fromarray(array) for array in load_sample_images().images]
    rng = np.random.default_rng(0)
    for number in range(NUM_IMAGES):
        width = int(rng.integers(400, 570))  # 4 : 3 and inside, the photos are 640 x 427
        left = int(rng.integers(640 - width + 1))
        top = int(rng.integers(427 - width * 3 // 4 + 1))
        box = (left, top, left + width, top + width * 3 // 4)
        cut = photos[number % 2].resize((500, 375), Image.Resampling.LANCZOS, box)
        path = folder / "train" / f"class{number % 8}" / f"{number:05d}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        cut.save(path, quality=90)


def images_per_second(batches: Iterable[object]) -> float:
    """Of the second of two passes: during the first, worker processes start."""
    steps = 2 * NUM_IMAGES // BATCH_SIZE
    iterator = iter(batches)
    for _ in range(steps // 2):
        next(iterator)
    start = time.perf_counter()
    for _ in range(steps // 2, steps):
        next(iterator)
    seconds = time.perf_counter() - start
    if hasattr(iterator, "close"):  # ends worker processes; PyTorch's end when it is dropped
        iterator.close()
    return NUM_IMAGES / seconds


def torch_loader(folder: Path, *last: v2.Transform) -> Callable[[], Iterable[object]]:
    """The paper's views for photos (section 2), in as many worker processes."""
    transform = v2.Compose(
        [
            v2.Resize(256),
            v2.RandomCrop(224),
            v2.RandomHorizontalFlip(),
            v2.ColorJitter(0.2, 0.2, 0.2),
            *last,
        ]
    )
    dataset = torchvision.datasets.ImageFolder(folder / "train", transform)
    twice = torch.utils.data.ConcatDataset([dataset, dataset])
    return lambda: torch.utils.data.DataLoader(twice, BATCH_SIZE, shuffle=True, num_workers=WORKERS)


def main() -> None:
    # PyTorch's workers are forked, its default; they run nothing of JAX.
    warnings.filterwarnings("ignore", message="os.fork", category=RuntimeWarning)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_photos(folder)
        source = ej.ImageSource(FolderImages(folder / "train"), Transforms())

        def ours(reading: Reading) -> Callable[[], Iterable[object]]:
            return lambda: ej.training_loader(source, BATCH_SIZE, epochs=2, seed=0, reading=reading)

        mean, std = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
        floats = (v2.ToImage(), v2.ToDtype(torch.float32, scale=True), v2.Normalize(mean, std))
        makers = {
            "threads": ours(Reading(threads=WORKERS, prefetch=2 * WORKERS)),
            "workers": ours(Reading(threads=1, prefetch=2, workers=WORKERS)),
            "torchvision": torch_loader(folder, *floats),
            "torchvision uint8": torch_loader(folder, v2.PILToTensor()),
        }
        rates: dict[str, list[float]] = {name: [] for name in makers}
        names = list(makers)
        for number in range(ROUNDS):
            for name in names[number % 4 :] + names[: number % 4]:
                rates[name].append(images_per_second(makers[name]()))

    ratio = median_ratio(rates["threads"], rates["torchvision"])
    others = [
        f"{ours} / {peer} {median_ratio(rates[ours], rates[peer]):.2f}"
        for ours, peer in (("threads", "torchvision uint8"), ("workers", "torchvision"))
    ]
    print(
        "image_pipeline: "
        + ", ".join(f"{name} {statistics.median(rates[name]):.0f}" for name in names)
        + f" images/s with {WORKERS} workers, RATIO {ratio:.2f} (bound {BOUND}); "
        + ", ".join(others)
    )
    exit_unless(ratio >= BOUND, f"threads / torchvision >= {BOUND}")


if __name__ == "__main__":
    main()
