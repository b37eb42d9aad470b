// What the kernels of fast_core's backward share: their parameters, and how a warp stores what it summed.
#ifndef TITANS_FAST_GRADIENTS_CUH
#define TITANS_FAST_GRADIENTS_CUH

#include "chunks.cuh"
#include "tiles.cuh"

constexpr int KEY_WIDTH = KEYS <= 32 ? 32 : KEYS <= 64 ? 64 : 128, VALUE_WIDTH = VALUES <= 32 ? 32 : VALUES <= 64 ? 64 : 128;
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

using KeyTile = Tile<DTYPE, KEY_WIDTH>;
using ValueTile = Tile<DTYPE, VALUE_WIDTH>;

DEVICE Grid grid_of(const Params& p) { return Grid{p.cu_seqlens, p.cu_wide, p.sequences, p.tokens, p.chunk_size, p.offset, p.slots}; }

DEVICE void store_gate(void* gate, int64_t at, float x, int wide) {
    if (wide) static_cast<float*>(gate)[at] = x;
    else static_cast<DTYPE*>(gate)[at] = narrow<DTYPE>(x);
}

// the sum over the four lanes that hold a row
DEVICE float row_sum(float x) {
    x += __shfl_xor_sync(0xffffffffu, x, 1);
    return x + __shfl_xor_sync(0xffffffffu, x, 2);
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
