// The part of the doors that dual numbers use, for the table in door.cpp.
#pragma once
#include <Python.h>

namespace fastscore {

PyObject* door_activate(PyObject*, PyObject* const* args, Py_ssize_t count);
PyObject* door_signed_stack(PyObject*, PyObject* const* args, Py_ssize_t count);
PyObject* door_project_stack(PyObject*, PyObject* const* args, Py_ssize_t count);
PyObject* door_spread_stack(PyObject*, PyObject* const* args, Py_ssize_t count);
PyObject* door_normalise_stack(PyObject*, PyObject* const* args, Py_ssize_t count);

}  // namespace fastscore
