"""The right frames, and only they, come out of films; what is damaged is named."""

import struct
import sys

import numpy as np
import pytest

pytest.importorskip("av")

import av

from mae_jax.data import video
from mae_jax.data.transforms import BadExample
from mae_jax.errors import ConfigError
from tests import films

# Name of the file, encoder and the rest of `films.write`.
FORMATS = {
    "h264 with B-frames": ("a.mp4", "libx264", {}),
    "h264, a key frame every 3": ("a.mov", "libx264", {"gop": 3, "b_frames": 3}),
    "h264, key frames only": ("a.mp4", "libx264", {"gop": 1}),
    "h264 of uneven times": ("a.mkv", "libx264", {"times": np.cumsum([1, 4, 2] * 10).tolist()}),
    "mpeg4, packets without times": ("a.avi", "mpeg4", {}),
    "mpeg4": ("a.mkv", "mpeg4", {"b_frames": 0}),
    "vp8": ("a.webm", "libvpx", {"b_frames": 0}),
    "jpeg": ("a.mov", "mjpeg", {"b_frames": 0}),
}


def write(folder, kind, frames=30):
    name, codec, options = FORMATS[kind]
    return films.write(folder / name, frames, codec=codec, **options)


def read(film, numbers, channels=1, **options):
    return video.read_frames(film, lambda count: numbers, channels, **options)


@pytest.fixture(scope="module")
def film(tmp_path_factory):
    return write(tmp_path_factory.mktemp("film"), "h264 with B-frames")


class TestFrames:
    @pytest.mark.parametrize("kind", FORMATS)
    def test_each_is_the_one_that_plain_decoding_gives(self, tmp_path, kind):
        path = write(tmp_path, kind)
        with av.open(path) as container:
            plain = [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]
        assert len(plain) == 30
        every = video.read_frames(path, range, 3)
        assert every.dtype == np.uint8
        np.testing.assert_array_equal(every, plain)
        for number in range(30):
            np.testing.assert_array_equal(read(path, [number], 3)[0], plain[number])

    def test_they_show_their_numbers_in_the_order_asked_for(self, film):
        wanted = [29, 3, 3, 17, 0, 29]
        frames = read(film, wanted)
        assert frames.shape == (6, 32, 48, 1)
        assert films.numbers(frames).tolist() == wanted

    def test_they_have_the_shape_of_the_numbers(self, film):
        wanted = np.array([[1, 2, 3], [3, 4, 5]])
        frames = read(film, wanted)
        np.testing.assert_array_equal(films.numbers(frames), wanted)

    def test_their_number_is_known_before_any_is_decoded(self, film, monkeypatch):
        counts = []

        def choose(count):
            counts.append(count)
            raise BadExample("enough")

        monkeypatch.setattr(video._Film, "decode", None)
        with pytest.raises(BadExample, match="enough"):
            video.read_frames(film, choose, 1)
        assert counts == [30]

    def test_of_bytes_they_are_those_of_the_file(self, film):
        with open(film, "rb") as file:
            data = file.read()
        np.testing.assert_array_equal(read(data, [4, 25]), read(film, [4, 25]))

    @pytest.mark.parametrize(
        ("wanted", "decoded"),
        # The encoder has put key frames at 0, 9, 18 and 27.
        [([0], 1), ([8], 9), ([9], 1), ([14, 16], 8), ([18, 26], 9), ([5, 12], 13), ([29], 3)],
    )
    def test_only_they_become_pixels_and_only_what_lies_before_is_decoded(
        self, film, monkeypatch, wanted, decoded
    ):
        decoding, converting = video._Film._frames_from, video._pixels
        seen, converted = [], []

        def frames_from(self, first):
            for number, frame in decoding(self, first):
                seen.append(number)
                yield number, frame

        def pixels(frame, *args):
            converted.append(frame)
            return converting(frame, *args)

        monkeypatch.setattr(video._Film, "_frames_from", frames_from)
        monkeypatch.setattr(video, "_pixels", pixels)
        assert films.numbers(read(film, wanted)).tolist() == wanted
        assert len(converted) == len(wanted)
        assert seen == list(range(wanted[-1] - decoded + 1, wanted[-1] + 1))

    def test_colours_are_red_green_blue(self, tmp_path):
        colours = np.zeros((8, 32, 48, 3), np.uint8)
        colours[..., 0], colours[..., 1], colours[..., 2] = 200, 100, 50
        path = films.write(tmp_path / "a.mp4", colours)
        np.testing.assert_allclose(read(path, [7], 3).mean((0, 1, 2)), [200, 100, 50], atol=4)
        luma = np.array([200, 100, 50]) @ [0.299, 0.587, 0.114]
        np.testing.assert_allclose(read(path, [7], 1).mean(), luma, atol=4)

    def test_they_are_reduced_by_area(self, tmp_path):
        halves = np.zeros((4, 32, 48, 3), np.uint8)
        halves[:, :, 24:] = 240
        path = films.write(tmp_path / "a.mp4", halves)
        small = read(path, [0, 3], size=(8, 12))
        assert small.shape == (2, 8, 12, 1)
        np.testing.assert_allclose(small[:, :, :5], 0, atol=8)
        np.testing.assert_allclose(small[:, :, 7:], 240, atol=8)

    def test_a_width_that_rows_are_padded_from_is_kept(self, tmp_path):
        ramp = np.broadcast_to(
            np.arange(0, 250, 5, dtype=np.uint8)[None, None, :, None], (4, 30, 50, 3)
        )
        path = films.write(tmp_path / "a.mp4", ramp)
        for channels in (1, 3):
            frames = read(path, [2], channels)
            assert frames.shape == (1, 30, 50, channels)
            np.testing.assert_allclose(frames[0, :, :, 0].mean(0), np.arange(0, 250, 5), atol=6)

    def test_they_are_turned_as_the_film_asks(self, tmp_path):
        halves = np.zeros((4, 32, 48, 3), np.uint8)
        halves[:, :, 24:] = 240
        path = films.write(tmp_path / "a.mp4", halves)
        with open(path, "rb") as file:
            data = bytearray(file.read())
        place = data.index(b"tkhd") + 44  # ISO/IEC 14496-12: the matrix of a track
        quarter = (0, 1 << 16, 0, -1 << 16, 0, 0, 0, 0, 1 << 30)  # clockwise, as phones write it
        data[place : place + 36] = struct.pack(">9i", *quarter)
        frames = read(bytes(data), [1])
        assert frames.shape == (1, 48, 32, 1)  # what was right is below
        np.testing.assert_allclose(frames[0, :20], 0, atol=8)
        np.testing.assert_allclose(frames[0, 28:], 240, atol=8)


