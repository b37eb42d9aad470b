// One to eight tokens of the exact gated delta rule on a state that stays in registers between them (SPEC.md 4, 9):
//   S <- e^g S;  u = beta (v - S^T k);  S <- S + k u^T;  o = scale S^T q,   and both reductions are taken from the state before the write.
// A token and head costs 7 K V FLOP and 8 K V bytes of float32 state, read and written once: bound by memory, or for few heads by latency
// (H100: 32 heads of 128 x 128 move 4 MB, 1.3 us). So a warp owns WIDTH value columns of one head and all of its keys, sums over the keys by
// shuffles and meets no other warp: the grid is as many warps as there are tiles.
//
// DTYPE; KEYS, VALUES: head_dims; WIDTH: columns of a warp; WARPS of a block; VECTOR: state rows are contiguous and 16-byte aligned;
// PACKED: so are the rows of q and k; L2NORM: q and k get length 1.
#include "loads.cuh"

constexpr int COLUMNS = 4, LANES = WIDTH / COLUMNS, GROUPS = 32 / LANES, ROWS = (KEYS + GROUPS - 1) / GROUPS, TILES = (VALUES + WIDTH - 1) / WIDTH;
constexpr bool WHOLE_KEYS = KEYS == GROUPS * ROWS, WHOLE_VALUES = VALUES % WIDTH == 0;

struct Params {
    const DTYPE *q, *k, *v;
    const void *beta, *g;  // g may be absent
    const float* state;
    float* after;
    const void* slots;  // the state's row for each sequence, below zero: none; absent: the sequence's own
    DTYPE* o;
    int64_t q_b, q_t, q_h, k_b, k_t, k_h, v_b, v_t, v_h, beta_b, beta_t, beta_h, g_b, g_t, g_h;
    int64_t state_b, state_h, state_k, state_v, after_b, after_h, after_k, after_v, slot_stride;
    int batch, tokens, heads, group, beta_wide, g_wide, slots_wide;
    float scale;
};

// a sum over the lanes that hold other keys of the same columns
DEVICE float sum_keys(float x) {
#pragma unroll
    for (int lanes = LANES; lanes < 32; lanes *= 2) x += __shfl_xor_sync(0xffffffffu, x, lanes);
    return x;
}

DEVICE void load_keys(float (&x)[ROWS], const DTYPE* row, int first) {
    if constexpr (PACKED && WHOLE_KEYS) {
        load_run(x, row + first);
    } else {
#pragma unroll
        for (int i = 0; i < ROWS; i++) x[i] = WHOLE_KEYS || first + i < KEYS ? widen(row[first + i]) : 0.0f;
    }
}

DEVICE void unit_length(float (&x)[ROWS]) {
    float square = 0.0f;
#pragma unroll
    for (int i = 0; i < ROWS; i++) square += x[i] * x[i];
    const float inverse = rsqrtf(sum_keys(square) + 1e-6f);
#pragma unroll
    for (int i = 0; i < ROWS; i++) x[i] *= inverse;
}

