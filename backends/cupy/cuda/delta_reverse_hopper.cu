// What delta_reverse.cu computes, with its formulas, on Hopper for heads of 128 keys and values in 16 bits: the gradient E of the state from the last block of 64
// tokens to the first, 64 values a carrier (delta_carriers.cuh):
//
//   dU^T = (E^T K^T) write + dO^T P      X^T = dU^T A'      E^T <- total E^T + (dO read)^T Q - (X lost)^T K       64 x 64 x 128, 64, 64, 128 x 64 twice
//
// The storers keep E, rounded, X, and dV = weight X.
// A block and half of the values costs 4.2 MFLOP, 1,024 cycles of a processor's tensor cores, of which 640 follow one another, with four roundings between
// them some 1,500: 128 blocks of 1 x 8192 take about 110 us, whatever the number of heads up to 66. It reads 56 KB (q, k, P and A' from the second-level cache for the
// other half) and writes 32 KB: 8 x 1024, 16/32 heads, 0.46 GB, 140 us of memory.
//
// CUT = SEGMENTS begins each segment but the last at the gradient of the state at its end, in `ends`. CUT = ENDS, of all segments but the first, leaves in the `ends` of the
// segment before it what it makes of zero, the last one of the gradient of the final state.
//
// DTYPE; CARRIERS; CUT.
#include "delta_carriers.cuh"

// A stage: k and q in two halves of their columns, A', P, columns of dO for each carrier, lines
constexpr int K_AT = 0, Q_AT = 2 * SQUARE_BYTES, INVERSE_AT = 4 * SQUARE_BYTES, SCORES_AT = 5 * SQUARE_BYTES, ARRIVING_AT = 6 * SQUARE_BYTES;
constexpr int STAGE_BYTES = (6 + CARRIERS) * SQUARE_BYTES, STAGES_BYTES = STAGES * STAGE_BYTES;
// What a carrier leaves of a block: 64 rows of E^T, 128 keys in two halves, X and dV by tokens
constexpr int LEFT_BYTES = 4 * SQUARE_BYTES, ERRORS_AT = 2 * SQUARE_BYTES, GRADIENTS_AT = 3 * SQUARE_BYTES, LINES_AT = STAGES_BYTES + CARRIERS * LEFT_BYTES;
static_assert(LINES_AT + STAGES * LINES_BYTES <= 232448, "a block's shared memory");

struct Params {
    const DTYPE *q, *k, *d_o, *inverses, *scores;
    const float *lines, *d_final;
    DTYPE *leaving, *errors, *d_v;
    float* d_initial;
    const void* cu_seqlens;
    int64_t q_b, q_t, q_h, k_b, k_t, k_h, o_b, o_t, o_h;
    int heads, group, cu_wide, tokens, slots, segments;
    float* ends;  // [sequences, segments, heads, KEYS, VALUES]
};

DEVICE Task task_of(const Params& p) { return Task::of<0, 2 / CARRIERS>(p); }

// ---- The loaders take blocks by turns, two warps each: one has the first columns of q and k and A', the other the last ones and P, and both of a block's other rows.

DEVICE void load(const Params& p, unsigned char* memory, int turn, int half) {
    const Task task = task_of(p);
    const int64_t shared = task.head / p.group;
    const DTYPE* const k = p.k + task.here.batch * p.k_b + task.here.start * p.k_t + shared * p.k_h;
    const DTYPE* const q = p.q + task.here.batch * p.q_b + task.here.start * p.q_t + shared * p.q_h;
    const DTYPE* const d_o = p.d_o + task.here.batch * p.o_b + task.here.start * p.o_t + task.head * p.o_h + task.column;
#pragma unroll 1
    for (int step = turn; step < task.here.blocks; step += 2) {
        const int block = task.here.blocks - 1 - step, stage = step % STAGES, length = task.length(block);
        const int64_t at = static_cast<int64_t>(block) * SIDE, place = task.place(block);
        unsigned char* const to = memory + stage * STAGE_BYTES;
        if (step >= STAGES) barrier_sync(FREED + stage, WITH_LOADERS);
        load_rows(to + K_AT + half * SQUARE_BYTES, k + at * p.k_t + half * 64, p.k_t, length);
        load_rows(to + Q_AT + half * SQUARE_BYTES, q + at * p.q_t + half * 64, p.q_t, length);
        if (half == 0) load_lower(to + INVERSE_AT, p.inverses + place * (SIDE * SIDE));
        else load_lower(to + SCORES_AT, p.scores + place * (SIDE * SIDE));
        if (CARRIERS == 2 || half == 1) load_rows(to + ARRIVING_AT + half * (CARRIERS - 1) * SQUARE_BYTES, d_o + at * p.o_t + half * (CARRIERS - 1) * PART, p.o_t, length);
        for (int i = lane_id() + 32 * half; i < LINES / 4; i += 64) cp_async_16(memory + LINES_AT + stage * LINES_BYTES + 16 * i, p.lines + place * LINES + 4 * i, true);
        landed(LOADED + stage, WITH_LOADERS);
    }
}

