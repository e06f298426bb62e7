// Sorted attention on CPUs, fused: gather, scores, softmax and products of one strip of seats stay in a core's cache.
//
// The mathematics is that of reference.py; models/attention/kernels/native.py builds this file and calls it.
//
// How the work is cut:
// - A row (one head of one sequence) has `rounds` orders of its positions. The seats of an order are cut into strips;
//   a strip gathers the keys its queries can meet into scratch memory, and serves its queries in blocks of BLOCK.
// - Products are outer-product tiles of ROWS × PANEL, accumulated in registers. Keys lie in panels of PANEL, transposed,
//   so that lanes are keys; a group of ROWS queries computes only the panels that its intervals touch.
// - The pass over a round is one phase for the forward pass. In the backward pass, strips next to each other add to the
//   same keys, so even strips run first, then odd ones, then the ring's (rule `chunk`): nobody writes where another
//   writes, and sums have one order. The result does not depend on the number of threads.
// - Rounds follow each other, and merge into the output by a running maximum and sum (forward) or add to the gradients
//   (backward, from the log-sum-exp over all rounds). Memory beyond inputs and results is two numbers a position.
//
// Vectors are the compiler's own (GCC and Clang), as wide as the machine it compiles for.

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <limits>
#include <memory>
#include <thread>
#include <vector>

namespace {

#if defined(__AVX512F__)
constexpr int LANES = 16;
#elif defined(__AVX__)
constexpr int LANES = 8;
#else
constexpr int LANES = 4;
#endif

typedef float Floats __attribute__((vector_size(4 * LANES)));
typedef int32_t Ints __attribute__((vector_size(4 * LANES)));
typedef uint32_t Bits __attribute__((vector_size(4 * LANES)));

constexpr int ROWS = 6;           // with PANEL: 12 accumulators, which hide the latency of a multiply-add
constexpr int PANEL = 2 * LANES;  // keys, or columns, of a tile
constexpr int BLOCK = 24;         // queries whose weights exist at once
constexpr int STRIP = 240;        // seats of a strip, a multiple of BLOCK

constexpr float HIDDEN = -1e30f;  // score of a pair that does not meet
constexpr float NOBODY = 1e30f;   // log-sum-exp of a position that meets nothing: all its weights become 0

inline int64_t round_up(int64_t n, int64_t to) { return (n + to - 1) / to * to; }

template <class V, class T>
inline V load(const T* p) {
    V x;
    std::memcpy(&x, p, sizeof x);
    return x;
}

template <class V, class T>
inline void store(T* p, V x) {
    std::memcpy(p, &x, sizeof x);
}

inline Floats spread(float x) { return x - Floats{}; }
inline Ints spread(int32_t x) { return x - Ints{}; }
inline Bits spread(uint32_t x) { return x - Bits{}; }

inline Floats choose(Ints mask, Floats yes, Floats no) {
    return (Floats)((mask & (Ints)yes) | (~mask & (Ints)no));
}

inline Floats larger(Floats a, Floats b) { return choose((Ints)(a > b), a, b); }

inline Ints count_up() {
    Ints x;
    for (int i = 0; i < LANES; ++i) x[i] = i;
    return x;
}

inline float sum(Floats x) {
    float total = 0;
    for (int i = 0; i < LANES; ++i) total += x[i];
    return total;
}

inline float largest(Floats x) {
    float most = x[0];
    for (int i = 1; i < LANES; ++i) most = x[i] > most ? x[i] : most;
    return most;
}

// e^x for x <= 88, to 2 units in the last place; exactly 0 below -87, so that hidden pairs weigh nothing.
inline Floats exponential(Floats x) {
    const Floats kept = x;
    x = larger(x, spread(-87.0f));
    const Floats magic = spread(12582912.0f);  // 1.5 * 2^23: adding it rounds to an integer
    const Floats shifted = x * 1.44269504088896341f + magic;
    const Floats n = shifted - magic;
    const Floats r = (x - n * 0.693359375f) + n * 2.12194440e-4f;
    Floats p = spread(1.9875691500e-4f);
    p = p * r + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    p = p * (r * r) + r + 1.0f;
    const Ints exponent = ((Ints)shifted - (Ints)magic) << 23;
    return (Floats)(((Ints)p + exponent) & (Ints)(kept >= spread(-87.0f)));
}

// Operands of any of the three dtypes, as fp32.

enum Dtype : int32_t { FLOAT32 = 0, BFLOAT16 = 1, FLOAT16 = 2 };

inline float half_to_float(uint16_t half) {
    const uint32_t sign = (uint32_t)(half & 0x8000) << 16, rest = half & 0x7FFF;
    uint32_t bits;
    if (rest >= 0x7C00) {
        bits = sign | 0x7F800000 | (rest & 0x3FF) << 13;  // infinities and NaN
    } else {
        // As if normal, then scaled by 2^112: this serves subnormal numbers too.
        bits = rest << 13;
        float x;
        std::memcpy(&x, &bits, 4);
        x *= 5.192296858534828e+33f;
        std::memcpy(&bits, &x, 4);
        bits |= sign;
    }
    float x;
    std::memcpy(&x, &bits, 4);
    return x;
}

}  // namespace

extern "C" {

// (batch, heads, length, width), the last axis dense; strides in elements.
struct Tensor {
    char* data;
    int32_t dtype, width;
    int64_t batch, head, place;
};

struct Problem {
    Tensor q, k, v;   // k.data null: keys are the queries, scaled to unit length
    Tensor out;       // fp32
    Tensor grad;      // backward: of out
    Tensor dq, dk, dv;  // backward: fp32, zero; dk is scratch where keys are queries
    float* most;      // (rows, length): running maximum; after the forward pass, the log-sum-exp
    float* total;     // (rows, length): running sum; in the backward pass, the sum of grad · out
    const int32_t *order, *rank, *buckets;  // (rows, rounds, length); rank may be null unless once
    int64_t order_row, rank_row, buckets_row;  // strides of a row in elements, 0 where all rows share it
    const int32_t* real;    // (rows)
    const int64_t* keys;    // (rows): of dropout, or null
    double rate;
    float scale;  // of scores, where keys are given
    int32_t batch, heads, rounds, length, reach;
    int32_t window, causal, once, shared;
    int32_t threads;
};
}

