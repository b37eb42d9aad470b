// u and w of a chunk and head (SPEC.md 3): A = -stril(diag(beta) K K^T * Gamma), [u | w] = T [beta V | beta e^G K];
//   exact: T = (I - A)^-1, applied by substitution over blocks of 16 tokens, whose own triangles are inverted in float32;
//   lam: T = I + A + stril(A A^T);   none: T = I.
// A token and head costs about C (2 K + V) FLOP and (2 K + 2 V) numbers moved: bound by memory (H100, bf16, 1 x 8192, 32 heads of 128: 268 MB, 90 us).
// One block a chunk and head. A warp takes 16 rows of K K^T; then it takes 16 columns of [V | K], transposed, so that what it solved is the next
// product's operand as it stands in its registers, and goes down the chunk alone.
//
// DTYPE; KEYS, VALUES: head_dims; SIDE: tokens of a tile, 16 to 128; TRANSFORM: 0 none, 1 exact, 2 lam; SLICE: columns that are loaded at once;
// WARPS, at least SIDE / 16; ALIGNED: 16-byte copies can take the rows of k and v.
#include "uw_tiles.cuh"

constexpr bool HALF = Dtype<DTYPE>::half, TOGETHER = KEY_SLICES == 1 && VALUE_SLICES == 1;
constexpr int TRIANGLE_BYTES = TRANSFORM == NONE ? 0 : SQUARE_BYTES, LINES_BYTES = TRANSFORM == EXACT ? BLOCKS * 16 * LINE * 4 : 0;

struct Params {
    const DTYPE *k, *v;
    const void *beta, *g;
    DTYPE *u, *w;
    const void* cu_seqlens;
    int64_t k_b, k_t, k_h, v_b, v_t, v_h, beta_b, beta_t, beta_h, g_b, g_t, g_h;
    int heads, group, beta_wide, g_wide, cu_wide, sequences, tokens, chunk_size, slots;
};

// 16 columns of T times the right side whose tokens are weighted: `right`'s columns from `column` on, to `out`'s from its own on
DEVICE void solve(const Right& right, int column, const float* weight, const Square& triangle, const Rest& rest, DTYPE* out, int64_t stride, int columns, int length) {
    const int lane = lane_id(), r = lane / 4, c = lane % 4;
    Pair<DTYPE> solved[BLOCKS][4];
#pragma unroll
    for (int i = 0; i < BLOCKS; i++) {
        if (16 * i >= length) break;
        Pair<DTYPE> p[4];
        float x[2][4];
        right.columns(p[0], p[1], p[2], p[3], column, 16 * i);
#pragma unroll
        for (int half = 0; half < 2; half++) {
            const float2 by = *reinterpret_cast<const float2*>(weight + 16 * i + 8 * half + 2 * c);
#pragma unroll
            for (int e = 0; e < 2; e++) {
                const float2 both = Make<DTYPE>::floats(p[2 * half + e]);
                x[half][2 * e] = both.x * by.x, x[half][2 * e + 1] = both.y * by.y;
            }
        }
        Pair<DTYPE> b[4];
        if constexpr (TRANSFORM == LAM) as_operand<DTYPE>(solved[i], x[0], x[1]);
        if constexpr (TRANSFORM != NONE) {
#pragma unroll
            for (int j = 0; j < i + (TRANSFORM == LAM); j++) {
                triangle.rows(b[0], b[1], b[2], b[3], 16 * i, 16 * j);
                Product<DTYPE>::add(x[0], solved[j][0], solved[j][1], solved[j][2], solved[j][3], b[0], b[2]);
                Product<DTYPE>::add(x[1], solved[j][0], solved[j][1], solved[j][2], solved[j][3], b[1], b[3]);
            }
        }
        if constexpr (TRANSFORM == EXACT) {
            Pair<DTYPE> y[4];
            as_operand<DTYPE>(y, x[0], x[1]);
#pragma unroll
            for (int e = 0; e < 4; e++) x[0][e] = x[1][e] = 0.0f;
            if constexpr (HALF) {
                rest.rows(b[0], b[1], b[2], b[3], 16 * i, 0);
                Product<DTYPE>::add(x[0], y[0], y[1], y[2], y[3], b[0], b[2]);
                Product<DTYPE>::add(x[1], y[0], y[1], y[2], y[3], b[1], b[3]);
            }
            triangle.rows(b[0], b[1], b[2], b[3], 16 * i, 16 * i);
            Product<DTYPE>::add(x[0], y[0], y[1], y[2], y[3], b[0], b[2]);
            Product<DTYPE>::add(x[1], y[0], y[1], y[2], y[3], b[1], b[3]);
            as_operand<DTYPE>(solved[i], x[0], x[1]);
        }
#pragma unroll
        for (int half = 0; half < 2; half++) {
#pragma unroll
            for (int e = 0; e < 2; e++) {
                const int token = 16 * i + 8 * half, at = 8 * e;
                store_turned<KEYS % 2 == 0 && VALUES % 2 == 0>(out + token * stride + at, stride, x[half][2 * e], x[half][2 * e + 1], length - token, columns - at);
            }
        }
    }
}

