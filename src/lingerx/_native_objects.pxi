# Python's objects, looked into: what a policy asks for, what a socket object holds, and how its fd changes hands. Part
# of _native.pyx.
#
# For objects whose type is exactly socket.socket, which are all but a few, nothing is called; for others _arguments.py
# and _ownership.py know what to do.

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
