# What a Closer keeps as a Python object for a socket: a Parcel, which exists only for a future, for data that the
# kernel did not take, and for a user timeout of its own. All of it needs the GIL, but `send_some`. Part of _native.pyx.

@cython.final
cdef class Parcel:
    """What is kept for a socket until it is closed: the data it still has to send, and who wants to know."""

    cdef Kept kept
    cdef Py_buffer view
    cdef char *copy
    cdef object future  # until it was told
    cdef PyObject *loop  # to which it was handed; only for comparison

    def __dealloc__(self):
        self.let_go()

    cdef void let_go(self) noexcept:
        # Of the data. Harmless when it is gone.
        PyBuffer_Release(&self.view)
        free(self.copy)
        self.copy = NULL


# For all that have no parcel and no user timeout.
cdef Kept NOTHING_KEPT = Kept(NULL, -1, 0, NULL, False)


cdef int call_or_complain(object call, tuple arguments) except -1:
    # What is raised here (a sys.exit() in a future's callback) is nobody's to hear, and the loop's thread goes on.
    try:
        call(*arguments)
    except BaseException:
        try:
            threading.excepthook(threading.ExceptHookArgs((*sys.exc_info(), threading.current_thread())))
        except BaseException:  # somebody's hook, or stderr is closed
            pass
    return 0


cdef Report report_of_done(const Done *d):
    return make_report(d.outcome, d.drained, d.unacked, d.elapsed, d.error, d.lost)


cdef int tell(Parcel parcel, const Done *d) except -1:
    cdef object future
    # Its future, which may be kept for long, knows the parcel: the data must not live as long.
    parcel.let_go()
    if d.outcome != DATA_IS_SENT and parcel.future is not None:
        future, parcel.future = parcel.future, None
        call_or_complain(future.set_result, (report_of_done(d),))
    return 0


cdef bint send_some(Handed *h, Parcel parcel, bint by_reference) noexcept nogil:
    # Borrows h.fd. What the kernel takes at once; the rest is kept, by reference only when nobody can change it.
    # False when it can take nothing any more.
    cdef const char *data = <const char *> parcel.view.buf
    cdef long long amount = 0
    # MSG_MORE: the FIN of the half-close rides on the last segment.
    cdef ssize_t n = send(h.fd, data, h.unsent, MSG_DONTWAIT | MSG_NOSIGNAL | MSG_MORE)
    cdef bint goes_on = n >= 0 or errno == EAGAIN or errno == EINTR
    if n > 0:
        h.unsent -= n
        data += n
    elif not goes_on and errno != EPIPE:
        # An error of the connection is told only once. (EPIPE is told again, and the next send knows what it means.)
        h.seen = trouble(errno, &amount)
        h.error = amount
    if h.unsent == 0:
        return True
    parcel.kept.rest = data + h.unsent
    parcel.kept.held = parcel.view.len if by_reference else h.unsent
    if not by_reference:
        parcel.copy = <char *> malloc(h.unsent)
        if parcel.copy:
            memcpy(parcel.copy, data, h.unsent)
            parcel.kept.rest = parcel.copy + h.unsent
        else:
            parcel.kept.held = LLONG_MAX // 2  # no memory is as good as no room
    return goes_on


cdef void drop_inbox(Inbox *box) noexcept:
    # With what is in it: sockets that are left to the kernel, or in a forked child nothing but their parcels.
    cdef Handed *h
    cdef int i
    for i in range(box.size):
        h = &box.places[(box.first + i) % box.room]
        if h.fd >= 0:
            lx_linger(h.fd, 0, 0)
            c_close(h.fd)
        Py_XDECREF(h.kept.parcel)
    free(box.places)
    memset(box, 0, sizeof(Inbox))


cdef inline void drop_done(const Done *d) noexcept:
    # The reference that came with it. (Data that was sent is told of while the socket still holds its parcel.)
    if d.outcome != DATA_IS_SENT:
        Py_XDECREF(d.parcel)
