/* A Python extension module, tilewright.kernels.cpu._eager: the shortest way from a call of a layer to the kernel that
   served the last call like it. It does what `prepared_call` and what that returns do (kernels/dispatch/layers.py), without
   the interpreter in between, which takes as long as a small product.

   It knows nothing of PyTorch's types: tensors are asked through their Python methods. With the limited interface of
   Python 3.10 one build serves every later version. */
#define Py_LIMITED_API 0x030A0000
#define PY_SSIZE_T_CLEAN
#include <Python.h>

#include <stdint.h>

enum { MOST_TENSORS = 8 };
static const char NAME[] = "tilewright.repeated_call";

typedef int (*kernel)(const int64_t *given, const void *x, void *y, uint8_t *scratch);

/* A call that was made before. check: of x and the tensors, whether they and what this thread does are as they were but
   for memory and versions. seen: the tensors then; which object, without keeping it alive, at what address and version.
   Where there is no function, `python` takes x. */
typedef struct {
    PyObject *check, *activation, *names, *absent, *expired, *empty, *like, *scratch, *python;
    long generation, threads;
    kernel function;
    const int64_t *given;
    Py_ssize_t count;
    int biased;
    struct {
        PyObject *object;
        void *address;
        long version;
    } seen[MOST_TENSORS];
} repeated;

/* What `setup` was given: functions that return something true where somebody looks at operators, and others. */
static PyObject *watchers, *forward_mode, *generation_now, *threads_now, *data_ptr;
/* Names of attributes. */
static PyObject *known_name, *calls_name, *shape_name, *version_name, *level_name, *buffers_name, *parameters_name,
    *bias_name, *activation_name;

static void forget(PyObject *capsule) {
    repeated *r = PyCapsule_GetPointer(capsule, NAME);
    if (!r) return;
    PyObject *held[] = {r->check, r->activation, r->names, r->absent, r->expired, r->empty, r->like, r->scratch, r->python};
    for (size_t i = 0; i < sizeof held / sizeof *held; i++) Py_XDECREF(held[i]);
    PyMem_Free(r);
}

/* -1 with an exception where something goes wrong, as `number_of`. */
static void *address_of(PyObject *tensor) {
    PyObject *value = PyObject_CallFunctionObjArgs(data_ptr, tensor, NULL);
    if (!value) return (void *)-1;
    void *address = PyLong_AsVoidPtr(value);
    Py_DECREF(value);
    return PyErr_Occurred() ? (void *)-1 : address;
}

static long number_of(PyObject *value) {
    if (!value) return -1;
    const long number = PyLong_AsLong(value);
    Py_DECREF(value);
    return number;
}

static int fill(repeated *r, PyObject *tensors) {
    r->count = PyTuple_Size(tensors);
    if (r->count < 0 || r->count > MOST_TENSORS) {
        PyErr_SetString(PyExc_ValueError, "too many tensors");
        return 0;
    }
    for (Py_ssize_t i = 0; i < r->count; i++) {
        PyObject *tensor = PyTuple_GetItem(tensors, i);
        r->seen[i].object = tensor;
        r->seen[i].address = address_of(tensor);
        if (r->seen[i].address == (void *)-1) return 0;
        r->seen[i].version = number_of(PyObject_GetAttr(tensor, version_name));
        if (PyErr_Occurred()) return 0;
    }
    return 1;
}

/* remember(check, activation, names, absent, biased, tensors, expired, generation, threads, function, given, empty, like,
   scratch, python): see `repeated`; names: of the buffers that the first of `tensors` are, of which the bias is the last
   where `biased`; absent: of those that were not there. expired: a list, empty while the tensors' memory lives. function,
   given: addresses, or 0. empty(like): memory for the result. scratch: None, or a function that returns an address. */
