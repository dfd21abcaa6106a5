"""A local folder of images with their captions in a file: `captions.jsonl`, one object a line.

    {"file": "birds/owl.jpg", "caption": "an owl on a branch"}
    {"file": "moss.png", "caption": ["green moss", "moss on a stone"], "split": "val"}

- `file` is relative to the folder of `captions.jsonl`, with "/". Several lines of one file count as
  one, with all their captions. Images without a line are not read.
- `caption` is a text, a list of texts, or "" or null for an image without one.
- The splits are `train/captions.jsonl` beside that of `val`, `validation` or `test`; else what
  `split` says, which is then on every line; else a share of the images is held out, those whose
  `file` has the smallest BLAKE2b digest. Of several that are held out it is the one that is asked
  for, or where there is none of that name the first of `val`, `validation`, `test` that exists.
- Other fields of a line are not looked at.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from mae_jax.data.sources import EVAL_SPLITS, held_out_split, is_training
from mae_jax.data.sources.folder import Files, existing_folder, hold_out
from mae_jax.errors import ConfigError

LIST = "captions.jsonl"
EXPECTED = '{"file": PATH, "caption": TEXT, LIST OF TEXTS or null}'


class CaptionedFiles(Files):
    """Image files with captions; they have no labels.

    Attributes:
      texts: the captions of each image, none to many.
    """

    def __init__(self, root: str, names: Sequence[str], texts: Sequence[tuple[str, ...]]):
        super().__init__(root, names, [-1] * len(names), 0, ())
        self.texts = list(texts)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {**super().__getitem__(index), "caption": self.texts[index]}

    def captions(self) -> Iterator[str]:
        """Iterate over all captions."""
        for texts in self.texts:
            yield from texts

    def fingerprint(self) -> str:
        """Digest names and captions, not the pixels."""
        digest = hashlib.blake2b(super().fingerprint().encode(), digest_size=8)
        for texts in self.texts:
            digest.update(json.dumps(texts).encode() + b"\n")
        return digest.hexdigest()


class Listed(NamedTuple):
    """What the lines say of a file."""

    texts: tuple[str, ...]
    split: str | None


def make(split: str, *, path: str, held_out: float = 0.1) -> CaptionedFiles:
    """Return the split "train" or "val" of the images that `captions.jsonl` below `path` names.

    Args:
      split: "train" or "val" ("validation", "test": the same, unless there are several of these).
      path: a local folder; `~` is the user's home.
      held_out: the share for "val" where there are no splits, in (0, 1): at least one image.

    Raises:
      ConfigError: naming `data.path` and the line, if there is no such file, a line is not as
        above, a split is empty, or its images are not there.
    """
    folder = existing_folder(path)
    training = is_training(split)
    apart = held_out_split(split, lambda name: _has_list(folder, name))
    if apart is not None and _has_list(folder, "train"):
        root = os.path.join(folder, "train" if training else apart)
        chosen = _read(os.path.join(root, LIST))
    else:
        root = folder
        chosen = _part(_read(os.path.join(root, LIST)), split, held_out, root)
    if not chosen:
        raise ConfigError(
            f"data.path: expected images {'to train on' if training else 'that are held out'}, got"
            f" none in {os.path.join(root, LIST)}"
        )
    source = CaptionedFiles(root, list(chosen), [one.texts for one in chosen.values()])
    some = (0, len(source) // 2, len(source) - 1)  # a file may be missing, but hardly three
    if not any(os.path.exists(source.describe(index)) for index in some):
        raise ConfigError(
            f"data.path: expected the images of {os.path.join(root, LIST)}, got nothing at"
            f" {source.describe(0)}"
        )
    return source


def _has_list(folder: str, name: str) -> bool:
    return os.path.isfile(os.path.join(folder, name, LIST))


def _part(
    listed: Mapping[str, Listed], split: str, held_out: float, root: str
) -> dict[str, Listed]:
    """Return the images of a split."""
    training = is_training(split)
    if any(splits := {one.split for one in listed.values()}):
        chosen_split = split if training else held_out_split(split, splits.__contains__)
        return {name: one for name, one in listed.items() if one.split == chosen_split}
    chosen = hold_out(list(listed), held_out, by_class=False)
    if listed and not chosen:
        raise ConfigError(
            f"data.path: expected a second image to hold out, got 1 in {os.path.join(root, LIST)}"
        )
    return {name: one for name, one in listed.items() if (name in chosen) != training}


def _read(file: str) -> dict[str, Listed]:
    """Return file name -> what the lines say of it, in the order of the lines."""
    listed: dict[str, Listed] = {}
    try:
        # A mark at the beginning of the file is no part of the first line.
        with open(file, encoding="utf-8-sig") as lines:
            for number, line in enumerate(lines, start=1):
                if line.strip():
                    name, one = _parse(line, f"on line {number} of {file}")
                    before = listed.get(name, Listed((), one.split))
                    with_split = bool(next(iter(listed.values()), one).split)
                    if before.split != one.split or with_split != bool(one.split):
                        raise ConfigError(
                            "data.path: expected one split for each file, or none for any,"
                            f" got {one.split!r} for {name!r} on line {number} of {file}"
                        )
                    listed[name] = Listed(before.texts + one.texts, one.split)
    except (OSError, UnicodeError) as error:
        reason = getattr(error, "strerror", None) or error
        raise ConfigError(f"data.path: expected {LIST} in UTF-8, got {reason} at {file}") from error
    return listed


def _parse(line: str, where: str) -> tuple[str, Listed]:
    try:
        given = json.loads(line)
    except ValueError as error:
        raise ConfigError(f"data.path: expected {EXPECTED} {where}, got {error}") from error
    if not isinstance(given, dict) or not {"file", "caption"} <= given.keys():
        got = ", ".join(given) if isinstance(given, dict) else type(given).__name__
        raise ConfigError(f"data.path: expected {EXPECTED} {where}, got {got or 'nothing'}")
    name, caption, split = given["file"], given["caption"], given.get("split")
    if not isinstance(name, str) or not name or os.path.isabs(name):
        raise ConfigError(f"data.path: expected a relative path as file {where}, got {name!r}")
    texts = [caption] if isinstance(caption, str) else [] if caption is None else caption
    if not isinstance(texts, list) or not all(isinstance(text, str) for text in texts):
        raise ConfigError(
            f"data.path: expected a text, a list of texts or null as caption {where}, got"
            f" {json.dumps(caption)}"
        )
    if split is not None and split not in ("train", *EVAL_SPLITS):
        raise ConfigError(
            f"data.path: expected train, {', '.join(EVAL_SPLITS)} as split {where}, got {split!r}"
        )
    return name, Listed(tuple(text for text in texts if text.strip()), split)
