// S_fast with dual_core's merge (SPEC.md 2, 5): what lies in o, the slow core's output with its gate, becomes
//
//   o_i = alpha_i f_i scale (sum over j <= i of (q_i k_j) beta_j v_j + q_i W0) + (1 - alpha_i) o_i
//
// inside each chunk, W0 the state that a sequence brings into the middle of a chunk; and the state that it leaves, W = W0 + sum of beta_j k_j v_j^T over its
// last chunk. Rows of q and k that are to be of unit norm stay as they are: their inverse norms are weights of queries and keys.
// A token and head costs C (K + V) FLOP and moves 2 K + 3 V numbers: bound by memory (H100, bf16, 1 x 8192, 32 heads of 128: 336 MB, 113 us).
// A block takes SIDE queries of a chunk, 16 a warp, and goes over the keys and values before them in tiles, scores in registers; the first blocks of the
// grid make the final states, SIDE keys each.
//
// DTYPE; KEYS, VALUES: head_dims; SIDE; BUFFERS, 1 or 2 tiles of keys and values; STARTED: W0 is given; ALIGNED: 16-byte copies can take the rows.
#include "fast_forward.cuh"

constexpr int KEY_PARTS = (KEYS + SIDE - 1) / SIDE;

struct Params {
    const DTYPE *q, *k, *v;
    const void *beta, *gate, *alpha;  // gate and alpha may be absent
    const float* initial;
    DTYPE* o;
    float* final;
    const void* cu_seqlens;
    int64_t q_b, q_t, q_h, k_b, k_t, k_h, v_b, v_t, v_h, beta_b, beta_t, beta_h, gate_b, gate_t, gate_h, alpha_b, alpha_t, alpha_h;
    int heads, group, beta_wide, gate_wide, alpha_wide, cu_wide, sequences, tokens, chunk_size, offset, slots, blocks, l2norm;
    float scale, share;  // share: alpha where it is a number
};

// 1 / sqrt(sum of squares + 1e-6) of row `row` + lane / 4, the same in the four lanes that share it
DEVICE float inverse_norm(const KeyTile& tile, int row) {
    const int lane = lane_id();
    float sum = 0.0f;
#pragma unroll
    for (int n = 0; n < KEY_WIDTH / 8; n++) {
        const float2 x = Make<DTYPE>::floats(*tile.pair_at(row + lane / 4, 8 * n + 2 * (lane % 4)));
        sum += x.x * x.x + x.y * x.y;
    }
    sum += __shfl_xor_sync(0xffffffffu, sum, 1);
    sum += __shfl_xor_sync(0xffffffffu, sum, 2);
    return rsqrtf(sum + 1e-6f);
}

// A chunk's keys, values and weights in tiles of SIDE tokens, BUFFERS of them at once.
struct Tokens {
    const Params& p;
    unsigned char* memory;
    float* weights;  // of the tile at hand: beta, with the key's inverse norm
    const DTYPE *k, *v;
    int64_t beta_at;
    int length;
    uint32_t words[BUFFERS];  // that hold the betas of the tiles on their way

