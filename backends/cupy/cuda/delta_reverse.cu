// The serial part of the delta rule's backward: the gradient E of the state in registers, from the last block of SIDE tokens to the first (SPEC.md 10).
//
//   dU = P^T dO + write (K E)      X = A'^T dU      dV = weight X      E <- total E + Q^T (read dO) - K^T (lost X)        (factors: delta_prepare.cu)
//
// Warps have the parts that they have in delta_walk.cu: a walker owns 16 value columns of E, transposed, and every product's operand comes from its registers; followers
// keep what the gradients of the inputs are made of: the E that leaves every block, rounded, X, and dV. X is kept as it was rounded: all that is made of it agrees.
// A token and head costs 6 KEYS + 4 SIDE FLOP a value column; the chain of K E, A'^T dU and K^T X binds for few heads, memory for many.
//
// DTYPE; KEYS, VALUES: head_dims; SIDE; WALKERS: 1, 2 or 4; DEPTH: blocks in shared memory, 2 or more; ALIGNED: 16-byte copies can take all rows.
#include "delta_roles.cuh"

struct Params {
    const DTYPE *q, *k, *d_o, *inverses, *scores;
    const float *lines, *d_final;
    DTYPE *leaving, *errors, *d_v;
    float* d_initial;
    const void* cu_seqlens;
    int64_t q_b, q_t, q_h, k_b, k_t, k_h, o_b, o_t, o_h;
    int heads, group, cu_wide, tokens, slots, given;  // given: a gradient of o arrives
};

constexpr int AHEAD_BYTES = 2 * KEY_BYTES + 2 * SQUARE_BYTES + LINES_BYTES + COLUMN_BYTES, HANDED_BYTES = STATE_BYTES + 2 * COLUMN_BYTES;

// what a block's tiles are
struct Ahead {
    unsigned char* base;
    DEVICE KeyTile keys() const { return KeyTile{base}; }
    DEVICE KeyTile queries() const { return KeyTile{base + KEY_BYTES}; }
    DEVICE Square inverse() const { return Square{base + 2 * KEY_BYTES}; }
    DEVICE Square scores() const { return Square{base + 2 * KEY_BYTES + SQUARE_BYTES}; }
    DEVICE float* lines() const { return reinterpret_cast<float*>(base + 2 * KEY_BYTES + 2 * SQUARE_BYTES); }
    DEVICE ColumnTile arriving() const { return ColumnTile{base + 2 * KEY_BYTES + 2 * SQUARE_BYTES + LINES_BYTES}; }
};

// x^T += y^T square for the lower squares: x_j gets what all rows i >= j of the square hold
DEVICE void times_square(float (&x)[2 * BLOCKS][4], const Pair<DTYPE> (&y)[BLOCKS][4], const Square& square) {
#pragma unroll
    for (int i = 0; i < BLOCKS; i++)
#pragma unroll
        for (int j = 0; j <= i; j++) {
            Pair<DTYPE> b0, b1, b2, b3;
            square.right_columns(b0, b1, b2, b3, 16 * j, 16 * i);
            Product<DTYPE>::add(x[2 * j], y[i][0], y[i][1], y[i][2], y[i][3], b0, b1);
            Product<DTYPE>::add(x[2 * j + 1], y[i][0], y[i][1], y[i][2], y[i][3], b2, b3);
        }
}

