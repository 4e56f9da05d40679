/* The functions of cuBLASLt that the engine calls, computed on the CPU: products of bfloat16 matrices, the first one
 * transposed, as the work of a stream. What PyTorch itself calls with other operations is computed by device.py, and
 * so does nothing here. Without the simulated runtime a product is computed at once: unit tests use it so.
 *
 * The heuristic returns four algorithms. The first one sums in one part, the second one in two parts, which it stores
 * in its workspace. The third one is marked as invalid, and the last one fails: a caller has to skip both.
 */
#pragma GCC optimize("O3")
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#if __has_include(<cublasLt.h>)
#include <cublasLt.h> /* the compiler then compares all declarations with the real ones */
#else
typedef int cublasStatus_t, cublasComputeType_t, cudaDataType, cudaDataType_t, cublasLtMatmulDescAttributes_t,
    cublasLtMatmulPreferenceAttributes_t;
typedef struct cublasLtContext *cublasLtHandle_t;
typedef struct { uint64_t data[8]; } cublasLtMatrixLayoutOpaque_t, cublasLtMatmulAlgo_t,
    cublasLtMatmulPreferenceOpaque_t;
typedef struct { uint64_t data[32]; } cublasLtMatmulDescOpaque_t;
typedef cublasLtMatrixLayoutOpaque_t *cublasLtMatrixLayout_t;
typedef cublasLtMatmulDescOpaque_t *cublasLtMatmulDesc_t;
typedef cublasLtMatmulPreferenceOpaque_t *cublasLtMatmulPreference_t;
typedef struct {
    cublasLtMatmulAlgo_t algo;
    size_t workspaceSize;
    cublasStatus_t state;
    float wavesCount;
    int reserved[4];
} cublasLtMatmulHeuristicResult_t;
typedef struct CUstream_st *cudaStream_t;
enum { CUBLAS_STATUS_SUCCESS = 0, CUBLAS_STATUS_INVALID_VALUE = 7, CUBLAS_STATUS_EXECUTION_FAILED = 13,
       CUBLAS_STATUS_NOT_SUPPORTED = 15, CUBLAS_COMPUTE_32F = 68, CUBLAS_OP_T = 1, CUDA_R_32F = 0, CUDA_R_16BF = 14,
       CUBLASLT_MATMUL_DESC_TRANSA = 3, CUBLASLT_MATMUL_DESC_TRANSB = 4, CUBLASLT_MATMUL_DESC_EPILOGUE = 7,
       CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES = 1 };
#endif

_Static_assert(sizeof(cublasLtMatmulAlgo_t) == 64 && sizeof(cublasLtMatmulHeuristicResult_t) == 96, "layout");

#define EXPORT extern /* a function of the library */
#define WEAK __attribute__((weak))
extern int cudaLaunchHostFunc_(void *stream, void (*function)(void *), void *argument)
    __asm__("cudaLaunchHostFunc") WEAK;
extern int sim_stderr(void) WEAK; /* this and the next one: of the simulated runtime only */
extern void sim_product(const char *) WEAK;
extern int cudaMemsetAsync_(void *to, int value, size_t size, void *stream) __asm__("cudaMemsetAsync") WEAK;

enum { ALGORITHMS = 4, ONE_PART = 0, TWO_PARTS = 1, INVALID = 2, FAILING = 3, NAN_BYTE = 0xFF };

/* What the opaque structures hold here. */
typedef struct { int compute, scale, transpose_a, transpose_b, epilogue; } Operation;
typedef struct { uint64_t type, rows, columns; int64_t ld; } Layout;

static Operation *operation_of(cublasLtMatmulDesc_t handle) { return (Operation *)handle; }
static Layout *layout_of(cublasLtMatrixLayout_t handle) { return (Layout *)handle; }

EXPORT cublasStatus_t cublasLtCreate(cublasLtHandle_t *handle) {
    *handle = calloc(1, 64);
    return CUBLAS_STATUS_SUCCESS;
}

EXPORT cublasStatus_t cublasLtMatmulDescCreate(cublasLtMatmulDesc_t *made, cublasComputeType_t compute,
                                               cudaDataType_t scale) {
    *made = calloc(1, sizeof **made);
    *operation_of(*made) = (Operation){.compute = compute, .scale = scale};
    return CUBLAS_STATUS_SUCCESS;
}

EXPORT cublasStatus_t cublasLtMatmulDescDestroy(cublasLtMatmulDesc_t handle) {
    free(handle);
    return CUBLAS_STATUS_SUCCESS;
}

