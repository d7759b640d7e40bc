// What a remasking step is given, the same for the CPU's kernel and the GPU's, which include this inside their
// namespaces, where `int64` and `REMASK_METHOD` (what stands before a method) are declared.
//
// Python fills it: twotower_kernels/ops/remask_fields.py has the same fields, a test compares the two. Every field is 8
// bytes wide. Strides are in elements; dtypes are numbered as in warp.h and view.h.
#pragma once

// A parameter of every row: an array [B], or where that is null a number for all.
template <class T>
struct RemaskPerRow {
    T all;
    const T* rows;
    int64 stride;
    REMASK_METHOD T operator[](int64 b) const { return rows ? rows[b * stride] : all; }
};

// A number of every position, [B, S]; null: not given.
template <class T>
struct RemaskPerPosition {
    const T* data;
    int64 stride_b, stride_s;
    REMASK_METHOD explicit operator bool() const { return data != nullptr; }
    REMASK_METHOD T at(int64 b, int64 s) const { return data[b * stride_b + s * stride_s]; }
};

// Token numbers; the CPU's are sorted.
struct RemaskIds {
    const int64* ids;
    int64 count;
};

struct Remask {
    RemaskOptions options;
    RemaskBounds bounds;
    RemaskPerPosition<void> logits;  // [B, S, V]
    int64 logits_stride_v, logits_dtype;
    int64 shift;                     // 0 or 1: position s is predicted by the logits at s - shift
    const void* shift_logits;        // [B, V], what stands before the first; null: the first position's
    int64 shift_logits_stride_b;     // the other stride is logits_stride_v
    int64 batch, block, vocabulary;  // B, S, V
    RemaskPerPosition<void> tokens;  // int64 or int32
    int64 tokens_dtype;
    int64 mask_token_id;  // -1: there is none
    int64 by_sequence;    // tokens of position s draw as token number offset + s of their text, else by block and step
    RemaskPerRow<int64> step, num_steps, top_k, seed, offset;
    RemaskPerRow<int64> initial_num_masked;  // -1: not known
    RemaskPerRow<double> temperature, top_p, gate_bound;
    RemaskIds suppressed;  // never proposed, no probability
    RemaskIds unscored;    // no probability in the statistics
    RemaskPerRow<int64> valid_lens;
    RemaskPerPosition<bool> editable;
    RemaskPerPosition<int64> candidates;  // -1: draw
    RemaskPerPosition<double> rank_noise;
    // Results, contiguous: [B, S] up to entropy, then [B].
    void* tokens_out;  // of the dtype of tokens
    bool* transfer_mask;
    int64* candidate;
    void *confidence, *entropy;  // float, or double for double logits
    int64* num_masked;
    bool* done;
};
