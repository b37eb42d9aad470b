// dual_core without a memory across chunks, lam or none, heads of up to 32 keys, in one launch (SPEC.md 5, "flat"; 3 for the transform): per chunk
//
//   X = beta V,   c_i = k_i - beta_i sum_{m<i} D_im^2 (k_i k_m) k_m,   u_i = X_i - beta_i sum_{j<i} D_ij (k_i c_j) X_j,     D_ij = exp(G_i - G_j)
//   o_i = alpha f s sum_{j<=i} (q_i k_j) X_j  +  (1 - alpha) sg s sum_{j<=i} D_ij (q_i k_j) u_j
//
// Each of the four sums over earlier tokens is split where blocks of 16 tokens begin: inside its block a product of 16 x 16, before it a matrix of keys by
// columns, R = sum k k^T, S = sum c X^T, W = sum k X^T, U = sum k u^T, to which every block adds its tokens' part and which later blocks sum up themselves.
// A warp has a block of 16 tokens, a thread block a chunk, a head and SLICE values: warps meet three times, R (with W), S and U, and nothing else leaves
// them. Keys go in an order of their own, block b's number i being column 4 i + b, so that a lane's share of a row is one run of memory. Operands stay in registers in tf32's two parts (float32: three products, else one), split once.
// Chunk 128, head_dim 32, SLICE 8: 282 products of 2^11 FLOP and about 1300 instructions a warp, a third of the products for R in every slice; the
// floor is a launch, one read of memory and the products' latency: about 6 us. SLICE 32 costs half as many products for many chunks.
//
// DTYPE; KEYS, VALUES: head_dims; CHUNK_BLOCKS: of 16 tokens, 1 to 8; TRANSFORM: 0 none, 2 lam; SLICE: 8, 16 or 32 values; DECAYED: g; NORMED: rows of q and k become unit vectors;
// ALIGNED: four neighbours of q and k and two of v can be read at once; TF32_ONCE: products in one part.
#include "chunks.cuh"
#include "fragments.cuh"

constexpr int TILES = SLICE / 8, THREADS = 32 * CHUNK_BLOCKS, LINE = 36;  // numbers from row to row of keys: no bank is met twice
constexpr bool LAM = TRANSFORM == 2;
constexpr int GRAM = 1024, STATE = SLICE * LINE, PLACE = LAM && GRAM > STATE ? GRAM : STATE;
#ifdef TF32_ONCE
constexpr bool ONCE = true;
#else
constexpr bool ONCE = false;
#endif

struct Params {
    const DTYPE *q, *k, *v;
    const void *beta, *g, *fast, *slow, *alpha, *cu_seqlens;  // all but beta may be absent
    DTYPE* o;
    int64_t q_b, q_t, q_h, k_b, k_t, k_h, v_b, v_t, v_h, beta_b, beta_t, beta_h, g_b, g_t, g_h, fast_b, fast_t, fast_h, slow_b, slow_t, slow_h;
    int64_t alpha_b, alpha_t, alpha_h;
    int tokens, heads, group, sequences, chunk, offset, slots, beta_wide, g_wide, fast_wide, slow_wide, alpha_wide, cu_wide;
    uint32_t nothing;  // 0
    float number, scale;
};

using Sum = float[4];  // 16 x 8 in a warp: rows r and r + 8, columns 2c and 2c + 1

// x as tf32 takes it, which drops the last 13 bits itself, and what that leaves out
DEVICE uint32_t big_part(float x) { return ONCE ? tf32_bits(x) : __float_as_uint(x) & 0xffffe000u; }
DEVICE uint32_t small_part(float x) { return ONCE ? 0 : __float_as_uint(x - __uint_as_float(__float_as_uint(x) & 0xffffe000u)); }

