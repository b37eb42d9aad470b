// dual_core without a memory across chunks, in one launch (SPEC.md 5, "flat"; 3 for the transforms): per chunk of up to 128 tokens
//
//   X = beta V,   o = alpha f tril(s Q K^T) X  +  (1 - alpha) sg (tril(s Q K^T) D) u,     D_ij = exp(G_i - G_j)
//   u = X                                                      none
//   u = (I + stril(beta_i k_i k_j D_ij))^-1 X                  exact: blocks of 16 rows one after the other, the diagonal ones by substitution in float32
//   u = X - stril(beta_i (k_i c_j) D_ij) X                     lam, with c_j = k_j - beta_j sum_{m<j} D_jm^2 (k_j k_m) k_m:
//                                                              A A^T without its 128^3 products and without room for A
// A cluster of CLUSTER blocks has one chunk, head and tile of 32 values. A block has ROW_SLOTS blocks of 16 rows: all of them, or in a cluster one from
// the top and one from the bottom of the triangle; PARTS warps have 16 rows and share the columns of blocks. c and u go through the cluster's shared
// memory, with no row computed twice. Tiles are float32, products three times tf32
// (float32) or once (16-bit dtypes, which tf32 holds exactly). Chunk 128, head_dim 32, lam: 36 blocks of 16 x 16, 7 products of 2^14 FLOP each, 4 MFLOP a
// head and chunk; 64 KB in, 16 KB out. One chunk of 12 heads moves 0.8 MB: the floor is a launch; what it takes is latency, about 4 us.
//
// DTYPE; KEYS: tile, 32, 64 or 128; CHUNK_BLOCKS: of 16 tokens, 1 to 8; TRANSFORM: 0 none, 1 exact, 2 lam; CLUSTER, PARTS;
// TF32_ONCE: products in one part.
#include "delta_chunk.cuh"

constexpr int VALUES = 32, TOKENS = 16 * CHUNK_BLOCKS, KEY_BLOCKS = KEYS / 8, STEPS = KEYS / 16;
constexpr int ROW_SLOTS = CHUNK_BLOCKS / CLUSTER, THREADS = 32 * PARTS * ROW_SLOTS;
static_assert(CLUSTER == 1 || (ROW_SLOTS == 2 && TRANSFORM != 1), "a cluster's blocks have two blocks of rows");
using Keys = Tile<float, KEYS>;
using Values = Tile<float, VALUES>;
using Sum = float[4];

struct Params {
    const DTYPE *q, *k, *v;
    const void *beta, *g, *fast, *slow, *alpha, *bounds;  // all but beta may be absent
    DTYPE* o;
    int64_t q_b, q_t, q_h, k_b, k_t, k_h, v_b, v_t, v_h, beta_b, beta_t, beta_h, g_b, g_t, g_h, fast_b, fast_t, fast_h, slow_b, slow_t, slow_h;
    int64_t alpha_b, alpha_t, alpha_h;
    int tokens, heads, group, keys, values, sequences, chunk, offset, beta_wide, g_wide, fast_wide, slow_wide, alpha_wide, bounds_wide, l2norm, pieces;
    float number, scale;
};

struct Lines {
    float log_decay[TOKENS], rest[TOKENS], beta[TOKENS], fast[TOKENS], slow[TOKENS];
};

// `rows` of `columns` numbers as float32 in a tile, zeros around them
template <int COLUMNS>
DEVICE void load_tile(const Tile<float, COLUMNS>& to, const DTYPE* from, int64_t step, int rows, int columns, bool pieces) {
    if (pieces) {
        constexpr int PER = 16 / sizeof(DTYPE), PIECES = COLUMNS / PER;
#pragma unroll 2
        for (int i = threadIdx.x; i < TOKENS * PIECES; i += THREADS) {
            const int row = i / PIECES, column = i % PIECES * PER;
            float x[PER] = {};
            if (row < rows && column < columns) load_run(x, from + row * step + column);
#pragma unroll
            for (int part = 0; part < PER; part += 4)
                *reinterpret_cast<float4*>(to.element(row, column + part)) = make_float4(x[part], x[part + 1], x[part + 2], x[part + 3]);
        }
    } else {
#pragma unroll 1
        for (int i = threadIdx.x; i < TOKENS * COLUMNS; i += THREADS) {
            const int row = i / COLUMNS, column = i % COLUMNS;
            *to.element(row, column) = row < rows && column < columns ? widen(from[row * step + column]) : 0.f;
        }
    }
}

