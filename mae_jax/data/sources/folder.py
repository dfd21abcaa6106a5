"""A local folder of image files, with or without class folders, with or without splits.

Layout, in the order in which it is decided:

- Hidden files and folders are skipped; links are followed. Images end in one of `EXTENSIONS`.
- A folder that holds no image and just one folder stands for that folder.
- `train` beside `val`, `validation` or `test` are the splits: the one that is asked for, or where
  there is none of that name the first of them that exists.
  Otherwise a share of the images is held out: those whose path, relative to the folder, has the
  smallest BLAKE2b digest, for each class by itself. A new image does not move most of the others.
- The folders at the top of the training split are the classes, sorted by name, if there are at
  least two and every image of that split lies in one. Otherwise the images have no labels; nor
  have those of a validation folder without folders in it.
"""

from __future__ import annotations

import dataclasses
import hashlib
import os
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Protocol, TypeVar

from etils import epath

from mae_jax.data.sources import held_out_split, is_training
from mae_jax.errors import ConfigError
from mae_jax.files import is_local

EXTENSIONS = (".jpg", ".jpeg", ".png", ".webp")


class Files:
    """Image files below `root`, read as bytes.

    Attributes:
      what: these are, for messages.
      extensions: their names end in one of these.
      root: a folder.
      names: relative paths with "/" of the images.
      labels: class of each image, -1 without one.
      num_classes: 0 if the images have no labels.
      classes: names of the classes; empty if they have none.
    """

    what = "images"
    extensions: tuple[str, ...] = EXTENSIONS
    exif = True

    def __init__(
        self,
        root: str,
        names: Sequence[str],
        labels: Sequence[int],
        num_classes: int,
        classes: Sequence[str],
    ):
        self.root = root
        self.names = list(names)
        self.labels = list(labels)
        self.num_classes = num_classes
        self.classes = tuple(classes)

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


Kind = TypeVar("Kind", bound=Files)


def make(split: str, *, path: str, held_out: float = 0.1) -> Files:
    """Return the split "train" or "val" of the images below `path`.

    Args:
      split: "train" or "val" ("validation", "test": the same, unless the folder has several of
        these); "all", for every image below `path` whatever its folders are called.
      path: a local folder; `~` is the user's home.
      held_out: the share for "val" where the folder has no splits of its own, in (0, 1): of each
        class with two images or more, at least one and never all.

    Raises:
      ConfigError: naming `data.path` or `data.held_out`, if there is nothing to read.
    """
    return open_folder(Files, split, path=path, held_out=held_out)


def open_folder(kind: type[Kind], split: str, *, path: str, held_out: float) -> Kind:
    """Return a split of the files of some kind below `path`; see `make`."""
    return _open_below(_descend(existing_folder(path, kind), kind), kind, split, held_out)


def _open_below(root: str, kind: type[Kind], split: str, held_out: float) -> Kind:
    if split == "all":
        names = _find(root, kind)
        return by_folder(kind, root, names, _classes(names))
    training = is_training(split)
    if (roots := _split_roots(root, split)) is not None:
        train_root, val_root = roots
        names = _find(train_root, kind)
        if not training:
            val_names = _find(val_root, kind)
            is_flat = not any(map(_top, val_names))  # as ImageNet's validation set is handed out
            return by_folder(kind, val_root, val_names, [] if is_flat else _classes(names))
        return by_folder(kind, train_root, names, _classes(names))

    names = _find(root, kind)
    classes = _classes(names)
    chosen = held_out_names(names, held_out, by_class=bool(classes), where=root, what=kind.what)
    names = [name for name in names if (name in chosen) != training]
    return by_folder(kind, root, names, classes)


def own_splits(path: str) -> dict[str, Files]:
    """Return "train" and "val" of a folder that has both, else all its images as "train".

    Args:
      path: a folder, or one of a bucket (gs://...), of which names and labels can be taken.

    Raises:
      ConfigError: naming `data.path`, if there is nothing to read.
    """
    root = _descend(existing_folder(path) if is_local(path) else path, Files)
    if _split_roots(root, "val") is None:
        return {"train": _open_below(root, Files, "all", 0)}
    return {split: _open_below(root, Files, split, 0) for split in ("train", "val")}


def by_folder(kind: type[Kind], root: str, names: Sequence[str], classes: Sequence[str]) -> Kind:
    """Return files whose top folders are the classes, if there are `classes`.

    Raises:
      ConfigError: if one lies in none of them.
    """
    ids: dict[str | None, int] = {name: i for i, name in enumerate(classes)}
    labels = [ids.get(_top(name), -1) for name in names]
    files = kind(root, names, labels, len(classes), classes)
    if classes and -1 in labels:
        raise ConfigError(
            f"data.path: expected all {kind.what} in the {len(classes)} class folders of the"
            f" training split, got {files.describe(labels.index(-1))}"
        )
    return files


def held_out_names(
    names: Sequence[str], share: float, *, by_class: bool, where: str, what: str = Files.what
) -> set[str]:
    """Return the names of `hold_out`; refuses, naming `where`, if there are none to hold out."""
    chosen = hold_out(names, share, by_class=by_class)
    if not chosen:
        raise ConfigError(
            f"data.path: expected a validation folder or more {what}, to hold some out, got"
            f" {len(names)}{' of different classes' if by_class else ''} in {where}"
        )
    return chosen


