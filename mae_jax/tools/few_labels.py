"""Ways to use a pre-trained encoder with few labels, compared on the digits of `make demo`.

A labelled set is drawn for each seed. Each way is tried with three values of what it is most
sensitive to (the rate; for neighbours their number) on the first set: it learns from four fifths of
the labels of each class, and the value that does best on the last fifth, the smaller loss deciding
between equals, is taken to learn from all of each set. The held-out digits serve the final figures
alone.
"""

from __future__ import annotations

import dataclasses
import json
import time
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath
from ml_collections import ConfigDict

from mae_jax import api, build
from mae_jax import config as configs
from mae_jax.data.loader import train_batches
from mae_jax.data.sources import Source, labels_of
from mae_jax.data.sources.subset import Subset
from mae_jax.errors import ConfigError
from mae_jax.files import completed
from mae_jax.models.transfer import transfer_encoder
from mae_jax.tasks import readout
from mae_jax.train.state import TrainState
from mae_jax.types import Params

RATES = (1 / 3, 1.0, 3.0)  # times the base rate of the config
NEIGHBOURS = (1, 5, 20)
CHUNK = 100  # images at once when predicting
HELD_BACK = 5  # one in so many labels of a class


class Way(Protocol):
    """A way to learn from a few labelled examples."""

    @property
    def choices(self) -> Sequence[float]:
        """Return the values of what is to be chosen."""
        ...

    def scores(self, chosen: np.ndarray, choice: float, seed: int, of: Examples) -> np.ndarray:
        """Return scores [n, K] of examples, after learning from the training examples `chosen`."""
        ...


@dataclasses.dataclass(frozen=True)
class Examples:
    """Examples of a source that are to be predicted.

    Attributes:
      source: of the examples.
      indices: which of them, int [n].
    """

    source: Source
    indices: np.ndarray

    def images(self) -> np.ndarray:
        """Return uint8 [n, H, W, C]."""
        return np.stack([self.source[int(i)]["image"] for i in self.indices])

    def labels(self) -> np.ndarray:
        """Return int32 [n]."""
        return labels_of(self.source)[self.indices]


class Neighbours:
    """The vote of the nearest labelled features."""

    choices = NEIGHBOURS

    def __init__(self, model: api.Pretrained, train: Source):
        self._model, self._train = model, train

    def scores(self, chosen: np.ndarray, choice: float, seed: int, of: Examples) -> np.ndarray:
        """See `Way`."""
        known = Examples(self._train, chosen)
        train, test = (features(self._model, x.images()) for x in (known, of))
        predicted = readout.knn_predictions(train, known.labels(), test, k=int(choice))
        return np.eye(self._train.num_classes)[predicted]


class Ridge:
    """Ridge regression on standardised features, as the read-out has it; nothing is chosen."""

    choices = (1.0,)

    def __init__(self, model: api.Pretrained, train: Source):
        self._model, self._train = model, train
        everything = Examples(train, np.arange(len(train)))
        self._features = features(model, everything.images())

    def scores(self, chosen: np.ndarray, choice: float, seed: int, of: Examples) -> np.ndarray:
        """See `Way`."""
        # Standardised by all training images, whose labels are not looked at.
        mean, std = self._features.mean(axis=0), self._features.std(axis=0) + 1e-8
        targets = np.eye(self._train.num_classes)[labels_of(self._train)[chosen]]
        weights, intercept, _ = readout.fit_ridge((self._features[chosen] - mean) / std, targets)
        return (features(self._model, of.images()) - mean) / std @ weights + intercept


