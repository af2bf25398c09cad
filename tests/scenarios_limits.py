"""More scenarios, as data: limits exactly at their boundaries, and the sharp tools at a limit.

The notation is that of `scenarios`. No code that plays them may live here.
"""

from __future__ import annotations

from rehearsal import drain, flush
from scenarios import CONFIRMING, DRAINING, FLUSHING, FLUSHING_ON, MIB, Ending, Scenario

TIMES = (
    Scenario(
        "the_deadline_is_now",
        drain(),
        DRAINING
        + """
        EMPTY @999 -> WAIT wake_at=1000
        WOKEN @1000 -> DISCARD
        EMPTY @1000 -> COUNT state=LEAVING
        COUNTED 6 -> CLOSE
        """,
        Ending("TIMED_OUT", "unknown", unacked=5),
    ),
    Scenario(
        "what_never_was_sent_is_left_to_the_kernel_at_the_deadline",
        drain(),
        DRAINING + "EMPTY @1000 -> COUNT; COUNTED 12 never_sent=5 -> CLOSE lost=0",
        Ending("TIMED_OUT", "unknown", unacked=11),
    ),
    Scenario(
        "a_late_start_of_the_clock",
        drain(now=500),
        DRAINING
        + """
        EMPTY @1499 -> WAIT started=500 wake_at=1500
        WOKEN @1500 -> DISCARD
        EMPTY -> COUNT
        COUNTED 0 -> CLOSE
        """,
        Ending("TIMED_OUT", "delivered"),
    ),
    Scenario(
        "a_fin_at_the_deadline_is_still_heard",
        drain(),
        DRAINING
        + """
        EMPTY @999 -> WAIT
        WOKEN @1000 -> DISCARD
        INPUT 5 -> DISCARD
        FIN @1001 -> COUNT
        COUNTED 0 -> CLOSE
        """,
        Ending("PEER_CLOSED", "delivered", drained=5),
    ),
    Scenario(
        "the_deadline_comes_while_the_ack_is_missing",
        drain(),
        CONFIRMING + "COUNTED 50 -> PROBE; NO_ERROR @1000 -> COUNT state=LEAVING; COUNTED 50 -> CLOSE",
        Ending("TIMED_OUT", "unknown", unacked=49),
    ),
    Scenario(
        "a_flush_is_acked_at_the_last_moment",
        flush(),
        FLUSHING + "EMPTY @1000 -> COUNT; COUNTED 5 -> COUNT state=LEAVING; COUNTED 0 -> CLOSE",
        Ending("ACKED", "delivered"),
    ),
    Scenario(
        "the_data_is_acked_and_our_fin_is_not",
        flush(),
        FLUSHING_ON + "COUNTED 1 -> PROBE; NO_ERROR @1000 -> COUNT; COUNTED 1 -> CLOSE",
        Ending("TIMED_OUT", "delivered"),
    ),
    Scenario(
        "idle_is_now",
        drain(idle=100),
        DRAINING
        + """
        EMPTY @99 -> WAIT wake_at=100
        WOKEN @100 -> DISCARD
        EMPTY @100 -> COUNT
        COUNTED 1 -> CLOSE
        """,
        Ending("IDLE", "delivered"),
    ),
    Scenario(
        "the_idle_time_starts_with_the_close",
        drain(idle=100, now=500),
        DRAINING + "EMPTY @599 -> WAIT wake_at=600; WOKEN @600 -> DISCARD; EMPTY -> COUNT; COUNTED 0 -> CLOSE",
        Ending("IDLE", "delivered"),
    ),
    Scenario(
        "input_starts_the_idle_time_again",
        drain(idle=100),
        DRAINING
        + """
        INPUT 1 @99 -> DISCARD
        EMPTY @198 -> WAIT wake_at=199
        WOKEN @199 -> DISCARD
        EMPTY -> COUNT
        COUNTED 0 -> CLOSE
        """,
        Ending("IDLE", "delivered", drained=1),
    ),
    Scenario(
        "sent_bytes_start_the_idle_time_again",
        drain(idle=100, unsent=9),
        """
        BEGUN -> SEND
        SENT 4 @99 -> DISCARD
        EMPTY @198 -> WAIT wake_at=199
        WOKEN @199 -> SEND
        NO_ROOM -> DISCARD
        EMPTY -> COUNT
        COUNTED 4 -> CLOSE
        """,
        Ending("IDLE", "lost", unacked=9),
    ),
    Scenario(
        "a_dripping_peer_is_never_idle_and_still_times_out",
        drain(idle=100),
        DRAINING
        + """
        INPUT 1 @90 -> DISCARD
        INPUT 1 @950 -> DISCARD
        EMPTY @950 -> WAIT wake_at=1000
        WOKEN @999 -> DISCARD
        INPUT 1 @1000 -> DISCARD
        EMPTY -> COUNT
        COUNTED 0 -> CLOSE
        """,
        Ending("TIMED_OUT", "delivered", drained=3),
    ),
    Scenario(
        "idle_and_the_deadline_at_once_is_the_deadline",
        drain(idle=1000),
        DRAINING + "EMPTY @1000 -> COUNT; COUNTED 0 -> CLOSE",
        Ending("TIMED_OUT", "delivered"),
    ),
    Scenario(
        "an_idle_time_of_nothing_never_waits",
        drain(idle=0),
        DRAINING + "INPUT 5 @7 -> DISCARD; EMPTY -> COUNT; COUNTED 0 -> CLOSE",
        Ending("IDLE", "delivered", drained=5),
    ),
)

