# What users call: close and its kin, and the socket options. Part of _native.pyx.
#
# Each checks all of its arguments, takes the fd, and leaves the rest to a driver. Their docstrings stand in _offers.py.

cdef object DRAIN = Drain()

# Reports that never differ need not be made again: a Report is a value.
cdef Report ABORTED = make_report(m.ABORTED, 0, -1, 0, 0, False)
cdef Report LEFT_TO_KERNEL = make_report(m.BACKGROUND, 0, -1, 0, 0, False)


cdef Report not_open(int error):
    return make_report(m.ALREADY_CLOSED, 0, -1, 0, error, False)


cdef Report close_plain(int fd, int family, const Terms *t):
    # Owns fd. Background and Abort: two calls, no clock.
    if lx_linger(fd, t.kind == KIND_ABORT, 0) != 0 and (errno == EBADF or errno == ENOTSOCK):
        return not_open(errno)
    if t.user_timeout >= 0 and family == LX_TCP:
        lx_user_timeout(fd, t.user_timeout)
    c_close(fd)
    return ABORTED if t.kind == KIND_ABORT else LEFT_TO_KERNEL


cdef Report close_in_kernel(int fd, int seconds, long long started):
    # Owns fd. The one close that may block; a signal makes it return early, which cannot be told (close(2)).
    if lx_linger(fd, seconds > 0, seconds) != 0 and (errno == EBADF or errno == ENOTSOCK):
        return not_open(errno)
    with nogil:
        c_close(fd)
    PyErr_CheckSignals()
    return make_report(m.BACKGROUND, 0, -1, lx_now() - started, 0, False)


cdef Report close_by_terms(int fd, int family, const Terms *t, long long started):
    # Owns fd.
    if fd < 0:
        return not_open(0)
    if t.kind == KIND_DRAIN or t.kind == KIND_FLUSH:
        return close_one(fd, family, t, NULL, 0, started or lx_now())
    if t.kind == KIND_KERNEL_LINGER:
        return close_in_kernel(fd, t.timeout, started or lx_now())
    return close_plain(fd, family, t)


cdef int goodbye(object sock) except -1:
    # close_notify of a TLS socket, for which a try that cannot block is all there is time for.
    if type(sock) is not Socket and _tls.is_tls(sock):
        _tls.say_goodbye(sock)
    return 0


def close(sock, policy=None):
    cdef Terms t
    cdef int fd, family
    cdef long long started = 0
    read_terms(DRAIN if policy is None else policy, &t)
    fd = check(sock, t.kind < KIND_FLUSH)
    family = family_of(sock) if t.kind > KIND_ABORT or t.user_timeout >= 0 else LX_OTHER
    if type(sock) is not Socket and t.kind != KIND_ABORT and fd >= 0:
        started = lx_now()
        goodbye(sock)
    fd = take(sock, fd)
    return close_by_terms(fd, family, &t, started) or give_back(sock, fd)


def close_fd(fd, policy=None):
    cdef Terms t
    cdef int number
    read_terms(DRAIN if policy is None else policy, &t)
    number = _arguments.check_fd(fd)
    return close_by_terms(number, lx_kind_of_family(lx_family(number)), &t, 0)


def abort(sock):
    cdef Terms t
    t.kind = KIND_ABORT
    t.user_timeout = -1
    return close_by_terms(take(sock, check(sock)), LX_OTHER, &t, 0)


def send_and_close(sock, data, policy=None):
    cdef Terms t
    cdef int fd, family
    cdef Py_buffer view
    if policy is None:
        policy = DRAIN
    read_terms(policy, &t)
    if t.kind != KIND_DRAIN and t.kind != KIND_FLUSH:
        _arguments.check_policy(policy, deadline=True)
    if type(data) is not bytes:
        data = _arguments.check_data(data)
    fd = check(sock, False)
    family = family_of(sock)
    if type(sock) is not Socket and fd >= 0 and _tls.encrypts(sock):
        return _tls.send_and_close(sock, memoryview(data), policy, close)
    PyObject_GetBuffer(data, &view, PyBUF_SIMPLE)
    try:
        fd = take(sock, fd)
        if fd < 0:
            return make_report(m.ALREADY_CLOSED, 0, view.len or -1, 0, 0, view.len > 0)
        return (close_one(fd, family, &t, <const char *> view.buf + view.len, view.len, lx_now())
                or give_back(sock, fd))
    finally:
        PyBuffer_Release(&view)