extern "C" __global__ void __launch_bounds__(THREADS) uw_transform(const __grid_constant__ Params p) {
    SHARED_MEMORY(memory);
    const Right buffers[2] = {Right{memory}, Right{memory + SLICE_BYTES}};
    const Square triangle{memory + 2 * SLICE_BYTES};
    const Rest rest{triangle.base + TRIANGLE_BYTES};
    float* const lines = reinterpret_cast<float*>(rest.base + REST_BYTES);
    Log* const log_decay = reinterpret_cast<Log*>(reinterpret_cast<unsigned char*>(lines) + LINES_BYTES);
    float *const beta = reinterpret_cast<float*>(log_decay + SIDE), *const decayed = beta + SIDE;

    const int head = blockIdx.x % p.heads, warp = threadIdx.x / 32, lane = lane_id(), r = lane / 4, c = lane % 4;
    const Chunk chunk = find_chunk(Grid{p.cu_seqlens, p.cu_wide, p.sequences, p.tokens, p.chunk_size, 0, p.slots}, blockIdx.x / p.heads);
    if (chunk.length == 0) return;
    const DTYPE* k = p.k + chunk.batch * p.k_b + chunk.begin * p.k_t + head / p.group * p.k_h;
    const DTYPE* v = p.v + chunk.batch * p.v_b + chunk.begin * p.v_t + head * p.v_h;
    const int64_t row = (chunk.batch * p.tokens + chunk.begin) * p.heads + head;

    // slices in the order of their use: all of the keys for the triangle, the keys again for w unless one slice holds them, then the values
    constexpr int FIRST = TRANSFORM == NONE ? 0 : KEY_SLICES, AGAIN = FIRST == 1 ? 0 : KEY_SLICES, SLICES = FIRST + AGAIN + VALUE_SLICES;
    const auto load = [&](int slice) {
        if (slice < SLICES) {
            const bool keys = slice < FIRST + AGAIN;
            const int column = (keys ? slice % KEY_SLICES : slice - FIRST - AGAIN) * SLICE;
            load_tile<SIDE, THREADS, ALIGNED>(buffers[slice % 2], (keys ? k : v) + column, keys ? p.k_t : p.v_t, chunk.length, (keys ? KEYS : VALUES) - column);
        }
        cp_async_commit();
    };
    load(0);
    load(1);
    if (warp == 0) running_log<DTYPE>(log_decay, SIDE, p.g, chunk.batch * p.g_b + chunk.begin * p.g_t + head * p.g_h, p.g_t, p.g_wide, chunk.length);
    __syncthreads();
    for (int t = threadIdx.x; t < SIDE; t += THREADS) {
        beta[t] = t < chunk.length ? load_gate<DTYPE>(p.beta, chunk.batch * p.beta_b + (chunk.begin + t) * p.beta_t + head * p.beta_h, p.beta_wide) : 0.0f;
        decayed[t] = beta[t] * exp_log(log_decay[t]);
    }

    if constexpr (TRANSFORM != NONE) {
        float sums[2 * BLOCKS][4] = {};
#pragma unroll 1
        for (int slice = 0; slice < FIRST; slice++) {
            cp_async_wait<1>();
            __syncthreads();
            if (warp < BLOCKS) {
                const Right& keys = buffers[slice % 2];
#pragma unroll(STEPS_AT_ONCE<DTYPE>)
                for (int s = 0; s < SLICE / 16; s++) {
                    Pair<DTYPE> a[4], b[4];
                    keys.rows(a[0], a[1], a[2], a[3], 16 * warp, 16 * s);
#pragma unroll
                    for (int j = 0; j < BLOCKS; j++) {
                        if (j > warp) break;
                        keys.rows(b[0], b[1], b[2], b[3], 16 * j, 16 * s);
                        Product<DTYPE>::add(sums[2 * j], a[0], a[1], a[2], a[3], b[0], b[2]);
                        Product<DTYPE>::add(sums[2 * j + 1], a[0], a[1], a[2], a[3], b[1], b[3]);
                    }
                }
            }
            if (FIRST > 1) {
                __syncthreads();
                load(slice + 2);
            }
        }
        if (warp < BLOCKS) {
            float* const mine = lines + warp * 16 * LINE;
#pragma unroll
            for (int n = 0; n < 2 * BLOCKS; n++) {
                if (n > 2 * warp + 1) break;
#pragma unroll
                for (int half = 0; half < 2; half++) {
                    const int i = 16 * warp + 8 * half + r;
#pragma unroll
                    for (int e = 0; e < 2; e++) {
                        const int j = 8 * n + 2 * c + e;
                        float& x = sums[n][2 * half + e];
                        x = j < i ? -beta[i] * x * exp_between(log_decay[i], log_decay[j]) : 0.0f;
                        if (TRANSFORM == EXACT && n >= 2 * warp) mine[(8 * half + r) * LINE + j - 16 * warp] = -x;
                    }
                    if (TRANSFORM == LAM || n < 2 * warp) *triangle.pair_at(i, 8 * n + 2 * c) = Make<DTYPE>::pair_of(sums[n][2 * half], sums[n][2 * half + 1]);
                }
            }
            if constexpr (TRANSFORM == EXACT) invert_block(mine, triangle, rest, 16 * warp);
        }
        if constexpr (TRANSFORM == LAM) {
            float again[2 * BLOCKS][4] = {};
            __syncthreads();
            if (warp < BLOCKS) {
#pragma unroll
                for (int m = 0; m < BLOCKS; m++) {
                    if (m > warp) break;
                    Pair<DTYPE> a[4], b[4];
                    triangle.rows(a[0], a[1], a[2], a[3], 16 * warp, 16 * m);
#pragma unroll
                    for (int j = m; j < BLOCKS; j++) {
                        if (j > warp) break;
                        triangle.rows(b[0], b[1], b[2], b[3], 16 * j, 16 * m);
                        Product<DTYPE>::add(again[2 * j], a[0], a[1], a[2], a[3], b[0], b[2]);
                        Product<DTYPE>::add(again[2 * j + 1], a[0], a[1], a[2], a[3], b[1], b[3]);
                    }
                }
            }
            __syncthreads();
            if (warp < BLOCKS) {
#pragma unroll
                for (int n = 0; n < 2 * BLOCKS; n++) {
                    if (n > 2 * warp + 1) break;
#pragma unroll
                    for (int half = 0; half < 2; half++) {
                        const int i = 16 * warp + 8 * half + r, j = 8 * n + 2 * c;
                        const float x = j < i ? sums[n][2 * half] + again[n][2 * half] : 0.0f;
                        const float y = j + 1 < i ? sums[n][2 * half + 1] + again[n][2 * half + 1] : 0.0f;
                        *triangle.pair_at(i, j) = Make<DTYPE>::pair_of(x, y);
                    }
                }
            }
        }
    }

    const int64_t keys_stride = static_cast<int64_t>(p.heads) * KEYS, values_stride = static_cast<int64_t>(p.heads) * VALUES;
    const auto groups = [&](const Right& right, bool keys, int column, int first, int step) {
        const int columns = keys ? KEYS : VALUES;
        for (int group = first; group < SLICE / 16; group += step) {
            const int at = column + 16 * group;
            if (at >= columns) break;
            solve(right, 16 * group, keys ? decayed : beta, triangle, rest, (keys ? p.w : p.u) + row * columns + at, keys ? keys_stride : values_stride,
                  columns - at, chunk.length);
        }
    };
    if constexpr (TOGETHER) {
        cp_async_wait<0>();
        __syncthreads();
        for (int group = warp; group < 2 * (SLICE / 16); group += WARPS) {
            const bool keys = group < SLICE / 16;
            groups(buffers[keys ? 0 : 1], keys, 0, keys ? group : group - SLICE / 16, SLICE);
        }
    } else {
#pragma unroll 1
        for (int slice = FIRST == 1 ? 0 : FIRST; slice < SLICES; slice++) {
            const bool keys = slice < FIRST + AGAIN;
            cp_async_wait<1>();
            __syncthreads();
            groups(buffers[slice % 2], keys, (keys ? slice % KEY_SLICES : slice - FIRST - AGAIN) * SLICE, warp, WARPS);
            __syncthreads();
            load(slice + 2);
        }
    }
}
