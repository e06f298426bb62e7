// One strip of slots of one round: gather its keys, compute its queries, add its gradients.

#pragma once

#include <algorithm>
#include <limits>

#include "problem.h"

namespace {

// One strip of one round of one row. in_ring: instead of the strip's queries, those of the row's first chunk, and as
// their keys the last chunk of the round before (rule `chunk`).
template <bool BACKWARD>
struct Strip {
    const Problem& p;
    const Shape& s;
    Scratch& x;
    const int64_t row;
    const int round;
    const bool in_ring;
    const int real;
    const int32_t *positions, *buckets;  // of this round
    const char *q_row, *k_row, *v_row, *grad_row;
    int first, last;  // slots of the queries
    int keys = 0;     // number of keys; x.key_positions has their positions

    Strip(const Problem& p, const Shape& s, Scratch& x, int64_t row, int round, int first, bool in_ring)
        : p(p), s(s), x(x), row(row), round(round), in_ring(in_ring), real(p.real_lengths[row]) {
        positions = positions_of(round);
        buckets = buckets_of(round);
        q_row = row_of(p.q, row, p.heads);
        k_row = p.k.data ? row_of(p.k, row, p.heads) : q_row;
        v_row = row_of(p.v, row, p.heads);
        grad_row = BACKWARD ? row_of(p.grad, row, p.heads) : nullptr;
        this->first = first;
        last = std::min(first + (in_ring ? p.reach : s.strip), real);
    }

    const int32_t* positions_of(int r) const { return p.positions + row * p.positions_row + (int64_t)r * p.length; }
    const int32_t* slots_of(int r) const { return p.slots + row * p.slots_row + (int64_t)r * p.length; }
    const int32_t* buckets_of(int r) const { return p.buckets + row * p.buckets_row + (int64_t)r * p.length; }
    int previous(int r) const { return r ? r - 1 : p.rounds - 1; }
    int ring_start() const { return (std::max(real, 1) - 1) / p.reach * p.reach; }

    void run() {
        if (first >= last) return;
        find_keys();
        if (!keys) return;
        if (p.once) load_history();
        for (int i = first; i < std::min(first + BLOCK, last); ++i) prefetch_query(positions[i]);
        gather_keys();
        for (int start = first; start < last; start += BLOCK) compute_block(start, std::min(start + BLOCK, last));
        if (BACKWARD) scatter_gradients();
    }

    // Find the positions of the keys, and the interval of keys that every query attends to in this round.
    void find_keys() {
        int from, to;
        if (in_ring) {
            from = ring_start(), to = real;
            for (int i = first; i < last; ++i) x.low[i - first] = 0, x.high[i - first] = to - from;
        } else if (p.window) {
            from = std::max(first - p.reach, 0), to = p.causal ? last : std::min(last + p.reach, real);
            int start = first;  // of the bucket, or `reach` slots back
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
                const int high = p.causal ? i + !p.excludes_own : std::min(i + p.reach + 1, end);
                x.high[i - first] = high - from;
            }
        } else {
            from = std::max(first / p.reach - 1, 0) * p.reach, to = last;
            for (int i = first; i < last; ++i) {
                const int chunk = i / p.reach * p.reach;
                x.low[i - first] = std::max(chunk - p.reach, 0) - from;
                x.high[i - first] = std::min(chunk + p.reach, last) - from;
            }
        }
        if (p.first_query) skip_positions_without_query(from, to);
        keys = to - from;
        std::copy_n((in_ring ? positions_of(previous(round)) : positions) + from, keys, (int32_t*)x.key_positions);
        for (int j = keys; j < round_up(keys, PANEL); ++j) x.key_positions[j] = -1;
    }

    // Positions before p.first_query attend to nothing. Keys that no other position attends to need no gathering: [from,
    // to) shrinks to the others.
    void skip_positions_without_query(int& from, int& to) {
        int low = to - from, high = 0;
        for (int i = 0; i < last - first; ++i) {
            if (positions[first + i] < p.first_query || x.low[i] >= x.high[i])
                x.low[i] = x.high[i] = 0;
            else
                low = std::min(low, (int)x.low[i]), high = std::max(high, (int)x.high[i]);
        }
        low = std::min(low, high);
        for (int i = 0; i < last - first; ++i)
            if (x.high[i]) x.low[i] -= low, x.high[i] -= low;
        to = from + high;
        from += low;
    }

