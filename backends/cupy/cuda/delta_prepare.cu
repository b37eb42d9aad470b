// What the exact gated delta rule needs of a block of tokens before its state is known, blocks side by side (SPEC.md 3, 4; delta_blocks.cuh has the names).
// With D = diag(e^G): (I + D L D^-1)^-1 = D (I + L)^-1 D^-1, so the inverse of I + L, L = stril(beta k k^T), is taken without gates, and every exponent stays <= 0:
// its 16 x 16 diagonal squares by substitution, the others by products from the diagonal down, all in float32: on similar keys 16 bits would be lost in it.
// A block and head costs 2 SIDE^2 KEYS FLOP below the diagonals and reads 2 SIDE KEYS numbers, writes SIDE^2: bound by memory (H100, bf16, 1 x 8192,
// 16/32 heads of 128: 110 MB, 37 us). A warp takes 16 rows of the products, then 16 columns of the inverse, transposed, alone.
//
// DTYPE; KEYS, VALUES: head_dims; SIDE: tokens of a block, 16 to 64; ALIGNED: 16-byte copies can take the rows of q and k;
// EVENLY: A' is rounded up or down by its place, so that errors of equal numbers in a diagonal cancel: gradients are small differences of sums over it.
#include "delta_blocks.cuh"
#include "inverse.cuh"
#include "rounding.cuh"

constexpr int THREADS = 2 * SIDE;
constexpr int SPACE_BYTES = 2 * (KEY_BYTES > SQUARE_BYTES ? KEY_BYTES : SQUARE_BYTES);

struct Params {
    const DTYPE *q, *k;
    const void *beta, *g, *gate;
    DTYPE *inverses, *scores;
    float* lines;
    const void* cu_seqlens;
    int64_t q_b, q_t, q_h, k_b, k_t, k_h, beta_b, beta_t, beta_h, g_b, g_t, g_h, gate_b, gate_t, gate_h;
    int heads, group, beta_wide, g_wide, gate_wide, cu_wide, sequences, tokens, slots, l2norm;
    float scale;
};

using Triangle = Tile<float, TRIANGLE>;

// the inverse norms of 2 x SIDE rows of the keys and queries, two threads a row
DEVICE void inverse_norms(float* norms, const KeyTile& tile) {
    const int row = threadIdx.x / 2;
    float sum = 0.0f;
#pragma unroll 4
    for (int i = 0; i < KeyTile::PIECES / 2; i++) {
        const DTYPE* x = reinterpret_cast<const DTYPE*>(tile.piece(row, 2 * i + threadIdx.x % 2));
#pragma unroll
        for (int j = 0; j < PIECE; j++) sum += widen(x[j]) * widen(x[j]);
    }
    sum += __shfl_xor_sync(0xffffffffu, sum, 1);
    norms[row] = rsqrtf(sum + 1e-6f);
}

