#include "../cpu/adaln.h"

#include "call.h"

namespace tt::direct {

namespace {

// x, weight, eps, round_first.
PyObject* rms_norm(PyObject*, Arguments given, Py_ssize_t count) {
    View x, weight, normed;
    double eps = 0;
    Call call;
    if (count != 4 || !call || !call.required(x, given[0]) || !call.optional(weight, given[1]) ||
        !is_real(given[2], eps) || !PyBool_Check(given[3]))
        return none();
    if (!is_float(x) || x.ndim < 1 || eps < 0) return none();
    if (weight && (!is_float(weight) || !has_shape(weight, {x.size[x.ndim - 1]}))) return none();
    const View shape = x;
    if (!as_rows(x)) return none();
    PyObject* result = new_empty(given[0], shape);
    if (result == nullptr) return nullptr;
    if (!is_placed(normed, result) || !as_rows(normed)) return Py_DECREF(result), none();
    return run(result, [&] {
        tt::gated_residual_adaln_norm({x, {}, {}, weight, {}, {}, {}, normed, eps, false, given[3] == Py_True});
    });
}

// The arguments of one pass over [B, S, H], any of which may be missing but x.
struct Pass {
    View x, y, gate, weight, shift, scale;

    bool read(Call& call, PyObject* given_x, PyObject* given_y, PyObject* given_gate, PyObject* given_weight,
              PyObject* given_shift, PyObject* given_scale) {
        if (!call || !call.required(x, given_x) || !call.optional(y, given_y) || !call.optional(gate, given_gate) ||
            !call.optional(weight, given_weight) || !call.optional(shift, given_shift) ||
            !call.optional(scale, given_scale))
            return false;
        if (!is_float(x) || x.ndim != 3 || bool(shift) != bool(scale)) return false;
        const int64_t batch = x.size[0], width = x.size[2];
        if (y && (y.dtype != x.dtype || !has_shape(y, {batch, x.size[1], width}))) return false;
        if (weight && (!is_float(weight) || !has_shape(weight, {width}))) return false;
        for (const View* vector : {&gate, &shift, &scale})
            if (*vector && (vector->dtype != x.dtype || !has_shape(*vector, {batch, width}))) return false;
        return true;
    }
};

// x, weight, shift, scale, eps, order.
PyObject* adaln_norm(PyObject*, Arguments given, Py_ssize_t count) {
    Pass pass;
    View normed;
    double eps = 0;
    bool norm_first = false;
    Call call;
    if (count != 6 || given[1] == Py_None || !pass.read(call, given[0], Py_None, Py_None, given[1], given[2], given[3]))
        return none();
    if (!is_real(given[4], eps) || eps < 0 || !is_one_of(given[5], "modulate_norm", "norm_modulate", norm_first))
        return none();
    PyObject* result = new_empty(given[0], pass.x);
    if (result == nullptr) return nullptr;
    if (!is_placed(normed, result)) return Py_DECREF(result), none();
    return run(result, [&] {
        tt::gated_residual_adaln_norm(
            {pass.x, {}, {}, pass.weight, pass.shift, pass.scale, {}, normed, eps, norm_first, false});
    });
}

// residual, y, gate.
PyObject* gated_residual(PyObject*, Arguments given, Py_ssize_t count) {
    Pass pass;
    View h;
    Call call;
    if (count != 3 || given[1] == Py_None || !pass.read(call, given[0], given[1], given[2], Py_None, Py_None, Py_None))
        return none();
    PyObject* result = new_empty(given[0], pass.x);
    if (result == nullptr) return nullptr;
    if (!is_placed(h, result)) return Py_DECREF(result), none();
    return run(result, [&] {
        tt::gated_residual_adaln_norm({pass.x, pass.y, pass.gate, {}, {}, {}, h, {}, 0.0, false, false});
    });
}

// residual, y, gate, weight, shift, scale, eps, order.
PyObject* gated_residual_adaln_norm(PyObject*, Arguments given, Py_ssize_t count) {
    Pass pass;
    View h, normed;
    double eps = 0;
    bool norm_first = false;
    Call call;
    if (count != 8 || given[1] == Py_None || given[3] == Py_None ||
        !pass.read(call, given[0], given[1], given[2], given[3], given[4], given[5]))
        return none();
    if (!is_real(given[6], eps) || eps < 0 || !is_one_of(given[7], "modulate_norm", "norm_modulate", norm_first))
        return none();
    PyObject* result = pair(new_empty(given[0], pass.x), new_empty(given[0], pass.x));
    if (result == nullptr) return nullptr;
    if (!is_placed(h, PyTuple_GET_ITEM(result, 0)) || !is_placed(normed, PyTuple_GET_ITEM(result, 1)))
        return Py_DECREF(result), none();
    return run(result, [&] {
        tt::gated_residual_adaln_norm(
            {pass.x, pass.y, pass.gate, pass.weight, pass.shift, pass.scale, h, normed, eps, norm_first, false});
    });
}

}  // namespace

PyMethodDef adaln_entries[] = {
    TT_ENTRY(rms_norm, "The result, or None"),
    TT_ENTRY(adaln_norm, "The result, or None"),
    TT_ENTRY(gated_residual, "The result, or None"),
    TT_ENTRY(gated_residual_adaln_norm, "(h, normed), or None"),
    TT_LAST_ENTRY,
};

}  // namespace tt::direct
