// The shortest way from a public function to a CPU kernel, for the calls that are nearly all calls: plain tensors on a
// CPU, no gradient wanted, no mode, transform, trace or profiler that would want to see them. There PyTorch's
// dispatcher would do nothing but hand the arguments on, through Python twice, which costs more than many a kernel.
//
// An entry here takes what its public function takes and answers None for whatever it is not sure of, right or wrong;
// the call then goes through the dispatcher, where it is checked, and refused by its name. So nothing is an error here,
// and what is demanded is sufficient, not necessary: the operators' checks are the rule (ops/*.py).
//
// Measured on a Zen 5, one row of 64 to 64 numbers, linear: 6.8 us through the dispatcher, 2.3 directly, 0.7 of
// which make the result; F.linear 1.6 (bench/calls.py).
//
// This header is what entries are made of; each file beside it has the entries of one family of operations.
#pragma once

#include <pybind11/pybind11.h>

#include <initializer_list>

#include "../tensors.h"

namespace tt::direct {

using Arguments = PyObject* const*;

inline PyObject* none() {
    Py_RETURN_NONE;
}

// A call that is being looked at, with what lies around it.
class Call {
   public:
    Call();
    explicit operator bool() const { return direct_; }  // nothing lies between

    // A tensor of PyTorch's own class on the CPU, as it lies, of which no gradient is wanted.
    bool is_plain(PyObject* object);
    // Its view, if it is plain, has elements and contiguous rows, and a rank that a view can have.
    bool required(View& view, PyObject* object);
    bool optional(View& view, PyObject* object) { return object == Py_None || required(view, object); }

   private:
    bool direct_, gradients_, first_ = true;
};

// The view of a tensor that was just made.
bool is_placed(View& view, PyObject* tensor);

inline bool is_float(const View& view) {
    return view.dtype <= DType::float16;
}
inline bool is_index(const View& view) {
    return view.dtype == DType::int64 || view.dtype == DType::int32;
}
bool has_shape(const View& view, std::initializer_list<int64_t> sizes);

// A number of Python's own; what else may be one is not decided here. A real one is finite.
bool is_whole(PyObject* object, int64_t& value);
bool is_real(PyObject* object, double& value);
// One of two words; `second` says which.
bool is_one_of(PyObject* object, const char* first, const char* other, bool& second);

// [..., H] as [rows, H], if its leading dimensions lie behind one another; and as [1, rows, H] unless it has rank 3.
bool flatten(View& view);
bool as_rows(View& view);

// A new tensor, uninitialised, as `like.new_empty(sizes)` makes it.
PyObject* new_empty(PyObject* like, const int64_t* sizes, int count, const DType* dtype = nullptr);
inline PyObject* new_empty(PyObject* like, const View& shape) {
    return new_empty(like, shape.size, shape.ndim);
}
template <int N>
PyObject* new_empty(PyObject* like, const int64_t (&sizes)[N], DType dtype) {
    return new_empty(like, sizes, N, &dtype);
}
PyObject* pair(PyObject* first, PyObject* second);  // of results, both stolen

// Says of a tensor that it was written to, so that a backward that has saved it does not use it.
bool was_written(PyObject* tensor);

// Runs a kernel without the global interpreter lock. False with Python's error set if it fails.
bool run(void (*kernel)(const void*), const void* what);
// The same for one that writes into `result`, stolen, which is returned.
template <class Kernel>
PyObject* run(PyObject* result, const Kernel& kernel) {
    if (run([](const void* what) { (*static_cast<const Kernel*>(what))(); }, &kernel)) return result;
    Py_DECREF(result);
    return nullptr;
}

// What each file has, ended by a null name.
extern PyMethodDef adaln_entries[], attention_entries[], linear_entries[], moe_entries[];
#define TT_ENTRY(name, answer) \
    {#name, reinterpret_cast<PyCFunction>(reinterpret_cast<void*>(name)), METH_FASTCALL, answer}
#define TT_LAST_ENTRY {nullptr, nullptr, 0, nullptr}

void bind(pybind11::module_& m);

}  // namespace tt::direct