// Operands of a product of 16 x 16 by 16 x 8, in both parts, each in the registers that the instructions want side by side.
struct Left {
    uint32_t big[2][4], small[2][4];
    // blocks (rows 0-7, first half of the inner dimension) (rows 8-15, first) (0-7, second) (8-15, second), pairs along the inner dimension.
    // `nothing` is 0: what the compiler does not know it does not move here again for every product.
    DEVICE void take(float2 a0, float2 a1, float2 a2, float2 a3, uint32_t nothing) {
        const float x[2][4] = {{a0.x, a1.x, a0.y, a1.y}, {a2.x, a3.x, a2.y, a3.y}};
#pragma unroll
        for (int i = 0; i < 8; i++) {
            const float own = __uint_as_float(__float_as_uint(x[i / 4][i % 4]) ^ nothing);
            big[i / 4][i % 4] = big_part(own), small[i / 4][i % 4] = small_part(own);
        }
    }
    DEVICE void take(const Sum (&x)[2]) {
        const float2 a0 = make_float2(x[0][0], x[0][1]), a1 = make_float2(x[0][2], x[0][3]), a2 = make_float2(x[1][0], x[1][1]), a3 = make_float2(x[1][2], x[1][3]);
        take(a0, a1, a2, a3, 0);
    }
};
struct Right {
    uint32_t big[2][2], small[2][2];
    DEVICE Right(float2 b0, float2 b1) {
        const float x[2][2] = {{b0.x, b0.y}, {b1.x, b1.y}};
#pragma unroll
        for (int i = 0; i < 4; i++) big[i / 2][i % 2] = big_part(x[i / 2][i % 2]), small[i / 2][i % 2] = small_part(x[i / 2][i % 2]);
    }
};
DEVICE void add(Sum& d, const Left& a, const Right& b) {
#pragma unroll
    for (int half = 0; half < 2; half++) {
        if constexpr (!ONCE) mma_tf32(d, a.small[half], b.big[half]), mma_tf32(d, a.big[half], b.small[half]);
        mma_tf32(d, a.big[half], b.big[half]);
    }
}
// 16 rows of 32 as left operands for either half of the inner dimension, or turned for either half of the 32
struct Rows {
    Left p[2];
    DEVICE void take(const float2 (&x)[2][4], uint32_t nothing) {
#pragma unroll
        for (int s = 0; s < 2; s++) p[s].take(x[0][2 * s], x[1][2 * s], x[0][2 * s + 1], x[1][2 * s + 1], nothing);
    }
    DEVICE void take_turned(const float2 (&x)[2][4], uint32_t nothing) {
#pragma unroll
        for (int i = 0; i < 2; i++) p[i].take(x[0][2 * i], x[0][2 * i + 1], x[1][2 * i], x[1][2 * i + 1], nothing);
    }
    // d += these rows times 8 columns of 32 numbers, pairs along them
    DEVICE void times(Sum& d, const float2 (&column)[4]) const {
#pragma unroll
        for (int s = 0; s < 2; s++) add(d, p[s], Right(column[2 * s], column[2 * s + 1]));
    }
    DEVICE void scores(Sum (&d)[2], const float2 (&other)[2][4]) const {
#pragma unroll
        for (int n = 0; n < 2; n++) times(d[n], other[n]);
    }
};

// four neighbours of a row of q or k, zeros from KEYS on
DEVICE float4 four(const DTYPE* row, int column, bool there) {
    float x[4] = {};
    if constexpr (ALIGNED) {
        if (there && column < KEYS) load_run(x, row + column);
    } else {
#pragma unroll
        for (int i = 0; i < 4; i++)
            if (there && column + i < KEYS) x[i] = widen(row[column + i]);
    }
    return make_float4(x[0], x[1], x[2], x[3]);
}
// x, of which the compiler knows nothing, as `nothing` is 0: what it does not know it does not move into place again for every product
DEVICE float unknown(float x, uint32_t nothing) { return __uint_as_float(__float_as_uint(x) ^ nothing); }
DEVICE void as_pairs(float2 (&to)[4], const float4& x, const float4& y, uint32_t nothing) {
    const float first[4] = {x.x, x.y, x.z, x.w}, second[4] = {y.x, y.y, y.z, y.w};
#pragma unroll
    for (int b = 0; b < 4; b++) to[b] = make_float2(unknown(first[b], nothing), unknown(second[b], nothing));
}
// two neighbours of a row of v, zeros from `limit` on
DEVICE float2 neighbours(const DTYPE* row, int column, int limit, bool there) {
    float x[2] = {};
    if constexpr (ALIGNED) {
        if (there && column < limit) load_run(x, row + column);
    } else {
        if (there && column < limit) x[0] = widen(row[column]);
        if (there && column + 1 < limit) x[1] = widen(row[column + 1]);
    }
    return make_float2(x[0], x[1]);
}

