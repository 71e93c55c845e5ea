/* The compiled form of nbdmirror.codec.batchpure: the same functions, the same results.
 *
 * What they do and what their arguments mean is said in nbdmirror/codec/batch.py. Nothing here
 * does I/O or keeps state; whatever looks odd is left to the Python code, which says what is wrong.
 */

#define PY_SSIZE_T_CLEAN
#include <Python.h>
#include <endian.h>
#include <stdint.h>
#include <string.h>
#define XXH_INLINE_ALL
#include <xxhash.h>

#define REQUEST_SIZE 28
#define REQUEST_MAGIC 0x25609513u
#define REPLY_SIZE 16
#define REPLY_MAGIC 0x67446698u
#define NBD_WRITE 1

#define HEADER_SIZE 64
#define SUM_AT 56
#define RECORD_MAGIC 0x31524d4eu /* "NMR1", little-endian */
#define RECORD_VERSION 1
#define RECORD_WRITE 1
#define PAYLOAD_MAX (1u << 20)

#define PLACE_SIZE 24

static uint16_t be16(const uint8_t *p) { uint16_t v; memcpy(&v, p, 2); return be16toh(v); }
static uint32_t be32(const uint8_t *p) { uint32_t v; memcpy(&v, p, 4); return be32toh(v); }
static uint64_t be64(const uint8_t *p) { uint64_t v; memcpy(&v, p, 8); return be64toh(v); }
static uint32_t le32(const uint8_t *p) { uint32_t v; memcpy(&v, p, 4); return le32toh(v); }
static uint64_t le64(const uint8_t *p) { uint64_t v; memcpy(&v, p, 8); return le64toh(v); }
static void put32(uint8_t *p, uint32_t v) { v = htole32(v); memcpy(p, &v, 4); }
static void put64(uint8_t *p, uint64_t v) { v = htole64(v); memcpy(p, &v, 8); }

static size_t padded(size_t length) { return (length + 63) & ~(size_t)63; }

struct place { uint64_t offset, at; uint32_t length, volume; };

static struct place get_place(const uint8_t *p)
{
    struct place place = { le64(p), le64(p + 8), le32(p + 16), le32(p + 20) };
    return place;
}

static void put_place(uint8_t *p, uint64_t offset, uint64_t at, uint32_t length, uint32_t volume)
{
    put64(p, offset);
    put64(p + 8, at);
    put32(p + 16, length);
    put32(p + 20, volume);
}

/* take_writes(view, start, end, length_max, export_size) */
static PyObject *take_writes(PyObject *self, PyObject *args)
{
    Py_buffer view;
    Py_ssize_t start, end, at, count = 0;
    unsigned long long length_max, export_size;
    unsigned long longest = 0;
    if (!PyArg_ParseTuple(args, "y*nnKK", &view, &start, &end, &length_max, &export_size))
        return NULL;
    const uint8_t *data = view.buf;
    if (start < 0 || end > view.len || start > end) {
        PyBuffer_Release(&view);
        PyErr_SetString(PyExc_ValueError, "not within the buffer");
        return NULL;
    }
    for (at = start; end - at >= REQUEST_SIZE; count++) {
        const uint8_t *p = data + at;
        uint64_t offset = be64(p + 16);
        uint32_t length = be32(p + 24);
        if (be32(p) != REQUEST_MAGIC || be16(p + 4) != 0 || be16(p + 6) != NBD_WRITE || !length ||
            length > length_max || offset > export_size || length > export_size - offset ||
            (uint64_t)(end - at) < (uint64_t)REQUEST_SIZE + length)
            break;
        if (length > longest)
            longest = length;
        at += REQUEST_SIZE + length;
    }
    PyObject *places = PyBytes_FromStringAndSize(NULL, count * PLACE_SIZE);
    PyObject *replies = PyBytes_FromStringAndSize(NULL, count * REPLY_SIZE);
    if (places == NULL || replies == NULL) {
        Py_XDECREF(places);
        Py_XDECREF(replies);
        PyBuffer_Release(&view);
        return NULL;
    }
    uint8_t *place = (uint8_t *)PyBytes_AS_STRING(places);
    uint8_t *reply = (uint8_t *)PyBytes_AS_STRING(replies);
    const uint32_t magic = htobe32(REPLY_MAGIC);
    at = start;
    for (Py_ssize_t i = 0; i < count; i++) {
        const uint8_t *p = data + at;
        uint32_t length = be32(p + 24);
        put_place(place + i * PLACE_SIZE, be64(p + 16), at + REQUEST_SIZE, length, 0);
        memcpy(reply + i * REPLY_SIZE, &magic, 4);
        memset(reply + i * REPLY_SIZE + 4, 0, 4);
        memcpy(reply + i * REPLY_SIZE + 8, p + 8, 8);
        at += REQUEST_SIZE + length;
    }
    PyBuffer_Release(&view);
    return Py_BuildValue("nNNk", at, places, replies, longest);
}