extern "C" __global__ void __launch_bounds__(THREADS, 1) delta_reverse(const __grid_constant__ Params p) {
    SHARED_MEMORY(memory);
    const int slice = blockIdx.x % SLICES, stream = blockIdx.x / SLICES, head = stream % p.heads, sequence = stream / p.heads;
    const int warp = threadIdx.x / 32, lane = lane_id(), c = lane % 4, column = slice * COLUMNS;
    const Blocked here = find_sequence(Grid{p.cu_seqlens, p.cu_wide, 0, p.tokens, SIDE, 0, p.slots}, sequence);
    const DTYPE* k = p.k + here.batch * p.k_b + here.start * p.k_t + head / p.group * p.k_h;
    const DTYPE* q = p.q + here.batch * p.q_b + here.start * p.q_t + head / p.group * p.q_h;
    const DTYPE* d_o = p.d_o + here.batch * p.o_b + here.start * p.o_t + head * p.o_h + column;
    unsigned char* const handed = memory + DEPTH * AHEAD_BYTES;
    const auto place_of = [&](int block) { return static_cast<int64_t>(here.first_slot + block) * p.heads + head; };
    const auto length_of = [&](int block) { return static_cast<int>(min(static_cast<long long>(SIDE), static_cast<long long>(here.count - static_cast<int64_t>(block) * SIDE))); };
    const int part = walker_of(warp), follower = follower_of(warp);

    const auto load = [&](int step) {
        const int block = here.blocks - 1 - step;
        if (block >= 0) {
            const Ahead to{memory + step % DEPTH * AHEAD_BYTES};
            const int64_t at = static_cast<int64_t>(block) * SIDE;
            const int length = length_of(block);
            copy_rows<SIDE, 32 * LOADERS, ALIGNED>(to.keys(), k + at * p.k_t, p.k_t, length, KEYS);
            copy_rows<SIDE, 32 * LOADERS, ALIGNED>(to.queries(), q + at * p.q_t, p.q_t, length, KEYS);
            load_square<32 * LOADERS>(to.inverse(), p.inverses + place_of(block) * (SIDE * SIDE));
            load_square<32 * LOADERS>(to.scores(), p.scores + place_of(block) * (SIDE * SIDE));
            load_lines<32 * LOADERS>(to.lines(), p.lines + place_of(block) * LINES);
            copy_rows<SIDE, 32 * LOADERS, ALIGNED>(to.arriving(), d_o + at * p.o_t, p.o_t, p.given ? length : 0, VALUES - column);
        }
        cp_async_commit();
    };

    float state[2 * KEY_STEPS][4];
    if (part >= 0) read_state(state, p.d_final, (static_cast<int64_t>(sequence) * p.heads + head) * (KEYS * VALUES), column + 16 * part);
    if (warp < LOADERS) {
        for (int step = 0; step < DEPTH - 1; step++) load(step);
        cp_async_wait<DEPTH - 2>();
    }
    __syncthreads();

#pragma unroll 1
    for (int step = 0; step <= here.blocks; step++) {
        unsigned char* const mine = handed + step % 2 * HANDED_BYTES;
        if (part >= 0 && step < here.blocks) {
            const Ahead block{memory + step % DEPTH * AHEAD_BYTES};
            const float* const lines = block.lines();
            const StateTile leaving{mine};
            const ColumnTile errors{mine + STATE_BYTES}, gradients{mine + STATE_BYTES + COLUMN_BYTES}, arriving = block.arriving();
            Pair<DTYPE> given[BLOCKS][4], change[BLOCKS][4];
            {
                Pair<DTYPE> rounded_state[KEY_STEPS][4];
                round_state(rounded_state, state);
                if (p.leaving) put_state(leaving, 16 * part, rounded_state);
                float x[2 * BLOCKS][4] = {};
                times_rows(x, rounded_state, block.keys());
#pragma unroll
                for (int n = 0; n < 2 * BLOCKS; n++) {
                    const float2 write = two(lines + WRITE + 8 * n + 2 * c);
                    x[n][0] *= write.x, x[n][1] *= write.y, x[n][2] *= write.x, x[n][3] *= write.y;
                }
#pragma unroll
                for (int i = 0; i < BLOCKS; i++) arriving.columns(given[i][0], given[i][1], given[i][2], given[i][3], 16 * part, 16 * i);
                times_square(x, given, block.scores());
#pragma unroll
                for (int i = 0; i < BLOCKS; i++) as_operand<DTYPE>(change[i], x[2 * i], x[2 * i + 1]);
            }
            float error[2 * BLOCKS][4] = {};
            times_square(error, change, block.inverse());
            if (p.errors) {
#pragma unroll
                for (int n = 0; n < 2 * BLOCKS; n++)
#pragma unroll
                    for (int e = 0; e < 2; e++) put_turned(errors, 8 * n, 16 * part + 8 * e, error[n][2 * e], error[n][2 * e + 1]);
            }
            if (p.d_v) {
#pragma unroll
                for (int n = 0; n < 2 * BLOCKS; n++) {
                    const float2 weight = two(lines + WEIGHT + 8 * n + 2 * c);
#pragma unroll
                    for (int e = 0; e < 2; e++) put_turned(gradients, 8 * n, 16 * part + 8 * e, weight.x * error[n][2 * e], weight.y * error[n][2 * e + 1]);
                }
            }
#pragma unroll
            for (int n = 0; n < 2 * BLOCKS; n++) {
                const float2 lost = two(lines + LOST + 8 * n + 2 * c);
                error[n][0] *= -lost.x, error[n][1] *= -lost.y, error[n][2] *= -lost.x, error[n][3] *= -lost.y;
            }
#pragma unroll
            for (int i = 0; i < BLOCKS; i++) {
                as_operand<DTYPE>(change[i], error[2 * i], error[2 * i + 1]);
                scale_pairs(given[i], two(lines + READ + 16 * i + 2 * c), two(lines + READ + 16 * i + 8 + 2 * c));
            }
            const float total = lines[TOTAL];
#pragma unroll
            for (int n = 0; n < 2 * KEY_STEPS; n++)
#pragma unroll
                for (int e = 0; e < 4; e++) state[n][e] *= total;
            add_columns(state, given, block.queries());
            add_columns(state, change, block.keys());
        }
        if (warp < LOADERS) load(step + DEPTH - 1);
        if (follower >= 0 && step > 0) {
            const int done = here.blocks - step, length = length_of(done), thread = follower * 32 + lane;
            unsigned char* const from = handed + (step - 1) % 2 * HANDED_BYTES;
            const int64_t token = here.batch * p.tokens + here.start + static_cast<int64_t>(done) * SIDE, stride = static_cast<int64_t>(p.heads) * VALUES;
            const int64_t at = token * stride + head * VALUES + column;
            if (p.leaving) keep_state(StateTile{from}, p.leaving + place_of(done) * (VALUES * KEY_WIDTH), column, thread);
            if (p.errors) store_rows<COLUMNS>(ColumnTile{from + STATE_BYTES}, 0, SIDE, p.errors + at, stride, length, VALUES - column, thread, 32 * FOLLOWERS);
            if (p.d_v) store_rows<COLUMNS>(ColumnTile{from + STATE_BYTES + COLUMN_BYTES}, 0, SIDE, p.d_v + at, stride, length, VALUES - column, thread, 32 * FOLLOWERS);
        }
        if (warp < LOADERS) cp_async_wait<DEPTH - 2>();
        __syncthreads();
    }
    if (part >= 0 && p.d_initial) write_state(p.d_initial, (static_cast<int64_t>(sequence) * p.heads + head) * (KEYS * VALUES), column + 16 * part, state);
}