    DEVICE Tokens(const Params& params, unsigned char* tiles, const Chunk& chunk, int head)
        : p(params), memory(tiles), weights(reinterpret_cast<float*>(tiles + BUFFERS * PAIR_BYTES)), length(chunk.length) {
        k = p.k + chunk.batch * p.k_b + chunk.begin * p.k_t + head / p.group * p.k_h;
        v = p.v + chunk.batch * p.v_b + chunk.begin * p.v_t + head * p.v_h;
        beta_at = chunk.batch * p.beta_b + (chunk.begin + threadIdx.x) * p.beta_t + head * p.beta_h;
    }
    DEVICE KeyTile keys(int i) const { return KeyTile{memory + i % BUFFERS * PAIR_BYTES}; }
    DEVICE ValueTile values(int i) const { return ValueTile{memory + i % BUFFERS * PAIR_BYTES + KEY_BYTES}; }
    DEVICE void fetch(int i, int tiles) {
        const int from = i * SIDE;
#pragma unroll
        for (int j = 0; j + 1 < BUFFERS; j++) words[j] = words[j + 1];
        words[BUFFERS - 1] = 0;
        if (i < tiles) {
            load_tile<SIDE, THREADS, ALIGNED>(keys(i), k + from * p.k_t, p.k_t, length - from, KEYS);
            load_tile<SIDE, THREADS, ALIGNED>(values(i), v + from * p.v_t, p.v_t, length - from, VALUES);
            if (threadIdx.x < SIDE && from + static_cast<int>(threadIdx.x) < length)
                words[BUFFERS - 1] = gate_word<DTYPE>(p.beta, beta_at + from * p.beta_t, p.beta_wide);
        }
        cp_async_commit();
    }
    // Until tile i and its weights are there for all threads.
    DEVICE void arrive(int i) {
        if (threadIdx.x < SIDE) weights[threadIdx.x] = gate_of<DTYPE>(words[0], p.beta, beta_at + static_cast<int64_t>(i) * SIDE * p.beta_t, p.beta_wide);
        cp_async_wait<BUFFERS - 1>();
        __syncthreads();
        if (p.l2norm) {
#pragma unroll
            for (int half = 0; half < 2; half++) {
                const int row = threadIdx.x / 32 * 16 + 8 * half;
                const float norm = inverse_norm(keys(i), row);
                if (threadIdx.x % 4 == 0) weights[row + lane_id() / 4] *= norm;
            }
            __syncthreads();
        }
    }
};

DEVICE void outputs(const Params& p, unsigned char* memory, int task) {
    const KeyTile queries{memory};
    const int head = task % p.heads, block = task / p.heads, from = block % p.blocks * SIDE;
    const int warp = threadIdx.x / 32, lane = lane_id(), r = lane / 4, c = lane % 4;
    const Chunk chunk = find_chunk(grid_of(p), block / p.blocks);
    if (chunk.length <= from) return;
    const int rows = chunk.length - from, tiles = from / SIDE + 1;
    load_tile<SIDE, THREADS, ALIGNED>(queries, p.q + chunk.batch * p.q_b + (chunk.begin + from) * p.q_t + head / p.group * p.q_h, p.q_t, rows, KEYS);
    Tokens tokens(p, memory + KEY_BYTES, chunk, head);
    Sums sums = {};
    if constexpr (STARTED) {
        if (chunk.first && p.offset > 0) {  // q W0, SIDE rows of W0 at once where values will be
            const float* initial = p.initial + (static_cast<int64_t>(chunk.sequence) * p.heads + head) * (KEYS * VALUES);
            cp_async_commit();
            cp_async_wait<0>();
#pragma unroll 1
            for (int key = 0; key < KEYS; key += SIDE) {
                const ValueTile state = tokens.values(0);
#pragma unroll 1
                for (int i = threadIdx.x; i < SIDE * VALUE_WIDTH; i += THREADS) keep_state(state, initial, key, i);
                __syncthreads();
                add_state(sums, queries, state, warp, key);
                __syncthreads();
            }
        }
    }
#pragma unroll
    for (int i = 0; i < BUFFERS; i++) tokens.fetch(i, tiles);
#pragma unroll 1
    for (int i = 0; i < tiles; i++) {
        tokens.arrive(i);
        const KeyTile keys = tokens.keys(i);
        const ValueTile values = tokens.values(i);
        const bool diagonal = i == tiles - 1;
        Scores scores = {};
        add_scores(scores, queries, keys, warp, diagonal);
#pragma unroll
        for (int j = 0; j < SIDE / 16; j++) {
            if (diagonal && j > warp) break;
#pragma unroll
            for (int n = 2 * j; n < 2 * j + 2; n++) {
                const float2 weight = *reinterpret_cast<const float2*>(tokens.weights + 8 * n + 2 * c);
#pragma unroll
                for (int e = 0; e < 4; e++) {
                    const int query = from + 16 * warp + r + e / 2 * 8, key = i * SIDE + 8 * n + 2 * c + e % 2;
                    scores[n][e] = key > query ? 0.0f : scores[n][e] * (e % 2 ? weight.y : weight.x);
                }
            }
            Pair<DTYPE> a[4];
            as_operand<DTYPE>(a, scores[2 * j], scores[2 * j + 1]);
            add_rows(sums, a, values, 16 * j);
        }
        __syncthreads();
        tokens.fetch(i + BUFFERS, tiles);
    }
    const int64_t stride = static_cast<int64_t>(p.heads) * VALUES;
#pragma unroll
    for (int half = 0; half < 2; half++) {
        const int row = 16 * warp + 8 * half;
        const float norm = p.l2norm ? inverse_norm(queries, row) : 1.0f;
        if (row + r >= rows) continue;
        const int64_t token = chunk.begin + from + row + r;
        const float alpha = p.alpha ? load_gate<DTYPE>(p.alpha, chunk.batch * p.alpha_b + token * p.alpha_t + head * p.alpha_h, p.alpha_wide) : p.share;
        const float gate = p.gate ? load_gate<DTYPE>(p.gate, chunk.batch * p.gate_b + token * p.gate_t + head * p.gate_h, p.gate_wide) : 1.0f;
        const float by = alpha * gate * p.scale * norm, rest = 1.0f - alpha;
        DTYPE* o = p.o + (chunk.batch * p.tokens + token) * stride + head * VALUES;
#pragma unroll
        for (int n = 0; n < VALUE_WIDTH / 8; n++) {
            const int at = 8 * n + 2 * c;
            float2 slow = make_float2(0.0f, 0.0f);
            if constexpr (VALUES % 2 == 0) {
                if (at < VALUES) slow = Make<DTYPE>::floats(*reinterpret_cast<const Pair<DTYPE>*>(o + at));
            } else {
                if (at < VALUES) slow.x = widen(o[at]);
                if (at + 1 < VALUES) slow.y = widen(o[at + 1]);
            }
            store_pair<VALUES % 2 == 0>(o + at, by * sums[n][2 * half] + rest * slow.x, by * sums[n][2 * half + 1] + rest * slow.y, VALUES - at);
        }
    }
}

