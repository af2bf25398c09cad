# The loop behind Closer, in C: a crowd whose sockets come and go while it runs. Part of _native.pyx.
#
# Two sides meet here. The hot side (any thread) pushes a socket that is half-closed already into the inbox. The loop
# (one thread, without the GIL) takes the whole inbox at once, every few milliseconds, leaves what is in it alone for as
# long, admits it to its crowd, and settles what has ended. A socket's way: push -> inbox -> taken -> admit -> turns ->
# settle -> Done.
#
# `lock` guards what both sides touch; it is held for a few stores, and nobody who holds it waits for the GIL or runs
# Python code. `working` is held by the loop whenever it does not wait. A fork takes both of every loop, by
# pthread_atfork(3), so that parent and child find everything in order. Nothing here touches a Python object: what the
# hot side keeps for a socket is a parcel, which comes back as Done.

cdef enum:
    OUTCOMES = 12
    BUCKETS = 12

cdef enum:  # the places of _ledger.ON_FULL
    SHEDS_OLDEST, LEAVES_TO_KERNEL, ABORTS_OLDEST

cdef enum:  # what the loop does now, so that the hot side wakes it when it has to, and not oftener
    WORKS, COLLECTS, SLEEPS

cdef enum:  # what `loop_step` answers
    GO_ON, TELL, OVER

# Upper bounds of the histogram of linger times, ns; the last bucket is for what took longer.
cdef long long BOUNDS[BUCKETS - 1]

# When a closer stops with thousands in flight, giving them up takes time: so many ns for each (a guess: 10 to 20 were
# measured), as long as that is not more than half of the time that they were given.
cdef long long GIVE_UP_TIME = 20000

cdef enum:
    BOOKED_AT_ONCE = 64       # while the hot side waits for the lock: a guess
    INBOX_TO_KEEP = 256       # places of an inbox that is empty again, 24 KiB: a guess
    ENTRIES_AT_FIRST = 65536  # at most. Memory that is not used costs nothing, and growing leaves holes behind.
    DATA_IS_SENT = 255        # as an outcome: there is none yet, but the parcel's data can go
    COPY_IS_CLOSED = -2       # as an fd: in a forked child

cdef struct Ledger:
    long long handed_over, pending, buffered, drained, total_time
    long long outcomes[OUTCOMES]
    long long times[BUCKETS]

cdef struct Handed:           # a socket on its way from the hot side to the loop
    Terms terms
    Kept *kept
    long long now             # when it was handed over, ns
    long long unsent          # bytes
    int fd
    int error                 # the amount of `seen`
    unsigned char seen        # what the hot side has to tell the machine
    unsigned char family

cdef struct Done:             # a parcel that goes back
    PyObject *parcel
    long long drained, unacked, elapsed
    int outcome, error
    bint lost

cdef struct Inbox:            # a ring, the oldest first
    Handed *places
    int first, size, room

cdef struct DoneList:         # the oldest first
    Done *places
    int first, size, room

cdef struct LoopState:
    pthread_mutex_t lock, working
    LoopState *following      # in the list of all, under `all_loops`
    # under `lock`
    Ledger ledger
    Inbox inbox
    DoneList done
    int entering              # hot threads between their look at `open` and their push
    int mood                  # WORKS, COLLECTS, SLEEPS: set by the loop, and to WORKS by whoever wakes it
    bint open                 # takes sockets
    bint over                 # has ended, its own fds are closed
    bint has_fds              # its own
    bint has_thread
    bint awaited              # somebody wants to know when nothing is pending
    bint telling              # a parcel has left `done`, and its future is not told yet
    bint expiring             # some are marked to end now
    long long stop_at         # when those in flight are to be done; LLONG_MAX: by their own limits
    long long stop_time       # how long that was at the call, ns
    int wake[2]
    # under `working`
    Crowd w
    Inbox taken               # the one that was taken last; its sockets are younger than the crowd's
    int free_slot             # the first of a list through `newer`, or -1
    int oldest, newest        # the ends of the list of those in flight, by age
    long long hurried_to      # the stop_at that they know of
    bint busy
    bint slept                # before this round, instead of collecting
    bint backlog              # more may have happened than was told in one go
    # settled when it is made
    int max_pending, on_full
    long long max_buffered, collect
    # for a forked child
    int lives                 # how often a fork has made it anew
    Entry *left_entries       # with parcels, that wait for somebody with the GIL
    int left_size
    Inbox left_taken, left_inbox
    DoneList left_done


