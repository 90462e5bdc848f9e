"""The lines of a run whose stderr is no terminal."""

from __future__ import annotations

import time

import pytest

from distill.data import status as module
from distill.data.episodes import Rejected
from distill.data.status import Status


def test_progress_is_told_in_phases_that_count_and_of_the_phase_at_hand(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(module, "_LINE_EVERY", 0.1)
    with Status(12) as status:
        status.phase("opening the teacher")
        time.sleep(0.5)
        assert "of 12" not in capsys.readouterr().err
        status.phase("asking", 12)
        status.ended(Rejected("length", "", ()), fresh=True)
        time.sleep(0.5)
        assert "  0 of 12, 1 rejected, " in capsys.readouterr().err
        status.phase("reading the logits", 10)
        time.sleep(0.5)
        said = capsys.readouterr().err
    assert "  0 of 10, 0.0/s, " in said and "rejected" not in said
