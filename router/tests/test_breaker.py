"""When to restart ranks, and when to stop making clients wait."""

from bros_router.breaker import Breaker


def test_first_restart_is_at_once_and_later_ones_back_off():
    breaker = Breaker()
    delays = []
    for failure in range(8):
        breaker.note_failure(now_s=100.0 + failure)
        delays.append(breaker.delay_s)
    assert delays == [0.0, 1.0, 2.0, 4.0, 8.0, 16.0, 30.0, 30.0]


def test_third_failure_without_a_healthy_minute_opens_it():
    breaker = Breaker()
    for start_s in (100.0, 120.0):
        breaker.note_failure(start_s)
        assert not breaker.is_open
        breaker.note_recovery(start_s + 1.0)
    breaker.note_failure(140.0)
    assert breaker.is_open


def test_a_healthy_minute_forgives():
    breaker = Breaker()
    for start_s in (100.0, 120.0):
        breaker.note_failure(start_s)
        breaker.note_recovery(start_s + 1.0)
    breaker.note_failure(181.0)
    assert not breaker.is_open
    assert breaker.delay_s == 0.0


def test_failing_to_start_is_not_a_healthy_minute():
    breaker = Breaker()
    for failure in range(3):
        breaker.note_failure(100.0 + 90.0 * failure)  # starts that took long, and failed
    assert breaker.is_open
