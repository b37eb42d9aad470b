// CUDA C++ as C++20 on the CPU, for tests: every CUDA thread is a fibre, warp instructions are computed by the last lane that arrives.
// It stands in for ptx.cuh (same names) and for what NVRTC has built in. Blocks run one after the other, those of a cluster together.
// It fails, with a sentence, on a deadlock (divergent barriers or warp instructions), misaligned vectors and copies, and writes beyond shared memory.
// Shared memory starts as NaN, an asynchronous copy lands when it is waited for, and the order of the threads can be reversed to show races.
#pragma once
#define TITANS_PTX_CUH

#include <math.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>

#define __global__
#define __device__
#define __host__
#define __constant__ const
#define __forceinline__ inline
#define __grid_constant__
#define __launch_bounds__(...)
#define __cluster_dims__(...)
#define __align__(n) alignas(n)
#define DEVICE inline
#define SHARED_MEMORY(name) unsigned char* const name = emulator::now->block->shared

struct alignas(8) float2 { float x, y; };
struct alignas(16) float4 { float x, y, z, w; };
struct alignas(8) int2 { int x, y; };
struct alignas(16) int4 { int x, y, z, w; };
struct alignas(8) uint2 { unsigned x, y; };
struct alignas(16) uint4 { unsigned x, y, z, w; };
struct uint3 { unsigned x, y, z; };
inline float2 make_float2(float x, float y) { return {x, y}; }
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }
inline int2 make_int2(int x, int y) { return {x, y}; }
inline int4 make_int4(int x, int y, int z, int w) { return {x, y, z, w}; }
inline uint2 make_uint2(unsigned x, unsigned y) { return {x, y}; }
inline uint4 make_uint4(unsigned x, unsigned y, unsigned z, unsigned w) { return {x, y, z, w}; }

extern "C" __attribute__((visibility("hidden"))) void emulator_switch(void** kept, void* next);
asm(R"(
.text
emulator_switch:
    push %rbp; push %rbx; push %r12; push %r13; push %r14; push %r15
    mov %rsp, (%rdi)
    mov %rsi, %rsp
    pop %r15; pop %r14; pop %r13; pop %r12; pop %rbx; pop %rbp
    ret
)");

