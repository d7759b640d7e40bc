// Quantized weights: the experts' part of moe_experts.cpp, and out = x weight^T + bias for any number of rows of x, in
// panels as the experts take them. A row of the weight is read once per 20 of x.
#include "quantized.h"

#include "linear.h"

namespace tt {
namespace TT_ISA {

namespace {

// Where bfloat16 is multiplied in pairs, what else there is comes from the set below, which has the same vectors.
#if defined(TT_BF16_DOT) && defined(TT_HAS_AVX512BF16)
namespace floats_of = avx512;
#define TT_PAIRS_ALONE
#elif defined(TT_BF16_DOT) && defined(TT_HAS_NEONBF16)
namespace floats_of = baseline;
#define TT_PAIRS_ALONE
#endif

// f(Type<T>, codes) for x's dtype, or `floats` where that is left to another set.
template <class F, class Floats>
void for_storage(DType dtype, PackedWeight::Format format, F f, [[maybe_unused]] Floats floats) {
    const bool four = format == PackedWeight::int4 || format == PackedWeight::e2m1;
    const auto of = [&](auto type) {
        using T = typename decltype(type)::type;
        four ? f(type, CodesFor<4, T>{}) : f(type, CodesFor<8, T>{});
    };
    if (dtype == DType::bfloat16) return of(Type<bf16>{});
#if defined(TT_PAIRS_ALONE)
    floats();
#else
    if (dtype == DType::float32) return of(Type<float>{});
    if (dtype == DType::float16) return of(Type<fp16>{});  // the public functions accept no other
#endif
}

template <class T, class Q>
void product(const QuantizedLinear& a, Q) {
    const int64_t m_size = a.x.size[0], k = a.weight.columns;
    const Stored<Q> weight = {a.weight};
    const int64_t n = weight.rows(), blocks = (n + skinny_rows - 1) / skinny_rows, row = Panel<float, Q>::padded(k);
    Scratch<typename Factors<float, Q>::Kept> data(m_size, row);
    for_panels<float, Q>(data, m_size, k, [&](auto x, int64_t first) {
        for (int64_t m = 0; m < x.count; ++m) x.fill(m, a.x, (first + m) * a.x.stride[0], k);
    });
    parallel_for(blocks, grain(skinny_rows * k * m_size), [&](int64_t begin, int64_t end) {
        float y[skinny_panel * skinny_rows], bias[skinny_rows] = {};
        for (int64_t block = begin; block < end; ++block) {
            const int64_t r = block * skinny_rows;
            const int rows = int(smaller<int64_t>(skinny_rows, n - r));
            if (a.bias) load<float>(bias, a.bias, r, rows);
            const auto next = weight.from(0, block + 1 < end ? r + skinny_rows : r);
            for_panels<float, Q>(data, m_size, k, [&](auto x, int64_t first) {
                multiply_rows(weight.from(0, r), rows, x, k, next, y);
                for (int64_t m = 0; m < x.count; ++m) {
                    T* to = a.out.as<T>() + (first + m) * n + r;
                    for (int i = 0; i < rows; ++i) to[i] = narrow<T>(y[m * skinny_rows + i] + bias[i]);
                }
            });
        }
    });
}

}  // namespace

#if defined(TT_PAIRS_ALONE)
#define TT_FLOATS(call) [&] { floats_of::call; }
#else
#define TT_FLOATS(call) [] {}
#endif

void quantized_linear(const QuantizedLinear& a) {
    for_storage(
        a.x.dtype, a.weight.format, [&](auto type, auto codes) { product<typename decltype(type)::type>(a, codes); },
        TT_FLOATS(quantized_linear(a)));
}

void add_quantized_experts(const QuantizedExperts& set) {
    const PackedWeight& up = set.shared ? set.a.shared_up_packed : set.a.up_packed;
    const PackedWeight& down = set.shared ? set.a.shared_down_packed : set.a.down_packed;
    for_storage(
        set.a.x.dtype, up.format,
        [&](auto type, auto codes) {
            add<typename decltype(type)::type, decltype(codes)>({set.a, {up}, {down}, !set.shared});
        },
        TT_FLOATS(add_quantized_experts(set)));
}

}  // namespace TT_ISA
}  // namespace tt
