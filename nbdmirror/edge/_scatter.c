/* Reads and writes of the data path without a Python loop, and without a copy more than needed; what
 * each does is spelled out in nbdmirror/edge/files.py. A place is described in
 * nbdmirror/codec/batch.py. */

#define _GNU_SOURCE
#define PY_SSIZE_T_CLEAN
#define _FILE_OFFSET_BITS 64
#include <Python.h>
#include <endian.h>
#include <errno.h>
#include <stdint.h>
#include <string.h>
#include <sys/uio.h>
#include <unistd.h>

#define PLACE_SIZE 24

static uint64_t le64(const uint8_t *p) { uint64_t v; memcpy(&v, p, 8); return le64toh(v); }
static uint32_t le32(const uint8_t *p) { uint32_t v; memcpy(&v, p, 4); return le32toh(v); }

/* 0, or the errno of what went wrong; a write that makes no progress is a full device. */
static int write_all(int fd, const uint8_t *data, uint64_t length, uint64_t offset)
{
    while (length) {
        ssize_t count = pwrite(fd, data, length, (off_t)offset);
        if (count < 0 && errno == EINTR)
            continue;
        if (count <= 0)
            return count ? errno : ENOSPC;
        data += count;
        offset += count;
        length -= count;
    }
    return 0;
}

/* pwrite_places(fd, block, places, volume) */
static PyObject *pwrite_places(PyObject *self, PyObject *args)
{
    int fd, error = 0;
    unsigned int volume;
    Py_buffer block, places;
    if (!PyArg_ParseTuple(args, "iy*y*I", &fd, &block, &places, &volume))
        return NULL;
    const uint8_t *place = places.buf, *end = place + places.len / PLACE_SIZE * PLACE_SIZE;
    Py_BEGIN_ALLOW_THREADS
    for (; !error && place < end; place += PLACE_SIZE) {
        uint64_t at = le64(place + 8);
        uint32_t length = le32(place + 16);
        if (le32(place + 20) != volume)
            continue;
        if (at > (uint64_t)block.len || length > (uint64_t)block.len - at)
            error = EFAULT;
        else
            error = write_all(fd, (const uint8_t *)block.buf + at, length, le64(place));
    }
    Py_END_ALLOW_THREADS
    PyBuffer_Release(&block);
    PyBuffer_Release(&places);
    if (error) {
        errno = error;
        return PyErr_SetFromErrno(PyExc_OSError);
    }
    Py_RETURN_NONE;
}

/* pread_cached(fd, length, offset): what the page cache holds, straight into new bytes. */
static PyObject *pread_cached(PyObject *self, PyObject *args)
{
    int fd;
    Py_ssize_t length;
    long long offset;
    if (!PyArg_ParseTuple(args, "inL", &fd, &length, &offset))
        return NULL;
    PyObject *data = PyBytes_FromStringAndSize(NULL, length);
    if (!data)
        return NULL;
    struct iovec part = {PyBytes_AS_STRING(data), (size_t)length};
    ssize_t count;
    do {
        Py_BEGIN_ALLOW_THREADS
        count = preadv2(fd, &part, 1, (off_t)offset, RWF_NOWAIT);
        Py_END_ALLOW_THREADS
    } while (count < 0 && errno == EINTR && !PyErr_CheckSignals());
    if (count < 0) {
        Py_DECREF(data);
        return PyErr_Occurred() ? NULL : PyErr_SetFromErrno(PyExc_OSError);
    }
    if (count != length && _PyBytes_Resize(&data, count) < 0)
        return NULL;
    return data;
}

static PyMethodDef methods[] = {
    {"pread_cached", pread_cached, METH_VARARGS, "See nbdmirror.edge.files."},
    {"pwrite_places", pwrite_places, METH_VARARGS, "See nbdmirror.edge.files."},
    {NULL, NULL, 0, NULL},
};

static struct PyModuleDef module = {
    PyModuleDef_HEAD_INIT, "_scatter", "Reads and writes of the data path.", -1, methods,
};

PyMODINIT_FUNC PyInit__scatter(void) { return PyModule_Create(&module); }