namespace emulator {

constexpr int MOST_BLOCKS = 16, MOST_THREADS = 1024, MOST_WARPS = MOST_THREADS / 32, MOST_GROUPS = 16, MOST_COPIES = 512;
constexpr size_t STACK = 1 << 17, GUARD = 4096, MOST_SHARED = 232448;

struct Barrier { unsigned arrived, generation; int line; };
struct Gather { unsigned mask, arrived, generation; const char* what; void* given[32]; };
struct Warp { Gather gathers[4]; };
struct Copy { void* to; const void* from; };
struct Block {
    unsigned char* shared;
    uint3 index;
    unsigned rank, live;
    Barrier barriers[16];
    Warp warps[MOST_WARPS];
};
struct Thread {
    void* stack;
    const unsigned* watched;  // it may run once this differs from `seen`
    unsigned seen, cluster_seen, lane;
    bool done;
    uint3 index;
    Block* block;
    Warp* warp;
    int groups, copies, group_ends[MOST_GROUPS];
    Copy queue[MOST_COPIES];
};
struct Launch { unsigned grid[3], threads[3], cluster, shared; int reverse; };

static Thread* now;
static Thread* threads;
static Block blocks[MOST_BLOCKS];
static Barrier cluster;
static unsigned cluster_live, cluster_blocks;
static uint3 block_size, grid_size;
static void* scheduler;
static unsigned char *stacks, *memory;
static char message[512];
static void (*kernel)(const void*);
static const void* kernel_params;

[[noreturn]] inline void fail(const char* what, const char* more = "") {
    if (!message[0])
        snprintf(message, sizeof message, "%s%s, in thread %u of block (%u, %u, %u)", what, more, now->index.x, now->block->index.x,
                 now->block->index.y, now->block->index.z);
    void* unused;
    emulator_switch(&unused, scheduler);
    abort();
}
inline void wait_for(const unsigned& generation, unsigned seen) {
    if (generation != seen) return;
    now->watched = &generation;
    now->seen = seen;
    emulator_switch(&now->stack, scheduler);
}
inline void arrive(Barrier& barrier, unsigned expected) {
    if (++barrier.arrived >= expected) barrier.arrived = 0, barrier.generation++;
}
inline void barrier(int id, unsigned expected, int line) {
    Barrier& mine = now->block->barriers[id];
    if (mine.arrived && mine.line != line) fail("divergence: other threads of the block are at a __syncthreads of another line");
    const unsigned seen = mine.generation;
    mine.line = line;
    arrive(mine, expected);
    wait_for(mine.generation, seen);
}
// All lanes of the mask meet; the last one calls apply(given), where given[lane] is what that lane brought.
template <typename F> inline void together(const char* what, unsigned mask, void* mine, F apply) {
    if (!(mask >> now->lane & 1)) fail(what, ": the calling lane is not in the mask");
    Gather* gather = nullptr;
    for (Gather& one : now->warp->gathers)
        if (one.arrived && one.mask == mask) gather = &one;
    if (!gather)
        for (Gather& one : now->warp->gathers)
            if (!one.arrived) gather = &one;
    if (!gather) fail(what, ": five masks at once");
    if (gather->arrived && gather->what != what) fail(what, ": other lanes of the warp are at another instruction");
    gather->mask = mask, gather->what = what, gather->given[now->lane] = mine;
    const unsigned seen = gather->generation;
    if (++gather->arrived == unsigned(__builtin_popcount(mask))) {
        apply(gather->given);
        gather->arrived = 0, gather->generation++;
    }
    wait_for(gather->generation, seen);
}
inline void aligned(const void* p, unsigned bytes, const char* what) {
    if (reinterpret_cast<uintptr_t>(p) % bytes) fail(what, ": misaligned address");
}
inline void inside(const void* p, size_t bytes, const char* what) {
    const ptrdiff_t at = static_cast<const unsigned char*>(p) - now->block->shared;
    if (at < 0 || at + bytes > MOST_SHARED) fail(what, ": not an address in this block's shared memory");
}

inline void body() {
    kernel(kernel_params);
    now->done = true;
    Block& block = *now->block;
    block.live--, cluster_live--;
    Barrier& all = block.barriers[0];
    if (all.arrived && all.arrived >= block.live) all.arrived = 0, all.generation++;
    if (cluster.arrived && cluster.arrived >= cluster_live) cluster.arrived = 0, cluster.generation++;
    emulator_switch(&now->stack, scheduler);
    abort();
}

inline bool run_cluster(const Launch& l, unsigned first, unsigned count) {
    const unsigned each = l.threads[0] * l.threads[1] * l.threads[2], all = each * count;
    cluster = {}, cluster_live = all, cluster_blocks = count;
    for (unsigned b = 0; b < count; b++) {
        Block& block = blocks[b];
        memset(&block, 0, sizeof block);
        block.shared = memory + b * (MOST_SHARED + 2 * GUARD) + GUARD;
        memset(block.shared - GUARD, 0xff, l.shared + 2 * GUARD);  // NaN in every dtype
        const unsigned at = first + b;
        block.index = {at % l.grid[0], at / l.grid[0] % l.grid[1], at / l.grid[0] / l.grid[1]};
        block.rank = b, block.live = each;
        for (unsigned t = 0; t < each; t++) {
            Thread& thread = threads[b * each + t];
            thread.watched = nullptr, thread.done = false, thread.groups = thread.copies = 0;
            thread.index = {t % l.threads[0], t / l.threads[0] % l.threads[1], t / l.threads[0] / l.threads[1]};
            thread.block = &block, thread.warp = &block.warps[t / 32], thread.lane = t % 32;
            void** top = reinterpret_cast<void**>(stacks + (b * each + t + 1) * STACK);
            top -= 2, *top = reinterpret_cast<void*>(&body);
            thread.stack = top - 6;
        }
    }
    unsigned at = 0, left = all, idle = 0;
    while (left) {
        Thread& next = threads[l.reverse ? all - 1 - at : at];
        at = at + 1 == all ? 0 : at + 1;
        if (next.done || (next.watched && *next.watched == next.seen)) {
            if (++idle > all) {
                for (unsigned t = 0; t < all; t++)
                    if (!threads[t].done) {
                        now = &threads[t];
                        snprintf(message, sizeof message, "deadlock: %u of %u threads wait, thread %u of block %u at %s", left, all, now->index.x,
                                 now->block->index.x, "a barrier or warp instruction that others never reach");
                        return false;
                    }
            }
            continue;
        }
        idle = 0, next.watched = nullptr, now = &next;
        emulator_switch(&scheduler, next.stack);
        if (message[0]) return false;
        left -= next.done;
    }
    for (unsigned b = 0; b < count; b++) {
        const unsigned char *low = blocks[b].shared - GUARD, *high = blocks[b].shared + l.shared, *end = high + GUARD;
        for (const unsigned char* p = low; p < end; p++) {
            if (p == blocks[b].shared) p = high;
            if (*p != 0xff) {
                snprintf(message, sizeof message, "shared memory: byte %td was written and there are %u, in block %u", p - blocks[b].shared, l.shared,
                         blocks[b].index.x);
                return false;
            }
        }
    }
    return true;
}

inline const char* launch(const Launch& l, void (*thunk)(const void*), const void* params) {
    message[0] = 0;
    const unsigned each = l.threads[0] * l.threads[1] * l.threads[2], count = l.grid[0] * l.grid[1] * l.grid[2];
    if (!each || each > MOST_THREADS || l.cluster > MOST_BLOCKS || l.shared > MOST_SHARED || count % l.cluster || !count) return "an impossible launch";
    if (!threads) {
        const auto take = [](size_t bytes) { return mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0); };
        threads = static_cast<Thread*>(take(sizeof(Thread) * MOST_THREADS * MOST_BLOCKS));
        stacks = static_cast<unsigned char*>(take(STACK * MOST_THREADS * MOST_BLOCKS));
        memory = static_cast<unsigned char*>(take((MOST_SHARED + 2 * GUARD) * MOST_BLOCKS));
    }
    kernel = thunk, kernel_params = params;
    block_size = {l.threads[0], l.threads[1], l.threads[2]}, grid_size = {l.grid[0], l.grid[1], l.grid[2]};
    for (unsigned first = 0; first < count; first += l.cluster)
        if (!run_cluster(l, l.reverse ? count - l.cluster - first : first, l.cluster)) return message;
    return nullptr;
}

