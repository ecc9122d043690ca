"""The three sides of a split and what people call them."""

from __future__ import annotations

TRAIN, VALIDATION, TEST = 0, 1, 2

SIDE_NAMES = {
    **dict.fromkeys(("train", "training", "trn", "fit"), TRAIN),
    **dict.fromkeys(("validation", "valid", "val", "dev", "development", "eval", "evaluation"), VALIDATION),
    **dict.fromkeys(("test", "testing", "tst", "holdout", "held-out"), TEST),
}
