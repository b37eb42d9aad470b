// The exact gated delta rule with a sequence cut into segments that run side by side, in one launch (SPEC.md 4; chunks of 16: delta_chunk.cuh).
//
// A cluster of CLUSTER blocks has one sequence, head and tile of values; a block has SEGMENTS segments in a row, a segment of up to `longest` tokens
// GROUP warps, which share the rows of [transposed state; map]. Tokens are read once, by cp.async, and stay in shared memory.
//   A  Every segment runs its chunks from an empty state and, beside it, from the identity: what it adds to the state (R), what it does to a state that
//      enters it (gamma I - D), what its tokens read of their own segment (over v in place), and what they would read of that state: q_eff (over q).
//   B  The maps are composed over the block's segments (log2 steps through shared memory, 16-bit operands in two parts), the blocks' maps over the
//      cluster: after one barrier a block reads its predecessors' maps from their shared memory and applies them to the initial state one by one.
//   C  Every segment's tokens add q_eff S_start to what they have: no chain any more, and the only write of o.
// Sequences longer than SEGMENTS * CLUSTER * longest go in rounds; the state between rounds is computed by every block for itself.
//
// Floor, bf16, head_dim 32, 12 heads, 1 x 8192: 25 MB, 8 us on an H100. FLOP of a chunk: 80 mma of 4096, 2.1 times the plain recurrence's, 0.16 GFLOP each
// 8192 tokens and head: 2 GFLOP, 4 us at a tenth of the tensor cores' rate. What remains is latency: about 1 us for a segment's first chunk, 0.3 us for
// each further one, 0.5 us for a composition step, 0.15 us for a predecessor, and the launch.
//
// Shared memory: a segment's keys (whose place its map takes when it is done), values, queries; the warps' scratch, which the published map shares.
//
// DTYPE; KEYS, VALUES: tile sizes, 32 or 64; WARPS, GROUP, CLUSTER.
#include "delta_chunk.cuh"

constexpr int SEGMENTS = WARPS / GROUP, ROWS = VALUES + KEYS, MT = ROWS / 16 / GROUP, BLOCKS = KEYS / 8, STEPS = KEYS / 16, VALUE_TILES = VALUES / 16;
constexpr int OWN_TILES = VALUE_TILES / GROUP > 0 ? VALUE_TILES / GROUP : 1;  // of the values, in the last pass
constexpr bool SPLIT = Dtype<DTYPE>::half;                                    // operands in two parts
constexpr int PIECE = 16 / sizeof(DTYPE);
constexpr int MAP_BYTES = ROWS * KEYS * 4, PUBLISHED_BYTES = (KEYS + VALUES) * KEYS * 4, START_BYTES = VALUES * KEYS * 4;
static_assert(ROWS % (16 * GROUP) == 0 && VALUE_TILES % GROUP == 0 && WARPS % GROUP == 0 && WARPS >= VALUE_TILES, "rows of a segment's warps");
using Keys = Tile<DTYPE, KEYS>;
using Values = Tile<DTYPE, VALUES>;

struct Params {
    const DTYPE *q, *k, *v;
    const void *beta, *g, *gate;  // g and gate may be absent
    const float* initial;         // so may this
    const void* bounds;           // cu_seqlens, or absent
    DTYPE* o;
    float* final;  // or absent
    int64_t q_b, q_t, q_h, k_b, k_t, k_h, v_b, v_t, v_h, beta_b, beta_t, beta_h, g_b, g_t, g_h, gate_b, gate_t, gate_h;
    int tokens, heads, group, keys, values, longest, beta_wide, g_wide, gate_wide, bounds_wide, l2norm, pieces, o_pieces;
    float scale;
};

