// What delta_walk.cu computes, with its formulas, on Hopper for heads of 128 keys and values in 16 bits: the state S from the first block of 64 tokens to the last, 64
// values a carrier (delta_carriers.cuh):
//
//   X^T = weight V^T - (S^T K^T) lost      U^T = X^T A'^T      S^T <- total S^T + (U write)^T K       64 x 64 x 128, 64 x 64 x 64, 64 x 128 x 64
//   O^T = (S^T Q^T) read + U^T P^T
//
// The storers keep O, and for a backward S at the block's start, rounded, and U. A block and half of the values costs 4.2 MFLOP, 1,024 cycles of a processor's tensor
// cores, of which 640 follow one another, with three roundings between them some 1,300: 128 blocks of 1 x 8192 take about 100 us, whatever the number of heads up to 66.
// It reads 56 KB (q, k, P and A' from the second-level cache for the other half) and writes 8 KB: 8 x 1024, 16/32 heads, 0.3 GB, 90 us of memory.
//
// CUT = SEGMENTS begins each segment at its state in `starts`. CUT = ENDS, of all segments but the last, has two carriers with the same columns: one begins at zero, in
// the first segment at the sequence's own state, and leaves the offset N in the next segment's `starts`; one begins at the identity, without values, and leaves the map M
// in `maps`: S_out = M S_in + N. Both together: 2 x 2.6 MFLOP a block of tokens, 2 x 640 cycles, 40 KB.
//
// DTYPE; CARRIERS; OUTPUTS: o is computed; KEEPS: states and U are kept; CUT.
#include "delta_carriers.cuh"

// A stage: k in two halves of its columns, A', columns of v for each carrier, and for outputs q and P; lines
constexpr int K_AT = 0, INVERSE_AT = 2 * SQUARE_BYTES, V_AT = 3 * SQUARE_BYTES, V_COLUMNS = CUT == ENDS ? 1 : CARRIERS;
constexpr int Q_AT = V_AT + V_COLUMNS * SQUARE_BYTES, SCORES_AT = Q_AT + 2 * SQUARE_BYTES;
constexpr int STAGE_BYTES = (3 + V_COLUMNS + 3 * OUTPUTS) * SQUARE_BYTES, STAGES_BYTES = STAGES * STAGE_BYTES;
// What a carrier leaves of a block: O by tokens; 64 rows of S^T, 128 keys in two halves, and U by tokens
constexpr int O_AT = 0, STATES_AT = OUTPUTS * SQUARE_BYTES, UPDATES_AT = STATES_AT + 2 * SQUARE_BYTES, LEFT_BYTES = (OUTPUTS + 3 * KEEPS) * SQUARE_BYTES;
constexpr int LINES_AT = STAGES_BYTES + CARRIERS * LEFT_BYTES;
static_assert(LINES_AT + STAGES * LINES_BYTES <= 232448, "a block's shared memory");
static_assert(CUT != ENDS || (CARRIERS == 2 && !OUTPUTS && !KEEPS), "offsets and maps, and nothing else");
constexpr bool LEAVES = OUTPUTS || KEEPS;

struct Params {
    const DTYPE *q, *k, *v, *inverses, *scores;
    const float *lines, *initial;
    DTYPE *o, *states, *updates;
    float* final;
    const void* cu_seqlens;
    int64_t q_b, q_t, q_h, k_b, k_t, k_h, v_b, v_t, v_h;
    int heads, group, cu_wide, tokens, slots, segments;
    float *starts, *maps;  // [sequences, segments, heads, KEYS, VALUES]
};

DEVICE Task task_of(const Params& p) { return Task::of<1, CUT == ENDS ? 2 : 2 / CARRIERS>(p); }

// ---- The loaders take blocks by turns, two warps each: one has the first columns of q and k and A', the other the last ones and P, and both of a block's other rows.

