// How a tensor of Python's becomes a View: pybind11's casters for it. No header of PyTorch's is needed, a tensor is
// asked for its attributes by their names; so one build serves all its versions.
#pragma once

#include <pybind11/pybind11.h>

#include <string>

#include "cpu/view.h"

namespace tt {

template <int Rank>
struct Ranked : View {};  // of this rank
template <int Rank>
struct Optional : Ranked<Rank> {};  // or None
struct Rows : View {};              // of any rank but 0, seen as [1, rows, H]

namespace py = pybind11;

// The names that are asked for, and the dtypes in the order of DType: made once, never freed.
struct TensorNames {
    PyObject *data_ptr, *dtype, *shape, *stride, *contiguous;
    PyObject* dtypes;  // a tuple
};
inline TensorNames& tensor_names() {
    static TensorNames names = {
        PyUnicode_InternFromString("data_ptr"),   PyUnicode_InternFromString("dtype"),
        PyUnicode_InternFromString("shape"),      PyUnicode_InternFromString("stride"),
        PyUnicode_InternFromString("contiguous"), nullptr,
    };
    return names;
}

inline py::object asked(PyObject* tensor, PyObject* method) {
    return py::reinterpret_steal<py::object>(PyObject_CallMethodNoArgs(tensor, method));
}

// The code of a dtype. Throws ValueError for one that no kernel knows.
inline DType dtype_of(PyObject* dtype) {
    PyObject* known = tensor_names().dtypes;
    const Py_ssize_t count = known == nullptr ? 0 : PyTuple_GET_SIZE(known);
    for (Py_ssize_t code = 0; code < count; ++code)
        if (PyTuple_GET_ITEM(known, code) == dtype) return static_cast<DType>(code);
    throw py::value_error("expected a dtype that the kernels know, got " + std::string(py::str(py::handle(dtype))));
}

// Sizes and strides from two tuples of integers. Returns false for anything else.
inline bool read_layout(View& view, PyObject* sizes, PyObject* strides, int rank) {
    if (!PyTuple_Check(sizes) || !PyTuple_Check(strides)) return false;
    const Py_ssize_t dims = PyTuple_GET_SIZE(sizes);
    if (dims != rank || PyTuple_GET_SIZE(strides) != dims)
        throw py::value_error("expected a tensor of rank " + std::to_string(rank) + ", got " + std::to_string(dims));
    view.ndim = rank;
    bool empty = false;
    for (Py_ssize_t i = 0; i < dims; ++i) {
        view.size[i] = PyLong_AsLongLong(PyTuple_GET_ITEM(sizes, i));
        view.stride[i] = PyLong_AsLongLong(PyTuple_GET_ITEM(strides, i));
        empty |= view.size[i] == 0;
        if (view.size[i] < 0 && !PyErr_Occurred())
            throw py::value_error("expected sizes of 0 or more, got a negative one");
    }
    if (PyErr_Occurred()) {  // something other than an integer
        PyErr_Clear();
        return false;
    }
    if (view.data == nullptr && !empty) throw py::value_error("expected a tensor with memory, got a null pointer");
    return true;
}

// A tensor's view. One whose last dimension is strided is copied first, into `copy`: kernels rely on contiguous rows.
// Whoever passes what a kernel writes makes sure that it is none of that kind. Returns false for what is no tensor.
inline bool read_tensor(View& view, PyObject* tensor, int rank, py::object& copy) {
    const TensorNames& names = tensor_names();
    const auto dtype = py::reinterpret_steal<py::object>(PyObject_GetAttr(tensor, names.dtype));
    auto sizes = py::reinterpret_steal<py::object>(dtype ? PyObject_GetAttr(tensor, names.shape) : nullptr);
    auto strides = sizes ? asked(tensor, names.stride) : py::object();
    if (strides && PyTuple_Check(strides.ptr()) && PyTuple_GET_SIZE(strides.ptr()) > 0) {
        const Py_ssize_t last = PyTuple_GET_SIZE(strides.ptr()) - 1;
        if (PyLong_AsLongLong(PyTuple_GET_ITEM(strides.ptr(), last)) != 1 && PyTuple_Check(sizes.ptr()) &&
            PyTuple_GET_SIZE(sizes.ptr()) > last && PyLong_AsLongLong(PyTuple_GET_ITEM(sizes.ptr(), last)) > 1) {
            copy = asked(tensor, names.contiguous);
            if (!copy) throw py::error_already_set();
            tensor = copy.ptr();
            strides = asked(tensor, names.stride);
        }
    }
    const auto pointer = strides ? asked(tensor, names.data_ptr) : py::object();
    if (!pointer) {
        PyErr_Clear();
        return false;
    }
    view.data = PyLong_AsVoidPtr(pointer.ptr());
    view.dtype = dtype_of(dtype.ptr());
    return read_layout(view, sizes.ptr(), strides.ptr(), rank);
}

// From what is no tensor of PyTorch's: (pointer, code of the dtype, sizes, strides).
inline bool read_fields(View& view, PyObject* fields, int rank) {
    if (PyTuple_GET_SIZE(fields) != 4) return false;
    view.data = PyLong_AsVoidPtr(PyTuple_GET_ITEM(fields, 0));
    const long code = PyLong_AsLong(PyTuple_GET_ITEM(fields, 1));
    if (PyErr_Occurred()) {
        PyErr_Clear();
        return false;
    }
    if (code < 0 || code > static_cast<long>(DType::boolean))
        throw py::value_error("expected the code of a dtype, got " + std::to_string(code));
    view.dtype = static_cast<DType>(code);
    return read_layout(view, PyTuple_GET_ITEM(fields, 2), PyTuple_GET_ITEM(fields, 3), rank);
}

// A tensor [..., H] as [1, rows, H], which one with contiguous memory is; another is copied, if it is none of rank 3.
inline bool read_rows(View& view, PyObject* tensor, py::object& copy) {
    const TensorNames& names = tensor_names();
    auto sizes = py::reinterpret_steal<py::object>(PyObject_GetAttr(tensor, names.shape));
    if (!sizes || !PyTuple_Check(sizes.ptr())) {
        PyErr_Clear();
        return false;
    }
    const Py_ssize_t rank = PyTuple_GET_SIZE(sizes.ptr());
    if (rank == 3) return read_tensor(view, tensor, 3, copy);
    if (rank == 0) throw py::value_error("expected a tensor of rank 1 or more, got 0");
    copy = asked(tensor, names.contiguous);  // itself, where it is
    if (!copy) throw py::error_already_set();
    const auto dtype = py::reinterpret_steal<py::object>(PyObject_GetAttr(copy.ptr(), names.dtype));
    const auto pointer = asked(copy.ptr(), names.data_ptr);
    if (!dtype || !pointer) throw py::error_already_set();
    int64_t rows = 1;
    for (Py_ssize_t i = 0; i + 1 < rank; ++i) rows *= PyLong_AsLongLong(PyTuple_GET_ITEM(sizes.ptr(), i));
    const int64_t width = PyLong_AsLongLong(PyTuple_GET_ITEM(sizes.ptr(), rank - 1));
    view.data = PyLong_AsVoidPtr(pointer.ptr());
    view.dtype = dtype_of(dtype.ptr());
    view.ndim = 3;
    const int64_t size[] = {1, rows, width}, stride[] = {rows * width, width, 1};
    for (int i = 0; i < 3; ++i) view.size[i] = size[i], view.stride[i] = stride[i];
    if (PyErr_Occurred()) throw py::error_already_set();
    if (view.data == nullptr && rows * width > 0)
        throw py::value_error("expected a tensor with memory, got a null pointer");
    return true;
}

inline bool read_view(View& view, PyObject* source, int rank, py::object& copy) {
    return PyTuple_Check(source) ? read_fields(view, source, rank) : read_tensor(view, source, rank, copy);
}

}  // namespace tt

namespace pybind11::detail {
template <int Rank>
struct type_caster<tt::Ranked<Rank>> {
    PYBIND11_TYPE_CASTER(tt::Ranked<Rank>, const_name("Tensor"));
    bool load(handle source, bool) { return tt::read_view(value, source.ptr(), Rank, copy); }
    object copy;  // outlives the call
};
template <int Rank>
struct type_caster<tt::Optional<Rank>> {
    PYBIND11_TYPE_CASTER(tt::Optional<Rank>, const_name("Tensor | None"));
    bool load(handle source, bool) { return source.is_none() || tt::read_view(value, source.ptr(), Rank, copy); }
    object copy;
};
template <>
struct type_caster<tt::Rows> {
    PYBIND11_TYPE_CASTER(tt::Rows, const_name("Tensor"));
    bool load(handle source, bool) { return tt::read_rows(value, source.ptr(), copy); }
    object copy;
};
}  // namespace pybind11::detail
