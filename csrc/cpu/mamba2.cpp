// Mamba-2: convolution, SiLU and selective scan; the gated norm after it (reference/mamba2.py has the formulas).
//
// Tokens go by in chunks of at most 16, and a chunk's closed form is used rather than the recurrence:
//
//     y_t = exp(a_t) C_t.s + sum over u <= t of (C_t.B_u) exp(a_t - a_u) delta_u x_u + D x_t
//
// It costs half the multiplications, because the denoiser, which returns no state, never computes one: it reads each
// state once and writes none. And C.s is a small matrix product with tokens as vector lanes, so that no sum runs across
// lanes. Where the state is needed, exp(a_T) s + sum of exp(a_T - a_u) delta_u x_u B_u is another such product. A
// head's state (32 KB in the released model) stays in the inner caches from one to the other.
//
// Two parallel loops per slab of 16 (row, chunk) pairs, which bounds the scratch memory: over (row, group), what the
// heads of a group share, B, C and C.B; then over (row, head). A token's sums see only the tokens before it, so a NaN
// spoils no earlier token, and a row's result does not depend on the rows beside it.
#include "mamba2.h"

#include "exponential.h"
#include "parallel.h"

namespace tt {
namespace TT_ISA {

namespace {

constexpr int chunk_tokens = 16;
constexpr int slab_pairs = 16;
#if defined(__AVX512F__)
constexpr int tile_rows = 8;  // accumulators of 16 floats that fit in the registers
#else
constexpr int tile_rows = 4;
#endif

template <class W>
inline W value_at(const View& view, int64_t offset) {
    W value = 0;
    load<W>(&value, view, offset, 1);
    return value;
}

template <class W>
inline W silu(W x) {
    return x / (1 + exponential(-x));
}

template <class W>
inline W softplus(W x) {  // the threshold is PyTorch's, and visible in float64
    return x > 20 ? x : std::log1p(std::exp(x));
}

template <class W>
W dot(const W* a, const W* b, int64_t n) {
    W sums[16] = {};  // independent sums: they vectorise, and err less than one
    int64_t i = 0;
    for (; i + 16 <= n; i += 16)
        for (int j = 0; j < 16; ++j) sums[j] += a[i + j] * b[i + j];
    for (; i < n; ++i) sums[0] += a[i] * b[i];
    W total = 0;
    for (W sum : sums) total += sum;
    return total;
}

// sums[q][j] += sum over k < depth of left[q * row + k * step] * right[k * width + j]
template <int Rows, int Lanes, class W>
inline void multiply(W (&sums)[Rows][Lanes], const W* left, int64_t row, int64_t step, const W* right, int64_t width,
                     int64_t depth) {
    for (int64_t k = 0; k < depth; ++k)
        for (int q = 0; q < Rows; ++q) {
            const W factor = left[q * row + k * step];
#pragma omp simd
            for (int j = 0; j < Lanes; ++j) sums[q][j] += factor * right[k * width + j];
        }
}

// out[r][t] = sum over k < n of rows[r][k] * columns[k][t], for `Lanes` tokens t.
template <int Rows, int Lanes, class W>
void project_rows(W* out, const W* rows, int64_t stride, const W* columns, int64_t n) {
    W sums[Rows][Lanes] = {};
    multiply<Rows, Lanes>(sums, rows, stride, 1, columns, Lanes, n);
    for (int q = 0; q < Rows; ++q)
        for (int j = 0; j < Lanes; ++j) out[q * Lanes + j] = sums[q][j];
}

template <int Lanes, class W>
void project_lanes(W* out, const W* rows, int64_t stride, int64_t count, const W* columns, int64_t n) {
    int64_t r = 0;
    for (; r + tile_rows <= count; r += tile_rows)
        project_rows<tile_rows, Lanes>(out + r * Lanes, rows + r * stride, stride, columns, n);
    for (; r < count; ++r) project_rows<1, Lanes>(out + r * Lanes, rows + r * stride, stride, columns, n);
}

inline int lanes_for(int64_t tokens) {
    return tokens == 1 ? 1 : tokens <= 8 ? 8 : chunk_tokens;
}

template <class W>
void project(W* out, const W* rows, int64_t stride, int64_t count, const W* columns, int64_t n, int lanes) {
    if (lanes == 16) return project_lanes<16>(out, rows, stride, count, columns, n);
    if (lanes == 8) return project_lanes<8>(out, rows, stride, count, columns, n);
    for (int64_t r = 0; r < count; ++r) out[r] = dot(rows + r * stride, columns, n);
}

// to[r] = decay * from[r] + sum over t of x[t][r] * b[t], rows of length n; `to` may be `from`.
template <int Rows, class W>
void advance_rows(W* to, const W* from, int64_t stride, W decay, const W* x, int64_t width, const W* b, int64_t n,
                  int64_t tokens) {
    int64_t i = 0;
    for (; i + 16 <= n; i += 16) {
        W sums[Rows][16];
        for (int q = 0; q < Rows; ++q)
            for (int j = 0; j < 16; ++j) sums[q][j] = decay * from[q * stride + i + j];
        multiply<Rows, 16>(sums, x, 1, width, b + i, n, tokens);
        for (int q = 0; q < Rows; ++q)
            for (int j = 0; j < 16; ++j) to[q * n + i + j] = sums[q][j];
    }
    for (; i < n; ++i)
        for (int q = 0; q < Rows; ++q) {
            W sum = decay * from[q * stride + i];
            for (int64_t t = 0; t < tokens; ++t) sum += x[t * width + q] * b[t * n + i];
            to[q * n + i] = sum;
        }
}

template <class W>
void advance(W* to, const W* from, int64_t stride, int64_t rows, W decay, const W* x, const W* b, int64_t n,
             int64_t tokens) {
    int64_t r = 0;
    for (; r + tile_rows <= rows; r += tile_rows)
        advance_rows<tile_rows>(to + r * n, from + r * stride, stride, decay, x + r, rows, b, n, tokens);
    for (; r < rows; ++r) advance_rows<1>(to + r * n, from + r * stride, stride, decay, x + r, rows, b, n, tokens);
}

// Column t < 0 of the convolution's input, before the first token, for a run of channels.
template <class X>
void seed_column(Wide<X>* column, const Mamba2Scan& a, int64_t state_row, int64_t t, int64_t first, int64_t n) {
    using W = Wide<X>;
    if (!a.conv_state) {
        for (int64_t i = 0; i < n; ++i) column[i] = 0;
        return;
    }
    for_float(a.conv_state.dtype, [=, &a](auto type) {
        using T = typename decltype(type)::type;
        const View& s = a.conv_state;
        const T* from = s.as<T>() + state_row * s.stride[0] + first * s.stride[1] + s.size[2] + t;
        for (int64_t i = 0; i < n; ++i) column[i] = rounded<X>(W(widen(from[i * s.stride[1]])));
    });
}

// The convolution of a run of channels, and the scratch it needs.
template <class X>
struct Convolution {
    using W = Wide<X>;
    Convolution(const Mamba2Scan& a, int64_t channels)
        : a(a),
          width(a.conv_weight.size[1]),
          n(channels),
          taps((width + 1) * channels),
          columns((width - 1 + chunk_tokens) * channels) {}
    const Mamba2Scan& a;
    int64_t width, n, first = 0;
    Scratch<W> taps;     // [W, n], then the bias [n]
    Scratch<W> columns;  // [W-1 + tokens, n]

