// slow_core's outputs once a walk has left every chunk's state S~ and U' (SPEC.md 4), parallel over chunks: o = gate (scale e^G q S~ + P U'),
// P = scale tril(q k^T) * Gamma.
// A token and v head costs C (K + V) + 2 K V FLOP and moves 2 K + 2 V + K V / C numbers: bound by memory (H100, bf16, 1 x 8192,
// 32 heads of 128, chunks of 64: 400 MB, 130 us). A block has a chunk and v head, a warp 16 tokens.
//
// DTYPE; KEYS, VALUES: head_dims; SIDE: tokens of a chunk at most; KEY_SLICE: of the tiles of keys, which hold all of them; VALUE_SLICE: columns at once;
// DECAYED: g; FACTORED: chunk_decay; ALIGNED: 16-byte copies can take all rows.
#include "slow_chunks.cuh"

constexpr int KEY_BYTES = SIDE * KEY_SLICE * SIZE, STATE_BYTES = VALUE_SLICE * KEY_SLICE * SIZE, VALUE_BYTES = SIDE * VALUE_SLICE * SIZE;
static_assert(KEYS <= KEY_SLICE, "all keys at once");

struct Params {
    const DTYPE *q, *k;
    const void *g, *gate;
    const float* lines;
    const DTYPE *states, *updates;  // fragments of S before its factor, rows of U'
    DTYPE* o;
    int64_t q_b, q_t, q_h, k_b, k_t, k_h, g_b, g_t, g_h, gate_b, gate_t, gate_h;
    const void* cu_seqlens;
    int cu_wide, sequences, tokens, chunk_size, slots, heads, group, g_wide, gate_wide;
    float scale;
};

using ValueTile = Tile<DTYPE, VALUE_SLICE>;

extern "C" __global__ void __launch_bounds__(THREADS) slow_core_outputs(const __grid_constant__ Params p) {
    SHARED_MEMORY(memory);
    const int head = blockIdx.x % p.heads, slot = blockIdx.x / p.heads, shared_head = head / p.group, warp = threadIdx.x / 32, r = lane_id() / 4;
    const Chunk chunk = find_chunk(Grid{p.cu_seqlens, p.cu_wide, p.sequences, p.tokens, p.chunk_size, 0, p.slots}, slot);
    if (!chunk.length) return;
    const int length = chunk.length;
    const KeyTile queries{memory}, keys{memory + KEY_BYTES}, states{memory + 2 * KEY_BYTES};
    const ValueTile updates{states.base + STATE_BYTES};
    Log* const logs = reinterpret_cast<Log*>(updates.base + VALUE_BYTES);
    const int64_t place = static_cast<int64_t>(slot) * p.heads + head, value_t = static_cast<int64_t>(p.heads) * VALUES;
    const int64_t rows_at = (chunk.batch * p.tokens + chunk.begin) * value_t + head * VALUES;
    load_tile<SIDE, THREADS, ALIGNED>(queries, p.q + chunk.batch * p.q_b + chunk.begin * p.q_t + shared_head * p.q_h, p.q_t, length, KEYS);
    load_tile<SIDE, THREADS, ALIGNED>(keys, p.k + chunk.batch * p.k_b + chunk.begin * p.k_t + shared_head * p.k_h, p.k_t, length, KEYS);
    if (DECAYED && warp == 0) running_log<DTYPE>(logs, SIDE, p.g, chunk.batch * p.g_b + chunk.begin * p.g_t + head * p.g_h, p.g_t, p.g_wide, length);
    const float* const line = p.lines + place * LINE;
    float gates[2], pulls[2];
#pragma unroll
    for (int half = 0; half < 2; half++) {
        const int token = 16 * warp + 8 * half + r;
        const int64_t at = chunk.batch * p.gate_b + (chunk.begin + token) * p.gate_t + head * p.gate_h;
        gates[half] = p.gate && token < length ? load_gate<DTYPE>(p.gate, at, p.gate_wide) : 1.0f;
        pulls[half] = line[SIDE + token] * (FACTORED ? line[2 * SIDE] : 1.0f);  // the gate is in it
    }
    float scored[2 * BLOCKS][4] = {};
#pragma unroll 1
    for (int value = 0; value < VALUES; value += VALUE_SLICE) {
        if (value) __syncthreads();
        load_tile<SIDE, THREADS, ALIGNED>(updates, p.updates + rows_at + value, value_t, length, VALUES - value);
        cp_async_commit();
        load_states<VALUE_SLICE>(states, p.states + place * (VALUE_BLOCKS * KEY_BLOCKS * 256), states, nullptr, value / 16, 0);
        cp_async_wait<0>();
        __syncthreads();
        if (!value) {
            add_scores(scored, queries, keys, warp);
            mask_scores(scored, logs, p.scale, warp);
#pragma unroll
            for (int n = 0; n < 2 * BLOCKS; n++)
#pragma unroll
                for (int e = 0; e < 4; e++) scored[n][e] *= gates[e / 2];
        }
        float sums[VALUE_SLICE / 8][4] = {};
#pragma unroll(STEPS_AT_ONCE<DTYPE>)
        for (int s = 0; s < KEY_BLOCKS; s++) {
            Pair<DTYPE> a[4], b[4];
            queries.rows(a[0], a[1], a[2], a[3], 16 * warp, 16 * s);
#pragma unroll
            for (int n = 0; n < VALUE_SLICE / 16; n++) {
                states.right_rows(b[0], b[1], b[2], b[3], 16 * n, 16 * s);
                Product<DTYPE>::add(sums[2 * n], a[0], a[1], a[2], a[3], b[0], b[1]);
                Product<DTYPE>::add(sums[2 * n + 1], a[0], a[1], a[2], a[3], b[2], b[3]);
            }
        }
#pragma unroll
        for (int n = 0; n < VALUE_SLICE / 8; n++)
#pragma unroll
            for (int e = 0; e < 4; e++) sums[n][e] *= pulls[e / 2];
#pragma unroll
        for (int j = 0; j < BLOCKS; j++) {
            if (j > warp) break;
            Pair<DTYPE> a[4], b[4];
            as_operand<DTYPE>(a, scored[2 * j], scored[2 * j + 1]);
#pragma unroll
            for (int n = 0; n < VALUE_SLICE / 16; n++) {
                updates.right_columns(b[0], b[1], b[2], b[3], 16 * n, 16 * j);
                Product<DTYPE>::add(sums[2 * n], a[0], a[1], a[2], a[3], b[0], b[1]);
                Product<DTYPE>::add(sums[2 * n + 1], a[0], a[1], a[2], a[3], b[2], b[3]);
            }
        }
        store_rows<VALUE_SLICE, VALUES % 2 == 0>(p.o + rows_at + value, value_t, sums, warp, length, VALUES - value);
    }
}
