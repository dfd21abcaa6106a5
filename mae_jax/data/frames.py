"""Which frames of a film make a clip: a function of (number of frames, generator).

Each function returns int64 [clips, F], the numbers, in [0, count), of the F frames of each clip.
"dense" takes every `stride`-th frame; "uniform" one frame of each of F equal segments of the film.
A film that is too short for a clip is no error: of a dense clip the last frame that is reached is
repeated, of a uniform one each frame.

Source: arXiv 2203.12602, section 4.1 and appendix; the places are those of the authors' code
(MCG-NJU/VideoMAE), but for dense clips in fine-tuning, which it spreads a little wider, and for
uniform ones of films with fewer than F frames, where it trains on the first frame alone.
"""

from __future__ import annotations

import numpy as np


def draw_dense(count: int, rng: np.random.Generator, *, frames: int, stride: int) -> np.ndarray:
    """Return one clip that starts anywhere in the first `count` - F x stride frames, or at 0."""
    start = int(rng.integers(max(count - frames * stride, 0) + 1))
    reached = np.minimum(np.arange(frames), (count - 1 - start) // stride)
    return start + stride * reached[None]


def spaced_dense(
    count: int, rng: np.random.Generator | None = None, *, frames: int, stride: int, clips: int
) -> np.ndarray:
    """Return clips whose starts are evenly spaced from the first to the last; one: the central."""
    del rng
    kept = -(-count // stride)  # every stride-th frame, of which each clip takes F in a row
    spare = max(kept - frames, 0)
    starts = [k * spare // (clips - 1) for k in range(clips)] if clips > 1 else [spare // 2]
    return stride * np.minimum(np.array(starts)[:, None] + np.arange(frames), kept - 1)


def draw_uniform(count: int, rng: np.random.Generator, *, frames: int) -> np.ndarray:
    """Return one clip, whose frames are at random places within segments of count // F frames."""
    length = count // frames
    if not length:
        return spaced_uniform(count, frames=frames, clips=1)
    return length * np.arange(frames)[None] + rng.integers(length, size=(1, frames))


def spaced_uniform(
    count: int, rng: np.random.Generator | None = None, *, frames: int, clips: int
) -> np.ndarray:
    """Return clips evenly spaced from the beginnings of the segments on; one: their middles."""
    del rng
    shifts = np.arange(clips) / clips if clips > 1 else np.array([0.5])
    places = count / frames * (np.arange(frames) + shifts[:, None])
    return places.astype(np.int64)
