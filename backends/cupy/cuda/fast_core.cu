// S_fast: causal linear attention inside each chunk (SPEC.md 2), o_i = gate_i scale (sum over j <= i of Gamma_ij (q_i k_j) v_j + e^G_i q_i W0), W0 the state
// that a sequence brings into the middle of a chunk; and the state that it leaves, W = e^G_C W0 + sum of e^(G_C - G_j) k_j v_j^T over its last chunk.
// A token and head costs C (K + V) FLOP and moves 2 K + 2 V numbers: bound by memory (H100, bf16, 1 x 8192, 32 heads of 128: 268 MB, 90 us).
// A block takes SIDE queries of a chunk, 16 a warp, and goes over the keys and values before them in tiles; scores stay in registers.
//
// DTYPE; KEYS, VALUES: head_dims; SIDE; BUFFERS, 1 or 2 tiles of keys and values; DECAYED: g is given; STARTED: W0 is; ALIGNED: 16-byte copies can take
// the rows of q, k and v.
#include "fast_forward.cuh"

struct Params {
    const DTYPE *q, *k, *v;
    const void *gate, *g;
    const float* initial;
    DTYPE* o;
    float* final;
    const void* cu_seqlens;
    int64_t q_b, q_t, q_h, k_b, k_t, k_h, v_b, v_t, v_h, gate_b, gate_t, gate_h, g_b, g_t, g_h;
    int heads, group, gate_wide, g_wide, cu_wide, sequences, tokens, chunk_size, offset, slots, blocks;
    float scale;
};

extern "C" __global__ void __launch_bounds__(THREADS) fast_core(const __grid_constant__ Params p) {
    SHARED_MEMORY(memory);
    const KeyTile queries{memory};
    Log* const log_decay = reinterpret_cast<Log*>(memory + KEY_BYTES + BUFFERS * PAIR_BYTES);
    const auto keys_of = [&](int i) { return KeyTile{memory + KEY_BYTES + i % BUFFERS * PAIR_BYTES}; };
    const auto values_of = [&](int i) { return ValueTile{memory + 2 * KEY_BYTES + i % BUFFERS * PAIR_BYTES}; };
    const int head = blockIdx.x % p.heads, task = blockIdx.x / p.heads, from = task % p.blocks * SIDE;
    const int warp = threadIdx.x / 32, lane = lane_id(), r = lane / 4, c = lane % 4;
    const Chunk chunk = find_chunk(grid_of(p), task / p.blocks);
    if (chunk.length <= from) return;
    const int shared_head = head / p.group, rows = chunk.length - from, tiles = from / SIDE + 1;
    const DTYPE* q = p.q + chunk.batch * p.q_b + (chunk.begin + from) * p.q_t + shared_head * p.q_h;
    const DTYPE* k = p.k + chunk.batch * p.k_b + chunk.begin * p.k_t + shared_head * p.k_h;
    const DTYPE* v = p.v + chunk.batch * p.v_b + chunk.begin * p.v_t + head * p.v_h;

    load_tile<SIDE, THREADS, ALIGNED>(queries, q, p.q_t, rows, KEYS);
    const auto load = [&](int i) {
        if (i < tiles) {
            load_tile<SIDE, THREADS, ALIGNED>(keys_of(i), k + i * SIDE * p.k_t, p.k_t, chunk.length - i * SIDE, KEYS);
            load_tile<SIDE, THREADS, ALIGNED>(values_of(i), v + i * SIDE * p.v_t, p.v_t, chunk.length - i * SIDE, VALUES);
        }
        cp_async_commit();
    };
    if (DECAYED && warp == 0) {
        const int tokens = min(chunk.length, from + SIDE);
        running_log<DTYPE>(log_decay, from + SIDE, p.g, chunk.batch * p.g_b + chunk.begin * p.g_t + head * p.g_h, p.g_t, p.g_wide, tokens);
    }
    Sums sums = {};
    if constexpr (STARTED) {
        if (chunk.first && p.offset > 0) {  // q W0, SIDE rows of W0 at once where values will be
            const float* initial = p.initial + (static_cast<int64_t>(chunk.sequence) * p.heads + head) * (KEYS * VALUES);
            cp_async_commit();
            cp_async_wait<0>();
            for (int key = 0; key < KEYS; key += SIDE) {
                const ValueTile state = values_of(0);
                for (int i = threadIdx.x; i < SIDE * VALUE_WIDTH; i += THREADS) keep_state(state, initial, key, i);
                __syncthreads();
                add_state(sums, queries, state, warp, key);
                __syncthreads();
            }
            if (DECAYED) {
                const float by[2] = {exp_log(log_decay[from + 16 * warp + r]), exp_log(log_decay[from + 16 * warp + r + 8])};
#pragma unroll
                for (int n = 0; n < VALUE_WIDTH / 8; n++)
#pragma unroll
                    for (int e = 0; e < 4; e++) sums[n][e] *= by[e / 2];
            }
        }
    }
    load(0);
    if (BUFFERS == 2) load(1);
#pragma unroll 1
    for (int i = 0; i < tiles; i++) {
        cp_async_wait<BUFFERS - 1>();
        __syncthreads();
        const bool diagonal = i == tiles - 1;
        Scores scores = {};
        add_scores(scores, queries, keys_of(i), warp, diagonal);
#pragma unroll
        for (int j = 0; j < SIDE / 16; j++) {
            if (diagonal && j > warp) break;
#pragma unroll
            for (int n = 2 * j; n < 2 * j + 2; n++) {
#pragma unroll
                for (int e = 0; e < 4; e++) {
                    const int query = from + 16 * warp + r + e / 2 * 8, key = i * SIDE + 8 * n + 2 * c + e % 2;
                    if (key > query) scores[n][e] = 0.0f;
                    else if (DECAYED) scores[n][e] *= exp_between(log_decay[query], log_decay[key]);
                }
            }
            Pair<DTYPE> a[4], b[4];
            as_operand<DTYPE>(a, scores[2 * j], scores[2 * j + 1]);
#pragma unroll
            for (int n = 0; n < VALUE_WIDTH / 16; n++) {  // add_rows, but for the tile's address, which is made anew
                values_of(i).columns(b[0], b[1], b[2], b[3], 16 * n, 16 * j);
                Product<DTYPE>::add(sums[2 * n], a[0], a[1], a[2], a[3], b[0], b[2]);
                Product<DTYPE>::add(sums[2 * n + 1], a[0], a[1], a[2], a[3], b[1], b[3]);
            }
        }
        __syncthreads();
        load(i + BUFFERS);
    }
    const int64_t token = chunk.begin + from + 16 * warp + r, stride = static_cast<int64_t>(p.heads) * VALUES;
    DTYPE* o = p.o + ((chunk.batch * p.tokens + token) * p.heads + head) * VALUES;
#pragma unroll
    for (int half = 0; half < 2; half++) {
        if (16 * warp + r + 8 * half >= rows) break;
        const float by = p.scale * (p.gate ? load_gate<DTYPE>(p.gate, chunk.batch * p.gate_b + (token + 8 * half) * p.gate_t + head * p.gate_h, p.gate_wide) : 1.0f);
#pragma unroll
        for (int n = 0; n < VALUE_WIDTH / 8; n++) {
            const int at = 8 * n + 2 * c;
            store_pair<VALUES % 2 == 0>(o + 8 * half * stride + at, by * sums[n][2 * half], by * sums[n][2 * half + 1], VALUES - at);
        }
    }
}

