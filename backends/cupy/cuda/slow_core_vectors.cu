// The vectors' gradients of slow_core from what slow_core_gradients.cu summed over slices of keys (SPEC.md 10): dgate, dg as the sum of G's gradient from the
// chunk's end on and of what tokens leave in the state up to the one before, and chunk_decay's. A warp has a chunk and v head; a token costs a few additions
// and moves up to 3 KEY_SLICES + 2 numbers.
//
// DTYPE; SIDE: tokens of a chunk at most; KEY_SLICES: sums of each.
#include "factors.cuh"
#include "stores.cuh"

struct Params {
    const float *told, *bent, *left, *pulled;  // [KEY_SLICES, places, SIDE] three times, [KEY_SLICES, places]; places: slots and v heads
    void *dg, *d_gate, *d_decay;  // [B, T, H] twice, [B, M, H]; may be absent
    const void* cu_seqlens;
    int cu_wide, sequences, tokens, chunk_size, slots, heads, places, g_wide, decay_wide, gate_wide;
};

constexpr int BASES = (SIDE + 31) / 32;

// A warp a chunk and v head: the slices' sums in order, and G's gradient summed from the chunk's end on.
extern "C" __global__ void __launch_bounds__(32) slow_core_vectors(const __grid_constant__ Params p) {
    const int place = blockIdx.x, head = place % p.heads, lane = threadIdx.x;
    const Grid grid{p.cu_seqlens, p.cu_wide, p.sequences, p.tokens, p.chunk_size, 0, p.slots};
    const Chunk chunk = find_chunk(grid, place / p.heads);
    if (!chunk.length) return;
    const int64_t first = (chunk.batch * p.tokens + chunk.begin) * p.heads + head;
    if (p.d_decay) {
        float sum = 0.0f;
        for (int slice = 0; slice < KEY_SLICES; slice++) sum += p.pulled[slice * static_cast<int64_t>(p.places) + place];
        const int64_t at = factor_index(grid, chunk);
        if (lane == 0) store_gate<DTYPE>(p.d_decay, (chunk.batch * p.slots + at) * p.heads + head, p.decay_wide, sum);
    }
    float before[BASES] = {}, so_far = 0.0f;
#pragma unroll
    for (int n = 0; n < BASES; n++) {
        const int token = 32 * n + lane;
        float left = 0.0f;
        for (int slice = 0; slice < KEY_SLICES && p.dg && token < chunk.length; slice++)
            left += p.left[(slice * static_cast<int64_t>(p.places) + place) * SIDE + token];
#pragma unroll
        for (int step = 1; step < 32; step *= 2) {
            const float earlier = __shfl_up_sync(0xffffffffu, left, step);
            if (lane >= step) left += earlier;
        }
        const float earlier = __shfl_up_sync(0xffffffffu, left, 1);
        before[n] = so_far + (lane ? earlier : 0.0f);
        so_far += __shfl_sync(0xffffffffu, left, 31);
    }
    float behind = 0.0f;
#pragma unroll
    for (int n = BASES - 1; n >= 0; n--) {
        const int token = 32 * n + lane;
        float told = 0.0f, bent = 0.0f;
        for (int slice = 0; slice < KEY_SLICES && token < chunk.length; slice++) {
            const int64_t at = (slice * static_cast<int64_t>(p.places) + place) * SIDE + token;
            if (p.d_gate) told += p.told[at];
            if (p.dg) bent += p.bent[at];
        }
        if (p.d_gate && token < chunk.length) store_gate<DTYPE>(p.d_gate, first + static_cast<int64_t>(token) * p.heads, p.gate_wide, told);
        if (!p.dg) continue;
#pragma unroll
        for (int step = 1; step < 32; step *= 2) {
            const float later = __shfl_down_sync(0xffffffffu, bent, step);
            if (lane + step < 32) bent += later;
        }
        if (token < chunk.length) store_gate<DTYPE>(p.dg, first + static_cast<int64_t>(token) * p.heads, p.g_wide, bent + behind + before[n]);
        behind += __shfl_sync(0xffffffffu, bent, 0);
    }
}
