#include "../cpu/moe.h"

#include "call.h"

namespace tt::direct {

namespace {

// x, gate_weight.
PyObject* moe_gate(PyObject*, Arguments given, Py_ssize_t count) {
    View x, weight, logits;
    Call call;
    if (count != 2 || !call || !call.required(x, given[0]) || !call.required(weight, given[1])) return none();
    if (!is_float(x) || !is_float(weight) || x.ndim != 2 || weight.ndim != 2 || x.size[1] != weight.size[1])
        return none();
    PyObject* result = new_empty(given[0], {x.size[0], weight.size[0]}, DType::float64);
    if (result == nullptr) return nullptr;
    if (!is_placed(logits, result)) return Py_DECREF(result), none();
    return run(result, [&] { tt::moe_gate({x, weight, logits}); });
}

// logits, correction_bias, top_k, score, n_group, topk_group, renormalize, scaling.
PyObject* moe_route(PyObject*, Arguments given, Py_ssize_t count) {
    View logits, bias, weights, experts;
    int64_t top_k = 0, n_group = 0, topk_group = 0;
    double scaling = 0;
    Call call;
    if (count != 8 || !call || !call.required(logits, given[0]) || !call.optional(bias, given[1]) ||
        !is_whole(given[2], top_k) || !is_whole(given[4], n_group) || !is_whole(given[5], topk_group) ||
        !PyBool_Check(given[6]) || !is_real(given[7], scaling) || !PyUnicode_Check(given[3]))
        return none();
    const bool softmax = PyUnicode_CompareWithASCIIString(given[3], "softmax") == 0;
    if (!softmax && PyUnicode_CompareWithASCIIString(given[3], "sigmoid") != 0) return none();
    if (logits.ndim != 2 || (logits.dtype != DType::float32 && logits.dtype != DType::float64)) return none();
    const int64_t e = logits.size[1];
    if (n_group < 1 || e % n_group != 0 || topk_group < 1 || topk_group > n_group || top_k < 1 || top_k > e)
        return none();
    if (bias && (!is_float(bias) || !has_shape(bias, {e}))) return none();
    const int64_t sizes[2] = {logits.size[0], top_k};
    PyObject* result = pair(new_empty(given[0], sizes, DType::float32), new_empty(given[0], sizes, DType::int32));
    if (result == nullptr) return nullptr;
    if (!is_placed(weights, PyTuple_GET_ITEM(result, 0)) || !is_placed(experts, PyTuple_GET_ITEM(result, 1)))
        return Py_DECREF(result), none();
    return run(result, [&] {
        tt::moe_route({logits, bias, weights, experts, softmax, n_group, topk_group, given[6] == Py_True, scaling});
    });
}

}  // namespace

PyMethodDef moe_entries[] = {
    TT_ENTRY(moe_gate, "The logits, or None"),
    TT_ENTRY(moe_route, "(weights, experts), or None"),
    TT_LAST_ENTRY,
};

}  // namespace tt::direct
