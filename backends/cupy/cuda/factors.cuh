// Where a chunk's factor lies in slow_core's chunk_decay.
#ifndef TITANS_FACTORS_CUH
#define TITANS_FACTORS_CUH

#include "chunks.cuh"

// Which of chunk_decay's chunks it is: they are counted through all sequences. By all lanes of a warp.
DEVICE int64_t factor_index(const Grid& grid, const Chunk& chunk) {
    int before = 0;
    if (grid.cu_seqlens) {
        for (int i = static_cast<int>(threadIdx.x % 32); i < chunk.sequence; i += 32) {
            const int64_t length = load_index(grid.cu_seqlens, i + 1, grid.cu_wide) - load_index(grid.cu_seqlens, i, grid.cu_wide);
            before += static_cast<int>((length + grid.chunk_size - 1) / grid.chunk_size);
        }
#pragma unroll
        for (int lanes = 16; lanes; lanes /= 2) before += __shfl_xor_sync(0xffffffffu, before, lanes);
    }
    return before + chunk.index;
}

#endif
