#include "../cpu/attention.h"

#include <array>
#include <cmath>

#include "call.h"

namespace tt::direct {

namespace {

int64_t index_at(const View& view, int64_t i) {
    const int64_t at = i * view.stride[0];
    return view.dtype == DType::int64 ? view.as<int64_t>()[at] : view.as<int32_t>()[at];
}

// Integers [batch] in [0, limit], or None.
bool are_within(Call& call, View& view, PyObject* object, int64_t batch, int64_t limit) {
    if (object == Py_None) return true;
    if (!call.required(view, object) || !is_index(view) || !has_shape(view, {batch})) return false;
    for (int64_t i = 0; i < batch; ++i)
        if (index_at(view, i) < 0 || index_at(view, i) > limit) return false;
    return true;
}
// The same, or one integer for all, which is written into `room`.
constexpr int64_t most_rows = 64;
bool are_lengths(Call& call, View& view, PyObject* object, int64_t batch, int64_t limit, int64_t (&room)[most_rows]) {
    int64_t number = 0;
    if (!is_whole(object, number)) return are_within(call, view, object, batch, limit);
    if (number < 0 || number > limit || batch > most_rows) return false;
    for (int64_t i = 0; i < batch; ++i) room[i] = number;
    view.data = room, view.dtype = DType::int64, view.ndim = 1, view.size[0] = batch, view.stride[0] = 1;
    return true;
}

// q, k, v, k_context, v_context, context_lens, context_index, block_lens, causal, window, scale, softcap: without
// pages. k and v are None for the context alone. (result, log-sum-exp)
PyObject* block_attention(PyObject*, Arguments given, Py_ssize_t count) {
    View q, k, v, k_context, v_context, lens, index, block_lens, out, lse;
    int64_t of_context[most_rows], of_block[most_rows], window = -1;
    double scale = 0, softcap = 0;
    Call call;
    if (count != 12 || !call || !call.required(q, given[0]) || !call.optional(k, given[1]) ||
        !call.optional(v, given[2]) || !call.optional(k_context, given[3]) || !call.optional(v_context, given[4]))
        return none();
    if (!PyBool_Check(given[8]) || !is_real(given[11], softcap) || softcap < 0) return none();
    if (given[9] != Py_None && (!is_whole(given[9], window) || window < 0)) return none();
    if (!is_float(q) || q.ndim != 4 || bool(k) != bool(v) || bool(k_context) != bool(v_context) || (!k && !k_context))
        return none();
    const int64_t batch = q.size[0], length = q.size[1], heads = q.size[2], dim = q.size[3];
    const int64_t kv_heads = k ? k.size[2] : k_context.size[2];
    if (given[10] == Py_None)
        scale = std::pow(double(dim), -0.5);  // as Python computes it
    else if (!is_real(given[10], scale))
        return none();
    for (const View* own : {&k, &v})
        if (*own && (own->dtype != q.dtype || !has_shape(*own, {batch, length, kv_heads, dim}))) return none();
    if (kv_heads == 0 || heads % kv_heads != 0) return none();
    if (k_context) {
        const int64_t rows = k_context.size[0], tokens = k_context.ndim == 4 ? k_context.size[1] : 0;
        for (const View* past : {&k_context, &v_context})
            if (past->dtype != q.dtype || !has_shape(*past, {rows, tokens, kv_heads, dim})) return none();
        if (!are_lengths(call, lens, given[5], batch, tokens, of_context)) return none();
        if (!are_within(call, index, given[6], batch, rows - 1)) return none();
        if (!index && rows != batch) return none();
    } else if (given[5] != Py_None || given[6] != Py_None) {
        return none();
    }
    if (!are_lengths(call, block_lens, given[7], batch, length, of_block)) return none();
    const DType sums = q.dtype == DType::float64 ? DType::float64 : DType::float32;
    PyObject* result = pair(new_empty(given[0], q), new_empty(given[0], {batch, length, heads}, sums));
    if (result == nullptr) return nullptr;
    if (!is_placed(out, PyTuple_GET_ITEM(result, 0)) || !is_placed(lse, PyTuple_GET_ITEM(result, 1)))
        return Py_DECREF(result), none();
    return run(result, [&] {
        tt::block_attention({q,
                             k,
                             v,
                             k_context,
                             v_context,
                             lens,
                             index,
                             {},
                             block_lens,
                             out,
                             lse,
                             scale,
                             softcap,
                             window,
                             given[8] == Py_True});
    });
}

// [...] as [n], if it is contiguous.
bool as_vector(View& view) {
    int64_t count = 1;
    for (int i = view.ndim - 1; i >= 0; --i) {
        if (view.size[i] != 1 && view.stride[i] != count) return false;
        count *= view.size[i];
    }
    view.ndim = 1, view.size[0] = count, view.stride[0] = 1;
    return true;
}

// out_a, lse_a, out_b, lse_b.
PyObject* merge_attention(PyObject*, Arguments given, Py_ssize_t count) {
    View out_a, lse_a, out_b, lse_b, out, lse;
    Call call;
    if (count != 4 || !call || !call.required(out_a, given[0]) || !call.required(lse_a, given[1]) ||
        !call.required(out_b, given[2]) || !call.required(lse_b, given[3]))
        return none();
    const int last = out_a.ndim - 1;
    const DType sums = out_a.dtype == DType::float64 ? DType::float64 : DType::float32;
    if (!is_float(out_a) || last < 1 || out_b.dtype != out_a.dtype || out_b.ndim != out_a.ndim) return none();
    for (const View* of : {&lse_a, &lse_b})
        if (of->dtype != sums || of->ndim != last) return none();
    for (int i = 0; i <= last; ++i) {
        if (out_b.size[i] != out_a.size[i]) return none();
        if (i < last && (lse_a.size[i] != out_a.size[i] || lse_b.size[i] != out_a.size[i])) return none();
    }
    const View of_out = out_a, of_lse = lse_a;
    for (View* of : {&out_a, &out_b})
        if (!flatten(*of)) return none();
    for (View* of : {&lse_a, &lse_b})
        if (!as_vector(*of)) return none();
    PyObject* result = pair(new_empty(given[0], of_out), new_empty(given[1], of_lse));
    if (result == nullptr) return nullptr;
    if (!is_placed(out, PyTuple_GET_ITEM(result, 0)) || !is_placed(lse, PyTuple_GET_ITEM(result, 1)) || !flatten(out) ||
        !as_vector(lse))
        return Py_DECREF(result), none();
    return run(result, [&] { tt::merge_attention({out_a, lse_a, out_b, lse_b, out, lse}); });
}

// The addresses [begin, end) of a tensor's elements.
struct Span {
    explicit Span(const View& view) : begin(static_cast<const char*>(view.data)) {
        int64_t last = 0;
        for (int i = 0; i < view.ndim; ++i) last += (view.size[i] - 1) * view.stride[i];
        end = begin + (last + 1) * size_of(view.dtype);
    }
    bool meets(const Span& other) const { return begin < other.end && other.begin < end; }
    const char *begin, *end;
};

// Whether each element has a place of its own: every dimension steps over all that those behind it reach, in the order
// [rows, tokens, heads, head_dim] or with heads before tokens.
bool has_own_places(const View& view) {
    for (const auto& order : {std::array<int, 4>{0, 1, 2, 3}, std::array<int, 4>{0, 2, 1, 3}}) {
        int64_t reach = 1;
        bool steps_over = true;
        for (int i = 3; i >= 0; --i) {
            const int64_t size = view.size[order[i]], stride = view.stride[order[i]];
            if (size == 1) continue;
            steps_over &= stride >= reach;
            reach += (size - 1) * stride;
        }
        if (steps_over) return true;
    }
    return false;
}

// k_context, v_context, k, v, context_lens, block_lens: without pages and context rows. True if it has appended.
PyObject* append_kv(PyObject*, Arguments given, Py_ssize_t count) {
    View k_context, v_context, k, v, lens, block_lens;
    int64_t of_context[most_rows], of_block[most_rows];
    Call call;
    if (count != 6 || !call || given[4] == Py_None || !call.required(k_context, given[0]) ||
        !call.required(v_context, given[1]) || !call.required(k, given[2]) || !call.required(v, given[3]))
        return none();
    if (!is_float(k) || k.ndim != 4 || k_context.ndim != 4) return none();
    const int64_t batch = k.size[0], length = k.size[1], heads = k.size[2], dim = k.size[3];
    const int64_t room = k_context.size[1];
    if (v.dtype != k.dtype || !has_shape(v, {batch, length, heads, dim})) return none();
    for (const View* storage : {&k_context, &v_context})
        if (storage->dtype != k.dtype || !has_shape(*storage, {batch, room, heads, dim}) || !has_own_places(*storage))
            return none();
    if (!are_lengths(call, lens, given[4], batch, room, of_context) ||
        !are_lengths(call, block_lens, given[5], batch, length, of_block))
        return none();
    for (int64_t b = 0; b < batch; ++b)
        if (index_at(lens, b) + (block_lens ? index_at(block_lens, b) : length) > room) return none();
    const Span keys(k_context), values(v_context);
    if (keys.meets(values)) return none();
    for (const View* read : {&k, &v, &lens, &block_lens})
        if (*read && (Span(*read).meets(keys) || Span(*read).meets(values))) return none();
    Py_INCREF(Py_True);
    PyObject* done = run(Py_True, [&] { tt::append_kv({k_context, v_context, k, v, lens, {}, {}, block_lens}); });
    if (done == nullptr || !was_written(given[0]) || !was_written(given[1])) return nullptr;
    return done;
}

}  // namespace

PyMethodDef attention_entries[] = {
    TT_ENTRY(block_attention, "(result, log-sum-exp), or None"),
    TT_ENTRY(merge_attention, "(result, log-sum-exp), or None"),
    TT_ENTRY(append_kv, "True, or None where nothing was done"),
    TT_LAST_ENTRY,
};

}  // namespace tt::direct
