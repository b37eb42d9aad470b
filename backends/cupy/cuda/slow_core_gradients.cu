// slow_core's gradients, what is parallel over chunks after the walks (SPEC.md 10). With S the state at a chunk's start, E the gradient of the state that
// leaves it, U' and dU' from the walks:
//   slow_core_gradients: X = scale tril(dO U'^T) * Gamma:   dq / gate = scale e^G d (dO S^T) + X k,   dw = -d (dU' S^T),
//                        dk = e^(G_C - G) (U' E^T) + (gate X)^T q
// and for slow_core_vectors.cu: q_i . (dq / gate)_i, which is dgate_i;   dG_i = q_i . dq_i - k_i . dk_i of one v head, and of a chunk's last token also
//                        e^G_C <S, E>;   left_i = k_i . e^(G_C - G) (U' E^T)_i;   dd = <S, E> + <dq, q> - <w, dU' S^T> of S
// dG is without the diagonal of X and without left, which would cancel, but not their rounding: it is larger than all the rest where gates forget within a
// few tokens.
// A token and v head costs C (2 K + V) + 6 K V FLOP and moves 3 V + 2 K V / C and a share of 4 K + K (dw) numbers: bound by memory
// (H100, bf16, 1 x 8192, 16/32 heads of 128, chunks of 64: 0.65 GB, 210 us).
// A block has a chunk, a q/k head and KEY_SLICE columns of keys, and goes through the v heads of that head in order: what they share is summed in registers.
//
// DTYPE; KEYS, VALUES: head_dims; SIDE: tokens of a chunk at most, 16 a warp; KEY_SLICE, VALUE_SLICE: columns at once; DECAYED: g; FACTORED: chunk_decay;
// DELTA; GROUPED: several v heads to a q/k head; ALIGNED: 16-byte copies can take all rows.
#include "slow_chunks.cuh"

constexpr int KEY_SLICES = (KEYS + KEY_SLICE - 1) / KEY_SLICE;
constexpr int KEY_BYTES = SIDE * KEY_SLICE * SIZE, VALUE_BYTES = SIDE * VALUE_SLICE * SIZE, STATE_BYTES = VALUE_SLICE * KEY_SLICE * SIZE;
constexpr int WORK_BYTES = 3 * VALUE_BYTES + 2 * STATE_BYTES, SCORES_BYTES = SIDE * TRIANGLE * SIZE;
constexpr int AT_ONCE = THREADS > 128 ? 1 : KEY_SLICE > 32 || GROUPED || (SIZE == 4 && KEYS > 32) ? 2 : 3;  // blocks of a processor, as registers allow
constexpr int LOGS_AT = 2 * KEY_BYTES + (WORK_BYTES > SCORES_BYTES ? WORK_BYTES : SCORES_BYTES);

struct Params {
    const DTYPE *q, *k, *w, *d_o;
    const void *g, *decay, *gate;  // may be absent
    const DTYPE *states, *leaving, *updates, *errors;  // fragments of S and E, rows of U' and dU'
    float *told, *bent, *left, *pulled;  // [KEY_SLICES, places, SIDE] three times, [KEY_SLICES, places]; places: slots and v heads
    DTYPE *dq, *dk, *dw;
    int64_t q_b, q_t, q_h, k_b, k_t, k_h, w_b, w_t, w_h, do_b, do_t, do_h, g_b, g_t, g_h, decay_b, decay_m, decay_h, gate_b, gate_t, gate_h;
    const void* cu_seqlens;
    int cu_wide, sequences, tokens, chunk_size, slots, heads, group, places, g_wide, decay_wide, gate_wide;
    float scale;
};

using ValueTile = Tile<DTYPE, VALUE_SLICE>;

DEVICE Grid grid_of(const Params& p) { return Grid{p.cu_seqlens, p.cu_wide, p.sequences, p.tokens, p.chunk_size, 0, p.slots}; }

DEVICE float gate_at(const Params& p, const Chunk& chunk, int head, int token) {
    if (!p.gate || token >= chunk.length) return 1.0f;
    return load_gate<DTYPE>(p.gate, chunk.batch * p.gate_b + (chunk.begin + token) * p.gate_t + head * p.gate_h, p.gate_wide);
}

DEVICE void logs_of(const Params& p, const Chunk& chunk, int head, Log* logs) {
    if (DECAYED && threadIdx.x < 32) running_log<DTYPE>(logs, SIDE, p.g, chunk.batch * p.g_b + chunk.begin * p.g_t + head * p.g_h, p.g_t, p.g_wide, chunk.length);
}

