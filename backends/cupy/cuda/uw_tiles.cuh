// What uw_transform and its gradients share: the chunk's tile of SIDE tokens, the slices of keys and values that meet it, and T's own tiles.
#ifndef TITANS_UW_TILES_CUH
#define TITANS_UW_TILES_CUH

#include "chunks.cuh"
#include "inverse.cuh"

constexpr int NONE = 0, EXACT = 1, LAM = 2;  // TRANSFORM
constexpr int BLOCKS = SIDE / 16, THREADS = 32 * WARPS, TRIANGLE = SIDE < 32 ? 32 : SIDE, SIZE = sizeof(DTYPE);
constexpr int KEY_SLICES = (KEYS + SLICE - 1) / SLICE, VALUE_SLICES = (VALUES + SLICE - 1) / SLICE, SLICE_BYTES = SIDE * SLICE * SIZE;
constexpr int SQUARE_BYTES = SIDE * TRIANGLE * SIZE, REST_BYTES = TRANSFORM == EXACT && SIZE == 2 ? SIDE * 32 * SIZE : 0;

using Right = Tile<DTYPE, SLICE>;
using Square = Tile<DTYPE, TRIANGLE>;
using Rest = Tile<DTYPE, 32>;

#endif