    void channels_from(int64_t channel) {
        first = channel;
        W* to = taps;
        for_float(a.conv_weight.dtype, [&](auto type) {
            using T = typename decltype(type)::type;
            const int64_t stride = a.conv_weight.stride[0];
            const T* from = a.conv_weight.as<T>() + first * stride;
            for (int64_t i = 0; i < n; ++i)
                for (int64_t w = 0; w < width; ++w) to[w * n + i] = W(widen(from[i * stride + w]));
        });
        to += width * n;
        if (a.conv_bias)
            load<W>(to, a.conv_bias, first, n);
        else
            for (int64_t i = 0; i < n; ++i) to[i] = 0;
    }

    // u[t][i] = SiLU(conv) of row b's tokens from `start` on, both rounded to the activations' type.
    void operator()(W* u, int64_t b, int64_t state_row, int64_t start, int64_t tokens) {
        for (int64_t j = 0; j < width - 1 + tokens; ++j) {
            const int64_t t = start - (width - 1) + j;
            W* column = columns + j * n;
            if (t >= 0) {
                const X* from = a.xbc.as<X>() + b * a.xbc.stride[0] + t * a.xbc.stride[1] + first;
                for (int64_t i = 0; i < n; ++i) column[i] = widen(from[i]);
            } else {
                seed_column<X>(column, a, state_row, t, first, n);
            }
        }
        const W* bias = taps + width * n;
        for (int64_t t = 0; t < tokens; ++t) {
            W* out = u + t * n;
            std::memset(out, 0, size_t(n) * sizeof(W));
            for (int64_t w = 0; w < width; ++w) {
                const W *tap = taps + w * n, *column = columns + (t + w) * n;
#pragma omp simd
                for (int64_t i = 0; i < n; ++i) out[i] += tap[i] * column[i];
            }
#pragma omp simd
            for (int64_t i = 0; i < n; ++i) out[i] = rounded<X>(silu(rounded<X>(out[i] + bias[i])));
        }
    }
};

template <class X>
struct Scan {
    using W = Wide<X>;
    explicit Scan(const Mamba2Scan& a)
        : a(a),
          length(a.xbc.size[1]),
          channels(a.xbc.size[2]),
          heads(a.dt.size[2]),
          p(a.head_dim),
          n((channels - heads * p) / (2 * a.groups)),
          block(a.states_every ? smaller(a.states_every, larger(length, int64_t(1))) : larger(length, int64_t(1))),
          blocks(a.states_every ? (length + block - 1) / block : 1),
          block_chunks((block + chunk_tokens - 1) / chunk_tokens) {
        const int64_t last = length - (blocks - 1) * block;  // of an empty block of tokens, one empty chunk
        chunks =
            blocks ? (blocks - 1) * block_chunks + larger((last + chunk_tokens - 1) / chunk_tokens, int64_t(1)) : 0;
    }
    const Mamba2Scan& a;
    int64_t length, channels, heads, p, n;  // p: head_dim; n: the state's size
    int64_t block, blocks, block_chunks, chunks;