class Training:
    """A config of task finetune, in memory: no folder, no checkpoints; the step is compiled once.

    Args:
      config: as the trainer would run it.
      model: the encoder to start from, unless the config starts from scratch.
      train: labelled examples.
    """

    choices = RATES

    def __init__(self, config: ConfigDict, model: api.Pretrained, train: Source):
        self._config, self._train = config, train
        self._task = build.build_task(config, build.build_model(config))
        self._model = None if config.init_from == "scratch" else model
        self._read = build.build_readers(config)[0]
        # As many updates on four fifths of the labels as on all of them.
        examples = config.data.per_class * train.num_classes
        _, self._steps = build.build_schedule(config, examples)
        training = build.build_training(config, self._task, build.build_optimizer(config))

        def step(state: TrainState, batch: Any, seed: jax.Array, peak: jax.Array) -> TrainState:
            schedule = build.build_schedule(config, examples, peak)[0]
            return training.step(state, batch, schedule=schedule, seed=seed)[0]

        def logits(params: Params, extra: Any, images: jax.Array) -> jax.Array:
            return self._task.call("logits", params, {"image": images}, extra=extra)

        self._step = jax.jit(step, donate_argnums=0)
        self._init = jax.jit(training.init)
        self._logits = jax.jit(logits)

    def scores(self, chosen: np.ndarray, choice: float, seed: int, of: Examples) -> np.ndarray:
        """See `Way`."""
        state = self._start(seed)
        peak = choice * build.peak_learning_rate(self._config)
        batches = train_batches(
            Subset(self._train, chosen),
            self._read,
            batch_size=self._config.batch_size,
            seed=seed,
        )
        for _ in range(self._steps):
            batch = next(batches)
            batch = {name: batch[name] for name in ("image", "label")}
            state = self._step(state, batch, seed, peak)
        batches.close()
        images = of.images()
        # All of one size, so that they are compiled once.
        padded = np.pad(images, ((0, -len(images) % CHUNK), (0, 0), (0, 0), (0, 0)))
        scores = [
            self._logits(state.best_params(), state.extra, padded[start : start + CHUNK])
            for start in range(0, len(padded), CHUNK)
        ]
        return np.concatenate(jax.device_get(scores))[: len(images)]

    def _start(self, seed: int) -> TrainState:
        state = self._init(seed)
        if self._model is None:
            return state
        encoder = transfer_encoder(
            self._model.params["encoder"],
            self._model.module.encoder,
            self._task.module.encoder,
            state.params["encoder"],
        )
        # A copy, for the step donates its state.
        params = {**state.params, "encoder": jax.tree.map(jnp.copy, encoder)}
        return state.starting_from(params)


def features(model: api.Pretrained, images: np.ndarray) -> np.ndarray:
    """Return float64 [n, D]."""
    return model.features(images).astype(np.float64)


# Config and what differs from it.
TRAINED: dict[str, tuple[str, dict[str, str]]] = {
    "from scratch": ("scratch:demo", {}),
    "random, frozen": ("linear_probe:demo", {"init_from": "scratch"}),
    "linear probe": ("linear_probe:demo", {}),
    "partial, 1 block": ("partial:demo", {"optimizer.trainable_blocks": "1"}),
    "partial, 2 blocks": ("partial:demo", {"optimizer.trainable_blocks": "2"}),
    "full": ("finetune:demo", {}),
}
# Labels a class -> what is compared.
COMPARED = {
    10: (
        *("from scratch", "random, frozen", "k-NN", "few-shot", "linear probe"),
        *("partial, 1 block", "partial, 2 blocks", "full"),
    ),
    50: ("from scratch", "linear probe", "full"),
}


def compare(checkpoint: str, out: str, *, seeds: int) -> int:
    """Fill a folder with `results.json` and `table.md`, and print the table.

    What is in `results.json` is not done again.

    Args:
      checkpoint: of a run of the config `demo`.
      out: the folder.
      seeds: how many draws of labels.

    Returns:
      The exit status.

    Raises:
      ConfigError: if the checkpoint is another one than that of the results, or of other data.
    """
    if seeds < 2:
        raise ConfigError(f"--seeds={seeds}: expected at least 2, for a standard deviation")
    model = api.load(checkpoint)
    if model.config.data.source != "digits":
        raise ConfigError(
            f"--checkpoint={checkpoint}: expected a run on the digits, got one on"
            f" {model.config.data.source}"
        )
    folder = epath.Path(out).expanduser()
    results = _results(folder, model, checkpoint)
    train, held_out = build.open_sources(model.config.data)
    everything = Examples(held_out, np.arange(len(held_out)))
    begun = time.perf_counter()
    for per_class, names in COMPARED.items():
        for name in names:
            title = f"{name}, {10 * per_class} labels"
            row = results["rows"].setdefault(title, {"top1": []})
            if len(row["top1"]) >= seeds:
                continue
            way = _make(name, per_class, model, train)
            if "choice" not in row:
                row["choice"], row["held_back"] = choose(way, per_class, train)
                _write(folder, results)
            for seed in range(len(row["top1"]), seeds):
                chosen = readout.label_draws(labels_of(train), per_class, 1, seed)[0]
                scores = way.scores(chosen, row["choice"], seed, everything)
                row["top1"].append(judge(scores, everything.labels())[0])
                _write(folder, results)
            print(_line(title, row), flush=True)
    text = table(results["rows"], seeds)
    with completed(folder / "table.md") as path:
        path.write_text(text)
    print(f"\n{text}\n{folder / 'table.md'}, after {time.perf_counter() - begun:.0f} s")
    return 0


