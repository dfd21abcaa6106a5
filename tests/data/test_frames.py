"""Which frames make a clip: values worked by hand, and bounds for all lengths of films."""

import numpy as np
import pytest

from mae_jax.data import frames


def generator(seed=0):
    return np.random.default_rng(seed)


class TestDrawDense:
    def test_all_starts_of_a_whole_clip_are_drawn(self):
        rng = generator()
        clips = [frames.draw_dense(12, rng, frames=3, stride=3) for _ in range(200)]
        assert {tuple(clip[0].tolist()) for clip in clips} == {
            (0, 3, 6),
            (1, 4, 7),
            (2, 5, 8),
            (3, 6, 9),
        }

    @pytest.mark.parametrize(
        ("count", "expected"),
        [(9, [0, 3, 6]), (8, [0, 3, 6]), (7, [0, 3, 6]), (6, [0, 3, 3]), (1, [0, 0, 0])],
    )
    def test_a_short_film_starts_at_its_beginning_and_repeats_the_last_frame(self, count, expected):
        for seed in range(5):
            clip = frames.draw_dense(count, generator(seed), frames=3, stride=3)
            assert clip.tolist() == [expected]


class TestSpacedDense:
    def test_clips_go_from_the_first_frame_to_the_last(self):
        # Every eighth of 100 are 13, so that a clip of four may start at the 0th to the 9th.
        clips = frames.spaced_dense(100, frames=4, stride=8, clips=5)
        assert clips[:, 0].tolist() == [0, 16, 32, 48, 72]
        np.testing.assert_array_equal(np.diff(clips, axis=1), 8)
        assert clips.max() == 96

    def test_one_clip_is_the_central_one(self):
        assert frames.spaced_dense(100, frames=4, stride=8, clips=1).tolist() == [[32, 40, 48, 56]]

    def test_of_a_short_film_all_clips_are_the_same(self):
        clips = frames.spaced_dense(9, frames=4, stride=4, clips=2)
        assert clips.tolist() == [[0, 4, 8, 8], [0, 4, 8, 8]]


class TestDrawUniform:
    def test_each_frame_is_anywhere_in_its_segment(self):
        # 14 // 4 frames a segment: the last two of the film are left out, as the authors do.
        rng = generator()
        clips = np.concatenate([frames.draw_uniform(14, rng, frames=4) for _ in range(200)])
        for segment in range(4):
            assert set(clips[:, segment].tolist()) == {3 * segment + i for i in range(3)}
        assert len(np.unique(clips - 3 * np.arange(4), axis=0)) > 60  # of 81: each by itself

    def test_with_as_many_frames_as_segments_there_is_nothing_to_draw(self):
        assert frames.draw_uniform(4, generator(), frames=4).tolist() == [[0, 1, 2, 3]]

    def test_of_a_short_film_all_frames_are_shown(self):
        assert frames.draw_uniform(3, generator(), frames=4).tolist() == [[0, 1, 1, 2]]
        assert frames.draw_uniform(1, generator(), frames=4).tolist() == [[0, 0, 0, 0]]


class TestSpacedUniform:
    def test_one_clip_has_the_middles_of_the_segments(self):
        assert frames.spaced_uniform(10, frames=4, clips=1).tolist() == [[1, 3, 6, 8]]

    def test_two_clips_are_those_of_the_authors(self):
        # Beginnings and middles of segments of 2.5 frames.
        clips = frames.spaced_uniform(10, frames=4, clips=2)
        assert clips.tolist() == [[0, 2, 5, 7], [1, 3, 6, 8]]


@pytest.mark.parametrize("count", [1, 2, 15, 16, 17, 63, 64, 65, 300])
def test_numbers_lie_within_the_film_and_never_go_back(count):
    rng = generator(count)
    for clips in (
        frames.draw_dense(count, rng, frames=16, stride=4),
        frames.draw_uniform(count, rng, frames=16),
        frames.spaced_dense(count, frames=16, stride=4, clips=5),
        frames.spaced_uniform(count, frames=16, clips=3),
    ):
        assert clips.shape[1] == 16
        assert np.issubdtype(clips.dtype, np.integer)
        assert clips.min() >= 0
        assert clips.max() < count
        assert (np.diff(clips, axis=1) >= 0).all()
