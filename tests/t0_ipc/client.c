/*
 * A tmem client in C, written from ipc/ABI.md alone: it is the test of that document.
 *
 *     client RUN_DIRECTORY NAME [ring]  (token: 64 hexadecimal digits in TMEM_TOKEN)
 *
 * It attaches, makes pools, puts, gets and flushes pages, extents and batches, breaks rules, and
 * detaches.  Each step prints one line, "ok ..." or "BAD ..."; the exit code is 1 after any BAD.
 * Little-endian hosts only, 32 or 64 bits.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <mqueue.h>
#include <sched.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <sys/un.h>
#include <time.h>
#include <unistd.h>

enum { PAGE_BYTES = 4096, EXTENT_PAGES = 64, ABI_REVISION = 6, SPEC_VERSION = 1 };

enum op {
    NEW_POOL = 1,
    DESTROY_POOL = 2,
    PUT_PAGE = 4,
    GET_PAGE = 5,
    FLUSH_PAGE = 6,
    FLUSH_OBJECT = 7,
    VERSION = 32,
    PUT_BATCH = 33,
    GET_BATCH = 34,
    FLUSH_BATCH = 35,
    REPORT = 37,
};

enum status { DONE = 1, MISS = 0, PERM = -1, NODEV = -19, INVAL = -22, NOSYS = -38, EMPTY = -1001 };

enum reason {
    NONE = 0,
    NO_SUCH_POOL = 4,
    POOL_EMPTY = 5,
    SHARED_NEEDS_UUID = 12,
    BAD_LENGTH = 64,
    UNKNOWN_OP = 65,
    BAD_COUNT = 66,
    BAD_SLOT = 67,
    BAD_INDEX = 68,
    RESERVED_BITS = 69,
    BAD_SPEC_VERSION = 72,
    INVALID_OID = 74,
};

enum { FAULT = 1, PERSIST = 1, SHARED = 2, POOL_VERSION = SPEC_VERSION << 24 };

enum { HELLO_RING = 1, WELCOME_RING = 2, CALL_OFFSET = 8192, COMPLETION_OFFSET = 12288 };

struct oid {
    uint8_t bytes[24];
};

struct request {
    uint32_t sequence;
    uint8_t op;
    uint8_t flags;
    uint16_t count;
    uint32_t pool;
    uint32_t index;
    struct oid oid;
    uint64_t slot;
    uint64_t token;
    uint64_t reserved;
} __attribute__((packed));

struct reply {
    uint32_t sequence;
    int32_t status;
    uint16_t reason;
    uint16_t flags;
    uint32_t generation;
    uint64_t map;
    uint64_t value;
} __attribute__((packed));

struct batch_entry {
    uint32_t pool;
    uint32_t index;
    uint32_t slot;
    uint32_t flags;
    struct oid oid;
    uint64_t token;
} __attribute__((packed));

struct hello {
    char magic[4];
    uint16_t revision;
    uint16_t flags;
    char name[32];
    uint8_t token[32];
    uint8_t reserved[56];
} __attribute__((packed));

struct welcome {
    char magic[4];
    uint16_t revision;
    uint16_t flags;
    int32_t status;
    uint32_t guest;
    uint32_t generation;
    uint32_t slots;
    uint32_t table_offset;
    uint32_t slots_offset;
    uint64_t window_bytes;
    char request_queue[64];
    char reply_queue[64];
    char message[96];
} __attribute__((packed));

struct confirm {
    char magic[4];
    uint32_t guest;
} __attribute__((packed));

struct call_block {
    _Atomic uint64_t posted;
    _Atomic uint64_t sleeping;
    uint8_t reserved[48];
    uint8_t request[64];
};

struct completion_block {
    _Atomic uint64_t completed;
    _Atomic uint64_t sleeping;
    uint8_t reserved[16];
    struct reply reply;
};

_Static_assert(sizeof(struct call_block) == 128, "CALL_BLOCK");
_Static_assert(sizeof(struct completion_block) == 64, "COMPLETION_BLOCK");
_Static_assert(sizeof(struct request) == 64, "REQUEST");
_Static_assert(sizeof(struct reply) == 32, "REPLY");
_Static_assert(sizeof(struct batch_entry) == 48, "BATCH_ENTRY");
_Static_assert(sizeof(struct hello) == 128, "HELLO");
_Static_assert(sizeof(struct welcome) == 264, "WELCOME");
_Static_assert(sizeof(struct confirm) == 8, "CONFIRM");

static int door = -1;
static mqd_t requests, replies;
static uint8_t *window;
static struct welcome welcome;
static uint32_t sequence;
static int failures;
static bool through_ring;

static void die(const char *what)
{
    printf("BAD %s: %s\n", what, strerror(errno));
    exit(1);
}

static void check(bool good, const char *what)
{
    printf("%s %s\n", good ? "ok " : "BAD", what);
    failures += !good;
}

/* ---- attach ------------------------------------------------------------------------------- */

