# Closers and fork(2): both locks of every loop are held across it, and the child starts afresh. Part of _native.pyx.
#
# By pthread_atfork(3), and not by os.register_at_fork alone: between its handlers Python code runs (signal handlers,
# other libraries'), which may well hand a socket over.

cdef pthread_mutex_t all_loops
cdef LoopState *first_loop = NULL


cdef void enlist(LoopState *s) noexcept nogil:
    global first_loop
    pthread_mutex_lock(&all_loops)
    s.following = first_loop
    first_loop = s
    pthread_mutex_unlock(&all_loops)


cdef void delist(LoopState *s) noexcept nogil:
    global first_loop
    cdef LoopState *other
    pthread_mutex_lock(&all_loops)
    other = first_loop
    if other == s:
        first_loop = s.following
    else:
        while other.following != s:
            other = other.following
        other.following = s.following
    pthread_mutex_unlock(&all_loops)


cdef void before_fork() noexcept nogil:
    cdef LoopState *s
    pthread_mutex_lock(&all_loops)
    s = first_loop
    while s:
        pthread_mutex_lock(&s.working)
        pthread_mutex_lock(&s.lock)
        s = s.following


cdef void after_fork_in_parent() noexcept nogil:
    cdef LoopState *s = first_loop
    while s:
        pthread_mutex_unlock(&s.lock)
        pthread_mutex_unlock(&s.working)
        s = s.following
    pthread_mutex_unlock(&all_loops)


cdef void after_fork_in_child() noexcept nogil:
    cdef LoopState *s = first_loop
    pthread_mutex_init(&all_loops, NULL)
    while s:
        start_afresh(s)
        s = s.following


cdef void close_copies(Inbox *box) noexcept nogil:
    cdef Handed *h
    cdef int i
    for i in range(box.size):
        h = &box.places[(box.first + i) % box.room]
        c_close(h.fd)
        h.fd = COPY_IS_CLOSED


cdef void start_afresh(LoopState *s) noexcept nogil:
    # The sockets are the parent's: nothing may be asked of them, only the numbers are given back. This may be the
    # child of a program that had other threads: no memory is asked for, and none given back.
    cdef int i
    for i in range(s.w.size):
        if s.w.entries[i].fd >= 0:
            c_close(s.w.entries[i].fd)
            s.w.entries[i].fd = COPY_IS_CLOSED
    close_copies(&s.taken)
    close_copies(&s.inbox)
    close_fds(s)
    s.left_entries = s.w.entries
    s.left_size = s.w.size
    s.left_taken = s.taken
    s.left_inbox = s.inbox
    s.left_done = s.done
    s.w.entries = NULL
    s.w.size = s.w.room = s.w.alive = s.w.heap_size = s.w.ready_size = s.w.ended_size = 0
    memset(&s.taken, 0, sizeof(Inbox))
    memset(&s.inbox, 0, sizeof(Inbox))
    memset(&s.done, 0, sizeof(DoneList))
    s.lives += 1
    renew_loop(s)
