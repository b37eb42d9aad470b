// What delta_gradients.cu computes, with its formulas, on Hopper for heads of 128 keys and values in 16 bits, where every gradient but those of v and of the
// initial state is wanted: a block of threads stays on its processor and takes one block of 64 tokens and q/k head after the other.
//
//   square   dO U^T (first warpgroup) and X U^T (second): P' and -L before their decays and masks        64 x 64
//   read     dO S^T, then += P' k^       lost   X S^T, then += L k^       right   U E^T, then += P'^T (gate q^) + L^T (beta k^)      64 x 64 each
//
// A warpgroup has 64 of the 128 key columns of read, lost and right, and of dq^ and dk^ summed over the v heads of a q/k head: 192 registers. Half of the
// threads feed them: three warps for each half of the values (dO, U, X, v, S, E: 64 KB), one for q and k, and one that sums the gates up and, behind the others,
// makes of row sums the gradients of beta, g and gate. While a head's last products and sums run, the next head's tiles are under way.
// P' is rounded once for the products from both sides, L to two numbers, without their diagonal (delta_gradients.cu); k^, beta k^ and gate q^ are rounded.
//
// Of a block of tokens and v head: 128 KB read, dO, U, X, v, S and E, and for a q/k head 32 KB more and 32 KB written; at 1 x 8192, 16/32 heads 0.67 GB, 200 us of
// memory. 14.7 MFLOP: 3,600 cycles of a processor's tensor cores beside 10,500 of memory.
//
// DTYPE: Bfloat or Half; NORMALIZED: q and k are taken at length 1.
#include "chunks.cuh"
#include "hopper_rows.cuh"
#include "stores.cuh"
#include "tiles.cuh"

constexpr int SIDE = 64, WIDTH = 128, FEEDERS = 256, WORKERS = 256, THREADS = FEEDERS + WORKERS;
constexpr int LOADER_REGISTERS = 32, FEEDER_REGISTERS = 48, WORKER_REGISTERS = 216;
static_assert(128 * (LOADER_REGISTERS + FEEDER_REGISTERS) + WORKERS * WORKER_REGISTERS <= 65536, "a processor's registers");

constexpr int SQUARE_BYTES = SIDE * 128, WIDE_BYTES = 2 * SQUARE_BYTES;   // 64 x 64 numbers; 64 x 128, in two halves of the columns
// a stage, of 64 values: columns of dO, U, X and v; rows of S^T and E^T, 128 keys each
constexpr int ARRIVING = 0, UPDATES = SQUARE_BYTES, ERRORS = 2 * SQUARE_BYTES, GIVEN = 3 * SQUARE_BYTES, STATES = 4 * SQUARE_BYTES, LEAVING = 6 * SQUARE_BYTES;
constexpr int STAGE_BYTES = 8 * SQUARE_BYTES, HALVES = 2;
constexpr int KEYS_AT = HALVES * STAGE_BYTES, QUERIES_AT = KEYS_AT + WIDE_BYTES, WEIGHED_AT = QUERIES_AT + WIDE_BYTES, GATED_AT = WEIGHED_AT + WIDE_BYTES;
constexpr int SCORES_AT = GATED_AT + WIDE_BYTES, LINKS_AT = SCORES_AT + SQUARE_BYTES;
constexpr int RESTS_AT = LINKS_AT + SQUARE_BYTES, LINES_AT = RESTS_AT + SQUARE_BYTES;  // rests: what rounding left out of L
// Lines of a v head, float32: G, beta and the gate come from the feeders, the others from the workers; those of row sums have a part of either warpgroup.
constexpr int LOGS = 0, BETA = 128, THROUGH = 192, DIAGONAL = 256, DIRECT = 320, TOLD = 384, PAST = 512, SEEN = 640, TAKEN = 768, GONE = 896, CARRIED = 1024;
constexpr int LINES = 1040, NORMS = 2 * LINES, DOTS = NORMS + 2 * SIDE;   // inverse norms of k and q; their rows times dk^ and dq^, in parts
static_assert(LINES_AT + (DOTS + 4 * SIDE) * 4 <= 232448, "a block's shared memory");