// A state's part of a block goes to rows of values, and comes back as a right operand.
DEVICE void store_state(float* to, const Sum& d, int key0, int value0) {
    const int r = lane_id() / 4, c = lane_id() % 4;
#pragma unroll
    for (int e = 0; e < 4; e++) to[(value0 + 2 * c + (e & 1)) * LINE + key0 + r + 8 * (e >> 1)] = d[e];
}
// The sum of the parts of blocks 0 to `blocks` - 1, each decayed by those after it; 8 values from value0 on.
DEVICE void load_state(float2 (&sum)[4], const float* parts, int place, int blocks, int value0, const float* totals, bool decayed) {
    const int r = lane_id() / 4, c = lane_id() % 4;
    const float* from = parts + (value0 + r) * LINE + 2 * c;
#pragma unroll
    for (int b = 0; b < 4; b++) sum[b] = make_float2(0.0f, 0.0f);
#pragma unroll 2
    for (int block = 0; block < blocks; block++, from += place) {
        const float by = DECAYED && decayed ? totals[block] : 1.0f;
#pragma unroll
        for (int b = 0; b < 4; b++) {
            const float2 x = *reinterpret_cast<const float2*>(from + 8 * b);
            sum[b].x = by * sum[b].x + x.x, sum[b].y = by * sum[b].y + x.y;
        }
    }
}

