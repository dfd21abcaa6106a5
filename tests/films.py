"""Small films, written by PyAV, whose frames show their number by their grey level."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from fractions import Fraction
from pathlib import Path

import av
import numpy as np

DARKEST, STEP = 16, 6  # grey level of frame 0, and from frame to frame: up to 39 of them
RATE = 25


def levels(count: int) -> np.ndarray:
    """Return the grey levels of the first frames of a film."""
    return DARKEST + STEP * np.arange(count)


def numbers(frames: np.ndarray) -> np.ndarray:
    """Return the numbers that frames [..., H, W, C] show."""
    shown = frames.astype(float).mean(axis=(-3, -2, -1))
    return np.round((shown - DARKEST) / STEP).astype(int)


def write(
    path: Path,
    frames: int | np.ndarray = 30,
    *,
    codec: str = "libx264",
    size: tuple[int, int] = (32, 48),
    gop: int = 10,
    b_frames: int = 2,
    times: Sequence[int] | None = None,
    container: Mapping[str, str] | None = None,
) -> str:
    """Write a film and return its path.

    Args:
      path: its ending says the format.
      frames: how many, grey; or the frames, uint8 [T, H, W, 3].
      codec: an encoder of FFmpeg.
      size: (height, width).
      gop: frames from key frame to key frame.
      b_frames: in a row, which are decoded later than they are shown.
      times: of the frames, in 1 / `RATE` seconds; None: one after the other.
      container: options of the format.
    """
    if isinstance(frames, int):
        pixels = np.broadcast_to(levels(frames)[:, None, None, None], (frames, *size, 3))
        frames = pixels.astype(np.uint8)
    path.parent.mkdir(parents=True, exist_ok=True)
    with av.open(str(path), "w", options=dict(container or {})) as file:
        stream = file.add_stream(codec, rate=RATE)
        stream.height, stream.width = frames.shape[1:3]
        stream.pix_fmt = "yuvj420p" if codec == "mjpeg" else "yuv420p"
        stream.gop_size, stream.max_b_frames = gop, b_frames
        stream.bit_rate = 4_000_000
        for number, image in enumerate(frames):
            frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(image), format="rgb24")
            frame.pts = number if times is None else times[number]
            frame.time_base = Fraction(1, RATE)
            file.mux(stream.encode(frame))
        file.mux(stream.encode())
    return str(path)


def noise(count: int, size: tuple[int, int] = (32, 48)) -> np.ndarray:
    """Return frames that take many bytes, so that a file can be cut within them."""
    return np.random.default_rng(0).integers(0, 256, (count, *size, 3), dtype=np.uint8)
