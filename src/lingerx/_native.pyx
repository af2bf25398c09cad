# cython: language_level=3, cdivision=True
"""Does and waits, in C: the native engine.

The only file that calls libc (through `_platform.h`, where the systems differ). It decides nothing: it performs
what the machine answers and waits for what the machine wants. Two drivers wait: poll(2) for one socket, epoll(7)
for many; neither holds the GIL while it waits. Calls that cannot block are made with the GIL held, for giving it
up costs more than they do.

After SHUT_WR a socket is always "writable", so poll(2) cannot wait for an ACK. Edge-triggered epoll with EPOLLOUT
can: its edge comes when the kernel has seen our FIN ACKed (and rarely before). Hence the one for many is
edge-triggered throughout, a turn reads until the kernel has no more, and the one for one borrows an epoll
descriptor when it has to wait for an ACK. Where epoll cannot be had (another system, EMFILE) both look at the
queue from time to time instead.
"""

cimport cython
from cpython.buffer cimport PyBUF_SIMPLE, PyBuffer_Release, PyObject_GetBuffer
from cpython.bytes cimport PyBytes_AS_STRING
from cpython.exc cimport PyErr_CheckSignals
from libc.errno cimport EAGAIN, EBADF, ECONNABORTED, ECONNRESET, EINTR, EINVAL, ENOSYS, ENOTCONN, ENOTSOCK, EPIPE, errno
from libc.limits cimport LLONG_MAX
from libc.stdlib cimport free, malloc, realloc
from libc.string cimport memcpy, memset

from lingerx cimport _machine_c as m
from lingerx.report cimport Report

import _socket
import os
import socket
import threading

from lingerx import _arguments, _ledger, _offers, _ownership, _tls
from lingerx._status import STATES as _STATE_NAMES, TcpStatus
from lingerx.policy import Drain, Policy

cdef extern from "_platform.h" nogil:
    ctypedef int socklen_t
    struct pollfd:
        int fd
        short events
        short revents
    const int POLLIN, POLLOUT, POLLERR
    const int SOCK_STREAM, SO_ERROR, SHUT_WR
    const int MSG_DONTWAIT, MSG_NOSIGNAL, MSG_MORE, MSG_PEEK
    const int LX_TCP, LX_LOCAL, LX_OTHER, LX_FIN_WAIT1, LX_CLOSE, LX_LAST_ACK, LX_LISTEN, LX_CLOSING
    int shutdown(int fd, int how)
    ssize_t send(int fd, const void *data, size_t size, int flags)
    ssize_t recv(int fd, void *data, size_t size, int flags)
    int c_close "close"(int fd)
    long long lx_now()
    int lx_kind_of_family(int family)
    int lx_family(int fd)
    ssize_t lx_discard(int fd, size_t most, bint tcp)
    bint lx_listening(int fd)
    int lx_tcp_state(int fd)
    int lx_never_heard(int fd)
    long long lx_send_queue(int fd)
    int lx_never_sent(int fd)
    long long lx_unread(int fd)
    int lx_linger(int fd, int on, int seconds)
    int lx_get_linger(int fd)
    void lx_user_timeout(int fd, int milliseconds)
    void lx_no_time_wait(int fd)
    int lx_option(int fd, int option, int *value)
    int lx_poll(pollfd *fds, int n, long long ns)
    int lx_edge_open()
    int lx_edge_add(int waiter, int fd, unsigned int place)
    int lx_edge_add_waker(int waiter, int fd, unsigned int place)
    int lx_edge_wait(int waiter, unsigned int *places, int most, long long ns)
    int lx_wake_open(int *fds)
    void lx_wake(int fd)
    void lx_wake_seen(int fd)
    void lx_wake_close(int *fds)
    bint lx_marked(unsigned char *mark)
    void lx_mark(unsigned char *mark, bint on)
    ctypedef struct pthread_mutex_t:
        pass
    int pthread_mutex_init(pthread_mutex_t *mutex, void *attributes)
    int pthread_mutex_lock(pthread_mutex_t *mutex)
    int pthread_mutex_unlock(pthread_mutex_t *mutex)
    int pthread_atfork(void (*prepare)() noexcept nogil, void (*parent)() noexcept nogil,
                       void (*child)() noexcept nogil)

cdef extern from "_fields.h":
    ctypedef struct PyObject
    bint lx_is_a(object thing, object kind)
    Py_ssize_t lx_offset_of_int(object descriptor)
    Py_ssize_t lx_offset_of_slot(object descriptor)
    PyObject *lx_slot_at(object policy, Py_ssize_t offset)
    int lx_int_at(object sock, Py_ssize_t offset)
    int lx_take_int_at(object sock, Py_ssize_t offset, int instead)
    object lx_call(object method, object sock)
    void Py_XINCREF(PyObject *o)
    void Py_XDECREF(PyObject *o)


cdef enum:  # the kinds of policy.py
    KIND_BACKGROUND, KIND_ABORT, KIND_KERNEL_LINGER, KIND_FLUSH, KIND_DRAIN

cdef object DRAIN = Drain()
# The C type's own methods and fields, for sockets whose type is exactly socket.socket: a third of the price. Nobody's
# is when somebody (gevent) has put a class of another shape there.
cdef object Socket = socket.socket if issubclass(socket.socket, _socket.socket) else None
cdef object raw_detach = _socket.socket.detach
cdef object raw_fileno = _socket.socket.fileno
cdef Py_ssize_t type_at = lx_offset_of_int(_socket.socket.__dict__["type"])
cdef Py_ssize_t family_at = lx_offset_of_int(_socket.socket.__dict__["family"])
# CPython keeps the fd as an int right before the family (Modules/socketmodule.h). A socket object that was never
# opened has -1 there, and tells whether this interpreter still does.
cdef Py_ssize_t fd_at = family_at - sizeof(int)
if family_at < 0 or lx_int_at(_socket.socket.__new__(_socket.socket), fd_at) != -1:
    fd_at = -1


