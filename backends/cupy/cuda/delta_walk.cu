// The serial part of the exact gated delta rule over blocks of SIDE tokens: the state in registers from the first block to the last (SPEC.md 4).
//
//   X = weight V - lost (K S)      U = A' X      S <- total S + K^T (write U)      o = read (Q S) + P U        (factors: delta_prepare.cu)
//
// A warp that walks owns 16 value columns of a state, transposed: what mma.sync leaves of S^T, X^T and U^T is the next product's operand after rounding, so that
// a walker meets nobody inside a block of tokens; it hands the rounded state and U on through shared memory. Other warps follow one block behind: they compute
// the outputs, or keep states and U for a backward; loaders copy ahead. All meet once a block.
// A token and head costs (6 KEYS + 3 SIDE) FLOP a value column, 4 KEYS + 1.25 SIDE of them in the walkers' chain. H100, bf16, 1 x 8192, 16/32 heads of 128: 0.25 GB
// from memory, 75 us; 128 blocks of tokens one after the other, each 148 products of 16 x 8 x 16 in a walker, about 900 cycles: 65 us. Every slice of columns reads q,
// k and the factors again, 0.8 GB with two walkers from the second-level cache, half of it with four.
//
// DTYPE; KEYS, VALUES: head_dims; SIDE; WALKERS: 1, 2 or 4; DEPTH: blocks in shared memory, 2 or more; OUTPUTS: o is computed; KEEPS: states and U are kept;
// ALIGNED: 16-byte copies can take all rows.
#include "delta_roles.cuh"

struct Params {
    const DTYPE *q, *k, *v, *inverses, *scores;
    const float *lines, *initial;
    DTYPE *o, *states, *updates;
    float* final;
    const void* cu_seqlens;
    int64_t q_b, q_t, q_h, k_b, k_t, k_h, v_b, v_t, v_h;
    int heads, group, cu_wide, tokens, slots;
};

// what walkers read of a block, and what those behind them read
constexpr int AHEAD_BYTES = KEY_BYTES + COLUMN_BYTES + SQUARE_BYTES + LINES_BYTES, BEHIND_BYTES = OUTPUTS ? KEY_BYTES + SQUARE_BYTES + LINES_BYTES : 0;
constexpr int HANDED_BYTES = STATE_BYTES + COLUMN_BYTES;

