# The driver for many sockets at once: edge-triggered epoll(7), or poll(2) where that cannot be had. Part of
# _native.pyx.
#
# Each entry gets one turn when something happened to it or its time has come; a heap tells whose time is next.
# Every turn is bounded, so a round is. All of it may run without the GIL.

cdef struct Crowd:
    Entry *entries
    int size              # entries that were opened; those without an fd (below 0) are free or closed
    int room              # for how many there is memory
    int alive             # entries that are not closed yet
    int edges             # the epoll descriptor, or -1: poll(2) over all of them
    int waker             # readable when somebody wants us to look up, or -1
    pollfd *fds           # for poll(2): one for each entry, and the waker's
    int first_polled      # where poll(2)'s findings are looked at first
    int *heap             # waiting entries by the time at which they want to be woken; the first is the next
    int heap_size
    int *ready            # a ring of those whose turn was over before their input
    int ready_first, ready_size
    # Those that were closed, for whoever wants to know (or NULL) and sets `ended_size` back; among them ~i of those
    # whose last byte was sent.
    int *ended
    int ended_size


cdef enum:
    WAKER = 0x7fffffff    # stands for the waker where entries are numbered
    TOLD_AT_MOST = 2      # how often an entry may stand in `ended` at the same time
    EVENTS_AT_ONCE = 64   # that are taken from the kernel in one round
    SERVED_AT_ONCE = 256  # whose time has come, and who yielded, in one round: a guess at a few milliseconds

# How long to wait for the waker alone, ns: nobody sees one wake-up in eleven days, and more is too much for poll(2).
cdef long long LONG_TIME = 1000000000000000


cdef void open_crowd(Crowd *w) noexcept nogil:
    memset(w, 0, sizeof(Crowd))
    w.edges = lx_edge_open()
    w.waker = -1


cdef bint grow_crowd(Crowd *w, int room, bint tell_ended=False) noexcept nogil:
    # Memory for `room` entries; what is not used yet is not touched, and costs none. `tell_ended`: keep a list of
    # those that end. Pointers to entries do not survive this. False when there is no memory.
    cdef int i
    cdef void *bigger = realloc(w.entries, room * sizeof(Entry))
    if not bigger:
        return False
    w.entries = <Entry *> bigger
    bigger = realloc(w.heap, room * sizeof(int))
    if not bigger:
        return False
    w.heap = <int *> bigger
    if tell_ended:
        bigger = realloc(w.ended, TOLD_AT_MOST * room * sizeof(int))
        if not bigger:
            return False
        w.ended = <int *> bigger
    bigger = malloc(room * sizeof(int))
    if not bigger:
        return False
    for i in range(w.ready_size):
        (<int *> bigger)[i] = w.ready[(w.ready_first + i) % w.room]
    free(w.ready)
    w.ready = <int *> bigger
    w.ready_first = 0
    free(w.fds)
    w.fds = NULL
    w.room = room
    return True


cdef void free_crowd(Crowd *w) noexcept nogil:
    cdef int i
    for i in range(w.size):
        if w.entries[i].fd >= 0:
            give_up(&w.entries[i])
    if w.edges >= 0:
        c_close(w.edges)
    free(w.entries)
    free(w.fds)
    free(w.heap)
    free(w.ready)
    free(w.ended)
    memset(w, 0, sizeof(Crowd))
    w.edges = w.waker = -1


cdef inline long long at_place(Crowd *w, int place) noexcept nogil:
    return w.entries[w.heap[place]].c.wake_at


cdef inline void heap_put(Crowd *w, int place, int i) noexcept nogil:
    w.heap[place] = i
    w.entries[i].place = place


cdef void heap_settle(Crowd *w, int place, int i) noexcept nogil:
    # Entry i belongs somewhere above or below `place`, which is free.
    cdef int other
    cdef long long at = w.entries[i].c.wake_at
    while place > 0:
        other = (place - 1) // 2
        if at_place(w, other) <= at:
            break
        heap_put(w, place, w.heap[other])
        place = other
    while True:
        other = 2 * place + 1
        if other >= w.heap_size:
            break
        if other + 1 < w.heap_size and at_place(w, other + 1) < at_place(w, other):
            other += 1
        if at <= at_place(w, other):
            break
        heap_put(w, place, w.heap[other])
        place = other
    heap_put(w, place, i)


cdef void heap_set(Crowd *w, int i) noexcept nogil:
    # Entry i waits for its `wake_at`, which may have changed.
    if w.entries[i].place < 0:
        w.heap_size += 1
        heap_settle(w, w.heap_size - 1, i)
    else:
        heap_settle(w, w.entries[i].place, i)


cdef void heap_drop(Crowd *w, int i) noexcept nogil:
    cdef int place = w.entries[i].place
    if place < 0:
        return
    w.entries[i].place = -1
    w.heap_size -= 1
    if place < w.heap_size:
        heap_settle(w, place, w.heap[w.heap_size])


cdef void crowd_without_edges(Crowd *w) noexcept nogil:
    # epoll takes no more (ENOSPC, ENOMEM), or is gone: poll(2) for all.
    cdef int i
    cdef long long now = lx_now()
    drop_edges(&w.edges)
    for i in range(w.size):
        if w.entries[i].fd >= 0:
            m.look_often(&w.entries[i].c, now)
            if w.entries[i].place >= 0:
                heap_set(w, i)


