"""qafe/data/clips.py against the published frame rules."""

import numpy as np

from qafe.data import clips
from tests import reference


def test_published_frames() -> None:
    golden = reference.table("golden_loader")["frames"]
    assert len(golden) == 10
    for name, numbers in golden.items():
        frames = int(name.rsplit("_", 1)[1])
        np.testing.assert_array_equal(clips.test_indices(frames, 80) + 1, numbers, err_msg=name)
        if name.startswith("short"):
            indices = clips.train_indices(frames, 80, np.random.default_rng(0))
            np.testing.assert_array_equal(indices + 1, numbers, err_msg=name)


def test_every_start_is_drawn_the_last_one_included() -> None:
    rng = np.random.default_rng(0)
    starts = set()
    for _ in range(300):
        indices = clips.train_indices(10, 6, rng)
        assert (np.diff(indices) == 1).all()
        assert len(indices) == 6
        starts.add(int(indices[0]))
    assert starts == {0, 1, 2, 3, 4}


def test_short_clips() -> None:
    np.testing.assert_array_equal(clips.test_indices(3, 7), [0, 1, 2, 0, 1, 2, 0])
    np.testing.assert_array_equal(clips.test_indices(5, 1), [0])
    np.testing.assert_array_equal(clips.test_indices(1, 2), [0, 0])
