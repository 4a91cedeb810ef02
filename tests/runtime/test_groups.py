"""Making communicators: what it returns, what it raises, and that it waits for one timeout."""

from __future__ import annotations

import time
from datetime import timedelta
from threading import Event

import pytest

from runtime.groups import MeetingError, meet


def test_meeting_returns_and_raises_what_joining_does() -> None:
    def fails() -> None:
        raise RuntimeError("Connection refused")

    assert meet(lambda: 7, range(2), timedelta(seconds=9)) == 7
    with pytest.raises(RuntimeError, match="Connection refused"):
        meet(fails, range(2), timedelta(seconds=9))


@pytest.mark.parametrize(("ranks", "words"), [(range(2, 5), "ranks 2, 3, 4 did"), (range(99), "ranks 0 to 98 did")])
def test_who_does_not_come_is_waited_for_once(ranks: range, words: str) -> None:
    done, began = Event(), time.monotonic()
    with pytest.raises(MeetingError, match=f"{words} not find each other within 0.2 s") as error:
        meet(done.wait, ranks, timedelta(seconds=0.2))
    assert 0.2 <= time.monotonic() - began < 60 and error.value.late and "timeout_s" in error.value.hint
    done.set()