template <auto KERNEL> struct Thunk;
template <typename P, void (*KERNEL)(P)> struct Thunk<KERNEL> {
    static constexpr size_t size = sizeof(P);
    static void call(const void* params) { KERNEL(*static_cast<const P*>(params)); }
};

inline float bf16_value(uint16_t bits) { uint32_t wide = uint32_t(bits) << 16; float x; memcpy(&x, &wide, 4); return x; }

}  // namespace emulator

#define EMULATE(KERNEL)                                                                                                             \
    extern "C" const char* emulate(const emulator::Launch* l, const void* params, size_t size) {                                    \
        if (size != emulator::Thunk<&KERNEL>::size) return "the packed parameters have another size than the kernel's struct";      \
        return emulator::launch(*l, &emulator::Thunk<&KERNEL>::call, params);                                                       \
    }

// What g++'s -fsanitize=alignment calls: a vector load or store through a pointer that is not a multiple of its size.
struct SanitizedPlace { const char* file; uint32_t line, column; };
extern "C" __attribute__((used)) void __ubsan_handle_type_mismatch_v1_abort(SanitizedPlace* at, uintptr_t) {
    static char where[300];
    snprintf(where, sizeof where, "%s:%u: a misaligned load or store", at->file, at->line);
    emulator::fail(where);
}

#define threadIdx (emulator::now->index)
#define blockIdx (emulator::now->block->index)
#define blockDim (emulator::block_size)
#define gridDim (emulator::grid_size)

// ---- Built in with NVRTC