namespace {

inline char* row_of(const Tensor& t, int64_t row, int heads) {
    const int64_t size = t.dtype == FLOAT32 ? 4 : 2;
    return t.data + (row / heads * t.batch + row % heads * t.head) * size;
}

inline float* floats_at(const Tensor& t, int64_t row, int heads, int64_t position) {
    return (float*)row_of(t, row, heads) + position * t.place;
}

// Element i of a vector at `position`.
inline void fetch(float* to, const Tensor& t, const char* row, int64_t position) {
    if (t.dtype == FLOAT32) {
        std::memcpy(to, row + position * t.place * 4, 4 * t.width);
        return;
    }
    const char* from = row + position * t.place * 2;
    if (t.dtype == BFLOAT16) {
        for (int i = 0; i < t.width; ++i) {
            uint16_t half;
            std::memcpy(&half, from + 2 * i, 2);
            const uint32_t bits = (uint32_t)half << 16;
            std::memcpy(to + i, &bits, 4);
        }
    } else {
        for (int i = 0; i < t.width; ++i) {
            uint16_t half;
            std::memcpy(&half, from + 2 * i, 2);
            to[i] = half_to_float(half);
        }
    }
}

inline void prefetch(const Tensor& t, const char* row, int64_t position) {
    const int64_t size = t.dtype == FLOAT32 ? 4 : 2;
    const char* from = row + position * t.place * size;
    for (int64_t i = 0; i < t.width * size; i += 64) __builtin_prefetch(from + i);
}

inline void prefetch_floats(const Tensor& t, const float* row, int64_t position) {
    for (int64_t i = 0; i < t.width; i += 16) __builtin_prefetch(row + position * t.place + i, 1);
}

// c[r][0..PANEL) (+)= Σ_t a[r · a_row + t · a_step] · b[t · b_row + 0..PANEL), r < R.
template <int R, bool ADD>
inline void tile(const float* a, int64_t a_row, int64_t a_step, const float* b, int64_t b_row, int64_t steps, float* c,
                 int64_t c_row) {
    Floats acc[R][2];
    for (int r = 0; r < R; ++r) {
        acc[r][0] = ADD ? load<Floats>(c + r * c_row) : Floats{};
        acc[r][1] = ADD ? load<Floats>(c + r * c_row + LANES) : Floats{};
    }
    for (int64_t t = 0; t < steps; ++t) {
        const Floats b0 = load<Floats>(b + t * b_row), b1 = load<Floats>(b + t * b_row + LANES);
#pragma GCC unroll 8
        for (int r = 0; r < R; ++r) {
            const Floats x = spread(a[r * a_row + t * a_step]);
            acc[r][0] += x * b0;
            acc[r][1] += x * b1;
        }
    }
    for (int r = 0; r < R; ++r) {
        store(c + r * c_row, acc[r][0]);
        store(c + r * c_row + LANES, acc[r][1]);
    }
}

template <bool ADD>
inline void tiles(int rows, const float* a, int64_t a_row, int64_t a_step, const float* b, int64_t b_row, int64_t steps,
                  float* c, int64_t c_row) {
    switch (rows) {
        case 6: return tile<6, ADD>(a, a_row, a_step, b, b_row, steps, c, c_row);
        case 5: return tile<5, ADD>(a, a_row, a_step, b, b_row, steps, c, c_row);
        case 4: return tile<4, ADD>(a, a_row, a_step, b, b_row, steps, c, c_row);
        case 3: return tile<3, ADD>(a, a_row, a_step, b, b_row, steps, c, c_row);
        case 2: return tile<2, ADD>(a, a_row, a_step, b, b_row, steps, c, c_row);
        default: return tile<1, ADD>(a, a_row, a_step, b, b_row, steps, c, c_row);
    }
}

// chance.random_bits.
template <class U>
inline U random_bits(uint64_t key, U bits) {
    bits += (uint32_t)key;
    bits ^= bits >> 16;
    bits *= 0x7FEB352Du;
    bits += (uint32_t)(key >> 32);
    bits ^= bits >> 15;
    bits *= 0x846CA68Bu;
    bits ^= bits >> 16;
    return bits;
}

// Factor and log of a query-key's length: key = x · scale; inverse = 1 / (mean(x²) + 1e-6).
// `wide` elements, those beyond d zero.
inline float unit_scale(const float* x, int wide, int d, float* inverse) {
    Floats squares{};
    for (int i = 0; i < wide; i += LANES) {
        const Floats some = load<Floats>(x + i);
        squares += some * some;
    }
    *inverse = 1.0f / (sum(squares) / d + 1e-6f);
    return std::sqrt(*inverse / d);
}

// Lanes with the bit STEP set trade places between a and b: a step of a transposition.
template <int STEP>
inline void trade(Floats& a, Floats& b) {
    Ints low, high;
    for (int i = 0; i < LANES; ++i) low[i] = i & STEP ? LANES + i - STEP : i, high[i] = i & STEP ? LANES + i : i + STEP;
#if defined(__clang__)
    Floats x, y;
    for (int i = 0; i < LANES; ++i) {
        x[i] = low[i] < LANES ? a[low[i]] : b[low[i] - LANES];
        y[i] = high[i] < LANES ? a[high[i]] : b[high[i] - LANES];
    }
#else
    const Floats x = __builtin_shuffle(a, b, low), y = __builtin_shuffle(a, b, high);
#endif
    a = x, b = y;
}

template <int STEP>
inline void trade_all(Floats* x) {
#pragma GCC unroll 16
    for (int i = 0; i < LANES; ++i)
        if (!(i & STEP)) trade<STEP>(x[i], x[i + STEP]);
    if constexpr (2 * STEP < LANES) trade_all<2 * STEP>(x);
}

// A panel (PANEL, stride) as (stride, PANEL); stride a multiple of PANEL.
inline void transpose(float* to, const float* from, int stride) {
    for (int i = 0; i < stride; i += LANES)
        for (int r = 0; r < PANEL; r += LANES) {
            Floats x[LANES];
            for (int n = 0; n < LANES; ++n) x[n] = load<Floats>(from + (r + n) * stride + i);
            trade_all<1>(x);
            for (int n = 0; n < LANES; ++n) store(to + (i + n) * PANEL + r, x[n]);
        }
}

template <class T>
struct Buffer {
    T* data = nullptr;
    explicit Buffer(int64_t n) {
        const int64_t bytes = round_up(std::max<int64_t>(n, 1) * (int64_t)sizeof(T), 64);
        data = (T*)std::aligned_alloc(64, bytes);
        std::memset((void*)data, 0, bytes);
    }
    Buffer(const Buffer&) = delete;
    ~Buffer() { std::free(data); }
    operator T*() const { return data; }
};

struct Shape {
    int before, after, strip, span;
    int d, dv, wide, wide_v;  // widths, and widths padded to whole panels

