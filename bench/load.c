/* Subscribers, many and cheap: connects, counts the events that arrive, and says how late they were.
 *
 *     load -p PORT -n CONNECTIONS -e EVENTS -s SECONDS [-c CONCURRENT] [-r READY] [-t THEN] [-k STALLED] [-b]
 *
 * The requests come from standard input, each followed by a NUL byte; connection i sends the i-th, round and round.
 * THEN is sent once the head of the answer is there. A connection is ready when READY has been seen behind that head
 * (at once without -r). When all are, a line of JSON says so; a second one follows when EVENTS events arrived on every
 * connection, or SECONDS later. An event is known by its timestamp: '@' and 16 digits, CLOCK_MONOTONIC in ns, set by
 * whoever produced it. On one connection timestamps must rise: that finds what came twice or in the wrong order.
 * -k: so many more connections that are never read from. -b: count heartbeats (SSE comment lines) and their gaps. */

#define _GNU_SOURCE
#include <errno.h>
#include <inttypes.h>
#include <netinet/in.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <time.h>
#include <unistd.h>

#define STAMP 17 /* bytes: '@' and 16 digits */
#define MAX_HEAD 16384
#define MAX_INPUT (1 << 20)
#define PER_ADDRESS 8000 /* connections from one source address, which has 28,000 ports as Linux is set up */
#define LINGER_NS 200000000u
#define BUCKETS (64 * 64)

enum state { CONNECTING, ANSWERED, LIVE, CLOSED };

struct connection {
    int fd;
    enum state state;
    char *head;       /* what came before it was ready */
    uint32_t size;    /* of head */
    char then_sent, tail_size, last_byte;
    char tail[STAMP]; /* an event whose timestamp is not complete yet */
    uint32_t events, beats;
    uint64_t stamp, beat_ns, gap_ns;
};

static int port, wanted, concurrent = 128, stalled, count_beats, epoll, opened, ready, closed;
static const char *ready_text, *then_text = "";
static char requests[MAX_INPUT];
static size_t request_bytes, request_place;
static struct connection *connections;
static uint64_t events_each, received, disordered, bytes, ready_ns, first_ns, last_ns, histogram[BUCKETS], max_latency_ns;

static uint64_t now_ns(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (uint64_t)t.tv_sec * 1000000000u + (uint64_t)t.tv_nsec;
}

static void fail(const char *why, const char *detail) {
    fprintf(stderr, "load: %s: %.300s\n", why, detail);
    exit(1);
}

/* Latencies are counted in buckets of microseconds, 64 for each power of two: 1.6 % wide at most. */
static unsigned bucket_of(uint64_t ns) {
    uint64_t us = ns / 1000;
    int shift = us < 128 ? 0 : 57 - __builtin_clzll(us);
    return (unsigned)((uint64_t)shift * 64 + (us >> shift));
}

static double bucket_ms(unsigned bucket) {
    unsigned shift = bucket < 128 ? 0 : bucket / 64 - 1;
    return (double)((uint64_t)(bucket - shift * 64) << shift) / 1000;
}

static double quantile_ms(double share) {
    uint64_t seen = 0, rank = (uint64_t)(share * (double)received);
    for (unsigned i = 0; i < BUCKETS; i++)
        if ((seen += histogram[i]) > rank) return bucket_ms(i);
    return (double)max_latency_ns / 1e6;
}

static void connect_next(void) {
    struct connection *c = &connections[opened];
    struct sockaddr_in from = {.sin_family = AF_INET}, to = {.sin_family = AF_INET, .sin_port = htons((uint16_t)port)};
    from.sin_addr.s_addr = htonl(INADDR_LOOPBACK + (unsigned)opened / PER_ADDRESS);
    to.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
    int one = 1, small = 4096;
    c->fd = socket(AF_INET, SOCK_STREAM | SOCK_NONBLOCK, 0);
    if (c->fd < 0) fail("socket", strerror(errno));
    setsockopt(c->fd, IPPROTO_IP, IP_BIND_ADDRESS_NO_PORT, &one, sizeof one);
    if (opened >= wanted) setsockopt(c->fd, SOL_SOCKET, SO_RCVBUF, &small, sizeof small);
    if (bind(c->fd, (struct sockaddr *)&from, sizeof from)) fail("bind", strerror(errno));
    if (connect(c->fd, (struct sockaddr *)&to, sizeof to) && errno != EINPROGRESS) fail("connect", strerror(errno));
    struct epoll_event event = {.events = EPOLLOUT, .data.u32 = (uint32_t)opened++};
    epoll_ctl(epoll, EPOLL_CTL_ADD, c->fd, &event);
}