NO_WAIT = (
    Scenario(
        "no_time_and_a_peer_that_has_closed",
        drain(timeout=0),
        DRAINING + f"INPUT {MIB} -> DISCARD; INPUT 80 -> DISCARD; FIN -> COUNT; COUNTED 0 -> CLOSE",
        Ending("PEER_CLOSED", "delivered", drained=MIB + 80),
    ),
    Scenario(
        "no_time_and_a_peer_that_stays",
        drain(timeout=0),
        DRAINING + "INPUT 80 -> DISCARD; EMPTY -> COUNT; COUNTED 1 -> CLOSE",
        Ending("TIMED_OUT", "delivered", drained=80),
    ),
    Scenario(
        "no_time_and_everything_acked",
        flush(timeout=0),
        FLUSHING + "EMPTY -> COUNT; COUNTED 0 -> CLOSE",
        Ending("ACKED", "delivered"),
    ),
    Scenario(
        "no_time_and_bytes_to_send",
        flush(timeout=0, unsent=8),
        """
        BEGUN -> SEND
        SENT 8 -> HALF_CLOSE
        HALF_CLOSED -> DISCARD
        EMPTY -> COUNT
        COUNTED 9 -> COUNT state=LEAVING
        COUNTED 9 -> CLOSE
        """,
        Ending("TIMED_OUT", "unknown", unacked=8),
    ),
    Scenario(
        "no_time_and_no_room",
        drain(timeout=0, unsent=8),
        "BEGUN -> SEND; NO_ROOM -> DISCARD; FIN -> COUNT state=LEAVING; COUNTED 30 -> CLOSE",
        Ending("TIMED_OUT", "lost", unacked=38),
    ),
    Scenario(
        "no_time_and_more_input_than_one_turn_may_take",
        drain(timeout=0),
        DRAINING + f"INPUT {MIB} -> DISCARD; INPUT {MIB} -> COUNT; COUNTED 0 -> CLOSE",
        Ending("TIMED_OUT", "delivered", drained=2 * MIB),
    ),
    Scenario(
        "no_time_and_a_flood_but_everything_acked",
        flush(timeout=0),
        FLUSHING + f"INPUT {MIB} -> DISCARD; INPUT {MIB} -> COUNT state=FLUSHING; COUNTED 0 -> CLOSE",
        Ending("ACKED", "delivered", drained=2 * MIB),
    ),
    Scenario(
        "no_time_and_a_flood_before_the_ack",
        flush(timeout=0),
        FLUSHING
        + f"""
        INPUT {MIB} -> DISCARD
        INPUT {MIB} -> COUNT state=FLUSHING
        COUNTED 9 -> COUNT state=LEAVING
        COUNTED 9 -> CLOSE
        """,
        Ending("TIMED_OUT", "unknown", drained=2 * MIB, unacked=8),
    ),
)

