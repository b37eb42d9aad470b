// The gradients of u = A v and w = A k for one matrix A [C, C] of each of the leading dimensions (SPEC.md 10, the products alone):
//   fused_uw_operands: dv = A^T du and dk = A^T dw;      fused_uw_attn: dA = du v^T + dw k^T.
// Each costs 2 C^2 (K + V) FLOP a matrix; they move C^2 + 2 C (K + V) and C^2 + 2 C (K + V) numbers: bound by memory. Nothing is assumed triangular.
// A block takes SIDE rows and one slice of columns of its result, in tiles of INNER of what is summed over, loaded ahead.
//
// DTYPE; KEYS, VALUES: head_dims; SIDE rows of a block, 16 a warp; INNER; SLICE: columns; ALIGNED: 16-byte copies can take all rows;
// GIVEN_U, GIVEN_W: a gradient of u, of w arrives.
#include "tiles.cuh"

constexpr int THREADS = 2 * SIDE, SIZE = sizeof(DTYPE);
constexpr int KEY_SLICES = (KEYS + SLICE - 1) / SLICE, VALUE_SLICES = (VALUES + SLICE - 1) / SLICE;

struct Params {
    const DTYPE *attn, *v, *k, *du, *dw;
    DTYPE *d_attn, *dv, *dk;
    int64_t attn_m, attn_c, v_m, v_c, k_m, k_c, du_m, du_c, dw_m, dw_c;  // from one matrix to the next, from one row to the next
    int size, blocks;  // C, and blocks of rows in a matrix
};

// SIDE rows of A^T times a slice of du or dw
extern "C" __global__ void __launch_bounds__(THREADS) fused_uw_operands(const __grid_constant__ Params p) {
    SHARED_MEMORY(memory);
    constexpr int LEFT_BYTES = INNER * SIDE * SIZE, RIGHT_BYTES = INNER * SLICE * SIZE;
    const Tile<DTYPE, SIDE> lefts[2] = {{memory}, {memory + LEFT_BYTES}};
    const Tile<DTYPE, SLICE> rights[2] = {{memory + 2 * LEFT_BYTES}, {memory + 2 * LEFT_BYTES + RIGHT_BYTES}};
    const int slice = blockIdx.x % (KEY_SLICES + VALUE_SLICES), block = blockIdx.x / (KEY_SLICES + VALUE_SLICES);
    const int64_t matrix = block / p.blocks;
    const int row = block % p.blocks * SIDE, warp = threadIdx.x / 32, lane = lane_id();
    const bool keys = slice >= VALUE_SLICES;
    const int column = (keys ? slice - VALUE_SLICES : slice) * SLICE, width = keys ? KEYS : VALUES, columns = width - column;
    if (!(keys ? p.dk : p.dv)) return;
    const DTYPE* left = p.attn + matrix * p.attn_m + row;
    const DTYPE* right = (keys ? p.dw + matrix * p.dw_m : p.du + matrix * p.du_m) + column;
    const int64_t right_c = keys ? p.dw_c : p.du_c;
    const int steps = (p.size + INNER - 1) / INNER;
    const auto load = [&](int step) {
        if (step < steps) {
            const int at = step * INNER;
            load_tile<INNER, THREADS, ALIGNED>(lefts[step % 2], left + at * p.attn_c, p.attn_c, p.size - at, p.size - row);
            load_tile<INNER, THREADS, ALIGNED>(rights[step % 2], right + at * right_c, right_c, p.size - at, columns);
        }
        cp_async_commit();
    };
    load(0);
    load(1);
    float sums[SLICE / 8][4] = {};
#pragma unroll 1
    for (int step = 0; step < steps; step++) {
        cp_async_wait<1>();
        __syncthreads();
#pragma unroll(STEPS_AT_ONCE<DTYPE>)
        for (int s = 0; s < INNER / 16; s++) {
            Pair<DTYPE> a[4], b[4];
            lefts[step % 2].columns(a[0], a[1], a[2], a[3], 16 * warp, 16 * s);
#pragma unroll
            for (int n = 0; n < SLICE / 16; n++) {
                rights[step % 2].columns(b[0], b[1], b[2], b[3], 16 * n, 16 * s);
                Product<DTYPE>::add(sums[2 * n], a[0], a[1], a[2], a[3], b[0], b[2]);
                Product<DTYPE>::add(sums[2 * n + 1], a[0], a[1], a[2], a[3], b[1], b[3]);
            }
        }
        __syncthreads();
        load(step + 2);
    }
    DTYPE* out = (keys ? p.dk : p.dv) + (matrix * p.size + row) * width + column;
#pragma unroll
    for (int n = 0; n < SLICE / 8; n++) {
#pragma unroll
        for (int half = 0; half < 2; half++) {
            const int at = 8 * n + 2 * (lane % 4), token = 16 * warp + 8 * half + lane / 4;
            if (token + row < p.size) store_pair<KEYS % 2 == 0 && VALUES % 2 == 0>(out + token * width + at, sums[n][2 * half], sums[n][2 * half + 1], columns - at);
        }
    }
}

