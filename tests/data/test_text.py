"""Word pieces: from files, learnt from captions, and back to text."""

import json
import pickle
import sys

import numpy as np
import pytest
from ml_collections import ConfigDict

from mae_jax.data import text
from mae_jax.data.text import WordPieces, learn, word_pieces
from mae_jax.errors import ConfigError

BERT = ["[PAD]", "[unused0]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
BERT += ["owl", "##s", "a", "green", "mo", "##ss", ",", "on", "[", "]", "cls"]

CAPTIONS = ["a green owl on moss"] * 5 + ["two owls , two greenish mosses"] * 3 + ["Ünique"]


def data(**fields):
    defaults = {"vocabulary": "", "vocabulary_size": 100, "text_length": 8}
    return ConfigDict({**defaults, "source": "captions", "split": "train", **fields})


@pytest.fixture
def bert(tmp_path):
    path = tmp_path / "vocab.txt"
    path.write_text("\n".join(BERT) + "\n")
    return word_pieces(data(vocabulary=str(path)))


class TestVocabTxt:
    def test_pieces_are_the_longest_that_fit_and_lower_case(self, bert):
        ids, padding = bert("A Green OWLS moss")
        assert ids.tolist() == [8, 9, 6, 7, 10, 11, 0, 0]
        assert ids.dtype == np.int32
        assert padding.tolist() == [False] * 6 + [True] * 2
        assert bert.pieces(ids[:6]) == ["a", "green", "owl", "##s", "mo", "##ss"]
        assert bert.decode(ids[:6]) == "a green owls moss"

    def test_accents_are_dropped_and_unknown_words_have_an_id(self, bert):
        ids, padding = bert("Grëen zebra")
        assert ids[~padding].tolist() == [9, 2]
        assert bert.decode([9, 2]) == "green [UNK]"

    def test_nothing_is_added_and_names_of_special_tokens_are_words(self, bert):
        ids, padding = bert("[CLS]")
        assert ids[~padding].tolist() == [14, 16, 15]

    def test_a_long_caption_is_cut(self, bert):
        ids, padding = bert("owl " * 20)
        assert ids.tolist() == [6] * 8
        assert not padding.any()

    def test_an_empty_caption_is_all_padding(self, bert):
        ids, padding = bert("")
        assert ids.tolist() == [0] * 8
        assert padding.all()

    def test_size_counts_lines(self, bert):
        assert bert.size == len(BERT)

    def test_words_of_one_piece_have_ids(self, bert):
        assert bert.ids_of(("moss", "owl")[1:], "data.scored_words") == (6,)
        with pytest.raises(ConfigError, match=r"data.scored_words: .*'moss', which is mo ##ss"):
            bert.ids_of(("owl", "moss"), "data.scored_words")
        with pytest.raises(ConfigError, match=r"got 'zebra', which is \[UNK\]"):
            bert.ids_of(("zebra",), "data.scored_words")

    def test_it_can_be_pickled(self, bert):
        again = pickle.loads(pickle.dumps(bert))
        assert again == bert
        assert again("owl")[0].tolist() == bert("owl")[0].tolist()

    def test_its_own_text_does_for_the_file(self, bert):
        again = word_pieces(data(vocabulary=bert.serialized))
        assert again == bert


class TestTokenizerJson:
    def test_other_tokenizers_are_used_as_they_are_but_for_length_and_special_tokens(
        self, tmp_path
    ):
        import tokenizers

        path = tmp_path / "tokenizer.json"
        other = tokenizers.Tokenizer(tokenizers.models.WordLevel({"?": 0, "Owl": 4}, unk_token="?"))
        other.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
        other.enable_padding(length=3, pad_id=4)
        other.enable_truncation(1)
        other.post_processor = tokenizers.processors.BertProcessing(("?", 0), ("?", 0))
        other.save(str(path))
        words = word_pieces(data(vocabulary=str(path)))
        ids, padding = words("Owl Owl owl")
        assert ids.tolist() == [4, 4, 0, 0, 0, 0, 0, 0]
        assert padding.tolist() == [False] * 3 + [True] * 5
        assert words.size == 5  # the largest id counts, not the number of them
        assert words.pieces([4, 3]) == ["Owl", "?"]


class TestFolder:
    @pytest.mark.parametrize("config", ['{"model_type": "bert"}', "[]", "{", None])
    def test_that_of_transformers_gives_its_file(self, tmp_path, bert, config):
        if config is not None:
            (tmp_path / "config.json").write_text(config)
        assert word_pieces(data(vocabulary=str(tmp_path))) == bert
        other = learn(["a zebra"], 100)
        (tmp_path / "tokenizer.json").write_text(other)  # says more than the list of pieces
        assert word_pieces(data(vocabulary=str(tmp_path))).serialized == other

    def test_that_of_a_run_gives_what_it_has_used(self, tmp_path, bert):
        (tmp_path / "config.json").write_text(json.dumps({"data": {"vocabulary": "{}"}}))
        assert word_pieces(data(vocabulary=str(tmp_path))).serialized == "{}"
        (tmp_path / "config.json").write_text(json.dumps({"data": {"vocabulary": ""}}))
        with pytest.raises(ConfigError, match=r"data.vocabulary: expected a run with word pieces"):
            word_pieces(data(vocabulary=str(tmp_path)))

    def test_one_without_pieces_is_refused_in_one_line(self, tmp_path):
        (tmp_path / "config.json").write_text('{"model_type": "vit"}')
        message = r"data.vocabulary: expected a vocab.txt or tokenizer.json, got Is a directory at"
        with pytest.raises(ConfigError, match=message):
            word_pieces(data(vocabulary=str(tmp_path)))


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("vocab.txt", None, "got No such file or directory"),
        ("vocab.txt", "[PAD]\nowl\n", "got no \\[UNK\\]"),
        ("vocab.txt", "[UNK]\nowl\nowl\n", "got 1 lines that repeat another"),
        ("vocab.txt", "[UNK]\nowl\nOwl\n", "lower-case BERT, got 'Owl'"),
        ("tokenizer.json", "{]", "expected a tokenizer.json of the library tokenizers"),
        ("tokenizer.json", "[]", "expected a tokenizer.json of the library tokenizers"),
    ],
)
def test_a_file_of_something_else_is_refused_in_one_line(tmp_path, name, content, message):
    path = tmp_path / name
    if content is not None:
        path.write_text(content)
    with pytest.raises(ConfigError, match=rf"data.vocabulary: .*{message}") as error:
        word_pieces(data(vocabulary=str(path)))
    assert "\n" not in str(error.value)