// Named barriers. LOADED and FREED of each half of the values, of q and k the same; lines of two v heads by turns: made, and read again; the workers' own.
constexpr int LOADED = 1, FREED = 3, ROWS_LOADED = 5, ROWS_FREED = 6, MADE = 7, SUMMED = 9, TOGETHER = 11, WITH_ONE_WARP = WORKERS + 32, LOADERS = 3, WITH_LOADERS = WORKERS + 32 * LOADERS;

struct Params {
    const DTYPE *q, *k, *v, *d_o;
    const void *beta, *g, *gate;
    const DTYPE *states, *leaving, *updates, *errors;
    DTYPE *dq, *dk;
    void *dbeta, *dg, *dgate;
    const void* cu_seqlens;
    int64_t q_b, q_t, q_h, k_b, k_t, k_h, v_b, v_t, v_h, o_b, o_t, o_h, beta_b, beta_t, beta_h, g_b, g_t, g_h, gate_b, gate_t, gate_h;
    int heads, group, beta_wide, g_wide, gate_wide, cu_wide, sequences, tokens, slots, items;
    float scale;
};

using Square = Tile<DTYPE, 64>;

// A block of tokens and a q/k head.
struct Item {
    Chunk chunk;
    int64_t first_row;  // of the call's rows
    int slot, shared;
};
DEVICE Item find_item(const Params& p, int index) {
    const int groups = p.heads / p.group;
    Item item;
    item.slot = index / groups, item.shared = index % groups;
    item.chunk = find_chunk(Grid{p.cu_seqlens, p.cu_wide, p.sequences, p.tokens, SIDE, 0, p.slots}, item.slot);
    item.first_row = item.chunk.batch * p.tokens + item.chunk.begin;
    return item;
}
DEVICE float2 two(const float* line) { return *reinterpret_cast<const float2*>(line); }

// ---- The feeders: three warps for either half of the values, `share` says which of them, and one each for q and k and for the lines.

DEVICE void feed_values(const Params& p, unsigned char* stage, int half, int share) {
    bool again = false;
#pragma unroll 1
    for (int index = blockIdx.x; index < p.items; index += gridDim.x) {
        const Item item = find_item(p, index);
        const Chunk& chunk = item.chunk;
        if (chunk.length == 0) continue;
        const int value = half * 64, length = chunk.length;
        const int64_t u_t = static_cast<int64_t>(p.heads) * WIDTH;
#pragma unroll 1
        for (int member = 0; member < p.group; member++) {
            const int head = item.shared * p.group + member;
            const int64_t at = item.first_row * u_t + head * WIDTH + value, state = ((static_cast<int64_t>(item.slot) * p.heads + head) * WIDTH + value) * WIDTH;
            if (again) barrier_sync(FREED + half, WITH_LOADERS);
            again = true;
            if (share == 0) {
                load_rows(stage + ARRIVING, p.d_o + chunk.batch * p.o_b + chunk.begin * p.o_t + head * p.o_h + value, p.o_t, length);
                load_rows(stage + UPDATES, p.updates + at, u_t, length);
                load_rows(stage + ERRORS, p.errors + at, u_t, length);
            } else {
                const DTYPE* const from = (share == 1 ? p.states : p.leaving) + state;
                unsigned char* const to = stage + (share == 1 ? STATES : LEAVING);
#pragma unroll 1
                for (int part = 0; part < 2; part++) load_rows(to + part * SQUARE_BYTES, from + part * 64, WIDTH, SIDE);
                if (share == 1 && p.dbeta) load_rows(stage + GIVEN, p.v + chunk.batch * p.v_b + chunk.begin * p.v_t + head * p.v_h + value, p.v_t, length);
            }
            landed(LOADED + half, WITH_LOADERS);
        }
    }
}

DEVICE void feed_rows(const Params& p, unsigned char* memory) {
    bool again = false;
#pragma unroll 1
    for (int index = blockIdx.x; index < p.items; index += gridDim.x) {
        const Item item = find_item(p, index);
        const Chunk& chunk = item.chunk;
        if (chunk.length == 0) continue;
        if (again) barrier_sync(ROWS_FREED, WITH_ONE_WARP);
        again = true;
#pragma unroll 1
        for (int part = 0; part < 2; part++) {
            load_rows(memory + KEYS_AT + part * SQUARE_BYTES, p.k + chunk.batch * p.k_b + chunk.begin * p.k_t + item.shared * p.k_h + part * 64, p.k_t, chunk.length);
            load_rows(memory + QUERIES_AT + part * SQUARE_BYTES, p.q + chunk.batch * p.q_b + chunk.begin * p.q_t + item.shared * p.q_h + part * 64, p.q_t, chunk.length);
        }
        landed(ROWS_LOADED, WITH_ONE_WARP);
    }
}

