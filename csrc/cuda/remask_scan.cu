// Stage A of a remasking step: what one piece of one position's logits says.
//
// A block takes a piece of 32 tokens a thread, at most 8192, in registers: 16-byte loads that are all under way at
// once, then everything that is wanted of the logits without reading them again. Pieces have a fixed size, whatever the
// batch and the GPU, so results depend on neither; 16 positions of 131072 tokens are 256 blocks, two for each
// processor.
//
// The largest logit of the piece is known before the sums, so terms lie between 0 and 1, nothing is scaled afterwards,
// and a certain token has exactly the probability 1.
//
// Noise costs two accurate logarithms a token, which only tokens that may win deserve. Of every token a bound of its
// noise is computed from the word's exponent, a few instructions; every thread takes the token with the largest bound
// and computes its noise; the second largest of these in the block is no more than the piece's second best. Tokens
// whose bound lies below it cannot be among the two best; of the others, a handful in a block, noise is computed. The
// margin is wider than all rounding, so the two best are those of the definition.
//
// The posterior asks for two sums more, of all that may be proposed and of what the filter keeps; only builds for it
// have them, so that others keep their registers.
//
// Compiled for LOGIT_TYPE (warp.h), SAMPLED 0 or 1, POSTERIOR 0 or 1.
#include "remask.h"
#include "remask_logit.h"

constexpr int per_thread = 32, width = 16 / int(sizeof(Logit)), vectors = per_thread / width, most_warps = 8;
// Vectors that are asked for before it is known whether the position is looked at: as much as memory delivers until
// that is known. With a quarter of them the rest follows without a gap; a position that is not looked at costs that
// quarter.
constexpr int early = vectors / 4;

struct Shared {
    unsigned most[most_warps], scored_most[most_warps];
    Two<unsigned> reached[most_warps];  // by the tokens that were tried
    float mass[most_warps], drop[most_warps];
    int tops[most_warps];
    unsigned best_token[most_warps];
    Two<unsigned> scored[most_warps];
    Two<uint64> drawn[most_warps];
    float all[most_warps], survivors[most_warps];
    int bests[most_warps];
    // and behind it the bits of the piece's suppressed and unscored tokens
};
static_assert(sizeof(Shared) == 544 && sizeof(Partial) == 64, "as in twotower_kernels/cuda/remask.py");

// Token i of this thread, counted from the piece's first: width neighbours, then as many a block further.
__device__ inline int token_of(int i) {
    return (i / width * int(blockDim.x) + int(threadIdx.x)) * width + i % width;
}

// Whether a piece is read in vectors: all of it is there, side by side and aligned.
__device__ inline bool in_vectors(const Remask& a, const Logit* piece, int64 begin) {
    return a.logits_stride_v == 1 && a.vocabulary - begin >= int64(per_thread) * blockDim.x && uint64(piece) % 16 == 0;
}
__device__ inline uint4 vector_at(const Logit* piece, int j) {
    return reinterpret_cast<const uint4*>(piece)[j * blockDim.x + threadIdx.x];
}

// The tokens of this thread, of which the first vectors are there already if there are any.
__device__ inline void load(float* x, const Remask& a, const Logit* piece, int64 begin, bool vectors_there,
                            const uint4* first) {
    if (vectors_there) {
        uint4 all[vectors];
#pragma unroll
        for (int j = 0; j < vectors; ++j) all[j] = j < early ? first[j] : vector_at(piece, j);
#pragma unroll
        for (int j = 0; j < vectors; ++j) unpack(all[j], x + j * width);
        return;
    }
    const int64 size = a.vocabulary - begin, next = int64(blockDim.x) * width * a.logits_stride_v;
    const Logit* from = piece + token_of(0) * a.logits_stride_v;
#pragma unroll
    for (int i = 0; i < per_thread; i += width, from += next)
#pragma unroll
        for (int j = 0; j < width; ++j)
            x[i + j] = token_of(i + j) < size ? widen(from[j * a.logits_stride_v]) : -infinity();
}