def choose(way: Way, per_class: int, train: Source) -> tuple[float, dict[str, float]]:
    """Choose on the labels of the first draw.

    Returns:
      The best of `way.choices`, and the accuracy of each in percent on what was held back.
    """
    if len(way.choices) == 1:
        return way.choices[0], {}
    chosen = readout.label_draws(labels_of(train), per_class, 1, 0)[0]
    is_back = np.arange(len(chosen)) % per_class >= per_class - per_class // HELD_BACK
    back = Examples(train, chosen[is_back])
    tried = {
        choice: judge(way.scores(chosen[~is_back], choice, 0, back), back.labels())
        for choice in way.choices
    }
    best = max(tried, key=lambda choice: tried[choice])
    return best, {f"{choice:g}": top1 for choice, (top1, _) in tried.items()}


def judge(scores: np.ndarray, labels: np.ndarray) -> tuple[float, float]:
    """Return the accuracy of scores [n, K] in percent, and minus their cross entropy."""
    log = scores - np.logaddexp.reduce(scores, axis=1, keepdims=True)
    top1 = 100.0 * float(np.mean(scores.argmax(axis=1) == labels))
    return top1, float(log[np.arange(len(labels)), labels].mean())


def table(rows: Mapping[str, Mapping[str, Any]], seeds: int) -> str:
    """Return the figures as a table in Markdown: mean and standard deviation over the seeds."""
    lines = ["| | 100 labels | 500 labels |", "| --- | --- | --- |"]
    for name in COMPARED[10]:
        cells = []
        for per_class in COMPARED:
            top1 = rows.get(f"{name}, {10 * per_class} labels", {}).get("top1", [])[:seeds]
            cells.append(f"{np.mean(top1):.1f} ± {np.std(top1, ddof=1):.1f}" if top1 else "")
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def _make(name: str, per_class: int, model: api.Pretrained, train: Source) -> Way:
    if name == "k-NN":
        return Neighbours(model, train)
    if name == "few-shot":
        return Ridge(model, train)
    config, fields = TRAINED[name]
    # As many updates whatever the number of labels.
    epochs = configs.load_config(config).epochs * 10 / per_class
    warmup = configs.load_config(config).optimizer.warmup_epochs * 10 / per_class
    more = {
        "data.per_class": f"{per_class}",
        "epochs": f"{epochs}",
        "optimizer.warmup_epochs": f"{warmup}",
    }
    return Training(configs.load_config(config, fields | more), model, train)


def _results(folder: epath.Path, model: api.Pretrained, checkpoint: str) -> dict[str, Any]:
    of = {"checkpoint": str(checkpoint), "step": model.step}
    path = folder / "results.json"
    if not path.exists():
        return {"of": of, "rows": {}}
    results = json.loads(path.read_text())
    if results["of"] != of:
        raise ConfigError(f"--out={folder}: holds results of {results['of']}, not of {of}")
    return results


def _write(folder: epath.Path, results: Mapping[str, Any]) -> None:
    with completed(folder / "results.json") as path:
        path.write_text(json.dumps(results, indent=2) + "\n")


def _line(title: str, row: Mapping[str, Any]) -> str:
    tried = ", ".join(f"{choice}: {value:.0f}" for choice, value in row["held_back"].items())
    chosen = f"  (chose {row['choice']:g} of {tried})" if tried else ""
    return f"{title}: {', '.join(f'{value:.1f}' for value in row['top1'])} %{chosen}"
