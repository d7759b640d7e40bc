// DLPack's table of functions for exchanging tensors in one process, as PyTorch offers it from 2.10 on: a tensor is
// read by one call into PyTorch instead of one for each of its attributes (50 ns). No header of either
// is needed. Layouts: https://dmlc.github.io/dlpack/latest/c_api.html, DLPack 1.x.
#pragma once

#include <pybind11/pybind11.h>

#include <cstdint>

#include "cpu/view.h"

namespace tt {

struct DlDevice {
    int32_t type, index;
};
struct DlDataType {
    uint8_t code, bits;
    uint16_t lanes;
};
struct DlTensor {
    void* data;
    DlDevice device;
    int32_t ndim;
    DlDataType dtype;
    int64_t *shape, *strides;
    uint64_t byte_offset;
};
constexpr int32_t dl_cpu = 1;

struct DlExchange {
    struct {
        uint32_t major, minor;
    } version;
    void* previous;
    int (*allocate)(void*, void*, void*, void*);
    int (*managed_from_object)(void*, void*);
    int (*managed_to_object)(void*, void*);
    int (*tensor_from_object)(void* object, DlTensor* out);  // borrowed: as long as the object lives
    int (*current_stream)(int, int32_t, void**);
};

// What is known of PyTorch in this process; Python says it once (set_torch). Never freed.
struct Torch {
    PyObject* tensor = nullptr;            // the class
    PyObject* dtypes = nullptr;            // a tuple in the order of DType
    const DlExchange* exchange = nullptr;  // null: an older PyTorch
};
inline Torch& torch() {
    static Torch known;
    return known;
}

inline bool is_tensor(PyObject* object) {
    PyObject* known = torch().tensor;
    return known != nullptr && PyObject_TypeCheck(object, reinterpret_cast<PyTypeObject*>(known));
}

// The dtype, if the kernels know it.
inline bool known_dtype(const DlDataType& from, DType& dtype) {
    enum Code : uint8_t {
        integer = 0,
        natural = 1,
        floating = 2,
        brain_floating = 4,
        boolean = 6,
        floating_e4m3fn = 10
    };
    if (from.lanes != 1) return false;
    if (from.code == floating && from.bits == 64) return dtype = DType::float64, true;
    if (from.code == floating && from.bits == 32) return dtype = DType::float32, true;
    if (from.code == brain_floating && from.bits == 16) return dtype = DType::bfloat16, true;
    if (from.code == floating && from.bits == 16) return dtype = DType::float16, true;
    if (from.code == integer && from.bits == 64) return dtype = DType::int64, true;
    if (from.code == integer && from.bits == 32) return dtype = DType::int32, true;
    if (from.code == natural && from.bits == 8) return dtype = DType::byte, true;
    if (from.code == integer && from.bits == 8) return dtype = DType::int8, true;
    if (from.code == floating_e4m3fn && from.bits == 8) return dtype = DType::float8, true;
    if (from.code == boolean && from.bits == 8) return dtype = DType::boolean, true;
    return false;
}

// A tensor by the table, wherever it lies. Returns false for what is none, and where there is no table.
inline bool exchanged(PyObject* object, DlTensor& tensor) {
    if (torch().exchange == nullptr || !is_tensor(object)) return false;
    if (torch().exchange->tensor_from_object(object, &tensor) == 0) return true;
    PyErr_Clear();
    return false;
}

}  // namespace tt