// Bit i: token i of this thread is among the marked ones.
__device__ inline unsigned marked(const unsigned* bits) {
    unsigned mine = 0;
#pragma unroll
    for (int i = 0; i < per_thread; i += width) {
        const int at = token_of(i);
        mine |= (bits[at / 32] >> (at % 32) & ((1u << width) - 1)) << i;
    }
    return mine;
}

// e^(u / t) as a power of 2. Its exponent is a product with log2(e) / t in two floats, and what is lost when it is
// rounded comes back to first order: far below the largest logit, where exponents are large, that is a digit or more.
struct Exponential {
    float high, low, floor;
    __device__ explicit Exponential(float t) {
        constexpr float log2e = 1.44269502f, rest = 1.92596299e-8f;
        high = log2e / t;
        low = (fmaf(-high, t, log2e) + rest) / t;
        floor = -160 / high;  // as good as -infinity
    }
    // Adds e^(u / t) and the negative of its product with the exponent, for u < 0; nothing for u = 0.
    __device__ void add(float u, float& mass, float& drop) const {
        u = fmaxf(u, floor);
        const float power = u * high, lost = fmaf(u, low, fmaf(u, high, -power));
        float e = EXP2(power);
        e = u == 0 ? 0 : fmaf(e, 0.6931471806f * lost, e);
        mass += e;
        drop = fmaf(-power, e, drop);
    }
};

// x = -infinity where the bit is not set.
__device__ inline void keep_only(float* x, unsigned bits) {
    if (bits == ~0u) return;
#pragma unroll
    for (int i = 0; i < per_thread; ++i) x[i] = bits >> i & 1 ? x[i] : -infinity();
}

#if SAMPLED
// Leaves the two best tokens of each warp with noise in `shared`. Overwrites x.
__device__ inline void draw(float* x, const Remask& a, const Row& row, int64 b, int64 s, const Logit* logits,
                            int64 begin, Shared& shared) {
    const Stream stream = token_stream(a, row, b, s);
    const float t = temperature_of(row), per = 1 / t;
    const auto noisy = [&](int i) {
        const int64 token = begin + token_of(i);
        return widen(logits[token * a.logits_stride_v]) / t + gumbel(philox_word(stream, unsigned(token)));
    };
    float most = -infinity();
    int at = 0;
#pragma unroll
    for (int i = 0; i < per_thread; i += 4) {
        const uint4 four = philox(stream, unsigned((begin + token_of(i)) / 4));
        const unsigned words[4] = {four.x, four.y, four.z, four.w};
#pragma unroll
        for (int j = i; j < i + 4; ++j) {
            x[j] = x[j] * per + most_gumbel(words[j - i]);
            if (x[j] > most) most = x[j], at = j;
        }
    }
    Two<unsigned> reached;
    if (most > -infinity()) reached.first = ordered(noisy(at));
    reached = warp_two(reached);
    if (lane_id() == 0) shared.reached[warp_id()] = reached;
    __syncthreads();
    const bool has = lane_id() < int(blockDim.x) / lanes;
    const Two<unsigned> all = warp_two(has ? shared.reached[lane_id()] : Two<unsigned>());
    const float best = all.second ? number(all.first) : -infinity(),
                second = all.second ? number(all.second) : -infinity();
    const float bound = second - (1e-3f + 1e-5f * (fabsf(best) + fabsf(second)));
    unsigned may_win = 0;
#pragma unroll
    for (int i = 0; i < per_thread; ++i) may_win |= unsigned(x[i] != -infinity() && !(x[i] < bound)) << i;
    Two<uint64> drawn;
#pragma unroll 1
    for (; may_win; may_win &= may_win - 1) {
        const int i = __ffs(int(may_win)) - 1;
        const float value = noisy(i);
        if (value > -infinity()) drawn.offer(drawn_key(value, unsigned(begin + token_of(i))));
    }
    drawn = warp_two(drawn);
    if (lane_id() == 0) shared.drawn[warp_id()] = drawn;
}
#endif

