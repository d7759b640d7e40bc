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

// What a tensor says of itself; of what is no tensor the rank is -1.
struct Layout {
    explicit Layout(PyObject* tensor) {
        const TensorNames& names = tensor_names();
        dtype = py::reinterpret_steal<py::object>(PyObject_GetAttr(tensor, names.dtype));
        if (dtype) sizes = py::reinterpret_steal<py::object>(PyObject_GetAttr(tensor, names.shape));
        if (sizes) strides = asked(tensor, names.stride);
        if (strides && PyTuple_Check(sizes.ptr()) && PyTuple_Check(strides.ptr()))
            rank = PyTuple_GET_SIZE(sizes.ptr());
        else
            PyErr_Clear();
    }
    int64_t size(Py_ssize_t i) const { return PyLong_AsLongLong(PyTuple_GET_ITEM(sizes.ptr(), i)); }
    int64_t stride(Py_ssize_t i) const { return PyLong_AsLongLong(PyTuple_GET_ITEM(strides.ptr(), i)); }
    // Kernels rely on it. True of an empty tensor, which PyTorch calls contiguous whatever its strides, and never
    // copies.
    bool rows_contiguous() const {
        if (rank < 1 || stride(rank - 1) == 1 || size(rank - 1) <= 1) return true;
        for (Py_ssize_t i = 0; i < rank; ++i)
            if (size(i) == 0) return true;
        return false;
    }

    py::object dtype, sizes, strides;
    Py_ssize_t rank = -1;
};

inline void read_memory(View& view, PyObject* tensor, const Layout& layout) {
    const py::object pointer = asked(tensor, tensor_names().data_ptr);
    if (!pointer) throw py::error_already_set();
    view.data = PyLong_AsVoidPtr(pointer.ptr());
    view.dtype = dtype_of(layout.dtype.ptr());
}

inline PyObject* copied(PyObject* tensor, py::object& copy) {
    copy = asked(tensor, tensor_names().contiguous);
    if (!copy) throw py::error_already_set();
    return copy.ptr();
}

// A tensor's view. One whose last dimension is strided is copied first, into `copy`. Whoever passes what a kernel
// writes makes sure that it is none of that kind. Returns false for what is no tensor.
inline bool read_tensor(View& view, PyObject* tensor, int rank, py::object& copy) {
    const Layout layout(tensor);
    if (layout.rank < 0) return false;
    if (!layout.rows_contiguous()) return read_tensor(view, copied(tensor, copy), rank, copy);
    read_memory(view, tensor, layout);
    return read_layout(view, layout.sizes.ptr(), layout.strides.ptr(), rank);
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
    const Layout layout(tensor);
    if (layout.rank < 0) return false;
    if (layout.rank == 0) throw py::value_error("expected a tensor of rank 1 or more, got 0");
    const int64_t width = layout.size(layout.rank - 1);
    int64_t rows = 1, row = width;  // row: from one to the next
    bool in_place = layout.rows_contiguous();
    for (Py_ssize_t i = layout.rank - 2; i >= 0; --i) {
        if (layout.size(i) == 1) continue;
        if (rows == 1) row = layout.stride(i);
        in_place &= layout.stride(i) == rows * row;
        rows *= layout.size(i);
    }
    if (!in_place && rows * width > 0) return read_flat(view, copied(tensor, copy), copy);
    read_memory(view, tensor, layout);
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