DEVICE void load(const Params& p, unsigned char* memory, int turn, int half) {
    const Task task = task_of(p);
    const int64_t shared = task.head / p.group;
    const DTYPE* const k = p.k + task.here.batch * p.k_b + task.here.start * p.k_t + shared * p.k_h;
    const DTYPE* const q = p.q + task.here.batch * p.q_b + task.here.start * p.q_t + shared * p.q_h;
    const DTYPE* const v = p.v + task.here.batch * p.v_b + task.here.start * p.v_t + task.head * p.v_h + task.column;
#pragma unroll 1
    for (int block = turn; block < task.here.blocks; block += 2) {
        const int stage = block % STAGES, length = task.length(block);
        const int64_t at = static_cast<int64_t>(block) * SIDE, place = task.place(block);
        unsigned char* const to = memory + stage * STAGE_BYTES;
        if (block >= STAGES) barrier_sync(FREED + stage, WITH_LOADERS);
        load_rows(to + K_AT + half * SQUARE_BYTES, k + at * p.k_t + half * 64, p.k_t, length);
        if constexpr (OUTPUTS) load_rows(to + Q_AT + half * SQUARE_BYTES, q + at * p.q_t + half * 64, p.q_t, length);
        if (half == 0) load_lower(to + INVERSE_AT, p.inverses + place * (SIDE * SIDE));
        else if constexpr (OUTPUTS) load_lower(to + SCORES_AT, p.scores + place * (SIDE * SIDE));
        if (V_COLUMNS == 2 || half == 1) load_rows(to + V_AT + half * (V_COLUMNS - 1) * SQUARE_BYTES, v + at * p.v_t + half * (V_COLUMNS - 1) * PART, p.v_t, length);
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
    for (int block = 0; block < task.here.blocks; block++) {
        const int64_t row = task.here.batch * p.tokens + task.here.start + static_cast<int64_t>(block) * SIDE, at = row * stride + task.head * VALUES + column;
        const int length = task.length(block);
        if constexpr (KEEPS) {
            if (p.states) {
                barrier_sync(LEFT + 2 * carrier + STATE, WITH_STORERS);
                DTYPE* const to = p.states + (task.place(block) * VALUES + column) * KEY_WIDTH;
#pragma unroll 1
                for (int half = 0; half < 2; half++) store_rows(left + STATES_AT + half * SQUARE_BYTES, to + half * 64, KEY_WIDTH, PART, thread);
                barrier_arrive(STORED + 2 * carrier + STATE, WITH_STORERS);
            }
        }
        barrier_sync(LEFT + 2 * carrier + REST, WITH_STORERS);
        if constexpr (OUTPUTS) store_rows(left + O_AT, p.o + at, stride, length, thread);
        if constexpr (KEEPS) {
            if (p.updates) store_rows(left + UPDATES_AT, p.updates + at, stride, length, thread);
        }
        barrier_arrive(STORED + 2 * carrier + REST, WITH_STORERS);
    }
}

// ---- The carriers.

DEVICE void carry(const Params& p, unsigned char* memory, int carrier) {
    const Task task = task_of(p);
    const int warp = threadIdx.x / 32 % 4, c = lane_id() % 4;
    unsigned char* const left = memory + STAGES_BYTES + carrier * LEFT_BYTES;
    const bool map = CUT == ENDS && carrier == 1;
    const int64_t aside = (CUT == ENDS ? 0 : carrier * PART) + 16 * warp, of_sequence = task.state() + aside;
    Sums low, high;  // S^T of keys 0 to 63, and of the others
    const float* start = task.first() && p.initial ? p.initial + of_sequence : nullptr;
    if (CUT == SEGMENTS && !task.first()) start = p.starts + task.inner(0) + aside;
    if (map) {
        identity(low, 0, task.column + 16 * warp), identity(high, 64, task.column + 16 * warp);
    } else {
        read_state(low, start, 0), read_state(high, start, 64);
    }
#pragma unroll 1
    for (int block = 0; block < task.here.blocks; block++) {
        const int stage = block % STAGES;
        unsigned char* const from = memory + stage * STAGE_BYTES;
        const float* const lines = reinterpret_cast<const float*>(memory + LINES_AT + stage * LINES_BYTES);
        const uint64_t k = operand(from + K_AT), q = operand(from + Q_AT), inverse = operand(from + INVERSE_AT), scores = operand(from + SCORES_AT);
        Sums error, out;
        Operand low_rounded, high_rounded, rounded;
        as_operand(low_rounded, low), as_operand(high_rounded, high);
        barrier_sync(LOADED + stage, WITH_LOADERS);
        const float total = lines[TOTAL];  // before products: the compiler lets nothing touch what one added to while others are under way
#pragma unroll
        for (int i = 0; i < 32; i++) low[i] *= total, high[i] *= total;
        products_begin();
        along_rows(error, low_rounded, high_rounded, k);  // S^T K^T
        products_commit();
        if constexpr (OUTPUTS) {
            products_begin();
            along_rows(out, low_rounded, high_rounded, q);  // S^T Q^T
            products_commit();
        }
        if constexpr (KEEPS) {
            if (p.states) {
                if (block > 0) barrier_sync(STORED + 2 * carrier + STATE, WITH_STORERS);
                leave(left + STATES_AT, low_rounded), leave(left + STATES_AT + SQUARE_BYTES, high_rounded);
                barrier_arrive(LEFT + 2 * carrier + STATE, WITH_STORERS);
            }
        }
        const Part values{from + V_AT + (V_COLUMNS - 1) * carrier * SQUARE_BYTES};
        Operand given;
#pragma unroll
        for (int s = 0; s < 4; s++) values.columns(given[s][0], given[s][1], given[s][2], given[s][3], 16 * warp, 16 * s);
        products_wait<OUTPUTS>();
        settled(error);
#pragma unroll
        for (int n = 0; n < 8; n++) {
            const float2 weight = two(lines + WEIGHT + 8 * n + 2 * c), lost = two(lines + LOST + 8 * n + 2 * c);
#pragma unroll
            for (int i = 0; i < 2; i++) {
                const float2 own = unpair<DTYPE>(map ? 0u : given[n / 2][n % 2 * 2 + i]);
                error[4 * n + 2 * i] = weight.x * own.x - lost.x * error[4 * n + 2 * i];
                error[4 * n + 2 * i + 1] = weight.y * own.y - lost.y * error[4 * n + 2 * i + 1];
            }
        }
        as_operand(rounded, error);
        Sums update;
        products_begin();
        product_of<DTYPE, BY_ROWS, false>(update, rounded[0], inverse);  // X^T A'^T
#pragma unroll
        for (int s = 1; s < 4; s++) product_of<DTYPE, BY_ROWS, true>(update, rounded[s], further(inverse, s * FURTHER_IN_ROWS));
        products_commit();
        products_wait<0>();
        settled(update);
        if constexpr (OUTPUTS) {
            settled(out);
            scale_columns(out, lines + READ);
        }
        Operand written;
        as_operand(rounded, update);
        scale_columns(update, lines + WRITE);
        as_operand(written, update);
        products_begin();
#pragma unroll
        for (int s = 0; s < 4; s++) {
            product_of<DTYPE, BY_COLUMNS, true>(low, written[s], further(k, s * FURTHER_IN_COLUMNS));
            product_of<DTYPE, BY_COLUMNS, true>(high, written[s], further(k, SQUARE_BYTES + s * FURTHER_IN_COLUMNS));
        }
        if constexpr (OUTPUTS) {
#pragma unroll
            for (int s = 0; s < 4; s++) product_of<DTYPE, BY_ROWS, true>(out, rounded[s], further(scores, s * FURTHER_IN_ROWS));  // U^T P^T
        }
        products_commit();
        if (LEAVES && block > 0) barrier_sync(STORED + 2 * carrier + REST, WITH_STORERS);
        if constexpr (KEEPS) {
            if (p.updates) leave_turned(left + UPDATES_AT, rounded);
        }
        products_wait<0>();
        settled(low), settled(high);
        if constexpr (OUTPUTS) {
            settled(out);
            as_operand(rounded, out);
            leave_turned(left + O_AT, rounded);
        }
        if constexpr (LEAVES) barrier_arrive(LEFT + 2 * carrier + REST, WITH_STORERS);
        barrier_arrive(FREED + stage, WITH_LOADERS);
    }
    float* end = p.final && task.last() ? p.final + of_sequence : nullptr;
    if constexpr (CUT == ENDS) end = map ? p.maps + task.inner(0) + aside : p.starts + task.inner(1) + aside;
    if (end) write_state(end, 0, low), write_state(end, 64, high);
}

extern "C" __global__ void __launch_bounds__(THREADS, 1) delta_walk_hopper(const __grid_constant__ Params p) {
    SHARED_MEMORY(memory);
    const int warp = __shfl_sync(0xffffffffu, threadIdx.x / 32, 0);
    if (warp < 4) {
        leave_registers<LOADER_REGISTERS>();
        load(p, memory, warp / 2, warp % 2);
    } else if (warp < 8) {
        leave_registers<STORER_REGISTERS>();
        if constexpr (LEAVES) store(p, memory, threadIdx.x - GROUP);
    } else {
        take_registers<CARRIER_REGISTERS>();
        carry(p, memory, warp / 4 - 2);
    }
}