EXPORT cublasStatus_t cublasLtMatmulDescSetAttribute(cublasLtMatmulDesc_t handle,
                                                     cublasLtMatmulDescAttributes_t attribute,
                                                     const void *value, size_t size) {
    Operation *operation = operation_of(handle);
    int *place = attribute == CUBLASLT_MATMUL_DESC_TRANSA   ? &operation->transpose_a
                 : attribute == CUBLASLT_MATMUL_DESC_TRANSB ? &operation->transpose_b
                 : attribute == CUBLASLT_MATMUL_DESC_EPILOGUE ? &operation->epilogue
                                                            : NULL;
    if (!place) return CUBLAS_STATUS_SUCCESS;
    if (size != sizeof *place) return CUBLAS_STATUS_INVALID_VALUE;
    memcpy(place, value, size);
    return CUBLAS_STATUS_SUCCESS;
}

EXPORT cublasStatus_t cublasLtMatrixLayoutCreate(cublasLtMatrixLayout_t *made, cudaDataType type, uint64_t rows,
                                                 uint64_t columns, int64_t ld) {
    *made = calloc(1, sizeof **made);
    *layout_of(*made) = (Layout){type, rows, columns, ld};
    return CUBLAS_STATUS_SUCCESS;
}

EXPORT cublasStatus_t cublasLtMatrixLayoutDestroy(cublasLtMatrixLayout_t handle) {
    free(handle);
    return CUBLAS_STATUS_SUCCESS;
}

EXPORT cublasStatus_t cublasLtMatmulPreferenceCreate(cublasLtMatmulPreference_t *made) {
    *made = calloc(1, sizeof **made);
    return CUBLAS_STATUS_SUCCESS;
}

EXPORT cublasStatus_t cublasLtMatmulPreferenceDestroy(cublasLtMatmulPreference_t handle) {
    free(handle);
    return CUBLAS_STATUS_SUCCESS;
}

EXPORT cublasStatus_t cublasLtMatmulPreferenceSetAttribute(cublasLtMatmulPreference_t handle,
                                                           cublasLtMatmulPreferenceAttributes_t attribute,
                                                           const void *value, size_t size) {
    if (attribute != CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES) return CUBLAS_STATUS_SUCCESS;
    if (size != sizeof(uint64_t)) return CUBLAS_STATUS_INVALID_VALUE;
    memcpy(handle->data, value, size);
    return CUBLAS_STATUS_SUCCESS;
}

EXPORT cublasStatus_t cublasLtMatmulAlgoGetHeuristic(cublasLtHandle_t handle, cublasLtMatmulDesc_t operation,
                                                     cublasLtMatrixLayout_t a, cublasLtMatrixLayout_t b,
                                                     cublasLtMatrixLayout_t c, cublasLtMatrixLayout_t d,
                                                     cublasLtMatmulPreference_t preference, int wanted,
                                                     cublasLtMatmulHeuristicResult_t results[], int *found) {
    const uint64_t parts = 2 * sizeof(float) * layout_of(d)->rows * layout_of(d)->columns;
    *found = 0;
    for (int i = 0; i < ALGORITHMS && *found < wanted; i++) {
        const size_t workspace = i == TWO_PARTS ? parts : 0;
        if (workspace > preference->data[0]) continue;
        cublasLtMatmulHeuristicResult_t *result = &results[(*found)++];
        memset(result, 0, sizeof *result);
        result->algo.data[0] = i;
        result->workspaceSize = workspace;
        result->state = i == INVALID ? CUBLAS_STATUS_NOT_SUPPORTED : CUBLAS_STATUS_SUCCESS;
        result->wavesCount = 1;
    }
    return CUBLAS_STATUS_SUCCESS;
}

/* A product: out[m][n] = sum over k of x[m][k] * weight[n][k], in rows as torch sees them. */
typedef struct {
    const uint16_t *weight, *x;
    void *out;
    float *parts; /* two for each entry; or NULL */
    size_t rows, columns, width;
    int wide, kept; /* kept: a graph may compute it again */
} Product;

static float wider(uint16_t value) {
    const uint32_t bits = (uint32_t)value << 16;
    float number;
    memcpy(&number, &bits, sizeof number);
    return number;
}

static uint16_t rounded(float value) {
    uint32_t bits;
    memcpy(&bits, &value, sizeof bits);
    if (value != value) return 0x7FC0;
    return (bits + 0x7FFF + (bits >> 16 & 1)) >> 16; /* to the nearest, ties to even */
}

