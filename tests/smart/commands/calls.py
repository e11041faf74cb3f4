"""What tests of commands share besides fixtures."""

from __future__ import annotations

QUICK = ["--batch-size", "16", "--attack-steps", "1", "--val-attack-steps", "1", "--crop-padding", "0", "--no-flip"]
QUICK += ["--no-progress", "--device", "cpu"]


def assert_refused(outcome: tuple[int, str, str], code: int, *words: str) -> None:
    """One line on stderr, that names what was given."""
    actual, _, err = outcome
    assert (actual, err.count("\n")) == (code, 1), err
    assert err.startswith("smart: error: ") and len(err) < 500, err
    for word in words:
        assert word in err
