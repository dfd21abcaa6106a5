"""Some frames of a film, decoded by PyAV: only the film's packets are looked at for the others.

The presentation times of all packets, sorted, number the frames, so that a frame is the right one
whatever the rate, and nothing has to be decoded to count them. Then decoding starts at the key
frame before the first wanted frame and ends with the last; only wanted frames become pixels.

The file is read through once, since few formats have a list of all times: long films should be cut
into clips, as the sets of action recognition are. One thread decodes: the loader has many.
"""

from __future__ import annotations

import collections
import dataclasses
import io
import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from mae_jax.data.transforms import MAX_PIXELS, BadExample, Decode
from mae_jax.errors import ConfigError

if TYPE_CHECKING:
    import av

Choose = Callable[[int], Sequence[int] | np.ndarray]

FORMATS = {1: "gray", 3: "rgb24"}  # of FFmpeg, by number of channels
# Packets in a row that may give no frame of their own, as in AVI files with packed B-frames.
WITHOUT_FRAME = 2


def read_frames(
    video: str | bytes | np.ndarray,
    choose: Choose,
    channels: int,
    size: tuple[int, int] | None = None,
) -> np.ndarray:
    """Return some frames of a film, uint8 [N, H, W, channels].

    Args:
      video: path of a file, what is in it, or all frames, uint8 [T, H, W, C] (see `Decode`).
      choose: number of frames T -> numbers of the wanted ones, in any order, also repeatedly.
      channels: 1 (grey) or 3 (RGB), for arrays any number.
      size: (height, width) that frames of a file are reduced to, by area.

    Raises:
      BadExample: if the film is damaged, cut off, empty, no film, or its frames have more than
        `MAX_PIXELS`.
      OSError: if the file cannot be read.
      ConfigError: if PyAV is missing, or films cannot have `channels` channels.
    """
    if isinstance(video, np.ndarray):
        return _from_array(video, choose, channels)
    if channels not in FORMATS:
        raise ConfigError(f"model.channels: expected 1 or 3 with films, got {channels}")
    av = _import_av()
    try:
        with av.open(io.BytesIO(video) if isinstance(video, bytes) else video) as container:
            stream = container.streams.best("video")  # not a picture of the cover
            if stream is None:
                raise BadExample("has no pictures")
            film = _Film(container, stream)
            wanted = np.asarray(choose(film.count))
            numbers, places = np.unique(wanted, return_inverse=True)
            frames = film.decode(numbers.tolist())
            pixels = _stack((_pixels(frame, channels, size) for frame in frames), len(numbers))
    except (BadExample, ConfigError):
        raise
    except OSError as error:
        raise type(error)(error.errno, error.strerror) from error
    except av.error.FFmpegError as error:
        raise BadExample(f"not a film that PyAV can read: {error.strerror}") from error
    except Exception as error:  # a damaged file raises nearly anything
        raise BadExample(f"{type(error).__name__}: {error}") from error
    return pixels if np.array_equal(wanted, numbers) else pixels[places.reshape(wanted.shape)]