// The final state of a sequence and head: 16 keys a warp, the last chunk's tokens in tiles of SIDE.
constexpr int STATE_THREADS = 2 * KEY_WIDTH;

extern "C" __global__ void __launch_bounds__(STATE_THREADS) fast_core_state(const __grid_constant__ Params p) {
    SHARED_MEMORY(memory);
    const KeyTile keys{memory};
    const ValueTile values{memory + KEY_BYTES};
    Log* const log_decay = reinterpret_cast<Log*>(memory + PAIR_BYTES);
    const int head = blockIdx.x % p.heads, sequence = blockIdx.x / p.heads;
    const int warp = threadIdx.x / 32, lane = lane_id(), r = lane / 4, c = lane % 4, tokens = p.blocks * SIDE;
    const Chunk chunk = last_chunk(grid_of(p), sequence);
    const DTYPE* k = p.k + chunk.batch * p.k_b + chunk.begin * p.k_t + head / p.group * p.k_h;
    const DTYPE* v = p.v + chunk.batch * p.v_b + chunk.begin * p.v_t + head * p.v_h;
    if (DECAYED && warp == 0)
        running_log<DTYPE>(log_decay, tokens, p.g, chunk.batch * p.g_b + chunk.begin * p.g_t + head * p.g_h, p.g_t, p.g_wide, chunk.length);
    Sums sums = {};
    __syncthreads();
    const Log last = DECAYED ? log_decay[tokens - 1] : Log{0.0f, 0.0f};  // tokens beyond the chunk left the sum as it was
#pragma unroll 1
    for (int from = 0; from < chunk.length; from += SIDE) {
        load_tile<SIDE, STATE_THREADS, ALIGNED>(keys, k + from * p.k_t, p.k_t, chunk.length - from, KEYS);
        load_tile<SIDE, STATE_THREADS, ALIGNED>(values, v + from * p.v_t, p.v_t, chunk.length - from, VALUES);
        cp_async_commit();
        cp_async_wait<0>();
        __syncthreads();
#pragma unroll(STEPS_AT_ONCE<DTYPE>)
        for (int s = 0; s < SIDE / 16; s++) {
            Pair<DTYPE> a[4];
            keys.columns(a[0], a[1], a[2], a[3], 16 * warp, 16 * s);
            if (DECAYED) {
#pragma unroll
                for (int half = 0; half < 2; half++) {
                    const int token = from + 16 * s + 8 * half + 2 * c;
                    const float first = exp_between(last, log_decay[token]), second = exp_between(last, log_decay[token + 1]);
#pragma unroll
                    for (int e = 0; e < 2; e++) {
                        const float2 both = Make<DTYPE>::floats(a[2 * half + e]);
                        a[2 * half + e] = Make<DTYPE>::pair_of(first * both.x, second * both.y);
                    }
                }
            }
            add_rows(sums, a, values, 16 * s);
        }
        __syncthreads();
    }
    const int64_t at = (static_cast<int64_t>(sequence) * p.heads + head) * (KEYS * VALUES);
    const bool carried = STARTED && (chunk.length == 0 || (chunk.first && p.offset > 0));
    store_state(p, at, sums, 16 * warp, r, c, carried, DECAYED ? exp_log(last) : 1.0f);
}
