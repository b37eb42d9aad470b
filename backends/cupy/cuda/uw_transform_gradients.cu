// The gradients of u and w of a chunk (SPEC.md 10, 3). With X = beta V, Z = beta e^G K, [u | w] = T [X | Z]:
//   dX = T^T du    dZ = T^T dw    dv = beta dX    dk = beta e^G dZ + (dN + dN^T) K    dN = -stril(beta Gamma dA)
//   exact: dA = stril(dX u^T + dZ w^T)    lam: D = stril(du X^T + dw Z^T), dA = D + stril((D + D^T) A)    none: dA = 0
//   dbeta = rowsum(dX V) + e^G rowsum(dZ K) - rowsum(K K^T Gamma dA)    dG = rowsum(H) - colsum(H) + rowsum(dZ Z), H = A dA;  dg sums dG from the end
// A token and v head costs about C (4 (K + V) + 3 K) FLOP and moves 3 V + K numbers, and 2 K a q/k head: bound by memory (H100, bf16, 1 x 8192, 16/32 heads of
// 128: 335 MB, 110 us). Nothing that the forward made is read: K K^T is computed once a block, u and w by the forward's substitution, dX and dZ by the same
// one backwards. One block a chunk and q/k head, its v heads one after the other. A warp takes 16 columns of [V | K] and their gradients, transposed, and
// solves alone; of the squares of C it takes 16 rows, with other warps every PARTS-th block of 16 columns.
//
// DTYPE; KEYS, VALUES: head_dims; SIDE: tokens of a tile, 16 to 128; TRANSFORM: 0 none, 1 exact, 2 lam; SLICE: columns of a tile; RESIDENT: all of K and of V
// in one tile each, loaded once; WARPS, a multiple of SIDE / 16; GROUPED: several v heads share a k head; ALIGNED: 16-byte copies
// can take the rows of k, v, du and dw.
#include "stores.cuh"
#include "uw_tiles.cuh"

constexpr int PARTS = WARPS / BLOCKS, COLUMNS = (BLOCKS + PARTS - 1) / PARTS;
constexpr int KEY_GROUPS = (KEYS + 15) / 16, VALUE_GROUPS = (VALUES + 15) / 16, KEY_ROUNDS = (KEY_GROUPS + WARPS - 1) / WARPS, GROUPS = SLICE / 16;
constexpr int AT_ONCE = SIZE == 4 || SIDE > 64 ? 1 : COLUMNS > 2 ? 384 / THREADS : 512 / THREADS;  // blocks that registers must allow
constexpr int LINES_BYTES = BLOCKS * 16 * LINE * 4, TILES_BYTES = (RESIDENT ? 5 : 3) * SLICE_BYTES, TRIANGLE_BYTES = TRANSFORM == NONE ? 0 : SQUARE_BYTES;
constexpr int OTHER_BYTES = TRANSFORM == LAM ? SQUARE_BYTES : REST_BYTES;
constexpr bool TURNS = TRANSFORM == LAM && RESIDENT && SIDE > 64;  // T's place is the symmetric matrices' when it has been used
constexpr int SYMMETRIC_BYTES = TRANSFORM == NONE || TURNS ? 0 : SQUARE_BYTES > LINES_BYTES ? SQUARE_BYTES : LINES_BYTES;

struct Params {
    const DTYPE *k, *v;
    const void *beta, *g;
    const DTYPE *du, *dw;
    DTYPE *dk, *dv;
    void *dbeta, *dg;
    const void* cu_seqlens;
    int64_t k_b, k_t, k_h, v_b, v_t, v_h, beta_b, beta_t, beta_h, g_b, g_t, g_h, du_b, du_t, du_h, dw_b, dw_t, dw_h;
    int heads, group, beta_wide, g_wide, cu_wide, sequences, tokens, chunk_size, offset, slots;
};

using Sums = float[2 * COLUMNS][4];  // of a warp's 16 rows of a square: blocks of 16 columns PARTS * j + part

