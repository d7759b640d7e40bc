// Python's side of the kernels: tensors come as (pointer, dtype, sizes, strides), and nothing is checked here. The
// global interpreter lock is released while a kernel runs.
#include <pybind11/pybind11.h>

#include "cpu/adaln.h"
#include "cpu/isa.h"
#include "cpu/mamba2.h"
#include "cpu/threads.h"
#include "cpu/view.h"

namespace py = pybind11;

namespace pybind11::detail {
template <>
struct type_caster<tt::View> {  // None, or twotower_kernels.cpu.view(tensor)
    PYBIND11_TYPE_CASTER(tt::View, const_name("View"));
    bool load(handle source, bool) {
        if (source.is_none()) return true;
        if (!PyTuple_Check(source.ptr()) || PyTuple_GET_SIZE(source.ptr()) != 4) return false;
        auto fields = reinterpret_borrow<tuple>(source);
        tuple sizes = fields[2], strides = fields[3];
        value.data = reinterpret_cast<void*>(fields[0].cast<uintptr_t>());
        value.dtype = static_cast<tt::DType>(fields[1].cast<int>());
        value.ndim = static_cast<int>(sizes.size());
        if (value.ndim > tt::View::max_dims) return false;
        for (int i = 0; i < value.ndim; ++i) {
            value.size[i] = sizes[i].cast<int64_t>();
            value.stride[i] = strides[i].cast<int64_t>();
        }
        return true;
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
    bind_mamba2(m);
}
