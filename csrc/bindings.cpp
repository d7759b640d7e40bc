// Python's side of the kernels: tensors come as (pointer, dtype, sizes, strides), and nothing is checked here. The
// global interpreter lock is released while a kernel runs.
#include <pybind11/pybind11.h>

#include <cstring>
#include <string>

#include "cpu/adaln.h"
#include "cpu/attention.h"
#include "cpu/isa.h"
#include "cpu/linear.h"
#include "cpu/mamba2.h"
#include "cpu/moe.h"
#include "cpu/remask.h"
#include "cpu/threads.h"
#include "cpu/view.h"

namespace py = pybind11;

namespace pybind11::detail {
template <>
struct type_caster<tt::View> {  // None, or (pointer, dtype, sizes, strides)
    PYBIND11_TYPE_CASTER(tt::View, const_name("View"));
    bool load(handle source, bool) {
        if (source.is_none()) return true;
        PyObject* fields = source.ptr();
        if (!PyTuple_Check(fields) || PyTuple_GET_SIZE(fields) != 4) return false;
        PyObject *sizes = PyTuple_GET_ITEM(fields, 2), *strides = PyTuple_GET_ITEM(fields, 3);
        if (!PyTuple_Check(sizes) || !PyTuple_Check(strides)) return false;
        const Py_ssize_t dims = PyTuple_GET_SIZE(sizes);
        if (dims > tt::View::max_dims || PyTuple_GET_SIZE(strides) != dims) return false;
        value.data = PyLong_AsVoidPtr(PyTuple_GET_ITEM(fields, 0));
        value.dtype = static_cast<tt::DType>(PyLong_AsLong(PyTuple_GET_ITEM(fields, 1)));
        value.ndim = static_cast<int>(dims);
        for (Py_ssize_t i = 0; i < dims; ++i) {
            value.size[i] = PyLong_AsLongLong(PyTuple_GET_ITEM(sizes, i));
            value.stride[i] = PyLong_AsLongLong(PyTuple_GET_ITEM(strides, i));
        }
        if (!PyErr_Occurred()) return true;
        PyErr_Clear();  // something other than an integer
        return false;
    }
};
}  // namespace pybind11::detail

