// Warps of a walk over blocks of 64 tokens on Hopper, heads of 128 keys and values in 16 bits (delta_walk_hopper.cu, delta_reverse_hopper.cu): a warpgroup carries 64
// values of a head's state, transposed, in registers, so that every product's left operand comes from registers and a block waits for no other warp. Of the first eight
// warps four load ahead, two of them a block, and four store what the carriers leave of one.
//
// DTYPE: Bfloat or Half; CARRIERS: 1, half of a head's values, or 2, all of them, which read the tiles of their block together; CUT: WHOLE, a sequence is walked from end to
// end; SEGMENTS, `segments` of it are walked side by side, whose states at their ends on the walk's way are known; ENDS, they are walked for those states alone (delta_chain.cu).
#ifndef TITANS_DELTA_CARRIERS_CUH
#define TITANS_DELTA_CARRIERS_CUH

#define KEYS 128
#define VALUES 128
#define SIDE 64
#include "delta_blocks.cuh"
#include "hopper_rows.cuh"

enum Cuts { WHOLE = 0, SEGMENTS = 1, ENDS = 2 };
constexpr int GROUP = 128, THREADS = GROUP * (2 + CARRIERS), STAGES = CARRIERS == 1 || CUT == ENDS ? 3 : 2, PART = 64;
constexpr int LOADER_REGISTERS = 40, STORER_REGISTERS = 56, CARRIER_REGISTERS = CARRIERS == 1 ? 240 : 208;
static_assert(GROUP * (LOADER_REGISTERS + STORER_REGISTERS + CARRIERS * CARRIER_REGISTERS) <= 65536, "a processor's registers");
// Barriers: of a stage; of what a carrier leaves, its state at a block's beginning and all else at the end, so that either is stored while the other is made.
enum Leaves { STATE = 0, REST = 1 };
constexpr int LOADED = 1, FREED = LOADED + STAGES, LEFT = FREED + STAGES, STORED = LEFT + 2 * CARRIERS;
static_assert(STORED + 2 * CARRIERS <= 16, "named barriers");
constexpr int WITH_LOADERS = CARRIERS * GROUP + 64, STORERS = GROUP / CARRIERS, WITH_STORERS = GROUP + STORERS;
static_assert(SQUARE_BYTES == 8192, "64 x 64 numbers");

using Part = Tile<DTYPE, PART>;
using Sums = float[32];  // of a lane, values r and r + 8 of its warp's 16: of columns 8 n + 2 c and the next one [4 n], [4 n + 1] and [4 n + 2], [4 n + 3]
using Operand = uint32_t[4][4];  // the same of 64 columns, rounded: a product's left operand, 16 columns each

// What a block of threads carries.
struct Task {
    Blocked here;
    int head, heads, sequence, column;  // column: its first value
    int segment, segments;  // which of its sequence's, and how many it has
    // OMITTED: the segment that is not walked for its end's state, the first or the last one; HALVES: blocks of threads of a head
    template <int OMITTED, int HALVES, typename P> DEVICE static Task of(const P& p) {
        Task task;
        const int stream = blockIdx.x / HALVES, unit = stream / p.heads, walked = CUT == WHOLE ? 1 : CUT == ENDS ? p.segments - 1 : p.segments;
        task.column = blockIdx.x % HALVES * PART, task.heads = p.heads, task.head = stream % p.heads;
        task.sequence = unit / walked, task.segments = CUT == WHOLE ? 1 : p.segments, task.segment = unit % walked + (CUT == ENDS && OMITTED == 0 ? 1 : 0);
        task.here = find_sequence(Grid{p.cu_seqlens, p.cu_wide, 0, p.tokens, SIDE, 0, p.slots}, task.sequence);
        if constexpr (CUT != WHOLE) {  // whole blocks, as evenly as they go; none where there are fewer of them than segments
            Blocked& here = task.here;
            const int each = here.blocks / p.segments, longer = task.segment - (p.segments - here.blocks % p.segments);  // the last ones have one more
            const int first = task.segment * each + (longer > 0 ? longer : 0);
            const int64_t before = static_cast<int64_t>(first) * SIDE;
            here.start += before, here.count -= before, here.first_slot += first, here.blocks = each + (longer >= 0);
        }
        return task;
    }
    DEVICE bool first() const { return segment == 0; }
    DEVICE bool last() const { return segment == segments - 1; }
    DEVICE int64_t place(int block) const { return static_cast<int64_t>(here.first_slot + block) * heads + head; }
    // a state of its sequence, and one of its segment or of the one `further`
    DEVICE int64_t state() const { return (static_cast<int64_t>(sequence) * heads + head) * (KEYS * VALUES) + column; }
    DEVICE int64_t inner(int further) const { return ((static_cast<int64_t>(sequence) * segments + segment + further) * heads + head) * (KEYS * VALUES) + column; }
    DEVICE int length(int block) const {
        const int64_t left = here.count - static_cast<int64_t>(block) * SIDE;
        return left < SIDE ? static_cast<int>(left) : SIDE;
    }
};

// ---- What loaders do.

