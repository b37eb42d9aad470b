// What a warp that loads does for products of 64 x 64 numbers (hopper.cuh): asynchronous copies in the order that operands are read in, and their announcement.
#ifndef TITANS_HOPPER_ROWS_CUH
#define TITANS_HOPPER_ROWS_CUH

#include "fragments.cuh"
#include "hopper.cuh"

// 64 rows of 64 numbers, `step` from one row to the next; from `length` on zeros
template <typename T> DEVICE void load_rows(unsigned char* to, const T* from, int64_t step, int length) {
    const int row = lane_id() / 8, piece = lane_id() % 8, left = length - row;
    unsigned char *const even = to + row * 128 + (piece ^ row) * 16, *const odd = to + row * 128 + (piece ^ row ^ 4) * 16;
    from += row * step + piece * 8;
#pragma unroll
    for (int i = 0; i < 16; i++) {
        cp_async_16((i % 2 ? odd : even) + i * 512, from, 4 * i < left);
        from += 4 * step;
    }
}
// what is under way lies there, products may read it, and so many threads meet at the barrier
DEVICE void landed(int barrier, int threads) {
    cp_async_commit();
    cp_async_wait<0>();
    fence_for_products();
    barrier_arrive(barrier, threads);
}

#endif