// sums += (the warp's 16 rows) (the tile's rows), over a slice of values
DEVICE void add_states(float (&sums)[KEY_SLICE / 8][4], const Pair<DTYPE> (&a)[4], const KeyTile& states, int s) {
#pragma unroll
    for (int n = 0; n < KEY_SLICE / 16; n++) {
        Pair<DTYPE> b[4];
        states.right_columns(b[0], b[1], b[2], b[3], 16 * n, 16 * s);
        Product<DTYPE>::add(sums[2 * n], a[0], a[1], a[2], a[3], b[0], b[1]);
        Product<DTYPE>::add(sums[2 * n + 1], a[0], a[1], a[2], a[3], b[2], b[3]);
    }
}

// Of rows 16 warp + r and 8 below: the sum of a tile's row times that of the sums
DEVICE void row_products(float (&found)[2], const KeyTile& tile, const float (&sums)[KEY_SLICE / 8][4], int warp) {
    const int r = lane_id() / 4, c = lane_id() % 4;
#pragma unroll
    for (int half = 0; half < 2; half++) {
        float sum = 0.0f;
#pragma unroll
        for (int n = 0; n < KEY_SLICE / 8; n++) {
            const float2 x = Make<DTYPE>::floats(*tile.pair_at(16 * warp, 8 * half + r, 8 * n + 2 * c));
            sum += x.x * sums[n][2 * half] + x.y * sums[n][2 * half + 1];
        }
        found[half] = sum;
    }
}
// The diagonal of the warp's 16 rows of scores, for rows r and r + 8; it is zero there afterwards
DEVICE void take_diagonal(float (&own)[2], float (&scored)[2 * BLOCKS][4], int warp) {
    const int r = lane_id() / 4, c = lane_id() % 4;
    own[0] = own[1] = 0.0f;
#pragma unroll
    for (int n = 0; n < 2 * BLOCKS; n++) {
        if (n / 2 != warp) continue;
#pragma unroll
        for (int e = 0; e < 4; e++)
            if (8 * n + 2 * c + e % 2 == 16 * warp + r + e / 2 * 8) own[e / 2] = scored[n][e], scored[n][e] = 0.0f;
    }
#pragma unroll
    for (int half = 0; half < 2; half++) {
        own[half] += __shfl_xor_sync(0xffffffffu, own[half], 1);
        own[half] += __shfl_xor_sync(0xffffffffu, own[half], 2);
    }
}
// sums += a tile's rows 16 warp + r and 8 below, each times its number
DEVICE void add_diagonal(float (&sums)[KEY_SLICE / 8][4], const KeyTile& tile, float first, float second, int warp) {
    const int r = lane_id() / 4, c = lane_id() % 4;
#pragma unroll
    for (int n = 0; n < KEY_SLICE / 8; n++) {
        const float2 x = Make<DTYPE>::floats(*tile.pair_at(16 * warp, r, 8 * n + 2 * c)), y = Make<DTYPE>::floats(*tile.pair_at(16 * warp, 8 + r, 8 * n + 2 * c));
        sums[n][0] += first * x.x, sums[n][1] += first * x.y, sums[n][2] += second * y.x, sums[n][3] += second * y.y;
    }
}
DEVICE float quad_sum(float x) {
    x += __shfl_xor_sync(0xffffffffu, x, 1);
    return x + __shfl_xor_sync(0xffffffffu, x, 2);
}

