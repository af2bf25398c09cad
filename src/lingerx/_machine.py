"""Decides: what to do next with one socket that is being closed. Pure: no clock, no fd, no imports.

An engine does what `advance` answers (an *action*), tells it what came of that (an *event* with an amount), and
so on until the action is one of the four that end it. All that is known about a closing is in one record
(`Closing` in `_machine_c.pxd`; any object with the same attributes when this file runs as plain Python). Times
are integer nanoseconds of one clock, amounts are bytes; -1 stands for none or unknown.

The rules are data: `ROWS` below, one for each state and event that can meet. Around the table stand only the
sums (bytes, limits, budget), in `advance`. This very file is compiled with the C types of `_machine_c.pxd`, and
runs uncompiled too; a test holds the two against each other.
"""

# States ---------------------------------------------------------------------------------------------------
SENDING = 0  # bytes of ours are still in this process: write them, and read while writing
HALF_CLOSING = 1  # shutdown(SHUT_WR) is being called
DRAINING = 2  # Drain: our FIN is queued; discard until the peer's FIN
CONFIRMING = 3  # Drain: the peer's FIN was seen; wait until every data byte is ACKed
FLUSHING = 4  # Flush: our FIN is queued; discard until it is ACKed, and with it every byte
FLUSHING_ON = 5  # Flush: the peer's FIN was seen, there is nothing more to discard
PARTED = 6  # shutdown said "not connected": recv knows whether there was a reset
LEAVING = 7  # the outcome stands; one last look at the send queue
CLOSED = 8
STATES = 9

GOAL = 255  # as a next state: DRAINING or FLUSHING, whichever the policy wants

# What the engine may tell. The second group are the first group's events, sharpened by the sums.
BEGUN = 0
WOKEN = 1  # something happened that was waited for, or it was time, or it is this socket's turn again
SENT = 2  # amount: bytes that the kernel took
NO_ROOM = 3  # send: EAGAIN
HALF_CLOSED = 4
UNCONNECTED = 5  # ENOTCONN
INPUT = 6  # amount: bytes that were discarded (or merely seen, when `allowance` was 0)
EMPTY = 7  # recv: EAGAIN
FIN = 8  # recv: 0
COUNTED = 9  # amount: the send queue in bytes, our FIN included, or -1 where the platform can't tell, or UNTOLD
NO_ERROR = 10  # SO_ERROR: 0
RESET = 11  # amount: the errno (ECONNRESET, EPIPE, ...)
BROKEN = 12  # amount: the errno of any other failure
GONE = 13  # EBADF, ENOTSOCK: amount: the errno; the number is not our socket any more
SHEDDING = 14  # somebody needs the place, or cannot wait any longer
#
SENT_ALL = 15
TOO_MUCH = 16  # input beyond max_bytes
ACKED_ALL = 17  # nothing is queued, not even the FIN
ACKED_DATA = 18  # only the FIN is queued
QUEUED = 19  # data is queued
UNCOUNTED = 20
EVENTS = 21

UNTOLD = -2  # as the amount of COUNTED: something is queued, but nobody can say how much

# Actions --------------------------------------------------------------------------------------------------
SEND = 0
HALF_CLOSE = 1
DISCARD = 2  # at most `allowance` bytes; when that is 0, look whether there is any input and leave it there
COUNT = 3  # the send queue; in LEAVING also `never_sent`: bytes of it that were never sent, our FIN included, or -1
# (more than 2 of them may be told as 2)
PROBE = 4  # SO_ERROR; only after the peer's FIN, for reading it clears it and recv could not tell a reset any more
WAIT = 5  # for what `wants` says, until `wake_at`
YIELD = 6  # the turn is over: let others have theirs, then tell WOKEN
CLOSE = 7
CLOSE_SHORT = 8  # close and leave no TIME_WAIT behind (TCP_LINGER2 = -1)
CLOSE_ABORT = 9  # SO_LINGER {1, 0}, close: RST
FORGET = 10  # close nothing