// G, beta and the gate of a v head's 64 tokens; a lane has tokens 2 lane and 2 lane + 1
DEVICE void make_lines(const Params& p, const Item& item, int head, float* lines) {
    const Chunk& chunk = item.chunk;
    const int lane = lane_id(), at = 2 * lane;
    float g[2] = {0.0f, 0.0f}, beta[2] = {0.0f, 0.0f}, through[2] = {1.0f, 1.0f};
#pragma unroll
    for (int i = 0; i < 2; i++) {
        const int64_t token = chunk.begin + at + i;
        if (at + i >= chunk.length) break;
        beta[i] = load_gate<DTYPE>(p.beta, chunk.batch * p.beta_b + token * p.beta_t + head * p.beta_h, p.beta_wide);
        if (p.g) g[i] = load_gate<DTYPE>(p.g, chunk.batch * p.g_b + token * p.g_t + head * p.g_h, p.g_wide);
        if (p.gate) through[i] = load_gate<DTYPE>(p.gate, chunk.batch * p.gate_b + token * p.gate_t + head * p.gate_h, p.gate_wide);
    }
    const Log first = p.g ? log_of(g[0]) : Log{0.0f, 0.0f}, second = p.g ? log_of(g[1]) : Log{0.0f, 0.0f};
    Log sum{first.coarse + second.coarse, first.fine + second.fine};
#pragma unroll
    for (int step = 1; step < 32; step *= 2) {
        const float coarse = __shfl_up_sync(0xffffffffu, sum.coarse, step), fine = __shfl_up_sync(0xffffffffu, sum.fine, step);
        if (lane >= step) sum.coarse += coarse, sum.fine += fine;
    }
    *reinterpret_cast<float4*>(lines + LOGS + 2 * at) = make_float4(sum.coarse - second.coarse, sum.fine - second.fine, sum.coarse, sum.fine);
    *reinterpret_cast<float2*>(lines + BETA + at) = make_float2(beta[0], beta[1]);
    *reinterpret_cast<float2*>(lines + THROUGH + at) = make_float2(through[0], through[1]);
}

// a line's two parts at tokens `at` and `at` + 1
DEVICE float2 both_parts(const float* line, int at) {
    const float2 first = two(line + at), second = two(line + SIDE + at);
    return make_float2(first.x + second.x, first.y + second.y);
}

// the gradients of beta, g and the gate from a v head's row sums; a lane has tokens 2 lane and 2 lane + 1
DEVICE void make_vectors(const Params& p, const Item& item, int head, const float* lines) {
    const int lane = lane_id(), at = 2 * lane;
    const float2 beta = two(lines + BETA + at), through = two(lines + THROUGH + at), seen = both_parts(lines + SEEN, at), direct = two(lines + DIRECT + at);
    const bool here[2] = {at < item.chunk.length, at + 1 < item.chunk.length};
    const int64_t row = (item.first_row + at) * p.heads + head;
    if (p.dgate) {
        const float2 told = both_parts(lines + TOLD, at);
        if (here[0]) store_gate<DTYPE>(p.dgate, row, p.gate_wide, told.x);
        if (here[1]) store_gate<DTYPE>(p.dgate, row + p.heads, p.gate_wide, told.y);
    }
    if (p.dbeta) {
        if (here[0]) store_gate<DTYPE>(p.dbeta, row, p.beta_wide, direct.x + seen.x);
        if (here[1]) store_gate<DTYPE>(p.dbeta, row + p.heads, p.beta_wide, direct.y + seen.y);
    }
    if (!p.dg) return;
    float carried = 0.0f;
#pragma unroll
    for (int i = 0; i < WORKERS / 32; i++) carried += lines[CARRIED + i];
    carried *= exp_log(reinterpret_cast<const Log*>(lines + LOGS)[SIDE - 1]);
    const float2 past = both_parts(lines + PAST, at), gone = both_parts(lines + GONE, at), taken = both_parts(lines + TAKEN, at);
    const float first = here[0] ? through.x * past.x + beta.x * seen.x - (taken.x - gone.x) : 0.0f;  // taken holds gone
    const float second = here[1] ? through.y * past.y + beta.y * seen.y - (taken.y - gone.y) : 0.0f;
    const float left = here[0] ? gone.x : 0.0f, right = here[1] ? gone.y : 0.0f;
    float behind = first + second, before = left + right;  // of this lane's tokens and those after them; and those before them
#pragma unroll
    for (int lanes = 1; lanes < 32; lanes *= 2) {
        const float after = __shfl_down_sync(0xffffffffu, behind, lanes), earlier = __shfl_up_sync(0xffffffffu, before, lanes);
        if (lane + lanes < 32) behind += after;
        if (lane >= lanes) before += earlier;
    }
    if (here[0]) store_gate<DTYPE>(p.dg, row, p.g_wide, behind + carried + (before - left - right));
    if (here[1]) store_gate<DTYPE>(p.dg, row + p.heads, p.g_wide, behind - first + carried + (before - right));
}

