# One socket that is being closed: performs what the machine answers. Part of _native.pyx.
#
# Only calls that cannot block may be made here, and nothing is decided. All of it runs without the GIL.

cdef struct Kept:          # what few entries need, and what many may share; whoever opens an entry sees that it lasts
    const char *rest       # behind the last byte that is to be sent: the unsent ones end there
    int user_timeout       # milliseconds or -1
    long long held         # bytes that a closer keeps for it
    PyObject *parcel       # the Parcel that this is part of, or NULL
    unsigned char expires  # somebody wants it to end now; by `lx_mark`


cdef enum:  # for what epoll watches an entry
    UNWATCHED, WATCHED_FOR_INPUT, WATCHED

# A closer has thousands of entries, and promises 128 bytes for each: 120 here, 4 in the heap. Of the machine's
# record `family` (LX_TCP, LX_LOCAL, LX_OTHER) and `watched` (by its crowd's epoll) are ours.
cdef struct Entry:
    m.Closing c
    Kept *kept
    int fd
    int place             # where it stands in its crowd's heap, or -1
    int older, newer      # its neighbours in its loop's order of age, or -1


cdef void open_entry(Entry *e, int fd, int family, const Terms *t, Kept *kept, long long unsent,
                     bint polled, long long now) noexcept nogil:
    # Owns fd from here on.
    m.begin(&e.c, m.DRAINING if t.kind == KIND_DRAIN else m.FLUSHING, t.timeout, t.idle, t.max_bytes, t.abort,
            t.short, unsent, family == LX_LOCAL, polled, now)
    e.c.family = family
    e.c.watched = UNWATCHED
    e.kept = kept
    e.fd = fd
    e.place = -1


cdef int trouble(int error, long long *amount) noexcept nogil:
    # What an errno means to the machine.
    amount[0] = error
    if error == ECONNRESET or error == EPIPE or error == ECONNABORTED:
        return m.RESET
    if error == ENOTCONN or error == EINVAL:  # AF_UNIX says the latter (unix(7))
        return m.UNCONNECTED
    if error == EBADF or error == ENOTSOCK:
        return m.GONE
    return m.BROKEN


cdef inline bint after_its_fin(int state) noexcept nogil:
    # A peer whose FIN was seen has done its part of the handshake.
    return state == m.CONFIRMING or state == m.FLUSHING_ON


cdef int perform(Entry *e, int action, long long *amount) noexcept nogil:
    # Borrows e.fd. Nothing here can block; EINTR cannot happen to calls that do not block, but costs nothing.
    cdef ssize_t n
    cdef long long queue
    cdef long long most
    cdef int value = 0
    cdef char peeked
    if action == m.DISCARD:
        most = m.allowance(&e.c)
        while True:
            if most > 0:
                n = lx_discard(e.fd, most, e.c.family == LX_TCP)
            else:
                n = recv(e.fd, &peeked, 1, MSG_PEEK | MSG_DONTWAIT)
            if n > 0:
                amount[0] = n
                return m.INPUT
            if n == 0:
                return m.FIN
            if errno == EAGAIN:
                return m.EMPTY
            if errno == ECONNRESET and e.c.family == LX_TCP and lx_never_heard(e.fd):
                return m.UNCONNECTED  # not the peer's doing: our shutdown ended an attempt to connect
            if errno != EINTR:
                return trouble(errno, amount)
    if action == m.HALF_CLOSE:
        return m.HALF_CLOSED if shutdown(e.fd, SHUT_WR) == 0 else trouble(errno, amount)
    if action == m.COUNT:
        amount[0] = 0
        if e.c.family == LX_LOCAL:
            return m.COUNTED  # what the kernel took is already in the peer's queue (unix(7))
        queue = lx_send_queue(e.fd) if e.c.family == LX_TCP else -1
        if queue == -2:
            return trouble(errno, amount)
        if queue == 0 and not after_its_fin(e.c.state):
            # Asked again, for the handshake may have ended in between: a 0 counts only after it.
            queue = m.UNTOLD if lx_opening(e.fd) else lx_send_queue(e.fd)
        if queue == 1 and e.c.outcome == m.NOT_CONNECTED and lx_no_data_sent(e.fd):
            queue = 0
        amount[0] = queue
        if e.c.state == m.LEAVING:
            e.c.never_sent = -1 if queue == m.UNTOLD else min(2, lx_never_sent(e.fd)) if queue != 0 else 0
        return m.COUNTED
    if action == m.SEND:
        while True:
            # MSG_MORE keeps the last bytes back until the shutdown that follows: FIN rides on them.
            n = send(e.fd, e.kept.rest - e.c.unsent, e.c.unsent, MSG_DONTWAIT | MSG_NOSIGNAL | MSG_MORE)
            if n >= 0:
                amount[0] = n
                return m.SENT
            if errno == EAGAIN:
                return m.NO_ROOM
            if errno == EPIPE and e.c.family == LX_TCP:
                # EPIPE tells little. There is no connection, or not any more: recv(2) knows which.
                value = lx_tcp_state(e.fd)
                if value == LX_CLOSE or value == LX_LISTEN:
                    return m.UNCONNECTED
                # Or the application half-closed it before: its FIN is in the queue.
                e.c.fin_queued = True
                amount[0] = EPIPE
                return m.BROKEN
            if errno != EINTR:
                return trouble(errno, amount)
    if action == m.PROBE:
        if lx_option(e.fd, SO_ERROR, &value) != 0:
            return trouble(errno, amount)
        if value == 0:
            return m.NO_ERROR
        return trouble(value, amount)
    amount[0] = 0
    return m.BROKEN


cdef void finish(Entry *e, int action) noexcept nogil:
    # Owns e.fd: it is closed here and nowhere else.
    cdef int fd = e.fd
    if e.c.outcome == m.NOT_CONNECTED and lx_listening(fd):
        return  # the caller's mistake, found out late: the driver gives it back
    e.fd = -1
    if action == m.FORGET:
        return
    if action == m.CLOSE_ABORT:
        lx_linger(fd, 1, 0)
    elif not (e.c.outcome == m.PEER_CLOSED and e.c.queue_empty):
        # The application may have set SO_LINGER: the close would block, or reset. (When both sides are done
        # it does neither, and the call can be spared.)
        lx_linger(fd, 0, 0)
    if action == m.CLOSE_SHORT:
        lx_no_time_wait(fd)
    elif e.kept.user_timeout >= 0 and e.c.family == LX_TCP and e.c.outcome != m.PEER_CLOSED and e.c.outcome != m.ACKED:
        lx_user_timeout(fd, e.kept.user_timeout)
    # EINTR: the descriptor is free all the same (close(2), Linux), and a second close could hit another's.
    c_close(fd)


cdef void give_up(Entry *e) noexcept nogil:
    # A signal handler raises: nobody may wait any longer, the kernel gets the rest.
    e.c.abort = False
    finish(e, m.CLOSE)


cdef int turn(Entry *e, int seen, long long amount, long long now) noexcept nogil:
    # Perform until the machine waits, yields or has ended; returns that action.
    cdef int action = m.advance(&e.c, seen, amount, now)
    while action < m.WAIT:
        seen = perform(e, action, &amount)
        if seen == m.INPUT or seen == m.SENT or seen == m.EMPTY or seen == m.NO_ERROR:
            now = lx_now()  # before the others lead to a wait, one of these was seen a moment ago
        action = m.advance(&e.c, seen, amount, now)
    if action >= m.CLOSE:
        finish(e, action)
    return action
