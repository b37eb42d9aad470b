// Where a chunk's tokens lie, dense or packed, and its gates. A call has slots of CHUNK_SIZE tokens, and a sequence owns at least one of them: packed,
// sequence n owns those from (cu_seqlens[n] + n offset) / chunk_size + n on, so that no sum over sequences is needed and a slot may be empty.
#ifndef TITANS_CHUNKS_CUH
#define TITANS_CHUNKS_CUH

#include "loads.cuh"

// How a call's tokens lie. `offset`: every sequence begins that many absent tokens earlier; `slots` of a dense sequence.
struct Grid {
    const void* cu_seqlens;  // absent: dense
    int cu_wide, sequences, tokens, chunk_size, offset, slots;
};

struct Chunk {
    int64_t batch, begin;  // the batch row, and the chunk's first token in it
    int sequence, index, length;  // whose state it belongs to; which chunk of its sequence; its tokens, 0: an empty slot
    bool first, last;  // of its sequence; an empty sequence's slot is both
};

DEVICE Chunk find_chunk(const Grid& grid, int slot) {
    Chunk chunk;
    int64_t start = 0, end = grid.tokens;
    int first_slot;
    if (grid.cu_seqlens) {
        int low = 0, high = grid.sequences;
        while (high - low > 1) {
            const int middle = (low + high) / 2;
            const int64_t at = load_index(grid.cu_seqlens, middle, grid.cu_wide);
            if ((at + static_cast<int64_t>(middle) * grid.offset) / grid.chunk_size + middle <= slot) low = middle;
            else high = middle;
        }
        start = load_index(grid.cu_seqlens, low, grid.cu_wide), end = load_index(grid.cu_seqlens, low + 1, grid.cu_wide);
        first_slot = static_cast<int>((start + static_cast<int64_t>(low) * grid.offset) / grid.chunk_size) + low;
        chunk.sequence = low, chunk.batch = 0;
    } else {
        chunk.sequence = slot / grid.slots, first_slot = chunk.sequence * grid.slots, chunk.batch = chunk.sequence;
    }
    chunk.index = slot - first_slot;
    const int64_t from = static_cast<int64_t>(chunk.index) * grid.chunk_size - grid.offset, to = from + grid.chunk_size, count = end - start;
    chunk.begin = start + (from > 0 ? from : 0);
    const int64_t length = start + (to < count ? to : count) - chunk.begin;
    chunk.length = length > 0 ? static_cast<int>(length) : 0;
    chunk.first = chunk.index == 0;
    chunk.last = chunk.first ? to >= count : chunk.length > 0 && to >= count;
    return chunk;
}

// The chunk that a sequence's state leaves.
DEVICE Chunk last_chunk(const Grid& grid, int sequence) {
    if (!grid.cu_seqlens) return find_chunk(grid, (sequence + 1) * grid.slots - 1);
    const int64_t start = load_index(grid.cu_seqlens, sequence, grid.cu_wide), end = load_index(grid.cu_seqlens, sequence + 1, grid.cu_wide);
    const int64_t absent = static_cast<int64_t>(sequence) * grid.offset, count = end - start + grid.offset;
    return find_chunk(grid, static_cast<int>((start + absent) / grid.chunk_size + sequence + (count > 0 ? (count - 1) / grid.chunk_size : 0)));
}

// ---- The running sum G of a log decay, kept so that its differences are exact to float32's last digits: a multiple of 2^-10, whose sums are exact, and
// a small rest. After a few tokens of -20 one float32 would leave differences with errors of 1e-5. A token counts as at least -128: e^-128 is 0.

struct Log { float coarse, fine; };

DEVICE Log log_of(float g) {
    g = fmaxf(g, -128.0f);
    const float coarse = floorf(g * 1024.0f + 0.5f) * (1.0f / 1024.0f);
    return Log{coarse, g - coarse};
}
DEVICE float exp_log(Log g) { return exp2_fast((g.coarse + g.fine) * 1.4426950408889634f); }
// exp(G_i - G_j), for i not before j
DEVICE float exp_between(Log i, Log j) { return exp2_fast(((i.coarse - j.coarse) + (i.fine - j.fine)) * 1.4426950408889634f); }

// One warp: G of `tokens` tokens from g (absent: 0), those from `length` on as if g were 0.
template <typename T> DEVICE void running_log(Log* sums, int tokens, const void* g, int64_t at, int64_t stride, int wide, int length) {
    const int lane = threadIdx.x % 32;
    Log carried{0.0f, 0.0f};
    for (int base = 0; base < tokens; base += 32) {
        const int token = base + lane;
        Log sum = g && token < length ? log_of(load_gate<T>(g, at + token * stride, wide)) : Log{0.0f, 0.0f};
#pragma unroll
        for (int step = 1; step < 32; step *= 2) {
            const float coarse = __shfl_up_sync(0xffffffffu, sum.coarse, step), fine = __shfl_up_sync(0xffffffffu, sum.fine, step);
            if (lane >= step) sum.coarse += coarse, sum.fine += fine;
        }
        sum.coarse += carried.coarse, sum.fine += carried.fine;
        if (token < tokens) sums[token] = sum;
        carried.coarse = __shfl_sync(0xffffffffu, sum.coarse, 31), carried.fine = __shfl_sync(0xffffffffu, sum.fine, 31);
    }
}

#endif
