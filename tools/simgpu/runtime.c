/* A CUDA runtime (libcudart.so.13) with host memory as devices, and with kernels that do nothing.
 *
 * Every launch is checked as a Hopper GPU would check it: grid, block, shared memory, cluster, stream. Work in a stream
 * is delayed until a call waits for it, and an event that is only queried completes late: so wrong order, and memory
 * that is overwritten too early, give wrong results. The work consists of copies, and of calls back into Python
 * (device.py), which computes the results of the kernels. A capture records it, and a graph launch repeats it. Device
 * memory is a memfd; an IPC handle names it by process and file descriptor. New memory is full of 0xFF, which is NaN in
 * every format.
 *
 * There are $SIMGPU_DEVICES devices (default 1) with $SIMGPU_MIB of memory each (default 3 GiB). A stream or event
 * belongs to the device that was current when it was created, and may be used with no other device.
 *
 * Simpler than the real runtime: the streams of a capture do not fork, and nothing runs in parallel.
 */
#define _GNU_SOURCE
#include <cuda_runtime_api.h>
#include <fcntl.h>
#include <pthread.h>
#include <stdarg.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <time.h>
#include <unistd.h>
#undef cudaGetDeviceProperties

#define EXPORT extern /* a function of the runtime */
#define OK cudaSuccess
#define UNCAPTURABLE cudaErrorStreamCaptureUnsupported

enum { PROCESSORS = 132, L2_CACHE = 50 << 20, PLAIN_SHARED = 48 << 10, MOST_SHARED = 232448, MOST_CLUSTER = 8,
       MOST_THREADS = 1024, MOST_GRID_YZ = 65535, AT_A_QUERY = 16, MOST_DEVICES = 8, KERNELS = 1 << 18, PLACES = 1 << 15,
       STREAM_MAGIC = 0x5742 };

/* -- errors and the lock */

static pthread_mutex_t lock;
static pthread_cond_t changed = PTHREAD_COND_INITIALIZER;
static _Thread_local cudaError_t last_error;
static FILE *trace; /* of launches and copies, if $SIMGPU_LOG names a file */
static void (*listener)(const char *line); /* gets the same lines */

static void note(const char *format, ...) __attribute__((format(printf, 1, 2)));
static void note(const char *format, ...) {
    if (!trace && !listener) return;
    char line[1024];
    va_list arguments;
    va_start(arguments, format);
    vsnprintf(line, sizeof line, format, arguments);
    va_end(arguments);
    if (listener) listener(line);
    if (!trace) return;
    fputs(line, trace);
    fflush(trace);
}

static cudaError_t refuse(cudaError_t code, const char *why) {
    fprintf(stderr, "simgpu: error %d: %s\n", code, why);
    note("ERROR %d: %s\n", code, why);
    return last_error = code;
}

/* -- streams: lists of work */

typedef struct Stream Stream;
typedef enum { COPY, FILL, CALL, WAIT, HOST, MARK } Kind;
typedef struct {
    Kind kind;
    void *to; /* or the argument of a host function */
    const void *from;
    size_t size;
    int value; /* of a fill: the byte; of a call: 1 if it is repeated; of a copy: 1 if `from` must be freed */
    Stream *stream; /* to wait for */
    uint64_t number; /* of a call; or the position to wait for */
    void (*function)(void *);
} Work;
typedef struct { Work *items; size_t count, room; } List;
typedef struct { List list; } Graph;
struct Stream {
    int magic;
    List list;
    size_t first;   /* first work of the list that is not done */
    uint64_t done;  /* number of work items done since the start */
    int busy;
    pthread_t worker;
    Graph *capture;
    int device, priority;
    Stream *next;
};
typedef struct { Stream *stream; uint64_t upto; int captured, device; double time; } Event;

static Stream legacy[MOST_DEVICES]; /* the default stream of each device */
static Stream *streams;
static _Thread_local int current; /* device */
static int captures; /* in the mode that forbids synchronising calls to other threads */
static _Thread_local enum cudaStreamCaptureMode thread_mode = cudaStreamCaptureModeGlobal;
static void (*call_python)(uint64_t number, int again);

static Stream *stream_of(void *handle) {
    if ((uintptr_t)handle <= 2) return &legacy[current];
    Stream *stream = handle;
    if (stream->magic != STREAM_MAGIC) {
        fprintf(stderr, "simgpu: %p is not a stream\n", handle);
        abort();
    }
    return stream;
}

static void append(List *list, Work work) {
    if (list->count == list->room) {
        list->room = list->room ? list->room * 2 : 64;
        list->items = realloc(list->items, list->room * sizeof(Work));
    }
    list->items[list->count++] = work;
}

static uint64_t end_of(Stream *stream) { return stream->done + (stream->list.count - stream->first); }