    int64_t row_length(int64_t b) const { return a.seq_lens ? index_at(a.seq_lens, b) : length; }
    int64_t state_row(int64_t b) const { return a.state_index ? index_at(a.state_index, b) : b; }
    int64_t start(int64_t chunk) const { return chunk / block_chunks * block + chunk % block_chunks * chunk_tokens; }
    int64_t end(int64_t chunk) const {
        return smaller(smaller(start(chunk) + chunk_tokens, (chunk / block_chunks + 1) * block), length);
    }
    int64_t tokens(int64_t b, int64_t chunk) const {  // of this chunk, in a row that may end before it
        return larger(smaller(end(chunk), row_length(b)) - start(chunk), int64_t(0));
    }
    bool ends_block(int64_t chunk) const { return chunk + 1 == chunks || (chunk + 1) % block_chunks == 0; }
    W* state_out(int64_t b, int64_t chunk, int64_t head) const {
        const View& out = a.ssm_out;
        return out.as<W>() + b * out.stride[0] + chunk / block_chunks * out.stride[1] + head * out.stride[2];
    }

    // What a group's heads share, for one row and chunk.
    int64_t shared_size() const { return 2 * chunk_tokens * n + chunk_tokens * chunk_tokens; }
    // First B [tokens, n]; then
    int64_t c_at() const { return chunk_tokens * n; }           // C [n, lanes]
    int64_t scores_at() const { return 2 * chunk_tokens * n; }  // B_u.C_t [tokens u, lanes t]

    void share(W* shared, int64_t b, int64_t group, int64_t from, int64_t to) const {
        Convolution<X> conv(a, n);
        Scratch<W> c(chunk_tokens * n);
        for (int part = 0; part < 2; ++part) {
            conv.channels_from(heads * p + (part * a.groups + group) * n);
            for (int64_t chunk = from; chunk < to; ++chunk) {
                const int64_t count = tokens(b, chunk);
                if (count == 0) continue;
                W* here = shared + (chunk - from) * a.groups * shared_size();
                const int lanes = lanes_for(count);
                conv(part ? static_cast<W*>(c) : here, b, state_row(b), start(chunk), count);
                if (part == 0) continue;
                W* columns = here + c_at();
                for (int64_t t = 0; t < lanes; ++t)
                    for (int64_t k = 0; k < n; ++k) columns[k * lanes + t] = t < count ? c[t * n + k] : 0;
                project(here + scores_at(), here, n, count, columns, n, lanes);
            }
        }
    }