    // Load the slots and buckets of the keys in earlier rounds (in_ring: in this one too).
    void load_history() {
        for (int r = 0; r < round + in_ring; ++r) {
            const int32_t *slots = slots_of(r), *bucket = buckets_of(r), *before = slots_of(previous(r));
            for (int j = 0; j < keys; ++j) {
                const int position = x.key_positions[j], slot = slots[position];
                (*x.slots[r])[j] = p.window ? slot : slot / p.reach;
                (*x.bucket[r])[j] = bucket[slot];
                (*x.ring[r])[j] = before[position] >= ring_start() ? -1 : 0;
            }
        }
    }

    // Copy the keys and values of the strip into scratch memory, as fp32 and transposed for products.
    void gather_keys() {
        constexpr int AHEAD = 8;
        const Tensor& keys_from = p.k.data ? p.k : p.q;
        const int padded = round_up(keys, PANEL);
        // In the backward pass the gradients' rows hold the values until they are transposed.
        float* values = BACKWARD ? x.dv : x.v;
        for (int j = 0; j < keys; ++j) {
            if (j + AHEAD < keys) {
                prefetch(keys_from, k_row, x.key_positions[j + AHEAD]);
                prefetch(p.v, v_row, x.key_positions[j + AHEAD]);
            }
            float* k = x.k + j * s.wide;
            fetch(k, keys_from, k_row, x.key_positions[j]);
            const float scale = p.k.data ? p.scale : Unit(k, s.d).scale;
            for (int i = 0; i < s.d; ++i) k[i] *= scale;
            fetch(values + j * s.wide_v, p.v, v_row, x.key_positions[j]);
        }
        std::memset(x.k + keys * s.wide, 0, 4 * (padded - keys) * s.wide);
        std::memset(values + keys * s.wide_v, 0, 4 * (padded - keys) * s.wide_v);
        transpose_panels(x.kt, x.k, padded, s.wide);
        if (!BACKWARD) return;
        transpose_panels(x.vt, x.dv, padded, s.wide_v);
        std::memset(x.dk, 0, 4 * padded * s.wide);
        std::memset(x.dv, 0, 4 * padded * s.wide_v);
    }

    static void transpose_panels(float* to, const float* from, int rows, int wide) {
        for (int row = 0; row < rows; row += PANEL) transpose(to + row * wide, from + row * wide, wide);
    }