extern "C" __global__ void __launch_bounds__(THREADS) delta_prepare(const __grid_constant__ Params p) {
    SHARED_MEMORY(memory);
    const KeyTile keys{memory}, queries{memory + KEY_BYTES};
    const Square scores{memory}, inverse{memory + SQUARE_BYTES};  // later, in the place of both
    const Triangle triangle{memory + SPACE_BYTES};
    float* const diagonals = reinterpret_cast<float*>(triangle.base + SIDE * TRIANGLE * 4);
    Log* const logs = reinterpret_cast<Log*>(diagonals + BLOCKS * 16 * LINE);
    float *const beta = reinterpret_cast<float*>(logs + SIDE), *const through = beta + SIDE, *const key_norms = through + SIDE, *const query_norms = key_norms + SIDE;

    const int head = blockIdx.x % p.heads, warp = threadIdx.x / 32, lane = lane_id(), r = lane / 4, c = lane % 4, t = threadIdx.x;
    const int slot = blockIdx.x / p.heads;
    const Chunk chunk = find_chunk(Grid{p.cu_seqlens, p.cu_wide, p.sequences, p.tokens, SIDE, 0, p.slots}, slot);
    if (chunk.length == 0) return;
    const int64_t place = static_cast<int64_t>(slot) * p.heads + head;
    copy_rows<SIDE, THREADS, ALIGNED>(keys, p.k + chunk.batch * p.k_b + chunk.begin * p.k_t + head / p.group * p.k_h, p.k_t, chunk.length, KEYS);
    copy_rows<SIDE, THREADS, ALIGNED>(queries, p.q + chunk.batch * p.q_b + chunk.begin * p.q_t + head / p.group * p.q_h, p.q_t, chunk.length, KEYS);
    cp_async_commit();
    if (warp == 0) running_log<DTYPE>(logs, SIDE, p.g, chunk.batch * p.g_b + chunk.begin * p.g_t + head * p.g_h, p.g_t, p.g_wide, chunk.length);
    if (t < SIDE) {
        const bool here = t < chunk.length;
        const int64_t token = chunk.begin + t;
        beta[t] = here ? load_gate<DTYPE>(p.beta, chunk.batch * p.beta_b + token * p.beta_t + head * p.beta_h, p.beta_wide) : 0.0f;
        through[t] = !here ? 0.0f : p.gate ? p.scale * load_gate<DTYPE>(p.gate, chunk.batch * p.gate_b + token * p.gate_t + head * p.gate_h, p.gate_wide) : p.scale;
        key_norms[t] = query_norms[t] = 1.0f;
    }
    cp_async_wait<0>();
    __syncthreads();
    if (p.l2norm) {
        inverse_norms(key_norms, keys);
        inverse_norms(query_norms, queries);
        __syncthreads();
    }
    if (t < SIDE) {
        float* const line = p.lines + place * LINES + t;
        const Log last = logs[SIDE - 1];
        const float decay = exp_log(logs[t]);
        line[WEIGHT] = beta[t];
        line[LOST] = beta[t] * decay * key_norms[t];
        line[WRITE] = exp_between(last, logs[t]) * key_norms[t];
        line[READ] = through[t] * decay * query_norms[t];
        if (t < 4) line[TOTAL] = exp_log(last);
    }

    float kk[2 * BLOCKS][4] = {}, qk[2 * BLOCKS][4] = {};
#pragma unroll(STEPS_AT_ONCE<DTYPE>)
    for (int s = 0; s < KEY_STEPS; s++) {
        Pair<DTYPE> a[4], q[4];
        keys.rows(a[0], a[1], a[2], a[3], 16 * warp, 16 * s);
        queries.rows(q[0], q[1], q[2], q[3], 16 * warp, 16 * s);
#pragma unroll
        for (int j = 0; j < BLOCKS; j++) {
            if (j > warp) break;
            Pair<DTYPE> b0, b1, b2, b3;
            keys.right_rows(b0, b1, b2, b3, 16 * j, 16 * s);
            Product<DTYPE>::add(kk[2 * j], a[0], a[1], a[2], a[3], b0, b1);
            Product<DTYPE>::add(kk[2 * j + 1], a[0], a[1], a[2], a[3], b2, b3);
            Product<DTYPE>::add(qk[2 * j], q[0], q[1], q[2], q[3], b0, b1);
            Product<DTYPE>::add(qk[2 * j + 1], q[0], q[1], q[2], q[3], b2, b3);
        }
    }
    __syncthreads();
    float* const mine = diagonals + warp * 16 * LINE;
    Log row_logs[2];
    float weight[2], out[2];
#pragma unroll
    for (int half = 0; half < 2; half++) {
        const int i = 16 * warp + 8 * half + r;
        row_logs[half] = logs[i], weight[half] = -beta[i] * key_norms[i], out[half] = through[i] * query_norms[i];
    }
#pragma unroll
    for (int n = 0; n < 2 * BLOCKS; n++) {
        if (n > 2 * warp + 1) break;
        const int j = 8 * n + 2 * c;
        const float4 column_logs = *reinterpret_cast<const float4*>(logs + j);
        const float2 norms = two(key_norms + j);
#pragma unroll
        for (int half = 0; half < 2; half++) {
            const int i = 16 * warp + 8 * half + r;
            // above the diagonal an exponential may be infinite, and is not taken
            const float first_decay = exp_between(row_logs[half], Log{column_logs.x, column_logs.y}), second_decay = exp_between(row_logs[half], Log{column_logs.z, column_logs.w});
            const float first = j < i ? weight[half] * norms.x * kk[n][2 * half] : 0.0f, second = j + 1 < i ? weight[half] * norms.y * kk[n][2 * half + 1] : 0.0f;
            const float first_score = j <= i ? out[half] * norms.x * first_decay * qk[n][2 * half] : 0.0f;
            const float second_score = j + 1 <= i ? out[half] * norms.y * second_decay * qk[n][2 * half + 1] : 0.0f;
            if (n < 2 * warp) *triangle.pair_at(16 * warp, 8 * half + r, j) = make_float2(first, second);
            else *reinterpret_cast<float2*>(mine + (8 * half + r) * LINE + j - 16 * warp) = make_float2(-first, -second);
            *scores.pair_at(16 * warp, 8 * half + r, j) = Make<DTYPE>::pair_of(first_score, second_score);
        }
    }
    invert_block(mine, triangle, Tile<float, 32>{}, 16 * warp);
    __syncthreads();

    // columns 16 warp to 16 warp + 15 of the inverse, transposed, from the diagonal down
    const Log mine_logs[2] = {logs[16 * warp + r], logs[16 * warp + 8 + r]};
    float2 solved[BLOCKS][4];
#pragma unroll
    for (int i = 0; i < BLOCKS; i++) {
        if (i < warp) continue;
        float x[2][4] = {};
        float2 y[4], b[4];
        if (i == warp) {
#pragma unroll
            for (int half = 0; half < 2; half++)
#pragma unroll
                for (int e = 0; e < 4; e++) x[half][e] = r + e / 2 * 8 == 8 * half + 2 * c + e % 2 ? 1.0f : 0.0f;
        }
#pragma unroll
        for (int j = 0; j < i; j++) {
            if (j < warp) continue;
            triangle.right_rows(b[0], b[1], b[2], b[3], 16 * i, 16 * j);
            Product<float>::add(x[0], solved[j][0], solved[j][1], solved[j][2], solved[j][3], b[0], b[1]);
            Product<float>::add(x[1], solved[j][0], solved[j][1], solved[j][2], solved[j][3], b[2], b[3]);
        }
        as_operand<float>(y, x[0], x[1]);
#pragma unroll
        for (int e = 0; e < 4; e++) x[0][e] = x[1][e] = 0.0f;
        triangle.right_rows(b[0], b[1], b[2], b[3], 16 * i, 16 * i);
        Product<float>::add(x[0], y[0], y[1], y[2], y[3], b[0], b[1]);
        Product<float>::add(x[1], y[0], y[1], y[2], y[3], b[2], b[3]);
        as_operand<float>(solved[i], x[0], x[1]);
#pragma unroll
        for (int half = 0; half < 2; half++) {
            const int row = 16 * i + 8 * half + 2 * c;
            const float4 now = *reinterpret_cast<const float4*>(logs + row);
#pragma unroll
            for (int e = 0; e < 2; e++) {
                const int column = 16 * warp + 8 * e + r;
                const float first = x[half][2 * e] * exp_between(Log{now.x, now.y}, mine_logs[e]), second = x[half][2 * e + 1] * exp_between(Log{now.z, now.w}, mine_logs[e]);
                put_turned(inverse, 16 * i + 8 * half, 16 * warp + 8 * e, column <= row ? evenly(first, row, column) : 0.0f, column <= row + 1 ? evenly(second, row + 1, column) : 0.0f);
            }
        }
    }
    __syncthreads();
    store_square<THREADS>(scores, p.scores + place * (SIDE * SIDE));
    store_square<THREADS>(inverse, p.inverses + place * (SIDE * SIDE));
}