inline void __syncthreads(int line = __builtin_LINE()) { emulator::barrier(0, emulator::now->block->live, line); }
inline void __syncwarp(unsigned mask = 0xffffffffu) { emulator::together("__syncwarp", mask, nullptr, [](void**) {}); }
inline void __threadfence() {}
inline void __threadfence_block() {}
inline float __uint_as_float(unsigned bits) { float x; memcpy(&x, &bits, 4); return x; }
inline unsigned __float_as_uint(float x) { unsigned bits; memcpy(&bits, &x, 4); return bits; }
inline float __int_as_float(int bits) { return __uint_as_float(unsigned(bits)); }
inline int __float_as_int(float x) { return int(__float_as_uint(x)); }
inline float __expf(float x) { return expf(x); }
inline float __fdividef(float x, float y) { return x / y; }
inline float __frcp_rn(float x) { return 1.0f / x; }
inline float rsqrtf(float x) { return 1.0f / sqrtf(x); }
template <typename T> inline T __ldg(const T* p) { return *p; }
template <typename T> inline T __ldcs(const T* p) { return *p; }
template <typename T> inline T __ldcg(const T* p) { return *p; }
template <typename T> inline void __stcs(T* p, T x) { *p = x; }
template <typename T> inline void __stcg(T* p, T x) { *p = x; }
inline float atomicAdd(float* p, float x) { float old = *p; *p += x; return old; }
inline int atomicAdd(int* p, int x) { int old = *p; *p += x; return old; }
inline int __popc(unsigned x) { return __builtin_popcount(x); }
inline int __ffs(int x) { return __builtin_ffs(x); }
inline int __clz(int x) { return x ? __builtin_clz(unsigned(x)) : 32; }
inline int min(int a, int b) { return a < b ? a : b; }
inline int max(int a, int b) { return a > b ? a : b; }
inline unsigned min(unsigned a, unsigned b) { return a < b ? a : b; }
inline unsigned max(unsigned a, unsigned b) { return a > b ? a : b; }
inline long long min(long long a, long long b) { return a < b ? a : b; }
inline long long max(long long a, long long b) { return a > b ? a : b; }
inline float min(float a, float b) { return fminf(a, b); }
inline float max(float a, float b) { return fmaxf(a, b); }

template <typename T> inline T emulator_shuffle(const char* what, unsigned mask, T value, int source) {
    struct Given { T value, result; int source; } mine{value, value, source};
    emulator::together(what, mask, &mine, [mask](void** given) {
        for (int lane = 0; lane < 32; lane++)
            if (mask >> lane & 1) {
                Given& one = *static_cast<Given*>(given[lane]);
                if (!(mask >> one.source & 1)) emulator::fail("a shuffle reads a lane that is not in the mask");
                one.result = static_cast<Given*>(given[one.source])->value;
            }
    });
    return mine.result;
}
template <typename T> inline T __shfl_sync(unsigned mask, T x, int source, int width = 32) {
    const int lane = emulator::now->lane;
    return emulator_shuffle("__shfl_sync", mask, x, (lane & -width) | (source & (width - 1)));
}
template <typename T> inline T __shfl_xor_sync(unsigned mask, T x, int bits, int width = 32) {
    const int lane = emulator::now->lane, source = lane ^ bits;
    return emulator_shuffle("__shfl_xor_sync", mask, x, source / width > lane / width ? lane : source);
}
template <typename T> inline T __shfl_up_sync(unsigned mask, T x, int by, int width = 32) {
    const int lane = emulator::now->lane;
    return emulator_shuffle("__shfl_up_sync", mask, x, lane % width < by ? lane : lane - by);
}
template <typename T> inline T __shfl_down_sync(unsigned mask, T x, int by, int width = 32) {
    const int lane = emulator::now->lane;
    return emulator_shuffle("__shfl_down_sync", mask, x, lane % width + by >= width ? lane : lane + by);
}
inline unsigned __ballot_sync(unsigned mask, int predicate) {
    struct Given { int predicate; unsigned result; } mine{predicate, 0};
    emulator::together("__ballot_sync", mask, &mine, [mask](void** given) {
        unsigned votes = 0;
        for (int lane = 0; lane < 32; lane++)
            if (mask >> lane & 1 && static_cast<Given*>(given[lane])->predicate) votes |= 1u << lane;
        for (int lane = 0; lane < 32; lane++)
            if (mask >> lane & 1) static_cast<Given*>(given[lane])->result = votes;
    });
    return mine.result;
}
inline int __any_sync(unsigned mask, int predicate) { return __ballot_sync(mask, predicate) != 0; }
inline int __all_sync(unsigned mask, int predicate) { return __ballot_sync(mask, predicate) == mask; }

// ---- ptx.cuh