// 16 columns of a tile by 16 tokens, transposed, of float32
struct Columns {
    float x[2][4];  // tokens' first and second half

    DEVICE void load(const Right& tile, int column, int token) {
        Pair<DTYPE> p[4];
        tile.columns(p[0], p[1], p[2], p[3], column, token);
#pragma unroll
        for (int i = 0; i < 4; i++) {
            const float2 both = Make<DTYPE>::floats(p[i]);
            x[i / 2][i % 2 * 2] = both.x, x[i / 2][i % 2 * 2 + 1] = both.y;
        }
    }
    DEVICE void weigh(const float* weight, int token) {
#pragma unroll
        for (int half = 0; half < 2; half++) {
            const float2 by = *reinterpret_cast<const float2*>(weight + token + 8 * half + lane_id() % 4 * 2);
#pragma unroll
            for (int e = 0; e < 4; e++) x[half][e] *= e % 2 ? by.y : by.x;
        }
    }
    DEVICE void add(const Pair<DTYPE> (&a)[4], const Pair<DTYPE> (&b)[4]) {
        Product<DTYPE>::add(x[0], a[0], a[1], a[2], a[3], b[0], b[1]);
        Product<DTYPE>::add(x[1], a[0], a[1], a[2], a[3], b[2], b[3]);
    }
    DEVICE void keep(const Right& tile, int column, int token) const {
        __syncwarp();
#pragma unroll
        for (int half = 0; half < 2; half++)
#pragma unroll
            for (int e = 0; e < 2; e++) put_turned(tile, token + 8 * half, column + 8 * e, x[half][2 * e], x[half][2 * e + 1]);
    }
    DEVICE void store(DTYPE* to, int64_t stride, int rows, int columns) const {
#pragma unroll
        for (int half = 0; half < 2; half++)
#pragma unroll
            for (int e = 0; e < 2; e++)
                store_turned<KEYS % 2 == 0 && VALUES % 2 == 0>(to + 8 * half * stride + 8 * e, stride, x[half][2 * e], x[half][2 * e + 1], rows - 8 * half, columns - 8 * e);
    }
    // the sums over the columns of the product with another tile's, one a token, to `sums`
    DEVICE void meet(const Right& tile, int column, int token, float* sums) const {
        Columns other;
        other.load(tile, column, token);
        float sum[4];
#pragma unroll
        for (int i = 0; i < 4; i++) sum[i] = x[i / 2][i % 2] * other.x[i / 2][i % 2] + x[i / 2][i % 2 + 2] * other.x[i / 2][i % 2 + 2];
        const float mine = sum_of_four(sum[0], sum[1], sum[2], sum[3]);
        const int r = lane_id() / 4;
        if (r % 2 == 0) sums[token + r / 4 * 8 + lane_id() % 4 * 2 + r / 2 % 2] = mine;
    }
};

