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

// logits, correction_bias, per_expert_scale, top_k, score, n_group, topk_group, renormalize, scaling, dropped.
PyObject* moe_route(PyObject*, Arguments given, Py_ssize_t count) {
    View logits, bias, scale, weights, experts;
    int64_t top_k = 0, n_group = 0, topk_group = 0;
    double scaling = 0;
    bool softmax = false, exclude_dropped = false;
    Call call;
    if (count != 10 || !call || !call.required(logits, given[0]) || !call.optional(bias, given[1]) ||
        !call.optional(scale, given[2]) || !is_whole(given[3], top_k) || !is_whole(given[5], n_group) ||
        !is_whole(given[6], topk_group) || !PyBool_Check(given[7]) || !is_real(given[8], scaling))
        return none();
    if (!is_one_of(given[4], "sigmoid", "softmax", softmax) || !is_one_of(given[9], "zero", "-inf", exclude_dropped))
        return none();
    if (logits.ndim != 2 || !is_float(logits)) return none();
    const int64_t e = logits.size[1];
    if (n_group < 1 || e % n_group != 0 || topk_group < 1 || topk_group > n_group || top_k < 1 || top_k > e)
        return none();
    if (exclude_dropped && top_k > e / n_group * topk_group) return none();
    for (const View* vector : {&bias, &scale})
        if (*vector && (!is_float(*vector) || !has_shape(*vector, {e}))) return none();
    const int64_t sizes[2] = {logits.size[0], top_k};
    PyObject* result = pair(new_empty(given[0], sizes, DType::float32), new_empty(given[0], sizes, DType::int32));
    if (result == nullptr) return nullptr;
    if (!is_placed(weights, PyTuple_GET_ITEM(result, 0)) || !is_placed(experts, PyTuple_GET_ITEM(result, 1)))
        return Py_DECREF(result), none();
    return run(result, [&] {
        tt::moe_route({logits, bias, scale, weights, experts, softmax, n_group, topk_group, given[7] == Py_True,
                       scaling, exclude_dropped});
    });
}

}  // namespace

PyMethodDef moe_entries[] = {
    TT_ENTRY(moe_gate, "The logits, or None"),
    TT_ENTRY(moe_route, "(weights, experts), or None"),
    TT_LAST_ENTRY,
};

}  // namespace tt::direct
