"""Images in one folder per class: which files are read, skipped and refused."""

import bisect
import hashlib
import os
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from easy_jax.data import images
from easy_jax.data.images import ImageError
from easy_jax.data.sources import DataError, DataWarning, first_of
from easy_jax.io import fingerprint as fingerprints

Location = str | os.PathLike[str]
_ENDINGS = (
    ".jpg",
    ".jpeg",
    ".jpe",
    ".jfif",
    ".png",
    ".webp",
    ".bmp",
    ".gif",
    ".tif",
    ".tiff",
    *([".avif"] if "AVIF" in images.FORMATS else []),
)
_HEIC_ENDINGS = (".heic", ".heif")  # photos in a format that is not supported
# Files that operating systems and archives leave behind, in addition to names that begin with a
# dot; and the file `tmp` of Caltech-101.
_LEFTOVERS = ("thumbs.db", "ehthumbs.db", "desktop.ini", "__macosx", "@eadir", "$recycle.bin")
_LEFTOVER_FILES = ("tmp", "icon\r")


class FolderImages:
    """Images in `folder/<class>/<image>`; labels number the classes in the order of their names.

    Names are compared as text, as in torchvision and timm: class `10` comes before class `2`.
    Hidden files and leftovers of operating systems are ignored. Any other file that is not an
    image, and any link that leads out of the data set, is an error.

    Args:
      folder: contains one folder per class.
      classes: the class names that it must have, in order; default: those it has.
      root: the folder of the data set, into which links may lead; default: `folder`.
      missing_classes: with `classes`: some of them may have no folder or no images.

    Attributes:
      classes, num_classes: their names, by label, and how many there are.
      unusable: by position, images known to be unusable before reading: empty files and HEIC.

    Raises:
      DataError: no folder or no class in it, other classes than `classes`, a class without
        images, files whose ending is not that of an image, folders in a class, links out of the
        data set; the message has the first paths.

    Example:
      >>> import tempfile
      >>> from PIL import Image
      >>> folder = Path(tempfile.mkdtemp())
      >>> for name in ("dog", "cat"):
      ...   (folder / name).mkdir()
      ...   Image.new("RGB", (8, 8)).save(folder / name / "1.png")
      >>> store = FolderImages(folder)
      >>> store.classes, [label for _, label in store.read([0, 1])]
      (['cat', 'dog'], [0, 1])
    """

    def __init__(
        self,
        folder: Location,
        classes: Sequence[str] | None = None,
        *,
        root: Location | None = None,
        missing_classes: bool = False,
    ):
        self.folder = Path(folder)
        inside = _roots(self.folder, root)
        found = self.classes_of(self.folder, root)
        self.classes: Sequence[str] = found if classes is None else list(classes)
        self._check_classes(found, missing_classes)
        self.num_classes = len(self.classes)
        self.unusable: dict[int, ImageError] = {}
        self._names: list[str] = []
        self._ends: list[int] = []  # of each class among the names
        strays: list[str] = []
        digest = hashlib.sha256()
        for name in self.classes:
            start = len(self._names)
            for image, size in _images(self.folder / name, inside, strays) if name in found else ():
                path = str(self.folder / name / image)
                if size == 0:
                    self.unusable[len(self._names)] = images.empty(path)
                elif image.lower().endswith(_HEIC_ENDINGS):
                    self.unusable[len(self._names)] = images.heic(path)
                self._names.append(image)
                digest.update(f"{name}/{image}:{size}\n".encode(errors="surrogateescape"))
            if len(self._names) == start and not strays and not missing_classes:
                allow = "; or set missing_classes='allow'" if classes is not None else ""
                raise DataError(
                    f"the class folder {self.folder / name} has no images; fill or remove it{allow}"
                )
            self._ends.append(len(self._names))
        if strays:
            count = f"{len(strays)} entries of {self.folder}: " if len(strays) > 1 else ""
            raise DataError(f"{count}{first_of(strays)}; rename or remove what is no image")
        if not self._names:
            raise DataError(f"{self.folder} has no images")
        self._digest = digest.hexdigest()

    @staticmethod
    def classes_of(folder: Path, root: Location | None = None) -> list[str]:
        """Returns the sorted names of a folder's class folders; raises DataError without any."""
        if not folder.is_dir():
            raise DataError(f"{folder} is no folder; it holds a folder of images per class")
        entries = list(_visible(folder, _roots(folder, root)))
        strays = [entry.path for entry in entries if not entry.is_dir()]
        if strays:
            what = "is no folder of a class" if len(strays) == 1 else "are no folders of classes"
            raise DataError(
                f"{first_of(strays, ', ')} {what}; move {'it' if len(strays) == 1 else 'them'} out "
                f"of {folder}"
            )
        if not entries:
            raise DataError(f"{folder} has no folders of classes")
        return [entry.name for entry in entries]

    def _check_classes(self, found: Sequence[str], missing_classes: bool) -> None:
        missing = sorted(set(self.classes) - set(found))
        extra = sorted(set(found) - set(self.classes))
        if extra or (missing and not missing_classes):
            cure = (
                "" if extra else "; set missing_classes='allow' to go on without images of theirs"
            )
            raise DataError(
                f"the classes of {self.folder} are not those of the training data: missing "
                f"{missing[:5]}, only here {extra[:5]}{cure}"
            )

    def __len__(self) -> int:
        return len(self._names)

    def labels(self) -> np.ndarray:
        """Returns the label of every image, int64 [N]."""
        return np.repeat(np.arange(self.num_classes), np.diff([0, *self._ends]))

    def read(self, positions: Sequence[int]) -> list[tuple[bytes, int]]:
        found = []
        for position in positions:
            path = self._path(position)
            try:
                found.append((path.read_bytes(), self._label(position)))
            except OSError as error:
                reason = f"cannot be read: {error.strerror}"
                raise ImageError(str(path), "unreadable", reason) from error
        return found

    def where(self, position: int) -> str:
        return str(self._path(position))

    def fingerprint(self) -> str:
        """Returns a hash of every image's class, name and size in bytes.

        A change of content that keeps the size is not noticed.
        """
        return fingerprints.of_json({"folder": self._digest})

    def _label(self, position: int) -> int:
        return bisect.bisect_right(self._ends, position)

    def _path(self, position: int) -> Path:
        return self.folder / self.classes[self._label(position)] / self._names[position]


