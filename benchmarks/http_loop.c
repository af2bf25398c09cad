/* The floor for http_closer.py: its one-thread server in C, which answers, and closes as programs do that lose data.
 *
 * Compiled on the spot. Arguments: the files of the answer and of the refusal of a POST. Prints its port, and at each
 * SIGUSR1 how many requests it has served and its CPU time in ns.
 */
#define _GNU_SOURCE
#include <arpa/inet.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <time.h>
#include <unistd.h>

struct page {
    char *bytes;
    size_t size;
};

static volatile long served;

static void tell(int number) {
    char line[80];
    struct timespec t;
    (void)number;
    clock_gettime(CLOCK_PROCESS_CPUTIME_ID, &t);
    int n = snprintf(line, sizeof line, "%ld %lld\n", served, t.tv_sec * 1000000000LL + t.tv_nsec);
    if (write(1, line, n) != n)
        _exit(1);
}

static struct page load(const char *path) {
    FILE *file = fopen(path, "rb");
    struct page page = {NULL, 0};
    if (!file || fseek(file, 0, SEEK_END))
        exit(1);
    page.size = ftell(file);
    page.bytes = malloc(page.size);
    rewind(file);
    if (!page.bytes || fread(page.bytes, 1, page.size, file) != page.size)
        exit(1);
    fclose(file);
    return page;
}

static void answer(int fd, struct page page) {
    for (size_t sent = 0; sent < page.size;) {
        ssize_t n = send(fd, page.bytes + sent, page.size - sent, MSG_NOSIGNAL);
        if (n < 0)
            break;
        sent += n;
    }
}

int main(int count, char **arguments) {
    static char request[65536];
    struct sockaddr_in address = {.sin_family = AF_INET, .sin_addr.s_addr = htonl(INADDR_LOOPBACK)};
    socklen_t size = sizeof address;
    struct sigaction telling = {.sa_handler = tell, .sa_flags = SA_RESTART};
    if (count != 3)
        return 2;
    struct page page = load(arguments[1]), refusal = load(arguments[2]);
    int listener = socket(AF_INET, SOCK_STREAM, 0);
    if (bind(listener, (struct sockaddr *)&address, size) || listen(listener, 1024) ||
        getsockname(listener, (struct sockaddr *)&address, &size))
        return 1;
    sigaction(SIGUSR1, &telling, NULL);
    alarm(600); /* nobody may be left to kill it */
    printf("%d\n", ntohs(address.sin_port));
    fflush(stdout);
    for (;;) {
        int fd = accept4(listener, NULL, NULL, SOCK_CLOEXEC);
        if (fd < 0)
            continue;
        if (recv(fd, request, sizeof request, 0) >= 4 && !memcmp(request, "POST", 4))
            answer(fd, refusal);
        else
            answer(fd, page);
        close(fd);
        served++;
    }
}
