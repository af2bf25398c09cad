# The loop behind Closer. Part of _native.pyx.
#
# Two sides meet here. The hot side (any thread, with the GIL) half-closes and puts the fd into an inbox. The loop
# (one thread, without the GIL) takes the whole inbox at once, every few milliseconds, and runs a crowd. `lock`
# guards what both touch and is never held for longer than a few stores; `working` is held by the loop whenever it
# does not wait, so that a fork finds its sockets in order. No policy is decided here, and no Python object is
# touched without the GIL: what the caller keeps for a socket is a parcel, resolved by `run` in between.

cdef extern from "pthread.h" nogil:
    ctypedef struct pthread_mutex_t:
        pass
    int pthread_mutex_init(pthread_mutex_t *mutex, void *attributes)
    int pthread_mutex_lock(pthread_mutex_t *mutex)
    int pthread_mutex_trylock(pthread_mutex_t *mutex)
    int pthread_mutex_unlock(pthread_mutex_t *mutex)


cdef enum:
    OUTCOMES = 12
    BUCKETS = 12
    FULL_SHED_OLDEST = 0
    FULL_BACKGROUND = 1
    FULL_ABORT_OLDEST = 2


# Upper bounds of the histogram of linger times, in ns; the last bucket is for what took longer.
cdef long long BOUNDS[BUCKETS - 1]
BOUNDS[:] = [1000000, 5000000, 10000000, 50000000, 100000000, 500000000, 1000000000, 5000000000, 10000000000,
             30000000000, 60000000000]

cdef struct Ledger:
    long long handed_over, drained, buffered
    long long outcomes[OUTCOMES]
    long long times[BUCKETS]
    long long total_time

cdef struct Handed:  # a socket on its way from the hot side to the loop
    Terms terms
    long long now, unsent, held
    const char *rest
    PyObject *parcel
    int fd, error
    unsigned char seen, family

cdef struct Turn:  # a place in the order of admission; stale when the stamp is another by now
    int slot
    unsigned int stamp

cdef struct Done:  # a parcel whose socket is closed
    PyObject *parcel
    int outcome, error
    long long drained, unacked, elapsed
    bint lost


@cython.final
cdef class Parcel:
    """What is kept for a socket until it is closed: the data it still has to send, and who wants to know."""

    cdef Py_buffer view
    cdef long long held   # bytes, counted against max_buffered
    cdef object future

    def __dealloc__(self):
        PyBuffer_Release(&self.view)


