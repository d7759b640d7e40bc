// What lies between a model's kernels and is no arithmetic: copies, wider copies, rows of a table.
//
// The two last dimensions of a copy are loops here, whatever lies before them is counted through; a row that is
// contiguous on both sides is one memcpy. A piece of work is worth 64 KB.
#include "rows.h"

#include "numeric.h"
#include "parallel.h"

namespace tt {
namespace TT_ISA {

namespace {

constexpr int64_t piece_bytes = 1 << 16;

template <class From, class To>
void copy_row(const From* from, int64_t from_step, To* to, int64_t to_step, int64_t count) {
    if constexpr (sizeof(From) == sizeof(To)) {
        if (from_step == 1 && to_step == 1) {
            std::memcpy(static_cast<void*>(to), from, size_t(count) * sizeof(To));
            return;
        }
        for (int64_t i = 0; i < count; ++i)
            std::memcpy(static_cast<void*>(to + i * to_step), from + i * from_step, sizeof(To));
    } else if (from_step == 1 && to_step == 1) {
        for (int64_t i = 0; i < count; ++i) to[i] = widen(from[i]);
    } else {
        for (int64_t i = 0; i < count; ++i) to[i * to_step] = widen(from[i * from_step]);
    }
}

template <class From, class To>
void copy(const CopyNumbers& a) {
    const View &source = a.source, &out = a.out;
    const int last = source.ndim - 1;
    const int64_t count = last < 0 ? 1 : source.size[last];
    const int64_t from_step = last < 0 ? 1 : source.stride[last], to_step = last < 0 ? 1 : out.stride[last];
    int64_t rows = 1;
    for (int i = 0; i < last; ++i) rows *= source.size[i];
    if (count == 0) return;
    const int64_t grain = larger<int64_t>(1, piece_bytes / (count * int64_t(sizeof(To))));
    parallel_for(rows, grain, [&](int64_t begin, int64_t end) {
        for (int64_t row = begin; row < end; ++row) {
            int64_t rest = row, from = 0, to = 0;
            for (int i = last - 1; i >= 0; --i) {
                const int64_t at = rest % source.size[i];
                rest /= source.size[i];
                from += at * source.stride[i], to += at * out.stride[i];
            }
            copy_row(source.as<From>() + from, from_step, out.as<To>() + to, to_step, count);
        }
    });
}

}  // namespace

void copy_numbers(const CopyNumbers& a) {
    if (a.source.dtype == DType::bfloat16 && a.out.dtype == DType::float32) return copy<bf16, float>(a);
    if (a.source.dtype == DType::float16 && a.out.dtype == DType::float32) return copy<fp16, float>(a);
    switch (size_of(a.out.dtype)) {
        case 8: return copy<uint64_t, uint64_t>(a);
        case 4: return copy<uint32_t, uint32_t>(a);
        case 2: return copy<uint16_t, uint16_t>(a);
        default: return copy<uint8_t, uint8_t>(a);
    }
}

void gather_rows(const GatherRows& a) {
    const int64_t count = a.ids.size[0], width = a.table.size[1] * size_of(a.table.dtype);
    const int64_t from = a.table.stride[0] * size_of(a.table.dtype);
    const int64_t* ids = a.ids.as<int64_t>();
    *a.stranger = -1;
    const int64_t grain = larger<int64_t>(1, piece_bytes / larger<int64_t>(1, width));
    parallel_for(count, grain, [&](int64_t begin, int64_t end) {
        for (int64_t i = begin; i < end; ++i) {
            const int64_t id = ids[i * a.ids.stride[0]];
            if (id < 0 || id >= a.table.size[0])
                __atomic_store_n(a.stranger, i, __ATOMIC_RELAXED);
            else
                std::memcpy(a.out.as<char>() + i * width, a.table.as<char>() + id * from, size_t(width));
        }
    });
}

}  // namespace TT_ISA
}  // namespace tt
