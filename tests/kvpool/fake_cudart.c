/* A fake CUDA runtime: the calls of libcudart (and one of libcuda) that kvpool uses, over host memory.
 *
 * "Device memory" is a memfd. An IPC handle names it by process and descriptor, so other processes can open it while
 * the exporter is alive. A stream is a thread. The fake_* functions are for tests: they stop streams, make calls fail
 * and count calls. Like the real runtime, an error in the work of a stream loses the context, and all later calls fail
 * with that error; a failed call keeps its error for cudaGetLastError.
 */
#define _GNU_SOURCE
#include <fcntl.h>
#include <pthread.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

enum { SUCCESS = 0, INVALID_VALUE = 1, INVALID_CONTEXT = 201, INVALID_HANDLE = 400, NOT_READY = 600 };
enum { PLACES = 256, CALLS = 32 };

typedef struct { char reserved[64]; } Handle;
typedef struct { int64_t pid; int32_t fd; uint64_t size; } Name; /* in the first bytes of a handle */
typedef struct { char *base; size_t size; int fd; int opened; } Place;

typedef struct Stream Stream;
typedef struct { uint64_t point; Stream *stream; } Event;
typedef struct Work { void *to; const void *from; size_t size; struct Work *next; } Work;
struct Stream { Work *first, *last; uint64_t begun, done; int closing; pthread_t thread; };

static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static pthread_cond_t changed = PTHREAD_COND_INITIALIZER;
static Place places[PLACES];
static struct { char name[64]; int count, fail_at, code; } calls[CALLS];
static int64_t permits = -1; /* copies that streams may still do; -1: no limit */
static int64_t copies_left = -1; /* until a copy loses the context; -1: none will */
static struct { char call[64]; int milliseconds; } slow; /* a call that takes long */
static int lose_copies;  /* copies into opened pools do not arrive */
static int lost;   /* the error that lost the context; 0: not lost */
static _Thread_local int last_error;

/* Count a call of `name` and return its result code. The caller holds the lock. */
static int enter(const char *name) {
    int i = 0;
    while (i < CALLS - 1 && calls[i].name[0] && strcmp(calls[i].name, name)) i++;
    snprintf(calls[i].name, sizeof calls[i].name, "%s", name);
    calls[i].count++;
    int code = calls[i].code && calls[i].count >= calls[i].fail_at ? calls[i].code : SUCCESS;
    if (code) calls[i].code = 0; /* once */
    if (lost) code = lost;
    if (code) last_error = code;
    return code;
}

static void delay(const char *name) { /* without the lock */
    if (!strcmp(slow.call, name)) usleep(slow.milliseconds * 1000);
}

#define ENTER(name) \
    delay(name); \
    pthread_mutex_lock(&lock); \
    int code = enter(name); \
    if (code) { pthread_mutex_unlock(&lock); return code; }

#define LEAVE(value) \
    do { int left = (value); if (left) last_error = left; pthread_mutex_unlock(&lock); return left; } while (0)

static Place *place_of(const void *pointer) {
    for (int i = 0; i < PLACES; i++) {
        const char *p = pointer;
        if (places[i].base && p >= places[i].base && p < places[i].base + places[i].size) return &places[i];
    }
    return NULL;
}