static void send_request(struct connection *c, uint32_t number) {
    int error = 0;
    socklen_t size = sizeof error;
    getsockopt(c->fd, SOL_SOCKET, SO_ERROR, &error, &size);
    if (error) fail("connect", strerror(error));
    size_t length = strlen(requests + request_place);
    if (write(c->fd, requests + request_place, length) != (ssize_t)length) fail("request", strerror(errno));
    request_place += length + 1;
    if (request_place >= request_bytes) request_place = 0;
    c->state = ANSWERED;
    c->head = malloc(MAX_HEAD);
    struct epoll_event event = {.events = EPOLLIN, .data.u32 = number};
    epoll_ctl(epoll, EPOLL_CTL_MOD, c->fd, &event);
}

static void count_event(struct connection *c, const char *digits, uint64_t now) {
    uint64_t stamp = 0;
    for (int i = 0; i < STAMP - 1; i++) stamp = stamp * 10 + (uint64_t)(digits[i] - '0');
    disordered += stamp <= c->stamp;
    c->stamp = stamp;
    c->events++;
    if (!received++) first_ns = now;
    last_ns = now;
    uint64_t latency_ns = now > stamp ? now - stamp : 0;
    if (latency_ns > max_latency_ns) max_latency_ns = latency_ns;
    histogram[bucket_of(latency_ns)]++;
}

static void count_heartbeats(struct connection *c, const char *from, const char *end, uint64_t now) {
    char before = c->last_byte;
    for (; from < end; before = *from++) {
        if (*from != ':' || before != '\n') continue;
        /* Silence counts from when all were ready: until then the server is busy with connects at full speed. */
        uint64_t since = c->beat_ns > ready_ns ? c->beat_ns : ready_ns;
        if (ready_ns && now - since > c->gap_ns) c->gap_ns = now - since;
        c->beat_ns = now;
        c->beats++;
    }
    c->last_byte = before;
}

/* STAMP bytes before `from` are free for the incomplete event that the last call left. */
static void take(struct connection *c, char *from, char *end, uint64_t now) {
    bytes += (uint64_t)(end - from);
    if (count_beats) count_heartbeats(c, from, end, now);
    from -= c->tail_size;
    memcpy(from, c->tail, (size_t)c->tail_size);
    c->tail_size = 0;
    while ((from = memchr(from, '@', (size_t)(end - from)))) {
        if (end - from < STAMP) {
            c->tail_size = (char)(end - from);
            memcpy(c->tail, from, (size_t)c->tail_size);
            return;
        }
        count_event(c, from + 1, now);
        from += STAMP;
    }
}

static void read_head(struct connection *c, uint32_t number) {
    char *text = c->head + STAMP;
    ssize_t size = recv(c->fd, text + c->size, MAX_HEAD - STAMP - 1 - c->size, 0);
    if (size < 0 && errno == EAGAIN) return;
    if (size <= 0) fail("closed before it was ready", c->size ? text : "no answer");
    c->size += (uint32_t)size;
    text[c->size] = 0;
    if (c->size < 12) return;
    if (memcmp(text + 8, " 200", 4) && memcmp(text + 8, " 101", 4)) fail("refused", text);
    char *body = memmem(text, c->size, "\r\n\r\n", 4);
    if (!body) return;
    body += 4;
    if (*then_text && !c->then_sent) {
        c->then_sent = 1;
        if (write(c->fd, then_text, strlen(then_text)) < 0) fail("then", strerror(errno));
    }
    if (ready_text && !memmem(body, (size_t)(text + c->size - body), ready_text, strlen(ready_text))) return;
    c->state = LIVE;
    ready++;
    if (number >= (uint32_t)wanted)
        epoll_ctl(epoll, EPOLL_CTL_DEL, c->fd, NULL);
    else
        take(c, body, text + c->size, now_ns());
    free(c->head);
    c->head = NULL;
}

static void read_events(struct connection *c) {
    static char buffer[STAMP + (1 << 18)];
    ssize_t size = recv(c->fd, buffer + STAMP, sizeof buffer - STAMP, 0);
    if (size < 0 && errno == EAGAIN) return;
    if (size <= 0) {
        close(c->fd);
        c->state = CLOSED;
        closed++;
        return;
    }
    take(c, buffer + STAMP, buffer + STAMP + size, now_ns());
}