// ---- The storers of a carrier: what it left of a block, to device memory.

DEVICE void store(const Params& p, const unsigned char* memory, int thread) {
    const Task task = task_of(p);
    const int carrier = thread / STORERS, column = task.column + carrier * PART;
    thread %= STORERS;
    const unsigned char* const left = memory + STAGES_BYTES + carrier * LEFT_BYTES;
    const int64_t stride = static_cast<int64_t>(p.heads) * VALUES;
#pragma unroll 1
    for (int block = task.here.blocks - 1; block >= 0; block--) {
        const int64_t row = task.here.batch * p.tokens + task.here.start + static_cast<int64_t>(block) * SIDE, at = row * stride + task.head * VALUES + column;
        const int length = task.length(block);
        if (p.leaving) {
            barrier_sync(LEFT + 2 * carrier + STATE, WITH_STORERS);
            DTYPE* const to = p.leaving + (task.place(block) * VALUES + column) * KEY_WIDTH;
#pragma unroll 1
            for (int half = 0; half < 2; half++) store_rows(left + half * SQUARE_BYTES, to + half * 64, KEY_WIDTH, PART, thread);
            barrier_arrive(STORED + 2 * carrier + STATE, WITH_STORERS);
        }
        barrier_sync(LEFT + 2 * carrier + REST, WITH_STORERS);
        if (p.errors) store_rows(left + ERRORS_AT, p.errors + at, stride, length, thread);
        if (p.d_v) store_rows(left + GRADIENTS_AT, p.d_v + at, stride, length, thread);
        barrier_arrive(STORED + 2 * carrier + REST, WITH_STORERS);
    }
}

// ---- The carriers.

