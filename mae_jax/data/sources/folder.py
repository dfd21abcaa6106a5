"""A local folder of image files, with or without class folders, with or without splits.

Layout, in the order in which it is decided:

- Hidden files and folders are skipped; links are followed. Images end in one of `EXTENSIONS`.
- A folder that holds no image and just one folder stands for that folder.
- `train` beside `val`, `validation` or `test` (the first of them that exists) are the splits.
  Otherwise a share of the images is held out: those whose path, relative to the folder, has the
  smallest BLAKE2b digest, for each class by itself. A new image does not move most of the others.
- The folders at the top of the training split are the classes, sorted by name, if there are at
  least two and every image of that split lies in one. Otherwise the images have no labels; nor
  have those of a validation folder without folders in it.
"""

from __future__ import annotations

import hashlib
import os
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from mae_jax.data.sources import EVAL_SPLITS, is_training
from mae_jax.errors import ConfigError

EXTENSIONS = (".jpg", ".jpeg", ".png", ".webp")


class Folder:
    """Image files below `root`, read as bytes.

    Attributes:
      root: the folder of this split.
      names: relative paths with "/" of the images.
      classes: names of the classes; empty if the images have no labels.
      labels: index in `classes` of each image, -1 without labels.
    """

    exif = True

    def __init__(self, root: str, names: Sequence[str], classes: Sequence[str]):
        self.root = root
        self.names = list(names)
        self.classes = tuple(classes)
        self.num_classes = len(self.classes)
        ids: dict[str | None, int] = {name: i for i, name in enumerate(self.classes)}
        self.labels = [ids.get(_top(name), -1) for name in self.names]
        if self.classes and -1 in self.labels:
            stray = self.describe(self.labels.index(-1))
            raise ConfigError(
                f"data.path: expected each image in one of the {self.num_classes} class folders "
                f"of the training split, got {stray}"
            )

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, index: int) -> dict[str, Any]:
        with open(self.describe(index), "rb") as file:
            return {"image": file.read(), "label": self.labels[index]}

    def describe(self, index: int) -> str:
        """Return the path of the image."""
        return os.path.join(self.root, self.names[index])

    def fingerprint(self) -> str:
        """Digest names and labels, not the pixels."""
        digest = hashlib.blake2b(digest_size=8)
        for name, label in zip(self.names, self.labels, strict=True):
            digest.update(os.fsencode(name) + b"\0%d\n" % label)
        return digest.hexdigest()


def make(split: str, *, path: str, held_out: float = 0.1) -> Folder:
    """Return the split "train" or "val" of the images below `path`.

    Args:
      split: "train" or "val" ("validation", "test": the same).
      path: a local folder; `~` is the user's home.
      held_out: the share for "val" where the folder has no splits of its own, in (0, 1): of each
        class with two images or more, at least one and never all.

    Raises:
      ConfigError: naming `data.path` or `data.held_out`, if there is nothing to read.
    """
    training = is_training(split)
    root = _descend(_checked(path))
    train_root = os.path.join(root, "train")
    val_roots = [os.path.join(root, name) for name in EVAL_SPLITS]
    val_root = next((folder for folder in val_roots if os.path.isdir(folder)), None)
    if val_root is not None and os.path.isdir(train_root):
        names = _images(train_root)
        if not training:
            val_names = _images(val_root)
            is_flat = not any(map(_top, val_names))  # as ImageNet's validation set is handed out
            return Folder(val_root, val_names, [] if is_flat else _classes(names))
        return Folder(train_root, names, _classes(names))

    names = _images(root)
    classes = _classes(names)
    chosen = _held_out(names, held_out, by_class=bool(classes))
    if not chosen:
        raise ConfigError(
            "data.path: expected a validation folder or a second image to hold out, "
            f"got {len(names)} image(s){' of different classes' if classes else ''} in {root}"
        )
    return Folder(root, [name for name in names if (name in chosen) != training], classes)


def _checked(path: str) -> str:
    if not path:
        raise ConfigError("data.path: expected a folder of images, got an empty string")
    if "://" in path:
        raise ConfigError(f"data.path: expected a local folder, got {path}")
    path = os.path.expanduser(path)
    if not os.path.isdir(path):
        what = "a file" if os.path.exists(path) else "nothing"
        raise ConfigError(f"data.path: expected a folder of images, got {what} at {path}")
    return path


def _entries(folder: str) -> list[os.DirEntry[str]]:
    try:
        with os.scandir(folder) as entries:
            return [entry for entry in entries if not entry.name.startswith(".")]
    except OSError as error:
        raise ConfigError(
            f"data.path: expected a readable folder, got {error.strerror} at {folder}"
        ) from error


def _is_image(entry: os.DirEntry[str]) -> bool:
    return entry.name.lower().endswith(EXTENSIONS) and _leads_to(entry.is_file)


def _leads_to(kind: Callable[[], bool]) -> bool:
    try:
        return kind()
    except OSError:  # a link to itself, or through a folder that may not be entered
        return False


def _descend(folder: str) -> str:
    seen = set()  # a link may lead back
    while (real := os.path.realpath(folder)) not in seen:
        seen.add(real)
        entries = _entries(folder)
        folders = [entry.path for entry in entries if _leads_to(entry.is_dir)]
        if len(folders) != 1 or any(map(_is_image, entries)):
            break
        folder = folders[0]
    return folder


def _scan(folder: str, prefix: str = "", above: tuple[str, ...] = ()) -> Iterable[str]:
    real = os.path.realpath(folder)
    if real in above:  # a link that leads back
        return
    for entry in _entries(folder):
        if _is_image(entry):
            yield prefix + entry.name
        elif _leads_to(entry.is_dir):
            yield from _scan(entry.path, f"{prefix}{entry.name}/", (*above, real))


def _images(root: str) -> list[str]:
    names = sorted(_scan(root))
    if not names:
        raise ConfigError(
            f"data.path: expected images ({' '.join(EXTENSIONS)}), got none in {root}"
        )
    return names


def _top(name: str) -> str | None:
    top, slash, _ = name.partition("/")
    return top if slash else None


def _classes(names: Sequence[str]) -> list[str]:
    tops = {_top(name) for name in names}
    return [] if None in tops or len(tops) < 2 else sorted(top for top in tops if top is not None)


def _held_out(names: Sequence[str], share: float, *, by_class: bool) -> set[str]:
    if not 0 < share < 1:
        raise ConfigError(f"data.held_out: expected a share between 0 and 1, got {share}")
    groups: dict[str | None, list[str]] = defaultdict(list)
    for name in names:
        groups[_top(name) if by_class else None].append(name)
    chosen = set()
    for group in groups.values():
        count = min(max(1, round(len(group) * share)), len(group) - 1)
        group.sort(key=lambda name: hashlib.blake2b(os.fsencode(name), digest_size=8).digest())
        chosen.update(group[:count])
    return chosen