/* Whether all of n places lie within size bytes. */
static int within(const uint8_t *places, Py_ssize_t n, Py_ssize_t size)
{
    for (Py_ssize_t i = 0; i < n; i++) {
        struct place p = get_place(places + i * PLACE_SIZE);
        if (p.at > (uint64_t)size || p.length > (uint64_t)size - p.at)
            return 0;
    }
    return 1;
}

/* encode_writes(view, places, epoch, volume, seq, time_ns) */
static PyObject *encode_writes(PyObject *self, PyObject *args)
{
    Py_buffer view, places;
    unsigned int epoch, volume;
    unsigned long long seq, time_ns;
    if (!PyArg_ParseTuple(args, "y*y*IIKK", &view, &places, &epoch, &volume, &seq, &time_ns))
        return NULL;
    const uint8_t *data = view.buf, *from = places.buf;
    Py_ssize_t count = places.len / PLACE_SIZE;
    PyObject *block = NULL, *result = NULL;
    if (!within(from, count, view.len)) {
        PyErr_SetString(PyExc_ValueError, "a place is not within the buffer");
        goto done;
    }
    size_t size = 0;
    for (Py_ssize_t i = 0; i < count; i++)
        size += HEADER_SIZE + padded(get_place(from + i * PLACE_SIZE).length);
    block = PyBytes_FromStringAndSize(NULL, size);
    result = PyBytes_FromStringAndSize(NULL, count * PLACE_SIZE);
    if (block == NULL || result == NULL)
        goto done;
    uint8_t *out = (uint8_t *)PyBytes_AS_STRING(block), *head = out;
    uint8_t *to = (uint8_t *)PyBytes_AS_STRING(result);
    for (Py_ssize_t i = 0; i < count; i++) {
        struct place p = get_place(from + i * PLACE_SIZE);
        uint8_t *payload = head + HEADER_SIZE;
        memcpy(payload, data + p.at, p.length);
        memset(payload + p.length, 0, padded(p.length) - p.length);
        put32(head, RECORD_MAGIC);
        head[4] = RECORD_VERSION;
        head[5] = RECORD_WRITE;
        head[6] = head[7] = 0;
        put32(head + 8, epoch);
        put32(head + 12, volume);
        put64(head + 16, seq + i);
        put64(head + 24, p.offset);
        put64(head + 32, p.length);
        put64(head + 40, time_ns);
        put64(head + 48, XXH3_64bits(payload, p.length));
        put64(head + SUM_AT, XXH3_64bits(head, SUM_AT));
        put_place(to + i * PLACE_SIZE, p.offset, payload - out, p.length, volume);
        head = payload + padded(p.length);
    }
done:
    PyBuffer_Release(&view);
    PyBuffer_Release(&places);
    if (block == NULL || result == NULL) {
        Py_XDECREF(block);
        Py_XDECREF(result);
        return NULL;
    }
    return Py_BuildValue("NN", block, result);
}

/* stretches(places, size) */
static PyObject *stretches(PyObject *self, PyObject *args)
{
    Py_buffer places;
    unsigned long long size, last = 0;
    if (!PyArg_ParseTuple(args, "y*K", &places, &size))
        return NULL;
    PyObject *found = PyList_New(0);
    int any = 0;
    for (Py_ssize_t i = 0; found != NULL && i < places.len / PLACE_SIZE; i++) {
        struct place p = get_place((const uint8_t *)places.buf + i * PLACE_SIZE);
        uint64_t first = p.offset / size, final = (p.offset + p.length - 1) / size;
        for (uint64_t stretch = first; stretch <= final; stretch++) {
            if (any && stretch == last)
                continue;
            PyObject *number = PyLong_FromUnsignedLongLong(stretch);
            if (number == NULL || PyList_Append(found, number) < 0)
                Py_CLEAR(found);
            Py_XDECREF(number);
            if (found == NULL)
                break;
            any = 1;
            last = stretch;
        }
    }
    PyBuffer_Release(&places);
    return found;
}

