// What the kernels of S_fast and of its gradients share: the tiles of keys and values, where chunks lie, and a state's rows as a tile.
#ifndef TITANS_FAST_TILES_CUH
#define TITANS_FAST_TILES_CUH

#include "chunks.cuh"
#include "tiles.cuh"

constexpr int KEY_WIDTH = KEYS <= 32 ? 32 : KEYS <= 64 ? 64 : 128, VALUE_WIDTH = VALUES <= 32 ? 32 : VALUES <= 64 ? 64 : 128;
constexpr int SIZE = sizeof(DTYPE), KEY_BYTES = SIDE * KEY_WIDTH * SIZE, VALUE_BYTES = SIDE * VALUE_WIDTH * SIZE, PAIR_BYTES = KEY_BYTES + VALUE_BYTES;

using KeyTile = Tile<DTYPE, KEY_WIDTH>;
using ValueTile = Tile<DTYPE, VALUE_WIDTH>;

template <typename P> DEVICE Grid grid_of(const P& p) { return Grid{p.cu_seqlens, p.cu_wide, p.sequences, p.tokens, p.chunk_size, p.offset, p.slots}; }

// number `i` of a tile of SIDE rows of a state, those from `key` on, rounded
DEVICE void keep_state(const ValueTile& state, const float* w, int key, int i) {
    const int row = i / VALUE_WIDTH, column = i % VALUE_WIDTH;
    *state.element(row, column) = narrow<DTYPE>(key + row < KEYS && column < VALUES ? w[(key + row) * VALUES + column] : 0.0f);
}

#endif
