# The Loop that a Closer has: the hot side, with the GIL, and what its thread does between two rounds. Part of
# _native.pyx.
#
# The common path (`hand_over` for a plain socket without data) makes one system call, does not release the GIL and
# calls no Python code.

BOUNDS[:] = [round(_bound * 1e9) for _bound in _ledger.LINGER_TIMES]

pthread_mutex_init(&all_loops, NULL)
pthread_atfork(before_fork, after_fork_in_parent, after_fork_in_child)

cdef enum:
    REMEMBERED_FDS = 65536
    # Looks, 0.5 ms apart, for hot threads to come out before a fork goes on without them: a guess. They need
    # microseconds, or a few milliseconds to say goodbye on TLS; one that forks in the middle of it never will.
    FORK_PATIENCE = 100

# fd numbers that were seen not to listen. A listening socket keeps its number and is asked before it is marked; the
# numbers of connections come again and again, and asking for each would double what a close costs.
cdef unsigned char connections[REMEMBERED_FDS]


cdef void forget_connection(int fd) noexcept nogil:
    if fd < REMEMBERED_FDS:
        lx_mark(&connections[fd], False)


cdef int check_connection(object sock) except -2:
    # Borrows. As `check`, without a system call for a number that was seen before.
    cdef int fd = fd_of(sock)
    if fd > 2 and fd < REMEMBERED_FDS and lx_marked(&connections[fd]):
        return fd
    fd = check(sock)
    if 0 <= fd < REMEMBERED_FDS:
        lx_mark(&connections[fd], True)
    return fd