// SIDE rows and SIDE columns of dA
extern "C" __global__ void __launch_bounds__(THREADS) fused_uw_attn(const __grid_constant__ Params p) {
    SHARED_MEMORY(memory);
    constexpr int BYTES = SIDE * INNER * SIZE, U_STEPS = GIVEN_U ? (VALUES + INNER - 1) / INNER : 0, W_STEPS = GIVEN_W ? (KEYS + INNER - 1) / INNER : 0;
    const Tile<DTYPE, INNER> lefts[2] = {{memory}, {memory + BYTES}}, rights[2] = {{memory + 2 * BYTES}, {memory + 3 * BYTES}};
    const int column = blockIdx.x % p.blocks * SIDE, row = blockIdx.x / p.blocks % p.blocks * SIDE, warp = threadIdx.x / 32, lane = lane_id();
    const int64_t matrix = blockIdx.x / p.blocks / p.blocks;
    const auto load = [&](int step) {
        if (step < U_STEPS + W_STEPS) {
            const bool keys = step >= U_STEPS;
            const int at = (keys ? step - U_STEPS : step) * INNER, width = (keys ? KEYS : VALUES) - at;
            const int64_t left_c = keys ? p.dw_c : p.du_c, right_c = keys ? p.k_c : p.v_c;
            const DTYPE* left = keys ? p.dw + matrix * p.dw_m : p.du + matrix * p.du_m;
            const DTYPE* right = keys ? p.k + matrix * p.k_m : p.v + matrix * p.v_m;
            load_tile<SIDE, THREADS, ALIGNED>(lefts[step % 2], left + row * left_c + at, left_c, p.size - row, width);
            load_tile<SIDE, THREADS, ALIGNED>(rights[step % 2], right + column * right_c + at, right_c, p.size - column, width);
        }
        cp_async_commit();
    };
    load(0);
    load(1);
    float sums[SIDE / 8][4] = {};
#pragma unroll 1
    for (int step = 0; step < U_STEPS + W_STEPS; step++) {
        cp_async_wait<1>();
        __syncthreads();
#pragma unroll(STEPS_AT_ONCE<DTYPE>)
        for (int s = 0; s < INNER / 16; s++) {
            Pair<DTYPE> a[4], b[4];
            lefts[step % 2].rows(a[0], a[1], a[2], a[3], 16 * warp, 16 * s);
#pragma unroll
            for (int n = 0; n < SIDE / 16; n++) {
                rights[step % 2].rows(b[0], b[1], b[2], b[3], 16 * n, 16 * s);
                Product<DTYPE>::add(sums[2 * n], a[0], a[1], a[2], a[3], b[0], b[2]);
                Product<DTYPE>::add(sums[2 * n + 1], a[0], a[1], a[2], a[3], b[1], b[3]);
            }
        }
        __syncthreads();
        load(step + 2);
    }
    DTYPE* out = p.d_attn + matrix * p.size * p.size + static_cast<int64_t>(row) * p.size + column;
#pragma unroll
    for (int n = 0; n < SIDE / 8; n++) {
#pragma unroll
        for (int half = 0; half < 2; half++) {
            const int at = 8 * n + 2 * (lane % 4), token = 16 * warp + 8 * half + lane / 4;
            if (token + row < p.size) store_pair<false>(out + static_cast<int64_t>(token) * p.size + at, sums[n][2 * half], sums[n][2 * half + 1], p.size - column - at);
        }
    }
}