/* The size of the plain write record at p, checked in full; 0 if it is anything else. */
static size_t check(const uint8_t *p, size_t here, uint32_t epoch_max, const uint8_t *sizes,
                    size_t volumes)
{
    if (here < HEADER_SIZE || le32(p) != RECORD_MAGIC || p[4] != RECORD_VERSION ||
        p[5] != RECORD_WRITE || le32(p + 8) > epoch_max ||
        XXH3_64bits(p, SUM_AT) != le64(p + SUM_AT))
        return 0;
    uint32_t volume = le32(p + 12);
    uint64_t offset = le64(p + 24), length = le64(p + 32);
    if (!length || length > PAYLOAD_MAX || HEADER_SIZE + padded(length) > here || volume >= volumes)
        return 0;
    uint64_t size = le64(sizes + 8 * volume);
    if (offset > size || length > size - offset ||
        XXH3_64bits(p + HEADER_SIZE, length) != le64(p + 48))
        return 0;
    return HEADER_SIZE + padded(length);
}

/* check_writes(view, next_seq, epoch_min, epoch_max, sizes) */
static PyObject *check_writes(PyObject *self, PyObject *args)
{
    Py_buffer view, sizes;
    unsigned long long next_seq;
    unsigned int epoch, epoch_max;
    if (!PyArg_ParseTuple(args, "y*KIIy*", &view, &next_seq, &epoch, &epoch_max, &sizes))
        return NULL;
    const uint8_t *data = view.buf;
    size_t end = view.len, at = 0, start = 0, size, largest = 0;
    Py_ssize_t count = 0;
    PyObject *places = NULL;
    uint64_t seq = next_seq;
    for (; at < end; at += size) {
        size = check(data + at, end - at, epoch_max, sizes.buf, sizes.len / 8);
        if (!size)
            break;
        uint64_t found = le64(data + at + 16);
        if (found < next_seq && !count) {
            start = at + size; /* here already: skipped (O8) */
            continue;
        }
        if (found != seq || le32(data + at + 8) < epoch)
            break;
        epoch = le32(data + at + 8);
        seq++;
        count++;
        if (size > largest)
            largest = size;
    }
    if (at == end) {
        places = PyBytes_FromStringAndSize(NULL, count * PLACE_SIZE);
        uint8_t *place = places ? (uint8_t *)PyBytes_AS_STRING(places) : NULL;
        for (at = start; place != NULL && at < end; place += PLACE_SIZE) {
            const uint8_t *p = data + at;
            uint32_t length = (uint32_t)le64(p + 32);
            put_place(place, le64(p + 24), at - start + HEADER_SIZE, length, le32(p + 12));
            at += HEADER_SIZE + padded(length);
        }
    }
    PyBuffer_Release(&view);
    PyBuffer_Release(&sizes);
    if (at != end)
        Py_RETURN_NONE;
    if (places == NULL)
        return NULL;
    return Py_BuildValue("nNnI", (Py_ssize_t)start, places, (Py_ssize_t)largest, epoch);
}

static PyMethodDef methods[] = {
    {"take_writes", take_writes, METH_VARARGS, "See nbdmirror.codec.batch."},
    {"encode_writes", encode_writes, METH_VARARGS, "See nbdmirror.codec.batch."},
    {"stretches", stretches, METH_VARARGS, "See nbdmirror.codec.batch."},
    {"check_writes", check_writes, METH_VARARGS, "See nbdmirror.codec.batch."},
    {NULL, NULL, 0, NULL},
};

static struct PyModuleDef module = {
    PyModuleDef_HEAD_INIT, "_batch", "The compiled form of batchpure.", -1, methods,
};

PyMODINIT_FUNC PyInit__batch(void) { return PyModule_Create(&module); }
