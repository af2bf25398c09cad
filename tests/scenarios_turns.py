"""More scenarios, as data: bounded turns, and the safety timer beside the wake-up for an ACK.

The notation is that of `scenarios`. No code that plays them may live here.
"""

from __future__ import annotations

from rehearsal import drain, flush
from scenarios import CONFIRMING, DRAINING, FLUSHING, MIB, Ending, Scenario

SECOND = 10**9
MINUTE = 60 * SECOND

FLUSHED = FLUSHING + f"INPUT {MIB} -> DISCARD; INPUT {MIB} -> COUNT state=FLUSHING\n"
"""A turn used up by input, after which there is still the look for the ACK."""

TURNS = (
    Scenario(
        "a_flooding_peer_takes_turns",
        drain(),
        DRAINING
        + f"""
        INPUT {MIB} @1 -> DISCARD
        INPUT {MIB} -> YIELD state=DRAINING
        WOKEN @2 -> DISCARD
        INPUT {MIB} -> DISCARD
        INPUT {MIB} @999 -> YIELD
        WOKEN @999 -> DISCARD
        INPUT {MIB} -> DISCARD
        INPUT {MIB} @1000 -> COUNT state=LEAVING
        COUNTED 0 -> CLOSE
        """,
        Ending("TIMED_OUT", "delivered", drained=6 * MIB),
    ),
    Scenario(
        "a_peer_that_sends_single_bytes_takes_turns",
        drain(),
        DRAINING + "63 x INPUT 1 -> DISCARD; INPUT 1 -> YIELD; WOKEN -> DISCARD; FIN -> COUNT; COUNTED 0 -> CLOSE",
        Ending("PEER_CLOSED", "delivered", drained=64),
    ),
    Scenario(
        "a_flood_while_sending_takes_turns",
        drain(unsent=5),
        f"""
        BEGUN -> SEND
        NO_ROOM -> DISCARD
        INPUT {MIB} -> DISCARD
        INPUT {MIB} -> YIELD
        WOKEN @3 -> SEND
        SENT 5 -> HALF_CLOSE
        HALF_CLOSED -> DISCARD
        FIN -> COUNT
        COUNTED 0 -> CLOSE
        """,
        Ending("PEER_CLOSED", "delivered", drained=2 * MIB),
    ),
    Scenario(
        "a_turn_that_is_used_up_to_the_last_byte",  # each call costs 32 KiB besides
        drain(),
        DRAINING
        + f"""
        INPUT {MIB} -> DISCARD
        INPUT {MIB - 64 * 1024} -> YIELD budget=0
        WOKEN -> DISCARD
        RESET 104 -> COUNT
        COUNTED 0 -> CLOSE
        """,
        Ending("PEER_RESET", "delivered", drained=2 * MIB - 64 * 1024, error=104),
    ),
    Scenario(
        "exactly_max_bytes_at_the_end_of_a_turn",
        drain(max_bytes=2 * MIB),
        DRAINING
        + f"""
        INPUT {MIB} -> DISCARD
        INPUT {MIB} -> YIELD want=0
        WOKEN -> DISCARD
        FIN -> COUNT
        COUNTED 0 -> CLOSE
        """,
        Ending("PEER_CLOSED", "delivered", drained=2 * MIB),
    ),
    Scenario(
        "a_flooded_flush_sees_its_ack",
        flush(),
        FLUSHED + "COUNTED 0 -> CLOSE",
        Ending("ACKED", "delivered", drained=2 * MIB),
    ),
    Scenario(
        "a_flooded_flush_takes_turns_until_its_ack",
        flush(),
        FLUSHED
        + f"""
        COUNTED 9 @5 -> YIELD state=FLUSHING unacked=8
        WOKEN @6 -> DISCARD
        63 x INPUT 1 -> DISCARD
        INPUT 1 -> COUNT
        COUNTED 1 -> YIELD unacked=0
        WOKEN @7 -> DISCARD
        INPUT {MIB} -> DISCARD
        INPUT {MIB} -> COUNT
        COUNTED 0 -> CLOSE
        """,
        Ending("ACKED", "delivered", drained=4 * MIB + 64),
    ),
    Scenario(
        "a_flood_that_stops_is_waited_for_again",
        flush(),
        FLUSHED
        + """
        COUNTED 9 @5 -> YIELD patience=RARELY
        WOKEN @6 -> DISCARD
        EMPTY -> COUNT
        COUNTED 9 -> WAIT wants=FOR_INPUT|FOR_ACK wake_at=1000
        WOKEN @7 -> DISCARD
        FIN -> COUNT
        COUNTED 0 -> CLOSE
        """,
        Ending("ACKED", "delivered", drained=2 * MIB),
    ),
    Scenario(
        "a_flooded_flush_at_its_deadline",
        flush(),
        FLUSHED + "COUNTED 9 @1000 -> COUNT state=LEAVING; COUNTED 9 -> CLOSE",
        Ending("TIMED_OUT", "unknown", drained=2 * MIB, unacked=8),
    ),
    Scenario(
        "a_flooded_flush_is_shed",
        flush(),
        FLUSHED + "COUNTED 9 @999 -> YIELD; SHEDDING -> COUNT; COUNTED 9 -> CLOSE",
        Ending("SHED", "unknown", drained=2 * MIB, unacked=8),
    ),
    Scenario(
        "a_flooded_flush_where_nobody_can_count",
        flush(),
        FLUSHED + "COUNTED -1 @999 -> YIELD; WOKEN @1000 -> DISCARD; FIN -> COUNT; COUNTED -1 -> CLOSE",
        Ending("PEER_CLOSED", "unknown", drained=2 * MIB, unacked=-1),
    ),
)


