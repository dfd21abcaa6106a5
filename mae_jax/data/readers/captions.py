"""Images with captions: `image` as the reader of images makes it, and the words beside it.

Fields of `config.data`: those of images; `vocabulary`, `vocabulary_size` and `text_length`, which
`mae_jax.data.text` explains; and `unpaired_text`, a file of texts without an image, of which each
example gets one at random, up to `unpaired_text_length` pieces of it.

A word that says which side something is on is no longer true of an image that is flipped;
`data.flip` has to be off where there are such.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from ml_collections import ConfigDict

from mae_jax.data.lines import Lines, open_lines
from mae_jax.data.readers import Reader, images
from mae_jax.data.text import WordPieces, word_pieces
from mae_jax.errors import ConfigError


@dataclasses.dataclass(frozen=True)
class CaptionReader:
    """Read image and caption: `image`, `text` int32 [L] and `padding` bool [L].

    With `unpaired`, `unpaired_text` int32 [L'] and `unpaired_padding` bool [L'] as well: a text
    that has nothing to do with the image.

    An example may have a `caption`, a text or several. Without one, or with nothing but blanks in
    it, everything is padding. All views of an image have one text.

    Attributes:
      image: reads the rest of the example.
      words: makes ids of a caption.
      draw: of several captions take one at random, not the first.
      unpaired: texts without an image.
      unpaired_length: L'.
    """

    image: Reader
    words: WordPieces
    draw: bool
    unpaired: Lines | None = None
    unpaired_length: int = 0

    @property
    def field(self) -> str:
        """The name in an example of what is decoded beside the caption."""
        return self.image.field

    @property
    def views(self) -> int:
        """Rows of a batch that an example becomes."""
        return self.image.views

    @property
    def kept(self) -> dict[str, str]:
        """Values for fields of `config.data` with which this reader can be made anywhere.

        They are to be kept with what a model is kept with: its ids mean nothing without them.
        """
        return {"vocabulary": self.words.serialized}

    @property
    def fingerprint(self) -> str:
        """A digest by which other texts without an image are noticed; empty if there are none."""
        return "" if self.unpaired is None else self.unpaired.fingerprint()

    def __call__(
        self, example: Mapping[str, Any], rng: np.random.Generator, *, exif: bool = False
    ) -> dict[str, np.ndarray]:
        """Return the arrays; see `Reader`."""
        arrays = self.image(example, rng, exif=exif)
        text, padding = self.words(self._choose(example.get("caption"), rng))
        arrays = {**arrays, "text": text, "padding": padding}
        if self.unpaired is not None:
            line = self.unpaired[int(rng.integers(len(self.unpaired)))]
            words = dataclasses.replace(self.words, length=self.unpaired_length)
            arrays["unpaired_text"], arrays["unpaired_padding"] = words(line)
        return arrays

    def _choose(self, captions: str | Sequence[str] | None, rng: np.random.Generator) -> str:
        some = [captions] if isinstance(captions, str) else captions or []
        some = [caption for caption in some if caption.strip()]
        if not some:
            return ""
        return some[rng.integers(len(some))] if self.draw else some[0]


def training(config: ConfigDict) -> CaptionReader:
    """Return what reads examples to train on.

    Raises:
      ConfigError: if there is no such vocabulary, or it is larger than the model's.
    """
    words = word_pieces(config.data)
    if words.size > config.model.vocabulary_size:
        raise ConfigError(
            f"model.vocabulary_size: expected at least {words.size}, the word pieces of"
            f" data.vocabulary, got {config.model.vocabulary_size}"
        )
    unpaired = _unpaired(config.data)
    weight = config.model.get("unpaired_loss_weight", 0)
    if bool(weight) != ("unpaired" in unpaired):
        raise ConfigError(
            "model.unpaired_loss_weight, data.unpaired_text: expected a weight above 0 and a file,"
            f" or 0 and none, got {weight} and {config.data.get('unpaired_text', '')!r}"
        )
    return CaptionReader(images.training(config), words, draw=True, **unpaired)


def evaluation(data: ConfigDict, given: float | None = None) -> CaptionReader:
    """Return what reads examples to evaluate on; see `mae_jax.data.readers.images.evaluation`."""
    reader = images.evaluation(data, given)
    return CaptionReader(reader, word_pieces(data), draw=False, **_unpaired(data))


def _unpaired(data: ConfigDict) -> dict[str, Any]:
    """Return the fields of texts without an image, if there are such."""
    name = data.get("unpaired_text", "")
    if not name:
        return {}
    lines = open_lines(name, "data.unpaired_text")
    return {"unpaired": lines, "unpaired_length": data.unpaired_text_length}
