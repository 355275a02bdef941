/* The elementwise parts of rounding.py, each in one pass over a block; without a compiler, numpy does the same there.

   `widen`: float16 to float32. `compare`: which stored numbers are not settled as the nearest to base + product, and the
   sums that figures.py wants. `confirm`: which of those float64 does not settle either. Nothing of this is shared with
   the code that fuses. */

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

static inline int32_t integer(float number) {
    int32_t found;
    memcpy(&found, &number, sizeof found);
    return found;
}

/* 0 if there is Inf or NaN among them, whose exponents would have to become float32's greatest. */
EACH_WIDTH static int widen_all(const uint16_t *restrict half, float *restrict wide, Py_ssize_t count) {
    int32_t special = 0;
    for (Py_ssize_t i = 0; i < count; i++) {
        int32_t sign = (half[i] & 0x8000) != 0, rest = half[i] & 0x7FFF;
        special |= rest >= 0x7C00;
        int32_t bits = rest << 13;
        float small; /* by 2**112, the difference of the exponents' biases */
        memcpy(&small, &bits, sizeof small);
        wide[i] = small * (sign ? -0x1p112f : 0x1p112f);
    }
    return !special;
}

/* `reach`: how many float32 numbers to either side of a stored one still round to it. Numbers of one sign are ordered as
   their bits are, so that the distance of two is a difference of integers. Below `least`, the stored dtype's smallest
   normal number, its numbers lie at one distance; there what is less than `near` away rounds to a stored one. */
typedef struct {
    double changed, along, size, rest;
} Sums;

EACH_WIDTH static void compare_row(const float *restrict base, const float *restrict stored,
                                   const float *restrict product, const float *restrict widths, float length,
                                   float least, float near, int32_t reach,
                                   Py_ssize_t count, uint8_t *restrict open, Sums *sums) {
    float along = 0, size = 0, rest = 0;
    int32_t changed = 0;
#pragma omp simd reduction(+ : along, size, rest, changed)
    for (Py_ssize_t i = 0; i < count; i++) {
        float exact = base[i] + product[i], residual = stored[i] - exact;
        float room = length * widths[i];
        changed += stored[i] != base[i];
        along += residual * product[i];
        size += product[i] * product[i];
        rest += residual * residual;
        uint32_t first = (uint32_t)integer(stored[i]) - (uint32_t)reach;
        uint32_t low = (uint32_t)integer(exact - room) - first, high = (uint32_t)integer(exact + room) - first;
        uint8_t far = (low > 2 * (uint32_t)reach) | (high > 2 * (uint32_t)reach);
        open[i] = far & !((fabsf(stored[i]) < least) & (fabsf(residual) + room < near));
    }
    sums->changed += changed;
    sums->along += along;
    sums->size += size;
    sums->rest += rest;
}

/* The elements of one call of `compare_row`: so few that their sums may be made in float32. */
#define STEP 512