static PyObject *remember(PyObject *self, PyObject *args) {
    (void)self;
    PyObject *tensors;
    unsigned long long function, given;
    repeated *r = PyMem_Calloc(1, sizeof *r);
    if (!r) return PyErr_NoMemory();
    if (!PyArg_ParseTuple(args, "OUO!O!pO!O!llKKOOOO", &r->check, &r->activation, &PyTuple_Type, &r->names, &PyTuple_Type,
                          &r->absent, &r->biased, &PyTuple_Type, &tensors, &PyList_Type, &r->expired, &r->generation,
                          &r->threads, &function, &given, &r->empty, &r->like, &r->scratch, &r->python) ||
        !fill(r, tensors)) {
        PyMem_Free(r);
        return NULL;
    }
    r->function = (kernel)(uintptr_t)function;
    r->given = (const int64_t *)(uintptr_t)given;
    PyObject *held[] = {r->check, r->activation, r->names, r->absent, r->expired, r->empty, r->like, r->scratch, r->python};
    for (size_t i = 0; i < sizeof held / sizeof *held; i++) Py_INCREF(held[i]);
    PyObject *capsule = PyCapsule_New(r, NAME, forget);
    if (!capsule) PyMem_Free(r);
    return capsule;
}

/* Whether a function of no arguments returns something false. */
static int is_off(PyObject *function) {
    PyObject *value = PyObject_CallNoArgs(function);
    const int on = value ? value != Py_False && PyObject_IsTrue(value) : 1;
    Py_XDECREF(value);
    return !on;
}

/* Whether nobody looks at operators and the router decides as it did. The rest is in the dispatch keys that `check` sees. */
static int nobody_looks(const repeated *r) {
    const Py_ssize_t count = PyTuple_Size(watchers);
    for (Py_ssize_t i = 0; i < count; i++)
        if (!is_off(PyTuple_GetItem(watchers, i))) return 0;
    return number_of(PyObject_GetAttr(forward_mode, level_name)) < 0 && !PyErr_Occurred() &&
           number_of(PyObject_CallNoArgs(generation_now)) == r->generation &&
           (r->threads <= 1 || number_of(PyObject_CallNoArgs(threads_now)) == r->threads);
}

/* Whether the layer's tensors are those that were seen, untouched, and x is as it was. */
static int is_same(const repeated *r, PyObject *layer, PyObject *x) {
    PyObject *buffers = PyDict_GetItemWithError(layer, buffers_name);
    PyObject *parameters = PyDict_GetItemWithError(layer, parameters_name);
    PyObject *activation = PyDict_GetItemWithError(layer, activation_name);
    if (!buffers || !parameters || !activation) return 0;
    if (activation != r->activation && PyObject_RichCompareBool(activation, r->activation, Py_EQ) != 1) return 0;
    const Py_ssize_t absent = PyTuple_Size(r->absent), named = r->count - r->biased;
    for (Py_ssize_t i = 0; i < absent; i++) {
        PyObject *found = PyDict_GetItemWithError(buffers, PyTuple_GetItem(r->absent, i));
        if (found && found != Py_None) return 0;
    }
    PyObject *bias = PyDict_GetItemWithError(parameters, bias_name);
    if (!bias || (!r->biased && bias != Py_None)) return 0;
    PyObject *given = PyTuple_New(r->count + 1);
    if (!given) return 0;
    Py_INCREF(x);
    PyTuple_SetItem(given, 0, x);
    int same = 1;
    for (Py_ssize_t i = 0; i < r->count; i++) {
        PyObject *tensor = i < named ? PyDict_GetItemWithError(buffers, PyTuple_GetItem(r->names, i)) : bias;
        same = same && tensor == r->seen[i].object;
        if (!tensor) tensor = Py_None;
        Py_INCREF(tensor);
        PyTuple_SetItem(given, i + 1, tensor);
    }
    if (same) {
        PyObject *checked = PyObject_Call(r->check, given, NULL);
        same = checked == Py_True;
        Py_XDECREF(checked);
    }
    for (Py_ssize_t i = 0; i < r->count && same; i++) {
        PyObject *tensor = PyTuple_GetItem(given, i + 1);
        same = address_of(tensor) == r->seen[i].address &&
               number_of(PyObject_GetAttr(tensor, version_name)) == r->seen[i].version;
    }
    Py_DECREF(given);
    return same;
}

static PyObject *multiply(const repeated *r, PyObject *x) {
    if (!r->function) return PyObject_CallFunctionObjArgs(r->python, x, NULL);
    uint8_t *area = NULL;
    if (r->scratch != Py_None) {
        PyObject *value = PyObject_CallNoArgs(r->scratch);
        if (!value) return NULL;
        area = PyLong_AsVoidPtr(value);
        Py_DECREF(value);
        if (PyErr_Occurred()) return NULL;
    }
    PyObject *y = PyObject_CallFunctionObjArgs(r->empty, r->like, NULL);
    if (!y) return NULL;
    const void *from = address_of(x);
    void *to = PyErr_Occurred() ? NULL : address_of(y);
    if (PyErr_Occurred()) {
        Py_DECREF(y);
        return NULL;
    }
    Py_BEGIN_ALLOW_THREADS
    r->function(r->given, from, to, area);
    Py_END_ALLOW_THREADS
    return y;
}