BYTES = (
    Scenario(
        "exactly_max_bytes",
        drain(max_bytes=10),
        DRAINING + "INPUT 4 -> DISCARD want=6; INPUT 6 -> DISCARD want=0; FIN -> COUNT; COUNTED 0 -> CLOSE",
        Ending("PEER_CLOSED", "delivered", drained=10),
    ),
    Scenario(
        "one_byte_more_than_max_bytes",
        drain(max_bytes=10),
        DRAINING + "INPUT 10 -> DISCARD want=0; INPUT 1 -> COUNT state=LEAVING; COUNTED 3 -> CLOSE",
        Ending("BYTE_LIMIT", "unknown", drained=10, unacked=2),
    ),
    Scenario(
        "max_bytes_is_reached_and_the_peer_stays",
        drain(max_bytes=10),
        DRAINING
        + """
        INPUT 10 -> DISCARD
        EMPTY @9 -> WAIT wants=FOR_INPUT
        WOKEN @12 -> DISCARD want=0
        INPUT 1 -> COUNT
        COUNTED 0 -> CLOSE
        """,
        Ending("BYTE_LIMIT", "delivered", drained=10),
    ),
    Scenario(
        "no_byte_is_allowed_and_none_comes",
        flush(max_bytes=0),
        "BEGUN -> HALF_CLOSE; HALF_CLOSED -> DISCARD want=0; FIN -> COUNT; COUNTED 0 -> CLOSE",
        Ending("ACKED", "delivered"),
    ),
    Scenario(
        "no_byte_is_allowed_and_one_comes",
        flush(max_bytes=0),
        FLUSHING + "INPUT 1 -> COUNT; COUNTED 2 -> CLOSE",
        Ending("BYTE_LIMIT", "unknown", unacked=1),
    ),
    Scenario(
        "too_much_input_but_everything_was_acked",
        flush(max_bytes=1),
        FLUSHING + "INPUT 1 -> DISCARD; INPUT 1 -> COUNT; COUNTED 0 -> CLOSE",
        Ending("ACKED", "delivered", drained=1),
    ),
    Scenario(
        "too_much_input_while_sending",
        drain(max_bytes=3, unsent=50),
        "BEGUN -> SEND; SENT 20 -> DISCARD want=3; INPUT 3 -> DISCARD want=0; INPUT 1 -> COUNT; COUNTED 20 -> CLOSE",
        Ending("BYTE_LIMIT", "lost", drained=3, unacked=50),
    ),
    Scenario(
        "max_bytes_is_more_than_one_call_may_take",
        drain(max_bytes=MIB + 1),
        DRAINING + f"INPUT {MIB} -> DISCARD want=1; INPUT 1 -> DISCARD want=0; FIN -> COUNT; COUNTED 0 -> CLOSE",
        Ending("PEER_CLOSED", "delivered", drained=MIB + 1),
    ),
)