    explicit Shape(const Problem& p) {
        before = p.reach;
        after = p.window && !p.causal ? p.reach : 0;
        strip = p.window ? STRIP : round_up(STRIP, p.reach);
        if (strip < before + after) strip = round_up(before + after, BLOCK);
        span = round_up(before + strip + after, PANEL) + PANEL;
        d = p.q.width, dv = p.v.width;
        wide = round_up(d, PANEL), wide_v = round_up(dv, PANEL);
    }
};

// What one thread works in.
struct Scratch {
    Buffer<float> k, v, kt, vt, dk, dv;  // keys of the strip: rows, transposed panels, gradients
    Buffer<float> q, grad, result;       // queries of the block
    Buffer<float> weights, slopes;       // (BLOCK, span)
    Buffer<int32_t> where;               // positions of the keys
    std::vector<std::unique_ptr<Buffer<int32_t>>> rank, bucket, ring;  // `once`: keys in earlier rounds
    std::vector<int32_t> low, high;      // of the strip's queries, in the strip's keys

    Scratch(const Problem& p, const Shape& s, bool backward)
        : k(s.span * s.wide),
          v(backward ? 0 : s.span * s.wide_v),
          kt(s.span * s.wide),
          vt(backward ? s.span * s.wide_v : 0),
          dk(backward ? s.span * s.wide : 0),
          dv(backward ? s.span * s.wide_v : 0),
          q(BLOCK * s.wide),
          grad(backward ? BLOCK * s.wide_v : 0),
          result(BLOCK * std::max(s.wide, s.wide_v)),
          weights(BLOCK * s.span),
          slopes(backward ? BLOCK * s.span : 0),
          where(s.span),
          low(s.strip),
          high(s.strip) {
        for (int r = 0; p.once && r < p.rounds; ++r) {
            rank.emplace_back(new Buffer<int32_t>(s.span));
            bucket.emplace_back(new Buffer<int32_t>(s.span));
            ring.emplace_back(new Buffer<int32_t>(s.span));
        }
    }
};

// One strip of one round of one row, or what its first chunk meets in the ring.
template <bool BACKWARD>
struct Strip {
    const Problem& p;
    const Shape& s;
    Scratch& x;
    const int64_t row;
    const int round;
    const bool in_ring;
    const int real;
    const int32_t *order, *buckets;  // of this round
    const char *q_row, *k_row, *v_row, *grad_row;
    int first, last;  // seats of the queries
    int keys = 0;     // how many, from x.where

    Strip(const Problem& p, const Shape& s, Scratch& x, int64_t row, int round, int first, bool in_ring)
        : p(p), s(s), x(x), row(row), round(round), in_ring(in_ring), real(p.real[row]) {
        order = order_of(round);
        buckets = p.buckets + row * p.buckets_row + (int64_t)round * p.length;
        q_row = row_of(p.q, row, p.heads);
        k_row = p.k.data ? row_of(p.k, row, p.heads) : q_row;
        v_row = row_of(p.v, row, p.heads);
        grad_row = BACKWARD ? row_of(p.grad, row, p.heads) : nullptr;
        this->first = first;
        last = std::min(first + (in_ring ? p.reach : s.strip), real);
    }

    const int32_t* order_of(int r) const { return p.order + row * p.order_row + (int64_t)r * p.length; }
    const int32_t* rank_of(int r) const { return p.rank + row * p.rank_row + (int64_t)r * p.length; }
    int previous(int r) const { return r ? r - 1 : p.rounds - 1; }
    int ring_start() const { return (std::max(real, 1) - 1) / p.reach * p.reach; }

    void run() {
        if (first >= last) return;
        seat_keys();
        if (p.once) recall_earlier();
        for (int i = first; i < std::min(first + BLOCK, last); ++i) expect(order[i]);
        gather_keys();
        for (int start = first; start < last; start += BLOCK) serve(start, std::min(start + BLOCK, last));
        if (BACKWARD) return_gradients();
    }

