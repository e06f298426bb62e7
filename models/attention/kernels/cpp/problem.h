// The arguments of attention, and what follows from them: dropout, unit keys, sizes, the memory of a thread.

#pragma once

#include <algorithm>
#include <memory>
#include <vector>

#include "tensors.h"
#include "tiles.h"

extern "C" {

// Attention of rows = batch × heads, as native.py passes them.
struct Problem {
    Tensor q, k, v;     // k.data null: keys are the queries, scaled to unit length
    Tensor out;         // fp32
    Tensor grad;        // backward: of out
    Tensor dq, dk, dv;  // backward: fp32, zero; dk is scratch memory if keys are queries
    float* peak;        // (rows, length): running maximum; after the forward pass, the log-sum-exp
    float* total;       // (rows, length): running sum; in the backward pass, the sum of grad · out
    const int32_t *positions, *slots, *buckets;     // (rows, rounds, length), of SortedOrder; slots only if once
    int64_t positions_row, slots_row, buckets_row;  // elements from row to row, 0 if all rows share a table
    const int32_t* real_lengths;               // (rows)
    const int64_t* dropout_keys;               // (rows), or null: no dropout
    double rate;                               // of dropout
    float scale;                               // of scores, if k is given
    int32_t batch, heads, rounds, length, reach;
    int32_t window, causal, once;
    int32_t excludes_own, own_if_alone;             // Rule.own: not `always`; `alone`
    int32_t threads;
    // Queries exist from this position on (`length` counts keys); q and out have no memory before it. Forward only.
    int32_t first_query;
};
}

namespace {

constexpr int BLOCK = 24;   // queries whose weights exist at once
constexpr int STRIP = 240;  // slots of a strip, a multiple of BLOCK

constexpr float EXCLUDED = -1e30f;  // score of a pair that does not count
constexpr float EMPTY = 1e30f;      // log-sum-exp of a position that attends to nothing: all its weights become 0

// random_bits of models/chance.py.
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

// Attention dropout, as PairDropout in inputs.py defines it.
struct Dropout {
    uint64_t seed;
    int32_t least;  // a pair whose bits are at least this is kept
    float scale;

    Dropout(const Problem& p, int64_t row)
        : seed((uint64_t)p.dropout_keys[row]),
          least((int32_t)(std::llrint(p.rate * 4294967296.0) - 2147483648ll)),
          scale((float)(1.0 / (1.0 - p.rate))) {}

    Floats kept(int32_t query, Ints keys) const {
        const Bits bits = random_bits<Bits>(seed, broadcast(random_bits<uint32_t>(seed, query)) ^ (Bits)keys);
        return choose((Ints)((Ints)bits >= broadcast(least)), broadcast(scale), Floats{});
    }
};

// The weight of a position's own value, if it attends to nothing else: 1, or what dropout makes of it.
inline float self_scale(const Problem& p, int64_t row, int32_t position) {
    return p.dropout_keys ? Dropout(p, row).kept(position, broadcast(position))[0] : 1.0f;
}

// The unit key of a query of d elements is query · scale. inverse = 1 / (mean(query²) + 1e-6).
struct Unit {
    float scale, inverse;
    Unit(const float* query, int d) : inverse(1.0f / (dot(query, query, d) / d + 1e-6f)) {
        scale = std::sqrt(inverse / d);
    }
};

// The sizes of strips and vectors.
struct Shape {
    int before, after;        // slots before and after a strip that its queries can reach
    int strip, span;          // slots of a strip; its keys, padded to whole panels
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

// Memory of one thread.
struct Scratch {
    Buffer<float> k, v, kt, vt, dk, dv;  // keys of the strip: rows, transposed panels, gradients
    Buffer<float> q, grad, result;       // queries of the block
    Buffer<float> weights, score_grads;  // (BLOCK, span)
    Buffer<int32_t> key_positions;       // of the strip
    std::vector<std::unique_ptr<Buffer<int32_t>>> slots, bucket, ring;  // `once`: keys in earlier rounds
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
          score_grads(backward ? BLOCK * s.span : 0),
          key_positions(s.span),
          low(s.strip),
          high(s.strip) {
        for (int r = 0; p.once && r < p.rounds; ++r) {
            slots.emplace_back(new Buffer<int32_t>(s.span));
            bucket.emplace_back(new Buffer<int32_t>(s.span));
            ring.emplace_back(new Buffer<int32_t>(s.span));
        }
    }
};

}  // namespace
