"""What is drawn for a clip holds for all its frames; boxes are where they should be."""

import collections

import numpy as np
import pytest
from PIL import Image

from mae_jax.data.augment import RandAugment
from mae_jax.data.clip_transforms import BILINEAR, EachFrame, MultiScaleCrop, SpacedCrops
from mae_jax.data.transforms import (
    CenterCrop,
    Compose,
    HorizontalFlip,
    RandomResizedCrop,
    resize,
)


def generator(seed=0):
    return np.random.default_rng(seed)


def still(frames=4, height=40, width=50, channels=3):
    """Return a clip whose frames are all the same noise."""
    image = generator().integers(0, 256, (height, width, channels), dtype=np.uint8)
    return np.broadcast_to(image, (frames, *image.shape))


class TestMultiScaleCrop:
    def boxes(self, size, height, width, count=4000):
        crop, rng = MultiScaleCrop(size), generator()
        return collections.Counter(crop.box(height, width, rng) for _ in range(count))

    def test_ten_shapes_at_thirteen_places_are_equally_likely(self):
        boxes = self.boxes((50, 50), 100, 108)
        sides = [100, 87, 75, 66]
        shapes = {
            (a, b) for i, a in enumerate(sides) for j, b in enumerate(sides) if abs(i - j) < 2
        }
        count = collections.Counter()
        for (_, _, height, width), times in boxes.items():
            count[height, width] += times
        assert set(count) == shapes
        assert len(shapes) == 10
        assert all(abs(times - 400) < 100 for times in count.values())
        # 25 and 33 are free about the box of 75 x 75: steps of 6 and 8.
        places = {(top, left): n for (top, left, h, w), n in boxes.items() if h == w == 75}
        quarters = {(0, 0), (0, 4), (4, 0), (4, 4), (2, 2), (2, 0), (2, 4), (4, 2), (0, 2)}
        quarters |= {(1, 1), (1, 3), (3, 1), (3, 3)}
        assert set(places) == {(6 * down, 8 * right) for down, right in quarters}
        assert min(places.values()) > 10  # of 400 / 13

    def test_a_side_near_the_wanted_one_becomes_it(self):
        sides = {
            side for _, _, h, w in self.boxes((89, 73), 100, 100) for side in (("h", h), ("w", w))
        }
        assert sides == {
            *(("h", side) for side in (100, 89, 75, 66)),
            *(("w", side) for side in (100, 87, 73, 66)),
        }

    @pytest.mark.parametrize("shape", [(240, 320), (320, 240), (223, 400), (3, 5), (1, 1)])
    def test_boxes_lie_within_the_image(self, shape):
        for top, left, height, width in self.boxes((224, 224), *shape, count=500):
            assert top >= 0
            assert left >= 0
            assert 0 < height <= shape[0] - top
            assert 0 < width <= shape[1] - left

    def test_what_is_cut_is_resized_bilinearly(self):
        image = still()[0]
        crop = MultiScaleCrop((16, 24))
        top, left, height, width = crop.box(40, 50, generator(3))
        box = Image.fromarray(image[top : top + height, left : left + width])
        expected = np.asarray(box.resize((24, 16), Image.Resampling.BILINEAR))
        np.testing.assert_array_equal(crop(image, generator(3)), expected)


class TestEachFrame:
    @pytest.mark.parametrize(
        "transform",
        [
            MultiScaleCrop((16, 16)),
            RandomResizedCrop((16, 16), (0.08, 1.0), resample=BILINEAR),
            HorizontalFlip(),
            RandAugment(7, 0.5, 4),
            Compose((RandAugment(), RandomResizedCrop((16, 16)), HorizontalFlip())),
        ],
        ids=repr,
    )
    def test_draws_are_the_same_for_all_frames_and_others_for_each_view(self, transform):
        each, rng = EachFrame(transform, views=8), generator()
        views = each(still(), rng)
        assert views.shape[:2] == (8, 4)
        assert views.dtype == np.uint8
        np.testing.assert_array_equal(views, views[:, :1].repeat(4, axis=1))
        assert len(np.unique(views[:, 0], axis=0)) > 1
        assert (each(still(), rng) != views).any()  # the next clip has others
        np.testing.assert_array_equal(each(still(), generator()), views)

    def test_frames_keep_their_order(self):
        clip = np.arange(6, dtype=np.uint8)[:, None, None, None].repeat(8, 1).repeat(8, 2)
        views = EachFrame(MultiScaleCrop((4, 4)), views=2)(clip, generator())
        assert views.shape == (2, 6, 4, 4, 1)
        assert (views == np.arange(6)[None, :, None, None, None]).all()


def test_interpolation_of_a_random_crop_can_be_chosen():
    image = still()[0]
    bilinear = RandomResizedCrop((16, 16), resample=BILINEAR)
    top, left, height, width = bilinear.box(40, 50, generator(1))
    expected = resize(image[top : top + height, left : left + width], (16, 16), BILINEAR)
    np.testing.assert_array_equal(bilinear(image, generator(1)), expected)
    assert (bilinear(image, generator(1)) != RandomResizedCrop((16, 16))(image, generator(1))).any()


class TestSpacedCrops:
    def test_three_go_from_end_to_end_of_the_longer_side(self):
        # 20 x 80 becomes 10 x 40, of which 30 columns are free.
        ramp = np.arange(0, 240, 3, dtype=np.uint8)
        clip = np.broadcast_to(ramp[None, None, :, None], (2, 20, 80, 1))
        views = SpacedCrops((10, 10), 3)(clip)
        assert views.shape == (3, 2, 10, 10, 1)
        np.testing.assert_allclose(views[:, 0, 5, 5, 0], [3 * 11, 3 * 41, 3 * 71], atol=2)
        upright = SpacedCrops((10, 10), 3)(clip.swapaxes(1, 2))
        np.testing.assert_array_equal(upright, views.swapaxes(2, 3))

    @pytest.mark.parametrize("size", [(16, 16), (12, 20), (40, 50)])
    def test_one_is_the_centre(self, size):
        clip = still(2)
        expected = [CenterCrop(size, 1.0, BILINEAR)(frame) for frame in clip]
        np.testing.assert_array_equal(SpacedCrops(size)(clip), [expected])

    def test_of_a_square_all_are_the_whole(self):
        views = SpacedCrops((40, 40), 3)(still(2, 40, 40))
        np.testing.assert_array_equal(views, np.broadcast_to(still(2, 40, 40), views.shape))
