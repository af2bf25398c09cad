"""The machine's scenarios, as data: what an engine sees, what the machine must answer, what is reported.

A step of a script is `[times x] EVENT [amount] [never_sent=bytes] [@time] -> ACTION [field=value ...]`; a newline or
`;` ends it. The time stays until it is set again and starts at 0; times are ns, and a timeout is 1000 unless the
scenario says otherwise. What never was sent is unknown unless the step says so. A value is a number or names of the
machine's constants joined by `|`. No code that plays them may live here.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

from rehearsal import Terms, drain, flush

Delivered = Literal["delivered", "lost", "unknown"]


class Ending(NamedTuple):
    """What must be reported; unacked -1: unknown."""

    outcome: str
    delivered: Delivered
    drained: int = 0
    unacked: int = 0
    error: int = 0


class Scenario(NamedTuple):
    name: str
    terms: Terms
    script: str
    ending: Ending


DRAINING = """
    BEGUN -> HALF_CLOSE state=HALF_CLOSING
    HALF_CLOSED -> DISCARD state=DRAINING
"""
FLUSHING = """
    BEGUN -> HALF_CLOSE state=HALF_CLOSING
    HALF_CLOSED -> DISCARD state=FLUSHING
"""
CONFIRMING = DRAINING + "FIN -> COUNT state=CONFIRMING\n"
FLUSHING_ON = FLUSHING + "FIN -> COUNT state=FLUSHING_ON\n"
PARTED = """
    BEGUN -> HALF_CLOSE
    UNCONNECTED -> DISCARD state=PARTED
