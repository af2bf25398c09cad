/* Reads what objects know without making Python objects on the way: CPython's own descriptors say where it stands
 * and which C function to call. For sockets right only when their type is exactly socket.socket (a subclass may
 * say something else). No other C API tricks may live here. */
#ifndef LINGERX_FIELDS_H
#define LINGERX_FIELDS_H

#include <Python.h>
#include <structmember.h>

/* Whether a thing is of a class or a subclass of it; no class may have a say in this. */
static inline int lx_is_a(PyObject *thing, PyObject *kind) {
    return PyObject_TypeCheck(thing, (PyTypeObject *)kind);
}

/* Where an int member of a C type stands, or -1 when the descriptor is of another kind. */
static inline Py_ssize_t lx_offset_of_int(PyObject *descriptor) {
    PyMemberDef *member;
    if (!Py_IS_TYPE(descriptor, &PyMemberDescr_Type))
        return -1;
    member = ((PyMemberDescrObject *)descriptor)->d_member;
    return member->type == T_INT ? member->offset : -1;
}

/* Where an attribute named in __slots__ stands, or -1. */
static inline Py_ssize_t lx_offset_of_slot(PyObject *descriptor) {
    PyMemberDef *member;
    if (!Py_IS_TYPE(descriptor, &PyMemberDescr_Type))
        return -1;
    member = ((PyMemberDescrObject *)descriptor)->d_member;
    return member->type == T_OBJECT_EX ? member->offset : -1;
}

/* The value of a slot that is set once, by the constructor. Borrowed: it lives as long as `object`. */
static inline PyObject *lx_slot_at(PyObject *object, Py_ssize_t offset) {
    return *(PyObject **)((char *)object + offset);
}

static inline int lx_int_at(PyObject *object, Py_ssize_t offset) {
    return *(int *)((char *)object + offset);
}

/* What detach() does to a socket's fd, without the Python int that it returns. Of several threads one gets it. */
static inline int lx_take_int_at(PyObject *object, Py_ssize_t offset, int instead) {
    int *place = (int *)((char *)object + offset);
#ifdef Py_GIL_DISABLED
    return __atomic_exchange_n(place, instead, __ATOMIC_ACQ_REL);
#else
    int value = *place;
    *place = instead;
    return value;
#endif
}

/* method(self), where method belongs to the C type of self and takes nothing else. */
static inline PyObject *lx_call(PyObject *method, PyObject *self) {
    if (Py_IS_TYPE(method, &PyMethodDescr_Type)) {
        PyMethodDef *definition = ((PyMethodDescrObject *)method)->d_method;
        if (definition->ml_flags == METH_NOARGS)
            return definition->ml_meth(self, NULL);
    }
    return PyObject_CallOneArg(method, self);
}

#endif