extern "C" __global__ void __launch_bounds__(256, SAMPLED ? 2 : 3)
    remask_scan_kernel(const __grid_constant__ Remask a, const Filter* filters, Partial* partials, int64 pieces) {
    SHARED_MEMORY(memory);
    Shared& shared = *reinterpret_cast<Shared*>(memory);
    const unsigned position = blockIdx.x / unsigned(pieces);
    const int64 b = position / unsigned(a.block), s = position % unsigned(a.block);
    const int64 begin = int64(blockIdx.x % unsigned(pieces)) * per_thread * blockDim.x;
    const Logit* z = position_logits(a, b, s);
    const Logit* piece = z + begin * a.logits_stride_v;
    const bool is_in_vectors = in_vectors(a, piece, begin);
    uint4 first[early];
    if (is_in_vectors) {
#pragma unroll
        for (int j = 0; j < early; ++j) first[j] = vector_at(piece, j);
    }
    let_next_start();
    if (!looked(a, b, s)) return;
    const int lane = lane_id(), warps = int(blockDim.x) / lanes, words = int(blockDim.x);
    Partial& out = partials[blockIdx.x];

    float x[per_thread];
    load(x, a, piece, begin, is_in_vectors, first);
    const Row row = row_of(a, b);
    const bool tempered = a.options.statistics == RemaskChoice::filtered;

    // Which tokens are left out, of all or of the statistics.
    unsigned excluded = 0, scored = ~0u;
    if (a.options.suppress_mask && a.mask_token_id >= begin &&
        a.mask_token_id < begin + int64(per_thread) * blockDim.x) {
        const int at = int(a.mask_token_id - begin), vector = at / width;
        if (vector % int(blockDim.x) == int(threadIdx.x))
            excluded |= 1u << (vector / int(blockDim.x) * width + at % width);
    }
    if (a.suppressed.count > 0) {
        unsigned* bits = reinterpret_cast<unsigned*>(&shared + 1);
        mark(bits, words, begin, a.suppressed);
        excluded |= marked(bits);
    }
    if (a.unscored.count > 0) {
        unsigned* bits = reinterpret_cast<unsigned*>(&shared + 1) + words;
        mark(bits, words, begin, a.unscored);
        scored = ~marked(bits);
    }
    keep_only(x, ~excluded);
    unsigned survivors = ~0u;
    if (row.filtered) {
        const float least = filters[position].least;
        survivors = 0;
#pragma unroll
        for (int i = 0; i < per_thread; ++i) survivors |= unsigned(x[i] >= least) << i;
        if (tempered) scored &= survivors;
    }

    // The largest, of all and of what the statistics see. NaN and +infinity have the two largest keys.
    float most = -infinity();
#pragma unroll
    for (int i = 0; i < per_thread; ++i) most = LARGER(x[i], most);
    float scored_most = most;
    if (scored != ~0u) {
        scored_most = -infinity();
#pragma unroll
        for (int i = 0; i < per_thread; ++i) scored_most = fmaxf(scored_most, scored >> i & 1 ? x[i] : -infinity());
    }
    const unsigned warp_most = warp_max(ordered(most)), warp_scored = warp_max(ordered(scored_most));
    if (lane == 0) shared.most[warp_id()] = warp_most, shared.scored_most[warp_id()] = warp_scored;
    __syncthreads();
    const bool has = lane < warps;  // lane i of every warp merges what warp i found
    const unsigned best_key = warp_max(has ? shared.most[lane] : 0);
    const float best = number(best_key), top = number(warp_max(has ? shared.scored_most[lane] : 0));
    if (best_key >= ordered(infinity())) {
        if (threadIdx.x == 0) out.wrong = 1;
        return;
    }
    unsigned token = ~0u;
    if (most == best) {
#pragma unroll
        for (int i = per_thread - 1; i >= 0; --i) token = x[i] == best ? unsigned(begin + token_of(i)) : token;
    }
    token = __reduce_min_sync(whole_warp, token);

#if POSTERIOR
    // Below the largest as well, which is that of what the filter keeps, unless it keeps no token of the piece.
    float all[4] = {}, survivor_sums[4] = {};
    int bests = 0;
    if (best > -infinity()) {
        const Exponential untempered(1.0f), draws(temperature_of(row));
        float unused = 0;
#pragma unroll
        for (int i = 0; i < per_thread; ++i) {
            untempered.add(x[i] - best, all[i % 4], unused);
            draws.add(survivors >> i & 1 ? x[i] - best : -infinity(), survivor_sums[i % 4], unused);
            bests += x[i] == best;
        }
    }
    bests = warp_sum(bests);
    const float warp_all = warp_sum((all[0] + all[1]) + (all[2] + all[3]));
    const float warp_survivors =
        warp_sum((survivor_sums[0] + survivor_sums[1]) + (survivor_sums[2] + survivor_sums[3]));
    if (lane == 0)
        shared.all[warp_id()] = warp_all, shared.survivors[warp_id()] = warp_survivors, shared.bests[warp_id()] = bests;
#endif

    // The sums over tokens below the largest; those that are as large are counted, so that what little there may be
    // beside them is not rounded away.
    if (!SAMPLED) keep_only(x, scored);  // else the draw needs the others still
    const auto seen = [&](int i) { return !SAMPLED || scored >> i & 1 ? x[i] : -infinity(); };
    float mass[4] = {}, drop[4] = {};
    int tops = 0;
    if (top > -infinity()) {
        const Exponential exponential(own_temperature(a, row));
#pragma unroll
        for (int i = 0; i < per_thread; ++i) exponential.add(seen(i) - top, mass[i % 4], drop[i % 4]);
        if (scored_most == top) {
#pragma unroll
            for (int i = 0; i < per_thread; ++i) tops += seen(i) == top;
        }
    }
    tops = warp_sum(tops);
    const float warp_mass = warp_sum((mass[0] + mass[1]) + (mass[2] + mass[3]));
    const float warp_drop = warp_sum((drop[0] + drop[1]) + (drop[2] + drop[3]));
    Two<unsigned> two_scored;
    if (a.options.score == RemaskChoice::margin) {
        float second = -infinity(), first = -infinity();
#pragma unroll
        for (int i = 0; i < per_thread; ++i) {
            second = fmaxf(second, fminf(first, seen(i)));
            first = fmaxf(first, seen(i));
        }
        two_scored = warp_two(Two<unsigned>{ordered(first), ordered(second)});
    }
    if (lane == 0) {
        shared.mass[warp_id()] = warp_mass;
        shared.drop[warp_id()] = warp_drop;
        shared.tops[warp_id()] = tops;
        shared.best_token[warp_id()] = token;
        shared.scored[warp_id()] = two_scored;
    }
#if SAMPLED
    if (row.sampled) {
        keep_only(x, survivors);
        draw(x, a, row, b, s, z, begin, shared);
    }
#endif
    __syncthreads();
    if (warp_id() > 0) return;

    const float all_mass = warp_sum(has ? shared.mass[lane] : 0.0f),
                all_drop = warp_sum(has ? shared.drop[lane] : 0.0f);
    tops = warp_sum(has ? shared.tops[lane] : 0);
    const unsigned best_token = __reduce_min_sync(whole_warp, has ? shared.best_token[lane] : ~0u);
    two_scored = warp_two(has ? shared.scored[lane] : Two<unsigned>());
#if SAMPLED
    const Two<uint64> drawn = warp_two(has && row.sampled ? shared.drawn[lane] : Two<uint64>());
    if (lane == 0) out.drawn[0] = drawn.first, out.drawn[1] = drawn.second;
#endif
#if POSTERIOR
    const float all_all = warp_sum(has ? shared.all[lane] : 0.0f),
                all_survivors = warp_sum(has ? shared.survivors[lane] : 0.0f);
    bests = warp_sum(has ? shared.bests[lane] : 0);
    if (lane == 0) out.all = all_all, out.survivors = all_survivors, out.bests = unsigned(bests);
#endif
    if (lane == 0) {
        out.top = top;
        out.tops = unsigned(tops);
        out.mass = all_mass;
        out.drop = all_drop * 0.6931471806f;  // its exponents were of base 2
        out.best = best;
        out.best_token = best_token;
        out.second = two_scored.second ? number(two_scored.second) : -infinity();
        out.wrong = 0;
    }
}