    // The keys' positions, and of every query the interval of keys that it meets in this round.
    void seat_keys() {
        int from, to;
        if (in_ring) {
            from = ring_start(), to = real;
            const int32_t* other = order_of(previous(round));
            for (int j = from; j < to; ++j) x.where[j - from] = other[j];
            for (int i = first; i < last; ++i) x.low[i - first] = 0, x.high[i - first] = to - from;
        } else if (p.window) {
            from = std::max(first - p.reach, 0), to = p.causal ? last : std::min(last + p.reach, real);
            int start = first;  // of the bucket, no further back than matters
            while (start > from && buckets[start - 1] == buckets[first]) --start;
            from = start;
            for (int i = first; i < last; ++i) {
                if (i > first && buckets[i] != buckets[i - 1]) start = i;
                x.low[i - first] = std::max(i - p.reach, start) - from;
            }
            int end = last;
            while (end < to && buckets[end] == buckets[last - 1]) ++end;
            to = end;
            for (int i = last - 1; i >= first; --i) {
                if (i < last - 1 && buckets[i] != buckets[i + 1]) end = i + 1;
                const int high = p.causal ? i + !p.shared : std::min(i + p.reach + 1, end);
                x.high[i - first] = high - from;
            }
            for (int j = from; j < to; ++j) x.where[j - from] = order[j];
        } else {
            from = std::max(first / p.reach - 1, 0) * p.reach, to = last;
            for (int i = first; i < last; ++i) {
                const int chunk = i / p.reach * p.reach;
                x.low[i - first] = std::max(chunk - p.reach, 0) - from;
                x.high[i - first] = std::min(chunk + p.reach, last) - from;
            }
            for (int j = from; j < to; ++j) x.where[j - from] = order[j];
        }
        keys = to - from;
        for (int j = keys; j < round_up(keys, PANEL); ++j) x.where[j] = -1;
    }

    // Where the keys sat in earlier rounds (in the ring: in this one too).
    void recall_earlier() {
        for (int r = 0; r < round + in_ring; ++r) {
            const int32_t *rank = rank_of(r), *bucket = p.buckets + row * p.buckets_row + (int64_t)r * p.length;
            const int32_t* before = rank_of(previous(r));
            for (int j = 0; j < keys; ++j) {
                const int position = x.where[j], seat = rank[position];
                (*x.rank[r])[j] = p.window ? seat : seat / p.reach;
                (*x.bucket[r])[j] = bucket[seat];
                (*x.ring[r])[j] = before[position] >= ring_start() ? -1 : 0;
            }
        }
    }

    void gather_keys() {
        constexpr int AHEAD = 8;
        const Tensor& keys_from = p.k.data ? p.k : p.q;
        const int padded = round_up(keys, PANEL);
        for (int j = 0; j < padded; ++j) {
            float* k = x.k + j * s.wide;
            if (j + AHEAD < keys) {
                prefetch(keys_from, k_row, x.where[j + AHEAD]);
                prefetch(p.v, v_row, x.where[j + AHEAD]);
            }
            if (j < keys) {
                fetch(k, keys_from, k_row, x.where[j]);
                float inverse;
                const float scale = p.k.data ? p.scale : unit_scale(k, s.wide, s.d, &inverse);
                for (int i = 0; i < s.d; ++i) k[i] *= scale;
            } else {
                std::memset(k, 0, 4 * s.wide);
            }
            if (BACKWARD) continue;
            float* v = x.v + j * s.wide_v;
            if (j < keys)
                fetch(v, p.v, v_row, x.where[j]);
            else
                std::memset(v, 0, 4 * s.wide_v);
        }
        for (int panel = 0; panel < padded; panel += PANEL)
            transpose(x.kt + panel * s.wide, x.k + panel * s.wide, s.wide);
        if (!BACKWARD) return;
        // The gradients' rows hold the values until they are transposed.
        for (int j = 0; j < padded; ++j) {
            float* v = x.dv + j * s.wide_v;
            if (j < keys)
                fetch(v, p.v, v_row, x.where[j]);
            else
                std::memset(v, 0, 4 * s.wide_v);
        }
        for (int panel = 0; panel < padded; panel += PANEL)
            transpose(x.vt + panel * s.wide_v, x.dv + panel * s.wide_v, s.wide_v);
        std::memset(x.dk, 0, 4 * padded * s.wide);
        std::memset(x.dv, 0, 4 * padded * s.wide_v);
    }

    // The queries of seats [start, stop).
    void serve(int start, int stop) {
        const int count = stop - start, groups = (count + ROWS - 1) / ROWS;
        int begin[BLOCK / ROWS + 1], end[BLOCK / ROWS + 1];  // panels of each group
        int base = std::numeric_limits<int>::max(), top = 0;
        for (int g = 0; g < groups; ++g) {
            int low = std::numeric_limits<int>::max(), high = 0;
            for (int i = g * ROWS; i < std::min((g + 1) * ROWS, count); ++i) {
                const int l = x.low[start - first + i], h = x.high[start - first + i];
                if (l < h) low = std::min(low, l), high = std::max(high, h);
            }
            begin[g] = low < high ? low / PANEL : 0;
            end[g] = low < high ? (high + PANEL - 1) / PANEL : 0;
            if (low < high) base = std::min(base, begin[g]), top = std::max(top, end[g]);
        }
        if (top == 0) return;
        const int64_t line = (int64_t)(top - base) * PANEL;
        for (int i = 0; i < count; ++i) {
            if (start + i + BLOCK < last) expect(order[start + i + BLOCK]);
            fetch(x.q + i * s.wide, p.q, q_row, order[start + i]);
            if (BACKWARD) fetch(x.grad + i * s.wide_v, p.grad, grad_row, order[start + i]);
        }
        for (int g = 0; g < groups; ++g) {
            const int from = g * ROWS, rows = std::min(ROWS, count - from);
            if (begin[g] == end[g]) {
                continue;
            }
            for (int panel = begin[g]; panel < end[g]; ++panel) {
                const int64_t place = from * line + (panel - base) * PANEL;
                tiles<false>(rows, x.q + from * s.wide, s.wide, 1, x.kt + (int64_t)panel * PANEL * s.wide, PANEL, s.d,
                             x.weights + place, line);
                if (BACKWARD)
                    tiles<false>(rows, x.grad + from * s.wide_v, s.wide_v, 1,
                                 x.vt + (int64_t)panel * PANEL * s.wide_v, PANEL, s.dv, x.slopes + place, line);
            }
            for (int i = from; i < from + rows; ++i) {
                float* weights = x.weights + i * line - base * PANEL;
                if (BACKWARD)
                    slope(start + i, weights, x.slopes + i * line - base * PANEL, begin[g], end[g]);
                else
                    soften(start + i, weights, begin[g], end[g], i);
            }
            const int64_t place = from * line + (begin[g] - base) * PANEL;
            const int64_t key = begin[g] * PANEL, steps = (end[g] - begin[g]) * PANEL;
            const int width = BACKWARD ? s.wide : s.wide_v;
            const float* a = (BACKWARD ? x.slopes : x.weights) + place;
            const float* b = (BACKWARD ? x.k + key * s.wide : x.v + key * s.wide_v);
            for (int c = 0; c < width; c += PANEL)
                tiles<false>(rows, a, line, 1, b + c, width, steps, x.result + from * width + c, width);
            for (int i = from; i < from + rows; ++i) {
                if (BACKWARD) {
                    float* to = floats_at(p.dq, row, p.heads, order[start + i]);
                    const float* result = x.result + i * width;
                    for (int c = 0; c < s.d; ++c) to[c] += result[c];
                } else {
                    merge(order[start + i], x.result + i * width, i);
                }
            }
        }
        if (BACKWARD) give(count, groups, begin, end, base, top, line);
    }

