// The inverse of I + L for a strictly lower triangular L of 16 x 16, by substitution in float32: half a warp takes a column a lane.
#ifndef TITANS_INVERSE_CUH
#define TITANS_INVERSE_CUH

#include "tiles.cuh"

constexpr int LINE = 20;  // numbers from row to row of L where it waits: 16-byte loads, without conflicts of banks

// x: column threadIdx.x % 16 of the inverse, L from `lines`, which the warp has just written
DEVICE void invert_column(float (&x)[16], const float* lines) {
    const int column = threadIdx.x % 16;
    __syncwarp();
#pragma unroll
    for (int i = 0; i < 16; i++) {
        float line[16], sum = i == column ? 1.0f : 0.0f;
#pragma unroll
        for (int j = 0; j < i; j += 4) *reinterpret_cast<float4*>(line + j) = *reinterpret_cast<const float4*>(lines + i * LINE + j);
#pragma unroll
        for (int j = 0; j < i; j++) sum -= line[j] * x[j];
        x[i] = sum;
    }
}

// The inverse to the triangle's diagonal block at `row`; of 16-bit numbers, to `rest` what rounding left out.
template <typename T, int COLUMNS> DEVICE void invert_block(const float* lines, const Tile<T, COLUMNS>& triangle, const Tile<T, 32>& rest, int row) {
    const int column = threadIdx.x % 16;
    float x[16];
    invert_column(x, lines);
    if (threadIdx.x % 32 < 16) {
#pragma unroll
        for (int i = 0; i < 16; i++) {
            const T high = narrow<T>(x[i]);
            *triangle.element(row + i, row + column) = high;
            if constexpr (Dtype<T>::half) *rest.element(row + i, column) = narrow<T>(x[i] - widen(high));
        }
    }
}

#endif