// a place's square, whose blocks above the diagonal are no one's memory: zeros
DEVICE void load_lower(unsigned char* to, const DTYPE* from) {
    const int row = lane_id() / 8, piece = lane_id() % 8;
    unsigned char *const even = to + row * 128 + (piece ^ row) * 16, *const odd = to + row * 128 + (piece ^ row ^ 4) * 16;
    from += row * SIDE + piece * 8;
#pragma unroll
    for (int i = 0; i < SIDE / 4; i++) cp_async_16((i % 2 ? odd : even) + i * 512, from + i * 4 * SIDE, piece / 2 <= i / 4);
}

// ---- What a carrier's storers do: 64 rows that it left, below `rows`, to device memory; `thread` of theirs.

DEVICE void store_rows(const unsigned char* from, DTYPE* to, int64_t step, int rows, int thread) {
    constexpr int AT_ONCE = 4, ROUND = STORERS / 8 * AT_ONCE;
    const int row = thread / 8, piece = thread % 8;
    to += row * step + piece * 8;
#pragma unroll 1
    for (int first = 0; first < SIDE; first += ROUND) {
        uint4 x[AT_ONCE];
#pragma unroll
        for (int i = 0; i < AT_ONCE; i++) x[i] = *reinterpret_cast<const uint4*>(Part{const_cast<unsigned char*>(from)}.piece(first + row + i * STORERS / 8, piece));
#pragma unroll
        for (int i = 0; i < AT_ONCE; i++)
            if (first + row + i * STORERS / 8 < rows) *reinterpret_cast<uint4*>(to + (first + i * STORERS / 8) * step) = x[i];
    }
}

// ---- What carriers do.

DEVICE void as_operand(Operand& to, const Sums& from) {
#pragma unroll
    for (int s = 0; s < 4; s++)
#pragma unroll
        for (int i = 0; i < 4; i++) to[s][i] = pair<DTYPE>(from[8 * s + 2 * i], from[8 * s + 2 * i + 1]);
}
// sums of a state's rows with rows of 128 keys, 64 of them: x = S^T K^T
DEVICE void along_rows(Sums& sums, const Operand& low, const Operand& high, uint64_t rows) {
    product_of<DTYPE, BY_ROWS, false>(sums, low[0], rows);
#pragma unroll
    for (int s = 1; s < 4; s++) product_of<DTYPE, BY_ROWS, true>(sums, low[s], further(rows, s * FURTHER_IN_ROWS));
#pragma unroll
    for (int s = 0; s < 4; s++) product_of<DTYPE, BY_ROWS, true>(sums, high[s], further(rows, SQUARE_BYTES + s * FURTHER_IN_ROWS));
}
// columns of a sum, each times its number
DEVICE void scale_columns(Sums& sums, const float* line) {
#pragma unroll
    for (int n = 0; n < 8; n++) {
        const float2 by = two(line + 8 * n + lane_id() % 4 * 2);
        sums[4 * n] *= by.x, sums[4 * n + 1] *= by.y, sums[4 * n + 2] *= by.x, sums[4 * n + 3] *= by.y;
    }
}
// 64 values by 64 columns of what a carrier leaves, a warp its 16 values: by values, or turned around
DEVICE void leave(unsigned char* square, const Operand& x) {
    const int lane = lane_id(), row = threadIdx.x / 32 % 4 * 16 + lane % 16;
#pragma unroll
    for (int s = 0; s < 4; s++) stmatrix_x4(Part{square}.piece(row, 2 * s + lane / 16), x[s]);
}
DEVICE void leave_turned(unsigned char* square, const Operand& x) {
    const int lane = lane_id(), warp = threadIdx.x / 32 % 4, row = lane % 8 + lane / 16 * 8, piece = 2 * warp + lane / 8 % 2;
#pragma unroll
    for (int s = 0; s < 4; s++) stmatrix_x4_trans(Part{square}.piece(16 * s + row, piece), x[s]);
}

// E^T of 64 keys from `key` on, from or to a state [KEYS, VALUES] at this warp's first value
DEVICE void read_state(Sums& state, const float* from, int key) {
    const int r = lane_id() / 4, c = lane_id() % 4;
#pragma unroll
    for (int i = 0; i < 32; i++) state[i] = from ? from[(key + i / 4 * 8 + 2 * c + i % 2) * VALUES + r + i / 2 % 2 * 8] : 0.0f;
}
// the same of the identity's columns from `column` on: what a state that no token wrote to was
DEVICE void identity(Sums& state, int key, int column) {
    const int r = lane_id() / 4, c = lane_id() % 4;
#pragma unroll
    for (int i = 0; i < 32; i++) state[i] = key + i / 4 * 8 + 2 * c + i % 2 == column + r + i / 2 % 2 * 8 ? 1.0f : 0.0f;
}
DEVICE void write_state(float* to, int key, const Sums& state) {
    const int r = lane_id() / 4, c = lane_id() % 4;
#pragma unroll
    for (int i = 0; i < 32; i++) to[(key + i / 4 * 8 + 2 * c + i % 2) * VALUES + r + i / 2 % 2 * 8] = state[i];
}

#endif
