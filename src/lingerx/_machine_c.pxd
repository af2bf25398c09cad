# The C types of _machine.py, which is compiled as lingerx._machine_c (Cython's pure mode). Nothing else may
# live here. One `Closing` is all the memory that the machine needs for a socket: 96 bytes, as a closer has thousands.
# cython: language_level=3

cimport cython


cdef struct Closing:
    long long started, heard, deadline, wake_at   # ns
    long long idle                                # ns; -1: no limit
    long long max_bytes                           # -1: no limit
    long long drained, unsent
    long long unacked                             # -1: unknown
    short patience                                # ms
    short budget                                  # in CALL_COST
    short error                                   # errno or 0
    short never_sent                              # bytes, at most 2 of them; -1: unknown
    unsigned char state, goal, outcome, wants
    unsigned char abort, short, local, polled, fin_queued, queue_empty, broken, lost
    unsigned char family, watched                 # the engine's own: there is room for them here, and nowhere else

cdef int SENDING, HALF_CLOSING, DRAINING, CONFIRMING, FLUSHING, FLUSHING_ON, PARTED, LEAVING, CLOSED, STATES, GOAL
cdef int BEGUN, WOKEN, SENT, NO_ROOM, HALF_CLOSED, UNCONNECTED, INPUT, EMPTY, FIN, COUNTED, NO_ERROR
cdef int RESET, BROKEN, GONE, SHEDDING
cdef int SENT_ALL, TOO_MUCH, ACKED_ALL, ACKED_DATA, QUEUED, UNCOUNTED, EVENTS, UNTOLD
cdef int SEND, HALF_CLOSE, DISCARD, COUNT, PROBE, WAIT, YIELD, CLOSE, CLOSE_SHORT, CLOSE_ABORT, FORGET
cdef int FOR_INPUT, FOR_ROOM, FOR_ACK
cdef int PEER_CLOSED, ACKED, BACKGROUND, ABORTED, PEER_RESET, TIMED_OUT, IDLE, BYTE_LIMIT, SHED
cdef int NOT_CONNECTED, ALREADY_CLOSED, FAILED, NO_OUTCOME
cdef int TURN_BYTES, CALL_COST, DISCARD_BYTES
cdef int RARELY, RARELY_MOST, OFTEN, OFTEN_MOST
cdef long long MS

# STATES * EVENTS entries each
cdef unsigned char NEXT_STATE[189]
cdef unsigned char ACTION[189]
cdef unsigned char OUTCOME[189]

cdef void begin(Closing *c, int goal, long long timeout, long long idle, long long max_bytes, bint abort,
                bint short, long long unsent, bint local, bint polled, long long now) noexcept nogil
@cython.locals(state=int, place=int, action=int)
cdef int advance(Closing *c, int seen, long long amount, long long now) noexcept nogil
cdef void look_often(Closing *c, long long now) noexcept nogil
cdef long long allowance(Closing *c) noexcept nogil
@cython.locals(data=cython.longlong)
cdef int _weigh(Closing *c, long long queue) noexcept nogil
cdef int _wants(int state, int seen) noexcept nogil
cdef int _pause(Closing *c, int action, long long now) noexcept nogil
cdef int _leave(Closing *c, int outcome) noexcept nogil
@cython.locals(aborts=cython.bint)
cdef int _ending(Closing *c) noexcept nogil