extern "C" __global__ void __launch_bounds__(THREADS, 1) delta_walk(const __grid_constant__ Params p) {
    SHARED_MEMORY(memory);
    const int slice = blockIdx.x % SLICES, stream = blockIdx.x / SLICES, head = stream % p.heads, sequence = stream / p.heads;
    const int warp = threadIdx.x / 32, lane = lane_id(), r = lane / 4, c = lane % 4, column = slice * COLUMNS;
    const Blocked here = find_sequence(Grid{p.cu_seqlens, p.cu_wide, 0, p.tokens, SIDE, 0, p.slots}, sequence);
    const DTYPE* k = p.k + here.batch * p.k_b + here.start * p.k_t + head / p.group * p.k_h;
    const DTYPE* q = p.q + here.batch * p.q_b + here.start * p.q_t + head / p.group * p.q_h;
    const DTYPE* v = p.v + here.batch * p.v_b + here.start * p.v_t + head * p.v_h + column;
    unsigned char *const behind = memory + DEPTH * AHEAD_BYTES, *const handed = behind + DEPTH * BEHIND_BYTES;
    const auto place_of = [&](int block) { return static_cast<int64_t>(here.first_slot + block) * p.heads + head; };
    const auto length_of = [&](int block) { return static_cast<int>(min(static_cast<long long>(SIDE), static_cast<long long>(here.count - static_cast<int64_t>(block) * SIDE))); };
    const int part = walker_of(warp), follower = follower_of(warp);

    const auto load = [&](int block) {  // one block further behind than ahead
        if (block >= 0 && block < here.blocks) {
            unsigned char* const base = memory + block % DEPTH * AHEAD_BYTES;
            const int64_t at = static_cast<int64_t>(block) * SIDE;
            copy_rows<SIDE, 32 * LOADERS, ALIGNED>(KeyTile{base}, k + at * p.k_t, p.k_t, length_of(block), KEYS);
            load_square<32 * LOADERS>(Square{base + KEY_BYTES}, p.inverses + place_of(block) * (SIDE * SIDE));
            load_lines<32 * LOADERS>(reinterpret_cast<float*>(base + KEY_BYTES + SQUARE_BYTES), p.lines + place_of(block) * LINES);
            copy_rows<SIDE, 32 * LOADERS, ALIGNED>(ColumnTile{base + KEY_BYTES + SQUARE_BYTES + LINES_BYTES}, v + at * p.v_t, p.v_t, length_of(block), VALUES - column);
        }
        block--;
        if (OUTPUTS && block >= 0 && block < here.blocks) {
            unsigned char* const base = behind + block % DEPTH * BEHIND_BYTES;
            copy_rows<SIDE, 32 * LOADERS, ALIGNED>(KeyTile{base}, q + static_cast<int64_t>(block) * SIDE * p.q_t, p.q_t, length_of(block), KEYS);
            load_square<32 * LOADERS>(Square{base + KEY_BYTES}, p.scores + place_of(block) * (SIDE * SIDE));
            load_lines<32 * LOADERS>(reinterpret_cast<float*>(base + KEY_BYTES + SQUARE_BYTES), p.lines + place_of(block) * LINES);
        }
        cp_async_commit();
    };

    float state[2 * KEY_STEPS][4];
    if (part >= 0) read_state(state, p.initial, (static_cast<int64_t>(sequence) * p.heads + head) * (KEYS * VALUES), column + 16 * part);
    if (warp < LOADERS) {
        for (int block = 0; block < DEPTH - 1; block++) load(block);
        cp_async_wait<DEPTH - 2>();
    }
    __syncthreads();

#pragma unroll 1
    for (int block = 0; block <= here.blocks; block++) {
        unsigned char *const base = memory + block % DEPTH * AHEAD_BYTES, *const mine = handed + block % 2 * HANDED_BYTES;
        if (part >= 0 && block < here.blocks) {
            const KeyTile keys{base};
            const Square inverse{base + KEY_BYTES};
            const float* const lines = reinterpret_cast<const float*>(base + KEY_BYTES + SQUARE_BYTES);
            const ColumnTile values{base + KEY_BYTES + SQUARE_BYTES + LINES_BYTES}, updates{mine + STATE_BYTES};
            const StateTile states{mine};
            Pair<DTYPE> error[BLOCKS][4];
            {
                Pair<DTYPE> rounded_state[KEY_STEPS][4];
                round_state(rounded_state, state);
                put_state(states, 16 * part, rounded_state);
                float x[2 * BLOCKS][4] = {};
                times_rows(x, rounded_state, keys);
#pragma unroll
                for (int i = 0; i < BLOCKS; i++) {
                    Pair<DTYPE> given[4];
                    values.columns(given[0], given[1], given[2], given[3], 16 * part, 16 * i);
#pragma unroll
                    for (int half = 0; half < 2; half++) {
                        const int at = 16 * i + 8 * half + 2 * c;
                        const float2 weight = two(lines + WEIGHT + at), lost = two(lines + LOST + at);
#pragma unroll
                        for (int e = 0; e < 2; e++) {
                            const float2 own = Make<DTYPE>::floats(given[2 * half + e]);
                            float &first = x[2 * i + half][2 * e], &second = x[2 * i + half][2 * e + 1];
                            first = weight.x * own.x - lost.x * first, second = weight.y * own.y - lost.y * second;
                        }
                    }
                    as_operand<DTYPE>(error[i], x[2 * i], x[2 * i + 1]);
                }
            }
            float u[2 * BLOCKS][4] = {};
#pragma unroll
            for (int j = 0; j < BLOCKS; j++)
#pragma unroll
                for (int i = j; i < BLOCKS; i++) {
                    Pair<DTYPE> b0, b1, b2, b3;
                    inverse.right_rows(b0, b1, b2, b3, 16 * i, 16 * j);
                    Product<DTYPE>::add(u[2 * i], error[j][0], error[j][1], error[j][2], error[j][3], b0, b1);
                    Product<DTYPE>::add(u[2 * i + 1], error[j][0], error[j][1], error[j][2], error[j][3], b2, b3);
                }
            const float total = lines[TOTAL];
#pragma unroll
            for (int n = 0; n < 2 * KEY_STEPS; n++)
#pragma unroll
                for (int e = 0; e < 4; e++) state[n][e] *= total;
#pragma unroll
            for (int i = 0; i < BLOCKS; i++) {
#pragma unroll
                for (int half = 0; half < 2; half++) {
                    float(&x)[4] = u[2 * i + half];
                    put_turned(updates, 16 * i + 8 * half, 16 * part, x[0], x[1]);
                    put_turned(updates, 16 * i + 8 * half, 16 * part + 8, x[2], x[3]);
                    const float2 write = two(lines + WRITE + 16 * i + 8 * half + 2 * c);
                    x[0] *= write.x, x[1] *= write.y, x[2] *= write.x, x[3] *= write.y;
                }
                as_operand<DTYPE>(error[i], u[2 * i], u[2 * i + 1]);
            }
            add_columns(state, error, keys);
        }
        if (warp < LOADERS) load(block + DEPTH - 1);
        if (follower >= 0 && block > 0) {
            const int done = block - 1, length = length_of(done);
            unsigned char* const given = handed + done % 2 * HANDED_BYTES;
            const StateTile states{given};
            const ColumnTile updates{given + STATE_BYTES};
            if constexpr (OUTPUTS) {
                unsigned char* const own = behind + done % DEPTH * BEHIND_BYTES;
                const KeyTile queries{own};
                const Square scores{own + KEY_BYTES};
                const float* const read = reinterpret_cast<const float*>(own + KEY_BYTES + SQUARE_BYTES) + READ;
                const int64_t token = here.batch * p.tokens + here.start + static_cast<int64_t>(done) * SIDE, o_t = static_cast<int64_t>(p.heads) * VALUES;
                DTYPE* const o = p.o + token * o_t + head * VALUES + column;
#pragma unroll 1
                for (int i = follower; i < BLOCKS; i += FOLLOWERS) {
                    if (16 * i >= length) break;
                    float out[COLUMNS / 8][4] = {};
#pragma unroll(STEPS_AT_ONCE<DTYPE>)
                    for (int s = 0; s < KEY_STEPS; s++) {
                        Pair<DTYPE> a[4], b[4];
                        queries.rows(a[0], a[1], a[2], a[3], 16 * i, 16 * s);
#pragma unroll
                        for (int n = 0; n < COLUMNS / 16; n++) {
                            states.right_rows(b[0], b[1], b[2], b[3], 16 * n, 16 * s);
                            Product<DTYPE>::add(out[2 * n], a[0], a[1], a[2], a[3], b[0], b[1]);
                            Product<DTYPE>::add(out[2 * n + 1], a[0], a[1], a[2], a[3], b[2], b[3]);
                        }
                    }
                    const float first = read[16 * i + r], second = read[16 * i + 8 + r];
#pragma unroll
                    for (int n = 0; n < COLUMNS / 8; n++) out[n][0] *= first, out[n][1] *= first, out[n][2] *= second, out[n][3] *= second;
#pragma unroll 1
                    for (int j = 0; j <= i; j++) {
                        Pair<DTYPE> a[4], b[4];
                        scores.rows(a[0], a[1], a[2], a[3], 16 * i, 16 * j);
#pragma unroll
                        for (int n = 0; n < COLUMNS / 16; n++) {
                            updates.right_columns(b[0], b[1], b[2], b[3], 16 * n, 16 * j);
                            Product<DTYPE>::add(out[2 * n], a[0], a[1], a[2], a[3], b[0], b[1]);
                            Product<DTYPE>::add(out[2 * n + 1], a[0], a[1], a[2], a[3], b[2], b[3]);
                        }
                    }
                    __syncwarp();  // these rows of q are nobody else's: o takes their place on its way out
#pragma unroll
                    for (int n = 0; n < COLUMNS / 8; n++) {
                        *queries.pair_at(16 * i, r, 8 * n + 2 * c) = Make<DTYPE>::pair_of(out[n][0], out[n][1]);
                        *queries.pair_at(16 * i, r + 8, 8 * n + 2 * c) = Make<DTYPE>::pair_of(out[n][2], out[n][3]);
                    }
                    __syncwarp();
                    store_rows<COLUMNS>(queries, 16 * i, 16, o, o_t, length, VALUES - column, lane, 32);
                }
            }
            if constexpr (KEEPS) {
                const int thread = follower * 32 + lane;
                if (p.states) keep_state(states, p.states + place_of(done) * (VALUES * KEY_WIDTH), column, thread);
                if (p.updates) {
                    const int64_t token = here.batch * p.tokens + here.start + static_cast<int64_t>(done) * SIDE, u_t = static_cast<int64_t>(p.heads) * VALUES;
                    store_rows<COLUMNS>(updates, 0, SIDE, p.updates + token * u_t + head * VALUES + column, u_t, length, VALUES - column, thread, 32 * FOLLOWERS);
                }
            }
        }
        if (warp < LOADERS) cp_async_wait<DEPTH - 2>();
        __syncthreads();
    }
    if (part >= 0 && p.final) write_state(p.final, (static_cast<int64_t>(sequence) * p.heads + head) * (KEYS * VALUES), column + 16 * part, state);
}