inline uint32_t shared_address(const void* p) { return uint32_t(static_cast<const unsigned char*>(p) - emulator::now->block->shared); }
inline uint16_t bf16_bits(float x) {
    const uint32_t bits = __float_as_uint(x);
    return x != x ? 0x7fff : uint16_t((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}
inline uint16_t f16_bits(float x) { const _Float16 half = _Float16(x); uint16_t bits; memcpy(&bits, &half, 2); return bits; }
inline float f16_value(uint16_t bits) { _Float16 half; memcpy(&half, &bits, 2); return float(half); }
inline uint32_t bf16_pair(float first, float second) { return bf16_bits(first) | uint32_t(bf16_bits(second)) << 16; }
inline uint32_t f16_pair(float first, float second) { return f16_bits(first) | uint32_t(f16_bits(second)) << 16; }
inline uint32_t tf32_bits(float x) { return (__float_as_uint(x) + 0x1000u) & 0xffffe000u; }  // to nearest, ties away
inline float exp2_fast(float x) { return exp2f(x); }

template <int DEPTH, float (*VALUE)(uint32_t, int)>
inline void emulator_mma(const char* what, float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
    struct Given { float* d; const uint32_t *a, *b; } mine{d, a, b};
    emulator::together(what, 0xffffffffu, &mine, [](void** given) {
        constexpr int PACKED = DEPTH == 16 ? 2 : 1, HALF = DEPTH / 2;
        float left[16][DEPTH], right[DEPTH][8];
        for (int lane = 0; lane < 32; lane++) {
            const Given& one = *static_cast<Given*>(given[lane]);
            const int row = lane / 4, column = lane % 4 * PACKED;
            for (int i = 0; i < PACKED; i++) {
                for (int j = 0; j < 4; j++) left[row + 8 * (j & 1)][column + i + HALF * (j >> 1)] = VALUE(one.a[j], i);
                for (int j = 0; j < 2; j++) right[column + i + HALF * j][row] = VALUE(one.b[j], i);
            }
        }
        for (int lane = 0; lane < 32; lane++) {
            float* out = static_cast<Given*>(given[lane])->d;
            for (int j = 0; j < 4; j++) {
                const int row = lane / 4 + 8 * (j >> 1), column = lane % 4 * 2 + (j & 1);
                float sum = 0;
                for (int k = 0; k < DEPTH; k++) sum += left[row][k] * right[k][column];
                out[j] += sum;
            }
        }
    });
}
inline float emulator_bf16(uint32_t bits, int i) { return emulator::bf16_value(uint16_t(bits >> 16 * i)); }
inline float emulator_f16(uint32_t bits, int i) { return f16_value(uint16_t(bits >> 16 * i)); }
inline float emulator_tf32(uint32_t bits, int) { return __uint_as_float(bits & 0xffffe000u); }  // the hardware ignores the rest
inline void mma_bf16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) { emulator_mma<16, emulator_bf16>("mma bf16", d, a, b); }
inline void mma_f16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) { emulator_mma<16, emulator_f16>("mma f16", d, a, b); }
inline void mma_tf32(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) { emulator_mma<8, emulator_tf32>("mma tf32", d, a, b); }

template <int TILES, bool TRANSPOSED> inline void emulator_ldmatrix(const char* what, uint32_t (&r)[TILES], const void* row) {
    struct Given { const void* row; uint32_t* r; } mine{row, r};
    if (emulator::now->lane < 8 * TILES) emulator::aligned(row, 16, what), emulator::inside(row, 16, what);
    emulator::together(what, 0xffffffffu, &mine, [](void** given) {
        for (int lane = 0; lane < 32; lane++)
            for (int tile = 0; tile < TILES; tile++) {
                uint16_t both[2];
                for (int i = 0; i < 2; i++) {
                    const int y = TRANSPOSED ? lane % 4 * 2 + i : lane / 4, x = TRANSPOSED ? lane / 4 : lane % 4 * 2 + i;
                    memcpy(&both[i], static_cast<const char*>(static_cast<Given*>(given[8 * tile + y])->row) + 2 * x, 2);
                }
                static_cast<Given*>(given[lane])->r[tile] = both[0] | uint32_t(both[1]) << 16;
            }
    });
}
inline void ldmatrix_x4(uint32_t (&r)[4], const void* row) { emulator_ldmatrix<4, false>("ldmatrix.x4", r, row); }
inline void ldmatrix_x4_trans(uint32_t (&r)[4], const void* row) { emulator_ldmatrix<4, true>("ldmatrix.x4.trans", r, row); }
inline void ldmatrix_x2(uint32_t (&r)[2], const void* row) { emulator_ldmatrix<2, false>("ldmatrix.x2", r, row); }
inline void ldmatrix_x2_trans(uint32_t (&r)[2], const void* row) { emulator_ldmatrix<2, true>("ldmatrix.x2.trans", r, row); }

