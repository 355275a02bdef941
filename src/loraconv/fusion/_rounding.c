/* The elementwise part of `merging._sum_single` in one pass: numpy takes some twenty, each through the cache.

   For every element: base + product in float32, an interval of `error` to either side, and both ends rounded to the
   16-bit dtype. Where they differ the element is doubtful, which the caller decides with more precision. merging.py has
   the same in numpy, for installations without a compiler, and says why it is right. */

#define Py_LIMITED_API 0x030B0000
#define PY_SSIZE_T_CLEAN
#include <Python.h>
#include <math.h>
#include <stdint.h>
#include <string.h>

/* One version for each width of vectors, of which the processor's own is taken when the module is loaded. */
#if defined(__x86_64__) && defined(__gnu_linux__) && __GNUC__ >= 12 && !defined(__clang__)
#define EACH_WIDTH __attribute__((target_clones("arch=x86-64-v4", "avx2", "default")))
#else
#define EACH_WIDTH
#endif

static inline uint32_t bits_of(float value) {
    uint32_t bits;
    memcpy(&bits, &value, sizeof bits);
    return bits;
}

static inline float value_of(uint32_t bits) {
    float value;
    memcpy(&value, &bits, sizeof value);
    return value;
}

/* The bits of a stored number as a float32's. Those of a float16 are too small by 2**112 until they are multiplied. */
static inline float from_f16(uint32_t raw) { return value_of((raw & 0x8000) << 16 | (raw & 0x7FFF) << 13) * 0x1p112f; }
static inline float from_bf16(uint32_t raw) { return value_of(raw << 16); }
static inline float from_f32(uint32_t raw) { return value_of(raw); }

/* CUT: the bits by which float32 is longer. SCALE: what takes the dtype's exponents to those of float32. INFINITY_: its
   bits of infinity, which NaN and everything too large are not below either. */
#define ROW(NAME, RAW, LOAD, RAW_INFINITY, CUT, SCALE, INFINITY_)                                                      \
    EACH_WIDTH static uint32_t NAME(const RAW *restrict base, const float *restrict product,                           \
                                    const float *restrict error, Py_ssize_t count, uint16_t *restrict made,            \
                                    uint8_t *restrict doubtful) {                                                      \
        const uint32_t half = 1u << (CUT - 1), unit = 2;                                                               \
        uint32_t bad = 0;                                                                                              \
        for (Py_ssize_t i = 0; i < count; i++) {                                                                       \
            uint32_t raw = base[i];                                                                                    \
            bad |= (raw & RAW_INFINITY) == RAW_INFINITY;                                                               \
            float sum = LOAD(raw) + product[i];                                                                        \
            float size = fabsf(sum) * SCALE;                                                                           \
            uint32_t high = (bits_of(size + error[i]) + half + unit) >> CUT;                                           \
            uint32_t low = (bits_of(size - error[i]) + half - unit) >> CUT;                                            \
            doubtful[i] = (high != low) | (high >= INFINITY_);                                                         \
            made[i] = (uint16_t)((bits_of(sum) >> 16 & 0x8000) | high);                                                \
        }                                                                                                              \
        return bad;                                                                                                    \
    }

