// S_slow, the chunk recurrence from given u and w (SPEC.md 4): S~ = d S, U' = u - w S~, o = gate (scale e^G q S~ + (tril(scale q k^T) * Gamma) U'),
// S' = e^G_C S~ + (e^(G_C - G) k)^T U'; normalised, S~ / (its norm + 1e-8) is read.
// A token and head costs C (K + V) + 6 K V FLOP and moves 3 K + 2 V numbers: bound by memory for many heads (H100, bf16, 1 x 8192, 32 heads of 128:
// 336 MB, 113 us), by the recurrence for few: a chunk waits for the one before.
// A warp owns 16 value columns of a state, transposed, in its registers from the first chunk to the last: rounded, they are the operand of w S~ and q S~
// as they stand. Warps share the chunk's tiles and the scores, and meet only for those.
//
// DTYPE; KEYS, VALUES: head_dims; SIDE: tokens of a tile, 16 to 128; WARPS; BUFFERS: chunks in shared memory, 1 or 2; DECAYED: g; FACTORED: chunk_decay;
// DELTA; NORMALIZE_READ, NORMALIZE_FINAL: the block's warps hold the whole state; ALIGNED: 16-byte copies can take all rows.
#include "chunks.cuh"
#include "tiles.cuh"

constexpr int KEY_WIDTH = KEYS <= 32 ? 32 : KEYS <= 64 ? 64 : 128, COLUMNS = WARPS < 2 ? 32 : 16 * WARPS, SLICES = (VALUES + 16 * WARPS - 1) / (16 * WARPS);
constexpr int BLOCKS = SIDE / 16, THREADS = 32 * WARPS, TRIANGLE = SIDE < 32 ? 32 : SIDE, SIZE = sizeof(DTYPE);
constexpr int KEY_BYTES = SIDE * KEY_WIDTH * SIZE, VALUE_BYTES = SIDE * COLUMNS * SIZE, CHUNK_BYTES = (DELTA ? 3 : 2) * KEY_BYTES + VALUE_BYTES;
constexpr int SCORES_BYTES = SIDE * TRIANGLE * SIZE, UPDATES_BYTES = 16 * WARPS * TRIANGLE * SIZE;

struct Params {
    const DTYPE *q, *k, *u, *w;
    const void *g, *decay, *gate;
    const float* initial;
    DTYPE* o;
    float* final;
    const void* cu_seqlens;
    int64_t q_b, q_t, q_h, k_b, k_t, k_h, u_b, u_t, u_h, w_b, w_t, w_h, g_b, g_t, g_h, decay_b, decay_m, decay_h, gate_b, gate_t, gate_h;
    int heads, group, g_wide, decay_wide, gate_wide, cu_wide, tokens, chunk_size;
    float scale;
};

using KeyTile = Tile<DTYPE, KEY_WIDTH>;
using ValueTile = Tile<DTYPE, COLUMNS>;
using TokenTile = Tile<DTYPE, TRIANGLE>;

// Tokens of a chunk with so many left.
DEVICE int tokens_from(const Params& p, int64_t left) { return left < p.chunk_size ? static_cast<int>(left) : p.chunk_size; }

// 1 / (Frobenius norm + 1e-8) of a state whose squares each thread has summed; `parts` holds one number a warp
DEVICE float one_over_norm(float squares, float* parts) {
    squares = warp_sum(squares);
    __syncthreads();
    if (lane_id() == 0) parts[threadIdx.x / 32] = squares;
    __syncthreads();
    float sum = 0.0f;
    for (int i = 0; i < WARPS; i++) sum += parts[i];
    return 1.0f / (sqrtf(sum) + 1e-8f);
}

DEVICE float squares_of(const float (&state)[KEY_WIDTH / 8][4]) {
    float sum = 0.0f;
#pragma unroll
    for (int n = 0; n < KEY_WIDTH / 8; n++)
#pragma unroll
        for (int e = 0; e < 4; e++) sum += state[n][e] * state[n][e];
    return sum;
}

