"""Films in a folder, with a folder for each class, or named by list files: nothing is decoded here.

`data.path` is one of these; films end in one of `Films.extensions`:

- A folder of films. Classes and splits are found, or films held out, as in a folder of images; see
  `mae_jax.data.sources.folder`.
- A folder with lists of the authors' form. `data.split` and `data.eval_split` are "FILE" or
  "FILE:FILM_FOLDER", relative to it, or short, "train" for `train.csv` or `train.txt`. A line is
  "PATH LABEL", "PATH FRAMES LABEL", or PATH alone on every line, with blanks, tabs or commas
  between; paths are absolute or relative to the folder (FILM_FOLDER if given) and may hold blanks.
  FRAMES is not used. For the number of classes see `mae_jax.data.sources.listed`.
- One such list. A share of its films is held out, those whose path has the smallest BLAKE2b digest.

Source: MCG-NJU/VideoMAE `DATASET.md`, for the form of the lists.
"""

from __future__ import annotations

import functools
import os
import re
from typing import Any

from mae_jax.data.sources import is_training
from mae_jax.data.sources.folder import Files, hold_out, open_folder
from mae_jax.data.sources.listed import Line, open_list, read_lines
from mae_jax.errors import ConfigError

LISTS = (".csv", ".txt")


class Films(Files):
    """Paths of films below `root`; see `Files`."""

    what = "films"
    extensions = (".mp4", ".webm", ".avi", ".mkv", ".mov")
    exif = False

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {"video": self.describe(index), "label": self.labels[index]}


LINE = re.compile(
    rf"(.*(?:{'|'.join(map(re.escape, Films.extensions))}))(?:[ \t,]+\d+)??(?:[ \t,]+(\d+))?",
    re.IGNORECASE,
)


def make(split: str, *, path: str, held_out: float = 0.1) -> Films:
    """Return a split of the films of a folder or a list. Of a list, at most three are looked for.

    Args:
      split: "train" or "val" ("validation", "test"), of a folder of films also "all"; or a list.
      path: a local folder or list; `~` is the user's home.
      held_out: the share for "val" where there are no splits, in (0, 1).

    Raises:
      ConfigError: naming the field, and the line of a list, if there is nothing to read.
    """
    readers = dict.fromkeys(LISTS, functools.partial(read_lines, split=_split_line))
    place = os.path.expanduser(path)
    if place.endswith(LISTS) and os.path.isfile(place):
        folder, file = os.path.split(place)
        training = is_training(split)
        return _part(
            open_list(Films, file, path=folder or ".", readers=readers), training, held_out
        )
    short = [
        split + ending for ending in LISTS if os.path.isfile(os.path.join(place, split + ending))
    ]
    if short or split.partition(":")[0].endswith(LISTS):
        return open_list(Films, short[0] if short else split, path=path, readers=readers)
    return open_folder(Films, split, path=path, held_out=held_out)


def _part(films: Films, training: bool, held_out: float) -> Films:
    """Return those films of a list that are trained on, or the others."""
    chosen = hold_out(films.names, held_out, by_class=False)
    if not chosen:
        raise ConfigError(
            "data.path: expected a list of two films or more, to hold some out, got 1"
        )
    kept = [i for i, name in enumerate(films.names) if (name in chosen) != training]
    names, labels = [films.names[i] for i in kept], [films.labels[i] for i in kept]
    return Films(films.root, names, labels, films.num_classes, films.classes)


def _split_line(text: str) -> Line:
    match = LINE.fullmatch(text)
    if match is None:
        raise ValueError(f"PATH [FRAMES] LABEL with a film ({' '.join(Films.extensions)})")
    name, label = match.groups()
    return name, None if label is None else int(label)