DEVICE void feed_lines(const Params& p, float* lines) {
    int turn = 0, head_before = 0;
    Item before;
#pragma unroll 1
    for (int index = blockIdx.x; index < p.items; index += gridDim.x) {
        const Item item = find_item(p, index);
        if (item.chunk.length == 0) continue;
#pragma unroll 1
        for (int member = 0; member < p.group; member++, turn++) {
            const int head = item.shared * p.group + member;
            make_lines(p, item, head, lines + turn % 2 * LINES);
            barrier_arrive(MADE + turn % 2, WITH_ONE_WARP);
            if (turn > 0) {
                barrier_sync(SUMMED + (turn - 1) % 2, WITH_ONE_WARP);
                make_vectors(p, before, head_before, lines + (turn - 1) % 2 * LINES);
            }
            before = item, head_before = head;
        }
    }
    if (turn > 0) {
        barrier_sync(SUMMED + (turn - 1) % 2, WITH_ONE_WARP);
        make_vectors(p, before, head_before, lines + (turn - 1) % 2 * LINES);
    }
}

// ---- The workers, two warpgroups.

using Sums = float[32];  // of a lane, rows r and r + 8 of its warp's 16: of columns 8 n + 2 c and the next one [4 n], [4 n + 1] and [4 n + 2], [4 n + 3]

// Where a lane's numbers of a sum lie in a square in shared memory; both rows are mixed alike.
struct Place {
    int row, at[8];  // r of this warp's rows; offset of columns 8 n + 2 c in row r
    DEVICE Place(int first) : row(first + lane_id() / 4) {
#pragma unroll
        for (int n = 0; n < 8; n++) at[n] = row * 128 + ((n ^ row) & 7) * 16 + lane_id() % 4 * 4;
    }
    DEVICE uint32_t* first(unsigned char* square, int n) const { return reinterpret_cast<uint32_t*>(square + at[n]); }
    DEVICE uint32_t* second(unsigned char* square, int n) const { return reinterpret_cast<uint32_t*>(square + at[n] + 8 * 128); }
};

DEVICE void scale_rows(Sums& sums, float first, float second) {
#pragma unroll
    for (int n = 0; n < 8; n++) sums[4 * n] *= first, sums[4 * n + 1] *= first, sums[4 * n + 2] *= second, sums[4 * n + 3] *= second;
}
// rows of a square, each times its number
DEVICE void add_rows(Sums& sums, unsigned char* square, const Place& place, float first, float second) {
#pragma unroll
    for (int n = 0; n < 8; n++) {
        const float2 x = unpair<DTYPE>(*place.first(square, n)), y = unpair<DTYPE>(*place.second(square, n));
        sums[4 * n] += first * x.x, sums[4 * n + 1] += first * x.y, sums[4 * n + 2] += second * y.x, sums[4 * n + 3] += second * y.y;
    }
}
// to `line` the sums over 64 columns of a square's rows times these
DEVICE void row_sums(float* line, const Sums& sums, unsigned char* square, const Place& place) {
    float first = 0.0f, second = 0.0f;
#pragma unroll
    for (int n = 0; n < 8; n++) {
        const float2 x = unpair<DTYPE>(*place.first(square, n)), y = unpair<DTYPE>(*place.second(square, n));
        first += x.x * sums[4 * n], second += y.x * sums[4 * n + 2];
        first += x.y * sums[4 * n + 1], second += y.y * sums[4 * n + 3];
    }
#pragma unroll
    for (int lanes = 1; lanes < 4; lanes *= 2) first += __shfl_xor_sync(0xffffffffu, first, lanes), second += __shfl_xor_sync(0xffffffffu, second, lanes);
    if (lane_id() % 4 == 0) line[place.row] = first, line[place.row + 8] = second;
}

