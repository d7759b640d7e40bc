// What a kernel is told of a tensor: where it lies, what it holds, its sizes and strides. Plain data, nothing owned.
#pragma once

#include <cstdint>

namespace tt {

enum class DType : int { float64, float32, bfloat16, float16, int64, int32, boolean, byte, int8, float8 };

// Of an element, in bytes. Every file that includes this has one of its own: see isa.h.
static constexpr int64_t size_of(DType dtype) {
    switch (dtype) {
        case DType::float64:
        case DType::int64: return 8;
        case DType::float32:
        case DType::int32: return 4;
        case DType::bfloat16:
        case DType::float16: return 2;
        case DType::boolean:
        case DType::byte:
        case DType::int8:
        case DType::float8: break;
    }
    return 1;
}

struct View {
    static constexpr int max_dims = 6;
    void* data = nullptr;  // null: no tensor was given
    DType dtype = DType::float32;
    int ndim = 0;
    int64_t size[max_dims] = {};
    int64_t stride[max_dims] = {};  // in elements

    explicit operator bool() const { return data != nullptr || ndim > 0; }
    template <class T>
    T* as() const {
        return static_cast<T*>(data);
    }
};

}  // namespace tt