SHARP = (
    Scenario(
        "abort_at_the_deadline",
        drain(abort=1),
        DRAINING + "EMPTY @1000 -> COUNT; COUNTED 9 -> CLOSE_ABORT",
        Ending("TIMED_OUT", "unknown", unacked=8),
    ),
    Scenario(
        "abort_when_idle",
        drain(abort=1, idle=10),
        DRAINING + "EMPTY @10 -> COUNT; COUNTED 9 -> CLOSE_ABORT",
        Ending("IDLE", "unknown", unacked=8),
    ),
    Scenario(
        "abort_at_the_byte_limit",
        drain(abort=1, max_bytes=0),
        DRAINING + "INPUT 1 -> COUNT; COUNTED 9 -> CLOSE_ABORT",
        Ending("BYTE_LIMIT", "unknown", unacked=8),
    ),
    Scenario(
        "abort_when_shed",
        flush(abort=1),
        FLUSHING + "EMPTY -> COUNT; COUNTED 9 -> WAIT; SHEDDING -> COUNT; COUNTED 9 -> CLOSE_ABORT",
        Ending("SHED", "unknown", unacked=8),
    ),
    Scenario(
        "an_abort_of_bytes_not_sent_yet",
        drain(abort=1),
        DRAINING + "EMPTY @1000 -> COUNT; COUNTED 12 never_sent=5 -> CLOSE_ABORT lost=1",
        Ending("TIMED_OUT", "lost", unacked=11),
    ),
    Scenario(
        "an_abort_of_a_flush_with_bytes_not_sent_yet",
        flush(abort=1),
        FLUSHING + "EMPTY @1000 -> COUNT; COUNTED 12 -> COUNT; COUNTED 12 never_sent=5 -> CLOSE_ABORT lost=1",
        Ending("TIMED_OUT", "lost", unacked=11),
    ),
    Scenario(
        "an_abort_with_every_byte_on_its_way",
        drain(abort=1),
        DRAINING + "EMPTY @1000 -> COUNT; COUNTED 12 never_sent=0 -> CLOSE_ABORT lost=0",
        Ending("TIMED_OUT", "unknown", unacked=11),
    ),
    Scenario(
        "an_abort_when_only_our_fin_is_not_sent_yet",
        drain(abort=1),
        DRAINING + "EMPTY @1000 -> COUNT; COUNTED 1 never_sent=1 -> CLOSE_ABORT",
        Ending("TIMED_OUT", "delivered"),
    ),
    Scenario(
        "an_abort_takes_nothing_from_a_local_peer",
        drain(abort=1, local=1),
        DRAINING + "EMPTY @1000 -> COUNT; COUNTED 0 -> CLOSE_ABORT",
        Ending("TIMED_OUT", "delivered"),
    ),
    Scenario(
        "an_abort_of_bytes_that_are_unsent",
        drain(abort=1, unsent=5),
        "BEGUN -> SEND; NO_ROOM -> DISCARD; EMPTY @1000 -> COUNT; COUNTED 0 never_sent=0 -> CLOSE_ABORT lost=1",
        Ending("TIMED_OUT", "lost", unacked=5),
    ),
    Scenario(
        "no_abort_of_a_flush_that_was_acked_when_shed",
        flush(abort=1),
        FLUSHING + "EMPTY -> COUNT; COUNTED 9 -> WAIT; SHEDDING -> COUNT; COUNTED 0 -> CLOSE",
        Ending("ACKED", "delivered"),
    ),
    Scenario(
        "an_abort_after_the_last_ack_loses_nothing",
        drain(abort=1),
        DRAINING + "EMPTY @1000 -> COUNT; COUNTED 1 -> CLOSE_ABORT",
        Ending("TIMED_OUT", "delivered"),
    ),
    Scenario(
        "no_abort_when_all_went_well",
        drain(abort=1),
        CONFIRMING + "COUNTED 0 -> CLOSE",
        Ending("PEER_CLOSED", "delivered"),
    ),
    Scenario(
        "no_abort_of_what_the_peer_reset",
        drain(abort=1),
        DRAINING + "RESET 104 -> COUNT; COUNTED 9 -> CLOSE",
        Ending("PEER_RESET", "unknown", unacked=8, error=104),
    ),
    Scenario(
        "no_abort_of_a_flush_acked_at_the_last_moment",
        flush(abort=1, short=1),
        FLUSHING + "EMPTY @1000 -> COUNT; COUNTED 5 -> COUNT; COUNTED 0 -> CLOSE_SHORT",
        Ending("ACKED", "delivered"),
    ),
)
