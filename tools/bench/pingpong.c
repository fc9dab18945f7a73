/* The floor that the benchmark compares with: what C gets from the same kernel and memory.
 *
 *   pingpong mq CPU[,CPU] SECONDS      round trips of 64 bytes over two POSIX message queues
 *   pingpong memcpy CPU SECONDS PAGES  copies of 4 KiB pages chosen at random from PAGES pages
 *
 * CPU is the core that both sides are pinned to, or -1; a second one is the answering side's.  Prints "median_ns p99_ns mean_ns count".
 * The queues lose their names before the first message, so nothing can be left behind.
 */
#define _GNU_SOURCE
#include <fcntl.h>
#include <mqueue.h>
#include <sched.h>
#include <signal.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

enum { PAGE = 4096, MESSAGE = 64, SAMPLES_MAX = 1 << 20, WINDOW_PAGES = 64, BURST = 16 };

static uint64_t now_ns(void)
{
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (uint64_t)t.tv_sec * 1000000000u + (uint64_t)t.tv_nsec;
}

static void fail(const char *what)
{
    perror(what);
    exit(1);
}

static int ascending(const void *a, const void *b)
{
    double x = *(const double *)a, y = *(const double *)b;
    return (x > y) - (x < y);
}

static void report(double *samples, long count)
{
    double sum = 0;
    for (long i = 0; i < count; i++)
        sum += samples[i];
    qsort(samples, (size_t)count, sizeof *samples, ascending);
    printf("%.1f %.1f %.1f %ld\n", samples[count / 2], samples[count * 99 / 100],
           sum / (double)count, count);
}

static mqd_t make_queue(const char *kind)
{
    struct mq_attr shape = {.mq_maxmsg = 8, .mq_msgsize = MESSAGE};
    char name[64];
    snprintf(name, sizeof name, "/tmem-bench-%s-%ld-%llx", kind, (long)getpid(),
             (unsigned long long)now_ns());
    mqd_t queue = mq_open(name, O_RDWR | O_CREAT | O_EXCL, 0600, &shape);
    if (queue == (mqd_t)-1)
        fail("mq_open");
    mq_unlink(name);
    return queue;
}

static void pin(int cpu)
{
    cpu_set_t set;
    if (cpu < 0)
        return;
    CPU_ZERO(&set);
    CPU_SET(cpu, &set);
    if (sched_setaffinity(0, sizeof set, &set))
        fail("sched_setaffinity");
}

static void ping_pong(double seconds, int answering_cpu, double *samples)
{
    mqd_t requests = make_queue("q"), replies = make_queue("r");
    char message[MESSAGE] = {0};
    pid_t parent = getpid();
    pid_t child = fork();
    if (child < 0)
        fail("fork");
    if (child == 0) {
        prctl(PR_SET_PDEATHSIG, SIGKILL);
        if (getppid() != parent)
            _exit(1);
        pin(answering_cpu);
        while (mq_receive(requests, message, MESSAGE, NULL) >= 0 && !message[0])
            if (mq_send(replies, message, MESSAGE, 0))
                break;
        _exit(0);
    }
    uint64_t deadline = now_ns() + (uint64_t)(seconds * 1e9), end = 0;
    long count = 0;
    while (end < deadline && count < SAMPLES_MAX) {
        uint64_t begin = now_ns();
        if (mq_send(requests, message, MESSAGE, 0) || mq_receive(replies, message, MESSAGE, NULL) < 0)
            fail("round trip");
        end = now_ns();
        samples[count++] = (double)(end - begin);
    }
    message[0] = 1;
    mq_send(requests, message, MESSAGE, 0);
    waitpid(child, NULL, 0);
    report(samples, count);
}

/* A clock reading costs a sixth of a copy, so a sample is the mean of a burst of copies: odd bursts
 * copy out of cold memory (what a get does), even ones into it (what a put does). */
static void copy_pages(double seconds, long pages, double *samples)
{
    char *arena = mmap(NULL, (size_t)pages * PAGE, PROT_READ | PROT_WRITE,
                       MAP_SHARED | MAP_ANONYMOUS, -1, 0);
    char *window = mmap(NULL, WINDOW_PAGES * PAGE, PROT_READ | PROT_WRITE,
                        MAP_SHARED | MAP_ANONYMOUS, -1, 0);
    if (arena == MAP_FAILED || window == MAP_FAILED)
        fail("mmap");
    memset(arena, 1, (size_t)pages * PAGE);
    memset(window, 2, WINDOW_PAGES * PAGE);
    uint64_t deadline = now_ns() + (uint64_t)(seconds * 1e9), end = 0;
    uint64_t state = 88172645463325252u;
    long count = 0;
    while (end < deadline && count < SAMPLES_MAX) {
        size_t places[BURST];
        for (int i = 0; i < BURST; i++) {
            state ^= state << 13, state ^= state >> 7, state ^= state << 17;
            places[i] = (size_t)(state % (uint64_t)pages) * PAGE;
        }
        uint64_t begin = now_ns();
        for (int i = 0; i < BURST; i++) {
            char *slot = window + (size_t)((count * BURST + i) % WINDOW_PAGES) * PAGE;
            if (count & 1)
                memcpy(slot, arena + places[i], PAGE);
            else
                memcpy(arena + places[i], slot, PAGE);
            __asm__ volatile("" ::: "memory");
        }
        end = now_ns();
        samples[count++] = (double)(end - begin) / BURST;
    }
    report(samples, count);
}

int main(int argc, char **argv)
{
    if (argc < 4) {
        fprintf(stderr, "usage: pingpong mq|memcpy CPU SECONDS [PAGES]\n");
        return 64;
    }
    double seconds = atof(argv[3]);
    const char *second = strchr(argv[2], ',');
    pin(atoi(argv[2]));
    double *samples = malloc(SAMPLES_MAX * sizeof *samples);
    if (!samples)
        fail("malloc");
    if (!strcmp(argv[1], "mq"))
        ping_pong(seconds, second ? atoi(second + 1) : -1, samples);
    else if (argc > 4 && atol(argv[4]) > 0)
        copy_pages(seconds, atol(argv[4]), samples);
    free(samples);
    return 0;
}