// SIDE keys of the final state of a sequence and head, 16 a warp.
DEVICE void final_state(const Params& p, unsigned char* memory, int task) {
    const int part = task % KEY_PARTS, head = task / KEY_PARTS % p.heads, sequence = task / KEY_PARTS / p.heads;
    const int warp = threadIdx.x / 32, lane = lane_id(), r = lane / 4, c = lane % 4, key0 = part * SIDE + 16 * warp;
    const Chunk chunk = last_chunk(grid_of(p), sequence);
    const int tiles = (chunk.length + SIDE - 1) / SIDE;
    Tokens tokens(p, memory + KEY_BYTES, chunk, head);
    Sums sums = {};
#pragma unroll
    for (int i = 0; i < BUFFERS; i++) tokens.fetch(i, tiles);
#pragma unroll 1
    for (int i = 0; i < tiles; i++) {
        tokens.arrive(i);
        const KeyTile keys = tokens.keys(i);
        const ValueTile values = tokens.values(i);
        if (key0 < KEY_WIDTH) {
#pragma unroll(STEPS_AT_ONCE<DTYPE>)
            for (int s = 0; s < SIDE / 16; s++) {
                Pair<DTYPE> a[4];
                keys.columns(a[0], a[1], a[2], a[3], key0, 16 * s);
#pragma unroll
                for (int half = 0; half < 2; half++) {
                    const float2 weight = *reinterpret_cast<const float2*>(tokens.weights + 16 * s + 8 * half + 2 * c);
#pragma unroll
                    for (int e = 0; e < 2; e++) {
                        const float2 both = Make<DTYPE>::floats(a[2 * half + e]);
                        a[2 * half + e] = Make<DTYPE>::pair_of(weight.x * both.x, weight.y * both.y);
                    }
                }
                add_rows(sums, a, values, 16 * s);
            }
        }
        __syncthreads();
        tokens.fetch(i + BUFFERS, tiles);
    }
    const int64_t at = (static_cast<int64_t>(sequence) * p.heads + head) * (KEYS * VALUES);
    const bool carried = STARTED && (chunk.length == 0 || (chunk.first && p.offset > 0));
    store_state(p, at, sums, key0, r, c, carried, 1.0f);
}

extern "C" __global__ void __launch_bounds__(THREADS) dual_fast(const __grid_constant__ Params p) {
    SHARED_MEMORY(memory);
    const int states = p.final ? p.sequences * p.heads * KEY_PARTS : 0, task = static_cast<int>(blockIdx.x) - states;
    if (task < 0) final_state(p, memory, static_cast<int>(blockIdx.x));
    else outputs(p, memory, task);
}