// 16-bit numbers in two planes, or float32 in one: rows of KEYS
struct Planes {
    Keys high, low;
    DEVICE Planes(unsigned char* base, int rows) : high{base}, low{base + rows * Keys::ROW} {}
    DEVICE void write(int row, int column, float x, float y) const {
        const Pair<DTYPE> both = Make<DTYPE>::pair_of(x, y);
        *high.pair_at(row, column) = both;
        if constexpr (SPLIT) *low.pair_at(row, column) = Make<DTYPE>::rest(x, y, both);
    }
    DEVICE float2 read(int row, int column) const {
        float2 x = Make<DTYPE>::floats(*high.pair_at(row, column));
        if constexpr (SPLIT) {
            const float2 y = Make<DTYPE>::floats(*low.pair_at(row, column));
            x.x += y.x, x.y += y.y;
        }
        return x;
    }
};

// An operand of 16 rows in its parts.
struct Operand {
    Rounded<DTYPE, BLOCKS> high, low;
    DEVICE void load(const Planes& from, int row0) {
#pragma unroll
        for (int s = 0; s < STEPS; s++) {
            from.high.rows(high.p[0][2 * s], high.p[1][2 * s], high.p[0][2 * s + 1], high.p[1][2 * s + 1], row0, 16 * s);
            if constexpr (SPLIT) from.low.rows(low.p[0][2 * s], low.p[1][2 * s], low.p[0][2 * s + 1], low.p[1][2 * s + 1], row0, 16 * s);
        }
    }
    DEVICE void take(const float (&x)[BLOCKS][4]) {
        high.take(x);
        if constexpr (SPLIT) low.take_rest(x, high);
    }
};

// d += a b for 16 rows and two blocks of columns, where b's parts are given: 16 of the summed dimension
DEVICE void add_parts(float (&d0)[4], float (&d1)[4], const Operand& a, int s, const Pair<DTYPE> (&high)[4], const Pair<DTYPE> (&low)[4]) {
    const auto& x = a.high.p;
    if constexpr (SPLIT) {
        const auto& y = a.low.p;
        Product<DTYPE>::add(d0, y[0][2 * s], y[1][2 * s], y[0][2 * s + 1], y[1][2 * s + 1], high[0], high[2]);
        Product<DTYPE>::add(d1, y[0][2 * s], y[1][2 * s], y[0][2 * s + 1], y[1][2 * s + 1], high[1], high[3]);
        Product<DTYPE>::add(d0, x[0][2 * s], x[1][2 * s], x[0][2 * s + 1], x[1][2 * s + 1], low[0], low[2]);
        Product<DTYPE>::add(d1, x[0][2 * s], x[1][2 * s], x[0][2 * s + 1], x[1][2 * s + 1], low[1], low[3]);
    }
    Product<DTYPE>::add(d0, x[0][2 * s], x[1][2 * s], x[0][2 * s + 1], x[1][2 * s + 1], high[0], high[2]);
    Product<DTYPE>::add(d1, x[0][2 * s], x[1][2 * s], x[0][2 * s + 1], x[1][2 * s + 1], high[1], high[3]);
}

// x (16 rows) times the D of a map in shared memory
DEVICE void times_map(float (&d)[BLOCKS][4], const Operand& x, const Planes& map) {
#pragma unroll
    for (int b = 0; b < BLOCKS; b++)
#pragma unroll
        for (int e = 0; e < 4; e++) d[b][e] = 0.f;
#pragma unroll
    for (int s = 0; s < STEPS; s++)
#pragma unroll
        for (int b = 0; b < BLOCKS; b += 2) {
            Pair<DTYPE> high[4], low[4] = {};
            map.high.columns(high[0], high[1], high[2], high[3], 8 * b, VALUES + 16 * s);
            if constexpr (SPLIT) map.low.columns(low[0], low[1], low[2], low[3], 8 * b, VALUES + 16 * s);
            add_parts(d[b], d[b + 1], x, s, high, low);
        }
}