extern "C" __global__ void __launch_bounds__(THREADS) dual_prefix(const __grid_constant__ Params p) {
    SHARED_MEMORY(memory);
    // R and later U, W, S of every block; a warp's rows to be turned; the blocks' decays
    float *const r_parts = reinterpret_cast<float*>(memory), *const w_parts = r_parts + CHUNK_BLOCKS * PLACE, *const s_parts = w_parts + CHUNK_BLOCKS * STATE;
    float *const scratch = s_parts + (LAM ? CHUNK_BLOCKS * STATE : 0) + threadIdx.x / 32 * 16 * LINE;
    float *const totals = s_parts + (LAM ? CHUNK_BLOCKS * STATE : 0) + CHUNK_BLOCKS * 16 * LINE;
    const int warp = threadIdx.x / 32, lane = lane_id(), r = lane / 4, c = lane % 4;
    constexpr int SLICES = (VALUES + SLICE - 1) / SLICE;
    const int slice = blockIdx.x % SLICES, head = blockIdx.x / SLICES % p.heads;
    const Chunk chunk = find_chunk(Grid{p.cu_seqlens, p.cu_wide, p.sequences, p.tokens, p.chunk, p.offset, p.slots}, blockIdx.x / SLICES / p.heads);
    if (chunk.length <= 0) return;
    const int value0 = slice * SLICE, values = VALUES - value0, count = chunk.length - 16 * warp;  // tokens of this warp's block
    const int shared = p.group == 1 ? head : head / p.group;
    const int64_t first = chunk.begin + 16 * warp;
    const int earlier = count > 0 ? warp : 0;  // blocks whose parts this one sums up
    const bool handed_on = count > 16;

    // everything is on its way before anything is waited for
    const DTYPE* const q = p.q + chunk.batch * p.q_b + first * p.q_t + shared * p.q_h;
    const DTYPE* const k = p.k + chunk.batch * p.k_b + first * p.k_t + shared * p.k_h;
    const DTYPE* const v = p.v + chunk.batch * p.v_b + first * p.v_t + head * p.v_h + value0;
    float2 key[2][4], query[2][4], x_rows[TILES][2], key_turned[2][4], x_turned[TILES][2];
#pragma unroll
    for (int t = 0; t < 2; t++) {
        const int row = r + 8 * t, token = 2 * c + 8 * t;
        as_pairs(key_turned[t], four(k + token * p.k_t, 4 * r, token < count), four(k + (token + 1) * p.k_t, 4 * r, token + 1 < count), p.nothing);
        as_pairs(key[t], four(k + row * p.k_t, 8 * c, row < count), four(k + row * p.k_t, 8 * c + 4, row < count), p.nothing);
    }
#pragma unroll
    for (int n = 0; n < TILES; n++)
#pragma unroll
        for (int t = 0; t < 2; t++) {
            x_rows[n][t] = neighbours(v + (r + 8 * t) * p.v_t, 8 * n + 2 * c, values, r + 8 * t < count);
            const DTYPE* const from = v + (2 * c + 8 * t) * p.v_t + 8 * n + r;
            const bool there = 8 * n + r < values;
            x_turned[n][t].x = there && 2 * c + 8 * t < count ? widen(from[0]) : 0.0f;
            x_turned[n][t].y = there && 2 * c + 8 * t + 1 < count ? widen(from[p.v_t]) : 0.0f;
        }
    const auto gate = [&](const void* of, int64_t b, int64_t t, int64_t h, int wide, int token, float otherwise) {
        return of && token < count ? load_gate<DTYPE>(of, chunk.batch * b + (first + token) * t + head * h, wide) : otherwise;
    };
    const float beta_lane = gate(p.beta, p.beta_b, p.beta_t, p.beta_h, p.beta_wide, lane % 16, 0.0f);
    float fast_lane = gate(p.fast, p.fast_b, p.fast_t, p.fast_h, p.fast_wide, lane % 16, 1.0f), slow_lane = gate(p.slow, p.slow_b, p.slow_t, p.slow_h, p.slow_wide, lane % 16, 1.0f);
    const float alpha_lane = gate(p.alpha, p.alpha_b, p.alpha_t, p.alpha_h, p.alpha_wide, lane % 16, p.number);
    Log sum{0.0f, 0.0f};
    if constexpr (DECAYED) sum = log_of(gate(p.g, p.g_b, p.g_t, p.g_h, p.g_wide, lane % 16, 0.0f));
#pragma unroll
    for (int t = 0; t < 2; t++) {
        const int row = r + 8 * t;
        as_pairs(query[t], four(q + row * p.q_t, 8 * c, row < count), four(q + row * p.q_t, 8 * c + 4, row < count), 0);
    }

    // of tokens: `row` r and r + 8, `column` 2c, 2c + 1, 2c + 8, 2c + 9
    const auto of_lane = [&](float x, int token) { return __shfl_sync(0xffffffffu, x, token); };
    const auto column_token = [&](int i) { return 2 * c + (i & 1) + 8 * (i >> 1); };
    fast_lane *= alpha_lane * p.scale, slow_lane *= (1.0f - alpha_lane) * p.scale;
    float beta_row[2], fast_row[2], slow_row[2], beta_column[4], read[2] = {1.0f, 1.0f}, tail[4] = {1.0f, 1.0f, 1.0f, 1.0f};
    Log log_row[2], log_column[4];
#pragma unroll
    for (int t = 0; t < 2; t++) beta_row[t] = of_lane(beta_lane, r + 8 * t), fast_row[t] = of_lane(fast_lane, r + 8 * t), slow_row[t] = of_lane(slow_lane, r + 8 * t);
#pragma unroll
    for (int i = 0; i < 4; i++) beta_column[i] = of_lane(beta_lane, column_token(i));
    if constexpr (DECAYED) {
#pragma unroll
        for (int step = 1; step < 16; step *= 2) {
            const float coarse = __shfl_up_sync(0xffffffffu, sum.coarse, step, 16), fine = __shfl_up_sync(0xffffffffu, sum.fine, step, 16);
            if (lane % 16 >= step) sum.coarse += coarse, sum.fine += fine;
        }
        const Log last{of_lane(sum.coarse, 15), of_lane(sum.fine, 15)};
#pragma unroll
        for (int t = 0; t < 2; t++) log_row[t] = Log{of_lane(sum.coarse, r + 8 * t), of_lane(sum.fine, r + 8 * t)}, read[t] = exp_log(log_row[t]);
#pragma unroll
        for (int i = 0; i < 4; i++) {
            log_column[i] = Log{of_lane(sum.coarse, column_token(i)), of_lane(sum.fine, column_token(i))};
            tail[i] = exp_between(last, log_column[i]);
        }
        if (lane == 0) totals[warp] = exp_log(last);
    }
    if constexpr (NORMED) {
        float key_norm[2];
#pragma unroll
        for (int t = 0; t < 2; t++) {
            float of_key = 0.0f, of_query = 0.0f;
#pragma unroll
            for (int b = 0; b < 4; b++) {
                of_key += key[t][b].x * key[t][b].x + key[t][b].y * key[t][b].y;
                of_query += query[t][b].x * query[t][b].x + query[t][b].y * query[t][b].y;
            }
#pragma unroll
            for (int lanes = 1; lanes < 4; lanes *= 2) of_key += __shfl_xor_sync(0xffffffffu, of_key, lanes), of_query += __shfl_xor_sync(0xffffffffu, of_query, lanes);
            key_norm[t] = rsqrtf(of_key + 1e-6f);
            const float query_norm = rsqrtf(of_query + 1e-6f);
#pragma unroll
            for (int b = 0; b < 4; b++) {
                key[t][b].x *= key_norm[t], key[t][b].y *= key_norm[t];
                query[t][b].x *= query_norm, query[t][b].y *= query_norm;
            }
        }
#pragma unroll
        for (int t = 0; t < 2; t++) {
            const float first_norm = of_lane(key_norm[t], 8 * c), second_norm = of_lane(key_norm[t], 8 * c + 4);
#pragma unroll
            for (int b = 0; b < 4; b++) key_turned[t][b].x *= first_norm, key_turned[t][b].y *= second_norm;
        }
    }
    Rows keys, turned, queries;
    keys.take(key, p.nothing);
    turned.take_turned(key_turned, p.nothing);
#pragma unroll
    for (int n = 0; n < TILES; n++)
#pragma unroll
        for (int t = 0; t < 2; t++) x_turned[n][t].x *= beta_column[2 * t], x_turned[n][t].y *= beta_column[2 * t + 1];

    // d_ij *= D_ij^power, and the rows' beta; zeros from the diagonal on (`strict`) or above it
    const auto mask = [&](Sum (&d)[2], int power, bool strict) {
#pragma unroll
        for (int n = 0; n < 2; n++)
#pragma unroll
            for (int e = 0; e < 4; e++) {
                const int i = r + 8 * (e >> 1), at = 2 * n + (e & 1), j = column_token(at);
                float by = strict ? beta_row[e >> 1] : 1.0f;
                if (DECAYED && power) {
                    const float between = j <= i ? exp_between(log_row[e >> 1], log_column[at]) : 0.0f;
                    by *= power == 2 ? between * between : between;
                }
                d[n][e] = j < i || (j == i && !strict) ? by * d[n][e] : 0.0f;
            }
    };

    // this block's parts of W and R
    const auto store_part = [&](float* to, const Rows& left, int n, float2 first_half, float2 second_half) {
        const Right right(first_half, second_half);
#pragma unroll
        for (int i = 0; i < 2; i++) {
            Sum d = {};
            add(d, left.p[i], right);
            store_state(to, d, 16 * i, 8 * n);
        }
    };
#pragma unroll
    for (int n = 0; n < TILES; n++) store_part(w_parts + warp * STATE, turned, n, x_turned[n][0], x_turned[n][1]);
    Sum u[TILES];
#pragma unroll
    for (int n = 0; n < TILES; n++)
#pragma unroll
        for (int e = 0; e < 4; e++) u[n][e] = beta_row[e >> 1] * (e & 1 ? x_rows[n][e >> 1].y : x_rows[n][e >> 1].x);
    if constexpr (LAM) {
        float4* const gram = reinterpret_cast<float4*>(r_parts) + lane;
#pragma unroll
        for (int b = 0; b < 4; b++) {
            if (!handed_on) break;
            float2 late[2];
#pragma unroll
            for (int t = 0; t < 2; t++) late[t] = make_float2(tail[2 * t] * tail[2 * t] * key_turned[t][b].x, tail[2 * t + 1] * tail[2 * t + 1] * key_turned[t][b].y);
            const Right right(late[0], late[1]);
#pragma unroll
            for (int i = 0; i < 2; i++) {
                Sum d = {};
                add(d, turned.p[i], right);
                gram[warp * (PLACE / 4) + (4 * i + b) * 32] = make_float4(d[0], d[1], d[2], d[3]);
            }
        }
        // c
        Sum square[2] = {}, mixed[4] = {}, before[4] = {};
        keys.scores(square, key);
        mask(square, 2, true);
        {
            Left left;
            left.take(square);
#pragma unroll
            for (int b = 0; b < 4; b++) add(mixed[b], left, Right(key_turned[0][b], key_turned[1][b]));
        }
        __syncthreads();
        if (earlier) {
            float4 total[2][4] = {};
#pragma unroll 1
            for (int block = 0; block < earlier; block++) {
                const float by = DECAYED ? totals[block] * totals[block] : 1.0f;
#pragma unroll
                for (int i = 0; i < 8; i++) {
                    const float4 part = gram[block * (PLACE / 4) + i * 32];
                    float4& all = total[i / 4][i % 4];
                    all.x = by * all.x + part.x, all.y = by * all.y + part.y, all.z = by * all.z + part.z, all.w = by * all.w + part.w;
                }
            }
#pragma unroll
            for (int out = 0; out < 4; out++) {  // R is symmetric: its rows are a right operand's columns
                float2 column[4];
#pragma unroll
                for (int b = 0; b < 4; b++) {
                    const float4& four = total[out / 2][b];
                    column[b] = out % 2 ? make_float2(four.z, four.w) : make_float2(four.x, four.y);
                }
                keys.times(before[out], column);
            }
        }
        float2 mixed_key[2][4], mixed_turned[2][4];
#pragma unroll
        for (int b = 0; b < 4; b++)
#pragma unroll
            for (int t = 0; t < 2; t++) {
                const float by = beta_row[t] * read[t] * read[t];
                const float one = key[t][b].x - (mixed[b][2 * t] + by * before[b][2 * t]), other = key[t][b].y - (mixed[b][2 * t + 1] + by * before[b][2 * t + 1]);
                mixed_key[t][b] = make_float2(one, other);
                *reinterpret_cast<float2*>(scratch + (r + 8 * t) * LINE + 8 * b + 2 * c) = make_float2(one, other);
            }
        __syncwarp();
#pragma unroll
        for (int t = 0; t < 2; t++)
#pragma unroll
            for (int b = 0; b < 4; b++) {
                const float* const from = scratch + (8 * t + 2 * c) * LINE + 8 * b + r;
                mixed_turned[t][b] = make_float2(tail[2 * t] * from[0], tail[2 * t + 1] * from[LINE]);
            }
        // u, and this block's part of S
        Rows late;
        late.take_turned(mixed_turned, 0);
#pragma unroll
        for (int n = 0; n < TILES; n++) store_part(s_parts + warp * STATE, late, n, x_turned[n][0], x_turned[n][1]);
        Sum within[2] = {};
        keys.scores(within, mixed_key);
        mask(within, 1, true);
        Left left;
        left.take(within);
        __syncthreads();
#pragma unroll
        for (int n = 0; n < TILES; n++) {
            Sum inside = {}, entering = {};
            float2 state[4];
            add(inside, left, Right(x_turned[n][0], x_turned[n][1]));
            load_state(state, s_parts, STATE, earlier, 8 * n, totals, true);
            keys.times(entering, state);
#pragma unroll
            for (int e = 0; e < 4; e++) u[n][e] -= inside[e] + beta_row[e >> 1] * read[e >> 1] * entering[e];
        }
    }
    // u with its tokens along the inner dimension, and this block's part of U in the place of R, which nobody reads any more
    float2 u_turned[TILES][2];
    __syncwarp();
#pragma unroll
    for (int n = 0; n < TILES; n++)
#pragma unroll
        for (int t = 0; t < 2; t++) *reinterpret_cast<float2*>(scratch + (r + 8 * t) * LINE + 8 * n + 2 * c) = make_float2(u[n][2 * t], u[n][2 * t + 1]);
    __syncwarp();
#pragma unroll
    for (int n = 0; n < TILES; n++) {
        float2 late[2];
#pragma unroll
        for (int t = 0; t < 2; t++) {
            const float* const from = scratch + (8 * t + 2 * c) * LINE + 8 * n + r;
            u_turned[n][t] = make_float2(from[0], from[LINE]);
            late[t] = make_float2(tail[2 * t] * u_turned[n][t].x, tail[2 * t + 1] * u_turned[n][t].y);
        }
        store_part(r_parts + warp * PLACE, turned, n, late[0], late[1]);
    }
    // what the tokens read
    queries.take(query, p.nothing);
    Sum plain[2] = {}, decayed[2];
    queries.scores(plain, key);
#pragma unroll
    for (int n = 0; n < 2; n++)
#pragma unroll
        for (int e = 0; e < 4; e++) decayed[n][e] = plain[n][e];
    mask(plain, 0, false);
    mask(decayed, 1, false);
    Left of_fast, of_slow;
    of_fast.take(plain), of_slow.take(decayed);
    __syncthreads();
    DTYPE* const o = p.o + ((chunk.batch * p.tokens + first) * p.heads + head) * static_cast<int64_t>(VALUES) + value0;
#pragma unroll
    for (int n = 0; n < TILES; n++) {
        Sum fast = {}, slow = {}, entering = {};
        float2 state[4];
        add(fast, of_fast, Right(x_turned[n][0], x_turned[n][1]));
        add(slow, of_slow, Right(u_turned[n][0], u_turned[n][1]));
        load_state(state, w_parts, STATE, earlier, 8 * n, totals, false);
        queries.times(fast, state);
        load_state(state, r_parts, PLACE, earlier, 8 * n, totals, true);
        queries.times(entering, state);
#pragma unroll
        for (int t = 0; t < 2; t++) {
            if (r + 8 * t >= count) continue;
            DTYPE* const to = o + static_cast<int64_t>(r + 8 * t) * p.heads * VALUES + 8 * n + 2 * c;
            const float one = fast_row[t] * fast[2 * t] + slow_row[t] * (slow[2 * t] + read[t] * entering[2 * t]);
            const float other = fast_row[t] * fast[2 * t + 1] + slow_row[t] * (slow[2 * t + 1] + read[t] * entering[2 * t + 1]);
            const int left = values - 8 * n - 2 * c;
            if (ALIGNED) {
                if (left > 0) *reinterpret_cast<Pair<DTYPE>*>(to) = Make<DTYPE>::pair_of(one, other);
            } else {
                if (left > 0) to[0] = narrow<DTYPE>(one);
                if (left > 1) to[1] = narrow<DTYPE>(other);
            }
        }
    }
}