// d (16 x 16) = a b^T, rows of `a` in registers, 16 rows of b from row0
DEVICE void scores(float (&d)[2][4], const float2 (&a)[2][KEY_BLOCKS], const Keys& b, int row0) {
#pragma unroll
    for (int n = 0; n < 2; n++)
#pragma unroll
        for (int e = 0; e < 4; e++) d[n][e] = 0.f;
#pragma unroll
    for (int s = 0; s < STEPS; s++) {
        float2 b0, b1, b2, b3;
        b.rows(b0, b1, b2, b3, row0, 16 * s);
        Product<float>::add(d[0], a[0][2 * s], a[1][2 * s], a[0][2 * s + 1], a[1][2 * s + 1], b0, b2);
        Product<float>::add(d[1], a[0][2 * s], a[1][2 * s], a[0][2 * s + 1], a[1][2 * s + 1], b1, b3);
    }
}

// d[n] += a (16 x 16) times the 16 rows of x from row0, 16 columns from column0
template <int COLUMNS> DEVICE void apply(Sum& d0, Sum& d1, const float (&a)[2][4], const Tile<float, COLUMNS>& x, int row0, int column0) {
    float2 x0, x1, x2, x3;
    x.columns(x0, x1, x2, x3, column0, row0);
    const float2 a0 = make_float2(a[0][0], a[0][1]), a1 = make_float2(a[0][2], a[0][3]), a2 = make_float2(a[1][0], a[1][1]), a3 = make_float2(a[1][2], a[1][3]);
    Product<float>::add(d0, a0, a1, a2, a3, x0, x2);
    Product<float>::add(d1, a0, a1, a2, a3, x1, x3);
}

template <int COLUMNS> DEVICE void write_rows(const Tile<float, COLUMNS>& to, int row0, int block, const Sum& d) {
    const int lane = lane_id(), r = lane / 4, c = lane % 4;
    *to.pair_at(row0 + r, 8 * block + 2 * c) = make_float2(d[0], d[1]);
    *to.pair_at(row0 + r + 8, 8 * block + 2 * c) = make_float2(d[2], d[3]);
}
template <int COLUMNS> DEVICE void read_rows(const Tile<float, COLUMNS>& from, int row0, int block, Sum& d) {
    const int lane = lane_id(), r = lane / 4, c = lane % 4;
    const float2 x = *from.pair_at(row0 + r, 8 * block + 2 * c), y = *from.pair_at(row0 + r + 8, 8 * block + 2 * c);
    d[0] = x.x, d[1] = x.y, d[2] = y.x, d[3] = y.y;
}

// 16 rows of sums of a warp, for the one that adds them up
struct Partial {
    float4* base;
    DEVICE void write(int block, const Sum& d) const { base[32 * block] = make_float4(d[0], d[1], d[2], d[3]); }
    DEVICE void add_to(int block, Sum& d) const {
        const float4 four = base[32 * block];
        d[0] += four.x, d[1] += four.y, d[2] += four.z, d[3] += four.w;
    }
};
constexpr int WIDEST = TRANSFORM == 2 && KEY_BLOCKS > 4 ? KEY_BLOCKS : 4;  // blocks of a partial sum

#if CLUSTER > 1
#define CLUSTERED __cluster_dims__(CLUSTER, 1, 1)
#else
#define CLUSTERED
#endif

// Which block of a cluster has a block of rows; a block's two are `rank` and its mirror image.
DEVICE int owner(int block) { return block < CLUSTER ? block : CHUNK_BLOCKS - 1 - block; }

// What the cluster's other blocks have of the rows that this one's products need, into the same places here. Between two cluster barriers.
template <int COLUMNS> DEVICE void gather(const Tile<float, COLUMNS>& tile, int rank) {
    constexpr int PIECES = 16 * COLUMNS / 4;
#pragma unroll 2
    for (int i = threadIdx.x; i < (CHUNK_BLOCKS - rank) * PIECES; i += THREADS) {
        const int block = i / PIECES;
        unsigned char* at = tile.base + 16 * static_cast<int64_t>(i);
        if (owner(block) != rank) {
            const uint4 there = cluster_load_16(at, owner(block));
            *reinterpret_cast<uint4*>(at) = there;
        }
    }
}

