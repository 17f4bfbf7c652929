"""The host's wait for a step: asleep first, then polling, and never past the step's end."""

from __future__ import annotations

import time

from ds_offload.step_wait import StepWait


class TimedEvent:
    """Done so many seconds after it is recorded."""

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds
        self.polls = self.sleeps = 0
        self._end = 0.0

    def record(self) -> None:
        self._end = time.perf_counter() + self.seconds

    def query(self) -> bool:
        self.polls += 1
        return time.perf_counter() >= self._end

    def synchronize(self) -> None:
        self.sleeps += 1
        time.sleep(max(0.0, self._end - time.perf_counter()))

    @property
    def over(self) -> bool:
        return time.perf_counter() >= self._end


def test_a_step_is_waited_for_to_its_end() -> None:
    event = TimedEvent(0.02)
    wait = StepWait(event)
    for seconds in (0.02, 0.02, 0.08, 0.005, 0.005):
        event.seconds = seconds
        wait.wait(time.perf_counter())
        assert event.over
    # The first has nothing to go by.
    assert event.sleeps == 1 and event.polls >= 4


def test_most_of_a_step_is_slept_through() -> None:
    event = TimedEvent(0.2)
    wait = StepWait(event)
    wait.wait(time.perf_counter())
    cpu, began = time.thread_time(), time.perf_counter()
    wait.wait(began)
    assert time.perf_counter() - began >= 0.2
    assert time.thread_time() - cpu < 0.1


def test_a_step_unlike_the_others_tells_nothing_of_their_length() -> None:
    event = TimedEvent(0.3)
    wait = StepWait(event)
    wait.wait(None)
    event.seconds = 0.001
    began = time.perf_counter()
    wait.wait(began)
    assert event.over and event.sleeps == 2 and time.perf_counter() - began < 0.2
