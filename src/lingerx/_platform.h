/* Where the systems differ: one answer for each question that the native engine asks. No policy may live here.
 *
 * Run on Linux. The branches for other systems follow their documentation and have only been compiled.
 */
#ifndef LINGERX_PLATFORM_H
#define LINGERX_PLATFORM_H

#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <poll.h>
#include <pthread.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/socket.h>
#include <sys/types.h>
#include <time.h>
#include <unistd.h>
#ifdef __linux__
#include <linux/sockios.h>
#include <sys/epoll.h>
#include <sys/eventfd.h>
#endif
#ifdef __FreeBSD__
#include <sys/filio.h>
#endif

#ifndef MSG_NOSIGNAL
#define MSG_NOSIGNAL 0 /* macOS: SO_NOSIGPIPE instead; CPython ignores SIGPIPE anyway */
#endif
#ifndef MSG_MORE
#define MSG_MORE 0 /* the FIN then goes in a segment of its own */
#endif

enum { LX_TCP = 0, LX_LOCAL = 1, LX_OTHER = 2 };
enum { LX_SYN_SENT = 2, LX_SYN_RECV = 3, LX_FIN_WAIT1 = 4, LX_CLOSE = 7, LX_LAST_ACK = 9, LX_LISTEN = 10, LX_CLOSING = 11 };

static inline int lx_kind_of_family(int family) {
    if (family == AF_INET || family == AF_INET6)
        return LX_TCP;
    return family == AF_UNIX ? LX_LOCAL : LX_OTHER;
}

/* Borrows. The address family of a socket, or -1. */
static inline int lx_family(int fd) {
    struct sockaddr_storage name;
    socklen_t size = sizeof name;
    return getsockname(fd, (struct sockaddr *)&name, &size) == 0 ? name.ss_family : -1;
}

static inline long long lx_now(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (long long)t.tv_sec * 1000000000LL + t.tv_nsec;
}

/* Borrows. Throws input away, of TCP without copying it where the kernel can (tcp(7): MSG_TRUNC). */
static inline ssize_t lx_discard(int fd, size_t most, int tcp) {
    char scratch[16384];
#ifdef __linux__
    if (tcp) {
        ssize_t n = recv(fd, NULL, most, MSG_TRUNC | MSG_DONTWAIT);
        if (n >= 0 || errno != EFAULT)
            return n; /* EFAULT: another protocol than TCP; nothing was consumed */
    }
#else
    (void)tcp;
#endif
    return recv(fd, scratch, most < sizeof scratch ? most : sizeof scratch, MSG_DONTWAIT);
}

/* Borrows. TCP's state by Linux' numbers, or 0 where it can't be told. */
static inline int lx_tcp_state(int fd) {
#if defined(__linux__)
    unsigned char info[8]; /* struct tcp_info begins with the state */
    socklen_t size = sizeof info;
    return getsockopt(fd, IPPROTO_TCP, TCP_INFO, info, &size) == 0 ? info[0] : 0;
#elif defined(__APPLE__) || defined(__FreeBSD__)
    /* CLOSED LISTEN SYN_SENT SYN_RCVD ESTABLISHED CLOSE_WAIT FIN_WAIT_1 CLOSING LAST_ACK FIN_WAIT_2 TIME_WAIT */
    static const unsigned char linux_number[] = {7, 10, 2, 3, 1, 8, 4, 11, 9, 5, 6};
#ifdef __APPLE__
    struct tcp_connection_info info;
    socklen_t size = sizeof info;
    if (getsockopt(fd, IPPROTO_TCP, TCP_CONNECTION_INFO, &info, &size) != 0)
        return 0;
#else
    struct tcp_info info;
    socklen_t size = sizeof info;
    if (getsockopt(fd, IPPROTO_TCP, TCP_INFO, &info, &size) != 0)
        return 0;
#endif
    return info.tcpi_state < sizeof linux_number ? linux_number[info.tcpi_state] : 0;
#else
    (void)fd;
    return 0;
#endif
}

#ifdef __linux__
/* Numbers of struct tcp_info of linux/tcp.h, counted in fields of four bytes. */
enum { LX_SEGS_IN = 35 /* Linux 4.2 */, LX_DATA_SEGS_OUT = 39 /* 4.6 */ };

/* Borrows. Whether one of them is known to be 0. */
static inline int lx_counted_none(int fd, unsigned int field) {
    unsigned int info[LX_DATA_SEGS_OUT + 1];
    socklen_t size = (field + 1) * sizeof *info;
    socklen_t wanted = size;
    return getsockopt(fd, IPPROTO_TCP, TCP_INFO, info, &size) == 0 && size == wanted && info[field] == 0;
}
#endif

