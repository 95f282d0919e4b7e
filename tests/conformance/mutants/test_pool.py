"""Jobs that hang or take their process down cost no other job its answer."""

from __future__ import annotations

from typing import Any

from glm5_hal.conformance.mutants import pool


def answers(*kinds: str, deadline: float = 20.0, workers: int = 2) -> list[Any]:
    jobs = [{"do": kind, "n": n} for n, kind in enumerate(kinds)]
    found = {job["n"]: answer for job, answer in pool.run(jobs, workers, deadline, serve="jobs")}
    return [found[n] for n in range(len(kinds))]


def test_every_job_has_its_answer() -> None:
    assert answers("work", "work", "work") == [{"of": 0}, {"of": 1}, {"of": 2}]


def test_a_dead_worker_is_a_crash_with_its_last_words_and_the_others_go_on() -> None:
    first, crash, last = answers("work", "die", "work", workers=1)
    assert (first, last) == ({"of": 0}, {"of": 2})
    assert crash == {"lost": "crash", "detail": "its process ended with 7 no such device"}


def test_a_silent_worker_is_a_hang_and_the_others_go_on() -> None:
    hang, last = answers("loop", "work", deadline=1.0, workers=1)
    assert hang == {"lost": "hang", "detail": "silent for 1 s"}
    assert last == {"of": 1}


def test_a_long_job_that_beats_does_not_hang() -> None:
    assert answers("beat", deadline=2.0) == [{"of": 0}]