# What to wait for: bits of `wants`
FOR_INPUT = 1
FOR_ROOM = 2
FOR_ACK = 4

# Outcomes, in the order of report.Outcome -------------------------------------------------------------------
PEER_CLOSED = 0
ACKED = 1
BACKGROUND = 2
ABORTED = 3
PEER_RESET = 4
TIMED_OUT = 5
IDLE = 6
BYTE_LIMIT = 7
SHED = 8
NOT_CONNECTED = 9
ALREADY_CLOSED = 10
FAILED = 11
NO_OUTCOME = 255  # in a row: as it was

# Bounds on the work of one turn: a guess that keeps a turn below 0.1 ms at memory speed. A call counts as
# CALL_COST bytes, so that a peer that sends single bytes cannot buy thousands of calls. The budget counts in these.
TURN_BYTES = 2 * 1024 * 1024
CALL_COST = 32 * 1024
DISCARD_BYTES = 1024 * 1024  # the most that one call may discard

# The safety timer beside the ACK wake-up. Linux wakes us (see the engine): look again only rarely, in case a
# kernel does not. Where there is no such wake-up, looking again is all there is. Both grow: guesses.
RARELY = 500  # ms
RARELY_MOST = 8000
OFTEN = 1
OFTEN_MOST = 50
MS = 1_000_000  # ns