def existing_folder(path: str, kind: type[Files] = Files) -> str:
    """Return `path` with `~` replaced.

    Raises:
      ConfigError: naming `data.path`, if it is no local folder.
    """
    if not path:
        raise ConfigError(f"data.path: expected a folder of {kind.what}, got an empty string")
    if not is_local(path):
        raise ConfigError(f"data.path: expected a local folder, got {path}")
    path = os.path.expanduser(path)
    if not os.path.isdir(path):
        what = "a file" if os.path.exists(path) else "nothing"
        raise ConfigError(f"data.path: expected a folder of {kind.what}, got {what} at {path}")
    return path


class _Entry(Protocol):
    """What is used of `os.DirEntry`."""

    @property
    def name(self) -> str: ...
    @property
    def path(self) -> str: ...
    def is_file(self) -> bool: ...
    def is_dir(self) -> bool: ...


@dataclasses.dataclass(frozen=True)
class _BucketEntry:
    """An `_Entry` of a folder of a bucket, which has no links."""

    name: str
    path: str
    folder: bool

    def is_file(self) -> bool:
        return not self.folder

    def is_dir(self) -> bool:
        return self.folder


def _entries(folder: str) -> list[_Entry]:
    if not is_local(folder):
        # The first that `walk` gives is the folder itself, with one listing.
        _, folders, files = next(epath.Path(folder).walk(), (None, [], []))
        kinds = [(name, True) for name in folders] + [(name, False) for name in files]
        return [
            _BucketEntry(name, f"{folder.rstrip('/')}/{name}", is_folder)
            for name, is_folder in kinds
            if name and not name.startswith(".")
        ]
    try:
        with os.scandir(folder) as entries:
            return [entry for entry in entries if not entry.name.startswith(".")]
    except OSError as error:
        raise ConfigError(
            f"data.path: expected a readable folder, got {error.strerror} at {folder}"
        ) from error


def _is_one(entry: _Entry, kind: type[Files]) -> bool:
    return entry.name.lower().endswith(kind.extensions) and _leads_to(entry.is_file)


def _leads_to(kind: Callable[[], bool]) -> bool:
    try:
        return kind()
    except OSError:  # a link to itself, or through a folder that may not be entered
        return False


def _descend(folder: str, kind: type[Files]) -> str:
    seen = set()  # a link may lead back
    while (real := os.path.realpath(folder)) not in seen:
        seen.add(real)
        entries = _entries(folder)
        folders = [entry.path for entry in entries if _leads_to(entry.is_dir)]
        if len(folders) != 1 or any(_is_one(entry, kind) for entry in entries):
            break
        folder = folders[0]
    return folder


def scan(
    folder: str, kind: type[Files], prefix: str = "", above: tuple[str, ...] = ()
) -> Iterator[str]:
    """Yield the relative paths of files at any depth, looking no further ahead than a folder.

    Those of a folder come by name, and then those of the folders in it.

    Args:
      folder: to begin with, local or of a bucket.
      kind: of the files.
      prefix: before the names.
      above: real paths of the folders that lead to this one.

    Raises:
      ConfigError: naming `data.path`, if a folder cannot be read.
    """
    real = os.path.realpath(folder)
    if real in above:  # a link that leads back
        return
    entries = sorted(_entries(folder), key=lambda entry: entry.name)
    for entry in entries:
        if _is_one(entry, kind):
            yield prefix + entry.name
    for entry in entries:
        if _leads_to(entry.is_dir):
            yield from scan(entry.path, kind, f"{prefix}{entry.name}/", (*above, real))


def _find(root: str, kind: type[Files]) -> list[str]:
    names = sorted(scan(root, kind))
    if not names:
        raise ConfigError(
            f"data.path: expected {kind.what} ({' '.join(kind.extensions)}), got none in {root}"
        )
    return names


def _split_roots(root: str, split: str) -> tuple[str, str] | None:
    """Return the folders of training and of what is held out for `split`, if there are both."""
    train = os.path.join(root, "train")
    name = held_out_split(split, lambda name: _is_folder(os.path.join(root, name)))
    return None if name is None or not _is_folder(train) else (train, os.path.join(root, name))


def _is_folder(path: str) -> bool:
    return os.path.isdir(path) if is_local(path) else epath.Path(path).is_dir()


def _top(name: str) -> str | None:
    top, slash, _ = name.partition("/")
    return top if slash else None


def _classes(names: Sequence[str]) -> list[str]:
    tops = {_top(name) for name in names}
    return [] if None in tops or len(tops) < 2 else sorted(top for top in tops if top is not None)


def hold_out(names: Sequence[str], share: float, *, by_class: bool) -> set[str]:
    """Return the names with the smallest digests: a share, at least one and never all of them.

    Args:
      names: relative paths with "/".
      share: in (0, 1).
      by_class: take the share of each folder at the top by itself.

    Raises:
      ConfigError: naming `data.held_out`, if the share is out of bounds.
    """
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