    // The decays of one head in one chunk.
    struct Decays {
        W from_start[chunk_tokens];            // exp(a_t)
        W within[chunk_tokens][chunk_tokens];  // [t][u], u <= t: exp(a_t - a_u) delta_u
    };
    Decays decays(int64_t b, int64_t head, int64_t first, int64_t count) const {
        W delta[chunk_tokens] = {};
        // In double: an error here scales a seeded state, which may be large.
        double total = 0, since[chunk_tokens] = {};
        const W bias = value_at<W>(a.dt_bias, head);
        const double rate = -std::exp(double(value_at<W>(a.a_log, head)));
        Decays result = {};
        for (int64_t t = 0; t < count; ++t) {
            const W step = value_at<W>(a.dt, b * a.dt.stride[0] + (first + t) * a.dt.stride[1] + head);
            delta[t] = smaller(larger(softplus(step + bias), W(a.dt_min)), W(a.dt_max));
            const double log_decay = delta[t] * rate;
            total += log_decay;
            result.from_start[t] = W(std::exp(total));
            // Sums of their own rather than differences of running sums, which would cancel when steps are large.
            for (int u = 0; u < chunk_tokens; ++u) since[u] = u < t ? since[u] + log_decay : 0;
            for (int u = 0; u < chunk_tokens; ++u) result.within[t][u] = exponential(W(since[u])) * delta[u];
        }
        return result;
    }

    // A seed in the compute type: the tensor itself, or `copy`.
    const W* seed(int64_t b, int64_t head, W* copy, int64_t& stride) const {
        const View& s = a.ssm_state;
        stride = n;
        if (!s) {
            std::memset(copy, 0, size_t(p * n) * sizeof(W));
            return copy;
        }
        const int64_t at = state_row(b) * s.stride[0] + head * s.stride[1];
        if (s.dtype == (sizeof(W) == sizeof(double) ? DType::float64 : DType::float32)) {
            stride = s.stride[2];
            return s.as<W>() + at;
        }
        for (int64_t i = 0; i < p; ++i) load<W>(copy + i * n, s, at + i * s.stride[2], n);
        return copy;
    }

    // Chunks [from, to) of one head of one row. kept: the head's state between slabs, null if there is only one slab.
    void scan_head(const W* shared, W* kept, int64_t b, int64_t head, int64_t from, int64_t to) const {
        Convolution<X> conv(a, p);
        Scratch<W> scratch(chunk_tokens * p * 3 + p), own(kept ? 0 : p * n);
        W *x = scratch, *weighted = x + chunk_tokens * p, *projected = weighted + chunk_tokens * p;
        W* sums = projected + chunk_tokens * p;
        W* state_scratch = kept ? kept : static_cast<W*>(own);
        int64_t stride = n;
        const W* state = kept;
        if (from == 0)
            state = seed(b, head, state_scratch, stride);
        else if (a.ssm_out && ends_block(from - 1))
            state = state_out(b, from - 1, head);
        const W d = value_at<W>(a.d, head);
        conv.channels_from(head * p);
        for (int64_t chunk = from; chunk < to; ++chunk) {
            const int64_t first = start(chunk), count = tokens(b, chunk);
            X* out = a.y.as<X>() + b * a.y.stride[0] + first * a.y.stride[1] + head * p;
            for (int64_t t = count; t < end(chunk) - first; ++t)
                for (int64_t i = 0; i < p; ++i) out[t * a.y.stride[1] + i] = narrow<X>(0);
            W* next = a.ssm_out && ends_block(chunk) ? state_out(b, chunk, head) : state_scratch;
            if (count == 0) {
                if (!a.ssm_out) continue;  // only zeros can follow
                if (next != state)
                    for (int64_t i = 0; i < p; ++i)
                        std::memcpy(next + i * n, state + i * stride, size_t(n) * sizeof(W));
            } else {
                const W* here = shared + (chunk - from) * a.groups * shared_size();
                const W* scores = here + scores_at();
                const int lanes = lanes_for(count);
                conv(x, b, state_row(b), first, count);
                const Decays decay = decays(b, head, first, count);
                project(projected, state, stride, p, here + c_at(), n, lanes);
                for (int64_t t = 0; t < count; ++t) {
                    const W seeded = decay.from_start[t];
                    for (int64_t i = 0; i < p; ++i) sums[i] = seeded * projected[i * lanes + t] + d * x[t * p + i];
                    for (int64_t u = 0; u <= t; ++u) {
                        const W factor = decay.within[t][u] * scores[u * lanes + t];
#pragma omp simd
                        for (int64_t i = 0; i < p; ++i) sums[i] += factor * x[u * p + i];
                    }
                    for (int64_t i = 0; i < p; ++i) out[t * a.y.stride[1] + i] = narrow<X>(sums[i]);
                }
                if (!a.ssm_out && chunk + 1 == chunks) return;
                for (int64_t t = 0; t < count; ++t)
                    for (int64_t i = 0; i < p; ++i) weighted[t * p + i] = decay.within[count - 1][t] * x[t * p + i];
                advance(next, state, stride, p, decay.from_start[count - 1], weighted, here, n, count);
            }
            state = next;
            stride = n;
        }
    }