/* Append work to the stream, or to the graph that it captures. */
static void submit(Stream *stream, Work work) {
    pthread_mutex_lock(&lock);
    append(stream->capture ? &stream->capture->list : &stream->list, work);
    pthread_mutex_unlock(&lock);
}

static void perform(Stream *stream, uint64_t upto, long most);

static void do_work(Work work) {
    switch (work.kind) {
    case COPY:
        memmove(work.to, work.from, work.size);
        if (work.value) free((void *)work.from);
        break;
    case FILL: memset(work.to, work.value, work.size); break;
    case CALL: if (call_python) call_python(work.number, work.value); break;
    case WAIT: perform(work.stream, work.number, -1); break;
    case HOST: work.function(work.to); break;
    case MARK: break;
    }
}

/* Do the stream's work up to a position, at most `most` items. No lock is held, because Python may be called. */
static void perform(Stream *stream, uint64_t upto, long most) {
    pthread_mutex_lock(&lock);
    while (stream->busy) {
        if (pthread_equal(stream->worker, pthread_self())) break; /* its own work waits for it: already done */
        pthread_cond_wait(&changed, &lock);
    }
    if (!stream->busy) {
        stream->busy = 1;
        stream->worker = pthread_self();
        while (stream->done < upto && stream->first < stream->list.count && most--) {
            Work work = stream->list.items[stream->first];
            pthread_mutex_unlock(&lock);
            do_work(work);
            pthread_mutex_lock(&lock);
            stream->done++;
            if (++stream->first == stream->list.count) stream->first = stream->list.count = 0;
        }
        stream->busy = 0;
        pthread_cond_broadcast(&changed);
    }
    pthread_mutex_unlock(&lock);
}

static void perform_all(int device) {
    for (Stream *stream = streams; stream; stream = stream->next)
        if (device < 0 || stream->device == device) perform(stream, end_of(stream), -1);
}

/* Calls that may synchronise are forbidden during a capture, unless the thread has set the relaxed mode. */
static cudaError_t forbidden(const char *name) {
    return captures && thread_mode != cudaStreamCaptureModeRelaxed ? refuse(UNCAPTURABLE, name) : OK;
}

/* Refuse work that may not be put into a stream: work of another device; and during any capture, work in the legacy
 * stream, which waits for all other streams and so would be captured with them. */
static cudaError_t misplaced(Stream *stream, const char *name) {
    if (stream->device != current) return refuse(cudaErrorInvalidResourceHandle, name);
    return captures && stream == &legacy[current] ? refuse(cudaErrorStreamCaptureImplicit, name) : OK;
}

/* -- for device.py and bench/gpu_launches.py */

static int first_stderr; /* the original one: tests redirect the current one */

EXPORT int sim_stderr(void) { return first_stderr; }

EXPORT void sim_on_call(void (*function)(uint64_t, int)) { call_python = function; }
EXPORT void sim_on_note(void (*function)(const char *)) { listener = function; }

/* Used by the simulated cuBLAS: the product is one launch. */
EXPORT void sim_product(const char *name) { note("launch %s\n", name); }

EXPORT void sim_call(void *handle, uint64_t number) {
    Stream *stream = stream_of(handle);
    submit(stream, (Work){.kind = CALL, .number = number, .value = stream->capture != NULL});
}

EXPORT void sim_finish(void *handle) {
    Stream *stream = stream_of(handle);
    perform(stream, end_of(stream), -1);
}

/* -- kernels */

typedef struct { const void *function; const char *name; int shared; } Kernel;
static Kernel *kernels; /* a hash table */

static Kernel *kernel_of(const void *function) {
    size_t at = ((uintptr_t)function >> 4) * 0x9E3779B97F4A7C15u >> 46;
    while (kernels[at % KERNELS].function && kernels[at % KERNELS].function != function) at++;
    return &kernels[at % KERNELS];
}

__attribute__((constructor)) static void begin(void) {
    pthread_mutexattr_t kind;
    pthread_mutexattr_init(&kind);
    pthread_mutexattr_settype(&kind, PTHREAD_MUTEX_RECURSIVE);
    pthread_mutex_init(&lock, &kind);
    kernels = calloc(KERNELS, sizeof(Kernel));
    for (int device = 0; device < MOST_DEVICES; device++) {
        legacy[device] = (Stream){.magic = STREAM_MAGIC, .device = device, .next = streams};
        streams = &legacy[device];
    }
    first_stderr = fcntl(STDERR_FILENO, F_DUPFD_CLOEXEC, 3);
    char file[512];
    const char *prefix = getenv("SIMGPU_LOG");
    if (prefix && snprintf(file, sizeof file, "%s.%d", prefix, getpid()) < (int)sizeof file)
        trace = fopen(file, "w");
}