static void read_token(uint8_t *token)
{
    const char *text = getenv("TMEM_TOKEN");

    if (!text || strlen(text) != 64) {
        printf("BAD TMEM_TOKEN has not 64 hexadecimal digits\n");
        exit(1);
    }
    for (int at = 0; at < 32; at++) {
        unsigned int byte;
        if (sscanf(text + 2 * at, "%2x", &byte) != 1)
            die("TMEM_TOKEN");
        token[at] = (uint8_t)byte;
    }
}

static int receive_welcome(void)
{
    union {
        struct cmsghdr align;
        char space[CMSG_SPACE(sizeof(int))];
    } control;
    struct iovec data = {&welcome, sizeof welcome};
    struct msghdr message = {
        .msg_iov = &data,
        .msg_iovlen = 1,
        .msg_control = control.space,
        .msg_controllen = sizeof control.space,
    };
    struct cmsghdr *rights;
    int fd;

    if (recvmsg(door, &message, MSG_CMSG_CLOEXEC) != sizeof welcome)
        die("WELCOME");
    if (memcmp(welcome.magic, "TMWE", 4) != 0 || welcome.status != DONE) {
        printf("BAD refused: %.96s\n", welcome.message);
        exit(1);
    }
    rights = CMSG_FIRSTHDR(&message);
    if (!rights || rights->cmsg_type != SCM_RIGHTS)
        die("no window in WELCOME");
    memcpy(&fd, CMSG_DATA(rights), sizeof fd);
    return fd;
}

