#pragma once

#include "isa.h"
#include "view.h"

namespace tt {

// Attention of a block over a context and over itself; either may be missing (null views).
struct BlockAttention {
    View q;                     // [B, S, Hq, D]
    View k, v;                  // [B, S, Hkv, D], [B, S, Hkv, Dv]
    View k_context, v_context;  // [Bc, T, Hkv, D], [Bc, T, Hkv, Dv]; with a block table, pages [P, page, Hkv, ...]
    View context_lens;          // [B], or null: all of the storage
    View context_starts;        // [B], or null: 0; what lies before is not seen
    View context_index;         // [B], or null: row b reads context row b
    View block_table;           // [Bc, n], or null
    View block_lens;            // [B], or null: S
    View sinks;                 // [Hq] of lse's dtype, or null
    View out;                   // [B, S, Hq, Dv] out
    View lse;                   // [B, S, Hq] out, float (double for double)
    double scale, softcap;      // softcap 0: none
    int64_t window;             // -1: none; of the context, or without k and v under a mask of every query's last keys
    int64_t causal;             // tokens that see each other and none behind them: 1, or of a block; 0: no such mask
};
TT_KERNEL_BF16(block_attention, BlockAttention)

// Attention over two disjoint sets of keys, from the attention over each.
struct MergeAttention {
    View out_a, lse_a, out_b, lse_b;  // [N, D], [N]
    View out, lse;                    // [N, D], [N] out
};
TT_KERNEL_BF16(merge_attention, MergeAttention)

// k, v [B, S, Hkv, ...] go behind the first context_lens[b] tokens of each row's context; views as in BlockAttention.
struct AppendKv {
    View k_context, v_context;
    View k, v;
    View context_lens, context_index, block_table, block_lens;
};
TT_KERNEL_BF16(append_kv, AppendKv)

}  // namespace tt
