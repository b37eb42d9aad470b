// What S_fast's kernels share, alone and merged into dual_core: 16 rows a warp, of scores, of outputs, or of a state.
#ifndef TITANS_FAST_FORWARD_CUH
#define TITANS_FAST_FORWARD_CUH

#include "fast_tiles.cuh"

constexpr int WARPS = SIDE / 16, THREADS = 32 * WARPS;

using Scores = float[SIDE / 8][4];
using Sums = float[VALUE_WIDTH / 8][4];

// sums += a (16 x 16) times 16 rows of `met` from `row` on
DEVICE void add_rows(Sums& sums, const Pair<DTYPE> (&a)[4], const ValueTile& met, int row) {
#pragma unroll
    for (int n = 0; n < VALUE_WIDTH / 16; n++) {
        Pair<DTYPE> b[4];
        met.columns(b[0], b[1], b[2], b[3], 16 * n, row);
        Product<DTYPE>::add(sums[2 * n], a[0], a[1], a[2], a[3], b[0], b[2]);
        Product<DTYPE>::add(sums[2 * n + 1], a[0], a[1], a[2], a[3], b[1], b[3]);
    }
}

// sums += this warp's queries times SIDE rows of a state, those from `key` on
DEVICE void add_state(Sums& sums, const KeyTile& queries, const ValueTile& state, int warp, int key) {
#pragma unroll(STEPS_AT_ONCE<DTYPE>)
    for (int s = 0; s < SIDE / 16; s++) {
        if (key + 16 * s >= KEY_WIDTH) break;
        Pair<DTYPE> a[4];
        queries.rows(a[0], a[1], a[2], a[3], 16 * warp, key + 16 * s);
        add_rows(sums, a, state, 16 * s);
    }
}

// scores += this warp's queries times a tile's keys; `diagonal`: the tile is the queries' own, whose later keys nobody needs
DEVICE void add_scores(Scores& scores, const KeyTile& queries, const KeyTile& keys, int warp, bool diagonal) {
#pragma unroll(STEPS_AT_ONCE<DTYPE>)
    for (int s = 0; s < KEY_WIDTH / 16; s++) {
        Pair<DTYPE> a[4], b[4];
        queries.rows(a[0], a[1], a[2], a[3], 16 * warp, 16 * s);
#pragma unroll
        for (int j = 0; j < SIDE / 16; j++) {
            if (diagonal && j > warp) break;
            keys.rows(b[0], b[1], b[2], b[3], 16 * j, 16 * s);
            Product<DTYPE>::add(scores[2 * j], a[0], a[1], a[2], a[3], b[0], b[2]);
            Product<DTYPE>::add(scores[2 * j + 1], a[0], a[1], a[2], a[3], b[1], b[3]);
        }
    }
}

// 16 keys of a final state, from `key0` on: the sums, and `by` times what was carried into the chunk. `at`: where the state lies; r, c: the lane's place.
template <typename P> DEVICE void store_state(const P& p, int64_t at, const Sums& sums, int key0, int r, int c, bool carried, float by) {
#pragma unroll
    for (int half = 0; half < 2; half++) {
        const int key = key0 + r + 8 * half;
        if (key >= KEYS) break;
#pragma unroll
        for (int n = 0; n < VALUE_WIDTH / 8; n++) {
#pragma unroll
            for (int e = 0; e < 2; e++) {
                const int value = 8 * n + 2 * c + e;
                const int64_t place = at + key * VALUES + value;
                if (value < VALUES) p.final[place] = sums[n][2 * half + e] + (carried ? by * p.initial[place] : 0.0f);
            }
        }
    }
}

#endif
