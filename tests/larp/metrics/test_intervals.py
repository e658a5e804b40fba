"""larp.metrics.intervals: shares, and means over clips that share a source."""

from larp.data.listing import VideoItem
from larp.metrics.intervals import clustered_mean, clustered_share, sources, sources_of, wilson

import numpy as np
import pytest
import torch


def test_an_interval_of_a_share():
    # The textbook's example, and the ends that the normal approximation gets wrong.
    np.testing.assert_allclose(wilson(5, 10), [0.2366, 0.7634], atol=1e-4)
    assert wilson(0, 10)[0] == 0 and wilson(10, 10)[1] == 1 and wilson(10, 10)[0] == pytest.approx(0.7225, abs=1e-4)


def test_clips_of_one_video_count_as_one_in_the_interval():
    values = torch.tensor([1.0, 2.0, 4.0, 5.0])
    apart = clustered_mean(values, torch.arange(4))
    reach = 1.96 * values.std().item() / 2
    assert apart["mean"] == 3 and apart["interval_95"] == pytest.approx([3 - reach, 3 + reach])
    # Each clip four times over says nothing more.
    again = clustered_mean(values.repeat(4), torch.tensor([7, 9, 8, 3]).repeat(4))
    assert again["interval_95"] == pytest.approx(apart["interval_95"])
    assert clustered_mean(values, torch.zeros(4, dtype=torch.int64)) == {"mean": 3.0, "interval_95": None}


def test_a_share_over_sources():
    hits = torch.tensor([True, True, True, False, False])
    assert clustered_share(hits, torch.arange(5)) == pytest.approx(wilson(3, 5))
    # Each clip four times over says nothing more; nor do clips that are all right, beyond their sources.
    assert clustered_share(hits.repeat(4), torch.arange(5).repeat(4)) == pytest.approx(wilson(3, 5), abs=0.04)
    assert clustered_share(torch.ones(20, dtype=torch.bool), torch.arange(5).repeat(4)) == wilson(5, 5)
    assert clustered_share(hits, torch.zeros(5, dtype=torch.int64)) == wilson(0.6, 1)


def test_clips_of_one_ucf101_group_have_one_source():
    names = ["Archery/v_Archery_g01_c01", "Archery/v_Archery_g01_c02", "Archery/v_Archery_g02_c01", "mine", "other"]
    assert sources(names).tolist() == [0, 0, 1, 2, 3]
    items = [VideoItem(None, name, group=group) for name, group in zip("abc", ("x", None, "x"), strict=True)]
    assert sources_of(items).tolist() == [0, 1, 0]