    // The queries of slots [start, stop).
    void compute_block(int start, int stop) {
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
            if (start + i + BLOCK < last) prefetch_query(positions[start + i + BLOCK]);
            if (positions[start + i] >= p.first_query) fetch(x.q + i * s.wide, p.q, q_row, positions[start + i]);
            if (BACKWARD) fetch(x.grad + i * s.wide_v, p.grad, grad_row, positions[start + i]);
        }
        for (int g = 0; g < groups; ++g) {
            const int from = g * ROWS, rows = std::min(ROWS, count - from);
            if (begin[g] == end[g]) continue;
            for (int panel = begin[g]; panel < end[g]; ++panel) {
                const int64_t place = from * line + (panel - base) * PANEL;
                tiles<false>(rows, x.q + from * s.wide, s.wide, 1, x.kt + (int64_t)panel * PANEL * s.wide, PANEL, s.d,
                             x.weights + place, line);
                if (BACKWARD)
                    tiles<false>(rows, x.grad + from * s.wide_v, s.wide_v, 1,
                                 x.vt + (int64_t)panel * PANEL * s.wide_v, PANEL, s.dv, x.score_grads + place, line);
            }
            for (int i = from; i < from + rows; ++i) {
                float* weights = x.weights + i * line - base * PANEL;
                if (BACKWARD)
                    score_gradients(start + i, weights, x.score_grads + i * line - base * PANEL, begin[g], end[g]);
                else
                    softmax_weights(start + i, weights, begin[g], end[g], i);
            }
            const int64_t place = from * line + (begin[g] - base) * PANEL;
            const int64_t key = begin[g] * PANEL, steps = (end[g] - begin[g]) * PANEL;
            const int width = BACKWARD ? s.wide : s.wide_v;
            const float* a = (BACKWARD ? x.score_grads : x.weights) + place;
            const float* b = (BACKWARD ? x.k + key * s.wide : x.v + key * s.wide_v);
            for (int c = 0; c < width; c += PANEL)
                tiles<false>(rows, a, line, 1, b + c, width, steps, x.result + from * width + c, width);
            for (int i = from; i < from + rows; ++i) {
                if (BACKWARD) {
                    float* to = floats_at(p.dq, row, p.heads, positions[start + i]);
                    const float* result = x.result + i * width;
                    for (int c = 0; c < s.d; ++c) to[c] += result[c];
                } else {
                    merge(positions[start + i], x.result + i * width, i);
                }
            }
        }
        if (BACKWARD) add_key_gradients(count, groups, begin, end, base, top, line);
    }

    // Prefetch what a query of the next block needs.
    void prefetch_query(int position) const {
        prefetch(p.q, q_row, position);
        if (BACKWARD) prefetch(p.grad, grad_row, position);
        const Tensor& to = BACKWARD ? p.dq : p.out;
        prefetch_floats(to, (float*)row_of(to, row, p.heads), position);
        __builtin_prefetch(p.peak + row * p.length + position, 1);
        __builtin_prefetch(p.total + row * p.length + position, 1);
    }

    float peak[BLOCK], total[BLOCK];

    // Scores of one query -> weights relative to their maximum.
    void softmax_weights(int slot, float* weights, int begin, int end, int i) {
        Floats high = broadcast(EXCLUDED);
        const Mask mask(*this, slot);
        for (int panel = begin; panel < end; ++panel)
            for (int half = 0; half < 2; ++half) {
                float* at = weights + panel * PANEL + half * LANES;
                const Floats score = mask.exclude(load<Floats>(at), panel * PANEL + half * LANES);
                high = larger(high, score);
                store(at, score);
            }
        peak[i] = largest(high);
        // If all scores are EXCLUDED, every weight must still become 0.
        const Floats from = broadcast(peak[i] <= EXCLUDED ? 0.0f : peak[i]);
        Floats sums{};
        for (int panel = begin; panel < end; ++panel)
            for (int half = 0; half < 2; ++half) {
                float* at = weights + panel * PANEL + half * LANES;
                Floats weight = exponential(load<Floats>(at) - from);
                sums += weight;
                if (p.dropout_keys) weight *= mask.kept(panel * PANEL + half * LANES);
                store(at, weight);
            }
        total[i] = sum(sums);
    }

    // Merge the result of one query with those of the rounds before.
    void merge(int position, const float* result, int i) {
        float* out = floats_at(p.out, row, p.heads, position);
        float &old_peak = p.peak[row * p.length + position], &sum = p.total[row * p.length + position];
        if (peak[i] <= EXCLUDED) return;
        const float top = std::max(old_peak, peak[i]);
        const float old = old_peak <= EXCLUDED ? 0.0f : std::exp(old_peak - top), now = std::exp(peak[i] - top);
        for (int c = 0; c < s.dv; ++c) out[c] = out[c] * old + result[c] * now;
        sum = sum * old + total[i] * now;
        old_peak = top;
    }

    // Scores and products grad · v of one query -> weights, and the gradients of the scores.
    void score_gradients(int slot, float* weights, float* score_grads, int begin, int end) {
        const int64_t place = row * p.length + positions[slot];
        const Floats lse = broadcast(p.peak[place]), delta = broadcast(p.total[place]);
        const Mask mask(*this, slot);
        for (int panel = begin; panel < end; ++panel)
            for (int half = 0; half < 2; ++half) {
                const int key = panel * PANEL + half * LANES;
                const Floats weight = exponential(mask.exclude(load<Floats>(weights + key), key) - lse);
                Floats dropped = weight, product = load<Floats>(score_grads + key);
                if (p.dropout_keys) {
                    const Floats kept = mask.kept(key);
                    dropped *= kept, product *= kept;
                }
                store(weights + key, dropped);
                store(score_grads + key, weight * (product - delta));
            }
    }

    // Add the gradients of keys and values: each panel, from the groups of queries that computed it.
    void add_key_gradients(int count, int groups, const int* begin, const int* end, int base, int top, int64_t line) {
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
                        tiles<true>(rows, x.score_grads + place, 1, line, x.q + from * s.wide + c, s.wide, steps,
                                    x.dk + key * s.wide + c, s.wide);
                }
            }
        }
    }

    // Add the gradients of the strip's keys and values to those of their positions.
    void scatter_gradients() {
        constexpr int AHEAD = 8;
        float *dk = (float*)row_of(p.dk, row, p.heads), *dv = (float*)row_of(p.dv, row, p.heads);
        for (int j = 0; j < keys; ++j) {
            if (j + AHEAD < keys) {
                prefetch_floats(p.dk, dk, x.key_positions[j + AHEAD]);
                prefetch_floats(p.dv, dv, x.key_positions[j + AHEAD]);
            }
            float *to = dk + x.key_positions[j] * p.dk.place, *to_v = dv + x.key_positions[j] * p.dv.place;
            const float scale = p.k.data ? p.scale : 1.0f;  // finish_backward scales to unit length
            for (int c = 0; c < s.d; ++c) to[c] += scale * x.dk[j * s.wide + c];
            for (int c = 0; c < s.dv; ++c) to_v[c] += x.dv[j * s.wide_v + c];
        }
    }

    // Which of the strip's keys one query attends to.
    struct Mask {
        const Strip& t;
        const int32_t position, low, high;
        const int slot;

        Mask(const Strip& t, int slot)
            : t(t),
              position(t.positions[slot]),
              low(t.x.low[slot - t.first]),
              high(t.x.high[slot - t.first]),
              slot(slot) {}

        // The scores of the keys, LANES from `key` on; EXCLUDED for those that the query does not attend to.
        Floats exclude(Floats score, int key) const {
            const Problem& p = t.p;
            const bool plain = (p.window && (p.causal || !p.excludes_own)) || (!p.window && !p.causal && !p.excludes_own);
            if (plain && !p.once && key >= low && key + LANES <= high) return score;
            const Ints number = count_up() + key;
            Ints found = (Ints)(number >= broadcast(low)) & (Ints)(number < broadcast(high));
            if (!plain) {
                const Ints other = load<Ints>(t.x.key_positions + key);
                if (!p.window && p.causal)
                    found &= (Ints)(other < broadcast(position + !p.excludes_own));
                else
                    found &= (Ints)(other != broadcast(position));
            }
            if (p.once) found &= ~counted_before(key);
            return choose(found, score, broadcast(EXCLUDED));
        }

        // Which keys, LANES from `key` on, counted for this query in an earlier round (rule `once`).
        Ints counted_before(int key) const {
            const Problem& p = t.p;
            Ints found{};
            for (int r = 0; r < t.round + t.in_ring; ++r) {
                const int own = t.slots_of(r)[position];
                const Ints slots = load<Ints>(*t.x.slots[r] + key);
                if (p.window) {
                    const Ints same = (Ints)(load<Ints>(*t.x.bucket[r] + key) == broadcast(t.buckets_of(r)[own]));
                    const Ints back = broadcast(own) - slots;
                    const Ints near = (Ints)(back <= broadcast(p.reach)) & (Ints)(back >= broadcast(-p.reach));
                    found |= same & near;
                } else {
                    const int chunk = own / p.reach;
                    found |= (Ints)(slots == broadcast(chunk)) | (Ints)(slots == broadcast(chunk - 1));
                    // Not in this round: the pairs of its own ring are those that are computed now.
                    if (chunk == 0 && r < t.round) found |= load<Ints>(*t.x.ring[r] + key);
                }
            }
            return found;
        }

        // The factors of dropout for the keys, LANES from `key` on.
        Floats kept(int key) const {
            return Dropout(t.p, t.row).kept(position, load<Ints>(t.x.key_positions + key));
        }
    };
};

}  // namespace