    void states_of_convolution() const {
        const int64_t past = a.conv_weight.size[1] - 1, run = 512, runs = (channels + run - 1) / run;
        parallel_for(a.xbc.size[0] * blocks * runs, 4, [&](int64_t begin, int64_t end) {
            Scratch<W> column(run);
            for (int64_t i = begin; i < end; ++i) {
                const int64_t b = i / (blocks * runs), number = i / runs % blocks, c = i % runs * run;
                const int64_t count = smaller(run, channels - c);
                const int64_t newest = smaller(smaller((number + 1) * block, length), row_length(b));
                X* out = a.conv_out.as<X>() + b * a.conv_out.stride[0] + number * a.conv_out.stride[1] + c * past;
                for (int64_t w = 0; w < past; ++w) {
                    const int64_t t = newest - past + w;
                    if (t >= 0) {
                        const X* from = a.xbc.as<X>() + b * a.xbc.stride[0] + t * a.xbc.stride[1] + c;
                        for (int64_t k = 0; k < count; ++k) out[k * past + w] = from[k];
                    } else {
                        seed_column<X>(column, a, state_row(b), t, c, count);
                        for (int64_t k = 0; k < count; ++k) out[k * past + w] = narrow<X>(column[k]);
                    }
                }
            }
        });
    }

    void run() const {
        const int64_t batch = a.xbc.size[0], deep = smaller(chunks, int64_t(slab_pairs));
        if (batch == 0 || chunks == 0) return;
        const int64_t wide = smaller(batch, slab_pairs / deep);
        Scratch<W> shared(wide * deep * a.groups * shared_size());
        Scratch<W> kept(chunks > deep ? heads * p * n : 0);  // then a slab is of one row
        const int64_t row_shared = deep * a.groups * shared_size();
        for (int64_t row = 0; row < batch; row += wide) {
            const int64_t rows = smaller(wide, batch - row);
            for (int64_t from = 0; from < chunks; from += deep) {
                const int64_t to = smaller(from + deep, chunks);
                parallel_for(rows * a.groups, 1, [&](int64_t begin, int64_t end) {
                    for (int64_t i = begin; i < end; ++i) {
                        const int64_t r = i / a.groups, group = i % a.groups;
                        share(shared + r * row_shared + group * shared_size(), row + r, group, from, to);
                    }
                });
                parallel_for(rows * heads, 1, [&](int64_t begin, int64_t end) {
                    for (int64_t i = begin; i < end; ++i) {
                        const int64_t r = i / heads, j = i % heads, group = j * a.groups / heads;
                        scan_head(shared + r * row_shared + group * shared_size(),
                                  chunks > deep ? kept + j * p * n : nullptr, row + r, j, from, to);
                    }
                });
            }
        }
        if (a.conv_out) states_of_convolution();
    }
};

template <class Y>
void gated_rows(const GatedRmsNorm& a) {
    using W = Wide<Y>;
    const int64_t length = a.y.size[1], n = a.y.size[2], size = n / a.groups;
    parallel_for(a.y.size[0] * length, 4, [&](int64_t begin, int64_t end) {
        Scratch<W> weight(n), gated(size);
        load<W>(weight, a.weight, 0, n);
        for (int64_t r = begin; r < end; ++r) {
            const int64_t b = r / length, t = r % length;
            const Y* y = a.y.as<Y>() + b * a.y.stride[0] + t * a.y.stride[1];
            Y* out = a.out.as<Y>() + b * a.out.stride[0] + t * a.out.stride[1];
            for (int64_t first = 0; first < n; first += size) {
                W* u = gated;
                load<W>(u, a.z, b * a.z.stride[0] + t * a.z.stride[1] + first, size);
#pragma omp simd
                for (int64_t i = 0; i < size; ++i) u[i] = widen(y[first + i]) * silu(u[i]);
                const W inverse = 1 / std::sqrt(dot(u, u, size) / W(size) + W(a.eps));
                for (int64_t i = 0; i < size; ++i) out[first + i] = narrow<Y>(u[i] * inverse * weight[first + i]);
            }
        }
    });
}

}  // namespace

void mamba2_scan(const Mamba2Scan& a) {
    for_float(a.xbc.dtype, [&](auto type) { Scan<typename decltype(type)::type>(a).run(); });
}

void gated_rms_norm(const GatedRmsNorm& a) {
    for_float(a.y.dtype, [&](auto type) { gated_rows<typename decltype(type)::type>(a); });
}

}  // namespace TT_ISA
}  // namespace tt