// A block's map as its successors read it: for every pair of blocks of D the parts that a lane needs, then R as sums.
struct Published {
    unsigned char* base;
    DEVICE uint4* map(int s, int b, int part) const { return reinterpret_cast<uint4*>(base) + (((s * (BLOCKS / 2) + b / 2) * 2 + part) * 32 + lane_id()); }
    DEVICE float4* offset(int tile, int b) const { return reinterpret_cast<float4*>(base + KEYS * KEYS * 4) + ((tile * BLOCKS + b) * 32 + lane_id()); }
    DEVICE float* gamma() const { return reinterpret_cast<float*>(base + PUBLISHED_BYTES); }
};

// four blocks with their second parts as two words of 16 bytes; float32 has no second part
DEVICE void to_words(uint4& one, uint4& other, const uint32_t (&high)[4], const uint32_t (&low)[4]) {
    one = make_uint4(high[0], high[1], high[2], high[3]);
    other = make_uint4(low[0], low[1], low[2], low[3]);
}
DEVICE void to_words(uint4& one, uint4& other, const float2 (&high)[4], const float2 (&)[4]) {
    one = make_uint4(__float_as_uint(high[0].x), __float_as_uint(high[0].y), __float_as_uint(high[1].x), __float_as_uint(high[1].y));
    other = make_uint4(__float_as_uint(high[2].x), __float_as_uint(high[2].y), __float_as_uint(high[3].x), __float_as_uint(high[3].y));
}
DEVICE void from_words(uint32_t (&high)[4], uint32_t (&low)[4], const uint4& one, const uint4& other) {
    high[0] = one.x, high[1] = one.y, high[2] = one.z, high[3] = one.w;
    low[0] = other.x, low[1] = other.y, low[2] = other.z, low[3] = other.w;
}
DEVICE void from_words(float2 (&high)[4], float2 (&)[4], const uint4& one, const uint4& other) {
    high[0] = make_float2(__uint_as_float(one.x), __uint_as_float(one.y)), high[1] = make_float2(__uint_as_float(one.z), __uint_as_float(one.w));
    high[2] = make_float2(__uint_as_float(other.x), __uint_as_float(other.y)), high[3] = make_float2(__uint_as_float(other.z), __uint_as_float(other.w));
}

DEVICE uint4 cluster_word(const void* mine, uint32_t rank) {
    const uint32_t* from = static_cast<const uint32_t*>(mine);
    return make_uint4(cluster_load_bits(from, rank), cluster_load_bits(from + 1, rank), cluster_load_bits(from + 2, rank), cluster_load_bits(from + 3, rank));
}

// Copies `count` rows of `columns` numbers into a tile, the rest of `rows` rows being zeros. Whole pieces asynchronously, others now.
template <int COLUMNS>
DEVICE void copy_rows(const Tile<DTYPE, COLUMNS>& to, int row0, const DTYPE* from, int64_t step, int count, int rows, int columns, bool pieces, int thread) {
    constexpr int PIECES = COLUMNS / PIECE;
    if (pieces) {
#pragma unroll 4
        for (int i = thread; i < rows * PIECES; i += 32 * GROUP) {
            const int row = i / PIECES, piece = i % PIECES;
            const bool valid = row < count && piece * PIECE < columns;
            cp_async_16(to.piece(row0 + row, piece), valid ? from + row * step + piece * PIECE : from, valid);
        }
    } else {
#pragma unroll 1
        for (int i = thread; i < rows * COLUMNS; i += 32 * GROUP) {
            const int row = i / COLUMNS, column = i % COLUMNS;
            *to.element(row0 + row, column) = row < count && column < columns ? from[row * step + column] : narrow<DTYPE>(0.f);
        }
    }
}

#if CLUSTER > 1
#define CLUSTERED __cluster_dims__(CLUSTER, 1, 1)
#else
#define CLUSTERED
#endif

