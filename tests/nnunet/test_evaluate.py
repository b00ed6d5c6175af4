from __future__ import annotations

from nnunetv2.utilities.label_handling.label_handling import LabelManager

from nnunet_flare.nnunet.evaluate import foreground_labels


def test_labels_come_in_the_order_of_nnunets_outputs_whatever_the_order_of_the_file():
    labels = {"background": 0, "LV": 3, "RV": 1, "MYO": 2, "ignore": 4}
    named = foreground_labels({"labels": labels})
    assert list(named.values()) == LabelManager(labels, None).foreground_labels
    assert list(named) == ["RV", "MYO", "LV"]


def test_regions_keep_the_order_of_the_file_as_nnunet_does():
    labels = {"background": 0, "whole": [1, 2], "core": 2}
    named = foreground_labels({"labels": labels})
    manager = LabelManager(labels, regions_class_order=[1, 2])
    assert [value if isinstance(value, tuple) else (value,) for value in named.values()] == [
        region if isinstance(region, tuple) else (region,) for region in manager.foreground_regions
    ]
