// The warps of a walk over blocks of tokens, and what a walker does with the 16 value columns of a transposed state that it holds (delta_walk.cu, delta_reverse.cu).
// Of eight warps those from number 4 on walk, and the first four load. With 1 or 2 walkers the warps from number 2 on that do not walk follow a block behind, so
// that a walker shares its scheduler with a loader at most; with 4 walkers, which read a tile for twice as many values, the loaders follow.
#ifndef TITANS_DELTA_ROLES_CUH
#define TITANS_DELTA_ROLES_CUH

#include "delta_blocks.cuh"

constexpr int WARPS = 8, THREADS = 32 * WARPS, FIRST_WALKER = 4, LOADERS = 4, SPARED = WALKERS == 4 ? 0 : 2, FOLLOWERS = WARPS - SPARED - WALKERS;
constexpr int COLUMNS = 16 * WALKERS, WIDE_COLUMNS = COLUMNS < 32 ? 32 : COLUMNS, SLICES = (VALUES + COLUMNS - 1) / COLUMNS;
constexpr int COLUMN_BYTES = SIDE * WIDE_COLUMNS * SIZE, STATE_BYTES = COLUMNS * KEY_WIDTH * SIZE;
static_assert((WALKERS == 1 || WALKERS == 2 || WALKERS == 4) && COLUMNS <= KEY_WIDTH && DEPTH >= 2, "outputs take the place of queries");

using ColumnTile = Tile<DTYPE, WIDE_COLUMNS>;
using StateTile = Tile<DTYPE, KEY_WIDTH>;

// which walker or follower a warp is, -1: none
DEVICE int walker_of(int warp) { return warp >= FIRST_WALKER && warp < FIRST_WALKER + WALKERS ? warp - FIRST_WALKER : -1; }
DEVICE int follower_of(int warp) {
    if (walker_of(warp) >= 0) return -1;
    if (warp < SPARED) return -1;
    return warp < FIRST_WALKER ? warp - SPARED : warp - SPARED - WALKERS;
}

// 16 value columns of a state [KEYS, VALUES], transposed, from the value `column` on; zeros where there is none
DEVICE void read_state(float (&state)[2 * KEY_STEPS][4], const float* from, int64_t place, int column) {
    const int r = lane_id() / 4, c = lane_id() % 4;
#pragma unroll
    for (int n = 0; n < 2 * KEY_STEPS; n++)
#pragma unroll
        for (int e = 0; e < 4; e++) {
            const int key = 8 * n + 2 * c + e % 2, value = column + r + e / 2 * 8;
            state[n][e] = from && key < KEYS && value < VALUES ? from[place + key * VALUES + value] : 0.0f;
        }
}
DEVICE void write_state(float* to, int64_t place, int column, const float (&state)[2 * KEY_STEPS][4]) {
    const int r = lane_id() / 4, c = lane_id() % 4;
#pragma unroll
    for (int n = 0; n < 2 * KEY_STEPS; n++)
#pragma unroll
        for (int e = 0; e < 4; e++) {
            const int key = 8 * n + 2 * c + e % 2, value = column + r + e / 2 * 8;
            if (key < KEYS && value < VALUES) to[place + key * VALUES + value] = state[n][e];
        }
}

DEVICE void round_state(Pair<DTYPE> (&to)[KEY_STEPS][4], const float (&state)[2 * KEY_STEPS][4]) {
#pragma unroll
    for (int s = 0; s < KEY_STEPS; s++) as_operand<DTYPE>(to[s], state[2 * s], state[2 * s + 1]);
}
DEVICE void put_state(const StateTile& tile, int row, const Pair<DTYPE> (&state)[KEY_STEPS][4]) {
    const int r = lane_id() / 4, c = lane_id() % 4;
#pragma unroll
    for (int s = 0; s < KEY_STEPS; s++)
#pragma unroll
        for (int i = 0; i < 4; i++) *tile.pair_at(row, r + i % 2 * 8, 16 * s + i / 2 * 8 + 2 * c) = state[s][i];
}

// x^T += state^T rows^T: of every token what its row of a tile reads
DEVICE void times_rows(float (&x)[2 * BLOCKS][4], const Pair<DTYPE> (&state)[KEY_STEPS][4], const KeyTile& rows) {
#pragma unroll
    for (int s = 0; s < KEY_STEPS; s++)
#pragma unroll
        for (int i = 0; i < BLOCKS; i++) {
            Pair<DTYPE> b0, b1, b2, b3;
            rows.right_rows(b0, b1, b2, b3, 16 * i, 16 * s);
            Product<DTYPE>::add(x[2 * i], state[s][0], state[s][1], state[s][2], state[s][3], b0, b1);
            Product<DTYPE>::add(x[2 * i + 1], state[s][0], state[s][1], state[s][2], state[s][3], b2, b3);
        }
}
// state^T += x^T rows: what every token writes along its row
DEVICE void add_columns(float (&state)[2 * KEY_STEPS][4], const Pair<DTYPE> (&x)[BLOCKS][4], const KeyTile& rows) {
#pragma unroll
    for (int i = 0; i < BLOCKS; i++)
#pragma unroll
        for (int n = 0; n < KEY_STEPS; n++) {
            Pair<DTYPE> b0, b1, b2, b3;
            rows.right_columns(b0, b1, b2, b3, 16 * n, 16 * i);
            Product<DTYPE>::add(state[2 * n], x[i][0], x[i][1], x[i][2], x[i][3], b0, b1);
            Product<DTYPE>::add(state[2 * n + 1], x[i][0], x[i][1], x[i][2], x[i][3], b2, b3);
        }
}

// A slice of a transposed state to where states are kept, [VALUES, KEY_WIDTH], by the followers' threads.
DEVICE void keep_state(const StateTile& tile, DTYPE* to, int column, int thread) {
    constexpr int PIECES = StateTile::PIECES;
#pragma unroll 4
    for (int i = thread; i < COLUMNS * PIECES; i += 32 * FOLLOWERS) {
        const int row = i / PIECES, piece = i % PIECES;
        if (column + row < VALUES) *reinterpret_cast<uint4*>(to + (column + row) * KEY_WIDTH + piece * PIECE) = *reinterpret_cast<const uint4*>(tile.piece(row, piece));
    }
}

// `count` rows of a tile from `row` on, below `rows`, to device memory by some threads; `columns` are left there
template <int WIDTH, int ACROSS> DEVICE void store_rows(const Tile<DTYPE, ACROSS>& tile, int row, int count, DTYPE* to, int64_t stride, int rows, int columns, int thread, int threads) {
    constexpr int PIECES = WIDTH / PIECE;
    for (int i = thread; i < count * PIECES; i += threads) {
        const int at = row + i / PIECES, piece = i % PIECES;
        if (at >= rows || piece * PIECE >= columns) continue;
        if constexpr (VALUES * SIZE % 16 == 0) {
            *reinterpret_cast<uint4*>(to + at * stride + piece * PIECE) = *reinterpret_cast<const uint4*>(tile.piece(at, piece));
        } else {
            const DTYPE* x = reinterpret_cast<const DTYPE*>(tile.piece(at, piece));
#pragma unroll
            for (int j = 0; j < PIECE; j++)
                if (piece * PIECE + j < columns) to[at * stride + piece * PIECE + j] = x[j];
        }
    }
}

#endif