cdef void renew_loop(LoopState *s) noexcept nogil:
    # As it is at first, and as a forked child wants it; what holds memory is left as it is.
    pthread_mutex_init(&s.lock, NULL)
    pthread_mutex_init(&s.working, NULL)
    memset(&s.ledger, 0, sizeof(Ledger))
    s.entering = 0
    s.mood = WORKS
    s.open = True
    s.over = s.has_fds = s.has_thread = s.awaited = s.telling = s.expiring = s.busy = s.backlog = False
    s.slept = True
    s.stop_at = s.hurried_to = LLONG_MAX
    s.stop_time = 0
    s.wake[0] = s.wake[1] = s.w.edges = s.w.waker = -1
    s.free_slot = s.oldest = s.newest = -1


cdef int open_fds(LoopState *s) noexcept nogil:
    # Under `lock`. Returns 0, or an errno: a forked child without an fd left is deaf, and looks from time to time.
    cdef int error = 0
    if s.has_fds:
        return 0
    s.has_fds = True
    s.w.edges = lx_edge_open()
    if s.w.edges < 0 and errno != ENOSYS:
        error = errno
    if lx_wake_open(s.wake) != 0:
        error = errno
    s.w.waker = s.wake[0]
    if s.w.edges >= 0 and s.w.waker >= 0 and lx_edge_add_waker(s.w.edges, s.w.waker, WAKER) != 0:
        error = errno
        c_close(s.w.edges)
        s.w.edges = -1
    return error


cdef void close_fds(LoopState *s) noexcept nogil:
    if s.w.edges >= 0:
        c_close(s.w.edges)
    lx_wake_close(s.wake)
    s.w.edges = s.w.waker = -1
    s.has_fds = False


cdef void end_loop(LoopState *s) noexcept nogil:
    # Under `lock`. Its own fds go as soon as it is over, not with the last reference to it.
    s.over = True
    close_fds(s)


cdef void wake_loop(LoopState *s) noexcept nogil:
    # Under `lock`.
    if s.mood != WORKS:
        s.mood = WORKS
        lx_wake(s.wake[1])


# The loop, under `working` ----------------------------------------------------------------------------------

cdef bint has_slot(LoopState *s) noexcept nogil:
    # Room for one more. False when there is no memory.
    if s.free_slot >= 0 or s.w.size < s.w.room:
        return True
    return grow_crowd(&s.w, 2 * s.w.room if s.w.room > 0 else min(s.max_pending, ENTRIES_AT_FIRST), True)


cdef int take_slot(LoopState *s) noexcept nogil:
    # As the youngest.
    cdef int slot = s.free_slot
    if slot >= 0:
        s.free_slot = s.w.entries[slot].newer
    else:
        slot = s.w.size
        s.w.size += 1
    s.w.entries[slot].older = s.newest
    s.w.entries[slot].newer = -1
    if s.newest >= 0:
        s.w.entries[s.newest].newer = slot
    else:
        s.oldest = slot
    s.newest = slot
    return slot


cdef void return_slot(LoopState *s, int slot) noexcept nogil:
    cdef Entry *e = &s.w.entries[slot]
    if e.older >= 0:
        s.w.entries[e.older].newer = e.newer
    else:
        s.oldest = e.newer
    if e.newer >= 0:
        s.w.entries[e.newer].older = e.older
    else:
        s.newest = e.older
    e.newer = s.free_slot
    s.free_slot = slot