cdef class Loop:
    cdef dict __dict__
    cdef object __weakref__
    cdef Crowd w
    cdef pthread_mutex_t lock, working
    # guarded by `lock`
    cdef Ledger ledger
    cdef Handed *inbox
    cdef int inbox_size, inbox_room
    cdef bint asleep, open, forked
    cdef long long stop_at
    # the loop's own
    cdef Handed *taken
    cdef int taken_room
    cdef int *free_slots
    cdef int free_size
    cdef unsigned int *stamps
    cdef Turn *order
    cdef int order_first, order_size, order_room
    cdef Done *done
    cdef int done_size, done_room
    cdef bint busy, stopping
    # settled when it is made
    cdef Terms terms
    cdef int wake[2]
    cdef int max_pending, on_full
    cdef long long max_buffered, collect
    cdef readonly object policy
    # set with the GIL
    cdef public bint started

    def __cinit__(self, policy, int max_pending, long long max_buffered, int on_full, long long collect):
        self.wake[0] = self.wake[1] = -1
        read_terms(policy, &self.terms)
        self.policy = policy
        self.max_pending = max_pending
        self.max_buffered = max_buffered
        self.on_full = on_full
        self.collect = collect
        self.set_up()

    cdef int set_up(self) except -1:
        pthread_mutex_init(&self.lock, NULL)
        pthread_mutex_init(&self.working, NULL)
        open_crowd(&self.w)
        if lx_wake_open(self.wake) != 0:
            system_error(errno)
        self.w.waker = self.wake[0]
        if self.w.edges >= 0 and lx_edge_add(self.w.edges, self.w.waker, WAKER) != 0:
            c_close(self.w.edges)
            self.w.edges = -1
        self.open = True
        return 0

    def __dealloc__(self):
        self.drop_all(False)

    cdef void drop_all(self, bint copies):
        # Closes what there is. `copies`: the fds are a forked child's, and the connections the parent's: then
        # nothing may be asked of the socket, only the number is given back.
        cdef int i
        for i in range(self.w.size):
            if self.w.entries[i].fd >= 0:
                Py_XDECREF(self.w.entries[i].parcel)
                if copies:
                    c_close(self.w.entries[i].fd)
                    self.w.entries[i].fd = -1
        for i in range(self.inbox_size):
            c_close(self.inbox[i].fd)
            Py_XDECREF(self.inbox[i].parcel)
        for i in range(self.done_size):
            Py_XDECREF(self.done[i].parcel)
        self.inbox_size = self.done_size = 0
        free_crowd(&self.w)
        lx_wake_close(self.wake)
        free(self.inbox)
        free(self.taken)
        free(self.free_slots)
        free(self.stamps)
        free(self.order)
        free(self.done)
        self.inbox = self.taken = NULL
        self.free_slots = NULL
        self.stamps = NULL
        self.order = NULL
        self.done = NULL
        self.inbox_room = self.taken_room = self.free_size = self.done_room = 0
        self.order_first = self.order_size = self.order_room = 0

    # The hot side -----------------------------------------------------------------------------------------

    cdef void lock_hot(self) noexcept:
        # With the GIL. A thread that forks holds the lock while other handlers of the fork run, and needs the GIL
        # before it can let go.
        if pthread_mutex_trylock(&self.lock) != 0:
            with nogil:
                pthread_mutex_lock(&self.lock)

    cdef bint push(self, Handed *h) noexcept:
        # Owns h.fd when it returns True.
        cdef bint wake = False, pushed = False
        cdef int room
        cdef void *bigger
        cdef long long pending
        self.lock_hot()
        pending = self.pending_now()
        self.ledger.handed_over += 1
        if pending < self.max_pending or (self.on_full != FULL_BACKGROUND and pending < 2 * self.max_pending):
            if self.ledger.buffered + h.held <= self.max_buffered or h.held == 0:
                if self.inbox_size == self.inbox_room:
                    room = max(64, 2 * self.inbox_room)
                    bigger = realloc(self.inbox, room * sizeof(Handed))
                    if bigger:
                        self.inbox = <Handed *> bigger
                        self.inbox_room = room
                if self.inbox_size < self.inbox_room:
                    self.inbox[self.inbox_size] = h[0]
                    self.inbox_size += 1
                    self.ledger.buffered += h.held
                    pushed = True
                    wake = self.asleep
                    self.asleep = False
        if not pushed:
            self.ledger.outcomes[m.SHED] += 1
            self.ledger.times[0] += 1
        pthread_mutex_unlock(&self.lock)
        if wake:
            lx_wake(self.wake[1])
        return pushed

    cdef long long pending_now(self) noexcept nogil:
        cdef long long pending = self.ledger.handed_over
        cdef int i
        for i in range(OUTCOMES):
            pending -= self.ledger.outcomes[i]
        return pending

    cdef void count(self, int outcome) noexcept:
        # One that was closed on the hot side.
        self.lock_hot()
        self.ledger.handed_over += 1
        self.ledger.outcomes[outcome] += 1
        self.ledger.times[0] += 1
        pthread_mutex_unlock(&self.lock)

    cdef object hand_over(self, object sock, object policy, object data, object future):
        # Returns the Report when the socket is closed already, else None.
        cdef Handed h
        cdef Parcel parcel = None
        cdef Report report
        cdef ssize_t n
        cdef int fd
        cdef long long amount = 0
        if policy is None:
            if data is not None and self.terms.kind < KIND_FLUSH:
                _arguments.check_policy(self.policy, deadline=True)  # which refuses it
            h.terms = self.terms
        else:
            _arguments.check_policy(policy, deadline=data is not None, blocking=False)
            read_terms(policy, &h.terms)
        fd = check(sock, h.terms.kind < KIND_FLUSH)
        if not self.open:
            raise RuntimeError("this closer was shut down; the socket is untouched")
        if not self.started:
            self._start()
        h.family = family_of(sock)
        if data is not None or future is not None:
            parcel = Parcel.__new__(Parcel)
            parcel.future = future
        h.unsent = 0
        h.rest = NULL
        if data is not None:
            if type(data) is not bytes:
                data = bytes(_arguments.check_data(data))  # the caller may change it
            PyObject_GetBuffer(data, &parcel.view, PyBUF_SIMPLE)
            h.unsent = parcel.view.len
            h.rest = <const char *> parcel.view.buf + h.unsent
        if h.terms.kind != KIND_ABORT:
            goodbye(sock)
        h.now = lx_now()
        h.fd = take(sock, fd)
        if h.fd < 0:
            self.count(m.ALREADY_CLOSED)
            return make_report(m.ALREADY_CLOSED, 0, h.unsent or -1, 0, 0, h.unsent > 0)
        if h.terms.kind < KIND_FLUSH:
            report = close_plain(h.fd, h.family, &h.terms)
            self.count(report._code)
            return report
        if h.unsent > 0:
            # MSG_MORE: the FIN of the half-close below rides on the last segment.
            n = send(h.fd, h.rest - h.unsent, h.unsent, MSG_DONTWAIT | MSG_NOSIGNAL | MSG_MORE)
            if n > 0:
                h.unsent -= n
        h.seen = m.BEGUN
        h.error = 0
        if h.unsent == 0:
            h.seen = m.HALF_CLOSED if shutdown(h.fd, SHUT_WR) == 0 else trouble(errno, &amount)
            h.error = amount
            if future is None:
                parcel = None
        h.parcel = NULL
        h.held = 0
        if parcel is not None:
            if h.unsent > 0:
                h.held = parcel.held = parcel.view.len
            h.parcel = <PyObject *> parcel
            Py_INCREF(parcel)
        if self.push(&h):
            return None
        Py_XDECREF(h.parcel)
        report = make_report(m.SHED, 0, h.unsent or -1, lx_now() - h.now, 0, h.unsent > 0)
        lx_linger(h.fd, self.on_full == FULL_ABORT_OLDEST, 0)
        c_close(h.fd)
        return report

    def close(self, sock, policy=None):
        self.hand_over(sock, policy, None, None)

    def send_and_close(self, sock, data, policy=None):
        if data is None:
            _arguments.check_data(data)  # which refuses it
        report = self.hand_over(sock, policy, data, None)
        return report is None or report.delivered is not False

    def _submit(self, future, sock, data, policy):
        return self.hand_over(sock, policy, data, future)

    # The loop -----------------------------------------------------------------------------------------------

    cdef bint make_room(self) noexcept nogil:
        # For one more. False when there is no memory.
        cdef int size = max(64, 2 * self.w.size), old = self.w.size, i
        cdef void *bigger
        if self.free_size > 0:
            return True
        bigger = realloc(self.free_slots, size * sizeof(int))
        if not bigger:
            return False
        self.free_slots = <int *> bigger
        bigger = realloc(self.stamps, size * sizeof(unsigned int))
        if not bigger:
            return False
        self.stamps = <unsigned int *> bigger
        if not grow_crowd(&self.w, size, True):
            return False
        for i in range(old, size):
            self.stamps[i] = 0
            self.free_slots[self.free_size] = size - 1 - (i - old)
            self.free_size += 1
        return True

    cdef bint note_order(self, int slot) noexcept nogil:
        cdef int i, k = 0, room
        cdef Turn t
        cdef Turn *bigger
        if self.order_size == self.order_room:
            room = max(128, 4 * self.w.size)
            bigger = <Turn *> malloc(room * sizeof(Turn))
            if not bigger:
                return False
            for i in range(self.order_size):
                t = self.order[(self.order_first + i) % self.order_room]
                if self.stamps[t.slot] == t.stamp:
                    bigger[k] = t
                    k += 1
            free(self.order)
            self.order = bigger
            self.order_room = room
            self.order_first = 0
            self.order_size = k
        self.order[(self.order_first + self.order_size) % self.order_room] = Turn(slot, self.stamps[slot])
        self.order_size += 1
        return True

    cdef void admit(self, Handed *h) noexcept nogil:
        # Owns h.fd.
        cdef Entry *e
        cdef int slot
        if not self.make_room() or not self.note_order(self.free_slots[self.free_size - 1]):
            lx_linger(h.fd, 0, 0)
            c_close(h.fd)
            self.finished(h.parcel, m.SHED, 0, h.unsent or -1, lx_now() - h.now, 0, h.unsent > 0)
            return
        self.free_size -= 1
        slot = self.free_slots[self.free_size]
        e = &self.w.entries[slot]
        open_entry(e, h.fd, h.family, &h.terms, h.rest, h.unsent, self.w.edges < 0, h.now)
        e.parcel = h.parcel
        self.w.alive += 1
        if self.stopping:
            self.hurry(e)
        if h.seen != m.BEGUN:
            m.advance(&e.c, m.BEGUN, 0, h.now)  # which asks for the half-close that was made on the hot side
        crowd_turn(&self.w, slot, h.seen, h.error)

    cdef void hurry(self, Entry *e) noexcept nogil:
        e.c.deadline = min(e.c.deadline, self.stop_at)
        e.c.wake_at = min(e.c.wake_at, self.stop_at)

    cdef void shed_oldest(self) noexcept nogil:
        cdef Turn t
        while self.order_size > 0:
            t = self.order[self.order_first]
            self.order_first = (self.order_first + 1) % self.order_room
            self.order_size -= 1
            if self.stamps[t.slot] == t.stamp and self.w.entries[t.slot].fd >= 0:
                self.w.entries[t.slot].c.abort = self.on_full == FULL_ABORT_OLDEST
                crowd_turn(&self.w, t.slot, m.SHEDDING, 0)
                return

    cdef void finished(self, PyObject *parcel, int outcome, long long drained, long long unacked, long long elapsed,
                       int error, bint lost) noexcept nogil:
        cdef int room, bucket = 0
        cdef void *bigger
        while bucket < BUCKETS - 1 and elapsed > BOUNDS[bucket]:
            bucket += 1
        pthread_mutex_lock(&self.lock)
        self.ledger.outcomes[outcome] += 1
        self.ledger.drained += drained
        self.ledger.times[bucket] += 1
        self.ledger.total_time += elapsed
        if parcel:
            self.ledger.buffered -= (<Parcel> parcel).held
        pthread_mutex_unlock(&self.lock)
        if not parcel:
            return
        if self.done_size == self.done_room:
            room = max(64, 2 * self.done_room)
            bigger = realloc(self.done, room * sizeof(Done))
            if not bigger:
                return  # the parcel is never resolved: there is no memory to say so
            self.done = <Done *> bigger
            self.done_room = room
        self.done[self.done_size] = Done(parcel, outcome, error, drained, unacked, elapsed, lost)
        self.done_size += 1

    cdef void settle(self) noexcept nogil:
        # Book those that were closed, and free their slots.
        cdef Entry *e
        cdef int k, slot
        for k in range(self.w.ended_size):
            slot = self.w.ended[k]
            e = &self.w.entries[slot]
            if e.fd >= 0:  # a listening socket, which nobody wants back
                c_close(e.fd)
                e.fd = -1
            self.finished(e.parcel, e.c.outcome, e.c.drained, e.c.unacked, e.c.wake_at - e.c.started, e.c.error,
                          e.c.lost)
            self.stamps[slot] += 1
            self.free_slots[self.free_size] = slot
            self.free_size += 1
        self.w.ended_size = 0

    cdef int step(self) noexcept nogil:
        # One round. Returns 0: go on. 1: there are parcels to resolve. 2: it is over.
        cdef unsigned int places[64]
        cdef Handed *taken
        cdef int i, n, room, happened
        cdef bint sleep, stop
        pthread_mutex_lock(&self.lock)
        taken = self.inbox
        n = self.inbox_size
        room = self.inbox_room
        self.inbox = self.taken
        self.inbox_room = self.taken_room
        self.inbox_size = 0
        sleep = n == 0 and not self.busy and self.w.ready_size == 0
        stop = not self.open
        if stop and n == 0 and self.w.alive == 0:
            self.taken = taken
            self.taken_room = room
            pthread_mutex_unlock(&self.lock)
            return 2
        self.asleep = sleep
        pthread_mutex_unlock(&self.lock)
        self.taken = taken
        self.taken_room = room
        if stop and not self.stopping:
            self.stopping = True
            for i in range(self.w.size):
                if self.w.entries[i].fd >= 0:
                    self.hurry(&self.w.entries[i])
                    if self.w.entries[i].place >= 0:
                        heap_set(&self.w, i)
        for i in range(n):
            self.admit(&taken[i])
        while self.w.alive > self.max_pending:
            self.shed_oldest()
        happened = 0
        if sleep or self.w.ready_size > 0:
            pthread_mutex_unlock(&self.working)
            happened = crowd_wait(&self.w, places, crowd_patience(&self.w))
            pthread_mutex_lock(&self.working)
        else:
            # There is something going on: collect for a moment, then take all of it in one go.
            pthread_mutex_unlock(&self.working)
            lx_poll(NULL, 0, self.collect)
            happened = crowd_wait(&self.w, places, 0)
            pthread_mutex_lock(&self.working)
        if self.forked:
            return 2
        crowd_serve(&self.w, places, max(0, happened))
        self.busy = n > 0 or happened > 0 or self.w.ended_size > 0
        self.settle()
        return 1 if self.done_size > 0 else 0

    def run(self):
        """Run until `stop` was called and everything is closed. For the closer's thread."""
        cdef int state = 0
        cdef int i
        cdef Done d
        while state != 2:
            with nogil:
                pthread_mutex_lock(&self.working)
                state = self.step()
                while state == 0:
                    state = self.step()
                pthread_mutex_unlock(&self.working)
            for i in range(self.done_size):
                d = self.done[i]
                parcel = <Parcel> d.parcel
                Py_XDECREF(d.parcel)
                if parcel.future is not None:
                    parcel.future.set_result(make_report(d.outcome, d.drained, d.unacked, d.elapsed, d.error, d.lost))
            self.done_size = 0

    def stop(self, long long timeout):
        """Take no more sockets; those in flight have `timeout` ns. Wakes the loop."""
        self.lock_hot()
        if self.open:
            self.open = False
            self.stop_at = lx_now() + timeout
        self.asleep = False
        pthread_mutex_unlock(&self.lock)
        lx_wake(self.wake[1])

    def counters(self):
        """(handed over, pending, buffered, drained, per outcome, histogram, total linger time in ns), at one moment."""
        cdef Ledger now
        cdef long long pending
        self.lock_hot()
        now = self.ledger
        pending = self.pending_now()
        pthread_mutex_unlock(&self.lock)
        return (now.handed_over, pending, now.buffered, now.drained, tuple(now.outcomes), tuple(now.times), now.total_time)

    # Fork -----------------------------------------------------------------------------------------------------

    def before_fork(self):
        with nogil:
            pthread_mutex_lock(&self.working)
        self.lock_hot()

    def after_fork_in_parent(self):
        pthread_mutex_unlock(&self.lock)
        pthread_mutex_unlock(&self.working)

    def after_fork_in_child(self):
        """The sockets are the parent's: give back the numbers, and start afresh."""
        self.drop_all(True)
        memset(&self.ledger, 0, sizeof(Ledger))
        self.asleep = self.busy = self.stopping = self.started = False
        self.set_up()
