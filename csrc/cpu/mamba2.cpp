// Mamba-2: convolution, SiLU and selective scan (reference/mamba2.py has the formulas).
//
// Tokens go by in chunks of at most 16, and a chunk's closed form is used rather than the recurrence:
//
//     y_t = exp(a_t) C_t.s + sum over u <= t of (C_t.B_u) exp(a_t - a_u) delta_u x_u + D x_t
//
// It costs half the multiplications, because the denoiser, which returns no state, never computes one: it reads each
// state once and writes none. And C.s is a small matrix product with tokens as vector lanes (mamba2_chunk.h), so that
// no sum runs across lanes; the second sum is continued in the same registers, and D is on its diagonal. Where the
// state is needed, exp(a_T) s + sum of exp(a_T - a_u) delta_u x_u B_u is another such product. A head's state (32 KB in
// the released model) stays in the inner caches from one to the other.
//
// A row of at most 64 tokens whose last state is returned goes token by token instead (mamba2_recurrence.h): that is
// what the tokens give one by one, to the bit, so a commit of several is the commits of each. The closed form rounds
// otherwise for every split into chunks. A row's own length decides, so neighbours do not.
//
// Two parallel loops per slab of 16 (row, chunk) pairs, which bounds the scratch memory: over (row, chunks, group),
// what the heads of a group share, B, C and C.B; then over (row, head). A token's sums see only the tokens before it,
// so a NaN spoils no earlier token, and a row's result does not depend on the rows beside it.
#include "mamba2.h"

#include "mamba2_chunk.h"
#include "mamba2_recurrence.h"
#include "parallel.h"

