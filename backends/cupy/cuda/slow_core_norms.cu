// Final states by their Frobenius norm n + 1e-8 (SPEC.md 4), and the gradient of S through that (SPEC.md 10): d / (n + 1e-8) - S <S, d> / (n (n + 1e-8)^2),
// 0 where S is. A block has a state of `size` numbers; each is read twice and written once: bound by memory.
//
// THREADS: of a block, a multiple of 32.
#include "warp.cuh"

// The sum over a block, in the same order for each thread; `parts` holds a number for each warp.
DEVICE float block_sum(float x, float* parts) {
    x = warp_sum(x);
    if (threadIdx.x % 32 == 0) parts[threadIdx.x / 32] = x;
    __syncthreads();
    float sum = 0.0f;
    for (int i = 0; i < THREADS / 32; i++) sum += parts[i];
    return sum;
}

struct Normed {
    float* state;
    int size;
};

extern "C" __global__ void __launch_bounds__(THREADS) slow_core_normed(const __grid_constant__ Normed p) {
    SHARED_MEMORY(memory);
    float* const state = p.state + static_cast<int64_t>(blockIdx.x) * p.size;
    float squares = 0.0f;
    for (int i = threadIdx.x; i < p.size; i += THREADS) squares += state[i] * state[i];
    const float norm = sqrtf(block_sum(squares, reinterpret_cast<float*>(memory))) + 1e-8f;
    for (int i = threadIdx.x; i < p.size; i += THREADS) state[i] /= norm;
}

struct Unnormed {
    const float *state, *gradient;
    float* to;
    int size;
};

extern "C" __global__ void __launch_bounds__(THREADS) slow_core_unnormed(const __grid_constant__ Unnormed p) {
    SHARED_MEMORY(memory);
    float* const parts = reinterpret_cast<float*>(memory);
    const int64_t from = static_cast<int64_t>(blockIdx.x) * p.size;
    float squares = 0.0f, meeting = 0.0f;
    for (int i = threadIdx.x; i < p.size; i += THREADS) {
        const float x = p.state[from + i];
        squares += x * x, meeting += x * p.gradient[from + i];
    }
    squares = block_sum(squares, parts), meeting = block_sum(meeting, parts + THREADS / 32);
    const float norm = sqrtf(squares), wide = norm + 1e-8f;
    for (int i = threadIdx.x; i < p.size; i += THREADS)
        p.to[from + i] = squares > 0.0f ? p.gradient[from + i] / wide - p.state[from + i] * (meeting / norm / wide / wide) : 0.0f;
}