// T, or BACK T^T, times 16 columns of `right` whose tokens are weighted where there is a weight; what comes out goes to `take` 16 tokens at a time
template <bool BACK, typename Take>
DEVICE void transform(const Right& right, int column, const float* weight, const Square& triangle, const Rest& rest, const Take& take) {
    Pair<DTYPE> done[BLOCKS][4];
#pragma unroll
    for (int step = 0; step < BLOCKS; step++) {
        const int i = BACK ? BLOCKS - 1 - step : step;
        Columns at;
        at.load(right, column, 16 * i);
        if (weight) at.weigh(weight, 16 * i);
        if constexpr (TRANSFORM == LAM) as_operand<DTYPE>(done[i], at.x[0], at.x[1]);
        Pair<DTYPE> b[4];
        if constexpr (TRANSFORM != NONE) {
#pragma unroll
            for (int before = 0; before < step + (TRANSFORM == LAM); before++) {
                const int j = BACK ? BLOCKS - 1 - before : before;
                if constexpr (BACK) triangle.right_columns(b[0], b[1], b[2], b[3], 16 * i, 16 * j);
                else triangle.right_rows(b[0], b[1], b[2], b[3], 16 * i, 16 * j);
                at.add(done[j], b);
            }
        }
        if constexpr (TRANSFORM == EXACT) {
            Pair<DTYPE> y[4];
            as_operand<DTYPE>(y, at.x[0], at.x[1]);
#pragma unroll
            for (int e = 0; e < 4; e++) at.x[0][e] = at.x[1][e] = 0.0f;
            if constexpr (SIZE == 2) {
                if constexpr (BACK) rest.right_columns(b[0], b[1], b[2], b[3], 0, 16 * i);
                else rest.right_rows(b[0], b[1], b[2], b[3], 16 * i, 0);
                at.add(y, b);
            }
            if constexpr (BACK) triangle.right_columns(b[0], b[1], b[2], b[3], 16 * i, 16 * i);
            else triangle.right_rows(b[0], b[1], b[2], b[3], 16 * i, 16 * i);
            at.add(y, b);
            as_operand<DTYPE>(done[i], at.x[0], at.x[1]);
        }
        take(16 * i, at);
    }
}

// sums += 16 rows of `left` times the rows of `right` up to the diagonal, over so many groups of 16 columns
DEVICE void add_square(Sums& sums, const Right& left, const Right& right, int band, int part, int width) {
#pragma unroll(STEPS_AT_ONCE<DTYPE>)
    for (int s = 0; s < GROUPS; s++) {
        if (s >= width) break;
        Pair<DTYPE> a[4], b[4];
        left.rows(a[0], a[1], a[2], a[3], 16 * band, 16 * s);
#pragma unroll
        for (int j = 0; j < COLUMNS; j++) {
            if (PARTS * j + part > band) break;
            right.right_rows(b[0], b[1], b[2], b[3], 16 * (PARTS * j + part), 16 * s);
            Product<DTYPE>::add(sums[2 * j], a[0], a[1], a[2], a[3], b[0], b[1]);
            Product<DTYPE>::add(sums[2 * j + 1], a[0], a[1], a[2], a[3], b[2], b[3]);
        }
    }
}

// x + x^T of a strictly lower x, its warps' blocks up to the diagonal
DEVICE void keep_symmetric(const Square& symmetric, const Sums& x, int band, int part) {
    const int r = lane_id() / 4, c = lane_id() % 4;
#pragma unroll
    for (int n = 0; n < 2 * COLUMNS; n++) {
        const int block = PARTS * (n / 2) + part;
        if (block > band) break;
#pragma unroll
        for (int e = 0; e < 4; e++) {
            const int row0 = 16 * band + e / 2 * 8, column0 = 16 * block + n % 2 * 8, row = row0 + r, column = column0 + 2 * c + e % 2;
            const DTYPE y = narrow<DTYPE>(x[n][e]);
            if (column <= row) *symmetric.element(row0, r, column) = *symmetric.element(column0, 2 * c + e % 2, row) = y;  // 0 on the diagonal
        }
    }
}

