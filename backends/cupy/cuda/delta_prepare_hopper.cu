// What delta_prepare.cu computes, with its formulas, on Hopper for heads of 128 keys in 16 bits, by half of its instructions: 128 threads have a
// block of 64 tokens of a q/k head and up to EACH of its v heads.
//
// q k^T and k k^T are a warpgroup's products, each warp with 16 rows, 64 columns. Below the diagonal's 16 x 16 squares Gamma is a number of the row times one of the
// column, e^(G_i - G_b) e^(G_b - G_j), both <= 1, b the first token of i's square; on the diagonal it is taken as it is. A warp inverts its diagonal square by
// substitution in float32, then the squares of its 16 columns follow downwards, transposed, T_iw = T_ii sum_j -L_ij T_jw, by products of numbers kept as two of DTYPE,
// the second one what rounding to the first left out. The product of two second ones is left out: errors of about 2^-16 of a factor in bfloat16, 2^-21 in float16.
//
// A block and v head takes 4,800 instructions of warps, and with two v heads 27 KB of memory: H100, 1 x 8192, 16/32 heads of 128, 21 us of issuing, 110 MB, 37 us.
//
// DTYPE: Bfloat or Half; NORMALIZED: q and k are taken at length 1; EVENLY: see delta_prepare.cu.
#define KEYS 128
#define VALUES 128
#define SIDE 64
#include "delta_blocks.cuh"
#include "hopper_rows.cuh"
#include "inverse.cuh"
#include "rounding.cuh"

constexpr int THREADS = 128, EACH = 2, KEYS_AT = 0, QUERIES_AT = 2 * SQUARE_BYTES;
// 16 x 16 squares, both parts of their numbers side by side: those of -L below the diagonal, then the inverse's on it. Of each warp alone: a diagonal square of L in
// float32, or four squares on their way to device memory.
constexpr int PART_BYTES = 1024, LINKS_AT = 4 * SQUARE_BYTES, OWN_INVERSES_AT = LINKS_AT + 6 * PART_BYTES, OWN_AT = OWN_INVERSES_AT + 4 * PART_BYTES, OWN_BYTES = 2 * PART_BYTES;
// Lines of a v head: G as two numbers; beta; scale times the gate; e^(G_i - G_b); e^(G_b - G_j) for the second, third and fourth square's b. Then inverse norms of k and q.
constexpr int LOGS = 0, BETA = 128, THROUGH = 192, ROW = 256, COLUMN = 320, HEAD_LINES = 512, NORMS_AT = OWN_AT + 4 * OWN_BYTES + EACH * HEAD_LINES * 4;
static_assert(16 * LINE * 4 <= OWN_BYTES, "a square in float32");
static_assert(NORMS_AT + 2 * SIDE * 4 <= 57344, "four blocks fit a processor");

struct Params {
    const DTYPE *q, *k;
    const void *beta, *g, *gate;
    DTYPE *inverses, *scores;
    float* lines;
    const void* cu_seqlens;
    int64_t q_b, q_t, q_h, k_b, k_t, k_h, beta_b, beta_t, beta_h, g_b, g_t, g_h, gate_b, gate_t, gate_h;
    int heads, group, beta_wide, g_wide, gate_wide, cu_wide, sequences, tokens, slots, each;
    unsigned groups, parts;  // q/k heads, blocks that share one
    float scale;
};

using Sums = float[32];
using Parts = Tile<DTYPE, 32>;
using Operand = uint32_t[4];

// the inverse norms of 64 rows, two threads a row
DEVICE void inverse_norms(float* norms, const unsigned char* rows) {
    const int row = threadIdx.x / 2;
    const Tile<DTYPE, 64> half{const_cast<unsigned char*>(rows) + threadIdx.x % 2 * SQUARE_BYTES};
    float sum = 0.0f;
#pragma unroll
    for (int i = 0; i < 8; i++) {
        const uint4 x = *reinterpret_cast<const uint4*>(half.piece(row, i));
        const uint32_t words[4] = {x.x, x.y, x.z, x.w};
#pragma unroll
        for (int j = 0; j < 4; j++) {
            const float2 two = unpair<DTYPE>(words[j]);
            sum += two.x * two.x + two.y * two.y;
        }
    }
    sum += __shfl_xor_sync(0xffffffffu, sum, 1);
    norms[row] = rsqrtf(sum + 1e-6f);
}