static float sum(const float *a, const float *b, size_t count) {
    float lanes[8] = {0}, total = 0;
    size_t i = 0;
    for (; i + 8 <= count; i += 8)
        for (int lane = 0; lane < 8; lane++) lanes[lane] += a[i + lane] * b[i + lane];
    for (; i < count; i++) total += a[i] * b[i];
    for (int lane = 0; lane < 8; lane++) total += lanes[lane];
    return total;
}

static void compute(void *argument) {
    Product *p = argument;
    float *x = malloc(p->rows * p->width * sizeof(float)), *weight = malloc(p->width * sizeof(float));
    for (size_t i = 0; i < p->rows * p->width; i++) x[i] = wider(p->x[i]);
    const size_t half = p->parts ? p->width / 2 : p->width;
    for (size_t n = 0; n < p->columns; n++) {
        for (size_t k = 0; k < p->width; k++) weight[k] = wider(p->weight[n * p->width + k]);
        for (size_t m = 0; m < p->rows; m++) {
            const size_t at = m * p->columns + n;
            float total = sum(&x[m * p->width], weight, half);
            if (p->parts) {
                p->parts[2 * at] = total;
                p->parts[2 * at + 1] = sum(&x[m * p->width + half], &weight[half], p->width - half);
                total = p->parts[2 * at] + p->parts[2 * at + 1];
            }
            if (p->wide) ((float *)p->out)[at] = total;
            else ((uint16_t *)p->out)[at] = rounded(total);
        }
    }
    free(x);
    free(weight);
    if (!p->kept) free(p);
}

static int is_known(const Operation *operation, const Layout *a, const Layout *b, const Layout *d) {
    return operation->transpose_a == CUBLAS_OP_T && !operation->transpose_b && operation->epilogue <= 1 &&
           operation->compute == CUBLAS_COMPUTE_32F && operation->scale == CUDA_R_32F && a->type == CUDA_R_16BF &&
           b->type == CUDA_R_16BF && (d->type == CUDA_R_16BF || d->type == CUDA_R_32F) &&
           a->ld == (int64_t)a->rows && b->ld == (int64_t)b->rows && d->ld == (int64_t)d->rows;
}

EXPORT cublasStatus_t cublasLtMatmul(cublasLtHandle_t handle, cublasLtMatmulDesc_t operation, const void *alpha,
                                     const void *a, cublasLtMatrixLayout_t a_layout, const void *b,
                                     cublasLtMatrixLayout_t b_layout, const void *beta, const void *c,
                                     cublasLtMatrixLayout_t c_layout, void *d, cublasLtMatrixLayout_t d_layout,
                                     const cublasLtMatmulAlgo_t *algorithm, void *workspace, size_t workspace_size,
                                     cudaStream_t stream) {
    const Layout *weight = layout_of(a_layout), *x = layout_of(b_layout), *out = layout_of(d_layout);
    const int simulated = sim_stderr != NULL;
    if (sim_product) sim_product("cublasLtMatmul");
    if (!is_known(operation_of(operation), weight, x, out) || (simulated && !getenv("SIMGPU")))
        return CUBLAS_STATUS_SUCCESS;
    if (*(const float *)alpha != 1 || *(const float *)beta != 0 || weight->rows != x->rows ||
        out->rows != weight->columns || out->columns != x->columns)
        return CUBLAS_STATUS_INVALID_VALUE;
    if (((uintptr_t)a | (uintptr_t)b | (uintptr_t)d | (uintptr_t)workspace) % 16) return CUBLAS_STATUS_INVALID_VALUE;
    const uint64_t number = algorithm ? algorithm->data[0] : ONE_PART;
    if (number >= INVALID) return CUBLAS_STATUS_NOT_SUPPORTED;
    const size_t entries = out->rows * out->columns, item = out->type == CUDA_R_32F ? 4 : 2;
    if (number == TWO_PARTS && workspace_size < entries * 2 * sizeof(float)) return CUBLAS_STATUS_INVALID_VALUE;
    Product *product = malloc(sizeof *product);
    *product = (Product){a, b, d, number == TWO_PARTS ? workspace : NULL, out->columns, out->rows, x->rows,
                         out->type == CUDA_R_32F, simulated};
    if (!simulated) {
        compute(product);
        return CUBLAS_STATUS_SUCCESS;
    }
    /* The first call refuses a stream that a kernel would refuse, and leaves NaN. */
    if (cudaMemsetAsync_(d, NAN_BYTE, entries * item, stream) || cudaLaunchHostFunc_(stream, compute, product))
        return CUBLAS_STATUS_EXECUTION_FAILED;
    return CUBLAS_STATUS_SUCCESS;
}
