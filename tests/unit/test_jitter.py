"""RTP packets of a voice call, and what their receipt says about loss and jitter."""

from __future__ import annotations

import pytest

from apagent.lab.jitter import Reception
from apagent.lab.traffic import rtp

MS = 1_000_000
INTERVAL_MS = 1000 // rtp.PACKETS_PER_S


def reception(delays_ms: dict[int, float]) -> Reception:
    """Packets by number, each received so long after it was sent, in the order of receipt."""
    received = {number: number * INTERVAL_MS + delay for number, delay in delays_ms.items()}
    order = sorted(received, key=lambda number: received[number])
    return Reception(
        [int(received[number] * MS) for number in order],
        order,
        [number * rtp.SAMPLES for number in order],
    )


def test_a_packet_is_read_as_it_was_written() -> None:
    data = rtp.packet(70_000, 5)
    assert len(data) == 12 + 160
    assert rtp.read_packet(data) == (70_000 - 65_536, 70_000 * rtp.SAMPLES, 5)


@pytest.mark.parametrize("data", [b"", rtp.packet(1, 1)[:-1], b"\0" + rtp.packet(1, 1)[1:]])
def test_what_is_not_a_packet_of_a_call_is_not_read(data: bytes) -> None:
    assert rtp.read_packet(data) is None


@pytest.mark.parametrize("number", [0, 65_535, 65_536, 65_537, 200_000])
@pytest.mark.parametrize("distance", [-3, 0, 1, 50])
def test_numbers_go_on_behind_sixteen_bits(number: int, distance: int) -> None:
    latest = max(0, number - distance)
    assert rtp.extended(number % 65_536, latest) == number


def test_even_delays_are_no_jitter() -> None:
    even = reception(dict.fromkeys(range(50), 7.0))
    assert even.jitter_ms() == pytest.approx([0.0] * 50)
    assert (even.expected, even.lost, even.doubled) == (50, 0, 0)
    assert even.longest_silence_ms() == pytest.approx(INTERVAL_MS)


def test_a_late_packet_counts_a_sixteenth_twice() -> None:
    jitters = reception({0: 1.0, 1: 1.0, 2: 17.0, 3: 1.0}).jitter_ms()
    assert jitters == pytest.approx([0.0, 0.0, 1.0, 1.0 + (16.0 - 1.0) / 16])


def test_lost_and_doubled_packets_are_counted() -> None:
    whole = reception(dict.fromkeys((0, 1, 2, 5, 6), 1.0))
    twice = Reception(
        [*whole.received_ns, whole.received_ns[-1]],
        [*whole.sequences, 6],
        [*whole.timestamps, whole.timestamps[-1]],
    )
    assert (whole.expected, whole.lost, whole.doubled) == (7, 2, 0)
    assert (twice.expected, twice.lost, twice.doubled) == (7, 2, 1)
    assert whole.longest_silence_ms() == pytest.approx(3 * INTERVAL_MS)


def test_jitter_around_a_roam_rises_and_calms_down() -> None:
    late = 30
    call = reception({number: 41.0 if number == late else 1.0 for number in range(200)})
    (around,) = call.jitter_around([late * INTERVAL_MS * MS])
    assert around.before == 0.0
    assert around.during == max(call.jitter_ms()) > 2.0
    assert around.after < 0.01


def test_a_call_that_nobody_heard_is_empty() -> None:
    silent = Reception.of([{"event": "result"}])
    assert (silent.expected, silent.lost, silent.jitter_ms()) == (0, 0, [])
    assert silent.jitter_around([]) == []