def test_a_missing_package_is_named(bert, monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    with pytest.raises(ConfigError, match=r'pip install "mae_jax\[text\]"'):
        word_pieces(data(vocabulary=str(tmp_path / "vocab.txt")))


class TestLearning:
    def test_frequent_words_are_pieces_and_rare_ones_are_cut(self):
        words = WordPieces(learn(CAPTIONS, 100), 16)
        assert words.size <= 100
        ids, padding = words("A green owl, unique owls")
        pieces = words.pieces(ids[~padding])
        assert pieces[:4] == ["a", "green", "owl", ","]
        assert pieces[4] == "u"  # met once
        assert words.decode(ids[~padding]) == "a green owl, unique owls"

    def test_ids_begin_with_padding_the_unknown_and_the_characters_in_order(self):
        vocabulary = json.loads(learn(CAPTIONS, 100))["model"]["vocab"]
        pieces = sorted(vocabulary, key=vocabulary.__getitem__)
        assert sorted(vocabulary.values()) == list(range(len(pieces)))
        assert pieces[:2] == ["[PAD]", "[UNK]"]
        characters = [piece for piece in pieces[2:] if len(piece.removeprefix("##")) == 1]
        assert characters == pieces[2 : 2 + len(characters)] == sorted(characters)

    def test_the_same_captions_give_the_same_pieces(self):
        # Without the fixed order each call gives other ones. Many pairs are equally frequent here.
        captions = [f"{a}{b}{c}" for a in "abcdef" for b in "ghijk" for c in "lmnop"] * 2
        first, *others = (learn(captions, 120) for _ in range(4))
        assert all(other == first for other in others)

    def test_size_is_kept(self):
        assert WordPieces(learn(CAPTIONS, 40), 8).size == 40

    def test_too_few_places_for_the_characters_are_refused(self):
        with pytest.raises(ConfigError, match=r"data.vocabulary_size: expected at least \d+"):
            learn(CAPTIONS, 12)

    def test_captions_without_words_are_refused(self):
        with pytest.raises(ConfigError, match=r"data.vocabulary: .* got none"):
            learn(["", "  "], 100)


class Source:
    def __init__(self, captions):
        self._captions = captions

    def captions(self):
        return iter(self._captions)


class TestOfASource:
    def test_the_training_captions_are_read(self, monkeypatch):
        opened = []
        source = Source(CAPTIONS)
        monkeypatch.setattr(text, "open_split", lambda d, split: opened.append(split) or source)
        first = word_pieces(data())
        assert opened == ["train"]
        assert first == WordPieces(learn(CAPTIONS, 100), 8)
        assert word_pieces(data(vocabulary_size=40)).size <= 40 < first.size

    def test_other_captions_give_other_pieces(self, monkeypatch):
        sources = iter([Source(CAPTIONS), Source(["other words"] * 3)])
        monkeypatch.setattr(text, "open_split", lambda d, split: next(sources))
        assert word_pieces(data()) != word_pieces(data())

    def test_a_source_without_captions_is_refused(self, monkeypatch):
        monkeypatch.setattr(text, "open_split", lambda d, split: object())
        with pytest.raises(ConfigError, match=r"data.vocabulary: .* data.source=photos has no"):
            word_pieces(data(source="photos"))


def test_a_length_of_nothing_is_refused():
    with pytest.raises(ConfigError, match=r"data.text_length: expected at least 1, got 0"):
        word_pieces(data(text_length=0))
