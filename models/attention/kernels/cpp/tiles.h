// Small matrix products, as outer products accumulated in registers.

#pragma once

#include "vectors.h"

namespace {

constexpr int ROWS = 6;  // times PANEL: 12 accumulators, which hide the latency of a multiply-add

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
            const Floats x = broadcast(a[r * a_row + t * a_step]);
            acc[r][0] += x * b0;
            acc[r][1] += x * b1;
        }
    }
    for (int r = 0; r < R; ++r) {
        store(c + r * c_row, acc[r][0]);
        store(c + r * c_row + LANES, acc[r][1]);
    }
}

// `tile` for a number of rows that is known only at run time, from 1 to ROWS.
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

}  // namespace
