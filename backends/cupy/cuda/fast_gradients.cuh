// What the kernels of fast_core's backward share: their parameters, and how a warp stores what it summed.
#ifndef TITANS_FAST_GRADIENTS_CUH
#define TITANS_FAST_GRADIENTS_CUH

#include "fast_tiles.cuh"
#include "stores.cuh"

constexpr int WIDEST = KEY_WIDTH > VALUE_WIDTH ? KEY_WIDTH : VALUE_WIDTH;

struct Params {
    const DTYPE *q, *k, *v;
    const void *gate, *g;
    const DTYPE* d_o;
    const float *initial, *d_final;
    DTYPE *dq, *dk, *dv;
    void *dgate, *dg;
    float *inflow, *outflow;  // [B, H, T]: colsum and rowsum of F P D
    float *d_initial, *total;  // total [N, H]: <W, dW at the start>, dg before the first token
    const void* cu_seqlens;
    int64_t q_b, q_t, q_h, k_b, k_t, k_h, v_b, v_t, v_h, gate_b, gate_t, gate_h, g_b, g_t, g_h, do_b, do_t, do_h;
    int heads, group, gate_wide, g_wide, cu_wide, sequences, tokens, chunk_size, offset, slots;
    int tiles, as_queries, as_keys;  // tiles of a chunk; which sweeps are launched
    float scale;
};

// the sum over the four lanes that hold a row
DEVICE float row_sum(float x) {
    x += __shfl_xor_sync(0xffffffffu, x, 1);
    return x + __shfl_xor_sync(0xffffffffu, x, 2);
}

// the sum of x over the lanes up to this one
DEVICE float sum_up_to(float x, int lane) {
#pragma unroll
    for (int step = 1; step < 32; step *= 2) {
        const float y = __shfl_up_sync(0xffffffffu, x, step);
        if (lane >= step) x += y;
    }
    return x;
}

// acc += a (16 x 16) times 16 rows of `met` from `row` on
template <int N, int WIDTH> DEVICE void add_rows(float (&acc)[N][4], const Pair<DTYPE> (&a)[4], const Tile<DTYPE, WIDTH>& met, int row) {
#pragma unroll
    for (int n = 0; n < WIDTH / 16; n++) {
        Pair<DTYPE> b[4];
        met.right_columns(b[0], b[1], b[2], b[3], 16 * n, row);
        Product<DTYPE>::add(acc[2 * n], a[0], a[1], a[2], a[3], b[0], b[1]);
        Product<DTYPE>::add(acc[2 * n + 1], a[0], a[1], a[2], a[3], b[2], b[3]);
    }
}

// 16 rows of a gradient, those below `rows`
template <int WIDTH> DEVICE void store_rows(DTYPE* to, int64_t stride, const float (&acc)[WIDEST / 8][4], int rows, int columns) {
    const int r = lane_id() / 4, c = lane_id() % 4;
#pragma unroll
    for (int half = 0; half < 2; half++) {
        if (r + 8 * half >= rows) break;
#pragma unroll
        for (int n = 0; n < WIDTH / 8; n++) {
            const int at = 8 * n + 2 * c;
            store_pair<KEYS % 2 == 0 && VALUES % 2 == 0>(to + (r + 8 * half) * stride + at, acc[n][2 * half], acc[n][2 * half + 1], columns - at);
        }
    }
}

#endif
