"""Examples named by a list file: iNaturalist and Places as they are handed out, or one's own.

`data.path` is a folder. `data.split` and `data.eval_split` are "FILE" or "FILE:IMAGE_FOLDER", both
relative to it: "train2018.json", "places365_val.txt:val_256". The ending of FILE says what it is:

- `.json`, as iNaturalist's: `images` with `id` and `file_name`, `annotations` with `image_id` and
  `category_id`, `categories` with `id` and perhaps `name`. The sorted ids of the categories are the
  labels 0, 1, ...; without annotations, as in test files, the images have no labels.
- `.txt` and `.csv`: a line "PATH LABEL" or "PATH,LABEL" for each image, or PATH alone on every
  line. PATH may hold blanks; a leading slash does not count. The number of classes is that of the
  list of categories beside FILE (`categor*.txt` or `.csv`, lines "NAME LABEL", as Places has it);
  without one it is the largest label of FILE + 1, so that a list which lacks the last classes
  counts fewer than another one.

Sources: https://github.com/visipedia/inat_comp, "Annotation Format" of 2017 to 2019;
http://places2.csail.mit.edu/download.html, "File lists".
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Mapping
from typing import Any

from mae_jax.data.sources.folder import Files, Kind, existing_folder
from mae_jax.errors import ConfigError

FIELDS = "data.split, data.eval_split"
SHOWN = 8  # lists in a message

DIGITS = "0123456789"
BETWEEN = " \t,"  # a path and its label
# What is read of a list: names, labels, number of classes, their names.
Content = tuple[list[str], list[int], int, list[str]]
Line = tuple[str, int | None]  # path and label
Read = Callable[[str], Content]

CATEGORIES = re.compile(r"categor.*\.(txt|csv)", re.IGNORECASE)


def make(split: str, *, path: str, held_out: float = 0.1) -> Files:
    """Return the images that a list names. Of the images, at most three are looked for.

    Args:
      split: "FILE" or "FILE:IMAGE_FOLDER", relative to `path`.
      path: a local folder; `~` is the user's home.
      held_out: not used; the splits are the lists.

    Raises:
      ConfigError: naming `data.path`, or the fields of the splits and the line, if there is no such
        list, if it is empty or not as described above, or if its images are not there.
    """
    del held_out
    readers = {".json": _read_json, ".txt": read_lines, ".csv": read_lines}
    return open_list(Files, split, path=path, readers=readers)


def open_list(kind: type[Kind], split: str, *, path: str, readers: Mapping[str, Read]) -> Kind:
    """Return the files of some kind that a list names; see `make`.

    Args:
      kind: of files.
      split: "FILE" or "FILE:FOLDER".
      path: a local folder.
      readers: ending of FILE -> what reads it.
    """
    folder = existing_folder(path, kind)
    list_name, _, images = split.partition(":")
    file = os.path.join(folder, list_name)
    endings = tuple(readers)
    if not list_name.endswith(endings) or not os.path.isfile(file):
        there = sorted(name for name in os.listdir(folder) if name.endswith(endings))
        raise ConfigError(
            f"{FIELDS}: expected FILE or FILE:FOLDER with a list ({' '.join(endings)}) in"
            f" {folder}, which has {', '.join(there[:SHOWN]) or 'none'}; got {split!r}"
        )
    names, labels, num_classes, classes = readers[os.path.splitext(file)[1]](file)
    if not names:
        raise ConfigError(f"{FIELDS}: expected a list with {kind.what}, got none in {file}")
    source = kind(os.path.join(folder, images), names, labels, num_classes, classes)
    some = (0, len(source) // 2, len(source) - 1)  # a file may be missing, but hardly three
    if not any(os.path.exists(source.describe(index)) for index in some):
        raise ConfigError(
            f"{FIELDS}: expected the {kind.what} of {file} below {source.root}, got nothing at"
            f" {source.describe(0)}"
        )
    return source


def _read_json(file: str) -> Content:
    try:
        with open(file, encoding="utf-8") as stream:
            data = json.load(stream)
        images = {image["id"]: image["file_name"] for image in data["images"]}
        given = [(one["image_id"], one["category_id"]) for one in data.get("annotations", ())]
        categories = {
            one["id"]: str(one.get("name", one["id"])) for one in data.get("categories", ())
        }
        label_of = {category: label for label, category in enumerate(sorted(categories))}
    except (ValueError, LookupError, TypeError, AttributeError) as error:
        raise ConfigError(
            f"{FIELDS}: expected images (id, file_name), annotations (image_id, category_id) and"
            f" categories (id) in {file}, got {type(error).__name__}: {error}"
        ) from error
    if not given:
        return list(images.values()), [-1] * len(images), 0, []
    labels: dict[Any, int] = {}
    for image, category in given:
        if category not in label_of:
            raise ConfigError(
                f"{FIELDS}: expected one of the {len(label_of)} categories of {file} for image"
                f" {image}, got category_id {category}"
            )
        if labels.setdefault(image, label_of[category]) != label_of[category]:
            raise ConfigError(f"{FIELDS}: expected one category for image {image} of {file}, got 2")
    if missing := [name for image, name in images.items() if image not in labels]:
        raise ConfigError(
            f"{FIELDS}: expected an annotation of every image of {file}, or no annotations, got"
            f" none of {missing[0]} ({len(missing)} such images)"
        )
    classes = [categories[category] for category in label_of]
    return list(images.values()), [labels[image] for image in images], len(classes), classes


def read_lines(file: str, split: Callable[[str], Line] | None = None) -> Content:
    """Read a list of lines, and the list of categories beside it.

    Args:
      file: its path.
      split: text of a line -> path and label.
    """
    names, labels = _parse(file, split or split_line)
    if not labels:
        return names, [-1] * len(names), 0, []
    classes = _read_categories(file)
    num_classes = len(classes) or max(labels) + 1
    if max(labels) >= num_classes:
        raise ConfigError(
            f"{FIELDS}: expected labels below {num_classes} in {file}, the number of categories"
            f" beside it, got {max(labels)} for {names[labels.index(max(labels))]}"
        )
    return names, labels, num_classes, classes


def _read_categories(file: str) -> list[str]:
    folder, list_name = os.path.split(file)
    found = [name for name in os.listdir(folder) if CATEGORIES.fullmatch(name)]
    if not found or list_name in found:
        return []
    if len(found) > 1:
        raise ConfigError(
            f"data.path: expected at most one list of categories beside {file}, got"
            f" {', '.join(sorted(found))}"
        )
    file = os.path.join(folder, found[0])
    names, labels = _parse(file, split_line)
    if sorted(labels) != list(range(len(names))):
        raise ConfigError(
            f"data.path: expected lines NAME LABEL with each label from 0 on once in {file}, got"
            f" {len(set(labels))} labels of {len(names)} names"
        )
    return [name for _, name in sorted(zip(labels, names, strict=True))]


def split_line(text: str) -> Line:
    """Return the path and the label of a line "PATH LABEL", or "PATH,LABEL", or "PATH"."""
    before = text.rstrip(DIGITS)
    name, label = before.rstrip(BETWEEN), text[len(before) :]
    if label and 0 < len(name) < len(before):
        return name.lstrip("/"), int(label)
    return text.lstrip("/"), None


def _parse(file: str, split: Callable[[str], Line]) -> tuple[list[str], list[int]]:
    """Return names and labels of the lines of a file; no labels if no line has one."""
    names: list[str] = []
    labels: list[int] = []
    # Names need not be UTF-8; a mark at the beginning of the file is no part of the first one.
    with open(file, encoding="utf-8-sig", errors="surrogateescape") as lines:
        for number, line in enumerate(lines, start=1):
            if not (text := line.strip()):
                continue
            try:
                name, label = split(text)
            except ValueError as error:
                raise ConfigError(
                    f"{FIELDS}: expected {error} on line {number} of {file}, got {text!r}"
                ) from None
            if names and (label is not None) != bool(labels):
                raise ConfigError(
                    f"{FIELDS}: expected a path {'and a label' if labels else 'alone'}, as on the"
                    f" lines above, on line {number} of {file}, got {text!r}"
                )
            names.append(name)
            if label is not None:
                labels.append(label)
    return names, labels