extern "C" __global__ void __launch_bounds__(32 * WARPS) gated_delta_step(const __grid_constant__ Params p) {
    const int64_t task = static_cast<int64_t>(blockIdx.x) * WARPS + threadIdx.x / 32;
    const int tile = task % TILES;
    const int64_t head = task / TILES % p.heads, row = task / TILES / p.heads;
    if (row >= p.batch) return;
    const int lane = threadIdx.x % 32, first = lane / LANES * ROWS, column = tile * WIDTH + lane % LANES * COLUMNS;
    DTYPE* o = p.o + (row * p.tokens * p.heads + head) * VALUES + column;
    const int64_t o_t = static_cast<int64_t>(p.heads) * VALUES;
    const int64_t slot = p.slots ? load_index(p.slots, row * p.slot_stride, p.slots_wide) : row;
    if (slot < 0) {
        for (int t = 0; t < p.tokens; t++)
#pragma unroll
            for (int c = 0; c < COLUMNS; c++)
                if (first == 0 && column + c < VALUES) o[t * o_t + c] = narrow<DTYPE>(0.0f);
        return;
    }
    float memory[ROWS][COLUMNS];
    const float* state = p.state + slot * p.state_b + head * p.state_h + first * p.state_k + column * p.state_v;
#pragma unroll
    for (int i = 0; i < ROWS; i++) {
        const bool inside = WHOLE_KEYS || first + i < KEYS;
        if constexpr (VECTOR) {
            const float4 four = inside && (WHOLE_VALUES || column < VALUES) ? *reinterpret_cast<const float4*>(state + i * p.state_k) : make_float4(0, 0, 0, 0);
            memory[i][0] = four.x, memory[i][1] = four.y, memory[i][2] = four.z, memory[i][3] = four.w;
        } else {
#pragma unroll
            for (int c = 0; c < COLUMNS; c++) memory[i][c] = inside && column + c < VALUES ? state[i * p.state_k + c * p.state_v] : 0.0f;
        }
    }
    const int64_t shared_head = head / p.group;
    const DTYPE *q = p.q + row * p.q_b + shared_head * p.q_h, *k = p.k + row * p.k_b + shared_head * p.k_h;
    const DTYPE* v = p.v + row * p.v_b + head * p.v_h + column;
    for (int t = 0; t < p.tokens; t++) {
        float query[ROWS], key[ROWS], known[COLUMNS] = {}, read[COLUMNS] = {}, match = 0.0f;
        load_keys(key, k + t * p.k_t, first);
        load_keys(query, q + t * p.q_t, first);
        float value[COLUMNS];
#pragma unroll
        for (int c = 0; c < COLUMNS; c++) value[c] = WHOLE_VALUES || column + c < VALUES ? widen(v[t * p.v_t + c]) : 0.0f;
        const float beta = load_gate<DTYPE>(p.beta, row * p.beta_b + t * p.beta_t + head * p.beta_h, p.beta_wide);
        const float decay = p.g ? expf(load_gate<DTYPE>(p.g, row * p.g_b + t * p.g_t + head * p.g_h, p.g_wide)) : 1.0f;
        if constexpr (L2NORM) unit_length(key), unit_length(query);
#pragma unroll
        for (int i = 0; i < ROWS; i++) {
            match += key[i] * query[i];
#pragma unroll
            for (int c = 0; c < COLUMNS; c++) {
                memory[i][c] *= decay;
                known[c] += memory[i][c] * key[i];
                read[c] += memory[i][c] * query[i];
            }
        }
        match = sum_keys(match);
#pragma unroll
        for (int c = 0; c < COLUMNS; c++) {
            value[c] = (value[c] - sum_keys(known[c])) * beta;
            read[c] = (sum_keys(read[c]) + match * value[c]) * p.scale;
        }
#pragma unroll
        for (int i = 0; i < ROWS; i++)
#pragma unroll
            for (int c = 0; c < COLUMNS; c++) memory[i][c] += key[i] * value[c];
#pragma unroll
        for (int c = 0; c < COLUMNS; c++)
            if (first == 0 && (WHOLE_VALUES || column + c < VALUES)) o[t * o_t + c] = narrow<DTYPE>(read[c]);
    }
    float* after = p.after + slot * p.after_b + head * p.after_h + first * p.after_k + column * p.after_v;
#pragma unroll
    for (int i = 0; i < ROWS; i++) {
        const bool inside = WHOLE_KEYS || first + i < KEYS;
        if constexpr (VECTOR) {
            if (inside && (WHOLE_VALUES || column < VALUES))
                *reinterpret_cast<float4*>(after + i * p.after_k) = make_float4(memory[i][0], memory[i][1], memory[i][2], memory[i][3]);
        } else {
#pragma unroll
            for (int c = 0; c < COLUMNS; c++)
                if (inside && column + c < VALUES) after[i * p.after_k + c * p.after_v] = memory[i][c];
        }
    }
}
