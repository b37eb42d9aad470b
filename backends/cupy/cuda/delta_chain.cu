// The states between the segments of a sequence, heads of 128 keys and values, float32: what each segment does to a state is known (delta_walk_hopper.cu, CUT = ENDS).
//
//   S_(i+1) = M_i S_i + N_i        from the second segment on: the first one's N is what it made of the sequence's own state, so its M is not read
//   D_(i-1) = M_i^T D_i + E_i      BACK, from the last but one down: the gradients of the states at the segments' ends (delta_reverse_hopper.cu)
//
// in the place of N and of E. A block has 8 value columns of a head; a warp sums over 16 keys, and what the warps have is added up in shared memory, in one order. A step
// is 131,072 products of float32, 1,024 cycles of a processor, and 64 KB of M from the second-level cache, which come while the step before is computed: some 1,500
// cycles, 0.9 us, of few blocks; 8 heads are 128, whose 8.4 MB a step bind, some 1.5 us. A sequence has segments - 2 steps.
#include "warp.cuh"

constexpr int SIZE = 128, COLUMNS = 8, WARPS = 8, THREADS = 32 * WARPS, SHARE = SIZE / WARPS;
constexpr int ROW = SIZE + 4;  // numbers from one row of a map to the next: 8 lanes with 16 bytes of a row each meet no bank twice
constexpr int MAP = SIZE * ROW, SLICE = SIZE * COLUMNS;

struct Params {
    const float* maps;
    float* states;  // both [sequences, segments, heads, SIZE, SIZE]
    int heads, segments;
};

DEVICE float4 four(const float* x) { return *reinterpret_cast<const float4*>(x); }
DEVICE void add(float4& to, const float4& x) { to.x += x.x, to.y += x.y, to.z += x.z, to.w += x.w; }
// a row of sums += a number times the 8 columns of a row of the state
DEVICE void add_row(float (&sums)[COLUMNS], float by, const float4& low, const float4& high) {
    sums[0] += by * low.x, sums[1] += by * low.y, sums[2] += by * low.z, sums[3] += by * low.w;
    sums[4] += by * high.x, sums[5] += by * high.y, sums[6] += by * high.z, sums[7] += by * high.w;
}

DEVICE void load_map(float* to, const float* from) {
#pragma unroll
    for (int i = threadIdx.x; i < SIZE * SIZE / 4; i += THREADS) cp_async_16(to + i / 32 * ROW + i % 32 * 4, from + 4 * i, true);
    cp_async_commit();
}

// lane l: rows l, l + 32, l + 64, l + 96 of M S, BACK: rows 4 l to 4 l + 3 of M^T S; of the keys that this warp sums over
DEVICE void multiply(float (&sums)[4][COLUMNS], const float* map, const float* state) {
    const int lane = threadIdx.x % 32, key = threadIdx.x / 32 * SHARE;
#pragma unroll
    for (int row = 0; row < 4; row++)
#pragma unroll
        for (int i = 0; i < COLUMNS; i++) sums[row][i] = 0.0f;
#pragma unroll 1
    for (int first = key; first < key + SHARE; first += 4) {
        float4 of[4];  // of four rows, or of four keys, four numbers each
#pragma unroll
        for (int i = 0; i < 4; i++) of[i] = BACK ? four(map + (first + i) * ROW + 4 * lane) : four(map + (lane + 32 * i) * ROW + first);
#pragma unroll
        for (int i = 0; i < 4; i++) {
            const float4 low = four(state + (first + i) * COLUMNS), high = four(state + (first + i) * COLUMNS + 4);
#pragma unroll
            for (int row = 0; row < 4; row++) {
                const float4& x = of[BACK ? i : row];
                const int at = BACK ? row : i;
                add_row(sums[row], at == 0 ? x.x : at == 1 ? x.y : at == 2 ? x.z : x.w, low, high);
            }
        }
    }
}

extern "C" __global__ void __launch_bounds__(THREADS, 1) delta_chain(const __grid_constant__ Params p) {
    SHARED_MEMORY(memory);
    float* const maps = reinterpret_cast<float*>(memory);
    float *const parts = maps + 2 * MAP, *const state = parts + WARPS * SLICE;
    constexpr int SLICES = SIZE / COLUMNS;
    const int slice = blockIdx.x % SLICES, stream = blockIdx.x / SLICES, head = stream % p.heads, sequence = stream / p.heads;
    const int lane = threadIdx.x % 32, row = threadIdx.x / 2, column = threadIdx.x % 2 * 4, steps = p.segments - 2;
    const auto place = [&](int segment) { return ((static_cast<int64_t>(sequence) * p.segments + segment) * p.heads + head) * (SIZE * SIZE); };
    const int64_t own = row * SIZE + slice * COLUMNS + column;
    *reinterpret_cast<float4*>(state + row * COLUMNS + column) = four(p.states + place(BACK ? steps : 1) + own);
    load_map(maps, p.maps + place(BACK ? steps : 1));
#pragma unroll 1
    for (int step = 0; step < steps; step++) {
        const int segment = BACK ? steps - step : 1 + step, next = BACK ? segment - 1 : segment + 1;
        float* const to = p.states + place(next) + own;
        float4 sum = four(to);
        if (step + 1 < steps) {
            load_map(maps + (step + 1) % 2 * MAP, p.maps + place(next));
            cp_async_wait<1>();
        } else {
            cp_async_wait<0>();
        }
        __syncthreads();
        float sums[4][COLUMNS];
        multiply(sums, maps + step % 2 * MAP, state);
        float* const part = parts + threadIdx.x / 32 * SLICE;
#pragma unroll
        for (int i = 0; i < 4; i++)
#pragma unroll
            for (int half = 0; half < COLUMNS; half += 4)
                *reinterpret_cast<float4*>(part + (BACK ? 4 * lane + i : lane + 32 * i) * COLUMNS + half) =
                    make_float4(sums[i][half], sums[i][half + 1], sums[i][half + 2], sums[i][half + 3]);
        __syncthreads();
#pragma unroll
        for (int warp = 0; warp < WARPS; warp++) add(sum, four(parts + warp * SLICE + row * COLUMNS + column));
        *reinterpret_cast<float4*>(to) = sum;
        *reinterpret_cast<float4*>(state + row * COLUMNS + column) = sum;
    }
}
