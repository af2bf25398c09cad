# The inbox of a closer's loop, and its books: what the hot side does without a Python object, all of it under `lock`
# (but `shed_handed`, which makes system calls). The state is in _native_loop.pxi. Part of _native.pyx.

cdef bint append(Inbox *box, const Handed *h) noexcept nogil:
    # False when there is no memory.
    cdef int i, room
    cdef Handed *bigger
    if box.size == box.room:
        room = max(64, 2 * box.room)
        bigger = <Handed *> malloc(room * sizeof(Handed))
        if not bigger:
            return False
        for i in range(box.size):
            bigger[i] = box.places[(box.first + i) % box.room]
        free(box.places)
        box.places = bigger
        box.first = 0
        box.room = room
    box.places[(box.first + box.size) % box.room] = h[0]
    box.size += 1
    return True


cdef bint push(LoopState *s, const Handed *h, Handed *instead) noexcept nogil:
    # True: h.fd is the loop's. `instead` is the one that has to go for it, and the caller's; or its fd is -1.
    cdef long long held = h.kept.held
    cdef bint full = s.ledger.pending >= s.max_pending
    instead.fd = -1
    s.ledger.handed_over += 1
    s.ledger.pending += 1
    if (full and s.on_full == LEAVES_TO_KERNEL) or (held > 0 and s.ledger.buffered + held > s.max_buffered):
        return False
    if s.inbox.size >= s.max_pending:
        instead[0] = s.inbox.places[s.inbox.first]
        s.inbox.first = (s.inbox.first + 1) % s.inbox.room
        s.inbox.size -= 1
    if not append(&s.inbox, h):
        return False
    s.ledger.buffered += held
    if s.mood == SLEEPS or full:
        wake_loop(s)
    return True


cdef void leave_loop(LoopState *s) noexcept nogil:
    # A hot thread that was counted as entering has pushed, or has not.
    s.entering -= 1
    if not s.open or has_news(s):
        wake_loop(s)


cdef bint is_idle(LoopState *s) noexcept nogil:
    return s.ledger.pending == 0 and s.done.size == 0 and not s.telling


cdef bint has_news(LoopState *s) noexcept nogil:
    # For somebody with the GIL.
    return s.done.size > 0 or (s.awaited and is_idle(s))


cdef void book(LoopState *s, int outcome, long long drained, long long elapsed, long long held) noexcept nogil:
    cdef int bucket = 0
    while bucket < BUCKETS - 1 and elapsed > BOUNDS[bucket]:
        bucket += 1
    s.ledger.pending -= 1
    s.ledger.buffered -= held
    s.ledger.drained += drained
    s.ledger.total_time += elapsed
    s.ledger.outcomes[outcome] += 1
    s.ledger.times[bucket] += 1


cdef void give_back_parcel(DoneList *done, const Done *d) noexcept nogil:
    # Without memory it stays behind: there is none to say so.
    cdef int i, room
    cdef Done *bigger
    if done.size == done.room:
        room = max(64, 2 * done.room)
        bigger = <Done *> malloc(room * sizeof(Done))
        if not bigger:
            return
        for i in range(done.size):
            bigger[i] = done.places[(done.first + i) % done.room]
        free(done.places)
        done.places = bigger
        done.first = 0
        done.room = room
    done.places[(done.first + done.size) % done.room] = d[0]
    done.size += 1


cdef void book_done(LoopState *s, const Done *d, long long held) noexcept nogil:
    book(s, d.outcome, d.drained, d.elapsed, held)
    if d.parcel:
        give_back_parcel(&s.done, d)


cdef void shed_handed(LoopState *s, const Handed *h, Done *d) noexcept nogil:
    # Owns h.fd. For one that never came to the machine; without `lock`. d says what came of it.
    cdef bint aborts = s.on_full == ABORTS_OLDEST
    lx_linger(h.fd, aborts, 0)
    if not aborts and h.terms.user_timeout >= 0 and h.family == LX_TCP:
        lx_user_timeout(h.fd, h.terms.user_timeout)
    c_close(h.fd)
    d[0] = Done(h.kept.parcel, 0, h.unsent or -1, lx_now() - h.now, m.SHED, 0, h.unsent > 0)
