"""Captions as ids of word pieces, and back, by the library `tokenizers`.

`data.vocabulary` says which pieces there are:

- "": as many as `data.vocabulary_size` allows, learnt from the captions that are trained on, in
  BERT's lower-case form. The same captions give the same ids.
- a file: a `tokenizer.json` of that library, or the `vocab.txt` of a lower-case BERT; or a folder
  with one of them, the former if there are both.
- the folder of a run, for the pieces that it has used.
- the text of a `tokenizer.json`, which begins with "{": what a run keeps with its checkpoints, so
  that a model needs neither the file nor the captions again.

No special tokens are added (no [CLS], no [SEP]); a caption is cut at `data.text_length` pieces.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import json
from collections.abc import Iterable, Sequence
from types import ModuleType
from typing import Any

import numpy as np
from etils import epath
from ml_collections import ConfigDict

from mae_jax.data.sources import Source, open_split
from mae_jax.errors import ConfigError

PADDING, UNKNOWN = "[PAD]", "[UNK]"
FILES = ("tokenizer.json", "vocab.txt")  # in a folder of transformers
CONTINUES = "##"  # what a piece begins with that goes on a word
MAX_CAPTIONS = 1_000_000  # to learn pieces from
MIN_FREQUENCY = 2  # of a pair of pieces that becomes one, as BERT's trainer of `tokenizers` has it


@dataclasses.dataclass(frozen=True)
class WordPieces:
    """Between captions and ids. Picklable; each process builds the tokenizer once.

    Attributes:
      serialized: the text of a `tokenizer.json`.
      length: L, places of a caption.
    """

    serialized: str = dataclasses.field(repr=False)
    length: int

    @property
    def size(self) -> int:
        """The largest id + 1."""
        return 1 + max(_tokenizer(self.serialized).get_vocab().values())

    def __call__(self, caption: str) -> tuple[np.ndarray, np.ndarray]:
        """Return ids int32 [L], 0 where there is no piece, and padding bool [L], True there."""
        found = _tokenizer(self.serialized).encode(caption, add_special_tokens=False).ids
        found = found[: self.length]
        ids = np.zeros(self.length, np.int32)
        ids[: len(found)] = found
        return ids, np.arange(self.length) >= len(found)

    def pieces(self, ids: Iterable[int]) -> list[str]:
        """Return the piece of each id, "##" before one that goes on a word; "?" for no piece."""
        tokenizer = _tokenizer(self.serialized)
        return [tokenizer.id_to_token(int(one)) or "?" for one in ids]

    def decode(self, ids: Iterable[int]) -> str:
        """Return the text of ids, those of padding left out by the caller."""
        tokenizer = _tokenizer(self.serialized)
        return tokenizer.decode([int(one) for one in ids], skip_special_tokens=False)

    def ids_of(self, words: Sequence[str], field: str) -> tuple[int, ...]:
        """Return the ids of words that are one piece each.

        Args:
          words: whole words.
          field: of the configuration, for the message.

        Raises:
          ConfigError: if one is cut into pieces, or unknown.
        """
        tokenizer, ids = _tokenizer(self.serialized), []
        for word in words:
            pieces = tokenizer.encode(word, add_special_tokens=False).tokens
            if len(pieces) != 1 or pieces[0] == UNKNOWN:
                raise ConfigError(
                    f"{field}: expected words that are one piece of the vocabulary, got {word!r},"
                    f" which is {' '.join(pieces) or 'none'}"
                )
            ids.append(tokenizer.token_to_id(pieces[0]))
        return tuple(ids)


def word_pieces(data: ConfigDict) -> WordPieces:
    """Return what `config.data` asks for: `vocabulary`, `vocabulary_size`, `text_length`.

    Raises:
      ConfigError: if the file is none of the two kinds, the source has no captions to learn pieces
        from, or `tokenizers` is not installed.
    """
    if data.text_length < 1:
        raise ConfigError(f"data.text_length: expected at least 1, got {data.text_length}")
    if data.vocabulary.startswith("{"):
        serialized = data.vocabulary
    elif data.vocabulary:
        serialized = _from_file(data.vocabulary)
    else:
        serialized = _of_source(open_split(data, data.split), data)
    return WordPieces(serialized, data.text_length)


def learn(captions: Iterable[str], size: int) -> str:
    """Learn word pieces from captions: the characters, then what occurs together most often.

    Args:
      captions: the first `MAX_CAPTIONS` are used.
      size: pieces at most, [PAD] (0) and [UNK] (1) among them.

    Returns:
      The text of a `tokenizer.json`, a function of the captions and nothing else.

    Raises:
      ConfigError: if there is no word in them, or they have more characters than fit.
    """
    captions = list(itertools.islice(captions, MAX_CAPTIONS))
    # The trainer gives out ids in the order of a hash table, another one in each process, and lets
    # them decide between pairs that are equally frequent. A first round without any pairs finds the
    # characters; the second one has them given in a fixed order.
    first = [PADDING, UNKNOWN]
    characters = sorted(_train(captions, first, size=0).keys() - first)
    if not characters:
        raise ConfigError("data.vocabulary: expected captions to learn words from, got none")
    first += characters
    if len(first) > size:
        raise ConfigError(
            f"data.vocabulary_size: expected at least {len(first)}, for the characters of the"
            f" captions alone are {len(characters)} pieces, got {size}"
        )
    return _bert(_train(captions, first, size))


def _train(captions: Sequence[str], first: Sequence[str], size: int) -> dict[str, int]:
    """Return piece -> id; `first` has the first ids."""
    library = _library()
    tokenizer = library.Tokenizer(library.models.WordPiece(unk_token=UNKNOWN))
    tokenizer.normalizer = library.normalizers.BertNormalizer(lowercase=True)
    tokenizer.pre_tokenizer = library.pre_tokenizers.BertPreTokenizer()
    trainer = library.trainers.WordPieceTrainer(
        vocab_size=size,
        min_frequency=MIN_FREQUENCY,
        special_tokens=list(first),
        continuing_subword_prefix=CONTINUES,
        show_progress=False,
    )
    tokenizer.train_from_iterator(captions, trainer)
    return tokenizer.get_vocab()


def _of_source(source: Source, data: ConfigDict) -> str:
    captions = getattr(source, "captions", None)
    if captions is None:
        raise ConfigError(
            "data.vocabulary: expected a file (vocab.txt or tokenizer.json), for data.source="
            f"{data.source} has no captions to learn words from"
        )
    return learn(captions(), data.vocabulary_size)


def _from_file(name: str) -> str:
    """Return the tokenizer of a `tokenizer.json` or a `vocab.txt` as the text of the former."""
    path = epath.Path(name).expanduser()
    data = _data_of_run(path)
    if data is not None:
        if not data.get("vocabulary"):
            raise ConfigError(
                f"data.vocabulary: expected a run with word pieces, got none at {path}"
            )
        return data["vocabulary"]
    path = next((path / file for file in FILES if (path / file).exists()), path)
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeError) as error:
        reason = getattr(error, "strerror", None) or error
        raise ConfigError(
            f"data.vocabulary: expected a vocab.txt or tokenizer.json, got {reason} at {path}"
        ) from error
    if path.suffix == ".json":
        _check(text, str(path))
        return text
    # Not splitlines(): a piece may be one of the rarer characters at which that breaks lines.
    pieces = [line.rstrip("\r") for line in text.removesuffix("\n").split("\n")]
    repeated = len(pieces) - len(set(pieces))
    if UNKNOWN not in pieces or repeated:
        what = f"{repeated} lines that repeat another" if repeated else f"no {UNKNOWN}"
        raise ConfigError(
            f"data.vocabulary: expected a piece a line, {UNKNOWN} among them, got {what} in {path}"
        )
    cased = [piece for piece in pieces if piece[:1] != "[" and piece != piece.lower()]
    if cased:
        raise ConfigError(
            f"data.vocabulary: expected the pieces of a lower-case BERT, got {cased[0]!r} in"
            f" {path}; give the tokenizer.json of another one"
        )
    return _bert({piece: number for number, piece in enumerate(pieces)})


def _data_of_run(folder: epath.Path) -> dict[str, Any] | None:
    """Return `config.data` of the folder of a run; None: it is none, it may be of transformers."""
    try:
        config = json.loads((folder / "config.json").read_text())
    except (OSError, ValueError):
        return None
    data = config.get("data") if isinstance(config, dict) else None
    return data if isinstance(data, dict) else None


def _bert(ids: dict[str, int]) -> str:
    """Return the tokenizer of a lower-case BERT with these pieces."""
    library = _library()
    tokenizer = library.Tokenizer(library.models.WordPiece(ids, unk_token=UNKNOWN))
    tokenizer.normalizer = library.normalizers.BertNormalizer(lowercase=True)
    tokenizer.pre_tokenizer = library.pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = library.decoders.WordPiece(prefix=CONTINUES)
    return tokenizer.to_str()


def _check(text: str, where: str) -> None:
    try:
        _library().Tokenizer.from_str(text)
    except ConfigError:
        raise
    except Exception as error:  # it raises this type and no other
        raise ConfigError(
            f"data.vocabulary: expected a tokenizer.json of the library tokenizers at {where}, got"
            f" {' '.join(str(error).split())}"
        ) from error


@functools.lru_cache(maxsize=4)
def _tokenizer(serialized: str) -> Any:
    tokenizer = _library().Tokenizer.from_str(serialized)
    tokenizer.no_padding()
    tokenizer.no_truncation()
    return tokenizer


def _library() -> ModuleType:
    try:
        import tokenizers
    except ImportError:
        raise ConfigError(
            'data.reader: captions needs the package tokenizers: pip install "mae_jax[text]"'
        ) from None
    return tokenizers