// eight numbers times eight others, added up; a number times eight
DEVICE float dot(uint4 a, uint4 b) {
    const uint32_t x[4] = {a.x, a.y, a.z, a.w}, y[4] = {b.x, b.y, b.z, b.w};
    float sum = 0.0f;
#pragma unroll
    for (int i = 0; i < 4; i++) {
        const float2 one = unpair<DTYPE>(x[i]), other = unpair<DTYPE>(y[i]);
        sum += one.x * other.x, sum += one.y * other.y;
    }
    return sum;
}
DEVICE uint4 times(uint4 a, float by) {
    uint32_t x[4] = {a.x, a.y, a.z, a.w};
#pragma unroll
    for (int i = 0; i < 4; i++) {
        const float2 both = unpair<DTYPE>(x[i]);
        x[i] = pair<DTYPE>(by * both.x, by * both.y);
    }
    return make_uint4(x[0], x[1], x[2], x[3]);
}
DEVICE uint4& piece_at(unsigned char* wide, int row, int piece, int part) { return *reinterpret_cast<uint4*>(Square{wide + part * SQUARE_BYTES}.piece(row, piece)); }
DEVICE float over_eight(float x) {
#pragma unroll
    for (int lanes = 1; lanes < 8; lanes *= 2) x += __shfl_xor_sync(0xffffffffu, x, lanes);
    return x;
}

struct Worker {
    const Params& p;
    unsigned char* const memory;
    const int thread, part;  // part: which 64 key columns
    const Place place;
    float* const shared_lines;
    Sums dq, dk;

    DEVICE Worker(const Params& params, unsigned char* bytes)
        : p(params), memory(bytes), thread(threadIdx.x - FEEDERS), part(__shfl_sync(0xffffffffu, threadIdx.x / 128 - 2, 0)), place(threadIdx.x / 32 % 4 * 16),
          shared_lines(reinterpret_cast<float*>(bytes + LINES_AT)) {}

    DEVICE unsigned char* half_of(int at) const { return memory + at + part * SQUARE_BYTES; }

    // q^ and k^ in place of q and k; eight threads a row
    DEVICE void normalize(int at, float* norms) const {
#pragma unroll
        for (int i = 0; i < 2; i++) {
            const int row = thread / 8 + 32 * i, piece = thread % 8;
            uint4 &first = piece_at(memory + at, row, piece, 0), &second = piece_at(memory + at, row, piece, 1);
            const uint4 x = first, y = second;
            const float norm = rsqrtf(over_eight(dot(x, x) + dot(y, y)) + 1e-6f);
            first = times(x, norm), second = times(y, norm);
            if (piece == 0) norms[row] = norm;
        }
    }
    // rows of q^ or k^, each times its number; the threads that normalized them
    DEVICE void weigh(int from, int to, const float* by) const {
#pragma unroll
        for (int i = 0; i < 2; i++) {
            const int row = thread / 8 + 32 * i, piece = thread % 8;
            const float weight = by[row];
#pragma unroll
            for (int side = 0; side < 2; side++) piece_at(memory + to, row, piece, side) = times(piece_at(memory + from, row, piece, side), weight);
        }
    }