namespace tt {
namespace TT_ISA {

namespace {

constexpr int chunk_tokens = 16;
constexpr int slab_pairs = 16;
constexpr int64_t recurrence_tokens = 64;  // of a row, at most

template <class W>
inline int64_t padded(int64_t n) {  // to whole vectors
    return up_to(n, lanes_of<W>);
}

template <class W>
inline W value_at(const View& view, int64_t offset) {
    W value = 0;
    load<W>(&value, view, offset, 1);
    return value;
}

// x[t] = log(1 + e^x[t]) of chunk_tokens numbers, for float's sake: 1e-9 of the result, so that a step is rounded once.
inline void softplus(double* x, float) {
    for (int t = 0; t < chunk_tokens; t += lanes_of<double>) {
        const DoubleVector v = unaligned<DoubleVector>(x + t), zero{};
        const DoubleVector e = exponential(v < 0 ? v : -v);
        // log(1 + e) as a series in s = e / (2 + e) <= 1/3, which loses nothing where e is small.
        const DoubleVector s = e / (2 + e), square = s * s;
        DoubleVector sum = square * (1. / 17) + 1. / 15;
        sum = sum * square + 1. / 13;
        sum = sum * square + 1. / 11;
        sum = sum * square + 1. / 9;
        sum = sum * square + 1. / 7;
        sum = sum * square + 1. / 5;
        sum = sum * square + 1. / 3;
        const DoubleVector result = (v > 0 ? v : zero) + 2 * s * (1 + square * sum);
        std::memcpy(x + t, &result, sizeof(result));
    }
}
[[maybe_unused]] inline void softplus(double* x, double) {  // the threshold is PyTorch's, and visible in float64
    for (int t = 0; t < chunk_tokens; ++t) x[t] = x[t] > 20 ? x[t] : ::log1p(::exp(x[t]));
}

// out[i] = e^x[i]; x in double, since an error in it is one of the result's digits. n is a multiple of chunk_tokens.
inline void exponentials(float* out, const double* x, int64_t n) {
    constexpr int count = chunk_tokens / lanes_of<float>;
    for (int64_t i = 0; i < n; i += chunk_tokens) {
        float high[chunk_tokens], rest[chunk_tokens];
        for (int j = 0; j < chunk_tokens; ++j) {
            const double least = x[i + j] < -1000 ? -1000 : x[i + j], bounded = least > 88 ? 88 : least;
            high[j] = float(bounded);
            rest[j] = float(bounded - double(high[j]));
        }
        FloatVector e[count];
        for (int v = 0; v < count; ++v) e[v] = unaligned<FloatVector>(high + v * lanes_of<float>);
        exp_negative(e);  // right up to 88, too
        for (int v = 0; v < count; ++v) {
            e[v] += e[v] * unaligned<FloatVector>(rest + v * lanes_of<float>);
            std::memcpy(out + i + v * lanes_of<float>, &e[v], sizeof(e[v]));
        }
    }
}
[[maybe_unused]] inline void exponentials(double* out, const double* x, int64_t n) {
    for (int64_t i = 0; i < n; ++i) out[i] = ::exp(x[i]);
}

// high[i] + low[i] = e^x[i] of chunk_tokens numbers, for float's sake to 1e-9; x <= 0.
inline void split_exponentials(float* high, float* low, const double* x) {
    for (int i = 0; i < chunk_tokens; i += lanes_of<double>) {
        const DoubleVector e = exponential(unaligned<DoubleVector>(x + i));
        for (int j = 0; j < lanes_of<double>; ++j) {
            high[i + j] = float(e[j]);
            low[i + j] = float(e[j] - double(high[i + j]));
        }
    }
}
[[maybe_unused]] inline void split_exponentials(double* high, double* low, const double* x) {
    for (int i = 0; i < chunk_tokens; ++i) high[i] = ::exp(x[i]), low[i] = 0;
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

// The convolution of a run of channels, and the scratch it needs. Rows of channels are padded to whole vectors.
template <class X>
struct Convolution {
    using W = Wide<X>;
    using V = Vector<W>;
    Convolution(const Mamba2Scan& a, int64_t channels)
        : a(a),
          width(a.conv_weight.size[1]),
          n(channels),
          stride(padded<W>(channels)),
          taps(width + 1, stride),
          columns(width - 1 + chunk_tokens, stride) {}
    const Mamba2Scan& a;
    int64_t width, n, stride, first = 0;
    Scratch<W> taps;     // [W, n], then the bias [n]
    Scratch<W> columns;  // [W-1 + tokens, n]

    void channels_from(int64_t channel) {
        first = channel;
        W* to = taps;
        std::memset(to, 0, size_t((width + 1) * stride) * sizeof(W));
        for_float(a.conv_weight.dtype, [&](auto type) {
            using T = typename decltype(type)::type;
            const T* from = a.conv_weight.as<T>() + first * a.conv_weight.stride[0];
            for (int64_t i = 0; i < n; ++i, from += a.conv_weight.stride[0])
                for (int64_t w = 0; w < width; ++w) to[w * stride + i] = W(widen(from[w]));
        });
        if (a.conv_bias) load<W>(to + width * stride, a.conv_bias, first, n);
    }

    // u[t][i] = SiLU(conv) of row b's tokens from `start` on, both rounded to the activations' type. Returns whether
    // all of them are finite.
    bool operator()(W* u, int64_t b, int64_t state_row, int64_t start, int64_t tokens) {
        for (int64_t j = 0; j < width - 1 + tokens; ++j) {
            const int64_t t = start - (width - 1) + j;
            W* column = columns + j * stride;
            if (t >= 0) {
                const X* from = a.xbc.as<X>() + b * a.xbc.stride[0] + t * a.xbc.stride[1] + first;
                for_vectors<W>(
                    n, [=](int64_t i, auto size) { Rounding<W>::store(column + i, load_some<W>(from + i, size)); });
            } else {
                for (int64_t i = n; i < stride; ++i) column[i] = 0;
                seed_column<X>(column, a, state_row, t, first, n);
            }
        }
        return width == 4 ? convolve<4>(u, tokens) : convolve<0>(u, tokens);
    }

   private:
    template <int Taps>  // 0: as many as there are
    bool convolve(W* u, int64_t tokens) {
        V spoiled{};
        for (int64_t i = 0; i < stride; i += lanes_of<W>) {
            int64_t t = 0;
            for (; t + 4 <= tokens; t += 4) spoiled += convolve_tokens<Taps, 4>(u, i, t);
            for (; t < tokens; ++t) spoiled += convolve_tokens<Taps, 1>(u, i, t);
        }
        return sum_of(spoiled) == 0;
    }
    // A vector of channels and some tokens; 0, or NaN where a result is not finite.
    template <int Taps, int Tokens>
    V convolve_tokens(W* u, int64_t i, int64_t t) {
        const int64_t count = Taps ? Taps : width;
        const W *tap = taps + i, *column = columns + t * stride + i;
        V sums[Tokens], spoiled{};
        for (V& sum : sums) sum = unaligned<V>(tap + count * stride);
        for (int64_t w = 0; w < count; ++w)
            for (int j = 0; j < Tokens; ++j)
                sums[j] += unaligned<V>(tap + w * stride) * unaligned<V>(column + (w + j) * stride);
        for (V& sum : sums) sum = Rounding<X>::rounded(sum);
        silu(sums);
        for (int j = 0; j < Tokens; ++j) {
            const V out = Rounding<X>::rounded(sums[j]);
            Rounding<W>::store(u + (t + j) * stride + i, out);
            spoiled += out - out;
        }
        return spoiled;
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
    bool token_by_token(int64_t b) const { return a.ssm_out && !a.states_every && row_length(b) <= recurrence_tokens; }
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

    // What a group's heads share, for one row and chunk: first B [tokens, n]; then
    int64_t padded_n() const { return padded<W>(n); }
    int64_t c_at() const { return chunk_tokens * padded_n(); }           // C [n, lanes]; token by token [tokens, n]
    int64_t scores_at() const { return 2 * chunk_tokens * padded_n(); }  // B_u.C_t [tokens u, lanes t]
    int64_t shared_size() const { return scores_at() + chunk_tokens * chunk_tokens; }

    void share(W* shared, int64_t b, int64_t group, int64_t from, int64_t to) const {
        Convolution<X> conv(a, n);
        Scratch<W> c(chunk_tokens, padded_n());
        W one[chunk_tokens];
        for (W& w : one) w = 1;
        for (int part = 0; part < 2; ++part) {
            conv.channels_from(heads * p + (part * a.groups + group) * n);
            for (int64_t chunk = from; chunk < to; ++chunk, shared += a.groups * shared_size()) {
                const int64_t count = tokens(b, chunk), lanes = token_lanes<W>(count);
                if (count == 0) continue;
                const bool recurrence = token_by_token(b);
                W* to_convolve = part == 0 ? shared : recurrence ? shared + c_at() : static_cast<W*>(c);
                conv(to_convolve, b, state_row(b), start(chunk), count);
                if (part == 0 || recurrence) continue;
                std::memset(c + count * padded_n(), 0, size_t((lanes - count) * padded_n()) * sizeof(W));
                transpose<W>(shared + c_at(), lanes, c, padded_n(), lanes, padded_n());
                read_state<W>(shared + scores_at(), shared, padded_n(), count, {shared + c_at(), one, n},
                              {nullptr, 0, 0, nullptr, true}, lanes);
            }
            shared -= (to - from) * a.groups * shared_size();
        }
    }

    // The steps of one head's tokens, and the logarithms of what they leave of the state.
    void steps(W* delta, double* log_decay, int64_t b, int64_t head, double rate, int64_t first, int64_t count) const {
        double step[chunk_tokens] = {};
        const double bias = value_at<W>(a.dt_bias, head);
        for_float(a.dt.dtype, [&](auto type) {
            using T = typename decltype(type)::type;
            const T* from = a.dt.as<T>() + b * a.dt.stride[0] + first * a.dt.stride[1] + head;
            for (int64_t t = 0; t < count; ++t) step[t] = double(widen(from[t * a.dt.stride[1]])) + bias;
        });
        softplus(step, W());
        for (int64_t t = 0; t < count; ++t) {
            const double bounded = smaller(larger(step[t], a.dt_min), a.dt_max);
            delta[t] = W(bounded);
            log_decay[t] = bounded * rate;
        }
    }

    // How the tokens of one head and chunk decay.
    struct Decays {
        W from_start[chunk_tokens];             // exp(a_t)
        W mixing[chunk_tokens * chunk_tokens];  // [tokens u, lanes t]: how much of x_u is in y_t
        W to_end[chunk_tokens];  // exp(a_T - a_u) delta_u: how much of x_u B_u is in the state after the chunk
    };
    void decay(Decays& result, const W* scores, int64_t lanes, int64_t b, int64_t head, double rate, int64_t first,
               int64_t count) const {
        W delta[chunk_tokens], left[(chunk_tokens + 1) * chunk_tokens];
        const W d = value_at<W>(a.d, head);
        double log_decay[chunk_tokens + 1] = {}, since[(chunk_tokens + 1) * chunk_tokens];
        steps(delta, log_decay, b, head, rate, first, count);
        // since[u + 1][t]: sums of their own rather than differences of running sums, which would cancel when steps are
        // large; in double, since an error here scales a seeded state, which may be large.
        double* row = since + count * chunk_tokens;
        for (int t = 0; t < chunk_tokens; ++t) row[t] = 0;
        for (int64_t u = count - 2; u >= -1; --u, row -= chunk_tokens)
            for (int t = 0; t < chunk_tokens; ++t) row[t - chunk_tokens] = t > u ? row[t] + log_decay[u + 1] : 0;
        exponentials(left, since, (count + 1) * chunk_tokens);
        for (int t = 0; t < chunk_tokens; ++t) result.from_start[t] = left[t];
        for (int64_t u = 0; u < count; ++u) {
            const W* from_u = left + (u + 1) * chunk_tokens;
            W* mixing = result.mixing + u * lanes;
            for (int64_t t = 0; t < lanes; ++t) mixing[t] = t < u ? 0 : scores[u * lanes + t] * (from_u[t] * delta[u]);
            mixing[u] += d;
            result.to_end[u] = from_u[count - 1] * delta[u];
        }
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

    // Tokens [count, p] of y, rounded.
    void write_rows(X* out, const W* y, int64_t stride, int64_t count) const {
        for (int64_t t = 0; t < count; ++t, out += a.y.stride[1], y += stride)
            for_vectors<W>(p, [=](int64_t i, auto size) { store_some<X>(out + i, unaligned<Vector<W>>(y + i), size); });
    }

    // Chunks [from, to) of one head of one row. carried_state: the head's state between slabs, null if there is only
    // one slab.
    void scan_head(const W* shared, W* carried_state, int64_t b, int64_t head, int64_t from, int64_t to) const {
        Convolution<X> conv(a, p);
        const int64_t padded_p = conv.stride;
        Scratch<W> scratch(chunk_tokens * 3, padded_p), own(carried_state ? 0 : p, n);
        W *x = scratch, *y = x + chunk_tokens * padded_p, *columns = y + chunk_tokens * padded_p, *weighted;
        W* state_scratch = carried_state ? carried_state : static_cast<W*>(own);
        int64_t stride = n;
        const W* state = carried_state;
        if (from == 0)
            state = seed(b, head, state_scratch, stride);
        else if (a.ssm_out && ends_block(from - 1))
            state = state_out(b, from - 1, head);
        const double rate = -::exp(double(value_at<W>(a.a_log, head)));
        conv.channels_from(head * p);
        Decays decays;
        for (int64_t chunk = from; chunk < to; ++chunk, shared += a.groups * shared_size()) {
            const int64_t first = start(chunk), count = tokens(b, chunk), lanes = token_lanes<W>(count);
            X* out = a.y.as<X>() + b * a.y.stride[0] + first * a.y.stride[1] + head * p;
            for (int64_t t = count; t < end(chunk) - first; ++t)
                std::memset(static_cast<void*>(out + t * a.y.stride[1]), 0, size_t(p) * sizeof(X));
            W* next = a.ssm_out && ends_block(chunk) ? state_out(b, chunk, head) : state_scratch;
            if (count == 0) {
                if (!a.ssm_out) continue;  // only zeros can follow
                if (next != state)
                    for (int64_t i = 0; i < p; ++i)
                        std::memcpy(next + i * n, state + i * stride, size_t(n) * sizeof(W));
            } else if (const bool finite = conv(x, b, state_row(b), first, count); token_by_token(b)) {
                W delta[chunk_tokens], left[chunk_tokens], rest[chunk_tokens];
                double log_decay[chunk_tokens] = {};
                steps(delta, log_decay, b, head, rate, first, count);
                split_exponentials(left, rest, log_decay);
                weighted = columns;
                for (int64_t t = 0; t < count; ++t)
                    for (int64_t i = 0; i < padded_p; ++i) weighted[t * padded_p + i] = delta[t] * x[t * padded_p + i];
                recur<W>(next, state, stride, p, n,
                         {left, rest, weighted, shared, shared + c_at(), padded_p, padded_n(), count}, y);
                const W d = value_at<W>(a.d, head);
                for (int64_t t = 0; t < count; ++t)
                    for (int64_t i = 0; i < p; ++i) y[t * padded_p + i] += d * x[t * padded_p + i];
                write_rows(out, y, padded_p, count);
            } else {
                weighted = y;
                decay(decays, shared + scores_at(), lanes, b, head, rate, first, count);
                read_state<W>(columns, state, stride, p, {shared + c_at(), decays.from_start, n},
                              {x, padded_p, count, decays.mixing, finite}, lanes);
                transpose(y, padded_p, columns, lanes, padded_p, lanes);
                write_rows(out, y, padded_p, count);
                if (!a.ssm_out && chunk + 1 == chunks) return;
                for (int64_t t = 0; t < count; ++t)
                    for (int64_t i = 0; i < padded_p; ++i)
                        weighted[t * padded_p + i] = decays.to_end[t] * x[t * padded_p + i];
                advance_state<W>(next, state, stride, p, n, decays.from_start[count - 1], weighted, padded_p, shared,
                                 padded_n(), count);
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
        const int64_t batch = a.xbc.size[0], slab_chunks = smaller(chunks, int64_t(slab_pairs));
        if (batch == 0 || chunks == 0 || (length == 0 && !a.ssm_out)) return;  // then there are no results
        const int64_t slab_rows = smaller(batch, slab_pairs / slab_chunks);
        Scratch<W> shared(slab_rows * slab_chunks, a.groups, shared_size());
        Scratch<W> carried_states(chunks > slab_chunks ? heads : 0, p, n);  // then a slab is of one row
        const int64_t row_shared = slab_chunks * a.groups * shared_size();
        for (int64_t row = 0; row < batch; row += slab_rows) {
            const int64_t batch_rows = smaller(slab_rows, batch - row);
            for (int64_t from = 0; from < chunks; from += slab_chunks) {
                const int64_t to = smaller(from + slab_chunks, chunks);
                const int64_t runs = (to - from + 3) / 4;  // of 4 chunks: few groups must keep all threads busy
                parallel_for(batch_rows * runs * a.groups, 1, [&](int64_t begin, int64_t end) {
                    for (int64_t i = begin; i < end; ++i) {
                        const int64_t group = i % a.groups, chunk = i / a.groups % runs * 4, r = i / a.groups / runs;
                        W* here = shared + r * row_shared + (chunk * a.groups + group) * shared_size();
                        share(here, row + r, group, from + chunk, smaller(from + chunk + 4, to));
                    }
                });
                parallel_for(batch_rows * heads, 1, [&](int64_t begin, int64_t end) {
                    for (int64_t i = begin; i < end; ++i) {
                        const int64_t r = i / heads, j = i % heads, group = j * a.groups / heads;
                        scan_head(shared + r * row_shared + group * shared_size(),
                                  chunks > slab_chunks ? carried_states + j * p * n : nullptr, row + r, j, from, to);
                    }
                });
            }
        }
        if (a.conv_out) states_of_convolution();
    }
};

}  // namespace

void mamba2_scan(const Mamba2Scan& a) {
    for_fast(
        a.xbc.dtype, [&](auto type) { Scan<typename decltype(type)::type>(a).run(); },
        [&] { baseline::mamba2_scan(a); });
}

}  // namespace TT_ISA
}  // namespace tt
