from __future__ import annotations

import math
import os

import numpy as np
import pytest

from nnunet_flare.flare.curves import draw_learning_curves
from nnunet_flare.flare.history import RoundRecord, RunHistory, SiteRound


def run(num_rounds: int, num_sites: int) -> RunHistory:
    def site_round(number: int, site: int) -> SiteRound:
        return SiteRound(
            dice={"heart": 1 - 1 / (number + site)},
            train_loss=math.nan if site == 0 else 1 / number,
            num_cases=8,
            upload_bytes=1,
            download_bytes=1,
            seconds=1.0,
            role="train" if site else "evaluate",
        )

    rounds = tuple(
        RoundRecord(
            round=number,
            sites={f"site-{i}": site_round(number, i) for i in range(num_sites) if (number + i) % 7},
            seconds=1.0,
        )
        for number in range(1, num_rounds + 1)
    )
    return RunHistory(run_name="heart", run_id="a1", num_rounds=1000, started=0.0, rounds=rounds)


@pytest.mark.parametrize(("num_rounds", "num_sites"), [(0, 0), (1, 1), (1, 3), (10, 3), (30, 25), (1000, 2)])
def test_a_picture_of_one_size_is_drawn_for_any_number_of_rounds_and_sites(tmp_path, num_rounds, num_sites):
    from matplotlib.image import imread

    draw_learning_curves(run(num_rounds, num_sites), tmp_path / "curves.png")
    image = imread(tmp_path / "curves.png")
    assert image.shape == (1000, 1400, 4)
    assert np.any(image < 0.5)
    assert os.listdir(tmp_path) == ["curves.png"]