def close_all(socks, policy=None, *, timeout=None, spread=0.0):
    cdef Terms t
    cdef Kept kept
    cdef Crowd w
    cdef long long within, spread_ns, started, began
    cdef int i, n
    cdef list unique = []
    cdef list numbers = []
    cdef list families = []
    cdef list places = []
    cdef dict place_of = {}
    cdef set fds = set()
    read_terms(DRAIN if policy is None else policy, &t)
    within = _arguments.check_timeout("timeout", timeout)
    spread_ns = _arguments.check_spread(spread)
    for sock in _arguments.check_many(socks):
        if id(sock) not in place_of:
            numbers.append(_arguments.check_unique(check(sock), fds))
            place_of[id(sock)] = len(unique)
            unique.append(sock)
            families.append(family_of(sock))
        places.append(place_of[id(sock)])
    n = len(unique)
    if n == 0:
        return []
    started = lx_now()
    kept = kept_for(&t, NULL)
    open_crowd(&w)
    try:
        if not grow_crowd(&w, n):
            raise MemoryError(f"no memory to close {n} sockets at once; none was touched")
        try:
            for i in range(n):
                if t.kind != KIND_ABORT and (within < 0 or lx_now() - started < within):
                    goodbye(unique[i])
                open_entry(&w.entries[i], take(unique[i], numbers[i]), families[i], &t, &kept, 0, False, started)
                w.size = i + 1
        except BaseException:
            for sock in unique:  # those that were not taken yet; the others have no fd any more
                _ownership.drop(_ownership.take(sock))
            raise
        began = lx_now()  # taking them may have taken a while (TLS), and each has its own time-out
        for i in range(n):
            schedule(&w, i, &t, began, started + within if within >= 0 else -1, spread_ns)
        if t.kind == KIND_DRAIN or t.kind == KIND_FLUSH:
            run_crowd(&w, spread_ns > 0)
            reports = [report_of(&w.entries[i], w.entries[i].c.wake_at) for i in range(n)]
        else:
            reports = close_in_turn(&w, &t, started, within)
    finally:
        free_crowd(&w)
    return [reports[i] for i in places]


cdef void schedule(Crowd *w, int i, const Terms *t, long long began, long long end, long long spread) noexcept:
    # Begin entry i, whose fd stands there, in its turn; `end` of all of them, or -1.
    cdef Entry *e = &w.entries[i]
    cdef Terms mine = t[0]
    cdef long long start = began + spread // w.size * i
    if end >= 0:
        start = min(start, end)
        mine.timeout = min(mine.timeout, end - start)
    open_entry(e, e.fd, e.c.family, &mine, e.kept, 0, w.edges < 0, start)
    e.c.wake_at = start
    if e.fd < 0:
        e.c.outcome = m.ALREADY_CLOSED
        return
    w.alive += 1
    if spread > 0:
        heap_set(w, i)


cdef int run_crowd(Crowd *w, bint spread) except -1:
    cdef int i
    cdef bint checks = signals_come_here()
    with nogil:
        if not spread:
            for i in range(w.size):
                if w.entries[i].fd >= 0:
                    crowd_turn(w, i, m.BEGUN, 0)
    while w.alive > 0:
        if checks:
            PyErr_CheckSignals()
        with nogil:
            while w.alive > 0:
                crowd_round(w)
                if checks:
                    break
    return 0


cdef list close_in_turn(Crowd *w, const Terms *t, long long started, long long within):
    # Background, Abort and KernelLinger: there is nothing that could be waited for together.
    cdef Terms mine = t[0]
    cdef long long left
    cdef int fd, i
    cdef list reports = []
    for i in range(w.size):
        sleep_until(w.entries[i].c.wake_at)
        if t.kind == KIND_KERNEL_LINGER and within >= 0:
            # Whole seconds only. Less than one is no linger at all: rounded to 0 it would be a reset.
            left = max(0, started + within - lx_now())
            mine.timeout = min(t.timeout, left // 1000000000)
        fd = w.entries[i].fd
        w.entries[i].fd = -1
        reports.append(close_by_terms(fd, w.entries[i].c.family, &mine, 0))
    return reports


cdef int sleep_until(long long at) except -1:
    cdef long long left = at - lx_now()
    while left > 0:
        with nogil:
            lx_poll(NULL, 0, left)
        PyErr_CheckSignals()
        left = at - lx_now()
    return 0


# Socket options -------------------------------------------------------------------------------------------

def set_linger(sock, seconds):
    cdef int value = _arguments.check_linger(seconds)
    if lx_linger(borrow(sock), value >= 0, max(value, 0)) != 0:
        system_error(errno)


def get_linger(sock):
    cdef int value = lx_get_linger(borrow(sock))
    if value == -2:
        system_error(errno)
    return value


cdef object known(long long value):
    return value if value >= 0 else None


def tcp_status(sock):
    cdef int fd = borrow(sock)
    cdef int family = lx_family(fd)
    cdef int state = 0
    cdef long long queue = -1, never_sent = -1
    if family < 0:
        system_error(errno)
    if lx_kind_of_family(family) == LX_TCP:
        state = lx_tcp_state(fd)
        if state != LX_SYN_SENT and state != LX_SYN_RECV:  # where Linux says 0, whatever there is
            queue = lx_send_queue(fd)
            never_sent = lx_never_sent(fd)
        if state == LX_CLOSE and queue == 1 and lx_no_data_sent(fd):
            queue = never_sent = 0  # a SYN
        if queue > 0 and (state == LX_FIN_WAIT1 or state == LX_LAST_ACK or state == LX_CLOSING):
            queue -= 1  # the FIN, the last of the queue
            if never_sent > 0:
                never_sent -= 1
    return TcpStatus(_STATE_NAMES[state], known(never_sent), known(queue), known(lx_unread(fd)))