    // What a query of the next block will need, on its way to the cache.
    void expect(int position) const {
        prefetch(p.q, q_row, position);
        if (BACKWARD) prefetch(p.grad, grad_row, position);
        const Tensor& to = BACKWARD ? p.dq : p.out;
        prefetch_floats(to, (float*)row_of(to, row, p.heads), position);
        __builtin_prefetch(p.most + row * p.length + position, 1);
        __builtin_prefetch(p.total + row * p.length + position, 1);
    }

    float most[BLOCK], total[BLOCK];

    // Scores of one query -> weights relative to their maximum.
    void soften(int seat, float* weights, int begin, int end, int i) {
        Floats high = spread(HIDDEN);
        const Mask mask(*this, seat);
        for (int panel = begin; panel < end; ++panel)
            for (int half = 0; half < 2; ++half) {
                float* at = weights + panel * PANEL + half * LANES;
                const Floats score = mask.hide(load<Floats>(at), panel * PANEL + half * LANES);
                high = larger(high, score);
                store(at, score);
            }
        most[i] = largest(high);
        // If all are hidden, a weight must still become 0.
        const Floats from = spread(most[i] <= HIDDEN ? 0.0f : most[i]);
        Floats sums{};
        for (int panel = begin; panel < end; ++panel)
            for (int half = 0; half < 2; ++half) {
                float* at = weights + panel * PANEL + half * LANES;
                Floats weight = exponential(load<Floats>(at) - from);
                sums += weight;
                if (p.keys) weight *= mask.kept(panel * PANEL + half * LANES);
                store(at, weight);
            }
        total[i] = sum(sums);
    }

    // The result of one query joins those of the rounds before.
    void merge(int position, const float* result, int i) {
        float* out = floats_at(p.out, row, p.heads, position);
        float &high = p.most[row * p.length + position], &all = p.total[row * p.length + position];
        if (most[i] <= HIDDEN) return;
        const float top = std::max(high, most[i]);
        const float old = high <= HIDDEN ? 0.0f : std::exp(high - top), now = std::exp(most[i] - top);
        for (int c = 0; c < s.dv; ++c) out[c] = out[c] * old + result[c] * now;
        all = all * old + total[i] * now;
        high = top;
    }

    // Scores and products grad · v of one query -> weights, and the slope of the loss in every score.
    void slope(int seat, float* weights, float* slopes, int begin, int end) {
        const int64_t place = row * p.length + order[seat];
        const Floats lse = spread(p.most[place]), pull = spread(p.total[place]);
        const Mask mask(*this, seat);
        for (int panel = begin; panel < end; ++panel)
            for (int half = 0; half < 2; ++half) {
                const int key = panel * PANEL + half * LANES;
                const Floats weight = exponential(mask.hide(load<Floats>(weights + key), key) - lse);
                Floats dropped = weight, product = load<Floats>(slopes + key);
                if (p.keys) {
                    const Floats kept = mask.kept(key);
                    dropped *= kept, product *= kept;
                }
                store(weights + key, dropped);
                store(slopes + key, weight * (product - pull));
            }
    }

    // Gradients of keys and values: every panel from the groups of queries that touched it.
    void give(int count, int groups, const int* begin, const int* end, int base, int top, int64_t line) {
        for (int panel = base; panel < top; ++panel) {
            int g = 0;
            while (g < groups) {
                while (g < groups && !(begin[g] <= panel && panel < end[g])) ++g;
                const int from = g * ROWS;
                while (g < groups && begin[g] <= panel && panel < end[g]) ++g;
                const int steps = std::min(g * ROWS, count) - from;
                if (steps <= 0) break;
                for (int r = 0; r < PANEL; r += ROWS) {
                    const int rows = std::min(ROWS, PANEL - r);
                    const int64_t key = (int64_t)panel * PANEL + r;
                    const int64_t place = from * line + (panel - base) * PANEL + r;
                    for (int c = 0; c < s.wide_v; c += PANEL)
                        tiles<true>(rows, x.weights + place, 1, line, x.grad + from * s.wide_v + c, s.wide_v, steps,
                                    x.dv + key * s.wide_v + c, s.wide_v);
                    for (int c = 0; c < s.wide; c += PANEL)
                        tiles<true>(rows, x.slopes + place, 1, line, x.q + from * s.wide + c, s.wide, steps,
                                    x.dk + key * s.wide + c, s.wide);
                }
            }
        }
    }