namespace {

using tt::View;
using Released = py::call_guard<py::gil_scoped_release>;

void bind_adaln(py::module_& m) {
    m.def(
        "gated_residual_adaln_norm",
        [](View x, View y, View gate, View weight, View shift, View scale, View h, View normed, double eps,
           bool norm_first) {
            tt::gated_residual_adaln_norm({x, y, gate, weight, shift, scale, h, normed, eps, norm_first});
        },
        Released());
}

void bind_attention(py::module_& m) {
    m.def(
        "block_attention",
        [](View q, View k, View v, View k_context, View v_context, View context_lens, View context_index,
           View block_table, View block_lens, View out, View lse, double scale, double softcap, int64_t window,
           bool causal) {
            tt::block_attention({q, k, v, k_context, v_context, context_lens, context_index, block_table, block_lens,
                                 out, lse, scale, softcap, window, causal});
        },
        Released());
    m.def(
        "merge_attention",
        [](View out_a, View lse_a, View out_b, View lse_b, View out, View lse) {
            tt::merge_attention({out_a, lse_a, out_b, lse_b, out, lse});
        },
        Released());
    m.def(
        "append_kv",
        [](View k_context, View v_context, View k, View v, View context_lens, View context_index, View block_table,
           View block_lens) {
            tt::append_kv({k_context, v_context, k, v, context_lens, context_index, block_table, block_lens});
        },
        Released());
}

void bind_linear(py::module_& m) {
    m.def("linear", [](View x, View weight, View bias, View out) { tt::linear({x, weight, bias, out}); }, Released());
}

void bind_moe(py::module_& m) {
    m.def("moe_gate", [](View x, View weight, View logits) { tt::moe_gate({x, weight, logits}); }, Released());
    m.def(
        "moe_route",
        [](View logits, View bias, View weights, View experts, bool softmax, int64_t n_group, int64_t topk_group,
           bool renormalize, double scaling) {
            tt::moe_route({logits, bias, weights, experts, softmax, n_group, topk_group, renormalize, scaling});
        },
        Released());
    m.def(
        "moe_plan",
        [](View experts, View counts, View offsets, View pairs) { tt::moe_plan({experts, counts, offsets, pairs}); },
        Released());
    m.def(
        "moe_plan_holds",
        [](View experts, View counts, View offsets, View pairs) {
            bool holds = false;
            tt::moe_plan_holds({{experts, counts, offsets, pairs}, &holds});
            return holds;
        },
        Released());
    m.def(
        "moe_experts",
        [](View x, View up, View down, View weights, View offsets, View pairs, View shared_up, View shared_down,
           View total, View out, int activation) {
            tt::moe_experts({x, up, down, weights, offsets, pairs, shared_up, shared_down, total, out,
                             static_cast<tt::Activation>(activation)});
        },
        Released());
}

void bind_mamba2(py::module_& m) {
    m.def(
        "mamba2_scan",
        [](View xbc, View dt, View conv_weight, View conv_bias, View a_log, View d, View dt_bias, View conv_state,
           View ssm_state, View state_index, View seq_lens, View y, View conv_out, View ssm_out, int64_t groups,
           int64_t head_dim, int64_t states_every, double dt_min, double dt_max) {
            tt::mamba2_scan({xbc, dt, conv_weight, conv_bias, a_log, d, dt_bias, conv_state, ssm_state, state_index,
                             seq_lens, y, conv_out, ssm_out, groups, head_dim, states_every, dt_min, dt_max});
        },
        Released());
    m.def(
        "gated_rms_norm",
        [](View y, View z, View weight, View out, int64_t groups, double eps) {
            tt::gated_rms_norm({y, z, weight, out, groups, eps});
        },
        Released());
}

// A struct of numbers of one type from a sequence of them, in the order of its fields.
template <class Struct, class Number>
Struct numbers(const py::sequence& from) {
    constexpr size_t count = sizeof(Struct) / sizeof(Number);
    if (from.size() != count) throw py::value_error("expected " + std::to_string(count) + " numbers");
    Number values[count];
    for (size_t i = 0; i < count; ++i) values[i] = from[i].cast<Number>();
    Struct filled;
    std::memcpy(&filled, values, sizeof(filled));
    return filled;
}

void bind_remask(py::module_& m) {
    m.def("remask", [](View logits, View tokens, int64_t mask_token_id, py::sequence options, py::sequence bounds,
                       py::sequence whole, py::sequence real, View step, View num_steps, View top_k, View seed,
                       View offset, View initial, View temperature, View top_p, View gate_bound, View suppressed,
                       View unscored, View editable, View valid_lens, View candidates, View rank_noise, View tokens_out,
                       View transfer_mask, View candidate, View confidence, View entropy, View num_masked, View done) {
        const tt::Remask arguments = {logits,
                                      tokens,
                                      mask_token_id,
                                      numbers<tt::RemaskOptions, int64_t>(options),
                                      numbers<tt::RemaskBounds, double>(bounds),
                                      numbers<tt::RemaskWhole, int64_t>(whole),
                                      numbers<tt::RemaskReal, double>(real),
                                      step,
                                      num_steps,
                                      top_k,
                                      seed,
                                      offset,
                                      initial,
                                      temperature,
                                      top_p,
                                      gate_bound,
                                      suppressed,
                                      unscored,
                                      editable,
                                      valid_lens,
                                      candidates,
                                      rank_noise,
                                      tokens_out,
                                      transfer_mask,
                                      candidate,
                                      confidence,
                                      entropy,
                                      num_masked,
                                      done};
        py::gil_scoped_release released;
        tt::remask(arguments);
    });
}

void bind_machine(py::module_& m) {
    m.def("isa", [] { return tt::isa_name(tt::isa()); });
    m.def("isas", [] {  // every set this processor has, the plainest first
        py::list names;
        for (int i = 0; i <= static_cast<int>(tt::best_isa()); ++i) names.append(tt::isa_name(static_cast<tt::Isa>(i)));
        return names;
    });
    m.def("set_isa", [](const std::string& name) {
        for (int i = 0; i <= static_cast<int>(tt::best_isa()); ++i)
            if (name == tt::isa_name(static_cast<tt::Isa>(i))) return tt::set_isa(static_cast<tt::Isa>(i));
        throw py::value_error("set_isa: expected one of isas(), got " + name);
    });
    m.def("max_threads", &tt::max_threads);
}

}  // namespace

PYBIND11_MODULE(_C, m) {
    m.doc() = "CPU kernels of twotower_kernels; pointers in, nothing out.";
    bind_machine(m);
    bind_adaln(m);
    bind_attention(m);
    bind_linear(m);
    bind_moe(m);
    bind_mamba2(m);
    bind_remask(m);
}
