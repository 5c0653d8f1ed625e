/* The floor: what the kernel alone takes to send one event to every subscriber.
 *
 *     floor PORT RATE EVENTS BYTES
 *
 * GET subscribes: a fixed head is answered, as text/event-stream. POST starts a burst of EVENTS events at RATE a
 * second, made here. An event is BYTES long and goes out with one write() for each subscriber; nothing is parsed,
 * kept, bounded or joined. Sockets block: a subscriber that stops reading stops all. No server can be cheaper with
 * one write() per delivery. */

#define _GNU_SOURCE
#include <inttypes.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/socket.h>
#include <time.h>
#include <unistd.h>

#define MAX_FDS 65536
static const char HEAD[] =
    "HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nCache-Control: no-store\r\nConnection: close\r\n\r\n: ok\n\n";
static const char STARTED[] = "HTTP/1.1 202 Accepted\r\nContent-Length: 0\r\n\r\n";
static char is_subscribed[MAX_FDS];
static int max_fd;

static uint64_t now_ns(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (uint64_t)t.tv_sec * 1000000000u + (uint64_t)t.tv_nsec;
}

static int listen_on(int port) {
    struct sockaddr_in address = {.sin_family = AF_INET, .sin_port = htons((uint16_t)port)};
    address.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
    int fd = socket(AF_INET, SOCK_STREAM, 0), one = 1;
    setsockopt(fd, SOL_SOCKET, SO_REUSEADDR, &one, sizeof one);
    if (bind(fd, (struct sockaddr *)&address, sizeof address) || listen(fd, 4096)) {
        perror("floor");
        exit(1);
    }
    return fd;
}

static void greet(int epoll, int listener) {
    int fd = accept(listener, NULL, NULL), one = 1;
    if (fd < 0 || fd >= MAX_FDS) exit(1);
    setsockopt(fd, IPPROTO_TCP, TCP_NODELAY, &one, sizeof one);
    struct epoll_event event = {.events = EPOLLIN, .data.fd = fd};
    epoll_ctl(epoll, EPOLL_CTL_ADD, fd, &event);
}

/* True when the request starts the burst. */
static int answer(int fd) {
    char request[4096];
    ssize_t size = read(fd, request, sizeof request);
    if (size <= 0) {
        is_subscribed[fd] = 0;
        close(fd);
        return 0;
    }
    if (request[0] == 'P') return write(fd, STARTED, sizeof STARTED - 1) > 0;
    if (write(fd, HEAD, sizeof HEAD - 1) > 0) is_subscribed[fd] = 1;
    if (fd > max_fd) max_fd = fd;
    return 0;
}

static void push(size_t bytes) {
    char event[65536];
    int size = snprintf(event, sizeof event, "data: {\"t\":\"@%016" PRIu64 "\",\"pad\":\"", now_ns());
    memset(event + size, 'x', bytes - (size_t)size);
    memcpy(event + bytes - 4, "\"}\n\n", 4);
    for (int fd = 0; fd <= max_fd; fd++)
        if (is_subscribed[fd] && write(fd, event, bytes) != (ssize_t)bytes) is_subscribed[fd] = 0;
}

int main(int count, char **words) {
    if (count != 5) return 2;
    double interval_ns = 1e9 / atof(words[2]);
    long wanted = atol(words[3]), left = 0;
    size_t bytes = (size_t)atol(words[4]);
    if (bytes < 64 || bytes > 65536) return 2;
    int listener = listen_on(atoi(words[1])), epoll = epoll_create1(0);
    struct epoll_event ready[256], event = {.events = EPOLLIN, .data.fd = listener};
    epoll_ctl(epoll, EPOLL_CTL_ADD, listener, &event);
    uint64_t started = 0;
    for (;;) {
        uint64_t due = started + (uint64_t)((double)(wanted - left) * interval_ns), now = now_ns();
        int wait_ms = left == 0 ? -1 : due <= now ? 0 : (int)((due - now) / 1000000) + 1;
        int some = epoll_wait(epoll, ready, 256, wait_ms);
        for (int i = 0; i < some; i++) {
            if (ready[i].data.fd == listener) {
                greet(epoll, listener);
            } else if (answer(ready[i].data.fd)) {
                left = wanted;
                started = now_ns();
            }
        }
        if (left > 0 && now_ns() >= started + (uint64_t)((double)(wanted - left) * interval_ns)) {
            push(bytes);
            left--;
        }
    }
}