    void return_gradients() {
        constexpr int AHEAD = 8;
        float *dk = (float*)row_of(p.dk, row, p.heads), *dv = (float*)row_of(p.dv, row, p.heads);
        for (int j = 0; j < keys; ++j) {
            if (j + AHEAD < keys) {
                prefetch_floats(p.dk, dk, x.where[j + AHEAD]);
                prefetch_floats(p.dv, dv, x.where[j + AHEAD]);
            }
            float *to = dk + x.where[j] * p.dk.place, *to_v = dv + x.where[j] * p.dv.place;
            const float scale = p.k.data ? p.scale : 1.0f;  // finish_backward scales to unit length
            for (int c = 0; c < s.d; ++c) to[c] += scale * x.dk[j * s.wide + c];
            for (int c = 0; c < s.dv; ++c) to_v[c] += x.dv[j * s.wide_v + c];
        }
    }

    // Who of the strip's keys one query meets.
    struct Mask {
        const Strip& t;
        const int32_t position, low, high;
        const int seat;

        Mask(const Strip& t, int seat)
            : t(t),
              position(t.order[seat]),
              low(t.x.low[seat - t.first]),
              high(t.x.high[seat - t.first]),
              seat(seat) {}

        Floats hide(Floats score, int key) const {
            const Problem& p = t.p;
            const bool plain = (p.window && (p.causal || !p.shared)) || (!p.window && !p.causal && !p.shared);
            if (plain && !p.once && key >= low && key + LANES <= high) return score;
            const Ints number = count_up() + key;
            Ints met = (Ints)(number >= spread(low)) & (Ints)(number < spread(high));
            if (!plain) {
                const Ints other = load<Ints>(t.x.where + key);
                if (!p.window && p.causal)
                    met &= (Ints)(other < spread(position + !p.shared));
                else
                    met &= (Ints)(other != spread(position));
            }
            if (p.once) met &= ~met_before(key);
            return choose(met, score, spread(HIDDEN));
        }

        Ints met_before(int key) const {
            const Problem& p = t.p;
            Ints met{};
            for (int r = 0; r < t.round + t.in_ring; ++r) {
                const int own = t.rank_of(r)[position];
                const Ints rank = load<Ints>(*t.x.rank[r] + key);
                if (p.window) {
                    const int32_t bucket = t.p.buckets[t.row * p.buckets_row + (int64_t)r * p.length + own];
                    const Ints same = (Ints)(load<Ints>(*t.x.bucket[r] + key) == spread(bucket));
                    const Ints back = spread(own) - rank;
                    const Ints near = (Ints)(back <= spread(p.reach)) & (Ints)(back >= spread(-p.reach));
                    met |= same & near;
                } else {
                    const int chunk = own / p.reach;
                    met |= (Ints)(rank == spread(chunk)) | (Ints)(rank == spread(chunk - 1));
                    // The ring of this round is what is being asked about.
                    if (chunk == 0 && r < t.round) met |= load<Ints>(*t.x.ring[r] + key);
                }
            }
            return met;
        }