EXPORT void **__cudaRegisterFatBinary(void *binary) { return malloc(sizeof(void *)); }
EXPORT void __cudaRegisterFatBinaryEnd(void **handle) {}
EXPORT void __cudaUnregisterFatBinary(void **handle) { free(handle); }
EXPORT void __cudaRegisterVar(void) {}
EXPORT char __cudaInitModule(void **handle) { return 0; }

EXPORT void __cudaRegisterFunction(void **handle, const char *function, char *device_function, const char *name) {
    pthread_mutex_lock(&lock);
    *kernel_of(function) = (Kernel){function, name, 0};
    pthread_mutex_unlock(&lock);
}

EXPORT cudaError_t __cudaGetKernel(void **kernel, const void *function) { *kernel = (void *)function; return OK; }

typedef struct { dim3 grid, block; size_t shared; void *stream; } Call;
static _Thread_local Call calls[16];
static _Thread_local int call_count;

EXPORT unsigned __cudaPushCallConfiguration(dim3 grid, dim3 block, size_t shared, void *stream) {
    calls[call_count++ % 16] = (Call){grid, block, shared, stream};
    return 0;
}

EXPORT cudaError_t __cudaPopCallConfiguration(dim3 *grid, dim3 *block, size_t *shared, void *stream) {
    Call call = calls[--call_count % 16];
    *grid = call.grid, *block = call.block, *shared = call.shared, *(void **)stream = call.stream;
    return OK;
}

static unsigned cluster_of(const cudaLaunchConfig_t *config) {
    for (unsigned i = 0; i < config->numAttrs; i++) {
        const cudaLaunchAttribute *attribute = &config->attrs[i];
        if (attribute->id == cudaLaunchAttributeClusterDimension)
            return attribute->val.clusterDim.x * attribute->val.clusterDim.y * attribute->val.clusterDim.z;
    }
    return 1;
}

EXPORT cudaError_t cudaLaunchKernelExC(const cudaLaunchConfig_t *config, const void *function, void **arguments) {
    const Kernel *kernel = kernel_of(function);
    if (!kernel->function) return refuse(cudaErrorInvalidDeviceFunction, "launch of an unknown kernel");
    Stream *stream = stream_of(config->stream);
    const dim3 grid = config->gridDim;
    const size_t threads = (size_t)config->blockDim.x * config->blockDim.y * config->blockDim.z;
    const size_t shared = config->dynamicSmemBytes;
    const unsigned cluster = cluster_of(config);
    note("launch %s grid %u,%u,%u threads %zu shared %zu cluster %u stream %p%s\n", kernel->name, grid.x, grid.y,
         grid.z, threads, shared, cluster, (void *)config->stream, stream->capture ? " captured" : "");
    if (!grid.x || !grid.y || !grid.z || grid.y > MOST_GRID_YZ || grid.z > MOST_GRID_YZ)
        return refuse(cudaErrorInvalidConfiguration, kernel->name);
    if (!threads || threads > MOST_THREADS) return refuse(cudaErrorInvalidConfiguration, kernel->name);
    if (shared > MOST_SHARED || (shared > PLAIN_SHARED && shared > (size_t)kernel->shared))
        return refuse(cudaErrorInvalidValue, kernel->name);
    if (!cluster || cluster > MOST_CLUSTER || grid.x % cluster) return refuse(cudaErrorInvalidValue, kernel->name);
    return misplaced(stream, kernel->name);
}

EXPORT cudaError_t cudaLaunchKernel(const void *function, dim3 grid, dim3 block, void **arguments, size_t shared,
                                    cudaStream_t stream) {
    const cudaLaunchConfig_t config = {grid, block, shared, stream, NULL, 0};
    return cudaLaunchKernelExC(&config, function, arguments);
}

EXPORT cudaError_t __cudaLaunchKernel(cudaKernel_t kernel, dim3 grid, dim3 block, void **arguments, size_t shared,
                                      cudaStream_t stream) {
    return cudaLaunchKernel(kernel, grid, block, arguments, shared, stream);
}

EXPORT cudaError_t cudaFuncSetAttribute(const void *function, enum cudaFuncAttribute attribute, int value) {
    Kernel *kernel = kernel_of(function);
    if (!kernel->function) return refuse(cudaErrorInvalidDeviceFunction, "attribute of an unknown kernel");
    if (attribute != cudaFuncAttributeMaxDynamicSharedMemorySize) return OK;
    if (value > MOST_SHARED) return refuse(cudaErrorInvalidValue, kernel->name);
    kernel->shared = value;
    return OK;
}

EXPORT cudaError_t cudaFuncGetAttributes(struct cudaFuncAttributes *attributes, const void *function) {
    Kernel *kernel = kernel_of(function);
    *attributes = (struct cudaFuncAttributes){.maxThreadsPerBlock = MOST_THREADS, .numRegs = 64, .binaryVersion = 90,
                                              .ptxVersion = 90, .maxDynamicSharedSizeBytes = kernel->shared};
    return OK;
}

