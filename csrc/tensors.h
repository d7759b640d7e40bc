// How a tensor of Python's becomes a View: pybind11's casters for it. No header of PyTorch's is needed, a tensor is
// asked for its attributes by their names; so one build serves all its versions.
#pragma once

#include <pybind11/pybind11.h>

#include <string>

#include "cpu/view.h"
#include "exchange.h"

namespace tt {

template <int Rank>
struct Ranked : View {};  // of this rank
template <int Rank>
struct Optional : Ranked<Rank> {};  // or None
struct Flat : View {};              // of any rank but 0, seen as [rows, H]
struct Rows : View {};              // the same as [1, rows, H]; one of rank 3 is itself
struct Strided : View {};           // of any rank and any strides, as it lies

namespace py = pybind11;

// The names that are asked for: made once, never freed.
struct TensorNames {
    PyObject *data_ptr, *dtype, *shape, *stride, *contiguous;
};
inline const TensorNames& tensor_names() {
    static const TensorNames names = {
        PyUnicode_InternFromString("data_ptr"),   PyUnicode_InternFromString("dtype"),
        PyUnicode_InternFromString("shape"),      PyUnicode_InternFromString("stride"),
        PyUnicode_InternFromString("contiguous"),
    };
    return names;
}

inline py::object asked(PyObject* tensor, PyObject* method) {
    return py::reinterpret_steal<py::object>(PyObject_CallMethodNoArgs(tensor, method));
}

// The code of a dtype. Throws ValueError for one that no kernel knows.
inline DType dtype_of(PyObject* dtype) {
    PyObject* known = torch().dtypes;
    const Py_ssize_t count = known == nullptr ? 0 : PyTuple_GET_SIZE(known);
    for (Py_ssize_t code = 0; code < count; ++code)
        if (PyTuple_GET_ITEM(known, code) == dtype) return static_cast<DType>(code);
    throw py::value_error("expected a dtype that the kernels know, got " + std::string(py::str(py::handle(dtype))));
}

// How many rows [..., H] has, and how far one is from the next. False where its leading dimensions do not lie behind
// one another.
inline bool find_rows(int rank, const int64_t* size, const int64_t* stride, int64_t& rows, int64_t& row) {
    rows = 1, row = size[rank - 1];
    bool behind = true;
    for (int i = rank - 2; i >= 0; --i) {
        if (size[i] == 1) continue;
        if (rows == 1) row = stride[i];
        behind &= stride[i] == rows * row;
        rows *= size[i];
    }
    return behind;
}

// Where a tensor of any rank lies; its rank is -1 if it is none.
struct Layout {
    static constexpr int most = 64;  // dimensions of a tensor of PyTorch's
    void* data = nullptr;
    DType dtype = DType::float32;
    int rank = -1;
    int64_t size[most], stride[most];

    explicit Layout(PyObject* tensor) {
        DlTensor found;
        if (exchanged(tensor, found) && found.ndim <= most && known_dtype(found.dtype, dtype)) {
            data = static_cast<char*>(found.data) + found.byte_offset;
            rank = found.ndim;
            for (int i = 0; i < rank; ++i) size[i] = found.shape[i], stride[i] = found.strides[i];
        } else {
            ask(tensor);
        }
    }
    // Of what is no tensor: two tuples of integers.
    Layout(PyObject* sizes, PyObject* strides) { read(sizes, strides); }

    int64_t count() const {
        int64_t product = 1;
        for (int i = 0; i < rank; ++i) product *= size[i];
        return product;
    }
    // Kernels rely on it. True of an empty tensor, which PyTorch calls contiguous whatever its strides, and never
    // copies.
    bool rows_contiguous() const { return rank < 1 || stride[rank - 1] == 1 || size[rank - 1] <= 1 || count() == 0; }
    // Throws ValueError for a rank that is not expected, negative sizes, elements without memory.
    void to(View& view, int expected) const {
        if (rank != expected)
            throw py::value_error("expected a tensor of rank " + std::to_string(expected) + ", got " +
                                  std::to_string(rank));
        view.data = data, view.dtype = dtype, view.ndim = rank;
        for (int i = 0; i < rank; ++i) {
            view.size[i] = size[i], view.stride[i] = stride[i];
            if (size[i] < 0) throw py::value_error("expected sizes of 0 or more, got a negative one");
        }
        check_memory();
    }
    // Seen as [rows, H]. False where the leading dimensions do not lie behind one another. Throws ValueError for a
    // rank of 0, elements without memory.
    bool to_rows(View& view) const {
        if (rank == 0) throw py::value_error("expected a tensor of rank 1 or more, got 0");
        const int64_t width = size[rank - 1];
        int64_t rows, row;
        const bool in_place = find_rows(rank, size, stride, rows, row) && rows_contiguous();
        if (!in_place && rows * width > 0) return false;
        view.data = data, view.dtype = dtype, view.ndim = 2;
        view.size[0] = rows, view.size[1] = width;
        view.stride[0] = row, view.stride[1] = 1;
        check_memory();
        return true;
    }

