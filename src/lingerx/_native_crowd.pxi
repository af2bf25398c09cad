# The driver for many sockets at once: edge-triggered epoll(7), or poll(2) where that cannot be had. Part of
# _native.pyx.
#
# Each entry gets one turn when something happened to it or its time has come; a heap tells whose time is next.
# Every turn is bounded, so a round is. All of it runs without the GIL but open and free.

cdef struct Crowd:
    Entry *entries
    int size
    int alive             # entries that are not closed yet
    int edges             # the epoll descriptor, or -1: poll(2) over all of them
    pollfd *fds           # for poll(2)
    int *heap             # waiting entries by the time at which they want to be woken; the first is the next
    int *heap_place       # where an entry stands in the heap, or -1
    int heap_size
    long long *at         # by entry: when it wants to be woken; once it is closed, when that was
    unsigned char *added  # epoll knows this one
    int *ready            # a ring of those whose turn was over before their input
    int ready_first, ready_size


cdef bint open_crowd(Crowd *w, int size) noexcept:
    cdef int i
    w.size = size
    w.alive = size
    w.heap_size = w.ready_first = w.ready_size = 0
    w.fds = NULL
    w.entries = <Entry *> malloc(size * sizeof(Entry))
    w.heap = <int *> malloc(size * sizeof(int))
    w.heap_place = <int *> malloc(size * sizeof(int))
    w.at = <long long *> malloc(size * sizeof(long long))
    w.added = <unsigned char *> malloc(size)
    w.ready = <int *> malloc(size * sizeof(int))
    w.edges = lx_edge_open()
    if not (w.entries and w.heap and w.heap_place and w.at and w.added and w.ready):
        w.size = 0
        return False
    for i in range(size):
        w.entries[i].fd = -1
        w.heap_place[i] = -1
        w.added[i] = False
    return True


cdef void free_crowd(Crowd *w) noexcept:
    cdef int i
    for i in range(w.size):
        if w.entries[i].fd >= 0:
            give_up(&w.entries[i])
    if w.edges >= 0:
        c_close(w.edges)
    free(w.entries)
    free(w.fds)
    free(w.heap)
    free(w.heap_place)
    free(w.at)
    free(w.added)
    free(w.ready)


cdef inline void heap_put(Crowd *w, int place, int i) noexcept nogil:
    w.heap[place] = i
    w.heap_place[i] = place


cdef void heap_settle(Crowd *w, int place, int i) noexcept nogil:
    # Entry i belongs somewhere above or below `place`, which is free.
    cdef int other
    cdef long long at = w.at[i]
    while place > 0:
        other = (place - 1) // 2
        if w.at[w.heap[other]] <= at:
            break
        heap_put(w, place, w.heap[other])
        place = other
    while True:
        other = 2 * place + 1
        if other >= w.heap_size:
            break
        if other + 1 < w.heap_size and w.at[w.heap[other + 1]] < w.at[w.heap[other]]:
            other += 1
        if at <= w.at[w.heap[other]]:
            break
        heap_put(w, place, w.heap[other])
        place = other
    heap_put(w, place, i)


cdef void heap_set(Crowd *w, int i, long long at) noexcept nogil:
    w.at[i] = at
    if w.heap_place[i] < 0:
        w.heap_size += 1
        heap_settle(w, w.heap_size - 1, i)
    else:
        heap_settle(w, w.heap_place[i], i)


cdef void heap_drop(Crowd *w, int i) noexcept nogil:
    cdef int place = w.heap_place[i]
    if place < 0:
        return
    w.heap_place[i] = -1
    w.heap_size -= 1
    if place < w.heap_size:
        heap_settle(w, place, w.heap[w.heap_size])


cdef void crowd_without_edges(Crowd *w) noexcept nogil:
    # epoll takes no more (ENOSPC, ENOMEM): poll(2) for all.
    cdef int i
    cdef long long now = lx_now()
    c_close(w.edges)
    w.edges = -1
    for i in range(w.size):
        if w.entries[i].fd >= 0:
            without_edges(&w.entries[i], now)
            if w.heap_place[i] >= 0 and w.entries[i].c.wake_at < w.at[i]:
                heap_set(w, i, w.entries[i].c.wake_at)


cdef void crowd_turn(Crowd *w, int i, int seen) noexcept nogil:
    cdef Entry *e = &w.entries[i]
    cdef int action = turn(e, seen, lx_now())
    if action == m.WAIT:
        if w.edges >= 0 and not w.added[i]:
            # Whatever happened before it was added is reported at once: nothing can be missed.
            w.added[i] = lx_edge_add(w.edges, e.fd, i) == 0
            if not w.added[i]:
                crowd_without_edges(w)
        heap_set(w, i, e.c.wake_at)
        return
    heap_drop(w, i)
    if action == m.YIELD:
        w.ready[(w.ready_first + w.ready_size) % w.size] = i
        w.ready_size += 1
    else:
        w.alive -= 1
        w.at[i] = lx_now()


cdef int crowd_poll(Crowd *w, long long ns) noexcept nogil:
    # poll(2) over all that wait. Returns 0, or EINTR.
    cdef int i, k, n = 0
    if not w.fds:
        w.fds = <pollfd *> malloc(w.size * sizeof(pollfd))
        if not w.fds:  # time alone will have to do
            return EINTR if lx_poll(NULL, 0, min(ns, m.OFTEN_MOST)) < 0 else 0
    for k in range(w.heap_size):
        i = w.heap[k]
        w.fds[k].events = events_for(&w.entries[i])
        # Without anything to watch poll(2) would still report a hang-up, at once and for ever.
        w.fds[k].fd = w.entries[i].fd if w.fds[k].events else -1
        w.fds[k].revents = 0
    n = w.heap_size
    if lx_poll(w.fds, n, ns) < 0:
        return EINTR
    for k in range(n):
        w.fds[k].fd = w.heap[k] if w.fds[k].revents else -1  # the heap moves with the turns: note the entries
    for k in range(n):
        if w.fds[k].fd >= 0:
            crowd_turn(w, w.fds[k].fd, m.WOKEN)
    return 0


cdef int crowd_round(Crowd *w) noexcept nogil:
    # Wait for the next thing to happen, then give everybody concerned one turn. Returns 0, or EINTR.
    cdef unsigned int places[64]
    cdef long long ns = 0
    cdef int n, i, k
    if w.ready_size == 0:
        ns = max(0, w.at[w.heap[0]] - lx_now())
    if w.edges >= 0:
        n = lx_edge_wait(w.edges, places, 64, ns)
        if n < 0:
            return EINTR
        for k in range(n):
            # Those that yielded have their turn coming; closed ones are not in the heap either.
            if w.heap_place[places[k]] >= 0:
                crowd_turn(w, places[k], m.WOKEN)
    elif crowd_poll(w, ns) == EINTR:
        return EINTR
    for k in range(w.ready_size):
        i = w.ready[w.ready_first]
        w.ready_first = (w.ready_first + 1) % w.size
        w.ready_size -= 1
        crowd_turn(w, i, m.WOKEN)
    k = w.heap_size  # at most everybody once, so that events are looked at again in between
    while k > 0 and w.heap_size > 0 and w.at[w.heap[0]] <= lx_now():
        i = w.heap[0]
        crowd_turn(w, i, m.BEGUN if w.entries[i].c.state == m.HALF_CLOSING else m.WOKEN)
        k -= 1
    return 0