extern "C" __global__ void __launch_bounds__(THREADS, AT_ONCE) uw_transform_gradients(const __grid_constant__ Params p) {
    SHARED_MEMORY(memory);
    // resident: K, V, du, dw and w (lam: dZ) lie side by side; else V and K take turns, and so do du and dw
    const Right keys{memory}, values{memory + (RESIDENT ? SLICE_BYTES : 0)}, into_u{memory + (RESIDENT ? 2 : 1) * SLICE_BYTES};
    const Right into_w{memory + (RESIDENT ? 3 : 1) * SLICE_BYTES}, free{memory + (RESIDENT ? 4 : 2) * SLICE_BYTES};
    const Square triangle{memory + TILES_BYTES}, lower{triangle.base + TRIANGLE_BYTES}, symmetric{TURNS ? triangle.base : lower.base + OTHER_BYTES};
    const Rest rest{lower.base};
    float* const lines = reinterpret_cast<float*>(symmetric.base);
    Log* const log_decay = reinterpret_cast<Log*>(lower.base + OTHER_BYTES + SYMMETRIC_BYTES);
    float *const beta = reinterpret_cast<float*>(log_decay + SIDE), *const decayed = beta + SIDE, *const flows = decayed + SIDE;
    float *const met_u = flows + SIDE, *const met_w = met_u + VALUE_GROUPS * SIDE, *const row_parts = met_w + KEY_GROUPS * SIDE, *const column_parts = row_parts + PARTS * SIDE;

    const int groups = p.heads / p.group, shared_head = blockIdx.x % groups, warp = __shfl_sync(0xffffffffu, threadIdx.x / 32, 0);
    const int band = warp % BLOCKS, part = warp / BLOCKS;
    const Chunk chunk = find_chunk(Grid{p.cu_seqlens, p.cu_wide, p.sequences, p.tokens, p.chunk_size, p.offset, p.slots}, blockIdx.x / groups);
    if (chunk.length == 0) return;
    const bool through = p.dk || p.dbeta || p.dg;
    const int batch = static_cast<int>(chunk.batch), begin = static_cast<int>(chunk.begin), length = chunk.length;
    const auto place = [&](int64_t b, int64_t t, int64_t h, int head) { return fresh(batch) * b + static_cast<int64_t>(fresh(begin)) * t + head * h; };
    const auto load_keys = [&](int slice) {
        load_rounds<SIDE, THREADS, ALIGNED>(keys, p.k + place(p.k_b, p.k_t, p.k_h, shared_head) + slice * SLICE, p.k_t, length, KEYS - slice * SLICE);
    };
    const auto load_values = [&](int slice, int head) {
        load_rounds<SIDE, THREADS, ALIGNED>(values, p.v + place(p.v_b, p.v_t, p.v_h, head) + slice * SLICE, p.v_t, length, VALUES - slice * SLICE);
        load_rounds<SIDE, THREADS, ALIGNED>(into_u, p.du + place(p.du_b, p.du_t, p.du_h, head) + slice * SLICE, p.du_t, length, VALUES - slice * SLICE);
    };
    const auto load_into_w = [&](int slice, int head) {
        load_rounds<SIDE, THREADS, ALIGNED>(into_w, p.dw + place(p.dw_b, p.dw_t, p.dw_h, head) + slice * SLICE, p.dw_t, length, KEYS - slice * SLICE);
    };
    const auto arrived = [&]() {
        cp_async_commit();
        cp_async_wait<0>();
        __syncthreads();
    };
    Sums gram = {};
    if constexpr (RESIDENT) {
        load_keys(0);
        cp_async_commit();
        if (p.du) load_values(0, shared_head * p.group);
        if (p.dw) load_into_w(0, shared_head * p.group);
        cp_async_commit();
    }
    if constexpr (TRANSFORM != NONE) {
#pragma unroll 1
        for (int slice = 0; slice < (RESIDENT ? 1 : KEY_SLICES); slice++) {
            if (!RESIDENT) load_keys(slice), cp_async_commit(), cp_async_wait<0>();
            else cp_async_wait<1>();
            __syncthreads();
            add_square(gram, keys, keys, band, part, KEY_GROUPS - slice * GROUPS);
            if (!RESIDENT) __syncthreads();
        }
    }
    float kept[GROUPED ? KEY_ROUNDS : 1][2 * BLOCKS][4] = {};  // dk of this warp's columns, summed over the v heads
#pragma unroll 1
    for (int member = 0; member < (GROUPED ? p.group : 1); member++) {
        const int head = shared_head * p.group + member, lane = fresh(lane_id()), r = lane / 4, c = lane % 4;
        if (RESIDENT && GROUPED && p.dw && member > 0) {
            load_into_w(0, head);
            cp_async_commit();
        }
        if (warp == 0) running_log<DTYPE>(log_decay, SIDE, p.g, place(p.g_b, p.g_t, p.g_h, head), p.g_t, p.g_wide, length);
        __syncthreads();
        for (int t = threadIdx.x; t < SIDE; t += THREADS) {
            beta[t] = t < length ? load_gate<DTYPE>(p.beta, place(p.beta_b, p.beta_t, p.beta_h, head) + t * p.beta_t, p.beta_wide) : 0.0f;
            decayed[t] = beta[t] * exp_log(log_decay[t]);
        }
        __syncthreads();

        // A, and from it what `transform` takes: exact, the inverses of its diagonal blocks; lam, T
        if constexpr (TRANSFORM != NONE) {
            Sums a;
#pragma unroll
            for (int n = 0; n < 2 * COLUMNS; n++) {
                const int block = PARTS * (n / 2) + part;
                if (block > band) break;
#pragma unroll
                for (int e = 0; e < 4; e++) {
                    const int i = 16 * band + r + e / 2 * 8, j = 16 * block + n % 2 * 8 + 2 * c + e % 2;
                    a[n][e] = j < i ? -beta[i] * gram[n][e] * exp_between(log_decay[i], log_decay[j]) : 0.0f;
                    if (TRANSFORM == EXACT && block == band) lines[i * LINE + j - 16 * band] = -a[n][e];
                }
#pragma unroll
                for (int half = 0; half < 2; half++) {
                    const int row0 = 16 * band + 8 * half, j = 16 * block + n % 2 * 8 + 2 * c;
                    if (TRANSFORM == LAM) *lower.pair_at(row0, r, j) = Make<DTYPE>::pair_of(a[n][2 * half], a[n][2 * half + 1]);
                    else if (block < band) *triangle.pair_at(row0, r, j) = Make<DTYPE>::pair_of(a[n][2 * half], a[n][2 * half + 1]);
                }
            }
            if constexpr (TRANSFORM == EXACT) {
                if (band % PARTS == part) invert_block(lines + band * 16 * LINE, triangle, rest, 16 * band);
            } else {
                Sums square = {};
                __syncthreads();
#pragma unroll
                for (int m = 0; m < BLOCKS; m++) {
                    if (m > band) break;
                    Pair<DTYPE> x[4], y[4];
                    lower.rows(x[0], x[1], x[2], x[3], 16 * band, 16 * m);
#pragma unroll
                    for (int j = 0; j < COLUMNS; j++) {
                        const int block = PARTS * j + part;
                        if (block > band || block < m) continue;
                        lower.right_rows(y[0], y[1], y[2], y[3], 16 * block, 16 * m);
                        Product<DTYPE>::add(square[2 * j], x[0], x[1], x[2], x[3], y[0], y[1]);
                        Product<DTYPE>::add(square[2 * j + 1], x[0], x[1], x[2], x[3], y[2], y[3]);
                    }
                }
#pragma unroll
                for (int n = 0; n < 2 * COLUMNS; n++) {
                    const int block = PARTS * (n / 2) + part;
                    if (block > band) break;
#pragma unroll
                    for (int half = 0; half < 2; half++) {
                        const int i = 16 * band + r + 8 * half, j = 16 * block + n % 2 * 8 + 2 * c;
                        const float x = j < i ? a[n][2 * half] + square[n][2 * half] : 0.0f, y = j + 1 < i ? a[n][2 * half + 1] + square[n][2 * half + 1] : 0.0f;
                        *triangle.pair_at(i - r, r, j) = Make<DTYPE>::pair_of(x, y);
                    }
                }
            }
        }

        // 16 columns: dX in du's place and u in V's (exact), dv; dZ in dw's place and w beside it (exact), or dZ there (lam)
        const auto solve_values = [&](int slice, int group) {
            const int at = slice * SLICE + 16 * group, values_at = slice * GROUPS + group;
            const int64_t stride = static_cast<int64_t>(p.heads) * VALUES;
            DTYPE* const out = p.dv + (static_cast<int64_t>(fresh(batch)) * p.tokens + fresh(begin)) * stride + head * VALUES + at;
            transform<true>(into_u, 16 * group, nullptr, triangle, rest, [&](int token, Columns& x) {
                if (through) x.meet(values, 16 * group, token, met_u + values_at * SIDE);
                if (TRANSFORM == EXACT && through) x.keep(into_u, 16 * group, token);
                if (p.dv) {
                    x.weigh(beta, token);
                    x.store(out + token * stride, stride, length - token, VALUES - at);
                }
            });
            if (TRANSFORM == EXACT && through) transform<false>(values, 16 * group, beta, triangle, rest, [&](int token, Columns& x) { x.keep(values, 16 * group, token); });
        };
        const auto solve_keys = [&](int slice, int group, bool again) {
            transform<true>(into_w, 16 * group, nullptr, triangle, rest, [&](int token, Columns& x) {
                if (!again) x.meet(keys, 16 * group, token, met_w + (slice * GROUPS + group) * SIDE);
                if (TRANSFORM != NONE) x.keep(TRANSFORM == LAM ? free : into_w, 16 * group, token);
            });
            if (TRANSFORM == EXACT && !again) transform<false>(keys, 16 * group, decayed, triangle, rest, [&](int token, Columns& x) { x.keep(free, 16 * group, token); });
        };
        const auto take_queries = [&](Sums& sums) {  // of lam, the key part of D's columns is scaled alone
            if constexpr (TRANSFORM == LAM) {
#pragma unroll
                for (int n = 0; n < 2 * COLUMNS; n++) {
                    const int block = PARTS * (n / 2) + part;
                    if (block > band) break;
#pragma unroll
                    for (int e = 0; e < 4; e++) sums[n][e] *= exp_log(log_decay[16 * block + n % 2 * 8 + 2 * c + e % 2]);
                }
            }
        };
        Sums d = {};  // dA; of lam first D
        if constexpr (RESIDENT) {
            cp_async_wait<0>();
            __syncthreads();
            for (int task = warp; task < (p.du ? VALUE_GROUPS : 0) + (p.dw ? KEY_GROUPS : 0); task += WARPS) {
                if (p.du && task < VALUE_GROUPS) solve_values(0, task);
                else if (p.dw && through) solve_keys(0, task - (p.du ? VALUE_GROUPS : 0), false);
            }
            __syncthreads();
            if (TRANSFORM != NONE && through) {
                if (p.dw) {
                    add_square(d, into_w, TRANSFORM == EXACT ? free : keys, band, part, KEY_GROUPS);
                    take_queries(d);
                }
                if (p.du) add_square(d, into_u, values, band, part, VALUE_GROUPS);
            }
        } else {
            __syncthreads();
            if (p.dw) {
#pragma unroll 1
                for (int slice = 0; slice < (through ? KEY_SLICES : 0); slice++) {
                    load_keys(slice);
                    load_into_w(slice, head);
                    arrived();
                    for (int group = warp; group < GROUPS && slice * GROUPS + group < KEY_GROUPS; group += WARPS) solve_keys(slice, group, false);
                    __syncthreads();
                    if (TRANSFORM != NONE) add_square(d, into_w, TRANSFORM == EXACT ? free : keys, band, part, KEY_GROUPS - slice * GROUPS);
                    __syncthreads();
                }
                take_queries(d);
            }
            if (p.du) {
#pragma unroll 1
                for (int slice = 0; slice < VALUE_SLICES; slice++) {
                    load_values(slice, head);
                    arrived();
                    for (int group = warp; group < GROUPS && slice * GROUPS + group < VALUE_GROUPS; group += WARPS) solve_values(slice, group);
                    __syncthreads();
                    if (TRANSFORM != NONE && through) add_square(d, into_u, values, band, part, VALUE_GROUPS - slice * GROUPS);
                    __syncthreads();
                }
            }
        }

        if (TRANSFORM != NONE && through) {
            if constexpr (TRANSFORM == LAM) {
#pragma unroll
                for (int n = 0; n < 2 * COLUMNS; n++) {
                    const int block = PARTS * (n / 2) + part;
                    if (block > band) break;
#pragma unroll
                    for (int e = 0; e < 4; e++) {
                        const int i = 16 * band + r + e / 2 * 8, j = 16 * block + n % 2 * 8 + 2 * c + e % 2;
                        d[n][e] = j < i ? d[n][e] * beta[j] : 0.0f;
                    }
                }
                keep_symmetric(symmetric, d, band, part);
                __syncthreads();
#pragma unroll
                for (int m = 0; m < BLOCKS; m++) {
                    Pair<DTYPE> x[4], y[4];
                    symmetric.rows(x[0], x[1], x[2], x[3], 16 * band, 16 * m);
#pragma unroll
                    for (int j = 0; j < COLUMNS; j++) {
                        const int block = PARTS * j + part;
                        if (block > band || block > m) break;
                        lower.right_columns(y[0], y[1], y[2], y[3], 16 * block, 16 * m);
                        Product<DTYPE>::add(d[2 * j], x[0], x[1], x[2], x[3], y[0], y[1]);
                        Product<DTYPE>::add(d[2 * j + 1], x[0], x[1], x[2], x[3], y[2], y[3]);
                    }
                }
                __syncthreads();
            }
            float row_sums[2] = {};
#pragma unroll
            for (int n = 0; n < 2 * COLUMNS; n++) {
                const int block = PARTS * (n / 2) + part;
                if (block > band) break;
                float column_sums[2] = {};
#pragma unroll
                for (int e = 0; e < 4; e++) {
                    const int i = 16 * band + r + e / 2 * 8, j = 16 * block + n % 2 * 8 + 2 * c + e % 2;
                    const float x = j < i ? -d[n][e] * exp_between(log_decay[i], log_decay[j]) : 0.0f, y = gram[n][e] * x;
                    d[n][e] = beta[i] * x;
                    row_sums[e / 2] += y;
                    column_sums[e % 2] += beta[i] * y;
                }
                if (p.dg) {
#pragma unroll
                    for (int e = 0; e < 2; e++)
#pragma unroll
                        for (int lanes = 4; lanes < 32; lanes *= 2) column_sums[e] += __shfl_xor_sync(0xffffffffu, column_sums[e], lanes);
                    if (r == 0) *reinterpret_cast<float2*>(column_parts + band * SIDE + 16 * block + n % 2 * 8 + 2 * c) = make_float2(column_sums[0], column_sums[1]);
                }
            }
#pragma unroll
            for (int half = 0; half < 2; half++) {
                row_sums[half] += __shfl_xor_sync(0xffffffffu, row_sums[half], 1);
                row_sums[half] += __shfl_xor_sync(0xffffffffu, row_sums[half], 2);
                if (c == 0) row_parts[part * SIDE + 16 * band + r + 8 * half] = row_sums[half];
            }
            keep_symmetric(symmetric, d, band, part);
        }
        __syncthreads();
        if (RESIDENT && GROUPED && p.du && member < p.group - 1) {  // the next head's come while this one's sums are finished
            load_values(0, head + 1);
            cp_async_commit();
        }

        if (p.dbeta || p.dg) {
            const int64_t out = (static_cast<int64_t>(fresh(batch)) * p.tokens + fresh(begin)) * p.heads + head;
            for (int t = threadIdx.x; t < SIDE; t += THREADS) {
                float from_u = 0.0f, from_w = 0.0f, row = 0.0f, column = 0.0f;
                for (int i = 0; p.du && i < VALUE_GROUPS; i++) from_u += met_u[i * SIDE + t];
                for (int i = 0; p.dw && i < KEY_GROUPS; i++) from_w += met_w[i * SIDE + t];
                for (int i = 0; TRANSFORM != NONE && i < PARTS; i++) row += row_parts[i * SIDE + t];
                for (int i = t / 16; TRANSFORM != NONE && p.dg && i < BLOCKS; i++) column += column_parts[i * SIDE + t];
                if (p.dbeta && t < length) store_gate<DTYPE>(p.dbeta, out + static_cast<int64_t>(t) * p.heads, p.beta_wide, from_u + exp_log(log_decay[t]) * from_w + row);
                flows[t] = decayed[t] * from_w + beta[t] * row - column;
            }
            __syncthreads();
            if (p.dg && warp == 0) {
                float after = 0.0f;
                for (int base = (SIDE - 1) / 32 * 32; base >= 0; base -= 32) {
                    const int t = base + lane;
                    float sum = t < length ? flows[t] : 0.0f;
#pragma unroll
                    for (int step = 1; step < 32; step *= 2) {
                        const float x = __shfl_down_sync(0xffffffffu, sum, step);
                        if (lane + step < 32) sum += x;
                    }
                    if (t < length) store_gate<DTYPE>(p.dg, out + static_cast<int64_t>(t) * p.heads, p.g_wide, sum + after);
                    after += __shfl_sync(0xffffffffu, sum, 0);
                }
            }
        }

        if (p.dk) {
            const bool last = !GROUPED || member == p.group - 1;
            const int64_t stride = static_cast<int64_t>(groups) * KEYS;
            DTYPE* const out = p.dk + (static_cast<int64_t>(fresh(batch)) * p.tokens + fresh(begin)) * stride + shared_head * KEYS;
            const auto finish = [&](int group, int column, float (&sums)[2 * BLOCKS][4]) {
                const Right& dz = TRANSFORM == LAM ? free : into_w;
                Pair<DTYPE> a[BLOCKS][4], b[4];
                if constexpr (TRANSFORM != NONE) {
#pragma unroll
                    for (int m = 0; m < BLOCKS; m++) keys.columns(a[m][0], a[m][1], a[m][2], a[m][3], column, 16 * m);
                }
#pragma unroll
                for (int i = 0; i < BLOCKS; i++) {
                    Columns x = {};
                    if (p.dw) {
                        x.load(dz, column, 16 * i);
                        x.weigh(decayed, 16 * i);
                    }
                    if constexpr (GROUPED) {
#pragma unroll
                        for (int e = 0; e < 8; e++) x.x[e / 4][e % 4] += sums[2 * i + e / 4][e % 4];
                    }
                    if constexpr (TRANSFORM != NONE) {
#pragma unroll
                        for (int m = 0; m < BLOCKS; m++) {
                            symmetric.right_rows(b[0], b[1], b[2], b[3], 16 * i, 16 * m);
                            x.add(a[m], b);
                        }
                    }
                    if constexpr (GROUPED) {
#pragma unroll
                        for (int e = 0; e < 8; e++) sums[2 * i + e / 4][e % 4] = x.x[e / 4][e % 4];
                    }
                    if (last) x.store(out + 16 * i * stride + 16 * group, stride, length - 16 * i, KEYS - 16 * group);
                }
            };
#pragma unroll 1
            for (int slice = 0; slice < (RESIDENT ? 1 : KEY_SLICES); slice++) {
                if constexpr (!RESIDENT) {
                    __syncthreads();
                    load_keys(slice);
                    if (p.dw) load_into_w(slice, head);
                    arrived();
                }
#pragma unroll
                for (int round = 0; round < KEY_ROUNDS; round++) {
                    const int group = round * WARPS + warp, mine = group - slice * GROUPS;
                    if (group >= KEY_GROUPS || mine < 0 || mine >= GROUPS) continue;
                    if (!RESIDENT && p.dw) {
                        solve_keys(slice, mine, true);
                        __syncwarp();
                    }
                    finish(group, 16 * mine, kept[GROUPED ? round : 0]);
                }
            }
        }
        if (GROUPED) __syncthreads();
    }
}