    // a v head's sums; dq^ and dk^ take them up
    DEVICE void take_head(int turn, bool first_of_item) {
        float* const lines = shared_lines + turn % 2 * LINES;
        Sums read, lost, right, square;
        float own[2] = {0.0f, 0.0f}, held = 0.0f;
#pragma unroll
        for (int half = 0; half < HALVES; half++) {
            unsigned char* const stage = memory + half * STAGE_BYTES;
            const uint64_t arriving = operand(stage + ARRIVING), updates = operand(stage + UPDATES), errors = operand(stage + ERRORS);
            const uint64_t states = operand(stage + STATES + part * SQUARE_BYTES), leaving = operand(stage + LEAVING + part * SQUARE_BYTES);
            const uint64_t mine = operand(stage + (part ? ERRORS : ARRIVING));
            barrier_sync(LOADED + half, WITH_LOADERS);
            products_begin();
#pragma unroll
            for (int s = 0; s < 4; s++) {
                const int row = s * FURTHER_IN_ROWS, column = s * FURTHER_IN_COLUMNS;
                if (half == 0 && s == 0) {
                    product<DTYPE, BY_ROWS, BY_COLUMNS, false>(read, further(arriving, row), further(states, column));
                    product<DTYPE, BY_ROWS, BY_COLUMNS, false>(lost, further(errors, row), further(states, column));
                    product<DTYPE, BY_ROWS, BY_COLUMNS, false>(right, further(updates, row), further(leaving, column));
                    product<DTYPE, BY_ROWS, BY_ROWS, false>(square, further(mine, row), further(updates, row));
                } else {
                    product<DTYPE, BY_ROWS, BY_COLUMNS, true>(read, further(arriving, row), further(states, column));
                    product<DTYPE, BY_ROWS, BY_COLUMNS, true>(lost, further(errors, row), further(states, column));
                    product<DTYPE, BY_ROWS, BY_COLUMNS, true>(right, further(updates, row), further(leaving, column));
                    product<DTYPE, BY_ROWS, BY_ROWS, true>(square, further(mine, row), further(updates, row));
                }
            }
            products_commit();
            if (p.dbeta) {
#pragma unroll
                for (int i = 0; i < 2; i++) own[i] += dot(piece_at(stage + ERRORS, thread / 8 + 32 * i, thread % 8, 0), piece_at(stage + GIVEN, thread / 8 + 32 * i, thread % 8, 0));
            }
            if (p.dg) {  // both tiles mix their pieces alike
#pragma unroll
                for (int i = 0; i < WIDE_BYTES / 16 / WORKERS; i++) {
                    const int at = (thread + i * WORKERS) * 16;
                    held += dot(*reinterpret_cast<const uint4*>(stage + STATES + at), *reinterpret_cast<const uint4*>(stage + LEAVING + at));
                }
            }
            if (half == 1) {
                barrier_sync(MADE + turn % 2, WITH_ONE_WARP);
                if (first_of_item) {
                    barrier_sync(ROWS_LOADED, WITH_ONE_WARP);
                    if constexpr (NORMALIZED) normalize(KEYS_AT, shared_lines + NORMS), normalize(QUERIES_AT, shared_lines + NORMS + SIDE);
                }
                weigh(KEYS_AT, WEIGHED_AT, lines + BETA);
                if (p.gate) weigh(QUERIES_AT, GATED_AT, lines + THROUGH);
            }
            products_wait<0>();
            settled(read), settled(lost), settled(right), settled(square);
            barrier_arrive(FREED + half, WITH_LOADERS);
        }
        if (p.dbeta) {
#pragma unroll
            for (int i = 0; i < 2; i++) {
                const float sum = over_eight(own[i]);
                if (thread % 8 == 0) lines[DIRECT + thread / 8 + 32 * i] = sum;
            }
        }
        if (p.dg) {
            held = warp_sum(held);
            if (lane_id() == 0) lines[CARRIED + thread / 32] = held;
        }
        round_square(lines, square);
        fence_for_products();
        barrier_sync(TOGETHER, WORKERS);
        finish_head(lines, read, lost, right);
        barrier_arrive(SUMMED + turn % 2, WITH_ONE_WARP);
    }

