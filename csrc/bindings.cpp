// Python's side of the kernels: tensors come as they are (tensors.h), or as (pointer, code of the dtype, sizes,
// strides). Of their meaning nothing is checked here, which the operators have done, but what the kernels take without
// a look, that a tensor has its rank, a known dtype and memory, and that an activation is one. The global interpreter
// lock is released while a kernel runs.
#include <pybind11/pybind11.h>

#include <cstdint>
#include <stdexcept>
#include <string>

#include "cpu/adaln.h"
#include "cpu/attention.h"
#include "cpu/isa.h"
#include "cpu/linear.h"
#include "cpu/mamba2.h"
#include "cpu/moe.h"
#include "cpu/remask.h"
#include "cpu/rows.h"
#include "cpu/threads.h"
#include "direct/call.h"
#include "recording.h"
#include "tensors.h"

namespace py = pybind11;

namespace pybind11::detail {
template <>
struct type_caster<tt::Activation> {
    PYBIND11_TYPE_CASTER(tt::Activation, const_name("Activation"));
    bool load(handle source, bool) {
        const long code = PyLong_AsLong(source.ptr());
        if (PyErr_Occurred()) {
            PyErr_Clear();
            return false;
        }
        if (code < 0 || code > static_cast<long>(tt::Activation::clamped_gated))
            throw py::value_error("expected the code of an activation, got " + std::to_string(code));
        value = static_cast<tt::Activation>(code);
        return true;
    }
};
}  // namespace pybind11::detail