static void turn(void) {
    struct epoll_event events[512];
    int some = epoll_wait(epoll, events, 512, 20);
    for (int i = 0; i < some; i++) {
        struct connection *c = &connections[events[i].data.u32];
        if (c->state == LIVE)
            read_events(c);
        else if (c->state == CONNECTING)
            send_request(c, events[i].data.u32);
        else if (c->state == ANSWERED)
            read_head(c, events[i].data.u32);
    }
}

static void report(uint64_t begun_ns) {
    uint32_t fewest = UINT32_MAX, fewest_beats = UINT32_MAX;
    uint64_t gap_ns = 0;
    for (int i = 0; i < wanted; i++) {
        struct connection *c = &connections[i];
        if (c->events < fewest) fewest = c->events;
        if (c->beats < fewest_beats) fewest_beats = c->beats;
        if (c->gap_ns > gap_ns) gap_ns = c->gap_ns;
    }
    struct rusage used;
    getrusage(RUSAGE_SELF, &used);
    double cpu_s = (double)(used.ru_utime.tv_sec + used.ru_stime.tv_sec) +
                   (double)(used.ru_utime.tv_usec + used.ru_stime.tv_usec) / 1e6;
    printf("{\"expected\":%" PRIu64 ",\"received\":%" PRIu64 ",\"fewest\":%u,\"disordered\":%" PRIu64 ",\"closed\":%d,"
           "\"bytes\":%" PRIu64 ",\"p50_ms\":%.3f,\"p99_ms\":%.3f,\"max_ms\":%.3f,\"events_s\":%.6f,\"whole_s\":%.6f,"
           "\"fewest_beats\":%u,\"longest_gap_s\":%.3f,\"load_cpu_s\":%.3f}\n",
           events_each * (uint64_t)wanted, received, fewest, disordered, closed, bytes, quantile_ms(0.5),
           quantile_ms(0.99), (double)max_latency_ns / 1e6, (double)(last_ns - first_ns) / 1e9,
           received ? (double)(last_ns - begun_ns) / 1e9 : 0, fewest_beats, (double)gap_ns / 1e9, cpu_s);
}

int main(int count, char **words) {
    double seconds = 10;
    for (int option; (option = getopt(count, words, "p:n:e:s:c:r:t:k:b")) != -1;) switch (option) {
            case 'p': port = atoi(optarg); break;
            case 'n': wanted = atoi(optarg); break;
            case 'e': events_each = (uint64_t)atoll(optarg); break;
            case 's': seconds = atof(optarg); break;
            case 'c': concurrent = atoi(optarg); break;
            case 'r': ready_text = optarg; break;
            case 't': then_text = optarg; break;
            case 'k': stalled = atoi(optarg); break;
            case 'b': count_beats = 1; break;
            default: return 2;
        }
    struct rlimit files;
    getrlimit(RLIMIT_NOFILE, &files);
    files.rlim_cur = files.rlim_max;
    setrlimit(RLIMIT_NOFILE, &files);
    request_bytes = fread(requests, 1, sizeof requests, stdin);
    if (!request_bytes || requests[request_bytes - 1]) fail("requests", "each must end with a NUL byte");
    epoll = epoll_create1(0);
    int all = wanted + stalled;
    connections = calloc((size_t)all, sizeof *connections);
    uint64_t begun_ns = now_ns(), deadline_ns = begun_ns + 60000000000u;
    while (ready < all) {
        while (opened < all && opened - ready < concurrent) connect_next();
        turn();
        if (now_ns() > deadline_ns) fail("connecting", "not all were ready within 60 s");
    }
    ready_ns = now_ns();
    printf("{\"ready\":%d,\"connect_s\":%.4f}\n", ready, (double)(ready_ns - begun_ns) / 1e9);
    fflush(stdout);
    deadline_ns = now_ns() + (uint64_t)(seconds * 1e9);
    while (received < events_each * (uint64_t)wanted && closed < wanted && now_ns() < deadline_ns) turn();
    /* What was sent twice would arrive now. */
    for (deadline_ns = now_ns() + LINGER_NS; now_ns() < deadline_ns;) turn();
    report(begun_ns);
    return 0;
}