static Py_ssize_t compare_all(const float *base, const float *stored, const float *product, const float *lengths,
                              const float *widths, Py_ssize_t rows, Py_ssize_t columns, float least, float near,
                              int32_t reach, int64_t *open, Sums *sums) {
    uint8_t marks[STEP];
    Py_ssize_t found = 0;
    for (Py_ssize_t row = 0; row < rows; row++)
        for (Py_ssize_t first = 0; first < columns; first += STEP) {
            Py_ssize_t count = columns - first < STEP ? columns - first : STEP, at = row * columns + first;
            compare_row(base + at, stored + at, product + at, widths + first, lengths[row], least, near,
                        reach, count, marks, sums);
            memset(marks + count, 0, (size_t)(STEP - count));
            for (Py_ssize_t i = 0; i < count; i += 8) { /* most have no mark among eight */
                uint64_t eight;
                memcpy(&eight, marks + i, sizeof eight);
                for (Py_ssize_t j = i; eight && j < i + 8; j++)
                    if (marks[j])
                        open[found++] = at + j;
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

static int64_t whole(double number) {
    int64_t found;
    memcpy(&found, &number, sizeof found);
    return found;
}

typedef struct {
    const float *base, *stored;
    const double *up, *columns, *lengths, *widths;
    Py_ssize_t width, ranks; /* elements of a row; products in an element */
    double unit;             /* times the length of a row and the width of a column: the product's error */
    double least, near;      /* as above */
    int64_t reach;           /* of float64 numbers */
} Block;

/* Put the elements that stay open first; how many there are. */
static Py_ssize_t confirm_all(const Block *b, int64_t *open, Py_ssize_t count) {
    Py_ssize_t left = 0;
    for (Py_ssize_t i = 0; i < count; i++) {
        int64_t at = open[i], row = at / b->width, column = at % b->width;
        double exact = b->base[at] + dot(b->up + row * b->ranks, b->columns + column * b->ranks, b->ranks);
        double room = b->lengths[row] * b->widths[column] * b->unit + fabs(exact) * 0x1p-52;
        double stored = b->stored[at];
        uint64_t first = (uint64_t)whole(stored) - (uint64_t)b->reach, most = 2 * (uint64_t)b->reach;
        int far = (uint64_t)whole(exact - room) - first > most || (uint64_t)whole(exact + room) - first > most;
        if (far && !(fabs(stored) < b->least && fabs(stored - exact) + room < b->near))
            open[left++] = at;
    }
    return left;
}

static void release(Py_buffer *buffers, int count) {
    for (int i = 0; i < count; i++)
        PyBuffer_Release(&buffers[i]);
}

static PyObject *sizes_differ(void) {
    PyErr_SetString(PyExc_ValueError, "sizes that do not belong together");
    return NULL;
}

static PyObject *widen(PyObject *self, PyObject *args) {
    Py_buffer b[2]; /* half, wide */
    int finite = 0;
    (void)self;
    if (!PyArg_ParseTuple(args, "y*w*", &b[0], &b[1]))
        return NULL;
    int fits = b[1].len == 2 * b[0].len && b[0].len % 2 == 0;
    if (fits) {
        Py_BEGIN_ALLOW_THREADS
        finite = widen_all(b[0].buf, b[1].buf, b[0].len / 2);
        Py_END_ALLOW_THREADS
    }
    release(b, 2);
    return fits ? PyBool_FromLong(finite) : sizes_differ();
}

static PyObject *compare(PyObject *self, PyObject *args) {
    Py_buffer b[6]; /* base, stored, product, lengths, widths, open */
    int reach;
    float least, near;
    Py_ssize_t found = 0;
    Sums sums = {0, 0, 0, 0};
    (void)self;
    if (!PyArg_ParseTuple(args, "y*y*y*y*y*ffiw*", &b[0], &b[1], &b[2], &b[3], &b[4], &least, &near, &reach,
                          &b[5]))
        return NULL;
    Py_ssize_t rows = b[3].len / 4, columns = b[4].len / 4, bytes = rows * columns * 4;
    int fits = b[0].len == bytes && b[1].len == bytes && b[2].len == bytes && b[5].len == 2 * bytes;
    if (fits) {
        Py_BEGIN_ALLOW_THREADS
        found = compare_all(b[0].buf, b[1].buf, b[2].buf, b[3].buf, b[4].buf, rows, columns, least, near, reach,
                            b[5].buf, &sums);
        Py_END_ALLOW_THREADS
    }
    release(b, 6);
    return fits ? Py_BuildValue("ndddd", found, sums.changed, sums.along, sums.size, sums.rest) : sizes_differ();
}

static int within(const int64_t *places, Py_ssize_t count, Py_ssize_t size) {
    for (Py_ssize_t i = 0; i < count; i++)
        if (places[i] < 0 || places[i] >= size)
            return 0;
    return 1;
}

static PyObject *confirm(PyObject *self, PyObject *args) {
    Py_buffer b[7]; /* base, stored, up, columns, lengths, widths, open */
    Block block;
    long long reach;
    Py_ssize_t left = 0;
    (void)self;
    if (!PyArg_ParseTuple(args, "y*y*y*y*y*y*dddLw*", &b[0], &b[1], &b[2], &b[3], &b[4], &b[5], &block.unit,
                          &block.least, &block.near, &reach, &b[6]))
        return NULL;
    Py_ssize_t rows = b[4].len / 8, count = b[6].len / 8;
    block.width = b[5].len / 8;
    block.ranks = rows ? b[2].len / 8 / rows : 0;
    block.base = b[0].buf, block.stored = b[1].buf, block.up = b[2].buf, block.columns = b[3].buf;
    block.lengths = b[4].buf, block.widths = b[5].buf, block.reach = reach;
    int fits = b[0].len == rows * block.width * 4 && b[1].len == b[0].len && b[2].len == rows * block.ranks * 8 &&
               b[3].len == block.width * block.ranks * 8 && within(b[6].buf, count, rows * block.width);
    if (fits) {
        Py_BEGIN_ALLOW_THREADS
        left = confirm_all(&block, b[6].buf, count);
        Py_END_ALLOW_THREADS
    }
    release(b, 7);
    return fits ? PyLong_FromSsize_t(left) : sizes_differ();
}

static PyMethodDef methods[] = {{"widen", widen, METH_VARARGS, NULL},
                                {"compare", compare, METH_VARARGS, NULL},
                                {"confirm", confirm, METH_VARARGS, NULL},
                                {NULL, NULL, 0, NULL}};
static struct PyModuleDef module = {PyModuleDef_HEAD_INIT, "_cells", NULL, 0, methods, NULL, NULL, NULL, NULL};
PyMODINIT_FUNC PyInit__cells(void) { return PyModuleDef_Init(&module); }