    // P' of the first warpgroup, L of the second, below their diagonal
    DEVICE void round_square(float* lines, const Sums& square) const {
        const Log* const logs = reinterpret_cast<const Log*>(lines + LOGS);
        unsigned char *const to = memory + (part ? LINKS_AT : SCORES_AT), *const rests = memory + RESTS_AT;
        const int row = place.row, c = lane_id() % 4;
        const float by = part ? -1.0f : p.scale;
        const Log mine[2] = {logs[row], logs[row + 8]};
#pragma unroll
        for (int n = 0; n < 8; n++) {
            const int column = 8 * n + 2 * c;
            const float4 there = *reinterpret_cast<const float4*>(logs + column);
            const Log others[2] = {Log{there.x, there.y}, Log{there.z, there.w}};
            float x[4];
#pragma unroll
            for (int e = 0; e < 4; e++) {  // above the diagonal the decay is perhaps infinite, and not taken
                const bool below = column + e % 2 < row + (e < 2 ? 0 : 8);
                x[e] = below ? exp_between(mine[e / 2], others[e % 2]) * (by * square[4 * n + e]) : 0.0f;
            }
            const uint32_t first = pair<DTYPE>(x[0], x[1]), second = pair<DTYPE>(x[2], x[3]);
            *place.first(to, n) = first, *place.second(to, n) = second;
            if (part) *place.first(rests, n) = Make<DTYPE>::rest(x[0], x[1], first), *place.second(rests, n) = Make<DTYPE>::rest(x[2], x[3], second);
            if (!part && n / 2 == thread / 32 % 4) {  // the warp's squares on the diagonal
#pragma unroll
                for (int e = 0; e < 4; e++)
                    if (column + e % 2 == row + (e < 2 ? 0 : 8)) lines[DIAGONAL + column + e % 2] = by * square[4 * n + e];
            }
        }
    }

    DEVICE void finish_head(float* lines, Sums& read, Sums& lost, Sums& right) {
        const Log* const logs = reinterpret_cast<const Log*>(lines + LOGS);
        const int row = place.row;
        const Log last = logs[SIDE - 1], first_log = logs[row], second_log = logs[row + 8];
        unsigned char *const keys = half_of(KEYS_AT), *const queries = half_of(QUERIES_AT);
        const uint64_t scores = operand(memory + SCORES_AT), links = operand(memory + LINKS_AT), rests = operand(memory + RESTS_AT), k = operand(keys);
        const uint64_t gated = operand(p.gate ? half_of(GATED_AT) : queries), weighed = operand(half_of(WEIGHED_AT));
        {
            const float first = exp_log(first_log), second = exp_log(second_log);
            scale_rows(read, p.scale * first, p.scale * second);
            scale_rows(lost, -first, -second);
        }
        products_begin();
#pragma unroll
        for (int s = 0; s < 4; s++) product<DTYPE, BY_ROWS, BY_COLUMNS, true>(read, further(scores, s * FURTHER_IN_ROWS), further(k, s * FURTHER_IN_COLUMNS));
#pragma unroll
        for (int s = 0; s < 4; s++) {
            product<DTYPE, BY_ROWS, BY_COLUMNS, true>(lost, further(links, s * FURTHER_IN_ROWS), further(k, s * FURTHER_IN_COLUMNS));
            product<DTYPE, BY_ROWS, BY_COLUMNS, true>(lost, further(rests, s * FURTHER_IN_ROWS), further(k, s * FURTHER_IN_COLUMNS));
        }
        products_commit();
        scale_rows(right, exp_between(last, first_log), exp_between(last, second_log));
        if (p.dg) row_sums(lines + GONE + part * SIDE, right, keys, place);
        products_begin();
#pragma unroll
        for (int s = 0; s < 4; s++)
            product<DTYPE, BY_COLUMNS, BY_COLUMNS, true>(right, further(scores, s * FURTHER_IN_COLUMNS), further(gated, s * FURTHER_IN_COLUMNS));
#pragma unroll
        for (int s = 0; s < 4; s++) {
            product<DTYPE, BY_COLUMNS, BY_COLUMNS, true>(right, further(links, s * FURTHER_IN_COLUMNS), further(weighed, s * FURTHER_IN_COLUMNS));
            product<DTYPE, BY_COLUMNS, BY_COLUMNS, true>(right, further(rests, s * FURTHER_IN_COLUMNS), further(weighed, s * FURTHER_IN_COLUMNS));
        }
        products_commit();
        products_wait<1>();
        settled(read), settled(lost);
        const float first_own = lines[DIAGONAL + row], second_own = lines[DIAGONAL + row + 8], first_gate = lines[THROUGH + row], second_gate = lines[THROUGH + row + 8];
        if (p.dg) row_sums(lines + PAST + part * SIDE, read, queries, place);
        add_rows(read, keys, place, first_own, second_own);
        if (p.dgate) row_sums(lines + TOLD + part * SIDE, read, queries, place);
        row_sums(lines + SEEN + part * SIDE, lost, keys, place);
#pragma unroll
        for (int n = 0; n < 8; n++) {
            dq[4 * n] += first_gate * read[4 * n], dq[4 * n + 1] += first_gate * read[4 * n + 1];
            dq[4 * n + 2] += second_gate * read[4 * n + 2], dq[4 * n + 3] += second_gate * read[4 * n + 3];
        }
        scale_rows(lost, lines[BETA + row], lines[BETA + row + 8]);
        products_wait<0>();
        settled(right);
        if (p.dg) row_sums(lines + TAKEN + part * SIDE, right, keys, place);
        add_rows(right, queries, place, first_own * first_gate, second_own * second_gate);
#pragma unroll
        for (int i = 0; i < 32; i++) dk[i] += right[i] + lost[i];
    }