#define ROWS(OUT, CUT, SCALE, INFINITY_)                                                                               \
    ROW(f16_to_##OUT, uint16_t, from_f16, 0x7C00u, CUT, SCALE, INFINITY_)                                              \
    ROW(bf16_to_##OUT, uint16_t, from_bf16, 0x7F80u, CUT, SCALE, INFINITY_)                                            \
    ROW(f32_to_##OUT, uint32_t, from_f32, 0x7F800000u, CUT, SCALE, INFINITY_)
ROWS(f16, 13, 0x1p-112f, 0x7C00u)
ROWS(bf16, 16, 1.0f, 0x7F80u)

/* Elements that are computed before their marks are looked at. */
#define STEP 1024

typedef struct {
    const char *base;
    uint16_t *made;
    int64_t *doubtful;
    Py_ssize_t rows, columns, room, width;
    int half, wide; /* the result is F16; the base is F32 */
    float (*load)(uint32_t);
    uint32_t (*from16)(const uint16_t *, const float *, const float *, Py_ssize_t, uint16_t *, uint8_t *);
    uint32_t (*from32)(const uint32_t *, const float *, const float *, Py_ssize_t, uint16_t *, uint8_t *);
} Job;

/* How many elements are doubtful: their numbers are in job->doubtful as far as there is room. -1: NaN or Inf. */
static Py_ssize_t in_float32(const Job *job, const float *product, const float *error) {
    uint8_t marks[STEP];
    Py_ssize_t found = 0;
    for (Py_ssize_t row = 0; row < job->rows; row++)
        for (Py_ssize_t first = 0; first < job->columns; first += STEP) {
            Py_ssize_t count = job->columns - first < STEP ? job->columns - first : STEP;
            Py_ssize_t at = row * job->columns + first;
            uint32_t bad = job->wide ? job->from32((const uint32_t *)job->base + at, product + at, error + first,
                                                   count, job->made + at, marks)
                                     : job->from16((const uint16_t *)job->base + at, product + at, error + first,
                                                   count, job->made + at, marks);
            if (bad)
                return -1;
            memset(marks + count, 0, (size_t)(STEP - count));
            for (Py_ssize_t i = 0; i < count; i += 8) { /* most have no mark among eight */
                uint64_t eight;
                memcpy(&eight, marks + i, sizeof eight);
                for (Py_ssize_t j = i; eight && j < i + 8; j++)
                    if (marks[j]) {
                        if (found < job->room)
                            job->doubtful[found] = at + j;
                        found++;
                    }
            }
        }
    return found;
}

EACH_WIDTH static double dot(const double *restrict one, const double *restrict other, Py_ssize_t count) {
    double sum = 0;
#pragma omp simd reduction(+ : sum)
    for (Py_ssize_t i = 0; i < count; i++)
        sum += one[i] * other[i];
    return sum;
}

/* The number nearest to a sum that is off by at most `error`, or -1 where that error leaves two: as ROW does it, in
   float64, whose exponents are longer by 2**1008 (F16) and 2**896 (BF16). */
static int32_t nearest(double sum, double error, int half) {
    const int cut = half ? 42 : 45;
    const double scale = half ? 0x1p-1008 : 0x1p-896;
    const uint64_t middle = 1ull << (cut - 1), unit = 2;
    double ends[2] = {fabs(sum) * scale + error * scale, fabs(sum) * scale - error * scale};
    uint64_t bits[2];
    memcpy(bits, ends, sizeof bits);
    uint64_t high = (bits[0] + middle + unit) >> cut, low = (bits[1] + middle - unit) >> cut;
    if (high != low || high >= (half ? 0x7C00u : 0x7F80u))
        return -1;
    return (int32_t)high | (sum < 0 ? 0x8000 : 0);
}

/* Decide the first `count` doubtful elements in float64; the ones that are left come first in job->doubtful. */
static Py_ssize_t in_float64(const Job *job, const double *up, const double *down, const double *lengths,
                             const double *widths, Py_ssize_t ranks, double error, Py_ssize_t count) {
    Py_ssize_t left = 0;
    for (Py_ssize_t i = 0; i < count; i++) {
        int64_t at = job->doubtful[i], row = at / job->columns, column = at % job->columns;
        uint32_t raw = job->wide ? ((const uint32_t *)job->base)[at] : ((const uint16_t *)job->base)[at];
        double sum = job->load(raw) + dot(up + row * ranks, down + column * ranks, ranks);
        int32_t bits = nearest(sum, lengths[row] * widths[column] * error + fabs(sum) * 0x1p-52, job->half);
        if (bits < 0)
            job->doubtful[left++] = at;
        else
            job->made[at] = (uint16_t)bits;
    }
    return left;
}

/* Take the buffers' sizes and dtypes; 0 if they do not belong together. */
static int prepare(Job *job, const Py_buffer *base, const char *from, const char *to, const Py_buffer *made,
                   const Py_buffer *doubtful, Py_ssize_t columns) {
    job->half = !strcmp(to, "F16");
    job->wide = !strcmp(from, "F32");
    job->width = job->wide ? 4 : 2;
    if ((!job->half && strcmp(to, "BF16")) || (!job->wide && strcmp(from, "F16") && strcmp(from, "BF16")))
        return 0;
    int from_half = !strcmp(from, "F16");
    job->load = job->wide ? from_f32 : from_half ? from_f16 : from_bf16;
    job->from32 = job->half ? f32_to_f16 : f32_to_bf16;
    job->from16 = from_half ? (job->half ? f16_to_f16 : f16_to_bf16) : job->half ? bf16_to_f16 : bf16_to_bf16;
    job->base = base->buf;
    job->made = made->buf;
    job->doubtful = doubtful->buf;
    job->room = doubtful->len / (Py_ssize_t)sizeof(int64_t);
    job->columns = columns;
    job->rows = columns ? made->len / 2 / columns : 0;
    return made->len == job->rows * columns * 2 && base->len == job->rows * columns * job->width;
}

static PyObject *answer(int fits, Py_ssize_t found, Py_buffer *buffers, int count) {
    for (int i = 0; i < count; i++)
        PyBuffer_Release(&buffers[i]);
    if (fits)
        return PyLong_FromSsize_t(found);
    PyErr_SetString(PyExc_ValueError, "dtypes or sizes that do not belong together");
    return NULL;
}

static PyObject *round_sums(PyObject *self, PyObject *args) {
    const char *from, *to;
    Py_buffer b[5]; /* base, product, error, made, doubtful */
    Job job;
    Py_ssize_t found = 0;
    (void)self;
    if (!PyArg_ParseTuple(args, "y*sy*y*sw*w*", &b[0], &from, &b[1], &b[2], &to, &b[3], &b[4]))
        return NULL;
    int fits = prepare(&job, &b[0], from, to, &b[3], &b[4], b[2].len / 4) && b[1].len == job.rows * job.columns * 4;
    if (fits) {
        Py_BEGIN_ALLOW_THREADS
        found = in_float32(&job, b[1].buf, b[2].buf);
        Py_END_ALLOW_THREADS
    }
    return answer(fits, found, b, 5);
}

static int within(const int64_t *places, Py_ssize_t count, Py_ssize_t size) {
    for (Py_ssize_t i = 0; i < count; i++)
        if (places[i] < 0 || places[i] >= size)
            return 0;
    return 1;
}

static PyObject *settle(PyObject *self, PyObject *args) {
    const char *from, *to;
    Py_buffer b[7]; /* base, up, down, lengths, widths, made, doubtful */
    Job job;
    double error;
    Py_ssize_t left = 0, ranks = 0;
    (void)self;
    if (!PyArg_ParseTuple(args, "y*sy*y*y*y*dsw*w*", &b[0], &from, &b[1], &b[2], &b[3], &b[4], &error, &to, &b[5], &b[6]))
        return NULL;
    int fits = prepare(&job, &b[0], from, to, &b[5], &b[6], b[4].len / 8);
    if (fits && job.rows && job.columns) {
        ranks = b[1].len / 8 / job.rows;
        fits = b[1].len == job.rows * ranks * 8 && b[2].len == job.columns * ranks * 8 && b[3].len == job.rows * 8 &&
               within(job.doubtful, job.room, job.rows * job.columns);
    }
    if (fits) {
        Py_BEGIN_ALLOW_THREADS
        left = in_float64(&job, b[1].buf, b[2].buf, b[3].buf, b[4].buf, ranks, error, job.room);
        Py_END_ALLOW_THREADS
    }
    return answer(fits, left, b, 7);
}

static PyMethodDef methods[] = {
    {"round_sums", round_sums, METH_VARARGS, NULL}, {"settle", settle, METH_VARARGS, NULL}, {NULL, NULL, 0, NULL}};
static struct PyModuleDef module = {PyModuleDef_HEAD_INIT, "_rounding", NULL, 0, methods, NULL, NULL, NULL, NULL};
PyMODINIT_FUNC PyInit__rounding(void) { return PyModuleDef_Init(&module); }