class TestArrays:
    def test_frames_are_taken_as_they_are(self):
        array = films.noise(9)
        np.testing.assert_array_equal(read(array, [8, 0, 0], 3), array[[8, 0, 0]])
        seven = np.zeros((5, 4, 4, 7), np.uint8)
        assert read(seven, [[0, 1], [2, 3]], 7).shape == (2, 2, 4, 4, 7)

    def test_channels_are_converted_as_those_of_images(self):
        array = films.noise(3)
        grey = read(array, [0, 2], 1)
        assert grey.shape == (2, 32, 48, 1)
        np.testing.assert_allclose(
            grey[..., 0], array[[0, 2]] @ np.array([0.299, 0.587, 0.114]), atol=1
        )
        np.testing.assert_array_equal(read(grey, [1], 3), grey[[1]].repeat(3, axis=-1))

    @pytest.mark.parametrize(
        "array",
        [
            np.zeros((3, 4, 5), np.uint8),
            np.zeros((3, 4, 5, 3), np.float32),
            np.zeros((0, 4, 5, 3), np.uint8),
        ],
    )
    def test_others_are_bad_examples(self, array):
        with pytest.raises(BadExample, match=r"expected uint8 \[T, H, W, C\]"):
            video.read_frames(array, range, 3)


class TestBadFilms:
    @pytest.mark.parametrize("data", [b"", b"no film at all " * 100, b"\0" * 5000])
    def test_what_is_no_film_is_one(self, tmp_path, data):
        path = tmp_path / "a.mp4"
        path.write_bytes(data)
        for film in (str(path), data):
            with pytest.raises(BadExample, match="not a film that PyAV can read") as error:
                video.read_frames(film, range, 1)
            assert "\n" not in str(error.value)

    @pytest.mark.parametrize("share", [0.05, 0.3, 0.6, 0.95])
    @pytest.mark.parametrize("index_first", [False, True])
    def test_an_mp4_that_was_cut_off_is_one(self, tmp_path, index_first, share):
        options = {"movflags": "faststart"} if index_first else {}
        path = films.write(tmp_path / "a.mp4", films.noise(12), container=options)
        with open(path, "rb") as file:
            data = file.read()
        with pytest.raises(BadExample, match=r"cut off after|not a film"):
            video.read_frames(data[: int(len(data) * share)], lambda count: [0], 1)

    def test_of_a_webm_that_was_cut_off_the_rest_is_a_shorter_film(self, tmp_path):
        path = films.write(tmp_path / "a.webm", films.noise(12), codec="libvpx")
        with open(path, "rb") as file:
            data = file.read()
        every = video.read_frames(data, range, 1)
        rest = video.read_frames(data[: len(data) // 2], range, 1)
        assert 0 < len(rest) < 12
        np.testing.assert_array_equal(rest, every[: len(rest)])

    @pytest.mark.parametrize(("name", "codec"), [("a.mp4", "libx264"), ("a.avi", "mpeg4")])
    def test_one_with_a_damaged_wanted_frame_is_one(self, tmp_path, name, codec):
        path = films.write(tmp_path / name, films.noise(12), codec=codec, gop=12)
        with open(path, "rb") as file:
            data = bytearray(file.read())
        middle = slice(len(data) // 2, len(data) // 2 + 1000)
        data[middle] = bytes(byte ^ 0x5A for byte in data[middle])
        with pytest.raises(BadExample):
            video.read_frames(bytes(data), range, 1)

    def test_sound_alone_is_one(self, tmp_path):
        path = str(tmp_path / "a.mkv")
        with av.open(path, "w") as file:
            stream = file.add_stream("pcm_s16le", rate=8000, layout="mono")
            frame = av.AudioFrame.from_ndarray(np.zeros((1, 800), np.int16), "s16", "mono")
            frame.sample_rate = 8000
            file.mux(stream.encode(frame))
        with pytest.raises(BadExample, match="has no pictures"):
            video.read_frames(path, range, 1)

    def test_frames_above_the_limit_are_refused_before_they_are_decoded(self, film, monkeypatch):
        monkeypatch.setattr(video, "MAX_PIXELS", 32 * 48 - 1)
        with pytest.raises(BadExample, match="48 x 32 pixels are more than 1535"):
            video.read_frames(film, range, 1)

    def test_a_frame_or_two_that_do_not_come_are_those_before(self, film, monkeypatch):
        decoding = video._Film._frames_from

        def but(missing):
            return lambda self, first: (
                (number, frame) for number, frame in decoding(self, first) if number not in missing
            )

        monkeypatch.setattr(video._Film, "_frames_from", but({12, 13, 28, 29}))
        assert films.numbers(read(film, [11, 13, 14, 28, 29])).tolist() == [11, 11, 14, 27, 27]
        monkeypatch.setattr(video._Film, "_frames_from", but({27, 28, 29}))
        with pytest.raises(BadExample, match="frame 29 of 30 cannot be decoded"):
            read(film, [26, 29])

    def test_a_file_that_is_not_there_is_named_in_one_line(self, tmp_path):
        with pytest.raises(OSError, match=r"No such file or directory$"):
            video.read_frames(str(tmp_path / "none.mp4"), range, 1)


class TestRefusals:
    @pytest.mark.parametrize("channels", [2, 4])
    def test_films_are_grey_or_in_colour(self, film, channels):
        with pytest.raises(ConfigError, match=f"model.channels: expected 1 or 3 .* got {channels}"):
            video.read_frames(film, range, channels)

    def test_without_pyav_the_extra_is_named(self, film, monkeypatch):
        monkeypatch.setitem(sys.modules, "av", None)
        with pytest.raises(
            ConfigError, match=r'need the package av: pip install "mae_jax\[video\]"'
        ):
            video.read_frames(film, range, 1)
