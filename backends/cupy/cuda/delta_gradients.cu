// The delta rule's gradients of all inputs but v and the initial state, blocks of SIDE tokens side by side, from what the walks left (SPEC.md 10).
// With S the state at a block's start, E the gradient of the state that leaves it, U the updates, X the gradient of (v - ...) beta's factor, |q| and |k| the inverse
// norms under qk_l2norm (else 1), q^ = |q| q, k^ = |k| k, and Gamma_ij = e^(G_i - G_j):
//
//   P' = scale tril(dO U^T) * Gamma      L = -stril(X U^T) * Gamma
//   told  = scale e^G dO S^T + P' k^                                       dq^ = gate told                 dgate = rowsum(q^ * told)
//   left  = L k^ - e^G X S^T                                               dbeta = rowsum(V * X) + rowsum(k^ * left)
//   right = e^(G_C - G) U E^T + (gate P')^T q^ + (beta L)^T k^             dk^ = beta left + right
//   dG = rowsum(q^ * dq^) + beta rowsum(k^ * left) - rowsum(k^ * right)
//
// dg is dG summed from the block's end on, <k^, e^(G_C - G) U E^T> summed up to the token before, and e^(G_C) <S, E>: what U E^T adds to right is not in dG, nor is the
// diagonal of P', which would cancel, but not its rounding: that is larger than all the rest where gates forget within a few tokens. The gradients of q and k go
// through their norms. A block owns a block of tokens and a q/k head and takes its v heads one after the other, whose dq^ and dk^ it adds up on chip: no atomics, one
// order. A token and v head costs about 6 KEYS VALUES + 2 SIDE (VALUES + 2 KEYS) FLOP on
// 4 VALUES + 2 KEYS VALUES / SIDE numbers: bound by memory.
//
// DTYPE; KEYS, VALUES: head_dims; SIDE; PARTS: warps that share 16 rows, each with KEY_WIDTH / PARTS columns; STAGES: slices of 32 values in shared memory;
// GROUPED: several v heads share a q/k head; ALIGNED: 16-byte copies can take all rows of q, k, v and dO.
#include "delta_blocks.cuh"
#include "stores.cuh"

constexpr int WARPS = BLOCKS * PARTS, THREADS = 32 * WARPS, MINE = KEY_WIDTH / PARTS, SQUARES = (BLOCKS + PARTS - 1) / PARTS;
constexpr int SLICE = 32, SLICES = (VALUES + SLICE - 1) / SLICE, STATE_BYTES = SLICE * KEY_WIDTH * SIZE, COLUMN_BYTES = SIDE * SLICE * SIZE;
constexpr int STAGE_BYTES = 4 * COLUMN_BYTES + 2 * STATE_BYTES, ACROSS = 2 * PARTS;  // threads of a row
constexpr bool HALF = Dtype<DTYPE>::half, PACKED = VALUES * SIZE % 16 == 0;
static_assert(MINE % 16 == 0, "a part is whole squares");

struct Params {
    const DTYPE *q, *k, *v, *d_o;
    const void *beta, *g, *gate;
    const DTYPE *states, *leaving, *updates, *errors;
    DTYPE *dq, *dk;
    void *dbeta, *dg, *dgate;
    const void* cu_seqlens;
    int64_t q_b, q_t, q_h, k_b, k_t, k_h, v_b, v_t, v_h, o_b, o_t, o_h, beta_b, beta_t, beta_h, g_b, g_t, g_h, gate_b, gate_t, gate_h;
    int heads, group, beta_wide, g_wide, gate_wide, cu_wide, sequences, tokens, slots, l2norm, given;
    float scale;
};

using ColumnTile = Tile<DTYPE, SLICE>;
using StateTile = Tile<DTYPE, KEY_WIDTH>;
using Sums = float[MINE / 8][4];

struct Stage {
    unsigned char* base;
    DEVICE ColumnTile arriving() const { return ColumnTile{base}; }
    DEVICE ColumnTile updates() const { return ColumnTile{base + COLUMN_BYTES}; }
    DEVICE ColumnTile errors() const { return ColumnTile{base + 2 * COLUMN_BYTES}; }
    DEVICE ColumnTile values() const { return ColumnTile{base + 3 * COLUMN_BYTES}; }
    DEVICE StateTile states() const { return StateTile{base + 4 * COLUMN_BYTES}; }
    DEVICE StateTile leaving() const { return StateTile{base + 4 * COLUMN_BYTES + STATE_BYTES}; }
};