static Place *take_place(int fd, size_t size, int opened) {
    for (int i = 0; i < PLACES; i++) {
        if (places[i].base) continue;
        char *base = mmap(NULL, size, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
        if (base == MAP_FAILED) return NULL;
        places[i] = (Place){base, size, fd, opened};
        return &places[i];
    }
    return NULL;
}

/* -- controls for tests */

void fake_permit(int64_t copies) { /* this many more copies; -1: no limit; 0: none */
    pthread_mutex_lock(&lock);
    permits = copies <= 0 || permits < 0 ? copies : permits + copies;
    pthread_cond_broadcast(&changed);
    pthread_mutex_unlock(&lock);
}

void fake_fail(const char *name, int code, int after) { /* once, after `after` more successful calls */
    pthread_mutex_lock(&lock);
    int i = 0;
    while (i < CALLS - 1 && calls[i].name[0] && strcmp(calls[i].name, name)) i++;
    snprintf(calls[i].name, sizeof calls[i].name, "%s", name);
    calls[i].code = code;
    calls[i].fail_at = calls[i].count + after + 1;
    pthread_mutex_unlock(&lock);
}

void fake_slow(const char *name, int milliseconds) { /* one call at a time; others do not wait for it */
    slow.milliseconds = milliseconds;
    snprintf(slow.call, sizeof slow.call, "%s", name);
}

void fake_lose_context_after(int64_t copies) {
    pthread_mutex_lock(&lock);
    copies_left = copies;
    pthread_mutex_unlock(&lock);
}

void fake_lose_copies(int on) { lose_copies = on; }

int fake_count(const char *name) {
    int count = 0;
    pthread_mutex_lock(&lock);
    for (int i = 0; i < CALLS; i++) if (!strcmp(calls[i].name, name)) count = calls[i].count;
    pthread_mutex_unlock(&lock);
    return count;
}

int fake_mapped(void) { /* number of allocations of other processes that are open here */
    int n = 0;
    pthread_mutex_lock(&lock);
    for (int i = 0; i < PLACES; i++) n += places[i].base && places[i].opened;
    pthread_mutex_unlock(&lock);
    return n;
}

/* -- devices and memory */

const char *cudaGetErrorString(int code) {
    switch (code) {
    case INVALID_VALUE: return "invalid argument";
    case INVALID_CONTEXT: return "invalid device context";
    case 217: return "peer access is not supported between these two devices";
    case INVALID_HANDLE: return "invalid resource handle";
    case 700: return "an illegal memory access was encountered";
    default: return "unrecognized error code";
    }
}

int cudaGetLastError(void) {
    int code = lost ? lost : last_error;
    last_error = SUCCESS;
    return code;
}

int cudaSetDevice(int device) { ENTER("cudaSetDevice"); LEAVE(SUCCESS); }

int cudaDeviceGetPCIBusId(char *address, int size, int device) {
    ENTER("cudaDeviceGetPCIBusId");
    snprintf(address, size, "0000:%02X:00.0", device + 0x1a);
    LEAVE(SUCCESS);
}

int cudaMalloc(void **pointer, size_t size) {
    ENTER("cudaMalloc");
    int fd = memfd_create("fake-device", MFD_CLOEXEC);
    Place *place = fd < 0 || ftruncate(fd, size) ? NULL : take_place(fd, size, 0);
    if (!place) LEAVE(2);
    *pointer = place->base;
    LEAVE(SUCCESS);
}

int cuMemGetAddressRange_v2(uint64_t *base, size_t *size, uint64_t pointer) {
    ENTER("cuMemGetAddressRange_v2");
    Place *place = place_of((void *)pointer);
    if (!place) LEAVE(INVALID_VALUE);
    *base = (uint64_t)place->base;
    *size = place->size;
    LEAVE(SUCCESS);
}

int cudaIpcGetMemHandle(Handle *handle, void *pointer) {
    ENTER("cudaIpcGetMemHandle");
    Place *place = place_of(pointer);
    if (!place || place->opened) LEAVE(INVALID_VALUE);
    Name name = {getpid(), place->fd, place->size};
    memset(handle, 0, sizeof *handle);
    memcpy(handle, &name, sizeof name);
    LEAVE(SUCCESS);
}

int cudaIpcOpenMemHandle(void **pointer, Handle handle, unsigned flags) {
    ENTER("cudaIpcOpenMemHandle");
    Name name;
    char path[64];
    struct stat found;
    memcpy(&name, &handle, sizeof name);
    if (name.pid == getpid()) LEAVE(INVALID_CONTEXT);
    snprintf(path, sizeof path, "/proc/%ld/fd/%d", (long)name.pid, name.fd);
    int fd = flags == 1 ? open(path, O_RDWR | O_CLOEXEC) : -1;
    if (fd < 0) LEAVE(INVALID_HANDLE);
    Place *place = fstat(fd, &found) || (uint64_t)found.st_size != name.size ? NULL : take_place(fd, name.size, 1);
    if (!place) { close(fd); LEAVE(INVALID_HANDLE); }
    *pointer = place->base;
    LEAVE(SUCCESS);
}

int cudaIpcCloseMemHandle(void *pointer) {
    ENTER("cudaIpcCloseMemHandle");
    Place *place = place_of(pointer);
    if (!place || !place->opened || place->base != pointer) LEAVE(INVALID_VALUE);
    munmap(place->base, place->size);
    close(place->fd);
    memset(place, 0, sizeof *place);
    LEAVE(SUCCESS);
}

/* -- streams */

static void copy(Work *work) { /* the caller does not hold the lock */
    Place *to = place_of(work->to);
    if (lose_copies && to && to->opened) return;
    memcpy(work->to, work->from, work->size);
}

static void *run(void *argument) {
    Stream *stream = argument;
    pthread_mutex_lock(&lock);
    for (;;) {
        while (!stream->closing && (!stream->first || permits == 0)) pthread_cond_wait(&changed, &lock);
        if (!stream->first) break;
        Work *work = stream->first;
        if (permits > 0) permits--;
        if (copies_left == 0) lost = 700;
        if (copies_left > 0) copies_left--;
        int failed = lost;
        pthread_mutex_unlock(&lock);
        if (!failed) copy(work);
        pthread_mutex_lock(&lock);
        stream->first = work->next;
        if (!stream->first) stream->last = NULL;
        free(work);
        stream->done++;
        pthread_cond_broadcast(&changed);
    }
    pthread_mutex_unlock(&lock);
    return NULL;
}

int cudaDeviceGetStreamPriorityRange(int *least, int *greatest) {
    ENTER("cudaDeviceGetStreamPriorityRange");
    *least = 0;
    *greatest = -5;
    LEAVE(SUCCESS);
}

int cudaStreamCreateWithPriority(Stream **stream, unsigned flags, int priority) {
    ENTER("cudaStreamCreateWithPriority");
    if (flags != 1 || priority != 0) LEAVE(INVALID_VALUE);
    *stream = calloc(1, sizeof **stream);
    pthread_create(&(*stream)->thread, NULL, run, *stream);
    LEAVE(SUCCESS);
}

int cudaStreamSynchronize(Stream *stream) {
    ENTER("cudaStreamSynchronize");
    while (stream->done < stream->begun && !lost) pthread_cond_wait(&changed, &lock);
    LEAVE(lost);
}

int cudaStreamDestroy(Stream *stream) {
    ENTER("cudaStreamDestroy");
    stream->closing = 1;
    pthread_cond_broadcast(&changed);
    pthread_mutex_unlock(&lock);
    pthread_join(stream->thread, NULL);
    free(stream);
    return SUCCESS;
}

int cudaMemcpyAsync(void *to, const void *from, size_t size, int kind, Stream *stream) {
    ENTER("cudaMemcpyAsync");
    Place *there = place_of(to), *here = place_of(from);
    if (kind != 4 || (there && (char *)to + size > there->base + there->size)
        || (here && (const char *)from + size > here->base + here->size)) LEAVE(INVALID_VALUE);
    Work *work = malloc(sizeof *work);
    *work = (Work){to, from, size, NULL};
    if (stream->last) stream->last->next = work; else stream->first = work;
    stream->last = work;
    stream->begun++;
    pthread_cond_broadcast(&changed);
    LEAVE(SUCCESS);
}

typedef struct { int order; int hints[4]; unsigned flags; } Attributes;

static int version = 12080; /* as old as this, the runtime has no batches of this form */

void fake_version(int value) { version = value; }

int cudaRuntimeGetVersion(int *value) {
    ENTER("cudaRuntimeGetVersion");
    *value = version;
    LEAVE(SUCCESS);
}

int cudaMemcpyBatchAsync(void *const *to, const void *const *from, const size_t *sizes, size_t count,
                         Attributes *attributes, size_t *first, size_t kinds, Stream *stream) {
    pthread_mutex_lock(&lock);
    int code = enter("cudaMemcpyBatchAsync");
    if (!code && (version < 13000 || kinds != 1 || *first || attributes->order != 1)) code = last_error = INVALID_VALUE;
    pthread_mutex_unlock(&lock);
    for (size_t i = 0; i < count && !code; i++) code = cudaMemcpyAsync(to[i], from[i], sizes[i], 4, stream);
    return code;
}

/* -- events */

int cudaEventCreateWithFlags(Event **event, unsigned flags) {
    ENTER("cudaEventCreateWithFlags");
    if (flags != 3) LEAVE(INVALID_VALUE);
    *event = calloc(1, sizeof **event);
    LEAVE(SUCCESS);
}

int cudaEventRecord(Event *event, Stream *stream) {
    ENTER("cudaEventRecord");
    *event = (Event){stream->begun, stream};
    LEAVE(SUCCESS);
}

int cudaEventQuery(Event *event) {
    ENTER("cudaEventQuery");
    LEAVE(event->stream && event->stream->done < event->point ? NOT_READY : SUCCESS);
}

int cudaEventSynchronize(Event *event) {
    ENTER("cudaEventSynchronize");
    uint64_t point = event->point;
    Stream *stream = event->stream;
    while (stream && stream->done < point && !lost) pthread_cond_wait(&changed, &lock);
    LEAVE(lost);
}

int cudaEventDestroy(Event *event) {
    ENTER("cudaEventDestroy");
    free(event);
    LEAVE(SUCCESS);
}
