# The driver for one socket: poll(2), with an epoll descriptor borrowed when it has to wait for an ACK. Part of
# _native.pyx.

cdef Report make_report(int outcome, long long drained, long long unacked, long long elapsed, int error, bint lost):
    cdef Report r = Report.__new__(Report)
    r._code = outcome
    r._drained = drained
    r._unacked = unacked
    r._elapsed_ns = elapsed
    r._error = error
    r._lost = lost
    return r


cdef Report report_of(const Entry *e, long long now):
    return make_report(e.c.outcome, e.c.drained, e.c.unacked, now - e.c.started, e.c.error, e.c.lost)


cdef struct Waiter:
    int edges             # an epoll descriptor once it was needed, else -1
    bint stuck            # poll(2) reported an error that recv(2) did not find


cdef void drop_edges(int *edges) noexcept nogil:
    # An epoll descriptor that fails, see errno. When it is not ours any more, its number may be somebody else's file
    # by now (EINVAL: one of another kind).
    if errno != EBADF and errno != EINVAL:
        c_close(edges[0])
    edges[0] = -1


cdef short events_for(const Entry *e) noexcept nogil:
    return (POLLIN if e.c.wants & m.FOR_INPUT else 0) | (POLLOUT if e.c.wants & m.FOR_ROOM else 0)


cdef int wait_for_one(Entry *e, Waiter *w) noexcept nogil:
    # Returns 0, or EINTR.
    cdef pollfd p
    cdef unsigned int place
    cdef long long ns
    cdef int n
    cdef bint by_edge = (e.c.wants & m.FOR_ACK) or w.stuck
    if by_edge and w.edges < 0 and not e.c.polled:
        w.edges = lx_edge_open()
        if w.edges >= 0 and lx_edge_watch(w.edges, e.fd, 0, True) != 0:
            c_close(w.edges)
            w.edges = -1
        if w.edges < 0:
            m.look_often(&e.c, lx_now())
    ns = max(0, e.c.wake_at - lx_now())
    if by_edge and w.edges >= 0:
        n = lx_edge_wait(w.edges, &place, 1, ns)
        if n < 0 and errno != EINTR:
            drop_edges(&w.edges)
            m.look_often(&e.c, lx_now())
            return 0
    else:
        if w.stuck:
            ns = min(ns, m.OFTEN_MOST * m.MS)
        # Without anything to watch poll(2) would still report a hang-up, at once and for ever.
        p.fd = e.fd
        p.events = events_for(e)
        p.revents = 0
        n = lx_poll(&p, 1 if p.events and not w.stuck else 0, ns)
        # An error queue (MSG_ERRQUEUE) is reported as an error without end, and recv(2) finds none: should
        # this turn bring nothing, the next wait is by edge.
        w.stuck = n > 0 and p.revents == POLLERR
    return EINTR if n < 0 and errno == EINTR else 0


cdef bint signals_come_here() except -1:
    # Python's signal handlers run in the main thread only (signal): nobody else need ask for them.
    return threading.get_ident() == threading.main_thread().ident


cdef inline Kept kept_for(const Terms *t, const char *rest) noexcept nogil:
    return Kept(rest, t.user_timeout, 0, NULL, False)


cdef Report close_one(int fd, int family, const Terms *t, const char *rest, long long unsent, long long started):
    # Owns fd; not when it returns None: the socket is listening, and was not touched.
    cdef Entry e
    cdef Waiter w
    cdef int action
    cdef bint checks
    cdef bint interrupted = False
    cdef Kept kept = kept_for(t, rest)
    w.edges = -1
    w.stuck = False
    open_entry(&e, fd, family, t, &kept, unsent, False, started)
    action = turn(&e, m.BEGUN, 0, started)
    if action >= m.CLOSE:
        return report_of(&e, lx_now()) if e.fd < 0 else None
    try:
        checks = signals_come_here()
        while action < m.CLOSE:
            if checks:
                PyErr_CheckSignals()
            with nogil:
                while action < m.CLOSE:
                    interrupted = action == m.WAIT and wait_for_one(&e, &w) == EINTR
                    if not interrupted:
                        action = turn(&e, m.WOKEN, 0, lx_now())
                    if checks:
                        break  # a signal that came outside of the wait has only left a note
    finally:
        if w.edges >= 0:
            c_close(w.edges)
        if e.fd >= 0:
            give_up(&e)
    return report_of(&e, lx_now())