cdef void admit(LoopState *s, const Handed *h) noexcept nogil:
    # Owns h.fd.
    cdef Entry *e
    cdef Done d
    cdef int slot
    if not has_slot(s):
        shed_handed(s, h, &d)
        pthread_mutex_lock(&s.lock)
        book_done(s, &d, h.kept.held)
        pthread_mutex_unlock(&s.lock)
        return
    slot = take_slot(s)
    e = &s.w.entries[slot]
    open_entry(e, h.fd, h.family, &h.terms, h.kept, h.unsent, s.w.edges < 0, h.now)
    s.w.alive += 1
    e.c.deadline = min(e.c.deadline, s.hurried_to)
    if h.seen != m.BEGUN:
        m.advance(&e.c, m.BEGUN, 0, h.now)  # which asks for what the hot side has done already
    crowd_turn(&s.w, slot, h.seen, h.error)


cdef void shed_oldest(LoopState *s, int room_for) noexcept nogil:
    # Until there is room for so many more, as far as it can be had.
    crowd_recall(&s.w)  # for a place that is given back must not stand in the ring
    while s.w.alive > 0 and s.w.alive + room_for > s.max_pending:
        s.w.entries[s.oldest].c.abort = s.on_full == ABORTS_OLDEST
        crowd_turn(&s.w, s.oldest, m.SHEDDING, 0)
        settle(s)


cdef void settle(LoopState *s) noexcept nogil:
    # Book those that have ended, and free their places; let go of data that was sent.
    cdef int i, k = 0
    while k < s.w.ended_size:
        pthread_mutex_lock(&s.lock)
        for i in range(k, min(k + BOOKED_AT_ONCE, s.w.ended_size)):
            if s.w.ended[i] >= 0:
                settle_ended(s, s.w.ended[i])
            else:
                settle_sent(s, &s.w.entries[~s.w.ended[i]])
        pthread_mutex_unlock(&s.lock)
        k += BOOKED_AT_ONCE
    s.w.ended_size = 0


cdef void settle_ended(LoopState *s, int slot) noexcept nogil:
    # Under `lock` too.
    cdef Entry *e = &s.w.entries[slot]
    cdef Done d
    if e.fd >= 0:
        # A listening socket on a number that was a connection's before (see `connections`): `finish` has left it
        # open for somebody to give it back to, and here there is nobody.
        forget_connection(e.fd)
        c_close(e.fd)
        e.fd = -1
        e.c.outcome = m.FAILED
        e.c.error = EINVAL
    d = Done(e.kept.parcel, e.c.drained, e.c.unacked, e.c.wake_at - e.c.started, e.c.outcome, e.c.error, e.c.lost)
    book_done(s, &d, e.kept.held)
    return_slot(s, slot)


cdef void settle_sent(LoopState *s, Entry *e) noexcept nogil:
    # Under `lock` too.
    cdef Done d
    if e.kept.held > 0:
        s.ledger.buffered -= e.kept.held
        e.kept.held = 0
        d = Done(e.kept.parcel, 0, 0, 0, DATA_IS_SENT, 0, False)
        give_back_parcel(&s.done, &d)


cdef void end_by(LoopState *s, int slot, long long deadline) noexcept nogil:
    cdef Entry *e = &s.w.entries[slot]
    e.c.deadline = min(e.c.deadline, deadline)
    e.c.wake_at = min(e.c.wake_at, e.c.deadline)
    if e.place >= 0:
        heap_set(&s.w, slot)


