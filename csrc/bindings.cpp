// Python's side of the kernels: tensors come as (pointer, dtype, sizes, strides), and nothing is checked here. The
// global interpreter lock is released while a kernel runs.
#include <pybind11/pybind11.h>

#include <cstring>
#include <string>

#include "cpu/adaln.h"
#include "cpu/isa.h"
#include "cpu/remask.h"
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
    bind_remask(m);
}