# What was asked for, in C ---------------------------------------------------------------------------------

cdef struct Terms:  # as policy.py packs them
    long long kind, timeout, idle, max_bytes, abort, user_timeout, short


cdef Py_ssize_t packed_at = lx_offset_of_slot(Policy._packed)


cdef int read_terms(object policy, Terms *t) except -1:
    cdef const char *packed
    if lx_is_a(policy, Policy) and packed_at >= 0 and lx_slot_at(policy, packed_at) != NULL:
        packed = PyBytes_AS_STRING(<object> lx_slot_at(policy, packed_at))
    else:
        packed = PyBytes_AS_STRING(_arguments.check_policy(policy)._packed)
    memcpy(t, packed, sizeof(Terms))
    return 0


include "_native_entry.pxi"
include "_native_crowd.pxi"


# Reports --------------------------------------------------------------------------------------------------

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


# The driver for one ---------------------------------------------------------------------------------------

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
        if w.edges >= 0 and lx_edge_add(w.edges, e.fd, 0) != 0:
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


# The calls: arguments -------------------------------------------------------------------------------------

cdef int fd_of(object sock) except -2:
    # Borrows. The fd of a stream socket of CPython's own type, or -1: somebody has to look closer.
    if type(sock) is not Socket or type_at < 0 or lx_int_at(sock, type_at) != SOCK_STREAM:
        return -1
    return lx_int_at(sock, fd_at) if fd_at >= 0 else lx_call(raw_fileno, sock)


cdef int check(object sock, bint at_once=True) except -2:
    # Borrows. The fd, or -1 for a socket object that is closed already; raises for a caller's mistake. Without
    # `at_once` a listening TCP socket passes: a half-close does nothing to it and tells (see give_back), for
    # asking first would cost every other close a system call.
    cdef int fd = fd_of(sock)
    if fd > 2 and ((not at_once and family_of(sock) == LX_TCP) or not lx_listening(fd)):
        return fd
    return _arguments.check_socket(sock)  # which knows the words


cdef Report give_back(object sock, int fd):
    # A listening socket was taken: the caller gets it back, and is told.
    _ownership.give_back(sock, fd)
    check(sock)


cdef int family_of(object sock) except -1:
    if type(sock) is Socket and family_at >= 0:
        return lx_kind_of_family(lx_int_at(sock, family_at))
    return lx_kind_of_family(sock.family)


cdef int take(object sock, int fd) except -2:
    # The fd is ours from here on; -1 when somebody else was quicker. `fd`: as `check` saw it.
    if type(sock) is Socket:
        return lx_take_int_at(sock, fd_at, -1) if fd_at >= 0 else lx_call(raw_detach, sock)
    try:
        return _ownership.take(sock)
    except BaseException:
        if fd >= 0 and sock.fileno() < 0:  # a signal handler raised when it had changed hands
            _ownership.drop(fd)
        raise


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


# The calls ------------------------------------------------------------------------------------------------

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
    if type(sock) is not Socket and fd >= 0 and _tls.is_tls(sock):
        return _tls.send_and_close(sock, memoryview(data), policy, close)
    PyObject_GetBuffer(data, &view, PyBUF_SIMPLE)
    try:
        fd = take(sock, fd)
        if fd < 0:
            return make_report(m.ALREADY_CLOSED, 0, view.len, 0, 0, view.len > 0)
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


cdef int system_error(int error) except -1:
    raise OSError(error, os.strerror(error))


cdef int borrow(object sock) except -1:
    # Borrows: the fd of a socket object, listening or not, that is only asked or set.
    if not isinstance(sock, socket.socket):
        _arguments.check_socket(sock)
    cdef int fd = sock.fileno()
    if fd < 0:
        system_error(EBADF)
    return fd


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
        queue = lx_send_queue(fd)
        never_sent = lx_never_sent(fd)
        if queue > 0 and (state == LX_FIN_WAIT1 or state == LX_LAST_ACK or state == LX_CLOSING):
            queue -= 1  # the FIN, the last of the queue
            if never_sent > 0:
                never_sent -= 1
    return TcpStatus(_STATE_NAMES[state], known(never_sent), known(queue), known(lx_unread(fd)))


include "_native_loop.pxi"
include "_native_inbox.pxi"
include "_native_fork.pxi"
include "_native_closer.pxi"


# For the tests --------------------------------------------------------------------------------------------

@cython.final
cdef class Rehearsal:
    """The compiled machine, told its events by hand: a test holds it against the interpreted one."""

    cdef m.Closing c

    def __cinit__(self, int goal, long long timeout, long long idle, long long max_bytes, bint abort, bint short,
                  long long unsent, bint local, bint polled, long long now):
        if goal != m.DRAINING and goal != m.FLUSHING:
            raise ValueError(f"goal is DRAINING or FLUSHING; got {goal}")
        m.begin(&self.c, goal, timeout, idle, max_bytes, abort, short, unsent, local, polled, now)
        self.c.family = self.c.watched = 0

    def advance(self, int seen, long long amount, long long now, int never_sent=-1):
        if not 0 <= seen < m.EVENTS:
            raise ValueError(f"no event has the number {seen}")
        self.c.never_sent = min(2, never_sent)
        return m.advance(&self.c, seen, amount, now)

    def state(self):
        cdef dict state = self.c
        del state["family"], state["watched"]
        state["want"] = m.allowance(&self.c)
        return state


for _name in _offers.OFFERS:
    globals()[_name].__doc__ = getattr(_offers, _name).__doc__