# The rules ------------------------------------------------------------------------------------------------
# state, event -> next state, action, outcome
ROWS = (
    (SENDING, BEGUN, SENDING, SEND, NO_OUTCOME),
    (SENDING, WOKEN, SENDING, SEND, NO_OUTCOME),
    (SENDING, SENT, SENDING, DISCARD, NO_OUTCOME),  # the kernel is full: a peer that writes first must be read
    (SENDING, NO_ROOM, SENDING, DISCARD, NO_OUTCOME),
    (SENDING, SENT_ALL, HALF_CLOSING, HALF_CLOSE, NO_OUTCOME),
    (SENDING, INPUT, SENDING, DISCARD, NO_OUTCOME),
    (SENDING, EMPTY, SENDING, WAIT, NO_OUTCOME),
    (SENDING, FIN, SENDING, WAIT, NO_OUTCOME),  # a half-close: it may well read on
    (SENDING, UNCONNECTED, PARTED, DISCARD, NO_OUTCOME),
    (SENDING, TOO_MUCH, LEAVING, COUNT, BYTE_LIMIT),
    (SENDING, RESET, LEAVING, COUNT, PEER_RESET),
    (SENDING, BROKEN, LEAVING, COUNT, FAILED),
    (SENDING, GONE, CLOSED, FORGET, ALREADY_CLOSED),
    (SENDING, SHEDDING, LEAVING, COUNT, SHED),
    #
    (HALF_CLOSING, BEGUN, HALF_CLOSING, HALF_CLOSE, NO_OUTCOME),
    (HALF_CLOSING, HALF_CLOSED, GOAL, DISCARD, NO_OUTCOME),
    (HALF_CLOSING, UNCONNECTED, PARTED, DISCARD, NO_OUTCOME),
    (HALF_CLOSING, RESET, LEAVING, COUNT, PEER_RESET),
    (HALF_CLOSING, BROKEN, LEAVING, COUNT, FAILED),
    (HALF_CLOSING, GONE, CLOSED, FORGET, ALREADY_CLOSED),
    (HALF_CLOSING, SHEDDING, LEAVING, COUNT, SHED),
    #
    (DRAINING, WOKEN, DRAINING, DISCARD, NO_OUTCOME),
    (DRAINING, INPUT, DRAINING, DISCARD, NO_OUTCOME),
    (DRAINING, EMPTY, DRAINING, WAIT, NO_OUTCOME),
    (DRAINING, FIN, CONFIRMING, COUNT, NO_OUTCOME),  # a FIN alone says nothing about our bytes
    (DRAINING, UNCONNECTED, CLOSED, CLOSE, NOT_CONNECTED),
    (DRAINING, TOO_MUCH, LEAVING, COUNT, BYTE_LIMIT),
    (DRAINING, RESET, LEAVING, COUNT, PEER_RESET),
    (DRAINING, BROKEN, LEAVING, COUNT, FAILED),
    (DRAINING, GONE, CLOSED, FORGET, ALREADY_CLOSED),
    (DRAINING, SHEDDING, LEAVING, COUNT, SHED),
    #
    (CONFIRMING, WOKEN, CONFIRMING, COUNT, NO_OUTCOME),
    (CONFIRMING, ACKED_ALL, CLOSED, CLOSE, PEER_CLOSED),
    (CONFIRMING, ACKED_DATA, CLOSED, CLOSE, PEER_CLOSED),
    (CONFIRMING, UNCOUNTED, CLOSED, CLOSE, PEER_CLOSED),  # the platform can't tell, and the report says so
    (CONFIRMING, QUEUED, CONFIRMING, PROBE, NO_OUTCOME),  # after a FIN, recv hides a reset; SO_ERROR does not
    (CONFIRMING, NO_ERROR, CONFIRMING, WAIT, NO_OUTCOME),
    (CONFIRMING, RESET, LEAVING, COUNT, PEER_RESET),
    (CONFIRMING, BROKEN, LEAVING, COUNT, FAILED),
    (CONFIRMING, GONE, CLOSED, FORGET, ALREADY_CLOSED),
    (CONFIRMING, SHEDDING, LEAVING, COUNT, SHED),
    #
    (FLUSHING, WOKEN, FLUSHING, DISCARD, NO_OUTCOME),
    (FLUSHING, INPUT, FLUSHING, DISCARD, NO_OUTCOME),
    (FLUSHING, EMPTY, FLUSHING, COUNT, NO_OUTCOME),
    (FLUSHING, ACKED_ALL, CLOSED, CLOSE, ACKED),
    (FLUSHING, ACKED_DATA, FLUSHING, WAIT, NO_OUTCOME),
    (FLUSHING, QUEUED, FLUSHING, WAIT, NO_OUTCOME),
    (FLUSHING, UNCOUNTED, FLUSHING, WAIT, NO_OUTCOME),  # the peer's FIN is then the only thing to wait for
    (FLUSHING, FIN, FLUSHING_ON, COUNT, NO_OUTCOME),
    (FLUSHING, UNCONNECTED, CLOSED, CLOSE, NOT_CONNECTED),
    (FLUSHING, TOO_MUCH, LEAVING, COUNT, BYTE_LIMIT),
    (FLUSHING, RESET, LEAVING, COUNT, PEER_RESET),
    (FLUSHING, BROKEN, LEAVING, COUNT, FAILED),
    (FLUSHING, GONE, CLOSED, FORGET, ALREADY_CLOSED),
    (FLUSHING, SHEDDING, LEAVING, COUNT, SHED),
    #
    (FLUSHING_ON, WOKEN, FLUSHING_ON, COUNT, NO_OUTCOME),
    (FLUSHING_ON, ACKED_ALL, CLOSED, CLOSE, ACKED),
    (FLUSHING_ON, ACKED_DATA, FLUSHING_ON, PROBE, NO_OUTCOME),
    (FLUSHING_ON, QUEUED, FLUSHING_ON, PROBE, NO_OUTCOME),
    (FLUSHING_ON, UNCOUNTED, CLOSED, CLOSE, PEER_CLOSED),
    (FLUSHING_ON, NO_ERROR, FLUSHING_ON, WAIT, NO_OUTCOME),
    (FLUSHING_ON, RESET, LEAVING, COUNT, PEER_RESET),
    (FLUSHING_ON, BROKEN, LEAVING, COUNT, FAILED),
    (FLUSHING_ON, GONE, CLOSED, FORGET, ALREADY_CLOSED),
    (FLUSHING_ON, SHEDDING, LEAVING, COUNT, SHED),
    #
    (PARTED, WOKEN, PARTED, DISCARD, NO_OUTCOME),
    (PARTED, INPUT, PARTED, DISCARD, NO_OUTCOME),  # what came before the reset
    (PARTED, EMPTY, LEAVING, COUNT, NOT_CONNECTED),
    (PARTED, FIN, LEAVING, COUNT, NOT_CONNECTED),
    (PARTED, UNCONNECTED, CLOSED, CLOSE, NOT_CONNECTED),
    (PARTED, TOO_MUCH, LEAVING, COUNT, BYTE_LIMIT),
    (PARTED, RESET, LEAVING, COUNT, PEER_RESET),
    (PARTED, BROKEN, LEAVING, COUNT, FAILED),
    (PARTED, GONE, CLOSED, FORGET, ALREADY_CLOSED),
    (PARTED, SHEDDING, LEAVING, COUNT, SHED),
    #
    (LEAVING, ACKED_ALL, CLOSED, CLOSE, NO_OUTCOME),
    (LEAVING, ACKED_DATA, CLOSED, CLOSE, NO_OUTCOME),
    (LEAVING, QUEUED, CLOSED, CLOSE, NO_OUTCOME),
    (LEAVING, UNCOUNTED, CLOSED, CLOSE, NO_OUTCOME),
    (LEAVING, GONE, CLOSED, FORGET, ALREADY_CLOSED),
)