        Floats kept(int key) const {
            const Problem& p = t.p;
            const uint64_t seed = (uint64_t)p.keys[t.row];
            const uint32_t query = random_bits<uint32_t>(seed, (uint32_t)position);
            const Bits bits = random_bits<Bits>(seed, spread(query) ^ (Bits)load<Ints>(t.x.where + key));
            const int32_t least = (int32_t)(std::llrint(p.rate * 4294967296.0) - 2147483648ll);
            return choose((Ints)((Ints)bits >= spread(least)), spread((float)(1.0 / (1.0 - p.rate))), Floats{});
        }
    };
};

// What happens to the weight of a position for itself, where it meets nothing else.
inline float self_scale(const Problem& p, int64_t row, int position) {
    if (!p.keys) return 1.0f;
    const uint64_t seed = (uint64_t)p.keys[row];
    const uint32_t query = random_bits<uint32_t>(seed, (uint32_t)position);
    const int32_t bits = (int32_t)random_bits<uint32_t>(seed, query ^ (uint32_t)position);
    const int64_t least = std::llrint(p.rate * 4294967296.0) - 2147483648ll;
    return bits >= least ? (float)(1.0 / (1.0 - p.rate)) : 0.0f;
}

// Work in phases: a phase is done when all its tasks are. Every thread works in a scratch of its own.
template <class Space>
struct Phase {
    int64_t tasks;
    std::function<void(int64_t, Space&)> run;
};

template <class Space, class... Arguments>
void run_phases(int threads, const std::vector<Phase<Space>>& phases, const Arguments&... arguments) {
    threads = std::max(threads, 1);
    std::vector<std::atomic<int64_t>> next(phases.size());
    for (auto& n : next) n = 0;
    std::atomic<int64_t> arrived{0};
    auto work = [&] {
        Space scratch(arguments...);
        for (size_t i = 0; i < phases.size(); ++i) {
            for (int64_t task; (task = next[i]++) < phases[i].tasks;) phases[i].run(task, scratch);
            ++arrived;
            for (int spins = 0; arrived < (int64_t)(i + 1) * threads; ++spins)
                if (spins > 1000) std::this_thread::yield();
        }
    };
    std::vector<std::thread> others;
    for (int i = 1; i < threads; ++i) others.emplace_back(work);
    work();
    for (auto& thread : others) thread.join();
}

constexpr int SPREAD = 1024;  // positions of a task that only goes through them

// Rows at a time: few, so that their vectors stay in the shared cache; enough to keep all threads at work.
int64_t rows_at_a_time(const Problem& p, const Shape& s) {
    const int64_t strips = (p.length + s.strip - 1) / s.strip, rows = (int64_t)p.batch * p.heads;
    return std::min(rows, std::max<int64_t>(1, (8 * p.threads + strips - 1) / strips));
}

// By seat, since seats tell who is real.
void finish_forward(const Problem& p, const Shape& s, int64_t row, int64_t begin) {
    const int32_t* order = p.order + row * p.order_row;
    const char* v_row = row_of(p.v, row, p.heads);
    Buffer<float> value(s.wide_v);
    for (int64_t seat = begin; seat < std::min<int64_t>(begin + SPREAD, p.length); ++seat) {
        const int32_t position = order[seat];
        float* out = floats_at(p.out, row, p.heads, position);
        float &lse = p.most[row * p.length + position], total = p.total[row * p.length + position];
        if (lse > HIDDEN) {
            const float share = 1.0f / total;
            for (int c = 0; c < s.dv; ++c) out[c] *= share;
            lse += std::log(total);
            continue;
        }
        lse = NOBODY;
        if (seat >= p.real[row]) continue;
        const float scale = self_scale(p, row, position);
        fetch(value, p.v, v_row, position);
        for (int c = 0; c < s.dv; ++c) out[c] = value[c] * scale;
    }
}

void begin_backward(const Problem& p, const Shape& s, int64_t row, int64_t begin) {
    const int32_t* order = p.order + row * p.order_row;
    const char* grad_row = row_of(p.grad, row, p.heads);
    Buffer<float> grad(s.wide_v);
    for (int64_t seat = begin; seat < std::min<int64_t>(begin + SPREAD, p.length); ++seat) {
        const int32_t position = order[seat];
        const float* out = floats_at(p.out, row, p.heads, position);
        fetch(grad, p.grad, grad_row, position);
        float pull = 0;
        for (int c = 0; c < s.dv; ++c) pull += grad[c] * out[c];
        p.total[row * p.length + position] = pull;
        if (p.most[row * p.length + position] < NOBODY || seat >= p.real[row]) continue;
        const float scale = self_scale(p, row, position);
        float* dv = floats_at(p.dv, row, p.heads, position);
        for (int c = 0; c < s.dv; ++c) dv[c] += grad[c] * scale;
    }
}

// Through key = query · scale(query): dq += scale · (dk − query · (query · dk) / (d · (mean(query²) + 1e-6))).
void finish_backward(const Problem& p, const Shape& s, int64_t row, int64_t begin) {
    const char* q_row = row_of(p.q, row, p.heads);
    Buffer<float> query(s.wide);
    for (int64_t position = begin; position < std::min<int64_t>(begin + SPREAD, p.length); ++position) {
        fetch(query, p.q, q_row, position);
        float inverse;
        const float scale = unit_scale(query, s.wide, s.d, &inverse);
        const float* dk = floats_at(p.dk, row, p.heads, position);
        float* dq = floats_at(p.dq, row, p.heads, position);
        float along = 0;
        for (int c = 0; c < s.d; ++c) along += query[c] * dk[c];
        along *= inverse / s.d;
        for (int c = 0; c < s.d; ++c) dq[c] += scale * (dk[c] - query[c] * along);
    }
}

// The tasks of some rows, cut along the length in pieces.
void add_phase(std::vector<Phase<Scratch>>& phases, int64_t first_row, int64_t rows, int64_t pieces,
               std::function<void(int64_t, int64_t, Scratch&)> run) {
    if (pieces > 0)
        phases.push_back({rows * pieces, [=](int64_t task, Scratch& scratch) {
                              run(first_row + task / pieces, task % pieces, scratch);
                          }});
}

}  // namespace

extern "C" {

// Buckets by angular hashing.
struct Hashing {
    Tensor x;
    const float* rotations;  // (rounds, factors, heads, half of the factor, width)
    const int32_t* halves;   // of every factor
    int32_t* buckets;        // (rows, rounds, length)
    int32_t factors, batch, heads, rounds, length, threads;
};

// Seats from buckets: a stable sort by counting.
struct Sorting {
    const int32_t* buckets;  // (rows, rounds, length), none negative
    const int32_t* hidden;   // (rows, length): 1 where a position is not real; or null
    int32_t *order, *seated;
    int32_t rows, rounds, length, n_buckets, threads;
};
}