namespace {

using tt::called;
using tt::Optional;
using Vector = tt::Ranked<1>;
using Matrix = tt::Ranked<2>;
using Cube = tt::Ranked<3>;
using Tokens = tt::Ranked<4>;  // [B, S, heads, head_dim]
using Released = py::call_guard<py::gil_scoped_release>;

void bind_adaln(py::module_& m) {
    m.def(
        "gated_residual_adaln_norm",
        [](Cube x, Optional<3> y, Optional<2> gate, Optional<1> weight, Optional<2> shift, Optional<2> scale,
           Optional<3> h, Optional<3> normed, double eps, bool norm_first) {
            called<tt::gated_residual_adaln_norm>(
                {x, y, gate, weight, shift, scale, h, normed, eps, norm_first, false});
        },
        Released());
    m.def(
        "rms_norm",
        [](tt::Rows x, Optional<1> weight, tt::Rows normed, double eps, bool round_first) {
            called<tt::gated_residual_adaln_norm>({x, {}, {}, weight, {}, {}, {}, normed, eps, false, round_first});
        },
        Released());
}

void bind_attention(py::module_& m) {
    m.def(
        "block_attention",
        [](Tokens q, Optional<4> k, Optional<4> v, Optional<4> k_context, Optional<4> v_context,
           Optional<1> context_lens, Optional<1> context_starts, Optional<1> context_index, Optional<2> block_table,
           Optional<1> block_lens, Optional<1> sinks, Tokens out, Cube lse, double scale, double softcap,
           int64_t window, int64_t causal) {
            called<tt::block_attention>({q, k, v, k_context, v_context, context_lens, context_starts, context_index,
                                         block_table, block_lens, sinks, out, lse, scale, softcap, window, causal});
        },
        Released());
    m.def(
        "merge_attention",
        [](Matrix out_a, Vector lse_a, Matrix out_b, Vector lse_b, Matrix out, Vector lse) {
            called<tt::merge_attention>({out_a, lse_a, out_b, lse_b, out, lse});
        },
        Released());
    m.def(
        "append_kv",
        [](Tokens k_context, Tokens v_context, Tokens k, Tokens v, Vector context_lens, Optional<1> context_index,
           Optional<2> block_table, Optional<1> block_lens) {
            called<tt::append_kv>({k_context, v_context, k, v, context_lens, context_index, block_table, block_lens});
        },
        Released());
}

// A quantized matrix, or one per expert; no data: none.
tt::PackedWeight packed(const tt::View& data, const tt::View& scales, const tt::View& whole, int format,
                        int64_t columns) {
    if (format < tt::PackedWeight::int8 || format > tt::PackedWeight::e2m1)
        throw py::value_error("expected the code of a format, got " + std::to_string(format));
    const int64_t groups = scales.size[scales.ndim - 1];
    const int64_t group = groups > 1 ? columns / groups : columns > 0 ? columns : 1;
    return {data, scales, whole, static_cast<tt::PackedWeight::Format>(format), columns, group};
}

void bind_linear(py::module_& m) {
    m.def(
        "linear",
        [](tt::Flat x, Matrix weight, Optional<1> bias, tt::Flat out) { called<tt::linear>({x, weight, bias, out}); },
        Released());
    m.def(
        "quantized_linear",
        [](tt::Flat x, Matrix data, Matrix scales, Optional<1> whole, int format, Optional<1> bias, tt::Flat out) {
            called<tt::quantized_linear>({x, packed(data, scales, whole, format, x.size[1]), bias, out});
        },
        Released());
}

bool holds(const tt::MoePlan& plan) {
    bool holds = false;
    tt::moe_plan_holds({plan, &holds});
    return holds;
}

// Where a recording is run, nobody asks; so it says.
void expect_plan(const tt::MoePlan& plan) {
    if (!holds(plan)) throw std::invalid_argument("plan: expected moe_plan(experts, E) of these experts, got another");
}

void bind_moe(py::module_& m) {
    m.def(
        "moe_gate", [](Matrix x, Matrix weight, Matrix logits) { called<tt::moe_gate>({x, weight, logits}); },
        Released());
    m.def(
        "moe_route",
        [](Matrix logits, Optional<1> bias, Optional<1> scale, Matrix weights, Matrix experts, bool softmax,
           int64_t n_group, int64_t topk_group, bool renormalize, double scaling, bool exclude_dropped) {
            called<tt::moe_route>({logits, bias, scale, weights, experts, softmax, n_group, topk_group, renormalize,
                                   scaling, exclude_dropped});
        },
        Released());
    m.def(
        "moe_plan",
        [](Matrix experts, Vector counts, Vector offsets, Vector pairs) {
            called<tt::moe_plan>({experts, counts, offsets, pairs});
        },
        Released());
    m.def(
        "moe_plan_holds",
        [](Matrix experts, Vector counts, Vector offsets, Vector pairs) {
            const tt::MoePlan plan = {experts, counts, offsets, pairs};
            if (tt::Recording::now() == nullptr) return holds(plan);
            called<expect_plan>(plan);
            return true;
        },
        Released());
    m.def(
        "moe_experts",
        [](Matrix x, Cube up, Cube down, Matrix weights, Vector offsets, Vector pairs, Optional<2> shared_up,
           Optional<2> shared_down, Optional<2> up_bias, Optional<2> down_bias, Matrix total, Matrix out,
           tt::Activation activation, double alpha, double limit) {
            called<tt::moe_experts>({x, up, down, weights, offsets, pairs, shared_up, shared_down, up_bias, down_bias,
                                     total, out, activation, alpha, limit});
        },
        Released());
    // The same where matrices are quantized: those of format -1 are not.
    m.def(
        "quantized_experts",
        [](Matrix x, Cube up, Optional<3> up_scales, Optional<1> up_whole, Cube down, Optional<3> down_scales,
           Optional<1> down_whole, Matrix weights, Vector offsets, Vector pairs, Optional<2> shared_up,
           Optional<2> shared_up_scales, Optional<1> shared_up_whole, Optional<2> shared_down,
           Optional<2> shared_down_scales, Optional<1> shared_down_whole, Optional<2> up_bias, Optional<2> down_bias,
           Matrix total, Matrix out, int format, int shared_format, int64_t inner, int64_t shared_inner,
           tt::Activation activation, double alpha, double limit) {
            tt::MoeExperts a = {x,       {},        {},    weights, offsets,    pairs, {},   {},
                                up_bias, down_bias, total, out,     activation, alpha, limit};
            const int64_t h = x.size[1];
            if (format < 0)
                a.up = up, a.down = down;
            else
                a.up_packed = packed(up, up_scales, up_whole, format, h),
                a.down_packed = packed(down, down_scales, down_whole, format, inner);
            if (shared_format < 0)
                a.shared_up = shared_up, a.shared_down = shared_down;
            else
                a.shared_up_packed = packed(shared_up, shared_up_scales, shared_up_whole, shared_format, h),
                a.shared_down_packed =
                    packed(shared_down, shared_down_scales, shared_down_whole, shared_format, shared_inner);
            called<tt::moe_experts>(a);
        },
        Released());
}

void bind_mamba2(py::module_& m) {
    m.def(
        "mamba2_scan",
        [](Cube xbc, Cube dt, Matrix conv_weight, Optional<1> conv_bias, Vector a_log, Vector d, Vector dt_bias,
           Optional<3> conv_state, Optional<4> ssm_state, Optional<1> state_index, Optional<1> seq_lens, Cube y,
           Optional<4> conv_out, Optional<5> ssm_out, int64_t groups, int64_t head_dim, int64_t states_every,
           double dt_min, double dt_max) {
            called<tt::mamba2_scan>({xbc, dt, conv_weight, conv_bias, a_log, d, dt_bias, conv_state, ssm_state,
                                     state_index, seq_lens, y, conv_out, ssm_out, groups, head_dim, states_every,
                                     dt_min, dt_max});
        },
        Released());
    m.def(
        "gated_rms_norm",
        [](Cube y, Cube z, Vector weight, Cube out, int64_t groups, double eps) {
            called<tt::gated_rms_norm>({y, z, weight, out, groups, eps});
        },
        Released());
}

void bind_remask(py::module_& m) {
    // The address of a tt::Remask, which Python has filled, its size, and what keeps alive where it points.
    m.def(
        "remask",
        [](uintptr_t arguments, size_t size, const py::object& owner) {
            if (arguments == 0 || size != sizeof(tt::Remask))
                throw py::value_error("expected a struct of " + std::to_string(sizeof(tt::Remask)) + " bytes, got " +
                                      std::to_string(size));
            if (tt::Recording* recording = tt::Recording::now()) recording->keep(owner);
            py::gil_scoped_release released;
            called<tt::remask>(*reinterpret_cast<const tt::Remask*>(arguments));
        },
        py::arg("arguments"), py::arg("size"), py::arg("owner") = py::none());
}

// `gather_rows` of rows that must be there.
struct Gather {
    tt::View table, ids, out;
};
void gather(const Gather& a) {
    int64_t stranger = -1;
    tt::gather_rows({a.table, a.ids, a.out, &stranger});
    if (stranger >= 0)
        throw std::invalid_argument("ids: expected rows of a table of " + std::to_string(a.table.size[0]) + ", got " +
                                    std::to_string(a.ids.as<int64_t>()[stranger * a.ids.stride[0]]));
}

void bind_rows(py::module_& m) {
    m.def(
        "copy_numbers", [](tt::Strided source, tt::Strided out) { called<tt::copy_numbers>({source, out}); },
        Released());
    m.def("gather_rows", [](Matrix table, Vector ids, Matrix out) { called<gather>({table, ids, out}); }, Released());
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
    bind_rows(m);
    tt::bind_recording(m);
    tt::direct::bind(m);
}