"""
LEAVING = DRAINING + "RESET 104 -> COUNT state=LEAVING\n"

MIB = 1024 * 1024

DRAINS = (
    Scenario(
        "a_peer_that_has_closed_already",
        drain(),
        DRAINING + "FIN -> COUNT; COUNTED 0 -> CLOSE queue_empty=1",
        Ending("PEER_CLOSED", "delivered"),
    ),
    Scenario(
        "only_our_fin_is_on_its_way",
        drain(),
        CONFIRMING + "COUNTED 1 -> CLOSE queue_empty=0",
        Ending("PEER_CLOSED", "delivered"),
    ),
    Scenario(
        "a_peer_that_talks_on_and_closes_later",
        drain(),
        DRAINING
        + """
        INPUT 700 -> DISCARD
        EMPTY @10 -> WAIT wants=FOR_INPUT wake_at=1000
        WOKEN @20 -> DISCARD
        INPUT 50 -> DISCARD
        FIN -> COUNT
        COUNTED 0 -> CLOSE
        """,
        Ending("PEER_CLOSED", "delivered", drained=750),
    ),
    Scenario(
        "a_peer_that_closes_first_and_reads_late",
        drain(),
        CONFIRMING
        + """
        COUNTED 4000 -> PROBE unacked=3999
        NO_ERROR @5 -> WAIT wants=FOR_ACK
        WOKEN @30 -> COUNT
        COUNTED 2 -> PROBE unacked=1
        NO_ERROR -> WAIT wants=FOR_ACK
        WOKEN @40 -> COUNT
        COUNTED 1 -> CLOSE
        """,
        Ending("PEER_CLOSED", "delivered"),
    ),
    Scenario(
        "a_peer_that_closes_first_and_then_resets",
        drain(),
        CONFIRMING + "COUNTED 4000 -> PROBE; RESET 104 -> COUNT; COUNTED 4000 -> CLOSE",
        Ending("PEER_RESET", "unknown", unacked=3999, error=104),
    ),
    Scenario(
        "a_peer_that_closes_first_and_then_resets_with_bytes_not_sent_yet",
        drain(),
        CONFIRMING + "COUNTED 4000 -> PROBE; RESET 104 -> COUNT; COUNTED 4000 never_sent=1500 -> CLOSE lost=1",
        Ending("PEER_RESET", "lost", unacked=3999, error=104),
    ),
    Scenario(
        "a_platform_that_cannot_count",
        drain(),
        CONFIRMING + "COUNTED -1 -> CLOSE",
        Ending("PEER_CLOSED", "unknown", unacked=-1),
    ),
    Scenario(
        "a_reset_after_everything_was_acked",
        drain(),
        DRAINING + "RESET 104 -> COUNT; COUNTED 0 -> CLOSE",
        Ending("PEER_RESET", "delivered", error=104),
    ),
    Scenario(
        "a_reset_with_bytes_on_their_way",
        drain(),
        DRAINING + "INPUT 9 -> DISCARD; RESET 104 -> COUNT; COUNTED 11 -> CLOSE",
        Ending("PEER_RESET", "unknown", drained=9, unacked=10, error=104),
    ),
    Scenario(
        "a_reset_with_every_byte_on_its_way",
        drain(),
        DRAINING + "RESET 104 -> COUNT; COUNTED 11 never_sent=0 -> CLOSE lost=0",
        Ending("PEER_RESET", "unknown", unacked=10, error=104),
    ),
    Scenario(
        "a_reset_when_only_the_fin_was_never_sent",
        drain(),
        DRAINING + "RESET 104 -> COUNT; COUNTED 12 never_sent=1 -> CLOSE lost=0",
        Ending("PEER_RESET", "unknown", unacked=11, error=104),
    ),
    Scenario(
        "a_reset_with_bytes_not_sent_yet",
        drain(),
        DRAINING + "RESET 104 -> COUNT; COUNTED 12 never_sent=5 -> CLOSE lost=1",
        Ending("PEER_RESET", "lost", unacked=11, error=104),
    ),
    Scenario(
        "a_kernel_that_gives_up_with_bytes_not_sent_yet",
        drain(),
        DRAINING + "BROKEN 110 -> COUNT; COUNTED 12 never_sent=5 -> CLOSE lost=1",
        Ending("FAILED", "lost", unacked=11, error=110),
    ),
    Scenario(
        "a_kernel_that_gives_up_with_every_byte_on_its_way",
        drain(),
        DRAINING + "BROKEN 110 -> COUNT; COUNTED 12 never_sent=0 -> CLOSE",
        Ending("FAILED", "unknown", unacked=11, error=110),
    ),
    Scenario(
        "a_local_peer_that_closed_without_reading",  # AF_UNIX
        drain(local=1),
        DRAINING + "RESET 104 -> COUNT; COUNTED 0 -> CLOSE unacked=-1",
        Ending("PEER_RESET", "lost", unacked=-1, error=104),
    ),
)

FLUSHES = (
    Scenario(
        "everything_was_acked_already",
        flush(),
        FLUSHING + "EMPTY -> COUNT; COUNTED 0 -> CLOSE",
        Ending("ACKED", "delivered"),
    ),
    Scenario(
        "the_ack_comes_after_input",
        flush(timeout=10**9),
        FLUSHING
        + """
        INPUT 30 -> DISCARD
        EMPTY @1 -> COUNT
        COUNTED 501 -> WAIT wants=FOR_INPUT|FOR_ACK unacked=500
        WOKEN @2 -> DISCARD
        EMPTY @3 -> COUNT
        COUNTED 1 -> WAIT wants=FOR_INPUT|FOR_ACK unacked=0
        WOKEN @4 -> DISCARD
        INPUT 3 -> DISCARD
        EMPTY -> COUNT
        COUNTED 0 -> CLOSE
        """,
        Ending("ACKED", "delivered", drained=33),
    ),
    Scenario(
        "the_peer_closes_before_it_has_acked",
        flush(),
        FLUSHING_ON
        + """
        COUNTED 8 -> PROBE
        NO_ERROR @1 -> WAIT wants=FOR_ACK
        WOKEN @2 -> COUNT
        COUNTED 1 -> PROBE
        NO_ERROR @3 -> WAIT wants=FOR_ACK
        WOKEN @4 -> COUNT
        COUNTED 0 -> CLOSE
        """,
        Ending("ACKED", "delivered"),
    ),
    Scenario(
        "nobody_can_count_and_the_peer_closes",
        flush(),
        FLUSHING
        + """
        EMPTY -> COUNT
        COUNTED -1 -> WAIT wants=FOR_INPUT wake_at=1000
        WOKEN @9 -> DISCARD
        FIN -> COUNT
        COUNTED -1 -> CLOSE
        """,
        Ending("PEER_CLOSED", "unknown", unacked=-1),
    ),
    Scenario(
        "nobody_can_count_and_the_peer_stays",
        flush(),
        FLUSHING
        + """
        EMPTY @999 -> COUNT
        COUNTED -1 -> WAIT wants=FOR_INPUT wake_at=1000
        WOKEN @1000 -> DISCARD
        EMPTY -> COUNT
        COUNTED -1 -> COUNT state=LEAVING
        COUNTED -1 -> CLOSE
        """,
        Ending("TIMED_OUT", "unknown", unacked=-1),
    ),
    Scenario(
        "the_handshake_is_not_over_and_then_it_is",
        flush(),
        FLUSHING
        + """
        EMPTY -> COUNT
        COUNTED UNTOLD -> WAIT wants=FOR_INPUT|FOR_ACK unacked=-1
        WOKEN @9 -> DISCARD
        EMPTY -> COUNT
        COUNTED 0 -> CLOSE
        """,
        Ending("ACKED", "delivered"),
    ),
    Scenario(
        "the_handshake_is_never_over",
        flush(abort=1),
        FLUSHING + "EMPTY @1000 -> COUNT; COUNTED UNTOLD -> COUNT state=LEAVING; COUNTED UNTOLD -> CLOSE_ABORT",
        Ending("TIMED_OUT", "unknown", unacked=-1),
    ),
    Scenario(
        "a_reset_after_a_close_is_seen_by_probing",
        flush(),
        FLUSHING_ON + "COUNTED 8 -> PROBE; RESET 104 -> COUNT; COUNTED 8 -> CLOSE",
        Ending("PEER_RESET", "unknown", unacked=7, error=104),
    ),
    Scenario(
        "a_reset_of_a_flush_with_bytes_not_sent_yet",
        flush(),
        FLUSHING + "RESET 104 -> COUNT; COUNTED 8 never_sent=3 -> CLOSE",
        Ending("PEER_RESET", "lost", unacked=7, error=104),
    ),
    Scenario(
        "no_time_wait_is_left_after_the_last_ack",
        flush(short=1),
        FLUSHING + "EMPTY -> COUNT; COUNTED 0 -> CLOSE_SHORT",
        Ending("ACKED", "delivered"),
    ),
    Scenario(
        "reset_after_ack_never_without_the_ack",
        flush(short=1),
        FLUSHING + "EMPTY @1000 -> COUNT; COUNTED 1 -> COUNT; COUNTED 1 -> CLOSE",
        Ending("TIMED_OUT", "delivered"),
    ),
    Scenario(
        "reset_after_ack_never_where_nobody_can_count",
        flush(short=1),
        FLUSHING_ON + "COUNTED -1 -> CLOSE",
        Ending("PEER_CLOSED", "unknown", unacked=-1),
    ),
)

SENDS = (
    Scenario(
        "the_kernel_takes_everything",
        drain(unsent=20),
        "BEGUN -> SEND state=SENDING; SENT 20 -> HALF_CLOSE; HALF_CLOSED -> DISCARD; FIN -> COUNT; COUNTED 0 -> CLOSE",
        Ending("PEER_CLOSED", "delivered"),
    ),
    Scenario(
        "a_peer_that_writes_before_it_reads",
        flush(unsent=100),
        """
        BEGUN -> SEND
        SENT 60 -> DISCARD unsent=40
        INPUT 5000 -> DISCARD
        EMPTY @3 -> WAIT wants=FOR_ROOM|FOR_INPUT wake_at=1000
        WOKEN @4 -> SEND
        NO_ROOM -> DISCARD
        INPUT 1000 -> DISCARD
        EMPTY -> WAIT
        WOKEN @5 -> SEND
        SENT 40 -> HALF_CLOSE unsent=0
        HALF_CLOSED -> DISCARD
        EMPTY -> COUNT
        COUNTED 0 -> CLOSE
        """,
        Ending("ACKED", "delivered", drained=6000),
    ),
    Scenario(
        "a_half_closed_peer_that_reads_on",
        drain(unsent=100),
        """
        BEGUN -> SEND
        SENT 60 -> DISCARD
        FIN -> WAIT wants=FOR_ROOM
        WOKEN @7 -> SEND
        SENT 40 -> HALF_CLOSE
        HALF_CLOSED -> DISCARD
        FIN -> COUNT
        COUNTED 41 -> PROBE
        NO_ERROR -> WAIT wants=FOR_ACK
        WOKEN @8 -> COUNT
        COUNTED 0 -> CLOSE
        """,
        Ending("PEER_CLOSED", "delivered"),
    ),
    Scenario(
        "a_peer_that_never_reads",
        drain(unsent=100),
        """
        BEGUN -> SEND
        SENT 60 -> DISCARD
        EMPTY @999 -> WAIT
        WOKEN @1000 -> SEND
        NO_ROOM -> DISCARD
        EMPTY -> COUNT
        COUNTED 60 -> CLOSE lost=1
        """,
        Ending("TIMED_OUT", "lost", unacked=100),
    ),
    Scenario(
        "unsent_bytes_are_lost_even_when_nobody_can_count",
        drain(unsent=100),
        "BEGUN -> SEND; NO_ROOM -> DISCARD; EMPTY @1000 -> COUNT; COUNTED -1 -> CLOSE",
        Ending("TIMED_OUT", "lost", unacked=-1),
    ),
    Scenario(
        "what_was_sent_is_acked_and_the_rest_is_not",
        drain(unsent=100),
        "BEGUN -> SEND; SENT 60 -> DISCARD; EMPTY @1000 -> COUNT; COUNTED 0 -> CLOSE",
        Ending("TIMED_OUT", "lost", unacked=40),
    ),
    Scenario(
        "a_flush_is_not_acked_while_bytes_are_unsent",
        flush(unsent=100, short=1),
        "BEGUN -> SEND; SENT 60 -> DISCARD; EMPTY @1000 -> COUNT; COUNTED 0 -> CLOSE",
        Ending("TIMED_OUT", "lost", unacked=40),
    ),
    Scenario(
        "a_socket_that_is_not_connected_has_bytes_to_send",
        drain(unsent=5),
        "BEGUN -> SEND; UNCONNECTED -> DISCARD state=PARTED; UNCONNECTED -> CLOSE",
        Ending("NOT_CONNECTED", "lost", unacked=-1),
    ),
)

PARTINGS = (
    Scenario(
        "never_connected",
        drain(),
        PARTED + "UNCONNECTED -> CLOSE",
        Ending("NOT_CONNECTED", "unknown", unacked=-1),
    ),
    Scenario(
        "not_connected_any_more_and_nothing_missing",
        drain(),
        PARTED + "INPUT 12 -> DISCARD; FIN -> COUNT; COUNTED 0 -> CLOSE",
        Ending("NOT_CONNECTED", "delivered", drained=12),
    ),
    Scenario(
        "somebody_read_the_reset_before_us",
        flush(),
        PARTED + "FIN -> COUNT; COUNTED 12 -> CLOSE broken=1 lost=0",
        Ending("PEER_RESET", "unknown", unacked=12),
    ),
    Scenario(
        "somebody_read_the_reset_before_us_with_bytes_not_sent_yet",
        flush(),
        PARTED + "FIN -> COUNT; COUNTED 12 never_sent=5 -> CLOSE broken=1 lost=1",
        Ending("PEER_RESET", "lost", unacked=12),
    ),
    Scenario(
        "not_connected_and_no_end_of_input",
        drain(),
        PARTED + "EMPTY -> COUNT; COUNTED 0 -> CLOSE",
        Ending("NOT_CONNECTED", "delivered"),
    ),
    Scenario(
        "what_never_left_this_process_is_no_reset",
        drain(unsent=5),
        "BEGUN -> SEND; UNCONNECTED 107 -> DISCARD; FIN -> COUNT; COUNTED 0 -> CLOSE",
        Ending("NOT_CONNECTED", "lost", unacked=5),
    ),
    Scenario(
        "the_reset_shows_after_the_last_input",
        drain(),
        PARTED + "INPUT 7 -> DISCARD; RESET 104 -> COUNT; COUNTED 3 -> CLOSE",
        Ending("PEER_RESET", "unknown", drained=7, unacked=3, error=104),
    ),
    Scenario(
        "much_input_of_a_lost_connection_takes_turns",
        drain(),
        PARTED + f"INPUT {MIB} -> DISCARD; INPUT {MIB} -> YIELD; WOKEN -> DISCARD; FIN -> COUNT; COUNTED 0 -> CLOSE",
        Ending("NOT_CONNECTED", "delivered", drained=2 * MIB),
    ),
    Scenario(
        "it_turns_out_while_draining_that_there_was_no_connection",
        drain(),
        DRAINING + "UNCONNECTED -> CLOSE",
        Ending("NOT_CONNECTED", "unknown", unacked=-1),
    ),
    Scenario(
        "it_turns_out_while_flushing_that_there_was_no_connection",
        flush(),
        FLUSHING + "UNCONNECTED -> CLOSE",
        Ending("NOT_CONNECTED", "unknown", unacked=-1),
    ),
    Scenario(
        "the_number_is_gone_at_the_last_look",
        drain(),
        LEAVING + "GONE 9 -> FORGET",
        Ending("ALREADY_CLOSED", "unknown", unacked=-1, error=9),
    ),
)