DEVICE void carry(const Params& p, unsigned char* memory, int carrier) {
    const Task task = task_of(p);
    const int warp = threadIdx.x / 32 % 4, c = lane_id() % 4;
    unsigned char* const left = memory + STAGES_BYTES + carrier * LEFT_BYTES;
    const int64_t aside = carrier * PART + 16 * warp, of_sequence = task.state() + aside;
    Sums low, high;  // E^T of keys 0 to 63, and of the others
    const float* start = task.last() && p.d_final ? p.d_final + of_sequence : nullptr;
    if (CUT == SEGMENTS && !task.last()) start = p.ends + task.inner(0) + aside;
    read_state(low, start, 0), read_state(high, start, 64);
#pragma unroll 1
    for (int step = 0; step < task.here.blocks; step++) {
        const int stage = step % STAGES;
        unsigned char* const from = memory + stage * STAGE_BYTES;
        const float* const lines = reinterpret_cast<const float*>(memory + LINES_AT + stage * LINES_BYTES);
        const uint64_t k = operand(from + K_AT), q = operand(from + Q_AT), inverse = operand(from + INVERSE_AT), scores = operand(from + SCORES_AT);
        const uint64_t arriving = operand(from + ARRIVING_AT + carrier * SQUARE_BYTES);
        Sums answered, change;
        Operand low_rounded, high_rounded, given;
        as_operand(low_rounded, low), as_operand(high_rounded, high);
        barrier_sync(LOADED + stage, WITH_LOADERS);
        const float total = lines[TOTAL];  // before products: the compiler lets nothing touch what one added to while others are under way
#pragma unroll
        for (int i = 0; i < 32; i++) low[i] *= total, high[i] *= total;
        products_begin();
        product<DTYPE, BY_COLUMNS, BY_COLUMNS, false>(answered, arriving, scores);  // dO^T P
#pragma unroll
        for (int s = 1; s < 4; s++) product<DTYPE, BY_COLUMNS, BY_COLUMNS, true>(answered, further(arriving, s * FURTHER_IN_COLUMNS), further(scores, s * FURTHER_IN_COLUMNS));
        products_commit();
        products_begin();
        along_rows(change, low_rounded, high_rounded, k);  // E^T K^T
        products_commit();
        if (p.leaving) {
            if (step > 0) barrier_sync(STORED + 2 * carrier + STATE, WITH_STORERS);
            leave(left, low_rounded), leave(left + SQUARE_BYTES, high_rounded);
            barrier_arrive(LEFT + 2 * carrier + STATE, WITH_STORERS);
        }
        const Part columns{from + ARRIVING_AT + carrier * SQUARE_BYTES};
#pragma unroll
        for (int s = 0; s < 4; s++) {
            columns.columns(given[s][0], given[s][1], given[s][2], given[s][3], 16 * warp, 16 * s);
            scale_pairs(given[s], two(lines + READ + 16 * s + 2 * c), two(lines + READ + 16 * s + 8 + 2 * c));
        }
        products_wait<0>();
        settled(answered), settled(change);
        scale_columns(change, lines + WRITE);
#pragma unroll
        for (int i = 0; i < 32; i++) change[i] += answered[i];
        Operand changed;
        as_operand(changed, change);
        Sums error;
        products_begin();
        product_of<DTYPE, BY_COLUMNS, false>(error, changed[0], inverse);  // dU^T A'
#pragma unroll
        for (int s = 1; s < 4; s++) product_of<DTYPE, BY_COLUMNS, true>(error, changed[s], further(inverse, s * FURTHER_IN_COLUMNS));
        products_commit();
        products_begin();
#pragma unroll
        for (int s = 0; s < 4; s++) {
            product_of<DTYPE, BY_COLUMNS, true>(low, given[s], further(q, s * FURTHER_IN_COLUMNS));
            product_of<DTYPE, BY_COLUMNS, true>(high, given[s], further(q, SQUARE_BYTES + s * FURTHER_IN_COLUMNS));
        }
        products_commit();
        products_wait<1>();
        settled(error);
        Operand lost, kept;
        as_operand(kept, error);
        Sums weighed;
#pragma unroll
        for (int n = 0; n < 8; n++) {
            const float2 by = two(lines + LOST + 8 * n + 2 * c);
            weighed[4 * n] = -by.x * error[4 * n], weighed[4 * n + 1] = -by.y * error[4 * n + 1];
            weighed[4 * n + 2] = -by.x * error[4 * n + 2], weighed[4 * n + 3] = -by.y * error[4 * n + 3];
        }
        as_operand(lost, weighed);
        products_begin();
#pragma unroll
        for (int s = 0; s < 4; s++) {
            product_of<DTYPE, BY_COLUMNS, true>(low, lost[s], further(k, s * FURTHER_IN_COLUMNS));
            product_of<DTYPE, BY_COLUMNS, true>(high, lost[s], further(k, SQUARE_BYTES + s * FURTHER_IN_COLUMNS));
        }
        products_commit();
        if (step > 0) barrier_sync(STORED + 2 * carrier + REST, WITH_STORERS);
        if (p.errors) leave_turned(left + ERRORS_AT, kept);
        if (p.d_v) {
            scale_columns(error, lines + WEIGHT);
            as_operand(kept, error);
            leave_turned(left + GRADIENTS_AT, kept);
        }
        barrier_arrive(LEFT + 2 * carrier + REST, WITH_STORERS);
        products_wait<0>();
        settled(low), settled(high);
        barrier_arrive(FREED + stage, WITH_LOADERS);
    }
    float* end = p.d_initial && task.first() ? p.d_initial + of_sequence : nullptr;
    if constexpr (CUT == ENDS) end = p.ends + task.inner(-1) + aside;
    if (end) write_state(end, 0, low), write_state(end, 64, high);
}

extern "C" __global__ void __launch_bounds__(THREADS, 1) delta_reverse_hopper(const __grid_constant__ Params p) {
    SHARED_MEMORY(memory);
    const int warp = __shfl_sync(0xffffffffu, threadIdx.x / 32, 0);
    if (warp < 4) {
        leave_registers<LOADER_REGISTERS>();
        load(p, memory, warp / 2, warp % 2);
    } else if (warp < 8) {
        leave_registers<STORER_REGISTERS>();
        store(p, memory, threadIdx.x - GROUP);
    } else {
        take_registers<CARRIER_REGISTERS>();
        carry(p, memory, warp / 4 - 2);
    }
}