/* call(attributes, x): the result for x of the layer that has these attributes, or None where no call that was remembered
   is like this one. */
static PyObject *call(PyObject *self, PyObject *const *args, Py_ssize_t count) {
    (void)self;
    if (count != 2 || !PyDict_Check(args[0])) {
        PyErr_SetString(PyExc_TypeError, "call takes a dictionary and a tensor");
        return NULL;
    }
    PyObject *known = PyDict_GetItemWithError(args[0], known_name), *result = NULL;
    if (!known) {
        if (PyErr_Occurred()) return NULL;
        Py_RETURN_NONE;
    }
    Py_INCREF(known);
    PyObject *calls = PyObject_GetAttr(known, calls_name), *shape = calls ? PyObject_GetAttr(args[1], shape_name) : NULL;
    PyObject *found = shape ? PyDict_GetItemWithError(calls, shape) : NULL;
    if (found) {
        Py_INCREF(found); /* other threads may drop it meanwhile */
        const repeated *r = PyCapsule_GetPointer(found, NAME);
        if (r && !PyList_Size(r->expired) && nobody_looks(r) && is_same(r, args[0], args[1]))
            result = multiply(r, args[1]);
        else
            PyErr_Clear(); /* the longer way finds it again and says what it is */
        Py_DECREF(found);
    } else {
        PyErr_Clear();
    }
    Py_DECREF(known);
    Py_XDECREF(calls);
    Py_XDECREF(shape);
    if (result || PyErr_Occurred()) return result;
    Py_RETURN_NONE;
}

/* setup(slot, watchers, forward_mode, generation, threads, data_ptr): slot: the layer's attribute whose attribute `repeated`
   is the dictionary of what was remembered, by the shape of x. forward_mode: torch.autograd.forward_ad. */
static PyObject *setup(PyObject *self, PyObject *args) {
    (void)self;
    PyObject *slot, *all, *forward, *generation, *threads, *pointer;
    if (!PyArg_ParseTuple(args, "UO!OOOO", &slot, &PyTuple_Type, &all, &forward, &generation, &threads, &pointer))
        return NULL;
    PyObject **to[] = {&known_name, &watchers, &forward_mode, &generation_now, &threads_now, &data_ptr};
    PyObject *from[] = {slot, all, forward, generation, threads, pointer};
    for (size_t i = 0; i < sizeof to / sizeof *to; i++) {
        PyObject *before = *to[i];
        Py_INCREF(from[i]);
        *to[i] = from[i];
        Py_XDECREF(before);
    }
    Py_RETURN_NONE;
}

static PyMethodDef methods[] = {{"call", (PyCFunction)(void (*)(void))call, METH_FASTCALL, NULL},
                                {"remember", remember, METH_VARARGS, NULL},
                                {"setup", setup, METH_VARARGS, NULL},
                                {NULL, NULL, 0, NULL}};
static PyModuleDef module = {PyModuleDef_HEAD_INIT, "_eager", NULL, -1, methods, NULL, NULL, NULL, NULL};

PyMODINIT_FUNC PyInit__eager(void) {
    PyObject **to[] = {&calls_name,   &shape_name,      &version_name, &level_name,
                       &buffers_name, &parameters_name, &bias_name,    &activation_name};
    static const char *const names[] = {"repeated", "shape",       "_version", "_current_level",
                                        "_buffers", "_parameters", "bias",     "activation"};
    for (size_t i = 0; i < sizeof to / sizeof *to; i++)
        if (!*to[i] && !(*to[i] = PyUnicode_InternFromString(names[i]))) return NULL;
    PyObject *made = PyModule_Create(&module);
    if (made && PyModule_AddStringConstant(made, "SOURCE_HASH", TILEWRIGHT_SOURCE_HASH)) {
        Py_DECREF(made);
        return NULL;
    }
    return made;
}