static void attach(const char *run_directory, const char *name)
{
    struct sockaddr_un address = {.sun_family = AF_UNIX};
    struct hello hello = {.magic = "TMEM",
                          .revision = ABI_REVISION,
                          .flags = through_ring ? HELLO_RING : 0};
    struct confirm confirm = {.magic = {'T', 'M', 'O', 'K'}};
    struct confirm answer;
    int fd;

    if (strlen(name) >= sizeof hello.name)
        die("name too long");
    if (snprintf(address.sun_path, sizeof address.sun_path, "%s/attach.sock", run_directory)
        >= (int)sizeof address.sun_path)
        die("run directory too long");
    memcpy(hello.name, name, strlen(name));
    read_token(hello.token);
    door = socket(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC, 0);
    if (door < 0 || connect(door, (struct sockaddr *)&address, sizeof address) < 0)
        die("connect");
    if (send(door, &hello, sizeof hello, 0) != sizeof hello)
        die("HELLO");
    fd = receive_welcome();
    requests = mq_open(welcome.request_queue, O_WRONLY);
    replies = mq_open(welcome.reply_queue, O_RDONLY);
    if (requests == (mqd_t)-1 || replies == (mqd_t)-1)
        die("mq_open");
    window = mmap(NULL, (size_t)welcome.window_bytes, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
    if (window == MAP_FAILED)
        die("mmap");
    close(fd);
    confirm.guest = welcome.guest;
    if (send(door, &confirm, sizeof confirm, 0) != sizeof confirm)
        die("CONFIRM");
    if (recv(door, &answer, sizeof answer, 0) != sizeof answer
        || memcmp(&answer, &confirm, sizeof answer) != 0)
        die("CONFIRM is not answered");
}

static void detach(void)
{
    struct confirm bye = {.magic = {'T', 'M', 'B', 'Y'}};
    char rest;

    if (send(door, &bye, sizeof bye, 0) != sizeof bye)
        die("BYE");
    check(recv(door, &rest, 1, 0) == 0, "the hypervisor hangs up after BYE");
    mq_close(requests);
    mq_close(replies);
    munmap(window, (size_t)welcome.window_bytes);
    close(door);
}

/* ---- calls -------------------------------------------------------------------------------- */

/* A message from the reply queue, or a length of -1 after 0.1 s or a signal. */
static ssize_t receive(struct reply *reply)
{
    struct timespec until;
    ssize_t got;
    char rest;

    clock_gettime(CLOCK_REALTIME, &until);
    until.tv_nsec += 100 * 1000 * 1000;
    if (until.tv_nsec >= 1000 * 1000 * 1000) {
        until.tv_nsec -= 1000 * 1000 * 1000;
        until.tv_sec++;
    }
    got = mq_timedreceive(replies, (char *)reply, sizeof *reply, NULL, &until);
    if (got < 0 && errno == ETIMEDOUT && recv(door, &rest, 1, MSG_DONTWAIT) == 0)
        die("the hypervisor is gone");
    if (got < 0 && errno != ETIMEDOUT && errno != EINTR)
        die("mq_timedreceive");
    return got;
}

static struct reply exchange_in_ring(const void *message)
{
    struct call_block *call = (struct call_block *)(void *)(window + CALL_OFFSET);
    struct completion_block *answer =
        (struct completion_block *)(void *)(window + COMPLETION_OFFSET);
    uint64_t number = atomic_load_explicit(&call->posted, memory_order_relaxed) + 1;
    struct timespec past = {0};
    struct reply bell;

    memcpy(call->request, message, sizeof call->request);
    atomic_store_explicit(&call->posted, number, memory_order_release);
    atomic_thread_fence(memory_order_seq_cst);
    if (atomic_load_explicit(&answer->sleeping, memory_order_relaxed)
        && mq_timedsend(requests, "K", 1, 0, &past) < 0 && errno != ETIMEDOUT)
        die("mq_timedsend");
    for (int yields = 0; yields < 50; yields++) {
        sched_yield();
        if (atomic_load_explicit(&answer->completed, memory_order_acquire) == number)
            return answer->reply;
    }
    for (;;) {
        atomic_store_explicit(&call->sleeping, 1, memory_order_relaxed);
        atomic_thread_fence(memory_order_seq_cst);
        if (atomic_load_explicit(&answer->completed, memory_order_acquire) == number)
            break;
        receive(&bell);
    }
    atomic_store_explicit(&call->sleeping, 0, memory_order_relaxed);
    return answer->reply;
}

static struct reply exchange(const void *message, size_t bytes, uint32_t expected)
{
    struct reply reply;

    if (through_ring && bytes == sizeof(struct request))
        return exchange_in_ring(message);
    if (mq_send(requests, message, bytes, 0) < 0)
        die("mq_send");
    for (;;)
        if (receive(&reply) == sizeof reply && reply.sequence == expected)
            return reply;
}

static struct reply call(struct request request)
{
    request.sequence = ++sequence;
    return exchange(&request, sizeof request, request.sequence);
}

static struct oid oid(uint64_t number)
{
    struct oid made = {{0}};

    memcpy(made.bytes, &number, sizeof number);
    made.bytes[23] = 0x5a;
    return made;
}

static struct reply extent(enum op op, uint32_t pool, uint64_t object, uint32_t index,
                           uint16_t count, uint64_t slot)
{
    return call((struct request){.op = (uint8_t)op, .pool = pool, .oid = oid(object),
                                 .index = index, .count = count, .slot = slot});
}

static struct reply new_pool(uint32_t flags)
{
    struct request request = {.op = NEW_POOL, .pool = flags};

    memset(request.oid.bytes, 0xff, 16); /* no uuid */
    return call(request);
}

static struct reply destroy_pool(uint32_t pool)
{
    return call((struct request){.op = DESTROY_POOL, .pool = pool});
}

static struct reply batch(enum op op, uint16_t count)
{
    return call((struct request){.op = (uint8_t)op, .count = count});
}

static bool served(struct reply reply, uint64_t map)
{
    return reply.status == DONE && reply.reason == NONE && reply.flags == 0 && reply.map == map;
}

static bool refused(struct reply reply, enum status status, enum reason reason)
{
    return reply.status == (int32_t)status && reply.reason == reason && reply.flags == 0;
}

static bool faulted(struct reply reply, enum status status, enum reason reason)
{
    return reply.status == (int32_t)status && reply.reason == reason && reply.flags == FAULT
           && reply.map == 0 && reply.value == 0;
}

/* ---- pages -------------------------------------------------------------------------------- */

static uint8_t *slot_bytes(uint32_t slot)
{
    return window + welcome.slots_offset + (size_t)slot * PAGE_BYTES;
}

static uint8_t page_byte(uint32_t page, uint32_t at)
{
    return (uint8_t)(page * 31 + at * 7 + (at >> 8) + 1);
}

static void fill(uint32_t slot, uint32_t count, uint32_t first_page)
{
    for (uint32_t number = 0; number < count; number++)
        for (uint32_t at = 0; at < PAGE_BYTES; at++)
            slot_bytes(slot + number)[at] = page_byte(first_page + number, at);
}

static bool holds(uint32_t slot, uint32_t count, uint32_t first_page)
{
    for (uint32_t number = 0; number < count; number++)
        for (uint32_t at = 0; at < PAGE_BYTES; at++)
            if (slot_bytes(slot + number)[at] != page_byte(first_page + number, at))
                return false;
    return true;
}

static void wipe(void)
{
    memset(slot_bytes(0), 0, (size_t)welcome.slots * PAGE_BYTES);
}

/* ---- what is tried ------------------------------------------------------------------------ */

static const uint64_t ALL = ~(uint64_t)0;

static void try_version(void)
{
    struct reply reply = call((struct request){.op = VERSION});

    check(served(reply, 0) && reply.value == ((uint64_t)SPEC_VERSION << 32 | ABI_REVISION),
          "version");
    check(reply.generation == welcome.generation, "the generation is that of WELCOME");
    check(memcmp(window, "TMWI", 4) == 0, "the shared info page has its magic");
}

static void try_single_pages(uint32_t ephemeral, uint32_t persistent)
{
    check(refused(extent(GET_PAGE, ephemeral, 1, 0, 1, 0), EMPTY, POOL_EMPTY),
          "a get from an empty pool");
    fill(3, 1, 100);
    check(served(extent(PUT_PAGE, ephemeral, 1, 0, 1, 3), 1), "put of an ephemeral page");
    check(served(extent(PUT_PAGE, persistent, 1, 7, 1, 3), 1), "put of a persistent page");
    check(extent(GET_PAGE, ephemeral, 1, 1, 1, 0).status == MISS, "a get of another index misses");
    check(extent(GET_PAGE, ephemeral, 2, 0, 1, 0).status == MISS, "a get of another object misses");
    wipe();
    check(served(extent(GET_PAGE, ephemeral, 1, 0, 1, 5), 1) && holds(5, 1, 100),
          "get of the ephemeral page");
    check(refused(extent(GET_PAGE, ephemeral, 1, 0, 1, 5), EMPTY, POOL_EMPTY),
          "an ephemeral get removes the page");
    for (int round = 0; round < 2; round++) {
        wipe();
        check(served(extent(GET_PAGE, persistent, 1, 7, 1, 63), 1) && holds(63, 1, 100),
              "a persistent get keeps the page");
    }
    fill(0, 1, 200);
    check(served(extent(PUT_PAGE, persistent, 1, 7, 1, 0), 1), "a duplicate put");
    wipe();
    check(served(extent(GET_PAGE, persistent, 1, 7, 1, 0), 1) && holds(0, 1, 200),
          "a duplicate put replaces");
    check(served(extent(FLUSH_PAGE, persistent, 1, 7, 1, 0), 1), "flush of a page");
    check(served(extent(FLUSH_PAGE, persistent, 1, 7, 1, 0), 0), "flush of an absent page");
    fill(0, 1, 300);
    check(served(extent(PUT_PAGE, persistent, 9, UINT32_MAX, 1, 0), 1), "put of the last index");
    wipe();
    check(served(extent(GET_PAGE, persistent, 9, UINT32_MAX, 1, 0), 1) && holds(0, 1, 300),
          "get of the last index");
}

static struct reply report(uint32_t pool, uint64_t object, uint32_t index, uint64_t slot)
{
    return call((struct request){.op = REPORT, .pool = pool, .oid = oid(object), .index = index,
                                 .slot = slot});
}

static void try_reports(uint32_t ephemeral, uint32_t persistent)
{
    fill(0, 2, 400);
    check(served(extent(PUT_PAGE, persistent, 5, 8, 1, 0), 1), "put of a page to be reported");
    check(served(report(persistent, 5, 8, 0), 0), "report of a page");
    check(refused(report(persistent, 5, 8, 1), MISS, NONE), "report of another page");
    check(refused(report(persistent, 5, 9, 0), MISS, NONE), "report of an absent page");
    check(refused(report(ephemeral, 5, 8, 0), MISS, NONE), "report of an absent object");
    check(refused(report(60, 5, 8, 0), NODEV, NO_SUCH_POOL), "report of a page of no pool");
    wipe();
    check(served(extent(GET_PAGE, persistent, 5, 8, 1, 0), 1) && holds(0, 1, 400),
          "a report changes nothing");
    check(served(extent(FLUSH_PAGE, persistent, 5, 8, 1, 0), 1), "flush of the reported page");
}

static void try_extents(uint32_t ephemeral, uint32_t persistent)
{
    struct reply reply;

    fill(0, EXTENT_PAGES, 1000);
    check(served(extent(PUT_PAGE, persistent, 11, 40, EXTENT_PAGES, 0), ALL), "put of 64 pages");
    check(served(extent(PUT_PAGE, ephemeral, 11, 40, EXTENT_PAGES, 0), ALL),
          "put of 64 ephemeral pages");
    wipe();
    check(served(extent(GET_PAGE, persistent, 11, 40, EXTENT_PAGES, 0), ALL)
              && holds(0, EXTENT_PAGES, 1000), "get of 64 pages");
    check(served(extent(FLUSH_PAGE, persistent, 11, 42, 3, 0), 7), "flush of 3 of them");
    wipe();
    reply = extent(GET_PAGE, persistent, 11, 40, EXTENT_PAGES, 0);
    check(refused(reply, MISS, NONE) && reply.map == (ALL & ~(uint64_t)0x1c),
          "the map of a get with a gap");
    check(holds(0, 2, 1000) && holds(5, EXTENT_PAGES - 5, 1005), "the pages around the gap");
    check(slot_bytes(2)[0] == 0 && slot_bytes(4)[PAGE_BYTES - 1] == 0,
          "the slots of the gap are untouched");
    wipe();
    check(served(extent(GET_PAGE, ephemeral, 11, 50, 2, 0), 3) && holds(0, 2, 1010),
          "a short get out of a long put");
    reply = extent(GET_PAGE, ephemeral, 11, 40, EXTENT_PAGES, 0);
    check(reply.status == MISS && reply.map == (ALL & ~((uint64_t)3 << 10)),
          "what was got is gone, the rest is there");
    reply = call((struct request){.op = FLUSH_OBJECT, .pool = persistent, .oid = oid(11)});
    check(served(reply, 0) && reply.value == EXTENT_PAGES - 3, "flush of an object counts pages");
    reply = call((struct request){.op = FLUSH_OBJECT, .pool = persistent, .oid = oid(11)});
    check(served(reply, 0) && reply.value == 0, "flush of an absent object");
    check(extent(GET_PAGE, persistent, 11, 40, EXTENT_PAGES, 0).map == 0, "the object is gone");
}

static void try_batches(uint32_t ephemeral, uint32_t persistent)
{
    struct batch_entry *table = (struct batch_entry *)(void *)(window + welcome.table_offset);
    struct reply reply;

    for (uint32_t at = 0; at < EXTENT_PAGES; at++)
        table[at] = (struct batch_entry){
            .pool = at % 2 ? ephemeral : persistent,
            .index = at * 1000,
            .slot = EXTENT_PAGES - 1 - at,
            .oid = oid(500 + at % 7),
        };
    fill(0, EXTENT_PAGES, 5000);
    check(served(batch(PUT_BATCH, EXTENT_PAGES), ALL), "put of a batch over two pools");
    wipe();
    check(served(batch(GET_BATCH, EXTENT_PAGES), ALL) && holds(0, EXTENT_PAGES, 5000),
          "get of the batch");
    wipe();
    reply = batch(GET_BATCH, 3);
    check(reply.status == EMPTY && reply.reason == POOL_EMPTY && reply.map == 5,
          "the status is that of the first entry that is not there");
    check(holds(EXTENT_PAGES - 1, 1, 5000 + EXTENT_PAGES - 1), "the others are served");
    table[1].pool = 63;
    reply = batch(GET_BATCH, 3);
    check(refused(reply, NODEV, NO_SUCH_POOL) && reply.map == 5,
          "an entry for a pool that is not there");
    check(faulted(batch(FLUSH_BATCH, 3), INVAL, BAD_SLOT), "a flush of slots faults");
    table[0].slot = table[1].slot = table[2].slot = 0;
    table[1].pool = persistent;
    reply = batch(FLUSH_BATCH, 3);
    check(served(reply, 5), "flush of a batch tells what was there");
    check(batch(GET_BATCH, 3).map == 0, "what was flushed is gone");
    table[0].flags = 1;
    check(batch(GET_BATCH, 1).flags == FAULT, "flags in an entry fault");
    table[0].flags = 0;
    fill(0, 2, 7000);
    for (uint32_t at = 0; at < 2; at++)
        table[at] = (struct batch_entry){.pool = persistent, .slot = at, .oid = oid(600)};
    check(served(batch(PUT_BATCH, 2), 3), "two puts of one page in a batch");
    wipe();
    check(extent(GET_PAGE, persistent, 600, 0, 1, 0).status == DONE && holds(0, 1, 7001),
          "a batch is executed in order");
}

static void try_faults(uint32_t persistent)
{
    struct request invalid = {.op = PUT_PAGE, .pool = persistent, .count = 1};

    check(faulted(extent(PUT_PAGE, persistent, 1, 0, 0, 0), INVAL, BAD_COUNT), "no pages fault");
    check(faulted(extent(GET_PAGE, persistent, 1, 0, 65, 0), INVAL, BAD_COUNT), "65 pages fault");
    check(faulted(extent(PUT_PAGE, persistent, 1, 0, 2, 63), INVAL, BAD_SLOT),
          "slots past the window fault");
    check(faulted(extent(GET_PAGE, persistent, 1, 0, 1, UINT64_MAX), INVAL, BAD_SLOT),
          "a slot that wraps faults");
    check(faulted(extent(PUT_PAGE, persistent, 1, UINT32_MAX, 2, 0), INVAL, BAD_INDEX),
          "an index that wraps faults");
    memset(invalid.oid.bytes, 0xff, sizeof invalid.oid.bytes);
    check(faulted(call(invalid), INVAL, INVALID_OID), "the invalid object id faults");
    check(faulted(call((struct request){.op = 3}), NOSYS, UNKNOWN_OP), "an unknown op faults");
    check(faulted(call((struct request){.op = VERSION, .reserved = 1}), INVAL, RESERVED_BITS),
          "reserved bits fault");
    check(faulted(new_pool(0), INVAL, BAD_SPEC_VERSION), "a pool of spec version 0 faults");
    sequence++;
    check(faulted(exchange(&sequence, sizeof sequence, sequence), INVAL, BAD_LENGTH),
          "a short message faults");
}

static void try_pools(uint32_t ephemeral, uint32_t persistent)
{
    check(refused(new_pool(POOL_VERSION | SHARED), PERM, SHARED_NEEDS_UUID),
          "a shared pool without a uuid is refused, with the reason");
    check(served(destroy_pool(persistent), 0), "destroy of a pool");
    check(destroy_pool(persistent).status == MISS, "destroy of a pool that is not there");
    check(refused(extent(GET_PAGE, persistent, 1, 0, 1, 0), NODEV, NO_SUCH_POOL),
          "a get from a pool that is not there");
    check(refused(extent(PUT_PAGE, persistent, 1, 0, 64, 0), NODEV, NO_SUCH_POOL),
          "a put to a pool that is not there");
    check(new_pool(POOL_VERSION).value == persistent, "its id is used again");
    check(served(destroy_pool(ephemeral), 0), "destroy of the other pool");
}

int main(int argc, char **argv)
{
    struct reply ephemeral, persistent;

    if (argc < 3) {
        fprintf(stderr, "usage: client RUN_DIRECTORY NAME [ring]\n");
        return 1;
    }
    through_ring = argc > 3 && strcmp(argv[3], "ring") == 0;
    setvbuf(stdout, NULL, _IOLBF, 0);
    attach(argv[1], argv[2]);
    check(welcome.slots == EXTENT_PAGES && welcome.flags == (through_ring ? WELCOME_RING : 0),
          "attach");
    try_version();
    ephemeral = new_pool(POOL_VERSION);
    persistent = new_pool(POOL_VERSION | PERSIST);
    check(served(ephemeral, 0) && served(persistent, 0) && ephemeral.value == 0
              && persistent.value == 1, "two pools");
    try_single_pages((uint32_t)ephemeral.value, (uint32_t)persistent.value);
    try_reports((uint32_t)ephemeral.value, (uint32_t)persistent.value);
    try_extents((uint32_t)ephemeral.value, (uint32_t)persistent.value);
    try_batches((uint32_t)ephemeral.value, (uint32_t)persistent.value);
    try_faults((uint32_t)persistent.value);
    try_pools((uint32_t)ephemeral.value, (uint32_t)persistent.value);
    detach();
    printf("%s\n", failures ? "failed" : "passed");
    return failures != 0;
}
