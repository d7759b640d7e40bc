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
struct Flat : View {};              // of any rank but 0, seen as [rows, H]
struct Rows : View {};              // the same as [1, rows, H]; one of rank 3 is itself

namespace py = pybind11;

// The names that are asked for, and the dtypes in the order of DType: made once, never freed.
struct TensorNames {
    PyObject *data_ptr, *dtype, *ndim, *shape, *stride, *contiguous;
    PyObject* dtypes;  // a tuple
};
inline TensorNames& tensor_names() {
    static TensorNames names = {
        PyUnicode_InternFromString("data_ptr"),
        PyUnicode_InternFromString("dtype"),
        PyUnicode_InternFromString("ndim"),
        PyUnicode_InternFromString("shape"),
        PyUnicode_InternFromString("stride"),
        PyUnicode_InternFromString("contiguous"),
        nullptr,
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

// A tensor [..., H] as [rows, H]. It is copied first only if its leading dimensions do not lie behind one another.
inline bool read_flat(View& view, PyObject* tensor, py::object& copy) {
    const TensorNames& names = tensor_names();
    const auto dtype = py::reinterpret_steal<py::object>(PyObject_GetAttr(tensor, names.dtype));
    auto shape = py::reinterpret_steal<py::object>(dtype ? PyObject_GetAttr(tensor, names.shape) : nullptr);
    auto strides = shape ? asked(tensor, names.stride) : py::object();
    if (!strides || !PyTuple_Check(shape.ptr()) || !PyTuple_Check(strides.ptr())) {
        PyErr_Clear();
        return false;
    }
    const Py_ssize_t rank = PyTuple_GET_SIZE(shape.ptr());
    if (rank == 0) throw py::value_error("expected a tensor of rank 1 or more, got 0");
    const auto number = [](const py::object& tuple, Py_ssize_t i) {
        return int64_t(PyLong_AsLongLong(PyTuple_GET_ITEM(tuple.ptr(), i)));
    };
    const int64_t width = number(shape, rank - 1);
    int64_t rows = 1, row = rank > 1 ? number(strides, rank - 2) : width;  // row: from one to the next
    bool in_place = width <= 1 || number(strides, rank - 1) == 1;
    for (Py_ssize_t i = rank - 2; i >= 0; --i) {
        in_place &= number(shape, i) == 1 || number(strides, i) == rows * row || rows == 1;
        if (rows == 1) row = number(strides, i);
        rows *= number(shape, i);
    }
    if (PyErr_Occurred()) throw py::error_already_set();
    if (!in_place && rows * width > 0) {
        copy = asked(tensor, names.contiguous);
        if (!copy) throw py::error_already_set();
        tensor = copy.ptr();
        row = width;
    }
    const auto pointer = asked(tensor, names.data_ptr);
    if (!pointer) throw py::error_already_set();
    view.data = PyLong_AsVoidPtr(pointer.ptr());
    view.dtype = dtype_of(dtype.ptr());
    view.ndim = 2;
    view.size[0] = rows, view.size[1] = width;
    view.stride[0] = row, view.stride[1] = 1;
    if (view.data == nullptr && rows * width > 0)
        throw py::value_error("expected a tensor with memory, got a null pointer");
    return true;
}

// A tensor [..., H] as [1, rows, H]; one of rank 3 as it is.
inline bool read_rows(View& view, PyObject* tensor, py::object& copy) {
    const auto rank = py::reinterpret_steal<py::object>(PyObject_GetAttr(tensor, tensor_names().ndim));
    if (!rank) {
        PyErr_Clear();
        return false;
    }
    if (PyLong_AsLong(rank.ptr()) == 3) return read_tensor(view, tensor, 3, copy);
    if (!read_flat(view, tensor, copy)) return false;
    view.ndim = 3;
    for (int i = 2; i > 0; --i) view.size[i] = view.size[i - 1], view.stride[i] = view.stride[i - 1];
    view.size[0] = 1, view.stride[0] = 0;
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
struct type_caster<tt::Flat> {
    PYBIND11_TYPE_CASTER(tt::Flat, const_name("Tensor"));
    bool load(handle source, bool) {
        if (PyTuple_Check(source.ptr())) return tt::read_fields(value, source.ptr(), 2);
        return tt::read_flat(value, source.ptr(), copy);
    }
    object copy;
};
template <>
struct type_caster<tt::Rows> {
    PYBIND11_TYPE_CASTER(tt::Rows, const_name("Tensor"));
    bool load(handle source, bool) { return tt::read_rows(value, source.ptr(), copy); }
    object copy;
};
}  // namespace pybind11::detail