   private:
    void check_memory() const {
        if (data == nullptr && count() != 0) throw py::value_error("expected a tensor with memory, got a null pointer");
    }
    void read(PyObject* sizes, PyObject* strides) {
        if (!PyTuple_Check(sizes) || !PyTuple_Check(strides)) return;
        const Py_ssize_t dims = PyTuple_GET_SIZE(sizes);
        if (PyTuple_GET_SIZE(strides) != dims || dims > most) return;
        for (Py_ssize_t i = 0; i < dims; ++i) {
            size[i] = PyLong_AsLongLong(PyTuple_GET_ITEM(sizes, i));
            stride[i] = PyLong_AsLongLong(PyTuple_GET_ITEM(strides, i));
        }
        if (PyErr_Occurred())  // something other than an integer
            PyErr_Clear();
        else
            rank = int(dims);
    }
    void ask(PyObject* tensor) {
        const TensorNames& names = tensor_names();
        const auto its_dtype = py::reinterpret_steal<py::object>(PyObject_GetAttr(tensor, names.dtype));
        py::object sizes, strides;
        if (its_dtype) sizes = py::reinterpret_steal<py::object>(PyObject_GetAttr(tensor, names.shape));
        if (sizes) strides = asked(tensor, names.stride);
        if (!strides) return PyErr_Clear();
        read(sizes.ptr(), strides.ptr());
        if (rank < 0) return;
        dtype = dtype_of(its_dtype.ptr());
        const py::object pointer = asked(tensor, names.data_ptr);
        if (!pointer) throw py::error_already_set();
        data = PyLong_AsVoidPtr(pointer.ptr());
    }
};

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
    layout.to(view, rank);
    return true;
}

// From what is no tensor of PyTorch's: (pointer, code of the dtype, sizes, strides).
inline bool read_fields(View& view, PyObject* fields, int rank) {
    if (PyTuple_GET_SIZE(fields) != 4) return false;
    Layout layout(PyTuple_GET_ITEM(fields, 2), PyTuple_GET_ITEM(fields, 3));
    layout.data = PyLong_AsVoidPtr(PyTuple_GET_ITEM(fields, 0));
    const long code = PyLong_AsLong(PyTuple_GET_ITEM(fields, 1));
    if (PyErr_Occurred()) {
        PyErr_Clear();
        return false;
    }
    if (layout.rank < 0) return false;
    if (code < 0 || code > static_cast<long>(DType::boolean))
        throw py::value_error("expected the code of a dtype, got " + std::to_string(code));
    layout.dtype = static_cast<DType>(code);
    layout.to(view, rank);
    return true;
}

// A tensor [..., H] as [rows, H]. It is copied first only if its leading dimensions do not lie behind one another.
inline bool read_flat(View& view, PyObject* tensor, py::object& copy) {
    const Layout layout(tensor);
    if (layout.rank < 0) return false;
    return layout.to_rows(view) || read_flat(view, copied(tensor, copy), copy);
}

// [rows, H] as [1, rows, H].
inline void add_dimension(View& view) {
    view.ndim = 3;
    for (int i = 2; i > 0; --i) view.size[i] = view.size[i - 1], view.stride[i] = view.stride[i - 1];
    view.size[0] = 1, view.stride[0] = 0;
}

// A tensor [..., H] as [1, rows, H]; one of rank 3 as it is.
inline bool read_rows(View& view, PyObject* tensor, py::object& copy) {
    const Layout layout(tensor);
    if (layout.rank < 0) return false;
    if (layout.rank == 3) return read_tensor(view, tensor, 3, copy);
    if (!layout.to_rows(view)) return read_rows(view, copied(tensor, copy), copy);
    add_dimension(view);
    return true;
}

// A tensor as it lies, whatever its strides.
inline bool read_strided(View& view, PyObject* tensor) {
    const Layout layout(tensor);
    if (layout.rank < 0) return false;
    if (layout.rank > View::max_dims)
        throw py::value_error("expected at most " + std::to_string(View::max_dims) + " dimensions, got " +
                              std::to_string(layout.rank));
    layout.to(view, layout.rank);
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
template <>
struct type_caster<tt::Strided> {
    PYBIND11_TYPE_CASTER(tt::Strided, const_name("Tensor"));
    bool load(handle source, bool) { return tt::read_strided(value, source.ptr()); }
};
}  // namespace pybind11::detail
