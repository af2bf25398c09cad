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
import sys
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
    const int LX_TCP, LX_LOCAL, LX_OTHER, LX_SYN_SENT, LX_SYN_RECV, LX_FIN_WAIT1, LX_CLOSE, LX_LAST_ACK
    const int LX_LISTEN, LX_CLOSING
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
    bint lx_never_heard(int fd)
    bint lx_opening(int fd)
    bint lx_no_data_sent(int fd)
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
    int lx_edge_watch(int waiter, int fd, unsigned int place, int output)
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


include "_native_objects.pxi"
include "_native_entry.pxi"
include "_native_one.pxi"
include "_native_crowd.pxi"
include "_native_calls.pxi"
include "_native_loop.pxi"
include "_native_inbox.pxi"
include "_native_fork.pxi"
include "_native_parcel.pxi"
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
