/* The floor: the same closes as a C program would make them, timed here so that nobody else's calls are in it.
 *
 * Compiled on the spot by close_cost.py, which makes the connections and hands their descriptors over.
 */
#define _GNU_SOURCE
#include <sys/socket.h>
#include <time.h>
#include <unistd.h>

enum { ABORT, BACKGROUND, GRACEFUL, HALF_CLOSE };

static long long now(int cpu) {
    struct timespec t;
    clock_gettime(cpu ? CLOCK_THREAD_CPUTIME_ID : CLOCK_MONOTONIC, &t);
    return t.tv_sec * 1000000000LL + t.tv_nsec;
}

/* Owns the descriptors; only HALF_CLOSE borrows them. Nanoseconds (of this thread's CPU time when `cpu` is not 0) for closing all of them, or -1
 * for an unknown kind or a close that failed. */
long long close_batch(const int *fds, int count, int kind, int cpu) {
    static char waste[65536];
    struct linger linger = {kind == ABORT, 0};
    long long failed = 0, start = now(cpu);
    for (int i = 0; i < count; i++) {
        if (kind == HALF_CLOSE) {
            failed |= shutdown(fds[i], SHUT_WR);
            continue;
        }
        if (kind == GRACEFUL) {
            failed |= shutdown(fds[i], SHUT_WR);
            while (recv(fds[i], waste, sizeof waste, 0) > 0)
                ;
        } else {
            failed |= setsockopt(fds[i], SOL_SOCKET, SO_LINGER, &linger, sizeof linger);
        }
        failed |= close(fds[i]);
    }
    return failed || kind < ABORT || kind > HALF_CLOSE ? -1 : now(cpu) - start;
}