@dataclasses.dataclass
class _Film:
    """An opened film.

    Attributes:
      count: number of frames.
    """

    container: Any
    stream: Any
    count: int = dataclasses.field(init=False)

    def __post_init__(self) -> None:
        if self.stream.width * self.stream.height > MAX_PIXELS:
            raise BadExample(
                f"{self.stream.width} x {self.stream.height} pixels are more than {MAX_PIXELS}"
            )
        self.stream.thread_count = 1
        self._times: list[Any] = []
        self._key_times: list[Any] = []
        for packet in self.container.demux(self.stream):
            if packet.is_corrupt:
                raise BadExample(f"cut off after {len(self._times)} frames")
            if packet.size and packet.is_keyframe:
                self._key_times.append(packet.pts)
            if packet.size and not packet.is_discard:
                self._times.append(packet.pts)
        self.count = len(self._times)
        if not self.count:
            raise BadExample("has no frames")
        self._timed = None not in self._times and len(set(self._times)) == self.count
        if self._timed:
            self._times.sort()

    def decode(self, numbers: Sequence[int]) -> Iterator[av.VideoFrame]:
        """Yield the frames of some numbers, which are sorted and differ."""
        left = collections.deque(numbers)
        before, before_number = None, -1
        for number, frame in self._frames_from(left[0]):
            while left and left[0] < number:  # a frame that did not come
                yield self._instead(left.popleft(), before, before_number)
            if left and left[0] == number:
                if frame.is_corrupt:
                    raise BadExample(f"frame {number} of {self.count} is damaged")
                left.popleft()
                yield frame
            if not left:
                return
            before, before_number = frame, number
        for number in left:
            yield self._instead(number, before, before_number)

    def _instead(
        self, number: int, before: av.VideoFrame | None, before_number: int
    ) -> av.VideoFrame:
        """Return the frame before, which is shown longer where a packet gives none."""
        if before is None or number - before_number > WITHOUT_FRAME:
            raise BadExample(f"frame {number} of {self.count} cannot be decoded")
        return before

    def _frames_from(self, first: int) -> Iterator[tuple[int, av.VideoFrame]]:
        """Yield numbers and frames from a key frame at or before `first` on."""
        if not self._timed:  # numbered as they come
            self.container.seek(0)
            frames = (f for packet in self.container.demux(self.stream) for f in packet.decode())
            yield from enumerate(frames)
            return
        number_of = {time: number for number, time in enumerate(self._times)}
        for packet in self._packets_from(self._times[first]):
            for frame in packet.decode():
                if frame.pts in number_of:
                    yield number_of[frame.pts], frame

    def _packets_from(self, time: int) -> Iterator[av.Packet]:
        key_time = max((key for key in self._key_times if key <= time), default=self._times[0])
        for target in (key_time, min(self._times[0], *self._key_times, 0)):
            self.container.seek(target, stream=self.stream)
            packets = self.container.demux(self.stream)
            packet = next(packets)
            if packet.pts is not None and packet.pts <= key_time:
                break  # formats search by the time of decoding, and may find a later key frame
        return itertools.chain([packet], packets)


def _pixels(frame: Any, channels: int, size: tuple[int, int] | None) -> np.ndarray:
    """Return a view of the pixels [H, W, channels] of a frame."""
    height, width = size or (frame.height, frame.width)
    method = "BICUBIC" if size is None else "AREA"
    converted = frame.reformat(width, height, FORMATS[channels], interpolation=method)
    (plane,) = converted.planes
    rows = np.frombuffer(plane, np.uint8).reshape(height, plane.line_size)  # wider than a row
    pixels = rows[:, : width * channels].reshape(height, width, channels)
    return np.rot90(pixels, round(frame.rotation / 90))


def _stack(arrays: Iterable[np.ndarray], count: int) -> np.ndarray:
    """Return `np.stack` of arrays, each of which is copied before the next one is made."""
    iterator = iter(arrays)
    first = next(iterator)
    stacked = np.empty((count, *first.shape), first.dtype)
    stacked[0] = first
    for place, array in enumerate(iterator, start=1):
        stacked[place] = array
    return stacked


def _from_array(video: np.ndarray, choose: Choose, channels: int) -> np.ndarray:
    if video.dtype != np.uint8 or video.ndim != 4 or 0 in video.shape:
        raise BadExample(f"expected uint8 [T, H, W, C], got {video.dtype} {list(video.shape)}")
    chosen = video[np.asarray(choose(len(video)))]
    if chosen.shape[-1] == channels:
        return chosen
    decode = Decode(channels)
    return np.stack([decode(frame) for frame in chosen])


def _import_av() -> Any:
    try:
        import av
    except ImportError:
        raise ConfigError(
            'data.source: films need the package av: pip install "mae_jax[video]"'
        ) from None
    return av