EXPORT cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessorWithFlags(
    int *blocks, const void *function, int threads, size_t shared, unsigned flags) {
    *blocks = 2;
    return OK;
}

EXPORT cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessor(int *blocks, const void *function, int threads,
                                                                 size_t shared) {
    return cudaOccupancyMaxActiveBlocksPerMultiprocessorWithFlags(blocks, function, threads, shared, 0);
}

/* -- the device */

static unsigned long setting(const char *name, unsigned long otherwise) {
    const char *text = getenv(name);
    return text ? strtoul(text, NULL, 10) : otherwise;
}

static size_t total(void) { return setting("SIMGPU_MIB", 3072) << 20; }

EXPORT cudaError_t cudaGetDeviceCount(int *count) {
    *count = setting("SIMGPU_DEVICES", 1);
    return *count > MOST_DEVICES ? refuse(cudaErrorInvalidDevice, "too many devices") : OK;
}

EXPORT cudaError_t cudaGetDevice(int *device) { *device = current; return OK; }

EXPORT cudaError_t cudaSetDevice(int device) {
    int count;
    cudaGetDeviceCount(&count);
    if (device < 0 || device >= count) return refuse(cudaErrorInvalidDevice, "cudaSetDevice");
    current = device;
    return OK;
}

EXPORT cudaError_t cudaDriverGetVersion(int *version) { *version = CUDART_VERSION; return OK; }
EXPORT cudaError_t cudaRuntimeGetVersion(int *version) { *version = CUDART_VERSION; return OK; }
EXPORT cudaError_t cudaDeviceCanAccessPeer(int *can, int a, int b) { *can = a != b; return OK; }
EXPORT cudaError_t cudaDeviceEnablePeerAccess(int device, unsigned flags) { return OK; }
EXPORT cudaError_t cudaDeviceGetStreamPriorityRange(int *least, int *most) { *least = 0, *most = -5; return OK; }

EXPORT cudaError_t cudaDeviceGetPCIBusId(char *address, int size, int device) {
    snprintf(address, size, "0000:%02X:00.0", device + 1);
    return OK;
}

EXPORT cudaError_t cudaGetDeviceProperties(struct cudaDeviceProp *properties, int device) {
    *properties = (struct cudaDeviceProp){
        .name = "Simulated GPU", .totalGlobalMem = total(), .major = 9, .multiProcessorCount = PROCESSORS,
        .sharedMemPerBlock = PLAIN_SHARED, .sharedMemPerBlockOptin = MOST_SHARED,
        .sharedMemPerMultiprocessor = MOST_SHARED + 1024, .regsPerBlock = 65536, .regsPerMultiprocessor = 65536,
        .warpSize = 32, .maxThreadsPerBlock = MOST_THREADS, .maxThreadsPerMultiProcessor = 2048,
        .maxGridSize = {INT32_MAX, MOST_GRID_YZ, MOST_GRID_YZ}, .maxThreadsDim = {MOST_THREADS, MOST_THREADS, 64},
        .l2CacheSize = L2_CACHE, .unifiedAddressing = 1, .memPitch = INT32_MAX, .textureAlignment = 512,
        .concurrentKernels = 1,
    };
    return OK;
}

EXPORT cudaError_t cudaDeviceGetAttribute(int *value, enum cudaDeviceAttr attribute, int device) {
    switch (attribute) {
    case cudaDevAttrMultiProcessorCount: *value = PROCESSORS; break;
    case cudaDevAttrComputeCapabilityMajor: *value = 9; break;
    case cudaDevAttrMaxSharedMemoryPerBlock: *value = PLAIN_SHARED; break;
    case cudaDevAttrMaxSharedMemoryPerBlockOptin: *value = MOST_SHARED; break;
    case cudaDevAttrMaxSharedMemoryPerMultiprocessor: *value = MOST_SHARED + 1024; break;
    case cudaDevAttrMaxThreadsPerBlock: *value = MOST_THREADS; break;
    case cudaDevAttrMaxThreadsPerMultiProcessor: *value = 2048; break;
    case cudaDevAttrWarpSize: *value = 32; break;
    case cudaDevAttrMaxRegistersPerBlock: case cudaDevAttrMaxRegistersPerMultiprocessor: *value = 65536; break;
    case cudaDevAttrL2CacheSize: *value = L2_CACHE; break;
    case cudaDevAttrUnifiedAddressing: *value = 1; break;
    default: *value = 0;
    }
    return OK;
}

/* -- memory */

typedef struct { char *base; size_t size; int fd, own, device; } Place;
static Place device_places[PLACES], pinned_places[PLACES];
static int device_count, pinned_count;
static size_t used[MOST_DEVICES];

