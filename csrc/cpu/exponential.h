// e^x in float, for scalars (loops of them vectorise) and for vectors; in double for vectors, while that of scalars and
// of exp_negative is the standard library's.
//
// x is split into n log 2 + r with |r| <= log(2)/2, where seven terms of the power series suffice; 2^n is put together
// from its exponent.
#pragma once

#include "vectors.h"

namespace tt {
namespace TT_ISA {

constexpr float nearest_integer = 0x1.8p23f;  // adding it leaves the nearest integer in a float's last bits
constexpr float log2_e = 0x1.715476p0f;
constexpr float log_2_high = 0x1.62ep-1f;  // log 2 in two parts, the first short, so that n times it is exact
constexpr float log_2_low = float(0.693147180559945309 - 0x1.62ep-1);

// e^x within 2 units in the last place over the whole range, subnormal results and infinity included; NaN stays NaN.
inline float exponential(float x) {
    x = x > 89.0f ? 89.0f : x;      // infinity from here; NaN passes both comparisons
    x = x < -104.0f ? -104.0f : x;  // zero from here
    const float shifted = x * log2_e + nearest_integer, n = shifted - nearest_integer;
    const float r = (x - n * log_2_high) - n * log_2_low;
    float sum = r * (1.f / 5040) + 1.f / 720;
    sum = sum * r + 1.f / 120;
    sum = sum * r + 1.f / 24;
    sum = sum * r + 1.f / 6;
    sum = sum * r + 0.5f;
    sum = sum * (r * r) + r + 1.f;
    const int32_t power = int32_t(bit_cast<uint32_t>(shifted) - bit_cast<uint32_t>(nearest_integer));
    const uint32_t half = uint32_t(power >> 1), rest = uint32_t(power) - half;  // 2^128 and 2^-150 are no floats
    return sum * bit_cast<float>((half + 127) << 23) * bit_cast<float>((rest + 127) << 23);
}
inline double exponential(double x) {
    return ::exp(x);
}

// e^x in double, within 2 units in the last place over the whole range, as `exponential` above; NaN stays NaN. Thirteen
// terms of the series are needed here.
inline DoubleVector exponential(DoubleVector x) {
    const DoubleVector zero{}, nearest = zero + 0x1.8p52;
    x = x > zero + 710.0 ? zero + 710.0 : x;  // infinity from here
    x = x < zero - 746.0 ? zero - 746.0 : x;  // zero from here
    const DoubleVector shifted = x * 0x1.71547652b82fep0 + nearest, n = shifted - nearest;
    const DoubleVector r = (x - n * 0x1.62e42feep-1) - n * 0x1.a39ef35793c76p-33;
    DoubleVector sum = r * (1.0 / 6227020800) + 1.0 / 479001600;
    sum = sum * r + 1.0 / 39916800;
    sum = sum * r + 1.0 / 3628800;
    sum = sum * r + 1.0 / 362880;
    sum = sum * r + 1.0 / 40320;
    sum = sum * r + 1.0 / 5040;
    sum = sum * r + 1.0 / 720;
    sum = sum * r + 1.0 / 120;
    sum = sum * r + 1.0 / 24;
    sum = sum * r + 1.0 / 6;
    sum = sum * r + 0.5;
    sum = sum * (r * r) + r + 1.0;
    // 2^n in two factors, since 2^1024 and 2^-1075 are no doubles; 2048 keeps what is shifted positive.
    const LongVector power = (LongVector)shifted - (LongVector)nearest + 2048, half = power >> 1, rest = power - half;
    return sum * (DoubleVector)((half - 1) << 52) * (DoubleVector)((rest - 1) << 52);
}

// e^x for x <= 0 of N vectors, within 2 units in the last place; 0 below -87.3, where the result would be subnormal. In
// step: one exponential is a long chain of dependent operations, and a processor does not look far enough ahead to
// overlap it with the next one by itself. (Measured on Zen 3: twice as fast.)
template <int N>
inline void exp_negative(FloatVector (&x)[N]) {
    FloatVector shifted[N], n[N], r[N], sum[N];
    for (int i = 0; i < N; ++i) shifted[i] = x[i] * log2_e + nearest_integer;
    for (int i = 0; i < N; ++i) n[i] = shifted[i] - nearest_integer;
    for (int i = 0; i < N; ++i) r[i] = x[i] - n[i] * log_2_high;
    for (int i = 0; i < N; ++i) r[i] = r[i] - n[i] * log_2_low;
    for (int i = 0; i < N; ++i) sum[i] = r[i] * (1.f / 5040) + 1.f / 720;
    for (int i = 0; i < N; ++i) sum[i] = sum[i] * r[i] + 1.f / 120;
    for (int i = 0; i < N; ++i) sum[i] = sum[i] * r[i] + 1.f / 24;
    for (int i = 0; i < N; ++i) sum[i] = sum[i] * r[i] + 1.f / 6;
    for (int i = 0; i < N; ++i) sum[i] = sum[i] * r[i] + 0.5f;
    for (int i = 0; i < N; ++i) sum[i] = sum[i] * (r[i] * r[i]) + r[i];
    for (int i = 0; i < N; ++i) sum[i] = (sum[i] + 1.f) * (FloatVector)(((WordVector)shifted[i] << 23) + 0x3f800000u);
    for (int i = 0; i < N; ++i) x[i] = x[i] < -87.3f ? FloatVector{} : sum[i];
}
template <int N>
inline void exp_negative(DoubleVector (&x)[N]) {  // the standard library's: float64 is for judging others
    for (int k = 0; k < N; ++k) {
        DoubleVector e = x[k];
        for (int i = 0; i < lanes_of<double>; ++i) e[i] = ::exp(e[i]);
        x[k] = e;
    }
}

// x / (1 + e^-x) of N vectors, the exponential's argument never positive.
template <int N, class V>
inline void silu(V (&x)[N]) {
    V e[N];
    for (int i = 0; i < N; ++i) e[i] = x[i] < 0 ? x[i] : -x[i];
    exp_negative(e);
    for (int i = 0; i < N; ++i) x[i] = (x[i] < 0 ? x[i] * e[i] : x[i]) / (1 + e[i]);
}

}  // namespace TT_ISA
}  // namespace tt