extern "C" __global__ void __launch_bounds__(THREADS, AT_ONCE) slow_core_gradients(const __grid_constant__ Params p) {
    SHARED_MEMORY(memory);
    const int slice = blockIdx.x % KEY_SLICES, shared_heads = p.heads / p.group, shared_head = blockIdx.x / KEY_SLICES % shared_heads;
    const int slot = blockIdx.x / KEY_SLICES / shared_heads, warp = threadIdx.x / 32, r = lane_id() / 4, c = lane_id() % 4;
    const Chunk chunk = find_chunk(grid_of(p), slot);
    if (!chunk.length) return;
    const int length = chunk.length, key = slice * KEY_SLICE, keys_left = KEYS - key;
    const int64_t first = chunk.batch * p.tokens + chunk.begin;
    const KeyTile queries{memory}, keys{memory + KEY_BYTES}, starts{memory + 2 * KEY_BYTES}, ends{starts.base + STATE_BYTES};
    const ValueTile d_os{ends.base + STATE_BYTES}, updates{d_os.base + VALUE_BYTES}, errors{updates.base + VALUE_BYTES};
    const TokenTile scores{memory + 2 * KEY_BYTES};  // once the values are read
    Log* const logs = reinterpret_cast<Log*>(memory + LOGS_AT);
    float* const parts = reinterpret_cast<float*>(logs + SIDE);
    load_tile<SIDE, THREADS, ALIGNED>(queries, p.q + chunk.batch * p.q_b + chunk.begin * p.q_t + shared_head * p.q_h + key, p.q_t, length, keys_left);
    load_tile<SIDE, THREADS, ALIGNED>(keys, p.k + chunk.batch * p.k_b + chunk.begin * p.k_t + shared_head * p.k_h + key, p.k_t, length, keys_left);
    const int64_t factor_at = FACTORED ? factor_index(grid_of(p), chunk) : 0;
    const bool reads = p.dq || p.told || p.bent || p.pulled, erases = p.dw || p.pulled, writes = p.dk || p.bent;
    float dq[KEY_SLICE / 8][4] = {}, dk[KEY_SLICE / 8][4] = {};  // GROUPED: over the v heads
    const int64_t key_t = static_cast<int64_t>(shared_heads) * KEYS, to_key = first * key_t + shared_head * KEYS + key;
#pragma unroll 1
    for (int member = 0; member < (GROUPED ? p.group : 1); member++) {
        const int head = shared_head * p.group + member;
        const int64_t place = static_cast<int64_t>(slot) * p.heads + head, value_t = static_cast<int64_t>(p.heads) * VALUES;
        const DTYPE* d_o = p.d_o + chunk.batch * p.do_b + chunk.begin * p.do_t + head * p.do_h;
        float scored[2 * BLOCKS][4] = {}, read[KEY_SLICE / 8][4] = {}, lost[KEY_SLICE / 8][4] = {}, written[KEY_SLICE / 8][4] = {}, meeting = 0.0f;
        if (member) __syncthreads();  // the member before has read its scores
        logs_of(p, chunk, head, logs);
#pragma unroll 1
        for (int value = 0; value < VALUES; value += VALUE_SLICE) {
            if (value) __syncthreads();
            if (reads || writes) {
                load_tile<SIDE, THREADS, ALIGNED>(d_os, d_o + value, p.do_t, length, VALUES - value);
                load_tile<SIDE, THREADS, ALIGNED>(updates, p.updates + first * value_t + head * VALUES + value, value_t, length, VALUES - value);
            }
            if (erases && DELTA) load_tile<SIDE, THREADS, ALIGNED>(errors, p.errors + first * value_t + head * VALUES + value, value_t, length, VALUES - value);
            cp_async_commit();
            const DTYPE* const from = reads || erases ? p.states + place * (VALUE_BLOCKS * KEY_BLOCKS * 256) : nullptr;
            const DTYPE* const to = writes || p.pulled ? p.leaving + place * (VALUE_BLOCKS * KEY_BLOCKS * 256) : nullptr;
            meeting += load_states<VALUE_SLICE>(starts, from, ends, to, value / 16, key / 16);
            cp_async_wait<0>();
            __syncthreads();
            if (reads || writes) add_scores(scored, d_os, updates, warp);
#pragma unroll(STEPS_AT_ONCE<DTYPE>)
            for (int s = 0; s < VALUE_SLICE / 16; s++) {
                Pair<DTYPE> a[4];
                if (reads) {
                    d_os.rows(a[0], a[1], a[2], a[3], 16 * warp, 16 * s);
                    add_states(read, a, starts, s);
                }
                if (erases && DELTA) {
                    errors.rows(a[0], a[1], a[2], a[3], 16 * warp, 16 * s);
                    add_states(lost, a, starts, s);
                }
                if (writes) {
                    updates.rows(a[0], a[1], a[2], a[3], 16 * warp, 16 * s);
                    add_states(written, a, ends, s);
                }
            }
        }
        __syncthreads();  // the scores lie where the values did
        const float gates[2] = {gate_at(p, chunk, head, 16 * warp + r), gate_at(p, chunk, head, 16 * warp + 8 + r)};
        const float factor = FACTORED ? load_gate<DTYPE>(p.decay, chunk.batch * p.decay_b + factor_at * p.decay_m + head * p.decay_h, p.decay_wide) : 1.0f;
        mask_scores(scored, logs, p.scale, warp);
        float own[2];
        take_diagonal(own, scored, warp);
        if (writes) store_scores(scores, scored, gates, warp);
        float told[2] = {}, past[2] = {}, taken[2] = {}, gone[2] = {}, extra = DECAYED ? exp_log(logs[SIDE - 1]) * meeting : meeting;
        if (reads) {
#pragma unroll
            for (int n = 0; n < KEY_SLICE / 8; n++)
#pragma unroll
                for (int e = 0; e < 4; e++) read[n][e] *= p.scale * (DECAYED ? exp_log(logs[16 * warp + r + e / 2 * 8]) : 1.0f);
            if (FACTORED) {
                row_products(told, queries, read, warp);
                extra += gates[0] * told[0] + gates[1] * told[1];
#pragma unroll
                for (int n = 0; n < KEY_SLICE / 8; n++)
#pragma unroll
                    for (int e = 0; e < 4; e++) read[n][e] *= factor;
            }
#pragma unroll
            for (int j = 0; j < BLOCKS; j++) {
                if (j > warp) break;
                Pair<DTYPE> a[4];
                as_operand<DTYPE>(a, scored[2 * j], scored[2 * j + 1]);
                add_states(read, a, keys, j);
            }
            if (p.bent) row_products(past, queries, read, warp);
            add_diagonal(read, keys, own[0], own[1], warp);
            if (p.told) row_products(told, queries, read, warp);
#pragma unroll
            for (int n = 0; n < KEY_SLICE / 8; n++) {
#pragma unroll
                for (int e = 0; e < 4; e++) {
                    if constexpr (GROUPED) dq[n][e] += gates[e / 2] * read[n][e];
                    else read[n][e] *= gates[e / 2];
                }
            }
            if (!GROUPED && p.dq) store_rows<KEY_SLICE, KEYS % 2 == 0>(p.dq + to_key, key_t, read, warp, length, keys_left);
        }
        if (erases) {
            if (FACTORED && DELTA && p.pulled) {
                const DTYPE* w = p.w + chunk.batch * p.w_b + chunk.begin * p.w_t + head * p.w_h + key;
#pragma unroll
                for (int n = 0; n < KEY_SLICE / 8; n++) {
#pragma unroll
                    for (int e = 0; e < 4; e++) {
                        const int token = 16 * warp + r + e / 2 * 8, at = 8 * n + 2 * c + e % 2;
                        if (token < length && at < keys_left) extra -= widen(w[token * p.w_t + at]) * lost[n][e];
                    }
                }
            }
            if (p.dw) {
#pragma unroll
                for (int n = 0; n < KEY_SLICE / 8; n++)
#pragma unroll
                    for (int e = 0; e < 4; e++) lost[n][e] *= -factor;
                const int64_t w_t = static_cast<int64_t>(p.heads) * KEYS;
                store_rows<KEY_SLICE, KEYS % 2 == 0>(p.dw + first * w_t + head * KEYS + key, w_t, lost, warp, length, keys_left);
            }
        }
        __syncthreads();
        if (writes) {
            if (DECAYED) {
#pragma unroll
                for (int n = 0; n < KEY_SLICE / 8; n++)
#pragma unroll
                    for (int e = 0; e < 4; e++) written[n][e] *= exp_between(logs[SIDE - 1], logs[16 * warp + r + e / 2 * 8]);
                row_products(gone, keys, written, warp);
            }
            float inner[KEY_SLICE / 8][4] = {};
            add_turned(inner, scores, queries, warp, length);
            row_products(taken, keys, inner, warp);
#pragma unroll
            for (int n = 0; n < KEY_SLICE / 8; n++)
#pragma unroll
                for (int e = 0; e < 4; e++) written[n][e] += inner[n][e];
            add_diagonal(written, queries, gates[0] * own[0], gates[1] * own[1], warp);
            if constexpr (GROUPED) {
#pragma unroll
                for (int n = 0; n < KEY_SLICE / 8; n++)
#pragma unroll
                    for (int e = 0; e < 4; e++) dk[n][e] += written[n][e];
            } else if (p.dk) {
                store_rows<KEY_SLICE, KEYS % 2 == 0>(p.dk + to_key, key_t, written, warp, length, keys_left);
            }
        }
        if (!p.told && !p.bent && !p.pulled) continue;
        const float of_warp = warp_sum(extra);
        if (lane_id() == 0) parts[warp] = of_warp;
        __syncthreads();
        float whole = 0.0f;
        for (int i = 0; i < BLOCKS; i++) whole += parts[i];
        const int64_t at = slice * static_cast<int64_t>(p.places) + place;
        if (p.pulled && threadIdx.x == 0) p.pulled[at] = whole;
#pragma unroll
        for (int half = 0; half < 2; half++) {
            const int token = 16 * warp + 8 * half + r;
            const float asked = quad_sum(told[half]), bent = gates[half] * quad_sum(past[half]) - quad_sum(taken[half]), left = quad_sum(gone[half]);
            if (c == 0 && p.told) p.told[at * SIDE + token] = asked;
            if (c == 0 && p.bent) p.bent[at * SIDE + token] = token == length - 1 ? bent + whole : bent;
            if (c == 0 && p.left) p.left[at * SIDE + token] = left;
        }
    }
    if constexpr (GROUPED) {
        if (p.dq) store_rows<KEY_SLICE, KEYS % 2 == 0>(p.dq + to_key, key_t, dq, warp, length, keys_left);
        if (p.dk) store_rows<KEY_SLICE, KEYS % 2 == 0>(p.dk + to_key, key_t, dk, warp, length, keys_left);
    }
}