static Place *place_of(Place *places, int count, const void *pointer) {
    const char *p = pointer;
    for (int i = 0; i < count; i++)
        if (places[i].base && p >= places[i].base && p < places[i].base + places[i].size) return &places[i];
    return NULL;
}

static void keep(Place *places, int *count, Place place) {
    int at = 0;
    while (at < *count && places[at].base) at++;
    if (at == PLACES) abort();
    if (at == *count) ++*count;
    places[at] = place;
}

static Place *on_device(const void *pointer) { return place_of(device_places, device_count, pointer); }
static int pageable(const void *p) { return !on_device(p) && !place_of(pinned_places, pinned_count, p); }

EXPORT cudaError_t cudaMalloc(void **pointer, size_t size) {
    cudaError_t code = forbidden("cudaMalloc");
    if (code) return code;
    pthread_mutex_lock(&lock);
    if (used[current] + size > total()) code = last_error = cudaErrorMemoryAllocation;
    else {
        if (!size) size = 512;
        int fd = memfd_create("simgpu", MFD_CLOEXEC);
        char *base = fd < 0 || ftruncate(fd, size) ? MAP_FAILED
                                                   : mmap(NULL, size, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
        if (base == MAP_FAILED) code = last_error = cudaErrorMemoryAllocation;
        else {
            memset(base, 0xFF, size);
            keep(device_places, &device_count, (Place){base, size, fd, 1, current});
            used[current] += size;
            *pointer = base;
        }
    }
    pthread_mutex_unlock(&lock);
    return code;
}

static cudaError_t release(void *pointer, int own, const char *name) {
    cudaError_t code = forbidden(name);
    if (!pointer || code) return code;
    perform_all(-1);
    pthread_mutex_lock(&lock);
    Place *place = on_device(pointer);
    if (!place || place->base != pointer || place->own != own) code = refuse(cudaErrorInvalidValue, name);
    else {
        munmap(place->base, place->size);
        close(place->fd);
        if (own) used[place->device] -= place->size;
        place->base = NULL;
    }
    pthread_mutex_unlock(&lock);
    return code;
}

EXPORT cudaError_t cudaFree(void *pointer) { return release(pointer, 1, "cudaFree"); }

EXPORT cudaError_t cudaMemGetInfo(size_t *free, size_t *all) {
    *free = total() - used[current], *all = total();
    return OK;
}

EXPORT cudaError_t cudaHostRegister(void *pointer, size_t size, unsigned flags) {
    pthread_mutex_lock(&lock);
    keep(pinned_places, &pinned_count, (Place){pointer, size, -1, 0, -1});
    pthread_mutex_unlock(&lock);
    return OK;
}

EXPORT cudaError_t cudaHostUnregister(void *pointer) {
    pthread_mutex_lock(&lock);
    Place *place = place_of(pinned_places, pinned_count, pointer);
    if (place) place->base = NULL;
    pthread_mutex_unlock(&lock);
    return place ? OK : refuse(cudaErrorInvalidValue, "cudaHostUnregister");
}

EXPORT cudaError_t cudaHostAlloc(void **pointer, size_t size, unsigned flags) {
    cudaError_t code = forbidden("cudaHostAlloc");
    if (code) return code;
    *pointer = aligned_alloc(4096, (size + 4095) / 4096 * 4096);
    return cudaHostRegister(*pointer, size, flags);
}

EXPORT cudaError_t cudaFreeHost(void *pointer) {
    perform_all(-1);
    cudaError_t code = cudaHostUnregister(pointer);
    free(pointer);
    return code;
}

EXPORT cudaError_t cudaPointerGetAttributes(struct cudaPointerAttributes *attributes, const void *pointer) {
    pthread_mutex_lock(&lock);
    const Place *place = on_device(pointer);
    int plain = pageable(pointer);
    pthread_mutex_unlock(&lock);
    *attributes = (struct cudaPointerAttributes){
        .type = place ? cudaMemoryTypeDevice : plain ? cudaMemoryTypeUnregistered : cudaMemoryTypeHost,
        .device = place ? place->device : current,
        .devicePointer = (void *)pointer, .hostPointer = place ? NULL : (void *)pointer};
    return OK;
}

/* Pageable memory is read at once, and written before the call returns, as in the real runtime. */
EXPORT cudaError_t cudaMemcpyAsync(void *to, const void *from, size_t size, enum cudaMemcpyKind kind,
                                   cudaStream_t handle) {
    Stream *stream = stream_of(handle);
    pthread_mutex_lock(&lock);
    int reads = pageable(from), writes = pageable(to);
    pthread_mutex_unlock(&lock);
    note("copy %zu kind %d stream %p%s\n", size, kind, (void *)handle, stream->capture ? " captured" : "");
    cudaError_t code = misplaced(stream, "cudaMemcpyAsync");
    if (code) return code;
    if (stream->capture && (reads || writes)) return refuse(UNCAPTURABLE, "captured copy of pageable memory");
    if (reads) from = memcpy(malloc(size ? size : 1), from, size);
    submit(stream, (Work){.kind = COPY, .to = to, .from = from, .size = size, .value = reads});
    if (writes) sim_finish(handle);
    return OK;
}

EXPORT cudaError_t cudaMemcpyBatchAsync(void *const *to, const void *const *from, const size_t *sizes, size_t count,
                                        struct cudaMemcpyAttributes *attributes, size_t *first, size_t kinds,
                                        cudaStream_t stream) {
    if (!stream) return refuse(cudaErrorInvalidValue, "batch of copies on the default stream");
    if (kinds != 1 || *first || attributes->srcAccessOrder != cudaMemcpySrcAccessOrderStream)
        return refuse(cudaErrorInvalidValue, "batch of copies with several attributes");
    cudaError_t code = OK;
    for (size_t i = 0; i < count && !code; i++) code = cudaMemcpyAsync(to[i], from[i], sizes[i], cudaMemcpyDefault, stream);
    return code;
}

EXPORT cudaError_t cudaMemcpyPeerAsync(void *to, int a, const void *from, int b, size_t size, cudaStream_t stream) {
    return cudaMemcpyAsync(to, from, size, cudaMemcpyDeviceToDevice, stream);
}

EXPORT cudaError_t cudaMemcpy(void *to, const void *from, size_t size, enum cudaMemcpyKind kind) {
    cudaError_t code = forbidden("cudaMemcpy");
    if (!code) code = cudaMemcpyAsync(to, from, size, kind, NULL);
    if (!code) sim_finish(NULL);
    return code;
}

EXPORT cudaError_t cudaMemcpy2DAsync(void *to, size_t to_pitch, const void *from, size_t from_pitch, size_t width,
                                     size_t height, enum cudaMemcpyKind kind, cudaStream_t stream) {
    cudaError_t code = OK;
    for (size_t row = 0; row < height && !code; row++)
        code = cudaMemcpyAsync((char *)to + row * to_pitch, (const char *)from + row * from_pitch, width, kind,
                               stream);
    return code;
}

EXPORT cudaError_t cudaMemsetAsync(void *to, int value, size_t size, cudaStream_t handle) {
    Stream *stream = stream_of(handle);
    note("fill %zu stream %p%s\n", size, (void *)handle, stream->capture ? " captured" : "");
    cudaError_t code = misplaced(stream, "cudaMemsetAsync");
    if (!code) submit(stream, (Work){.kind = FILL, .to = to, .size = size, .value = value & 0xFF});
    return code;
}

EXPORT cudaError_t cudaMemset(void *to, int value, size_t size) { return cudaMemsetAsync(to, value, size, NULL); }

/* Symbols belong to kernels, which do nothing. */
EXPORT cudaError_t cudaGetSymbolAddress(void **pointer, const void *symbol) {
    static char somewhere[1 << 16];
    *pointer = somewhere;
    return OK;
}

/* -- memory of other processes */

typedef struct { int32_t pid, fd; uint64_t size; } Name; /* in the first bytes of a handle */

EXPORT cudaError_t cudaIpcGetMemHandle(cudaIpcMemHandle_t *handle, void *pointer) {
    pthread_mutex_lock(&lock);
    const Place *place = on_device(pointer);
    memset(handle, 0, sizeof *handle);
    if (place) memcpy(handle, &(Name){getpid(), place->fd, place->size}, sizeof(Name));
    pthread_mutex_unlock(&lock);
    return place ? OK : refuse(cudaErrorInvalidValue, "cudaIpcGetMemHandle");
}

EXPORT cudaError_t cudaIpcOpenMemHandle(void **pointer, cudaIpcMemHandle_t handle, unsigned flags) {
    Name name;
    char path[64];
    memcpy(&name, &handle, sizeof name);
    snprintf(path, sizeof path, "/proc/%d/fd/%d", name.pid, name.fd);
    int fd = open(path, O_RDWR | O_CLOEXEC);
    char *base = fd < 0 ? MAP_FAILED : mmap(NULL, name.size, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
    if (base == MAP_FAILED) return refuse(cudaErrorInvalidResourceHandle, "cudaIpcOpenMemHandle");
    pthread_mutex_lock(&lock);
    keep(device_places, &device_count, (Place){base, name.size, fd, 0, current});
    pthread_mutex_unlock(&lock);
    *pointer = base;
    return OK;
}

EXPORT cudaError_t cudaIpcCloseMemHandle(void *pointer) { return release(pointer, 0, "cudaIpcCloseMemHandle"); }

/* Used by the simulated libcuda. */
EXPORT int sim_address_range(uint64_t *base, size_t *size, uint64_t pointer) {
    pthread_mutex_lock(&lock);
    const Place *place = on_device((void *)pointer);
    if (place) *base = (uint64_t)place->base, *size = place->size;
    pthread_mutex_unlock(&lock);
    return place ? OK : cudaErrorInvalidValue;
}

/* -- streams and events */

EXPORT cudaError_t cudaStreamCreateWithPriority(cudaStream_t *handle, unsigned flags, int priority) {
    Stream *stream = calloc(1, sizeof *stream);
    *stream = (Stream){.magic = STREAM_MAGIC, .device = current, .priority = priority};
    pthread_mutex_lock(&lock);
    stream->next = streams, streams = stream;
    pthread_mutex_unlock(&lock);
    *handle = (cudaStream_t)stream;
    return OK;
}

EXPORT cudaError_t cudaStreamCreate(cudaStream_t *handle) { return cudaStreamCreateWithPriority(handle, 0, 0); }
EXPORT cudaError_t cudaStreamDestroy(cudaStream_t handle) { sim_finish(handle); return OK; }

EXPORT cudaError_t cudaStreamGetPriority(cudaStream_t handle, int *priority) {
    *priority = stream_of(handle)->priority;
    return OK;
}

EXPORT cudaError_t cudaStreamSynchronize(cudaStream_t handle) {
    if (stream_of(handle)->capture) return refuse(UNCAPTURABLE, "cudaStreamSynchronize while it captures");
    sim_finish(handle);
    return OK;
}

EXPORT cudaError_t cudaDeviceSynchronize(void) {
    cudaError_t code = forbidden("cudaDeviceSynchronize");
    if (!code) perform_all(current);
    return code;
}

EXPORT cudaError_t cudaStreamQuery(cudaStream_t handle) {
    Stream *stream = stream_of(handle);
    if (stream->capture) return refuse(UNCAPTURABLE, "cudaStreamQuery while it captures");
    perform(stream, end_of(stream), AT_A_QUERY);
    return stream->first < stream->list.count ? (last_error = cudaErrorNotReady) : OK;
}

EXPORT cudaError_t cudaLaunchHostFunc(cudaStream_t handle, cudaHostFn_t function, void *argument) {
    submit(stream_of(handle), (Work){.kind = HOST, .to = argument, .function = function});
    return OK;
}

EXPORT cudaError_t cudaEventCreateWithFlags(cudaEvent_t *event, unsigned flags) {
    *event = calloc(1, sizeof(Event));
    ((Event *)*event)->device = current;
    return OK;
}

EXPORT cudaError_t cudaEventCreate(cudaEvent_t *event) { return cudaEventCreateWithFlags(event, 0); }
EXPORT cudaError_t cudaEventDestroy(cudaEvent_t event) { free(event); return OK; }

EXPORT cudaError_t cudaEventRecordWithFlags(cudaEvent_t handle, cudaStream_t stream, unsigned flags) {
    Event *event = (Event *)handle;
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    if (stream_of(stream)->device != event->device) return refuse(cudaErrorInvalidResourceHandle, "cudaEventRecord");
    pthread_mutex_lock(&lock);
    event->stream = stream_of(stream);
    event->captured = event->stream->capture != NULL;
    submit(event->stream, (Work){.kind = MARK});
    event->upto = end_of(event->stream);
    event->time = now.tv_sec * 1e3 + now.tv_nsec / 1e6;
    pthread_mutex_unlock(&lock);
    return OK;
}

EXPORT cudaError_t cudaEventRecord(cudaEvent_t event, cudaStream_t stream) {
    return cudaEventRecordWithFlags(event, stream, 0);
}

EXPORT cudaError_t cudaStreamWaitEvent(cudaStream_t handle, cudaEvent_t awaited, unsigned flags) {
    const Event *event = (const Event *)awaited;
    Stream *stream = stream_of(handle);
    if (!event->stream || event->stream == stream) return OK;
    if (event->captured || stream->capture) return refuse(UNCAPTURABLE, "a capture over two streams");
    submit(stream, (Work){.kind = WAIT, .stream = event->stream, .number = event->upto});
    return OK;
}

EXPORT cudaError_t cudaEventQuery(cudaEvent_t handle) {
    const Event *event = (const Event *)handle;
    if (!event->stream) return OK;
    cudaError_t code = event->captured ? refuse(UNCAPTURABLE, "a captured event") : forbidden("cudaEventQuery");
    if (code) return code;
    perform(event->stream, event->upto, AT_A_QUERY);
    return event->stream->done < event->upto ? (last_error = cudaErrorNotReady) : OK;
}

EXPORT cudaError_t cudaEventSynchronize(cudaEvent_t handle) {
    const Event *event = (const Event *)handle;
    if (!event->stream) return OK;
    if (event->captured) return refuse(UNCAPTURABLE, "a captured event");
    perform(event->stream, event->upto, -1);
    return OK;
}

/* The time between the calls, not between the work: times have no meaning here. */
EXPORT cudaError_t cudaEventElapsedTime(float *ms, cudaEvent_t a, cudaEvent_t b) {
    *ms = ((Event *)b)->time - ((Event *)a)->time;
    if (*ms <= 0) *ms = 1e-3f;
    return OK;
}

/* -- captures and graphs */

EXPORT cudaError_t cudaStreamBeginCapture(cudaStream_t handle, enum cudaStreamCaptureMode mode) {
    Stream *stream = stream_of(handle);
    if (stream == &legacy[current] || stream->capture) return refuse(UNCAPTURABLE, "cudaStreamBeginCapture");
    stream->capture = calloc(1, sizeof(Graph));
    note("capture of %p begins\n", (void *)stream->capture);
    if (mode == cudaStreamCaptureModeGlobal) captures++;
    return OK;
}

EXPORT cudaError_t cudaStreamEndCapture(cudaStream_t handle, cudaGraph_t *graph) {
    Stream *stream = stream_of(handle);
    *graph = (cudaGraph_t)stream->capture;
    note("capture of %p ends\n", (void *)stream->capture);
    stream->capture = NULL;
    if (captures) captures--;
    return OK;
}

EXPORT cudaError_t cudaStreamIsCapturing(cudaStream_t handle, enum cudaStreamCaptureStatus *status) {
    *status = stream_of(handle)->capture ? cudaStreamCaptureStatusActive : cudaStreamCaptureStatusNone;
    return OK;
}

EXPORT cudaError_t cudaStreamGetCaptureInfo(cudaStream_t handle, enum cudaStreamCaptureStatus *status,
                                            unsigned long long *id, cudaGraph_t *graph, const cudaGraphNode_t **nodes,
                                            const cudaGraphEdgeData **edges, size_t *count) {
    const Stream *stream = stream_of(handle);
    cudaStreamIsCapturing(handle, status);
    if (id) *id = (uintptr_t)stream->capture;
    if (graph) *graph = (cudaGraph_t)stream->capture;
    if (nodes) *nodes = NULL;
    if (edges) *edges = NULL;
    if (count) *count = 0;
    return OK;
}

EXPORT cudaError_t cudaThreadExchangeStreamCaptureMode(enum cudaStreamCaptureMode *mode) {
    enum cudaStreamCaptureMode before = thread_mode;
    thread_mode = *mode;
    *mode = before;
    return OK;
}

EXPORT cudaError_t cudaGraphInstantiateWithFlags(cudaGraphExec_t *executable, cudaGraph_t graph,
                                                 unsigned long long flags) {
    *executable = (cudaGraphExec_t)graph;
    return OK;
}

EXPORT cudaError_t cudaGraphLaunch(cudaGraphExec_t executable, cudaStream_t stream) {
    const Graph *graph = (const Graph *)executable;
    note("replay of %p stream %p\n", (void *)executable, (void *)stream);
    for (size_t i = 0; i < graph->list.count; i++) submit(stream_of(stream), graph->list.items[i]);
    return OK;
}

EXPORT cudaError_t cudaGraphGetNodes(cudaGraph_t graph, cudaGraphNode_t *nodes, size_t *count) {
    *count = ((const Graph *)graph)->list.count;
    return OK;
}

/* The executable is the graph itself, so it is kept. */
EXPORT cudaError_t cudaGraphDestroy(cudaGraph_t graph) { return OK; }
EXPORT cudaError_t cudaGraphExecDestroy(cudaGraphExec_t executable) { return OK; }

/* -- errors */

EXPORT cudaError_t cudaPeekAtLastError(void) { return last_error; }
EXPORT const char *cudaGetErrorName(cudaError_t code) { return code ? "cudaErrorSimulated" : "cudaSuccess"; }

EXPORT cudaError_t cudaGetLastError(void) {
    cudaError_t code = last_error;
    last_error = OK;
    return code;
}

EXPORT const char *cudaGetErrorString(cudaError_t code) {
    static _Thread_local char text[64];
    snprintf(text, sizeof text, "simulated CUDA error %d", code);
    return text;
}

/* -- the driver's functions, by name: they do nothing */

static int nothing(void) { return OK; }

EXPORT cudaError_t cudaGetDriverEntryPointByVersion(const char *name, void **function, unsigned version,
                                                    unsigned long long flags,
                                                    enum cudaDriverEntryPointQueryResult *found) {
    *function = (void *)nothing;
    if (found) *found = cudaDriverEntryPointSuccess;
    return OK;
}

EXPORT cudaError_t cudaDeviceGetDefaultMemPool(cudaMemPool_t *pool, int device) {
    *pool = (cudaMemPool_t)&legacy[device];
    return OK;
}