cdef void hurry(LoopState *s, long long stop_at, long long stop_time) noexcept nogil:
    # All in flight are to be done at `stop_at`: the oldest a little earlier, so that the last is not late.
    cdef Entry *e
    cdef int slot = s.oldest
    cdef int left = s.w.alive
    cdef long long each = min(GIVE_UP_TIME, stop_time // 2 // max(1, left))
    s.hurried_to = stop_at
    while slot >= 0:
        e = &s.w.entries[slot]
        left -= 1
        end_by(s, slot, stop_at - left * each)
        slot = e.newer


cdef void expire_marked(LoopState *s) noexcept nogil:
    # Few ever are, and all that were since the last round are found by one look at everybody.
    cdef Entry *e
    cdef int slot = s.oldest
    cdef long long now = lx_now()
    while slot >= 0:
        e = &s.w.entries[slot]
        if lx_marked(&e.kept.expires):
            end_by(s, slot, now)
        slot = e.newer


cdef void take_inbox(LoopState *s) noexcept nogil:
    # Into `taken`, which is empty, when there is room for all of it, which there is afterwards. Returns with `lock`.
    cdef Inbox taken
    cdef int n
    while True:
        pthread_mutex_lock(&s.lock)
        n = s.inbox.size
        if s.w.alive == 0 or s.w.alive + n <= s.max_pending:
            break
        pthread_mutex_unlock(&s.lock)
        shed_oldest(s, n)
    taken = s.inbox
    s.inbox = s.taken
    s.taken = taken


cdef void admit_taken(LoopState *s) noexcept nogil:
    cdef int i
    for i in range(s.taken.size):
        admit(s, &s.taken.places[(s.taken.first + i) % s.taken.room])
    s.taken.first = s.taken.size = 0
    if s.taken.room > INBOX_TO_KEEP:  # there was a burst
        free(s.taken.places)
        s.taken.places = NULL
        s.taken.room = 0


cdef int loop_wait(LoopState *s, unsigned int *places, bint sleeps, bint collects) noexcept nogil:
    # Without `working`, for a fork may come now. Returns to how many something happened.
    cdef pollfd p
    cdef long long patience = crowd_patience(&s.w)
    cdef int n, i
    if collects and patience > 0:
        # There is something going on: collect for a moment, then take all of it in one go.
        p.fd = s.w.waker
        p.events = POLLIN
        p.revents = 0
        if lx_poll(&p, 1 if p.fd >= 0 else 0, min(s.collect, patience)) > 0:
            lx_wake_seen(s.w.waker)
    if not sleeps:
        patience = 0
    elif s.w.waker < 0:
        patience = min(patience, m.OFTEN_MOST * m.MS)
    n = crowd_wait(&s.w, places, patience)
    for i in range(n):
        if places[i] == WAKER:
            lx_wake_seen(s.w.waker)
    return max(0, n)


cdef int loop_step(LoopState *s) noexcept nogil:
    # One round: take in, wait, serve. Those that were taken in wait too: most peers are done by then, and whoever is
    # looked at earlier has to be looked at twice, and watched by epoll(7) in between.
    cdef unsigned int places[EVENTS_AT_ONCE]
    cdef long long stop_at, stop_time
    cdef bint tells, sleeps, collects, expiring, urgent, at_once
    cdef int happened
    take_inbox(s)
    stop_at = s.stop_at
    stop_time = s.stop_time
    expiring = s.expiring
    s.expiring = False
    # Nothing else goes on, somebody waits, or there may be no room soon.
    at_once = s.slept or expiring or not s.open or s.ledger.pending > s.max_pending // 4
    pthread_mutex_unlock(&s.lock)
    if stop_at < s.hurried_to:
        hurry(s, stop_at, stop_time)
    s.busy = s.busy or s.taken.size > 0
    if at_once:
        admit_taken(s)
    if expiring:
        expire_marked(s)
    settle(s)
    pthread_mutex_lock(&s.lock)
    tells = has_news(s)
    if not tells and not s.open and s.ledger.pending == 0 and s.entering == 0:
        end_loop(s)
        pthread_mutex_unlock(&s.lock)
        return OVER
    urgent = s.expiring or s.stop_at < s.hurried_to  # by now: nobody was woken for it
    sleeps = not tells and not s.busy and not urgent and s.inbox.size == 0
    collects = not tells and not sleeps and not urgent and not s.backlog
    s.mood = SLEEPS if sleeps else COLLECTS if collects else WORKS
    pthread_mutex_unlock(&s.lock)
    pthread_mutex_unlock(&s.working)
    happened = loop_wait(s, places, sleeps, collects)
    pthread_mutex_lock(&s.working)
    pthread_mutex_lock(&s.lock)
    s.mood = WORKS
    pthread_mutex_unlock(&s.lock)
    s.slept = sleeps
    s.backlog = happened == EVENTS_AT_ONCE
    s.busy = happened > 0 or s.taken.size > 0
    admit_taken(s)
    crowd_serve(&s.w, places, happened)
    s.busy = s.busy or s.w.ended_size > 0
    settle(s)
    return TELL if tells else GO_ON