def warn_of_order(classes: Sequence[str], folder: Path) -> None:
    """Warns if all class names are numbers and their order as text is not that of the numbers."""
    if all(name.isdecimal() for name in classes):
        by_number = sorted(classes, key=int)
        if by_number != list(classes):
            place = next(i for i, name in enumerate(classes) if name != by_number[i])
            warnings.warn(
                f"the classes of {folder} are numbers; their labels count them in the order of "
                f"text, as torchvision and timm do: label {place} is class {classes[place]!r}, not "
                f"{by_number[place]!r}. Names of equal length, such as "
                f"{by_number[0].zfill(len(by_number[-1]))!r}, have one order",
                DataWarning,
                stacklevel=4,
            )


def visible_folders(folder: Path) -> list[str]:
    """Returns the names of the folders in a folder, sorted, without hidden ones and leftovers."""
    with os.scandir(folder) as entries:
        return sorted(entry.name for entry in entries if entry.is_dir() and not _left_over(entry))


def _images(folder: Path, inside: Sequence[Path], strays: list[str]) -> Iterator[tuple[str, int]]:
    """Yields names and sizes of a class's images, sorted; other files are added to `strays`."""
    for entry in _visible(folder, inside):
        if not entry.is_file():
            broken = entry.is_symlink() and not Path(entry.path).exists()
            what = "is a link to a file that is not there" if broken else "is no file"
            strays.append(f"{entry.path} {what}; a class folder holds images only")
        elif not entry.name.lower().endswith((*_ENDINGS, *_HEIC_ENDINGS)):
            strays.append(
                f"{entry.path} is no image: its name ends in none of {', '.join(_ENDINGS)}"
            )
        else:
            yield entry.name, entry.stat().st_size


def _visible(folder: Path, inside: Sequence[Path]) -> Iterator[os.DirEntry[str]]:
    """Yields the entries of a folder, sorted, without hidden files and leftovers.

    Raises:
      DataError: an entry that leads out of the folders `inside`.
    """
    with os.scandir(folder) as entries:
        for entry in sorted(entries, key=lambda entry: entry.name):
            if _left_over(entry):
                continue
            if entry.is_symlink():
                target = Path(entry.path).resolve()
                if not any(target.is_relative_to(place) for place in inside):
                    raise DataError(
                        f"{entry.path} is a link that leads out of {inside[-1]}; copy the file"
                    )
            yield entry


def _roots(folder: Path, root: Location | None) -> list[Path]:
    """Returns the folders that links may lead to."""
    return [folder.resolve(), *([] if root is None else [Path(root).resolve()])]


def _left_over(entry: os.DirEntry[str]) -> bool:
    """Returns whether an entry is hidden, or a leftover of an operating system or a tool."""
    name = entry.name.lower()
    if name.startswith(".") or name in _LEFTOVERS:
        return True
    return (name in _LEFTOVER_FILES or name.endswith(".tmp")) and not entry.is_dir()