cdef void crowd_turn(Crowd *w, int i, int seen, long long amount) noexcept nogil:
    cdef Entry *e = &w.entries[i]
    cdef bint sending = e.c.unsent > 0
    cdef int action = turn(e, seen, amount, lx_now())
    cdef int watch
    if sending and e.c.unsent == 0 and action < m.CLOSE and w.ended:
        w.ended[w.ended_size] = ~i
        w.ended_size += 1
    if action == m.WAIT:
        # Room for output is an event too, and there is room after a half-close: only for those that want to hear it.
        watch = WATCHED_FOR_INPUT if e.c.wants == m.FOR_INPUT else WATCHED
        if w.edges >= 0 and e.c.watched < watch:
            # Whatever happened before it was added is reported at once: nothing can be missed.
            if lx_edge_watch(w.edges, e.fd, i, watch == WATCHED) == 0:
                e.c.watched = watch
            elif errno == EBADF:
                e.c.wake_at = 0  # one of the two is gone: the next look, or the next wait, knows which
            else:
                crowd_without_edges(w)
        heap_set(w, i)
        return
    heap_drop(w, i)
    if action == m.YIELD:
        w.ready[(w.ready_first + w.ready_size) % w.room] = i
        w.ready_size += 1
    else:
        w.alive -= 1
        e.c.wake_at = lx_now()  # it will not be woken any more: when it ended, for the report
        if w.ended:
            w.ended[w.ended_size] = i
            w.ended_size += 1


cdef void crowd_recall(Crowd *w) noexcept nogil:
    # Those that yielded stand in the heap instead of the ring, as due.
    cdef int i
    while w.ready_size > 0:
        i = w.ready[w.ready_first]
        w.ready_first = (w.ready_first + 1) % w.room
        w.ready_size -= 1
        w.entries[i].c.wake_at = 0
        heap_set(w, i)


cdef int poll_crowd(Crowd *w, unsigned int *places, int most, long long ns) noexcept nogil:
    # As lx_edge_wait, by poll(2) over all that wait.
    cdef int i, k, n = w.heap_size, found = 0
    if not w.fds:
        w.fds = <pollfd *> malloc((w.room + 1) * sizeof(pollfd))
        if not w.fds:  # time alone will have to do
            return min(lx_poll(NULL, 0, min(ns, m.OFTEN_MOST * m.MS)), 0)
    for k in range(n):
        i = w.heap[k]
        w.fds[k].events = events_for(&w.entries[i])
        # Without anything to watch poll(2) would still report a hang-up, at once and for ever.
        w.fds[k].fd = w.entries[i].fd if w.fds[k].events else -1
        w.fds[k].revents = 0
    w.fds[n].fd = w.waker
    w.fds[n].events = POLLIN
    w.fds[n].revents = 0
    if lx_poll(w.fds, n + 1, ns) < 0:
        return -1
    if w.fds[n].revents:
        lx_wake_seen(w.waker)
    w.first_polled = (w.first_polled + most) % n if n > most else 0  # the rest has its turn in the next rounds
    for k in range(n):
        i = (w.first_polled + k) % n
        if w.fds[i].revents and found < most:
            places[found] = w.heap[i]
            found += 1
    return found


cdef long long crowd_patience(Crowd *w) noexcept nogil:
    # How long nothing needs to be done, ns, as long as nothing happens.
    if w.ready_size > 0:
        return 0
    return max(0, at_place(w, 0) - lx_now()) if w.heap_size > 0 else LONG_TIME


cdef int crowd_wait(Crowd *w, unsigned int *places, long long ns) noexcept nogil:
    # Wait up to ns for something to happen; returns to how many (at most EVENTS_AT_ONCE), or -1 for EINTR.
    cdef int n, k
    if w.edges >= 0:
        n = lx_edge_wait(w.edges, places, EVENTS_AT_ONCE, ns)
        if n >= 0 or errno == EINTR:
            return n
        crowd_without_edges(w)  # somebody has closed our epoll descriptor
        return 0
    n = poll_crowd(w, places, EVENTS_AT_ONCE, ns)
    if n >= 0 or errno == EINTR:
        return n
    # poll(2) refuses (more sockets than RLIMIT_NOFILE, ENOMEM): look at all of them, but not often.
    if lx_poll(NULL, 0, min(ns, m.OFTEN_MOST * m.MS)) < 0:
        return -1
    for k in range(w.heap_size):
        w.entries[w.heap[k]].c.wake_at = 0  # all alike: it stays a heap
    return 0


cdef void crowd_serve(Crowd *w, const unsigned int *places, int n) noexcept nogil:
    # One turn for everybody concerned: those something happened to, those that yielded, those whose time has come.
    cdef int i, k
    for k in range(n):
        # Those that yielded have their turn coming; closed ones are not in the heap either.
        if places[k] != WAKER and w.entries[places[k]].place >= 0:
            crowd_turn(w, places[k], m.WOKEN, 0)
    for k in range(min(w.ready_size, SERVED_AT_ONCE)):
        i = w.ready[w.ready_first]
        w.ready_first = (w.ready_first + 1) % w.room
        w.ready_size -= 1
        crowd_turn(w, i, m.WOKEN, 0)
    k = min(w.heap_size, SERVED_AT_ONCE)  # so that events are looked at again in between
    while k > 0 and w.heap_size > 0 and at_place(w, 0) <= lx_now():
        i = w.heap[0]
        crowd_turn(w, i, m.BEGUN if w.entries[i].c.state == m.HALF_CLOSING else m.WOKEN, 0)
        k -= 1


cdef int crowd_round(Crowd *w) noexcept nogil:
    # Wait for the next thing to happen, and serve. Returns 0, or EINTR.
    cdef unsigned int places[EVENTS_AT_ONCE]
    cdef int n = crowd_wait(w, places, crowd_patience(w))
    if n < 0:
        return EINTR
    crowd_serve(w, places, n)
    return 0