def _column(place, otherwise):
    # The table as a flat list (a C array when compiled): entry `state * EVENTS + event`.
    flat = [otherwise] * (STATES * EVENTS)
    for row in ROWS:
        flat[row[0] * EVENTS + row[1]] = row[place]
    return flat


# A pair without a row cannot happen; if an engine makes it happen all the same, the socket is closed.
NEXT_STATE = _column(2, CLOSED)
ACTION = _column(3, CLOSE)
OUTCOME = _column(4, FAILED)


def begin(c, goal, timeout, idle, max_bytes, abort, short, unsent, local, polled, now):
    """Fill the record of a new closing; the first event to tell is BEGUN.

    goal: DRAINING or FLUSHING. timeout, idle: nanoseconds (idle -1: no limit). max_bytes: -1: no limit.
    abort: RST at a limit. short: leave no TIME_WAIT after the last ACK. unsent: bytes still to be sent.
    local: not TCP: what the kernel took is at once with the peer. polled: nothing wakes us for an ACK.
    """
    c.state = SENDING if unsent > 0 else HALF_CLOSING
    c.goal = goal
    c.outcome = NO_OUTCOME
    c.abort = abort
    c.short = short
    c.local = local
    c.polled = polled
    c.fin_queued = 0
    c.queue_empty = 0
    c.never_sent = -1
    c.broken = 0
    c.lost = 0
    c.wants = 0
    c.error = 0
    c.started = now
    c.heard = now
    c.deadline = now + timeout
    c.idle = idle
    c.max_bytes = max_bytes
    c.drained = 0
    c.unsent = unsent
    c.unacked = -1
    c.patience = OFTEN if polled else RARELY
    c.wake_at = c.deadline
    c.budget = TURN_BYTES // CALL_COST


def look_often(c, now):
    """From now on nothing wakes us for an ACK: look from time to time."""
    c.polled = 1
    c.patience = OFTEN
    c.wake_at = min(c.wake_at, now + OFTEN * MS)


def allowance(c):
    """How many bytes a DISCARD may take."""
    if c.max_bytes < 0 or c.max_bytes - c.drained > DISCARD_BYTES:
        return DISCARD_BYTES
    return c.max_bytes - c.drained