extern "C" __global__ void CLUSTERED __launch_bounds__(32 * WARPS, 1) delta_segments(const __grid_constant__ Params p) {
    SHARED_MEMORY(memory);
    const int warp = threadIdx.x / 32, lane = lane_id(), r = lane / 4, c = lane % 4;
    const int segment = warp / GROUP, part = GROUP == 1 ? 0 : warp % GROUP, first_row = part * MT * 16, group_thread = threadIdx.x % (32 * GROUP);
    const int rank = CLUSTER > 1 ? static_cast<int>(cluster_rank()) : 0, unit = blockIdx.x / CLUSTER;
    const int value_tiles = (p.values + VALUES - 1) / VALUES;
    const int tile = unit % value_tiles, head = unit / value_tiles % p.heads, sequence = unit / value_tiles / p.heads;
    const int value0 = tile * VALUES, values = min(p.values - value0, VALUES);
    const int64_t row = p.bounds ? 0 : sequence;
    const int begin = p.bounds ? static_cast<int>(load_index(p.bounds, sequence, p.bounds_wide)) : 0;
    const int end = p.bounds ? static_cast<int>(load_index(p.bounds, sequence + 1, p.bounds_wide)) : p.tokens;
    const DTYPE* q = p.q + row * p.q_b + head / p.group * p.q_h;
    const DTYPE* k = p.k + row * p.k_b + head / p.group * p.k_h;
    const DTYPE* v = p.v + row * p.v_b + head * p.v_h + value0;
    DTYPE* o = p.o + (row * p.tokens * p.heads + head) * p.values + value0;
    const int64_t o_t = static_cast<int64_t>(p.heads) * p.values;

    // a segment's place: keys, or later its map; values; queries
    const int key_bytes = max(p.longest * Keys::ROW, MAP_BYTES), place = key_bytes + p.longest * (Keys::ROW + Values::ROW);
    unsigned char* mine = memory + segment * place;
    const Keys key_tile{mine}, query_tile{mine + key_bytes + p.longest * Values::ROW};
    const Values value_tile{mine + key_bytes};
    unsigned char* scratches = memory + SEGMENTS * place;
    PairScratch& scratch = reinterpret_cast<PairScratch*>(scratches)[warp];
    const Published published{scratches};
    const Planes start(scratches + PUBLISHED_BYTES + 16, VALUES);
    float* gammas = reinterpret_cast<float*>(scratches + max(WARPS * static_cast<int>(sizeof(PairScratch)), PUBLISHED_BYTES + 16 + START_BYTES));

    const auto meet = [&] {
        __syncwarp();
        if constexpr (GROUP > 1) barrier_sync(1 + segment, 32 * GROUP);
    };

    // the state at the round's start: 16 rows (values) of a warp
    float carried[BLOCKS][4] = {};
    if (warp < VALUE_TILES && p.initial) {
        const float* from = p.initial + (static_cast<int64_t>(sequence) * p.heads + head) * p.keys * p.values + value0;
#pragma unroll
        for (int b = 0; b < BLOCKS; b++)
#pragma unroll
            for (int e = 0; e < 4; e++) {
                const int key = 8 * b + 2 * c + (e & 1), value = 16 * warp + r + 8 * (e >> 1);
                if (key < p.keys && value < values) carried[b][e] = from[static_cast<int64_t>(key) * p.values + value];
            }
    }

    int at = begin;
    do {
        const int left = end - at;
        const int length = min(p.longest, (left + SEGMENTS * CLUSTER * CHUNK - 1) / (SEGMENTS * CLUSTER * CHUNK) * CHUNK);
        const int next = at + SEGMENTS * CLUSTER * length;
        const bool last = next >= end;
        const int token0 = at + (rank * SEGMENTS + segment) * length, count = max(0, min(length, end - token0));
        const int pairs = (count + 31) / 32;

#pragma unroll 1
        for (int pair = 0; pair < pairs; pair++) {
            const int64_t token = token0 + 32 * pair;
            const int there = count - 32 * pair, rows = min(32, length - 32 * pair);
            copy_rows(key_tile, 32 * pair, k + token * p.k_t, p.k_t, there, rows, p.keys, p.pieces, group_thread);
            copy_rows(value_tile, 32 * pair, v + token * p.v_t, p.v_t, there, rows, values, p.pieces, group_thread);
            copy_rows(query_tile, 32 * pair, q + token * p.q_t, p.q_t, there, rows, p.keys, p.pieces, group_thread);
            cp_async_commit();
        }
        float log_decay = 0.f, beta = 0.f, out = 0.f;
        const auto read_gates = [&](int pair) {
            const int64_t token = token0 + 32 * pair + lane;
            log_decay = 0.f, beta = 0.f, out = 0.f;
            if (32 * pair + lane < count) {
                beta = load_gate<DTYPE>(p.beta, row * p.beta_b + token * p.beta_t + head * p.beta_h, p.beta_wide);
                if (p.g) log_decay = 1.4426950408889634f * load_gate<DTYPE>(p.g, row * p.g_b + token * p.g_t + head * p.g_h, p.g_wide);
                out = p.gate ? p.scale * load_gate<DTYPE>(p.gate, row * p.gate_b + token * p.gate_t + head * p.gate_h, p.gate_wide) : p.scale;
            }
        };
        read_gates(0);

        // A: chunk after chunk from an empty state and from the identity
        float x[MT][BLOCKS][4] = {};
        float gamma = 1.f;
        for (int pair = 0; pair < pairs; pair++) {
            switch (pairs - 1 - pair) {
                case 0: cp_async_wait<0>(); break;
                case 1: cp_async_wait<1>(); break;
                case 2: cp_async_wait<2>(); break;
                default: cp_async_wait<3>();
            }
            meet();
            const int row0 = 32 * pair, chunks = count - row0 > CHUNK ? 2 : 1;
            write_lines(scratch, log_decay, beta, out, p.l2norm, key_tile, query_tile, row0, CHUNK * chunks);
            if (pair + 1 < pairs) read_gates(pair + 1);
            Scores<DTYPE> kept_first, kept_second;
#pragma unroll 1
            for (int which = 0; which < chunks; which++) {
                Scores<DTYPE> made;
                score(made, scratch, which, key_tile, query_tile, row0 + CHUNK * which);
                if (which) kept_second = made;
                else kept_first = kept_second = made;
            }
            invert(scratch);
#pragma unroll 1
            for (int which = 0; which < chunks; which++) {
                Factors<DTYPE> f;
                read_factors(f, scratch, which);
                advance<DTYPE, KEYS, VALUES, MT>(x, f, kept_first, gamma, first_row, key_tile, query_tile, value_tile, row0 + CHUNK * which, meet);
                gamma *= f.total;
                kept_first = kept_second;
            }
        }
        meet();

        // B: the maps of the segments up to each one of this block
        const auto write_map = [&] {
            const Planes to(mine, ROWS);
#pragma unroll
            for (int m = 0; m < MT; m++)
#pragma unroll
                for (int b = 0; b < BLOCKS; b++) {
                    to.write(first_row + 16 * m + r, 8 * b + 2 * c, x[m][b][0], x[m][b][1]);
                    to.write(first_row + 16 * m + r + 8, 8 * b + 2 * c, x[m][b][2], x[m][b][3]);
                }
            if (group_thread == 0) gammas[segment] = gamma;
        };
#pragma unroll 1
        for (int step = 1;; step *= 2) {
            write_map();
            __syncthreads();
            if (step >= SEGMENTS) break;
            if (segment >= step) {
                const Planes earlier(memory + (segment - step) * place, ROWS), own(mine, ROWS);
                const float before = gammas[segment - step];
#pragma unroll
                for (int m = 0; m < MT; m++) {
                    Operand a;
                    float d[BLOCKS][4];
                    const int row0 = first_row + 16 * m;
                    a.load(earlier, row0);
                    times_map(d, a, own);
                    const float weight = row0 >= VALUES ? before : 1.f;
#pragma unroll
                    for (int b = 0; b < BLOCKS; b++)
#pragma unroll
                        for (int t = 0; t < 2; t++) {
                            const float2 was = earlier.read(row0 + r + 8 * t, 8 * b + 2 * c);
                            x[m][b][2 * t] = gamma * was.x - d[b][2 * t] + weight * x[m][b][2 * t];
                            x[m][b][2 * t + 1] = gamma * was.y - d[b][2 * t + 1] + weight * x[m][b][2 * t + 1];
                        }
                }
                gamma *= before;
            }
            __syncthreads();
        }

        // the block's map for its successors, in the place of the scratch
        if (segment == SEGMENTS - 1) {
            const Planes own(mine, ROWS);
#pragma unroll
            for (int s = 0; s < STEPS; s++)
#pragma unroll
                for (int b = 0; b < BLOCKS; b += 2) {
                    if ((s * (BLOCKS / 2) + b / 2) % GROUP != part) continue;
                    Pair<DTYPE> high[4], low[4] = {};
                    own.high.columns(high[0], high[1], high[2], high[3], 8 * b, VALUES + 16 * s);
                    if constexpr (SPLIT) own.low.columns(low[0], low[1], low[2], low[3], 8 * b, VALUES + 16 * s);
                    to_words(*published.map(s, b, 0), *published.map(s, b, 1), high, low);
                }
#pragma unroll
            for (int m = 0; m < MT; m++)
                if (first_row + 16 * m < VALUES) {
#pragma unroll
                    for (int b = 0; b < BLOCKS; b++)
                        *published.offset(first_row / 16 + m, b) = make_float4(x[m][b][0], x[m][b][1], x[m][b][2], x[m][b][3]);
                }
            if (group_thread == 0) *published.gamma() = gamma;
        }
        __syncwarp();
        if constexpr (CLUSTER > 1) {
            cluster_arrive();
            cluster_wait();
        } else {
            __syncthreads();
        }

        // the state where this block starts, and for a next round or as the final state where the round ends
        if (warp < VALUE_TILES) {
            const bool ends = !last || (p.final && rank == CLUSTER - 1);
#pragma unroll 1
            for (int block = 0; block < CLUSTER; block++) {
                if (block == rank) {
#pragma unroll
                    for (int b = 0; b < BLOCKS; b++) {
                        start.write(16 * warp + r, 8 * b + 2 * c, carried[b][0], carried[b][1]);
                        start.write(16 * warp + r + 8, 8 * b + 2 * c, carried[b][2], carried[b][3]);
                    }
                    if (!ends) break;
                }
                Operand a;
                a.take(carried);
                const float decay = cluster_load(published.gamma(), block);
                float d[BLOCKS][4] = {};
#pragma unroll
                for (int s = 0; s < STEPS; s++)
#pragma unroll
                    for (int b = 0; b < BLOCKS; b += 2) {
                        const uint4 one = cluster_word(published.map(s, b, 0), block), other = cluster_word(published.map(s, b, 1), block);
                        Pair<DTYPE> high[4], low[4] = {};
                        from_words(high, low, one, other);
                        add_parts(d[b], d[b + 1], a, s, high, low);
                    }
#pragma unroll
                for (int b = 0; b < BLOCKS; b++) {
                    const uint4 bits = cluster_word(published.offset(warp, b), block);
                    const float own[4] = {__uint_as_float(bits.x), __uint_as_float(bits.y), __uint_as_float(bits.z), __uint_as_float(bits.w)};
#pragma unroll
                    for (int e = 0; e < 4; e++) carried[b][e] = decay * carried[b][e] - d[b][e] + own[e];
                }
            }
            if (last && p.final && rank == CLUSTER - 1) {
                float* to = p.final + (static_cast<int64_t>(sequence) * p.heads + head) * p.keys * p.values + value0;
#pragma unroll
                for (int b = 0; b < BLOCKS; b++)
#pragma unroll
                    for (int e = 0; e < 4; e++) {
                        const int key = 8 * b + 2 * c + (e & 1), value = 16 * warp + r + 8 * (e >> 1);
                        if (key < p.keys && value < values) to[static_cast<int64_t>(key) * p.values + value] = carried[b][e];
                    }
            }
        }
        __syncthreads();
        if constexpr (CLUSTER > 1) cluster_arrive();  // its counterpart below: nobody leaves or publishes again while others read

        // C: the state where this warp's segment starts, then every token's read of it
        if (count > 0) {
            Operand entering[OWN_TILES];
#pragma unroll
            for (int m = 0; m < OWN_TILES; m++) {
                const int row0 = (part * OWN_TILES + m) * 16;
                entering[m].load(start, row0);
                if (segment) {
                    const Planes before(memory + (segment - 1) * place, ROWS);
                    const float decay = gammas[segment - 1];
                    float d[BLOCKS][4];
                    times_map(d, entering[m], before);
#pragma unroll
                    for (int b = 0; b < BLOCKS; b++)
#pragma unroll
                        for (int t = 0; t < 2; t++) {
                            const float2 was = start.read(row0 + r + 8 * t, 8 * b + 2 * c), own = before.read(row0 + r + 8 * t, 8 * b + 2 * c);
                            d[b][2 * t] = decay * was.x - d[b][2 * t] + own.x;
                            d[b][2 * t + 1] = decay * was.y - d[b][2 * t + 1] + own.y;
                        }
                    entering[m].take(d);
                }
            }
#pragma unroll 1
            for (int row0 = 0; row0 < count; row0 += CHUNK) {
                float read[2 * OWN_TILES][4] = {};
#pragma unroll
                for (int s = 0; s < STEPS; s++) {
                    Pair<DTYPE> a0, a1, a2, a3;
                    query_tile.rows(a0, a1, a2, a3, row0, 16 * s);
#pragma unroll
                    for (int m = 0; m < OWN_TILES; m++)
#pragma unroll
                        for (int half = 0; half < 2; half++) {
                            float(&d)[4] = read[2 * m + half];
                            if constexpr (SPLIT) Product<DTYPE>::add(d, a0, a1, a2, a3, entering[m].low.p[half][2 * s], entering[m].low.p[half][2 * s + 1]);
                            Product<DTYPE>::add(d, a0, a1, a2, a3, entering[m].high.p[half][2 * s], entering[m].high.p[half][2 * s + 1]);
                        }
                }
#pragma unroll
                for (int n = 0; n < 2 * OWN_TILES; n++)
#pragma unroll
                    for (int t = 0; t < 2; t++) {
                        Pair<DTYPE>* at_tile = value_tile.pair_at(row0 + r + 8 * t, (part * OWN_TILES * 2 + n) * 8 + 2 * c);
                        const float2 own = Make<DTYPE>::floats(*at_tile);
                        *at_tile = Make<DTYPE>::pair_of(own.x + read[n][2 * t], own.y + read[n][2 * t + 1]);
                    }
                meet();
                constexpr int PIECES = VALUES / PIECE;
                const int rows = min(CHUNK, count - row0);
                DTYPE* to = o + (token0 + row0) * o_t;
                if (p.o_pieces) {
#pragma unroll
                    for (int i = group_thread; i < CHUNK * PIECES; i += 32 * GROUP) {
                        const int token = i / PIECES, piece = i % PIECES;
                        if (token < rows && piece * PIECE < values)
                            *reinterpret_cast<uint4*>(to + token * o_t + piece * PIECE) = *reinterpret_cast<const uint4*>(value_tile.piece(row0 + token, piece));
                    }
                } else {
#pragma unroll 1
                    for (int i = group_thread; i < CHUNK * VALUES; i += 32 * GROUP) {
                        const int token = i / VALUES, column = i % VALUES;
                        if (token < rows && column < values) to[token * o_t + column] = *value_tile.element(row0 + token, column);
                    }
                }
            }
        }
        if constexpr (CLUSTER > 1) cluster_wait();
        at = next;
        if (!last) __syncthreads();
    } while (at < end);
}