inline uint32_t transposed(uint32_t tile) {
    struct Given { uint32_t tile, turned; } mine{tile, 0};
    emulator::together("movmatrix", 0xffffffffu, &mine, [](void** given) {
        for (int lane = 0; lane < 32; lane++) {
            uint32_t both = 0;
            for (int i = 0; i < 2; i++) {
                const int row = lane % 4 * 2 + i, column = lane / 4;
                both |= (static_cast<Given*>(given[4 * row + column / 2])->tile >> 16 * (column % 2) & 0xffff) << 16 * i;
            }
            static_cast<Given*>(given[lane])->turned = both;
        }
    });
    return mine.turned;
}

inline void cp_async_16(void* shared, const void* global, bool valid) {
    emulator::Thread& t = *emulator::now;
    emulator::aligned(shared, 16, "cp.async"), emulator::aligned(global, 16, "cp.async"), emulator::inside(shared, 16, "cp.async");
    if (t.copies == emulator::MOST_COPIES) emulator::fail("cp.async: too many copies in flight for the emulator");
    t.queue[t.copies++] = {shared, valid ? global : nullptr};
}
inline void cp_async_commit() {
    emulator::Thread& t = *emulator::now;
    if (t.groups == emulator::MOST_GROUPS) emulator::fail("cp.async: too many groups in flight for the emulator");
    t.group_ends[t.groups++] = t.copies;
}
template <int PENDING> inline void cp_async_wait() {
    emulator::Thread& t = *emulator::now;
    const int finished = t.groups - PENDING;
    if (finished <= 0) return;
    const int copies = t.group_ends[finished - 1];
    for (int i = 0; i < copies; i++) t.queue[i].from ? memcpy(t.queue[i].to, t.queue[i].from, 16) : memset(t.queue[i].to, 0, 16);
    memmove(t.queue, t.queue + copies, (t.copies - copies) * sizeof(emulator::Copy));
    t.copies -= copies, t.groups = PENDING;
    for (int i = 0; i < PENDING; i++) t.group_ends[i] = t.group_ends[i + finished] - copies;
}
inline int fresh(int x) { return x; }
inline void barrier_sync(int id, int count) { emulator::barrier(id, count, 0); }

inline uint32_t cluster_rank() { return emulator::now->block->rank; }
inline uint32_t cluster_size() { return emulator::cluster_blocks; }
inline void cluster_arrive() {
    emulator::now->cluster_seen = emulator::cluster.generation;
    emulator::arrive(emulator::cluster, emulator::cluster_live);
}
inline void cluster_arrive_relaxed() { cluster_arrive(); }
inline void cluster_wait() { emulator::wait_for(emulator::cluster.generation, emulator::now->cluster_seen); }
template <typename T> inline T emulator_cluster_load(const void* mine, uint32_t rank) {
    emulator::inside(mine, sizeof(T), "cluster_load"), emulator::aligned(mine, sizeof(T), "cluster_load");
    if (rank >= emulator::cluster_blocks) emulator::fail("cluster_load: no such block in the cluster");
    if (emulator::blocks[rank].live == 0) emulator::fail("cluster_load: that block has ended");
    T there;
    memcpy(&there, emulator::blocks[rank].shared + (static_cast<const unsigned char*>(mine) - emulator::now->block->shared), sizeof(T));
    return there;
}
inline uint32_t cluster_load_bits(const void* mine, uint32_t rank) { return emulator_cluster_load<uint32_t>(mine, rank); }
inline uint4 cluster_load_16(const void* mine, uint32_t rank) { return emulator_cluster_load<uint4>(mine, rank); }
