"""Batches out of a source, by Grain: a function of (seed, step) and nothing else.

The global batch of a step is the same, row for row, for any number of processes, worker processes
and threads, and wherever a run resumes: shuffle and augmentation are drawn from the seed and an
example's position in the endless stream *before* the stream is cut into batches and shared out.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from typing import Any

import grain
import numpy as np
from absl import flags

from mae_jax.data.processes import available_cores, end_with_parent
from mae_jax.data.readers import Reader
from mae_jax.data.sources import Source, allowed_bad
from mae_jax.data.transforms import BadExample
from mae_jax.errors import ConfigError

MAX_TRIES = 100  # examples in a row that may be bad

_named: dict[str, object] = {}  # bad examples that this process has named


class LoadExample(grain.transforms.RandomMap):
    """Read the example of an index, or the next good one.

    Attributes:
      source: where examples come from.
      read: makes arrays of what it gives.
    """

    def __init__(self, source: Source, read: Reader):
        self.source = source
        self.read = read

    def random_map(self, element: int, rng: np.random.Generator) -> dict[str, Any]:
        """Load example `element`.

        Returns:
          What the reader makes of it, `image` for one; `label` int32, -1 for none; `index` int32,
          of the example that was read; `asked` int32, of the one that was asked for; `replaced`
          bool, whether the two differ.

        Raises:
          ConfigError: if this and the following examples are all bad.
        """
        tries = min(len(self.source), MAX_TRIES)
        reason = ""
        for step in range(tries):
            index = (int(element) + step) % len(self.source)
            try:
                arrays, label = self._load(index, rng)
            except (BadExample, OSError) as error:
                reason = _one_line(error)
                self._name_once(index, reason)
                continue
            return {
                **arrays,
                "label": np.int32(label),
                "index": np.int32(index),
                "asked": np.int32(element),
                "replaced": np.bool_(step > 0),
            }
        raise ConfigError(
            f"data.path: {self.source.describe(int(element))} and the {tries - 1} examples after it"
            f" cannot be used; the last one: {reason}"
        )

    def reason(self, index: int) -> str:
        """Return, by another try, why example `index` cannot be used."""
        try:
            self._load(index, np.random.default_rng(0))
        except (BadExample, OSError) as error:
            return _one_line(error)
        return "cannot be read at times"

    def _load(self, index: int, rng: np.random.Generator) -> tuple[dict[str, np.ndarray], int]:
        example = self.source[index]
        return self.read(example, rng, exif=self.source.exif), example["label"]

    def _name_once(self, index: int, reason: str) -> None:
        mark = object()
        name = self.source.describe(index)
        if _named.setdefault(name, mark) is mark:  # atomic, so that one thread alone sees its mark
            logging.warning("replaced by the next example: %s: %s", name, reason)


class TrainBatches:
    """The training batches of this process, for ever; see `train_batches`.

    Counts the bad examples that were asked for in the batches handed out so far, each once, and so
    the JPEGs that `mae_jax.data.fast` left to Pillow. The counts start anew where a run resumes,
    for the files may have been mended.
    """

    def __init__(
        self,
        batches: grain.DatasetIterator[dict[str, np.ndarray]],
        load: LoadExample,
        max_bad_share: float,
    ):
        self._batches = batches
        self._load = load
        self._max_bad_share = max_bad_share
        self._bad: set[int] = set()
        self._by_pillow: set[int] | None = None  # until a reader tells

    def __iter__(self) -> TrainBatches:
        return self

    def __next__(self) -> dict[str, np.ndarray]:
        """Return the next batch.

        Raises:
          ConfigError: if more examples are bad than `train_batches` allows, or too many in a row.
        """
        batch = next(self._batches)
        self._bad.update(batch["asked"][batch["replaced"]].tolist())
        if "by_pillow" in batch:
            self._by_pillow = self._by_pillow or set()
            self._by_pillow.update(batch["index"][batch["by_pillow"]].tolist())
        _refuse_many(self._bad, self._max_bad_share, len(self._load.source), self._load)
        return batch

    def scalars(self) -> dict[str, float]:
        """Return `bad_examples` and `jpegs_by_pillow`, the number of different ones so far."""
        counts = {"bad_examples": self._bad, "jpegs_by_pillow": self._by_pillow}
        return {name: float(len(met)) for name, met in counts.items() if met is not None}

    def close(self) -> None:
        """End the threads and processes that load."""
        self._batches.close()


def train_batches(
    source: Source,
    read: Reader,
    *,
    batch_size: int,
    seed: int,
    start_step: int = 0,
    process_index: int = 0,
    process_count: int = 1,
    workers: int = 0,
    threads: int | None = None,
    max_bad_share: float = 1.0,
) -> TrainBatches:
    """Iterate over this process's part of the training batches from `start_step` on, for ever.

    Each epoch has its own order and holds every example once; a batch may span two epochs. The
    augmentation of an image differs from epoch to epoch.

    Args:
      source: where examples come from.
      read: makes arrays of each example, with a generator of its own.
      batch_size: examples in the global batch; process p has the rows of the p-th equal part.
      seed: of order and augmentation, in [0, 2**32).
      start_step: number of batches to leave out; costs nothing.
      process_index: of this process, in [0, process_count).
      process_count: number of processes that share a batch.
      workers: processes to start for loading; 0 loads in threads of this one. They end when this
        process does; call `close()` on the iterator to end them before.
      threads: threads that load, each a whole batch, in each worker; None chooses, 0 loads in the
        call of `next`.
      max_bad_share: share of the examples that may be bad and replaced, in [0, 1]; see
        `allowed_bad`. Each process counts those that it was asked for.

    Returns:
      An iterator over dicts of `image` uint8 [B, H, W, C], `label`, `index` and `asked` int32 [B],
      and `replaced` bool [B], where B = batch_size x views / process_count; see `LoadExample`; and
      what else the reader makes. The views of an example are rows one after the other.

    Raises:
      ConfigError: if `batch_size` cannot be divided, or `max_bad_share` is out of bounds.
    """
    check_bad_share(max_bad_share)
    local = _local_batch_size(batch_size, process_count)
    load = LoadExample(source, read)
    examples = grain.MapDataset.range(len(source)).seed(seed).shuffle().repeat(None)
    batches = _batched(examples.random_map(load), local, read.views)
    batches = batches[process_index::process_count][start_step:]
    if threads is None:
        threads = default_threads(workers, available_cores())
    dataset = batches.to_iter_dataset(_read_options(threads))
    if workers:
        if not flags.FLAGS.is_parsed():  # Grain 0.2.18 reads a flag of its own (google/grain #1355)
            flags.FLAGS.mark_as_parsed()
        dataset = dataset.mp_prefetch(
            grain.MultiprocessingOptions(num_workers=workers), worker_init_fn=_end_with_parent
        )
    return TrainBatches(iter(dataset), load, max_bad_share)


def check_bad_share(share: float) -> None:
    """Refuse a share of bad examples that is none.

    Raises:
      ConfigError: if it is not in [0, 1].
    """
    if not 0 <= share <= 1:
        raise ConfigError(f"data.max_bad_share: expected in [0, 1], got {share}")


def _refuse_many(bad: set[int], share: float, examples: int, load: LoadExample) -> None:
    """Refuse more bad examples than `allowed_bad` has it.

    Raises:
      ConfigError: names one and why it is bad.
    """
    allowed = allowed_bad(share, examples)
    if len(bad) > allowed:
        one = min(bad)
        raise ConfigError(
            f"data.max_bad_share {share:g}: expected at most {allowed} of {examples} examples that"
            f" cannot be used, got {len(bad)}, such as {load.source.describe(one)}:"
            f" {load.reason(one)}"
        )


class EvalBatches:
    """Batches in a fixed order, to be iterated over as often as needed; see `eval_batches`.

    Attributes:
      left_out: how many bad examples of this process the newest iteration has met so far.
    """

    def __init__(
        self,
        batches: grain.MapDataset[dict[str, np.ndarray]],
        weights: np.ndarray,
        load: LoadExample,
        examples: int,
        max_bad_share: float | None,
    ):
        self._batches = batches
        self._weights = weights
        self._load = load
        self._examples = examples  # of all processes, padding not counted
        self._max_bad_share = max_bad_share
        self._said = 0
        self.left_out = 0

    def __len__(self) -> int:
        return len(self._weights)

    def __iter__(self) -> Iterator[dict[str, np.ndarray]]:
        bad: set[int] = set()
        self.left_out = 0
        options = _read_options(default_threads(0, available_cores()))
        batches = iter(self._batches.to_iter_dataset(options))
        try:
            for batch, weight in zip(batches, self._weights, strict=True):
                bad.update(batch["asked"][batch["replaced"] & (weight > 0)].tolist())
                if self._max_bad_share is not None:
                    _refuse_many(bad, self._max_bad_share, self._examples, self._load)
                self.left_out = len(bad)
                # What stands in place of a bad example would count its neighbour twice.
                yield {**batch, "weight": np.where(batch["replaced"], np.float32(0), weight)}
        finally:
            batches.close()
        if self._max_bad_share is not None:
            self._say_once()

    def _say_once(self) -> None:
        if self.left_out not in (0, self._said):
            self._said = self.left_out
            examples = int((self._weights > 0).sum()) // self._load.read.views
            logging.warning(
                "left out of what is measured: %d of %d examples, which cannot be used",
                self.left_out,
                examples,
            )


def eval_batches(
    source: Source,
    read: Reader,
    *,
    batch_size: int,
    limit: int | None = None,
    examples: Sequence[int] | None = None,
    process_index: int = 0,
    process_count: int = 1,
    max_bad_share: float | None = None,
) -> EvalBatches:
    """Return this process's part of the batches of an evaluation, in the order of the source.

    Args:
      source: where examples come from.
      read: makes arrays of each example; what it draws is the same in each iteration.
      batch_size: examples in the global batch, divided as in `train_batches`.
      limit: use this many examples, evenly spaced; None uses all.
      examples: use these in their order, by index, at least one; None: those of `limit`.
      process_index: of this process.
      process_count: number of processes that share a batch.
      max_bad_share: share of the examples that may be bad, as in `train_batches`; an iteration
        that meets more ends with a `ConfigError`, one that meets fewer says how many. None: any
        number may be, and nothing is said.

    Returns:
      Batches as in `train_batches`, and `weight` float32 [B]: 1, or 0 for the examples repeated
      to fill the last global batch and for what replaces a bad one.

    Raises:
      ConfigError: if `batch_size` cannot be divided, or `limit` or `max_bad_share` is out of
        bounds.
    """
    if max_bad_share is not None:
        check_bad_share(max_bad_share)
    local = _local_batch_size(batch_size, process_count)
    if limit is not None and limit < 1:
        raise ConfigError(f"limit: expected at least 1 example to evaluate on, got {limit}")
    if examples is None:
        count = min(len(source), limit or len(source))
        chosen = np.arange(count) * len(source) // count
    else:
        chosen = np.asarray(examples)
    count = len(chosen)
    steps = -(-count // batch_size)
    position = np.arange(steps * batch_size)
    indices = chosen[position % count]
    load = LoadExample(source, read)
    loaded = grain.MapDataset.source(indices.tolist()).seed(0).random_map(load)
    batches = _batched(loaded, local, read.views)
    counted = (position < count).astype(np.float32).repeat(read.views)
    weights = counted.reshape(steps, process_count, local * read.views)
    return EvalBatches(
        batches[process_index::process_count],
        weights[:, process_index],
        load,
        count,
        max_bad_share,
    )


def _batched(
    examples: grain.MapDataset[dict[str, Any]], batch_size: int, views: int
) -> grain.MapDataset[dict[str, Any]]:
    """Return batches of examples; of several views of each, every one becomes a row."""
    batches = examples.batch(batch_size)
    if views == 1:
        return batches

    def to_rows(batch: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        rows = {name: x.repeat(views, axis=0) for name, x in batch.items() if name != "image"}
        image = batch["image"]
        return rows | {"image": image.reshape(-1, *image.shape[2:])}

    return batches.map(to_rows)


def default_workers(cores: int) -> int:
    """Return how many worker processes suit a host: none up to 8 cores, where threads do."""
    return 0 if cores <= 8 else cores // 4


def default_threads(workers: int, cores: int) -> int:
    """Return how many threads load in each worker, or in this process if there is none."""
    return min(cores, 8) if workers == 0 else min(4, max(1, cores // workers))


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())


def _read_options(threads: int) -> grain.ReadOptions:
    # One batch a thread and no more: Grain's default of 500 would hold 500 batches.
    return grain.ReadOptions(num_threads=threads, prefetch_buffer_size=threads)


def _local_batch_size(batch_size: int, process_count: int) -> int:
    if batch_size < 1 or batch_size % process_count:
        raise ConfigError(
            f"batch_size: expected a multiple of the {process_count} processes, got {batch_size}"
        )
    return batch_size // process_count


def _end_with_parent(worker_index: int, worker_count: int) -> None:
    del worker_index, worker_count
    end_with_parent()