// sums += a square times another, of which `first` and `second` are both parts; the square's as well
DEVICE void add_product(float (&sums)[2][4], const Operand& high, const Operand& low, const Operand& first, const Operand& second) {
#pragma unroll
    for (int n = 0; n < 2; n++) {
        const uint32_t a[2] = {first[2 * n], first[2 * n + 1]}, b[2] = {second[2 * n], second[2 * n + 1]};
        mma<DTYPE>(sums[n], low, a);
        mma<DTYPE>(sums[n], high, b);
        mma<DTYPE>(sums[n], high, a);
    }
}
DEVICE void as_parts(Operand& high, Operand& low, const float (&x)[2][4]) {
#pragma unroll
    for (int i = 0; i < 4; i++) {
        const float first = x[i / 2][i % 2 * 2], second = x[i / 2][i % 2 * 2 + 1];
        high[i] = pair<DTYPE>(first, second);
        low[i] = Make<DTYPE>::rest(first, second, high[i]);
    }
}
// a square of this warp's four on their way; turned: from its transposed one
DEVICE void put(unsigned char* own, int index, const Operand& x) {
    stmatrix_x4(Parts{own + index / 2 * PART_BYTES}.piece(lane_id() % 16, index % 2 * 2 + lane_id() / 16), x);
}
DEVICE void put_turned(unsigned char* own, int index, const Operand& x) {
    const int lane = lane_id();
    stmatrix_x4_trans(Parts{own + index / 2 * PART_BYTES}.piece(lane % 8 + lane / 16 * 8, index % 2 * 2 + lane / 8 % 2), x);
}
// 16 rows of SIDE numbers from `to` on take it
DEVICE void send(DTYPE* to, unsigned char* own, int index) {
    const int row = lane_id() / 2, piece = lane_id() % 2;
    *reinterpret_cast<uint4*>(to + row * SIDE + piece * 8) = *reinterpret_cast<const uint4*>(Parts{own + index / 2 * PART_BYTES}.piece(row, index % 2 * 2 + piece));
}