// An operand in two parts of DTYPE, the second what rounding left out: dg is a small difference of sums over L's rows and columns, so both have to see the same L.
struct Parts {
    Pair<DTYPE> high[4], low[4];
    DEVICE void scale(float2 a, float2 b) {
#pragma unroll
        for (int i = 0; i < 4; i++) {
            const float2 x = Make<DTYPE>::floats(high[i]), rest = Make<DTYPE>::floats(low[i]), by = i < 2 ? a : b;
            const float first = by.x * (HALF ? x.x + rest.x : x.x), second = by.y * (HALF ? x.y + rest.y : x.y);
            high[i] = Make<DTYPE>::pair_of(first, second), low[i] = Make<DTYPE>::rest(first, second, high[i]);
        }
    }
    DEVICE void without_rest() {
#pragma unroll
        for (int i = 0; i < 4; i++) low[i] = Make<DTYPE>::zero();
    }
};

// sums += a b for MINE columns of a tile's rows from `row` on
DEVICE void add_rows(Sums& sums, const Pair<DTYPE> (&a)[4], const KeyTile& tile, int column, int row) {
#pragma unroll
    for (int n = 0; n < MINE / 16; n++) {
        Pair<DTYPE> b0, b1, b2, b3;
        tile.right_columns(b0, b1, b2, b3, column + 16 * n, row);
        Product<DTYPE>::add(sums[2 * n], a[0], a[1], a[2], a[3], b0, b1);
        Product<DTYPE>::add(sums[2 * n + 1], a[0], a[1], a[2], a[3], b2, b3);
    }
}

DEVICE void add_rows(Sums& sums, const Parts& a, const KeyTile& tile, int column, int row) {
#pragma unroll
    for (int n = 0; n < MINE / 16; n++) {
        Pair<DTYPE> b0, b1, b2, b3;
        tile.right_columns(b0, b1, b2, b3, column + 16 * n, row);
        if constexpr (HALF) {
            Product<DTYPE>::add(sums[2 * n], a.low[0], a.low[1], a.low[2], a.low[3], b0, b1);
            Product<DTYPE>::add(sums[2 * n + 1], a.low[0], a.low[1], a.low[2], a.low[3], b2, b3);
        }
        Product<DTYPE>::add(sums[2 * n], a.high[0], a.high[1], a.high[2], a.high[3], b0, b1);
        Product<DTYPE>::add(sums[2 * n + 1], a.high[0], a.high[1], a.high[2], a.high[3], b2, b3);
    }
}

// to `line` the sums over MINE columns of a tile's elements times these sums, for the warp's 16 rows
DEVICE void row_sums(float* line, const Sums& sums, const KeyTile& tile, int row, int column) {
    const int r = lane_id() / 4, c = lane_id() % 4;
    float first = 0.0f, second = 0.0f;
#pragma unroll
    for (int n = 0; n < MINE / 8; n++) {
        const float2 x = Make<DTYPE>::floats(*tile.pair_at(row, r, column + 8 * n + 2 * c)), y = Make<DTYPE>::floats(*tile.pair_at(row, r + 8, column + 8 * n + 2 * c));
        first += x.x * sums[n][0] + x.y * sums[n][1], second += y.x * sums[n][2] + y.y * sums[n][3];
    }
#pragma unroll
    for (int lanes = 1; lanes < 4; lanes *= 2) first += __shfl_xor_sync(0xffffffffu, first, lanes), second += __shfl_xor_sync(0xffffffffu, second, lanes);
    if (c == 0) line[row + r] = first, line[row + r + 8] = second;
}

// rows of a tile, each times its number
DEVICE void add_diagonal(Sums& sums, const KeyTile& tile, float first, float second, int row, int column) {
    const int r = lane_id() / 4, c = lane_id() % 4;
#pragma unroll
    for (int n = 0; n < MINE / 8; n++) {
        const float2 x = Make<DTYPE>::floats(*tile.pair_at(row, r, column + 8 * n + 2 * c)), y = Make<DTYPE>::floats(*tile.pair_at(row, r + 8, column + 8 * n + 2 * c));
        sums[n][0] += first * x.x, sums[n][1] += first * x.y, sums[n][2] += second * y.x, sums[n][3] += second * y.y;
    }
}