def advance(c, seen, amount, now):
    """The next action, after the engine saw `seen`. `now` must be fresh for WOKEN, INPUT, SENT and EMPTY."""
    if seen == INPUT:
        if allowance(c) == 0:
            seen = TOO_MUCH
        else:
            c.drained += amount
            c.heard = now
            c.budget -= amount // CALL_COST + 1
    elif seen == SENT:
        c.unsent -= amount
        c.heard = now
        if c.unsent <= 0:
            seen = SENT_ALL
    elif seen == COUNTED:
        seen = _weigh(c, amount)
    elif seen == WOKEN or seen == BEGUN:
        c.budget = TURN_BYTES // CALL_COST
    elif seen == HALF_CLOSED:
        c.fin_queued = 1
    elif seen == RESET or seen == BROKEN:
        c.error = amount
        c.broken = 1
    elif seen == GONE:
        c.error = amount
        c.unacked = -1  # whatever was counted was somebody else's
        c.lost = c.unsent > 0

    state = c.state
    place = state * EVENTS + seen
    action = ACTION[place]
    if OUTCOME[place] != NO_OUTCOME:
        c.outcome = OUTCOME[place]
    c.state = c.goal if NEXT_STATE[place] == GOAL else NEXT_STATE[place]

    if action == DISCARD:
        if c.budget <= 0:
            # No EMPTY is to be had from a peer that never stops: Flush looks at its queue all the same.
            return COUNT if state == FLUSHING else _pause(c, YIELD, now)
    elif action == WAIT:
        if c.budget <= 0:
            return _pause(c, YIELD, now)
        c.wants = _wants(state, seen)
        return _pause(c, WAIT, now)
    elif action == CLOSE:
        return _ending(c)
    return action


def _weigh(c, queue):
    # The send queue counts our FIN as one byte, the last. What never left this process is not ACKed either.
    if queue == UNTOLD:
        c.unacked = -1
        c.queue_empty = 0
        return QUEUED
    if queue < 0 or (c.local and c.broken):
        # A local peer that closes before it has read everything resets us: nobody knows how much it had read.
        c.unacked = -1
        return UNCOUNTED
    data = queue - 1 if c.fin_queued and queue > 0 else queue
    c.unacked = data + c.unsent
    c.queue_empty = queue == 0
    if c.state == LEAVING:
        if c.outcome == NOT_CONNECTED and data > 0:
            # The connection is over and its queue was left: it was reset, and somebody read the error before us.
            c.outcome = PEER_RESET
            c.broken = 1
        elif c.goal == FLUSHING and c.fin_queued and queue == 0 and TIMED_OUT <= c.outcome <= SHED:
            c.outcome = ACKED  # at the last moment
    if data > 0:
        return QUEUED
    return ACKED_ALL if queue == 0 else ACKED_DATA


def _wants(state, seen):
    if state == SENDING:
        return FOR_ROOM if seen == FIN else FOR_ROOM | FOR_INPUT
    if state == DRAINING:
        return FOR_INPUT
    if state == FLUSHING:
        return FOR_INPUT if seen == UNCOUNTED else FOR_INPUT | FOR_ACK
    return FOR_ACK


def _pause(c, action, now):
    # Limits are looked at here and nowhere else: whatever can be had without waiting is had first.
    if now >= c.deadline:
        return _leave(c, TIMED_OUT)
    if c.idle >= 0 and now - c.heard >= c.idle:
        return _leave(c, IDLE)
    if action == WAIT:
        c.wake_at = c.deadline
        if c.idle >= 0 and c.heard + c.idle < c.wake_at:
            c.wake_at = c.heard + c.idle
        if c.wants & FOR_ACK:
            if now + c.patience * MS < c.wake_at:
                c.wake_at = now + c.patience * MS
            c.patience = min(2 * c.patience, OFTEN_MOST if c.polled else RARELY_MOST)
    return action


def _leave(c, outcome):
    c.state = LEAVING
    c.outcome = outcome
    return COUNT


def _ending(c):
    aborts = TIMED_OUT <= c.outcome <= SHED and c.abort
    # What is in flight when a connection breaks may have arrived: only what was never sent is known to be lost.
    # (A local peer's reset says that something was not read.)
    if c.unsent > 0 or ((c.broken or aborts) and (c.never_sent > c.fin_queued or (c.local and c.broken))):
        c.lost = 1
    if aborts:
        return CLOSE_ABORT
    if c.outcome == ACKED and c.short:
        return CLOSE_SHORT
    return CLOSE