extern "C" __global__ void __launch_bounds__(THREADS, 4) delta_prepare_hopper(const __grid_constant__ Params p) {
    SHARED_MEMORY(memory);
    const int warp = __shfl_sync(0xffffffffu, threadIdx.x / 32, 0), lane = lane_id(), r = lane / 4, c = lane % 4;
    const int part = blockIdx.x % p.parts, shared = blockIdx.x / p.parts % p.groups, slot = blockIdx.x / p.parts / p.groups;
    const int first_head = shared * p.group + part * p.each, count = min(p.each, p.group - part * p.each);
    const Chunk chunk = find_chunk(Grid{p.cu_seqlens, p.cu_wide, p.sequences, p.tokens, SIDE, 0, p.slots}, slot);
    if (chunk.length == 0) return;
    {
        const DTYPE* const rows = warp < 2 ? p.k + chunk.batch * p.k_b + chunk.begin * p.k_t + shared * p.k_h : p.q + chunk.batch * p.q_b + chunk.begin * p.q_t + shared * p.q_h;
        load_rows(memory + warp * SQUARE_BYTES, rows + warp % 2 * 64, warp < 2 ? p.k_t : p.q_t, chunk.length);
        cp_async_commit();
    }
    float* const all_lines = reinterpret_cast<float*>(memory + OWN_AT + 4 * OWN_BYTES);
    float *const key_norms = reinterpret_cast<float*>(memory + NORMS_AT), *const query_norms = key_norms + SIDE;
    if (warp < count) {
        const int head = first_head + warp;
        Log* const logs = reinterpret_cast<Log*>(all_lines + warp * HEAD_LINES + LOGS);
        running_log<DTYPE>(logs, SIDE, p.g, chunk.batch * p.g_b + chunk.begin * p.g_t + head * p.g_h, p.g_t, p.g_wide, chunk.length);
    }
    const int mine = threadIdx.x / SIDE, token = threadIdx.x % SIDE;  // a v head and a token of this thread's
    float* const line = all_lines + mine * HEAD_LINES;
    if (mine < count) {
        const bool here = token < chunk.length;
        const int64_t at = chunk.begin + token;
        const int head = first_head + mine;
        line[BETA + token] = here ? load_gate<DTYPE>(p.beta, chunk.batch * p.beta_b + at * p.beta_t + head * p.beta_h, p.beta_wide) : 0.0f;
        line[THROUGH + token] = !here ? 0.0f : p.gate ? p.scale * load_gate<DTYPE>(p.gate, chunk.batch * p.gate_b + at * p.gate_t + head * p.gate_h, p.gate_wide) : p.scale;
    }
    cp_async_wait<0>();
    fence_for_products();
    __syncthreads();
    if constexpr (NORMALIZED) {
        inverse_norms(key_norms, memory + KEYS_AT);
        inverse_norms(query_norms, memory + QUERIES_AT);
        __syncthreads();
    }
    if (mine < count) {
        const Log* const logs = reinterpret_cast<const Log*>(line + LOGS);
        const Log own = logs[token], last = logs[SIDE - 1];
        const float decay = exp_log(own), key_norm = NORMALIZED ? key_norms[token] : 1.0f, query_norm = NORMALIZED ? query_norms[token] : 1.0f;
        float* const to = p.lines + (static_cast<int64_t>(slot) * p.heads + first_head + mine) * LINES + token;
        to[WEIGHT] = line[BETA + token];
        to[LOST] = line[BETA + token] * decay * key_norm;
        to[WRITE] = exp_between(last, own) * key_norm;
        to[READ] = line[THROUGH + token] * decay * query_norm;
        if (token < 4) to[TOTAL] = exp_log(last);
        line[ROW + token] = exp_between(own, logs[token / 16 * 16]);
#pragma unroll
        for (int i = 1; i < BLOCKS; i++)
            if (token < 16 * i) line[COLUMN + (i - 1) * SIDE + token] = exp_between(logs[16 * i], own);
    }
    __syncthreads();

    unsigned char* const on_their_way = memory + OWN_AT + warp * OWN_BYTES;
#pragma unroll 1
    for (int h = 0; h < count; h++) {
        const int64_t place = static_cast<int64_t>(slot) * p.heads + first_head + h;
        const float* const lines = all_lines + h * HEAD_LINES;
        const Log* const logs = reinterpret_cast<const Log*>(lines + LOGS);
        Sums kk, qk;
        const uint64_t k = operand(memory + KEYS_AT), q = operand(memory + QUERIES_AT);
        products_begin();
        product<DTYPE, BY_ROWS, BY_ROWS, false>(qk, q, k);
        product<DTYPE, BY_ROWS, BY_ROWS, false>(kk, k, k);
#pragma unroll
        for (int s = 1; s < KEY_STEPS; s++) {
            const int on = s / 4 * SQUARE_BYTES + s % 4 * FURTHER_IN_ROWS;
            product<DTYPE, BY_ROWS, BY_ROWS, true>(qk, further(q, on), further(k, on));
            product<DTYPE, BY_ROWS, BY_ROWS, true>(kk, further(k, on), further(k, on));
        }
        products_commit();
        Log row_logs[2];
        float weight[2], out[2], out_below[2];
#pragma unroll
        for (int half = 0; half < 2; half++) {
            const int i = 16 * warp + 8 * half + r;
            row_logs[half] = logs[i], weight[half] = lines[BETA + i], out[half] = lines[THROUGH + i];
            if constexpr (NORMALIZED) weight[half] *= key_norms[i], out[half] *= query_norms[i];
            out_below[half] = out[half] * lines[ROW + i];
        }
        products_wait<0>();
        settled(qk), settled(kk);

        // this warp's rows of the scores and of L: the squares below the diagonal, then the one on it
        Operand score;
        float square[2][4];
#pragma unroll
        for (int t = 0; t < BLOCKS; t++) {
            if (t < warp) {
                Operand below, high, low;
#pragma unroll
                for (int n = 0; n < 2; n++) {
                    const int j = 16 * t + 8 * n + 2 * c;
                    float2 norm = make_float2(1.0f, 1.0f), by = two(lines + COLUMN + (warp - 1) * SIDE + j);
                    if constexpr (NORMALIZED) norm = two(key_norms + j), by.x *= norm.x, by.y *= norm.y;
#pragma unroll
                    for (int half = 0; half < 2; half++) {
                        const int at = 8 * t + 4 * n + 2 * half;
                        below[2 * n + half] = pair<DTYPE>(out_below[half] * by.x * qk[at], out_below[half] * by.y * qk[at + 1]);
                        const float first = -weight[half] * norm.x * kk[at], second = -weight[half] * norm.y * kk[at + 1];
                        high[2 * n + half] = pair<DTYPE>(first, second);
                        low[2 * n + half] = Make<DTYPE>::rest(first, second, high[2 * n + half]);
                    }
                }
                put(on_their_way, t, below);
                unsigned char* const to = memory + LINKS_AT + (warp * (warp - 1) / 2 + t) * PART_BYTES;
                put(to, 0, high), put(to, 1, low);
            } else if (t == warp) {
#pragma unroll
                for (int n = 0; n < 2; n++) {
                    const int j = 8 * n + 2 * c;  // of this square
                    const float4 column_logs = *reinterpret_cast<const float4*>(logs + 16 * t + j);
                    float2 norm = make_float2(1.0f, 1.0f);
                    if constexpr (NORMALIZED) norm = two(key_norms + 16 * t + j);
#pragma unroll
                    for (int half = 0; half < 2; half++) {
                        const int i = 8 * half + r, at = 8 * t + 4 * n + 2 * half;
                        // above the diagonal an exponential may be infinite, and is not taken
                        const float first_decay = exp_between(row_logs[half], Log{column_logs.x, column_logs.y}), second_decay = exp_between(row_logs[half], Log{column_logs.z, column_logs.w});
                        score[2 * n + half] = pair<DTYPE>(j <= i ? out[half] * norm.x * first_decay * qk[at] : 0.0f, j + 1 <= i ? out[half] * norm.y * second_decay * qk[at + 1] : 0.0f);
                        square[n][2 * half] = j < i ? weight[half] * norm.x * kk[at] : 0.0f;
                        square[n][2 * half + 1] = j + 1 < i ? weight[half] * norm.y * kk[at + 1] : 0.0f;
                    }
                }
            }
        }
        put(on_their_way, warp, score);
        __syncwarp();
        DTYPE* const scores = p.scores + place * (SIDE * SIDE) + 16 * warp * SIDE;
#pragma unroll
        for (int t = 0; t < BLOCKS; t++)
            if (t <= warp) send(scores + 16 * t, on_their_way, t);
        __syncwarp();
        float* const rows = reinterpret_cast<float*>(on_their_way);
#pragma unroll
        for (int n = 0; n < 2; n++)
#pragma unroll
            for (int half = 0; half < 2; half++)
                *reinterpret_cast<float2*>(rows + (8 * half + r) * LINE + 8 * n + 2 * c) = make_float2(square[n][2 * half], square[n][2 * half + 1]);
        float x[16];
        invert_column(x, rows);
        // transposed, a column of the inverse a row here; by the second half of the warp what rounding left out
        const float left_out = lane < 16 ? 0.0f : 1.0f;
        uint32_t column[8];
#pragma unroll
        for (int i = 0; i < 8; i++) {
            const float2 high = unpair<DTYPE>(pair<DTYPE>(x[2 * i], x[2 * i + 1]));
            column[i] = pair<DTYPE>(x[2 * i] - left_out * high.x, x[2 * i + 1] - left_out * high.y);
        }
#pragma unroll
        for (int i = 0; i < 2; i++)
            *reinterpret_cast<uint4*>(Parts{memory + OWN_INVERSES_AT + warp * PART_BYTES}.piece(lane % 16, lane / 16 * 2 + i)) = make_uint4(column[4 * i], column[4 * i + 1], column[4 * i + 2], column[4 * i + 3]);
        __syncthreads();

        // columns 16 warp to 16 warp + 15 of the inverse, transposed, from the diagonal down
        Operand high[BLOCKS], low[BLOCKS];
        const float mine_below[2][3] = {{lines[COLUMN + 16 * warp + r], lines[COLUMN + SIDE + 16 * warp + r], lines[COLUMN + 2 * SIDE + 16 * warp + r]},
                                        {lines[COLUMN + 16 * warp + 8 + r], lines[COLUMN + SIDE + 16 * warp + 8 + r], lines[COLUMN + 2 * SIDE + 16 * warp + 8 + r]}};
#pragma unroll
        for (int i = 0; i < BLOCKS; i++) {
            if (i < warp) continue;
            float solved[2][4] = {};
            const Parts diagonal{memory + OWN_INVERSES_AT + i * PART_BYTES};
            if (i == warp) {
                diagonal.rows(high[i][0], high[i][1], high[i][2], high[i][3], 0, 0);
                diagonal.rows(low[i][0], low[i][1], low[i][2], low[i][3], 0, 16);
                const Log mine_logs[2] = {logs[16 * warp + r], logs[16 * warp + 8 + r]};
#pragma unroll
                for (int half = 0; half < 2; half++) {
                    const int row = 8 * half + 2 * c;
                    const float4 now = *reinterpret_cast<const float4*>(logs + 16 * warp + row);
#pragma unroll
                    for (int e = 0; e < 2; e++) {
                        const float2 whole = unpair<DTYPE>(high[i][2 * half + e]), rest = unpair<DTYPE>(low[i][2 * half + e]);
                        const int column = 8 * e + r;
                        const float first = exp_between(Log{now.x, now.y}, mine_logs[e]), second = exp_between(Log{now.z, now.w}, mine_logs[e]);
                        solved[half][2 * e] = column <= row ? (whole.x + rest.x) * first : 0.0f;
                        solved[half][2 * e + 1] = column <= row + 1 ? (whole.y + rest.y) * second : 0.0f;
                    }
                }
            } else {
                float sums[2][4] = {};
#pragma unroll
                for (int j = 0; j < i; j++) {
                    if (j < warp) continue;
                    const Parts link{memory + LINKS_AT + (i * (i - 1) / 2 + j) * PART_BYTES};
                    Operand first, second;
                    link.right_rows(first[0], first[1], first[2], first[3], 0, 0);
                    link.right_rows(second[0], second[1], second[2], second[3], 0, 16);
                    add_product(sums, high[j], low[j], first, second);
                }
                Operand sums_high, sums_low, first, second;
                as_parts(sums_high, sums_low, sums);
                diagonal.right_columns(first[0], first[1], first[2], first[3], 0, 0);
                diagonal.right_columns(second[0], second[1], second[2], second[3], 16, 0);
                add_product(solved, sums_high, sums_low, first, second);
                if (i < BLOCKS - 1) as_parts(high[i], low[i], solved);
#pragma unroll
                for (int half = 0; half < 2; half++) {
                    const float2 by = two(lines + ROW + 16 * i + 8 * half + 2 * c);
#pragma unroll
                    for (int e = 0; e < 2; e++) {
                        solved[half][2 * e] *= by.x * mine_below[e][i - 1];
                        solved[half][2 * e + 1] *= by.y * mine_below[e][i - 1];
                    }
                }
            }
            Operand turned;
#pragma unroll
            for (int half = 0; half < 2; half++)
#pragma unroll
                for (int e = 0; e < 2; e++) {
                    const int row = 16 * i + 8 * half + 2 * c, column = 16 * warp + 8 * e + r;
                    turned[2 * half + e] = pair<DTYPE>(evenly(solved[half][2 * e], row, column), evenly(solved[half][2 * e + 1], row + 1, column));
                }
            put_turned(on_their_way, i, turned);
        }
        __syncwarp();
        DTYPE* const inverses = p.inverses + place * (SIDE * SIDE) + 16 * warp;
#pragma unroll
        for (int i = 0; i < BLOCKS; i++)
            if (i >= warp) send(inverses + 16 * i * SIDE, on_their_way, i);
        __syncthreads();
    }
}