/* Borrows. Whether a TCP socket never got a single segment from anybody: it was not connected yet. */
static inline int lx_never_heard(int fd) {
#ifdef __linux__
    /* not of MPTCP, which shows those of a subflow, and begins to count anew when that is gone */
    int protocol = 0;
    socklen_t size = sizeof protocol;
    return lx_counted_none(fd, LX_SEGS_IN) && getsockopt(fd, SOL_SOCKET, SO_PROTOCOL, &protocol, &size) == 0 &&
           protocol == IPPROTO_TCP;
#else
    (void)fd;
    return 0;
#endif
}

/* Borrows. Whether the handshake of a TCP socket is still to be done. Linux counts its send queue as 0 then, whatever
 * there is in it: with TCP Fast Open (RFC 7413) data may be (tcp_ioctl). */
static inline int lx_opening(int fd) {
#ifdef __linux__
    int state = lx_tcp_state(fd);
    return state == LX_SYN_SENT || state == LX_SYN_RECV;
#else
    (void)fd;
    return 0;
#endif
}

/* Borrows. Whether the one byte in the send queue of a TCP socket whose connection is over is a SYN or a FIN. */
static inline int lx_no_data_sent(int fd) {
#ifdef __linux__
    return lx_counted_none(fd, LX_DATA_SEGS_OUT);
#else
    (void)fd;
    return 0;
#endif
}

/* Borrows. The send queue of a TCP socket in bytes, our FIN included, as SIOCOUTQ counts on Linux (tcp(7)).
 * -1: this system can't tell. -2: it failed, see errno. */
static inline long long lx_send_queue(int fd) {
    int bytes = 0;
#if defined(__linux__)
    if (ioctl(fd, SIOCOUTQ, &bytes) == 0)
        return bytes;
    return errno == EBADF || errno == ENOTSOCK ? -2 : -1;
#elif defined(__APPLE__) || defined(__FreeBSD__)
    int state = lx_tcp_state(fd);
#ifdef __APPLE__
    socklen_t size = sizeof bytes;
    if (state == 0 || getsockopt(fd, SOL_SOCKET, SO_NWRITE, &bytes, &size) != 0)
        return -1;
#else
    if (state == 0 || ioctl(fd, FIONWRITE, &bytes) != 0)
        return -1;
#endif
    /* the socket buffer does not hold the FIN: the state tells whether it is still to be ACKed */
    return bytes + (state == LX_FIN_WAIT1 || state == LX_CLOSING || state == LX_LAST_ACK);
#else
    (void)fd;
    return -1;
#endif
}

/* Borrows. Bytes of the send queue that were never sent, or -1. */
static inline int lx_never_sent(int fd) {
#ifdef __linux__
    int bytes = 0;
    return ioctl(fd, SIOCOUTQNSD, &bytes) == 0 ? bytes : -1;
#else
    (void)fd;
    return -1;
#endif
}

/* Borrows. Bytes that wait to be read, or -1. */
static inline long long lx_unread(int fd) {
    int bytes = 0;
    return ioctl(fd, FIONREAD, &bytes) == 0 ? bytes : -1;
}

static inline int lx_linger(int fd, int on, int seconds) {
    struct linger value = {on, seconds};
#ifdef SO_LINGER_SEC
    return setsockopt(fd, SOL_SOCKET, SO_LINGER_SEC, &value, sizeof value); /* macOS: SO_LINGER counts ticks */
#else
    return setsockopt(fd, SOL_SOCKET, SO_LINGER, &value, sizeof value);
#endif
}

/* Borrows. SO_LINGER as Go's SetLinger would have set it: -1 off, else seconds. -2: see errno. */
static inline int lx_get_linger(int fd) {
    struct linger value = {0, 0};
    socklen_t size = sizeof value;
#ifdef SO_LINGER_SEC
    int option = SO_LINGER_SEC;
#else
    int option = SO_LINGER;
#endif
    if (getsockopt(fd, SOL_SOCKET, option, &value, &size) != 0)
        return -2;
    return value.l_onoff ? value.l_linger : -1;
}

/* Borrows. RFC 5482; where it does not exist the orphan lives as long as the system says. */
static inline void lx_user_timeout(int fd, int milliseconds) {
#ifdef TCP_USER_TIMEOUT
    unsigned int value = milliseconds;
    setsockopt(fd, IPPROTO_TCP, TCP_USER_TIMEOUT, &value, sizeof value);
#else
    (void)fd;
    (void)milliseconds;
#endif
}

/* Borrows. After the close, RST instead of FIN-WAIT-2 and TIME-WAIT (tcp(7): TCP_LINGER2 below 0). */
static inline void lx_no_time_wait(int fd) {
#ifdef TCP_LINGER2
    int value = -1;
    setsockopt(fd, IPPROTO_TCP, TCP_LINGER2, &value, sizeof value);
#else
    (void)fd;
#endif
}

