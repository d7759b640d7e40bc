// The logits of a kernel that is compiled for one LOGIT_TYPE (warp.h).
#pragma once

#include "remask.h"

template <int64 type>
struct Stored {
    using Type = unsigned short;  // bfloat16, float16
};
template <>
struct Stored<type_float32> {
    using Type = float;
};
using Logit = Stored<LOGIT_TYPE>::Type;

__device__ inline const Logit* position_logits(const Remask& a, int64 b, int64 s) {
    const RemaskLogits z = logits_of(a, b, s);
    return static_cast<const Logit*>(z.data) + z.first;
}

__device__ inline float widen(float x) {
    return x;
}
__device__ inline float widen(unsigned short bits) {
    return LOGIT_TYPE == type_bfloat16 ? widen_bf16(bits) : widen_fp16(bits);
}

// The logits of 16 bytes.
__device__ inline void unpack(const uint4& vector, float* x) {
    const unsigned words[4] = {vector.x, vector.y, vector.z, vector.w};
#pragma unroll
    for (int i = 0; i < 4; ++i) {
        if constexpr (sizeof(Logit) == 4) {
            x[i] = __uint_as_float(words[i]);
        } else {
            x[2 * i] = widen((unsigned short)(words[i] & 0xffffu));
            x[2 * i + 1] = widen((unsigned short)(words[i] >> 16));
        }
    }
}
