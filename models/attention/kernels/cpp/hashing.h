// Buckets by angular hashing, and the sorted order by bucket.

#pragma once

#include <vector>

#include "phases.h"
#include "tensors.h"
#include "tiles.h"

extern "C" {

// Buckets by angular hashing.
struct Hashing {
    Tensor x;
    const float* rotations;  // (rounds, factors, heads, half of the factor, width)
    const int32_t* halves;   // of every factor
    int32_t* buckets;        // (rows, rounds, length)
    int32_t factors, batch, heads, rounds, length, threads;
};

// Sorted order from buckets: a stable counting sort.
struct Sorting {
    const int32_t* buckets;  // (rows, rounds, length), none negative
    const int32_t* padding;  // (rows, length): 1 where a position is not real; or null
    int32_t *positions, *sorted_buckets;
    int32_t rows, rounds, length, n_buckets, threads;
};
}

namespace {

struct HashSpace {
    Buffer<float> x, xt, products;
    explicit HashSpace(int wide) : x(PANEL * wide), xt(PANEL * wide), products(ROWS * PANEL) {}
};

// Hash the positions of a piece, PANEL at a time. They are transposed: lanes are positions, so that no sum or maximum
// goes across lanes.
void hash_positions(const Hashing& h, int wide, int64_t row, int64_t begin, HashSpace& space) {
    const char* x_row = row_of(h.x, row, h.heads);
    const int64_t end = std::min<int64_t>(begin + PIECE, h.length);
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
                            const Ints now = broadcast(r + i);
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

// Sort one round of one row; positions that are not real come last.
void sort_positions(const Sorting& s, int64_t task, SortSpace& space) {
    const int32_t* buckets = s.buckets + task * s.length;
    const int32_t* padding = s.padding ? s.padding + task / s.rounds * s.length : nullptr;
    int32_t *positions = s.positions + task * s.length, *sorted_buckets = s.sorted_buckets + task * s.length;
    std::vector<int32_t>& next = space.starts;
    std::fill(next.begin(), next.end(), 0);
    auto bucket_of = [&](int i) { return padding && padding[i] ? s.n_buckets : buckets[i]; };
    for (int i = 0; i < s.length; ++i) ++next[bucket_of(i) + 1];
    for (size_t b = 1; b < next.size(); ++b) next[b] += next[b - 1];
    for (int i = 0; i < s.length; ++i) {
        const int32_t bucket = bucket_of(i), slot = next[bucket]++;
        positions[slot] = i, sorted_buckets[slot] = bucket;
    }
}

}  // namespace