static inline int lx_option(int fd, int option, int *value) {
    socklen_t size = sizeof *value;
    return getsockopt(fd, SOL_SOCKET, option, value, &size);
}

/* Borrows. */
static inline int lx_listening(int fd) {
    int value = 0;
    return lx_option(fd, SO_ACCEPTCONN, &value) == 0 && value;
}

/* Borrows. Waits for `events` (poll(2)); ns < 0 is not allowed: nothing waits without a deadline. */
static inline int lx_poll(struct pollfd *fds, int n, long long ns) {
#ifdef __linux__
    struct timespec t = {ns / 1000000000LL, ns % 1000000000LL};
    return ppoll(fds, n, &t, NULL);
#else
    long long ms = (ns + 999999) / 1000000; /* rounded up: too early would be a busy wait */
    return poll(fds, n, ms > INT_MAX ? INT_MAX : (int)ms);
#endif
}

/* Edge-triggered epoll: after SHUT_WR the only thing that wakes when our FIN is ACKed (epoll(7); measured).
 * Elsewhere lx_edge_open fails and the caller looks at the queue from time to time. */
static inline int lx_edge_open(void) {
#ifdef __linux__
    return epoll_create1(EPOLL_CLOEXEC);
#else
    errno = ENOSYS;
    return -1;
#endif
}

static inline int lx_edge_watch(int waiter, int fd, unsigned int place, int output) {
#ifdef __linux__
    struct epoll_event event;
    memset(&event, 0, sizeof event);
    event.events = EPOLLIN | EPOLLRDHUP | EPOLLET | (output ? EPOLLOUT : 0);
    event.data.u32 = place;
    if (epoll_ctl(waiter, EPOLL_CTL_ADD, fd, &event) == 0)
        return 0;
    /* EEXIST: it was watched for input alone; or a socket with this number was closed before, and a copy of it keeps it
     * in the set (epoll(7)). */
    return errno == EEXIST ? epoll_ctl(waiter, EPOLL_CTL_MOD, fd, &event) : -1;
#else
    (void)waiter, (void)fd, (void)place, (void)output;
    errno = ENOSYS;
    return -1;
#endif
}

/* For what lx_wake_open has made: reported until lx_wake_seen. */
static inline int lx_edge_add_waker(int waiter, int fd, unsigned int place) {
#ifdef __linux__
    struct epoll_event event;
    memset(&event, 0, sizeof event);
    event.events = EPOLLIN;
    event.data.u32 = place;
    return epoll_ctl(waiter, EPOLL_CTL_ADD, fd, &event);
#else
    (void)waiter, (void)fd, (void)place;
    errno = ENOSYS;
    return -1;
#endif
}

/* Borrows. Fills `places` with those that something happened to; returns how many, or -1 with errno. */
static inline int lx_edge_wait(int waiter, unsigned int *places, int most, long long ns) {
#ifdef __linux__
    struct epoll_event events[64];
    long long ms = (ns + 999999) / 1000000; /* rounded up: too early would be a busy wait */
    int i, n = epoll_wait(waiter, events, most < 64 ? most : 64, ms > INT_MAX ? INT_MAX : (int)ms);
    for (i = 0; i < n; i++)
        places[i] = events[i].data.u32;
    return n;
#else
    (void)waiter, (void)places, (void)most, (void)ns;
    errno = ENOSYS;
    return -1;
#endif
}

/* Marks that several threads may set and read at the same time. */
static inline int lx_marked(unsigned char *mark) {
    return __atomic_load_n(mark, __ATOMIC_RELAXED);
}

static inline void lx_mark(unsigned char *mark, int on) {
    __atomic_store_n(mark, (unsigned char)on, __ATOMIC_RELAXED);
}

/* What makes another thread's wait end: fds[0] is readable after lx_wake(fds[1]). Returns 0, or -1. */
static inline int lx_wake_open(int fds[2]) {
#ifdef __linux__
    fds[0] = fds[1] = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
    return fds[0] < 0 ? -1 : 0;
#else
    int i;
    if (pipe(fds) != 0)
        return -1;
    for (i = 0; i < 2; i++) {
        fcntl(fds[i], F_SETFD, FD_CLOEXEC);
        fcntl(fds[i], F_SETFL, O_NONBLOCK);
    }
    return 0;
#endif
}

static inline void lx_wake(int fd) {
    unsigned long long one = 1;
    ssize_t n = write(fd, &one, sizeof one);
    (void)n; /* full: it is awake already */
}

static inline void lx_wake_seen(int fd) {
    char many[64];
    ssize_t n = read(fd, many, sizeof many);
    (void)n;
}

static inline void lx_wake_close(int fds[2]) {
    if (fds[0] >= 0)
        close(fds[0]);
    if (fds[1] >= 0 && fds[1] != fds[0])
        close(fds[1]);
    fds[0] = fds[1] = -1;
}

#endif
