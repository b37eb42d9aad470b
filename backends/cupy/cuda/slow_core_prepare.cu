// What slow_core needs of every chunk before a walk (SPEC.md 4 and 10): the lines e^(G_C - G), scale gate e^G, and e^G_C or d; for a backward also
// D = (gate P)^T dO with P = scale tril(q k^T) * Gamma, the part of dU' that needs no state, where dU' will be.
// A token and v head costs nothing, or C (K + V) FLOP, and moves K + V numbers twice: bound by memory (H100, bf16,
// 1 x 8192, 16/32 heads of 128: 200 MB, 65 us).
// A block has a chunk and v head, a warp 16 of its tokens.
//
// DTYPE; KEYS, VALUES: head_dims; SIDE: tokens of a chunk at most; KEY_SLICE, VALUE_SLICE: columns at once; DECAYED: g; FACTORED: chunk_decay;
// ALIGNED: 16-byte copies can take all rows.
#include "slow_chunks.cuh"

constexpr int KEY_BYTES = SIDE * KEY_SLICE * SIZE, VALUE_BYTES = SIDE * VALUE_SLICE * SIZE;
static_assert(VALUE_BYTES <= 2 * KEY_BYTES, "dO takes the place of q and k");

struct Params {
    const DTYPE *q, *k, *d_o;
    const void *g, *decay, *gate;  // may be absent
    float* lines;  // [slots, heads, LINE]
    DTYPE* direct;  // D `[B, T, H, V]`; absent: the lines alone
    int64_t q_b, q_t, q_h, k_b, k_t, k_h, do_b, do_t, do_h, g_b, g_t, g_h, decay_b, decay_m, decay_h, gate_b, gate_t, gate_h;
    const void* cu_seqlens;
    int cu_wide, sequences, tokens, chunk_size, slots, heads, group, g_wide, decay_wide, gate_wide;
    float scale;
};

using ValueTile = Tile<DTYPE, VALUE_SLICE>;

DEVICE float gate_at(const Params& p, const Chunk& chunk, int head, int token) {
    if (!p.gate || token >= chunk.length) return 1.0f;
    return load_gate<DTYPE>(p.gate, chunk.batch * p.gate_b + (chunk.begin + token) * p.gate_t + head * p.gate_h, p.gate_wide);
}

extern "C" __global__ void __launch_bounds__(THREADS) slow_core_prepare(const __grid_constant__ Params p) {
    SHARED_MEMORY(memory);
    const int head = blockIdx.x % p.heads, slot = blockIdx.x / p.heads, shared_head = head / p.group, warp = threadIdx.x / 32, r = lane_id() / 4;
    const Grid grid{p.cu_seqlens, p.cu_wide, p.sequences, p.tokens, p.chunk_size, 0, p.slots};
    const Chunk chunk = find_chunk(grid, slot);
    if (!chunk.length) return;
    const KeyTile queries{memory}, keys{memory + KEY_BYTES};
    const TokenTile scores{memory + 2 * KEY_BYTES};
    const ValueTile d_os{memory};  // once the scores are there
    Log* const logs = reinterpret_cast<Log*>(scores.base + SIDE * TRIANGLE * SIZE);
    if (DECAYED && warp == 0)
        running_log<DTYPE>(logs, SIDE, p.g, chunk.batch * p.g_b + chunk.begin * p.g_t + head * p.g_h, p.g_t, p.g_wide, chunk.length);
    float factor = 1.0f;
    if (FACTORED) factor = load_gate<DTYPE>(p.decay, chunk.batch * p.decay_b + factor_index(grid, chunk) * p.decay_m + head * p.decay_h, p.decay_wide);
    __syncthreads();
    float* const line = p.lines + (static_cast<int64_t>(slot) * p.heads + head) * LINE;
    for (int i = threadIdx.x; i < SIDE; i += THREADS) {
        line[i] = DECAYED ? exp_between(logs[SIDE - 1], logs[i]) : 1.0f;
        line[SIDE + i] = p.scale * gate_at(p, chunk, head, i) * (DECAYED ? exp_log(logs[i]) : 1.0f);
    }
    if (threadIdx.x < 4) line[2 * SIDE + threadIdx.x] = DECAYED ? exp_log(logs[SIDE - 1]) : factor;
    if (!p.direct) return;
    const DTYPE* q = p.q + chunk.batch * p.q_b + chunk.begin * p.q_t + shared_head * p.q_h;
    const DTYPE* k = p.k + chunk.batch * p.k_b + chunk.begin * p.k_t + shared_head * p.k_h;
    const DTYPE* d_o = p.d_o + chunk.batch * p.do_b + chunk.begin * p.do_t + head * p.do_h;
    float sums[2 * BLOCKS][4] = {};
    for (int column = 0; column < KEYS; column += KEY_SLICE) {
        if (column) __syncthreads();
        load_tile<SIDE, THREADS, ALIGNED>(queries, q + column, p.q_t, chunk.length, KEYS - column);
        load_tile<SIDE, THREADS, ALIGNED>(keys, k + column, p.k_t, chunk.length, KEYS - column);
        cp_async_commit();
        cp_async_wait<0>();
        __syncthreads();
        add_scores(sums, queries, keys, warp);
    }
    const float gates[2] = {gate_at(p, chunk, head, 16 * warp + r), gate_at(p, chunk, head, 16 * warp + 8 + r)};
    mask_scores(sums, logs, p.scale, warp);
    store_scores(scores, sums, gates, warp);
    const int64_t stride = static_cast<int64_t>(p.heads) * VALUES;
    DTYPE* const direct = p.direct + (chunk.batch * p.tokens + chunk.begin) * stride + head * VALUES;
    for (int column = 0; column < VALUES; column += VALUE_SLICE) {
        __syncthreads();
        load_tile<SIDE, THREADS, ALIGNED>(d_os, d_o + column, p.do_t, chunk.length, VALUES - column);
        cp_async_commit();
        cp_async_wait<0>();
        __syncthreads();
        float found[VALUE_SLICE / 8][4] = {};
        add_turned(found, scores, d_os, warp, chunk.length);
        store_rows<VALUE_SLICE, VALUES % 2 == 0>(direct + column, stride, found, warp, chunk.length, VALUES - column);
    }
}