namespace {

struct HashSpace {
    Buffer<float> x, xt, products;
    explicit HashSpace(int wide) : x(PANEL * wide), xt(PANEL * wide), products(ROWS * PANEL) {}
};

// PANEL positions at a time, transposed, so that lanes are positions: no sum or maximum goes across lanes.
void hash_positions(const Hashing& h, int wide, int64_t row, int64_t begin, HashSpace& space) {
    const char* x_row = row_of(h.x, row, h.heads);
    const int64_t end = std::min<int64_t>(begin + SPREAD, h.length);
    for (int64_t first = begin; first < end; first += PANEL) {
        const int count = std::min<int64_t>(PANEL, end - first);
        for (int i = 0; i < count; ++i) fetch(space.x + i * wide, h.x, x_row, first + i);
        transpose(space.xt, space.x, wide);
        const float* rotations = h.rotations;
        for (int round = 0; round < h.rounds; ++round) {
            Ints bucket[2] = {};
            int32_t weight = 1;
            for (int f = 0; f < h.factors; ++f) {
                const int half = h.halves[f];
                const float* rotation = rotations + row % h.heads * half * h.x.width;
                rotations += (int64_t)h.heads * half * h.x.width;
                Floats most[2] = {}, least[2] = {};
                Ints place[2] = {}, opposite[2] = {};
                for (int r = 0; r < half; r += ROWS) {
                    const int some = std::min(ROWS, half - r);
                    tiles<false>(some, rotation + (int64_t)r * h.x.width, h.x.width, 1, space.xt, PANEL, h.x.width,
                                 space.products, PANEL);
                    for (int i = 0; i < some; ++i)
                        for (int part = 0; part < 2; ++part) {
                            const Floats product = load<Floats>(space.products + i * PANEL + part * LANES);
                            const Ints now = spread(r + i);
                            if (r + i == 0) {
                                most[part] = least[part] = product;
                                continue;
                            }
                            const Ints above = (Ints)(product > most[part]), below = (Ints)(product < least[part]);
                            most[part] = choose(above, product, most[part]);
                            least[part] = choose(below, product, least[part]);
                            place[part] = (above & now) | (~above & place[part]);
                            opposite[part] = (below & now) | (~below & opposite[part]);
                        }
                }
                for (int part = 0; part < 2; ++part) {
                    const Ints positive = (Ints)(most[part] >= -least[part]);
                    const Ints hash = (positive & place[part]) | (~positive & (opposite[part] + half));
                    bucket[part] += hash * weight;
                }
                weight *= 2 * half;
            }
            int32_t buckets[PANEL];
            store(buckets, bucket[0]);
            store(buckets + LANES, bucket[1]);
            std::memcpy(h.buckets + (row * h.rounds + round) * h.length + first, buckets, 4 * count);
        }
    }
}

struct SortSpace {
    std::vector<int32_t> starts;
    explicit SortSpace(int n_buckets) : starts(n_buckets + 2) {}
};

void sort_positions(const Sorting& s, int64_t task, SortSpace& space) {
    const int32_t* buckets = s.buckets + task * s.length;
    const int32_t* hidden = s.hidden ? s.hidden + task / s.rounds * s.length : nullptr;
    int32_t *order = s.order + task * s.length, *seated = s.seated + task * s.length;
    std::vector<int32_t>& next = space.starts;
    std::fill(next.begin(), next.end(), 0);
    auto bucket_of = [&](int i) { return hidden && hidden[i] ? s.n_buckets : buckets[i]; };
    for (int i = 0; i < s.length; ++i) ++next[bucket_of(i) + 1];
    for (size_t b = 1; b < next.size(); ++b) next[b] += next[b - 1];
    for (int i = 0; i < s.length; ++i) {
        const int32_t bucket = bucket_of(i), seat = next[bucket]++;
        order[seat] = i, seated[seat] = bucket;
    }
}

}  // namespace

extern "C" {

void megabase_hash(const Hashing* hashing) {
    const Hashing& h = *hashing;
    const int wide = round_up(h.x.width, PANEL);
    const int64_t pieces = (h.length + SPREAD - 1) / SPREAD;
    const std::vector<Phase<HashSpace>> phases{
        {(int64_t)h.batch * h.heads * pieces, [&](int64_t task, HashSpace& space) {
             hash_positions(h, wide, task / pieces, task % pieces * SPREAD, space);
         }}};
    run_phases(h.threads, phases, wide);
}

void megabase_sort(const Sorting* sorting) {
    const Sorting& s = *sorting;
    const std::vector<Phase<SortSpace>> phases{
        {(int64_t)s.rows * s.rounds, [&](int64_t task, SortSpace& space) { sort_positions(s, task, space); }}};
    run_phases(s.threads, phases, s.n_buckets);
}

void megabase_forward(const Problem* problem) {
    const Problem& p = *problem;
    const Shape s(p);
    const int64_t rows = (int64_t)p.batch * p.heads, step = rows_at_a_time(p, s);
    const int64_t strips = (p.length + s.strip - 1) / s.strip, pieces = (p.length + SPREAD - 1) / SPREAD;
    std::vector<Phase<Scratch>> phases;
    for (int64_t row = 0; row < rows; row += step) {
        const int64_t some = std::min(step, rows - row);
        for (int round = 0; round < p.rounds; ++round)
            add_phase(phases, row, some, strips, [&p, &s, round](int64_t row, int64_t strip, Scratch& x) {
                Strip<false>(p, s, x, row, round, strip * s.strip, false).run();
                if (!p.window && strip == 0) Strip<false>(p, s, x, row, round, 0, true).run();
            });
        add_phase(phases, row, some, pieces,
                  [&p, &s](int64_t row, int64_t piece, Scratch&) { finish_forward(p, s, row, piece * SPREAD); });
    }
    run_phases(p.threads, phases, p, s, false);
}

void megabase_backward(const Problem* problem) {
    const Problem& p = *problem;
    const Shape s(p);
    const int64_t rows = (int64_t)p.batch * p.heads, step = rows_at_a_time(p, s);
    const int64_t strips = (p.length + s.strip - 1) / s.strip, pieces = (p.length + SPREAD - 1) / SPREAD;
    std::vector<Phase<Scratch>> phases;
    for (int64_t row = 0; row < rows; row += step) {
        const int64_t some = std::min(step, rows - row);
        add_phase(phases, row, some, pieces,
                  [&p, &s](int64_t row, int64_t piece, Scratch&) { begin_backward(p, s, row, piece * SPREAD); });
        for (int round = 0; round < p.rounds; ++round) {
            for (int parity = 0; parity < 2; ++parity)
                add_phase(phases, row, some, (strips + 1 - parity) / 2,
                          [&p, &s, round, parity](int64_t row, int64_t pair, Scratch& x) {
                              Strip<true>(p, s, x, row, round, (2 * pair + parity) * s.strip, false).run();
                          });
            if (!p.window)
                add_phase(phases, row, some, 1, [&p, &s, round](int64_t row, int64_t, Scratch& x) {
                    Strip<true>(p, s, x, row, round, 0, true).run();
                });
        }
        if (!p.k.data)
            add_phase(phases, row, some, pieces,
                      [&p, &s](int64_t row, int64_t piece, Scratch&) { finish_backward(p, s, row, piece * SPREAD); });
    }
    run_phases(p.threads, phases, p, s, true);
}

}  // extern "C"