cdef class Loop:
    """What a Closer has: takes sockets over, and closes them in `run`, for which a thread is needed."""

    cdef LoopState s
    cdef Terms terms
    cdef Kept kept  # for those that come without a policy and need no parcel
    cdef bint enlisted
    cdef object start, its_thread
    cdef list idle_calls  # under `lock`, too
    cdef readonly object policy
    cdef public object name, exit_timeout
    cdef object __weakref__

    def __cinit__(self, policy, int max_pending, long long max_buffered, int on_full, long long collect, start):
        cdef int error
        renew_loop(&self.s)
        enlist(&self.s)
        self.enlisted = True
        read_terms(policy, &self.terms)
        self.kept = kept_for(&self.terms, NULL)
        self.policy = policy
        self.start = start
        self.idle_calls = []
        self.s.max_pending = max_pending
        self.s.max_buffered = max_buffered
        self.s.on_full = on_full
        self.s.collect = collect
        error = open_fds(&self.s)
        if error != 0:
            system_error(error)

    def __dealloc__(self):
        # Owns what is in flight, if the thread could not be started or has left.
        cdef LoopState *s = &self.s
        cdef int i
        if not self.enlisted:  # __cinit__ has refused its arguments
            return
        delist(s)
        self.drop_leftovers()
        for i in range(s.w.size):
            if s.w.entries[i].fd >= 0:
                give_up(&s.w.entries[i])
                Py_XDECREF(s.w.entries[i].kept.parcel)
        drop_inbox(&s.taken)
        drop_inbox(&s.inbox)
        for i in range(s.done.size):
            drop_done(&s.done.places[(s.done.first + i) % s.done.room])
        close_fds(s)
        free_crowd(&s.w)
        free(s.done.places)

    @property
    def thread(self):
        return self.its_thread if self.s.has_thread else None

    @thread.setter
    def thread(self, thread):
        self.its_thread = thread
        self.s.has_thread = thread is not None

    def intake(self):
        return Intake(self)

    # The hot side -----------------------------------------------------------------------------------------

    cdef int enter(self) except -1:
        # Whoever is in here is waited for: the loop ends only after him. Raises when it takes no more sockets.
        cdef bint is_open
        pthread_mutex_lock(&self.s.lock)
        is_open = self.s.open
        self.s.entering += is_open
        pthread_mutex_unlock(&self.s.lock)
        if not is_open:
            raise RuntimeError("this closer was shut down; the socket is untouched")
        return 0

    cdef void leave(self) noexcept:
        pthread_mutex_lock(&self.s.lock)
        leave_loop(&self.s)
        pthread_mutex_unlock(&self.s.lock)

    cdef int start_thread(self) except -1:
        pthread_mutex_lock(&self.s.lock)
        open_fds(&self.s)
        pthread_mutex_unlock(&self.s.lock)
        self.start(self)
        return 0

    cdef Report hand_over(self, object sock, object policy, object data, object future, bint *lost):
        # Returns the Report when the socket is closed already, else None. lost: whether some of `data` is known to be.
        cdef Handed h
        cdef Parcel parcel = None
        cdef Report report
        cdef int fd
        if policy is None:
            h.terms = self.terms
            h.kept = &self.kept
        else:
            read_terms(policy, &h.terms)
            if h.terms.kind == KIND_KERNEL_LINGER:
                _arguments.check_policy(policy, blocking=False)  # which refuses it
            h.kept = &NOTHING_KEPT
        if data is not None:
            if h.terms.kind != KIND_DRAIN and h.terms.kind != KIND_FLUSH:
                _arguments.check_policy(self.policy if policy is None else policy, deadline=True)  # which refuses it
            if type(data) is not bytes:
                data = _arguments.check_data(data)
            if type(sock) is not Socket:
                _tls.check_unencrypted(sock)
        fd = check_connection(sock) if h.terms.kind >= KIND_FLUSH else check(sock)
        h.family = family_of(sock)
        if data is not None or future is not None or (policy is not None and h.terms.user_timeout >= 0):
            parcel = Parcel.__new__(Parcel)
            parcel.kept = Kept(NULL, h.terms.user_timeout, 0, <PyObject *> parcel, False)
            parcel.loop = <PyObject *> self
            if future is not None:
                parcel.future = future
                future._parcel = parcel  # for `expire`
            if data is not None:
                PyObject_GetBuffer(data, &parcel.view, PyBUF_SIMPLE)
        self.enter()
        try:
            if not self.s.has_thread:
                self.start_thread()
            if h.terms.kind != KIND_ABORT:
                goodbye(sock)
            h.now = lx_now()
            h.fd = take(sock, fd)
        except BaseException:
            self.leave()
            raise
        report = self.deliver(&h, parcel, type(data) is bytes, lost)
        if report is not None and parcel is not None:
            parcel.future = None  # its caller tells it
            parcel.let_go()
        return report

    cdef Report deliver(self, Handed *h, Parcel parcel, bint by_reference, bint *lost):
        # Owns h.fd. Nothing in here can raise before it has changed hands.
        cdef Handed instead
        cdef Done mine
        cdef Done others
        cdef long long amount = 0
        cdef bint pushed
        h.unsent = 0 if parcel is None else parcel.view.len
        h.seen = m.BEGUN
        h.error = 0
        if h.fd < 0 or h.terms.kind < KIND_FLUSH:
            return self.close_at_once(h)
        if h.unsent > 0:
            lost[0] = not send_some(h, parcel, by_reference)
            if h.unsent == 0 or parcel.copy:
                PyBuffer_Release(&parcel.view)  # its owner may want to change it
        if h.unsent == 0:
            h.seen = m.HALF_CLOSED if shutdown(h.fd, SHUT_WR) == 0 else trouble(errno, &amount)
            h.error = amount
        if parcel is not None and (h.unsent > 0 or parcel.future is not None or parcel.kept.user_timeout >= 0):
            h.kept = &parcel.kept
            Py_XINCREF(h.kept.parcel)
        pthread_mutex_lock(&self.s.lock)
        pushed = push(&self.s, h, &instead)
        if pushed and instead.fd < 0:
            leave_loop(&self.s)
            pthread_mutex_unlock(&self.s.lock)
            return None
        pthread_mutex_unlock(&self.s.lock)
        # No room for one of them, or both. The loop may well be asleep by now: leave_loop wakes it for what it has
        # to tell.
        if not pushed:
            shed_handed(&self.s, h, &mine)
            mine.parcel = NULL  # its caller is still here
        if instead.fd >= 0:
            shed_handed(&self.s, &instead, &others)
        pthread_mutex_lock(&self.s.lock)
        if not pushed:
            book_done(&self.s, &mine, 0)
        if instead.fd >= 0:
            book_done(&self.s, &others, instead.kept.held)
        leave_loop(&self.s)
        pthread_mutex_unlock(&self.s.lock)
        if pushed:
            return None
        Py_XDECREF(h.kept.parcel)
        return report_of_done(&mine)

    cdef Report close_at_once(self, Handed *h):
        # Owns h.fd.
        cdef Report report
        if h.fd < 0:
            report = make_report(m.ALREADY_CLOSED, 0, h.unsent or -1, 0, 0, h.unsent > 0)
        else:
            report = close_plain(h.fd, h.family, &h.terms)
        pthread_mutex_lock(&self.s.lock)
        self.s.ledger.handed_over += 1
        self.s.ledger.pending += 1
        book(&self.s, report._code, 0, 0, 0)
        leave_loop(&self.s)
        pthread_mutex_unlock(&self.s.lock)
        return report

    def expire(self, future):
        cdef object parcel = getattr(future, "_parcel", None)
        if type(parcel) is not Parcel or (<Parcel> parcel).loop != <PyObject *> self:
            raise ValueError(f"future is one that submit of this closer has returned; got {future!r}")
        lx_mark(&(<Parcel> parcel).kept.expires, True)
        pthread_mutex_lock(&self.s.lock)
        self.s.expiring = True
        if not self.s.over:
            wake_loop(&self.s)
        pthread_mutex_unlock(&self.s.lock)

    def counters(self):
        cdef Ledger now
        pthread_mutex_lock(&self.s.lock)
        now = self.s.ledger
        pthread_mutex_unlock(&self.s.lock)
        return (now.handed_over, now.pending, now.buffered, now.drained, tuple(now.outcomes), tuple(now.times),
                now.total_time)

    def is_open(self):
        cdef bint is_open
        pthread_mutex_lock(&self.s.lock)
        is_open = self.s.open
        pthread_mutex_unlock(&self.s.lock)
        return is_open

    def stop(self, long long timeout):
        cdef LoopState *s = &self.s
        cdef long long stop_at = lx_now() + timeout if timeout >= 0 else LLONG_MAX
        pthread_mutex_lock(&s.lock)
        if not s.over:
            s.open = False
            if stop_at < s.stop_at:
                s.stop_at = stop_at
                s.stop_time = timeout
            if not s.has_thread and s.entering == 0 and s.ledger.pending == 0:
                end_loop(s)
            wake_loop(s)
        pthread_mutex_unlock(&s.lock)

    # The thread -------------------------------------------------------------------------------------------

    def run(self):
        cdef int state = GO_ON
        cdef int life = self.s.lives
        cdef int n
        while state != OVER:
            with nogil:
                pthread_mutex_lock(&self.s.working)
                state = loop_step(&self.s)
                while state == GO_ON:
                    state = loop_step(&self.s)
                pthread_mutex_unlock(&self.s.working)
            if state == TELL:
                # As many as there are now: those that come meanwhile must not keep the sockets waiting.
                pthread_mutex_lock(&self.s.lock)
                n = self.s.done.size
                pthread_mutex_unlock(&self.s.lock)
                while n > 0 and self.s.lives == life and self.tell_one():
                    n -= 1
                if self.s.lives == life:
                    self.tell_idle()
            if self.s.lives != life:
                return  # a callback has forked, and this is the child

    cdef bint tell_one(self) except -1:
        cdef DoneList *done = &self.s.done
        cdef Done d
        cdef Parcel parcel
        pthread_mutex_lock(&self.s.lock)
        if done.size == 0:
            pthread_mutex_unlock(&self.s.lock)
            return False
        d = done.places[done.first]
        done.first = (done.first + 1) % done.room
        done.size -= 1
        self.s.telling = True
        pthread_mutex_unlock(&self.s.lock)
        parcel = <Parcel> d.parcel
        drop_done(&d)
        tell(parcel, &d)
        pthread_mutex_lock(&self.s.lock)
        self.s.telling = False
        pthread_mutex_unlock(&self.s.lock)
        return True

    cdef int tell_idle(self) except -1:
        cdef list calls = []
        pthread_mutex_lock(&self.s.lock)
        if is_idle(&self.s):
            self.s.awaited = False
            self.idle_calls, calls = calls, self.idle_calls
        pthread_mutex_unlock(&self.s.lock)
        for call in calls:
            call_or_complain(call, ())
        return 0

    def when_idle(self, call):
        cdef bint idle
        pthread_mutex_lock(&self.s.lock)
        try:
            idle = is_idle(&self.s)
            if not idle:
                self.idle_calls.append(call)
                self.s.awaited = True
        finally:
            pthread_mutex_unlock(&self.s.lock)
        if idle:
            call()

    def forget(self, call):
        pthread_mutex_lock(&self.s.lock)
        try:
            if call in self.idle_calls:
                self.idle_calls.remove(call)
        finally:
            pthread_mutex_unlock(&self.s.lock)

    # Fork -------------------------------------------------------------------------------------------------
    # What needs the GIL. All else is done by pthread_atfork(3).

    def before_fork(self):
        cdef int looks = FORK_PATIENCE
        while looks > 0 and self.is_entered():
            with nogil:
                lx_poll(NULL, 0, 500000)
            looks -= 1

    cdef bint is_entered(self) noexcept:
        cdef bint entered
        pthread_mutex_lock(&self.s.lock)
        entered = self.s.entering > 0
        pthread_mutex_unlock(&self.s.lock)
        return entered

    def after_fork_in_parent(self):
        pass

    def after_fork_in_child(self):
        self.its_thread = None
        self.idle_calls = []
        self.drop_leftovers()

    cdef void drop_leftovers(self) noexcept:
        cdef LoopState *s = &self.s
        cdef int i
        for i in range(s.left_size):
            if s.left_entries[i].fd == COPY_IS_CLOSED:
                Py_XDECREF(s.left_entries[i].kept.parcel)
        drop_inbox(&s.left_taken)
        drop_inbox(&s.left_inbox)
        for i in range(s.left_done.size):
            drop_done(&s.left_done.places[(s.left_done.first + i) % s.left_done.room])
        s.left_size = s.left_done.size = 0
        free(s.left_entries)
        free(s.left_done.places)
        s.left_entries = NULL
        s.left_done.places = NULL


@cython.final
cdef class Intake:
    """Hands sockets to a Loop, which takes no more when nobody holds its Intake any longer."""

    cdef Loop loop

    def __cinit__(self, Loop loop not None):
        self.loop = loop

    def __del__(self):
        self.loop.stop(-1)

    def close(self, sock, policy=None):
        cdef bint lost = False
        self.loop.hand_over(sock, policy, None, None, &lost)

    def send_and_close(self, sock, data, policy=None):
        cdef Report report
        cdef bint lost = False
        if data is None:
            _arguments.check_data(data)  # which refuses it
        report = self.loop.hand_over(sock, policy, data, None, &lost)
        return not lost and (report is None or not report._lost)

    def submit(self, future, sock, data, policy):
        cdef bint lost = False
        return self.loop.hand_over(sock, policy, data, future, &lost)

    def expire(self, future):
        self.loop.expire(future)
