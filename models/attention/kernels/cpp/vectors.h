// Vectors of the machine's width (extensions of GCC and Clang), functions of vectors, and memory for them.

#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>

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

constexpr int PANEL = 2 * LANES;  // keys, or columns, of a tile of products

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

inline Floats broadcast(float x) { return x - Floats{}; }
inline Ints broadcast(int32_t x) { return x - Ints{}; }
inline Bits broadcast(uint32_t x) { return x - Bits{}; }

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

inline float dot(const float* a, const float* b, int n) {
    Floats sums{};
    int i = 0;
    for (; i + LANES <= n; i += LANES) sums += load<Floats>(a + i) * load<Floats>(b + i);
    float total = sum(sums);
    for (; i < n; ++i) total += a[i] * b[i];
    return total;
}

// e^x for x <= 88, to 2 units in the last place; exactly 0 below -87, so that excluded pairs have weight 0.
inline Floats exponential(Floats x) {
    const Floats kept = x;
    x = larger(x, broadcast(-87.0f));
    const Floats magic = broadcast(12582912.0f);  // 1.5 * 2^23: adding it rounds to an integer
    const Floats shifted = x * 1.44269504088896341f + magic;
    const Floats n = shifted - magic;
    const Floats r = (x - n * 0.693359375f) + n * 2.12194440e-4f;
    Floats p = broadcast(1.9875691500e-4f);
    p = p * r + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    p = p * (r * r) + r + 1.0f;
    const Ints exponent = ((Ints)shifted - (Ints)magic) << 23;
    return (Floats)(((Ints)p + exponent) & (Ints)(kept >= broadcast(-87.0f)));
}

// Swap the lanes of a whose number has the bit STEP with those of b whose number lacks it: one step of a transposition.
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

// Transpose a panel (PANEL, stride) to (stride, PANEL). stride is a multiple of PANEL.
inline void transpose(float* to, const float* from, int stride) {
    for (int i = 0; i < stride; i += LANES)
        for (int r = 0; r < PANEL; r += LANES) {
            Floats x[LANES];
            for (int n = 0; n < LANES; ++n) x[n] = load<Floats>(from + (r + n) * stride + i);
            trade_all<1>(x);
            for (int n = 0; n < LANES; ++n) store(to + (i + n) * PANEL + r, x[n]);
        }
}

// Memory for n elements: zeros, aligned to a cache line.
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

}  // namespace