DEVICE void scale_rows(Sums& sums, float first, float second) {
#pragma unroll
    for (int n = 0; n < MINE / 8; n++) sums[n][0] *= first, sums[n][1] *= first, sums[n][2] *= second, sums[n][3] *= second;
}

// the sum of PARTS lines at a token
DEVICE float over_parts(const float* lines, int token) {
    float sum = 0.0f;
#pragma unroll
    for (int part = 0; part < PARTS; part++) sum += lines[part * SIDE + token];
    return sum;
}

// the inverse norms of a tile's rows, ACROSS threads a row
DEVICE void inverse_norms(float* norms, const KeyTile& tile) {
    const int row = threadIdx.x / ACROSS;
    float sum = 0.0f;
    for (int column = threadIdx.x % ACROSS * 2; column < KEY_WIDTH; column += 2 * ACROSS) {
        const float2 x = Make<DTYPE>::floats(*tile.pair_at(row, column));
        sum += x.x * x.x + x.y * x.y;
    }
#pragma unroll
    for (int lanes = 1; lanes < ACROSS; lanes *= 2) sum += __shfl_xor_sync(0xffffffffu, sum, lanes);
    if (threadIdx.x % ACROSS == 0) norms[row] = rsqrtf(sum + 1e-6f);
}

extern "C" __global__ void __launch_bounds__(THREADS, 1) delta_gradients(const __grid_constant__ Params p) {
    SHARED_MEMORY(memory);
    const KeyTile keys{memory}, queries{memory + KEY_BYTES};
    const Square scores{memory + 2 * KEY_BYTES}, links{memory + 2 * KEY_BYTES + SQUARE_BYTES}, rests{links.base + (HALF ? SQUARE_BYTES : 0)};
    unsigned char* const stages = rests.base + SQUARE_BYTES;
    Log* const logs = reinterpret_cast<Log*>(stages + STAGES * STAGE_BYTES);
    float *const beta = reinterpret_cast<float*>(logs + SIDE), *const through = beta + SIDE, *const key_norms = through + SIDE, *const query_norms = key_norms + SIDE;
    float *const direct = query_norms + SIDE, *const diagonal = direct + SIDE, *const told = diagonal + SIDE, *const past = told + PARTS * SIDE;
    float *const seen = past + PARTS * SIDE, *const taken = seen + PARTS * SIDE, *const gone = taken + PARTS * SIDE;
    float *const query_dots = gone + PARTS * SIDE, *const key_dots = query_dots + PARTS * SIDE, *const carried = key_dots + PARTS * SIDE;
    float* const sums = carried + WARPS;  // with GROUPED: of the v heads so far, dq^ and dk^ of every thread

    const int groups = p.heads / p.group, shared = blockIdx.x % groups, slot = blockIdx.x / groups;
    const int warp = threadIdx.x / 32, lane = lane_id(), r = lane / 4, c = lane % 4, t = threadIdx.x;
    const int block = warp % BLOCKS, part = warp / BLOCKS, row = 16 * block, column = part * MINE;
    const Chunk chunk = find_chunk(Grid{p.cu_seqlens, p.cu_wide, p.sequences, p.tokens, SIDE, 0, p.slots}, slot);
    if (chunk.length == 0) return;
    const int64_t first_row = chunk.batch * p.tokens + chunk.begin;
    const bool asks = p.dq || p.dgate || p.dg, erases = p.dk || p.dbeta || p.dg, writes = p.dk || p.dg;

    copy_rows<SIDE, THREADS, ALIGNED>(keys, p.k + chunk.batch * p.k_b + chunk.begin * p.k_t + shared * p.k_h, p.k_t, chunk.length, KEYS);
    copy_rows<SIDE, THREADS, ALIGNED>(queries, p.q + chunk.batch * p.q_b + chunk.begin * p.q_t + shared * p.q_h, p.q_t, chunk.length, KEYS);
    const auto load = [&](int step) {
        if (step < p.group * SLICES) {
            const int head = shared * p.group + step / SLICES, value = step % SLICES * SLICE, length = chunk.length;
            const int64_t u_t = static_cast<int64_t>(p.heads) * VALUES, at = first_row * u_t + head * VALUES + value;
            const int64_t state = ((static_cast<int64_t>(slot) * p.heads + head) * VALUES + value) * KEY_WIDTH;
            const Stage to{stages + step % STAGES * STAGE_BYTES};
            const DTYPE* d_o = p.d_o + chunk.batch * p.o_b + chunk.begin * p.o_t + head * p.o_h + value;
            copy_rows<SIDE, THREADS, ALIGNED>(to.arriving(), d_o, p.o_t, p.given ? length : 0, VALUES - value);
            copy_rows<SIDE, THREADS, PACKED>(to.updates(), p.updates + at, u_t, length, VALUES - value);
            copy_rows<SLICE, THREADS, true>(to.states(), p.states + state, KEY_WIDTH, VALUES - value, KEY_WIDTH);
            if (erases) copy_rows<SIDE, THREADS, PACKED>(to.errors(), p.errors + at, u_t, length, VALUES - value);
            if (p.dbeta) copy_rows<SIDE, THREADS, ALIGNED>(to.values(), p.v + chunk.batch * p.v_b + chunk.begin * p.v_t + head * p.v_h + value, p.v_t, length, VALUES - value);
            if (writes) copy_rows<SLICE, THREADS, true>(to.leaving(), p.leaving + state, KEY_WIDTH, VALUES - value, KEY_WIDTH);
        }
        cp_async_commit();
    };
    for (int step = 0; step < STAGES; step++) load(step);
    if (t < SIDE) key_norms[t] = query_norms[t] = 1.0f;

    const auto finish = [&](Sums& found, float* so_far, int member, DTYPE* to, const KeyTile& tile, const float* norms, float* line) {
        if constexpr (GROUPED) {
            float* const mine = so_far + t;
#pragma unroll
            for (int n = 0; n < MINE / 8; n++)
#pragma unroll
                for (int e = 0; e < 4; e++) {
                    if (member > 0) found[n][e] += mine[(4 * n + e) * THREADS];
                    if (member < p.group - 1) mine[(4 * n + e) * THREADS] = found[n][e];
                }
            if (member < p.group - 1) return;
        }
        const int i0 = row + r, i1 = i0 + 8;
        if (p.l2norm) {
            row_sums(line + part * SIDE, found, tile, row, column);
            __syncthreads();
            const float norm0 = norms[i0], norm1 = norms[i1], along0 = norm0 * norm0 * over_parts(line, i0), along1 = norm1 * norm1 * over_parts(line, i1);
#pragma unroll
            for (int n = 0; n < MINE / 8; n++) {
                const float2 x = Make<DTYPE>::floats(*tile.pair_at(row, r, column + 8 * n + 2 * c)), y = Make<DTYPE>::floats(*tile.pair_at(row, r + 8, column + 8 * n + 2 * c));
                found[n][0] = norm0 * (found[n][0] - along0 * x.x), found[n][1] = norm0 * (found[n][1] - along0 * x.y);
                found[n][2] = norm1 * (found[n][2] - along1 * y.x), found[n][3] = norm1 * (found[n][3] - along1 * y.y);
            }
        }
        DTYPE* const mine = to + ((first_row + i0) * groups + shared) * KEYS;
#pragma unroll
        for (int n = 0; n < MINE / 8; n++) {
            const int at = column + 8 * n + 2 * c;
            if (i0 < chunk.length) store_pair<KEYS % 2 == 0>(mine + at, found[n][0], found[n][1], KEYS - at);
            if (i1 < chunk.length) store_pair<KEYS % 2 == 0>(mine + static_cast<int64_t>(8) * groups * KEYS + at, found[n][2], found[n][3], KEYS - at);
        }
    };

#pragma unroll 1
    for (int member = 0; member < p.group; member++) {
        const int head = shared * p.group + member;
        if (warp == 0) running_log<DTYPE>(logs, SIDE, p.g, chunk.batch * p.g_b + chunk.begin * p.g_t + head * p.g_h, p.g_t, p.g_wide, chunk.length);
        if (t < SIDE) {
            const bool here = t < chunk.length;
            const int64_t token = chunk.begin + t;
            beta[t] = here ? load_gate<DTYPE>(p.beta, chunk.batch * p.beta_b + token * p.beta_t + head * p.beta_h, p.beta_wide) : 0.0f;
            through[t] = here && p.gate ? load_gate<DTYPE>(p.gate, chunk.batch * p.gate_b + token * p.gate_t + head * p.gate_h, p.gate_wide) : 1.0f;
        }
        Sums read = {}, lost = {}, right = {};
        float scored[SQUARES][2][4] = {}, bound[SQUARES][2][4] = {}, own = 0.0f, held = 0.0f;
#pragma unroll 1
        for (int slice = 0; slice < SLICES; slice++) {
            const int step = member * SLICES + slice;
            const Stage from{stages + step % STAGES * STAGE_BYTES};
            cp_async_wait<STAGES - 1>();
            __syncthreads();
            if (step == 0 && p.l2norm) {
                inverse_norms(key_norms, keys);
                inverse_norms(query_norms, queries);
            }
            const ColumnTile updates = from.updates();
#pragma unroll(STEPS_AT_ONCE<DTYPE>)
            for (int s = 0; s < SLICE / 16; s++) {
                Pair<DTYPE> o[4], x[4], u[4];
                if (asks || writes) from.arriving().rows(o[0], o[1], o[2], o[3], row, 16 * s);
                if (erases) from.errors().rows(x[0], x[1], x[2], x[3], row, 16 * s);
#pragma unroll
                for (int n = 0; n < MINE / 16; n++) {
                    Pair<DTYPE> b0, b1, b2, b3;
                    from.states().right_columns(b0, b1, b2, b3, column + 16 * n, 16 * s);
                    if (asks) {
                        Product<DTYPE>::add(read[2 * n], o[0], o[1], o[2], o[3], b0, b1);
                        Product<DTYPE>::add(read[2 * n + 1], o[0], o[1], o[2], o[3], b2, b3);
                    }
                    if (erases) {
                        Product<DTYPE>::add(lost[2 * n], x[0], x[1], x[2], x[3], b0, b1);
                        Product<DTYPE>::add(lost[2 * n + 1], x[0], x[1], x[2], x[3], b2, b3);
                    }
                }
                if (writes) {
                    updates.rows(u[0], u[1], u[2], u[3], row, 16 * s);
                    add_rows(right, u, from.leaving(), column, 16 * s);
                }
#pragma unroll
                for (int i = 0; i < SQUARES; i++) {
                    const int at = part + PARTS * i;
                    if (at > block) break;
                    Pair<DTYPE> b0, b1, b2, b3;
                    updates.right_rows(b0, b1, b2, b3, 16 * at, 16 * s);
                    if (asks || writes) {
                        Product<DTYPE>::add(scored[i][0], o[0], o[1], o[2], o[3], b0, b1);
                        Product<DTYPE>::add(scored[i][1], o[0], o[1], o[2], o[3], b2, b3);
                    }
                    if (erases) {
                        Product<DTYPE>::add(bound[i][0], x[0], x[1], x[2], x[3], b0, b1);
                        Product<DTYPE>::add(bound[i][1], x[0], x[1], x[2], x[3], b2, b3);
                    }
                }
            }
            if (p.dbeta) {
#pragma unroll
                for (int at = 0; at < SLICE / ACROSS; at += 2) {
                    const int value = t % ACROSS * (SLICE / ACROSS) + at;
                    const float2 given = Make<DTYPE>::floats(*from.values().pair_at(t / ACROSS, value)), x = Make<DTYPE>::floats(*from.errors().pair_at(t / ACROSS, value));
                    own += given.x * x.x + given.y * x.y;
                }
            }
            if (p.dg) {  // both tiles mix their pieces alike
                for (int i = t; i < SLICE * StateTile::PIECES; i += THREADS) {
                    const Pair<DTYPE>*s = reinterpret_cast<const Pair<DTYPE>*>(from.states().base + 16 * i), *e = reinterpret_cast<const Pair<DTYPE>*>(from.leaving().base + 16 * i);
#pragma unroll
                    for (int j = 0; j < PIECE / 2; j++) {
                        const float2 x = Make<DTYPE>::floats(s[j]), y = Make<DTYPE>::floats(e[j]);
                        held += x.x * y.x + x.y * y.y;
                    }
                }
            }
            __syncthreads();
            load(step + STAGES);
        }

        // P' and L, for all warps
        const int i0 = row + r, i1 = i0 + 8;
        const Log last = logs[SIDE - 1], row_logs[2] = {logs[i0], logs[i1]};
#pragma unroll
        for (int i = 0; i < SQUARES; i++) {
            const int at = part + PARTS * i;
            if (at > block) break;
#pragma unroll
            for (int n = 0; n < 2; n++)
#pragma unroll
                for (int half = 0; half < 2; half++) {
                    const int token = half ? i1 : i0, first = 16 * at + 8 * n + 2 * c;
                    float x[2], y[2];
#pragma unroll
                    for (int e = 0; e < 2; e++) {
                        const float between = exp_between(row_logs[half], logs[first + e]);  // above the diagonal perhaps infinite, and not taken
                        x[e] = first + e < token ? p.scale * between * scored[i][n][2 * half + e] : 0.0f;
                        if (first + e == token) diagonal[token] = p.scale * scored[i][n][2 * half + e];
                        y[e] = first + e < token ? -between * bound[i][n][2 * half + e] : 0.0f;
                    }
                    if (asks || writes) *scores.pair_at(token, first) = Make<DTYPE>::pair_of(x[0], x[1]);
                    if (erases) {
                        const Pair<DTYPE> link = Make<DTYPE>::pair_of(y[0], y[1]);
                        *links.pair_at(token, first) = link;
                        if constexpr (HALF) *rests.pair_at(token, first) = Make<DTYPE>::rest(y[0], y[1], link);
                    }
                }
        }
        if (p.dbeta) {
#pragma unroll
            for (int lanes = 1; lanes < ACROSS; lanes *= 2) own += __shfl_xor_sync(0xffffffffu, own, lanes);
            if (t % ACROSS == 0) direct[t / ACROSS] = own;
        }
        if (p.dg) {
            held = warp_sum(held);
            if (lane == 0) carried[warp] = held;
        }
        __syncthreads();

        const float decay0 = exp_log(logs[i0]), decay1 = exp_log(logs[i1]);
        if (asks) {
            scale_rows(read, p.scale * decay0, p.scale * decay1);
#pragma unroll 1
            for (int j = 0; j <= block; j++) {
                Parts a;
                scores.rows(a.high[0], a.high[1], a.high[2], a.high[3], row, 16 * j);
                if (p.l2norm) {
                    a.without_rest();
                    a.scale(two(key_norms + 16 * j + 2 * c), two(key_norms + 16 * j + 8 + 2 * c));
                    add_rows(read, a, keys, column, 16 * j);
                } else {
                    add_rows(read, a.high, keys, column, 16 * j);
                }
            }
            if (p.dg) row_sums(past + part * SIDE, read, queries, row, column);
            if (p.dq || p.dgate) add_diagonal(read, keys, diagonal[i0] * key_norms[i0], diagonal[i1] * key_norms[i1], row, column);
            if (p.dgate) row_sums(told + part * SIDE, read, queries, row, column);
            if (p.dq) {
                scale_rows(read, through[i0], through[i1]);
                finish(read, sums, member, p.dq, queries, query_norms, query_dots);
            }
        }
        if (erases) {
            scale_rows(lost, -decay0, -decay1);
#pragma unroll 1
            for (int j = 0; j <= block; j++) {
                Parts a;
                links.rows(a.high[0], a.high[1], a.high[2], a.high[3], row, 16 * j);
                if constexpr (HALF) rests.rows(a.low[0], a.low[1], a.low[2], a.low[3], row, 16 * j);
                if (p.l2norm) a.scale(two(key_norms + 16 * j + 2 * c), two(key_norms + 16 * j + 8 + 2 * c));
                add_rows(lost, a, keys, column, 16 * j);
            }
            if (p.dbeta || p.dg) row_sums(seen + part * SIDE, lost, keys, row, column);
        }
        if (writes) {
            scale_rows(right, exp_between(last, logs[i0]), exp_between(last, logs[i1]));
            if (p.dg) row_sums(gone + part * SIDE, right, keys, row, column);
            Sums within = {};  // not of E: float32 keeps it apart
            Sums& inner = HALF ? right : within;
#pragma unroll 1
            for (int i = block; i < BLOCKS; i++) {
                const int at = 16 * i + 2 * c;
                Parts a;
                scores.columns(a.high[0], a.high[1], a.high[2], a.high[3], row, 16 * i);
                if (p.l2norm || p.gate) {
                    a.without_rest();
                    const float2 gate0 = two(through + at), gate1 = two(through + at + 8), norm0 = two(query_norms + at), norm1 = two(query_norms + at + 8);
                    a.scale(make_float2(gate0.x * norm0.x, gate0.y * norm0.y), make_float2(gate1.x * norm1.x, gate1.y * norm1.y));
                    add_rows(inner, a, queries, column, 16 * i);
                } else {
                    add_rows(inner, a.high, queries, column, 16 * i);
                }
                links.columns(a.high[0], a.high[1], a.high[2], a.high[3], row, 16 * i);
                if constexpr (HALF) rests.columns(a.low[0], a.low[1], a.low[2], a.low[3], row, 16 * i);
                const float2 beta0 = two(beta + at), beta1 = two(beta + at + 8), norm0 = two(key_norms + at), norm1 = two(key_norms + at + 8);
                a.scale(make_float2(beta0.x * norm0.x, beta0.y * norm0.y), make_float2(beta1.x * norm1.x, beta1.y * norm1.y));
                add_rows(inner, a, keys, column, 16 * i);
            }
            if (p.dg) row_sums(taken + part * SIDE, inner, keys, row, column);
            if (p.dk) {
                const float first = beta[i0], second = beta[i1];
                add_diagonal(right, queries, diagonal[i0] * through[i0] * query_norms[i0], diagonal[i1] * through[i1] * query_norms[i1], row, column);
                if constexpr (!HALF) {
#pragma unroll
                    for (int n = 0; n < MINE / 8; n++)
#pragma unroll
                        for (int e = 0; e < 4; e++) right[n][e] += within[n][e];
                }
#pragma unroll
                for (int n = 0; n < MINE / 8; n++)
                    right[n][0] += first * lost[n][0], right[n][1] += first * lost[n][1], right[n][2] += second * lost[n][2], right[n][3] += second * lost[n][3];
                finish(right, sums + THREADS * (MINE / 2), member, p.dk, keys, key_norms, key_dots);
            }
        }
        __syncthreads();
        if (warp == 0 && (p.dbeta || p.dg || p.dgate)) {  // the vectors, from the block's end on
            float behind = 0.0f;
            if (p.dg) {
                for (int i = 0; i < WARPS; i++) behind += carried[i];
                behind *= exp_log(last);
                float so_far = 0.0f;  // of what leaves with E, up to the token before
#pragma unroll 1
                for (int base = 0; base < SIDE; base += 32) {
                    const int token = base + lane;
                    const bool here = token < chunk.length;
                    const float leaves = here ? over_parts(gone, token) : 0.0f, weight = here ? key_norms[token] : 0.0f;
                    float sum = weight * leaves;
#pragma unroll
                    for (int lanes = 1; lanes < 32; lanes *= 2) {
                        const float before = __shfl_up_sync(0xffffffffu, sum, lanes);
                        if (lane >= lanes) sum += before;
                    }
                    const float earlier = __shfl_up_sync(0xffffffffu, sum, 1);
                    if (here) {
                        if (HALF) taken[token] -= leaves;  // which it holds
                        gone[token] = so_far + (lane ? earlier : 0.0f);
                    }
                    so_far += __shfl_sync(0xffffffffu, sum, 31);
                }
            }
#pragma unroll 1
            for (int base = (SIDE - 1) / 32 * 32; base >= 0; base -= 32) {
                const int token = base + lane;
                const bool here = token < chunk.length;  // and so below SIDE
                const int64_t at = (first_row + token) * p.heads + head;
                float steep = 0.0f;
                if (here) {
                    const float erased = p.dbeta || p.dg ? key_norms[token] * over_parts(seen, token) : 0.0f;
                    if (p.dgate) store_gate<DTYPE>(p.dgate, at, p.gate_wide, query_norms[token] * over_parts(told, token));
                    if (p.dbeta) store_gate<DTYPE>(p.dbeta, at, p.beta_wide, direct[token] + erased);
                    if (p.dg) steep = through[token] * query_norms[token] * over_parts(past, token) + beta[token] * erased - key_norms[token] * over_parts(taken, token);
                }
#pragma unroll
                for (int lanes = 1; lanes < 32; lanes *= 2) {
                    const float after = __shfl_down_sync(0xffffffffu, steep, lanes);
                    if (lane + lanes < 32) steep += after;
                }
                if (here && p.dg) store_gate<DTYPE>(p.dg, at, p.g_wide, steep + behind + gone[token]);
                behind += __shfl_sync(0xffffffffu, steep, 0);
            }
        }
        __syncthreads();
    }
}
