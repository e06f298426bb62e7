// The tensors that Python passes: strided, in one of three dtypes, read as fp32.

#pragma once

#include <cstdint>
#include <cstring>

extern "C" {

// (batch, heads, length, width), the last axis dense; strides in elements.
struct Tensor {
    char* data;
    int32_t dtype, width;
    int64_t batch, head, place;
};
}

namespace {

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

inline char* row_of(const Tensor& t, int64_t row, int heads) {
    const int64_t size = t.dtype == FLOAT32 ? 4 : 2;
    return t.data + (row / heads * t.batch + row % heads * t.head) * size;
}

inline float* floats_at(const Tensor& t, int64_t row, int heads, int64_t position) {
    return (float*)row_of(t, row, heads) + position * t.place;
}

// Copy the vector at `position` to `to`, as fp32.
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

}  // namespace
