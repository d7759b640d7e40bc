#include "../cpu/linear.h"

#include "call.h"

namespace tt::direct {

namespace {

// x, weight, bias.
PyObject* linear(PyObject*, Arguments given, Py_ssize_t count) {
    View x, weight, bias, out;
    Call call;
    if (count != 3 || !call || !call.required(x, given[0]) || !call.required(weight, given[1]) ||
        !call.optional(bias, given[2]))
        return none();
    if (!is_float(x) || weight.dtype != x.dtype || weight.ndim != 2 || x.ndim < 1 ||
        x.size[x.ndim - 1] != weight.size[1])
        return none();
    if (bias && (bias.dtype != x.dtype || !has_shape(bias, {weight.size[0]}))) return none();
    View shape = x;
    shape.size[x.ndim - 1] = weight.size[0];
    if (!flatten(x)) return none();
    PyObject* result = new_empty(given[0], shape);
    if (result == nullptr) return nullptr;
    if (!is_placed(out, result) || !flatten(out)) return Py_DECREF(result), none();
    return run(result, [&] { tt::linear({x, weight, bias, out}); });
}

}  // namespace

PyMethodDef linear_entries[] = {
    TT_ENTRY(linear, "The result, or None"),
    TT_LAST_ENTRY,
};

}  // namespace tt::direct