DEVICE void scale_state(float (&state)[KEY_WIDTH / 8][4], float by) {
#pragma unroll
    for (int n = 0; n < KEY_WIDTH / 8; n++)
#pragma unroll
        for (int e = 0; e < 4; e++) state[n][e] *= by;
}

extern "C" __global__ void __launch_bounds__(THREADS) slow_core(const __grid_constant__ Params p) {
    SHARED_MEMORY(memory);
    const TokenTile scores{memory + BUFFERS * CHUNK_BYTES}, updates{scores.base + SCORES_BYTES};
    Log* const log_decay = reinterpret_cast<Log*>(updates.base + UPDATES_BYTES);
    float* const parts = reinterpret_cast<float*>(log_decay + SIDE);
    const int slice = blockIdx.x % SLICES, stream = blockIdx.x / SLICES, head = stream % p.heads, sequence = stream / p.heads, shared_head = head / p.group;
    const int warp = threadIdx.x / 32, lane = lane_id(), r = lane / 4, c = lane % 4, column = slice * 16 * WARPS;

    int64_t start = 0, batch = sequence, count = p.tokens, factors = 0;
    if (p.cu_seqlens) {
        batch = 0, start = load_index(p.cu_seqlens, sequence, p.cu_wide), count = load_index(p.cu_seqlens, sequence + 1, p.cu_wide) - start;
        if (FACTORED) {
            for (int i = 0; i < sequence; i++) {  // chunk_decay counts the chunks of all sequences
                const int64_t length = load_index(p.cu_seqlens, i + 1, p.cu_wide) - load_index(p.cu_seqlens, i, p.cu_wide);
                factors += (length + p.chunk_size - 1) / p.chunk_size;
            }
        }
    }
    const int chunks = static_cast<int>((count + p.chunk_size - 1) / p.chunk_size);
    const DTYPE* q = p.q + batch * p.q_b + start * p.q_t + shared_head * p.q_h;
    const DTYPE* k = p.k + batch * p.k_b + start * p.k_t + shared_head * p.k_h;
    const DTYPE* u = p.u + batch * p.u_b + start * p.u_t + head * p.u_h + column;
    const DTYPE* w = p.w + batch * p.w_b + start * p.w_t + head * p.w_h;
    const auto load = [&](int chunk) {
        if (chunk < chunks) {
            const int64_t from = static_cast<int64_t>(chunk) * p.chunk_size;
            const int length = tokens_from(p, count - from);
            unsigned char* const base = memory + chunk % BUFFERS * CHUNK_BYTES;
            load_tile<SIDE, THREADS, ALIGNED>(KeyTile{base}, q + from * p.q_t, p.q_t, length, KEYS);
            load_tile<SIDE, THREADS, ALIGNED>(KeyTile{base + KEY_BYTES}, k + from * p.k_t, p.k_t, length, KEYS);
            load_tile<SIDE, THREADS, ALIGNED>(ValueTile{base + 2 * KEY_BYTES}, u + from * p.u_t, p.u_t, length, VALUES - column);
            if (DELTA) load_tile<SIDE, THREADS, ALIGNED>(KeyTile{base + 2 * KEY_BYTES + VALUE_BYTES}, w + from * p.w_t, p.w_t, length, KEYS);
        }
        cp_async_commit();
    };
    load(0);
    if (BUFFERS == 2) load(1);

    float state[KEY_WIDTH / 8][4];
    const int64_t place = (static_cast<int64_t>(sequence) * p.heads + head) * (KEYS * VALUES);
#pragma unroll
    for (int n = 0; n < KEY_WIDTH / 8; n++) {
#pragma unroll
        for (int e = 0; e < 4; e++) {
            const int key = 8 * n + 2 * c + e % 2, value = column + 16 * warp + r + e / 2 * 8;
            state[n][e] = p.initial && key < KEYS && value < VALUES ? p.initial[place + key * VALUES + value] : 0.0f;
        }
    }

#pragma unroll 1
    for (int chunk = 0; chunk < chunks; chunk++) {
        const int64_t from = static_cast<int64_t>(chunk) * p.chunk_size, token = start + from;
        const int length = tokens_from(p, count - from);
        unsigned char* const base = memory + chunk % BUFFERS * CHUNK_BYTES;
        const KeyTile queries{base}, keys{base + KEY_BYTES}, ws{base + 2 * KEY_BYTES + VALUE_BYTES};
        const ValueTile us{base + 2 * KEY_BYTES};
        if (DECAYED && warp == 0) running_log<DTYPE>(log_decay, SIDE, p.g, batch * p.g_b + token * p.g_t + head * p.g_h, p.g_t, p.g_wide, length);
        cp_async_wait<BUFFERS - 1>();
        __syncthreads();
        // scores, a 16 x 16 block at a time
        for (int task = warp; task < BLOCKS * BLOCKS; task += WARPS) {
            const int i = task / BLOCKS, j = task % BLOCKS;
            if (j > i || 16 * i >= length) continue;
            float sums[2][4] = {};
#pragma unroll(STEPS_AT_ONCE<DTYPE>)
            for (int s = 0; s < KEY_WIDTH / 16; s++) {
                Pair<DTYPE> a[4], b[4];
                queries.rows(a[0], a[1], a[2], a[3], 16 * i, 16 * s);
                keys.rows(b[0], b[1], b[2], b[3], 16 * j, 16 * s);
                Product<DTYPE>::add(sums[0], a[0], a[1], a[2], a[3], b[0], b[2]);
                Product<DTYPE>::add(sums[1], a[0], a[1], a[2], a[3], b[1], b[3]);
            }
#pragma unroll
            for (int n = 0; n < 2; n++) {
#pragma unroll
                for (int half = 0; half < 2; half++) {
                    const int row = 16 * i + 8 * half + r, at = 16 * j + 8 * n + 2 * c;
                    float x[2];
#pragma unroll
                    for (int e = 0; e < 2; e++) {
                        x[e] = at + e <= row ? p.scale * sums[n][2 * half + e] : 0.0f;
                        if (DECAYED && at + e <= row) x[e] *= exp_between(log_decay[row], log_decay[at + e]);
                    }
                    *scores.pair_at(row, at) = Make<DTYPE>::pair_of(x[0], x[1]);
                }
            }
        }
        if (FACTORED) scale_state(state, load_gate<DTYPE>(p.decay, batch * p.decay_b + (factors + chunk) * p.decay_m + head * p.decay_h, p.decay_wide));
        const float by = NORMALIZE_READ ? one_over_norm(squares_of(state), parts) : 1.0f;
        Pair<DTYPE> read[KEY_WIDTH / 16][4];
#pragma unroll
        for (int s = 0; s < KEY_WIDTH / 16; s++) {
            float first[4], second[4];
#pragma unroll
            for (int e = 0; e < 4; e++) first[e] = by * state[2 * s][e], second[e] = by * state[2 * s + 1][e];
            as_operand<DTYPE>(read[s], first, second);
        }
        __syncthreads();
        const Log last = DECAYED ? log_decay[SIDE - 1] : Log{0.0f, 0.0f};  // tokens beyond the chunk left the sum as it was
        if (DECAYED) scale_state(state, exp_log(last));
#pragma unroll 1
        for (int i = 0; i < BLOCKS; i++) {
            if (16 * i >= length) break;
            Pair<DTYPE> a[4], b[4];
            float x[2][4] = {}, o[2][4] = {};
            if constexpr (DELTA) {
#pragma unroll
                for (int s = 0; s < KEY_WIDTH / 16; s++) {
                    ws.rows(b[0], b[1], b[2], b[3], 16 * i, 16 * s);
                    Product<DTYPE>::add(x[0], read[s][0], read[s][1], read[s][2], read[s][3], b[0], b[2]);
                    Product<DTYPE>::add(x[1], read[s][0], read[s][1], read[s][2], read[s][3], b[1], b[3]);
                }
            }
#pragma unroll
            for (int s = 0; s < KEY_WIDTH / 16; s++) {
                queries.rows(b[0], b[1], b[2], b[3], 16 * i, 16 * s);
                Product<DTYPE>::add(o[0], read[s][0], read[s][1], read[s][2], read[s][3], b[0], b[2]);
                Product<DTYPE>::add(o[1], read[s][0], read[s][1], read[s][2], read[s][3], b[1], b[3]);
            }
            us.columns(b[0], b[1], b[2], b[3], 16 * warp, 16 * i);
#pragma unroll
            for (int half = 0; half < 2; half++) {
                const int at = 16 * i + 8 * half + 2 * c;
                const float first = p.scale * (DECAYED ? exp_log(log_decay[at]) : 1.0f), second = p.scale * (DECAYED ? exp_log(log_decay[at + 1]) : 1.0f);
                const float left = DECAYED ? exp_between(last, log_decay[at]) : 1.0f, right = DECAYED ? exp_between(last, log_decay[at + 1]) : 1.0f;
#pragma unroll
                for (int e = 0; e < 2; e++) {
                    const float2 given = Make<DTYPE>::floats(b[2 * half + e]);
                    const float one = given.x - x[half][2 * e], other = given.y - x[half][2 * e + 1];
                    o[half][2 * e] *= first, o[half][2 * e + 1] *= second;
                    *updates.pair_at(16 * warp + 8 * e + r, at) = Make<DTYPE>::pair_of(one, other);
                    x[half][2 * e] = left * one, x[half][2 * e + 1] = right * other;
                }
            }
            __syncwarp();
#pragma unroll 1
            for (int j = 0; j <= i; j++) {
                updates.rows(a[0], a[1], a[2], a[3], 16 * warp, 16 * j);
                scores.rows(b[0], b[1], b[2], b[3], 16 * i, 16 * j);
                Product<DTYPE>::add(o[0], a[0], a[1], a[2], a[3], b[0], b[2]);
                Product<DTYPE>::add(o[1], a[0], a[1], a[2], a[3], b[1], b[3]);
            }
            as_operand<DTYPE>(a, x[0], x[1]);
#pragma unroll
            for (int n = 0; n < KEY_WIDTH / 16; n++) {
                keys.columns(b[0], b[1], b[2], b[3], 16 * n, 16 * i);
                Product<DTYPE>::add(state[2 * n], a[0], a[1], a[2], a[3], b[0], b[2]);
                Product<DTYPE>::add(state[2 * n + 1], a[0], a[1], a[2], a[3], b[1], b[3]);
            }
            const int64_t stride = static_cast<int64_t>(p.heads) * VALUES;
#pragma unroll
            for (int half = 0; half < 2; half++) {
                const int at = 16 * i + 8 * half;
                float gates[2] = {1.0f, 1.0f};
#pragma unroll
                for (int e = 0; e < 2; e++)
                    if (p.gate && at + 2 * c + e < length)
                        gates[e] = load_gate<DTYPE>(p.gate, batch * p.gate_b + (token + at + 2 * c + e) * p.gate_t + head * p.gate_h, p.gate_wide);
#pragma unroll
                for (int e = 0; e < 2; e++) {
                    const int value = column + 16 * warp + 8 * e;
                    DTYPE* to = p.o + ((batch * p.tokens + token + at) * p.heads + head) * VALUES + value;
                    store_turned<VALUES % 2 == 0>(to, stride, gates[0] * o[half][2 * e], gates[1] * o[half][2 * e + 1], length - at, VALUES - value);
                }
            }
        }
        __syncthreads();
        load(chunk + BUFFERS);
    }
    if (!p.final) return;
    if (NORMALIZE_FINAL) scale_state(state, one_over_norm(squares_of(state), parts));
#pragma unroll
    for (int n = 0; n < KEY_WIDTH / 8; n++) {
#pragma unroll
        for (int e = 0; e < 4; e++) {
            const int key = 8 * n + 2 * c + e % 2, value = column + 16 * warp + r + e / 2 * 8;
            if (key < KEYS && value < VALUES) p.final[place + key * VALUES + value] = state[n][e];
        }
    }
}