def _growing(waits: tuple[int, ...], missing: int = 9) -> str:
    # One safety timer after the other, each running to its end without anything having changed.
    lines, now = [], 0
    for wait in waits:
        lines.append(f"COUNTED {missing} -> WAIT wants=FOR_INPUT|FOR_ACK wake_at={now + wait}")
        now += wait
        lines.append(f"WOKEN @{now} -> DISCARD; EMPTY -> COUNT")
    return FLUSHING + "EMPTY -> COUNT;" + ";".join(lines) + ";COUNTED 0 -> CLOSE"


TIMERS = (
    Scenario(
        "a_kernel_that_wakes_is_doubted_ever_more_rarely",
        flush(timeout=MINUTE),
        _growing(tuple(SECOND * n // 2 for n in (1, 2, 4, 8, 16, 16, 16))),
        Ending("ACKED", "delivered"),
    ),
    Scenario(
        "a_kernel_that_does_not_wake_is_asked_often",
        flush(timeout=MINUTE, polled=1),
        _growing(tuple(SECOND * n // 1000 for n in (1, 2, 4, 8, 16, 32, 50, 50, 50))),
        Ending("ACKED", "delivered"),
    ),
    Scenario(
        "the_safety_timer_never_passes_the_deadline",
        flush(timeout=SECOND),
        FLUSHING
        + f"""
        EMPTY -> COUNT
        COUNTED 9 -> WAIT wake_at={SECOND // 2}
        WOKEN @{SECOND // 2} -> DISCARD
        EMPTY -> COUNT
        COUNTED 9 -> WAIT wake_at={SECOND}
        WOKEN @{SECOND} -> DISCARD
        EMPTY -> COUNT
        COUNTED 9 -> COUNT
        COUNTED 9 -> CLOSE
        """,
        Ending("TIMED_OUT", "unknown", unacked=8),
    ),
    Scenario(
        "the_safety_timer_never_passes_the_idle_time",
        drain(timeout=MINUTE, idle=SECOND // 4),
        CONFIRMING
        + f"""
        COUNTED 9 -> PROBE
        NO_ERROR @5 -> WAIT wake_at={SECOND // 4}
        WOKEN @6 -> COUNT
        COUNTED 0 -> CLOSE
        """,
        Ending("PEER_CLOSED", "delivered"),
    ),
    Scenario(
        "waiting_for_input_needs_no_safety_timer",
        drain(timeout=MINUTE, polled=1),
        DRAINING
        + f"""
        3 x EMPTY -> WAIT wants=FOR_INPUT wake_at={MINUTE} patience=OFTEN
        WOKEN @{SECOND} -> DISCARD
        FIN -> COUNT
        COUNTED 0 -> CLOSE
        """,
        Ending("PEER_CLOSED", "delivered"),
    ),
)