extern "C" __global__ void CLUSTERED __launch_bounds__(THREADS) dual_flat(const __grid_constant__ Params p) {
    SHARED_MEMORY(memory);
    const Keys key_tile{memory}, mixed_tile{memory + TOKENS * Keys::ROW};
    const Values x_tile{memory + 2 * TOKENS * Keys::ROW}, u_tile{TRANSFORM ? x_tile.base + TOKENS * Values::ROW : x_tile.base};
    Lines& lines = *reinterpret_cast<Lines*>(x_tile.base + 2 * TOKENS * Values::ROW);
    PairScratch* scratches = reinterpret_cast<PairScratch*>(&lines + 1);
    const int warp = threadIdx.x / 32, row_slot = warp / PARTS, part = warp % PARTS, lane = lane_id(), r = lane / 4, c = lane % 4;
    const int rank = CLUSTER > 1 ? static_cast<int>(cluster_rank()) : 0;
    const int own = CLUSTER == 1 ? row_slot : row_slot ? rank : CHUNK_BLOCKS - 1 - rank, row0 = 16 * own;
    float4* partials = reinterpret_cast<float4*>(&lines + 1) + lane;  // the inversions' scratch is in the same place
    const auto partial = [&](int which) { return Partial{partials + (row_slot * (PARTS - 1) + which - 1) * WIDEST * 32}; };
    const int parts = min(PARTS, own + 1);  // that have columns

    const int unit = blockIdx.x / CLUSTER, tiles = (p.values + VALUES - 1) / VALUES;
    const int tile = unit % tiles, head = unit / tiles % p.heads, slot = unit / tiles / p.heads;
    int64_t row = 0;
    int begin = 0, end = p.tokens, first;
    if (p.bounds) {  // a sequence n owns the slots from (begin + n offset) / chunk + n on
        int low = 0, high = p.sequences;
        while (high - low > 1) {
            const int middle = (low + high) / 2;
            if ((load_index(p.bounds, middle, p.bounds_wide) + static_cast<int64_t>(middle) * p.offset) / p.chunk + middle <= slot) low = middle;
            else high = middle;
        }
        begin = static_cast<int>(load_index(p.bounds, low, p.bounds_wide)), end = static_cast<int>(load_index(p.bounds, low + 1, p.bounds_wide));
        first = begin - p.offset + (slot - static_cast<int>((begin + static_cast<int64_t>(low) * p.offset) / p.chunk) - low) * p.chunk;
    } else {
        const int each = (p.tokens + p.offset + p.chunk - 1) / p.chunk;
        row = slot / each;
        first = slot % each * p.chunk - p.offset;
    }
    end = min(end, first + p.chunk);
    first = max(first, begin);
    const int count = end - first, value0 = tile * VALUES, values = min(VALUES, p.values - value0);
    if (count <= 0) return;

    const DTYPE* q = p.q + row * p.q_b + first * p.q_t + head / p.group * p.q_h;
    load_tile(key_tile, p.k + row * p.k_b + first * p.k_t + head / p.group * p.k_h, p.k_t, count, p.keys, p.pieces);
    load_tile(x_tile, p.v + row * p.v_b + first * p.v_t + head * p.v_h + value0, p.v_t, count, values, p.pieces);
#pragma unroll 1
    for (int token = threadIdx.x; token < TOKENS; token += THREADS) {
        const int64_t at = first + token;
        float beta = 0.f, log_decay = 0.f, fast = 0.f, slow = 0.f;
        if (token < count) {
            beta = load_gate<DTYPE>(p.beta, row * p.beta_b + at * p.beta_t + head * p.beta_h, p.beta_wide);
            if (p.g) log_decay = 1.4426950408889634f * load_gate<DTYPE>(p.g, row * p.g_b + at * p.g_t + head * p.g_h, p.g_wide);
            const float alpha = p.alpha ? load_gate<DTYPE>(p.alpha, row * p.alpha_b + at * p.alpha_t + head * p.alpha_h, p.alpha_wide) : p.number;
            fast = alpha * p.scale, slow = (1.f - alpha) * p.scale;
            if (p.fast) fast *= load_gate<DTYPE>(p.fast, row * p.fast_b + at * p.fast_t + head * p.fast_h, p.fast_wide);
            if (p.slow) slow *= load_gate<DTYPE>(p.slow, row * p.slow_b + at * p.slow_t + head * p.slow_h, p.slow_wide);
        }
        lines.log_decay[token] = log_decay, lines.rest[token] = 0.f, lines.beta[token] = beta, lines.fast[token] = fast, lines.slow[token] = slow;
    }
    __syncthreads();

    // sums of the logarithms with what their rounding leaves out; lengths 1; X = beta V
    if (warp == 0 && p.g) {
        float carry = 0.f, carry_rest = 0.f;
#pragma unroll 1
        for (int token = lane; token < TOKENS + lane; token += 32) {
            float sum = token < TOKENS ? lines.log_decay[token] : 0.f, rest = 0.f;
            const auto add = [&](float other, float other_rest, bool there) {
                const float both = sum + other, back = both - sum;
                if (there) rest += other_rest + ((sum - (both - back)) + (other - back)), sum = both;
            };
#pragma unroll
            for (int step = 1; step < 32; step *= 2) {
                const float before = __shfl_up_sync(0xffffffffu, sum, step), rest_before = __shfl_up_sync(0xffffffffu, rest, step);
                add(before, rest_before, lane >= step);
            }
            add(carry, carry_rest, true);
            if (token < TOKENS) lines.log_decay[token] = sum, lines.rest[token] = rest;
            carry = __shfl_sync(0xffffffffu, sum, 31), carry_rest = __shfl_sync(0xffffffffu, rest, 31);
        }
    }
    if (p.l2norm) {
#pragma unroll 1
        for (int token = warp; token < TOKENS; token += THREADS / 32) {
            float square = 0.f;
#pragma unroll
            for (int column = lane; column < KEYS; column += 32) {
                const float x = *key_tile.element(token, column);
                square += x * x;
            }
            const float inverse = rsqrtf(warp_sum(square) + 1e-6f);
#pragma unroll
            for (int column = lane; column < KEYS; column += 32) *key_tile.element(token, column) *= inverse;
        }
    }
#pragma unroll 2
    for (int i = threadIdx.x; i < TOKENS * VALUES / 4; i += THREADS) {
        const int token = i / (VALUES / 4);
        float4* at = reinterpret_cast<float4*>(x_tile.element(token, i % (VALUES / 4) * 4));
        const float beta = lines.beta[token];
        float4 x = *at;
        x.x *= beta, x.y *= beta, x.z *= beta, x.w *= beta;
        *at = x;
    }
    __syncthreads();

    float row_sum[2], row_rest[2], row_beta[2];
#pragma unroll
    for (int t = 0; t < 2; t++) {
        const int token = row0 + r + 8 * t;
        row_sum[t] = lines.log_decay[token], row_rest[t] = lines.rest[token], row_beta[t] = lines.beta[token];
    }
    // d_ij *= D_ij^POWER and the row's weight, zeros from the diagonal or above it on
    const auto mask = [&](float (&d)[2][4], int column0, float power, bool strict, bool weigh) {
#pragma unroll
        for (int n = 0; n < 2; n++)
#pragma unroll
            for (int e = 0; e < 4; e++) {
                const int i = row0 + r + 8 * (e >> 1), j = column0 + 8 * n + 2 * c + (e & 1);
                float x = d[n][e];
                if (p.g && power > 0.f && j <= i) {
                    const float between = (row_sum[e >> 1] - lines.log_decay[j]) + (row_rest[e >> 1] - lines.rest[j]);
                    x *= exp2_fast(power * between);
                }
                if (weigh) x *= row_beta[e >> 1];
                d[n][e] = strict ? (j < i ? x : 0.f) : (j <= i ? x : 0.f);
            }
    };

    float2 query[2][KEY_BLOCKS], own_key[2][KEY_BLOCKS];
    const auto load_query = [&] {
#pragma unroll
        for (int t = 0; t < 2; t++)
#pragma unroll
            for (int b = 0; b < KEY_BLOCKS; b++) {
                const int token = row0 + r + 8 * t, column = 8 * b + 2 * c;
                float x[2] = {};
                if (token < count) {
                    const DTYPE* from = q + token * p.q_t + column;
                    if (p.pieces) {
                        if (column < p.keys) load_run(x, from);
                    } else {
                        if (column < p.keys) x[0] = widen(from[0]);
                        if (column + 1 < p.keys) x[1] = widen(from[1]);
                    }
                }
                query[t][b] = make_float2(x[0], x[1]);
            }
    };
    if constexpr (TRANSFORM != 0) {
#pragma unroll
        for (int s = 0; s < STEPS; s++) key_tile.rows(own_key[0][2 * s], own_key[1][2 * s], own_key[0][2 * s + 1], own_key[1][2 * s + 1], row0, 16 * s);
    }
    if constexpr (TRANSFORM == 2) {
        {  // c = k - beta sum D^2 (k k_m) k_m; each warp takes every other block of columns
            Sum d[KEY_BLOCKS] = {};
            for (int other = part; other <= own; other += PARTS) {
                float kk[2][4];
                scores(kk, own_key, key_tile, 16 * other);
                mask(kk, 16 * other, 2.f, true, true);
#pragma unroll
                for (int b = 0; b < KEY_BLOCKS; b += 2) apply(d[b], d[b + 1], kk, key_tile, 16 * other, 8 * b);
            }
            if (part && part < parts) {
#pragma unroll
                for (int b = 0; b < KEY_BLOCKS; b++) partial(part).write(b, d[b]);
            }
            __syncthreads();
            if (part == 0) {
#pragma unroll 1
            for (int which = 1; which < parts; which++) {
#pragma unroll
                    for (int b = 0; b < KEY_BLOCKS; b++) partial(which).add_to(b, d[b]);
                }
#pragma unroll
                for (int b = 0; b < KEY_BLOCKS; b++) {
                    Sum key;
                    read_rows(key_tile, row0, b, key);
#pragma unroll
                    for (int e = 0; e < 4; e++) key[e] -= d[b][e];
                    write_rows(mixed_tile, row0, b, key);
                }
            }
            if constexpr (CLUSTER > 1) {
                __syncwarp();
                cluster_arrive();
                cluster_wait();
                gather(mixed_tile, rank);
            }
            __syncthreads();
        }
        Sum d[4] = {};
        for (int other = part; other <= own; other += PARTS) {
            float kc[2][4];
            scores(kc, own_key, mixed_tile, 16 * other);
            mask(kc, 16 * other, 1.f, true, true);
            apply(d[0], d[1], kc, x_tile, 16 * other, 0);
            apply(d[2], d[3], kc, x_tile, 16 * other, 16);
        }
        if (part && part < parts) {
#pragma unroll
            for (int b = 0; b < 4; b++) partial(part).write(b, d[b]);
        }
        load_query();
        __syncthreads();
        if (part == 0) {
#pragma unroll 1
    for (int which = 1; which < parts; which++) {
#pragma unroll
                for (int b = 0; b < 4; b++) partial(which).add_to(b, d[b]);
            }
#pragma unroll
            for (int b = 0; b < 4; b++) {
                Sum x;
                read_rows(x_tile, row0, b, x);
#pragma unroll
                for (int e = 0; e < 4; e++) x[e] -= d[b][e];
                write_rows(u_tile, row0, b, x);
            }
        }
        if constexpr (CLUSTER > 1) {
            __syncwarp();
            cluster_arrive();
            cluster_wait();
            gather(u_tile, rank);
        }
        __syncthreads();
        if constexpr (CLUSTER > 1) cluster_arrive();  // its counterpart at the end: nobody leaves while others read
    }
    if constexpr (TRANSFORM == 1) {
        // a warp has 16 of the columns; block after block of rows, what is done is taken from all rows below
        PairScratch& scratch = scratches[warp];
        float inverse[2][4], kk[2][4];
        scores(kk, own_key, key_tile, row0);
        mask(kk, row0, 1.f, true, true);
        scratch.beta[lane] = 1.f;
#pragma unroll
        for (int n = 0; n < 2; n++)
#pragma unroll
            for (int e = 0; e < 4; e++) scratch.solve[(r + 8 * (e >> 1)) * SOLVE_ROW + 8 * n + 2 * c + (e & 1)] = kk[n][e];
        invert<false>(scratch, [] { __syncwarp(); });
#pragma unroll
        for (int n = 0; n < 2; n++)
#pragma unroll
            for (int e = 0; e < 4; e++) inverse[n][e] = scratch.solve[(r + 8 * (e >> 1)) * SOLVE_ROW + 8 * n + 2 * c + (e & 1)];
        Sum left[2];
        read_rows(x_tile, row0, 2 * part, left[0]);
        read_rows(x_tile, row0, 2 * part + 1, left[1]);
        for (int step = 0; step < CHUNK_BLOCKS; step++) {
            if (own == step) {
                write_rows(u_tile, row0, 2 * part, left[0]);
                write_rows(u_tile, row0, 2 * part + 1, left[1]);
                __syncwarp();
                Sum u[2] = {};
                apply(u[0], u[1], inverse, u_tile, row0, 16 * part);
                __syncwarp();
                write_rows(u_tile, row0, 2 * part, u[0]);
                write_rows(u_tile, row0, 2 * part + 1, u[1]);
            } else if (own > step) {
                scores(kk, own_key, key_tile, 16 * step);
                mask(kk, 16 * step, 1.f, true, true);
#pragma unroll
                for (int n = 0; n < 2; n++)
#pragma unroll
                    for (int e = 0; e < 4; e++) kk[n][e] = -kk[n][e];
            }
            __syncthreads();
            if (own > step) apply(left[0], left[1], kk, u_tile, 16 * step, 16 * part);
        }
    }

    // what the tokens read
    if constexpr (TRANSFORM != 2) load_query();
    if (p.l2norm) {
#pragma unroll
        for (int t = 0; t < 2; t++) {
            float square = 0.f;
#pragma unroll
            for (int b = 0; b < KEY_BLOCKS; b++) square += query[t][b].x * query[t][b].x + query[t][b].y * query[t][b].y;
            square += __shfl_xor_sync(0xffffffffu, square, 1);
            square += __shfl_xor_sync(0xffffffffu, square, 2);
            const float inverse = rsqrtf(square + 1e-6f);
#pragma unroll
            for (int b = 0; b < KEY_BLOCKS; b++) query[t][b].x *= inverse, query[t][b].y *= inverse;
        }
    }
    Sum fast[4] = {}, slow[4] = {};
    for (int other = part; other <= own; other += PARTS) {
        float qk[2][4];
        scores(qk, query, key_tile, 16 * other);
        mask(qk, 16 * other, 0.f, false, false);
        apply(fast[0], fast[1], qk, x_tile, 16 * other, 0);
        apply(fast[2], fast[3], qk, x_tile, 16 * other, 16);
        mask(qk, 16 * other, 1.f, false, false);
        apply(slow[0], slow[1], qk, u_tile, 16 * other, 0);
        apply(slow[2], slow[3], qk, u_tile, 16 * other, 16);
    }
#pragma unroll
    for (int b = 0; b < 4; b++)
#pragma unroll
        for (int e = 0; e < 4; e++) {
            const int token = row0 + r + 8 * (e >> 1);
            fast[b][e] = lines.fast[token] * fast[b][e] + lines.slow[token] * slow[b][e];
        }
    if constexpr (TRANSFORM == 1) __syncthreads();  // the scratch has been read
    if (part && part < parts) {
#pragma unroll
        for (int b = 0; b < 4; b++) partial(part).write(b, fast[b]);
    }
    __syncthreads();
    if constexpr (CLUSTER > 1 && TRANSFORM == 2) cluster_wait();
    if (part) return;
#pragma unroll 1
    for (int which = 1; which < parts; which++) {
#pragma unroll
        for (int b = 0; b < 4; b++) partial(which).add_to(b, fast[b]);
    }
    DTYPE* o = p.o + ((row * p.tokens + first) * p.heads + head) * p.values + value0;
#pragma unroll
    for (int b = 0; b < 4; b++) {
#pragma unroll
        for (int t = 0; t < 2; t++) {
            const int token = row0 + r + 8 * t, column = 8 * b + 2 * c;
            if (token >= count) continue;
            DTYPE* to = o + static_cast<int64_t>(token) * p.heads * p.values + column;
            const float x = fast[b][2 * t], y = fast[b][2 * t + 1];
            if (p.values % 2 == 0) {
                if (column < values) *reinterpret_cast<Pair<DTYPE>*>(to) = Make<DTYPE>::pair_of(x, y);
            } else {
                if (column < values) to[0] = narrow<DTYPE>(x);
                if (column + 1 < values) to[1] = narrow<DTYPE>(y);
            }
        }
    }
}
