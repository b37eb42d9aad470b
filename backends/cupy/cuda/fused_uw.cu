// u = attn_const v_beta and w = attn_const k_beta, one matrix [C, C] times [C, V] and [C, K] for each of the leading dimensions (SPEC.md 3, last line).
// A matrix costs 2 C^2 (K + V) FLOP and moves C^2 + 2 C (K + V) numbers: bound by memory (H100, bf16, 4096 matrices of 64, K = V = 128: 302 MB, 100 us).
// A block takes SIDE rows and one slice of columns of u or of w, tiles of INNER tokens of both operands loaded ahead; nothing is assumed triangular.
//
// DTYPE; KEYS, VALUES: head_dims; SIDE rows of a block, 16 for each of its warps along them; INNER; SLICE: columns; SPLIT: warps along the columns;
// ALIGNED: 16-byte copies can take all rows.
#include "tiles.cuh"

constexpr int THREADS = 2 * SIDE * SPLIT, MINE = SLICE / SPLIT;
constexpr int KEY_SLICES = (KEYS + SLICE - 1) / SLICE, VALUE_SLICES = (VALUES + SLICE - 1) / SLICE;
constexpr int LEFT_BYTES = SIDE * INNER * sizeof(DTYPE), RIGHT_BYTES = INNER * SLICE * sizeof(DTYPE);

struct Params {
    const DTYPE *attn, *v, *k;
    DTYPE *u, *w;
    int64_t attn_m, attn_c, v_m, v_c, k_m, k_c;  // from one matrix to the next, from one row to the next
    int size, blocks;  // C, and blocks of rows in a matrix
};

extern "C" __global__ void __launch_bounds__(THREADS) fused_uw(const __grid_constant__ Params p) {
    SHARED_MEMORY(memory);
    const Tile<DTYPE, INNER> lefts[2] = {{memory}, {memory + LEFT_BYTES}};
    const Tile<DTYPE, SLICE> rights[2] = {{memory + 2 * LEFT_BYTES}, {memory + 2 * LEFT_BYTES + RIGHT_BYTES}};
    const int slice = blockIdx.x % (KEY_SLICES + VALUE_SLICES), block = blockIdx.x / (KEY_SLICES + VALUE_SLICES);
    const int64_t matrix = block / p.blocks;
    const int row = block % p.blocks * SIDE;
    const bool keys = slice >= VALUE_SLICES;
    const int column = (keys ? slice - VALUE_SLICES : slice) * SLICE, columns = (keys ? KEYS : VALUES) - column;
    const DTYPE* left = p.attn + matrix * p.attn_m + row * p.attn_c;
    const DTYPE* right = (keys ? p.k + matrix * p.k_m : p.v + matrix * p.v_m) + column;
    const int64_t right_c = keys ? p.k_c : p.v_c;
    const int steps = (p.size + INNER - 1) / INNER;
    const auto load = [&](int step) {
        if (step < steps) {
            const int at = step * INNER;
            load_tile<SIDE, THREADS, ALIGNED>(lefts[step % 2], left + at, p.attn_c, p.size - row, p.size - at);
            load_tile<INNER, THREADS, ALIGNED>(rights[step % 2], right + at * right_c, right_c, p.size - at, columns);
        }
        cp_async_commit();
    };
    load(0);
    load(1);
    const int warp = threadIdx.x / 32, lane = lane_id(), first = warp % (SIDE / 16) * 16, from = warp / (SIDE / 16) * MINE;
    float sums[MINE / 8][4] = {};
#pragma unroll 1
    for (int step = 0; step < steps; step++) {
        cp_async_wait<1>();
        __syncthreads();
#pragma unroll(STEPS_AT_ONCE<DTYPE>)
        for (int s = 0; s < INNER / 16; s++) {
            Pair<DTYPE> a[4], b[4];
            lefts[step % 2].rows(a[0], a[1], a[2], a[3], first, 16 * s);
#pragma unroll
            for (int n = 0; n < MINE / 16; n++) {
                rights[step % 2].columns(b[0], b[1], b[2], b[3], from + 16 * n, 16 * s);
                Product<DTYPE>::add(sums[2 * n], a[0], a[1], a[2], a[3], b[0], b[2]);
                Product<DTYPE>::add(sums[2 * n + 1], a[0], a[1], a[2], a[3], b[1], b[3]);
            }
        }
        __syncthreads();
        load(step + 2);
    }
    DTYPE* out = (keys ? p.w : p.u) + (matrix * p.size + row) * (keys ? KEYS : VALUES) + column;
    const int stride = keys ? KEYS : VALUES;
#pragma unroll
    for (int n = 0; n < MINE / 8; n++) {
#pragma unroll
        for (int half = 0; half < 2; half++) {
            const int at = from + 8 * n + 2 * (lane % 4), token = first + 8 * half + lane / 4;
            if (token + row < p.size) store_pair<KEYS % 2 == 0 && VALUES % 2 == 0>(out + token * stride + at, sums[n][2 * half], sums[n][2 * half + 1], columns - at);
        }
    }
}