    // dq and dk of an item, through the norms of q and k
    DEVICE void finish_item(const Item& item) {
        unsigned char *const keys = half_of(KEYS_AT), *const queries = half_of(QUERIES_AT);
        if constexpr (NORMALIZED) {
            float *const norms = shared_lines + NORMS, *const dots = shared_lines + DOTS;
            row_sums(dots + part * SIDE, dk, keys, place);
            row_sums(dots + (2 + part) * SIDE, dq, queries, place);
            barrier_sync(TOGETHER, WORKERS);
            along(dk, keys, norms, dots);
            along(dq, queries, norms + SIDE, dots + 2 * SIDE);
        }
        const int groups = p.heads / p.group, row = place.row;
        const int64_t to = ((item.first_row + row) * groups + item.shared) * WIDTH + part * 64 + lane_id() % 4 * 2, further_on = static_cast<int64_t>(8) * groups * WIDTH;
#pragma unroll
        for (int n = 0; n < 8; n++) {
            if (row < item.chunk.length) {
                if (p.dq) *reinterpret_cast<uint32_t*>(p.dq + to + 8 * n) = pair<DTYPE>(dq[4 * n], dq[4 * n + 1]);
                if (p.dk) *reinterpret_cast<uint32_t*>(p.dk + to + 8 * n) = pair<DTYPE>(dk[4 * n], dk[4 * n + 1]);
            }
            if (row + 8 < item.chunk.length) {
                if (p.dq) *reinterpret_cast<uint32_t*>(p.dq + to + further_on + 8 * n) = pair<DTYPE>(dq[4 * n + 2], dq[4 * n + 3]);
                if (p.dk) *reinterpret_cast<uint32_t*>(p.dk + to + further_on + 8 * n) = pair<DTYPE>(dk[4 * n + 2], dk[4 * n + 3]);
            }
        }
    }
    // the gradient of rows through their norms
    DEVICE void along(Sums& found, unsigned char* square, const float* norms, const float* dots) const {
        const int row = place.row;
        add_rows(found, square, place, -(dots[row] + dots[SIDE + row]), -(dots[row + 8] + dots[SIDE + row + 8]));
        scale_rows(found, norms[row], norms[row + 8]);
    }

    DEVICE void run() {
        int turn = 0;
#pragma unroll 1
        for (int index = blockIdx.x; index < p.items; index += gridDim.x) {
            const Item item = find_item(p, index);
            if (item.chunk.length == 0) continue;
#pragma unroll
            for (int i = 0; i < 32; i++) dq[i] = dk[i] = 0.0f;
#pragma unroll 1
            for (int member = 0; member < p.group; member++, turn++) take_head(turn, member == 0);
            finish_item(item);
            barrier_arrive(ROWS_FREED, WITH_ONE_WARP);
        }
    }
};

extern "C" __global__ void __launch_bounds__(THREADS, 1) delta_gradients_hopper(const __grid_constant__ Params p) {
    SHARED_MEMORY(memory);
    const int warp = __shfl_sync(0xffffffffu, threadIdx.x / 32, 0);
    if (warp < 4) {
        leave_registers<LOADER_REGISTERS>();
        feed_values(p, memory + warp / LOADERS * STAGE_BYTES, warp / LOADERS, warp % LOADERS);
    } else if (warp < 8) {
        leave_registers<FEEDER_REGISTERS>();
        if (warp < 2 * LOADERS) feed_values(p, memory + STAGE_BYTES, 1, warp - LOADERS);
        else if (warp == 2 * LOADERS) feed_rows(p, memory);
        else feed_lines(p, reinterpret_cast<float*>(memory + LINES_AT));
    } else {
        take_registers<WORKER_REGISTERS>();
        Worker(p, memory).run();
    }
}
